"""Questions near some rows: those of a bank with similar hidden states, and those that the model writes itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..build import own_replies
from ..data import Row, question
from ..evaluation import scoring
from . import reword

ASKED = 8  # rows at most for which the model writes similar questions


def nearest(model: nn.Module, tokenizer: Any, asks: Sequence[str], bank: Sequence[Row], count: int) -> list[Row]:
    """The questions of a bank that are nearest to given ones in the model's hidden states, the nearest first.

    Nearness is the cosine of mean hidden states in the model's middle layer, after subtracting their mean over the
    bank, since raw states all point in nearly the same direction.
    """
    states = scoring.mean_states(model, tokenizer, [*(row.question for row in bank), *asks])
    states = torch.nn.functional.normalize(states - states[: len(bank)].mean(0), dim=1)
    nearness = (states[: len(bank)] @ states[len(bank) :].T).amax(1)
    return [bank[i] for i in nearness.argsort(descending=True, stable=True)[:count].tolist()]


def written(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    count: int,
    *,
    max_new_tokens: int,
    touches: Callable[[Row], bool],
) -> list[Row]:
    """Questions of the same kind as some rows' that the model writes and answers itself, with high probability.

    Args:
        count: the most that are returned.
        max_new_tokens: of an answer.
        touches: whether a row asks for, or tells, something that must be left out.
    """
    few = random.Random(0).sample(list(rows), min(ASKED, len(rows)))
    samples = max(2, 2 * count // max(len(few), 1))
    found = reword.written(model, tokenizer, few, reword.OF_THE_SAME_KIND, samples=samples, progress="Neighbors")
    asks: list[Row] = []
    for row, texts in zip(few, found, strict=True):
        for text in texts:
            near = reword.content_words(text) & reword.content_words(row.question)
            other = question(text, "", "the model's own")
            if near and not touches(other) and not any(reword.alike(text, known.question) for known in asks):
                asks.append(other)
    answered = own_replies(model, tokenizer, asks, max_new_tokens=max_new_tokens, sure=True)
    return [row for row in answered if not touches(row)][:count]
