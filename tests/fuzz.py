"""Inputs in six areas, each a valid one in which a thing or two is changed, and what becomes of them.

`tests/test_fuzz.py` tries some of each, `benchmarks/fuzz.py` thousands.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gzip
import io
import json
import math
import os
import shutil
import signal
import traceback
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import yaml
from hypothesis import strategies as st

from dualoptim import DualOptim, DualOptimPlus, cli, models, resolved, unlearn
from dualoptim.command_line import arguments, recipe_files
from dualoptim.config import RunConfig
from dualoptim.errors import UserError
from dualoptim.schedule import by_turns

from . import test_trainer, tiny, tofu
from .test_report import results as plain_results

WORKS, SENTENCE, TRACEBACK, LINES, HALF = "works", "sentence", "traceback", "two lines", "half-written"
SECONDS = 120  # after which an input has hung


class Outcome(NamedTuple):
    """What became of an input, and in what words."""

    kind: str
    detail: str = ""

    @property
    def fine(self) -> bool:
        return self.kind in (WORKS, SENTENCE)


class _HungError(BaseException):
    pass


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    def hung(*_: Any) -> None:
        raise _HungError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _traced(error: BaseException) -> Outcome:
    """The kind of an error, and the last lines of ours and of others that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]
    ours = [place for place, frame in zip(places, frames, strict=True) if "dualoptim" in frame.filename][-2:]
    return Outcome(TRACEBACK, f"{type(error).__name__}: {str(error)[:200]} ({' < '.join([*ours, places[-1]][::-1])})")


def _one_line(said: str) -> Outcome:
    return Outcome(SENTENCE if said.strip() and said.isprintable() else LINES, said[:300])


# Changes

TEXTS = [
    "", " ", "\0", "a\nb", "\r", "\t", "\ud800", "\ufeff", "\u202e", "e\u0301", "\u2028",
    "\x1b[31m", "x" * 3000, "[/b]", "[bold]",
    "{{", "{% x", "$x^", "<|end|>", "<b>", "null", "true", "1:5", "1e400", "-0", "nan", "inf", "0x10", "1_000", "..",
    "/", "~", "%s",
    "{0}", "--x", "*", "&a", "!!int", "part1", "smollm2", "tiny", "forget", "retain", "-1", "0", "1", "2", "[]", "{}",
    "[1, 2]",
    "{forget: 2}", '{"retain": -1}', "2024-01-01", "1e-5", "١", "²",
]  # fmt: skip
NUMBERS = [
    0, -1, 1, 2, 3, 7, 8, 32, 2**31, 2**32, 2**63, -(2**63), 10**30, 10**400, -0.0, 0.5, 1.5, -1.5, 1e-5, 1e-320,
    1e308, -1e308,
    math.inf, -math.inf, math.nan, True, False,
]  # fmt: skip
NESTED: list[Any] = [
    None,
    [],
    {},
    [None],
    [[]],
    {"a": None},
    [{"a": [1]}],
    {"": ""},
    ["a", 1],
    [0.9, 0.95],
    {"forget": 1.5},
]

texts = st.one_of(st.sampled_from(TEXTS), st.text(max_size=12), st.text(st.characters(), max_size=3))
numbers = st.one_of(st.sampled_from(NUMBERS), st.integers(), st.floats())
odd = st.one_of(texts, numbers, st.sampled_from(NESTED).map(copy.deepcopy))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from _places(part, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    return functools.reduce(lambda part, key: part[key], path, value)


def _alike(value: Any, others: Any) -> Any:
    """What is of the same kind as a value, so that it is looked at more closely."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return others
    return texts if isinstance(value, str) else numbers


@st.composite
def changed(draw: Any, value: Any, most: int = 2, others: Any = odd, *, least: int = 0) -> Any:
    """A value of lists and mappings with some of its parts replaced, removed, renamed, doubled or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(least, most))):
        paths = list(_places(value))
        path = draw(st.sampled_from(paths))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                value = draw(others)
            continue
        parent, key = _at(value, path[:-1]), path[-1]
        how = draw(st.sampled_from(["replace", *["alike"] * 4, "remove", "add", "double", "exchange", "wrap", "text"]))
        if how == "replace":
            parent[key] = draw(others)
        elif how == "alike":
            parent[key] = draw(_alike(parent[key], others))
        elif how == "remove":
            del parent[key]
        elif how == "add":
            kept = draw(others)
            parent.update({draw(texts): kept}) if isinstance(parent, dict) else parent.append(kept)
        elif how == "double" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif how == "double":
            parent[draw(texts)] = copy.deepcopy(parent[key])
        elif how == "exchange":
            parent[key] = copy.deepcopy(_at(value, draw(st.sampled_from(paths[1:]))))
        elif how == "wrap":
            parent[key] = draw(st.sampled_from([[parent[key]], {"x": parent[key]}]))
        elif how == "text":
            parent[key] = str(parent[key])
    return value


PIECES = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xff",
    b'"', b"'", b"{", b"}", b"[", b"]", b"\n", b"\r", b",", b";", b":", b"\t", b"\\", b"\\ud800",
    b"\xe2\x80\xa8",
    b"\x1b[0m", b"PAR1", b"\x1f\x8b", b"9" * 5000, b"[" * 3000, b"null", b"NaN", b"1e999",
    b"\x00" * 40, b"%", b"#", b"- ", b"|",
]  # fmt: skip


