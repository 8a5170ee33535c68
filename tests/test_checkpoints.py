"""Checkpoints of many ranks, saved on some number of them and loaded on another (`tests/checkpoints.py`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from . import checkpoints

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed training")


def on_ranks(count: int, task: str, folder: Path) -> None:
    """Save or load on some ranks: forked, since torch is loaded here, and would be anew in each."""
    args = (count, str(folder.with_name(f"{folder.name}-{task}-{count}")), task, folder)
    torch.multiprocessing.start_processes(checkpoints.on_rank, args, count, start_method="fork")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A folder that so many ranks have saved into."""

    @functools.cache
    def on(count: int) -> Path:
        folder = tmp_path_factory.mktemp(f"from-{count}")
        on_ranks(count, "save", folder)
        return folder

    return on


# All nine pairs hold; these have each number once on each side.
@pytest.mark.parametrize(("saving", "loading"), [(1, 2), (2, 3), (3, 1)])
def test_saved_on_some_ranks_and_loaded_on_others_is_never_stopped(
    saved: Callable[[int], Path], saving: int, loading: int
) -> None:
    on_ranks(loading, "load", saved(saving))
