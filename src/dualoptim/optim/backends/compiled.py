"""The rule as a CPU kernel: `kernel.cpp` with the traced rule written in, compiled on first use and kept in a cache.

One call of the kernel steps all parameters of one kind. The kernel does not depend on shapes, counters, learning rates
or objectives, so that it is not compiled again for them. A compilation takes a second or two; its result is kept in
$DUALOPTIM_CACHE, else in ~/.cache/dualoptim, under a name made of the source, the compiler and the processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from ...cache import cache_dir
from ...errors import UserError
from ..rule import Coefficients
from ..state import SIGNED, UNSIGNED, stored_bits
from . import Item, plain, rows
from .source import CPP, code_lines, rule_lines

SUPPORTED = {torch.float32: "float", torch.bfloat16: "bf16"}  # other parameters step by `plain`
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fPIC", "-shared")
# Tried in turn: some compilers have no OpenMP, and some processors no -march.
TUNING = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())

FAILURES = (OSError, subprocess.SubprocessError)  # of making a kernel

Kind = tuple[torch.dtype, torch.dtype, int, int]  # parameter, gradient, bits of the deltas, bits of the base or 0


def missing(device_type: str) -> str | None:
    """What the backend lacks to run, or None."""
    if device_type != "cpu":
        return f"it runs on a CPU, and the parameters are on {device_type}"
    if compiler() is None:
        return "there is no C++ compiler (none of $CXX, c++, g++, clang++)"
    try:
        library((torch.float32, torch.float32, 32, 32))
    except FAILURES as error:
        return _reason(error)
    return None


def finite(grads: Sequence[Tensor]) -> bool:
    """Whether every gradient and its square are finite in fp32."""
    for dtype in {grad.dtype for grad in grads}:
        some = [grad for grad in grads if grad.dtype == dtype]
        kernel = kernel_of((torch.float32, dtype, 32, 32))
        if kernel is None:
            found = plain.finite(some)
        else:
            pointers = (ctypes.c_void_p * len(some))(*(grad.data_ptr() for grad in some))
            numels = (ctypes.c_int64 * len(some))(*(grad.numel() for grad in some))
            largest = kernel.largest(pointers, numels, len(some), torch.get_num_threads())
            found = largest * largest < 2.0**128
        if not found:
            return False
    return True


def step(items: Sequence[Item], coefficients: Tensor, seeds: Tensor) -> None:
    """As `plain.step`."""
    kinds: dict[Kind | None, list[int]] = defaultdict(list)
    in_rows = [rows(item) for item in items]
    for i, (item, found) in enumerate(zip(items, in_rows, strict=True)):
        base_bits = 0 if item.base is None else stored_bits(item.base[0])
        bits = stored_bits(item.delta[0]), base_bits
        kinds[(item.param.dtype, item.grad.dtype, *bits) if found else None].append(i)
    kernels = {kind: None if kind is None else kernel_of(kind) for kind in kinds}  # compiled before anything is written
    for kind, indices in kinds.items():
        some, numbers, their_seeds = [items[i] for i in indices], coefficients[indices], seeds[indices]
        kernel = kernels[kind]
        if kernel is None:
            plain.step(some, numbers, their_seeds)
            continue
        pointers = [pointer for item in some for pointer in _pointers(item)]
        lengths, strides = zip(*(in_rows[i] for i in indices), strict=True)
        rounded = numbers.float()
        kernel.step(
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_int64 * len(some))(*(item.param.numel() for item in some)),
            (ctypes.c_int64 * len(some))(*lengths),
            (ctypes.c_int64 * len(some))(*strides),
            their_seeds.data_ptr(),
            rounded.data_ptr(),
            len(some),
            torch.get_num_threads(),
        )


def _pointers(item: Item) -> list[int | None]:
    """The addresses of an item's data, in the order of kernel.cpp's enum."""
    moments = [*item.delta, *(item.base or (None, None))]
    data = [moment["codes"] if isinstance(moment, dict) else moment for moment in moments]
    scales = [moment["scales"] if isinstance(moment, dict) else None for moment in moments]
    return [None if tensor is None else tensor.data_ptr() for tensor in (item.param, item.grad, *data, *scales)]


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first that is found."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)


def source(kind: Kind) -> str:
    """The kernel's source for one kind of parameter."""
    param, grad, delta_bits, base_bits = kind
    written = {
        "coefficients": "".join(
            f"const float {name} = coefficients[{i}]; " for i, name in enumerate(Coefficients._fields)
        ),
        "update": "".join(f"{line}; " for line in rule_lines(CPP, with_base=base_bits > 0, declare="const float ")),
    }
    if base_bits == 0:
        written["update"] += "const float new_base_exp_avg = 0.0f, new_base_exp_avg_sq = 0.0f; "
    for name, code in (("signed", SIGNED), ("unsigned", UNSIGNED)):
        for what in ("decode", "encode"):
            lines = code_lines(CPP, code, encoding=what == "encode", declare="const float ")
            written[f"{what}_{name}"] = "".join(f"{line}; " for line in lines)
    text = Path(__file__).with_name("kernel.cpp").read_text(encoding="utf-8")
    for name in sorted(written, key=len, reverse=True):
        text = text.replace(f"${name}", written[name])
    settings = {
        "PARAM": SUPPORTED[param],
        "GRAD": SUPPORTED[grad],
        "DELTA_BITS": delta_bits,
        "BASE_BITS": base_bits,
        "NUM_COEFFICIENTS": len(Coefficients._fields),
    }
    return "".join(f"#define {name} {value}\n" for name, value in settings.items()) + text