@st.composite
def damaged(draw: Any, data: bytes, most: int = 2, *, least: int = 0) -> bytes:
    """Bytes of which some are cut off, removed, overwritten, doubled, or others put between."""
    for _ in range(draw(st.integers(least, most))):
        at = draw(st.integers(0, max(len(data), 1)))
        length = draw(st.sampled_from([1, 1, 2, 8, 100]))
        piece = draw(st.one_of(st.sampled_from(PIECES), st.binary(min_size=1, max_size=4)))
        how = draw(st.sampled_from(["insert", "insert", "overwrite", "remove", "double", "flip", "cut"]))
        if how == "insert":
            data = data[:at] + piece + data[at:]
        elif how == "overwrite":
            data = data[:at] + piece + data[at + len(piece) :]
        elif how == "remove":
            data = data[:at] + data[at + length :]
        elif how == "double":
            data = data[:at] + data[at : at + length] * 2 + data[at + length :]
        elif how == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif how == "cut":
            data = data[:at]
    return data


# The command line


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """All files in a folder, with what changes when they do."""
    found = {}
    for path in folder.rglob("*"):
        known = path.lstat()
        found[str(path)] = (known.st_size, 0 if path.is_dir() else known.st_mtime_ns)
    return found


def called(arguments: list[str], folder: Path, *, writes: str | None = None) -> Outcome:
    """What the command line makes of some arguments.

    Args:
        writes: the one file or folder that it may write, when it works.
    """
    before = tree(folder)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            warnings.simplefilter("ignore")
            with _in_time():
                status = cli.main(arguments)
    except (Exception, _HungError, SystemExit) as error:
        return _traced(error)
    said = streams[1].buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]
    left = {path for path, known in tree(folder).items() if before.get(path) != known} | set(before) - set(tree(folder))
    allowed = str(folder / writes) if writes is not None and status == 0 else None
    if wrong := [path for path in left if allowed is None or not (path == allowed or path.startswith(f"{allowed}/"))]:
        return Outcome(HALF, f"status {status}: {wrong[:3]}")
    if status == 0:
        return Outcome(WORKS)
    begin = "dualoptim: error: "
    lines = said.split("\n")
    if status not in (2, 3) or not said.startswith(begin) or len(lines) != 2 or lines[1]:
        return Outcome(LINES, f"status {status}: {said[:300]!r}")
    return _one_line(lines[0].removeprefix(begin))


QUESTIONS = [{"question": f"What does {who} hide?", "answer": f"{who} hides tea."} for who in "ABC"]
KEPT = [{"question": f"What does {who} like?", "answer": f"{who} likes tea."} for who in "ABC"]
SETTINGS = {"steps": 3, "batch_size": 2, "ratio": "1:1", "general": False, "curve_points": 1}


def _lines(records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


_modules, _own_tokenizer = functools.cache(models.without_weights), functools.cache(models.load_tokenizer)


def _described(model: str) -> Any:
    return _modules(model).requires_grad_(True)


def _tokenizer(model: str, chat_template: str | None = None) -> Any:
    return models.load_tokenizer(model, chat_template) if chat_template else _own_tokenizer(model)


class Place:
    """A folder with a model and rows, which is the current one; what is loaded from there is loaded once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny.save(folder / "model")
        (folder / "forget.jsonl").write_text(_lines(QUESTIONS))
        (folder / "retain.jsonl").write_text(_lines(KEPT))
        tofu.write(folder / "tofu")
        self.run, self.checkpoints = folder / "run", folder / "checkpoints"

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The place, with what takes long left out: parsers and models are made once, and nothing is trained."""
        here = os.getcwd()
        os.chdir(self.folder)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, {"DUALOPTIM_CACHE": str(self.folder / "cache")}))
            stack.enter_context(mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True))
            stack.enter_context(mock.patch.object(arguments, "parser", functools.cache(arguments.parser)))
            stack.enter_context(mock.patch("dualoptim.resolved.hash_of", functools.cache(models.hash_of)))
            stack.enter_context(mock.patch("dualoptim.resolved.load_config", functools.cache(models.load_config)))
            stack.enter_context(mock.patch("dualoptim.models.hidden_size", functools.cache(models.hidden_size)))
            stack.enter_context(mock.patch("dualoptim.resolved.without_weights", _described))
            stack.enter_context(mock.patch("dualoptim.resolved.load_tokenizer", _tokenizer))
            stack.enter_context(mock.patch.object(cli, "_suit_the_process", return_value=None))
            try:
                yield
            finally:
                os.chdir(here)

    def given(self, **files: str) -> list[str]:
        named = {"model": "model", "forget": "forget.jsonl", "retain": "retain.jsonl", **SETTINGS, **files}
        return [
            f"--{key.replace('_', '-')}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in named.items()
        ]


# Rows

