"""The raw results of the evidence → its page: scores, intervals, paired differences, Holm's correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dualoptim.reading import json_lines
from evidence import METHODS, STUDIES, Cell, Study, chosen, reported, score, tuning

HERE = Path(__file__).parent
PAGE = HERE / "evidence.md"
QUADRATICS = HERE / "evidence" / "quadratics.jsonl"
READING = "\n## Reading\n"
RIVALS = ("Alternating AdamW", "DualOptim+")
RESAMPLES = 2000
Line = Mapping[str, Any]


class Sample:
    """A cell's reported runs: resampled scores, and those of other cells by the same draws.

    Args:
        study: whose parts and seeds they are.
        found: (part, seed) → line; all parts and seeds.
    """

    def __init__(self, study: Study, found: Mapping[tuple[int, int], Line]) -> None:
        self.lines = list(found.values())
        draw = np.random.default_rng(0)  # the same draws for every cell, so that differences are paired
        parts = []
        count = len(study.seeds)
        for part in study.reported:
            lines = [found[part, seed] for seed in study.seeds]
            which = draw.integers(count, size=(RESAMPLES, count))
            weights = np.apply_along_axis(np.bincount, 1, which, minlength=count)  # (R, S)
            shares = {}
            for name in ("forget", "held_out"):
                clusters = sorted({cluster for cluster, _ in lines[0][name]})
                drawn = draw.integers(len(clusters), size=(RESAMPLES, len(clusters)))
                counts = np.apply_along_axis(np.bincount, 1, drawn, minlength=len(clusters))  # (R, C)
                of_row = [clusters.index(cluster) for cluster, _ in lines[0][name]]
                rows = counts[:, of_row].astype(float)  # (R, N)
                values = np.array([[p for _, p in line[name]] for line in lines])  # (S, N)
                per_seed = rows @ values.T / rows.sum(1, keepdims=True)  # (R, S)
                shares[name] = (per_seed * weights).sum(1) / weights.sum(1), float(values.mean())
            parts.append((lines[0]["before"], shares))
        self.scores = np.mean([self._score(before, s["forget"][0], s["held_out"][0]) for before, s in parts], 0)
        self.forget = np.mean([s["forget"][0] for _, s in parts], 0)
        self.held_out = np.mean([s["held_out"][0] for _, s in parts], 0)
        self.score = float(np.mean([score(line) for line in self.lines]))
        self.means = {name: float(np.mean([s[name][1] for _, s in parts])) for name in ("forget", "held_out")}

    @staticmethod
    def _score(before: Mapping[str, float], forget: Any, held_out: Any) -> Any:
        gone = np.maximum(0.0, 1 - forget / before["forget"])
        kept = np.minimum(1.0, held_out / before["held_out"])
        return np.where(gone + kept > 0, 2 * gone * kept / np.maximum(gone + kept, 1e-12), 0.0)


def span(values: Any) -> str:
    """A 95 % interval."""
    low, high = np.quantile(values, [0.025, 0.975])
    return f"{low:.3f} to {high:.3f}"


def two_sided(values: Any) -> float:
    """The bootstrap's p of a difference: twice the smaller share on either side of 0, of one sample more."""
    below, above = (values <= 0).sum() + 1, (values >= 0).sum() + 1
    return float(min(1.0, 2 * min(below, above) / (len(values) + 1)))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's correction.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    found, so_far = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(values) - rank) * values[i]))
        found[i] = round(so_far, 10)
    return found


def samples(study: Study, raw: Sequence[Line]) -> dict[Cell, Sample]:
    """The cells of which all runs that are reported are there."""
    found = {}
    for cell in study.cells:
        lr = chosen(study, raw, cell)
        lines = {
            (line["key"][4], line["key"][5]): line
            for line in raw
            if line["key"][:4] == [*cell, lr] and line["key"][4] in study.reported and line["key"][5] in study.seeds
        }
        if len(lines) == len(study.reported) * len(study.seeds):
            found[cell] = Sample(study, lines)
    return found


