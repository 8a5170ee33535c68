"""Does a run on two ranks end as it does in one process, on every engine, stopped and resumed or not?

    python benchmarks/engines.py             all engines that are installed, about ten minutes on two cores
    python benchmarks/engines.py --only ddp  one of them, printed alone

Two gloo ranks on a CPU, where accelerate is told of DeepSpeed's ranks by this script, which it is not by itself. Writes
benchmarks/engines.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "src")]
from tests import engines  # noqa: E402

PAGE = Path(__file__).with_suffix(".md")
ENGINES: dict[str, dict[str, str]] = {
    "DDP": {"engine": "ddp"},
    "FSDP2, sharded": {"engine": "plugin"},
    "FSDP2, full": {"engine": "plugin", "kind": "FULL"},
    "fully_shard by hand": {"engine": "hand"},
    "DeepSpeed ZeRO-1": {"engine": "zero-1"},
    "DeepSpeed ZeRO-2": {"engine": "zero-2"},
    "DeepSpeed ZeRO-3": {"engine": "zero-3"},
}
CASES = [
    {"bits": bits, "accumulation": accumulation, "lora": lora, "forget": "NPO" if lora else "IDK"}
    for lora, bits, accumulation in itertools.product((False, True), (32, 8), (2, 4))
]


def key(case: dict[str, Any]) -> str:
    """A case's name, of its files too."""
    adapter = "adapter" if case["lora"] else "all weights"
    return f"{adapter}, {case['bits']} bits, accumulation {case['accumulation'] // 2}"


def kept(run: Any, out: Path, begun: int) -> None:
    """Leave what a run came to, and at which step it began."""
    trained = engines.weights(run)
    if run.is_world_process_zero():
        torch.save((trained, begun), out)


def trained(folder: Path, out: Path, resume: Path | None, **options: Any) -> None:
    """Train, or go on from a checkpoint; what is refused is left as a text."""
    begun = engines.Begun()
    run = engines.trainer(folder, **options, callbacks=[begun], save_strategy="no" if resume else "steps")
    try:
        run.train(None if resume is None else str(resume))
    except ValueError as error:
        torch.save(str(error), out)
        return
    kept(run, out, begun.step)


def work(name: str, folder: Path) -> None:
    """On a rank: every case of an engine; alone, the same in one process and from the ranks' checkpoints."""
    options = ENGINES[name]
    if options["engine"].startswith("zero"):
        engines.deepspeed_on_cpu()
    for case in CASES:
        own, alone = folder / name / key(case), folder / "one" / key(case)
        own.mkdir(parents=True, exist_ok=True)
        at = f"checkpoint-{engines.SAVED}"
        trained(own / "run", own / "straight", None, **options, **case)
        trained(own / "run", own / "2 → 2", own / "run" / at, **options, **case)
        trained(own / "run", own / "1 → 2", alone / "run" / at, **options, **case)
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


def start(name: str, folder: Path) -> None:
    """Two ranks of an engine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    told = [*launcher, __file__, "--work", name, "--folder", str(folder)]
    done = subprocess.run(told, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-4000:]}")


def cell(path: Path, expected: torch.Tensor, moved: float, begun: int = 0) -> str:
    """How far a run is off one that was never stopped, as a share of the farthest that a weight moved."""
    found = torch.load(path)
    if isinstance(found, str):
        return "refused"
    assert found[1] == begun, (path, found[1])
    return f"{float((found[0] - expected).abs().max()) / moved:.1e}"


def rows_of(name: str, folder: Path) -> list[str]:
    """The table's lines of an engine."""
    start(name, folder)
    lines = []
    for case in CASES:
        own, alone = folder / name / key(case), folder / "one" / key(case)
        trained(own / "run", own / "2 → 1", own / "run" / f"checkpoint-{engines.SAVED}", engine="plain", **case)
        expected, moved = torch.load(alone / "straight")[0], torch.load(alone / "moved")
        ours = torch.load(own / "straight")[0]
        cells = [
            cell(own / "straight", expected, moved),
            cell(own / "2 → 2", ours, moved, engines.SAVED),
            cell(own / "2 → 1", ours, moved, engines.SAVED),
            cell(own / "1 → 2", expected, moved, engines.SAVED),
        ]
        lines.append(f"| {name} | {key(case)} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Run all, print a line for each case, and write the page."""
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--only", choices=sorted({options["engine"] for options in ENGINES.values()}))
    told.add_argument("--work", help=argparse.SUPPRESS)
    told.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = told.parse_args()
    if given.work:
        return work(given.work, given.folder)
    began = time.perf_counter()
    torch.set_num_threads(1)
    installed = importlib.util.find_spec("deepspeed") is not None
    head = ["| engine | | 2 ranks, 1 process | 2 → 2 | 2 → 1 | 1 → 2 |", "|---|---|--:|--:|--:|--:|"]
    lines = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for case in CASES:
            own = folder / "one" / key(case)
            own.mkdir(parents=True)
            run = engines.trainer(own / "start", "plain", **case)
            begun = engines.weights(run)
            trained(own / "run", own / "straight", None, engine="plain", **case)
            torch.save(float((torch.load(own / "straight")[0] - begun).abs().max()), own / "moved")
        for name, options in ENGINES.items():
            if options["engine"] == (given.only or options["engine"]) and (installed or "DeepSpeed" not in name):
                lines += rows_of(name, folder)
    if given.only:
        return None
    packages = ["torch", "transformers", "accelerate", "peft", *(["deepspeed"] if installed else [])]
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    text = f"""# Two ranks of every engine

{datetime.date.today()}, {versions}, two gloo ranks on a CPU, {(time.perf_counter() - began) / 60:.0f} minutes. Made by

    python benchmarks/engines.py

DualOptim+ (ε 1e-2), clipping at 1.0, a Llama of two layers in fp32, alternating 1:2, {engines.STEPS} steps of 8 rows, a
checkpoint after {engines.SAVED}. With an adapter the forget loss is NPO, whose reference is the model without it.

- *2 ranks, 1 process*: the largest difference of a weight between the run on two ranks and the run of one process on
  the same rows, as a share of the farthest that a weight moved;
- *2 → 2*, *2 → 1*: the same between a run that went on from the checkpoint of two ranks, on two or in one process
  without any engine, and the run on two ranks that was never stopped;
- *1 → 2*: between a run of two ranks that went on from the checkpoint of one process, and that process never stopped.

{chr(10).join(head + lines)}

DeepSpeed flattens parameters, so that a block of 8 bits has other elements in it than in one process: its two runs in 8
bits are two roundings of one run. Its checkpoints are read by it alone, on as many ranks, and it reads no others.
"""
    PAGE.write_text(text, encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
