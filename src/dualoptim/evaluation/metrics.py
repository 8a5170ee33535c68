"""Per-sample scores → numbers. Pure functions; each says in which direction it is good and how it misleads."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from statistics import fmean
from typing import Any


def contains_answer(reply: str, answers: Sequence[str]) -> bool:
    """Whether one of the accepted answers stands in the reply as whole words, in any case.

    Misleads where a reply names the answer to deny it, or lists many guesses.

    >>> contains_answer("It is paris.", ["Paris"]), contains_answer("A comparison.", ["Paris"])
    (True, False)
    """
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply, re.IGNORECASE) for answer in answers)


def probability(nll: float) -> float:
    """exp(−mean token negative log-likelihood) of the answer: the geometric mean of its tokens' probabilities, 0 to 1.

    Low is forgotten, high is kept. Misleads where the knowledge survives in another wording of the answer.
    """
    return math.exp(-nll)


def perplexity(nlls: Sequence[float], tokens: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood over all tokens of all texts; lower is better language modelling.

    Args:
        nlls: each text's mean over its tokens, in nats.
        tokens: how many tokens each text has.
    """
    return math.exp(sum(nll * n for nll, n in zip(nlls, tokens, strict=True)) / sum(tokens))


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l_recall(reply: str, answer: str) -> float:
    """ROUGE-L recall with stemming: the share of the answer's words that stand in the reply in the same order, 0 to 1.

    Low is forgotten, high is kept. Misleads by the words that every answer to the question has, right or wrong, and
    rewards long replies.
    """
    return _rouge().score(answer, reply)["rougeL"].recall


def truth_ratio_samples(paraphrased: Sequence[float], perturbed: Sequence[Sequence[float]]) -> list[float]:
    """r = exp(mean perturbed − paraphrased): how much more probable a true paraphrase is than false answers; above 1
    the model still prefers the truth.

    Args:
        paraphrased: mean token negative log-likelihood of each row's paraphrased true answer.
        perturbed: those of each row's false answers, written in the same form.
    """
    return [math.exp(fmean(false) - true) for true, false in zip(paraphrased, perturbed, strict=True)]


def forget_truth_ratio(ratios: Sequence[float]) -> float:
    """1 − mean min(r, 1/r), 0 to 1: near 0 when the truth is no more and no less probable than falsehoods (forgotten).

    Misleads for a model ruined so far that it finds everything equally improbable.
    """
    return 1 - fmean(min(r, 1 / r) for r in ratios)


def retain_truth_ratio(ratios: Sequence[float]) -> float:
    """mean max(0, 1 − 1/r), 0 to 1: near 1 when the truth is far more probable than falsehoods (kept)."""
    return fmean(max(0.0, 1 - 1 / r) for r in ratios)
