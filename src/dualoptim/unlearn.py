"""Unlearning runs: config → model, task, trainer → results.

`run` does one method or several from the same start, or one part of a task after the other, and writes the folder that
`dualoptim.runs` describes; `evaluate` only scores a model. With several ranks (`dualoptim.ranks`), all do this, and one
writes. `dualoptim.one_run` has the two halves of a run: `prepare` and `train`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from . import adapters, ranks, report, resolve, runs
from .cached import without_cache
from .config import RunConfig, without_place
from .device import device_and_precision, scored_in, scoring_in, settled
from .evaluation import general
from .folder import ADAPTER, MODEL, PAGE, PARTS, RECORDS, RESULTS, RUNS, check_kind, clear, emptied, move_own, owned
from .folder import check as check_folder
from .grid import complete, together
from .models import load_model
from .one_run.keeping import write_numbers
from .one_run.prepared import ABILITY, Prepared, Records, loading, prepare, score_retrained, with_more
from .one_run.train import train
from .points import Run, points_of
from .report import card
from .resolved import Resolved, beside
from .resolved import resolve as resolve_all
from .rows import alternates
from .tasks import Task

__all__ = ["Prepared", "as_told", "evaluate", "prepare", "run", "train"]


def run(
    configs: Sequence[RunConfig],
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    inputs: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """Run one method, or several from the same start and budget, and write the folder that `dualoptim.runs` describes.

    Args:
        configs: one for each run; they differ only in method and seed.
        out: the folder.
        resume: keep the folder's finished runs with the same config, and resume others from checkpoints.
        overwrite: replace what a run wrote there, once everything has been checked.
        inputs: setting → a further file that is read and must not be overwritten.
    """
    read = {**configs[0].inputs, **(inputs or {})}
    check_folder(out, read, resume=resume, overwrite=overwrite)
    resolve.check_read(configs)
    resolved = resolve_all(configs)
    stages = resolved[0].task.stages()
    if not overwrite:
        check_kind(out, PARTS if stages else RUNS)
    for arguments in stages:
        resolve_all([config.replace(task_args={**config.task_args, **arguments}) for config in configs])
    with owned(out, read, resume=resume, overwrite=overwrite) as folder, as_told(configs[0]):
        if stages:
            return _one_after_the_other(resolved, stages, folder, resume=resume, overwrite=overwrite)

        def begin() -> None:
            if overwrite:
                emptied(folder)

        return _side_by_side(resolved, folder, resume=resume, begin=begin)


@contextmanager
def as_told(config: RunConfig) -> Iterator[None]:
    """A context in which models are scored in the config's precision, and a private run caches nothing."""
    with scoring_in(settled(config).score_bf16), without_cache() if config.private else nullcontext():
        yield


def evaluate(config: RunConfig, base: str | None = None) -> tuple[Task, dict[str, Records], Records | None, str]:
    """Score a model on a task: the task, records "before" and "after", a retrained model's, and scoring's precision.

    Args:
        base: the model before unlearning, scored as well.
    """
    with as_told(config):
        return *_evaluated(config, base), scored_in()


def _evaluated(config: RunConfig, base: str | None) -> tuple[Task, dict[str, Records], Records | None]:
    (resolved,) = resolve_all([config], training=False)
    task = resolved.task
    first_of = beside(resolved, base) if base else resolved
    device, _ = device_and_precision()

    def loaded(of: Resolved) -> tuple[Any, Any]:
        model = load_model(of.start.place(), **loading(config)).to(device).requires_grad_(False)
        return model, of.tokenizer

    gold = score_retrained(resolved)
    first = loaded(first_of)
    before = with_more(config, task, *first, task.prepare(*first), config.attacks)
    if not base:
        return task, {"after": before}, gold
    del first
    second = loaded(resolved)
    after = with_more(config, task, *second, task.score(*second), config.attacks, before)
    return task, {"before": before, "after": after}, gold


