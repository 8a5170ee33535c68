"""TOFU on SmolLM2-135M: two splits, two losses to forget, four optimizers from the same memorized model, all metrics.

    python benchmarks/tofu.py --data-dir FOLDER     (or without it, from the hub)

Runs the recipe tofu_smollm2 four times into runs/tofu/, by the command line; what is finished there is taken over.
Writes benchmarks/tofu.md, whose last chapter, what a person reads in the numbers, is kept as it is. Each run's report
page stays in its folder.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from dualoptim import report, runs

PAGE = Path(__file__).with_suffix(".md")
READING = "\n## Reading\n"
KEPT = {"forget01": 160, "forget05": 120}  # rows of other authors that the model memorizes as well and is to keep
SCORED = {"forget01": 40, "forget05": 20}  # rows of each set, at most
LOSSES = ("IDK", "NPO")


def command(split: str, loss: str, data_dir: str | None) -> list[str]:
    """One comparison of the four methods, as `dualoptim` is told to make it."""
    task = {
        "split": split,
        "part": 1,
        "retain_rows": KEPT[split],
        "scored_rows": SCORED[split],
        "holdout_rows": SCORED[split],
    }
    return [
        *("compare", "--recipe", "tofu_smollm2", "--task-args", json.dumps(task), "--forget-loss", loss),
        *(("--data-dir", data_dir) if data_dir else ()),
        *("--out", folder(split, loss)),
    ]


def folder(split: str, loss: str) -> str:
    """Where a comparison is written."""
    return f"runs/tofu/{split}-{loss.lower()}"


def table(head: list[str], body: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *body)]


def chapter(split: str, loss: str, results: dict[str, Any]) -> list[str]:
    """The command and all numbers of one comparison."""
    head, body = report.turned(*report.rows(results))
    entries = results["runs"]
    own = ["peak memory so far", "", *(runs.bytes_text(entry["peak_memory_bytes"]) for entry in entries)]
    step = ["median step", "", *(f"{entry['step_seconds']:.2f} s" for entry in entries)]
    lines = [f"## {split}, {loss}+GD", "", f"    dualoptim {shlex.join(command(split, loss, 'FOLDER'))}", ""]
    lines += [*table(head, [*body, step, own]), ""]
    for title, rows in report.details(results).items():
        lines += [*table([title, *head[1:]], rows), ""]
    lines += [f"- not computed: {sentence}" for sentence in report.not_computed(results)]
    return [*lines, ""]


def main() -> None:
    """Memorise, unlearn, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", help="folder of TOFU's files; without it, the hub")
    options = parser.parse_args()
    chapters: list[str] = []
    for split, loss in itertools.product(KEPT, LOSSES):
        dualoptim = [sys.executable, "-m", "dualoptim"]
        subprocess.run([*dualoptim, *command(split, loss, options.data_dir), "--resume"], check=True)
        out = Path(folder(split, loss))
        results = runs.read_results(out)
        chapters += chapter(split, loss, results)
        environment = json.loads((out / "env.json").read_text(encoding="utf-8"))
        versions = ", ".join(f"{name} {environment['versions'][name]}" for name in ("torch", "transformers"))
        text = "\n".join(
            [
                "# TOFU on SmolLM2-135M-Instruct",
                "",
                f"{datetime.date.today().isoformat()}, {environment['processor']}, {environment['threads']} threads, "
                f"{versions}. Made by",
                "",
                f"    python benchmarks/tofu.py{' --data-dir FOLDER' if options.data_dir else ''}",
                "",
                "which runs each chapter's command. SmolLM2-135M-Instruct memorizes the rows of task 1 and rows of "
                f"other authors ({' and '.join(f'{n} with {split}' for split, n in KEPT.items())}; 10 epochs, lr 3e-4, "
                "8 rows a step), and another the latter alone: the retrained reference of forget quality and privacy "
                "leakage. Each optimizer unlearns from the first: 48 steps of 8 rows, forget : retain = 1:2, lr 1e-4, "
                "linear decay after a tenth of warm-up, clipping at 1, bf16 autocast. One seed, one learning rate for "
                f"all. At most {' and '.join(f'{n} rows of each set with {split}' for split, n in SCORED.items())} are "
                "scored, and membership is told against as many rows never seen. "
                '"Training" is the time of the steps alone.',
                "",
                *chapters,
            ]
        )
        before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        reading = READING + before.partition(READING)[2] if READING in before else ""
        PAGE.write_text(text + reading, encoding="utf-8")


if __name__ == "__main__":
    main()
