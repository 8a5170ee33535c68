"""State dicts: through torch's own machinery, all or nothing, and what was stepped with also loads."""

from __future__ import annotations

import copy
import re
import warnings
from collections import UserList
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from dualoptim import DualOptim, DualOptimPlus
from dualoptim.optim import estimate_state_memory, state

from .test_optim import assert_same, gradients, randn, run

EIGHT = {"base_bits": 8, "delta_bits": 8, "min_8bit_size": 0}


def stepped(*shapes: tuple[int, ...], **settings: Any) -> tuple[DualOptimPlus, list[Parameter]]:
    params = [Parameter(randn(*shape, seed=i)) for i, shape in enumerate(shapes)]
    opt = DualOptimPlus(params, **settings)
    for step, objective in enumerate(("forget", "retain", "retain")):
        for i, param in enumerate(params):
            param.grad = randn(*param.shape, seed=10 * step + i)
        opt.step(objective=objective)
    return opt, params


# Hooks


def test_pre_hooks_see_the_whole_state_dict_and_what_they_return_is_loaded() -> None:
    opt, (a, b) = stepped((4,), (4,))
    again = DualOptimPlus([b, a])
    again.register_load_state_dict_pre_hook(
        lambda opt, saved: {**saved, "state": {1 - i: own for i, own in saved["state"].items()}}
    )
    again.load_state_dict(opt.state_dict())
    for param in (a, b):
        assert_same(dict(again.state[param]), dict(opt.state[param]))


def test_what_a_hook_returns_is_checked() -> None:
    opt, _ = stepped((4,), (5,))
    opt.register_load_state_dict_pre_hook(
        lambda opt, saved: {**saved, "state": {1 - i: own for i, own in saved["state"].items()}}
    )
    with pytest.raises(ValueError, match=r"of parameter 0 have shape \(5,\), and the parameter \(4,\)"):
        opt.load_state_dict(opt.state_dict())


def test_post_hooks_see_what_was_loaded() -> None:
    opt, _ = stepped((4,))
    again, seen = DualOptimPlus([Parameter(torch.ones(4))]), []
    again.register_load_state_dict_post_hook(lambda opt: seen.append(copy.deepcopy(opt.state_dict())))
    again.load_state_dict(opt.state_dict())
    assert_same(seen[0]["state"], opt.state_dict()["state"])


def test_what_others_keep_beside_the_moments_is_kept() -> None:
    opt, (param,) = stepped((4,))
    opt.state[param]["average"] = torch.ones(4)
    again = DualOptimPlus([Parameter(torch.ones(4))])
    again.load_state_dict(opt.state_dict())
    assert torch.equal(again.state_dict()["state"][0]["average"], torch.ones(4))


# All or nothing


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda saved: saved["state"][1].pop(key)


