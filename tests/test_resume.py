"""Checkpoints that are whole or not there, and what a run goes on from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dualoptim import checkpoints
from dualoptim.data import question
from dualoptim.errors import UserError
from dualoptim.schedule import by_turns
from dualoptim.trainer import UnlearnTrainer
from dualoptim.training import callbacks as trainer_callbacks

from . import test_trainer as made

TURNS = by_turns({"forget": 1, "retain": 1}, 4, 8)
SAVES = {"save_strategy": "steps", "save_steps": 2}


class _Killed(BaseException):
    pass


def run(folder: Path, **arguments: Any) -> UnlearnTrainer:
    return made.trainer(folder, TURNS, **{**SAVES, **arguments})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run(folder).train()
    return folder


@pytest.fixture
def stopped(saved: Path, tmp_path: Path) -> Path:
    """A folder with the checkpoints of the steps 2, 4, 6 and 8."""
    return Path(shutil.copytree(saved, tmp_path / "stopped"))


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    whole = run(tmp_path_factory.mktemp("whole"), save_strategy="no")
    whole.train()
    return made.weights(whole)


def test_a_checkpoint_is_sealed_and_goes_on_to_the_bit(stopped: Path, never_stopped: torch.Tensor) -> None:
    assert [path.name for path in checkpoints.numbered(stopped)] == [f"checkpoint-{n}" for n in (8, 6, 4, 2)]
    assert all(checkpoints.flaw(path) is None for path in checkpoints.numbered(stopped))
    assert not (stopped / checkpoints.PARTIAL).exists()
    for step in (2, 4, 6):
        again = run(stopped, save_strategy="no")
        again.train(str(stopped / f"checkpoint-{step}"))
        assert torch.equal(made.weights(again), never_stopped)


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("step", [2, 4, 8])
def test_what_was_not_logged_yet_is_in_a_checkpoint(tmp_path: Path, step: int, restored: bool) -> None:
    def trained(folder: Path, begun: str | None) -> tuple[UnlearnTrainer, list[dict[str, Any]]]:
        made_now = run(folder, logging_steps=3, restore_callback_states_from_checkpoint=restored)
        made_now.add_callback(trainer_callbacks.Diagnose(made_now, 4))
        made_now.train(begun)
        return made_now, [entry for entry in made_now.state.log_history if "loss" in entry]

    whole, logged = trained(tmp_path, None)
    assert [entry["step"] for entry in logged] == [3, 6]
    assert any(key.startswith("cosine") for key in logged[1])
    resumed, again = trained(tmp_path, str(tmp_path / f"checkpoint-{step}"))
    assert again == logged
    assert resumed.diagnostics[-1] == whole.diagnostics[-1]
    assert list(resumed.diagnostics[-1]["layers"]) == list(whole.diagnostics[-1]["layers"])
    whole.train()
    assert [entry["step"] for entry in whole.state.log_history if "loss" in entry] == [3, 6]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
                                  "trainer_state.json", "manifest.json"])  # fmt: skip
@pytest.mark.parametrize("harm", [cut, flipped, Path.unlink])
def test_one_that_is_not_whole_is_passed_over(
    stopped: Path, never_stopped: torch.Tensor, name: str, harm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (8, 6):
        harm(stopped / f"checkpoint-{step}" / name)
    again = run(stopped, save_strategy="no")
    with pytest.raises(UserError, match=f"checkpoint-8: .*{name}"):
        again.train(str(stopped / "checkpoint-8"))
    begun: list[int] = []
    again.add_callback(_First(begun))
    again.train(True)
    assert begun == [4]
    assert "checkpoint-8 is passed over" in caplog.text
    assert torch.equal(made.weights(again), never_stopped)


def test_no_bit_of_a_manifest_can_flip_unseen(stopped: Path) -> None:
    folder = stopped / "checkpoint-8"
    known = json.loads((folder / "manifest.json").read_text())["fingerprints"]
    whole = (folder / "manifest.json").read_bytes()
    for at in range(0, len(whole), 5):
        (folder / "manifest.json").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        # Spaces between values, and the name under which the sum stands, say nothing.
        assert checkpoints.flaw(folder) is not None or checkpoints.other(folder, known) is None, at


@pytest.mark.parametrize(
    "files", [3, {"config.json": 8}, {"config.json": {"sha256": "x"}}, {"config.json": {"bytes": []}}]
)
def test_a_manifest_that_is_none_is_of_no_checkpoint(stopped: Path, files: Any) -> None:
    (stopped / "checkpoint-8" / "manifest.json").write_text(json.dumps({"files": files, "fingerprints": {}}))
    assert "no readable manifest.json" in str(checkpoints.flaw(stopped / "checkpoint-8"))


class _First(made.TrainerCallback):
    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


def test_one_of_another_run_is_refused(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="another schedule"):
        run(stopped, seed=1).train(True)
    monkeypatch.setattr(made, "RETAIN", [*made.RETAIN[:-1], question("Who is 7?", "Somebody else.")])
    with pytest.raises(UserError, match="another set of rows"):
        run(stopped).train(True)


def test_one_without_the_optimizer_is_refused(tmp_path: Path) -> None:
    run(tmp_path, save_only_model=True).train()
    with pytest.raises(UserError, match="without the optimizer's states"):
        run(tmp_path).train(str(tmp_path / "checkpoint-8"))
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        run(tmp_path).train(True)


def test_rotation_goes_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = checkpoints.put

    def clock_put_back(beside: Path, folder: Path) -> None:
        put(beside, folder)
        earlier = 2e9 - int(folder.name.split("-")[1])
        os.utime(folder, (earlier, earlier))

    monkeypatch.setattr(checkpoints, "put", clock_put_back)
    run(tmp_path, save_total_limit=2).train()
    assert [path.name for path in checkpoints.numbered(tmp_path)] == ["checkpoint-8", "checkpoint-6"]


def test_one_that_was_passed_over_is_not_kept_in_place_of_a_new_one(stopped: Path) -> None:
    flipped(stopped / "checkpoint-8" / "optimizer.pt")
    again = run(stopped, save_total_limit=1)
    seen: list[list[str]] = []

    class Look(made.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append([path.name for path in checkpoints.numbered(stopped)])

    again.add_callback(Look())
    again.train(str(stopped / "checkpoint-4"))
    assert seen == [["checkpoint-8", "checkpoint-6"], ["checkpoint-8"]]
    assert checkpoints.flaw(stopped / "checkpoint-8") is None


def test_killed_before_it_was_rotated(stopped: Path) -> None:
    run(stopped, save_total_limit=1).train(True)
    assert [path.name for path in checkpoints.numbered(stopped)] == ["checkpoint-8"]


@pytest.mark.parametrize("at", ["save_model", "_save_rng_state"])
def test_killed_while_it_is_written(
    tmp_path: Path, never_stopped: torch.Tensor, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    first = run(tmp_path, save_total_limit=1)
    whole = getattr(first, at)

    def killed(*arguments: Any, **options: Any) -> None:
        if first.state.global_step == 6:
            raise _Killed
        whole(*arguments, **options)

    monkeypatch.setattr(first, at, killed)
    with pytest.raises(_Killed):
        first.train()
    assert [path.name for path in checkpoints.numbered(tmp_path)] == ["checkpoint-4"]
    again = run(tmp_path, save_total_limit=1)
    again.train(True)
    assert torch.equal(made.weights(again), never_stopped)
    assert [path.name for path in checkpoints.numbered(tmp_path)] == ["checkpoint-8"]


def test_a_full_disk_costs_the_checkpoint_alone(
    tmp_path: Path, never_stopped: torch.Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = run(tmp_path)

    def no_space(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(full, "_save_rng_state", no_space)
    full.train()
    assert torch.equal(made.weights(full), never_stopped)
    assert not checkpoints.numbered(tmp_path)
    assert "could not be written" in caplog.text
    assert "No space left" in caplog.text


def test_a_contradiction_in_the_generation_config_costs_no_checkpoint(tmp_path: Path) -> None:
    own = run(tmp_path)
    own.model.generation_config.temperature = 0.6  # transformers refuses to write it without do_sample
    own.train()
    assert checkpoints.numbered(tmp_path)


def test_a_checkpoints_config_lets_the_model_use_its_cache_as_the_start_did(stopped: Path) -> None:
    assert json.loads((checkpoints.numbered(stopped)[-1] / "config.json").read_text())["use_cache"]


def test_what_removing_left_is_no_checkpoint(stopped: Path) -> None:
    beside = stopped / checkpoints.PARTIAL
    beside.mkdir()
    shutil.move(stopped / "checkpoint-8", beside / "checkpoint-8")
    newest = checkpoints.newest(stopped, {})
    assert newest is not None
    assert newest.name == "checkpoint-6"
    checkpoints.clear(stopped)
    assert not beside.exists()


def test_a_loss_that_is_no_number_is_logged_as_it_is(tmp_path: Path) -> None:
    bad = made.trainer(tmp_path, TURNS, optimizer=made.ADAMW)
    with torch.no_grad():
        next(bad.model.parameters()).fill_(float("nan"))
    bad.train()
    losses = [entry["loss"] for entry in bad.state.log_history if "loss" in entry]
    assert losses
    assert all(str(loss) == "nan" for loss in losses)
    assert json.dumps(losses)


def test_a_resume_hashes_each_file_of_a_checkpoint_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    for name in ("model.safetensors", "optimizer.pt"):
        (folder / name).write_bytes(b"whole")
    checkpoints.seal(folder, {"rows": "1"})
    hashed: list[str] = []

    def counted(path: Path, sha256: Any = checkpoints.sha256) -> str:
        hashed.append(path.name)
        return str(sha256(path))

    monkeypatch.setattr(checkpoints, "sha256", counted)
    assert checkpoints.newest(tmp_path, {"rows": "1"}) == folder
    checkpoints.check(folder, {"rows": "1"})
    assert sorted(hashed) == ["model.safetensors", "optimizer.pt"]
    (folder / "optimizer.pt").write_bytes(b"wrong")
    os.utime(folder / "optimizer.pt", ns=(0, 0))  # a clock may be too coarse to tell a change so soon
    with pytest.raises(UserError, match=r"optimizer.pt is not as it was written"):
        checkpoints.check(folder, {"rows": "1"})
