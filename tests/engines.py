"""Run by torchrun on two ranks: `engines.py FOLDER`. Trains on every engine and leaves what it made in FOLDER.

FOLDER holds `plain`, one process's run with a checkpoint at step 3.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback, TrainingArguments

from dualoptim import DualOptimPlus, UnlearnTrainer
from dualoptim.losses import LOSSES
from dualoptim.schedule import Turn, by_turns, jointly
from dualoptim.trainer import Objective
from dualoptim.training import engines
from dualoptim.training.combine import pcgrad

from . import tiny
from .test_trainer import FORGET, REFUSALS, RETAIN

READING = importlib.import_module("dualoptim.optim.diagnostics")  # whose name is its function's, too
STEPS, SAVED = 6, 3
TURNS = by_turns({"forget": 1, "retain": 2}, 8, STEPS)
JOINT = jointly({"forget": 1, "retain": 1}, 8, 3)


def sharded(model: nn.Module) -> nn.Module:
    """As somebody's own script shards a model."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    for layer in inner.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def model(*, lora: bool = False, seed: int = 0) -> Any:
    made = tiny.model(seed)
    if lora:
        import peft

        torch.manual_seed(3)
        # Of rank 1, so that the second of two ranks has no part of a matrix of one row.
        made = peft.get_peft_model(made, peft.LoraConfig(r=1, target_modules="all-linear"))
    return made


def trainer(
    folder: Path,
    engine: str,
    *,
    accumulation: int,
    turns: list[Turn] = TURNS,
    kind: str = "SHARDED",
    lora: bool = False,
    bits: int = 32,
    forget: str = "IDK",
    retain: str = "GD",
    optimizer: Any = None,
    reference: Any = None,
    combine: Any = None,
    callbacks: Any = None,
    eval_dataset: Any = None,
    **arguments: Any,
) -> UnlearnTrainer:
    """`accumulation` is what one process would need: two ranks take half of it."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if engine == "plugin":
        arguments |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": f"{kind}_STATE_DICT"}}
    if engine.startswith("zero-"):
        stage = {"stage": int(engine[-1]), "stage3_gather_16bit_weights_on_model_save": engine == "zero-3"}
        automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        arguments |= {"deepspeed": {**dict.fromkeys(automatic, "auto"), "zero_optimization": stage}, "use_cpu": False}
    settings = TrainingArguments(
        str(folder),
        **{
            "learning_rate": 1e-2,
            "max_grad_norm": 1.0,
            "gradient_accumulation_steps": accumulation // ranks,
            "save_strategy": "steps",
            "save_steps": SAVED,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **arguments,
        },
    )
    assert settings.world_size == ranks  # which starts the ranks' group
    made = model(lora=lora)
    if engine == "hand":
        made = sharded(made)
    # The rule divides by differences of averages; with a larger ε, the order of sums does not become visible.
    states = {"base_bits": bits, "delta_bits": bits, "min_8bit_size": 0, "eps": 1e-2}
    if optimizer == "own":
        trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
        chosen: dict[str, Any] = {"optimizers": (DualOptimPlus(trained, lr=1e-2, **states), None)}
    else:
        chosen = {"optimizer_cls_and_kwargs": optimizer or (DualOptimPlus, {"lr": 1e-2, **states})}
    return UnlearnTrainer(
        made,
        settings,
        objectives={
            "forget": Objective(FORGET, LOSSES[forget](), refusals=REFUSALS),
            "retain": Objective(RETAIN, LOSSES[retain](), weight=2.0, refusals=REFUSALS),
        },
        turns=turns,
        processing_class=tiny.tokenizer(),
        reference=reference,
        combine=combine,
        diagnostics_every=STEPS,
        callbacks=callbacks,
        eval_dataset=eval_dataset,
        **chosen,
    )


def weights(of: UnlearnTrainer) -> Tensor:
    """All weights of a model, on every rank."""
    if of.is_deepspeed_enabled and of.accelerator.state.deepspeed_plugin.zero_stage == 3:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(of.model.parameters())):
            return torch.cat([parameter.detach().flatten().clone() for parameter in of.model.parameters()])
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in of.model.parameters()]
    return torch.cat([parameter.detach().flatten() for parameter in whole])


def start(options: dict[str, Any]) -> Tensor:
    """The weights that a run begins with."""
    return torch.cat([p.detach().flatten() for p in model(lora=options.get("lora", False)).parameters()])


class Begun(TrainerCallback):
    """Knows at which step a run began."""

    step: int

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


ADAMW = (torch.optim.AdamW, {"lr": 1e-2, "eps": 1e-2})
RUNS: dict[str, dict[str, Any]] = {
    "ddp, 8 bits": {"engine": "ddp", "accumulation": 4, "bits": 8},
    "plugin": {"engine": "plugin", "accumulation": 4},
    "plugin, full": {"engine": "plugin", "accumulation": 4, "kind": "FULL"},
    "plugin, 8 bits, adapter": {"engine": "plugin", "accumulation": 2, "bits": 8, "lora": True, "forget": "NPO"},
    "plugin, full, adapter": {"engine": "plugin", "accumulation": 2, "kind": "FULL", "lora": True},
    "hand, 8 bits, adapter, own optimizer": {
        "engine": "hand", "accumulation": 2, "bits": 8, "lora": True, "forget": "NPO", "optimizer": "own"
    },
}  # fmt: skip
BEST = {
    "accumulation": 4,
    "eval_strategy": "steps",
    "eval_steps": SAVED,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_forget_loss",
    "greater_is_better": True,  # which it is at first
    "eval_dataset": {"forget": FORGET, "retain": RETAIN},
}
UNSAVED: dict[str, dict[str, Any]] = {
    "combined": {"accumulation": 4, "turns": JOINT, "optimizer": ADAMW, "combine": pcgrad},
    "compared with a model": {"accumulation": 2, "forget": "NPO", "retain": "KL"},
}


def evaluated(run: UnlearnTrainer) -> list[dict[str, float]]:
    """The numbers of a run's evaluations, but for times."""
    return [
        {
            key: value
            for key, value in entry.items()
            if key.startswith("eval_") and "second" not in key and "time" not in key
        }
        for entry in run.state.log_history
        if any(key.startswith("eval_") for key in entry)
    ]