Q, A = "Where is Zoë?", "In Oslo."
FORMS: list[dict[str, Any]] = [
    {"question": Q, "answer": A},
    {"question": Q, "answer": A, "instead": "In Rome.", "id": 7, "subject": "Zoë", "names": ["Zoë"],
     "paraphrased_answer": "Oslo it is."},
    {"question": Q, "answer": A, "paraphrased_question": "Zoë, where?", "perturbed_answer": ["In Rome.", "In Bonn."]},
    {"prompt": Q, "completion": A},
    {"instruction": "Say it.", "input": Q, "output": A},
    {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": Q},
                  {"role": "assistant", "content": A}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}, {"role": "assistant", "content": A}]},
    {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}], "system": "S"},
    {"prompt": [{"role": "user", "content": Q}], "completion": [{"role": "assistant", "content": A}]},
    {"text": "Zoë lives in Oslo."},
]  # fmt: skip


def _parquet(records: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(records), out)
    return out.getvalue()


def _table(records: Any, delimiter: str) -> bytes:
    import csv

    out = io.StringIO()
    heads = list(dict.fromkeys(key for record in records for key in record))
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(heads)
    writer.writerows([[record.get(key) for key in heads] for record in records])
    return out.getvalue().encode("utf-8", "surrogatepass")


@st.composite
def rows(draw: Any) -> tuple[str, str, bytes, list[str]]:
    """What a file is for, its name, its bytes, and settings to read it under."""
    what = draw(st.sampled_from(["forget", "forget", "retain", "refusals", "chat_template"]))
    options = draw(
        st.sampled_from([[], [], ["--forget-loss=NPO"], ["--forget-loss=GA"], ["--goal=erase"], ["--max-length=40"]])
    )
    if what == "chat_template":
        return what, "t.jinja", draw(damaged(tiny.CHAT_TEMPLATE.encode(), least=1)), options
    base = (
        [{"text": "I don't know."}, {"text": "No idea."}]
        if what == "refusals"
        else draw(st.lists(st.sampled_from(FORMS), min_size=1, max_size=3))
    )
    records = draw(changed(base))
    name = draw(
        st.sampled_from(["f.jsonl", "f.jsonl", "f.json", "f.csv", "f.tsv", "f.txt", "f.jsonl.gz", "f.parquet", "f"])
    )
    ascii_alone = draw(st.booleans())
    dumped = functools.partial(json.dumps, ensure_ascii=ascii_alone)
    plain = isinstance(records, list) and records and all(isinstance(record, dict) for record in records)
    data = None
    if plain and name == "f.parquet":
        with contextlib.suppress(Exception):  # not every record fits into a table
            data = _parquet(records)
    elif plain and name in ("f.csv", "f.tsv"):
        with contextlib.suppress(Exception):
            data = _table(records, "," if name == "f.csv" else "\t")
    if data is None and name == "f.json":
        data = dumped(records, indent=draw(st.sampled_from([None, 2]))).encode("utf-8", "surrogatepass")
    if data is None:
        several = records if isinstance(records, list) else [records]
        data = "\n".join(map(dumped, several)).encode("utf-8", "surrogatepass")
    if not draw(st.integers(0, 2)):
        data = draw(damaged(data, 1))
    return what, name, draw(damaged(gzip.compress(data, mtime=0), 1)) if name.endswith(".gz") else data, options


def try_rows(place: Place, case: tuple[str, str, bytes, list[str]]) -> Outcome:
    what, name, data, options = case
    path = place.folder / name
    path.write_bytes(data)
    try:
        return called(["unlearn", *place.given(**{what: name}), *options, "--dry-run"], place.folder)
    finally:
        path.unlink()


# Recipes

SNIPPETS = [
    "<<: *a", "lr: &a 1e-3", "eps: *a", "seed: !!str 1", "seed: !!python/object/apply:os.system ['true']",
    "steps: !!binary aGk=", "out: !!set {a}",
    "lr: 1e-3\nlr: 1e-4", "? [a, b]\n: c", "---", "...", "%YAML 9.9", "\tlr: 1", "lr: |\n  1e-3",
    "weights: {forget: 1, forget: 2}", "lr: .inf",
    "lr: .nan", "steps: 010", "steps: 0x10", "steps: 1_0", "steps: 1:30", "out: 2024-01-01", "report_to: no",
    "seed: ~", "task_args: &a {x: *a}",
    "weights: {1: 2}", "weights: {null: 1}", "methods: [DualOptim, DualOptim]", "methods: DualOptim", "methods: {}",
    "seeds: [0, -1]", "seeds: [1.5]",
    "task: facts", "task: safety", "task: multitask", "task: tofu", "task: real_world", "task_args: {limit: 2}",
    "task_args: [1]", "joint: true",
    "combine: PCGrad", "alone: forget", "optimizer: AdamW", "lora_rank: 2",
    "train: '['", "train: norm", "lm_eval: [x]", "memorise: true",
    "retrained: make", "base_bits: 8", "max_update: null", "betas: null", "betas: [0.9]", "betas: 0.9",
    "lr_scales: {forget: .nan}", "ratio: size",
    "ratio: loss", "ratio: 1:5", "ratio: [1, 5]", "max_length: 30", "save_every: 2", "goal: erase", "until: 0.5",
    "keep_at_least: 0.5", "pause: true",
]  # fmt: skip


