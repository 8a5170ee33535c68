"""Files of rows as people have them, and the forms that rows come in.

JSON lines, a JSON array, CSV and TSV, parquet, each also gzipped, UTF-8 with or without a byte order mark, or a data
set on the hub as ``org/name:split``. A row is a question and an answer, an instruction, a chat or plain text, under the
keys of the common formats; a column that holds nothing is an absent one.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import UserError

HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w\[\]:%+-]+))?")
DELIMITERS = {".csv": ",;", ".tsv": "\t", ".tab": "\t"}
# The keys of a question and its answer, in the order in which they are looked for.
PAIRS = (
    ("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"),
    ("instruction", "response"), ("input", "output"),
)  # fmt: skip
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
         "bot": "assistant", "system": "system", "tool": "tool", "developer": "system"}  # fmt: skip

Record = dict[str, Any]


def read_records(path: str | Path) -> list[tuple[Record, str]]:
    """The rows of a file, or of a data set on the hub, as they are, each with where it stands ("file:line")."""
    found = HUB.fullmatch(str(path))
    if found and not Path(path).exists() and not Path(path).suffix:
        return _hub(found["name"], found["split"] or "train")
    data = _bytes(str(path))
    if data[:4] == b"PAR1":
        return _parquet(data, str(path))
    text = _text(data, str(path))
    kinds = [suffix.lower() for suffix in Path(path).suffixes if suffix.lower() in DELIMITERS]
    records: list[tuple[Any, str]]
    if kinds:
        records = _table(text, kinds[-1], str(path))
    elif text.lstrip().startswith("["):
        records = [(record, f"{path}, item {i}") for i, record in enumerate(parse_json(text, str(path)), 1)]
    else:
        lines = enumerate(text.split("\n"), 1)  # and at no other line separator: strings may hold those
        records = [(parse_json(line, f"{path}:{i}"), f"{path}:{i}") for i, line in lines if line.strip()]
    if not records:
        raise UserError(f'{path}: holds no rows; give at least one JSON line such as {{"question": …, "answer": …}}')
    for record, where in records:
        if not isinstance(record, dict):
            raise UserError(f"{where}: a row must be a JSON object, but is {type(record).__name__}")
    return records


def read_lines(path: str | Path, key: str) -> list[str]:
    """Texts, of a file of plain lines, of JSON strings, or of rows that have them under a key."""
    text = _text(_bytes(str(path)), str(path))
    first = text.lstrip()[:1]
    if first not in ("{", "[", '"'):
        found = [(line.strip(), f"{path}:{i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    elif first == "[":
        found = [(each, f"{path}, item {i}") for i, each in enumerate(parse_json(text, str(path)), 1)]
    else:
        lines = [(line, f"{path}:{i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        found = [(parse_json(line, where), where) for line, where in lines]
    texts = []
    for each, where in found:
        said = each.get(key) if isinstance(each, dict) else each
        if not isinstance(said, str) or not said.strip():
            raise UserError(f"{where}: needs its words, as a line, a text, or under {key!r}")
        texts.append(said)
    if not texts:
        raise UserError(f"{path}: holds no lines; give at least one")
    return texts


def read_table(path: str | Path, columns: Sequence[str]) -> list[tuple[dict[str, str], str]]:
    """The rows of a CSV file, each with where it stands, none of `columns` empty."""
    rows = _table(_text(_bytes(str(path)), str(path)), ".csv", str(path))
    if not rows:
        raise UserError(f"{path}: holds no rows; it must be a table with the columns {', '.join(columns)}")
    return [({column: text_of(row, column, where) for column in columns}, where) for row, where in rows]


def _bytes(path: str) -> bytes:
    try:
        if Path(path).is_file() or not Path(path).exists() or Path(path).is_dir():
            data = Path(path).read_bytes()
        else:
            data = _piped(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give a file of JSON lines") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read; change its permissions") from None
    if data[:2] == b"\x1f\x8b":
        try:
            return gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise UserError(f"{path}: is gzip that is damaged or cut off ({error}); fetch it again") from None
    return data


@lru_cache(maxsize=16)
def _piped(path: str) -> bytes:
    """What comes through a pipe, which can be read once."""
    return Path(path).read_bytes()


def _text(data: bytes, path: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _table(text: str, suffix: str, path: str) -> list[tuple[Any, str]]:
    head = text.partition("\n")[0]
    delimiter = max(DELIMITERS[suffix], key=head.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows = []
    for row in reader:
        where = f"{path}:{reader.line_num}"
        if None in row:
            raise UserError(
                f"{where}: has more cells than the head of the table; put texts with {delimiter!r} in quotes"
            )
        rows.append(({key.strip(): value or None for key, value in row.items()}, where))
    return rows


def _parquet(data: bytes, path: str) -> list[tuple[Any, str]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: is parquet; pip install pyarrow to read it, or save it as JSON lines") from None
    try:
        rows = parquet.read_table(io.BytesIO(data)).to_pylist()
    except Exception as error:  # whatever a damaged file makes it say
        raise UserError(f"{path}: is parquet that cannot be read ({error}); fetch it again") from None
    return [(row, f"{path}, row {i}") for i, row in enumerate(rows, 1)]


def _hub(name: str, split: str) -> list[tuple[Any, str]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"{name}: there is no such file; for a data set on the hub, pip install 'dualoptim[hub]'"
        ) from None
    try:
        rows = load_dataset(name, split=split)
    except Exception as error:  # whatever the hub answers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}:{split}: could not be loaded as a file or from the hub: {reason}") from None
    return [(dict(row), f"{name}:{split}, row {i}") for i, row in enumerate(rows, 1)]


def parse_json(text: str, where: str) -> Any:
    """JSON, or one sentence."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(f"{where}: broken JSON{line}, column {error.colno}: {error.msg}") from None


