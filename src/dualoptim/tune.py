"""A small search for settings: learning rate, ratio, loss and method, by what is forgotten and what is kept.

All methods have the same number of trials, each from the same start, scored only by the probability of answers
(`dualoptim.fast`). A method's first trial has the config's own settings; the next few are drawn at random, the rest by
a tree-structured Parzen estimator (optuna) of both objectives. A trial's settings depend only on the method's earlier
trials, which are read from their folders, so that a search that was killed goes on as if it had not been::

    OUT/config.resolved.yaml, space.yaml          what is searched: each method's own settings, and the space
    OUT/dualoptim-plus-trial003-seed0/run.json    a finished trial's entry, as of a grid
    OUT/results.json, OUT/report.html             all trials, the front among them, and the one that was chosen
    OUT/recipe.yaml                               its settings, for `dualoptim unlearn --recipe`

References:
    Bergstra et al., Algorithms for Hyper-Parameter Optimization, NeurIPS 2011; Ozaki et al., Multiobjective
    Tree-Structured Parzen Estimator, JAIR 73, 2022.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm.auto import tqdm

from . import goals, grid, ranks, report, runs, tasks
from .config import ALONE, GOALS_OWN, MAIN, NO_MULTIPLIER, PLAIN, READ_BY, RunConfig, to_give, typed
from .device import settled
from .errors import UserError, one_line, unknown
from .evaluation import general, probes
from .folder import ENTRY, PAGE, RECIPE, RESULTS, SEARCH, SPACE, check_kind, clear, emptied, owned, written
from .folder import check as check_folder
from .resolve import check_attacks, methods_of
from .resolved import Resolved
from .resolved import resolve as resolve_all
from .starts import OF_TRAINING

TRIALS = 20  # of each method, where neither these nor minutes are given
FIRST = 5  # trials, the config's own settings and random ones, before the estimator has enough to go by
WIDER = 10.0  # factor below and above the config's learning rate
LOSSES, RATIOS = ("NPO", "IDK"), ("1:1", "1:5")  # tried beside the config's own
WORST = (1.0, 0.0)  # what is left to forget, and kept, where the weights were not finite
# Settings by which a trial leaves out parts of a run; the recipe has them as they were given.
QUICK: dict[str, Any] = {
    "fast": True, "save_model": False, "curve_points": 0, "save_every": 0, "report_to": "none", "lm_eval": [],
    "lm_eval_limit": None, "attacks": [], "relearn_lr": None, "probes": [], "probes_dir": None, "probe_subjects": [],
    "probe_limit": None, "retrained": None,
}  # fmt: skip


class Search(NamedTuple):
    """What is searched.

    Args:
        config: the settings of the recipe, except those that are chosen.
        trials_of: method → a trial's settings, with the config's own values for those that are searched.
        space: "lr", lowest and highest, and other settings with the values that they may take.
        trials: of each method, at most; None for as many as there is time for.
        minutes: for all trials together; None for as long as they take.
        rows: on which rows trials are scored, in a sentence; empty where the task says so once it is prepared.
        given: the settings of `config` that the user gave.
        basis: what the goal chooses the others by, where it chooses some.
    """

    config: RunConfig
    trials_of: dict[str, RunConfig]
    space: dict[str, list[Any]]
    trials: int | None
    minutes: float | None
    rows: str
    given: Mapping[str, Any] = {}
    basis: goals.Basis | None = None

    def with_settings(self, config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
        """A config with some settings of the space, and with what the goal chooses by these, as steps by the ratio."""
        searched = {**{key: getattr(config, key) for key in self.space}, **settings}
        chosen = goals.filled({**self.given, **searched}, self.basis)
        own = {"optimizer", *searched, *([] if config.curve_points else ["curve_points"])}  # trials may draw no curve
        return config.replace(**{key: getattr(chosen, key) for key in GOALS_OWN if key not in own}, **settings)

    def of(self, method: str) -> dict[str, list[Any]]:
        """The part of the space that a method reads."""
        return {key: self.space[key] for key in grid.settings_of(self.trials_of[method], self.space)}

    def __str__(self) -> str:
        values = "; ".join(
            f"{key} from {each[0]:g} to {each[1]:g}" if key == "lr" else f"{key} {', '.join(map(str, each))}"
            for key, each in self.space.items()
        )
        most = [f"{self.trials} trials of each method"] if self.trials is not None else []
        most += [f"{self.minutes:g} minutes"] if self.minutes is not None else []
        return f"{values}; methods {', '.join(self.trials_of)}; at most {' and '.join(most)}"


def planned(
    given: Mapping[str, Any],
    space: Mapping[str, Any],
    *,
    trials: int | None = None,
    minutes: float | None = None,
    tune_on: Mapping[str, Any] | None = None,
) -> Search:
    """What is to be searched, checked as far as possible without a model.

    Args:
        given: the settings of a `RunConfig` that the user gave.
        space: setting → values, for "lr" the lowest and the highest; "methods" → names. By default, lr is searched
            within a factor of `WIDER` around the config's own, and for tasks of two objectives also `RATIOS` and
            `LOSSES`.
        trials: of each method; `TRIALS` where neither these nor `minutes` are given.
        minutes: the time limit: no further round of trials is started that would not end within it.
        tune_on: arguments of the task that give it other rows than those of the recipe, to choose on; None for the
            task's own choice of them.

    Raises:
        UserError: optuna is missing; a setting that is not known, cannot be searched or has no values; a budget that is
            not positive; a task without metrics of what is forgotten and kept; attacks, probes or tasks of lm_eval that
            the recipe's run would refuse.
    """
    _optuna()
    for what, value in (("trials", trials), ("minutes", minutes)):
        if value is not None and value <= 0:
            raise UserError(f"{what} must be > 0, but is {value:g}")
    if given.get("fast") is False:
        raise UserError("fast: trials are always scored fast, and the recipe's run is not; leave it out")
    given = {key: value for key, value in given.items() if key != "fast"}
    trials = TRIALS if trials is None and minutes is None else trials
    # Trials, and so the recipe, do not stop at the goal unless that was given: all of them take all their steps.
    given = {"until": None, "keep_at_least": None, "pause": False, **given}
    basis = goals.basis_of(given)
    config = goals.filled(given, basis)
    watches = config.until is not None or config.keep_at_least is not None
    trial = config.replace(**{**QUICK, **({"curve_points": config.curve_points} if watches else {})})
    check_attacks(config)
    if config.lm_eval:
        general.check(config.lm_eval)
    probes.read(config)
    trial, rows = _on_other_rows(trial, tune_on)
    task = tasks.load(trial)
    if task.plane is None:
        raise UserError(
            f"tune: the task {task.name!r} has no rows to forget and to keep whose probability could be told apart; "
            "give another, or compare --grid"
        )
    if task.stages():
        raise UserError("tune: parts that are forgotten one after the other are not searched; give one part")
    methods = _methods(space)
    found = _checked({key: values for key, values in space.items() if key != "methods"}, config, task)
    search = Search(config, {}, found, trials, minutes, rows, given, basis)
    several = methods_of(trial, methods, [config.seed])
    return search._replace(trials_of={of.method: search.with_settings(of, _inside(of, found)) for of in several})


def _inside(config: RunConfig, space: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """What replaces a config's settings that are outside the space: its first value, and for lr the middle of it."""
    plain, read = config.as_dict(), grid.settings_of(config, space)
    changed = {key: space[key][0] for key in read if _text(plain[key]) not in map(_text, space[key])}
    low, high = space["lr"]
    changed["lr"] = config.lr if low <= config.lr <= high else _rounded(math.sqrt(low * high), low, high)
    return changed


