"""The command line on several ranks: one folder, one set of results, those of one process."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from dualoptim import UnlearnTrainer, cli, ranks
from dualoptim.data import Draw, ObjectiveRows, Plan, question
from dualoptim.errors import UserError
from dualoptim.evaluation import scoring
from dualoptim.losses import GD
from dualoptim.trainer import Objective

from . import forked, tiny

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without distributed training"
)
TASK = '''"""Rows by letter, scored in every way that ranks share, in many small batches."""
import os
from dualoptim.data import question
from dualoptim.errors import UserError
from dualoptim.evaluation import scoring
from dualoptim.evaluation.numbers import Metric, Numbers, mean
from dualoptim.device import seeded
from dualoptim.tasks import Task

scoring.PROMPT_TOKENS = scoring.LABELLED_TOKENS = 300

class Letters(Task):
    name, followed = "letters", "probability"
    metrics = {"nll": Metric("nll", "higher")}
    notes = ["This is said once."]

    def __init__(self):
        self.looks = 0
        self.objectives = {
            verb: [question(f"What does {who} {verb}?", f"{who} {verb}s {'very ' * (i % 4)}much.")
                   for i, who in enumerate("ABCDEFG")]
            for verb in ("forget", "retain")
        }

    def prepare(self, model, tokenizer):
        return self.score(model, tokenizer)

    def score(self, model, tokenizer):
        records = []
        for name, rows in self.objectives.items():
            made = scoring.question_records(model, tokenizer, rows, name)
            with seeded(0):
                sampled = scoring.replies(model, tokenizer, [row.prompt for row in rows], max_new_tokens=8, temperature=1.0)
            norms = scoring.gradient_norms(model, tokenizer, rows)
            states = scoring.mean_states(model, tokenizer, [row.answer for row in rows])
            for record, reply, norm, state in zip(made, sampled, norms, states, strict=True):
                records.append({**record, "sampled": reply, "norm": norm, "state": state.norm().item()})
        return records

    @staticmethod
    def numbers(records, retrained=None):
        return Numbers({"nll": mean([record["nll"] for record in records])}, {})

    def follow(self, model, tokenizer):
        self.looks += 1
        if os.environ.get("RANK", "0") == os.environ.get("FAILS") and self.looks == 6:
            raise UserError("what this rank has is broken; mend it")
        made = {name: scoring.question_records(model, tokenizer, rows, None, ask=False)
                for name, rows in self.objectives.items()}
        return {name: mean([record["probability"] for record in part]) for name, part in made.items()}
'''  # noqa: E501
# Of 5 rows: no rank has as many as the other.
COMPARE = ["compare", "--model", "model", "--task", "letters.py", "--methods", "[DualOptim+, Alternating AdamW]",
           "--forget-loss", "NPO", "--retain-loss", "GD", "--steps", "6", "--batch-size", "5", "--ratio", "1:1",
           "--lr", "1e-3", "--curve-points", "3", "--save-every", "2", "--bf16", "false", "--score-bf16", "false",
           "--out", "out"]  # fmt: skip


def filled(place: Path) -> Path:
    """A folder with the task and its model."""
    place.mkdir(exist_ok=True)
    (place / "letters.py").write_text(TASK)
    if not (place / "model").exists():
        tiny.save(place / "model")
    return place


def on_two(place: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a folder, on two ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    filled(place)
    return subprocess.run(
        [sys.executable, *launcher, "-m", "dualoptim", *arguments],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DUALOPTIM_CACHE": str(place / "cache"), **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


FORKED = """
import atexit
import os
import sys
from dualoptim import cli
atexit._clear()  # what the process that was forked does at its end
os.chdir(sys.argv[1])
os.environ["DUALOPTIM_CACHE"] = "cache"
cli.main(sys.argv[2:])
"""


def on_two_forked(place: Path, *arguments: str) -> None:
    """As `on_two`, where no launcher has to end what is left; an exit status that is not 0 is raised."""
    script = filled(place) / "forked.py"
    script.write_text(FORKED)
    forked.run(script, str(place), *arguments)


def results(place: Path) -> dict[str, Any]:
    """What a run left, without what it took, where it ran and what it was called with."""
    read: dict[str, Any] = json.loads((place / "out" / "results.json").read_text())
    for run in read["runs"]:
        for key in ("seconds", "watching_seconds", "step_seconds", "peak_memory_bytes", "environment", "config"):
            del run[key]
    for point in read["points"]:
        del point["seconds"]
    return read


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(folder / "model.safetensors").items())])


def trained(place: Path) -> dict[str, tuple[torch.Tensor, list[dict[str, Any]]]]:
    """Weights and records of each method."""
    return {
        folder.name: (
            weights(folder / "model"),
            [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()],
        )
        for folder in sorted((place / "out").glob("*-seed0"))
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where two ranks compared two methods, and what they said."""
    place = tmp_path_factory.mktemp("two")
    done = on_two(place, *COMPARE)
    assert done.returncode == 0, done.stderr[-3000:]
    return place, done.stdout


