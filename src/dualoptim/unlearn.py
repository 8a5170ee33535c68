"""Unlearning runs: config → model, task, trainer → results.

`prepare` loads the model, having taught it the rows if need be, and scores it as it is; `train` is one method's
training and scoring; `run` does one method or several from the same start, or one part of a task after the other, and
writes the folder that `dualoptim.runs` describes.
"""

from __future__ import annotations

import gc
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from . import report, resolve, runs
from .chat import end_ids, turn_of
from .combine import RULES
from .config import RunConfig
from .data import encode
from .errors import UserError
from .evaluation import general
from .evaluation.numbers import Metric
from .evaluation.scoring import negative_log_likelihoods
from .models import (
    configuration,
    device_and_precision,
    load_model,
    load_tokenizer,
    positions,
    quiet,
    scored_in,
    scoring_in,
)
from .stopping import Best
from .tasks import Task
from .trainer import Objective, UnlearnTrainer

Records = list[dict[str, Any]]


class Scores(NamedTuple):
    """A model's numbers on a task, why some are None, and the per-sample records that they were made of."""

    numbers: dict[str, float | None]
    missing: dict[str, str]
    records: Records


@dataclass
class Prepared:
    """What every method of a comparison starts from."""

    task: Task
    tokenizer: Any
    model: str  # folder or hub id; each method loads it anew, since a copy kept for that would be one more in memory
    reference: PreTrainedModel | None  # the model as it is, where a loss needs all that it says
    before: Scores
    retrained: Records | None  # of a model that never saw the rows to forget
    start: dict[str, float]  # of the curves
    left: dict[str, float]  # mean negative log-likelihood of each objective's rows, where the ratio is by loss

    metrics: Mapping[str, Metric]


def prepare(config: RunConfig) -> Prepared:
    """Load the model, check rows, memory and disk, and score the model as it is."""
    task = resolve.check(config)
    start, retrained = resolve.start_of(config, task)
    tokenizer = load_tokenizer(start, config.chat_template)
    shape = configuration(start)
    room, vocabulary = positions(shape), shape.get_text_config().vocab_size
    refusals = resolve.refusals_of(config)
    longest = max(refusals, key=len)
    for name, rows in task.objectives.items():
        refused = resolve.losses_of(config, task)[name].needs_idk
        for row in rows:
            if (most := max(encode(row, tokenizer, config.max_length, room).input_ids)) >= vocabulary:
                raise UserError(
                    f"{row.where}: holds the token {tokenizer.convert_ids_to_tokens(most)!r}, number {most}, and the "
                    f"model {start} has {vocabulary}; resize its embedding, or take its own tokenizer"
                )
            if refused and not row.fields.get("instead"):
                encode(row.answered(longest), tokenizer, config.max_length, room)
    device, _ = device_and_precision()
    gold = None
    if retrained is not None:
        gold = task.score_retrained(load_model(retrained).to(device), tokenizer)
    model = load_model(start)
    resolve.check_losses(config, task, model)
    resolve.check_room(config, task, model)
    model.to(device)
    records = with_general(config, model, tokenizer, task.prepare(model, tokenizer))
    numbers, metrics = general.scored(task, records, gold)
    curve = task.follow(model, tokenizer)
    reference = model if resolve.needs_second_model(config, task) else None
    left = _left_to_learn(task, model, tokenizer) if config.ratio == "loss" else {}
    return Prepared(task, tokenizer, start, reference, Scores(*numbers, records), gold, curve, left, metrics)


def with_general(config: RunConfig, model: Any, tokenizer: Any, records: Records) -> Records:
    """A task's records of a model, and those of general ability that a config asks for."""
    return [*records, *general.records(model, tokenizer, config.lm_eval, config.lm_eval_limit)]


LEFT_ROWS = 32  # of each objective, for the ratio by loss


def _left_to_learn(task: Task, model: Any, tokenizer: Any) -> dict[str, float]:
    """The mean negative log-likelihood, in nats a token, of answers of each objective."""
    return {
        name: statistics.fmean(
            negative_log_likelihoods(model, tokenizer, random.Random(0).sample(rows, min(LEFT_ROWS, len(rows))))
        )
        for name, rows in task.objectives.items()
    }


