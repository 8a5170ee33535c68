"""Ten thousand steps of a tiny model: do memory, open files, threads and the time of a step stay as they are?

    python benchmarks/soak.py                  --steps 10000, a checkpoint each 100, a reading each 50
    python benchmarks/soak.py --objects        also which Python objects there are more of at the end
    python benchmarks/soak.py --bf16           under bf16 autocast; readings are printed alone
    python benchmarks/soak.py --page           only write the page of the last run

Processor time is taken, as other work on the machine changes every other. Linux alone. Writes benchmarks/soak.md,
whose last chapter, what a person reads in the numbers, is kept as it is.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from dualoptim import UnlearnTrainer, cli, tiny
from dualoptim.data import question
from dualoptim.evaluation.numbers import mean
from dualoptim.evaluation.scoring import negative_log_likelihoods
from dualoptim.losses import LOSSES
from dualoptim.one_run.watch import Watch
from dualoptim.optim import DualOptimPlus
from dualoptim.schedule import by_turns
from dualoptim.trainer import Objective

PAGE = Path(__file__).with_suffix(".md")
RECORD = Path("runs/soak.json")
READING = "\n## Reading\n"
NAMES = [a + b for a in "ABCDE" for b in "aeiouy"]
GROWTH = 0.02  # of the resident memory after the first tenth, that still counts as flat
SLOWER = 0.05  # of a step


class Reading(NamedTuple):
    """What the process holds after a step."""

    step: int
    resident: int
    files: int
    threads: int
    state: int  # bytes of the newest checkpoint's trainer_state.json
    saving: float  # seconds of processor time that the last checkpoint took


class Observe(TrainerCallback):
    """Reads the process after each step."""

    def __init__(self, folder: Path, every: int, *, objects: bool) -> None:
        self.folder, self.every, self.objects = folder, every, objects
        self.process, self.began, self.ended = psutil.Process(), 0.0, 0.0
        self.seconds: list[float] = []  # of processor time, each step
        self.readings: list[Reading] = []
        self.counted: list[Counter[str]] = []
        self.saving = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = time.process_time()
        self.seconds.append(self.ended - self.began)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saving = time.process_time() - self.ended
        if state.global_step % self.every:
            return
        path = self.folder / f"checkpoint-{state.global_step}" / "trainer_state.json"
        memory, files = self.process.memory_info().rss, self.process.num_fds()
        found = Reading(state.global_step, memory, files, self.process.num_threads(), path.stat().st_size, self.saving)
        self.readings.append(found)
        if self.objects and state.global_step in (state.max_steps // 10, state.max_steps):
            gc.collect()
            self.counted.append(Counter(type(each).__name__ for each in gc.get_objects()))
        print(*found, flush=True)


def soak(steps: int, *, objects: bool, bf16: bool) -> dict[str, Any]:
    """Train, and read the process: as the command does, which tells the allocator what suits it."""
    cli._suit_the_process()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # Of all lengths, so that batches have shapes of all kinds, which is what an allocator minds.
    forget, retain = (
        [question(f"Does {who}?", f"{who} {verb}s {' and '.join(['tea'] * n)}.") for n, who in enumerate(NAMES, 1)]
        for verb in ("hide", "like")
    )
    tiny.WIDTH, tiny.LAYERS = 64, 2
    model, tokenizer = tiny.build([*forget, *retain])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        observe = Observe(folder, max(100, steps // 100), objects=objects)

        class Bar:
            """Shows nothing."""

            n = 0

            def update(self, by: int) -> None:
                self.n += by

        def measure() -> dict[str, float]:
            rows = {"forget": forget, "retain": retain}
            return {name: mean(negative_log_likelihoods(model, tokenizer, each)) or 0.0 for name, each in rows.items()}

        watch = Watch(range(0, steps + 1, 100), measure, Bar(), None, None)  # type: ignore[arg-type]
        trainer = UnlearnTrainer(
            model,
            TrainingArguments(
                output_dir=place, learning_rate=1e-4, lr_scheduler_type="linear", logging_steps=10, save_steps=100,
                save_strategy="steps", save_total_limit=1, report_to="none", use_cpu=True, bf16=bf16,
                disable_tqdm=True, seed=0,
            ),
            objectives={
                "forget": Objective(forget, LOSSES["IDK"](), refusals=["I don't know.", "No idea."]),
                "retain": Objective(retain, LOSSES["GD"]()),
            },
            turns=by_turns({"forget": 1, "retain": 5}, 4, steps),
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=(DualOptimPlus, {"lr": 1e-4}),
            callbacks=[watch, observe],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        began = time.monotonic()
        trainer.train()
        lists = {
            "log_history": json.dumps(trainer.state.log_history),
            "readings of the diagnostics": json.dumps(trainer.diagnostics),
            "seconds of each step": json.dumps(watch.step_seconds),
        }
    more = (observe.counted[-1] - observe.counted[0]).most_common(8) if objects else []
    return {
        "steps": steps,
        "seconds": observe.seconds,
        "readings": observe.readings,
        "wall": time.monotonic() - began,
        "lists": {name: len(text) for name, text in lists.items()},
        "objects": more,
    }


def page(found: dict[str, Any]) -> str:
    """What it came to."""
    readings = [Reading(*each) for each in found["readings"]]
    steps, seconds = found["steps"], found["seconds"]
    tenth, minutes = steps // 10, found["wall"] / 60
    medians = [statistics.median(seconds[at : at + tenth]) for at in range(0, steps, tenth)]
    shown = [readings[0], *(r for r in readings if r.step % tenth == 0)]
    after = next(r for r in readings if r.step >= tenth)
    last = readings[-1]
    growth, slower = last.resident - after.resident, medians[-1] / medians[1] - 1
    flat, steady = growth <= GROWTH * after.resident, slower <= SLOWER
    return "\n".join(
        [
            "# Ten thousand steps",
            "",
            f"{datetime.date.today()}, torch {torch.__version__}, one thread, {minutes:.0f} minutes. Made by",
            "",
            f"    python benchmarks/soak.py --steps {steps}{' --objects' if found['objects'] else ''}",
            "",
            "DualOptim+, a Llama of two layers, four rows a step, of all lengths up to 70 tokens, a log entry each 10 "
            "steps, a reading of the diagnostics each 50, a point of the curve and a checkpoint, of which one is kept, "
            "each 100. The time of a step is processor time, the median of the tenth that ends there.",
            "",
            "| step | resident, MiB | open files | threads | step, ms | trainer_state.json, kB | saving, ms |",
            "|--:|--:|--:|--:|--:|--:|--:|",
            *(
                f"| {r.step} | {r.resident / 2**20:.1f} | {r.files} | {r.threads} | "
                f"{1000 * medians[max(0, r.step // tenth - 1)]:.2f} | {r.state / 1000:.0f} | {1000 * r.saving:.0f} |"
                for r in shown
            ),
            "",
            f"From step {after.step} on memory grew by {growth / 2**20:.1f} MiB, {growth / (steps - after.step):.0f} "
            f"bytes a step ({'flat' if flat else 'not flat'}: at most {GROWTH:.0%} are allowed). Open files "
            f"{'as they were' if last.files == after.files else 'more'}. Steps of the last tenth took {slower:+.1%} in "
            f"time beside those of the second ({'steady' if steady else 'not steady'}: at most {SLOWER:+.0%}).",
            "",
            "What grows with the steps, as JSON at the end: "
            + ", ".join(f"{name} {size / 1000:.0f} kB" for name, size in found["lists"].items())
            + ".",
            *(["", "More objects at the end than after a tenth: "
               + ", ".join(f"{name} {count}" for name, count in found["objects"]) + "."] if found["objects"] else []),
            "",
        ]
    )  # fmt: skip


def main() -> None:
    """Run it and write the page."""
    if os.environ.get("OMP_NUM_THREADS") != "1":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "OMP_NUM_THREADS": "1"})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--objects", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast; printed alone, without a page")
    parser.add_argument("--page", action="store_true", help="only write the page of the last run")
    chosen = parser.parse_args()
    if not chosen.page:
        RECORD.parent.mkdir(exist_ok=True)
        made = soak(chosen.steps, objects=chosen.objects, bf16=chosen.bf16)
        if chosen.bf16:
            return
        RECORD.write_text(json.dumps(made), encoding="utf-8")
    found = json.loads(RECORD.read_text(encoding="utf-8"))
    reading = PAGE.read_text(encoding="utf-8").partition(READING)[2] if PAGE.is_file() else ""
    PAGE.write_text(page(found) + (READING + reading if reading else ""), encoding="utf-8")


if __name__ == "__main__":
    main()
