"""On two ranks of any engine a run is what one process makes of it, also from a checkpoint of either."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualoptim import DualOptimPlus, checkpoints
from dualoptim.data import ObjectiveRows, Plan, question
from dualoptim.errors import UserError
from dualoptim.schedule import by_turns, jointly
from dualoptim.training import engines as checked

from . import engines, forked, tiny

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed training"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's own
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left."""
    made = tmp_path_factory.mktemp("engines")
    engines.trainer(made / "plain", "plain", accumulation=4).train()
    forked.run("tests.engines", str(made))
    return made


LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ALONE: dict[str, Any] = {}
MOVED = 1e-2  # the largest change of a weight at least


def alone(folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, Any]:
    """One process's run, once for all engines that are held against it."""
    own = {key: value for key, value in options.items() if key not in ("engine", "kind")}
    if repr(own) not in ALONE:
        monkeypatch.setattr(engines.READING, "BLOCKS", 10**6)
        if own.get("retain") == "KL":
            own["reference"] = tiny.model(seed=1)
        run = engines.trainer(folder / "alone", "plain", **own, save_strategy="no")
        start = engines.weights(run)
        run.train()
        moved = (engines.weights(run) - start).abs().max()
        assert moved > MOVED
        ALONE[repr({k: v for k, v in own.items() if k != "reference"})] = (
            engines.weights(run), run.diagnostics[-1]["layers"] if run.diagnostics else {}
        )  # fmt: skip
        own.pop("reference", None)
    return ALONE[repr(own)]


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for the order of sums: to 1e-5 of the distance moved."""
    assert (ours - theirs).abs().max() < 1e-5 * MOVED


@pytest.mark.parametrize("name", [*engines.RUNS, *engines.UNSAVED])
def test_two_ranks_train_as_one_process(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, layers = torch.load(folder / f"{name}.pt")
    expected, expected_layers = alone(folder, {**engines.RUNS, **engines.UNSAVED}[name], monkeypatch)
    assert_same(trained, expected)
    for layer, measures in layers.items():  # of all ranks' parts, and not of rank 0's
        assert measures == pytest.approx(expected_layers[layer], rel=1e-3, abs=1e-3), layer


@pytest.mark.parametrize("name", engines.RUNS)
def test_one_process_goes_on_from_a_checkpoint_of_two_ranks(folder: Path, name: str) -> None:
    options = {key: value for key, value in engines.RUNS[name].items() if key not in ("engine", "kind")}
    begun = engines.Begun()
    run = engines.trainer(folder / name, "plain", **options, save_strategy="no", callbacks=[begun])
    run.train(str(folder / name / f"checkpoint-{engines.SAVED}"))
    assert begun.step == engines.SAVED
    assert_same(engines.weights(run), torch.load(folder / f"{name}.pt")[0])


@pytest.mark.parametrize("engine", ["plugin", "hand"])
def test_two_ranks_go_on_from_a_checkpoint_of_one_process(
    folder: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, _ = torch.load(folder / f"one to two, {engine}.pt")
    assert_same(trained, alone(folder, engines.RUNS["plugin"], monkeypatch)[0])


@pytest.mark.parametrize("kind", ["FULL", "SHARDED"])
def test_two_ranks_evaluate_and_put_back_the_best_model_as_one_process(folder: Path, kind: str) -> None:
    run = engines.trainer(folder / f"best alone, {kind}", "plain", **engines.BEST)
    run.train()
    assert run.state.best_global_step == engines.SAVED
    trained, found = torch.load(folder / f"best, {kind}.pt")
    assert_same(trained, engines.weights(run))
    for ours, theirs in zip(found, engines.evaluated(run), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("engine", ["plugin", "hand"])
def test_a_sharded_model_is_saved_whole(folder: Path, engine: str) -> None:
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(folder / f"model of {engine}")
    whole = torch.cat([parameter.detach().flatten() for parameter in saved.parameters()])
    assert torch.equal(whole, torch.load(folder / f"one to two, {engine}.pt")[0])


def test_every_ranks_files_are_sealed(folder: Path) -> None:
    for name in engines.RUNS:
        checkpoint = folder / name / f"checkpoint-{engines.SAVED}"
        assert checkpoints.damage(checkpoint) is None
        files = json.loads((checkpoint / checkpoints.MANIFEST).read_text())["files"]
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(files)
        in_shards = "plugin" in name or "hand" in name
        if in_shards and "full" not in name:
            assert {f"optimizer_0/__{rank}_0.distcp" for rank in (0, 1)} <= set(files)
        else:
            assert "optimizer.pt" in files


@pytest.mark.parametrize("engine", ["ddp", "plugin"])
def test_the_rows_that_ranks_read_are_those_of_one_process(folder: Path, engine: str) -> None:
    of_ranks = torch.load(folder / f"rows, {engine}.pt")
    run = engines.trainer(folder / "rows", "plain", accumulation=4, save_strategy="no")
    one = [
        [tuple(row) for batches in batch.values() for row in batches["input_ids"].tolist()]
        for batch in run.get_train_dataloader()
    ]
    for step in range(engines.STEPS):
        ranks = [Counter(bare(row) for batch in rank[2 * step : 2 * step + 2] for row in batch) for rank in of_ranks]
        assert not ranks[0] & ranks[1]
        assert ranks[0] + ranks[1] == Counter(bare(row) for batch in one[4 * step : 4 * step + 4] for row in batch)


def bare(row: tuple[int, ...]) -> tuple[int, ...]:
    """A row without its padding."""
    end = len(row)
    while end and row[end - 1] == 0:
        end -= 1
    return row[:end]


TOKENIZER = tiny.tokenizer()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 23), st.integers(1, 23)),
    more=st.integers(0, 9),
    joint=st.booleans(),
    seed=st.integers(0, 3),
)
def test_a_step_has_the_same_rows_on_any_number_of_ranks_and_none_reaches_two(
    ranks: int, accumulation: int, sizes: tuple[int, int], more: int, joint: bool, seed: int
) -> None:
    from accelerate.data_loader import BatchSamplerShard

    names = ("forget", "retain")
    rows = {
        name: [question(f"{name} {i}", "x" * (1 + i % 4)) for i in range(n)]
        for name, n in zip(names, sizes, strict=True)
    }
    data = ObjectiveRows(rows, {"forget": ["No.", "Never.", "I do not know."]}, TOKENIZER, 512)
    micro, count = ranks * accumulation, ranks * accumulation + more
    ratio = {"forget": 1, "retain": 1 if joint else 2}
    turns = jointly(ratio, 2 * count, 4) if joint else by_turns(ratio, count, 4)
    one = list(Plan(turns, data, 1, seed))
    plan = Plan(turns, data, micro, seed, ranks=ranks)
    of_ranks = [list(BatchSamplerShard(plan, ranks, rank)) for rank in range(ranks)]
    for step, whole in enumerate(one):
        own = [Counter(draw for batch in each[step * accumulation : (step + 1) * accumulation] for draw in batch)
               for each in of_ranks]  # fmt: skip
        assert sum(own, Counter()) == Counter(whole)
        assert len({repr([sorted({draw.objective for draw in batch}) for batch in each]) for each in of_ranks}) == 1
        assert all(sum(part.values()) >= accumulation for part in own)


# DeepSpeed


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_deepspeed_train_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = subprocess.run(
        [*LAUNCHER, "-m", "tests.engines", str(tmp_path), "zero"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert finished.returncode == 0, finished.stderr[-6000:]
    for name, options in engines.ZERO.items():
        expected, _ = alone(tmp_path, options, monkeypatch)
        ours = torch.load(tmp_path / f"{name}.pt")
        if "8 bits" in name:  # blocks of flattened parameters have other elements in them
            assert (ours - expected).abs().max() < 0.1 * (expected - engines.start(options)).abs().max()
        else:
            assert_same(ours, expected)


class Zero:
    """What DeepSpeed does with a client's optimizer: each group made flat, and stepped by itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            flat = torch.cat([param.detach().flatten() for param in group["params"]])
            group["params"] = [torch.nn.Parameter(flat)]

    def step(self) -> None:
        groups = self.optimizer.param_groups
        for group in groups:
            self.optimizer.param_groups = [group]
            group["params"][0].grad = torch.ones_like(group["params"][0])
            self.optimizer.step()
        self.optimizer.param_groups = groups