def _rounded(lr: float, low: float, high: float) -> float:
    return min(max(float(f"{lr:.3g}"), low), high)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("tune: needs the package optuna; install dualoptim[tune]") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _methods(space: Mapping[str, Any]) -> list[str]:
    methods = space.get("methods", MAIN)
    if not isinstance(methods, (list, tuple)) or not methods:
        raise UserError(f"space: methods must be a list of names, but is {methods!r}")
    if ALONE in methods:
        raise UserError(f"space: {ALONE!r} trains on one objective, so it has no trade to tune; leave it out")
    return list(methods)


def _checked(space: Mapping[str, Any], config: RunConfig, task: tasks.Task) -> dict[str, list[Any]]:
    """The space, with values of the right types, and with the defaults."""
    default: dict[str, list[Any]] = {"lr": [float(f"{config.lr / WIDER:.3g}"), float(f"{config.lr * WIDER:.3g}")]}
    if not task.losses and set(task.objectives) == {"forget", "retain"}:
        default["ratio"] = list(dict.fromkeys([config.ratio, *RATIOS]))
        if config.task is not None:  # for one's own rows, the goal chooses the loss: to refuse is not to erase
            default["forget_loss"] = list(dict.fromkeys([config.forget_loss, *LOSSES]))
    known = [key for key in OF_TRAINING if key not in grid.NOT_CROSSED]
    for key, values in space.items():
        if key not in known:
            other = f"space: {key} makes another start or another run; what is searched is how one start is trained"
            raise UserError(other) if hasattr(config, key) else unknown("setting of space", key, [*known, "methods"])
        if not isinstance(values, (list, tuple)) or not values:
            raise UserError(f"space: {key} must have a list of values, but has {values!r}")
    asked = {
        key: [typed("space", RunConfig, {key: value})[key] for value in values]
        for key, values in {**default, **space}.items()
    }
    low, high = (asked["lr"] * 2)[:2]
    if len(asked["lr"]) != 2 or not 0 < low < high:
        raise UserError(
            f"space: lr must be [lowest, highest], both > 0, but is {asked['lr']}; for choices alone there is "
            "compare --grid"
        )
    return asked


