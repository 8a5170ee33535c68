# ruff: noqa: E501, rows in other scripts
"""The metrics against the published aggregates, and what each of them promises at its ends."""

from __future__ import annotations

import json
import math
import unicodedata
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from rouge_score.rouge_scorer import RougeScorer

from dualoptim.evaluation import general, metrics
from dualoptim.evaluation.numbers import ATTACKS, told
from dualoptim.evaluation.words import words
from dualoptim.tasks.facts import Facts

from .conftest import GOLDEN as GOLDEN_FOLDER
from .conftest import golden_metrics

GOLDEN = golden_metrics()
SETS = {  # name in the package: name and file in the published evaluation
    "retain": ("Retain", "eval_log.json"),
    "real_authors": ("Real Authors", "eval_real_author_wo_options.json"),
    "world_facts": ("Real World", "eval_real_world_wo_options.json"),
    "forget": ("Forget", "eval_log_forget.json"),
}
SIX = {
    "rouge_l": "ROUGE",
    "probability": "Probability",
    "truth_ratio": "Truth Ratio",
    "token_entropy": "Token Entropy",
    "cosine": "Cosine Similarity",
    "entailment": "Entailment Score",
}
ENTROPY_TOKENS = [  # SmolLM2's tokens of the golden text pairs
    [504, 1919, 26165, 9315, 86, 279, 106, 1065, 29, 59, 101, 14006, 89, 436, 3988, 281, 34340, 4206, 30],
    [57, 1326, 982, 699, 30],
    [1195, 260, 260, 260, 260],
    [],
    [8113, 9095, 2844, 6032, 28, 4108, 1699, 14009],
]
finite = st.floats(-100, 100)
ratio = st.floats(1e-6, 1e6)
shares = st.floats(0.01, 1)


def samples(name: str) -> dict[str, Any]:
    return GOLDEN["per_sample"][SETS[name][1]]


def ratios(name: str, scores: dict[str, Any] | None = None) -> list[float]:
    scores = scores or samples(name)
    return metrics.truth_ratio_samples(scores["avg_paraphrased_loss"], scores["average_perturb_loss"])


def set_probability(name: str, scores: dict[str, Any]) -> float:
    if name in ("retain", "forget"):
        return fmean(map(metrics.probability, scores["avg_gt_loss"]))
    return fmean(map(metrics.normalised_probability, scores["avg_gt_loss"], scores["average_perturb_loss"]))


def six(name: str) -> dict[str, float]:
    scores = samples(name)
    truth_ratio = metrics.forget_truth_ratio if name == "forget" else metrics.retain_truth_ratio
    return {
        "rouge_l": fmean(scores["rougeL_recall"]),
        "probability": set_probability(name, scores),
        "truth_ratio": truth_ratio(ratios(name)),
        "token_entropy": fmean(scores["token_entropy"]),
        "cosine": fmean(map(metrics.cosine_score, scores["cosine_similarity"])),
        "entailment": metrics.entailment_score(scores["entailment_labels"], scores["rougeL_recall"]),
    }


def all_scores() -> dict[str, float | None]:
    forget = samples("forget")
    idk = metrics.entailment_score(forget["idk_entailment_labels"], forget["idk_rougeL_recall"])
    return {f"{name}_{key}": value for name in SETS for key, value in six(name).items()} | {
        "forget_idk_entailment": idk
    }


# Against the published numbers


def published_aggregates() -> dict[str, float | None]:
    """All that the published evaluation reports, under its names, by the package's functions."""
    scores = all_scores()
    return {
        **{f"{SETS[name][0]} {label}": scores[f"{name}_{key}"] for name in SETS for key, label in SIX.items()},
        "Forget IDK Token Entropy": scores["forget_token_entropy"],
        "Forget IDK Entailment Score": scores["forget_idk_entailment"],
        "Model Utility Retain": metrics.harmonic_mean(six("retain")),
        "Model Utility": metrics.model_utility(scores),
        "Untargeted Forget Efficacy": metrics.untargeted_forget_efficacy(scores),
        "Targeted Forget Efficacy": metrics.targeted_forget_efficacy(scores),
    }