class _Watch(TrainerCallback):
    """Follows the forget/keep curve and the time of every step, without the time that the curve takes."""

    def __init__(
        self,
        points: Sequence[int],
        measure: Callable[[], dict[str, float]],
        bar: tqdm,
        best: Best | None,
        paused: set[str] | None,
    ) -> None:
        self.points, self.measure, self.bar, self.best, self.paused = set(points), measure, bar, best, paused
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
            if self.best is not None:
                self.best.look(state.global_step, self.curve[-1], control)
                if self.paused is not None:
                    (self.paused.add if self.best.reached(self.curve[-1]) else self.paused.discard)("forget")
            self.measuring_seconds += time.perf_counter() - began


def train(prepared: Prepared, config: RunConfig, folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """Unlearn by one method from the prepared model: the run's entry in results.json, records apart.

    Args:
        folder: the run's own folder, for checkpoints, the model and records.jsonl.
    """
    task, tokenizer = prepared.task, prepared.tokenizer
    losses, refusals = resolve.losses_of(config, task), resolve.refusals_of(config)
    turns = resolve.turns_of(config, task, prepared.left)
    device, has_bf16 = device_and_precision()
    model: Any = load_model(prepared.model).to(device)
    if config.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5
        (enable or model.gradient_checkpointing_enable)()
    if config.lora_rank:
        model = _with_adapter(model, config)
    elif config.train is not None:
        resolve.train_only(config.train, model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    micro = config.micro_batch_size or config.batch_size

    steps = len(turns)
    points = [round(steps * i / config.curve_points) for i in range(1, config.curve_points + 1)]
    bar = tqdm(total=steps, desc=config.method, unit="step", leave=False, disable=None)
    best = None
    if config.until is not None or config.keep_at_least is not None:
        best = Best(model, prepared.start, config.until, config.keep_at_least, len(points))
    paused: set[str] = set()  # what the watch pauses, the trainer skips
    watch = _Watch(points, lambda: task.follow(model, tokenizer), bar, best, paused if config.pause else None)
    trainer = UnlearnTrainer(
        model,
        TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            gradient_accumulation_steps=-(-config.batch_size // micro),
            learning_rate=config.lr,
            lr_scheduler_type="linear",
            warmup_steps=round(steps * config.warmup_ratio),
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
            name: Objective(
                task.objectives[name],
                losses[name],
                {**task.weights, **config.weights}.get(name, 1.0),
                refusals,
                bound=config.retain_bound if name == "retain" else None,
                multiplier_lr=config.multiplier_lr,
            )
            for name in task.objectives
        },
        turns=turns,
        processing_class=tokenizer,
        reference=prepared.reference,
        combine=RULES[config.combine] if config.combine else None,
        max_length=config.max_length,
        optimizer_cls_and_kwargs=resolve.optimizer_of(config, list(task.objectives)),
        callbacks=[watch],
    )
    trainer.paused = paused
    trainer.remove_callback(PrinterCallback)  # the bar shows how far it is, the report what was logged
    began = time.perf_counter()
    with bar, quiet():
        trainer.train(resume_from_checkpoint=_checkpoint(folder) if resume else None)
    seconds = time.perf_counter() - began - watch.measuring_seconds
    state_bytes, logged, read = _bytes_of(trainer.optimizer), trainer.state.log_history, trainer.diagnostics
    del trainer  # and with it gradients and states, before scoring needs room for logits
    model.zero_grad()
    stopped = best.restore() if best is not None else None
    del best, watch.best
    if config.lora_rank:
        model = model.merge_and_unload()
    gc.collect()
    records = with_general(config, model, tokenizer, task.score(model, tokenizer))
    after = Scores(*general.scored(task, records, prepared.retrained)[0], records)
    if config.save_model:
        # What the model was taught to end an answer with, which its file may not name.
        around = {turn_of(tokenizer, row.prompt, row.where) for rows in task.objectives.values() for row in rows}
        model.generation_config.eos_token_id = end_ids(tokenizer, around)
        with quiet():
            model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    runs.write_records(folder / "records.jsonl", prepared.before.records, after.records, prepared.retrained)
    if not config.save_every:
        (folder / "checkpoints").rmdir()  # the Trainer makes it in any case
    return {
        "method": config.method,
        "seed": config.seed,
        "config": config.as_dict(),
        "before": prepared.before.numbers,
        "after": after.numbers,
        "not_computed": after.missing,
        "verdict": task.verdict(prepared.before.records, after.records),
        "stopped": stopped,
        "curve": [{"step": 0, **prepared.start}, *watch.curve],
        "losses": [entry for entry in logged if "loss" in entry],
        "diagnostics": read[-1] if read else None,
        "samples": runs.samples(prepared.before.records, after.records),
        "scored_in": scored_in(),
        "seconds": round(seconds, 1),
        "step_seconds": round(statistics.median(watch.step_seconds), 3) if watch.step_seconds else None,
        "optimizer_state_bytes": state_bytes,
        "peak_memory_bytes": _peak(device),
    }


def _with_adapter(model: Any, config: RunConfig) -> nn.Module:
    """The model with a low-rank adapter on every linear layer but the head; the adapter alone is trained."""
    from peft import LoraConfig, get_peft_model

    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    # α = 2 r and all linear layers, as QLoRA found best and PEFT's guides have it.
    lora = LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear")
    return get_peft_model(model, lora)


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
        resume: take over the runs that the folder holds with the same config, and go on from checkpoints. What is
            gone on with has its curve and its time from there on alone.
        overwrite: replace what the folder holds, once everything has been checked.
    """
    with scoring_in(configs[0].score_bf16):
        return _run(configs, out, resume=resume, overwrite=overwrite)


def _run(configs: Sequence[RunConfig], out: str | Path, *, resume: bool, overwrite: bool) -> dict[str, Any]:
    runs.check_folder(out, resume=resume, overwrite=overwrite)
    checked = [resolve.check(config) for config in configs]
    if stages := checked[0].stages():
        return _one_after_the_other(configs, stages, Path(out), resume=resume, overwrite=overwrite)
    finished = runs.finished(out, configs) if resume else []
    missing = [config for config in configs if config.as_dict() not in [entry["config"] for entry in finished]]
    if finished:
        print(f"Taken over from {out}: {', '.join(entry['method'] for entry in finished)}")
    if not missing:
        results = runs.read_results(out)
        report.write(results, Path(out) / "report.html")
        return results
    prepared = prepare(missing[0])
    for note in prepared.task.notes:
        print(note, flush=True)
    folder = runs.open_folder(out, overwrite=overwrite)
    resolved = runs.write_settings(folder, configs)
    if prepared.task.built:
        runs.write_rows(folder, prepared.task.objectives)
    results = {
        "schema": runs.SCHEMA,
        "task": prepared.task.name,
        "model": configs[0].model,
        "followed": prepared.task.followed,
        "curves": dict(prepared.task.curves),
        "scores": dict(prepared.task.scores),
        "metrics": {name: metric._asdict() for name, metric in prepared.metrics.items()},
        "counts": prepared.task.counts(prepared.before.records),
        "notes": list(prepared.task.notes),
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


def _one_after_the_other(
    configs: Sequence[RunConfig], stages: Sequence[dict[str, Any]], out: Path, *, resume: bool, overwrite: bool
) -> dict[str, Any]:
    """Forget one part of a task after the other, each from the model that the one before it left.

    Every method has a folder, and in it every part has its own run; all of them together are in OUT's results.
    """
    runs.finished(out, configs) if resume else None
    runs.write_settings(runs.open_folder(out, overwrite=overwrite), configs)
    results: dict[str, Any] = {}
    for config in configs:
        model: str | None = None
        for i, arguments in enumerate(stages):
            stage = config.replace(task_args={**config.task_args, **arguments})
            start, retrained = resolve.start_of(stage, resolve.check(stage))
            stage = stage.replace(model=model or start, retrained=retrained, memorise=False, memorise_args={})
            if i + 1 < len(stages):
                stage = stage.replace(save_model=True)
            folder = out / f"{runs.slug(config.method)}-seed{config.seed}" / f"part{arguments['part']}"
            folder.parent.mkdir(exist_ok=True)
            done = run([stage.replace(out=str(folder))], folder, resume=resume)
            model = str(folder / "model")
            results = results or {**done, "model": config.model, "runs": []}
            results["runs"].append({**done["runs"][0], "part": arguments["part"]})
            runs.write_json(out / runs.RESULTS, results)
            report.write(results, out / "report.html")
    return results
