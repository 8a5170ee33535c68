"""A run's settings → the command line that repeats it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from .config import ALONE, GOALS_OWN, METHODS, NO_MULTIPLIER, PLAIN, RunConfig

FAST = ("save_model", "curve_points")  # what `fast` chooses where they are not given
OF_METHODS = {*PLAIN, *NO_MULTIPLIER, "optimizer", "seed"}  # settings that `compare` chooses by method and seed


def options(values: Mapping[str, Any]) -> list[str]:
    """
    >>> options({"forget_loss": "NPO", "betas": [0.9, 0.95], "until": None})
    ['--forget-loss NPO', "--betas '[0.9, 0.95]'", '--until null']
    """
    return [
        f"--{key.replace('_', '-')} {shlex.quote(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False))}"
        for key, v in values.items()
    ]


def plan_of(configs: Sequence[RunConfig]) -> dict[str, list[Any]]:
    """The methods, as `compare` takes them, and the seeds of all runs of a plan, finished or not."""
    methods = [ALONE if config.alone else config.method for config in configs]
    return {"methods": list(dict.fromkeys(methods)), "seeds": list(dict.fromkeys(config.seed for config in configs))}


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
    # Settings that a goal or a fast run would choose are always given.
    said = {*(GOALS_OWN if configs[0].get("forget") else ()), *(FAST if configs[0].get("fast") else ())}
    left_out = {"out", *grid, *(OF_METHODS if many else ())}
    own = {k: v for k, v in configs[0].items() if k not in left_out and (k in said or v != defaults.get(k))}
    if not many:
        return ["dualoptim unlearn", *options(own)]
    methods = [ALONE if c.get("alone") else e["method"] for c, e in zip(configs, entries, strict=True)]
    finished = {"methods": list(dict.fromkeys(methods)), "seeds": list(dict.fromkeys(e["seed"] for e in entries))}
    crossed = results.get("plan", finished)
    methods = crossed["methods"]
    if not {*methods} <= {*METHODS, ALONE}:
        return []
    for key in NO_MULTIPLIER:  # methods without a multiplier do not take these from the command
        given = next((config[key] for config in configs if config.get(key, defaults[key]) != defaults[key]), None)
        if given is not None and not any(key in method for method in METHODS.values()):
            own[key] = given
    return ["dualoptim compare", *options({**crossed, **({"grid": grid} if grid else {}), **own})]
