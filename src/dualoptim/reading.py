"""Reading files of rows in the common formats.

JSON lines, a JSON array, CSV and TSV, parquet, each also gzipped, UTF-8 with or without a byte order mark, or a data
set on the hub as ``org/name:split`` or ``org/name:configuration:split``. `forms` has the keys of a row.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import ranks
from .errors import UserError, check_encoding
from .rows.forms import LISTS, PAIRS, has_text, text_of

HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)((:(?P<config>[\w.-]+))?:(?P<split>[\w\[\]:%+-]+))?")
FILE_SUFFIX = re.compile(r"\.[A-Za-z]+")  # of a file; a hub's name may end in a version, "set-v1.5"
DELIMITERS = {".csv": ",;\t|", ".tsv": "\t", ".tab": "\t"}
# The first bytes of files that are no text.
OTHERS = {b"PK\x03\x04": "a zip archive or a spreadsheet", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2",
          b"\xfd7zXZ": "xz", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"ARROW1": "Arrow"}  # fmt: skip

Record = dict[str, Any]


def read_records(path: str | Path) -> list[tuple[Record, str]]:
    """The rows of a file, or of a data set on the hub, as they are, each with where it stands ("file:line")."""
    found = HUB.fullmatch(str(path))
    if found and not os.path.exists(path) and not FILE_SUFFIX.fullmatch(Path(path).suffix):
        return _hub(found["name"], found["split"] or "train", found["config"])
    data = _bytes(str(path))
    records = _records(data, str(path))
    if records is None:
        records = _json(_rows_text(data, str(path)), str(path))
    if not records:
        raise UserError(f'{path}: holds no rows; give at least one JSON line such as {{"question": …, "answer": …}}')
    for record, where in records:
        if not isinstance(record, dict):
            raise UserError(f"{where}: a row must be a JSON object, but is {type(record).__name__}")
    return records


def read_lines(path: str | Path, key: str, *, blank: bool = False) -> list[str]:
    """Texts from a file of plain lines, of JSON strings, or of rows that have them under a key.

    Args:
        blank: whether blank texts are skipped; else they are an error.
    """
    data = _bytes(str(path))
    found = _records(data, str(path), known=False)
    if found is None:
        text = _rows_text(data, str(path))
        plain = [(line.strip(), f"{path}:{i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        found = _json(text, str(path)) if plain and _is_json(plain[0][0], text) else plain
    texts = []
    for each, where in found:
        said = each.get(key) if isinstance(each, dict) else each
        if not has_text(said):
            if blank and isinstance(said, str):
                continue
            raise UserError(f"{where}: needs its words, as a line, a text, or under {key!r}")
        texts.append(said)
    if not texts:
        raise UserError(f"{path}: holds no lines; give at least one")
    return texts


def json_lines(text: str) -> list[Any]:
    """The values of JSON lines that this package wrote; U+2028 and the like end no line, but stand in a string.

    >>> json_lines('{"a": "one\\u2028text"}\\n')
    [{'a': 'one\\u2028text'}]
    """
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def read_text(path: str | Path) -> str:
    """A file's text as it stands, without a byte order mark."""
    return _text(_bytes(str(path)), str(path))


def _is_json(first: str, text: str) -> bool:
    """Whether lines are JSON, and not plain text in brackets or quotes."""
    if first.startswith('"'):
        try:
            return isinstance(json.loads(first), str)
        except ValueError:
            return False
    return bool(re.match(r'\s*(\{|\[\s*["{\]])', text))


def read_table(path: str | Path, columns: Sequence[str]) -> list[tuple[dict[str, str], str]]:
    """The rows of a CSV file, each with where it stands, none of `columns` empty."""
    rows = _table(_rows_text(_bytes(str(path)), str(path)), str(path), ",;")
    if not rows:
        raise UserError(f"{path}: holds no rows; it must be a table with the columns {', '.join(columns)}")
    return [({column: text_of(row, column, where) for column in columns}, where) for row, where in rows]


def _records(data: bytes, path: str, *, known: bool = True) -> list[tuple[Any, str]] | None:
    """The rows of parquet or of a table; None for other files.

    Args:
        known: whether a table is also recognized by its head alone, if that has columns of rows.
    """
    if data[:4] == b"PAR1":
        return _parquet(data, path)
    text = _rows_text(data, path)
    head = text.lstrip().partition("\n")[0]
    suffix = Path(path.lower().removesuffix(".gz")).suffix
    if head.startswith(('{"', '[{"')):
        return None
    if suffix in DELIMITERS:
        return _table(text, path, DELIMITERS[suffix])
    for delimiter in DELIMITERS[".csv"] if known else "":
        columns = {cell.strip(' \r"').lower() for cell in head.split(delimiter)}
        if any({asked, answered} <= columns for asked, answered in PAIRS):
            return _table(text, path, delimiter)
    return None


