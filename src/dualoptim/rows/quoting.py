"""Sentences that quote texts of rows: each knows how a private run says it, so that nothing else in it is replaced."""

from __future__ import annotations

from collections.abc import Callable

PRIVATE = "[private]"


class Quoting(str):
    """A text of a row, or a sentence that quotes some; `private` is what a private run says in its place.

    >>> name = Quoting("Bo")
    >>> said = Quoting.said(lambda shown: f"Bowls: 2 rows name {shown(name)}.")
    >>> said, said.private
    ('Bowls: 2 rows name Bo.', 'Bowls: 2 rows name [private].')
    """

    private = PRIVATE

    @classmethod
    def said(cls, say: Callable[[Callable[[str], str]], str]) -> Quoting:
        """A sentence of this package, in which nothing is private but what it shows and is itself a `Quoting`.

        Args:
            say: makes the sentence, given what shows a text in it.
        """
        said = cls(say(str))
        said.private = say(hidden)
        return said


def hidden(text: str) -> str:
    """What a private run says in place of a text, which is the text itself unless it quotes a row."""
    return text.private if isinstance(text, Quoting) else text
