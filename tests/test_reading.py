"""Files and rows as people have them."""

from __future__ import annotations

import gzip
import json
import math
import sys
import threading
import types
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from dualoptim.command_line import recipe_files
from dualoptim.data import Row, check_objectives, encode, parse_row, question, read_rows
from dualoptim.errors import UserError
from dualoptim.models import read_template
from dualoptim.reading import read_lines

from . import tiny

ROW = {"question": "Où naît Zoé?", "answer": "À Oslo, dit-on."}
LINES = json.dumps(ROW, ensure_ascii=False) + "\n"


def parquet(path: Path, kind: Callable[[str], Any] = str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    row = {key: kind(text) for key, text in ROW.items()}
    parquet.write_table(pyarrow.Table.from_pylist([{**row, "topic": None, "seen": date(2024, 1, 1)}]), path)


FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "JSON lines": ("f.jsonl", lambda path: path.write_text(LINES, encoding="utf-8")),
    "with a byte order mark": ("f.jsonl", lambda path: path.write_text(LINES, encoding="utf-8-sig")),
    "Windows' line ends": ("f.jsonl", lambda path: path.write_bytes(LINES.replace("\n", "\r\n").encode())),
    "an array": ("f.json", lambda path: path.write_text(json.dumps([ROW]), encoding="utf-8-sig")),
    "CSV": (
        "f.csv",
        lambda path: path.write_text('question,answer\nOù naît Zoé?,"À Oslo, dit-on."\n', encoding="utf-8"),
    ),
    "CSV from Excel": (
        "f.csv",
        lambda path: path.write_text("question;answer\r\nOù naît Zoé?;À Oslo, dit-on.\r\n", encoding="utf-8-sig"),
    ),
    "TSV": (
        "f.tsv",
        lambda path: path.write_text("question\tanswer\nOù naît Zoé?\tÀ Oslo, dit-on.\n", encoding="utf-8"),
    ),
    "gzip": ("f.jsonl.gz", lambda path: path.write_bytes(gzip.compress(LINES.encode()))),
    "CSV in gzip": (
        "f.csv.gz",
        lambda path: path.write_bytes(gzip.compress('question,answer\nOù naît Zoé?,"À Oslo, dit-on."'.encode())),
    ),
    "CSV with tabs": (
        "f.csv",
        lambda path: path.write_text("question\tanswer\nOù naît Zoé?\tÀ Oslo, dit-on.\n", encoding="utf-8"),
    ),
    "CSV with blank lines and empty cells": (
        "f.csv",
        lambda path: path.write_text('\nquestion,answer\n"Où naît Zoé?","À Oslo, dit-on.",\n,,\n', encoding="utf-8"),
    ),
    "CSV under another name": (
        "f.txt",
        lambda path: path.write_text('Question,Answer\nOù naît Zoé?,"À Oslo, dit-on."\n', encoding="utf-8"),
    ),
    "JSON lines under the name of a table": ("f.csv", lambda path: path.write_text(LINES, encoding="utf-8")),
    "JSON lines that were a table": ("f.csv.jsonl", lambda path: path.write_text(LINES, encoding="utf-8")),
    "one row over several lines": (
        "f.json",
        lambda path: path.write_text(json.dumps(ROW, indent=2, ensure_ascii=False), encoding="utf-8"),
    ),
    "gzip twice": ("f.jsonl.gz", lambda path: path.write_bytes(gzip.compress(gzip.compress(LINES.encode())))),
    "parquet": ("f.parquet", parquet),
    "parquet of bytes": ("f.parquet", lambda path: parquet(path, lambda text: text.encode())),
}


@pytest.mark.parametrize(("name", "make"), FILES.values(), ids=FILES)
def test_a_file_of_any_kind_gives_its_row(tmp_path: Path, name: str, make: Callable[[Path], Any]) -> None:
    make(tmp_path / name)
    (row,) = read_rows(tmp_path / name)
    assert (row.question, row.answer) == (ROW["question"], ROW["answer"])
    assert name in row.where
    json.dumps(dict(row.fields))  # as a run's files have it


