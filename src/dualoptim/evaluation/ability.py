"""What a model could do before and should still do, whatever is unlearned: a cheap measure, taken during training."""

from __future__ import annotations

import math
import random
from typing import Any

from torch import nn

from ..chat import prompt_ids
from ..data import Row, asset, question
from ..models import positions
from . import metrics, scoring

ASKED = 32  # facts asked, drawn once from the included ones
LEAST = 4  # facts that the model must know for them to be used
REPLY_TOKENS = 16
PASSAGES = 4
SPEAKS = 1000.0, 0.1  # perplexity, and perplexity / vocabulary size, above which a model knows no English


class Ability:
    """The lesser of two shares: the known facts that the model still answers, and old over new perplexity.

    1 at the start. A fact counts as answered if the greedy reply contains its answer. Misleads where a model loses
    anything other than short answers of general knowledge and plain English.

    Args:
        model: as it is before training.
        tokenizer: its own; without a chat template no facts are asked.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        facts = random.Random(0).sample(asset("known_facts.jsonl"), ASKED)
        rows = [question(f["question"], "", accepted=[f["answer"], *f["aliases"]]) for f in facts]
        if not getattr(tokenizer, "chat_template", None):
            rows = []
        room = positions(model)
        rows = [row for row in rows if len(prompt_ids(tokenizer, row.prompt)) < room]
        right = self._answered(model, rows)
        self.facts = [row for row, known in zip(rows, right, strict=True) if known]
        if len(self.facts) < LEAST:
            self.facts = []
        self.passages = [Row((), row["text"], "passages.jsonl") for row in asset("passages.jsonl")[:PASSAGES]]
        if not scoring.reads(model, tokenizer, self.passages):
            self.passages = []
        self.perplexity = self._perplexity(model) if self.passages else math.inf
        most, share = SPEAKS
        if self.perplexity > min(most, share * len(tokenizer)):  # a change of it would mean nothing
            self.passages = []

    @property
    def measures(self) -> bool:
        """Whether the model could do anything at the start, so that a loss of it would show."""
        return bool(self.facts or self.passages)

    def __call__(self, model: nn.Module) -> float:
        """The share that is left, 0 to 1."""
        shares = [1.0]
        if self.facts:
            shares.append(sum(self._answered(model, self.facts)) / len(self.facts))
        if self.passages:
            now = self._perplexity(model)
            shares.append(0.0 if math.isnan(now) else self.perplexity / now)
        return min(shares)

    def _answered(self, model: nn.Module, rows: list[Row]) -> list[bool]:
        given = scoring.replies(model, self.tokenizer, [row.prompt for row in rows], max_new_tokens=REPLY_TOKENS)
        return [metrics.contains_answer(reply, row.fields["accepted"]) for reply, row in zip(given, rows, strict=True)]

    def _perplexity(self, model: nn.Module) -> float:
        nlls = scoring.negative_log_likelihoods(model, self.tokenizer, self.passages)
        return metrics.perplexity(nlls, scoring.token_counts(self.tokenizer, self.passages))
