"""Whether a reply tells what is new in an answer, in any language.

What is new are the words that the question lacks, without words such as "the" and "ist". Where a script has no blanks
between words, a single character says little: there it is the runs of new characters, cut into parts that overlap.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from datetime import date
from functools import lru_cache

import regex

from .evaluation.numbers_written import MONTHS, numbered, without_dates, written
from .evaluation.words import ALONE, BLANKLESS, folded, places, stands_in
from .function_words import BLANKLESS as CARRY_NOTHING
from .reword import all_words, content_words, names

KNOWN = 0.5  # share of an answer's new words, those not in its question, that a reply must contain to give it
_HAN = regex.compile(r"\p{Han}+")
_KANA = regex.compile(r"[\p{Katakana}ーｰ]+")
_HIRAGANA = regex.compile(r"[\p{Hiragana}ー]+")
_OTHERS = regex.compile(rf"(?V1)[[{BLANKLESS}]--[\p{{Han}}\p{{Hiragana}}\p{{Katakana}}ーｰ]]+")
_DIGIT, _JOINTS = regex.compile(r"\d"), regex.compile(r"[:/\u2010\u2011-]")
_ATTACHED = regex.compile(r"[\p{Arabic}\p{Hebrew}\p{Hangul}]")
_NOTHING = regex.compile("|".join(CARRY_NOTHING))


def tells(asked: str, answer: str, reply: str) -> bool:
    """Whether a reply tells what is new in an answer: half of its words, and half of the numbers among these.

    Of an answer without content words ("the US", "It is me.") all words count; one without words must stand there.
    Numbers and dates may be written in another way. Where exactly half is told and the answer has names, one of them
    must be told: it is the names that tell "the country is Paris" from "the country is Rome".
    """
    new = _new(asked, answer)
    if not (new.words or new.parts or new.dates):
        return stands_in(reply, answer)
    said, has = _said(reply)
    told = _told_words(new.words, said, has)
    told_dates = {day for day in new.dates if _told_date(day, said)}
    share = len(told) + len(told_dates) + sum(part in said for part in new.parts)
    half = KNOWN * (len(new.words) + len(new.dates) + len(new.parts))
    if share < half or (share == half and new.names and not new.names & told):
        return False
    return len(new.numbers & told) + len(told_dates) >= KNOWN * (len(new.numbers) + len(new.dates))


@dataclass(frozen=True)
class _New:
    """What is new in an answer: words, of these the names and the numbers; runs of characters; dates."""

    words: frozenset[str]
    names: frozenset[str]
    numbers: frozenset[str]
    parts: frozenset[str]
    dates: frozenset[date]


# A row's answer is compared with many replies, and a reply with many rows' answers.
@lru_cache(maxsize=10_000)
def _new(asked: str, answer: str) -> _New:
    (rest, dates), (asked, in_asked) = without_dates(answer), without_dates(asked)
    dates = dates - in_asked or dates
    taken = content_words if dates or content_words(rest) else all_words
    new = taken(rest) - taken(asked) or (frozenset() if dates else taken(rest))
    spaced = frozenset(word for word in new if not ALONE.match(word))
    return _New(
        spaced,
        spaced.intersection(word for name in names(rest) for word in content_words(name)),
        frozenset(word for word in spaced if _DIGIT.search(word)),
        frozenset(_parts(folded(rest), folded(asked), new - spaced, rest=bool(spaced or dates))),
        dates,
    )


@lru_cache(maxsize=10_000)
def _said(reply: str) -> tuple[str, frozenset[str]]:
    """A reply in lower case with its numbers written one way, and its words."""
    return numbered(folded(reply)), all_words(reply)


def _told_words(words: Set[str], reply: str, has: Set[str]) -> set[str]:
    """Those of some words that a reply has.

    A number may also stand in it with other hyphens, in parts or in a date; a word may have a prefix or an ending
    attached to it in Arabic, Hebrew and Korean.
    """
    told = set(words & has)
    for word in words - told:
        if not _DIGIT.search(word):
            given = not word.isascii() and bool(_ATTACHED.search(word)) and stands_in(reply, word)
        elif not _DIGIT.search(reply):
            given = False
        else:
            given = ("." not in word and "," not in word and bool(written(word).search(reply))) or _in_order(
                _JOINTS.split(word), reply
            )
        if given:
            told.add(word)
    return told


def _in_order(numbers: Sequence[str], reply: str) -> bool:
    """Whether whole numbers stand in a reply one after the other."""
    at = 0
    for number in numbers:
        ends = [end for start, end in places(reply, number) if start >= at] if number.isdigit() else []
        if not ends:
            return False
        at = ends[0]
    return True


def _told_date(day: date, reply: str) -> bool:
    """Whether a reply has a date, or else no full date and two of its day, month and year."""
    if given := _dates(reply):
        return day in given
    if not _DIGIT.search(reply):  # two of them are numbers
        return False
    months = [name for name, number in MONTHS.items() if number == day.month]
    ways = ([str(day.day)], months, [str(day.year)])
    return sum(any(stands_in(reply, part) for part in parts) for parts in ways) >= 2


@lru_cache(maxsize=10_000)
def _dates(reply: str) -> frozenset[date]:
    return without_dates(reply)[1]


def _parts(answer: str, asked: str, new: Set[str], *, rest: bool) -> set[str]:
    """What is new in an answer in scripts without blanks between words, cut into parts that overlap.

    A Han character is nearly a word: what counts are pairs of new ones. Letters of the other scripts come again in any
    text: of these, threes that the question lacks. Hiragana are mostly endings and count where there is nothing else.

    Args:
        new: the characters that the question lacks.
        rest: whether there is something else that is new.
    """
    text = _NOTHING.sub(" ", answer) if _NOTHING.sub("", answer).strip(" .,!?。、！？") else answer
    runs = {run for found in _HAN.findall(text) for run in _runs(found, new)}
    parts = {part for run in runs for part in _cut(run, 2)}
    letters = [run for pattern in (_KANA, _OTHERS) for run in pattern.findall(text)]
    parts |= {part for run in letters for part in _cut(run, 3) if part not in asked}
    if parts or rest:
        return parts
    return {part for run in _HIRAGANA.findall(text) for part in _cut(run, 2) if part not in asked}


def _runs(text: str, new: Set[str]) -> list[str]:
    return "".join(c if c in new else " " for c in text).split()


def _cut(run: str, size: int) -> list[str]:
    return [run[i : i + size] for i in range(max(1, len(run) - size + 1))]
