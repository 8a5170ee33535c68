"""A finished run's numbers, with intervals, and the attacks that they come from."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from .. import __version__, runs
from ..errors import UserError
from ..evaluation.shares import LEVEL as LEVEL
from ..evaluation.shares import wilson
from ..points import effective
from .evidence import Run

RESAMPLES = 1000
TESTS = "forget_quality"  # a p-value and its distance have no intervals: a resample's ties distort them
WILSON, BOOTSTRAP = "wilson", "bootstrap"
METHODS = {
    WILSON: "Wilson score interval of a share of n samples (scipy.stats.binomtest); of n_effective where several "
    "samples are of one cluster, such as wordings of one row (dualoptim.evaluation.shares)",
    BOOTSTRAP: f"percentiles of {RESAMPLES} resamples of the clusters of samples, such as rows or authors, each set "
    "drawn on its own, seed 0 (scipy.stats.bootstrap)",
    "none": "no interval: fewer than two clusters of samples, all of one value, a test, or samples that were not kept",
}
# Attack → what it does, and a pattern for the names of its numbers.
ATTACKS = {
    "rewording": ("questions in other wordings, never trained on", r"reworded_answered|forget_accuracy"),
    "sampling": (
        "several replies sampled for each question, of which the worst counts",
        r"sampled_answered|leak_at_\d+",
    ),
    "likelihood": ("the answer's probability when the model is made to say it", r"(forget|whole)(_\w+)?_probability"),
    "extraction": (
        "how much of an answer or a text the model completes by itself",
        r"extraction_strength|exact_memori[sz]ation|verbatim",
    ),
    "membership": ("whether rows can be told from rows never seen", r"auc_\w+|privacy_leakage"),
    "relearning": ("training on the rows again", r"\w*relearn\w*"),
    "quantization": ("rounding the weights to few bits", r"(bits8|nf4)_\w+|\w*quanti[sz]\w*"),
    "paraphrase": ("questions reworded by another model, or in other languages", r"\w*paraphras\w*"),
    "prompting": (
        "prompts that talk the model out of refusing, or begin its answer",
        r"prefix_\w+|rwku_forget_level3|\w*(jailbreak|prefill)\w*",
    ),
    "probing": ("reading answers from hidden states", r"\w*prob(e|ing)_\w*"),
}

Records = Mapping[str, Sequence[Mapping[str, Any]]]
Intervals = Mapping[str, Mapping[str, list[float]]]


def numbers(run: Run, remarks: list[str]) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """Every number before and after with its interval, and how many samples of each set there are.

    Raises:
        UserError: the run's samples give other numbers than its results have.
    """
    results, entry = run.results, run.entry
    records, spread = _samples(run, remarks)
    measured: dict[str, Any] = {}
    counts = _asked(run)
    for name, metric in results["metrics"].items():
        n = counts.get(name)
        said: dict[str, Any] = {"label": metric["label"], "group": metric.get("group", ""), "better": metric["better"]}
        why = entry.get("not_computed", {}).get(name)
        for when in ("before", "after"):
            value = entry[when].get(name)
            if value is None:  # also for what is not finite
                why = why or f"no finite number came out ({when})"
            interval = spread.get(when, {}).get(name)
            tells = effective(entry, name, n, when) if n else None
            if n:
                interval = None if value is None else list(wilson(value, n, tells))
            said[when] = {"value": value, "interval": None if value is None else interval}
            if n and tells != n:
                said[when]["n_effective"] = tells
        has_one = said["before"]["interval"] or said["after"]["interval"]
        measured[name] = {
            **said,
            "n": n,
            "interval_by": (WILSON if n else BOOTSTRAP) if has_one else "none",
            "why": why,
        }
    return measured, {when: _sizes(part) for when, part in records.items()}


def _asked(run: Run) -> dict[str, int]:
    """How many samples each of a run's shares is of, as its results have it."""
    return {**run.results.get("counts", {}), **run.entry.get("counts", {})}


