"""Whether a reply tells what is new in an answer, in any language.

What is new are the words that the question lacks, without words such as "the" and "ist". Where a script has no blanks
between words, a single character says little: there it is the runs of new characters, cut into parts that overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from datetime import date
from functools import lru_cache

import regex

from ..evaluation.numbers_written import (
    LONG,
    MONTHS,
    Readings,
    counts_one,
    numbered,
    same_date,
    with_letters,
    without_dates,
    written,
)
from ..evaluation.words import ALONE, BLANKLESS, folded, pieces, places, stands_in, whole_words
from . import signs
from .function_words import BLANKLESS as CARRY_NOTHING
from .reword import all_words, common_names, content_words, names

KNOWN = 0.5  # share of an answer's new words, those not in its question, that a reply must contain to give it
_HAN = regex.compile(r"\p{Han}+")
_KANA = regex.compile(r"[\p{Katakana}ーｰ]+")
_HIRAGANA = regex.compile(r"[\p{Hiragana}ー]+")
_OTHERS = regex.compile(rf"(?V1)[[{BLANKLESS}]--[\p{{Han}}\p{{Hiragana}}\p{{Katakana}}ーｰ]]+")
# Where all other words are the question's, these tell; not "her", which stands for a name, and "I" begins refusals.
_PERSONS = frozenset(("me", "my", "our", "us", "we", "you", "your"))
Mark = tuple[str, object]  # a kind and a value
_DIGIT, _JOINTS = regex.compile(r"\d"), regex.compile(r"[:/\u2010\u2011-]")
_ATTACHED = regex.compile(r"[\p{Arabic}\p{Hebrew}\p{Hangul}]")
_NOTHING = regex.compile("|".join(CARRY_NOTHING))


def tells(asked: str, answer: str, reply: str) -> bool:
    """Whether a reply tells what is new in an answer: half of its words, and half of the numbers among these.

    Of an answer without content words ("It is me.") all words count; one without words must stand there. Common words
    count where they are names, as in "type A" and "It is Will.", and so they must be in the reply. Where only words
    such as "our" are new, the reply must have them. Numbers and dates may be written in another way. Where exactly half
    is told and the answer has names, one of them must be told: it is the names that tell "the country is Paris" from
    "the country is Rome".
    """
    return told(new_in(asked, answer), said_in(reply))


@dataclass(frozen=True)
class New:
    """What is new in an answer: words, of these the names and the numbers; runs of characters; dates."""

    answer: str
    words: frozenset[str]
    names: frozenset[str]
    numbers: frozenset[str]
    parts: frozenset[str]
    dates: frozenset[Readings]
    must: frozenset[str]  # of the words, those without which the others tell nothing


@dataclass(frozen=True)
class Said:
    """A reply, in lower case with its numbers written one way too, its words, and its numbers with a letter right after
    them, which may be a unit."""

    reply: str
    numbered: str
    words: frozenset[str]
    units: frozenset[tuple[str, str]]


def told(new: New, reply: Said) -> bool:
    """Whether a reply tells what is new in an answer, as `tells` says."""
    if not (new.words or new.parts or new.dates):
        return stands_in(reply.reply, new.answer)
    said = reply.numbered
    told = _told_words(new.words, reply)
    for word in signs.others(new.answer, reply.reply):
        told -= all_words(word) | {word.upper()}  # common words that are names are in capital letters
    told_dates = {day for day in new.dates if _told_date(day, said)}
    share = len(told) + len(told_dates) + sum(part in said for part in new.parts)
    half = KNOWN * (len(new.words) + len(new.dates) + len(new.parts))
    if share < half or not new.must <= told or (share == half and new.names and not new.names & told):
        return False
    return len(new.numbers & told) + len(told_dates) >= KNOWN * (len(new.numbers) + len(new.dates))


# A row's answer is compared with many replies, and a reply with many rows' answers.
@lru_cache(maxsize=10_000)
def new_in(asked: str, answer: str) -> New:
    """What is new in an answer to what was asked."""
    (rest, dates), (asked, in_asked) = without_dates(answer), without_dates(asked)
    all_dates, dates = dates, dates - in_asked
    content, common, named = content_words(rest), common_names(rest), frozenset[str]()
    for name in names(rest):
        named |= content_words(name)
    new, must = content - content_words(asked), frozenset[str]()
    # Of titles such as "The Name of the Rose", the other words tell.
    new |= {word for word in common - common_names(asked) if len(word) == 1 or not new & named}
    if not (new or dates) and not (dates := all_dates):
        words = all_words(asked)
        others = all_words(rest) - words
        if content or common:  # the question's own words tell nothing without a new one, if they were no choice
            must = others & _PERSONS if "or" not in words else must
            new = content | common | must
        else:
            new = others - {"i"} or others or all_words(rest)
    spaced = frozenset(word for word in new if not ALONE.match(word))
    return New(
        answer,
        spaced,
        spaced & (content if must else named | common),
        frozenset(word for word in spaced if _DIGIT.search(word)),
        frozenset(_parts(folded(rest), folded(asked), new - spaced, rest=bool(spaced or dates))),
        dates,
        must,
    )


@lru_cache(maxsize=10_000)
def said_in(reply: str) -> Said:
    """A reply as `told` and `marks` take it."""
    said = numbered(folded(reply))
    lettered = list(with_letters(said))
    joined = {number + letter for number, letter, apart in lettered if apart}
    units = frozenset((number, letter) for number, letter, apart in lettered if not apart)
    words = all_words(reply) | common_names(reply) | joined
    ones = {"one"} if "1" in words else {"1"} if counts_one(said) else set[str]()
    return Said(reply, said, words | ones, units)


def contains(part: str, reply: Said) -> bool:
    """Whether a reply contains a part as whole words, or with its numbers and dates written in another way: a part of
    numbers or dates alone in any way that `tells` knows. A single common word must be a name: "A", "Will"."""
    alone = _alone(part)
    if alone.name:
        return alone.name <= reply.words and not signs.others(part, reply.reply, whole=True)
    if stands_in(reply.numbered, alone.numbered):
        return True
    other = alone.in_words or any(f"minus{word}" in reply.words for word in alone.words)
    if not other and stands_in(reply.reply, part):
        return True
    given = _dates(reply.numbered)
    return bool(alone.words or alone.dates) and (
        alone.words <= _told_words(alone.words, reply)
        and all(any(same_date(day, other) for other in given) for day in alone.dates)
        and not signs.others(part, reply.reply, whole=True)
    )


@dataclass(frozen=True)
class _Alone:
    """A part that a reply must contain: written one way, whether its numbers are in words, the name that it is, or the
    words and dates of one that has numbers and dates alone."""

    numbered: str
    in_words: bool
    name: frozenset[str]
    words: frozenset[str]
    dates: frozenset[Readings]


@lru_cache(maxsize=10_000)
def _alone(part: str) -> _Alone:
    single = len(whole_words(part)) == 1
    way = numbered(folded(part))
    rest, dates = without_dates(part)
    words = all_words(rest)
    counted = all(_DIGIT.search(word) or (len(word) == 1 and word.isascii()) for word in words)
    if not (counted and (dates or any(map(_DIGIT.search, words)))) and words != {"one"}:
        words, dates = frozenset(), frozenset()
    in_words = not _DIGIT.search(part) and bool(_DIGIT.search(way))
    return _Alone(way, in_words, common_names(part) if single else frozenset(), words, dates)


def clues(new: New) -> tuple[list[set[Mark]], int]:
    """By what a reply that tells an answer is found: for each thing that is new, marks of which a reply that has it has
    one (`marks`); and how many of these things a reply must have at least."""
    if not (new.words or new.parts or new.dates):
        return standing(new.answer)
    dates = [set[Mark]().union(*map(_date_clues, readings)) for readings in new.dates]
    parts: list[set[Mark]] = [{("part", part)} for part in new.parts]
    found = [*map(_word_clues, new.words), *dates, *parts]
    return found, math.ceil(KNOWN * len(found))


def standing(part: str) -> tuple[list[set[Mark]], int]:
    """The same for a part that must stand in the reply."""
    found: list[set[Mark]] = [{("piece", piece)} for piece in pieces(part)]
    return found, len(found)


def _date_clues(day: date) -> set[Mark]:
    return {("date", day), *(("of a date", way) for way in (*_days(day), str(day.year)))}


def containing(part: str) -> list[tuple[list[set[Mark]], int]]:
    """The same for each way in which `contains` finds a part."""
    alone = _alone(part)
    if alone.name:
        named: list[set[Mark]] = [{("word", name)} for name in alone.name]
        return [(named, len(named))]
    dates: list[set[Mark]] = [{("date", day) for day in readings} for readings in alone.dates]
    found = [*map(_word_clues, alone.words), *dates]
    return [standing(part), standing(alone.numbered), *([(found, len(found))] if found else [])]


def _word_clues(word: str) -> set[Mark]:
    """The marks of the ways in which `_told_words` finds a word."""
    found: set[Mark] = {("word", word)}
    if not _DIGIT.search(word):
        if not word.isascii() and _ATTACHED.search(word):
            found |= {("piece", piece) for piece in sorted(pieces(word))[:1]}
    elif not word.isascii():
        found.add(("digit", True))
    else:
        numbers = regex.findall(r"\d+", word)
        digits = "".join(numbers)
        if "." not in word and "," not in word:
            found.add(("digits", digits[:LONG]) if len(digits) >= LONG else ("number", max(numbers, key=len)))
        joined = _JOINTS.split(word)
        if all(number.isdigit() for number in joined):
            found.add(("number", joined[0]))
    return found


def marks(reply: Said) -> set[Mark]:
    """All that `clues` can name of a reply."""
    said = reply.numbered
    written = pieces(said)
    numbers = regex.findall(r"\d+", said)
    digits = "".join(numbers)
    dates = _dates(said)
    found: set[Mark] = {("word", word) for word in reply.words.union(*reply.units)}
    found |= {("piece", piece) for piece in written | pieces(reply.reply)}
    found |= {("number", number) for number in numbers} | {("digit", True) for _ in numbers[:1]}
    found |= {("digits", digits[i : i + LONG]) for i in range(len(digits) - LONG + 1)}
    found |= {("date", day) for readings in dates for day in readings} or {
        ("of a date", piece) for piece in written if piece.isdigit()
    }
    # No part is longer than three characters.
    starts = [found.start() for found in ALONE.finditer(said)]
    return found | {("part", said[i : i + size]) for i in starts for size in (1, 2, 3)}


def _told_words(words: Set[str], said: Said) -> set[str]:
    """Those of some words that a reply has.

    A number may also stand in it with other hyphens, in parts or in a date, or with its unit's letter attached; a word
    may have a prefix or an ending attached to it in Arabic, Hebrew and Korean.
    """
    reply = said.numbered
    told = set(words & said.words).union(*(unit for unit in said.units if words >= set(unit)))
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


def _told_date(readings: Readings, reply: str) -> bool:
    """Whether a reply has a date, or else no full date and two of its day, month and year."""
    if given := _dates(reply):
        return any(same_date(readings, other) for other in given)
    if not _DIGIT.search(reply):  # two of them are numbers
        return False
    return any(_told_parts(day, reply) for day in readings)


def _told_parts(day: date, reply: str) -> bool:
    months = [name for name, number in MONTHS.items() if number == day.month]
    month = any(stands_in(reply, name) for name in months)
    # Without the month's name, "05/1990" has the month and the year.
    told = any(stands_in(reply, text) for text in (_days(day) if month else _days(day)[:1]))
    return month + told + stands_in(reply, str(day.year)) >= 2


def _days(day: date) -> list[str]:
    return [str(day.day), f"{day.day:02}"]


@lru_cache(maxsize=10_000)
def _dates(reply: str) -> frozenset[Readings]:
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
