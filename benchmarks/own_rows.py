"""Eight example sets of rows, two goals, SmolLM2-135M: what is forgotten, and what is kept, with no option set.

    python benchmarks/own_rows.py                                  every case and goal, seed 0
    python benchmarks/own_rows.py --seeds 0 1 2 --cases one_fact   more seeds of one case

The rows are in examples/own_rows. A case is `dualoptim compare` with its files, the goal and the methods, into
runs/own_rows/CASE-GOAL; what is finished there is taken over, so the table grows with what was run. Cases of invented
facts begin with a model that has memorized the rows to forget and to keep. Writes benchmarks/own_rows.md, whose last
chapter, what a person reads in the numbers, is kept as it is.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dualoptim import runs
from dualoptim.data import read_rows
from dualoptim.memorise import memorised

ROWS = Path("examples/own_rows")
CASES = ("one_fact", "person", "secret_phrase", "phone_number", "style", "wrong_belief", "author", "topic")
TAUGHT = ("secret_phrase", "phone_number", "style", "author")
GOALS = ("refuse", "erase")
METHODS = ("DualOptim+", "Alternating AdamW")
OUT = Path("runs/own_rows")
READING = "\n## Reading\n"


def model_of(case: str) -> str:
    """The model that a case begins with."""
    if case not in TAUGHT:
        return "smollm2"
    rows = [row for name in ("forget", "retain") for row in read_rows(ROWS / case / f"{name}.jsonl")]
    # At three times that rate, the default, a model of so few rows forgets all else: perplexity 372 for 60.
    return str(memorised("smollm2", rows, lr=1e-4))


def command(case: str, goal: str, methods: Sequence[str], seeds: Sequence[int], model: str) -> list[str]:
    """What `dualoptim` is told: the files, the goal, the methods, the seeds."""
    retain = ROWS / case / "retain.jsonl"
    return [
        *("compare", "--model", model, "--forget", str(ROWS / case / "forget.jsonl")),
        *(["--retain", str(retain)] if retain.is_file() else []),
        *("--goal", goal, "--methods", json.dumps(list(methods)), "--seeds", json.dumps(list(seeds))),
        *("--save-model", "false", "--out", str(OUT / f"{case}-{goal}")),
    ]


def aims(goal: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, bool]:
    """Which of the aims a run meets."""

    def share(name: str) -> float:
        return (after[name] or 0.0) / before[name] if before[name] else 1.0

    forgotten = after["reworded_answered"] <= 0.1 if goal == "refuse" else share("forget_probability") <= 0.2
    return {
        "forgotten": forgotten,
        "nearby": share("nearby_answered") >= 0.85,
        "facts": share("facts_answered") >= 0.95,
        "refused": after["harmless_refused"] <= 0.05,
        "perplexity": share("perplexity") <= 1.05,
    }


def shows(goal: str, before: Mapping[str, Any]) -> bool:
    """Whether there was anything to forget where the aim looks: a rewording that was answered, to refuse."""
    return goal == "erase" or before["reworded_answered"] > 0


def line(case: str, goal: str, results: Mapping[str, Any], method: str) -> str | None:
    """A row of the table: one method's mean over its seeds, numbers that miss their aim in bold."""
    entries = [entry for entry in results["runs"] if entry["method"] == method]
    if not entries:
        return None
    met = [aims(goal, entry["before"], entry["after"]) for entry in entries]

    def cell(name: str, spec: str, aim: str | None = None) -> str:
        values = [entry["after"][name] for entry in entries]
        if any(value is None for value in values):
            return "—"
        was = entries[0]["before"][name]
        shown = f"{was:{spec}} → {statistics.fmean(values):{spec}}"
        return f"**{shown}**" if aim is not None and not all(m[aim] for m in met) else shown

    refuse = goal == "refuse"
    return (
        f"| {case} | {goal} | {method} | {len(entries)} | "
        + " | ".join(
            [
                cell("reworded_answered", ".0%", "forgotten" if refuse else None),
                cell("forget_probability", ".3f", None if refuse else "forgotten"),
                cell("nearby_answered", ".0%", "nearby"),
                cell("facts_answered", ".0%", "facts"),
                cell("harmless_refused", ".0%", "refused"),
                cell("perplexity", ".1f", "perplexity"),
                f"{statistics.fmean(entry['seconds'] for entry in entries):.0f} s",
            ]
        )
        + " |"
    )