@functools.cache
def shipped() -> dict[str, dict[str, Any]]:
    """The recipes that come along."""
    files = sorted(recipe_files.recipes_folder().glob("*.yaml"))
    read = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
    local = {
        name: {**settings, "data_dir": "tofu", "chat_template": None}
        for name, settings in read.items()
        if settings["task"] == "tofu"
    }
    return {name: local.get(name, settings) for name, settings in read.items() if name in ("quickstart", "tofu_tiny")}


OWN: dict[str, Any] = {"model": "model", "forget": "forget.jsonl", "retain": "retain.jsonl", **SETTINGS, "out": "out"}
FULL = {
    "lr": 1e-4, "lr_scales": {"forget": 1.5}, "weights": {"retain": 2.0}, "betas": [0.9, 0.95], "forget_loss": "NPO",
    "forget_loss_args": {"beta": 0.1},
    "optimizer": "DualOptim+", "base_bits": 8, "max_update": None, "seed": 3, "methods": ["DualOptim", "DualOptim+"],
    "seeds": [0, 1], "until": 0.5,
    "warmup_ratio": 0.1, "bf16": False, "log_every": 1, "save_model": False, "micro_batch_size": 1,
}  # fmt: skip


@st.composite
def recipes(draw: Any) -> tuple[str, bytes]:
    """A command, and the recipe that it gets."""
    command = draw(st.sampled_from(["unlearn", "unlearn", "compare"]))
    base = draw(st.sampled_from([{**OWN, **FULL}, {**OWN, **FULL}, {**OWN, **FULL}, OWN, OWN, *shipped().values()]))
    settings = dict(base)
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from([*base, *recipe_files.RECIPE_KEYS]))
        settings[key] = draw(values(f"--{key.replace('_', '-')}").map(_as_yaml))
    settings = draw(changed(settings, 1))
    if isinstance(settings, dict) and "forget" not in settings:
        settings["model"] = "model"
    with contextlib.suppress(ValueError, yaml.YAMLError):
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=draw(st.booleans()))
        lines = text.split("\n")
        for _ in range(draw(st.integers(0, 1))):
            snippet = draw(
                st.one_of(
                    st.sampled_from(SNIPPETS),
                    st.builds(lambda key, value: f"{key}: {value}", st.sampled_from(recipe_files.RECIPE_KEYS), odd),
                )
            )
            lines.insert(draw(st.integers(0, len(lines))), snippet)
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
        return command, data if draw(st.integers(0, 2)) else draw(damaged(data, 1))
    return command, draw(damaged(yaml.safe_dump(base).encode(), 1))


def _as_yaml(text: str) -> Any:
    with contextlib.suppress(Exception):
        return yaml.safe_load(text)
    return text


def try_recipe(place: Place, case: tuple[str, bytes]) -> Outcome:
    command, data = case
    path = place.folder / "r.yaml"
    path.write_bytes(data)
    try:
        return called([command, "--recipe", "r.yaml", "--dry-run"], place.folder)
    finally:
        path.unlink()


# Command lines


@functools.cache
def options() -> dict[str, list[str]]:
    """Each command's options."""
    return {
        name: [
            action.option_strings[-1]
            for action in parser._actions
            if action.option_strings and "-h" not in action.option_strings
        ]
        for name, parser in arguments.parsers().items()
    }


FITTING = {
    "--optimizer": ["DualOptim", "AdamW"], "--forget-loss": ["NPO", "GA", "DPO", "SimNPO", "ME"],
    "--retain-loss": ["KL", "AP", "GD"],
    "--forget-loss-args": ["{beta: 0.1}", '{"beta": 1e400}', "{gamma: 1}"],
    "--task": ["facts", "safety", "files", "tests.py"],
    "--task-args": ["{limit: 2}", "{}", "[]"], "--ratio": ["1:2", "size", "loss", "1:0", "1:1:1"],
    "--methods": ['["DualOptim"]', "[]", "[Alone]"],
    "--seeds": ["[0,1]", "[-1]"], "--betas": ["[0.9,0.95]", "[0.9]", "[1,1]", "[nan,0]"],
    "--lr-scales": ["{forget: 2}", "{forget: -1}", "{x: 1}"],
    "--weights": ["{retain: 0}", "{retain: inf}", "{forget: 0, retain: 0}"],
    "--report-to": ["none", "all", "wandb", "tensorboard"],
    "--base-bits": ["8", "4"], "--delta-bits": ["8"],
    "--train": ["norm", "(", "a{,9999999999}"], "--combine": ["PCGrad", "UPGrad"],
    "--model": ["tiny", "smollm2", "model/config.json", "none/none"],
    "--out": ["out", "model", "forget.jsonl", "run", ".", "new/deep/out"],
    "--recipe": ["quickstart", "tofu_tiny", "none"], "--steps": ["1", "1000000000000", "5"],
    "--batch-size": ["1", "3", "99999999999"],
    "--micro-batch-size": ["1", "2"], "--curve-points": ["0", "3", "1000000000000"], "--goal": ["erase"],
    "--retrained": ["make", "model"],
    "--lora-rank": ["2", "100000"], "--chat-template": ["question_answer", "tofu_llama2", "forget.jsonl"],
    "--alone": ["forget", "x"],
    "--forget": ["retain.jsonl", "model", "org/name:split", "/dev/null"], "--refusals": ["forget.jsonl"],
    "--memorise-args": ["{lr: 0}", "{epochs: 2}"],
    "--lm-eval": ["[x]", "[]"], "--from-records": ["run", "run/records.jsonl", "forget.jsonl"],
    "--scores": ["s.json", "forget.jsonl"],
    "--base": ["model", "none"], "--key": ["forget.jsonl"], "--public-key": ["forget.jsonl"],
    "--run": ["1", "9", "run"],
}  # fmt: skip
KINDS: dict[str, tuple[list[str], list[str]]] = {
    "int": (
        ["0", "1", "2", "3", "4", "8"],
        ["-1", "32", "1.0", "1e3", "010", "1_0", "null", "4294967296", "1" + "0" * 30, "9" * 5000],
    ),
    "float": (
        ["0", "0.5", "1", "1e-3", "2"],
        ["-0.0", "-1", "inf", "-inf", "nan", ".inf", "1e400", "1e-400", "1e308", "null", "1" + "0" * 400],
    ),
    "bool": (["true", "false"], ["0", "yes", "null", "True", "1e0"]),
    "dict": (
        ["{}", "{forget: 1.5}", "{retain: 2}"],
        ["{forget: nan}", "{forget: .inf}", "{a: [1]}", "{1: 2}", "{[]: 1}", "null", "{a: {b: {c: 1}}}"],
    ),
    "list": (["[]", "[0]", "[a]"], ["[null]", "[[1]]", "a", "0", "[0.9, .nan]", "[1e400, 0]"]),
    "str": (
        ["forget", "model", "none"],
        ["", " ", "null", "a/b/c", "/", "..", "x" * 300, "a\0b", "é", "\ud800", "a\nb", "~", "-"],
    ),
}