def test_two_ranks_leave_what_one_process_leaves(
    two: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(filled(tmp_path))
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scoring, "PROMPT_TOKENS", 300)  # which the task sets for good
    monkeypatch.setattr(scoring, "LABELLED_TOKENS", 300)
    # The same batches; another split alone moves what is near the rounding.
    assert cli.main([*COMPARE, "--micro-batch-size", "3"]) == 0
    place, said = two
    assert (
        said.count("This is said once.") == capsys.readouterr().out.count("This is said once.") == 2
    )  # and in the summary
    assert {path.name for path in (place / "out").iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}
    assert json.loads((place / "out" / "env.json").read_text())["ranks"] == 2
    begun, ours, theirs = weights(place / "model"), trained(place), trained(tmp_path)
    assert set(ours) == set(theirs) == {"dualoptim-plus-seed0", "alternating-adamw-seed0"}
    for name, (tensor, records) in ours.items():
        other, expected = theirs[name]
        moved = (other - begun).norm()
        assert moved > 1e-2
        assert (tensor - other).norm() <= 1e-5 * moved
        assert len(records) == len(expected) == 2 * 14
        for record, wanted in zip(records, expected, strict=True):
            if record["when"] == "before":
                assert record == wanted
            for key in ("set", "question", "reply", "sampled"):
                assert record[key] == wanted[key]
            for key in ("nll", "probability", "norm", "state"):
                assert record[key] == pytest.approx(wanted[key], rel=1e-5)
    for run, wanted in zip(results(place)["runs"], results(tmp_path)["runs"], strict=True):
        for point, expected_point in zip(run["curve"], wanted["curve"], strict=True):
            assert point == pytest.approx(expected_point, rel=1e-4)


