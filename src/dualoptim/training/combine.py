"""Gradients of several objectives → one: the compared methods that resolve conflict in the gradient, not the optimizer.

A rule reads the objectives' Gramian G (K, K), the inner products of their gradients g_1 … g_K over all parameters, and
their roles (K,), "forget" or "retain". It gives weights w (K,): the step is taken along Σ_k w_k g_k. These methods only
weight whole gradients, so nothing else is stored or computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import UserError

Rule = Callable[[Tensor, Sequence[str]], Tensor]


def pcgrad(gram: Tensor, roles: Sequence[str]) -> Tensor:
    """PCGrad, by TorchJD: each gradient loses its component along every other that it conflicts with; then the sum.

    For each k, in a random order of the others: g ← g − min(0, ⟨g, g_j⟩) / ‖g_j‖² · g_j. With two objectives the order
    does not matter. It is drawn with a seed computed from the gradients, so that all ranks draw the same and a run can
    be repeated.

    >>> pcgrad(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), ["forget", "retain"])
    tensor([1.5000, 1.5000])

    Raises:
        UserError: TorchJD is not installed.

    Reference: arXiv 2001.06782.
    """
    with _torchjd("PCGrad"):
        from torchjd import aggregation
    weighting = aggregation.PCGradWeighting()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(gram.double().sum().view(torch.int64)))
        return weighting(gram)


def gru(gram: Tensor, roles: Sequence[str]) -> Tensor:
    """GRU's rectified gradient: that of forgetting, without its component against what is to be kept.

    g_f − min(0, ⟨g_f, g_r⟩) / ‖g_r‖² · g_r, with g_f the sum of the gradients of the objectives to forget, and g_r that
    of all others. The step does not follow g_r itself, which only tells which direction of forgetting does no harm.
    Where a step serves no objective to forget, there is nothing to rectify, and it follows g_r. The paper can average
    g_r over steps, with weight γ for the newest; here γ = 1.

    >>> gru(torch.tensor([[1.0, -0.5], [-0.5, 2.0]]), ["forget", "retain"])
    tensor([1.0000, 0.2500])

    Reference: arXiv 2503.09117.
    """
    forget = torch.tensor([role == "forget" for role in roles])
    if not forget.any():
        return torch.ones_like(gram[0])
    weights = forget.to(gram)
    against, size = gram[forget][:, ~forget].sum(), gram[~forget][:, ~forget].sum()
    if size > 0:
        weights[~forget] = -(against / size).clamp(max=0)
    return weights


def upgrad(gram: Tensor, roles: Sequence[str]) -> Tensor:
    """UPGrad, by TorchJD: each gradient is projected so that no objective gets worse to first order; then the sum.

    TorchJD takes the mean. The sum is what the other rules give where nothing conflicts; with two objectives it is
    PCGrad's.

    The projection P is onto the cone {d: ⟨d, g_j⟩ ≥ 0 for all j}, which depends on the gradients' directions alone, and
    P(‖g_k‖ u) = ‖g_k‖ P(u) for ‖g_k‖ > 0. So the unit vectors u_k = g_k / ‖g_k‖ are projected, P(u_k) = Σ_j W_kj u_j,
    and w_j = Σ_k ‖g_k‖ W_kj / ‖g_j‖: what the solver adds to the diagonal then never outweighs a short gradient.

    >>> upgrad(torch.tensor([[1.0, -0.005], [-0.005, 0.0001]]), ["forget", "retain"])
    tensor([ 1.0050, 51.0000])

    Raises:
        UserError: TorchJD is not installed.

    Reference: arXiv 2406.16232.
    """
    with _torchjd("UPGrad"):
        from torchjd import linalg
    lengths = gram.diagonal().sqrt()
    lengths = lengths.where(lengths != 0, 1)  # a gradient of zeros has no direction, and conflicts with none
    cosines = gram / lengths.outer(lengths)
    if not cosines.isfinite().all():
        return torch.full_like(lengths, math.nan)  # as the step has to be
    # The solver needs a positive definite matrix, and parallel gradients give one that rounding may make indefinite.
    least = float(torch.linalg.eigvalsh(cosines)[0])
    project = linalg.QuadprogProjector(reg_eps=1e-8 + max(0.0, -least))
    weights: Tensor = lengths @ project(torch.eye(len(gram)).to(gram), cosines) / lengths
    return weights


@contextmanager
def _torchjd(method: str) -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise UserError(f"combine: {method} needs the package torchjd; install dualoptim[torchjd]") from None


RULES: dict[str, Rule] = {"PCGrad": pcgrad, "GRU": gru, "UPGrad": upgrad}


def check_roles(rule: Rule, turns: Iterable[Collection[str]]) -> None:
    """Refuse GRU where no step has both a loss to forget and one to keep.

    Args:
        rule: the rule.
        turns: the roles of the losses of each step.
    """
    if rule is gru and not any("forget" in roles and set(roles) != {"forget"} for roles in turns):
        raise UserError(
            "combine: GRU takes what harms the losses to keep out of the gradient of those to forget, and no step has "
            "losses of both roles; give one of each, or take another rule"
        )


def gramian(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """The inner products (K, K) of K gradients, each a sequence over the parameters; on the CPU, in fp64."""
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for i, one in enumerate(gradients):
        for j, other in enumerate(gradients[: i + 1]):
            # A model may lie on several devices; the numbers meet on the first one's.
            products = [_inner(a, b).to(one[0].device) for a, b in zip(one, other, strict=True)]
            gram[i, j] = gram[j, i] = torch.stack(products).double().sum().cpu()
    return gram


def _inner(a: Tensor, b: Tensor) -> Tensor:
    product = torch.linalg.vecdot(a.flatten().float(), b.flatten().float())
    return product.full_tensor() if isinstance(product, DTensor) else product


@torch.no_grad()
def combined(rule: Rule, gradients: Sequence[Sequence[Tensor]], roles: Sequence[str]) -> list[Tensor]:
    """Σ_k w_k g_k by a rule's weights, written into the first objective's gradients."""
    weights = rule(gramian(gradients), roles).tolist()
    into = list(gradients[0])
    torch._foreach_mul_(into, weights[0])
    for weight, gradient in zip(weights[1:], gradients[1:], strict=True):
        torch._foreach_add_(into, list(gradient), alpha=weight)
    return into
