"""A parameter's state: how its moments are kept, under which keys, and on which ranks.

A moment is a tensor in fp32 (fp64 for fp64 parameters), or 8-bit codes with one fp32 scale for every block of 256
elements. Blocks do not cross the rows of dimension 0, so that codes and scales are sharded alike and can be resharded.
Elements are in row-major order, whatever the parameter's own order in memory.

The state is flat, as torch's tools expect it: ``step``, ``base_exp_avg``, ``delta_step/forget``,
``delta_exp_avg/forget`` and so on; in 8 bits ``codes/base_exp_avg`` and ``scales/base_exp_avg`` replace the moment.
The names differ because torch.distributed.checkpoint casts an entry to the precision of the one it finds of that name.

A block's scale s is the largest magnitude in it. It has no floor, so that gradients of any size keep their precision. A
code c, at most L in magnitude, stands for::

    x = s · (c / L)^4,     L = 127 with a sign, 255 without

The steps between values are finest near zero, because the moments in a block span many orders of magnitude. The fourth
power and its root are plain arithmetic, which every backend can vectorize; they are written in `decode` and `encode`
alone. The unsigned map is for averages of squares. It never gives the code zero to a value above zero, as the update is
divided by its root. Of the powers 1, 2 and 4 and the published dynamic map, this one was the nearest to fp32
(`docs/log.md`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import split_dimensions

BLOCK = 256
SMALLEST = torch.finfo(torch.float32).tiny  # a smaller scale's inverse may overflow, so its block gets zeros


class Code(NamedTuple):
    """A map between 8-bit codes and values from −1 to 1, or from 0 to 1 without a sign."""

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
    """The map of a moment, named with or without its objective. Averages of squares have no sign; a delta's second
    moment beside a base has one, as it is a difference."""
    kind = name.partition("/")[0]
    return UNSIGNED if kind == "base_exp_avg_sq" or (kind == "delta_exp_avg_sq" and not with_base) else SIGNED


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
    """x^(1/4) of a number from 0 to 1. Backends see one operation, as they may have a faster way than two roots."""
    if torch.overrides.has_torch_function((x,)):  # when traced
        return torch.overrides.handle_torch_function(fourth_root, (x,), x)
    return torch.sqrt(torch.sqrt(x))


# What is stored for a moment: the tensor itself, or its codes and their scales.
Stored = Tensor | dict[str, Tensor]
DELTA, BASE = ("delta_exp_avg", "delta_exp_avg_sq"), ("base_exp_avg", "base_exp_avg_sq")
STEP, DELTA_STEP, CODES, SCALES = "step", "delta_step", "codes", "scales"


def of(name: str, objective: str) -> str:
    """The key of an objective's own entry, such as ``delta_step/forget``."""
    return f"{name}/{objective}"


def moment_keys(objectives: tuple[str, ...], *, with_base: bool) -> Iterator[str]:
    """The keys of all moments of a parameter."""
    for objective in objectives:
        for name in DELTA:
            yield of(name, objective)
    if with_base:
        yield from BASE


def kept(own: Mapping[str, Any], key: str) -> Stored:
    """The moment under a key."""
    if key in own:
        moment: Stored = own[key]
        return moment
    return {"codes": own[f"{CODES}/{key}"], "scales": own[f"{SCALES}/{key}"]}


def keep(own: dict[str, Any], key: str, stored: Stored) -> None:
    """Put a moment under a key."""
    if isinstance(stored, dict):
        own[f"{CODES}/{key}"], own[f"{SCALES}/{key}"] = stored["codes"], stored["scales"]
    else:
        own[key] = stored


def zeros(param: Tensor, bits: int, map: Code) -> Stored:
    """A moment that is zero, distributed over ranks as the parameter is."""
    if bits == 32:
        return _zeros(param, precision(param))
    codes: Any = _zeros(param, map.dtype)
    there = local(codes)
    scales = torch.zeros(num_blocks(there), dtype=torch.float32, device=there.device)
    if there is not codes:
        shape = torch.Size(num_blocks(codes))
        placed = {"run_check": False, "shape": shape, "stride": (shape[1], 1)}
        scales = type(codes).from_local(scales, codes.device_mesh, codes.placements, **placed)
    return {"codes": codes, "scales": scales}


