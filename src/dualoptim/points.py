"""Many runs → points: one for each method and setting, with a mean over seeds, an interval, and if no other beats it.

The interval is a bootstrap over what varies: the seeds, and the clusters of rows (for TOFU the authors, else the rows
themselves), both drawn with replacement as often as there are. Seeds with the same clusters get the same draw of them:
more seeds on the same rows say no more about other rows. With one seed it is over rows only, and
says nothing about seeds, and one cluster with one seed has none. For a share of questions it is at least as wide as
Wilson's for as many independent questions as tell as much (`evaluation.shares`), since a bootstrap of a share of 0 has
no width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from . import starts
from .evaluation.better import away
from .evaluation.shares import LEVEL, wilson
from .folder import RECORDS
from .reading import json_lines

RESAMPLES = 2000
DRAWN_AT_ONCE = 2**20  # clusters, so that the memory does not grow with their number times that of resamples
Run = tuple[Mapping[str, Any], Mapping[str, Any], Path]  # entry, the grid's settings, the run's own folder
# The clusters of one seed: for each by its name, (sum of its rows' values, number of its rows).
Clusters = Mapping[Any, tuple[float, int]]


def points_of(
    found: Sequence[Run],
    plane: Sequence[str] | None,
    counts: Mapping[str, int] | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """The points of runs, in the order of the first of each.

    Args:
        found: runs, each with its settings in the grid.
        plane: the two metrics that points are compared by, such as of what is forgotten and of what is kept; None for
            none.
        counts: metric → the number of questions, for metrics that are shares.
        metrics: metric → "better", which way it is; by default, less of the first and more of the second is.

    Returns:
        For each point ``method``, ``settings``, ``seeds``, ``values`` (metric → mean over seeds, None where one has
        none), ``by_seed`` (metric of the plane → values), ``intervals`` (metric of the plane → [low, high], where it is
        a share, its rows were scored one by one, or there are several seeds), ``seconds`` (mean), ``bytes`` of the
        optimizer's states, and ``front``: whether no other point of the same start beats it, in the mean over seeds of
        how far each is from the best.
    """
    groups: dict[str, list[Run]] = {}
    for run in found:
        groups.setdefault(json.dumps([run[0]["method"], run[1]]), []).append(run)
    made = [_point(group, plane or (), counts or {}) for group in groups.values()]
    if plane:
        known = {name: metric["better"] for name, metric in (metrics or {}).items()}
        ways = [(name, known.get(name, way)) for name, way in zip(plane, ("lower", "higher"), strict=True)]
        of_start: dict[str, list[dict[str, Any]]] = {}  # what forgets other rows, or another model, is no rival
        for group, point in zip(groups.values(), made, strict=True):
            of_start.setdefault(starts.key(group[0][0]), []).append(point)
        for rivals in of_start.values():
            at = [tuple(_lacking(point["by_seed"][name], way) for name, way in ways) for point in rivals]
            for point, on in zip(rivals, front(at), strict=True):
                point["front"] = on
    return made


def front(points: Sequence[tuple[float | None, ...]]) -> list[bool]:
    """Which points no other beats: none is as good in both numbers, of which less is better, and better in one.

    >>> front([(0.1, -0.9), (0.2, -0.8), (0.3, -0.95), (None, -1.0)])
    [True, False, True, False]
    """

    def beaten(one: tuple[float | None, ...]) -> bool:
        x, y = one
        if x is None or y is None:
            return True
        return any(
            other_x is not None and other_y is not None and other_x <= x and other_y <= y and (other_x, other_y) != one
            for other_x, other_y in points
        )

    return [not beaten(one) for one in points]


def _lacking(values: Sequence[float | None], better: str) -> float | None:
    """How much is lacking to the best of a metric, in the mean over seeds: of ±50 about a best of 0, it is 50."""
    return _mean([None if value is None else away(better, value) for value in values])


def _point(group: Sequence[Run], plane: Sequence[str], counts: Mapping[str, int]) -> dict[str, Any]:
    entries = [entry for entry, _, _ in group]
    names = list(dict.fromkeys(name for entry in entries for name in entry["after"]))
    values = {name: _mean([entry["after"].get(name) for entry in entries]) for name in names}
    folders = [folder for _, _, folder in group]
    by_seed = {name: [entry["after"].get(name) for entry in entries] for name in plane}
    counts = {**counts, **entries[0].get("counts", {})}
    whole = {name: by_seed[name] for name in plane if not counts.get(name) and None not in by_seed[name]}
    seeds = [
        _clusters(folder / RECORDS, {name: values[i] for name, values in whole.items()})
        for i, folder in enumerate(folders)
    ]

    def asked(name: str) -> tuple[int, float] | None:
        n = counts.get(name)
        return (n, min(effective(entry, name, n) for entry in entries)) if n else None

    intervals = {
        name: found
        for name in plane
        if (found := _spread(by_seed[name], asked(name), [clusters.get(name, {}) for clusters in seeds]))
    }
    return {
        "method": entries[0]["method"],
        "settings": dict(group[0][1]),
        "seeds": [entry["seed"] for entry in entries],
        "values": values,
        "by_seed": by_seed,
        "intervals": intervals,
        "seconds": fmean(entry["seconds"] for entry in entries),
        "bytes": max(entry["optimizer_state_bytes"] for entry in entries),
        "front": False,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def effective(entry: Mapping[str, Any], name: str, n: int, when: str = "after") -> float:
    """How many independent questions tell as much as the n questions of a run's share; n where results do not say."""
    return float(entry.get("effective_counts", {}).get(when, {}).get(name, n))


