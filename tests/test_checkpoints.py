"""Checkpoints of many ranks, saved on some number of them and loaded on another (`tests/checkpoints.py`)."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed training")


def on_ranks(count: int, *arguments: str) -> None:
    """Run a script of the tests on some ranks of this machine."""
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, "\n".join(line for line in finished.stderr.splitlines() if "Error" in line)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A folder that so many ranks have saved into."""

    @functools.cache
    def on(count: int) -> Path:
        folder = tmp_path_factory.mktemp(f"from-{count}")
        on_ranks(count, "tests/checkpoints.py", "save", str(folder))
        return folder

    return on


# All nine pairs hold; these have each number once on each side.
@pytest.mark.parametrize(("saving", "loading"), [(1, 2), (2, 3), (3, 1)])
def test_saved_on_some_ranks_and_loaded_on_others_is_never_stopped(
    saved: Callable[[int], Path], saving: int, loading: int
) -> None:
    on_ranks(loading, "tests/checkpoints.py", "load", str(saved(saving)))
