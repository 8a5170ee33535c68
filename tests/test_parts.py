"""Ranks' parts of distributed parameters: where they lie, who has copies, and what depends on it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dualoptim.optim import parts
from dualoptim.optim.backends import compiled, plain

from . import forked
from .test_gpu_backend import of_parts
from .test_precision import CXX

distributed = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


@dataclass(frozen=True)
class Mesh:
    """What is read of a mesh, from the place of one rank in it."""

    shape: tuple[int, ...]
    coordinate: tuple[int, ...] = ()

    @property
    def mesh(self) -> torch.Tensor:
        return torch.arange(4, 4 + torch.Size(self.shape).numel()).view(self.shape)

    def size(self, dimension: int) -> int:
        return self.shape[dimension]

    def get_coordinate(self) -> tuple[int, ...]:
        return self.coordinate


@dataclass
class Part:
    shape: torch.Size
    device_mesh: Mesh
    placements: tuple[Any, ...]
    held: torch.Tensor

    def to_local(self) -> torch.Tensor:
        return self.held


SPLIT = ["0", "1", "2", "r0", "0r", "00", "01", "10", "12", "11", "21", "s00", "s0", "s1", "s01", "s11", "1s0r"]


def placements(names: str) -> tuple[Any, ...]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    found: list[Any] = []
    strided = False
    for name in names:
        if name == "s":
            strided = True
            continue
        strided_or_not = _StridedShard(int(name), split_factor=2) if strided else None
        found.append(Replicate() if name == "r" else strided_or_not or Shard(int(name)))
        strided = False
    return tuple(found)


@distributed
@pytest.mark.parametrize("shape", [(8, 12, 4), (7, 5, 3), (2, 3, 1)])
@pytest.mark.parametrize("names", SPLIT)
def test_every_element_lies_where_torch_took_it_from(names: str, shape: tuple[int, ...]) -> None:
    placed = placements(names)
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for coordinate in itertools.product(*(range(2 + i) for i in range(len(placed)))):
        mesh, held = Mesh((2, 3, 4)[: len(placed)], coordinate), whole
        for i, placement in enumerate(placed):
            if hasattr(placement, "dim"):
                held = placement._split_tensor(held, mesh.size(i), with_padding=False)[0][coordinate[i]]
        place = parts.place_of(Part(whole.shape, mesh, placed, held))
        index = torch.arange(held.numel())
        index = parts.in_whole(index, place.lines) if place.lines else index
        assert not held.numel() or torch.equal(place.first + index, held.flatten())


@distributed
def test_a_part_of_columns_is_one_pair_of_numbers() -> None:
    whole = torch.arange(64 * 512).view(64, 512)
    for names, lines in (("1", (parts.Lines(0, 256, 512, 64),)), ("0", ()), ("r", ())):
        held = whole.chunk(2, dim=int(names))[1] if names != "r" else whole
        assert parts.place_of(Part(whole.shape, Mesh((2,), (1,)), placements(names), held)).lines == lines


@distributed
def test_ranks_outside_of_the_mesh_have_copies() -> None:
    def copied(names: str, mesh: tuple[int, ...], *ranks: int) -> bool:
        return parts.is_copied(Part(torch.Size((8, 8)), Mesh(mesh), placements(names), torch.ones(1)), ranks)

    assert not copied("0", (2,), 4, 5)
    assert copied("0", (2,), 4, 5, 6, 7)  # two ranks of another mesh
    assert copied("0", (1,), 4, 5)  # not split at all
    assert not copied("s00", (2, 2), 4, 5, 6, 7)
    assert copied("0r", (2, 2), 4, 5, 6, 7)
    assert not copied("0r", (2, 2), 4, 6)  # ranks that step together
    assert copied("0r", (2, 2), 4, 5)
    assert copied("r", (2,), 4, 5)
    assert not copied("r", (2,), 4)


@pytest.mark.parametrize("backend", [plain, pytest.param(compiled, marks=CXX)], ids=["plain", "compiled"])
def test_a_part_is_rounded_as_in_the_whole(backend: Any) -> None:
    of_parts(backend.step)


RANKS = """
import os
import sys
import warnings
from collections import OrderedDict
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from dualoptim import DualOptimPlus
from dualoptim.optim import diagnostics

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), sys.argv[1]
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
EIGHT = {"base_bits": 8, "delta_bits": 8, "min_8bit_size": 0}

def made(plan=None, dtype=torch.float32):
    torch.manual_seed(0)
    layers = {"norm": nn.LayerNorm(16), "up": nn.Linear(16, 36), "down": nn.Linear(36, 16)}
    model = nn.Sequential(OrderedDict(layers)).to(dtype)
    if plan is not None:
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp"])
    return model

