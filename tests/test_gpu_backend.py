"""The GPU kernel, in Triton's interpreter on CPU tensors, against the plain backend.

Run as a script, this file makes the checks, with TRITON_INTERPRET=1 in the environment before Triton is imported, or
with "cuda" after the check's name; the tests run it so, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dualoptim import DualOptimPlus
from dualoptim.optim import state
from dualoptim.optim.backends import Item, plain
from dualoptim.optim.parts import Lines
from dualoptim.optim.rule import Coefficients, Moments, coefficients

ROOT = Path(__file__).parents[1]
# Partial blocks and programs, whole ones, rows of several blocks, and none at all.
SHAPES = ((10, 500), (4, 256), (7,), (0, 5), (16, 16), (3, 683), (2, 768))
CHECKS = ("kinds", "stochastic_rounding", "parts", "proceed", "finite", "optimizer", "waiting", "unaligned")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter(check: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "tests.test_gpu_backend", check],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="triton is installed")
def test_without_triton_it_says_so() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    opt = DualOptimPlus([weight], backend="gpu")
    with pytest.raises(ValueError, match="'gpu' cannot be used: triton is not installed"):
        opt.step(objective="retain")


def items(param: torch.dtype, grad: torch.dtype, delta_bits: int, base_bits: int, shapes=SHAPES) -> list[Item]:
    """Some parameters half way through a training."""
    generator = torch.Generator().manual_seed(1)

    def randn(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())

    def kept(values: Tensor, bits: int, name: str) -> state.Stored:
        return state.converted(values, values, bits, state.code_of(name, with_base=base_bits > 0))

    made = []
    for n in shapes:
        mean, square = randn(n, 0.1), randn(n, 0.1) ** 2 * (1 if base_bits == 0 else randn(n).sign())
        delta = Moments(kept(mean, delta_bits, "delta_exp_avg"), kept(square, delta_bits, "delta_exp_avg_sq"))
        base = None
        if base_bits:
            names = ("base_exp_avg", "base_exp_avg_sq")
            base = Moments(*(kept(v, base_bits, k) for k, v in zip(names, (randn(n), randn(n) ** 2), strict=True)))
        made.append(Item(randn(n).to(param), randn(n).to(grad), delta, base))
    return made


def rows_of(count: int, *, quantised: bool, base: bool, lr: float = 0.01, weight_decay: float = 0.1) -> Tensor:
    t = torch.arange(count)
    return coefficients(
        2 * t + 2, t + 1, torch.full((count,), quantised), lr=lr, betas=(0.9, 0.95),
        base_betas=(0.9, 0.95) if base else None, eps=1e-8, weight_decay=weight_decay, max_update=1.0,
    )  # fmt: skip


def copied(tensors):
    if tensors is None or isinstance(tensors, Tensor):
        return None if tensors is None else tensors.clone()
    if isinstance(tensors, dict):
        return {key: value.clone() for key, value in tensors.items()}
    if isinstance(tensors, list):
        return [copied(each) for each in tensors]
    return type(tensors)(*(copied(each) for each in tensors))


def assert_near(found: list[Item], expected: list[Item], param: torch.dtype) -> None:
    """Within a few roundings of fp32 and one step of a parameter's precision or of a code."""
    for one, other in zip(found, expected, strict=True):
        digits = torch.finfo(param).eps
        # The update is a quotient whose moments may nearly cancel: a few elements are far off their last digits.
        assert_close(one.param.float(), other.param.float(), rtol=2 * digits, atol=2e-5)
        for mine, yours in zip((*one.delta, *(one.base or ())), (*other.delta, *(other.base or ())), strict=True):
            if isinstance(mine, dict):
                assert_close(mine["scales"], yours["scales"], rtol=1e-6, atol=1e-9)
                steps = (mine["codes"].int() - yours["codes"].int()).abs()
                assert steps.numel() == 0 or (int(steps.max()) <= 1 and float((steps > 0).float().mean()) < 0.01)
            else:
                assert_close(mine, yours, rtol=1e-5, atol=1e-7)


