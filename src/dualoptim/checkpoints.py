"""Checkpoints that are complete or absent.

A checkpoint is written into a temporary folder, sealed by a manifest, and renamed last. The manifest holds the size and
the SHA-256 of every file, its own hash, and the fingerprints of the run's inputs. So a checkpoint that is incomplete,
was changed, or is of another run is recognized and refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .folder import into_place
from .schema import count, text, unlike

MANIFEST = "manifest.json"
PARTIAL = ".partial"  # in the folder of checkpoints: what is being written, or removed
PREFIX = "checkpoint-"
FROZEN, REFERENCE = "set of frozen weights", "reference model"
MIXED, WEIGHTS = "mixed precision", "precision of trained weights"
MEMORIZED = "precision_of_memorizing"
TASK_FILE = "task_file"  # of a task of your own
ENDS = "set_of_end_tokens"
# Fingerprints that some engines and earlier versions do not write: without one, a run is not compared by it.
MAY_LACK = {
    FROZEN,
    REFERENCE,
    MIXED,
    WEIGHTS,
    MEMORIZED,
    TASK_FILE,
    ENDS,
    "combine",
    "sam_rho",
    "max_grad_norm",
    "set of loss arguments",
    "set of optimizer arguments",
}
# The form of a manifest.
FORM = {"files": {"*": {"bytes": count, "sha256": text}}, "fingerprints": {"*": text}, "sha256": text}

# Hashes that this process has computed: file's path → what `_state` said of it, and its SHA-256.
_HASHED: dict[str, tuple[tuple[int, ...], str]] = {}

logger = logging.getLogger(__name__)


def sha256(path: Path) -> str:
    """A file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while part := opened.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced."""
    said = path.stat()
    return said.st_ino, said.st_size, said.st_mtime_ns, said.st_ctime_ns


def _hash_once(path: Path) -> str:
    """A file's SHA-256, computed once while it stays the same: a resume checks a checkpoint several times."""
    key, now = os.path.abspath(path), _state(path)  # before it is read, so that a later change is seen
    if key not in _HASHED or _HASHED[key][0] != now:
        _HASHED[key] = now, sha256(path)
    return _HASHED[key][1]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST)


def seal(folder: Path, fingerprints: Mapping[str, str]) -> None:
    """Write the manifest of a complete checkpoint."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in _files(folder)
    }
    manifest = {"files": files, "fingerprints": dict(fingerprints)}
    text = json.dumps({**manifest, "sha256": _hash(manifest)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def put(beside: Path, folder: Path) -> None:
    """Move a sealed checkpoint into its place; an older one of the same step is removed."""
    remove(folder)
    into_place(beside, folder)
    without_empty(beside.parent)


def remove(folder: Path) -> None:
    """Remove a checkpoint, in a way that no part of it is ever taken for one."""
    if not folder.exists():
        return
    away = folder.parent / PARTIAL / f"removed-{folder.name}"
    shutil.rmtree(away, ignore_errors=True)
    away.parent.mkdir(exist_ok=True)
    os.replace(folder, away)
    shutil.rmtree(away)
    without_empty(away.parent)


def without_empty(partial: Path) -> None:
    """Remove the folder of what is being written, if it is empty."""
    with contextlib.suppress(OSError):  # it holds something else
        partial.rmdir()


def numbered(out: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first, by step number, since clocks may be set back."""
    found = [p for p in out.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal() and p.is_dir()]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def rotate(newest: Path, keep: int | None, best: str | None = None) -> None:
    """Of a checkpoint and those before it, remove all but so many.

    Later ones are left alone: they are from before a resume, may be damaged, and will be written again.

    Args:
        newest: the checkpoint, which stays.
        keep: how many stay, it and the best among them; None for all.
        best: the best one's folder, compared by name; it stays, as with transformers.
    """
    upto = [folder for folder in numbered(newest.parent) if _step(folder) <= _step(newest)]
    stay = {newest.name, Path(best).name if best else newest.name}
    others = [folder for folder in upto if folder.name not in stay]
    for folder in others[max(keep - len(upto) + len(others), 0) :] if keep else []:
        remove(folder)


def best_of(folder: Path) -> str | None:
    """The folder of the run's best checkpoint, as recorded in this one; None if none is recorded."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = state.get("best_model_checkpoint")
    return str(found) if found else None


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if unlike(manifest, FORM) is not None:
        return {}
    content = {key: manifest[key] for key in ("files", "fingerprints")}
    return content if manifest["sha256"] == _hash(content) else {}


def damage(folder: Path) -> str | None:
    """How a sealed folder differs from what was written; None if it does not."""
    manifest = _manifest(folder)
    if not manifest:
        return f"it has no readable {MANIFEST}, so it was not written to its end"
    for name, known in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"its {name} is missing"
        if path.stat().st_size != known["bytes"] or _hash_once(path) != known["sha256"]:
            return f"its {name} is not as it was written"
    return None


def flaw(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is complete."""
    found = damage(folder)
    if found is None and not any("optim" in name for name in _manifest(folder)["files"]):
        return "it was saved without the optimizer's states"  # and a Trainer would silently start with new ones
    return found


def other(folder: Path, fingerprints: Mapping[str, str]) -> str | None:
    """The name of the first fingerprint that a checkpoint's run does not share; None if it shares all."""
    return differing(_manifest(folder).get("fingerprints", {}), fingerprints)


def differing(before: Mapping[str, str], fingerprints: Mapping[str, str]) -> str | None:
    """The name of the first fingerprint that an earlier run does not share; None if it shares all."""
    seen = {name: value for name, value in fingerprints.items() if name in before or name not in MAY_LACK}
    return next((name for name, value in seen.items() if before.get(name) != value), None)


def check(folder: Path, fingerprints: Mapping[str, str]) -> None:
    """Refuse a checkpoint that a run cannot resume from.

    Raises:
        UserError: it is damaged or incomplete, or of a run with other fingerprints.
    """
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder}: there is no such folder")
    if found := flaw(folder):
        raise UserError(f"checkpoint {folder}: {found}; go on from another, or begin anew")
    differs = other(folder, fingerprints)
    if differs and differs not in _manifest(folder)["fingerprints"]:
        raise UserError(
            f"checkpoint {folder}: is of a run that had no {differs.replace('_', ' ')}, and this one has; leave it "
            "out, or give another folder"
        )
    if differs:
        raise UserError(
            f"checkpoint {folder}: is of a run with another {differs.replace('_', ' ')} than this one; give it as it "
            "was, or another folder"
        )


def newest(out: Path, fingerprints: Mapping[str, str]) -> Path | None:
    """The newest complete checkpoint in a folder; others are skipped with a warning. None where there is none.

    Raises:
        UserError: it is of a run with other fingerprints.
    """
    for folder in numbered(out):
        if found := flaw(folder):
            logger.warning("checkpoint %s is passed over: %s", folder, found)
            continue
        check(folder, fingerprints)
        return folder
    return None


def clear(out: Path) -> None:
    """Remove what interrupted writing or removing left behind."""
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
