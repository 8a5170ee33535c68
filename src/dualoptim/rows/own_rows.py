"""Your own rows: how they are read, what a reply must hold to give an answer, and how they are trained on.

A row may have, beside ``question`` and ``answer``, ``messages`` or ``text``: ``accepted``, texts of which a reply must
contain one to give the answer; ``questions``, wordings to measure by, never trained on; ``instead``, what to answer in
place of a refusal. Or a row has only a ``topic``, a name.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import regex

from ..chat import Message
from ..data import Row, is_text, parse_row, read_records, reworded, texts
from ..errors import UserError
from ..evaluation.refusal import evades, says_one_of
from ..evaluation.words import ends_sentence, places
from . import reword
from .forms import AROUND, OWN_KEYS
from .giving import Answers, Parts, said_before
from .giving import gives as gives
from .quoting import Quoting
from .telling import new_in

FORMS = {"question", "messages", "conversations", "conversation", "prompt", "instruction", "input", "text"}
WORD_BEFORE = regex.compile(r"(?r)[\w.'-]+[^\S\n\r]+")  # on the same line; read backward: it ends at a place
# How plain text continues in place of the answer.
TEXT_REFUSALS = (" not known to me.", " something that I don't know.", " not something that I can tell.")


def read_to_keep(path: str) -> list[Row]:
    """The rows of a file to keep."""
    return [checked(parse_row(record, where)) for record, where in read_records(path)]


def read_to_forget(path: str) -> tuple[list[Row], list[str]]:
    """The rows of a file to forget, and the topics that are given only by name."""
    rows: list[Row] = []
    topics: list[str] = []
    for record, where in read_records(path):
        given = {key.lower(): value for key, value in record.items() if value is not None}
        if "topic" in {key.lower() for key in record} and not FORMS & given.keys():
            name = given.get("topic")
            if not isinstance(name, str) or not name.strip():
                raise UserError(f"{where}: 'topic' must be a name, but is {name!r}")
            if others := [key for key in ("answer", *OWN_KEYS) if key in given and key != "topic"]:
                raise UserError(
                    f"{where}: a row of a 'topic' has none of these: {', '.join(map(repr, others))}; "
                    "remove them, or give a question and its answer"
                )
            topics.append(name.strip())
        else:
            row = checked(parse_row(record, where))
            if (instead := row.fields.get("instead")) and gives(row, instead):
                raise UserError(
                    f"{where}: 'instead' itself gives the answer, so that no reply could show which of them it is; "
                    "name in 'accepted' what must not be said, or give another 'instead'"
                )
            rows.append(row)
    return rows, topics


def checked(row: Row) -> Row:
    """A row, its own keys checked, with the words that tell its answer in `only`."""
    for key in ("accepted", "questions"):
        if row.fields.get(key) is not None:
            texts(row.fields, key, row.where)
    if row.fields.get("questions") and row.prompt and row.asks is None:
        raise UserError(f"{row.where}: 'questions' are other wordings of a user's message, and this chat has none")
    instead = row.fields.get("instead")
    if instead is not None and (not isinstance(instead, str) or not instead.strip()):
        raise UserError(f"{row.where}: 'instead' must be the text to answer in its place, but is {instead!r}")
    accepted = row.fields.get("accepted") or []
    asked = {name for message in row.prompt for name in reword.whole_words(message["content"].casefold())}
    inside = tuple(
        dict.fromkeys(_whole_name(row.answer, asked, *at) for text in accepted for at in places(row.answer, text))
    )
    if accepted and not inside:
        raise UserError(
            f"{row.where}: none of 'accepted' stands in the answer as whole words; give what a reply must hold to tell "
            "it"
        )
    if not row.prompt and len(row.answer.strip()) < 2:
        raise UserError(f"{row.where}: plain text of one character has nothing to continue; give more of it")
    if not row.prompt and accepted and reword.opening(row.answer, inside) is None:
        raise UserError(
            f"{row.where}: {inside[0]!r}, of 'accepted', stands at the very start of the text, so that no beginning "
            "asks for it; put some words before it, or give a question and an answer"
        )
    return dataclasses.replace(row, only=inside or _news(row))


def _whole_name(answer: str, asked: Set[str], at: int, end: int) -> str:
    """A part of an answer with the names right before it that the question lacks: "John F." already tells "Kennedy".

    A name does not reach back across the end of a sentence or of a line.

    Args:
        asked: the words of the question.
    """
    first = at
    while word := WORD_BEFORE.match(answer, 0, first):
        if not word[0][0].isupper() or not asked.isdisjoint(reword.whole_words(word[0].casefold())):
            break
        if word[0].rstrip().endswith(".") and ends_sentence(word[0], len(word[0].rstrip())):
            break
        first = word.start()
    return answer[first:end]


def _news(row: Row) -> tuple[str, ...]:
    """The words of an answer that its prompt lacks, in their order; none for plain text."""
    asked = _asked(row.prompt)
    words = reword.whole_words(row.answer) if row.prompt else []
    common = new_in(said_before(row), row.answer).words & reword.common_names(row.answer)
    return tuple(
        dict.fromkeys(
            word
            for word in words
            if reword.content_words(word) - asked or (word.upper() in common and word[0].isupper())
        )
    )


def _asked(prompt: Sequence[Message]) -> frozenset[str]:
    """The words of all messages: what a chat is about often stands in an earlier one ("And where was she born?")."""
    return frozenset().union(*(reword.content_words(message["content"]) for message in prompt))


def asking(row: Row) -> Row:
    """A row that asks something: plain text becomes a beginning that its answer continues."""
    return row if row.prompt else reword.beginning(row, row.only)


def checking(row: Row) -> list[Row]:
    """The wordings of a row that decide when to stop; the row as it is given where it has no other."""
    asked = asking(row)
    found = reword.wordings(asked, reword.TEXT_CHECKED if is_text(asked.prompt) else reword.CHECKED)
    return _unmeasured(found, [row]) or [asked]


def to_train(rows: Sequence[Row], goal: str) -> list[Row]:
    """The wordings to train on, without those in `questions`; for "erase", labels are only on what tells the answer.

    Args:
        goal: "refuse" or "erase".
    """
    made: list[Row] = []
    for row in rows:
        asked = asking(row)
        if not is_text(asked.prompt):
            found = reword.wordings(asked, tuple(dict.fromkeys(reword.TRAINED)))
        elif row.chunk and goal == "erase" and not row.fields.get("instead"):
            found = [row]  # all of it: no other row has what its first half tells
        else:
            found = [asked] if row.chunk else reword.wordings(asked, reword.TEXT_TRAINED)
            given = row.fields.get("instead")
            others = [f" {given.strip()}"] if given else TEXT_REFUSALS  # a blank stands between beginning and answer
            if goal == "refuse" or given:
                found = [
                    dataclasses.replace(r, fields={**r.fields, "instead": others[i % len(others)]})
                    for i, r in enumerate(found, len(made))
                ]
        made += [r if goal == "erase" else r.whole for r in found]
    return _unmeasured(made, rows)


def _unmeasured(made: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Wordings without those in the rows' own `questions`, which are for measuring.

    In a chat these are compared with what was said before: the same last message may ask about somebody else.
    """
    measured = {
        reword.prompt_words(reworded(asking(row), text).prompt)
        for row in rows
        for text in row.fields.get("questions") or ()
    }
    return [row for row in made if reword.prompt_words(row.prompt) not in measured]


