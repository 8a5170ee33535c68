"""Evaluation, prediction, early stopping and the best model."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from dualoptim import DualOptimPlus, UnlearnTrainer, checkpoints
from dualoptim.data import collate, encode
from dualoptim.errors import UserError
from dualoptim.losses import LOSSES, sequence_log_probs
from dualoptim.schedule import by_turns
from dualoptim.trainer import Objective
from dualoptim.training.evaluation import scored

from . import forked, tiny
from .test_trainer import FORGET, RETAIN, Stop, weights

# Forgetting first and keeping afterward, which brings back what was forgotten: the score rises, and falls.
TURNS = by_turns({"forget": 1}, 4, 4) + by_turns({"retain": 1}, 4, 8)
SETS = {"forget": FORGET[:7], "retain": RETAIN[:5]}
STEPS = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
BEST = {**STEPS, "load_best_model_at_end": True}


def run(folder: Path, *, model: Any = None, turns: Any = TURNS, named: Any = None, **arguments: Any) -> UnlearnTrainer:
    settings = {"save_strategy": "no", "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
                "lr_scheduler_type": "constant"}  # fmt: skip
    return UnlearnTrainer(
        tiny.model() if model is None else model,
        TrainingArguments(str(folder), learning_rate=3e-3, **{**settings, **arguments}),
        objectives={"forget": Objective(FORGET, LOSSES["GA"]()), "retain": Objective(RETAIN, LOSSES["GD"]())},
        turns=turns,
        processing_class=tiny.tokenizer(),
        optimizer_cls_and_kwargs=(DualOptimPlus, {}),
        diagnostics_every=0,
        **{"eval_dataset": SETS, **(named or {})},
    )  # fmt: skip


def evaluations(of: UnlearnTrainer) -> dict[int, dict[str, float]]:
    """Step → what an evaluation gave, without what it took."""
    return {
        entry["step"]: {key: value for key, value in entry.items() if "second" not in key and "runtime" not in key}
        for entry in of.state.log_history
        if any(key.startswith("eval_") for key in entry)
    }


@torch.no_grad()
def likelihoods(model: Any, rows: Any) -> tuple[float, float]:
    """(loss, probability) of rows, one at a time."""
    nlls, counts = [], []
    for row in rows:
        log_prob, count = sequence_log_probs(model.eval(), collate([encode(row, tiny.tokenizer(), 512)], 0))
        nlls.append(-float(log_prob)), counts.append(int(count))
    means = [nll / count for nll, count in zip(nlls, counts, strict=True)]
    return sum(nlls) / sum(counts), fmean(torch.tensor(means).neg().exp().tolist())


@pytest.mark.parametrize("size", [1, 3])
def test_metrics_are_the_formulas_whatever_the_batches(tmp_path: Path, size: int) -> None:
    trainer = run(tmp_path, per_device_eval_batch_size=size)
    got = trainer.evaluate()
    for name, rows in SETS.items():
        loss, probability = likelihoods(tiny.model(), rows)
        assert got[f"eval_{name}_loss"] == pytest.approx(loss, abs=1e-5)
        assert got[f"eval_{name}_probability"] == pytest.approx(probability, rel=1e-5)
    assert (got["eval_forgotten"], got["eval_kept"], got["eval_score"]) == (0.0, 1.0, 0.0)


def test_the_score_is_relative_to_the_start_and_harmonic(tmp_path: Path) -> None:
    trainer = run(tmp_path, eval_strategy="steps", eval_steps=4)
    trainer.train()
    seen = evaluations(trainer)
    assert list(seen) == [0, 4, 8, 12]
    start = seen[0]
    for step, now in seen.items():
        left = now["eval_forget_probability"] / start["eval_forget_probability"]
        kept = min(1.0, now["eval_retain_probability"] / start["eval_retain_probability"])
        assert now["eval_forgotten"] == pytest.approx(1 - min(1.0, left))
        assert now["eval_kept"] == pytest.approx(kept)
        assert now["eval_score"] == pytest.approx(harmonic_mean([1 - min(1.0, left), kept]) if step else 0.0)
    assert seen[4]["eval_score"] > 0.2, "something was forgotten"
    assert trainer.evaluate()["eval_score"] == seen[12]["eval_score"], "at any time"
    assert trainer.evaluate(trainer.eval_dataset)["eval_score"] == seen[12]["eval_score"], "of its own sets"


def test_other_sets_and_one_set_have_no_score(tmp_path: Path) -> None:
    named = {"eval_dataset": {**SETS, "unseen": RETAIN[5:]}}
    got = run(tmp_path, named=named).evaluate()
    assert {"eval_unseen_loss", "eval_unseen_probability", "eval_score"} <= set(got)
    trainer = run(tmp_path)
    one = trainer.evaluate(RETAIN[5:])
    assert one["eval_loss"] == got["eval_unseen_loss"]
    assert not any("score" in key for key in one)
    assert not any("score" in key for key in trainer.evaluate({"forget": FORGET, "retain": RETAIN}))
    assert trainer.evaluate("retain")["eval_loss"] == trainer.evaluate()["eval_retain_loss"]


def test_rows_of_every_form_are_scored_alike(tmp_path: Path) -> None:
    tokens = [encode(row, tiny.tokenizer(), 512) for row in RETAIN]
    padded = collate(tokens, 0)
    missing = [padded["input_ids"].shape[1] - len(t.input_ids) for t in tokens]
    assert max(missing) > 0
    forms = {
        "mappings": [{"question": row.question, "answer": row.answer} for row in RETAIN],
        "chat": [{"messages": [*row.prompt, {"role": "assistant", "content": row.answer}]} for row in RETAIN],
        "tokens": [{"input_ids": t.input_ids, "labels": t.labels} for t in tokens],
        "padded": [{key: value[i] for key, value in padded.items()} for i in range(len(RETAIN))],
        "on the left": [{key: value[i].roll(n) for key, value in padded.items()} for i, n in enumerate(missing)],
    }
    trainer = run(tmp_path)
    expected = trainer.evaluate(RETAIN)
    for form, rows in forms.items():
        got = trainer.evaluate(rows)
        assert got["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6), form
        assert got["eval_probability"] == pytest.approx(expected["eval_probability"], rel=1e-6), form


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "there are no rows"),
        ({}, "there are no sets"),
        ({"forget": []}, r"eval_dataset\['forget'\]: there are no rows"),
        ({"question": "q", "answer": "a"}, "these are str"),
        (iter(RETAIN), "with a length, but these are list_iterator"),
        (["text"], "row 1: a row is a Row or a mapping, but this is str"),
        ([{"prompt": "Who?"}], "row 1"),
        ([RETAIN[0], {"input_ids": [5, 6]}], "row 2: it has input_ids and no labels"),
        ([{"input_ids": [5, 6], "labels": [6]}], "have 2, 1 and 2 entries"),
        ([{"input_ids": [5, 6], "labels": [5, -100]}], "none of its labels can be scored"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused_before_training(tmp_path: Path, rows: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(tmp_path, named={"eval_dataset": rows})


def test_prediction_gives_logits_labels_and_the_metrics(tmp_path: Path) -> None:
    trainer = run(tmp_path, per_device_eval_batch_size=3)
    out = trainer.predict(RETAIN)
    batch = collate([encode(row, tiny.tokenizer(), 512) for row in RETAIN], 0)
    assert out.predictions.shape == (*batch["labels"].shape, 260)
    with torch.no_grad():
        logits = tiny.model().eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.from_numpy(out.predictions)[seen], logits[seen], rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.from_numpy(out.label_ids), batch["labels"])
    expected = trainer.evaluate(RETAIN)
    assert out.metrics["test_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
    assert out.metrics["test_probability"] == pytest.approx(expected["eval_probability"], rel=1e-5)


def test_ones_own_metrics_see_predictions_and_choose_the_best_model(tmp_path: Path) -> None:
    def first_choices(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)

    def accuracy(seen: Any) -> dict[str, float]:
        labels, predicted = seen.label_ids[:, 1:], seen.predictions[:, :-1]
        return {"accuracy": float((labels == predicted)[labels != -100].mean())}

    named = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": first_choices}
    trainer = run(tmp_path, named=named, **{**BEST, "metric_for_best_model": "retain_accuracy"})
    trainer.train()
    seen = {step: entry["eval_retain_accuracy"] for step, entry in evaluations(trainer).items()}
    assert max(seen.values()) > min(seen.values())
    assert trainer.state.best_metric == max(value for step, value in seen.items() if step)


def with_dropout() -> Any:
    model = tiny.model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model


def test_looking_changes_nothing(tmp_path: Path) -> None:
    seen = []
    for options in ({}, STEPS):
        trainer = run(tmp_path, model=with_dropout(), **options)
        trainer.train()
        seen.append((weights(trainer), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    (blind, losses), (looking, same_losses) = seen
    assert torch.equal(blind, looking)
    assert losses == same_losses


@pytest.mark.parametrize("with_it", ["bf16", "gradient_accumulation_steps", "activation_checkpointing"])
def test_evaluation_goes_with(tmp_path: Path, with_it: str) -> None:
    if with_it not in {field.name for field in dataclasses.fields(TrainingArguments)}:
        with_it = "gradient_checkpointing"  # its name in earlier versions
    arguments = {with_it: 2 if "steps" in with_it else True}
    plain, other = run(tmp_path, **STEPS), run(tmp_path, **STEPS, **arguments)
    plain.train(), other.train()
    tolerance = 2e-2 if "bf16" in arguments else 1e-3
    for step, expected in evaluations(plain).items():
        for key, value in expected.items():
            assert evaluations(other)[step][key] == pytest.approx(value, rel=tolerance, abs=tolerance), (step, key)


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_checkpoint_is_kept_and_loaded(tmp_path: Path, limit: int) -> None:
    trainer = run(tmp_path, **BEST, save_total_limit=limit)
    held: list[list[str]] = []

    class Look(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            held.append([folder.name.removeprefix("checkpoint-") for folder in checkpoints.numbered(tmp_path)])

    trainer.add_callback(Look())
    trainer.train()
    scores = {step: entry["eval_score"] for step, entry in evaluations(trainer).items() if step}
    best = max(scores, key=scores.__getitem__)
    assert best == 4, scores
    assert trainer.args.metric_for_best_model == "score"
    assert trainer.state.best_metric == scores[best]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert checkpoints.flaw(tmp_path / "checkpoint-4") is None
    reached = run(tmp_path / "as far", turns=TURNS[:4])
    reached.train()
    assert torch.equal(weights(trainer), weights(reached))
    assert trainer.evaluate()["eval_score"] == pytest.approx(scores[best], abs=1e-6)
    # As with transformers: the newest, which a run goes on from, and the best.
    assert held == [["2"], ["4", "2"][:limit], *([str(step), "4"] for step in (6, 8, 10, 12))]
    left = [folder.name for folder in checkpoints.numbered(tmp_path)]
    assert left == (["checkpoint-4"] if limit == 1 else ["checkpoint-12", "checkpoint-4"])


def test_saved_where_it_is_best(tmp_path: Path) -> None:
    trainer = run(tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="best", load_best_model_at_end=True)
    trainer.train()
    assert [folder.name for folder in checkpoints.numbered(tmp_path)] == ["checkpoint-4", "checkpoint-2"]
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    own = trainer.model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in saved.items())


def test_early_stopping_stops_where_the_score_falls(tmp_path: Path) -> None:
    named = {"callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]}
    trainer = run(tmp_path, named=named, **BEST)
    trainer.train()
    assert trainer.state.global_step == 8
    assert trainer.state.best_global_step == 4


@pytest.mark.parametrize(("stop", "moved"), [(2, False), (6, False), (6, True)])
def test_resumed_is_never_stopped_with_all_that_was_evaluated(tmp_path: Path, stop: int, moved: bool) -> None:
    def made(folder: Path, *callbacks: Any) -> UnlearnTrainer:
        named = {"callbacks": [EarlyStoppingCallback(early_stopping_patience=3), *callbacks]}
        return run(folder, model=with_dropout(), named=named, **BEST, save_total_limit=2)

    straight = made(tmp_path / "straight")
    straight.train()
    made(tmp_path / "stopped", Stop(stop)).train()
    folder = tmp_path / "stopped"
    if moved:
        folder = Path(shutil.move(folder, tmp_path / "moved"))
    resumed = made(folder)
    if moved and stop == 6:
        resumed.evaluate()
    resumed.train(resume_from_checkpoint=True)
    assert evaluations(resumed) == evaluations(straight)
    assert resumed.state.global_step == straight.state.global_step == 10
    assert resumed.state.best_metric == straight.state.best_metric
    assert resumed.state.best_model_checkpoint == str(folder / "checkpoint-4")
    assert torch.equal(weights(resumed), weights(straight))
    assert resumed.evaluate()["eval_score"] == straight.evaluate()["eval_score"]
    names = [[path.name for path in checkpoints.numbered(of)] for of in (folder, tmp_path / "straight")]
    assert names[0] == names[1]


def test_a_state_names_the_best_checkpoint_where_it_lies(tmp_path: Path) -> None:
    run(tmp_path, **BEST).train()
    for step, best in ((2, 2), (4, 4), (10, 4)):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")


def test_one_that_was_not_written_is_not_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run(tmp_path, **BEST)
    whole = trainer._save_rng_state

    def no_space(*arguments: Any) -> None:
        if trainer.state.global_step == 4:
            raise OSError(28, "No space left on device")
        whole(*arguments)

    monkeypatch.setattr(trainer, "_save_rng_state", no_space)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists()


def test_other_rows_to_evaluate_on_are_another_run(tmp_path: Path) -> None:
    run(tmp_path, **BEST, named={"callbacks": [Stop(4)]}).train()
    with pytest.raises(UserError, match="another set of evaluation rows"):
        run(tmp_path, **BEST, named={"eval_dataset": {**SETS, "retain": RETAIN}}).train(True)


@pytest.mark.parametrize(
    ("arguments", "named", "said"),
    [
        ({**BEST, "eval_strategy": "no", "save_strategy": "no"}, {}, "need evaluations"),
        ({"metric_for_best_model": "score"}, {}, "need evaluations"),
        ({"save_strategy": "best"}, {}, "need evaluations"),
        ({}, {"callbacks": [EarlyStoppingCallback()]}, "need evaluations"),
        (BEST, {"eval_dataset": None}, "need evaluations"),
        ({**BEST, "metric_for_best_model": "retain_los"}, {}, "did you mean 'retain_loss'"),
        ({**BEST, "metric_for_best_model": "score"}, {"eval_dataset": RETAIN}, "one set without a name"),
        (BEST, {"eval_dataset": {"retain": RETAIN}}, "one of an objective to keep|eval_dataset has retain"),
        ({**BEST, "metric_for_best_model": "forget_probability"}, {}, "less is better; give greater_is_better=False"),
        ({**BEST, "metric_for_best_model": "forget_loss"}, {}, "more is better; give greater_is_better=True"),
        ({**BEST, "metric_for_best_model": "eval_score", "greater_is_better": False}, {}, "more is better"),
        ({**BEST, "save_steps": 4}, {}, "give save_steps=2 or save_strategy='best'"),
    ],
)
def test_a_best_model_that_cannot_be_told_is_refused(
    tmp_path: Path, arguments: dict[str, Any], named: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run(tmp_path, named=named, **arguments)


def test_a_rate_that_follows_a_metric_has_its_direction(tmp_path: Path) -> None:
    plateau = {"eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "reduce_lr_on_plateau"}
    with pytest.raises(UserError, match=r"give lr_scheduler_kwargs=\{'mode': 'max'\}"):
        run(tmp_path, **plateau)
    trainer = run(tmp_path, **plateau, lr_scheduler_kwargs={"mode": "max", "patience": 0})
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[4] == 3e-3, "while the score rises"
    assert rates[-1] < 3e-3, "once it falls"


def test_weights_that_an_evaluation_rounded_are_not_trained(tmp_path: Path) -> None:
    trainer = run(tmp_path, bf16_full_eval=True, **STEPS)
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trainer.evaluate()
    with pytest.raises(UserError, match="rounded weights would be trained on"):
        trainer.train()


def test_a_model_of_numbers_that_are_none_is_never_the_best(tmp_path: Path) -> None:
    broken = copy.deepcopy(tiny.model())
    trainer = run(tmp_path, model=broken)
    trainer.evaluate()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    got = trainer.evaluate(SETS)
    assert str(got["eval_forget_probability"]) == "nan"
    now = {name: got[f"eval_{name}_probability"] for name in SETS}
    assert str(scored(now, dict.fromkeys(SETS, 0.5), trainer.roles)["score"]) == "nan"


def test_a_run_is_one_epoch_and_is_evaluated_at_its_end(tmp_path: Path) -> None:
    trainer = run(tmp_path, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True)
    trainer.train()
    assert list(evaluations(trainer)) == [0, 12]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-12")


RANKS = """
import json
import os
import os
import sys
from pathlib import Path
import torch
from tests.test_trainer_evaluation import ranked, weights
out = Path(sys.argv[1])
found, trained = ranked(out / "run", accumulation=1)
rank = torch.distributed.get_rank()
torch.save((found, trained), out / f"{rank}.pt")
torch.distributed.barrier()
os._exit(0)  # all is said; gloo's threads now and then abort a process that takes itself down in order
"""


def ranked(folder: Path, accumulation: int) -> tuple[list[Any], torch.Tensor]:
    """What is evaluated on some ranks, of sets that these do not divide."""
    named = {"callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]}
    more = {"per_device_eval_batch_size": 2, "gradient_accumulation_steps": accumulation, "save_total_limit": 1}
    trainer = run(folder, named=named, **BEST, **more)
    first = trainer.evaluate()
    trainer.train()
    out = trainer.predict(RETAIN[:5])
    kept = [{k: v for k, v in found.items() if not any(part in k for part in ("second", "time", "epoch"))}
            for found in (first, *evaluations(trainer).values(), out.metrics)]  # fmt: skip
    best = [trainer.state.global_step, trainer.state.best_global_step, trainer.state.best_metric]
    names = [path.name for path in checkpoints.numbered(folder)]
    return [kept, best, names, out.predictions.shape, out.label_ids.tolist()], weights(trainer)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed training")
def test_two_ranks_evaluate_as_one(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    forked.run(tmp_path / "ranks.py", str(tmp_path))
    (one, alone), *ranks = (
        ranked(tmp_path / "one", accumulation=2),
        *(torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)),
    )
    for found, trained in ranks:
        assert (trained - alone).abs().max() < 2e-5
        for theirs, ours in zip(found[0], one[0], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)
        assert found[1] == pytest.approx(one[1], rel=1e-4)
        assert found[1][:2] == [8, 4]
        assert found[2:] == one[2:]


def test_a_run_that_stopped_early_takes_no_step_more_when_resumed(tmp_path: Path) -> None:
    arguments = {**STEPS, "eval_steps": 1, "save_steps": 1, "metric_for_best_model": "score"}
    patient = EarlyStoppingCallback(early_stopping_patience=1)
    first = run(tmp_path, named={"callbacks": [patient]}, **arguments)
    first.train()
    assert first.state.global_step == 5 < len(TURNS), "keeping began at step 5"
    assert (tmp_path / "checkpoint-5").is_dir()
    again = run(tmp_path, named={"callbacks": [EarlyStoppingCallback(1)]}, **arguments)
    again.train(resume_from_checkpoint=True)
    assert (again.state.global_step, again.state.best_global_step) == (5, 4)
    assert torch.equal(weights(again), weights(first))
    assert sorted(evaluations(again)) == sorted(evaluations(first))
    longer = run(tmp_path, named={"callbacks": [EarlyStoppingCallback(3)]}, **arguments)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert longer.state.global_step == 7, "with more patience than it had, it goes on"


def test_sets_that_are_given_later_are_those_that_are_evaluated(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    expected = trainer.evaluate(RETAIN)["eval_loss"]
    trainer.eval_dataset = RETAIN
    got = trainer.evaluate()
    assert got["eval_loss"] == expected
    assert not trainer.roles
    assert "eval_score" not in got
    with pytest.raises(UserError, match="unknown set 'retain'; there are none"):
        trainer.evaluate("retain")
    trainer.eval_dataset = {"retain": RETAIN, "forget": FORGET}
    assert trainer.evaluate()["eval_retain_loss"] == expected
    with pytest.raises(UserError, match="unknown set 'retrain'; did you mean 'retain'"):
        trainer.evaluate("retrain")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": [5] * 65, "labels": [5] * 65}, "row 1: the row has 65 tokens and max_length is 64"),
        ({"input_ids": [5, 260], "labels": [5, 7]}, "row 1: its input_ids have 260, but the tokenizer has 260 tokens"),
        ({"input_ids": [5, 7], "labels": [5, -1]}, "row 1: its labels have -1"),
        ({"input_ids": [5.0, 7.0], "labels": [5, 7]}, "row 1: its input_ids are no list of whole numbers"),
        ({"input_ids": "abc", "labels": [5, 7]}, "row 1: its input_ids are no list of whole numbers"),
        ({"input_ids": [[5, 7]], "labels": [[5, 7]]}, "row 1: its input_ids are no list of whole numbers"),
        ({"question": "a" * 70, "answer": "b"}, r"row 1: the row has \d+ tokens and max_length 64"),
    ],
)
def test_rows_that_no_model_can_be_given_are_refused_by_their_number(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"eval_dataset, {said}"):
        run(tmp_path, named={"eval_dataset": [row], "max_length": 64})


def test_a_metric_of_ones_own_may_be_called_score_but_none_takes_anothers_name(tmp_path: Path) -> None:
    named = {"eval_dataset": RETAIN, "compute_metrics": lambda given: {"score": -float((given.label_ids > 0).sum())}}
    trainer = run(tmp_path, named=named, **BEST, metric_for_best_model="score")
    trainer.train()
    answers = sum(sum(label > 0 for label in encode(row, tiny.tokenizer(), 512).labels) for row in RETAIN)
    assert trainer.state.best_metric == -answers
    taken = run(tmp_path, named={"compute_metrics": lambda given: {"probability": 1.0}})
    with pytest.raises(UserError, match="compute_metrics gives 'probability'"):
        taken.evaluate()


def test_early_stopping_that_could_never_stop_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a run is one epoch"):
        run(tmp_path, named={"callbacks": [EarlyStoppingCallback(1)]}, eval_strategy="epoch")


def test_a_best_model_that_is_gone_is_told_before_the_run_goes_on(tmp_path: Path) -> None:
    run(tmp_path / "run", **BEST).train()
    shutil.copytree(tmp_path / "run" / "checkpoint-8", tmp_path / "moved" / "checkpoint-8")
    shutil.rmtree(tmp_path / "run")
    again = run(tmp_path / "moved", **BEST)
    with pytest.raises(UserError, match="the run's best, checkpoint-4, is not beside it"):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8


class Evaluate(TrainerCallback):
    """Evaluates at an event of the first step."""

    trainer: UnlearnTrainer

    def __init__(self, event: str) -> None:
        setattr(self, event, self.evaluate)

    def evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.trainer.evaluate()


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step"])
def test_the_start_is_never_a_model_that_has_begun_to_train(tmp_path: Path, event: str) -> None:
    plain = run(tmp_path, eval_strategy="steps", eval_steps=4)
    plain.train()
    more = run(tmp_path, eval_strategy="steps", eval_steps=4, named={"callbacks": [asks := Evaluate(event)]})
    asks.trainer = more
    more.train()
    assert evaluations(more)[12] == evaluations(plain)[12]
    none = run(tmp_path, named={"callbacks": [asks := Evaluate("on_optimizer_step")]})
    asks.trainer = none
    none.train()
    assert not any("score" in key for key in none.evaluate()), "nothing was evaluated before the first step"


def test_each_training_has_a_start_of_its_own(tmp_path: Path) -> None:
    trainer = run(tmp_path, turns=by_turns({"forget": 1}, 4, 3))
    assert trainer.evaluate()["eval_score"] == 0
    trainer.train()
    between = trainer.evaluate()
    assert between["eval_score"] > 0
    trainer.train()
    after = trainer.evaluate()
    left = after["eval_forget_probability"] / between["eval_forget_probability"]
    assert after["eval_forgotten"] == pytest.approx(1 - left), "relative to the model between them"
    assert left < 1
    trainer.train()
    trainer.train()
    assert not any("score" in key for key in trainer.evaluate()), "it was not evaluated between the last two"


def test_a_start_that_was_evaluated_before_training_is_in_checkpoints(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2, "turns": by_turns({"forget": 1}, 4, 4)}
    straight = run(tmp_path, **saves)
    straight.evaluate()
    straight.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = run(tmp_path, model=tiny.model(seed=1), **saves)
    resumed.evaluate()  # of what will be replaced
    resumed.train(resume_from_checkpoint=True)
    assert straight.evaluate()["eval_score"] > 0
    for key in ("eval_forgotten", "eval_kept", "eval_score"):
        assert resumed.evaluate()[key] == straight.evaluate()[key]
    other = run(tmp_path, named={"eval_dataset": {"forget": FORGET[:2], "retain": RETAIN[:2]}}, **saves)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not any("score" in key for key in other.evaluate()), "the start was of other rows"