def put(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda saved: saved["state"][1].update({key: value})


def group(saved: dict[str, Any]) -> dict[str, Any]:
    return saved["param_groups"][0]


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "base of another shape": (
        put("codes/base_exp_avg", torch.zeros(7, 3)),
        "'codes/base_exp_avg' of parameter 1 have shape (7, 3)",
    ),
    "delta of another shape": (
        put("codes/delta_exp_avg_sq/retain", torch.zeros(2)),
        "'codes/delta_exp_avg_sq/retain' of parameter 1 have shape (2,)",
    ),
    "turned": (put("codes/base_exp_avg_sq", torch.zeros(300, 7)), "have shape (300, 7), and the parameter (7, 300)"),
    "no base": (without("codes/base_exp_avg"), "no 'codes/base_exp_avg' for parameter 1"),
    "no delta": (without("codes/delta_exp_avg/forget"), "no 'codes/delta_exp_avg/forget' for parameter 1"),
    "no count": (without("step"), "no 'step' for parameter 1"),
    "no scales": (without("scales/base_exp_avg"), "no 'scales/base_exp_avg' for parameter 1"),
    "other scales": (
        put("scales/base_exp_avg", torch.zeros(9)),
        "'scales/base_exp_avg' of parameter 1 have shape (9,) in place of (7, 2)",
    ),
    "an objective more": (put("delta_step/style", torch.tensor(1)), "'style', which this optimizer does not have"),
    "no rate": (lambda saved: saved["param_groups"][0].pop("lr"), "another optimizer's: its groups have no 'lr'"),
    "a rate that is none": (
        lambda saved: saved["param_groups"][0].update(lr=float("nan")),
        "lr must be at least -inf and < inf, is nan",
    ),
    "a group more": (lambda saved: saved["param_groups"].append({"params": []}), "make the same groups"),
    "no count of an objective": (without("delta_step/retain"), "no 'delta_step/retain' for parameter 1"),
    "a count that is none": (put("step", torch.ones(2)), "no count as 'step' for parameter 1"),
    "no tensor": (put("scales/base_exp_avg", [1.0]), "'scales/base_exp_avg' of parameter 1 is no tensor with values"),
    "sparse": (put("codes/base_exp_avg", torch.ones(7, 300).to_sparse()), "parameter 1 is no tensor with values"),
    "whole numbers": (
        lambda saved: saved["state"][0].update(base_exp_avg=torch.ones(4, dtype=torch.int32)),
        "'base_exp_avg' of parameter 0 has precision torch.int32",
    ),
    "of other bits": (
        lambda saved: saved["param_groups"][0].update(base_bits=32),
        "'base_exp_avg' of parameter 1 is not in the 32 bits that its group says",
    ),
    "nested": (put("delta_step", {"forget": torch.tensor(1)}), "saved by an earlier version"),
    "no states": (lambda saved: saved.pop("state"), "must hold a mapping 'state' and a list 'param_groups'"),
    "states that are a text": (lambda saved: saved.update(state=""), "must hold a mapping 'state'"),
    "groups that are a number": (
        lambda saved: saved.update(param_groups=[3]),
        "must be a mapping with a list 'params'",
    ),
    "no parameters": (lambda saved: saved["param_groups"][0].pop("params"), "must be a mapping with a list 'params'"),
    "a parameter twice": (lambda saved: saved["param_groups"][0].update(params=[0, 0]), "different numbers or names"),
    "a state that is a tensor": (
        lambda saved: saved["state"].update({1: torch.ones(3)}),
        "a mapping for each parameter",
    ),
    "a key that is no name": (lambda saved: saved["param_groups"][0].update({0: 1}), "'param_groups' must be names"),
    "no bits": (lambda saved: saved["param_groups"][0].pop("base_bits"), "its groups have no 'base_bits'"),
    "bits that are a tensor": (lambda saved: group(saved).update(base_bits=torch.ones(2)), "base_bits must be 32 or 8"),
    "a size that is a text": (lambda saved: group(saved).update(min_8bit_size="a"), "min_8bit_size must be a number"),
    "a bound of several numbers": (lambda saved: group(saved).update(max_update=torch.ones(2)), "max_update must be"),
    "a number without end": (lambda saved: group(saved).update(eps=10**400), "eps must be a number"),
    "skipped steps of no objective": (lambda saved: group(saved).update(num_skipped=[1]), "'num_skipped' must be"),
    "names of fewer parameters": (lambda saved: group(saved).update(param_names=["a"]), "as many names as"),
    "codes of nothing": (
        put("codes", torch.ones(3)),
        "'codes' for parameter 1, which this optimizer keeps nothing under",
    ),
    "a moment of no objective": (put("delta_exp_avg", "x"), "keeps nothing under"),
    "a count below zero": (put("step", torch.tensor(-1)), "no count as 'step' for parameter 1"),
    "a count with a part": (put("step", 1.5), "no count as 'step' for parameter 1"),
    "squares below zero": (
        lambda saved: saved["state"][0].update(base_exp_avg_sq=-torch.ones(4)),
        "'base_exp_avg_sq' of parameter 0 holds numbers below zero",
    ),
    "a moment that is not finite": (
        lambda saved: saved["state"][0].update(base_exp_avg=torch.full((4,), float("nan"))),
        "'base_exp_avg' of parameter 0 holds numbers that are not finite",
    ),
}


@pytest.mark.parametrize(("broken", "said"), BROKEN.values(), ids=BROKEN)
def test_a_refused_state_dict_leaves_all_as_it_was(broken: Callable[[dict[str, Any]], object], said: str) -> None:
    opt, params = stepped((4,), (7, 300), **EIGHT)
    saved = copy.deepcopy(opt.state_dict())
    broken(saved)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=re.escape(said)):
        opt.load_state_dict(saved)
    assert_same(opt.state_dict(), before)
    assert [opt.state[param]["step"] for param in params] == [3, 3]


