"""The choice of the objective behind what wraps an optimizer: the choice arrives, or the very step raises."""

from __future__ import annotations

import enum
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import MixtralConfig, MixtralForCausalLM, TrainingArguments

from dualoptim import DualOptimPlus, UnlearnTrainer
from dualoptim.data import question
from dualoptim.errors import UserError
from dualoptim.losses import LOSSES
from dualoptim.optim import diagnostics, ranks, releasing
from dualoptim.schedule import by_turns
from dualoptim.trainer import Objective
from dualoptim.training.wrappers import check_saved

from . import tiny
from .test_optim import randn

TURNS = ("forget", "retain", "retain", "forget", "retain", "retain")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))


def loss_of(model: Callable[[Tensor], Tensor], step: int) -> Tensor:
    return model(randn(8, 6, seed=step)).square().sum()


def made(model: nn.Module) -> DualOptimPlus:
    return DualOptimPlus(model.parameters(), lr=1e-2)


def assert_trained(model: nn.Module, turns: tuple[str, ...] = TURNS) -> None:
    """That a model is what a plain loop makes of it."""
    plain = network()
    opt = made(plain)
    for step, objective in enumerate(turns):
        opt.zero_grad()
        loss_of(plain, step).backward()
        opt.step(objective=objective)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# Bare


@pytest.mark.parametrize("where", ["in the closure", "before", "as an argument"])
def test_a_closure(where: str) -> None:
    model = network()
    opt = made(model)
    for step, objective in enumerate(TURNS):

        def closure(step: int = step, objective: str = objective) -> float:
            opt.zero_grad()
            if where == "in the closure":
                opt.objective = objective
            loss = loss_of(model, step)
            loss.backward()
            return float(loss.detach())

        if where == "before":
            opt.objective = objective
        assert opt.step(closure, **({"objective": objective} if where == "as an argument" else {})) > 0
        assert opt.objective is None
    assert_trained(model)


def test_a_choice_in_the_closure_wins_over_one_before_it() -> None:
    model = network()
    opt = made(model)
    opt.objective = "retain"

    def closure() -> float:
        opt.objective = "forget"
        loss_of(model, 0).backward()
        return 0.0

    opt.step(closure)
    assert_trained(model, ("forget",))