def check_kinds() -> None:
    from dualoptim.optim.backends import gpu

    launches = count_launches()
    for param, grad in (
        (torch.float32,) * 2,
        (torch.bfloat16,) * 2,
        (torch.float16,) * 2,
        (torch.bfloat16, torch.float32),
    ):
        for delta_bits in (32, 8):
            for base_bits in (32, 8, 0):
                mine = items(param, grad, delta_bits, base_bits)
                yours = copied(mine)
                rows = rows_of(len(mine), quantised=8 in (delta_bits, base_bits), base=base_bits > 0)
                seeds = torch.full((len(mine),), -1)
                launches.clear()
                gpu.step(mine, rows, seeds)
                assert len(launches) == 2, "one launch for the aligned, one for the others"
                plain.step(yours, rows, seeds)
                assert_near(mine, yours, param)


def check_stochastic_rounding() -> None:
    """Bit for bit, where the arithmetic before it is exact: zero gradients, and decay by a number of few digits."""
    from dualoptim.optim.backends import gpu

    mine = items(torch.bfloat16, torch.bfloat16, 32, 0)
    for item in mine:
        for tensor in (item.grad, *item.delta):
            tensor.zero_()
    yours, nearest = copied(mine), copied(mine)
    rows = rows_of(len(mine), quantised=False, base=False, lr=2.0**-15, weight_decay=5.0)
    seeds = torch.tensor([0, 1, 2**31, 2**32 - 1, 12345, 2**32 - 700, 77])
    gpu.step(mine, rows, seeds)
    plain.step(yours, rows, seeds)
    plain.step(nearest, rows, torch.full_like(seeds, -1))
    assert all(torch.equal(one.param, other.param) for one, other in zip(mine, yours, strict=True))
    assert not torch.equal(mine[0].param, nearest[0].param)
    gpu.step(mine, rows, torch.full_like(seeds, -1))
    plain.step(yours, rows, torch.full_like(seeds, -1))
    assert all(torch.equal(one.param, other.param) for one, other in zip(mine, yours, strict=True))


def check_parts() -> None:
    """Ranks' parts are rounded as their elements of the whole are."""
    from dualoptim.optim.backends import gpu

    of_parts(gpu.step)


def of_parts(step) -> None:
    """Steps columns of a parameter in one piece and by a rank's part; the arithmetic before the rounding is exact."""
    [whole] = items(torch.bfloat16, torch.bfloat16, 32, 0, shapes=((6, 600),))
    for tensor in (whole.grad, *whole.delta):
        tensor.zero_()
    rows = rows_of(1, quantised=False, base=False, lr=2.0**-15, weight_decay=5.0)
    pieces = tuple(Lines(600 * row + at, n, n, 1) for row in range(3) for at, n in ((0, 33), (293, 100)))
    for columns, lines in (
        (slice(0, 300), (Lines(0, 300, 600, 3),)),
        (slice(300, 600), (Lines(0, 300, 600, 3),)),
        (slice(599, 600), (Lines(0, 1, 600, 3),)),
        ([*range(7, 40), *range(300, 400)], pieces),
    ):
        held = torch.arange(3600, device="cpu").view(6, 600)[2:5, columns].flatten()

        def part(tensor: Tensor, columns=columns) -> Tensor:
            return tensor[2:5, columns].contiguous()

        mine = Item(part(whole.param), part(whole.grad), Moments(*map(part, whole.delta)), None, lines)
        expected = copied(whole)
        seed = 2**32 - 2000
        plain.step([expected], rows, torch.tensor([seed]))
        step([mine], rows, torch.tensor([(seed + int(held[0])) % 2**32]))
        assert torch.equal(mine.param, part(expected.param))


def check_proceed() -> None:
    from dualoptim.optim.backends import gpu

    mine = items(torch.float32, torch.float32, 8, 8)
    double = items(torch.float64, torch.float64, 32, 0)  # which are stepped by `plain`
    mine += [item._replace(delta=Moments(*(moment.double() for moment in item.delta))) for item in double]
    before = copied(mine)
    rows, seeds = rows_of(len(mine), quantised=True, base=True), torch.full((len(mine),), -1)
    gpu.step(mine, rows, seeds, torch.tensor(False))
    for one, other in zip(mine, before, strict=True):
        torch.testing.assert_close(one._asdict(), other._asdict(), rtol=0, atol=0)
    gpu.step(mine, rows, seeds, torch.tensor(True))
    assert all(not torch.equal(a.param, b.param) for a, b in zip(mine, before, strict=True) if a.param.numel())


