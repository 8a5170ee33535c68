"""results.json → one offline HTML page, and the same table for the terminal."""

from __future__ import annotations

import errno
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from . import pictures, rerun, runs
from . import starts as of_starts
from .errors import UserError
from .evaluation import digits
from .evaluation.shares import wilson
from .folder import written
from .pictures import Look
from .points import effective

# One color for each method, distinguishable with red-green color blindness (after Okabe and Ito's palette), each with a
# contrast of at least 3 to white paper and to dark.
COLOURS = {"Joint AdamW": "#C18600", "Alternating AdamW": "#1D9AE0", "DualOptim": "#009E73", "DualOptim+": "#CC3377",
           "DualOptim 8-bit": "#41A283", "DualOptim+ 8-bit": "#A22AD6", "Joint AdamW 8-bit": "#A5780A",
           "Alternating AdamW 8-bit": "#1F78B4", "PCGrad": "#935A4F", "GRU": "#696969", "PDU": "#D55E00"}  # fmt: skip
SPARE = "#0072B2", "#8C6BB1", "#A6761D", "#1B9E77", "#D95F02", "#7570B3", "#929292"  # for methods of other names
# A shape for each method, in their order: matplotlib's name → an SVG path in a square of 12.
SHAPES = {"o": "M6 1a5 5 0 1 0 .01 0z", "s": "M1.7 1.7h8.6v8.6h-8.6z", "^": "M6 .8l5.4 10h-10.8z",
          "D": "M6 .4l5.6 5.6l-5.6 5.6l-5.6-5.6z", "v": "M6 11.2l5.4-10h-10.8z",
          "P": "M4.2 .8h3.6v3.4h3.4v3.6h-3.4v3.4h-3.6v-3.4h-3.4v-3.6h3.4z", "p": "M6 .7l5.3 3.9l-2 6.3h-6.6l-2-6.3z",
          "d": "M6 .4l3.6 5.6l-3.6 5.6l-3.6-5.6z"}  # fmt: skip
ARROWS = {"lower": "↓", "higher": "↑", "zero": "→ 0", "chance": "→ 0.5", "neither": ""}


