"""The optimizers: properties of the rule, the naive twin, the golden trajectories, and the torch contract."""

from __future__ import annotations

import copy
import io
import json
import pickle
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from torch.nn import Parameter
from torch.testing import assert_close

from dualoptim import DualOptim, DualOptimPlus
from dualoptim.schedule import by_turns, equal_weights

from .conftest import GOLDEN
from .reference.naive import NaiveDualOptim

SCHEDULE = ("forget", "retain", "retain", "forget", "retain", "forget", "forget", "retain", "retain", "retain")
BOTH = pytest.mark.parametrize("cls", [DualOptimPlus, DualOptim])
REPRODUCIBLE = settings(deadline=None, derandomize=True, database=None)


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(param: Tensor, steps: int, seed: int = 100, scale: float = 1.0) -> list[Tensor]:
    """Gradients with something in common, so that base and deltas both have work to do."""
    common = randn(*param.shape, seed=seed, scale=scale)
    return [(common + randn(*param.shape, seed=seed + 1 + t, scale=scale)).to(param.dtype) for t in range(steps)]


def run(
    opt: DualOptimPlus,
    param: Tensor,
    grads: Sequence[Tensor],
    schedule: Sequence[str] = SCHEDULE,
) -> list[Tensor]:
    """Step once with each gradient; the parameter after every step."""
    seen = []
    for grad, objective in zip(grads, schedule, strict=False):
        param.grad = grad.clone(memory_format=torch.preserve_format)
        opt.step(objective=objective)
        seen.append(param.detach().clone())
    return seen


def trajectory(start: Tensor, grads: Sequence[Tensor], schedule: Sequence[str] = SCHEDULE, **kwargs: Any) -> Tensor:
    param = Parameter(start.clone())
    return torch.stack(run(kwargs.pop("cls", DualOptimPlus)([param], **kwargs), param, grads, schedule))


