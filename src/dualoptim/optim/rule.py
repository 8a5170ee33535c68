"""The update rule: the whole of the optimizer's mathematics, as one function of tensors and numbers.

DualOptim+ (arXiv 2605.21539) keeps one *base* Adam state that every objective's gradients feed and, for each
objective o, one *delta* Adam state for what the base leaves over. One step of objective o with gradient g, where t
counts all steps of the parameter and t_o those of o, both already raised::

    θ   ← θ (1 − lr λ)                                   decoupled weight decay
    m̂_B = m_B / (1 − β_B1^(t−1))                         the base before this step, bias-corrected (0 at t = 1)
    v̂_B = v_B / (1 − β_B2^(t−1))
    m_o ← β1 m_o + (1 − β1)(g − m̂_B)                     first-moment delta
    v_o ← β2 v_o + (1 − β2)(g² − v̂_B)                    second-moment delta: a difference, it may be negative
    m   = m_o / (1 − β1^t_o) + m̂_B
    v   = | v_o / (1 − β2^t_o) + v̂_B |
    u   = m / (√v + ε)
    u   ← min(max(u, −c), c)                             only with a bound c (`max_update`)
    θ   ← θ − lr u
    m_B ← β_B1 m_B + (1 − β_B1) g                        the base comes last
    v_B ← β_B2 v_B + (1 − β_B2) g²

Without a base (m̂_B = v̂_B = 0) this is AdamW with one state per objective: `DualOptim`, and AdamW itself when there is
one objective.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Moments(NamedTuple):
    """A first and a second moment, in fp32, of the parameter's shape."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


def update_(
    param: Tensor,
    grad: Tensor,
    delta: Moments,
    base: Moments | None,
    *,
    step: int,
    delta_step: int,
    lr: float | Tensor,
    betas: tuple[float, float],
    base_betas: tuple[float, float] | None,
    eps: float,
    weight_decay: float,
    max_update: float | None,
) -> None:
    """One step of one objective, in place on `param`, `delta` and `base`; a function of its arguments alone.

    It works elementwise, so any slices of the tensors that belong together may be updated by themselves, and it
    allocates three temporaries of the slice's size, four where the parameter is bf16 or fp16.

    Args:
        param: θ, any shape, floating point of any precision; the update is computed in fp32.
        grad: g, fp32, of the parameter's shape.
        delta: (m_o, v_o) of the objective that steps.
        base: (m_B, v_B), or None for separate states without a base.
        step: t ≥ 1, this step included.
        delta_step: t_o ≥ 1, this step included.
        lr: the objective's own learning rate, lr · lr_scales[o].
        betas: (β1, β2) of the deltas.
        base_betas: (β_B1, β_B2) of the base; None without one.
        eps: ε.
        weight_decay: λ.
        max_update: the bound c on |u|; None for the published rule.
    """
    beta1, beta2 = betas
    # As 0-dim tensors they let addcdiv_ divide and add in one pass. Where the moments nearly cancel, another order of
    # the same sums leaves other digits: this one is the published implementation's.
    correction1, correction2 = grad.new_tensor(1 - beta1**delta_step), grad.new_tensor(1 - beta2**delta_step)
    if base is None:
        delta.exp_avg.lerp_(grad, 1 - beta1)
        delta.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        change = delta.exp_avg / correction1
        denominator = delta.exp_avg_sq / correction2
    else:
        assert base_betas is not None
        base_beta1, base_beta2 = base_betas
        # At t = 1 the base is zero, and its correction would be 0 / 0.
        change = base.exp_avg / (1 - base_beta1 ** (step - 1) if step > 1 else 1.0)
        denominator = base.exp_avg_sq / (1 - base_beta2 ** (step - 1) if step > 1 else 1.0)
        delta.exp_avg.lerp_(grad - change, 1 - beta1)
        delta.exp_avg_sq.mul_(beta2).add_((grad * grad).sub_(denominator), alpha=1 - beta2)
        change.addcdiv_(delta.exp_avg, correction1)
        denominator.addcdiv_(delta.exp_avg_sq, correction2).abs_()
        base.exp_avg.lerp_(grad, 1 - base_beta1)
        base.exp_avg_sq.mul_(base_beta2).addcmul_(grad, grad, value=1 - base_beta2)
    change.div_(denominator.sqrt_().add_(eps))
    if max_update is not None:
        change.clamp_(-max_update, max_update)
    decay = 1 - lr * weight_decay
    if param.element_size() < 4:  # bf16 and fp16: one rounding, not one for the decay and one for the update
        param.copy_(param.float().mul_(decay).sub_(change.mul_(lr)))
    elif isinstance(lr, Tensor):
        param.mul_(decay).sub_(change.mul_(lr))
    else:
        param.mul_(decay).sub_(change, alpha=lr)
