"""The rule in torch operations, slice by slice, on any device. Every other backend is tested against it.

The operations are those of `rule.update`, one by one, each writing into a buffer that is used again: a slice and its
buffers stay in the cache, and no operation allocates memory.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from .. import state
from ..parts import Lines, in_whole
from ..rule import Coefficients, Moments
from ..state import Code, Stored, code_of
from . import Item
from .source import rule_graph

# Elements updated at a time, a multiple of state.BLOCK. On a CPU a slice of this many stays in the cache through the
# rule's twenty-odd operations; elsewhere it bounds the temporaries.
CPU_SLICE = 2**17
DEVICE_SLICE = 2**22
# Python's operators have no `out`; the torch functions that they call do.
WITH_OUT = {operator.add: torch.add, operator.sub: torch.sub, operator.mul: torch.mul, operator.truediv: torch.div}


def missing(device_type: str) -> str | None:
    """Nothing: it runs everywhere."""
    return None


def finite(grads: Sequence[Tensor]) -> bool:
    """Whether every gradient and its square are finite, in fp64 for fp64 gradients and else in fp32."""
    largest = [torch.linalg.vector_norm(grad, torch.inf, dtype=state.precision(grad)) for grad in grads if grad.numel()]
    return all(bool((norm * norm).isfinite()) for norm in largest)


def step(items: Sequence[Item], coefficients: Tensor, seeds: Tensor) -> None:
    """One step of one objective on every item.

    Args:
        coefficients: (P, 16) fp64, row i is item i's `rule.Coefficients`.
        seeds: (P,) of each bf16 parameter's stochastic rounding; −1 to round it to the nearest.
    """
    exact = coefficients.tolist()
    rounded = coefficients.float().tolist()
    for i, (item, seed) in enumerate(zip(items, seeds.tolist(), strict=True)):
        item = flattened(item)
        dtype, device = state.precision(item.param), item.param.device
        row = Coefficients(*(exact if dtype == torch.float64 else rounded)[i])
        size = CPU_SLICE if device.type == "cpu" else DEVICE_SLICE
        _, _, num_buffers = _plan(with_base=item.base is not None)
        length = min(size, item.param.numel())
        buffers = [torch.empty(length, dtype=dtype, device=device) for _ in range(num_buffers)]
        for start, end in _slices(item, size):
            _step_slice(item, row, seed, start, end, [buffer[: end - start] for buffer in buffers])


def flattened(item: Item) -> Item:
    """The item with one-dimensional tensors, except codes and scales, which are in rows."""

    def flat(stored: Stored) -> Stored:
        if isinstance(stored, dict):
            return {"codes": state.in_rows(stored["codes"]), "scales": stored["scales"]}
        return stored.view(-1)

    delta, base = Moments(*map(flat, item.delta)), item.base and Moments(*map(flat, item.base))
    return Item(item.param.detach().view(-1), item.grad.detach().view(-1), delta, base, item.lines)


def _slices(item: Item, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `size` elements; with 8-bit codes, of whole rows or of whole blocks of one row."""
    numel = item.param.numel()
    codes = [moment["codes"] for moment in (*item.delta, *(item.base or ())) if isinstance(moment, dict)]
    length = codes[0].shape[1] if codes else numel
    if not numel:
        return
    if codes and length <= size:
        size -= size % length
    for first in range(0, numel, numel if not codes or length <= size else length):
        last = numel if not codes or length <= size else first + length
        for start in range(first, last, size):
            yield start, min(start + size, last)


def _step_slice(item: Item, c: Coefficients, seed: int, start: int, end: int, buffers: list[Tensor]) -> None:
    param, grad = item.param[start:end], item.grad[start:end]
    dtype = state.precision(param)
    moments = {"delta": item.delta, "base": item.base} if item.base else {"delta": item.delta}
    stored = [
        (moment, code_of(f"{kind}_{name}", with_base=item.base is not None))
        for kind, pair in moments.items()
        for name, moment in pair._asdict().items()
    ]
    values = [_read(moment, code, start, end) for moment, code in stored]
    operations, results, _ = _plan(with_base=item.base is not None)
    registers: list[Any] = [param.to(dtype), grad.to(dtype), *values, *c, *buffers]
    for operation in operations:
        arguments = [registers[i] for i in operation.arguments]
        named = {name: registers[i] for name, i in operation.named.items()}
        if operation.out is not None:
            named["out"] = registers[operation.out]
        registers[operation.result] = operation.function(*arguments, **named)
    new_param, *fresh = [registers[i] for i in results]
    if seed >= 0:
        new_param = stochastically_rounded(new_param, seed, start, item.lines)
    if new_param.data_ptr() != param.data_ptr():
        param.copy_(new_param)
    for (moment, code), new in zip(stored, fresh, strict=True):
        _write(moment, new, code, start, end)


