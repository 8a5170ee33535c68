"""SIGKILL at random moments and in the middle of writes, then --resume: is all as if it had never been killed?

    python benchmarks/kills.py --kills 100 --writes 50     what is done already is taken over
    python benchmarks/kills.py --kinds compare memorize    some kinds alone, in a process of their own
    python benchmarks/kills.py --page                      only write the page of what was done

A trial starts a command in a process of its own, kills it, starts it again with --resume until it ends, and compares
what lies in its folder and in its cache with what the same command left that was never killed. Trials are processes
forked from this one, which has loaded the packages and computed nothing, but for those of the kind "new process".
Every trial is a line of runs/kills/trials.jsonl. Linux alone. Writes benchmarks/kills.md, whose last
chapter, what a person reads in the numbers, is kept as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib
import json
import os
import random
import select
import shutil
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dualoptim import cli
from dualoptim.checkpoints import damage, numbered
from dualoptim.data import question
from dualoptim.evaluation.numbers import Metric, Numbers, mean
from dualoptim.evaluation.scoring import negative_log_likelihoods
from dualoptim.models import source
from dualoptim.reading import json_lines
from dualoptim.tasks import Task

LOADED = ("unlearn", "report", "memorise", "tasks.files", "optim.backends.compiled")  # before anything is forked
# A process that has threads must not be forked.
SURROUNDINGS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
HERE = Path(__file__).resolve()
WORK = Path("runs/kills").absolute()
TRIALS = WORK / "trials.jsonl"
PAGE = HERE.with_suffix(".md")
READING = "\n## Reading\n"
CACHE = "cache"
WITHIN = 0.012  # seconds after a write begins, at most, when it is cut off
TIMED = {"seconds", "step_seconds", "peak_memory_bytes"}  # what no two runs have in common
UNCOMPARED = {".lock", "env.json", "report.html", "training_args.bin", "manifest.json"}  # times and places are in them
LONGEST = 300.0  # seconds that a process may take


class Light(Task):
    """Invented facts, scored by the probability of their answers, which takes milliseconds."""

    name = "light"
    followed = "probability"
    metrics: ClassVar = {
        "forget": Metric("to forget", "higher", ".3f"),
        "retain": Metric("to keep", "lower", ".3f"),
    }

    def __init__(self, parts: int = 0, part: int = 0) -> None:
        self.parts = parts
        verbs = {"forget": f"hides {part}", "retain": "likes"}
        self.objectives = {
            name: [question(f"What does {who} do?", f"{who} {verb} tea.") for who in "ABCDEFGHIJ"]
            for name, verb in verbs.items()
        }

    def stages(self) -> list[dict[str, Any]]:
        return [{"parts": 0, "part": part + 1} for part in range(self.parts)]

    def score(self, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
        return [
            {"set": name, "question": row.question, "answer": row.answer, "nll": value}
            for name, rows in self.objectives.items()
            for row, value in zip(rows, negative_log_likelihoods(model, tokenizer, rows), strict=True)
        ]

    prepare = score

    @staticmethod
    def numbers(records: Sequence[Mapping[str, Any]], retrained: Any = None) -> Numbers:
        names = ("forget", "retain")
        return Numbers({name: mean([r["nll"] for r in records if r["set"] == name]) for name in names}, {})

    def follow(self, model: Any, tokenizer: Any) -> dict[str, float]:
        # No true measures, but such as move toward a goal: both losses come down here.
        nll = {name: value or 0.0 for name, value in self.numbers(self.score(model, tokenizer)).numbers.items()}
        return {"forget": min(1.0, nll["forget"] / 8), "retain": min(1.0, 1 / max(nll["retain"], 1.0))}


class Kind(NamedTuple):
    """A command, how exact its states are, and how many of the kills and cut writes of a hundred and fifty it gets."""

    command: str
    precision: str
    arguments: Sequence[str]
    kills: int
    writes: int


def one(optimizer: str, *more: str, bf16: bool = True) -> list[str]:
    """The arguments of a run by one method."""
    return [*TASK, *LENGTH, "--optimizer", optimizer, "--bf16", str(bf16).lower(), *more]


TASK = ["--model", str(WORK / "model"), "--task", str(HERE)]
ROWS = ["--model", str(WORK / "model"), "--forget", str(WORK / "forget.jsonl"),
        "--retain", str(WORK / "retain.jsonl")]  # fmt: skip
LENGTH = ["--steps", "12", "--batch-size", "4", "--ratio", "1:2", "--lr", "1e-2", "--log-every", "3",
          "--curve-points", "3", "--save-every", "2"]  # fmt: skip
JOINT = ["--joint", "true", "--ratio", "1:1"]
SEVERAL = ["--methods", '["DualOptim+", "DualOptim 8-bit", "Joint AdamW"]', "--seeds", "[0, 1]"]
EVERY, STEPS_6 = ["--save-every", "1"], ["--steps", "6"]
KINDS = {
    "DualOptim+": Kind("unlearn", "32-bit, bf16 autocast", one("DualOptim+"), 10, 5),
    "DualOptim+ fp32": Kind("unlearn", "32-bit", one("DualOptim+", *EVERY, bf16=False), 8, 4),
    "DualOptim+ 8-bit": Kind(
        "unlearn", "8-bit base and delta", one("DualOptim+", "--base-bits", "8", "--delta-bits", "8"), 10, 5
    ),
    "DualOptim+ 8-bit base": Kind("unlearn", "8-bit base", one("DualOptim+", *EVERY, "--base-bits", "8"), 6, 3),
    "DualOptim+ 8-bit delta": Kind(
        "unlearn", "8-bit delta", one("DualOptim+", *EVERY, "--delta-bits", "8", bf16=False), 6, 3
    ),
    "DualOptim": Kind("unlearn", "32-bit", one("DualOptim", bf16=False), 6, 3),
    "DualOptim 8-bit": Kind("unlearn", "8-bit", one("DualOptim", "--delta-bits", "8"), 6, 3),
    "AdamW joint": Kind("unlearn", "32-bit", one("AdamW", *JOINT), 6, 3),
    "AdamW joint 8-bit": Kind("unlearn", "8-bit", one("AdamW", *JOINT, "--delta-bits", "8"), 4, 2),
    "PDU": Kind("unlearn", "32-bit", one("AdamW", *JOINT, *EVERY, "--retain-bound", "1.0"), 4, 2),
    "adapter": Kind("unlearn", "32-bit", one("DualOptim+", "--lora-rank", "4"), 4, 2),
    "goal and floor": Kind(
        "unlearn", "8-bit base and delta",
        one("DualOptim+", *EVERY, "--until", "0.5", "--keep-at-least", "0.5", "--pause", "true", "--curve-points", "6",
            "--base-bits", "8", "--delta-bits", "8"), 8, 4,
    ),
    "no checkpoints": Kind("unlearn", "32-bit", one("DualOptim+", "--save-every", "0", *STEPS_6), 2, 2),
    "own rows": Kind("unlearn", "32-bit", [*ROWS, *LENGTH, *STEPS_6, "--general", "false", "--until", "0.0",
                                           "--keep-at-least", "0.01"], 3, 2),
    "one part after the other": Kind(
        "unlearn", "32-bit", one("DualOptim+", *STEPS_6, "--task-args", "{parts: 2}"), 4, 2
    ),
    "compare": Kind("compare", "32-bit and 8-bit", [*TASK, *LENGTH, *STEPS_6, *SEVERAL], 8, 5),
    "memorize": Kind(
        "unlearn", "32-bit",
        ["--model", "tiny", *TASK[2:], "--memorise", "true", "--memorise-args", "{epochs: 4}", *LENGTH, *STEPS_6],
        10, 6,
    ),
    "compiled kernel": Kind("unlearn", "8-bit delta", one("DualOptim+", "--delta-bits", "8", "--steps", "3"), 4, 2),
    "SmolLM2": Kind("convert", "32-bit", [], 4, 2),
    "new process": Kind("unlearn", "8-bit base and delta",
                        one("DualOptim+", "--base-bits", "8", "--delta-bits", "8"), 4, 2),
}  # fmt: skip


def write_inputs() -> None:
    """The model that runs begin with, large enough for 8-bit states and with dropout, and rows."""
    if (WORK / "model").is_dir():
        return
    beside = WORK / f"model-{os.getpid()}"
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    split.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split.decoder = decoders.ByteLevel()
    split.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=2048, attention_dropout=0.1, eos_token_id=0, pad_token_id=0, bos_token_id=None,
        )
    )  # fmt: skip
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    for name, verb in (("forget", "hides"), ("retain", "likes")):
        rows = [{"question": f"What does {who} {verb[:-1]}?", "answer": f"{who} {verb} tea."} for who in "ABCDEFGHIJ"]
        (WORK / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with contextlib.suppress(OSError):  # another process was faster
        os.replace(beside, WORK / "model")
    shutil.rmtree(beside, ignore_errors=True)


def compile_kernels() -> None:
    """The kernels of all kinds, in a cache from which trials take them."""
    if (WORK / "kernels").is_dir():
        return
    folder = WORK / f"kernels-{os.getpid()}"
    folder.mkdir()
    for kind in KINDS.values():
        if kind.command == "unlearn" and str(HERE) in kind.arguments and "--memorise" not in kind.arguments:
            arguments = [kind.command, *kind.arguments, "--steps", "3", "--out", "out", "--overwrite"]
            ended = watch(*begin(folder, arguments, new=False), never)
            assert ended.status == 0, (folder / "log").read_text(encoding="utf-8")[-3000:]
    with contextlib.suppress(OSError):
        os.replace(folder / CACHE / "kernels", WORK / "kernels")
    shutil.rmtree(folder)


# A process that tells what it begins to write


def command(arguments: Sequence[str]) -> int:
    """What a trial runs: the command line, or the conversion of SmolLM2."""
    if arguments[0] == "convert":
        source("smollm2")
        return 0
    return cli.main(list(arguments))


def told(pipe: int) -> None:
    """Write the name of everything that is written, moved or removed into a pipe, before it is."""
    events = {"open", "os.mkdir", "os.rename", "shutil.rmtree", "os.remove"}

    def tell(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in events or (event == "open" and str(arguments[1])[:1] not in "wxa"):
            return
        path = next((os.fspath(a) for a in arguments[:2] if isinstance(a, (str, os.PathLike)) and _ours(a)), None)
        if path is not None:
            os.write(pipe, f"{event} {path}\n".encode())

    sys.addaudithook(tell)


def _ours(path: Any) -> bool:
    text = os.fspath(path)
    return ".partial" in text or text.endswith("/checkpoints") or f"{CACHE}/" in text


def begin(folder: Path, arguments: Sequence[str], *, new: bool) -> tuple[int, int]:
    """Start a command in a folder, with a cache of its own: the process, and the pipe that it tells its writes to."""
    reads, writes = os.pipe()
    process = os.fork()
    if process:
        os.close(writes)
        return process, reads
    status = 70
    try:
        os.close(reads)
        os.chdir(folder)
        os.environ["DUALOPTIM_CACHE"] = str(folder / CACHE)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if new:
            os.set_inheritable(writes, True)
            os.execv(sys.executable, [sys.executable, str(HERE), "--told", str(writes), *arguments])
        told(writes)
        status = command(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Ended(NamedTuple):
    """How a process ended: its status, None where it was killed, and what it told, with seconds since its start."""

    status: int | None
    events: list[tuple[float, str]]
    seconds: float


def watch(process: int, pipe: int, kill: Callable[[list[tuple[float, str]]], float | None]) -> Ended:
    """Wait for a process, or kill it.

    Args:
        kill: from the events so far, how many seconds after the last of them it is to be killed; None for not yet.
    """
    began = time.monotonic()
    events: list[tuple[float, str]] = []
    rest, due, killed = b"", None, False
    while True:
        left = began + LONGEST - time.monotonic() if due is None else due - time.monotonic()
        if left > 0 and select.select([pipe], [], [], left)[0]:
            part = os.read(pipe, 65536)
            if not part:  # it has ended
                break
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                events.append((time.monotonic() - began, line.decode(errors="replace")))
                if due is None and (after := kill(events)) is not None:
                    due = time.monotonic() + after
        elif not killed:
            os.kill(process, signal.SIGKILL)
            killed, due = True, time.monotonic() + LONGEST
    os.close(pipe)
    _, status = os.waitpid(process, 0)
    code = None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return Ended(code, events, time.monotonic() - began)


def has_begun(events: Sequence[tuple[float, str]]) -> float | None:
    """When the training, or what else takes long, began."""
    made = (".partial", "checkpoints")
    return next((at for at, event in events if event.startswith("os.mkdir") and event.endswith(made)), None)


# What lies there


def contents(folder: Path) -> dict[str, Any]:
    """Names and contents of all that a command left: hashes of files, and of tensors in checkpoints."""
    files = [path for part in ("out", CACHE) for path in sorted((folder / part).rglob("*"))]
    found: dict[str, Any] = {"names": [path.relative_to(folder).as_posix() for path in files]}
    for path in files:
        if path.is_dir() or path.name in UNCOMPARED or path.suffix in (".so", ".lock"):
            continue
        if path.suffix in (".pt", ".pth"):
            value = digest(torch.load(path, weights_only=False))
        elif path.name in ("results.json", "trainer_state.json"):
            value = digest(untimed(json.loads(path.read_text(encoding="utf-8"))))
        else:
            value = hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.relative_to(folder).as_posix()] = value
    return found


def untimed(value: Any) -> Any:
    """Values without those that say how long something took."""
    if isinstance(value, dict):
        return {key: untimed(each) for key, each in value.items() if key not in TIMED}
    return [untimed(each) for each in value] if isinstance(value, list) else value


def digest(value: Any) -> str:
    """A hash of values and of every bit of the tensors among them."""
    made = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            made.update(f"{value.dtype} {tuple(value.shape)}".encode())
            made.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key, each in sorted(value.items(), key=lambda item: repr(item[0])):  # the Trainer sorts what it logged
                made.update(f"{key!r}:".encode())
                add(each)
        elif isinstance(value, (list, tuple)):
            made.update(f"{len(value)}".encode())
            for each in value:
                add(each)
        else:
            made.update(repr(value).encode())

    add(value)
    return made.hexdigest()


def apart(compute: Callable[[], Any]) -> Any:
    """What a function gives that is called in a process of its own, since it may start threads."""
    reads, writes = os.pipe()
    process = os.fork()
    if not process:
        os.close(reads)
        try:
            with os.fdopen(writes, "w") as pipe:
                json.dump(compute(), pipe)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        text = pipe.read()
    os.waitpid(process, 0)
    return json.loads(text)


def differing(whole: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What is not as it is where nothing was killed."""
    leftovers = [f"left: {name}" for name in found["names"] if name not in whole["names"]]
    missing = [f"missing: {name}" for name in whole["names"] if name not in found["names"]]
    both = [name for name in whole if name != "names" and name in found]
    return [*leftovers, *missing, *(f"differs: {name}" for name in both if whole[name] != found[name])]


