"""Standard output and error of a command, which goes on when nobody reads them any more."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any


@contextmanager
def kept() -> Iterator[None]:
    """A context whose work is done to its end, though a reader has left, as in `dualoptim unlearn … | head -1`.

    What is printed then is dropped. What a stream's encoding lacks, such as Σ or →, is shown as ?.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    out, errors = _Kept(sys.stdout), _Kept(sys.stderr)
    with redirect_stdout(out), redirect_stderr(errors):
        try:
            yield
        finally:
            out.flush()
            errors.flush()


class _Kept:
    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._is_read = stream is not None  # None: the process began without it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self._is_read:
            try:
                self._stream.write(text)
            except BrokenPipeError:
                self._drop()
        return len(text)

    def flush(self) -> None:
        if self._is_read:
            try:
                self._stream.flush()
            except BrokenPipeError:
                self._drop()

    def _drop(self) -> None:
        self._is_read = False
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError):  # it has no descriptor
            os.dup2(nowhere, self._stream.fileno())  # for what it still holds, which Python writes at its end
        os.close(nowhere)
