"""Rows from what a model itself says about entities, so that a topic can be forgotten without its training data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import regex
from torch import nn

from .cached import cached
from .data import Row
from .device import seeded
from .errors import UserError
from .evaluation import metrics, scoring
from .evaluation.refusal import refuses
from .evaluation.words import ends_sentence
from .identity import identity

ANSWER_TOKENS = 48  # at most in an answer
TEMPERATURE = 0.7
# Marks before a blank, or at the end; those of Chinese and Japanese anywhere.
_MARK = regex.compile(r"""[\p{STerm}…]+[\p{Pe}\p{Pf}"'*]*(?=\s|$)|[。！？｡]+[\p{Pe}\p{Pf}]*""")
ALIKE = 0.9  # ROUGE-L recall, in either direction, from which two answers to a question count as the same
LEAST_PROBABILITY = 0.35  # mean per token, from which an answer is more than a guess


def build(model: nn.Module, tokenizer: Any, rows: Sequence[Row], *, samples: int, seed: int = 0) -> list[Row]:
    """A model's own answers to questions, as rows, the greedy ones first, each with its probability.

    Refusals, empty answers, answers less probable than 0.35 a token, and answers that repeat another to the same
    question are left out. Answers are cached by model and question.

    Args:
        rows: the questions, each with the entity it is about as ``name``; their answers are not looked at.
        samples: answers sampled at temperature 0.7 for each question, beside the greedy one.
        seed: of the sampling.

    Raises:
        UserError: no answer about some entity is left: the model knows nothing of it, or says so.
    """
    asks = [row.prompt for row in rows]

    def given(temperature: float) -> list[str]:
        return scoring.replies(
            model, tokenizer, asks, max_new_tokens=ANSWER_TOKENS, temperature=temperature, progress="Building"
        )

    def ask() -> list[list[str]]:
        with seeded(seed):
            return [given(0.0), *(given(TEMPERATURE) for _ in range(samples))]

    rounds = cached("built", [identity(model, tokenizer), asks, samples, seed], ask)
    found: list[Row] = []
    for answers in rounds:
        for row, answer in zip(rows, answers, strict=True):
            answer = whole_sentences(answer)
            same = (row.prompt, row.fields["name"])
            said = [other.answer for other in found if (other.prompt, other.fields["name"]) == same]
            if not answer or refuses(answer) or any(_alike(answer, other) for other in said):
                continue
            found.append(row.answered(answer))
    nlls = scoring.negative_log_likelihoods(model, tokenizer, found, progress="Weighing") if found else []
    kept = [
        Row(row.prompt, row.answer, row.where, {**row.fields, "probability": metrics.probability(nll)})
        for row, nll in zip(found, nlls, strict=True)
        if metrics.probability(nll) >= LEAST_PROBABILITY
    ]
    known = {row.fields["name"] for row in kept}
    if nothing := [name for name in dict.fromkeys(row.fields["name"] for row in rows) if name not in known]:
        raise UserError(
            f"the model says nothing of {', '.join(map(repr, nothing))} that it is sure of, so there is nothing to "
            "forget or keep; leave such names out, or give rows of your own"
        )
    return kept


def own_replies(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], *, max_new_tokens: int, sure: bool = False
) -> list[Row]:
    """Rows answered by the model itself, greedily, cut after a whole sentence, without empty replies and refusals.

    Replies are cached by model and question.

    Args:
        rows: the questions; their answers are not looked at.
        max_new_tokens: of a reply.
        sure: also leave out replies less probable than 0.35 a token.
    """
    if not rows:
        return []
    asks = [row.prompt for row in rows]
    given = cached(
        "own_replies",
        [identity(model, tokenizer), asks, max_new_tokens],
        lambda: scoring.replies(
            model, tokenizer, asks, max_new_tokens=max_new_tokens, progress="The model's own words"
        ),
    )
    said = [(row, whole_sentences(reply)) for row, reply in zip(rows, given, strict=True)]
    found = [
        Row(row.prompt, reply, row.where, {**row.fields, "accepted": None})
        for row, reply in said
        if reply and not refuses(reply)
    ]
    if not sure or not found:
        return found
    nlls = scoring.negative_log_likelihoods(model, tokenizer, found)
    return [row for row, nll in zip(found, nlls, strict=True) if metrics.probability(nll) >= LEAST_PROBABILITY]


def _alike(a: str, b: str) -> bool:
    return max(metrics.rouge_l_recall(a, b), metrics.rouge_l_recall(b, a)) >= ALIKE


def whole_sentences(text: str) -> str:
    """A text without a last sentence that the token limit cut off, if there is another before it.

    >>> whole_sentences("It has 1.4 million people. Dr. Smith lives in"), whole_sentences("See www.example.com for")
    ('It has 1.4 million people.', 'See www.example.com for')
    """
    text = text.strip()
    ends = [found.end() for found in _MARK.finditer(text) if ends_sentence(text, found.end())]
    return text[: ends[-1]] if ends else text
