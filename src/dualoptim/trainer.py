"""`UnlearnTrainer`: a `transformers.Trainer` for alternating or joint training on several objectives.

What a Trainer does stays: evaluation, prediction, early stopping and the best model, callbacks, logging, `report_to`,
mixed precision, gradient checkpointing, checkpoints and resume. What it is told and does not read is refused
(`dualoptim.trainer_arguments`). What is added: batches carry their objective, each objective has its own loss, a
multi-objective optimizer is told each step's objective, what the reference says is computed once where that suffices,
evaluations have a forget/keep score (`dualoptim.trainer_evaluation`), and checkpoints are whole or not there
(`dualoptim.checkpoints`). On several ranks, under DDP, FSDP2 or DeepSpeed, a run ends as in one process
(`dualoptim.engines`, `dualoptim.sharded`).
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import logging
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

from . import checkpoints, engines, reporting, sharded, sharpness, trainer_arguments
from . import trainer_evaluation as evaluation
from .adapters import check_model
from .combine import Rule, combined
from .data import ObjectiveRows, Plan, Row, as_rows, collate, pad_id, texts
from .errors import UserError, unknown
from .losses import Loss, sequence_log_probs
from .models import load_model, load_tokenizer
from .optim import DualOptimPlus, parameter_groups, releasing
from .reference import AtStart, at_start, partly_trained
from .schedule import Turn
from .trainer_callbacks import Diagnose, Multipliers, Remembered, Resume, Unlogged

logger = logging.getLogger(__name__)


@dataclass
class Objective:
    """One thing to train on.

    Args:
        rows: what it is trained on: `Row`s, or mappings in any form that a file of rows may have.
        loss: an instance of one of `dualoptim.losses.LOSSES`, or of a `Loss` of your own.
        weight: coefficient of its loss.
        refusals: replies that may stand in for a row's answer; needed where the loss needs them. Of AltPO, rows bring
            their own under ``alternates`` (`dualoptim.alternates` has a model make them up).
        bound: hold the loss below this by a multiplier in place of a fixed weight (PDU, arXiv 2506.05314): it begins
            at `weight` and after every step that serves the objective goes to max(0, λ + η (loss − bound)).
        multiplier_lr: η.
        multiplier_warmup: optimizer steps at the run's beginning, of all objectives, after which it begins to do so.
    """

    rows: Iterable[Row | Mapping[str, Any]]
    loss: Loss
    weight: float = 1.0
    refusals: Sequence[str] = field(default_factory=tuple)
    bound: float | None = None
    multiplier_lr: float = 1.0
    multiplier_warmup: int = 0

    def __post_init__(self) -> None:
        """Refuse a loss's name or class in place of the loss."""
        if not isinstance(self.loss, Loss):
            raise UserError(f"loss: give an instance, such as LOSSES['NPO'](), and not {self.loss!r}")


