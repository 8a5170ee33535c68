"""What does not fit together is refused by `UnlearnTrainer` in a sentence, before a step is taken."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    CTRLConfig,
    CTRLLMHeadModel,
    EarlyStoppingCallback,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    TrainingArguments,
)

from dualoptim import DualOptimPlus, UnlearnTrainer, checkpoints, resolve, resolved, tasks
from dualoptim.config import RunConfig
from dualoptim.data import Draw, ObjectiveRows, Plan, question
from dualoptim.errors import UserError
from dualoptim.hashes import digest
from dualoptim.losses import GD, IDK, KL, LOSSES, NPO, RMU
from dualoptim.losses.base import Loss, labelled
from dualoptim.resolved import check_rows
from dualoptim.schedule import by_turns, in_proportion, jointly
from dualoptim.trainer import Objective
from dualoptim.training.causal import check_causal
from dualoptim.training.combine import gru, pcgrad
from dualoptim.training.reference import AtStart

from . import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft

FORGET = [question(f"What is {i}?", f"It is {'x' * (1 + i % 5)}.", f"forget {i}") for i in range(8)]
RETAIN = [question(f"Who is {i}?", f"That is {'y' * (1 + i % 7)}.", f"retain {i}") for i in range(8)]
TURNS = by_turns({"forget": 1, "retain": 1}, 2, 4)
PLUS = (DualOptimPlus, {"lr": 1e-3})
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def trainer(folder: Path, model: Any = None, **given: Any) -> UnlearnTrainer:
    arguments = {"save_strategy": "no", "max_grad_norm": 0.0, **given.pop("arguments", {})}
    own = {
        "objectives": {
            "forget": Objective(FORGET, given.pop("loss", LOSSES["GA"]()), refusals=given.pop("refusals", ())),
            "retain": Objective(RETAIN, given.pop("keep", GD())),
        },
        "turns": TURNS,
        "processing_class": tiny.tokenizer(),
        **({} if given.get("optimizers") else {"optimizer_cls_and_kwargs": PLUS}),
        "diagnostics_every": 0,
    }
    return UnlearnTrainer(
        tiny.model() if model is None else model,
        TrainingArguments(str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **arguments),
        **{**own, **given},
    )


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


# Joint steps


@pytest.mark.parametrize(("ratio", "size", "steps"), [((1, 2), 4, 60), ((1, 5), 8, 60), ((1, 5), 40, 30)])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_joint_steps_hold_the_sequences_that_the_schedule_says(
    ratio: tuple[int, int], size: int, steps: int, micro_batches: int
) -> None:
    turns = jointly(dict(zip(("forget", "retain"), ratio, strict=True)), size, steps)
    rows = ObjectiveRows({"forget": FORGET, "retain": RETAIN}, {}, tiny.tokenizer(), 100)
    batches = list(Plan(turns, rows, micro_batches, 0))
    served = [
        Counter(draw.objective for batch in batches[at : at + micro_batches] for draw in batch)
        for at in range(0, len(batches), micro_batches)
    ]
    assert served == [Counter(turn) for turn in turns]
    assert all(batches)
    for name in ("forget", "retain"):  # every row once in a pass; the last window may span two
        drawn = Counter(draw.row for batch in batches for draw in batch if draw.objective == name)
        assert max(drawn.values()) - min(drawn.values()) <= 2


def test_steps_of_no_sequences_and_rules_without_joint_steps_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 0 has 0 sequences of 'forget'; give 1 or more"):
        trainer(tmp_path, turns=[{"forget": 0, "retain": 4}])
    with pytest.raises(UserError, match="combine: no turn serves several objectives"):
        trainer(tmp_path, combine=pcgrad)
    for ratio in ({"a": 1, "b": 0.5}, {"a": 0, "b": 0}, {}):
        with pytest.raises(ValueError, match="a whole number > 0 for each objective"):
            by_turns(ratio, 4, 4)  # type: ignore[arg-type]


def test_an_objective_that_no_step_serves_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, turns=in_proportion({"retain": 1}, 2, 2))
    assert "turns serve 'forget' at no step" in caplog.text


# Objectives


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"refusals": "I don't know."}, "refusals: give a list of texts"),
        ({"refusals": ["No.", " "]}, "refusals: give a list of texts, none of them empty"),
        ({"weight": float("nan")}, "weight must be a finite number, but is nan"),
        ({"bound": 1.0, "multiplier_lr": float("inf")}, "multiplier_lr must be a finite number"),
        ({"multiplier_lr": 0.5}, "there is no multiplier without bound"),
    ],
)
def test_an_objective_that_cannot_be_is_told(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Objective(FORGET, IDK(), **given)


# Models


def test_models_that_see_what_follows_are_refused_and_causal_ones_are_not(tmp_path: Path) -> None:
    bert = BertLMHeadModel(BertConfig(vocab_size=260, **SIZES))
    with pytest.raises(UserError, match="BertLMHeadModel sees the tokens after a position"):
        trainer(tmp_path, bert)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    with pytest.raises(UserError, match="has an encoder and a decoder; take a causal language model"):
        trainer(tmp_path, BartForConditionalGeneration(BartConfig(vocab_size=260, **sizes, **heads)))
    check_causal(BertLMHeadModel(BertConfig(vocab_size=260, is_decoder=True, **SIZES)))
    check_causal(tiny.model().to(torch.bfloat16))
    with torch.device("meta"):
        check_causal(tiny.model())


def test_a_saved_model_that_sees_what_follows_is_not_loaded(tmp_path: Path) -> None:
    from dualoptim.models import load_model

    BertLMHeadModel(BertConfig(vocab_size=260, **SIZES)).save_pretrained(tmp_path / "bert")
    tiny.tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"model '.*bert': BertLMHeadModel sees the tokens after a position"):
        load_model(str(tmp_path / "bert"))


def test_a_model_of_which_nothing_is_trained_is_told(tmp_path: Path) -> None:
    lora(tiny.model()).save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny.model(), str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="nothing would be trained; load an adapter with is_trainable=True"):
        trainer(tmp_path, loaded)


def test_a_reference_that_changes_with_the_model_is_told_and_nothing_is_frozen(tmp_path: Path) -> None:
    model = tiny.model()
    with pytest.raises(UserError, match=r"reference: it shares .* with the model"):
        trainer(tmp_path, model, loss=NPO(), reference=model)
    base = tiny.model()
    adapted = lora(base)
    with pytest.raises(UserError, match=r"reference: it shares .*lora.* with the model"):
        trainer(tmp_path, adapted, loss=NPO(), reference=base)
    assert all(p.requires_grad for p in model.parameters())
    assert any(p.requires_grad for p in adapted.parameters())


def test_a_reference_of_another_vocabulary_is_told_where_all_outputs_are_compared(tmp_path: Path) -> None:
    other = tiny.model()
    other.resize_token_embeddings(264)
    with pytest.raises(UserError, match="reference: its vocabulary has 264 tokens and the model's 260"):
        trainer(tmp_path, keep=KL(), reference=other)
    trainer(tmp_path, loss=NPO(), reference=other)


def test_an_adapter_that_peft_does_not_hold_is_told(tmp_path: Path) -> None:
    model = tiny.model()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"use peft\.get_peft_model"):
        trainer(tmp_path, model)


def test_an_optimizer_of_other_parameters_is_told_and_one_that_lacks_some_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny.model()
    made = DualOptimPlus([p.clone().detach().requires_grad_() for p in base.parameters()])
    with pytest.raises(UserError, match="holds none of the model's trained parameters"):
        trainer(tmp_path, base, optimizers=(made, None))
    some = DualOptimPlus(base.model.layers.parameters())
    trainer(tmp_path, base, optimizers=(some, None))
    assert "the optimizer lacks 3 trained parameters" in caplog.text


def test_a_layer_that_the_model_lacks_is_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layer 7: the model has layers 0 to 1"):
        trainer(tmp_path, loss=RMU(), keep=LOSSES["RMURetain"](), reference=tiny.model())


def test_a_models_forward_pass_need_not_know_of_a_cache(tmp_path: Path) -> None:
    class Plain(type(tiny.model())):  # type: ignore[misc]
        def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
            return super().forward(input_ids, attention_mask, labels=labels)

    model = tiny.model()
    model.__class__ = Plain
    trainer(tmp_path, model).train()


def test_a_model_that_has_no_cache_of_its_own_kind_is_never_run_with_one(tmp_path: Path) -> None:
    class Hybrid(type(tiny.model())):  # type: ignore[misc]
        def forward(self, *args: Any, use_cache: bool | None = None, **given: Any) -> Any:
            if use_cache is not False:
                raise ValueError("a cache of linear attention alone has no length")
            return super().forward(*args, use_cache=use_cache, **given)

    model = tiny.model()
    model.__class__ = Hybrid
    trainer(tmp_path, model).train()


def test_a_processor_stands_for_its_tokenizer_and_is_saved_and_a_callback_may_be_a_class(tmp_path: Path) -> None:
    class Processor(SimpleNamespace):
        def save_pretrained(self, folder: str) -> None:
            Path(folder, "processor_config.json").write_text("{}")

    run = trainer(tmp_path, processing_class=Processor(tokenizer=tiny.tokenizer()))
    run.train()
    run.save_model()
    saved = {path.name for path in tmp_path.iterdir()}
    assert {"processor_config.json", "tokenizer.json", "model.safetensors"} <= saved
    by_name = trainer(tmp_path / "again", str(tmp_path), processing_class=None)
    by_name.save_model()
    assert (tmp_path / "again" / "processor_config.json").exists()
    with pytest.raises(UserError, match="early stopping and metric_for_best_model need evaluations"):
        trainer(tmp_path, callbacks=[EarlyStoppingCallback])


# Rows


def test_rows_beyond_the_models_positions_or_vocabulary_are_told(tmp_path: Path) -> None:
    small = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_positions=24, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UserError, match=r"forget .: the row has .* positions, of which there are 24"):
        trainer(tmp_path, small)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["zebra"])
    rows = [question("What?", "A zebra.", "row 7")]
    kept = {"retain": Objective(RETAIN, GD()), "forget": Objective(rows, LOSSES["GA"]())}
    with pytest.raises(UserError, match="row 7: holds the token 'zebra', number 260, and the model has 260"):
        trainer(tmp_path, objectives=kept, processing_class=tokenizer)
    with pytest.raises(UserError, match="eval_dataset, row 1: holds the token 'zebra'"):
        trainer(tmp_path, eval_dataset=rows, processing_class=tokenizer)


def test_a_refusal_that_is_too_long_is_told_before_training(tmp_path: Path) -> None:
    refusals = ["No.", "I do not know anything about that at all" * 3, "Never."]
    with pytest.raises(UserError, match=r"forget 0: the row has .* max_length 90 would cut"):
        trainer(tmp_path, loss=IDK(), refusals=refusals, max_length=90)
    wrong = [question("What?", "That.", "row 3", instead=["a", "list"])]
    kept = {"retain": Objective(RETAIN, GD()), "forget": Objective(wrong, IDK(), refusals=["No."])}
    with pytest.raises(UserError, match="row 3: the row's 'instead' is"):
        trainer(tmp_path, objectives=kept)


FEW_LETTERS = "不知道这件事。" * 10  # more tokens of bytes than the other, though fewer letters
TOO_LONG: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "instead": (IDK(), {"instead": "no " * 120}, ["No."]),
    "a refusal of few letters": (IDK(), {}, ["I don't know. " * 6, FEW_LETTERS]),
    "one of a row's own alternates": (LOSSES["AltPO"](), {"alternates": ["It is x.", "no " * 120]}, ["No."]),
    "a refusal where the model makes none up": (LOSSES["AltPO"](), {}, ["I don't know. " * 6, FEW_LETTERS]),
}


@pytest.mark.parametrize(("loss", "fields", "refusals"), TOO_LONG.values(), ids=TOO_LONG)
def test_what_replaces_an_answer_and_is_too_long_is_told_before_the_weights_are_read(
    loss: Any, fields: dict[str, Any], refusals: list[str]
) -> None:
    rows = [question("Who is Ann?", "Ann is a spy.", "f:1", **fields)]
    task = SimpleNamespace(objectives={"forget": rows})
    given: Any = SimpleNamespace(tokenizer=tiny.tokenizer(), refusals=refusals, task=task, losses={"forget": loss})
    with pytest.raises(UserError, match=r"f:1: the row has .* max_length 200 would cut its answer off"):
        check_rows(given, 2048, 260, 200)
    check_rows(given, 2048, 260, 500)


@pytest.mark.parametrize("skip_first", [0, 1])
def test_a_row_of_which_a_loss_counts_nothing_is_told_before_the_weights_are_read(
    skip_first: int, tmp_path: Path
) -> None:
    loss = LOSSES["CEU"](skip_first=skip_first)
    first, later = question("Which letter?", "B, it is.", "f:1"), question("Which letter?", "It is B.", "f:2")
    rows = [dataclasses.replace(row, only=("B",)) for row in (later, first)]
    task = SimpleNamespace(objectives={"forget": rows})
    given: Any = SimpleNamespace(tokenizer=tiny.tokenizer(), refusals=["No."], task=task, losses={"forget": loss})
    other: Any = SimpleNamespace(losses={"forget": LOSSES["NPO"]()})
    check_rows(given, 2048, 260, 200, [other])
    objectives = {"forget": Objective(rows, loss), "retain": Objective(RETAIN, GD())}
    if not skip_first:
        check_rows(given, 2048, 260, 200, [other, given])
        trainer(tmp_path, objectives=objectives).train()
        return
    with pytest.raises(
        UserError, match=r"f:1: the loss CEU\(skip_first=1\) counts none of this answer's labeled tokens"
    ):
        check_rows(given, 2048, 260, 200, [other, given])
    with pytest.raises(UserError, match=r"f:1: the loss CEU\(skip_first=1\) counts none"):
        trainer(tmp_path, objectives=objectives)


def test_the_refusal_of_most_tokens_is_tried_first_whatever_its_letters() -> None:
    with pytest.raises(UserError, match=r"forget 0: the row has .* max_length 150 would cut"):
        ObjectiveRows({"forget": FORGET}, {"forget": ["No way. " * 10, FEW_LETTERS]}, tiny.tokenizer(), 150)


def test_what_the_reference_says_of_a_refusal_is_known_whether_its_draw_counts_or_not() -> None:
    rows = ObjectiveRows({"forget": FORGET}, {"forget": ["No.", "Never."]}, tiny.tokenizer(), 100)
    rows.reference_log_probs = dict.fromkeys(rows.drawn([Draw("forget", 0, 1)]), -1.0)
    assert rows[Draw("forget", 0, 1, counts=False)].refused_log_prob == -1.0


def test_virtual_tokens_do_not_shift_what_is_evaluated(tmp_path: Path) -> None:
    shapes: list[Any] = []

    def metrics(given: Any) -> dict[str, float]:
        shapes.append((given.predictions.shape[:2], given.label_ids.shape))
        return {}

    torch.manual_seed(0)
    prompted = get_peft_model(tiny.model(), PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    plain = trainer(tmp_path, prompted, eval_dataset=RETAIN).evaluate()
    full = trainer(tmp_path, prompted, eval_dataset=RETAIN, compute_metrics=metrics).evaluate()
    assert full["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    assert [a == b for a, b in shapes] == [True]


# Resuming

SAVED = {"save_strategy": "steps", "save_steps": 2}


def test_a_resumed_adapter_is_compared_with_the_runs_start(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lora(tiny.model())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer(tmp_path, model, keep=KL(), arguments=SAVED).train()
    whole = weights(model)
    begun = PeftModel.from_pretrained(tiny.model(), str(tmp_path / "checkpoint-2"), is_trainable=True)
    again = trainer(tmp_path, begun, keep=KL(), arguments=SAVED)
    again.train(str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(begun), whole)
    assert all(torch.equal(copied, start[name]) for name, copied in again.reference.copies.items())


def test_an_adapter_does_not_go_on_upon_other_frozen_weights(tmp_path: Path) -> None:
    trainer(tmp_path, lora(tiny.model(0)), arguments=SAVED).train()
    with pytest.raises(ValueError, match="a run with another set of frozen weights"):
        trainer(tmp_path, lora(tiny.model(7)), arguments=SAVED).train(True)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"optimizer_cls_and_kwargs": (DualOptimPlus, {"lr": 1e-1})}, "optimizer"),
        ({"optimizer_cls_and_kwargs": (DualOptimPlus, {"lr": 1e-3, "lr_scales": {"forget": 9.0}})}, "optimizer"),
        ({"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 1e-3})}, "optimizer"),
        ({"loss": NPO(), "reference": tiny.model()}, "set of losses"),
        ({"loss": LOSSES["SimNPO"]()}, "set of losses"),
        ({"arguments": {**SAVED, "lr_scheduler_type": "constant"}}, "optimizer"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(changed: dict[str, Any], what: str, tmp_path: Path) -> None:
    trainer(tmp_path, arguments=SAVED).train()
    with pytest.raises(ValueError, match=f"a run with another {what}"):
        trainer(tmp_path, **{"arguments": SAVED, **copy.deepcopy(changed)}).train(True)


def test_a_reference_by_its_name_is_in_the_models_dtype(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    for model in (tiny.model().bfloat16(), lora(tiny.model().bfloat16()), tiny.model()):
        made = trainer(tmp_path, model, keep=KL(), reference=str(tmp_path / "model"))
        assert next(made.reference.parameters()).dtype == next(model.parameters()).dtype


class Mine(Loss):
    """A loss of one's own that is no data class."""

    role = "forget"

    def __init__(self, factor: Any) -> None:
        self.factor = factor

    def __call__(self, model: Any, batch: Any, reference: Any = None) -> torch.Tensor:
        return self.factor * labelled(model, batch).log_probs().mean()


