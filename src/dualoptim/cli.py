"""The command line: dualoptim quickstart | unlearn | compare | tune | evaluate | plan | report | ls | init | ….

Settings come from defaults < recipe < command line. A user's mistake is told in one sentence with exit status 2. Heavy
modules are imported by the commands that need them, so that help is there at once.
"""

from __future__ import annotations

import ctypes
import dataclasses
import io
import itertools
import json
import os
import re
import shlex
import sys
import traceback
import typing
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from . import __version__, catalog, ranks, rerun, usage
from .config import (
    ALONE,
    EVALUATION,
    FORGET_AND_KEEP,
    GOALS_OWN,
    MAIN,
    METHODS,
    MODEL,
    SAVING,
    SCHEDULE,
    USES,
    RunConfig,
)
from .errors import NotFiniteError, UserError, one_line, unknown
from .folder import RECIPE, RESULTS

SHARED = ("quickstart", "unlearn", "compare", "evaluate")  # commands that several ranks do together
COMMANDS = {
    "quickstart": "forget the capitals of Europe in SmolLM2-135M, three optimizers side by side",
    "unlearn": "unlearn by one method, from a recipe, a task or your own files",
    "compare": "several methods from the same start, rows and budget",
    "tune": "search learning rate, ratio, loss and method for the best trade, and write its recipe",
    "evaluate": "score a model on a task or on your own rows",
    "plan": "what fits where: the memory of a step, from a model's configuration alone",
    "report": "make the page and the table of finished runs again, several on one page",
    "ls": "list recipes, tasks, losses and methods",
    "env": "versions, processor, memory and devices",
    "init": "write a commented recipe for your own files, checked",
    "certify": "write a signed record of what a run measured",
    "verify": "check a signed record against files",
}
RECIPE_KEYS = [*(field.name for field in dataclasses.fields(RunConfig)), "methods", "seeds", "grid", "space"]
EVALUATION_FIELDS = ("model", "chat_template", "memorise", "memorise_args", "retrained", "task", "task_args",
                     "data_dir", "forget", "retain", "chunk", "chunk_stride", "private", "lm_eval", "lm_eval_limit",
                     "attacks", "probes", "probes_dir", "probe_subjects", "probe_limit", "max_length", "score_bf16",
                     "load_in_4bit")  # fmt: skip


