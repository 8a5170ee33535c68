"""The losses: what to forget is pushed by one, what to keep is held by another.

Each loss is a small frozen class whose instance is called as ``loss(model, batch, reference)`` and gives a scalar.
`batch` is a mapping of ``input_ids``, ``labels`` and ``attention_mask`` (B, T), with labels −100 where nothing is
learnt, and ``batch["idk"]`` a mapping of the same kind, the same questions answered by a refusal, for the losses that
need it (`needs_idk`). `reference` is a frozen model for those that need one (`needs_reference`), else None.

Letters: B sequences in a batch, T tokens in a sequence, V vocabulary, N labelled tokens in the batch, y an answer, x
its question, |y| its tokens, π the model, π_ref the reference; log π(y|x) sums over the answer's tokens.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = Mapping[str, Any]
IGNORED = -100


class Labelled(NamedTuple):
    """What the model says at the positions that predict a labelled token."""

    logits: Tensor  # (N, V) fp32
    targets: Tensor  # (N,) token ids
    rows: Tensor  # (N,) the sequence each belongs to

    def log_probs(self) -> Tensor:
        """(N,) log-probabilities of the labelled tokens."""
        return -F.cross_entropy(self.logits, self.targets, reduction="none")


def labelled(model: nn.Module, batch: Batch) -> Labelled:
    """Run the model and keep its logits where a label follows.

    The head is applied only from the first labelled position on, where the model allows it (`logits_to_keep`), and
    fp32 copies are made of the labelled positions alone.
    """
    labels = batch["labels"]
    learnt = labels[:, 1:] != IGNORED  # position t predicts token t + 1
    columns = learnt.any(0).nonzero()
    if len(columns) == 0:
        raise ValueError("no token of the batch carries a label, so there is nothing to learn or score in it")
    start = int(columns[0])
    kept = {"logits_to_keep": labels.shape[1] - start} if _keeps_logits(model) else {}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **kept).logits
    learnt = learnt[:, start:]
    rows, at = learnt.nonzero(as_tuple=True)
    logits = logits[:, logits.shape[1] - learnt.shape[1] - 1 : -1]
    return Labelled(logits[rows, at].float(), labels[:, 1:][rows, start + at], rows)


def sequence_log_probs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(log π(y|x), |y|) of each sequence of the batch, both (B,)."""
    out = labelled(model, batch)
    zeros = out.logits.new_zeros(len(batch["labels"]))
    return zeros.index_add(0, out.rows, out.log_probs()), zeros.index_add(
        0, out.rows, torch.ones_like(out.logits[:, 0])
    )


def _keeps_logits(model: nn.Module) -> bool:
    inner: Any = getattr(model, "module", model)  # under DistributedDataParallel
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # under PEFT
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


class Loss(ABC):
    """What every loss declares of itself, beside its formula."""

    role: ClassVar[Literal["forget", "retain"]]
    needs_reference: ClassVar[bool] = False
    needs_idk: ClassVar[bool] = False
    mean_over: ClassVar[Literal["tokens", "sequences"]] = "sequences"  # what the batch's mean is taken over

    def __post_init__(self) -> None:
        """Check β where the loss has one."""
        beta = getattr(self, "beta", 1.0)
        if not beta > 0:
            raise ValueError(f"{type(self).__name__}: beta must be > 0, but is {beta}")

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        """The loss of a batch: a scalar."""

    def size(self, batch: Batch) -> int:
        """How many items the loss averages over in this batch: what weighs it against other batches of one step."""
        if self.mean_over == "sequences":
            return len(batch["labels"])
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def _reference(self, reference: nn.Module | None) -> nn.Module:
        if reference is None:
            raise ValueError(f"{type(self).__name__} needs a reference model and got None; pass the model as it was")
        return reference

    def _idk(self, batch: Batch) -> Batch:
        if "idk" not in batch:
            raise ValueError(
                f"{type(self).__name__} needs refusals to the same questions in batch['idk'], and the batch has none"
            )
        return batch["idk"]


@dataclass(frozen=True)
class GD(Loss):
    """Gradient descent, to retain: the mean negative log-likelihood of the answers' tokens, −Σ log π(y_t) / N."""

    role = "retain"
    mean_over = "tokens"

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        return -labelled(model, batch).log_probs().mean()