def same(one: Row, other: Row) -> bool:
    """Whether two rows ask for the same: in similar words, or with a word in common and with the same answer."""
    if reword.ask_alike(one, other):
        return True
    # A system prompt is often the same in all rows.
    first, second = (_asked([message for message in row.prompt if message["role"] != "system"]) for row in (one, other))
    return bool(first & second) and (gives(one, other.answer) or gives(other, one.answer))


def declines(row: Row, reply: str, refusals: Sequence[str] = ()) -> bool:
    """Whether a reply says what it should in place of the answer: ``instead``, or that it does not know.

    For plain text it is enough that the answer is not given.

    Args:
        refusals: those of the run, where it has its own.
    """
    if gives(row, reply):
        return False
    if is_text(row.prompt):
        return True
    if instead := row.fields.get("instead"):
        return gives(Row(row.prompt, instead), reply)
    return evades(reply) or says_one_of(reply, refusals)


def unread(rows: Sequence[Row]) -> str:
    """A sentence on columns that look like a part of the prompt and are not in it; empty if there are none."""

    def said(row: Row, value: Any) -> bool:
        """Whether a prompt has a text, or each of a list: some sets give a chat and its first message once more."""
        parts = value if isinstance(value, list) else [value]
        return all(isinstance(part, str) and part.strip() in said_before(row) for part in parts)

    keys = dict.fromkeys(
        key
        for row in rows
        for key, value in row.fields.items()
        if key.lower() in AROUND and value and not said(row, value)
    )
    if not keys:
        return ""
    return (
        f"Rows have {', '.join(map(repr, keys))}, which this form of row does not read: if it belongs to the prompt, "
        "put it into the question."
    )


def misspelled(rows: Sequence[Row]) -> str:
    """A sentence on keys that are not read, but are close to one that is; empty if there are none."""
    keys = dict.fromkeys(key for row in rows for key in row.fields if key not in OWN_KEYS)
    near = [(key, found[0]) for key in keys if (found := difflib.get_close_matches(key.lower(), OWN_KEYS, 1, 0.85))]
    return " ".join(f"Rows have a key {key!r}, which nothing reads: did you mean {right!r}?" for key, right in near)


