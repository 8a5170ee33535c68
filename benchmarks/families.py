"""Real people, safety and many tasks on SmolLM2-135M: the optimizers side by side over seeds, equal budgets.

    python benchmarks/families.py --data-dir FOLDER                    all three
    python benchmarks/families.py --data-dir FOLDER --only safety      one of them

FOLDER holds safety/, general/ and multitask/. Each family is its recipe; a seed draws the rows, the questions and the
order, and has real people of its own. First every method is run at the same few rates on a seed that is not used again,
and takes the one at which its `AIMS` is highest, the 8-bit ones that of their 32-bit forms; then it is run at that rate
on the other seeds. Where objectives have unequal numbers of steps, methods with states for each are run with
`--lr-scales equal` as well. All by the command line into runs/families/; what is finished there is taken over. Writes
benchmarks/real_world.md, safety.md and multitask.md, whose last chapter, what a person reads in the numbers, is kept as
it is.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dualoptim import report, runs
from dualoptim.config import ALONE
from dualoptim.evaluation.aggregates import harmonic_mean

Entry = Mapping[str, Any]

FAMILIES = {"real_world": "real_world_smollm2", "safety": "safety_smollm2", "multitask": "multitask_smollm2"}
# Each list is a command of its own, so that a rate can be added where the best is the lowest or the highest.
RATES = {
    # At 1e-6 next to nothing was forgotten: docs/log.md.
    "real_world": [[3e-6, 1e-5, 3e-5, 1e-4], [3e-4], [5e-6, 5e-5, 2e-4]],
    "safety": [[1e-5], [3e-5, 1e-4, 3e-4]],
    "multitask": [[3e-4, 6e-4, 1.2e-3]],  # 1e-4 was behind 3e-4 with every method: docs/log.md
}
QUESTIONS = {"safety": {"scored": 40}, "multitask": {"scored": 25}}  # more than the recipes ask, for narrower ranges
LEFT_OUT = {  # for time: docs/log.md has what they reached with fewer questions
    "real_world": ["DualOptim 8-bit", "DualOptim+ 8-bit"],
    "multitask": ["DualOptim+ 8-bit", "PCGrad", "UPGrad", "Alone"],
}
EQUAL = ", rates equal"  # behind a method's name: with --lr-scales equal
SCALED = {"real_world": ["DualOptim", "DualOptim+"]}  # in the others all objectives have as many steps
TUNING_SEED = 3
SEEDS = 0, 1, 2
# Drawn at random of the 42 that the published files name and of whom SmolLM2-135M says something sure on two questions
# of four or more, so no seed has another's; of `keep` the last third is held out.
PEOPLE: dict[int, dict[str, list[str]]] = {
    0: {
        "forget": ["Linus Torvalds", "Martin Heidegger", "Ben Affleck", "James Baldwin"],
        "keep": ["Roald Dahl", "Rand Paul", "Mark Twain", "Jefferson Airplane", "Quentin Tarantino", "Julian Assange"],
    },
    1: {
        "forget": ["Ian McEwan", "Toni Morrison", "Charles Dickens", "Eddie Van Halen"],
        "keep": [
            "Queen Victoria",
            "Warner Bros.",
            "Carl Theodor Dreyer",
            "Sandra Bullock",
            "David Lynch",
            "Jane Austen",
        ],
    },
    2: {
        "forget": ["Vajiralongkorn", "Mel Brooks", "Michael Crichton", "Sinclair Lewis"],
        "keep": [
            "Tōru Takemitsu",
            "Elizabeth Gaskell",
            "J. J. Abrams",
            "Kurt Weill",
            "Arturo Toscanini",
            "Dario Argento",
        ],
    },
    3: {
        "forget": ["Darren Aronofsky", "George Washington", "John Singleton", "Jean Dujardin"],
        "keep": ["Dave Grohl", "Izzy Stradlin", "Johann Strauss II", "Tom Wolfe", "Arthur Conan Doyle", "Ron Howard"],
    },
}
_FILES = "A seed, also that of the rates, draws rows, questions and their order from the files."
DRAWN = {
    "real_world": "A seed, also that of the rates, has its own people to forget and to keep, and draws the answers "
    "that are trained on, sampled of the model, and their order. The answer scored is the greedy one, or a sampled one "
    "where that was left out.",
    "safety": _FILES,
    "multitask": _FILES,
}
READING = "\n## Reading\n"


def forgetting_and_keeping(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Harmonic mean of what is lost of the known answers, and what is left of neighbors and other facts; 0 to 1.

    Each relative to before, answers by their probability: they are what the model itself said, and the overlap of its
    replies with them falls with any change of the weights, far from forgetting (docs/log.md, 2026-11-30).
    """
    left = {
        name: min(1.0, after[name] / before[name])
        for name in ("forget_known_probability", "held_out_probability", "facts_accuracy")
    }
    return harmonic_mean({**left, "forget_known_probability": 1 - left["forget_known_probability"]}) or 0.0