@pytest.mark.parametrize("used", ["by a step", "by a step with an argument", "by a skipped step", "by a refused one"])
def test_a_choice_is_used_up(used: str) -> None:
    model = network()
    opt = made(model)
    loss_of(model, 0).backward()
    opt.objective = "forget"
    weight = next(model.parameters())
    assert weight.grad is not None
    if used == "by a skipped step":
        weight.grad.fill_(float("nan"))
    if used == "by a refused one":
        opt.state[weight]["base_exp_avg"] = torch.zeros(2)
        with pytest.raises(ValueError, match="base_exp_avg"):
            opt.step()
    else:
        opt.step(**({"objective": "retain"} if "argument" in used else {}))
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(ValueError, match="no objective was chosen"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("what", ["a closure", "a hook", "a misplaced argument", "ranks"])
def test_what_fails_before_the_step_uses_up_the_choice(what: str) -> None:
    model = network()
    opt = made(model)
    loss_of(model, 0).backward()
    opt.objective = "forget"

    def failing(*arguments: Any) -> Any:
        raise RuntimeError("no step")

    if what == "a hook":
        opt.register_step_pre_hook(failing)
    if what == "ranks":
        opt._verdict = ranks.Verdict(torch.tensor([-2, 0, 0]), "retain", None)
    arguments = {"a closure": [failing], "a misplaced argument": ["retain"]}.get(what, [])
    with pytest.raises((RuntimeError, ValueError), match=r"no step|takes a closure first|another rank refused"):
        opt.step(*arguments)
    assert opt.objective is None


def test_an_objective_in_the_closures_place_is_told() -> None:
    with pytest.raises(ValueError, match=r"call step\(objective='forget'\)"):
        made(network()).step("forget")  # type: ignore[call-overload]


def test_an_enumeration_of_strings_names_objectives() -> None:
    class Objective(str, enum.Enum):
        FORGET = "forget"
        RETAIN = "retain"

    model, other = network(), network()
    opt, plain = DualOptimPlus(model.parameters(), objectives=Objective), made(other)
    assert opt.objectives == ("forget", "retain")
    for each, objective in ((opt, "forget"), (plain, Objective.RETAIN), (opt, Objective.FORGET)):
        loss_of(model if each is opt else other, 0).backward()
        each.step(objective=objective)
    assert int(opt.state[next(model.parameters())]["delta_step/forget"]) == 2
    assert int(plain.state[next(other.parameters())]["delta_step/retain"]) == 1


def test_with_one_objective_there_is_nothing_to_choose() -> None:
    weight = nn.Parameter(torch.ones(3))
    opt = DualOptimPlus([weight], objectives=("only",))
    for _ in range(3):
        weight.grad = torch.ones(3)
        opt.step()
    assert int(opt.state[weight]["delta_step/only"]) == 3


@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_a_step_of_zeros_is_nobodys_only_while_there_is_no_state(lr: float) -> None:
    """How torch.distributed.checkpoint and DeepSpeed ask for the state; not to become a way to step for nobody."""
    weight = nn.Parameter(torch.ones(3))
    opt = DualOptimPlus([weight], lr=lr)
    with pytest.raises(ValueError, match="no objective was chosen"):
        opt.step()
    weight.grad = torch.zeros(3)
    opt.step()
    assert sorted(opt.state[weight]) == sorted(
        ["step", "base_exp_avg", "base_exp_avg_sq"]
        + [f"{key}/{name}" for key in ("delta_step", "delta_exp_avg", "delta_exp_avg_sq") for name in opt.objectives]
    )
    assert not any(value.any() for value in opt.state[weight].values())
    assert torch.equal(weight, torch.ones(3))
    with pytest.raises(ValueError, match="no objective was chosen"):
        opt.step()
    other = DualOptimPlus([nn.Parameter(torch.ones(3))], lr=0.0)
    other.param_groups[0]["params"][0].grad = torch.ones(3)
    with pytest.raises(ValueError, match="no objective was chosen"):
        other.step()


def test_a_gradient_scaler() -> None:
    model = network()
    opt, scaler = made(model), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step, objective in enumerate(TURNS):
        opt.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        opt.objective = objective
        scaler.step(opt)
        scaler.update()
    assert_trained(model)


# In real packages


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state()  # which a Trainer's tests leave as they had it
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="no")
    model = network()
    inner = made(model)
    prepared, opt = accelerator.prepare(model, inner)
    for step, objective in enumerate(TURNS):
        opt.zero_grad()
        accelerator.backward(loss_of(prepared, step))
        inner.objective = objective
        opt.step()
    assert_trained(model)
    accelerator.backward(loss_of(prepared, 0))
    opt.objective = "forget"  # an attribute of the wrapper
    with pytest.raises(ValueError, match="on this optimizer and not on a wrapper around it"):
        opt.step()


def test_releasing_and_diagnostics_find_the_optimizer_that_accelerate_wraps() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state()
    model = network()
    own = made(model)
    wrapped_model, wrapper = accelerate.Accelerator(cpu=True, mixed_precision="no").prepare(model, own)
    for step, objective in enumerate(TURNS):
        chosen: dict[str, Any] = {"objective": objective} if step % 2 else {}
        if not chosen:
            own.objective = objective
        with releasing(wrapper, **chosen):
            loss_of(wrapped_model, step).backward()
    assert_trained(model)
    assert diagnostics(wrapper) == diagnostics(own) != {"all": {}}


def test_a_wrapper_and_schedulers_may_keep_values_of_their_own_in_the_groups() -> None:
    model = network()
    group = {"params": list(model.parameters()), "lr": 1e-2, "rho": 0.05, "adaptive": False}
    opt = DualOptimPlus([group])
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=9, cycle_momentum=False)
    again = DualOptimPlus([{**own, "params": own["params"]} for own in opt.param_groups])
    loss_of(model, 0).backward()
    again.step(objective="forget")
    again.load_state_dict(again.state_dict())
    assert again.param_groups[0]["rho"] == 0.05


def test_an_optimizer_without_objectives_has_none_to_release_or_to_diagnose() -> None:
    plain = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    with (
        pytest.raises(ValueError, match=r"releasing: AdamW has no objectives, .*leave it out"),
        releasing(plain, objective="forget"),
    ):
        pass
    with pytest.raises(ValueError, match="diagnostics: AdamW has no objectives"):
        diagnostics(plain)


