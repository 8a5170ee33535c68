"""`DualOptimPlus` and `DualOptim`: parameter groups, counters, the step and the state dict around `rule.update`."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from . import backends, state
from .backends import Item
from .backends.plain import hashed
from .backends.tables import on_device
from .rule import Moments, coefficients
from .state import Stored, code_of, local
from .validation import (
    KEPT_ON_LOAD,
    check_group_keys,
    check_hyperparameters,
    check_loadable,
    checked_backend,
    checked_objectives,
    listed,
)

logger = logging.getLogger(__name__)
DELTA, BASE = ("delta_exp_avg", "delta_exp_avg_sq"), ("base_exp_avg", "base_exp_avg_sq")


class DualOptimPlus(Optimizer):
    r"""DualOptim+: AdamW for training on several objectives by turns, with what they share kept apart from what not.

    One *base* Adam state per parameter is fed by every objective's gradients; each objective has a *delta* Adam state
    for what is left over. The update of objective o is, with both corrected for their bias,

    .. math:: θ ← θ (1 − lr_o λ) − lr_o \frac{m_o + m_B}{\sqrt{|v_o + v_B|} + ε}, \qquad lr_o = lr · lr\_scales[o]

    and the whole rule stands in :mod:`dualoptim.optim.rule`. Base and deltas are kept in fp32 whatever the parameter's
    precision, 8 bytes per parameter each, or in 8 bits, 2.03 bytes per parameter each; a delta exists from its
    objective's first step on. `estimate_state_memory` tells beforehand.

    A step with a gradient that is not finite, or whose square is not, is skipped as a whole: no parameter, state or
    counter changes, `num_skipped` counts it. Under `torch.distributed` all ranks skip together, so every rank of the
    default group has to take every step. On a GPU nothing of this waits for the host.

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
        base_bits: bits in which the base's moments are kept: 32, or 8 with one fp32 scale for 256 elements.
        delta_bits: the same for the deltas' moments.
        max_update: bound on \|m / (√v + ε)\|, the update before the learning rate. Default 1.0: v is a difference of
            two averages that may cancel, and unbounded updates of thousands of learning rates were measured. None is
            the published rule.
        min_8bit_size: parameters of fewer elements stay in 32 bits (of the whole parameter, where it is distributed).
            Default 4096, the published implementation's. Embeddings are better kept in 32 bits too, as
            `parameter_groups(model)` does.
        stochastic_rounding: round bf16 parameters up or down by chance, so that updates below their precision count
            in the mean; at lr 1e-5 a bf16 weight of 0.02 would never move. False: round to the nearest.
        seed: of that chance. The same seed gives the same run, whatever was drawn elsewhere.
        backend: how the rule is executed, "plain", "compiled" or "gpu" (`dualoptim.optim.backends`). None chooses the
            fastest that runs on the parameters' device.

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
        min_8bit_size: int = 4096,
        stochastic_rounding: bool = True,
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        self.objectives = checked_objectives(objectives)
        self.backend = checked_backend(backend)
        self.seed = int(seed)
        self._objective: str | None = None
        self._skipped: dict[str, Tensor] = {}
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
                "base_bits": base_bits,
                "delta_bits": delta_bits,
                "min_8bit_size": min_8bit_size,
                "stochastic_rounding": stochastic_rounding,
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
        own = ("objectives", "backend", "seed", "_objective", "_skipped")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def add_objective(self, name: str) -> None:
        """Add an objective; its delta starts at its first step, from the base as it is then.

        Raises:
            ValueError: it is there already, or is no name.
        """
        self.objectives = checked_objectives((*self.objectives, name))

    @property
    def num_skipped(self) -> dict[str, int]:
        """How many steps of each objective were skipped because a gradient was not finite. Waits for a GPU."""
        return {name: int(self._skipped[name]) if name in self._skipped else 0 for name in self.objectives}

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
        stepping: dict[torch.device, list[tuple[int, Tensor, dict[str, Any]]]] = {}
        index = 0
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    if param.grad.is_sparse:  # found before any is updated, or a step would be left half taken
                        raise ValueError(
                            "a gradient is sparse, which is not supported; use embeddings with sparse=False"
                        )
                    stepping.setdefault(param.device, []).append((index, param, group))
                index += 1
        finite = self._all_finite(stepping)
        if isinstance(finite, Tensor):  # decided on a GPU, which goes on without the host and leaves all as it is
            skipped = self._skipped.get(chosen)
            skipped = torch.zeros((), dtype=torch.int64, device=finite.device) if skipped is None else skipped
            self._skipped[chosen] = skipped.to(finite.device).add_(~finite)
        elif not finite:
            self._skipped[chosen] = self._skipped.get(chosen, torch.zeros((), dtype=torch.int64)) + 1
            logger.warning(
                "step of %r skipped: a gradient is not finite (%d skipped so far)", chosen, self._skipped[chosen]
            )
            return loss
        for device, entries in stepping.items():
            self._step_on(device, entries, chosen, finite if isinstance(finite, Tensor) else None)
        return loss

    def _all_finite(self, stepping: Mapping[torch.device, list[tuple[int, Tensor, dict[str, Any]]]]) -> bool | Tensor:
        """Whether every gradient of every rank is finite, and its square too; a tensor where that is known on GPUs."""
        found = [
            backends.choose(device.type, self.backend).finite([local(param.grad) for _, param, _ in entries])
            for device, entries in stepping.items()
        ]
        device = next(iter(stepping), torch.device("cpu"))
        finite: bool | Tensor
        if found and all(isinstance(answer, Tensor) for answer in found):
            finite = torch.stack([answer.to(device, non_blocking=True) for answer in found]).all()
        else:
            finite = all(map(bool, found))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            there = isinstance(finite, Tensor)
            flag = torch.as_tensor(finite, device=device).to(torch.int32)
            dist.all_reduce(flag, dist.ReduceOp.MIN)
            finite = flag.bool() if there else bool(flag)
        return finite

    def _step_on(
        self,
        device: torch.device,
        entries: list[tuple[int, Tensor, dict[str, Any]]],
        objective: str,
        proceed: Tensor | None,
    ) -> None:
        """Update the parameters on one device; with `proceed`, where that is true, which the host does not ask."""
        if proceed is not None:
            proceed = proceed.to(device, non_blocking=True)
        states = [self._state_of(param, objective, group) for _, param, group in entries]
        steps, delta_steps = [s["step"] for s in states], [s["delta_step"][objective] for s in states]
        torch._foreach_add_([*steps, *delta_steps], 1 if proceed is None else proceed.long())
        t, t_o = torch.stack(steps), torch.stack(delta_steps)
        quantised = on_device(
            tuple(
                8 in (bits_of(param, group, "base_bits"), bits_of(param, group, "delta_bits"))
                for _, param, group in entries
            ),
            torch.bool,
            t.device,
        )
        rows, first = [], 0
        for group in self.param_groups:  # entries stand in their groups' order
            last = first + sum(entry[2] is group for entry in entries)
            if last > first:
                settings = {key: group[key] for key in ("betas", "base_betas", "eps", "weight_decay", "max_update")}
                lr = group["lr"] * group["lr_scales"].get(objective, 1.0)
                own = slice(first, last)
                rows.append(coefficients(t[own], t_o[own], quantised[own], lr=lr, **settings))
            first = last
        by_chance = on_device(
            tuple(group["stochastic_rounding"] and param.dtype == torch.bfloat16 for _, param, group in entries),
            torch.bool,
            t.device,
        )
        places = on_device(tuple(index for index, _, _ in entries), torch.int64, t.device)
        seeds = torch.where(by_chance, hashed(hashed(hashed(t + self.seed) + places)), -1)

        items, copies = [], []
        for (_, param, _), own_state in zip(entries, states, strict=True):
            theta, grad = local(param).detach(), local(param.grad)
            if not is_dense(theta):  # a view with gaps: stepped as a dense copy
                copies.append((theta, theta := theta.contiguous()))
            if grad.stride() != theta.stride():
                grad = torch.empty_like(theta, dtype=grad.dtype).copy_(grad)
            delta = Moments(*(local(own_state[name][objective]) for name in DELTA))
            base = Moments(*(local(own_state[name]) for name in BASE)) if "base_exp_avg" in own_state else None
            items.append(Item(theta, grad, delta, base))
        backend, decided = backends.choose(device.type, self.backend), () if proceed is None else (proceed,)
        backend.step(items, torch.cat(rows), seeds, *decided)
        for original, stepped in copies:
            original.copy_(stepped)

    def _state_of(self, param: Tensor, objective: str, group: dict[str, Any]) -> dict[str, Any]:
        """The parameter's state, with what a step of this objective needs made on its first use."""
        own = self.state[param]
        if not own:
            own["step"] = counter(param)
            own.update({"delta_step": {}, "delta_exp_avg": {}, "delta_exp_avg_sq": {}})
        if group["base_betas"] is not None and "base_exp_avg" not in own:
            for name in BASE:
                own[name] = state.zeros(param, bits_of(param, group, "base_bits"), code_of(name, with_base=True))
        if objective not in own["delta_step"]:
            own["delta_step"][objective] = counter(param)
            for name in DELTA:
                code = code_of(name, with_base=group["base_betas"] is not None)
                own[name][objective] = state.zeros(param, bits_of(param, group, "delta_bits"), code)
        return own

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave, bit for bit: moments stay fp32 also where parameters are bf16 or fp16.

        Raises:
            ValueError: states of another optimizer, of parameters of other shapes, or of objectives that this one does
                not have.
        """
        check_loadable(state_dict, self.param_groups, self.objectives)
        kept = [{key: group[key] for key in KEPT_ON_LOAD} for group in self.param_groups]
        # Without the states, which torch would cast to the parameters' precision: fp32 moments and counters to bf16.
        super().load_state_dict({**state_dict, "state": {}})
        converted = 0
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [(param, group) for group in self.param_groups for param in group["params"]]
        for group, settings in zip(self.param_groups, kept, strict=True):
            group.update(settings)
        for index, (param, group) in zip(saved, own, strict=True):
            if index in state_dict["state"]:
                self.state[param], changed = _loaded(state_dict["state"][index], param, group)
                converted += changed
        if converted:
            warnings.warn(
                f"the state dict holds moments in other precisions: {converted} were converted to this optimizer's "
                "base_bits and delta_bits",
                stacklevel=2,
            )

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
        min_8bit_size: int = 4096,
        stochastic_rounding: bool = True,
        seed: int = 0,
        backend: str | None = None,
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
            min_8bit_size=min_8bit_size,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            backend=backend,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; it has no base either."""
        if param_group.get("base_betas") is not None:
            raise ValueError("a parameter group sets 'base_betas', but DualOptim has no base; use DualOptimPlus")
        super().add_param_group(param_group)


