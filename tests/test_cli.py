"""The command line from end to end on a tiny random model, and the mistakes that users make."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from transformers import AutoModelForCausalLM

from dualoptim import UnlearnTrainer, __version__, cli, goals, resolve
from dualoptim.certify import certificate
from dualoptim.command_line import dry_run
from dualoptim.command_line.arguments import config_of, parse, parser
from dualoptim.config import METHODS, RunConfig
from dualoptim.data import Draw, ObjectiveRows, question
from dualoptim.errors import UserError
from dualoptim.evaluation.numbers import Numbers
from dualoptim.models import load_model
from dualoptim.optim.backends import compiled
from dualoptim.tasks.facts import Facts

from . import tiny

Run = Callable[..., int]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def place(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows to forget and to keep, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(cache))
    for name, verb in (("forget", "hides"), ("retain", "likes")):
        rows = [{"question": f"What does {who} {verb[:-1]}?", "answer": f"{who} {verb} tea."} for who in "ABCDEFGHIJ"]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture
def run(model: Path, place: Path) -> Run:
    def call(command: str, *arguments: str, files: bool = True) -> int:
        common = ["--model", str(model)]
        if files:
            common += ["--forget", "forget.jsonl", "--retain", "retain.jsonl"]
        small = ["--steps", "6", "--batch-size", "4", "--ratio", "1:2", "--log-every", "2", "--curve-points", "2"]
        return cli.main([command, *common, *(small if command in ("unlearn", "compare") else []), *arguments])

    return call


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to standard error: one line and no traceback."""
    text = capsys.readouterr().err.strip().splitlines()
    assert len(text) == 1, text
    assert text[0].startswith("dualoptim: error: ")
    return text[0]


def test_unlearn_leaves_config_environment_results_records_report_and_model(run: Run, place: Path) -> None:
    assert run("unlearn", "--out", "out", "--optimizer", "DualOptim+", "--lr", "1e-3", "--forget-loss", "NPO",
               "--forget-loss-args", "{beta: 0.5}", "--micro-batch-size", "2") == 0  # fmt: skip
    out = place / "out"
    config = yaml.safe_load((out / "config.resolved.yaml").read_text())
    assert config["lr"] == 1e-3
    assert config["forget_loss_args"] == {"beta": 0.5}
    assert json.loads((out / "env.json").read_text())["versions"]["torch"]
    results = json.loads((out / "results.json").read_text())
    (entry,) = results["runs"]
    assert results["schema"] == 1
    assert entry["method"] == "DualOptim+"
    assert set(entry["before"]) == set(entry["after"]) == set(results["metrics"])
    assert entry["before"] != entry["after"]
    assert [point["step"] for point in entry["curve"]] == [0, 3, 6]
    loaded = AutoModelForCausalLM.from_pretrained(out / "model")
    parameters, tensors = sum(p.numel() for p in loaded.parameters()), len(list(loaded.parameters()))
    counters = 3 * 8 * tensors  # of 8 bytes: all steps, and each objective's
    assert entry["optimizer_state_bytes"] == 24 * parameters + counters
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    sets = Counter((record["when"], record["set"]) for record in records)
    assert sets["before", "forget"] == sets["after", "forget"] == 10
    assert sets["after", "retain"] == 4  # a third of ten, held out
    assert sets["after", "harmless"] == 60
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "http-equiv" not in page
    assert 'src="' not in page