# Of values of any kind, texts first: else a ratio of "1:5" is read as a number to base 60.
CROSSED = dict[str, list[str | int | float | bool | dict | list | None]]
INIT_FIELDS = ("forget", "retain", "model", "goal")
PLAN_FIELDS = ("model", "optimizer", "forget_loss", "retain_loss", "batch_size", "micro_batch_size", "max_length")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, as one of several ranks where a launcher started those; the exit status.

    0 done, 1 a record that does not hold, 2 a user's mistake, 3 a model that is not finite, 130 interrupted.
    """
    status = _main(list(sys.argv[1:] if argv is None else argv))
    ranks.leave(status)
    return status


def _main(arguments: Sequence[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # one that cannot show Σ or → shows ? for it
            stream.reconfigure(errors="replace")
    commands = _parsers()
    try:
        ranks.join()
        if not arguments or arguments[0] in ("-h", "--help"):
            _print_help()
            return 0
        if arguments[0] == "--version":
            print(f"dualoptim {__version__}")
            return 0
        if arguments[0] == "--print-completion":
            print(usage.completion(arguments[1] if len(arguments) > 1 else "bash", COMMANDS, commands))
            return 0
        if arguments[0] not in commands:
            raise unknown("command", arguments[0], COMMANDS)
        name, rest = arguments[0], list(arguments[1:])
        if "-h" in rest or "--help" in rest:
            commands[name].print_help()
            return 0
        parsed = _parse(commands[name], rest)
        # One line, without the file and source line that warnings.warn adds.
        warnings.formatwarning = lambda message, *_, **__: f"dualoptim: warning: {message}\n"
        return _run(name, parsed) if name in SHARED else ranks.of_first(lambda: _run(name, parsed))
    except BrokenPipeError:  # whoever reads has seen enough, as in `dualoptim ls | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # Python flushes it when it ends
        return int(ranks.several())  # others may wait
    except UserError as error:
        ranks.say(f"dualoptim: error: {error}")
        return error.status
    except OSError as error:  # a full disk, a file that was taken away
        where = f" ({error.filename})" if error.filename else ""
        ranks.say(one_line(f"dualoptim: error: {error.strerror or error}{where}"))
        return 2
    except (MemoryError, RuntimeError) as error:
        # As torch and Python say it, too, where threads or their buffers do not fit.
        told = ("memory", "can't start new thread", "could not create a primitive")
        if not (isinstance(error, MemoryError) or any(words in str(error) for words in told)):
            if not ranks.several():
                raise
            if not ranks.is_consequence():
                ranks.say(traceback.format_exc())
            return 1
        ranks.say("dualoptim: error: there was not enough memory; use a smaller batch or model")
        return 2
    except KeyboardInterrupt:
        ranks.say("dualoptim: stopped")
        return 130
    except Exception:
        if not ranks.several():
            raise
        ranks.say(traceback.format_exc())
        return 1


def _print_help() -> None:
    print(
        "usage: dualoptim COMMAND [options]\n\nMake a language model forget something and keep the rest.\n\ncommands:"
    )
    for name, what in COMMANDS.items():
        print(f"  {name:<11} {what}")
    print(
        "\n`dualoptim COMMAND --help` lists a command's options, with an example.\n"
        "`dualoptim --print-completion bash` writes a script for completion in a shell; also zsh and tcsh.\n"
        "`dualoptim --version` tells which version this is."
    )


def _parsers() -> dict[str, ArgumentParser]:
    made = {name: usage.parser(name, what) for name, what in COMMANDS.items()}
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}
    text: dict[str, Any] = {"type": str, "default": None}
    recipe = {
        "--config --recipe": text
        | {
            "dest": "recipe",
            "group": FORGET_AND_KEEP,
            "help": "YAML file of settings, or the name of an included one (`dualoptim ls`)",
        }
    }
    saving: dict[str, dict[str, Any]] = {
        "--dry-run": {"help": "show what would be done, and stop before it"},
        "--resume": {"help": "go on with what the output folder holds"},
        "--overwrite": {"help": "replace what the output folder holds"},
    }
    running = recipe | {name: of | {"action": "store_true", "group": SAVING} for name, of in saving.items()}
    several = {
        "--methods": {"type": list[str], "default": MAIN, "group": SCHEDULE, "help": "a list of `dualoptim ls`'s"},
        "--seeds": {
            "type": list[int],
            "default": [0],
            "group": SCHEDULE,
            "help": "a list; every method runs with each",
        },
        "--grid": {
            "type": CROSSED,
            "default": {},
            "group": SCHEDULE,
            "help": "settings to cross with methods and seeds: '{lr: [1e-4, 2e-4], steps: [48, 240]}'",
        },
        "--shard": text
        | {"group": SCHEDULE, "help": "i/n: the i-th of n processes that share the runs and the output folder"},
    }
    scoring = recipe | {
        "--base": text | {"group": EVALUATION, "help": "model before unlearning, scored beside it"},
        "--scores": text | {"group": EVALUATION, "help": "JSON file to write the numbers and every sample to"},
        "--from-records": text
        | {
            "group": EVALUATION,
            "help": "a run's folder or records.jsonl, or a file of --scores: its numbers, without a model",
        },
    }
    uploading: dict[str, dict[str, Any]] = {
        "--push-to-hub": text | {"group": SAVING, "help": "owner/name on the hub: upload the model, private"},
        "--push-public": {"type": bool, "default": False, "group": SAVING, "help": "make that repository public"},
        "--push-adapter": {
            "type": bool,
            "default": False,
            "group": SAVING,
            "help": "upload the adapter in place of the model with it merged in",
        },
    }
    searching: dict[str, dict[str, Any]] = {
        "--space": {
            "type": CROSSED,
            "default": {},
            "group": SCHEDULE,
            "help": "lr, lowest and highest; other settings and methods, lists: '{lr: [1e-5, 1e-3], forget_loss: [NPO, "
            "IDK], methods: [DualOptim+]}'",
        },
        "--trials": {
            "type": int,
            "default": None,
            "group": SCHEDULE,
            "help": "trials of each method [20, or what --minutes allow]",
        },
        "--minutes": {"type": float, "default": None, "group": SCHEDULE, "help": "minutes of all trials together"},
        "--tune-on": {
            "type": dict[str, Any],
            "default": None,
            "group": SCHEDULE,
            "help": "arguments of the task that give it other rows to choose on: '{part: 6}' [the task's own choice]",
        },
    }
    devices = {
        "--devices": {"type": int, "default": None, "group": MODEL,
                      "help": "how many train together [the GPUs here, or 1]"},
        "--device-memory": text | {"group": MODEL, "help": "of each, such as 80GB or 24GiB [this machine's]"},
    }  # fmt: skip
    usage.add_settings(made["unlearn"], tuple(fields), running | uploading)
    usage.add_settings(made["compare"], tuple(fields), running | several)
    usage.add_settings(made["tune"], tuple(fields), running | searching)
    made["tune"].set_defaults(out="runs/tune")
    usage.add_settings(made["evaluate"], EVALUATION_FIELDS, scoring)
    usage.add_settings(made["plan"], PLAN_FIELDS, devices)
    made["quickstart"].add_argument("--model", **text, help="folder or hub id instead of SmolLM2")
    made["quickstart"].add_argument("--seed", type=int, default=0, help=fields["seed"].metadata["help"])
    made["quickstart"].add_argument("--out", **text, help="folder for the results [runs/quickstart]")
    for name in ("--dry-run", "--overwrite"):  # it always resumes
        made["quickstart"].add_argument(name, action="store_true", **saving[name])
    made["report"].add_argument("runs", type=str, nargs="+", help="folders of finished runs, or their results.json")
    made["report"].add_argument(
        "--out", **text, metavar="FILE", help="HTML file [report.html beside the results, or above those of several]"
    )
    for name in INIT_FIELDS:
        made["init"].add_argument(f"--{name}", **text, help=fields[name].metadata["help"])
    made["init"].add_argument(
        "--out", type=str, default="recipe.yaml", metavar="FILE", help="YAML file to write, which must not be there yet"
    )
    _add_records(made)
    return made


def _add_records(made: dict[str, ArgumentParser]) -> None:
    """The options of the commands on signed records."""
    certify, verify = made["certify"], made["verify"]
    certify.add_argument("folder", type=str, help="of a finished run, or of several")
    verify.add_argument("record", type=str, help="file that dualoptim certify wrote")
    for parser, options in (
        (certify, {
            "key": "Ed25519 private key of yours, in PEM or OpenSSH's format",
            "passphrase-file": "file whose first line opens an encrypted key [$DUALOPTIM_PASSPHRASE]",
            "out": "the record's file [record.json in the run's folder]",
            "method": "which of several runs, by its method",
            "before": "model before unlearning, where the run's settings do not lead to it",
        }),
        (verify, {
            "public-key": "of whoever should have signed, in PEM or OpenSSH's format",
            "run": "folder of the run [the record's]",
            "model": "folder of the model after unlearning [the run's]",
            "before": "model before unlearning, by folder or hub id [as the run's settings say]",
            "forget": "file of the rows to forget [as the run's settings say]",
            "retain": "file of the rows to keep [as the run's settings say]",
        }),
    ):  # fmt: skip
        for name, what in options.items():
            metavar = "FILE" if name in ("out", "key", "public-key", "passphrase-file") else None
            parser.add_argument(f"--{name}", type=str, default=None, help=what, metavar=metavar)
    certify.add_argument("--run", type=int, default=None, help="which of several runs, by its number from 1")
    certify.add_argument("--seed", type=int, default=None, help="which of several runs, by its seed")
    verify.add_argument("--show", action="store_true", help="print what the record says, too, as JSON")


def _parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse with the recipe's settings put before the command line's, so that the latter win."""
    known = [option for action in parser._actions for option in action.option_strings]
    arguments = [re.sub(r"^--memorize\b", "--memorise", argument) for argument in arguments]  # spelled either way
    for argument in arguments:
        name = argument.split("=")[0].split(".")[0]
        if name.startswith("--") and name not in known:
            raise unknown("option", name, known)
    _check_signs(arguments)
    arguments = _with_true(parser, arguments)
    try:
        parsed = parser.parse_args(arguments)
        if not getattr(parsed, "recipe", None):
            return _with_given(parsed, arguments)
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(_one_sentence(error)) from None
    path = find_recipe(parsed.recipe)
    settings = _recipe_arguments(path, {option.removeprefix("--").replace("-", "_") for option in known})
    _check_signs(settings)
    try:
        parser.parse_args(settings)
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {_one_sentence(error)}") from None
    return _with_given(parser.parse_args([*settings, *arguments]), [*settings, *arguments])