JOINT = {
    "turns": jointly({"forget": 1, "retain": 1}, 4, 4),
    "optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 1e-3}),
}
OTHER: dict[str, tuple[Any, Any]] = {
    "combine": ({**JOINT, "combine": pcgrad}, {**JOINT, "combine": None}),
    "sam rho": ({"sam_rho": 0.1}, {}),
    "set of optimizer arguments, by its seed": ({"seed": 0}, {"seed": 1}),
    "mixed precision": ({"arguments": {**SAVED, "bf16": True}}, {"arguments": SAVED}),
    "precision of trained weights": ({}, {"dtype": torch.bfloat16}),
    "max grad norm": ({}, {"arguments": {**SAVED, "max_grad_norm": 1.0}}),
    "reference model": ({"keep": KL(), "reference": 0}, {"keep": KL(), "reference": 7}),
    "set of loss arguments": ({"loss": Mine(torch.ones(2)[0])}, {"loss": Mine(torch.tensor(2.0))}),
    "set of optimizer arguments": (
        {"optimizer_cls_and_kwargs": (DualOptimPlus, {"lr": torch.tensor(1e-3)})},
        {"optimizer_cls_and_kwargs": (DualOptimPlus, {"lr": torch.tensor(1e-1)})},
    ),
}


@pytest.mark.parametrize("what", OTHER)
def test_a_run_does_not_go_on_with_other_inputs_unless_its_checkpoint_is_of_an_earlier_version(
    what: str, tmp_path: Path
) -> None:
    def made(given: dict[str, Any]) -> UnlearnTrainer:
        reference = {"reference": tiny.model(given["reference"])} if "reference" in given else {}
        given = {**given}
        model = tiny.model().to(given.pop("dtype", torch.float32))
        if "seed" in given:
            given = {"optimizers": (DualOptimPlus(model.parameters(), seed=given["seed"]), None)}
        return trainer(tmp_path, model, **{"arguments": SAVED, **given, **reference})

    begun, changed = OTHER[what]
    first = made(begun)
    first.train()
    assert made(begun).fingerprints == first.fingerprints
    with pytest.raises(UserError, match=f"a run with another {what.partition(',')[0]} than"):
        made(changed).train(True)
    known = {name: value for name, value in first.fingerprints.items() if name not in checkpoints.MAY_LACK}
    for folder in checkpoints.numbered(tmp_path):
        checkpoints.seal(folder, known)
    made(changed).train(True)


