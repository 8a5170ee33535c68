"""How the command line explains itself: headings, known values, examples, completion, and the recipe of init."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dualoptim import cli, errors, goals
from dualoptim.cache import cache_dir
from dualoptim.command_line import arguments, catalog, recipe_files, usage
from dualoptim.config import ALONE, GROUPS, METHODS, USES, RunConfig
from dualoptim.errors import UserError
from dualoptim.losses import LOSSES
from dualoptim.tasks import kinds
from dualoptim.training import combine

from . import tiny


def test_what_is_read_from_docstrings_is_what_there_is() -> None:
    losses = catalog.losses()
    assert {name: entry.role for name, entry in losses.items()} == {name: cls.role for name, cls in LOSSES.items()}
    for name, entry in losses.items():
        assert entry.formula == " ".join((LOSSES[name].__doc__ or "").split("\n\n")[0].split())
        assert entry.use.startswith("Use it when "), f"{name}: a paragraph of its docstring says when to use it"
    assert catalog.tasks() == {
        name: (sys.modules[cls.__module__].__doc__ or "").splitlines()[0] for name, cls in kinds().items()
    }
    assert set(USES) == {name for name in (*METHODS, ALONE) if not name.endswith("8-bit")}


def test_the_values_that_help_names_are_those_that_there_are() -> None:
    assert set(usage.values("goal")) == set(goals.GOALS)
    assert set(usage.values("combine")) == set(combine.RULES)
    assert set(usage.values("optimizer")) == {method["optimizer"] for method in METHODS.values()}
    assert usage.values("lr") == ()


def test_every_setting_stands_under_its_heading(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["unlearn", "--help"]) == 0
    shown = capsys.readouterr().out
    parts = re.split(r"^(\S[^\n]*):$", shown, flags=re.MULTILINE)
    under = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(under) == ["options", *GROUPS, "example"]
    for field in dataclasses.fields(RunConfig):
        assert re.search(rf"^  --{field.name.replace('_', '-')}\b", under[field.metadata["group"]], re.MULTILINE)
    assert "{refuse,erase}" in under["what to forget and keep"]
    assert ", ".join(name for name, cls in LOSSES.items() if cls.role == "retain") in under["losses"]
    assert "[1e-05]" in under["optimizer"]
    assert "default: null" not in shown


@pytest.mark.parametrize("command", usage.EXAMPLES)
def test_an_example_has_options_that_the_command_has(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("steps: 6\n")
    parsers = arguments.parsers()
    for line in usage.EXAMPLES[command].splitlines():
        program, name, *told = shlex.split(line, comments=True)
        assert (program, name) == ("dualoptim", command)
        assert arguments.parse(parsers[name], told) is not None


def test_help_of_every_command_and_ls_load_no_torch_and_are_there_at_once() -> None:
    code = (
        "import sys, time; began = time.process_time()\n"
        "from dualoptim import cli; from dualoptim.command_line import arguments\n"
        "for command in arguments.COMMANDS: cli.main([command, '--help'])\n"
        "cli.main(['ls'])\n"
        "print({'torch', 'transformers'} & set(sys.modules), time.process_time() - began, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, seconds = done.stderr.rsplit(maxsplit=1)
    assert loaded == "set()"
    assert float(seconds) < 4, "eleven commands' help and the list, each far below a second"
    for word in (*LOSSES, *METHODS, *kinds(), "Use it when", "quickstart"):
        assert word in done.stdout


def test_completion_knows_commands_options_and_values(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as without:
        without.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"needs the package shtab; pip install 'dualoptim\[completion\]'"):
            usage.completion("bash", {}, {})
    pytest.importorskip("shtab", reason="shtab is not installed")
    assert cli.main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for word in (*arguments.COMMANDS, "--forget-loss", *LOSSES, "erase"):
        assert word in script
    assert cli.main(["--print-completion", "bsh"]) == 2
    assert "unknown shell 'bsh'; did you mean 'bash'?" in capsys.readouterr().err


def test_memorize_is_spelled_either_way(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("memorize: true\nmemorize_args: {epochs: 3}\n")
    parser = arguments.parser("unlearn")
    for told in (["--memorize", "--memorize-args", "{epochs: 3}"], ["--config", str(tmp_path / "mine.yaml")]):
        parsed = arguments.parse(parser, told)
        assert (parsed.memorise, parsed.memorise_args) == (True, {"epochs": 3})
        assert {"memorise", "memorise_args"} <= set(parsed.given)


@pytest.mark.parametrize(
    ("given", "read"),
    [("--attacks=leak", ["leak"]), ("--attacks=relearn, leak", ["relearn", "leak"]), ("--lm-eval=arc", ["arc"]),
     ("--probe-subjects=Stephen King,Tom Hanks", ["Stephen King", "Tom Hanks"]), ("--attacks=[leak]", ["leak"]),
     ("--methods=Joint AdamW,DualOptim+", ["Joint AdamW", "DualOptim+"]), ("--seeds=0,1", [0, 1]), ("--seeds=2", [2]),
     ("--betas=0.9, 0.99", (0.9, 0.99)), ("--betas=null", None), ("--lora-targets=q_proj,up_proj", "q_proj,up_proj"),
     ("--lora-targets=[q_proj, up_proj]", ["q_proj", "up_proj"]), ("--lora-targets=all-linear", "all-linear"),
     ("--lora-targets=.*[qv]_proj", ".*[qv]_proj"), ("--lora-targets=.*{1,2}", ".*{1,2}"),
     ("--probe-subjects=𠮷田,Shaquille O'Neal", ["𠮷田", "Shaquille O'Neal"]), ("--seeds=008,010", [8, 10])],
)  # fmt: skip
def test_a_list_is_words_with_commas_or_in_brackets(tmp_path: Path, given: str, read: Any) -> None:
    parser = arguments.parser("compare")
    name, _, value = given.partition("=")
    key = name.removeprefix("--").replace("-", "_")
    (tmp_path / "r.yaml").write_text(f"{key}: {json.dumps(value) if value != 'null' else value}\n")
    for told in ([given], [name, value], ["--config", str(tmp_path / "r.yaml")]):
        assert getattr(arguments.parse(parser, told), key) == read


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [("seed", "010", 10), ("seeds", "[008, 009, 010]", [8, 9, 10]), ("weights", "{forget: 010}", {"forget": 10.0}),
     ("grid", "{steps: [010], ratio: [1:1, 1:30]}", {"steps": [10], "ratio": ["1:1", "1:30"]}),
     ("task_args", "{split: 010, ratio: 1:30, day: 2024-01-01}", {"split": 10, "ratio": "1:30", "day": "2024-01-01"}),
     ("task_args", "{s: '007', d: \"2024\", b: 'null', l: ['1', 1], m: {q: 'true'}, n: 7, x: null}",
      {"s": "007", "d": "2024", "b": "null", "l": ["1", 1], "m": {"q": "true"}, "n": 7, "x": None}),
     ("forget_loss_args", "{name: '1', beta: 1}", {"name": "1", "beta": 1}), ("tune_on", "{part: '6'}", {"part": "6"}),
     ("task_args", "{names: [𠮷田, 😀]}", {"names": ["𠮷田", "😀"]}), ("probe_subjects", "[𠮷田]", ["𠮷田"]),
     ("lr_scales", "equal", "equal"), ("max_update", "null", None), ("bf16", "no", False), ("lr", "1e-3", 1e-3)],
)  # fmt: skip
def test_the_command_line_and_recipes_are_read_alike(tmp_path: Path, key: str, value: str, read: Any) -> None:
    (tmp_path / "r.yaml").write_text(f"{key}: {value}\n", encoding="utf-8")
    option = f"--{key.replace('_', '-')}"
    for told in ([option, value], [f"{option}={value}"], ["--config", str(tmp_path / "r.yaml")]):
        if key == "tune_on" and told[0] == "--config":
            continue  # it is no setting of a recipe
        command = "tune" if key == "tune_on" else "compare"
        assert repr(getattr(arguments.parse(arguments.parser(command), told), key)) == repr(read)


def test_an_entry_of_a_dictionary_is_read_like_the_whole() -> None:
    parser = arguments.parser("unlearn")
    parsed = arguments.parse(parser, ["--task-args.split=010", "--task-args.names", "[a, 010]", "--weights.forget=010"])
    assert (parsed.task_args, parsed.weights) == ({"split": 10, "names": ["a", 10]}, {"forget": 10.0})
    told = ["--task-args", "{s: '1', t: a}", "--task-args.s='007'", "--task-args.m.q", '"null"', "--task-args.n=7"]
    assert arguments.parse(parser, told).task_args == {"s": "007", "t": "a", "m": {"q": "null"}, "n": 7}
    with pytest.raises(UserError, match="argument --task-args: expected one argument"):
        arguments.parse(parser, ["--task-args.s", "--lr", "1e-3"])


@pytest.mark.parametrize(
    "text", ["#2.jsonl", "#", "&a", "# x", "Null", "[draft]", "{a: 1}", "010", "1:30", "a: b", "true", ""]
)
def test_a_text_is_taken_as_it_stands(text: str) -> None:
    for key in ("forget", "train", "chat_template", "retain", "out"):
        parsed = arguments.parse(arguments.parser("unlearn"), [f"--{key.replace('_', '-')}={text}"])
        assert getattr(parsed, key) == text


def test_null_takes_back_what_a_recipe_says(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("train: layers\nuntil: 0.1\n")
    told = ["--config", str(tmp_path / "r.yaml"), "--train", "null", "--until", "null"]
    parsed = arguments.parse(arguments.parser("unlearn"), told)
    assert (parsed.train, parsed.until) == (None, None)


@pytest.mark.parametrize(
    ("given", "said"),
    [("--attacks=[leak", '"attacks": must be of type list, but is \'[leak\''),
     ("--steps=1:30", '"steps": must be of type int, but is \'1:30\''),
     ("--steps=1_0", '"steps": must be of type int, but is \'1_0\''),
     ("--until=", '"until": must be one of float, null, but is \'\''),
     ("--bf16=#", '"bf16": must be one of bool, null, but is \'#\''),
     ("--seeds=1:30", '"seeds": must be of type int, but is \'1:30\''),
     ("--weights={forget: 1:30}", '"weights": must be of type float, but is \'1:30\''),
     ("--weights={forget: 1, forget: 2}", "\"weights\": 'forget' stands twice; remove one"),
     ("--weights=&w {forget: *w}", '"weights": is &w {forget: *w}, of which no setting can be made'),
     ("--grid={lr: " + "[" * 3000, '"grid": YAML that cannot be read: maximum recursion depth exceeded'),
     ("--steps=" + "9" * 5000, '"steps": a number of more than 4000 digits')],
)  # fmt: skip
def test_a_value_that_cannot_be_meant_is_one_sentence(given: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^setting {re.escape(said)}"):
        arguments.parse(arguments.parser("compare"), [given])


def test_every_path_may_begin_with_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DUALOPTIM_CACHE", "~/cache")
    assert cache_dir() == tmp_path / "cache"
    keys = [*RunConfig().as_dict().keys() & RunConfig().inputs.keys(), "out"]
    (tmp_path / "r.yaml").write_text("".join(f"{key}: ~/{key}\n" for key in keys) + "train: ~\n")
    parsed = arguments.parse(arguments.parser("unlearn"), ["--config=~/r.yaml"])
    assert {key: getattr(parsed, key) for key in keys} == {key: str(tmp_path / key) for key in keys}
    assert parsed.train is None
    parsed = arguments.parse(arguments.parser("evaluate"), ["--scores=~/s.json", "--base", "~/b"])
    assert (parsed.scores, parsed.base) == (str(tmp_path / "s.json"), str(tmp_path / "b"))
    assert arguments.parse(arguments.parser("report"), ["~/run"]).runs == [str(tmp_path / "run")]


# The recipe that init writes


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and rows to forget and to keep, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    return tiny.with_rows(tmp_path, "ABCDEFGHIJ")


INIT = ["init", "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--model", "model"]


def test_the_commands_that_a_recipe_names_run_also_where_its_name_has_a_blank(place: Path) -> None:
    assert cli.main([*INIT, "--out", "my recipe.yaml"]) == 0
    commands = [line for line in Path("my recipe.yaml").read_text().splitlines() if "--config" in line]
    assert all("my recipe.yaml" in shlex.split(line, comments=False) for line in commands)
    assert len(commands) == 3


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash, which reads the commands")
@pytest.mark.parametrize("name", ["-r.yaml", "--lr=1.yaml", "re\nc.yaml", "it's\t\x1b\x85\u2028\\ \N{SNOWMAN}.yaml"])
def test_the_commands_that_init_prints_run_with_any_name(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*INIT, "--out", f"./{name}"]) == 0
    (told,) = capsys.readouterr().out.splitlines()
    lines = Path(name).read_text(encoding="utf-8").splitlines()
    commands = [line.removeprefix("#").partition("   # ")[0] for line in lines if "--config" in line]
    assert len(commands) == 3
    for command in (*commands, told.split("Check it by: ")[1]):
        script = f"printf '%s\\0' {command}"
        words = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.decode().split("\0")
        dry = [] if "--dry-run" in words else ["--dry-run"]
        assert cli.main([*words[1:-1], *dry]) == 0


@pytest.mark.parametrize("goal", goals.GOALS)
def test_a_recipe_that_init_wrote_runs_and_means_what_the_goal_chooses(
    goal: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*INIT, "--goal", goal, "--out", "recipes/mine.yaml"]) == 0
    told = capsys.readouterr().out
    text = (place / "recipes/mine.yaml").read_text(encoding="utf-8")
    given = {"forget": "forget.jsonl", "retain": "retain.jsonl", "model": "model", "goal": goal, "out": "runs/mine"}
    assert yaml.safe_load(text) == given
    chosen = goals.chosen(given)
    every = re.sub(r"^# (?=[a-z_0-9]+: )", "", text, flags=re.MULTILINE)  # as if somebody wanted all of it said
    settings = yaml.load(every, recipe_files.Loader)
    assert {"lr", "forget_loss", "until", "save_every"} <= set(settings)
    assert RunConfig(**{**settings, "betas": tuple(settings["betas"])}) == chosen
    assert set(settings) <= set(recipe_files.RECIPE_KEYS)
    command = told.split("Check it by: ")[1]
    assert cli.main(shlex.split(command)[1:]) == 0
    shown = capsys.readouterr().out
    assert f"── schedule: {chosen.method} ──" in shown
    assert f"forget_loss: {chosen.forget_loss}" in shown
    assert not (place / "runs").exists()


def test_a_recipe_for_the_model_that_is_made_of_rows_memorizes_them(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*INIT, "--model", "tiny"]) == 0
    command = capsys.readouterr().out.split("Check it by: ")[1]
    assert yaml.safe_load((place / "recipe.yaml").read_text(encoding="utf-8"))["memorise"] is True
    assert cli.main(shlex.split(command)[1:]) == 0


MISTAKES = {
    "nothing to forget": (["init"], "init: nothing to forget; give --forget FILE"),
    "no such rows": (["init", "--forget", "none.jsonl"], "none.jsonl: there is no such file"),
    "an unknown goal": ([*INIT, "--goal", "erasee"], "unknown goal 'erasee'; did you mean 'erase'?"),
    "no such model": ([*INIT, "--model", "./nowhere"], "model './nowhere': there is no such folder"),
    "the same rows": ([*INIT, "--retain", "forget.jsonl"], "also stands in 'forget'"),
    "a file that is there": ([*INIT, "--out", "retain.jsonl"], "init retain.jsonl: exists already"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_writes_nothing(mistake: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = MISTAKES[mistake]
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert message in told[0]
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


# Hints


@pytest.mark.parametrize(
    ("name", "meant"),
    [("lerning_rate", "lr"), ("learning-rat", "lr"), ("learnig_rate", "lr"), ("LR", "lr"), ("lrr", "lr"),
     ("max_step", "steps"), ("epochs", "steps"), ("num_train_epochs", "steps"), ("save_steps", "save_every"),
     ("logging_steps", "log_every"), ("wd", "weight_decay"), ("scheduler", "lr_decay"), ("lora-r", "lora_rank"),
     ("gradient_accumulation_steps", "micro_batch_size"), ("batchsize", "batch_size"), ("Forget_Loss", "forget_loss"),
     ("output_dir", "out"), ("model_name_or_path", "model"), ("max_seq_length", "max_length")],
)  # fmt: skip
def test_a_hint_names_the_setting_that_is_meant(tmp_path: Path, name: str, meant: str) -> None:
    parser = arguments.parser("unlearn")
    (tmp_path / "r.yaml").write_text(f"{name}: 1\n")
    with pytest.raises(UserError, match=f"unknown recipe key '{name}'; did you mean '{meant}'[?]$"):
        arguments.parse(parser, ["--recipe", str(tmp_path / "r.yaml")])
    with pytest.raises(UserError, match=f"unknown option '--{name}'; did you mean '--{meant.replace('_', '-')}'[?]$"):
        arguments.parse(parser, [f"--{name}", "1"])


def test_what_other_trainers_call_a_setting_leads_to_one_that_there_is() -> None:
    known = arguments.parser("unlearn")._option_string_actions
    named = [other for others in errors.MEANT.values() for other in others]
    assert {f"--{name.replace('_', '-')}" for name in errors.MEANT} <= set(known)
    assert not {f"--{name.replace('_', '-')}" for name in named} & set(known)
    assert len(named) == len(set(named))


@pytest.mark.parametrize(
    ("command", "option", "said"),
    [("unlearn", "--force", "did you mean '--overwrite'?"), ("compare", "--method", "did you mean '--methods'?"),
     ("unlearn", "--method", "dualoptim unlearn --help lists all"), ("plan", "--wd", "dualoptim plan --help"),
     ("unlearn", "--seeds", "it is an option of dualoptim compare, not of dualoptim unlearn"),
     ("plan", "--lora_rank", "it is an option of dualoptim unlearn, dualoptim compare, dualoptim tune, not of"),
     ("unlearn", "--batch_size", "did you mean '--batch-size'?")],
)  # fmt: skip
def test_no_hint_is_better_than_a_wrong_one(command: str, option: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^unknown option '{option}'; {re.escape(said)}"):
        arguments.parse(arguments.parser(command), [option, "1"])
