"""Gradients that are released while backward runs: the same step, and never two gradients at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualoptim import DualOptim, DualOptimPlus
from dualoptim.optim import parameter_groups, releasing

from . import tiny

TURNS = ("forget", "retain", "retain", "forget", "retain")
EIGHT = {"base_bits": 8, "delta_bits": 8, "min_8bit_size": 1}
MAKE: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "DualOptim+": lambda model: DualOptimPlus(parameter_groups(model), lr=1e-2),
    "DualOptim+ in 8 bits": lambda model: DualOptimPlus(parameter_groups(model), lr=1e-2, **EIGHT),
    "DualOptim": lambda model: DualOptim(parameter_groups(model), lr=1e-2),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
}


def backward(model: Any, turn: int) -> None:
    ids = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(turn))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def trained(kind: str, dtype: torch.dtype, *, released: bool, checkpointing: bool = False) -> dict[str, Tensor]:
    model = tiny.model().to(dtype)
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    optimizer = MAKE[kind](model)
    for turn, objective in enumerate(TURNS):
        of = {"objective": objective} if isinstance(optimizer, DualOptimPlus) else {}
        if released:
            with releasing(optimizer, **of):
                backward(model, turn)
            assert all(p.grad is None for p in model.parameters())
        else:
            backward(model, turn)
            optimizer.step(**of)
            optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_released_is_the_same_step_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    start = dict(tiny.model().to(dtype).named_parameters())
    plain, released = (trained(kind, dtype, released=each) for each in (False, True))
    for name, weight in plain.items():
        assert torch.equal(weight, released[name]), name
        assert not torch.equal(weight, start[name]), name


def test_released_with_recomputed_activations_is_the_same_step_to_the_bit() -> None:
    plain = trained("DualOptim+", torch.float32, released=False)
    for name, weight in trained("DualOptim+", torch.float32, released=True, checkpointing=True).items():
        assert torch.equal(weight, plain[name]), name


def test_no_two_gradients_are_there_at_once() -> None:
    model = tiny.model().train()
    optimizer, most = DualOptimPlus(model.parameters()), []
    step = optimizer.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        most.append(sum(p.grad is not None for p in model.parameters()))
        return step(*args, **kwargs)

    optimizer.step = counted  # type: ignore[method-assign]
    with releasing(optimizer, objective="forget"):
        backward(model, 0)
    assert most == [1] * len(list(model.parameters()))


def test_the_objective_chosen_before_serves_one_backward_pass() -> None:
    model = tiny.model().train()
    optimizer = DualOptimPlus(model.parameters())
    optimizer.objective = "retain"
    with releasing(optimizer):
        backward(model, 0)
    state = next(iter(optimizer.state.values()))
    assert (int(state["delta_step/retain"]), int(state["delta_step/forget"])) == (1, 0)
    with pytest.raises(ValueError, match="no objective was chosen"), releasing(optimizer):
        backward(model, 1)


def test_gradients_that_are_not_finite_hold_back_one_step(caplog: pytest.LogCaptureFixture) -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    optimizer = DualOptimPlus(weights, lr=0.1)
    for _ in range(2):
        before = [w.detach().clone() for w in weights]
        with releasing(optimizer, objective="forget"):
            (sum(w.sum() for w in weights[:2]) * float("nan") + sum(w.sum() for w in weights[2:])).backward()
        assert [torch.equal(w, b) for w, b in zip(weights, before, strict=True)] == [True, True, False, False]
    assert optimizer.num_skipped == {"forget": 2, "retain": 0}
    told = [record.getMessage().split("(")[1] for record in caplog.records]
    assert told == ["1 skipped so far)", "2 skipped so far)"], "once a step"


def test_what_cannot_be_released_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = DualOptimPlus([weight])
    weight.sum().backward()
    with pytest.raises(ValueError, match="there are gradients already"), releasing(optimizer, objective="forget"):
        pass
    weight.requires_grad_(False)  # a step would be taken with its gradient, one for each other parameter
    with pytest.raises(ValueError, match="there are gradients already"), releasing(optimizer, objective="forget"):
        pass
    weight.requires_grad_(True)
    optimizer.zero_grad()
    with releasing(optimizer, objective="forget"):
        weight.sum().backward()
        with pytest.raises(ValueError, match=r"a second gradient .* use_reentrant=False"):
            weight.sum().backward()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="several processes"), releasing(optimizer, objective="forget"):
        pass
