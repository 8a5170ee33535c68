"""Time and memory of one optimizer step on the shapes of SmolLM2-135M, beside torch's AdamW and 8-bit ones.

    pip install --no-deps bitsandbytes torchao     the rivals; one that is not there is listed as not measured
    python benchmarks/optimizer_step.py            writes benchmarks/optimizer_step.md
    python benchmarks/optimizer_step.py --quick    small shapes, two rounds, writes nothing

Steps are interleaved, so that what else the machine does falls on all alike; medians and minima of the rounds. All
states together would not fit into a small machine's memory, so the optimizers are timed in groups, each in a process of
its own with torch's fused AdamW among them: every ratio is that to the fused steps of the same rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import gc
import importlib.metadata
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from dualoptim import DualOptim, DualOptimPlus, runs
from dualoptim.optim.memory import Entry, overlapping
from dualoptim.optim.state import BASE, DELTA


class Shapes(NamedTuple):
    """Of a language model of the Llama kind with tied embeddings."""

    layers: int
    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int


SMOLLM2 = Shapes(30, 576, 1536, 192, 49152)
QUICK = Shapes(1, 1024, 1024, 1024, 1024)  # all matrices alike: torchao compiles for every shape
SETTINGS = {"lr": 1e-5, "weight_decay": 0.01}
BITS_8 = {"base_bits": 8, "delta_bits": 8}
SIZES = (1, 4, 16, 64, 128, 500)  # millions of parameters
ALONE = 128  # millions of parameters above which a size is measured in a process of its own

Parameters = list[torch.nn.Parameter]


def parameters(shapes: Shapes, dtype: torch.dtype) -> Parameters:
    """A model's parameters with gradients, filled with noise."""
    hidden, inner, key_value = shapes.hidden, shapes.intermediate, shapes.key_value
    layer = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden), (inner, hidden),
             (inner, hidden), (hidden, inner), (hidden,), (hidden,)]  # fmt: skip
    every = [(shapes.vocabulary, hidden), *layer * shapes.layers, (hidden,)]
    made = [torch.nn.Parameter((0.02 * torch.randn(shape)).to(dtype)) for shape in every]
    for parameter in made:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return made


def dual(cls: type[DualOptimPlus], **arguments: Any) -> Callable[[Parameters], torch.optim.Optimizer]:
    """One of ours, to be made for parameters."""
    return lambda made: cls(made, **SETTINGS, **arguments)


def adamw(**arguments: Any) -> Callable[[Parameters], torch.optim.Optimizer]:
    """torch's AdamW, to be made for parameters."""
    return lambda made: torch.optim.AdamW(made, **SETTINGS, **arguments)


