"""Command line → settings: the options of every command, a recipe's settings below the given ones, a run's config.

jsonargparse reads values by their types; `usage` lays out the help. torch is not imported, so help is there at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from ..config import (
    EVALUATION,
    FORGET_AND_KEEP,
    MAIN,
    MODEL,
    SAVING,
    SCHEDULE,
    Arguments,
    RunConfig,
    kinds,
    text_for_number,
)
from ..errors import UserError, check_encoding, unknown
from . import usage
from .recipe_files import Loader, find_recipe, one_spelling, recipe_arguments

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
EVALUATION_FIELDS = ("model", "chat_template", "memorise", "memorise_args", "retrained", "task", "task_args",
                     "data_dir", "forget", "retain", "goal", "general", "refusals", "chunk", "chunk_stride", "private",
                     "lm_eval", "lm_eval_limit", "attacks", "relearn_lr", "probes", "probes_dir", "probe_subjects",
                     "probe_limit", "max_length", "score_bf16", "bf16_weights", "load_in_4bit")  # fmt: skip


# Values of any type, with str first: a text is then taken as it stands.
CROSSED = dict[str, list[str | int | float | bool | dict | list | None]]
# Mappings of a recipe whose entries the command line changes one by one, unless it changes what they belong to.
ENTRIES = {
    "task_args": "task",
    "memorise_args": "model",
    "forget_loss_args": "forget_loss",
    "retain_loss_args": "retain_loss",
    "weights": "task",
    "lr_scales": "optimizer",
    "base_weights": "optimizer",
}
INIT_FIELDS = ("forget", "retain", "model", "goal")
PLAN_FIELDS = ("model", "optimizer", "forget_loss", "retain_loss", "batch_size", "micro_batch_size", "max_length")
RECORD_OPTIONS = {
    "certify": {
        "key": "Ed25519 private key of yours, in PEM or OpenSSH's format",
        "passphrase-file": "file whose first line opens an encrypted key [$DUALOPTIM_PASSPHRASE]",
        "out": "the record's file [record.json in the run's folder]",
        "method": "which of several runs, by its method",
        "before": "model before unlearning, where the run's settings do not lead to it",
    },
    "verify": {
        "public-key": "of whoever should have signed, in PEM or OpenSSH's format",
        "run": "folder of the run [the record's]",
        "model": "folder of the model after unlearning [the run's]",
        "before": "model before unlearning, by folder or hub id [as the run's settings say]",
        "forget": "file of the rows to forget [as the run's settings say]",
        "retain": "file of the rows to keep [as the run's settings say]",
    },
}


def parsers() -> dict[str, ArgumentParser]:
    """A parser for each command."""
    return {command: parser(command) for command in COMMANDS}


def parser(command: str) -> ArgumentParser:
    """The parser of a command, made by itself: those with all settings take 20 ms each."""
    made = usage.parser(command, COMMANDS[command])
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
            "type": Arguments,
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
    settings: dict[str, tuple[Sequence[str], Mapping[str, Mapping[str, Any]]]] = {
        "unlearn": (tuple(fields), running | uploading),
        "compare": (tuple(fields), running | several),
        "tune": (tuple(fields), running | searching),
        "evaluate": (EVALUATION_FIELDS, scoring),
        "plan": (PLAN_FIELDS, devices),
    }
    if command in settings:
        usage.add_settings(made, *settings[command])
    if command == "tune":
        made.set_defaults(out="runs/tune")
    elif command == "quickstart":
        made.add_argument("--model", **text, help="folder or hub id instead of SmolLM2")
        made.add_argument("--seed", type=int, default=0, help=fields["seed"].metadata["help"])
        made.add_argument("--out", **text, help="folder for the results [runs/quickstart]")
        for name in ("--dry-run", "--overwrite"):  # it always resumes
            made.add_argument(name, action="store_true", **saving[name])
    elif command == "report":
        made.add_argument("runs", type=str, nargs="+", help="folders of finished runs, or their results.json")
        made.add_argument(
            "--out",
            **text,
            metavar="FILE",
            help="HTML file [report.html beside the results, or above those of several]",
        )
    elif command == "init":
        for name in INIT_FIELDS:
            made.add_argument(f"--{name}", **text, help=fields[name].metadata["help"])
        made.add_argument(
            "--out",
            type=str,
            default="recipe.yaml",
            metavar="FILE",
            help="YAML file to write, which must not be there yet",
        )
    elif command in RECORD_OPTIONS:
        _add_records(made, command)
    return made


def _add_records(made: ArgumentParser, command: str) -> None:
    """The options of a command on signed records."""
    if command == "certify":
        made.add_argument("folder", type=str, help="of a finished run, or of several")
    else:
        made.add_argument("record", type=str, help="file that dualoptim certify wrote")
    for name, what in RECORD_OPTIONS[command].items():
        metavar = "FILE" if name in ("out", "key", "public-key", "passphrase-file") else None
        made.add_argument(f"--{name}", type=str, default=None, help=what, metavar=metavar)
    if command == "certify":
        made.add_argument("--run", type=int, default=None, help="which of several runs, by its number from 1")
        made.add_argument("--seed", type=int, default=None, help="which of several runs, by its seed")
    else:
        made.add_argument("--show", action="store_true", help="print what the record says, too, as JSON")


def parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse the recipe's settings and then the command line's, so that the latter win; of `ENTRIES`, entry by entry."""
    known = [option for action in parser._actions for option in action.option_strings]
    arguments = [one_spelling(argument) if argument.startswith("--") else argument for argument in arguments]
    for argument in arguments:
        name = argument.split("=")[0].split(".")[0]
        if name.startswith("--") and name not in known:
            raise _unknown_option(parser.prog, name, known)
    _check_signs(arguments)
    arguments = _written(parser, arguments)
    try:
        parsed = parser.parse_args(arguments)
        if not getattr(parsed, "recipe", None):
            return _with_given(parsed, arguments)
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(_one_sentence(error)) from None
    path = find_recipe(parsed.recipe)
    settings = recipe_arguments(path, set(map(_key, known)))
    _check_signs(settings)
    try:
        settings = _written(parser, settings)
        parser.parse_args(settings)
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {_one_sentence(error)}") from None
    joined = [*settings, *_joined(settings, arguments)]
    return _with_given(parser.parse_args(joined), joined)