@functools.cache
def kernel_of(kind: Kind) -> ctypes.CDLL | None:
    """The compiled kernel for one kind of parameter; None where `plain` steps it, with a warning if it should not."""
    if kind[0] not in SUPPORTED or kind[1] not in SUPPORTED:
        return None
    try:
        return library(kind)
    except FAILURES as error:
        # The same words for every kind, so that Python shows them once.
        warnings.warn(
            f"dualoptim steps some parameters by plain torch operations, which are slower: {_reason(error)}",
            stacklevel=2,
        )
        return None


@functools.cache
def library(kind: Kind) -> ctypes.CDLL:
    """The compiled kernel for one kind of parameter, from the cache where it has been compiled before."""
    text = source(kind)
    path = compiler()
    assert path is not None
    refusal = ""
    for tuning in TUNING:
        # The predefined macros tell the compiler's version and the processor's features; a cache folder may be shared.
        probe = subprocess.run([path, *tuning, "-dM", "-E", "-x", "c++", "-"], input="", capture_output=True, text=True)
        if probe.returncode != 0:
            continue
        key = hashlib.sha256("\n".join([text, path, *FLAGS, *tuning, probe.stdout]).encode()).hexdigest()[:24]
        made = _cache_folder() / f"{key}.so"
        refusal = "" if made.is_file() else _compile(path, tuning, text, made)
        if not refusal:
            kernel = ctypes.CDLL(str(made))
            kernel.step.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64, ctypes.c_int]
            kernel.step.restype = None
            kernel.largest.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64, ctypes.c_int]
            kernel.largest.restype = ctypes.c_float
            return kernel
    raise OSError(refusal or "it knows none of the flags")


def _compile(path: str, tuning: Sequence[str], text: str, made: Path) -> str:
    """Compile, one process at a time, without ever leaving a partial file. Returns the compiler's error, if any."""
    partial = made.with_suffix(".partial")
    with FileLock(made.with_suffix(".lock")):
        if made.is_file():  # another process was faster
            return ""
        shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
        partial.mkdir(exist_ok=True)
        try:
            # In a folder of its own, since the compiler of a killed process may still be at work.
            folder = Path(tempfile.mkdtemp(dir=partial))
            written, out = folder / "kernel.cpp", folder / "kernel.so"
            written.write_text(text, encoding="utf-8")
            finished = subprocess.run(
                [path, *FLAGS, *tuning, str(written), "-o", str(out)], capture_output=True, text=True, timeout=300
            )
            if finished.returncode == 0:
                os.replace(out, made)
            errors = [line for line in finished.stderr.splitlines() if "error" in line] or ["no reason given"]
            return errors[0] if finished.returncode else ""
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _cache_folder() -> Path:
    """A folder that can be written to."""
    try:
        folder = cache_dir() / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, UserError):  # the latter where the user has no home
        pass
    return Path(tempfile.mkdtemp(prefix="dualoptim-kernels-"))


def _reason(error: Exception) -> str:
    """Why a kernel could not be made."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"the C++ compiler {compiler()} could not make the kernel ({first_line})"
