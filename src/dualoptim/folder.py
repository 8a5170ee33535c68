"""The folder of a run: used by one run at a time; only files that a run writes are ever removed from it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from . import ranks
from .errors import UserError

LOCK = ".lock"
SETTINGS, RESULTS, RECORDS, PAGE = "config.resolved.yaml", "results.json", "records.jsonl", "report.html"
ENVIRONMENT, MODEL, ADAPTER, CHECKPOINTS, LOGS = "env.json", "model", "adapter", "checkpoints", "logs"
ENTRY = "run.json"  # of one run of a grid
CARD = "README.md"  # of a model, in its folder
SPACE, RECIPE = "space.yaml", "recipe.yaml"  # what `dualoptim tune` searches, and finds
SAVED = "saved.json"  # the hashes of the files of a run's models, as they were saved
FOLDERS = "folders.json"  # the folders that several runs made in the one that they share
RECORD = "record.json"  # signed, of `dualoptim certify`
WRITTEN = {SETTINGS, ENVIRONMENT, RESULTS, RECORDS, PAGE, MODEL, ADAPTER, CHECKPOINTS, LOGS, ENTRY, SAVED, RECORD,
           SPACE, RECIPE, FOLDERS, LOCK}  # fmt: skip
OWN = (RECORDS, MODEL, ADAPTER, CHECKPOINTS, LOGS, SAVED, RECORD)  # a run's own, where it shares the rest with others
# What tells that a folder's other files are a run's, so it is removed last.
KNOWN_BY = {ENVIRONMENT, FOLDERS, SETTINGS, SAVED}
TURN = f"{LOCK}-turn"  # held for a moment, by the shard whose turn it is to read and write what all of them share
# One for a folder, or one for each shard and one for their turns.
_LOCKS = re.compile(rf"{re.escape(LOCK)}(-\d+-of-\d+|-turn)?")
# What is being written. A file's name has a hash of the host's name and the process's number: shards may share a file.
_PARTIAL = re.compile(r"(?P<of>.+?)(\.[0-9a-f]{8}-[0-9]+)?\.partial")
# What is written into a folder of a run: by transformers and PEFT, by the trackers, by the Trainer.
_OF_MODEL = re.compile(
    r"(model(-\d+-of-\d+)?|adapter_model)\.safetensors(\.index\.json)?|((adapter|generation)_)?config\.json|README\.md|"
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|vocab\.(txt|bpe)|"
    r"(tokenizer|spiece|sentencepiece(\.bpe)?)\.model|(additional_chat_templates/[^/]+|chat_template)\.jinja"
)
_WRITTEN_INTO = {
    MODEL: _OF_MODEL,
    ADAPTER: _OF_MODEL,
    CHECKPOINTS: re.compile(r"(checkpoint-\d+|\.partial)/.+"),
    LOGS: re.compile(r"events\.out\.tfevents\.[^/]+|emissions[^/]*\.csv|.+/.+"),  # trackers make folders as they like
}
NOBODYS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # operating systems put these anywhere


def inside(folder: Path, inputs: Mapping[str, str | None]) -> str | None:
    """The first setting whose file or folder lies in the given folder, or is it."""
    place = Path(os.path.realpath(folder))  # which, unlike Path.resolve, takes a loop of links
    for name, given in inputs.items():
        if given is None or not os.path.lexists(given):
            continue
        path = Path(os.path.realpath(given))
        if path == place or place in path.parents:
            return name
    return None


def foreign(folder: Path) -> list[str]:
    """The files and folders in a folder that no run writes."""
    return [path.relative_to(folder).as_posix() for path, ours in _contents(folder) if not ours]


def _contents(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Every file in a folder of a run, with whether the run wrote it; a folder of someone else's stands for its files.

    What has a run's names may be another run, which was given a folder in this one. Only those folders are this run's
    that it recorded.
    """
    return _contents_of(folder, folders_of(folder))


def _contents_of(folder: Path, recorded: Iterable[str]) -> Iterator[tuple[Path, bool]]:
    written = WRITTEN | rows_of(folder)
    for path in sorted(folder.iterdir()):
        becomes = partial_of(path)
        name = becomes or path.name
        inner = [rest for first, _, rest in (each.partition("/") for each in recorded) if first == path.name]
        if path.is_symlink():  # a run makes none
            yield path, False
        elif not path.is_dir():
            yield path, name in written or path.name in NOBODYS or bool(_LOCKS.fullmatch(name))
        elif inner:
            yield from _contents_of(path, inner)
        elif name in _WRITTEN_INTO:
            known, of = saved(folder).get(name, {}), _WRITTEN_INTO[name]
            for file in _files(path):
                inside = file.relative_to(path).as_posix()
                ours = bool(becomes) or file.name in NOBODYS or inside in known or bool(of.fullmatch(inside))
                yield file, ours
        else:
            yield path, False