def check_finite() -> None:
    from dualoptim.optim.backends import gpu

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        grads = [torch.ones(5, dtype=dtype), torch.ones(0, dtype=dtype), torch.ones(3)]
        answer = gpu.finite(grads)
        assert isinstance(answer, Tensor)
        assert answer.shape == ()
        assert answer.dtype == torch.bool
        assert answer
        for bad in (torch.nan, torch.inf, -torch.inf):
            grads[0][3] = bad
            assert not gpu.finite(grads)
    assert not gpu.finite([torch.tensor([1e20])]), "its square overflows"
    assert gpu.finite([torch.ones(0)])


def check_optimizer() -> None:
    """Whole steps, one of them skipped on the device."""
    seen = []
    for backend in ("plain", "gpu"):
        generator = torch.Generator().manual_seed(3)
        drawn = [torch.randn(n, generator=generator, device="cpu") for n in ((10, 500), (4, 10), (300,))]
        params = [torch.nn.Parameter(each.to(torch.get_default_device())) for each in drawn[:2]]
        params.append(torch.nn.Parameter(drawn[2].bfloat16().to(torch.get_default_device())))
        groups = [{"params": params[:1], "lr": 0.02}, {"params": params[1:], "base_bits": 32, "max_update": None}]
        opt = DualOptimPlus(groups, lr=0.01, lr_scales={"forget": 2.0}, base_bits=8, delta_bits=8, backend=backend)
        for step in range(6):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator, device="cpu").to(param)
            before = [param.detach().clone() for param in params]
            if step == 3:
                params[1].grad[2, 0] = torch.inf
            opt.step(objective=("forget", "retain", "retain")[step % 3])
            assert (step == 3) == all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
        assert opt.num_skipped == {"forget": 1, "retain": 0}
        assert [int(opt.state[param]["step"]) for param in params] == [5, 5, 5]
        assert [int(opt.state[param]["delta_step/forget"]) for param in params] == [1, 1, 1]
        seen.append([param.detach().float() for param in params])
    for one, other in zip(*seen, strict=True):
        assert_close(one, other, rtol=1e-2 if one.shape == (300,) else 1e-3, atol=1e-3)


def check_waiting() -> None:
    """No operation of a step gives the host a number, for which it would wait until the GPU has it."""

    class Read(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a number of a tensor"
            return func(*args, **(kwargs or {}))

    for bits in (32, 8):
        params = [torch.nn.Parameter(torch.ones(n)) for n in ((10, 500), (4, 10))]
        params.append(torch.nn.Parameter(torch.ones(300, dtype=torch.bfloat16)))
        opt = DualOptimPlus(params, base_bits=bits, delta_bits=bits, backend="gpu")
        for objective in ("forget", "retain", "forget"):
            for param in params:
                param.grad = torch.ones_like(param)
            with Read():
                opt.step(objective=objective)
        assert int(opt.state[params[0]]["step"]) == 3


def check_unaligned() -> None:
    """Gradients that are views of a bucket, at any place in it."""
    from dualoptim.optim.backends import gpu

    mine = items(torch.float32, torch.float32, 8, 8, shapes=((8, 256), (16, 256)))
    bucket = torch.randn(1 + 2048 + 4096)
    mine = [
        item._replace(grad=bucket[start : start + item.param.numel()].view_as(item.param))
        for item, start in zip(mine, (1, 2049), strict=True)
    ]
    yours = copied(mine)
    rows, seeds = rows_of(2, quantised=True, base=True), torch.full((2,), -1)
    gpu.step(mine, rows, seeds)
    plain.step(yours, rows, seeds)
    assert_near(mine, yours, torch.float32)


def count_launches() -> list[object]:
    """A list that grows by one with every launch from now on."""
    from dualoptim.optim.backends import gpu

    launches: list[object] = []
    launch = gpu._launch

    def counted(kind, *arguments):
        launches.append(kind)
        launch(kind, *arguments)

    gpu._launch = counted
    return launches


def fuse() -> None:
    """Make the interpreter's fma round once, as a GPU's does; Triton's own rounds twice."""
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(self, x, y, z):
        product = x.data.astype(numpy.float64) * y.data.astype(numpy.float64)  # exact
        return TensorHandle((product + z.data).astype(z.data.dtype), z.dtype.scalar)

    InterpreterBuilder.create_fma = fma


if __name__ == "__main__":
    assert len(Coefficients._fields) == rows_of(1, quantised=False, base=False).shape[1]
    if sys.argv[2:] == ["cuda"]:
        torch.set_default_device("cuda")
    else:
        fuse()
    globals()[f"check_{sys.argv[1]}"]()
