"""Gradients of several objectives → one: the compared methods that resolve conflict in the gradient, not the optimizer.

A rule reads the objectives' Gramian G (K, K), the inner products of their gradients g_1 … g_K over all parameters, and
gives weights w (K,): the step is taken along Σ_k w_k g_k. These methods only weight whole gradients, so nothing else is
stored or computed. There are K objectives; the first is the one to forget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .errors import UserError

Rule = Callable[[Tensor], Tensor]


def pcgrad(gram: Tensor) -> Tensor:
    """PCGrad, by TorchJD: each gradient loses its component along every other that it conflicts with; then the sum.

    For each k, in a random order of the others: g ← g − min(0, ⟨g, g_j⟩) / ‖g_j‖² · g_j. With two objectives the order
    does not matter. It is drawn with a seed computed from the gradients, so that all ranks draw the same and a run can
    be repeated.

    >>> pcgrad(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
    tensor([1.5000, 1.5000])

    Raises:
        UserError: TorchJD is not installed.

    Reference: arXiv 2001.06782.
    """
    weighting = _torchjd("PCGradWeighting")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(gram.double().sum().view(torch.int64)))
        return weighting(gram)


def gru(gram: Tensor) -> Tensor:
    """GRU's rectified gradient: that of forgetting, without its component against what is to be kept.

    g_f − min(0, ⟨g_f, g_r⟩) / ‖g_r‖² · g_r, with g_r the sum of all other objectives' gradients. The step does not
    follow g_r itself, which only tells which direction of forgetting does no harm. The paper can average g_r over
    steps, with weight γ for the newest; here γ = 1.

    >>> gru(torch.tensor([[1.0, -0.5], [-0.5, 2.0]]))
    tensor([1.0000, 0.2500])

    Reference: arXiv 2503.09117.
    """
    weights = torch.zeros_like(gram[0])
    weights[0] = 1
    against, size = gram[0, 1:].sum(), gram[1:, 1:].sum()
    if size > 0:
        weights[1:] = -(against / size).clamp(max=0)
    return weights


def upgrad(gram: Tensor) -> Tensor:
    """UPGrad, by TorchJD: each gradient is projected so that no objective gets worse to first order; then the sum.

    TorchJD takes the mean. The sum is what the other rules give where nothing conflicts.

    Raises:
        UserError: TorchJD is not installed.

    Reference: arXiv 2406.16232.
    """
    return len(gram) * _torchjd("UPGradWeighting")(gram)


def _torchjd(name: str) -> Rule:
    try:
        from torchjd import aggregation

        return getattr(aggregation, name)()
    except ImportError:
        method = name.removesuffix("Weighting")
        raise UserError(f"combine: {method} needs the package torchjd; install dualoptim[torchjd]") from None


RULES: dict[str, Rule] = {"PCGrad": pcgrad, "GRU": gru, "UPGrad": upgrad}


def gramian(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """The inner products (K, K) of K gradients, each a sequence over the parameters; on the CPU, in fp64."""
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for i, one in enumerate(gradients):
        for j, other in enumerate(gradients[: i + 1]):
            products = [_inner(a, b) for a, b in zip(one, other, strict=True)]
            gram[i, j] = gram[j, i] = torch.stack(products).double().sum().cpu()
    return gram


def _inner(a: Tensor, b: Tensor) -> Tensor:
    product = torch.linalg.vecdot(a.flatten().float(), b.flatten().float())
    return product.full_tensor() if isinstance(product, DTensor) else product


@torch.no_grad()
def combined(rule: Rule, gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Σ_k w_k g_k by a rule's weights, written into the first objective's gradients."""
    weights = rule(gramian(gradients)).tolist()
    into = list(gradients[0])
    torch._foreach_mul_(into, weights[0])
    for weight, gradient in zip(weights[1:], gradients[1:], strict=True):
        torch._foreach_add_(into, list(gradient), alpha=weight)
    return into
