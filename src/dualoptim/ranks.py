"""The ranks of a run: processes that torchrun or accelerate launch start, each on a device of its own.

All ranks run the same program. Training averages their gradients (`UnlearnTrainer`), scoring is shared out (`shared`),
and what is read from the disk, or decided by it, is what the first rank found (`by_first`); it alone writes and talks
(`first_only`, `join`). So all hold the same numbers and take the same decisions. In a process that is alone, nothing of
this does anything.

A rank that fails says why and ends, without waiting for others in between; the launcher then ends those that wait for
it. Nothing here may be waited for in an `except` or `finally`, which one rank alone may come to.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ParamSpec, TextIO, TypeVar

from .errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# Of a rank for another: the first may teach or convert a model, or ask a harness, while all others wait.
PATIENCE = timedelta(days=1)
SAME = timedelta(seconds=5)  # within which ranks that find the same mistake find it
GRACE = 2.0  # seconds in which the launcher ends ranks whose connection to a rank that ended is broken
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What launchers tell a process, by which torch and accelerate take it for a rank.
LAUNCHED = re.compile(r"(RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE|MASTER|TORCHELASTIC)_\w+)$")
ENGINES = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM",
           "PARALLELISM_CONFIG": "parallelism within the model"}  # fmt: skip
YES = ("1", "true", "yes", "on", "y", "t")


@dataclass
class _Group:
    rank: int
    size: int
    store: Any  # of keys and values, which the launcher keeps, so that it outlives every rank
    streams: tuple[TextIO, TextIO]
    alone: bool = False  # while the first rank works and the others wait


_group: _Group | None = None


def wants_cpu() -> bool:
    """Whether `accelerate launch --cpu` started this process."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in YES


def check_launcher() -> None:
    """Refuse what accelerate launch was asked for and a run does not do.

    Raises:
        UserError: an engine that shards a model, or a precision that is the run's to choose.
    """
    for variable, engine in ENGINES.items():
        if os.environ.get(f"ACCELERATE_USE_{variable}", "").lower() in YES:
            raise UserError(
                f"accelerate launch asks for {engine}, but the command line has the whole model on every device; "
                "launch it without, or use UnlearnTrainer in a script of your own"
            )
    if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION") or "no") != "no":
        raise UserError(
            f"accelerate launch asks for the mixed precision {precision}, but --bf16 decides that; launch it with "
            "--mixed_precision no"
        )


def join() -> None:
    """Become one of the ranks that a launcher started, if it started several.

    The process's device is then that of its place on this machine, and of all ranks the first alone has a standard
    output and error that anybody sees.

    Raises:
        UserError: what a launcher tells its processes is missing, or a machine has fewer devices than ranks.
    """
    global _group
    said = os.environ.get("WORLD_SIZE") or "1"
    if said == "1" or _group is not None:
        return
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE is {said}, but {', '.join(missing)} is not set; start several processes by torchrun or "
            "accelerate launch, and one without WORLD_SIZE"
        )
    # It warns, on every rank, that no loss leaves parameters unused, as some do.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://"))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the ranks do not find each other ({error}); start them by torchrun") from None
    _group = _Group(rank, size, store, (sys.stdout, sys.stderr))
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    backend, place = "gloo", int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and not wants_cpu():
        if (devices := torch.cuda.device_count()) < here():
            raise UserError(f"{here()} ranks on a machine with {devices} devices; start as many as it has")
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl"  # what is no tensor goes by way of the processor
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)


def leave(status: int) -> None:
    """End this process, if it is one of several ranks: after all others are done, or at once where it failed."""
    if _group is None:
        return
    if not status:
        import torch.distributed as dist

        dist.barrier()
        atexit._run_exitfuncs()  # whoever logs elsewhere sends the rest
    for stream in (sys.stdout, sys.stderr, *_group.streams):
        stream.flush()
    os._exit(status)  # gloo's threads now and then abort a process that takes itself down in order


def several() -> bool:
    """Whether there are other ranks to work with."""
    return _group is not None and not _group.alone


def first() -> bool:
    """Whether this is the first rank, or a process that is alone."""
    return _group is None or _group.rank == 0


def size() -> int:
    """How many ranks there are."""
    return 1 if _group is None else _group.size


