"""Many runs → points: one for each method and setting, its mean over seeds, an interval, and whether none beats it.

The interval is a bootstrap's over what varies: the seeds, and within each the clusters of its rows (of TOFU, authors),
both drawn with replacement as often as there are. With one seed it is over clusters alone, and says nothing of seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from .folder import RECORDS

RESAMPLES = 2000
LEVEL = 0.95
Run = tuple[Mapping[str, Any], Mapping[str, Any], Path]  # entry, the grid's settings, the run's own folder
# Sets of clusters: for one seed, (values of the cluster's rows, how many) a cluster.
Clusters = Sequence[tuple[float, int]]


def points_of(found: Sequence[Run], plane: Sequence[str] | None) -> list[dict[str, Any]]:
    """The points of runs, in the order of the first of each.

    Args:
        found: runs with what the grid says of them.
        plane: the metrics of what is forgotten, where less is better, and of what is kept; None for none.

    Returns:
        For each point ``method``, ``settings``, ``seeds``, ``values`` (metric → mean over seeds, None where one has
        none), ``by_seed`` (metric of the plane → values), ``intervals`` (metric of the plane → [low, high], where rows
        were scored one by one), ``seconds`` (mean), ``bytes`` of the optimizer's states, and ``front``.
    """
    groups: dict[str, list[Run]] = {}
    for run in found:
        groups.setdefault(json.dumps([run[0]["method"], run[1]]), []).append(run)
    made = [_point(group, plane or ()) for group in groups.values()]
    if plane:
        # A start of its own, as another set of rows to forget, has a front of its own only on a page of its own.
        at = [tuple(point["values"].get(name) for name in plane) for point in made]
        for point, on in zip(made, front(at), strict=True):
            point["front"] = on
    return made


def front(points: Sequence[tuple[float | None, ...]]) -> list[bool]:
    """Which (forget, keep) points no other beats: none forgets as much and keeps as much, and one of them more.

    >>> front([(0.1, 0.9), (0.2, 0.8), (0.3, 0.95), (None, 1.0)])
    [True, False, True, False]
    """

    def beaten(one: tuple[float | None, ...]) -> bool:
        forget, keep = one
        if forget is None or keep is None:
            return True
        return any(
            f is not None and k is not None and f <= forget and k >= keep and (f, k) != (forget, keep)
            for f, k in points
        )

    return [not beaten(one) for one in points]


def _point(group: Sequence[Run], plane: Sequence[str]) -> dict[str, Any]:
    entries = [entry for entry, _, _ in group]
    names = list(dict.fromkeys(name for entry in entries for name in entry["after"]))
    values = {name: _mean([entry["after"].get(name) for entry in entries]) for name in names}
    clusters = [_clusters(folder / RECORDS) for _, _, folder in group]
    intervals = {}
    for name in plane:
        parts = [by_set.get(name.removesuffix("_probability"), ()) for by_set in clusters]
        if name.endswith("_probability") and all(parts):
            intervals[name] = list(interval(parts))
    return {
        "method": entries[0]["method"],
        "settings": dict(group[0][1]),
        "seeds": [entry["seed"] for entry in entries],
        "values": values,
        "by_seed": {name: [entry["after"].get(name) for entry in entries] for name in plane},
        "intervals": intervals,
        "seconds": fmean(entry["seconds"] for entry in entries),
        "bytes": max(entry["optimizer_state_bytes"] for entry in entries),
        "front": False,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _clusters(path: Path) -> dict[str, Clusters]:
    """For each set of a run's records after training, its clusters' sums of p(answer) and their sizes."""
    if not path.is_file():
        return {}
    sums: dict[str, dict[str, list[float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record.get("when") == "after" and "cluster" in record and record.get("nll") is not None:
            sums.setdefault(record["set"], {}).setdefault(record["cluster"], []).append(math.exp(-record["nll"]))
    return {name: [(sum(values), len(values)) for values in parts.values()] for name, parts in sums.items()}


def interval(seeds: Sequence[Clusters], level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of the mean over rows, averaged over seeds, both seeds and clusters drawn anew.

    Args:
        seeds: of each seed, its clusters' sums and sizes.
    """
    draw = np.random.default_rng(0)
    means = []
    for clusters in seeds:
        table = np.array(clusters, dtype=float)  # (C, 2)
        at = draw.integers(len(table), size=(RESAMPLES, len(table)))
        total = table[at].sum(1)
        means.append(total[:, 0] / total[:, 1])
    which = draw.integers(len(seeds), size=(RESAMPLES, len(seeds)))
    found = np.take_along_axis(np.stack(means, 1), which, 1).mean(1)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
