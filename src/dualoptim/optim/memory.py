"""What a step reads and writes, checked before anything is written.

Kernels work on addresses. So the tensors that they get must have real memory of their own, one shape, one device and
row-major order. Others, such as a view with gaps, are copied, and the copy is stepped and written back. What cannot be
stepped is refused.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, UntypedStorage, nn

from .state import BASE, CODES, SCALES, STEP, Stored, code_of, has_values, local, num_blocks, precision

SCALED = (torch.float32,)
PLAIN = (Tensor, nn.Parameter, nn.Buffer)  # types whose elements lie at their `data_ptr`


class Keys(NamedTuple):
    """The state's keys of a moment: in 32 bits the moment's, in 8 bits those of its codes and scales."""

    moment: str
    codes: str
    scales: str


def keys_of(moments: Sequence[str]) -> tuple[Keys, ...]:
    """Keys of moments in a parameter's state, made once for all parameters of a step."""
    return tuple(Keys(name, f"{CODES}/{name}", f"{SCALES}/{name}") for name in moments)


class Entry(NamedTuple):
    """One parameter's part in a step."""

    place: int  # among all parameters of the optimizer
    param: Tensor
    group: dict[str, Any]
    there: Tensor  # the parameter's elements on this rank
    theta: Tensor  # the same in row-major order: itself or a copy
    grad: Tensor  # the gradient's elements on this rank, in row-major order
    moments: list[Stored]  # those that the step writes, in the order of its keys; fewer before they are made
    real: bool  # whether the tensors hold values: not on the meta device, nor if they are fake


class Candidate(NamedTuple):
    """A parameter with a gradient."""

    place: int
    param: Tensor
    group: dict[str, Any]
    own: dict[str, Any]  # its state, with nothing in it before its first step
    keys: Sequence[Keys]  # of the moments that the step will write


def entries(candidates: Sequence[Candidate], name_of: Callable[[int], str]) -> list[Entry]:
    """Parameters with their gradients and moments, ready to be stepped.

    Args:
        name_of: a parameter's name for a message, from its place.

    Raises:
        ValueError: a parameter, its gradient and its moments do not fit together, or cannot be written.
    """
    as_they_are = [
        Entry(place, param, group, param, param, grad, [own[each.moment] for each in keys if each.moment in own], True)
        for place, param, group, own, keys in candidates
        if (grad := param.grad) is not None
    ]
    # Moments in 8 bits have other keys, so these entries lack them, and each parameter is checked by itself.
    whole = all(
        STEP not in each.own or (len(entry.moments) == len(each.keys) and has_base(each.own) == (len(each.keys) == 4))
        for entry, each in zip(as_they_are, candidates, strict=True)
    )
    return as_they_are if whole and _all_in_order(as_they_are) else [_entry(each, name_of) for each in candidates]


LAYOUT, DEVICE, DTYPE, SHAPE, NBYTES = map(operator.attrgetter, ("layout", "device", "dtype", "shape", "nbytes"))
COMMON = {torch.float32, torch.bfloat16, torch.float16}


def _all_in_order(some: Sequence[Entry]) -> bool:
    """Whether all can be stepped as they are. They nearly always can, and this takes a fraction of `_entry`'s time."""
    params, grads = [each.param for each in some], [each.grad for each in some]
    given = [*params, *grads]  # made by the caller, so of any kind; moments are made here
    moments: list[Any] = [moment for each in some for moment in each.moments]
    tensors = [*given, *moments]
    devices, shapes = set(map(DEVICE, tensors)), list(map(SHAPE, params))
    return (
        set(map(type, given)) <= set(PLAIN)
        and set(map(type, moments)) <= {Tensor}
        and set(map(LAYOUT, grads)) <= {torch.strided}
        and len(devices) == 1
        and "meta" not in {device.type for device in devices}
        and set(map(DTYPE, given)) <= COMMON
        and set(map(DTYPE, moments)) <= {torch.float32}
        and shapes == list(map(SHAPE, grads))
        and [shape for each, shape in zip(some, shapes, strict=True) for _ in each.moments] == list(map(SHAPE, moments))
        and all(map(Tensor.is_contiguous, tensors))
        and all(map(Tensor.data_ptr, tensors))
        and not any(map(Tensor.is_neg, given))
        and not any(map(Tensor.is_inference, given))
        and all(map(operator.le, _ends(tensors), map(UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors))))
    )