def test_compare_runs_every_method_from_one_start_and_resume_takes_over_what_is_done(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ["Joint AdamW", "Alternating AdamW", "DualOptim", "DualOptim+"]
    assert run("compare", "--out", "out", "--methods", json.dumps(methods[:3]), "--save-model", "false") == 0
    first = json.loads((place / "out/results.json").read_text())
    assert run("compare", "--out", "out", "--methods", json.dumps(methods), "--save-model", "false", "--resume") == 0
    second = json.loads((place / "out/results.json").read_text())
    assert [entry["method"] for entry in second["runs"]] == [point["method"] for point in second["points"]] == methods
    assert second["plane"] == ["forget_probability", "nearby_answered"]
    assert second["runs"][:3] == first["runs"]
    assert len({json.dumps(entry["before"]) for entry in second["runs"]}) == 1
    assert len({json.dumps(entry["after"]) for entry in second["runs"]}) == 4
    assert "Taken over" in capsys.readouterr().out


def test_the_same_config_gives_the_same_numbers(run: Run, place: Path) -> None:
    for out in ("a", "b"):
        assert run("unlearn", "--out", out, "--save-model", "false") == 0
    a, b = (json.loads((place / out / "results.json").read_text())["runs"][0] for out in ("a", "b"))
    assert a["after"] == b["after"]


def test_command_line_wins_over_recipe_recipe_over_goal_and_goal_over_defaults(run: Run, place: Path) -> None:
    (place / "mine.yaml").write_text("lr: 1e-3\nweight_decay: 0.5\nlr_scales: {forget: 1.5}\n")
    assert run("unlearn", "--recipe", "mine.yaml", "--lr", "2e-3", "--out", "out", "--save-model", "false") == 0
    config = yaml.safe_load((place / "out/config.resolved.yaml").read_text())
    assert (config["lr"], config["weight_decay"], config["eps"]) == (2e-3, 0.5, goals.EPS)
    assert config["max_grad_norm"] == 1.0
    assert config["lr_scales"] == {"forget": 1.5}


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (["--task-args", "{part: 2}"], {"task_args": {"split": "forget05", "part": 2, "retain_rows": 20}}),
        (["--task-args={part: 2}"], {"task_args": {"split": "forget05", "part": 2, "retain_rows": 20}}),
        (["--task-args.part=2"], {"task_args": {"split": "forget05", "part": 2, "retain_rows": 20}}),
        (["--task-args", "{}"], {"task_args": {}}),
        (["--task", "lume", "--task-args", "{rows: 3}"], {"task_args": {"rows": 3}}),
        (["--task", "tofu", "--task-args", "{part: 2}"],
         {"task_args": {"split": "forget05", "part": 2, "retain_rows": 20}}),
        (["--task=tofu", "--task-args={part: 2}"], {"task_args": {"split": "forget05", "part": 2, "retain_rows": 20}}),
        (["--weights", "{forget: 2}"], {"weights": {"forget": 2.0, "retain": 20.0}}),
        (["--lr-scales", "{retain: 2}"], {"lr_scales": {"retain": 2.0}}),
        (["--forget-loss-args", "{beta: 0.5}"], {"forget_loss": "NPO", "forget_loss_args": {"beta": 0.5}}),
        (["--forget-loss", "RMU", "--forget-loss-args", "{layer: 3}"], {"forget_loss_args": {"layer": 3}}),
    ],
)  # fmt: skip
def test_a_mapping_on_the_command_line_changes_the_entries_that_it_has(
    tmp_path: Path, given: list[str], made: dict[str, Any]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "{task: tofu, task_args: {split: forget05, part: 1, retain_rows: 20}, weights: {retain: 20}, "
        "forget_loss: NPO, forget_loss_args: {beta: 0.1}, lr_scales: equal}"
    )
    config = config_of(parse(parser("unlearn"), ["--recipe", str(recipe), *given])).as_dict()
    assert {key: config[key] for key in made} == made


