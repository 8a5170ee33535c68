"""The losses that have no golden numbers: against their naive twins, closed forms on logits by hand, limiting cases."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from dualoptim.losses import IGNORED, LOSSES

from .reference import naive_losses
from .test_losses import batches, gradient, load, model, reference, rows

__all__ = ["batches", "model", "reference"]  # fixtures

CASES: list[tuple[str, dict[str, Any]]] = [
    ("WGA", {"beta": 1.0}),
    ("WGA", {"beta": 0.3}),
    ("SatImp", {"beta1": 5.0, "beta2": 1.0}),
    ("SatImp", {"beta1": 0.2, "beta2": 3.0}),
    ("AltPO", {"beta": 0.1}),
    ("AltPO", {"beta": 2.0}),
    ("JensUn", {}),
    ("JSD", {}),
    ("LogitMargin", {}),
    ("CEU", {"skip_first": 1}),
    ("CEU", {"skip_first": 0}),
    ("CEU", {"skip_first": 7}),  # more than some answers have
    ("UNDIAL", {"beta": 10.0}),
    ("UNDIAL", {"beta": 0.5}),
    ("RMU", {"layer": 0, "coefficient": 6.5, "seed": 0}),
    ("RMU", {"layer": 0, "coefficient": 20.0, "seed": 3}),
    ("RMURetain", {"layer": 0}),
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_values_are_the_naive_twins(
    name: str, settings: dict[str, Any], model: Any, reference: Any, batches: Any
) -> None:
    loss = LOSSES[name](**settings)
    sequences = naive_losses.read(model, reference, batches[loss.role], settings.get("layer", 0))
    others = [naive_losses.read(model, reference, batches[loss.role]["idk"], 0)] if loss.needs_idk else []
    naive = {key: value for key, value in settings.items() if key != "layer"}
    expected = naive_losses.NAIVE[name](sequences, *others, **naive)
    # The probabilities are near 1/61, and their powers as good as the logits' fp32.
    assert loss(model, batches[loss.role], reference).item() == pytest.approx(expected, rel=2e-6)


def test_every_twin_is_tried_and_defaults_are_the_published() -> None:
    assert {name for name, _ in CASES} == set(naive_losses.NAIVE)
    published = {
        "WGA": {"beta": 1.0},
        "SatImp": {"beta1": 5.0, "beta2": 1.0},
        "AltPO": {"beta": 0.1, "alternates": 5, "temperature": 1.0, "seed": 0},
        "CEU": {"skip_first": 1},
        "UNDIAL": {"beta": 10.0},
        "RMU": {"layer": 7, "coefficient": 6.5, "seed": 0},
        "RMURetain": {"layer": 7},
    }
    for name, settings in published.items():
        assert LOSSES[name]() == LOSSES[name](**settings)


class Table(nn.Module):
    """A model that says what it is told: logits (B, T, V), whatever the tokens are."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.logits)


BY_HAND = {
    "input_ids": torch.zeros(2, 4, dtype=torch.long),
    "labels": torch.tensor([[IGNORED, 2, 0, 1], [IGNORED, IGNORED, 3, IGNORED]]),
    "attention_mask": torch.ones(2, 4, dtype=torch.long),
}
# Position t predicts token t + 1.
TRUE = [((0, 0), 2), ((0, 1), 0), ((0, 2), 1), ((1, 1), 3)]


def table(seed: int) -> Table:
    return Table(2 * torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(seed)))


def told(loss: Any, of: Table, reference: Table | None = None) -> tuple[float, Tensor]:
    """The loss and its gradient by the logits."""
    value = loss(of, BY_HAND, reference)
    return value.item(), torch.autograd.grad(value, of.logits)[0]


def expected_gradient(of: Table, counted: list[tuple[tuple[int, int], int]], one: Any) -> Tensor:
    """Zero but where a token counts, and there one(π, true token) of N."""
    grad = torch.zeros_like(of.logits)
    for place, true in counted:
        grad[place] = one(of.logits.detach()[place].softmax(-1), true, place) / len(counted)
    return grad


def onehot(true: int) -> Tensor:
    return nn.functional.one_hot(torch.tensor(true), 5).float()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0])