def _zeros(param: Tensor, dtype: torch.dtype) -> Tensor:
    if hasattr(param, "to_local") or not has_values(param):
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format, requires_grad=False)
    return torch.zeros(param.shape, dtype=dtype, device=param.device)  # plain, even for a subclass


def precision(param: Tensor) -> torch.dtype:
    """The precision of a parameter's steps, and of its moments unless they are in 8 bits."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """The number of rows in dimension 0, and of elements in each; a tensor of fewer than two dimensions is one row."""
    if tensor.ndim < 2:
        return 1, tensor.numel()
    return tensor.shape[0], math.prod(tensor.shape[1:])


def num_blocks(tensor: Tensor) -> tuple[int, int]:
    """The number of rows, and of blocks in each row, the last of which may be partial."""
    rows, length = rows_of(tensor)
    return rows, math.ceil(length / BLOCK)


def stored_bits(stored: Stored) -> int:
    """32 or 8; moments in fp64 count as 32."""
    return 8 if isinstance(stored, dict) else 32


def bits_of(param: Tensor, group: Mapping[str, Any], key: str) -> int:
    """In how many bits a parameter's moment is to be kept."""
    return 32 if rows_are_split(param) else bits_unless_split(param, group, key)


def bits_unless_split(param: Tensor, group: Mapping[str, Any], key: str) -> int:
    """The same, if no row of the parameter were split among ranks."""
    small = (param.ndim < 2 and not group["flat"]) or param.numel() < group["min_8bit_size"]
    if small or param.dtype == torch.float64:
        return 32
    return int(group["base_bits" if key in BASE else "delta_bits"])


def rows_are_split(param: Tensor) -> bool:
    """Whether ranks share a row, and so its blocks: else a rank's scales are a part of the whole's."""
    return bool(split_dimensions(param) - ({0} if param.ndim > 1 else set()))


def nbytes(param: Tensor, bits: int) -> int:
    """Bytes of one moment of a parameter."""
    return param.numel() * precision(param).itemsize if bits == 32 else param.numel() + 4 * math.prod(num_blocks(param))


def local(tensor: Any) -> Any:
    """A distributed tensor's part on this rank, also for each value of a dict; anything else as it is."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:
        return tensor
    if isinstance(tensor, dict):
        return {key: local(value) for key, value in tensor.items()}
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers: not on the meta device, nor if it is a fake tensor."""
    return tensor.device.type != "meta" and not isinstance(tensor, torch._subclasses.FakeTensor)


def dequantise(codes: Tensor, scales: Tensor, map: Code) -> Tensor:
    """(R, C) codes and their (R, blocks of C) scales → fp32 values."""
    return decode(codes.float(), scales.repeat_interleave(BLOCK, dim=1)[:, : codes.shape[1]], map)


def quantise_(codes: Tensor, scales: Tensor, values: Tensor, map: Code) -> None:
    """(R, C) fp32 values → codes and scales of the same rows, in place."""
    if not values.numel():
        return
    blocks = scales.shape[1]
    if blocks > 1:
        values = F.pad(values, (0, -values.shape[1] % BLOCK))
    grouped = values.reshape(len(values), blocks, -1)
    scales.copy_(grouped.abs().amax(2))
    codes.copy_(encode(grouped, scales[:, :, None], map).view(len(values), -1)[:, : codes.shape[1]])


def in_rows(tensor: Tensor) -> Tensor:
    """A row-major tensor as (R, C)."""
    return tensor.view(rows_of(tensor))


def converted(stored: Stored, param: Tensor, bits: int, map: Code) -> Stored:
    """A parameter's moment, converted to other bits if need be."""
    if stored_bits(stored) == bits:
        return stored
    result = zeros(param, bits, map)
    there, given = local(result), local(stored)
    if isinstance(given, dict):
        in_rows(there).copy_(dequantise(in_rows(given["codes"]), given["scales"], map))
    else:
        quantise_(in_rows(there["codes"]), there["scales"], in_rows(given.contiguous().float()), map)
    return result


def counter(param: Tensor) -> Tensor:
    """A new step counter: on the GPU for a parameter there, so that no step waits for the host, else on the CPU."""
    there = param.device if param.device.type == "cuda" else torch.device("cpu")
    return torch.zeros((), dtype=torch.int64, device=there)