def assert_same(a: Any, b: Any) -> None:
    """Equal bit for bit, through nested dicts."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


# What it reduces to


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("cls", [DualOptimPlus, DualOptim])
def test_without_a_base_and_with_one_objective_it_is_adamw(cls: type[DualOptimPlus], weight_decay: float) -> None:
    start = randn(5, 7)
    grads = gradients(start, 30)
    theirs = Parameter(start.clone())
    adamw = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=weight_decay)
    ours = Parameter(start.clone())
    no_base = {"base_betas": None} if cls is DualOptimPlus else {}
    opt = cls([ours], 0.01, (0.9, 0.95), weight_decay=weight_decay, objectives=["only"], max_update=None, **no_base)
    for grad in grads:
        theirs.grad, ours.grad = grad.clone(), grad.clone()
        adamw.step()
        opt.step(objective="only")
        assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_dualoptim_is_an_adamw_per_objective_on_shared_parameters() -> None:
    start = randn(5, 7)
    theirs, ours = Parameter(start.clone()), Parameter(start.clone())
    adamw = {
        "forget": torch.optim.AdamW([theirs], lr=0.015, weight_decay=0.1),
        "retain": torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1),
    }
    opt = DualOptim([ours], lr=0.01, weight_decay=0.1, lr_scales={"forget": 1.5})
    for grad, objective in zip(gradients(start, len(SCHEDULE)), SCHEDULE, strict=True):
        theirs.grad, ours.grad = grad.clone(), grad.clone()
        adamw[objective].step()
        opt.step(objective=objective)
        assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_defaults_are_the_documented_ones() -> None:
    plus, dual = (cls([Parameter(torch.zeros(1))]) for cls in (DualOptimPlus, DualOptim))
    common = {"lr": 1e-5, "eps": 1e-8, "weight_decay": 0.01, "lr_scales": {}}
    expected = {**common, "betas": (0.9, 0.95), "base_betas": (0.9, 0.95), "max_update": 1.0}
    assert {key: plus.defaults[key] for key in expected} == expected
    expected = {**common, "betas": (0.9, 0.999), "base_betas": None, "max_update": None}
    assert {key: dual.defaults[key] for key in expected} == expected
    assert plus.objectives == dual.objectives == ("forget", "retain")


# The naive twin

DECAYS = st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.99, 0.999])


@settings(REPRODUCIBLE, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 6), max_size=3),
    schedule=st.integers(1, 4).flatmap(lambda k: st.lists(st.integers(0, k - 1), min_size=1, max_size=16)),
    lr=st.sampled_from([1e-5, 1e-3, 0.1]),
    betas=st.tuples(DECAYS, DECAYS),
    base_betas=st.none() | st.tuples(DECAYS, DECAYS),
    eps=st.sampled_from([1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.01, 0.3]),
    scales=st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5]), min_size=4, max_size=4),
    weights=st.lists(st.sampled_from([0.0, 0.6, 1.0, 3.0]), min_size=4, max_size=4),
    grad_scales=st.lists(st.sampled_from([1e-3, 1.0, 30.0]), min_size=4, max_size=4),
    max_update=st.sampled_from([None, 1.0, 0.1]),
    seed=st.integers(0, 2**20),
)
def test_every_step_is_the_naive_twins(
    shape: list[int],
    schedule: list[int],
    lr: float,
    betas: tuple[float, float],
    base_betas: tuple[float, float] | None,
    eps: float,
    weight_decay: float,
    scales: list[float],
    weights: list[float],
    grad_scales: list[float],
    max_update: float | None,
    seed: int,
) -> None:
    names = [f"objective {i}" for i in range(4)]
    settings_ = {
        "lr": lr, "betas": betas, "base_betas": base_betas, "eps": eps, "weight_decay": weight_decay,
        "lr_scales": dict(zip(names, scales, strict=True)), "max_update": max_update,
        "base_weights": dict(zip(names, weights, strict=True)) if base_betas is not None else {},
    }  # fmt: skip
    param = Parameter(randn(*shape, seed=seed))
    opt = DualOptimPlus([param], objectives=names, **settings_)
    twin = NaiveDualOptim(param, **settings_)
    for t, i in enumerate(schedule):
        grad = randn(*shape, seed=seed + t + 1, scale=grad_scales[i])
        twin.param = param.detach().double().clone()
        twin.step(grad, names[i])
        param.grad = grad.clone()
        opt.step(objective=names[i])
        low, high = twin.interval()
        assert torch.all((low <= param) & (param <= high)), f"step {t}"

        state, slack = opt.state[param], (4 + twin.t) * 2.0**-24
        assert torch.all((state[f"delta_exp_avg/{names[i]}"] - twin.m_o[names[i]]).abs() <= slack * twin.m_size)
        assert torch.all((state[f"delta_exp_avg_sq/{names[i]}"] - twin.v_o[names[i]]).abs() <= slack * twin.v_size)
        if base_betas is not None:
            assert_close(state["base_exp_avg_sq"].double(), twin.v_b, rtol=slack, atol=0)
            assert torch.all((state["base_exp_avg"] - twin.m_b).abs() <= slack * twin.size_b)


@pytest.mark.parametrize("max_update", [None, 1.0])
def test_the_naive_twin_pins_nearly_every_element(max_update: float | None) -> None:
    """Else the comparison above would be empty: where moments do not cancel, the twin leaves room for rounding only."""
    start = randn(2000)
    twin = NaiveDualOptim(start, lr=0.01, betas=(0.9, 0.95), base_betas=(0.9, 0.95), max_update=max_update)
    for grad, objective in zip(gradients(start, len(SCHEDULE)), SCHEDULE, strict=True):
        twin.step(grad, objective)
        low, high = twin.interval()
        assert (high - low).quantile(0.95) < 1e-5


# Invariances


def test_a_step_leaves_the_other_objectives_deltas_bit_identical_and_moves_the_base() -> None:
    param = Parameter(randn(9))
    opt = DualOptimPlus([param], lr=0.01, objectives=("forget", "retain", "style"))
    run(opt, param, gradients(param, 3), ("forget", "retain", "style"))
    before = copy.deepcopy(opt.state[param])
    run(opt, param, [randn(9, seed=5)], ("forget",))
    after = opt.state[param]
    for key in ("delta_exp_avg", "delta_exp_avg_sq", "delta_step"):
        for other in ("retain", "style"):
            assert_same(before[f"{key}/{other}"], after[f"{key}/{other}"])
    assert (after["delta_step/forget"], after["step"]) == (2, 4)
    for moment in (before["base_exp_avg"], before["base_exp_avg_sq"]):
        assert not any(torch.equal(moment, after[key]) for key in ("base_exp_avg", "base_exp_avg_sq"))


@BOTH
def test_renaming_objectives_changes_nothing(cls: type[DualOptimPlus]) -> None:
    start = randn(4, 5)
    grads = gradients(start, len(SCHEDULE))
    new = {"forget": "retain", "retain": "κ.2"}
    named = trajectory(start, grads, cls=cls, lr=0.01, lr_scales={"forget": 1.5})
    renamed = trajectory(
        start,
        grads,
        [new[objective] for objective in SCHEDULE],
        cls=cls,
        lr=0.01,
        objectives=new.values(),
        lr_scales={"retain": 1.5},
    )
    assert torch.equal(named, renamed)


@BOTH
def test_the_order_in_which_objectives_are_named_and_unused_ones_change_nothing(cls: type[DualOptimPlus]) -> None:
    start = randn(4, 5)
    grads = gradients(start, len(SCHEDULE))
    one, other, more = (
        trajectory(start, grads, cls=cls, lr=0.01, objectives=names)
        for names in (("forget", "retain"), ("retain", "forget"), ("a", "retain", "b", "forget"))
    )
    assert torch.equal(one, other)
    assert torch.equal(one, more)


@pytest.mark.parametrize("max_update", [None, 1.0])
@pytest.mark.parametrize("exponent", [-12, 1, 15])
def test_gradients_times_a_power_of_two_give_the_same_updates_without_eps(
    exponent: int, max_update: float | None
) -> None:
    start = randn(6, 5)
    grads = gradients(start, len(SCHEDULE))
    kwargs = {"lr": 0.01, "eps": 0.0, "max_update": max_update}
    plain = trajectory(start, grads, **kwargs)
    scaled = trajectory(start, [2.0**exponent * grad for grad in grads], **kwargs)
    assert torch.equal(plain, scaled)


@BOTH
@pytest.mark.parametrize("max_update", [None, 1.0])
def test_negated_gradients_give_negated_updates(cls: type[DualOptimPlus], max_update: float | None) -> None:
    start = torch.zeros(6, 5)
    grads = gradients(start, len(SCHEDULE))
    kwargs = {"cls": cls, "lr": 0.01, "weight_decay": 0.0, "max_update": max_update}
    assert torch.equal(trajectory(start, grads, **kwargs), -trajectory(start, [-grad for grad in grads], **kwargs))


@pytest.mark.parametrize("max_update", [None, 1.0])
@pytest.mark.parametrize("grads_too", [False, True])
@pytest.mark.parametrize("params_too", [False, True])
def test_the_layout_in_memory_changes_nothing(params_too: bool, grads_too: bool, max_update: float | None) -> None:
    def laid_out(tensor: Tensor, transposed: bool) -> Tensor:
        return tensor.t().contiguous().t() if transposed else tensor.clone()

    start = randn(6, 5)
    grads = gradients(start, len(SCHEDULE))
    expected = trajectory(start, grads, lr=0.01, max_update=max_update)
    param = Parameter(laid_out(start, params_too))
    assert param.is_contiguous() is not params_too
    opt = DualOptimPlus([param], lr=0.01, max_update=max_update)
    for t, objective in enumerate(SCHEDULE):
        param.grad = laid_out(grads[t], grads_too)
        opt.step(objective=objective)
        assert_close(param.detach(), expected[t], rtol=0, atol=1e-6)


def test_a_parameter_that_is_a_view_with_gaps_is_updated_in_place_and_nothing_else_is() -> None:
    whole = randn(6, 8)
    kept = whole.clone()
    view = whole[:, ::2].requires_grad_()
    grads = gradients(view, len(SCHEDULE))
    expected = trajectory(kept[:, ::2].contiguous(), grads, lr=0.01)
    assert_close(run(DualOptimPlus([view], lr=0.01), view, grads)[-1], expected[-1], rtol=0, atol=1e-6)
    assert torch.equal(whole[:, 1::2], kept[:, 1::2])
    assert_close(whole[:, ::2].detach(), expected[-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
def test_scalars_and_empty_parameters_step(shape: tuple[int, ...]) -> None:
    param = Parameter(torch.ones(shape))
    run(DualOptimPlus([param], lr=0.01), param, [torch.ones(shape)] * 3)
    assert torch.all(param < 1)


# The bound


@settings(REPRODUCIBLE, max_examples=40)
@given(
    exponents=st.lists(st.floats(-18, 17), min_size=2, max_size=12),
    max_update=st.sampled_from([1e-3, 1.0, 7.0]),
    scale=st.sampled_from([0.5, 1.0, 3.0]),
    base_betas=st.none() | st.just((0.9, 0.95)) | st.just((0.0, 0.999)),
)
def test_no_update_exceeds_the_bound(
    exponents: list[float], max_update: float, scale: float, base_betas: tuple[float, float] | None
) -> None:
    param = Parameter(torch.zeros(64))
    opt = DualOptimPlus(
        [param],
        lr=0.01,
        base_betas=base_betas,
        weight_decay=0.0,
        max_update=max_update,
        lr_scales={"forget": scale},
    )
    for t, exponent in enumerate(exponents):
        objective = SCHEDULE[t % len(SCHEDULE)]
        param.data.zero_()
        param.grad = randn(64, seed=t, scale=10**exponent)
        param.grad[:4] = 0.0
        opt.step(objective=objective)
        bound = 0.01 * max_update * (scale if objective == "forget" else 1.0)
        assert param.abs().max() <= bound * (1 + 1e-6)


def test_a_bound_that_is_never_reached_changes_nothing() -> None:
    start = randn(6, 5)
    grads = gradients(start, len(SCHEDULE))
    assert torch.equal(
        trajectory(start, grads, lr=0.01, max_update=None), trajectory(start, grads, lr=0.01, max_update=1e6)
    )


def test_the_gradients_that_explode_stay_within_the_default_bound() -> None:
    run_ = Golden("plus_exploding")
    start = torch.zeros_like(run_.tensors["p0.0"])
    steps = trajectory(start, run_.gradients(0), run_.schedule, lr=run_.settings["lr"], weight_decay=0.0)
    moves = torch.cat([steps[:1], steps.diff(dim=0)])
    assert moves.abs().max() <= run_.settings["lr"] * (1 + 1e-4)


# The golden trajectories

GOLDEN_RUNS = sorted(path.stem for path in (GOLDEN / "optimizer").glob("*.safetensors"))


class Golden:
    """One recorded trajectory, its tensors copied so that they may be changed."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / "optimizer" / f"{name}.safetensors", "pt") as file:
            meta = file.metadata()
            self.tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        self.cls = {"plus": DualOptimPlus, "dual": DualOptim}[meta["kind"]]
        self.schedule: list[str] = json.loads(meta["schedule"])
        self.lr_factors: list[float] = json.loads(meta["lr_factors"]) or [1.0] * len(self.schedule)
        self.num_params = len(json.loads(meta["shapes"]))
        base_betas = json.loads(meta["base_betas"])
        self.settings: dict[str, Any] = {
            "lr": float(meta["lr"]),
            "betas": tuple(json.loads(meta["betas"])),
            "eps": float(meta["eps"]),
            "weight_decay": float(meta["weight_decay"]),
            "lr_scales": {"forget": float(meta["forget_lr_ratio"])},
            "max_update": None,
            **({"base_betas": tuple(base_betas)} if base_betas else {}),
        }

    def gradients(self, i: int) -> list[Tensor]:
        return [self.tensors[f"g.{t}.{i}"] for t in range(len(self.schedule))]

    def twins(self) -> list[NaiveDualOptim]:
        settings_ = {"base_betas": None, **self.settings}
        return [NaiveDualOptim(self.tensors[f"p0.{i}"], **settings_) for i in range(self.num_params)]


