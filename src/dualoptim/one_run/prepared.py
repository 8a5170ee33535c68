"""What a run starts from: the model, scored before unlearning, and what only it can give."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..config import RunConfig
from ..data import Row
from ..device import device_and_precision
from ..errors import UserError
from ..evaluation import attacks, digits, general, probes
from ..evaluation.ability import Ability
from ..evaluation.numbers import Metric
from ..evaluation.scoring import negative_log_likelihoods
from ..hashes import digest
from ..models import load_model
from ..resolved import Resolved
from ..rows import alternates
from ..tasks import Task

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
    gold = score_retrained(resolved)
    model = load_model(start, **loading(config)).to(device).requires_grad_(False)
    records = with_more(config, task, model, tokenizer, task.prepare(model, tokenizer), config.attacks)
    numbers, metrics = general.scored(task, records, gold)
    curve, ability = dict(task.follow(model, tokenizer)), None
    if config.keep_at_least is not None and not task.watches_ability:
        watched = Ability(model, tokenizer)
        ability = watched if watched.measures else None
        curve |= {ABILITY: 1.0} if ability else {}
    checks = nothing_asked(config, task, curve)
    reference = model if resolved.needs_second_model else None
    left = _left_to_learn(task, model, tokenizer) if config.ratio == "loss" else {}
    others, notes = alternates.of_run(
        resolved.losses, task.objectives, model, tokenizer,
        max_length=config.max_length, kept=kept, inputs=resolved.identity,
    )  # fmt: skip
    before = Scores(*numbers, records)
    return Prepared(start, reference, before, gold, curve, ability, left, metrics, others, checks + notes)


def nothing_asked(config: RunConfig, task: Task, curve: Mapping[str, float | None]) -> list[str]:
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


def loading(config: RunConfig) -> dict[str, Any]:
    """The arguments of `load_model` for every model of a run: the one to train, and those that it is compared with."""
    return {"in_4bit": config.load_in_4bit, "dtype": torch.bfloat16 if config.bf16_weights else torch.float32}


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


def score_retrained(resolved: Resolved) -> Records | None:
    """The records of a model that never saw the rows to forget, with those of attacks that compare with it."""
    if resolved.retrained is None:
        return None
    task, tokenizer = resolved.task, resolved.tokenizer
    device, _ = device_and_precision()
    model = load_model(resolved.retrained.place(), **loading(resolved.config)).to(device)
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