def test_wga_pushes_each_token_by_its_probability(beta: float) -> None:
    of = table(0)
    _, grad = told(LOSSES["WGA"](beta=beta), of)
    assert_close(grad, expected_gradient(of, TRUE, lambda p, y, _: p[y] ** beta * (onehot(y) - p)))


@pytest.mark.parametrize(("beta1", "beta2"), [(5.0, 1.0), (0.0, 2.0), (0.5, 0.5)])
def test_satimp_weighs_by_saturation_and_importance(beta1: float, beta2: float) -> None:
    of = table(1)
    _, grad = told(LOSSES["SatImp"](beta1=beta1, beta2=beta2), of)
    assert_close(
        grad,
        expected_gradient(of, TRUE, lambda p, y, _: p[y] ** beta1 * (1 - p[y]) ** beta2 * (onehot(y) - p)),
    )


@pytest.mark.parametrize("skip_first", [0, 1, 2])
def test_ceu_takes_from_the_true_token_and_gives_to_the_others(skip_first: int) -> None:
    of = table(2)
    counted = TRUE[:3][skip_first:] + TRUE[3:][skip_first:]
    _, grad = told(LOSSES["CEU"](skip_first=skip_first), of)

    def one(p: Tensor, y: int, _: Any) -> Tensor:
        moved = -p * p[y] / (1 - p[y])
        moved[y] = p[y]
        return moved

    assert_close(grad, expected_gradient(of, counted, one))
    assert_close(grad.sum(-1), torch.zeros(2, 4), atol=1e-7, rtol=0)


def test_ceu_rests_where_the_true_token_has_no_probability_left() -> None:
    of = table(2)
    for place, true in TRUE:
        of.logits.data[place][true] = -200.0
    value, grad = told(LOSSES["CEU"](skip_first=0), of)
    entropies = [-(p := of.logits.detach()[place].softmax(-1)).xlogy(p).sum().item() for place, _ in TRUE]
    assert value == pytest.approx(sum(entropies) / 4, rel=1e-6)
    assert grad.abs().max() < 1e-7


def test_ceu_of_answers_that_are_all_skipped_weighs_nothing() -> None:
    loss = LOSSES["CEU"](skip_first=3)
    assert loss.size(BY_HAND) == 0
    value, grad = told(loss, table(2))
    assert value == 0
    assert not grad.any()


@pytest.mark.parametrize("beta", [0.0, 3.0, 30.0])
def test_undial_pulls_towards_the_adjusted_reference(beta: float) -> None:
    of, before = table(3), table(4)
    _, grad = told(LOSSES["UNDIAL"](beta=beta), of, before)

    def one(p: Tensor, y: int, place: tuple[int, int]) -> Tensor:
        return p - (before.logits.detach()[place] - beta * onehot(y)).softmax(-1)

    assert_close(grad, expected_gradient(of, TRUE, one))


REFUSED = {**BY_HAND, "idk": {"labels": torch.tensor([[IGNORED, IGNORED, 4, 1], [IGNORED, 0, IGNORED, IGNORED]])}}
# Two tokens for three places, of which the third gets the first again; one for one.
REFUSING = [((0, 0), 4), ((0, 1), 1), ((0, 2), 4), ((1, 1), 0)]


def test_jensun_pulls_each_place_to_the_refusals_token_and_never_without_bound() -> None:
    of = table(6)
    value = LOSSES["JensUn"]()(of, REFUSED)
    (grad,) = torch.autograd.grad(value, of.logits)

    def one(p: Tensor, y: int, _: Any) -> Tensor:
        return p[y] * torch.log(p[y] / (1 + p[y])) / 2 * (onehot(y) - p)

    assert_close(grad, expected_gradient(of, REFUSING, one))
    assert LOSSES["JensUn"]().size(REFUSED) == 4


@pytest.mark.parametrize(("logit", "expected"), [(200.0, 0.0), (-200.0, math.log(2)), (math.log(4), None)])
def test_jensun_is_between_zero_and_log_two(logit: float, expected: float | None) -> None:
    of = Table(torch.zeros(2, 4, 5))
    for place, token in REFUSING:
        of.logits.data[place][token] = logit
    value = LOSSES["JensUn"]()(of, REFUSED)
    (grad,) = torch.autograd.grad(value, of.logits)
    if expected is None:  # p = 1/2: log 2 − (1.5 log 1.5 + 0.5 log 2) / 2
        assert value.item() == pytest.approx(math.log(2) - (1.5 * math.log(1.5) + 0.5 * math.log(2)) / 2, rel=1e-6)
    else:
        assert value.item() == pytest.approx(expected, abs=1e-6)
        assert grad.abs().max() < 1e-6