def rounding(twin: NaiveDualOptim) -> Tensor:
    """What another order of the same fp32 sums may change.

    The recorded digits are those of a CPU with fused multiply-add, and with it they must come out everywhere; elsewhere
    the elements whose second moment nearly vanishes differ.
    """
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        return torch.zeros_like(twin.param)
    low, high = twin.interval()
    return high - low


@pytest.mark.parametrize("step_by_step", [False, True], ids=["free-running", "step by step"])
@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_without_a_bound_it_is_the_published_implementation(name: str, step_by_step: bool) -> None:
    run_ = Golden(name)
    params = [Parameter(run_.tensors[f"p0.{i}"].clone()) for i in range(run_.num_params)]
    opt = run_.cls(params, **run_.settings)
    twins = run_.twins()
    slack = [torch.zeros_like(twin.param) for twin in twins]
    for t, objective in enumerate(run_.schedule):
        lr = run_.settings["lr"] * run_.lr_factors[t]
        opt.param_groups[0]["lr"] = lr
        for i, param in enumerate(params):
            param.grad = run_.tensors[f"g.{t}.{i}"].clone()
            twins[i].step(param.grad, objective, lr)
            slack[i] = rounding(twins[i]) + (0 if step_by_step else slack[i])
        opt.step(objective=objective)
        for i, param in enumerate(params):
            expected = run_.tensors[f"p.{t}.{i}"]
            excess = (param.detach().double() - expected).abs() - slack[i]
            assert excess.max() <= 1e-6, f"parameter {i} after step {t} is off by {excess.max():.2e}"
            if step_by_step:
                param.data.copy_(expected)


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_the_naive_twin_is_the_published_implementation(name: str) -> None:
    run_ = Golden(name)
    for i, twin in enumerate(run_.twins()):
        for t, objective in enumerate(run_.schedule):
            twin.step(run_.tensors[f"g.{t}.{i}"], objective, run_.settings["lr"] * run_.lr_factors[t])
            low, high = twin.interval()
            twin.param = run_.tensors[f"p.{t}.{i}"].double()
            assert torch.all((low <= twin.param) & (twin.param <= high))


def test_the_published_rule_takes_a_step_of_187_learning_rates() -> None:
    run_ = Golden("plus_exploding")
    start = run_.tensors["p0.0"]
    steps = trajectory(start, run_.gradients(0), run_.schedule, **run_.settings)
    largest = torch.cat([start[None], steps]).diff(dim=0).abs().max().item() / run_.settings["lr"]
    assert largest == pytest.approx(187.39, abs=0.5)


