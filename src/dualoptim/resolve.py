"""A config's names → the things they name, and whether they fit together and fit this machine.

Whatever is wrong with a config is found here, before anything is loaded or written.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from . import adapters, ranks, tasks
from .config import ALONE, METHODS, NO_MULTIPLIER, PLAIN, READ_BY, RunConfig, typed
from .data import asset, is_text
from .device import device_and_precision
from .errors import UserError, unknown
from .evaluation import attacks, general, probes
from .losses import LOSSES, Loss
from .memorise import Settings
from .models import trains_in_bf16
from .optim import DualOptim, DualOptimPlus, estimate_state_memory
from .reading import read_lines
from .runs import bytes_text
from .schedule import Turn, by_turns, in_proportion, jointly, parse_ratio
from .tasks import Task
from .tiny import TINY
from .training import reporting
from .training.combine import RULES, check_roles
from .training.optimizer_trial import tried

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "DualOptim+": DualOptimPlus,
    "DualOptim": DualOptim,
    "AdamW": torch.optim.AdamW,
}


def losses_of(config: RunConfig, task: Task) -> dict[str, Loss]:
    """The loss of each objective: the task's own, or for "forget" and "retain" the config's."""
    made: dict[str, Loss] = {}
    for objective, own in task.losses.items():
        if isinstance(own, str) and own not in LOSSES:
            raise unknown(f"loss of the objective {objective!r} of the task {task.name!r}", own, LOSSES)
        made[objective] = LOSSES[own]() if isinstance(own, str) else own
    for role in ("forget", "retain"):
        for key in (f"{role}_loss", f"{role}_loss_args"):
            if (role in made or role not in task.objectives) and getattr(config, key) != getattr(RunConfig(), key):
                raise UserError(f"{key}: the objectives of the task {task.name!r} have losses of its own; leave it out")
    for role in [name for name in task.objectives if name not in made]:
        if role not in ("forget", "retain"):
            raise UserError(f"task {task.name!r}: its objective {role!r} has no loss; name one in its `losses`")
        name, arguments = getattr(config, f"{role}_loss"), getattr(config, f"{role}_loss_args")
        fitting = [key for key, cls in LOSSES.items() if cls.role == role]
        if name not in LOSSES:
            raise unknown(f"{role}_loss", name, fitting)
        if name not in fitting:
            raise UserError(
                f"{role}_loss {name!r} is a loss to {LOSSES[name].role}; those to {role} are {', '.join(fitting)}"
            )
        arguments = typed(f"{role}_loss_args of {name}", LOSSES[name], arguments)
        try:
            made[role] = LOSSES[name](**arguments)
        except ValueError as error:
            raise UserError(f"{role}_loss_args {arguments}: {error}") from None
    return {name: made[name] for name in task.objectives}


def turns_of(config: RunConfig, task: Task, left: Mapping[str, float] | None = None) -> list[Turn]:
    """The objectives of each step.

    Args:
        left: objective → the model's mean loss on it before training, for the ratio "loss"; without it, all are taken
            to be the same.
    """
    if config.joint and config.optimizer != "AdamW":
        raise UserError(f"joint: {config.optimizer} steps for one objective at a time; leave it out, or use AdamW")
    if config.combine is not None and config.combine not in RULES:
        raise unknown("combine", config.combine, RULES)
    if config.combine is not None:
        RULES[config.combine](torch.eye(2), ("forget", "retain"))  # what it needs may not be installed
    if config.combine is not None and not config.joint:
        raise UserError(f"combine: {config.combine} needs both gradients in one step; add --joint true")
    if config.alone is not None and config.alone not in task.objectives:
        raise unknown("objective of alone", config.alone, task.objectives)
    if config.alone is not None and config.joint:
        raise UserError("alone: one objective alone is not joint; leave out --joint")
    turns = _mix(config, task, left)
    if not config.joint:
        # A step has no more sequences than there are rows; one that begins another pass may have a row twice.
        parts = -(-config.batch_size // (config.micro_batch_size or config.batch_size))
        turns = [
            {name: max(min(count, len(task.objectives[name])), parts) for name, count in turn.items()} for turn in turns
        ]
    if config.alone is None:
        return turns
    own = [turn for turn in turns if config.alone in turn]
    if not own:
        raise UserError(f"alone: {config.alone!r} has none of the {config.steps} steps; raise steps")
    return own


def _mix(config: RunConfig, task: Task, left: Mapping[str, float] | None) -> list[Turn]:
    names, schedule = list(task.objectives), jointly if config.joint else in_proportion
    try:
        if config.ratio == "size":
            return schedule({name: len(task.objectives[name]) for name in names}, config.batch_size, config.steps)
        if config.ratio == "loss":
            return schedule(left or dict.fromkeys(names, 1.0), config.batch_size, config.steps)
        ratio = parse_ratio(config.ratio, names)
        return (jointly if config.joint else by_turns)(ratio, config.batch_size, config.steps)
    except ValueError as error:
        raise UserError(str(error)) from None


def optimizer_of(config: RunConfig, objectives: Sequence[str]) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer's class and its arguments, tried on one parameter so that a wrong one is found at once."""
    if config.optimizer not in OPTIMIZERS:
        raise unknown("optimizer", config.optimizer, OPTIMIZERS)
    cls = OPTIMIZERS[config.optimizer]
    arguments: dict[str, Any] = {"lr": config.lr, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.betas is not None:
        arguments["betas"] = tuple(config.betas)
    if cls is torch.optim.AdamW:
        # The published comparison gives every optimizer the same decay rates.
        arguments.setdefault("betas", (0.9, 0.95))
        if config.delta_bits == 8:  # DualOptim with a single objective is AdamW
            cls = DualOptim
            arguments |= {"objectives": ("all",), "delta_bits": 8}
        else:
            arguments["fused"] = True
    else:
        arguments |= {
            "objectives": tuple(objectives),
            # For "equal" they follow from the schedule, which may need the model; so do the base's weights below.
            "lr_scales": {} if config.lr_scales == "equal" else dict(config.lr_scales),
            "delta_bits": config.delta_bits,
        }
    if config.base_bits != 32 and cls is not DualOptimPlus:
        raise UserError(f"base_bits: {config.optimizer} has no base; leave it out, or give delta_bits")
    if cls is DualOptimPlus:
        arguments |= {
            "base_betas": tuple(config.base_betas),
            "max_update": config.max_update,
            "base_bits": config.base_bits,
            "base_weights": {} if config.base_weights == "equal" else dict(config.base_weights),
        }
    tried(cls, arguments, f"optimizer {config.optimizer}")
    return cls, arguments


def check_read(configs: Sequence[RunConfig]) -> None:
    """Refuse a setting that the optimizer of no run reads. Where runs are compared, those that read it have it."""
    plain, optimizers = RunConfig(), list(dict.fromkeys(config.optimizer for config in configs))
    for key, readers in READ_BY.items():
        default = getattr(plain, key)
        if readers.isdisjoint(optimizers) and any(getattr(config, key) != default for config in configs):
            raise UserError(
                f"{key}: {' and '.join(optimizers)} {'does' if len(optimizers) == 1 else 'do'} not "
                f"read it; leave it at {json.dumps(default)}, or take {' or '.join(sorted(readers))}"
            )


def refusals_of(config: RunConfig) -> list[str]:
    """The replies that say 'I don't know'."""
    if config.refusals is None:
        own = [row["text"] for row in asset("refusals.jsonl")]
        # For a few rows of your own, only refusals that begin alike: a model torn between two openings says neither.
        return own if config.task else [text for text in own if text.startswith("I don't know")]
    return read_lines(config.refusals, "text")


def check_refusals(config: RunConfig, task: Task, losses: Collection[Loss]) -> None:
    """Refuse own refusals that neither the task nor a loss reads."""
    read = "refusals" in task.of_run or any(loss.needs_idk or loss.needs_alternates for loss in losses)
    if config.refusals is not None and not read:
        raise UserError(
            f"refusals: neither the task {config.task!r} nor a loss reads them; leave them out, or take a loss that "
            "trains on refusals, as IDK"
        )


def state_bytes(config: RunConfig, task: Task, model: nn.Module) -> int:
    """Bytes that the optimizer's state will take."""
    cls, arguments = optimizer_of(config, list(task.objectives))
    if issubclass(cls, DualOptimPlus):
        return estimate_state_memory(model, cls, **arguments)
    return 2 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def methods_of(config: RunConfig, methods: Sequence[str], seeds: Sequence[int]) -> list[RunConfig]:
    """The config once for each method and seed."""
    return [config.replace(**change) for change in changes_of(config, methods, seeds)]


def changes_of(config: RunConfig, methods: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The settings of each method and seed: those of `dualoptim.config.OF_METHODS`, as far as they have them."""
    changes: list[dict[str, Any]] = []
    for name in methods:
        if name == ALONE:
            changes += [{"optimizer": "AdamW", "alone": objective} for objective in tasks.load(config).objectives]
        elif name in METHODS:
            changes.append(METHODS[name])
        else:
            raise unknown("method", name, (*METHODS, ALONE))
    plain = [PLAIN if change.get("retain_bound") is not None else {**PLAIN, **NO_MULTIPLIER} for change in changes]
    changes = [{**own, **change} for own, change in zip(plain, changes, strict=True)]
    for what, given in (("methods", methods), ("seeds", seeds)):
        if not given or len(set(given)) < len(given):
            raise UserError(f"{what} must name at least one, and none twice, but are {list(given)}")
    return [{**change, "seed": seed} for change in changes for seed in seeds]


LEAST = {
    "steps": 1, "batch_size": 1, "log_every": 1, "max_length": 1, "lm_eval_limit": 1, "seed": 0, "save_every": 0,
    "probe_limit": 1, "curve_points": 0, "lora_rank": 0, "max_grad_norm": 0.0, "lr": 0.0, "weight_decay": 0.0,
    "retain_bound": 0.0,
}  # fmt: skip
MOST = {"curve_points": 10**7, "lora_rank": 10**6, "max_length": 10**9, "log_every": 10**9, "save_every": 10**9}
MOST_SEQUENCES = 10**7  # of a run, whose schedule is made beforehand


def check(config: RunConfig) -> Task:
    """Read a config's rows, and check all of it that needs no model."""
    check_alone(config)
    task = tasks.load(config)
    check_with(config, task)
    return task


def check_alone(config: RunConfig, *, training: bool = True) -> None:
    """Check what can be checked of a config before its rows are read.

    Args:
        training: whether a model is trained, or only scored.
    """
    for key, value in config.as_dict().items():
        if (bad := _not_finite(value)) is not None:
            raise UserError(f"{key} must have finite numbers, but has {bad}; give another, or leave it out")
    for name, weight in config.weights.items():
        if weight < 0:
            raise UserError(
                f"weights: that of {name!r} is {weight:g}, which would turn its loss around; give one of at least 0"
            )
    if config.steps * config.batch_size > MOST_SEQUENCES:  # before what a goal makes of the steps
        raise UserError(f"steps times batch_size must be at most {MOST_SEQUENCES}; give fewer steps, or smaller ones")
    for key, least in LEAST.items():
        value = getattr(config, key)
        if value is not None and value < least:
            raise UserError(f"{key} must be at least {least:g}, but is {value}")
        if value is not None and value > MOST.get(key, math.inf):
            raise UserError(f"{key} must be at most {MOST[key]}, but is {value}")
    if config.micro_batch_size is not None and not 1 <= config.micro_batch_size <= config.batch_size:
        raise UserError(
            f"micro_batch_size must be 1 to batch_size {config.batch_size}, but is {config.micro_batch_size}"
        )
    if config.seed >= 2**32:
        raise UserError(f"seed must be below 2 to the power of 32, but is {config.seed}")
    if config.lr == 0:
        raise UserError("lr is 0, so nothing would be learned; give one > 0")
    if config.eps <= 0:
        raise UserError(f"eps must be > 0, or a coordinate without a gradient divides 0 by 0, but is {config.eps}")
    reporting.check([config.report_to])
    for key in ("until", "keep_at_least"):
        value = getattr(config, key)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{key} must be a share from 0 to 1, but is {value}")
    if config.until is not None and config.task is not None and "forget" not in tasks.find(config.task).curves:
        raise UserError(f"until: the task {config.task!r} does not follow what is forgotten; leave it out")
    if (config.until, config.keep_at_least) != (None, None) and not config.curve_points:
        raise UserError("curve_points 0: until and keep_at_least look at the points of the curve; give one or more")
    if config.fast and config.save_model:
        raise UserError("fast: a model that is scored by probability alone is not written; add --save-model false")
    if config.bf16_weights and config.score_bf16 is False:
        raise UserError(
            "score_bf16 false: weights in bf16 are computed with in bf16, in scoring too; leave it out, or bf16_weights"
        )
    adapters.check_settings(config, training=training)
    check_attacks(config)
    if training:
        _check_thrift(config)
    if config.pause and config.until is None:
        raise UserError("pause: there is no goal at which to skip steps; give --until, or leave it out")
    if config.train is not None:
        try:
            re.compile(config.train)
        except re.error as error:
            raise UserError(f"train {config.train!r}: is no regular expression ({error})") from None


def _not_finite(value: Any) -> float | None:
    """The first number in a setting's value that is NaN or infinite; None if there is none."""
    if isinstance(value, float):
        return None if math.isfinite(value) else value
    if isinstance(value, Mapping):
        value = list(value.values())
    each = map(_not_finite, value if isinstance(value, (list, tuple)) else ())
    return next((bad for bad in each if bad is not None), None)


def check_attacks(config: RunConfig) -> None:
    """Refuse unknown attacks, and those that this machine or the weights do not allow."""
    attacks.check(config.attacks)
    if config.fast and config.attacks:
        raise UserError("fast: scores by probability alone, and attacks write replies; leave out one of them")
    if config.relearn_lr is not None:
        if config.relearn_lr <= 0:
            raise UserError(f"relearn_lr must be > 0, but is {config.relearn_lr}")
        if "relearn" not in config.attacks:
            raise UserError("relearn_lr: the attack relearn is not asked for; add it to attacks, or leave this out")
    if "nf4" in config.attacks:
        adapters.check_4bit("attack nf4")
    if config.load_in_4bit and (of := [name for name in config.attacks if name in attacks.OF_WEIGHTS]):
        raise UserError(
            f"attacks: {', '.join(of)} cannot be done to weights that are loaded in 4 bits, which have no gradient and "
            "are rounded already; leave it out, or load_in_4bit"
        )


def _check_thrift(config: RunConfig) -> None:
    """Refuse settings that save memory together with settings that they do not work with."""
    rounds = config.optimizer == "AdamW" and config.delta_bits == 32
    in_bf16 = config.bf16_weights and (rounds or config.sam_rho is not None)
    if in_bf16 and not config.lora_rank and trains_in_bf16(config.model):  # a new adapter is in fp32
        if rounds:
            raise UserError(
                "bf16_weights: AdamW in 32 bits rounds to the nearest, so that most updates of bf16 weights are lost; "
                "use DualOptim+, DualOptim or --delta-bits 8, which round stochastically"
            )
        raise UserError(
            "bf16_weights: the way that sam_rho goes is lost in the rounding of weights in bf16; leave one of them "
            "out, or train a LoRA"
        )
    if not config.release_gradients:
        return
    wrong = None
    if config.max_grad_norm:
        wrong = f"max_grad_norm {config.max_grad_norm:g} clips by the norm of all of them; give --max-grad-norm 0"
    elif config.micro_batch_size is not None and config.micro_batch_size < config.batch_size:
        wrong = f"a step of {config.batch_size} rows in passes of {config.micro_batch_size} adds them up; give as many"
    elif config.combine is not None:
        wrong = f"{config.combine} makes one of several; leave it out"
    elif config.sam_rho is not None:
        wrong = "sam_rho goes a way along all of them first; leave it out"
    elif ranks.size() > 1:
        wrong = f"{ranks.size()} ranks average them; start one"
    if wrong is not None:
        raise UserError(f"release_gradients: frees each gradient as it comes, but {wrong}")


def check_with(config: RunConfig, task: Task) -> None:
    """Check a config against its task."""
    optimizer_of(config, list(task.objectives)), refusals_of(config)
    losses, turns = losses_of(config, task), turns_of(config, task)
    if config.combine is not None:
        check_roles(RULES[config.combine], [[losses[name].role for name in turn] for turn in turns])
    weights = {**dict.fromkeys(task.objectives, 1.0), **task.weights, **config.weights}
    for name in weights:
        if name not in task.objectives:
            raise unknown("objective of weights", name, task.objectives)
    if not any(weights.values()):
        raise UserError("weights: those of all objectives are 0, so nothing would be trained on; leave one out")
    idle = [
        name for name, weight in weights.items() if not weight and (name != "retain" or config.retain_bound is None)
    ]
    if alone := next((turn for turn in turns if set(turn) <= set(idle)), None):
        raise UserError(
            f"weights: that of {', '.join(map(repr, alone))} is 0, and steps serve nothing else, so nothing would be "
            "trained on in them; give it a weight, or --alone with the name of another objective"
        )
    _check_stop(config, task, losses)
    _check_multiplier(config, task)
    _check_sam(config, task)
    if config.attacks and "forget" not in task.objectives:
        raise UserError(f"attacks: the task {task.name!r} has nothing to forget that could come back; leave them out")
    if config.lm_eval:
        general.check(config.lm_eval)
    probes.read(config)
    if config.retrained is not None and task.retained is None:
        raise UserError(f"retrained: the task {task.name!r} compares with no retrained model; leave it out")
    if config.retrained == "make" and not config.memorise:
        raise UserError("retrained 'make' trains as --memorise does; add --memorise true, or give a model")
    if config.model == TINY and not config.memorise:
        raise UserError(f"the model {TINY!r} is made of a task's rows; add --memorise true")
    if config.memorise_args and not config.memorise:
        raise UserError("memorise_args say how a model memorizes; add --memorise true")
    for key, value in typed("memorise_args", Settings, config.memorise_args).items():
        if value <= 0 and key != "seed":
            raise UserError(f"memorise_args: {key} must be > 0, but is {value}")
    if not 0 <= config.warmup_ratio <= 1:
        raise UserError(f"warmup_ratio must be from 0 to 1, a share of the steps, but is {config.warmup_ratio}")


def _check_stop(config: RunConfig, task: Task, losses: Mapping[str, Loss]) -> None:
    """Refuse to stop, or to choose a point, by counting refusals where the loss teaches none."""
    looks = next((key for key in ("until", "keep_at_least") if getattr(config, key) is not None), None)
    if looks is None or config.task is not None or config.goal != "refuse":
        return
    loss = losses["forget"]
    for row in task.objectives["forget"]:
        replaced = loss.needs_idk and (not loss.needs_alternates or row.fields.get("instead"))
        if row.prompt and not is_text(row.prompt) and not replaced:  # a text is forgotten where it is not continued
            raise UserError(
                f"{looks}: with the goal refuse, replies that refuse are counted as forgotten, and "
                f"{config.forget_loss} teaches none; add --goal erase, or --{looks.replace('_', '-')} null"
            )


def _check_multiplier(config: RunConfig, task: Task) -> None:
    """Check the settings of the multiplier that holds the retain loss below a bound."""
    if config.multiplier_lr <= 0:
        raise UserError(f"multiplier_lr must be > 0, but is {config.multiplier_lr}")
    if config.retain_bound is None:
        for key, default in NO_MULTIPLIER.items():
            if getattr(config, key) != default:
                raise UserError(f"{key}: there is no multiplier without a bound; give --retain-bound, or leave it out")
        return
    if "retain" not in task.objectives:
        raise UserError(f"retain_bound: the task {task.name!r} has no objective 'retain'; leave it out")
    if config.multiplier_start is not None and config.multiplier_start < 0:
        raise UserError(f"multiplier_start must be >= 0, but is {config.multiplier_start}")
    if config.multiplier_start is not None and "retain" in config.weights:
        raise UserError("weights: the multiplier of 'retain' begins at multiplier_start; leave one of them out")
    if not 0 <= config.multiplier_warmup <= 1:
        raise UserError(f"multiplier_warmup must be 0 to 1, a share of the steps, but is {config.multiplier_warmup}")


def _check_sam(config: RunConfig, task: Task) -> None:
    """Refuse SAM where no loss forgets: it perturbs the weights along such a loss's gradient."""
    if config.sam_rho is None:
        return
    if config.sam_rho <= 0:
        raise UserError(f"sam_rho must be > 0, but is {config.sam_rho}; leave it out for none")
    forget = [name for name, loss in losses_of(config, task).items() if loss.role == "forget"]
    if not forget or (config.alone is not None and config.alone not in forget):
        what = f"{config.alone!r} alone" if config.alone is not None else f"the task {task.name!r}"
        raise UserError(f"sam_rho: perturbs the weights where a loss forgets, and none of {what} does; leave it out")


def as_trained(config: RunConfig, model: Any) -> Any:
    """A model on torch's meta device, as it is trained: a copy with a new adapter or of which a part is trained."""
    if config.lora_rank:
        widest = max((min(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)), default=0)
        if config.lora_rank > widest:
            raise UserError(f"lora_rank {config.lora_rank}: the model's matrices have ranks up to {widest}; give less")
        return adapters.added(copy.deepcopy(model), config, config.model)
    if config.train is not None:
        model = copy.deepcopy(model)  # other configs train other parts
        train_only(config.train, model)
    return model


def memory_needed(config: RunConfig, task: Task, losses: Mapping[str, Loss], model: Any) -> dict[str, int]:
    """Bytes by purpose: the model to train, gradients, the optimizer's state, and a reference if needed.

    Args:
        model: as it is trained, on torch's meta device.
    """
    adapted = hasattr(model, "peft_config")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(p.numel() for p in model.parameters()) - trained * adapted
    width = 2 if config.bf16_weights else 4
    own = 4 if adapted else width  # of what is trained: adapters are in fp32
    released = max((p.numel() for p in model.parameters() if p.requires_grad), default=0)
    needed = {
        "model": adapters.bytes_in_4bit(model, width) if config.load_in_4bit else width * base,
        **({"adapter": 4 * trained} if adapted else {}),
        "gradients": own * (released if config.release_gradients else trained),
        "optimizer state": state_bytes(config, task, model),
    }
    wanted = {loss.reference for loss in losses.values()}
    if "model" in wanted or (adapted and "sequences" in wanted):  # the part that is not trained is shared
        needed["reference"] = own * trained
    if (config.until, config.keep_at_least) != (None, None) and device_and_precision()[0].type == "cpu":
        needed["best point"] = own * trained
    if config.sam_rho is not None:
        needed["weights nearby"] = own * trained
    if config.combine is not None:
        needed["the other gradients"] = 4 * trained * (len(task.objectives) - 1)
    if config.score_bf16 and not config.bf16_weights:
        # Autocast keeps what it casts while a model is scored, when there are no gradients.
        layers = [*([] if config.load_in_4bit else adapters.linear_layers(model)), model.get_output_embeddings()]
        copies = 2 * sum(layer.weight.numel() for layer in layers if layer is not None)
        if copies > needed["gradients"]:
            needed["weights cast in scoring"] = copies - needed["gradients"]
    return needed


def relearning_needs(config: RunConfig, model: nn.Module, reference: int) -> dict[str, int]:
    """Bytes that the attack relearn needs, by purpose; empty where it is not asked for.

    Args:
        model: as it is loaded, on torch's meta device.
        reference: bytes of a frozen copy that stays in memory meanwhile.
    """
    if "relearn" not in config.attacks:
        return {}
    total = sum(p.numel() for p in model.parameters())
    size = total * (2 if config.bf16_weights else 4)
    copy = size if device_and_precision()[0].type == "cpu" else 0  # which lies in main memory
    return {
        "model": size,
        "gradients": size,
        "optimizer state": 2 * 4 * total,
        **({"the weights as they were": copy} if copy else {}),
        **({"reference": reference} if reference else {}),
    }


def train_only(pattern: str, model: nn.Module) -> None:
    """Freeze every parameter whose name a regular expression does not match anywhere.

    Raises:
        UserError: it matches none, or one that is another's under a second name, and not that one.
    """
    own = {p: name for name, p in model.named_parameters()}
    matched = {p for p, name in own.items() if re.search(pattern, name)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if re.search(pattern, name) and parameter not in matched:
            raise UserError(
                f"train {pattern!r}: {name} is tied to {own[parameter]}, the same weights, which are trained under "
                "that name; give it, or leave this one out"
            )
    if not matched:
        example = next(iter(own.values()))
        raise UserError(f"train {pattern!r}: matches none of the model's parameters, such as {example}")
    for parameter in own:
        parameter.requires_grad_(parameter in matched)


def check_losses(losses: Mapping[str, Loss], model: nn.Module) -> None:
    """Refuse losses that do not work with a model."""
    for name, loss in losses.items():
        try:
            loss.check(model)
        except ValueError as error:
            raise UserError(f"the loss of {name!r}, {type(loss).__name__}: {error}") from None


def free_memory() -> int:
    """Free memory of the device, in bytes."""
    device, _ = device_and_precision()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # else memory cached from earlier models counts as taken
        return torch.cuda.mem_get_info()[0]
    return int(psutil.virtual_memory().available) // ranks.here()


def check_relearning(config: RunConfig, needed: Mapping[str, int]) -> None:
    """Refuse the attack relearn where it does not fit: it trains the whole model, with two moments in 32 bits."""
    if sum(needed.values()) > (free := free_memory()):
        parts = ", ".join(f"{name} {bytes_text(size)}" for name, size in needed.items())
        raise UserError(
            f"not enough memory: the attack relearn trains all of {config.model}, which needs "
            f"{bytes_text(sum(needed.values()))} ({parts}), and {bytes_text(free)} are free; leave it out of attacks"
        )


def check_room(config: RunConfig, needed: Mapping[str, int], merged: int = 0) -> None:
    """Refuse a run whose weights, gradients and states alone do not fit, or whose model would not fit on the disk.

    Args:
        merged: bytes of the model with its adapter merged into it; 0 where that is not made.
    """
    free = free_memory()
    if sum(needed.values()) > free:
        parts = ", ".join(f"{name} {bytes_text(size)}" for name, size in needed.items())
        raise UserError(
            f"not enough memory: {config.optimizer} on {config.model} needs {bytes_text(sum(needed.values()))} "
            f"({parts}) and {bytes_text(free)} are free; use a smaller model or an optimizer with fewer states"
        )
    if merged > free:
        raise UserError(
            f"not enough memory: {config.model} with the adapter merged into it needs {bytes_text(merged)} and "
            f"{bytes_text(free)} are free; give --merge false"
        )
    where = next(path for path in (Path(config.out), *Path(config.out).absolute().parents) if path.exists())
    trained = needed.get("adapter", needed["model"])  # what is saved of a run
    room, free_disk = (trained + merged) * config.save_model, shutil.disk_usage(where).free
    if config.save_every:  # the new one is written before the old one is removed
        room += 2 * (trained + needed["optimizer state"] + needed.get("best point", 0))
    if room > free_disk:
        raise UserError(
            f"not enough disk: {config.out} needs {bytes_text(room)} for the model and its checkpoints, and "
            f"{bytes_text(free_disk)} are free; give --out elsewhere, or --save-model false"
        )