def test_a_choice_serves_all_the_parts_of_a_step_of_deepspeed_and_no_other(tmp_path: Path) -> None:
    run = engines.trainer(tmp_path, "plain", accumulation=1, bits=8, save_strategy="no")
    run.is_deepspeed_enabled = True
    optimizer = run.create_optimizer()
    assert [group["flat"] for group in optimizer.param_groups] == [True, False, False]
    run.optimizer = SimpleNamespace(optimizer=Zero(optimizer))  # as accelerate wraps DeepSpeed's
    assert run.multi_objective is optimizer
    batch = run.rows.collate([run.rows[draw] for draw in next(iter(run._plan()))])
    run._hand_over(batch)
    run.optimizer.optimizer.step()
    for group in optimizer.param_groups:
        own = optimizer.state[group["params"][0]]
        assert (int(own["delta_step/forget"]), int(own["delta_step/retain"])) == (1, 0)
        assert ("codes/base_exp_avg" in own) == (group["name"] == "matrices")
    run._stepping = None
    with pytest.raises(ValueError, match="no objective was chosen"):
        run.optimizer.optimizer.step()


def test_8_bits_that_flattening_would_undo_are_refused() -> None:
    layer = torch.nn.Linear(64, 64)
    for bits, refused in (({"delta_bits": 8}, True), ({"base_bits": 8}, True), ({}, False)):
        made = DualOptimPlus(layer.parameters(), **bits)
        if refused:
            with pytest.raises(ValueError, match="unless its group says flat=True"):
                checked.check_bits(made)
            made.param_groups[0]["flat"] = True
        checked.check_bits(made)