def test_a_checkpoint_of_a_run_without_evaluation_says_so(tmp_path: Path) -> None:
    trainer(tmp_path, arguments=SAVED).train()
    evaluated = {**SAVED, "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(UserError, match="of a run that had no set of evaluation rows, and this one has"):
        trainer(tmp_path, arguments=evaluated, eval_dataset=RETAIN).train(True)


def test_hashes_of_contents_tell_values_apart_and_say_where_only_the_class_counts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Thing:
        def __init__(self, value: Any) -> None:
            self.value = value

    values = [1, 2.5, np.float32(3), np.arange(3), torch.arange(3), torch.arange(3.0), torch.zeros(2, 2).bfloat16()]
    values += [Thing(1), Thing(2), pcgrad, torch.float32, torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    hashed = [digest(Thing(value), contents=True) for value in values]
    assert len(set(hashed)) == len(values)
    assert hashed == [digest(Thing(copy.deepcopy(value)), contents=True) for value in values]
    assert digest(Thing(1)) == digest(Thing(2)), "without contents, the class alone counts"
    assert not caplog.records
    looped = Thing(None)
    looped.value = looped
    assert digest([looped], contents=True) == digest([Thing(1)])
    assert digest([object()], contents=True) == digest([object()], contents=True)
    assert [record.getMessage().partition(" by ")[0] for record in caplog.records] == [
        "checkpoints compare an object that holds itself or has keys of several types",
        "checkpoints compare object",
    ]


def test_early_stopping_of_ones_own_kind_goes_on_counting(tmp_path: Path) -> None:
    class Patient(EarlyStoppingCallback):
        pass

    evaluated = {**SAVED, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    given = {"eval_dataset": RETAIN, "arguments": {**evaluated, "greater_is_better": True}, "loss": GD(), "keep": GD()}
    ends = [trainer(tmp_path, callbacks=[Patient(2)], **given)]
    ends[0].train()
    assert json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["stateful_callbacks"]["Patient"]
    ends.append(trainer(tmp_path, callbacks=[Patient(2)], **given))
    ends[1].train(str(tmp_path / "checkpoint-2"))
    assert ends[0].state.global_step == ends[1].state.global_step < len(TURNS)


@pytest.mark.parametrize("how", ["combine", "sam_rho"])
def test_parameters_that_the_optimizer_lacks_count_as_frozen_ones(how: str, tmp_path: Path) -> None:
    given = {"combine": {"combine": gru, "turns": JOINT["turns"]}, "sam_rho": {"sam_rho": 0.1}}[how]
    found = []
    for frozen in (False, True):
        model = tiny.model()
        optimizer = torch.optim.SGD(model.model.layers[1].parameters(), lr=0.1)
        if frozen:
            model.requires_grad_(False).model.layers[1].requires_grad_(True)
        trainer(tmp_path, model, optimizers=(optimizer, None), **given).train()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)
    assert not torch.equal(found[0], torch.cat([p.detach().flatten() for p in tiny.model().parameters()]))


def test_a_parameter_unfrozen_later_is_refused_by_the_reference_unless_the_optimizer_held_it(tmp_path: Path) -> None:
    model, inputs = tiny.model(), {"input_ids": torch.arange(8)[None]}
    optimizer = DualOptimPlus(model.parameters(), lr=1e-3)
    model.model.layers[0].requires_grad_(False)
    alone = AtStart(model)
    run = trainer(tmp_path, model, keep=KL(), optimizers=(optimizer, None))
    start = alone(**inputs).logits
    model.model.layers[0].requires_grad_(True)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05)
    assert torch.equal(run.reference(**inputs).logits, start)
    with pytest.raises(UserError, match=r"reference: model.layers.0.* was frozen when training was set up"):
        alone(**inputs)


def test_a_second_trainer_computes_in_its_own_precision(tmp_path: Path) -> None:
    """accelerate leaves a forward in the model that computes in the precision of the first."""
    found = []
    for first in (False, True):
        model = tiny.model()
        if first:
            still = (DualOptimPlus, {"lr": 0.0})
            trainer(tmp_path / "first", model, optimizer_cls_and_kwargs=still, arguments={"bf16": True}).train()
        trainer(tmp_path / "second", model).train()
        found.append(weights(model))
    assert torch.equal(*found)


def test_weights_in_fp16_are_refused_and_those_in_bf16_told_where_updates_are_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"model: model\.embed_tokens\.weight is in float16, in which small updates"):
        trainer(tmp_path, tiny.model().half())
    told = "model.embed_tokens.weight is in bfloat16, and the optimizer rounds to the nearest"
    trainer(tmp_path, tiny.model().bfloat16())
    assert told not in caplog.text, "DualOptim+ rounds at random"
    adamw = (torch.optim.AdamW, {"lr": 1e-5})
    trainer(tmp_path, tiny.model().bfloat16(), optimizer_cls_and_kwargs=adamw)
    assert told in caplog.text
    caplog.clear()
    trainer(tmp_path, tiny.model().bfloat16(), optimizer_cls_and_kwargs=(lambda *a, **k: adamw[0](*a, **k), {}))
    assert told in caplog.text
    caplog.clear()
    model = tiny.model().bfloat16()
    trainer(tmp_path, model, optimizers=(DualOptimPlus(model.parameters(), stochastic_rounding=False), None))
    assert told in caplog.text


