"""Run on each rank: trains four steps and saves, or loads and trains four more.

What was loaded on any number of ranks must train as if it had never stopped, to the bit. Parameters have rows of
several blocks, fewer rows than ranks, and numbers of rows that no number of ranks divides.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from dualoptim import DualOptim, DualOptimPlus

TURNS = ("forget", "retain", "retain")
KINDS: dict[str, dict[str, bool]] = {
    "sharded": {},
    "offloaded": {"cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "broadcast": {"full_state_dict": True, "cpu_offload": True},
}


def network(dtype: torch.dtype, *, sharded: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 7), nn.GELU(), nn.Linear(7, 40), nn.Linear(40, 1)).to(dtype)
    return fully_shard(model) if sharded else model


def optimizer(cls: type[DualOptimPlus], params: Any, bits: int) -> DualOptimPlus:
    base = {"base_bits": bits} if cls is DualOptimPlus else {}
    return cls(params, lr=1e-2, delta_bits=bits, min_8bit_size=0, **base)


def train(model: nn.Module, opt: DualOptimPlus, steps: range) -> None:
    """Gradients of their own, the same on any number of ranks to the bit."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            placed = getattr(param, "placements", None)
            param.grad = grad if placed is None else distribute_tensor(grad, param.device_mesh, placed)
        opt.step(objective=TURNS[step % len(TURNS)])
        opt.zero_grad()


def whole(model: nn.Module) -> list[Tensor]:
    return [param.full_tensor() if hasattr(param, "full_tensor") else param.detach() for param in model.parameters()]


def save(folder: Path, kind: str, model: nn.Module, opt: DualOptimPlus) -> None:
    options = KINDS[kind]
    saved = {
        "model": get_model_state_dict(model, options=of_model(options)),
        "optimizer": get_optimizer_state_dict(model, opt, options=StateDictOptions(**options)),
    }
    if "full_state_dict" not in options:
        dcp.save(saved, checkpoint_id=folder)
    elif dist.get_rank() == 0:
        torch.save(saved, folder.with_suffix(".pt"))


def load(folder: Path, kind: str, model: nn.Module, opt: DualOptimPlus) -> None:
    options = dict(KINDS[kind])
    if "full_state_dict" in options:
        options = {"full_state_dict": True, "broadcast_from_rank0": kind == "broadcast"}
        there = dist.get_rank() == 0 or kind == "full"
        saved = torch.load(folder.with_suffix(".pt"), weights_only=True) if there else {"model": {}, "optimizer": {}}
    else:
        saved = {
            "model": get_model_state_dict(model, options=of_model(options)),
            "optimizer": get_optimizer_state_dict(model, opt, options=StateDictOptions(**options)),
        }
        dcp.load(saved, checkpoint_id=folder)
    set_model_state_dict(model, saved["model"], options=of_model(options))
    set_optimizer_state_dict(model, opt, saved["optimizer"], options=StateDictOptions(**options))


def of_model(options: dict[str, bool]) -> StateDictOptions:
    return StateDictOptions(**{key: value for key, value in options.items() if not key.startswith("flatten")})


def on_rank(rank: int, count: int, meeting: str, task: str, folder: Path) -> None:
    """Save into a folder or load from it; the ranks meet in a file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    sharded = dist.get_world_size() > 1
    for cls, bits, dtype in (
        (DualOptimPlus, 32, torch.float32),
        (DualOptimPlus, 8, torch.float32),
        (DualOptimPlus, 8, torch.bfloat16),
        (DualOptim, 8, torch.float32),
    ):
        alone = network(dtype, sharded=False)
        never_stopped = optimizer(cls, alone.parameters(), bits)
        train(alone, never_stopped, range(4 if task == "save" else 8))
        for kind in KINDS:
            path = folder / f"{cls.__name__}-{bits}-{str(dtype)[6:]}-{kind}"
            model = network(dtype, sharded=sharded)
            opt = optimizer(cls, model.parameters(), bits)
            if task == "save":
                train(model, opt, range(4))
                next(model.parameters()).grad = torch.full_like(next(model.parameters()), float("nan"))
                opt.step(objective="retain")
                save(path, kind, model, opt)
            else:
                for param in model.parameters():
                    param.data.fill_(9.0)
                load(path, kind, model, opt)
                assert opt.num_skipped == {"forget": 0, "retain": 1}, opt.num_skipped
                train(model, opt, range(4, 8))
            for ours, theirs in zip(whole(model), whole(alone), strict=True):
                off = float((ours.float() - theirs.float()).abs().max())
                assert torch.equal(ours, theirs), f"{path.name}, {dist.get_world_size()} ranks: off by {off}"
    dist.barrier()
    os._exit(0)  # all is said; gloo's threads now and then abort a process that takes itself down in order
