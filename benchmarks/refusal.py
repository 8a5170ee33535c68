"""How well the rule of `dualoptim.evaluation.refusal` finds refusals that people labeled.

    python benchmarks/refusal.py --data-dir FOLDER     FOLDER holds safety/ with XSTest's labeled completions

Writes benchmarks/refusal.md. XSTest: arXiv 2308.01263, CC-BY-4.0.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import random
from collections import Counter
from pathlib import Path

from dualoptim.data import data_file
from dualoptim.evaluation.refusal import refuses

FILES = {
    "xstest_completions_llama2orig.csv": "Llama 2 (tuned on)",
    "xstest_completions_gpt4.csv": "GPT-4 (held out)",
}
FULL = "2_full_refusal"
RESAMPLES = 2000

Labelled = list[tuple[bool, str]]  # what the rule says, and the label of two people


def read(path: Path) -> Labelled:
    """The rule's verdict on every completion, and its label."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(refuses(row["completion"]), row["final_label"]) for row in csv.DictReader(file)]


def measures(verdicts: Labelled) -> tuple[float, float, float]:
    """Precision, recall and F1 of full refusal against the rest."""
    hits = sum(said and label == FULL for said, label in verdicts)
    said, true = sum(said for said, _ in verdicts), sum(label == FULL for _, label in verdicts)
    precision, recall = hits / max(said, 1), hits / max(true, 1)
    return precision, recall, 2 * hits / max(said + true, 1)


def interval(verdicts: Labelled) -> tuple[float, float]:
    """Bootstrapped 95 % interval of F1."""
    draw = random.Random(0)
    values = sorted(measures(draw.choices(verdicts, k=len(verdicts)))[2] for _ in range(RESAMPLES))
    return values[round(0.025 * RESAMPLES)], values[round(0.975 * RESAMPLES) - 1]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", required=True)
    options = parser.parse_args()
    lines = ["| replies of | full refusals | precision | recall | F1 | 95 % interval |", "|---|--:|--:|--:|--:|--:|"]
    wrong = ["| replies of | label | taken for a refusal | not |", "|---|---|--:|--:|"]
    for file, name in FILES.items():
        verdicts = read(data_file(options.data_dir, "safety", file))
        precision, recall, f1 = measures(verdicts)
        low, high = interval(verdicts)
        true = sum(label == FULL for _, label in verdicts)
        lines.append(
            f"| {name} | {true} of {len(verdicts)} | {precision:.3f} | {recall:.3f} | {f1:.3f} "
            f"| {low:.3f} to {high:.3f} |"
        )
        counts = Counter(verdicts)
        for label in sorted({label for _, label in verdicts}):
            words = label[2:].replace("_", " ")
            wrong.append(f"| {name} | {words} | {counts[True, label]} | {counts[False, label]} |")
    text = "\n".join(
        [
            "# Telling refusals from help",
            "",
            f"{datetime.date.today().isoformat()}. Made by",
            "",
            "    python benchmarks/refusal.py --data-dir FOLDER",
            "",
            "`dualoptim.evaluation.refusal.refuses` on replies to XSTest's 450 prompts, of which two people said "
            "whether they comply, refuse in full or in part: full refusal against the rest. The rule was tuned on "
            "Llama 2's replies; GPT-4's were looked at when it was settled, for this table alone. The interval is a "
            f"bootstrap over replies, {RESAMPLES} resamples.",
            "",
            *lines,
            "",
            *wrong,
            "",
            "Llama 2's partial refusals are the hard part: it declines in the words of a full refusal, and then helps "
            "in a sentence. GPT-4 refuses in few set phrases, so its figure says more about models that do so than "
            "about others.",
            "",
        ]
    )
    print(text)
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
