"""With what a training loop has around an optimizer: clipping, compiled models, averaging, hooks, several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel

from dualoptim import DualOptimPlus
from dualoptim.optim import ranks

from . import forked
from .test_optim import randn

ROOT = Path(__file__).parents[1]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))


def turns(model: nn.Module, opt: DualOptimPlus, steps: int = 6, clip: float | None = None) -> list[Tensor]:
    for step in range(steps):
        (model(randn(8, 6, seed=step)) ** 2).sum().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step(objective="forget" if step % 3 == 0 else "retain")
        opt.zero_grad()
    return [param.detach().clone() for param in model.parameters()]


def test_clipping_clips_what_the_base_is_fed() -> None:
    model = network()
    opt = DualOptimPlus(model.parameters(), lr=1e-3)
    turns(model, opt, steps=1, clip=0.01)
    fed = torch.cat([opt.state[param]["base_exp_avg"].flatten() for param in model.parameters()]) / (1 - 0.9)
    assert float(fed.norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.filterwarnings("ignore")  # torch.compile's own, of which there are other ones in every version
def test_a_compiled_model_trains_as_the_model_does() -> None:
    plain, model = network(), network()
    expected = turns(plain, DualOptimPlus(plain.parameters(), lr=1e-2))
    compiled = torch.compile(model, backend="aot_eager")
    for ours, theirs in zip(turns(compiled, DualOptimPlus(compiled.parameters(), lr=1e-2)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_groups_have_betas_of_their_own() -> None:
    model, first, second = network(), network(), network()
    groups = [
        {"params": list(model[0].parameters()), "betas": (0.5, 0.9), "base_betas": (0.8, 0.99)},
        {"params": list(model[2].parameters())},
    ]
    together = turns(model, DualOptimPlus(groups, lr=1e-2))
    # The same gradients, replayed to two optimizers with one group each.
    one = DualOptimPlus(first.parameters(), lr=1e-2, betas=(0.5, 0.9), base_betas=(0.8, 0.99))
    two = DualOptimPlus(second.parameters(), lr=1e-2)
    moving = network()
    both = DualOptimPlus([{**groups[0], "params": list(moving[0].parameters())},
                          {"params": list(moving[2].parameters())}], lr=1e-2)  # fmt: skip
    for step in range(6):
        (moving(randn(8, 6, seed=step)) ** 2).sum().backward()
        for copy in (first, second):
            for param, source in zip(copy.parameters(), moving.parameters(), strict=True):
                assert source.grad is not None
                param.grad = source.grad.clone()
        objective = "forget" if step % 3 == 0 else "retain"
        for opt in (both, one, two):
            opt.step(objective=objective)
        both.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(together[:2], first[0].parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(together[2:], second[2].parameters(), strict=True))


def test_weights_are_averaged_and_the_averaging_schedule_sets_the_rate() -> None:
    model = network()
    opt = DualOptimPlus(model.parameters(), lr=1e-2)
    averaged, schedule = AveragedModel(model), SWALR(opt, swa_lr=5e-3, anneal_epochs=1)
    seen = []
    for _ in range(3):
        seen.append(turns(model, opt, steps=2))
        averaged.update_parameters(model)
        schedule.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(5e-3)
    for i, param in enumerate(averaged.module.parameters()):
        torch.testing.assert_close(param.detach(), torch.stack([each[i] for each in seen]).mean(0))


def test_gradients_can_be_released_as_soon_as_they_are_there() -> None:
    """One optimizer for each parameter, stepped by a hook: no two gradients are held at once."""
    model, whole = network(), network()
    opts = {param: DualOptimPlus([param], lr=1e-2) for param in model.parameters()}

    def release(param: Tensor) -> None:
        opts[param].step()
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(release)
    for step in range(6):
        for opt in opts.values():
            opt.objective = "forget" if step % 3 == 0 else "retain"
        (model(randn(8, 6, seed=step)) ** 2).sum().backward()
        assert all(param.grad is None for param in model.parameters())
    expected = turns(whole, DualOptimPlus(whole.parameters(), lr=1e-2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))


RANKS = """
import copy
import os
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from dualoptim import DualOptimPlus

