"""Results → one HTML page that needs no network."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..command_line import rerun
from ..errors import UserError
from ..folder import written
from . import aims, pictures, points
from .entries import columns, label, starts, subject
from .findings import curve_titles, headline, is_followed, not_shown, remarks, seen, verdict
from .tables import ATTACKS, attacks, cost, details, merging, over_seeds, rows, turned


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
    entries, look, (task, model) = results["runs"], pictures.looks(results), subject(results)
    every = {
        "results": results,
        "title": aims.title(results),
        "against": aims.against(results),
        "task": task,
        "model": model,
        "seeds": list(dict.fromkeys(entry["seed"] for entry in entries)),
        "looks": look,
        "shapes": pictures.SHAPES,
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
    return _render(
        "chapter.html.jinja",
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


def curves(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the task follows over the steps, for each start, a title and an SVG each; none if it was measured once."""
    titles = curve_titles(results)
    look, made = pictures.looks(results), []
    if all(len(entry["curve"]) < 2 for entry in results["runs"]):
        return []
    for start, (name, title) in itertools.product(starts(results), titles.items()):
        lines = [
            (look[e["method"]], [at["step"] for at in e["curve"]], [at[name] for at in e["curve"]])
            for e in start.entries
            if is_followed(e, name)
        ]
        if not lines:
            continue
        whose = f"{title}, {start.name}" if start.name else title
        made.append((whose, pictures.curve(lines, f"{whose}: {results['followed']} over the optimizer steps.")))
    return made


def heat_map(entry: Mapping[str, Any]) -> str:
    """The conflict between objectives, layer by layer, as SVG; empty where it was not measured."""
    return pictures.heat_map(entry.get("diagnostics"))


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