def straight(folder: Path) -> None:
    """Trains on an engine, then again from the checkpoint, on as many ranks."""
    for name, options in RUNS.items():
        run = trainer(folder / name, **options)
        run.train()
        trained = weights(run)
        begun = Begun()
        again = trainer(folder / name, **{**options, "save_strategy": "no"}, callbacks=[begun])
        again.train(str(folder / name / f"checkpoint-{SAVED}"))
        assert begun.step == SAVED, begun.step
        assert torch.equal(weights(again), trained), name
        if dist.get_rank() == 0:
            torch.save((trained, run.diagnostics[-1]["layers"]), folder / f"{name}.pt")
    for name, options in UNSAVED.items():
        reference = tiny.model(seed=1) if "KL" in options.values() else None
        if reference is not None:
            sharded(reference)
        run = trainer(folder / name, "plugin", **options, save_strategy="no", reference=reference)
        run.train()
        trained = weights(run)
        if dist.get_rank() == 0:
            torch.save((trained, {}), folder / f"{name}.pt")
    for kind in ("FULL", "SHARDED"):
        run = trainer(folder / f"best, {kind}", "plugin", kind=kind, **BEST)
        run.train()
        trained = weights(run)
        if dist.get_rank() == 0:
            torch.save((trained, evaluated(run)), folder / f"best, {kind}.pt")
    for engine in ("plugin", "hand"):
        run = trainer(folder / "plain", engine, accumulation=4, save_strategy="no")
        run.train(str(folder / "plain" / f"checkpoint-{SAVED}"))
        trained = weights(run)
        run.save_model(str(folder / f"model of {engine}"))
        if dist.get_rank() == 0:
            torch.save((trained, {}), folder / f"one to two, {engine}.pt")


def rows(folder: Path) -> None:
    """What each rank reads in each step."""
    for engine in ("ddp", "plugin"):
        run = trainer(folder / "rows", engine, accumulation=4, save_strategy="no")
        read = [
            [tuple(row) for batch in batches.values() for row in batch["input_ids"].tolist()]
            for batches in run.get_train_dataloader()
        ]
        of_ranks = engines.gathered(read)
        if dist.get_rank() == 0:
            torch.save(of_ranks, folder / f"rows, {engine}.pt")