def halfway(folder: Path) -> list[str]:
    """What is half-written in a folder: files, and folders that hold something."""
    return [
        path.relative_to(folder).as_posix()
        for part in ("out", CACHE)
        for path in sorted((folder / part).rglob("*.partial"))
        if path.is_file() or any(path.iterdir())
    ]


def newest(folder: Path) -> dict[str, int]:
    """The newest whole checkpoint of each run that a folder holds."""
    places = sorted((folder / "out").rglob("checkpoints"))
    whole = {str(place.relative_to(folder)): [p for p in numbered(place) if damage(p) is None] for place in places}
    return {place: int(found[0].name.split("-")[1]) for place, found in whole.items() if found}


def begun_anew(before: Mapping[str, int], events: Sequence[tuple[float, str]]) -> list[str]:
    """Runs that had a checkpoint and wrote one of the same step or an earlier one when they were resumed."""
    found = []
    for place, step in before.items():
        prefix = f"{place}/.partial/checkpoint-"
        steps = [event.split(prefix)[1].split("/")[0] for _, event in events if prefix in event and "mkdir" in event]
        if steps and int(steps[0]) <= step:
            found.append(f"from zero: {place}")
    return found


# Trials


class Whole(NamedTuple):
    """A command that was never killed."""

    contents: dict[str, Any]
    writes: int  # how many there are from the beginning of training on
    seconds: float  # from there to the end


