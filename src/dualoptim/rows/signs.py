"""The signs beside a text's words and numbers: of currencies, percent and degrees; < and >; +, - and # after a word."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from functools import lru_cache

import regex

from ..evaluation.numbers_written import numbered
from ..evaluation.words import HYPHENS, WHOLE, folded

Signs = frozenset[tuple[str, str]]  # of one place of a word: kinds and signs
_BEFORE = regex.compile(r"(?P<order>[<>≤≥])?\s?(?P<unit>(?<!\d)\p{Sc}\s?)?\Z")
# Not the hyphen of "two- and three-year".
_AFTER = regex.compile(
    r"(?P<end>(?:\++|#|-(?!\s(?:and|or|to|und|oder|bis|et|ou|y|o)\b))(?![\w+]))?"
    r"\s?(?P<unit>\p{Sc}(?!\d)|[%‰°])?"
)
GRADE = 2  # characters of the longest word after which a hyphen is a minus, as in AB- and Cl-
_DIGIT = regex.compile(r"\d")
# How a reply may say a sign.
_IN_WORDS = tuple(
    (regex.compile(pattern), sign)
    for pattern, sign in (
        (r"(?<=\d)[\s-]?(?:euros?|eur)\b|\beur(?=\s?\d)", "€"),
        (r"(?<=\d)[\s-]?(?:(?:us[\s-]?)?dollars?|usd)\b|\busd(?=\s?\d)", "$"),
        (r"(?<=\d)[\s-]?(?:pounds?|gbp)\b|\bgbp(?=\s?\d)", "£"),
        (r"(?<=\d)[\s-]?(?:(?:yen|yuan|jpy|cny|rmb)\b|[円元])|\b(?:jpy|cny|rmb)(?=\s?\d)", "¥"),
        (r"(?<=\d)[\s-]?(?:per\s?cent|pct|prozent|pour\s?cent|por\s?ciento|procent)\b", "%"),
        (r"(?<=\d)[\s-]?(?:degrees?|celsius|fahrenheit|grad|degrés?|grad[oi]s?)\b", "°"),
        (r"\b(?:(?:more|greater|larger|higher)\sthan|over|above)(?=\s\p{Sc}?\d)", ">"),
        (r"\b(?:(?:less|fewer|smaller|lower)\sthan|under|below)(?=\s\p{Sc}?\d)", "<"),
        (r">=|\bat\sleast(?=\s\p{Sc}?\d)", "≥"),
        (r"<=|\b(?:at\smost|up\sto)(?=\s\p{Sc}?\d)", "≤"),
        (r"(?<=\w)\splus\splus\b", "++"),
        (r"(?<=\w)[\s-](?:rh[\s-]?)?(?:plus\b|positiv\w*)", "+"),
        (r"(?<=\w)[\s-](?:rh[\s-]?)?(?:minus\b|negativ\w*)", "-"),
        (r"(?<=\b\p{L})[\s-]sharp\b", "#"),
    )
)


def others(answer: str, reply: str, *, whole: bool = False) -> frozenset[str]:
    """The words and numbers of an answer, in lower case, that a reply has, but nowhere with the answer's signs.

    A reply may write a sign before or after its number, or say it in English words.

    Args:
        answer: and the reply: any texts.
        whole: a reply must have all signs; otherwise those of a number may be left out, though not be others.

    >>> sorted(others("£5 or C++", "$5 or C#")), sorted(others("5 € for an A-", "5 euros for an A minus"))
    (['5', 'c'], [])
    >>> sorted(others("5%", "It is 5.")), sorted(others("5%", "It is 5.", whole=True))
    ([], ['5'])
    """
    wanted = {word: signs for word, places in _signs(answer).items() if (signs := list(filter(None, places)))}
    if not wanted:
        return frozenset()
    given = _signs(reply, in_words=True)
    return frozenset(
        word
        for word, places in wanted.items()
        if word in given and not all(any(_agree(each, found, whole, word) for found in given[word]) for each in places)
    )


def _agree(wanted: Signs, found: Signs, whole: bool, word: str) -> bool:
    kinds = {kind for kind, _ in found}
    may_lack = not whole and _DIGIT.search(word)
    return all(each in found or (may_lack and each[0] not in kinds) for each in wanted)


@lru_cache(maxsize=10_000)
def _signs(text: str, *, in_words: bool = False) -> Mapping[str, list[Signs]]:
    """For each word and number of a text, the signs of each place where it stands."""
    plain = HYPHENS.sub("-", unicodedata.normalize("NFKC", numbered(folded(text))))
    for pattern, sign in _IN_WORDS if in_words else ():
        plain = pattern.sub(sign, plain)
    found: dict[str, list[Signs]] = {}
    for match in WHOLE.finditer(plain):
        word = str(match[0])
        signs: set[tuple[str, str]] = set()
        for around in (
            _BEFORE.search(plain[max(0, match.start() - 5) : match.start()]),
            _AFTER.match(plain, match.end()),
        ):
            signs |= {(kind, sign.strip()) for kind, sign in (around.groupdict() if around else {}).items() if sign}
        if len(word) > GRADE:
            signs.discard(("end", "-"))
        number = bool(_DIGIT.search(word))  # what a currency or a percent is of
        found.setdefault(word, []).append(frozenset(each for each in signs if number or each[0] != "unit"))
    return found
