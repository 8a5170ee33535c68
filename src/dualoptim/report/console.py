"""Results → the terminal: the tables of the page, as wide as it is, and the findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import points
from .entries import subject
from .findings import headline, not_computed, remarks, seen, verdicts
from .tables import rows, turned, widths


def terminal(results: Mapping[str, Any]) -> None:
    """Print the table and the findings."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)  # what is shown was written by models and users
    if "planned" in results:
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


def _fitting(heads: Sequence[str], body: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """The columns of a table in parts that fit the terminal's width, each part with the first column."""
    needed = widths(heads, body)
    parts: list[list[int]] = [[0]]
    for i in range(1, len(heads)):
        if len(parts[-1]) > 1 and sum(needed[j] for j in (*parts[-1], i)) + 1 > width:
            parts.append([0])
        parts[-1].append(i)
    return parts
