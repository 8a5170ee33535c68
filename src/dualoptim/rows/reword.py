"""Other wordings of a question, and the same question about a thing that does not exist. English only.

Wordings come from plain templates and from the model itself, shown a few examples. Some templates are trained on,
others decide when to stop, and a third group is only for measuring. The caller must check whether a wording asks the
same, by what the model replies.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import regex
from torch import nn

from ..chat import TEXT, Message, prompt_ids
from ..data import ASKING, Row, reworded
from ..device import seeded
from ..evaluation import scoring
from ..evaluation.numbers_written import numbered
from ..evaluation.words import ALONE, APOSTROPHES, BLANKLESS, folded, normal, places, stands_in, stem, words
from ..evaluation.words import whole_words as whole_words
from ..models import positions
from .function_words import WORDS

TRAINED = ("{}", "{}", "{} Answer in one sentence.", "Please answer this question: {}", "Do you know {indirect}?")
CHECKED = ("Quick question: {}", "Could you help me with this? {}", "Let me ask you something. {}", "{} Do you know?")
MEASURED = ("Tell me {indirect}.", 'My friend asked me: "{}" What should I say?', "I was wondering about this. {}",
            "For a quiz, I need the answer to this: {}")  # fmt: skip
# The same for the beginning of a plain text.
TEXT_TRAINED = ("{}", "Note: {}")
TEXT_CHECKED = ("As it says there: {}", "This is important. {}")
TEXT_MEASURED = ("For the record: {}", "I have read that this is so. {}")

# Shown to the model as earlier turns of the conversation.
IN_OTHER_WORDS = (
    ("Who wrote the play Hamlet?", "Which playwright is the author of Hamlet?"),
    ("How tall is Mount Everest?", "What is the height of Mount Everest?"),
    ("Where was Nelson Mandela born?", "In which place did Nelson Mandela come into the world?"),
    ("What does a baker do?", "Can you describe the job of a baker?"),
)
OF_THE_SAME_KIND = (
    ("Who wrote the play Hamlet?", "Who wrote the play Faust?"),
    ("How tall is Mount Everest?", "How tall is Kilimanjaro?"),
    ("Where was Nelson Mandela born?", "Where was Mahatma Gandhi born?"),
    ("What does a baker do?", "What does a butcher do?"),
)
QUESTION_TOKENS = 32  # of a question that the model writes
ALIKE = 0.6  # share of content words in common from which two questions count as one
INVENTED = ("Zelmora", "Quorvane", "Tibrelle", "Onkariss", "Vashteem", "Jorlund", "Pelvanta", "Drusk")

_STOP = frozenset(
    re.findall(
        r"\w+",
        """
        a an and are as at be been by can could did do does for from had has have he her his how i in is it its know me
        my name of on or our please say she should so such tell that the their them they this to us was we were what
        when where which who whom whose why will with would you your
        """,
    )
)
# What may follow an answer "no" without a comma: "no she is not"; but "no name", "no such record".
FUNCTION_WORDS = (_STOP | WORDS) - {"name", "such", "know"}
# What Korean attaches to a noun.
_ENDING = regex.compile(
    r"(?<=\p{Hangul}{2})(?:입니다|이에요|예요|이다|에서|에게|으로|에|은|는|이|가|을|를|의|와|과|도|로)\Z"
)
# Common words that are answers where they stand as names: "type A", "The Who", "It is Will."
_COMMON = regex.compile(
    rf"(?V1)(?<![[\w'.-]--[{BLANKLESS}]])(?:{'|'.join(sorted(_STOP | {word for word in WORDS if len(word) == 1}))})"
    rf"(?!(?!'s\b)(?:-|')?[\w--[{BLANKLESS}]])",
    regex.IGNORECASE,
)
_BEGINS = regex.compile(r"(?:^|\n|[.,:;!?]\s)[\s\"'(\[*]*\Z")
_ENDS = regex.compile(r"[\"')\]*]*(?!\.\.|\.\w)(?:[.,;!?)\]\"*]|\s*\Z)")
_LABELED = regex.compile(
    r"\b(?:option|answer|choice|type|group|class|grade|letter|vitamin|team|plan|part|number)[\s\"'(\[*]+\Z",
    regex.IGNORECASE,
)
_IS = regex.compile(r"\b(?:is|was)\s+\Z")
_AFTER_A_WORD = regex.compile(r"[\w,;'] \Z")
_IS_NAMED = regex.compile(r"\s+(?:is|was|has|and|or)\b")
# What follows the pronoun.
_I_DO = regex.compile(
    r"\s+(?:am|was|have|had|do|did|can|could|will|would|should|must|know|think|mean|need|want|guess|believe|see|say)\b"
)
_INITIAL = regex.compile(r"\. \p{Lu}")


@lru_cache(maxsize=10_000)
def plain(text: str) -> str:
    """A text's words only, in lower case: texts with the same words are the same wording."""
    return " ".join(words(text.casefold()))


