"""The words of a text in any script.

ASCII text gives exactly what rouge-score's own tokenizer gives. Words of other scripts are runs of letters, marks and
digits; in a script without spaces between words, each character with its marks is a word.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache, lru_cache
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
SEPARATORS = ".,٫٬"  # of decimals and thousands; the last two are Arabic
# What goes on with a number: its decimals, or the rest of a time, a date, a version or a name such as A-17. A dash
# between two numbers is a range instead.
_ON = rf"(?:(?<=\d)[{SEPARATORS}:/](?=\d)|[-\u2010\u2011](?=\d))"
_RUN = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--[[{BLANKLESS}]--\d]]+"
# Also with underscores, as in names of files and variables: each is found whole by `places`.
WHOLE = regex.compile(rf"(?V1){_RUN}(?:{_ON}{_RUN})*|[[{BLANKLESS}]&&[\p{{L}}\p{{M}}\p{{N}}]]\p{{M}}*")
ALONE, LAST_ALONE = regex.compile(rf"[{BLANKLESS}]"), regex.compile(rf"[{BLANKLESS}]\p{{M}}*\Z")
INTEGER = regex.compile(rf"(?<![\d{SEPARATORS}])\d+\Z")  # at the end of a text
# Joiners, soft hyphens, direction marks; vowel marks and lengthening of Arabic, and points of Hebrew, mostly left out.
INVISIBLE = regex.compile(
    r"[\p{Default_Ignorable_Code_Point}\u064b-\u0652\u0670\u0640\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7]"
)
# What a mark does not end: titles, initials, numbers of a list's items; elsewhere than at the end also abbreviations.
_NO_END = regex.compile(
    r"(?<![\p{L}\p{N}.])(?:\p{L}|Mr|Mrs|Ms|Mx|Dr|Drs|Prof|Rev|Fr|St|Ste|Mt|Ft|Gen|Col|Maj|Capt|Lt|Sgt|Gov|Sen|Rep"
    r"|Pres|Hon|vs|cf|ca|approx|Mme|Mlle|Hr|Nr|bzw)\.$|(?:^|\n)\s*\d{1,2}\.$"
)
_ABBREVIATED = regex.compile(
    r"(?<![\p{L}\p{N}])(?:(?:\p{L}\.)+\p{L}|Jr|Sr|Inc|Ltd|Co|Corp|Bros|etc|al|Ave|Blvd|Rd|Jan|Feb|Aug|Sept?|Oct|Nov|Dec"
    r"|[Vv]ol|[Ff]ig|pp|ed|est|[Dd]ept|Ph\.D)\.$"
)


def normal(text: str) -> str:
    """A text in Unicode's composed form, so that equal texts have equal characters, without invisible characters and
    the vowel marks of Arabic and Hebrew."""
    return (
        text if text.isascii() else unicodedata.normalize("NFC", INVISIBLE.sub("", unicodedata.normalize("NFC", text)))
    )


def folded(text: str) -> str:
    """A text with differences of case removed, also for ß, İ and ligatures.

    >>> folded("STRASSE") == folded("Straße"), folded("İzmir")
    (True, 'izmir')
    """
    # Without the dot of a Turkish İ, which would be left over.
    return normal(normal(text).casefold().replace("i\u0307", "i"))


def words(text: str) -> list[str]:
    """The words of a text in their order.

    >>> words("Zoë drinks 茶, it is_good")
    ['Zoë', 'drinks', '茶', 'it', 'is', 'good']
    """
    return WORD.findall(normal(text))


def whole_words(text: str) -> list[str]:
    """The words of a text in their order, with numbers, dates and names of files in one piece.

    Of contractions, nouns alone: see `stands_in`.

    >>> whole_words("On 12.05.1990, A-17 cost 85,000 or so; see file_name")
    ['On', '12.05.1990', 'A-17', 'cost', '85,000', 'or', 'so', 'see', 'file_name']
    >>> whole_words("I'm Ana's; don't drink l'eau, O'Brien")
    ['Ana', 'drink', 'eau', 'Brien']
    """
    text = normal(text)
    plain = APOSTROPHES.sub("'", text)
    if "'" not in plain:
        return WHOLE.findall(text)
    return [match[0] for match in WHOLE.finditer(text) if not _contracted(plain, *match.span())]


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


SPACES, APOSTROPHES, QUOTES, HYPHENS = (
    regex.compile(pattern)
    for pattern in (
        r"\s+",
        "[\u2018-\u201b\u02bb\u02bc\u2032\u2039\u203a\uff07`´]",
        r"(?V1)[\p{Quotation_Mark}\u2033--']",
        r"[\p{Pd}\u2212]",
    )
)
# What remains of a word in a contraction; in "Ana's" and "l'eau", names and nouns remain words.
_FIRST = regex.compile(r"(?:\p{Latin}|re|ve|ll)(?![\p{L}\p{M}\p{N}_])", regex.IGNORECASE)  # after an apostrophe
_NOT = regex.compile(r"'t(?![\p{L}\p{M}\p{N}_])", regex.IGNORECASE)
_GOES_ON = regex.compile(r"'(?=\p{L})(?!s(?![\p{L}\p{M}\p{N}_]))", regex.IGNORECASE)  # "A's" are of A
# Latin letters of full width, as in Chinese and Japanese texts, and digits of any script.
WIDE = regex.compile(r"(?V1)[[\uff21-\uff3a\uff41-\uff5a]||[\p{Nd}--0-9]]")
# A run of letters of a script that attaches nothing to a word, or any other character.
_PIECE = regex.compile(r"(?V1s)[[[\p{Latin}\p{Cyrillic}\p{Greek}]&&[\p{L}\p{N}]]||[0-9_]]+|.")
# What is written without a blank before a word: "and", "in", "to", "the".
ARABIC_PREFIX = r"(?:[وف]?(?:[بكل]?(?:ال)?|لل))"
HEBREW_PREFIX = r"[ומשהכלב]{0,3}"


def ends_sentence(text: str, end: int) -> bool:
    """Whether the mark before position `end` ends a sentence, and not an abbreviation or a list item's number."""
    return not (_NO_END.search(text, endpos=end) or (end < len(text) and _ABBREVIATED.search(text, endpos=end)))