@dataclass(frozen=True)
class GA(Loss):
    """Gradient ascent, to forget: the negated GD. Unbounded below, so it ends in nonsense if it is not stopped.

    Reference: arXiv 2210.01504.
    """

    role = "forget"
    mean_over = "tokens"

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        return labelled(model, batch).log_probs().mean()


@dataclass(frozen=True)
class IDK(Loss):
    """Learn to refuse, to forget: GD on refusals to the same questions, with N counted there.

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
class NPO(Loss):
    """Negative preference optimisation, to forget: −2/β mean log σ(−β log(π(y|x) / π_ref(y|x))).

    Its gradient is GA's, weighted down where the answer has already become less probable than under the reference.

    Args:
        beta: β > 0; 0.1 as published. As β → 0 the loss becomes GA.

    Reference: arXiv 2404.05868.
    """

    beta: float = 0.1
    role = "forget"
    needs_reference = True

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        with torch.no_grad():
            before, _ = sequence_log_probs(self._reference(reference), batch)
        now, _ = sequence_log_probs(model, batch)
        return -2 / self.beta * F.logsigmoid(-self.beta * (now - before)).mean()


@dataclass(frozen=True)
class SimNPO(Loss):
    """NPO without a reference, to forget: −2/β mean log σ(β (−log π(y|x) / |y| − γ)).

    Args:
        beta: β > 0; 2.5, the paper's for TOFU.
        gamma: γ, a margin on the answer's mean token loss, in nats; 0, the paper's for TOFU.

    Reference: arXiv 2410.07163, which writes the margin outside of β: its γ is β times this one.
    """

    beta: float = 2.5
    gamma: float = 0.0
    role = "forget"

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        total, length = sequence_log_probs(model, batch)
        return -2 / self.beta * F.logsigmoid(self.beta * (-total / length.clamp(min=1) - self.gamma)).mean()


@dataclass(frozen=True)
class DPO(Loss):
    """Direct preference optimisation, to forget: the refusal preferred to the answer, relative to the reference.

    −2/β mean log σ(β [log(π(idk|x) / π_ref(idk|x)) − log(π(y|x) / π_ref(y|x))])

    Args:
        beta: β > 0; 0.1 as published.

    Reference: arXiv 2305.18290; as an unlearning loss, with the factor 2/β, arXiv 2404.05868.
    """

    beta: float = 0.1
    role = "forget"
    needs_reference = True
    needs_idk = True

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        idk = self._idk(batch)
        with torch.no_grad():
            frozen = self._reference(reference)
            before = sequence_log_probs(frozen, idk)[0] - sequence_log_probs(frozen, batch)[0]
        now = sequence_log_probs(model, idk)[0] - sequence_log_probs(model, batch)[0]
        return -2 / self.beta * F.logsigmoid(self.beta * (now - before)).mean()


@dataclass(frozen=True)
class ME(Loss):
    """Maximise the entropy, to forget: the mean over answer tokens of KL(uniform ‖ π) = −log V − Σ_v log π_v / V.

    Zero when the model finds every token of the vocabulary equally likely.

    Reference: arXiv 2410.08109.
    """

    role = "forget"
    mean_over = "tokens"

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        logits = labelled(model, batch).logits
        return (logits.logsumexp(-1) - logits.mean(-1)).mean() - math.log(logits.shape[-1])


@dataclass(frozen=True)
class KL(Loss):
    """Stay near the reference, to retain: the mean over positions of KL(π_ref ‖ π).

    Args:
        every_position: False, the default: the positions that predict the answer's tokens. True: every position,
            prompt and padding included, as the published code has it; for comparison with its numbers.
    """

    every_position: bool = False
    role = "retain"
    needs_reference = True
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
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1).float()


@dataclass(frozen=True)
class AP(Loss):
    """Answer preservation, to retain: the answer preferred to the refusal, −1/β mean log σ(β log(π(y|x) / π(idk|x))).

    Args:
        beta: β > 0; 0.1 as published.

    Reference: arXiv 2410.08109.
    """

    beta: float = 0.1
    role = "retain"
    needs_idk = True

    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        answer, _ = sequence_log_probs(model, batch)
        refusal, _ = sequence_log_probs(model, self._idk(batch))
        return -1 / self.beta * F.logsigmoid(self.beta * (answer - refusal)).mean()


LOSSES: dict[str, type[Loss]] = {cls.__name__: cls for cls in (GA, NPO, SimNPO, DPO, IDK, ME, GD, KL, AP)}
