"""An optimizer's arguments, tried before anything is computed with it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import UserError, unknown

Tried = TypeVar("Tried", bound=Optimizer)


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


def tried(cls: type[Tried], arguments: Mapping[str, Any], where: str) -> Tried:
    """An optimizer with these arguments, of a parameter with one element.

    Raises:
        UserError: an argument that is not known, or a value out of its range.
    """
    check_known(cls, arguments, where)
    try:
        return cls([nn.Parameter(torch.zeros(1, dtype=torch.float32))], **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
