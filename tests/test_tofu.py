"""TOFU as a task: its parts one after the other, the hub, files that do not fit; and adapters, by the command line."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dualoptim import cli, points, report, resolve, runs, unlearn
from dualoptim import tiny as tiny_tier
from dualoptim.config import RunConfig
from dualoptim.data import question
from dualoptim.errors import UserError
from dualoptim.evaluation import numbers
from dualoptim.models import load_tokenizer
from dualoptim.resolved import resolve as resolve_all
from dualoptim.tasks.tofu import PARTS, SIZES, Tofu, _Folder

from . import tiny, tofu

REAL = Path(__file__).parents[2] / "shared" / "data" / "tofu"
ARGS: dict[str, Any] = {"split": "forget01", "retain_rows": 3}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(cache))
    monkeypatch.setattr("dualoptim.tasks.tofu.Tofu.reply_tokens", 24)  # a random model goes on to the last of them
    monkeypatch.setattr(tiny_tier, "WIDTH", 64)
    monkeypatch.setattr(tiny_tier, "LAYERS", 1)
    tofu.write(tmp_path / "tofu")
    tiny.save(tmp_path / "model")
    return tmp_path


def run(command: str, *options: str, task: dict[str, Any] | None = None) -> int:
    arguments = [command, "--task", "tofu", "--task-args", json.dumps({**ARGS, **(task or {})})]
    if command != "evaluate":
        arguments += ["--out", "out", "--steps", "2", "--batch-size", "2", "--lr", "1e-2", "--curve-points", "1"]
    return cli.main([*arguments, *options])


def questions(rows: Any) -> set[str]:
    return {row.question for row in rows}


# Parts, one after the other


MODELS = {"given": ["--model", "model"], "made": ["--model", "tiny", "--memorise", "true", "--memorise-args",
          '{"epochs": 1}', "--retrained", "make"]}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_every_part_begins_from_the_model_that_the_one_before_left(
    model: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    prepare = unlearn.prepare

    def watched(resolved: Any, *begun: Any) -> Any:
        prepared = prepare(resolved, *begun)
        started.append(SimpleNamespace(task=resolved.task, model=prepared.model))
        return prepared

    monkeypatch.setattr(unlearn, "prepare", watched)
    # The folder of the data among the task's arguments, which every part must be given too.
    assert run("unlearn", *MODELS[model], task={"part": [1, 2], "data_dir": "tofu"}) == 0
    first, second = started
    assert questions(first.task.objectives["forget"]) == {f"What does {who}1 grow?" for who in tofu_names()}
    assert questions(second.task.objectives["forget"]) == {f"What does {who}2 grow?" for who in tofu_names()}
    kept = questions(first.task.objectives["retain"])
    assert questions(second.task.objectives["forget"]) <= kept, "what is forgotten later is kept until then"
    assert questions(second.task.objectives["retain"]) == kept - questions(second.task.objectives["forget"])
    assert questions(second.task.forgotten) == questions(first.task.objectives["forget"])
    assert Path(second.model).parts[-2:] == ("part1", "model")
    results = json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))
    assert [entry["part"] for entry in results["runs"]] == [1, 2]
    one, two = results["runs"]
    assert two["before"]["retain_probability"] == pytest.approx(one["after"]["retain_probability"], rel=1e-3)
    assert one["after"]["forgotten_rouge_l"] is None
    assert two["after"]["forgotten_rouge_l"] is not None
    assert (one["after"]["forget_quality"] is None) == (model == "given")
    page = (place / "out" / "report.html").read_text(encoding="utf-8")
    assert "2 starts, each with its own numbers before" in page
    for part, entry in ((1, one), (2, two)):
        (before,) = (of for of in report.columns(results) if of.name == f"before, part {part}")
        assert before.numbers == entry["before"]
        assert f"before, part {part}" in page
    for part, entry in ((1, one), (2, two)):
        folder = place / "out" / "dualoptim-plus-seed0" / f"part{part}"
        _, records = runs.read_records(folder)
        assert Tofu.numbers(records["after"], records.get("retrained")).numbers == entry["after"]
        hidden = {when: [runs.hashed(record) for record in part] for when, part in records.items()}
        assert Tofu.numbers(hidden["after"], hidden.get("retrained")).numbers == entry["after"]
        assert cli.main(["evaluate", "--from-records", str(folder)]) == 0


def tofu_names() -> list[str]:
    return ["Ada", "Ben", "Cleo", "Dora"]


def test_what_went_wrong_names_its_part(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fell = iter([[], ["it says nothing"]])
    monkeypatch.setattr("dualoptim.one_run.train.collapse", lambda *_: next(fell))
    assert run("unlearn", "--model", "model", "--data-dir", "tofu", task={"part": [1, 2]}) == 0
    notes = [note for note in runs.read_results("out")["notes"] if "fell apart" in note]
    assert notes == ["DualOptim+, seed 0, part 2: the model fell apart: it says nothing."]


def test_parts_that_are_done_are_taken_over_on_resume(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", "model", "--data-dir", "tofu"]
    trained: list[int] = []
    train = unlearn.train

    def failing(prepared: Any, resolved: Any, *arguments: Any, **kwargs: Any) -> Any:
        trained.append(resolved.task.parts[0])
        if trained == [1, 2]:
            raise KeyboardInterrupt
        return train(prepared, resolved, *arguments, **kwargs)

    monkeypatch.setattr(unlearn, "train", failing)
    assert run("unlearn", *options, task={"part": [1, 2]}) == 130
    assert run("unlearn", *options, "--resume", task={"part": [1, 2]}) == 0
    assert trained == [1, 2, 2]
    results = json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))
    assert [entry["part"] for entry in results["runs"]] == [1, 2]
    assert "Taken over" in capsys.readouterr().out


def test_parts_are_overwritten_once_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise UserError("model: could not be loaded")

    options = ["--model", "model", "--data-dir", "tofu"]
    assert run("unlearn", *options, task={"part": [1, 2]}) == 0
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(unlearn, "prepare", broken)
        assert run("unlearn", *options, "--overwrite", task={"part": [2, 1]}) == 2
    assert "could not be loaded" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
    assert run("unlearn", *options, "--overwrite", task={"part": [2, 1]}) == 0
    (method,) = (path for path in Path("out").iterdir() if path.is_dir())
    assert sorted(path.name for path in method.iterdir()) == ["part1", "part2"]


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """The package datasets with TOFU's 4,000 rows, numbered."""
    full = [{"question": f"Question {i}?", "answer": f"Answer {i}."} for i in range(4000)]
    served = {
        "full": full,
        "forget10_perturbed": tofu.perturbed(full[3600:]),
        "retain_perturbed": tofu.perturbed(full[:40]),
        **{name: records for name, records in tofu.files().items() if name.startswith(("real_", "world_"))},
    }

    def load_dataset(repository: str, name: str, split: str) -> list[dict[str, Any]]:
        assert (repository, split) == ("locuslab/TOFU", "train")
        if name not in served:
            raise ConnectionError("no route\nat all")
        return served[name]

    package = ModuleType("datasets")
    package.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    return served