def _files(folder: Path) -> list[Path]:
    """All files in a folder and the folders in it. A link is one of them, wherever it leads."""
    return [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]


def partial_of(path: Path) -> str | None:
    """The name of the file or folder that a partial one is to become; None for those that are not partial.

    >>> partial_of(Path("out/results.json.0a1b2c3d-4711.partial")), partial_of(Path("out/model.partial"))
    ('results.json', 'model')
    """
    found = _PARTIAL.fullmatch(path.name)
    return found["of"] if found else None


def rows_of(folder: Path) -> set[str]:
    """The files of rows in the model's own words that a run wrote, which have its objectives' names."""
    said = _read(folder / ENVIRONMENT)
    return _names(said.get("rows") if isinstance(said, dict) else None)


def folders_of(folder: Path) -> set[str]:
    """The folders that a run of several made for each of them, such as "dualoptim-seed0" or "dualoptim-seed0/part1"."""
    return _names(_read(folder / FOLDERS))


def _names(said: Any) -> set[str]:
    return set(map(str, said)) if isinstance(said, list) else set()


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or it is damaged
        return None


def saved(own: Path) -> dict[str, dict[str, str]]:
    """What a run saved, as SAVED has it: the folder of a model or an adapter → file → SHA-256."""
    said = _read(own / SAVED)
    return {name: files for name, files in said.items() if isinstance(files, dict)} if isinstance(said, dict) else {}


def holds_a_run(folder: Path) -> bool:
    """Whether a run was started in a folder."""
    return (folder / SETTINGS).exists()