class Operation(NamedTuple):
    """One operation of the rule: a function, the registers that it reads, and the one that it writes."""

    function: Callable[..., Any]
    arguments: tuple[int, ...]
    named: dict[str, int]
    out: int | None  # None: the result is a number, which needs no buffer
    result: int


@functools.cache
def _plan(*, with_base: bool) -> tuple[list[Operation], list[int], int]:
    """The rule's operations in order, the registers of its results, and how many buffers they need.

    An operation overwrites one of its inputs that nothing reads later: a buffer, a moment or the parameter, but not the
    gradient, which is the user's. If there is none, it writes into a free buffer.
    """
    graph, results = rule_graph(with_base=with_base)
    register: dict[Node, int] = {}  # of a node's value; operations that write in place share their input's
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    register.update({node: i for i, node in enumerate(inputs)})
    tensors = {node for node in inputs if node.name not in Coefficients._fields}
    uses = {node: len(node.users) + (node in results.values()) for node in graph.nodes}
    free: list[int] = []
    count, operations = len(inputs), []
    for node in (node for node in graph.nodes if node.op == "call_function"):
        read = [argument for argument in node.args if isinstance(argument, Node)]
        for used in read:
            uses[used] -= 1
        out, result = None, count
        if not tensors.isdisjoint(read):
            tensors.add(node)
            dying = [used for used in read if used in tensors and uses[used] == 0 and used.name != "grad"]
            spare = list(dict.fromkeys(register[used] for used in dying)) + free
            if not spare:
                spare, count = [count], count + 1
            out = result = spare.pop(0)
            free = spare
        else:
            count += 1
        register[node] = result
        named = {name: register[argument] for name, argument in node.kwargs.items()}
        function = WITH_OUT.get(node.target, node.target)
        operations.append(
            Operation(
                function if out is not None else node.target, tuple(register[n] for n in read), named, out, result
            )
        )
    return operations, [register[node] for node in results.values()], count - len(inputs)


def _read(stored: Stored, code: Code, start: int, end: int) -> Tensor:
    if isinstance(stored, Tensor):
        return stored[start:end]
    return state.dequantise(*_part(stored, start, end), code).reshape(-1)


def _write(stored: Stored, values: Tensor, code: Code, start: int, end: int) -> None:
    if isinstance(stored, Tensor):
        if stored[start:end].data_ptr() != values.data_ptr():  # else it was written in place
            stored[start:end] = values
    else:
        codes, scales = _part(stored, start, end)
        state.quantise_(codes, scales, values.view(codes.shape), code)


def _part(stored: dict[str, Tensor], start: int, end: int) -> tuple[Tensor, Tensor]:
    """The codes of some rows, or of some blocks of a row, and their scales."""
    length = stored["codes"].shape[1]
    (row, first), (last_row, last) = divmod(start, length), divmod(end - 1, length)
    rows, blocks = slice(row, last_row + 1), slice(first // state.BLOCK, last // state.BLOCK + 1)
    return stored["codes"][rows, first : last + 1], stored["scales"][rows, blocks]


def stochastically_rounded(values: Tensor, seed: int, start: int, lines: tuple[Lines, ...] = ()) -> Tensor:
    """fp32 values rounded to bf16: 16 random bits are added and the lower 16 bits cut, which keeps the mean.

    The random bits are a hash of the element's index in the whole parameter and the seed: the same whatever the
    backend, the slices and the ranks' parts.
    """
    index = torch.arange(start, start + len(values), dtype=torch.int64, device=values.device)
    if lines:
        index = in_whole(index, lines)
    noise = hashed(index + seed) & 0xFFFF
    bits = values.view(torch.int32).long() & 0xFFFFFFFF
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = torch.where(finite, bits + noise, bits) & 0xFFFF0000
    return rounded.to(torch.int32).view(torch.float32)


def hashed(x: Tensor) -> Tensor:
    """A 32-bit hash of the lower 32 bits of int64 numbers (`lowbias32` of Wellons' hash prospector)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
