"""Results → sentences: how each run ended, what can be told apart, and what the page lacks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..evaluation.better import TARGETS, away
from ..points import effective
from . import aims
from .entries import asked, label, starts, text
from .points import by_start, named
from .tables import MERGING, attacks


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
    said = [(start.name, _compared(points, results, most)) for start, points in by_start(results)]
    return " ".join(f"{name[0].upper()}{name[1:]}: {text}" if name else text for name, text in said if text)


def _compared(points: Sequence[Mapping[str, Any]], results: Mapping[str, Any], most: int) -> str:
    """Which points of one start no other beats, in a sentence; empty for fewer than two."""
    plane = results.get("plane")
    points = [point for point in points if plane and None not in [point["values"].get(key) for key in plane]]
    if len(points) < 2:
        return ""

    own = points[0]["settings"]  # what all have in common the start's name says, or goes without saying
    common = [key for key in own if all(point["settings"].get(key) == own[key] for point in points)]

    def listed(some: Sequence[Mapping[str, Any]]) -> str:
        names = [named(point, common) for point in some[:most]]
        names += [f"{len(some) - most} more"] if len(some) > most else []
        return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

    first = [point for point in points if point["front"]]
    beaten = [point for point in points if not point["front"]]
    seeds = max(len(point["seeds"]) for point in points)
    over = f"by the means of {seeds} seeds" if seeds > 1 else "on one seed"
    if not beaten:
        return f"None of {listed(first)} beats another in {aims.both(results)}, {over}."
    if len(first) == 1:
        return f"{aims.is_ahead(results, listed(first), listed(beaten))}, {over}."
    lost = f"{listed(beaten)} {'is' if len(beaten) == 1 else 'are'} beaten in both"
    return f"Nothing beats {listed(first)} in {aims.both(results)}, {over}; {lost}."


def remarks(results: Mapping[str, Any]) -> list[str]:
    """Why each run ended where it did, what merging an adapter changed, and what else a reader should know."""
    entries = [entry for entry in results["runs"] if entry.get("stopped")]
    names = [f"{label(entry, results)}: " if len(results["runs"]) > 1 else "" for entry in entries]
    stopped = [name + e["stopped"] for name, e in zip(names, entries, strict=True)]
    return [*results.get("notes", ()), *stopped, *brought_back(results)]


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


def seen(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in sentences: the best of each metric, and which others cannot be told apart from it.

    Shares of n questions are compared as two proportions, of as many independent questions as tell as much: a
    difference below twice its standard error does not count. Other metrics are ranked without a test. With several
    seeds, methods are compared by their means, and are not told apart where the ranges of their seeds overlap. What is
    best near a number is compared by the distances from it, those of each seed.
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
        better, form = metric["better"], metric["format"]
        values = {method: fmean(each) for method, each in of.items()}
        lacking = {method: [away(better, value) for value in each] for method, each in of.items()}
        means = {method: fmean(each) for method, each in lacking.items()}
        best = min(means, key=means.__getitem__)
        compared = {method: text(value, form) for method, value in (means if better in TARGETS else values).items()}
        first = [method for method in values if compared[method] == compared[best]]
        shown = {method: text(value, form) for method, value in values.items()}
        if better in TARGETS and not one_seed:
            shown = {method: f"{distance} away" for method, distance in compared.items()}
        listed = ", ".join(f"{method} {value}" for method, value in shown.items())
        sentence = f"{metric['label'][0].upper()}{metric['label'][1:]}: "
        if len(first) == len(values):
            alike = len({*shown.values()}) == 1
            equal = f"{shown[best]} for all" if alike else f"all are equally near to {TARGETS[better]:g} ({listed})"
            said.append(f"{sentence}{equal}.")
            continue
        sentence += f"{' and '.join(first)} {'is' if len(first) == 1 else 'are'} {_BEST[better]}"
        rest = [method for method in values if method not in first]
        if not one_seed:
            ends = {method: (min(each), max(each)) for method, each in lacking.items()}
            close = [m for m in rest if any(ends[m][0] <= ends[f][1] and ends[f][0] <= ends[m][1] for f in first)]
            sentence += f"; not told apart over seeds: {', '.join(close)}" if close else ""
        elif n := results.get("counts", {}).get(name):
            tell = {entry["method"]: effective(entry, name, n) for entry in entries}
            least = min(tell[method] for method in first)
            close = [
                method
                for method in rest
                if means[method] - means[best] < 2 * _spread(values[method], values[best], min(tell[method], least))
            ]
            sentence += f"; not told apart on {n} questions: {', '.join(close)}" if close else ", and alone there"
        said.append(f"{sentence} ({listed}).")
    if one_seed:
        said.append("One seed: another seed moves every number, and no method is better for a lead within that noise.")
    return said


_BEST = {"lower": "lowest", "higher": "highest", **{way: f"nearest to {best:g}" for way, best in TARGETS.items()}}


def _spread(a: float, b: float, n: float) -> float:
    """Standard error of the difference of two shares of n questions, with one right and one wrong answer added."""
    p = ((a + b) * n + 1) / (2 * n + 2)
    return math.sqrt(max(0.0, 2 * p * (1 - p) / n))  # 0 for values that are no shares


def not_computed(results: Mapping[str, Any]) -> list[str]:
    """The numbers that no run has, and why, grouped by reason."""
    why: dict[str, list[str]] = {}
    for name, m in results["metrics"].items():
        reasons = [entry.get("not_computed", {}).get(name) for entry in results["runs"]]
        if all(reasons):
            group = m.get("group", "")
            why.setdefault(str(reasons[0]), []).append(m["label"] + (f" ({group.lower()})" if group else ""))
    return [f"{', '.join(names)}: {reason}" for reason, names in why.items()]


def curve_titles(results: Mapping[str, Any]) -> Mapping[str, str]:
    """The titles of what is followed during training, by its names in a curve."""
    titles: Mapping[str, str] = results.get("curves", {"forget": "To forget ↓", "retain": "To keep ↑"})
    return titles


def is_followed(entry: Mapping[str, Any], name: str) -> bool:
    """Whether a run's curve has a value of that name."""
    return any(point[name] is not None for point in entry["curve"])


