"""TOFU: forget fictitious authors that a model has memorised (arXiv 2401.06121).

The forget set is one of TOFU's splits. Data come from the hub (locuslab/TOFU), or from a folder of TOFU's files with
the ten tasks of closer-look-LLM-unlearning (arXiv 2410.08109), of which the first is TOFU's own split and the others
are of the same size.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..data import Row, check_disjoint, parse_row, read_records
from ..errors import UserError, unknown
from ..evaluation import metrics, scoring
from ..evaluation.scoring import FOLLOWED_ROWS, score_rows
from . import Metric, Scores

HUB = "locuslab/TOFU"
TASKS = 10
# Split → what is kept beside it: in a folder, the authors that none of its ten tasks forgets; on the hub, all others.
SPLITS = {
    "forget01": ("retain90", "retain99"),
    "forget05": ("retain50", "retain95"),
    "forget10": ("retain10", "retain90"),
}


class Tofu:
    """See the module.

    Args:
        data_dir: folder with forget01.json, forget01_perturbed.json, retain90.json, retain_perturbed.json, …; without
            it the hub is asked.
        split: forget01, forget05 or forget10: 1, 5 or 10 % of the authors.
        part: which of the ten tasks to forget; the hub has the first alone. None for all that the file holds.
        retain_rows: how many rows are kept, drawn once from what no split forgets; None for all.
        scored_rows: how many rows of each set are scored at most.
    """

    name = "tofu"
    followed = "ROUGE-L of the replies"
    metrics: Mapping[str, Metric] = {
        f"{name}_{key}": Metric(f"{label}, {what}", better if name == "retain" else opposite, ".3f")
        for name, what in (("forget", "to forget"), ("retain", "to keep"))
        for key, label, better, opposite in (
            ("probability", "probability", "higher", "lower"),
            ("rouge_l", "ROUGE-L", "higher", "lower"),
            ("truth_ratio", "truth ratio", "higher", "lower"),
        )
    }

    def __init__(
        self,
        data_dir: str | None = None,
        split: str = "forget01",
        part: int | None = 1,
        retain_rows: int | None = 160,
        scored_rows: int = 40,
    ) -> None:
        if split not in SPLITS:
            raise unknown("TOFU split", split, SPLITS)
        if part is not None and part not in range(1, TASKS + 1):
            raise UserError(f"task 'tofu': part must be 1 to {TASKS}, or null for the whole split, but is {part!r}")
        if data_dir is None and part not in (None, 1):
            raise UserError(f"task 'tofu': the hub has part 1 of each split alone, and part {part} needs --data-dir")
        read = _hub if data_dir is None else _Folder(data_dir)
        forget, forget_perturbed = read(split), read(f"{split}_perturbed")
        if part is not None and data_dir is not None:
            forget = [row for row in forget if row.fields.get("task_id") == str(part)]
            forget_perturbed = [row for row in forget_perturbed if row.fields.get("task_id") == str(part)]
        retain = read(SPLITS[split][data_dir is None])
        retain_perturbed = read("retain_perturbed")
        for rows, name in ((forget, split), (forget_perturbed, f"{split}_perturbed"), (retain, "the retain set")):
            if not rows:
                raise UserError(
                    f"TOFU: {name} holds no rows of part {part}; is this the folder with the ten-task split?"
                )
        # Scored are kept rows that have perturbed answers; they come first among those that are trained on.
        scored = {row.question for row in retain_perturbed}
        retain = random.Random(0).sample(retain, len(retain))
        retain.sort(key=lambda row: row.question not in scored)
        retain = retain[:retain_rows]
        self.objectives: Mapping[str, Sequence[Row]] = {"forget": forget, "retain": retain}
        check_disjoint(forget, retain)
        kept = {row.question for row in retain}
        self.perturbed = {
            "forget": forget_perturbed[:scored_rows],
            "retain": [row for row in retain_perturbed if row.question in kept][:scored_rows],
        }
        if not self.perturbed["retain"]:
            raise UserError("TOFU: no row of retain_perturbed is among the kept rows; raise retain_rows")

    def prepare(self, model: nn.Module, tokenizer: Any) -> Scores:
        return self.evaluate(model, tokenizer)

    def follow(self, model: nn.Module, tokenizer: Any) -> dict[str, float]:
        return {
            name: score_rows(model, tokenizer, rows[:FOLLOWED_ROWS], None).rouge_l
            for name, rows in self.perturbed.items()
        }

    def evaluate(self, model: nn.Module, tokenizer: Any) -> Scores:
        numbers, records = {}, []
        for name, rows in self.perturbed.items():
            scores = score_rows(model, tokenizer, rows, name)
            paraphrased = scoring.negative_log_likelihoods(
                model, tokenizer, [row.answered(row.fields["paraphrased_answer"]) for row in rows]
            )
            false = [row.answered(answer) for row in rows for answer in row.fields["perturbed_answer"]]
            nlls = iter(scoring.negative_log_likelihoods(model, tokenizer, false, progress=f"False answers, {name}"))
            perturbed = [[next(nlls) for _ in row.fields["perturbed_answer"]] for row in rows]
            ratios = metrics.truth_ratio_samples(paraphrased, perturbed)
            aggregate = metrics.forget_truth_ratio if name == "forget" else metrics.retain_truth_ratio
            numbers[f"{name}_probability"], numbers[f"{name}_rouge_l"] = scores.probability, scores.rouge_l
            numbers[f"{name}_truth_ratio"] = aggregate(ratios)
            for record, true, untrue in zip(scores.records, paraphrased, perturbed, strict=True):
                records.append({**record, "paraphrased_nll": true, "perturbed_nll": untrue})
        return Scores(numbers, records)


class _Folder:
    """TOFU's files in a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"data_dir {folder}: there is no such folder; give TOFU's, with forget01.json and the rest")

    def __call__(self, name: str) -> list[Row]:
        return [parse_row(record, where) for record, where in read_records(self.folder / f"{name}.json")]


def _hub(name: str) -> list[Row]:
    """TOFU's file of that name on the hub."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            "reading TOFU from the hub needs the package datasets; install it, or give --data-dir"
        ) from None
    try:
        data = load_dataset(HUB, name, split="train")
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{HUB}, {name}: could not be loaded from the hub ({reason}); give --data-dir") from None
    return [parse_row(record, f"{HUB}/{name}:{i}") for i, record in enumerate(data, 1)]
