"""Results → tables: column heads, and rows of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from .. import runs
from ..evaluation.better import away
from .entries import Column, columns, head, interval, label, starts, text


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table: column heads, and a row for each model as it was and one for each run."""
    shown = {name: m for name, m in results["metrics"].items() if not m.get("group")}
    heads = ["", *(head(m) for m in shown.values()), "training", "states"]

    def cell(of: Column, name: str) -> str:
        spread = interval(of.numbers[name], *of.asked[name])
        return text(of.numbers[name], shown[name]["format"]) + (f" ({spread})" if spread else "")

    def took(entry: Mapping[str, Any] | None) -> list[str]:
        if entry is None:
            return ["", ""]
        return [f"{entry['seconds']:.0f} s", runs.bytes_text(entry["optimizer_state_bytes"])]

    return heads, [[of.name, *(cell(of, name) for name in shown), *took(of.entry)] for of in columns(results)]


WIDE = 7  # columns of numbers that a page shows; a wider table is transposed


def turned(heads: list[str], body: list[list[str]], width: int | None = None) -> tuple[list[str], list[list[str]]]:
    """The table, transposed to one column for each run if it would be too wide to read.

    Args:
        width: characters of the terminal's width; None for a page, which has room for seven numbers a row.
    """
    columns = list(zip(heads, *body, strict=True))
    other = list(columns[0]), [list(column) for column in columns[1:]]
    if width is None:
        return other if len(heads) - 1 > WIDE else (heads, body)
    return (heads, body) if _width(heads, body) <= width else min((heads, body), other, key=lambda t: _width(*t))


def widths(heads: Sequence[str], body: Sequence[Sequence[str]]) -> list[int]:
    """Characters that a terminal needs for each column of a table, whose heads may break between words."""
    columns = zip(heads, *body, strict=True)
    return [max(map(len, [*head.split(), "", *cells])) + 3 for head, *cells in columns]


def _width(heads: Sequence[str], body: Sequence[Sequence[str]]) -> int:
    return sum(widths(heads, body)) + 1


def details(results: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """The other tables: title → a row for each metric, with its name, and its value in each of `columns`."""
    tables: dict[str, list[list[str]]] = {}
    every = columns(results)
    for name, m in results["metrics"].items():
        values = [of.numbers[name] for of in every]
        if m.get("group") and any(value is not None for value in values):
            row = [head(m), *(text(value, m["format"]) for value in values)]
            tables.setdefault(m["group"], []).append(row)
    if changes := against_alone(results):
        tables["Against training on each objective alone"] = changes
    return tables


def against_alone(results: Mapping[str, Any]) -> list[list[str]]:
    """How much better (+) or worse (−) each run does on each objective than training on that one alone, and the mean.

    With several seeds, runs of the same seed are compared. Empty unless every objective was trained on alone, from the
    one start that all have.
    """
    entries, scores = results["runs"], results.get("scores", {})
    alone = {(e["config"].get("alone"), e["seed"]): e["after"] for e in entries if e["config"].get("alone")}
    if not scores or any((name, e["seed"]) not in alone for name in scores for e in entries):
        return []
    if any(e["after"][metric] is None for metric in scores.values() for e in entries) or len(starts(results)) > 1:
        return []
    table, means = [], [0.0] * len(entries)
    for name, metric in scores.items():
        better = results["metrics"][metric]["better"]
        changes = [
            away(better, alone[name, entry["seed"]][metric]) - away(better, entry["after"][metric]) for entry in entries
        ]
        means = [mean + change / len(scores) for mean, change in zip(means, changes, strict=True)]
        table.append([f"{name} ↑", "", *(f"{change:+.3f}" for change in changes)])
    return [*table, ["mean ↑", "", *(f"{mean:+.3f}" for mean in means)]]


MERGING = {
    "unmerged": "adapter on its base",
    "merged": "merged",
    "merged_bf16": "merged, rounded to bf16",
    "merged_nf4": "merged, rounded to 4 bits",
}


def merging(results: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """How merging the adapter, and rounding the merged weights, changes each run: (name, a table with its heads)."""
    found = []
    for entry in results["runs"]:
        if of := entry.get("merging"):
            hows = [how for how in MERGING if how in of]
            table = [["", *(MERGING[how] for how in hows)]]
            for name, m in results["metrics"].items():
                if not m.get("group") and name in of["unmerged"]:  # attacks are made on the final model only
                    table.append([head(m), *(text(of[how].get(name), m["format"]) for how in hows)])
            found.append((label(entry, results), table))
    return found


ATTACKS = "Attacks"  # the group of what attacks measure
_OF_ATTACKS = ("relearn_", "bits8_", "nf4_", "leak_at_", "paraphrase_", "prefix_")  # of those in the first table, too


def attacks(results: Mapping[str, Any]) -> list[list[str]]:
    """What attacks bring back: a row for each number, with its name, and its value in each of `columns`."""
    every, table = columns(results), []
    for name, m in results["metrics"].items():
        values = [of.numbers[name] for of in every]
        if (m.get("group") == ATTACKS or name.startswith(_OF_ATTACKS)) and any(value is not None for value in values):
            table.append([head(m), *(text(value, m["format"]) for value in values)])
    return table


def over_seeds(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """For several seeds: each method's mean, lowest and highest, a row for each number of the first table."""
    entries = results["runs"]
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    if len({entry["seed"] for entry in entries}) < 2 or len(starts(results)) > 1:
        return [], []

    def cell(method: str, name: str, form: str) -> str:
        values = [entry["after"][name] for entry in entries if entry["method"] == method]
        if any(value is None for value in values):
            return "—"
        mean, low, high = (text(f(values), form) for f in (fmean, min, max))
        return f"{mean} ({low}–{high})" if len(values) > 1 else mean

    shown = {name: m for name, m in results["metrics"].items() if not m.get("group")}
    return ["", *methods], [[head(m), *(cell(of, name, m["format"]) for of in methods)] for name, m in shown.items()]


def cost(results: Mapping[str, Any]) -> list[list[str]]:
    """What each run took: a row for each measure, with its name and every run's."""
    entries = results["runs"]
    measures: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "training": lambda e: f"{e['seconds']:.1f} s",
        "a step (median)": lambda e: text(e.get("step_seconds"), ".3f") + " s",
        "following the curve": lambda e: text(e.get("watching_seconds"), ".1f") + " s",
        "optimizer states": lambda e: runs.bytes_text(e["optimizer_state_bytes"]),
        "peak memory": lambda e: runs.bytes_text(e["peak_memory_bytes"]),
    }
    return [[name, *(measure(entry) for entry in entries)] for name, measure in measures.items()]
