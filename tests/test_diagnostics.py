from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from dualoptim import DualOptim, DualOptimPlus, report
from dualoptim.optim import diagnostics

from .test_optim import randn


def stepped(cls: type[DualOptimPlus], grads: dict[str, torch.Tensor], **kwargs: Any) -> tuple[DualOptimPlus, Parameter]:
    param = Parameter(torch.zeros(next(iter(grads.values())).shape))
    opt = cls([param], objectives=tuple(grads), **kwargs)
    for _ in range(3):
        for name, grad in grads.items():
            param.grad = grad.clone()
            opt.step(objective=name)
    return opt, param


def test_without_a_base_the_measures_are_known() -> None:
    """Constant gradients: each delta's corrected moments are g and g², each update the gradient's sign."""
    a = randn(5000)
    b = a * torch.tensor([1.0, 1.0, 1.0, -1.0]).repeat(1250)  # three quarters agree: cosine 1/2
    opt, param = stepped(DualOptim, {"a": a, "b": b})
    read = diagnostics(opt, [("model.layers.3.mlp.weight", param)])
    assert set(read) == {"layers.3", "all"}
    assert read["layers.3"] == read["all"]
    assert read["all"]["cosine/a/b"] == pytest.approx(0.5, abs=1e-4)
    assert read["all"]["update/a"] == pytest.approx(1, abs=1e-3)
    assert read["all"]["cancelling/a"] == 0
    assert read["all"]["delta_norm/a"] == pytest.approx(float(a.norm()), rel=0.05)
    assert "base_norm" not in read["all"]


@pytest.mark.parametrize("bits", [32, 8])
def test_gradients_that_undo_each_other_empty_the_base(bits: int) -> None:
    a = randn(20000)
    agreeing, _ = stepped(DualOptimPlus, {"a": a, "b": a}, base_bits=bits, delta_bits=bits)
    opposed, _ = stepped(DualOptimPlus, {"a": a, "b": -a}, base_bits=bits, delta_bits=bits)
    together, apart = diagnostics(agreeing)["all"], diagnostics(opposed)["all"]
    assert together["cosine/a/b"] > 0.99
    assert apart["cosine/a/b"] < -0.5
    assert apart["base_norm"] < 0.2 * together["base_norm"]


def test_retain_gradients_far_smaller_than_forget_gradients_make_second_moments_cancel() -> None:
    small, _ = stepped(DualOptimPlus, {"forget": randn(3000), "retain": 0.01 * randn(3000, seed=1)})
    read = diagnostics(small)["all"]
    assert read["cancelling/retain"] > 0.5
    assert read["largest/retain"] > 1
    assert read["update/retain"] <= 1


@pytest.mark.parametrize("bits", [{"base_bits": 8}, {"delta_bits": 8}, {}], ids=str)
def test_in_8_bits_the_largest_update_has_the_rules_floor(bits: dict[str, int]) -> None:
    opt, param = stepped(
        DualOptimPlus, {"forget": randn(8, 256), "retain": 0.03 * randn(8, 256, seed=1)}, min_8bit_size=0, **bits
    )
    own = opt.state[param]

    def put(key: str, value: float, largest_code: int) -> None:
        if f"codes/{key}" in own:
            own[f"codes/{key}"].fill_(math.copysign(largest_code, value) if value else 0)
            own[f"scales/{key}"].fill_(abs(value))
        else:
            own[key].fill_(value)

    # v_B = 1 and v_o = −(1 − 10⁻⁴), so that their sum is a ten-thousandth of v_B; m_B = 0 and m_o = 1.
    put("base_exp_avg_sq", 1 - 0.95**6, 255)
    put("delta_exp_avg_sq/retain", -(1 - 1e-4) * (1 - 0.95**3), 127)
    put("base_exp_avg", 0.0, 127)
    put("delta_exp_avg/retain", 1 - 0.9**3, 127)
    assert diagnostics(opt)["all"]["largest/retain"] == pytest.approx(1e-3**-0.5 if bits else 100, rel=0.01)


