"""The forms that rows come in: a question and an answer, an instruction, a chat or plain text.

Keys are those of the common formats, in upper or lower case. A form counts as absent where all of its columns are
empty, as in a table of rows of several forms; where only the question or the answer is empty, that is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from ..errors import UserError
from ..evaluation.words import normal

# The keys of a question and its answer, in the order in which they are looked for.
PAIRS = (
    ("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"),
    ("instruction", "response"), ("input", "output"),
)  # fmt: skip
# Keys of what may belong before an answer, some of which a form reads.
AROUND = {*(asked for asked, _ in PAIRS), "system", "history", "context", "passage", "document", "background",
          "choices", "options"}  # fmt: skip
# Keys of one's own rows that are read beside those of the form.
OWN_KEYS = ("accepted", "questions", "instead", "topic", "alternates")
# Keys of lists, which a table has as JSON in a cell.
LISTS = ("accepted", "questions", "alternates", "history", "messages", "conversations", "conversation")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
         "bot": "assistant", "system": "system", "tool": "tool", "developer": "system"}  # fmt: skip


def has_text(value: Any) -> TypeGuard[str]:
    """Whether a value is a text, and not of blanks and invisible characters alone."""
    return isinstance(value, str) and bool(normal(value).strip())


def texts(record: Mapping[str, Any], key: str, where: str) -> list[str]:
    """A list of texts, none of them empty, under a record's key."""
    found = record.get(key)
    if not isinstance(found, list) or not found or not all(map(has_text, found)):
        raise UserError(f'{where}: needs {key!r}, a list of texts, none of them empty, such as ["…", "…"]')
    return found


def text_of(record: Mapping[str, Any], key: str, where: str) -> str:
    """A text that is not empty, under a record's key."""
    value = record.get(key)
    if not has_text(value):
        found = "is missing" if key not in record else "is empty" if value in ("", None) else f"is {_shown(value)}"
        raise UserError(f"{where}: the row's {key!r} {found}; give it some text")
    return value


