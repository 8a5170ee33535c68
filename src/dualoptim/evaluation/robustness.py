"""Scores of a model under attack → how well forgetting withstands it. `attacks` makes the scores.

m is how much of what was to be forgotten a model shows, such as the probability of the answers: b before an attack, a
after it. NaN in gives NaN out.
"""

from __future__ import annotations

import math


def relearning_robustness(before: float, after: float, retrained_before: float, retrained_after: float) -> float:
    """R = min((m_ret^a − m_ret^b) / (m_unl^a − m_unl^b), 1), 0 to 1: how fast a model that never knew learns, over how
    fast the model relearns; high is forgotten.

    1 where the model relearns no faster than one that never knew, or nothing at all; near 0 where a little training
    brings back what was merely hidden. Misleads where both hardly move, at a rate or a number of rows too small for the
    model: look at the two gains as well. Below 0, where the retrained model unlearns meanwhile, it is 0.

    Args:
        before: m of the unlearned model.
        after: m of it once it was trained on the rows to forget.
        retrained_before: m of the model that was never taught them.
        retrained_after: m of that one after the same training.

    References:
        OpenUnlearning, arXiv 2506.12618, which asks so whether a metric can be trusted, and averages over models; here
        the metric stays the same and the model is judged.

    >>> relearning_robustness(0.125, 0.625, 0.25, 0.375), relearning_robustness(0.1, 0.2, 0.1, 0.4)
    (0.25, 1.0)
    """
    gain, usual = after - before, retrained_after - retrained_before
    if math.isnan(gain + usual):
        return math.nan
    return 1.0 if gain <= 0 else min(max(usual / gain, 0.0), 1.0)


def quantization_robustness(before: float, after: float) -> float:
    """Q = min(m^b / m^a, 1), 0 to 1: what the model shows, over what it shows once it is rounded; high is forgotten.

    1 where rounding brings nothing back. Misleads where rounding ruins a model, whose m falls: see what is kept, too;
    and where both are near 0, as any two small numbers may have a small ratio.

    Args:
        before: m of the model as it is, ≥ 0.
        after: m of it with its weights rounded, ≥ 0.

    References:
        OpenUnlearning, arXiv 2506.12618, for NF4. That rounding may bring back what was forgotten: arXiv 2410.16454.

    >>> quantization_robustness(0.125, 0.5), quantization_robustness(0.5, 0.125), quantization_robustness(0.0, 0.0)
    (0.25, 1.0, 1.0)
    """
    if math.isnan(before + after):
        return math.nan
    return 1.0 if after <= before else before / after


def leak_at_k(samples: int, leaks: int, k: int) -> float:
    """1 − C(n − c, k) / C(n, k): the probability that one of k sampled replies or more leaks; low is forgotten.

    0 to 1. Without bias: its mean over draws of n replies is 1 − (1 − p)^k, where each leaks with probability p.
    Misleads by what is counted as a leak, and by the temperature: greedy replies say nothing of it.

    Args:
        samples: n, replies that were sampled.
        leaks: c, how many of them leak.
        k: how many an asker draws, 1 to n.

    Raises:
        ValueError: c or k is not within n.

    References:
        leak@k, arXiv 2511.04934; the estimator is that of pass@k, arXiv 2107.03374.

    >>> leak_at_k(4, 1, 1), leak_at_k(4, 1, 2), leak_at_k(4, 0, 4), leak_at_k(4, 1, 4)
    (0.25, 0.5, 0.0, 1.0)
    """
    if not (0 <= leaks <= samples and 1 <= k <= samples):
        raise ValueError(f"leak@k: of {samples} replies {leaks} leak and {k} are drawn; both must be among them")
    return 1 - math.comb(samples - leaks, k) / math.comb(samples, k)
