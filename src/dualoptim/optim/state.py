"""Precision as a type: a moment is an fp32 tensor, or 8-bit codes with one fp32 scale for every block of 256 elements.

A block's scale s is the largest magnitude in it, with no floor, so that gradients of any size keep their digits. A code
c of at most L levels stands for::

    x = s · (c / L)^4,     L = 127 with a sign, 255 without

whose steps are finest near zero, as moments are spread over many orders of magnitude within a block. The fourth power
and its root are plain arithmetic, which every backend can do on vectors, and `decode` and `encode` are the only place
where they stand. Without a sign, which is for averages of squares, what is not zero never gets the code of zero: an
update is divided by its root. Of the powers 1, 2 and 4, with the published dynamic map beside them, this one was the
nearest to fp32 (`docs/log.md`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256
SMALLEST = torch.finfo(torch.float32).tiny  # scales below it, whose inverse may overflow, code zeros


class Code(NamedTuple):
    """A map between 8-bit codes and values of −1 to 1, or 0 to 1."""

    signed: bool

    @property
    def levels(self) -> int:
        """L, the code that stands for the block's scale."""
        return 127 if self.signed else 255

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8


SIGNED, UNSIGNED = Code(signed=True), Code(signed=False)


def code_of(name: str, *, with_base: bool) -> Code:
    """The map of a moment: averages of squares have no sign, but a delta's with a base is a difference."""
    return UNSIGNED if name == "base_exp_avg_sq" or (name == "delta_exp_avg_sq" and not with_base) else SIGNED


def decode(code: Any, scale: Any, map: Code) -> Any:
    """The value of a code given as an fp32 number; elementwise, traced by backends as `rule.update` is."""
    x = code / float(map.levels)
    x = x * x
    x = x * x
    return (torch.copysign(x, code) if map.signed else x) * scale


def encode(value: Any, scale: Any, map: Code) -> Any:
    """The code nearest to a value, as an fp32 whole number."""
    x = fourth_root(torch.abs(value) / torch.where(scale >= SMALLEST, scale, 1.0))
    x = torch.round(x * float(map.levels))
    return torch.copysign(x, value) if map.signed else torch.maximum(x, torch.sign(value))


def fourth_root(x: Any) -> Any:
    """x^(1/4) of a number of 0 to 1; one operation to backends, which may have a faster way than two roots."""
    if torch.overrides.has_torch_function((x,)):  # when traced
        return torch.overrides.handle_torch_function(fourth_root, (x,), x)
    return torch.sqrt(torch.sqrt(x))


# What is stored for a moment: the tensor itself, or {"codes": …, "scales": …}. Plain containers, so that a saved state
# loads under weights_only=True.
Stored = Tensor | dict[str, Tensor]


def zeros(param: Tensor, bits: int, map: Code) -> Stored:
    """A moment that is zero, laid out in memory as the parameter is."""
    if bits == 32:
        return torch.zeros_like(param, dtype=torch.float32, memory_format=torch.preserve_format)
    codes = torch.zeros_like(param, dtype=map.dtype, memory_format=torch.preserve_format)
    return {"codes": codes, "scales": torch.zeros(num_blocks(local(codes)), device=local(codes).device)}


def num_blocks(tensor: Tensor) -> int:
    """How many blocks a tensor has, the last one partial perhaps."""
    return math.ceil(tensor.numel() / BLOCK)


def bits_of(stored: Stored) -> int:
    """32 or 8."""
    return 8 if isinstance(stored, dict) else 32


def nbytes(param_numel: int, bits: int) -> int:
    """Bytes of one moment of a parameter of so many elements."""
    return 4 * param_numel if bits == 32 else param_numel + 4 * math.ceil(param_numel / BLOCK)


def local(tensor: Any) -> Any:
    """A distributed tensor's part on this rank, and anything else itself, the codes of a dict too."""
    if isinstance(tensor, dict):
        return {key: local(value) for key, value in tensor.items()}
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order in which they lie in memory."""
    tensor = local(tensor).detach()
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def dequantise(codes: Tensor, scales: Tensor, map: Code) -> Tensor:
    """Flat codes that begin at a block's beginning → fp32 values."""
    return decode(codes.float(), scales.repeat_interleave(BLOCK)[: len(codes)], map)


def quantise_(codes: Tensor, scales: Tensor, values: Tensor, map: Code) -> None:
    """Flat fp32 values that begin at a block's beginning → codes and scales, in place."""
    blocks = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales.copy_(blocks.abs().amax(1))
    codes.copy_(encode(blocks, scales[:, None], map).view(-1)[: len(codes)])


def converted(stored: Stored, param: Tensor, bits: int, map: Code) -> Stored:
    """A moment of a parameter in other bits."""
    if bits_of(stored) == bits:
        return stored
    result = zeros(param, bits, map)
    if isinstance(stored, dict):
        assert isinstance(result, Tensor)
        flat(result).copy_(dequantise(flat(stored["codes"]), stored["scales"], map))
    else:
        assert isinstance(result, dict)
        same_layout = torch.empty_like(param, dtype=torch.float32, memory_format=torch.preserve_format).copy_(stored)
        quantise_(flat(result["codes"]), result["scales"], flat(same_layout), map)
    return result