def _ends(tensors: Sequence[Tensor]) -> Iterable[int]:
    """Where contiguous tensors end in their memory, in bytes."""
    offsets, sizes = list(map(Tensor.storage_offset, tensors)), list(map(NBYTES, tensors))
    if not any(offsets):
        return sizes
    return [offset * tensor.itemsize + size for tensor, offset, size in zip(tensors, offsets, sizes, strict=True)]


def _entry(candidate: Candidate, name_of: Callable[[int], str]) -> Entry:
    """One parameter's part in a step: what does not fit is converted or copied, and refused if that is impossible."""
    place, param, group, own, keys = candidate

    def name() -> str:
        return name_of(place)

    given = param.grad
    assert given is not None
    if given.layout is not torch.strided:
        raise ValueError(
            f"the gradient of {name()} is {'sparse' if 'sparse' in str(given.layout) else given.layout}, which is not "
            "supported; use embeddings with sparse=False"
        )
    if not param.is_floating_point() or not given.is_floating_point():
        raise ValueError(
            f"{name()} is {param.dtype} and its gradient {given.dtype}, of which no step can be taken; both must be "
            "floating-point numbers"
        )
    if STEP in own and has_base(own) != (group["base_betas"] is not None):
        raise ValueError(
            f"the group of {name()} had its base_betas turned {'off' if has_base(own) else 'on'} after its first step; "
            "turn them back, or begin with a new optimizer"
        )
    placed, wanted = getattr(given, "placements", None), getattr(param, "placements", None)
    if placed is not None and wanted is not None and placed != wanted:  # as tensor parallelism leaves it
        given = cast(Any, given).redistribute(cast(Any, param).device_mesh, wanted)
    theta, grad = there, _ = local(param), local(given)
    device, shape = theta.device, theta.shape
    if grad.shape != shape or grad.device != device:
        raise ValueError(
            f"{name()} has shape {tuple(shape)} on {device}, but its gradient {tuple(grad.shape)} on {grad.device}; "
            "make the gradient again after a parameter was changed"
        )
    dtype = precision(param)
    real = (type(theta) in PLAIN and device.type != "meta") or has_values(theta)
    if real:
        if theta.is_inference():
            raise ValueError(f"{name()} was made in inference mode, so it cannot be trained; make it outside")
        if not _lies_in_order(theta):
            theta = _in_order(theta, name)
        # A gradient of another precision, such as fp64 in an fp32 step, is rounded first, as it may overflow.
        if grad.dtype not in COMMON and grad.dtype is not dtype:
            grad = grad.to(dtype)
        if not _lies_in_order(grad):
            grad = _in_order(grad, name, written=False)
    moments: list[Stored] = []
    for key, codes_key, scales_key in keys:
        if key in own:
            moments.append(_ready(own, key, shape, (dtype,), theta, device, real, name))
        elif codes_key in own:
            if dtype is not torch.float32:
                raise ValueError(
                    f"{name()} is {param.dtype}, but its moments are in 8 bits; make a new optimizer for it"
                )
            signed = code_of(key, with_base=group["base_betas"] is not None).dtype
            codes = _ready(own, codes_key, shape, (signed,), theta, device, real, name)
            scales = _ready(own, scales_key, torch.Size(num_blocks(theta)), SCALED, theta, device, real, name)
            moments.append({"codes": codes, "scales": scales})
    kinds = [isinstance(moment, dict) for moment in moments]
    if len(moments) == len(keys) and (kinds[0] != kinds[1] or kinds[-2] != kinds[-1]):
        raise ValueError(
            f"{name()} has one moment of a pair in 8 bits and the other in 32; make a new optimizer for it"
        )
    return Entry(place, param, group, there, theta, grad, moments, real)