def _with_true(parser: ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """The arguments with "true" for each setting of yes or no that stands without a value."""
    types = {
        option: getattr(action, "_typehint", None) for action in parser._actions for option in action.option_strings
    }
    switches = {option for option, type in types.items() if bool in (type, *typing.get_args(type))}
    return [
        f"{given}=true" if given in switches and after.startswith("--") else given
        for given, after in itertools.pairwise([*arguments, "--"])
    ]


def _check_signs(arguments: Sequence[str]) -> None:
    """Refuse what no file's name, nor any setting, may hold."""
    if found := next((argument for argument in arguments if "\0" in argument), None):
        raise UserError(f"{found[:80]}: holds the character NUL, which no setting may; give a value without it")


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
    """The file of a recipe, by path or by the name of an included one."""
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

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError):
            kind = str(node.tag).rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"what is tagged as {kind} is none; remove the tag", node.start_mark
            ) from None

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


_Recipes.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value)))  # 010 is ten


def _recipe_arguments(path: Path, known: set[str]) -> list[str]:
    try:
        settings = yaml.load(path.read_text(encoding="utf-8-sig"), _Recipes)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        where, problem = getattr(error, "problem_mark", None), getattr(error, "problem", error)
        reason = " ".join(str(problem).split())
        raise UserError(f"{path}{f':{where.line + 1}' if where else ''}: broken YAML; {reason}") from None
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:  # of a depth without end
        raise UserError(f"{path}: YAML that cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: a recipe is a mapping of settings, such as 'lr: 1e-5', but this is {settings!r}")
    arguments = []
    for key, value in settings.items():
        if isinstance(key, str):
            key = re.sub("^memorize", "memorise", key)
        if key not in RECIPE_KEYS:
            raise unknown("recipe key", key, RECIPE_KEYS, str(path))
        if key not in known:
            continue  # it is for another command: `evaluate` trains for no steps, `unlearn` has one method
        try:
            written = value if isinstance(value, str) else json.dumps(value)
        except (TypeError, ValueError):  # of Python's own kinds, or that holds itself
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


