"""A run's steps by one method, the scores after them, and its entry in results.json."""

from __future__ import annotations

import gc
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainingArguments

from .. import adapters, checkpoints, ranks, resolve, runs
from ..certify import evidence
from ..chat import end_ids, turn_of
from ..checkpoints import sha256
from ..device import device_and_precision, scored_in
from ..errors import UserError
from ..evaluation import general
from ..evaluation.collapse import collapse
from ..evaluation.scoring import is_finite
from ..folder import ADAPTER, CARD, CHECKPOINTS, LOGS, MODEL, RECORDS, SAVED, into_place, saved, written
from ..models import copy_processor, load_model, quiet, source
from ..resolved import Resolved
from ..rows import alternates
from ..schedule import Turn, equal_weights
from ..trainer import Objective, UnlearnTrainer
from ..training import reporting
from ..training.combine import RULES
from .keeping import with_records
from .prepared import ABILITY, Prepared, Scores, loading, with_more
from .stopping import Best
from .watch import Watch, bytes_of, peak_memory, points_in

DIAGNOSTICS_EVERY = 50  # optimizer steps; a reading costs about as much as one


def train(
    prepared: Prepared,
    resolved: Resolved,
    folder: Path,
    keep: Callable[[dict[str, Any]], Mapping[str, str] | None],
    *,
    resume: bool = False,
) -> None:
    """Unlearn by one method from the prepared model.

    Args:
        folder: the run's own folder, for checkpoints, the model and records.jsonl.
        keep: called with the run's entry of results.json once everything is scored, before the model is written, which
            takes the most disk space, and by the first rank alone; returns the model cards by the names of their
            folders, or None.
    """
    config, task, tokenizer = resolved.config, resolved.task, resolved.tokenizer
    device, _ = device_and_precision()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trained = _steps(prepared, resolved, folder, resume)
    finite = is_finite(trained.model, tokenizer, [rows[0] for rows in task.objectives.values()])
    if finite:
        _score(trained, prepared, resolved, folder)
    else:
        numbers, why = prepared.before.numbers, "the model's numbers are not finite after training"
        trained.scores = Scores(dict.fromkeys(numbers), dict.fromkeys(numbers, why), [])
    before, after = prepared.before, trained.scores
    effective = {when: task.effective_counts(scores.records) for when, scores in (("before", before), ("after", after))}
    perplexities = before.numbers.get("perplexity"), after.numbers.get("perplexity")
    entry = {
        "method": config.method,
        "seed": config.seed,
        "config": config.as_dict(),
        "files": dict(resolved.files),
        "fingerprints": {**resolved.fingerprints, **prepared.fingerprints},
        "before": before.numbers,
        "after": after.numbers,
        "not_computed": after.missing,
        **({"effective_counts": effective} if any(effective.values()) else {}),
        **({"merging": trained.merging} if trained.merging else {}),
        "finite": finite,
        "verdict": task.verdict(before.records, after.records) if finite else "",
        "collapse": collapse(before.records, after.records, perplexities, trained.steps["losses"], task.kept),
        **trained.steps,
        "samples": runs.samples(before.records, after.records),
        "environment": runs.environment(),
        "scored_in": scored_in(),
        "peak_memory_bytes": max(ranks.gathered(peak_memory(device))),
    }

    def write() -> None:
        runs.write_records(folder / RECORDS, before.records, after.records, prepared.retrained, private=config.private)

    cards = ranks.of_first(lambda: with_records(folder, write, lambda: keep(entry)))
    if cards and (folder / ADAPTER).is_dir():
        written(folder / ADAPTER / CARD, cards[ADAPTER])
    if trained.failed is not None:
        raise trained.failed
    if finite and MODEL in resolved.saved:
        model = trained.model
        # The generation config may lack the tokens that the model learned to end an answer with.
        around = {turn_of(tokenizer, row.prompt, row.where) for rows in task.objectives.values() for row in rows}
        model.generation_config.eos_token_id = end_ids(tokenizer, around, model)
        started = prepared.model
        _write(folder / MODEL, lambda model, place: model.save_pretrained(place), model, tokenizer, started, cards)


@dataclass
class _Trained:
    """The model after its steps, and what is known of it."""

    model: Any  # with its adapter merged into it, once it is, if it is to be
    steps: dict[str, Any]  # what the run's entry has of them
    scores: Scores = field(default_factory=lambda: Scores({}, {}, []))
    merging: dict[str, Any] = field(default_factory=dict)  # scores before and after an adapter is merged
    failed: UserError | None = None  # raised once the numbers are kept: training is not lost to it


