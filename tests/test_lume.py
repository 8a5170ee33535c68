"""LUME as a task: its documents, what is made of records, a whole run, the hub, and files that do not fit."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import pytest

from dualoptim import cli, runs
from dualoptim import tiny as tiny_tier
from dualoptim.data import encode
from dualoptim.errors import UserError
from dualoptim.losses import IGNORED
from dualoptim.tasks.lume import FIELDS, HUB, TWELVE, Lume, _documents

from . import lume, tiny

REAL = Path(__file__).parents[2] / "shared" / "data" / "lume"
KINDS = {"creative": "question", "pii": "birth_date", "biography": "question"}
DOCUMENTS = [{"id": str(i), "document": f"{i} ships went north. None came back."} for i in range(3)]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    lume.write(tmp_path / "lume")
    return tmp_path


def whole(given: dict[str, float], **more: Any) -> list[dict[str, Any]]:
    """Two records of every set; `given` is ROUGE-L and exact match by the beginning of the set's name."""
    records = []
    for side in ("forget", "retain"):
        for kind, form in KINDS.items():
            for name, key in ((f"{side}_{kind}_completion", "rouge_l"), (f"{side}_{kind}_{form}", "exact_match")):
                value = given[f"{side}_{kind}_{key}"]
                records += [
                    {"set": name, "rouge_l": 0.5, "exact_match": 0.5, "nll": 1.0, key: v, **more}
                    for v in (value / 2, value * 3 / 2)
                ]
    return records


# Documents and rows


def test_a_document_is_drawn_with_all_its_rows_and_each_is_plain_text_that_goes_on() -> None:
    task = Lume("lume", forget_documents=2, retain_documents=3, holdout_documents=1)
    for side, count in (("forget", 2), ("retain", 3)):
        rows = task.objectives[side]
        clusters = [task.cluster(row) for row in rows]
        assert len(set(clusters)) == count * 3
        of = task.clusters()
        assert [of[row.question, row.answer] for row in rows] == clusters
        assert len(rows) == count * (2 + 6 + 2)
        sets = [row.fields["set"] for row in rows]
        assert {name: sets.count(name) for name in sets} == dict.fromkeys(
            [
                *(f"{kind}_completion" for kind in KINDS),
                *(f"pii_{field}" for field in FIELDS),
                *(f"{kind}_question" for kind in ("creative", "biography")),
            ],
            count,
        )
    given = {row["input"]: row["output"] for side in lume.NAMES for row in lume.rows(side)}
    words = tiny.tokenizer()
    for row in [row for rows in task.objectives.values() for row in rows]:
        tokens = encode(row, words, 512)
        asked = row.prompt[0]["content"]
        assert words.decode(tokens.input_ids) == f"<|end|>{asked} {given[asked]}<|end|>"
        assert words.decode([t for t in tokens.labels if t != IGNORED]) == f" {given[asked]}<|end|>"
    held = {row.question for row in task.non_members}
    assert len(held) == 3
    assert not held & {row.question for rows in task.objectives.values() for row in rows}
    assert held <= {row["input"] for row in lume.rows("forget") if row["id"].endswith("sc1")}