dist.init_process_group("gloo")
rank = dist.get_rank()

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Linear(16, 2))

def grads(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=generator)

def train(model, bits):
    opt = DualOptimPlus(model.parameters(), lr=1e-2, base_bits=bits, delta_bits=bits, min_8bit_size=0)
    for step in range(4):
        model(grads(step)).square().sum().backward()
        opt.step(objective="forget" if step % 2 else "retain")
        opt.zero_grad()
    model(grads(9)).square().sum().backward()
    last = list(model.parameters())[-1].grad
    if rank == 1:  # a gradient that only one rank knows to be bad
        (last.to_local() if hasattr(last, "to_local") else last).fill_(float("nan"))
    opt.step(objective="forget")
    assert opt.num_skipped == {"forget": 1, "retain": 0}, opt.num_skipped
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]

alone = network()
opt = DualOptimPlus(alone.parameters(), lr=1e-2)
for step in range(4):
    alone(grads(step)).square().sum().backward()
    opt.step(objective="forget" if step % 2 else "retain")
    opt.zero_grad()
for bits in (32, 8):
    sharded = network()
    fully_shard(sharded)
    for name, model in (("DDP", DistributedDataParallel(network())), ("FSDP2", sharded)):
        for ours, theirs in zip(train(model, bits), alone.parameters()):
            off = float((ours - theirs).abs().max())
            assert off < (1e-5 if bits == 32 else 0.02), (name, bits, off)

# A parameter that is distributed by another dimension than the first stays in 32 bits, and one of a single dimension.
mesh = init_device_mesh("cpu", (2,))
for shape, placed, flat in (((4, 512), Shard(1), False), ((4096,), Shard(0), True)):
    turned = torch.nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [placed]))
    turned.grad = distribute_tensor(torch.ones(shape), mesh, [placed])
    before = turned._version
    opt = DualOptimPlus([{"params": [turned], "flat": flat}], lr=0.1, base_bits=8, delta_bits=8, min_8bit_size=0)
    opt.step(objective="forget")
    assert opt.state[turned]["base_exp_avg"].dtype == torch.float32
    assert (turned.full_tensor() < 1).all() and turned._version > before

# A gradient that tensor parallelism leaves in parts is summed first, on every rank alike.
shared = torch.nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Replicate()]))
shared.grad = DTensor.from_local(torch.tensor([1.0, -3.0, 2.0, 0.5]) * (1 if rank else -0.5), mesh, [Partial()])
alone = torch.nn.Parameter(torch.ones(4))
alone.grad = torch.tensor([1.0, -3.0, 2.0, 0.5]) * 0.5
for param in (shared, alone):
    DualOptimPlus([param], lr=0.1).step(objective="forget")
assert torch.equal(shared.to_local(), alone), (shared.to_local(), alone)

# Ranks that step without the others say so; without it, those who wait would wait for ever.
mine = [dist.new_group([0]), dist.new_group([1])][rank]
weight = torch.nn.Parameter(torch.ones(3))
opt = DualOptimPlus([weight], process_group=mine)
for _ in range(1 + rank):
    weight.grad = torch.full((3,), float("nan") if rank else 1.0)
    opt.step(objective="retain")
assert opt.num_skipped["retain"] == 2 * rank
assert copy.deepcopy(opt).process_group is mine

# A step that one rank refuses is refused by all, and none waits for it.
refusing = torch.nn.Parameter(torch.ones(4))
opt = DualOptimPlus([refusing])
for shape in ((4,), (3,) if rank else (4,)):
    refusing.data, refusing.grad = torch.ones(shape), None
    refusing.grad = torch.ones(shape)
    try:
        opt.step(objective="retain")
    except ValueError as error:
        assert ("in its state is" if rank else "another rank refused") in str(error), error
        assert torch.equal(refusing, torch.ones(shape))
    else:
        assert shape == (4,) and int(opt.state[refusing]["step"]) == 1
