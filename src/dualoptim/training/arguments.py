"""Which of transformers' arguments `UnlearnTrainer` reads. An argument that is not read is refused, never ignored.

Every field of `TrainingArguments` and every argument of `Trainer` is in one of these tables; a test compares them with
the installed version of transformers. A default value is always accepted: it looks the same as no value.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from ..errors import UserError, unknown
from ..optim import DualOptimPlus
from ..optim.optimizer import multi_objective
from ..schedule import Turn
from .combine import Rule, check_roles
from .optimizer_trial import check_known, tried

logger = logging.getLogger(__name__)

READ_BY = {
    "training": """gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
        activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
        torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache neftune_noise_alpha
        torch_empty_cache_steps seed data_seed full_determinism use_cpu debug skip_memory_metrics""",
    "the optimizer": """learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio weight_decay optim
        optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon""",
    "batches": """dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order include_num_input_tokens_seen""",
    "evaluation": """eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size prediction_loss_only
        eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
        bf16_full_eval fp16_full_eval load_best_model_at_end metric_for_best_model greater_is_better""",
    "logging": """logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica
        disable_tqdm logging_dir report_to run_name project trackio_space_id trackio_bucket_id
        trackio_static_space_id""",
    "checkpoints": """output_dir save_strategy save_steps save_total_limit save_only_model save_on_each_node
        enable_jit_checkpoint restore_callback_states_from_checkpoint""",
    "the hub": """push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision""",
    "ranks": """accelerator_config parallelism_config ddp_find_unused_parameters ddp_bucket_cap_mb
        ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank fsdp fsdp_config deepspeed""",
}
READ = frozenset(name for group in READ_BY.values() for name in group.split())
# Set by `UnlearnTrainer` itself, as its docstring says; either value is accepted.
SETTLED = frozenset(["logging_nan_inf_filter"])
# Meant for training scripts: no Trainer of transformers reads them.
SCRIPTS = frozenset(["do_train", "do_eval", "do_predict", "resume_from_checkpoint"])

BATCHES = "turns=… says how many sequences a step has, and gradient_accumulation_steps into how many batches they go"
ORDER = "the batches of a run are drawn beforehand, of rows of like length, by turns=… and seed"
# Field → what to use instead.
UNREAD: Mapping[str, str] = {
    "per_device_train_batch_size": BATCHES,
    "auto_find_batch_size": f"{BATCHES}; raise that where memory is short",
    "num_train_epochs": "turns=… says how many steps there are",
    "max_steps": "turns=… says how many steps there are",
    "label_smoothing_factor": "each objective's own loss is computed as its formula says",
    "average_tokens_across_devices": "losses are averaged over the step's rows or tokens of all ranks, always",
    "ignore_data_skip": "a run goes on with the batches behind those it had, or it is another run",
    "train_sampling_strategy": ORDER,
    "group_by_length": ORDER,
    "length_column_name": ORDER,
    "dataloader_drop_last": "no row of a schedule or of an evaluation is dropped",
    "dataloader_persistent_workers": "the batches of a run are one epoch, which workers outlast as it is",
    "remove_unused_columns": "rows have no columns that a model could be given",
    "label_names": "labels stand on the rows' answers",
}

# Argument of Trainer → what to use instead. READ_NAMED has the other arguments, which are read.
UNREAD_NAMED: Mapping[str, str] = {
    "train_dataset": "objectives={name: Objective(rows, loss)} holds what is trained on",
    "data_collator": "rows are tokenized by the model's chat template and padded on the right",
    "compute_loss_func": "each objective has its own loss: Objective(rows, loss)",
    "model_init": "the model is what losses and scores compare with; hand it over, or its name",
}
READ_NAMED = frozenset(
    ("model", "args", "eval_dataset", "processing_class", "compute_metrics", "callbacks", "optimizers",
     "optimizer_cls_and_kwargs", "preprocess_logits_for_metrics")
)  # fmt: skip

# Settings that a given optimizer or scheduler already has.
OF_OPTIMIZER = ("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon")
OF_OPTIMIZERS = (*OF_OPTIMIZER, "learning_rate", "weight_decay")
OF_SCHEDULER = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")


def check(args: TrainingArguments, named: Mapping[str, Any], turns: Sequence[Turn], micro_batch: int) -> None:
    """Refuse arguments that are not read.

    Args:
        args: the training arguments.
        named: the Trainer's other arguments, by name.
        turns: the schedule; `max_steps` may only be its length.
        micro_batch: sequences of the largest batch; `per_device_train_batch_size` may only be the same.

    Raises:
        UserError: the first argument that would be ignored, with what to use instead.
    """
    for name, instead in UNREAD_NAMED.items():
        if named.get(name) is not None:
            raise UserError(f"UnlearnTrainer does not read {name}; leave it out: {instead}")
    says_the_same = {"max_steps": len(turns), "per_device_train_batch_size": micro_batch}
    for name, instead in UNREAD.items():
        if _given(args, name) and getattr(args, name) != says_the_same.get(name):
            raise UserError(f"UnlearnTrainer does not read {name}, which is {_value(args, name)}; {instead}")
    _check_unknown(args)
    _check_ranks(args)
    _check_optimizer(args, named)
    if (
        args.load_best_model_at_end
        and args.save_strategy == "steps"
        and args.eval_strategy == "steps"
        and args.save_steps != args.eval_steps
    ):
        raise UserError(
            f"load_best_model_at_end: evaluated every {args.eval_steps} steps and saved every {args.save_steps}, the "
            f"best model may not be saved; give save_steps={args.eval_steps} or save_strategy='best'"
        )


def check_turns(turns: Any) -> list[Turn]:
    """The schedule as a list; refuse one that is no list of what each step serves."""
    if isinstance(turns, (str, Mapping)) or not isinstance(turns, Iterable):
        raise UserError(f"turns: give a list with an entry for each step, by dualoptim.schedule, and not {turns!r}")
    turns = list(turns)
    if not turns:
        raise UserError("turns: there are no steps; give at least one, by dualoptim.schedule")
    for step, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise UserError(f"turns: step {step} is {turn!r}; give objective → sequences, such as {{'forget': 8}}")
        if not turn:
            raise UserError(f"turns: step {step} serves no objective; give it one, or leave the step out")
        for name, count in turn.items():
            if not isinstance(count, int) or count < 1:
                raise UserError(f"turns: step {step} has {count} sequences of {name!r}; give 1 or more, or no entry")
    return turns


def check_kinds(model: Any, args: Any, reference: Any, max_length: Any) -> None:
    """Refuse what is not of the kind that an argument takes."""
    for name, value in (("model", model), ("reference", reference)):
        if not isinstance(value, (nn.Module, str)) and not (name == "reference" and value is None):
            raise UserError(f"{name}: give a model, or its name or folder as a text, and not {value!r}")
    if not isinstance(args, TrainingArguments):
        raise UserError(f"args: give TrainingArguments, and not {args!r}")
    if not isinstance(max_length, int) or max_length < 1:
        raise UserError(f"max_length must be a whole number of tokens > 0, but is {max_length!r}")


def check_names(
    objectives: Mapping[str, Any], turns: Sequence[Turn], named: Mapping[str, Any], args: TrainingArguments
) -> None:
    """Refuse turns or an optimizer with objectives that are not among the given ones, and the optimizer's arguments."""
    if not isinstance(objectives, Mapping):
        raise UserError("objectives: give them by name, {name: Objective(rows, loss)}")
    for name in objectives:
        if not (isinstance(name, str) and name):
            raise UserError(f"objectives: a name is a text that is not empty, such as 'forget', and not {name!r}")
    served = dict.fromkeys(name for turn in turns for name in turn)
    if other := [name for name in served if name not in objectives]:
        raise unknown("objective", other[0], objectives, "turns")
    if idle := [name for name in objectives if name not in served]:
        logger.warning("turns serve %s at no step, so it is not trained", ", ".join(map(repr, idle)))
    optimizer, _ = named.get("optimizers") or (None, None)
    given: tuple[Any, Mapping[str, Any]] = named.get("optimizer_cls_and_kwargs") or (None, {})
    cls, arguments = given
    known = None
    if (several := multi_objective(optimizer)) is not None:
        known = several.objectives
    elif isinstance(cls, type) and issubclass(cls, DualOptimPlus):
        settled = {"objectives": tuple(objectives), "lr": args.learning_rate, "weight_decay": args.weight_decay}
        known = tried(cls, {**settled, **arguments}, "optimizer_cls_and_kwargs").objectives
    elif isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer):
        check_known(cls, arguments, "optimizer_cls_and_kwargs")
    if known is not None and len(known) > 1 and (other := [name for name in served if name not in known]):
        raise UserError(
            f"the optimizer's objectives are {', '.join(known)}, and turns serve {other[0]!r}; give it the names "
            f"{', '.join(objectives)}"
        )


