"""What is measured while a run trains: the curve, the time of every step, memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .stopping import Best


def points_in(steps: int, points: int) -> list[int]:
    """The steps after which so many points of a curve are measured; each once, where there are fewer steps than points.

    >>> points_in(10, 4), points_in(2, 5), points_in(3, 0)
    ([2, 5, 8, 10], [1, 2], [])
    """
    return sorted({round(steps * i / points) for i in range(1, points + 1)} - {0})


class Watch(TrainerCallback, ExportableState):
    """Follows the forget/keep curve and the time of every step, without the time that the curve takes."""

    def __init__(
        self,
        points: Sequence[int],
        measure: Callable[[], dict[str, float | None]],
        bar: tqdm,
        best: Best | None,
        paused: set[str] | None,
    ) -> None:
        self.points, self.measure, self.bar, self.best, self.paused = set(points), measure, bar, best, paused
        self.curve: list[dict[str, Any]] = []  # what `measure` gave, each with its step
        self.step_seconds: list[float] = []
        self.began = 0.0
        self.seconds = 0.0  # of training, without the curve
        self.watching = 0.0  # of the curve

    def state(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("curve", "step_seconds", "seconds", "watching")}
        return {"args": {}, "attributes": {**own, "paused": sorted(self.paused or ())}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)["attributes"]
        self.curve, self.step_seconds = saved["curve"], saved["step_seconds"]
        self.seconds, self.watching = saved["seconds"], saved["watching"]
        if self.paused is not None:
            self.paused.update(saved["paused"])
        self.bar.update(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds.append(round(time.perf_counter() - self.began, 4))
        self.seconds += self.step_seconds[-1]
        self.bar.update(state.global_step - self.bar.n)
        if state.global_step in self.points:
            began = time.perf_counter()
            self.curve.append({"step": state.global_step, **self.measure()})
            self.watching += time.perf_counter() - began
            if self.best is not None:
                self.best.look(state.global_step, self.curve[-1], control)
                if self.paused is not None:
                    (self.paused.add if self.best.reached(self.curve[-1]) else self.paused.discard)("forget")


def bytes_of(optimizer: Any) -> int:
    """Bytes of all state tensors, found wherever they are nested."""

    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        return sum(map(size, value.values())) if isinstance(value, dict) else 0

    return sum(size(state) for state in optimizer.state.values())


def peak_memory(device: torch.device) -> int:
    """The peak of memory in use so far, in bytes: of the process, or on a GPU of this run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if (windows := getattr(psutil.Process().memory_info(), "peak_wset", None)) is not None:
        return int(windows)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