assert int(opt.state[refusing]["step"]) == 1

def refused(opt, objective, mine, others):
    # Every rank raises at once, and nothing changes.
    group = opt.param_groups[0]["params"]
    before = [param.detach().clone() for param in group]
    try:
        opt.step(objective=objective)
    except ValueError as error:
        assert (mine if rank else others) in str(error), error
    else:
        raise AssertionError(f"stepped: {mine}")
    assert all(torch.equal(a, b) for a, b in zip(group, before)) and not opt.state

# An objective that is unknown to one rank, or none, is refused by all.
for objective, mine in (("forgte" if rank else "forget", "did you mean 'forget'"), (None, "no objective")):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    opt = DualOptimPlus([weight])
    if not rank:
        opt.objective = "forget"
    refused(opt, objective, mine, "another rank refused")
    opt.step(objective="forget")

# Zeros for nobody's objective make states alone only where all ranks have them; else the others would wait.
for objective, mine, others in (
    (None, "no objective", "another rank refused"),
    ("forget" if rank else None, "this one 'forget'", "this one None"),
):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), float(rank))
    refused(DualOptimPlus([weight]), objective, mine, others)
weight.grad = torch.zeros(3)
opt = DualOptimPlus([weight])
opt.step()
assert int(opt.state[weight]["step"]) == 0
if not rank:  # torch.distributed.checkpoint, with the rate 0, on one rank alone
    opt = DualOptimPlus([weight], lr=0.0)
    opt.step()
    assert int(opt.state[weight]["step"]) == 0
weight.grad = torch.ones(3)

# So is a step for different objectives, and one that would round copies apart.
opt = DualOptimPlus([weight], objectives=("forget", "retain")[:: 1 if rank else -1])
opt.step(objective="forget")  # whatever the order in which they are named
opt.state.clear()
refused(opt, "forget" if rank else "retain", "this one 'forget'", "this one 'retain'")
for dtype in (torch.bfloat16, torch.float32):
    copied = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    split = torch.nn.Parameter(distribute_tensor(torch.ones(4, dtype=dtype), mesh, [Shard(0)]))
    same = torch.nn.Parameter(distribute_tensor(torch.ones(4, dtype=dtype), mesh, [Replicate()]))
    for param, is_copy in ((copied, True), (split, False), (same, True)):
        param.grad = torch.ones_like(param)
        opt = DualOptimPlus([param], seed=rank - 2**63)
        if is_copy and dtype is torch.bfloat16:
            refused(opt, "forget", f"this one {opt.seed}", f"this one {opt.seed}")
            opt.param_groups[0]["stochastic_rounding"] = False
        opt.step(objective="forget")
        assert opt.state

# A rank without gradients goes along.
opt = DualOptimPlus([weight])
weight.grad = None if rank else torch.full((3,), float("nan"))
opt.step(objective="retain")
assert opt.num_skipped["retain"] == 1
dist.barrier()
dist.destroy_process_group()

# A group for GPUs alone, on a machine without one.
if not torch.accelerator.is_available():
    dist.init_process_group("cuda:gloo")
    weight.grad, before = torch.ones(3), weight.detach().clone()
    try:
        opt.step(objective="retain")
    except ValueError as error:
        assert "init_process_group('cpu:gloo,cuda:nccl')" in str(error), error
    else:
        raise AssertionError("agreed with nobody")
    assert torch.equal(weight, before)
os._exit(0)  # all is said; gloo's threads now and then abort a process that takes itself down in order
"""


def test_what_ranks_on_gpus_found_in_a_step_is_told_at_the_next() -> None:
    model = network()
    opt = DualOptimPlus(model.parameters())
    opt._verdict = ranks.Verdict(torch.tensor([0, -5, 0]), "forget", None)
    with pytest.raises(ValueError, match="different objectives for one step, this one 'forget'"):
        opt.step(objective="retain")
    opt.step(objective="retain")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed training")
def test_two_ranks_step_and_skip_alike(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    forked.run(script)


CHECKPOINTS = """
import os
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from dualoptim import DualOptimPlus
from dualoptim.training import sharded

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])

