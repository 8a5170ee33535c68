"""The command line: dualoptim quickstart | unlearn | compare | evaluate | report | ls | env.

Settings come from defaults < recipe < command line. A user's mistake is told in one sentence with exit status 2. Heavy
modules are imported by the commands that need them, so that help is there at once.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import shlex
import sys
import typing
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from .config import ALONE, MAIN, METHODS, RunConfig
from .errors import UserError, unknown

COMMANDS = {
    "quickstart": "forget the capitals of Europe in SmolLM2-135M, three optimizers side by side",
    "unlearn": "unlearn by one method, from a recipe, a task or your own files",
    "compare": "several methods from the same start, rows and budget",
    "evaluate": "score a model on a task or on your own rows",
    "report": "make the page and the table of finished runs again, several on one page",
    "ls": "list recipes, tasks, losses and methods",
    "env": "versions, processor, memory and devices",
}
RECIPE_KEYS = [*(field.name for field in dataclasses.fields(RunConfig)), "methods", "seeds"]
EVALUATION_FIELDS = ("model", "chat_template", "memorise", "memorise_args", "retrained", "task", "task_args",
                     "data_dir", "forget", "retain", "chunk", "chunk_stride", "lm_eval", "lm_eval_limit",
                     "max_length", "score_bf16")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0 done, 2 a user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = _parsers()
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            _print_help()
            return 0
        if arguments[0] not in commands:
            raise unknown("command", arguments[0], COMMANDS)
        name, rest = arguments[0], arguments[1:]
        if "-h" in rest or "--help" in rest:
            commands[name].print_help()
            return 0
        parsed = _parse(commands[name], rest)
        # One line, without the file and source line that warnings.warn adds.
        warnings.formatwarning = lambda message, *_, **__: f"dualoptim: warning: {message}\n"
        _run(name, parsed)
        return 0
    except UserError as error:
        print(f"dualoptim: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads has seen enough, as in `dualoptim ls | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # Python flushes it when it ends
        return 0
    except KeyboardInterrupt:
        print("dualoptim: stopped", file=sys.stderr)
        return 130


def _print_help() -> None:
    print(
        "usage: dualoptim COMMAND [options]\n\nMake a language model forget something and keep the rest.\n\ncommands:"
    )
    for name, what in COMMANDS.items():
        print(f"  {name:<11} {what}")
    print("\n`dualoptim COMMAND --help` lists a command's options.")


def _parsers() -> dict[str, ArgumentParser]:
    made = {
        name: ArgumentParser(prog=f"dualoptim {name}", description=what.capitalize() + ".", exit_on_error=False)
        for name, what in COMMANDS.items()
    }
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}
    types = typing.get_type_hints(RunConfig)
    for name in ("unlearn", "compare", "evaluate"):
        shown = EVALUATION_FIELDS if name == "evaluate" else tuple(fields)
        for key in shown:
            default = getattr(RunConfig(), key)
            made[name].add_argument(
                f"--{key.replace('_', '-')}", type=types[key], default=default, help=fields[key].metadata["help"]
            )
        made[name].add_argument(
            "--recipe", type=str, default=None, help="YAML file of settings, or one of `dualoptim ls`"
        )
    made["quickstart"].add_argument("--model", type=str, default=None, help="folder or hub id instead of SmolLM2")
    made["quickstart"].add_argument("--seed", type=int, default=0, help=fields["seed"].metadata["help"])
    made["quickstart"].add_argument("--out", type=str, default=None, help="folder for the results [runs/quickstart]")
    made["compare"].add_argument("--methods", type=list[str], default=MAIN, help="a list of `dualoptim ls`'s")
    made["compare"].add_argument("--seeds", type=list[int], default=[0], help="a list; every method runs with each")
    for name in ("quickstart", "unlearn", "compare"):
        made[name].add_argument("--dry-run", action="store_true", help="show what would be done, and stop before it")
        if name != "quickstart":  # which always does
            made[name].add_argument("--resume", action="store_true", help="go on with what the output folder holds")
        made[name].add_argument("--overwrite", action="store_true", help="replace what the output folder holds")
    made["evaluate"].add_argument("--base", type=str, default=None, help="model before unlearning, scored beside it")
    made["evaluate"].add_argument("--scores", type=str, default=None, help="JSON file for the numbers and every sample")
    made["evaluate"].add_argument(
        "--from-records",
        type=str,
        default=None,
        help="a run's folder or records.jsonl, or a file of --scores: its numbers",
    )
    made["report"].add_argument("runs", type=str, nargs="+", help="folders of finished runs, or their results.json")
    made["report"].add_argument(
        "--out", type=str, default=None, help="HTML file [report.html beside the results, or above those of several]"
    )
    return made


def _parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse with the recipe's settings put before the command line's, so that the latter win."""
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in arguments:
        name = argument.split("=")[0].split(".")[0]
        if name.startswith("--") and name not in known:
            raise unknown("option", name, known)
    try:
        parsed = parser.parse_args(arguments)
        if not getattr(parsed, "recipe", None):
            return _with_given(parsed, arguments)
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(_one_sentence(error)) from None
    path = find_recipe(parsed.recipe)
    settings = _recipe_arguments(path, {option.removeprefix("--").replace("-", "_") for option in known})
    try:
        parser.parse_args(settings)
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {_one_sentence(error)}") from None
    return _with_given(parser.parse_args([*settings, *arguments]), [*settings, *arguments])