def test_jsd_is_zero_against_itself_and_log_two_against_what_says_nothing_alike() -> None:
    of, before = table(3), Table(torch.zeros(2, 4, 5))
    value, grad = told(LOSSES["JSD"](), of, copy.deepcopy(of))
    assert value == pytest.approx(0, abs=1e-7)
    assert grad.abs().max() < 1e-6
    of = Table(torch.zeros(2, 4, 5))
    of.logits.data[..., 0], before.logits.data[..., 1] = 300.0, 300.0
    assert told(LOSSES["JSD"](), of, before)[0] == pytest.approx(math.log(2), rel=1e-6)
    assert told(LOSSES["JSD"](), before, of)[0] == pytest.approx(math.log(2), rel=1e-6), "it is symmetric"


def test_altpo_is_dpo_with_other_answers(model: Any, reference: Any, batches: Any) -> None:
    batch = batches["forget"]
    values = [LOSSES[name](beta=0.7)(model, batch, reference) for name in ("AltPO", "DPO")]
    assert torch.equal(*values)


def test_logit_margin_lowers_the_largest_logit_and_raises_the_rest() -> None:
    of = table(5)
    _, grad = told(LOSSES["LogitMargin"](), of)

    def one(p: Tensor, _: int, place: tuple[int, int]) -> Tensor:
        z = of.logits.detach()[place]
        return 2 * (z.max() - z.mean()) * (onehot(int(z.argmax())) - 1 / 5)

    assert_close(grad, expected_gradient(of, TRUE, one))


def test_logit_margin_by_hand_is_zero_where_logits_are_flat() -> None:
    assert told(LOSSES["LogitMargin"](), Table(torch.full((2, 4, 5), 7.0)))[0] == 0
    of = Table(torch.zeros(2, 4, 5))
    of.logits.data[..., 1] = 10.0  # the largest is 10, the mean 2
    assert told(LOSSES["LogitMargin"](), of)[0] == pytest.approx(64.0)


# Limiting cases


def test_wga_and_satimp_without_weights_are_gradient_ascent(model: Any, batches: Any) -> None:
    batch = batches["forget"]
    ascent = LOSSES["GA"]()(model, batch)
    for loss in (LOSSES["WGA"](beta=0), LOSSES["SatImp"](beta1=0, beta2=0)):
        value = loss(model, batch)
        assert torch.equal(value, ascent)
        assert torch.equal(gradient(value, model), gradient(LOSSES["GA"]()(model, batch), model))


def test_satimp_without_importance_is_wga(model: Any, batches: Any) -> None:
    batch = batches["forget"]
    assert torch.equal(LOSSES["SatImp"](beta1=2.0, beta2=0)(model, batch), LOSSES["WGA"](beta=2.0)(model, batch))


def test_satimp_leaves_certain_tokens_alone_to_the_last_digit() -> None:
    of = Table(torch.zeros(2, 4, 5))
    for place, true in TRUE:
        of.logits.data[place][true] = 20.0  # 1 − p = 8.2e-9, which is nothing in fp32
    _, grad = told(LOSSES["SatImp"](beta1=1.0, beta2=0.5), of)
    rest = 4 * math.exp(-20)
    assert grad[0, 0, 2].item() == pytest.approx(math.sqrt(rest) * rest / 4, rel=1e-4)


def test_undial_without_strength_distils_the_reference(model: Any, reference: Any, batches: Any) -> None:
    loss, batch = LOSSES["UNDIAL"](beta=0), batches["forget"]
    assert gradient(loss(model, batch, copy.deepcopy(model)), model).abs().max() < 1e-6
    # Cross-entropy is KL and the reference's entropy, which has no gradient.
    assert_close(
        gradient(loss(model, batch, reference), model),
        gradient(LOSSES["KL"]()(model, batch, reference), model),
        rtol=1e-4,
        atol=1e-6,
    )


def test_undial_never_raises_the_true_token_of_its_own_reference(model: Any, batches: Any) -> None:
    batch = rows(batches["forget"], slice(0, 1))
    moved = copy.deepcopy(model)
    gradient_step(LOSSES["UNDIAL"](beta=3.0)(moved, batch, model), moved)
    assert LOSSES["GD"]()(moved, batch) > LOSSES["GD"]()(model, batch)


