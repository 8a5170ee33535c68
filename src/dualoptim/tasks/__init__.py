"""Tasks: what is to be forgotten and kept, and how one sees whether it was.

A task gives the rows of each objective and scores a model. `Facts` is the quickstart's, `Tofu` the TOFU benchmark's,
`Files` serves anybody's own rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import nn

from ..config import RunConfig
from ..data import Row
from ..errors import UserError, unknown


class Metric(NamedTuple):
    """How a number is shown: its name in words, which way is better, and a format spec."""

    label: str
    better: str  # "lower" or "higher"
    format: str = ".0%"


class Scores(NamedTuple):
    """A model's numbers on a task, and the per-sample records that they were made of."""

    numbers: dict[str, float]
    records: list[dict[str, Any]]


class Task(Protocol):
    """What a task is to the rest of the package."""

    name: str
    metrics: Mapping[str, Metric]
    objectives: Mapping[str, Sequence[Row]]  # "forget" and "retain"; known after `prepare`
    followed: str  # what `follow` measures, in words

    def prepare(self, model: nn.Module, tokenizer: Any) -> Scores:
        """Settle the rows, by what the model knows if need be, and score the model as it is."""
        ...

    def evaluate(self, model: nn.Module, tokenizer: Any) -> Scores:
        """Score a model."""
        ...

    def follow(self, model: nn.Module, tokenizer: Any) -> dict[str, float]:
        """One cheap number for "forget" and one for "retain", 0 to 1, for the curve over the steps."""
        ...


def load(config: RunConfig) -> Task:
    """The task that a config asks for, its files read and checked."""
    from .facts import Facts
    from .files import Files
    from .tofu import Tofu

    if config.task is None:
        if config.forget is None:
            raise UserError("nothing to forget: give --forget FILE, or --task with one of facts, tofu")
        if config.task_args:
            raise UserError("task_args are for a --task; with --forget FILE there is none")
        return Files(config.forget, config.retain)
    if config.forget is not None or config.retain is not None:
        raise UserError(f"the task {config.task!r} brings its own rows; leave out --forget and --retain, or --task")
    tasks = {"facts": Facts, "tofu": Tofu}
    if config.task not in tasks:
        raise unknown("task", config.task, tasks)
    arguments = dict(config.task_args)
    if config.data_dir is not None:
        arguments["data_dir"] = config.data_dir
    try:
        return tasks[config.task](**arguments)
    except TypeError as error:
        reason = str(error).split("() ")[-1]
        raise UserError(f"task {config.task!r} with {arguments}: {reason}") from None