def _steps(prepared: Prepared, resolved: Resolved, folder: Path, resume: bool) -> _Trained:
    """Take a run's steps, or what is left of them after its newest checkpoint."""
    model, turns = _model(prepared, resolved), resolved.turns(prepared.left)
    watch = _watch(prepared, resolved, model, len(turns))
    trainer = _trainer(prepared, resolved, model, turns, watch, folder)
    made_of = trainer.fingerprints if resume else None
    begun = ranks.of_first(lambda: _begun(folder / CHECKPOINTS, made_of))
    with watch.bar, quiet():
        trainer.train(resume_from_checkpoint=str(begun) if begun else None)
    read = trainer.diagnostics
    steps: dict[str, Any] = {
        "curve": [{"step": 0, **prepared.start}, *watch.curve],
        "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
        "skipped_steps": dict(trainer.multi_objective.num_skipped) if trainer.multi_objective else {},
        "diagnostics": read[-1] if read else None,
        "seconds": round(watch.seconds, 1),
        "watching_seconds": round(watch.watching, 1),
        "step_seconds": round(statistics.median(watch.step_seconds), 3) if watch.step_seconds else None,
        "optimizer_state_bytes": bytes_of(trainer.optimizer),
    }
    del trainer  # frees gradients and states before scoring, which needs memory for logits
    model.zero_grad()
    steps["stopped"] = watch.best.restore() if watch.best is not None else None
    del watch  # and the weights of the best point
    gc.collect()
    ranks.of_first(lambda: checkpoints.clear(folder / CHECKPOINTS))
    with suppress(OSError):  # the Trainer always makes it; it stays if checkpoints are in it
        (folder / CHECKPOINTS).rmdir()
    return _Trained(model, steps)


def _model(prepared: Prepared, resolved: Resolved) -> Any:
    """The model as it was before unlearning, loaded anew, with what is trained of it."""
    config = resolved.config
    device, _ = device_and_precision()
    model: Any = load_model(prepared.model, **loading(config)).to(device)
    if config.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5
        (enable or model.gradient_checkpointing_enable)()
    if config.lora_rank:
        model = adapters.added(model, config, source(prepared.model))
    if config.gradient_checkpointing and resolved.adapted:
        model.enable_input_require_grads()  # or the graph would be cut below the first adapter
    if config.train is not None:
        resolve.train_only(config.train, model)
    return model


def _watch(prepared: Prepared, resolved: Resolved, model: Any, steps: int) -> Watch:
    """What measures the curve during so many steps, and stops the run where the config has a goal or a floor."""
    config, task, tokenizer = resolved.config, resolved.task, resolved.tokenizer
    points = points_in(steps, config.curve_points)
    best = None
    if config.until is not None or config.keep_at_least is not None:
        kept = [name for name in (*task.kept, ABILITY) if name in prepared.start]
        best = Best(model, prepared.start, config.until, config.keep_at_least, len(points), kept, task.left)

    def measure() -> dict[str, float | None]:
        able = {ABILITY: prepared.ability(model)} if prepared.ability else {}
        return {**task.follow(model, tokenizer), **able}

    bar = tqdm(total=steps, desc=config.method, unit="step", leave=False, disable=None)
    return Watch(points, measure, bar, best, set() if config.pause else None)