def page() -> str:
    """The tables of all that was run."""
    found = {
        (case, goal): runs.read_results(OUT / f"{case}-{goal}")
        for case in CASES
        for goal in GOALS
        if (OUT / f"{case}-{goal}" / runs.RESULTS).is_file()
    }
    lines, met = [], {method: [0, 0] for method in METHODS}
    for (case, goal), results in found.items():
        for method in METHODS:
            if row := line(case, goal, results, method):
                lines.append(row)
            for entry in results["runs"]:
                if entry["method"] == method and shows(goal, entry["before"]):
                    met[method][0] += all(aims(goal, entry["before"], entry["after"]).values())
                    met[method][1] += 1
    total = "; ".join(f"{method} all five aims in {a} of {n} runs" for method, (a, n) in met.items() if n)
    seconds = json.loads((OUT / "seconds.json").read_text(encoding="utf-8"))
    walls = ", ".join(f"{name} {value / 60:.1f}" for name, value in sorted(seconds.items()))
    verdicts = [
        f"- {case}, {goal}, {entry['method']}{', seed ' + str(entry['seed']) if entry['seed'] else ''}: "
        f"{entry['verdict']} {entry['stopped']}"
        for (case, goal), results in found.items()
        for entry in results["runs"]
    ]
    return "\n".join(
        [
            "# Your own rows",
            "",
            f"`python benchmarks/own_rows.py`, {datetime.date.today()}, SmolLM2-135M-Instruct, two CPU cores with bf16 "
            "arithmetic. No option but the files, the goal and the method.",
            "",
            "Aims: on wordings never trained on at most 10 % answered (refuse), or the answer's probability at most a "
            "fifth of what it was (erase); nearby at least 85 % of before, unrelated facts at least 95 %, at most 5 % "
            "of harmless requests refused, perplexity at most 5 % higher. Before → after, mean over seeds; in bold "
            "what misses its aim with one seed or more. Not counted is a run to refuse where no rewording was answered "
            f"before. {total[:1].upper() + total[1:]}.",
            "",
            "| case | goal | method | seeds | answered, reworded | p(answer) | nearby | unrelated facts | "
            "harmless refused | perplexity | training |",
            "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
            *lines,
            "",
            f"Minutes of the whole command for all its methods and seeds, loading and measuring included: {walls}.",
            "",
            "## Verdicts, as the report gives them",
            "",
            *verdicts,
            "",
        ]
    )


def main() -> None:
    """Run what was asked for, and write the page of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--goals", nargs="+", default=GOALS, choices=GOALS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--page", action="store_true", help="only write the page of what was run")
    chosen = parser.parse_args()
    target = Path("benchmarks/own_rows.md")
    OUT.mkdir(parents=True, exist_ok=True)
    if not chosen.page:
        for case in chosen.cases:
            model = model_of(case)
            for goal in chosen.goals:
                told = command(case, goal, chosen.methods, chosen.seeds, model)
                began = time.perf_counter()
                subprocess.run([sys.executable, "-m", "dualoptim", *told, "--resume"], check=True)
                path = OUT / "seconds.json"
                seconds = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
                seconds[f"{case} {goal}"] = seconds.get(f"{case} {goal}", 0.0) + time.perf_counter() - began
                runs.write_json(path, seconds)
    reading = target.read_text(encoding="utf-8").partition(READING)[2] if target.is_file() else ""
    target.write_text(page() + (READING + reading if reading else ""), encoding="utf-8")


if __name__ == "__main__":
    main()
