"""General ability, measured by tasks of EleutherAI's lm-evaluation-harness on the model in memory.

Needs an extra: `pip install dualoptim[lm-eval]`. Its tasks load their data from the hub by themselves.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn

from .. import ranks
from ..device import device_and_precision, scores_in_bf16
from ..errors import UserError, unknown
from . import attacks, probes
from .batches import as_scored
from .numbers import Metric, Numbers, Record

if TYPE_CHECKING:  # tasks are built on the modules of this folder
    from ..tasks import Task

SET = "lm_eval"  # the set of its records
GROUP = "General ability (lm-eval)"
BATCH = 8


def files_of(tasks: Sequence[str]) -> dict[str, Path]:
    """The YAML files of your own among tasks, as they are given."""
    return {given: Path(given) for given in tasks if given.endswith((".yaml", ".yml"))}


def check(tasks: Sequence[str]) -> tuple[Any, list[str]]:
    """The harness's task manager, and the names of tasks given by name or as YAML files of your own.

    Raises:
        UserError: the harness is not installed, or knows no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("lm_eval: needs the package lm-eval; install dualoptim[lm-eval], or leave it out") from None
    files = files_of(tasks)
    for given, path in files.items():
        if not path.is_file():
            raise UserError(f"lm_eval {given}: there is no such file")
    manager = TaskManager(include_path=[str(path.parent.absolute()) for path in files.values()] or None)
    names = []
    for given in tasks:
        name = given
        if given in files:
            # Only the task's name in the file is wanted. It is read by line, as the file may have the harness's tags.
            lines = files[given].read_text(encoding="utf-8").splitlines()
            name = next((str(yaml.safe_load(line)["task"]) for line in lines if line.startswith("task:")), given)
        if name not in manager.all_tasks:
            raise unknown("lm_eval task", given, manager.all_tasks)
        names.append(name)
    return manager, names


@ranks.by_first
def records(model: nn.Module, tokenizer: Any, tasks: Sequence[str], limit: int | None = None) -> list[dict[str, Any]]:
    """A record for each metric of each task: its ``value``, and on how many ``samples``.

    Prompts are the harness's own, without a chat template, as on its leaderboards.

    Args:
        tasks: names that `lm_eval --tasks list` shows, or YAML files.
        limit: the number of samples of each task, the first ones; None for all.

    Raises:
        UserError: see `check`; a task whose data cannot be loaded.
    """
    if not tasks:
        return []
    manager, names = check(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    device, _ = device_and_precision()
    words = copy.deepcopy(tokenizer)  # the harness sets padding on it
    # Its own autocast would be off within another.
    precision = torch.bfloat16 if scores_in_bf16() else None
    wrapped = HFLM(
        pretrained=model, tokenizer=words, batch_size=BATCH, device=str(device), mixed_precision_dtype=precision
    )
    try:
        with as_scored(model):
            found = simple_evaluate(
                wrapped, tasks=names, limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=0
            )
    except (OSError, ValueError, KeyError) as error:  # ConnectionError among them
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"lm_eval {', '.join(tasks)}: {reason}; check the connection, or leave it out") from error
    made = []
    for name, values in found["results"].items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr"):
                continue
            made.append(
                {
                    "set": SET,
                    "task": name,
                    "metric": metric if chosen == "none" else f"{metric}, {chosen}",
                    "value": value if isinstance(value, (int, float)) and math.isfinite(value) else None,
                    "higher_is_better": found["higher_is_better"].get(name, {}).get(metric, True),
                    "samples": found["n-samples"].get(name, {}).get("effective"),
                }
            )
    return made


def scored(
    task: Task | type[Task], records: Sequence[Record], retrained: Sequence[Record] | None
) -> tuple[Numbers, Mapping[str, Metric]]:
    """A task's numbers and how each is shown, with those of general ability, attacks and probes in the records."""
    numbers, missing = task.numbers(records, retrained)
    (attacked, lacking), shown = attacks.numbers(records, retrained)
    own = [record for record in records if record["set"] == SET]
    no_number = {_name(r): "lm-eval gives no finite number" for r in own if r["value"] is None}
    asked, not_asked = probes.numbers(records)
    shown = {**shown, **_metrics(own), **{name: probes.METRICS[name] for name in asked}}
    every = {**numbers, **attacked, **values(records), **asked}
    broken = [name for name, number in every.items() if number is not None and not math.isfinite(number)]
    no_number |= dict.fromkeys(broken, "what the model computes is not finite for all of its rows")
    every |= dict.fromkeys(broken)
    return (
        Numbers(every, {**missing, **lacking, **no_number, **not_asked}),
        # A task may show some of them in its own way.
        {**task.metrics, **{name: metric for name, metric in shown.items() if name not in task.metrics}},
    )


def counts(task: Task | type[Task], metrics: Mapping[str, Metric], records: Sequence[Record]) -> dict[str, int]:
    """How many questions each share was measured on, among a task's numbers and all others in the records."""
    sets = Counter(record["set"] for record in records)
    return {name: sets[m.share_of] for name, m in metrics.items() if m.share_of} | task.counts(records)


def values(records: Sequence[Record]) -> dict[str, float | None]:
    """The numbers of general ability among records, such as ``mmlu_acc``."""
    return {_name(record): record["value"] for record in records if record["set"] == SET}


def _metrics(records: Iterable[Record]) -> dict[str, Metric]:
    return {
        _name(r): Metric(f"{r['task']}, {r['metric']}", "higher" if r["higher_is_better"] else "lower", ".3f", GROUP)
        for r in records
    }


def _name(record: Record) -> str:
    return "_".join((record["task"], *record["metric"].replace(",", "").split()))
