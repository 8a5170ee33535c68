"""Numbers → SVG for a page: in the page's own colors, light or dark, and legible at a phone's width."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# Placeholder colors, and what the page replaces them with.
INK, LINE, PAPER = "#010101", "#020202", "#030303"
OF_PAGE = {INK: "currentColor", LINE: "var(--line)", PAPER: "var(--paper)"}
STYLE = {
    "font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "dualoptim",
    "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "grid.color": LINE, "grid.linewidth": 0.8,
}  # fmt: skip
# One color for each method, distinguishable with red-green color blindness (after Okabe and Ito's palette), each with a
# contrast of at least 3 to white paper and to dark.
COLORS = {"Joint AdamW": "#C18600", "Alternating AdamW": "#1D9AE0", "DualOptim": "#009E73", "DualOptim+": "#CC3377",
           "DualOptim 8-bit": "#41A283", "DualOptim+ 8-bit": "#A22AD6", "Joint AdamW 8-bit": "#A5780A",
           "Alternating AdamW 8-bit": "#1F78B4", "PCGrad": "#935A4F", "GRU": "#696969", "PDU": "#D55E00"}  # fmt: skip
SPARE = "#0072B2", "#8C6BB1", "#A6761D", "#1B9E77", "#D95F02", "#7570B3", "#929292"  # for methods of other names
# A shape for each method, in their order: matplotlib's name → an SVG path in a square of 12.
SHAPES = {"o": "M6 1a5 5 0 1 0 .01 0z", "s": "M1.7 1.7h8.6v8.6h-8.6z", "^": "M6 .8l5.4 10h-10.8z",
          "D": "M6 .4l5.6 5.6l-5.6 5.6l-5.6-5.6z", "v": "M6 11.2l5.4-10h-10.8z",
          "P": "M4.2 .8h3.6v3.4h3.4v3.6h-3.4v3.4h-3.6v-3.4h-3.4v-3.6h3.4z", "p": "M6 .7l5.3 3.9l-2 6.3h-6.6l-2-6.3z",
          "d": "M6 .4l3.6 5.6l-3.6 5.6l-3.6-5.6z"}  # fmt: skip
ANY = "picture-"  # prefix of the ids in every picture, until a page numbers them
SMALL, WIDE = (4.4, 3.0), (8.6, 3.0)  # inches


class Look(NamedTuple):
    """How a method is told from others: by its color and, for color-blind readers, by its shape."""

    color: str
    marker: str


def looks(results: Mapping[str, Any]) -> dict[str, Look]:
    """The color and the shape of each method."""
    methods = list(dict.fromkeys(entry["method"] for entry in results["runs"]))
    spare = itertools.cycle(SPARE)
    return {
        method: Look(COLORS.get(method) or next(spare), shape)
        for method, shape in zip(methods, itertools.cycle(SHAPES), strict=False)
    }


def drawn(draw: Callable[[Any, Any], None], size: tuple[float, float], said: str, **grid: Any) -> str:
    """What a function draws on a figure and its axes, as SVG.

    Args:
        draw: takes the figure and an array of its axes, (rows, columns).
        size: width and height in inches; font size 1 is 1/72 inch.
        said: what it shows, for screen readers.
        grid: arguments of `matplotlib.figure.Figure.subplots`.
    """
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot, whose backend is a notebook's to choose

    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, figure.subplots(squeeze=False, **grid))
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    for color, of_page in OF_PAGE.items():
        text = text.replace(color, of_page)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{ANY}", text)
    spoken = said.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{spoken}"', 1)


def numbered(page: str) -> str:
    """A page in which every picture has unique ids."""
    number = itertools.count(1)
    return re.sub(r'<svg role="img".*?</svg>', lambda m: m[0].replace(ANY, f"p{next(number)}-"), page, flags=re.DOTALL)


def curve(lines: Sequence[tuple[Look, Sequence[float], Sequence[float | None]]], said: str) -> str:
    """Shares over optimizer steps, a line for each run.

    Args:
        lines: for each run its look, the steps, and the shares there, 0 to 1.
        said: what they are.
    """

    def draw(figure: Any, axes: Any) -> None:
        (axis,) = axes[0]
        looks = list(dict.fromkeys(look for look, _, _ in lines))
        for look, steps, values in lines:
            # Where lines overlap, those below are wider.
            wider = min(len(looks) - 1 - looks.index(look), 4)
            shown = [math.nan if value is None else value for value in values]
            axis.plot(
                steps, shown, color=look.color, marker=look.marker, linewidth=1.6 + 1.3 * wider,
                markersize=5 + 1.5 * wider, markeredgecolor=PAPER, markeredgewidth=0.5, clip_on=False,
            )  # fmt: skip
        axis.set_xlabel("optimizer step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(0, 1)
        axis.grid(axis="y")

    return drawn(draw, SMALL, said)


def plane(
    points: Sequence[Mapping[str, Any]],
    looks: Mapping[str, Look],
    axes_of: tuple[tuple[str, str], tuple[str, str]],
    before: Mapping[str, float | None],
    chosen: Mapping[str, float | None] | None = None,
) -> str:
    """The plane: a mark for each point, small ones for seeds, the front as a line.

    Args:
        points: as `dualoptim.points` makes them.
        looks: method → look.
        axes_of: (metric, label) of what is across and of what is up.
        before: the numbers of the model before unlearning.
        chosen: the numbers of the point that a search chose.
    """
    (x, x_label), (y, y_label) = axes_of
    shown = [point for point in points if None not in _at(point["values"], x, y)]

    def draw(figure: Any, axes: Any) -> None:
        (axis,) = axes[0]
        front = sorted(_at(point["values"], x, y) for point in shown if point["front"])
        if front:
            axis.plot(*zip(*front, strict=True), color=INK, linewidth=1, linestyle="--", alpha=0.6, zorder=0)
        for point in shown:
            look, at = looks[point["method"]], _at(point["values"], x, y)
            seeds = [pair for pair in zip(point["by_seed"][x], point["by_seed"][y], strict=True) if None not in pair]
            if len(seeds) > 1:
                axis.scatter(*zip(*seeds, strict=True), s=9, color=look.color, alpha=0.5, linewidths=0)
            for name, value, along in ((x, at[0], "xerr"), (y, at[1], "yerr")):
                low, high = point["intervals"].get(name, (value, value))
                if high > low:
                    away = [[max(0.0, value - low)], [max(0.0, high - value)]]
                    axis.errorbar(*at, **{along: away}, color=look.color, linewidth=1, alpha=0.7)
            axis.scatter(*at, s=64, color=look.color, marker=look.marker, edgecolors=PAPER, linewidths=0.7, zorder=3)
        if None not in _at(before, x, y):
            axis.scatter(*_at(before, x, y), s=40, marker="x", color=INK)
        if chosen is not None:
            axis.scatter(*_at(chosen, x, y), s=190, facecolors="none", edgecolors=INK)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.margins(0.08)
        axis.locator_params(nbins=6)
        axis.grid()

    said = f"Scatter plot of {len(shown)} points: {x_label} across, {y_label} up. The table above has their numbers."
    return drawn(draw, (4.6, 3.5), said)


def _at(values: Mapping[str, Any], x: str, y: str) -> tuple[Any, Any]:
    return values.get(x), values.get(y)


def heat_map(diagnostics: Mapping[str, Any] | None) -> str:
    """The conflict between objectives, layer by layer, at the end of a run; empty where it was not measured.

    Upper panel: cosine between the objectives' updates. Lower panel: share of coordinates whose second moments cancel.
    """
    by_layer = (diagnostics or {"layers": {}})["layers"]
    layers = [layer for layer in by_layer if layer != "all"]
    measures = list(by_layer.get("all", {}))
    panels = [
        ("Do updates agree? (cosine; red: they conflict)", "cosine/", "#D1442F", -1.0),
        ("Do second moments cancel? (share of coordinates)", "cancelling/", "#8E5BC0", 0.0),
    ]
    shown = {panel: [name for name in measures if name.startswith(panel[1])] for panel in panels}
    shown = {panel: names for panel, names in shown.items() if names}
    if not shown or not layers:
        return ""

    def draw(figure: Any, axes: Any) -> None:
        from matplotlib.colors import LinearSegmentedColormap, to_rgb

        for axis, ((title, prefix, color, low), names) in zip(axes[:, 0], shown.items(), strict=True):
            read = [[by_layer[layer].get(name) for layer in layers] for name in names]
            values = [[math.nan if value is None else float(value) for value in row] for row in read]
            # Zero is transparent, for light and dark paper; the exponent makes small values visible.
            shares = [i / 64 for i in range(-64 if low else 0, 65)]
            ends = [(*to_rgb("#2980C0" if low and share > 0 else color), abs(share) ** 0.6) for share in shares]
            palette = LinearSegmentedColormap.from_list(prefix, ends)
            cells = axis.pcolormesh(values, cmap=palette, vmin=low, vmax=1)
            axis.invert_yaxis()
            axis.set_yticks(
                [i + 0.5 for i in range(len(names))], [n.removeprefix(prefix).replace("/", " · ") for n in names]
            )
            axis.set_title(title, loc="left", fontsize=10)
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0)
            bar = figure.colorbar(cells, ax=axis, pad=0.01, aspect=6, ticks=[low, (low + 1) / 2, 1])
            bar.outline.set_edgecolor(LINE)
            bar.solids.set_edgecolor("face")
        short = [layer.removeprefix("layers.") for layer in layers]
        every = max(1, math.ceil(len(layers) / 48))
        axes[-1, 0].set_xticks([i + 0.5 for i in range(0, len(layers), every)], short[::every], fontsize=8)
        for tick, name in zip(axes[-1, 0].get_xticklabels(), short[::every], strict=True):
            tick.set_rotation(0 if name.isdigit() else 90)

    heights = [len(names) for names in shown.values()]
    size = (WIDE[0], 0.9 * len(heights) + 0.3 * sum(heights) + 0.6)
    said = f"Heat map of {len(layers)} layers: {'; '.join(panel[0] for panel in shown)}."
    return drawn(draw, size, said, nrows=len(heights), height_ratios=heights, sharex=True)