def counter(param: Tensor) -> Tensor:
    """A count of steps. On a GPU it stays there, so that no step waits for the host; elsewhere on the CPU."""
    return torch.zeros((), dtype=torch.int64, device=param.device if param.device.type == "cuda" else "cpu")


def bits_of(param: Tensor, group: Mapping[str, Any], name: str) -> int:
    """In how many bits a parameter's moments are kept, `name` being base_bits or delta_bits."""
    return 32 if param.numel() < group["min_8bit_size"] else group[name]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements lie in memory without gaps or overlaps, in any order of the dimensions."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _loaded(saved: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """A parameter's saved state in this optimizer's precision, as a copy, and how many moments changed theirs."""
    changed = 0

    def count(value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=torch.int64).to(counter(param).device, copy=True)

    def moment(stored: Stored, name: str) -> Stored:
        nonlocal changed
        bits = bits_of(param, group, "base_bits" if name.startswith("base") else "delta_bits")
        changed += state.bits_of(stored) != bits
        if isinstance(stored, dict):
            copied: Stored = {key: value.to(param.device, copy=True) for key, value in stored.items()}
        else:
            copied = stored.to(param.device, torch.float32, copy=True)
        return state.converted(copied, param, bits, code_of(name, with_base=group["base_betas"] is not None))

    own: dict[str, Any] = {"step": count(saved["step"])}
    own["delta_step"] = {name: count(value) for name, value in saved["delta_step"].items()}
    for name in DELTA:
        own[name] = {objective: moment(stored, name) for objective, stored in saved[name].items()}
    for name in BASE:
        if name in saved:
            own[name] = moment(saved[name], name)
    return own, changed


def parameter_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """A model's trainable parameters in groups: no weight decay on biases and norms, embeddings in 32 bits.

    Args:
        model: any module.
        weight_decay: λ of the matrices.
    """
    embeddings = {
        id(param) for module in model.modules() if isinstance(module, nn.Embedding) for param in module.parameters()
    }
    kinds: dict[str, list[nn.Parameter]] = {"matrices": [], "embeddings": [], "vectors": []}
    for param in model.parameters():
        if param.requires_grad:
            kind = "embeddings" if id(param) in embeddings else "matrices" if param.ndim > 1 else "vectors"
            kinds[kind].append(param)
    settings = {
        "matrices": {"weight_decay": weight_decay},
        "embeddings": {"weight_decay": weight_decay, "base_bits": 32, "delta_bits": 32},
        "vectors": {"weight_decay": 0.0},
    }
    return [{"params": params, "name": kind, **settings[kind]} for kind, params in kinds.items() if params]


def estimate_state_memory(
    model: nn.Module | ParamsT, cls: type[DualOptimPlus] = DualOptimPlus, **arguments: Any
) -> int:
    """Bytes that an optimizer's state will take once every objective has stepped, without allocating any.

    Args:
        model: a module, taken by its `parameter_groups`, or what an optimizer takes as its `params`.
        cls: `DualOptimPlus` or `DualOptim`.
        **arguments: the optimizer's own: objectives, base_bits, delta_bits, …

    Example:
        >>> layer = torch.nn.Linear(512, 512, bias=False)
        >>> estimate_state_memory(layer) / layer.weight.numel()  # fp32: base and two deltas, two moments each
        24.000...
        >>> estimate_state_memory(layer, base_bits=8, delta_bits=8) / layer.weight.numel()
        6.0938...
    """
    optimizer = cls(parameter_groups(model) if isinstance(model, nn.Module) else model, **arguments)
    total = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            n, deltas = param.numel(), len(optimizer.objectives)
            total += 2 * deltas * state.nbytes(n, bits_of(param, group, "delta_bits"))
            if group["base_betas"] is not None:
                total += 2 * state.nbytes(n, bits_of(param, group, "base_bits"))
            total += (1 + deltas) * counter(param).element_size()
    return total
