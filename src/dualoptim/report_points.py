"""The page and table of many runs: a point for each method and setting, what it forgot against what it kept."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import report, runs

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
    """How much of the plan there is, how to read the intervals, and what went wrong."""
    done, planned = len(results["runs"]), results["planned"]
    said = [f"{done} of {planned} runs are finished."] if done < planned else [f"All {planned} runs are finished."]
    several = max(len(point["seeds"]) for point in results["points"])
    if any(point["intervals"] for point in results["points"]):
        of = "seeds and of groups of rows" if several > 1 else "groups of rows; one seed says nothing of others"
        said.append(f"In brackets are 95 % intervals, bootstrapped over {of}.")
    if results.get("plane"):
        said.append("On the front (●) is what no other point beats: as much forgotten and as much kept, or more.")
    return [*said, *results.get("notes", ())]


def plane(results: Mapping[str, Any]) -> str:
    """What was forgotten against what was kept, as SVG: a dot a point, small ones its seeds, the front as a line."""
    if not results.get("plane"):
        return ""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot, whose backend is a notebook's to choose

    x, y = results["plane"]
    drawn = [p for p in results["points"] if p["values"].get(x) is not None and p["values"].get(y) is not None]
    methods = list(dict.fromkeys(p["method"] for p in results["points"]))
    colour = dict(zip([e["method"] for e in results["runs"]], report.colours(results), strict=True))
    with matplotlib.rc_context(report.STYLE):
        figure = Figure(figsize=(8.6, 5.0), layout="constrained")
        axis: Any = figure.subplots()
        for method in methods:
            own = [p for p in drawn if p["method"] == method]
            for p in own:
                seeds = [(a, b) for a, b in zip(p["by_seed"][x], p["by_seed"][y], strict=True) if None not in (a, b)]
                if len(seeds) > 1:
                    axis.scatter(*zip(*seeds, strict=True), s=6, color=colour[method], alpha=0.4, linewidths=0)
                _whiskers(axis, p, x, y, colour[method])
            axis.scatter(
                [p["values"][x] for p in own], [p["values"][y] for p in own], s=34, color=colour[method], label=method
            )
        front = sorted((p["values"][x], p["values"][y]) for p in drawn if p["front"])
        axis.plot(*zip(*front, strict=True), color="#777777", linewidth=1, linestyle="--", zorder=0) if front else None
        before = results["runs"][0]["before"]
        if None not in (before.get(x), before.get(y)):
            axis.scatter([before[x]], [before[y]], marker="x", color="#444444", label="before")
        if chosen := results.get("chosen"):  # of a search
            at = next(p for p in drawn if all(p[key] == chosen[key] for key in ("method", "settings")))["values"]
            axis.scatter([at[x]], [at[y]], s=120, facecolors="none", edgecolors="#222222", label="chosen")
        axis.set_xlabel(report.head(results["metrics"][x]))
        axis.set_ylabel(report.head(results["metrics"][y]))
        axis.grid(color="#e5e5e5", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.legend(frameon=False, loc="best")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _whiskers(axis: Any, point: Mapping[str, Any], x: str, y: str, colour: str) -> None:
    for key, along in ((x, "xerr"), (y, "yerr")):
        if spread := point["intervals"].get(key):
            at = point["values"]
            below, above = (max(0.0, at[key] - spread[0]), max(0.0, spread[1] - at[key]))
            if math.isfinite(below + above):
                axis.errorbar(at[x], at[y], **{along: [[below], [above]]}, color=colour, linewidth=0.8, alpha=0.6)


def settings(results: Mapping[str, Any]) -> Sequence[tuple[str, Any]]:
    """The settings that all runs have alike."""
    entries = results["runs"]
    first = entries[0]["config"]
    return [(key, first[key]) for key in first if all(entry["config"].get(key) == first[key] for entry in entries)]