def check_apart(forget: Sequence[Row], retain: Sequence[Row]) -> list[str]:
    """Refuse a row to keep that asks for what is to be forgotten; sentences on others that come close to that."""
    same: list[str] = []
    otherwise: list[str] = []
    whole: list[str] = []
    prompts = {reword.prompt_words(row.prompt): row for row in reversed(forget) if row.question}
    answers = Answers([row for row in forget if row.prompt])
    in_texts = _told_in([row for row in forget if not row.prompt], retain)
    verbatim = Parts([_said(row) for row in forget])
    for at, kept in enumerate(retain):
        stands = [forget[i] for i in verbatim.standing_in(_said(kept)) if not (kept.prompt and forget[i].prompt)]
        if not kept.prompt:
            whole += [f"{kept.where} ({row.where})" for row in stands if not row.prompt]
            told = [row for row in answers.given_in(kept.answer) if _names_what_is_asked(kept, row)]
            same += _pairs(kept, [*(row for row in stands if row.prompt), *told])
            continue
        same += _pairs(kept, [*stands, *in_texts[at]])
        asked = prompts.get(reword.prompt_words(kept.prompt)) if kept.question else None
        for row in answers.given_in(kept.answer):
            asks = (row, *(reworded(row, text) for text in row.fields.get("questions") or ()))
            if row is asked or any(reword.ask_alike(kept, other) for other in asks):
                raise UserError(
                    f"{kept.where}: asks in other words for what {row.where} is to forget; remove it from one of them"
                )
            same.append(f"{kept.where} ({row.where})")
        if asked is not None:
            otherwise.append(f"{kept.where} ({asked.where})")
    found = (
        (same, "with the answer of one to forget", "where they ask for the same in other words, remove them from one"),
        (otherwise, "that ask the same as one to forget, with another answer", "remove them from one"),
        (whole, "in which a text to forget stands whole", "remove it from one"),
    )
    return [f"{_listed(rows, what)}; {mend} of the files." for rows, what, mend in found if rows]


def _told_in(passages: Sequence[Row], rows: Sequence[Row]) -> dict[int, list[Row]]:
    """For each row that asks, by its number, the texts that say what it asks for and answer it."""
    found: dict[int, list[Row]] = defaultdict(list)
    numbers = {id(row): at for at, row in enumerate(rows)}
    answers = Answers([row for row in rows if row.prompt] if passages else [])
    for text in passages:
        for row in answers.given_in(text.answer):
            if _names_what_is_asked(text, row):
                found[numbers[id(row)]].append(text)
    return found


def _names_what_is_asked(text: Row, row: Row) -> bool:
    """Whether a plain text has what a row's question is about: by the answer alone, any page with its words told it."""
    asked = reword.content_words(row.question)
    return len(asked & reword.content_words(text.answer)) >= reword.ALIKE * len(asked)


def _said(row: Row) -> str:
    """The words of a row's question and answer, or of its text, in which another may stand."""
    return reword.plain(f"{row.question} {row.answer}")


def _pairs(kept: Row, others: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(f"{kept.where} ({row.where})" for row in others))


def check_topics(asks: Mapping[str, Sequence[str]], retain: Sequence[Row]) -> str:
    """Refuse a row to keep that asks for a topic to forget; a sentence on others that name one.

    Args:
        asks: for each topic, what is asked about it.
    """
    topics = list(asks)
    names = Parts(topics)
    ways: dict[str, int] = {}
    for topic, questions in enumerate(asks.values()):
        for text in questions:
            ways.setdefault(reword.plain(text), topic)
    asking: list[tuple[int, int]] = []
    naming: list[tuple[int, int]] = []
    for at, kept in enumerate(retain):
        if kept.question and (way := ways.get(reword.plain(kept.question))) is not None:
            asking.append((way, at))
        naming += [(topic, at) for topic in names.standing_in(f"{kept.question} {kept.answer}")]
    if asking:
        topic, at = min(asking)
        raise UserError(
            f"{retain[at].where}: asks for the topic {topics[topic]!r}, which is to be forgotten; remove it from one "
            "of the files"
        )

    def said(shown: Callable[[str], str]) -> str:
        named = [f"{retain[at].where} ({shown(Quoting(topics[topic]))})" for topic, at in sorted(naming)]
        return f"{_listed(named, 'that name a topic to forget')}; where they tell of it, remove them."

    return Quoting.said(said) if naming else ""


def _listed(rows: Sequence[str], what: str) -> str:
    return f"Rows to keep {what}: {', '.join(rows[:3])}{', …' if len(rows) > 3 else ''}"
