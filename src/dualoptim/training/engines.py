"""Training on several ranks, by DDP, FSDP2 or DeepSpeed: what each needs and cannot do, and what ranks must agree on.

All of it is checked before the first step, except `agree_on_step`: all ranks serve the same objectives in a step, or
all of them raise.
"""

from __future__ import annotations

import os
import time
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checkpoints
from ..errors import UserError, one_line
from ..optim import DualOptimPlus

WAIT = 30.0  # seconds until a file that one rank wrote must be seen by the others, on a slow shared disk


def sharded_by_hand(model: nn.Module) -> bool:
    """Whether `torch.distributed.fsdp.fully_shard` was applied to a model or a part of it."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def adopt(trainer: Any, *, by_hand: bool) -> None:
    """Make a trainer's accelerator use FSDP2 for a model, where accelerate itself would not.

    accelerate reads its FSDP plugin only on GPUs, and would silently train replicas on CPUs. It would also wrap a model
    that is already sharded in DDP.
    """
    if trainer.is_fsdp_enabled:
        return
    wanted = trainer.args.fsdp_plugin_args
    if wanted is None and not by_hand:
        return
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(**(wanted or {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"}))
    state = trainer.accelerator.state
    if trainer.args.mixed_precision not in (None, "no") and not by_hand:
        plugin.set_mixed_precision(trainer.args.mixed_precision)
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    trainer.is_fsdp_enabled = True


def check(trainer: Any, *, by_hand: bool, combines: bool, perturbs: bool = False) -> None:
    """Refuse what the engine of a trainer cannot do.

    Raises:
        ValueError: says what it is and what to use instead.
    """
    args, model = trainer.args, trainer.model
    there = int(os.environ.get("WORLD_SIZE") or 1)
    if dist.is_available() and dist.is_initialized():
        there = dist.get_world_size()
    if there != args.world_size:
        raise ValueError(
            f"there are {there} ranks, but accelerate, which shares out the rows, knows of {args.world_size}, so that "
            "ranks would train on the same rows; start by torchrun or accelerate launch, which set RANK, LOCAL_RANK "
            "and WORLD_SIZE, and pass use_cpu=True where there is no GPU"
        )
    if (getattr(model, "tp_size", None) or 1) > 1 or getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "a model that from_pretrained spread over devices (tp_plan, distributed_config) is not supported, as ranks "
            "that share its layers would get different rows; load it whole and give fsdp=True"
        )
    if perturbs and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            "sam_rho: puts other weights in the place of those that are trained, which "
            f"{'FSDP' if trainer.is_fsdp_enabled else 'DeepSpeed'} keeps in pieces; use one process or DDP, with an "
            "adapter where memory is short"
        )
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer, by_hand=by_hand)
    if trainer.is_deepspeed_enabled:
        _check_deepspeed(trainer, by_hand=by_hand, combines=combines)
    if args.save_on_each_node and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            "save_on_each_node: a sharded model's checkpoint is whole only where all ranks' parts lie; give an "
            "output_dir on a disk that all nodes share"
        )


def _check_fsdp(trainer: Any, *, by_hand: bool) -> None:
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP of version {plugin.fsdp_version} flattens parameters and is deprecated; "
            "use fsdp_config={'version': 2}"
        )
    if not by_hand:
        return
    if trainer.args.mixed_precision not in (None, "no"):
        raise ValueError(
            f"{trainer.args.mixed_precision}: a model that is sharded before it is handed over has its precision from "
            "fully_shard(…, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)); leave it out of the arguments"
        )
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and not hasattr(parameter, "to_local"):
            raise ValueError(
                f"the trainable parameter {name} is not sharded, so that no rank would get the others' gradients of "
                "it; apply fully_shard to the whole model, after an adapter was added"
            )


def _check_deepspeed(trainer: Any, *, by_hand: bool, combines: bool) -> None:
    if by_hand:
        raise ValueError("a model that fully_shard was applied to cannot be DeepSpeed's too; leave one of the two out")
    if combines:
        raise ValueError(
            "combine: DeepSpeed hands out no gradients that could be combined; use DDP, or FSDP2 by fsdp=True"
        )
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    if "optimizer" in config and trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError(
            f"the DeepSpeed config has an optimizer of its own ({config['optimizer'].get('type')}), which would be "
            "taken in place of optimizer_cls_and_kwargs; remove 'optimizer' from it"
        )


def check_bits(optimizer: Any) -> None:
    """Refuse an optimizer whose 8-bit states DeepSpeed would turn into 32 bits by flattening its parameters."""
    if isinstance(optimizer, DualOptimPlus):
        for group in optimizer.param_groups:
            eight = group["delta_bits"] == 8 or (group["base_bits"] == 8 and group["base_betas"] is not None)
            if eight and not group["flat"] and any(param.ndim > 1 for param in group["params"]):
                raise ValueError(
                    "DeepSpeed flattens a group's parameters, and what has one dimension stays in 32 bits unless its "
                    "group says flat=True; give optimizer_cls_and_kwargs, which makes the groups, or set it there"
                )


def gathered(value: Any) -> list[Any]:
    """Every rank's value, in the ranks' order."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree_on_step(table: Tensor, own: str, failure: Exception | None, step: int) -> None:
    """Raise on every rank if the ranks would serve different objectives, or if one of them failed.

    Args:
        table: (ranks,) a `mark` of what each rank is to serve, 0 where it failed.
        own: what this rank is to serve.
        failure: what went wrong on this rank.
        step: the step, for the message.
    """
    marks = table.tolist()
    if failure is None and len(set(marks)) == 1:
        return
    told = gathered(own if failure is None else f"nothing: {failure}")
    if failure is not None:
        raise failure
    if 0 in marks:
        rank = marks.index(0)
        raise ValueError(f"step {step} is given up, as rank {rank} was to serve {one_line(told[rank])}")
    raise ValueError(
        f"step {step}: the ranks would serve different objectives ("
        + "; ".join(f"rank {rank} {what}" for rank, what in enumerate(told))
        + "); give every rank the same turns, rows, seed and pauses"
    )


