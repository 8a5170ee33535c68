"""Shares of questions: 95 % intervals, also where several questions ask for the same, such as wordings of one row.

Questions that ask for the same are a cluster: a model that answers one of them tends to answer the others. They tell
less than as many questions of their own, and an interval is made for as many independent ones as tell as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

LEVEL = 0.95


def wilson(share: float, n: int, effective: float | None = None) -> tuple[float, float]:
    """The 95 % Wilson interval of a share of n questions.

    Args:
        effective: how many independent questions tell as much (`effective_number`); None for n.

    >>> [round(bound, 3) for bound in wilson(0.0, 40)]
    [0.0, 0.088]
    >>> [round(bound, 3) for bound in wilson(0.0, 40, 10.0)]  # as wilson(0.0, 10)
    [0.0, 0.278]
    """
    right = round(share * n)
    if effective is None or effective == n:
        from scipy.stats import binomtest

        return tuple(map(float, binomtest(right, n).proportion_ci(LEVEL, method="wilson")))  # type: ignore[return-value]
    from scipy.special import ndtri

    p, z = right / n, float(ndtri((1 + LEVEL) / 2))
    center, width = p + z**2 / (2 * effective), z * math.sqrt(p * (1 - p) / effective + (z / (2 * effective)) ** 2)
    low, high = ((center + sign * width) / (1 + z**2 / effective) for sign in (-1, 1))
    return (low if right else 0.0), (high if right < n else 1.0)


def effective_number(clusters: Sequence[Sequence[float]]) -> float:
    """How many independent questions tell as much about a share p as n questions in m clusters.

        n / deff · (t(n − 1) / t(m − 1))²,   deff = (n − 1) / n² · m / (m − 1) · Σ (x_i − n_i p)² / (p (1 − p)) ≥ 1

    deff is Rao and Scott's design effect with the variance of a share of independent questions estimated without bias,
    so that it is 1 where each question is a cluster; the second factor, by Korn and Graubard, with t(k) the 97.5 %
    quantile of Student's distribution with k degrees of freedom, is for deff's own error, large where clusters are few.
    The number is at least n² / Σ n_i², which is that of questions alike in all clusters: m, or less where the clusters
    differ in size. It is exactly that where deff cannot be estimated: with one cluster, or all or no questions right.

    Args:
        clusters: for each, its n_i questions' values, 0 or 1, whose sum is x_i.

    References:
        J. N. K. Rao and A. J. Scott, A simple method for the analysis of clustered binary data, Biometrics 48, 1992.
        E. L. Korn and B. I. Graubard, Confidence intervals for proportions with small expected number of positive
        counts estimated from survey data, Survey Methodology 24, 1998.

    >>> effective_number([[1.0], [0.0], [1.0]]), effective_number([[0.0] * 4] * 10)
    (3, 10.0)
    """
    n, m = sum(map(len, clusters)), len(clusters)
    if n == m:
        return n
    least = n**2 / sum(len(values) ** 2 for values in clusters)
    p = fmean(value for values in clusters for value in values)
    if m < 2 or not 0 < p < 1:
        return least
    from scipy.special import stdtrit

    error = sum((sum(values) - len(values) * p) ** 2 for values in clusters)
    effect = (n - 1) / n**2 * m / (m - 1) * error / (p * (1 - p))
    few = float(stdtrit(n - 1, (1 + LEVEL) / 2) / stdtrit(m - 1, (1 + LEVEL) / 2)) ** 2
    return max(n / max(effect, 1.0) * few, least)