def test_a_parameter_is_named_by_its_name() -> None:
    model = torch.nn.Linear(3, 2)
    opt = DualOptimPlus(model.named_parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    opt.step(objective="forget")
    saved = opt.state_dict()
    saved["state"][1]["base_exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match="of parameter 'bias' have shape"):
        opt.load_state_dict(saved)


# What was stepped with also loads

NUMBERS: dict[str, dict[str, Any]] = {
    "NumPy's": {
        "lr": np.float32(0.1),
        "betas": np.array([0.9, 0.95]),
        "eps": np.float64(1e-8),
        "weight_decay": np.float64(0.01),
        "min_8bit_size": np.int32(100),
        "max_update": np.float32(1),
    },
    "lists": {"betas": [0.9, 0.95], "base_betas": UserList([0.9, 0.95])},
    "fractions": {"lr": Fraction(1, 10)},
    "a tensor": {"lr": torch.tensor(0.1)},
}


@pytest.mark.parametrize("settings", NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_other_kinds_are_numbers(settings: dict[str, Any]) -> None:
    opt, (param,) = stepped((4,), **settings)
    _, (other,) = stepped((4,), **({"lr": 0.1} if "lr" in settings else {}))
    torch.testing.assert_close(param, other, rtol=0, atol=1e-8)
    group = opt.param_groups[0]
    assert type(group["betas"]) is tuple
    assert all(type(beta) is float for beta in group["betas"])
    again = DualOptimPlus([Parameter(torch.ones(4))])
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[0]["lr"] == pytest.approx(float(group["lr"]))


@pytest.mark.parametrize("factor", [np.float32(0.5), np.float64(0.5), 0, np.array(0.5)], ids=repr)
def test_a_rate_that_a_schedule_made_loads(factor: Any) -> None:
    opt, (param,) = stepped((4,))
    schedule = LambdaLR(opt, lambda epoch: factor)
    param.grad = torch.ones(4)
    opt.step(objective="forget")
    schedule.step()
    again = DualOptimPlus([Parameter(torch.ones(4))])
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[0]["lr"] == pytest.approx(1e-5 * float(factor))


def test_a_rate_below_zero_loads_with_a_warning() -> None:
    opt, (param,) = stepped((4,))
    opt.param_groups[0]["lr"] = -1e-20
    param.grad = torch.ones(4)
    opt.step(objective="forget")
    again = DualOptimPlus([Parameter(torch.ones(4))])
    with pytest.warns(UserWarning, match="learning rate is below zero: -1e-20") as seen:
        again.load_state_dict(opt.state_dict())
    assert seen[0].filename == __file__
    with pytest.raises(ValueError, match="lr must be at least 0"):
        DualOptimPlus([param], lr=-1e-20)


@pytest.mark.parametrize("value", [True, "0.1", None, [0.1]], ids=repr)
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="lr must be a number"):
        DualOptimPlus([Parameter(torch.ones(1))], lr=value)


def test_the_count_of_skipped_steps_comes_back() -> None:
    opt, (param,) = stepped((4,))
    for objective in ("retain", "retain", "forget"):
        param.grad = torch.full((4,), float("nan"))
        opt.step(objective=objective)
    again = DualOptimPlus([Parameter(torch.ones(4))])
    again.load_state_dict(opt.state_dict())
    assert again.num_skipped == {"forget": 1, "retain": 2}
    param.grad = torch.full((4,), float("nan"))
    opt.step(objective="retain")
    opt.load_state_dict(again.state_dict())
    assert opt.num_skipped == {"forget": 1, "retain": 2}


def test_an_empty_entry_is_a_parameter_that_never_stepped() -> None:
    opt, (_, unused) = stepped((4,), (5,))
    opt.state[unused].clear()
    opt.load_state_dict(opt.state_dict())
    assert not opt.state.get(unused)


def test_a_post_hook_may_ask_for_the_state_dict() -> None:
    opt, (param,) = stepped((4,))
    param.grad = torch.full((4,), float("nan"))
    opt.step(objective="forget")
    again, seen = DualOptimPlus([Parameter(torch.ones(4))]), []
    again.register_load_state_dict_post_hook(lambda opt: seen.append((opt.num_skipped, opt.state_dict())) and None)
    again.load_state_dict(opt.state_dict())
    assert again.num_skipped == seen[0][0] == {"forget": 1, "retain": 0}


def test_an_objective_that_the_state_dict_does_not_know_keeps_its_scale() -> None:
    opt, _ = stepped((4,), lr_scales={"forget": 2.0})
    more = DualOptimPlus([Parameter(torch.ones(4))], objectives=("forget", "retain", "style"), lr_scales={"style": 0.1})
    more.load_state_dict(opt.state_dict())
    assert more.param_groups[0]["lr_scales"] == {"forget": 2.0, "retain": 1.0, "style": 0.1}
    opt.add_objective("style")
    assert opt.param_groups[0]["lr_scales"] == {"forget": 2.0, "retain": 1.0, "style": 1.0}


def test_a_state_dict_keeps_the_factors_that_it_was_saved_with() -> None:
    opt, (param,) = stepped((4,), lr_scales={"forget": 2.0})
    saved = opt.state_dict()
    held = opt.param_groups[0]["lr_scales"]
    held["forget"] = 5.0
    opt.param_groups[0]["base_weights"]["retain"] = 0.1
    opt.param_groups[0]["num_skipped"]["retain"] = 7
    opt.add_objective("style")
    assert opt.param_groups[0]["lr_scales"] == {"forget": 5.0, "retain": 1.0, "style": 1.0}
    assert held == {"forget": 5.0, "retain": 1.0}
    assert group(saved)["lr_scales"] == {"forget": 2.0, "retain": 1.0}
    assert group(saved)["base_weights"] == {"forget": 1.0, "retain": 1.0}
    assert group(saved)["num_skipped"] == {"forget": 0, "retain": 0}
    DualOptimPlus([param]).load_state_dict(saved)


def test_what_is_no_parameters_state_is_left_alone() -> None:
    opt, _ = stepped((4,))
    saved = opt.state_dict()
    saved["state"]["iteration"] = 3
    opt.load_state_dict(saved)
    assert opt.state["iteration"] == 3


@pytest.mark.parametrize("kept_in_32", ["of fp64", "of a group whose bits were changed", "of few elements"])
def test_moments_in_32_bits_load_where_8_are_possible_with_a_warning(kept_in_32: str) -> None:
    saved_in = torch.float64 if kept_in_32 == "of fp64" else torch.float32
    param = Parameter(randn(7, 300).to(saved_in))
    opt = DualOptimPlus(
        [param], **{**EIGHT, **({"base_bits": 32, "delta_bits": 32} if "changed" in kept_in_32 else {})}
    )
    opt.param_groups[0]["min_8bit_size"] = 4096 if "few" in kept_in_32 else 0
    param.grad = randn(7, 300, seed=1).to(saved_in)
    opt.step(objective="forget")
    opt.param_groups[0].update(EIGHT)
    again = DualOptimPlus([other := Parameter(torch.ones(7, 300))], **EIGHT)
    with pytest.warns(UserWarning, match="6 were converted to this optimizer's base_bits and delta_bits"):
        again.load_state_dict(opt.state_dict())
    own, was = again.state[other], opt.state[param]["base_exp_avg"]
    read = state.dequantise(
        own["codes/base_exp_avg"], own["scales/base_exp_avg"], state.code_of("base_exp_avg", with_base=True)
    )
    assert (read - was).abs().max() <= 0.02 * was.abs().max()


def test_moments_in_8_bits_load_where_only_32_are_possible_with_a_warning() -> None:
    opt, _ = stepped((7, 300), **EIGHT)
    again = DualOptimPlus([other := Parameter(torch.ones(7, 300, dtype=torch.float64))], **EIGHT)
    with pytest.warns(UserWarning, match="6 were converted"):
        again.load_state_dict(opt.state_dict())
    assert again.state[other]["base_exp_avg"].dtype == torch.float64


def test_torch_distributed_refuses_another_precision() -> None:
    """What has one name would be cast: codes are not moments."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = torch.nn.Linear(64, 64, bias=False)
    eight = DualOptimPlus(model.parameters(), **EIGHT)
    full = DualOptimPlus(model.parameters())
    model.weight.grad = torch.ones(64, 64)
    eight.step(objective="forget")
    model.weight.grad = None
    saved = get_optimizer_state_dict(model, eight)
    template = get_optimizer_state_dict(model, full)
    assert not {key for key in saved["state"]["weight"] if "exp_avg" in key} & set(template["state"]["weight"])
    with pytest.warns(UserWarning, match="6 were converted"):
        set_optimizer_state_dict(model, full, saved)


@pytest.mark.parametrize("objectives", [("forget", "retain"), ("all",)])
@pytest.mark.parametrize("cls", [DualOptimPlus, DualOptim])
def test_what_torch_does_to_see_a_state_is_nobodys_step(cls: type[DualOptimPlus], objectives: tuple[str, ...]) -> None:
    """It steps on zeros at a learning rate of 0: no count, no choice and nothing of a hook's is used up."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    turns = [objectives[i % 3 % len(objectives)] for i in range(7)]

    def begun(order: list[str]) -> tuple[torch.nn.Module, DualOptimPlus]:
        model = torch.nn.Linear(4, 3)
        model.load_state_dict({"weight": randn(3, 4), "bias": randn(3)})
        opt = cls(model.parameters(), lr=0.1, objectives=objectives)
        opt.register_step_pre_hook(lambda opt, args, kwargs: setattr(opt, "objective", order.pop(0)))
        return model, opt

    def train(model: torch.nn.Module, opt: DualOptimPlus, steps: range) -> None:
        for step in steps:
            model(randn(4, 4, seed=step)).square().mean().backward()
            opt.step()
            opt.zero_grad()

    model, opt = begun(list(turns))
    train(model, opt, range(7))

    half, saving = begun(turns[:3])
    get_optimizer_state_dict(half, saving)
    train(half, saving, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(half, saving))
    resumed, loading = begun(turns[3:])
    resumed.load_state_dict(half.state_dict())
    loading.objective = objectives[-1]
    set_optimizer_state_dict(resumed, loading, saved)
    assert loading.objective == objectives[-1]
    train(resumed, loading, range(3, 7))
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("objectives", [("forget", "retain"), ("all",)])
def test_a_first_step_on_zeros_at_a_rate_of_0_is_a_step(objectives: tuple[str, ...]) -> None:
    """As a warm-up begins, with a loss that is at its minimum."""
    for step in (lambda opt: opt.step(), lambda opt: opt.step(None), lambda opt: opt.step(objective=objectives[0])):
        param = Parameter(torch.ones(3))
        opt = DualOptimPlus([param], lr=0.0, objectives=objectives)
        param.grad = torch.zeros(3)
        opt.objective = objectives[0]
        step(opt)
        assert opt.objective is None
        assert [int(opt.state[param][key]) for key in ("step", f"delta_step/{objectives[0]}")] == [1, 1]


def test_moments_that_32_bits_do_not_hold_are_refused() -> None:
    param = Parameter(torch.ones(3, dtype=torch.float64))
    opt = DualOptimPlus([param])
    param.grad = torch.full((3,), 1e21, dtype=torch.float64)
    opt.step(objective="forget")
    DualOptimPlus([Parameter(torch.ones(3, dtype=torch.float64))]).load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match="holds numbers that are not finite"):
        DualOptimPlus([Parameter(torch.ones(3))]).load_state_dict(opt.state_dict())


def test_more_objectives_are_named_also_before_the_first_step() -> None:
    opt = DualOptimPlus([Parameter(torch.ones(2))], objectives=("forget", "retain", "style"))
    with pytest.raises(ValueError, match="the state dict holds 'style', which this optimizer does not have"):
        DualOptimPlus([Parameter(torch.ones(2))]).load_state_dict(opt.state_dict())


def test_no_mapping_in_a_group_is_empty() -> None:
    for cls in (DualOptim, DualOptimPlus):
        group = cls([Parameter(torch.ones(1))]).state_dict()["param_groups"][0]
        assert all(value for value in group.values() if isinstance(value, dict))
        assert group["lr_scales"] == {"forget": 1.0, "retain": 1.0}


# Moving the state


@pytest.mark.parametrize("settings", [{}, EIGHT], ids=["32", "8"])
def test_one_loop_over_the_state_reaches_all_of_it(settings: dict[str, Any]) -> None:
    opt, (param,) = stepped((7, 300), **settings)
    moved = 0
    for own in opt.state.values():
        for key, value in own.items():
            assert isinstance(value, Tensor)
            own[key] = value.clone()
            moved += value.numel() * value.element_size()
    assert moved == estimate_state_memory([param], **settings)
    run(opt, param, gradients(param, 2))


CASTS: list[Callable[[Tensor], Any]] = [float, Tensor.double, Tensor.int, int, lambda count: count.reshape(())]


@pytest.mark.parametrize("change", CASTS, ids=["float", "double", "int32", "int", "reshaped"])
def test_counts_that_were_cast_count_on(change: Callable[[Tensor], Any]) -> None:
    opt, (param,) = stepped((4,))
    other, (twin,) = stepped((4,))
    for key in ("step", "delta_step/forget"):
        opt.state[param][key] = change(opt.state[param][key])
    for one, weight in ((opt, param), (other, twin)):
        weight.grad = torch.ones(4)
        one.step(objective="forget")
    assert torch.equal(param, twin)
    assert_same(dict(opt.state[param]), dict(other.state[twin]))


def test_loading_and_stepping_warn_of_nothing() -> None:
    opt, _ = stepped((7, 300), **EIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DualOptimPlus([Parameter(torch.ones(7, 300))], **EIGHT).load_state_dict(opt.state_dict())
