"""Steps taken during the backward pass, parameter by parameter, so that gradients are never all in memory at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from .optimizer import logger, multi_objective


@contextmanager
def releasing(optimizer: torch.optim.Optimizer, *, objective: str | None = None) -> Iterator[None]:
    """A context in which backward takes the optimizer's step too: each complete gradient is used at once, then freed.

    The result is that of backward and then `step()`, bit for bit. In exchange, gradients cannot be clipped by their
    norm, scaled, or accumulated over several backward passes. A gradient that is not finite makes only its own
    parameter skip the step (`num_skipped` still counts one step). It works in one process only, as averaging over ranks
    would come after the step.

    Args:
        optimizer: any that keeps a step counter for each parameter, as this package's and torch's do. A
            `DualOptimPlus` may be wrapped, as by accelerate.
        objective: the objective of the step, for a `DualOptimPlus`; without it, its property `objective` decides.

    Raises:
        ValueError: there is a gradient already, a parameter gets a second one, there are several processes, or the
            optimizer has no objectives and is given one.

    Example:
        >>> from dualoptim import DualOptimPlus
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> opt = DualOptimPlus([weight], lr=0.1)
        >>> with releasing(opt, objective="forget"):
        ...     (-weight.sum()).backward()
        >>> weight.grad is None
        True
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError("gradients cannot be released in several processes; use one, or FSDP to share the memory")
    several = multi_objective(optimizer)
    if several is not None:
        optimizer = several
    elif objective is not None:
        raise ValueError(
            f"releasing: {type(optimizer).__name__} has no objectives, so {objective!r} would not be read; leave it out"
        )
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if any(param.grad is not None for param in params):
        raise ValueError("there are gradients already, of which releasing makes no step; call zero_grad() first")
    name = several._whose(objective) if several is not None else None
    before = several._skipped.get(name) if several is not None and name is not None else None
    before = None if before is None else before.clone()
    done: set[int] = set()
    told: list[str] = []

    def told_first(record: logging.LogRecord) -> bool:
        """Whether a message is the step's first of its kind: each parameter takes or skips the step by itself."""
        told.append(str(record.msg))
        return told.count(told[-1]) == 1

    def step(param: Tensor) -> None:
        if id(param) in done:
            raise ValueError(
                "a parameter got a second gradient within releasing; take one backward pass in each, and checkpoint "
                "activations with use_reentrant=False"
            )
        done.add(id(param))
        optimizer.step() if several is None else several.step(objective=name)
        param.grad = None

    handles = [param.register_post_accumulate_grad_hook(step) for param in params if param.requires_grad]
    logger.addFilter(told_first)
    try:
        yield
    finally:
        logger.removeFilter(told_first)
        for handle in handles:
            handle.remove()
        if several is not None and name in several._skipped:  # one step, however many parameters skipped it
            after = several._skipped[name]
            once = (torch.zeros_like(after) if before is None else before.to(after.device)) + 1
            several._skipped[name] = torch.minimum(after, once)