@pytest.mark.parametrize(("asks", "weight"), [(True, 1.0), (True, 0.0), (False, 1.0)])
def test_a_loss_that_balances_experts_is_told_once_where_the_model_asks_for_it(
    asks: bool, weight: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    experts = {"num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": 260}
    balance = {"output_router_logits": asks, "router_aux_loss_coef": weight}
    trainer(tmp_path, MixtralForCausalLM(MixtralConfig(**SIZES, **experts, **balance))).train()
    assert caplog.text.count("the loss that balances its experts") == (asks and weight > 0)


def frozen_but(pattern: str, model: Any) -> Any:
    resolve.train_only(pattern, model)
    return model


def with_pictures() -> Any:
    """A model that also sees pictures, which no row has."""
    sizes = {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 260, "pad_token_id": 0}
    seeing = {**SIZES, "image_size": 8, "patch_size": 4}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config={**SIZES, **sizes}, vision_config=seeing, mm_tokens_per_image=4, image_token_index=259)
    )


@pytest.mark.parametrize(
    ("made", "loss", "words"),
    [
        (lambda: frozen_but("layers.1", tiny.model()), RMU(layer=0), "RMU, is computed from layer 0, which none of"),
        (lambda: lora_of(["1.self_attn.q_proj"]), RMU(layer=0), r"the first is .*lora_A\.default\.weight\)"),
        (lambda: frozen_but("vision_tower", with_pictures()), LOSSES["GA"](), "GA, is computed from the logits, which"),
    ],
)
def test_a_loss_that_nothing_trained_changes_is_told(made: Any, loss: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        trainer(tmp_path, made(), loss=loss)
    assert not list(tmp_path.iterdir())


def lora_of(targets: list[str]) -> Any:
    return get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=targets))