def _on_other_rows(trial: RunConfig, tune_on: Mapping[str, Any] | None) -> tuple[RunConfig, str]:
    """A trial's config on other rows than the recipe's, where the task has such, and a sentence on that."""
    if trial.task is None:
        if tune_on:
            raise UserError("tune_on gives arguments to a --task; with --forget FILE there is none")
        return trial, ""
    try:
        other = dict(tasks.load(trial).to_tune_on() if tune_on is None else tune_on)
        of_other = trial.replace(task_args={**trial.task_args, **other})
        tasks.load(of_other)
    except UserError:
        if tune_on is not None:
            raise
        other = {}  # the task should have such rows, but its data lack them
    if not other:
        return trial, ""
    said = ", ".join(f"{key} {value}" for key, value in other.items())
    return of_other, f"Settings were chosen on other rows than the recipe's: those of the task with {said}."


SAME_ROWS = (
    "Settings were chosen on the very rows that the recipe is to forget and to keep, since the task has no others to "
    "choose on: the best of so many trials looks better than it is, and what `dualoptim unlearn` measures is what "
    "counts."
)


def run(
    search: Search,
    *,
    resume: bool = False,
    overwrite: bool = False,
    inputs: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """Do the trials that are not finished yet, and write the page of all of them and the recipe of the best.

    Args:
        search: from `planned`.
        resume: go on with what the folder holds.
        overwrite: replace what the folder holds.
        inputs: setting → a further file that is read.

    Returns:
        What results.json holds.

    Raises:
        UserError: as `dualoptim.unlearn.run`; no trial whose weights are finite.
    """
    from .unlearn import as_told, prepare, train

    began, out = time.monotonic(), search.config.out
    # The recipe is written of `search.config`, which leaves the precision to the device that it will be run on.
    search = search._replace(trials_of={method: settled(config) for method, config in search.trials_of.items()})
    configs = list(search.trials_of.values())
    start = checked(search, resume=resume, overwrite=overwrite, inputs=inputs)
    read = {**search.config.inputs, **(inputs or {})}
    with owned(out, read, resume=resume, overwrite=overwrite) as folder, as_told(configs[0]):
        trials = _Trials(search, folder, start)
        if not overwrite:
            runs.check_begun(folder, configs)
            _check_space(folder, search.space)
            trials.read()
        began -= sum(trials.seconds.values())  # what was spent before this process counts as well
        with (
            ranks.saving(lambda: _chosen(search, folder, trials)),
            tqdm(total=trials.planned(), initial=len(trials.done), unit="trial", disable=None) as bar,
        ):
            prepared = None
            for number, method in trials.missing():
                if method == configs[0].method and _is_over(search, time.monotonic() - began, trials.round_takes()):
                    break
                if prepared is None:
                    prepared = prepare(start)
                    if overwrite:
                        emptied(folder)
                    written(folder / SPACE, _space_text(search.space))
                runs.write_settings(folder, configs, {}, [trials.name(method, number)])
                of, own = trials.begun(method, number)
                about = grid.about(of, prepared)
                train(
                    prepared,
                    of,
                    own,
                    _Timed(own / ENTRY, {**about, "tuned_on": of.task.tuned_on}, grid.secrets_of(of)),
                )
                trials.ended(method, number)
                bar.update()
        return _chosen(search, folder, trials)


def _is_over(search: Search, seconds: float, more: float) -> bool:
    """Whether there is no time for another trial of each method; the first round always runs."""
    return search.minutes is not None and more > 0 and seconds + more > 60 * search.minutes


def checked(search: Search, *, resume: bool, overwrite: bool, inputs: Mapping[str, str | None] | None) -> Resolved:
    """The resolved start, with all that the trials may need of it; every value of the space is checked on it.

    Nothing is written.

    Raises:
        UserError: as `run`.
    """
    read = {**search.config.inputs, **(inputs or {})}
    check_folder(search.config.out, read, resume=resume, overwrite=overwrite)
    if not overwrite:
        check_kind(search.config.out, SEARCH)
    every = []
    for method, own in search.trials_of.items():
        every += [own, *(search.with_settings(own, {key: v}) for key, each in search.of(method).items() for v in each)]
    resolved = resolve_all(list({json.dumps(config.as_dict()): config for config in every}.values()))
    if any(loss.needs_alternates for of in resolved for loss in of.losses.values()) and (
        len({of.config.forget_loss for of in resolved}) > 1
    ):
        raise UserError("space: AltPO asks the model for answers of its own first, so it is searched by itself")
    wanting = next((of for of in resolved if of.needs_second_model), resolved[0])
    by_loss = any(of.config.ratio == "loss" for of in resolved)
    return wanting.again(wanting.config.replace(ratio="loss")) if by_loss else wanting


def _check_space(folder: Path, space: Mapping[str, Any]) -> None:
    """Refuse to resume with another space than the folder's."""
    path = folder / SPACE
    if path.exists() and path.read_text(encoding="utf-8") != _space_text(space):
        raise UserError(f"out {folder}: holds a search of another space ({SPACE}); give another folder, or --overwrite")


def _space_text(space: Mapping[str, Any]) -> str:
    return yaml.safe_dump(json.loads(json.dumps(space)), sort_keys=True)


class _Timed(grid.Keeps):
    """Writes a trial's entry, with how long it took."""

    def __init__(self, path: Path, about: dict[str, Any], secrets: Sequence[str] | None) -> None:
        super().__init__(path, about, secrets)
        self.began = time.monotonic()

    def __call__(self, entry: dict[str, Any]) -> dict[str, str] | None:
        self.about["wall_seconds"] = round(time.monotonic() - self.began, 2)
        return super().__call__(entry)


class _Trials:
    """The trials in a search's folder, and the settings of each method's next one."""

    def __init__(self, search: Search, folder: Path, start: Resolved) -> None:
        self.search, self.folder, self.start = search, folder, start
        self.done: dict[str, Resolved] = {}  # by their folders' names
        self.seconds: dict[str, float] = {}
        self.values: dict[str, tuple[float, float]] = {}

    def read(self) -> None:
        """Take over the finished trials from the folder."""
        for method in self.search.trials_of:
            for number in itertools.count(1):
                if not (self.folder / self.name(method, number) / ENTRY).is_file():
                    break
                self.ended(method, number)

    def name(self, method: str, number: int) -> str:
        return runs.of_trial(method, number, self.search.config.seed)

    def missing(self) -> Iterator[tuple[int, str]]:
        """The trials still to be done, one round of all methods after the other."""
        for number in itertools.count(1) if self.search.trials is None else range(1, self.search.trials + 1):
            yield from ((number, m) for m in self.search.trials_of if self.name(m, number) not in self.done)

    def of(self, method: str) -> list[str]:
        """The names of a method's finished trials, in their order."""
        names = (self.name(method, number) for number in itertools.count(1))
        return list(itertools.takewhile(self.done.__contains__, names))

    def planned(self) -> int | None:
        """How many trials there are in the end, those beyond the budget from earlier too; None without a number."""
        most = self.search.trials
        return None if most is None else sum(max(most, len(self.of(method))) for method in self.search.trials_of)

    def begun(self, method: str, number: int) -> tuple[Resolved, Path]:
        """A method's next trial, and its folder."""
        own = self.folder / self.name(method, number)
        own.mkdir(exist_ok=True)
        clear(own)
        config = self.search.trials_of[method]
        history = [(self.done[name].config.as_dict(), self.values[name]) for name in self.of(method)]
        if history:
            config = self.search.with_settings(config, proposed(self.search.of(method), history, config.seed))
        return self.start.again(config), own

    def ended(self, method: str, number: int) -> None:
        """Read a finished trial from its folder."""
        name = self.name(method, number)
        said = runs.read_entry(self.folder / name / ENTRY, self.start.identity)
        try:
            entry, seconds = said["run"], float(said["wall_seconds"])
            found = [entry["after"][key] for key in said["plane"]]
            settings = {key: entry["config"][key] for key in self.search.of(method)}
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.folder / name / ENTRY}: is damaged (it is of no trial of this search); remove the folder "
                f"{self.folder / name} and go on with --resume"
            ) from None
        self.done[name] = self.start.again(self.search.with_settings(self.search.trials_of[method], settings))
        self.seconds[name], self.values[name] = seconds, WORST if None in found else (found[0], found[1])

    def round_takes(self) -> float:
        """Seconds that a round takes, one trial of each method, by the longest of each so far."""
        return sum(max((self.seconds[name] for name in self.of(m)), default=0.0) for m in self.search.trials_of)

    def compared(self) -> list[str]:
        """The trials that one is chosen from: equally many of each method; all, if the first round is not complete."""
        by_method = [self.of(method) for method in self.search.trials_of]
        return [name for names in by_method for name in names[: min(map(len, by_method)) or None]]


