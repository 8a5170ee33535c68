"""Unlearning runs: config → model, task, trainer → results.

`prepare` loads the model, lets it memorize the rows first if asked, and scores it before unlearning; `train` trains and
scores one method; `run` does one method or several from the same start, or one part of a task after the other, and
writes the folder that `dualoptim.runs` describes. With several ranks (`dualoptim.ranks`), all do this, and one writes.
"""

from __future__ import annotations

import gc
import random
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from . import adapters, checkpoints, ranks, report, resolve, runs
from .cached import without_cache
from .certify import evidence
from .chat import end_ids, turn_of
from .checkpoints import sha256
from .config import RunConfig, without_place
from .data import Row
from .device import device_and_precision, scored_in, scoring_in, settled
from .errors import UserError
from .evaluation import attacks, digits, general, probes
from .evaluation.ability import Ability
from .evaluation.collapse import collapse
from .evaluation.numbers import Metric
from .evaluation.scoring import is_finite, negative_log_likelihoods
from .folder import (
    ADAPTER,
    CARD,
    CHECKPOINTS,
    LOGS,
    MODEL,
    PAGE,
    PARTS,
    RECORDS,
    RESULTS,
    RUNS,
    SAVED,
    check_kind,
    clear,
    emptied,
    into_place,
    move_own,
    owned,
    saved,
    written,
)
from .folder import check as check_folder
from .grid import complete, together
from .hashes import digest
from .models import copy_processor, load_model, quiet, source
from .points import Run, points_of
from .report import card
from .resolved import Origin, Resolved
from .resolved import resolve as resolve_all
from .rows import alternates
from .schedule import Turn, equal_weights
from .stopping import Best
from .tasks import Task
from .trainer import Objective, UnlearnTrainer
from .training import reporting
from .training.combine import RULES
from .watch import Watch, bytes_of, peak_memory, points_in

Records = list[dict[str, Any]]


class Scores(NamedTuple):
    """A model's numbers on a task, why some are None, and the per-sample records that they were computed from."""

    numbers: dict[str, float | None]
    missing: dict[str, str]
    records: Records