def _joined(settings: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The command line's arguments; a mapping keeps the entries of the recipe's that it does not give itself."""
    recipe = dict(setting.split("=", 1) for setting in settings)
    whole: list[str] = []  # each option with its value behind "="
    for given in arguments:
        if whole and not given.startswith("--") and "=" not in whole[-1]:
            whole[-1] += f"={given}"
        else:
            whole.append(given)
    changed = {_key(name) for name, _, text in (each.partition("=") for each in whole) if recipe.get(name) != text}
    made = []
    for each in whole:
        name, _, text = each.partition("=")
        if name in recipe and (of := ENTRIES.get(_key(name))) and of not in changed:
            own, new = _read(recipe[name], name), _read(text, name)
            if isinstance(own, dict) and isinstance(new, dict) and new:  # {} empties it
                each = f"{name}={json.dumps({**own, **new}, ensure_ascii=False)}"
        made.append(each)
    return made


def _unknown_option(program: str, name: str, known: Sequence[str]) -> UserError:
    """The error for an option that a command does not have, with the commands that do, or the nearest it has."""
    meant = name.replace("_", "-")
    others = [
        f"dualoptim {command}"
        for command, other in parsers().items()
        # --run and --method of signed records are not what another command would mean by them.
        if command not in RECORD_OPTIONS and any(meant in action.option_strings for action in other._actions)
    ]
    if others and meant not in known:
        return UserError(f"unknown option {name!r}; it is an option of {', '.join(others)}, not of {program}")
    return unknown("option", name, known, listed=f"{program} --help lists all")


def _written(parser: ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """The arguments as `jsonargparse` reads them, with values as JSON, or as the texts that they are.

    A boolean setting that is given without a value has "true", a list of words may have no brackets, and a path may
    begin with "~". An entry, --task-args.split, is written as the mapping with it, since the parser would not tell its
    text "007" from a number.
    """
    hints = {
        option: getattr(action, "_typehint", None) for action in parser._actions for option in action.option_strings
    }
    made: list[str] = []
    mappings: dict[str, dict[str, Any]] = {}  # as far as they are given
    for before, given, after in zip(["", *arguments], arguments, [*arguments[1:], "--"], strict=False):
        name, sign, value = given.partition("=") if given.startswith("--") else (before, "", given)
        option, _, entry = name.partition(".")
        if hints.get(option) == Arguments and (sign or not given.startswith("--")):
            read = _read(value, option)
            for key in reversed(entry.split(".") if entry else []):
                read = {key: read}
            mappings[option] = {**mappings.get(option, {}), **read} if entry else read if isinstance(read, dict) else {}
            made.append(f"{option}={_json(mappings[option], value, option) if entry else _value(value, option, hints)}")
        elif hints.get(option) == Arguments and not after.startswith("--"):
            pass  # its value comes next
        elif given.startswith("--") and sign:
            made.append(f"{name}={_value(value, name, hints)}")
        elif bool in kinds(hints.get(given)) and after.startswith("--"):
            made.append(f"{given}=true")
        else:
            made.append(given if given.startswith("--") else _value(given, before, hints))
    return made


def _value(text: str, name: str, hints: Mapping[str, Any]) -> str:
    """A setting's value as JSON, or the text itself where that is what is asked for."""
    option, _, entry = name.partition(".")
    hint = hints.get(option)
    if entry:  # --task-args.split is an entry of --task-args
        hint = next((typing.get_args(each)[-1] for each in kinds(hint) if typing.get_origin(each) is dict), None)
    types = kinds(hint)
    of = next((typing.get_args(each)[0] for each in types if typing.get_origin(each) in (list, tuple)), None)
    if str in types or hint is None:
        if re.match("~(/|$)", text):
            return os.path.expanduser(text)
        if of is None or not isinstance(value := _read(text, option), list):
            return text
    elif of is not None and text != "null" and re.fullmatch("(?!')[^\\[\\]{}\"]+", text):
        words = [word.strip() for word in text.split(",")]
        value = words if of is str else [_read(word, option) for word in words]
    else:
        value = _read(text, option)
    if said := text_for_number(value, hint):
        raise UserError(f'setting "{_key(option)}": {said}')
    if isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value)):
        return text
    return _json(value, text, option)