def bitsandbytes(made: Parameters) -> torch.optim.Optimizer:
    """The AdamW of bitsandbytes with 8-bit states."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(made, **SETTINGS)


def torchao(name: str) -> Callable[[Parameters], torch.optim.Optimizer]:
    """An AdamW of torchao, to be made for parameters. It compiles itself in its first step."""

    def make(made: Parameters) -> torch.optim.Optimizer:
        import torchao.optim

        return getattr(torchao.optim, name)(made, **SETTINGS)

    return make


FUSED, FOREACH = "torch AdamW, fused", "torch AdamW, foreach"
PLUS, PLUS_8, PLUS_8_BF16 = (
    "DualOptim+, compiled, 32-bit",
    "DualOptim+, compiled, 8-bit",
    "DualOptim+, compiled, 8-bit, bf16",
)
PLUS_PLAIN, PLUS_UNBOUNDED = "DualOptim+, plain, 32-bit", "DualOptim+, compiled, 32-bit, max_update=None"
DUAL, DUAL_8 = "DualOptim, compiled, 32-bit", "DualOptim, compiled, 8-bit"
BITSANDBYTES, TORCHAO, TORCHAO_FP8 = "bitsandbytes AdamW8bit", "torchao AdamW8bit", "torchao AdamWFp8"

MAKERS: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    FUSED: adamw(fused=True),
    FOREACH: adamw(foreach=True),
    PLUS: dual(DualOptimPlus, backend="compiled"),
    PLUS_8: dual(DualOptimPlus, backend="compiled", **BITS_8),
    PLUS_8_BF16: dual(DualOptimPlus, backend="compiled", **BITS_8),
    PLUS_UNBOUNDED: dual(DualOptimPlus, backend="compiled", max_update=None),
    PLUS_PLAIN: dual(DualOptimPlus, backend="plain"),
    DUAL: dual(DualOptim, backend="compiled"),
    DUAL_8: dual(DualOptim, backend="compiled", delta_bits=8),
    BITSANDBYTES: bitsandbytes,
    TORCHAO: torchao("AdamW8bit"),
    TORCHAO_FP8: torchao("AdamWFp8"),
}
# Each with the fused AdamW added, and a rival with our 8-bit step too, which it is held against.
GROUPS = [
    [PLUS, PLUS_8, PLUS_8_BF16, PLUS_UNBOUNDED],
    [FOREACH, PLUS_PLAIN, DUAL, DUAL_8],
    [BITSANDBYTES],
    [TORCHAO],
    [TORCHAO_FP8],
]
RIVALS = (BITSANDBYTES, TORCHAO, TORCHAO_FP8)


class Row(NamedTuple):
    """What was measured of one optimizer, or why nothing was."""

    seconds: list[float]  # of each round
    fused: list[float]  # the fused AdamW's in the same rounds
    ours: list[float]  # our 8-bit step's in the same rounds, or none
    elements: int = 0
    state_bytes: int = 0
    growth: int | None = None  # bytes by which a step raises the resident memory while it runs
    reason: str = ""

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios to the fused AdamW."""
        return statistics.median(a / b for a, b in zip(self.seconds, self.fused, strict=True))


def reason(error: BaseException) -> str:
    """An error in a few words, for a cell of a table."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    first = (str(error).strip().splitlines() or [""])[0].replace("|", "/")
    return f"{type(error).__name__}: {first[:100]}" if first else type(error).__name__


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, found in a new process, whose memory is given back at its end."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def seconds_of(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def step_of(opt: torch.optim.Optimizer, objective: str = "retain") -> Callable[[], object]:
    """One step of any of the optimizers."""
    return functools.partial(opt.step, objective=objective) if isinstance(opt, DualOptimPlus) else opt.step


def measure(names: Sequence[str], shapes: Shapes, rounds: int) -> dict[str, Row]:
    """Time some optimizers and the fused AdamW, interleaved, then the memory of each."""
    names = [*dict.fromkeys([FUSED, *([PLUS_8] if set(names) & set(RIVALS) else []), *names])]
    sets: dict[torch.dtype, Parameters] = {}
    made: dict[str, Parameters] = {}
    timed: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}
    for name in names:
        dtype = torch.bfloat16 if name == PLUS_8_BF16 else torch.float32
        if dtype not in sets:
            sets[dtype] = parameters(shapes, dtype)
        made[name] = sets[dtype]
        try:
            timed[name] = step_of(MAKERS[name](made[name]))
            for _ in range(2):  # makes the states and compiles
                timed[name]()
        except Exception as error:
            failed[name] = reason(error)
            timed.pop(name, None)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name in timed:
            seconds[name].append(seconds_of(timed[name]))
    timed.clear()  # and the states with them
    rows = {}
    for name in names:
        if name in failed:
            rows[name] = Row([], [], [], reason=failed[name])
            continue
        try:
            measured = memory(MAKERS[name](made[name]))
        except Exception as error:
            rows[name] = Row([], [], [], reason=reason(error))
            continue
        elements = sum(parameter.numel() for parameter in made[name])
        rows[name] = Row(seconds[name], seconds.get(FUSED, []), seconds.get(PLUS_8, []), elements, *measured)
    return rows


def memory(opt: torch.optim.Optimizer) -> tuple[int, int | None]:
    """Bytes of an optimizer's states, and bytes by which a step raises the resident memory once they exist."""
    for objective in ("forget", "retain"):
        step_of(opt, objective)()
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        # Or temporaries would go unseen in memory that earlier steps' were freed to and the allocator has kept.
        ctypes.CDLL(None).malloc_trim(0)
    growth = None
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
        before = status_bytes("VmHWM")
        for _ in range(2):
            step_of(opt)()
        growth = status_bytes("VmHWM") - before
    except OSError:
        pass  # not a Linux
    # A storage once, however many tensors or parameters share it.
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors(opt.state)}
    return sum(storage.nbytes() for storage in storages.values()), growth


