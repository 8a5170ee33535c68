"""On a GPU, where there is one: the kernel itself, and loops, checkpoints, ranks and whole runs."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from dualoptim import DualOptim, DualOptimPlus, unlearn
from dualoptim.config import RunConfig
from dualoptim.data import question
from dualoptim.device import scoring_in
from dualoptim.evaluation.scoring import answers, replies
from dualoptim.losses import LOSSES
from dualoptim.optim import releasing
from dualoptim.optim.backends import gpu
from dualoptim.schedule import by_turns, jointly
from dualoptim.training.combine import pcgrad

from . import test_gpu_backend, tiny, tofu
from . import test_trainer as made

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
TURNS = by_turns({"forget": 1, "retain": 2}, 4, 6)


@pytest.mark.parametrize("check", test_gpu_backend.CHECKS)
def test_the_kernel_is_right_on_a_gpu(check: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "tests.test_gpu_backend", check, "cuda"], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def network(device: str = "cuda", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 64), nn.GELU(), nn.Linear(64, 17, bias=False)).to(device, dtype)


def take(model: nn.Module, opt: DualOptimPlus, steps: int, first: int = 0, **how: Any) -> None:
    """Steps of two objectives, on the same inputs on every device."""
    param = next(model.parameters())
    for i in range(first, first + steps):
        inputs = torch.randn(5, 300, generator=torch.Generator().manual_seed(i)).to(param.device, param.dtype)
        loss = model(inputs).square().mean()
        objective = ("forget", "retain", "retain")[i % 3]
        if how.get("released"):
            with releasing(opt, objective=objective):
                loss.backward()
            continue
        loss.backward()
        opt.step(objective=objective)
        opt.zero_grad()


def flat(model: Any) -> Tensor:
    return torch.cat([p.detach().cpu().double().flatten() for p in model.parameters()])


def states(opt: torch.optim.Optimizer) -> list[Tensor]:
    found = []
    for state in opt.state.values():
        for value in state.values():
            found += list(value.values()) if isinstance(value, dict) else [value]
    return [value for value in found if isinstance(value, Tensor)]


BITS = ({}, {"base_bits": 8, "delta_bits": 8, "min_8bit_size": 0})


@pytest.mark.parametrize("settings", BITS)
def test_its_steps_are_those_on_the_cpu_and_go_through_the_kernel(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    launch = gpu._launch
    monkeypatch.setattr(gpu, "_launch", lambda *given: (launched.append(given[0]), launch(*given)))
    there, here = network(), network("cpu")
    for model in (there, here):
        take(model, DualOptimPlus(model.parameters(), lr=1e-3, **settings), 9)
    assert len(launched) >= 9
    assert_close(flat(there), flat(here), rtol=0, atol=2e-4)  # the update is a quotient, near one in the first steps


@pytest.mark.parametrize("settings", BITS)
@pytest.mark.parametrize(("source", "target"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_checkpoint_goes_on_on_the_other_device(settings: dict[str, Any], source: str, target: str) -> None:
    model = network(source)
    opt = DualOptimPlus(model.parameters(), lr=1e-3, **settings)
    take(model, opt, 4)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, saved)
    saved.seek(0)
    kept = torch.load(saved, map_location="cpu", weights_only=True)
    again = network(target)
    again.load_state_dict(kept["model"])
    other = DualOptimPlus(again.parameters(), lr=1e-3, **settings)
    other.load_state_dict(kept["opt"])
    assert all(value.device.type == target for value in states(other))
    take(model, opt, 5, 4)
    take(again, other, 5, 4)
    assert_close(flat(again), flat(model), rtol=0, atol=0 if source == target else 2e-4)


def test_bf16_parameters_move_by_less_than_their_precision_on_average() -> None:
    model = network(dtype=torch.bfloat16)
    exact = network()
    for each in (model, exact):
        take(each, DualOptimPlus(each.parameters(), lr=1e-5), 60)
    moved, wanted = flat(model) - flat(network(dtype=torch.bfloat16)), flat(exact) - flat(network())
    assert abs(float((moved * wanted.sign()).mean()) / float(wanted.abs().mean()) - 1) < 0.2


def test_a_gradient_scaler_skips_a_step_that_overflows() -> None:
    model = network()
    opt = DualOptimPlus(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for i in range(4):
        before, scale = flat(model), scaler.get_scale()
        inputs = torch.randn(5, 300, device="cuda") * (1e30 if i == 2 else 1.0)
        with torch.autocast("cuda", torch.float16):
            loss = model(inputs).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(opt, objective="forget" if i % 2 else "retain")
        scaler.update()
        opt.zero_grad()
        assert torch.equal(flat(model), before) == (i == 2)
        assert (scaler.get_scale() < scale) == (i == 2)


def test_released_gradients_step_as_kept_ones() -> None:
    kept, released = network(), network()
    take(kept, DualOptimPlus(kept.parameters(), lr=1e-3), 6)
    opt = DualOptimPlus(released.parameters(), lr=1e-3)
    take(released, opt, 6, released=True)
    assert_close(flat(released), flat(kept), rtol=0, atol=1e-7)
    assert all(p.grad is None for p in released.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_a_compiled_model_and_odd_parameters_train() -> None:
    """Channels last, a scalar, none at all, and double precision, which has no kernel."""
    torch.manual_seed(0)
    made_there = [
        torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last),
        torch.tensor(0.5),
        torch.empty(0, 3),
        torch.randn(5, dtype=torch.float64),
    ]
    grads = [[torch.randn_like(each) for each in made_there] for _ in range(4)]
    found = []
    for device in ("cuda", "cpu"):
        params = [nn.Parameter(each.clone(memory_format=torch.preserve_format).to(device)) for each in made_there]
        opt = DualOptim(params, lr=1e-2)
        for i, some in enumerate(grads):
            for param, grad in zip(params, some, strict=True):
                param.grad = grad.to(device)
            opt.step(objective=("forget", "retain")[i % 2])
        found.append([param.detach().cpu() for param in params])
    assert_close(*found, rtol=1e-5, atol=1e-6)
    compiled, plain = network(), network()
    for model in (compiled, plain):
        run = torch.compile(model) if model is compiled else model
        opt = DualOptimPlus(model.parameters(), lr=1e-3)
        for objective in ("forget", "retain"):
            run(torch.ones(5, 300, device="cuda")).square().mean().backward()
            opt.step(objective=objective)
            opt.zero_grad()
    assert_close(flat(compiled), flat(plain), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("turns", "settings"),
    [
        (TURNS, {"forget": "NPO", "optimizer": (DualOptimPlus, {"lr": 1e-3})}),
        (TURNS, {"forget": "IDK", "optimizer": (DualOptimPlus, {"lr": 1e-3, "base_bits": 8, "delta_bits": 8})}),
        (jointly({"forget": 1, "retain": 2}, 6, 4), {"optimizer": made.ADAMW, "bound": 0.5}),
    ],
    ids=["NPO", "8 bits", "joint"],
)
def test_the_trainer_ends_where_it_ends_on_the_cpu(tmp_path: Path, turns: Any, settings: dict[str, Any]) -> None:
    found = []
    for place in (False, True):
        run = made.trainer(tmp_path / str(place), turns, use_cpu=place, **settings)
        run.train()
        assert next(run.model.parameters()).device.type == ("cpu" if place else "cuda")
        found.append(flat(run.model))
    assert_close(*found, rtol=0, atol=2e-3)  # six steps of 1e-3, some of them of near-zero gradients
    assert float((found[0] - found[1]).abs().mean()) < 1e-4


# Without those that need rows, or layers, which the tiny ones lack.
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("AltPO", "RMU", "RMURetain")])
def test_every_loss_is_what_it_is_on_the_cpu(tmp_path: Path, name: str) -> None:
    logged = []
    for place in (False, True):
        turns, of = by_turns({"forget": 1, "retain": 1}, 4, 2), {LOSSES[name].role: name}
        reference = tiny.model(1) if LOSSES[name]().needs_reference else None
        run = made.trainer(tmp_path / str(place), turns, use_cpu=place, reference=reference, **of)
        run.train()
        logged.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert_close(*map(torch.tensor, logged), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [{"combine": pcgrad}, {"sam_rho": 0.1}, {"bound": 0.5}],
    ids=["combined", "sharpness-aware", "bounded"],
)
def test_joint_steps_in_other_ways_end_where_they_end_on_the_cpu(tmp_path: Path, settings: dict[str, Any]) -> None:
    found = []
    for place in (False, True):
        turns = jointly({"forget": 1, "retain": 1}, 4, 3)
        run = made.trainer(tmp_path / str(place), turns, optimizer=made.ADAMW, use_cpu=place, **settings)
        run.train()
        found.append(flat(run.model))
    assert float((found[0] - found[1]).abs().mean()) < 1e-4


def test_a_run_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    arguments = {"use_cpu": False, "save_strategy": "steps", "save_steps": 3}
    whole = made.trainer(tmp_path, TURNS, **arguments)
    whole.train()
    again = made.trainer(tmp_path, TURNS, **{**arguments, "save_strategy": "no"})
    again.train(str(tmp_path / "checkpoint-3"))
    assert_close(flat(again.model), flat(whole.model), rtol=0, atol=1e-6)  # atomic additions in no fixed order
    assert all(value.device.type == "cuda" for value in states(again.multi_objective))


RANKS = """
import os
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from dualoptim import DualOptimPlus

