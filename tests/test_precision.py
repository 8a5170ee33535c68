"""8 bits, bf16, backends: how moments are kept and how a step is executed."""

from __future__ import annotations

import io
import itertools
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import Parameter

from dualoptim import DualOptim, DualOptimPlus
from dualoptim.optim import backends, estimate_state_memory, parameter_groups, state
from dualoptim.optim.backends import compiled, plain, source

from .reference.naive import NaiveDualOptim
from .test_optim import SCHEDULE, assert_same, gradients, randn, run

REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "optimizer"
CODES = [state.SIGNED, state.UNSIGNED]
PRECISIONS = list(itertools.product((32, 8), (32, 8)))
CXX = pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler")


def quantised(values: Tensor, code: state.Code) -> tuple[Tensor, Tensor]:
    """The codes and scales of a single row."""
    codes = torch.empty(1, len(values), dtype=code.dtype)
    scales = torch.empty(state.num_blocks(codes))
    state.quantise_(codes, scales, values[None], code)
    return codes[0], scales[0]


# 8-bit codes


@pytest.mark.parametrize("code", CODES)
def test_every_code_decodes_and_encodes_to_itself(code: state.Code) -> None:
    codes = torch.arange(-127 if code.signed else 0, code.levels + 1, dtype=torch.float32)
    values = state.decode(codes, torch.tensor(3.7e-9), code)
    assert torch.equal(state.encode(values, torch.tensor(3.7e-9), code), codes)
    assert values[-1] == torch.tensor(3.7e-9)  # the scale itself has a code
    assert values.diff().min() > 0


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_codes_are_within_their_step(code: state.Code, size: int) -> None:
    values = randn(size).exp() * (randn(size, seed=1).sign() if code.signed else 1)
    codes, scales = quantised(values, code)
    back = state.dequantise(codes[None], scales[None], code)[0]
    relative = (values / scales.repeat_interleave(256)[:size]).abs()
    # Half a code: d(x⁴) = 4 x³ dx, with dx = 1 / 2L, and what the curvature adds.
    bound = 4 * (relative**0.25 + 0.5 / code.levels) ** 3 * 0.5 / code.levels
    assert ((back - values).abs() / scales.repeat_interleave(256)[:size] <= 1.01 * bound).all()


@pytest.mark.parametrize("exponent", [-80, -20, 0, 60])
def test_codes_do_not_depend_on_the_size_of_the_values(exponent: int) -> None:
    values = randn(512)
    codes, scales = quantised(values, state.SIGNED)
    shifted, shifted_scales = quantised(values * 2.0**exponent, state.SIGNED)
    assert torch.equal(codes, shifted)
    assert torch.equal(scales * 2.0**exponent, shifted_scales)


def test_zeros_stay_zeros_and_the_smallest_square_does_not_become_one() -> None:
    codes, scales = quantised(torch.zeros(300), state.SIGNED)
    assert not codes.any()
    assert not scales.any()
    values = torch.zeros(256)
    values[0], values[1] = 1.0, 1e-30
    codes, _ = quantised(values, state.UNSIGNED)
    assert codes[:3].tolist() == [255, 1, 0]


# Nearness to fp32


