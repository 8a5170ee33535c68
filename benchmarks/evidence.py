"""When do shared optimizer states help? The runs of evidence/plan.md, and the page that is made of them.

    python benchmarks/evidence.py run --data-dir FOLDER --only tune      choose each method's rate, on its own split
    python benchmarks/evidence.py run --data-dir FOLDER --only report --shard 1/2
    python benchmarks/evidence.py page                                   write evidence.md from the raw results
    python benchmarks/evidence.py --check                                fail where evidence.md is not what they make

FOLDER holds TOFU's files. Each run leaves a line in evidence/tiny.jsonl and is not done twice, so that a run that was
cut off goes on, and any number of processes share the plan.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

HERE = Path(__file__).parent
RAW = HERE / "evidence" / "tiny.jsonl"
sys.path.insert(0, str(HERE))

BASE: dict[str, Any] = {
    "model": "tiny", "memorise": True, "task": "tofu", "retain_loss": "GD", "ratio": "1:5", "batch_size": 6,
    "betas": (0.9, 0.95), "save_model": False, "curve_points": 0, "fast": True, "bf16": False, "score_bf16": False,
}  # fmt: skip
TASK = {"split": "forget01", "retain_rows": 60, "held_out_rows": 60, "scored_rows": 40}
TUNED_ON, REPORTED = (6,), (1, 2, 3, 4, 5)  # parts of forget01: two authors, forty rows each
SEEDS = (0, 1)
RATES = (1e-4, 2e-4, 4e-4, 7e-4, 1.2e-3, 2e-3)
LONG_RATES = (5e-5, *RATES)  # the larger budget wants smaller ones
LOSSES = ("NPO", "IDK", "SimNPO", "ME")
SHORT, LONG = 48, 240  # optimizer steps
PLUS: dict[str, Any] = {"optimizer": "DualOptim+"}
METHODS: dict[str, dict[str, Any]] = {
    "Joint AdamW": {"optimizer": "AdamW", "joint": True},
    "Alternating AdamW": {"optimizer": "AdamW"},
    "PDU": {"optimizer": "AdamW", "joint": True, "retain_bound": 0.3, "multiplier_lr": 5.0},
    "DualOptim": {"optimizer": "DualOptim"},
    "DualOptim+": PLUS,
    "DualOptim+, no bound": {**PLUS, "max_update": None},
    "DualOptim+ 8-bit": {**PLUS, "base_bits": 8, "delta_bits": 8},
    "equal base": {**PLUS, "variant": {"weights": "equal"}},
    "base_weights equal": {**PLUS, "base_weights": "equal"},
    "half the drift": {**PLUS, "variant": {"drift": 0.5}},
    "own v": {**PLUS, "variant": {"second": "own"}},
    "mean v": {**PLUS, "variant": {"second": "mean"}},
    "max v": {**PLUS, "variant": {"second": "max"}},
    "equal base, mean v": {**PLUS, "variant": {"weights": "equal", "second": "mean"}},
    "own m, one v": {**PLUS, "variant": {"drift": 0.0, "second": "all"}},
}
MAIN = ("Joint AdamW", "Alternating AdamW", "PDU", "DualOptim", "DualOptim+", "equal base", "base_weights equal")
LASTING = ("Alternating AdamW", "DualOptim", "DualOptim+", "equal base", "base_weights equal")  # with the large budget
RULES = tuple(METHODS)[5:]  # what else changes in the rule: asked with one loss and the small budget


class Cell(NamedTuple):
    """One method under one loss and budget: what a rate is chosen for."""

    loss: str
    steps: int
    method: str


def cells() -> list[Cell]:
    """All that is asked, the questions that matter most first."""
    found = [Cell("NPO", SHORT, method) for method in MAIN]
    found += [Cell("NPO", SHORT, method) for method in RULES]
    found += [Cell("IDK", SHORT, method) for method in MAIN]
    found += [Cell("NPO", LONG, method) for method in LASTING]
    found += [Cell(loss, SHORT, method) for loss in LOSSES[2:] for method in MAIN]
    return list(dict.fromkeys(found))


class Run(NamedTuple):
    """A run of a cell."""

    cell: Cell
    lr: float
    part: int
    seed: int

    @property
    def key(self) -> list[Any]:
        """What stands in its line."""
        return [*self.cell, self.lr, self.part, self.seed]


def rates(cell: Cell) -> tuple[float, ...]:
    """What is tried for a cell: the same for every method."""
    return LONG_RATES if cell.steps == LONG else RATES


def lines() -> list[dict[str, Any]]:
    """The raw results."""
    return [json.loads(line) for line in RAW.read_text(encoding="utf-8").splitlines()] if RAW.is_file() else []


def score(line: Mapping[str, Any]) -> float:
    """Harmonic mean of what is forgotten, 1 − p/p₀ of the rows to forget, and of what is kept, p/p₀ of those held out.

    p is mean p(answer | question), p₀ before training.
    """
    before = line["before"]
    gone = max(0.0, 1 - mean(line["forget"]) / before["forget"])
    kept = min(1.0, mean(line["held_out"]) / before["held_out"])
    return 2 * gone * kept / (gone + kept) if gone + kept else 0.0


def mean(values: Sequence[Sequence[Any]]) -> float:
    """Of [cluster, p] pairs."""
    return math.fsum(p for _, p in values) / len(values)


def chosen(raw: Sequence[Mapping[str, Any]], cell: Cell) -> float | None:
    """The rate with the highest mean score on the tuning split; None before all of them were tried."""
    found = {
        lr: [score(line) for line in raw if line["key"][:4] == [*cell, lr] and line["key"][4] in TUNED_ON]
        for lr in rates(cell)
    }
    if not all(found.values()):
        return None
    return max(found, key=lambda lr: sum(found[lr]) / len(found[lr]))


def tuning() -> list[Run]:
    """The runs that choose rates: the same number for every method."""
    return [Run(cell, lr, part, 0) for cell in cells() for part in TUNED_ON for lr in rates(cell)]


def reported(raw: Sequence[Mapping[str, Any]]) -> list[Run]:
    """The runs that are reported, of the cells whose rate is chosen."""
    rates = [(cell, lr) for cell in cells() if (lr := chosen(raw, cell)) is not None]
    return [Run(cell, lr, part, seed) for cell, lr in rates for seed in SEEDS for part in REPORTED]


def do(runs: Sequence[Run], data_dir: str, minutes: float) -> Iterator[dict[str, Any]]:
    """Do runs, and give the line of each; part by part, so that every start is scored once."""
    from dualoptim import unlearn
    from dualoptim.config import RunConfig
    from dualoptim.resolved import resolve
    from dualoptim.runs import RECORDS
    from variants import Variant

    began, prepared = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as scratch:
        for run in runs:
            if time.monotonic() - began > 60 * minutes:
                return
            if run.key in [line["key"] for line in lines()]:  # of another process
                continue
            method = dict(METHODS[run.cell.method])
            variant = method.pop("variant", None)
            settings = {**BASE, **method, "forget_loss": run.cell.loss, "steps": run.cell.steps, "lr": run.lr}
            config = RunConfig(**settings, seed=run.seed, data_dir=data_dir, task_args={**TASK, "part": run.part})
            (of,) = resolve([config])
            if variant is not None:
                of = replace(of, optimizer=(Variant, {**of.optimizer[1], **variant}))
            of_start = run.part, of.needs_second_model
            if of_start not in prepared:
                prepared[of_start] = unlearn.prepare(of)
            entries: list[dict[str, Any]] = []
            folder = Path(scratch)
            unlearn.train(prepared[of_start], of, folder, entries.append)
            (entry,) = entries
            after: dict[str, list[list[Any]]] = {"forget": [], "held_out": [], "retain": []}
            for line in (folder / RECORDS).read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                if record["when"] == "after":
                    p = math.exp(-record["nll"]) if record["nll"] is not None else 0.0
                    after[record["set"]].append([record["cluster"].rpartition(" ")[2], round(p, 4)])
            yield {
                "key": run.key,
                "before": {name: entry["before"][f"{name}_probability"] for name in after},
                "retain": round(mean(after["retain"]), 4) if after["retain"] else None,
                "forget": after["forget"],
                "held_out": after["held_out"],
                "finite": entry["finite"],
                "seconds": entry["seconds"],
                "bytes": entry["optimizer_state_bytes"],
            }


def write(line: Mapping[str, Any]) -> None:
    """Add a line to the raw results."""
    RAW.parent.mkdir(exist_ok=True)
    with FileLock(f"{RAW}.lock"), RAW.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    """Run, write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("run", "page"), default="page")
    parser.add_argument("--data-dir")
    parser.add_argument("--only", choices=("tune", "report"), default="tune")
    parser.add_argument("--shard", default="1/1", help="i/n: every n-th run from the i-th on")
    parser.add_argument("--minutes", type=float, default=40, help="begin no run after so many")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.command == "run":
        raw = lines()
        done = [line["key"] for line in raw]
        number, of = map(int, options.shard.split("/"))
        planned = tuning() if options.only == "tune" else reported(raw)
        mine = [run for run in planned[number - 1 :: of] if run.key not in done]
        print(f"{len(mine)} of {len(planned)} runs to do", flush=True)
        for line in do(mine, options.data_dir, options.minutes):
            write(line)
            print(*line["key"], f"score {score(line):.3f}", f"{line['seconds']} s", flush=True)
        return
    from evidence_page import make

    page, target = make(lines()), HERE / "evidence.md"
    if options.check:
        sys.exit(target.read_text(encoding="utf-8") != page and f"{target}: is not what {RAW} makes; run page")
    target.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
