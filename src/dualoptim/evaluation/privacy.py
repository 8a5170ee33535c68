"""Memorization and membership: per-token scores → how much of a text a model still holds, and whether that shows.

A higher membership score always means that the text was more likely trained on, whatever sign its authors give it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from statistics import fmean
from typing import TypeVar

T = TypeVar("T")


def at_least_one(values: Sequence[T], what: str) -> Sequence[T]:
    """The values themselves; a ValueError if there are none, as a mean over nothing is not a number."""
    if not len(values):
        raise ValueError(f"{what}: there are no values to compute it from; give at least one")
    return values


def exact_memorisation(top1: Sequence[int]) -> float:
    """Share of the answer's tokens that are the model's first choice given all the true tokens before, 0 to 1.

    Low is forgotten. Misleads through tokens that any fluent model gets right, and does not see knowledge in other
    words.

    Args:
        top1: per answer token, 1 where the most probable token is the true one under teacher forcing, else 0.

    Raises:
        ValueError: no tokens.

    References:
        Tirumala et al., Memorization Without Overfitting, arXiv 2205.10770.

    >>> exact_memorisation([1, 0, 1, 1])
    0.75
    """
    return fmean(at_least_one(top1, "exact memorization"))


def extraction_strength(top1: Sequence[int]) -> float:
    """1 − k/n for the smallest k such that all n − k tokens from the k-th on are right: how little of the answer has to
    be given away for the model to write the rest, 0 to 1.

    If all tokens from k on are right under teacher forcing, greedy decoding from there gives the answer's rest, too, so
    one forward pass is enough. Low is forgotten. Misleads if one token late in the answer is wrong, which hides all
    that was right before it. It is never above `exact_memorisation`.

    An answer whose last token is wrong has 0 here; open-unlearning's loop ends one token early and gives it 1/n.

    Args:
        top1: as for `exact_memorisation`.

    Raises:
        ValueError: no tokens.

    References:
        Carlini et al., arXiv 2012.07805; as a measure of unlearning: Wang et al., arXiv 2406.09179.

    >>> extraction_strength([0, 1, 0, 1])  # three of four tokens must be given, and the last one follows
    0.25
    """
    right = 0
    for token in reversed(at_least_one(top1, "extraction strength")):
        if not token:
            break
        right += 1
    return right / len(top1)


def membership_loss(nll: float) -> float:
    """−nll, the text's mean token log-likelihood: higher is more likely a member.

    Misleads on easy texts: plain sentences look like members to any model.

    References:
        Yeom et al., arXiv 1709.01604.
    """
    return -nll


def membership_zlib(nll: float, text: str) -> float:
    """−nll / bytes of the zlib-compressed text: the log-likelihood relative to the text's information.

    Higher is more likely a member.

    The usual definition takes the mean negative log-likelihood per token, as the ratio's authors do; the sum over
    tokens gives another score. Misleads on short texts, where zlib's frame of 8 bytes is a large part of the length.

    Args:
        nll: mean negative log-likelihood per token of `text`, in nats.
        text: the text that was scored; compressed as UTF-8 at zlib's default level.

    References:
        Carlini et al., arXiv 2012.07805.

    >>> membership_zlib(2.0, "aaaa" * 100) < membership_zlib(2.0, "The quick brown fox jumps over the lazy dog.")
    True
    """
    return -nll / zlib_bytes(text)


def zlib_bytes(text: str) -> int:
    """How many bytes a text has, compressed as `membership_zlib` does."""
    return len(zlib.compress(text.encode("utf-8")))


def membership_reference(nll: float, reference_nll: float) -> float:
    """reference_nll − nll: how much more probable the text is under the model than under one not trained on it; higher
    is more likely a member.

    Misleads if the reference differs in more than the training on these texts.

    Args:
        nll: mean negative log-likelihood per token, in nats.
        reference_nll: the same under the reference model.

    References:
        Carlini et al., arXiv 2012.07805.
    """
    return reference_nll - nll


def membership_gradient_norm(norm: float) -> float:
    """−norm of the loss's gradient, which is smaller on texts that the model was trained on; higher is more likely a
    member.

    The norm is `scoring.gradient_norms`': of the answer's mean negative log-likelihood, (1/P) Σ_p ‖∂nll/∂θ_p‖₂ over
    the P parameter tensors, as open-unlearning averages it. Misleads as `membership_loss`, with which it correlates.

    References:
        Nasr et al., arXiv 1812.00910; on language models: Wang et al., Pandora's White-Box, arXiv 2402.17012.
    """
    return -norm


def min_k(token_log_probs: Sequence[float], k: float = 0.2) -> float:
    """Mean log-probability of the share k of tokens that are least probable (at least one token); higher is more likely
    a member: a text that was trained on has fewer improbable tokens.

    Misleads if the two groups of texts differ in more than membership, in date or style for instance.

    Args:
        token_log_probs: log p of each true token, in nats.
        k: share of the tokens, above 0 and at most 1. 0.2 is the authors' choice (arXiv 2310.16789); MUSE and
            open-unlearning take 0.4.

    Raises:
        ValueError: no tokens, or k out of its range.

    References:
        Shi et al., arXiv 2310.16789.

    >>> min_k([-1.0, -5.0, -2.0, -3.0, -4.0], k=0.4)
    -4.5
    """
    return _lowest(token_log_probs, k, "min-k")


def min_k_plus_plus(z_scores: Sequence[float], k: float = 0.2) -> float:
    """Mean of the share k of lowest z = (log p − μ) / σ, at least one; higher is more likely a member.

    μ and σ² are the mean and the variance of log p(v) over the vocabulary under the model's own distribution at that
    token, μ = Σ_v p(v) log p(v): a token counts as surprising relative to the alternatives in its place. Misleads as
    `min_k` does, and where σ is nearly 0: bound it from below (open-unlearning: σ² ≥ 1e-6).

    Args:
        z_scores: one z per true token.
        k: share of the tokens, above 0 and at most 1. 0.2 is that of `min_k`; the authors find the score robust to it,
            and open-unlearning takes 0.4.

    Raises:
        ValueError: no tokens, or k out of its range.

    References:
        Zhang et al., arXiv 2404.02936.
    """
    return _lowest(z_scores, k, "min-k++")


def _lowest(values: Sequence[float], k: float, what: str) -> float:
    if not 0 < k <= 1:
        raise ValueError(f"{what}: k is the share of the tokens to average, above 0 and at most 1, but is {k!r}")
    if any(map(math.isnan, at_least_one(values, what))):  # sorting could move a NaN out of the lowest
        return math.nan
    return fmean(sorted(values)[: max(1, int(len(values) * k))])


def auc(members: Sequence[float], non_members: Sequence[float]) -> float:
    """The probability that a member's score is above a non-member's, ties counted half: U / (n m) with the Mann–Whitney
    statistic U, the area under the ROC curve.

    1: all members are recognized; 0.5: chance. After unlearning the aim is the AUC of a model never trained on the
    members, mostly near 0.5: an AUC far below shows that they were forgotten as clearly as one far above shows that
    they were learned. Misleads if the groups differ in more than membership, and with few samples: its standard error
    is about 0.29 √(1/n + 1/m) near 0.5.

    Args:
        members: membership scores of texts that were trained on, higher where membership is more likely.
        non_members: those of texts that were not.

    Raises:
        ValueError: one of the groups is empty.

    >>> auc([3.0, 2.0], [2.0, 1.0])
    0.875
    """
    from scipy.stats import rankdata

    n, m = len(at_least_one(members, "AUC of the members")), len(at_least_one(non_members, "AUC of the non-members"))
    ranks = rankdata([*members, *non_members])
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def membership_score(auc: float) -> float:
    """LUME's 1 − 2 |AUC − 0.5|, 0 to 1: 1 if members cannot be told from others, 0 if all can, at either extreme.

    High is good after unlearning. Misleads as `auc` does, and if a model never trained on the members has another AUC
    than 0.5.

    References:
        SemEval-2025 task 4, arXiv 2504.02883; LUME, arXiv 2502.15097.

    >>> membership_score(0.5), membership_score(1.0), membership_score(0.25)
    (1.0, 0.0, 0.5)
    """
    return 1 - 2 * abs(auc - 0.5)


def privacy_leakage(auc: float, auc_retrained: float) -> float:
    """MUSE's PrivLeak in percent, 100 (a − a_r) / a_r with a = 1 − AUC and a_r that of the retrained model; 0 is best.

    Negative is under-unlearning: members still show (−100 if all are recognized). Positive is over-unlearning: they
    show because they are less probable than by chance. MUSE calls −5 to 5 no leak. The paper writes AUC, but its code
    takes the held-out texts as the positives, hence 1 − AUC of our `auc`, as in open-unlearning (which adds 1e-10 to
    the denominator). Misleads where a_r is small: then anything is a large percentage.

    Args:
        auc: `auc` of the model, texts to forget as members, held-out texts of the same kind as non-members; MUSE scores
            them by `min_k` with k = 0.4.
        auc_retrained: the same of the model trained without the texts to forget.

    Raises:
        ValueError: the retrained model's AUC is 1, and the ratio has no value.

    References:
        Shi et al., MUSE, arXiv 2407.06460, section 3.1.

    >>> privacy_leakage(0.5, 0.5), privacy_leakage(1.0, 0.5), privacy_leakage(0.0, 0.5)
    (0.0, -100.0, 100.0)
    """
    if auc_retrained == 1:
        raise ValueError(
            "privacy leakage: the retrained model tells all held-out texts apart (AUC 1), so nothing can be compared "
            "with it; hold out texts of the same kind as those to forget"
        )
    return 100 * (auc_retrained - auc) / (1 - auc_retrained)
