"""The memory and communication of an unlearning step, of each device.

    per device = weights + optimizer state + reference + what a backward pass holds at most

Weights, gradients and states are counted on torch's meta device. `Need` has the parts and their sum.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..adapters import added, linear_layers
from ..config import RunConfig
from ..errors import UserError
from ..losses import GD, Loss
from ..optim import DualOptim, DualOptimPlus, estimate_state_memory
from .setting import Setting
from .tracing import Part, Pass, Size, layers_of, trace

BYTES = {"float32": 4, "bfloat16": 2}
# NF4: 4 bits, and 8 bits of a scale for 64 weights, whose own scales are fp32 for 256 of them (arXiv 2305.14314).
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Step:
    """What a step consists of.

    Args:
        rows: B, sequences in one forward pass of a device.
        tokens: T of each, padding included.
        labelled: tokens of each that are learned; the head is applied only there.
        objectives: how many the optimizer keeps states for.
        optimizer: "DualOptim+", "DualOptim" or "AdamW".
        reference: a frozen copy of the model stays in memory.
        compares: a loss compares with the model before training; with an adapter, a copy of it is then kept.
        accumulated: gradients stay while the next forward pass runs.
        losses: each has steps of its own, of so many rows.
    """

    rows: int = 8
    tokens: int = 512
    labelled: int = 512
    objectives: int = 2
    optimizer: str = "DualOptim+"
    reference: bool = False
    compares: bool = False
    accumulated: bool = False
    losses: Sequence[Loss] = (GD(),)

    @property
    def passes(self) -> list[Pass]:
        """A pass for each loss, in which what stands in for the answers is as long as they are."""
        size = Size(self.tokens, self.labelled)
        return [(Part(loss, self.rows, size, size),) for loss in self.losses]


@dataclass(frozen=True)
class Need:
    """Bytes of each device.

    Args:
        weights: including what is gathered from other devices' shards.
        gradients: of what is trained; where they are released, only the largest one.
        buckets: copies of the gradients, which DDP averages.
        states: the optimizer's.
        reference: the frozen copy.
        activations: their peak, with temporaries, logits, and weights cast to bf16.
        passing: the peak of a forward and backward pass: activations, gradients, or some of both.
        communication: bytes that a device sends in an optimizer step.
    """

    weights: int
    gradients: int
    buckets: int
    states: int
    reference: int
    activations: int
    passing: int
    communication: int

    @property
    def total(self) -> int:
        """Bytes at the peak of a step."""
        return self.weights + self.states + self.reference + self.buckets + self.passing


def needed(config: PretrainedConfig, setting: Setting, step: Step, devices: int = 1) -> Need:
    """The memory that a setting needs on each device.

    Args:
        config: of a causal language model of Transformers.
        devices: how many share the rows of a step, and with `sharded` the model.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    width = BYTES.get(setting.weights, 2)
    parameters = sum(p.numel() for p in model.parameters())
    linear = sum(m.weight.numel() for m in linear_layers(model))
    weights = round(linear * NF4 + (parameters - linear) * 2) if setting.weights == "nf4" else parameters * width
    if setting.lora_rank:  # adapters are kept in fp32
        trained = _adapter_size(model, setting.lora_rank)
        weights += 4 * trained
        gradients, largest = 4 * trained, 0
        states = _moments(step, setting, [torch.empty(trained, dtype=torch.float32, device="meta")], trained)
    else:
        gradients, largest = parameters * width, width * max(p.numel() for p in model.parameters())
        states = _moments(step, setting, model, parameters)
    reference = parameters * width * step.reference if not setting.lora_rank else 4 * trained * step.compares
    # Shards are gathered in the precision that a step computes in, and so need no cast.
    autocast = setting.weights == "float32" and setting.bf16 and not setting.sharded
    compute = torch.bfloat16 if setting.bf16 or setting.weights != "float32" else torch.float32
    dtype = torch.float32 if autocast else compute
    early, late = trace(config, setting, step.passes, dtype, autocast)
    if setting.released:
        gradients = largest
    sent, buckets = 0, 0
    if devices > 1 and setting.sharded:
        inner = BYTES["bfloat16"] if setting.bf16 else BYTES["float32"]
        layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]
        outside = parameters - sum(layers)  # embeddings and head, which stay gathered from forward to backward
        gathered = inner * (outside + 2 * max(layers, default=0))  # one layer computes, and the next one arrives
        in_flight = 0 if setting.lora_rank else inner * (outside + max(layers, default=0))
        reduced = gradients if setting.lora_rank else inner * parameters
        sent = round((devices - 1) / devices * (2 * inner * parameters + reduced))
        own = -(-gradients // devices)
        early, late = early + in_flight, late + in_flight + own - gradients
        weights, gradients = -(-weights // devices) + gathered, own
        states, reference = -(-states // devices), -(-reference // devices)
    elif devices > 1:
        sent = round(2 * (devices - 1) / devices * gradients)
        buckets = gradients
    # Gradients that stay from one pass to the next are in memory together with all activations.
    passing = early + gradients if step.accumulated else max(early, late)
    return Need(weights, gradients, buckets, states, reference, early, passing, sent)


def _adapter_size(model: Any, rank: int) -> int:
    """Parameters of an adapter as PEFT makes it, on routers and experts, too; without the package, on linear layers."""
    if importlib.util.find_spec("peft") is not None:
        with suppress(UserError):  # some modules cannot have one
            made = added(copy.deepcopy(model), RunConfig(lora_rank=rank), "")
            return sum(p.numel() for p in made.parameters() if p.requires_grad)
    return sum(rank * sum(m.weight.shape) for m in linear_layers(model))


def _moments(step: Step, setting: Setting, model: Any, trained: int) -> int:
    if step.optimizer == "AdamW" and setting.bits == 32:
        return 8 * trained
    names = [f"objective {i}" for i in range(1 if step.optimizer == "AdamW" else step.objectives)]
    if step.optimizer == "DualOptim+":
        return estimate_state_memory(
            model, DualOptimPlus, objectives=names, base_bits=setting.bits, delta_bits=setting.bits
        )
    return estimate_state_memory(model, DualOptim, objectives=names, delta_bits=setting.bits)