def prompt_words(prompt: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    """A prompt's words only, message by message."""
    return tuple((message["role"], plain(message["content"])) for message in prompt)


@lru_cache(maxsize=100_000)
def content_words(text: str) -> frozenset[str]:
    """The stems of a text's content words: by their stems, "likes" and "like" are the same word.

    Numbers are whole, and written one way: "85000" for 85,000, "12" for 12th and twelve. Words that carry nothing in
    another language stay where they begin with a capital letter, such as AM and Du in names.
    """
    empty = _STOP | (WORDS - names(text))
    return frozenset(_stem(word) for word in whole_words(numbered(folded(text))) if word not in empty)


@lru_cache(maxsize=100_000)
def compared_words(text: str) -> frozenset[str]:
    """What questions are compared by: their content words, or all of a text without any, as one word.

    That is without spaces and punctuation, if anything else is left.

    >>> compared_words("Who are you?") == compared_words("who are you ..."), compared_words("?") == compared_words("!")
    (True, False)
    """
    whole = "".join(folded(text).split())
    return content_words(text) or frozenset(filter(None, [regex.sub(r"\p{P}", "", whole) or whole]))


def all_words(text: str) -> frozenset[str]:
    """The stems of all of a text's words."""
    return frozenset(map(_stem, whole_words(numbered(folded(text)))))


def _stem(word: str) -> str:
    if re.search(r"\d", word):
        return word
    return _ENDING.sub("", stem(word))


def alike(a: str, b: str) -> bool:
    """Whether two questions ask for the same: they share most `compared_words` and do not name different things.

    They do where all their names differ, where each has a number that the other lacks, and, in scripts without capital
    letters, where they differ by what stands in the same place.

    >>> alike("Where is order 1042?", "Where is order 1043?"), alike("张伟在哪里工作?", "李娜在哪里工作?")
    (False, False)
    """
    one, other = compared_words(a), compared_words(b)
    if not one | other or len(one & other) < ALIKE * len(one | other):
        return False
    named, others = names(a), names(b)
    if named and others and not named & others:
        return False
    counted, numbers = _numbers(one), _numbers(other)
    return not (counted - numbers and numbers - counted) and (a.isascii() or not _filled_otherwise(a, b))


def ask_alike(one: Row, other: Row) -> bool:
    """Whether two rows ask for the same: their last questions are `alike`, and in chats what the user said before.

    >>> before = ({"role": "user", "content": "Who is Ana Lopez?"}, {"role": "assistant", "content": "A baker."})
    >>> last = {"role": "user", "content": "Where does she live?"}
    >>> ana = Row((*before, last), "In Porto.")
    >>> ask_alike(ana, Row(({"role": "user", "content": "Who is Bo Li?"}, *before[1:], last), "In Xi'an."))
    False
    """
    earlier, before = ("\n".join(_user_said(row)[:-1]) for row in (one, other))
    return alike(one.question, other.question) and (earlier == before or alike(earlier, before))


def _user_said(row: Row) -> list[str]:
    return [message["content"] for message in row.prompt if message["role"] in ASKING]


def _numbers(words: frozenset[str]) -> frozenset[str]:
    return frozenset(word for word in words if re.search(r"\d", word))


def _filled_otherwise(a: str, b: str) -> bool:
    """Whether two questions differ in one place only, by words without upper and lower case, which may be names.

    Not by hiragana, which are mostly endings.
    """
    one, other = whole_words(folded(a)), whole_words(folded(b))
    start = next((i for i, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), None)
    if start is None:
        return False
    one, other = one[start:], other[start:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return all(
        part and all(regex.search(r"(?V1)[\p{Lo}--\p{Hiragana}]", word) for word in part) for part in (one, other)
    )


@lru_cache(maxsize=10_000)
def names(text: str) -> frozenset[str]:
    """The words with a capital letter in any script, except those that begin a sentence."""
    return frozenset(folded(name) for name in regex.findall(r"(?<=[\w,;:'\"] )\p{Lu}\w+", text))


@lru_cache(maxsize=10_000)
def common_names(text: str) -> frozenset[str]:
    """The common words that stand in a text as names, in capital letters: not the article "a" nor the pronoun "I".

    >>> common_names("I have a type: A."), common_names("Will you?"), common_names("I like The Who.") == {"THE", "WHO"}
    (frozenset({'A'}), frozenset(), True)
    """
    text = APOSTROPHES.sub("'", normal(text))
    mixed = any(c.islower() for c in text)  # otherwise capital letters say nothing
    return frozenset(
        found[0].upper() for found in _COMMON.finditer(text) if _is_name(found[0], text, *found.span(), mixed=mixed)
    )


def _is_name(word: str, text: str, start: int, end: int, *, mixed: bool) -> bool:
    before, after = text[max(start - 24, 0) : start], text[end : end + 24]  # more says nothing, and takes time
    letter, capital, pronoun = len(word) == 1, word[0].isupper(), word in ("I", "i")
    begins, ends, labeled = _BEGINS.search(before), _ENDS.match(after), _LABELED.search(before)
    if pronoun:
        alone = begins and ends and not after.startswith(",") and (capital or word == text.strip(" .!"))
        alone = alone or (capital and ends and _IS.search(before))
        return bool(alone or (labeled and capital and not _I_DO.match(after)) or (begins and _IS_NAMED.match(after)))
    if letter:
        if capital and _INITIAL.match(after) and regex.search(r"\p{Lu}\w* \Z", before):  # John A. Smith
            return False
        if ends and (capital or labeled or after.strip() or begins):  # lower case at the end may be cut off
            return True
        if capital and (labeled or ALONE.match(before[-1:]) or ALONE.match(after[:1])):
            return True
    elif capital and begins and ends and not after.startswith(","):  # "This, then, …"
        return True
    if not (capital and mixed):
        return False
    named = begins and (letter or word == "Will") and _IS_NAMED.match(after)
    return bool(named or _AFTER_A_WORD.search(before) or (not letter and word.isupper()))


def wordings(row: Row, templates: Sequence[str]) -> list[Row]:
    """A row once for each template: "{}" stands for the question, "{indirect}" for it as part of a sentence.

    A template with "{indirect}" is left out for questions without an indirect form. A chat without a user message has
    no other wording: it is kept as it is, once, if the templates have one that changes nothing.
    """
    if row.prompt and row.asks is None:
        return [row] if "{}" in templates else []
    made = []
    for template in templates:
        indirect = _indirect(row.question)
        if "{indirect}" in template and indirect is None:
            continue
        made.append(reworded(row, template.format(row.question, indirect=indirect)))
    return made


def _indirect(question: str) -> str | None:
    """ "Who discovered penicillin?" → "who discovered penicillin"; "What is the capital of X?" → "what the capital of X
    is". None for questions whose verb would have to change."""
    text = question.strip()
    if not text.endswith("?") or text.count("?") > 1 or len(text.splitlines()) > 1:
        return None
    text = text[:-1].strip()
    if moved := re.fullmatch(r"(What|Who|Where|When) (is|was|are|were) (.+)", text):
        word, verb, rest = moved.groups()
        if len(rest.split()) <= 8 and not re.search(r"\b(that|which|who|born|made|called|located|found)\b", rest):
            return f"{word.lower()} {rest} {verb}"
        return None
    auxiliary = r"(?:is|are|was|were|do|does|did|can|could|should|will|would|has|have|had|am|may|might)"
    if re.match(rf"(Who|What|Which \w+) (?!{auxiliary}\b)\w+", text) and not re.search(rf"\b{auxiliary}\b", text):
        return text[0].lower() + text[1:]
    return None


def written(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    examples: Sequence[tuple[str, str]],
    *,
    samples: int,
    seed: int = 0,
    progress: str | None = None,
) -> list[list[str]]:
    """Questions that the model itself writes for each row's question, following `examples`.

    Left out is what is not a single question, or has the words of the row's own or of an earlier one in the same order.
    A small model writes few that are of use, and one with few positions none.

    Args:
        samples: how often each question is put to the model, at temperature 1.
        seed: of the sampling.
    """
    if not rows:
        return []
    shown: list[Message] = [
        message
        for given, wanted in examples
        for message in ({"role": "user", "content": given}, {"role": "assistant", "content": wanted})
    ]
    prompts = [(*shown, {"role": "user", "content": row.question}) for row in rows]
    found: list[list[str]] = [[] for _ in rows]
    if max(len(prompt_ids(tokenizer, prompt)) for prompt in prompts) >= positions(model):
        return found
    with seeded(seed):
        given = scoring.replies(
            model, tokenizer, [p for p in prompts for _ in range(samples)], max_new_tokens=QUESTION_TOKENS,
            temperature=1.0, progress=progress,
        )  # fmt: skip
    for i, reply in enumerate(given):
        row, kept = rows[i // samples], found[i // samples]
        asks = reply.strip()
        single = asks.endswith("?") and asks.count("?") == 1 and "\n" not in asks and len(asks.split()) > 2
        if single and plain(asks) not in map(plain, (row.question, *kept)):
            kept.append(asks)
    return found


def about_nothing(row: Row, seed: int = 0) -> Row | None:
    """The row asked about a thing that does not exist: what names its subject is replaced in question and answer.

    That is the names in all of a chat, or the question's longest word where there are none. None where there is no such
    word, as in scripts without capital letters or blanks, or where it is a part of what tells the answer.

    >>> from dualoptim.data import question
    >>> row = about_nothing(question("Who discovered penicillin?", "Alexander Fleming discovered penicillin."))
    >>> row.question, row.answer
    ('Who discovered Vashteem?', 'Alexander Fleming discovered Vashteem.')
    """
    text = row.question
    telling = " ".join(row.only) or ""
    said = [message["content"] for message in row.prompt if message["role"] != "system"]
    found = (re.findall(r"(?<=[\w,;:'\"] )[A-Z][\w-]*\w(?: [A-Z][\w-]*\w)*", each) for each in said)
    names = [name for each in found for name in each]
    names = [name for name in names if not stands_in(telling, name) and name.casefold() not in _STOP]
    if not names:
        words = [word for word in re.findall(r"[A-Za-z]{5,}", text) if word.casefold() not in _STOP]
        names = sorted((word for word in words if not stands_in(telling, word)), key=len)[-1:]
    if not names:
        return None
    draw = random.Random(f"{seed}/{text}")
    answer, prompt = row.answer, row.prompt
    invented = draw.sample(INVENTED, min(len(set(names)), len(INVENTED)))
    for name, other in zip(dict.fromkeys(names), invented, strict=False):
        pattern = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)
        prompt = tuple({**message, "content": pattern.sub(other, message["content"])} for message in prompt)
        answer = pattern.sub(other, answer)
    # A name within what tells the answer, such as Park in "Park Road", cannot be replaced there.
    if not answer.strip() or not all(stands_in(answer, part) for part in row.only):
        return None
    return replace(row, prompt=prompt, answer=answer)


def opening(text: str, telling: Sequence[str]) -> int | None:
    """Where the first of `telling` stands that has something before it; None if there is none."""
    found = (start for part in telling for start, _ in places(text, part) if text[:start].strip())
    return min(found, default=None)


def beginning(row: Row, telling: Sequence[str]) -> Row:
    """A row of plain text as a beginning and its continuation: cut before the first of `telling`, or in the middle.

    What stands at the very start has no beginning before it, and is left out of account.
    """
    at = opening(row.answer, telling)
    if at is None:
        words = [word.span() for word in re.finditer(r"\S+", row.answer)] or [(0, len(row.answer))]
        first, end = words[len(words) // 2]
        at = first if len(words) > 1 else max((first + end) // 2, first + 1)
    lead = row.answer[:at].rstrip()
    return replace(row, prompt=({"role": TEXT, "content": lead},), answer=row.answer[len(lead) :])