def _with_given(parsed: Namespace, arguments: Sequence[str]) -> Namespace:
    """The settings, with the names of those that somebody gave: a goal chooses the others."""
    names = [argument.split("=")[0].split(".")[0] for argument in arguments if argument.startswith("--")]
    parsed.given = sorted({name.removeprefix("--").replace("-", "_") for name in names})
    return parsed


def _one_sentence(error: Exception) -> str:
    return " ".join(str(error).replace("Parser key", "setting").split()).rstrip(".")


def recipes_folder() -> Path:
    """Where the recipes lie: in the installed package, or in the source tree."""
    packaged = Path(__file__).parent / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes"


_NOT_MEANT = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")}


def find_recipe(name: str) -> Path:
    """The file of a recipe, by path or by the name of one that comes along."""
    if Path(name).is_file():
        return Path(name)
    own = {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}
    if name in own:
        return own[name]
    if name.endswith((".yaml", ".yml")) or "/" in name:
        raise UserError(f"recipe {name}: there is no such file")
    raise unknown("recipe", name, own)


class _Recipes(yaml.SafeLoader):
    """YAML without what nobody means: 1:5 is no number to base 60, 2024-01-01 no date, and a key stands once."""

    yaml_implicit_resolvers = {  # noqa: RUF012, as the class above has it
        first: [(tag, pattern) for tag, pattern in known if tag not in _NOT_MEANT]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands twice; remove one", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Recipes.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_Recipes.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def _recipe_arguments(path: Path, known: set[str]) -> list[str]:
    try:
        settings = yaml.load(path.read_text(encoding="utf-8-sig"), _Recipes)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        where, problem = getattr(error, "problem_mark", None), getattr(error, "problem", error)
        raise UserError(f"{path}{f':{where.line + 1}' if where else ''}: broken YAML; {problem}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: a recipe is a mapping of settings, such as 'lr: 1e-5', but this is {settings!r}")
    arguments = []
    for key, value in settings.items():
        if key not in RECIPE_KEYS:
            raise unknown("recipe key", key, RECIPE_KEYS, str(path))
        if key not in known:
            continue  # it is for another command: `evaluate` trains for no steps, `unlearn` has one method
        try:
            written = value if isinstance(value, str) else json.dumps(value)
        except TypeError:
            raise UserError(f"{path}: {key} is {value!r}, of which no setting can be made") from None
        arguments.append(f"--{key.replace('_', '-')}={written}")
    return arguments


def _config(parsed: Namespace) -> RunConfig:
    """The settings that were given, and what the goal chooses for the rest."""
    from . import goals

    names = {field.name for field in dataclasses.fields(RunConfig)} & set(parsed.given)
    return goals.chosen({key: getattr(parsed, key) for key in names})


def _suit_the_process() -> None:
    """Settings of the process that make training on a CPU faster, measured in docs/log.md; torch is not loaded yet.

    A thread that waits for another spins for long by default; where other programs want the same cores, it spins away
    the time that the other needs. And glibc returns large freed blocks to the kernel, though the next step takes as
    many again. Elsewhere than with GNU's OpenMP and C library nothing happens.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 2**30)
    mallopt(m_trim_threshold, 2**31 - 1)


def _run(name: str, parsed: Namespace) -> None:
    _suit_the_process()
    if name in ("unlearn", "compare"):
        _unlearn(name, parsed)
    else:
        {"quickstart": _quickstart, "evaluate": _evaluate, "report": _report, "ls": _ls, "env": _env}[name](parsed)


def _quickstart(parsed: Namespace) -> None:
    commands = _parsers()
    arguments = ["--recipe", "quickstart", f"--seed={parsed.seed}", "--resume"]
    arguments += [f"--{key}={value}" for key in ("model", "out") if (value := getattr(parsed, key)) is not None]
    if parsed.overwrite:
        arguments.append("--overwrite")
    if parsed.dry_run:
        arguments.append("--dry-run")
    _unlearn("compare", _parse(commands["compare"], arguments))
    if not parsed.dry_run:
        model = parsed.model or "smollm2"
        print(f"Your own rows: dualoptim unlearn --model {model} --forget my.jsonl --retain keep.jsonl")


def _unlearn(name: str, parsed: Namespace) -> None:
    from . import dry_run, report, resolve, unlearn

    config = _config(parsed)
    configs = [config] if name == "unlearn" else resolve.methods_of(config, parsed.methods, parsed.seeds)
    if parsed.dry_run:
        dry_run.show(configs)
        return
    resume = parsed.resume and not parsed.overwrite
    if config.task is None:
        _print_chosen(config, parsed.given)
    results = unlearn.run(configs, config.out, resume=resume, overwrite=parsed.overwrite)
    report.terminal(results)
    print(f"\nThe page: {Path(config.out) / 'report.html'}")


def _print_chosen(config: RunConfig, given: Sequence[str]) -> None:
    """What the goal chose, as options that would choose the same."""
    keys = ("forget_loss", "retain_loss", "lr", "betas", "eps", "ratio", "steps", "batch_size", "until",
            "keep_at_least", "pause", "curve_points")  # fmt: skip
    settings = config.as_dict()
    values = {key: settings[key] for key in keys if key not in given}
    chosen = [
        f"--{key.replace('_', '-')} {shlex.quote(v if isinstance(v, str) else json.dumps(v))}"
        for key, v in values.items()
    ]
    if chosen:
        print(f"Chosen for --goal {config.goal}: {' '.join(chosen)}", flush=True)


def _evaluate(parsed: Namespace) -> None:
    from . import runs
    from .models import scored_in, scoring_in

    if parsed.from_records:
        _evaluate_records(parsed)
        return
    config = RunConfig(**{key: getattr(parsed, key) for key in EVALUATION_FIELDS})
    if parsed.scores and Path(parsed.scores).exists():
        raise UserError(f"scores {parsed.scores}: exists already; give another file")
    with scoring_in(config.score_bf16):
        task, scores = _scores(config, parsed.base)
        scores["scored_in"] = scored_in()
    records = {when: scores[when]["records"] for when in ("before", "after", "retrained") if scores.get(when)}
    _print_numbers(task, records.get("before"), records["after"], records.get("retrained"))
    if parsed.scores:
        runs.write_json(Path(parsed.scores), scores)
        print(f"Every sample: {parsed.scores}")


def _scores(config: RunConfig, base: str | None) -> tuple[Any, dict[str, Any]]:
    """A model scored on a task, beside the one before unlearning if there is one: the task, and what --scores holds."""
    from . import resolve, unlearn
    from .evaluation import general
    from .models import configuration, device_and_precision, load_model, load_tokenizer

    task = resolve.check(config)
    model, retrained = resolve.start_of(config, task)
    for each in filter(None, (base, retrained, model)):
        configuration(each)  # what cannot be read of the second is told before the first is scored
    device, _ = device_and_precision()
    tokenizer = load_tokenizer(model, config.chat_template)
    gold = task.score_retrained(load_model(retrained).to(device), tokenizer) if retrained else None
    first = load_model(base or model).to(device)
    before = unlearn.with_general(config, first, tokenizer, task.prepare(first, tokenizer))
    after = before
    if base:
        second = load_model(model).to(device)
        after = unlearn.with_general(config, second, tokenizer, task.score(second, tokenizer))
    models = {**({"before": before} if base else {}), "after": after}
    scores: dict[str, Any] = {"task": config.task or "files", "model": model}
    for when, records in models.items():
        scores[when] = {**general.scored(task, records, gold)[0]._asdict(), "records": records}
    scores["retrained"] = {"records": gold} if gold else None
    return task, scores


def _evaluate_records(parsed: Namespace) -> None:
    from . import runs, tasks

    defaults = RunConfig().as_dict()
    unused = [key for key in (*EVALUATION_FIELDS, "base", "scores") if getattr(parsed, key) != defaults.get(key)]
    if unused:
        raise UserError(f"--from-records reads what a run left and nothing else; leave out {', '.join(unused)}")
    name, records = runs.read_records(parsed.from_records)
    _print_numbers(tasks.find(name), records.get("before"), records["after"], records.get("retrained"))


def _print_numbers(task: Any, before: Any, after: Any, retrained: Any) -> None:
    """A line for each number, with what it was before, and why it is missing if it is."""
    from . import report
    from .evaluation import general

    now, metrics = general.scored(task, after, retrained)
    was = general.scored(task, before, retrained)[0] if before else None
    group = ""
    for key, metric in metrics.items():
        if metric.group != group:
            group = metric.group
            print(f"\n{group}")
        shown = f"{report.text(was.numbers[key], metric.format):>8} →" if was else ""
        value = now.numbers[key]
        print(
            f"{metric.label:<28}{shown} "
            + (f"not computed: {now.missing[key]}" if value is None else f"{report.text(value, metric.format):>8}")
        )


def _report(parsed: Namespace) -> None:
    from . import report, runs

    several = [runs.read_results(run) for run in parsed.runs]
    folders = [path if path.is_dir() else path.parent for path in map(Path, parsed.runs)]
    together = Path(os.path.relpath(os.path.commonpath([folder.absolute() for folder in folders])))
    if len(several) > 1 and not parsed.out and (together / runs.RESULTS).exists():
        raise UserError(f"report: {together} has a page of its own; give --out FILE.html for this one")
    out = Path(parsed.out) if parsed.out else (together if len(several) > 1 else folders[0]) / "report.html"
    report.write(several[0], out, *several[1:])
    for results in several:
        report.terminal(results)
    print(f"\nThe page: {out}")


def _ls(parsed: Namespace) -> None:
    from .losses import LOSSES
    from .tasks import kinds

    print("recipes (--recipe NAME)")
    for path in sorted(recipes_folder().glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        print(f"  {path.stem:<26} {first}")
    print("\ntasks (--task NAME, or a file of your own)")
    for name, task in kinds().items():
        print(f"  {name:<20} {(sys.modules[task.__module__].__doc__ or '').splitlines()[0]}")
    for role in ("forget", "retain"):
        print(f"\nlosses to {role} (--{role}-loss NAME)")
        for name, cls in LOSSES.items():
            if cls.role == role:
                print(f"  {name:<20} {(cls.__doc__ or '').splitlines()[0]}")
    print("\nmethods (--methods)")
    for name in (*METHODS, ALONE):
        print(f"  {name}")


def _env(parsed: Namespace) -> None:
    from . import runs

    print(yaml.safe_dump(runs.environment(), sort_keys=False, allow_unicode=True), end="")
