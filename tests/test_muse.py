"""MUSE as a task: chunks, prompts, numbers, folds, the hub, and what does not fit."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer

from dualoptim import cli, runs
from dualoptim.data import Row, encode
from dualoptim.errors import UserError
from dualoptim.evaluation import scoring
from dualoptim.losses import IGNORED
from dualoptim.tasks.muse import HUB, Muse

from . import muse, tiny

LENGTH = 64  # tokens of a chunk, which are letters here


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    muse.write(tmp_path / "muse")
    tiny.save(tmp_path / "model")
    return tmp_path


def task(data_dir: str | None = "muse", **arguments: Any) -> Muse:
    return Muse(data_dir, tokenizer="model", max_length=LENGTH, **arguments)


def together(rows: Any) -> str:
    return "".join(row.answer for row in rows)


def text_of(*names: str) -> str:
    return "".join("\n\n".join(row["text"] for row in muse.files()[name]) for name in names)


# Chunks


def test_texts_are_put_together_and_cut_into_chunks_none_of_which_ends() -> None:
    found, words = task(), tiny.tokenizer()
    assert together(found.objectives["forget"]) == text_of("raw/forget")
    assert together(found.objectives["retain"]) == text_of("raw/retain1")
    assert together(found.retained) == text_of("raw/retain1", "raw/retain2")
    assert together(found.known()) == text_of("raw/forget", "raw/retain1", "raw/retain2")
    tokens = [encode(row, words, LENGTH) for row in found.known()]
    assert max(len(t.input_ids) for t in tokens) <= LENGTH
    # All of a text is learnt, and what would end it never.
    assert all([x for x in t.labels if x != IGNORED] == t.input_ids[1:] and t.ended == 0 for t in tokens)
    assert words.eos_token_id not in {x for t in tokens for x in t.input_ids[1:]}
    assert len(task(forget_rows=2, retain_rows=1).objectives["forget"]) == 2


def test_a_file_that_was_changed_is_read_again(place: Path) -> None:
    assert together(task().objectives["forget"]) == text_of("raw/forget")
    (path,) = (place / "muse").rglob("raw/forget*")
    path.write_text(json.dumps({"text": "Another text."}) + "\n", encoding="utf-8")
    assert together(task().objectives["forget"]) == "Another text."


def test_a_fold_of_scal_holds_those_before_it_and_folds_of_sust_follow_each_other() -> None:
    assert together(task(subset="scal", fold=3).objectives["forget"]) == text_of("scal/forget_3")
    several = task(subset="sust", fold=[1, 3])
    (first, second) = (task(**arguments) for arguments in several.stages())
    assert together(first.objectives["forget"]) == text_of("sust/forget_1") == text_of("raw/forget")
    assert together(second.objectives["forget"]) == text_of("sust/forget_3")
    assert together(second.objectives["retain"]) == together(first.objectives["retain"])
    assert first.known() == second.known()
    assert together(second.known()).startswith(text_of(*(f"sust/forget_{i}" for i in range(1, 5))))
    assert second.notes
    assert not first.notes
    assert not task(subset="sust", fold=2).stages()


# Prompts and numbers


def test_questions_stand_behind_answered_ones_and_replies_end_where_the_model_asks_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[int, list[Any]] = {}
    said = {128: "the harbor had pears", 32: "0 ships\nof plums\n\nQuestion: What?"}

    def replies(model: Any, tokenizer: Any, prompts: Any, *, max_new_tokens: int, progress: Any) -> list[str]:
        asked.setdefault(max_new_tokens, []).extend(prompts)
        return [said[max_new_tokens]] * len(prompts)

    monkeypatch.setattr(scoring, "replies", replies)
    records = task().score(tiny.model(), tiny.tokenizer())
    shots = "Question: Who {0}s 0?\nAnswer: Ada 0\n\nQuestion: Who {0}s 1?\nAnswer: Ada 1\n\n"
    expected = [
        f"{shots.format(s)}Question: What of the {s} {i}?\nAnswer: " for s in ("forget", "retain") for i in range(3)
    ]
    assert [prompt[0] for prompt in asked[32]] == [{"role": "text", "content": text} for text in expected]
    assert [prompt[0]["content"] for prompt in asked[128]] == ["Report 0 on plums:", "Report 1 on plums:"]
    numbers, _ = Muse.numbers(records)
    plain = RougeScorer(["rougeL"], use_stemmer=False)
    text = ("the harbor had plums" * 9)[:128]  # of as many tokens as the reply may have
    assert numbers["verbatim"] == pytest.approx(plain.score(text, said[128])["rougeL"].fmeasure)
    answers = [plain.score(f"{i} ships", "0 ships\nof plums")["rougeL"].fmeasure for i in range(3)]
    assert numbers["forget_knowledge"] == numbers["retain_knowledge"] == pytest.approx(fmean(answers))


def test_privacy_leaks_as_published_against_a_retrained_model() -> None:
    found, words = task(), tiny.tokenizer()
    model, other = tiny.model(), tiny.model(1)
    records, retrained = found.score_retrained(model, words), found.score_retrained(other, words)

    def area(model: Any) -> float:
        """Of the forgotten texts as the positive ones, by the mean surprise of the 40 % least probable tokens."""
        scores = {}
        for name in ("forget", "holdout"):
            rows = [Row((), row["text"], chunk=(1, 2)) for row in muse.files()[f"privleak/{name}"]]
            likely = [sorted(a.log_probs) for (a,) in scoring.answers(model, words, [[row] for row in rows])]
            assert [len(a) for a in likely] == [len(row.answer) for row in rows]
            scores[name] = [-fmean(a[: int(0.4 * len(a))]) for a in likely]
        return fmean(float(f > h) for h in scores["holdout"] for f in scores["forget"])

    a, a_retrained = area(model), area(other)
    numbers = Muse.numbers(records, retrained).numbers
    assert numbers["auc_min_k_40"] == pytest.approx(1 - a)
    leaks = 100 * (a - a_retrained) / a_retrained if a_retrained else None
    assert numbers["privacy_leakage"] == (None if leaks is None else pytest.approx(leaks))
    alone = Muse.numbers(records)
    assert alone.numbers["privacy_leakage"] is None
    assert "no model retrained without the texts to forget" in alone.missing["privacy_leakage"]


def test_a_text_that_is_a_little_too_long_is_read_as_far_as_the_model_goes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = (79, 80, 81, 92, 103, 200)
    rows = [{"text": ("tea " * 50)[:count]} for count in lengths]
    muse.write(place / "muse", privleak_forget=rows)
    monkeypatch.setattr("dualoptim.tasks.muse.positions", lambda model: 80)
    records = task().score_retrained(tiny.model(), tiny.tokenizer())
    read = [len(record["answer"]) for record in records if record["set"] == "forget_texts"]
    assert read == [79, 79, 79, 79, 79, 79]  # the last word ends there, before a blank


def test_privacy_leakage_of_given_records() -> None:
    def records(forget: list[float], holdout: list[float]) -> list[dict[str, Any]]:
        return [
            {"set": f"{n}_texts", "min_k": x} for n, part in (("forget", forget), ("holdout", holdout)) for x in part
        ]

    numbers = Muse.numbers(records([-1.0, -2.0], [-3.0, -1.5]), records([-2.0, -2.0], [-1.0, -3.0])).numbers
    assert numbers["auc_min_k_40"] == 0.75
    assert numbers["privacy_leakage"] == pytest.approx(100 * (0.25 - 0.5) / 0.5)


# Whole runs


def test_one_command_forgets_folds_one_after_the_other_and_measures_each(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folds = '{"subset": "sust", "fold": [1, 2], "scored_rows": 1}'
    options = ["--model", "model", "--task", "muse", "--data-dir", "muse", "--task-args", folds, "--retrained", "model"]
    options += [
        "--max-length",
        str(LENGTH),
        "--forget-loss",
        "NPO",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--lr",
        "0.01",
    ]
    assert cli.main(["unlearn", *options, "--dry-run"]) == 0
    assert "━━ part 2, 2 of 2, from what the one before left ━━" in capsys.readouterr().out
    assert cli.main(["unlearn", *options, "--curve-points", "1", "--out", "out"]) == 0
    one, two = json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))["runs"]
    assert (one["part"], two["part"]) == (1, 2)
    # None leaks beside itself, unless it tells all texts apart.
    assert one["before"]["privacy_leakage"] == (0 if one["before"]["auc_min_k_40"] < 1 else None)
    left = {name: None if n is None else pytest.approx(n, rel=1e-3, abs=1e-3) for name, n in one["after"].items()}
    assert two["before"] == left
    for i, entry in enumerate((one, two), 1):
        _, records = runs.read_records(place / "out" / "dualoptim-plus-seed0" / f"part{i}")
        assert Muse.numbers(records["after"], records["retrained"]).numbers == entry["after"]
        assert set(entry["not_computed"]) <= {"privacy_leakage"}


# The hub


def test_the_hub_gives_what_a_folder_in_its_layout_gives(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str, *, split: str) -> Any:
        assert name == HUB["books"]
        try:
            return muse.files(folds=False)[f"{config}/{split}"]
        except KeyError:
            raise ValueError(f'Unknown split "{split}".') from None

    package = ModuleType("datasets")
    package.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    from pyarrow import Table, parquet

    for name, rows in muse.files().items():
        path = place / "books" / f"{name}-00000-of-00002.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        for part, some in enumerate((rows[:1], rows[1:])):
            parquet.write_table(Table.from_pylist(some), str(path).replace("-00000", f"-0000{part}"))
    ours, theirs, shards = task(), task(None, corpus="books"), task(str(place), corpus="books")
    for other in (theirs, shards):
        assert together(other.known()) == together(ours.known())
        assert (other.questions, other.shots) == (ours.questions, ours.shots)
        assert other.passages_to_forget == ours.passages_to_forget
        assert {n: together(rows) for n, rows in other.texts.items()} == {n: together(r) for n, r in ours.texts.items()}


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (
            OSError("401 Client Error.\nPlease log in"),
            "401 Client Error; accept its terms on the hub and log in .*, or give",
        ),
        (ValueError('Unknown split "forget".'), 'Unknown split "forget"; give --data-dir$'),
        ([], "has no rows on the hub; give --data-dir"),
    ],
    ids=["gated", "split", "empty"],
)
def test_what_the_hub_refuses_is_told(answer: Any, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    package = ModuleType("datasets")
    package.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    with pytest.raises(UserError, match=f"muse-bench/MUSE-News, raw/forget: .*{told}"):
        task(None)


# What does not fit


def without(name: str) -> Callable[[Path], None]:
    return lambda place: (place / "muse" / f"{name}.jsonl").unlink()


def a_part_of_two(place: Path) -> None:
    from pyarrow import Table, parquet

    without("raw/retain1")(place)
    parquet.write_table(Table.from_pylist([{"text": "a"}]), place / "muse" / "raw" / "retain1-00000-of-00002.parquet")


def nothing(place: Path) -> None:
    """The files as they are."""


WRONG: dict[str, tuple[dict[str, Any], Callable[[Path], Any], str]] = {
    "corpus": ({"corpus": "book"}, nothing, "unknown corpus of MUSE 'book'; did you mean 'books'"),
    "subset": ({"subset": "fold"}, nothing, "unknown subset of MUSE 'fold'; known are raw, scal, sust"),
    "books": ({"corpus": "books", "subset": "sust"}, nothing, "sust has folds of the news alone; take subset raw"),
    "fold of raw": ({"fold": 2}, nothing, "raw has one fold, but fold is 2; take subset scal or sust"),
    "fold": ({"subset": "sust", "fold": 5}, nothing, "fold is a number from 1 to 4, or different ones, but is 5"),
    "folds": ({"subset": "scal", "fold": [1, 2]}, nothing, "folds of scal hold each other, so give one"),
    "count": ({"forget_rows": 0}, nothing, "forget_rows must be > 0, but is 0"),
    "file": ({}, without("knowmem/retain_qa_icl"), "muse: has no knowmem/retain_qa_icl.jsonl, nor knowmem/retain_qa"),
    "split": ({"subset": "sust", "fold": 2}, without("sust/forget_2"), "muse: has no sust/forget_2.jsonl"),
    "shards": ({}, a_part_of_two, "retain1-00000-of-00002.parquet: of its parts there are 1 in .*raw; put all of them"),
    "rows": ({}, lambda p: (p / "muse" / "raw" / "forget.jsonl").write_text("\n"), "forget.jsonl: holds no rows"),
    "text": ({}, lambda p: muse.write(p / "muse", raw_forget=[{"txt": "a"}]), "forget.jsonl:1: the row's 'text' is mi"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_told_in_one_sentence(wrong: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, change, told = WRONG[wrong]
    change(place)
    options = ["--task", "muse", "--task-args", json.dumps(arguments), "--max-length", "64", "--out", "out"]
    assert cli.main(["unlearn", "--model", "model", "--data-dir", "muse", *options]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.search(told, line), line
    assert not (place / "out").exists()


def test_a_folder_that_is_not_there_and_a_model_that_cannot_cut_are_told(place: Path) -> None:
    with pytest.raises(UserError, match="data_dir mouse: there is no such folder; give the one that holds raw/"):
        task("mouse")
    with pytest.raises(UserError, match="'tiny' makes its tokenizer of the rows, so it cannot cut them"):
        Muse("muse", tokenizer="tiny")
