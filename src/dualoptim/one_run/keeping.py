"""What a run measured, written before all else: hours of training are not to be lost to a full disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .. import report, runs
from ..errors import UserError
from ..folder import RECORDS

T = TypeVar("T")


def with_records(folder: Path, write: Callable[[], None], keep: Callable[[], T]) -> T:
    """Write a run's records, and then its entry, which also has what is computed of them; the entry alone if need be.

    Args:
        folder: the run's own.
        write: writes the records into it.
        keep: writes the entry, as `write_numbers` does.

    Returns:
        What `keep` returns.

    Raises:
        UserError: there was no room for all of them.
    """
    why = "for want of room"
    try:
        write()
    except OSError as error:
        why = str(error.strerror or error)
        (folder / RECORDS).unlink(missing_ok=True)  # of an earlier try, whose samples may be others
    kept = keep()
    if not (folder / RECORDS).exists():
        raise UserError(
            f"{folder / RECORDS}: could not be written ({why}); the run's numbers are kept; make room, and go on with "
            "--resume, which does this run again"
        )
    return kept


def write_numbers(path: Path, values: Mapping[str, Any], shown: Mapping[str, Any], records: Path) -> None:
    """Write a run's numbers, if need be in place of its records, which are larger; else print them.

    Args:
        path: results.json, or the entry of one run of many.
        values: what it is to hold.
        shown: results, for the table.
        records: the file of the run's records.

    Raises:
        UserError: they could not be written.
    """
    try:
        runs.write_json(path, values)
        return
    except OSError:
        records.unlink(missing_ok=True)
    try:
        runs.write_json(path, values)
    except OSError as error:
        report.terminal(shown)
        raise UserError(
            f"{path}: could not be written ({error.strerror or error}), so the numbers stand above alone, and what was "
            "trained since the last checkpoint is lost; make room, and go on with --resume"
        ) from None
