"""Eight example sets of rows, two goals, SmolLM2-135M: what is forgotten, and what is kept, with no option set.

    python benchmarks/own_rows.py                                  every case and goal, seed 0
    python benchmarks/own_rows.py --seeds 0 1 2 --cases one_fact   more seeds of one case
    python benchmarks/own_rows.py --minutes 40                     begins no case after 40 minutes
    python benchmarks/own_rows.py --page                           only the page, of the lines that are there

The rows are in examples/own_rows. A case is `dualoptim compare` with its files, the goal and the methods, into
runs/own_rows/CASE-GOAL. What it measured is a line for each method and seed in benchmarks/own_rows.jsonl, which a later
run of the same takes the place of; what has a line of the day is not run again with --missing. Cases of invented facts
begin with a model that has memorized the rows to forget and to keep. Writes benchmarks/own_rows.md from all lines; its
last chapter, what a person reads in the numbers, is kept as it is.
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
from dualoptim.reading import json_lines

ROWS = Path("examples/own_rows")
CASES = ("one_fact", "person", "secret_phrase", "phone_number", "style", "wrong_belief", "author", "topic")
TAUGHT = ("secret_phrase", "phone_number", "style", "author")
GOALS = ("refuse", "erase")
METHODS = ("DualOptim+", "Alternating AdamW")
OUT = Path("runs/own_rows")
LINES = Path("benchmarks/own_rows.jsonl")
PAGE = Path("benchmarks/own_rows.md")
MEASURED = (
    *("reworded_answered", "forget_probability", "nearby_answered", "facts_answered", "harmless_refused", "perplexity"),
)
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


def lines() -> list[dict[str, Any]]:
    """What was measured: case, goal, method, seed, date, before, after, seconds, verdict, stopped."""
    return json_lines(LINES.read_text(encoding="utf-8")) if LINES.is_file() else []


def key(entry: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Where a line stands in the table, and what it takes the place of."""
    return CASES.index(entry["case"]), GOALS.index(entry["goal"]), METHODS.index(entry["method"]), entry["seed"]


def add(case: str, goal: str, minutes: float) -> None:
    """Write what a finished case measured into the lines; of a single run the minutes of the whole command, too."""
    found = {key(entry): entry for entry in lines()}
    measured = runs.read_results(OUT / f"{case}-{goal}")["runs"]
    for run in measured:
        entry = {"case": case, "goal": goal} | {name: run[name] for name in ("method", "seed")}
        entry |= {"date": str(datetime.date.today()), "seconds": round(run["seconds"], 1)}
        entry |= {when: {name: run[when][name] for name in MEASURED} for when in ("before", "after")}
        entry |= {name: run[name] for name in ("verdict", "stopped")}
        entry |= {"minutes": round(minutes, 1)} if len(measured) == 1 else {}
        found[key(entry)] = entry
    text = "".join(json.dumps(found[place], ensure_ascii=False) + "\n" for place in sorted(found))
    runs.written(LINES, text)


def row(entries: Sequence[Mapping[str, Any]]) -> str:
    """A row of the table: one method's mean over its seeds, numbers that miss their aim in bold."""
    case, goal, method = (entries[0][name] for name in ("case", "goal", "method"))
    met = [aims(goal, entry["before"], entry["after"]) for entry in entries]

    def cell(name: str, spec: str, aim: str | None = None) -> str:
        before, after = ([entry[when][name] for entry in entries] for when in ("before", "after"))
        if any(value is None for value in before + after):
            return "—"
        shown = f"{statistics.fmean(before):{spec}} → {statistics.fmean(after):{spec}}"
        return f"**{shown}**" if aim is not None and not all(m[aim] for m in met) else shown

    refuse = goal == "refuse"
    cells = [
        cell("reworded_answered", ".0%", "forgotten" if refuse and shows(goal, entries[0]["before"]) else None),
        cell("forget_probability", ".3f", None if refuse else "forgotten"),
        cell("nearby_answered", ".0%", "nearby"),
        cell("facts_answered", ".0%", "facts"),
        cell("harmless_refused", ".0%", "refused"),
        cell("perplexity", ".1f", "perplexity"),
        f"{statistics.fmean(entry['seconds'] for entry in entries):.0f} s",
        max(entry["date"] for entry in entries),
    ]
    return f"| {case} | {goal} | {method} | {len(entries)} | " + " | ".join(cells) + " |"


