"""Real people, safety and many tasks on SmolLM2-135M: the optimizers side by side over seeds, equal budgets.

    python benchmarks/families.py --data-dir FOLDER                    all three
    python benchmarks/families.py --data-dir FOLDER --only safety      one of them

FOLDER holds safety/, general/ and multitask/. Each family is its recipe. First every method is run at three learning
rates on one seed, which is not used again, and takes the rate at which its `AIMS` is highest; then it is run at that
rate on the other seeds. All by the command line into runs/families/; what is finished there is taken over. Writes
benchmarks/real_world.md, safety.md and multitask.md, whose last chapter, what a person reads in the numbers, is kept
as it is.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dualoptim import report, runs
from dualoptim.config import ALONE
from dualoptim.evaluation.aggregates import harmonic_mean

Entry = Mapping[str, Any]

FAMILIES = {"real_world": "real_world_smollm2", "safety": "safety_smollm2", "multitask": "multitask_smollm2"}
RATES = [1e-5, 3e-5, 9e-5]
TUNING_SEED = 3
SEEDS = [0, 1, 2]
READING = "\n## Reading\n"


def forgetting_and_keeping(after: Mapping[str, Any]) -> float:
    """Harmonic mean of what is forgotten of the known, neighbours kept, and other facts kept; 0 to 1."""
    forgotten = 1 - after["forget_known_rouge_l"]
    kept = {name: after[name] for name in ("held_out_rouge_l", "facts_accuracy")}
    return harmonic_mean({"forgotten": forgotten, **kept}) or 0.0


# What a method's learning rate is chosen by: in words, and of the numbers after training.
AIMS: dict[str, tuple[str, Callable[[Mapping[str, Any]], float]]] = {
    "real_world": (
        "the harmonic mean of 1 − ROUGE-L (known and to forget), ROUGE-L (neighbours held out) and other facts",
        forgetting_and_keeping,
    ),
    "safety": ("balance", lambda after: float(after["balance"])),
    "multitask": ("average", lambda after: float(after["average"])),
}


def command(family: str, data_dir: str, methods: Sequence[str], rate: float, seeds: Sequence[int]) -> list[str]:
    """What `dualoptim` is told."""
    kind = "tuning" if seeds == [TUNING_SEED] else "seeds"
    data = [] if family == "real_world" else ["--data-dir", data_dir]
    return [
        *("compare", "--recipe", FAMILIES[family], *data, "--methods", json.dumps(methods)),
        *("--lr", str(rate), "--seeds", json.dumps(list(seeds)), "--out", f"runs/families/{family}/{kind}-{rate:g}"),
    ]


def run(*arguments: Any) -> dict[str, Any]:
    """Run by the command line, unless that is done, and read the results."""
    told = command(*arguments)
    subprocess.run([sys.executable, "-m", "dualoptim", *told, "--resume"], check=True)
    return runs.read_results(told[-1])


def by_method(results: Mapping[str, Any]) -> dict[str, list[Entry]]:
    """The runs of each method."""
    entries: dict[str, list[Entry]] = {}
    for entry in results["runs"]:
        entries.setdefault(entry["method"], []).append(entry)
    return entries


def tuned(family: str, data_dir: str, methods: Sequence[str]) -> dict[str, dict[float, float]]:
    """The aim that each method reaches at each rate."""
    _, aim = AIMS[family]
    found: dict[str, dict[float, float]] = {method: {} for method in methods}
    for rate in RATES:
        for method, entries in by_method(run(family, data_dir, methods, rate, [TUNING_SEED])).items():
            found[method][rate] = aim(entries[0]["after"])
    return found


def best(aims: Mapping[float, float]) -> float:
    """The rate of the highest aim."""
    return max(aims, key=aims.__getitem__)


def spread(values: Sequence[float], form: str) -> str:
    """Mean [least, greatest]."""
    mean, low, high = (report.text(f(values), form) for f in (statistics.fmean, min, max))
    return f"{mean} [{low}, {high}]"


def table(results: Mapping[str, Any]) -> list[str]:
    """Every metric's mean over the seeds and, in brackets, their range, for each method."""
    entries = by_method(results)
    lines = ["| | before | " + " | ".join(entries) + " |", "|---|--:|" + "--:|" * len(entries)]
    before = results["runs"][0]["before"]
    for name, metric in results["metrics"].items():
        if before[name] is None:
            continue
        group = f"{metric['group']}: " if metric.get("group") else ""
        cells = [report.text(before[name], metric["format"])]
        cells += [spread([e["after"][name] for e in several], metric["format"]) for several in entries.values()]
        lines.append(f"| {group}{metric['label']} {report.ARROWS[metric['better']]} | " + " | ".join(cells) + " |")
    seconds = [f"{statistics.fmean(entry['seconds'] for entry in several):.0f} s" for several in entries.values()]
    return [*lines, "| training | | " + " | ".join(seconds) + " |"]


