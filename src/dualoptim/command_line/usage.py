"""The help of the command line: options under headings, known values, defaults that say something, examples."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import shutil
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from ..config import ADVANCED, GROUPS, RunConfig
from ..errors import UserError, unknown
from . import catalog

FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}
WIDTH = 100  # characters of a line of help at most
FEW = 3  # known values that are shown as an option's value; more are listed after its help
FOLDERS, FILES = ("out", "data_dir", "folder"), ("forget", "retain", "refusals", "chat_template", "recipe", "record")

EXAMPLES = {
    "quickstart": "dualoptim quickstart\ndualoptim quickstart --seed 1 --out runs/quickstart-1",
    "unlearn": """\
dualoptim unlearn --forget my.jsonl --retain keep.jsonl --dry-run          # shows what would be done
dualoptim unlearn --forget my.jsonl --retain keep.jsonl --out runs/mine    # the model says that it does not know
dualoptim unlearn --forget my.jsonl --goal erase --out runs/mine           # the answer itself becomes improbable
dualoptim unlearn --config mine.yaml --lr 1e-4                             # a recipe, with one setting changed""",
    "compare": """\
dualoptim compare --forget my.jsonl --retain keep.jsonl --seeds '[0, 1, 2]'
dualoptim compare --recipe quickstart --methods '[Alternating AdamW, DualOptim+]'""",
    "tune": "dualoptim tune --forget my.jsonl --retain keep.jsonl --minutes 60 --out runs/tune",
    "evaluate": """\
dualoptim evaluate --model runs/mine/model --base smollm2 --forget my.jsonl --retain keep.jsonl
dualoptim evaluate --from-records runs/mine                                # the numbers again, without a model""",
    "plan": "dualoptim plan --model meta-llama/Llama-3.1-8B-Instruct --devices 1 --device-memory 80GB",
    "report": "dualoptim report runs/a runs/b",
    "init": "dualoptim init --forget my.jsonl --retain keep.jsonl --goal erase --out mine.yaml",
    "certify": "dualoptim certify runs/mine --key key.pem",
    "verify": "dualoptim verify runs/mine/record.json --public-key pub.pem",
}


class Help(DefaultHelpFormatter):
    """jsonargparse's layout, with the known values of an option in place of its type, and without empty defaults."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns - 2, WIDTH)
        super().__init__(prog, max_help_position=28, width=max(width, 40))  # type: ignore[no-untyped-call]

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = getattr(action, "_typehint", None) or action.type
        kinds = set(typing.get_args(kind)) or {kind}
        if bool in kinds:
            return "{true,false}"
        if 0 < len(known := values(action.dest)) <= FEW:
            return "{" + ",".join(map(str, known)) + "}"
        if kind in ("int", int) or int in kinds:
            return "N"
        if float in kinds and str(kind).startswith(("<class", "float", "typing.Optional")):
            return "X"
        if action.dest in FILES + FOLDERS:
            return "FILE" if action.dest in FILES else "FOLDER"
        return super()._get_default_metavar_for_optional(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.help or ""
        if len(known := values(action.dest)) > FEW:
            told += f"; one of {', '.join(known)}"
        if not action.option_strings or action.default in (None, False, "", argparse.SUPPRESS, {}, []):
            return told
        default = action.default
        shown = ", ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        return f"{told} [{str(shown).lower() if isinstance(default, bool) else shown}]".replace("%", "%%")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)  # examples stay as they are


def parser(command: str, description: str) -> ArgumentParser:
    """An empty parser of a command, which ends its help with an example."""
    example = "".join(f"\n  {line}" for line in EXAMPLES.get(command, "").splitlines())
    made = ArgumentParser(
        prog=f"dualoptim {command}",
        description=f"{description[0].upper()}{description[1:]}.",
        epilog=f"example:{example}" if example else None,
        formatter_class=Help,
        exit_on_error=False,
        parser_mode="json",  # `arguments` reads YAML, as it is in recipes, and hands JSON over
    )
    if command in ("unlearn", "compare", "tune", "evaluate"):  # a line of sixty options helps nobody
        made.usage = f"dualoptim {command} [options]"
    return made


def add_settings(made: ArgumentParser, names: Sequence[str], more: Mapping[str, Mapping[str, Any]] = {}) -> None:
    """Add settings of a run under their headings.

    Args:
        made: the command's parser.
        names: fields of `RunConfig`.
        more: other options of the command, "--name" → arguments of `add_argument` and the heading, as ``group``.
    """
    types, defaults = typing.get_type_hints(RunConfig), RunConfig()
    for title in GROUPS:
        own = {name: field for name in names if (field := FIELDS[name]).metadata["group"] == title}
        others = {name: dict(of) for name, of in more.items() if of.get("group", ADVANCED) == title}
        if not own and not others:
            continue
        group = made.add_argument_group(title)
        for name, field in own.items():
            group.add_argument(
                f"--{name.replace('_', '-')}",
                type=types[name],
                default=getattr(defaults, name),
                help=field.metadata["help"],
            )
        for option, of in others.items():
            of.pop("group", None)
            group.add_argument(*option.split(), **of)


def values(name: str) -> tuple[Any, ...]:
    """The values that a setting may have, where they are few enough to name."""
    if name in ("forget_loss", "retain_loss"):
        return tuple(loss for loss, entry in catalog.losses().items() if f"{entry.role}_loss" == name)
    if name == "task":
        return tuple(catalog.tasks())
    return tuple(FIELDS[name].metadata["choices"]) if name in FIELDS else ()


def completion(shell: str, commands: Mapping[str, str], parsers: Mapping[str, ArgumentParser]) -> str:
    """A script that completes commands, options, known values and files in a shell, by shtab.

    Raises:
        UserError: shtab is not installed, or does not know the shell.
    """
    if importlib.util.find_spec("shtab") is None:
        raise UserError("--print-completion: needs the package shtab; pip install 'dualoptim[completion]'")
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        raise unknown("shell", shell, shtab.SUPPORTED_SHELLS)
    root = argparse.ArgumentParser("dualoptim")
    root.add_argument("--version", action="store_true", help="which version this is")
    under = root.add_subparsers()
    for command, what in commands.items():
        mirror = under.add_parser(command, help=what, description=what)
        for action in parsers[command]._actions:
            if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
                continue
            arguments: dict[str, Any] = {"help": action.help, "choices": [str(v) for v in values(action.dest)] or None}
            if action.nargs == 0:
                arguments = {"help": action.help, "action": "store_true"}
            added = mirror.add_argument(*(action.option_strings or [action.dest]), **arguments)
            kind = shtab.DIRECTORY if action.dest in FOLDERS else shtab.FILE if action.dest in FILES else None
            if kind:
                added.complete = kind  # type: ignore[attr-defined]
    return str(shtab.complete(root, shell))