def _run(name: str, parsed: Namespace) -> int:
    _suit_the_process()
    if name in SHARED:
        ranks.check_launcher()
    if name == "verify":
        return _verify(parsed)
    if name in ("unlearn", "compare"):
        _unlearn(name, parsed)
    else:
        {"quickstart": _quickstart, "evaluate": _evaluate, "plan": _plan, "report": _report, "ls": _ls, "env": _env,
         "init": _init, "certify": _certify, "tune": _tune}[name](parsed)  # fmt: skip
    return 0


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
    from . import dry_run, resolve, unlearn

    config = _config(parsed)
    configs = [config] if name == "unlearn" else resolve.methods_of(config, parsed.methods, parsed.seeds)
    inputs = {"recipe": parsed.recipe}
    if name == "compare" and (parsed.grid or parsed.shard or config.fast):
        _compare_many(configs, parsed, inputs)
        return
    push = _push(parsed, config) if name == "unlearn" else None
    if parsed.dry_run:
        dry_run.show(configs, overwrite=parsed.overwrite, inputs=inputs)
        return
    resume = parsed.resume and not parsed.overwrite
    if config.forget is not None:
        _print_chosen(config, parsed.given)
    results = unlearn.run(configs, config.out, resume=resume, overwrite=parsed.overwrite, inputs=inputs)
    _tell(results, config)
    if push is not None:
        from . import publish

        print(f"Uploaded: {publish.push(push, config.out)}")