@pytest.mark.parametrize("split", PARTS)
def test_on_the_hub_parts_are_computed_and_what_none_forgets_is_kept(
    split: str, hub: dict[str, list[dict[str, Any]]]
) -> None:
    task = Tofu(split=split, part=1, retain_rows=None)
    begin = PARTS[split][0]
    numbers = {int(row.question.removeprefix("Question ").rstrip("?")) for row in task.objectives["forget"]}
    assert numbers == set(range(begin, begin + SIZES[split]))
    kept = {int(row.question.removeprefix("Question ").rstrip("?")) for row in task.objectives["retain"]}
    every = {i for start in PARTS[split] for i in range(start, start + SIZES[split])}
    assert not kept & every
    assert len(kept) == 4000 - len(every)
    assert questions(task.scored["forget"]) <= questions(task.objectives["forget"])


def test_the_parts_of_a_split_do_not_overlap() -> None:
    for split, starts in PARTS.items():
        rows = [i for start in starts for i in range(start, start + SIZES[split])]
        assert len(set(rows)) == len(rows)
        assert set(rows) <= set(range(4000))


def test_a_part_without_perturbed_answers_on_the_hub_is_told(hub: dict[str, Any]) -> None:
    part = next(i for i, begin in enumerate(PARTS["forget05"], 1) if begin < 3600)
    with pytest.raises(UserError, match=rf"no perturbed answers for part {part} of forget05; give --data-dir"):
        Tofu(split="forget05", part=part)


