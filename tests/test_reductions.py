"""What the optimizers reduce to: AdamW, an AdamW for each objective, and DualOptim with the drift of the base."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from dualoptim import DualOptim, DualOptimPlus
from dualoptim.optim.backends import compiled

from .test_optim import assert_same, gradients, randn

BACKENDS = ["plain", pytest.param("compiled", marks=pytest.mark.skipif(compiled.compiler() is None, reason="no C++"))]
TURNS = ("a", "b", "b", "c", "a", "b")
# An update is a quotient of two averages, which torch and the kernels round in another order.
NEAR = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2.0**-7}


class Odd(nn.Module):
    """What models have: tied weights, a scalar, an empty parameter, a layer without gradients, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Linear(3, 3)
        self.convolution = nn.Conv2d(1, 4, 3)

    def forward(self, seed: int) -> Tensor:
        images = randn(2, 1, 5, 5, seed=seed).to(self.scale.dtype)
        hidden = self.embed(torch.arange(11).roll(seed)) * self.scale
        return self.head(hidden).square().mean() + self.convolution(images).square().mean() + self.empty.sum()


def assert_equal_weights(
    ours: Callable[[Any], DualOptimPlus],
    theirs: Callable[[Any], Mapping[str, Optimizer]],
    model: Callable[[], nn.Module],
    *,
    dtype: torch.dtype,
    layout: torch.memory_format = torch.contiguous_format,
    steps: int = 12,
    turns: tuple[str, ...] = TURNS,
) -> None:
    """Train two models from the same start and compare them after every step.

    Args:
        ours: makes an optimizer of some parameters.
        theirs: makes one for each objective.
        layout: of the parameters that have four dimensions.
    """
    one, other = (model().to(dtype).to(memory_format=layout) for _ in range(2))
    opt, opts = ours(one.parameters()), theirs(other.parameters())
    for step in range(steps):
        objective = turns[step % len(turns)]
        for trained in (one, other):
            trained.zero_grad()
            trained(step).backward()
        opt.step(objective=objective)
        opts[objective].step()
        for mine, yours in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, yours, rtol=0, atol=NEAR[dtype])
        if dtype == torch.bfloat16:  # roundings add up in different ways
            one.load_state_dict(other.state_dict())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", NEAR)