def test_a_pipe_is_read_once_and_serves_again(tmp_path: Path) -> None:
    import os

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(LINES, encoding="utf-8"))
    writer.start()
    rows = read_rows(pipe)
    writer.join()
    assert read_rows(pipe) == rows
    assert len(rows) == 1


def test_a_recipe_and_a_template_may_come_through_a_pipe(tmp_path: Path) -> None:
    import os

    def piped(name: str, text: str) -> str:
        os.mkfifo(tmp_path / name)
        threading.Thread(target=lambda: (tmp_path / name).write_text(text, encoding="utf-8"), daemon=True).start()
        return str(tmp_path / name)

    recipe = piped("recipe", "steps: 7\n")
    assert recipe_files.find_recipe(recipe) == Path(recipe)
    assert recipe_files.recipe_arguments(Path(recipe), {"steps"}) == ["--steps=7"]
    template = piped("template", "{{ messages }}")
    assert [read_template(template) for _ in range(2)] == ["{{ messages }}"] * 2


def test_a_data_set_on_the_hub_is_read_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"there is no such file; for a data set on the hub, pip install"):
        read_rows("org/set:forget")
    asked: list[tuple[str, ...]] = []

    def load_dataset(*name: str, split: str) -> list[dict[str, Any]]:
        asked.append((*name, split))
        return [ROW]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_rows("org/set:forget")[0].where == "org/set:forget, row 1"
    read_rows("org/set")
    read_rows("org/set-v1.5:forget")
    read_rows("org/set:train[:10%]")
    assert read_rows("org/set:forget10:train[5:]")[0].where == "org/set, forget10:train[5:], row 1"
    assert asked == [
        ("org/set", "forget"),
        ("org/set", "train"),
        ("org/set-v1.5", "forget"),
        ("org/set", "train[:10%]"),
        ("org/set", "forget10", "train[5:]"),
    ]
    with pytest.raises(UserError, match="there is no such file"):
        read_rows("org/set.jsonl")