def test_a_trainer_of_ones_own(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, step: Tensor) -> dict[str, Tensor]:
            return {"loss": loss_of(self.inner, int(step))}

    class Trainer(transformers.Trainer):  # type: ignore[misc, name-defined]
        def training_step(self, *arguments: Any, **named: Any) -> Tensor:
            opt.objective = TURNS[self.state.global_step]
            return super().training_step(*arguments, **named)  # type: ignore[no-any-return]

        def _get_train_sampler(self, *arguments: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = Model()
    opt = made(model)
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=len(TURNS), per_device_train_batch_size=1, report_to=[], use_cpu=True,
        max_grad_norm=0.0, lr_scheduler_type="constant", disable_tqdm=True, save_strategy="no", seed=0,
    )  # fmt: skip
    rows = [{"step": step} for step in range(len(TURNS))]
    Trainer(model=model, args=settings, train_dataset=rows, optimizers=(opt, None)).train()
    assert_trained(model.inner)


def lightning_module(kind: str) -> Any:
    from lightning import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()
            self.automatic_optimization = kind.startswith("automatic")

        def configure_optimizers(self) -> Any:
            return made(self.model)

        def training_step(self, batch: Any, step: int) -> Any:
            opt = self.optimizers()
            if kind == "automatic":
                opt.objective = TURNS[step]
            elif kind == "automatic, inner":
                opt.optimizer.objective = TURNS[step]
            if kind.startswith("automatic"):
                return loss_of(self.model, step)
            opt.zero_grad()
            self.manual_backward(loss_of(self.model, step))
            if kind == "manual, argument":
                return opt.step(objective=TURNS[step])
            opt.objective = TURNS[step]
            return opt.step()

    return Module()