def with_settings(given: tuple[Any, Mapping[str, Any]], args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
    """An optimizer's class and arguments, with the learning rate of `args` unless they have their own.

    A weight decay among them is moved into `args`, from which the parameter groups take it.
    """
    cls, own = given[0], dict(given[1])
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer):
        own.setdefault("lr", args.learning_rate)
        args.weight_decay = own.pop("weight_decay", args.weight_decay)
    return cls, own


def _given(args: TrainingArguments, name: str) -> bool:
    """Whether a field exists in this version of transformers and differs from its default."""
    field = next((field for field in dataclasses.fields(args) if field.name == name), None)
    if field is None:
        return False
    default = field.default_factory() if callable(field.default_factory) else field.default
    return bool(getattr(args, name) != default)


def _value(args: TrainingArguments, name: str) -> Any:
    value = getattr(args, name)
    return getattr(value, "value", value)


def _check_unknown(args: TrainingArguments) -> None:
    """Check fields in no table: those of another trainer's arguments are refused, new ones of transformers logged."""
    of_transformers = {field.name for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(args):
        if field.name in READ | SETTLED | SCRIPTS | UNREAD.keys() or not _given(args, field.name):
            continue
        if field.name in of_transformers:
            logger.warning("%s is newer than dualoptim, which cannot say whether it is read", field.name)
            continue
        owner = next(cls for cls in type(args).__mro__ if field.name in vars(cls).get("__annotations__", {}))
        if owner.__module__.split(".")[0] in ("transformers", "trl"):  # a user's own class is their own affair
            raise UserError(f"UnlearnTrainer does not read {field.name} of {owner.__name__}; leave it out")


def _check_ranks(args: TrainingArguments) -> None:
    config: Any = args.accelerator_config
    for name in ("split_batches", "dispatch_batches"):
        if getattr(config, name, None):
            raise UserError(
                f"accelerator_config: UnlearnTrainer does not read {name}; leave it out: each rank takes its own "
                "batches of the same objectives"
            )
    for name in ("tp_size", "cp_size", "sp_size"):
        if (size := getattr(getattr(args, "parallelism_config", None), name, None) or 1) > 1:
            raise UserError(
                f"parallelism_config: UnlearnTrainer gives each rank its own rows, and cannot share one row out over "
                f"{name} {size}; use data parallel ranks, sharded where memory is short"
            )


def _check_optimizer(args: TrainingArguments, named: Mapping[str, Any]) -> None:
    optimizer, scheduler = named.get("optimizers") or (None, None)
    given: tuple[Any, Mapping[str, Any]] = named.get("optimizer_cls_and_kwargs") or (None, {})
    cls, arguments = given
    if scheduler is not None and optimizer is None:
        raise UserError("optimizers: a scheduler without its optimizer would step another one; give both, or neither")
    if cls is not None and optimizer is not None:
        raise UserError("optimizers and optimizer_cls_and_kwargs both bring an optimizer; give one of them")
    if scheduler is not None:
        _leave(args, OF_SCHEDULER, "optimizers=(optimizer, scheduler)")
    if optimizer is not None:
        rates = {group["lr"] for group in optimizer.param_groups} if hasattr(optimizer, "param_groups") else set()
        same = [name for name in ("learning_rate",) if rates == {args.learning_rate}]
        _leave(args, [name for name in OF_OPTIMIZERS if name not in same], "optimizers=(optimizer, …)")
    if cls is not None:
        _leave(args, OF_OPTIMIZER, "optimizer_cls_and_kwargs")
        if _given(args, "weight_decay") and arguments.get("weight_decay", args.weight_decay) != args.weight_decay:
            raise UserError(
                f"weight_decay is {args.weight_decay} in args and {arguments['weight_decay']} in "
                "optimizer_cls_and_kwargs; give one of them"
            )


def _leave(args: TrainingArguments, names: Sequence[str], by: str) -> None:
    for name in names:
        if _given(args, name):
            raise UserError(f"{name} is not read where {by} brings its own; leave it out, or set it there")


def check_sam(rho: float, perturbed: Collection[str], model: nn.Module) -> None:
    """Refuse what SAM does not work with."""
    if not 0 < rho < math.inf:
        raise UserError(f"sam_rho must be > 0, but is {rho}; None for no perturbation")
    if not perturbed:
        raise UserError("sam_rho: perturbs the weights where a loss forgets, and none does; leave it out")
    for name, p in model.named_parameters():
        if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16):
            raise UserError(
                f"sam_rho: {name} is in {str(p.dtype).removeprefix('torch.')}, in whose rounding so short a way is "
                "lost; load the weights in 32 bits, or train an adapter"
            )