def _text(value: Any) -> str:
    """A value as text, for the estimator."""
    return json.dumps(value, sort_keys=True)


def proposed(
    space: Mapping[str, Sequence[Any]], history: Sequence[tuple[Mapping[str, Any], tuple[float, float]]], seed: int
) -> dict[str, Any]:
    """The settings of the next trial, by those before it; the same history and seed give the same settings.

    Args:
        space: "lr", lowest and highest, and other settings with their values.
        history: for each trial so far, its settings, perhaps with others, and its values of what is left to forget and
            of what is kept.
        seed: for the draws.
    """
    optuna = _optuna()
    low, high = space["lr"]
    values = {key: {_text(value): value for value in each} for key, each in space.items() if key != "lr"}
    distributions: dict[str, Any] = {"lr": optuna.distributions.FloatDistribution(low, high, log=True)}
    distributions |= {key: optuna.distributions.CategoricalDistribution(list(each)) for key, each in values.items()}
    # Seeded by the number of trials too, so that a resumed search does not repeat earlier draws.
    sampler = optuna.samplers.TPESampler(n_startup_trials=FIRST, seed=1000 * seed + len(history))
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler)
    for settings, found in history:
        params = {key: settings[key] if key == "lr" else _text(settings[key]) for key in distributions}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, values=list(found)))
    asked = study.ask(distributions).params
    return {key: _rounded(asked["lr"], low, high) if key == "lr" else values[key][asked[key]] for key in distributions}


