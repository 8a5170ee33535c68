"""An optimizer's arguments, tried before anything is computed with it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .errors import UserError, unknown
from .optim import DualOptimPlus


def check_known(cls: Any, arguments: Mapping[str, Any], where: str) -> None:
    """Refuse an argument that an optimizer's class does not take.

    Raises:
        UserError: its name, with the nearest known one.
    """
    taken = inspect.signature(cls).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in taken.values()):
        known = [name for name in taken if name != "params"]
        for name in arguments:
            if name not in known:
                raise unknown("argument", name, known, f"{where}: {cls.__name__}")


def tried(cls: type[DualOptimPlus], arguments: Mapping[str, Any], where: str) -> DualOptimPlus:
    """An optimizer with these arguments, of a parameter with one element.

    Raises:
        UserError: an argument that is not known, or a value out of its range.
    """
    check_known(cls, arguments, where)
    try:
        return cls([nn.Parameter(torch.zeros(1))], **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
