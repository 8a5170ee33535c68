"""The rule by torch operations, slice by slice: the readable truth, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import state
from ..rule import Coefficients, Moments, update
from ..state import Code, Stored, code_of
from . import Item

# Elements updated at a time, a multiple of state.BLOCK. On a CPU a slice of this many stays in the cache through the
# rule's twenty-odd operations; elsewhere it bounds the temporaries.
CPU_SLICE = 2**17
DEVICE_SLICE = 2**22


def missing(device_type: str) -> str | None:
    """Nothing: it runs everywhere."""
    return None


def finite(grads: Sequence[Tensor]) -> bool:
    """Whether every gradient and its square are finite in fp32."""
    largest = [torch.linalg.vector_norm(grad, torch.inf, dtype=torch.float32) for grad in grads if grad.numel()]
    return all(bool((norm * norm).isfinite()) for norm in largest)


def step(items: Sequence[Item], coefficients: Tensor, seeds: Tensor) -> None:
    """One step of one objective on every item.

    Args:
        coefficients: (P, 14) fp32, row i is item i's `rule.Coefficients`.
        seeds: (P,) of each bf16 parameter's stochastic rounding; −1 to round it to the nearest.
    """
    for item, row, seed in zip(items, coefficients.tolist(), seeds.tolist(), strict=True):
        item = flattened(item)
        size = CPU_SLICE if item.param.device.type == "cpu" else DEVICE_SLICE
        for start in range(0, item.param.numel(), size):
            _step_slice(item, Coefficients(*row), seed, start, min(start + size, item.param.numel()))


def flattened(item: Item) -> Item:
    """The item with one-dimensional tensors, in the order in which their elements lie in memory."""

    def flat(stored: Stored) -> Stored:
        if isinstance(stored, dict):
            return {"codes": state.flat(stored["codes"]), "scales": stored["scales"]}
        return state.flat(stored)

    delta, base = Moments(*map(flat, item.delta)), item.base and Moments(*map(flat, item.base))
    return Item(state.flat(item.param), state.flat(item.grad), delta, base)


def _step_slice(item: Item, c: Coefficients, seed: int, start: int, end: int) -> None:
    param, grad = item.param[start:end], item.grad[start:end]
    moments = {"delta": item.delta, "base": item.base} if item.base else {"delta": item.delta}
    stored = [
        (moment, code_of(f"{kind}_{name}", with_base=item.base is not None))
        for kind, pair in moments.items()
        for name, moment in pair._asdict().items()
    ]
    values = [_read(moment, code, start, end) for moment, code in stored]
    base = Moments(*values[2:]) if item.base else None
    new_param, new_delta, new_base = update(param.float(), grad.float(), Moments(*values[:2]), base, c)
    if seed >= 0:
        new_param = stochastically_rounded(new_param, seed, start)
    param.copy_(new_param)
    for (moment, code), fresh in zip(stored, (*new_delta, *(new_base or ())), strict=True):
        _write(moment, fresh, code, start, end)


def _read(stored: Stored, code: Code, start: int, end: int) -> Tensor:
    if isinstance(stored, Tensor):
        return stored[start:end]
    blocks = slice(start // state.BLOCK, -(-end // state.BLOCK))
    return state.dequantise(stored["codes"][start:end], stored["scales"][blocks], code)


def _write(stored: Stored, values: Tensor, code: Code, start: int, end: int) -> None:
    if isinstance(stored, Tensor):
        stored[start:end] = values
    else:
        blocks = slice(start // state.BLOCK, -(-end // state.BLOCK))
        state.quantise_(stored["codes"][start:end], stored["scales"][blocks], values, code)


def stochastically_rounded(values: Tensor, seed: int, start: int) -> Tensor:
    """fp32 values cut to the 16 bits of bf16 after 16 random bits were added, so that the mean is kept.

    The random bits are a hash of the element's index and the seed: the same whatever the backend and the slices.
    """
    index = torch.arange(start, start + len(values), dtype=torch.int64, device=values.device)
    noise = hashed(index + seed) & 0xFFFF
    bits = values.view(torch.int32).long() & 0xFFFFFFFF
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = torch.where(finite, bits + noise, bits) & 0xFFFF0000
    return rounded.to(torch.int32).view(torch.float32)


def hashed(x: Tensor) -> Tensor:
    """A 32-bit hash of the lower 32 bits of int64 numbers (`lowbias32` of Wellons' hash prospector)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
