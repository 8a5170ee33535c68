"""The device to work on, its random generators, and the precision in which models are scored on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from . import ranks

if TYPE_CHECKING:
    from .config import RunConfig


def device_and_precision() -> tuple[torch.device, bool]:
    """The device to work on, and whether bf16 autocast is worthwhile on it."""
    if torch.cuda.is_available() and not ranks.wants_cpu():
        return torch.device("cuda"), torch.cuda.is_bf16_supported()  # of several GPUs the current one, a rank's own
    if torch.backends.mps.is_available():
        return torch.device("mps"), False
    return torch.device("cpu"), _cpu_has_bf16()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's random generators, of the CPU and of this process's device; afterwards they are as before."""
    device, _ = device_and_precision()
    with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


_SCORE_BF16: ContextVar[bool | None] = ContextVar("score_bf16", default=None)


@contextmanager
def scoring_in(bf16: bool | None) -> Iterator[None]:
    """A context in which models are scored in bf16 autocast, or not; None for where the device has bf16 arithmetic."""
    was = _SCORE_BF16.set(bf16)
    try:
        yield
    finally:
        _SCORE_BF16.reset(was)


def settled(config: RunConfig) -> RunConfig:
    """Settings with this device's precision in training and scoring where none is given: a run keeps to its own."""
    has_bf16 = device_and_precision()[1]
    return config.replace(
        bf16=has_bf16 if config.bf16 is None else config.bf16,
        # Weights in bf16 are not computed with in fp32 anywhere.
        score_bf16=has_bf16 or config.bf16_weights if config.score_bf16 is None else config.score_bf16,
    )


def scores_in_bf16() -> bool:
    """Whether models are scored in bf16 autocast: as `scoring_in` says, else by the device."""
    chosen = _SCORE_BF16.get()
    return device_and_precision()[1] if chosen is None else chosen


@contextmanager
def in_chosen_precision(device: torch.device) -> Iterator[None]:
    """A context of autocast as `scores_in_bf16` says.

    What autocast has kept of weights is dropped before and after: it may be of weights as they were, or lack gradients.
    """
    torch.clear_autocast_cache()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=scores_in_bf16()):
            yield
    finally:
        torch.clear_autocast_cache()


def scored_in() -> str:
    """The precision in which models are scored, as results name it: "bf16" (autocast) or "fp32"."""
    return "bf16" if scores_in_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    """Whether the processor has bf16 arithmetic; emulated bf16 is slower than fp32."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