# What an engine cannot do


def told(**changes: Any) -> Any:
    """A trainer as `engines.check` sees it."""
    plugin = SimpleNamespace(fsdp_version=2, deepspeed_config={}, zero_stage=2)
    state = SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=plugin)
    known = {
        "args": SimpleNamespace(world_size=1, save_on_each_node=False, mixed_precision="no", fsdp_plugin_args=None),
        "model": torch.nn.Linear(2, 2),
        "accelerator": SimpleNamespace(state=state),
        "is_fsdp_enabled": False,
        "is_deepspeed_enabled": False,
        "optimizer_cls_and_kwargs": (DualOptimPlus, {}),
        "plugin": plugin,
    }
    made = SimpleNamespace(**{key: value for key, value in {**known, **changes}.items() if "__" not in key})
    for key, value in changes.items():
        if key.startswith("args__"):
            setattr(made.args, key.removeprefix("args__"), value)
        elif key.startswith("plugin__"):
            setattr(plugin, key.removeprefix("plugin__"), value)
    return made


REFUSED: dict[str, tuple[dict[str, Any], dict[str, bool], str]] = {
    "ranks that accelerate does not know": (
        {"args__world_size": 2},
        {},
        "there are 1 ranks, but accelerate, .* knows of 2",
    ),
    "tensor parallelism": ({"model": SimpleNamespace(tp_size=2)}, {}, "load it whole and give fsdp=True"),
    "the first FSDP": ({"is_fsdp_enabled": True, "plugin__fsdp_version": 1}, {}, "use fsdp_config={'version': 2}"),
    "precision of a model sharded by hand": (
        {"is_fsdp_enabled": True, "args__mixed_precision": "bf16"},
        {"by_hand": True},
        "bf16: .*mp_policy.*leave it out",
    ),
    "a parameter that is not sharded": ({"is_fsdp_enabled": True}, {"by_hand": True}, "parameter weight is not shard"),
    "two engines": ({"is_deepspeed_enabled": True}, {"by_hand": True}, "leave one of the two out"),
    "combined gradients under DeepSpeed": (
        {"is_deepspeed_enabled": True},
        {"combines": True},
        "combine: DeepSpeed .*use DDP, or FSDP2",
    ),
    "an optimizer in the DeepSpeed config": (
        {"is_deepspeed_enabled": True, "plugin__deepspeed_config": {"optimizer": {"type": "AdamW"}}},
        {},
        r"\(AdamW\), which would be taken in place of optimizer_cls_and_kwargs; remove",
    ),
    "shards on disks of their own": (
        {"is_fsdp_enabled": True, "args__save_on_each_node": True},
        {},
        "save_on_each_node: .*a disk that all nodes share",
    ),
}


def test_ranks_of_which_accelerate_is_not_told_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = engines.trainer(tmp_path, "plain", accumulation=1, save_strategy="no")
    monkeypatch.setenv("WORLD_SIZE", "2")  # as of torchrun on a machine without a GPU, and no use_cpu
    with pytest.raises(ValueError, match=r"there are 2 ranks, but .* knows of 1, .* pass use_cpu=True"):
        checked.check(run, by_hand=False, combines=False)


@pytest.mark.parametrize(("changes", "how", "said"), REFUSED.values(), ids=REFUSED)
def test_what_an_engine_cannot_do_is_refused(changes: dict[str, Any], how: dict[str, bool], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        checked.check(told(**changes), **{"by_hand": False, "combines": False, **how})


def test_a_checkpoint_of_deepspeed_is_read_as_it_was_written_alone(tmp_path: Path) -> None:
    part = tmp_path / "global_step4"
    part.mkdir()
    for rank in (0, 1):
        (part / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    of_deepspeed = told(is_deepspeed_enabled=True, args__world_size=2)
    checked.check_resumable(tmp_path, of_deepspeed)
    for trainer, said in (
        (told(is_deepspeed_enabled=True, args__world_size=4), "on 2 ranks, and can be read so alone.*or use FSDP2"),
        (told(is_deepspeed_enabled=True, args__world_size=2, plugin__zero_stage=3), "this is stage 3 on 2"),
        (told(), "was written by DeepSpeed on 2 ranks; go on so"),
    ):
        with pytest.raises(UserError, match=said):
            checked.check_resumable(tmp_path, trainer)
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="was not written by DeepSpeed"):
        checked.check_resumable(tmp_path / "plain", of_deepspeed)