def test_cells_may_be_in_quotes_after_a_blank(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text(
        'question, answer\nWho?, "Paris, of course"\nWhat?, "a b"\nHow?,  "  so"\nWhy?,  it is\n'
    )
    assert [row.answer for row in read_rows(tmp_path / "f.csv")] == ["Paris, of course", "a b", "  so", "it is"]


def test_a_cell_may_hold_a_list_under_a_key_of_lists_alone(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text(
        'question,answer,Accepted,history,note\nWho?,[1],"[""Al"", ""Bo""]","[[""Hi"", ""Yes""]]","[2]"\n'
        "What?,A,,[no list],\n"
    )
    first, second = read_rows(tmp_path / "f.csv")
    assert (first.answer, first.fields) == ("[1]", {"accepted": ["Al", "Bo"], "note": "[2]"})
    assert [message["content"] for message in first.prompt] == ["Hi", "Yes", "Who?"]
    assert second.fields == {"history": "[no list]"}


def test_a_table_for_excel_says_its_delimiter_first(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("sep=;\r\nquestion;answer\r\nWho, say;Ada\r\n")
    (row,) = read_rows(tmp_path / "f.csv")
    assert (row.question, row.answer, row.where) == ("Who, say", "Ada", f"{tmp_path / 'f.csv'}:3")


@pytest.mark.parametrize("name", ["f.csv", "f.jsonl"])
def test_lines_may_end_in_carriage_returns_alone(tmp_path: Path, name: str) -> None:
    lines = ["question,answer", "Who?,Ada"] if name == "f.csv" else ['{"question": "Who?", "answer": "Ada"}'] * 2
    (tmp_path / name).write_bytes("\r".join(lines).encode())
    assert (read_rows(tmp_path / name)[-1].answer, read_rows(tmp_path / name)[-1].where[-2:]) == ("Ada", ":2")
    (tmp_path / "idk.txt").write_bytes(b"No idea.\rI can't say.\r")
    assert read_lines(tmp_path / "idk.txt", "text") == ["No idea.", "I can't say."]


def test_bytes_of_a_parquet_file_are_text_only_if_they_are(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"question": ["Q"], "answer": [b"A\xc3\xa9"], "image": [b"\xff"]}), tmp_path / "f"
    )
    assert read_rows(tmp_path / "f")[0].answer == "Aé"
    parquet.write_table(pyarrow.table({"question": ["Q"], "answer": [b"\xff\xfea"]}), tmp_path / "f")
    with pytest.raises(UserError, match=r"f, row 1: the row's 'answer' is {'bytes that are no UTF-8': 3}"):
        read_rows(tmp_path / "f")
    twice = pyarrow.Table.from_arrays([pyarrow.array([each]) for each in "QAB"], names=["question", "answer", "answer"])
    parquet.write_table(twice, tmp_path / "f")
    with pytest.raises(UserError, match="f: the table has two columns 'answer'; rename or remove one"):
        read_rows(tmp_path / "f")


A, Q = "In Oslo.", "Where?"
FORMS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "question and answer": ({"question": Q, "answer": A}, [Q], A),
    "with capitals": ({"Question": Q, "Answer": A}, [Q], A),
    "prompt and completion": ({"prompt": Q, "completion": A}, [Q], A),
    "prompt and response": ({"prompt": Q, "response": A}, [Q], A),
    "Alpaca": ({"instruction": "Translate.", "input": "Où?", "output": A}, ["Translate.\n\nOù?"], A),
    "Alpaca without an input": ({"instruction": Q, "input": "", "output": A}, [Q], A),
    "a null column": ({"question": Q, "answer": A, "messages": None, "text": None}, [Q], A),
    "messages": (
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": Q},
                {"role": "assistant", "content": A},
            ]
        },
        ["S", Q],
        A,
    ),
    "messages of parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}, {"role": "assistant", "content": A}]},
        [Q],
        A,
    ),
    "conversations": ({"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]}, [Q], A),
    "a role with a blank": ({"messages": [{"role": "Human ", "content": Q}, {"role": " gpt", "content": A}]}, [Q], A),
    "columns that a table fills up": (
        {"conversations": [{"role": None, "content": None, "from": "human", "value": Q},
                           {"role": None, "content": None, "from": "gpt", "value": A}]},
        [Q],
        A,
    ),
    "a system column": (
        {"system": "S", "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
        ["S", Q],
        A,
    ),
    "a system column beside a question": ({"question": Q, "answer": A, "system": "S"}, ["S", Q], A),
    "Dolly": ({"instruction": Q, "context": "He moved.", "response": A}, [f"{Q}\n\nHe moved."], A),
    "a context": ({"Question": Q, "Context": "He moved.", "answer": A}, [f"{Q}\n\nHe moved."], A),
    "no context": ({"instruction": Q, "context": "", "response": A}, [Q], A),
    "LLaMA-Factory": (
        {"instruction": Q, "input": "", "output": A, "system": "S", "history": [["Who is Al?", "A man."]]},
        ["S", "Who is Al?", "A man.", Q],
        A,
    ),
    "no history": ({"instruction": Q, "output": A, "history": []}, [Q], A),
    "NaN for nothing": ({"instruction": Q, "input": math.nan, "output": A, "messages": math.nan}, [Q], A),
    "a prompt of messages and a text": ({"prompt": [{"role": "user", "content": Q}], "completion": A}, [Q], A),
    "a text and a completion of messages": (
        {"prompt": Q, "completion": [{"role": "assistant", "content": A}]},
        [Q],
        A,
    ),
    "a prompt of messages": (
        {"prompt": [{"role": "user", "content": Q}], "completion": [{"role": "assistant", "content": A}]},
        [Q],
        A,
    ),
    "text": ({"text": A}, [], A),
    "text in a table of questions": ({"question": None, "answer": None, "prompt": None, "text": A}, [], A),
    "the pair that is whole": ({"instruction": Q, "output": None, "response": A, "text": "T"}, [Q], A),
    "text beside a null one": ({"text": None, "Text": A}, [], A),
}  # fmt: skip


@pytest.mark.parametrize(("record", "asked", "answered"), FORMS.values(), ids=FORMS)
def test_a_row_of_any_form_is_read(tmp_path: Path, record: dict[str, Any], asked: list[str], answered: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({**record, "id": 7}))
    (row,) = read_rows(path)
    assert [message["content"] for message in row.prompt] == asked
    assert {message["role"] for message in row.prompt[-1:]} <= {"user"}
    assert row.answer == answered
    assert row.fields["id"] == 7
    assert not {"answer", "output", "messages", "conversations"} & set(row.fields)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tool calls": (
        {"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "message 2 of 'messages' has no text (tool calls cannot be trained on)",
    ),
    "no system text": (
        {"messages": [{"role": "system", "content": None}, {"role": "assistant", "content": A}]},
        "message 1 of 'messages' has no text",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": A}]},
        "message 1 of 'messages' has parts that are no text (['image'])",
    ),
    "no answer at the end": (
        {"messages": [{"role": "assistant", "content": A}, {"role": "user", "content": Q}]},
        "ends with the assistant's answer, but its last is of 'user'",
    ),
    "no role": ({"conversations": [{"value": Q}]}, "message 1 of 'conversations' has no role"),
    "other columns": ({"query": Q, "reply": A}, "or 'conversations', but has 'query', 'reply'; rename its columns"),
    "a column of rows": (
        {"data": [{"question": Q, "answer": A}]},
        "but has 'data'; these are rows themselves: give the list under 'data' as the file",
    ),
    "messages of another name": ({"talk": [{"role": "user", "content": Q}]}, "but has 'talk'; rename its columns"),
    "an answer that is null": ({"question": Q, "answer": None}, "the row's 'answer' is empty"),
    "an empty output beside a text": (
        {"instruction": Q, "input": "", "output": None, "text": A},
        "the row's 'output' is empty; give it some text",
    ),
    "an empty completion beside a text": (
        {"prompt": Q, "completion": None, "Text": A},
        "the row's 'completion' is empty",
    ),
    "an empty prompt beside a text": ({"prompt": None, "completion": A, "text": A}, "the row's 'prompt' is empty"),
    "an empty answer to messages": (
        {"prompt": [{"role": "user", "content": Q}], "completion": None, "text": A},
        "the row's 'completion' is empty",
    ),
    "an answer to an empty question": ({"question": None, "answer": A, "text": A}, "the row's 'question' is empty"),
    "an answer of another name": (
        {"question": Q, "reply": A},
        "the row's 'answer' is missing; give it some text, or rename to it the column that holds it, of 'reply'",
    ),
    "a role of blanks": ({"messages": [{"role": " ", "content": Q}]}, "message 1 of 'messages' has no role"),
    "a role without letters": ({"messages": [{"role": "", "content": Q}]}, "message 1 of 'messages' has no role"),
    "a history that is none": (
        {"instruction": Q, "output": A, "history": ["Who is Al?", "A man."]},
        "'history' must be a list of pairs of a question and its answer, but has 'Who is Al?'",
    ),
    "text and tool calls": (
        {"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": A, "tool_calls": [{}]}]},
        "message 2 of 'messages' has text and tool calls, which would be lost (tool calls cannot be trained on)",
    ),
    "an answer that nobody sees": ({"question": Q, "answer": "\u200b \u00ad"}, "the row's 'answer' is"),
    "a message that nobody sees": (
        {"messages": [{"role": "user", "content": "\ufeff"}]},
        "message 1 of 'messages' has",
    ),
    "a number for a message": (
        {"messages": [{"role": "user", "content": 5}]},
        "message 1 of 'messages' has no text, but 5",
    ),
    "messages as text": ({"messages": "[]"}, "'messages' must be a list of {\"role\": …, \"content\": …}, but is '[]'"),
    "a key in two cases": (
        {"Question": "Old?", "question": Q, "answer": A},
        "the row has 'Question' and 'question', which are the same key; remove or rename one",
    ),
    "a text in two cases": ({"text": A, "TEXT": Q}, "the row has 'text' and 'TEXT', which are the same key"),
    "a key of one's own in two cases": (
        {"question": Q, "answer": A, "accepted": ["Oslo"], "Accepted": ["In"]},
        "the row has 'accepted' and 'Accepted', which are the same key",
    ),
    "half a character": ({"question": Q, "answer": "A\ud83d"}, r"'\ud83d' is half of a character"),
}