dist.init_process_group("gloo")  # which serves GPUs too; nccl wants one for each rank
rank = dist.get_rank()
torch.manual_seed(0)
model = DistributedDataParallel(nn.Linear(300, 8).cuda())
opt = DualOptimPlus(model.parameters(), lr=1e-2)
for i in range(6):
    inputs = torch.randn(4, 300, generator=torch.Generator().manual_seed(i))[2 * rank:2 * rank + 2].cuda()
    model(inputs).square().mean().backward()
    if i == 3 and rank:
        next(model.parameters()).grad[0, 0] = float("inf")
    opt.step(objective=("forget", "retain")[i % 2])
    opt.zero_grad()
assert opt.num_skipped == {"forget": 0, "retain": 1}, opt.num_skipped
if not rank:
    torch.save([p.detach().cpu() for p in model.module.parameters()], sys.argv[1])
model(torch.ones(1, 300).cuda()).sum().backward()
opt.step(objective=("forget", "retain")[rank])
try:
    opt.step(objective="forget")
except ValueError as error:
    assert "different objectives for one step" in str(error), error
else:
    raise AssertionError("nobody noticed that the ranks differ")
dist.barrier()
os._exit(0)
"""


def test_two_ranks_on_one_gpu_step_as_one_process_and_notice_that_they_differ(tmp_path: Path) -> None:
    script, out = tmp_path / "ranks.py", tmp_path / "weights.pt"
    script.write_text(RANKS)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(out),
    ]
    finished = subprocess.run([*launch, str(script), str(out)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-3000:]
    torch.manual_seed(0)
    model = nn.Linear(300, 8).cuda()
    opt = DualOptimPlus(model.parameters(), lr=1e-2)
    for i in (0, 1, 2, 4, 5):  # of step 3 one rank's gradient was infinite
        model(torch.randn(4, 300, generator=torch.Generator().manual_seed(i)).cuda()).square().mean().backward()
        opt.step(objective=("forget", "retain")[i % 2])
        opt.zero_grad()
    assert_close(flat(model), torch.cat([each.double().flatten() for each in torch.load(out)]), rtol=0, atol=1e-5)


def test_scores_and_replies_are_those_of_the_cpu() -> None:
    rows = [question(f"What is {i}?", "It is " + "x" * (1 + i % 5) + ".") for i in range(7)]
    found = []
    with scoring_in(False):
        for device in ("cpu", "cuda"):
            model, words = tiny.model().to(device), tiny.tokenizer()
            nll = [answer.nll for (answer,) in answers(model, words, [[row] for row in rows])]
            found.append((nll, replies(model, words, [row.prompt for row in rows], max_new_tokens=12)))
    assert_close(*(torch.tensor(nll) for nll, _ in found), rtol=1e-4, atol=1e-4)
    assert found[0][1] == found[1][1]


def test_sampled_replies_are_the_same_again() -> None:
    model, words = tiny.model().cuda(), tiny.tokenizer()
    prompts = [question(f"What is {i}?", "It.").prompt for i in range(5)]
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(replies(model, words, prompts, max_new_tokens=12, temperature=1.0))
    assert found[0] == found[1] != found[2]


def run(folder: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """Of a model that is saved beside it, on TOFU's files in miniature."""
    config = RunConfig(
        model=str(tiny.save(folder / "model")) if not (folder / "model").exists() else str(folder / "model"),
        data_dir=str(folder / "data" if (folder / "data").exists() else tofu.write(folder / "data")),
        task="tofu", task_args={"retain_rows": 4}, steps=6, batch_size=2, lr=1e-2, ratio="1:1", **settings,
    )  # fmt: skip
    return unlearn.run([config], out)


def test_a_whole_run_is_scored_and_attacked(tmp_path: Path) -> None:
    results = run(tmp_path, tmp_path / "run", forget_loss="NPO", attacks=["relearn", "bits8", "leak"], save_model=True)
    (entry,) = results["runs"]
    assert entry["finite"]
    assert entry["after"]["forget_probability"] < entry["before"]["forget_probability"]
    assert entry["peak_memory_bytes"] > 0
    assert list((tmp_path / "run").rglob("*.safetensors"))


def test_weights_in_4_bits_carry_an_adapter_and_are_an_attack(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    adapted = run(tmp_path, tmp_path / "adapter", forget_loss="NPO", load_in_4bit=True, lora_rank=2)
    attacked = run(tmp_path, tmp_path / "attacked", forget_loss="NPO", attacks=["nf4"])
    for results in (adapted, attacked):
        assert results["runs"][0]["finite"]
    assert 0 <= attacked["runs"][0]["after"]["nf4_probability"] <= 1
