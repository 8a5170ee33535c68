"""DualOptim+ written down a second time: fp64, one parameter, one line per equation, nothing shared with the package.

With `base_betas=None` it is DualOptim, with `max_update` the bounded rule. Beside the rule it keeps the sizes of what
the moments are differences of: where those nearly cancel, fp32 leaves few digits, and `interval` says how few.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

FP32_ULP = 2.0**-24


class NaiveDualOptim:
    def __init__(
        self,
        param: Tensor,
        *,
        lr: float,
        betas: tuple[float, float],
        base_betas: tuple[float, float] | None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lr_scales: Mapping[str, float] | None = None,
        max_update: float | None = None,
        base_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.param = param.detach().double().clone()
        self.lr, self.eps, self.weight_decay, self.max_update = lr, eps, weight_decay, max_update
        self.betas, self.base_betas, self.lr_scales = betas, base_betas, lr_scales or {}
        self.base_weights = base_weights or {}
        self.t = 0
        self.t_o: dict[str, int] = defaultdict(int)
        self.m_b, self.v_b, self.size_b = (torch.zeros_like(self.param) for _ in range(3))
        self.m_o, self.v_o, self.m_size_o, self.v_size_o = (
            defaultdict(lambda: torch.zeros_like(self.param)) for _ in range(4)
        )

    def step(self, grad: Tensor, objective: str, lr: float | None = None) -> None:
        g, o = grad.double(), objective
        self.lr_o = (self.lr if lr is None else lr) * self.lr_scales.get(o, 1.0)
        self.t += 1
        self.t_o[o] += 1
        beta1, beta2 = self.betas
        base1, base2 = self.base_betas or (0.0, 0.0)

        m_hat, v_hat, size_hat = (torch.zeros_like(g) for _ in range(3))
        if self.base_betas is not None and self.t > 1:
            m_hat = self.m_b / (1 - base1 ** (self.t - 1))
            v_hat = self.v_b / (1 - base2 ** (self.t - 1))
            size_hat = self.size_b / (1 - base1 ** (self.t - 1))

        self.m_o[o] = beta1 * self.m_o[o] + (1 - beta1) * (g - m_hat)
        self.v_o[o] = beta2 * self.v_o[o] + (1 - beta2) * (g**2 - v_hat)
        self.m = self.m_o[o] / (1 - beta1 ** self.t_o[o]) + m_hat
        self.v = (self.v_o[o] / (1 - beta2 ** self.t_o[o]) + v_hat).abs()
        self.decayed = self.param * (1 - self.lr_o * self.weight_decay)
        self.param = self.decayed - self.lr_o * self._update(self.m, self.v)
        w = self.base_weights.get(o, 1.0)
        self.m_b = base1 * self.m_b + (1 - base1) * w * g
        self.v_b = base2 * self.v_b + (1 - base2) * w * g**2

        # The same averages with every term taken by its size.
        self.m_size_o[o] = beta1 * self.m_size_o[o] + (1 - beta1) * (g.abs() + size_hat)
        self.v_size_o[o] = beta2 * self.v_size_o[o] + (1 - beta2) * (g**2 + v_hat)
        self.m_size = self.m_size_o[o] / (1 - beta1 ** self.t_o[o]) + size_hat
        self.v_size = self.v_size_o[o] / (1 - beta2 ** self.t_o[o]) + v_hat
        self.size_b = base1 * self.size_b + (1 - base1) * w * g.abs()

    def _update(self, m: Tensor, v: Tensor) -> Tensor:
        u = m / (v.sqrt() + self.eps)
        return u if self.max_update is None else u.clamp(-self.max_update, self.max_update)

    def interval(self) -> tuple[Tensor, Tensor]:
        """Between which values the last step may leave the parameter when the moments are kept in fp32.

        Each step adds a few roundings of the terms' size to a moment, never more than (4 + t) units in their last
        place: the constant is generous for the sums, and t is what a rounded β adds.
        """
        units = (4 + self.t) * FP32_ULP
        m_error, v_error = units * self.m_size, units * self.v_size
        v_low, v_high = (self.v - v_error).clamp(min=0), self.v + v_error
        corners = [
            self.decayed - self.lr_o * self._update(m, v)
            for m in (self.m - m_error, self.m + m_error)
            for v in (v_low, v_high)
        ]
        rounding = 4 * FP32_ULP * (self.decayed.abs() + (self.param - self.decayed).abs())
        return torch.stack(corners).amin(0) - rounding, torch.stack(corners).amax(0) + rounding