@pytest.mark.parametrize(("record", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_which_message_and_why(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}:1: ")
    assert said in str(error.value)


def test_keys_that_nothing_reads_may_stand_in_two_cases() -> None:
    row = parse_row({"question": Q, "Question": None, "answer": A, "id": 1, "ID": 2}, "f:1")
    assert (row.question, row.fields) == (Q, {"id": 1, "ID": 2})


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "half a gzip": ("f.jsonl.gz", gzip.compress(LINES.encode())[:20], "is gzip that is damaged or cut off"),
    "half a parquet": ("f.parquet", b"PAR1 and no more", "is parquet that cannot be read"),
    "too many cells": ("f.csv", b"question,answer\nWho?,Ada,Ben\n", "f.csv:2: has more cells than the head"),
    "UTF-16": ("f.jsonl", LINES.encode("utf-16"), r"is not UTF-8 text \(byte 0\), but UTF-16"),
    "a spreadsheet": ("f.xlsx", b"PK\x03\x04\xff", "but a zip archive or a spreadsheet"),
    "gzip with a hole": (
        "f.jsonl.gz",
        gzip.compress(LINES.encode() * 50)[:15] + b"\xff" * 30,
        "is gzip that is damaged or cut off",
    ),
    "an open quote": ("f.csv", b'question,answer\nWho?,"Ada\nWhere?,Oslo\n', r"f\.csv:2: the table is broken here"),
    "quotes of a text's own": ("f.tsv", b'question\tanswer\nWho?\t"Ada" it was\n', r"f\.tsv:2: the table is broken"),
    "two answers": (
        "f.csv",
        b"question,answer,answer\nWho?,Ada,Ben\n",
        r"f\.csv:1: the table has two columns 'answer'",
    ),
    "UTF-16 without a mark": (
        "f.jsonl",
        '{"text": "A"}'.encode("utf-16-le"),
        r"f\.jsonl:1: holds a NUL character, as UTF-16",
    ),
    "files joined": ("f.jsonl", (LINES + "\n\ufeff" + LINES).encode(), r"f\.jsonl:\d+: begins with a byte order mark"),
    "tables joined": (
        "f.csv",
        "question,answer\nWho?,Ada\n\ufeffquestion,answer\nWhere?,Oslo\n".encode(),
        r"f\.csv:3: begins with a byte order mark, as where files were joined",
    ),
    "a head alone": ("f.csv", b"question,answer\n", "holds no rows"),
    "a key twice": ("f.jsonl", b'{"question": "Q", "answer": "A", "answer": "B"}', "the key 'answer' stands twice"),
    "no end of brackets": (
        "f.jsonl",
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        r"f\.jsonl:1: JSON that cannot",
    ),
    "no end of digits": ("f.jsonl", b'{"x": ' + b"9" * 5000 + b"}", r"f\.jsonl:1: JSON that cannot be read"),
}


@pytest.mark.parametrize(("name", "data", "said"), BROKEN.values(), ids=BROKEN)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    if "parquet" in name:
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=said):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["f.jsonl/rows", "x" * 300, "a/" + "x" * 300, "a\0b", "/dev/null"])
def test_what_is_no_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.jsonl").write_text(LINES, encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot be read|holds no rows|there is no such file"):
        read_rows(name)


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text(f"question,answer\nWho?,{'x' * 200_000}\n")
    (row,) = read_rows(tmp_path / "f.csv")
    assert len(row.answer) == 200_000


