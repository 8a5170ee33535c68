"""What a step reads and writes, looked through before anything is written.

Kernels go by addresses. So what they get is memory of its own, real, of one shape, on one device and in row-major
order; what is not, such as a view with gaps, is stepped as a copy and written back; what no step could mean is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .state import SCALES, has_values, local, num_blocks, precision

CODES = (torch.int8, torch.uint8)
PLAIN = (Tensor, nn.Parameter, nn.Buffer)  # of which the elements lie where `data_ptr` says


class Entry(NamedTuple):
    """One parameter's part in a step."""

    place: int  # among all parameters of the optimizer
    param: Tensor
    group: dict[str, Any]
    theta: Tensor  # the parameter's elements on this rank, in row-major order: itself or a copy
    grad: Tensor  # the gradient's, the same
    device: torch.device


def entry(
    place: int, name: str, param: Tensor, group: dict[str, Any], own: dict[str, Any], keys: Iterable[str]
) -> Entry:
    """A parameter with a gradient, ready to be stepped.

    Args:
        name: for the message.
        own: its state, with nothing in it before its first step.
        keys: the moments that the step will write.

    Raises:
        ValueError: parameter, gradient and moments do not go together, or have no memory that could be written.
    """
    given = param.grad
    assert given is not None
    if given.layout != torch.strided:  # else a step would be left half taken
        raise ValueError(f"the gradient of {name} is sparse, which is not supported; use embeddings with sparse=False")
    if param.is_complex():
        raise ValueError(f"{name} is complex, which is not supported; optimize torch.view_as_real(parameter)")
    theta, grad = local(param), local(given)
    device, shape = theta.device, theta.shape
    if grad.shape != shape or grad.device != device:
        raise ValueError(
            f"{name} has shape {tuple(shape)} on {device}, but its gradient {tuple(grad.shape)} on {grad.device}; "
            "make the gradient again after a parameter was changed"
        )
    dtype = precision(param)
    if has_values(theta):
        if theta.is_inference():
            raise ValueError(f"{name} was made in inference mode, so it cannot be trained; make it outside")
        if any(stride == 0 < size - 1 for stride, size in zip(theta.stride(), shape, strict=True)):
            raise ValueError(f"several elements of {name} share a place in memory; step the tensor that was expanded")
        if not _whole(theta) or not _whole(grad):
            raise ValueError(f"the memory of {name} or of its gradient was given back, so it cannot be stepped")
        theta = _in_order(theta)
        # A gradient of higher precision than its step is computed in is rounded first, as it may not be finite there.
        grad = _in_order(grad.to(dtype) if grad.dtype == torch.float64 else grad)
    for key in keys:
        if key in own:
            codes = f"{SCALES}/{key}" in own
            _ready(own, key, name, theta, shape, CODES if codes else (dtype,))
            if codes:
                _ready(own, f"{SCALES}/{key}", name, theta, num_blocks(theta), (torch.float32,))
    return Entry(place, param, group, theta, grad, device)


def _ready(
    own: dict[str, Any], key: str, name: str, theta: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Refuse a moment that does not fit its parameter; one that lies otherwise in memory is laid out anew."""
    moment = local(own[key])
    if (
        type(moment) is Tensor
        and moment.shape == shape
        and moment.dtype in dtypes
        and moment.device == theta.device
        and moment.is_contiguous()
        and _whole(moment)
        and not (moment.is_neg() or moment.is_inference())
    ):
        return
    found = f"{key!r} in its state is {tuple(moment.shape)} {moment.dtype} on {moment.device}"
    fitting = moment.shape == shape and moment.dtype in dtypes and moment.device == theta.device
    if not fitting or has_values(moment) != has_values(theta) or not _whole(moment):
        raise ValueError(
            f"{name} is {tuple(theta.shape)} {theta.dtype} on {theta.device}, but {found} and should be {tuple(shape)} "
            f"{' or '.join(map(str, dtypes))}; a parameter that was changed or moved after its first step needs its "
            "state changed alike, or a new optimizer"
        )
    if has_values(moment):
        if type(moment) is not Tensor:
            raise ValueError(f"{found}, a {type(moment).__name__}, where it should be a plain tensor ({name})")
        own[key] = own[key].resolve_neg().clone(memory_format=torch.contiguous_format)


def _whole(tensor: Tensor) -> bool:
    """Whether a tensor's elements lie within its memory; what is no plain tensor is read by torch, which knows."""
    if type(tensor) not in PLAIN:
        return True
    extent = tensor.numel()
    if extent and not tensor.is_contiguous():
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + extent) * tensor.itemsize if extent else True


def _in_order(tensor: Tensor) -> Tensor:
    """The elements in row-major order in memory of their own: the tensor itself where that is so."""
    if type(tensor) in PLAIN and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
