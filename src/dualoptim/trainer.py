"""`UnlearnTrainer`: a `transformers.Trainer` that trains on several objectives by turns, or jointly.

All that a Trainer does stays as it is: callbacks, logging, `report_to`, mixed precision, gradient checkpointing,
checkpoints and resume. What is added: batches carry their objective, each objective has its own loss, a
multi-objective optimizer is told whose step it is, what the reference says is computed once where that suffices, and
checkpoints are whole or not there (`dualoptim.checkpoints`).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from . import checkpoints
from .adapters import check_model
from .combine import Rule, combined
from .data import ObjectiveRows, Plan, Row, collate, pad_id
from .losses import Loss, sequence_log_probs
from .optim import DualOptimPlus, diagnostics, parameter_groups, releasing
from .reference import AtStart
from .schedule import Turn

logger = logging.getLogger(__name__)


@dataclass
class Objective:
    """One thing to train on.

    Args:
        rows: what it is trained on.
        loss: an instance of one of `dualoptim.losses.LOSSES`.
        weight: coefficient of its loss.
        refusals: replies that may stand in for a row's answer; needed where the loss needs them.
        bound: hold the loss below this by a multiplier in place of a fixed weight (PDU, arXiv 2506.05314): it begins
            at `weight` and after every step that serves the objective goes to max(0, λ + η (loss − bound)).
        multiplier_lr: η.
    """

    rows: Sequence[Row]
    loss: Loss
    weight: float = 1.0
    refusals: Sequence[str] = field(default_factory=tuple)
    bound: float | None = None
    multiplier_lr: float = 1.0


class UnlearnTrainer(Trainer):
    """Train a causal model to forget some rows and keep others.

    The loss of an optimizer step is Σ_o weight_o · loss_o over the objectives that it serves, each loss averaged over
    all of the step's rows or tokens whatever the number of micro-batches and ranks.

    Args:
        model: a causal language model.
        args: `TrainingArguments`. `per_device_train_batch_size`, `num_train_epochs` and `max_steps` are not read:
            `turns` says how many steps of how many sequences there are; `gradient_accumulation_steps` splits them. A
            loss that is not finite is logged as it is, whatever `logging_nan_inf_filter` says.
        objectives: name → `Objective`.
        turns: what each optimizer step serves, from `dualoptim.schedule`.
        processing_class: the model's tokenizer.
        reference: the frozen model that losses compare with. Without it, that is the model as it is handed over, its
            adapters included. Where a loss needs no more than log π_ref(y|x), that is computed once, for every row that
            will be drawn. Where one needs all logits, a copy of what is trained is kept, if that is not the whole
            model, as under PEFT; a model that is trained as a whole needs a reference beside it.
        combine: what makes one gradient of several objectives' in a joint step, one of `dualoptim.combine.RULES`;
            None for their weighted sum.
        max_length: the most tokens that a row may have.
        diagnostics_every: optimizer steps between readings of what the objectives do to each other
            (`dualoptim.optim.diagnostics`), and at the last; 0 for none. Logged over all layers, and kept by layer in
            `self.diagnostics`, on resume from the last one on. A reading costs about as much as one optimizer step.
        release_gradients: step each parameter while backward runs and free its gradient
            (`dualoptim.optim.releasing`), so that no two are there at once. Needs `max_grad_norm` 0 and a step in one
            micro-batch and one process, without fp16.
        fingerprints: name → hash of what the run is made of, beside its rows and its schedule: training goes on from no
            checkpoint of a run that was made of something else.
        **kwargs: anything else a Trainer takes; `optimizers=(optimizer, None)` or
            `optimizer_cls_and_kwargs=(DualOptimPlus, {})` choose the optimizer, the latter with the learning rate of
            `args` and the objectives' names, unless it is given others. One that does not know
            objectives, such as `torch.optim.AdamW`, keeps one state for all.

    Raises:
        ValueError: an adapter of a kind that is not supported (`dualoptim.adapters.KINDS`), a loss without the
            reference model or the refusals it needs, arguments that want the best checkpoint
            by an evaluation, a turn of several objectives with an
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
        combine: Rule | None = None,
        max_length: int = 512,
        diagnostics_every: int = 50,
        release_gradients: bool = False,
        fingerprints: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        check_model(model)
        if reference is None:
            reference = _at_start(model, {objective.loss.reference for objective in objectives.values()})
        for name, objective in objectives.items():
            loss = type(objective.loss).__name__
            if objective.loss.reference == "model" and reference is None:
                raise ValueError(f"the loss {loss} of objective {name!r} needs reference=…, a frozen copy of the model")
            if objective.loss.needs_idk and not objective.refusals:
                raise ValueError(f"the loss {loss} of objective {name!r} needs refusals=…, replies that say no")
        if args.load_best_model_at_end or args.save_strategy == "best":
            raise ValueError("a best checkpoint is chosen by an evaluation, which this trainer has none of")
        if release_gradients:
            _check_release(args, combine)
        args.max_steps = len(turns)
        args.logging_nan_inf_filter = False  # which logs 0 for what is not a number
        # Not None, so that every version of Trainer leaves the loss's scale over micro-batches to compute_loss.
        super().__init__(model, args, processing_class=processing_class, compute_loss_func=self.compute_loss, **kwargs)
        self.objectives, self.turns = dict(objectives), list(turns)
        self.reference = reference
        if reference is not None and not isinstance(reference, AtStart):
            reference.to(args.device).eval().requires_grad_(False)
        self.combine, self.release_gradients = combine, release_gradients
        self.rows = ObjectiveRows(
            {name: objective.rows for name, objective in objectives.items()},
            {name: objective.refusals for name, objective in objectives.items() if objective.loss.needs_idk},
            processing_class,
            max_length,
        )
        self.given_fingerprints = dict(fingerprints or {})
        self._beside: str | None = None  # where a checkpoint is being written
        self.paused: set[str] = set()  # objectives whose part of every step is skipped; whoever watches the run decides
        self.diagnostics: list[dict[str, Any]] = []  # {"step": …, "layers": layer → measure → value}
        if diagnostics_every:
            self.add_callback(_Diagnose(self, diagnostics_every))
        self.add_callback(Unlogged())
        self._gradients: dict[str, list[Tensor | None]] = {}  # of each objective in this step, where they are combined
        self.add_callback(Multipliers({name: o.weight for name, o in objectives.items() if o.bound is not None}))
        compared = [name for name, objective in objectives.items() if objective.loss.reference == "sequences"]
        if compared:
            self._remember_reference(compared)

    @torch.no_grad()
    def _remember_reference(self, compared: Sequence[str]) -> None:
        """log π_ref(y|x) of the rows and refusals of some objectives that will be drawn, into the data set."""
        draws = [draw for batch in self._plan() for draw in batch if draw.objective in compared]
        tokens = self.rows.drawn(draws)
        order = sorted(tokens, key=lambda key: len(tokens[key].input_ids))
        size = max(1, max(sum(turn.values()) for turn in self.turns) // self.args.gradient_accumulation_steps)
        frozen = self.model if self.reference is None else self.reference
        own = self.reference is None or isinstance(self.reference, AtStart)
        if own and next(self.model.parameters()).device.type != self.args.device.type:  # moved when training begins
            raise ValueError(
                f"what the losses of {', '.join(compared)} compare with is asked before training, when a model that is "
                "to be sharded is not on its device yet; give reference=…, a frozen copy of the model"
            )
        training = frozen.training
        frozen.eval()
        for at in tqdm(range(0, len(order), size), desc="Reference", leave=False, disable=None):
            keys = order[at : at + size]
            batch = collate([tokens[key] for key in keys], pad_id(self.rows.tokenizer))
            with self.accelerator.autocast():
                totals, _ = sequence_log_probs(frozen, {k: v.to(self.args.device) for k, v in batch.items()})
            self.rows.reference_log_probs.update(zip(keys, totals.tolist(), strict=True))
        frozen.train(training)

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of what the run is made of: the rows, their order, and what was given."""

        def digest(*values: Any) -> str:
            return hashlib.sha256(json.dumps(values).encode()).hexdigest()

        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return {
            **self.given_fingerprints,
            "set of rows": digest(self.rows.tokens, self.rows.refusals),
            "schedule": digest([dict(turn) for turn in self.turns], seed),
        }

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, but that it goes on from a whole checkpoint of the same run, or not at all.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest whole one of the output folder.

        Raises:
            ValueError: it is not whole, or of a run with other rows, another schedule, other `fingerprints`; or there
                is none.
        """
        if resume_from_checkpoint is True:
            out = Path(str(self.args.output_dir))
            if (found := checkpoints.newest(out, self.fingerprints)) is None:
                raise ValueError(f"{out}: holds no whole checkpoint to go on from; begin anew")
            resume_from_checkpoint = str(found)
        elif resume_from_checkpoint:
            checkpoints.check(Path(resume_from_checkpoint), self.fingerprints)
        if isinstance(resume_from_checkpoint, str):
            begun = Path(resume_from_checkpoint)
            for each in self._beside_states():
                each.load_from(begun)
            if self.args.should_save and begun.parent.samefile(str(self.args.output_dir)):
                checkpoints.rotate(begun, self.args.save_total_limit)  # where a kill came between it and its rotation
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _beside_states(self) -> list[Any]:
        """Callbacks with files of their own in a checkpoint."""
        return [each for each in self.callback_handler.callbacks if hasattr(each, "save_to")]

    def _get_output_dir(self, trial: Any) -> str:
        return self._beside or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, but written beside, and put in its place once it is all there."""
        out = Path(super()._get_output_dir(trial))
        name = f"{checkpoints.PREFIX}{self.state.global_step}"
        beside = out / checkpoints.PARTIAL
        try:
            if self.args.should_save:
                shutil.rmtree(beside / name, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._beside = str(beside)
            self._unlogged.over_ranks(self.accelerator)
            super()._save_checkpoint(model, trial)
            self._beside = None
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                for each in self._beside_states():
                    each.save_to(beside / name)
                checkpoints.seal(beside / name, self.fingerprints)
                checkpoints.put(beside / name, out / name)
                checkpoints.rotate(out / name, self.args.save_total_limit)
        except (OSError, RuntimeError, SafetensorError) as error:  # of which a full disk is all
            if self.args.world_size > 1:  # the others wait
                raise
            shutil.rmtree(beside, ignore_errors=True)
            reason = " ".join(str(error).split())
            logger.warning("checkpoint %s could not be written (%s); training goes on without it", out / name, reason)
        finally:
            self._beside = None
        self.accelerator.wait_for_everyone()

    @property
    def multipliers(self) -> dict[str, float]:
        """The present weight of every objective that is held below a bound."""
        return next(held.values for held in self.callback_handler.callbacks if isinstance(held, Multipliers))

    @property
    def _unlogged(self) -> Unlogged:
        return next(held for held in self.callback_handler.callbacks if isinstance(held, Unlogged))

    @property
    def multi_objective(self) -> DualOptimPlus | None:
        """The optimizer, if it knows objectives."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        return optimizer if isinstance(optimizer, DualOptimPlus) else None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the Trainer's; a multi-objective optimizer gets its `parameter_groups`, embeddings in 32 bits.

        And where they are not among its arguments, the learning rate of the Trainer's and the objectives' names.
        """
        cls, arguments = self.optimizer_cls_and_kwargs or (None, {})
        if self.optimizer is None and cls is not None and issubclass(cls, DualOptimPlus):
            arguments = {"lr": self.args.learning_rate, "objectives": tuple(self.objectives), **arguments}
            self.optimizer = cls(parameter_groups(self.model, self.args.weight_decay), **arguments)
        return super().create_optimizer(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """The whole run's batches, in order: it is one epoch of the Trainer's."""
        loader = DataLoader(
            self.rows,
            batch_sampler=self._plan(),
            collate_fn=self.rows.collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        return self.accelerator.prepare(loader)

    def _plan(self) -> Plan:
        return Plan(
            self.turns,
            self.rows,
            micro_batches=self.args.gradient_accumulation_steps * self.args.world_size,
            ranks=self.args.world_size,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )

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
            if not num_items_in_batch[name]:
                raise ValueError(
                    f"{type(objective.loss).__name__} has nothing to average over in a batch of {name!r}: "
                    "its answers are too short for the loss's arguments"
                )
            share = objective.loss.size(batch) / num_items_in_batch[name]
            with self.accelerator.autocast():  # for the reference, which accelerate has not prepared
                loss = objective.loss(model, batch, self.reference)
            # Gradients are averaged over ranks, and the share is of all ranks' items together.
            loss = loss * share * self.args.world_size
            losses, step = self._unlogged.losses[name], self.state.global_step
            losses[step] = losses.get(step, 0) + loss.detach().float()
            total = total + self.multipliers.get(name, objective.weight) * loss
        return total

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's; then what happens once in an optimizer step, at its last micro-batch."""
        if self.paused:
            self._hand_over(inputs)
            inputs = {name: batch for name, batch in inputs.items() if name not in self.paused}
            if not inputs:  # without gradients the optimizer's step changes nothing
                return torch.zeros((), device=self.args.device)
        if self.release_gradients:
            loss = self._released(model, inputs, num_items_in_batch)
        elif self.combine is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self._one_by_one(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._raise_multipliers()
        self._unlogged.total = self._unlogged.total + loss
        return loss

    def _released(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """A micro-batch whose backward pass is the step; the Trainer's own, which follows, finds no gradients."""
        self._hand_over(inputs)
        own = getattr(self.optimizer, "optimizer", self.optimizer)
        several = self.multi_objective
        with releasing(own, objective=several.objective if several is not None else None):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._hand_over(inputs)
        return loss

    def _one_by_one(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """A backward pass for each objective of the micro-batch; at the step's last, one gradient of theirs."""
        total = torch.zeros((), device=self.args.device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        for name, batch in inputs.items():
            # Its gradient so far goes back to where autograd, and what averages over ranks, adds to it.
            for p, gradient in zip(parameters, self._gradients.get(name, [None] * len(parameters)), strict=True):
                p.grad = gradient
            total = total + super().training_step(model, {name: batch}, num_items_in_batch)
            self._gradients[name] = [p.grad for p in parameters]
        if self.combine is not None and self.accelerator.sync_gradients:
            gradients = [
                [
                    torch.zeros_like(p) if g is None else g
                    for p, g in zip(parameters, self._gradients[name], strict=True)
                ]
                for name in self.objectives
                if name in self._gradients
            ]
            for p, mended in zip(parameters, combined(self.combine, gradients), strict=True):
                p.grad = mended
            self._gradients = {}
        return total

    def _raise_multipliers(self) -> None:
        """λ ← max(0, λ + η (loss − bound)) for the objectives of this step that are held below a bound."""
        for name in self.multipliers:
            objective, losses = self.objectives[name], self._unlogged.losses.get(name, {})
            assert objective.bound is not None
            if (loss := losses.get(self.state.global_step)) is not None:
                excess = float(self.accelerator.reduce(loss, reduction="mean")) - objective.bound
                self.multipliers[name] = max(0.0, self.multipliers[name] + objective.multiplier_lr * excess)

    def _hand_over(self, inputs: Mapping[str, Any]) -> None:
        """Tell the optimizer whose step this is, and refuse batches that belong to another."""
        turn = self.turns[self.state.global_step]
        if not set(inputs) <= set(turn):
            raise ValueError(
                f"step {self.state.global_step} is the turn of {', '.join(turn)}, "
                f"but its batch carries {', '.join(inputs)}"
            )
        if (optimizer := self.multi_objective) is not None:
            if len(optimizer.objectives) == 1:  # one state for all: AdamW by another name
                optimizer.objective = optimizer.objectives[0]
                return
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
            since = self._unlogged
            # The Trainer's mean begins anew on resume. Each rank's loss is scaled so that their mean is the step's.
            since.over_ranks(self.accelerator)
            logs["loss"] = float(since.total) / max(1, self.state.global_step - since.step)
            for name, losses in since.losses.items():
                logs[f"loss/{name}"] = round(float(torch.stack(list(losses.values())).mean()), 4)
            logs |= {f"multiplier/{name}": round(value, 4) for name, value in self.multipliers.items()}
            logs |= since.reading
            since.begin(self.state.global_step)
            for name, count in (self.multi_objective.num_skipped if self.multi_objective else {}).items():
                if count:
                    logs[f"skipped_steps/{name}"] = count
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        """As the Trainer's, summed over the objectives in the batch."""
        return sum(super(UnlearnTrainer, self).floating_point_ops(batch) for batch in inputs.values())


def _check_release(args: TrainingArguments, combine: Rule | None) -> None:
    """Refuse what cannot be had without all gradients beside each other."""
    if args.max_grad_norm:
        wrong = f"max_grad_norm {args.max_grad_norm:g} clips by the norm of all of them; set it to 0"
    elif args.gradient_accumulation_steps > 1:
        wrong = f"gradient_accumulation_steps is {args.gradient_accumulation_steps}; take a step in one"
    elif args.world_size > 1:
        wrong = f"there are {args.world_size} processes; use one, or FSDP to share the memory"
    elif args.fp16:
        wrong = "fp16 scales them; use bf16"
    elif combine is not None:
        wrong = "combine makes one of several; leave it out"
    else:
        return
    raise ValueError(f"release_gradients frees each gradient as it comes, but {wrong}")


class _Diagnose(TrainerCallback):
    """Reads the optimizer's diagnostics now and then."""

    def __init__(self, trainer: UnlearnTrainer, every: int) -> None:
        self.trainer, self.every = trainer, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(Unlogged.__name__)
        if saved is not None and state.global_step:
            self.trainer.diagnostics = list(json.loads(saved["attributes"]["readings"])["last"])

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


class Unlogged(TrainerCallback, ExportableState):
    """What is to go with the next log, and the last reading; saved in checkpoints and taken up on resume."""

    def __init__(self) -> None:
        self.last: list[dict[str, Any]] = []  # the last reading, layer by layer
        self.begin(0)

    def begin(self, step: int) -> None:
        """Forget what was logged at a step."""
        self.step = step
        self.total = torch.zeros(())  # of what the Trainer's own loss is the mean
        self.losses: dict[str, dict[int, Tensor]] = defaultdict(dict)  # objective → step → loss so far
        self.reading: dict[str, float] = {}  # over all layers

    def over_ranks(self, accelerator: Any) -> None:
        """Take the mean of all ranks for each rank's own, of which a checkpoint holds one."""

        def mean(value: Tensor) -> Tensor:
            return accelerator.reduce(value.to(accelerator.device), reduction="mean")

        self.total = mean(self.total)
        for losses in self.losses.values():
            steps = sorted(losses)
            losses.update(zip(steps, mean(torch.stack([losses[step] for step in steps])).unbind(), strict=True))

    def state(self) -> dict[str, Any]:
        losses = {name: [[at, float(loss)] for at, loss in losses.items()] for name, losses in self.losses.items()}
        own = {"step": self.step, "total": float(self.total), "losses": losses}
        # As text, since the Trainer sorts what it writes, and layers stand in their order.
        return {
            "args": {},
            "attributes": {**own, "readings": json.dumps({"unlogged": self.reading, "last": self.last})},
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is None or not state.global_step:
            self.begin(state.global_step)
            return
        saved = saved["attributes"]
        self.begin(saved["step"])
        self.total = torch.tensor(saved["total"], device=args.device)
        for name, losses in saved["losses"].items():
            self.losses[name] = {at: torch.tensor(loss, device=args.device) for at, loss in losses}
        readings = json.loads(saved["readings"])
        self.reading, self.last = readings["unlogged"], readings["last"]


class Multipliers(TrainerCallback, ExportableState):
    """The weights of objectives that are held below a bound; saved in checkpoints and taken up on resume."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self.values = dict(values)

    def state(self) -> dict[str, Any]:
        return {"args": {"values": dict(self.values)}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None:
            self.values = dict(saved["args"]["values"])


def _at_start(model: nn.Module, wanted: set[str]) -> AtStart | None:
    """The model as it is handed over, where losses want it and what is trained of it is not the whole.

    An adapter is little, so that it is kept wherever a loss compares with anything.
    """
    partly = any(not p.requires_grad for p in model.parameters())
    compares = "model" in wanted or ("sequences" in wanted and hasattr(model, "peft_config"))
    return AtStart(model) if partly and compares else None
