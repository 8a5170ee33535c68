"""Where a Trainer logs to (`report_to`): whether it can, and in which folder.

Trackers that write files into the Trainer's `output_dir` would write them among the checkpoints; here they get a folder
of their own. The others write where their own settings say: `wandb`, `mlruns` and the like in the working folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    CodeCarbonCallback,
    TensorBoardCallback,
    get_available_reporting_integrations,
)
from transformers.integrations.integration_utils import default_logdir

from ..errors import UserError, unknown

NOWHERE = ("none", "no", "false", "off")


def check(names: Sequence[str]) -> None:
    """Refuse unknown trackers, and those whose package is missing.

    Args:
        names: as transformers names them; "all" means every installed one, and `NOWHERE` none.

    Raises:
        UserError: the first that is unknown or not installed.
    """
    for name in names:
        if name in (*NOWHERE, "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown("place in report_to", name, (*INTEGRATION_TO_CALLBACK, "all", "none"))
        if name not in get_available_reporting_integrations():
            raise UserError(f"report_to {name}: its package is not installed; install it, or leave it out")


def callbacks(names: Sequence[str], folder: Path, *, writes: bool) -> list[TrainerCallback]:
    """The trackers' callbacks, made to write into a folder what they would write into the Trainer's `output_dir`.

    Args:
        names: the trackers, without "all" and "none".
        folder: made when something is written into it.
        writes: whether this process is one that writes.
    """
    made: list[Any] = [INTEGRATION_TO_CALLBACK[name]() for name in names]
    for tracker in made:
        if isinstance(tracker, TensorBoardCallback) and tracker.logging_dir is None:  # TENSORBOARD_LOGGING_DIR sets it
            tracker.logging_dir = str(folder / Path(default_logdir()).name)
        if isinstance(tracker, CodeCarbonCallback) and writes:
            folder.mkdir(parents=True, exist_ok=True)
            tracker.tracker = tracker._codecarbon.EmissionsTracker(output_dir=str(folder))
    return made
