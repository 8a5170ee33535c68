"""The page and table of many runs: a point for each method and setting, in the plane of two numbers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .. import runs
from .. import starts as of_starts
from . import aims, entries, pictures

MOST_SHOWN = 60  # rows of the terminal's table; the page and results.json have all


def named(point: Mapping[str, Any], common: Sequence[str] = ()) -> str:
    """A point's method and what tells it from others: "DualOptim+, lr 0.0004".

    Args:
        common: settings that need no saying.
    """
    told = (f"{key} {entries.setting_text(value)}" for key, value in point["settings"].items() if key not in common)
    return ", ".join([point["method"], *told])


def by_start(results: Mapping[str, Any]) -> list[tuple[entries.Start, list[Mapping[str, Any]]]]:
    """Each start with the points of its runs."""
    starts, points = entries.starts(results), list(results.get("points", ()))
    if len(starts) == 1:
        return [(starts[0], points)]

    def told(settings: Mapping[str, Any]) -> str:
        return json.dumps(settings, sort_keys=True)  # alike before and after they were written

    found = []
    for start in starts:
        own = of_starts.settings(start.entries[0])  # what its runs have in common
        chosen = [{key: value for key, value in point["settings"].items() if key in own} for point in points]
        made = [told(some) == told({key: own[key] for key in some}) for some in chosen]
        found.append((start, list(itertools.compress(points, made))))
    return found


def table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column heads, and for each start a row for the model as it was and for each point; the front has dots."""
    metrics = _metrics(results)
    heads = ["", *(entries.head(m) for m in metrics.values()), "front", "seeds", "training", "states"]
    body = []
    for start, points in by_start(results):
        before = (entries.text(start.before.get(key), m["format"]) for key, m in metrics.items())
        body += [[start.title, *before, *[""] * 4], *(_row(point, results) for point in points)]
    return heads, body


def _metrics(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The metrics of the first table, those of the plane first."""
    plane = results.get("plane") or []
    every = results["metrics"]
    return {key: every[key] for key in [*plane, *(k for k, m in every.items() if not m.get("group"))] if key in every}


def _row(point: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    cells = []
    for key, m in _metrics(results).items():
        spread = point["intervals"].get(key)
        inside = " ({}–{})".format(*(entries.text(value, m["format"]) for value in spread)) if spread else ""
        cells.append(entries.text(point["values"].get(key), m["format"]) + inside)
    on = "●" if point["front"] else ""
    seeds = ", ".join(map(str, point["seeds"]))
    return [named(point), *cells, on, seeds, f"{point['seconds']:.0f} s", runs.bytes_text(point["bytes"])]


def remarks(results: Mapping[str, Any]) -> list[str]:
    """How much of the plan is finished, how to read the intervals, and what went wrong."""
    done, planned = len(results["runs"]), results["planned"]
    said = [f"{done} of {planned} runs are finished."] if done < planned else [f"All {planned} runs are finished."]
    if spread := _of_intervals(results):
        said.append(f"In brackets are 95 % intervals, {spread}.")
    if len(starts := entries.starts(results)) > 1:
        said.append(
            f"There are {len(starts)} starts ({'; '.join(start.name for start in starts)}), each with its own numbers "
            "before; runs of different starts are not compared."
        )
    if results.get("plane"):
        rivals = "point of its start" if len(starts) > 1 else "point"
        said.append(f"On the front (●) is what no other {rivals} beats: {aims.beats(results)}.")
    return [*said, *results.get("notes", ())]


def _of_intervals(results: Mapping[str, Any]) -> str:
    """What the points' intervals are over; empty where there are none."""
    if not any(point["intervals"] for point in results["points"]):
        return ""
    several = max(len(point["seeds"]) for point in results["points"]) > 1
    return f"over {'seeds and rows' if several else 'rows; one seed says nothing of others'}"


def how_to_read(results: Mapping[str, Any]) -> str:
    """What the picture of the plane shows, beside its legend."""
    if not results.get("plane"):
        return ""
    several = any(len(point["seeds"]) > 1 for point in results["points"])
    spread = _of_intervals(results)
    return " ".join(
        [
            aims.where(results),
            "On the dashed line, the front, is what no other point beats.",
            *([f"Whiskers are 95 % intervals, {spread}."] if spread else []),
            *(["Small dots are the seeds."] if several else []),
        ]
    )


def planes(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The two numbers of the plane against each other: for each start its name, and an SVG.

    It has marks for points, small ones for seeds, and the front as a line.
    """
    if not results.get("plane") or not results.get("points"):
        return []
    x, y = results["plane"]
    chosen = results.get("chosen")  # of a search
    at = next((p["values"] for p in results["points"] if chosen and all(p[k] == chosen[k] for k in _TOLD_BY)), None)
    metrics = results["metrics"]
    axes_of = (x, entries.head(metrics[x])), (y, entries.head(metrics[y]))
    look = pictures.looks(results)
    return [
        (start.name, pictures.plane(points, look, axes_of, start.before, at))
        for start, points in by_start(results)
        if points
    ]


_TOLD_BY = ("method", "settings")  # what identifies a point


def settings(results: Mapping[str, Any]) -> Sequence[tuple[str, Any]]:
    """The settings that are the same in all runs."""
    entries = results["runs"]
    first = entries[0]["config"]
    return [(key, first[key]) for key in first if all(entry["config"].get(key) == first[key] for entry in entries)]