def here() -> int:
    """How many of them are on this machine."""
    return 1 if _group is None else int(os.environ.get("LOCAL_WORLD_SIZE") or _group.size)


def of_first(work: Callable[[], T]) -> T:
    """What the first rank's `work` gives, or the error that it raises; all ranks wait for it."""
    if _group is None or _group.alone:
        return work()
    import torch.distributed as dist

    outcome: list[Any] = [None, None]
    if _group.rank == 0:
        _group.alone = True
        try:
            outcome[0] = work()
        except Exception as found:
            outcome[1] = found
        finally:
            _group.alone = False
    dist.broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result


def by_first(function: Callable[P, R]) -> Callable[P, R]:
    """A function that the first rank runs, and whose result or error all ranks get."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return of_first(lambda: function(*args, **kwargs))

    return run


def first_only(function: Callable[P, None]) -> Callable[P, None]:
    """A function that the first rank runs, and for which no other waits: it writes something."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if first():
            function(*args, **kwargs)

    return run


def apart(work: Callable[[], T]) -> T:
    """What `work` gives in a process of its own, which is none of the ranks and has this rank's device alone.

    Args:
        work: can be pickled, as what it gives.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    theirs = {name: value for name, value in os.environ.items() if LAUNCHED.match(name)}
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    device = int(os.environ.get("LOCAL_RANK", 0))
    try:
        for name in theirs:
            del os.environ[name]
        os.environ["CUDA_VISIBLE_DEVICES"] = (shown.split(",") if shown else [*map(str, range(device + 1))])[device]
        with ProcessPoolExecutor(1, get_context("spawn"), _end_with_parent) as pool:
            return pool.submit(work).result()
    finally:
        os.environ |= theirs
        if shown is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = shown


def _end_with_parent() -> None:
    import multiprocessing
    import threading

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def gathered(value: T) -> list[T]:
    """Every rank's value, in their order, on all of them."""
    if _group is None or _group.alone:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * _group.size
    dist.all_gather_object(values, value)
    return values


def shared(items: Sequence[T], work: Callable[[T], R], passed: Callable[[T], object] | None = None) -> list[R]:
    """`work` of every item, in their order, on all ranks, each of which did every so-many-th.

    Args:
        items: the same on all ranks.
        work: gives what can be pickled, on no device but the processor.
        passed: told each item, worked on here or left to another.
    """
    own, ranks, found = 0, 1, {}
    if several():
        assert _group is not None
        own, ranks = _group.rank, _group.size
    for i, item in enumerate(items):
        if i % ranks == own:
            found[i] = work(item)
        if passed is not None:
            passed(item)
    everything = {i: made for part in gathered(found) for i, made in part.items()}
    return [everything[i] for i in range(len(items))]


def say(sentence: str) -> None:
    """Print on standard error why this rank ends: once for all ranks that find the same, else with its number."""
    if _group is None:
        print(sentence, file=sys.stderr)
        return
    stream = _group.streams[1]
    if _group.rank == 0:
        print(sentence, file=stream, flush=True)
        _keep(sentence)
        return
    _keep(sentence)
    if _said_by_first() != _last_line(sentence):
        print(f"rank {_group.rank}: {sentence}", file=stream, flush=True)


def is_consequence() -> bool:
    """Whether an error may be no more than that another rank, which said why, is gone.

    A rank that is gone without a word, as one that was killed, makes the launcher end this one meanwhile.
    """
    if _group is None:
        return False
    time.sleep(GRACE + _group.rank % 8 * 0.1)  # so that, of ranks that fail alike, one speaks first
    try:
        return any(_group.store.check([_key(rank)]) for rank in range(_group.size) if rank != _group.rank)
    except RuntimeError:  # the store went with the first rank
        return True


def _key(rank: int) -> str:
    return f"dualoptim/failed/{rank}"


def _last_line(sentence: str) -> str:  # which of a traceback is what the ranks have in common
    return sentence.rstrip().rpartition("\n")[2]


def _keep(sentence: str) -> None:
    assert _group is not None
    with contextlib.suppress(RuntimeError):  # it went with the first rank
        _group.store.set(_key(_group.rank), _last_line(sentence))


def _said_by_first() -> str | None:
    assert _group is not None
    try:
        _group.store.wait([_key(0)], SAME)
        return str(_group.store.get(_key(0)).decode())
    except RuntimeError:  # not within the time
        return None