def disagreeing(folder: Path) -> None:
    """Ranks that would do different things raise together, before anything was changed."""
    first = dist.get_rank() == 0

    def all_raise(said: str, run: UnlearnTrainer) -> None:
        before = weights(run)
        try:
            run.train()
        except ValueError as error:
            told = engines.gathered(str(error))
        else:
            told = engines.gathered("nothing was raised")
        assert all(said in each for each in told), told
        assert torch.equal(weights(run), before)

    other = by_turns({"retain": 1}, 8, STEPS)
    all_raise(
        "rank 0 forget in 2 micro-batches; rank 1 retain in 2",
        trainer(folder / "no", "ddp", accumulation=4, turns=TURNS if first else other, save_strategy="no"),
    )
    paused = trainer(folder / "no", "ddp", accumulation=4, save_strategy="no")
    paused.paused = set() if first else {"forget"}
    all_raise("rank 1 nothing in 2 micro-batches", paused)
    foreign = trainer(folder / "no", "plugin", accumulation=4, save_strategy="no")

    def loader() -> Any:
        own, foreign.turns = foreign.turns, other
        try:
            return UnlearnTrainer.get_train_dataloader(foreign)
        finally:
            foreign.turns = own

    if not first:
        foreign.get_train_dataloader = loader
    all_raise("step 0 serves forget, but its batch carries retain", foreign)

    # A node with a disk of its own is told before anything is trained.
    engines.WAIT = 0.3
    apart = trainer(folder / f"disk {dist.get_rank()}", "ddp", accumulation=4)
    all_raise("rank 1 does not see what rank 0 writes there", apart)
    assert not (folder / "disk 0" / ".partial").exists()

    # A checkpoint that one rank cannot write is none, and training goes on.
    full = trainer(folder / "disk full", "ddp", accumulation=4)

    def no_space(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    if first:
        full._save_rng_state = no_space
    full.train()
    assert full.state.global_step == STEPS
    dist.barrier()
    assert not list((folder / "disk full").glob("checkpoint-*"))


def documented(folder: Path, *, of_deepspeed: bool) -> None:
    """The scripts of docs/engines.md, of fewer steps and on a CPU."""
    page = (Path(__file__).parents[1] / "docs" / "engines.md").read_text(encoding="utf-8")
    first, *others = re.findall(r"```py(?:thon)?\n(.*?)```", page, re.DOTALL)
    assert len(others) == 4, others

    def on_cpu(*given: Any, **named: Any) -> TrainingArguments:
        return TrainingArguments(*given, use_cpu=not of_deepspeed, report_to="none", disable_tqdm=True, **named)

    for at, block in enumerate(others[3:] if of_deepspeed else others[:3]):
        known: dict[str, Any] = {
            "model": tiny.model(),
            "tokenizer": tiny.tokenizer(),
            "out": str(folder / f"docs {at}"),
        }
        known |= {"forget_rows": FORGET, "retain_rows": RETAIN, "on_cpu": on_cpu}
        for part in (first.replace("steps=300", "steps=3").replace("batch_size=32", "batch_size=8"), block):
            part = part.replace("save_steps=100", "save_steps=2")
            exec(compile(part.replace("TrainingArguments(", "on_cpu("), "docs/engines.md", "exec"), known)
        assert (Path(known["out"]) / "checkpoint-2" / "manifest.json").is_file(), block


def deepspeed_on_cpu() -> None:
    """Let accelerate know of DeepSpeed's ranks on a CPU, too."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_CPU)


ZERO: dict[str, dict[str, Any]] = {
    "zero-1": {"engine": "zero-1", "accumulation": 4},
    "zero-2, 8 bits": {"engine": "zero-2", "accumulation": 2, "bits": 8},
    "zero-3, adapter": {"engine": "zero-3", "accumulation": 2, "lora": True, "forget": "NPO"},
}


def zero(folder: Path) -> None:
    """As `straight`, under DeepSpeed."""
    deepspeed_on_cpu()
    for name, options in ZERO.items():
        run = trainer(folder / name, **options)
        run.train()
        trained, optimizer = weights(run), run.multi_objective
        assert optimizer is not None
        eight = sum("codes" in key for own in optimizer.state.values() for key in own)
        assert bool(eight) == ("8 bits" in name), optimizer.state
        again = trainer(folder / name, **{**options, "save_strategy": "no"}, callbacks=[begun := Begun()])
        again.train(str(folder / name / f"checkpoint-{SAVED}"))
        assert begun.step == SAVED, begun.step
        assert torch.equal(weights(again), trained), name
        if dist.get_rank() == 0:
            torch.save(trained, folder / f"{name}.pt")


def main(folder: Path) -> None:
    READING.BLOCKS = 10**6  # type: ignore[attr-defined]  # of a shard as of the whole, all
    if "zero" in sys.argv:
        zero(folder)
        documented(folder, of_deepspeed=True)
    else:
        straight(folder)
        rows(folder)
        documented(folder, of_deepspeed=False)
        disagreeing(folder)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # all is said; gloo's threads now and then abort a process that takes itself down in order


if __name__ == "__main__":
    main(Path(sys.argv[1]))