@pytest.mark.filterwarnings("ignore")  # Lightning's own
@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
@pytest.mark.parametrize("kind", ["automatic", "automatic, inner", "manual, argument", "manual, property"])
def test_lightning(kind: str) -> None:
    from lightning import Trainer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    module = lightning_module(kind)
    trainer = Trainer(max_epochs=1, accelerator="cpu", **dict.fromkeys(quiet, False))
    trainer.fit(module, torch.utils.data.DataLoader(range(len(TURNS)), batch_size=1))
    assert_trained(module.model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_an_objective_that_is_added_by_way_of_a_wrapper_is_the_inner_optimizers_too() -> None:
    from lightning import Fabric

    model = network()
    inner = made(model)
    wrapped, opt = Fabric(accelerator="cpu").setup(model, inner)
    opt.add_objective("style")
    assert opt.objectives == inner.objectives == ("forget", "retain", "style")
    for objective in inner.objectives:
        loss_of(wrapped, 0).backward()
        inner.step(objective=objective)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_fabric() -> None:
    from lightning import Fabric

    model = network()
    inner = made(model)
    fabric = Fabric(accelerator="cpu")
    wrapped, opt = fabric.setup(model, inner)
    for step, objective in enumerate(TURNS):
        opt.zero_grad()
        fabric.backward(loss_of(wrapped, step))
        inner.objective = objective
        opt.step()
    assert_trained(model)


DEEPSPEED = """
import sys
import torch
import deepspeed
from tests.test_wrappers import TURNS, loss_of, made, network

for stage in (0, 1, 2):
    model, plain = network(), network()
    inner, opt = made(model), made(plain)
    config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": stage}, "gradient_clipping": 0.5,
              "zero_allow_untested_optimizer": True}
    engine, wrapped, _, _ = deepspeed.initialize(model=model, optimizer=inner, config=config)
    for step, objective in enumerate(TURNS):
        engine.backward(loss_of(engine, step))
        inner.objective = objective
        engine.step()
        opt.zero_grad()
        loss_of(plain, step).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        opt.step(objective=objective)
    off = max(float((a - b).abs().max()) for a, b in zip(model.parameters(), plain.parameters()))
    assert off < 1e-5, (stage, off)
    if stage:
        engine.backward(loss_of(engine, 0))
        wrapped.objective = "forget"
        try:
            engine.step()
        except ValueError as error:
            assert "no objective was chosen" in str(error)
        else:
            raise AssertionError("stepped for nobody")
"""


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed() -> None:
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", DEEPSPEED],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **alone, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


# A model


def compiled(module: Any, backend: Any = "eager") -> Any:
    return torch.compile(module, backend=backend)


def by_layers(model: Any, backend: Any = "eager") -> Any:
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = compiled(layer, backend)
    return model


def adapter(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


WRAPPED: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "the model": (lambda model: model, compiled),
    "its layers": (lambda model: model, by_layers),
    "an adapter": (adapter, compiled),
    "a model within an adapter": (adapter, lambda model: adapter(compiled(model.unload()))),
}


def unlearning(model: Any, folder: Path, **given: Any) -> Any:
    settings = {"logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_steps": 1}
    return UnlearnTrainer(
        model,
        TrainingArguments(str(folder), **{**settings, "save_strategy": "steps", **given}),
        objectives={
            "forget": Objective([question("Who?", "Me.")], LOSSES["GA"]()),
            "retain": Objective([question("What?", "That.")], LOSSES["GD"]()),
        },
        turns=by_turns({"forget": 1, "retain": 1}, 1, 2),
        processing_class=tiny.tokenizer(),
        optimizer_cls_and_kwargs=(DualOptimPlus, {"lr": 1e-2}),
        diagnostics_every=0,
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
@pytest.mark.parametrize("what", WRAPPED)
def test_a_trainer_saves_and_resumes_a_compiled_model_as_the_model_itself(what: str, tmp_path: Path) -> None:
    make, wrap = WRAPPED[what]
    plain = unlearning(make(tiny.model()), tmp_path / "plain")
    plain.train()
    with torch.compiler.set_stance("force_eager"):  # nothing is traced, which takes seconds
        trainer = unlearning(wrap(make(tiny.model())), tmp_path / "wrapped")
        trainer.train()
        again = unlearning(wrap(make(tiny.model())), tmp_path / "wrapped")
        again.train(resume_from_checkpoint=str(tmp_path / "wrapped" / "checkpoint-1"))
    file = f"checkpoint-2/{'adapter_model' if 'adapter' in what else 'model'}.safetensors"
    expected, saved = (load_file(tmp_path / name / file) for name in ("plain", "wrapped"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    for model in (trainer.model, again.model):
        assert dict(model.named_parameters()).keys() == dict(plain.model.named_parameters()).keys()
        assert all(map(torch.equal, model.parameters(), plain.model.parameters()))


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_a_compiled_layer_is_compiled_in_place_by_the_same_backend(tmp_path: Path) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = by_layers(tiny.model(), backend)
    with torch.compiler.set_stance("force_eager"):
        trainer = unlearning(model, tmp_path)
    assert not graphs
    assert all(type(layer).__name__ == "LlamaDecoderLayer" for layer in trainer.model.model.layers)
    trainer.model.model.layers[0](torch.ones(1, 3, 16), position_embeddings=(torch.ones(1, 3, 8), torch.zeros(1, 3, 8)))
    assert graphs


def test_a_model_in_any_other_wrapper_is_refused(tmp_path: Path) -> None:
    for wrap in (nn.DataParallel, AveragedModel, lambda model: compiled(nn.DataParallel(compiled(model)))):
        with pytest.raises(UserError, match="hand over the model itself"):
            unlearning(wrap(tiny.model()), tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_what_was_saved_without_a_trained_parameter_is_an_error(tmp_path: Path) -> None:
    trainer = unlearning(tiny.model(), tmp_path)
    by_layers(trainer.model)
    with pytest.raises(UserError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.weight, which is trained"):
        trainer.save_model(str(tmp_path / "saved"))
    model = adapter(tiny.model())
    model.base_model.model.model.norm.weight.requires_grad_(True)
    trainer = unlearning(model, tmp_path)
    with pytest.raises(UserError, match=r"lacks .*norm.*, which is trained; name it in the adapter's modules_to_save"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*")), "no checkpoint was sealed"


def test_parameters_that_are_tied_or_saved_by_other_names_are_saved(tmp_path: Path) -> None:
    tied = tiny.model()
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, num_key_value_heads=1, num_local_experts=2, eos_token_id=0, bos_token_id=None, **sizes
        )
    )
    for name, model in (("tied", tied), ("experts", experts)):
        model.save_pretrained(tmp_path / name)
        check_saved(model, tmp_path / name)
        with pytest.raises(UserError, match="lacks"):
            check_saved(model, tmp_path)