@dataclass
class Prepared:
    """What every method of a comparison starts from."""

    model: str  # folder or hub id; each method loads it anew, as keeping a copy for that would take memory
    reference: PreTrainedModel | None  # the model as it is, where a loss needs all of its logits
    before: Scores
    retrained: Records | None  # of a model that never saw the rows to forget
    start: dict[str, float | None]  # the curves' values before training
    ability: Ability | None  # general ability, watched where keep_at_least sets a floor and the task watches none
    left: dict[str, float]  # mean negative log-likelihood of each objective's rows, for the ratio "loss"

    metrics: Mapping[str, Metric]
    alternates: dict[str, list[Row]]  # rows with alternates, for objectives whose loss needs them
    notes: list[str]  # on the checks during training and the alternates, for readers of the results

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the inputs that only the model could give: the alternates."""
        return {"alternates": digest(self.alternates)} if self.alternates else {}


def prepare(resolved: Resolved, kept: Path | None = None) -> Prepared:
    """Load the model, after it has memorized the rows if asked, and score it before unlearning.

    Args:
        kept: file of rows with alternates that an earlier, unfinished run may have written.
    """
    config, task, tokenizer = resolved.config, resolved.task, resolved.tokenizer
    start = resolved.start.place()
    device, _ = device_and_precision()
    gold = _retrained(resolved)
    model = load_model(start, **_loading(config)).to(device).requires_grad_(False)
    records = with_more(config, task, model, tokenizer, task.prepare(model, tokenizer), config.attacks)
    numbers, metrics = general.scored(task, records, gold)
    curve, ability = dict(task.follow(model, tokenizer)), None
    if config.keep_at_least is not None and not task.watches_ability:
        watched = Ability(model, tokenizer)
        ability = watched if watched.measures else None
        curve |= {ABILITY: 1.0} if ability else {}
    checks = _nothing_asked(config, task, curve)
    reference = model if resolved.needs_second_model else None
    left = _left_to_learn(task, model, tokenizer) if config.ratio == "loss" else {}
    others, notes = alternates.of_run(
        resolved.losses, task.objectives, model, tokenizer, max_length=config.max_length, kept=kept
    )
    before = Scores(*numbers, records)
    return Prepared(start, reference, before, gold, curve, ability, left, metrics, others, checks + notes)


def _nothing_asked(config: RunConfig, task: Task, curve: Mapping[str, float | None]) -> list[str]:
    """Refuse a goal or a floor that no check could decide; a sentence where the floor of your own rows is one.

    They have a floor by default, and forgetting alone may decide.
    """
    if config.until is not None and curve.get("forget") is None:
        raise UserError("until: nothing that is to be forgotten can be asked during training; leave it out, and pause")
    if config.keep_at_least is None or any(curve.get(name) for name in (*task.kept, ABILITY)):
        return []
    if not task.watches_ability:
        raise UserError("keep_at_least: the model can do nothing yet that could be lost; leave it out")
    return [
        f"The floor of {digits.given(config.keep_at_least)} kept (--keep-at-least) has no effect: the model answered "
        "no included fact and no row of --retain before, so nothing that is to be kept is asked during training; give "
        "rows in --retain that it answers."
    ]


def _loading(config: RunConfig) -> dict[str, Any]:
    """The arguments of `load_model` for every model of a run: the one to train, and those that it is compared with."""
    return {"in_4bit": config.load_in_4bit, "dtype": torch.bfloat16 if config.bf16_weights else torch.float32}


DIAGNOSTICS_EVERY = 50  # optimizer steps; a reading costs about as much as one
ABILITY = "ability"  # the curve of what the model could do before unlearning


def with_more(
    config: RunConfig,
    task: Task,
    model: Any,
    tokenizer: Any,
    records: Records,
    attacked: Sequence[str],
    base: Records | None = None,
) -> Records:
    """A task's records of a model, and those of general ability, attacks and probes that a config asks for.

    All of them have the clusters of their rows, which intervals are computed from.

    Args:
        attacked: the attacks to make.
        base: the records of the model before unlearning; None if `model` is that model.
    """
    able = general.records(model, tokenizer, config.lm_eval, config.lm_eval_limit)
    attacked_records = attacks.records(task, model, tokenizer, attacked, config.relearn_lr)
    probed = probes.records(model, tokenizer, probes.read(config), base)
    return task.clustered([*records, *able, *attacked_records, *probed])


def _retrained(resolved: Resolved) -> Records | None:
    """The records of a model that never saw the rows to forget, with those of attacks that compare with it."""
    if resolved.retrained is None:
        return None
    task, tokenizer = resolved.task, resolved.tokenizer
    device, _ = device_and_precision()
    model = load_model(resolved.retrained.place(), **_loading(resolved.config)).to(device)
    compared = [name for name in resolved.config.attacks if name in attacks.COMPARED]
    records = attacks.records(task, model, tokenizer, compared, resolved.config.relearn_lr)
    return [*task.score_retrained(model, tokenizer), *records]


LEFT_ROWS = 32  # of each objective, for the ratio by loss


def _left_to_learn(task: Task, model: Any, tokenizer: Any) -> dict[str, float]:
    """The mean negative log-likelihood, in nats a token, of answers of each objective."""
    return {
        name: statistics.fmean(
            negative_log_likelihoods(model, tokenizer, random.Random(0).sample(rows, min(LEFT_ROWS, len(rows))))
        )
        for name, rows in task.objectives.items()
    }


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
            takes the most disk space; returns the model cards by the names of their folders, or None.
    """
    config, task, tokenizer = resolved.config, resolved.task, resolved.tokenizer
    turns = resolved.turns(prepared.left)
    device, _ = device_and_precision()
    model: Any = load_model(prepared.model, **_loading(config)).to(device)
    if config.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5
        (enable or model.gradient_checkpointing_enable)()
    if config.lora_rank:
        model = adapters.added(model, config, source(prepared.model))
    if config.gradient_checkpointing and resolved.adapted:
        model.enable_input_require_grads()  # or the graph would be cut below the first adapter
    if config.train is not None:
        resolve.train_only(config.train, model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    micro = config.micro_batch_size or config.batch_size

    steps = len(turns)
    points = points_in(steps, config.curve_points)
    bar = tqdm(total=steps, desc=config.method, unit="step", leave=False, disable=None)
    best = None
    if config.until is not None or config.keep_at_least is not None:
        kept = [name for name in (*task.kept, ABILITY) if name in prepared.start]
        best = Best(model, prepared.start, config.until, config.keep_at_least, len(points), kept, task.left)
    paused: set[str] = set()  # what the watch pauses, the trainer skips

    def measure() -> dict[str, float | None]:
        able = {ABILITY: prepared.ability(model)} if prepared.ability else {}
        return {**task.follow(model, tokenizer), **able}

    watch = Watch(points, measure, bar, best, paused if config.pause else None)
    checkpoints_folder = folder / CHECKPOINTS
    held: dict[str, Any] = {}
    if config.retain_bound is not None:
        warmup = round(config.multiplier_warmup * steps)
        held = {"bound": config.retain_bound, "multiplier_lr": config.multiplier_lr, "multiplier_warmup": warmup}
    adapters.compute_in(model, bool(config.bf16))  # in training, the reference included; scoring changes it by itself
    trainer = UnlearnTrainer(
        model,
        TrainingArguments(
            output_dir=str(checkpoints_folder),
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
                alternates.never_without(prepared.alternates[name], resolved.refusals)
                if name in prepared.alternates
                else task.objectives[name],
                resolved.losses[name],
                config.multiplier_start
                if name == "retain" and config.multiplier_start is not None
                else {**task.weights, **config.weights}.get(name, 1.0),
                resolved.refusals,
                **held if name == "retain" else {},
            )
            for name in task.objectives
            if any(name in turn for turn in turns)
        },
        turns=turns,
        processing_class=tokenizer,
        log_dir=folder / LOGS,
        reference=prepared.reference,
        combine=RULES[config.combine] if config.combine else None,
        sam_rho=config.sam_rho,
        max_length=config.max_length,
        diagnostics_every=0 if config.fast else DIAGNOSTICS_EVERY,
        release_gradients=config.release_gradients,
        optimizer_cls_and_kwargs=_optimizer(resolved, turns),
        callbacks=[watch, *([best] if best is not None else [])],
        fingerprints=resolved.identity,
    )
    trainer.paused = paused
    trainer.remove_callback(PrinterCallback)  # the bar shows how far it is, the report what was logged
    made_of = trainer.fingerprints if resume else None
    begun = ranks.of_first(lambda: _begun(checkpoints_folder, made_of))
    with bar, quiet():
        trainer.train(resume_from_checkpoint=str(begun) if begun else None)
    state_bytes, logged, read = bytes_of(trainer.optimizer), trainer.state.log_history, trainer.diagnostics
    skipped = dict(trainer.multi_objective.num_skipped) if trainer.multi_objective else {}
    del trainer  # frees gradients and states before scoring, which needs memory for logits
    model.zero_grad()
    stopped = best.restore() if best is not None else None
    del best, watch.best
    gc.collect()
    ranks.of_first(lambda: checkpoints.clear(checkpoints_folder))
    with suppress(OSError):  # the Trainer always makes it; it stays if checkpoints are in it
        checkpoints_folder.rmdir()
    finite = is_finite(model, tokenizer, [rows[0] for rows in task.objectives.values()])

    def scored(attacked: bool = True) -> Scores:
        made, before = config.attacks if attacked else (), prepared.before.records
        records = with_more(config, task, model, tokenizer, task.score(model, tokenizer), made, before)
        return Scores(*general.scored(task, records, prepared.retrained)[0], records)

    merging: dict[str, Any] = {}
    failed: UserError | None = None  # raised once the numbers are kept: training is not lost to it
    if finite:
        model.requires_grad_(False)
        after = scored(attacked=not resolved.merge)
        try:
            if ADAPTER in resolved.saved:
                _write(folder / ADAPTER, adapters.save, model, tokenizer, prepared.model)
            if resolved.merge:
                model = _merged(model, resolved, prepared)
                both = {"unmerged": after.numbers}
                after = scored()
                both["merged"] = after.numbers
                for how in ("bf16", *(["nf4"] if config.load_in_4bit else [])):
                    with adapters.rounded(model, how):
                        both[f"merged_{how}"] = scored(attacked=False).numbers
                merging = both
        except UserError as error:
            failed = error
        except Exception as error:  # such as for want of memory
            if ranks.several():  # the others may wait in scoring
                raise
            failed = UserError(
                f"{folder}: the adapter could not be merged, or the merged model not scored ({_told(error)}); the "
                "numbers of the adapter on its base are kept; mend that, or give --merge false and another --out"
            )
        if failed is not None:  # what is attacked was to be the merged model
            lacking = [name for name in prepared.before.numbers if name not in after.numbers]
            reasons = dict.fromkeys(lacking, "the adapter could not be merged, or not written")
            after = Scores({**after.numbers, **dict.fromkeys(lacking)}, {**after.missing, **reasons}, after.records)
    else:
        why = "the model's numbers are not finite after training"
        after = Scores(dict.fromkeys(prepared.before.numbers), dict.fromkeys(prepared.before.numbers, why), [])
    runs.write_records(
        folder / RECORDS, prepared.before.records, after.records, prepared.retrained, private=config.private
    )
    effective = {
        when: task.effective_counts(scores.records) for when, scores in (("before", prepared.before), ("after", after))
    }
    cards = keep(
        {
            "method": config.method,
            "seed": config.seed,
            "config": config.as_dict(),
            "files": dict(resolved.files),
            "fingerprints": {**resolved.fingerprints, **prepared.fingerprints},
            "before": prepared.before.numbers,
            "after": after.numbers,
            "not_computed": after.missing,
            **({"effective_counts": effective} if any(effective.values()) else {}),
            **({"merging": merging} if merging else {}),
            "finite": finite,
            "skipped_steps": skipped,
            "verdict": task.verdict(prepared.before.records, after.records) if finite else "",
            "stopped": stopped,
            "collapse": collapse(
                prepared.before.records,
                after.records,
                (prepared.before.numbers.get("perplexity"), after.numbers.get("perplexity")),
                logged,
                task.kept,
            ),
            "curve": [{"step": 0, **prepared.start}, *watch.curve],
            "losses": [entry for entry in logged if "loss" in entry],
            "diagnostics": read[-1] if read else None,
            "samples": runs.samples(prepared.before.records, after.records),
            "environment": runs.environment(),
            "scored_in": scored_in(),
            "seconds": round(watch.seconds, 1),
            "watching_seconds": round(watch.watching, 1),
            "step_seconds": round(statistics.median(watch.step_seconds), 3) if watch.step_seconds else None,
            "optimizer_state_bytes": state_bytes,
            "peak_memory_bytes": max(ranks.gathered(peak_memory(device))),
        }
    )
    if cards and (folder / ADAPTER).is_dir():
        written(folder / ADAPTER / CARD, cards[ADAPTER])
    if failed is not None:
        raise failed
    if finite and MODEL in resolved.saved:
        # The generation config may lack the tokens that the model learned to end an answer with.
        around = {turn_of(tokenizer, row.prompt, row.where) for rows in task.objectives.values() for row in rows}
        model.generation_config.eos_token_id = end_ids(tokenizer, around, model)
        started = prepared.model
        _write(folder / MODEL, lambda model, place: model.save_pretrained(place), model, tokenizer, started, cards)


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


