"""Where the cache is."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder of the cache: $DUALOPTIM_CACHE, else ~/.cache/dualoptim.

    Raises:
        RuntimeError: the user has no home.
    """
    given = os.environ.get("DUALOPTIM_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "dualoptim"
