"""results.json → one offline HTML page, and the same table for the terminal."""

from __future__ import annotations

import errno
import io
import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from . import runs
from .errors import UserError
from .folder import written

# One color a method, told apart also by those who see red and green alike (Okabe and Ito's palette).
COLOURS = {"Joint AdamW": "#E69F00", "Alternating AdamW": "#56B4E9", "DualOptim": "#009E73", "DualOptim+": "#CC3377",
           "DualOptim 8-bit": "#66C2A5", "DualOptim+ 8-bit": "#7A1FA2", "Joint AdamW 8-bit": "#B8860B",
           "Alternating AdamW 8-bit": "#1F78B4", "PCGrad": "#8C564B", "GRU": "#555555", "PDU": "#D55E00"}  # fmt: skip
SPARE = "#0072B2", "#8C6BB1", "#A6761D", "#1B9E77", "#D95F02", "#7570B3", "#999999"  # for methods of other names
STYLE = {"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none", "axes.spines.top": False,
         "axes.spines.right": False, "text.parse_math": False, "svg.hashsalt": "dualoptim"}  # fmt: skip
ARROWS = {"lower": "↓", "higher": "↑", "zero": "→ 0", "chance": "→ 0.5", "neither": ""}


def label(entry: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """A run's name: its method, with the seed where there are several, and its part where one comes after the other."""
    seeds = {other["seed"] for other in results["runs"]}
    seed = f", seed {entry['seed']}" if len(seeds) > 1 else ""
    return entry["method"] + seed + (f", part {entry['part']}" if "part" in entry else "")


def colours(results: Mapping[str, Any]) -> list[str]:
    """A color for each run: its method's."""
    methods = [entry["method"] for entry in results["runs"]]
    others = [method for method in dict.fromkeys(methods) if method not in COLOURS]
    known = COLOURS | {method: SPARE[i % len(SPARE)] for i, method in enumerate(others)}
    return [known[method] for method in methods]


def text(value: float | None, spec: str) -> str:
    """A number for people; a dash for none."""
    return "—" if value is None or math.isnan(value) else format(value, spec)


def head(metric: Mapping[str, Any]) -> str:
    """A metric's name and which way is better."""
    return f"{metric['label']} {ARROWS[metric['better']]}".rstrip()


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table: column heads, and a row for the model as it was and one for each run."""
    shown = {name: m for name, m in results["metrics"].items() if not m.get("group")}
    heads = ["", *(head(m) for m in shown.values()), "training", "states"]
    first, counts = results["runs"][0]["before"], results.get("counts", {})

    def cell(value: float | None, name: str) -> str:
        spread = interval(value, counts.get(name, 0))
        return text(value, shown[name]["format"]) + (f" ({spread})" if spread else "")

    body = [["before", *(cell(first[name], name) for name in shown), "", ""]]
    for entry in results["runs"]:
        body.append(
            [
                label(entry, results),
                *(cell(entry["after"][name], name) for name in shown),
                f"{entry['seconds']:.0f} s",
                runs.bytes_text(entry["optimizer_state_bytes"]),
            ]
        )
    return heads, body


WIDE = 7  # columns of numbers that a page shows; a table of more is turned round


def turned(heads: list[str], body: list[list[str]], width: int | None = None) -> tuple[list[str], list[list[str]]]:
    """The table, with a column for each run in place of a row where it would be too wide to read.

    Args:
        width: characters that a terminal has; without it, a page has room for seven numbers a row.
    """
    columns = list(zip(heads, *body, strict=True))
    other = list(columns[0]), [list(column) for column in columns[1:]]
    if width is None:
        return other if len(heads) - 1 > WIDE else (heads, body)
    return (heads, body) if _width(heads, body) <= width else min((heads, body), other, key=lambda t: _width(*t))


def details(results: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """The other tables: title → a row for each metric, with its name, the model as it was, and every run."""
    tables: dict[str, list[list[str]]] = {}
    entries = results["runs"]
    for name, m in results["metrics"].items():
        values = [entries[0]["before"][name], *(entry["after"][name] for entry in entries)]
        if m.get("group") and any(value is not None for value in values):
            row = [head(m), *(text(value, m["format"]) for value in values)]
            tables.setdefault(m["group"], []).append(row)
    if changes := against_alone(results):
        tables["Against training on each objective alone"] = changes
    return tables


def against_alone(results: Mapping[str, Any]) -> list[list[str]]:
    """How much better or worse each run meets each objective than training on that one alone does, and their mean.

    With several seeds a run is compared with that of its own seed. Empty unless every objective was trained on alone.
    """
    entries, scores = results["runs"], results.get("scores", {})
    alone = {(e["config"].get("alone"), e["seed"]): e["after"] for e in entries if e["config"].get("alone")}
    if not scores or any((name, e["seed"]) not in alone for name in scores for e in entries):
        return []
    if any(e["after"][metric] is None for metric in scores.values() for e in entries):
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
    """What merging its adapter, and rounding what was merged, makes of each run: (name, a table with its heads)."""
    found = []
    for entry in results["runs"]:
        if of := entry.get("merging"):
            hows = [how for how in MERGING if how in of]
            table = [["", *(MERGING[how] for how in hows)]]
            for name, m in results["metrics"].items():
                if not m.get("group") and name in of["unmerged"]:  # attacks are made on what remains alone
                    table.append([head(m), *(text(of[how].get(name), m["format"]) for how in hows)])
            found.append((label(entry, results), table))
    return found


def brought_back(results: Mapping[str, Any]) -> list[str]:
    """What merging or rounding changed of a run, in sentences: shares, by twice their standard error or more."""
    said = []
    for entry in results["runs"]:
        of = entry.get("merging", {})
        for name, m in results["metrics"].items():
            was, n = of.get("unmerged", {}).get(name), results.get("counts", {}).get(name, 0)
            if m.get("group") or was is None or not n:
                continue
            for how in list(MERGING)[1:]:
                now = of.get(how, {}).get(name)
                if now is not None and abs(now - was) >= 2 * _spread(was, now, n):
                    then, after = (text(value, m["format"]) for value in (was, now))
                    said.append(f"{label(entry, results)}: {MERGING[how]}, {m['label']} is {after}, not {then}.")
    return said


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """What each run came to, in a sentence; its name before it where there are several."""
    entries = [entry for entry in results["runs"] if entry.get("verdict")]
    names = [f"{label(entry, results)}: " if len(results["runs"]) > 1 else "" for entry in entries]
    return [name + entry["verdict"] for name, entry in zip(names, entries, strict=True)]


def remarks(results: Mapping[str, Any]) -> list[str]:
    """Why each run ended where it did, what merging an adapter changed, and what else a reader should know."""
    entries = [entry for entry in results["runs"] if entry.get("stopped")]
    names = [f"{label(entry, results)}: " if len(results["runs"]) > 1 else "" for entry in entries]
    stopped = [name + e["stopped"] for name, e in zip(names, entries, strict=True)]
    return [*results.get("notes", ()), *stopped, *brought_back(results)]


def interval(value: float | None, n: int) -> str:
    """The 95 % Wilson interval of a share of n questions, in percent: "3–21"; empty for no number."""
    if value is None or not 0 <= value <= 1 or not n:
        return ""
    from scipy.stats import binomtest

    low, high = binomtest(round(value * n), n).proportion_ci(method="wilson")
    return f"{100 * low:.0f}–{100 * high:.0f}"


def not_computed(results: Mapping[str, Any]) -> list[str]:
    """What no run has a number for, and why, those of one reason together."""
    why: dict[str, list[str]] = {}
    for name, m in results["metrics"].items():
        reasons = [entry.get("not_computed", {}).get(name) for entry in results["runs"]]
        if all(reasons):
            group = m.get("group", "")
            why.setdefault(str(reasons[0]), []).append(m["label"] + (f" ({group.lower()})" if group else ""))
    return [f"{', '.join(names)}: {reason}" for reason, names in why.items()]


def seen(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in sentences: the best of each metric, and which others cannot be told apart from it.

    Shares of n questions are compared as two proportions: a difference below twice its standard error is no
    difference. Other metrics are ranked without a test.
    """
    entries = results["runs"]
    if len(entries) < 2 or any("part" in entry for entry in entries):  # parts forget different rows
        return []
    said = []
    for name, metric in results["metrics"].items():
        values = {label(e, results): e["after"][name] for e in entries}
        if (
            metric["better"] == "neither"
            or metric.get("group")
            or any(value is None or math.isnan(value) for value in values.values())
        ):
            continue
        word, key = _BEST[metric["better"]]
        best = min(values.values(), key=key)
        shown = {method: text(value, metric["format"]) for method, value in values.items()}
        first = [method for method in values if shown[method] == text(best, metric["format"])]
        sentence = f"{metric['label'][0].upper()}{metric['label'][1:]}: "
        if len(first) == len(values):
            said.append(f"{sentence}{shown[first[0]]} for all.")
            continue
        sentence += f"{' and '.join(first)} {'is' if len(first) == 1 else 'are'} {word}"
        if n := results.get("counts", {}).get(name):
            rest = [method for method in values if method not in first]
            close = [method for method in rest if abs(values[method] - best) < 2 * _spread(values[method], best, n)]
            sentence += f"; not told apart on {n} questions: {', '.join(close)}" if close else ", and alone there"
        said.append(f"{sentence} ({', '.join(f'{method} {value}' for method, value in shown.items())}).")
    if len({e["seed"] for e in entries}) == 1:
        said.append("One seed: another seed moves every number, and no method is better for a lead within that noise.")
    return said


_BEST: dict[str, tuple[str, Callable[[float], float]]] = {
    "lower": ("lowest", lambda value: value),
    "higher": ("highest", lambda value: -value),
    "zero": ("nearest to 0", abs),
    "chance": ("nearest to 0.5", lambda value: abs(value - 0.5)),
}


def _spread(a: float, b: float, n: int) -> float:
    """Standard error of the difference of two shares of n questions, with one right and one wrong answer added."""
    p = ((a + b) * n + 1) / (2 * n + 2)
    return math.sqrt(max(0.0, 2 * p * (1 - p) / n))  # of what is no share, nothing is known


def terminal(results: Mapping[str, Any]) -> None:
    """Print the table and the findings."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)  # what is shown was written by models and users
    if "points" in results:
        from . import report_points as points

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

    title: str | None = f"{results['task']} · {results['model']}"
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
    """The columns of a table in parts that a terminal is wide enough for, each part with the first column."""
    widths = _widths(heads, body)
    parts: list[list[int]] = [[0]]
    for i in range(1, len(heads)):
        if len(parts[-1]) > 1 and sum(widths[j] for j in (*parts[-1], i)) + 1 > width:
            parts.append([0])
        parts[-1].append(i)
    return parts


def curve(results: Mapping[str, Any]) -> str:
    """The forget/keep curve as SVG: what the task follows, over the steps; empty where it was looked at once alone."""
    titles = results.get("curves", {"forget": "To forget ↓", "retain": "To keep ↑"})
    if not titles or all(len(entry["curve"]) < 2 for entry in results["runs"]):
        return ""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot, whose backend is a notebook's to choose

    with matplotlib.rc_context(STYLE):
        across = len(titles) if len(titles) < 4 else 2
        down = math.ceil(len(titles) / across)
        figure = Figure(figsize=(8.6, 0.4 + 2.9 * down), layout="constrained")
        grid = figure.subplots(down, across, sharey=True, squeeze=False)
        axes = list(grid.flat)
        for axis in axes[len(titles) :]:
            axis.remove()
        for axis, (name, title) in zip(axes, titles.items(), strict=False):
            for entry, colour in zip(results["runs"], colours(results), strict=True):
                steps = [point["step"] for point in entry["curve"]]
                values = [math.nan if point[name] is None else float(point[name]) for point in entry["curve"]]
                axis.plot(steps, values, "-o", color=colour, markersize=4, linewidth=1.8, label=entry["method"])
            axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
            axis.set_xlabel("optimizer step")
            axis.set_ylim(0, 1)
            axis.grid(axis="y", color="#dddddd", linewidth=0.7)
        for row in grid:
            row[0].set_ylabel(textwrap.fill(results["followed"], 32))
        # Seeds, and parts that come after each other, are of one color and stand once.
        lines = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
        figure.legend(lines.values(), lines.keys(), frameon=False, loc="outside lower center", ncols=min(len(lines), 4))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def heat_map(entry: Mapping[str, Any]) -> str:
    """What the objectives do to each other, layer by layer, at the end of a run, as SVG; empty where nothing was read.

    Upper panel: cosine between the objectives' updates. Lower panel: share of coordinates whose second moments cancel.
    """
    by_layer = (entry.get("diagnostics") or {"layers": {}})["layers"]
    layers = [layer for layer in by_layer if layer != "all"]
    measures = list(by_layer.get("all", {}))
    panels = [
        ("Do updates agree? (cosine)", "cosine/", "RdBu", -1, 1),
        ("Do second moments cancel? (share of coordinates)", "cancelling/", "Purples", 0, 1),
    ]
    panels = [panel for panel in panels if any(measure.startswith(panel[1]) for measure in measures)]
    if not panels or not layers:
        return ""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot, whose backend is a notebook's to choose

    shown = {panel[1]: [measure for measure in measures if measure.startswith(panel[1])] for panel in panels}
    with matplotlib.rc_context({**STYLE, "font.size": 9}):
        heights = [len(shown[panel[1]]) for panel in panels]
        size = (8.6, 1.1 * len(panels) + 0.3 * sum(heights) + 0.5)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(panels), 1, height_ratios=heights, sharex=True, squeeze=False)
        for axis, (title, prefix, palette, low, high) in zip(axes[:, 0], panels, strict=True):
            read = [[by_layer[layer].get(name) for layer in layers] for name in shown[prefix]]
            values = [[math.nan if value is None else float(value) for value in row] for row in read]
            drawn = axis.imshow(values, cmap=palette, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
            axis.set_yticks(
                range(len(values)), [name.removeprefix(prefix).replace("/", " · ") for name in shown[prefix]]
            )
            axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0)
            figure.colorbar(drawn, ax=axis, pad=0.01, aspect=8)
        axes[-1, 0].set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def page(*several: Mapping[str, Any]) -> str:
    """The HTML page of one run's results or of several, a chapter each, complete in itself."""
    title = ", ".join(dict.fromkeys(f"{results['task']} · {results['model']}" for results in several))
    return _render("report.html.jinja", title=title, chapters=[chapter(results) for results in several])


def _render(name: str, **context: Any) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = resources.files("dualoptim").joinpath("templates", name).read_text(encoding="utf-8")
    return environment.from_string(text).render(**context)


def chapter(results: Mapping[str, Any]) -> str:
    """The part of the page that shows one run's results, or those of many."""
    if "points" in results:
        from . import report_points as points

        heads, body = points.table(results)
        return _render(
            "points.html.jinja",
            title="What was forgotten, and what was kept" if results["plane"] else "What each point came to",
            results=results,
            heads=heads,
            body=body,
            picture=points.plane(results),
            remarks=points.remarks(results),
            settings=points.settings(results),
        )
    heads, body = turned(*rows(results))
    entries = results["runs"]
    questions = [
        {**sample, "replies": [entry["samples"][i]["after"] for entry in entries]}
        for i, sample in enumerate(entries[0]["samples"])
        if all(i < len(entry["samples"]) for entry in entries)  # parts of a task have different sets
    ]
    forgets = "forget" in results.get("curves", {"forget": ""})
    return _render(
        "chapter.html.jinja",
        title="What was forgotten, and what was kept" if forgets else "What each objective came to",
        results=results,
        heads=heads,
        body=body,
        turned=heads[1] == "before",
        verdicts=verdicts(results),
        seen=[*remarks(results), *seen(results)],
        merging=merging(results),
        details=details(results),
        not_computed=not_computed(results),
        curve=curve(results),
        heat_maps=[(label(entry, results), heat_map(entry)) for entry in entries],
        labels=[label(entry, results) for entry in entries],
        colours=colours(results),
        questions=questions,
        settings=_settings(entries),
    )


def _settings(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Every setting with its value in each run, those that differ first."""
    names = list(entries[0]["config"])
    values = [(name, [entry["config"].get(name) for entry in entries]) for name in names]
    return sorted(values, key=lambda item: all(value == item[1][0] for value in item[1]))


MADE = '<meta name="generator" content="dualoptim">'  # stands in every page


def check_file(path: str | Path) -> None:
    """Refuse a page's file that could not be written, or that holds something else than a page of ours.

    Raises:
        UserError: what it is.
    """
    path = Path(path)
    try:
        if path.exists() and (path.is_dir() or MADE not in path.read_bytes().decode("utf-8", "replace")[:1000]):
            raise UserError(f"{path}: is no page of dualoptim, and would be replaced; give another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', error)}); give another file") from None


def write(results: Mapping[str, Any], path: str | Path, *others: Mapping[str, Any]) -> None:
    """Write the page of a run's results, and of others' below them, whole or not at all."""
    written(Path(path), page(results, *others))
