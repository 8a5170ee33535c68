"""Which part of a parameter this rank holds, where its elements lie in the whole, and which ranks hold a copy of it.

A distributed tensor's placements say for each dimension of its mesh whether the ranks along it split a dimension of the
tensor. They are read here alone. Any other parameter is one part, of which each rank has a copy.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Lines(NamedTuple):
    """Lines of equally many elements at equal distances in the whole parameter."""

    first: int  # where the first line begins in the whole, counted from the part's first element
    length: int  # elements of a line, which follow each other in the whole, too
    stride: int  # from the beginning of a line to that of the next, in the whole
    number: int


class Place(NamedTuple):
    """Where a part's elements lie in the whole parameter, both in row-major order."""

    first: int  # the index of its first element
    lines: tuple[Lines, ...]  # none if its elements follow each other in the whole, too


WHOLE = Place(0, ())


def split_dimensions(param: Any) -> set[int]:
    """The dimensions of a parameter that are split among ranks."""
    return set(_split(param).values())


def place_of(param: Any) -> Place:
    """Where this rank's part of a parameter lies."""
    if not _split(param):
        return WHOLE
    place = _place(param.shape, param.device_mesh, param.placements)
    held = param.to_local().numel()
    # FSDP2 splits what tensor parallelism split unevenly otherwise than its placements say.
    fits = held == sum(each.length * each.number for each in place.lines)
    return place if fits or not place.lines else place._replace(lines=())


def is_copied(param: Any, ranks: tuple[int, ...]) -> bool:
    """Whether some of these ranks may hold the same part: one outside of its mesh holds a part of one within."""
    return len(ranks) > _num_parts(param.device_mesh, tuple(_split(param)), ranks) if _split(param) else len(ranks) > 1


def in_whole(index: Tensor, lines: tuple[Lines, ...]) -> Tensor:
    """Where elements of a part lie in the whole, counted from the part's first element."""
    first, length, stride, number = torch.tensor(lines, dtype=torch.int64, device=index.device).unbind(1)
    ends = (length * number).cumsum(0)
    at = torch.searchsorted(ends, index, right=True)
    index = index - (ends - length * number)[at]
    return first[at] + index // length[at] * stride[at] + index % length[at]


def _split(param: Any) -> dict[int, int]:
    """The dimensions of a parameter's mesh along which it is split, each with the parameter's own dimension.

    A placement that splits has a `dim`; FSDP2 with tensor parallelism has one that does not call itself a shard.
    """
    placements = enumerate(getattr(param, "placements", ()))
    return {i: place.dim for i, place in placements if hasattr(place, "dim") and param.device_mesh.size(i) > 1}


@functools.lru_cache(maxsize=10_000)
def _place(shape: torch.Size, mesh: Any, placements: Any) -> Place:
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return WHOLE
    held = [torch.arange(size, dtype=torch.int64, device="cpu") for size in shape]  # indices along each dimension
    for i, placement in enumerate(placements):
        if hasattr(placement, "dim"):
            index = held[placement.dim].view(*(1,) * placement.dim, -1)
            chunks, _ = placement._split_tensor(index, mesh.size(i), with_padding=False)
            held[placement.dim] = chunks[coordinate[i]].reshape(-1)
    if not all(map(len, held)):
        return WHOLE
    last = max((d for d, size in enumerate(shape) if len(held[d]) < size), default=0)  # of those that are split
    runs = held[last].tensor_split((held[last].diff() != 1).nonzero().flatten() + 1)
    begins = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, some in zip(shape, [*held[:last], torch.stack([run[0] for run in runs])], strict=False):
        begins = (begins[:, None] * size + some).flatten()
    inner = math.prod(shape[last + 1 :])
    lengths = itertools.cycle([len(run) * inner for run in runs])
    lines: list[Lines] = []
    for begin, length in zip((begins * inner).tolist(), lengths, strict=False):
        now = lines[-1] if lines else Lines(0, 0, 0, 0)
        stride = now.stride if now.number > 1 else begin - now.first
        if length == now.length and begin == now.first + now.number * stride:
            lines[-1] = now._replace(stride=stride, number=now.number + 1)
        else:
            lines.append(Lines(begin, length, length, 1))
    first = lines[0].first
    relative = tuple(each._replace(first=each.first - first) for each in lines)
    return Place(first, () if len(lines) == lines[0].number == 1 else relative)


@functools.lru_cache(maxsize=10_000)
def _num_parts(mesh: Any, split: tuple[int, ...], ranks: tuple[int, ...]) -> int:
    """How many parts these ranks hold of a parameter that is split along some dimensions of a mesh."""
    coordinates = zip(itertools.product(*map(range, mesh.shape)), mesh.mesh.flatten().tolist(), strict=True)
    return len({tuple(coordinate[i] for i in split) for coordinate, rank in coordinates if rank in ranks})