def _json(value: Any, text: str, option: str) -> str:
    """A value as JSON; `text` is what was given."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # a Python object, or a list that contains itself
        raise UserError(f'setting "{_key(option)}": is {text}, of which no setting can be made') from None


def _read(text: str, option: str) -> Any:
    """A value as a recipe would have it; a text that is no YAML is that text."""
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        return loader.construct_document(node) if node else text
    except yaml.constructor.ConstructorError as error:
        raise UserError(f'setting "{_key(option)}": {error.problem}') from None
    except yaml.YAMLError:
        return text
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:  # nested without end
        raise UserError(f'setting "{_key(option)}": YAML that cannot be read: {error}') from None


def _check_signs(arguments: Sequence[str]) -> None:
    """Refuse the character NUL, which neither a file's name nor any setting may hold, and what is not UTF-8.

    Python reads the latter, but nothing that a run writes could name it.
    """
    for argument in arguments:
        if "\0" in argument:
            raise UserError(f"{argument[:80]}: holds the character NUL, which no setting may; give a value without it")
        try:
            argument.encode()
        except UnicodeEncodeError:
            check_encoding(argument)
            raise UserError(
                f"{argument[:80]}: is not UTF-8, so no results could name it; give another value, or rename the file"
            ) from None


def _with_given(parsed: Namespace, arguments: Sequence[str]) -> Namespace:
    """The settings, with the names of those that were given: a goal chooses the others."""
    names = [argument.split("=")[0].split(".")[0] for argument in arguments if argument.startswith("--")]
    parsed.given = sorted(set(map(_key, names)))
    return parsed


def _key(option: str) -> str:
    """The setting that an option gives: --batch-size gives batch_size."""
    return option.removeprefix("--").replace("-", "_")


def _one_sentence(error: Exception) -> str:
    told = " ".join(str(error).replace("Parser key", "setting").split()).rstrip(".")
    told = re.sub(r"Expected an? <class '(\w+)'>\. Got value: ?(.*)$", r"must be of type \1, but is '\2'", told)
    # Of a setting with several types, jsonargparse reports what each of them makes of the value.
    several = re.search(r"(setting .*?): Does not validate .*? Subtypes: \[(.*?)\] Errors: .* Given value: (.*)$", told)
    if not several:
        return told
    types = re.sub(r"typing\.|<class '(\w+)'>", r"\1", several[2]).replace("NoneType", "null")
    return f"{several[1]}: must be one of {types}, but is {several[3]}"


def given_of(parsed: Namespace) -> dict[str, Any]:
    """The settings of a run that were given."""
    return {field.name: getattr(parsed, field.name) for field in dataclasses.fields(RunConfig)
            if field.name in parsed.given}  # fmt: skip


def config_of(parsed: Namespace) -> RunConfig:
    """The settings that were given, and what the goal chooses for the rest."""
    from .. import goals

    return goals.chosen(given_of(parsed))
