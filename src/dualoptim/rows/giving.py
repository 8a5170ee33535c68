"""Whether a reply gives a row's answer, and which of many rows' answers it gives.

Of many rows, those that a text could touch are looked up by what they have in common with it, the rarest first, and
only these are compared: the results are those of comparing with each row.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import regex

from ..data import Row
from ..evaluation.words import folded, pieces, stands_in
from . import function_words, reword
from .telling import Mark, clues, containing, contains, marks, new_in, said_in, tells, told

YES_NO = frozenset(map(reword.plain, function_words.YES_NO))
# What also stands before a noun or a verb ("no information", "nie wiem"); as an answer, before a pronoun or a comma.
_NOT = frozenset(map(folded, ("no", "non", "não", "nie", "nem", "нет", "לא", "لا")))
_GOES_ON = regex.compile(r"\W*\w+[^\S\n]+(\w+)")
Key = TypeVar("Key", bound=Hashable)
Thing = TypeVar("Thing")


def gives(row: Row, reply: str) -> bool:
    """Whether a reply gives a row's answer: it contains one of ``accepted``, or else half of the answer's new words,
    those that its prompt lacks, and half of the numbers among them.

    Where an answer is yes or no, in any of some languages, or ``accepted`` has the one that the answer begins with, the
    reply must begin with it: "no" also stands in "I have no information".
    """
    if accepted := row.fields.get("accepted"):
        short, said = _short(row), said_in(reply)
        return any(_answers(reply, text) for text in short) or any(
            contains(text, said) for text in accepted if text not in short
        )
    if reword.plain(row.answer) in YES_NO:
        return _answers(reply, row.answer)
    return tells(said_before(row), row.answer, reply)


def said_before(row: Row) -> str:
    """What a row's messages say before its answer."""
    return "\n".join(message["content"] for message in row.prompt)


def _short(row: Row) -> list[str]:
    """Those of ``accepted`` that a reply must begin with."""
    accepted = row.fields.get("accepted") or ()
    return [text for text in accepted if reword.plain(text) in YES_NO and _begins(row.answer, text)]


def _answers(reply: str, word: str) -> bool:
    """Whether a reply begins with yes or no, and with no other meaning of it: not "No idea." nor "No one knows."."""
    if not _begins(reply, word):
        return False
    goes_on = _GOES_ON.match(folded(reply)) if reword.plain(word) in _NOT else None
    return goes_on is None or goes_on[1] in reword.FUNCTION_WORDS


def _begins(text: str, part: str) -> bool:
    return f"{reword.plain(text)} ".startswith(f"{reword.plain(part)} ")


class Answers:
    """The answers of many rows, to find those that a text gives."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        # Kept here, as there may be more rows than any cache holds; None where the answer must stand in a reply.
        self._new = [
            None
            if row.fields.get("accepted") or reword.plain(row.answer) in YES_NO
            else new_in(said_before(row), row.answer)
            for row in rows
        ]
        sought: list[tuple[int, list[set[Mark]], int]] = []
        for at, (row, new) in enumerate(zip(rows, self._new, strict=True)):
            if new:
                sought.append((at, *clues(new)))
                continue
            short = _short(row) if row.fields.get("accepted") else [row.answer]
            sought += [(at, [{_beginning(text)}], 1) for text in short]
            others = [text for text in row.fields.get("accepted") or () if text not in short]
            sought += [(at, *way) for text in others for way in containing(text)]
        counts = Counter(mark for _, things, _ in sought for thing in things for mark in thing)
        self._at: dict[Mark, set[int]] = defaultdict(set)
        for at, things, least in sought:
            for thing in _rarest(things, least, lambda thing: sum(counts[mark] for mark in thing)):
                for mark in thing:
                    self._at[mark].add(at)

    def given_in(self, reply: str) -> Iterator[Row]:
        """The rows whose answers a text gives, in their order."""
        said = said_in(reply)
        for at in _found(self._at, [*marks(said), _beginning(reply)]):
            new = self._new[at]
            if told(new, said) if new else gives(self._rows[at], reply):
                yield self._rows[at]


def _beginning(text: str) -> Mark:
    return "begins", reword.plain(text).partition(" ")[0]


class Parts:
    """Parts of texts, to find those that stand in a text."""

    def __init__(self, parts: Sequence[str]) -> None:
        self._parts = parts
        made = [pieces(part) for part in parts]
        counts = Counter(piece for found in made for piece in found)
        self._at: dict[str, set[int]] = defaultdict(set)
        for at, found in enumerate(made):
            for piece in _rarest(found, len(found), counts.__getitem__):
                self._at[piece].add(at)

    def standing_in(self, text: str) -> Iterator[int]:
        """The numbers of the parts that stand in a text, in their order."""
        return (at for at in _found(self._at, pieces(text)) if stands_in(text, self._parts[at]))


class Questions:
    """The questions of many rows, to find those that ask as a row does."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._words = [reword.compared_words(row.question) for row in rows]
        self._counts = Counter(word for words in self._words for word in words)
        self._at: dict[str, set[int]] = defaultdict(set)
        for at, words in enumerate(self._words):
            for word in self._rare(words):
                self._at[word].add(at)

    def alike(self, row: Row) -> Iterator[int]:
        """The numbers of the rows that ask as this one does, in their order (`reword.ask_alike`)."""
        words = reword.compared_words(row.question)
        for at in _found(self._at, self._rare(words)):
            others = self._words[at]
            if len(words & others) >= reword.ALIKE * len(words | others) and reword.ask_alike(row, self._rows[at]):
                yield at

    def remove(self, at: int) -> None:
        """A row is no longer to be found."""
        for word in self._rare(self._words[at]):
            self._at[word].discard(at)

    def _rare(self, words: Collection[str]) -> list[str]:
        """The words of a question of which any that is alike has one among its own."""
        # Equally frequent words need an order, too: it is the same for both questions.
        return _rarest(words, math.ceil(reword.ALIKE * len(words)), lambda word: (self._counts[word], word))


def _rarest(things: Collection[Thing], least: int, rank: Callable[[Thing], Any]) -> list[Thing]:
    """So many of some things that whatever has at least `least` of them all has one of these."""
    return sorted(things, key=rank)[: len(things) - least + 1] if things else []


def _found(at: Mapping[Key, Iterable[int]], keys: Iterable[Key]) -> list[int]:
    return sorted({number for key in keys for number in at.get(key, ())})