def stepped(model, **settings):
    opt = DualOptimPlus(model.parameters(), lr=1e-2, **settings)
    for step, objective in enumerate(("forget", "retain", "retain")):
        torch.manual_seed(step)
        for param in model.parameters():
            grad = torch.randn(param.shape).to(param.dtype)
            placed = getattr(param, "placements", None)
            param.grad = grad if placed is None else distribute_tensor(grad, param.device_mesh, placed)
        opt.step(objective=objective)
    opt.zero_grad()
    return opt

def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()

def loaded(model, folder, settings):
    opt = DualOptimPlus(model.parameters(), **settings)
    saved = get_optimizer_state_dict(model, opt)
    dcp.load(saved, checkpoint_id=folder, no_dist=True)
    set_optimizer_state_dict(model, opt, saved)
    return opt

# Column-parallel weights under FSDP2 are whole rows on each rank: 8 bits, as in one process, and read there.
columns = {"up": ColwiseParallel(), "down": ColwiseParallel()}
for dtype in (torch.float32, torch.bfloat16):
    model, alone = made(columns, dtype), made(dtype=dtype)
    opt, theirs = stepped(model, **EIGHT), stepped(alone, **EIGHT)
    assert "codes/base_exp_avg" in opt.state[model.up.weight]
    for ours, other in zip(model.parameters(), alone.parameters()):
        assert torch.equal(whole(ours), whole(other))
    dcp.save(get_optimizer_state_dict(model, opt), checkpoint_id=f"{folder}/{dtype}")
    again = made(dtype=dtype)
    read = loaded(again, f"{folder}/{dtype}", EIGHT)
    for param, other in zip(again.parameters(), alone.parameters()):
        assert read.state[param].keys() == theirs.state[other].keys()
        assert all(torch.equal(value, theirs.state[other][key]) for key, value in read.state[param].items())

# Whatever the dimensions that are split, a bf16 weight is rounded as in one process, and nothing is counted twice.
rows = {"up": ColwiseParallel(), "down": RowwiseParallel()}
for dtype in (torch.float32, torch.bfloat16):
    model, alone = made(rows, dtype), made(dtype=dtype)
    opt, theirs = stepped(model), stepped(alone)
    for ours, other in zip(model.parameters(), alone.parameters()):
        assert torch.equal(whole(ours), whole(other)), ours.placements
    for layer, expected in diagnostics(theirs, alone.named_parameters()).items():
        found = diagnostics(opt, model.named_parameters())[layer]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert abs(found[key] - value) <= 1e-5 * max(1, abs(value)), (layer, key, found[key], value)

# Where rows are split 8 bits are impossible, which is said once, and a whole checkpoint is read in 32 bits.
model = made(rows)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    opt = stepped(model, **EIGHT)
assert [str(each.message) for each in told if "rows are split" in str(each.message)] == [
    "moments of parameters whose rows are split among ranks, as by Shard(1), are kept in 32 bits in place of 8; shard "
    "along dimension 0 to keep them in 8"
]
full = StateDictOptions(full_state_dict=True)
saved = get_optimizer_state_dict(model, opt, options=full)
if not rank:  # the others get nothing
    for settings in (EIGHT, {"base_bits": 32, "delta_bits": 32}):
        one = made()
        others = [param for param in one.parameters() if param is not one.down.weight]
        again = DualOptimPlus([{"params": [one.down.weight], **settings}, {"params": others}], **EIGHT)
        try:
            set_optimizer_state_dict(one, again, saved, options=full)
        except ValueError as error:
            assert settings == EIGHT and "was kept in 32 bits" in str(error) and "base_bits=32" in str(error), error
        else:
            read, expected = again.state[one.down.weight], saved["state"]["down.weight"]
            assert settings != EIGHT and expected["base_exp_avg"].any()
            assert all(torch.equal(read[key], value) for key, value in expected.items())

# A mesh that is smaller than the group of ranks that step: the others hold copies, which must be rounded alike.
copied = nn.Linear(4, 4, bias=False).bfloat16()
fully_shard(copied, mesh=mesh["dp"])
copied.weight.grad = torch.ones_like(copied.weight)
try:
    DualOptimPlus(copied.parameters(), seed=rank).step(objective="forget")
except ValueError as error:
    assert "the ranks have different seeds" in str(error)
else:
    raise AssertionError("copies were rounded apart")
dist.barrier()
os._exit(0)  # all is said; gloo's threads now and then abort a process that takes itself down in order
"""


@distributed
def test_four_ranks_with_two_kinds_of_parallelism_are_one_process(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    forked.run(script, str(tmp_path), count=4)