def check_combine(combine: Rule | None, turns: Sequence[Turn], objectives: Mapping[str, Any]) -> None:
    """Refuse a rule for joint steps where there are none, or none of losses that it can work on."""
    if combine is None:
        return
    if all(len(turn) == 1 for turn in turns):
        raise UserError("combine: no turn serves several objectives, so there is nothing to combine; leave it out")
    check_roles(combine, [[objectives[name].loss.role for name in turn] for turn in turns])


def check_weights(turns: Sequence[Turn], objectives: Mapping[str, Any]) -> None:
    """Log which objectives have steps that are skipped as long as nobody changes their weights, which are 0."""
    idle = {name for name, objective in objectives.items() if objective.weight == 0 and objective.bound is None}
    if skipped := dict.fromkeys(name for turn in turns if idle.issuperset(turn) for name in turn):
        logger.warning(
            "the weight of %s is 0, so steps that serve nothing else are skipped until it is changed",
            ", ".join(map(repr, skipped)),
        )


def check_release(args: TrainingArguments, combine: Rule | None, sam_rho: float | None = None) -> None:
    """Refuse what needs all gradients in memory at the same time."""
    if args.max_grad_norm:
        wrong = f"max_grad_norm {args.max_grad_norm:g} clips by the norm of all of them; set it to 0"
    elif args.gradient_accumulation_steps > 1:
        wrong = f"gradient_accumulation_steps is {args.gradient_accumulation_steps}; take a step in one"
    elif args.world_size > 1:
        wrong = f"there are {args.world_size} processes; use one, or FSDP to share the memory"
    elif args.fp16:
        wrong = "fp16 scales them; use bf16"
    elif args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        wrong = (
            "use_reentrant in gradient_checkpointing_kwargs makes a parameter's gradient in several parts, one for "
            "each forward pass; set it to False"
        )
    elif combine is not None:
        wrong = "combine makes one of several; leave it out"
    elif sam_rho is not None:
        wrong = "sam_rho goes a way along all of them first; leave it out"
    else:
        return
    raise ValueError(f"release_gradients frees each gradient as it comes, but {wrong}")