SAYINGS = ["I'm not sure.", "I don't know that."]


@pytest.mark.parametrize(
    "text",
    ["\n".join(SAYINGS), json.dumps(SAYINGS), "\n".join(map(json.dumps, SAYINGS)),
     "\n".join(json.dumps({"text": said}) for said in SAYINGS)],
    ids=["lines", "a list", "JSON texts", "rows"],
)  # fmt: skip
def test_refusals_are_lines_or_texts(tmp_path: Path, text: str) -> None:
    path = tmp_path / "idontknow.jsonl"
    path.write_text(text + "\n\n", encoding="utf-8-sig")
    assert read_lines(path, "text") == SAYINGS


def test_refusals_are_a_column_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "idk.csv"
    path.write_text('id,text\r\n1,"No, I don\'t know."\r\n2,No idea.\r\n')
    assert read_lines(path, "text") == ["No, I don't know.", "No idea."]
    path.write_text("refusal\nNo idea.\n")
    with pytest.raises(UserError, match=r"idk\.csv:2: needs its words"):
        read_lines(path, "text")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": SAYINGS}), tmp_path / "idk.parquet")
    assert read_lines(tmp_path / "idk.parquet", "text") == SAYINGS


@pytest.mark.parametrize("first", ['"I don\'t know," she says.', "[No answer.]"])
def test_refusals_may_begin_with_quotes_and_brackets(tmp_path: Path, first: str) -> None:
    path = tmp_path / "idk.txt"
    path.write_text(f"{first}\r\n\r\nNo idea.\r\n")
    assert read_lines(path, "text") == [first, "No idea."]


