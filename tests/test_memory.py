"""What a step may read and write: memory of its own, whatever there is around it, and nothing of the context's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter

from dualoptim import DualOptim, DualOptimPlus
from dualoptim.optim import backends

from .test_optim import SCHEDULE, gradients, randn, run
from .test_reductions import BACKENDS

BITS = [32, 8]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def optimizer(params: Any, cls: type[DualOptimPlus] = DualOptimPlus, bits: int = 32, **settings: Any) -> DualOptimPlus:
    base = {"base_bits": bits} if cls is DualOptimPlus else {}
    return cls(params, **{"lr": 0.1, "delta_bits": bits, "min_8bit_size": 0, **base, **settings})


# What is written is known to be


@EVERY_BACKEND
def test_a_weight_that_changed_before_the_second_backward_is_noticed(backend: str) -> None:
    model = nn.Linear(4, 4)
    out = model(randn(3, 4)) @ model.weight
    forget, retain = -out.mean(), out.square().mean()
    opt = optimizer(model.parameters(), backend=backend)
    forget.backward(retain_graph=True)
    opt.step(objective="forget")
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        retain.backward()


# What does not go together is refused before anything is written


def refused(param: Tensor, opt: DualOptimPlus, said: str, objective: str = "forget") -> str:
    """That a step is refused, and leaves parameters and state as they were."""
    before = param.detach().clone() if param.untyped_storage().nbytes() else None
    kept = {key: (value, value.clone()) for key, value in opt.state.get(param, {}).items()}
    with pytest.raises(ValueError, match=said) as error:
        opt.step(objective=objective)
    assert before is None or torch.equal(param, before)
    assert all(torch.equal(*pair) for pair in kept.values() if pair[0].device.type != "meta")
    assert set(opt.state.get(param, {})) == set(kept)
    return str(error.value)


@EVERY_BACKEND
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(5, 4), (4, 10), (20, 4), (40,)])
@pytest.mark.parametrize("cls", [DualOptimPlus, DualOptim])
def test_a_parameter_of_another_shape_is_named_with_both(
    cls: type[DualOptimPlus], shape: tuple[int, ...], bits: int, backend: str
) -> None:
    other, weight = Parameter(torch.zeros(2)), Parameter(torch.zeros(10, 4))
    opt = optimizer([("head.bias", other), ("head.weight", weight)], cls, bits, backend=backend)
    run(opt, weight, [torch.ones(10, 4)])
    other.grad = torch.ones(2)
    weight.data, weight.grad = torch.zeros(shape), None
    weight.grad = torch.ones(shape)
    said = refused(weight, opt, "parameter 'head.weight'")
    assert str(shape) in said
    assert "(10, 4)" in said
    assert not other.any()


def test_a_gradient_of_another_shape_is_refused() -> None:
    weight = Parameter(torch.zeros(10, 4))
    weight.grad = torch.ones(10, 4)
    weight.data = torch.zeros(5, 4)
    said = refused(weight, optimizer([weight]), r"parameter 0 has shape \(5, 4\) on cpu, but its gradient \(10, 4\)")
    assert "make the gradient again" in said


CHANGED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "moved": (lambda moment: moment.to("meta"), "on meta"),
    "cast": (lambda moment: moment.half(), "torch.float16"),
    "cut": (lambda moment: moment[:3], r"\(3, 4\)"),
}


@EVERY_BACKEND
@pytest.mark.parametrize(("change", "said"), CHANGED.values(), ids=CHANGED)
@pytest.mark.parametrize("key", ["delta_exp_avg_sq/forget", "base_exp_avg"])
def test_a_moment_that_was_changed_is_named(
    key: str, change: Callable[[Tensor], Tensor], said: str, backend: str
) -> None:
    weight = Parameter(torch.zeros(10, 4))
    opt = optimizer([weight], backend=backend)
    run(opt, weight, [torch.ones(10, 4)])
    opt.state[weight][key] = change(opt.state[weight][key])
    assert f"{key!r} in its state" in refused(weight, opt, said)


def test_memory_that_is_shared_or_given_back_is_refused() -> None:
    expanded = Parameter(torch.ones(1, 3).expand(4, 3))
    expanded.grad = torch.ones(4, 3)
    refused(expanded, optimizer([expanded]), "several elements of parameter 0 share a place in memory")
    freed = Parameter(torch.ones(4, 3))
    freed.grad = torch.ones(4, 3)
    freed.untyped_storage().resize_(0)
    refused(freed, optimizer([freed]), "memory of parameter 0 or of its gradient was given back")


def test_parameters_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        weight = nn.Linear(2, 1).weight
    weight.grad = torch.ones(1, 2)
    refused(weight, optimizer([weight]), "parameter 0 was made in inference mode")


# What lies otherwise in memory is stepped as it is meant


@EVERY_BACKEND
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cls", [DualOptimPlus, DualOptim])
@pytest.mark.parametrize("changed", ["parameter", "gradient", "moments", "loaded"])
def test_another_layout_changes_nothing(changed: str, cls: type[DualOptimPlus], bits: int, backend: str) -> None:
    start = randn(8, 16, 3, 3)
    one, other = Parameter(start.clone()), Parameter(start.clone())
    opt, again = (optimizer([param], cls, bits, backend=backend) for param in (one, other))
    for step, (grad, objective) in enumerate(zip(gradients(start, 6), SCHEDULE, strict=False)):
        if step == 2:
            if changed in ("parameter", "loaded"):
                other.data = other.data.to(memory_format=torch.channels_last)
            if changed == "loaded":
                saved = again.state_dict()
                again = optimizer([other], cls, bits, backend=backend)
                again.load_state_dict(saved)
        if step >= 2 and changed == "moments":
            for key, value in again.state[other].items():
                if value.ndim == 4:
                    again.state[other][key] = value.to(memory_format=torch.channels_last)
        run(opt, one, [grad], [objective])
        layout = torch.channels_last if changed == "gradient" else torch.contiguous_format
        run(again, other, [grad.to(memory_format=layout)], [objective])
        assert torch.equal(one, other)
    for key, value in opt.state[one].items():
        assert torch.equal(value, again.state[other][key]), key


@EVERY_BACKEND
def test_gradients_with_gaps_are_judged_by_their_own_elements(backend: str) -> None:
    nan = float("nan")
    for at, skipped in ((126, 1), (slice(1, None, 2), 0)):
        weight, buffer = Parameter(torch.zeros(64)), torch.ones(128)
        buffer[at] = nan
        weight.grad = buffer[::2]
        opt = optimizer([weight], backend=backend)
        opt.step(objective="forget")
        assert opt.num_skipped["forget"] == skipped
        assert bool(weight.any()) != bool(skipped)
        assert weight.isfinite().all()


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": lambda grad: torch._neg_view(-grad),
    "expanded": lambda grad: grad[:1].expand(6, 4),
    "turned": lambda grad: grad.t().contiguous().t(),
    "flipped": lambda grad: grad.flip(0).flip(0),
    "of a bucket": lambda grad: torch.cat([torch.ones(3), grad.flatten()])[3:].view(6, 4),
}


@EVERY_BACKEND
@pytest.mark.parametrize("made", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_of_any_kind_are_what_they_say(made: Callable[[Tensor], Tensor], backend: str) -> None:
    one, other = Parameter(randn(6, 4)), Parameter(randn(6, 4))
    grad = made(randn(6, 4, seed=3))
    one.grad, other.grad = grad, grad.clone(memory_format=torch.contiguous_format).resolve_neg()
    for param in (one, other):
        optimizer([param], backend=backend).step(objective="forget")
    assert torch.equal(one, other)


@EVERY_BACKEND
def test_a_wrapper_of_tensors_is_stepped_part_by_part(backend: str) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    start, grad = randn(4, 4), randn(4, 4, seed=1)
    plain, wrapped = Parameter(start.clone()), Parameter(TwoTensor(start.clone(), start.clone()))
    for param, given in ((plain, grad.clone()), (wrapped, TwoTensor(grad.clone(), grad.clone()))):
        opt = optimizer([param], backend=backend)
        for objective in ("forget", "retain"):
            param.grad = given
            opt.step(objective=objective)
    assert torch.equal(wrapped.a, plain)
    assert torch.equal(wrapped.b, plain)


# Where there are no values


@EVERY_BACKEND
@pytest.mark.parametrize("bits", BITS)
def test_shapes_can_be_followed_without_memory(backend: str, bits: int) -> None:
    with FakeTensorMode():
        model = nn.Linear(4, 2)
        opt = optimizer(model.parameters(), bits=bits, backend=backend)
        for objective in ("forget", "retain"):
            model(torch.randn(3, 4)).sum().backward()
            opt.step(objective=objective)
    assert type(opt.state[model.weight]["base_exp_avg"]).__name__ == "FakeTensor"
    with torch.device("meta"):
        model = nn.Linear(4, 2)
    opt = optimizer(model.parameters(), bits=bits, backend=backend)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    opt.step(objective="forget")
    assert opt.state[model.weight]["base_exp_avg"].device.type == "meta"
    weight = Parameter(torch.ones(4, 2))  # and nothing of it is left behind
    run(optimizer([weight], bits=bits, backend=backend), weight, [torch.ones(4, 2)] * 2)
    assert (weight < 1).all()


# The context


@contextmanager
def default(set_default: Callable[[Any], None], value: Any, before: Any) -> Iterator[None]:
    set_default(value)
    try:
        yield
    finally:
        set_default(before)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "bf16 by default": lambda: default(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "fp64 by default": lambda: default(torch.set_default_dtype, torch.float64, torch.float32),
    "another device by default": lambda: default(torch.set_default_device, "meta", None),
    "within a device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: default(torch.use_deterministic_algorithms, True, False),
}


@EVERY_BACKEND
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_the_context_changes_nothing(
    context: Callable[[], AbstractContextManager[Any]], bits: int, backend: str
) -> None:
    start = randn(20, 300)
    grads = gradients(start, len(SCHEDULE))
    param, other = Parameter(start.clone()), Parameter(start.clone())
    expected = run(optimizer([param], bits=bits, backend=backend), param, grads)[-1]
    backends.tables._recent.clear()
    for grad in grads:
        grad.requires_grad_(False)
    with context():
        opt = optimizer([other], bits=bits, backend=backend)
    for step, (grad, objective) in enumerate(zip(grads, SCHEDULE, strict=True)):
        other.grad = grad.clone()
        with context():
            opt.step(objective=objective)
            if step == 4:
                saved = opt.state_dict()
                opt = optimizer([other], bits=bits, backend=backend)
                opt.load_state_dict(saved)
    assert torch.equal(other, expected)
    assert not any(value.is_inference() or value.device.type == "meta" for value in opt.state[other].values())
    (other * 2).sum().backward()


def test_parameters_in_fp64_are_stepped_in_it() -> None:
    """Against a reference in exact halves: an update of lr · sign in the first step, whatever the gradient's size."""
    weight = Parameter(torch.zeros(3, 3, dtype=torch.float64))
    opt = optimizer([weight], bits=8, weight_decay=0.0, max_update=None)
    weight.grad = torch.full((3, 3), 1e30, dtype=torch.float64)  # whose square is no number in fp32
    opt.step(objective="forget")
    assert opt.num_skipped["forget"] == 0
    assert opt.state[weight]["base_exp_avg"].dtype == torch.float64
    torch.testing.assert_close(weight.detach(), torch.full((3, 3), -0.1, dtype=torch.float64), rtol=1e-14, atol=0)
