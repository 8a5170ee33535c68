"""One unlearning run, and several side by side: config → model, task, trainer → results.

`check` finds what is wrong with a config before anything is loaded, `prepare` loads and scores the model as it is,
`train` is one method's training and scoring, and `run` writes the folder that `dualoptim.runs` describes.
"""

from __future__ import annotations

import copy
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from . import report, runs, tasks
from .config import METHODS, RunConfig
from .data import encode, read_records
from .errors import UserError, unknown
from .losses import LOSSES, Loss
from .models import device_and_precision, load_model, load_tokenizer
from .optim import DualOptim, DualOptimPlus
from .schedule import Turn, by_turns, jointly, parse_ratio
from .tasks import Scores, Task
from .tasks.facts import asset
from .trainer import Objective, UnlearnTrainer

OBJECTIVES = ("forget", "retain")
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "DualOptim+": DualOptimPlus,
    "DualOptim": DualOptim,
    "AdamW": torch.optim.AdamW,
}


def losses_of(config: RunConfig) -> dict[str, Loss]:
    """The two losses that a config asks for."""
    made = {}
    for role in OBJECTIVES:
        name, arguments = getattr(config, f"{role}_loss"), getattr(config, f"{role}_loss_args")
        fitting = [key for key, cls in LOSSES.items() if cls.role == role]
        if name not in LOSSES:
            raise unknown(f"{role}_loss", name, fitting)
        if name not in fitting:
            raise UserError(
                f"{role}_loss {name!r} is a loss to {LOSSES[name].role}; those to {role} are {', '.join(fitting)}"
            )
        try:
            made[role] = LOSSES[name](**arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"{role}_loss_args {arguments}: {str(error).removeprefix(name + '.__init__() ')}") from None
    return made


