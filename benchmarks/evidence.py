"""When do shared optimizer states help? The runs of evidence/plan.md, and the page that is made of them.

    python benchmarks/evidence.py run --data-dir FOLDER --only tune      choose each method's rate, on its own split
    python benchmarks/evidence.py run --data-dir FOLDER --only report --shard 1/2
    python benchmarks/evidence.py run --data-dir FOLDER --study smollm2  the same of the larger model
    python benchmarks/evidence.py run --data-dir FOLDER --only attack    attack reported models (dualoptim[qlora])
    python benchmarks/evidence.py page                                   write evidence.md from the raw results
    python benchmarks/evidence.py --check                                fail where evidence.md is not what they make

FOLDER holds TOFU's files. Each run leaves a line in evidence/STUDY.jsonl and is not done twice, so that a run that was
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from dualoptim.reading import json_lines

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

BASE: dict[str, Any] = {
    "memorise": True, "task": "tofu", "retain_loss": "GD", "ratio": "1:5", "batch_size": 6, "betas": (0.9, 0.95),
    "save_model": False, "curve_points": 0, "fast": True,
}  # fmt: skip
TASK = {"split": "forget01", "retain_rows": 60, "held_out_rows": 60, "scored_rows": 40}
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
    "DualOptim, rates equal": {"optimizer": "DualOptim", "lr_scales": "equal"},
    "DualOptim+, rates equal": {**PLUS, "lr_scales": "equal"},
    "DualOptim+, all equal": {**PLUS, "lr_scales": "equal", "base_weights": "equal"},
    "half the drift": {**PLUS, "variant": {"drift": 0.5}},
    "3/4 of the drift": {**PLUS, "variant": {"drift": 0.75}},
    "5/4 of the drift": {**PLUS, "variant": {"drift": 1.25}},
    "own v": {**PLUS, "variant": {"second": "own"}},
    "mean v": {**PLUS, "variant": {"second": "mean"}},
    "max v": {**PLUS, "variant": {"second": "max"}},
    "equal base, own v": {**PLUS, "variant": {"weights": "equal", "second": "own"}},
    "equal base, mean v": {**PLUS, "variant": {"weights": "equal", "second": "mean"}},
    "equal base, one v": {**PLUS, "variant": {"weights": "equal", "second": "all"}},
    "equal base, max v": {**PLUS, "variant": {"weights": "equal", "second": "max"}},
    "own m, one v": {**PLUS, "variant": {"drift": 0.0, "second": "all"}},
}


# The published rate of relearning is for far larger models; near this one tiny memorized.
ATTACKED = {"attacks": ["relearn", "bits8", "nf4", "leak", "paraphrase", "prefix"], "relearn_lr": 1e-3,
            "retrained": "make"}  # fmt: skip


class Cell(NamedTuple):
    """One method under one loss and budget: what a rate is chosen for."""

    loss: str
    steps: int
    method: str


MAIN = ("Joint AdamW", "Alternating AdamW", "PDU", "DualOptim", "DualOptim+", "equal base", "base_weights equal")
LASTING = ("Alternating AdamW", "DualOptim", "DualOptim+", "equal base", "base_weights equal")  # with the large budget
SCALED = ("DualOptim, rates equal", "DualOptim+, rates equal", "DualOptim+, all equal")
RULES = tuple(METHODS)[5:]  # what else changes in the rule: asked with one loss and the small budget
TO_ATTACK = ("Joint AdamW", "Alternating AdamW", "DualOptim+", "DualOptim+, rates equal")
OF_SMOLLM2 = ("Alternating AdamW", "DualOptim+", "Joint AdamW", "DualOptim+, rates equal", "base_weights equal")


@dataclass(frozen=True)
class Study:
    """What is asked of one model in one setting.

    Args:
        name: of its file of raw results and its chapter.
        model: that unlearns.
        cells: all that is asked, the questions that matter most first.
        rates: what is tried for every method, by budget.
        further: what is tried besides, by loss.
        settings: of each run, beside BASE.
        tuned_on: parts of forget01, two authors and forty rows each, that choose a rate.
        reported: parts that are reported.
        seeds: of each reported part.
        attacked: the cells whose models are attacked, on the reported parts with the first seed.
    """

    name: str
    model: str
    cells: tuple[Cell, ...]
    rates: Mapping[int, tuple[float, ...]]
    further: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    tuned_on: tuple[int, ...] = (6,)
    reported: tuple[int, ...] = (1, 2, 3, 4, 5)
    seeds: tuple[int, ...] = (0, 1, 2)
    attacked: tuple[Cell, ...] = ()

    @property
    def title(self) -> str:
        """As a heading has it: tiny 1:10."""
        return self.name.replace("_", " ", 1).replace("_", ":")

    def file(self, stage: str) -> Path:
        """Where its lines are: those of attacked models in a file of their own."""
        return HERE / "evidence" / f"{self.name}{'_attacks' if stage == 'attack' else ''}.jsonl"

    def lines(self, stage: str = "report") -> list[dict[str, Any]]:
        """The raw results."""
        file = self.file(stage)
        return json_lines(file.read_text(encoding="utf-8")) if file.is_file() else []

    def rates_of(self, cell: Cell) -> tuple[float, ...]:
        """What is tried for a method under one loss and budget."""
        return self.rates[cell.steps] + self.further.get(cell.loss, ())

    def losses(self) -> list[str]:
        """What is asked for."""
        return list(dict.fromkeys(cell.loss for cell in self.cells))


def _of(loss: str, steps: int, methods: Sequence[str]) -> list[Cell]:
    return [Cell(loss, steps, method) for method in methods]


RATES = (1e-4, 2e-4, 4e-4, 7e-4, 1.2e-3, 2e-3)
OF_TINY = {"bf16": False, "score_bf16": False}
TINY = Study(
    "tiny",
    "tiny",
    tuple(
        dict.fromkeys(
            _of("NPO", SHORT, (*MAIN, *RULES))
            + _of("IDK", SHORT, MAIN)
            + _of("NPO", LONG, LASTING)
            + _of("SimNPO", SHORT, MAIN)
            + _of("ME", SHORT, MAIN)
            + [cell for loss in ("IDK", "SimNPO", "ME") for cell in _of(loss, SHORT, SCALED)]
            + _of("NPO", LONG, SCALED)
        )
    ),
    {SHORT: RATES, LONG: (5e-5, *RATES)},  # the larger budget wants smaller ones
    settings=OF_TINY,
    attacked=tuple(_of("NPO", SHORT, TO_ATTACK) + _of("IDK", SHORT, TO_ATTACK)),
)
OF_RATIOS = ("Alternating AdamW", "DualOptim", "DualOptim+", "base_weights equal", "DualOptim+, all equal")
EVEN = Study(
    "tiny_1_1",
    "tiny",
    tuple(_of("NPO", SHORT, OF_RATIOS[:3])),  # where all is equal
    {SHORT: RATES},
    settings={**OF_TINY, "ratio": "1:1"},
)
RARE = Study(
    "tiny_1_10", "tiny", tuple(_of("NPO", SHORT, OF_RATIOS)), {SHORT: RATES}, settings={**OF_TINY, "ratio": "1:10"}
)
SMOLLM2 = Study(
    "smollm2",
    "smollm2",
    tuple(_of("NPO", SHORT, OF_SMOLLM2) + _of("IDK", SHORT, OF_SMOLLM2)),
    {SHORT: (6e-5, 1.2e-4, 2.4e-4, 4.8e-4, 9.6e-4)},
    further={"IDK": (1.9e-3, 3.8e-3)},  # at 9.6e-4 four of five methods were still better than below
    reported=(1, 2, 3),
    seeds=(0,),
)
STUDIES = {study.name: study for study in (TINY, EVEN, RARE, SMOLLM2)}


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


def score(line: Mapping[str, Any]) -> float:
    """Harmonic mean of what is forgotten, 1 − p/p₀ of the rows to forget, and of what is kept, p/p₀ of those held out.

    p is mean p(answer | question), p₀ before training. Of runs whose rows were not kept, the score stands in the line.
    """
    if "score" in line:
        return float(line["score"])
    before = line["before"]
    gone = max(0.0, 1 - mean(line["forget"]) / before["forget"])
    kept = min(1.0, mean(line["held_out"]) / before["held_out"])
    return 2 * gone * kept / (gone + kept) if gone + kept else 0.0


def mean(values: Sequence[Sequence[Any]]) -> float:
    """Of [cluster, p] pairs."""
    return math.fsum(p for _, p in values) / len(values)


def chosen(study: Study, raw: Sequence[Mapping[str, Any]], cell: Cell) -> float | None:
    """The rate with the highest mean score on the tuning split; None before all of them were tried."""
    found = {
        lr: [score(line) for line in raw if line["key"][:4] == [*cell, lr] and line["key"][4] in study.tuned_on]
        for lr in study.rates_of(cell)
    }
    if not all(found.values()):
        return None
    return max(found, key=lambda lr: sum(found[lr]) / len(found[lr]))


def tuning(study: Study) -> list[Run]:
    """The runs that choose rates: the same number for every method."""
    return [Run(cell, lr, part, 0) for cell in study.cells for part in study.tuned_on for lr in study.rates_of(cell)]


def reported(study: Study, raw: Sequence[Mapping[str, Any]]) -> list[Run]:
    """The runs that are reported, of the cells whose rate is chosen; part by part, since teaching one takes long."""
    rates = [(cell, lr) for cell in study.cells if (lr := chosen(study, raw, cell)) is not None]
    return [Run(cell, lr, part, seed) for part in study.reported for cell, lr in rates for seed in study.seeds]


def do(study: Study, runs: Sequence[Run], data_dir: str, minutes: float, stage: str) -> Iterator[dict[str, Any]]:
    """Do runs, and give the line of each; part by part, so that every start is scored once."""
    from dualoptim import unlearn
    from dualoptim.runs import RECORDS

    began, prepared = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as scratch:
        for run in runs:
            if time.monotonic() - began > 60 * minutes:
                return
            if run.key in [line["key"] for line in study.lines(stage)]:  # of another process
                continue
            of = _resolved(study, run, data_dir, stage)
            of_start = run.part, of.needs_second_model
            if of_start not in prepared:
                prepared[of_start] = unlearn.prepare(of)
            entries: list[dict[str, Any]] = []
            unlearn.train(prepared[of_start], of, Path(scratch), entries.append)
            (entry,) = entries
            line = _attacks(entry, of.task.metrics) if stage == "attack" else _scores(entry, Path(scratch) / RECORDS)
            yield {"key": run.key, **line, "finite": entry["finite"]}


def _resolved(study: Study, run: Run, data_dir: str, stage: str) -> Any:
    """What a run takes: scored by probability, as attacks write replies enough; a variant in place of the optimizer."""
    from dualoptim.config import RunConfig
    from dualoptim.fast import ByProbability
    from dualoptim.resolved import resolve
    from variants import Variant

    method = dict(METHODS[run.cell.method])
    variant = method.pop("variant", None)
    of_run = {"model": study.model, "forget_loss": run.cell.loss, "steps": run.cell.steps, "lr": run.lr,
              "seed": run.seed, "data_dir": data_dir, "task_args": {**TASK, "part": run.part}}  # fmt: skip
    attack = {"fast": False, **ATTACKED} if stage == "attack" else {}
    (of,) = resolve([RunConfig(**{**BASE, **study.settings, **method, **of_run, **attack})])
    if attack:
        of = replace(of, task=ByProbability(of.task))
    return of if variant is None else replace(of, optimizer=(Variant, {**of.optimizer[1], **variant}))


def _attacks(entry: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the attacks, which are none of the task's own."""
    shown = [name for name in entry["after"] if name not in own]

    def short(value: float | None) -> float | None:
        return None if value is None else round(value, 5)

    return {when: {name: short(entry[when].get(name)) for name in shown} for when in ("before", "after")}


