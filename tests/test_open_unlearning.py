"""The plug-in against a stub of open-unlearning's contract, and against a checkout where OPEN_UNLEARNING names one."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainingArguments

from dualoptim import DualOptimPlus
from dualoptim.errors import UserError
from dualoptim.open_unlearning import by_objective, read_settings, register
from dualoptim.optim import parameter_groups

from . import tiny

STUB = Path(__file__).parent / "open_unlearning" / "src"
LR = 1e-3


def load(path: Path, name: str = "open_unlearning_stub"):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stub = load(STUB / "trainer.py")


def rows(start: int, length: int = 8) -> dict[str, torch.Tensor]:
    ids = torch.arange(start, start + length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def data(name: str) -> list[dict]:
    forget = [rows(i) for i in range(4, 8)]
    if name == "DPO":
        forget = [{"original": row, "alternate": rows(100 + i)} for i, row in enumerate(forget)]
    return [{"forget": row, "retain": rows(50 + i)} for i, row in enumerate(forget)]


def made(cls, folder, settings=None, arguments=None, dtype=torch.float64, **method):
    """A trainer whose every step takes all four rows, so that their order does not matter.

    In double precision, since second moments that nearly cancel make much of the last digits.
    """
    defaults = {"max_steps": 6, "learning_rate": LR, "weight_decay": 0.01, "lr_scheduler_type": "constant"}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 100}
    batch = {"per_device_train_batch_size": 4, "remove_unused_columns": False, "max_grad_norm": 0}
    args = TrainingArguments(str(folder), **{**defaults, **quiet, **batch, **(arguments or {})})
    given = {} if settings is None else {"dualoptim": settings}
    name = cls.__name__.removeprefix("DualOptimPlus")
    given |= {"train_dataset": data(name), "data_collator": stub.collate}
    return cls(model=tiny.model().to(dtype), args=args, **method, **given)


def log_probs(model, batch) -> torch.Tensor:
    given = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits.log_softmax(-1)
    return given[:, :-1].gather(-1, batch["labels"][:, 1:, None]).squeeze(-1).sum(-1)


def forget_loss(name: str, model, reference, batch) -> torch.Tensor:
    """Each formula written out: mean NLL of 7 tokens, NPO and DPO at β = 0.1, and PDU's margin of logits."""
    if name in ("GradDiff", "GradAscent", "RMU"):
        return log_probs(model, batch).mean() / 7
    if name == "PDU":
        logits = model(batch["input_ids"]).logits
        return ((logits.amax(-1) - logits.mean(-1)) ** 2).mean()
    if name == "NPO":
        ratio = log_probs(model, batch) - log_probs(reference, batch)
        return 20 * F.softplus(0.1 * ratio).mean()
    chosen, rejected = batch["alternate"], batch["original"]
    margin = log_probs(model, chosen) - log_probs(reference, chosen)
    margin = margin - log_probs(model, rejected) + log_probs(reference, rejected)
    return 20 * F.softplus(-0.1 * margin).mean()


METHOD = {
    "GradDiff": {"gamma": 0.5, "alpha": 2.0},
    "NPO": {"gamma": 0.5, "alpha": 2.0, "beta": 0.1},
    "DPO": {"gamma": 0.5, "alpha": 2.0, "beta": 0.1},
    "RMU": {"gamma": 0.5, "alpha": 2.0},
    "PDU": {"gamma": 0.5, "alpha": 2.0},
    "GradAscent": {},
}