def _trainer(
    prepared: Prepared, resolved: Resolved, model: Any, turns: Sequence[Turn], watch: Watch, folder: Path
) -> UnlearnTrainer:
    """The trainer of the turns, with the config's optimizer, losses and weights."""
    config, task, steps = resolved.config, resolved.task, len(turns)
    device, _ = device_and_precision()
    micro = config.micro_batch_size or config.batch_size
    weights = {**task.weights, **config.weights}
    bound: dict[str, Any] = {}
    if config.multiplier_start is not None:
        weights["retain"] = config.multiplier_start
    if config.retain_bound is not None:
        warmup = round(config.multiplier_warmup * steps)
        bound = {"bound": config.retain_bound, "multiplier_lr": config.multiplier_lr, "multiplier_warmup": warmup}

    def rows(name: str) -> Any:
        if name in prepared.alternates:
            return alternates.never_without(prepared.alternates[name], resolved.refusals)
        return task.objectives[name]

    adapters.compute_in(model, bool(config.bf16))  # in training, the reference included; scoring changes it by itself
    trainer = UnlearnTrainer(
        model,
        TrainingArguments(
            output_dir=str(folder / CHECKPOINTS),
            gradient_accumulation_steps=-(-config.batch_size // (micro * ranks.size())),
            learning_rate=config.lr,
            lr_scheduler_type="linear" if config.lr_decay else "constant_with_warmup",
            warmup_steps=round(steps * config.warmup_ratio),
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            bf16=config.bf16,
            use_cpu=device.type == "cpu",
            seed=config.seed,
            logging_steps=config.log_every,
            report_to="none" if config.report_to in reporting.NOWHERE else config.report_to,
            save_strategy="steps" if config.save_every else "no",
            save_steps=config.save_every or 500,
            save_total_limit=1,
            disable_tqdm=True,
        ),
        objectives={
            name: Objective(
                rows(name),
                resolved.losses[name],
                weights.get(name, 1.0),
                resolved.refusals,
                **bound if name == "retain" else {},
            )
            for name in task.objectives
            if any(name in turn for turn in turns)
        },
        turns=turns,
        processing_class=resolved.tokenizer,
        log_dir=folder / LOGS,
        reference=prepared.reference,
        combine=RULES[config.combine] if config.combine else None,
        sam_rho=config.sam_rho,
        max_length=config.max_length,
        diagnostics_every=0 if config.fast else DIAGNOSTICS_EVERY,
        release_gradients=config.release_gradients,
        optimizer_cls_and_kwargs=_optimizer(resolved, turns),
        callbacks=[watch, *([watch.best] if watch.best is not None else [])],
        fingerprints=resolved.identity,
    )
    if watch.paused is not None:
        trainer.paused = watch.paused
    trainer.remove_callback(PrinterCallback)  # the bar shows how far it is, the report what was logged
    return trainer


def _score(trained: _Trained, prepared: Prepared, resolved: Resolved, folder: Path) -> None:
    """Score the trained model; write its adapter and merge it, and score the merged model, if the config says so."""
    config, task, tokenizer = resolved.config, resolved.task, resolved.tokenizer
    trained.model.requires_grad_(False)

    def scored(attacked: bool = True) -> Scores:
        made, before = config.attacks if attacked else (), prepared.before.records
        records = task.score(trained.model, tokenizer)
        records = with_more(config, task, trained.model, tokenizer, records, made, before)
        return Scores(*general.scored(task, records, prepared.retrained)[0], records)

    after = trained.scores = scored(attacked=not resolved.merge)
    try:
        if ADAPTER in resolved.saved:
            _write(folder / ADAPTER, adapters.save, trained.model, tokenizer, prepared.model)
        if resolved.merge:
            trained.model = _merged(trained.model, resolved, prepared)
            merged = scored()
            both = {"unmerged": after.numbers, "merged": merged.numbers}
            for how in ("bf16", *(["nf4"] if config.load_in_4bit else [])):
                with adapters.rounded(trained.model, how):
                    both[f"merged_{how}"] = scored(attacked=False).numbers
            trained.scores, trained.merging = merged, both
    except UserError as error:
        trained.failed = error
    except Exception as error:  # such as for want of memory
        if ranks.several():  # the others may wait in scoring
            raise
        trained.failed = UserError(
            f"{folder}: the adapter could not be merged, or the merged model not scored ({_told(error)}); the "
            "numbers of the adapter on its base are kept; mend that, or give --merge false and another --out"
        )
    if trained.failed is not None:  # what is attacked was to be the merged model
        lacking = [name for name in prepared.before.numbers if name not in after.numbers]
        reasons = dict.fromkeys(lacking, "the adapter could not be merged, or not written")
        trained.scores = Scores(
            {**after.numbers, **dict.fromkeys(lacking)}, {**after.missing, **reasons}, after.records
        )


def _optimizer(resolved: Resolved, turns: Sequence[Turn]) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer's class and arguments, with the base weights that follow from the schedule."""
    cls, arguments = resolved.optimizer
    for key in ("base_weights", "lr_scales"):
        if key in arguments and getattr(resolved.config, key) == "equal":
            arguments = {**arguments, key: equal_weights(turns)}
    return cls, arguments


def _merged(model: Any, resolved: Resolved, prepared: Prepared) -> Any:
    """The model with its adapter merged into it; a base in 4 bits is dequantized first."""
    if resolved.config.load_in_4bit:
        base = adapters.base_of(prepared.model) or prepared.model
        model = adapters.moved(model, load_model(base, in_4bit=True).dequantize())
    return adapters.merged(model)


def _begun(folder: Path, fingerprints: Mapping[str, str] | None) -> Path | None:
    """The checkpoint to resume from; None if there is none or no fingerprints are given. Removes unfinished ones."""
    checkpoints.clear(folder)
    return None if fingerprints is None else checkpoints.newest(folder, fingerprints)


@ranks.by_first
def _write(
    folder: Path,
    save: Callable[[Any, Path], None],
    model: Any,
    tokenizer: Any,
    start: str,
    cards: Mapping[str, str] | None = None,
) -> None:
    """Write a model, or an adapter, completely or not at all; with the processor of the model that it began as."""
    beside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with quiet():
            save(model, beside)
        tokenizer.save_pretrained(beside)
        copy_processor(start, beside)
        if cards:
            (beside / CARD).write_text(cards[folder.name], encoding="utf-8")
        if folder.is_symlink():  # to where an earlier model was moved
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        # Before it is in its place: a model that is there has its own hashes, or none.
        hashes = {name: sha256(path) for name, path in evidence.of_model(beside).items()}
        runs.write_json(folder.parent / SAVED, {**saved(folder.parent), folder.name: hashes})
        into_place(beside, folder)
    except Exception as error:  # of the disk, of safetensors, or of a class of models
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(
            f"{folder}: the model could not be written ({_told(error)}); the numbers are in {folder.parent}; mend "
            "that, such as by making room, and go on with --resume"
        ) from None


def _told(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
