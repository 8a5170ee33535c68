"""What ranks have to agree on: whether a step is taken."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def agreed(finite: bool | Tensor | None, device: torch.device, group: Any = None) -> bool | Tensor:
    """Whether the gradients of all ranks are finite; a tensor if this rank's own answer is one.

    Args:
        finite: whether this rank's are; None if it refuses the step: the others are told, as they would wait for it.
        device: where the answer is wanted.
        group: the ranks that step together; None for all.

    Raises:
        ValueError: the group has no backend for a device of this rank, or another rank refused the step.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) <= 1:
        return bool(finite) if finite is None else finite
    own = -1 if finite is None else finite
    flag = torch.as_tensor(own, device=_served(device, group)).to(torch.int32)
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
    if isinstance(finite, Tensor):
        return flag.to(device) == 1
    if finite is not None and int(flag) < 0:
        raise ValueError("another rank refused this step, and says why; nothing was changed")
    return int(flag) == 1


def _served(device: torch.device, group: Any) -> torch.device:
    """The device itself if the group has a backend for its kind, else a device of a kind that it has one for."""
    backends = dist.get_backend_config(group)  # such as "cpu:gloo,cuda:nccl"
    kinds = [part.partition(":")[0] for part in backends.split(",")]
    if device.type in kinds:
        return device
    if "cpu" in kinds:
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is not None and found.type in kinds:
        return torch.device(found.type, torch.accelerator.current_device_index())
    raise ValueError(
        f"ranks must agree on each step, but the process group ({backends}) serves no device of this one; "
        f"use init_process_group('cpu:gloo,cuda:nccl'), or give the optimizer process_group=…"
    )
