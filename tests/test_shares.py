"""Intervals of shares whose questions are in clusters, and what results, reports and points make of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from dualoptim import points, report, runs, schema
from dualoptim.evaluation.shares import effective_number, wilson
from dualoptim.report import card
from dualoptim.tasks import multitask
from dualoptim.tasks.facts import Facts
from dualoptim.tasks.multitask import Multitask

PAIRS = [[1.0, 1.0]] * 3 + [[0.0, 0.0]] * 3 + [[1.0, 0.0]] * 4


def test_the_effective_number_of_a_case_computed_by_hand() -> None:
    # p = 1/2 of n = 20 in m = 10; Σ (x_i − 2p)² = 6, so deff = 19/400 · 10/9 · 6 · 4 = 19/15. Of Student's tables,
    # t(19) = 2.09302 and t(9) = 2.26216.
    assert effective_number(PAIRS) == pytest.approx(20 * 15 / 19 * (2.09302 / 2.26216) ** 2, rel=1e-5)
    # With n' of them and p = 1/2, Wilson's bounds are 1/2 ± z / (2 √(n' + z²)).
    half = 1.959964 / 2 / (effective_number(PAIRS) + 1.959964**2) ** 0.5
    assert wilson(0.5, 20, effective_number(PAIRS)) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)


def test_questions_that_are_each_a_cluster_have_the_interval_that_they_had() -> None:
    for n in range(1, 30):
        for k in range(n + 1):
            found = effective_number([[1.0]] * k + [[0.0]] * (n - k))
            assert found == n
            assert wilson(k / n, n, found) == tuple(binomtest(k, n).proportion_ci(0.95, method="wilson"))
            assert wilson(k / n, n, n + 1e-9) == pytest.approx(wilson(k / n, n), abs=1e-8)  # no step between formulas


def test_where_no_design_effect_can_be_estimated_clusters_count() -> None:
    for value in (0.0, 1.0):
        assert effective_number([[value] * 4] * 10) == 10
        assert effective_number([[value] * 7]) == 1
    assert effective_number([[1.0, 0.0, 1.0]]) == 1
    assert effective_number([[1.0] * 3, [0.0] * 3]) == 2  # alike in each: deff is its highest
    assert effective_number([[0.0] * 4, [0.0]]) == 25 / 17  # most of them are of one
    assert effective_number([[1.0, 0.0]] * 10) == pytest.approx(20 * (2.09302 / 2.26216) ** 2, rel=1e-5)  # deff is 1


def test_19_of_20_intervals_hold_the_share_where_wordings_of_a_row_are_alike() -> None:
    draw = random.Random(0)
    for rows, words in ((10, 4), (6, 5), (40, 5)):
        held = {"independent": 0, "clusters": 0}
        for _ in range(400):
            clusters = [[float(draw.random() < p) for _ in range(words)] for p in
                        (draw.betavariate(0.3, 0.3) for _ in range(rows))]  # fmt: skip
            n, share = rows * words, sum(map(sum, clusters)) / (rows * words)
            for name, tells in (("independent", None), ("clusters", effective_number(clusters))):
                low, high = wilson(share, n, tells)
                held[name] += low <= 0.5 <= high
        assert held["independent"] < 330
        assert held["clusters"] >= 372  # 380 expected, 2 standard deviations are 9


def facts(right: Any) -> list[dict[str, Any]]:
    task = Facts()
    made = [
        {"set": f["set"], "question": ask, "answer": f["answer"], "right": right(i, j)}
        for i, f in enumerate(task.facts) for j, ask in enumerate(f["test"])
    ]  # fmt: skip
    return task.clustered([*made, {"set": "harmless", "question": "Hi?", "answer": "", "refused": False}])


def test_the_wordings_of_a_fact_are_one_cluster() -> None:
    of = {(f["set"], f["statement"]): len(f["test"]) for f in Facts().facts}
    records = facts(lambda i, j: True)
    found = [(record["set"], record["cluster"]) for record in records if "right" in record]
    assert {each: found.count(each) for each in found} == of
    assert max(of.values()) > 1
    assert "cluster" not in records[-1]  # no row of the task is its
    several = Multitask.__new__(Multitask)
    several.asked = {"facts": multitask._facts("").asked}
    assert set(several.clusters().values()) == {statement for _, statement in of}
    told = Facts.effective_counts(records)
    assert told["forget_accuracy"] == sum(name == "forget" for name, _ in of)  # all right: the facts
    assert "harmless_refused" not in told
    # Half of the facts in all wordings, in place of every other wording of each, which is a far surer half.
    whole, half = Facts.effective_counts(facts(lambda i, j: i % 2 == 0)), Facts.effective_counts(facts(lambda i, j: j))
    n = Facts.counts(records)["forget_accuracy"]
    assert whole["forget_accuracy"] < half.get("forget_accuracy", n) <= n


def results(**effective: Any) -> dict[str, Any]:
    numbers = {"share": 0.0, "kept": 0.5}
    entries = [
        {"method": name, "seed": 0, "config": {}, "before": {**numbers, "share": 1.0},
         "after": {"share": share, "kept": 0.5}, "curve": [{"step": 0, "forget": 1.0, "retain": 1.0}], "losses": [],
         "samples": [], "seconds": 1.0, "step_seconds": 0.5, "optimizer_state_bytes": 8, "peak_memory_bytes": 8,
         **({"effective_counts": effective} if effective else {})}
        for name, share in (("A", 0.0), ("B", 0.25))
    ]  # fmt: skip
    metric = {"label": "share", "better": "lower", "format": ".0%"}
    return {"schema": 1, "task": "facts", "model": "m", "followed": "f", "counts": {"share": 40}, "runs": entries,
            "metrics": {"share": metric, "kept": metric}, "notes": []}  # fmt: skip


def test_reports_points_and_cards_take_the_effective_number() -> None:
    old, new = results(), results(before={"share": 10.0}, after={"share": 10.0})
    assert schema.misfit(new) is None
    assert "effective_counts" in (schema.misfit(results(after={"share": 0.0})) or "")
    # Of 40: Wilson's for 0 is 0 to z²/(40 + z²); of 10 it is 0 to z²/(10 + z²).
    assert [row[1] for row in report.rows(old)[1][:2]] == ["100% (91–100)", "0% (0–9)"]
    assert [row[1] for row in report.rows(new)[1][:2]] == ["100% (72–100)", "0% (0–28)"]
    assert "A is lowest, and alone there" in report.seen(old)[0]
    assert "A is lowest; not told apart on 40 questions: B" in report.seen(new)[0]
    assert "(0–28) | 40 |" in card._table(new, new["runs"][0], "model")
    for made, high in ((old, 3.8415 / 43.8415), (new, 3.8415 / 13.8415)):
        found = [(entry, {}, Path()) for entry in made["runs"][:1]]
        (point,) = points.points_of(found, ("share", "kept"), made["counts"])
        assert point["intervals"]["share"] == pytest.approx([0.0, high], abs=1e-4)
        several = [({**entry, "seed": seed}, {}, Path()) for seed in (0, 1) for entry in made["runs"][1:]]
        (point,) = points.points_of(several, ("share", "kept"), made["counts"])
        low, high = point["intervals"]["share"]
        least, most = wilson(0.25, 40, 40 if made is old else 10)
        assert low <= least < most <= high  # the bootstrap of 2 seeds of 10 questions reaches to 0
        assert high - low == pytest.approx(most - least, abs=0.1)


def test_one_cluster_and_one_seed_have_no_interval(tmp_path: Path) -> None:
    def of(clusters: int) -> dict[str, Any]:
        records = [
            {"set": "forget", "question": f"{i}?", "answer": "A", "rouge_l": i / 8, "cluster": f"{i % clusters}"}
            for i in range(8)
        ]
        runs.write_records(tmp_path / runs.RECORDS, [], records, None, private=clusters == 2)
        entry = {"method": "A", "seed": 0, "after": {"forget_rouge_l": 3.5 / 8}, "seconds": 1.0,
                 "optimizer_state_bytes": 1}  # fmt: skip
        return points.points_of([(entry, {}, tmp_path)], ("forget_rouge_l", "kept"))[0]["intervals"]

    assert of(1) == {}
    assert of(2)["forget_rouge_l"] == pytest.approx([3 / 8, 4 / 8])  # private: the clusters' names are hashes
    assert "cluster" in json.loads((tmp_path / runs.RECORDS).read_text().splitlines()[0])