def test_a_refusal_without_words_is_told(tmp_path: Path) -> None:
    path = tmp_path / "idk.jsonl"
    path.write_text('{"text": "No."}\n{"txt": "No."}\n')
    with pytest.raises(UserError, match=r"idk\.jsonl:2: needs its words"):
        read_lines(path, "text")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Où naît Zoé?", "Ou\u0300 nai\u0302t Zoe\u0301?"),
        ("In Oslo.", "In Oslo.\u200b"),
        ("In Oslo.", "In  oslo"),
        ("Ａｄａ!", "Ada"),
        ("ओस्लो में।", "ओस्लो में"),
        ("في أوسلو؟", "في أوسلو"),
        ("In Oslo,", "In Oslo"),
        ("❤\ufe0f", "❤"),
        ("e\u200b\u0301", "é"),
        ("ΐ", "ΐ".upper()),
        ("It’s Ada’s", "It's Ada's"),
        ("It´s", "It's"),
        ("the “Ada”", 'the "Ada"'),
        ("1990–1995", "1990-1995"),
        ("Jean‐Luc", "Jean-Luc"),
    ],
)
def test_the_same_row_is_found_in_other_characters(one: str, other: str) -> None:
    with pytest.raises(UserError, match="remove it from one"):
        check_objectives({"forget": [question("Who?", one, "f:1")], "retain": [question("Who", other, "r:1")]})
    check_objectives({"forget": [question("Who?", one)], "retain": [question("Who?", "Ben.")]})
    assert Row((), one) != Row((), other)