def check_texts(record: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    """Refuse a value that is not some text under keys that a record need not have."""
    for key in keys:
        if record.get(key) is not None:
            text_of(record, key, where)


def _shown(value: Any) -> str:
    """A value, short enough for a sentence."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_cases(record: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    """Refuse a key that is read and has values under two spellings, as "Question" and "question"."""
    spelled: dict[str, str] = {}
    for key in (key for key, value in record.items() if value is not None):
        other = spelled.setdefault(key.lower(), key)
        if other != key and key.lower() in keys:
            raise UserError(f"{where}: the row has {other!r} and {key!r}, which are the same key; remove or rename one")


def conversation(record: Mapping[str, Any], where: str) -> tuple[list[dict[str, str]], str, set[str]] | None:
    """The prompt as messages, the answer, and the keys that were used, of a row in any of the forms.

    None for plain text, under the key "text".
    """
    lower = {key.lower(): key for key, value in record.items() if value is not None}
    if "question" in lower:
        return _pair(record, lower, "question", "answer", where)
    for key in ("messages", "conversations", "conversation"):
        if key in lower:
            return _chat(record, lower, [lower[key]], where)
    for asked, answered in PAIRS:
        if asked in lower and answered in lower:
            keys = [lower[asked], lower[answered]]
            if any(isinstance(record[key], list) for key in keys):
                return _chat(record, lower, keys, where)
            return _pair(record, lower, asked, answered, where)
    columns_of = {key.lower(): key for key in record} | lower  # the empty ones, too
    for pair in PAIRS:
        if lower.keys() & set(pair) and columns_of.keys() >= set(pair):  # half of it: no plain text
            for key in set(pair) - lower.keys():
                text_of(record, columns_of[key], where)
    if "text" in lower:
        return None
    columns = ", ".join(map(repr, record)) or "nothing"
    mend = "rename its columns"
    if record and all(map(_holds_rows, record.values())):
        mend = f"these are rows themselves: give the list under {next(iter(record))!r} as the file"
    raise UserError(
        f"{where}: a row needs 'question' and 'answer', or 'messages', or 'text', or 'prompt' and 'completion', or "
        f"'instruction' and 'output', or 'conversations', but has {columns}; {mend}"
    )


def _holds_rows(value: Any) -> bool:
    """Whether a value is a list of objects that are no messages."""
    return (
        bool(value)
        and isinstance(value, list)
        and all(isinstance(each, dict) and not {"role", "from"} & each.keys() for each in value)
    )


def _pair(
    record: Mapping[str, Any], lower: Mapping[str, str], asked: str, answered: str, where: str
) -> tuple[list[dict[str, str]], str, set[str]]:
    if answered not in lower and (others := [key for key in lower.values() if key != lower[asked]]):
        found = "is empty" if any(key.lower() == answered for key in record) else "is missing"
        raise UserError(
            f"{where}: the row's {answered!r} {found}; give it some text, or rename to it the column that holds it, "
            f"of {', '.join(map(repr, others))}"
        )
    keys = lower[asked], lower.get(answered, answered)
    question, answer = (text_of(record, key, where) for key in keys)
    used = set(keys)
    for name in ("input", "context") if asked == "instruction" else ("context",):
        key = lower.get(name)
        if key is None or (name == "context" and not isinstance(record[key], str)):  # some sets have it in parts
            continue
        used.add(key)
        if str(record[key]).strip():
            question = f"{question}\n\n{text_of(record, key, where)}"
    turns = [*_system(record, lower, used, where), *_history(record, lower, used, where)]
    return [*turns, {"role": "user", "content": question}], answer, used


def _history(record: Mapping[str, Any], lower: Mapping[str, str], used: set[str], where: str) -> list[dict[str, str]]:
    """The earlier turns, if they have a column of their own: a list of pairs of a question and its answer."""
    key = lower.get("history")
    if key is None or not isinstance(record[key], list):  # a text under that key is no conversation
        return []
    used.add(key)
    turns = []
    for pair in record[key]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(has_text, pair)):
            raise UserError(
                f"{where}: {key!r} must be a list of pairs of a question and its answer, but has {_shown(pair)}"
            )
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return turns


def _system(record: Mapping[str, Any], lower: Mapping[str, str], used: set[str], where: str) -> list[dict[str, str]]:
    """The system message, if it has a column of its own."""
    key = lower.get("system")
    if key is None or not str(record[key]).strip():
        return []
    used.add(key)
    return [{"role": "system", "content": text_of(record, key, where)}]


def _chat(
    record: Mapping[str, Any], lower: Mapping[str, str], keys: Sequence[str], where: str
) -> tuple[list[dict[str, str]], str, set[str]]:
    """The messages before the last one, and the last one's text, which must be the assistant's."""
    used: set[str] = set(keys)
    turns: list[dict[str, str]] = []
    for key, role in zip(keys, ("user", "assistant"), strict=False):
        messages: Any = record[key]
        if len(keys) == 2 and isinstance(messages, str):  # the other column holds messages
            messages = [{"role": role, "content": messages}]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UserError(
                f'{where}: {key!r} must be a list of {{"role": …, "content": …}}, but is {_shown(messages)}'
            )
        turns += [_message(message, i, key, where) for i, message in enumerate(messages, 1)]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        last = f"its last is of {turns[-1]['role']!r}" if len(turns) > 1 else f"it has {len(turns)}"
        raise UserError(
            f"{where}: {keys[-1]!r} must be a list of two messages or more that ends with the assistant's answer, "
            f"but {last}"
        )
    if turns[0]["role"] != "system":
        turns = [*_system(record, lower, used, where), *turns]
    return turns[:-1], turns[-1]["content"], used


def _message(message: Mapping[str, Any], number: int, key: str, where: str) -> dict[str, str]:
    named = message.get("role") or message.get("from")
    named = named.strip() if isinstance(named, str) else ""
    role = ROLES.get(named.lower(), named)
    if not role:
        raise UserError(f"{where}: message {number} of {key!r} has no role; give it a 'role' such as 'user'")
    content = next((message[name] for name in ("content", "value") if message.get(name) is not None), None)
    if isinstance(content, list):  # of parts
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        others = [
            part.get("type") if isinstance(part, dict) else part
            for part in parts
            if not isinstance(part, dict)
            or part.get("type") not in ("text", "input_text", "output_text", None)
            or not isinstance(part.get("text"), str)
        ]
        if others:
            raise UserError(f"{where}: message {number} of {key!r} has parts that are no text ({others}); remove them")
        content = "".join(part["text"] for part in parts)
    if message.get("tool_calls") and has_text(content):
        raise UserError(
            f"{where}: message {number} of {key!r} has text and tool calls, which would be lost (tool calls cannot be "
            "trained on); give the calls as text, or remove the row"
        )
    if not has_text(content):
        calls = " (tool calls cannot be trained on)" if message.get("tool_calls") else ""
        found = "" if content is None or isinstance(content, str) else f", but {_shown(content)}"
        raise UserError(
            f"{where}: message {number} of {key!r} has no text{calls}{found}; give it some, or remove the row"
        )
    return {"role": role, "content": content}
