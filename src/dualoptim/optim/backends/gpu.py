"""The rule as a GPU kernel (`gpu_kernel`): all parameters of one kind in one launch, and nothing waits for the host.

Whether a step is taken is decided on the device: `finite` leaves its answer there and the kernel reads it. Addresses
are uploaded only when they change, so that a CUDA graph can capture a step that has been taken before.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import operator
import os
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..rule import Coefficients, Moments
from ..state import BLOCK, precision, stored_bits
from . import Item, plain, rows
from .tables import on_device

SUPPORTED = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}  # others step by `plain`
BLOCKS, WARPS = 1, 1  # a program's blocks of 256 elements, and its warps: the fastest of those in benchmarks/gpu.md

# Parameter, gradient, bits of the deltas, bits of the base or 0, and whether addresses and lengths are multiples of 16.
Kind = tuple[torch.dtype, torch.dtype, int, int, bool]


def missing(device_type: str) -> str | None:
    """What the backend lacks to run, or None. Triton's interpreter, for tests, takes CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device_type != "cuda":
        return f"it runs on a GPU, and the parameters are on {device_type}"
    try:  # Triton needs a C compiler, and a GPU that it supports
        some = torch.zeros(1, dtype=torch.float32, device="cuda")
        step(
            [Item(some, some, Moments(some, some), None)],
            torch.ones(1, len(Coefficients._fields), dtype=torch.float64, device="cuda"),
            torch.full((1,), -1, dtype=torch.int64, device="cuda"),
        )
    except Exception as error:  # whatever the compiler raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"Triton could not make the kernel ({reason})"
    return None


def finite(grads: Sequence[Tensor]) -> Tensor:
    """Whether every gradient and its square are finite, in fp64 for fp64 gradients and else in fp32: a 0-dim tensor on
    their device."""
    largest: list[Tensor] = []
    for dtype in {grad.dtype for grad in grads}:
        some = [grad for grad in grads if grad.dtype == dtype and grad.numel()]
        if some:
            norms = torch.stack(torch._foreach_norm(some, torch.inf, dtype=precision(some[0])))
            largest.append((norms * norms).isfinite().all())
    if not largest:
        return torch.ones((), dtype=torch.bool, device=grads[0].device)
    return torch.stack(largest).all()


def step(items: Sequence[Item], coefficients: Tensor, seeds: Tensor, proceed: Tensor | None = None) -> None:
    """As `plain.step`, on one device.

    Args:
        proceed: 0-dim, bool, on the device; if it is false, nothing is changed. None to proceed.
    """
    kinds: dict[Kind, list[tuple[int, ...]]] = defaultdict(list)
    others = []
    for i, item in enumerate(items):
        found = rows(item)
        if found is None or item.param.dtype not in SUPPORTED or item.grad.dtype not in SUPPORTED:
            others.append(i)
        elif item.param.numel():
            delta_bits, base_bits = stored_bits(item.delta[0]), 0 if item.base is None else stored_bits(item.base[0])
            row = (*_addresses(item), item.param.numel(), found[0])
            aligned = functools.reduce(operator.or_, row) % 16 == 0
            kinds[item.param.dtype, item.grad.dtype, delta_bits, base_bits, aligned].append((*row, found[1], i))
    if others and (proceed is None or bool(proceed)):
        plain.step([items[i] for i in others], coefficients[others], seeds[others])
    if kinds:
        device, coefficients = coefficients.device, coefficients.float()
        flag = on_device((True,), torch.bool, device) if proceed is None else proceed
        # Triton launches on the current device; the interpreter has none.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            for kind, table in kinds.items():
                _launch(kind, table, coefficients, seeds, flag)


def _launch(kind: Kind, table: Sequence[tuple[int, ...]], coefficients: Tensor, seeds: Tensor, proceed: Tensor) -> None:
    import triton.language as tl  # here, as this module must load without Triton, too

    from . import gpu_kernel

    param, grad, delta_bits, base_bits, aligned = kind
    programs = tuple(-(-(numel // length) * -(-length // BLOCK) // BLOCKS) for *_, numel, length, _, _ in table)
    numbers: list[int] = []
    first = 0
    for row, count in zip(table, programs, strict=True):
        numbers += (*row, first)
        first += count
    device = coefficients.device
    gpu_kernel.step_block[(first,)](
        on_device(tuple(numbers), torch.int64, device),
        on_device(programs, torch.int32, device, _owners),
        coefficients,
        seeds,
        proceed,
        PARAM=getattr(tl, SUPPORTED[param]),
        GRAD=getattr(tl, SUPPORTED[grad]),
        DELTA_BITS=delta_bits,
        BASE_BITS=base_bits,
        ALIGNED=aligned,
        BLOCKS=BLOCKS,
        WIDTH=gpu_kernel.WIDTH,
        NUM_COEFFICIENTS=len(Coefficients._fields),
        num_warps=WARPS,
        enable_fp_fusion=False,  # the rule says itself which operations round once
    )


def _owners(programs: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Which tensor each program works on."""
    counts = torch.tensor(programs, dtype=torch.int64, device=device)
    return torch.repeat_interleave(torch.arange(len(programs), dtype=dtype, device=device), counts)


def _addresses(item: Item) -> list[int]:
    """The addresses of an item's data, in the order of the kernel's table; 0 for what it does not have."""
    moments = item.delta if item.base is None else (*item.delta, *item.base)
    lacking = [0] * (4 - len(moments))
    data = [moment["codes"] if isinstance(moment, dict) else moment for moment in moments]
    scales = [moment["scales"].data_ptr() if isinstance(moment, dict) else 0 for moment in moments]
    return [*map(Tensor.data_ptr, (item.param, item.grad, *data)), *lacking, *scales, *lacking]