# What a method's learning rate is chosen by: in words, and of the numbers before and after training.
AIMS: dict[str, tuple[str, Callable[[Mapping[str, Any], Mapping[str, Any]], float]]] = {
    "real_world": (
        "the harmonic mean of 1 − probability (known and to forget), probability (neighbors held out) and other "
        "facts, each relative to before and at most 1,",
        forgetting_and_keeping,
    ),
    "safety": ("balance", lambda before, after: float(after["balance"])),
    "multitask": ("average", lambda before, after: float(after["average"])),
}


def recipe(family: str) -> dict[str, Any]:
    """The family's settings."""
    return yaml.safe_load(Path(f"recipes/{FAMILIES[family]}.yaml").read_text(encoding="utf-8"))


def methods_of(family: str) -> list[str]:
    """The methods of a family's page, in its order."""
    methods = [method for method in recipe(family)["methods"] if method not in LEFT_OUT.get(family, [])]
    return [*methods, *(method + EQUAL for method in SCALED.get(family, []))]


def command(family: str, data_dir: str, methods: Sequence[str], rates: Sequence[float], seed: int) -> list[str]:
    """What `dualoptim` is told: methods that all have `EQUAL`, or none of them."""
    data = [] if family == "real_world" else ["--data-dir", data_dir]
    people = PEOPLE[seed] if family == "real_world" else {}
    arguments = {**recipe(family)["task_args"], **QUESTIONS.get(family, {}), **people, "seed": seed}
    names, equal = [method.removesuffix(EQUAL) for method in methods], methods[0].endswith(EQUAL)
    return [
        *("compare", "--recipe", FAMILIES[family], *data, "--task-args", json.dumps(arguments)),
        *("--methods", json.dumps(names), *(("--lr-scales", "equal") if equal else ())),
        *("--grid", json.dumps({"lr": list(rates)}), "--seeds", json.dumps([seed]), "--curve-points", "0"),
        *("--out", f"runs/families/{family}/seed{seed}-{'-'.join(f'{rate:g}' for rate in rates)}{'-equal' * equal}"),
    ]


def apart(methods: Sequence[str]) -> list[list[str]]:
    """The methods that one command runs: those with rates equal apart from the others."""
    scaled = [method for method in methods if method.endswith(EQUAL)]
    return [part for part in ([method for method in methods if method not in scaled], scaled) if part]


class Plan(NamedTuple):
    """What one command runs."""

    methods: Sequence[str]
    rates: Sequence[float]
    seed: int