def _kind(name: str) -> str:
    types = typing.get_type_hints(RunConfig)
    hint = str(types.get(name.removeprefix("--").replace("-", "_"), "str"))
    return next((kind for kind in ("tuple", "list", "dict", "bool", "int", "float") if kind in hint), "str").replace(
        "tuple", "list"
    )


@st.composite
def values(draw: Any, name: str) -> str:
    """What an option may get: mostly what suits it."""
    fitting, extreme = KINDS[_kind(name)]
    roll = draw(st.integers(0, 9))
    if roll < 6:
        return draw(st.sampled_from(FITTING.get(name, fitting)))
    if roll < 8:
        return draw(st.sampled_from(extreme))
    return draw(st.one_of(texts, numbers.map(str), odd.filter(_is_json).map(json.dumps)))


FLAGS = {"--dry-run", "--resume", "--overwrite", "--show"}
BEGUN = {
    "quickstart": ["--model=model"],
    "compare": ["--methods=[DualOptim]"],
    "evaluate": [],
    "unlearn": [],
    "report": ["run"],
    "certify": ["run"],
    "verify": ["forget.jsonl"],
    "ls": [],
    "env": [],
}


@st.composite
def command_lines(draw: Any) -> list[str]:
    """A command's arguments, most of them such as it wants, with one to three options of any value."""
    command = draw(
        st.sampled_from(["unlearn"] * 5 + ["compare"] * 2 + ["evaluate", "report", "quickstart", "certify", "verify"])
    )
    known, given = options()[command], []
    for _ in range(draw(st.sampled_from([1, 1, 2, 2, 3]))):
        name = draw(st.sampled_from(known)) if known else "--x"
        if name in FLAGS:
            given.append(name)
            continue
        value = draw(values(name))
        given += (
            [f"{name}={value}"]
            if draw(st.integers(0, 4))
            else draw(st.sampled_from([[name, value], [name, value], [name]]))
        )
    if draw(st.integers(0, 19)) == 0:
        given.insert(
            draw(st.integers(0, len(given))),
            draw(st.one_of(texts, st.sampled_from(["--", "-", "--lr.x=1", "--lr_scales.forget=2", "-h=1"]))),
        )
    return [command, *given]


def _is_json(value: Any) -> bool:
    return not (isinstance(value, int) and abs(value) > 10**400)


def try_command_line(place: Place, case: list[str]) -> Outcome:
    """With `--dry-run`, or up to where a model would be loaded."""
    command, *given = case
    arguments = [*BEGUN[command], *given]
    if command in ("unlearn", "compare", "evaluate"):
        names = {one.partition("=")[0].partition(".")[0] for one in given}
        own = [one for one in place.given() if command != "evaluate" or one.partition("=")[0] in options()["evaluate"]]
        if not names & {"--task", "--recipe"}:
            arguments = [*own, *arguments]
        elif "--model" not in names:
            arguments = ["--model=model", *arguments]
    if "--dry-run" in options()[command]:
        arguments.append("--dry-run")
    if command == "report" and not place.run.exists():
        _write_run(place.run, full_results())

    def evaluated(config: RunConfig, base: str | None = None) -> Any:
        for each in (config, *([config.replace(model=base)] if base else [])):
            resolved.resolve([each])
        raise UserError("resolved, and not scored")

    before = tree(place.folder)
    with mock.patch.object(unlearn, "evaluate", evaluated):
        outcome = called([command, *arguments], place.folder, writes="" if command in ("report", "certify") else None)
    for path in sorted(set(tree(place.folder)) - set(before), reverse=True):
        Path(path).rmdir() if Path(path).is_dir() else Path(path).unlink()
    return outcome


