"""The losses to forget. Letters: see `dualoptim.losses`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import IGNORED, Batch, Loss, hidden_states, labelled, learnt, per_sequence, sequence_log_probs


@dataclass(frozen=True)
class GA(Loss):
    """Gradient ascent, to forget: the negative of GD. Unbounded below, so the model breaks if it is not stopped.

    Use it when the plainest baseline is wanted; keep the learning rate low and stop early.

    Reference: arXiv 2210.01504.
    """

    role = "forget"
    mean_over = "tokens"

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        return labelled(model, batch).log_probs().mean()


@dataclass(frozen=True)
class WGA(Loss):
    """Weighted gradient ascent, to forget: Σ p_t^β log p_t / N, the weights p_t^β without gradient.

    Use it when GA breaks the model.

    GA whose push on a token fades as the token becomes improbable, instead of growing without bound.

    Args:
        beta: β ≥ 0; 1 as in open-unlearning's trainer, as the paper tunes it for each task. 0 is GA.

    Reference: arXiv 2502.19301.
    """

    beta: float = 1.0
    role = "forget"
    mean_over = "tokens"
    limits: ClassVar[Mapping[str, str]] = {"beta": ">= 0"}

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        log_probs = labelled(model, batch).log_probs()
        return ((self.beta * log_probs.detach()).exp() * log_probs).mean()


@dataclass(frozen=True)
class SatImp(Loss):
    """Saturation and importance, to forget: Σ p_t^β1 (1 − p_t)^β2 log p_t / N, the weights without gradient.

    Use it when the answers share many words with what is to be kept.

    The first factor is small for tokens that are forgotten already, the second for those that are easy to guess.

    Args:
        beta1: β1 ≥ 0 of the first factor; 5 as in open-unlearning's trainer.
        beta2: β2 ≥ 0 of the second; 1 from the same source. 0 makes it WGA.

    Reference: arXiv 2505.11953.
    """

    beta1: float = 5.0
    beta2: float = 1.0
    role = "forget"
    mean_over = "tokens"
    limits: ClassVar[Mapping[str, str]] = {"beta1": ">= 0", "beta2": ">= 0"}

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        log_probs = labelled(model, batch).log_probs()
        fixed = log_probs.detach()
        # expm1 keeps the precision of 1 − p where p is nearly 1, as it is for memorized tokens.
        weights = (self.beta1 * fixed).exp() * (-fixed.expm1()) ** self.beta2
        return (weights * log_probs).mean()


@dataclass(frozen=True)
class NPO(Loss):
    """Negative preference optimization, to forget: −2/β mean log σ(−β log(π(y|x) / π_ref(y|x))).

    Use it when the answer itself should become improbable, as `--goal erase` does.

    Its gradient is GA's, with less weight where the answer is already less probable than under the reference.

    Args:
        beta: β > 0; 0.1 as published. As β → 0 the loss becomes GA.

    Reference: arXiv 2404.05868.
    """

    beta: float = 0.1
    role = "forget"
    reference = "sequences"
    limits: ClassVar[Mapping[str, str]] = {"beta": "> 0"}

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        before = self._reference_log_probs(batch, reference)
        now, _ = sequence_log_probs(model, batch)
        return -2 / self.beta * F.logsigmoid(-self.beta * (now - before)).mean()


@dataclass(frozen=True)
class SimNPO(Loss):
    """NPO without a reference, to forget: −2/β mean log σ(β (−log π(y|x) / |y| − γ)).

    Use it when NPO's reference costs too much, or answers differ much in length.

    Args:
        beta: β > 0; 2.5, the paper's for TOFU.
        gamma: γ, a margin on the answer's mean token loss, in nats; 0, the paper's for TOFU.

    Reference: arXiv 2410.07163, which writes the margin outside of β: its γ is β times this one.
    """

    beta: float = 2.5
    gamma: float = 0.0
    role = "forget"
    limits: ClassVar[Mapping[str, str]] = {"beta": "> 0"}

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        total, length = sequence_log_probs(model, batch)
        return -2 / self.beta * F.logsigmoid(self.beta * (-total / length.clamp(min=1) - self.gamma)).mean()


@dataclass(frozen=True)
class DPO(Loss):
    """Direct preference optimization, to forget: the refusal preferred to the answer, relative to the reference.

    Use it when another answer should take the place of the old one, as for rows with `instead`.

    −2/β mean log σ(β [log(π(idk|x) / π_ref(idk|x)) − log(π(y|x) / π_ref(y|x))])

    Args:
        beta: β > 0; 0.1 as published.

    Reference: arXiv 2305.18290; as an unlearning loss, with the factor 2/β, arXiv 2404.05868.
    """

    beta: float = 0.1
    role = "forget"
    reference = "sequences"
    needs_idk = True
    limits: ClassVar[Mapping[str, str]] = {"beta": "> 0"}

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        idk = self._idk(batch)
        before = self._reference_log_probs(idk, reference) - self._reference_log_probs(batch, reference)
        now = sequence_log_probs(model, idk)[0] - sequence_log_probs(model, batch)[0]
        return -2 / self.beta * F.logsigmoid(self.beta * (now - before)).mean()


@dataclass(frozen=True)
class AltPO(DPO):
    """Alternate preference optimization, to forget: DPO with other answers by the model itself instead of refusals.

    Use it when the model should still answer, plausibly but wrongly, instead of refusing.

    Each answer a in ``batch["idk"]`` was written by the model before unlearning, when it was asked for another version
    of the true answer with its facts changed:

    −2/β mean log σ(β [log(π(a|x) / π_ref(a|x)) − log(π(y|x) / π_ref(y|x))])

    Args:
        beta: β > 0; 0.1, DPO's in the authors' code.
        alternates: how many are sampled for each question; each time its row is drawn, one of them is used. 5, the
            authors' for TOFU.
        temperature: of the sampling, > 0; 1, from the same source.
        seed: of the sampling.

    Reference: arXiv 2409.13474.
    """

    alternates: int = 5
    temperature: float = 1.0
    seed: int = 0
    needs_alternates = True
    limits: ClassVar[Mapping[str, str]] = {
        "beta": "> 0",
        "alternates": "a whole number > 0",
        "temperature": "> 0",
        "seed": "a whole number >= 0",
    }


@dataclass(frozen=True)
class IDK(Loss):
    """Learn to refuse, to forget: GD on refusals to the same questions, with N the refusals' tokens.

    Use it when the model should say that it does not know, as `--goal refuse` does; the answer itself stays probable.

    Reference: TOFU, arXiv 2401.06121.
    """

    role = "forget"
    needs_idk = True
    mean_over = "tokens"

    def size(self, batch: Batch) -> int:
        return super().size(self._idk(batch))

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        return -labelled(model, self._idk(batch)).log_probs().mean()


@dataclass(frozen=True)
class JensUn(Loss):
    """Jensen-Shannon unlearning, to forget: the mean over answer tokens of JSD(π ‖ δ_r), r the refusal's token there.

    Use it when IDK goes too far: no token's loss grows without bound. Its partner is JSD.

    The targets are the refusal's tokens with its end token, repeated over all labeled tokens of the true answer; the
    context of each is the true answer. With p = π(r | x, y_<t) and m = (π + δ_r) / 2,

    JSD(π ‖ δ_r) = KL(π ‖ m) / 2 + KL(δ_r ‖ m) / 2 = log 2 − ((1 + p) log(1 + p) − p log p) / 2

    which is in [0, log 2]; its gradient with respect to log p is −p log(1 + 1/p) / 2.

    Reference: arXiv 2509.02820. Its authors' target is "No idea", one for all rows.
    """

    role = "forget"
    needs_idk = True
    mean_over = "tokens"

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        out = labelled(model, {**batch, "labels": self._targets(batch)})
        log_p = out.log_probs()
        p = log_p.exp()
        return (math.log(2) - ((1 + p) * p.log1p() - p * log_p) / 2).mean()

    def _targets(self, batch: Batch) -> Tensor:
        """Labels (B, T) with the refusal's tokens, repeated, in place of the answer's."""
        answer, refusal = batch["labels"], self._idk(batch)["labels"]
        places, given = learnt(answer), learnt(refusal)
        tokens = refusal[:, 1:].gather(1, (~given).int().argsort(dim=1, stable=True))  # those that carry a label first
        turn = (places.cumsum(1) - 1).clamp(min=0) % given.sum(1, keepdim=True).clamp(min=1)
        targets = tokens.gather(1, turn).masked_fill(~places, IGNORED)
        return F.pad(targets, (1, 0), value=IGNORED)


@dataclass(frozen=True)
class ME(Loss):
    """Maximize the entropy, to forget: the mean over answer tokens of KL(uniform ‖ π) = −log V − Σ_v log π_v / V.

    Use it when no answer should be preferred, not even a refusal.

    Zero when the model finds every token of the vocabulary equally likely.

    Reference: arXiv 2410.08109.
    """

    role = "forget"
    mean_over = "tokens"

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        logits = labelled(model, batch).logits
        return (logits.logsumexp(-1) - logits.mean(-1)).mean() - math.log(logits.shape[-1])


@dataclass(frozen=True)
class LogitMargin(Loss):
    """Flatten the logits, to forget: the mean over answer tokens of (max_v z_v − Σ_v z_v / V)², z the logits.

    Use it when PDU is to be reproduced.

    PDU's forget loss. It is quadratic in the logits, so its values are large: the retain loss needs a large weight,
    100 on TOFU by its authors.

    Reference: arXiv 2506.05314, whose code takes the mean over every position, prompt and padding included.
    """

    role = "forget"
    mean_over = "tokens"

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        logits = labelled(model, batch).logits
        return (logits.amax(-1) - logits.mean(-1)).square().mean()


@dataclass(frozen=True)
class CEU(Loss):
    """Cross-entropy unlearning (CE-U), to forget: the mean of −Σ_v q_v log π_v, where q is π without the true token.

    Use it when a bounded push is wanted without a reference.

    q is proportional to π at every token except y_t, where it is zero, and has no gradient. So the gradient with
    respect to the logits is p_t at y_t and −π_v p_t / (1 − p_t) elsewhere: it is bounded, and vanishes with p_t.

    Args:
        skip_first: how many tokens at the start of each answer are left out; 1 as in open-unlearning's trainer,
            after a footnote of the paper. An answer with labels on no other tokens does not count, and training
            refuses its row. Where ``batch["answer_starts"]`` (B,) has no index of an answer's first token, this is
            the first with a label.

    Reference: arXiv 2503.01224.
    """

    skip_first: int = 1
    role = "forget"
    mean_over = "tokens"
    limits: ClassVar[Mapping[str, str]] = {"skip_first": "a whole number >= 0"}

    def size(self, batch: Batch) -> int:
        return int(self._counted(batch).sum())

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        out, counted = labelled(model, batch), self._counted(batch)
        logits, targets = out.logits[counted], out.targets[counted]
        others = logits.detach().scatter(1, targets[:, None], -math.inf).softmax(-1)
        # A batch in which no token counts gives zero, not the NaN of an empty mean.
        return F.cross_entropy(logits, others, reduction="sum") / max(len(targets), 1)

    def _counted(self, batch: Batch) -> Tensor:
        """Which of the N labeled tokens come after the skipped ones."""
        labels = learnt(batch["labels"])
        starts = batch.get("answer_starts", labels.int().argmax(1) + 1)
        at = torch.ones_like(labels, dtype=torch.int64).cumsum(1)  # index of each token in the sequence
        return (at >= starts[:, None] + self.skip_first)[labels]


@dataclass(frozen=True)
class UNDIAL(Loss):
    """Self-distillation with adjusted logits (UNDIAL), to forget: the mean of −Σ_v q_v log π_v.

    Use it when training must not diverge: its target is fixed by the reference.

    q = softmax(z_ref − β e_y): the reference's distribution with β subtracted from the true token's logit.

    Args:
        beta: β ≥ 0, the strength, in logits; 10 as in open-unlearning's configuration (3, 10 and 30 are its authors'
            advice). 0 distills the reference as it is.

    Reference: arXiv 2402.10052.
    """

    beta: float = 10.0
    role = "forget"
    reference = "model"
    mean_over = "tokens"
    limits: ClassVar[Mapping[str, str]] = {"beta": ">= 0"}

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        with torch.no_grad():
            before = labelled(self._reference(reference), batch)
            true = before.targets[:, None]
            adjusted = before.logits.scatter_add(1, true, torch.full_like(true, -self.beta, dtype=torch.float32))
        return F.cross_entropy(labelled(model, batch).logits, adjusted.softmax(-1))


@dataclass(frozen=True)
class RMU(Loss):
    """Steer a layer's hidden states toward a fixed random direction, to forget: ‖h_t − c u‖² / d.

    Use it when knowledge should be scrambled inside the network; layer and coefficient depend on the model.

    u is a unit vector whose entries are drawn uniformly from [0, 1) before it is normalized. If ``batch["groups"]``
    (B,) has each row's corpus, counted from 0, each corpus has a u of its own, drawn one after the other. The loss is
    averaged over the positions that predict a sequence's answer, then over sequences. It does not train the layers
    above. `RMURetain` is its partner.

    Args:
        layer: the layer, counted from 0, whose output is steered; 7, its authors' for Zephyr-7B (32 layers).
        coefficient: c > 0, the norm that the states are steered to; 6.5, its authors' for Zephyr-7B. What is large
            depends on the model: compare with the norm of its hidden states.
        seed: of every u.

    Reference: arXiv 2403.03218, which sums over d where its code and this take the mean.
    """

    layer: int = 7
    coefficient: float = 6.5
    seed: int = 0
    role = "forget"
    limits: ClassVar[Mapping[str, str]] = {
        "layer": "a whole number >= 0",
        "coefficient": "> 0",
        "seed": "a whole number >= 0",
    }

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        states, rows = hidden_states(model, batch, self.layer)
        target = self.coefficient * self._directions(batch, states.shape[1]).to(states.device)[rows]
        total, length = per_sequence((states - target).square().mean(-1), rows, len(batch["labels"]))
        return (total / length.clamp(min=1)).mean()

    def _directions(self, batch: Batch, width: int) -> Tensor:
        """u of each sequence, (B, d); on the CPU, where a seed gives the same numbers whatever the model's device."""
        groups = batch.get("groups", torch.zeros(len(batch["labels"]))).long().cpu()
        generator = torch.Generator().manual_seed(self.seed)
        # With its dtype, since another, as torch's default may be, draws other numbers.
        drawn = [torch.rand(width, generator=generator, dtype=torch.float32) for _ in range(int(groups.max()) + 1)]
        return F.normalize(torch.stack(drawn), dim=1)[groups]
