"""What a page shows of runs side by side: their names, their starts, and their numbers as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .. import starts as of_starts
from ..evaluation import digits
from ..evaluation.better import TARGETS
from ..evaluation.shares import wilson
from ..points import effective

ARROWS = {"lower": "↓", "higher": "↑", "neither": "", **{way: f"→ {best:g}" for way, best in TARGETS.items()}}


def label(entry: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """A run's name: its method, with the seed where there are several, and the part where a task has several."""
    seeds = {other["seed"] for other in results["runs"]}
    seed = f", seed {entry['seed']}" if len(seeds) > 1 else ""
    return entry["method"] + seed + (f", part {entry['part']}" if "part" in entry else "")


def setting_text(value: Any) -> str:
    """A setting's value for people."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def text(value: float | None, spec: str) -> str:
    """A number as it is shown; a dash for none."""
    return "—" if value is None or math.isnan(value) else digits.text(value, spec)


def head(metric: Mapping[str, Any]) -> str:
    """A metric's name and which way is better."""
    return f"{metric['label']} {ARROWS[metric['better']]}".rstrip()


def subject(results: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the task and of the model; of several where the starts of many runs have their own."""

    def each(name: str) -> str:
        configs = [entry["config"] for entry in results["runs"] if "part" not in entry]  # those go on with what is left
        found = dict.fromkeys(config.get(name) or results[name] for config in configs)
        return ", ".join(found) if len(found) > 1 else results[name]

    return each("task"), each("model")


class Start(NamedTuple):
    """Runs that start alike: the start's name, empty where there is but one, the numbers before training, the runs."""

    name: str
    before: dict[str, float | None]
    entries: list[Mapping[str, Any]]

    @property
    def title(self) -> str:
        """The heading of its numbers before training."""
        return f"before, {self.name}" if self.name else "before"


def starts(results: Mapping[str, Any]) -> list[Start]:
    """The starts of the runs. Only runs of one start are compared: others forget other rows, or from another model."""
    groups = of_starts.groups(results["runs"])
    firsts = [of_starts.settings(group[0]) for group in groups]
    differing = [key for key in firsts[0] if any(first.get(key) != firsts[0][key] for first in firsts)]
    parts = [group[0].get("part") for group in groups]

    def name(i: int) -> str:
        if len(groups) == 1:
            return ""
        if parts[i] is None:
            return ", ".join(f"{key} {setting_text(firsts[i].get(key))}" for key in differing)
        # A later part starts from what each method left.
        return f"part {parts[i]}" if parts.count(parts[i]) == 1 else "; ".join(label(e, results) for e in groups[i])

    def before(group: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
        names = dict.fromkeys(name for entry in group for name in entry["before"])  # some runs may measure more
        return {n: next((e["before"][n] for e in group if e["before"].get(n) is not None), None) for n in names}

    return [Start(name(i), before(group), group) for i, group in enumerate(groups)]


def asked(entry: Mapping[str, Any], results: Mapping[str, Any], name: str, when: str = "after") -> tuple[int, float]:
    """How many questions a run's share is of, and how many independent ones tell as much; 0 for what is no share."""
    n = {**results.get("counts", {}), **entry.get("counts", {})}.get(name, 0)
    return n, effective(entry, name, n, when)


def interval(value: float | None, n: int, tells: float | None = None) -> str:
    """The 95 % Wilson interval of a share of n questions, in percent: "3–21"; empty where there is no share.

    Args:
        tells: how many independent questions tell as much; None for n.
    """
    if value is None or not 0 <= value <= 1 or not n:
        return ""
    low, high = wilson(value, n, tells)
    return f"{100 * low:.0f}–{100 * high:.0f}"


class Column(NamedTuple):
    """What a table shows side by side: the numbers of a start before training, or those of a run after it."""

    name: str
    numbers: Mapping[str, float | None]
    asked: Mapping[str, tuple[int, float]]  # as the function `asked` gives it for each metric
    entry: Mapping[str, Any] | None  # the run's


def columns(results: Mapping[str, Any]) -> list[Column]:
    """Each start, and behind it its runs."""

    def questions(entry: Mapping[str, Any], when: str) -> dict[str, tuple[int, float]]:
        return {name: asked(entry, results, name, when) for name in results["metrics"]}

    found = []
    for start in starts(results):
        found.append(Column(start.title, start.before, questions(start.entries[0], "before"), None))
        found += [
            Column(label(entry, results), entry["after"], questions(entry, "after"), entry) for entry in start.entries
        ]
    return found