def gradient_step(loss: Tensor, model: nn.Module, lr: float = 0.05) -> None:
    loss.backward()
    with torch.no_grad():
        for param in model.parameters():
            if param.grad is not None:
                param -= lr * param.grad


def test_rmu_reaches_no_layer_above(model: Any, batches: Any) -> None:
    trained = copy.deepcopy(model)
    LOSSES["RMU"](layer=0)(trained, batches["forget"]).backward()
    reached = {name for name, param in trained.named_parameters() if param.grad is not None and param.grad.any()}
    below = {name for name, _ in trained.named_parameters() if name.startswith(("model.embed", "model.layers.0."))}
    assert reached == below


def test_rmu_is_zero_where_the_states_are_the_direction(model: Any, batches: Any) -> None:
    """Its target is where it stands still: a unit direction of positive entries, times the coefficient."""
    blank = copy.deepcopy(model)
    for param in blank.parameters():
        param.data.zero_()
    drawn = torch.rand(24, generator=torch.Generator().manual_seed(5))
    blank.model.embed_tokens.weight.data[:] = 4.0 * drawn / drawn.norm()  # layers of zeros hand it on
    loss = LOSSES["RMU"](layer=0, coefficient=4.0, seed=5)
    assert loss(blank, batches["forget"]).item() == pytest.approx(0, abs=1e-12)
    other = LOSSES["RMU"](layer=0, coefficient=8.0, seed=5)
    assert other(blank, batches["forget"]).item() == pytest.approx(4.0**2 / 24, rel=1e-5)
    assert LOSSES["RMU"](layer=0, coefficient=4.0, seed=6)(blank, batches["forget"]) > 0.01


def test_rmu_steers_each_group_in_a_direction_of_its_own(model: Any, batches: Any) -> None:
    batch, loss = batches["forget"], LOSSES["RMU"](layer=0, coefficient=6.5, seed=3)
    count = len(batch["labels"])
    sequences = naive_losses.read(model, model, batch, 0)
    groups = [(2, 0, 1)[i % 3] for i in range(count)]
    mixed = loss(model, {**batch, "groups": torch.tensor(groups)}).item()
    assert mixed == pytest.approx(naive_losses.rmu(sequences, 6.5, 3, groups), rel=2e-6)
    assert mixed != pytest.approx(naive_losses.rmu(sequences, 6.5, 3), rel=1e-3)
    # Alone in a batch, a group has the direction that it has among others, and the first that of no groups at all.
    alone = [loss(model, {**batch, "groups": torch.full((count,), group)}) for group in range(3)]
    assert alone[0].item() == loss(model, batch).item()
    for group, value in enumerate(alone):
        assert value.item() == pytest.approx(naive_losses.rmu(sequences, 6.5, 3, [group] * count), rel=2e-6)
    first, second = (loss._directions({**batch, "groups": torch.full((count,), g)}, 24)[0] for g in (0, 1))
    assert_close(torch.stack([first.norm(), second.norm()]), torch.ones(2))
    assert first @ second < 0.95
    # By the states' own direction the gradient vanishes, and by another's it does not.
    blank = copy.deepcopy(model)
    for param in blank.parameters():
        param.data.zero_()
    blank.model.embed_tokens.weight.data[:] = 6.5 * second  # layers of zeros hand it on
    there, elsewhere = (
        gradient(loss(blank, {**batch, "groups": torch.full((count,), group)}), blank).norm().item() for group in (1, 0)
    )
    assert there < 1e-5 < 0.01 < elsewhere


def test_rmu_retain_is_zero_against_itself(model: Any, batches: Any) -> None:
    value = LOSSES["RMURetain"](layer=0)(model, batches["retain"], copy.deepcopy(model))
    assert value.item() == 0
    assert not gradient(value, model).any()


@pytest.mark.parametrize("name", ["RMU", "RMURetain"])
def test_a_layer_that_is_not_there_is_refused(name: str, batches: Any) -> None:
    model = load("model")
    with pytest.raises(ValueError, match="layer 2: the model has layers 0 to 1"):
        LOSSES[name](layer=2)(model, batches["forget"], model)