def replayed(name: str, **kwargs: Any) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Our parameters and the recorded ones after every step."""
    with safe_open(REFERENCE / f"{name}.safetensors", "pt") as file:
        meta = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    betas, base = (
        tuple(json.loads(meta[key])) if meta.get(key, "null") != "null" else None for key in ("betas", "base_betas")
    )
    schedule, lr = json.loads(meta["schedule"]), float(meta["lr"])
    params = [Parameter(tensors[f"p0.{i}"].clone()) for i in range(sum(key.startswith("p0.") for key in tensors))]
    cls = DualOptim if meta["kind"].startswith("dual") else DualOptimPlus
    arguments = {} if cls is DualOptim else {"base_betas": base, "base_bits": kwargs.pop("base_bits", 32)}
    opt = cls(params, lr=lr, betas=betas, eps=float(meta["eps"]), weight_decay=float(meta["weight_decay"]),
              lr_scales={"forget": float(meta["forget_lr_ratio"])}, max_update=None, **arguments, **kwargs)  # fmt: skip
    ours, theirs = [], []
    for t, objective in enumerate(schedule):
        for i, param in enumerate(params):
            param.grad = tensors[f"g.{t}.{i}"].clone()
        opt.step(objective=objective)
        ours.append([param.detach().clone() for param in params])
        theirs.append([tensors[f"p.{t}.{i}"] for i in range(len(params))])
    return ours, theirs


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the 8-bit reference trajectories are not part of the repository")
@pytest.mark.parametrize("backend", ["plain", pytest.param("compiled", marks=CXX)])
@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("plus8_both", {"base_bits": 8, "delta_bits": 8}),
        ("plus8_delta", {"delta_bits": 8}),
        ("plus8_base", {"base_bits": 8}),
        ("dual8", {"delta_bits": 8}),
    ],
)
def test_8_bits_are_as_near_to_fp32_as_the_published_8_bits(name: str, bits: dict[str, int], backend: str) -> None:
    twin, _ = replayed(name, backend=backend)
    ours, published = replayed(name, backend=backend, **bits)

    def errors(run: list[list[Tensor]]) -> tuple[float, float]:
        off = torch.cat([(a - b).abs().flatten() for a, b in zip(run[-1], twin[-1], strict=True)])
        return float(off.mean()), float(off.max())

    (mean, largest), (published_mean, published_largest) = errors(ours), errors(published)
    assert 0 < mean <= published_mean
    assert 0 < largest <= published_largest


@pytest.mark.parametrize(("base_bits", "delta_bits"), PRECISIONS)
def test_moments_take_the_bytes_that_were_estimated(base_bits: int, delta_bits: int) -> None:
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 128), nn.LayerNorm(128))
    arguments: dict[str, Any] = {"base_bits": base_bits, "delta_bits": delta_bits, "objectives": ("a", "b", "c")}
    for params in (model.parameters(), parameter_groups(model)):
        params = list(params)
        estimated = estimate_state_memory(params, **arguments)
        opt = DualOptimPlus(params, **arguments)
        for objective in ("a", "b", "c"):
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            opt.step(objective=objective)
        assert size_of(dict(opt.state)) == estimated
    assert estimate_state_memory(model, **arguments) == estimated


def size_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(size_of, value.values()))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_and_small_tensors_stay_in_32_bits_unless_their_group_says_otherwise(kind: Any) -> None:
    model = nn.Sequential(kind(100, 64), nn.Linear(64, 128))
    bits = {"base_bits": 8, "delta_bits": 8}

    def kept(groups: list[dict[str, Any]]) -> list[int]:
        opt = DualOptimPlus(groups, **bits)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        opt.step(objective="forget")
        return [state.stored_bits(state.kept(opt.state[param], "base_exp_avg")) for param in model.parameters()]

    assert kept(parameter_groups(model)) == [32, 8, 32]
    assert kept([{**group, **bits, "min_8bit_size": 0} for group in parameter_groups(model)]) == [8, 8, 32]


def test_biases_and_norms_of_any_dimensions_are_vectors() -> None:
    """Such as the biases of each expert of GPT-OSS, the norm of an image, and the keys that attention adds."""
    model = torch.nn.ModuleDict(
        {
            "norm": torch.nn.LayerNorm([4, 32, 32]),
            "attention": torch.nn.MultiheadAttention(64, 1, add_bias_kv=True),
            "experts": torch.nn.Module(),
        }
    )
    for name, shape in (("gate_up_proj", (4, 32, 32)), ("gate_up_proj_bias", (4, 2048)), ("norm_scores", (64, 64))):
        model["experts"].register_parameter(name, torch.nn.Parameter(torch.ones(shape)))
    names = {id(param): name for name, param in model.named_parameters()}
    groups = {group["name"]: [names[id(param)] for param in group["params"]] for group in parameter_groups(model)}
    assert groups["matrices"] == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "experts.gate_up_proj",
        "experts.norm_scores",
    ]
    opt = DualOptimPlus(parameter_groups(model), base_bits=8, delta_bits=8)
    bias = model["experts"].gate_up_proj_bias
    bias.grad = torch.ones_like(bias)
    opt.step(objective="forget")
    assert not any("codes" in key for key in opt.state[bias])


def test_memory_is_estimated_of_groups_that_are_used_afterwards() -> None:
    groups = [{"params": torch.nn.Linear(3, 3).parameters(), "lr": 0.1}]
    assert estimate_state_memory(groups) > 0
    assert [len(group["params"]) for group in DualOptimPlus(groups).param_groups] == [2]
    assert groups[0]["lr"] == 0.1


# Backends


@CXX
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("base_bits", "delta_bits", "base_betas"),
    [*((*bits, (0.9, 0.95)) for bits in PRECISIONS), (32, 32, None), (32, 8, None)],
)
def test_compiled_is_plain(base_bits: int, delta_bits: int, base_betas: Any, dtype: torch.dtype) -> None:
    shapes = [(5000,), (67, 33), (1,), (4096 * 2 + 3,)]
    results = []
    for backend in ("plain", "compiled"):
        params = [Parameter(randn(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]
        opt = DualOptimPlus(params, lr=0.01, base_betas=base_betas, base_bits=base_bits, delta_bits=delta_bits,
                            min_8bit_size=0, backend=backend)  # fmt: skip
        for t, objective in enumerate(SCHEDULE):
            for i, param in enumerate(params):
                param.grad = (randn(*param.shape, seed=50 + i) + randn(*param.shape, seed=100 * t + i)).to(dtype)
            opt.step(objective=objective)
        results.append(torch.cat([param.detach().float().flatten() for param in params]))
    off = (results[0] - results[1]).abs()
    # A code that another rounding moves by one is rare; a bf16 weight may then end one unit further.
    assert off.max() <= (1e-6 if (base_bits, delta_bits, dtype) == (32, 32, torch.float32) else 0.02)
    assert off.mean() <= 2e-5


@pytest.mark.parametrize("size", [1, 64, 308, 309])
def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    start = randn(103, 3)
    grads = gradients(start, len(SCHEDULE))
    results = []
    for slices in (10**6, size):
        monkeypatch.setattr(plain, "CPU_SLICE", slices)
        param = Parameter(start.clone())
        results.append(torch.stack(run(DualOptimPlus([param], lr=0.01, backend="plain"), param, grads)))
    assert (results[0] - results[1]).abs().max() <= 1e-6


def test_plain_is_the_naive_twin() -> None:
    start = randn(40, 7)
    grads = gradients(start, len(SCHEDULE))
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "base_betas": (0.9, 0.95), "max_update": 1.0}
    param, naive = Parameter(start.clone()), NaiveDualOptim(start, weight_decay=0.01, **settings)
    seen = run(DualOptimPlus([param], backend="plain", **settings), param, grads)
    for grad, objective, ours in zip(grads, SCHEDULE, seen, strict=True):
        naive.step(grad, objective)
        low, high = naive.interval()
        assert ((ours >= low) & (ours <= high)).all()
        naive.param = ours.double()  # the next step starts from where fp32 is


@CXX
def test_nothing_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    param = Parameter(randn(300))
    opt = DualOptimPlus([param], backend="compiled")
    param.grad = randn(300)
    opt.step(objective="forget")
    monkeypatch.setattr(compiled, "_compile", lambda *arguments: pytest.fail("compiled again"))
    other = Parameter(randn(17, 30))
    opt.add_param_group({"params": [other], "lr": 0.1, "betas": (0.5, 0.6), "max_update": None})
    other.grad = randn(17, 30)
    for t, objective in enumerate(("retain", "forget", "retain")):
        opt.param_groups[0]["lr"] = 0.1 / (t + 1)
        opt.step(objective=objective)


@CXX
def test_what_a_killed_compilation_left_goes_with_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path))
    text, made = compiled.source((torch.float32, torch.float32, 32, 0)), tmp_path / "kernels" / "made.so"
    (made.with_suffix(".partial") / "tmp").mkdir(parents=True)
    path = compiled.compiler()
    assert path is not None
    assert compiled._compile(path, (), text, made) == ""
    written = made.stat().st_mtime_ns
    assert compiled._compile(path, (), text, made) == ""  # another process was faster
    assert made.stat().st_mtime_ns == written
    assert {file.suffix for file in made.parent.iterdir()} <= {".so", ".lock"}


def test_without_a_compiler_it_falls_back_with_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    backends.choose.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"plain torch operations.*no C\+\+ compiler"):
            assert backends.choose("cpu", None) is plain
        with pytest.raises(ValueError, match="backend 'compiled' cannot be used: there is no C"):
            backends.choose("cpu", "compiled")
    finally:
        backends.choose.cache_clear()


@CXX
def test_a_compiler_that_fails_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "source", lambda kind: "not C++;")
    compiled.library.cache_clear()
    try:
        assert "error" in (compiled.missing("cpu") or "")
    finally:
        compiled.library.cache_clear()


@CXX
def test_a_kind_whose_kernel_cannot_be_made_is_stepped_by_plain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known, later = Parameter(randn(7, 30)), Parameter(randn(7, 30, seed=1).bfloat16())
    twins = [Parameter(known.detach().clone()), Parameter(later.detach().clone())]
    opt, plainly = DualOptimPlus([known, later], lr=0.1), DualOptimPlus(twins, lr=0.1, backend="plain")
    known.grad = randn(7, 30, seed=2)
    opt.step(objective="retain")  # makes the kernels of the known kind
    twins[0].grad = known.grad
    plainly.step(objective="retain")
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "_compile", lambda *arguments: "error: No space left on device")
    kinds = [(param, torch.bfloat16, 32, 32) for param in (torch.float32, torch.bfloat16)]
    made = compiled.library
    monkeypatch.setattr(compiled, "library", lambda kind: (made.__wrapped__ if kind in kinds else made)(kind))
    compiled.kernel_of.cache_clear()
    try:
        later.grad = twins[1].grad = randn(7, 30, seed=3).bfloat16()
        with pytest.warns(UserWarning, match=r"some parameters by plain torch operations.*No space left") as seen:
            opt.step(objective="forget")
        assert len({str(each.message) for each in seen}) == 1
        opt.step(objective="forget")
    finally:
        compiled.kernel_of.cache_clear()
    for _ in range(2):
        plainly.step(objective="forget")
    for ours, theirs in zip((known, later), twins, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend must be one of 'plain', 'compiled', 'gpu' or None"):
        DualOptimPlus([Parameter(randn(3))], backend="cuda")


def test_the_rule_is_written_down_completely() -> None:
    for with_base in (True, False):
        lines = source.rule_lines(source.CPP, with_base=with_base)
        names = {line.split(" = ")[0] for line in lines}
        assert {"new_param", "new_delta_exp_avg", "new_delta_exp_avg_sq"} <= names
        assert ("new_base_exp_avg_sq" in names) == with_base


# bf16


@pytest.mark.parametrize("backend", ["plain", pytest.param("compiled", marks=CXX)])
def test_updates_below_the_precision_of_bf16_count_in_the_mean(backend: str) -> None:
    """A weight of 0.02 in bf16 has neighbors 1.2e-4 away, and an update of 1e-5 is lost by rounding to the nearest."""
    lr, steps, n = 1e-5, 10, 2**16
    moved = {}
    for by_chance in (True, False):
        param = Parameter(torch.full((n,), 0.02, dtype=torch.bfloat16))
        start = param.detach().float().clone()
        opt = DualOptimPlus([param], lr=lr, weight_decay=0.0, stochastic_rounding=by_chance, backend=backend)
        for _ in range(steps):
            param.grad = torch.ones_like(param)
            opt.step(objective="forget")
        moved[by_chance] = start - param.detach().float()
    assert not moved[False].any()
    # Each step moves a neighbor's distance h with probability lr / h: mean n lr, variance below n lr h.
    mean, error = float(moved[True].mean()), (steps * lr * 2.0**-13 / n) ** 0.5
    assert abs(mean - steps * lr) < 4 * error
    assert moved[True].unique().numel() > 1


def test_rounding_by_chance_is_without_bias_in_both_signs() -> None:
    values = torch.tensor([1.0, -1.0]).repeat_interleave(2**17) * (1 + 0.3 * 2.0**-7)
    rounded = plain.stochastically_rounded(values, 1234, 0)
    assert set(rounded.abs().tolist()) == {1.0, 1 + 2.0**-7}
    for half in (rounded[: 2**17], -rounded[2**17 :]):
        up = float((half > 1).float().mean())
        assert abs(up - 0.3) < 4 * (0.3 * 0.7 / 2**17) ** 0.5
    special = torch.tensor([float("inf"), -float("inf"), 0.0, 1.5])
    assert torch.equal(plain.stochastically_rounded(special, 7, 0), special)
    assert plain.stochastically_rounded(torch.tensor([float("nan")]), 7, 0).isnan().all()


def test_the_seed_decides_the_rounding_and_the_global_generator_does_not() -> None:
    def final(seed: int, global_seed: int) -> Tensor:
        torch.manual_seed(global_seed)
        param = Parameter(randn(500).bfloat16())
        return run(DualOptimPlus([param], lr=1e-4, seed=seed), param, gradients(param, 10))[-1]

    assert torch.equal(final(0, 1), final(0, 2))
    assert not torch.equal(final(0, 1), final(1, 1))


# Exactness


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("base_bits", "delta_bits"), PRECISIONS)
def test_saved_and_resumed_is_never_stopped_in_every_precision(
    base_bits: int, delta_bits: int, dtype: torch.dtype
) -> None:
    bits: dict[str, Any] = {"base_bits": base_bits, "delta_bits": delta_bits, "lr": 1e-3, "min_8bit_size": 0}
    start = randn(70, 9).to(dtype)
    grads = gradients(start, len(SCHEDULE))
    param = Parameter(start.clone())
    whole = DualOptimPlus([param], **bits)
    final = run(whole, param, grads)[-1]

    param = Parameter(start.clone())
    first = DualOptimPlus([param], **bits)
    run(first, param, grads[:5], SCHEDULE[:5])
    file = io.BytesIO()
    torch.save({"param": param.detach(), "opt": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    param = Parameter(saved["param"].clone())
    second = DualOptimPlus([param], **bits)
    second.load_state_dict(saved["opt"])
    assert torch.equal(run(second, param, grads[5:], SCHEDULE[5:])[-1], final)
    assert_same(second.state_dict()["state"], whole.state_dict()["state"])


def test_precisions_are_converted_on_load_with_a_note() -> None:
    start = randn(100, 50)
    grads = gradients(start, len(SCHEDULE))

    def made(**bits: Any) -> tuple[DualOptimPlus, Parameter]:
        param = Parameter(start.clone())
        return DualOptimPlus([param], **bits), param

    full, param = made()
    run(full, param, grads)
    eight, other = made(base_bits=8, delta_bits=8)
    with pytest.warns(UserWarning, match="6 were converted"):
        eight.load_state_dict(full.state_dict())
    kept = eight.state[other]
    assert kept["codes/base_exp_avg"].dtype == torch.int8
    assert kept["scales/base_exp_avg"].shape == (100, 1)
    assert eight.param_groups[0]["base_bits"] == 8
    assert int(kept["step"]) == len(SCHEDULE)
    back, third = made()
    with pytest.warns(UserWarning, match="6 were converted"):
        back.load_state_dict(eight.state_dict())
    ours, exact = back.state[third]["base_exp_avg_sq"], full.state[param]["base_exp_avg_sq"]
    assert ((ours - exact).abs() <= 0.1 * exact + 1e-3 * exact.max()).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made()[0].load_state_dict(full.state_dict())


# Gradients that are not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e19])
@pytest.mark.parametrize("backend", ["plain", pytest.param("compiled", marks=CXX)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_with_a_bad_gradient_changes_nothing(
    bad: float, backend: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    params = [Parameter(randn(300, seed=i).to(dtype)) for i in range(3)]
    opt = DualOptimPlus(params, backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step(objective="forget")
    before = [param.detach().clone() for param in params], io.BytesIO()
    torch.save(opt.state_dict(), before[1])
    before[1].seek(0)
    assert params[1].grad is not None
    params[1].grad[299] = bad
    with caplog.at_level(logging.WARNING):
        opt.step(objective="retain")
    assert "step of 'retain' skipped" in caplog.text
    assert opt.num_skipped == {"forget": 0, "retain": 1}
    assert all(torch.equal(a, b) for a, b in zip(params, before[0], strict=True))
    assert_same(opt.state_dict()["state"], torch.load(before[1], weights_only=True)["state"])
    params[1].grad[299] = 1.0
    opt.step(objective="retain")
    assert int(opt.state[params[0]]["step"]) == 2
    assert all(param.isfinite().all() for param in params)


def test_the_largest_gradient_whose_square_is_finite_is_stepped() -> None:
    param = Parameter(torch.zeros(3))
    opt = DualOptimPlus([param])
    param.grad = torch.tensor([1.8e19, 1.0, 0.0])
    opt.step(objective="forget")
    assert opt.num_skipped["forget"] == 0
    assert opt.state[param]["base_exp_avg_sq"].isfinite().all()


# Any number of objectives


@pytest.mark.parametrize("count", range(1, 9))
def test_any_number_of_objectives_is_the_naive_twins(count: int) -> None:
    names = [f"objective {i}" for i in range(count)]
    start = randn(30, 5)
    schedule = [names[(3 * t + t // count) % count] for t in range(3 * count)]
    grads = gradients(start, len(schedule))
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "base_betas": (0.9, 0.95), "max_update": 1.0}
    param, naive = Parameter(start.clone()), NaiveDualOptim(start, weight_decay=0.01, **settings)
    opt = DualOptimPlus([param], objectives=names, **settings)
    for grad, objective, ours in zip(grads, schedule, run(opt, param, grads, schedule), strict=True):
        naive.step(grad, objective)
        low, high = naive.interval()
        assert ((ours >= low) & (ours <= high)).all()
        naive.param = ours.double()
    assert {f"delta_exp_avg/{name}" for name in schedule} <= set(opt.state[param])


def test_an_objective_can_be_added_after_training_began() -> None:
    param = Parameter(randn(20))
    opt = DualOptimPlus([param], objectives=("forget",))
    run(opt, param, gradients(param, 4), ["forget"] * 4)
    with pytest.raises(ValueError, match="unknown objective 'retain'"):
        opt.step(objective="retain")
    opt.add_objective("retain")
    param.grad = randn(20)
    opt.step(objective="retain")
    assert [int(opt.state[param][f"delta_step/{name}"]) for name in ("forget", "retain")] == [4, 1]
    with pytest.raises(ValueError, match="different names"):
        opt.add_objective("retain")
