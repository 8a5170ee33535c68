"""`UnlearnTrainer`: a `transformers.Trainer` that trains on several objectives by turns, or jointly.

All that a Trainer does stays as it is: callbacks, logging, `report_to`, mixed precision, gradient checkpointing,
checkpoints and resume. What is added: batches carry their objective, each objective has its own loss, and a
multi-objective optimizer is told whose step it is.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from .data import ObjectiveRows, Plan, Row
from .losses import Loss
from .optim import DualOptimPlus, diagnostics, parameter_groups
from .schedule import Turn


@dataclass
class Objective:
    """One thing to train on.

    Args:
        rows: what it is trained on.
        loss: an instance of one of `dualoptim.losses.LOSSES`.
        weight: coefficient of its loss.
        refusals: replies that may stand in for a row's answer; needed where the loss needs them.
    """

    rows: Sequence[Row]
    loss: Loss
    weight: float = 1.0
    refusals: Sequence[str] = field(default_factory=tuple)


class UnlearnTrainer(Trainer):
    """Train a causal model to forget some rows and keep others.

    The loss of an optimizer step is Σ_o weight_o · loss_o over the objectives that it serves, each loss averaged over
    all of the step's rows or tokens whatever the number of micro-batches and ranks.

    Args:
        model: a causal language model.
        args: `TrainingArguments`. `per_device_train_batch_size`, `num_train_epochs` and `max_steps` are not read:
            `turns` says how many steps of how many sequences there are; `gradient_accumulation_steps` splits them.
        objectives: name → `Objective`.
        turns: what each optimizer step serves, from `dualoptim.schedule`.
        processing_class: the model's tokenizer.
        reference: the frozen model that losses compare with; needed where a loss needs it.
        max_length: the most tokens that a row may have.
        diagnostics_every: optimizer steps between readings of what the objectives do to each other
            (`dualoptim.optim.diagnostics`), and at the last; 0 for none. Logged over all layers, and kept by layer in
            `self.diagnostics`. A reading costs about as much as one optimizer step.
        **kwargs: anything else a Trainer takes; `optimizers=(optimizer, None)` or
            `optimizer_cls_and_kwargs=(DualOptimPlus, {"lr": 1e-5})` choose the optimizer. One that does not know
            objectives, such as `torch.optim.AdamW`, keeps one state for all.

    Raises:
        ValueError: a loss without the reference or the refusals it needs, a turn of several objectives with an
            optimizer that steps for one, or a batch whose objective is not the one whose turn it is.
    """

    optimizer: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        objectives: Mapping[str, Objective],
        turns: Sequence[Turn],
        processing_class: Any,
        reference: nn.Module | None = None,
        max_length: int = 512,
        diagnostics_every: int = 50,
        **kwargs: Any,
    ) -> None:
        for name, objective in objectives.items():
            loss = type(objective.loss).__name__
            if objective.loss.needs_reference and reference is None:
                raise ValueError(f"the loss {loss} of objective {name!r} needs reference=…, a frozen copy of the model")
            if objective.loss.needs_idk and not objective.refusals:
                raise ValueError(f"the loss {loss} of objective {name!r} needs refusals=…, replies that say no")
        args.max_steps = len(turns)
        # Not None, so that every version of Trainer leaves the loss's scale over micro-batches to compute_loss.
        super().__init__(model, args, processing_class=processing_class, compute_loss_func=self.compute_loss, **kwargs)
        self.objectives, self.turns = dict(objectives), list(turns)
        self.reference = None if reference is None else reference.to(args.device).eval().requires_grad_(False)
        self.rows = ObjectiveRows(
            {name: objective.rows for name, objective in objectives.items()},
            {name: objective.refusals for name, objective in objectives.items() if objective.loss.needs_idk},
            processing_class,
            max_length,
        )
        self.diagnostics: list[dict[str, Any]] = []  # {"step": …, "layers": layer → measure → value}
        self._unlogged: dict[str, float] = {}  # the last reading, which goes with the next log of the loss
        if diagnostics_every:
            self.add_callback(_Diagnose(self, diagnostics_every))
        self._losses: dict[str, dict[int, Tensor]] = defaultdict(dict)  # objective → step → loss so far

    @property
    def multi_objective(self) -> DualOptimPlus | None:
        """The optimizer, if it knows objectives."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        return optimizer if isinstance(optimizer, DualOptimPlus) else None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the Trainer's; a multi-objective optimizer gets its `parameter_groups`, embeddings in 32 bits."""
        cls, arguments = self.optimizer_cls_and_kwargs or (None, {})
        if self.optimizer is None and cls is not None and issubclass(cls, DualOptimPlus):
            self.optimizer = cls(parameter_groups(self.model, self.args.weight_decay), **arguments)
        return super().create_optimizer(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """The whole run's batches, in order: it is one epoch of the Trainer's."""
        plan = Plan(
            self.turns,
            self.rows,
            micro_batches=self.args.gradient_accumulation_steps * self.args.world_size,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )
        loader = DataLoader(
            self.rows,
            batch_sampler=plan,
            collate_fn=self.rows.collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """A step's micro-batches, and how many items of each objective they hold together, over all ranks."""
        samples = list(itertools.islice(epoch_iterator, num_batches))
        names = list(self.objectives)
        sizes = torch.zeros(len(names), device=device)
        for sample in samples:
            for name, batch in sample.items():
                sizes[names.index(name)] += self.objectives[name].loss.size(batch)
        sizes = self.accelerator.reduce(sizes, reduction="sum")
        return samples, dict(zip(names, sizes.tolist(), strict=True))

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Σ_o weight_o · loss_o of a micro-batch, scaled to its share of the optimizer step.

        Args:
            inputs: objective → batch, as `ObjectiveRows.collate` makes it.
            num_items_in_batch: objective → items in the whole step, as `get_batch_samples` counts them.
        """
        self._hand_over(inputs)
        total = torch.zeros((), device=self.args.device)
        for name, batch in inputs.items():
            objective = self.objectives[name]
            share = objective.loss.size(batch) / num_items_in_batch[name]
            with self.accelerator.autocast():  # for the reference, which accelerate has not prepared
                loss = objective.loss(model, batch, self.reference)
            # Gradients are averaged over ranks, and the share is of all ranks' items together.
            loss = loss * share * self.args.world_size
            losses, step = self._losses[name], self.state.global_step
            losses[step] = losses.get(step, 0) + loss.detach()
            total = total + objective.weight * loss
        return total

    def _hand_over(self, inputs: Mapping[str, Any]) -> None:
        """Tell the optimizer whose step this is, and refuse batches that belong to another."""
        turn = self.turns[self.state.global_step]
        if not set(inputs) <= set(turn):
            raise ValueError(
                f"step {self.state.global_step} is the turn of {', '.join(turn)}, "
                f"but its batch carries {', '.join(inputs)}"
            )
        if (optimizer := self.multi_objective) is not None:
            if len(turn) > 1:
                raise ValueError(
                    f"step {self.state.global_step} serves {', '.join(turn)} jointly, but "
                    f"{type(optimizer).__name__} steps for one objective; train by turns, "
                    "or use an optimizer with one state"
                )
            optimizer.objective = next(iter(turn))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log each objective's own loss, averaged over its steps since the last log, beside the Trainer's."""
        if "loss" in logs:
            for name, losses in self._losses.items():
                logs[f"loss/{name}"] = round(float(torch.stack(list(losses.values())).mean()), 4)
            self._losses.clear()
            logs |= self._unlogged
            self._unlogged = {}
            for name, count in (self.multi_objective.num_skipped if self.multi_objective else {}).items():
                if count:
                    logs[f"skipped_steps/{name}"] = count
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        """As the Trainer's, summed over the objectives in the batch."""
        return sum(super(UnlearnTrainer, self).floating_point_ops(batch) for batch in inputs.values())


class _Diagnose(TrainerCallback):
    """Reads the optimizer's diagnostics now and then."""

    def __init__(self, trainer: UnlearnTrainer, every: int) -> None:
        self.trainer, self.every = trainer, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self.trainer.multi_objective
        if optimizer is not None and (state.global_step % self.every == 0 or state.global_step == state.max_steps):
            layers = diagnostics(optimizer, self.trainer.model.named_parameters())
            if layers:
                self.trainer.diagnostics.append({"step": state.global_step, "layers": layers})
                self.trainer._unlogged = {name: round(value, 6) for name, value in layers["all"].items()}