def mark(served: Sequence[Sequence[str]], *of: Any) -> int:
    """A number from 1 to 2^24 − 1, which fp32 holds, for what a rank serves in a step, micro-batch by micro-batch."""
    return zlib.crc32(repr((served, of)).encode()) % (2**24 - 1) + 1


class NotWrittenError(OSError):
    """Another rank could not write its part of a checkpoint."""


def all_wrote() -> None:
    """Wait until every rank wrote its part; a rank that could not calls `gathered` with the reason instead of this."""
    for rank, reason in enumerate(gathered(None)):
        if reason is not None:
            raise NotWrittenError(f"rank {rank}: {reason}")


def checkpoint_of(trainer: Any, given: str | bool) -> Path:
    """The checkpoint to resume from; each node's first rank finds and checks it for the others.

    Args:
        trainer: the one that resumes.
        given: a checkpoint's folder, or True for the newest complete one of the output folder.

    Raises:
        ValueError: there is none; it is damaged, of another run, or of another engine; or the ranks find different
            ones.
    """
    out, found, failure = Path(str(trainer.args.output_dir)), None, None
    if trainer.is_local_process_zero():
        try:
            if given is True:
                found = checkpoints.newest(out, trainer.fingerprints)
            else:
                checkpoints.check(found := Path(str(given)), trainer.fingerprints)
            if found is None:
                raise ValueError(f"{out}: holds no whole checkpoint to go on from; begin anew")
            check_resumable(found, trainer)
        except ValueError as error:
            failure = error
    told = gathered((None if found is None else str(found), None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    for rank, (_, said) in enumerate(told):
        if said is not None:
            raise UserError(f"rank {rank}: {said}")
    names = sorted({name for name, _ in told if name is not None})
    if len(names) > 1:
        raise UserError(
            f"the ranks would go on from different checkpoints ({', '.join(names)}); give an output_dir on a disk that "
            "all nodes share"
        )
    return Path(names[0])


def check_one_folder(trainer: Any) -> None:
    """Refuse a folder for checkpoints that is not the same on every rank, as on nodes that do not share a disk."""
    args = trainer.args
    if args.world_size == 1 or args.save_strategy == "no" or args.save_on_each_node:
        return
    out, name = Path(str(args.output_dir)), gathered(uuid.uuid4().hex)[0]
    partial = out / checkpoints.PARTIAL
    sign, first = partial / f"seen-{name}", dist.get_rank() == 0
    if first:
        partial.mkdir(parents=True, exist_ok=True)
        sign.touch()
    gathered(None)  # wait until it is written
    until = time.monotonic() + WAIT
    while not (seen := sign.exists()) and time.monotonic() < until:
        time.sleep(0.1)
        if partial.is_dir():
            os.listdir(partial)  # makes a network disk refresh its view
    told = gathered(seen)
    if first:
        sign.unlink()
        checkpoints.without_empty(partial)
    if not all(told):
        raise UserError(
            f"output_dir {out}: rank {told.index(False)} does not see what rank 0 writes there; give a folder on a "
            "disk that all nodes share, or save_on_each_node=True under DDP"
        )


def check_resumable(folder: Path, trainer: Any) -> None:
    """Refuse a checkpoint that this trainer's engine cannot read.

    Checkpoints of one process, of DDP and of FSDP2 are read by any of the three, on any number of ranks. DeepSpeed's
    are read only by DeepSpeed, at the same stage and on as many ranks.
    """
    parts = len(list(folder.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))
    if not parts:
        if trainer.is_deepspeed_enabled:
            raise UserError(
                f"checkpoint {folder}: was not written by DeepSpeed, which reads its own alone; go on without it, or "
                "begin anew from the model in it"
            )
        return
    if not trainer.is_deepspeed_enabled:
        raise UserError(
            f"checkpoint {folder}: was written by DeepSpeed on {parts} ranks; go on so, or begin anew from the model "
            "in it"
        )
    of_stage_3 = any(folder.glob("global_step*/zero_pp_rank_*_model_states.pt"))
    stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
    if parts != trainer.args.world_size or of_stage_3 != (stage == 3):
        raise UserError(
            f"checkpoint {folder}: was written by DeepSpeed, stage {'3' if of_stage_3 else '1 or 2'}, on {parts} "
            f"ranks, and can be read so alone, but this is stage {stage} on {trainer.args.world_size}; go on as it "
            "was, or use FSDP2, whose checkpoints are read on any number of ranks"
        )


def served(samples: Sequence[Mapping[str, Any]], paused: set[str]) -> list[list[str]]:
    """The objectives of each micro-batch that a rank serves."""
    return [[name for name in sample if name not in paused] for sample in samples]


def description(serving: Sequence[Sequence[str]]) -> str:
    """What a rank serves, for messages."""
    names = dict.fromkeys(name for each in serving for name in each)
    return f"{', '.join(names) or 'nothing'} in {len(serving)} micro-batches"


def on_device(values: Sequence[float], device: Any) -> Tensor:
    """A row of the table that ranks gather."""
    return torch.tensor([values], dtype=torch.float32, device=device)
