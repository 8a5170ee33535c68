"""Precision as a type: a moment is an fp32 tensor, or 8-bit codes with one fp32 scale for every block of 256 elements.

A block's scale s is the largest magnitude in it, with no floor, so that gradients of any size keep their digits. A code
c of at most L levels stands for::

    x = s · (c / L)^p,     L = 127 with a sign, 255 without

whose steps are finest near zero, as moments are spread over many orders of magnitude within a block: a first moment has
p = 2 and a second moment p = 4, so that a gradient and its square reach zero together. Powers and roots of two are
plain arithmetic, which every backend can do on vectors, and `decode` and `encode` are the only place where they stand.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256


class Code(NamedTuple):
    """A map between 8-bit codes and values of −1 to 1, or 0 to 1."""

    squarings: int  # p = 2^squarings
    signed: bool

    @property
    def levels(self) -> int:
        """L, the code that stands for the block's scale."""
        return 127 if self.signed else 255

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8


# The base's second moment is an average of squares; a delta's is a difference, and may be negative.
CODES = {
    "delta_exp_avg": Code(1, signed=True),
    "delta_exp_avg_sq": Code(2, signed=True),
    "base_exp_avg": Code(1, signed=True),
    "base_exp_avg_sq": Code(2, signed=False),
}


def decode(code: Any, scale: Any, map: Code) -> Any:
    """The value of a code given as an fp32 number; elementwise, traced by backends as `rule.update` is."""
    x = code / float(map.levels)
    for _ in range(map.squarings):
        x = x * x
    return (torch.copysign(x, code) if map.signed else x) * scale


def encode(value: Any, scale: Any, map: Code) -> Any:
    """The code nearest to a value, as an fp32 whole number; a scale of zero codes zeros."""
    x = torch.abs(value) / torch.where(scale > 0, scale, 1.0)
    for _ in range(map.squarings):
        x = torch.sqrt(x)
    x = torch.round(x * float(map.levels))
    return torch.copysign(x, value) if map.signed else x


# What is stored for a moment: the tensor itself, or {"codes": …, "scales": …}. Plain containers, so that a saved state
# loads under weights_only=True.
Stored = Tensor | dict[str, Tensor]


def zeros(param: Tensor, name: str, bits: int) -> Stored:
    """A moment that is zero, laid out in memory as the parameter is."""
    if bits == 32:
        return torch.zeros_like(param, dtype=torch.float32, memory_format=torch.preserve_format)
    codes = torch.zeros_like(param, dtype=CODES[name].dtype, memory_format=torch.preserve_format)
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


def local(tensor: Tensor) -> Tensor:
    """A distributed tensor's part on this rank, and any other tensor itself."""
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


def converted(stored: Stored, param: Tensor, name: str, bits: int) -> Stored:
    """A moment of a parameter in other bits."""
    if bits_of(stored) == bits:
        return stored
    result = zeros(param, name, bits)
    if isinstance(stored, dict):
        assert isinstance(result, Tensor)
        flat(result).copy_(dequantise(flat(stored["codes"]), stored["scales"], CODES[name]))
    else:
        assert isinstance(result, dict)
        same_layout = torch.empty_like(param, dtype=torch.float32, memory_format=torch.preserve_format).copy_(stored)
        quantise_(flat(result["codes"]), result["scales"], flat(same_layout), CODES[name])
    return result