def status_bytes(name: str) -> int:
    """A figure of this process that Linux keeps."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors with data in a state, those inside tensor subclasses too."""
    if isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors(entry)
    elif hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from tensors(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value


def share_of_check(shapes: Shapes, rounds: int) -> float:
    """The part of a 32-bit step's time in which parameters, gradients and moments are looked through, the median.

    By the difference to gathering the same tensors without a look at them, each right after a step, when nothing of
    them is in the processor's cache. Both then read the addresses, which every step needs.
    """
    opt = MAKERS[PLUS](parameters(shapes, torch.float32))
    assert isinstance(opt, DualOptimPlus)
    step, names = step_of(opt), [*(f"{name}/retain" for name in DELTA), *BASE]

    def gathered() -> list[Entry]:
        return [
            Entry(i, p, group, p, p, p.grad, [opt.state[p][name] for name in names], True)
            for group in opt.param_groups
            for i, p in enumerate(group["params"])
        ]

    def look() -> list[Entry]:
        ready = opt._entries("retain")
        assert not overlapping(ready)
        return ready

    def addresses(made: Callable[[], list[Entry]]) -> list[int]:
        return [t.data_ptr() for each in made() for t in (each.theta, each.grad, *each.moments)]

    for _ in range(2):
        step()
    shares = []
    for _ in range(rounds):
        whole, looked = seconds_of(step), seconds_of(lambda: addresses(look))
        step()
        shares.append((looked - seconds_of(lambda: addresses(gathered))) / whole)
    return statistics.median(shares)


def by_size(cases: Sequence[tuple[int, int]], rounds: int) -> dict[tuple[int, int], str]:
    """Nanoseconds per parameter of a DualOptim+ step with one objective, or why not, by millions and bits."""
    noise = torch.randn(1000, 1000)
    found = {}
    for millions, bits in cases:
        gc.collect()
        needed = millions * 1_000_000 * (8 + (16 if bits == 32 else 5)) + 2**29
        available = psutil.virtual_memory().available
        if available < needed:
            found[millions, bits] = (
                f"not measured: needs {runs.bytes_text(needed)}, {runs.bytes_text(available)} available"
            )
            continue
        try:
            made = [torch.nn.Parameter(0.02 * noise) for _ in range(millions)]
            for parameter in made:
                parameter.grad = 1e-3 * noise
            opt = DualOptimPlus(made, **SETTINGS, backend="compiled", base_bits=bits, delta_bits=bits)
            for _ in range(2):
                opt.step(objective="retain")
            # Small sizes take more steps: one of a millisecond is at the mercy of whatever else runs.
            steps = range(rounds * max(1, min(10, 16 // millions)))
            median = statistics.median(seconds_of(step_of(opt)) for _ in steps)
            found[millions, bits] = f"{1e3 * median / millions:.2f}"
            del made, opt, parameter
        except Exception as error:
            found[millions, bits] = f"not measured: {reason(error)}"
    return found


def first_steps(bits: int, cache: str) -> list[float]:
    """Seconds of making an optimizer of a small model with its first step, then of a second: torch's, then ours."""
    os.environ["DUALOPTIM_CACHE"] = cache
    made = parameters(QUICK, torch.float32)
    seconds = []
    for make in (MAKERS[FUSED], dual(DualOptimPlus, backend="compiled", base_bits=bits, delta_bits=bits)):
        began = time.perf_counter()
        opt = make(made)
        step_of(opt)()
        seconds.append(time.perf_counter() - began)
        seconds.append(seconds_of(step_of(opt)))
    return seconds


def steps_table(rows: Mapping[str, Row]) -> list[str]:
    """The optimizers beside each other."""
    lines = [
        "| per step | median | minimum | of fused AdamW | state per parameter | temporaries |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        if row.reason:
            lines.append(f"| {name} | not measured: {row.reason} | | | | |")
            continue
        growth = "not measured"
        if row.growth is not None:
            growth = f"{row.growth / 2**20:.1f} MiB, {100 * row.growth / row.state_bytes:.1f} %"
        ratio = f"{row.ratio:.2f} ×" if row.fused else "not measured"
        lines.append(
            f"| {name} | {milliseconds(statistics.median(row.seconds))} | {milliseconds(min(row.seconds))} | "
            f"{ratio} | {row.state_bytes / row.elements:.2f} B | {growth} |"
        )
    return lines


def milliseconds(seconds: float) -> str:
    """A time for a table."""
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.1f} ms"


def sizes_table(millions: Sequence[int], rounds: int) -> list[str]:
    """The time per parameter over the number of parameters."""
    lines = [
        "| ns per parameter | " + " | ".join(f"{size} M" for size in millions) + " |",
        "|---|" + "--:|" * len(millions),
    ]
    cases = [(size, bits) for bits in (32, 8) for size in millions]
    found: dict[tuple[int, int], str] = {}
    for some in ([case for case in cases if case[0] <= ALONE], *([case] for case in cases if case[0] > ALONE)):
        try:
            found.update(alone(by_size, some, rounds))
        except Exception as error:  # a process that the system ended, say
            found.update(dict.fromkeys(some, f"not measured: {reason(error)}"))
    for bits in (32, 8):
        lines.append(
            f"| DualOptim+, compiled, {bits}-bit | " + " | ".join(found[size, bits] for size in millions) + " |"
        )
    return lines


def cold_table(every_bits: Sequence[int]) -> list[str]:
    """First steps with an empty and a filled cache of kernels."""
    lines = [
        "| | first step, empty cache | first step, filled cache | second step |",
        "|---|--:|--:|--:|",
    ]
    for bits in every_bits:
        try:
            with tempfile.TemporaryDirectory() as cache:
                (*_, cold, _), (theirs, their_second, warm, second) = (
                    alone(first_steps, bits, cache) for _ in range(2)
                )
        except Exception as error:
            lines.append(f"| DualOptim+, compiled, {bits}-bit | not measured: {reason(error)} | | |")
            continue
        if bits == every_bits[0]:
            lines.append(f"| {FUSED} | – | {theirs:.2f} s | {milliseconds(their_second)} |")
        lines.append(f"| DualOptim+, compiled, {bits}-bit | {cold:.2f} s | {warm:.2f} s | {milliseconds(second)} |")
    return lines


def targets(rows: Mapping[str, Row], check: float | None) -> list[str]:
    """What was aimed at, beside what was measured."""

    def line(what: str, value: float | None, unit: str, met: Callable[[float], bool]) -> str:
        if value is None:
            return f"- {what}: not measured"
        return f"- {what}: {value:.2f} {unit}, {'met' if met(value) else 'missed'}"

    def ratio(name: str) -> float | None:
        return rows[name].ratio if rows[name].seconds and rows[name].fused else None

    lines = [
        line("32-bit step, compiled, at most 1.75 × fused AdamW", ratio(PLUS), "×", lambda x: x <= 1.75),
        line(
            "the look at memory before a step, at most 2 % of a compiled 32-bit step",
            None if check is None else 100 * check,
            "%",
            lambda x: x <= 2,
        ),
    ]
    for rival, times_as_fast in ((BITSANDBYTES, 4.5), (TORCHAO, 4.0)):
        row = rows[rival]
        pairs = list(zip(row.seconds, row.ours, strict=True)) if row.ours else []
        times = statistics.median(theirs / own for theirs, own in pairs) if pairs else None
        lines.append(
            line(
                f"8-bit step at least {times_as_fast:g} times as fast as {rival}",
                times,
                "times",
                lambda x, aim=times_as_fast: x >= aim,
            )
        )
    lines.append(line("32-bit step, plain, at most 5 × fused AdamW", ratio(PLUS_PLAIN), "×", lambda x: x <= 5))
    state = rows[PLUS_8].state_bytes / rows[PLUS_8].elements if rows[PLUS_8].elements else None
    lines.append(line("8-bit state at most 6.2 bytes per parameter", state, "bytes", lambda x: x <= 6.2))
    ours = [row for name, row in rows.items() if name.startswith("DualOptim") and row.growth is not None]
    worst = max((100 * row.growth / row.state_bytes for row in ours if row.growth is not None), default=None)
    lines.append(line("temporaries of any DualOptim at most 5 % of its state", worst, "%", lambda x: x <= 5))
    return lines


def version(name: str) -> str:
    """A rival's version, for the head of the results."""
    try:
        return f", {name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each; a third of them for the rivals")
    parser.add_argument("--quick", action="store_true", help="small shapes, two rounds; writes no file")
    options = parser.parse_args(arguments)
    rounds = 2 if options.quick else options.rounds
    rival_rounds = max(2, rounds // 3)  # they take seconds a step
    shapes = QUICK if options.quick else SMOLLM2
    # Small states fit together into one process, and processes are what takes the time then.
    groups = [[name for group in GROUPS for name in group]] if options.quick else GROUPS

    rows: dict[str, Row] = {}
    fused: list[str] = []
    for group in groups:
        print(f"measuring {', '.join(group)} …", file=sys.stderr)
        try:
            found = alone(measure, group, shapes, rival_rounds if set(group) <= set(RIVALS) else rounds)
        except Exception as error:
            found = {name: Row([], [], [], reason=reason(error)) for name in group}
        for name in (FUSED, *group):
            if name in found:
                rows.setdefault(name, found[name])  # the fused AdamW's own row is the first group's
        if FUSED in found and found[FUSED].seconds:
            fused.append(f"{1e3 * statistics.median(found[FUSED].seconds):.0f}")
    rows = {name: rows[name] for name in MAKERS if name in rows}
    print("measuring the look at memory …", file=sys.stderr)
    try:
        check: float | None = alone(share_of_check, shapes, 3 * rounds)
    except Exception:
        check = None
    print("measuring sizes …", file=sys.stderr)
    sizes = sizes_table(SIZES[:2] if options.quick else SIZES, rounds)
    print("measuring first steps …", file=sys.stderr)
    cold = cold_table((32,) if options.quick else (32, 8))

    environment = runs.environment()
    versions = f"torch {environment['versions']['torch']}{version('bitsandbytes')}{version('torchao')}"
    small = sum(parameter.numel() for parameter in parameters(QUICK, torch.float32))
    elements = next((row.elements for row in rows.values() if row.elements), 0)
    text = "\n".join(
        [
            "# One optimizer step on " + ("small parameters" if options.quick else "SmolLM2-135M's parameters"),
            "",
            f"{datetime.date.today().isoformat()}, {environment['processor']}, {environment['threads']} threads, "
            f"{versions}, {elements / 1e6:.1f} M parameters, {rounds} interleaved rounds, {rival_rounds} in the "
            "rivals' groups. Made by",
            "",
            f"    python benchmarks/optimizer_step.py{' --quick' if options.quick else ''}"
            f"{f' --rounds {rounds}' if rounds != 15 and not options.quick else ''}",
            "",
            *steps_table(rows),
            "",
            "Parameters and gradients are fp32, except in the row that says bf16. The ratio is the median of the "
            "rounds' ratios to the fused AdamW in fp32 of the same round; its medians were "
            f"{', '.join(fused) or 'not measured'} ms in the groups. States are those of two objectives for ours, of "
            "one for the others. Temporaries: how far a step raises the resident memory while it runs, and beside the "
            "state.",
            "",
            "Targets:",
            "",
            *targets(rows, check),
            "",
            "## By the number of parameters",
            "",
            *sizes,
            "",
            "fp32 parameters in tensors of 1 M elements, one objective, median.",
            "",
            "## First step of a process",
            "",
            *cold,
            "",
            f"With the making of the optimizer, on {small / 1e6:.1f} M parameters; an empty cache means that kernels "
            "are compiled. torch's AdamW comes first in each process: the first optimizer of any kind makes torch "
            "import parts of itself.",
            "",
        ]
    )
    print(text)
    if not options.quick:
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