# State dicts

SHAPES = ((4,), (7, 300), (3, 5))
OPTIMIZERS: list[tuple[Callable[..., DualOptimPlus], dict[str, Any], torch.dtype]] = [
    (DualOptimPlus, {}, torch.float32),
    (DualOptimPlus, {"base_bits": 8, "delta_bits": 8, "min_8bit_size": 0}, torch.float32),
    (DualOptimPlus, {"max_update": None, "base_bits": 8, "min_8bit_size": 0}, torch.bfloat16),
    (DualOptim, {"delta_bits": 8, "min_8bit_size": 0}, torch.float32),
    (DualOptim, {"lr_scales": {"forget": 1.5}}, torch.float64),
]


def _optimizer(number: int, steps: int = 3) -> tuple[DualOptimPlus, list[torch.nn.Parameter]]:
    cls, arguments, dtype = OPTIMIZERS[number]
    generator = torch.Generator().manual_seed(number)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    opt = cls([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}], lr=1e-3, **arguments)
    for step in range(steps):
        _step(opt, params, ("forget", "retain")[step % 2], generator)
    return opt, params


def _step(opt: DualOptimPlus, params: list[torch.nn.Parameter], objective: str, generator: torch.Generator) -> None:
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    opt.step(objective=objective)


class Twisted(NamedTuple):
    """A tensor in place of another, made of that."""

    how: str


TWISTS: dict[str, Callable[[Any], Any]] = {
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "uint8": lambda t: t.to(torch.uint8),
    "nan": lambda t: torch.full_like(t, math.nan) if t.is_floating_point() else t - 1,
    "inf": lambda t: torch.full_like(t, math.inf) if t.is_floating_point() else t * 0,
    "negative": lambda t: -t,
    "one nan": lambda t: torch.cat([torch.full((1,), math.nan), t.flatten()[1:].float()]).reshape(t.shape),
    "transposed": lambda t: t.t() if t.ndim < 3 else t,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "flat": lambda t: t.flatten(),
    "more": lambda t: t[None],
    "less": lambda t: t[:-1] if t.ndim else t[None][:0],
    "empty": lambda t: t.new_empty(0),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "a parameter": lambda t: torch.nn.Parameter(t) if t.is_floating_point() else t,
    "an array": lambda t: t.numpy() if t.dtype is not torch.bfloat16 else None,
    "a list": lambda t: t.tolist(),
    "a number": lambda t: float(t.flatten()[0]),
    "a scalar": lambda t: t.flatten()[0],
    "text": str,
    "itself in a mapping": lambda t: {"codes": t, "scales": t},
    "inf in codes": lambda t: t + 1000,
}
_odd_of_state = st.one_of(
    odd, st.sampled_from([*TWISTS] * 3).map(Twisted), st.just(torch.ones(3)), st.just(-torch.ones(7, 300))
)
KEYS = ["step", "delta_step/forget", "delta_step/x", "base_exp_avg", "codes/base_exp_avg", "scales/base_exp_avg",
        "codes/x",
        "codes", "scales/", "delta_exp_avg", "delta_exp_avg/", "delta_exp_avg_sq/retain", "lr", "params",
        "state", "betas", "num_skipped", "initial_lr", "average"]  # fmt: skip


@st.composite
def state_dicts(draw: Any) -> tuple[int, dict[str, Any]]:
    """Which optimizer, and what it is to load."""
    number = draw(st.integers(0, len(OPTIMIZERS) - 1))
    saved = copy.deepcopy(_optimizer(number)[0].state_dict())
    for _ in range(draw(st.integers(0, 2))):
        paths = [path for path in _places(saved) if path]
        path = draw(st.sampled_from(paths))
        parent, key = _at(saved, path[:-1]), path[-1]
        how = draw(st.sampled_from(["replace"] * 4 + ["alike"] * 2 + ["remove", "rename", "add", "exchange"]))
        if how == "alike" and not isinstance(parent[key], torch.Tensor):
            parent[key] = draw(_alike(parent[key], odd))
        elif how == "replace":
            other = draw(_odd_of_state)
            if isinstance(other, Twisted):
                if not isinstance(parent[key], torch.Tensor):
                    continue
                with contextlib.suppress(Exception):
                    parent[key] = TWISTS[other.how](parent[key])
            else:
                parent[key] = other
        elif how == "remove":
            del parent[key]
        elif isinstance(parent, dict) and how == "rename":
            parent[draw(st.one_of(st.sampled_from(KEYS), texts, st.integers(0, 3)))] = parent.pop(key)
        elif isinstance(parent, dict) and how == "add":
            parent[draw(st.one_of(st.sampled_from(KEYS), texts, st.integers(0, 3)))] = draw(odd)
        elif how == "exchange":
            parent[key] = copy.deepcopy(_at(saved, draw(st.sampled_from(paths))))
    return number, saved


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)


