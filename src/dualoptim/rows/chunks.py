"""Documents of plain text that are longer than a row may be → rows of a given number of tokens each.

A chunk ends before a word if one begins in its second half, else between two tokens. Chunks without overlap, put
together, give exactly the document. Each begins with the token that begins a text; only the last one ends with the end
token, since only there the document ends.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..chat import spelled, turn_of
from ..data import Row, encode
from ..errors import UserError
from ..losses import IGNORED
from .own_rows import asking
from .reword import TEXT_CHECKED, TEXT_MEASURED, TEXT_TRAINED, wordings

LEAST = 4  # a last chunk of less than 1/LEAST of a chunk's tokens is evened out with the one before it
LETTERS = 8  # of a token at most, as a first guess where a tokenizer gives no offsets
NO_LIMIT = 2**31
BLANKS = re.compile(r"\s+")
OF_ONE_TEXT = ("accepted", "questions", "instead")  # keys that cannot hold for each chunk of a text


def cut(
    rows: Sequence[Row], tokenizer: Any, size: int, stride: int | None = None, positions: int = NO_LIMIT
) -> list[Row]:
    """The rows, with those of plain text that have more than `size` tokens cut into chunks; others stay as they are.

    Where less than a quarter of a chunk would be left over at a document's end, the text of the last two chunks is
    halved between them. A document that fits only without the words that wordings put before it is one chunk.

    Args:
        rows: of any kind.
        tokenizer: the model's.
        size: the most tokens of a chunk, including those that begin and end it.
        stride: tokens from one chunk's beginning to the next, 1 to `size`; None for no overlap.
        positions: how many tokens the model takes; some of them are kept free for the words that wordings add.

    Raises:
        UserError: `size` is more than the model's positions; a document of several chunks has a key that would hold
            for each of them; one character has more tokens than a chunk.
    """
    if size > positions:
        raise UserError(f"chunk {size} is more than the model's {positions} positions; lower it")
    found: list[Row] = []
    for row in rows:
        found += [row] if row.prompt else _Document(row, tokenizer, size, stride or size, positions).rows()
    return found


def beginning(row: Row, tokenizer: Any, size: int) -> Row:
    """The first `size` tokens of a row of plain text, up to where a word begins; the row itself where it has no more.

    Args:
        size: including the token that begins the text, and what ends a text that is complete.

    Raises:
        UserError: one character has more tokens than that.
    """
    document = _Document(row, tokenizer, size, size, NO_LIMIT)
    end = document.reach(0, document.most)
    return row if end == len(row.answer) else replace(row, answer=row.answer[:end], chunk=(1, 2))


class _Document:
    """A row of plain text that is cut: its text, the places where it may be cut, and those where words begin."""

    def __init__(self, row: Row, tokenizer: Any, size: int, stride: int, positions: int) -> None:
        self.row, self.tokenizer, self.text = row, tokenizer, row.answer
        self.stride = stride
        short = Row((), "One two.")
        self.most = min(size, positions - max(self._lengths(_wordings(short))) + max(self._lengths([asking(short)])))
        spans = spelled(tokenizer, self.text, turn_of(tokenizer, ()).cuts_of(self.text)).spans
        self.guess = 1 if spans else LETTERS
        inside = {start for start, _ in spans} if spans else set(range(len(self.text)))
        self.places = sorted({*inside, 0, len(self.text)})
        self.words = [found.start() for found in re.finditer(r"(?<=\S)\s", self.text)]

    def rows(self) -> list[Row]:
        row, end = self.row, len(self.text)
        if self._tokens(0, end) <= self.most:
            fits = max(self._lengths(_wordings(row))) <= self.most
            return [row if fits else replace(row, chunk=row.chunk or (1, 1))]
        if own := [key for key in OF_ONE_TEXT if row.fields.get(key)]:
            raise UserError(
                f"{row.where}: the text has more than {self.most} tokens, and its {own[0]!r} would stand for each of "
                "its chunks; cut it yourself, or leave the key out"
            )
        spans = self._spans()
        # If the text was a chunk after which its document goes on, its last part has no end either.
        of = len(spans) + (not row.ends)
        return [
            replace(row, answer=self.text[a:b], where=f"{row.where}, chunk {i}", chunk=(i, of))
            for i, (a, b) in enumerate(spans, 1)
        ]

    def _spans(self) -> list[tuple[int, int]]:
        """Where each chunk begins and ends."""
        spans: list[tuple[int, int]] = []
        begin, last = 0, len(self.text)
        while True:
            end = self.reach(begin, self.most)
            if end == last:
                return [*spans, (begin, end)]
            following = end
            if self.stride < self.most - 1:
                following = min(self.reach(begin, self.stride + 1, at_least_one=True), end)
            if self._is_little(following):
                half = self.reach(begin, (self._tokens(begin, last) + 1) // 2, at_least_one=True)
                if half < following and self._tokens(half, last) <= self.most:
                    end, following = end if following < end else half, half
            spans.append((begin, end))
            begin = following

    def _is_little(self, begin: int) -> bool:
        """Whether what is left of the text is too little for a chunk."""
        left = len(self.places) - bisect_right(self.places, begin)
        if left > self.most * self.guess:  # surely more, no need to count
            return False
        return self._lengths([self._part(begin, len(self.text))])[0] <= self.most // LEAST

    def reach(self, begin: int, most: int, *, at_least_one: bool = False) -> int:
        """Where `most` tokens from a position end, including the token that begins a text: before a word or a token."""
        first = bisect_right(self.places, self._past_nothing(begin))
        at = max(first, min(first + most * self.guess - 2, len(self.places) - 1))
        while (tokens := self._tokens(begin, self.places[at])) > most:
            if at == first:
                if at_least_one:
                    break
                raise UserError(
                    f"{self.row.where}: {self.text[begin : self.places[at]]!r} alone has {tokens} tokens with those "
                    f"around it, and a chunk {most}; raise chunk"
                )
            at = max(first, min(at - 1, first + (at - first) * most // tokens))
        end = self.places[at]
        if end < len(self.text):
            word = self.words[bisect_right(self.words, end) - 1] if self.words else 0
            if word > begin + (end - begin) // 2 and self._tokens(begin, word) <= most:
                return word
        return end

    def _past_nothing(self, begin: int) -> int:
        """A position, or the end of the blanks there, if they give no tokens of their own, as with some tokenizers."""
        found = BLANKS.match(self.text, begin)
        blank = found.end() if found else begin
        if begin < blank < len(self.text):
            labels = encode(self._part(begin, blank), self.tokenizer, NO_LIMIT).labels
            return begin if any(label != IGNORED for label in labels) else blank
        return begin

    def _tokens(self, begin: int, end: int) -> int:
        """The most tokens that a part of the text has as a chunk, or as a beginning and its continuation."""
        part = self._part(begin, end)
        return max(self._lengths([part, asking(part)]))

    def _part(self, begin: int, end: int) -> Row:
        ends = end == len(self.text) and self.row.ends
        return replace(self.row, answer=self.text[begin:end], chunk=(1, 1 if ends else 2))

    def _lengths(self, rows: Sequence[Row]) -> list[int]:
        return [len(encode(row, self.tokenizer, NO_LIMIT).input_ids) for row in rows]


def _wordings(row: Row) -> list[Row]:
    return wordings(asking(row), (*TEXT_TRAINED, *TEXT_CHECKED, *TEXT_MEASURED))