def test_without_a_base_one_objective_is_adamw_and_several_are_several(
    dtype: torch.dtype, weight_decay: float, backend: str, layout: torch.memory_format
) -> None:
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": weight_decay}
    own: dict[str, Any] = {**settings, "backend": backend, "max_update": None, "stochastic_rounding": False}
    for names in (("a",), ("a", "b", "c")):
        turns = tuple(name if name in names else "a" for name in TURNS)
        for made in (
            lambda params, names=names: DualOptim(params, objectives=names, **own),
            lambda params, names=names: DualOptimPlus(params, objectives=names, base_betas=None, **own),
        ):
            assert_equal_weights(
                made,
                lambda params, names=names: {
                    name: torch.optim.AdamW(some, **settings)
                    for name, some in zip(names, itertools.tee(params, len(names)), strict=True)
                },
                Odd,
                dtype=dtype,
                layout=layout,
                turns=turns,
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_dualoptim_plus_is_dualoptim_and_the_drift_of_the_base(backend: str) -> None:
    """m̂ = m̂_DualOptim + (B̂ − EMA_o[B̂]) and the same for v, where B̂ is the base before the step, bias-corrected."""
    start = randn(7, 5).double()
    grads, betas, base_betas = gradients(start, 18), (0.8, 0.95), (0.9, 0.99)
    plus, dual = (nn.Parameter(start.clone()) for _ in range(2))
    with_base = DualOptimPlus([plus], betas=betas, base_betas=base_betas, objectives=tuple("abc"), backend=backend)
    without = DualOptim([dual], betas=betas, objectives=tuple("abc"), backend=backend)
    seen: dict[str, dict[str, Tensor]] = {
        name: {key: torch.zeros_like(start) for key in ("exp_avg", "exp_avg_sq")} for name in "abc"
    }
    for t, (grad, name) in enumerate(zip(grads, itertools.cycle(TURNS))):
        own = with_base.state[plus]
        base = {
            key: own[f"base_{key}"] / (1 - beta**t) if t else torch.zeros_like(start)
            for key, beta in zip(("exp_avg", "exp_avg_sq"), base_betas, strict=True)
        }
        for param, opt in ((plus, with_base), (dual, without)):
            param.grad = grad.clone()
            opt.step(objective=name)
        count = int(with_base.state[plus][f"delta_step/{name}"])
        for key, beta in zip(("exp_avg", "exp_avg_sq"), betas, strict=True):
            average = seen[name][key] = beta * seen[name][key] + (1 - beta) * base[key]
            corrected = 1 - beta**count
            ours = with_base.state[plus][f"delta_{key}/{name}"] / corrected + base[key]
            theirs = without.state[dual][f"delta_{key}/{name}"] / corrected + (base[key] - average / corrected)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


# What torch's own suite asks of an optimizer


def adamw(params: Any, **settings: Any) -> Optimizer:
    return torch.optim.AdamW(params, **{"lr": 0.01, "betas": (0.9, 0.95), **settings})


def single(params: Any, **settings: Any) -> DualOptim:
    return DualOptim(params, **{"lr": 0.01, "betas": (0.9, 0.95), "objectives": ("only",), **settings})


def trained(
    make: Callable[..., Optimizer],
    around: Callable[[Optimizer], Any] = lambda opt: None,
    steps: int = 6,
    **settings: Any,
) -> list[Tensor]:
    """The weights of a small model after some steps; `around` may put something around the optimizer that steps too."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    opt = make(model.parameters(), **settings)
    schedule = around(opt)
    for step in range(steps):
        opt.zero_grad()
        loss = model(randn(16, 4, seed=step)).square().mean()
        loss.backward()
        opt.step()
        if schedule is not None:
            schedule.step(*((float(loss.detach()),) if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else ()))
    return [param.detach().clone() for param in model.parameters()]


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.9**step),
    "step": lambda opt: lr_scheduler.StepLR(opt, 2),
    "linear": lambda opt: lr_scheduler.LinearLR(opt, total_iters=4),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=4),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=10),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(opt, 0.001, 0.1, 3, cycle_momentum=False),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
    "sequence": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.5)], milestones=[2]
    ),
}


@pytest.mark.parametrize("around", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_schedules_do_as_with_adamw(around: Callable[[Optimizer], Any], lr: Any) -> None:
    settings = {"lr": copy.copy(lr) if isinstance(lr, float) else lr.clone()}
    ours = trained(single, around, **settings)
    settings = {"lr": 0.01}  # a tensor is what AdamW takes for fused and capturable steps alone
    for mine, theirs in zip(ours, trained(adamw, around, **settings), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)


def test_hooks_are_called_in_their_order() -> None:
    param = nn.Parameter(torch.ones(2))
    called: list[str] = []
    opt = single([param])
    opt.register_step_pre_hook(lambda opt, args, kwargs: called.append("before"))
    opt.register_step_post_hook(lambda opt, args, kwargs: called.append("after"))
    opt.register_state_dict_pre_hook(lambda opt: called.append("saving"))
    opt.register_state_dict_post_hook(lambda opt, saved: {**saved, "more": 1})
    opt.register_load_state_dict_pre_hook(lambda opt, saved: called.append(f"loading {saved['more']}"))
    opt.register_load_state_dict_post_hook(lambda opt: called.append(f"loaded {int(opt.state[param]['step'])}"))
    param.grad = torch.ones(2)
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert called == ["before", "after", "saving", "loading 1", "loaded 1"]


def test_a_step_hook_may_choose_the_objective() -> None:
    param = nn.Parameter(torch.ones(2))
    opt = DualOptimPlus([param])
    opt.register_step_pre_hook(lambda opt, args, kwargs: setattr(opt, "objective", "retain"))
    param.grad = torch.ones(2)
    opt.step()
    assert int(opt.state[param]["delta_step/retain"]) == 1


def test_parameters_may_have_names() -> None:
    model = nn.Linear(3, 2)
    opt = single(model.named_parameters())
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
    saved = opt.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    single(nn.Linear(3, 2).named_parameters()).load_state_dict(saved)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["deep", "pickle"])
def test_a_copy_saves_what_the_original_does(copied: Callable[[Optimizer], Optimizer]) -> None:
    param = nn.Parameter(torch.ones(2))
    opt = single([param])
    param.grad = torch.ones(2)
    opt.step()
    assert_same(copied(opt).state_dict(), opt.state_dict())


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a tensor alone": (torch.ones(2), TypeError, "params argument"),
    "no parameters": ([], ValueError, "empty parameter list"),
    "no leaf": ([nn.Parameter(torch.ones(2)) * 2], ValueError, "can't optimize a non-leaf"),
    "no tensor": (["weight"], TypeError, "optimizer can only optimize Tensors"),
}


@pytest.mark.parametrize(("params", "error", "said"), WRONG.values(), ids=WRONG)
def test_what_torch_refuses_is_refused(params: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        single(params)


def test_a_parameter_stands_in_one_group() -> None:
    param = nn.Parameter(torch.ones(2))
    opt = single([param])
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [param]})
    assert len(opt.param_groups) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_captures_a_step() -> None:
    param = nn.Parameter(torch.ones(300, device="cuda"))
    plain, opt = nn.Parameter(param.detach().clone()), single([param])
    other = single([plain])
    param.grad, plain.grad = torch.ones_like(param), torch.ones_like(param)
    for _ in range(3):
        opt.step()
        other.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for _ in range(4):
        graph.replay()
        other.step()
    torch.testing.assert_close(param, plain)


def test_what_is_the_same_for_all_groups_may_stand_in_one_as_wrappers_write_it_there() -> None:
    own = {"objectives": ("a", "b"), "seed": 3, "backend": "plain", "process_group": None}
    param = nn.Parameter(torch.ones(2))
    opt = DualOptimPlus([{"params": [param], **own, "lr": 0.1}], **own)
    assert not own.keys() & opt.param_groups[0].keys()
    for key, other in (("objectives", ["a"]), ("seed", 4), ("backend", None)):
        with pytest.raises(ValueError, match=f"sets '{key}', which this optimizer does not know"):
            opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], key: other})


@pytest.mark.parametrize("name", ["max_update", "eps"])
def test_a_setting_that_is_a_tensor_is_read_anew_in_every_step(name: str) -> None:
    moved = []
    for late in (False, True):
        setting = torch.tensor(1.0)
        param = nn.Parameter(torch.zeros(1))
        opt = DualOptimPlus([param], lr=1.0, weight_decay=0.0, **{name: setting})
        for step in range(2):
            param.grad = torch.ones(1)
            before = float(param.detach())
            if late and step:
                setting.mul_(100.0 if name == "eps" else 0.01)
            opt.step(objective="forget")
        moved.append(abs(float(param.detach()) - before))
    assert moved[1] < moved[0] / 10


def test_a_strangers_entry_in_the_state_before_the_first_step_is_let_be() -> None:
    param = nn.Parameter(torch.ones(2))
    opt = DualOptimPlus([param])
    opt.state[param]["anchor"] = torch.ones(2)
    param.grad = torch.ones(2)
    opt.step(objective="forget")
    assert int(opt.state[param]["step"]) == 1
