"""What ranks have to agree on: whether a step is taken, for which objective, and how it is rounded."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .backends.tables import on_device

REFUSED, NOT_FINITE, FINITE, PROBED = -2, -1, 0, 1
NOBODYS = 2**33  # in place of an objective's number where there is none; no objective has it
ANY = 2**40  # in place of a number that does not matter on a rank; above all that it is compared with


class Verdict(NamedTuple):
    """What the ranks found in a step."""

    found: Tensor  # on the CPU: the worst answer; then the least less the greatest objective, and seed
    objective: str | None  # this rank's
    seed: int | None
    ready: torch.cuda.Event | None = None  # when the GPU has written `found`; None: it is there

    def check(self) -> None:
        """Raise what forbade the step.

        Raises:
            ValueError: another rank refused it, or ranks differ in what they must have in common.
        """
        if self.ready is not None:
            if torch.cuda.is_current_stream_capturing():  # a CUDA graph, which nothing may wait in
                return
            self.ready.synchronize()
        worst, objectives, seeds = self.found.tolist()
        if worst == REFUSED:
            raise ValueError("another rank refused a step, and says why; no rank took it")
        if objectives < 0:
            raise ValueError(
                f"the ranks chose different objectives for one step, this one {self.objective!r}, and none took it; "
                "choose the same on all of them, or name those that step together: process_group=…"
            )
        if seeds < 0:
            raise ValueError(
                f"the ranks have different seeds, this one {self.seed}, which would round their copies of bf16 "
                "parameters apart; give all of them the same seed=…"
            )


def several(group: Any) -> bool:
    """Whether more than one rank steps."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def members(group: Any) -> tuple[int, ...]:
    """The ranks that step together."""
    return tuple(dist.get_process_group_ranks(group))


def agreed(
    finite: bool | Tensor | None, device: torch.device, group: Any, objective: str | None, seed: int | None
) -> tuple[bool | Tensor, Verdict | None]:
    """Whether all ranks take a step: a tensor if this rank's own answer is one. All of several ranks call this.

    An answer on a GPU is not waited for: it forbids the step there, and the verdict, which is returned, is to be
    checked at the next step.

    Args:
        finite: whether this rank's gradients are; None if it refuses the step: the others are told, as they would wait.
        device: where the answer is wanted.
        group: the ranks that step together; None for all.
        objective: this rank's; None if that does not matter.
        seed: of rounding what other ranks may hold copies of; None if there is nothing of the kind.

    Raises:
        ValueError: the group has no backend for a device of this rank, another rank refused the step, or the ranks
            differ in objective or seed.
    """
    there = _served(device, group)
    # A number and its negative, so that one reduction to the least gives the greatest, too.
    numbers = (
        0,
        *_both(None if objective is None else zlib.crc32(objective.encode())),
        *_both(None if seed is None else seed & 0xFFFFFFFF),  # of which rounding reads no more
    )
    if isinstance(finite, Tensor):
        flags = torch.cat([finite.to(there).long().reshape(1) - 1, on_device(numbers, torch.int64, there)])
    else:
        own = REFUSED if finite is None else FINITE if finite else NOT_FINITE
        flags = torch.tensor([own, *numbers], dtype=torch.int64, device=there)
    dist.all_reduce(flags, dist.ReduceOp.MIN, group=group)
    found = flags.view(3, 2).sum(1)
    if isinstance(finite, Tensor) and there.type == "cuda":
        return (found >= 0).all().to(device), _later(found, objective, seed)
    found = found.cpu()
    if finite is not None:
        Verdict(found, objective, seed).check()
    answer = int(found[0]) == FINITE
    return (torch.full_like(finite, answer, device=device) if isinstance(finite, Tensor) else answer), None


def all_probed(device: torch.device, group: Any) -> bool:
    """Whether all ranks were given a step on zeros for nobody's objective, which makes their states alone.

    A rank whose gradients happen to be zero must not take its step for one: the others wait for it, in `agreed`.

    Raises:
        ValueError: another rank refused the step, or was given an objective.
    """
    flags = [PROBED, 0, *_both(NOBODYS), *_both(None)]
    found = torch.tensor(flags, dtype=torch.int64, device=_served(device, group))
    dist.all_reduce(found, dist.ReduceOp.MIN, group=group)
    found = found.view(3, 2).sum(1).cpu()
    Verdict(found, None, None).check()
    return int(found[0]) == PROBED


def _later(found: Tensor, objective: str | None, seed: int | None) -> Verdict | None:
    """A verdict that is still on its way from the GPU."""
    with torch.cuda.device(found.device):
        if torch.cuda.is_current_stream_capturing():
            return None
        copy = torch.empty(found.shape, dtype=found.dtype, device="cpu", pin_memory=True)
        copy.copy_(found, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
    return Verdict(copy, objective, seed, ready)


def _both(number: int | None) -> tuple[int, int]:
    return (ANY, ANY) if number is None else (number, -number)


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
