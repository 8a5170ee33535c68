"""Many runs from one plan: methods, settings and seeds crossed, shared out over processes, on one page.

Runs of the same start load and score it once. Each run writes its entry into a folder of its own, so that any number of
processes, on any number of machines, share one folder without a server: `--shard 2/8` takes every eighth run from the
second on. Finished runs are kept, and the process that ends last writes all of them to results.json and the page::

    OUT/config.resolved.yaml                    the plan: every run's settings
    OUT/dualoptim-plus-3f2a…-seed0/run.json     a finished run's entry
    OUT/dualoptim-plus-3f2a…-seed0/records.jsonl
    OUT/results.json, OUT/report.html           of all that are finished
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from . import goals, ranks, report, runs
from .command_line import rerun
from .config import PLAIN, READ_BY, RunConfig, typed
from .errors import UserError, unknown
from .evaluation import general
from .folder import ENTRY, GRID, PAGE, RECORDS, RESULTS, check_kind, clear, emptied, others_at_work, owned, turn
from .folder import check as check_folder
from .one_run.keeping import write_numbers
from .points import points_of
from .report import aims, card
from .resolve import changes_of
from .resolved import Resolved
from .resolved import resolve as resolve_all
from .starts import OF_TRAINING

if TYPE_CHECKING:  # which imports what is here
    from .unlearn import Prepared

STOPPING = {"until", "keep_at_least", "pause"}  # runs of one start may differ in these, which `tune` does not search
NOT_CROSSED = {"out", "seed", "fast", "goal", *PLAIN, "optimizer"}
ELSEWHERE = {"seed": "--seeds", "optimizer": "--methods", **dict.fromkeys(PLAIN, "--methods")}


class Shard(NamedTuple):
    """Which part of a plan a process does: every `of`-th run from the `number`-th on."""

    number: int
    of: int

    @classmethod
    def read(cls, text: str) -> Shard:
        """
        >>> Shard.read("2/8")
        Shard(number=2, of=8)
        """
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"shard must be i/n, the i-th of n from 1/n to n/n, but is {text!r}")
        return cls(int(found[1]), int(found[2]))


def crossed(
    given: Mapping[str, Any], methods: Sequence[str], seeds: Sequence[int], grid: Mapping[str, Sequence[Any]]
) -> list[RunConfig]:
    """Each method and seed with every combination of a grid's settings: what `unlearn` with these would do.

    Args:
        given: the settings of a `RunConfig` that the user gave; what a goal chooses for the rest follows for each run
            from all of its own.
        methods: names, as `dualoptim.resolve.methods_of` takes them.
        grid: setting → the values that it takes. One that a run's optimizer does not read makes no further runs.

    Raises:
        UserError: a setting that is not known, or that has an option of its own; or values that are missing, repeated
            or of the wrong type; methods or seeds that are wrong.
    """
    known = RunConfig().as_dict()
    for key, values in grid.items():
        if key not in known:
            raise unknown("setting of grid", key, known, listed="dualoptim unlearn --help lists all settings")
        if key in NOT_CROSSED:
            raise UserError(f"grid: {key} cannot be crossed; give {ELSEWHERE.get(key, f'--{key}')} for it")
        if not isinstance(values, (list, tuple)) or not values:
            raise UserError(f"grid: {key} must have a list of values, but has {values!r}")
        if any(value in values[:i] for i, value in enumerate(values)):
            raise UserError(f"grid: {key} has a value twice: {values!r}")
    typed_values = [[typed("grid", RunConfig, {key: value})[key] for value in each] for key, each in grid.items()]
    found: dict[str, dict[str, dict[str, Any]]] = {}  # of each method and seed, by what it reads of the grid
    optimizers = set()
    for values in itertools.product(*typed_values):
        point = dict(zip(grid, values, strict=True))
        for change in changes_of(RunConfig(**{**given, **point}), methods, seeds):
            optimizers.add(own := change["optimizer"])
            read = {key: value for key, value in point.items() if own in READ_BY.get(key, {own})}
            of_method = found.setdefault(json.dumps(change, sort_keys=True), {})
            of_method[json.dumps(read, sort_keys=True)] = {**given, **change, **read}
    for key in grid:
        if key in READ_BY and READ_BY[key].isdisjoint(optimizers):
            raise UserError(f"grid: none of the methods reads {key}; add one of {' or '.join(sorted(READ_BY[key]))}")
    return goals.all_chosen([each for of_method in found.values() for each in of_method.values()])


def settings_of(config: RunConfig, grid: Mapping[str, Any]) -> dict[str, Any]:
    """What distinguishes a run from others of its method, except the seed: the grid's settings its optimizer reads."""
    plain = config.as_dict()
    return {key: plain[key] for key in grid if config.optimizer in READ_BY.get(key, {config.optimizer})}


