"""Numbers, times and dates in one way of writing, so that a reply may write them in another."""

from __future__ import annotations

import itertools
import unicodedata
from calendar import monthrange
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
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
        r"(?<![\d.,/-])(?P<m>\d{1,2})(?P<s>[-/])(?P<d>\d{1,2})(?P=s)(?P<y>\d{4})(?P<both>)(?![\d/-]|[.,]\d)",
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
# 3.10 is not 3.1 where it is a version.
_NOUGHTS = regex.compile(r"(?<![\w.,:/])(?:(?P<n>\d+)\.0+|(?P<n>0\.\d*[1-9])0+)(?!\d|\.\d)")
_ORDINAL = regex.compile(r"(?<=\d)(?:st|nd|rd|th)\b")
# One letter more often belongs to a name, such as 4b.
_UNIT = regex.compile(r"(?<!\w|\w-)(\d[\d.,:]*)([^\W\d_]{2,})(?![\w-])")
_LETTER = regex.compile(r"(?<!\w|\w-)(\d+(?:\.\d+)?)(\s?)(\p{Ll})(?![\w-])")
# Not the hyphen of a range or a name, nor a dash with a blank after it.
_MINUS = regex.compile(r"(?<![\w).,%°])(?<!\d\s)(?:[-\u2212]|minus\s)(?=\d)")
_SPELLED = regex.compile(r"(?<![\w.,:/-])\d(?P<s>[ -])\d(?:(?P=s)\d){2,}(?![\w/-]|[.,:]\d)")
_SCALED = regex.compile(r"(?<![\w.,:/])(\d+(?:\.\d+)?)\s(thousand|million)\b")
BETWEEN = r"[\s()\u2010\u2011-]"  # the parts of a telephone number or an identifier
LONG = 6  # digits from which on these parts may be cut anywhere


