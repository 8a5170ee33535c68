"""What a goal chooses for your own rows: losses, optimizer, learning rate, ratio, length, and when to stop.

Settings come from defaults < goal < recipe < command line, so whatever is given wins. `benchmarks/own_rows.md` has the
measurements behind the numbers here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .config import FAST, GOALS_OWN, OF_METHODS, READ_BY, RunConfig
from .errors import unknown


@dataclass(frozen=True)
class Goal:
    """Settings of a goal that do not depend on rows and model.

    Args:
        forget_loss: on the rows to forget.
        corrected_loss: used in its place if rows say what to answer `instead`.
        until: where to stop: for "refuse", the share of checking questions not refused (a reply that neither answers
            nor refuses is not what that goal wants); for "erase", the answer's probability relative to that before.
        optimizer: unless a setting is given that AdamW does not have.
        lr: learning rate at a hidden size of 576, SmolLM2-135M's.
        ratio: forget steps to retain steps.
        passes: passes over the wordings that are trained on, within LEAST_STEPS and MOST_STEPS steps to forget: the
            four wordings of a single row are drawn 12 times each.
        pause: skip the steps to forget while the goal is reached. An answer's probability stays low without them, and
            falls to nothing with them. A refusal, in contrast, is lost within a few steps to keep.
    """

    forget_loss: str
    corrected_loss: str
    until: float
    optimizer: str
    lr: float
    ratio: tuple[int, int]
    passes: int
    pause: bool


PLUS = RunConfig().optimizer
GOALS = {
    "refuse": Goal("IDK", "IDK", until=0.05, optimizer=PLUS, lr=2e-4, ratio=(1, 2), passes=8, pause=False),
    "erase": Goal("NPO", "DPO", until=0.15, optimizer="AdamW", lr=1e-4, ratio=(1, 2), passes=8, pause=True),
}
NOT_ADAMW = ("base_bits", "bf16_weights", *(key for key, readers in READ_BY.items() if "AdamW" not in readers))
KEEP_AT_LEAST = 0.8  # of the checking questions about what is kept
WIDTH = 576
# Where a coordinate's gradient is below this, its step shrinks with it. At the start, the gradient of what is kept is
# only noise, which 1e-8 would scale up to full steps.
EPS = 1e-4
LEAST_STEPS, MOST_STEPS = 12, 24  # that serve the rows to forget
CHECK_EVERY = 4  # optimizer steps


class Basis(NamedTuple):
    """What a goal chooses by, beside the settings: the rows to forget, and the model's hidden size."""

    rows: int
    corrected: bool  # whether some say what to answer `instead`
    width: int


def chosen(given: Mapping[str, Any]) -> RunConfig:
    """A config of the given settings and, for your own rows, those that the goal chooses for the rest.

    Args:
        given: the settings of a `RunConfig` that the user gave. What the goal chooses depends on them, so the settings
            of several runs are crossed first, and each is filled in by itself.

    Raises:
        UserError: a goal that is not known.
    """
    return filled(given, basis_of(given))


def all_chosen(several: Sequence[Mapping[str, Any]]) -> list[RunConfig]:
    """`chosen` for each of several; rows are read once for those that differ in their training alone."""
    found: dict[str, Basis | None] = {}
    configs = []
    for given in several:
        # What the goal chooses by the rows, and what belongs to a method, says nothing about which rows there are.
        key = json.dumps({k: v for k, v in given.items() if k not in {*GOALS_OWN, *OF_METHODS}}, sort_keys=True)
        if key not in found:
            found[key] = basis_of(given)
        configs.append(filled(given, found[key]))
    return configs


def basis_of(given: Mapping[str, Any]) -> Basis | None:
    """What the goal chooses by; None where it chooses nothing, since there are no rows of your own."""
    config = RunConfig(**given)
    if config.task is not None or config.forget is None:
        return None
    if config.goal not in GOALS:
        raise unknown("goal", config.goal, GOALS)
    from . import tasks
    from .models import hidden_size
    from .tiny import TINY

    rows = tasks.load(config).objectives["forget"]
    corrected = any(row.fields.get("instead") for row in rows)
    return Basis(len(rows), corrected, WIDTH if config.model == TINY else hidden_size(config.model))


def filled(given: Mapping[str, Any], basis: Basis | None) -> RunConfig:
    """`chosen`, by what `basis_of` read."""
    if given.get("fast"):
        given = {**FAST, **given}
    config, plain = RunConfig(**given), RunConfig()
    if basis is None:
        return config
    goal = GOALS[config.goal]
    batch_size = max(1, int(given.get("batch_size", 8)))  # a wrong one is reported later
    ratio = str(given.get("ratio", "{}:{}".format(*goal.ratio)))
    steps = min(max(math.ceil(goal.passes * basis.rows / batch_size), LEAST_STEPS), MOST_STEPS)
    parts = ratio.split(":")
    # A wrong ratio is reported later.
    cycle = sum(map(int, parts)) if all(re.fullmatch(r"\s*[0-9]{1,6}\s*", part) for part in parts) else sum(goal.ratio)
    settings: dict[str, Any] = {
        "forget_loss": goal.corrected_loss if basis.corrected else goal.forget_loss,
        "retain_loss": "KL",
        "optimizer": PLUS if any(getattr(config, key) != getattr(plain, key) for key in NOT_ADAMW) else goal.optimizer,
        # Adam's learning rate scales with one over the width (arXiv 2203.03466).
        "lr": float(f"{goal.lr * WIDTH / max(basis.width, WIDTH):.2g}"),
        "betas": (0.9, 0.95),
        "eps": EPS,
        "ratio": ratio,
        "batch_size": batch_size,
        "steps": steps * cycle,
        "until": goal.until,
        "pause": goal.pause,
        "keep_at_least": KEEP_AT_LEAST,
    }
    # With another loss the goal's stopping rules do not apply; fast runs are not watched.
    if given.get("forget_loss", settings["forget_loss"]) != settings["forget_loss"] or config.fast:
        settings |= {"until": None, "keep_at_least": None, "pause": False}
    settings |= {"curve_points": max(1, given.get("steps", settings["steps"]) // CHECK_EVERY)}
    return RunConfig(**{**settings, **given})
