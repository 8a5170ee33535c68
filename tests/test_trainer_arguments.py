"""What `UnlearnTrainer` is told: read, or refused, and never ignored."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from dualoptim import DualOptim, DualOptimPlus, UnlearnTrainer
from dualoptim.errors import UserError
from dualoptim.losses import LOSSES
from dualoptim.optim import parameter_groups
from dualoptim.schedule import by_turns, jointly
from dualoptim.trainer import Objective
from dualoptim.training import arguments as arguments
from dualoptim.training import reporting

from . import tiny
from .test_trainer import FORGET, RETAIN, weights

TURNS = by_turns({"forget": 1, "retain": 1}, 4, 4)
FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
QUIET = {"save_strategy": "no", "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}


def run(
    folder: Path, args: Any = None, *, model: Any = None, turns: Any = TURNS, named: Any = None, **given: Any
) -> Any:
    return UnlearnTrainer(
        tiny.model() if model is None else model,
        args or TrainingArguments(str(folder), **{**QUIET, **given}),
        objectives={"forget": Objective(FORGET, LOSSES["GA"]()), "retain": Objective(RETAIN, LOSSES["GD"]())},
        turns=turns,
        diagnostics_every=0,
        **{
            "processing_class": tiny.tokenizer(),
            "optimizer_cls_and_kwargs": (DualOptimPlus, {}),
            **(named or {}),
        },
    )


def trained(*args: Any, **given: Any) -> torch.Tensor:
    trainer = run(*args, **given)
    trainer.train()
    return weights(trainer)


def test_every_argument_of_transformers_is_read_or_refused() -> None:
    tables = [arguments.READ, arguments.SETTLED, arguments.SCRIPTS, arguments.UNREAD.keys()]
    assert sum(map(len, tables)) == len(frozenset().union(*tables)), "a field stands in two tables"
    new = FIELDS - frozenset().union(*tables)
    assert not new, f"say in dualoptim.training.arguments whether UnlearnTrainer reads {sorted(new)}"
    signature = {*inspect.signature(transformers.Trainer.__init__).parameters} - {"self"}
    new = signature - arguments.READ_NAMED - arguments.UNREAD_NAMED.keys()
    assert not new, f"say in dualoptim.training.arguments whether UnlearnTrainer takes {sorted(new)}"


OTHER = {
    "per_device_train_batch_size": 2, "auto_find_batch_size": True, "num_train_epochs": 1.0, "max_steps": 7,
    "label_smoothing_factor": 0.1, "average_tokens_across_devices": False, "ignore_data_skip": True,
    "train_sampling_strategy": "sequential", "group_by_length": True, "length_column_name": "len",
    "dataloader_drop_last": True, "dataloader_persistent_workers": True, "remove_unused_columns": False,
    "label_names": ["labels"],
}  # fmt: skip


@pytest.mark.parametrize("name", arguments.UNREAD)
def test_what_is_not_read_is_refused(tmp_path: Path, name: str) -> None:
    if name not in FIELDS:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    workers = {"dataloader_num_workers": 1} if "workers" in name else {}
    with pytest.raises(UserError, match=f"does not read {name}"):
        run(tmp_path / "out", **{name: OTHER[name]}, **workers)
    assert not (tmp_path / "out").exists(), "nothing was written"


@pytest.mark.parametrize("name", arguments.UNREAD_NAMED)
def test_arguments_of_a_trainer_that_are_not_read_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"does not read {name}"):
        run(tmp_path, named={name: [1]})


def test_a_value_that_says_what_turns_say_is_taken(tmp_path: Path) -> None:
    trainer = run(tmp_path, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert trainer.args.max_steps == 4
    again = run(tmp_path, trainer.args)
    assert again.args.per_device_train_batch_size == 2


def test_the_arguments_given_stay_as_they_are(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), **QUIET)
    before = dict(vars(args))
    trainer = run(tmp_path, args)
    trainer.train()
    assert {key: vars(args)[key] for key in before} == before
    assert trainer.args.per_device_train_batch_size == 4, "what speed and the model card are computed with"
    run(tmp_path, args, turns=TURNS[:2]).train()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"accelerator_config": {"split_batches": True}}, "does not read split_batches"),
        ({"accelerator_config": {"dispatch_batches": True}}, "does not read dispatch_batches"),
    ],
)
def test_batches_that_accelerate_would_share_out_are_refused(tmp_path: Path, given: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(tmp_path, **given)


def test_fields_of_other_trainers_arguments_are_refused_and_ones_own_are_not(tmp_path: Path) -> None:
    run(tmp_path, Seq2SeqTrainingArguments(str(tmp_path), **QUIET))
    with pytest.raises(UserError, match="does not read predict_with_generate of Seq2SeqTrainingArguments"):
        run(tmp_path, Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, **QUIET))

    @dataclasses.dataclass
    class Own(TrainingArguments):
        of_my_script: int = 0

    run(tmp_path, Own(str(tmp_path), of_my_script=1, **QUIET))


def test_a_field_that_is_newer_than_the_tables_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(arguments, "READ", arguments.READ - {"run_name", "project"})
    with caplog.at_level(logging.WARNING):
        run(tmp_path, run_name="mine")
    assert "run_name is newer than dualoptim" in caplog.text
    assert "project" not in caplog.text, "which nobody gave"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 1e-3), ("lr_scheduler_type", "constant"), ("warmup_steps", 3), ("weight_decay", 0.5),
        ("max_grad_norm", 1e-12), ("bf16", True), ("seed", 7), ("data_seed", 7), ("neftune_noise_alpha", 5.0),
    ],
)  # fmt: skip
def test_what_is_read_changes_training(tmp_path: Path, field: str, value: Any) -> None:
    assert not torch.equal(trained(tmp_path), trained(tmp_path, **{field: value}))


@pytest.mark.parametrize(
    "given",
    [
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3},
        {"torch_empty_cache_steps": 1, "skip_memory_metrics": False, "use_cache": True, "eval_accumulation_steps": 1},
        {"activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing": True},
    ],
)
def test_what_costs_or_saves_memory_and_time_changes_nothing(tmp_path: Path, given: dict[str, Any]) -> None:
    assert torch.equal(trained(tmp_path), trained(tmp_path, **given))


def test_batches_are_loaded_as_told(tmp_path: Path) -> None:
    told = {"num_workers": 1, "prefetch_factor": 3}
    if "dataloader_in_order" in FIELDS:
        told |= {"in_order": False}
    trainer = run(tmp_path, **{f"dataloader_{key}": value for key, value in told.items()})
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader(RETAIN)):
        assert {key: getattr(loader, key) for key in told} == told


def test_tokens_seen_are_those_of_the_rows(tmp_path: Path) -> None:
    for counted, of in (("all", "input_ids"), ("non_padding", "attention_mask")):
        trainer = run(tmp_path, include_num_input_tokens_seen=counted)
        trainer.train()
        batches = [trainer.rows.collate([trainer.rows[draw] for draw in draws]) for draws in trainer._plan()]
        tensors = [batch[of] for objectives in batches for batch in objectives.values()]
        expected = sum(t.numel() if counted == "all" else int(t.sum()) for t in tensors)
        assert trainer.state.num_input_tokens_seen == expected


def test_args_optimizer_serves_all_objectives_where_none_is_given(tmp_path: Path) -> None:
    given = {"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    named = {"optimizer_cls_and_kwargs": None}
    by_name = trained(tmp_path, named=named, **given)
    by_class = trained(tmp_path, named={"optimizer_cls_and_kwargs": (torch.optim.SGD, {})},
                       **{key: value for key, value in given.items() if key != "optim"})  # fmt: skip
    assert torch.equal(by_name, by_class), "and a class of torch's is given the learning rate, too"
    adam = run(tmp_path, named=named, adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-3)
    adam.create_optimizer()
    assert (adam.optimizer.defaults["betas"], adam.optimizer.defaults["eps"]) == ((0.5, 0.6), 1e-3)


@pytest.mark.parametrize("cls", [DualOptimPlus, torch.optim.AdamW])
def test_weight_decay_is_the_optimizers_own_where_it_has_one(tmp_path: Path, cls: Any) -> None:
    trainer = run(tmp_path, named={"optimizer_cls_and_kwargs": (cls, {"weight_decay": 0.3})})
    trainer.create_optimizer()
    decays = {group["weight_decay"] for group in trainer.optimizer.param_groups if group["params"]}
    assert decays == {0.3, 0.0}, "none on norms"
    with pytest.raises(UserError, match=r"weight_decay is 0.1 in args and 0.3"):
        run(tmp_path, weight_decay=0.1, named={"optimizer_cls_and_kwargs": (cls, {"weight_decay": 0.3})})


def given_optimizers(*, objectives: Any = ("forget", "retain"), scheduled: bool = False) -> tuple[Any, dict[str, Any]]:
    model = tiny.model()
    optimizer = DualOptimPlus(parameter_groups(model), lr=1e-3, objectives=objectives)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer) if scheduled else None
    return model, {"optimizers": (optimizer, schedule), "optimizer_cls_and_kwargs": None}


def test_an_optimizer_and_a_schedule_may_be_given(tmp_path: Path) -> None:
    model, named = given_optimizers()
    same = {"lr_scheduler_type": "constant", "learning_rate": 1e-3}
    by_class = trained(tmp_path, named={"optimizer_cls_and_kwargs": (DualOptimPlus, {"weight_decay": 0.01})}, **same)
    assert (trained(tmp_path, model=model, named=named, **same) - by_class).abs().max() < 2e-6
    model, named = given_optimizers(scheduled=True)
    trainer = run(tmp_path, model=model, named=named)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-3 / 3] * 4), "the schedule's own"


@pytest.mark.parametrize(
    ("scheduled", "given"),
    [
        (False, {"learning_rate": 2e-3}), (False, {"weight_decay": 0.1}), (False, {"optim": "sgd"}),
        (False, {"adam_beta1": 0.8}), (True, {"lr_scheduler_type": "cosine"}), (True, {"warmup_steps": 2}),
    ],
)  # fmt: skip
def test_what_a_given_optimizer_or_schedule_brings_is_refused_beside_it(
    tmp_path: Path, scheduled: bool, given: dict[str, Any]
) -> None:
    model, named = given_optimizers(scheduled=scheduled)
    with pytest.raises(UserError, match=f"{next(iter(given))} is not read where optimizers="):
        run(tmp_path, model=model, named=named, **given)


def test_optimizers_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adam_beta2 is not read where optimizer_cls_and_kwargs"):
        run(tmp_path, adam_beta2=0.9)
    model, named = given_optimizers(scheduled=True)
    with pytest.raises(UserError, match="a scheduler without its optimizer"):
        run(tmp_path, model=model, named={**named, "optimizers": (None, named["optimizers"][1])})
    with pytest.raises(UserError, match="both bring an optimizer"):
        run(tmp_path, model=model, named={"optimizers": named["optimizers"]})


def test_names_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    model, named = given_optimizers(objectives=("forget", "keep"))
    with pytest.raises(UserError, match="the optimizer's objectives are forget, keep, and turns serve 'retain'"):
        run(tmp_path, model=model, named=named)
    with pytest.raises(UserError, match="the optimizer's objectives are a, b, and turns serve 'forget'"):
        run(tmp_path, named={"optimizer_cls_and_kwargs": (DualOptim, {"objectives": ("a", "b")})})
    run(tmp_path, named={"optimizer_cls_and_kwargs": (DualOptim, {"objectives": ("all",)})})
    with pytest.raises(UserError, match="turns: unknown objective 'forgets'; did you mean 'forget'"):
        run(tmp_path, turns=jointly({"forgets": 1, "retain": 1}, 4, 2))
    with pytest.raises(UserError, match="turns: there are no steps"):
        run(tmp_path, turns=[])


@pytest.mark.parametrize(
    ("cls", "arguments", "said"),
    [
        (DualOptimPlus, {"fused": True}, "DualOptimPlus: unknown argument 'fused'"),
        (DualOptimPlus, {"learning_rate": 1e-3}, "unknown argument 'learning_rate'; did you mean 'lr'"),
        (DualOptim, {"delta_bit": 8}, "DualOptim: unknown argument 'delta_bit'; did you mean 'delta_bits'"),
        (DualOptimPlus, {"base_bits": 4}, "base_bits"), (DualOptimPlus, {"betas": 0.9}, "betas"),
        (DualOptimPlus, {"lr_scales": {"forgte": 2.0}}, "forgte"), (DualOptimPlus, {"objectives": None}, "objectives"),
        (torch.optim.AdamW, {"fusd": True}, "AdamW: unknown argument 'fusd'; did you mean 'fused'"),
    ],
)  # fmt: skip
def test_an_optimizers_arguments_are_tried_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: Any, arguments: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("dualoptim.trainer.check_causal", lambda _: pytest.fail("the model was run"))
    with pytest.raises(UserError, match=f"optimizer_cls_and_kwargs: .*{said}"):
        run(tmp_path, named={"optimizer_cls_and_kwargs": (cls, arguments)})


def test_what_takes_any_argument_is_not_asked_for_names(tmp_path: Path) -> None:
    class Own(DualOptimPlus):
        def __init__(self, params: Any, **given: Any) -> None:
            super().__init__(params, betas=(given.pop("beta"), 0.95), **given)

    assert trained(tmp_path, named={"optimizer_cls_and_kwargs": (Own, {"beta": 0.9})}).isfinite().all()


@pytest.mark.parametrize("name", [1, ""])
def test_an_objectives_name_is_a_text(tmp_path: Path, name: Any) -> None:
    with pytest.raises(UserError, match=f"a name is a text that is not empty, such as 'forget', and not {name!r}"):
        UnlearnTrainer(
            tiny.model(),
            TrainingArguments(str(tmp_path), **QUIET),
            objectives={name: Objective(RETAIN, LOSSES["GD"]())},
            turns=[{name: 1}],
            processing_class=tiny.tokenizer(),
        )


def test_a_model_by_its_folder_is_loaded_with_its_tokenizer_in_32_bits(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.model().to(torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    trainer = run(tmp_path, model=str(folder), named={"processing_class": None})
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.processing_class.chat_template == tiny.CHAT_TEMPLATE
    trainer.train()
    rounded = tiny.model()
    with torch.no_grad():
        for p in rounded.parameters():
            p.copy_(p.bfloat16())
    assert torch.equal(weights(trainer), trained(tmp_path, model=rounded))
    with pytest.raises(UserError, match=r"model '.*nothing': there is no such folder"):
        run(tmp_path, model=str(tmp_path / "nothing"), named={"processing_class": None})
    with pytest.raises(UserError, match="processing_class: give the model's tokenizer"):
        run(tmp_path, named={"processing_class": None})


def test_a_reference_by_its_folder_is_loaded(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    trainer = run(tmp_path, named={"reference": str(folder)})
    assert not any(p.requires_grad for p in trainer.reference.parameters())


def test_the_model_card_names_the_optimizer_that_trained(tmp_path: Path) -> None:
    trainer = run(tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "- optimizer: DualOptimPlus\n" in card
    assert "- train_batch_size: 2\n" in card
    assert "- total_train_batch_size: 4\n" in card
    assert "- training_steps: 4\n" in card


@pytest.mark.skipif(not hasattr(transformers.trainer, "hf_api"), reason="an older transformers uploads otherwise")
def test_a_checkpoint_is_pushed_from_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[tuple[str, bool, list[str]]] = []

    class Job:
        def done(self) -> bool:
            return True

    class Hub:
        def upload_folder(self, folder_path: str, **kwargs: Any) -> Job:
            there = sorted(os.listdir(folder_path))
            pushed.append((Path(folder_path).name, (Path(folder_path) / "manifest.json").exists(), there))
            return Job()

    def init(self: Any) -> None:
        self.hub_model_id, self.push_in_progress = "me/mine", None

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    monkeypatch.setattr(UnlearnTrainer, "init_hf_repo", init)
    monkeypatch.setattr(UnlearnTrainer, "_finish_current_push", lambda self: None)
    given = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_always_push": True}
    run(tmp_path / "out", save_strategy="steps", save_steps=2, **given).train()
    assert [name for name, _, _ in pushed] == ["out", "checkpoint-2", "out", "checkpoint-4"]
    assert [sealed for _, sealed, _ in pushed] == [False, True, False, True]
    assert not any(".partial" in there for _, _, there in pushed)
    assert "model.safetensors" in pushed[0][2]


def test_trackers_write_into_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    class Writer:
        def __init__(self, log_dir: str) -> None:
            opened.append(log_dir)

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    class Board(reporting.TensorBoardCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self._SummaryWriter, self.tb_writer, self.logging_dir = Writer, None, None

    monkeypatch.setitem(reporting.INTEGRATION_TO_CALLBACK, "tensorboard", Board)
    monkeypatch.setattr(reporting, "get_available_reporting_integrations", lambda: ["tensorboard"])
    saves = {"report_to": "tensorboard", "save_strategy": "steps", "save_steps": 2}
    trainer = run(tmp_path / "out", **saves, named={"log_dir": tmp_path / "logs"})
    assert trainer.args.report_to == ["tensorboard"]
    assert isinstance(trainer.callback_handler.callbacks[1], Board), "where transformers has them"
    trainer.train()
    run(tmp_path / "out", **saves).train()
    assert [Path(place).parent for place in opened] == [tmp_path / "logs", tmp_path / "out" / "runs"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_told_before_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(reporting, "get_available_reporting_integrations", list)
    with pytest.raises(UserError, match=f"report_to {name}: its package is not installed"):
        run(tmp_path, model="never/looked-for", report_to=name)
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        run(tmp_path, model="never/looked-for", report_to="tensorbord")


def test_tensorboard_itself(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path / "out", report_to="tensorboard", named={"log_dir": tmp_path / "logs"}).train()
    assert len(list((tmp_path / "logs").rglob("events.out.tfevents.*"))) == 1
    assert not list((tmp_path / "out").rglob("events*"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"turns": ["forget", "retain"]}, "turns: step 0 is 'forget'; give objective → sequences"),
        ({"turns": [{"forget": 2}, {}]}, "turns: step 1 serves no objective"),
        ({"turns": {"forget": 2}}, "turns: give a list with an entry for each step"),
        ({"turns": 8}, "turns: give a list with an entry for each step, .* and not 8"),
        ({"turns": [{"forget": 0}]}, "turns: step 0 has 0 sequences of 'forget'"),
        ({"named": {"reference": True}}, "reference: give a model, or its name or folder as a text, and not True"),
        ({"named": {"max_length": None}}, "max_length must be a whole number of tokens > 0, but is None"),
        ({"named": {"max_length": 0}}, "max_length must be a whole number of tokens > 0, but is 0"),
        ({"model": Path("model")}, "model: give a model, or its name or folder as a text"),
        ({"args": "out"}, "args: give TrainingArguments, and not 'out'"),
    ],
)
def test_an_argument_of_another_kind_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("dualoptim.trainer.as_rows", lambda *_: pytest.fail("rows were read"))
    with pytest.raises(UserError, match=said):
        run(tmp_path, **given)
