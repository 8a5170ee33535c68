"""The ranks of a run: processes that torchrun or accelerate launch start, each on a device of its own.

All ranks run the same program. Training averages their gradients (`UnlearnTrainer`), and scoring is split among them
(`shared`). What is read from the disk, and what depends on it, comes from the first rank (`by_first`); only the first
rank writes and prints (`first_only`, `join`). So all have the same numbers and take the same decisions. In a process
that is alone, none of this has an effect.

A rank that fails reports why and ends, without waiting for others in between; the launcher then ends those that wait
for it. No rank may wait for others in an `except` or `finally`, which only one of them may reach.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ParamSpec, TextIO, TypeVar

from .errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# How long ranks wait for each other: the first may train or convert a model, or run a harness, while others wait.
PATIENCE = timedelta(days=1)
SAME = timedelta(seconds=5)  # ranks that find the same mistake find it within this time
GRACE = 2.0  # seconds for the launcher to end ranks that lost their connection to a rank that ended
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# The environment variables of launchers, by which torch and accelerate recognize a rank.
LAUNCHED = re.compile(r"(RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE|MASTER|TORCHELASTIC)_\w+)$")
ENGINES = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM",
           "PARALLELISM_CONFIG": "parallelism within the model"}  # fmt: skip
YES = ("1", "true", "yes", "on", "y", "t")


@dataclass
class _Group:
    rank: int
    size: int
    store: Any  # the launcher's key-value store, which outlives every rank
    streams: tuple[TextIO, TextIO]
    alone: bool = False  # while the first rank works and the others wait


_group: _Group | None = None


def wants_cpu() -> bool:
    """Whether `accelerate launch --cpu` started this process."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in YES


def check_launcher() -> None:
    """Refuse options of accelerate launch that a run does not support.

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

    The process then uses the device of its local rank. Only the first rank's standard output and error are shown.

    Raises:
        UserError: environment variables of a launcher are missing, or a machine has fewer devices than ranks.
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
    # torch would warn, on every rank, that no parameter was unused; some losses leave some unused.
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
        backend = "cpu:gloo,cuda:nccl"  # objects that are no tensors go through the CPU
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)


def leave(status: int) -> None:
    """End this process, if it is one of several ranks: once all others are done, or at once if it failed."""
    if _group is None:
        return
    if not status:
        import torch.distributed as dist

        dist.barrier()
        atexit._run_exitfuncs()  # trackers send the rest of their data
    for stream in (sys.stdout, sys.stderr, *_group.streams):
        stream.flush()
    os._exit(status)  # gloo's threads sometimes abort a process that exits normally


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
    """The result of the first rank's `work`, or the error that it raises, on all ranks, which wait for it."""
    if _group is None or _group.alone:
        return work()
    import torch.distributed as dist

    outcome: list[Any] = [None, None]
    if _group.rank == 0:
        try:
            outcome[0] = _alone(work)
        except Exception as found:
            outcome[1] = found
    dist.broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result


def _alone(work: Callable[[], T]) -> T:
    if _group is None or _group.alone:
        return work()
    _group.alone = True
    try:
        return work()
    finally:
        _group.alone = False


@contextlib.contextmanager
def saving(work: Callable[[], object]) -> Iterator[None]:
    """A context whose failure, of whichever rank, does not keep the first one from `work`, which no other waits for.

    What `work` raises then is left out, as the failure is what the user has to know. Where nothing fails, it is not
    called.
    """
    try:
        yield
    except BaseException:
        if first():
            with contextlib.suppress(Exception):
                _alone(work)
        raise


def by_first(function: Callable[P, R]) -> Callable[P, R]:
    """A function that the first rank runs, and whose result or error all ranks get."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return of_first(lambda: function(*args, **kwargs))

    return run


def first_only(function: Callable[P, None]) -> Callable[P, None]:
    """A function that only the first rank runs, and that no other waits for, as one that writes."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if first():
            function(*args, **kwargs)

    return run


def apart(work: Callable[[], T]) -> T:
    """The result of `work` in a separate process, which is none of the ranks and sees only this rank's device.

    Args:
        work: picklable, as must be its result.
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
    """The results of `work` for all items, in their order, on all ranks; of n ranks, each does every n-th item.

    Args:
        items: the same on all ranks.
        work: its result must be picklable and lie on the CPU.
        passed: called with each item, whether it is worked on here or by another rank.
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
    """Print on standard error why this rank ends: once if all ranks find the same, else with the rank's number."""
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
    """Whether an error may only be a consequence of another rank's end, which that rank has explained.

    If a rank ended without a message, as when it was killed, the launcher ends this one in the meantime.
    """
    if _group is None:
        return False
    time.sleep(GRACE + _group.rank % 8 * 0.1)  # so that, of ranks that fail the same way, one reports first
    try:
        return any(_group.store.check([_key(rank)]) for rank in range(_group.size) if rank != _group.rank)
    except RuntimeError:  # the store ended with the first rank
        return True


def _key(rank: int) -> str:
    return f"dualoptim/failed/{rank}"


def _last_line(sentence: str) -> str:  # the part of a traceback that ranks have in common
    return sentence.rstrip().rpartition("\n")[2]


def _keep(sentence: str) -> None:
    assert _group is not None
    with contextlib.suppress(RuntimeError):  # it ended with the first rank
        _group.store.set(_key(_group.rank), _last_line(sentence))


def _said_by_first() -> str | None:
    assert _group is not None
    try:
        _group.store.wait([_key(0)], SAME)
        return str(_group.store.get(_key(0)).decode())
    except RuntimeError:  # not within the time
        return None