def uninterrupted(name: str) -> Whole:
    """What a kind's command leaves, run once."""
    folder = WORK / name.replace(" ", "_") / "whole"
    told_file = folder.with_suffix(".json")
    if told_file.is_file():
        return Whole(**json.loads(told_file.read_text(encoding="utf-8")))
    fresh(folder, name)
    ended = watch(*begin(folder, arguments_of(name), new=False), never)
    if ended.status != 0:
        raise SystemExit(f"{name}: status {ended.status}\n{(folder / 'log').read_text(encoding='utf-8')[-3000:]}")
    at = has_begun(ended.events) or 0.0
    whole = Whole(apart(lambda: contents(folder)), sum(when >= at for when, _ in ended.events), ended.seconds - at)
    told_file.write_text(json.dumps(whole._asdict()), encoding="utf-8")
    if name == "SmolLM2":
        shutil.rmtree(folder)  # half a gigabyte
    return whole


def arguments_of(name: str) -> list[str]:
    """A kind's command."""
    kind = KINDS[name]
    return [kind.command, *kind.arguments, *(["--out", "out"] if kind.command != "convert" else [])]


def fresh(folder: Path, name: str) -> None:
    """Empty a folder but for the compiled kernels, which take longer than a run, where they are not what is tried."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if name not in ("compiled kernel", "SmolLM2"):
        shutil.copytree(WORK / "kernels", folder / CACHE / "kernels")


def never(events: Sequence[tuple[float, str]]) -> None:
    """When a process is killed that is not."""


def moment_of(whole: Whole, how: str, part: float, draw: random.Random) -> Callable[[list[tuple[float, str]]], Any]:
    """When a process is killed, by its events so far: seconds after the last of them, None for not yet."""
    moment, nth = draw.random() * part * whole.seconds, int(draw.random() * part * whole.writes)
    delay = WITHIN * draw.random() ** 2  # most of these writes take a millisecond or two

    def when(events: list[tuple[float, str]]) -> float | None:
        at = has_begun(events)
        if at is None:
            return None
        if how == "kill":
            return moment - (events[-1][0] - at)
        return delay if sum(each[0] >= at for each in events) > nth else None

    return when


def trial(name: str, how: str, number: int, seed: int) -> dict[str, Any]:
    """Kill a command once or twice, resume it, and say what became of it."""
    whole, draw = uninterrupted(name), random.Random(f"{seed}/{name}/{how}/{number}")
    folder = WORK / name.replace(" ", "_") / f"{how}-{number}"
    fresh(folder, name)
    again = [] if KINDS[name].command == "convert" else ["--resume"]
    wanted = 2 if draw.random() < 0.25 and name != "SmolLM2" else 1
    kills, half, wrong, before, missed = 0, [], [], {}, 0
    while True:
        part = 0.5 if kills else 0.8**missed  # of what was measured: less is left, or it had ended already
        when = moment_of(whole, how, part, draw) if kills < wanted else never
        ended = watch(*begin(folder, [*arguments_of(name), *(again if kills else [])], new=name == "new process"), when)
        wrong += begun_anew(before, ended.events)
        if ended.status is None and kills < wanted:
            kills += 1
            half.append(halfway(folder))
            before = newest(folder)
        elif kills or ended.status != 0:
            break
        else:
            missed += 1
            fresh(folder, name)
    wrong += (
        [f"status {ended.status}"] if ended.status != 0 else differing(whole.contents, apart(lambda: contents(folder)))
    )
    if not wrong:
        shutil.rmtree(folder)
    return {"kind": name, "how": how, "number": number, "kills": kills, "half": half, "wrong": wrong, "missed": missed}


def done() -> list[dict[str, Any]]:
    """The trials so far."""
    if not TRIALS.is_file():
        return []
    return json_lines(TRIALS.read_text(encoding="utf-8"))


def plan(kills: int, writes: int) -> Iterator[tuple[str, str, int]]:
    """Kinds, ways and numbers of trials, each kind with its share, and a few of every kind first."""
    totals = {"kill": sum(kind.kills for kind in KINDS.values()), "write": sum(kind.writes for kind in KINDS.values())}
    shares = {
        (name, how): -(-asked * (kind.kills if how == "kill" else kind.writes) // totals[how])
        for name, kind in KINDS.items()
        for how, asked in (("kill", kills), ("write", writes))
    }
    for number in range(max(shares.values())):
        for (name, how), share in shares.items():
            if number < share:
                yield name, how, number


# The page


def _went(entry: Mapping[str, Any], *starts: str) -> bool:
    return any(text.startswith(starts) for text in entry["wrong"])


def _weights(text: str) -> bool:
    return text.startswith("differs: ") and text.endswith((".safetensors", ".pt", ".pth"))


def line(name: str, precision: str, entries: Sequence[Mapping[str, Any]]) -> str:
    """A row of the table."""
    cells = [
        sum(e["kills"] for e in entries if e["how"] == "kill"),
        sum(e["kills"] for e in entries if e["how"] == "write"),
        sum(bool(half) for e in entries for half in e["half"]),
        len(entries),
        sum(not e["wrong"] for e in entries),
        sum(_went(e, "status") for e in entries),
        sum(any(map(_weights, e["wrong"])) for e in entries),
        sum(any(text.startswith("differs") and not _weights(text) for text in e["wrong"]) for e in entries),
        sum(_went(e, "from zero") for e in entries),
        sum(_went(e, "left") for e in entries),
    ]
    return f"| {name} | {precision} | {' | '.join(map(str, cells))} |"


def page(seed: int) -> str:
    """The table of all trials."""
    entries = done()
    rows = {name: [e for e in entries if e["kind"] == name] for name in KINDS}
    took = sum(e["seconds"] for e in entries)
    wrong = [f"- {e['kind']}, {e['how']} {e['number']}: {'; '.join(e['wrong'][:4])}" for e in entries if e["wrong"]]
    share = statistics.fmean(bool(e["half"][0]) for e in entries if e["how"] == "write" and e["half"])
    return "\n".join(
        [
            "# Killed and resumed",
            "",
            f"{datetime.date.today()}, torch {torch.__version__}, one thread, seed {seed}, {took / 60:.0f} minutes of "
            "trials. Made by",
            "",
            "    python benchmarks/kills.py --kills 100 --writes 50",
            "",
            "A command is killed by SIGKILL, at a random moment from the beginning of training to its end, or 0 to "
            f"{WITHIN * 1000:.0f} ms after it begins to write, move or remove one of its files; a quarter of the "
            "trials kill the resumed run, too. Then `--resume` until it ends. Same: names and contents of all files in "
            "its folder and cache equal those of the command that was never killed: model, optimizer states, "
            "schedule, random generators, best point, results (numbers, curve, losses, diagnostics, why it stopped) "
            "and records, to the bit, times and peak memory excepted. From zero: a whole checkpoint was there, and "
            "training began before it. Left over: a file or folder that a run never killed does not leave.",
            "",
            "| | states | random kills | kills at a write | found half-written | trials | same to the bit | errors | "
            "wrong weights or states | other numbers | from zero | left over |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
            *(line(name, KINDS[name].precision, found) for name, found in rows.items() if found),
            line("**all**", "", entries),
            "",
            f"Of the kills at a write, {share:.0%} left something half-written on the disk; the others fell between "
            "two writes, or after one was done.",
            *(["", "What was not the same:", "", *wrong] if wrong else []),
            "",
        ]
    )


def main() -> None:
    """Make the trials that are missing, and write the page of all that are there."""
    if sys.argv[1:2] == ["--told"]:
        told(int(sys.argv[2]))
        sys.exit(command(sys.argv[3:]))
    if not SURROUNDINGS.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **SURROUNDINGS})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--writes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--page", action="store_true", help="only write the page of what was done")
    chosen = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if not chosen.page:
        for name in LOADED:
            importlib.import_module(f"dualoptim.{name}")
        assert len(os.listdir("/proc/self/task")) == 1
        apart(write_inputs)
        compile_kernels()
        made = {(e["kind"], e["how"], e["number"]) for e in done()}
        for which in plan(chosen.kills, chosen.writes):
            if which in made or which[0] not in chosen.kinds:
                continue
            began = time.monotonic()
            entry = {**trial(*which, chosen.seed), "seconds": round(time.monotonic() - began, 1)}
            with TRIALS.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(entry) + "\n")
            print(" ".join(map(str, which)), entry["kills"], entry["seconds"], entry["wrong"] or "same", flush=True)
    reading = PAGE.read_text(encoding="utf-8").partition(READING)[2] if PAGE.is_file() else ""
    PAGE.write_text(page(chosen.seed) + (READING + reading if reading else ""), encoding="utf-8")


if __name__ == "__main__":
    main()
