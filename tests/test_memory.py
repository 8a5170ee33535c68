"""What a step may read and write: memory of its own, whatever there is around it, and nothing of the context's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn import Parameter

from dualoptim import DualOptim, DualOptimPlus
from dualoptim.optim import backends, estimate_state_memory

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
    assert {type(value).__name__ for value in opt.state[model.weight].values()} == {"FakeTensor"}
    with torch.device("meta"):
        model = nn.Linear(4, 2)
    opt = optimizer(model.parameters(), bits=bits, backend=backend)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    opt.step(objective="forget")
    assert {value.device.type for value in opt.state[model.weight].values() if value.ndim} == {"meta"}
    weight = Parameter(torch.ones(4, 2))  # and nothing of it is left behind
    run(optimizer([weight], bits=bits, backend=backend), weight, [torch.ones(4, 2)] * 2)
    assert (weight < 1).all()


@EVERY_BACKEND
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("where", ["fake", "meta", "all on meta"])
def test_a_state_dict_loads_without_memory(where: str, bits: int, backend: str) -> None:
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        model = nn.Linear(4, 2)
        opt = optimizer(model.parameters(), bits=bits, backend=backend)
        model(torch.randn(3, 4)).sum().backward()
        opt.step(objective="forget")
        saved = opt.state_dict()
        if where == "all on meta":  # as torch.load(…, map_location="meta") gives it
            saved["state"] = {i: {k: v.to("meta") for k, v in own.items()} for i, own in saved["state"].items()}
        again = optimizer(model.parameters(), bits=bits, backend=backend)
        again.load_state_dict(saved)
        again.step(objective="retain")
        assert again.state_dict()["state"][0].keys() == saved["state"][0].keys()
    for key, value in again.state[model.weight].items():
        kept = opt.state[model.weight][key]
        assert (value.shape, value.dtype) == (kept.shape, kept.dtype)
        assert value.device.type == ("cpu" if where == "fake" or (where == "meta" and not value.ndim) else "meta")
    # What has values needs them.
    real = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"no count as 'step'|no tensor with values"):
        optimizer(real.parameters(), bits=bits, backend=backend).load_state_dict(saved)


def test_a_state_dict_with_values_loads_into_parameters_without() -> None:
    weight = Parameter(torch.ones(4, 2))
    run(opt := optimizer([weight]), weight, [torch.ones(4, 2)] * 2)
    again = optimizer([other := Parameter(torch.ones(4, 2, device="meta"))])
    again.load_state_dict(opt.state_dict())
    assert int(again.state[other]["step"]) == 2
    assert again.state[other]["base_exp_avg"].device.type == "meta"


@pytest.mark.parametrize("where", ["fake", "meta"])
def test_a_first_step_without_an_objective_is_refused_without_memory_too(where: str) -> None:
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        model = nn.Linear(4, 2)
        opt = optimizer(model.parameters())
        model(torch.randn(3, 4)).sum().backward()
        for _ in range(2):
            with pytest.raises(ValueError, match="no objective was chosen"):
                opt.step()
        assert not opt.state
        opt.zero_grad()
        assert get_optimizer_state_dict(model, opt)["state"]["weight"]  # torch steps on zeros to see the state
        assert int(opt.state[model.weight]["step"]) == 0 if where == "meta" else True


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


def test_the_context_changes_nothing_in_many_elements() -> None:
    start = randn(128, 256)
    grads = gradients(start, 6)
    param, other = Parameter(start.clone()), Parameter(start.clone())
    expected = run(optimizer([param], bits=8, max_update=None), param, grads)[-1]
    with default(torch.set_default_dtype, torch.bfloat16, torch.float32):
        assert torch.equal(run(optimizer([other], bits=8, max_update=None), other, grads)[-1], expected)


# Whose memory is another's, too


@EVERY_BACKEND
@pytest.mark.parametrize("turned", [False, True])
def test_parameters_of_one_memory_are_stepped_one_after_the_other(turned: bool, backend: str) -> None:
    results = []
    for make in (
        lambda params: optimizer(params, DualOptim, objectives=("o",), backend=backend, weight_decay=0.0),
        lambda params: torch.optim.AdamW(params, lr=0.1, betas=(0.9, 0.999), weight_decay=0.0, foreach=False),
    ):
        memory = torch.zeros(300, 300)
        params = [Parameter(memory), Parameter(memory.t() if turned else memory)]
        opt = make(params)
        for step in range(3):
            for i, param in enumerate(params):
                param.grad = randn(300, 300, seed=2 * step + i)
            opt.step()
        results.append(memory)
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_elements_that_share_a_place_are_refused() -> None:
    weight = Parameter(torch.zeros(5).as_strided((3, 3), (1, 1)))
    weight.grad = torch.ones(3, 3)
    refused(weight, optimizer([weight]), "several elements of parameter 0 share a place")


def test_a_parameter_stands_once_in_its_group() -> None:
    weight = Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="parameter 1 stands in its parameter group twice"):
        optimizer([weight, weight])


FORKED = """
import os, sys, torch
from dualoptim import DualOptimPlus
torch.set_num_threads(2)
big, small = (torch.nn.Parameter(torch.zeros(n)) for n in (2**20, 64))
opt, other = DualOptimPlus([big]), DualOptimPlus([small])
big.grad = torch.ones_like(big); opt.step(objective="forget")
if (child := os.fork()) == 0:
    small.grad = torch.ones_like(small); other.step(objective="forget")
    os._exit(int(not (small < 0).all()))