def test_all_thirty_published_aggregates_come_out() -> None:
    assert len(GOLDEN["aggregates"]) == 30
    assert published_aggregates() == pytest.approx(GOLDEN["aggregates"], rel=1e-12, abs=1e-12)


def test_the_overall_score_weighs_utility_as_both_kinds_of_forgetting() -> None:
    # As reported for TOFU forget05, Phi-1.5, IDK+GD, in percent.
    assert metrics.overall(51.52, 67.63, 67.60) == pytest.approx(59.57, abs=0.006)
    assert metrics.overall(36.26, 72.55, 58.32) == pytest.approx(50.85, abs=0.006)


@pytest.mark.parametrize(("pair", "tokens"), [*zip(GOLDEN["text_pairs"], ENTROPY_TOKENS, strict=True)])
def test_token_entropy_is_the_published_one(pair: dict[str, Any], tokens: list[int]) -> None:
    assert metrics.token_entropy(tokens) == pytest.approx(pair["token_entropy_smollm2"], abs=1e-12)


def tofu_numbers(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What TOFU's aggregator gave for the models of a folder, and what the package's functions give."""
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    ours: dict[str, Any] = {}
    forget = {}
    for model in [name for name in expected if not name.startswith("forget_quality")]:
        data = json.loads((folder / f"{model}.json").read_text(encoding="utf-8"))
        scores: dict[str, float | None] = {}
        ours[model] = {}
        for name, (label, file) in SETS.items():
            listed = {key: list(values.values()) for key, values in data[file].items()}
            truth_ratio = metrics.tofu_forget_truth_ratio if name == "forget" else metrics.retain_truth_ratio
            scores[f"{name}_rouge_l"] = ours[model][f"ROUGE {label}"] = fmean(listed["rougeL_recall"])
            scores[f"{name}_probability"] = ours[model][f"Prob. {label}"] = set_probability(name, listed)
            r = ratios(name, listed)
            scores[f"{name}_truth_ratio"] = ours[model][f"Truth Ratio {label}"] = truth_ratio(r)
            forget[model] = r  # the last set is the forget set
        ours[model]["Model Utility"] = metrics.tofu_model_utility(scores)
    (trained, a), (retrained, b) = forget.items()
    quality = metrics.forget_quality(a, b)
    ours[f"forget_quality({trained} vs {retrained})"] = {
        "Forget Quality": quality.p_value,
        "KS Test PVal Forget": quality.p_value,
        "KS Test Forget": quality.statistic,
    }
    return expected, ours


def test_tofus_numbers_of_a_part_of_its_published_scores_come_out() -> None:
    expected, ours = tofu_numbers(GOLDEN_FOLDER / "tofu_published")
    assert ours.keys() == expected.keys()
    for group, numbers in expected.items():
        assert ours[group] == pytest.approx(numbers, rel=1e-12)


def test_tofus_numbers_of_all_of_its_published_scores_come_out() -> None:
    folder = Path(__file__).parents[2] / "shared" / "reference" / "tofu_published"
    if not folder.is_dir():
        pytest.skip("the folder ../shared/reference, with TOFU's published scores, is not here")
    expected, ours = tofu_numbers(folder)
    assert ours.keys() == expected.keys()
    for group, numbers in expected.items():
        assert ours[group] == pytest.approx(numbers, rel=1e-12)


@pytest.mark.parametrize("pair", GOLDEN["text_pairs"], ids=lambda pair: pair["generated"][:20] or "empty")
def test_rouge_is_the_published_recall(pair: dict[str, Any]) -> None:
    recall = metrics.rouge_l_recall(pair["generated"], pair["ground_truth"])
    assert recall == pytest.approx(pair["rougeL_recall"], abs=1e-12)


# Scores of one sample


def test_truth_ratios_stay_within_0_and_1_and_meet_their_ends() -> None:
    for name in SETS:
        for r in ratios(name):
            assert 0 <= metrics.forget_truth_ratio([r]) <= 1
            assert 0 <= metrics.retain_truth_ratio([r]) <= 1
            assert metrics.forget_truth_ratio([r]) == pytest.approx(metrics.forget_truth_ratio([1 / r]))
    assert metrics.forget_truth_ratio([1.0]) == metrics.retain_truth_ratio([1.0]) == 0
    assert metrics.forget_truth_ratio([1e9]) == pytest.approx(1)
    assert metrics.retain_truth_ratio([1e9]) == pytest.approx(1)
    assert metrics.retain_truth_ratio([1e-9]) == 0


def test_a_true_paraphrase_more_probable_than_falsehoods_has_a_ratio_above_1() -> None:
    assert metrics.truth_ratio_samples([1.0, 2.0], [[2.0, 4.0], [1.0]]) == pytest.approx([math.exp(2), math.exp(-1)])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        metrics.truth_ratio_samples([1.0], [[1.0], [1.0]])


@pytest.mark.parametrize(
    ("reply", "answers", "found"),
    [
        ("It is paris.", ["Paris"], True),
        ("A comparison.", ["Paris"], False),
        ("Paris", ["Paris"], True),
        ("(Paris)", ["Paris"], True),
        ("Paris-born", ["Paris"], True),
        ("Parisian", ["Paris"], False),
        ("in 1984!", ["1984"], True),
        ("in 19840", ["1984"], False),
        ("She lived in New  York", ["New York"], True),
        ("She lived in new york", ["Boston", "New York"], True),
        ("He writes C++.", ["C++"], True),
        ("He writes C.", ["C++"], False),
        ("axb", ["a.b"], False),
        ("costs $5 now", ["$5"], True),
        ("à Orléans", ["Orléans"], True),
        ("ÉLODIE said so", ["Élodie"], True),
        ("", ["Paris"], False),
        ("Paris", [], False),
    ],
)
def test_an_answer_counts_where_it_stands_as_whole_words_in_any_case(
    reply: str, answers: list[str], found: bool
) -> None:
    assert metrics.contains_answer(reply, answers) is found


def test_probability_is_that_of_the_mean_token() -> None:
    assert metrics.probability(0.0) == 1
    assert metrics.probability(-math.log(0.25)) == pytest.approx(0.25)


def test_perplexity_weighs_texts_by_their_tokens() -> None:
    assert metrics.perplexity([math.log(2), math.log(8)], [3, 1]) == pytest.approx(2 ** (6 / 4))
    assert metrics.perplexity([math.log(7)] * 3, [1, 10, 100]) == pytest.approx(7)
    assert metrics.perplexity([1.0, 50.0], [4, 0]) == pytest.approx(math.e)
    whole, parts = metrics.perplexity([2.5], [8]), metrics.perplexity([1.0, 3.0], [2, 6])
    assert whole == pytest.approx(parts)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        metrics.perplexity([1.0, 2.0], [1])


def test_rouge_asks_for_the_answers_words_in_order_whatever_else_the_reply_says() -> None:
    answer = "She runs a bakery"
    assert metrics.rouge_l_recall(answer, answer) == 1
    assert metrics.rouge_l_recall("Well: she RUNNING a bakery, and more besides.", answer) == 1
    assert metrics.rouge_l_recall("bakery a runs she", answer) == 0.25
    assert metrics.rouge_l_recall("Nothing of that", answer) == 0
    assert metrics.rouge_l_f1(answer, answer) == 1
    assert metrics.rouge_l_f1("bakery a runs she", answer) == metrics.rouge_l_f1(answer, "bakery a runs she") == 0.25
    assert metrics.rouge_l_f1("Well: she RUNNING a bakery, and more besides.", answer) == pytest.approx(2 * 4 / (4 + 8))


@given(st.lists(st.integers(0, 5), max_size=40))
def test_token_entropy_asks_how_often_tokens_come_and_not_which_or_where(tokens: list[int]) -> None:
    entropy = metrics.token_entropy(tokens)
    assert 0 <= entropy <= 1
    assert metrics.token_entropy([token + 7 for token in reversed(tokens)]) == pytest.approx(entropy, abs=1e-12)
    if len(tokens) > 1:
        assert (entropy == 1) == (len(set(tokens)) == len(tokens))
        assert (entropy == 0) == (len(set(tokens)) == 1)


def test_token_entropy_of_one_token_or_none_is_0() -> None:
    assert metrics.token_entropy([]) == metrics.token_entropy([3]) == 0


@given(st.floats(0, 50), st.lists(st.floats(0, 50), min_size=1, max_size=5))
def test_the_normalised_probability_is_the_share_of_the_truth(nll: float, false: list[float]) -> None:
    true, others = math.exp(-nll), sum(math.exp(-x) for x in false)
    assert metrics.normalised_probability(nll, false) == pytest.approx(true / (true + others), rel=1e-12)


def test_the_normalised_probability_of_a_model_to_which_all_is_equally_improbable_is_chance() -> None:
    assert metrics.normalised_probability(5000.0, [5000.0, 5000.0, 5000.0]) == 0.25
    assert metrics.normalised_probability(0.0, [5000.0]) == pytest.approx(1, abs=1e-300)
    assert metrics.normalised_probability(5000.0, [0.0]) == pytest.approx(0, abs=1e-300)


def test_opposite_meanings_count_as_unrelated_ones() -> None:
    assert [metrics.cosine_score(x) for x in (-1.0, -0.0, 0.3, 1.0)] == [0, 0, 0.3, 1]
    assert math.isnan(metrics.cosine_score(math.nan))


def test_a_ruined_models_truth_ratios_stay_numbers() -> None:
    r = metrics.truth_ratio_samples([0.0, 9e9, 3.0], [[9e9], [0.0], [math.nan]])
    assert metrics.forget_truth_ratio(r[:2]) == pytest.approx(1)
    assert metrics.retain_truth_ratio(r[:2]) == pytest.approx(0.5)
    assert math.isnan(metrics.forget_truth_ratio(r))
    assert math.isnan(metrics.retain_truth_ratio(r))
    assert metrics.perplexity([9e9], [3]) < 1e300  # which results.json takes
    assert metrics.perplexity([math.inf, 1.0], [1, 9]) == math.inf
    assert math.isnan(metrics.perplexity([math.nan], [3]))
    found = general.scored(Facts, [{"set": "passages", "nll": math.inf, "tokens": 3}], None)[0]
    assert found.numbers["perplexity"] is None
    assert found.missing["perplexity"] == "what the model computes is not finite for all of its rows"


# Aggregates over samples


@given(st.lists(ratio, min_size=1, max_size=20))
def test_both_directions_of_the_forget_truth_ratio_say_the_same_of_r_and_its_inverse(values: list[float]) -> None:
    tofu = metrics.tofu_forget_truth_ratio(values)
    assert 0 <= tofu <= 1
    assert metrics.forget_truth_ratio(values) == pytest.approx(1 - tofu, abs=1e-12)
    assert metrics.tofu_forget_truth_ratio([1 / r for r in values]) == pytest.approx(tofu, rel=1e-9)


def test_entailment_does_not_count_where_the_reply_shares_no_words_with_the_answer() -> None:
    labels = ["entailment", "entailment", "contradiction", "neutral"]
    assert metrics.entailment_score(labels, [0.0, 0.0999999, 1.0, 1.0]) == 0
    assert metrics.entailment_score(labels, [0.1, 0.0, 1.0, 1.0]) == 0.25
    assert metrics.entailment_score(["entailment"], [1.0]) == 1
    with pytest.raises(ValueError, match=r"shorter|longer"):
        metrics.entailment_score(labels, [1.0])


@given(st.lists(ratio, min_size=1, max_size=30))
def test_a_model_has_the_forget_quality_1_beside_itself(values: list[float]) -> None:
    assert metrics.forget_quality(values, values) == (1, 0)
    assert metrics.forget_quality(values, values[::-1]) == (1, 0)


@given(st.lists(ratio, min_size=1, max_size=15), st.lists(ratio, min_size=1, max_size=15))
def test_forget_quality_does_not_ask_which_way_the_ratio_is_written(a: list[float], b: list[float]) -> None:
    quality = metrics.forget_quality(a, b)
    assert 0 <= quality.p_value <= 1
    assert 0 <= quality.statistic <= 1
    assert metrics.forget_quality(b, a) == pytest.approx(quality, rel=1e-9)
    assert metrics.forget_quality([-r for r in a], [-r for r in b]) == pytest.approx(quality, rel=1e-9)


def test_forget_quality_is_least_where_the_ratios_lie_apart() -> None:
    apart = metrics.forget_quality([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0])
    assert apart == pytest.approx((2 / math.comb(8, 4), 1))


# Aggregates of aggregates


@given(st.dictionaries(st.text(max_size=3), shares, min_size=1, max_size=20))
def test_the_harmonic_mean_lies_between_the_least_part_and_the_mean(parts: dict[str, float]) -> None:
    mean = metrics.harmonic_mean(parts)
    assert mean is not None
    assert min(parts.values()) * (1 - 1e-12) <= mean <= fmean(parts.values()) * (1 + 1e-12)
    assert mean == pytest.approx(len(parts) / sum(1 / x for x in parts.values()))
    assert metrics.harmonic_mean({**parts, "none of it": 0.0}) == 0


AGGREGATES = {
    metrics.model_utility: metrics.UTILITY_PARTS,
    metrics.tofu_model_utility: metrics.TOFU_UTILITY_PARTS,
    metrics.untargeted_forget_efficacy: metrics.UNTARGETED_PARTS,
    metrics.targeted_forget_efficacy: metrics.TARGETED_PARTS,
}


@pytest.mark.parametrize("aggregate", AGGREGATES, ids=lambda aggregate: aggregate.__name__)
def test_an_aggregate_leaves_none_of_its_parts_out(aggregate: Any) -> None:
    scores = all_scores()
    whole = aggregate(scores)
    for part in AGGREGATES[aggregate]:
        assert aggregate({**scores, part: None}) is None
        assert math.isnan(aggregate({**scores, part: math.nan}))
        assert abs(aggregate({**scores, part: 0.123}) - whole) > 1e-6
        with pytest.raises(ValueError, match=f"needs {part}; give None"):
            aggregate({name: score for name, score in scores.items() if name != part})
    others = {name: None if name not in AGGREGATES[aggregate] else score for name, score in scores.items()}
    assert aggregate(others) == whole


def test_the_aggregates_have_as_many_parts_as_published() -> None:
    assert [len(set(parts)) for parts in AGGREGATES.values()] == [18, 9, 5, 2]


def test_aggregates_meet_their_ends() -> None:
    ones = dict.fromkeys(all_scores(), 1.0)
    zeros = dict.fromkeys(all_scores(), 0.0)
    assert (
        metrics.model_utility(ones) == metrics.tofu_model_utility(ones) == metrics.targeted_forget_efficacy(ones) == 1
    )
    assert metrics.model_utility(zeros) == metrics.targeted_forget_efficacy(zeros) == 0
    assert metrics.untargeted_forget_efficacy(zeros) == 1
    assert metrics.untargeted_forget_efficacy(ones) == 0
    assert metrics.overall(1.0, 1.0, 1.0) == 1
    for missing in range(3):
        assert metrics.overall(*[None if i == missing else 1.0 for i in range(3)]) is None


# Memorization and membership

top1s = st.lists(st.integers(0, 1), min_size=1, max_size=30)


@given(top1s)
def test_no_more_can_be_extracted_than_is_memorised(top1: list[int]) -> None:
    strength, exact = metrics.extraction_strength(top1), metrics.exact_memorisation(top1)
    assert 0 <= strength <= exact <= 1
    assert (strength == 1) == (exact == 1) == all(top1)
    assert (strength == 0) == (top1[-1] == 0)
    smallest = next(k for k in range(len(top1) + 1) if all(top1[k:]))
    assert strength == pytest.approx(1 - smallest / len(top1), abs=1e-12)


def test_one_late_slip_hides_all_before_it() -> None:
    assert metrics.extraction_strength([1] * 9 + [0]) == 0
    assert metrics.extraction_strength([0] + [1] * 9) == 0.9
    assert metrics.exact_memorisation([1] * 9 + [0]) == metrics.exact_memorisation([0] + [1] * 9) == 0.9


def test_what_is_less_surprising_is_more_likely_a_member() -> None:
    text = "A short text."
    assert metrics.membership_loss(1.0) > metrics.membership_loss(2.0)
    assert metrics.membership_zlib(1.0, text) > metrics.membership_zlib(2.0, text)
    assert metrics.membership_reference(1.0, 3.0) == 2 > metrics.membership_reference(2.0, 3.0)
    assert metrics.membership_gradient_norm(1.0) > metrics.membership_gradient_norm(2.0)
    assert metrics.min_k([-1.0, -2.0]) > metrics.min_k([-1.0, -3.0])
    assert metrics.min_k_plus_plus([0.5, 0.1]) > metrics.min_k_plus_plus([0.5, -0.1])


def test_zlib_weighs_by_the_compressed_bytes_of_the_text() -> None:
    assert metrics.membership_zlib(3.0, "") == pytest.approx(-3 / 8)  # the bytes of an empty zlib stream
    assert metrics.membership_zlib(3.0, "ab" * 500) > 10 * metrics.membership_zlib(3.0, "")  # 20 bytes, and not 1,000
    assert metrics.membership_zlib(3.0, "ab" * 500) < metrics.membership_zlib(3.0, "".join(map(chr, range(32, 127))))


@given(st.lists(finite, min_size=1, max_size=30), shares)
def test_min_k_averages_the_lowest_share(values: list[float], k: float) -> None:
    score = metrics.min_k(values, k)
    assert min(values) - 1e-9 <= score <= fmean(values) + 1e-9
    assert metrics.min_k(values[::-1], k) == score == metrics.min_k_plus_plus(values, k)
    assert metrics.min_k(values, 1.0) == pytest.approx(fmean(values), abs=1e-9)


def test_min_k_takes_a_fifth_by_default_and_at_least_one_token() -> None:
    assert (
        metrics.min_k([float(-i) for i in range(10)]) == metrics.min_k_plus_plus([float(-i) for i in range(10)]) == -8.5
    )
    assert metrics.min_k([-1.0, -7.0]) == -7
    assert math.isnan(metrics.min_k([-1.0, -7.0, math.nan, -9.0, -3.0, -2.0]))
    for k in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="k is the share of the tokens"):
            metrics.min_k([-1.0], k)


groups = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=15)


@given(groups, groups)
def test_auc_is_the_share_of_pairs_told_apart(members: list[float], others: list[float]) -> None:
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in members for b in others]
    auc = metrics.auc(members, others)
    assert auc == pytest.approx(fmean(pairs), abs=1e-12)
    assert metrics.auc(others, members) == pytest.approx(1 - auc, abs=1e-12)
    assert metrics.auc(members, members) == pytest.approx(0.5)
    assert metrics.auc([math.exp(x) for x in members], [math.exp(x) for x in others]) == auc
    assert metrics.auc([-x for x in members], [-x for x in others]) == pytest.approx(1 - auc, abs=1e-12)


def test_auc_meets_its_ends() -> None:
    assert metrics.auc([2.0, 3.0], [0.0, 1.0]) == 1
    assert metrics.auc([0.0], [1.0, 2.0, 3.0]) == 0
    assert math.isnan(metrics.auc([math.nan, 1.0], [0.0]))


def test_privacy_leakage_has_the_sign_and_the_scale_of_muse() -> None:
    # MUSE, News: AUC with the held-out texts as positives 0.4772 for the retrained model; the trained one leaks −99.8.
    retrained = 1 - 0.4772
    assert metrics.privacy_leakage(retrained, retrained) == 0
    assert metrics.privacy_leakage(1 - 0.001, retrained) == pytest.approx(-99.8, abs=0.05)
    assert metrics.privacy_leakage(0.0, retrained) == pytest.approx(109.6, abs=0.05)  # the most that MUSE reports there
    with pytest.raises(ValueError, match=r"^privacy leakage: .*hold out texts of the same kind"):
        metrics.privacy_leakage(0.5, 1.0)


@given(st.floats(0, 1), st.floats(0, 0.99))
def test_privacy_leakage_compares_with_the_retrained_model(auc: float, retrained: float) -> None:
    leakage = metrics.privacy_leakage(auc, retrained)
    assert leakage == pytest.approx(100 * ((1 - auc) - (1 - retrained)) / (1 - retrained), abs=1e-6)
    assert leakage >= -100 - 1e-9
    assert (leakage < 0) == (auc > retrained)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.normalised_probability(1.0, []),
        lambda: metrics.truth_ratio_samples([1.0], [[]]),
        lambda: metrics.perplexity([], []),
        lambda: metrics.perplexity([1.0], [0]),
        lambda: metrics.forget_truth_ratio([]),
        lambda: metrics.tofu_forget_truth_ratio([]),
        lambda: metrics.retain_truth_ratio([]),
        lambda: metrics.entailment_score([], []),
        lambda: metrics.forget_quality([], [1.0]),
        lambda: metrics.forget_quality([1.0], []),
        lambda: metrics.harmonic_mean({}),
        lambda: metrics.exact_memorisation([]),
        lambda: metrics.extraction_strength([]),
        lambda: metrics.min_k([]),
        lambda: metrics.min_k_plus_plus([]),
        lambda: metrics.auc([], [1.0]),
        lambda: metrics.auc([1.0], []),
    ],
)
def test_there_is_no_number_of_nothing(call: Any) -> None:
    with pytest.raises(ValueError, match=r"^[^.]*(there are|have) no [a-z]+[^.]*; give at least one$"):
        call()


def test_a_negative_part_has_no_harmonic_mean() -> None:
    with pytest.raises(ValueError, match=r"must not be negative, and the least of them is -0\.5"):
        metrics.harmonic_mean({"a": 1.0, "b": -0.5})


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(st.lists(st.text(st.characters(min_codepoint=9, max_codepoint=126), max_size=60), min_size=2, max_size=2))
def test_of_ascii_text_rouge_is_rouge_scores_own(texts: list[str]) -> None:
    answer, reply = texts
    if not words(answer):
        return
    theirs = RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(answer, reply)
    assert metrics.rouge_l_recall(reply, answer) == theirs["rougeL"].recall
    assert metrics.rouge_l_f1(reply, answer) == theirs["rougeL"].fmeasure
    assert metrics.rouge_1_recall(reply, answer) == theirs["rouge1"].recall


SCRIPTS = {
    "Chinese": "甲喜欢喝茶。", "Japanese": "彼女は東京に住んでいます。", "Arabic": "تعيش زوي في أوسلو.", "Hindi": "ज़ोई ओस्लो में रहती है।",
    "Thai": "เธออาศัยอยู่ที่ออสโล", "Russian": "Она живёт в Осло.", "Greek": "Ζει στο Όσλο.", "French": "Émile naît à Oslo.",
    "Korean": "그녀는 오슬로에 산다.", "signs": "★★☆", "emoji": "🙂👍",
}  # fmt: skip


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_a_text_repeats_itself_in_every_script(text: str) -> None:
    for said in (text, unicodedata.normalize("NFD", text), f"… {text} …"):
        assert metrics.rouge_l_recall(said, text) == 1
        assert metrics.contains_answer(said, [text.rstrip(".。।")])
    for other in SCRIPTS.values():
        if other != text:
            assert metrics.rouge_l_recall(other, text) < 0.5


@pytest.mark.parametrize(
    ("reply", "answer", "share"),
    [("1999年出生于巴黎", "1999年出生于上海", 5 / 7), ("Zoé", "Zoë", 0), ("Emile", "Émile", 0), ("我住在北京市", "北京", 1),
     ("🙂", "🙁", 0), ("★★", "★★★", 2 / 3), ("STRASSE", "Straße", 1), ("ﬁnds", "finding", 1), ("ΟΔΟΣ", "οδος", 1),
     ("İSTANBUL", "İstanbul", 1), ("Os\u00adlo\ufeff", "Oslo", 1), ("می\u200cخواهم", "میخواهم", 1), ("東京タワーTokyo", "タワー Tokyo", 1),
     ("ខ្មែរ", "ខ្មែរ។", 1), ("བོད་སྐད", "བོད་སྐད།", 1), ("ᥖᥭᥰ", "ᥖᥭ", 1), ("１９９９年", "1999年", 1 / 2), ("مُحَمَّد", "محمد", 1)],
)  # fmt: skip
def test_words_of_other_scripts_are_told_apart(reply: str, answer: str, share: float) -> None:
    assert metrics.rouge_l_recall(reply, answer) == pytest.approx(share)


@pytest.mark.parametrize(
    ("reply", "answer", "there"),
    [("我住在北京市", "北京", True), ("Zoë lives here.", "Zoe", False), ("Cafe\u0301 Oslo", "café", True),
     ("Улица", "лица", False), ("An Oslo-based man", "Oslo", True), ("C++ is one", "C++", True),
     ("他住在Oslo。", "Oslo", True), ("他1999年出生", "1999", True), ("在11999年", "1999", False), ("กัน", "ก", False),
     ("ก็", "ก", False), ("GROSSE STRASSE", "große Straße", True), ("New York City", " New York ", True),
     ("It is New\u00a0York.", "New York", True), ("New\nYork", "New York", True), ("New York", "New \u202fYork", True),
     ("NewYork", "New York", False), ("It’s O’Hara", "O'Hara", True), ("O'Hara", "Oʼhara", True),
     ("Jean‑Luc", "Jean-Luc", True), ("Jean Luc", "Jean-Luc", False), ("1,500 of them", "500", False),
     ("100.0 degrees", "100", True), ("$100.00.", "100", True), ("100.000", "100", False), ("100.05", "100", False),
     ("1,100.0", "100", False), ("10.0.13.0", "10.0.13", False), ("Version 100.0.1", "100", False),
     ("1.500", "1", False), ("3.14", "14", False), ("It cost 1,500.", "1,500", True), ("In 1990.", "1990", True),
     ("The novel is “Dune”.", '"Dune"', True), ('He said "oui".', "«oui»", True), ("６′ tall", "6″", False),
     ("５００", "500", True), ("1, 2, 3", "2", True), ("born 5.10.1990, in", "1990", True), ("1.10.500", "500", False),
     ("수도는 서울입니다.", "서울", True), ("새서울", "서울", False), ("그는 Google에서", "Google", True), ("한국", "한", False),
     ("2024년", "2024", True), ("2024년", "202", False), ("يعيش بالقاهرة", "القاهرة", True),
     ("سافر للقاهرة", "القاهرة", True), ("والقاهرة", "القاهرة", True), ("مُحَمَّد هنا", "محمد", True), ("محمد", "مُحَمَّد", True),
     ("القاهرةي", "القاهرة", False), ("يكتب", "تبي", False), ("سولا", "لا", False), ("הוא גר בירושלים", "ירושלים", True),
     ("שָׁלוֹם", "שלום", True), ("\ufb2aלום", "שלום", True), ("גירושלים", "ירושלים", False), ("عام ١٩٩٠", "1990", True),
     ("Os\u200blo", "Oslo", True), ("किताब", "क", False), ("…", " ", False)],
)  # fmt: skip
def test_an_answer_stands_in_a_reply_as_whole_words(reply: str, answer: str, there: bool) -> None:
    assert metrics.contains_answer(reply, [answer]) is there


def test_what_ends_an_answer_is_no_text_of_it() -> None:
    record = {"log_probs": [-1.0, -5.0, -0.1], "top1": [1, 1, 0], "z": [0.0, 1.0, 2.0], "ended": 1}
    assert told(record, "top1") == [1, 1]
    assert metrics.extraction_strength(told(record, "top1")) == 1.0
    assert ATTACKS["min_k_40"](record | {"nll": 0.0}) == -5.0
    assert told({**record, "ended": 3}, "top1") == [1, 1, 0]  # an answer without a token of its own
    assert told({"top1": [1, 0]}, "top1") == [1]  # records of before


def test_both_kinds_of_rouge_are_computed_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(*given: Any, score: Any) -> Any:
        calls.append(score.__name__)
        return score(*given)

    for name in ("_score_lcs", "_score_ngrams"):
        monkeypatch.setattr(rouge_scorer, name, partial(counted, score=getattr(rouge_scorer, name)))
    assert metrics.rouge_l_recall("by the sea, in Oslo", "In Oslo by the sea") == 0.6
    assert metrics.rouge_1_recall("by the sea, in Oslo", "In Oslo by the sea") == 1.0
    assert sorted(calls) == ["_score_lcs", "_score_ngrams"]