def test_a_loss_is_computed_from_its_layer_and_those_below(tmp_path: Path) -> None:
    for pattern in ("layers.0", "embed_tokens"):
        trainer(tmp_path, frozen_but(pattern, tiny.model()), loss=RMU(layer=0)).train()
    unserved = [{"retain": 2}] * 2
    trainer(tmp_path, frozen_but("layers.1", tiny.model()), loss=RMU(layer=0), turns=unserved).train()


@pytest.mark.parametrize("part", [{"train": "layers.1"}, {"lora_rank": 2, "lora_targets": "1.self_attn.q_proj"}])
@pytest.mark.parametrize("experts", [False, True])
def test_a_loss_that_nothing_trained_changes_is_told_before_weights_are_read(
    part: dict[str, Any], experts: bool, tmp_path: Path
) -> None:
    folder = tiny.save(tmp_path / "model")
    if experts:
        sizes = {"num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": 260}
        MixtralForCausalLM(MixtralConfig(**SIZES, **sizes)).save_pretrained(folder)
    with pytest.raises(UserError, match="the loss of 'forget', RMU, is computed from layer 0, which none of the"):
        resolved.resolve([of_rows(folder, forget_loss="RMU", forget_loss_args={"layer": 0}, **part)])


def test_a_weight_of_0_is_refused_where_steps_serve_nothing_else(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")

    def check(**given: Any) -> None:
        config = of_rows(folder, optimizer="AdamW", **given)
        resolve.check_with(config, tasks.load(config))

    with pytest.raises(UserError, match=r"weights: that of 'retain' is 0, and steps serve nothing else.*--alone"):
        check(weights={"retain": 0.0})
    with pytest.raises(UserError, match="weights: that of 'forget' is 0"):
        check(weights={"forget": 0.0}, alone="forget")
    for given in ({"joint": True}, {"alone": "forget"}, {"retain_bound": 1.0}):
        check(weights={"retain": 0.0}, **given)


def of_rows(folder: Path, **given: Any) -> RunConfig:
    """A config of a model of whose weights nothing can be read, and of rows beside its folder."""
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        lines = [json.dumps({"question": row.prompt[-1]["content"], "answer": row.answer}) for row in rows]
        folder.with_name(f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "model.safetensors").write_bytes(b"")
    files = {name: str(folder.with_name(f"{name}.jsonl")) for name in ("forget", "retain")}
    return RunConfig(**{"model": str(folder), **files, "retain_loss": "GD", **given})


def test_activations_that_a_model_cannot_recompute_are_told_before_weights_are_read(tmp_path: Path) -> None:
    folder, model = tiny.save(tmp_path / "model"), CTRLLMHeadModel(CTRLConfig(**CTRL))
    model.save_pretrained(folder)
    for recomputed in (True, False):
        config = of_rows(folder, forget_loss="GA", gradient_checkpointing=recomputed)
        words = "gradient_checkpointing: CTRLLMHeadModel cannot recompute its activations"
        with pytest.raises(UserError, match=words) if recomputed else nullcontext():
            resolved.resolve([config])
    with pytest.raises(UserError, match="gradient_checkpointing: CTRLLMHeadModel cannot recompute"):
        trainer(tmp_path, model, arguments={CHECKPOINTING: True})


CTRL = {"vocab_size": 260, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256, "dff": 16}
NAMES = TrainingArguments.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in NAMES else "gradient_checkpointing"
