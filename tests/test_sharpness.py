"""Sharpness-aware minimization of the losses to forget, against the rule written out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from dualoptim import resolve
from dualoptim.config import RunConfig
from dualoptim.errors import UserError
from dualoptim.schedule import by_turns, jointly
from dualoptim.training import arguments as trainer_arguments
from dualoptim.training import engines
from dualoptim.training.combine import gramian, gru
from dualoptim.training.sharpness import standing_at, worst_nearby

from . import test_trainer as made
from . import tiny

RHO = 0.3
JOINT = jointly({"forget": 1, "retain": 1}, 8, 2)


class Watch(TrainerCallback):
    """Keeps the first step's gradients, and every step's weights before and after they were computed."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.weights: list[list[Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append([p.detach().clone() for p in kwargs["model"].parameters()])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = self.gradients or [p.grad.clone() for p in kwargs["model"].parameters()]
        assert all(torch.equal(p, q) for p, q in zip(kwargs["model"].parameters(), self.weights[-1], strict=True))


def of_step(run: Any, name: str, model: nn.Module) -> tuple[list[Tensor], float]:
    """The gradient of an objective's loss over all of the first step's rows at once, and that loss."""
    number = run.args.gradient_accumulation_steps
    batches = [run.rows.collate([run.rows[draw] for draw in draws]) for draws in list(run._plan())[:number]]
    loss = run.objectives[name].loss
    sizes = [loss.size(batch[name]) for batch in batches]
    total = sum(loss(model, batch[name]) * size for batch, size in zip(batches, sizes, strict=True)) / sum(sizes)
    grads = torch.autograd.grad(total * run.objectives[name].weight, list(model.parameters()))
    return list(grads), total.item()


CASES: Mapping[str, Any] = {
    "joint": (JOINT, {"optimizer": made.ADAMW}),
    "joint, in two passes": (JOINT, {"optimizer": made.ADAMW, "accumulation": 2}),
    "joint, bf16": (JOINT, {"optimizer": made.ADAMW, "bf16": True}),
    "combined": (JOINT, {"optimizer": made.ADAMW, "combine": gru, "accumulation": 2}),
    "by turns, in two passes": (by_turns({"forget": 1, "retain": 1}, 8, 2), {"accumulation": 2}),
}


@pytest.mark.parametrize(("turns", "settings"), CASES.values(), ids=CASES)
def test_the_gradient_to_forget_is_that_of_the_worst_weights_nearby(
    tmp_path: Path, turns: Any, settings: dict[str, Any]
) -> None:
    watch = Watch()
    run = made.trainer(tmp_path, turns, forget="NPO", sam_rho=RHO, callbacks=[watch], **settings)
    run.train()
    model = tiny.model()
    ascent, at_start = of_step(run, "forget", model)
    norm = sum(float(g.double().square().sum()) for g in ascent) ** 0.5
    with torch.no_grad():
        for p, g in zip(model.parameters(), ascent, strict=True):
            p += RHO * g / norm
    expected, there = of_step(run, "forget", model)
    plain, _ = of_step(run, "forget", tiny.model())
    if "retain" in turns[0]:
        kept, _ = of_step(run, "retain", tiny.model())
        weights = gru(gramian([expected, kept]), ["forget", "retain"]).tolist() if "combine" in settings else [1.0, 1.0]
        expected = [weights[0] * f + weights[1] * r for f, r in zip(expected, kept, strict=True)]
        plain = [f + r for f, r in zip(plain, kept, strict=True)]
    rounding = 0.1 if settings.get("bf16") else 1e-3
    off = sum(float((a - b).square().sum()) for a, b in zip(watch.gradients, expected, strict=True)) ** 0.5
    way = sum(float((a - b).square().sum()) for a, b in zip(plain, expected, strict=True)) ** 0.5
    assert off < rounding * sum(float(e.square().sum()) for e in expected) ** 0.5
    assert settings.get("bf16") or way > 10 * off, "it would not be told from the gradient at the weights themselves"
    logged = next(entry for entry in run.state.log_history if "loss/forget" in entry)
    assert logged["loss/forget"] == pytest.approx(there, abs=0.05 if settings.get("bf16") else 1e-3)
    assert there > at_start


def test_a_paused_objective_moves_no_weights(tmp_path: Path) -> None:
    plain, sam = (made.trainer(tmp_path, JOINT, optimizer=made.ADAMW, sam_rho=rho) for rho in (None, RHO))
    for run in (plain, sam):
        run.paused = {"forget"}
        run.train()
    assert torch.equal(made.weights(sam), made.weights(plain))


