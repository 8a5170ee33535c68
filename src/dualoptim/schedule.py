"""Which objectives every optimizer step serves, and with how many sequences.

A schedule is a list with one entry per optimizer step: a mapping of objective → sequences. In alternating training, an
entry has one objective with the whole batch; in joint training, it has all of them, and the batch is divided in the
same ratio. Remainders are made up for in later steps, so that over a run both kinds of training see the same number of
sequences of each objective.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

Turn = dict[str, int]


def parse_ratio(text: str, objectives: Sequence[str]) -> dict[str, int]:
    """Read ``"1:5"`` as steps of each objective in a cycle, in the objectives' order.

    >>> parse_ratio("1:5", ["forget", "retain"])
    {'forget': 1, 'retain': 5}
    """
    parts = str(text).split(":")
    if len(parts) != len(objectives) or not all(re.fullmatch(r"\s*0*[1-9][0-9]{0,5}\s*", part) for part in parts):
        raise ValueError(
            f"the ratio must be {len(objectives)} whole numbers > 0, one for each of {', '.join(objectives)}, "
            f"of six digits at most, such as {':'.join(['1'] * len(objectives))!r}, but is {text!r}"
        )
    return dict(zip(objectives, map(int, parts), strict=True))


def by_turns(ratio: Mapping[str, int], batch_size: int, steps: int) -> list[Turn]:
    """Every step serves one objective with `batch_size` sequences; a cycle has each objective's steps in a row.

    >>> [next(iter(turn)) for turn in by_turns({"forget": 1, "retain": 2}, 8, 5)]
    ['forget', 'retain', 'retain', 'forget', 'retain']
    """
    if not ratio or not all(isinstance(share, int) and share > 0 for share in ratio.values()):
        raise ValueError(f"the ratio must be a whole number > 0 for each objective, but is {dict(ratio)}")
    cycle = [name for name, share in ratio.items() for _ in range(share)]
    return [{cycle[step % len(cycle)]: batch_size} for step in range(steps)]


def in_proportion(shares: Mapping[str, float], batch_size: int, steps: int) -> list[Turn]:
    """As `by_turns`, for any shares: each step serves the objective that is furthest behind its share.

    >>> [next(iter(turn)) for turn in in_proportion({"a": 0.5, "b": 1.5}, 8, 4)]
    ['b', 'a', 'b', 'b']
    """
    total, served = sum(shares.values()), dict.fromkeys(shares, 0)
    turns: list[Turn] = []
    for step in range(1, steps + 1):
        name = max(shares, key=lambda name: shares[name] / total * step - served[name])
        served[name] += 1
        turns.append({name: batch_size})
    return turns


def equal_weights(turns: Sequence[Turn]) -> dict[str, float]:
    """T / (K T_o) for each of K objectives with T_o of T steps: what makes up for unequal numbers of steps.

    As `base_weights` all objectives weigh the same in the base; as `lr_scales` all move the parameters alike.

    >>> equal_weights(by_turns({"forget": 1, "retain": 5}, 8, 12))
    {'forget': 3.0, 'retain': 0.6}
    """
    counts = Counter(name for turn in turns for name in turn)
    return {name: len(turns) / (len(counts) * count) for name, count in counts.items()}


def jointly(ratio: Mapping[str, float], batch_size: int, steps: int) -> list[Turn]:
    """Every step serves all objectives, each with at least one sequence; the batch is divided by the ratio.

    Each further sequence of a step goes to the objective that is then furthest behind its share of the run.

    >>> jointly({"forget": 1, "retain": 2}, 4, 3)
    [{'forget': 1, 'retain': 3}, {'forget': 2, 'retain': 2}, {'forget': 1, 'retain': 3}]
    """
    if batch_size < len(ratio):
        raise ValueError(
            f"a joint batch holds at least one sequence of each of {len(ratio)} objectives, "
            f"but batch_size is {batch_size}"
        )
    total, served = sum(ratio.values()), dict.fromkeys(ratio, 0)
    turns: list[Turn] = []
    for step in range(1, steps + 1):
        before = dict(served)
        for name in ratio:
            served[name] += 1
        for _ in range(batch_size - len(ratio)):
            served[max(ratio, key=lambda name: ratio[name] / total * step * batch_size - served[name])] += 1
        turns.append({name: served[name] - before[name] for name in ratio})
    return turns
