"""The page and table of many runs: a point for each method and setting, what it forgot against what it kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import pictures, report, runs

MOST_SHOWN = 60  # rows of the terminal's table; the page and results.json have all


def name(point: Mapping[str, Any]) -> str:
    """A point's method and what tells it from others: "DualOptim+, lr 0.0004"."""
    return ", ".join([point["method"], *(f"{key} {shown(value)}" for key, value in point["settings"].items())])


def shown(value: Any) -> str:
    """A setting's value for people."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column heads, and a row for the model as it was and for each point; those on the front have a dot."""
    heads = ["", *(report.head(m) for m in _metrics(results).values()), "front", "seeds", "training", "states"]
    before = results["runs"][0]["before"]
    first = ["before", *(report.text(before.get(key), m["format"]) for key, m in _metrics(results).items())]
    return heads, [first + [""] * 4, *(_row(point, results) for point in results["points"])]


def _metrics(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The metrics of the first table, those of the plane first."""
    plane = results.get("plane") or []
    every = results["metrics"]
    return {key: every[key] for key in [*plane, *(k for k, m in every.items() if not m.get("group"))] if key in every}


def _row(point: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    cells = []
    for key, m in _metrics(results).items():
        spread = point["intervals"].get(key)
        inside = " ({}–{})".format(*(report.text(value, m["format"]) for value in spread)) if spread else ""
        cells.append(report.text(point["values"].get(key), m["format"]) + inside)
    on = "●" if point["front"] else ""
    seeds = ", ".join(map(str, point["seeds"]))
    return [name(point), *cells, on, seeds, f"{point['seconds']:.0f} s", runs.bytes_text(point["bytes"])]


def remarks(results: Mapping[str, Any]) -> list[str]:
    """How much of the plan is finished, how to read the intervals, and what went wrong."""
    done, planned = len(results["runs"]), results["planned"]
    said = [f"{done} of {planned} runs are finished."] if done < planned else [f"All {planned} runs are finished."]
    if spread := _of_intervals(results):
        said.append(f"In brackets are 95 % intervals, {spread}.")
    if results.get("plane"):
        said.append("On the front (●) is what no other point beats: as much forgotten and as much kept, or more.")
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
            "Up and left is better: less of what is to be forgotten, more of what is kept.",
            "On the dashed line, the front, is what no other point beats.",
            *([f"Whiskers are 95 % intervals, {spread}."] if spread else []),
            *(["Small dots are the seeds."] if several else []),
        ]
    )


def plane(results: Mapping[str, Any]) -> str:
    """What was forgotten against what was kept, as SVG: marks for points, small ones for seeds, the front as a line."""
    if not results.get("plane") or not results.get("points"):
        return ""
    x, y = results["plane"]
    chosen = results.get("chosen")  # of a search
    at = next((p["values"] for p in results["points"] if chosen and all(p[k] == chosen[k] for k in _TOLD_BY)), None)
    metrics = results["metrics"]
    axes_of = (x, report.head(metrics[x])), (y, report.head(metrics[y]))
    return pictures.plane(results["points"], report.looks(results), axes_of, results["runs"][0]["before"], at)


_TOLD_BY = ("method", "settings")  # what identifies a point


def settings(results: Mapping[str, Any]) -> Sequence[tuple[str, Any]]:
    """The settings that are the same in all runs."""
    entries = results["runs"]
    first = entries[0]["config"]
    return [(key, first[key]) for key in first if all(entry["config"].get(key) == first[key] for entry in entries)]