def _json(text: str, path: str) -> list[tuple[Any, str]]:
    """The values of an array, or of lines; an object over several lines is one."""
    if text.lstrip().startswith("["):
        return [(value, f"{path}, item {i}") for i, value in enumerate(parse_json(text, path), 1)]
    # Other line separators may be part of a string.
    lines = [(line, f"{path}:{i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and lines[0][0].strip() == "{":
        return [(parse_json(text, path), lines[0][1])]
    return [(parse_json(line, where), where) for line, where in lines]


@ranks.by_first  # a pipe can be read once
def _bytes(path: str) -> bytes:
    try:
        data = whole(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give a file of JSON lines") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read; change its permissions") from None
    except (OSError, ValueError) as error:  # a name that can be no file's, a disk that fails
        if isinstance(error, UnicodeEncodeError):
            check_encoding(path)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path!r}: cannot be read ({reason}); give the path of a file") from None
    while data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: is gzip that is damaged or cut off ({error}); fetch it again") from None
    return data


def whole(path: str | Path) -> bytes:
    """A file's bytes; those of a pipe, which can be read once, are kept.

    Raises:
        OSError: it cannot be read.
    """
    return _piped(str(path)) if is_pipe(path) else Path(path).read_bytes()


def is_pipe(path: str | Path) -> bool:
    """Whether a path is that of a pipe, such as a shell makes of `<(command)`, and no file's or folder's."""
    return Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir())


@lru_cache(maxsize=16)
def _piped(path: str) -> bytes:
    return Path(path).read_bytes()


def _text(data: bytes, path: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = next((f", but {kind}" for begins, kind in OTHERS.items() if data.startswith(begins)), "")
        raise UserError(
            f"{path}: is not UTF-8 text (byte {error.start}){kind}; save it as JSON lines or CSV in UTF-8"
        ) from None


def _rows_text(data: bytes, path: str) -> str:
    """The text of a file of rows, its lines ended by line feeds also where old ones are carriage returns alone."""
    text = _text(data, path)
    if "\n" not in text:
        text = text.replace("\r", "\n")
    if found := re.search("\0|\n\ufeff", text):
        line = text.count("\n", 0, found.end()) + 1
        what = (
            "holds a NUL character, as UTF-16 without a byte order mark does; save it in UTF-8"
            if found[0] == "\0"
            else "begins with a byte order mark, as where files were joined; remove it, and a second head of a table"
        )
        raise UserError(f"{path}:{line}: {what}")
    return text


def _table(text: str, path: str, delimiters: str) -> list[tuple[Any, str]]:
    """The rows of a table with a head, delimited by what its head has most of."""
    told = re.match(r'"?sep=([,;\t|])"?[ \t]*\r?\n', text)  # a first line for Excel
    first = text[told.end() if told else 0 :].lstrip().partition("\n")[0]
    delimiter = told[1] if told else max(delimiters, key=first.count)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    source = io.StringIO(text, newline="")
    reader = csv.reader(source, delimiter=delimiter, strict=True, skipinitialspace=True)  # quotes after ", "
    if told:
        next(reader)
    head: list[str] = []
    rows: list[tuple[Any, str]] = []
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{where}: the table is broken here ({error}); put texts that hold quotes in quotes, and double those"
            ) from None
        if cells is None:
            return rows
        if not any(cell.strip() for cell in cells):
            continue
        if not head:
            head = [cell.strip() for cell in cells]
            _check_head(head, where)
            continue
        if any(cell.strip() for cell in cells[len(head) :]):
            raise UserError(
                f"{where}: has more cells than the head of the table; put texts with {delimiter!r} in quotes"
            )
        found = itertools.zip_longest(head, cells[: len(head)])
        rows.append(({name: _cell(name, cell) if cell else None for name, cell in found}, where))


def _cell(name: str, cell: str) -> Any:
    """A cell's text, or the list that it holds as JSON under a key of lists; what is no list stays a text."""
    if name.lower() not in LISTS or not cell.lstrip().startswith("["):
        return cell
    try:
        return parse_json(cell, name)
    except UserError:
        return cell


def _check_head(head: Sequence[str], where: str) -> None:
    """Refuse two columns of one name."""
    if twice := next((name for name in head if name and head.count(name) > 1), None):
        raise UserError(f"{where}: the table has two columns {twice!r}; rename or remove one")


def _parquet(data: bytes, path: str) -> list[tuple[Any, str]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: is parquet; pip install pyarrow to read it, or save it as JSON lines") from None
    try:
        _check_head(parquet.read_schema(io.BytesIO(data)).names, path)
        rows = parquet.read_table(io.BytesIO(data)).to_pylist()
    except UserError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"{path}: is parquet that cannot be read ({error}); fetch it again") from None
    return [(_plain(row), f"{path}, row {i}") for i, row in enumerate(rows, 1)]


def _hub(name: str, split: str, config: str | None) -> list[tuple[Any, str]]:
    return list(hub_rows(name, split, config))


GATED = re.compile(r"gated|\b40[13]\b|authenticat|log in", re.IGNORECASE)  # how the hub says that access is restricted


def refused(what: str, error: Exception, instead: str | None) -> UserError:
    """The error for a data set that the hub did not give: its answer in one sentence, and what one may do."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    mend = ["accept its terms on the hub and log in (hf auth login)"] if GATED.search(str(error)) else []
    mend += [] if instead is None else [instead]
    return UserError(
        f"{what}: could not be loaded {'as a file or ' if instead is None else ''}from the hub: {reason}"
        f"{'; ' if mend else ''}{', or '.join(mend)}"
    )


def hub_rows(
    name: str, split: str = "train", config: str | None = None, instead: str | None = None
) -> Iterator[tuple[Record, str]]:
    """The rows of a data set on the hub, read lazily, each with where it stands.

    Args:
        config: its configuration, where it has several.
        instead: what else one may do, such as "give --data-dir"; None where `name` may have been meant as a file.

    Raises:
        UserError: at once, if it cannot be loaded: no package, no network, no access, no such configuration or split.
    """
    what = f"{name if config is None else f'{name}, {config}'}:{split}"
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"{name}: there is no such file; for a data set on the hub, pip install 'dualoptim[hub]'"
            if instead is None
            else f"{what}: to read it from the hub, pip install 'dualoptim[hub]', or {instead}"
        ) from None
    try:
        rows = load_dataset(name, *([] if config is None else [config]), split=split)
    except Exception as error:  # whatever the hub answers
        raise refused(what, error, instead) from None
    return ((_plain(row), f"{what}, row {i}") for i, row in enumerate(rows, 1))


SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")


def file_of(base: str | Path, folder: str, stem: str, setting: str) -> Path | None:
    """A file or folder of a given name, with one of `SUFFIXES`, gzipped or not, or without; None if there is none.

    It is looked for in `base`, in its folder `folder`, and in a folder of that name beside it.

    Args:
        setting: the setting that gives `base`, for messages.
    """
    if not Path(base).is_dir():
        raise UserError(f"{setting} {base}: there is no such folder; give the one that holds {stem}.jsonl")
    names = [f"{stem}{suffix}{zipped}" for suffix in SUFFIXES for zipped in ("", ".gz")]
    places = (Path(base), Path(base) / folder, Path(base).parent / folder)
    return next((place / name for place in places for name in (*names, stem) if (place / name).exists()), None)


def hub_records(
    name: str, split: str, config: str | None = None, data_files: str | None = None
) -> list[tuple[Record, str]]:
    """The rows of a benchmark's data set on the hub, each with where it stands.

    Args:
        name: of the data set, "organization/name".
        split: of it.
        config: which of its configurations; None where it has one.
        data_files: which of its files, if these are no configuration.

    Raises:
        UserError: the package datasets is missing, or the hub does not give the rows, for instance of a gated set.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"reading {name} from the hub needs the package datasets; install it, or give --data-dir"
        ) from None
    part = data_files or (split if config is None else config if split == "train" else f"{config}/{split}")
    more = {"data_files": data_files} if data_files else {}
    try:
        rows = load_dataset(name, *([config] if config else []), split=split, **more)
    except Exception as error:  # whatever the hub answers
        raise refused(f"{name}, {part}", error, "give --data-dir") from None
    if not len(rows):
        raise UserError(f"{name}, {part}: has no rows on the hub; give --data-dir")
    return [(_plain(row), f"{name}/{part}:{i}") for i, row in enumerate(rows, 1)]


def _plain(row: Any) -> Record:
    """A row as JSON has it: dates as text, bytes too if they are UTF-8, and null for NaN."""

    def text(value: Any) -> Any:
        if not isinstance(value, bytes):
            return str(value)
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:  # such as an image; no text, so that it is refused where text is needed
            return {"bytes that are no UTF-8": len(value)}

    return dict(json.loads(json.dumps(dict(row), default=text), parse_constant=_nothing))


def _nothing(constant: str) -> None:
    """None for NaN, which tables of numbers have for an empty cell."""


def _object(pairs: list[tuple[str, Any]]) -> Record:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice; remove one")
    return found


def parse_json(text: str, where: str) -> Any:
    """Parse JSON, NaN as null; an error is reported in one sentence."""
    try:
        value = json.loads(text, parse_constant=_nothing, object_pairs_hook=_object)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(f"{where}: broken JSON{line}, column {error.colno}: {error.msg}") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{where}: {half!r} is half of a character; write the whole one, or remove it") from None
    except (ValueError, RecursionError) as error:  # repeated keys; numbers too long, nesting too deep
        raise UserError(f"{where}: JSON that cannot be read: {error}") from None
    return value
