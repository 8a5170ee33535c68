"""Time and memory of one optimizer step on the shapes of SmolLM2-135M, against torch's fused AdamW in the same run.

    python benchmarks/optimizer_step.py        writes benchmarks/optimizer_step.md

Steps are interleaved, so that what else the machine does falls on all alike; medians and minima of the rounds. Memory
is the growth of the resident peak over a step, in a process that does nothing else.
"""

from __future__ import annotations

import datetime
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dualoptim import DualOptim, DualOptimPlus, runs

ROUNDS = 15
LAYERS, HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 30, 576, 1536, 192, 49152


def parameters() -> list[torch.nn.Parameter]:
    """SmolLM2-135M's 134.5 million parameters with gradients, filled with noise."""
    layer = [(HIDDEN, HIDDEN), (KEY_VALUE, HIDDEN), (KEY_VALUE, HIDDEN), (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN),
             (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE), (HIDDEN,), (HIDDEN,)]  # fmt: skip
    made = [
        torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in [(VOCABULARY, HIDDEN), *layer * LAYERS, (HIDDEN,)]
    ]
    for parameter in made:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return made


def steppers(made: list[torch.nn.Parameter]) -> dict[str, Callable[[], object]]:
    """What is timed: one step each."""
    plus, unbounded, dual = DualOptimPlus(made), DualOptimPlus(made, max_update=None), DualOptim(made)
    return {
        "torch AdamW, fused": torch.optim.AdamW(made, fused=True).step,
        "torch AdamW, foreach": torch.optim.AdamW(made, foreach=True).step,
        "DualOptim, plain": lambda: dual.step(objective="retain"),
        "DualOptim+, plain": lambda: plus.step(objective="retain"),
        "DualOptim+, plain, max_update=None": lambda: unbounded.step(objective="retain"),
    }


def peak_growth(queue: multiprocessing.Queue) -> None:
    """Bytes by which a DualOptim+ step raises the resident peak, once its states exist."""
    opt = DualOptimPlus(parameters())
    for objective in ("forget", "retain"):
        opt.step(objective=objective)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        opt.step(objective="retain")
    queue.put(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def main() -> None:
    """Measure, print and write."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak_growth, args=(queue,))
    process.start()
    growth = queue.get()
    process.join()

    timed = steppers(parameters())
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for step in timed.values():
        step()  # makes the states
    for _ in range(ROUNDS):
        for name, step in timed.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    fused = seconds["torch AdamW, fused"]
    lines = [
        "| per step | median | minimum | of fused AdamW, medians | of fused AdamW, minima |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, values in seconds.items():
        median, least = statistics.median(values), min(values)
        ratios = f"{median / statistics.median(fused):.2f} | {least / min(fused):.2f}"
        lines.append(f"| {name} | {1e3 * median:.0f} ms | {1e3 * least:.0f} ms | {ratios} |")
    environment = runs.environment()
    text = "\n".join(
        [
            "# One optimizer step on SmolLM2-135M's parameters",
            "",
            f"{datetime.date.today().isoformat()}, {environment['processor']}, {environment['threads']} threads, "
            f"torch {environment['versions']['torch']}, {ROUNDS} interleaved rounds. Made by",
            "",
            "    python benchmarks/optimizer_step.py",
            "",
            *lines,
            "",
            f"Temporaries: a step raises the resident peak by {growth / 2**20:.1f} MiB, beside "
            f"{runs.bytes_text(24 * sum(p.numel() for p in parameters()))} of states (24 bytes a parameter).",
            "",
        ]
    )
    print(text)
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