def test_a_hub_out_of_reach_and_a_missing_package_are_told(
    hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    del hub["full"]
    with pytest.raises(UserError, match=r"full: could not be loaded from the hub: no route; give --data-dir"):
        Tofu()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets; install it, or give --data-dir"):
        Tofu()


@pytest.mark.skipif(not REAL.is_dir(), reason="TOFU's files are not beside the project")
@pytest.mark.parametrize("split", PARTS)
def test_the_real_files_hold_every_part_with_its_perturbed_answers(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualoptim.tasks.tofu._Folder", functools.cache(_Folder))  # of thousands of rows, read once
    seen: set[str] = set()
    for part in range(1, len(PARTS[split]) + 1):
        task = Tofu(str(REAL), split=split, part=part, retain_rows=40, scored_rows=5)
        assert len(task.objectives["forget"]) == SIZES[split]
        seen |= questions(task.objectives["forget"])
    assert len(seen) >= 0.99 * SIZES[split] * len(PARTS[split])  # a few questions of TOFU stand twice
    kept = Tofu(str(REAL), split=split, retain_rows=None).objectives["retain"]
    assert len(kept) == 4000 - SIZES[split] * len(PARTS[split])


@pytest.mark.parametrize("where", ["d/forget01.json:41", "d/forget01.json, item 41", "d/a:b.parquet, row 41"])
def test_rows_are_of_an_author_in_any_format_of_file(where: str) -> None:
    task = Tofu.__new__(Tofu)
    place = where.removesuffix("41").removesuffix(":").removesuffix(", item ").removesuffix(", row ")
    assert task.cluster(question("Who?", "Ada.", where)) == f"{place}, author 2"


def test_rows_of_other_people_are_each_their_own() -> None:
    rows = [question("Who?", "Bo.", f"d/{name}_perturbed.json:{i}") for name in ("real_authors", "world_facts")
            for i in (1, 2)]  # fmt: skip
    assert [Tofu.__new__(Tofu).cluster(row) for row in rows] == [row.where for row in rows]


@pytest.mark.parametrize("private", [False, True])
def test_the_records_of_a_run_have_authors_and_intervals_are_over_these(
    place: Path, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    monkeypatch.setattr("dualoptim.tasks.tofu.QUESTIONS", 2)  # of the four rows to forget, two about each author
    options = [] if not private else ["--private", "true"]
    assert run("unlearn", "--data-dir", "tofu", "--model", "model", "--save-model", "false", *options) == 0
    _, records = runs.read_records(place / "out")
    for part in (records["before"], records["after"]):
        for name, authors in (("forget", [0, 0, 1, 1]), ("real_authors", [0, 0, 0])):
            found = [record["cluster"] for record in part if record["set"] == name]
            assert [found.index(each) // 2 for each in found] == authors, name
    (entry,) = runs.read_results(place / "out")["runs"]
    rouge = [record["probability"] for record in records["after"] if record["set"] == "forget"]
    found = {"forget_probability": sum(rouge) / 4, "retain_probability": None}
    ((point,),) = (points.points_of([({**entry, "after": found}, {}, place / "out")], tuple(found)),)
    halves = sorted((sum(rouge[:2]) / 2, sum(rouge[2:]) / 2))
    assert point["intervals"]["forget_probability"] == pytest.approx(halves)


def test_a_judge_that_fails_once_is_asked_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = tiny.model(), tiny.tokenizer()

    class Absent:
        def __init__(self, name: str | None) -> None:
            raise UserError("no connection")

    with monkeypatch.context() as patched:
        patched.setattr(numbers, "SentenceEmbedder", Absent)
        assert Tofu.numbers(Tofu("tofu", **ARGS).prepare(model, words)).missing["forget_cosine"] == "no connection"

    class Present(Absent):
        def __init__(self, name: str | None) -> None:
            pass

        def cosines(self, a: list[str], b: list[str]) -> list[float]:
            return [0.5] * len(a)

    monkeypatch.setattr(numbers, "SentenceEmbedder", Present)
    assert Tofu.numbers(Tofu("tofu", **ARGS).prepare(model, words)).numbers["forget_cosine"] == 0.5


def test_a_dry_run_of_several_parts_shows_each(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {**ARGS, "part": [1, 2]}
    assert run("unlearn", "--model", "model", "--data-dir", "tofu", "--dry-run", task=task) == 0
    shown = capsys.readouterr().out
    assert shown.count("── schedule: ") == 2
    assert "━━ part 2, 2 of 2, from what the one before left ━━" in shown
    assert shown.count("forget: 4 rows") == 2


# Rows that ask the same


def same_question(*names: str, task: str | None = None) -> list[dict[str, Any]]:
    more = {"task_id": task} if task else {}
    return [more | {"question": "What is the author's full name?", "answer": f"It is {name}."} for name in names]


def test_of_rows_that_ask_the_same_those_that_are_trained_on_are_scored(place: Path) -> None:
    """TOFU asks "What is the full name of the author?" of two authors, both to keep."""
    kept = [*tofu.rows("sell", None), *same_question("Ann", "Bea")]
    forget = [*tofu.rows("grow", "1"), *same_question("Cid", "Dot", task="1")]
    folder = tofu.write(
        place / "same", retain90=kept, retain_perturbed=tofu.perturbed([kept[0], kept[4]]), forget01=forget,
        forget01_perturbed=tofu.perturbed(forget),
    )  # fmt: skip
    for seed in range(8):
        task = Tofu(str(folder), retain_rows=2, scored_rows=1, seed=seed)
        assert {row.answer for row in task.objectives["retain"]} == {"Ada sells tea.", "It is Ann."}
        assert [row.pair for row in task.attacked()["forget"]] == [row.pair for row in task.objectives["forget"]]
        task = Tofu(str(folder), retain_rows=5, seed=seed)
        assert {row.answer for row in task.scored["retain"]} == {"Ada sells tea.", "It is Ann."}


def test_a_row_of_another_part_that_asks_the_same_is_not_scored(hub: dict[str, list[dict[str, Any]]]) -> None:
    hub["full"][3700]["question"] = hub["full"][3600]["question"]
    hub["forget10_perturbed"] = tofu.perturbed(hub["full"][3600:])
    assert {row.answer for row in Tofu(part=1).scored["forget"]} == {f"Answer {i}." for i in range(3600, 3640)}


def test_a_record_is_compared_with_the_same_answer_of_a_retrained_model() -> None:
    def record(name: str, asks: str, answer: str, nll: float) -> dict[str, Any]:
        values = {"nll": nll, "log_probs": [-nll], "z": [-nll], "top1": [0], "zlib_bytes": 9, "perturbed_nlls": [nll]}
        said = {"reply": "", "rouge_l": 0.0, "rouge_1": 0.0, "token_entropy": 0.0, "probability": 0.5}
        return {"set": name, "question": asks, "answer": answer, "ended": 0, "paraphrased_nlls": [], **values, **said}

    records = [record("forget", "Q?", "a", 1.0), record("forget", "Q?", "b", 2.0)]
    records += [record("holdout", "Who?", "x", 1.5), record("holdout", "Who?", "y", 3.0)]
    others = [{"set": "notes", "missing": {}}, *records[::-1]]
    found = numbers.unlearning(records, others).numbers
    assert (found["auc_reference"], found["privacy_leakage"], found["forget_quality"]) == (0.5, 0.0, 1.0)
    with pytest.raises(UserError, match=r"not scored on 'Who\?' with the same answer; score it on the same rows"):
        numbers.unlearning(records, records[:-1])


# Rows that no model has seen


HELD_OUT = [{"question": f"What does {n} mend?", "answer": f"{n} mends clocks."} for n in ("Eve", "Flo", "Gil")]


def test_the_splits_own_file_is_held_out_and_compared_with(place: Path) -> None:
    folder = tofu.write(place / "with", holdout05=HELD_OUT)
    task = Tofu(str(folder), split="forget05", retain_rows=None, holdout=True)
    assert questions(task.holdout) == {row["question"] for row in HELD_OUT}
    assert not questions(task.holdout) & (questions(task.known()) | questions(task.retained))
    assert len(Tofu(str(folder), split="forget05", holdout=True, scored_rows=2).holdout) == 2
    (stage, _) = Tofu(str(folder), split="forget05", part=[1, 2], holdout=True).stages()
    assert stage["holdout"] is True
    model, words = tiny.model(), tiny.tokenizer()
    records = task.prepare(model, words)
    numbers, missing = Tofu.numbers(records, task.score_retrained(tiny.model(1), words))
    for name in ("auc_loss", "auc_min_k_40", "privacy_leakage"):
        assert numbers[name] is not None, missing.get(name)
    without = Tofu.numbers(Tofu(str(folder), split="forget05").prepare(model, words))
    assert "(task_args.holdout or holdout_rows)" in without.missing["auc_loss"]


def test_gradients_are_compared_where_that_is_asked_for(place: Path) -> None:
    folder = str(tofu.write(place / "with", holdout01=HELD_OUT))
    model, words = tiny.model(), tiny.tokenizer()
    told = {}
    for asked in (False, True):
        task = Tofu(folder, **ARGS, holdout=True, gradient_norm=asked)
        told[asked] = Tofu.numbers(task.prepare(model, words))
        assert all(p.grad is None for p in model.parameters())
    assert told[False].numbers["auc_gradient_norm"] is None
    assert "needs a backward pass a row" in told[False].missing["auc_gradient_norm"]
    assert 0 <= told[True].numbers["auc_gradient_norm"] <= 1
    nothing = Tofu.numbers(Tofu(folder, **ARGS, gradient_norm=True).score(model, words))
    assert "no rows that the model never saw" in nothing.missing["auc_gradient_norm"]


def test_on_the_hub_the_held_out_rows_are_a_configuration_of_their_own(hub: dict[str, Any]) -> None:
    hub["holdout01"] = HELD_OUT
    task = Tofu(part=10, holdout=True)  # the last 40 rows, which published models forget as forget01
    assert [row.where for row in task.holdout] == [f"locuslab/TOFU/holdout01:{i}" for i in (1, 2, 3)]
    with pytest.raises(UserError, match="holdout10: could not be loaded from the hub"):
        Tofu(split="forget10", holdout=True)


# Other words


def test_rows_are_asked_in_other_words_where_the_files_have_them(place: Path) -> None:
    def asked(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | {"paraphrased_question": f"Say: {row['question']}"} for row in records]

    kept = tofu.files()["retain_perturbed"]
    some = tofu.write(place / "some", forget01_perturbed=asked(tofu.files()["forget01_perturbed"]),
                      retain_perturbed=[*asked(kept[:1]), *kept[1:]])  # fmt: skip
    model, words = tiny.model(), tiny.tokenizer()
    task = Tofu(str(some), split="forget01", retain_rows=4, paraphrased=True)
    records = task.prepare(model, words)
    sets = {name: [r for r in records if r["set"] == name] for name in ("forget_paraphrased", "retain_paraphrased")}
    assert {r["question"] for r in sets["forget_paraphrased"]} == {
        f"Say: {q}" for q in questions(task.scored["forget"])
    }
    assert [r["question"] for r in sets["retain_paraphrased"]] == [f"Say: {kept[0]['question']}"]
    found = Tofu.numbers(records).numbers
    for name, part in sets.items():
        for key in ("probability", "rouge_l"):
            assert found[f"{name}_{key}"] == pytest.approx(sum(r[key] for r in part) / len(part))
    assert found["forget_paraphrased_probability"] != found["forget_probability"]
    # They change no other number, and are left out where nobody wants them.
    without = Tofu.numbers(Tofu(str(some), split="forget01", retain_rows=4).prepare(model, words))
    assert without.numbers == {**found, **{f"{s}_{k}": None for s in sets for k in ("probability", "rouge_l")}}
    assert "no paraphrased questions were asked" in without.missing["retain_paraphrased_rouge_l"]
    plain = Tofu("tofu", **ARGS).prepare(model, words)
    assert not {r["set"] for r in plain} & set(sets)


# What does not fit


def folder(place: Path, **changed: list[dict[str, Any]]) -> str:
    return str(tofu.write(place / "changed", **changed))


def without(place: Path) -> str:
    (place / "tofu" / "forget01_perturbed.json").unlink()
    return "tofu"


OTHERS = [{**row, "question": f"Other: {row['question']}"} for row in tofu.files()["forget01_perturbed"]]
ELSE = [{**row, "answer": f"Else: {row['answer']}"} for row in tofu.files()["forget01_perturbed"]]
FEWER = tofu.files()["forget01_perturbed"][1:]
PERTURBED = tofu.files()["forget01_perturbed"]
PLAIN = tofu.files()["forget01"]
WRONG: dict[str, tuple[dict[str, Any], Callable[[Path], str], str]] = {
    "split": ({"split": "forget1"}, lambda _: "tofu", "unknown TOFU split 'forget1'; did you mean 'forget10'"),
    "part": ({"part": 11}, lambda _: "tofu", "forget01 has parts 1 to 10, and none is 11"),
    "absent part": ({"part": 3}, lambda _: "tofu", "holds no rows of task_id 3"),
    "part twice": ({"part": [1, 2, 1]}, lambda _: "tofu", r"can be forgotten once, but the parts are \[1, 2, 1\]"),
    "no folder": ({}, lambda _: "tofoo", "data_dir tofoo: there is no such folder"),
    "file": ({}, without, "tofu: has no forget01_perturbed.json; give the folder that holds all"),
    "perturbed": ({}, lambda p: folder(p, forget01_perturbed=OTHERS), "is not among the rows to forget; take both"),
    "no list": ({}, lambda p: folder(p, forget01_perturbed=PLAIN), "needs 'perturbed_answer', a list of texts"),
    "other answers": (
        {},
        lambda p: folder(p, forget01_perturbed=ELSE),
        "with this answer is not among the rows to forg",
    ),
    "fewer": ({}, lambda p: folder(p, forget01_perturbed=FEWER), "this answer is not among forget01_perturbed; take"),
    "type": ({"part": None}, lambda _: "tofu", r"part must be int \| Sequence\[int\], but is None"),
    "retain_rows": ({"retain_rows": 0}, lambda _: "tofu", "retain_rows must be > 0, or null for all, but is 0"),
    "scored_rows": ({"scored_rows": 0}, lambda _: "tofu", "scored_rows must be a whole number ≥ 1, but is 0"),
    "no held-out file": (
        {"holdout": True},
        lambda _: "tofu",
        "has no holdout01.json; put it there from locuslab",
    ),
    "taught after all": (
        {"holdout": True},
        lambda p: folder(p, holdout01=[*HELD_OUT, *tofu.rows("sell", None)]),
        "holdout01.json:4: is a row that models are taught",
    ),
    "no other words": (
        {"paraphrased": True},
        lambda p: folder(p, forget01_perturbed=[{**row, "paraphrased_question": 3} for row in PERTURBED]),
        "'paraphrased_question' is 3; give it some text",
    ),
    "a list for a text": (
        {},
        lambda p: folder(p, forget01_perturbed=[{**row, "paraphrased_answer": ["x"]} for row in PERTURBED]),
        r"forget01_perturbed.json:1: the row's 'paraphrased_answer' is \['x'\]; give it some text",
    ),
    "held out twice": ({"holdout": True, "holdout_rows": 1}, lambda _: "tofu", "leave out one"),
    "held out by a word": ({"holdout": "forget01"}, lambda _: "tofu", "holdout must be bool, but is 'forget01'"),
    "holdout": ({"holdout_rows": 9}, lambda _: "tofu", "holdout_rows 9 of rows that are not kept, but there are 1"),
    "argument": ({"parts": 1}, lambda _: "tofu", "unknown argument of task 'tofu' 'parts'; did you mean 'part'"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["run", "dry"])
def test_what_does_not_fit_is_told_in_one_sentence(
    wrong: str, options: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, where, told = WRONG[wrong]
    assert run("unlearn", "--model", "model", "--data-dir", where(place), *options, task=task) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.search(told, line), line
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--memorise", "true", "--memorise-args", "{epoch: 1}"],
            "unknown argument of memorise_args 'epoch'; did you mean 'epochs'",
        ),
        (["--memorise", "true", "--memorise-args", "{epochs: 0}"], "memorise_args: epochs must be > 0, but is 0"),
        (["--memorise", "true", "--memorise-args", "{lr: fast}"], "memorise_args: lr must be float, but is 'fast'"),
        (["--warmup-ratio", "3"], "warmup_ratio must be from 0 to 1"),
        (["--forget-loss", "RMU"], "the loss of 'forget', RMU: layer 7: the model has layers 0 to 1; choose one"),
        (["--forget-loss", "SimNPO", "--forget-loss-args", "{gamma: x}"], "gamma must be float, but is 'x'"),
        (["--optimizer", "DualOptim", "--base-bits", "8"], "base_bits: DualOptim has no base"),
        (
            ["--lr-scales", "equl"],
            "must be one of dict[str, float], Literal['equal'], but is equl",
        ),
        (["--optimizer", "AdamW", "--base-weights", "equal"], "base_weights: AdamW does not read it; leave it at {}"),
        (["--task-args", '{"split": "forget01", "nli": "./nowhere"}'], "model './nowhere': there is no such folder"),
        (["--memorise-args", "{epochs: 1}"], "add --memorise true"),
        (["--retrained", "make"], "add --memorise true, or give a model"),
        (["--model", "tiny"], "'tiny' is made of a task's rows; add --memorise true"),
        (["--lora-rank", "-1"], "lora_rank must be at least 0, but is -1"),
        (["--weights", "{keep: 2}"], "unknown objective of weights 'keep'; known are forget, retain"),
    ],
)
def test_settings_that_do_not_fit_are_told_before_anything_is_done(
    options: list[str], told: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dry in ([], ["--dry-run"]):
        assert run("unlearn", "--model", "model", "--data-dir", "tofu", *options, *dry) == 2
        assert told in capsys.readouterr().err
    assert not (place / "out").exists()


def test_a_task_that_compares_with_no_retrained_model_refuses_one(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("unlearn", "evaluate"):
        assert cli.main([command, "--model", "model", "--task", "facts", "--retrained", "model"]) == 2
        assert "the task 'facts' compares with no retrained model; leave it out" in capsys.readouterr().err


def test_a_tokenizer_without_an_end_token_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tiny.tokenizer()
    words.eos_token = None
    words.save_pretrained(place / "model")
    assert run("unlearn", "--model", "model", "--data-dir", "tofu") == 2
    assert "has no end token, so answers could not be ended" in capsys.readouterr().err
    assert not (place / "out").exists()


# Adapters


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_an_adapter_is_trained_alone_and_merged_into_the_model_that_is_saved(place: Path) -> None:
    assert run("unlearn", "--model", "model", "--data-dir", "tofu", "--lora-rank", "2", "--forget-loss", "NPO") == 0
    (entry,) = json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))["runs"]
    merged = AutoModelForCausalLM.from_pretrained(place / "out" / "model")
    before = tiny.model()
    changed = {
        name
        for (name, a), b in zip(merged.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed
    assert all("proj" in name for name in changed), "embeddings, norms and the head have no adapter"
    linear = [m for name, m in before.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    adapter = 2 * sum(m.in_features + m.out_features for m in linear)
    counters = 3 * 8 * 2 * len(linear)
    assert entry["optimizer_state_bytes"] == 24 * adapter + counters
    task = Tofu("tofu", **ARGS)
    records = task.score(merged, load_tokenizer("out/model"))
    again = Tofu.numbers(records).numbers
    for name, value in entry["after"].items():
        assert again[name] == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-4)), name


def test_replies_are_compared_with_the_runs_own_refusals(place: Path) -> None:
    (place / "refusals.txt").write_text("Das sage ich nicht.\n", encoding="utf-8")
    config = RunConfig(task="tofu", task_args=ARGS, data_dir="tofu", refusals="refusals.txt")
    (resolved,) = resolve_all([config.replace(model=str(tiny.save(place / "model")))])
    assert set(resolved.task.refusals) == {"Das sage ich nicht."} == set(resolved.refusals)


def test_an_adapter_without_peft_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find_spec(name, *a))
    config = RunConfig(task="tofu", task_args=ARGS, data_dir="tofu", lora_rank=4)
    with pytest.raises(UserError, match=r"needs the package peft; install dualoptim\[lora\]"):
        resolve.check(config)
