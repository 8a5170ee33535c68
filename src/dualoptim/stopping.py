"""When to stop: at the goal, or if what is kept stays below its floor; then the best point is restored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .evaluation import digits

LOOKS = 2  # checks in a row that are at the goal, with the share WELL kept of what was kept before, end a run
WELL = 0.95
BROKEN = 0.75  # share of a run's checks that must be below the floor in a row to end it: much recovers later on


HELD = "best.safetensors"  # in a checkpoint
_SAVED = ("step", "point", "reason", "settled", "at_goal", "broken")


class Best(TrainerCallback, ExportableState):
    """Checks each measured point, stops the run where there is reason to, and holds the weights of the best point.

    Points are compared by, in this order: whether they are above the floor; how little is left of what is to be
    forgotten (within the goal, all are equal); whether the check before was at the goal, too; how much is kept. The
    first point is the model before training. Where nothing is to be forgotten, the latest point above the floor is the
    best. All of this state is saved in checkpoints and restored on resume.

    Args:
        model: copies of its trainable parameters are held in main memory.
        start: the first point, {"forget": what is left, "retain": what is kept, …}, each 0 to 1.
        until: the goal: what may be left; None for none.
        keep_at_least: the floor, as a share of what is kept at the start; None for none.
        checks: how many points are checked if the run takes all of its steps.
        kept: the values of a point that are to be kept; the one that fell most counts.
    """

    def __init__(
        self,
        model: nn.Module,
        start: dict[str, float],
        until: float | None,
        keep_at_least: float | None,
        checks: int,
        kept: Sequence[str] = ("retain",),
    ) -> None:
        self.model, self.until, self.keep_at_least = model, until, keep_at_least
        self.start, self.names = dict(start), tuple(kept)
        self.floor = keep_at_least or 0.0
        self.step, self.point, self.reason = 0, dict(start), "all steps were taken"
        self.settled = self.at_goal = 0
        self.broken, self.patience = 0, max(2, round(BROKEN * checks))
        self.weights, self.rank = self._copy(), self._rank(0, start)

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {name: getattr(self, name) for name in _SAVED} | {"rank": list(self.rank)}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if saved := state.stateful_callbacks.get(type(self).__name__):
            values = dict(saved["attributes"])
            self.rank = tuple(values.pop("rank"))
            for name, value in values.items():
                setattr(self, name, value)

    def save_to(self, folder: Path) -> None:
        """Write the best point's weights into a checkpoint."""
        save_file({name: tensor.contiguous() for name, tensor in self.weights.items()}, folder / HELD)

    def load_from(self, folder: Path) -> None:
        """Take the best point's weights from a checkpoint."""
        self.weights = load_file(folder / HELD)

    def reached(self, point: dict[str, float]) -> bool:
        """Whether a point is at the goal."""
        return self.until is not None and self._is_little(point["forget"])

    def _is_little(self, left: float) -> bool:
        return self.until is not None and left <= self.until

    def share(self, point: dict[str, float]) -> float:
        """The share of its value at the start that a point keeps: the lowest among all that is to be kept."""
        return min((point[name] / self.start[name] for name in self.names if self.start[name] > 0), default=1.0)

    def kept(self, point: dict[str, float]) -> bool:
        """Whether a point is above the floor."""
        return self._is_enough(self.share(point))

    def _is_enough(self, share: float) -> bool:
        return share >= self.floor - 1e-9

    def look(self, step: int, point: dict[str, float], control: Any) -> None:
        """Take a measured point into account."""
        self.at_goal = self.at_goal + 1 if self.reached(point) else 0
        rank = self._rank(step, point)
        if rank >= self.rank:  # of equals the later one, which was trained further
            self.step, self.point, self.rank, self.weights = step, dict(point), rank, self._copy()
        self.broken = 0 if self.kept(point) else self.broken + 1
        # What is kept still recovers as the learning rate falls. So a run ends early only where nearly all is kept and
        # a second check agrees: the checking questions are few, and simpler than what people ask.
        well = self.reached(point) and self.share(point) >= max(self.floor, WELL)
        self.settled = self.settled + 1 if well else 0
        if self.settled == LOOKS:
            self.reason = f"the goal was reached at step {step}"
            self._stop(control)
        elif self.broken == self.patience and self.keep_at_least is not None:
            self.reason = f"keeping stayed below its floor ({digits.given(self.floor)} of what was kept before)"
            self._stop(control)

    @staticmethod
    def _stop(control: Any) -> None:
        control.should_training_stop = True
        control.should_save = False  # a run would go on from a checkpoint made here

    def _rank(self, step: int, point: dict[str, float]) -> tuple[Any, ...]:
        if "forget" not in point:
            return (self.kept(point), step)
        return self.kept(point), -max(point["forget"], self.until or 0.0), self.at_goal >= LOOKS, self.share(point)

    @torch.no_grad()
    def restore(self) -> str:
        """Put the best point's weights into the model; a sentence on which point it is and why the run ended."""
        for name, p in self.model.named_parameters():
            if name in self.weights:
                p.copy_(self.weights[name])
        kept = f"{digits.beside(self.share(self.point), self._is_enough)} kept"
        if "forget" in self.point:
            left = digits.beside(self.point["forget"], self._is_little)
            kept = f"{left} left of what is to be forgotten, {kept}"
        where = f"step {self.step}" if self.step else "the model as it was"
        said = f"{self.reason[0].upper()}{self.reason[1:]}; what remains is {where} ({kept} on the checking questions)"
        if self.until is not None and not self.reached(self.point):
            said += f". The goal of at most {digits.given(self.until)} left was not reached"
            said += f" while keeping {digits.given(self.keep_at_least)}" if self.keep_at_least is not None else ""
        return said + "."