def folder_of(config: RunConfig) -> str:
    """The name of a run's own folder."""
    return runs.of_grid(config.method, config.seed, config.as_dict())


def run(
    configs: Sequence[RunConfig],
    out: str | Path,
    *,
    grid: Mapping[str, Any],
    shard: Shard | None = None,
    resume: bool = False,
    overwrite: bool = False,
    inputs: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """Do this process's runs of a plan that are not finished yet, and write the page of all finished runs.

    Args:
        configs: from `crossed`.
        out: the folder that all processes share.
        grid: the settings that they were crossed with.
        shard: this process's part of the runs; None for all of them.
        resume: keep the runs that the folder holds. A shard always does: others may have started it.
        overwrite: replace what the folder holds; not for a shard.
        inputs: setting → a further file that is read.

    Raises:
        UserError: as `dualoptim.unlearn.run`; a shard that would overwrite.
    """
    from .unlearn import as_told, prepare, train

    resolved = checked(configs, out, shard=shard, resume=resume, overwrite=overwrite, inputs=inputs)
    configs = [of.config for of in resolved.values()]
    joins, read = resume or shard is not None, {**configs[0].inputs, **(inputs or {})}
    place = f"{shard.number}-of-{shard.of}" if shard is not None else None
    with owned(out, read, resume=joins, overwrite=overwrite, share=place) as folder, ExitStack() as told:
        begun = False  # nothing is written, or removed, before the first model is loaded
        names = list(resolved)

        def check() -> None:
            runs.check_begun(folder, configs, lambda: others_at_work(folder, place))

        def begin() -> None:
            """Another shard may have begun with other settings since they were checked."""
            with turn(folder, place):
                if overwrite:
                    emptied(folder)
                check()
                runs.write_settings(folder, configs, {}, names)

        def gathered() -> dict[str, Any]:
            """Entries that another shard writes while they are read would be missing, and its page replaced."""
            if overwrite and not begun:
                return {}
            with turn(folder, place):
                check()
                return _gathered(folder, resolved, grid)

        if not overwrite:
            ranks.of_first(check)
        mine = names if shard is None else names[shard.number - 1 :: shard.of]
        done: dict[str, Any] = {} if overwrite else ranks.of_first(lambda: _finished(folder, resolved))
        missing = [name for name in mine if name not in done]
        # A run that fails, on whichever rank, leaves a page of those before it.
        with (
            ranks.saving(gathered),
            tqdm(total=len(mine), initial=len(mine) - len(missing), unit="run", disable=None) as bar,
        ):
            prepared, start, task = None, None, None
            for name in missing:
                of = resolved[name]
                if start != (start := _start_key(of.config, of)):
                    prepared = None  # before the next is loaded
                    told.close()
                    told.enter_context(as_told(of.config))
                    task = copy.deepcopy(of.task)  # `prepare` changes it by what the model knows, once per start
                    prepared = prepare(dataclasses.replace(of, task=task))
                if not begun:
                    ranks.of_first(begin)
                    begun = True
                assert prepared is not None
                assert task is not None
                of = dataclasses.replace(of, task=task)
                own = folder / name
                if ranks.first():
                    own.mkdir(exist_ok=True)
                    clear(own)
                train(
                    prepared,
                    of,
                    own,
                    Keeps(own / ENTRY, about(of, prepared), secrets_of(of)),
                    resume=joins,
                )
                bar.update()
        return ranks.of_first(gathered)


def checked(
    configs: Sequence[RunConfig],
    out: str | Path,
    *,
    shard: Shard | None,
    resume: bool,
    overwrite: bool,
    inputs: Mapping[str, str | None] | None,
) -> dict[str, Resolved]:
    """The runs of a plan, resolved, by their own folders' names; those of one start are next to each other.

    Nothing is written. A shard then prepares few starts.

    Raises:
        UserError: as `run`.
    """
    if shard is not None and overwrite:
        raise UserError("overwrite: other shards may be at work in the folder; empty it first, and leave this out")
    read = {**configs[0].inputs, **(inputs or {})}
    check_folder(out, read, resume=resume or shard is not None, overwrite=overwrite)
    if not overwrite:
        check_kind(out, GRID)
    resolved = {folder_of(of.config): of for group in _by_start(configs) for of in resolve_all(group)}
    if any(of.task.stages() for of in resolved.values()):
        raise UserError("grid, fast and shard: parts that are forgotten one after the other are not crossed; give one")
    by_start: dict[Any, dict[str, Resolved]] = {}
    for name, of in resolved.items():
        by_start.setdefault(_start_key(of.config, of), {})[name] = of
    return {name: of for group in by_start.values() for name, of in group.items()}


class Keeps:
    """Writes a run's entry, with what results.json says about the task; for a private run, without any text of rows."""

    def __init__(self, path: Path, about: dict[str, Any], secrets: Sequence[str] | None) -> None:
        self.path, self.about, self.secrets = path, about, secrets

    def __call__(self, entry: dict[str, Any]) -> dict[str, str] | None:
        """Write the entry; the cards of its models."""
        said = runs.without(self.secrets, {**self.about, "run": entry})
        own = said["run"]
        alone = {**said, "notes": [*said["notes"], *runs.troubles([own])], "runs": [own]}
        write_numbers(self.path, said, alone, self.path.with_name(RECORDS))
        return card.beside(alone, own)


def secrets_of(of: Resolved) -> Sequence[str] | None:
    """The texts that a private run's files must not hold, all texts of its rows; None for other runs."""
    return runs.texts_of(of.task) if of.config.private else None


def about(of: Resolved, prepared: Prepared) -> dict[str, Any]:
    """What results.json says about a run's task and the model before unlearning."""
    task = of.task
    return {
        "task": task.name,
        "model": of.config.model,
        "private": of.config.private,
        "forgets": of.forgets,
        "followed": task.followed,
        "curves": dict(task.curves),
        "scores": dict(task.scores),
        "metrics": {name: metric._asdict() for name, metric in prepared.metrics.items()},
        "counts": general.counts(task, prepared.metrics, prepared.before.records),
        "notes": [*task.notes, *prepared.notes],
        "plane": list(task.plane) if task.plane else None,
    }


def _finished(folder: Path, resolved: Mapping[str, Resolved]) -> dict[str, dict[str, Any]]:
    """The entries of a folder's finished runs, by their own folders' names.

    Raises:
        UserError: one is damaged, or has other rows, another model or other settings.
    """
    found = {}
    for name, of in resolved.items():
        path = folder / name / ENTRY
        if not path.is_file():
            continue
        entry = runs.read_entry(path, of.identity)
        if runs.is_whole(entry["run"], of, folder / name):
            found[name] = entry
    return found


def _gathered(folder: Path, resolved: Mapping[str, Resolved], grid: Mapping[str, Any]) -> dict[str, Any]:
    """Write results.json and the page of all finished runs, in the plan's order."""
    if not (results := results_of(folder, resolved, grid)):
        return {}
    runs.write_json(folder / RESULTS, results)
    report.write(results, folder / PAGE)
    return runs.read_results(folder)


def results_of(folder: Path, resolved: Mapping[str, Resolved], grid: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of results.json for all finished runs, in the plan's order; empty if there are none.

    Args:
        folder: the folder that has the runs' own folders.
        resolved: the runs by their folders' names.
        grid: settings that runs differ in, with their values.
    """
    done = _finished(folder, resolved)
    if not done:
        return {}
    about = together(list(done.values()))
    entries = [complete(each, about) for each in done.values()]
    return {
        "schema": runs.SCHEMA,
        **{key: value for key, value in about.items() if key not in ("run", "plane", "wall_seconds")},
        "notes": [*about["notes"], *runs.troubles(entries, grid)],
        "planned": len(resolved),
        "plan": rerun.plan_of([of.config for of in resolved.values()], grid),
        "grid": {key: list(values) for key, values in grid.items()},
        "plane": about["plane"],
        "points": points_of(
            [(entry, settings_of(resolved[name].config, grid), folder / name)
             for name, entry in zip(done, entries, strict=True)],
            about["plane"],
            about["counts"],
            about["metrics"],
        ),
        "runs": entries,
    }  # fmt: skip


def together(abouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What results.json says about the tasks of runs that may measure different things, as by other task_args.

    It has all metrics and notes; of counts, curves and scores, those that are the same for all runs.
    """
    first = abouts[0]

    def same(key: str) -> dict[str, Any]:
        known = [about[key] for about in abouts]
        return {name: value for name, value in known[0].items() if all(name in k and k[name] == value for k in known)}

    planes = list(dict.fromkeys(json.dumps(about["plane"]) for about in abouts))
    notes = list(dict.fromkeys(note for about in abouts for note in about["notes"]))
    forgets = any(map(aims.forgets, abouts))
    if len(planes) > 1:
        pairs = "; ".join(" and ".join(json.loads(plane) or ["none"]) for plane in planes)
        what = "of what is forgotten and kept" if forgets else "to be compared by"
        notes.append(f"Runs have different metrics {what} ({pairs}), so no picture has all.")
    return {
        **first,
        "private": any(about["private"] for about in abouts),
        "forgets": forgets,
        "metrics": {name: metric for about in abouts for name, metric in about["metrics"].items()},
        **{key: same(key) for key in ("counts", "curves", "scores")},
        "notes": notes,
        "plane": first["plane"] if len(planes) == 1 else None,
    }


def complete(said: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """A run's entry, with null for metrics that other runs alone have, and counts that others do not share."""
    entry = dict(said["run"])
    if lacking := dict.fromkeys(name for name in about["metrics"] if name not in said["metrics"]):
        entry |= {when: {**lacking, **entry[when]} for when in ("before", "after")}
        why = "this run's settings do not ask for it"
        entry["not_computed"] = {**dict.fromkeys(lacking, why), **entry.get("not_computed", {})}
    if own := {name: n for name, n in said["counts"].items() if name not in about["counts"]}:
        entry["counts"] = own
    return entry


def _start_key(config: RunConfig, of: Resolved | None = None) -> Any:
    """A key that is equal for runs of one start: the settings that are not of training, and what losses need of it."""
    settings = {key: value for key, value in config.as_dict().items() if key not in {*OF_TRAINING, *STOPPING}}
    if of is None:
        return json.dumps(settings, sort_keys=True)
    asked = any(loss.needs_alternates for loss in of.losses.values())  # the model is asked for other answers
    if asked:
        settings |= {key: getattr(config, key) for key in ("forget_loss", "forget_loss_args")}
    watched = config.keep_at_least is not None and not of.task.watches_ability  # the model's ability is measured
    return json.dumps(settings, sort_keys=True), config.ratio == "loss", of.needs_second_model, watched


def _by_start(configs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    groups: dict[Any, list[RunConfig]] = {}
    for config in configs:
        groups.setdefault(_start_key(config), []).append(config)
    return list(groups.values())
