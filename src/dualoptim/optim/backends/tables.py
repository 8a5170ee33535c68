"""Small tables that a device reads, uploaded without waiting for it, and only when their contents change."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

KEPT = 64  # gradients may have new addresses in every step, so that not every table can be kept

_lock = threading.Lock()
_recent: OrderedDict[Any, Tensor] = OrderedDict()
_captured: dict[Any, Tensor] = {}  # a CUDA graph goes on reading the tables that it read when it was captured


def on_device(
    values: tuple[Any, ...],
    dtype: torch.dtype,
    device: torch.device,
    make: Callable[..., Tensor] = torch.tensor,
) -> Tensor:
    """The tensor `make(values, dtype=dtype, device="cpu")` on a device; the same tensor again for the same values.

    Args:
        values: numbers that identify the table.
        dtype: the table's.
        device: where it is read.
        make: makes the table on the CPU.
    """
    key = (values, dtype, device, make)
    with _lock:
        return _on_device(key)


def _on_device(key: tuple[Any, ...]) -> Tensor:
    values, dtype, device, make = key
    table = _captured.get(key)
    if table is None:
        table = _recent.get(key)
        if table is None:
            table = make(values, dtype=dtype, device="cpu")
            if type(table) is not Tensor:  # a fake tensor, which is not for others
                return table
            if device.type == "cuda":
                table = table.pin_memory().to(device, non_blocking=True)
            _recent[key] = table
        _recent.move_to_end(key)
        if len(_recent) > KEPT:
            _recent.popitem(last=False)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured[key] = table
    return table
