"""The losses to retain. Letters: see `dualoptim.losses`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Batch, Loss, hidden_states, labelled, model_inputs, per_sequence, sequence_log_probs


@dataclass(frozen=True)
class GD(Loss):
    """Gradient descent, to retain: the mean negative log-likelihood of the answers' tokens, −Σ log π(y_t) / N.

    Use it when the rows to keep hold the right answers.
    """

    role = "retain"
    mean_over = "tokens"

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        return -labelled(model, batch).log_probs().mean()


@dataclass(frozen=True)
class KL(Loss):
    """Stay near the reference, to retain: the mean over positions of KL(π_ref ‖ π).

    Use it when the model should stay as it was on the rows to keep, right or wrong, as both goals do.

    Args:
        every_position: False, the default: the positions that predict the answer's tokens. True: every position,
            prompt and padding included, as the published code has it; for comparison with its numbers.
    """

    every_position: bool = False
    role = "retain"
    reference = "model"
    mean_over = "tokens"

    def size(self, batch: Batch) -> int:
        return batch["input_ids"].numel() if self.every_position else super().size(batch)

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        with torch.no_grad():
            before = self._logits(self._reference(reference), batch)
        now = self._logits(model, batch)
        return F.kl_div(now.log_softmax(-1), before.log_softmax(-1), reduction="batchmean", log_target=True)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        if not self.every_position:
            return labelled(model, batch).logits
        # Without the positions of an adapter's own prompt, which come first.
        logits = model(**model_inputs(model, batch)).logits[:, -batch["input_ids"].shape[1] :]
        return logits.flatten(0, 1).float()


@dataclass(frozen=True)
class JSD(Loss):
    """Stay near the reference, to retain: the mean over answer tokens of JSD(π_ref ‖ π), in [0, log 2].

    Use it when KL is dominated by a few tokens.

    KL(π_ref ‖ m) / 2 + KL(π ‖ m) / 2 with m = (π_ref + π) / 2. JensUn's retain loss. Unlike `KL` it does not grow
    without bound where a token is likely under the reference and no longer under the model.

    Reference: arXiv 2509.02820, whose code takes the mean over every position, prompt and padding included.
    """

    role = "retain"
    reference = "model"
    mean_over = "tokens"

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        with torch.no_grad():
            before = labelled(self._reference(reference), batch).logits.log_softmax(-1)
        now = labelled(model, batch).logits.log_softmax(-1)
        middle = torch.logaddexp(before, now) - math.log(2)
        halves = [F.kl_div(middle, each, reduction="batchmean", log_target=True) for each in (before, now)]
        return (halves[0] + halves[1]) / 2


@dataclass(frozen=True)
class AP(Loss):
    """Answer preservation, to retain: the answer preferred to the refusal, −1/β mean log σ(β log(π(y|x) / π(idk|x))).

    Use it when IDK or DPO makes refusals spread to questions that should be answered.

    Args:
        beta: β > 0; 0.1 as published.

    Reference: arXiv 2410.08109.
    """

    beta: float = 0.1
    role = "retain"
    needs_idk = True
    limits: ClassVar[Mapping[str, str]] = {"beta": "> 0"}

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        answer, _ = sequence_log_probs(model, batch)
        refusal, _ = sequence_log_probs(model, self._idk(batch))
        return -1 / self.beta * F.logsigmoid(self.beta * (answer - refusal)).mean()


@dataclass(frozen=True)
class RMURetain(Loss):
    """Keep a layer's hidden states near the reference's, to retain: RMU's partner, ‖h_t − h_t^ref‖² / d.

    Use it when the loss to forget is RMU.

    Averaged over the positions that predict a sequence's answer, then over sequences. It is small compared with `RMU`,
    so it is given a large weight: 1200 by its authors, for Zephyr-7B.

    Args:
        layer: the layer, counted from 0, as RMU's; 7, its authors' for Zephyr-7B.

    Reference: arXiv 2403.03218, which sums over d where its code and this take the mean.
    """

    layer: int = 7
    role = "retain"
    reference = "model"
    limits: ClassVar[Mapping[str, str]] = {"layer": "a whole number >= 0"}

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        with torch.no_grad():
            before, _ = hidden_states(self._reference(reference), batch, self.layer)
        now, rows = hidden_states(model, batch, self.layer)
        total, length = per_sequence((now - before).square().mean(-1), rows, len(batch["labels"]))
        return (total / length.clamp(min=1)).mean()
