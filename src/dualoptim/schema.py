"""The check of a `results.json` that is read: the schema that `dualoptim.runs` describes, as forms of its values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .evaluation.better import WAYS


def unlike(value: Any, form: Any, where: str = "it") -> str | None:
    """The first place where a value, of lists and mappings, does not match a form; None if it matches.

    Args:
        form: a test of one value, [the form of each], {"*": the form of each} or {name: form}; a name that ends in "?"
            may be missing.
        where: the value's own place, in words.
    """
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        return next(filter(None, (unlike(each, form[0], f"{where}, {i}") for i, each in enumerate(value, 1))), None)
    if not isinstance(form, dict):
        return None if form(value) else f"{where} is no {form.__name__.strip('_').replace('_', ' ')}"
    if not isinstance(value, dict):
        return f"{where} is no mapping"
    forms = dict.fromkeys(value, form["*"]) if "*" in form else form
    for name, own in forms.items():
        key = name if "*" in form else name.removesuffix("?")
        if key not in value:
            if key == name:
                return f"{where} has no {name!r}"
        elif found := unlike(value[key], own, f"{where}, {key}"):
            return found
    return None


def text(value: Any) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def _text_or_nothing(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _positive_number(value: Any) -> bool:
    return _finite_number(value) and value > 0


def _finite_number_or_nothing(value: Any) -> bool:
    return value is None or _finite_number(value)


def count(value: Any) -> bool:
    """Whether a value is a whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _format_such_as_3f(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\.[0-9][fg%]", value) is not None


def _direction(value: Any) -> bool:
    return value in WAYS


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _pair_of_names_or_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_name, value)))


def _anything(value: Any) -> bool:
    return True


def _diagnostics_by_layer(value: Any) -> bool:
    return value is None or not unlike(value, {"layers": {"*": {"*": _finite_number_or_nothing}}})


NUMBERS = {"*": _finite_number_or_nothing}
ENTRY: dict[str, Any] = {
    "method": _name, "seed": count, "config": {"*": _anything}, "before": NUMBERS, "after": NUMBERS,
    "curve": [{"*": _finite_number_or_nothing}], "seconds": _finite_number, "optimizer_state_bytes": count,
    "peak_memory_bytes": count, "samples": [dict.fromkeys(("set", "question", "answer", "before", "after"), text)],
    "part?": _anything, "verdict?": _text_or_nothing, "stopped?": _text_or_nothing, "not_computed?": {"*": text},
    "skipped_steps?": {"*": count}, "fingerprints?": {"*": text}, "diagnostics?": _diagnostics_by_layer,
    "merging?": {"*": NUMBERS}, "finite?": _flag, "step_seconds?": _finite_number_or_nothing,
    "watching_seconds?": _finite_number_or_nothing, "counts?": {"*": count}, "files?": {"*": text},
    "effective_counts?": {"*": {"*": _positive_number}}, "environment?": {"*": _anything},
}  # fmt: skip
METRIC = {"label": _name, "better": _direction, "format": _format_such_as_3f, "group?": _text_or_nothing}
POINT: dict[str, Any] = {
    "method": _name, "settings": {"*": _anything}, "seeds": [count], "values": NUMBERS, "front": _flag,
    "by_seed": {"*": [_finite_number_or_nothing]}, "intervals": {"*": [_finite_number]}, "seconds": _finite_number,
    "bytes": count,
}  # fmt: skip
# The parts of the schema that are read again.
FORM: dict[str, Any] = {
    "task": text, "model": text, "followed": text, "metrics": {"*": METRIC}, "runs": [ENTRY], "notes?": [text],
    "curves?": {"*": text}, "scores?": {"*": text}, "counts?": {"*": count},
    "plane?": _pair_of_names_or_nothing, "points?": [POINT], "planned?": count,
    "plan?": {"methods": [_name], "seeds": [count]}, "grid?": {"*": _anything},
    "chosen?": {"method": _name, "settings": {"*": _anything}}, "private?": _flag, "forgets?": _flag,
}  # fmt: skip
NAMES = tuple(name.rstrip("?") for name in FORM)


def misfit_of_one(said: Any) -> str | None:
    """As `misfit`, of a run of many: its entry under "run", with what results say about its task."""
    needed = {"run": ENTRY, "notes": [text], "counts": {"*": count}, "plane": _pair_of_names_or_nothing}
    return unlike(said, needed) or misfit({**said, "runs": [said["run"]]})


def misfit(results: Mapping[str, Any]) -> str | None:
    """The first part of results that does not match the schema; None if all of it does."""
    if found := unlike(results, FORM):
        return found
    if not results["runs"]:
        return "there is no run"
    if other := next((name for name in results.get("scores", {}).values() if name not in results["metrics"]), None):
        return f"the score {other!r} is none of the metrics"
    if "planned" in results and not {"plane", "points"} <= set(results):
        return "there are runs of a plan, and no points"
    plane, methods = results.get("plane") or (), {entry["method"] for entry in results["runs"]}
    if other := next((name for name in plane if name not in results["metrics"]), None):
        return f"the plane's {other!r} is none of the metrics"
    for i, point in enumerate(results.get("points", ()), 1):
        if point["method"] not in methods or any(len(pair) != 2 for pair in point["intervals"].values()):
            return f"point {i} is of no run's"
        if any(len(point["by_seed"].get(name, ())) != len(point["seeds"]) for name in plane):
            return f"point {i} has not a number for each seed"
    followed = {"step", *results.get("curves", {})}
    for i, entry in enumerate(results["runs"], 1):
        for when in ("before", "after"):
            if lacking := next((name for name in results["metrics"] if name not in entry[when]), None):
                return f"run {i} has no {lacking!r} {when}"
        points = [set(point) for point in entry["curve"]]
        if any(point != points[0] or not followed <= point for point in points) or any(
            not count(point["step"]) for point in entry["curve"]
        ):
            return f"run {i} has points of other kinds in its curve"
        if unlike(entry["config"], {"alone?": _text_or_nothing, "task?": _text_or_nothing}):
            return f"run {i} was of no task that has a name"
    return None