def stands_in(text: str, part: str) -> bool:
    """Whether a text contains a part as whole words and whole numbers.

    Upper and lower case are the same, and so are all kinds and lengths of space, all apostrophes and single quotation
    marks, all double quotation marks, all hyphens, digits of all scripts, Latin letters of full width, composed and
    decomposed characters; blanks at the part's ends, invisible characters and the vowel marks of Arabic and Hebrew do
    not matter. Endings in Hangul, and prefixes in Arabic and Hebrew, may be attached to a word. A contraction has no
    words but its noun: "I'm" has no "m" and "don't" no "don", but "Ana's" has "Ana", and "l'eau" has "eau".

    >>> stands_in("It’s New\\nYork.", "new york"), stands_in("1,500 of them", "500"), stands_in("100.0 degrees", "100")
    (True, False, True)
    """
    return next(_found(text, part), None) is not None


def _found(text: str, part: str) -> Iterator[Any]:
    """The places of a part in a text in plain form."""
    if pattern := _pattern(part):
        plain = one_way(text)
        yield from (match for match in pattern.finditer(plain) if not _contracted(plain, *match.span()))


def _contracted(text: str, start: int, end: int) -> bool:
    """Whether a part of a text with plain apostrophes begins or ends inside a contraction, as "t" in "don't" does."""
    attached = text[start - 1 : start] == "'" and regex.match(r"\p{Latin}", text[start - 2 : start - 1])
    if attached and _FIRST.match(text, start):
        return True
    if text[end : end + 1] != "'" or not regex.match(r"\p{Latin}", text[end - 1 : end]):
        return False
    if text[end - 1] in "nN" and _NOT.match(text, end):
        return True
    alone = not regex.match(r"[\p{L}\p{M}\p{N}_]", text[max(start, end - 2) : end - 1])
    return alone and bool(_GOES_ON.match(text, end))


def places(text: str, part: str) -> list[tuple[int, int]]:
    """Where a part stands in a text, as `stands_in` finds it: start and end of each place.

    >>> places("Die Straße heißt Am Art.", "ART "), places("At a party.", "art")
    ([(20, 23)], [])
    """
    found = list(_found(text, part))
    starts, ends = _origins(text) if found else ([], [])
    return [(starts[each.start()], ends[each.end() - 1]) for each in found]


