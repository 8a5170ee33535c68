"""The rule by torch operations, slice by slice: the readable truth, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import state
from ..rule import Coefficients, Moments, update
from ..state import CODES, Stored
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


def step(items: Sequence[Item], coefficients: Tensor) -> None:
    """One step of one objective on every item; row i of `coefficients` (P, 14) is item i's."""
    for item, row in zip(items, coefficients.tolist(), strict=True):
        size = CPU_SLICE if item.param.device.type == "cpu" else DEVICE_SLICE
        for start in range(0, item.param.numel(), size):
            _step_slice(item, Coefficients(*row), start, start + size)


def _step_slice(item: Item, c: Coefficients, start: int, end: int) -> None:
    param, grad = item.param[start:end], item.grad[start:end]
    delta = Moments(*(_read(moment, f"delta_{name}", start, end) for name, moment in item.delta._asdict().items()))
    base = item.base and Moments(
        *(_read(moment, f"base_{name}", start, end) for name, moment in item.base._asdict().items())
    )
    new_param, new_delta, new_base = update(param.float(), grad.float(), delta, base, c)
    if item.seed is not None:
        new_param = stochastically_rounded(new_param, item.seed, start)
    param.copy_(new_param)
    for kind, stored, values in (("delta", item.delta, new_delta), ("base", item.base, new_base)):
        if stored is not None and values is not None:
            for name in Moments._fields:
                _write(getattr(stored, name), getattr(values, name), f"{kind}_{name}", start, end)


def _read(stored: Stored, name: str, start: int, end: int) -> Tensor:
    if isinstance(stored, Tensor):
        return stored[start:end]
    blocks = slice(start // state.BLOCK, -(-end // state.BLOCK))
    return state.dequantise(stored["codes"][start:end], stored["scales"][blocks], CODES[name])


def _write(stored: Stored, values: Tensor, name: str, start: int, end: int) -> None:
    if isinstance(stored, Tensor):
        stored[start:end] = values
    else:
        blocks = slice(start // state.BLOCK, -(-end // state.BLOCK))
        state.quantise_(stored["codes"][start:end], stored["scales"][blocks], values, CODES[name])


def stochastically_rounded(values: Tensor, seed: int, start: int) -> Tensor:
    """fp32 values cut to the 16 bits of bf16 after 16 random bits were added, so that the mean is kept.

    The random bits are a hash of the element's index and the seed: the same whatever the backend and the slices.
    """
    index = torch.arange(start, start + len(values), dtype=torch.int64, device=values.device)
    noise = hashed((index + seed) & 0xFFFFFFFF) & 0xFFFF
    bits = values.view(torch.int32).long() & 0xFFFFFFFF
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = torch.where(finite, bits + noise, bits) & 0xFFFF0000
    return rounded.to(torch.int32).view(torch.float32)


def hashed(x: Tensor) -> Tensor:
    """A 32-bit hash of 32-bit whole numbers kept in int64 (the `lowbias32` of C. Wellons' hash prospector)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
