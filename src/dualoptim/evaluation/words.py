"""The words of a text in any script.

ASCII text gives exactly what rouge-score's own tokenizer gives. Words of other scripts are runs of letters, marks and
digits; in a script without spaces between words, each character with its marks is a word.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

import regex

# Scripts that are written without spaces between words, and the mark of long vowels, which belongs to no script.
BLANKLESS = (
    r"\p{Han}\p{Hiragana}\p{Katakana}ーｰ\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
    r"\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\p{Javanese}\p{Balinese}"
)
WORD = regex.compile(
    rf"(?V1)[[{BLANKLESS}]&&[\p{{L}}\p{{M}}\p{{N}}]]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{BLANKLESS}]]+"
)
ALONE = regex.compile(rf"[{BLANKLESS}]")
INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}")  # joiners, soft hyphens, direction marks


def normal(text: str) -> str:
    """A text in Unicode's composed form, so that equal texts have equal characters, without invisible characters."""
    return unicodedata.normalize("NFC", INVISIBLE.sub("", text))


def folded(text: str) -> str:
    """A text with differences of case removed, also for ß and ligatures.

    >>> folded("STRASSE") == folded("Straße")
    True
    """
    return normal(normal(text).casefold())


def words(text: str) -> list[str]:
    """The words of a text in their order.

    >>> words("Zoë drinks 茶, it is_good")
    ['Zoë', 'drinks', '茶', 'it', 'is', 'good']
    """
    return WORD.findall(normal(text))


class Stemmed:
    """The tokenizer that ROUGE is computed with: lower case, English words of more than three letters stemmed."""

    def tokenize(self, text: str) -> list[str]:
        return [stem(word) if len(word) > 3 and word.isascii() else word for word in words(folded(text))]


class Plain:
    """Words in lower case as they are, for benchmarks whose ROUGE does not stem."""

    def tokenize(self, text: str) -> list[str]:
        return words(folded(text))


@cache
def stem(word: str) -> str:
    """An English word without its endings."""
    return str(_stemmer().stem(word))


@cache
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer  # which rouge-score needs, too

    return PorterStemmer()


def stands_in(text: str, part: str) -> bool:
    """Whether a text contains a part as whole words, in upper or lower case."""
    part = folded(part).strip()
    inside = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--[{BLANKLESS}]]"  # a word's character, in scripts with spaces
    before = "" if ALONE.match(part[:1]) else rf"(?<!{inside})"
    after = r"(?!\p{M})" if ALONE.match(part[-1:]) else rf"(?!{inside})"
    found = regex.search("(?V1)" + before + regex.escape(part) + after, folded(text))
    return bool(part and found)
