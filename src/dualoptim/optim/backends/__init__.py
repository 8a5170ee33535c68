"""How the rule is executed. Every backend gives the same results, within rounding, from the same items.

- `plain`: torch operations on slices that stay in the cache. Runs anywhere; the others are tested against it.
- `compiled`: a CPU kernel, made from the traced rule and compiled once by the machine's C++ compiler.
- `gpu`: a Triton kernel made from the traced rule, which steps all parameters of one kind in one launch.

Each module has `missing(device_type)`, what it lacks to run on such a device, or None; `finite(grads)`, whether every
gradient and its square are finite; and `step(items, coefficients, seeds)`.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from ..parts import Lines
from ..rule import Moments
from ..state import rows_of

NAMES = ("plain", "compiled", "gpu")
FASTEST = {"cpu": "compiled", "cuda": "gpu"}


class Item(NamedTuple):
    """One parameter's step. All tensors are row-major, with memory of their own (`memory.entries`)."""

    param: Tensor
    grad: Tensor
    delta: Moments  # of `state.Stored`
    base: Moments | None
    lines: tuple[Lines, ...] = ()  # of a rank's part: where in the whole parameter it lies, for stochastic rounding


def rows(item: Item) -> tuple[int, int] | None:
    """The elements of a row, which a kernel's blocks do not cross, and its distance to the next in the whole parameter.

    None if a kernel, which knows one such pair, cannot step the item: it is stepped by `plain`.
    """
    in_8_bits = any(isinstance(moment, dict) for moment in (*item.delta, *(item.base or ())))
    if item.lines:
        return None if in_8_bits or len(item.lines) > 1 else (item.lines[0].length, item.lines[0].stride)
    length = rows_of(item.param)[1] if in_8_bits else item.param.numel()
    return length, length


@functools.cache
def choose(device_type: str, requested: str | None) -> ModuleType:
    """The backend for a kind of device: the one asked for, or the fastest that runs.

    Raises:
        ValueError: the one that was asked for does not run.
    """
    name = requested or FASTEST.get(device_type, "plain")
    backend = importlib.import_module(f".{name}", __name__)
    missing = backend.missing(device_type)
    if missing is None:
        return backend
    if requested is not None:
        raise ValueError(f"backend {requested!r} cannot be used: {missing}; leave it out, or use backend='plain'")
    warnings.warn(f"dualoptim steps by plain torch operations, which are slower: {missing}", stacklevel=5)
    return importlib.import_module(".plain", __name__)