def test_every_small_reference_trajectory_is_among_the_golden_ones() -> None:
    reference = Path(__file__).parents[2] / "shared" / "reference" / "optimizer"
    if not reference.is_dir():
        pytest.skip("the folder ../shared/reference, from which the golden numbers were copied, is not here")
    for path in reference.glob("*.safetensors"):
        if "8" not in path.stem:
            assert (GOLDEN / "optimizer" / path.name).read_bytes() == path.read_bytes()


# Learning rates, schedulers, groups


@pytest.mark.parametrize("max_update", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learning_rate_in_a_tensor_is_the_same_learning_rate(
    shape: tuple[int, ...], dtype: torch.dtype, max_update: float | None
) -> None:
    start = randn(6, 5)
    grads = gradients(start, len(SCHEDULE))
    kwargs = {"weight_decay": 0.1, "lr_scales": {"forget": 1.5}, "max_update": max_update}
    number = trajectory(start, grads, lr=0.01, **kwargs)
    tensor = trajectory(start, grads, lr=torch.full(shape, 0.01, dtype=dtype), **kwargs)
    assert_close(tensor, number, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["plain", "compiled"])
@pytest.mark.parametrize("bits", [32, 8])
def test_base_weights_of_one_change_no_bit_and_others_are_the_rule_with_gradients_weighed(
    backend: str, bits: int
) -> None:
    start = randn(64, 80)
    grads = gradients(start, len(SCHEDULE))
    common = {"lr": 0.01, "backend": backend, "base_bits": bits, "delta_bits": bits}
    plain = trajectory(start, grads, **common)
    assert torch.equal(trajectory(start, grads, base_weights={"forget": 1, "retain": 1.0}, **common), plain)
    weighed = trajectory(start, grads, base_weights={"forget": 3.0, "retain": 0.6}, **common)
    assert not torch.equal(weighed, plain)
    reference = trajectory(start, grads, base_weights={"forget": 3.0, "retain": 0.6}, **{**common, "backend": "plain"})
    # Where moments nearly cancel, the order of roundings shows; nowhere else.
    assert ((weighed - reference).abs() > 1e-5).float().mean() < 0.01


def test_a_base_that_nothing_feeds_leaves_separate_states() -> None:
    start = randn(6, 5)
    grads = gradients(start, len(SCHEDULE))
    common = {"lr": 0.01, "betas": (0.9, 0.95), "max_update": None}
    nothing = trajectory(start, grads, base_weights={"forget": 0.0, "retain": 0.0}, **common)
    assert_close(nothing, trajectory(start, grads, cls=DualOptim, **common), rtol=0, atol=1e-6)


def test_equal_weights_give_every_objective_the_same_part_of_the_base() -> None:
    """Of gradients that are 1 for one objective and 0 for the other, the base holds a half each, whatever the ratio."""
    turns = by_turns({"forget": 1, "retain": 5}, 8, 600)
    weights = equal_weights(turns)
    for objective in ("forget", "retain"):
        param = Parameter(torch.zeros(1))
        opt = DualOptimPlus([param], base_betas=(0.99, 0.99), base_weights=weights)
        means = []
        for turn in turns:
            (chosen,) = turn
            run(opt, param, [torch.full((1,), float(chosen == objective))], [chosen])
            means.append(opt.state[param]["base_exp_avg"].item())
        assert statistics.fmean(means[-6:]) == pytest.approx(0.5, abs=0.01)


def test_a_state_dict_from_before_base_weights_loads_with_the_optimizers_own() -> None:
    param = Parameter(randn(3))
    opt = DualOptimPlus([param], base_weights={"forget": 3.0})
    run(opt, param, [randn(3)], ["forget"])
    saved = opt.state_dict()
    assert saved["param_groups"][0]["base_weights"] == {"forget": 3.0, "retain": 1.0}
    del saved["param_groups"][0]["base_weights"]
    other = DualOptimPlus([Parameter(randn(3))], base_weights={"retain": 0.5})
    other.load_state_dict(saved)
    assert other.param_groups[0]["base_weights"] == {"forget": 1.0, "retain": 0.5}


def test_lr_scales_scale_decay_and_update_of_their_objective_alone() -> None:
    start = randn(6, 5)
    grads = gradients(start, len(SCHEDULE))
    for objective in ("forget", "retain"):
        for scale in (0.0, 0.25):
            param = Parameter(start.clone())
            opt = DualOptimPlus([param], lr=0.02, weight_decay=0.1, lr_scales={objective: scale})
            plain = Parameter(start.clone())
            twin = DualOptimPlus([plain], lr=0.02, weight_decay=0.1)
            for grad, chosen in zip(grads, SCHEDULE, strict=True):
                twin.param_groups[0]["lr"] = 0.02 * (scale if chosen == objective else 1.0)
                run(opt, param, [grad], [chosen])
                run(twin, plain, [grad], [chosen])
                assert torch.equal(param, plain)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_scheduler_sets_the_learning_rate_of_every_step(as_tensor: bool) -> None:
    start = randn(6, 5)
    grads = gradients(start, len(SCHEDULE))
    manual, scheduled = Parameter(start.clone()), Parameter(start.clone())
    by_hand = DualOptimPlus([manual], lr=0.01)
    opt = DualOptimPlus([scheduled], lr=torch.tensor(0.01) if as_tensor else 0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t))
    for t, (grad, objective) in enumerate(zip(grads, SCHEDULE, strict=True)):
        by_hand.param_groups[0]["lr"] = 0.01 / (1 + t)
        run(by_hand, manual, [grad], [objective])
        run(opt, scheduled, [grad], [objective])
        scheduler.step()
        assert_close(scheduled, manual, rtol=0, atol=1e-6)
    assert isinstance(opt.param_groups[0]["lr"], Tensor) is as_tensor


