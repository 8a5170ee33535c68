"""Per-sample scores → numbers. Pure functions; each says which direction is good and when it misleads.

This module has scores of one sample and their means over samples; `privacy` has memorization and membership,
`robustness` the results of attacks, `aggregates` combinations of several numbers. All can be imported from here. NaN in
gives NaN out.

The truth ratio of one sample is r = exp(mean false nll − true nll), above 1 if the truth is more probable, as in TOFU's
aggregator and in closer-look-LLM-unlearning (arXiv 2410.08109). The TOFU paper (arXiv 2401.06121) and open-unlearning
write its inverse, false over true, and the paper averages probabilities where this form averages log-likelihoods, a
geometric mean. All aggregate it in the same way on what is kept, but not on what is forgotten: `forget_truth_ratio`
(arXiv 2410.08109; low is forgotten) is 1 − `tofu_forget_truth_ratio` (TOFU; high is forgotten).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cache
from statistics import fmean
from typing import Any, NamedTuple

from .aggregates import SIX as SIX
from .aggregates import TARGETED_PARTS as TARGETED_PARTS
from .aggregates import TOFU_UTILITY_PARTS as TOFU_UTILITY_PARTS
from .aggregates import UNTARGETED_PARTS as UNTARGETED_PARTS
from .aggregates import UTILITY_PARTS as UTILITY_PARTS
from .aggregates import UTILITY_SETS as UTILITY_SETS
from .aggregates import harmonic_mean as harmonic_mean
from .aggregates import model_utility as model_utility
from .aggregates import overall as overall
from .aggregates import targeted_forget_efficacy as targeted_forget_efficacy
from .aggregates import tofu_model_utility as tofu_model_utility
from .aggregates import untargeted_forget_efficacy as untargeted_forget_efficacy
from .privacy import at_least_one
from .privacy import auc as auc
from .privacy import exact_memorisation as exact_memorisation
from .privacy import extraction_strength as extraction_strength
from .privacy import membership_gradient_norm as membership_gradient_norm
from .privacy import membership_loss as membership_loss
from .privacy import membership_reference as membership_reference
from .privacy import membership_score as membership_score
from .privacy import membership_zlib as membership_zlib
from .privacy import min_k as min_k
from .privacy import min_k_plus_plus as min_k_plus_plus
from .privacy import privacy_leakage as privacy_leakage
from .privacy import zlib_bytes as zlib_bytes
from .robustness import leak_at_k as leak_at_k
from .robustness import quantization_robustness as quantization_robustness
from .robustness import relearning_robustness as relearning_robustness
from .words import Plain, Stemmed, stands_in, words

LARGEST = 1e299  # perplexity: what is written to results.json is below 1e300
ENTAILMENT_MIN_ROUGE = 0.1  # below it a reply counts as wrong, whatever the judge says (arXiv 2410.08109)


# Scores of one sample


def contains_answer(reply: str, answers: Sequence[str]) -> bool:
    """Whether the reply contains one of the accepted answers as whole words and numbers, in upper or lower case.

    Kinds of spaces, apostrophes and hyphens are not told apart.

    Misleads where a reply names the answer to deny it, or lists many guesses.

    >>> contains_answer("It is paris.", ["Paris"]), contains_answer("A comparison.", ["Paris"])
    (True, False)
    """
    return any(stands_in(reply, answer) for answer in answers)


def probability(nll: float) -> float:
    """exp(−mean token negative log-likelihood) of the answer: the geometric mean of its tokens' probabilities, 0 to 1.

    Low is forgotten, high is kept. Misleads where the knowledge survives in another wording of the answer.
    """
    return math.exp(-nll)


def normalised_probability(nll: float, perturbed_nlls: Sequence[float]) -> float:
    """p(true) / (p(true) + Σ p(false)), each p as in `probability`, 0 to 1; high is kept.

    Used on Real Authors and World Facts, where answers are short and each comes with a few false ones. Misleads near
    its floor: a model that knows nothing has 1 / (1 + number of false answers) and not 0.

    Args:
        nll: mean token negative log-likelihood of the true answer, in nats.
        perturbed_nlls: those of the false answers.

    Raises:
        ValueError: no false answers.

    References:
        TOFU, arXiv 2401.06121.

    >>> normalised_probability(0.7, [0.7, 0.7, 0.7])
    0.25
    """
    # The fraction is divided through by p(true), which underflows where even the best answer is improbable.
    return 1 / (1 + math.fsum(_exp(nll - false) for false in at_least_one(perturbed_nlls, "normalized probability")))


@cache
def _rouge(kind: str, stemmed: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=Stemmed() if stemmed else Plain())


def _scored(reply: str, answer: str, kind: str, *, stemmed: bool = True) -> Any:
    if not words(answer):  # only symbols, such as "★★" or "🙂": each counts as a word
        answer, reply = (" ".join(f"x{ord(sign):x}" for sign in text if not sign.isspace()) for text in (answer, reply))
    return _rouge(kind, stemmed).score(answer, reply)[kind]


def rouge_l_recall(reply: str, answer: str, *, stemmed: bool = True) -> float:
    """ROUGE-L recall with stemming: the share of the answer's words that are in the reply in the same order, 0 to 1.

    Words of any script (`words`). Low is forgotten, high is kept. Misleads through words that every answer to the
    question has, right or wrong, and rewards long replies.

    Args:
        stemmed: whether English words are stemmed first; RWKU's are not (`evaluation.probes`).

    >>> rouge_l_recall("甲喜欢喝茶。", "甲喜欢喝茶。"), rouge_l_recall("1999年出生于巴黎", "1999年出生于上海")
    (1.0, 0.7142857142857143)
    """
    return float(_scored(reply, answer, "rougeL", stemmed=stemmed).recall)


def rouge_1_recall(reply: str, answer: str) -> float:
    """ROUGE-1 recall with stemming: the share of the answer's words that are in the reply, in any order, 0 to 1.

    Low is forgotten, high is kept. Misleads as `rouge_l_recall` does, and where the order of words matters.

    >>> rouge_1_recall("by the sea, in Oslo", "In Oslo by the sea")
    1.0
    """
    return float(_scored(reply, answer, "rouge1").recall)


def rouge_l_f1(reply: str, answer: str, *, stemmed: bool = True) -> float:
    """ROUGE-L F1 with stemming: the harmonic mean of `rouge_l_recall` and precision, the same share of the reply.

    0 to 1, high is helpful: where many answers would do, it neither rewards length, as recall does, nor brevity.
    Misleads on answers of one or two words, for which a correct full sentence scores low, and on good answers in other
    words.

    Args:
        stemmed: whether English words are stemmed first.

    >>> rouge_l_f1("Positive", "Positive"), rouge_l_f1("positive negative neutral", "Positive")
    (1.0, 0.5)
    >>> rouge_l_f1("ships sailing", "ship sails"), rouge_l_f1("ships sailing", "ship sails", stemmed=False)
    (1.0, 0.0)
    """
    return float(_scored(reply, answer, "rougeL", stemmed=stemmed).fmeasure)


def exact_match(reply: str, answer: str) -> float:
    """1 if the reply equals the answer except for case and surrounding spaces, else 0, as in LUME (arXiv 2502.15097).

    Low is forgotten, high is kept. Misleads on any extra word: a correct full sentence has 0.

    >>> exact_match(" 1984-12-31\\n", "1984-12-31"), exact_match("It is Bergen.", "Bergen")
    (1.0, 0.0)
    """
    return float(reply.strip().lower() == answer.strip().lower())


def token_entropy(token_ids: Sequence[int]) -> float:
    """Entropy of the reply's unigrams over log2 of its n tokens, 1 − Σ c log2 c / (n log2 n) with c each token's count.

    1 if no token occurs twice, 0 if one token is repeated, and 0 for replies of one token or none, as in the published
    evaluation. High is fluent, on what is kept and on what is forgotten alike. Misleads in three ways: gibberish
    without repeated tokens has 1, a right answer of one token has 0, and long replies have less than short ones.

    Args:
        token_ids: the reply's tokens in the model's own tokenizer, without special tokens.

    References:
        arXiv 2410.08109.

    >>> token_entropy([7, 8, 9]), token_entropy([7, 7, 7]), token_entropy([7]), token_entropy([])
    (1.0, 0.0, 0.0, 0.0)
    """
    n = len(token_ids)
    if n <= 1:
        return 0.0
    return 1 - math.fsum(count * math.log2(count) for count in Counter(token_ids).values()) / (n * math.log2(n))


def cosine_score(cosine: float) -> float:
    """max(0, cosine) of the embeddings of reply and answer (`judges.SentenceEmbedder`); low is forgotten, high is kept.

    Misleads on wrong answers to the same question, which are similar to the right one in topic. Numbers of different
    embedding models are not comparable.

    References:
        arXiv 2410.08109, with the model paraphrase-MiniLM-L6-v2.
    """
    return max(cosine, 0.0)  # in this order NaN stays NaN


def truth_ratio_samples(paraphrased: Sequence[float], perturbed: Sequence[Sequence[float]]) -> list[float]:
    """r = exp(mean perturbed − paraphrased): how much more probable a true paraphrase is than false answers; above 1
    the model still prefers the truth. Bounded by e^±700.

    Args:
        paraphrased: mean token negative log-likelihood of each row's paraphrased true answer.
        perturbed: those of each row's false answers, written in the same form.

    Raises:
        ValueError: the lists differ in length, or a row has no false answers.

    References:
        TOFU, arXiv 2401.06121, whose paper writes 1/r; see the module.
    """
    return [
        _exp(fmean(at_least_one(false, "truth ratio")) - true)
        for true, false in zip(paraphrased, perturbed, strict=True)
    ]


def _exp(x: float) -> float:
    """exp, bounded: a broken model's scores overflow neither here nor as 1/exp; in this order NaN stays NaN."""
    return math.exp(max(min(x, 700.0), -700.0))