class UnlearnTrainer(Trainer):
    """Train a causal model to forget some rows and keep others.

    The loss of an optimizer step is Σ_o weight_o · loss_o over the objectives that it serves, each loss averaged over
    all of the step's rows or tokens whatever the number of micro-batches and ranks.

    Args:
        model: a causal language model; or its folder or hub id, which is loaded with weights in 32 bits.
        args: `TrainingArguments`; it is copied. What this trainer does not read is refused: `turns` says how many steps
            of how many sequences there are, and `gradient_accumulation_steps` splits them. A loss that is not finite is
            logged as it is, whatever `logging_nan_inf_filter` says.
        objectives: name → `Objective`.
        turns: what each optimizer step serves, from `dualoptim.schedule`.
        processing_class: the model's tokenizer; loaded with a model that is given by its name.
        eval_dataset: what is evaluated on, as `dualoptim.trainer_evaluation` has it: rows, or several sets of them by
            name. With sets of the names of objectives, of which one forgets and one keeps, evaluations have a
            forget/keep score, which is the default of `metric_for_best_model`.
        log_dir: the folder that what `args.report_to` names writes files into; "runs" in `args.output_dir` without it.
        reference: the frozen model that losses compare with, or its name. Without it, that is the model as it is handed
            over, its adapters included. Where a loss needs no more than log π_ref(y|x), that is computed once, for
            every row that will be drawn. Where one needs all logits, a copy of what is trained is kept, if that is not
            the whole model, as under PEFT; a model that is trained as a whole needs a reference beside it. A model that
            is to be sharded is asked when training begins, and what it said is kept in checkpoints; a reference may be
            sharded by `fully_shard`.
        combine: what makes one gradient of several objectives' in a joint step, one of `dualoptim.combine.RULES`;
            None for their weighted sum.
        sam_rho: how far from the weights, along the gradient of the losses to forget, theirs is taken
            (`dualoptim.sharpness`); None for at the weights. A step that forgets runs these losses twice, the losses
            that are logged are those stepped on, and there is one more copy of what is trained. Needs weights in 32
            bits, in one process or under DDP.
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
        ValueError: an argument that is not read; an adapter of a kind that is not supported (`dualoptim.adapters`); a
            loss without the reference model or the refusals it needs; turns or an optimizer of other objectives; a
            metric that evaluations will not have; a turn of several objectives with an optimizer that steps for one; or
            a batch of another objective than the step's.
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
        args = copy.copy(args)  # what is settled below is of this run
        turns = list(turns)
        micro_batches = args.gradient_accumulation_steps * args.world_size
        micro_batch = max((-(-sum(turn.values()) // micro_batches) for turn in turns), default=1)
        trainer_arguments.check(args, kwargs, turns, micro_batch)
        reporting.check(args.report_to)
        if release_gradients:
            trainer_arguments.check_release(args, combine, sam_rho)
        trainer_arguments.check_names(objectives, turns, kwargs)
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
        self.processing_class, self.objectives, self.max_length = processing_class, objectives, max_length
        self.eval_dataset = sets = evaluation.sets_of(eval_dataset, processing_class, max_length)
        own = kwargs.get("compute_metrics") is not None or type(self).evaluate is not UnlearnTrainer.evaluate
        evaluation.choose_metric(args, sets, self.roles, kwargs.get("callbacks") or (), own=own)
        model = load_model(model) if isinstance(model, str) else model
        reference = load_model(reference) if isinstance(reference, str) else reference
        check_model(model)
        self._perturbed = {name for name, o in objectives.items() if sam_rho is not None and o.loss.role == "forget"}
        if sam_rho is not None:
            trainer_arguments.check_sam(sam_rho, self._perturbed, model)
        if reference is None:
            reference = at_start(model, {objective.loss.reference for objective in objectives.values()})
        args.max_steps, args.per_device_train_batch_size = len(turns), micro_batch
        if args.n_gpu > 1:  # a process has one device: DataParallel would split the rows of a loss that is no row's
            args._n_gpu = 1
        args.logging_nan_inf_filter = False  # which logs 0 for what is not a number
        if kwargs.get("optimizer_cls_and_kwargs"):
            kwargs["optimizer_cls_and_kwargs"] = trainer_arguments.with_settings(
                kwargs["optimizer_cls_and_kwargs"], args
            )
        names, args.report_to = args.report_to, []  # their callbacks are made here, with a folder of their own
        folder = Path(log_dir or Path(str(args.output_dir)) / "runs")
        trackers = reporting.callbacks(names, folder, writes=args.local_process_index == 0)
        kwargs["callbacks"] = [*trackers, *(kwargs.get("callbacks") or ())]
        # Not None, so that every version of Trainer leaves the loss's scale over micro-batches to compute_loss.
        self._by_hand = engines.sharded_by_hand(model)
        # A Trainer takes no optimizer of an FSDP model, but one that was made after its sharding is right.
        own_optimizer = kwargs.pop("optimizers", None) if self._by_hand else None
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            eval_dataset=sets,
            compute_loss_func=self.compute_loss,
            **kwargs,
        )
        args.report_to = names
        if own_optimizer is not None:
            self.optimizer, self.lr_scheduler = own_optimizer
        engines.check(self, by_hand=self._by_hand, combines=combine is not None, perturbs=sam_rho is not None)
        self.turns, self.reference = turns, reference
        if reference is not None and not isinstance(reference, AtStart):
            reference.eval().requires_grad_(False)
            if not engines.sharded_by_hand(reference):
                reference.to(args.device)
        self.combine, self.sam_rho, self.release_gradients = combine, sam_rho, release_gradients
        self._samples: list[Any] = []  # the micro-batches of the step that is under way
        self._worst: sharpness.Worst | None = None  # in this step, once it is known
        self.rows = ObjectiveRows(
            rows,
            {name: o.refusals for name, o in objectives.items() if o.loss.needs_idk and not o.loss.needs_alternates},
            processing_class,
            max_length,
            own=[name for name, objective in objectives.items() if objective.loss.needs_alternates],
        )
        self._answers: list[tuple[Tensor, Tensor]] = []  # of the evaluation that is under way: log π(y|x) and |y|
        self._start: tuple[Any, dict[str, float]] | None = None  # sets, and the probabilities of their answers
        self._cast = False  # whether an evaluation outside of training has cast the weights, as full_eval does
        self._eval_on_start = args.eval_on_start
        self._resumed_from: Path | None = None  # the checkpoint that training went on from
        self.add_callback(Resume(self))
        self.given_fingerprints = dict(fingerprints or {})
        self._beside: str | None = None  # where a checkpoint is being written
        self._stepping: str | None = None  # the objective of a step that is under way
        self.paused: set[str] = set()  # objectives whose part of every step is skipped; whoever watches the run decides
        self.diagnostics: list[dict[str, Any]] = []  # {"step": …, "layers": layer → measure → value}
        if diagnostics_every and self.is_deepspeed_enabled:
            logger.warning("diagnostics are not read under DeepSpeed, which flattens parameters; FSDP2 has them")
        elif diagnostics_every:
            self.add_callback(Diagnose(self, diagnostics_every))
        self.add_callback(Unlogged())
        self._gradients: dict[str, list[Tensor | None]] = {}  # of each objective in this step, where they are combined
        self.add_callback(Multipliers({name: o.weight for name, o in objectives.items() if o.bound is not None}))
        compared = [name for name, objective in objectives.items() if objective.loss.reference == "sequences"]
        if compared:
            self.add_callback(Remembered(self, compared))
            own = reference is None or isinstance(reference, AtStart)
            if not (own and (self.is_fsdp_enabled or self.is_deepspeed_enabled)):
                self._remember_reference(compared)

    @property
    def eval_dataset(self) -> Any:
        """What is evaluated on: one set of tokenized rows, or several by name, or None."""
        return self._sets

    @eval_dataset.setter
    def eval_dataset(self, given: Any) -> None:
        self._sets = evaluation.sets_of(given, self.processing_class, self.max_length)
        self.roles = evaluation.roles_of(self._sets, self.objectives)

    def _set(self, name: str) -> Any:
        """One of the trainer's sets to evaluate on, by its name."""
        sets = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {}
        if name not in sets:
            raise unknown("set", name, map(str, sets), "eval_dataset")
        return sets[name]

    @torch.no_grad()
    def _remember_reference(self, compared: Sequence[str]) -> None:
        """log π_ref(y|x) of the rows and refusals of some objectives that will be drawn, into the data set.

        The ranks share the rows out; each takes as many batches as the others, since a sharded model needs all of them.
        """
        draws = [draw for batch in self._plan() for draw in batch if draw.objective in compared]
        tokens = self.rows.drawn(draws)
        order = sorted(tokens, key=lambda key: len(tokens[key].input_ids))
        size = max(1, max(sum(turn.values()) for turn in self.turns) // self.args.gradient_accumulation_steps)
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        own = batches[self.args.process_index :: self.args.world_size]
        own += batches[:1] * (-(-len(batches) // self.args.world_size) - len(own))
        # Nothing was trained yet, so that of the model's own start no copy needs to be asked.
        own_start = self.reference is None or isinstance(self.reference, AtStart)
        frozen: Any = self.model_wrapped if own_start else self.reference
        training = frozen.training
        frozen.eval()
        found: dict[tuple, float] = {}
        for keys in tqdm(own, desc="Reference", leave=False, disable=None):
            batch = collate([tokens[key] for key in keys], pad_id(self.rows.tokenizer))
            with self.accelerator.autocast():
                totals, _ = sequence_log_probs(frozen, {k: v.to(self.args.device) for k, v in batch.items()})
            found.update(zip(keys, totals.tolist(), strict=True))
        frozen.train(training)
        for part in engines.gathered(found):
            self.rows.reference_log_probs.update(part)

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of what the run is made of: the rows, their order, and what was given."""

        def digest(*values: Any) -> str:
            return hashlib.sha256(json.dumps(values).encode()).hexdigest()

        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        found = {
            **self.given_fingerprints,
            "set of rows": digest(self.rows.tokens, self.rows.refusals),
            **({"set of alternates": digest(self.rows.alternates)} if self.rows.alternates else {}),
            "schedule": digest([dict(turn) for turn in self.turns], seed),
        }
        if self.args.eval_strategy != "no":  # what is best, and when a run stops, is told by them
            sets = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"": self.eval_dataset}
            found["set of evaluation rows"] = digest({str(name): rows.tokens for name, rows in sets.items()})
        return found

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, but that it goes on from a whole checkpoint of the same run, or not at all.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest whole one of the output folder.

        Raises:
            ValueError: it is not whole, or of a run with other rows, another schedule, other `fingerprints`; or there
                is none.
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
                # Where a kill came between it and its rotation.
                checkpoints.rotate(begun, self.args.save_total_limit, checkpoints.best_of(begun))
            resume_from_checkpoint = str(begun)
        if self.args.world_size > 1 and self.model_wrapped is self.model:
            # Evaluated before: accelerate would take the model for one that is prepared for training as well, and each
            # rank would train on its own.
            self.model._is_accelerate_prepared = False
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        scores = self.args.eval_strategy != "no" and evaluation.have_score(self.roles)  # relative to the start
        self.args.eval_on_start = self._resumed_from is None and (self._eval_on_start or scores)
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
        beside, best = out / checkpoints.PARTIAL, self.state.best_model_checkpoint
        try:
            if self.args.should_save:
                shutil.rmtree(beside / name, ignore_errors=True)
                # A Trainer asks whether it is there to know the best one, of shards before it makes it.
                (beside / name).mkdir(parents=True, exist_ok=True)
            engines.all_wrote()
            self._unlogged.over_ranks(self.accelerator)
            self._beside = str(beside)
            super()._save_checkpoint(model, trial)
            self._beside = None
            engines.all_wrote()
            if self.state.best_model_checkpoint == str(beside / name):  # not where it will be
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
        except (OSError, RuntimeError, SafetensorError) as error:  # of which a full disk is all
            in_parts = self.args.world_size > 1 and (self.is_fsdp_enabled or self.is_deepspeed_enabled)
            if self._beside is not None and in_parts:  # the others may wait for this rank's part
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
        """As the Trainer's; FSDP2 on CPUs too, and of a model that is sharded already."""
        super().create_accelerator_and_postprocess()
        engines.adopt(self, by_hand=self._by_hand)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; a sharded model is saved whole, but in sharded checkpoints. Every rank calls it."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif not (_internal_call and self._saves_shards):
            self._save(output_dir, state_dict=sharded.full_model(self.model))

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
        """Nothing while a checkpoint is being written: it is pushed from its place."""

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
        optimizer = self.optimizer
        while optimizer is not None and not isinstance(optimizer, DualOptimPlus):
            optimizer = getattr(optimizer, "optimizer", None)  # accelerate and DeepSpeed wrap it
        return optimizer

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the Trainer's; a multi-objective optimizer gets its `parameter_groups`, embeddings in 32 bits.

        And where they are not among its arguments, the objectives' names.
        """
        cls, arguments = self.optimizer_cls_and_kwargs or (None, {})
        if self.optimizer is None and isinstance(cls, type) and issubclass(cls, DualOptimPlus):
            arguments = {"objectives": tuple(self.objectives), **arguments}
            groups = parameter_groups(self.model, self.args.weight_decay)
            if self.is_deepspeed_enabled:  # flattens each group, whose matrices are then no vectors
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
        """DeepSpeed steps its parameter groups one after the other, and a choice serves one step."""
        if isinstance(optimizer, DualOptimPlus):
            optimizer.objective = self._stepping

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, once accelerate has the optimizer."""
        if self._by_hand:
            # accelerate finds parameters again by their addresses, and those that are empty on this rank have one.
            for group, params in zip(self.optimizer.param_groups, self._parameters, strict=True):
                group["params"] = params
        return super().create_scheduler(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """The whole run's batches, in order: it is one epoch of the Trainer's."""
        return self._loader(self.rows, batch_sampler=self._plan())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the Trainer's, of rows in any form that `eval_dataset` may have, a set's name among them."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset if eval_dataset is None else self._set(eval_dataset)
        rows = evaluation.sets_of(eval_dataset, self.processing_class, self.max_length)
        # A generator of its own, or looking would change what training draws.
        return self._loader(rows, batch_size=self.args.eval_batch_size, generator=torch.Generator())

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As `get_eval_dataloader`, of one set."""
        return self.get_eval_dataloader(
            evaluation.Rows(test_dataset, self.processing_class, self.max_length, "test_dataset")
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
        """A step's micro-batches, and how many items of each objective they hold together, over all ranks."""
        if self.control.should_training_stop:  # it went on from where it had stopped
            return [], {}
        step, names = self.state.global_step, list(self.objectives)
        samples, serving, failure = [], [], None
        try:
            samples = list(itertools.islice(epoch_iterator, num_batches))
            for sample in samples:
                self._check_turn(sample)
            serving = engines.served(samples, self.paused)
        except Exception as error:
            if self.args.world_size == 1:
                raise
            failure = error  # which the other ranks are told, or they would wait for this one
        sizes = [
            float(sum(self._size(name, sample[name]) for sample in samples if name in sample))
            if failure is None
            else 0.0
            for name in names
        ]
        own = 0 if failure is not None else engines.mark(serving, step)
        table = self.accelerator.gather(engines.on_device([*sizes, own], device))
        engines.agree_on_step(table[:, -1], engines.description(serving), failure, step)
        self._samples, self._worst = samples, None
        return samples, dict(zip(names, table[:, :-1].sum(0).tolist(), strict=True))

    def _size(self, name: str, batch: Mapping[str, Any]) -> int:
        """How many items of an objective's loss a batch counts for."""
        return 0 if "idle" in batch else self.objectives[name].loss.size(batch)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Σ_o weight_o · loss_o of a micro-batch, scaled to its share of the optimizer step.

        Args:
            inputs: objective → batch, as `ObjectiveRows.collate` makes it.
            return_outputs: whether to give the model's outputs, too: there are none, as each loss runs the model as it
                needs to, so that it is (loss, {}).
            num_items_in_batch: objective → items in the whole step, as `get_batch_samples` counts them; without them
                those of the micro-batch.
        """
        if num_items_in_batch is None:
            num_items_in_batch = {name: self._size(name, batch) for name, batch in inputs.items()}
        self._hand_over(inputs)
        total = torch.zeros((), device=self.args.device)
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
            # Gradients are averaged over ranks, and the share is of all ranks' items together.
            loss = loss * share * self.args.world_size
            losses, step = self._unlogged.losses[name], self.state.global_step
            losses[step] = losses.get(step, 0) + loss.detach().float()
            total = total + self.multipliers.get(name, objective.weight) * loss
        return (total, {}) if return_outputs else total

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's; then what happens once in an optimizer step, at its last micro-batch."""
        if self.paused:
            self._hand_over(inputs)
            inputs = {name: batch for name, batch in inputs.items() if name not in self.paused}
            if not inputs:  # without gradients the optimizer's step changes nothing
                return torch.zeros((), device=self.args.device)
        if self.release_gradients:
            loss = self._released(model, inputs, num_items_in_batch)
        elif self.combine is None and self.sam_rho is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self._one_by_one(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._raise_multipliers()
            self._samples, self._worst = [], None  # whose memory the optimizer may need
        self._stepping = None
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
        if self.is_fsdp_enabled:  # or it would keep the gradients of all objectives as one sum of its own
            self.model.set_requires_gradient_sync(True)
        if self.sam_rho is not None and self._worst is None:
            self._worst = self._find_worst(model, parameters, num_items_in_batch)
        for name, batch in inputs.items():
            if self.combine is not None:
                # Its gradient so far goes back to where autograd, and what averages over ranks, adds to it.
                for p, gradient in zip(parameters, self._gradients.get(name, [None] * len(parameters)), strict=True):
                    p.grad = gradient
            with sharpness.standing_at(self._worst or []) if name in self._perturbed else nullcontext():
                total = total + super().training_step(model, {name: batch}, num_items_in_batch)
            if self.combine is not None:
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

    def _find_worst(self, model: nn.Module, parameters: Sequence[Any], num_items_in_batch: Any) -> sharpness.Worst:
        """Where the step's losses to forget are worst near the weights, by their gradient over all micro-batches."""
        assert self.sam_rho is not None
        assert all(p.grad is None for p in parameters)
        names, step = self._perturbed - self.paused, self.state.global_step
        for sample in self._samples:
            if part := {name: batch for name, batch in sample.items() if name in names}:
                super().training_step(model, part, num_items_in_batch)
        for name in names & self._unlogged.losses.keys():  # of this pass nothing is logged
            self._unlogged.losses[name].pop(step, None)
        if self.args.world_size > 1:  # DDP may not have averaged them: it does at a step's last micro-batch
            for p in parameters:
                if p.grad is not None:
                    p.grad = self.accelerator.reduce(p.grad, reduction="mean")
        return sharpness.worst_nearby(parameters, self.sam_rho)

    def _raise_multipliers(self) -> None:
        """λ ← max(0, λ + η (loss − bound)) for the objectives of this step that are held below a bound."""
        for name in self.multipliers:
            objective, losses = self.objectives[name], self._unlogged.losses.get(name, {})
            assert objective.bound is not None
            if self.state.global_step < objective.multiplier_warmup:
                continue
            if (loss := losses.get(self.state.global_step)) is not None:
                excess = float(self.accelerator.reduce(loss, reduction="mean")) - objective.bound
                self.multipliers[name] = max(0.0, self.multipliers[name] + objective.multiplier_lr * excess)

    def _check_turn(self, inputs: Mapping[str, Any]) -> Turn:
        """The objectives of this step; batches of another are refused."""
        turn = self.turns[self.state.global_step]
        if not set(inputs) <= set(turn):
            raise ValueError(
                f"step {self.state.global_step} serves {', '.join(turn)}, but its batch carries {', '.join(inputs)}"
            )
        return turn

    def _hand_over(self, inputs: Mapping[str, Any]) -> None:
        """Tell the optimizer this step's objective, and refuse batches of another."""
        turn = self._check_turn(inputs)
        if (optimizer := self.multi_objective) is not None:
            if len(optimizer.objectives) == 1:  # one state for all: AdamW by another name
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
        """As the Trainer's, but that several sets are one evaluation: one entry in the log, one look of every callback.

        Each set NAME has ``eval_NAME_loss`` and ``eval_NAME_probability``, one set without a name ``eval_loss`` and
        ``eval_probability``, beside what `compute_metrics` gives. The trainer's own sets have ``eval_forgotten``,
        ``eval_kept`` and ``eval_score`` as well, where they are to forget and to keep, and the model was evaluated
        before training, as it is by any `eval_strategy`. `dualoptim.trainer_evaluation` has the formulas.
        """
        own = eval_dataset is None or eval_dataset is self.eval_dataset
        given = self.eval_dataset if own else eval_dataset
        if given is None:
            raise UserError("evaluate: there are no rows; give eval_dataset, here or to the trainer")
        if isinstance(given, str):
            given = self._set(given)
        sets = evaluation.sets_of(given, self.processing_class, self.max_length)
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
            output.metrics.pop(f"{prefix}_model_preparation_time", None)  # which is none of the set's
            metrics |= output.metrics
            num_samples, num_steps = num_samples + output.num_samples, num_steps + len(loader)
        if own and evaluation.have_score(self.roles):
            now = {name: metrics[f"{metric_key_prefix}_{name}_probability"] for name in self.roles}
            if self.state.global_step == 0:
                self._start = given, now
            if self._start is not None and self._start[0] is given:
                scored = evaluation.scored(now, self._start[1], self.roles)
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
        """As the Trainer's, with the loss over all tokens, whatever the batches, and the answers' probability."""
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
        """As the Trainer's; the answers' likelihoods of all ranks go to `evaluation_loop`."""
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
            if self.release_gradients:  # when the Trainer asks for their norm, there are none any more
                logs.pop("grad_norm", None)
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

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """As the Trainer's, of every objective's rows; refusals beside them are not counted."""
        for batch in inputs.values():
            super()._track_num_input_tokens(batch)
