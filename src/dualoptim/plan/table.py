"""What every setting needs of a device's memory, and the first that fits."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import psutil
import torch

from ..adapters import base_of
from ..config import RunConfig
from ..device import device_and_precision
from ..errors import UserError, unknown
from ..losses import LOSSES
from ..models import load_config, positions
from ..resolve import OPTIMIZERS, check_alone
from ..tiny import TINY
from .memory import Need, Step, needed
from .setting import Setting, how, ladder, rows_at_once

WIDTH = 160  # columns of a table in a file
# The share of a device's memory that is left to its driver, kernels and the allocator's gaps.
RESERVED = 0.04
UNITS = {
    "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def show(config: RunConfig, devices: int | None, device_memory: str | None) -> None:
    """Print what every setting needs, and the first that fits.

    Args:
        config: only its model, optimizer, losses, batch sizes and `max_length` are read.
        devices: how many train together; None for the GPUs here, or one.
        device_memory: of each, as `parse_size` reads it; None for this machine's.

    Raises:
        UserError: no such model, loss or optimizer, or no size.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    for role in ("forget", "retain"):
        if (name := getattr(config, f"{role}_loss")) not in LOSSES:
            raise unknown(f"{role}_loss", name, [key for key, cls in LOSSES.items() if cls.role == role])
    if config.optimizer not in OPTIMIZERS:
        raise unknown("optimizer", config.optimizer, OPTIMIZERS)
    check_alone(config)
    if (base := base_of(config.model)) is not None:
        raise UserError(f"plan: the model {config.model!r} is an adapter; give the model that it is of, {base!r}")
    if config.model == TINY:
        raise UserError(f"plan: the model {TINY!r} is made of a task's rows; give a folder or hub id")
    if devices is not None and devices < 1:
        raise UserError(f"devices must be >= 1, but is {devices}")
    here, _ = device_and_precision()
    count = devices or (torch.cuda.device_count() if here.type == "cuda" else 1)
    memory = parse_size(device_memory) if device_memory is not None else memory_of(here)
    described = load_config(config.model)
    if config.max_length > (room := positions(described)):
        raise UserError(f"max_length {config.max_length}: the model {config.model!r} takes {room} tokens; give less")
    rows, accumulated = rows_at_once(config, config.batch_size, count)
    step = Step(
        rows,
        config.max_length,
        config.max_length,
        optimizer=config.optimizer,
        reference=any(LOSSES[name].reference == "model" for name in (config.forget_loss, config.retain_loss)),
        compares=any(LOSSES[name].reference != "none" for name in (config.forget_loss, config.retain_loss)),
        accumulated=accumulated,
        losses=[LOSSES[name]() for name in (config.forget_loss, config.retain_loss)],
    )
    settings = [setting for setting in ladder(count) if not (setting.released and accumulated)]
    try:
        needs = [(setting, needed(described, setting, step, count)) for setting in settings]
    except Exception as error:  # a model's code may raise anything on tensors without values
        raise UserError(
            f"plan: a step of the model {config.model!r} cannot be counted from its configuration alone "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); measure one that runs"
        ) from error
    at_once = f"{rows} row{'s' * (rows > 1)} of {config.max_length} tokens at a time"
    title = f"{config.model} on {count} × {size_text(memory)}, {at_once}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("setting", min_width=17)
    for column in ("weights", "gradients", "states", "reference", "activations", "in all", "sent"):
        table.add_column(column, justify="right", no_wrap=True)
    chosen = fitting(needs, memory)
    for setting, need in needs:
        parts = (need.weights, need.gradients + need.buckets, need.states, need.reference, need.activations, need.total)
        texts = [size_text(part) if part else "–" for part in (*parts, need.communication)]
        table.add_row(setting.name, *texts, style="bold" if setting is chosen else None)
    wide = None if sys.stdout.isatty() else WIDTH  # a file may be as wide as needed
    console = Console(markup=False, emoji=False, width=wide)
    console.print(table)
    if chosen is None:
        least = min(needs, key=lambda each: each[1].total)
        console.print(
            f"Nothing fits: {least[0].name} needs least, {size_text(least[1].total)} of each. Give more devices, "
            "fewer rows at a time (--micro-batch-size 1), shorter rows (--max-length) or a smaller model.",
            highlight=False,
        )
    else:
        console.print(f"What fits and gives up least: {chosen.name}.", style="bold", highlight=False)
        console.print(f"How: {how(chosen, config.optimizer, count)}", highlight=False)
    console.print(
        f"· At the peak activations go as gradients come, so that not all is there at once; {RESERVED:.0%} of a device "
        "are left to its driver. Sent is what a device sends in a step. "
        "A reference is there where a loss compares with all that the model said.",
        highlight=False,
    )


def fitting(needs: Sequence[tuple[Setting, Need]], memory: int) -> Setting | None:
    """The first of some settings that fits, which gives up least."""
    return next((setting for setting, need in needs if need.total <= (1 - RESERVED) * memory), None)


def parse_size(given: str) -> int:
    """Bytes: "80GB" is 80·10⁹, "80GiB" 80·2³⁰."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", given)
    if not found or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise UserError(f"device_memory {given!r}: is no size; give one such as 80GB or 24GiB")
    return round(float(found[1]) * UNITS[found[2].upper()])


def memory_of(device: torch.device) -> int:
    """Bytes that a device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def size_text(size: float) -> str:
    """Bytes as cards are sold: "80 GB", "1.5 GB", "540 MB"."""
    if size < 1e9:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e9:.0f} GB" if size >= 100e9 else f"{size / 1e9:.1f} GB".replace(".0 GB", " GB")