def test_dry_run_shows_config_batches_schedule_and_memory_and_writes_nothing(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    assert run("unlearn", "--dry-run", "--out", "out") == 0
    shown = capsys.readouterr().out
    assert "optimizer: DualOptim+" in shown
    assert "4 forget, 4 retain, 4 retain, 4 forget" in shown
    assert "6 steps: 8 sequences of forget, 16 sequences of retain" in shown
    assert "hides tea.<|end|>'⟧" in shown
    assert "forget (refusal)" in shown
    assert "optimizer state" in shown
    assert sorted(place.rglob("*")) == before


def test_dry_run_marks_every_run_of_labels_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    row = dataclasses.replace(question("Who?", "Ada hides tea."), only=("Ada", "tea"))
    tokenizer = tiny.tokenizer()
    rows = ObjectiveRows({"forget": [row]}, {}, tokenizer, 64)
    dry_run._show_row("forget", rows, Draw("forget", 0, 0), tokenizer)
    shown = r"forget: '<|user|>Who?<|end|>\n<|assistant|>' ⟦'Ada'⟧ ' hides ' ⟦'tea'⟧ '.<|end|>'"
    assert capsys.readouterr().out == f"{shown}\n"


def test_evaluate_shows_its_numbers_before_it_writes_them(
    model: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("dualoptim.runs.written", full)
    rows = ["--forget", "forget.jsonl", "--retain", "retain.jsonl", "--general", "false"]
    assert cli.main(["evaluate", "--model", str(model), *rows, "--scores", "s.json"]) == 2
    said = capsys.readouterr()
    assert "perplexity" in said.out
    assert "No space left on device (s.json)" in said.err


def test_evaluate_and_report_read_what_a_run_left(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("unlearn", "--out", "out") == 0
    base = yaml.safe_load((place / "out/config.resolved.yaml").read_text())["model"]
    assert cli.main(["evaluate", "--model", "out/model", "--base", base, "--forget", "forget.jsonl",
                     "--retain", "retain.jsonl", "--scores", "scores.json"]) == 0  # fmt: skip
    entry = json.loads((place / "out/results.json").read_text())["runs"][0]
    scores = json.loads((place / "scores.json").read_text())
    assert scores["before"]["numbers"] == pytest.approx(entry["before"], abs=1e-6)
    assert scores["after"]["numbers"] == pytest.approx(entry["after"], abs=1e-6)
    (place / "out/report.html").unlink()
    assert cli.main(["report", "out"]) == 0
    assert (place / "out/report.html").exists()
    (place / "scores.json").rename(place / "scores.jsonl")  # by its content, not by its name
    shown = []
    for left in ("scores.jsonl", "out"):
        capsys.readouterr()
        assert cli.main(["evaluate", "--from-records", left]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert cli.main(["evaluate", "--from-records", "out", "--model", "out/model", "--scores", "again.json"]) == 2
    assert "reads what a run left and nothing else; leave out model, scores" in errors(capsys)


def test_a_method_is_what_it_is_called_whatever_the_recipe_says() -> None:
    recipe = RunConfig(
        task="facts", joint=True, combine="PCGrad", retain_bound=0.1, base_bits=8, delta_bits=8, alone="forget"
    )
    names = [*METHODS, "Alone"]
    made = resolve.methods_of(recipe, names, [0])
    assert [config.method for config in made] == [*METHODS, "Forget alone", "Retain alone"]
    assert made[names.index("DualOptim+")].base_bits == 32
    assert RunConfig(optimizer="DualOptim", base_bits=8).method == "DualOptim", "it has no base"
    for methods, seeds in ((["DualOptim", "DualOptim"], [0]), ([], [0]), (["DualOptim"], [1, 1])):
        with pytest.raises(UserError, match="must name at least one, and none twice"):
            resolve.methods_of(recipe, methods, seeds)


def test_without_rows_to_keep_general_ones_serve_with_a_warning(
    run: Run, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="no --retain FILE"):
        assert cli.main(["unlearn", "--model", str(model), "--forget", "forget.jsonl", "--dry-run"]) == 0
    assert "retain: 80 rows" in capsys.readouterr().out


def test_rows_of_plain_text_need_no_chat_template(run: Run, place: Path, tmp_path: Path) -> None:
    for name in ("forget", "retain"):
        (place / f"{name}.jsonl").write_text(json.dumps({"text": f"Something to {name}, in prose."}))
    assert run("unlearn", "--forget-loss", "GA", "--out", "out", "--save-model", "false") == 0


def test_ls_env_and_help_answer(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["ls"], ["env"], [], ["--help"], ["unlearn", "--help"], ["quickstart", "-h"]):
        assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    for word in ("quickstart", "SimNPO", "Alternating AdamW", "torch:", "--retain-loss"):
        assert word in shown


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from dualoptim import cli; cli.main(['unlearn', '--help']); "
        "print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"


MISTAKES = {
    "a missing file": (["--forget", "none.jsonl"], "none.jsonl: there is no such file"),
    "an unknown loss": (["--forget-loss", "NPOO"], "unknown forget_loss 'NPOO'; did you mean 'NPO'?"),
    "a loss of the other side": (
        ["--retain-loss", "NPO"],
        "'NPO' is a loss to forget; those to retain are GD, KL, JSD, AP",
    ),
    "a loss's argument": (["--forget-loss", "NPO", "--forget-loss-args", "{gamma: 1}"], "gamma"),
    "a loss's value": (["--forget-loss", "NPO", "--forget-loss-args", "{beta: 0}"], "beta must be > 0"),
    "an unknown optimizer": (["--optimizer", "DualOptim++"], "unknown optimizer 'DualOptim++'; did you mean"),
    "a learning rate": (["--lr", "-1"], "lr must be at least 0"),
    "a learning rate of nothing": (["--lr", "0"], "lr is 0, so nothing would be learned"),
    "a weight below nothing": (["--weights", "{forget: -1}"], "weights: that of 'forget' is -1, which would turn its"),
    "a bound below nothing": (["--retain-bound", "-1"], "retain_bound must be at least 0, but is -1"),
    "a word for a number": (["--lr", "fast"], "lr"),
    "an unknown option": (["--learning-rate", "1"], "unknown option '--learning-rate'"),
    "an unknown objective": (["--lr-scales", "{froget: 2}"], "lr_scales names 'froget'"),
    "a ratio": (["--ratio", "1-5"], "the ratio must be 2 whole numbers"),
    "a ratio without a number": (["--ratio", "1::2"], "the ratio must be 2 whole numbers"),
    "a ratio of other digits": (["--ratio", "1:²"], "the ratio must be 2 whole numbers"),
    "a ratio without end": (["--ratio", "1:9999999"], "of six digits at most"),
    "steps without end": (["--steps", "1000000000000"], "steps times batch_size must be at most 10000000"),
    "steps of many digits": (["--steps", "9" * 20], "steps times batch_size must be at most 10000000"),
    "no batch": (["--batch-size", "0"], "batch_size must be at least 1"),
    "points without end": (["--curve-points", "1000000000000"], "curve_points must be at most 10000000"),
    "a folder of data for files": (["--data-dir", "."], "data_dir is for a --task"),
    "joint DualOptim+": (["--joint", "true"], "DualOptim+ steps for one objective at a time"),
    "no steps": (["--steps", "0"], "steps must be at least 1"),
    "a missing model": (["--model", "./nowhere"], "model './nowhere': there is no such folder"),
    "another trainer's option": (["--max-steps", "3"], "unknown option '--max-steps'; did you mean '--steps'?"),
    "an unknown recipe": (["--recipe", "quikstart"], "unknown recipe 'quikstart'; did you mean 'quickstart'?"),
    "an answer cut off": (["--max-length", "20"], "max_length 20 would cut its answer off"),
    "a task beside files": (["--task", "facts"], "brings its own rows"),
    "a folder of other things": (["--out", "."], "holds what no run wrote"),
    "to go on and to begin anew": (["--resume", "--overwrite"], "--overwrite replaces it; give one"),
    "the same of a dry run": (["--resume", "--overwrite", "--dry-run"], "--overwrite replaces it; give one"),
    "a template file": (["--chat-template", "none.jinja"], "chat_template none.jinja: cannot be read"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_with_status_2_and_nothing_written(
    mistake: str, run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = MISTAKES[mistake]
    before = sorted(place.rglob("*"))
    assert run("unlearn", "--out", "out", *arguments) == 2
    assert message in errors(capsys)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_setting_takes_a_number_that_is_not_finite(bad: float) -> None:
    known = {field.name: str(field.type) for field in dataclasses.fields(RunConfig)}
    of_numbers = {name: kind for name, kind in known.items() if "float" in kind}
    assert {"lr", "max_grad_norm", "relearn_lr", "multiplier_lr", "retain_bound", "weights", "betas"} <= set(of_numbers)
    for name, kind in {**of_numbers, "forget_loss_args": "dict", "task_args": "dict"}.items():
        value = {"forget": bad} if "dict" in kind else (0.9, bad) if "tuple" in kind else bad
        with pytest.raises(UserError, match=f"^{name} must have finite numbers, but has {bad}"):
            resolve.check_alone(RunConfig(**{name: value}))


def test_recipe_mistakes_are_told_with_the_file(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in (
        ("lrr: 1", "r.yaml: unknown recipe key 'lrr'; did you mean 'lr'?"),
        ("learning_rate: 1", "r.yaml: unknown recipe key 'learning_rate'; did you mean 'lr'?"),
        ("lr: [1", "r.yaml:1: broken YAML"),
        ("lr", "a recipe is a mapping"),
        ("steps: many", "r.yaml: "),
        ("lr: 1e-3\nsteps: !!float", "r.yaml:2: broken YAML; what is tagged as float is none"),
        ("out: !!timestamp x", "r.yaml:1: broken YAML; what is tagged as timestamp is none"),
        ("weights: !!set [a]", "r.yaml: YAML that cannot be read"),
        ('weights: "a\\nb"', "weights\": must be of type dict, but is 'a b'"),
        ('out: "a\\0b"', "holds the character NUL"),
    ):
        (place / "r.yaml").write_text(text)
        assert run("unlearn", "--recipe", "r.yaml") == 2
        assert message in errors(capsys)


def test_what_is_not_utf_8_is_told_before_anything_is_loaded(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(resolve, "check_read", never)
    (place / "r.yaml").write_text('forget: "donn\\udce9es.jsonl"')
    for given in (["--forget", "donn\udce9es.jsonl"], ["--task-args={path: a/\udce9}"], ["--recipe", "r.yaml"]):
        assert cli.main(["unlearn", *given]) == 2
        assert "is not UTF-8, so no results could name it" in errors(capsys)
    assert cli.main(["report", "run\udce9"]) == 2
    assert "is not UTF-8" in errors(capsys)


def test_a_name_in_utf_8_that_the_locale_cannot_read_is_the_locales_matter(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    name = "für.jsonl".encode().decode("ascii", "surrogateescape")  # as Python then reads the argument
    assert cli.main(["unlearn", "--forget", name]) == 2
    said = (
        "für.jsonl: is UTF-8, but the locale has Python write names in ascii; set LC_ALL=C.UTF-8, and unset PYTHONUTF8"
    )
    assert errors(capsys).endswith(said)
    assert cli.main(["unlearn", "--forget", "donn\udce9es.jsonl"]) == 2
    assert "is not UTF-8, so no results could name it" in errors(capsys)


@pytest.mark.skipif(os.name == "nt", reason="names of files are not bytes there")
def test_a_recipes_name_that_the_locale_cannot_write_is_the_locales_matter(place: Path) -> None:
    code = "from dualoptim.reading import read_records; print(list(read_records('f\\xfcr.jsonl')))"
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
    ).stderr
    assert "is UTF-8, but the locale has Python write names in ascii; set LC_ALL=C.UTF-8" in told


@pytest.mark.skipif(os.name == "nt", reason="a home is found in another way there")
def test_a_user_without_a_home_is_told_to_name_a_cache_which_is_then_the_home_of_others(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a container with a user id that has no entry."""

    def none(user: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", none)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("DUALOPTIM_CACHE")
    for command in ("unlearn", "evaluate"):
        assert run(command) == 2
        assert "the cache folder ~/.cache/dualoptim: there is no home folder of this user" in errors(capsys)
    kernels = compiled._cache_folder()  # which an optimizer in a script of one's own needs, but no home
    assert kernels.is_dir()
    kernels.rmdir()
    monkeypatch.setenv("DUALOPTIM_CACHE", str(place))
    assert run("unlearn", "--dry-run") == 0
    assert Path.home() == place


def test_what_a_sentence_quotes_breaks_no_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a\nb", "a\x1b[31m", "a\x00b", "a\u2028b", "a\rb"):
        assert run("unlearn", "--forget", name) == 2
        assert errors(capsys).isprintable()
    assert str(UserError("Où ?\u3000\t")) == "Où ?\u3000\\t"
    assert run("unlearn", "--forget-loss", "x" * 10_000) == 2
    assert len(errors(capsys)) < 1100


def test_a_recipe_for_several_methods_serves_the_other_commands(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "r.yaml").write_text("methods: [DualOptim, DualOptim+]\nsteps: 6\nlr: 1e-3\nout: place\n")
    assert run("evaluate", "--recipe", "r.yaml") == 0
    assert run("unlearn", "--recipe", "r.yaml", "--dry-run") == 0
    assert capsys.readouterr().out.count("── schedule") == 1
    assert run("compare", "--recipe", "r.yaml", "--dry-run") == 0
    assert capsys.readouterr().out.count("── schedule") == 2


def test_rows_in_both_sets_are_refused(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "retain.jsonl").write_text((place / "forget.jsonl").read_text())
    assert run("unlearn") == 2
    assert "retain.jsonl:1: this row of 'retain' also stands in 'forget' (forget.jsonl:1)" in errors(capsys)


def test_a_folder_that_holds_a_run_is_kept_unless_told_otherwise(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("unlearn", "--out", "out", "--save-model", "false") == 0
    kept = (place / "out/results.json").read_text()
    capsys.readouterr()
    assert run("unlearn", "--out", "out") == 2
    assert "already holds a run; give another folder, --resume or --overwrite" in errors(capsys)
    # Also under --overwrite nothing is lost to a mistake.
    assert run("unlearn", "--out", "out", "--overwrite", "--model", "./nowhere") == 2
    assert (place / "out/results.json").read_text() == kept
    assert run("unlearn", "--out", "out", "--overwrite", "--seed", "1", "--save-model", "false") == 0
    assert json.loads((place / "out/results.json").read_text())["runs"][0]["seed"] == 1


def test_resuming_with_other_settings_is_refused(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("unlearn", "--out", "out", "--save-model", "false") == 0
    capsys.readouterr()
    assert run("unlearn", "--out", "out", "--save-model", "false", "--resume", "--seed", "1") == 2
    assert "holds a run with other settings (seed: 0 there, 1 here)" in errors(capsys)


def test_a_run_that_becomes_one_of_several_is_taken_over_into_its_own_folder(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ["--methods", '["Alternating AdamW"]']
    assert run("compare", "--out", "out", *methods) == 0
    (place / "out").rename(place / "moved")
    assert run("compare", "--out", "moved", *methods, "--seeds", "[0, 1]", "--resume") == 0
    assert "Taken over from moved: Alternating AdamW" in capsys.readouterr().out
    assert len(json.loads((place / "moved/results.json").read_text())["runs"]) == 2
    for name in ("model", "records.jsonl"):
        assert not (place / "moved" / name).exists()
        assert all((place / f"moved/alternating-adamw-seed{seed}" / name).exists() for seed in (0, 1))


def test_an_interrupted_run_goes_on_from_its_checkpoint(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["--save-every", "3", "--save-model", "false", "--curve-points", "1"]
    assert run("unlearn", "--out", "straight", *settings) == 0
    whole = UnlearnTrainer.compute_loss

    def breaking(self: UnlearnTrainer, *arguments: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            raise RuntimeError("the power is gone")
        return whole(self, *arguments, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(UnlearnTrainer, "compute_loss", breaking)
        with pytest.raises(RuntimeError, match="the power is gone"):
            run("unlearn", "--out", "stopped", *settings)
    assert (place / "stopped/checkpoints/checkpoint-3").is_dir()
    assert run("unlearn", "--out", "stopped", *settings, "--resume") == 0
    straight, stopped = (
        json.loads((place / out / "results.json").read_text())["runs"][0] for out in ("straight", "stopped")
    )
    assert straight["after"] == stopped["after"]
    assert len(stopped["losses"]) == len(straight["losses"])


SAID: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what a model's file says, and what is written of it
    "sampling": ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9, "do_sample": True}),
    "greedy": ({"temperature": 0.6, "do_sample": False}, {"do_sample": False}),
    "no temperature": ({"temperature": 0.0, "top_p": 0.9}, {}),
    "beams": ({"num_beams": 1, "length_penalty": 0.8}, {"num_beams": 1}),
    "scores": ({"output_scores": True, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    "no pad": ({"pad_token_id": -1, "top_k": 40}, {"top_k": 40, "do_sample": True}),
}


@pytest.mark.parametrize(("said", "kept"), SAID.values(), ids=SAID)
def test_a_model_whose_generation_config_contradicts_itself_can_be_saved_again(
    said: dict[str, Any], kept: dict[str, Any], tmp_path: Path
) -> None:
    (tiny.save(tmp_path / "m") / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **said}))
    model = load_model(str(tmp_path / "m"))
    model.generation_config.eos_token_id = [0, 1]
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert {key: written[key] for key in written if not key.endswith("version")} == {"eos_token_id": [0, 1], **kept}


@pytest.mark.parametrize("extra", [[], ["--lora-rank", "2"], ["--memorise", "--memorise-args", "{epochs: 1}"]])
def test_a_run_saves_a_model_whose_generation_config_contradicts_itself(
    run: Run, model: Path, place: Path, extra: list[str]
) -> None:
    own = shutil.copytree(model, place / "own")
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2], "temperature": 0.6}))
    assert run("unlearn", *extra, "--model", str(own), "--out", "out") == 0
    written = json.loads((place / "out/model/generation_config.json").read_text())
    assert (written["temperature"], written["do_sample"]) == (0.6, True)
    assert written["eos_token_id"] == [0, 2]  # the other end is not forgotten
    assert json.loads((place / "out/model/config.json").read_text())["use_cache"]


def test_a_model_without_chat_template_is_told_how_to_get_one(
    run: Run, model: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = place / "bare"
    tiny.model().save_pretrained(bare)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    capsys.readouterr()
    assert run("unlearn", "--model", str(bare)) == 2
    assert "--chat-template FILE" in errors(capsys)
    (place / "text.jsonl").write_text('{"text": "Ada has liked plums for years."}\n')
    alone = ["unlearn", "--model", str(bare), "--forget", "text.jsonl", "--out", "out", "--dry-run"]
    with pytest.warns(UserWarning, match="no --retain FILE"):
        assert cli.main(alone) == 2
    assert "give one with --chat-template FILE" in (said := errors(capsys))
    assert "rows of plain 'text' alone, to forget and to keep (without --retain FILE, included questions" in said
    (place / "keep.jsonl").write_text('{"text": "Bo has liked rye for years."}\n')
    assert cli.main([*alone, "--retain", "keep.jsonl"]) == 0
    (place / "chat.jinja").write_text(tiny.CHAT_TEMPLATE)
    assert run("unlearn", "--model", str(bare), "--chat-template", "chat.jinja", "--dry-run") == 0


MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "other shapes": ({"intermediate_size": 64}, "6 of its weights have other shapes than its config.json says, model."),
    "a size that is a text": ({"hidden_size": "x"}, "Validation error for field 'hidden_size': "),
    "no kind": ({"model_type": "nope"}, "; check its files"),
    "code of its own": (
        {"model_type": "own", "auto_map": {"AutoConfig": "x.C"}},
        "it needs code of its own, which is not run; take a model that transformers knows",
    ),
}


@pytest.mark.parametrize(("change", "said"), MODELS.values(), ids=MODELS)
def test_a_models_folder_that_does_not_fit_is_told(
    run: Run, model: Path, place: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str
) -> None:
    other = Path(shutil.copytree(model, place / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, **change}))
    assert run("unlearn", "--model", str(other), "--out", "out") == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    (other / "config.json").rename(other / "adapter_config.json")
    assert run("unlearn", "--model", str(other)) == 2
    assert "its adapter_config.json does not say which kind of adapter it is ('peft_type')" in errors(capsys)


def test_too_little_memory_or_disk_is_told_beforehand(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    little = SimpleNamespace(available=1000, free=1000, total=1000, used=0)
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: little)
        assert run("unlearn", "--out", "out") == 2
        assert "not enough memory: DualOptim+" in errors(capsys)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    assert run("unlearn", "--out", "out") == 2
    assert "not enough disk" in errors(capsys)


def test_a_model_that_knows_no_fact_is_told(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("unlearn", "--task", "facts", "--task-args", "{limit: 2}", files=False) == 2
    assert "the model knows none of the facts to forget" in errors(capsys)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dualoptim {__version__}\n"


@pytest.mark.parametrize("absent", ["yaml", "jsonargparse", "transformers", "tqdm"])
def test_without_the_extra_one_sentence_says_what_to_install(absent: str) -> None:
    code = (
        f"import sys; sys.modules[{absent!r}] = None\n"
        "from dualoptim.__main__ import main\n"
        "sys.argv = ['dualoptim', '--help']\n"
        "status = main()\n"
        "try:\n    from dualoptim import UnlearnTrainer\n"
        "except ImportError as error:\n    print(status, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    installs = f"needs the package {absent}; pip install 'dualoptim[unlearn]'"
    if absent in ("yaml", "jsonargparse"):
        assert done.stderr == f"dualoptim: error: the command line {installs}\n"
    else:
        assert f"0 UnlearnTrainer {installs}\n" in done.stdout


@pytest.mark.parametrize("source", ["raise KeyboardInterrupt", "exec('raise KeyboardInterrupt')"])
def test_an_interrupt_while_modules_are_imported_stops_as_later(source: str, tmp_path: Path) -> None:
    (tmp_path / "jsonargparse.py").write_text(source)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from dualoptim.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "env"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "dualoptim: stopped\n")


def unread(buffering: int = 1) -> Any:
    """What a command prints to when its reader has left."""
    reads, writes = os.pipe()
    os.close(reads)
    return os.fdopen(writes, "w", buffering=buffering)


@pytest.mark.parametrize("buffering", [1, -1], ids=["each line", "at the end"])
def test_a_run_goes_on_when_nobody_reads_what_it_prints(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, buffering: int
) -> None:
    with unread(buffering) as out, unread(buffering) as said:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", said)
        status = run("unlearn", "--out", "out", "--save-model", "false")
        assert sys.stdout is out
        monkeypatch.undo()
    assert status == 0
    assert (place / "out" / "results.json").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_quickstart_goes_on_unless_it_is_to_begin_anew(monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    told: list[Any] = []
    monkeypatch.setattr(cli, "_unlearn", lambda name, parsed: told.append((name, parsed.resume, parsed.overwrite)))
    assert cli.main(["quickstart", "--dry-run", *(["--overwrite"] if overwrite else [])]) == 0
    assert told == [("compare", not overwrite, overwrite)]


def test_private_scores_give_reasons_without_the_texts_of_rows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Facts):
        def __init__(self) -> None:
            self.objectives = {"forget": [question("Who is Jane Roe?", "Jane Roe", "mine.jsonl")]}

        @staticmethod
        def numbers(records: Any, retrained: Any = None) -> Numbers:
            why = f"no passage names {records[0]['answer']}"
            return Numbers(dict.fromkeys(Facts.metrics), dict.fromkeys(Facts.metrics, why))

    records = [{"set": "forget", "answer": "Jane Roe", "reply": "Jane Roe is a cook."}]
    monkeypatch.setattr("dualoptim.unlearn.evaluate", lambda config, base: (Own(), {"after": records}, None, "fp32"))
    for private, reason in (("true", "no passage names [private]"), ("false", "no passage names Jane Roe")):
        assert cli.main(["evaluate", "--private", private, "--scores", f"{private}.json"]) == 0
        text = (place / f"{private}.json").read_text()
        assert json.loads(text)["after"]["missing"]["perplexity"] == reason
        assert ("Jane" in text) == (private == "false")


def test_a_record_that_does_not_hold_is_no_success_though_nobody_reads_why(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [certificate.Check("signature", certificate.DIFFERS, "")]
    monkeypatch.setattr(certificate, "verify", lambda *arguments, **options: checks)
    with unread() as out:
        monkeypatch.setattr(sys, "stdout", out)
        status = cli.main(["verify", "record.json"])
        monkeypatch.undo()
    assert status == 1


@pytest.mark.parametrize("command", ["ls", "--help"])
def test_a_command_whose_reader_leaves_ends_without_a_word(command: str) -> None:
    with unread() as out:
        told = [sys.executable, "-m", "dualoptim", command]
        done = subprocess.run(told, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
