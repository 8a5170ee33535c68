"""A model's parameter groups for an optimizer, and the bytes that the optimizer's state of them will take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim.optimizer import ParamsT

from . import state
from .optimizer import DualOptimPlus
from .state import BASE, DELTA, bits_of, counter

NORM = re.compile(r"norm(\dd)?$", re.IGNORECASE)  # LayerNorm, LlamaRMSNorm, BatchNorm2d, …
BIAS = re.compile(r"(^|_)bias(_|$)")  # bias, bias_k, gate_up_proj_bias, …


def parameter_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """A model's trainable parameters in groups: no weight decay on biases and norms, these and embeddings in 32 bits.

    Biases and norms are all parameters of one dimension or none, those of a module whose class is named as a norm, and
    those named as a bias, such as those of each expert of a mixture.

    Args:
        model: any module.
        weight_decay: λ of the matrices.
    """
    tables = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    embeddings = {id(param) for module in tables for param in module.parameters()}
    vectors = {
        id(param)
        for module in model.modules()
        for name, param in module.named_parameters(recurse=False)
        if param.ndim < 2 or BIAS.search(name) or NORM.search(type(module).__name__)
    }
    kinds: dict[str, list[nn.Parameter]] = {"matrices": [], "embeddings": [], "vectors": []}
    for param in model.parameters():
        if param.requires_grad:
            kind = "embeddings" if id(param) in embeddings else "vectors" if id(param) in vectors else "matrices"
            kinds[kind].append(param)
    whole = {"base_bits": 32, "delta_bits": 32}
    settings: dict[str, dict[str, Any]] = {
        "matrices": {"weight_decay": weight_decay},
        "embeddings": {"weight_decay": weight_decay, **whole},
        "vectors": {"weight_decay": 0.0, **whole},
    }
    return [{"params": params, "name": kind, **settings[kind]} for kind, params in kinds.items() if params]


def estimate_state_memory(
    model: nn.Module | ParamsT, cls: type[DualOptimPlus] = DualOptimPlus, **arguments: Any
) -> int:
    """Bytes that an optimizer's state will take once every parameter has had a gradient, without allocating any.

    Args:
        model: a module, split by `parameter_groups`, or anything that an optimizer takes as its `params`.
        cls: `DualOptimPlus` or `DualOptim`.
        **arguments: the optimizer's arguments: objectives, base_bits, delta_bits, …

    Example:
        >>> layer = nn.Linear(512, 512, bias=False)
        >>> estimate_state_memory(layer) / layer.weight.numel()  # fp32: base and two deltas, two moments each
        24.000...
        >>> estimate_state_memory(layer, base_bits=8, delta_bits=8) / layer.weight.numel()
        6.0938...
    """
    given = parameter_groups(model) if isinstance(model, nn.Module) else list(model)
    for group in given:
        if isinstance(group, dict) and isinstance(group.get("params"), Iterator):
            group["params"] = list(group["params"])  # as an optimizer does, or the next one would find none left
    groups: Any = [dict(group) if isinstance(group, dict) else group for group in given]  # an optimizer adds keys
    optimizer = cls(groups, **arguments)
    total = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            deltas = len(optimizer.objectives)
            total += 2 * deltas * state.nbytes(param, bits_of(param, group, DELTA[0]))
            if group["base_betas"] is not None:
                total += 2 * state.nbytes(param, bits_of(param, group, BASE[0]))
            total += (1 + deltas) * counter(param).element_size()
    return total