def _side_by_side(
    resolved: Sequence[Resolved], folder: Path, *, resume: bool, begin: Callable[[], None]
) -> dict[str, Any]:
    """Runs of one start.

    Args:
        begin: called once the model is loaded and scored, before anything is written.
    """

    def own_folder(method: str, seed: int) -> Path:
        return folder if len(resolved) == 1 else folder / runs.of_method(method, seed)

    # What was begun as a run by itself, in the folder itself, and now becomes one of several.
    alone = ranks.of_first(lambda: runs.begun_alone(folder)) if resume and len(resolved) > 1 else None

    def places(of: Resolved) -> list[Path]:
        return [own_folder(of.config.method, of.config.seed), *([folder] if of.config.settings() == alone else [])]

    def taken_over() -> list[dict[str, Any]]:
        return [
            entry
            for entry, of in (runs.finished(folder, resolved) if resume else [])
            if runs.is_whole(entry, of, *places(of))
        ]

    finished = ranks.of_first(taken_over)
    taken = [without_place(entry["config"]) for entry in finished]
    missing = [of for of in resolved if of.config.settings() not in taken]
    if finished:
        print(f"Taken over from {folder}: {', '.join(entry['method'] for entry in finished)}")
    if not missing:
        results = runs.read_results(folder)
        report.write(results, folder / PAGE)
        return results
    prepared, task = prepare(missing[0], folder / alternates.FILE if resume else None), missing[0].task
    config = missing[0].config
    secrets = runs.texts_of(task) if config.private else None
    told = runs.redacted(secrets, [*task.notes, *prepared.notes])
    for note in told:
        print(note, flush=True)
    begin()
    said = dict(task.objectives) if task.built else {}  # rows in the model's own words
    if prepared.alternates:
        said[Path(alternates.FILE).stem] = alternates.to_write(
            prepared.alternates, missing[0].losses, missing[0].identity
        )
    said = {} if config.private else said
    own_folders = [own_folder(of.config.method, of.config.seed) for of in resolved]
    made = [own.name for own in own_folders if own != folder]
    for of, own in zip(resolved, own_folders, strict=True):
        if of.config.settings() == alone:
            runs.write_settings(folder, [of.config], said, made)  # the folder is recorded before it is there
            move_own(folder, own)
    order = [of.config.settings() for of in resolved]
    runs.write_settings(folder, [of.config for of in resolved], said, made)
    runs.write_rows(folder, said)
    results = {
        "schema": runs.SCHEMA,
        "task": task.name,
        "model": config.model,
        "private": config.private,
        "forgets": resolved[0].forgets,
        "followed": task.followed,
        "curves": {**task.curves, **({ABILITY: "What it could before ↑"} if prepared.ability else {})},
        "scores": dict(task.scores),
        "metrics": {name: metric._asdict() for name, metric in prepared.metrics.items()},
        "counts": general.counts(task, prepared.metrics, prepared.before.records),
        "notes": told,
        "plane": list(task.plane) if task.plane else None,
        "points": [],
        "runs": finished,
    }

    def keep(entry: dict[str, Any]) -> Mapping[str, str] | None:
        own = runs.without(secrets, {"run": entry})["run"]
        results["runs"].append(own)
        results["runs"].sort(key=lambda entry: order.index(without_place(entry["config"])))
        results["notes"] = [*told, *runs.troubles(results["runs"])]
        found: list[Run] = [(run, {}, own_folder(run["method"], run["seed"])) for run in results["runs"]]
        results["points"] = points_of(found, results["plane"], results["counts"], results["metrics"])
        own_place = own_folder(entry["method"], entry["seed"])
        write_numbers(folder / RESULTS, results, results, own_place / RECORDS)
        return card.beside(results, own)

    def show() -> None:
        if results["runs"]:
            report.write(results, folder / PAGE)

    for of in missing:
        own = own_folder(of.config.method, of.config.seed)
        if ranks.first():
            own.mkdir(exist_ok=True)
            clear(own)
        with ranks.saving(show):
            train(prepared, of, own, keep, resume=resume)
        ranks.of_first(show)
    return ranks.of_first(lambda: runs.read_results(folder))


def _one_after_the_other(
    resolved: Sequence[Resolved], stages: Sequence[dict[str, Any]], out: Path, *, resume: bool, overwrite: bool
) -> dict[str, Any]:
    """Forget one part of a task after the other, each starting from the model that the one before it left.

    Every method has a folder, with a run for every part; OUT/results.json has all runs.
    """
    configs = [of.config for of in resolved]
    if resume:
        ranks.of_first(lambda: runs.check_begun(out, configs))
    emptying = overwrite

    def name_of(config: RunConfig, arguments: Mapping[str, Any]) -> str:
        return f"{runs.of_method(config.method, config.seed)}/{runs.of_part(arguments[resolved[0].task.stage])}"

    def begin() -> None:
        nonlocal emptying
        if emptying:
            emptied(out)
        emptying = False
        runs.write_settings(out, configs, {}, [name_of(config, each) for config in configs for each in stages])
        if ranks.first():
            folder.mkdir(parents=True, exist_ok=True)

    results: dict[str, Any] = {}
    finished: list[dict[str, Any]] = []
    for config in configs:
        model: str | None = None
        for i, arguments in enumerate(stages):
            stage = config.replace(task_args={**config.task_args, **arguments})
            (begins,) = resolve_all([stage])
            retrained = begins.retrained.place() if begins.retrained else None
            stage = stage.replace(
                model=model or begins.start.place(), retrained=retrained, memorise=False, memorise_args={}
            )
            if begins.adapted and not begins.merge and model is not None:
                stage = stage.replace(**adapters.going_on())
            if i + 1 < len(stages):
                stage = stage.replace(save_model=True)
            folder = out / name_of(config, arguments)
            done = _side_by_side(resolve_all([stage.replace(out=str(folder))]), folder, resume=resume, begin=begin)
            model = str(folder / (MODEL if (folder / MODEL).is_dir() else ADAPTER))
            # Parts forget different rows, so they cannot be compared in one plot.
            noted = [note for note in done["notes"] if note not in runs.troubles(done["runs"])]  # which name no part
            entry = {**done["runs"][0], "part": arguments[begins.task.stage]}
            finished.append({**done, "run": entry, "notes": noted, "plane": None})
            about = together(finished)
            results = {key: value for key, value in about.items() if key != "run"}
            results |= {"model": config.model, "points": [], "runs": [complete(each, about) for each in finished]}
            results["notes"] = [*about["notes"], *runs.troubles(results["runs"])]
            runs.write_json(out / RESULTS, results)
            report.write(results, out / PAGE)
            if not done["runs"][0]["finite"]:
                break
    return results
