"""The words in which runs are compared: forgetting and keeping, or where nothing is forgotten, the metrics' labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .entries import head


def forgets(results: Mapping[str, Any]) -> bool:
    """Whether something was to be forgotten; results of earlier versions do not say, but what they followed."""
    by_curves = "forget" in results.get("curves", {"forget": ""})
    return bool(results.get("forgets", by_curves))


def title(results: Mapping[str, Any]) -> str:
    """The title of a chapter."""
    of_points = "planned" in results
    if forgets(results) and (results.get("plane") or not of_points):
        return "What was forgotten, and what was kept"
    return "What each point came to" if of_points else "What each objective came to"


def against(results: Mapping[str, Any]) -> str:
    """The title of the picture of the plane."""
    if forgets(results):
        return "What was forgotten against what was kept"
    return " against ".join(map(head, _metrics(results))) or "One number against another"


def both(results: Mapping[str, Any]) -> str:
    """The two numbers of the plane, in which runs beat each other."""
    return "both forgetting and keeping" if forgets(results) else f"both {_named(results)}"


def is_ahead(results: Mapping[str, Any], first: str, others: str) -> str:
    """That one run is at least as good in both."""
    if forgets(results):
        return f"{first} forgets and keeps at least as much as {others}"
    return f"{first} is at least as good as {others} in {both(results)}"


def beats(results: Mapping[str, Any]) -> str:
    """What it is to beat another point."""
    return (
        "as much forgotten and as much kept, or more" if forgets(results) else f"as good in {both(results)}, or better"
    )


def where(results: Mapping[str, Any]) -> str:
    """In which direction of the picture a point is better."""
    across, up = (metric["better"] for metric in _metrics(results))
    if forgets(results) and (across, up) == ("lower", "higher"):
        return "Up and left is better: less of what is to be forgotten, more of what is kept."
    sides = {"lower": "Down", "higher": "Up"}.get(up), {"lower": "left", "higher": "right"}.get(across)
    way = f"{sides[0]} and {sides[1]} is better" if all(sides) else "Better is"
    return f"{way}: {_named(results)}."


def _metrics(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [results["metrics"][name] for name in results.get("plane") or ()]


def _named(results: Mapping[str, Any]) -> str:
    """Both numbers in a sentence; in quotes, since a label may have commas."""
    return " and ".join(head({**m, "label": f'"{m["label"]}"'}) for m in _metrics(results))
