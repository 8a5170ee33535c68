"""What `UnlearnTrainer` evaluates on, and what it makes of it: rows → sets of tokens → metrics → a forget/keep score.

Of every set: the loss and the probability of its answers. Of what is to be forgotten and what is to be kept together,
relative to the model when training began:

    P_s          mean over the rows of set s of exp(−mean token negative log-likelihood of the answer)
    share_s      min(1, P_s / P_s at the start)
    forgotten    1 − mean share over the sets to forget, 0 to 1; high is good
    kept         mean share over the sets to keep, 0 to 1; high is good
    score        2 · forgotten · kept / (forgotten + kept), 0 to 1; high is good, and 0 for the model as it was

Misleads where the knowledge survives in other words than the evaluated answer's, and by its floor: answers that any
fluent model gives have a probability that nothing should take away.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, TrainingArguments

from .data import Row, Tokens, collate, encode, pad_id, parse_row
from .errors import UserError, unknown
from .evaluation.aggregates import harmonic_mean
from .losses import IGNORED, Batch, sequence_log_probs
from .losses.base import learnt, model_inputs, per_sequence

SCORE = "score"
OF_ROWS = ("loss", "probability")
# Whether more is better, of a set to forget and of one to keep.
BETTER = {("forget", "loss"): True, ("forget", "probability"): False,
          ("retain", "loss"): False, ("retain", "probability"): True}  # fmt: skip


class Rows(Dataset):
    """Tokenized rows to evaluate on, in their order.

    Args:
        given: `Row`s; mappings of any form that a file of rows may have; or tokenized rows, mappings of ``input_ids``
            and ``labels`` (T,), −100 where nothing is scored, and perhaps ``attention_mask``.
        tokenizer: the model's.
        max_length: the most tokens that a row may have.
        name: of the set, for messages.

    Raises:
        UserError: no rows, or one that cannot be read or scored.
    """

    def __init__(self, given: Sequence[Any], tokenizer: Any, max_length: int, name: str = "eval_dataset") -> None:
        if isinstance(given, (str, bytes, Mapping)) or not hasattr(given, "__len__"):
            raise UserError(
                f"{name}: rows are a sequence of rows, or a data set with a length, but these are "
                f"{type(given).__name__}; give a list"
            )
        if not len(given):
            raise UserError(f"{name}: there are no rows; give at least one, or leave the set out")
        self.tokens = [
            _tokens(given[i], tokenizer, max_length, f"{name}, row {i + 1}")  # by number: a data set may not end itself
            for i in range(len(given))
        ]
        self.filler = pad_id(tokenizer)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tokens:
        return self.tokens[index]

    def collate(self, rows: Sequence[Tokens]) -> dict[str, Tensor]:
        """A batch of some of them: ``input_ids``, ``labels`` and ``attention_mask``, each (B, T)."""
        return collate(rows, self.filler)


def _tokens(row: Any, tokenizer: Any, max_length: int, where: str) -> Tokens:
    if isinstance(row, Row):
        return encode(row if row.where else replace(row, where=where), tokenizer, max_length)
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: a row is a Row or a mapping, but this is {type(row).__name__}")
    if "input_ids" not in row:
        return encode(parse_row(row, where), tokenizer, max_length)
    if row.get("labels") is None:
        raise UserError(f"{where}: it has input_ids and no labels; give labels, −100 where nothing is to be scored")
    ids, labels = _whole(row, "input_ids", where), _whole(row, "labels", where)
    seen = [1] * len(ids) if row.get("attention_mask") is None else _whole(row, "attention_mask", where)
    if not len(ids) == len(labels) == len(seen):
        raise UserError(
            f"{where}: its input_ids, labels and attention_mask have {len(ids)}, {len(labels)} and {len(seen)} entries"
        )
    kept = [i for i, there in enumerate(seen) if there]  # padding is put where it is needed
    if all(labels[i] == IGNORED for i in kept[1:]):  # nothing predicts the first token
        raise UserError(f"{where}: none of its labels can be scored; give some that are not {IGNORED}")
    if len(kept) > max_length:
        raise UserError(f"{where}: the row has {len(kept)} tokens and max_length is {max_length}; raise it")
    known = range(len(tokenizer))
    for name, tokens in (("input_ids", ids), ("labels", [label for label in labels if label != IGNORED])):
        if other := [token for token in tokens if token not in known]:
            raise UserError(
                f"{where}: its {name} have {other[0]}, but the tokenizer has {len(known)} tokens, from 0 on"
            )
    return Tokens([ids[i] for i in kept], [labels[i] for i in kept])


def _whole(row: Mapping[str, Any], name: str, where: str) -> list[int]:
    """A column of a tokenized row: whole numbers."""
    try:
        values = torch.as_tensor(row[name])
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(())
    if values.ndim != 1 or values.is_floating_point():
        raise UserError(f"{where}: its {name} are no list of whole numbers")
    return [int(value) for value in values.tolist()]


def sets_of(given: Any, tokenizer: Any, max_length: int) -> Any:
    """Rows to evaluate on: one set, or by name several; what is tokenized already as it is, and None of None."""
    if given is None or isinstance(given, Rows):
        return given
    if not isinstance(given, Mapping):
        return Rows(given, tokenizer, max_length)
    if not given:
        raise UserError("eval_dataset: there are no sets; give at least one, or leave it out")
    return {
        name: rows if isinstance(rows, Rows) else Rows(rows, tokenizer, max_length, f"eval_dataset[{name!r}]")
        for name, rows in given.items()
    }


def roles_of(sets: Any, objectives: Mapping[str, Any]) -> dict[str, str]:
    """Set → "forget" or "retain", of the sets that have an objective's name: what the objective's loss is for."""
    names = sets if isinstance(sets, Mapping) else ()
    found = {name: getattr(objectives[name].loss, "role", None) for name in names if name in objectives}
    return {name: role for name, role in found.items() if role is not None}


def have_score(roles: Mapping[str, str]) -> bool:
    """Whether there is something to forget and something to keep."""
    return {"forget", "retain"} <= set(roles.values())


@torch.no_grad()
def answered(model: nn.Module, batch: Batch, *, outputs: bool) -> tuple[Tensor, Tensor, Any]:
    """(log π(y|x), |y|) of each row of a batch, both (B,), and all that the model gives, or None where not asked for.

    Without them the head is applied to the labeled positions alone.
    """
    if not outputs:
        return *sequence_log_probs(model, batch), None
    given = model(**model_inputs(batch))
    labels = batch["labels"]
    rows, at = learnt(labels).nonzero(as_tuple=True)
    log_probs = -F.cross_entropy(given.logits[rows, at].float(), labels[rows, at + 1], reduction="none")
    return *per_sequence(log_probs, rows, len(labels)), given


def measured(log_probs: Tensor, counts: Tensor) -> dict[str, float]:
    """The metrics of one set.

    loss is the mean negative log-likelihood of all answers' tokens, those that end them included, in nats; probability
    the mean over rows of exp(−its own mean), 0 to 1.

    Args:
        log_probs: (N,) log π(y|x) of each row's answer.
        counts: (N,) its tokens.

    >>> measured(torch.tensor([-2.0, 0.0]), torch.tensor([2, 2]))
    {'loss': 0.5, 'probability': 0.6839397205857212}
    """
    log_probs, counts = log_probs.double(), counts.double()
    return {"loss": float(-log_probs.sum() / counts.sum()), "probability": float((log_probs / counts).exp().mean())}


def scored(now: Mapping[str, float], start: Mapping[str, float], roles: Mapping[str, str]) -> dict[str, float]:
    """What is forgotten, what is kept, and the score of both, as the module has them.

    Args:
        now: set → mean probability of its answers.
        start: the same of the model when training began.
        roles: set → "forget" or "retain".

    >>> scored({"a": 0.25, "b": 0.5}, {"a": 0.5, "b": 0.5}, {"a": "forget", "b": "retain"})
    {'forgotten': 0.5, 'kept': 1.0, 'score': 0.6666666666666666}
    """
    shares: dict[str, list[float]] = {"forget": [], "retain": []}
    for name, role in roles.items():
        shares[role].append(min(now[name] / max(start[name], sys.float_info.min), 1.0))  # so NaN stays NaN
    parts = {"forgotten": 1 - fmean(shares["forget"]), "kept": fmean(shares["retain"])}
    return {**parts, SCORE: float(harmonic_mean(parts) or 0.0)}


def choose_metric(
    args: TrainingArguments, sets: Any, roles: Mapping[str, str], callbacks: Sequence[Any], *, own: bool
) -> None:
    """Settle `metric_for_best_model` and `greater_is_better` in arguments that want a best model.

    Args:
        args: changed: where no metric was given, or the plain loss, which several sets do not have, it is the score.
        sets: what is evaluated on.
        roles: of `roles_of`.
        callbacks: the user's; early stopping wants a metric as well.
        own: whether there may be metrics of the user's own, by `compute_metrics` or a subclass.

    Raises:
        UserError: no evaluation, a metric that there will not be, or a direction that is the wrong one for it.
    """
    by_metric = args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    stops = any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks)
    best = args.load_best_model_at_end or args.save_strategy == "best"
    if args.metric_for_best_model is None and not (best or stops or by_metric):
        return
    if sets is None or args.eval_strategy == "no":
        raise UserError(
            "a best model, early stopping and metric_for_best_model need evaluations; give eval_dataset, and "
            "eval_strategy 'steps' or 'epoch'"
        )
    if stops and args.eval_strategy == "epoch":
        raise UserError(
            "early stopping: a run is one epoch, so that eval_strategy 'epoch' evaluates at its end, when there is "
            "nothing to stop; give eval_strategy 'steps' and eval_steps"
        )
    several = isinstance(sets, Mapping)
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if by_default := several and metric == "loss":
        metric, args.greater_is_better = SCORE, True
    args.metric_for_best_model = metric
    better = dict.fromkeys(("forgotten", "kept", SCORE), True) if have_score(roles) else {}
    better |= {f"{name}_{of}": BETTER[role, of] for name, role in roles.items() for of in OF_ROWS}
    names = [*(f"{name}_{of}" for name in sets for of in OF_ROWS)] if several else [*OF_ROWS]
    if metric == SCORE and SCORE not in better and (by_default or not own):
        raise UserError(
            "metric_for_best_model: the forget/keep score needs rows of an objective to forget and of one to keep, and "
            f"eval_dataset has {', '.join(map(str, sets)) if several else 'one set without a name'}; give both by "
            f"their objectives' names, or another metric, such as {names[0]!r}"
        )
    if not own and metric not in (*names, *better):
        raise unknown("metric", metric, [*names, *better], "metric_for_best_model")
    if args.greater_is_better is None:
        args.greater_is_better = better.get(metric, not metric.endswith("loss"))
    if better.get(metric, args.greater_is_better) != args.greater_is_better:
        raise UserError(
            f"metric_for_best_model {metric!r}: {'more' if better[metric] else 'less'} is better; give "
            f"greater_is_better={better[metric]}"
        )
    mode = "max" if args.greater_is_better else "min"
    if by_metric and (args.lr_scheduler_kwargs or {}).get("mode", "min") != mode:
        raise UserError(
            f"lr_scheduler_type {args.lr_scheduler_type.value}: of {metric!r} {'more' if mode == 'max' else 'less'} is "
            f"better; give lr_scheduler_kwargs={{'mode': {mode!r}}}"
        )
