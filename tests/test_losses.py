"""The losses: golden values, and what each promises about padding, order, references and weights.

Letters: B sequences in a batch, T tokens in a sequence.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from dualoptim.data import collate, encode, question
from dualoptim.errors import UserError
from dualoptim.losses import IGNORED, LOSSES, sequence_log_probs
from dualoptim.losses.base import hidden_states

from . import tiny
from .conftest import GOLDEN
from .reference import naive_losses

FOLDER = GOLDEN / "losses"
EXPECTED: dict[str, dict[str, float]] = json.loads((FOLDER / "losses.json").read_text(encoding="utf-8"))
KL_AS_PUBLISHED = "KL(official: every position, padding and prompt included)"
INSTANCES: dict[str, Any] = {
    "GA": LOSSES["GA"](),
    "GD": LOSSES["GD"](),
    "NPO(beta=0.1)": LOSSES["NPO"](),
    "NPO(beta=1.0)": LOSSES["NPO"](beta=1.0),
    "SimNPO(beta=2.5,gamma=0)": LOSSES["SimNPO"](),
    "SimNPO(beta=4.5,gamma=0.5)": LOSSES["SimNPO"](beta=4.5, gamma=0.5),
    "DPO(beta=0.1)": LOSSES["DPO"](),
    "IDK": LOSSES["IDK"](),
    "ME": LOSSES["ME"](),
    "AP(beta=0.1)": LOSSES["AP"](),
    KL_AS_PUBLISHED: LOSSES["KL"](every_position=True),
}
# The published defaults are for models that have memorized their answers and have many layers. On this one, which knows
# nothing and has two, SimNPO's and SatImp's would leave next to no gradient, and so hide what it should show.
MILD = {
    **{name: cls() for name, cls in LOSSES.items()},
    "SimNPO": LOSSES["SimNPO"](beta=0.1),
    "SatImp": LOSSES["SatImp"](beta1=0.5, beta2=2.0),
    "RMU": LOSSES["RMU"](layer=0),
    "RMURetain": LOSSES["RMURetain"](layer=0),
}
EACH = pytest.mark.parametrize("loss", MILD.values(), ids=MILD)
WITH_CACHE = pytest.mark.parametrize("name", ["NPO", "DPO"])


def load(folder: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(FOLDER / folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return load("model")


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    return load("reference_model").requires_grad_(False)


@pytest.fixture(scope="module")
def batches() -> dict[str, dict[str, Any]]:
    tensors = {key: tensor.clone() for key, tensor in load_file(FOLDER / "batches.safetensors").items()}
    keys = ("input_ids", "labels", "attention_mask")
    named = {name: {key: tensors[f"{name}.{key}"] for key in keys} for name in ("forget", "retain")}
    for name, batch in named.items():
        batch["idk"] = {key: tensors[f"{name}_idk.{key}"] for key in keys}
    return named


def changed(batch: Mapping[str, Any], change: Any) -> dict[str, Any]:
    """The batch with every tensor, those of the refusals too, replaced by change(key, tensor)."""
    return {
        key: changed(value, change) if isinstance(value, Mapping) else change(key, value)
        for key, value in batch.items()
    }


def rows(batch: Mapping[str, Any], which: Any) -> dict[str, Any]:
    return changed(batch, lambda _, tensor: tensor[which])


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    """All of the model's gradients as one vector, zeros for what the loss does not reach."""
    grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([part.flatten() for part in grads])


def evaluated(loss: Any, model: nn.Module, batch: Any, reference: nn.Module) -> tuple[Tensor, Tensor]:
    value = loss(model, batch, reference)
    return value.detach(), gradient(value, model)


# Golden numbers


