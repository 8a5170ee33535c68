"""A task scored only by the probability of answers, without replies and judges: a second in place of a minute.

It is for comparing many runs (`dualoptim compare --fast`). Rows, losses and schedules are the same; measured is how
probable the answers still are, for each objective and for rows that the model knew and that nobody trains on.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .data import Row
from .evaluation import metrics, scoring
from .evaluation.numbers import Metric, Numbers, Record, mean
from .tasks import Task

MOST_ROWS = 100  # of each set, drawn once
LOOKED_AT = 16  # of each set, at points during training


class ByProbability(Task):
    """Another task, whose numbers are all mean p(answer | question), p = exp(−mean negative log-likelihood a token).

    Args:
        task: the task that has the rows, losses and schedules.
    """

    name = "fast"
    followed = "probability of the answers"
    metrics: Mapping[str, Metric] = {}

    def __init__(self, task: Task) -> None:
        self.task, self.name = task, task.name  # type: ignore[misc]
        self.losses, self.weights = task.losses, task.weights
        self.retained, self.built, self.reply_tokens = task.retained, task.built, task.reply_tokens
        self.metrics = metrics_of(task.quick())  # by names: the rows of some tasks are chosen only in `prepare`
        kept = "held_out" if "held_out" in task.quick() else "retain"
        names = [f"{name}_probability" for name in ("forget", kept)]
        self.plane = (names[0], names[1]) if set(names) <= set(self.metrics) else None
        self.curves = {name: f"{metric.label} {'↓' if metric.better == 'lower' else '↑'}"
                       for name, metric in zip(task.quick(), self.metrics.values(), strict=True)}  # fmt: skip
        self.kept = [name for name in task.quick() if _better(name) == "higher"]

    @property
    def objectives(self) -> Mapping[str, Sequence[Row]]:  # type: ignore[override]
        """The task's own."""
        return self.task.objectives

    @property
    def notes(self) -> Sequence[str]:  # type: ignore[override]
        """The task's own."""
        return self.task.notes

    @property
    def tuned_on(self) -> str:  # type: ignore[override]
        """The task's own."""
        return self.task.tuned_on

    def to_tune_on(self) -> Mapping[str, Any]:
        return self.task.to_tune_on()

    def contents(self) -> Mapping[str, Any]:
        return {**self.task.contents(), "scored": "by probability"}

    def clusters(self) -> dict[tuple[str, str], str]:
        return self.task.clusters()

    def known(self) -> Sequence[Row]:
        return self.task.known()

    def attacked(self) -> Mapping[str, Sequence[Row]]:
        return self.task.attacked()

    def leaks(self, row: Row, reply: str) -> bool:  # type: ignore[override]
        return self.task.leaks(row, reply)

    def stages(self) -> list[dict[str, Any]]:
        return self.task.stages()

    def prepare(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        if self.built:
            self.task.prepare(model, tokenizer)
        return self.score(model, tokenizer)

    def score(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        sets = {name: _drawn(rows, MOST_ROWS) for name, rows in self.task.quick().items()}
        flat = [(name, row) for name, rows in sets.items() for row in rows]
        nlls = scoring.negative_log_likelihoods(model, tokenizer, [row for _, row in flat])
        return [
            {"set": name, "question": row.question, "answer": row.answer, "nll": nll}
            for (name, row), nll in zip(flat, nlls, strict=True)
        ]

    def score_retrained(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        return self.score(model, tokenizer)

    @staticmethod
    def numbers(records: Sequence[Record], retrained: Sequence[Record] | None = None) -> Numbers:
        sets: dict[str, list[float]] = {}
        for record in (record for record in records if "nll" in record):
            sets.setdefault(record["set"], []).append(metrics.probability(record["nll"]))
        return Numbers({f"{name}_probability": mean(values) for name, values in sets.items()}, {})

    def follow(self, model: nn.Module, tokenizer: Any) -> Mapping[str, float | None]:
        few = {name: _drawn(rows, LOOKED_AT) for name, rows in self.task.quick().items()}
        nlls = iter(scoring.negative_log_likelihoods(model, tokenizer, [row for rows in few.values() for row in rows]))
        return {name: mean([metrics.probability(next(nlls)) for _ in rows]) for name, rows in few.items()}


def metrics_of(sets: Iterable[str]) -> dict[str, Metric]:
    """How the probability of each set's answers is shown."""
    return {
        f"{name}_probability": Metric(f"p(answer), {name.replace('_', ' ')}", _better(name), ".3f") for name in sets
    }


def _better(name: str) -> str:
    return "lower" if name == "forget" else "higher"


def _drawn(rows: Sequence[Row], count: int) -> Sequence[Row]:
    if len(rows) <= count:
        return rows
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), count))]