def test_a_rank_that_fails_ends_all_with_its_sentence_and_they_go_on(
    two: tuple[Path, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second method's run, from the checkpoint before."""
    done = on_two(tmp_path, *COMPARE, FAILS="1")
    assert done.returncode != 0
    assert done.stderr.count("what this rank has is broken") == 1
    assert "rank 1: dualoptim: error: what this rank has is broken; mend it\n" in done.stderr
    assert not (tmp_path / "out" / "alternating-adamw-seed0" / "model").exists()
    (begun,) = (tmp_path / "out" / "alternating-adamw-seed0" / "checkpoints").iterdir()
    assert begun.name == "checkpoint-2"
    on_two_forked(tmp_path, *COMPARE, "--resume")
    assert capfd.readouterr().out.count("Taken over from out: DualOptim+") == 1
    assert results(tmp_path) == results(two[0])
    for name, (tensor, records) in trained(tmp_path).items():
        assert torch.equal(tensor, trained(two[0])[name][0])
        assert records == trained(two[0])[name][1]


WAITING = {"of_first", "gathered", "shared", "barrier", "all_reduce", "all_gather", "all_gather_object",
           "broadcast", "broadcast_object_list"}  # fmt: skip


def _called(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "id", None) or getattr(node.func, "attr", "")


def test_no_rank_waits_for_others_where_only_one_may_come() -> None:
    """A rank that fails reaches an `except` or `finally` alone: others never come, and all would wait forever."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in Path(ranks.__file__).parent.rglob("*.py")}
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    by_first = {
        node.name
        for _, node in nodes
        if isinstance(node, ast.FunctionDef) and any("by_first" in ast.unparse(d) for d in node.decorator_list)
    }
    assert {"check", "_write"} <= by_first
    found = [
        f"{path.name}: {name}"
        for path, node in nodes
        if isinstance(node, ast.Try)
        for part in (*node.handlers, *node.finalbody)
        for name in _called(part)
        if name in WAITING | by_first
    ]
    assert found == ["trainer.py: gathered"]  # of why a checkpoint was not written: it meets the others in `all_wrote`


def test_what_is_saved_of_a_failure_is_done_by_the_first_rank_without_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[int] = []

    def fails() -> None:
        done.append(ranks.of_first(lambda: len(done)))  # would wait for the others if this rank were not by itself
        raise OSError("the disk is full, too")

    for rank in (0, 1):
        monkeypatch.setattr(ranks, "_group", ranks._Group(rank, 2, None, (sys.stdout, sys.stderr)))
        with pytest.raises(UserError, match="what fails first"), ranks.saving(fails):
            raise UserError("what fails first")
    assert done == [0]
    with ranks.saving(fails):
        pass
    assert done == [0]


def test_what_all_ranks_find_is_said_once_and_nothing_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 2"):
        on_two_forked(tmp_path, *COMPARE, "--frget", "mine.jsonl")
    sentence = "dualoptim: error: unknown option '--frget'; did you mean '--forget'?"
    assert [line for line in capfd.readouterr().err.splitlines() if "frget" in line] == [sentence]
    assert not (tmp_path / "out").exists()


def test_a_launcher_that_tells_too_little_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["unlearn"]) == 2
    assert "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("ACCELERATE_USE_FSDP", "true", "asks for FSDP, but .* use UnlearnTrainer in a script of your own"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for DeepSpeed, but .* use UnlearnTrainer in a script of your own"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "asks for the mixed precision fp16, but --bf16 decides that"),
    ],
)
def test_what_accelerate_launch_asks_for_in_vain_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, told: str
) -> None:
    ranks.check_launcher()
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=told):
        ranks.check_launcher()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replies_do_not_depend_on_who_is_asked_when(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    prompts = [question("What? " * i, "").prompt for i in range(1, 9)]
    monkeypatch.setattr(scoring, "PROMPT_TOKENS", 150)

    def asked() -> list[str]:
        torch.manual_seed(0)
        return scoring.replies(model, tokenizer, prompts, max_new_tokens=12, temperature=temperature)

    in_order = asked()

    def backwards(items: list[Any], work: Callable[[Any], Any], passed: Any = None) -> list[Any]:
        assert len(items) > 3
        return [work(item) for item in reversed(items)][::-1]

    monkeypatch.setattr(ranks, "shared", backwards)
    assert asked() == in_order
    assert len(set(in_order)) > 1


def test_one_process_trains_on_one_of_several_devices(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", save_strategy="no")
    args._n_gpu = 4
    rows = [question(f"{i}?", "Yes.") for i in range(4)]
    made: Any = {"objectives": {"retain": Objective(rows, GD())}, "turns": [{"retain": 4}]}
    trainer = UnlearnTrainer(tiny.model(), args, processing_class=tiny.tokenizer(), **made)
    assert trainer.args.n_gpu == 1
    assert not isinstance(trainer._wrap_model(trainer.model), torch.nn.DataParallel)


def plan(turn: dict[str, int], number: int) -> list[list[Draw]]:
    rows = {name: [question(f"{name} {i}?", "Yes.") for i in range(9)] for name in turn}
    data = ObjectiveRows(rows, {}, tiny.tokenizer(), 512)
    return Plan([turn], data, number, 0, ranks=number).batches


@pytest.mark.parametrize("number", [2, 3, 8])
@pytest.mark.parametrize("turn", [{"forget": 5}, {"forget": 1}, {"forget": 1, "retain": 7}])
def test_no_row_counts_on_two_ranks(turn: dict[str, int], number: int) -> None:
    batches = plan(turn, number)
    counted = [draw for batch in batches for draw in batch if draw.counts]
    assert len(batches) == number
    assert len(set(counted)) == len(counted)
    for name, count in turn.items():
        assert sum(draw.objective == name for draw in counted) == count
        assert all(list(dict.fromkeys(draw.objective for draw in batch)) == list(turn) for batch in batches)
        for batch in batches:  # what counts and what does not are never together
            assert len({draw.counts for draw in batch if draw.objective == name}) == 1
