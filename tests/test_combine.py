"""Gradients of several objectives made one: the rules against TorchJD's, and what each of them promises."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls
from torchjd.aggregation import PCGradWeighting, UPGrad
from torchjd.linalg import QuadprogProjector

from dualoptim.errors import UserError
from dualoptim.training.combine import RULES, check_roles, gramian, gru, pcgrad, upgrad

BOTH = ["forget", "retain"]


def gradients(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator, dtype=torch.float64)


@given(st.integers(0, 10**6))
def test_pcgrad_of_two_loses_what_conflicts_and_no_more(seed: int) -> None:
    a, b = jacobian = gradients(seed, 2)
    overlap = (a @ b).clamp(max=0)
    expected = a - overlap / (b @ b) * b + b - overlap / (a @ a) * a
    torch.testing.assert_close(pcgrad(jacobian @ jacobian.T, BOTH) @ jacobian, expected)


def test_pcgrad_of_many_is_one_of_its_orders_the_same_on_every_rank() -> None:
    jacobian = gradients(3, 4)
    gram = jacobian @ jacobian.T
    state = torch.random.get_rng_state()
    weights = pcgrad(gram, BOTH)
    assert torch.equal(torch.random.get_rng_state(), state), "the run's own draws are left alone"
    torch.manual_seed(99)
    assert torch.equal(pcgrad(gram, BOTH), weights)
    found = set()
    for seed in range(40):
        torch.manual_seed(seed)
        found.add(tuple(PCGradWeighting()(gram).tolist()))
    assert len(found) > 1
    assert any(pytest.approx(one) == tuple(weights.tolist()) for one in found)


def multipliers(unit: torch.Tensor) -> torch.Tensor:
    """The λ ≥ 0 of each gradient, with which P(x) = x + Jᵀλ is shortest."""
    return torch.stack([torch.from_numpy(nnls(unit.T.numpy(), -g.numpy())[0]) for g in unit])


def off(unit: torch.Tensor) -> float:
    """How far the projections are from exact, in sum: ε‖λ‖ / σ each, σ the least singular value of J.

    ε is what the solver adds to the diagonal, in parts of the trace, which is K.
    """
    least = torch.linalg.svdvals(unit)[-1]
    return float(1e-8 * len(unit) * multipliers(unit).norm(dim=1).sum() / least)


@given(st.integers(0, 10**6), st.integers(2, 5))
def test_upgrad_is_torchjds_mean_times_the_number(seed: int, count: int) -> None:
    jacobian = gradients(seed, count)
    exact = UPGrad(projector=QuadprogProjector(norm_eps=0, reg_eps=1e-10))
    step = upgrad(jacobian @ jacobian.T, BOTH) @ jacobian
    lengths = jacobian.norm(dim=1)
    both = 2 * float(lengths.max()) * off(jacobian / lengths[:, None])  # TorchJD's is not exact, either
    torch.testing.assert_close(step, count * exact(jacobian), rtol=1e-6, atol=1e-6 + both)


@given(st.integers(0, 10**6), st.lists(st.floats(-9, 3), min_size=2, max_size=5))
def test_upgrad_projects_each_gradient_and_harms_no_objective_however_unequal_the_lengths(
    seed: int, powers: list[float]
) -> None:
    unit = torch.nn.functional.normalize(gradients(seed, len(powers)))
    lengths = 10 ** torch.tensor(powers, dtype=torch.float64)
    jacobian = lengths[:, None] * unit
    projected = unit + multipliers(unit) @ unit
    step = upgrad(jacobian @ jacobian.T, BOTH) @ jacobian
    torch.testing.assert_close(step / lengths.max(), lengths @ projected / lengths.max(), rtol=0, atol=1e-6 + off(unit))
    assert (unit @ step >= -1e-5 * lengths.max()).all()


@pytest.mark.parametrize("lengths", [(1, 1), (1, 0.1), (1, 0.01), (0.003, 1), (0.007, 0.007), (1e-7, 1e-9), (1e-3, 10)])
def test_upgrad_of_two_is_pcgrad_however_long_they_are(lengths: tuple[float, float]) -> None:
    length = torch.tensor(lengths, dtype=torch.float64)
    gram = torch.tensor([[1, -0.5], [-0.5, 1]], dtype=torch.float64) * length.outer(length)
    weights = upgrad(gram, BOTH)
    torch.testing.assert_close(weights, pcgrad(gram, BOTH), rtol=1e-6, atol=0)
    torch.testing.assert_close(weights, 1 + length.flip(0) / length / 2, rtol=1e-6, atol=0)
    assert (gram @ weights > 0).all(), "both get better"


@pytest.mark.parametrize("count", [2, 3, 8])
def test_upgrad_of_parallel_gradients_in_single_precision_is_found_in_spite_of_rounding(count: int) -> None:
    direction = gradients(5, 1).float().repeat(1, 5000)[0]
    with_signs = [[direction * scale] for scale in (1.0, -1e-3, 1e-6, -0.1, 7.0, 3e-5, -2.0, 0.3)[:count]]
    gram = gramian(with_signs)
    step = upgrad(gram, BOTH) @ torch.stack([g.double() for (g,) in with_signs])
    assert step.norm() < 0.01 * gram.diagonal().max().sqrt(), "what helps one harms another"


def test_upgrad_of_a_gradient_of_zeros_or_one_that_is_not_finite() -> None:
    gram = torch.tensor([[4.0, 0.0, -1.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(upgrad(gram, BOTH), torch.tensor([1.25, 1, 2], dtype=torch.float64))
    assert upgrad(torch.zeros(2, 2), BOTH).tolist() == [1, 1]
    for value in (math.nan, math.inf, -math.inf):
        assert upgrad(torch.tensor([[1, value], [value, 1]]), BOTH).isnan().all()


@given(st.integers(0, 10**6))
def test_gru_follows_what_forgets_alone_and_does_not_harm_the_rest(seed: int) -> None:
    forget, retain = gradients(seed, 2)
    jacobian = torch.stack([forget, retain])
    step = gru(jacobian @ jacobian.T, BOTH) @ jacobian
    assert step @ retain > -1e-9
    if forget @ retain >= 0:
        torch.testing.assert_close(step, forget)


@given(st.integers(0, 10**6), st.permutations(["forget", "forget", "retain", "retain"]))
def test_gru_takes_the_sums_of_each_role_wherever_they_stand(seed: int, roles: list[str]) -> None:
    jacobian = gradients(seed, 4)
    to_forget = torch.tensor([role == "forget" for role in roles])
    forget, retain = jacobian[to_forget].sum(0), jacobian[~to_forget].sum(0)
    expected = forget - (forget @ retain).clamp(max=0) / (retain @ retain) * retain
    torch.testing.assert_close(gru(jacobian @ jacobian.T, roles) @ jacobian, expected)


@pytest.mark.parametrize("role", ["forget", "retain"])
def test_gru_of_one_role_follows_the_sum(role: str) -> None:
    assert gru(torch.eye(2), [role, role]).tolist() == [1, 1]


@pytest.mark.parametrize("role", ["forget", "retain"])
def test_gru_is_refused_where_no_step_has_both_roles(role: str) -> None:
    with pytest.raises(UserError, match="combine: GRU takes what harms"):
        check_roles(gru, [[role, role], [role]])
    check_roles(gru, [[role], BOTH])
    check_roles(pcgrad, [[role, role]])


@pytest.mark.parametrize("rule", ["PCGrad", "UPGrad"])
def test_where_nothing_conflicts_the_step_is_the_sum(rule: str) -> None:
    gram = torch.tensor([[1.0, 0.5, 0.0], [0.5, 2.0, 0.25], [0.0, 0.25, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(RULES[rule](gram, BOTH), torch.ones(3, dtype=torch.float64), rtol=0, atol=2e-3)


@pytest.mark.parametrize("rule", ["PCGrad", "UPGrad"])
def test_without_torchjd_that_is_told(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(UserError, match=rf"{rule} needs the package torchjd; install dualoptim\[torchjd\]"):
        RULES[rule](torch.eye(2), BOTH)
