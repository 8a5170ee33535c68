"""Gradients of several objectives made one: the rules against TorchJD's, and what each of them promises."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchjd.aggregation import PCGradWeighting, UPGrad

from dualoptim.combine import RULES, gru, pcgrad, upgrad
from dualoptim.errors import UserError


def gradients(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator, dtype=torch.float64)


@given(st.integers(0, 10**6))
def test_pcgrad_of_two_loses_what_conflicts_and_no_more(seed: int) -> None:
    a, b = jacobian = gradients(seed, 2)
    overlap = (a @ b).clamp(max=0)
    expected = a - overlap / (b @ b) * b + b - overlap / (a @ a) * a
    torch.testing.assert_close(pcgrad(jacobian @ jacobian.T) @ jacobian, expected)


def test_pcgrad_of_many_is_one_of_its_orders_the_same_on_every_rank() -> None:
    jacobian = gradients(3, 4)
    gram = jacobian @ jacobian.T
    state = torch.random.get_rng_state()
    weights = pcgrad(gram)
    assert torch.equal(torch.random.get_rng_state(), state), "the run's own draws are left alone"
    torch.manual_seed(99)
    assert torch.equal(pcgrad(gram), weights)
    found = set()
    for seed in range(40):
        torch.manual_seed(seed)
        found.add(tuple(PCGradWeighting()(gram).tolist()))
    assert len(found) > 1
    assert any(pytest.approx(one) == tuple(weights.tolist()) for one in found)


@given(st.integers(0, 10**6), st.integers(2, 5))
def test_upgrad_is_torchjds_mean_times_the_number_and_harms_no_objective(seed: int, count: int) -> None:
    jacobian = gradients(seed, count)
    gram = jacobian @ jacobian.T
    weights = upgrad(gram)
    step = weights @ jacobian
    torch.testing.assert_close(step, count * UPGrad()(jacobian), rtol=1e-4, atol=1e-4)
    # TorchJD adds 1e-4 to the diagonal of the normed Gramian, and by so much an objective may lose.
    assert (jacobian @ step >= -1e-4 * gram.trace() * (weights + 0.01)).all()


@given(st.integers(0, 10**6))
def test_gru_follows_the_first_alone_and_does_not_harm_the_rest(seed: int) -> None:
    forget, retain = gradients(seed, 2)
    jacobian = torch.stack([forget, retain])
    step = gru(jacobian @ jacobian.T) @ jacobian
    assert step @ retain > -1e-9
    if forget @ retain >= 0:
        torch.testing.assert_close(step, forget)


@pytest.mark.parametrize("rule", ["PCGrad", "UPGrad"])
def test_where_nothing_conflicts_the_step_is_the_sum(rule: str) -> None:
    gram = torch.tensor([[1.0, 0.5, 0.0], [0.5, 2.0, 0.25], [0.0, 0.25, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(RULES[rule](gram), torch.ones(3, dtype=torch.float64), rtol=0, atol=2e-3)


@pytest.mark.parametrize("rule", ["PCGrad", "UPGrad"])
def test_without_torchjd_that_is_told(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(UserError, match=rf"{rule} needs the package torchjd; install dualoptim\[torchjd\]"):
        RULES[rule](torch.eye(2))