def table(
    study: Study, raw: Sequence[Line], found: Mapping[Cell, Sample], loss: str, steps: int, methods: Sequence[str]
) -> list[str]:
    """A row for each method, differences against the rival."""
    have = [method for method in methods if Cell(loss, steps, method) in found]
    rivals = {name: found[cell] for name in RIVALS if (cell := Cell(loss, steps, name)) in found}
    if not have or RIVALS[0] not in rivals:
        return []
    against = {name: _differences(found, loss, steps, have, name) for name in rivals}
    made = [
        "| method | rate | score | p, forgotten | p, held out | "
        + "".join(f"score − {name} | p (Holm) | " for name in rivals)
        + "a step | states |",
        "|---|--:|--:|--:|--:|" + "--:|--:|" * len(rivals) + "--:|--:|",
    ]
    for method in have:
        cell = Cell(loss, steps, method)
        own, lr, tried = found[cell], chosen(study, raw, cell), study.rates_of(cell)
        edge = " (edge)" if lr in (tried[0], tried[-1]) else ""
        apart = "".join(f"{against[name].get(method, ' | ')} | " for name in rivals)
        cost = " | "  # a variant is plain code, which keeps more than it needs
        if "variant" not in METHODS[method]:
            seconds = np.median([line["seconds"] for line in own.lines]) / steps
            cost = f"{1000 * seconds:.0f} ms | {own.lines[0]['bytes'] / 2**20:.0f} MiB"
        made.append(
            f"| {method} | {lr:g}{edge} | {own.score:.3f} ({span(own.scores)}) | {own.means['forget']:.3f} "
            f"({span(own.forget)}) | {own.means['held_out']:.3f} ({span(own.held_out)}) | {apart}{cost} |"
        )
    return made


def _differences(
    found: Mapping[Cell, Sample], loss: str, steps: int, methods: Sequence[str], rival: str
) -> dict[str, str]:
    """Of every other method the paired difference to a rival and its corrected p, as two cells of the table."""
    than = found[Cell(loss, steps, rival)]
    others = [found[Cell(loss, steps, method)] for method in methods if method != rival]
    names = [method for method in methods if method != rival]
    corrected = holm([two_sided(other.scores - than.scores) for other in others])
    return {
        name: f"{other.score - than.score:+.3f} ({span(other.scores - than.scores)}) | "
        + (f"{p:.3f}" if p >= 0.001 else "< 0.001")
        for name, other, p in zip(names, others, corrected, strict=True)
    }


SHOWN = {
    "unattacked_probability": "no attack", "relearn_probability": "relearned", "bits8_probability": "8 bits",
    "nf4_probability": "NF4", "paraphrase_probability": "worst paraphrase", "prefix_probability": "worst prefix",
    "leak_at_16": "leak@16",
}  # fmt: skip


def attacks(study: Study, loss: str, steps: int) -> list[str]:
    """What attacks bring back of each method's models: the mean over parts, the least and the greatest."""
    found: dict[str, list[Line]] = {}
    for line in study.lines("attack"):
        of_loss, budget, method = line["key"][:3]
        if (of_loss, budget) == (loss, steps):
            found.setdefault(method, []).append(line)
    # The parts that are there of every method.
    whole = set.intersection(*({line["key"][4] for line in lines} for lines in found.values())) if found else set()
    found = {method: [line for line in lines if line["key"][4] in whole] for method, lines in found.items()}
    if not whole:
        return []
    made = ["| method | " + " | ".join(SHOWN.values()) + " |", "|---|" + "--:|" * len(SHOWN)]
    columns = {"before": [line["before"] for line in next(iter(found.values()))]}
    columns |= {method: [line["after"] for line in found[method]] for method in METHODS if method in found}
    for method, several in columns.items():
        cells = [_range([numbers[name] for numbers in several]) for name in SHOWN]
        made.append(f"| {method} | " + " | ".join(cells) + " |")
    gain = _range([numbers["relearn_gain_retrained"] for numbers in columns["before"]])
    said = (
        f"Probability of the answers to forget, and leak@16 as a share: the mean over {len(whole)} forget sets, the "
        "least and the greatest in brackets. Seed 0, the settings of the table above."
    )
    return [said, "", *made, "", f"Relearning raises the probability of a model that never knew the rows by {gain}."]