def replaced(text: str, part: str, by: str) -> str:
    """A text with another in place of a part that stands in it as whole words, its upper and lower case the same.

    >>> replaced("Bo met Bono, 李白的 and BO.", "Bo", "X"), replaced("Bo met Bono, 李白的 and BO.", "李白", "X")
    ('X met Bono, 李白的 and BO.', 'Bo met Bono, X的 and BO.')
    """
    part = part.strip()
    if part not in text:  # nearly always, and much faster to test than the pattern
        return text
    for start, end in reversed(places(text, part)):
        if normal(text[start:end]) == normal(part):
            text = text[:start] + by + text[end:]
    return text


def pieces(text: str) -> frozenset[str]:
    """What a text is made of: a part that stands in it, as `stands_in` finds it, has no pieces that the text lacks.

    So parts are looked up by their pieces, and only those that are found need `stands_in`.

    >>> pieces("New York") <= pieces("In New York City"), pieces("York") <= pieces("In Yorkshire")
    (True, False)
    """
    found = set(_PIECE.findall(one_way(text)))
    if "ل" in found:
        found.add("ا")  # of an article, which may lose it
    return frozenset(found - {" "})


@lru_cache(maxsize=10_000)
def _pattern(part: str) -> Any:
    """The pattern of a part as whole words and numbers in a text in plain form; None for nothing but blanks."""
    part = one_way(part).strip()
    inside = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--[{BLANKLESS}]]"  # a word's character, in scripts with spaces
    # A mark belongs to the word of the letter before it.
    outside = rf"(?<![[\p{{L}}\p{{N}}_]--[{BLANKLESS}]]\p{{M}}*)"
    before = "" if ALONE.match(part[:1]) else outside
    after = r"(?!\p{M})" if LAST_ALONE.search(part) else rf"(?!{inside})"
    body = regex.escape(part)
    # Single syllables and short words stand by chance at the end or beginning of others.
    if regex.search(r"\p{Hangul}{2}\Z|[\p{Latin}\d]\Z", part):
        after = rf"(?!{inside}(?<!\p{{Hangul}}))"
    if regex.match(r"\p{Arabic}{3}", part):
        before = f"(?<={outside}{ARABIC_PREFIX})"
        if part.startswith("ال"):  # after "to", the article loses its first letter
            before, body = "", f"(?:{before}ا|(?<={outside}[وف]?ل))ل{regex.escape(part[2:])}"
    elif regex.match(r"\p{Hebrew}{3}", part):
        before = f"(?<={outside}{HEBREW_PREFIX})"
    if part[:1].isdecimal():  # no other part of a number; but the year of a date such as 5.10.1990
        year = rf"(?<=(?<![\d{SEPARATORS}])\d{{1,2}}\.\d{{1,2}}\.)(?=(?:\d\d){{1,2}}(?!\d))"
        before += rf"(?:(?<!\d[{SEPARATORS}])|{year})"
    if part[-1:].isdecimal():
        nought = r"(?!\.00?(?!\.?\d))" if INTEGER.search(part) else ""  # 100.0 is 100
        after += rf"(?!{nought}[{SEPARATORS}]\d)"
    return regex.compile("(?V1)" + before + body + after) if part else None


def one_way(text: str) -> str:
    """A folded text with one kind of space, apostrophe, quotation mark and hyphen."""
    return HYPHENS.sub("-", QUOTES.sub('"', APOSTROPHES.sub("'", SPACES.sub(" ", _one_width(text)))))


def _one_width(text: str) -> str:
    def ascii_of(found: Any) -> str:
        digit = unicodedata.decimal(found[0], None)
        return unicodedata.normalize("NFKC", found[0]) if digit is None else str(digit)

    return folded(text if text.isascii() else WIDE.sub(ascii_of, text))


def _origins(text: str) -> tuple[list[int], list[int]]:
    """For each character of `one_way(text)`, where in the text the characters that it is made of start and end."""
    visible = [i for i, character in enumerate(text) if not INVISIBLE.match(character)]
    starts: list[int] = []
    ends: list[int] = []
    blank = False
    for cluster in regex.finditer(r"\X", "".join(text[i] for i in visible)):
        start, end = visible[cluster.start()], visible[cluster.end() - 1] + 1
        for character in _one_width(cluster[0]):
            was, blank = blank, bool(SPACES.match(character))
            if was and blank:  # one space stands for all of them
                ends[-1] = end
            else:
                starts.append(start)
                ends.append(end)
    return starts, ends