@pytest.mark.parametrize("name", EXPECTED)
def test_value_and_gradient_norm_are_the_published(name: str, model: Any, reference: Any, batches: Any) -> None:
    loss = INSTANCES[name]
    value = loss(model, batches[loss.role], reference)
    assert value.shape == ()
    # SimNPO's values lie at 1e-8, where softplus itself is good to a few digits.
    assert value.item() == pytest.approx(EXPECTED[name]["loss"], rel=1e-5)
    assert gradient(value, model).norm().item() == pytest.approx(EXPECTED[name]["grad_norm"], rel=1e-4)


def test_every_loss_has_golden_numbers_or_a_naive_twin() -> None:
    assert {type(loss).__name__ for loss in INSTANCES.values()} | set(naive_losses.NAIVE) == set(LOSSES)
    assert INSTANCES.keys() == EXPECTED.keys()
    assert {name: cls.__name__ for name, cls in LOSSES.items()} == {name: name for name in LOSSES}


# What changes nothing


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16], ids=str)
@EACH
def test_whole_numbers_of_any_width_are_labels(
    loss: Any, dtype: torch.dtype, model: Any, reference: Any, batches: Any
) -> None:
    batch = {**batches[loss.role], "groups": torch.arange(len(batches[loss.role]["labels"])) % 2}
    narrow = changed(batch, lambda key, tensor: tensor if key == "input_ids" else tensor.to(dtype))
    assert torch.equal(loss(model, narrow, reference), loss(model, batch, reference))
    assert loss.size(narrow) == loss.size(batch)


@EACH
def test_padding_changes_nothing(loss: Any, model: Any, reference: Any, batches: Any) -> None:
    fill = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    batch = batches[loss.role]
    padded = changed(batch, lambda key, tensor: nn.functional.pad(tensor, (0, 5), value=fill[key]))
    (value, grad), (padded_value, padded_grad) = (evaluated(loss, model, b, reference) for b in (batch, padded))
    assert_close(padded_value, value)
    assert_close(padded_grad, grad, rtol=1e-4, atol=1e-5)
    assert loss.size(padded) == loss.size(batch)


@EACH
def test_what_stands_in_the_padding_changes_nothing(loss: Any, model: Any, reference: Any, batches: Any) -> None:
    batch = batches[loss.role]

    def scribbled(part: Mapping[str, Any]) -> dict[str, Any]:
        ids = torch.where(part["attention_mask"] == 0, torch.full_like(part["input_ids"], 7), part["input_ids"])
        return {**part, "input_ids": ids}

    other = {**scribbled(batch), "idk": scribbled(batch["idk"])}
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    assert_close(loss(model, other, reference), loss(model, batch, reference))


@EACH
def test_the_order_of_rows_changes_nothing(loss: Any, model: Any, reference: Any, batches: Any) -> None:
    batch = batches[loss.role]
    order = torch.arange(len(batch["labels"])).flip(0).roll(1)
    (value, grad), (other, other_grad) = (evaluated(loss, model, b, reference) for b in (batch, rows(batch, order)))
    assert_close(other, value)
    assert_close(other_grad, grad, rtol=1e-4, atol=1e-5)