def test_weights_come_back_to_the_bit_whatever_happens_there() -> None:
    model = tiny.model()
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e3
    worst = worst_nearby(list(model.parameters()), 7.0)
    assert all(p.grad is None for p in model.parameters())

    def fail_there() -> None:
        with standing_at(worst):
            moved = [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]
            assert sum(float(d.square().sum()) for d in moved) ** 0.5 == pytest.approx(7.0, rel=1e-4)
            raise KeyError

    with pytest.raises(KeyError):
        fail_there()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_without_a_direction_there_is_nowhere_to_go(value: float) -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), value)
    assert worst_nearby([weight, nn.Parameter(torch.ones(2))], 1.0) == []


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "no way": ({"sam_rho": 0.0}, "sam_rho must be > 0"),
    "released": ({"release": True, "sam_rho": 0.1}, "sam_rho goes a way along all of them first"),
    "nothing forgets": ({"forget": "GD", "sam_rho": 0.1}, "perturbs the weights where a loss forgets, and none does"),
}


@pytest.mark.parametrize(("settings", "said"), REFUSED.values(), ids=REFUSED)
def test_what_a_trainer_cannot_do_is_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made.trainer(tmp_path, JOINT, optimizer=made.ADAMW, **settings)


def test_weights_in_bf16_are_refused_where_they_are_trained() -> None:
    model = tiny.model().bfloat16()
    with pytest.raises(UserError, match=r"sam_rho: model\.embed_tokens\.weight is in bfloat16"):
        trainer_arguments.check_sam(0.1, {"forget"}, model)
    model.requires_grad_(False)
    trainer_arguments.check_sam(0.1, {"forget"}, model)


@pytest.mark.parametrize("engine", ["FSDP", "DeepSpeed"])
def test_sharded_weights_are_refused(engine: str) -> None:
    sharded: Any = SimpleNamespace(
        args=SimpleNamespace(world_size=1), model=tiny.model(), is_fsdp_enabled=engine == "FSDP",
        is_deepspeed_enabled=engine == "DeepSpeed",
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"sam_rho: puts other weights in the place .* which {engine} keeps in pieces"):
        engines.check(sharded, by_hand=False, combines=False, perturbs=True)


WRONG: Mapping[str, tuple[dict[str, Any], str]] = {
    "no way": ({"sam_rho": -1.0}, "sam_rho must be > 0, but is -1"),
    "what is kept alone": ({"sam_rho": 0.1, "alone": "retain"}, "none of 'retain' alone does"),
    "bf16": ({"sam_rho": 0.1, "bf16_weights": True}, "bf16_weights: the way that sam_rho goes is lost"),
    "released": ({"sam_rho": 0.1, "release_gradients": True, "max_grad_norm": 0.0}, "but sam_rho goes a way along"),
    "a start of nothing": ({"multiplier_start": 100.0}, "multiplier_start: there is no multiplier without a bound"),
    "a warm-up of nothing": ({"multiplier_warmup": 0.5}, "multiplier_warmup: there is no multiplier without a bound"),
    "a step of nothing": ({"multiplier_lr": 5.0}, "multiplier_lr: there is no multiplier without a bound"),
    "two beginnings": (
        {"retain_bound": 0.3, "multiplier_start": 100.0, "weights": {"retain": 2.0}},
        "the multiplier of 'retain' begins at multiplier_start",
    ),
    "below nothing": ({"retain_bound": 0.3, "multiplier_start": -1.0}, "multiplier_start must be >= 0, but is -1"),
    "more than all": ({"retain_bound": 0.3, "multiplier_warmup": 1.5}, "multiplier_warmup must be 0 to 1"),
}


@pytest.mark.parametrize(("settings", "said"), WRONG.values(), ids=WRONG)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    config = RunConfig(task="facts", **settings)
    with pytest.raises(UserError, match=said):
        resolve.check(config)


def test_a_comparison_keeps_a_multiplier_for_those_that_have_one() -> None:
    recipe = RunConfig(task="facts", multiplier_start=100.0, multiplier_warmup=0.5, retain_bound=1.0)
    pdu, sam, joint = resolve.methods_of(recipe, ["PDU", "DualOptim+ SAM", "Joint AdamW"], [0])
    assert (pdu.retain_bound, pdu.multiplier_lr, pdu.multiplier_start, pdu.multiplier_warmup) == (0.3, 5.0, 100.0, 0.5)
    assert (sam.method, sam.sam_rho, sam.multiplier_start) == ("DualOptim+ SAM", 0.01, None)
    assert (joint.sam_rho, joint.multiplier_warmup, joint.multiplier_lr) == (None, 0.0, 1.0)