def _range(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def tried(study: Study, raw: Sequence[Line]) -> list[str]:
    """The tuning split's scores, by rate."""
    rates = sorted({lr for cell in study.cells for lr in study.rates_of(cell)})
    heads = [
        "| loss | steps | method | " + " | ".join(f"{lr:g}" for lr in rates) + " |",
        "|---|--:|---|" + "--:|" * len(rates),
    ]
    rows = []
    for cell in study.cells:
        best = chosen(study, raw, cell)
        if best is None:
            continue
        by_rate = {
            line["key"][3]: score(line)
            for line in raw
            if line["key"][:3] == [*cell] and line["key"][4] in study.tuned_on
        }
        texts = {lr: f"{value:.3f}" for lr, value in by_rate.items()} | {best: f"**{by_rate[best]:.3f}**"}
        shown = [texts.get(lr, "") for lr in rates]
        rows.append(f"| {cell.loss} | {cell.steps} | {cell.method} | " + " | ".join(shown) + " |")
    return [*heads, *rows]


def quadratics() -> list[str]:
    """What each method left above the optimum, in parts of a thousand of what there was."""
    if not QUADRATICS.is_file():
        return []
    lines = json_lines(QUADRATICS.read_text(encoding="utf-8"))
    methods = list(dict.fromkeys(line["key"][1] for line in lines))
    left = {tuple(line["key"]): line for line in lines}
    made = ["| objectives | " + " | ".join(methods) + " |", "|---|" + "--:|" * len(methods)]
    for case in dict.fromkeys(line["key"][0] for line in lines):
        if all((case, m) in left for m in methods):
            best = min(left[case, m]["left"] for m in methods)
            cells = [
                ("**{:.1f}** ± {:.1f}" if left[case, m]["left"] == best else "{:.1f} ± {:.1f}").format(
                    1000 * left[case, m]["left"], 1000 * left[case, m]["error"]
                )
                for m in methods
            ]
            made.append(f"| {case} | " + " | ".join(cells) + " |")
    return made


def of_study(study: Study) -> list[str]:
    """One model's tables."""
    raw = study.lines()
    if not raw:
        return []
    found = samples(study, raw)
    planned = [run.key for run in (*tuning(study), *reported(study, raw))]
    done = [line["key"] for line in raw if line["key"] in planned]
    made = [
        f"## {study.title}",
        "",
        f"{len(done)} of {len(planned)} runs are there, and {len(found)} of {len(study.cells)} cells are whole; only "
        f"those are shown. Forget sets: {len(study.reported)}; seeds of each: {len(study.seeds)}.",
        "",
    ]
    for loss in study.losses():
        for steps in sorted(study.rates):
            if part := table(study, raw, found, loss, steps, list(METHODS)):
                made += [f"### {study.title}: {loss} + GD, {steps} steps", "", *part, ""]
    for loss in study.losses():
        for steps in sorted(study.rates):
            if part := attacks(study, loss, steps):
                heading = f"### {study.title}: attacks after {loss} + GD, {steps} steps"
                made += [heading, "", *part, ""]
    return [
        *made,
        f"### {study.title}: rates",
        "",
        "Score on the tuning split, one seed; the rate that was taken in bold.",
        "",
        *tried(study, raw),
        "",
    ]


def make() -> str:
    """The page; its last chapter, what a person reads in the numbers, is kept as it is."""
    made = [
        "# Evidence: when do shared optimizer states help?",
        "",
        "Made of `benchmarks/evidence/*.jsonl` by `python benchmarks/evidence.py page`; with `--check` that "
        "fails where the page is not what they make. "
        "The plan, with the setting, the scores and the tests, is [evidence/plan.md](evidence/plan.md).",
        "",
    ]
    for study in STUDIES.values():
        made += of_study(study)
    if part := quadratics():
        made += [
            "## Noisy quadratics",
            "",
            "`python benchmarks/quadratics.py`. What is left above the known optimum after 1,000 steps, ‰ of what "
            "there was at the start, each method at its best of five rates; mean ± standard error of 16 seeds.",
            "",
            *part,
            "",
        ]
    page = "\n".join(made)
    reading = PAGE.read_text(encoding="utf-8").partition(READING)[2] if PAGE.is_file() else ""
    return page + (READING + reading if reading else "")
