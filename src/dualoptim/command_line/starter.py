"""`dualoptim init`: a commented recipe for your own files, checked before it is written."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .. import __version__, goals
from ..config import GROUPS, RunConfig
from ..errors import UserError
from . import rerun
from .usage import FIELDS, values

# Left to the goal, or at their defaults: written as comments, with the values that they have.
OPTIONAL = (
    "general", "lora_rank", "forget_loss", "retain_loss", "optimizer", "lr", "betas", "eps", "base_bits", "delta_bits",
    "ratio", "steps", "batch_size", "micro_batch_size", "until", "keep_at_least", "pause", "seed", "curve_points",
    "save_every", "private", "bf16_weights", "gradient_checkpointing",
)  # fmt: skip


def recipe(given: Mapping[str, Any], name: str) -> str:
    """The text of a recipe.

    Args:
        given: settings of a `RunConfig`, with ``forget``, which the recipe sets. The other important ones are written
            as comments, with the values that the goal, the rows and the model choose.
        name: the recipe's file, as its own commands give it.

    Raises:
        UserError: no rows to forget; or rows or a model that cannot be used.
    """
    if given.get("forget") is None:
        raise UserError("init: nothing to forget; give --forget FILE")
    from ..tiny import TINY  # loads torch

    if given.get("model") == TINY:  # it knows only what it memorizes
        given = {**given, "memorise": True}
    config, (own,) = goals.chosen(given), rerun.options({"config": name})
    lines = [
        f"# A recipe for unlearning, begun by `dualoptim init` of dualoptim {__version__}. Next:",
        f"#   dualoptim unlearn {own} --dry-run   # shows rows, batches, schedule and memory; runs nothing",
        f"#   dualoptim unlearn {own}",
        f"#   dualoptim compare {own} --seeds '[0, 1, 2]'   # several optimizers side by side",
        "# Settings behind '# ' have these values anyway: remove the '# ' to change one. With another forget_loss the",
        "# goal no longer chooses until, keep_at_least and pause, so give these, too. Paths start from the folder",
        "# where the command runs. `dualoptim unlearn --help` lists all settings.",
    ]
    for title in GROUPS:
        names = [key for key in FIELDS if FIELDS[key].metadata["group"] == title and (key in given or key in OPTIONAL)]
        if names:
            lines += ["", f"# ── {title} ──"]
        for key in names:
            lines += [*_comment(key), ("" if key in given else "# ") + _setting(key, config)]
    return "\n".join(lines) + "\n"


def _comment(key: str) -> list[str]:
    known = values(key)
    said = FIELDS[key].metadata["help"] + (f" ({', '.join(map(str, known))})" if known else "")
    return textwrap.wrap(said, 100, initial_indent="## ", subsequent_indent="## ", break_long_words=False)


def _setting(key: str, config: RunConfig) -> str:
    """One line of YAML."""
    value = yaml.safe_dump(config.as_dict()[key], allow_unicode=True, width=10_000, default_flow_style=True)
    return f"{key}: {value.removesuffix(chr(10)).removesuffix(chr(10) + '...')}"


def write(given: Mapping[str, Any], path: Path) -> None:
    """Write a recipe to a file that is not there yet."""
    text = recipe(given, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
