"""Whether a model broke down: replies that repeat themselves or say nothing, a perplexity or a loss that explodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import regex

from .digits import at_least
from .words import ALONE, words

LONG = 12  # fewest words of a reply that can count as repeating itself
DISTINCT = 1 / 3  # share of distinct words below which it does
MANY = 0.2  # rise in the share of such replies from which on it is reported
TIMES = 10.0  # growth factor of the perplexity or a loss to keep above which it counts as an explosion
FLOOR = 0.5  # nats: smaller losses count as this much, as ten times almost nothing is no explosion

Record = Mapping[str, Any]


def repeats(reply: str) -> bool:
    """Whether a reply says the same few words over and over.

    >>> repeats("tea " * 20), repeats("tea" * 20), repeats("The capital of Norway is Oslo.")
    (True, True, False)
    """
    found = [part for word in words(reply) for part in _glued(word)]
    # Where a character is a word, as in Thai, any text has few distinct ones: there, runs of three are counted.
    said = ["".join(found[i : i + 3]) if ALONE.match(word) else word for i, word in enumerate(found)]
    return len(said) >= LONG and len(set(said)) < DISTINCT * len(said)


def _glued(word: str) -> list[str]:
    """The same letters three times or more in one word, without blanks between them, are as many words."""
    unit = regex.match(r"(\D+?)\1{2,}", word)
    if unit is None or not unit[1].startswith(word[unit.end() :]):
        return [word]
    return [unit[1]] * (len(unit[0]) // len(unit[1]))


def collapse(
    before: Sequence[Record],
    after: Sequence[Record],
    perplexity: tuple[float | None, float | None],
    losses: Sequence[Mapping[str, Any]],
    kept: Sequence[str],
) -> list[str]:
    """The signs in a run that the model broke down, as sentences; empty if there are none.

    Args:
        before: records with the replies before.
        after: those after.
        perplexity: before and after.
        losses: log entries with `loss/OBJECTIVE`.
        kept: the retain objectives, whose losses should not grow.
    """
    found = []
    was, now = ([r["reply"] for r in records if "reply" in r] for records in (before, after))
    for what, tells in (("repeat themselves", repeats), ("say nothing", lambda reply: not words(reply))):
        old, new = sum(map(tells, was)), sum(map(tells, now))
        if now and at_least(new / len(now), MANY + old / max(len(was), 1)):
            found.append(f"{new} of {len(now)} replies {what}, {old} did before")
    first, last = perplexity
    if first and last is not None and not last < TIMES * first:
        found.append(f"perplexity rose from {first:.1f} to {last:.1f}")
    for name in kept:
        course = [entry[f"loss/{name}"] for entry in losses if f"loss/{name}" in entry]
        finite = [value for value in course if math.isfinite(value)]
        if finite and finite[-1] > TIMES * max(finite[0], FLOOR):
            found.append(f"the loss to keep {name!r} rose from {finite[0]:.2f} to {finite[-1]:.2f}")
    return found