@pytest.mark.parametrize("name", METHOD)
def test_a_run_is_a_loop_of_dualoptim_plus_over_the_parts_of_the_loss(name, tmp_path):
    settings = {"ratio": "1:2", "lr_scales": {"forget": 0.5}}
    if name == "GradAscent":
        settings["retain_loss"] = "NLL"
    trainer = made(by_objective(stub.TRAINER_REGISTRY[name]), tmp_path, settings, **METHOD[name])
    start = copy.deepcopy(trainer.model)
    trainer.train()

    model, reference = copy.deepcopy(start), start
    trained = [p for n, p in model.named_parameters() if name != "RMU" or n.endswith("layers.0.mlp.down_proj.weight")]
    for parameter in model.parameters():
        parameter.requires_grad = any(parameter is own for own in trained)
    opt = DualOptimPlus(
        parameter_groups(model, 0.01), lr=LR, objectives=("forget", "retain"), lr_scales={"forget": 0.5}
    )
    batch = stub.collate(data(name))
    gamma, alpha = (0.5, 2.0) if METHOD[name] else (1.0, 1.0)
    for objective in ("forget", "retain", "retain") * 2:
        if objective == "forget":
            loss = gamma * forget_loss(name, model, reference, batch["forget"])
        else:
            loss = -alpha * log_probs(model, batch["retain"]).mean() / 7
        loss.backward()
        opt.step(objective=objective)
        opt.zero_grad()
    moved = 0.0
    for (key, got), want, before in zip(
        trainer.model.named_parameters(), model.parameters(), start.parameters(), strict=True
    ):
        # transformers takes norms and losses in single precision, which came to 1e-8 here
        torch.testing.assert_close(got, want, atol=LR / 1000, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
        moved = max(moved, float((want - before).abs().max().detach()))
    assert moved > LR, "a run that moves nothing compares nothing"


def test_a_step_runs_the_model_on_its_own_rows_alone(tmp_path):
    trainer = made(by_objective(stub.NPO), tmp_path, {"ratio": "1:2"}, {"max_steps": 3}, beta=0.1)
    seen: list[int] = []
    trainer.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(int(kwargs["input_ids"].min())), with_kwargs=True
    )
    trainer.train()
    assert [start >= 50 for start in seen] == [False, True, True]


def test_the_whole_loss_is_the_sum_of_the_parts(tmp_path):
    trainer = made(by_objective(stub.GradDiff), tmp_path, {"ratio": "1:1"}, gamma=0.5, alpha=2.0, retain_loss_type="KL")
    with torch.no_grad():
        next(trainer.model.parameters()).mul_(1.1)  # KL from itself is nothing
    batch = stub.collate(data("GradDiff"))
    whole = stub.GradDiff.compute_loss(trainer, trainer.model, batch)
    parts = []
    for step in (0, 1):
        trainer.state.global_step = step
        parts.append(trainer.compute_loss(trainer.model, batch))
    assert float(parts[1].detach()) > 0
    torch.testing.assert_close(sum(parts), whole)
    assert "compute_retain_loss" not in vars(trainer), "what was put in its place is gone"


@pytest.mark.parametrize("arguments", [{"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
                                       {"bf16": True}], ids=["accumulated", "bf16"])  # fmt: skip
def test_the_objective_follows_from_the_number_of_steps(arguments, tmp_path):
    trainer = made(by_objective(stub.GradDiff), tmp_path, {"ratio": "1:2"}, arguments, torch.float32)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, DualOptimPlus)
    for state in optimizer.state.values():
        assert (int(state["step"]), int(state["delta_step/forget"]), int(state["delta_step/retain"])) == (6, 2, 4)


def test_accumulated_micro_batches_are_one_step(tmp_path):
    whole = made(by_objective(stub.NPO), tmp_path / "1", {"ratio": "1:1"}, {"max_steps": 4}, beta=0.1)
    halves = {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    parts = made(by_objective(stub.NPO), tmp_path / "2", {"ratio": "1:1"}, halves, beta=0.1)
    whole.train()
    parts.train()
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def test_a_resumed_run_is_one_that_never_stopped(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    settings = {"ratio": "1:2", "base_bits": 8}
    first = made(by_objective(stub.NPO), tmp_path, settings, saving, torch.float32, beta=0.1)
    first.train()
    again = made(by_objective(stub.NPO), tmp_path, settings, saving, torch.float32, beta=0.1)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    state = again.optimizer.optimizer.state[again.model.lm_head.weight]
    assert (int(state["delta_step/forget"]), int(state["delta_step/retain"])) == (2, 4)


def test_pdu_raises_its_multiplier_in_steps_that_retain_alone(tmp_path):
    settings = {"primal_dual": True, "dual_step_size": 0.5, "retain_loss_eps": 1.0, "alpha": 2.0}
    trainer = made(by_objective(stub.PDU), tmp_path, {"ratio": "1:1"}, {"max_steps": 4}, **settings)
    said: list[dict] = []
    own = trainer.callback_handler.on_log
    trainer.callback_handler.on_log = lambda *args: (said.append(dict(args[-1])), own(*args))[1]
    trainer.train()
    losses = [logs for logs in said if {"forget_loss", "retain_loss"} & set(logs)]
    assert [next(iter(logs)) for logs in losses] == ["forget_loss", "retain_loss"] * 2
    expected = 2.0
    for logs in losses[1::2]:
        expected += 0.5 * (logs["retain_loss"] - 1.0)
    assert trainer.preferences[1] == pytest.approx(expected)
    assert expected > 2.5


class Apart(stub.GradDiff):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs["retain"]).loss - model(**inputs["forget"]).loss


class Halved(stub.GradDiff):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs) / 2