def _scores(entry: Mapping[str, Any], records: Path) -> dict[str, Any]:
    """Each row's probability after training, and the means before."""
    after: dict[str, list[list[Any]]] = {"forget": [], "held_out": [], "retain": []}
    for record in json_lines(records.read_text(encoding="utf-8")):
        if record["when"] == "after":
            p = math.exp(-record["nll"]) if record["nll"] is not None else 0.0
            after[record["set"]].append([record["cluster"].rpartition(" ")[2], round(p, 4)])
    return {
        "before": {name: entry["before"][f"{name}_probability"] for name in after},
        "retain": round(mean(after["retain"]), 4) if after["retain"] else None,
        "forget": after["forget"],
        "held_out": after["held_out"],
        "seconds": entry["seconds"],
        "bytes": entry["optimizer_state_bytes"],
    }


def write(study: Study, stage: str, line: Mapping[str, Any]) -> None:
    """Add a line to the raw results."""
    target = study.file(stage)
    target.parent.mkdir(exist_ok=True)
    with FileLock(f"{target}.lock"), target.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    """Run, write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("run", "page"), default="page")
    parser.add_argument("--data-dir")
    parser.add_argument("--study", choices=STUDIES, default="tiny")
    parser.add_argument("--only", choices=("tune", "report", "attack"), default="tune")
    parser.add_argument("--loss", help="runs of this loss to forget alone")
    parser.add_argument("--shard", default="1/1", help="i/n: every n-th run from the i-th on")
    parser.add_argument("--minutes", type=float, default=40, help="begin no run after so many")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.command == "run":
        study = STUDIES[options.study]
        raw = study.lines()
        done = [line["key"] for line in study.lines(options.only)]
        number, of = map(int, options.shard.split("/"))
        planned = tuning(study) if options.only == "tune" else reported(study, raw)
        if options.only == "attack":
            planned = [run for run in planned if run.cell in study.attacked and run.seed == study.seeds[0]]
        planned = [run for run in planned if options.loss in (None, run.cell.loss)]
        mine = [run for run in planned[number - 1 :: of] if run.key not in done]
        print(f"{len(mine)} of {len(planned)} runs to do", flush=True)
        for line in do(study, mine, options.data_dir, options.minutes, options.only):
            write(study, options.only, line)
            told = line["after"] if options.only == "attack" else [f"score {score(line):.3f}", f"{line['seconds']} s"]
            print(*line["key"], told, flush=True)
        return
    from evidence_page import make

    page, target = make(), HERE / "evidence.md"
    if options.check:
        sys.exit(target.read_text(encoding="utf-8") != page and f"{target}: is not what evidence/ makes; run page")
    target.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