def test_a_group_with_its_own_settings_is_an_optimizer_of_its_own() -> None:
    own = {
        "lr": 0.05, "betas": (0.8, 0.99), "base_betas": None, "eps": 1e-4, "weight_decay": 0.2, "max_update": 0.3,
        "lr_scales": {"retain": 0.5},
    }  # fmt: skip
    one, other = Parameter(randn(5)), Parameter(randn(7, seed=1))
    grads = [gradients(param, len(SCHEDULE), seed=7) for param in (one, other)]
    expected = [trajectory(one, grads[0], lr=0.01), trajectory(other, grads[1], **own)]
    opt = DualOptimPlus([{"params": [one]}, {"params": [other], **own}], lr=0.01)
    for t, objective in enumerate(SCHEDULE):
        one.grad, other.grad = grads[0][t], grads[1][t]
        opt.step(objective=objective)
        assert torch.equal(one, expected[0][t])
        assert torch.equal(other, expected[1][t])


def test_a_group_added_later_starts_at_its_own_first_step() -> None:
    first, later = Parameter(randn(5)), Parameter(randn(7, seed=1))
    opt = DualOptimPlus([first], lr=0.01)
    run(opt, first, gradients(first, 3))
    first.grad = None
    opt.add_param_group({"params": [later], "lr": 0.03})
    grads = gradients(later, len(SCHEDULE))
    expected = trajectory(later, grads, lr=0.03)
    assert torch.equal(torch.stack(run(opt, later, grads)), expected)
    with pytest.raises(ValueError, match="betas"):
        opt.add_param_group({"params": [Parameter(torch.ones(1))], "betas": (0.9, 1.0)})


def test_named_parameters_are_accepted() -> None:
    linear = torch.nn.Linear(2, 2)
    opt = DualOptimPlus(linear.named_parameters(), lr=0.01)
    linear(torch.ones(1, 2)).sum().backward()
    opt.step(objective="forget")
    assert len(opt.state) == 2


# Steps, closures, gradients that are not there


def test_the_property_and_the_argument_choose_the_same_for_one_step_alone() -> None:
    start = randn(6)
    grads = gradients(start, len(SCHEDULE))
    param = Parameter(start.clone())
    opt = DualOptimPlus([param], lr=0.01)
    assert opt.objective is None
    for t, (objective, after) in enumerate(zip(SCHEDULE, trajectory(start, grads, lr=0.01), strict=True)):
        other = "retain" if objective == "forget" else "forget"
        param.grad = grads[t].clone()
        if t % 2:
            opt.objective = objective
            opt.step()
        else:
            opt.objective = other
            opt.step(objective=objective)
        assert opt.objective is None
        assert torch.equal(param, after)
    with pytest.raises(ValueError, match="'forget', 'retain'"):
        opt.step()


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    param = Parameter(torch.ones(3))
    opt = DualOptimPlus([param], lr=0.01)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert opt.step(closure, objective="forget").item() == 3.0
    expected = trajectory(torch.ones(3), [torch.full((3,), 2.0)], lr=0.01)
    assert torch.equal(param, expected[0])
    assert opt.step(objective="retain") is None


def test_parameters_without_a_gradient_stay_and_their_counters_too() -> None:
    stepping, resting, frozen = Parameter(randn(4)), Parameter(randn(4)), Parameter(randn(4), requires_grad=False)
    kept = resting.detach().clone()
    opt = DualOptimPlus([stepping, resting, frozen], lr=0.1, weight_decay=0.5)
    run(opt, stepping, gradients(stepping, 3))
    assert torch.equal(resting, kept)
    assert resting not in opt.state
    assert frozen not in opt.state

    stepping.grad = None
    grads = gradients(kept, 4)
    expected = trajectory(kept, grads, lr=0.1, weight_decay=0.5)
    assert torch.equal(torch.stack(run(opt, resting, grads)), expected)
    assert (opt.state[stepping]["step"], opt.state[resting]["step"]) == (3, 4)
    resting.grad = None
    opt.step(objective="forget")
    assert opt.state[resting]["step"] == 4
    assert [opt.state[resting][f"delta_step/{name}"] for name in ("forget", "retain")] == [2, 2]