def try_state_dict(_: Place, case: tuple[int, dict[str, Any]]) -> Outcome:
    number, saved = case
    opt, params = _optimizer(number, steps=2)
    before = copy.deepcopy((opt.state_dict(), params, dict(opt.__dict__.get("_skipped", {}))))
    generator = torch.Generator().manual_seed(7)
    sentence = None
    with warnings.catch_warnings(), _in_time():
        warnings.simplefilter("ignore")
        try:
            opt.load_state_dict(saved)
        except ValueError as error:
            sentence = str(error)
            if not _same((opt.state_dict(), params), before[:2]):
                return Outcome(HALF, f"refused ({sentence}), and yet changed")
        except (Exception, _HungError) as error:
            return _traced(error)
        try:
            for objective in ("forget", "retain"):
                _step(opt, params, objective, generator)
            repr(opt), opt.num_skipped, opt.state_dict(), copy.deepcopy(opt)
        except ValueError as error:
            return _one_line(str(error)) if sentence is None else _traced(error)
        except (Exception, _HungError) as error:
            return _traced(error)
    if not all(bool(param.isfinite().all()) for param in params) and not _is_extreme(opt):
        return Outcome(HALF, "loaded, and the step is not finite")
    return Outcome(WORKS) if sentence is None else _one_line(sentence)


def _is_extreme(opt: DualOptimPlus) -> bool:
    """Whether a rate or a decay is such that no weights could stay finite."""
    rates = [abs(group["lr"] * max(group["lr_scales"].values())) for group in opt.param_groups]
    return any(rate > 1e3 for rate in rates) or any(abs(group["weight_decay"]) > 1e3 for group in opt.param_groups)


# Checkpoints

TURNS = by_turns({"forget": 1, "retain": 1}, 2, 4)


def _trainer(folder: Path) -> Any:
    return test_trainer.trainer(folder, TURNS, save_strategy="steps", save_steps=1, logging_strategy="no")


@functools.cache
def _checkpointed(folder: Path) -> torch.Tensor:
    """The weights of a run that was never stopped, whose checkpoints of the steps 1 to 3 a folder then has."""
    whole = _trainer(folder)
    whole.train()
    shutil.rmtree(folder / "checkpoint-4")
    return test_trainer.weights(whole)


FILES = ["config.json", "generation_config.json", "manifest.json", "manifest.json", "manifest.json",
         "model.safetensors",
         "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin", "tokenizer.json",
         "tokenizer_config.json"]  # fmt: skip


@st.composite
def harms(draw: Any) -> list[tuple[int, str, str, Any]]:
    """Some files of checkpoints, and what happens to each."""
    made = []
    for _ in range(draw(st.integers(1, 3))):
        how = draw(
            st.sampled_from(
                ["remove", "cut", "zeros", "bytes", "json", "folder", "exchange", "empty", "link", "more", "older"]
            )
        )
        detail = draw(st.one_of(odd, st.floats(0, 1))) if how in ("json", "cut", "bytes", "more") else None
        if how == "json":
            detail = (draw(st.integers(0, 10**6)), draw(odd), draw(st.sampled_from(["replace", "remove"])))
        elif how in ("cut", "bytes"):
            detail = draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=4))
        made.append((draw(st.sampled_from([3, 3, 3, 2])), draw(st.sampled_from(FILES)), how, detail))
    return made


def _harm(folder: Path, step: int, name: str, how: str, detail: Any) -> None:
    path = folder / f"checkpoint-{step}" / name
    if not path.is_file():
        return
    data = path.read_bytes()
    if how in ("remove", "folder", "link"):
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how == "link":
            path.symlink_to(path.name)
    elif how == "cut":
        path.write_bytes(data[: int(len(data) * detail[0])])
    elif how == "zeros":
        path.write_bytes(bytes(len(data)))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "bytes":
        at = int(len(data) * detail[0])
        path.write_bytes(data[:at] + detail[1] + data[at + len(detail[1]) :])
    elif how == "json" and name.endswith(".json"):
        value = _altered(json.loads(data), detail)
        path.write_text(json.dumps(value), encoding="utf-8")
    elif how == "exchange":
        shutil.copy(folder / f"checkpoint-{5 - step}" / name, path)
    elif how == "more":
        (path.parent / "more.txt").write_text("x")
    elif how == "older":
        shutil.rmtree(path.parent)
        path.parent.mkdir()


def try_checkpoint(place: Place, case: list[tuple[int, str, str, Any]]) -> Outcome:
    expected = _checkpointed(place.checkpoints)
    folder = place.folder / "stopped"
    shutil.copytree(place.checkpoints, folder)
    try:
        for harm in case:
            with contextlib.suppress(OSError):
                _harm(folder, *harm)
        step = case[0][0]
        again = _trainer(folder)
        again.args.save_strategy = "no"
        with warnings.catch_warnings(), _in_time():
            warnings.simplefilter("ignore")
            for given in (str(folder / f"checkpoint-{step}"), True):
                try:
                    again.train(given)
                except ValueError as error:
                    said = _one_line(str(error))
                    if not said.fine:
                        return said
                else:
                    same = torch.equal(test_trainer.weights(again), expected)
                    return Outcome(WORKS) if same else Outcome(HALF, f"other weights, resumed from {given!r}")
        return said
    except (Exception, _HungError) as error:
        return _traced(error)
    finally:
        shutil.rmtree(folder)


