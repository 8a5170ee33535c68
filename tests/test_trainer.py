from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from dualoptim import DualOptim, DualOptimPlus, UnlearnTrainer
from dualoptim.data import collate, question
from dualoptim.errors import UserError
from dualoptim.losses import LOSSES, RMU, sequence_log_probs
from dualoptim.schedule import Turn, by_turns, jointly
from dualoptim.trainer import Objective
from dualoptim.training.combine import gramian, gru, pcgrad

from . import forked, tiny

FORGET = [question(f"What is {i}?", "It is " + "x" * (1 + i % 5) + ".") for i in range(8)]
RETAIN = [question(f"Who is {i}?", "That is " + "y" * (1 + i % 7) + ".") for i in range(8)]
REFUSALS = ["I don't know.", "No idea."]
ADAMW = (torch.optim.AdamW, {"lr": 1e-3})
PLUS = (DualOptimPlus, {"lr": 1e-3})


def trainer(
    folder: Path,
    turns: list[Turn],
    *,
    accumulation: int = 1,
    optimizer: Any = PLUS,
    forget: str = "IDK",
    retain: str = "GD",
    reference: Any = None,
    combine: Any = None,
    bound: float | None = None,
    callbacks: Any = None,
    release: bool = False,
    rows: Any = None,
    warmup: int = 0,
    sam_rho: float | None = None,
    **arguments: Any,
) -> UnlearnTrainer:
    settings = {
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return UnlearnTrainer(
        tiny.model(),
        TrainingArguments(
            str(folder),
            learning_rate=1e-3,
            gradient_accumulation_steps=accumulation,
            **{**settings, **arguments},
        ),
        objectives={
            "forget": Objective(rows or FORGET, LOSSES[forget](), refusals=REFUSALS),
            "retain": Objective(
                RETAIN,
                LOSSES[retain](),
                weight=2.0,
                refusals=REFUSALS,
                bound=bound,
                **({"multiplier_lr": 0.5, "multiplier_warmup": warmup} if bound is not None else {}),
            ),
        },
        turns=turns,
        processing_class=tiny.tokenizer(),
        reference=reference,
        combine=combine,
        sam_rho=sam_rho,
        optimizer_cls_and_kwargs=optimizer,
        callbacks=callbacks,
        release_gradients=release,
    )


def weights(of: UnlearnTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in of.model.parameters()])


def test_a_paused_objective_steps_for_nothing_and_the_others_go_on(tmp_path: Path) -> None:
    alternating = trainer(tmp_path / "a", by_turns({"forget": 1, "retain": 1}, 4, 6))
    alternating.paused = {"forget"}
    before = weights(alternating).clone()
    alternating.train()
    assert not torch.equal(weights(alternating), before)
    states = alternating.multi_objective.state.values()  # type: ignore[union-attr]
    assert all(own["delta_step/retain"] == 3 and own["delta_step/forget"] == 0 for own in states)
    joint = trainer(tmp_path / "b", jointly({"forget": 1, "retain": 1}, 4, 3), optimizer=ADAMW)
    joint.paused = {"forget"}
    joint.train()
    assert not any("loss/forget" in entry for entry in joint.state.log_history)
    assert any("loss/retain" in entry for entry in joint.state.log_history)


class Weighs(TrainerCallback):
    """Keeps the weight of what is kept at 0 up to a step."""

    def __init__(self, until: int) -> None:
        self.until, self.of, self.seen = until, None, []  # type: ignore[var-annotated]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(weights(self.of).clone())
        self.of.objectives["retain"].weight = 2.0 * (state.global_step >= self.until)


@pytest.mark.parametrize(("until", "steps"), [(6, 0), (5, 1)])
def test_steps_of_the_weight_0_alone_are_skipped_until_it_is_changed(until: int, steps: int, tmp_path: Path) -> None:
    told = Weighs(until)
    told.of = run = trainer(tmp_path / "a", by_turns({"forget": 1, "retain": 1}, 4, 6), callbacks=[told])
    run.train()
    assert torch.equal(told.seen[1], told.seen[2]), "no step along the momentum of what forgets"
    assert not torch.equal(told.seen[2], told.seen[3])
    states = run.multi_objective.state.values()  # type: ignore[union-attr]
    assert all((own["delta_step/forget"], own["delta_step/retain"]) == (3, steps) for own in states)
    paused = trainer(tmp_path / "b", by_turns({"forget": 1, "retain": 1}, 4, 6))
    paused.paused = {"retain"}
    paused.train()
    assert torch.equal(weights(paused), weights(run)) == (not steps)


