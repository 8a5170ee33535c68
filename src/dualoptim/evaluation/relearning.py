"""Fine-tuning on the rows to forget, as an attacker would who has some of them; afterward the model is as it was.

The recipe is that of OpenUnlearning's meta-evaluation (arXiv 2506.12618): one epoch of AdamW at a learning rate of
2e-5. What the paper leaves open is as in the reproduction gnueaj/unlearning-depth-score: batches of 32, no weight
decay, no warm-up, and the Trainer's linear decay, betas and clipping.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..data import Row, Tokens, collate, encode, pad_id
from ..device import in_chosen_precision, seeded
from ..losses import IGNORED, labelled
from ..models import positions
from ..optim import DualOptim
from ..training.wrappers import own_forward
from .scoring import LABELLED_TOKENS, MAX_LENGTH

LR = 2e-5
BATCH = 32
BETAS = (0.9, 0.999)
NORM = 1.0


@contextmanager
def relearned(model: nn.Module, tokenizer: Any, rows: Sequence[Row], lr: float | None = None) -> Iterator[None]:
    """A context in which a model has been fine-tuned on rows for one epoch; afterward it is as it was, bit for bit.

    All of its floating-point parameters are trained, those of an adapter and of its base alike, in the precision of
    scoring. Takes memory for gradients and two moments of 32 bits, and for a copy of the weights in main memory.

    Args:
        rows: prompts and answers; the loss is the mean over all labeled tokens of a batch.
        lr: the learning rate. Default: the published `LR`, which hardly moves a small model.
    """
    with intact(model):
        with own_forward(model):
            _train(model, tokenizer, rows, LR if lr is None else lr)
        yield


@contextmanager
def intact(model: nn.Module) -> Iterator[None]:
    """A context after which a model's weights, buffers, gradients and modes are as they were, bit for bit.

    Takes a copy of the weights in main memory.
    """
    parameters, modes = list(model.parameters()), [(module, module.training) for module in model.modules()]
    kept = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in (*parameters, *model.buffers())]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        with torch.no_grad():
            for tensor, was in kept:
                tensor.copy_(was)
        for parameter, required, gradient in flags:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode


def _train(model: nn.Module, tokenizer: Any, rows: Sequence[Row], lr: float) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    # With one objective it is AdamW, with stochastic rounding, as bf16 weights would else lose such small updates.
    optimizer = DualOptim(parameters, lr, BETAS, weight_decay=0.0, objectives=("relearn",))
    order = random.Random(0).sample(rows, len(rows))
    tokens = [encode(row, tokenizer, MAX_LENGTH, positions(model)) for row in order]
    batches = [tokens[i : i + BATCH] for i in range(0, len(tokens), BATCH)]
    device = next(model.parameters()).device
    model.train()
    with seeded(0):  # of dropout
        for step, batch in enumerate(tqdm(batches, desc="Relearning", unit="step", leave=False, disable=None)):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / len(batches))
            total = sum(label != IGNORED for row in batch for label in row.labels)
            for part in _passes(batch):
                inputs = {key: value.to(device) for key, value in collate(part, pad_id(tokenizer)).items()}
                with torch.enable_grad(), in_chosen_precision(device):
                    out = labelled(model, inputs)
                    loss = nn.functional.cross_entropy(out.logits, out.targets, reduction="sum") / total
                torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(parameters, NORM)
            optimizer.step(objective="relearn")
            optimizer.zero_grad()


def _passes(batch: Sequence[Tokens]) -> list[list[Tokens]]:
    """A batch in parts, each for one forward pass of at most `LABELLED_TOKENS` tokens, padding included."""
    parts: list[list[Tokens]] = []
    for row in sorted(batch, key=lambda row: len(row.input_ids)):
        if not parts or (len(parts[-1]) + 1) * len(row.input_ids) > LABELLED_TOKENS:
            parts.append([])
        parts[-1].append(row)
    return parts