def run(
    configs: Sequence[RunConfig],
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    inputs: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """Run one method, or several from the same start and budget, and write the folder that `dualoptim.runs` describes.

    Args:
        configs: one for each run; they differ only in method and seed.
        out: the folder.
        resume: keep the folder's finished runs with the same config, and resume others from checkpoints.
        overwrite: replace what a run wrote there, once everything has been checked.
        inputs: setting → a further file that is read and must not be overwritten.
    """
    read = {**configs[0].inputs, **(inputs or {})}
    check_folder(out, read, resume=resume, overwrite=overwrite)
    resolve.check_read(configs)
    resolved = resolve_all(configs)
    stages = resolved[0].task.stages()
    if not overwrite:
        check_kind(out, PARTS if stages else RUNS)
    for arguments in stages:
        resolve_all([config.replace(task_args={**config.task_args, **arguments}) for config in configs])
    with owned(out, read, resume=resume, overwrite=overwrite) as folder, as_told(configs[0]):
        if stages:
            return _one_after_the_other(resolved, stages, folder, resume=resume, overwrite=overwrite)

        def begin() -> None:
            if overwrite:
                emptied(folder)

        return _side_by_side(resolved, folder, resume=resume, begin=begin)


@contextmanager
def as_told(config: RunConfig) -> Iterator[None]:
    """A context in which models are scored in the config's precision, and a private run caches nothing."""
    with scoring_in(settled(config).score_bf16), without_cache() if config.private else nullcontext():
        yield


def evaluate(config: RunConfig, base: str | None = None) -> tuple[Task, dict[str, Records], Records | None, str]:
    """Score a model on a task: the task, records "before" and "after", a retrained model's, and scoring's precision.

    Args:
        base: the model before unlearning, scored as well.
    """
    with as_told(config):
        return *_evaluated(config, base), scored_in()


def _evaluated(config: RunConfig, base: str | None) -> tuple[Task, dict[str, Records], Records | None]:
    (resolved,) = resolve_all([config], training=False)
    task, tokenizer = resolved.task, resolved.tokenizer
    first_of = resolved
    if base:
        (first_of,) = resolve_all([config.replace(model=base, memorise=False, memorise_args={})], training=False)
    device, _ = device_and_precision()

    def loaded(origin: Origin) -> Any:
        return load_model(origin.place(), **_loading(config)).to(device).requires_grad_(False)

    gold = _retrained(resolved)
    first = loaded(first_of.start)
    before = with_more(config, task, first, tokenizer, task.prepare(first, tokenizer), config.attacks)
    if not base:
        return task, {"after": before}, gold
    del first
    second = loaded(resolved.start)
    after = with_more(config, task, second, tokenizer, task.score(second, tokenizer), config.attacks, before)
    return task, {"before": before, "after": after}, gold


def _side_by_side(
    resolved: Sequence[Resolved], folder: Path, *, resume: bool, begin: Callable[[], None]
) -> dict[str, Any]:
    """Runs of one start.

    Args:
        begin: called once the model is loaded and scored, before anything is written.
    """

    def own_folder(method: str, seed: int) -> Path:
        return folder if len(resolved) == 1 else folder / runs.of_method(method, seed)

    # What was begun as a run by itself, in the folder itself, and now becomes one of several.
    alone = ranks.of_first(lambda: runs.begun_alone(folder)) if resume and len(resolved) > 1 else None

    def places(of: Resolved) -> list[Path]:
        return [own_folder(of.config.method, of.config.seed), *([folder] if of.config.settings() == alone else [])]

    def taken_over() -> list[dict[str, Any]]:
        return [
            entry
            for entry, of in (runs.finished(folder, resolved) if resume else [])
            if runs.has_models(entry, of, *places(of))
        ]

    finished = ranks.of_first(taken_over)
    taken = [without_place(entry["config"]) for entry in finished]
    missing = [of for of in resolved if of.config.settings() not in taken]
    if finished:
        print(f"Taken over from {folder}: {', '.join(entry['method'] for entry in finished)}")
    if not missing:
        results = runs.read_results(folder)
        report.write(results, folder / PAGE)
        return results
    prepared, task = prepare(missing[0], folder / alternates.FILE if resume else None), missing[0].task
    config = missing[0].config
    secrets = runs.texts_of(task) if config.private else None
    told = runs.redacted(secrets, [*task.notes, *prepared.notes])
    for note in told:
        print(note, flush=True)
    begin()
    said = dict(task.objectives) if task.built else {}  # rows in the model's own words
    if prepared.alternates:
        said[Path(alternates.FILE).stem] = [row for rows in prepared.alternates.values() for row in rows]
    said = {} if config.private else said
    own_folders = [own_folder(of.config.method, of.config.seed) for of in resolved]
    made = [own.name for own in own_folders if own != folder]
    for of, own in zip(resolved, own_folders, strict=True):
        if of.config.settings() == alone:
            runs.write_settings(folder, [of.config], said, made)  # the folder is recorded before it is there
            move_own(folder, own)
    order = [of.config.settings() for of in resolved]
    runs.write_settings(folder, [of.config for of in resolved], said, made)
    runs.write_rows(folder, said)
    results = {
        "schema": runs.SCHEMA,
        "task": task.name,
        "model": config.model,
        "private": config.private,
        "followed": task.followed,
        "curves": {**task.curves, **({ABILITY: "What it could before ↑"} if prepared.ability else {})},
        "scores": dict(task.scores),
        "metrics": {name: metric._asdict() for name, metric in prepared.metrics.items()},
        "counts": general.counts(task, prepared.metrics, prepared.before.records),
        "notes": told,
        "plane": list(task.plane) if task.plane else None,
        "points": [],
        "runs": finished,
    }

    def keep(entry: dict[str, Any]) -> Mapping[str, str] | None:
        own = runs.without(secrets, {"run": entry})["run"]
        results["runs"].append(own)
        results["runs"].sort(key=lambda entry: order.index(without_place(entry["config"])))
        results["notes"] = [*told, *runs.troubles(results["runs"])]
        found: list[Run] = [(run, {}, own_folder(run["method"], run["seed"])) for run in results["runs"]]
        results["points"] = points_of(found, results["plane"], results["counts"])
        runs.write_json(folder / RESULTS, results)
        return card.beside(results, own)

    def show() -> None:
        if results["runs"]:
            report.write(results, folder / PAGE)

    for of in missing:
        own = own_folder(of.config.method, of.config.seed)
        if ranks.first():
            own.mkdir(exist_ok=True)
            clear(own)
        with ranks.saving(show):
            train(prepared, of, own, keep, resume=resume)
        show()
    return ranks.of_first(lambda: runs.read_results(folder))


def _one_after_the_other(
    resolved: Sequence[Resolved], stages: Sequence[dict[str, Any]], out: Path, *, resume: bool, overwrite: bool
) -> dict[str, Any]:
    """Forget one part of a task after the other, each starting from the model that the one before it left.

    Every method has a folder, with a run for every part; OUT/results.json has all runs.
    """
    configs = [of.config for of in resolved]
    if resume:
        ranks.of_first(lambda: runs.check_begun(out, configs))
    emptying = overwrite

    def name_of(config: RunConfig, arguments: Mapping[str, Any]) -> str:
        return f"{runs.of_method(config.method, config.seed)}/{runs.of_part(arguments[resolved[0].task.stage])}"

    def begin() -> None:
        nonlocal emptying
        if emptying:
            emptied(out)
        emptying = False
        runs.write_settings(out, configs, {}, [name_of(config, each) for config in configs for each in stages])
        if ranks.first():
            folder.mkdir(parents=True, exist_ok=True)

    results: dict[str, Any] = {}
    finished: list[dict[str, Any]] = []
    for config in configs:
        model: str | None = None
        for i, arguments in enumerate(stages):
            stage = config.replace(task_args={**config.task_args, **arguments})
            (begins,) = resolve_all([stage])
            retrained = begins.retrained.place() if begins.retrained else None
            stage = stage.replace(
                model=model or begins.start.place(), retrained=retrained, memorise=False, memorise_args={}
            )
            if begins.adapted and not begins.merge and model is not None:
                stage = stage.replace(**adapters.going_on())
            if i + 1 < len(stages):
                stage = stage.replace(save_model=True)
            folder = out / name_of(config, arguments)
            done = _side_by_side(resolve_all([stage.replace(out=str(folder))]), folder, resume=resume, begin=begin)
            model = str(folder / (MODEL if (folder / MODEL).is_dir() else ADAPTER))
            # Parts forget different rows, so they cannot be compared in one plot.
            noted = [note for note in done["notes"] if note not in runs.troubles(done["runs"])]  # which name no part
            entry = {**done["runs"][0], "part": arguments[begins.task.stage]}
            finished.append({**done, "run": entry, "notes": noted, "plane": None})
            about = together(finished)
            results = {key: value for key, value in about.items() if key != "run"}
            results |= {"model": config.model, "points": [], "runs": [complete(each, about) for each in finished]}
            results["notes"] = [*about["notes"], *runs.troubles(results["runs"])]
            runs.write_json(out / RESULTS, results)
            report.write(results, out / PAGE)
            if not done["runs"][0]["finite"]:
                break
    return results