def test_objectives_that_have_not_stepped_are_left_out_and_an_unused_optimizer_says_nothing() -> None:
    param = Parameter(torch.zeros(10))
    opt = DualOptimPlus([param])
    assert diagnostics(opt) == {}
    param.grad = torch.ones(10)
    opt.step(objective="forget")
    assert not any("retain" in measure for measure in diagnostics(opt)["all"])


def test_states_without_a_step_and_objectives_that_were_added_are_left_out() -> None:
    stepping, resting = Parameter(torch.zeros(10)), Parameter(torch.zeros(10))
    opt = DualOptimPlus([stepping, resting])
    for param in (stepping, resting):
        param.grad = torch.zeros(10)
    opt.step()  # of zeros and no objective, by which torch.distributed.checkpoint makes the states
    assert diagnostics(opt) == {}
    stepping.grad, resting.grad = torch.ones(10), None
    opt.step(objective="forget")
    alone = DualOptimPlus([Parameter(torch.zeros(10))])
    alone.param_groups[0]["params"][0].grad = torch.ones(10)
    alone.step(objective="forget")
    opt.add_objective("third")
    assert diagnostics(opt) == diagnostics(alone)


@pytest.mark.parametrize("private", ["forget", "retain", None])
def test_objectives_are_compared_where_both_have_stepped(private: str | None) -> None:
    """A trunk on which they agree, and a head of one alone, or of each its own: also in its own layer."""
    trunk, *heads = (Parameter(torch.zeros(10)) for _ in range(3))
    opt = DualOptim([("head.a", heads[0]), ("head.b", heads[1]), ("trunk.w", trunk)])
    for name, head in zip(("retain", "forget"), heads, strict=True):
        trunk.grad = torch.ones(10)
        head.grad = torch.full((10,), -1.0) if private in (name, None) else None
        opt.step(objective=name)
        opt.zero_grad()
    read = diagnostics(opt, [("head.a", heads[0]), ("head.b", heads[1]), ("trunk.w", trunk)])
    assert read["all"]["cosine/forget/retain"] == read["trunk"]["cosine/forget/retain"] == pytest.approx(1)
    assert "cosine/forget/retain" not in read["head"]


def test_the_heat_map_shows_every_layer() -> None:
    layers = {f"layers.{i}": {"cosine/forget/retain": math.cos(i), "cancelling/forget": 0.1 * i} for i in range(4)}
    entry = {"diagnostics": {"step": 5, "layers": {**layers, "all": layers["layers.0"]}}}
    drawn = report.heat_map(entry)
    assert all(f">{i}</text>" in drawn for i in range(4))
    strengths = [float(found) for found in re.findall(r"fill-opacity: ([\d.]+)", drawn)]
    for value in (math.cos(1), math.cos(2), 0.1, 0.2, 0.3):
        assert min(abs(found - abs(value) ** 0.6) for found in strengths) < 0.02
    assert "forget · retain" in drawn
    assert report.heat_map({"diagnostics": None}) == ""


def test_objectives_may_be_called_as_what_is_measured() -> None:
    measured = []
    for names in (("a", "b"), ("count", "largest"), ("delta", "product")):
        weight = torch.nn.Parameter(torch.ones(4))
        opt = DualOptimPlus([weight], objectives=names)
        for name, grad in zip(names, ([1.0, 2.0, -1.0, 0.5], [1.0, -2.0, 3.0, 0.1]), strict=True):
            weight.grad = torch.tensor(grad)
            opt.step(objective=name)
        measured.append(list(diagnostics(opt)["all"].values()))
    assert measured[0] == measured[1] == measured[2]


def test_layers_of_two_parts_of_a_model_stay_apart() -> None:
    names = ["enc.layers.0.weight", "dec.layers.0.weight", "enc.layers.1.weight", "model.embed.weight"]
    weights = {name: Parameter(torch.ones(2)) for name in names}
    opt = DualOptimPlus(weights.values())
    for weight in weights.values():
        weight.grad = torch.ones(2)
    opt.step(objective="forget")
    found = diagnostics(opt, weights.items())
    assert list(found) == ["enc.layers.0", "dec.layers.0", "layers.1", "embed", "all"]