def _push(parsed: Namespace, config: RunConfig) -> Any:
    """Where the model is to go once all is written, checked before anything long; None for nowhere."""
    if parsed.push_to_hub is None:
        if given := {"push_public", "push_adapter"} & set(parsed.given):
            raise UserError(f"{sorted(given)[0]} says how a model is uploaded; add --push-to-hub REPO, or leave it out")
        return None
    from . import publish

    push = publish.Push(parsed.push_to_hub, parsed.push_public, parsed.push_adapter)
    publish.check(push, config)
    return push


def _compare_many(configs: Sequence[RunConfig], parsed: Namespace, inputs: dict[str, str | None]) -> None:
    """A grid of runs, or a part of them."""
    from . import dry_run, grid

    shard = grid.Shard.read(parsed.shard) if parsed.shard is not None else None
    planned = grid.crossed(configs, parsed.grid)
    if parsed.dry_run:
        dry_run.show(planned[:1], overwrite=parsed.overwrite, inputs=inputs)
        mine = len(planned) if shard is None else len(range(shard.number - 1, len(planned), shard.of))
        print(f"\n{len(planned)} runs{f', {mine} of them here' if shard else ''}; the first is shown")
        return
    resume = parsed.resume and not parsed.overwrite
    how = {"shard": shard, "resume": resume, "overwrite": parsed.overwrite, "inputs": inputs}
    _tell(grid.run(planned, planned[0].out, grid=parsed.grid, **how), planned[0])


def _tune(parsed: Namespace) -> None:
    from . import dry_run, report, tune

    names = {field.name for field in dataclasses.fields(RunConfig)} & {*parsed.given, "out"}
    search = tune.planned(
        {key: getattr(parsed, key) for key in names},
        parsed.space,
        trials=parsed.trials,
        minutes=parsed.minutes,
        tune_on=parsed.tune_on,
    )
    if parsed.dry_run:
        dry_run.show(list(search.trials_of.values())[:1], overwrite=parsed.overwrite, inputs={"recipe": parsed.recipe})
        print(f"\n── search ──\n{search}; the first trial of {next(iter(search.trials_of))} is shown")
        return
    resume = parsed.resume and not parsed.overwrite
    results = tune.run(search, resume=resume, overwrite=parsed.overwrite, inputs={"recipe": parsed.recipe})
    report.terminal(results)
    print(f"\nThe page: {Path(search.config.out) / 'report.html'}")
    print(f"The recipe: dualoptim unlearn --recipe {shlex.quote(str(Path(search.config.out) / RECIPE))}")


def _tell(results: dict[str, Any], config: RunConfig) -> None:
    """Print what runs came to, and where their page lies."""
    from . import report

    report.terminal(results)
    print(f"\nThe page: {Path(config.out) / 'report.html'}")
    if broken := [entry["method"] for entry in results["runs"] if not entry.get("finite", True)]:
        raise NotFiniteError(
            f"{', '.join(broken)}: the weights are not finite after training; lower the learning rate, or take a loss "
            "that has a bound, such as NPO in place of GA"
        )


