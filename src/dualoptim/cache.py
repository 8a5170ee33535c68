"""Where the cache is."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UserError


def cache_dir() -> Path:
    """The folder of the cache: $DUALOPTIM_CACHE, else ~/.cache/dualoptim.

    Raises:
        UserError: the user has no home, as in a container with a user id of its own.
    """
    given = os.environ.get("DUALOPTIM_CACHE") or "~/.cache/dualoptim"
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise UserError(
            f"the cache folder {given}: there is no home folder of this user; set HOME, or DUALOPTIM_CACHE to a folder "
            "that can be written to"
        ) from None