def page(found: Sequence[Mapping[str, Any]]) -> str:
    """The page of all lines; its last chapter, what a person reads in the numbers, is kept as it is."""
    rows: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    met = {method: [0, 0] for method in METHODS}
    for entry in found:
        rows.setdefault(key(entry)[:3], []).append(entry)
        if shows(entry["goal"], entry["before"]):
            met[entry["method"]][0] += all(aims(entry["goal"], entry["before"], entry["after"]).values())
            met[entry["method"]][1] += 1
    total = "; ".join(f"{method} all five aims in {a} of {n} runs" for method, (a, n) in met.items() if n)
    names = [
        ", ".join([e["case"], e["goal"], e["method"]] + ([f"seed {e['seed']}"] if e["seed"] else [])) for e in found
    ]
    verdicts = [f"- {name}: {e['verdict']} {e['stopped']}" for name, e in zip(names, found, strict=True)]
    walls = "; ".join(f"{name} {e['minutes']}" for name, e in zip(names, found, strict=True) if "minutes" in e)
    reading = PAGE.read_text(encoding="utf-8").partition(READING)[2] if PAGE.is_file() else ""
    return "\n".join(
        [
            "# Your own rows",
            "",
            "`python benchmarks/own_rows.py`, SmolLM2-135M-Instruct, two CPU cores with bf16 arithmetic. No option "
            "but the files, the goal and the method. The lines behind the table are in `benchmarks/own_rows.jsonl`.",
            "",
            "Aims: on wordings never trained on at most 10 % answered (refuse), or the answer's probability at most a "
            "fifth of what it was (erase); nearby at least 85 % of before, unrelated facts at least 95 %, at most 5 % "
            "of harmless requests refused, perplexity at most 5 % higher. Before → after, mean over seeds; in bold "
            "what misses its aim with one seed or more. Not counted is a run to refuse where no rewording was answered "
            f"before. {total[:1].upper() + total[1:]}.",
            "",
            "| case | goal | method | seeds | answered, reworded | p(answer) | nearby | unrelated facts | "
            "harmless refused | perplexity | training | date |",
            "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
            *(row(entries) for entries in rows.values()),
            "",
            *([f"Minutes of a whole command, loading and measuring included: {walls}.", ""] if walls else []),
            "## Verdicts, as the report gives them",
            "",
            "With the goal refuse, what is left of what is to be forgotten is the share of replies that do not refuse.",
            "",
            *verdicts,
            "",
        ]
    ) + (READING + reading if reading else "")


def main() -> None:
    """Run what was asked for, and write the page of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--goals", nargs="+", default=GOALS, choices=GOALS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after so many")
    parser.add_argument("--missing", action="store_true", help="leave out what has a line")
    parser.add_argument("--page", action="store_true", help="only write the page of what was run")
    chosen = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for case in () if chosen.page else chosen.cases:
        model = None
        for goal in chosen.goals:
            have = {key(entry) for entry in lines()} if chosen.missing else set()
            place = CASES.index(case), GOALS.index(goal)
            methods = [
                m for m in chosen.methods if any((*place, METHODS.index(m), s) not in have for s in chosen.seeds)
            ]
            if not methods or time.perf_counter() - began > 60 * chosen.minutes:
                continue
            model = model or model_of(case)
            told = command(case, goal, methods, chosen.seeds, model)
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "dualoptim", *told, "--resume"], check=True)
            add(case, goal, (time.perf_counter() - started) / 60)
    PAGE.write_text(page(lines()), encoding="utf-8")


if __name__ == "__main__":
    main()
