"""The evidence: its page is what its raw results make, its variants are the rules that they claim to be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from dualoptim import DualOptim, DualOptimPlus
from dualoptim.schedule import by_turns

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import evidence
        import evidence_page
        import own_rows
        import variants

        return evidence, evidence_page, variants, own_rows
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_the_page_is_what_the_raw_results_make(modules: Any) -> None:
    page = modules[1]
    assert page.make() == (BENCHMARKS / "evidence.md").read_text(encoding="utf-8")


def test_the_page_of_ones_own_rows_is_what_its_lines_make(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BENCHMARKS.parent)
    own_rows = modules[3]
    assert own_rows.page(own_rows.lines()) == (BENCHMARKS / "own_rows.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["tiny", "tiny_1_1", "tiny_1_10", "smollm2"])
def test_every_method_has_as_many_trials_and_no_reported_rows_choose_a_rate(modules: Any, name: str) -> None:
    evidence = modules[0]
    study = evidence.STUDIES[name]
    trials: dict[Any, int] = {}
    for run in evidence.tuning(study):
        trials[run.cell] = trials.get(run.cell, 0) + 1
    assert set(trials) == set(study.cells)
    for loss in study.losses():
        for steps in study.rates:
            assert len({count for cell, count in trials.items() if (cell.loss, cell.steps) == (loss, steps)}) <= 1
    assert not set(study.tuned_on) & set(study.reported)


def moved(optimizer: type, steps: list[str], **kwargs: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    param = Parameter(torch.randn(7, 5, generator=draw))
    opt = optimizer([param], lr=1e-2, betas=(0.9, 0.95), objectives=("forget", "retain"), **kwargs)
    for objective in steps:
        param.grad = torch.randn(7, 5, generator=draw) + 2 * (objective == "forget")
        opt.step(objective=objective)
    return param.detach()


@pytest.mark.parametrize("bound", [None, 1.0])
def test_the_variants_switches_at_rest_are_the_packages_optimizers(modules: Any, bound: float | None) -> None:
    variant = modules[2].Variant
    turns = by_turns({"forget": 1, "retain": 5}, 1, 60)
    steps = [next(iter(turn)) for turn in turns]
    plain = moved(DualOptimPlus, steps, max_update=bound)
    assert torch.allclose(moved(variant, steps, max_update=bound), plain, atol=1e-5)
    apart = moved(DualOptim, steps, max_update=bound)
    assert torch.allclose(moved(variant, steps, max_update=bound, drift=0.0), apart, atol=1e-5)


def test_holms_correction_and_the_bootstraps_p(modules: Any) -> None:
    page = modules[1]
    assert page.holm([0.01, 0.04, 0.03]) == [0.03, 0.06, 0.06]
    assert page.holm([0.9, 0.5]) == [1.0, 1.0]
    assert page.two_sided(np.ones(1999)) == pytest.approx(2 / 2000)
    assert page.two_sided(np.array([-1.0, 1.0] * 500)) == 1.0


def test_the_score_is_the_harmonic_mean_of_what_is_gone_and_what_is_kept(modules: Any) -> None:
    line = {"before": {"forget": 0.8, "held_out": 0.5}, "forget": [["0", 0.2], ["1", 0.2]], "held_out": [["0", 0.4]]}
    assert modules[0].score(line) == pytest.approx(2 * 0.75 * 0.8 / 1.55)
    assert modules[0].score({**line, "forget": [["0", 0.9]]}) == 0.0