def score(forget: float | None, kept: float | None, before: tuple[float, float]) -> float:
    """The harmonic mean of what is forgotten, 1 − forget/forget before, and of what is kept, kept/kept before.

    Both are limited to 0 to 1; the score is 0 if one of them is 0, or was not measured.

    >>> round(score(0.2, 0.6, (0.8, 0.8)), 3), score(0.9, 0.7, (0.8, 0.8)), score(0.0, 0.9, (0.8, 0.8))
    (0.75, 0.0, 1.0)
    """
    if forget is None or kept is None or not all(before):
        return 0.0
    gone, left = max(0.0, 1 - forget / before[0]), min(1.0, kept / before[1])
    return 2 * gone * left / (gone + left) if gone + left else 0.0


def _chosen(search: Search, folder: Path, trials: _Trials) -> dict[str, Any]:
    """Write the results, the page and the recipe of the best trial."""
    done = {name: trials.done[name] for method in search.trials_of for name in trials.of(method)}
    results = grid.results_of(folder, done, search.space)
    entries, plane = dict(zip(done, results["runs"], strict=True)), results["plane"]
    compared = trials.compared()
    if not any(entries[name].get("finite", True) for name in compared):
        raise UserError("tune: the model of no trial is finite after training; lower the space's lr")
    before = next(iter(entries.values()))["before"]
    of_before = before[plane[0]], before[plane[1]]
    scores = {name: score((at := entries[name]["after"])[plane[0]], at[plane[1]], of_before) for name in compared}
    best = max(compared, key=lambda name: (entries[name].get("finite", True), scores[name]))
    of, after = trials.done[best], entries[best]["after"]
    settings = grid.settings_of(of.config, search.space)
    sentences = _sentences(search, of, compared, scores[best], results.pop("tuned_on"))
    sentences[0] += " " + "; ".join(
        f"{results['metrics'][key]['label']} {before[key]:.3f} → {report.text(after[key], '.3f')}" for key in plane
    ) + "."  # fmt: skip
    known = trials.planned() if search.minutes is None else None
    results |= {
        "planned": len(entries) if known is None else known,
        "chosen": {"method": of.config.method, "settings": settings, "score": scores[best]},
        "notes": [*sentences, *results["notes"]],
    }
    runs.write_json(folder / RESULTS, results)
    report.write(results, folder / PAGE)
    written(folder / RECIPE, recipe(search.with_settings(search.config, settings), of.config, settings, sentences))
    return runs.read_results(folder)


