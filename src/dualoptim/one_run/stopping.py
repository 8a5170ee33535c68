"""When to stop: at the goal, or if what is kept stays below its floor; then the best point is restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..evaluation import digits
from ..tasks import Task

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
    best. Where nothing is asked of what is to be kept, or the model could do none of it, every point counts as above
    the floor, and forgetting alone decides. All of this state is saved in checkpoints and restored on resume.

    Args:
        model: copies of its trainable parameters are held in main memory.
        start: the first point, {"forget": what is left, "retain": what is kept, …}, each 0 to 1, or None in all points
            if nothing is asked.
        until: the goal: what may be left; None for none.
        keep_at_least: the floor, as a share of what is kept at the start; None for none.
        checks: how many points are checked if the run takes all of its steps.
        kept: the values of a point that are to be kept; the one that fell most counts.
        left: what a share "forget" of a point is, in words.
    """

    def __init__(
        self,
        model: nn.Module,
        start: Mapping[str, float | None],
        until: float | None,
        keep_at_least: float | None,
        checks: int,
        kept: Sequence[str] = ("retain",),
        left: str = Task.left,
    ) -> None:
        self.model, self.until, self.keep_at_least = model, until, keep_at_least
        self.start, self.names, self.left = dict(start), tuple(kept), left
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

    def reached(self, point: Mapping[str, float | None]) -> bool:
        """Whether a point is at the goal."""
        left = point.get("forget")
        return left is not None and self._is_little(left)

    def _is_little(self, left: float) -> bool:
        return self.until is not None and digits.at_least(self.until, left)

    def share(self, point: Mapping[str, float | None]) -> float | None:
        """The share of its value at the start that a point keeps: the lowest among all that is to be kept.

        None where there was nothing to keep at the start.
        """
        values = ((self.start[name], point[name]) for name in self.names)
        return min((now / first for first, now in values if first and now is not None), default=None)

    def kept(self, point: Mapping[str, float | None]) -> bool:
        """Whether a point is above the floor."""
        share = self.share(point)
        return share is None or self._is_enough(share)

    def _is_enough(self, share: float) -> bool:
        return digits.at_least(share, self.floor)

    def look(self, step: int, point: Mapping[str, float | None], control: Any) -> None:
        """Take a measured point into account."""
        self.at_goal = self.at_goal + 1 if self.reached(point) else 0
        rank = self._rank(step, point)
        if rank >= self.rank:  # of equals the later one, which was trained further
            self.step, self.point, self.rank, self.weights = step, dict(point), rank, self._copy()
        self.broken = 0 if self.kept(point) else self.broken + 1
        # What is kept still recovers as the learning rate falls. So a run ends early only where nearly all is kept and
        # a second check agrees: the checking questions are few, and simpler than what people ask.
        share = self.share(point)
        well = self.reached(point) and (share is None or digits.at_least(share, max(self.floor, WELL)))
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

    def _rank(self, step: int, point: Mapping[str, float | None]) -> tuple[Any, ...]:
        if (left := point.get("forget")) is None:
            return (self.kept(point), step)
        more = 0.0 if self._is_little(left) else left
        return self.kept(point), -more, self.at_goal >= LOOKS, self.share(point) or 0.0

    @torch.no_grad()
    def restore(self) -> str:
        """Put the best point's weights into the model; a sentence on which point it is and why the run ended."""
        for name, p in self.model.named_parameters():
            if name in self.weights:
                p.copy_(self.weights[name])
        left, share = self.point.get("forget"), self.share(self.point)
        shares = [
            *([f"{digits.beside(left, self._is_little)} {self.left}"] if left is not None else []),
            *([f"{digits.beside(share, self._is_enough)} kept"] if share is not None else []),
        ]
        found = [f"{', '.join(shares)} on the checking questions"] if shares else []
        found += ["nothing to forget was asked"] if left is None and self.until is not None else []
        found += ["nothing to keep was asked"] if share is None else []
        where = f"step {self.step}" if self.step else "the model as it was"
        said = f"{self.reason[0].upper()}{self.reason[1:]}; what remains is {where} ({'; '.join(found)})"
        if self.until is not None and left is not None and not self._is_little(left):
            said += f". The goal of at most {digits.given(self.until)} {self.left.partition(' of ')[0]} was not reached"
            floor = self.keep_at_least if share is not None else None
            said += f" while keeping {digits.given(floor)}" if floor is not None else ""
        return said + "."