_SMALL = regex.findall(
    r"\w+",
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen
    """,
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = {"thousand": 1_000, "million": 1_000_000}
_VALUES = {word: n for n, word in enumerate(_SMALL)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}


def _number_words() -> Any:
    """The pattern of a whole number below a thousand million in English words."""
    on, small, tens, units = r"(?:-|\s+)", "|".join(_SMALL), "|".join(_TENS), "|".join(_SMALL[1:10])
    below_100 = rf"(?:(?:{tens})(?:{on}(?:{units})\b)?|(?:{small}))\b"
    hundreds = rf"(?:{small}|a){on}hundred\b"
    joined = rf"(?:,(?=\s+{hundreds}))?(?:{on}and)?{on}"
    scaled = rf"(?!{on}(?:hundred|thousand|million)\b)"  # "one hundred and two hundred" are two numbers
    below_1000 = rf"(?:{hundreds}(?:{on}(?:and{on})?{below_100}(?!{on}hundred\b))?|{below_100})"
    last = f"(?:{joined}{below_1000}{scaled})?"
    thousands = rf"(?:{below_1000}|a){on}thousand\b"
    millions = rf"(?:{below_1000}|a){on}million\b(?:{joined}{thousands})?{last}"
    # "twenty-first" is another number.
    return regex.compile(rf"(?<!\w)(?:{millions}|{thousands}{last}|{below_1000})(?!\w|-(?:first|second|third|\w+th)\b)")


_IN_WORDS = _number_words()
_UNITS = "|".join(_SMALL[:10])
_ONE_OF_MANY = regex.compile(rf"(?<=\b(?:{_UNITS})[ -])one|one(?=[ -](?:{_UNITS})\b)")  # digit by digit
# "One" mostly counts nothing ("no one", "one of them"): it does after some words, or with at most a noun beside it.
_ONE = regex.compile(
    r"(?:(?<=\b(?:only|just|exactly|is|was|are|were|has|have|had|with|number)\s)one"
    r"(?!\s(?:of|who|that|i|we|you|he|she|they|can|for|to|more|another|such|way|thing|day|question|topic)\b)"
    r"|(?<=^\W*)one(?=(?:\s(?!moment|second|day|thing)\w+)?\W*$))(?![\w'’-])"
)


def counts_one(text: str) -> bool:
    """Whether a text in lower case has "one" as a number. As it may be another's name, `numbered` leaves it.

    >>> counts_one("she has one brother."), counts_one("no one knows"), counts_one("she is one of them")
    (True, False, False)
    """
    return bool(_ONE.search(text))


def _in_digits(text: str) -> str:
    """A text in lower case with its numbers in English words as digits.

    >>> _in_digits("twenty-five or two hundred and five thousand"), _in_digits("one of them, not four one")
    ('25 or 205000', 'one of them, not 4 1')
    """

    def value(match: Any) -> str:
        if match[0] == "one":
            return "1" if _ONE_OF_MANY.match(text, match.start()) else "one"
        total = part = 0
        for word in regex.findall("[a-z]+", match[0]):
            if word in _SCALES:
                total, part = total + max(part, 1) * _SCALES[word], 0
            else:
                part = max(part, 1) * 100 if word == "hundred" else part + _VALUES.get(word, 0)
        return str(total + part)

    return str(_IN_WORDS.sub(value, text))


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

    A single point or comma before three digits may be of decimals or of groups: it is taken for groups. A minus becomes
    a part of its number's word.

    >>> numbered("85.000 euro"), numbered("85 000,50"), numbered("um 17.30 uhr"), numbered("5pm"), numbered("3,14")
    ('85000 euro', '85000.50', 'um 17:30 uhr', '5 pm', '3.14')
    >>> numbered("twenty-five"), numbered("-5 °c"), numbered("0.50"), numbered("4-2-7-1"), numbered("1.5 million")
    ('25', 'minus5 °c', '0.5', '4271', '1500000')
    """
    text = _in_digits(digits(text))
    if not any(c.isdigit() for c in text):
        return text
    text = _FULL_HOUR.sub(r"\1", _TIME.sub(r"\1:\2", _HALF.sub(r"\1m", text)))
    text = _GROUPS.sub(lambda found: found[1] + regex.sub(r"\D", "", found[3]), text)
    text = _NOUGHTS.sub(r"\g<n>", _DECIMALS.sub(r"\1.\2", text))
    text = _SCALED.sub(lambda found: f"{(Decimal(found[1]) * _SCALES[found[2]]).normalize():f}", text)
    text = _SPELLED.sub(lambda found: regex.sub(r"\D", "", found[0]), text)
    return str(_MINUS.sub("minus", _UNIT.sub(r"\1 \2", _ORDINAL.sub("", text))))


def with_letters(text: str) -> Iterator[tuple[str, str, bool]]:
    """The numbers of a `numbered` text with one letter after them, which may be a unit, and whether a blank is between.

    >>> list(with_letters("10g or 1.80 m"))
    [('10', 'g', False), ('1.80', 'm', True)]
    """
    return ((found[1], found[3], bool(found[2])) for found in _LETTER.finditer(text))


# The readings of a date: two where either number may be the month, as in 3/5/1990, the first with the month first.
Readings = tuple[date, ...]


def same_date(one: Readings, other: Readings) -> bool:
    """Whether two dates are the same: where only one of them is clear, in either reading of the other."""
    return one == other or (len(one) != len(other) and not set(one).isdisjoint(other))


def without_dates(text: str) -> tuple[str, frozenset[Readings]]:
    """A text without its full dates, and these.

    >>> without_dates("It was on March 3, 2020")
    ('It was on  ', frozenset({(datetime.date(2020, 3, 3),)}))
    """
    found: set[Readings] = set()

    def taken(match: Any) -> str:
        year, day, month = int(match["y"]), int(match["d"]), match["m"].casefold()
        number = int(month) if month.isdigit() else MONTHS[month]
        ways = [(number, day), (day, number)] if "both" in match.groupdict() else [(number, day)]
        readings = tuple(dict.fromkeys(date(year, *way) for way in ways if _is_day(year, *way)))
        if not readings:
            return str(match[0])
        found.add(readings)
        return " "

    text = digits(text)
    for pattern in _DATES:
        text = pattern.sub(taken, text)
    return text, frozenset(found)


def _is_day(year: int, month: int, day: int) -> bool:
    return year > 0 and 1 <= month <= 12 and 1 <= day <= monthrange(year, month)[1]


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
