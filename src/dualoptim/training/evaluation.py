"""How `UnlearnTrainer` evaluates: rows → tokenized sets → metrics → a forget/keep score.

Every set has the loss and the probability of its answers. Sets to forget and sets to keep together also have, relative
to the model when training began:

    P_s          mean over the rows of set s of exp(−mean token negative log-likelihood of the answer)
    share_s      min(1, P_s / P_s at the start)
    forgotten    1 − mean share over the sets to forget, 0 to 1; high is good
    kept         mean share over the sets to keep, 0 to 1; high is good
    score        2 · forgotten · kept / (forgotten + kept), 0 to 1; high is good, and 0 for the model as it was

The score misleads where the knowledge survives in other words than those of the evaluated answer. It also has a floor:
an answer that any fluent model gives keeps a probability that no method should take away.
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

from ..data import Row, Tokens, collate, encode, pad_id, parse_row
from ..errors import UserError, unknown
from ..evaluation.aggregates import harmonic_mean
from ..losses import IGNORED, Batch, sequence_log_probs
from ..losses.base import learnt, model_inputs, per_sequence
from .fitting import check_ids

SCORE = "score"
OF_ROWS = ("loss", "probability")
# Whether more is better, for a set to forget and for a set to keep.
BETTER = {("forget", "loss"): True, ("forget", "probability"): False,
          ("retain", "loss"): False, ("retain", "probability"): True}  # fmt: skip


class Rows(Dataset):
    """Tokenized rows to evaluate on, in their order.

    Args:
        given: `Row`s; mappings of any form that a file of rows may have; or tokenized rows, mappings of ``input_ids``
            and ``labels`` (T,), −100 where nothing is scored, and optionally ``attention_mask``.
        tokenizer: the model's.
        max_length: the most tokens that a row may have.
        positions: the number of the model's positions; None for any number.
        vocabulary: the number of the model's tokens; None for the tokenizer's.
        name: the set's name, for messages.

    Raises:
        UserError: no rows, or one that cannot be read or scored.
    """

    def __init__(
        self,
        given: Sequence[Any],
        tokenizer: Any,
        max_length: int,
        positions: int | None = None,
        vocabulary: int | None = None,
        name: str = "eval_dataset",
    ) -> None:
        if isinstance(given, (str, bytes, Mapping)) or not hasattr(given, "__len__"):
            raise UserError(
                f"{name}: rows are a sequence of rows, or a data set with a length, but these are "
                f"{type(given).__name__}; give a list"
            )
        if not len(given):
            raise UserError(f"{name}: there are no rows; give at least one, or leave the set out")
        self.tokens = [
            _tokens(given[i], tokenizer, max_length, positions, f"{name}, row {i + 1}")  # by index: it may not end
            for i in range(len(given))
        ]
        for i, tokens in enumerate(self.tokens):
            check_ids(f"{name}, row {i + 1}", tokens, vocabulary, tokenizer)
        self.filler = pad_id(tokenizer)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tokens:
        return self.tokens[index]

    def collate(self, rows: Sequence[Tokens]) -> dict[str, Tensor]:
        """A batch of some of the rows: ``input_ids``, ``labels`` and ``attention_mask``, each (B, T)."""
        return collate(rows, self.filler)


def _tokens(row: Any, tokenizer: Any, max_length: int, positions: int | None, where: str) -> Tokens:
    if isinstance(row, Row):
        return encode(row if row.where else replace(row, where=where), tokenizer, max_length, positions)
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: a row is a Row or a mapping, but this is {type(row).__name__}")
    if "input_ids" not in row:
        return encode(parse_row(row, where), tokenizer, max_length, positions)
    if row.get("labels") is None:
        raise UserError(f"{where}: it has input_ids and no labels; give labels, −100 where nothing is to be scored")
    ids, labels = _whole(row, "input_ids", where), _whole(row, "labels", where)
    seen = [1] * len(ids) if row.get("attention_mask") is None else _whole(row, "attention_mask", where)
    if not len(ids) == len(labels) == len(seen):
        raise UserError(
            f"{where}: its input_ids, labels and attention_mask have {len(ids)}, {len(labels)} and {len(seen)} entries"
        )
    kept = [i for i, there in enumerate(seen) if there]  # padding is dropped here and added again by batch
    if all(labels[i] == IGNORED for i in kept[1:]):  # nothing predicts the first token
        raise UserError(f"{where}: none of its labels can be scored; give some that are not {IGNORED}")
    if len(kept) > max_length:
        raise UserError(f"{where}: the row has {len(kept)} tokens and max_length is {max_length}; raise it")
    if positions is not None and len(kept) > positions:
        raise UserError(f"{where}: the row has {len(kept)} tokens and the model {positions} positions; shorten it")
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


def sets_of(
    given: Any, tokenizer: Any, max_length: int, positions: int | None = None, vocabulary: int | None = None
) -> Any:
    """The evaluation rows: one set, or several by name. A set that is already tokenized, or None, is returned as is."""
    if given is None or isinstance(given, Rows):
        return given
    if not isinstance(given, Mapping):
        return Rows(given, tokenizer, max_length, positions, vocabulary)
    if not given:
        raise UserError("eval_dataset: there are no sets; give at least one, or leave it out")
    return {
        name: rows
        if isinstance(rows, Rows)
        else Rows(rows, tokenizer, max_length, positions, vocabulary, f"eval_dataset[{name!r}]")
        for name, rows in given.items()
    }


def roles_of(sets: Any, objectives: Mapping[str, Any]) -> dict[str, str]:
    """Set → "forget" or "retain", for the sets that have an objective's name: the role of the objective's loss."""
    names = sets if isinstance(sets, Mapping) else ()
    found = {name: getattr(objectives[name].loss, "role", None) for name in names if name in objectives}
    return {name: role for name, role in found.items() if role is not None}


def have_score(roles: Mapping[str, str]) -> bool:
    """Whether there are sets to forget and sets to keep."""
    return {"forget", "retain"} <= set(roles.values())


@torch.no_grad()
def answered(model: nn.Module, batch: Batch, *, outputs: bool) -> tuple[Tensor, Tensor, Any]:
    """(log π(y|x), |y|) of each row of a batch, both (B,), and the model's outputs, or None if not asked for.

    Without outputs, the head is applied at the labeled positions only.
    """
    if not outputs:
        return *sequence_log_probs(model, batch), None
    given = model(**model_inputs(model, batch))
    labels = batch["labels"]
    if given.logits.shape[1] != labels.shape[1]:  # an adapter's own prompt has logits, too
        given.logits = given.logits[:, -labels.shape[1] :]
    rows, at = learnt(labels).nonzero(as_tuple=True)
    log_probs = -F.cross_entropy(given.logits[rows, at].float(), labels[rows, at + 1], reduction="none")
    return *per_sequence(log_probs, rows, len(labels)), given


def measured(log_probs: Tensor, counts: Tensor) -> dict[str, float]:
    """The metrics of one set.

    loss is the mean negative log-likelihood of all answers' tokens, end tokens included, in nats; probability is the
    mean over rows of exp(−the row's own mean), 0 to 1.

    Args:
        log_probs: (N,) log π(y|x) of each row's answer.
        counts: (N,) its tokens.

    >>> measured(torch.tensor([-2.0, 0.0]), torch.tensor([2, 2]))
    {'loss': 0.5, 'probability': 0.6839397205857212}
    """
    log_probs, counts = log_probs.double(), counts.double()
    return {"loss": float(-log_probs.sum() / counts.sum()), "probability": float((log_probs / counts).exp().mean())}


def scored(now: Mapping[str, float], start: Mapping[str, float], roles: Mapping[str, str]) -> dict[str, float]:
    """How much is forgotten, how much is kept, and their score, by the formulas in this module's docstring.

    Args:
        now: set → mean probability of its answers.
        start: the same for the model when training began.
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
    """Set `metric_for_best_model` and `greater_is_better` in arguments that need a best model.

    Args:
        args: changed in place. With several sets, if no metric is given, or the plain loss, which several sets do not
            have, the metric is the forget/keep score.
        sets: the evaluation sets.
        roles: from `roles_of`.
        callbacks: the user's; early stopping needs a metric as well.
        own: whether the user may add metrics, by `compute_metrics` or a subclass.

    Raises:
        UserError: no evaluation, a metric that evaluations will not have, or the wrong direction for it.
    """
    by_metric = args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    kinds = [each if isinstance(each, type) else type(each) for each in callbacks]  # a Trainer takes classes, too
    stops = any(issubclass(kind, EarlyStoppingCallback) for kind in kinds)
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
