"""Many runs of one plan: what is crossed, shared out, taken over, and what the points say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import shlex
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout

from dualoptim import cli, fast, folder, grid, points, report, runs, starts, tasks, unlearn
from dualoptim import tiny as tiny_tier
from dualoptim.certify import measured
from dualoptim.certify.evidence import Run
from dualoptim.command_line import arguments, rerun
from dualoptim.config import METHODS as METHODS_OF
from dualoptim.config import PLAIN, RunConfig
from dualoptim.errors import UserError
from dualoptim.folder import ENTRY, LOCK, RECORDS, RESULTS
from dualoptim.grid import NOT_CROSSED, READ_BY, Shard, crossed, folder_of, settings_of
from dualoptim.models import load_model, load_tokenizer
from dualoptim.report import points as report_points
from dualoptim.resolved import resolve

from . import tiny, tofu

METHODS = ["Alternating AdamW", "DualOptim+"]
HELD_OUT = {"split": "forget01", "retain_rows": 2, "held_out_rows": 2}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(cache))
    monkeypatch.setattr("dualoptim.tasks.tofu.Tofu.reply_tokens", 24)  # a random model goes on to the last of them
    monkeypatch.setattr(tiny_tier, "WIDTH", 64)
    monkeypatch.setattr(tiny_tier, "LAYERS", 1)
    tofu.write(tmp_path / "tofu")
    tiny.save(tmp_path / "model")
    return tmp_path


def compare(*options: str, grid: dict[str, Any] | None = None, methods: list[str] = METHODS) -> int:
    arguments = ["compare", "--task", "tofu", "--data-dir", "tofu", "--task-args", json.dumps(HELD_OUT)]
    arguments += ["--model", "model", "--out", "out", "--steps", "2", "--batch-size", "2", "--fast", "true"]
    arguments += ["--methods", json.dumps(methods), "--retain-loss", "GD", "--forget-loss", "NPO"]
    return cli.main([*arguments, *(["--grid", json.dumps(grid)] if grid else []), *options])


def ends() -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in Path("out").glob(f"*/{ENTRY}")}


def test_a_grid_is_crossed_with_methods_and_seeds_and_settings_nobody_reads_make_no_runs() -> None:
    grid = {"lr": [1e-4, 1e-3], "max_update": [1.0, None, 2.0]}
    found = crossed({}, METHODS, [0], grid)
    assert [(c.optimizer, c.lr, c.max_update) for c in found] == [
        ("AdamW", 1e-4, 1.0), ("AdamW", 1e-3, 1.0),
        *(("DualOptim+", lr, bound) for lr in (1e-4, 1e-3) for bound in (1.0, None, 2.0)),
    ]  # fmt: skip
    assert settings_of(found[0], grid) == {"lr": 1e-4}
    assert settings_of(found[-1], grid) == {"lr": 1e-3, "max_update": 2.0}
    assert len({folder_of(config) for config in found}) == len(found)
    assert {folder_of(found[0]).removesuffix("seed0"), folder_of(found[0].replace(seed=7)).removesuffix("seed7")} == {
        folder_of(found[0]).removesuffix("seed0")
    }


def own_rows() -> dict[str, Any]:
    """Settings for rows of your own, with a second file to forget, whose rows are corrected."""
    for name, extra in (("forget", {}), ("corrected", {"instead": "Nobody knows."})):
        rows = [{"question": f"What does {who} hide?", "answer": f"{who} hides tea."} | extra for who in "ABCDEFGHIJ"]
        twice = [*rows, *(row | {"question": row["question"].replace("hide", "drink")} for row in rows)]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows if extra else twice)), encoding="utf-8")
    Path("retain.jsonl").write_text('{"question": "Who bakes?", "answer": "Zoe bakes."}', encoding="utf-8")
    return {"model": "model", "forget": "forget.jsonl", "retain": "retain.jsonl", "goal": "erase", "max_length": 2000}


def told(given: dict[str, Any]) -> RunConfig:
    """The run of `dualoptim unlearn` with these settings."""
    options = [f"--{k.replace('_', '-')}={v if isinstance(v, str) else json.dumps(v)}" for k, v in given.items()]
    return arguments.config_of(arguments.parse(arguments.parser("unlearn"), options))


@pytest.mark.parametrize(
    "grid",
    [
        {"forget_loss": ["GA", "NPO"], "steps": [240, 12]},
        {"ratio": ["1:1", "1:5"], "batch_size": [2, 8]},
        {"forget": ["forget.jsonl", "corrected.jsonl"]},
        {"lr_scales": ["equal", {}], "until": [0.5, None]},
        {"fast": [True, False]},
    ],
)
def test_a_point_of_a_grid_is_the_run_that_the_same_settings_give(
    grid: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualoptim.grid.NOT_CROSSED", NOT_CROSSED - {"fast"})
    given = own_rows()
    expected = []
    for optimizer in ("AdamW", "DualOptim+"):
        read = {key: each for key, each in grid.items() if optimizer in READ_BY.get(key, {optimizer})}
        for values in itertools.product(*read.values()):
            point = dict(zip(read, values, strict=True))
            expected.append(told({**given, "optimizer": optimizer, "seed": 3, **point}))
    assert crossed(given, METHODS, [3], grid) == expected


def test_a_grid_stops_by_the_goals_rules_with_its_loss_alone_and_checks_every_four_steps() -> None:
    ga, npo = crossed(own_rows(), ["Alternating AdamW"], [0], {"forget_loss": ["GA", "NPO"], "steps": [240]})
    assert (ga.until, ga.keep_at_least, ga.pause, ga.curve_points) == (None, None, False, 60)
    assert (npo.until, npo.keep_at_least, npo.pause, npo.curve_points) == (0.15, 0.8, True, 60)
    one, five = crossed(own_rows(), ["DualOptim+"], [0], {"ratio": ["1:1", "1:5"]})
    assert (one.steps, five.steps) == (2 * 24, 6 * 24)  # as many that forget
    without = {key: value for key, value in own_rows().items() if key != "forget"}
    (whole,) = crossed(without, ["DualOptim+"], [0], {"forget": ["corrected.jsonl"]})
    assert (whole.forget_loss, whole.retain_loss, whole.ratio) == ("DPO", "KL", "1:2")


def test_rows_are_read_once_for_all_runs_that_train_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given, read = own_rows(), []
    monkeypatch.setattr(tasks, "load", lambda config, load=tasks.load: (read.append(config.forget), load(config))[1])
    grid = {"forget": ["forget.jsonl", "corrected.jsonl"], "lr": [1e-3, 1e-4], "steps": [12, 24]}
    assert len(crossed(given, METHODS, [0, 1], grid)) == 32
    assert read == ["forget.jsonl", "corrected.jsonl"]


def test_a_goal_that_a_loss_cannot_reach_is_asked_of_no_run_of_a_grid(capsys: pytest.CaptureFixture[str]) -> None:
    given = {**own_rows(), "goal": "refuse"}
    options = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    assert cli.main(["compare", *options, "--grid", "{forget_loss: [IDK, NPO], steps: [12]}", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "until: 0.05" in shown
    assert "8 runs; the first is shown" in shown


def test_the_command_of_a_grid_makes_each_of_its_runs_again() -> None:
    grid = {"forget_loss": ["GA", "NPO"], "steps": [240, 12]}
    configs = crossed({**own_rows(), "lr": 3e-4}, METHODS, [0, 1], grid)
    done = [{"method": c.method, "seed": c.seed, "config": c.as_dict()} for c in configs if c.forget_loss == "NPO"]
    results = {"runs": done, "planned": len(configs), "plan": rerun.plan_of(configs, grid), "grid": grid}
    assert results["plan"]["varied"] == ["until", "pause", "keep_at_least", "curve_points"]
    _, *said = shlex.split(" ".join(rerun.command(results)).removeprefix("dualoptim "))
    parsed = arguments.parse(arguments.parser("compare"), said)
    assert crossed(arguments.given_of(parsed), parsed.methods, parsed.seeds, parsed.grid) == configs


def test_runs_that_end_by_other_rules_have_one_start_and_those_of_one_start_follow_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared: list[RunConfig] = []
    real = unlearn.prepare
    monkeypatch.setattr(unlearn, "prepare", lambda of: (prepared.append(of.config), real(of))[1])
    grid = {"lr": [1e-3, 1e-2], "ratio": ["1:1", "loss"], "until": [None, 0.0]}
    assert compare("--curve-points", "1", grid=grid, methods=["DualOptim+"]) == 0
    assert [config.ratio for config in prepared] == ["1:1", "loss"]
    assert len(ends()) == 8


def test_what_the_grid_says_that_an_optimizer_does_not_read_it_does_not_read() -> None:
    """`READ_BY` is what keeps runs from being done twice: each of its settings must change nothing of the others."""
    from dualoptim.resolve import optimizer_of

    others = {
        "base_betas": (0.5, 0.5),
        "max_update": None,
        "lr_scales": {"forget": 2.0},
        "base_weights": {"forget": 3.0},
    }
    assert set(others) == set(READ_BY)
    for key, readers in READ_BY.items():
        for name in ("AdamW", "DualOptim", "DualOptim+"):
            config = RunConfig(optimizer=name)
            before = optimizer_of(config, ["forget", "retain"])
            if name in readers:
                assert optimizer_of(config.replace(**{key: others[key]}), ["forget", "retain"]) != before
            else:
                assert optimizer_of(config.replace(**{key: others[key]}), ["forget", "retain"]) == before


NOT_READ: list[tuple[dict[str, Any], str, str]] = [
    ({"base_betas": (0.5, 0.5)}, "DualOptim", r"base_betas: DualOptim does not read it; leave it at \[0.9, 0.95\], or"),
    ({"max_update": None}, "AdamW", "max_update: AdamW does not read it; leave it at 1.0, or take DualOptim+"),
    ({"base_weights": {"forget": 3.0}}, "DualOptim", "base_weights: DualOptim does not read it; leave it at {}, or"),
    ({"lr_scales": "equal"}, "AdamW", "lr_scales: AdamW does not read it; leave it at {}, or take DualOptim or Dual"),
]


@pytest.mark.parametrize(("given", "optimizer", "words"), NOT_READ)
def test_a_setting_that_no_optimizer_reads_is_refused_and_compared_with_one_that_does_it_is_not(
    given: dict[str, Any], optimizer: str, words: str
) -> None:
    from dualoptim.resolve import check_read

    alone = RunConfig(**given, optimizer=optimizer)
    with pytest.raises(UserError, match=words):
        check_read([alone])
    check_read([alone, alone.replace(optimizer="DualOptim+")])
    check_read([RunConfig(optimizer=optimizer)])


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"lrr": [1.0]}, "did you mean 'lr'"),
        ({"seed": [1, 2]}, "give --seeds"),
        ({"max_update": [1.0, None]}, "none of the methods reads max_update; add one of DualOptim+"),
        ({"optimizer": ["AdamW"]}, "give --methods"),
        ({"out": ["a"]}, "out cannot be crossed"),
        ({"lr": []}, "must have a list of values"),
        ({"lr": 0.1}, "must have a list of values"),
        ({"lr": [0.1, 0.1]}, "has a value twice"),
        ({"lr": ["fast"]}, "lr must be float"),
        ({"steps": ["1:30"]}, "steps must be int, but is '1:30'"),
        ({"weights": [{"forget": "1:30"}]}, "weights must be .*, but is {'forget': '1:30'}"),
    ],
)
def test_a_grid_that_cannot_be_is_told(grid: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        crossed({}, ["Alternating AdamW"], [0], grid)


def test_each_run_of_a_grid_needs_the_memory_of_what_it_trains_itself() -> None:
    plain = RunConfig(
        model="model", task="tofu", data_dir="tofu", task_args=HELD_OUT, retain_loss="GD", forget_loss="GA"
    )
    part = plain.replace(train=r"layers\.1\.mlp")
    alone, together = ([each.needed for each in resolve(given)] for given in ([plain], [part, plain]))
    assert together[1] == alone[0]
    assert together[0]["gradients"] < alone[0]["gradients"]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", ""])
def test_a_shard_is_i_of_n(text: str) -> None:
    with pytest.raises(UserError, match="i/n"):
        Shard.read(text)


def test_shards_share_a_folder_and_end_as_one_process_does(capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"lr": [1e-3, 1e-2]}
    assert compare("--shard", "1/2", grid=grid) == 0
    assert "2 of 4 runs are finished" in " ".join(capsys.readouterr().out.split())
    half = ends()
    assert len(half) == 2
    assert compare("--shard", "2/2", grid=grid) == 0
    assert "All 4 runs are finished" in " ".join(capsys.readouterr().out.split())
    shared = ends()
    assert {name: shared[name] for name in half} == half  # as the first left them
    results = runs.read_results("out")
    assert len(results["points"]) == 4
    assert results["planned"] == 4
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert "DualOptim+, lr 0.01" in page
    assert "<svg" in page
    assert compare(grid=grid) == 2  # holds a run
    assert "already holds a run" in capsys.readouterr().err
    assert compare("--overwrite", grid=grid) == 0
    alone = ends()
    assert {name: entry["run"]["after"] for name, entry in alone.items()} == {
        name: entry["run"]["after"] for name, entry in shared.items()
    }


def test_what_is_there_is_taken_over_and_another_plan_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(grid={"lr": [1e-3]}) == 0
    for path in Path("out").glob(f"dualoptim*/{ENTRY}"):
        path.unlink()
    kept = ends()
    assert compare("--resume", grid={"lr": [1e-3]}) == 0
    assert len(ends()) == 2
    assert ends().items() > kept.items()
    capsys.readouterr()
    assert compare("--resume", grid={"lr": [1e-2]}) == 2
    assert "holds a run with other settings (lr: 0.001 there, 0.01 here)" in capsys.readouterr().err
    rows = Path("tofu/forget01.json")
    for name in ("forget01.json", "forget01_perturbed.json"):
        text = Path("tofu", name).read_text(encoding="utf-8")
        Path("tofu", name).write_text(text.replace("tea.", "rye."), encoding="utf-8")
    assert "rye" in rows.read_text(encoding="utf-8")
    assert compare("--resume", grid={"lr": [1e-3]}) == 2
    assert "holds a run of another task" in capsys.readouterr().err


def test_a_run_whose_model_could_not_be_written_is_not_finished_and_done_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    whole = ["--fast", "false", "--curve-points", "0"]
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        assert compare(*whole, grid={"lr": [1e-3]}, methods=["DualOptim+"]) == 2
    assert "by making room, and go on with --resume" in capsys.readouterr().err
    ((name, entry),) = ends().items()
    assert not Path("out", RESULTS).exists()  # no run is finished
    assert compare(*whole, "--resume", grid={"lr": [1e-3]}, methods=["DualOptim+"]) == 0
    assert ends()[name]["run"]["after"] == entry["run"]["after"]
    assert Path("out", name, "model", "config.json").exists()
    card = Path("out", name, "model", "README.md").read_text(encoding="utf-8")
    assert "unlearned with DualOptim+" in card
    assert "lr: 0.001" in card


@pytest.mark.parametrize(
    ("other", "methods"), [(["--steps", "3"], METHODS), ([], [*METHODS, "DualOptim"])], ids=["settings", "runs"]
)
def test_a_shard_that_begins_while_another_has_other_runs_is_refused(
    other: list[str], methods: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, statuses = unlearn.prepare, []

    def during(*arguments: Any) -> Any:
        monkeypatch.setattr(unlearn, "prepare", prepare)
        made = prepare(*arguments)
        statuses.append(compare("--shard", "2/2", *other, methods=methods))
        return made

    monkeypatch.setattr(unlearn, "prepare", during)
    assert compare("--shard", "1/2") == 2
    assert statuses == [0]
    assert "out out: holds a run with other settings (" in capsys.readouterr().err
    first = runs.read_results("out")
    assert first["runs"]
    assert {entry["method"] for entry in first["runs"]} <= set(methods)
    assert first["planned"] == len(methods)


def test_a_run_is_not_added_to_a_plan_at_which_another_shard_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--shard", "1/2") == 0
    more = [*METHODS, "DualOptim"]
    with FileLock(Path("out", f"{LOCK}-1-of-2")):
        assert compare("--shard", "2/2", methods=more) == 2
    assert "out out: holds a run with other settings (" in capsys.readouterr().err
    assert compare("--shard", "2/2", methods=more) == 0


def test_shards_gather_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    results_of = grid.results_of

    def alone(*arguments: Any) -> Any:
        with pytest.raises(Timeout), FileLock(Path("out", folder.TURN), timeout=0):
            pass
        return results_of(*arguments)

    monkeypatch.setattr(grid, "results_of", alone)
    assert compare("--shard", "1/2") == 0


def test_numbers_of_a_run_that_cannot_be_written_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, text: str) -> None:
        if path.name in (ENTRY, RECORDS):
            raise OSError(28, "No space left on device", str(path))
        folder.written(path, text)

    monkeypatch.setattr(runs, "written", full)
    assert compare(grid={"lr": [1e-3]}, methods=["DualOptim+"]) == 2
    said = capsys.readouterr()
    assert "p(answer)" in said.out
    assert "run.json: could not be written (No space left on device), so the numbers stand above alone" in said.err
    assert ends() == {}


def test_a_folder_is_begun_or_emptied_once_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise UserError("model: could not be loaded")

    with monkeypatch.context() as patch:
        patch.setattr(unlearn, "prepare", broken)
        assert compare(grid={"lr": [1e-3]}, methods=["DualOptim+"]) == 2
    assert not Path("out", "config.resolved.yaml").exists()
    assert compare(grid={"lr": [1e-3]}, methods=["DualOptim+"]) == 0
    said = Path("out", "env.json")
    said.write_text(said.read_text(encoding="utf-8").replace('"threads"', '"threads of then"'), encoding="utf-8")
    assert compare("--resume", grid={"lr": [1e-3]}, methods=["DualOptim+"]) == 0
    assert "threads of then" in said.read_text(encoding="utf-8")  # it tells of the processes that ran something
    (entry,) = ends().values()
    assert entry["run"]["environment"]["threads"] == torch.get_num_threads()  # the run keeps its own
    assert "command" not in entry["run"]["environment"]
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(unlearn, "prepare", broken)
        assert compare("--overwrite", grid={"lr": [1e-2]}, methods=["DualOptim+"]) == 2
    assert "could not be loaded" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
    assert compare("--overwrite", grid={"lr": [1e-2]}, methods=["DualOptim+"]) == 0
    assert [entry["run"]["config"]["lr"] for entry in ends().values()] == [1e-2]


def test_a_run_of_a_grid_goes_on_from_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def ended(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps.append(state.global_step)
        if steps == [1, 2, 3]:
            raise KeyboardInterrupt

    monkeypatch.setattr("dualoptim.one_run.watch.Watch.on_step_end", ended)
    options = ["--steps", "4", "--save-every", "2"]
    assert compare(*options, grid={"lr": [1e-3]}, methods=["DualOptim+"]) == 130
    assert compare(*options, "--resume", grid={"lr": [1e-3]}, methods=["DualOptim+"]) == 0
    assert steps == [1, 2, 3, 3, 4]


def test_a_folder_of_another_kind_of_runs_is_refused_and_keeps_its_results(capsys: pytest.CaptureFixture[str]) -> None:
    plain = ["compare", "--task", "tofu", "--data-dir", "tofu", "--task-args", json.dumps(HELD_OUT), "--model", "model"]
    plain += ["--steps", "2", "--batch-size", "2", "--save-model", "false", "--curve-points", "0"]
    plain += ["--methods", json.dumps(METHODS), "--retain-loss", "GD", "--forget-loss", "NPO", "--out", "out"]
    assert cli.main(plain) == 0
    results = Path("out", RESULTS).read_bytes()
    capsys.readouterr()
    assert cli.main([*plain, "--shard", "1/2"]) == 2
    said = "out out: holds runs of unlearn or compare, whose results those of runs of compare with --grid, --shard or"
    assert said in " ".join(capsys.readouterr().err.split())
    assert cli.main([*plain, "--resume", "--grid", '{"lr": [1e-3]}']) == 2
    assert Path("out", RESULTS).read_bytes() == results
    assert cli.main([*plain, "--shard", "1/2", "--out", "grid"]) == 0
    results = Path("grid", RESULTS).read_bytes()
    capsys.readouterr()
    assert cli.main([*plain, "--resume", "--out", "grid"]) == 2
    assert "out grid: holds runs of compare with --grid" in capsys.readouterr().err
    assert Path("grid", RESULTS).read_bytes() == results


@pytest.mark.parametrize(
    ("left", "kind"),
    [
        ([], None),
        (["config.resolved.yaml"], None),
        (["config.resolved.yaml", "results.json"], folder.RUNS),
        (["dualoptim-plus-seed0/records.jsonl"], folder.RUNS),
        (["dualoptim-plus-seed0/part1/records.jsonl"], folder.PARTS),
        (["dualoptim-plus-0123456789ab-seed0/run.json", "results.json"], folder.GRID),
        (["dualoptim-plus-trial001-seed0/run.json", "space.yaml"], folder.SEARCH),
    ],
)
def test_the_kind_of_a_folder_is_known_by_what_it_holds(tmp_path: Path, left: list[str], kind: str | None) -> None:
    for name in left:
        path = tmp_path / "was" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert folder.kind_of(tmp_path / "was") == kind


def test_a_whole_run_and_shards_do_not_share_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    with FileLock(Path("out", f"{LOCK}-1-of-2")):
        assert compare() == 2
        assert "another process is at work" in capsys.readouterr().err
        assert compare("--shard", "1/2") == 2
        assert compare("--shard", "2/2") == 0
    with FileLock(Path("out", f"{LOCK}-1-of-3")):  # its runs are those of 1/2, too
        assert compare("--shard", "2/2") == 2
    with FileLock(Path("out", LOCK)):
        assert compare("--shard", "1/2") == 2
    capsys.readouterr()
    assert compare("--shard", "1/2", "--overwrite") == 2
    assert "other shards may be at work" in capsys.readouterr().err


def test_starts_of_their_own_are_loaded_for_each_and_rows_differ(capsys: pytest.CaptureFixture[str]) -> None:
    other = {**HELD_OUT, "part": 2}
    assert compare(grid={"task_args": [HELD_OUT, other]}, methods=["DualOptim+"]) == 0
    first, second = (
        {line["question"] for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
        for path in sorted(Path("out").glob("*/records.jsonl"))
    )
    assert first != second
    results = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    heads, body = report_points.table(results)
    at = 1 + results["plane"].index("forget_probability")
    names = [f"task_args {entry['config']['task_args']}" for entry in results["runs"]]
    assert [row[0] for row in body] == [f"{what}, {name}" for name in names for what in ("before", "DualOptim+")]
    before = [f"{entry['before']['forget_probability']:.3f}" for entry in results["runs"]]
    assert [row[at] for row in body[::2]] == before
    assert heads[at].startswith("p(answer), forget")
    assert [point["front"] for point in results["points"]] == [True, True], "each is alone on its start"
    assert not report.headline(results)
    assert len(report_points.planes(results)) == 2


def test_each_run_of_a_grid_is_scored_in_its_own_precision_and_the_page_says_so() -> None:
    assert compare("--save-model", "false", grid={"score_bf16": [False, True]}, methods=["DualOptim+"]) == 0
    results = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    assert [(run["config"]["score_bf16"], run["scored_in"]) for run in results["runs"]] == [
        (False, "fp32"),
        (True, "bf16"),
    ]
    assert any("Not all was scored in the same precision (bf16, fp32)" in note for note in results["notes"])


def test_runs_that_measure_different_things_are_on_one_page(capsys: pytest.CaptureFixture[str]) -> None:
    less = {key: value for key, value in HELD_OUT.items() if key != "held_out_rows"}
    assert compare(grid={"task_args": [less, HELD_OUT]}, methods=["DualOptim+"]) == 0
    results = runs.read_results("out")
    assert set(results["metrics"]) == {"forget_probability", "retain_probability", "held_out_probability"}
    one, other = results["runs"]
    assert one["before"]["held_out_probability"] is one["after"]["held_out_probability"] is None
    assert one["not_computed"] == {"held_out_probability": "this run's settings do not ask for it"}
    assert other["after"]["held_out_probability"] is not None
    assert results["plane"] is None
    assert results["forgets"]
    assert any("different metrics of what is forgotten and kept" in note for note in results["notes"])
    assert compare("--resume", grid={"task_args": [less, HELD_OUT]}, methods=["DualOptim+"]) == 0
    assert cli.main(["report", "out"]) == 0


def test_what_went_wrong_names_the_settings_of_its_run_and_its_record_has_no_other_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from dualoptim.certify.certificate import DIFFERS, certify, verify

    fell = iter([[], ["it says nothing"]])
    monkeypatch.setattr("dualoptim.one_run.train.collapse", lambda *_: next(fell))
    assert compare(grid={"lr": [1e-6, 1e-2]}, methods=["Alternating AdamW"]) == 0
    (said,) = (note for note in runs.read_results("out")["notes"] if "fell apart" in note)
    assert said == "Alternating AdamW, seed 0, lr 0.01: the model fell apart: it says nothing."
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    Path("key.pem").write_bytes(Ed25519PrivateKey.generate().private_bytes(*form))
    Path("key.pem").chmod(0o600)
    own = "Alternating AdamW, seed 0: the model fell apart: it says nothing."
    for number, expected in ((1, []), (2, [own])):
        record, path = certify("out", "key.pem", number=number)
        assert [remark for remark in record["remarks"] if "fell apart" in remark] == expected
        assert DIFFERS not in {check.state for check in verify(path)}


def test_counts_that_differ_stand_with_their_runs() -> None:
    about = {"private": False, "metrics": {"share": {}}, "curves": {}, "scores": {}, "notes": ["a"], "plane": None}
    other = {**about, "notes": ["b"], "metrics": {"share": {}, "more": {}}}
    entry = {"before": {"share": 0.5}, "after": {"share": 0.1}}
    longer = {when: {**entry[when], "more": 1.0} for when in entry}
    both = [
        {**about, "counts": {"share": 4, "same": 2}, "run": entry},
        {**other, "counts": {"share": 9, "same": 2}, "run": longer},
    ]
    made = grid.together(both)
    assert (made["counts"], made["notes"], list(made["metrics"])) == ({"same": 2}, ["a", "b"], ["share", "more"])
    assert [grid.complete(each, made)["counts"] for each in both] == [{"share": 4}, {"share": 9}]
    assert grid.complete(both[0], made)["after"] == {"share": 0.1, "more": None}


def test_a_ratio_in_a_grid_is_a_ratio_and_no_number_to_base_60() -> None:
    options = [
        "--grid",
        '{ratio: ["1:1", "1:5"], lr: [1e-4], max_update: [null, 1.0], base_weights: [equal, {forget: 3}]}',
    ]
    parsed = arguments.parse(arguments.parser("compare"), options)
    assert parsed.grid == {
        "ratio": ["1:1", "1:5"], "lr": [1e-4], "max_update": [None, 1.0], "base_weights": ["equal", {"forget": 3}],
    }  # fmt: skip
    one = {}, ["DualOptim+"], [0]
    assert [config.ratio for config in crossed(*one, {"ratio": parsed.grid["ratio"]})] == ["1:1", "1:5"]
    assert [config.train for config in crossed(*one, {"train": ["#", "&a", None]})] == ["#", "&a", None]


def test_a_dry_run_counts_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--dry-run", "--shard", "2/3", grid={"lr": [1e-3, 1e-2]}) == 0
    assert "4 runs, 1 of them here" in capsys.readouterr().out
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("grid", "options", "words"),
    [
        ({"forget_loss": ["NPO", "Nonsense"]}, [], "Nonsense"),
        ({"lr": [1e-3, -1]}, [], "lr must be"),
        ({"lr": [1e-3]}, ["--shard", "1/2", "--overwrite"], "other shards may be at work"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(
    grid: dict[str, Any], options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for dry in (["--dry-run"], []):
        assert compare(*options, *dry, grid=grid, methods=["DualOptim+"]) == 2
        told.append(capsys.readouterr().err.strip().splitlines()[-1])
    assert words in told[0]
    assert told[0] == told[1]
    assert not Path("out").exists()


def test_fast_numbers_are_the_answers_probabilities_and_held_out_rows_are_trained_on_by_nobody() -> None:
    config = RunConfig(task="tofu", data_dir="tofu", task_args=HELD_OUT, model="model", fast=True, save_model=False)
    task = tasks.load(config)
    assert isinstance(task, fast.ByProbability)
    whole = tasks.load(config.replace(fast=False))
    held_out = {row.question for row in whole.quick()["held_out"]}
    assert len(held_out) == 2
    trained = {row.question for rows in task.objectives.values() for row in rows}
    assert not held_out & trained
    assert held_out < {row.question for row in task.known()}
    model, tokenizer = load_model("model"), load_tokenizer("model")
    slow = whole.numbers(whole.score(model, tokenizer)).numbers
    quick = task.numbers(task.score(model, tokenizer)).numbers
    assert set(quick) == {"forget_probability", "retain_probability", "held_out_probability"}
    for name in ("forget_probability", "held_out_probability"):
        assert quick[name] == pytest.approx(slow[name], rel=1e-5)


def test_a_record_finds_the_folder_of_a_run_among_many() -> None:
    from dualoptim.certify import evidence

    assert compare(grid={"lr": [1e-3, 1e-2]}, methods=["DualOptim+"]) == 0
    assert {run.own.name for run in evidence.find("out")} == set(ends())


def test_a_private_plan_leaves_no_text_of_rows() -> None:
    assert compare("--private", "true", "--fast", "false", "--save-model", "false", grid={"lr": [1e-3]}) == 0
    rows = [json.loads(line) for line in Path("tofu/forget01.json").read_text(encoding="utf-8").splitlines()]
    for path in Path("out").rglob("*"):
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not any(row["question"] in text or row["answer"] in text for row in rows), path


def test_own_rows_are_settled_once_for_each_start_and_need_no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.jsonl").write_text('{"question": "What does Ada grow?", "answer": "Plums."}\n', encoding="utf-8")
    Path("keep.jsonl").write_text(
        "".join(
            f'{{"question": "What does {n} sell?", "answer": "{n} sells tea."}}\n' for n in ("Ben", "Cleo", "Dora")
        ),
        encoding="utf-8",
    )
    seen: list[Any] = []
    prepare = unlearn.prepare

    def watched(resolved: Any, *rest: Any) -> Any:
        assert not resolved.task.task.checked, "settled before"
        seen.append(resolved.task)
        return prepare(resolved, *rest)

    monkeypatch.setattr(unlearn, "prepare", watched)
    own = ["compare", "--forget", "mine.jsonl", "--retain", "keep.jsonl", "--general", "false", "--model", "model"]
    own += ["--steps", "2", "--batch-size", "2", "--fast", "true", "--out", "own", "--methods", '["DualOptim+"]']
    assert cli.main([*own, "--grid", json.dumps({"retain_loss": ["GD", "KL"], "lr": [1e-3]})]) == 0
    assert len(seen) == 2  # KL needs the model as it was beside it
    assert seen[0] is not seen[1]
    assert len(runs.read_results("own")["points"]) == 2


def test_fast_saves_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--save-model", "true") == 2
    assert "add --save-model false" in capsys.readouterr().err


def test_more_held_out_than_there_are_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--task-args", json.dumps({**HELD_OUT, "held_out_rows": 3})) == 2
    assert "held_out_rows 3 of rows that are not kept, but there are 2" in capsys.readouterr().err


# Points


def run_of(method: str, seed: int, after: dict[str, float], folder: Path, **settings: Any) -> points.Run:
    entry = {"method": method, "seed": seed, "after": after, "seconds": 2.0 + seed, "optimizer_state_bytes": 8}
    return entry, settings, folder


def test_points_are_means_over_seeds_and_the_front_is_what_no_other_beats(tmp_path: Path) -> None:
    plane = ("forget_probability", "held_out_probability")
    values = {"A": [(0.1, 0.8), (0.3, 0.8)], "B": [(0.1, 0.7), (0.3, 0.9)], "C": [(0.2, 0.7)], "D": [(0.0, 0.1)]}
    found = [
        run_of(name, seed, dict(zip(plane, pair, strict=True)), tmp_path)
        for name, pairs in values.items()
        for seed, pair in enumerate(pairs)
    ]
    made = {point["method"]: point for point in points.points_of(found, plane)}
    assert made["A"]["values"]["forget_probability"] == pytest.approx(0.2)
    assert made["A"]["seeds"] == [0, 1]
    assert made["A"]["seconds"] == 2.5
    assert {name for name, point in made.items() if point["front"]} == {"A", "B", "D"}  # A and B are one place
    assert made["A"]["intervals"]["forget_probability"] == pytest.approx([0.1, 0.3])  # of seeds alone: no records
    assert made["C"]["intervals"] == {}  # nor seeds


def test_a_point_is_beaten_by_points_of_its_own_start_alone(tmp_path: Path) -> None:
    plane = ("forget_probability", "held_out_probability")
    found = []
    for model, lr, at in (("m", 1, (0.1, 0.9)), ("m", 2, (0.2, 0.8)), ("n", 1, (0.3, 0.7)), ("n", 2, (0.4, 0.6))):
        entry, _, folder = run_of("A", 0, dict(zip(plane, at, strict=True)), tmp_path)
        found.append(({**entry, "config": {"model": model, "lr": lr}}, {"model": model, "lr": lr}, folder))
    assert [point["front"] for point in points.points_of(found, plane)] == [True, False, True, False]


def test_what_methods_differ_in_makes_no_other_start() -> None:
    known = {field.name for field in dataclasses.fields(RunConfig)}
    assert known >= starts.OF_TRAINING | starts.SAME_BEFORE
    assert {key for settings in [PLAIN, *METHODS_OF.values()] for key in settings} <= starts.OF_TRAINING
    entry = {"config": RunConfig().as_dict()}
    for key, value in {"model": "m", "task_args": {"part": 1}, "score_bf16": True, "max_length": 9}.items():
        assert starts.key({"config": RunConfig(**{key: value}).as_dict()}) != starts.key(entry)
    assert starts.key({**entry, "part": 2}) != starts.key(entry)
    assert starts.key({"config": RunConfig(lr=1.0, until=0.5, attacks=["leak"], out="b").as_dict()}) == starts.key(
        entry
    )


def test_the_interval_covers_what_it_should_and_grows_with_clusters_alike() -> None:
    """Of means of 20 clusters whose truth is known, 95 in 100 intervals hold it; rows alike in a cluster count once."""
    draw = random.Random(0)
    held = 0
    for _ in range(200):
        values = [draw.random() for _ in range(20)]
        low, high = points.interval([{i: (value * 5, 5) for i, value in enumerate(values)}])
        held += low <= 0.5 <= high
    assert 180 <= held <= 199
    rows = [draw.random() for _ in range(20)]
    one_each = points.interval([{i: (value, 1) for i, value in enumerate(rows)}])
    alike = points.interval([{i: (value * 10, 10) for i, value in enumerate(rows)}])
    assert alike == pytest.approx(one_each)
    deviation = np.std(rows) / math.sqrt(20)
    assert one_each[1] - one_each[0] == pytest.approx(2 * 1.96 * deviation, rel=0.15)


def test_seeds_that_differ_widen_the_interval() -> None:
    steady = points.interval([dict.fromkeys(range(4), (0.5, 1))] * 3)
    assert steady == (0.5, 0.5)
    low, high = points.interval([dict.fromkeys(range(4), (value, 1)) for value in (0.2, 0.5, 0.8)])
    assert (low, high) == pytest.approx((0.2, 0.8), abs=0.11)
    assert high - low > 0.3


def test_more_seeds_on_the_same_rows_narrow_no_interval_and_on_others_do() -> None:
    draw = random.Random(0)
    rows = [draw.random() for _ in range(40)]
    low, high = points.interval([{i: (value, 1) for i, value in enumerate(rows)}])
    for count in (2, 4, 10):
        same = points.interval([{i: (value, 1) for i, value in enumerate(rows)}] * count)
        assert same == pytest.approx((low, high))
        backward = {i: (rows[i], 1) for i in reversed(range(40))}
        turned = points.interval([dict(sorted(backward.items())), *[backward] * count])
        assert turned == pytest.approx((low, high))
    others = points.interval([{(seed, i): (value, 1) for i, value in enumerate(rows)} for seed in range(4)])
    assert others[1] - others[0] < 0.8 * (high - low)


def test_seeds_of_the_same_rows_are_drawn_together_and_of_others_apart(tmp_path: Path) -> None:
    found: dict[str, list[points.Run]] = {}
    for what in ("same", "other", "private"):
        for seed in range(4):
            folder = tmp_path / f"{what}{seed}"
            folder.mkdir()
            lines = [
                {"when": "after", "set": "forget", "nll": -math.log(p), **({} if what == "private" else text)}
                for i, p in enumerate([0.1, 0.9, 0.3, 0.5])
                for text in [{"question": f"{i} of {seed if what == 'other' else 0}", "answer": "a"}]
            ]
            (folder / "records.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
            found.setdefault(what, []).append(run_of("A", seed, {"forget_probability": 0.45}, folder))
    widths = {}
    for what, part in found.items():
        (point,) = points.points_of(part, ("forget_probability", "held_out_probability"))
        low, high = point["intervals"]["forget_probability"]
        widths[what] = high - low
    assert widths["same"] == pytest.approx(widths["private"])
    assert widths["other"] < 0.85 * widths["same"]


def test_intervals_come_from_the_records_of_each_run(tmp_path: Path) -> None:
    lines = [
        {"when": when, "set": "forget", "cluster": f"{i // 2}", "nll": -math.log(p)}
        for when, shift in (("before", 0.4), ("after", 0.0))
        for i, p in enumerate([0.1 + shift, 0.1 + shift, 0.5 + shift, 0.5 + shift])
    ]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    after = {"forget_probability": 0.3, "held_out_probability": None}
    (point,) = points.points_of([run_of("A", 0, after, tmp_path)], ("forget_probability", "held_out_probability"))
    assert point["intervals"]["forget_probability"] == pytest.approx([0.1, 0.5])
    assert "held_out_probability" not in point["intervals"]
    assert not point["front"]  # a point without a number is on none


def test_a_share_has_the_interval_of_its_questions_and_of_its_seeds(tmp_path: Path) -> None:
    plane = ("forget_accuracy", "unseen_accuracy")
    found = [
        run_of("A", seed, {plane[0]: 0.0, plane[1]: share}, tmp_path) for seed, share in enumerate((0.2, 0.5, 0.8))
    ]
    (alone,) = points.points_of(found[:1], plane, {plane[0]: 40, plane[1]: 10})
    # Wilson's for 0 of 40 is 0 to z²/(40 + z²), z = 1.96; for 2 of 10 see Newcombe 1998's formula.
    assert alone["intervals"][plane[0]] == pytest.approx([0.0, 3.8415 / 43.8415], abs=1e-4)
    assert alone["intervals"][plane[1]] == pytest.approx([0.0567, 0.5098], abs=1e-4)
    (all_of_them,) = points.points_of(found, plane, {plane[0]: 40, plane[1]: 1000})
    assert all_of_them["intervals"][plane[0]] == alone["intervals"][plane[0]]  # no narrower than of one seed
    low, high = all_of_them["intervals"][plane[1]]
    assert (low, high) == pytest.approx((0.2, 0.8), abs=0.06)  # the seeds', far wider than the questions'


def test_rows_without_clusters_count_each_and_a_mean_of_something_else_has_no_interval(tmp_path: Path) -> None:
    draw = random.Random(1)
    rows = [draw.random() for _ in range(50)]
    lines = [{"when": "after", "set": "forget", "rouge_l": value} for value in rows]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    plane = ("forget_rouge_l", "retain_rouge_l")
    (point,) = points.points_of([run_of("A", 0, {plane[0]: float(np.mean(rows)), plane[1]: 0.5}, tmp_path)], plane)
    low, high = point["intervals"][plane[0]]
    assert high - low == pytest.approx(2 * 1.96 * np.std(rows) / math.sqrt(50), rel=0.15)
    (point,) = points.points_of([run_of("A", 0, {plane[0]: 0.9, plane[1]: 0.5}, tmp_path)], plane)
    assert point["intervals"] == {}


@pytest.mark.parametrize("text", ["[]", "{}", '{"run": null}', '{"run": {"config": {}}}', '{"run"', "null"])
def test_a_damaged_entry_of_a_run_is_told_in_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / ENTRY).write_text(text)
    with pytest.raises(
        UserError, match=rf"one/{ENTRY}: is damaged \(.+\); remove the folder .*one and go on with --resume"
    ):
        grid.results_of(tmp_path, {"one": SimpleNamespace(identity={})}, {})  # type: ignore[dict-item]


@pytest.mark.parametrize("task", ["tofu", "lume", "muse", None, "facts"])
def test_the_numbers_of_a_fast_run_are_made_again_of_its_records(
    task: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"set": name, "question": f"Q{i}", "answer": "A", "nll": i / 9, "cluster": str(i)}
        for name in ("forget", "held_out")
        for i in range(4)
    ]
    runs.write_records(tmp_path / RECORDS, rows, rows, None, private=False)
    made, shown = fast.ByProbability.numbers(rows).numbers, fast.metrics_of(["forget", "held_out"])
    entry = {
        "method": "AdamW", "seed": 0, "config": {"task": task, "fast": True}, "before": made, "after": made,
        "curve": [], "samples": [], "seconds": 1.0, "optimizer_state_bytes": 1, "peak_memory_bytes": 1,
    }  # fmt: skip
    results = {"schema": 1, "task": task or "files", "model": "m", "followed": "p", "runs": [entry],
               "metrics": {name: metric._asdict() for name, metric in shown.items()}}  # fmt: skip
    runs.write_json(tmp_path / RESULTS, results)
    remarks: list[str] = []
    measured.numbers(Run(tmp_path, tmp_path, results, entry), remarks)
    assert remarks == []
    assert cli.main(["evaluate", "--from-records", str(tmp_path)]) == 0
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "p(answer), forget", "p(answer), held out",
    ]  # fmt: skip


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c"])
def test_a_line_separator_in_a_row_costs_no_interval(tmp_path: Path, separator: str) -> None:
    rows = [
        {"set": "forget", "question": f"Who{separator}is {i}?", "answer": "A baker.", "nll": i / 9} for i in range(9)
    ]
    runs.write_records(tmp_path / RECORDS, rows, rows, None, private=False)
    value = float(np.mean([math.exp(-row["nll"]) for row in rows]))
    plane = ("forget_probability", "retain_probability")
    (point,) = points.points_of([run_of("A", 0, {plane[0]: value}, tmp_path)], plane)
    assert "forget_probability" in point["intervals"]


@pytest.mark.parametrize(
    "text",
    [b'{"when": "after", "set"', b"[1]\n", b"\xff\n", b'{"when": "after", "set": "forget", "nll": -1e9}\n', None],
)
def test_records_that_cannot_be_read_give_no_interval_and_no_error(tmp_path: Path, text: bytes | None) -> None:
    if text is not None:
        (tmp_path / RECORDS).write_bytes(text)
    plane = ("forget_probability", "retain_probability")
    (point,) = points.points_of([run_of("A", 0, {plane[0]: 0.5}, tmp_path)], plane)
    assert point["intervals"] == {}


def test_the_draws_of_an_interval_are_the_same_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(2)
    names = [range(90), range(90), range(40), range(90)]
    seeds = [{i: (draw.random() * 3, draw.randrange(1, 4)) for i in part} for part in names]
    whole = points.interval(seeds)
    assert whole == pytest.approx((0.6466271805657985, 0.8340765769159603), rel=1e-12)  # as drawn all at once
    for size in (1, 1000, 90 * points.RESAMPLES):
        monkeypatch.setattr(points, "DRAWN_AT_ONCE", size)
        assert points.interval(seeds) == whole


def test_the_memory_of_an_interval_does_not_grow_with_the_resamples_of_all_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(points, "DRAWN_AT_ONCE", 10_000)
    clusters = {i: (float(i % 2), 1) for i in range(2000)}
    tracemalloc.start()
    points.interval([clusters])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 5e6  # 2,000 resamples of 2,000 clusters, each a number and a pair, are 96e6


def test_the_records_of_a_run_are_read_once_for_all_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(name, i) for name in ("forget", "retain") for i in (0, 1)]
    lines = [{"when": "after", "set": name, "rouge_l": float(i)} for name, i in rows]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    reads: list[int] = []
    monkeypatch.setattr(points, "json_lines", lambda text, read=points.json_lines: (reads.append(1), read(text))[1])
    plane = ("forget_rouge_l", "retain_rouge_l")
    (point,) = points.points_of([run_of("A", 0, dict.fromkeys(plane, 0.5), tmp_path)], plane)
    assert point["intervals"] == {name: [0.0, 1.0] for name in plane}
    assert len(reads) == 1
