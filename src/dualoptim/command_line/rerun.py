"""A run's settings → the command line that repeats it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import ALONE, GOALS_OWN, METHODS, NO_MULTIPLIER, OF_METHODS, RunConfig, to_give


def options(values: Mapping[str, Any]) -> list[str]:
    """Settings as options for a shell; a value that begins with "-" stands behind "=", or it would be an option itself.

    >>> options({"forget_loss": "NPO", "betas": [0.9, 0.95], "until": None, "forget": "-x.jsonl"})
    ['--forget-loss NPO', "--betas '[0.9, 0.95]'", '--until null', '--forget=-x.jsonl']
    """
    made = []
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        made.append(f"--{key.replace('_', '-')}{'=' if text.startswith('-') else ' '}{quoted(text)}")
    return made


def quoted(text: str) -> str:
    r"""A word for a shell, on one line: one with line breaks or control characters as bash and zsh write it.

    >>> quoted("a b"), quoted("a\nb")
    ("'a b'", "$'a\\x0ab'")
    """
    if text.isprintable():
        return shlex.quote(text)
    escaped = re.sub(r"['\\]", r"\\\g<0>", text)
    return "$'" + re.sub(r"[^ -~]", lambda at: at[0] if at[0].isprintable() else _bytes(at[0]), escaped) + "'"


def _bytes(sign: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in sign.encode(errors="surrogateescape"))


def plan_of(configs: Sequence[RunConfig], grid: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The methods, as `compare` takes them, and the seeds of all runs of a plan, finished or not.

    Also the settings that "varied" beside those of the grid: the goal chose them for each run by its others.
    """
    methods = [ALONE if config.alone else config.method for config in configs]
    values = {key: {json.dumps(config.as_dict()[key]) for config in configs} for key in GOALS_OWN}
    return {
        "methods": list(dict.fromkeys(methods)),
        "seeds": list(dict.fromkeys(config.seed for config in configs)),
        "varied": [key for key, each in values.items() if len(each) > 1 and key not in {*OF_METHODS, *grid}],
    }


def command(results: Mapping[str, Any]) -> list[str]:
    """`dualoptim unlearn` or `compare` with the options that repeat all runs, one a line, without the output folder.

    Empty for parts that are forgotten one after the other, and for the trials of a search: no single command does them.
    """
    entries = results["runs"]
    configs = [entry["config"] for entry in entries]
    if "chosen" in results or any("part" in entry for entry in entries):
        return []
    grid, defaults = results.get("grid", {}), RunConfig().as_dict()
    many = len(entries) > 1 or "planned" in results
    plan = results.get("plan", {})
    left_out = {"out", *grid, *plan.get("varied", ()), *(OF_METHODS if many else ())}
    own = {key: value for key, value in to_give(configs[0]).items() if key not in left_out}
    if not many:
        return ["dualoptim unlearn", *options(own)]
    methods = [ALONE if c.get("alone") else e["method"] for c, e in zip(configs, entries, strict=True)]
    finished = {"methods": list(dict.fromkeys(methods)), "seeds": list(dict.fromkeys(e["seed"] for e in entries))}
    crossed = {key: plan.get(key, each) for key, each in finished.items()}
    methods = crossed["methods"]
    if not {*methods} <= {*METHODS, ALONE}:
        return []
    for key in NO_MULTIPLIER:  # methods without a multiplier do not take these from the command
        given = next((config[key] for config in configs if config.get(key, defaults[key]) != defaults[key]), None)
        if given is not None and not any(key in method for method in METHODS.values()):
            own[key] = given
    return ["dualoptim compare", *options({**crossed, **({"grid": grid} if grid else {}), **own})]
