"""Numbers, times and dates in one way of writing, so that a reply may write them in another."""

from __future__ import annotations

import itertools
import unicodedata
from datetime import date
from functools import lru_cache
from typing import Any

import regex

# English, German, Dutch, French, Spanish, Italian, Portuguese and Russian.
_NAMES = """
january february march april may june july august september october november december
jan feb mar apr may jun jul aug sep oct nov dec
jan feb mar apr may jun jul aug sept oct nov dec
januar februar märz april mai juni juli august september oktober november dezember
januari februari maart april mei juni juli augustus september oktober november december
janvier février mars avril mai juin juillet août septembre octobre novembre décembre
enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre
gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre
janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro
января февраля марта апреля мая июня июля августа сентября октября ноября декабря
"""
MONTHS = {name: number for line in _NAMES.split("\n") for number, name in enumerate(line.split(), 1)}
_MONTH = "|".join(sorted(MONTHS, key=len, reverse=True))
_DATES = tuple(
    regex.compile(pattern, regex.IGNORECASE)
    for pattern in (
        r"(?<![\d.,/-])(?P<y>\d{4})(?P<s>[-/.])(?P<m>\d{1,2})(?P=s)(?P<d>\d{1,2})(?![\d/-]|[.,]\d)",
        r"(?<![\d.,/-])(?P<d>\d{1,2})\.\s?(?P<m>\d{1,2})\.\s?(?P<y>\d{4})(?![\d/-]|[.,]\d)",
        r"(?<!\d)(?P<y>\d{4})\s?[年년]\s?(?P<m>\d{1,2})\s?[月월]\s?(?P<d>\d{1,2})\s?[日号號일]",
        # Where both could be the month, it is not clear which one is.
        r"(?<![\d.,/-])(?P<d>1[3-9]|2\d|3[01])(?P<s>[-/])(?P<m>\d{1,2})(?P=s)(?P<y>\d{4})(?![\d/-]|[.,]\d)",
        r"(?<![\d.,/-])(?P<m>\d{1,2})(?P<s>[-/])(?P<d>1[3-9]|2\d|3[01])(?P=s)(?P<y>\d{4})(?![\d/-]|[.,]\d)",
        rf"\b(?P<d>\d{{1,2}})(?:st|nd|rd|th|\.|er)?\s(?:(?:of|de)\s)?(?P<m>{_MONTH})\b\.?,?\s(?:de\s)?(?P<y>\d{{4}})(?!\d)",
        rf"\b(?P<m>{_MONTH})\b\.?\s(?:the\s)?(?P<d>\d{{1,2}})(?:st|nd|rd|th)?,?\s(?P<y>\d{{4}})(?!\d)",
    )
)
_HALF = regex.compile(r"(?<=\d\s?)([ap])\.\s?m\b\.?")
_FULL_HOUR = regex.compile(r"(?<![\d.:])(\d{1,2}):00(?=\s?[ap]m\b)")
_TIME = regex.compile(
    r"(?<![\d.:])([01]?\d|2[0-4])(?:[.:](?=[0-5]\d\s?(?:uhr|h|[ap]m)\b)|\s?h\s?(?=[0-5]\d\b))([0-5]\d)(?!\d)"
)
# Groups of three digits; a number that begins with 0 has no groups but decimals.
_GROUPS = regex.compile(
    r"(?<![\w.,:/])([1-9]\d{0,2})(?P<s>[ \u00a0\u2009\u202f.,'\u2019])(\d{3}(?:(?P=s)\d{3})*)(?!\d|(?P=s)\d)"
)
_DECIMALS = regex.compile(r"(?<![\w.,:/])(\d+),(\d+)(?![\d]|[.,:/]\d)")
_NOUGHTS = regex.compile(r"(?<![\w.,:/])(\d+)\.0+(?!\d|\.\d)")
_ORDINAL = regex.compile(r"(?<=\d)(?:st|nd|rd|th)\b")
# One letter more often belongs to a name, such as 4b.
_UNIT = regex.compile(r"(?<![\w-])(\d[\d.,:]*)([^\W\d_]{2,})(?![\w-])")
BETWEEN = r"[\s()\u2010\u2011-]"  # the parts of a telephone number or an identifier
LONG = 6  # digits from which on these parts may be cut anywhere


def digits(text: str) -> str:
    """A text with the digits and number signs of any script as ASCII has them.

    >>> digits("١٩٩٠"), digits("٣٫١٤")
    ('1990', '3.14')
    """
    if text.isascii():
        return text
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else {"٫": ".", "٬": ","}.get(c, c) for c in text)


def numbered(text: str) -> str:
    """A text in lower case with its numbers and times in one way of writing, and a blank before a unit.

    A single point or comma before three digits may be of decimals or of groups: it is taken for groups.

    >>> numbered("85.000 euro"), numbered("85 000,50"), numbered("um 17.30 uhr"), numbered("5pm"), numbered("3,14")
    ('85000 euro', '85000.50', 'um 17:30 uhr', '5 pm', '3.14')
    """
    text = digits(text)
    if not any(c.isdigit() for c in text):
        return text
    text = _FULL_HOUR.sub(r"\1", _TIME.sub(r"\1:\2", _HALF.sub(r"\1m", text)))
    text = _GROUPS.sub(lambda found: found[1] + regex.sub(r"\D", "", found[3]), text)
    text = _NOUGHTS.sub(r"\1", _DECIMALS.sub(r"\1.\2", text))
    return str(_UNIT.sub(r"\1 \2", _ORDINAL.sub("", text)))


def without_dates(text: str) -> tuple[str, frozenset[date]]:
    """A text without its full dates, and these.

    >>> without_dates("It was on March 3, 2020")
    ('It was on  ', frozenset({datetime.date(2020, 3, 3)}))
    """
    found: set[date] = set()

    def taken(match: Any) -> str:
        month = match["m"].casefold()
        number = int(month) if month.isdigit() else MONTHS[month]
        try:
            found.add(date(int(match["y"]), number, int(match["d"])))
        except ValueError:  # there is no such day
            return str(match[0])
        return " "

    text = digits(text)
    for pattern in _DATES:
        text = pattern.sub(taken, text)
    return text, frozenset(found)


@lru_cache(maxsize=10_000)
def written(number: str) -> Any:
    """The pattern of a number or a name with a number, such as A-17 and 555-0134, with other hyphens and blanks.

    >>> bool(written("a-17").search("room a17")), bool(written("555-0134").search("(555) 0134"))
    (True, True)
    >>> bool(written("2-1").search("21")), bool(written("a-17").search("b-17"))
    (False, False)
    """
    pieces = regex.findall(r"\d+|[^\W\d_]+", number)
    if sum(len(piece) for piece in pieces if piece.isdigit()) >= LONG:
        pieces = regex.findall(r"\d|[^\W\d_]+", number)
        least = 0
    else:
        least = 1
    pattern = regex.escape(pieces[0])
    for before, piece in itertools.pairwise(pieces):
        count = least if before.isdigit() and piece.isdigit() else 0
        pattern += rf"{BETWEEN}{{{count},2}}{regex.escape(piece)}"
    return regex.compile(rf"(?<!\w|\d[.,])(?:{pattern})(?!\w|[.,]\d)")
