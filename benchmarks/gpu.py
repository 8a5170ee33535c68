"""The GPU kernel on one NVIDIA GPU: that it is right, how near it comes to the memory's speed, and that nothing waits.

    python benchmarks/gpu.py               writes benchmarks/gpu.md, but for what a person reads in the numbers
    python benchmarks/gpu.py --tune        prints times of other block shapes
    python benchmarks/gpu.py --steps       only the unlearning steps, printed

It needs torch and triton, and no network. Bytes are those that a step moves: parameters and moments read and written,
gradients read twice, first to see whether they are finite. The copy bandwidth is measured in the same run.

An unlearning step is what `UnlearnTrainer` does in one, with this package's losses and a decoder of torch alone: the
loss, backward, clipping, the optimizer's step.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import itertools
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.decoder import Decoder, batch  # noqa: E402
from tests.reference.naive import NaiveDualOptim  # noqa: E402

from dualoptim.losses import LOSSES  # noqa: E402
from dualoptim.optim import DualOptimPlus, parameter_groups, releasing  # noqa: E402
from dualoptim.optim.backends import gpu  # noqa: E402

DEVICE = "cuda"
ROUNDS = 10
SCHEDULE = ("forget", "retain", "retain", "forget", "retain", "forget")
SIZES = (100_000_000, 500_000_000, 1_000_000_000, 2_000_000_000)
SHAPES_TRIED = ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8))  # rows of 256, warps
READING = "\n## Reading\n"
TARGETS = (
    "Targets: 32 bits at 85 % of the copy bandwidth or more, 8 bits no slower than 32 bits, "
    "no synchronization in a step."
)


def transformer(numel: int) -> list[tuple[int, ...]]:
    """A decoder's shapes of about so many parameters: grouped queries, gated feed-forward, norms, tied embedding."""
    hidden = next(h for h in (4096, 2048, 1024) if 50_000 * h + 12 * h * h <= numel or h == 1024)
    wide = 7 * hidden // 2
    layer = [(hidden, hidden), (hidden // 4, hidden), (hidden // 4, hidden), (hidden, hidden),
             (wide, hidden), (wide, hidden), (hidden, wide), (hidden,), (hidden,)]  # fmt: skip
    embedding = (49_152, hidden)
    size = sum(torch.Size(shape).numel() for shape in layer)
    layers = max(1, round((numel - 49_152 * hidden) / size))
    return [embedding, *layer * layers, (hidden,)]


def large(numel: int) -> list[tuple[int, ...]]:
    """Four tensors."""
    return [(numel // 4 // 1024, 1024)] * 4


LAYOUTS = {"transformer": transformer, "four tensors": large}


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Parameters with gradients."""
    made = [torch.nn.Parameter(0.02 * torch.randn(shape, device=DEVICE, dtype=dtype)) for shape in shapes]
    for param in made:
        param.grad = 1e-3 * torch.randn_like(param)
    return made


def optimizer(made: list[torch.nn.Parameter], bits: int, **settings: object) -> DualOptimPlus:
    """The one that is measured, all of its moments in so many bits."""
    return DualOptimPlus(made, lr=1e-5, base_bits=bits, delta_bits=bits, min_8bit_size=0, backend="gpu", **settings)


def milliseconds(step: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The median of some rounds, by the GPU's clock, after two to warm up."""
    times = []
    for _ in range(rounds + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A step as a CUDA graph, warmed up as torch's documentation says: by two steps; capturing takes none."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def copy_bandwidth() -> float:
    """Bytes per second of a copy of 4 GiB, or of what fits, read and written."""
    size = min(2**32, torch.cuda.mem_get_info()[0] // 4)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / (1e-3 * milliseconds(lambda: target.copy_(source), 20))


def check_naive() -> str:
    """Every step within what fp32 allows around the naive twin's fp64."""
    worst = 0.0
    for base_betas in ((0.9, 0.95), None):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(70_001, generator=generator)
        param = torch.nn.Parameter(start.to(DEVICE))
        settings = {"lr": 0.01, "betas": (0.9, 0.95), "base_betas": base_betas, "weight_decay": 0.1, "max_update": 1.0}
        opt = DualOptimPlus([param], lr_scales={"forget": 1.5}, backend="gpu", **settings)
        naive = NaiveDualOptim(start, lr_scales={"forget": 1.5}, **settings)
        common = torch.randn(start.shape, generator=generator)
        for objective in SCHEDULE:
            grad = common + torch.randn(start.shape, generator=generator)
            param.grad = grad.to(DEVICE)
            naive.param = param.detach().cpu().double()  # each step from where the kernel stands
            opt.step(objective=objective)
            naive.step(grad, objective)
            low, high = naive.interval()
            found = param.detach().cpu().double()
            outside = (low - found).clamp(min=0) + (found - high).clamp(min=0)
            worst = max(worst, float(outside.max()))
    return verdict(
        worst == 0, f"every 32-bit step lies within fp32's interval around the fp64 twin (outside: {worst:.1e})"
    )


def check_plain(bits: int, dtype: torch.dtype) -> str:
    """Beside the plain backend on the same GPU, with stochastic rounding where there is any."""
    results = []
    for backend in ("plain", "gpu"):
        generator = torch.Generator().manual_seed(1)
        shapes = ((7, 10_001), (32, 256), (3,))
        params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(DEVICE, dtype)) for n in shapes]
        opt = DualOptimPlus(params, lr=0.01, base_bits=bits, delta_bits=bits, backend=backend)
        for objective in SCHEDULE:
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(DEVICE, dtype)
            opt.step(objective=objective)
        results.append(torch.cat([param.detach().double().flatten() for param in params]))
    difference = (results[0] - results[1]).abs()
    close = float((difference <= 2 * torch.finfo(dtype).eps * results[0].abs() + 1e-5).double().mean())
    name = f"{bits} bits, {str(dtype).removeprefix('torch.')}"
    text = f"{name}: {close:.3%} of the parameters agree with the plain backend after {len(SCHEDULE)} steps"
    return verdict(close > 0.99, f"{text}, the largest difference is {float(difference.max()):.1e}")


def check_waiting(bits: int) -> Iterator[str]:
    """No synchronization, steps skipped on the device, and the same from a CUDA graph."""
    name = f"{bits} bits"
    made = parameters([(4096, 1024), (1024,), (333,)], torch.bfloat16)
    other = [torch.nn.Parameter(param.detach().clone()) for param in made]
    for param, copy in zip(made, other, strict=True):
        copy.grad = param.grad.clone()
    opts = [optimizer(made, bits), optimizer(other, bits)]
    for opt in opts:
        for objective in ("forget", "retain"):
            opt.step(objective=objective)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for opt in opts:
            for objective in ("forget", "retain"):
                opt.step(objective=objective)
        yield verdict(True, f"{name}: no synchronization in a step")
    except RuntimeError as error:
        yield verdict(False, f"{name}: a step waits for the host ({str(error).splitlines()[0]})")
    finally:
        torch.cuda.set_sync_debug_mode("default")

    graph = captured(lambda: opts[0].step(objective="retain"))
    for _ in range(5):
        graph.replay()
    for _ in range(2 + 5):
        opts[1].step(objective="retain")
    same = all(torch.equal(one, two) for one, two in zip(made, other, strict=True))
    yield verdict(same, f"{name}: five replays of a CUDA graph leave what five steps leave, bit for bit")

    before = [param.detach().clone() for param in made]
    made[0].grad[7, 7] = torch.inf
    graph.replay()
    made[0].grad[7, 7] = 0.0
    unchanged = all(torch.equal(one, two) for one, two in zip(made, before, strict=True))
    yield verdict(
        unchanged and opts[0].num_skipped["retain"] == 1, f"{name}: a step with an infinite gradient changes nothing"
    )


def verdict(passed: bool, text: str) -> str:
    """A line of the list of checks."""
    return f"- {'passed' if passed else 'FAILED'}: {text}"


def measured(layout: str, numel: int, dtype: torch.dtype, bandwidth: float) -> Iterator[str]:
    """Rows of the table: torch's fused AdamW, 32 bits and 8 bits on the same parameters."""
    shapes = LAYOUTS[layout](numel)
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    size = torch.finfo(dtype).bits // 8
    for bits in (None, 32, 8):
        gc.collect()
        torch.cuda.empty_cache()
        kept = {None: 2 * size, 32: 16, 8: 4 * (1 + 4 / 256)}[bits]  # one delta and the base, or AdamW's moments
        name = f"| {layout}, {len(shapes)} | {numel / 1e9:.2f} | {str(dtype).removeprefix('torch.')} | "
        name += "AdamW, fused" if bits is None else f"DualOptim+, {bits} bits"
        if numel * (2 * size + kept) * 1.05 > torch.cuda.mem_get_info()[0]:
            yield f"{name} | does not fit | | | | |"
            continue
        made = parameters(shapes, dtype)
        if bits is None:
            step: Callable[[], object] = torch.optim.AdamW(made, lr=1e-5, fused=True).step
        else:
            opt = optimizer(made, bits)

            def step(opt: DualOptimPlus = opt) -> None:
                opt.step(objective="retain")

        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        eager = milliseconds(step)
        peak = torch.cuda.max_memory_allocated()
        graph_text = ""
        if bits is not None:
            graph = captured(step)
            graph_text = f"{milliseconds(graph.replay):.2f}"
            del graph
        moved = numel * (2 * size + (1 if bits is None else 2) * size + 2 * kept)
        rate = moved / (1e-3 * eager)
        yield (
            f"{name} | {eager:.2f} | {graph_text} | {rate / 1e9:.0f} | {rate / bandwidth:.0%} "
            f"| {peak / 2**30:.2f} (+{(peak - before) / 2**20:.1f} MiB) |"
        )
        del step, made
        if bits is not None:
            del opt


def unlearning_step(name: str, rows: int, tokens: int, labelled: int) -> Callable[[], None]:
    """A step of NPO to forget or GD to keep, alternating, on a new model with a new optimizer."""
    torch.manual_seed(0)
    model = Decoder().to(DEVICE, torch.bfloat16 if "bf16" in name else torch.float32)
    given = batch(rows, tokens, labelled, 49_152, DEVICE)
    forget = {**given, "reference_log_probs": torch.full((rows,), -300.0, device=DEVICE)}
    turns = itertools.cycle((("forget", LOSSES["NPO"](), forget), ("retain", LOSSES["GD"](), given)))
    opt: torch.optim.Optimizer
    if own := name.startswith("DualOptim+"):
        bits = 8 if "8 bits" in name else 32
        opt = DualOptimPlus(parameter_groups(model), lr=1e-5, base_bits=bits, delta_bits=bits)
    else:
        opt = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        objective, loss, inputs = next(turns)
        of = {"objective": objective} if own else {}
        with torch.autocast("cuda", torch.bfloat16, enabled="bf16" not in name):
            value = loss(model, inputs)
        if "released" in name:
            with releasing(opt, **of):
                value.backward()
            return
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step(**of)
        opt.zero_grad()

    return step


def unlearning(rows: int = 16, tokens: int = 256, labelled: int = 64) -> Iterator[str]:
    """Rows of the table of unlearning steps."""
    for name in ("AdamW, fused", "DualOptim+, 32 bits", "DualOptim+, 8 bits", "DualOptim+, 8 bits, bf16, released"):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = unlearning_step(name, rows, tokens, labelled)
        time = milliseconds(step)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            step()
            torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchroniz" in str(each.message) for each in said)
        peak = torch.cuda.max_memory_allocated() / 2**30
        yield f"| {name} | {time:.1f} | {rows * tokens / (1e-3 * time):,.0f} | {peak:.2f} | {waits} |"


STEPS = (
    "",
    "## An unlearning step",
    "",
    "A decoder of SmolLM2-135M's dimensions, 16 rows of 256 tokens, 64 of them learned; NPO and GD alternating, bf16 "
    "autocast, gradients clipped (not where they are released). Waits are those for the host in one step: finding what "
    "is labeled takes some.",
    "",
    "| optimizer | ms a step | tokens a second | peak GiB | waits |",
    "|---|--:|--:|--:|--:|",
)


def tune() -> None:
    """Times of other block shapes, on half a billion parameters, from CUDA graphs."""
    for dtype in (torch.float32, torch.bfloat16):
        for bits in (32, 8):
            opt = optimizer(parameters(large(SIZES[1]), dtype), bits)
            for gpu.BLOCKS, gpu.WARPS in SHAPES_TRIED:
                graph = captured(lambda opt=opt: opt.step(objective="retain"))
                time = milliseconds(graph.replay)
                print(f"{dtype}, {bits} bits, BLOCKS {gpu.BLOCKS}, WARPS {gpu.WARPS}: {time:.2f} ms", flush=True)
                del graph
            del opt
            torch.cuda.empty_cache()


def main() -> int:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="print times of other block shapes and write nothing")
    parser.add_argument("--steps", action="store_true", help="print the unlearning steps alone and write nothing")
    given = parser.parse_args()
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        print(
            "This benchmark needs an NVIDIA GPU, a torch that sees it, and triton; there is none of one of them here."
        )
        return 2
    if (reason := gpu.missing("cuda")) is not None:
        print(f"The GPU backend does not run here: {reason}.")
        return 2
    if given.tune:
        tune()
        return 0
    if given.steps:
        print(*STEPS, *unlearning(), sep="\n")
        return 0
    import triton

    lines = [
        "# The GPU kernel: right, and how near to the memory's speed",
        "",
        f"{datetime.date.today().isoformat()}, {torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"triton {triton.__version__}. Made by",
        "",
        "    python benchmarks/gpu.py",
        "",
    ]

    def say(*some: str) -> None:
        lines.extend(some)
        print(*some, sep="\n", flush=True)

    say(check_naive())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bits in (32, 8):
            say(check_plain(bits, dtype))
    for bits in (32, 8):
        say(*check_waiting(bits))
    bandwidth = copy_bandwidth()
    say(
        "",
        f"Copy bandwidth in this run: {bandwidth / 1e9:.0f} GB/s. A program has {gpu.BLOCKS} blocks of 256 elements "
        f"and {gpu.WARPS} warps. Medians of {ROUNDS} rounds by the GPU's clock; "
        "bytes are those a step moves, the gradients' twice for DualOptim+, which first sees whether they are finite.",
        "",
        TARGETS,
        "",
        "| layout, tensors | 10⁹ parameters | parameters' type | optimizer | ms a step | ms from a CUDA graph | GB/s "
        "| of copy | peak GiB (of which the step's) |",
        "|---|--:|---|---|--:|--:|--:|--:|--:|",
    )
    for layout in LAYOUTS:
        for numel in SIZES:
            for dtype in (torch.float32, torch.bfloat16):
                for row in measured(layout, numel, dtype, bandwidth):
                    say(row)
    say(*STEPS)
    for row in unlearning():
        say(row)
    page = Path(__file__).with_suffix(".md")
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    reading = READING + before.partition(READING)[2] if READING in before else ""
    page.write_text("\n".join([*lines, ""]) + reading, encoding="utf-8")
    return int(any("FAILED" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