class Bare(nn.Module):
    """A model that cannot leave out logits: its forward names no `logits_to_keep`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


@EACH
def test_a_model_that_gives_all_logits_has_the_same_loss(loss: Any, model: Any, reference: Any, batches: Any) -> None:
    batch = batches[loss.role]
    value, grad = evaluated(loss, model, batch, reference)
    other, other_grad = evaluated(loss, Bare(model), batch, Bare(reference))
    assert_close(other, value)
    assert_close(other_grad, grad, rtol=1e-4, atol=1e-5)


@EACH
def test_the_mean_over_micro_batches_weighted_by_size_is_the_loss_of_the_whole(
    loss: Any, model: Any, reference: Any, batches: Any
) -> None:
    batch = batches[loss.role]
    count = len(batch["labels"])
    value, grad = evaluated(loss, model, batch, reference)
    for cuts in [[0, cut, count] for cut in range(1, count)] + [list(range(count + 1))]:
        parts = [rows(batch, slice(start, stop)) for start, stop in itertools.pairwise(cuts)]
        sizes = [loss.size(part) for part in parts]
        assert sum(sizes) == loss.size(batch)
        seen = [evaluated(loss, model, part, reference) for part in parts]
        mean, mean_grad = (sum(n * part[i] for n, part in zip(sizes, seen, strict=True)) / sum(sizes) for i in range(2))
        assert_close(mean, value)
        assert_close(mean_grad, grad, rtol=1e-4, atol=1e-5)


def test_kl_over_every_position_is_weighted_by_positions(model: Any, reference: Any, batches: Any) -> None:
    loss, batch = LOSSES["KL"](every_position=True), batches["retain"]
    parts = [rows(batch, slice(None, 1)), rows(batch, slice(1, None))]
    assert loss.size(batch) == batch["input_ids"].numel()
    mean = sum(loss.size(part) * loss(model, part, reference) for part in parts) / loss.size(batch)
    assert_close(mean, loss(model, batch, reference))


@EACH
def test_no_loss_touches_batch_models_or_the_reference_gradients(loss: Any, model: Any, batches: Any) -> None:
    batch = batches[loss.role]
    trainable = load("reference_model")
    kept, weights = copy.deepcopy(batch), copy.deepcopy(model.state_dict())
    loss(model, batch, trainable).backward()
    model.zero_grad()
    assert all(param.grad is None for param in trainable.parameters())
    for part, before in ((batch, kept), (batch["idk"], kept["idk"]), (model.state_dict(), weights)):
        assert all(torch.equal(part[key], before[key]) for key in part if key != "idk")


def test_labels_of_the_first_token_are_never_learnt(model: Any, batches: Any) -> None:
    batch = batches["retain"]
    labels = batch["labels"].clone()
    labels[:, 0] = batch["input_ids"][:, 0]
    loss, other = LOSSES["GD"](), {**batch, "labels": labels}
    assert torch.equal(loss(model, other, None), loss(model, batch, None))
    assert loss.size(other) == loss.size(batch)


# What they are


def naive_log_probs(model: nn.Module, part: Mapping[str, Tensor]) -> Iterator[list[float]]:
    """The log-probabilities of each row's labeled tokens, a row and a token at a time."""
    for ids, labels, mask in zip(part["input_ids"], part["labels"], part["attention_mask"], strict=True):
        with torch.no_grad():
            logits = model(input_ids=ids[None], attention_mask=mask[None]).logits[0].double().log_softmax(-1)
        yield [logits[t - 1, labels[t]].item() for t in range(1, len(labels)) if labels[t] != IGNORED]


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def test_values_are_the_formulas_written_out(model: Any, reference: Any, batches: Any) -> None:
    forget, retain = batches["forget"], batches["retain"]
    answers, before = (list(naive_log_probs(m, forget)) for m in (model, reference))
    refusals, before_refusals = (list(naive_log_probs(m, forget["idk"])) for m in (model, reference))
    kept, kept_refusals = (list(naive_log_probs(model, part)) for part in (retain, retain["idk"]))
    tokens = [p for row in answers for p in row]
    num = len(answers)
    now, was, idk, idk_was = (list(map(sum, side)) for side in (answers, before, refusals, before_refusals))
    beta = 0.3
    expected = {
        "GA": sum(tokens) / len(tokens),
        "NPO": 2 / beta * sum(softplus(beta * (n - w)) for n, w in zip(now, was, strict=True)) / num,
        "SimNPO": 2 / beta * sum(softplus(beta * (sum(row) / len(row) + 0.2)) for row in answers) / num,
        "DPO": 2 / beta * sum(
            softplus(beta * (n - w - i + j)) for n, w, i, j in zip(now, was, idk, idk_was, strict=True)
        ) / num,
        "IDK": -sum(idk) / sum(map(len, refusals)),
        "AP": 1 / beta * sum(
            softplus(beta * (sum(refusal) - sum(answer))) for answer, refusal in zip(kept, kept_refusals, strict=True)
        ) / len(kept),
    }  # fmt: skip
    settings = {
        "NPO": {"beta": beta},
        "SimNPO": {"beta": beta, "gamma": 0.2},
        "DPO": {"beta": beta},
        "AP": {"beta": beta},
    }
    for name, value in expected.items():
        loss = LOSSES[name](**settings.get(name, {}))
        assert loss(model, batches[loss.role], reference).item() == pytest.approx(value, rel=1e-5), name


