"""A script on several ranks of this machine, forked: torch and transformers are loaded here, and would be anew in each.

What torchrun tells its processes is told to these; `tests/test_ranks.py` has torchrun itself.
"""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def run(script: Path | str, *arguments: str, count: int = 2) -> None:
    """Run a script, or a module of the tests by its name, on so many ranks, and raise what any of them raises."""
    # Here, as torchrun does it: a rank's own would go with it, and groups that follow each other meet in one place.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = [str(script), *arguments]
    torch.multiprocessing.start_processes(_rank, (count, store.port, told), count, start_method="fork")


def _rank(rank: int, count: int, port: int, told: list[str]) -> None:
    from accelerate.state import AcceleratorState, PartialState

    if count > 1:  # one is a process like any other
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT="0",
        )  # fmt: skip
    for state in (AcceleratorState, PartialState):  # of the process that was forked
        state._reset_state()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.argv = told
    if told[0].endswith(".py"):
        runpy.run_path(told[0], run_name="__main__")
    else:
        runpy.run_module(told[0], run_name="__main__")
