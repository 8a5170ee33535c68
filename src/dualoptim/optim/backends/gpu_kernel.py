"""The Triton kernel: loads, stores and rounding by hand, the mathematics from the traced rule.

A program steps a few blocks of one tensor, each of up to 256 elements of one row. It reads from tables which tensor and
blocks are its own and where their data are, so that one launch steps any number of tensors. Addresses from the table
are made pointers here.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterable
from typing import Any

import triton
import triton.language as tl

from ..rule import Coefficients
from ..state import SIGNED, UNSIGNED
from .source import TRITON, code_lines, rule_lines

# The columns of a tensor's row in the table, in gpu.py's order: param, grad, the four moments (delta, base), their four
# scales, the number of elements, that of a row, from a row to the next in the whole parameter, the row of its
# coefficients and its first program.
WIDTH = 15


# Functions that the dialect calls


@triton.jit
def quotient(x, y):
    """x / y, rounded as a division is, for a y that many elements share: one division serves all of them."""
    inverse = 1.0 / y
    estimate = x * inverse
    return tl.fma(tl.fma(-estimate, y, x), inverse, estimate)


@triton.jit
def nearest(x):
    """The nearest whole number, ties to even, of a number below 2^22: adding 1.5 · 2^23 leaves no fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def signed_like(size, sign):
    """A magnitude with another number's sign."""
    return tl.where(sign < 0, -size, size)


@triton.jit
def lerped(start, end, weight):
    """torch.lerp, which starts from the nearer end."""
    difference = end - start
    return tl.where(weight < 0.5, tl.fma(weight, difference, start), tl.fma(weight - 1.0, difference, end))


@triton.jit
def clamped(x, low, high):
    """x, clamped to two bounds; a NaN stays one."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def larger(x, y):
    """The larger of two numbers."""
    return tl.where(x < y, y, x)


@triton.jit
def sign_of(x):
    """1, 0 or −1."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def root4(x):
    """x^(1/4)."""
    return tl.sqrt(tl.sqrt(x))


# Functions written from the traced rule


def _written(name: str, arguments: Iterable[str], lines: Iterable[str], results: str) -> Any:
    """A @triton.jit function of these lines. Triton reads a function's source, so linecache is given it."""
    body = "".join(f"    {line}\n" for line in [*lines, f"return {results}"])
    text = f"@triton.jit\ndef {name}({', '.join(arguments)}):\n{body}"
    file = f"<dualoptim rule: {name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), globals())
    return globals()[name]


_DELTA, _BASE = ("delta_exp_avg", "delta_exp_avg_sq"), ("base_exp_avg", "base_exp_avg_sq")
updated_with_base = _written(
    "updated_with_base",
    ("param", "grad", *_DELTA, *_BASE, "at"),
    [f"{name} = tl.load(at + {i})" for i, name in enumerate(Coefficients._fields)] + rule_lines(TRITON, with_base=True),
    ", ".join(f"new_{name}" for name in ("param", *_DELTA, *_BASE)),
)
updated = _written(
    "updated",
    ("param", "grad", *_DELTA, "at"),
    [f"{name} = tl.load(at + {i})" for i, name in enumerate(Coefficients._fields)]
    + rule_lines(TRITON, with_base=False),
    ", ".join(f"new_{name}" for name in ("param", *_DELTA)),
)
decoded_signed = _written("decoded_signed", ("x", "scale"), code_lines(TRITON, SIGNED, encoding=False), "result")
decoded_unsigned = _written("decoded_unsigned", ("x", "scale"), code_lines(TRITON, UNSIGNED, encoding=False), "result")
encoded_signed = _written("encoded_signed", ("x", "scale"), code_lines(TRITON, SIGNED, encoding=True), "result")
encoded_unsigned = _written("encoded_unsigned", ("x", "scale"), code_lines(TRITON, UNSIGNED, encoding=True), "result")


# Memory