def done(family: str, data_dir: str, plans: Sequence[Plan], at_once: int) -> list[dict[str, Any]]:
    """Run plans by the command line, as far as they are not, so many processes at a time; the results of each.

    Methods have the names of this file in them.
    """
    commands = [command(family, data_dir, *plan) for plan in plans]
    shards = -(-at_once // len(commands))

    def do(told: Sequence[str]) -> None:
        subprocess.run([sys.executable, "-m", "dualoptim", *told], check=True)

    with ThreadPoolExecutor(at_once) as pool:
        if shards > 1:
            several = [[*told, "--shard", f"{i + 1}/{shards}"] for told in commands for i in range(shards)]
            list(pool.map(do, several))
        list(pool.map(do, [[*told, "--resume"] for told in commands]))
    found = []
    for plan, told in zip(plans, commands, strict=True):
        results, equal = runs.read_results(told[-1]), EQUAL * plan.methods[0].endswith(EQUAL)
        named = [{**entry, "method": entry["method"] + equal} for entry in results["runs"]]
        found.append({**results, "runs": named})
    return found


def by_method(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The runs of each method."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry["method"], []).append(entry)
    return found


def tuning_plans(family: str, methods: Sequence[str]) -> list[Plan]:
    """What is run to choose each method's rate."""
    return [Plan(part, rates, TUNING_SEED) for rates in RATES[family] for part in apart(methods)]


def tuned(family: str, data_dir: str, methods: Sequence[str], at_once: int) -> dict[str, dict[float, float]]:
    """The aim that each method reaches at each rate; training on each objective alone, by the mean of those scores."""
    _, aim = AIMS[family]
    found: dict[str, dict[float, float]] = {method: {} for method in methods}
    for results in done(family, data_dir, tuning_plans(family, methods), at_once):
        own: dict[float, list[float]] = {}
        for entry in results["runs"]:
            rate = entry["config"]["lr"]
            if objective := entry["config"]["alone"]:
                own.setdefault(rate, []).append(entry["after"][results["scores"][objective]])
            else:
                found[entry["method"]][rate] = aim(entry["before"], entry["after"])
        if own:
            found.setdefault(ALONE, {}).update({rate: statistics.fmean(scores) for rate, scores in own.items()})
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
    entries = by_method(results["runs"])
    before = {entry["seed"]: entry["before"] for entry in results["runs"]}.values()
    lines = ["| | before | " + " | ".join(entries) + " |", "|---|--:|" + "--:|" * len(entries)]
    for name, metric in results["metrics"].items():
        if any(numbers[name] is None for numbers in before):
            continue
        group = f"{metric['group']}: " if metric.get("group") else ""
        columns = [[*before], *([entry["after"] for entry in part] for part in entries.values())]
        cells = [spread([numbers[name] for numbers in column], metric["format"]) for column in columns]
        lines.append(f"| {group}{metric['label']} {report.ARROWS[metric['better']]} | " + " | ".join(cells) + " |")
    seconds = [f"{statistics.fmean(entry['seconds'] for entry in part):.0f} s" for part in entries.values()]
    states = [runs.bytes_text(part[0]["optimizer_state_bytes"]) for part in entries.values()]
    return [*lines, "| training | | " + " | ".join(seconds) + " |", "| states | | " + " | ".join(states) + " |"]


def by_seed(family: str, results: Mapping[str, Any]) -> list[str]:
    """What each method's rate is chosen by, on the seeds that are reported."""
    _, aim = AIMS[family]
    mixed = [entry for entry in results["runs"] if not entry["config"]["alone"]]
    seeds = sorted({entry["seed"] for entry in mixed})
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |", "|---|" + "--:|" * (len(seeds) + 1)]
    for method, several in by_method(mixed).items():
        reached = {entry["seed"]: aim(entry["before"], entry["after"]) for entry in several}
        cells = [f"{reached[seed]:.3f}" for seed in seeds]
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {statistics.fmean(reached.values()):.3f} |")
    return lines


def against_alone(results: Mapping[str, Any]) -> list[str]:
    """How each method's scores differ from those of training on each objective alone, seed by seed."""
    scores = results["scores"]
    alone = {(e["config"]["alone"], e["seed"]): e["after"] for e in results["runs"] if e["config"]["alone"]}
    mixed = {m: several for m, several in by_method(results["runs"]).items() if not several[0]["config"]["alone"]}
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


def page(
    family: str,
    results: Mapping[str, Any],
    tuning: Mapping[str, Mapping[float, float]],
    told: Sequence[Sequence[str]],
    at_once: int,
) -> str:
    """The page of a family, without its reading."""
    environment = json.loads(Path(told[0][-1], "env.json").read_text(encoding="utf-8"))
    config = results["runs"][0]["config"]
    versions = ", ".join(f"{name} {environment['versions'][name]}" for name in ("torch", "transformers"))
    threads = environment["threads"]
    machine = " and ".join(environment["devices"]) or environment["processor"]
    seeds = sorted({entry["seed"] for entry in results["runs"]})
    tried = [f"{rate:g}" for rate in sorted(itertools.chain(*RATES[family]))]
    eight = ", the 8-bit methods that of their 32-bit forms" * any("8-bit" in e["method"] for e in results["runs"])
    lines = [
        f"# {family.replace('_', ' ').capitalize()} on SmolLM2-135M-Instruct",
        "",
        f"{datetime.date.today().isoformat()}, {machine}, {threads} thread{'s' * (threads > 1)} to a "
        f"run, {at_once} run{'s' * (at_once > 1)} at a time, {versions}. Made by `python benchmarks/families.py "
        f"--data-dir FOLDER --only {family}`; the commands that it runs stand at the end.",
        "",
        f"{config['steps']} steps of {config['batch_size']} rows, {config['ratio']}, seeds "
        f"{', '.join(map(str, seeds))}: means, and the least and the greatest in brackets. {DRAWN[family]} Each method "
        f"has the learning rate of {', '.join(tried)} at which {AIMS[family][0]} was "
        f"highest on seed {TUNING_SEED}{eight}.",
        "",
        *table(results),
        "",
        f"By the aim alone, {AIMS[family][0].rstrip(',')}:",
        "",
        *by_seed(family, results),
        "",
        "## Learning rates",
        "",
        f"What each method reached on seed {TUNING_SEED}; the rate that it was given is bold.",
        "",
        "| | " + " | ".join(tried) + " |",
        "|---|" + "--:|" * len(tried),
    ]
    for method, aims in tuning.items():
        cells = [f"**{aim:.3f}**" if rate == best(aims) else f"{aim:.3f}" for rate, aim in sorted(aims.items())]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    if ALONE in tuning:
        lines += [
            "",
            "Alone: each objective by itself, for the steps that it has where objectives alternate, by AdamW; its rate "
            "is that of the highest mean of their scores.",
            "",
            "## Against training on each objective alone",
            "",
            *against_alone(results),
        ]
    counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in results["counts"].items())
    shares = ["", f"Shares are of so many questions a seed: {counts}."] if counts else []
    commands = [f"    dualoptim {shlex.join(line)}" for line in told]
    return "\n".join([*lines, *shares, "", "## Commands", "", *commands, ""])


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--only", choices=FAMILIES, help="one family")
    parser.add_argument("--at-once", type=int, default=1, help="how many processes run at a time")
    options = parser.parse_args()
    for family in [options.only] if options.only else FAMILIES:
        methods = methods_of(family)
        full = [method for method in methods if not method.endswith("8-bit")]
        tuning = tuned(family, options.data_dir, full, options.at_once)
        groups: dict[float, list[str]] = {}
        for method in methods:
            groups.setdefault(best(tuning[method.removesuffix(" 8-bit")]), []).append(method)
        parts = [(part, [rate]) for rate, group in groups.items() for part in apart(group)]
        reported = [Plan(*part, seed) for seed in SEEDS for part in parts]
        results = done(family, options.data_dir, reported, options.at_once)
        merged = [entry for each in results for entry in each["runs"]]
        plans = [*tuning_plans(family, full), *reported]
        told = [command(family, "FOLDER", *plan) for plan in plans]
        order = [*methods, *(entry["method"] for entry in merged)]  # those alone, by their own names, come last
        merged.sort(key=lambda entry: (order.index(entry["method"]), entry["seed"]))
        path = Path(__file__).with_name(f"{family}.md")
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        reading = READING + before.partition(READING)[2] if READING in before else ""
        path.write_text(
            page(family, {**results[-1], "runs": merged}, tuning, told, options.at_once) + reading, encoding="utf-8"
        )


if __name__ == "__main__":
    main()