def test_gradients_are_left_as_they_were() -> None:
    param = Parameter(randn(6))
    grad = randn(6, seed=1)
    param.grad = grad.clone()
    opt = DualOptimPlus([param], lr=0.01)
    for objective in ("forget", "retain"):
        opt.step(objective=objective)
        assert torch.equal(param.grad, grad)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_moments_of_fp32(cls: type[DualOptimPlus], dtype: torch.dtype) -> None:
    start = randn(6, 5).to(dtype)
    grads = gradients(start, len(SCHEDULE))
    half, full = Parameter(start.clone()), Parameter(start.float())
    opts = [cls([param], lr=0.01) for param in (half, full)]
    for grad, objective in zip(grads, SCHEDULE, strict=True):
        full.data.copy_(half)
        run(opts[0], half, [grad], [objective])
        run(opts[1], full, [grad.float()], [objective])
        state, expected = opts[0].state[half], opts[1].state[full]
        assert_same(dict(state), dict(expected))
        assert state[f"delta_exp_avg/{objective}"].dtype == torch.float32
        # Decay and update are rounded one after the other.
        assert_close(half.detach(), full.detach().to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_the_state_is_flat_and_made_for_all_objectives_at_once() -> None:
    param = Parameter(randn(6))
    opt = DualOptimPlus([param], objectives=("a", "b.c", "d/e"))
    run(opt, param, [randn(6)], ["b.c"])
    own = opt.state[param]
    assert all(isinstance(value, Tensor) for value in own.values())
    assert len(own) == 2 + 3 * 3 + 1
    assert [int(own[f"delta_step/{name}"]) for name in opt.objectives] == [0, 1, 0]
    assert not own["delta_exp_avg/d/e"].any()
    assert not any("base" in key for key in _stepped(DualOptim).state_dict()["state"][0])


# Saving, loading, copying


def _stepped(cls: type[DualOptimPlus] = DualOptimPlus, steps: int = 3, **kwargs: Any) -> DualOptimPlus:
    param = Parameter(randn(6, 5))
    opt = cls([param], lr=0.01, **kwargs)
    run(opt, param, gradients(param, steps))
    return opt


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@BOTH
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_and_resumed_is_never_stopped_bit_for_bit(
    cls: type[DualOptimPlus], dtype: torch.dtype, transposed: bool
) -> None:
    start = randn(6, 5).to(dtype)
    start = start.t() if transposed else start
    grads = gradients(start, len(SCHEDULE))
    param = Parameter(start.clone())
    opt = cls([param], lr=0.01, lr_scales={"forget": 1.5})
    run(opt, param, grads[:5], SCHEDULE[:5])

    resumed = Parameter(param.detach().clone())
    again = cls([resumed], lr=0.5)
    again.load_state_dict(_through_a_file(opt.state_dict()))
    assert_same(again.state_dict(), opt.state_dict())
    for grad, objective in zip(grads[5:], SCHEDULE[5:], strict=True):
        run(opt, param, [grad], [objective])
        run(again, resumed, [grad], [objective])
        assert torch.equal(resumed, param)
    assert_same(again.state_dict(), opt.state_dict())
    assert again.state[resumed]["delta_exp_avg_sq/retain"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counters_past_300_come_back(dtype: torch.dtype) -> None:
    param = Parameter(torch.ones(2, dtype=dtype))
    opt = DualOptimPlus([param], lr=1e-3)
    grads = [torch.randn(2, generator=torch.Generator().manual_seed(t)).to(dtype) for t in range(331)]
    run(opt, param, grads, ["forget" if t % 10 == 0 else "retain" for t in range(331)])
    resumed = Parameter(param.detach().clone())
    again = DualOptimPlus([resumed])
    again.load_state_dict(_through_a_file(opt.state_dict()))
    state = again.state[resumed]
    assert [state[key] for key in ("step", "delta_step/forget", "delta_step/retain")] == [331, 34, 297]
    for opt_, param_ in ((opt, param), (again, resumed)):
        run(opt_, param_, [grads[0], grads[1]], ["retain", "forget"])
    assert torch.equal(param, resumed)


def test_a_loaded_state_is_a_copy() -> None:
    opt = _stepped()
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    again = _stepped()
    again.load_state_dict(saved)
    (param,) = again.param_groups[0]["params"]
    run(again, param, gradients(param, 4))
    assert_same(saved, kept)


def test_states_are_matched_to_parameters_by_position_across_groups() -> None:
    def build() -> tuple[list[Parameter], DualOptimPlus]:
        params = [Parameter(randn(n, seed=n)) for n in (2, 3, 4)]
        return params, DualOptimPlus([{"params": params[:1]}, {"params": params[1:], "lr": 0.1}], lr=0.01)

    (params, opt), (others, again) = build(), build()
    for t, objective in enumerate(("forget", "retain")):
        params[0].grad, params[2].grad = randn(2, seed=t), randn(4, seed=t)
        opt.step(objective=objective)
    again.load_state_dict(_through_a_file(opt.state_dict()))
    assert others[1] not in again.state
    for i in (0, 2):
        assert_same(dict(again.state[others[i]]), dict(opt.state[params[i]]))


def test_the_state_of_an_objective_that_is_not_known_is_refused_by_name() -> None:
    opt = _stepped()
    other = DualOptimPlus([Parameter(randn(6, 5))], objectives=("forget", "keep"))
    with pytest.raises(ValueError, match="'retain'"):
        other.load_state_dict(opt.state_dict())
    assert not other.state


def test_a_state_dict_with_other_groups_is_refused() -> None:
    other = DualOptimPlus([{"params": [Parameter(torch.ones(1))]}, {"params": [Parameter(torch.ones(1))]}])
    with pytest.raises(ValueError, match="group"):
        other.load_state_dict(_stepped().state_dict())


def test_an_objective_added_to_a_loaded_state_starts_where_it_would_have() -> None:
    start = randn(6)
    grads = gradients(start, 5)
    schedule = ("forget", "retain", "style", "retain", "style")
    expected = trajectory(start, grads, schedule, lr=0.01, objectives=("forget", "retain", "style"))
    param = Parameter(start.clone())
    opt = DualOptimPlus([param], lr=0.01)
    run(opt, param, grads[:2], schedule[:2])
    more = DualOptimPlus([param], lr=0.01, objectives=("style", "forget", "retain"))
    more.load_state_dict(_through_a_file(opt.state_dict()))
    assert torch.equal(torch.stack(run(more, param, grads[2:], schedule[2:])), expected[2:])


@BOTH
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["deep", "pickle"])
def test_a_copy_of_the_optimizer_goes_on_as_the_original(
    cls: type[DualOptimPlus], copied: Callable[[DualOptimPlus], DualOptimPlus]
) -> None:
    opt = _stepped(cls, objectives=("forget", "retain", "style"))
    opt.objective = "retain"
    again = copied(opt)
    assert (again.objectives, again.objective) == (opt.objectives, opt.objective)
    assert repr(again) == repr(opt)
    params = [o.param_groups[0]["params"][0] for o in (opt, again)]
    for grad in gradients(params[0], 2, seed=9):
        for o, param in zip((opt, again), params, strict=True):
            param.grad = grad.clone()
            o.objective = o.objective or "style"
            o.step()
    assert torch.equal(*params)
    assert_same(opt.state_dict(), again.state_dict())


def test_repr_names_the_objectives() -> None:
    text = repr(_stepped(objectives=("forget", "retain", "style")))
    assert text.startswith("DualOptimPlus")
    assert "style" in text


# The gradient scaler


def test_under_a_gradient_scaler_steps_are_the_same_and_infinite_ones_are_skipped() -> None:
    start = randn(6)
    plain, scaled = Parameter(start.clone()), Parameter(start.clone())
    unscaled, opt = DualOptimPlus([plain], lr=0.01), DualOptimPlus([scaled], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for t, objective in enumerate(SCHEDULE):
        target = randn(6, seed=t)
        for param in (plain, scaled):
            param.grad = None
        ((plain - target) ** 2).sum().backward()
        unscaled.step(objective=objective)
        scaler.scale(((scaled - target) ** 2).sum()).backward()
        opt.objective = objective
        scaler.step(opt)
        scaler.update()
        assert torch.equal(plain, scaled)

    for chosen in ("forget", None):
        scaler.scale((scaled * torch.inf).sum()).backward()
        opt.objective = chosen
        scaler.step(opt)
        scaler.update()
        assert opt.objective is None  # the choice served the step that was skipped
        assert torch.equal(plain, scaled)
        assert opt.state[scaled]["step"] == len(SCHEDULE)
    assert opt.num_skipped == {"forget": 1, "retain": 0}


@pytest.mark.parametrize("refused", ["nobody's", "another's", "a moment that does not fit"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_refused_step_leaves_a_scalers_gradients_and_factor_to_the_next(refused: str, turned: bool) -> None:
    weights = [Parameter(torch.ones(4, 3)) for _ in range(2)]
    opts = [DualOptimPlus([weight], lr=0.1) for weight in weights]
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**16) for _ in weights]
    for times, weight, opt, scaler in zip((0, 1), weights, opts, scalers, strict=True):
        for scaled in (True, False):
            weight.grad = None
            loss = (weight * randn(4, 3, scale=1e-3)).sum()
            (scaler.scale(loss) if scaled else loss).backward()
            assert weight.grad is not None
            if turned:  # a gradient that is copied before it is stepped with
                weight.grad = weight.grad.t().clone(memory_format=torch.contiguous_format).t()
            before = weight.grad.clone()
            for _ in range(times):
                moments = dict(opt.state[weight]) if refused.startswith("a moment") else None
                if moments is not None:
                    opt.objective, opt.state[weight] = "forget", {"base_exp_avg": torch.zeros(2)}
                with pytest.raises(ValueError, match=r"objective|base_exp_avg"):
                    scaler.step(opt, **({"objective": "another"} if "another" in refused else {}))
                if moments is not None:
                    opt.state[weight] = moments
                assert torch.equal(weight.grad, before)
                assert not {"grad_scale", "found_inf"} & set(vars(opt))
            if scaled:
                scaler.step(opt, objective="forget")
                assert torch.equal(weight.grad, before / 2**16)
                scaler.update()
            else:
                opt.step(objective="forget")
                assert torch.equal(weight.grad, before)
    assert torch.equal(*weights)


@pytest.mark.parametrize("true", [1e-4, 1e-7, 1e-8, 1e-9])
@pytest.mark.parametrize("turned", [False, True])
def test_fp16_gradients_that_a_factor_saves_are_stepped_with_in_fp32(true: float, turned: bool) -> None:
    half, whole = Parameter(torch.ones(4, 3, dtype=torch.float16)), Parameter(torch.ones(4, 3))
    opt, plain = (DualOptimPlus([param], lr=0.02, eps=1e-12) for param in (half, whole))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.zeros(1))  # makes the factor
    for step, objective in enumerate(SCHEDULE):
        scaled = (true * 2**16 * randn(4, 3, seed=step)).half()
        half.grad = scaled.t().clone(memory_format=torch.contiguous_format).t() if turned else scaled.clone()
        opt.objective = objective
        scaler.step(opt)
        scaler.update()
        assert torch.equal(half.grad, scaled / 2**16)
        whole.grad = scaled.float() / 2**16
        plain.step(objective=objective)
    assert_same(dict(opt.state[half]), dict(plain.state[whole]))
    assert_close(half.float(), whole, rtol=0, atol=len(SCHEDULE) * 2**-11)
    assert ((whole - 1).abs() > 0.01).any()


# Mistakes


def test_a_step_of_nobody_names_the_objectives_and_changes_nothing() -> None:
    param = Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    opt = DualOptimPlus([param], objectives=("forget", "style"))
    with pytest.raises(ValueError, match="'forget', 'style'"):
        opt.step()
    assert not opt.state
    assert torch.equal(param, torch.ones(2))


@pytest.mark.parametrize("name", ["retian", "", "Forget", 0])
def test_an_unknown_objective_is_refused_with_the_known_ones(name: Any) -> None:
    param = Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    opt = DualOptimPlus([param])
    with pytest.raises(ValueError, match="'forget', 'retain'"):
        opt.step(objective=name)
    with pytest.raises(ValueError, match="'forget', 'retain'"):
        opt.objective = name
    assert opt.objective is None
    assert not opt.state


def test_a_misspelt_objective_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'retain'"):
        DualOptimPlus([Parameter(torch.ones(2))]).step(objective="retian")


NAN = float("nan")


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1e-9},
        {"lr": NAN},
        {"lr": float("inf")},
        {"lr": torch.tensor(-1.0)},
        {"lr": torch.tensor([0.1, 0.1])},
        {"betas": (1.0, 0.95)},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.95)},
        {"betas": (0.9, NAN)},
        {"betas": (0.9,)},
        {"betas": (0.9, 0.95, 0.99)},
        {"base_betas": (1.0, 0.95)},
        {"base_betas": (0.9, -0.1)},
        {"base_betas": (0.9,)},
        {"eps": -1e-8},
        {"eps": NAN},
        {"weight_decay": -0.1},
        {"weight_decay": NAN},
        {"max_update": 0.0},
        {"max_update": -1.0},
        {"max_update": NAN},
        {"lr_scales": {"forgot": 1.0}},
        {"base_weights": {"forgot": 1.0}},
        {"base_weights": {"forget": -1.0}},
        {"lr_scales": {"forget": -1.0}},
        {"lr_scales": {"forget": NAN}},
        {"objectives": ()},
        {"objectives": "forget"},
        {"objectives": ("forget", "forget")},
        {"objectives": ("forget", "")},
        {"objectives": ("forget", 1)},
        {"objectives": [["a"]]},
        {"seed": None},
        {"seed": "a"},
        {"seed": 2**64},
        {"seed": -(2**63) - 1},
        {"seed": 2**70},
        {"seed": torch.ones(2, dtype=torch.int64)},
        {"base_bits": 7},
        {"base_bits": 0},
        {"delta_bits": 7},
        {"delta_bits": None},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        DualOptimPlus([Parameter(torch.ones(1))], **wrong)


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1, np.int32(3), torch.tensor(3)], ids=repr)
def test_a_seed_is_any_whole_number_of_64_bits(seed: Any) -> None:
    param = Parameter(torch.ones(1, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    opt = DualOptimPlus([param], seed=seed)
    opt.step(objective="forget")
    assert type(opt.seed) is int


@pytest.mark.parametrize("name", ["base_betas", "base_bits"])
def test_dualoptim_has_no_settings_for_a_base(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        DualOptim([Parameter(torch.ones(1))], **{name: None})


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    kept = embedding.weight.detach().clone()
    opt = DualOptimPlus(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        opt.step(objective="forget")
    assert torch.equal(embedding.weight, kept)
    assert not opt.state


def test_the_optimizers_import_torch_alone() -> None:
    code = (
        "import sys, dualoptim, dualoptim.optim; from dualoptim import DualOptim, DualOptimPlus; "
        "bad = {'transformers', 'accelerate', 'jsonargparse', 'matplotlib', 'rouge_score'} & set(sys.modules); "
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_does_not_even_import_torch() -> None:
    code = "import sys, dualoptim; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: DualOptimPlus([{"params": [p], "max_updates": 0.1}]), "did you mean 'max_update'"),
        (lambda p: DualOptim([{"params": [p], "base_betas": (0.9, 0.95)}]), "DualOptim has no base"),
        (lambda p: DualOptimPlus([{"params": [p], 3: 1}]), "a parameter group sets 3, which"),
        (lambda p: DualOptimPlus([{"params": [p], "lr_scale": 2.0}]), "did you mean 'lr_scales'"),
        (lambda p: DualOptimPlus([{"params": [p], "amsgrad": True}]), "a parameter group sets 'amsgrad', which"),
        (lambda p: DualOptimPlus([{"params": [p], "seed": 1}]), "a parameter group sets 'seed', which"),
        (lambda p: DualOptimPlus([{"params": [p]}, p]), "a parameter group must be a mapping, .* but is Parameter$"),
        (lambda p: DualOptim([p]).add_param_group([p]), "a parameter group must be a mapping, .* but is list$"),
        (lambda p: DualOptimPlus([p]).add_param_group({"lr": 0.1}), "must have 'params', but has 'lr'"),
        (lambda p: DualOptim([{"params": [p], "base_weights": {"forget": 3}}]), "sets 'base_weights', but it has"),
        (lambda p: DualOptim([{"params": [p], "base_bits": 8}]), "sets 'base_bits', but it has no base"),
        (lambda p: DualOptimPlus([p], base_betas=None, base_bits=8), "the optimizer sets 'base_bits', but it has no"),
        (lambda p: DualOptimPlus([p], base_betas=None, base_weights={"forget": 3}), "optimizer sets 'base_weights'"),
        (lambda p: DualOptimPlus([p], seed=1.7), "seed must be a whole number, but is 1.7"),
        (lambda p: DualOptimPlus([p], seed=True), "seed must be a whole number, but is True"),
        (lambda p: DualOptimPlus([p], betas=0.9), "betas must be two numbers"),
        (lambda p: DualOptimPlus([p], lr="1e-5"), "lr must be a number"),
        (lambda p: DualOptimPlus([p], lr_scales=[1]), "lr_scales must be a mapping"),
        (lambda p: DualOptimPlus([p], objectives=None), "objectives must be a sequence"),
        (
            lambda p: DualOptimPlus([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))]),
            "is complex, .* store it as a real parameter, and apply torch.view_as_complex",
        ),
    ],
)
def test_a_setting_that_means_nothing_is_refused(make: Callable[[Parameter], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(Parameter(torch.ones(2)))


@pytest.mark.parametrize("key", ["base_lr", "use_bias", "no_weight_decay", "weight_decay_scale", "lr_mult", "rho"])
def test_keys_of_others_in_a_group_are_let_through(key: str) -> None:
    opt = DualOptimPlus([{"params": [Parameter(torch.ones(2))], key: 0.5}])
    assert opt.param_groups[0][key] == 0.5


@pytest.mark.parametrize("key", ["lr_scales", "base_weights"])
def test_a_factor_of_no_objective_that_a_group_gets_later_is_refused(key: str) -> None:
    param = Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    opt = DualOptimPlus([param], lr=0.1)
    opt.param_groups[0][key]["froget"] = 3
    with pytest.raises(ValueError, match=f"{key} names 'froget', but the objectives are 'forget', 'retain'"):
        opt.step(objective="forget")
    assert torch.equal(param, torch.ones(2))
    assert not opt.state


def test_states_of_another_optimizer_or_model_are_refused() -> None:
    def stepped(cls: Any, size: int = 2, **step: str) -> Any:
        param = Parameter(torch.ones(size))
        opt = cls([param])
        param.grad = torch.ones(size)
        opt.step(**step)
        return opt

    plus, dual = (stepped(cls, objective="forget") for cls in (DualOptimPlus, DualOptim))
    with pytest.raises(ValueError, match="with a base, and this one is not"):
        dual.load_state_dict(plus.state_dict())
    with pytest.raises(ValueError, match="another optimizer's: its groups have no"):
        plus.load_state_dict(stepped(torch.optim.AdamW).state_dict())
    with pytest.raises(ValueError, match=r"have shape \(3,\), and the parameter \(2,\)"):
        plus.load_state_dict(stepped(DualOptimPlus, 3, objective="forget").state_dict())


def test_a_sparse_gradient_leaves_every_parameter_as_it_was() -> None:
    dense, embedding = Parameter(torch.ones(2)), torch.nn.Embedding(3, 2, sparse=True)
    opt = DualOptimPlus([dense, embedding.weight], lr=0.1)
    dense.grad = torch.ones(2)
    embedding(torch.tensor([0])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        opt.step(objective="forget")
    assert torch.equal(dense, torch.ones(2))
    assert not opt.state


def test_groups_do_not_share_their_lr_scales() -> None:
    scales = {"forget": 1.5}
    params = [{"params": [Parameter(torch.ones(1))]}, {"params": [Parameter(torch.ones(1))], "lr_scales": scales}]
    opt = DualOptimPlus(params, lr_scales=scales)
    opt.param_groups[0]["lr_scales"]["forget"] = 3.0
    assert scales == {"forget": 1.5}
    assert opt.param_groups[1]["lr_scales"] == {"forget": 1.5, "retain": 1.0}


def test_a_bf16_parameter_is_rounded_once_a_step() -> None:
    # Decay and update are each half a unit in the last place of 1, which alone would round away.
    param = Parameter(torch.ones(1, dtype=torch.bfloat16))
    opt = DualOptimPlus([param], lr=2**-9, weight_decay=1.0, eps=0.0)
    param.grad = torch.ones_like(param)
    opt.step(objective="forget")
    assert param.item() == 1 - 2**-8