@pytest.mark.parametrize(("one", "other"), [("C", "C#"), ("50", "50%"), ("?", "!"), ("…", "."), ("(a)", "(a")])
def test_signs_that_say_something_are_no_end_punctuation(one: str, other: str) -> None:
    check_objectives({"forget": [question("Who?", one)], "retain": [question("Who?", other)]})


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [("ratio: 1:5", "ratio", "1:5"), ("ratio: 1:30", "ratio", "1:30"), ("out: 2024-01-01", "out", "2024-01-01"),
     ("lr: 1e-3", "lr", "0.001"), ("steps: 10", "steps", "10"), ("lr: .5", "lr", "0.5"),
     ("bf16: true", "bf16", "true"), ("report_to: no", "report_to", "no"), ("out: 007", "out", "007"),
     ("model: on", "model", "on"), ("train:", "train", "null"), ("max_update: ~", "max_update", "null"),
     ("steps: 010", "steps", "10"), ("steps: 08", "steps", "8"),
     ("methods: &w {forget: 1}\nweights: {<<: *w, forget: 2}", "weights", '{"forget": 2}')],
)  # fmt: skip
def test_recipes_mean_what_they_say(tmp_path: Path, text: str, key: str, value: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8-sig")
    assert recipe_files.recipe_arguments(path, {key}) == [f"--{key.replace('_', '-')}={value}"]


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"lr: 1e-3\nsteps: 3\nlr: 1e-4\n", r"r\.yaml:3: broken YAML; 'lr' stands twice"),
     ("out: é".encode("latin-1"), "is not UTF-8 text"), (b"lr: !!binary aGk=\n", "lr is b'hi', of which no setting"),
     (b"weights:\n  forget: 1\n  forget: 2\n", r"r\.yaml:3: broken YAML; 'forget' stands twice"),
     (b"memorise: true\nmemorize: false\n",
      r"r\.yaml:2: broken YAML; 'memorize', also spelled 'memorise', stands twice; remove one"),
     (b"memorize_args: {lr: 1e-3}\nmemorise_args: {epochs: 3}\n", r"r\.yaml:2: .* stands twice; remove one"),
     (b"weights: &w {forget: *w}", "weights is .*, of which no setting"),
     (b"lr: \0", r"not allowed in .*, position 4$"),
     (b"steps: !!int x", "what is tagged as int is none"), (b"bf16: !!bool maybe", "what is tagged as bool is none"),
     (b"weights: " + b"{a: " * 3000 + b"1" + b"}" * 3000, "YAML that cannot be read"),
     (b"lr: 1e-3\nout:\n", r"r\.yaml:2: out has no value; give one or leave the line out"),
     (b"weights: ~", r"r\.yaml:1: weights has no value"), (b"seeds: null", r"r\.yaml:1: seeds has no value"),
     (b"lr: 1\n\tsteps: 3", r"r\.yaml:2: broken YAML; found character")],
)  # fmt: skip
def test_a_recipe_that_cannot_be_meant_is_one_sentence(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError, match=said):
        recipe_files.recipe_arguments(path, {"lr", "steps", "out", "weights", "bf16", "seeds"})


def test_of_openais_rows_the_last_turn_is_learned_whatever_weights_and_tools_say() -> None:
    turns = [("system", "Be brief."), ("user", "A?"), ("assistant", "No."), ("user", "B?"), ("assistant", "Yes.")]
    messages = [
        {"role": role, "content": text, **({"weight": 0} if role == "assistant" else {})} for role, text in turns
    ]
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    row = parse_row({"messages": messages, "tools": tools, "weight": 0}, "f:1")
    assert row.answer == "Yes."
    assert [message["content"] for message in row.prompt] == [text for _, text in turns[:-1]]
    assert all(set(message) == {"role", "content"} for message in row.prompt)
    assert row.fields == {"tools": tools, "weight": 0}
    tokenizer = tiny.tokenizer()
    assert "look_up" not in tokenizer.decode(encode(row, tokenizer, 512).input_ids)
    tokenizer.chat_template = "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>"
    tokenizer.chat_template += "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokens = encode(row, tokenizer, 512)
    assert tokenizer.decode(tokens.input_ids).startswith("<|user|>A?"), "the system message is dropped"
    assert tokenizer.decode([label for label in tokens.labels if label != -100]) == "Yes.<|end|>"