def _sizes(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {name: sum(r["set"] == name for r in records) for name in sorted({r["set"] for r in records})}


def _samples(run: Run, remarks: list[str]) -> tuple[Records, Intervals]:
    """The run's samples, and bootstrap intervals of the numbers computed from them, before and after."""
    path = run.own / runs.RECORDS
    if not path.is_file():
        remarks.append(f"{runs.RECORDS} is not there: numbers were not made again, and means have no intervals.")
        return {}, {}
    from .. import tasks
    from ..evaluation import general
    from ..evaluation.numbers import Drawn

    _, records = runs.read_records(path)
    try:
        task = tasks.task_of(run.entry["config"], records["after"])
        gold = records.get("retrained")
        scored = {when: general.scored(task, records[when], gold) for when in ("before", "after")}
        again = {when: found.numbers for when, (found, _) in scored.items()}
        asked = general.counts(task, scored["before"][1], records["before"])
        counts = {when: task.effective_counts(records[when]) for when in again}
    except Exception as error:  # a user's own task, or samples without their text
        remarks.append(
            f"Numbers were not made again of {runs.RECORDS} ({type(error).__name__}), and means have no intervals."
        )
        return records, {}
    n = _asked(run)
    for when, made in again.items():
        told, counted = run.entry.get("effective_counts", {}).get(when, {}), counts[when]
        for what, said, found in (
            *((f"{name} {when}", was, made.get(name)) for name, was in run.entry[when].items()),
            *((f"counts, {name}", n.get(name), asked.get(name)) for name in {**n, **asked}),
            *((f"effective_counts, {name} {when}", told.get(name), counted.get(name)) for name in {**told, **counted}),
        ):
            if not _same(said, found):
                raise UserError(
                    f"{run.folder / runs.RESULTS}: {what} is {said}, and {path} makes it {found}; one was changed, or "
                    f"not made by version {__version__}: take the version of the run, or run again"
                )
    drawn_gold = gold and [Drawn(record) for record in gold]
    spread = {}
    for when, made in again.items():
        names = [name for name in made if not name.startswith(TESTS)]
        drawn = [Drawn(record) for record in records[when]]
        spread[when] = _bootstrapped(task, drawn, drawn_gold, names, progress=f"Intervals, {when}")
    return records, spread


def _same(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) or (math.isnan(a) and math.isnan(b))


def _bootstrapped(
    task: Any,
    records: Sequence[Mapping[str, Any]],
    retrained: Sequence[Mapping[str, Any]] | None,
    names: Sequence[str],
    *,
    progress: str,
) -> dict[str, list[float]]:
    """Intervals of numbers by resampling the clusters of records of each set; none where nothing varies.

    The task computes all its numbers from every resample, so aggregates and areas have intervals as means have.

    Args:
        records: `Drawn`, so that what is slow is computed once for each and not in every resample.
        retrained: likewise.
        names: of the numbers; no tests, which are not computed of resamples.
        progress: what to write beside the progress bar.
    """
    import numpy as np
    from scipy.stats import bootstrap

    from ..evaluation import general
    from ..evaluation.numbers import NOTES

    sets: dict[str, dict[Any, list[Mapping[str, Any]]]] = {}
    for i, record in enumerate(records):
        sets.setdefault(record["set"], {}).setdefault(record.get("cluster", i), []).append(record)
    drawn = {
        name: list(part.values()) for name, part in sets.items() if len(part) > 1 and name not in (NOTES, general.SET)
    }
    fixed = [record for name, part in sets.items() if name not in drawn for each in part.values() for record in each]
    if not drawn:
        return {}

    def statistic(*chosen: Any) -> Any:
        sample = [
            record for part, which in zip(drawn.values(), chosen, strict=True) for i in which for record in part[i]
        ]
        made = general.scored(task, [*sample, *fixed], retrained)[0].numbers
        bar.update()
        return np.array([math.nan if made[name] is None else made[name] for name in names])

    with (
        warnings.catch_warnings(),
        np.errstate(all="ignore"),
        tqdm(total=RESAMPLES, desc=progress, unit="resample", leave=False, disable=None) as bar,
    ):
        warnings.simplefilter("ignore")  # a resample may have none of a kind
        found = bootstrap(
            [np.arange(len(part)) for part in drawn.values()],
            statistic,
            n_resamples=RESAMPLES,
            vectorized=False,
            confidence_level=LEVEL,
            method="percentile",
            random_state=np.random.default_rng(0),
        ).confidence_interval
    ends = zip(names, found.low, found.high, strict=True)
    return {name: [float(low), float(high)] for name, low, high in ends if math.isfinite(low + high) and low < high}


def attacks(measured: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The attacks that have numbers, with these, and the other attacks, each with the reason."""
    run: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for attack, (what, pattern) in ATTACKS.items():
        names = [name for name in measured if re.fullmatch(pattern, name)]
        values = {name: {when: measured[name][when]["value"] for when in ("before", "after")} for name in names}
        if any(value["after"] is not None for value in values.values()):
            run[attack] = {"what": what, "numbers": values}
        else:
            missing[attack] = f"{what}: {'not computed, ' + measured[names[0]]['why'] if names else 'not run'}"
    return run, missing