def _sentences(search: Search, of: Resolved, compared: Sequence[str], best: float, tuned_on: str) -> list[str]:
    """How a trial was chosen, and on which rows."""
    assert of.task.plane is not None
    settings = grid.settings_of(of.config, search.space)
    each = len(compared) // len(search.trials_of)
    held_out = "held_out" in of.task.plane[1]
    return [
        f"Chosen: {of.config.method}, {', '.join(f'{key} {value}' for key, value in settings.items())}; of "
        f"{len(compared)} trials{f', {each} of each method,' if each else ''} it has the highest harmonic mean of what "
        f"was forgotten, 1 − p / p before, and of what was kept, p / p before: {best:.3f}.",
        search.rows or tuned_on or SAME_ROWS,
        "What is kept was scored on rows that "
        + ("nobody trains on." if held_out else "are trained on, where most trials come near what was before."),
    ]


def recipe(config: RunConfig, chosen: RunConfig, settings: Mapping[str, Any], said: Sequence[str]) -> str:
    """The recipe of a trial as YAML, with how it was chosen in comments.

    Args:
        config: as it was given, on the recipe's own rows.
        chosen: the trial's config.
        settings: those that were searched, with the trial's values.
        said: sentences on how it was chosen.
    """
    defaults = RunConfig().as_dict()
    method = {key: getattr(chosen, key) for key in (*PLAIN, *NO_MULTIPLIER, "optimizer")}
    unread = {key: defaults[key] for key, readers in READ_BY.items() if chosen.optimizer not in readers}
    whole = config.replace(**method, **unread, **settings).as_dict()
    kept = {key: value for key, value in to_give(whole, [*settings, "optimizer"]).items() if key != "out"}
    head = "".join(f"# {one_line(sentence)}\n" for sentence in said)
    return head + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
