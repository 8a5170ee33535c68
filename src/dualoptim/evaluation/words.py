"""The words of a text in any script.

ASCII text gives what rouge-score's own tokenizer gives, to the letter. Words of other scripts are runs of letters,
marks and digits; where a script has no blanks between words, each character with its marks is one.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

import regex

# Scripts that are written without blanks between words.
BLANKLESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
WORD = regex.compile(rf"(?V1)[{BLANKLESS}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{BLANKLESS}]]+")
ALONE = regex.compile(rf"[{BLANKLESS}]")


def normal(text: str) -> str:
    """A text in Unicode's composed form, in which equal texts have equal characters."""
    return unicodedata.normalize("NFC", text)


def words(text: str) -> list[str]:
    """The words of a text in their order.

    >>> words("Zoë drinks 茶, it is_good")
    ['Zoë', 'drinks', '茶', 'it', 'is', 'good']
    """
    return WORD.findall(normal(text))


class Stemmed:
    """The tokenizer that ROUGE is computed with: lower case, English words of more than three letters stemmed."""

    def tokenize(self, text: str) -> list[str]:
        return [stem(word) if len(word) > 3 and word.isascii() else word for word in words(text.lower())]


@cache
def stem(word: str) -> str:
    """An English word without its endings."""
    return str(_stemmer().stem(word))


@cache
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer  # which rouge-score needs, too

    return PorterStemmer()


def stands_in(text: str, part: str) -> bool:
    """Whether a part stands in a text as whole words, in any case."""
    part = normal(part)
    before = "" if ALONE.match(part[:1]) else r"(?<![\p{L}\p{M}\p{N}_])"
    after = "" if ALONE.match(part[-1:]) else r"(?![\p{L}\p{M}\p{N}_])"
    return bool(regex.search(before + regex.escape(part) + after, normal(text), regex.IGNORECASE))
