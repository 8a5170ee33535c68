"""LUME on SmolLM2-135M: a part of its documents memorized, then forgotten by three methods from the same model.

    python benchmarks/lume.py --data-dir FOLDER               the recipe lume_smollm2, seed 0
    python benchmarks/lume.py --data-dir FOLDER --seeds 0 1 2
    python benchmarks/lume.py --data-dir FOLDER --recipe lume_tiny --page FILE    a try, in minutes

One `dualoptim compare` into runs/lume/RECIPE; what is finished there is taken over. Writes benchmarks/lume.md, or FILE,
whose last chapter, what a person reads in the numbers, is kept as it is.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dualoptim import report, runs

PAGE = Path(__file__).with_suffix(".md")
READING = "\n## Reading\n"


def command(recipe: str, data_dir: str | None, seeds: Sequence[int]) -> list[str]:
    """What `dualoptim` is told."""
    data = ["--data-dir", data_dir] if data_dir else []
    return ["compare", "--recipe", recipe, *data, "--seeds", json.dumps(list(seeds)), "--out", f"runs/lume/{recipe}"]


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, and an empty line."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return [*("| " + " | ".join(row) + " |" for row in (head, rule, *body)), ""]


def setting(recipe: Mapping[str, Any]) -> str:
    """The recipe in words."""
    task = recipe["task_args"]
    return (
        f"{recipe.get('model', 'SmolLM2-135M-Instruct')} memorizes {task['forget_documents']} documents of each kind "
        f"to forget and {task['retain_documents']} to keep, all of their rows; each method unlearns from that model: "
        f"{recipe['steps']} steps of {recipe['batch_size']} rows, forget : retain = {recipe['ratio']}, "
        f"{recipe['forget_loss']}+{recipe['retain_loss']}, lr {recipe['lr']:g}, the same for all. Scored are at most "
        f"{task['scored_documents']} documents of each kind and side, with replies of at least {task['reply_tokens']} "
        f"tokens (256 as published, and no true answer is near that); membership is told against "
        f"{task['holdout_documents']} other documents of each kind{_tells(recipe)}. "
        "So few rows make shares coarse, and with them the task aggregate, a harmonic mean; the "
        "score needs MMLU, which `--lm-eval '[mmlu]'` adds for hours on a CPU."
    )


def _tells(recipe: Mapping[str, Any]) -> str:
    made = ", of which the tokenizer, made of the rows that are taught, tells them by itself"
    return made if recipe.get("model") == "tiny" else ""


def page(recipe: str, seeds: Sequence[int]) -> str:
    """All numbers of the comparison, and how they were made."""
    out = Path("runs/lume") / recipe
    results = runs.read_results(out)
    environment = json.loads((out / "env.json").read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {environment['versions'][name]}" for name in ("torch", "transformers"))
    settings = yaml.safe_load(Path(f"recipes/{recipe}.yaml").read_text(encoding="utf-8"))
    head, body = report.turned(*report.rows(results))
    step = ["median step", "", *(f"{entry['step_seconds']:.2f} s" for entry in results["runs"])]
    turned = len(head) == len(results["runs"]) + 2
    lines = table(head, [*body, step] if turned else body)
    for title, rows in report.details(results).items():
        lines += table([title, *(of.name for of in report.columns(results))], rows)
    return "\n".join(
        [
            "# LUME",
            "",
            f"{datetime.date.today().isoformat()}, {environment['processor']}, {environment['threads']} threads, "
            f"{versions}. Made by",
            "",
            f"    dualoptim {shlex.join(command(recipe, 'FOLDER', seeds))}",
            "",
            setting(settings),
            "",
            *lines,
            *(f"- not computed: {sentence}" for sentence in report.not_computed(results)),
            "",
        ]
    )


def main() -> None:
    """Memorize, unlearn, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder of LUME's files; without it, the hub")
    parser.add_argument("--recipe", default="lume_smollm2", choices=("lume_smollm2", "lume_tiny"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--page", type=Path, default=PAGE, help="where the page is written")
    options = parser.parse_args()
    told = command(options.recipe, options.data_dir, options.seeds)
    subprocess.run([sys.executable, "-m", "dualoptim", *told, "--resume"], check=True)
    before = options.page.read_text(encoding="utf-8") if options.page.exists() else ""
    reading = READING + before.partition(READING)[2] if READING in before else ""
    options.page.write_text(page(options.recipe, options.seeds) + reading, encoding="utf-8")


if __name__ == "__main__":
    main()