def _spread(values: Sequence[Any], asked: tuple[int, float] | None, seeds: Sequence[Clusters]) -> list[float] | None:
    """A metric's interval over its rows and seeds; None where it has neither, or no number.

    Args:
        values: one for each seed.
        asked: for a share of questions, their number, and how many independent ones tell as much.
        seeds: each seed's clusters of rows; empty where it has none.
    """
    if any(value is None for value in values):
        return None
    if asked:
        count, tells = asked
        low, high = wilson(fmean(values), count, tells)
        if len(values) > 1:
            several = max(1, round(tells))
            right = [round(value * count) * several / count for value in values]
            # Which questions are right is not known here: as far as possible, the same in all seeds, which is widest.
            drawn = interval([{i: (min(max(n - i, 0.0), 1.0), 1) for i in range(several)} for n in right])
            low, high = min(low, drawn[0]), max(high, drawn[1])
        return [low, high]
    if all(seeds) and (len(seeds) > 1 or len(seeds[0]) > 1):
        return list(interval(seeds))
    return list(interval([{0: (value, 1)} for value in values])) if len(values) > 1 else None


# For metrics that are means over a set of records, named by the set and an ending: ending → a record's own score.
OF_ROWS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "_probability": lambda record: math.exp(-record["nll"]),
    "_rouge_l": lambda record: float(record["rouge_l"]),
}


def _clusters(path: Path, values: Mapping[str, float]) -> dict[str, Clusters]:
    """For each metric that is a mean over a run's records after training, the clusters' sums and sizes.

    A file that cannot be read gives none: the run is finished, and an interval must not cost its results. It is read
    once for all metrics, as it may be large.

    Args:
        values: metric → the run's number.
    """
    ends = {name: end for name in values for end in OF_ROWS if name.endswith(end)}
    if not ends:
        return {}
    try:
        records = json_lines(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not all(isinstance(record, dict) for record in records):
        return {}
    return {name: _clusters_of(records, name, end, values[name]) for name, end in ends.items()}


def _clusters_of(records: Sequence[Mapping[str, Any]], name: str, end: str, value: float) -> Clusters:
    """The clusters' sums and sizes of a metric; empty if it is no mean over the records of its set."""
    found: dict[Any, list[float]] = {}
    for record in records:
        if record.get("when") == "after" and record.get("set") == name.removesuffix(end):
            with suppress(KeyError, TypeError, ValueError, OverflowError):
                score = OF_ROWS[end](record)
                # A private run's records have no text, but their order.
                own = (record["question"], record.get("answer")) if "question" in record else len(found)
                found.setdefault(record.get("cluster", own), []).append(score)
    rows = [score for scores in found.values() for score in scores]
    if not rows or abs(fmean(rows) - value) > 1e-6:  # a mean of something else
        return {}
    return {name: (sum(scores), len(scores)) for name, scores in found.items()}


def interval(seeds: Sequence[Clusters], level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of the mean over rows, averaged over seeds, with seeds and clusters resampled.

    Args:
        seeds: for each seed, its clusters' sums and sizes; clusters of the same names are drawn together.
    """
    draw = np.random.default_rng(0)
    alike: dict[frozenset[Any], list[int]] = {}  # the seeds with the same clusters
    for i, clusters in enumerate(seeds):
        alike.setdefault(frozenset(clusters), []).append(i)
    means = np.empty((RESAMPLES, len(seeds)))
    for members in alike.values():
        order = list(seeds[members[0]])
        tables = {i: np.array([seeds[i][name] for name in order], dtype=float) for i in members}  # (C, 2) each
        block = max(1, DRAWN_AT_ONCE // len(order))
        for first in range(0, RESAMPLES, block):
            rows = slice(first, min(first + block, RESAMPLES))
            at = draw.integers(len(order), size=(rows.stop - first, len(order)))
            for i, table in tables.items():
                total = table[at].sum(1)
                means[rows, i] = total[:, 0] / total[:, 1]
    which = draw.integers(len(seeds), size=(RESAMPLES, len(seeds)))
    found = np.take_along_axis(means, which, 1).mean(1)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
