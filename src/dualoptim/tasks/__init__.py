"""Tasks: what is to be forgotten and kept, and how to measure whether it was.

A task gives the rows of each objective, scores a model into per-sample records, and computes numbers from records.
`Facts` is the quickstart's, `Tofu` the TOFU benchmark's, and `Files` is for your own rows.
"""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ..config import RunConfig, typed
from ..data import Row, bare, check_objectives
from ..errors import UserError, unknown
from ..evaluation.metrics import contains_answer, rouge_l_recall
from ..evaluation.numbers import Metric, Numbers, Record
from ..evaluation.scoring import REPLY_TOKENS
from ..evaluation.shares import effective_number
from ..losses import Loss
from ..reading import read_lines
from ..rows.quoting import Quoting
from ..tiny import TINY

LEAK_ROUGE = 0.8  # ROUGE-L recall from which a reply gives the answer: a wrong one in the same form stays below


class Task(ABC):
    """The interface of a task to the rest of the package."""

    name: ClassVar[str]
    followed: str  # what `follow` measures, in words
    left = "left of what is to be forgotten"  # what a share of the curve "forget" is, in words
    # The curves that `follow` gives, with their titles.
    curves: Mapping[str, str] = {"forget": "To forget ↓", "retain": "To keep ↑"}
    kept: Sequence[str] = ("retain",)  # those of the curves that should not fall
    watches_ability = False  # whether the curves also cover what the model could do before, beside the rows to keep
    metrics: Mapping[str, Metric]
    objectives: Mapping[str, Sequence[Row]]  # name → rows; final after `prepare`
    losses: Mapping[str, str | Loss] = {}  # of the objectives; those of "forget" and "retain" are the config's
    weights: Mapping[str, float] = {}  # of the losses, 1 where left out; the config's own take precedence
    built = False  # whether rows are the model's own words, which a run then writes to files
    notes: Sequence[str] = ()  # what a reader of the results should know, in sentences; final after `prepare`
    scores: Mapping[str, str] = {}  # objective → the metric that says how well it is met, where there is one
    of_run: Sequence[str] = ()  # arguments that the run gives a task: tokenizer, max_length, refusals
    stage = "part"  # the argument that says which of `stages` a task is
    retained: Sequence[Row] | None = None  # what a retrained model was trained on; None where the task has none
    reply_tokens = REPLY_TOKENS  # room that a reply to its rows has at least, with and without an attack
    # The two metrics to compare runs by: of what is forgotten and of what is kept, or where nothing is, any two.
    plane: tuple[str, str] | None = None

    tuned_on = ""  # a sentence on rows in `quick` that no run is measured by; final after `prepare`

    @abstractmethod
    def prepare(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        """Choose the rows, by what the model knows if need be, and score the model before unlearning."""

    @abstractmethod
    def score(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        """A model's per-sample records."""

    @staticmethod
    @abstractmethod
    def numbers(records: Sequence[Record], retrained: Sequence[Record] | None = None) -> Numbers:
        """The numbers from records, and from those of a model that never saw the rows to forget, if there is one."""

    @abstractmethod
    def follow(self, model: nn.Module, tokenizer: Any) -> Mapping[str, float | None]:
        """A number that is cheap to measure, 0 to 1, for each of `curves`; None at every point if nothing is asked."""

    @staticmethod
    def verdict(before: Sequence[Record], after: Sequence[Record]) -> str:
        """The result of a run in one sentence; empty for tasks that have none."""
        return ""

    @classmethod
    def shares(cls, records: Sequence[Record]) -> dict[str, list[Record]]:
        """The records that each share among the numbers is of."""
        sets: dict[str, list[Record]] = {}
        for record in records:
            sets.setdefault(record["set"], []).append(record)
        return {name: sets.get(metric.share_of, []) for name, metric in cls.metrics.items() if metric.share_of}

    @classmethod
    def counts(cls, records: Sequence[Record]) -> dict[str, int]:
        """How many questions each share among the numbers was measured on."""
        return {name: len(part) for name, part in cls.shares(records).items()}

    @classmethod
    def effective_counts(cls, records: Sequence[Record]) -> dict[str, float]:
        """How many independent questions tell as much, for shares where that is fewer: some of theirs are clusters."""
        found = {}
        for name, part in cls.shares(records).items():
            if key := cls.metrics[name].counted_by:
                clusters: dict[Any, list[float]] = {}
                for i, record in enumerate(part):
                    clusters.setdefault(record.get("cluster", i), []).append(float(record[key]))
                found[name] = effective_number(list(clusters.values())), len(part)
        return {name: number for name, (number, n) in found.items() if number < n}

    def attacked(self) -> Mapping[str, Sequence[Row]]:
        """The rows that attacks ask, under "forget", and under "retain" if there are some.

        Relearned are the rows under "relearn", all rows to forget as they are given; without it, those under "forget".
        A row may have ``accepted``, as in `leaks`, and ``questions``, the same in other words.
        """
        return {name: rows for name, rows in self.objectives.items() if name in ("forget", "retain")}

    @staticmethod
    def leaks(row: Row, reply: str) -> bool:
        """Whether a reply gives what is to be forgotten: it contains one of ``accepted``, or most of the answer."""
        if accepted := row.fields.get("accepted"):
            return contains_answer(reply, accepted)
        return rouge_l_recall(reply, row.answer) >= LEAK_ROUGE

    def known(self) -> Sequence[Row]:
        """What a model memorizes before it unlearns: the rows of all objectives."""
        return [row for rows in self.objectives.values() for row in rows]

    def quick(self) -> Mapping[str, Sequence[Row]]:
        """Sets of rows whose answers' probability says what a run did, for `dualoptim.fast`."""
        return self.objectives

    def to_tune_on(self) -> Mapping[str, Any]:
        """Arguments that give the task other rows of the same kind, for tuning settings; empty where it has none."""
        return {}

    def cluster(self, row: Row) -> str:
        """The cluster of a row: rows of different clusters have independent scores.

        By default each row of a file is its own, in whatever words it asks, and so is each included question.
        """
        # Rows that the package includes, and those that the model writes, have one place for all.
        has_place = isinstance(row.where, Quoting) or row.where[-1:].isdigit()
        return row.where if has_place else row.question or row.answer

    def clusters(self) -> dict[tuple[str, str], str]:
        """The cluster of each row of the task, by what its records have: question and answer."""
        return {row.pair: self.cluster(row) for row in reversed([*rows_in(vars(self))])}

    def clustered(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Records with the clusters of their rows; as they are where no row of the task is theirs."""
        of = self.clusters()
        asked = [(record.get("question"), record.get("answer")) for record in records]
        return [
            {"cluster": of[each], **record} if each in of else dict(record)
            for record, each in zip(records, asked, strict=True)
        ]

    def contents(self) -> Mapping[str, Any]:
        """Everything that the task's fingerprint is computed from."""
        return vars(self)

    def score_retrained(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        """The records of a model that never saw the rows to forget, as far as other models' numbers need them."""
        raise NotImplementedError(f"{self.name} sets `retained`, so it says what to score of such a model")

    def stages(self) -> list[dict[str, Any]]:
        """The task's arguments for each of its parts, where it has several to forget one after the other."""
        return []


def not_trained_on(rows: Sequence[Row], objectives: Mapping[str, Sequence[Row]], what: str) -> list[Row]:
    """The rows to measure by that no objective has, whatever the answer; refused where none is left.

    Data sets repeat some of their instructions and headings, so that other rows need not be other texts.
    """

    def key(row: Row) -> tuple[str, ...]:
        return tuple(bare(message["content"]) for message in row.prompt) or (bare(row.answer),)

    trained = {key(row) for part in objectives.values() for row in part}
    found = [row for row in rows if key(row) not in trained]
    if not found:
        raise UserError(f"{what}: all {len(rows)} of its rows to measure by are also trained on; give it others")
    return found


def rows_in(value: Any) -> Iterator[Row]:
    """The rows that a value, its mappings and its lists hold."""
    if isinstance(value, Row):
        yield value
    elif isinstance(value, Mapping):
        yield from rows_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from rows_in(each)


def kinds() -> dict[str, type[Task]]:
    """The tasks of this package by name; each of its modules has one."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    own = [cls for cls in Task.__subclasses__() if cls.__module__.startswith(f"{__name__}.")]
    return {cls.name: cls for cls in sorted(own, key=lambda cls: cls.name)}


def find(name: str) -> type[Task]:
    """A task by name, or the one that a file of your own defines: "folder/mine.py".

    Raises:
        UserError: no such task or file, a file that cannot be read as Python, or one that defines no task or several.
    """
    if not name.endswith(".py"):
        known = kinds()
        if name not in known:
            raise unknown("task", name, known)
        return known[name]
    path = Path(name).resolve()
    if not path.is_file():
        raise UserError(f"task {name}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"task_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"task {name}: could not be read ({type(error).__name__}: {error})") from error
    classes = [cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, Task)]
    found = [cls for cls in classes if cls.__module__ == spec.name]
    if len(found) != 1:
        raise UserError(f"task {name}: the file must define one class of Task, but it defines {len(found)}")
    return found[0]


def task_of(config: Mapping[str, Any], records: Sequence[Record]) -> type[Task]:
    """The task whose numbers are made of a run's records; with `fast`, they are the probabilities of its sets.

    Args:
        config: the run's settings.
        records: those of its model, which have the sets' names.

    Raises:
        UserError: as `find`.
    """
    if not config.get("fast"):
        return find(config.get("task") or "files")
    from ..fast import ByProbability, metrics_of

    sets = dict.fromkeys(record["set"] for record in records if "nll" in record)
    return type("Fast", (ByProbability,), {"metrics": metrics_of(sets)})


def load(config: RunConfig) -> Task:
    """The task that a config asks for, its files read and checked; with `fast`, it is scored only by probability."""
    task = _load(config)
    if not config.fast:
        return task
    from ..fast import ByProbability

    return ByProbability(task)


def _load(config: RunConfig) -> Task:
    arguments = dict(config.task_args)
    if config.task is None:
        if config.forget is None:
            raise UserError(f"nothing to forget: give --forget FILE, or --task with one of {', '.join(kinds())}")
        if config.task_args:
            raise UserError("task_args are for a --task; with --forget FILE there is none")
        if config.data_dir is not None:
            raise UserError("data_dir is for a --task; with --forget FILE there is none")
        name = "files"
        arguments = {"forget": config.forget, "retain": config.retain, "goal": config.goal, "general": config.general}
        arguments |= _chunking(config)
    else:
        if config.forget is not None or config.retain is not None:
            raise UserError(f"the task {config.task!r} brings its own rows; leave out --forget and --retain, or --task")
        for key in ("goal", "general", "chunk", "chunk_stride"):
            if getattr(config, key) != getattr(RunConfig(), key):
                raise UserError(f"{key} is for your own rows (--forget FILE); the task {config.task!r} has its own")
        name = config.task
        if config.data_dir is not None:
            arguments["data_dir"] = config.data_dir
    cls = find(name)
    if inspect.isabstract(cls):
        raise UserError(f"task {name!r}: lacks {', '.join(sorted(cls.__abstractmethods__))}; define what it lacks")
    own = read_lines(config.refusals, "text") if config.refusals is not None else None
    of_run: dict[str, Any] = {"tokenizer": config.model, "max_length": config.max_length, "refusals": own}
    arguments = {**{key: of_run[key] for key in cls.of_run}, **arguments}
    arguments = typed(f"task {name!r}", cls, arguments)
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        raise UserError(f"task {name!r} with {arguments}: {error}") from None
    task = cls(**arguments)
    check_objectives(task.objectives)
    return task


def _chunking(config: RunConfig) -> dict[str, Any]:
    """How your own plain text is cut, as arguments of the task."""
    chunk, stride = config.chunk, config.chunk_stride
    if chunk is None:
        if stride is not None:
            raise UserError("chunk_stride: texts are not cut into chunks; add --chunk, or leave it out")
        return {}
    if chunk < 1:
        raise UserError(f"chunk must be a number of tokens > 0, but is {chunk}")
    if stride is not None and not 1 <= stride <= chunk:
        raise UserError(
            f"chunk_stride must be 1 to chunk {chunk}, or what lies between two chunks would be lost, but is {stride}"
        )
    if chunk > config.max_length:
        raise UserError(
            f"chunk {chunk} is more than max_length {config.max_length}, the most tokens of a row; lower chunk or "
            "raise max_length"
        )
    if config.model == TINY:
        raise UserError(f"chunk: {TINY!r} makes its tokenizer of the rows, so it cannot cut them; name another model")
    return {"chunk": chunk, "chunk_stride": stride, "tokenizer": config.model}
