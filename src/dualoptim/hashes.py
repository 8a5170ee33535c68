"""Hashes of values, the same for the same contents from one process to the next."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .data import Row


def digest(value: Any) -> str:
    """A hash of plain values, rows and data classes; of any other object only the class counts."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """What JSON has no form for, in one that it has."""
    if isinstance(value, Row):  # whatever its `where` says
        return [value.prompt, value.answer, value.fields, value.only, value.chunk]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(each, sort_keys=True, default=_plain) for each in value)
    if isinstance(value, (bytes, Path)):
        return str(value)
    return list(value) if isinstance(value, Sequence) else type(value).__name__


def of_tokenizer(tokenizer: Any) -> str:
    """A hash of a tokenizer: its pieces and its special tokens, without its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return digest([backend.to_str() if backend is not None else tokenizer.get_vocab(), tokenizer.special_tokens_map])