def not_shown(results: Mapping[str, Any]) -> list[str]:
    """What the page lacks, and why: numbers that could not be computed, and pictures of what was not measured."""
    entries, said = results["runs"], not_computed(results)
    if (count := len(starts(results))) > 1:
        said.append(f"Findings: there are {count} starts, and runs of different starts are not compared.")
    if any("part" in entry for entry in entries):
        said.append(f"{aims.against(results)}: parts have different rows.")
    elif not results.get("plane"):
        said.append(f"{aims.against(results)}: the task names no two numbers to compare runs by.")
    if all(len(entry["curve"]) < 2 for entry in entries):
        said.append("During training: the curve was measured at its start alone (curve_points 0).")
    if none := [
        title for name, title in curve_titles(results).items() if not any(is_followed(entry, name) for entry in entries)
    ]:
        said.append(f"During training: {', '.join(none)}, of which nothing could be asked.")
    if none := [label(entry, results) for entry in entries if not entry.get("diagnostics")]:
        said.append(
            f"Conflict by layer: {', '.join(none)}; it is read off the states of DualOptim+ and DualOptim alone."
        )
    if results.get("private"):
        said.append("Answers before and after: the run is private, and no file of it holds a text of rows or replies.")
    if not aims.forgets(results):
        said.append("Attacks: nothing was to be forgotten that could come back.")
    elif not attacks(results) and not any(entry["config"].get("attacks") for entry in entries):
        said.append("Attacks: none was asked for; --attacks '[relearn, leak]' tells whether the forgotten comes back.")
    if len({entry["seed"] for entry in entries}) < 2:
        said.append("Spread over seeds: there is one seed; dualoptim compare --seeds '[0, 1, 2]' has three.")
    return said
