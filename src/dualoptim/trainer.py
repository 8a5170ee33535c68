"""`UnlearnTrainer`: a `transformers.Trainer` for alternating or joint training on several objectives.

Everything that a Trainer does still works: evaluation, prediction, early stopping and the best model, callbacks,
logging, `report_to`, mixed precision, gradient checkpointing, checkpoints and resume. An argument that is not read is
refused (`dualoptim.training.arguments`). Added are: batches that carry their objective; a loss for each objective; a
multi-objective optimizer that is told each step's objective; reference log-probabilities computed once where these
suffice; a forget/keep score in evaluations (`dualoptim.training.evaluation`); and checkpoints that are complete or
absent (`dualoptim.checkpoints`). A run on several ranks, under DDP, FSDP2 or DeepSpeed, gives the result of a run in
one process (`dualoptim.training.engines`, `dualoptim.training.sharded`).
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import speed_metrics

from . import checkpoints
from .adapters import check_model
from .data import ObjectiveRows, Plan, Row, as_rows, collate, pad_id, texts
from .errors import UserError, unknown
from .hashes import digest
from .losses import Loss, sequence_log_probs
from .models import copy_processor, load_model, load_tokenizer, make_savable, positions, rope_switch
from .optim import DualOptimPlus, parameter_groups, releasing
from .optim.optimizer import multi_objective
from .schedule import Turn
from .training import arguments as trainer_arguments
from .training import engines, fitting, reporting, sharded, sharpness
from .training import evaluation as evaluation
from .training.callbacks import (
    Diagnose,
    Multipliers,
    Remembered,
    Resume,
    ScalerAside,
    ScoredAtStart,
    StartKept,
    Unlogged,
)
from .training.causal import check_causal
from .training.combine import Rule, combined
from .training.reference import AtStart, at_start, evaluating, partly_trained
from .training.wrappers import bare, check_saved, compiled_in_place, unprepare

logger = logging.getLogger(__name__)


@dataclass
class Objective:
    """One training objective: its rows, its loss and the loss's weight.

    A trainer copies it, so that one may serve several: what is changed later is changed in `trainer.objectives`.

    Args:
        rows: the training rows: `Row`s, or mappings in any form that a file of rows may have.
        loss: an instance of one of `dualoptim.losses.LOSSES`, or of a `Loss` of your own.
        weight: coefficient of its loss. Where those of all of a step's objectives are 0, the step is skipped.
        refusals: replies that may replace a row's answer; required by losses that need them. For AltPO, each row has
            its own under ``alternates`` instead (`dualoptim.rows.alternates` generates them with a model).
        bound: keep the loss below this value by a multiplier λ in place of a fixed weight (PDU, arXiv 2506.05314).
            λ starts at `weight`; after every step that serves the objective it becomes max(0, λ + η (loss − bound)),
            unless the loss is not finite.
        multiplier_lr: η > 0.
        multiplier_warmup: optimizer steps at the start of the run, of all objectives, in which λ is not updated.
    """

    rows: Iterable[Row | Mapping[str, Any]]
    loss: Loss
    weight: float = 1.0
    refusals: Sequence[str] = field(default_factory=tuple)
    bound: float | None = None
    multiplier_lr: float = 1.0
    multiplier_warmup: int = 0

    def __post_init__(self) -> None:
        """Refuse what would be read as something else, or not at all."""
        if not isinstance(self.loss, Loss):
            raise UserError(f"loss: give an instance, such as LOSSES['NPO'](), and not {self.loss!r}")
        given = self.refusals
        if isinstance(given, str) or not all(isinstance(text, str) and text.strip() for text in given):
            raise UserError(f"refusals: give a list of texts, none of them empty, and not {given!r}")
        for name in ("weight", "multiplier_lr", *(("bound",) if self.bound is not None else ())):
            if not _is_finite(value := getattr(self, name)):
                raise UserError(f"{name} must be a finite number, but is {value!r}")
        if self.multiplier_lr <= 0:
            raise UserError(f"multiplier_lr must be > 0, but is {self.multiplier_lr}")
        if not isinstance(self.multiplier_warmup, int) or self.multiplier_warmup < 0:
            raise UserError(
                f"multiplier_warmup must be a whole number of steps >= 0, but is {self.multiplier_warmup!r}"
            )
        if self.bound is not None and self.weight < 0:
            raise UserError(
                f"weight: with bound=… the multiplier begins there, so it must be >= 0, but is {self.weight}"
            )
        if self.bound is None and (self.multiplier_lr != 1.0 or self.multiplier_warmup):
            raise UserError(
                "multiplier_lr and multiplier_warmup: there is no multiplier without bound=…; leave them out"
            )


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor
        return False


class UnlearnTrainer(Trainer):
    """Train a causal model to forget some rows and keep others.

    The loss of an optimizer step is Σ_o weight_o · loss_o over the objectives that it serves, each loss averaged over
    all of the step's rows or tokens whatever the number of micro-batches and ranks.

    Args:
        model: a causal language model; or its folder or hub id, in which case it is loaded in fp32. What
            `torch.compile` made of it or of its layers is compiled in place instead, with the same arguments, so that
            it is saved under its own names. Any other wrapper, such as `nn.DataParallel`, is refused.
        args: `TrainingArguments`; it is copied. Arguments that this trainer does not read are refused: `turns` sets
            the number of steps and the sequences of each, and `gradient_accumulation_steps` splits a step into
            micro-batches. A loss that is not finite is logged as it is, whatever `logging_nan_inf_filter` says.
        objectives: name → `Objective`; they are copied. Of those in `self.objectives`, a weight may be changed while
            the run goes on, as by a callback; the rows and refusals are read once.
        turns: the objectives that each optimizer step serves, from `dualoptim.schedule`.
        processing_class: the model's tokenizer, or its processor, of which the tokenizer is used and all is saved; by
            default loaded with a model that is given by its name.
        eval_dataset: evaluation rows, or several sets of them by name (`dualoptim.training.evaluation`). If sets have
            the names of objectives, at least one to forget and one to keep, evaluations have a forget/keep score,
            which is then the default of `metric_for_best_model`.
        log_dir: folder for the files of the trackers that `args.report_to` names; default "runs" in `args.output_dir`.
        reference: the frozen reference model of the losses, or its name, by which it is loaded in the model's dtype;
            default the model as it is passed in, with its adapters. If a loss needs only log π_ref(y|x), it is computed
            once for every row that will be drawn. If a loss needs all logits, a copy of the trainable parameters is
            kept, provided that only part of the model is trained, as under PEFT; if the whole model is trained, a
            reference must be given. For a model that is to be sharded, the log-probabilities are computed when training
            begins, and checkpoints hold them. A reference may be sharded by `fully_shard`.
        combine: the rule that combines the objectives' gradients in a joint step, one of
            `dualoptim.training.combine.RULES`; None for their weighted sum. It gets the Gramian and the roles of the
            objectives' losses.
        sam_rho: ρ of SAM: the gradient of the losses to forget is taken at weights moved this far along that gradient
            (`dualoptim.training.sharpness`); None for no perturbation. A step that forgets runs these losses twice; the
            values logged are those at the moved weights. Memory holds one more copy of the trainable parameters. Needs
            weights in fp32, in one process or under DDP.
        max_length: the most tokens that a row may have.
        diagnostics_every: optimizer steps between readings of the conflict between objectives
            (`dualoptim.optim.diagnostics`), with one more at the last step; 0 for none. Values over all layers are
            logged; those by layer are kept in `self.diagnostics`, after a resume from the last reading before it on. A
            reading costs about as much as one optimizer step.
        release_gradients: update each parameter during the backward pass and free its gradient at once
            (`dualoptim.optim.releasing`), so that no two gradients are in memory together. Needs `max_grad_norm` 0,
            one micro-batch per step and one process, without fp16.
        fingerprints: name → hash of further inputs of the run, beside its rows and its schedule: training does not
            resume from a checkpoint with other fingerprints.
        **kwargs: anything else a Trainer takes; `optimizers=(optimizer, None)` or
            `optimizer_cls_and_kwargs=(DualOptimPlus, {})` choose the optimizer, the latter with the learning rate of
            `args` and the objectives' names, unless it is given others. An optimizer that does not know
            objectives, such as `torch.optim.AdamW`, keeps one state for all.

    Raises:
        ValueError: an argument that is not read; an adapter of a kind that is not supported (`dualoptim.adapters`); a
            loss without the reference model or the refusals it needs; turns or an optimizer with other objectives; an
            argument that the optimizer does not take; a metric that evaluations will not have; a joint turn with an
            optimizer that steps for one objective at a time; or a batch with an objective that its step does not serve.
    """

    optimizer: Any
    control: Any

    def __init__(
        self,
        model: nn.Module | str,
        args: TrainingArguments,
        *,
        objectives: Mapping[str, Objective],
        turns: Sequence[Turn],
        processing_class: Any = None,
        eval_dataset: Any = None,
        log_dir: str | Path | None = None,
        reference: nn.Module | str | None = None,
        combine: Rule | None = None,
        sam_rho: float | None = None,
        max_length: int = 512,
        diagnostics_every: int = 50,
        release_gradients: bool = False,
        fingerprints: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        trainer_arguments.check_kinds(model, args, reference, max_length)
        args = copy.copy(args)  # what is changed below holds for this run only
        if isinstance(model, nn.Module):
            model = bare(model)
            unprepare(model)
        reference = compiled_in_place(reference) if isinstance(reference, nn.Module) else reference
        turns = trainer_arguments.check_turns(turns)
        micro_batches = args.gradient_accumulation_steps * args.world_size
        micro_batch = max(-(-sum(turn.values()) // micro_batches) for turn in turns)
        trainer_arguments.check(args, kwargs, turns, micro_batch)
        reporting.check(args.report_to)
        if release_gradients:
            trainer_arguments.check_release(args, combine, sam_rho)
        trainer_arguments.check_names(objectives, turns, kwargs, args)
        for name, objective in objectives.items():
            if not isinstance(objective, Objective):
                raise UserError(f"objectives: {name!r} is a {type(objective).__name__}; give Objective(rows, loss)")
        trainer_arguments.check_combine(combine, turns, objectives)
        trainer_arguments.check_weights(turns, objectives)
        rows = {name: as_rows(objective.rows, f"objective {name!r}") for name, objective in objectives.items()}
        objectives = {name: replace(objective, rows=rows[name]) for name, objective in objectives.items()}
        for name, objective in objectives.items():
            loss = type(objective.loss).__name__
            if objective.loss.reference == "model" and reference is None and not partly_trained(model):
                raise ValueError(f"the loss {loss} of objective {name!r} needs reference=…, a frozen copy of the model")
            if objective.loss.needs_alternates:
                for row in rows[name]:
                    texts(row.fields, "alternates", row.where)
            elif objective.loss.needs_idk and not objective.refusals:
                raise ValueError(f"the loss {loss} of objective {name!r} needs refusals=…, replies that say no")
        if processing_class is None:
            if not isinstance(model, str):
                raise UserError("processing_class: give the model's tokenizer, or the model by its name")
            processing_class = load_tokenizer(model)
        self._save_processor = functools.partial(copy_processor, model) if isinstance(model, str) else None
        if hasattr(processing_class, "tokenizer"):
            self._save_processor = processing_class.save_pretrained
            processing_class = processing_class.tokenizer
        model = load_model(model) if isinstance(model, str) else model
        reference = load_model(reference, dtype=fitting.dtype_of(model)) if isinstance(reference, str) else reference
        check_model(model)
        check_causal(model)
        fitting.check_trained(model, reference)
        fitting.check_router(model)
        if args.gradient_checkpointing:
            fitting.check_checkpointing(model)
        for objective in objectives.values():
            objective.loss.check(model)
            if objective.loss.reference == "model" and reference is not None:
                fitting.check_vocabulary(model, reference)
        served = {name for turn in turns for name in turn}
        fitting.check_reached(model, {name: o.loss for name, o in objectives.items() if name in served})
        self.processing_class, self.objectives = processing_class, objectives
        self._fits: dict[str, Any] = {
            "max_length": max_length,
            "positions": positions(model) if hasattr(model, "config") else None,
            "vocabulary": fitting.vocabulary_of(model),
        }
        self.eval_dataset = sets = evaluation.sets_of(eval_dataset, processing_class, **self._fits)
        own = kwargs.get("compute_metrics") is not None or type(self).evaluate is not UnlearnTrainer.evaluate
        evaluation.choose_metric(args, sets, self.roles, kwargs.get("callbacks") or (), own=own)
        self._perturbed = {name for name, o in objectives.items() if sam_rho is not None and o.loss.role == "forget"}
        if sam_rho is not None:
            trainer_arguments.check_sam(sam_rho, self._perturbed, model)
        if reference is None:
            optimizer, _ = kwargs.get("optimizers") or (None, None)
            reference = at_start(model, {objective.loss.reference for objective in objectives.values()}, optimizer)
        args.max_steps, args.per_device_train_batch_size = len(turns), micro_batch
        if args.n_gpu > 1:  # one device per process: DataParallel would split a batch that a loss needs as a whole
            args._n_gpu = 1
        args.logging_nan_inf_filter = False  # it hides losses that are not finite
        if kwargs.get("optimizer_cls_and_kwargs"):
            kwargs["optimizer_cls_and_kwargs"] = trainer_arguments.with_settings(
                kwargs["optimizer_cls_and_kwargs"], args
            )
        names, args.report_to = args.report_to, []  # their callbacks are made here, with a folder of their own
        folder = Path(log_dir or Path(str(args.output_dir)) / "runs")
        trackers = reporting.callbacks(names, folder, writes=args.local_process_index == 0)
        kwargs["callbacks"] = [*trackers, *(kwargs.get("callbacks") or ())]
        self._by_hand = engines.sharded_by_hand(model)
        # A Trainer refuses an optimizer given with an FSDP model, but one that was made after sharding is correct.
        own_optimizer = kwargs.pop("optimizers", None) if self._by_hand else None
        config: Any = getattr(model, "config", None)
        caches = getattr(config, "use_cache", None)
        # compute_loss_func is set so that every version of Trainer leaves scaling over micro-batches to compute_loss.
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            eval_dataset=sets,
            compute_loss_func=self.compute_loss,
            **kwargs,
        )
        if caches is not None:
            # A Trainer sets it to False, and the config is saved so; the losses run without a cache in any case.
            config.use_cache = caches
        args.report_to = names
        if own_optimizer is not None:
            self.optimizer, self.lr_scheduler = own_optimizer
        if self.optimizer is not None and not self.is_deepspeed_enabled:
            fitting.check_optimizer(self.optimizer, model)
        if not self.is_deepspeed_enabled:  # which keeps weights in 32 bits beside these
            fitting.check_precision(model, self.optimizer or kwargs.get("optimizer_cls_and_kwargs"))
        engines.check(self, by_hand=self._by_hand, combines=combine is not None, perturbs=sam_rho is not None)
        self.turns, self.reference = turns, reference
        if reference is not None and not isinstance(reference, AtStart):
            reference.eval().requires_grad_(False)
            if not engines.sharded_by_hand(reference):
                reference.to(args.device)
        self.combine, self.sam_rho, self.release_gradients = combine, sam_rho, release_gradients
        self._samples: list[Any] = []  # the current step's micro-batches
        self._worst: sharpness.Worst | None = None  # the current step's, once it is known
        self.rows = ObjectiveRows(
            rows,
            {name: o.refusals for name, o in objectives.items() if o.loss.needs_idk and not o.loss.needs_alternates},
            processing_class,
            max_length,
            own=[name for name, objective in objectives.items() if objective.loss.needs_alternates],
            positions=self._fits["positions"],
        )
        for name, tokenized in self.rows.tokens.items():
            for row, tokens in zip(rows[name], tokenized, strict=True):
                fitting.check_ids(row.where, tokens, self._fits["vocabulary"], processing_class)
                fitting.check_counted(row.where, tokens, objectives[name].loss)
            fitting.check_sides(name, tokenized, rope_switch(model))
        self._answers: list[tuple[Tensor, Tensor]] = []  # of the current evaluation: log π(y|x) and |y|
        self.add_callback(ScoredAtStart())
        self._next_start: dict[str, Any] = {}  # the values that it will have if training begins now
        self._stepped = False  # whether the run has begun a step, or had before it was resumed
        self._cast = False  # whether an evaluation outside of training has cast the weights (*_full_eval)
        self._eval_on_start = args.eval_on_start
        self._resumed_from: Path | None = None  # the checkpoint that training went on from
        self.add_callback(Resume(self))
        self.given_fingerprints = {
            **self._settings(),
            **({checkpoints.FROZEN: hashed} if (hashed := fitting.frozen(model)) else {}),
            **self._compared_with(),
            **(fingerprints or {}),
        }
        self._beside: str | None = None  # where a checkpoint is being written
        self._stepping: str | None = None  # the current step's objective
        self.paused: set[str] = set()  # objectives whose part of every step is skipped; set by who watches the run
        self.diagnostics: list[dict[str, Any]] = []  # {"step": …, "layers": layer → measure → value}
        if diagnostics_every and self.is_deepspeed_enabled:
            logger.warning("diagnostics are not read under DeepSpeed, which flattens parameters; FSDP2 has them")
        elif diagnostics_every:
            self.add_callback(Diagnose(self, diagnostics_every))
        self.add_callback(Unlogged())
        self._scaler_aside = ScalerAside(self)
        self.add_callback(self._scaler_aside)
        self._gradients: dict[str, list[Tensor | None]] = {}  # each objective's in this step, for `combine`
        if isinstance(reference, AtStart) and any(o.loss.reference == "model" for o in objectives.values()):
            self.add_callback(StartKept(reference))
        self.add_callback(Multipliers({name: o.weight for name, o in objectives.items() if o.bound is not None}))
        compared = [name for name, objective in objectives.items() if objective.loss.reference == "sequences"]
        if compared:
            self.add_callback(Remembered(self, compared))
            own = reference is None or isinstance(reference, AtStart)
            if not (own and (self.is_fsdp_enabled or self.is_deepspeed_enabled)):
                self._remember_reference(compared)

    @property
    def eval_dataset(self) -> Any:
        """The evaluation rows: one set of tokenized rows, or several by name, or None."""
        return self._sets

    @eval_dataset.setter
    def eval_dataset(self, given: Any) -> None:
        self._sets = evaluation.sets_of(given, self.processing_class, **self._fits)
        self.roles = evaluation.roles_of(self._sets, self.objectives)

    def _set(self, name: str) -> Any:
        """One of the trainer's evaluation sets, by its name."""
        sets = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {}
        if name not in sets:
            raise unknown("set", name, map(str, sets), "eval_dataset")
        return sets[name]

    @torch.no_grad()
    def _remember_reference(self, compared: Sequence[str]) -> None:
        """Store log π_ref(y|x) of the rows and refusals of some objectives that will be drawn in the data set.

        The rows are split over the ranks. Each rank runs equally many batches, since a sharded model needs all ranks.
        """
        draws = [draw for batch in self._plan() for draw in batch if draw.objective in compared]
        tokens = self.rows.drawn(draws)
        order = sorted(tokens, key=lambda key: len(tokens[key].input_ids))
        size = max(1, max(sum(turn.values()) for turn in self.turns) // self.args.gradient_accumulation_steps)
        switch = rope_switch(self.model)
        sides = [[key for key in order if (len(tokens[key].input_ids) > switch) is long] for long in (False, True)]
        batches = [side[at : at + size] for side in sides for at in range(0, len(side), size)]
        own = batches[self.args.process_index :: self.args.world_size]
        own += batches[:1] * (-(-len(batches) // self.args.world_size) - len(own))
        # Nothing was trained yet: if the reference is the model's own start, the model itself can be run.
        own_start = self.reference is None or isinstance(self.reference, AtStart)
        frozen: Any = self.model_wrapped if own_start else self.reference
        found: dict[tuple, float] = {}
        with evaluating(frozen):
            for keys in tqdm(own, desc="Reference", leave=False, disable=None):
                batch = collate([tokens[key] for key in keys], pad_id(self.rows.tokenizer))
                with self.accelerator.autocast():
                    totals, _ = sequence_log_probs(frozen, {k: v.to(self.args.device) for k, v in batch.items()})
                found.update(zip(keys, totals.tolist(), strict=True))
        for part in engines.gathered(found):
            self.rows.reference_log_probs.update(part)

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the run's inputs: rows and their order, losses, optimizer, frozen weights, and those given."""
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        found = {
            **self.given_fingerprints,
            "set of rows": digest([self.rows.tokens, self.rows.refusals]),
            **({"set of alternates": digest(self.rows.alternates)} if self.rows.alternates else {}),
            "schedule": digest([self.turns, seed]),
        }
        if self.args.eval_strategy != "no":  # they decide on the best checkpoint and when to stop
            found["set of evaluation rows"] = self._evaluated()
        return found

    def _evaluated(self) -> str:
        """A hash of the evaluation rows."""
        sets = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"": self.eval_dataset}
        return digest({str(name): rows.tokens for name, rows in sets.items()})

    def _settings(self) -> dict[str, str]:
        """Hashes of settings that a resume takes from the checkpoint, or that would make it another run; precisions."""
        fields = (*trainer_arguments.OF_OPTIMIZERS, *trainer_arguments.OF_SCHEDULER)
        given = {name: getattr(self.args, name, None) for name in fields}
        own = fitting.settings_of(self.optimizer, self.optimizer_cls_and_kwargs)
        seed = getattr(self.multi_objective, "seed", None)  # of an optimizer that is given; it is in no group
        losses = {
            name: [type(o.loss).__name__, o.loss, o.weight, o.bound, o.multiplier_lr, o.multiplier_warmup]
            for name, o in self.objectives.items()
        }
        return {
            "set of losses": digest(losses),
            "set of loss arguments": digest(losses, contents=True),
            "optimizer": digest([own, given]),
            "set of optimizer arguments": digest([own, given, seed], contents=True),
            "combine": digest(self.combine, contents=True),
            "sam_rho": digest(self.sam_rho),
            "max_grad_norm": digest(self.args.max_grad_norm),
            checkpoints.MIXED: str(self.accelerator.mixed_precision),
            checkpoints.WEIGHTS: ", ".join(sorted({str(p.dtype) for p in self.model.parameters() if p.requires_grad})),
        }

    def _compared_with(self) -> dict[str, str]:
        """A hash of the reference model, where one is given, whole on this rank, and needed by a loss."""
        needed = any(objective.loss.needs_reference for objective in self.objectives.values())
        if not needed or self.reference is None or isinstance(self.reference, AtStart):
            return {}
        hashed = fitting.frozen(self.reference)
        return {checkpoints.REFERENCE: hashed} if hashed else {}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, but it resumes only from a complete checkpoint of the same run.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest complete one of the output folder.

        Raises:
            ValueError: the checkpoint is damaged or incomplete, or its run had other rows, another schedule or other
                `fingerprints`; or there is none.
        """
        if self._cast:
            raise UserError(
                "bf16_full_eval and fp16_full_eval cast the weights where evaluate() or predict() runs outside of "
                "training, and rounded weights would be trained on; make the trainer anew, or evaluate under bf16=True"
            )
        engines.check_one_folder(self)
        if resume_from_checkpoint:
            begun = engines.checkpoint_of(self, resume_from_checkpoint)
            for each in self._beside_states():
                each.load_from(begun)
            if self.args.should_save and begun.parent.samefile(str(self.args.output_dir)):
                # In case the run was killed before it removed the old ones.
                checkpoints.rotate(begun, self.args.save_total_limit, checkpoints.best_of(begun))
            resume_from_checkpoint = str(begun)
        if self.args.world_size > 1 and self.model_wrapped is self.model:
            # An earlier evaluation marked the model as prepared. accelerate would then not prepare it for training, and
            # each rank would train on its own.
            unprepare(self.model)
            self.model._is_accelerate_prepared = False
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self._stepped = self._resumed_from is not None
        self._start.values, self._next_start = {} if self._stepped else self._next_start, {}
        scores = self.args.eval_strategy != "no" and evaluation.have_score(self.roles)  # these need the start
        self.args.eval_on_start = self._resumed_from is None and (self._eval_on_start or scores)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _beside_states(self) -> list[Any]:
        """The trainer's callbacks that write files of their own into a checkpoint."""
        return [each for each in self.callback_handler.callbacks if isinstance(each, (Remembered, StartKept))]

    def _get_output_dir(self, trial: Any) -> str:
        return self._beside or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, but written into a temporary folder and moved into place once it is complete."""
        out = Path(super()._get_output_dir(trial))
        name = f"{checkpoints.PREFIX}{self.state.global_step}"
        beside, best = out / checkpoints.PARTIAL, self.state.best_model_checkpoint
        try:
            if self.args.should_save:
                shutil.rmtree(beside / name, ignore_errors=True)
                # To record the best checkpoint, a Trainer checks that it exists; with shards, before it creates it.
                (beside / name).mkdir(parents=True, exist_ok=True)
            engines.all_wrote()
            self._unlogged.over_ranks(self.accelerator)
            self._beside = str(beside)
            super()._save_checkpoint(model, trial)
            self._beside = None
            engines.all_wrote()
            if self.state.best_model_checkpoint == str(beside / name):  # the temporary place
                self.state.best_model_checkpoint = str(out / name)
            if self.args.should_save:
                self.state.save_to_json(str(beside / name / "trainer_state.json"))
                for each in self._beside_states():
                    each.save_to(beside / name)
                checkpoints.seal(beside / name, self.fingerprints)
                checkpoints.put(beside / name, out / name)
                checkpoints.rotate(out / name, self.args.save_total_limit, self.state.best_model_checkpoint)
            if self.args.push_to_hub:
                super()._push_from_checkpoint(str(out / name))
            engines.all_wrote()
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk raises any of these
            in_parts = self.args.world_size > 1 and (self.is_fsdp_enabled or self.is_deepspeed_enabled)
            if self._beside is not None and in_parts:  # other ranks may be waiting for this rank's part
                raise
            self.state.best_model_checkpoint = best
            reason = " ".join(str(error).split())
            if not isinstance(error, engines.NotWrittenError):
                engines.gathered(reason)
            if self.args.should_save:
                shutil.rmtree(beside, ignore_errors=True)
            logger.warning("checkpoint %s could not be written (%s); training goes on without it", out / name, reason)
        finally:
            self._beside = None

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's; also for FSDP2 on CPUs, and for a model that is sharded already."""
        super().create_accelerator_and_postprocess()
        engines.adopt(self, by_hand=self._by_hand)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; a sharded model is saved unsharded, except in sharded checkpoints. Every rank calls it."""
        make_savable(self.model)
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif not (_internal_call and self._saves_shards):
            self._save(output_dir, state_dict=sharded.full_model(self.model))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As the Trainer's, but files that lack a trained parameter are an error, and not a loss in silence."""
        super()._save(output_dir, state_dict)
        if self._save_processor is not None and self.args.should_save:
            self._save_processor(output_dir or str(self.args.output_dir))
        if state_dict is None and self.args.should_save:  # it is given where several ranks hold the model's parts
            check_saved(self.model, Path(output_dir or str(self.args.output_dir)))

    @property
    def _saves_shards(self) -> bool:
        return "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled or self._saves_shards:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = sharded.full_optimizer(self.model, self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if sharded.is_sharded(folder) == self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            sharded.load_model(self.model, folder, first=self.is_world_process_zero())

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if self.is_deepspeed_enabled or sharded.is_sharded(best) == self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            sharded.load_model(self.model, best, first=self.is_world_process_zero())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or sharded.is_sharded(Path(checkpoint)) == self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        first = self.is_world_process_zero()
        sharded.load_optimizer(self.model, self.optimizer, Path(checkpoint), first=first)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: `_save_checkpoint` pushes a checkpoint once it is in its place."""

    @property
    def multipliers(self) -> dict[str, float]:
        """The current weight of every objective that is held below a bound."""
        return next(held.values for held in self.callback_handler.callbacks if isinstance(held, Multipliers))

    @property
    def _start(self) -> ScoredAtStart:
        return next(held for held in self.callback_handler.callbacks if isinstance(held, ScoredAtStart))

    @property
    def _unlogged(self) -> Unlogged:
        return next(held for held in self.callback_handler.callbacks if isinstance(held, Unlogged))

    @property
    def multi_objective(self) -> DualOptimPlus | None:
        """The optimizer, if it knows objectives."""
        return multi_objective(self.optimizer)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the Trainer's; a multi-objective optimizer gets its `parameter_groups`, embeddings in 32 bits.

        It also gets the objectives' names, unless its arguments have them.
        """
        cls, arguments = self.optimizer_cls_and_kwargs or (None, {})
        if self.optimizer is None and isinstance(cls, type) and issubclass(cls, DualOptimPlus):
            arguments = {"objectives": tuple(self.objectives), **arguments}
            groups = parameter_groups(self.model, self.args.weight_decay)
            if self.is_deepspeed_enabled:  # it flattens each group; mark the matrices, which then look like vectors
                for group in groups:
                    group["flat"] = group["name"] == "matrices"
            self.optimizer = cls(groups, **arguments)
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.is_deepspeed_enabled:
            engines.check_bits(optimizer)
            optimizer.register_step_pre_hook(self._choose_again)
        self._parameters = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def _choose_again(self, optimizer: Any, *_: Any) -> None:
        """Set the objective again: DeepSpeed steps one parameter group after the other, and each step resets it."""
        if isinstance(optimizer, DualOptimPlus):
            optimizer.objective = self._stepping

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, which calls it once accelerate has prepared the optimizer."""
        if self._by_hand:
            # accelerate maps parameters by their addresses, and all that are empty on this rank share one.
            for group, params in zip(self.optimizer.param_groups, self._parameters, strict=True):
                group["params"] = params
        return super().create_scheduler(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """The batches of the whole run, in order: to the Trainer, this is one epoch."""
        return self._loader(self.rows, batch_sampler=self._plan())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the Trainer's, for rows in any form that `eval_dataset` may have, or for a set's name."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset if eval_dataset is None else self._set(eval_dataset)
        rows = evaluation.sets_of(eval_dataset, self.processing_class, **self._fits)
        # A generator of its own, or an evaluation would change what training draws.
        return self._loader(rows, batch_size=self.args.eval_batch_size, generator=torch.Generator())

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As `get_eval_dataloader`, for one set."""
        return self.get_eval_dataloader(
            evaluation.Rows(test_dataset, self.processing_class, **self._fits, name="test_dataset")
            if not isinstance(test_dataset, evaluation.Rows)
            else test_dataset
        )

    def _loader(self, rows: Any, **batches: Any) -> DataLoader:
        workers = {
            name: value
            for name in ("prefetch_factor", "multiprocessing_context", "in_order")
            if (value := getattr(self.args, f"dataloader_{name}", None)) is not None
        }
        loader = DataLoader(
            rows,
            collate_fn=rows.collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            **workers,
            **batches,
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
        """A step's micro-batches, and the number of items of each objective in them, over all ranks."""
        if self.control.should_training_stop:  # resumed from where early stopping had ended it
            return [], {}
        step, names = self.state.global_step, list(self.objectives)
        samples, serving, failure = [], [], None
        try:
            samples = list(itertools.islice(epoch_iterator, num_batches))
            for sample in samples:
                self._check_turn(sample)
            serving = engines.served(samples, self._skipped)
        except Exception as error:
            if self.args.world_size == 1:
                raise
            failure = error  # the other ranks are told, or they would wait for this one
        sizes = [
            float(sum(self._size(name, sample[name]) for sample in samples if name in sample))
            if failure is None
            else 0.0
            for name in names
        ]
        own = 0 if failure is not None else engines.mark(serving, step)
        table = self.accelerator.gather(engines.on_device([*sizes, own], device))
        engines.agree_on_step(table[:, -1], engines.description(serving), failure, step)
        # Also gradients that an abandoned step left behind.
        self._samples, self._worst, self._gradients = samples, None, {}
        return samples, dict(zip(names, table[:, :-1].sum(0).tolist(), strict=True))

    @property
    def _skipped(self) -> set[str]:
        """The objectives that are paused, or all where the step's others have the weight 0.

        By a gradient of zeros the optimizer would go on along the momentum that other steps left; without one it stays.
        """
        turn = set().union(*self.turns[self.state.global_step :][:1])
        left = turn - self.paused
        weighs = any(name in self.multipliers or self.objectives[name].weight for name in left)
        return self.paused if weighs else self.paused | turn

    def _size(self, name: str, batch: Mapping[str, Any]) -> int:
        """The number of items that a batch adds to an objective's loss."""
        return 0 if "idle" in batch else self.objectives[name].loss.size(batch)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Σ_o weight_o · loss_o of a micro-batch, scaled to its share of the optimizer step.

        Args:
            inputs: objective → batch, as `ObjectiveRows.collate` makes it.
            return_outputs: whether to return (loss, {}): there are no outputs, as each loss runs the model itself.
            num_items_in_batch: objective → items in the whole step, as `get_batch_samples` counts them; default those
                of the micro-batch.
        """
        if num_items_in_batch is None:
            num_items_in_batch = {name: self._size(name, batch) for name, batch in inputs.items()}
        self._hand_over(inputs)
        total = torch.zeros((), dtype=torch.float32, device=self.args.device)
        for name, batch in inputs.items():
            objective = self.objectives[name]
            if not num_items_in_batch[name]:
                raise ValueError(
                    f"{type(objective.loss).__name__} has nothing to average over in a batch of {name!r}: "
                    "its answers are too short for the loss's arguments"
                )
            share = self._size(name, batch) / num_items_in_batch[name]
            with self.accelerator.autocast():  # for the reference, which accelerate has not prepared
                loss = objective.loss(model, batch, self.reference)
            # Gradients are averaged over ranks, but the share is of the items of all ranks together.
            loss = loss * share * self.args.world_size
            losses, step = self._unlogged.losses[name], self.state.global_step
            losses[step] = losses.get(step, 0) + loss.detach().float()
            total = total + self.multipliers.get(name, objective.weight) * loss
        return (total, {}) if return_outputs else total

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's; the last micro-batch also does what is due once per optimizer step."""
        self._stepped = True
        if skipped := self._skipped:
            self._hand_over(inputs)
            inputs = {name: batch for name, batch in inputs.items() if name not in skipped}
        if not inputs:  # without gradients, the optimizer's step changes nothing
            loss = torch.zeros((), dtype=torch.float32, device=self.args.device)
        elif self.release_gradients:
            loss = self._released(model, inputs, num_items_in_batch)
        elif self.combine is None and self.sam_rho is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self._one_by_one(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if self.combine is not None and self._gradients:
                self._combine(self.combine, model)
            if not any(engines.served(self._samples, skipped)):
                self._scaler_aside.begin()
            self._raise_multipliers()
            self._samples, self._worst = [], None  # frees memory that the optimizer may need
        self._stepping = None
        self._unlogged.total = self._unlogged.total + loss.float()
        return loss

    def _released(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """A micro-batch whose backward pass does the step; the Trainer's own step afterwards finds no gradients."""
        self._hand_over(inputs)
        own = getattr(self.optimizer, "optimizer", self.optimizer)
        several = self.multi_objective
        with releasing(own, objective=several.objective if several is not None else None):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._hand_over(inputs)
        return loss

    def _one_by_one(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """A backward pass for each objective of a micro-batch; gradients that will be combined are kept apart."""
        total = torch.zeros((), dtype=torch.float32, device=self.args.device)
        parameters = self._held(model)
        if self.is_fsdp_enabled:  # or FSDP would accumulate the gradients of all objectives in one sum
            self.model.set_requires_gradient_sync(True)
        if self.sam_rho is not None and self._worst is None:
            self._worst = self._find_worst(model, parameters, num_items_in_batch)
        for name, batch in inputs.items():
            if self.combine is not None:
                # Put its gradient so far back in place: autograd and the averaging over ranks add to it there.
                for p, gradient in zip(parameters, self._gradients.get(name, [None] * len(parameters)), strict=True):
                    p.grad = gradient
            with sharpness.standing_at(self._worst or []) if name in self._perturbed else nullcontext():
                total = total + super().training_step(model, {name: batch}, num_items_in_batch)
            if self.combine is not None:
                self._gradients[name] = [p.grad for p in parameters]
        return total

    def _held(self, model: nn.Module) -> list[nn.Parameter]:
        """The trained parameters that the optimizer holds: what stays has no say in where the others go."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return [p for p in model.parameters() if p.requires_grad and id(p) in held]

    def _combine(self, rule: Rule, model: nn.Module) -> None:
        """Make one gradient of the objectives' gradients of this step."""
        parameters = self._held(model)
        names = [name for name in self.objectives if name in self._gradients]
        own = [self._gradients[name] for name in names]
        # A parameter that no loss reaches keeps no gradient: a zero would let the optimizer decay it.
        reached = [any(g is not None for g in found) for found in zip(*own, strict=True)]
        gradients = [
            [
                torch.zeros_like(p) if g is None else g
                for p, g, some in zip(parameters, each, reached, strict=True)
                if some
            ]
            for each in own
        ]
        roles = [self.objectives[name].loss.role for name in names]
        for p, mended in zip(itertools.compress(parameters, reached), combined(rule, gradients, roles), strict=True):
            p.grad = mended
        self._gradients = {}

    def _find_worst(self, model: nn.Module, parameters: Sequence[Any], num_items_in_batch: Any) -> sharpness.Worst:
        """The nearby weights with the highest losses to forget, by these losses' gradient over all micro-batches."""
        assert self.sam_rho is not None
        assert all(p.grad is None for p in parameters)
        names, step = self._perturbed - self._skipped, self.state.global_step
        for sample in self._samples:
            if part := {name: batch for name, batch in sample.items() if name in names}:
                super().training_step(model, part, num_items_in_batch)
        for name in names & self._unlogged.losses.keys():  # this pass is not logged
            self._unlogged.losses[name].pop(step, None)
        if self.args.world_size > 1:  # DDP may not have averaged them: it does so at a step's last micro-batch only
            for p in parameters:
                if p.grad is not None:
                    p.grad = self.accelerator.reduce(p.grad, reduction="mean")
        worst = sharpness.worst_nearby(parameters, self.sam_rho)
        model.zero_grad()  # those that the optimizer does not hold
        return worst

    def _raise_multipliers(self) -> None:
        """λ ← max(0, λ + η (loss − bound)) for the step's objectives with a bound and a finite loss."""
        for name in self.multipliers:
            objective, losses = self.objectives[name], self._unlogged.losses.get(name, {})
            assert objective.bound is not None
            if self.state.global_step < objective.multiplier_warmup:
                continue
            if (loss := losses.get(self.state.global_step)) is not None:
                excess = float(self.accelerator.reduce(loss, reduction="mean")) - objective.bound
                if math.isfinite(excess):  # max(0.0, nan) is 0.0
                    self.multipliers[name] = max(0.0, self.multipliers[name] + objective.multiplier_lr * excess)

    def _check_turn(self, inputs: Mapping[str, Any]) -> Turn:
        """The objectives of this step; a batch of any other is refused."""
        turn = self.turns[self.state.global_step]
        if not set(inputs) <= set(turn):
            raise ValueError(
                f"step {self.state.global_step} serves {', '.join(turn)}, but its batch carries {', '.join(inputs)}"
            )
        return turn

    def _hand_over(self, inputs: Mapping[str, Any]) -> None:
        """Tell the optimizer this step's objective; a batch of any other is refused."""
        turn = self._check_turn(inputs)
        if (optimizer := self.multi_objective) is not None:
            if len(optimizer.objectives) == 1:  # one state for all objectives, as AdamW has
                optimizer.objective = self._stepping = optimizer.objectives[0]
                return
            if len(turn) > 1:
                raise ValueError(
                    f"step {self.state.global_step} serves {', '.join(turn)} jointly, but "
                    f"{type(optimizer).__name__} steps for one objective at a time; "
                    "alternate, by dualoptim.schedule.by_turns, or use an optimizer with one state"
                )
            optimizer.objective = self._stepping = next(iter(turn))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As the Trainer's, but several sets make one evaluation: one log entry, one call of every callback.

        Each set NAME has ``eval_NAME_loss`` and ``eval_NAME_probability``; a single set without a name has
        ``eval_loss`` and ``eval_probability``. The metrics of `compute_metrics` come on top. The trainer's own sets
        also have ``eval_forgotten``, ``eval_kept`` and ``eval_score``, if there are sets to forget and to keep and the
        model was evaluated before the first step of this training and after any other, as any `eval_strategy` does.
        `dualoptim.training.evaluation` has formulas.
        """
        own = eval_dataset is None or eval_dataset is self.eval_dataset
        given = self.eval_dataset if own else eval_dataset
        if given is None:
            raise UserError("evaluate: there are no rows; give eval_dataset, here or to the trainer")
        if isinstance(given, str):
            given = self._set(given)
        sets = evaluation.sets_of(given, self.processing_class, **self._fits)
        self._memory_tracker.start()
        began, num_samples, num_steps = time.time(), 0, 0
        metrics: dict[str, float] = {}
        for name, rows in sets.items() if isinstance(sets, Mapping) else [(None, sets)]:
            loader = self.get_eval_dataloader(rows)
            prefix = metric_key_prefix if name is None else f"{metric_key_prefix}_{name}"
            output = self.evaluation_loop(
                loader,
                "Evaluation",
                prediction_loss_only=True if self.compute_metrics is None else None,
                ignore_keys=ignore_keys,
                metric_key_prefix=prefix,
            )
            output.metrics.pop(f"{prefix}_model_preparation_time", None)  # it has nothing to do with the set
            metrics |= output.metrics
            num_samples, num_steps = num_samples + output.num_samples, num_steps + len(loader)
        if own and evaluation.have_score(self.roles):
            now = {name: metrics[f"{metric_key_prefix}_{name}_probability"] for name in self.roles}
            found = {"of": self._evaluated(), "probabilities": now}
            if not self._stepped:
                self._start.values = found
            if not self.is_in_train:
                self._next_start = found
            if self._start.values.get("of") == found["of"]:
                scored = evaluation.scored(now, self._start.values["probabilities"], self.roles)
                metrics |= {f"{metric_key_prefix}_{key}": value for key, value in scored.items()}
        metrics |= speed_metrics(metric_key_prefix, began, num_samples=num_samples, num_steps=num_steps)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As the Trainer's, with the loss averaged over all tokens, however batched, and the answers' probability."""
        self._answers = []
        self._cast |= not self.is_in_train and (self.args.bf16_full_eval or self.args.fp16_full_eval)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        log_probs, counts = (torch.cat(parts) for parts in zip(*self._answers, strict=True))
        for key, value in evaluation.measured(log_probs, counts).items():
            if (name := f"{metric_key_prefix}_{key}") in output.metrics and key != "loss":
                raise UserError(f"compute_metrics gives {key!r}, which every evaluation has; give it another name")
            output.metrics[name] = value
        self._answers = []
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Any, Any]:
        """As the Trainer's; the answers' log-likelihoods of all ranks are kept for `evaluation_loop`."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            log_probs, counts, outputs = evaluation.answered(model, inputs, outputs=not prediction_loss_only)
        self._answers.append(self.accelerator.gather_for_metrics((log_probs, counts)))
        loss = -log_probs.sum() / counts.sum()
        if outputs is None:
            return loss, None, None
        if ignore_keys is None:
            ignore_keys = getattr(getattr(self.model, "config", None), "keys_to_ignore_at_inference", [])
        logits = tuple(value for key, value in outputs.items() if key not in ignore_keys)
        return loss, logits[0] if len(logits) == 1 else logits, inputs["labels"]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with the optimizer that trained in place of the one that `args.optim` names."""
        super().create_model_card(*args, **kwargs)
        card = Path(str(self.args.output_dir)) / "README.md"
        if self.is_world_process_zero() and (self.optimizer_cls_and_kwargs or self.multi_objective):
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer) or self.optimizer_cls_and_kwargs[0]
            name = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
            text = card.read_text(encoding="utf-8")
            card.write_text(re.sub(r"^- optimizer: .*$", f"- optimizer: {name}", text, flags=re.M), encoding="utf-8")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log each objective's own loss, averaged over its steps since the last log, beside the Trainer's."""
        if "loss" in logs:
            if self.release_gradients:  # when the Trainer computes their norm, the gradients are already freed
                logs.pop("grad_norm", None)
            since = self._unlogged
            # The Trainer's mean restarts on resume. Each rank's loss is scaled so that the ranks' mean is the step's.
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

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """As the Trainer's, over every objective's rows; their refusals are not counted."""
        for batch in inputs.values():
            super()._track_num_input_tokens(batch)