def _ready(
    own: dict[str, Any],
    key: str,
    shape: torch.Size,
    dtypes: tuple[torch.dtype, ...],
    theta: Tensor,
    device: torch.device,
    real: bool,
    name: Callable[[], str],
) -> Tensor:
    """A moment that fits its parameter, copied if it is not in row-major order; refused if it does not fit."""
    moment: Tensor = local(own[key])
    fitting = moment.shape == shape and moment.dtype in dtypes and moment.device == device
    if fitting and type(moment) is Tensor and _lies_in_order(moment) and not moment.is_inference():
        return moment
    found = f"{key!r} in its state is {tuple(moment.shape)} {moment.dtype} on {moment.device}"
    if not fitting or has_values(moment) != real or (real and type(moment) is Tensor and not _whole(moment)):
        raise ValueError(
            f"{name()} is {tuple(theta.shape)} {theta.dtype} on {theta.device}, but {found} and should be "
            f"{tuple(shape)} {' or '.join(map(str, dtypes))}; a parameter that was changed or moved after its first "
            "step needs its state changed alike, or a new optimizer"
        )
    if real:
        if type(moment) is not Tensor:
            raise ValueError(f"{found}, a {type(moment).__name__}, where it should be a plain tensor ({name()})")
        own[key] = own[key].resolve_neg().clone(memory_format=torch.contiguous_format)
        return local(own[key])
    return moment


def _lies_in_order(tensor: Tensor) -> bool:
    """Whether a tensor is a plain one whose memory holds its elements' values in row-major order."""
    return (
        type(tensor) in PLAIN
        and tensor.is_contiguous()
        and (tensor.data_ptr() != 0 or not tensor.numel())
        and not tensor.is_neg()
        and tensor.nbytes + tensor.storage_offset() * tensor.itemsize <= tensor.untyped_storage().nbytes()
    )


def has_base(own: dict[str, Any]) -> bool:
    """Whether a state was made with a base."""
    return BASE[0] in own or f"{CODES}/{BASE[0]}" in own


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether several elements of a tensor may share a place in memory."""
    reached = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reached:
                return True
            reached += (size - 1) * stride
    return False


def overlapping(ready: Sequence[Entry]) -> bool:
    """Whether parameters may share memory, such as two views of one tensor."""
    plain = [each.there for each in ready if type(each.there) in PLAIN]
    starts = list(map(Tensor.data_ptr, plain))
    spans = sorted(zip(starts, map(operator.add, starts, map(_reach, plain)), strict=True))
    return any(end > start for (_, end), (start, _) in itertools.pairwise(spans))


def _reach(tensor: Tensor) -> int:
    """The memory from a tensor's first element to its last, in bytes."""
    return tensor.nbytes if tensor.is_contiguous() else _extent(tensor) * tensor.itemsize


def _extent(tensor: Tensor) -> int:
    """The memory from a tensor's first element to its last, in elements."""
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _whole(tensor: Tensor) -> bool:
    """Whether a plain tensor's elements lie within its memory, in whatever order."""
    end = (tensor.storage_offset() + _extent(tensor)) * tensor.itemsize
    return not tensor.numel() or end <= tensor.untyped_storage().nbytes()


def _in_order(tensor: Tensor, name: Callable[[], str], *, written: bool = True) -> Tensor:
    """A copy of the elements in row-major order."""
    if written and _overlaps_itself(tensor):
        raise ValueError(f"several elements of {name()} share a place in memory; step the tensor that was expanded")
    if type(tensor) in PLAIN and not _whole(tensor):
        raise ValueError(f"the memory of {name()} or of its gradient was given back, so it cannot be stepped")
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