class Squared(stub.GradAscent):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs["retain"]).loss - model(**inputs["forget"]).loss


class Stepping(stub.GradDiff):
    def training_step(self, *args):
        raise AssertionError


class Unweighted(stub.GradAscent):
    def compute_retain_loss(self, model, retain_inputs):
        raise AssertionError


@pytest.mark.parametrize(
    ("cls", "settings", "sentence"),
    [
        (Apart, {}, "Apart computes what is to be kept without compute_retain_loss"),
        (Halved, {"ratio": "1:1"}, "Halved weighs what is to be kept by 0.5, not by its alpha"),
        (Squared, {"retain_loss": "NLL"}, "Squared reads what is to be kept without compute_retain_loss"),
        (Stepping, {}, "Stepping has a training_step of its own"),
        (Unweighted, {}, "Unweighted has no alpha"),
        (stub.GradAscent, {}, "GradAscent has nothing to retain.*retain_loss=NLL"),
        (stub.GradDiff, {"retain_loss": "NLL"}, "GradDiff has a loss to retain of its own"),
        (stub.FinetuneTrainer, {}, "FinetuneTrainer has no loss to forget"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_cannot_be_told_apart_is_refused_before_a_step(cls, settings, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(DualOptimPlus, "step", lambda *_, **__: pytest.fail("a step was taken"))
    with pytest.raises(UserError, match=sentence):
        made(by_objective(cls), tmp_path, settings).train()


@pytest.mark.parametrize(
    ("cls", "method", "sentence"),
    [
        (
            stub.GradDiff,
            {"alpha": 0.0},
            "GradDiff has nothing to retain, so that there is one objective alone: its alpha",
        ),
        (
            stub.GradDiff,
            {"gamma": 0.0},
            "GradDiff has nothing to forget, so that there is one objective alone: its gamma",
        ),
        (stub.PDU, {"alpha": 0.0}, "PDU has nothing to retain"),
    ],
)
def test_an_objective_with_the_weight_0_is_refused_before_a_step(cls, method, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(DualOptimPlus, "step", lambda *_, **__: pytest.fail("a step was taken"))
    with pytest.raises(UserError, match=sentence):
        made(by_objective(cls), tmp_path, {"ratio": "1:1"}, **method).train()


def test_pdus_multiplier_may_begin_at_0(tmp_path):
    trainer = made(by_objective(stub.PDU), tmp_path, {"ratio": "1:1"}, {"max_steps": 4}, alpha=0.0, primal_dual=True)
    trainer.train()
    assert trainer.preferences[1] > 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"ratoi": "1:1"}, "unknown setting 'ratoi'; did you mean 'ratio'"),
        ({"ratio": "5"}, "the ratio must be 2 whole numbers"),
        ({"base_bits": 5}, "base_bits"),
        ({"lr_scales": {"forgte": 2.0}}, "forgte"),
        ({"lr": 1e-4}, "set trainer.args.learning_rate"),
        ({"objectives": ("a",)}, "objectives is the trainer's to give"),
        ({"retain_loss": "KL"}, "retain_loss is NLL or null"),
        ("1:5", "is a mapping of settings"),
    ],
    ids=["key", "ratio", "bits", "scale", "lr", "objectives", "retain", "text"],
)
def test_settings_are_checked(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        read_settings(settings)


def test_a_trainer_is_registered_in_its_place_once():
    registry = {"NPO": stub.NPO}
    served = register("NPO", registry)
    assert registry == {"NPO": served}
    assert served.__name__ == "DualOptimPlusNPO"
    assert register("NPO", registry) is served
    with pytest.raises(UserError, match="unknown trainer 'NPOO'; did you mean 'NPO'"):
        register("NPOO", registry)


def run_stub(monkeypatch, folder: Path, *options: str) -> dict:
    """The stub's command with the page's options, in this process."""
    pytest.importorskip("hydra")
    monkeypatch.syspath_prepend(str(STUB))
    monkeypatch.setitem(sys.modules, "trainer", load(STUB / "trainer.py", "trainer"))
    own = [f"trainer.args.output_dir={folder}", "hydra.output_subdir=null", f"hydra.run.dir={folder}"]
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    plugin = ["hydra.searchpath=[pkg://dualoptim.open_unlearning_configs]", "+dualoptim=plus"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--config-name=unlearn.yaml", *plugin, *own, *quiet, *options])
    runpy.run_path(str(STUB / "train.py"), run_name="__main__")
    return json.loads((folder / "told.json").read_text())


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Hydra 1.3 does not start under Python 3.14")
def test_hydra_finds_the_plugin(monkeypatch, tmp_path):
    told = run_stub(
        monkeypatch, tmp_path, "trainer=NPO", "experiment=default", "trainer.method_args.dualoptim.ratio=1:2",
        "trainer.method_args.dualoptim.lr_scales.forget=0.5",
    )  # fmt: skip
    assert told["trainer"] == "DualOptimPlusNPO"
    assert told["steps"] == {"step": 6, "delta_step/forget": 2, "delta_step/retain": 4}
    assert told["lr_scales"] == {"forget": 0.5, "retain": 1.0}
    # A trainer that the experiment chose, and one that cannot be served.
    told = run_stub(monkeypatch, tmp_path, "experiment=default", "trainer.method_args.dualoptim.retain_loss=NLL")
    assert told["trainer"] == "DualOptimPlusGradAscent"
    with pytest.raises(SystemExit, match=r"error: .*did you mean 'NPO'"):
        run_stub(monkeypatch, tmp_path, "trainer=NPO", "trainer.handler=NPOO")


@pytest.mark.skipif("OPEN_UNLEARNING" not in os.environ, reason="OPEN_UNLEARNING names no checkout of open-unlearning")
def test_all_trainers_of_a_checkout_are_split_or_refused(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    monkeypatch.syspath_prepend(str(Path(os.environ["OPEN_UNLEARNING"]) / "src"))
    monkeypatch.delitem(sys.modules, "trainer", raising=False)
    registry = importlib.import_module("trainer").TRAINER_REGISTRY
    served = []
    for name, cls in registry.items():
        if name in ("Trainer", "FinetuneTrainer"):
            continue
        alone = name in ("GradAscent", "CEU")
        method = {"RMU": {"module_regex": r"model\.layers\.1", "trainable_params_regex": [".*"]}}.get(name, {})
        settings = {"ratio": "1:1", "retain_loss": "NLL" if alone else None}
        trainer = made(by_objective(cls), tmp_path / name, settings, {"max_steps": 2}, **method)
        batch = stub.collate(data("DPO" if name == "DPO" else name))
        parts = []
        for step in (0, 1):
            trainer.state.global_step = step
            parts.append(float(trainer.compute_loss(trainer.model, batch).detach()))
        if not alone:
            whole = float(cls.compute_loss(trainer, trainer.model, batch).detach())
            assert sum(parts) == pytest.approx(whole, rel=1e-4), name
        served.append(name)
    assert {"GradAscent", "GradDiff", "NPO", "DPO", "SimNPO", "RMU", "UNDIAL"} <= set(served)