@pytest.mark.parametrize(
    "turns", [by_turns({"forget": 1, "retain": 1}, 4, 2), jointly({"forget": 1, "retain": 1}, 4, 2)]
)
def test_skipped_steps_of_the_weight_0_are_logged(
    turns: list[Turn], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    UnlearnTrainer(
        tiny.model(),
        TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
        objectives={"forget": Objective(FORGET, LOSSES["GA"]()), "retain": Objective(RETAIN, LOSSES["GD"](), 0.0)},
        turns=turns,
        processing_class=tiny.tokenizer(),
        optimizer_cls_and_kwargs=ADAMW,
    )
    said = "the weight of 'retain' is 0, so steps that serve nothing else are skipped until it is changed"
    assert (said in caplog.text) == (len(turns[0]) == 1)


def test_a_step_whose_objectives_are_all_paused_leaves_a_gradient_scaler_as_it_is(tmp_path: Path) -> None:
    found = []
    for place, scaler in (("with", torch.amp.GradScaler("cpu")), ("without", None)):
        run = trainer(tmp_path / place, by_turns({"forget": 1, "retain": 1}, 4, 6))
        run.accelerator.scaler, run.paused = scaler, {"forget"}
        run.train()
        assert run.accelerator.scaler is scaler
        found.append(weights(run))
        if scaler is not None:
            assert run.optimizer.scaler is scaler
            assert scaler.state_dict()["_growth_tracker"] == 3, "three steps had gradients"
    torch.testing.assert_close(*found)


RATIO = {"forget": 1, "retain": 2}
RANKS = """
import os
import sys
from pathlib import Path
import torch
from tests.test_trainer import ADAMW, PLUS, RATIO, by_turns, jointly, pcgrad, trainer, weights
out = Path(sys.argv[1])
made = {
    "turns": (by_turns(RATIO, 4, 6), {"optimizer": PLUS, "forget": "NPO", "accumulation": int(sys.argv[2])}),
    "joint": (jointly(RATIO, 6, 4), {"optimizer": ADAMW, "bound": 0.5}),
    "sam": (jointly(RATIO, 12, 2), {"optimizer": ADAMW, "sam_rho": 0.1, "accumulation": 2 * int(sys.argv[2])}),
    "few": (jointly({"forget": 1, "retain": 5}, 6, 4), {"optimizer": ADAMW, "forget": "DPO"}),
    "few combined": (jointly({"forget": 1, "retain": 5}, 6, 2), {"optimizer": ADAMW, "combine": pcgrad}),
    "combined": (jointly(RATIO, 6, 4), {"optimizer": ADAMW, "combine": pcgrad}),
}
for name, (turns, options) in made.items():
    run = trainer(out / "run", turns, **options)
    run.train()
    losses = [[entry[key] for key in sorted(entry) if "loss/" in key] for entry in run.state.log_history]
    if run.is_world_process_zero():
        torch.save((weights(run), losses), out / f"{name}-{run.args.world_size}.pt")
    torch.distributed.is_initialized() and torch.distributed.barrier()
os._exit(0)  # all is said; gloo's threads now and then abort a process that takes itself down in order
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed training")
def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    # Half the accumulation on twice the ranks: the same batches.
    for count, accumulation in ((2, "1"), (1, "2")):
        forked.run(tmp_path / "ranks.py", str(tmp_path), accumulation, count=count)
    for name in ("turns", "joint", "sam", "few", "few combined", "combined"):
        (two, two_losses), (one, one_losses) = (torch.load(tmp_path / f"{name}-{ranks}.pt") for ranks in (2, 1))
        torch.testing.assert_close(two, one, rtol=0, atol=2e-5)
        for a, b in zip(two_losses, one_losses, strict=True):
            assert a == pytest.approx(b, abs=2e-4)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_optimizer_steps_for_the_objective_whose_turn_it_is(tmp_path: Path, accumulation: int) -> None:
    run = trainer(tmp_path, by_turns(RATIO, 4, 7), accumulation=accumulation)
    run.train()
    optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    counts = optimizer.state[next(run.model.parameters())]
    assert [counts[f"delta_step/{name}"] for name in ("forget", "retain")] == [3, 4]
    assert counts["step"] == run.state.global_step == 7


@pytest.mark.parametrize(
    ("forget", "retain"), [("IDK", "GD"), ("NPO", "KL"), ("DPO", "AP"), ("ME", "GD"), ("GA", "GD")]
)
@pytest.mark.parametrize("joint", [False, True])
def test_one_batch_of_eight_is_eight_of_one(tmp_path: Path, forget: str, retain: str, joint: bool) -> None:
    turns = (jointly if joint else by_turns)({"forget": 1, "retain": 1}, 8, 4)
    pick = {"forget": forget, "retain": retain, "reference": tiny.model(seed=1), "optimizer": ADAMW}
    whole, split = (trainer(tmp_path, turns, accumulation=n, **pick) for n in (1, 8))
    whole.train(), split.train()
    moved = (weights(whole) - weights(trainer(tmp_path, turns, **pick))).abs().max()
    assert moved > 1e-3
    # Adam's first steps divide by tiny second moments, so rounding is amplified: a hundredth of what moved at most.
    assert (weights(whole) - weights(split)).abs().max() < 0.01 * moved
    logged = [[entry[key] for entry in run.state.log_history for key in sorted(entry) if key.startswith("loss/")]
              for run in (whole, split)]  # fmt: skip
    assert logged[0] == pytest.approx(logged[1], rel=1e-2, abs=1e-3)


def test_a_joint_step_descends_the_weighted_sum_of_the_losses(tmp_path: Path) -> None:
    sgd = (torch.optim.SGD, {"lr": 1e-2})
    run = trainer(tmp_path, jointly({"forget": 1, "retain": 1}, 16, 1), optimizer=sgd, lr_scheduler_type="constant")
    model = copy.deepcopy(run.model)
    batch = run.rows.collate([run.rows[draw] for draw in next(iter(run.get_train_dataloader().batch_sampler))])
    loss = LOSSES["IDK"]()(model, batch["forget"], None) + 2.0 * LOSSES["GD"]()(model, batch["retain"], None)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-2 * parameter.grad
    run.train()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (weights(run) - expected).abs().max() < 1e-6


def test_a_batch_of_another_objective_than_the_turns_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, by_turns(RATIO, 4, 6))
    run.get_train_dataloader = lambda: trainer(tmp_path, by_turns({"retain": 1}, 4, 6)).get_train_dataloader()
    with pytest.raises(ValueError, match="step 0 serves forget, but its batch carries retain"):
        run.train()


def test_a_joint_turn_with_an_optimizer_of_single_objectives_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DualOptimPlus steps for one objective"):
        trainer(tmp_path, jointly({"forget": 1, "retain": 1}, 4, 2)).train()


def test_losses_without_what_they_need_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="KL of objective 'retain' needs reference"):
        trainer(tmp_path, by_turns(RATIO, 4, 2), retain="KL")
    rows = {"forget": Objective(FORGET, LOSSES["IDK"]())}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="IDK of objective 'forget' needs refusals"):
        UnlearnTrainer(tiny.model(), arguments, objectives=rows, turns=by_turns({"forget": 1}, 4, 2),
                       processing_class=tiny.tokenizer())  # fmt: skip


class Stop(TrainerCallback):
    """Ends a run after some steps, as a crash would after its last checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("bf16", [False, True])
def test_stopped_and_resumed_is_never_stopped_bit_for_bit(tmp_path: Path, bf16: bool) -> None:
    turns = by_turns(RATIO, 4, 8)
    settings = {"save_strategy": "steps", "save_steps": 4, "bf16": bf16, "accumulation": 2}
    straight = trainer(tmp_path / "straight", turns, **settings)
    straight.train()
    trainer(tmp_path / "stopped", turns, callbacks=[Stop(4)], **settings).train()
    resumed = trainer(tmp_path / "stopped", turns, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert torch.equal(weights(straight), weights(resumed))


@pytest.mark.parametrize("forget", ["NPO", "DPO"])
def test_what_the_reference_says_once_is_what_it_says_at_every_step(tmp_path: Path, forget: str) -> None:
    once = trainer(tmp_path, by_turns(RATIO, 4, 6), forget=forget)
    anew = trainer(tmp_path, by_turns(RATIO, 4, 6), forget=forget, reference=copy.deepcopy(tiny.model()))
    assert once.rows.reference_log_probs
    anew.rows.reference_log_probs.clear()  # nothing is in its batches, so each asks the reference
    once.train(), anew.train()
    torch.testing.assert_close(weights(once), weights(anew), rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_under_an_adapter_the_reference_is_the_model_as_it_was_and_drops_nothing_out(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    inner = tiny.model()
    inner.config.attention_dropout = 0.5  # which a reference does not have, though the model is in training
    for layer in inner.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model = peft.get_peft_model(inner, peft.LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear"))
    with torch.no_grad():  # an adapter that has learned something
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    run = UnlearnTrainer(
        model,
        arguments,
        objectives={"forget": Objective(FORGET, LOSSES["NPO"]())},
        turns=by_turns({"forget": 1}, 8, 2),
        processing_class=tiny.tokenizer(),
    )
    batch = run.rows.collate([run.rows[draw] for draw in next(iter(run._plan()))])["forget"]
    expected, _ = sequence_log_probs(model.eval(), batch)
    torch.testing.assert_close(batch["reference_log_probs"], expected, rtol=1e-5, atol=1e-4)
    without, _ = sequence_log_probs(tiny.model(), batch)
    assert not torch.allclose(without, expected, atol=1e-2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.train()
    for _ in range(2):
        asked, _ = sequence_log_probs(run.reference, batch)
        torch.testing.assert_close(asked, expected, rtol=1e-5, atol=1e-4)
    assert model.training
    now, _ = sequence_log_probs(model.eval(), batch)
    assert not torch.allclose(now, expected, atol=1e-2)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("rule", [pcgrad, gru])
def test_gradients_are_combined_over_the_whole_step(tmp_path: Path, rule: Any, accumulation: int) -> None:
    turns = jointly({"forget": 1, "retain": 1}, 8, 1)
    run = trainer(
        tmp_path, turns, optimizer=ADAMW, accumulation=accumulation, combine=rule, callbacks=[KeepGradients()]
    )
    run.train()
    kept = next(seen.gradients for seen in run.callback_handler.callbacks if isinstance(seen, KeepGradients))
    alone = []
    for name in ("forget", "retain"):
        model = tiny.model()
        batches = [run.rows.collate([run.rows[draw] for draw in draws]) for draws in run._plan()]
        sizes = [run.objectives[name].loss.size(batch[name]) for batch in batches]
        for batch, size in zip(batches, sizes, strict=True):
            loss = run.objectives[name].loss(model, batch[name]) * run.objectives[name].weight
            (loss * size / sum(sizes)).backward()
        alone.append([p.grad for p in model.parameters()])
    weights = rule(gramian(alone), ["forget", "retain"]).tolist()
    for got, forget, retain in zip(kept, *alone, strict=True):
        torch.testing.assert_close(got, weights[0] * forget + weights[1] * retain, rtol=1e-4, atol=1e-6)


def test_gru_forgets_what_the_losses_forget_in_whatever_order_the_objectives_come(tmp_path: Path) -> None:
    turns, found = jointly({"forget": 1, "retain": 1}, 8, 1), []
    for order in (("forget", "retain"), ("retain", "forget")):
        run = UnlearnTrainer(
            tiny.model(),
            TrainingArguments(str(tmp_path / order[0]), report_to="none", use_cpu=True, disable_tqdm=True),
            objectives={
                name: {"forget": Objective(FORGET, LOSSES["GA"]()), "retain": Objective(RETAIN, LOSSES["GD"]())}[name]
                for name in order
            },
            turns=turns,
            processing_class=tiny.tokenizer(),
            combine=gru,
            optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}),
        )
        run.train()
        found.append(weights(run))
    torch.testing.assert_close(*found)


def test_layers_that_no_loss_reaches_stay_when_gradients_are_combined(tmp_path: Path) -> None:
    model = tiny.model()
    above = model.model.layers[1].mlp.up_proj.weight
    before = above.detach().clone()
    UnlearnTrainer(
        model,
        TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True),
        objectives={
            "forget": Objective(FORGET, LOSSES["RMU"](layer=0)),
            "retain": Objective(RETAIN, LOSSES["RMURetain"](layer=0)),
        },
        turns=jointly({"forget": 1, "retain": 1}, 4, 2),
        processing_class=tiny.tokenizer(),
        reference=tiny.model(),
        combine=pcgrad,
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    ).train()
    assert torch.equal(above, before)


class KeepGradients(TrainerCallback):
    """Keeps the gradients that the optimizer is about to see."""

    gradients: list[torch.Tensor]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = [p.grad.clone() for p in kwargs["model"].parameters()]


def test_a_second_training_keeps_its_own_diagnostics_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path, by_turns({"forget": 1, "retain": 1}, 4, 2))
    run.train()
    first = run.diagnostics
    run.train()
    assert [reading["step"] for reading in run.diagnostics] == [2]
    assert run.diagnostics != first


def test_a_bound_moves_the_multiplier_and_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    turns = jointly({"forget": 1, "retain": 1}, 4, 6)
    settings = {"save_strategy": "steps", "save_steps": 3, "optimizer": ADAMW, "bound": 2.0}
    straight = trainer(tmp_path / "straight", turns, **settings)
    straight.train()
    losses = [entry["loss/retain"] for entry in straight.state.log_history if "loss/retain" in entry]
    expected = 2.0
    for loss in losses:
        expected = max(0.0, expected + 0.5 * (loss - 2.0))
    assert straight.multipliers["retain"] == pytest.approx(expected, abs=1e-3)
    assert straight.multipliers["retain"] > 2.0, "the loss of an untrained model is above the bound"
    trainer(tmp_path / "stopped", turns, callbacks=[Stop(3)], **settings).train()
    resumed = trainer(tmp_path / "stopped", turns, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.multipliers == straight.multipliers
    assert torch.equal(weights(resumed), weights(straight))


def test_a_second_training_begins_with_the_multipliers_of_the_first(tmp_path: Path) -> None:
    run = trainer(tmp_path, jointly({"forget": 1, "retain": 1}, 4, 3), optimizer=ADAMW, bound=2.0, warmup=1)
    run.train()
    assert run.multipliers["retain"] > 2.0
    run.train()
    assert next(e["multiplier/retain"] for e in run.state.log_history if "multiplier/retain" in e) == 2.0


def test_a_multiplier_stays_where_it_begins_until_it_is_warm(tmp_path: Path) -> None:
    """PDU's authors begin it high, leave it there for half the epochs, then move it after every step."""
    turns = jointly({"forget": 1, "retain": 1}, 4, 6)
    settings = {"save_strategy": "steps", "save_steps": 2, "optimizer": ADAMW, "bound": 2.0, "warmup": 3}
    straight = trainer(tmp_path / "straight", turns, **settings)
    straight.train()
    logged = [entry for entry in straight.state.log_history if "loss/retain" in entry]
    expected = 2.0
    for step, entry in enumerate(logged):
        if step >= 3:
            expected = max(0.0, expected + 0.5 * (entry["loss/retain"] - 2.0))
        assert entry["multiplier/retain"] == pytest.approx(expected, abs=1e-3)
    assert expected > 2.5
    trainer(tmp_path / "stopped", turns, callbacks=[Stop(2)], **settings).train()
    resumed = trainer(tmp_path / "stopped", turns, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.multipliers == straight.multipliers


def test_an_optimizer_of_one_objective_serves_all_turns(tmp_path: Path) -> None:
    single = (DualOptim, {"lr": 1e-3, "objectives": ("all",), "betas": (0.9, 0.95), "weight_decay": 0.01})
    adamw = (torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.01})
    for turns in (by_turns(RATIO, 4, 5), jointly({"forget": 1, "retain": 1}, 4, 5)):
        ours, torchs = (trainer(tmp_path, turns, optimizer=optimizer) for optimizer in (single, adamw))
        ours.train(), torchs.train()
        torch.testing.assert_close(weights(ours), weights(torchs), rtol=0, atol=2e-6)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, saving = (trainer(tmp_path, by_turns(RATIO, 4, 3)) for _ in range(2))
    getattr(saving.model, "activation_checkpointing_enable", saving.model.gradient_checkpointing_enable)()
    plain.train(), saving.train()
    assert torch.equal(weights(plain), weights(saving))


def test_each_objectives_loss_is_logged_for_its_own_steps(tmp_path: Path) -> None:
    run = trainer(tmp_path, by_turns(RATIO, 4, 6))
    run.train()
    logged = [{key for key in entry if key.startswith("loss/")} for entry in run.state.log_history if "loss" in entry]
    assert logged == [{"loss/forget"}, {"loss/retain"}, {"loss/retain"}] * 2


def test_the_optimizer_gets_the_trainers_rate_and_the_objectives_names(tmp_path: Path) -> None:
    plain = trainer(tmp_path, by_turns({"forget": 1, "retain": 1}, 4, 2), optimizer=(DualOptimPlus, {}))
    plain.create_optimizer()
    assert plain.optimizer.param_groups[0]["lr"] == 1e-3
    assert plain.optimizer.objectives == ("forget", "retain")
    given = {"lr": 2e-3, "objectives": ("retain", "forget")}
    told = trainer(tmp_path, by_turns({"forget": 1, "retain": 1}, 4, 2), optimizer=(DualOptimPlus, given))
    told.create_optimizer()
    assert told.optimizer.param_groups[0]["lr"] == 2e-3
    assert told.optimizer.objectives == ("retain", "forget")


@pytest.mark.parametrize("optimizer", [PLUS, ADAMW], ids=["DualOptim+", "AdamW"])
def test_released_gradients_train_alike_to_the_bit(tmp_path: Path, optimizer: Any) -> None:
    turns = by_turns({"forget": 1, "retain": 2}, 4, 6)
    plain = trainer(tmp_path / "a", turns, optimizer=optimizer)
    released = trainer(tmp_path / "b", turns, optimizer=optimizer, release=True)
    for each in (plain, released):
        each.train()
    assert torch.equal(weights(plain), weights(released))
    assert not torch.equal(weights(plain), torch.cat([p.detach().flatten() for p in tiny.model().parameters()]))
    if optimizer is PLUS:
        state = next(iter(released.multi_objective.state.values()))  # type: ignore[union-attr]
        assert (int(state["step"]), int(state["delta_step/forget"]), int(state["delta_step/retain"])) == (6, 2, 4)


CHECKPOINTED = {
    reentrant: {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    for reentrant in (False, True)
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # newer versions have other names
@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm 1 clips by the norm of all of them; set it to 0"),
        ({"accumulation": 2}, "gradient_accumulation_steps is 2"),
        ({"combine": pcgrad, "optimizer": ADAMW}, "combine makes one of several"),
        (CHECKPOINTED[True], "use_reentrant in gradient_checkpointing_kwargs makes a parameter's gradient in several"),
    ],
)
def test_gradients_are_not_released_where_all_are_needed(tmp_path: Path, what: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=f"frees each gradient as it comes, but {wrong}"):
        trainer(tmp_path, jointly({"forget": 1, "retain": 1}, 4, 2), release=True, **what)


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
def test_gradients_are_released_under_checkpointing_of_a_loss_that_runs_the_model_twice(tmp_path: Path) -> None:
    turns, made = by_turns({"forget": 1}, 4, 2), {}
    for release in (False, True):
        made[release] = trainer(
            tmp_path, turns, forget="DPO", reference=tiny.model(1), release=release, **CHECKPOINTED[False]
        )
        made[release].train()
    assert torch.equal(weights(made[False]), weights(made[True]))


def test_released_gradients_have_no_norm_in_the_log(tmp_path: Path) -> None:
    logs = {}
    for release in (False, True):
        made = trainer(tmp_path, by_turns({"forget": 1}, 4, 2), release=release)
        made.train()
        logs[release] = [entry for entry in made.state.log_history if "loss" in entry]
    assert all(entry.pop("grad_norm") > 0 for entry in logs[False])
    assert logs[True] == logs[False]


def test_rows_of_every_form_train_alike(tmp_path: Path) -> None:
    class Numbered:  # a data set that is read by number, and does not end itself
        def __len__(self) -> int:
            return len(FORGET)

        def __getitem__(self, at: int) -> Any:
            return FORGET[at % len(FORGET)]

    forms = [
        FORGET,
        iter(FORGET),
        Numbered(),
        [{"question": row.question, "answer": row.answer} for row in FORGET],
    ]
    found = []
    for rows in forms:
        made = UnlearnTrainer(
            tiny.model(),
            TrainingArguments(str(tmp_path), save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True),
            objectives={"forget": Objective(rows, LOSSES["IDK"](), refusals=REFUSALS)},
            turns=iter(by_turns({"forget": 1}, 4, 2)),
            processing_class=tiny.tokenizer(),
        )
        made.train()
        found.append(weights(made))
    assert not torch.equal(found[0], weights(trainer(tmp_path, by_turns({"forget": 1}, 4, 2))))
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize(
    ("objectives", "said"),
    [
        (lambda: {"forget": Objective([], LOSSES["GA"]())}, "objective 'forget': there are no rows"),
        (lambda: {"forget": Objective("rows.json", LOSSES["GA"]())}, "objective 'forget': .* these are str"),
        (lambda: {"forget": Objective([1], LOSSES["GA"]())}, "objective 'forget', row 1: .* this is int"),
        (lambda: {"forget": Objective(FORGET, LOSSES["GA"])}, "loss: give an instance"),
        (lambda: [Objective(FORGET, LOSSES["GA"]())], "objectives: give them by name"),
        (lambda: {"forget": (FORGET, LOSSES["GA"]())}, "objectives: 'forget' is a tuple; give Objective"),
    ],
)
def test_objectives_that_cannot_be_trained_on_are_refused(tmp_path: Path, objectives: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        UnlearnTrainer(
            tiny.model(),
            TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
            objectives=objectives(),
            turns=by_turns({"forget": 1}, 4, 2),
            processing_class=tiny.tokenizer(),
        )


def test_the_loss_of_a_batch_by_itself_is_its_objectives(tmp_path: Path) -> None:
    made = trainer(tmp_path, by_turns({"forget": 1}, 4, 2), forget="GA")
    batch = next(iter(made.get_train_dataloader()))
    expected = LOSSES["GA"]()(made.model, batch["forget"]).item()
    loss, outputs = made.compute_loss(made.model, batch, return_outputs=True)
    assert (loss.item(), outputs) == (pytest.approx(expected, rel=1e-6), {})
    assert made.compute_loss(made.model, batch).item() == loss.item()


def test_under_longrope_the_reference_gives_short_rows_their_own_scores_and_training_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.longrope(64)
    monkeypatch.setattr(tiny, "model", lambda: model)
    mixed = [*FORGET[:3], question("What is it?", "It is " + "x" * 60)]
    made = trainer(tmp_path, by_turns(RATIO, 4, 6), forget="NPO", rows=mixed)
    assert "forget: some rows have more than 64 tokens" in caplog.text
    assert "retain: some rows" not in caplog.text
    found = {key[1]: value for key, value in made.rows.reference_log_probs.items() if key[0] == "forget"}
    with torch.no_grad():
        for i, tokens in enumerate(made.rows.tokens["forget"]):
            alone, _ = sequence_log_probs(model, collate([tokens], 0))
            assert found[i] == pytest.approx(alone.item(), abs=1e-4)


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("forget", "retain"), [("DPO", "AP"), ("RMU", "GD")])
def test_training_is_the_same_whatever_torchs_default_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: torch.dtype, forget: str, retain: str
) -> None:
    monkeypatch.setitem(LOSSES, "RMU", lambda: RMU(layer=0))
    turns, found = by_turns(RATIO, 4, 6), []
    settings = {"forget": forget, "retain": retain, "save_strategy": "steps", "save_steps": 3, "logging_steps": 4}
    for dtype in (torch.float32, other):
        models = iter([tiny.model(), tiny.model()])
        with monkeypatch.context() as patched:
            patched.setattr(tiny, "model", lambda models=models: next(models))
            torch.set_default_dtype(dtype)
            try:
                trainer(tmp_path / str(dtype), turns, callbacks=[Stop(3)], **settings).train()
                run = trainer(tmp_path / str(dtype), turns, **settings)
                run.train(resume_from_checkpoint=True)
            finally:
                torch.set_default_dtype(torch.float32)
        found.append((weights(run), [entry["loss"] for entry in run.state.log_history if "loss" in entry]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("rule", [pcgrad, gru])
def test_a_step_that_was_abandoned_leaves_no_gradients_to_be_combined(tmp_path: Path, rule: Any) -> None:
    class Interrupt(TrainerCallback):
        times = 0

        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            self.times += 1
            if self.times == 1:
                raise KeyboardInterrupt

    turns, found = jointly({"forget": 1, "retain": 1}, 6, 3), []
    for callbacks in ([], [Interrupt()]):
        run = trainer(tmp_path, turns, optimizer=ADAMW, accumulation=3, combine=rule, callbacks=callbacks)
        if callbacks:
            with pytest.raises(KeyboardInterrupt):
                run.train()
        run.train()
        found.append(weights(run))
    assert torch.equal(*found)


def test_a_scaler_that_an_abandoned_step_put_aside_is_back_in_the_next_training(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        times = 0

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.times += 1
            if self.times == 1:
                raise KeyboardInterrupt

    run = trainer(tmp_path, by_turns({"forget": 1, "retain": 1}, 4, 2), callbacks=[Interrupt()])
    run.accelerator.scaler, run.paused = (scaler := torch.amp.GradScaler("cpu")), {"forget"}
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.accelerator.scaler is not scaler
    run.train()
    assert run.accelerator.scaler is run.optimizer.scaler is scaler
    assert scaler.state_dict()["_growth_tracker"] == 1


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_multiplier_as_it_is(tmp_path: Path, wrong: float) -> None:
    run = trainer(tmp_path, by_turns({"forget": 1, "retain": 1}, 4, 6), bound=2.0)
    loss, calls = run.objectives["retain"].loss, []

    class Odd(type(loss)):  # type: ignore[misc]
        def __call__(self, *args: Any) -> torch.Tensor:
            calls.append(1)
            return super().__call__(*args) * (wrong if len(calls) == 2 else 1.0)

    run.objectives["retain"].loss = Odd()
    run.train()
    logged = [entry for entry in run.state.log_history if "loss/retain" in entry]
    expected = 2.0
    for step, entry in enumerate(logged):
        if step != 1:
            expected = max(0.0, expected + 0.5 * (entry["loss/retain"] - 2.0))
        assert entry["multiplier/retain"] == pytest.approx(expected, abs=1e-3)
    assert len(logged) == 3
    assert expected > 5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"weight": "1"}, "weight must be a finite number, but is '1'"),
        ({"weight": None}, "weight must be a finite number, but is None"),
        ({"weight": torch.ones(2)}, "weight must be a finite number"),
        ({"bound": float("nan")}, "bound must be a finite number, but is nan"),
        ({"bound": "3"}, "bound must be a finite number, but is '3'"),
        ({"bound": 1.0, "multiplier_lr": -1.0}, "multiplier_lr must be > 0, but is -1.0"),
        ({"bound": 1.0, "multiplier_lr": "1"}, "multiplier_lr must be a finite number"),
        ({"bound": 1.0, "multiplier_warmup": -4}, "multiplier_warmup must be a whole number of steps >= 0, but is -4"),
        ({"bound": 1.0, "multiplier_warmup": 0.5}, "multiplier_warmup must be a whole number of steps"),
        ({"bound": 1.0, "weight": -1.0}, "weight: with bound=… the multiplier begins there"),
    ],
)
def test_numbers_of_an_objective_that_mean_nothing_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Objective(RETAIN, LOSSES["GD"](), **wrong)


def test_objectives_are_copied_and_the_trainers_own_may_be_changed_as_it_runs(tmp_path: Path) -> None:
    class Change(TrainerCallback):
        objective: Any = None

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if self.objective is not None:
                self.objective.weight = 9.0

    found = {}
    for whose in ("nobody's", "own", "trainer's"):
        own = {"forget": Objective(FORGET, LOSSES["GA"]()), "retain": Objective(RETAIN, LOSSES["GD"]())}
        made = UnlearnTrainer(
            tiny.model(),
            TrainingArguments(str(tmp_path), save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True),
            objectives=own,
            turns=jointly({"forget": 1, "retain": 1}, 4, 2),
            processing_class=tiny.tokenizer(),
            callbacks=[change := Change()],
        )
        change.objective = {"own": own, "trainer's": made.objectives}.get(whose, {}).get("retain")
        made.train()
        found[whose] = weights(made)
    assert torch.equal(found["nobody's"], found["own"])
    assert not torch.equal(found["nobody's"], found["trainer's"])


def test_a_callback_of_the_users_may_have_any_attribute(tmp_path: Path) -> None:
    class Uploads(TrainerCallback):
        save_to = load_from = "somewhere"

    settings = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, by_turns(RATIO, 4, 2), callbacks=[Uploads()], **settings).train()
    again = trainer(tmp_path, by_turns(RATIO, 4, 2), callbacks=[Uploads()], **settings)
    assert again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1")).global_step == 2
