"""How a model can be trained, from what gives up nothing to what needs the least memory, and how that is asked for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..config import RunConfig

USUAL_RANK = 16  # of an adapter


@dataclass(frozen=True)
class Setting:
    """How a model is trained.

    Args:
        name: shown to people.
        weights: their precision: "float32", computed with in bf16 autocast; "bfloat16", rounded stochastically when
            they are updated; "nf4", frozen in 4 bits under an adapter.
        bits: of the optimizer's moments, 32 or 8.
        checkpointing: activations are recomputed in the backward pass.
        released: each gradient is used and freed while backward runs.
        lora_rank: rank of an adapter on every linear layer but the head, which alone is trained; 0 for the whole model.
        sharded: the model is sharded over the devices, by FSDP2; else each has all of it, and gradients are averaged
            (DDP).
        bf16: whether an fp32 model computes in bf16 autocast.
    """

    name: str
    weights: str = "float32"
    bits: int = 32
    checkpointing: bool = False
    released: bool = False
    lora_rank: int = 0
    sharded: bool = False
    bf16: bool = True


def ladder(devices: int, lora_rank: int = USUAL_RANK) -> list[Setting]:
    """Settings, ordered from the one that gives up nothing to the one that needs the least memory."""
    recomputed = "8-bit states, activations recomputed"
    whole = [
        Setting("fp32 weights, 32-bit states"),
        Setting("fp32 weights, 8-bit states", bits=8),
        Setting(f"fp32 weights, {recomputed}", bits=8, checkpointing=True),
        Setting(f"bf16 weights, {recomputed}", "bfloat16", 8, True),
    ]
    lora = Setting(f"LoRA {lora_rank} on bf16 weights", "bfloat16", 32, True, lora_rank=lora_rank)
    qlora = Setting(f"LoRA {lora_rank} on 4-bit weights", "nf4", 32, True, lora_rank=lora_rank)
    if devices == 1:
        released = Setting(f"bf16 weights, {recomputed}, gradients released", "bfloat16", 8, True, True)
        return [*whole, released, lora, qlora]
    found = []
    for each in (*whole, lora):
        found.append(dataclasses.replace(each, name=f"DDP, {each.name}"))
        found.append(dataclasses.replace(each, name=f"FSDP2, {each.name}", sharded=True))
    return [*found, dataclasses.replace(qlora, name=f"DDP, {qlora.name}")]


def how(setting: Setting, optimizer: str, devices: int) -> str:
    """Options of `dualoptim unlearn` that make a setting, and how several devices are started."""
    options = [] if optimizer == RunConfig().optimizer else [f"--optimizer {optimizer}"]
    if setting.lora_rank:
        options.append(f"--lora-rank {setting.lora_rank}")
    if setting.weights == "nf4":
        options.append("--load-in-4bit true")
    if setting.weights != "float32":
        options.append("--bf16-weights true")
    if setting.bits == 8:
        options.append("--base-bits 8 --delta-bits 8" if optimizer == "DualOptim+" else "--delta-bits 8")
    if setting.checkpointing:
        options.append("--gradient-checkpointing true")
    if setting.released:
        options.append("--release-gradients true --max-grad-norm 0")
    said = " ".join(options) or "the defaults"
    if setting.sharded:
        return f"{said}; FSDP2 by UnlearnTrainer in a script of your own, see docs/engines.md"
    return said if devices == 1 else f"{said}; by torchrun with a process for each device"


def rows_at_once(config: RunConfig, batch: int, devices: int) -> tuple[int, bool]:
    """How many of a step's rows a device takes in one pass, and whether it takes several passes.

    Args:
        batch: rows of the step, of all devices.
    """
    share = -(-batch // devices)
    rows = min(config.micro_batch_size or share, share)
    return rows, rows < share
