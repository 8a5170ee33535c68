"""Callbacks of an `UnlearnTrainer`. Checkpoints hold their state, so that it is the same after a resume."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from .. import checkpoints
from ..errors import UserError
from ..optim import diagnostics
from .reference import AtStart

if TYPE_CHECKING:
    from ..trainer import UnlearnTrainer


class Resume(TrainerCallback):
    """Restores what a Trainer does not: the best checkpoint, and early stopping's counter."""

    def __init__(self, trainer: UnlearnTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer._resumed_from is None:
            return
        if state.best_global_step:  # the folder may have been moved
            beside = trainer._resumed_from.parent / f"{checkpoints.PREFIX}{state.best_global_step}"
            if beside.is_dir():
                state.best_model_checkpoint = str(beside)
            elif args.load_best_model_at_end and not state.best_model_checkpoint:  # it is gone
                raise UserError(
                    f"checkpoint {trainer._resumed_from}: the run's best, {beside.name}, is not beside it and could "
                    "not be loaded at the end; put it there, or give load_best_model_at_end=False"
                )
        stopping = [each for each in trainer.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
        for name in {type(each).__name__ for each in stopping}:  # a subclass's state is saved under its own name
            saved = state.stateful_callbacks.get(name) or []
            same = [each for each in stopping if type(each).__name__ == name]
            for callback, values in zip(same, saved if isinstance(saved, list) else [saved], strict=False):
                counter = values["attributes"]["early_stopping_patience_counter"]
                callback.early_stopping_patience_counter = counter
                if counter >= callback.early_stopping_patience:  # the run had stopped there
                    control.should_training_stop = True


class Remembered(TrainerCallback):
    """Keeps the reference's log-probability of each row in checkpoints: the trained model can no longer give it.

    For a model that is to be sharded, they are computed when training begins, as it is placed on the ranks only then.
    """

    FILE = "reference.json"

    def __init__(self, trainer: UnlearnTrainer, compared: Sequence[str]) -> None:
        self.trainer, self.compared = trainer, compared

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.rows.reference_log_probs:
            self.trainer._remember_reference(self.compared)

    def save_to(self, folder: Path) -> None:
        """Write them into a checkpoint."""
        said = [[list(key), value] for key, value in self.trainer.rows.reference_log_probs.items()]
        (folder / self.FILE).write_text(json.dumps(said), encoding="utf-8")

    def load_from(self, folder: Path) -> None:
        """Read them from a checkpoint."""
        if (folder / self.FILE).is_file():
            said = json.loads((folder / self.FILE).read_text(encoding="utf-8"))
            self.trainer.rows.reference_log_probs.update({tuple(key[:3]): value for key, value in said})
        elif not self.trainer.rows.reference_log_probs:
            raise UserError(
                f"checkpoint {folder}: does not hold what the reference says of the rows of "
                f"{', '.join(self.compared)}; give reference=…, a frozen copy of the model as it was"
            )


class StartKept(TrainerCallback):
    """Keeps the trained part as it was at the start in checkpoints: what is loaded to go on may be a later state."""

    FILE = "start.safetensors"

    def __init__(self, reference: AtStart) -> None:
        self.reference = reference

    def save_to(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        save_file({name: copy.cpu().contiguous() for name, copy in self.reference.copies.items()}, folder / self.FILE)

    def load_from(self, folder: Path) -> None:
        """Read it from a checkpoint."""
        if not (folder / self.FILE).is_file():
            raise UserError(f"checkpoint {folder}: does not hold {self.FILE}, the model as it was at the start")
        saved = load_file(folder / self.FILE)
        if saved.keys() != self.reference.copies.keys():
            raise UserError(f"checkpoint {folder}: is of a model of which other parameters are trained")
        self.reference.copies.update({name: saved[name].to(c.device) for name, c in self.reference.copies.items()})


class Diagnose(TrainerCallback):
    """Reads the optimizer's diagnostics every so many steps, and at the last one."""

    def __init__(self, trainer: UnlearnTrainer, every: int) -> None:
        self.trainer, self.every = trainer, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(Unlogged.__name__) if state.global_step else None
        readings = json.loads(saved["attributes"]["readings"])["last"] if saved is not None else []
        self.trainer.diagnostics = list(readings)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self.trainer.multi_objective
        last = state.global_step == state.max_steps or control.should_training_stop
        if optimizer is not None and (last or state.global_step % self.every == 0):
            layers = diagnostics(optimizer, self.trainer.model.named_parameters())
            if layers:
                self.trainer.diagnostics.append({"step": state.global_step, "layers": layers})
                unlogged = self.trainer._unlogged
                unlogged.reading = {name: round(value, 6) for name, value in layers["all"].items()}
                unlogged.last = self.trainer.diagnostics[-1:]


class ScalerAside(TrainerCallback):
    """Keeps the gradient scaler of fp16 out of steps without gradients, where it would find nothing to check."""

    def __init__(self, trainer: UnlearnTrainer) -> None:
        self.trainer = trainer
        self.scaler: Any = None  # the run's own, while another takes its place

    def begin(self) -> None:
        """Put one that does nothing in its place, until the optimizer has stepped."""
        if (scaler := self.trainer.accelerator.scaler) is not None:
            self.scaler = scaler
            self._take(torch.amp.GradScaler(enabled=False))

    def _take(self, scaler: Any) -> None:
        self.trainer.accelerator.scaler = self.trainer.optimizer.scaler = scaler

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.scaler is not None:
            self._take(self.scaler)
            self.scaler = None

    on_train_begin = on_optimizer_step  # after a run that was interrupted in such a step


class Unlogged(TrainerCallback, ExportableState):
    """What the next log entry will hold, and the last diagnostics; saved in checkpoints and restored on resume."""

    def __init__(self) -> None:
        self.last: list[dict[str, Any]] = []  # the last reading, layer by layer
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start anew after the log entry of a step."""
        self.step = step
        self.total = torch.zeros((), dtype=torch.float32)  # of the losses whose mean the Trainer logs
        self.losses: dict[str, dict[int, Tensor]] = defaultdict(dict)  # objective → step → loss so far
        self.reading: dict[str, float] = {}  # over all layers

    def over_ranks(self, accelerator: Any) -> None:
        """Replace each rank's own values by the mean over ranks, since a checkpoint holds one rank's."""

        def mean(value: Tensor) -> Tensor:
            return accelerator.reduce(value.to(accelerator.device), reduction="mean")

        self.total = mean(self.total)
        for losses in self.losses.values():
            steps = sorted(losses)
            losses.update(zip(steps, mean(torch.stack([losses[step] for step in steps])).unbind(), strict=True))

    def state(self) -> dict[str, Any]:
        losses = {name: [[at, float(loss)] for at, loss in losses.items()] for name, losses in self.losses.items()}
        own = {"step": self.step, "total": float(self.total), "losses": losses}
        # As text, since the Trainer sorts the keys that it writes, and the order of the layers must stay.
        return {
            "args": {},
            "attributes": {**own, "readings": json.dumps({"unlogged": self.reading, "last": self.last})},
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is None or not state.global_step:
            self.last = []
            self.begin(state.global_step)
            return
        saved = saved["attributes"]
        self.begin(saved["step"])
        as_kept = {"dtype": torch.float32, "device": args.device}
        self.total = torch.tensor(saved["total"], **as_kept)
        for name, losses in saved["losses"].items():
            self.losses[name] = {at: torch.tensor(loss, **as_kept) for at, loss in losses}
        readings = json.loads(saved["readings"])
        self.reading, self.last = readings["unlogged"], readings["last"]


class Multipliers(TrainerCallback, ExportableState):
    """The weights of objectives that are held below a bound; saved in checkpoints and restored on resume."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self.start, self.values = dict(values), dict(values)

    def state(self) -> dict[str, Any]:
        return {"args": {"values": dict(self.values)}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        resumed = saved is not None and state.global_step  # a run that begins has what a run before left, as well
        self.values = dict(saved["args"]["values"] if resumed else self.start)


class ScoredAtStart(TrainerCallback, ExportableState):
    """What the scores of evaluations are relative to; saved in checkpoints and restored on resume.

    Args:
        values: ``of``, a hash of the evaluation rows, and ``probabilities``, set → mean probability of its answers when
            training began; empty if they were not evaluated then.
    """

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self.values = dict(values or {})

    def state(self) -> dict[str, Any]:
        return {"args": {"values": self.values}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None and state.global_step:
            self.values = dict(saved["args"]["values"])