def label(entry: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """A run's name: its method, with the seed where there are several, and the part where a task has several."""
    seeds = {other["seed"] for other in results["runs"]}
    seed = f", seed {entry['seed']}" if len(seeds) > 1 else ""
    return entry["method"] + seed + (f", part {entry['part']}" if "part" in entry else "")


def setting_text(value: Any) -> str:
    """A setting's value for people."""
    return f"{value:g}" if isinstance(value, float) else str(value)


class Start(NamedTuple):
    """Runs that start alike: the start's name, empty where there is but one, the numbers before training, the runs."""

    name: str
    before: dict[str, float | None]
    entries: list[Mapping[str, Any]]

    @property
    def title(self) -> str:
        """The heading of its numbers before training."""
        return f"before, {self.name}" if self.name else "before"


def starts(results: Mapping[str, Any]) -> list[Start]:
    """The starts of the runs. Only runs of one start are compared: others forget other rows, or from another model."""
    groups = of_starts.groups(results["runs"])
    firsts = [of_starts.settings(group[0]) for group in groups]
    differing = [key for key in firsts[0] if any(first.get(key) != firsts[0][key] for first in firsts)]
    parts = [group[0].get("part") for group in groups]

    def name(i: int) -> str:
        if len(groups) == 1:
            return ""
        if parts[i] is None:
            return ", ".join(f"{key} {setting_text(firsts[i].get(key))}" for key in differing)
        # A later part starts from what each method left.
        return f"part {parts[i]}" if parts.count(parts[i]) == 1 else "; ".join(label(e, results) for e in groups[i])

    def before(group: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
        names = dict.fromkeys(name for entry in group for name in entry["before"])  # some runs may measure more
        return {n: next((e["before"][n] for e in group if e["before"].get(n) is not None), None) for n in names}

    return [Start(name(i), before(group), group) for i, group in enumerate(groups)]


class Column(NamedTuple):
    """What a table shows side by side: the numbers of a start before training, or those of a run after it."""

    name: str
    numbers: Mapping[str, float | None]
    asked: Mapping[str, tuple[int, float]]  # as the function `asked` gives it for each metric
    entry: Mapping[str, Any] | None  # the run's


def columns(results: Mapping[str, Any]) -> list[Column]:
    """Each start, and behind it its runs."""

    def questions(entry: Mapping[str, Any], when: str) -> dict[str, tuple[int, float]]:
        return {name: asked(entry, results, name, when) for name in results["metrics"]}

    found = []
    for start in starts(results):
        found.append(Column(start.title, start.before, questions(start.entries[0], "before"), None))
        found += [
            Column(label(entry, results), entry["after"], questions(entry, "after"), entry) for entry in start.entries
        ]
    return found


def subject(results: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the task and of the model; of several where the starts of many runs have their own."""

    def each(name: str) -> str:
        configs = [entry["config"] for entry in results["runs"] if "part" not in entry]  # those go on with what is left
        found = dict.fromkeys(config.get(name) or results[name] for config in configs)
        return ", ".join(found) if len(found) > 1 else results[name]

    return each("task"), each("model")


def looks(results: Mapping[str, Any]) -> dict[str, Look]:
    """The color and the shape of each method."""
    methods = list(dict.fromkeys(entry["method"] for entry in results["runs"]))
    spare = itertools.cycle(SPARE)
    return {
        method: Look(COLOURS.get(method) or next(spare), shape)
        for method, shape in zip(methods, itertools.cycle(SHAPES), strict=False)
    }


def text(value: float | None, spec: str) -> str:
    """A number as it is shown; a dash for none."""
    return "—" if value is None or math.isnan(value) else digits.text(value, spec)


def head(metric: Mapping[str, Any]) -> str:
    """A metric's name and which way is better."""
    return f"{metric['label']} {ARROWS[metric['better']]}".rstrip()


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
    """How much better or worse each run does on each objective than training on that one alone, and the mean.

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
        changes = [entry["after"][metric] - alone[name, entry["seed"]][metric] for entry in entries]
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


def brought_back(results: Mapping[str, Any]) -> list[str]:
    """What merging or rounding changed in a run, in sentences: shares that moved by two standard errors or more."""
    said = []
    for entry in results["runs"]:
        of = entry.get("merging", {})
        for name, m in results["metrics"].items():
            was = of.get("unmerged", {}).get(name)
            n, tells = asked(entry, results, name)
            if m.get("group") or was is None or not n:
                continue
            for how in list(MERGING)[1:]:
                now = of.get(how, {}).get(name)
                if now is not None and abs(now - was) >= 2 * _spread(was, now, tells):
                    then, after = (text(value, m["format"]) for value in (was, now))
                    said.append(f"{label(entry, results)}: {MERGING[how]}, {m['label']} is {after}, not {then}.")
    return said


def verdict(entry: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """A run's result in a sentence: the task's own verdict, or else the two numbers of the plane."""
    if said := entry.get("verdict"):
        return str(said)
    shown = []
    for name in results.get("plane") or ():
        m = results["metrics"].get(name)
        if m is not None and entry["after"][name] is not None:
            was, now = (text(entry[when][name], m["format"]) for when in ("before", "after"))
            shown.append(f"{m['label']} {was} → {now}")
    return "; ".join(shown) + "." if shown else ""


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """The result of all runs together, then that of each in a sentence, with its name where there are several."""
    said = [(label(entry, results), verdict(entry, results)) for entry in results["runs"]]
    each = [f"{name}: {sentence}" if len(said) > 1 else sentence for name, sentence in said if sentence]
    return [*([first] if (first := headline(results)) else []), *each]


def headline(results: Mapping[str, Any], most: int = 5) -> str:
    """Which points of the plane no other of their start beats, a sentence for each start; none for fewer than two.

    Args:
        most: how many are named.
    """
    from .report_points import by_start

    said = [(start.name, _compared(points, results.get("plane") or (), most)) for start, points in by_start(results)]
    return " ".join(f"{name[0].upper()}{name[1:]}: {text}" if name else text for name, text in said if text)


def _compared(points: Sequence[Mapping[str, Any]], plane: Sequence[str], most: int) -> str:
    """Which points of one start no other beats, in a sentence; empty for fewer than two."""
    from .report_points import name

    points = [point for point in points if plane and None not in [point["values"].get(key) for key in plane]]
    if len(points) < 2:
        return ""

    def listed(some: Sequence[Mapping[str, Any]]) -> str:
        names = [name(point) for point in some[:most]]
        names += [f"{len(some) - most} more"] if len(some) > most else []
        return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

    first = [point for point in points if point["front"]]
    beaten = [point for point in points if not point["front"]]
    seeds = max(len(point["seeds"]) for point in points)
    over = f"by the means of {seeds} seeds" if seeds > 1 else "on one seed"
    if not beaten:
        return f"None of {listed(first)} beats another in both forgetting and keeping, {over}."
    if len(first) == 1:
        return f"{listed(first)} forgets and keeps at least as much as {listed(beaten)}, {over}."
    lost = f"{listed(beaten)} {'is' if len(beaten) == 1 else 'are'} beaten in both"
    return f"Nothing beats {listed(first)} in both forgetting and keeping, {over}; {lost}."


def remarks(results: Mapping[str, Any]) -> list[str]:
    """Why each run ended where it did, what merging an adapter changed, and what else a reader should know."""
    entries = [entry for entry in results["runs"] if entry.get("stopped")]
    names = [f"{label(entry, results)}: " if len(results["runs"]) > 1 else "" for entry in entries]
    stopped = [name + e["stopped"] for name, e in zip(names, entries, strict=True)]
    return [*results.get("notes", ()), *stopped, *brought_back(results)]


def asked(entry: Mapping[str, Any], results: Mapping[str, Any], name: str, when: str = "after") -> tuple[int, float]:
    """How many questions a run's share is of, and how many independent ones tell as much; 0 for what is no share."""
    n = {**results.get("counts", {}), **entry.get("counts", {})}.get(name, 0)
    return n, effective(entry, name, n, when)


def interval(value: float | None, n: int, tells: float | None = None) -> str:
    """The 95 % Wilson interval of a share of n questions, in percent: "3–21"; empty where there is no share.

    Args:
        tells: how many independent questions tell as much; None for n.
    """
    if value is None or not 0 <= value <= 1 or not n:
        return ""
    low, high = wilson(value, n, tells)
    return f"{100 * low:.0f}–{100 * high:.0f}"


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


def not_shown(results: Mapping[str, Any]) -> list[str]:
    """What the page lacks, and why: numbers that could not be computed, and pictures of what was not measured."""
    entries, said = results["runs"], not_computed(results)
    if (count := len(starts(results))) > 1:
        said.append(f"Findings: there are {count} starts, and runs of different starts are not compared.")
    if any("part" in entry for entry in entries):
        said.append("What was forgotten against what was kept: parts forget different rows.")
    elif not results.get("plane"):
        said.append("What was forgotten against what was kept: no two numbers of the task stand for them.")
    if all(len(entry["curve"]) < 2 for entry in entries):
        said.append("During training: the curve was measured at its start alone (curve_points 0).")
    if none := [label(entry, results) for entry in entries if not entry.get("diagnostics")]:
        said.append(
            f"Conflict by layer: {', '.join(none)}; it is read off the states of DualOptim+ and DualOptim alone."
        )
    if results.get("private"):
        said.append("Answers before and after: the run is private, and no file of it holds a text of rows or replies.")
    if not attacks(results) and not any(entry["config"].get("attacks") for entry in entries):
        said.append("Attacks: none was asked for; --attacks '[relearn, leak]' tells whether the forgotten comes back.")
    if len({entry["seed"] for entry in entries}) < 2:
        said.append("Spread over seeds: there is one seed; dualoptim compare --seeds '[0, 1, 2]' has three.")
    return said


def heat_map(entry: Mapping[str, Any]) -> str:
    """The conflict between objectives, layer by layer, as SVG; empty where it was not measured."""
    return pictures.heat_map(entry.get("diagnostics"))


def not_computed(results: Mapping[str, Any]) -> list[str]:
    """The numbers that no run has, and why, grouped by reason."""
    why: dict[str, list[str]] = {}
    for name, m in results["metrics"].items():
        reasons = [entry.get("not_computed", {}).get(name) for entry in results["runs"]]
        if all(reasons):
            group = m.get("group", "")
            why.setdefault(str(reasons[0]), []).append(m["label"] + (f" ({group.lower()})" if group else ""))
    return [f"{', '.join(names)}: {reason}" for reason, names in why.items()]


def seen(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in sentences: the best of each metric, and which others cannot be told apart from it.

    Shares of n questions are compared as two proportions, of as many independent questions as tell as much: a
    difference below twice its standard error does not count. Other metrics are ranked without a test. With several
    seeds, methods are compared by their means, and are not told apart where the ranges of their seeds overlap.
    """
    entries = results["runs"]
    if len(entries) < 2 or len(starts(results)) > 1:
        return []
    one_seed, said = len({entry["seed"] for entry in entries}) == 1, []
    for name, metric in results["metrics"].items():
        of: dict[str, list[Any]] = {}
        for entry in entries:
            of.setdefault(entry["method"], []).append(entry["after"][name])
        if (
            metric["better"] == "neither"
            or metric.get("group")
            or any(value is None or math.isnan(value) for each in of.values() for value in each)
        ):
            continue
        values = {method: fmean(each) for method, each in of.items()}
        word, key = _BEST[metric["better"]]
        best = min(values.values(), key=key)
        shown = {method: text(value, metric["format"]) for method, value in values.items()}
        first = [method for method in values if shown[method] == text(best, metric["format"])]
        sentence = f"{metric['label'][0].upper()}{metric['label'][1:]}: "
        if len(first) == len(values):
            said.append(f"{sentence}{shown[first[0]]} for all.")
            continue
        sentence += f"{' and '.join(first)} {'is' if len(first) == 1 else 'are'} {word}"
        rest = [method for method in values if method not in first]
        if not one_seed:
            close = [m for m in rest if any(min(of[m]) <= max(of[f]) and min(of[f]) <= max(of[m]) for f in first)]
            sentence += f"; not told apart over seeds: {', '.join(close)}" if close else ""
        elif n := results.get("counts", {}).get(name):
            tell = {entry["method"]: effective(entry, name, n) for entry in entries}
            least = min(tell[method] for method in first)
            close = [
                method
                for method in rest
                if abs(values[method] - best) < 2 * _spread(values[method], best, min(tell[method], least))
            ]
            sentence += f"; not told apart on {n} questions: {', '.join(close)}" if close else ", and alone there"
        said.append(f"{sentence} ({', '.join(f'{method} {value}' for method, value in shown.items())}).")
    if one_seed:
        said.append("One seed: another seed moves every number, and no method is better for a lead within that noise.")
    return said


_BEST: dict[str, tuple[str, Callable[[float], float]]] = {
    "lower": ("lowest", lambda value: value),
    "higher": ("highest", lambda value: -value),
    "zero": ("nearest to 0", abs),
    "chance": ("nearest to 0.5", lambda value: abs(value - 0.5)),
}


def _spread(a: float, b: float, n: float) -> float:
    """Standard error of the difference of two shares of n questions, with one right and one wrong answer added."""
    p = ((a + b) * n + 1) / (2 * n + 2)
    return math.sqrt(max(0.0, 2 * p * (1 - p) / n))  # 0 for values that are no shares


def terminal(results: Mapping[str, Any]) -> None:
    """Print the table and the findings."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)  # what is shown was written by models and users
    if "planned" in results:
        from . import report_points as points

        console.print(headline(results), style="bold", highlight=False)
        heads, body = points.table(results)
        _print_table(console, results, heads, body[: points.MOST_SHOWN])
        if len(body) > points.MOST_SHOWN:
            console.print(f"· and {len(body) - points.MOST_SHOWN} more, on the page", highlight=False)
        for sentence in points.remarks(results):
            console.print(f"· {sentence}", highlight=False)
        return
    for sentence in verdicts(results):
        console.print(sentence, style="bold", highlight=False)
    heads, body = turned(*rows(results), width=console.width)
    _print_table(console, results, heads, body)
    for sentence in (*remarks(results), *seen(results)):
        console.print(f"· {sentence}", highlight=False)
    for sentence in not_computed(results):
        console.print(f"· not computed: {sentence}", highlight=False)


def _print_table(console: Any, results: Mapping[str, Any], heads: list[str], body: Sequence[list[str]]) -> None:
    from rich.table import Table

    title: str | None = " · ".join(subject(results))
    for columns in _fitting(heads, body, console.width):
        table = Table(title=title, title_justify="left")
        for i in columns:
            words = max(map(len, heads[i].split()), default=0)
            table.add_column(heads[i], justify="right" if i else "left", no_wrap=not i, min_width=words)
        for row in body:
            table.add_row(*(row[i] for i in columns))
        console.print(table)
        title = None


def _widths(heads: Sequence[str], body: Sequence[Sequence[str]]) -> list[int]:
    """Characters that a terminal needs for each column of a table, whose heads may break between words."""
    columns = zip(heads, *body, strict=True)
    return [max(map(len, [*head.split(), "", *cells])) + 3 for head, *cells in columns]


def _width(heads: Sequence[str], body: Sequence[Sequence[str]]) -> int:
    return sum(_widths(heads, body)) + 1


def _fitting(heads: Sequence[str], body: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """The columns of a table in parts that fit the terminal's width, each part with the first column."""
    widths = _widths(heads, body)
    parts: list[list[int]] = [[0]]
    for i in range(1, len(heads)):
        if len(parts[-1]) > 1 and sum(widths[j] for j in (*parts[-1], i)) + 1 > width:
            parts.append([0])
        parts[-1].append(i)
    return parts


def curves(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the task follows over the steps, for each start, a title and an SVG each; none if it was measured once."""
    titles = results.get("curves", {"forget": "To forget ↓", "retain": "To keep ↑"})
    look, made = looks(results), []
    if all(len(entry["curve"]) < 2 for entry in results["runs"]):
        return []
    for start, (name, title) in itertools.product(starts(results), titles.items()):
        lines = [
            (look[e["method"]], [at["step"] for at in e["curve"]], [at[name] for at in e["curve"]])
            for e in start.entries
        ]
        whose = f"{title}, {start.name}" if start.name else title
        made.append((whose, pictures.curve(lines, f"{whose}: {results['followed']} over the optimizer steps.")))
    return made


def page(*several: Mapping[str, Any]) -> str:
    """The HTML page of one run's results, or of several, a chapter each, in one self-contained file."""
    title = ", ".join(dict.fromkeys(" · ".join(subject(results)) for results in several))
    chapters = [chapter(results) for results in several]
    return pictures.numbered(_render("report.html.jinja", title=title, chapters=chapters))


def _render(name: str, **context: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dualoptim"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name).render(**context)


def chapter(results: Mapping[str, Any]) -> str:
    """The part of the page that shows one run's results, or those of many."""
    from . import report_points as points

    entries, look, (task, model) = results["runs"], looks(results), subject(results)
    every = {
        "results": results,
        "task": task,
        "model": model,
        "seeds": list(dict.fromkeys(entry["seed"] for entry in entries)),
        "looks": look,
        "shapes": SHAPES,
        "headline": headline(results),
        "planes": points.planes(results),
        "read": points.how_to_read(results),
        "versions": entries[0].get("fingerprints", {}).get("versions", ""),
        "command": rerun.command(results),
    }
    if "planned" in results:
        heads, body = points.table(results)
        of_rows = [(None, *some) for _, some in points.by_start(results)]
        return _render(
            "points.html.jinja",
            title="What was forgotten, and what was kept" if results["plane"] else "What each point came to",
            heads=heads,
            body=body,
            marks=[look.get(point["method"]) if point else None for some in of_rows for point in some],
            remarks=points.remarks(results),
            settings=points.settings(results),
            **every,
        )
    numbers, side_by_side = rows(results), columns(results)
    heads, body = turned(*numbers)
    of_runs = [look[entry["method"]] for entry in entries]
    marks = [look[of.entry["method"]] if of.entry else None for of in side_by_side]
    is_turned = heads is not numbers[0]
    forgets = "forget" in results.get("curves", {"forget": ""})
    return _render(
        "chapter.html.jinja",
        title="What was forgotten, and what was kept" if forgets else "What each objective came to",
        heads=heads,
        body=body,
        columns=[None, *marks] if is_turned else [],
        marks=[] if is_turned else marks,
        side_by_side=[of.name for of in side_by_side],
        looks_of=[None, *marks],
        starts=[start.name for start in starts(results)],
        verdicts=[(look[e["method"]], label(e, results), said) for e in entries if (said := verdict(e, results))],
        seen=[*remarks(results), *seen(results)],
        merging=merging(results),
        details={title: table for title, table in details(results).items() if title != ATTACKS},
        over_seeds=over_seeds(results),
        attacks=attacks(results),
        cost=cost(results),
        not_shown=not_shown(results),
        curves=curves(results),
        heat_maps=[
            (label(e, results), drawn, e["seed"] == entries[0]["seed"]) for e in entries if (drawn := heat_map(e))
        ],
        labels=[label(entry, results) for entry in entries],
        of_runs=of_runs,
        questions=_questions(results),
        settings=_settings(entries),
        **every,
    )


def _questions(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every question that a run has a reply to, with every run's; a dash where a run has none, as parts differ.

    The replies before training are those of each start, or one if all of them replied alike.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    entries = results["runs"]
    title_of = {id(entry): start.title for start in starts(results) for entry in start.entries}
    for i, entry in enumerate(entries):
        for sample in entry["samples"]:
            key = tuple(sample[name] for name in ("set", "question", "answer"))
            asked = found.setdefault(key, {**sample, "befores": {}, "replies": ["—"] * len(entries)})
            asked["befores"].setdefault(title_of[id(entry)], sample["before"])
            asked["replies"][i] = sample["after"]
    for asked in found.values():
        if len({*asked["befores"].values()}) == 1:
            asked["befores"] = {"before": asked["before"]}
    return list(found.values())


def _settings(entries: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Every setting with its value in each run, those that differ first."""
    table = [[name, *(entry["config"].get(name) for entry in entries)] for name in entries[0]["config"]]
    return sorted(table, key=lambda row: all(value == row[1] for value in row[1:]))


MADE = '<meta name="generator" content="dualoptim">'  # stands in every page


def check_file(path: str | Path) -> None:
    """Refuse a file for a page that could not be written, that is something else, or whose name is not a page's.

    Raises:
        UserError: which of these it is.
    """
    path = Path(path)
    try:
        if path.exists() and (path.is_dir() or MADE not in path.read_bytes().decode("utf-8", "replace")[:1000]):
            raise UserError(f"{path}: is no page of dualoptim, and would be replaced; give another file")
        if path.suffix.lower() not in (".html", ".htm"):  # a browser would show another as text, or not at all
            raise UserError(f"{path}: the name of a page ends in .html; give --out {path}.html")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', error)}); give another file") from None


def write(results: Mapping[str, Any], path: str | Path, *others: Mapping[str, Any]) -> None:
    """Write the page of a run's results, with others' below, completely or not at all."""
    written(Path(path), page(results, *others))
