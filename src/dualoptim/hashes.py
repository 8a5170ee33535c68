"""Hashes of values, the same for the same contents from one process to the next."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data import Row
from .training.reference import is_whole

logger = logging.getLogger(__name__)


def digest(value: Any, *, contents: bool = False) -> str:
    """A hash of plain values, rows and data classes; of any other object the class alone counts.

    Args:
        value: what to hash.
        contents: tensors and NumPy's numbers count by their values, functions by their names, and other objects by
            their attributes. Where that cannot be, a warning says that only the class counts.
    """
    if contents:
        try:
            return _hash(value, _whole)
        except (TypeError, ValueError):  # an object holds itself, or keys of several types
            _told("an object that holds itself or has keys of several types")
    return _hash(value, _plain)


def _hash(value: Any, default: Callable[[Any], Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=default).encode()).hexdigest()


def _whole(value: Any) -> Any:
    """As `_plain`, with the contents of other objects."""
    if isinstance(value, Tensor):
        if not is_whole(value):
            return _told(type(value).__name__)
        numbers = value.detach().cpu()
        if numbers.numel() == 1:
            return numbers.item()
        return [str(value.dtype), list(value.shape), hashlib.sha256(_bytes(numbers)).hexdigest()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if hasattr(value, "__qualname__"):  # a function or a class
        return [value.__module__, value.__qualname__]
    if isinstance(value, nn.Module):
        own = {name: held for name, held in vars(value).items() if not name.startswith("_") and name != "training"}
        return [type(value).__qualname__, own, value.state_dict()]
    known = _plain(value, _whole)
    if known != type(value).__name__:
        return known
    if hasattr(value, "__dict__"):
        return [type(value).__qualname__, vars(value)]
    text = repr(value)
    return text if " at 0x" not in text else _told(type(value).__name__)


def _bytes(numbers: Tensor) -> bytes:
    return numbers.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@functools.cache  # once for each class
def _told(name: str) -> str:
    logger.warning("checkpoints compare %s by its class alone, so a resume does not notice other values of it", name)
    return name


def _plain(value: Any, default: Callable[[Any], Any] | None = None) -> Any:
    """What JSON has no form for, in one that it has."""
    if isinstance(value, Row):  # whatever its `where` says
        return [value.prompt, value.answer, value.fields, value.only, value.chunk]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(each, sort_keys=True, default=default or _plain) for each in value)
    if isinstance(value, (bytes, Path)):
        return str(value)
    return list(value) if isinstance(value, Sequence) else type(value).__name__


def of_tokenizer(tokenizer: Any) -> str:
    """A hash of a tokenizer: its pieces and its special tokens, without its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return digest([backend.to_str() if backend is not None else tokenizer.get_vocab(), tokenizer.special_tokens_map])