@ranks.by_first
def check(out: str | Path, inputs: Mapping[str, str | None], *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that a run must not write to; changes nothing.

    Args:
        inputs: setting → file or folder that the run reads.

    Raises:
        UserError: it cannot be a folder's name; is a file; holds a run, and neither `resume` nor `overwrite` is set; or
            holds other things, such as what the run reads. Or both are set.
    """
    if resume and overwrite:
        raise UserError("--resume goes on with what the output folder holds, and --overwrite replaces it; give one")
    folder = Path(out)
    try:
        str(out).encode()
        if "\0" in str(out):  # `exists` does not refuse it
            raise OSError(errno.EINVAL, "it holds a null byte")
        there = folder.exists() or folder.is_symlink()
        listed = foreign(folder) if there and folder.is_dir() else []
    except (OSError, ValueError) as error:  # too long, not UTF-8, a loop of links, not readable
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"out {str(out)[:80]!r}: cannot be used ({reason}); give another folder") from None
    if there and not folder.is_dir():
        raise UserError(f"out {folder}: is a file; give a folder")
    if holds_a_run(folder) and not (resume or overwrite):
        raise UserError(f"out {folder}: already holds a run; give another folder, --resume or --overwrite")
    if overwrite and (name := inside(folder, inputs)):
        raise UserError(f"out {folder}: --overwrite would remove what {name} reads there; give another folder")
    if overwrite or not holds_a_run(folder):
        _refuse(folder, listed)
        if name := inside(folder, inputs):
            raise UserError(f"out {folder}: a run would replace what {name} reads there; give another folder")
    where = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(where, os.W_OK | os.X_OK):
        raise UserError(f"out {folder}: {where} cannot be written to; give another folder")


def _refuse(folder: Path, listed: Sequence[str]) -> None:
    """Refuse a folder that has files of someone else's."""
    if listed:
        raise UserError(
            f"out {folder}: holds what no run wrote ({', '.join(listed[:3])}{', …' if len(listed) > 3 else ''}); give "
            "another folder, or move that away"
        )


@contextmanager
def owned(
    out: str | Path, inputs: Mapping[str, str | None], *, resume: bool, overwrite: bool, share: str | None = None
) -> Iterator[Path]:
    """The output folder, locked for this process, or for these ranks.

    Args:
        share: "i-of-n" for one of several shards of a plan, which may work in the folder at the same time.

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
        # A run shares it with no shard. A shard shares it with others of as many: 1/2 and 1/3 have runs in common.
        others = f"-of-{share.rpartition('-')[2]}" if share is not None else None
        for path in folder.glob(f"{LOCK}*"):
            if path.name not in (Path(lock.lock_file).name, TURN) and (
                others is None or not path.name.endswith(others)
            ):
                with FileLock(path, timeout=0):
                    pass
    except Timeout:
        raise UserError(f"out {folder}: another process is at work in it; wait, or give another folder") from None
    except OSError as error:
        raise UserError(f"out {folder}: cannot be written to ({error.strerror}); give another folder") from None
    try:
        check(folder, inputs, resume=resume, overwrite=overwrite)  # again: a run may just have ended
        if share is None:
            clear(folder)
        yield
    finally:
        if made and all(_LOCKS.fullmatch(path.name) for path in folder.iterdir()):  # nothing came of it
            shutil.rmtree(folder)
        lock.release()


@contextmanager
def turn(folder: Path, share: str | None) -> Iterator[None]:
    """A context that one shard of a plan is in at a time; a run that is alone in its folder needs no turn.

    Args:
        share: as for `owned`.
    """
    with FileLock(folder / TURN) if share is not None else nullcontext():
        yield


def others_at_work(folder: Path, share: str | None) -> bool:
    """Whether another shard is at work in a folder."""
    for path in folder.glob(f"{LOCK}-*") if share is not None else ():
        if path.name not in (f"{LOCK}-{share}", TURN):
            try:
                with FileLock(path, timeout=0):
                    pass
            except Timeout:
                return True
    return False


def into_place(beside: Path, place: Path) -> None:
    """Move a temporary file or folder into its place, after flushing it to disk, in case the power fails."""
    for path in (*(path for path in beside.rglob("*") if path.is_file()), beside):
        _synced(path)
    os.replace(beside, place)
    _synced(place.parent)


def _synced(path: Path) -> None:
    # Syncing a folder saves its list of names. Some systems cannot open or sync folders.
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@ranks.first_only
@ranks.by_first
def check_new(what: str, path: str | Path, mend: str = "another file") -> None:
    """Refuse a file to write that exists already, or that could not be written. Its folder is made if it is not there.

    A command calls this before its work, which may be long, and would be lost.

    Args:
        what: the setting that names the file.
        mend: what to give in its place.

    Raises:
        UserError: which of the two it is.
    """
    path = Path(path)
    try:
        if path.exists():
            raise UserError(f"{what} {path}: exists already; give {mend}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x"):
            pass
        path.unlink()
    except OSError as error:
        raise UserError(f"{what} {path}: cannot be written ({error.strerror}); give {mend}") from None


def written(path: Path, text: str) -> None:
    """Write a file completely, or not at all.

    Raises:
        OSError: it cannot be written, as on a full disk; the error names the file.
    """
    # Of this process alone: several shards may write the results of all runs at the same time.
    host = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    partial = path.with_name(f"{path.name}.{host}-{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        into_place(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


@ranks.first_only
def move_own(folder: Path, own: Path) -> None:
    """Move what is a run's own out of a folder that others come to share, into one for it alone."""
    own.mkdir(exist_ok=True)
    for name in OWN:
        if (folder / name).exists() and not (own / name).exists():
            os.replace(folder / name, own / name)


@ranks.by_first
def emptied(folder: Path) -> None:
    """Remove what a run wrote, and nothing else.

    Raises:
        UserError: the folder holds other things, which may have come since `check`; nothing is removed then.
    """
    _refuse(folder, foreign(folder))
    # File by file: a folder stays, with an error, if something comes into it meanwhile.
    files = [path for path, ours in _contents(folder) if ours and (path.parent != folder or not _stays(path))]
    last = [path for path in files if path.parent == folder and path.name in KNOWN_BY]
    for path in sorted(set(files) - {*last}, key=lambda path: path.name in KNOWN_BY):
        path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
    for path in last:
        path.unlink()


def _stays(path: Path) -> bool:
    """Whether a file of a run's folder is none that `emptied` removes: a lock, or the system's."""
    return bool(_LOCKS.fullmatch(path.name)) or path.name in NOBODYS


@ranks.first_only
def clear(folder: Path) -> None:
    """Remove what interrupted writing left behind, in a folder that no other process has."""
    written = WRITTEN | rows_of(folder)
    _remove(path for path in folder.iterdir() if partial_of(path) in written)


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


RUNS = "runs of unlearn or compare"
PARTS = "parts that are forgotten one after the other"
GRID = "runs of compare with --grid, --shard or --fast"
SEARCH = "trials of tune"


def kind_of(folder: Path) -> str | None:
    """What kind of runs a folder holds, by the files that they leave; None while nothing could be lost.

    Args:
        folder: one that was given to a run.
    """
    if (folder / SPACE).exists():
        return SEARCH
    own = [path for path in folder.glob("*-seed*") if path.is_dir()]
    if any(re.search(r"-[0-9a-f]{12}-seed\d+$", path.name) for path in own):  # as `dualoptim.runs.of_grid` names them
        return GRID
    if any(next(path.glob("part[0-9]*"), None) for path in own):
        return PARTS
    return RUNS if own or any((folder / name).exists() for name in (RESULTS, RECORDS, CHECKPOINTS)) else None


@ranks.by_first
def check_kind(out: str | Path, kind: str) -> None:
    """Refuse a folder that holds runs of another kind, whose results would be replaced.

    Raises:
        UserError: it does.
    """
    found = kind_of(Path(out))
    if found not in (None, kind):
        raise UserError(f"out {out}: holds {found}, whose results those of {kind} would replace; give another folder")
