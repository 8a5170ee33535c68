"""Numbers → one number: aggregates of several metrics of one model.

An aggregate takes a mapping of names to numbers, None for what was not computed, and picks its parts by name
(`UTILITY_PARTS`, …), so that one mapping of all of a model's numbers serves all aggregates. If a part is None, the
aggregate is None; a missing part is an error: nothing is left out silently. NaN in gives NaN out.

Two families share names but not definitions: the six metrics of closer-look-LLM-unlearning (arXiv 2410.08109), as
DualOptim+ (arXiv 2605.21539) reports them, and TOFU's own three (arXiv 2401.06121).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

UTILITY_SETS = ("retain", "real_authors", "world_facts")
SIX = ("rouge_l", "probability", "truth_ratio", "token_entropy", "cosine", "entailment")
UTILITY_PARTS = tuple(f"{name}_{metric}" for name in UTILITY_SETS for metric in SIX)
TOFU_UTILITY_PARTS = tuple(f"{name}_{metric}" for name in UTILITY_SETS for metric in SIX[:3])
UNTARGETED_PARTS = tuple(f"forget_{metric}" for metric in SIX if metric != "token_entropy")
TARGETED_PARTS = ("forget_token_entropy", "forget_idk_entailment")
UTILITY_WITHOUT_ENTAILMENT = tuple(name for name in UTILITY_PARTS if not name.endswith("entailment"))
UNTARGETED_WITHOUT_ENTAILMENT = tuple(name for name in UNTARGETED_PARTS if not name.endswith("entailment"))


def harmonic_mean(parts: Mapping[str, float | None]) -> float | None:
    """n / Σ 1/x of all parts: near the smallest of them, 0 if one is 0, None if one is None.

    Misleads if one part is near 0: the others then hardly change it.

    Raises:
        ValueError: no parts, or a negative one.

    >>> harmonic_mean({"a": 1.0, "b": 0.5}), harmonic_mean({"a": 1.0, "b": 0.0}), harmonic_mean({"a": 1.0, "b": None})
    (0.6666666666666666, 0.0, None)
    """
    if not parts:
        raise ValueError("harmonic mean: there are no parts; give at least one")
    values = _all_computed(parts)
    if values is None:
        return None
    if any(map(math.isnan, values)):
        return math.nan
    if min(values) < 0:
        raise ValueError(f"harmonic mean: the parts must not be negative, and the least of them is {min(values)}")
    return float(statistics.harmonic_mean(values))


def model_utility(scores: Mapping[str, float | None]) -> float | None:
    """MU: `harmonic_mean` of the six metrics on Retain, Real Authors and World Facts, 18 numbers, 0 to 1; high is good.

    Misleads if one of the 18 is low for every model, as truth ratios and probabilities of short answers are: the others
    then hardly change it.

    Args:
        scores: at least the numbers named in `UTILITY_PARTS`; None for what was not computed.

    Raises:
        ValueError: a name of `UTILITY_PARTS` is missing.

    References:
        arXiv 2410.08109.
    """
    return harmonic_mean(_pick(scores, UTILITY_PARTS))


def tofu_model_utility(scores: Mapping[str, float | None]) -> float | None:
    """TOFU's model utility: `harmonic_mean` of ROUGE-L, probability and truth ratio on the same three sets, 9 numbers.

    0 to 1, high is good. Misleads as `model_utility` does; only three of the nine numbers depend on replies.

    Args:
        scores: at least the numbers named in `TOFU_UTILITY_PARTS`; None for what was not computed.

    Raises:
        ValueError: a name of `TOFU_UTILITY_PARTS` is missing.

    References:
        TOFU, arXiv 2401.06121.
    """
    return harmonic_mean(_pick(scores, TOFU_UTILITY_PARTS))


def untargeted_forget_efficacy(scores: Mapping[str, float | None]) -> float | None:
    """UFE: 1 − mean of the forget set's ROUGE-L, probability, truth ratio, cosine and entailment; high is forgotten.

    Misleads for a broken model: gibberish scores best. Token entropy is left out by definition.

    Args:
        scores: at least the numbers named in `UNTARGETED_PARTS`; None for what was not computed.

    Raises:
        ValueError: a name of `UNTARGETED_PARTS` is missing.

    References:
        arXiv 2410.08109.
    """
    values = _all_computed(_pick(scores, UNTARGETED_PARTS))
    return None if values is None else 1 - statistics.fmean(values)


def utility_without_entailment(scores: Mapping[str, float | None]) -> float | None:
    """`model_utility` over the 15 numbers that need no judge of entailment, 0 to 1, high is kept.

    Comparable only with itself. Misleads as `model_utility` does: one part near 0 makes it near 0, whatever the others.

    Args:
        scores: at least the numbers named in `UTILITY_WITHOUT_ENTAILMENT`; None for what was not computed.

    Raises:
        ValueError: a name of `UTILITY_WITHOUT_ENTAILMENT` is missing.
    """
    return harmonic_mean(_pick(scores, UTILITY_WITHOUT_ENTAILMENT))


def efficacy_without_entailment(scores: Mapping[str, float | None]) -> float | None:
    """`untargeted_forget_efficacy` over the four numbers that need no judge, 0 to 1, high is forgotten.

    Comparable only with itself. Misleads for a broken model, which scores as well as a good one: see the utility, too.

    Args:
        scores: at least the numbers named in `UNTARGETED_WITHOUT_ENTAILMENT`; None for what was not computed.

    Raises:
        ValueError: a name of `UNTARGETED_WITHOUT_ENTAILMENT` is missing.
    """
    values = _all_computed(_pick(scores, UNTARGETED_WITHOUT_ENTAILMENT))
    return None if values is None else 1 - statistics.fmean(values)


def targeted_forget_efficacy(scores: Mapping[str, float | None]) -> float | None:
    """TFE: `harmonic_mean` of token entropy and entailment of "I don't know" on the forget set; high is fluent refusal.

    Misleads for methods that are not meant to refuse: their entailment, and so their TFE, is near 0 however well they
    forget. Misleads, too, if the judge does not take a refusal in other words for the given "I don't know".

    Args:
        scores: at least the numbers named in `TARGETED_PARTS`; None for what was not computed.

    Raises:
        ValueError: a name of `TARGETED_PARTS` is missing.

    References:
        DualOptim+, arXiv 2605.21539.
    """
    return harmonic_mean(_pick(scores, TARGETED_PARTS))


def overall(utility: float | None, untargeted: float | None, targeted: float | None) -> float | None:
    """OVR: (UFE + TFE)/4 + MU/2, 0 to 1, high is good; None if one of them is None.

    Misleads across methods that aim at different kinds of forgetting: TFE rewards only refusal.

    References:
        DualOptim+, arXiv 2605.21539.

    >>> overall(utility=0.5, untargeted=0.75, targeted=0.25)
    0.5
    """
    if utility is None or untargeted is None or targeted is None:
        return None
    return (untargeted + targeted) / 4 + utility / 2


def _pick(scores: Mapping[str, float | None], names: Sequence[str]) -> dict[str, float | None]:
    if missing := [name for name in names if name not in scores]:
        raise ValueError(f"this aggregate needs {', '.join(missing)}; give None for what was not computed")
    return {name: scores[name] for name in names}


def _all_computed(parts: Mapping[str, float | None]) -> list[float] | None:
    """The numbers, or None if one of them is None."""
    values = [value for value in parts.values() if value is not None]
    return values if len(values) == len(parts) else None