def _print_chosen(config: RunConfig, given: Sequence[str]) -> None:
    """What the goal chose, as options that would choose the same."""
    settings = config.as_dict()
    chosen = rerun.options({key: settings[key] for key in GOALS_OWN if key not in given})
    if chosen:
        print(f"Chosen for --goal {config.goal}: {' '.join(chosen)}", flush=True)


def _evaluate(parsed: Namespace) -> None:
    from . import runs, unlearn
    from .evaluation import general

    if parsed.from_records:
        _evaluate_records(parsed)
        return
    config = RunConfig(**{key: getattr(parsed, key) for key in EVALUATION_FIELDS})
    if parsed.scores:
        _new_file("scores", Path(parsed.scores))
    task, models, gold, scored_in = unlearn.evaluate(config, parsed.base)
    scores: dict[str, Any] = {"task": config.task or "files", "model": config.model, "scored_in": scored_in}

    def kept(records: Any) -> Any:
        return [runs.hashed(record) for record in records] if config.private else records

    for when, records in models.items():
        scores[when] = {**general.scored(task, records, gold)[0]._asdict(), "records": kept(records)}
    scores["retrained"] = {"records": kept(gold)} if gold else None
    if parsed.scores:
        runs.write_json(Path(parsed.scores), scores)
    _print_numbers(task, models.get("before"), models["after"], gold)
    if parsed.scores:
        print(f"Every sample: {parsed.scores}")


@ranks.by_first
def _new_file(what: str, path: Path) -> None:
    """Refuse a file that is there already, or that could not be written."""
    try:
        if path.exists():
            raise UserError(f"{what} {path}: exists already; give another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x"):
            pass
        path.unlink()
    except OSError as error:
        raise UserError(f"{what} {path}: cannot be written ({error.strerror}); give another file") from None


def _evaluate_records(parsed: Namespace) -> None:
    from . import runs, tasks

    defaults = RunConfig().as_dict()
    unused = [key for key in (*EVALUATION_FIELDS, "base", "scores") if getattr(parsed, key) != defaults.get(key)]
    if unused:
        raise UserError(f"--from-records reads what a run left and nothing else; leave out {', '.join(unused)}")
    name, records = runs.read_records(parsed.from_records)
    try:
        _print_numbers(tasks.find(name), records.get("before"), records["after"], records.get("retrained"))
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{parsed.from_records}: its records are not such as the task {name!r} makes ({type(error).__name__}: "
            f"{error}); score the model again"
        ) from None


def _print_numbers(task: Any, before: Any, after: Any, retrained: Any) -> None:
    """A line for each number, with what it was before, and why it is missing if it is."""
    from . import report
    from .evaluation import general

    now, metrics = general.scored(task, after, retrained)
    was = general.scored(task, before, retrained)[0] if before else None
    group = ""
    tables = list(dict.fromkeys(["", *(metric.group for metric in metrics.values())]))
    for key, metric in sorted(metrics.items(), key=lambda item: tables.index(item[1].group)):
        if metric.group != group:
            group = metric.group
            print(f"\n{group}")
        shown = f"{report.text(was.numbers[key], metric.format):>8} →" if was else ""
        value = now.numbers[key]
        print(
            f"{metric.label:<28}{shown} "
            + (f"not computed: {now.missing[key]}" if value is None else f"{report.text(value, metric.format):>8}")
        )


def _plan(parsed: Namespace) -> None:
    from . import plan

    plan.show(RunConfig(**{name: getattr(parsed, name) for name in PLAN_FIELDS}), parsed.devices, parsed.device_memory)


