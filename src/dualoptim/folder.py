"""The folder of a run: one run's alone, and emptied of nothing but what a run writes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from . import ranks
from .errors import UserError

LOCK = ".lock"
SETTINGS, RESULTS, RECORDS, PAGE = "config.resolved.yaml", "results.json", "records.jsonl", "report.html"
ENVIRONMENT, MODEL, ADAPTER, CHECKPOINTS, LOGS = "env.json", "model", "adapter", "checkpoints", "logs"
ENTRY = "run.json"  # of one run of a grid
CARD = "README.md"  # of a model, in its folder
SPACE, RECIPE = "space.yaml", "recipe.yaml"  # what `dualoptim tune` searches, and finds
RECORD = "record.json"  # signed, of `dualoptim certify`
WRITTEN = {SETTINGS, ENVIRONMENT, RESULTS, RECORDS, PAGE, MODEL, ADAPTER, CHECKPOINTS, LOGS, ENTRY, RECORD,
           SPACE, RECIPE, LOCK}  # fmt: skip
OWN_RUN = re.compile(r"(.+-seed\d+|part\d+)$")  # the folder of a method of several, of a part of several
_LOCKS = re.compile(rf"{re.escape(LOCK)}(-\d+-of-\d+)?")  # one of a folder, or one of each shard
NOBODYS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # which systems put anywhere


def inside(folder: Path, inputs: Mapping[str, str | None]) -> str | None:
    """The first setting whose file or folder lies in a folder, or holds it."""
    place = folder.resolve()
    for name, given in inputs.items():
        if given is None or not os.path.lexists(given):
            continue
        path = Path(given).resolve()
        if path == place or place in path.parents:
            return name
    return None


def foreign(folder: Path) -> list[str]:
    """What lies in a folder and is nothing that a run writes."""
    found = []
    written = WRITTEN | rows_of(folder)
    for path in sorted(folder.iterdir()):
        name = path.name.removesuffix(".partial")
        if OWN_RUN.match(name) and path.is_dir() and not path.is_symlink():
            found += [f"{path.name}/{other}" for other in foreign(path)]
        elif name not in written and path.name not in NOBODYS and not _LOCKS.fullmatch(name):
            found.append(path.name)
    return found


def rows_of(folder: Path) -> set[str]:
    """The files of rows in the model's own words that a run wrote, which have its objectives' names."""
    try:
        return set(json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def holds_a_run(folder: Path) -> bool:
    """Whether a run was begun in a folder."""
    return (folder / SETTINGS).exists()


@ranks.by_first
def check(out: str | Path, inputs: Mapping[str, str | None], *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that a run must not write to; changes nothing.

    Args:
        inputs: setting → file or folder that the run reads.

    Raises:
        UserError: it cannot be a folder's name, is a file, holds a run while neither `resume` nor `overwrite` says what
            to do with it, or holds other things, among them what the run reads.
    """
    folder = Path(out)
    try:
        str(out).encode()
        if "\0" in str(out):  # which `exists` passes over
            raise OSError(errno.EINVAL, "it holds a null byte")
        there = folder.exists() or folder.is_symlink()
        listed = foreign(folder) if there and folder.is_dir() else []
    except (OSError, ValueError) as error:  # too long, not UTF-8, a loop of links, not to be looked into
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"out {str(out)[:80]!r}: cannot be used ({reason}); give another folder") from None
    if there and not folder.is_dir():
        raise UserError(f"out {folder}: is a file; give a folder")
    if holds_a_run(folder) and not (resume or overwrite):
        raise UserError(f"out {folder}: already holds a run; give another folder, --resume or --overwrite")
    if overwrite and (name := inside(folder, inputs)):
        raise UserError(f"out {folder}: --overwrite would remove what {name} reads there; give another folder")
    if listed and (overwrite or not holds_a_run(folder)):
        raise UserError(
            f"out {folder}: holds what no run wrote ({', '.join(listed[:3])}{', …' if len(listed) > 3 else ''}); give "
            "another folder, or move that away"
        )
    where = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(where, os.W_OK | os.X_OK):
        raise UserError(f"out {folder}: {where} cannot be written to; give another folder")


@contextmanager
def owned(
    out: str | Path, inputs: Mapping[str, str | None], *, resume: bool, overwrite: bool, share: str | None = None
) -> Iterator[Path]:
    """The output folder, for this process alone, or for these ranks.

    Args:
        share: "i-of-n" where it is one of several shards of a plan, which may be at work in the folder together.

    Raises:
        UserError: as `check`; or another process is at work in it.
    """
    with ExitStack() as held:
        mine = _owned(out, inputs, resume=resume, overwrite=overwrite, share=share)
        ranks.of_first(lambda: held.enter_context(mine))
        yield Path(out)


@contextmanager
def _owned(
    out: str | Path, inputs: Mapping[str, str | None], *, resume: bool, overwrite: bool, share: str | None
) -> Iterator[None]:
    folder = Path(out)
    check(folder, inputs, resume=resume, overwrite=overwrite)
    made = not folder.exists()
    lock = FileLock(folder / (LOCK if share is None else f"{LOCK}-{share}"), timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        for path in folder.glob(f"{LOCK}*"):  # a whole run shares with no shard, a shard with every other
            if path.name != Path(lock.lock_file).name and (share is None or path.name == LOCK):
                with FileLock(path, timeout=0):
                    pass
    except Timeout:
        raise UserError(f"out {folder}: another process is at work in it; wait, or give another folder") from None
    except OSError as error:
        raise UserError(f"out {folder}: cannot be written to ({error.strerror}); give another folder") from None
    try:
        check(folder, inputs, resume=resume, overwrite=overwrite)  # again, as the one before may have written it
        yield
    finally:
        if made and all(_LOCKS.fullmatch(path.name) for path in folder.iterdir()):  # nothing came of it
            shutil.rmtree(folder)
        lock.release()


def into_place(beside: Path, place: Path) -> None:
    """Give a file or folder that was written beside its place, for good: on the disk first, should the power fail."""
    for path in (*(path for path in beside.rglob("*") if path.is_file()), beside):
        _synced(path)
    os.replace(beside, place)
    _synced(place.parent)


def _synced(path: Path) -> None:
    # A folder's is its list of names; there are systems that open no folders, or sync none.
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@ranks.first_only
def written(path: Path, text: str) -> None:
    """Write a file whole, or not at all.

    Raises:
        OSError: it cannot be, as where the disk is full; it names the file.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        into_place(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


@ranks.first_only
def emptied(folder: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    _remove(p for p in folder.iterdir() if not _LOCKS.fullmatch(p.name) and p.name not in NOBODYS)


@ranks.first_only
def clear(folder: Path) -> None:
    """Remove what writing left when it was cut off."""
    partial = {f"{name}.partial" for name in WRITTEN | rows_of(folder)}
    _remove(path for path in folder.iterdir() if path.name in partial)


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