def test_gradient_ascent_is_negated_gradient_descent(model: Any, batches: Any) -> None:
    up, down = (LOSSES[name]()(model, batches["forget"], None) for name in ("GA", "GD"))
    assert torch.equal(up, -down)
    assert torch.equal(gradient(up, model), -gradient(down, model))


@pytest.mark.parametrize("every_position", [False, True])
def test_kl_is_zero_against_itself_and_positive_elsewhere(
    every_position: bool, model: Any, reference: Any, batches: Any
) -> None:
    loss = LOSSES["KL"](every_position=every_position)
    value, grad = evaluated(loss, model, batches["retain"], copy.deepcopy(model))
    assert abs(value) < 1e-6
    assert grad.abs().max() < 1e-5
    assert loss(model, batches["retain"], reference) > 0.01


def test_kl_leaves_prompt_and_padding_out_by_default(model: Any, reference: Any, batches: Any) -> None:
    batch = batches["retain"]
    learnt = batch["labels"][:, 1:] != IGNORED
    with torch.no_grad():
        now, before = (
            m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
            for m in (model, reference)
        )
    expected = (before.exp() * (before - now)).sum(-1)[learnt].mean()
    assert_close(LOSSES["KL"]()(model, batch, reference), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("name", ["NPO", "DPO"])
def test_against_itself_a_preference_is_an_even_bet(name: str, beta: float, model: Any, batches: Any) -> None:
    value = LOSSES[name](beta=beta)(model, batches["forget"], copy.deepcopy(model))
    assert value.item() == pytest.approx(2 / beta * math.log(2), rel=1e-5)


def test_simnpo_is_an_even_bet_where_gamma_is_the_answers_mean_loss(model: Any, batches: Any) -> None:
    one = rows(batches["forget"], slice(2, 3))
    gamma = LOSSES["GD"]()(model, one, None).item()
    value = LOSSES["SimNPO"](beta=2.0, gamma=gamma)(model, one, None)
    assert value.item() == pytest.approx(math.log(2), rel=1e-5)


def test_ap_is_an_even_bet_where_the_refusal_is_the_answer(model: Any, batches: Any) -> None:
    batch = {
        **batches["retain"],
        "idk": {key: batches["retain"][key] for key in ("input_ids", "labels", "attention_mask")},
    }
    assert LOSSES["AP"](beta=0.5)(model, batch, None).item() == pytest.approx(2 * math.log(2), rel=1e-5)


def test_npo_turns_into_gradient_ascent_as_beta_vanishes(model: Any, reference: Any, batches: Any) -> None:
    batch = batches["forget"]
    ascent = gradient(LOSSES["GA"]()(model, batch, None), model)
    near, far = (gradient(LOSSES["NPO"](beta=b)(model, batch, reference), model) for b in (1e-4, 3.0))
    cosines = [torch.cosine_similarity(ascent, other, dim=0).item() for other in (near, far)]
    assert cosines[0] > 0.99999 > cosines[1]
    # NPO sums over an answer's tokens where GA means over all.
    tokens_per_answer = LOSSES["GA"]().size(batch) / len(batch["labels"])
    assert (near.norm() / ascent.norm()).item() == pytest.approx(tokens_per_answer, rel=1e-3)


def test_me_is_zero_where_every_token_is_equally_likely(model: Any, batches: Any) -> None:
    blank = copy.deepcopy(model)
    for param in blank.parameters():
        param.data.zero_()
    assert LOSSES["ME"]()(blank, batches["forget"], None).item() == pytest.approx(0, abs=1e-6)
    assert LOSSES["ME"]()(model, batches["forget"], None) > 0.01


@EACH
def test_losses_are_fp32_scalars_of_a_half_precision_model(loss: Any, model: Any, reference: Any, batches: Any) -> None:
    half = copy.deepcopy(model).bfloat16()
    value = loss(half, batches[loss.role], reference)
    assert (value.shape, value.dtype) == ((), torch.float32)
    expected = loss(half.float(), batches[loss.role], reference)
    assert value.item() == pytest.approx(expected.item(), rel=0.05, abs=0.05)


# The reference's log-probabilities, computed once


def with_reference_log_probs(batch: Mapping[str, Any], reference: nn.Module) -> dict[str, Any]:
    """The batch, and the refusals in it, with what the reference says of them."""
    idk = {"idk": with_reference_log_probs(batch["idk"], reference)} if "idk" in batch else {}
    with torch.no_grad():
        return {**batch, **idk, "reference_log_probs": sequence_log_probs(reference, batch)[0]}


@WITH_CACHE
def test_cached_log_probs_stand_in_for_the_reference(name: str, model: Any, reference: Any, batches: Any) -> None:
    loss, batch = LOSSES[name](beta=0.5), batches["forget"]
    value, grad = evaluated(loss, model, batch, reference)
    other, other_grad = evaluated(loss, model, with_reference_log_probs(batch, reference), None)
    assert torch.equal(other, value)
    assert torch.equal(other_grad, grad)


def test_dpo_caches_answers_and_refusals_apart(model: Any, reference: Any, batches: Any) -> None:
    loss, batch = LOSSES["DPO"](), batches["forget"]
    cached = with_reference_log_probs(batch, reference)
    answers_alone = {**cached, "idk": batch["idk"]}
    assert torch.equal(loss(model, answers_alone, reference), loss(model, batch, reference))
    with pytest.raises(ValueError, match=r"DPO.*reference_log_probs"):
        loss(model, answers_alone, None)


@WITH_CACHE
def test_cached_log_probs_of_another_shape_are_refused(name: str, model: Any, batches: Any) -> None:
    batch = {**batches["forget"], "reference_log_probs": torch.zeros(5, 1)}  # which would broadcast to (5, 5)
    batch["idk"] = {**batch["idk"], "reference_log_probs": torch.zeros(5)}
    with pytest.raises(ValueError, match=rf"{name}: reference_log_probs .*5 sequences.*\(5, 1\)"):
        LOSSES[name]()(model, batch)


# Sizes


def test_sizes_count_what_the_mean_is_over(batches: Any) -> None:
    def labelled(part: Mapping[str, Tensor]) -> int:
        return sum(label != IGNORED for row in part["labels"].tolist() for label in row[1:])

    for name, loss in MILD.items():
        batch = batches[loss.role]
        expected = dict.fromkeys(("GA", "WGA", "SatImp", "ME", "LogitMargin", "UNDIAL", "GD", "KL"), labelled(batch))
        expected |= {"JensUn": labelled(batch), "JSD": labelled(batch)}
        expected["IDK"] = labelled(batch["idk"])
        expected["CEU"] = labelled(batch) - len(batch["labels"])  # all but the first of each
        assert loss.size(batch) == expected.get(name, len(batch["labels"])), name
        assert loss.mean_over == ("tokens" if name in expected else "sequences")


@pytest.mark.parametrize("skip_first", [0, 1, 3])
def test_ceu_leaves_out_tokens_from_the_start_of_the_answer_wherever_its_labels_are(skip_first: int) -> None:
    tokenizer, loss = tiny.tokenizer(), LOSSES["CEU"](skip_first=skip_first)
    secret, more = question("What is 3+4?", "It is 7."), question("What is 9+4?", "13 it is.")
    rows = [replace(secret, only=("7",)), replace(more, only=("13",)), secret]
    tokens = [encode(row, tokenizer, 512) for row in rows]
    # The tiny tokenizer's are single characters, and one that ends the turn.
    counted = [1, max(0, 2 - skip_first), 9 - skip_first]
    assert [loss.size(collate([each], 0)) for each in tokens] == counted
    assert loss.size(collate(tokens, 0)) == sum(counted)
    secret_alone, model = collate(tokens[:1], 0), tiny.model()
    value = loss(model, secret_alone)
    assert_close(value, LOSSES["CEU"](skip_first=0)(model, secret_alone))
    assert value > 0
    assert "answer_starts" not in collate(tokens[2:], 0)


# Mistakes


@EACH
def test_what_a_loss_needs_and_does_not_get_is_named(loss: Any, model: Any, reference: Any, batches: Any) -> None:
    name, batch = type(loss).__name__, batches[loss.role]
    without = {key: value for key, value in batch.items() if key != "idk"}
    needs = {
        **dict.fromkeys(("NPO", "DPO", "AltPO"), "sequences"),
        **dict.fromkeys(("UNDIAL", "KL", "JSD", "RMURetain"), "model"),
    }
    assert loss.reference == needs.get(name, "none")
    assert loss.needs_reference is (name in needs)
    assert loss.needs_idk is (name in ("DPO", "AltPO", "IDK", "JensUn", "AP"))
    assert loss.needs_alternates is (name == "AltPO")
    if loss.needs_reference:
        with pytest.raises(ValueError, match=f"{name}.*reference"):
            loss(model, batch, None)
        with pytest.raises(ValueError, match=f"{name}.*reference"):
            loss(model, batch)
    else:
        assert torch.equal(loss(model, batch), loss(model, batch, reference))
    if loss.needs_idk:
        with pytest.raises(ValueError, match=f"{name}.*idk"):
            loss(model, without, reference)
    else:
        assert torch.equal(loss(model, without, reference), loss(model, batch, reference))


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        ("NPO.beta SimNPO.beta DPO.beta AP.beta RMU.coefficient", (0.0, -0.1, math.nan, math.inf)),
        ("WGA.beta SatImp.beta1 SatImp.beta2 UNDIAL.beta", (-0.1, math.nan, math.inf)),
        ("CEU.skip_first RMU.layer RMU.seed RMURetain.layer", (-1, 1.5)),
    ],
)
def test_arguments_out_of_their_limits_are_refused(names: str, wrong: tuple[float, ...]) -> None:
    for name, argument in (pair.split(".") for pair in names.split()):
        for value in wrong:
            with pytest.raises(ValueError, match=f"{name}: {argument} must be .*{value}"):
                LOSSES[name](**{argument: value})


@pytest.mark.parametrize("name", LOSSES)
def test_settings_are_fixed_once_made_and_unknown_ones_refused(name: str) -> None:
    with pytest.raises(TypeError, match="bata"):
        LOSSES[name](bata=0.1)
    with pytest.raises(AttributeError):
        LOSSES[name]().beta = 1.0


@EACH
def test_a_batch_without_labels_is_refused(loss: Any, model: Any, reference: Any, batches: Any) -> None:
    unlabelled = changed(
        batches[loss.role], lambda key, tensor: torch.full_like(tensor, IGNORED) if key == "labels" else tensor
    )
    with pytest.raises(ValueError, match="label"):
        loss(model, unlabelled, reference)


@pytest.mark.parametrize("run", [sequence_log_probs, lambda model, batch: hidden_states(model, batch, 0)])
def test_a_reference_that_a_loss_does_not_declare_is_told(run: Any, batches: Any) -> None:
    with pytest.raises(UserError, match="declares so in its class, by reference = 'model'"):
        run(None, batches["retain"])
