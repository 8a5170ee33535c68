"""Anybody's own rows: one file to forget, one to keep."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..data import Row, check_disjoint, question, read_rows
from ..evaluation.scoring import FOLLOWED_ROWS, score_rows
from . import Metric, Scores
from .facts import asset

SCORED_ROWS = 100  # rows of each set that are scored, drawn once


class Files:
    """Rows from files, scored by the probability of the answers and by ROUGE-L of what the model replies.

    Without a file to keep, the general rows that come with the package serve, and a warning says so.
    """

    name = "files"
    followed = "ROUGE-L of the replies"
    metrics: Mapping[str, Metric] = {
        "forget_probability": Metric("probability, to forget", "lower", ".3f"),
        "forget_rouge_l": Metric("ROUGE-L, to forget", "lower", ".3f"),
        "retain_probability": Metric("probability, to keep", "higher", ".3f"),
        "retain_rouge_l": Metric("ROUGE-L, to keep", "higher", ".3f"),
    }

    def __init__(self, forget: str, retain: str | None) -> None:
        rows = {"forget": read_rows(forget)}
        if retain is None:
            warnings.warn(
                "no --retain FILE: 80 general rows that come with the package stand in for what is to be kept; "
                "rows near the topic to forget would keep more of its neighbourhood",
                stacklevel=2,
            )
            rows["retain"] = [question(r["question"], r["answer"], "general.jsonl") for r in asset("general.jsonl")]
        else:
            rows["retain"] = read_rows(retain)
        check_disjoint(rows["forget"], rows["retain"])
        self.objectives: Mapping[str, Sequence[Row]] = rows
        self.scored = {name: random.Random(0).sample(part, min(SCORED_ROWS, len(part))) for name, part in rows.items()}

    def prepare(self, model: nn.Module, tokenizer: Any) -> Scores:
        return self.evaluate(model, tokenizer)

    def follow(self, model: nn.Module, tokenizer: Any) -> dict[str, float]:
        return {
            name: score_rows(model, tokenizer, rows[:FOLLOWED_ROWS], None).rouge_l for name, rows in self.scored.items()
        }

    def evaluate(self, model: nn.Module, tokenizer: Any) -> Scores:
        numbers, records = {}, []
        for name, rows in self.scored.items():
            scores = score_rows(model, tokenizer, rows, name)
            numbers[f"{name}_probability"], numbers[f"{name}_rouge_l"] = scores.probability, scores.rouge_l
            records += scores.records
        return Scores(numbers, records)