def against_alone(results: Mapping[str, Any]) -> list[str]:
    """How each method's scores differ from those of training on each objective alone, seed by seed."""
    scores = results["scores"]
    alone = {(e["config"]["alone"], e["seed"]): e["after"] for e in results["runs"] if e["config"]["alone"]}
    mixed = {m: several for m, several in by_method(results).items() if not several[0]["config"]["alone"]}
    lines = ["| | " + " | ".join(mixed) + " |", "|---|" + "--:|" * len(mixed)]
    means = {m: [0.0] * len(several) for m, several in mixed.items()}
    for name, metric in scores.items():
        cells = []
        for method, several in mixed.items():
            changes = [e["after"][metric] - alone[name, e["seed"]][metric] for e in several]
            means[method] = [m + c / len(scores) for m, c in zip(means[method], changes, strict=True)]
            cells.append(spread(changes, "+.3f"))
        lines.append(f"| {name} ↑ | " + " | ".join(cells) + " |")
    return [*lines, "| mean ↑ | " + " | ".join(spread(means[m], "+.3f") for m in mixed) + " |"]


def page(family: str, results: Mapping[str, Any], tuning: Mapping[str, Mapping[float, float]], told: list[str]) -> str:
    """The page of a family, without its reading."""
    folder = Path(told[0].split(" --out ")[1])
    environment = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    config = results["runs"][0]["config"]
    versions = ", ".join(f"{name} {environment['versions'][name]}" for name in ("torch", "transformers"))
    threads = environment["threads"]
    seeds = sorted({entry["seed"] for entry in results["runs"]})
    lines = [
        f"# {family.replace('_', ' ').capitalize()} on SmolLM2-135M-Instruct",
        "",
        f"{datetime.date.today().isoformat()}, {environment['processor']}, {threads} thread{'s' * (threads > 1)} to a "
        f"run, {versions}. Made by `python benchmarks/families.py --data-dir FOLDER --only {family}`, which runs",
        "",
        *(f"    dualoptim {line}" for line in told),
        "",
        f"{config['steps']} steps of {config['batch_size']} rows, {config['ratio']}, seeds "
        f"{', '.join(map(str, seeds))}: means, and the least and the greatest in brackets. Each method has the "
        f"learning rate of {', '.join(f'{rate:g}' for rate in RATES)} at which {AIMS[family][0]} was highest on seed "
        f"{TUNING_SEED}, which is not among these.",
        "",
        *table(results),
        "",
        "## Learning rates",
        "",
        f"What each method reached on seed {TUNING_SEED}; the rate that it was given is bold.",
        "",
        "| | " + " | ".join(f"{rate:g}" for rate in RATES) + " |",
        "|---|" + "--:|" * len(RATES),
    ]
    for method, aims in tuning.items():
        cells = [f"**{aim:.3f}**" if rate == best(aims) else f"{aim:.3f}" for rate, aim in aims.items()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    if any(entry["config"]["alone"] for entry in results["runs"]):
        lines += ["", "## Against training on each objective alone", "", *against_alone(results)]
    counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in results["counts"].items())
    return "\n".join([*lines, *(["", f"Shares are of so many questions: {counts}."] if counts else []), ""])


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--only", choices=FAMILIES, help="one family")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    for family in [options.only] if options.only else FAMILIES:
        recipe = yaml.safe_load(Path(f"recipes/{FAMILIES[family]}.yaml").read_text(encoding="utf-8"))
        methods = [method for method in recipe["methods"] if method != ALONE]
        tuning = tuned(family, options.data_dir, methods)
        groups: dict[float, list[str]] = {}
        for method in methods:
            groups.setdefault(best(tuning[method]), []).append(method)
        if ALONE in recipe["methods"]:  # by AdamW, as the first method is, and so at its rate
            groups[best(tuning[methods[0]])].append(ALONE)
        parts = {rate: run(family, options.data_dir, group, rate, options.seeds) for rate, group in groups.items()}
        merged = [entry for part in parts.values() for entry in part["runs"]]
        merged.sort(key=lambda entry: methods.index(entry["method"]) if entry["method"] in methods else 99)
        results = {**next(iter(parts.values())), "runs": merged}
        told = [" ".join(command(family, "FOLDER", group, rate, options.seeds)) for rate, group in groups.items()]
        path = Path(__file__).with_name(f"{family}.md")
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        reading = READING + before.partition(READING)[2] if READING in before else ""
        path.write_text(page(family, results, tuning, told) + reading, encoding="utf-8")


if __name__ == "__main__":
    main()