@triton.jit
def pointer(at, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """An address in the table as a pointer. If it is known to be aligned, 16 bytes are read at a time."""
    found = tl.load(at).to(tl.pointer_type(KIND))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def read(at, scales_at, offsets, mask, rows, rows_mask, BITS: tl.constexpr, SIGN: tl.constexpr, ALIGNED: tl.constexpr):
    """A moment's block in fp32."""
    if BITS == 32:
        return tl.load(pointer(at, tl.float32, ALIGNED) + offsets, mask=mask, other=0.0)
    scale = tl.load(pointer(scales_at, tl.float32, False) + rows, mask=rows_mask, other=0.0)
    if SIGN:
        codes = tl.load(pointer(at, tl.int8, ALIGNED) + offsets, mask=mask, other=0)
        return decoded_signed(codes.to(tl.float32), scale)
    codes = tl.load(pointer(at, tl.uint8, ALIGNED) + offsets, mask=mask, other=0)
    return decoded_unsigned(codes.to(tl.float32), scale)


@triton.jit
def write(
    values,
    at,
    scales_at,
    offsets,
    mask,
    rows,
    rows_mask,
    BITS: tl.constexpr,
    SIGN: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write a moment's block back in the bits that it is kept in."""
    if BITS == 32:
        tl.store(pointer(at, tl.float32, ALIGNED) + offsets, values, mask=mask)
    else:
        scale = tl.max(tl.abs(values), axis=1)[:, None]
        tl.store(pointer(scales_at, tl.float32, False) + rows, scale, mask=rows_mask)
        if SIGN:
            codes = encoded_signed(values, scale).to(tl.int32).to(tl.int8)
            tl.store(pointer(at, tl.int8, ALIGNED) + offsets, codes, mask=mask)
        else:
            codes = encoded_unsigned(values, scale).to(tl.int32).to(tl.uint8)
            tl.store(pointer(at, tl.uint8, ALIGNED) + offsets, codes, mask=mask)


@triton.jit
def to_bf16(values, in_whole, seed):
    """fp32 → bf16, to the nearest, ties to even, or stochastically, as `plain.stochastically_rounded`."""
    x = (in_whole + seed).to(tl.uint32)
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    noise = (x ^ (x >> 16)) & 0xFFFF
    bits = values.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    added = tl.where(seed >= 0, noise, ((bits >> 16) & 1) + 0x7FFF)
    kept = tl.where((bits & 0xFFFF) != 0, bits | 0x400000, bits)  # a NaN stays one
    return (tl.where(finite, bits + added, kept) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def step_block(
    table,
    owners,
    coefficients,
    seeds,
    proceed,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    DELTA_BITS: tl.constexpr,
    BASE_BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_COEFFICIENTS: tl.constexpr,
):
    """One program: some blocks of a tensor, unless the step is to be skipped."""
    if tl.load(proceed) == 0:
        return
    program = tl.program_id(0)
    at = table + tl.load(owners + program).to(tl.int64) * WIDTH
    numel = tl.load(at + 10)
    length = tl.load(at + 11)
    if ALIGNED:
        length = tl.multiple_of(length, 16)
    place = tl.load(at + 13)
    rows = (program - tl.load(at + 14)) * BLOCKS + tl.arange(0, BLOCKS)[:, None]  # of the scales, one for each block
    per_row = (length + 255) // 256
    row = rows // per_row
    columns = (rows - row * per_row) * 256 + tl.arange(0, 256)[None, :]
    offsets = row * length + columns
    rows_mask = row * length < numel
    mask = rows_mask & (columns < length)

    theta = pointer(at, PARAM, ALIGNED) + offsets
    param = tl.load(theta, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(pointer(at + 1, GRAD, ALIGNED) + offsets, mask=mask, other=0.0).to(tl.float32)
    # A delta's second moment has a sign with a base, where it is a difference, and none without: `state.code_of`.
    mean = read(at + 2, at + 6, offsets, mask, rows, rows_mask, DELTA_BITS, True, ALIGNED)
    square = read(at + 3, at + 7, offsets, mask, rows, rows_mask, DELTA_BITS, BASE_BITS != 0, ALIGNED)
    own = coefficients + place * NUM_COEFFICIENTS
    if BASE_BITS != 0:
        base_mean = read(at + 4, at + 8, offsets, mask, rows, rows_mask, BASE_BITS, True, ALIGNED)
        base_square = read(at + 5, at + 9, offsets, mask, rows, rows_mask, BASE_BITS, False, ALIGNED)
        param, mean, square, base_mean, base_square = updated_with_base(
            param, grad, mean, square, base_mean, base_square, own
        )
        write(base_mean, at + 4, at + 8, offsets, mask, rows, rows_mask, BASE_BITS, True, ALIGNED)
        write(base_square, at + 5, at + 9, offsets, mask, rows, rows_mask, BASE_BITS, False, ALIGNED)
    else:
        param, mean, square = updated(param, grad, mean, square, own)
    write(mean, at + 2, at + 6, offsets, mask, rows, rows_mask, DELTA_BITS, True, ALIGNED)
    write(square, at + 3, at + 7, offsets, mask, rows, rows_mask, DELTA_BITS, BASE_BITS != 0, ALIGNED)
    if tl.bfloat16 == PARAM:
        in_whole = row * tl.load(at + 12) + columns
        tl.store(theta, to_bf16(param, in_whole, tl.load(seeds + place)), mask=mask)
    else:
        tl.store(theta, param.to(PARAM), mask=mask)
