"""What the steps of a run hold, by the rows and losses that it has."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .. import ranks
from ..data import ObjectiveRows, Row, Tokens, encode
from ..device import device_and_precision
from ..losses import IGNORED
from ..models import load_config
from ..resolved import Resolved
from ..rows import alternates
from ..tiny import TINY
from .setting import USUAL_RANK, Setting, rows_at_once
from .tracing import Part, Pass, Size, trace


def of_run(of: Resolved, dataset: ObjectiveRows) -> int | None:
    """Bytes of activations in a run's step, beside weights and gradients.

    None for a model that is made from its rows, or if the model or a loss needs the values of tensors.

    Args:
        dataset: the run's rows, with refusals; AltPO's answers, which the model has yet to give, are not needed.
    """
    config = of.config
    if config.model == TINY:
        return None
    bf16 = device_and_precision()[1] if config.bf16 is None else config.bf16
    weights = "nf4" if config.load_in_4bit else "bfloat16" if config.bf16_weights else "float32"
    rank = config.lora_rank or (USUAL_RANK if of.adapted else 0)
    setting = Setting("", weights, checkpointing=config.gradient_checkpointing, lora_rank=rank, bf16=bf16)
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    try:
        autocast = bf16 and weights == "float32"
        return trace(load_config(config.model), setting, passes(of, dataset), dtype, autocast).early
    except Exception:  # a model's code may raise anything on tensors without values
        return None


def passes(of: Resolved, dataset: ObjectiveRows) -> list[Pass]:
    """The passes of a run's steps, each of the longest rows that it may have."""
    config = of.config
    sizes = {}
    for name, rows in dataset.tokens.items():
        replaced = [*map(_size, dataset.replaced(name))]
        if of.losses[name].needs_alternates:
            replaced = [each for row, own in zip(dataset.rows[name], rows, strict=True)
                        for each in _alternates(row, own, dataset)]  # fmt: skip
        size = _most(map(_size, rows))
        sizes[name] = size, _most(replaced) if replaced else size
    found: dict[Pass, None] = {}
    for turn in of.turns():
        total = sum(turn.values())
        at_once, _ = rows_at_once(config, total, ranks.size())
        one = tuple(Part(of.losses[name], -(-n * at_once // total), *sizes[name]) for name, n in turn.items() if n)
        # Where gradients are combined, each objective has a backward pass of its own.
        apart = config.combine is not None or config.sam_rho is not None
        found |= dict.fromkeys([(part,) for part in one] if apart else [one])
    return list(found)


def _size(row: Tokens) -> Size:
    return Size(len(row.input_ids), sum(label != IGNORED for label in row.labels))


def _most(sizes: Iterable[Size]) -> Size:
    return Size(*map(max, zip(*sizes, strict=True)))


def _alternates(row: Row, own: Tokens, dataset: ObjectiveRows) -> list[Size]:
    """What may stand in for a row's answer: what it gives itself, or whatever a model will be asked for."""
    given = [row.fields["instead"]] if row.fields.get("instead") else row.fields.get("alternates")
    if given:
        return [_size(encode(row.answered(text), dataset.tokenizer, *dataset.fits)) for text in given]
    tokens, labelled = _size(own)
    most = alternates.TOKENS + own.ended
    return [Size(min(tokens - labelled + most, dataset.fits[0]), most)]
