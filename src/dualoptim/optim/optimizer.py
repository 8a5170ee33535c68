"""`DualOptimPlus` and `DualOptim`: parameter groups, counters, the step and the state dict around `rule.update_`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .rule import Moments, update_
from .validation import check_group_keys, check_hyperparameters, check_loadable, checked_objectives, listed

# Elements updated at a time: on a CPU a slice of this many stays in the cache through the rule's twenty-odd passes,
# which makes the plain step several times faster; elsewhere it only bounds the temporaries (three of 16 MiB).
CPU_CHUNK = 2**19
DEVICE_CHUNK = 2**22


class DualOptimPlus(Optimizer):
    r"""DualOptim+: AdamW for training on several objectives by turns, with what they share kept apart from what not.

    One *base* Adam state per parameter is fed by every objective's gradients; each objective has a *delta* Adam state
    for what is left over. The update of objective o is, with both corrected for their bias,

    .. math:: θ ← θ (1 − lr_o λ) − lr_o \frac{m_o + m_B}{\sqrt{|v_o + v_B|} + ε}, \qquad lr_o = lr · lr\_scales[o]

    and the whole rule stands in :mod:`dualoptim.optim.rule`. Moments are kept in fp32 whatever the parameter's
    precision: 8 bytes per parameter for the base and 8 for each objective that has stepped.

    Args:
        params: parameters or parameter groups, as for any torch optimizer; every hyperparameter may differ by group.
        lr: learning rate, a float or a 0-dim tensor. Default 1e-5, the paper's for Phi-1.5 on TOFU.
        betas: (β1, β2), decay of the deltas. Default (0.9, 0.95), the paper's.
        base_betas: (β_B1, β_B2), decay of the base; default (0.9, 0.95), the paper's. None turns the base off: then
            every objective has an AdamW state of its own.
        eps: ε, added to the root of the second moment. Default 1e-8, Adam's.
        weight_decay: λ, decoupled. Default 0.01, the paper's.
        objectives: the names of the objectives, any number of them.
        lr_scales: a factor on the learning rate for each objective named; 1 for the others.
        base_bits: bits in which the base's moments are kept: 32.
        delta_bits: bits in which the deltas' moments are kept: 32.
        max_update: bound on \|m / (√v + ε)\|, the update before the learning rate. Default 1.0: v is a difference of
            two averages that may cancel, and unbounded updates of thousands of learning rates were measured. None is
            the published rule.

    Raises:
        ValueError: an argument out of its range, an objective that is not known, a step without an objective, a sparse
            gradient, or a state dict with objectives that this optimizer does not have.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> opt = DualOptimPlus([weight], lr=0.1, objectives=("forget", "retain"))
        >>> (-weight.sum()).backward()
        >>> opt.step(objective="forget"); opt.zero_grad()
        >>> (weight**2).sum().backward()
        >>> opt.objective = "retain"  # the same choice, for callers that cannot pass arguments to step()
        >>> opt.step(); opt.zero_grad()

    References:
        DualOptim+, arXiv 2605.21539 (ICML 2026); AdamW, arXiv 1711.05101.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        base_betas: tuple[float, float] | None = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        objectives: Iterable[str] = ("forget", "retain"),
        lr_scales: Mapping[str, float] | None = None,
        base_bits: int = 32,
        delta_bits: int = 32,
        max_update: float | None = 1.0,
    ) -> None:
        self.objectives = checked_objectives(objectives)
        self._objective: str | None = None
        for name, bits in (("base_bits", base_bits), ("delta_bits", delta_bits)):
            if bits != 32:
                raise ValueError(f"{name} must be 32, the only precision of this version, but is {bits!r}")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "base_betas": base_betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "lr_scales": lr_scales or {},
                "max_update": max_update,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, its keys and hyperparameters checked as the constructor's arguments are."""
        check_group_keys(param_group)
        # A dict of its own for each group, or a change to one would be a change to all.
        check_hyperparameters({**self.defaults, **param_group}, self.objectives)
        param_group["lr_scales"] = dict(param_group.get("lr_scales", self.defaults["lr_scales"]))
        super().add_param_group(param_group)
        if any(param.is_complex() for param in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise ValueError("a parameter is complex, which is not supported; optimise torch.view_as_real(parameter)")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "objectives": self.objectives, "_objective": self._objective}

    @property
    def objective(self) -> str | None:
        """The objective of the next `step()`; it stays until it is set again. None: not chosen yet."""
        return self._objective

    @objective.setter
    def objective(self, name: str | None) -> None:
        self._objective = None if name is None else self._known(name)

    def _known(self, name: str) -> str:
        if name not in self.objectives:
            close = difflib.get_close_matches(str(name), self.objectives, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown objective {name!r}: this optimizer has {listed(self.objectives)}{hint}")
        return name

    @overload
    def step(self, closure: None = None, *, objective: str | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, objective: str | None = None) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, objective: str | None = None) -> float | None:
        """Update every parameter that has a gradient, as a step of one objective.

        Args:
            closure: re-evaluates the model and returns the loss.
            objective: whose gradients these are, for this step alone; without it, the property `objective` says.

        Raises:
            ValueError: no objective chosen, or an unknown one.
        """
        chosen = self._objective if objective is None else self._known(objective)
        if chosen is None:
            raise ValueError(
                "whose step is it? Pass step(objective=…) or set .objective first; "
                f"this optimizer has {listed(self.objectives)}"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # all before any is updated, or an error would leave a step half taken
            if any(param.grad is not None and param.grad.is_sparse for param in group["params"]):
                raise ValueError("a gradient is sparse, which is not supported; use embeddings with sparse=False")
        for group in self.param_groups:
            lr = group["lr"] * group["lr_scales"].get(chosen, 1.0)
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, chosen, lr, group)
        return loss

    def _update(self, param: Tensor, objective: str, lr: float | Tensor, group: dict[str, Any]) -> None:
        grad = param.grad
        assert grad is not None
        state = self._state_of(param, objective, with_base=group["base_betas"] is not None)
        state["step"] += 1
        state["delta_step"][objective] += 1
        tensors = [param, grad, state["delta_exp_avg"][objective], state["delta_exp_avg_sq"][objective]]
        if group["base_betas"] is not None:
            tensors += [state["base_exp_avg"], state["base_exp_avg_sq"]]
        for theta, g, *moments in _chunks(tensors):
            update_(
                theta,
                g.float(),
                Moments(*moments[:2]),
                Moments(*moments[2:]) if len(moments) > 2 else None,
                step=state["step"],
                delta_step=state["delta_step"][objective],
                lr=lr,
                betas=group["betas"],
                base_betas=group["base_betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                max_update=group["max_update"],
            )

    def _state_of(self, param: Tensor, objective: str, with_base: bool) -> dict[str, Any]:
        """The parameter's state, with what a step of this objective needs made on its first use."""

        def zeros() -> Tensor:
            return torch.zeros_like(param, dtype=torch.float32, memory_format=torch.preserve_format)

        state = self.state[param]
        if not state:
            state["step"] = 0
            state.update({"delta_step": {}, "delta_exp_avg": {}, "delta_exp_avg_sq": {}})
        if with_base and "base_exp_avg" not in state:
            state["base_exp_avg"], state["base_exp_avg_sq"] = zeros(), zeros()
        if objective not in state["delta_step"]:
            state["delta_step"][objective] = 0
            state["delta_exp_avg"][objective], state["delta_exp_avg_sq"][objective] = zeros(), zeros()
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave, bit for bit: moments stay fp32 also where parameters are bf16 or fp16.

        Raises:
            ValueError: states of another optimizer, of parameters of other shapes, or of objectives that this one does
                not have.
        """
        check_loadable(state_dict, self.param_groups, self.objectives)
        super().load_state_dict(state_dict)
        # torch casts floating-point state to the parameter's dtype on load, which would round fp32 moments to bf16.
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(indices, params, strict=True):
            if index in state_dict["state"]:
                self.state[param] = _copied(state_dict["state"][index], param.device)

    def __repr__(self) -> str:
        return super().__repr__().replace(" (", f" (\nobjectives: {', '.join(self.objectives)}", 1)


class DualOptim(DualOptimPlus):
    """DualOptim: one AdamW state per objective and no base, the predecessor of `DualOptimPlus`.

    The arguments are those of `DualOptimPlus` less the base's. Defaults: betas (0.9, 0.999) as published, and no bound
    on the update, whose second moment is an average of squares here and cannot cancel.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> opt = DualOptim([weight], lr=0.1)
        >>> weight.sum().backward()
        >>> opt.step(objective="retain")

    References:
        DualOptim, arXiv 2504.15827.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        objectives: Iterable[str] = ("forget", "retain"),
        lr_scales: Mapping[str, float] | None = None,
        delta_bits: int = 32,
        max_update: float | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            None,
            eps,
            weight_decay,
            objectives=objectives,
            lr_scales=lr_scales,
            delta_bits=delta_bits,
            max_update=max_update,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; it has no base either."""
        if param_group.get("base_betas") is not None:
            raise ValueError("a parameter group sets 'base_betas', but DualOptim has no base; use DualOptimPlus")
        super().add_param_group(param_group)


def _chunks(tensors: list[Tensor]) -> Iterable[tuple[Tensor, ...]]:
    """Slices of tensors of one shape that lie alike in memory; the tensors whole, where some do not."""
    if all(tensor.is_contiguous() for tensor in tensors):
        size = CPU_CHUNK if tensors[0].device.type == "cpu" else DEVICE_CHUNK
        return zip(*(torch.split(tensor.view(-1), size) for tensor in tensors), strict=True)
    return [tuple(tensors)]


def _copied(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().to(device)
    if isinstance(value, dict):
        return {key: _copied(item, device) for key, item in value.items()}
    return value