sys.exit(os.waitpid(child, 0)[1] != 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_steps_small_parameters() -> None:
    assert subprocess.run([sys.executable, "-c", FORKED], timeout=60, check=False).returncode == 0


# What no step could mean


WITHOUT_MEANING: dict[str, tuple[Callable[[Parameter], None], str]] = {
    "whole numbers": (lambda w: setattr(w, "grad", torch.ones(10, 4, dtype=torch.int32)), "its gradient torch.int32"),
    "complex": (lambda w: setattr(w, "grad", torch.ones(10, 4, dtype=torch.complex64)), "its gradient torch.complex64"),
    "a sparse gradient": (lambda w: setattr(w, "grad", torch.ones(10, 4).to_sparse()), "is sparse"),
}


@pytest.mark.parametrize(("spoil", "said"), WITHOUT_MEANING.values(), ids=WITHOUT_MEANING)
def test_gradients_of_other_kinds_are_refused(spoil: Callable[[Parameter], None], said: str) -> None:
    weight = Parameter(torch.zeros(10, 4))
    opt = optimizer([("head.weight", weight)])
    run(opt, weight, [torch.ones(10, 4)])
    if hasattr(weight, "grad_dtype"):
        weight.grad = None
        weight.grad_dtype = None
    spoil(weight)
    assert "head.weight" in refused(weight, opt, said)


def test_a_base_that_is_turned_off_or_on_is_refused() -> None:
    weight = Parameter(torch.zeros(10, 4))
    opt = optimizer([weight])
    run(opt, weight, [torch.ones(10, 4)])
    opt.param_groups[0]["base_betas"] = None
    refused(weight, opt, "had its base_betas turned off after its first step")
    weight = Parameter(torch.zeros(10, 4))
    opt = optimizer([weight], base_betas=None)
    run(opt, weight, [torch.ones(10, 4)])
    opt.param_groups[0]["base_betas"] = (0.9, 0.95)
    refused(weight, opt, "had its base_betas turned on after its first step")


@EVERY_BACKEND
def test_8_bits_of_a_parameter_that_became_fp64_are_refused(backend: str) -> None:
    weight = Parameter(torch.zeros(10, 4))
    opt = optimizer([weight], bits=8, backend=backend)
    run(opt, weight, [torch.ones(10, 4)])
    weight.grad = None
    weight.data = weight.data.double()
    weight.grad = torch.ones(10, 4, dtype=torch.float64)
    refused(weight, opt, "is torch.float64, but its moments are in 8 bits")


@EVERY_BACKEND
def test_a_moment_that_is_lost_is_made_in_the_bits_of_its_pair(backend: str) -> None:
    weight = Parameter(torch.zeros(10, 4))
    opt = optimizer([weight], bits=8, backend=backend)
    run(opt, weight, [torch.ones(10, 4)])
    opt.param_groups[0]["delta_bits"] = 32
    for key in [key for key in opt.state[weight] if key.endswith("delta_exp_avg/forget")]:
        del opt.state[weight][key]
    run(opt, weight, [torch.ones(10, 4)])
    assert {key for key in opt.state[weight] if key.endswith("delta_exp_avg/forget")} == {
        "codes/delta_exp_avg/forget",
        "scales/delta_exp_avg/forget",
    }
    own = opt.state[weight]
    own["delta_exp_avg/forget"] = torch.zeros(10, 4)
    weight.grad = torch.ones(10, 4)
    refused(weight, opt, "one moment of a pair in 8 bits and the other in 32")


@pytest.mark.parametrize("lr", ["0.1", torch.tensor([0.1, 0.1]), None], ids=repr)
def test_a_setting_that_fails_changes_no_count(lr: Any) -> None:
    weight = Parameter(torch.zeros(10, 4))
    opt = optimizer([weight])
    run(opt, weight, [torch.ones(10, 4)])
    weight.grad = torch.ones(10, 4)
    opt.param_groups[0]["lr"] = lr
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        opt.step(objective="forget")
    assert int(opt.state[weight]["step"]) == 1


@EVERY_BACKEND
def test_a_gradient_that_is_zero_without_memory(backend: str) -> None:
    weight = Parameter(torch.ones(3))
    weight.grad = torch._efficientzerotensor((3,))
    optimizer([weight], backend=backend, weight_decay=0.0).step(objective="forget")
    assert torch.equal(weight, torch.ones(3))


def test_real_parameters_where_shapes_alone_are_followed_are_refused() -> None:
    weight = Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    opt = optimizer([weight])
    for mode in (FakeTensorMode(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode, pytest.raises(ValueError, match="needs parameters that were made in it"):
            opt.step(objective="forget")
    assert not opt.state.get(weight)
    opt.step(objective="forget")


@EVERY_BACKEND
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_within_a_compiled_function_it_is_the_same(bits: int, backend: str) -> None:
    one, other = Parameter(randn(10, 300)), Parameter(randn(10, 300))
    opt, again = (optimizer([param], bits=bits, backend=backend) for param in (one, other))
    step = torch.compile(lambda: again.step(objective="forget"), backend="eager")
    for grad in gradients(one, 3):
        one.grad, other.grad = grad.clone(), grad.clone()
        opt.step(objective="forget")
        step()
    assert torch.equal(one, other)


def test_an_estimate_leaves_the_groups_as_they_are() -> None:
    groups = [{"params": [Parameter(torch.ones(70, 70))], "lr": 0.1}]
    estimate_state_memory(groups, base_bits=8, delta_bits=8, objectives=("a", "b"))
    assert set(groups[0]) == {"params", "lr"}