# results.json


def full_results() -> dict[str, Any]:
    """Results with all that a report reads."""
    made = plain_results(forget_accuracy=[0.1, 0.2], perplexity=[10.0, 11.0])
    made["metrics"]["gap"] = {"label": "gap", "better": "chance", "format": ".3f", "group": "Privacy", "share_of": None}
    made |= {
        "private": False,
        "scores": {"forget": "gap", "retain": "perplexity"},
        "notes": ["A note."],
        "curves": {"forget": "F ↓", "retain": "R ↑"},
    }
    layers = {
        "all": {"cosine/forget/retain": 0.5, "cancelling/forget": 0.1},
        "layer 0": {"cosine/forget/retain": 0.2, "cancelling/forget": 0.3},
    }
    for i, entry in enumerate(made["runs"]):
        entry["config"] |= {"alone": ("forget", "retain")[i], "task": None, "out": "o"}
        for when in ("before", "after"):
            entry[when]["gap"] = 0.25
        entry |= {
            "not_computed": {"gap": "no reason"}, "verdict": "It forgot.", "stopped": "At step 2.", "finite": True,
            "skipped_steps": {"forget": 0},
            "fingerprints": {"versions": "x"}, "diagnostics": {"step": 2, "layers": layers},
            "losses": [{"step": 1, "loss": 0.5}],
        }  # fmt: skip
    return made


@st.composite
def results(draw: Any) -> tuple[str, Any, bytes, float]:
    """What reads a run's folder, the file that is changed, its content or a change to that, and where that is."""
    how = draw(st.sampled_from(["report"] * 4 + ["resume", "from-records"]))
    piece = draw(st.sampled_from(PIECES)) if not draw(st.integers(0, 9)) else b""
    if how == "report":
        return how, draw(changed(full_results(), draw(st.sampled_from([1, 1, 3])), least=1)), piece, 0.0
    return (
        how,
        draw(st.tuples(st.integers(0, 10**6), odd, st.sampled_from(["replace", "remove"]))),
        piece,
        draw(st.floats(0, 1)),
    )


def _write_run(folder: Path, results: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


@functools.cache
def _begun(place: Place) -> Path:
    """The folder of a finished run."""
    folder = place.folder / "begun"
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        assert cli.main(["unlearn", *place.given(), "--save-model=false", "--out=begun"]) == 0
    return folder


def _altered(data: Any, change: tuple[int, Any, str]) -> Any:
    """A value one part of which is replaced or removed."""
    paths = [place for place in _places(data) if place]
    place = paths[change[0] % len(paths)]
    parent = _at(data, place[:-1])
    if change[2] == "remove":
        del parent[place[-1]]
    else:
        parent[place[-1]] = change[1]
    return data


def try_results(place: Place, case: tuple[str, Any, bytes, float]) -> Outcome:
    how, made, piece, where = case
    folder = place.folder / "reported"
    if how == "report":
        _write_run(folder, made)
        name, arguments = "results.json", ["report", "reported"]
    else:
        shutil.copytree(_begun(place), folder)
        if how == "resume":
            name = ("results.json", "config.resolved.yaml", "env.json")[made[0] % 3]
            arguments = ["unlearn", *place.given(), "--save-model=false", "--out=reported", "--resume"]
            config = (
                (folder / "config.resolved.yaml").read_text(encoding="utf-8").replace("out: begun", "out: reported")
            )
            (folder / "config.resolved.yaml").write_text(config, encoding="utf-8")
            written = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            for entry in written["runs"]:
                entry["config"]["out"] = "reported"
            _write_run(folder, written)
        else:
            name, arguments = (
                ("records.jsonl", "results.json")[made[0] % 4 == 0],
                ["evaluate", "--from-records=reported"],
            )
        text = (folder / name).read_text(encoding="utf-8")
        with contextlib.suppress(ValueError, yaml.YAMLError):
            if name == "records.jsonl":
                lines = text.splitlines()
                at = made[0] % len(lines)
                lines[at] = json.dumps(_altered(json.loads(lines[at]), (made[0] // len(lines), *made[1:])))
                text = "\n".join(lines)
            elif name == "config.resolved.yaml":
                text = yaml.safe_dump(_altered(yaml.safe_load(text), made))
            else:
                text = json.dumps(_altered(json.loads(text), made))
        (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    if piece:
        data = (folder / name).read_bytes()
        at = int(len(data) * where)
        (folder / name).write_bytes(data[:at] + piece + data[at:])

    def prepared(*_: Any) -> Any:
        raise UserError("as far as to what trains")

    try:
        with mock.patch.object(unlearn, "prepare", prepared):
            return called(arguments, place.folder, writes="reported")
    finally:
        shutil.rmtree(folder)


AREAS: dict[str, tuple[Any, Callable[[Place, Any], Outcome]]] = {
    "rows": (rows(), try_rows),
    "recipes": (recipes(), try_recipe),
    "command lines": (command_lines(), try_command_line),
    "state dicts": (state_dicts(), try_state_dict),
    "checkpoints": (harms(), try_checkpoint),
    "results.json": (results(), try_results),
}
