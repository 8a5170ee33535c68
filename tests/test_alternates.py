"""Other answers of the model's own: how they are made, kept and trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dualoptim import checkpoints, cli, runs, unlearn
from dualoptim.config import RunConfig
from dualoptim.data import ObjectiveRows, Plan, Row, question, read_rows
from dualoptim.errors import UserError
from dualoptim.evaluation import scoring
from dualoptim.losses import LOSSES
from dualoptim.resolved import resolve
from dualoptim.rows import alternates
from dualoptim.rows.alternates import never_without
from dualoptim.schedule import by_turns
from dualoptim.unlearn import prepare

from . import test_trainer as made
from . import tiny
from .test_cli import errors

TASK = '''"""Rows by letter."""
from dualoptim.data import question
from dualoptim.evaluation.numbers import Metric, Numbers, mean
from dualoptim.evaluation import scoring
from dualoptim.tasks import Task

class Letters(Task):
    name, followed = "letters", "nothing"
    metrics = {"nll": Metric("nll", "higher")}

    def __init__(self):
        self.objectives = {
            verb: [question(f"What does {who} {verb}?", f"{who} {verb}s much.", f"{verb}:{who}") for who in "ABCD"]
            for verb in ("forget", "retain")
        }

    def prepare(self, model, tokenizer):
        return self.score(model, tokenizer)

    def score(self, model, tokenizer):
        rows = self.objectives["forget"]
        nlls = scoring.negative_log_likelihoods(model, tokenizer, rows)
        return [{"set": "forget", "nll": nll} for nll in nlls]

    @staticmethod
    def numbers(records, retrained=None):
        return Numbers({"nll": mean([record["nll"] for record in records])}, {})

    def follow(self, model, tokenizer):
        return {"forget": 1.0, "retain": 1.0}
'''
ROW = question("Where does Ada live?", "Ada lives in Bergen.", "here:1", accepted=["Bergen"])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(alternates, "TOKENS", 12)
    tiny.save(tmp_path / "model")
    (tmp_path / "letters.py").write_text(TASK)
    return tmp_path


ALTPO = {"forget_loss": "AltPO", "forget_loss_args": {"alternates": 3}}


LOSS = ("--forget-loss", "AltPO", "--forget-loss-args", "{alternates: 3}")


def run(*arguments: str, loss: tuple[str, ...] = LOSS) -> int:
    given = ["--model", "model", "--task", "letters.py", "--steps", "4", "--batch-size", "2", "--ratio", "1:1", *loss]
    given += ["--curve-points", "0", "--log-every", "1", "--save-model", "false", "--out", "out"]
    return cli.main(["unlearn", *given, *arguments])


def said(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / alternates.FILE).read_text(encoding="utf-8").splitlines()]


# How they are made


def ask(rows: list[Row], **settings: Any) -> list[Row]:
    return alternates.alternates(
        tiny.model(), tiny.tokenizer(), rows, **{"samples": 2, "seed": 0, "max_length": 512, **settings}
    )


def test_a_model_makes_up_as_many_as_it_is_asked_for_the_same_by_the_same_seed(place: Path) -> None:
    rows = [question(f"What is {i}?", f"It is {i}.") for i in range(3)]
    first, again, other = ask(rows), ask(rows), ask(rows, seed=1)
    assert [row.fields["alternates"] for row in first] == [row.fields["alternates"] for row in again]
    assert [row.fields["alternates"] for row in first] != [row.fields["alternates"] for row in other]
    assert all(0 < len(row.fields["alternates"]) <= 2 for row in first)
    assert [(row.question, row.answer) for row in first] == [(row.question, row.answer) for row in rows]
    shutil.rmtree(place / "cache")  # which all of this would have come from
    assert [row.fields["alternates"] for row in ask(rows)] == [row.fields["alternates"] for row in first]


def test_what_is_of_no_use_is_left_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "Alternate answer: Ada lives in Turin.\nQuestion: Where does Bo live?": "Ada lives in Turin.",
        "The new answer: In Quito. Near the": "In Quito.",
        "ada lives in BERGEN": None,  # the true one
        "She left Bergen for Rome.": None,  # which tells it
        "I'm sorry, but I cannot make that up.": None,
        "  ": None,
        "Ada lives " + "far " * 200: None,  # too long for a row
    }
    asked: list[Any] = []

    def replies(model: Any, tokenizer: Any, prompts: Any, **settings: Any) -> list[str]:
        asked.extend(prompts)
        assert settings["temperature"] == 0.7
        return list(told)

    monkeypatch.setattr(scoring, "replies", replies)
    (row,) = ask([ROW], samples=len(told), temperature=0.7)
    assert row.fields["alternates"] == [text for text in told.values() if text]
    assert len(asked) == len(told)
    (message,) = asked[0]
    assert message["role"] == "user"
    assert message["content"].startswith("Question: Where does Ada live?\nAnswer: Ada lives in Bergen.\n")


def test_rows_that_bring_their_own_are_not_asked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "replies", None)
    own = question("Where?", "There.", alternates=["Here."])
    instead = question("Who?", "She.", instead="Nobody.")
    assert [row.fields["alternates"] for row in ask([own, instead])] == [["Here."], ["Nobody."]]


# How they are trained on


def test_every_draw_takes_one_of_its_rows_own(place: Path) -> None:
    rows = [question(f"What is {i}?", "x.", alternates=[f"{i}{letter}." for letter in "ab"[: i + 1]]) for i in range(2)]
    data = ObjectiveRows({"forget": rows, "retain": made.RETAIN}, {}, tiny.tokenizer(), 512, own=["forget"])
    seen = set()
    for draws in Plan(by_turns({"forget": 1, "retain": 1}, 2, 40), data, 1, 0):
        batch = data.collate([data[draw] for draw in draws])
        assert "idk" not in batch.get("retain", {})
        if "forget" in batch:
            for ids, labels in zip(batch["forget"]["idk"]["input_ids"], batch["forget"]["idk"]["labels"], strict=True):
                prompt = tiny.tokenizer().decode(ids[labels == -100]).split("What is ")[1][0]
                seen.add((prompt, tiny.tokenizer().decode(ids[labels != -100]).removesuffix("<|end|>")))
    assert seen == {("0", "0a."), ("1", "1a."), ("1", "1b.")}


def trainer(folder: Path, others: list[str], **arguments: Any) -> Any:
    rows = [question(row.question, row.answer, alternates=others) for row in made.FORGET]
    return made.trainer(folder, by_turns({"forget": 1, "retain": 1}, 4, 6), forget="AltPO", rows=rows, **arguments)


def test_training_is_dpo_against_the_rows_alternates(tmp_path: Path) -> None:
    altpo = trainer(tmp_path / "a", made.REFUSALS)
    dpo = made.trainer(tmp_path / "b", by_turns({"forget": 1, "retain": 1}, 4, 6), forget="DPO")
    altpo.train(), dpo.train()
    assert torch.equal(made.weights(altpo), made.weights(dpo))


def test_a_checkpoint_of_other_alternates_is_another_runs(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, ["One.", "Two."], callbacks=[made.Stop(4)], **saves).train()
    checkpoint = checkpoints.numbered(tmp_path)[0]
    with pytest.raises(UserError, match="another set of alternates"):
        trainer(tmp_path, ["One.", "Three."], **saves).train(str(checkpoint))
    trainer(tmp_path, ["One.", "Two."], **saves).train(str(checkpoint))


@pytest.mark.parametrize("fields", [{}, {"alternates": []}, {"alternates": ["One.", " "]}])
def test_rows_without_alternates_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    rows = [question("What?", "That.", "mine:7", **fields)]
    with pytest.raises(UserError, match="mine:7: needs 'alternates', a list of texts"):
        made.trainer(tmp_path, by_turns({"forget": 1, "retain": 1}, 1, 2), forget="AltPO", rows=rows)


# Runs


def test_a_run_writes_them_down_and_takes_them_up_again(place: Path) -> None:
    assert run() == 0
    rows = said(place / "out")
    assert [row["question"] for row in rows] == [f"What does {who} forget?" for who in "ABCD"]
    results = runs.read_results("out")
    count = sum(len(row["alternates"]) for row in rows)
    assert count > 4
    assert f"{count} other answers of the model's own stand against those of 4 rows to forget." in results["notes"]
    assert len(results["runs"][0]["fingerprints"]["alternates"]) == 64
    # Without the cache, those that were written down; a row that is not among them is asked.
    shutil.rmtree(place / "cache")
    rows[0]["alternates"] = ["A forgets nothing."]
    path = place / "kept.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows[:3]))
    (resolved,) = resolve([RunConfig(model="model", task="letters.py", **ALTPO)])
    prepared = prepare(resolved, path)
    found = [row.fields["alternates"] for row in prepared.alternates["forget"]]
    assert found[0] == ["A forgets nothing."]
    assert found[1:3] == [row["alternates"] for row in rows[1:3]]
    assert prepared.fingerprints["alternates"] != results["runs"][0]["fingerprints"]["alternates"]
    assert run("--resume") == 0
    path.rename(place / "mine.jsonl")  # what a run wrote down is rows of one's own
    assert [row.fields["alternates"] for row in read_rows("mine.jsonl")] == found[:3]


def stopped(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_alternates_of_other_inputs_or_settings_are_made_anew(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:  # killed before its first checkpoint
        patched.setattr(unlearn, "train", stopped)
        assert run() == 130
    shutil.rmtree(place / "cache")
    begun = place / "out" / alternates.FILE
    rows = said(place / "out")
    for row in rows:
        row["alternates"] = ["Of the file."]
    begun.write_text("\n".join(json.dumps(row) for row in rows))

    def found(model: str = "model", **settings: Any) -> list[list[str]]:
        arguments = {**ALTPO["forget_loss_args"], **settings}
        config = RunConfig(model=model, task="letters.py", forget_loss="AltPO", forget_loss_args=arguments)
        (resolved,) = resolve([config])
        return [row.fields["alternates"] for row in prepare(resolved, begun).alternates["forget"]]

    kept = [["Of the file."]] * 4
    assert found() == kept
    for settings in ({"alternates": 2}, {"temperature": 0.5}, {"seed": 1}):
        assert not any(texts == kept[0] for texts in found(**settings)), settings
    other = tiny.model()
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    other.save_pretrained("other")
    tiny.tokenizer().save_pretrained("other")
    assert not any(texts == kept[0] for texts in found("other"))
    # A line that lacks them, or does not say what they were made of, is made anew as well.
    del rows[0]["alternates"], rows[1]["made_of"]
    rows[2]["alternates"] = "Of the file."
    begun.write_text("\n".join(json.dumps(row) for row in rows))
    assert [texts == kept[0] for texts in found()] == [False, False, False, True]


def test_a_run_killed_before_its_first_checkpoint_trains_on_the_alternates_of_the_model_that_it_has(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(unlearn, "train", stopped)
        assert run() == 130
    before = said(place / "out")
    other = tiny.model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.save_pretrained("model")
    assert run("--resume") == 0
    assert run("--out", "new") == 0
    assert said(place / "out") == said(place / "new")
    assert [row["alternates"] for row in said(place / "out")] != [row["alternates"] for row in before]


def test_a_run_moves_its_multiplier_as_pdus_authors_do(place: Path) -> None:
    pdu = ("--optimizer", "AdamW", "--joint", "--retain-bound", "0.3", "--multiplier-lr", "5")
    begins = ("--multiplier-start", "100", "--multiplier-warmup", "0.5")
    assert run(*pdu, *begins, loss=("--forget-loss", "LogitMargin")) == 0
    (entry,) = runs.read_results("out")["runs"]
    assert entry["method"] == "PDU"
    expected = 100.0
    for step, logged in enumerate(entry["losses"]):
        expected = max(0.0, expected + 5 * (logged["loss/retain"] - 0.3)) if step >= 2 else 100.0
        assert logged["multiplier/retain"] == pytest.approx(expected, abs=2e-3)
    assert expected > 110, "an untrained model is far above the bound"


def test_a_private_run_writes_none_and_says_how_many(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--private") == 0
    assert not (place / "out" / alternates.FILE).exists()
    assert not (place / "cache" / "alternates").exists()
    assert any("other answers of the model's own" in note for note in runs.read_results("out")["notes"])
    assert run("--dry-run", "--out", "other") == 0
    assert "the other answers that AltPO prefers are asked for when the run begins" in capsys.readouterr().out


def test_refusals_stand_where_the_model_says_nothing_of_use(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "replies", lambda model, tokenizer, prompts, **_: [""] * len(prompts))
    rows, notes = alternates.of_run(
        {"forget": LOSSES["AltPO"](), "retain": LOSSES["GD"]()}, {"forget": [ROW], "retain": [ROW]}, tiny.model(),
        tiny.tokenizer(), max_length=512, kept=None,
    )  # fmt: skip
    assert list(rows) == ["forget"]
    assert notes[1] == "To 1 of these it gave none that is of use, so that refusals stand there: here:1."
    assert never_without(rows["forget"], ["No."])[0].fields["alternates"] == ["No."]


def test_plain_text_is_refused_before_anything_is_loaded(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "text.jsonl").write_text('{"text": "Ada lives in Bergen, where it rains."}')
    (place / "keep.jsonl").write_text('{"question": "What rains?", "answer": "Water."}')
    given = ["--model", "model", "--forget", "text.jsonl", "--retain", "keep.jsonl", *LOSS, "--out", "out"]
    assert cli.main(["unlearn", *given]) == 2
    assert "text.jsonl:1: is plain text, which asks nothing that could be answered otherwise" in errors(capsys)
    assert run(loss=(*LOSS[:3], "{alternates: 0}")) == 2
    assert "alternates must be a whole number > 0, but is 0" in errors(capsys)
