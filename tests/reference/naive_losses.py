"""The losses without golden numbers, written down a second time: fp64 numbers, a sequence, a token and, where the
formula sums over the vocabulary, a word of it at a time. Each takes what one forward pass of each whole sequence says,
and where it needs refusals, or answers in their place, the same of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Position(NamedTuple):
    """One position that predicts an answer's token, by the model and by the reference."""

    true: int
    logits: list[float]
    reference_logits: list[float]
    hidden: list[float]
    reference_hidden: list[float]


def read(model: nn.Module, reference: nn.Module, part: Mapping[str, Tensor], layer: int) -> list[list[Position]]:
    """Every answer's positions; the layer's output is caught where it is made."""

    def run(which: Any, ids: Tensor, mask: Tensor) -> tuple[list[list[float]], list[list[float]]]:
        caught: list[Any] = []
        handle = which.model.layers[layer].register_forward_hook(lambda module, args, out: caught.append(out))
        with torch.no_grad():
            logits = which(input_ids=ids[None], attention_mask=mask[None]).logits[0].double().tolist()
        handle.remove()
        out = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
        return logits, out.reshape(len(ids), -1).double().tolist()

    sequences = []
    for ids, labels, mask in zip(part["input_ids"], part["labels"].tolist(), part["attention_mask"], strict=True):
        logits, hidden = run(model, ids, mask)
        reference_logits, reference_hidden = run(reference, ids, mask)
        sequences.append(
            [
                Position(labels[t + 1], logits[t], reference_logits[t], hidden[t], reference_hidden[t])
                for t in range(len(labels) - 1)
                if labels[t + 1] != -100
            ]
        )
    return sequences


def softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    exps = [math.exp(z - top) for z in logits]
    return [e / sum(exps) for e in exps]


def cross_entropy(target: Sequence[float], logits: Sequence[float]) -> float:
    return -sum(q * math.log(p) for q, p in zip(target, softmax(logits), strict=True) if q > 0)


def over_tokens(sequences: list[list[Position]], of: Callable[[Position], float]) -> float:
    values = [of(position) for sequence in sequences for position in sequence]
    return sum(values) / len(values)


def over_sequences(sequences: list[list[Position]], of: Callable[[Position], float]) -> float:
    means = [sum(map(of, sequence)) / len(sequence) for sequence in sequences]
    return sum(means) / len(means)


def wga(sequences: list[list[Position]], beta: float) -> float:
    def one(position: Position) -> float:
        p = softmax(position.logits)[position.true]
        return p**beta * math.log(p)

    return over_tokens(sequences, one)


def sat_imp(sequences: list[list[Position]], beta1: float, beta2: float) -> float:
    def one(position: Position) -> float:
        p = softmax(position.logits)[position.true]
        return p**beta1 * (1 - p) ** beta2 * math.log(p)

    return over_tokens(sequences, one)


def logit_margin(sequences: list[list[Position]]) -> float:
    return over_tokens(
        sequences, lambda position: (max(position.logits) - sum(position.logits) / len(position.logits)) ** 2
    )


def ceu(sequences: list[list[Position]], skip_first: int) -> float:
    def one(position: Position) -> float:
        p = softmax(position.logits)
        others = [0.0 if v == position.true else p_v for v, p_v in enumerate(p)]
        return cross_entropy([q / sum(others) for q in others], position.logits)

    return over_tokens([sequence[skip_first:] for sequence in sequences], one)


def log_prob(position: Position, logits: Sequence[float]) -> float:
    return math.log(softmax(logits)[position.true])


def alt_po(sequences: list[list[Position]], alternates: list[list[Position]], beta: float) -> float:
    losses = []
    for answer, alternate in zip(sequences, alternates, strict=True):
        ratio = 0.0
        for sign, part in ((1, alternate), (-1, answer)):
            for position in part:
                ratio += sign * (log_prob(position, position.logits) - log_prob(position, position.reference_logits))
        losses.append(-2 / beta * math.log(1 / (1 + math.exp(-beta * ratio))))
    return sum(losses) / len(losses)


def divergence(p: Sequence[float], q: Sequence[float]) -> float:
    """Jensen-Shannon, of two distributions, in nats."""
    total = 0.0
    for p_v, q_v in zip(p, q, strict=True):
        middle = (p_v + q_v) / 2
        total += sum(each * math.log(each / middle) / 2 for each in (p_v, q_v) if each > 0)
    return total


def jens_un(sequences: list[list[Position]], refusals: list[list[Position]]) -> float:
    values = []
    for sequence, refusal in zip(sequences, refusals, strict=True):
        for i, position in enumerate(sequence):
            p = softmax(position.logits)
            target = refusal[i % len(refusal)].true
            values.append(divergence(p, [float(v == target) for v in range(len(p))]))
    return sum(values) / len(values)


def jsd(sequences: list[list[Position]]) -> float:
    return over_tokens(
        sequences, lambda position: divergence(softmax(position.logits), softmax(position.reference_logits))
    )


def undial(sequences: list[list[Position]], beta: float) -> float:
    def one(position: Position) -> float:
        adjusted = list(position.reference_logits)
        adjusted[position.true] -= beta
        return cross_entropy(softmax(adjusted), position.logits)

    return over_tokens(sequences, one)


def rmu(sequences: list[list[Position]], coefficient: float, seed: int, groups: Sequence[int] | None = None) -> float:
    """`groups`: of each sequence, which of the vectors drawn one after the other it goes to; the first without it."""
    values = []
    for sequence, group in zip(sequences, groups or [0] * len(sequences), strict=True):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(group + 1):
            drawn = torch.rand(len(sequence[0].hidden), generator=generator).tolist()
        length = math.sqrt(sum(u * u for u in drawn))
        target = [coefficient * u / length for u in drawn]
        values.append(sum(squared_distance(position.hidden, target) for position in sequence) / len(sequence))
    return sum(values) / len(values)


def rmu_retain(sequences: list[list[Position]]) -> float:
    return over_sequences(sequences, lambda position: squared_distance(position.hidden, position.reference_hidden))


def squared_distance(a: Sequence[float], b: Sequence[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)


NAIVE: dict[str, Callable[..., float]] = {
    "WGA": wga,
    "SatImp": sat_imp,
    "LogitMargin": logit_margin,
    "AltPO": alt_po,
    "JensUn": jens_un,
    "JSD": jsd,
    "CEU": ceu,
    "UNDIAL": undial,
    "RMU": rmu,
    "RMURetain": rmu_retain,
}