def turns_of(config: RunConfig) -> list[Turn]:
    """Whose turn each step is."""
    if config.joint and config.optimizer != "AdamW":
        raise UserError(f"joint: {config.optimizer} steps for one objective at a time; leave it out, or use AdamW")
    for name in ("steps", "batch_size", "log_every"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, but is {getattr(config, name)}")
    if config.micro_batch_size is not None and not 1 <= config.micro_batch_size <= config.batch_size:
        raise UserError(
            f"micro_batch_size must be 1 to batch_size {config.batch_size}, but is {config.micro_batch_size}"
        )
    try:
        ratio = parse_ratio(config.ratio, OBJECTIVES)
        return (jointly if config.joint else by_turns)(ratio, config.batch_size, config.steps)
    except ValueError as error:
        raise UserError(str(error)) from None


def optimizer_of(config: RunConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer's class and its arguments, tried on one parameter so that a wrong one is found at once."""
    if config.optimizer not in OPTIMIZERS:
        raise unknown("optimizer", config.optimizer, OPTIMIZERS)
    cls = OPTIMIZERS[config.optimizer]
    arguments: dict[str, Any] = {"lr": config.lr, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.betas is not None:
        arguments["betas"] = tuple(config.betas)
    if cls is torch.optim.AdamW:
        if config.lr_scales:
            raise UserError("lr_scales: AdamW has one state and one learning rate for all objectives; leave it out")
        # The published comparison gives every optimizer the same decay.
        arguments.setdefault("betas", (0.9, 0.95))
        arguments["fused"] = True
    else:
        arguments |= {"objectives": OBJECTIVES, "lr_scales": dict(config.lr_scales)}
    if cls is DualOptimPlus:
        arguments |= {"base_betas": tuple(config.base_betas), "max_update": config.max_update}
    try:
        cls([nn.Parameter(torch.zeros(1))], **arguments)
    except ValueError as error:
        raise UserError(f"optimizer {config.optimizer}: {error}") from None
    return cls, arguments


def refusals_of(config: RunConfig) -> list[str]:
    """The replies that say 'I don't know'."""
    if config.refusals is None:
        return [row["text"] for row in asset("refusals.jsonl")]
    found = []
    for record, where in read_records(config.refusals):
        if not isinstance(record.get("text"), str) or not record["text"].strip():
            raise UserError(f"{where}: a refusal needs its words under 'text'")
        found.append(record["text"])
    return found


def state_bytes(config: RunConfig, parameters: int) -> int:
    """Bytes that the optimizer's state will take: fp32 moments, two for each state that the optimizer keeps."""
    states = {"DualOptim+": 1 + len(OBJECTIVES), "DualOptim": len(OBJECTIVES), "AdamW": 1}[config.optimizer]
    return states * 2 * 4 * parameters


@dataclass
class Prepared:
    """What every method of a comparison starts from."""

    config: RunConfig
    task: Task
    tokenizer: Any
    model: PreTrainedModel  # as it was before unlearning; never trained
    before: Scores
    start: dict[str, float]  # of the forget/keep curve


def check(config: RunConfig) -> Task:
    """Check all of a config that needs no model, and read its rows."""
    optimizer_of(config), losses_of(config), turns_of(config), refusals_of(config)
    return tasks.load(config)


def prepare(config: RunConfig) -> Prepared:
    """Load the model, check rows, memory and disk, and score the model as it is."""
    task = check(config)
    tokenizer = load_tokenizer(config.model, config.chat_template)
    for rows in task.objectives.values():
        for row in rows:
            encode(row, tokenizer, config.max_length)
    model = load_model(config.model)
    check_room(config, model)
    model.to(device_and_precision()[0])
    before = task.prepare(model, tokenizer)
    return Prepared(config, task, tokenizer, model, before, task.follow(model, tokenizer))


def memory_needed(config: RunConfig, model: nn.Module) -> dict[str, int]:
    """Bytes by what they are for: the model to train, its untouched copy, gradients, the optimizer's state."""
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "model": 4 * parameters,
        "untouched copy": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer state": state_bytes(config, parameters),
    }


def check_room(config: RunConfig, model: nn.Module) -> None:
    """Refuse a run whose weights, gradients and states alone do not fit, or whose model would not fit on the disk."""
    import shutil

    import psutil

    needed = memory_needed(config, model)
    device, _ = device_and_precision()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = psutil.virtual_memory().available + needed["model"]  # which is loaded already
    if sum(needed.values()) > free:
        parts = ", ".join(f"{name} {runs.bytes_text(size)}" for name, size in needed.items())
        raise UserError(
            f"not enough memory: {config.optimizer} on {config.model} needs {runs.bytes_text(sum(needed.values()))} "
            f"({parts}) and {runs.bytes_text(free)} are free; use a smaller model or an optimizer with fewer states"
        )
    where = next(path for path in (Path(config.out), *Path(config.out).absolute().parents) if path.exists())
    room, free_disk = needed["model"] * config.save_model, shutil.disk_usage(where).free
    if config.save_every:
        room += 2 * (
            needed["model"] + needed["optimizer state"]
        )  # the Trainer writes the new before it removes the old
    if room > free_disk:
        raise UserError(
            f"not enough disk: {config.out} needs {runs.bytes_text(room)} for the model and its checkpoints, and "
            f"{runs.bytes_text(free_disk)} are free; give --out elsewhere, or --save-model false"
        )


class _Watch(TrainerCallback):
    """Follows the forget/keep curve and the time of every step, without the time that the curve takes."""

    def __init__(self, points: Sequence[int], measure: Callable[[], dict[str, float]], bar: tqdm) -> None:
        self.points, self.measure, self.bar = set(points), measure, bar
        self.curve: list[dict[str, float]] = []
        self.step_seconds: list[float] = []
        self.began = 0.0
        self.measuring_seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self.began)
        self.bar.update(state.global_step - self.bar.n)
        if state.global_step in self.points:
            began = time.perf_counter()
            self.curve.append({"step": state.global_step, **self.measure()})
            self.measuring_seconds += time.perf_counter() - began


def train(prepared: Prepared, config: RunConfig, folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """Unlearn by one method from the prepared model: the run's entry in results.json, records apart.

    Args:
        folder: the run's own folder, for checkpoints, the model and records.jsonl.
    """
    task, tokenizer = prepared.task, prepared.tokenizer
    losses, turns, refusals = losses_of(config), turns_of(config), refusals_of(config)
    device, has_bf16 = device_and_precision()
    model = copy.deepcopy(prepared.model)
    if config.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5
        (enable or model.gradient_checkpointing_enable)()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    micro = config.micro_batch_size or config.batch_size

    points = [round(config.steps * i / config.curve_points) for i in range(1, config.curve_points + 1)]
    bar = tqdm(total=config.steps, desc=config.method, unit="step", leave=False, disable=None)
    watch = _Watch(points, lambda: task.follow(model, tokenizer), bar)
    trainer = UnlearnTrainer(
        model,
        TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            gradient_accumulation_steps=-(-config.batch_size // micro),
            learning_rate=config.lr,
            lr_scheduler_type="linear",
            warmup_steps=round(config.steps * config.warmup_ratio),
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            bf16=has_bf16 if config.bf16 is None else config.bf16,
            use_cpu=device.type == "cpu",
            seed=config.seed,
            logging_steps=config.log_every,
            report_to=config.report_to,
            save_strategy="steps" if config.save_every else "no",
            save_steps=config.save_every or 500,
            save_total_limit=1,
            disable_tqdm=True,
        ),
        objectives={
            name: Objective(task.objectives[name], losses[name], getattr(config, f"{name}_weight"), refusals)
            for name in OBJECTIVES
        },
        turns=turns,
        processing_class=tokenizer,
        reference=prepared.model if any(loss.needs_reference for loss in losses.values()) else None,
        max_length=config.max_length,
        optimizer_cls_and_kwargs=optimizer_of(config),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)  # the bar shows how far it is, the report what was logged
    began = time.perf_counter()
    with bar:
        trainer.train(resume_from_checkpoint=_checkpoint(folder) if resume else None)
    seconds = time.perf_counter() - began - watch.measuring_seconds
    after = task.evaluate(model, tokenizer)
    if config.save_model:
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    runs.write_records(folder / "records.jsonl", prepared.before.records, after.records)
    return {
        "method": config.method,
        "seed": config.seed,
        "config": config.as_dict(),
        "before": prepared.before.numbers,
        "after": after.numbers,
        "curve": [{"step": 0, **prepared.start}, *watch.curve],
        "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
        "samples": runs.samples(prepared.before.records, after.records),
        "seconds": round(seconds, 1),
        "step_seconds": round(statistics.median(watch.step_seconds), 3) if watch.step_seconds else None,
        "optimizer_state_bytes": _bytes_of(trainer.optimizer),
        "peak_memory_bytes": _peak(device),
    }


def _checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(str(folder / "checkpoints")) if (folder / "checkpoints").is_dir() else None


def _bytes_of(optimizer: Any) -> int:
    """Bytes of all state tensors, found wherever they are nested."""

    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        return sum(map(size, value.values())) if isinstance(value, dict) else 0

    return sum(size(state) for state in optimizer.state.values())


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run(
    configs: Sequence[RunConfig], out: str | Path, *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Run one method, or several from the same start and budget, and write the folder that `dualoptim.runs` describes.

    Args:
        configs: one for each run; they differ in method and seed alone.
        out: the folder.
        resume: take over the runs that the folder holds with the same config, and go on from checkpoints.
        overwrite: replace what the folder holds, once everything has been checked.
    """
    runs.check_folder(out, resume=resume, overwrite=overwrite)
    for config in configs:
        check(config)
    finished = runs.finished(out, configs) if resume else []
    missing = [config for config in configs if config.as_dict() not in [entry["config"] for entry in finished]]
    if finished:
        print(f"Taken over from {out}: {', '.join(entry['method'] for entry in finished)}")
    if not missing:
        results = runs.read_results(out)
        report.write(results, Path(out) / "report.html")
        return results
    prepared = prepare(missing[0])
    folder = runs.open_folder(out, overwrite=overwrite)
    resolved = [config.as_dict() for config in configs]
    runs.write_yaml(folder / "config.resolved.yaml", resolved[0] if len(resolved) == 1 else {"runs": resolved})
    runs.write_json(folder / "env.json", runs.environment())
    results = {
        "schema": runs.SCHEMA,
        "task": prepared.task.name,
        "model": configs[0].model,
        "followed": prepared.task.followed,
        "metrics": {name: metric._asdict() for name, metric in prepared.task.metrics.items()},
        "counts": counts(prepared.before),
        "runs": finished,
    }
    for config in missing:
        own = folder if len(configs) == 1 else folder / f"{runs.slug(config.method)}-seed{config.seed}"
        own.mkdir(exist_ok=True)
        results["runs"].append(train(prepared, config, own, resume=resume))
        results["runs"].sort(key=lambda entry: resolved.index(entry["config"]))
        runs.write_json(folder / runs.RESULTS, results)
        report.write(results, folder / "report.html")
    return results


def counts(scores: Scores) -> dict[str, int]:
    """How many questions each share among the numbers was measured on."""
    return {
        name: sum(record["set"] == name.removesuffix("_accuracy") for record in scores.records)
        for name in scores.numbers
        if name.endswith("_accuracy")
    }


def methods_of(config: RunConfig, methods: Sequence[str], seeds: Sequence[int]) -> list[RunConfig]:
    """The config once for each method and seed."""
    for name in methods:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    return [config.replace(**METHODS[name], seed=seed) for name in methods for seed in seeds]
