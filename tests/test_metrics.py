"""The metrics against the published aggregates, and what each of them promises at its ends."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import pytest

from dualoptim.evaluation import metrics

from .conftest import golden_metrics

GOLDEN = golden_metrics()
SETS = {
    "Retain": "eval_log.json",
    "Real Authors": "eval_real_author_wo_options.json",
    "Real World": "eval_real_world_wo_options.json",
    "Forget": "eval_log_forget.json",
}


def samples(name: str) -> dict[str, Any]:
    return GOLDEN["per_sample"][SETS[name]]


def ratios(name: str) -> list[float]:
    return metrics.truth_ratio_samples(samples(name)["avg_paraphrased_loss"], samples(name)["average_perturb_loss"])


@pytest.mark.parametrize("pair", GOLDEN["text_pairs"], ids=lambda pair: pair["generated"][:20] or "empty")
def test_rouge_is_the_published_recall(pair: dict[str, Any]) -> None:
    recall = metrics.rouge_l_recall(pair["generated"], pair["ground_truth"])
    assert recall == pytest.approx(pair["rougeL_recall"], abs=1e-12)


@pytest.mark.parametrize("name", ["Retain", "Forget"])
def test_probability_is_the_published_aggregate(name: str) -> None:
    mean = fmean(map(metrics.probability, samples(name)["avg_gt_loss"]))
    assert mean == pytest.approx(GOLDEN["aggregates"][f"{name} Probability"], abs=1e-12)


@pytest.mark.parametrize("name", ["Retain", "Real Authors", "Real World"])
def test_the_truth_ratio_of_what_is_kept_is_the_published_aggregate(name: str) -> None:
    expected = GOLDEN["aggregates"][f"{name} Truth Ratio"]
    assert metrics.retain_truth_ratio(ratios(name)) == pytest.approx(expected, abs=1e-12)


def test_the_truth_ratio_of_what_is_forgotten_is_the_published_aggregate() -> None:
    expected = GOLDEN["aggregates"]["Forget Truth Ratio"]
    assert metrics.forget_truth_ratio(ratios("Forget")) == pytest.approx(expected, abs=1e-12)


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
        ("She lived in New  York", ["New York"], False),
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