# Aggregates over samples


def perplexity(nlls: Sequence[float], tokens: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood over all tokens of all texts; lower is better language modeling.

    Misleads across tokenizers, and for chat models, for which training to chat made plain text less probable. At
    most 1e299; infinite where a token has no probability at all.

    Args:
        nlls: each text's mean over its tokens, in nats.
        tokens: how many tokens each text has.

    Raises:
        ValueError: the lists differ in length, or there are no tokens.
    """
    if not sum(tokens):
        raise ValueError("perplexity: the texts have no tokens; give at least one")
    mean = sum(nll * n for nll, n in zip(nlls, tokens, strict=True)) / sum(tokens)
    # What is infinite stays so, for it is no number of a model; what is not fits into results.json.
    return mean if math.isinf(mean) else min(_exp(mean), LARGEST)


def forget_truth_ratio(ratios: Sequence[float]) -> float:
    """1 − mean min(r, 1/r), 0 to 1: near 0 when the truth is as probable as false answers (forgotten).

    Misleads for a broken model, which finds everything equally improbable.

    Raises:
        ValueError: no ratios.

    References:
        arXiv 2410.08109; TOFU's own direction is `tofu_forget_truth_ratio`.
    """
    return 1 - tofu_forget_truth_ratio(ratios)


def tofu_forget_truth_ratio(ratios: Sequence[float]) -> float:
    """mean min(r, 1/r), 0 to 1: near 1 when the truth is as probable as false answers (forgotten).

    Misleads as `forget_truth_ratio` does, which is 1 minus this.

    Raises:
        ValueError: no ratios.

    References:
        TOFU, arXiv 2401.06121; open-unlearning.
    """
    return fmean(min(r, 1 / r) for r in at_least_one(ratios, "truth ratio of what is forgotten"))


def retain_truth_ratio(ratios: Sequence[float]) -> float:
    """mean max(0, 1 − 1/r), 0 to 1: near 1 when the truth is far more probable than false answers (kept).

    Misleads little, but is low even for good models: false answers of the same form are seldom far less probable.

    Raises:
        ValueError: no ratios.

    References:
        TOFU, arXiv 2401.06121, whose paper writes max(0, 1 − r) with its inverse r.
    """
    return fmean(max(1 - 1 / r, 0.0) for r in at_least_one(ratios, "truth ratio of what is kept"))


def truth_share(ratios: Sequence[float]) -> float:
    """mean r / (1 + r), the probability of the truth among the truth and a false answer, 0 to 1; 0.5 is chance.

    Low is forgotten, high is kept. open-unlearning's truth ratio with the aggregator "prob_mean". Misleads as
    `truth_ratio_samples` does: one geometric mean stands for all false answers.

    Raises:
        ValueError: no ratios.

    >>> truth_share([1.0, 3.0])
    0.625
    """
    return fmean(r / (1 + r) for r in at_least_one(ratios, "share of the truth"))


def entailment_score(labels: Sequence[str], rouge_ls: Sequence[float]) -> float:
    """Share of samples labeled "entailment" whose ROUGE-L is at least 0.1, 0 to 1.

    Low is forgotten, high is kept; with "I don't know" answers instead of the true ones, high is refused. Misleads
    where the judge is wrong: such models take short replies and shared names for entailment.

    Args:
        labels: a judge's label per sample, in lower case; `judges` says which text is the premise.
        rouge_ls: ROUGE-L recall of the same replies against the same answers, which may be the "I don't know" answers.

    Raises:
        ValueError: the lists differ in length, or are empty.

    References:
        arXiv 2410.08109.

    >>> entailment_score(["entailment", "entailment", "neutral", "entailment"], [0.9, 0.05, 0.9, 0.1])
    0.5
    """
    counted = [
        label == "entailment" and rouge_l >= ENTAILMENT_MIN_ROUGE
        for label, rouge_l in zip(at_least_one(labels, "entailment score"), rouge_ls, strict=True)
    ]
    return fmean(counted)


class ForgetQuality(NamedTuple):
    """The two-sample Kolmogorov–Smirnov test: its p-value, and the largest distance between distribution functions."""

    p_value: float
    statistic: float


def forget_quality(ratios: Sequence[float], retrained_ratios: Sequence[float]) -> ForgetQuality:
    """Whether the truth ratios on the forget set could be those of a model that never saw it: a two-sided KS test.

    A higher p is better forgotten; above 0.05 the two cannot be told apart. A lower statistic is better. The p-value
    depends on the number of samples: with few of them any model passes, with many none does, and it ranges over tens
    of orders of magnitude. So look at the statistic, too. Neither shows whether the replies make sense.

    Args:
        ratios: `truth_ratio_samples` of the model on the forget set. The inverse ratio gives the same test.
        retrained_ratios: those of the model retrained without the forget set.

    Raises:
        ValueError: one of the lists is empty.

    References:
        TOFU, arXiv 2401.06121.
    """
    from scipy.stats import ks_2samp

    both = at_least_one(ratios, "forget quality"), at_least_one(retrained_ratios, "forget quality, retrained model")
    with warnings.catch_warnings():
        # If the exact p-value rounds above 1, SciPy warns and takes the asymptotic one, nearly 1.
        warnings.filterwarnings("ignore", "ks_2samp: Exact calculation unsuccessful", RuntimeWarning)
        result = ks_2samp(*both)
    return ForgetQuality(float(result.pvalue), float(result.statistic))
