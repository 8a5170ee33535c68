"""The update rule: the whole of the optimizer's mathematics, as one pure function.

DualOptim+ (arXiv 2605.21539) keeps one *base* Adam state, updated with the gradients of all objectives, and for each
objective o one *delta* Adam state, updated with the difference between its gradients and the base. This is one step of
objective o with gradient g, where t counts all steps of the parameter and t_o those of o, both including this step::

    m̂_B = m_B / (1 − β_B1^(t−1))                         the base before this step, bias-corrected (0 at t = 1)
    v̂_B = v_B / (1 − β_B2^(t−1))
    m_o ← β1 m_o + (1 − β1)(g − m̂_B)                     first-moment delta
    v_o ← β2 v_o + (1 − β2)(g² − v̂_B)                    second-moment delta: a difference, it may be negative
    m   = m_o / (1 − β1^t_o) + m̂_B
    v   = | v_o / (1 − β2^t_o) + v̂_B |
    v   ← max(v, f v̂_B)                                  the floor f: zero in 32 bits
    u   = m / (√v + ε)
    u   ← min(max(u, −c), c)                             the bound c (`max_update`); infinite for the published rule
    θ   ← θ (1 − lr λ) − lr u                            decoupled weight decay
    m_B ← β_B1 m_B + (1 − β_B1) w_o g                    the base comes last
    v_B ← β_B2 v_B + (1 − β_B2) w_o g²                   w_o (`base_weights`): 1 for the published rule

If objectives take different numbers of steps, w_o = 1 lets the objective with most steps dominate the base;
w_o = T / (K T_o) gives all K objectives the same weight in it, where T_o of the T steps are those of o.

Without a base (m̂_B = v̂_B = 0) this is AdamW with one state per objective: `DualOptim`, and AdamW itself when there is
one objective.

In 8 bits each of the two terms of v has an error of about a hundredth. So a sum below a thousandth of v̂_B is noise,
and an update divided by its root would be arbitrary: there f = 10⁻³. At an objective's first step v_o is not stored
yet, and f = 2⁻²⁰, the noise of fp32 (`docs/log.md` has the measurements).

The function is elementwise and calls only the few torch functions below, so that a backend may run it on tensors
(`backends.plain`), or trace it and write the same operations in another language (`backends.source`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOOR, FIRST_FLOOR = 1e-3, 2.0**-20  # f in 8 bits


class Moments(NamedTuple):
    """A first and a second moment, in fp32, or in fp64 for a parameter in fp64."""

    exp_avg: Any
    exp_avg_sq: Any


class Coefficients(NamedTuple):
    """The numbers of one parameter's step. They are computed in fp64 and rounded once to the step's precision."""

    weight1: Any  # 1 − β1
    beta2: Any  # β2
    weight2: Any  # 1 − β2
    correction1: Any  # 1 − β1^t_o
    correction2: Any  # 1 − β2^t_o
    base_weight1: Any  # 1 − β_B1
    base_beta2: Any  # β_B2
    base_weight2: Any  # w_o (1 − β_B2)
    base_correction1: Any  # 1 − β_B1^(t−1), or 1 at t = 1, where the base is zero
    base_correction2: Any  # 1 − β_B2^(t−1), or 1 at t = 1
    eps: Any  # ε
    floor: Any  # f
    bound: Any  # c
    lr: Any  # lr · lr_scales[o]
    decay: Any  # 1 − lr λ
    base_share: Any  # w_o


def update(
    param: Any, grad: Any, delta: Moments, base: Moments | None, c: Coefficients
) -> tuple[Any, Moments, Moments | None]:
    """One step of one objective: the new parameter, delta and base.

    Args:
        param: θ in fp32, or in fp64 for a parameter in fp64.
        grad: g in the same precision.
        delta: (m_o, v_o) of the objective that steps.
        base: (m_B, v_B), or None for separate states without a base.
        c: the step's coefficients.
    """
    # The order of the operations, and which of them round once (`lerp`, `addcmul` and `add` with alpha are fused
    # multiply-adds), are the published implementation's: where moments nearly cancel, others give other digits.
    if base is None:
        delta = Moments(
            torch.lerp(delta.exp_avg, grad, c.weight1),
            torch.addcmul(delta.exp_avg_sq * c.beta2, grad, grad, value=c.weight2),
        )
        mean, square = delta.exp_avg / c.correction1, delta.exp_avg_sq / c.correction2
    else:
        base_mean, base_square = base.exp_avg / c.base_correction1, base.exp_avg_sq / c.base_correction2
        delta = Moments(
            torch.lerp(delta.exp_avg, grad - base_mean, c.weight1),
            torch.add(delta.exp_avg_sq * c.beta2, grad * grad - base_square, alpha=c.weight2),
        )
        mean = base_mean + delta.exp_avg / c.correction1
        square = torch.abs(base_square + delta.exp_avg_sq / c.correction2)
        square = torch.maximum(square, base_square * c.floor)
        base = Moments(
            torch.lerp(base.exp_avg, grad * c.base_share, c.base_weight1),
            torch.addcmul(base.exp_avg_sq * c.base_beta2, grad, grad, value=c.base_weight2),
        )
    change = torch.clamp(mean / (torch.sqrt(square) + c.eps), -c.bound, c.bound)
    return torch.sub(param * c.decay, change, alpha=c.lr), delta, base


def coefficients(
    steps: Tensor,
    delta_steps: Tensor,
    quantised: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    base_betas: tuple[float, float] | None,
    eps: float,
    weight_decay: float,
    max_update: float | None,
    base_share: float = 1.0,
) -> Tensor:
    """The `Coefficients` of many parameters at once, from their counters, on the counters' device: (P, 16) fp64.

    Args:
        steps: (P,) t of each parameter, this step included.
        delta_steps: (P,) t_o of each, this step included.
        quantised: (P,) whether its base or delta is kept in 8 bits.
        lr: the objective's own learning rate, lr · lr_scales[o].
        betas: (β1, β2) of the deltas.
        base_betas: (β_B1, β_B2) of the base; None without one.
        eps: ε.
        weight_decay: λ.
        max_update: the bound c; None for none.
        base_share: w_o of the objective.
    """
    from .backends.tables import on_device  # here, as the backends import this module

    def row(numbers: tuple[Any, ...]) -> Tensor:  # plain numbers: a tensor may change and stay the same tensor
        return on_device(tuple(map(float, numbers)), torch.float64, steps.device)

    (beta1, beta2), (base1, base2) = betas, base_betas or (0.0, 0.0)
    own_lr = lr.detach().double() if isinstance(lr, Tensor) and lr.device == steps.device else None
    rate = float(lr) if own_lr is None else 0.0  # one on the device is not read from here, which would wait for it
    same = Coefficients(
        weight1=1 - beta1,
        beta2=beta2,
        weight2=1 - beta2,
        correction1=1.0,
        correction2=1.0,
        base_weight1=1 - base1,
        base_beta2=base2,
        base_weight2=base_share * (1 - base2),
        base_correction1=1.0,
        base_correction2=1.0,
        eps=eps,
        floor=0.0,
        bound=float("inf") if max_update is None else max_update,
        lr=rate,
        decay=1 - rate * weight_decay,
        base_share=base_share,
    )
    # A step of a small model takes as long as the host needs to ask for its operations, so there are few here.
    table = row(same).repeat(len(steps), 1)
    column = dict(zip(Coefficients._fields, table.unbind(1), strict=True))
    counts = torch.stack([delta_steps, delta_steps, steps - 1, steps - 1]).double()
    corrections = torch.where(counts > 0, 1 - row((beta1, beta2, base1, base2))[:, None] ** counts, 1.0)
    names = ("correction1", "correction2", "base_correction1", "base_correction2")
    torch._foreach_copy_([column[name] for name in names], list(corrections.unbind(0)))
    floor, first_floor = row((FLOOR, FIRST_FLOOR)).unbind()
    column["floor"].copy_(torch.where(delta_steps > 1, floor, first_floor) * quantised)
    if own_lr is not None:
        column["lr"].copy_(own_lr.squeeze())
        column["decay"].copy_((1 - own_lr * weight_decay).squeeze())
    return table