def made(count=3):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(count)))
    return model, [layer.weight for layer in model]

def read(model, opt):
    sharded.load_optimizer(model, opt, folder, first=not rank)
    return [opt.state.get(weight, {}) for weight in model.parameters()]

model, weights = made()
opt = DualOptimPlus([{"params": weights[:1]}, {"params": weights[1:]}], lr=0.1)
"""


def on_two(tmp_path: Path, script: str) -> None:
    """Run a script that reads a checkpoint on two ranks."""
    written = tmp_path / "script.py"
    written.write_text(f"{CHECKPOINTS}{script}\nos._exit(0)  # as above\n")
    forked.run(written, str(tmp_path))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed training")
def test_ranks_refuse_a_checkpoint_of_other_groups_and_none_waits(tmp_path: Path) -> None:
    on_two(
        tmp_path,
        """
for i, weight in enumerate(weights):
    weight.grad = torch.full((4, 4), i + 1.0)
opt.step(objective="forget")
if not rank:
    torch.save(opt.state_dict(), folder / "optimizer.pt")
for count, first in ((3, slice(1, 3)), (2, slice(0, 1))):
    other, theirs = made(count)
    some = theirs[first]
    again = DualOptimPlus([{"params": some}, {"params": [each for each in theirs if not any(each is s for s in some)]}])
    try:
        read(other, again)
    except ValueError as error:
        assert "has parameter groups of 1, 2 parameters, and this optimizer of" in str(error), error
    else:
        raise AssertionError("loaded")
    assert not again.state
other, theirs = made()
again = DualOptimPlus([{"params": theirs[:1]}, {"params": theirs[1:]}])
for mine, loaded in zip(weights, read(other, again)):
    assert torch.equal(opt.state[mine]["base_exp_avg"], loaded["base_exp_avg"])
""",
    )


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed training")
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_ranks_read_a_checkpoint_in_which_a_parameter_never_had_a_gradient(tmp_path: Path, kind: str) -> None:
    on_two(
        tmp_path,
        f"kind = {kind!r}"
        """
for weight in weights[1:]:
    weight.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
opt.step(objective="forget")
if kind == "full" and not rank:
    torch.save(opt.state_dict(), folder / "optimizer.pt")
if kind == "sharded":
    (folder / sharded.MODEL).mkdir(exist_ok=True)
    save({"optimizer": get_optimizer_state_dict(model, opt)}, checkpoint_id=folder / sharded.OPTIMIZER)
other, theirs = made()
again = DualOptimPlus([{"params": theirs[:1]}, {"params": theirs[1:]}])
first, *others = read(other, again)
assert not first
for mine, loaded in zip(weights[1:], others):
    assert opt.state[mine].keys() == loaded.keys()
    assert all(torch.equal(value, loaded[key]) for key, value in opt.state[mine].items())
again.load_state_dict(opt.state_dict())
""",
    )


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed training")
def test_ranks_refuse_a_full_checkpoint_of_other_bits_than_their_states_have(tmp_path: Path) -> None:
    on_two(
        tmp_path,
        """
eight = {"base_bits": 8, "delta_bits": 8, "min_8bit_size": 0}
for saved_in, read_in in ((eight, {}), ({}, eight)):
    model, weights = made()
    opt = DualOptimPlus(weights, **saved_in)
    for weight in weights:
        weight.grad = torch.ones(4, 4)
    opt.step(objective="forget")
    if not rank:
        torch.save(opt.state_dict(), folder / "optimizer.pt")
    other, _ = made()
    fully_shard(other)
    try:
        read(other, DualOptimPlus(other.parameters(), **read_in))
    except ValueError as error:
        assert f"is not in the {8 if saved_in else 32} bits that its group says" in str(error), error
    else:
        raise AssertionError("loaded")
""",
    )