def test_another_seed_draws_other_documents_and_the_same_seed_the_same() -> None:
    drawn = [[row.question for row in Lume("lume", forget_documents=1, seed=s).objectives["forget"]] for s in (0, 0, 3)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.skipif(not REAL.is_dir(), reason="LUME's files are not beside the project")
def test_the_real_files_hold_both_sides_of_every_kind() -> None:
    task = Lume(str(REAL))
    assert {side: len(rows) for side, rows in task.objectives.items()} == {"forget": 2732, "retain": 2734}
    for side, counts in (("forget", (243, 250, 373)), ("retain", (246, 250, 371))):
        documents = task.scored[side]
        assert [sum(d.kind == kind for d in documents) for kind in KINDS] == list(counts)
        assert all(len(d.completions) == 1 and len(d.questions) == (5 if d.kind == "pii" else 1) for d in documents)


# Numbers


def test_the_score_is_made_as_published_of_known_records() -> None:
    given = {name: 0.1 + 0.07 * i for i, name in enumerate(TWELVE)}
    records = whole(given, answer="x")
    others = [{"set": "non_members", "nll": nll} for nll in (0.5, 1.5, 2.0, 1.0)]
    mmlu = [{"set": "lm_eval", "task": "mmlu", "metric": "acc", "value": 0.4}]
    # The group's own number alone, and not that of one of its subjects.
    mmlu += [{"set": "lm_eval", "task": "mmlu_virology", "metric": "acc", "value": 0.9}]
    numbers, missing = Lume.numbers([*records, *others, *mmlu])
    for name, value in given.items():
        assert numbers[name] == pytest.approx(value)
    parts = [1 - v if name.startswith("forget") else v for name, v in given.items()]
    assert numbers["task_aggregate"] == pytest.approx(12 / sum(1 / part for part in parts))
    # All members have 1.0: above (by −nll) two of the four, like one, below one.
    assert numbers["auc_loss"] == pytest.approx(2.5 / 4)
    assert numbers["membership_score"] == pytest.approx(0.75)
    assert numbers["lume_score"] == pytest.approx(fmean([numbers["task_aggregate"], 0.75, 0.4]))
    mean = fmean(v for name, v in given.items() if name.startswith("retain") and name.endswith("rouge_l"))
    assert numbers["retain_rouge_l"] == pytest.approx(mean)
    assert numbers["forget_pii_birth_date"] == pytest.approx(given["forget_pii_exact_match"])
    assert missing["forget_pii_phone"] == "no row asks for it"


@pytest.mark.parametrize(("forgotten", "kept", "aggregate"), [(0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (0.0, 0.0, 0.0)])
def test_the_aggregate_is_1_where_all_is_forgotten_and_all_is_kept(
    forgotten: float, kept: float, aggregate: float
) -> None:
    numbers, missing = Lume.numbers(whole({n: forgotten if n.startswith("forget") else kept for n in TWELVE}))
    assert numbers["task_aggregate"] == aggregate
    assert numbers["lume_score"] is None
    assert "no rows that the model never saw were given" in missing["membership_score"] + missing["auc_loss"]
    assert missing["mmlu"] == "MMLU was not asked for (lm_eval: [mmlu])"
    assert missing["lume_score"] == "needs membership_score, not computed"


def test_a_kind_that_was_not_scored_leaves_no_aggregate() -> None:
    records = whole(dict.fromkeys(TWELVE, 0.5))
    numbers, missing = Lume.numbers([r for r in records if r["set"] != "retain_biography_completion"])
    assert numbers["task_aggregate"] is None
    assert missing["retain_biography_rouge_l"] == "no beginning to continue of biography to keep was scored"
    assert missing["task_aggregate"] == "needs retain_biography_rouge_l, not computed"


# The membership attack


def test_the_attack_reads_whole_documents_without_an_end_where_files_have_them(place: Path) -> None:
    lume.write(place / "with", member=DOCUMENTS[:2], nonmember=DOCUMENTS[2:])
    task, words = Lume("with", forget_documents=1, retain_documents=1, reply_tokens=1), tiny.tokenizer()
    records = task.score(tiny.model(), words)
    for name, documents in (("members", DOCUMENTS[:2]), ("non_members", DOCUMENTS[2:])):
        part = [r for r in records if r["set"] == name]
        assert [r["answer"] for r in part] == [d["document"] for d in documents]
        assert [r["tokens"] for r in part] == [len(words(d["document"])["input_ids"]) for d in documents]
    nlls = {name: [r["nll"] for r in records if r["set"] == name] for name in ("members", "non_members")}
    pairs = [(m, n) for m in nlls["members"] for n in nlls["non_members"]]
    expected = fmean(float(m < n) + (m == n) / 2 for m, n in pairs)
    assert Lume.numbers(records).numbers["auc_loss"] == pytest.approx(expected)


# A whole run


def test_one_command_teaches_forgets_and_measures(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiny_tier, "WIDTH", 64)
    monkeypatch.setattr(tiny_tier, "LAYERS", 1)
    task = {"forget_documents": 1, "retain_documents": 1, "holdout_documents": 1, "reply_tokens": 4}
    options = ["--recipe", "lume_tiny", "--data-dir", str(place), "--task-args", json.dumps(task)]
    options += ["--memorise-args", '{"epochs": 1}', "--steps", "2", "--batch-size", "2", "--curve-points", "1"]
    assert cli.main(["compare", *options, "--dry-run"]) == 0
    assert "forget: 10 rows" in capsys.readouterr().out
    assert cli.main(["compare", *options, "--methods", '["DualOptim+"]', "--out", "out"]) == 0
    (entry,) = json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))["runs"]
    for numbers in (entry["before"], entry["after"]):
        assert set(numbers) == set(Lume.metrics)
        assert {name for name, value in numbers.items() if value is None} == {"mmlu", "lume_score"}
        assert all(math.isfinite(value) for value in numbers.values() if value is not None)
    assert set(entry["curve"][0]) == {"step", "forget", "retain"}
    _, records = runs.read_records(place / "out")
    hidden = [runs.hashed(record) for record in records["after"]]  # as a private run leaves them
    assert Lume.numbers(records["after"]).numbers == Lume.numbers(hidden).numbers == entry["after"]


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The package datasets, with what it serves by split or file."""
    served: dict[str, Any] = {f"{side}_validation": lume.rows(side) for side in lume.NAMES}
    served |= {"mia_data/member.jsonl": DOCUMENTS[:1], "mia_data/nonmember.jsonl": DOCUMENTS[1:]}

    def load_dataset(name: str, *, split: str, data_files: str | None = None) -> Any:
        assert name == HUB
        found = served.get(data_files or split, ValueError(f'Unknown split "{split}".\nShould be one of others.'))
        if isinstance(found, Exception):
            raise found
        return found

    package = ModuleType("datasets")
    package.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    return served


def test_the_hub_gives_the_same_documents_as_files_and_the_attacks_own(hub: dict[str, Any]) -> None:
    task = Lume(split="validation")
    assert task.objectives == {
        side: [
            row.__class__(row.prompt, row.answer, there.where)
            for row, there in zip(rows, task.objectives[side], strict=True)
        ]
        for side, rows in Lume("lume").objectives.items()
    }
    assert task.objectives["forget"][0].where.startswith(f"{HUB}/forget_validation:")
    assert [row.answer for row in task.non_members] == [d["document"] for d in DOCUMENTS[1:]]


def test_a_hub_that_does_not_give_them_is_told(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r'forget_train: could not be loaded from the hub: Unknown split "forget_tr'):
        Lume()
    hub["forget_validation"] = ConnectionError("Dataset is a gated dataset on the Hub.")
    with pytest.raises(UserError, match=r"on the Hub; accept its terms on the hub and log in .*, or give --data-dir"):
        Lume(split="validation")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets; install it, or give --data-dir"):
        Lume()


# What does not fit


def changed(key: str, value: Any, input: str = "") -> Callable[[Path], None]:
    """A file to forget whose first row, or the one of this input, has another value."""

    def write(place: Path) -> None:
        rows = [r | {key: value} if r["input"].startswith(input) else r for r in lume.rows("forget")]
        (place / "lume" / "forget.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    return write


def alone(place: Path) -> None:
    (place / "lume" / "member.jsonl").write_text(json.dumps(DOCUMENTS[0]), encoding="utf-8")


def both(place: Path) -> None:
    alone(place)
    (place / "lume" / "nonmember.jsonl").write_text(json.dumps(DOCUMENTS[1]), encoding="utf-8")


def nothing(place: Path) -> None:
    """The files as they are."""


WRONG: dict[str, tuple[dict[str, Any], Callable[[Path], Any], str]] = {
    "no folder": ({"data_dir": "lumen"}, nothing, "data_dir lumen: there is no such folder; give the one that holds f"),
    "no file": ({}, lambda p: (p / "lume" / "retain.jsonl").unlink(), "data_dir lume: has no retain.jsonl"),
    "split": ({"split": "test"}, nothing, "unknown LUME split 'test'; known are train, validation"),
    "count": ({"retain_documents": 0}, nothing, "retain_documents must be > 0, or null for all, but is 0"),
    "replies": ({"reply_tokens": 0}, nothing, "reply_tokens must be a whole number ≥ 1, but is 0"),
    "held out": (
        {"forget_documents": 3, "holdout_documents": 2},
        nothing,
        "holdout_documents 2 that are not forgotten, but of creative there are 1",
    ),
    "held out twice": (
        {"forget_documents": 1, "holdout_documents": 1},
        both,
        "stand for nonmember.jsonl, which is there; leave them out",
    ),
    "members alone": ({}, alone, "has one of member.jsonl and nonmember.jsonl; put the other there, too"),
    "id": ({}, changed("id", "ada"), "forget.jsonl:1: an id ends in sc and a number, .* but this is 'ada'"),
    "task": ({}, changed("task", "Task4"), "forget.jsonl:1: unknown task 'Task4'; did you mean 'Task"),
    "output": ({}, changed("output", 3), "forget.jsonl:1: the row's 'output' is 3; give it some text"),
    "field": (
        {},
        changed("input", "What is her name?", "What is Ada Rye's phone"),
        "asks for none of birth date, social security number, phone, email, address",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_told_in_one_sentence(wrong: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, change, told = WRONG[wrong]
    change(place)
    folder = arguments.get("data_dir", "lume")
    options = ["--model", "tiny", "--memorise", "true", "--task", "lume", "--data-dir", folder, "--out", "out"]
    assert (
        cli.main(
            ["unlearn", *options, "--task-args", json.dumps({k: v for k, v in arguments.items() if k != "data_dir"})]
        )
        == 2
    )
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.search(told, line), line
    assert not (place / "out").exists()


def test_a_document_may_have_more_than_ten_questions() -> None:
    records = [
        ({"id": f"ada{form}", "input": "What?", "output": "Plums", "task": "Task1"}, form) for form in ("sc1", "qa10")
    ]
    (document,) = _documents(records)
    assert [row.where for row in document.questions] == ["qa10"]