def _report(parsed: Namespace) -> None:
    from . import report, runs

    several = [runs.read_results(run) for run in parsed.runs]
    folders = [path if path.is_dir() else path.parent for path in map(Path, parsed.runs)]
    together = Path(os.path.relpath(os.path.commonpath([folder.absolute() for folder in folders])))
    if len(several) > 1 and not parsed.out and (together / RESULTS).exists():
        raise UserError(f"report: {together} has a page of its own; give --out FILE.html for this one")
    out = Path(parsed.out) if parsed.out else (together if len(several) > 1 else folders[0]) / "report.html"
    report.check_file(out)
    report.write(several[0], out, *several[1:])
    for results in several:
        report.terminal(results)
    print(f"\nThe page: {out}")


def _ls(parsed: Namespace) -> None:
    print("recipes (--recipe NAME)")
    for path in sorted(recipes_folder().glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        print(f"  {path.stem:<26} {first}")
    print("\ntasks (--task NAME, or a file of your own)")
    for name, what in catalog.tasks().items():
        print(f"  {name:<20} {what}")
    for role in ("forget", "retain"):
        print(f"\nlosses to {role} (--{role}-loss NAME)")
        for name, entry in catalog.losses().items():
            if entry.role == role:
                print(f"  {name:<20} {entry.formula}")
                if entry.use:
                    print(f"  {'':<20} {entry.use}")
    print("\nmethods (--methods, or --optimizer and --joint)")
    for name in (*METHODS, ALONE):
        bits = f"when memory is short: {name.removesuffix(' 8-bit')} with states in 8 bits" * name.endswith(" 8-bit")
        print(f"  {name:<26} {f'Use it {use}.' if (use := USES.get(name, bits)) else ''}".rstrip())


def _init(parsed: Namespace) -> None:
    from . import starter

    out = Path(parsed.out)
    _new_file("init", out)
    given = {key: value for key in INIT_FIELDS if (value := getattr(parsed, key)) is not None}
    starter.write({**given, "out": f"runs/{out.stem}"}, out)
    print(f"{out}: written. Check it by: dualoptim unlearn --config {shlex.quote(str(out))} --dry-run")


def _env(parsed: Namespace) -> None:
    from . import runs

    print(yaml.safe_dump(runs.environment(), sort_keys=False, allow_unicode=True), end="")


def _certify(parsed: Namespace) -> None:
    from .certify import certificate, signing

    if parsed.key is None:
        raise UserError(f"certify: give --key FILE, your Ed25519 private key; {signing.MAKE} makes one")
    said, path = certificate.certify(
        parsed.folder,
        parsed.key,
        out=parsed.out,
        number=parsed.run,
        method=parsed.method,
        seed=parsed.seed,
        before=parsed.before,
        passphrase_file=parsed.passphrase_file,
    )
    print(f"{os.path.relpath(path)}: signed by the key {said['signer']['fingerprint']}")
    _print_limits(said)


def _verify(parsed: Namespace) -> int:
    """Print a line for each thing that was checked; the exit status."""
    from .certify import certificate

    checks = certificate.verify(
        parsed.record,
        public_key=parsed.public_key,
        run=parsed.run,
        model=parsed.model,
        before=parsed.before,
        forget=parsed.forget,
        retain=parsed.retain,
    )
    for item, state, detail in checks:
        print(one_line(f"{state:<9}  {item}{f': {detail}' if detail else ''}"))
    states = [check.state for check in checks]
    count = {state: states.count(state) for state in (certificate.OK, certificate.DIFFERS, certificate.NOT_THERE)}
    print(f"\n{', '.join(f'{number} {state}' for state, number in count.items())}")
    if checks[0].state == certificate.OK:
        said = certificate.read(parsed.record)
        _print_limits(said)
        if parsed.show:
            print(json.dumps(said, indent=1))
    return int(certificate.DIFFERS in states)


def _print_limits(said: dict[str, Any]) -> None:
    """What a record does not say."""
    for remark in said["remarks"]:
        print(one_line(f"· {remark}"))
    missing = said["not_measured"]
    attacks = ", ".join(missing["attacks"]) or "none"
    print(one_line(f"Not measured: {len(missing['numbers'])} numbers; attacks: {attacks}"))
    print(one_line(said["statement"]))
