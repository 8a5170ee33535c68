"""Sharpness-aware minimization (SAM): a gradient is taken at the nearby weights where the loss is highest.

    w⁺ = w + ρ g / ‖g‖,  g = ∇L(w);    the step from w is taken along ∇L(w⁺)

So a loss is lowered for all weights near w, not only at w; what was forgotten is then harder to learn again.

Reference: arXiv 2010.01412; to forget, arXiv 2502.05374.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Worst = list[tuple[nn.Parameter, Tensor]]  # parameters, and the values that replace theirs


@torch.no_grad()
def worst_nearby(parameters: Sequence[nn.Parameter], rho: float) -> Worst:
    """w + ρ g / ‖g‖ of parameters, in the memory of their gradients: they have no gradients afterwards.

    ‖g‖ is over all parameters. If it is zero or not finite, there are no such weights, and the result is empty.

    Args:
        parameters: those that are trained; one without a gradient stays where it is.
        rho: ρ > 0, the distance.

    >>> weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> weight.grad = torch.tensor([3.0, -4.0])
    >>> worst_nearby([weight], rho=0.5)[0][1]
    tensor([1.3000, 1.6000])
    """
    found = [(p, p.grad) for p in parameters if p.grad is not None]
    for p, _ in found:
        p.grad = None
    norms = [g.float().norm().to(found[0][1].device) for _, g in found]  # a model may lie on several devices
    norm = float(torch.stack(norms).norm()) if found else 0.0
    if not 0 < norm < float("inf"):
        return []
    for p, g in found:
        g.mul_(rho / norm).add_(p)
    return found


@contextmanager
def standing_at(worst: Worst) -> Iterator[None]:
    """A context in which parameters have the values that replace theirs; afterwards their own, to the bit."""
    _swap(worst)
    try:
        yield
    finally:
        _swap(worst)


@torch.no_grad()
def _swap(worst: Worst) -> None:
    for p, other in worst:
        kept = p.clone()
        p.copy_(other)
        other.copy_(kept)