def texts(record: Mapping[str, Any], key: str, where: str) -> list[str]:
    """A list of texts, none of them empty, under a record's key."""
    found = record.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise UserError(f"{where}: needs {key!r}, a list of texts, none of them empty")
    return found


def text_of(record: Mapping[str, Any], key: str, where: str) -> str:
    """A text that is not empty, under a record's key."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        found = "is missing" if key not in record else "is empty" if value == "" else f"is {value!r}"
        raise UserError(f"{where}: the row's {key!r} {found}; give it some text")
    return value


def conversation(record: Mapping[str, Any], where: str) -> tuple[list[dict[str, str]], str, set[str]] | None:
    """What is asked, as messages, what is answered, and the keys that were used, of a row in any of the forms.

    None for plain text, under the key "text".
    """
    present = {key: value for key, value in record.items() if value is not None}
    lower = {key.lower(): key for key in present if isinstance(key, str)}
    if "question" in lower:
        return _pair(record, lower, "question", "answer", where)
    for key in ("messages", "conversations", "conversation"):
        if key in lower:
            return *_chat(present[lower[key]], lower[key], where), {lower[key]}
    for asked, answered in PAIRS:
        if asked in lower and answered in lower:
            if isinstance(present[lower[asked]], list):
                given = present[lower[answered]]
                turns = [*present[lower[asked]], *(given if isinstance(given, list) else [given])]
                return *_chat(turns, lower[asked], where), {lower[asked], lower[answered]}
            return _pair(record, lower, asked, answered, where)
    if "text" in lower:
        return None
    keys = ", ".join(map(repr, record)) or "nothing"
    forms = "or 'prompt' and 'completion', or 'instruction' and 'output', or 'conversations'; rename its columns"
    raise UserError(f"{where}: a row needs 'question' and 'answer', or 'messages', or 'text', but has {keys}, {forms}")


def _pair(
    record: Mapping[str, Any], lower: Mapping[str, str], asked: str, answered: str, where: str
) -> tuple[list[dict[str, str]], str, set[str]]:
    keys = lower[asked], lower.get(answered, answered)
    question, answer = (text_of(record, key, where) for key in keys)
    used = set(keys)
    if asked == "instruction" and "input" in lower:
        used.add(lower["input"])
        if str(record[lower["input"]]).strip():
            question = f"{question}\n\n{text_of(record, lower['input'], where)}"
    turns = [{"role": "user", "content": question}]
    if "system" in lower and asked != "question" and str(record[lower["system"]]).strip():
        used.add(lower["system"])
        turns = [{"role": "system", "content": text_of(record, lower["system"], where)}, *turns]
    return turns, answer, used


def _chat(messages: Any, key: str, where: str) -> tuple[list[dict[str, str]], str]:
    """Messages before the last, and that one's text, which must be the assistant's."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f'{where}: {key!r} must be a list of {{"role": …, "content": …}}')
    turns = [_message(message, i, key, where) for i, message in enumerate(messages, 1)]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        last = f"its last is of {turns[-1]['role']!r}" if len(turns) > 1 else f"it has {len(turns)}"
        raise UserError(
            f"{where}: {key!r} must be a list of two messages or more that ends with the assistant's answer, but {last}"
        )
    return turns[:-1], turns[-1]["content"]


def _message(message: Mapping[str, Any], number: int, key: str, where: str) -> dict[str, str]:
    named = message.get("role", message.get("from"))
    role = ROLES.get(named.lower(), named) if isinstance(named, str) else None
    if role is None:
        raise UserError(f"{where}: message {number} of {key!r} has no role; give it a 'role' such as 'user'")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # of parts
        others = [part.get("type") for part in content if isinstance(part, dict) and part.get("type") != "text"]
        if others or not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise UserError(f"{where}: message {number} of {key!r} has parts that are no text ({others}); remove them")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not content.strip():
        calls = " (tool calls cannot be trained on)" if message.get("tool_calls") else ""
        raise UserError(f"{where}: message {number} of {key!r} has no text{calls}; give it some, or remove the row")
    return {"role": role, "content": content}
