"""What is made or computed once and kept in the cache: folders with models, and results of scoring."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock

from . import __version__, checkpoints, ranks
from .cache import cache_dir
from .device import device_and_precision, scores_in_bf16
from .errors import UserError
from .folder import into_place, written


def is_whole(folder: Path) -> bool:
    """Whether a folder of the cache exists and is undamaged."""
    return folder.is_dir() and checkpoints.damage(folder) is None


@ranks.by_first
def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder of the cache. If it is missing or damaged, it is made anew, completely or not at all.

    Args:
        make: writes its contents into an empty temporary folder.
    """
    if is_whole(folder):
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    with _locked(folder):
        if is_whole(folder):  # another process was faster
            return folder
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            make(partial)
            checkpoints.seal(partial, {})
            shutil.rmtree(folder, ignore_errors=True)
            into_place(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock under which only this process, or these ranks, make something in the cache; others wait."""
    if not ranks.first():  # who waits for the first
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f"{path.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"the cache folder {cache_dir()} cannot be written ({error.strerror or error}); set DUALOPTIM_CACHE to "
            "another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


_CACHING = ContextVar("caching", default=True)


@contextmanager
def without_cache() -> Iterator[None]:
    """A context in which no scores are cached, since the cache holds texts of rows and replies."""
    token = _CACHING.set(False)
    try:
        yield
    finally:
        _CACHING.reset(token)


def cached(kind: str, key: list[Any], compute: Callable[[], Any]) -> Any:
    """The result of `compute`, cached by key, versions, device and precision.

    Args:
        key: what the result depends on; of a model and its tokenizer, their `identity`.
    """
    if not _CACHING.get():
        return compute()
    how = device_and_precision()[0], scores_in_bf16()
    versions = [__version__, torch.__version__, transformers.__version__, *map(str, how)]
    digest = hashlib.sha256(json.dumps([kind, versions, key], ensure_ascii=False).encode()).hexdigest()[:32]
    path = cache_dir() / kind / f"{digest}.json"

    def known() -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # missing or damaged
            return None

    if (value := ranks.of_first(known)) is not None:
        return value
    with _locked(path):
        if (value := ranks.of_first(known)) is None:
            value = compute()
            written(path, json.dumps(value, ensure_ascii=False))
    return value
