"""Update rules that might be better than the published one, as one optimizer with switches, for `evidence.py` alone.

What earns its place by the evidence becomes an option of the package; the others stay here. For one objective o with
gradient g, t steps so far of which t_o of o, K objectives, hats for bias-corrected means::

    Ĝ_o = EMA_o[g]            o's own steps alone, as DualOptim keeps it
    B̂   = the base before this step, Ĉ_o = EMA_o[B̂]
    m   = Ĝ_o + γ (B̂ − Ĉ_o)                         γ = 1: DualOptim+; γ = 0: DualOptim
    B  ← β_B B + (1 − β_B) w_o g                     w_o = 1 as published, or t / (K t_o): objectives weigh alike

and v likewise with g², or one of `SECONDS`.
"""

from __future__ import annotations

from typing import Any

import torch

from dualoptim import DualOptimPlus

SECONDS = ("shared", "own", "mean", "max", "all")


class Variant(DualOptimPlus):
    """DualOptim+ with switches; plain and slow, fp32, one process.

    Args:
        weights: "steps": each step feeds the base alike, as published; "equal": each objective does.
        drift: γ.
        second: v is "shared" as published; "own": V̂_o alone; "mean" or "max": over the objectives' own; "all": one
            average of all gradients' squares.
    """

    def __init__(
        self, params: Any, *, weights: str = "steps", drift: float = 1.0, second: str = "shared", **kwargs: Any
    ) -> None:
        if weights not in ("steps", "equal") or second not in SECONDS:
            raise ValueError(f"weights {weights!r}, second {second!r}: unknown")
        self.weights, self.drift, self.second = weights, drift, second
        super().__init__(params, **kwargs)

    def _entries(self, objective: str) -> list[Any]:
        return []  # its states are others than the package's

    def _step(self, objective: str, ready: Any, finite: Any) -> None:
        for group in self.param_groups:
            own = [p for p in group["params"] if p.grad is not None]
            if own and finite:
                self._step_group(group, own, objective)

    def _step_group(self, group: dict[str, Any], params: list[torch.Tensor], o: str) -> None:
        (b1, b2), (c1, c2) = group["betas"], group["base_betas"]
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state["t"] = dict.fromkeys((None, *self.objectives), 0)
                names = ["B1", "B2", *(f"{kind}{i}{name}" for name in self.objectives for kind in "GC" for i in "12")]
                state["m"] = {name: torch.zeros_like(p) for name in names}
        for state in states:
            state["t"][None] += 1
            state["t"][o] += 1
        t, t_o = states[0]["t"][None], states[0]["t"][o]
        grads = [p.grad for p in params]
        assert all(g is not None for g in grads)
        squares = torch._foreach_mul(grads, grads)

        def held(name: str) -> list[torch.Tensor]:
            return [state["m"][name] for state in states]

        def fed(name: str, values: list[torch.Tensor], beta: float) -> None:
            torch._foreach_lerp_(held(name), values, 1 - beta)

        def hat(name: str, beta: float, count: int) -> list[torch.Tensor]:
            return torch._foreach_div(held(name), 1 - beta**count if count else 1.0)

        base = hat("B1", c1, t - 1), hat("B2", c2, t - 1)
        for i, values, beta in ((1, grads, b1), (2, squares, b2)):
            fed(f"G{i}{o}", values, beta)
            fed(f"C{i}{o}", base[i - 1], beta)
        m = hat(f"G1{o}", b1, t_o)
        drifted = torch._foreach_sub(base[0], hat(f"C1{o}", b1, t_o))
        torch._foreach_add_(m, drifted, alpha=self.drift)
        v = self._second(states[0]["t"], hat, base[1], o, (b2, c2))
        torch._foreach_sqrt_(v)
        torch._foreach_add_(v, group["eps"])
        update = torch._foreach_div(m, v)
        if group["max_update"] is not None:
            torch._foreach_clamp_max_(update, group["max_update"])
            torch._foreach_clamp_min_(update, -group["max_update"])
        lr = group["lr"] * group["lr_scales"].get(o, 1.0)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, update, alpha=-lr)
        w = t / (len(self.objectives) * t_o) if self.weights == "equal" else 1.0
        for name, values, beta in (("B1", grads, c1), ("B2", squares, c2)):
            fed(name, values if w == 1.0 else torch._foreach_mul(values, w), beta)

    def _second(
        self, counts: dict[Any, int], hat: Any, base: list[torch.Tensor], o: str, betas: tuple[float, float]
    ) -> list[torch.Tensor]:
        own: list[torch.Tensor] = hat(f"G2{o}", betas[0], counts[o])
        if self.second == "own":
            return own
        if self.second == "all":
            return base if counts[None] > 1 else own
        if self.second == "shared":
            drifted = torch._foreach_sub(base, hat(f"C2{o}", betas[0], counts[o]))
            torch._foreach_add_(own, drifted, alpha=self.drift)
            return list(torch._foreach_abs(own))
        every = [hat(f"G2{name}", betas[0], counts[name]) for name in self.objectives if counts[name]]
        if self.second == "max":
            for other in every:
                torch._foreach_maximum_(own, other)
            return own
        mean = [torch.zeros_like(v) for v in own]
        for other in every:
            torch._foreach_add_(mean, other)
        torch._foreach_div_(mean, len(every))
        return mean
