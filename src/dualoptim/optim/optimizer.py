"""`DualOptimPlus` and `DualOptim`: parameter groups, counters, the step and the state dict around `rule.update`."""

from __future__ import annotations

import copy
import difflib
import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, ParamsT

from . import backends, state
from .backends import Item
from .backends.plain import hashed
from .backends.tables import on_device
from .loading import Loaded, prepared
from .memory import Candidate, Entry, Keys, entries, keys_of, overlapping
from .parts import WHOLE, is_copied, place_of
from .ranks import Verdict, agreed, all_probed, members, several
from .rule import Moments, coefficients
from .state import (
    BASE,
    CODES,
    DELTA,
    DELTA_STEP,
    STEP,
    bits_of,
    bits_unless_split,
    code_of,
    counter,
    has_values,
    kept,
    local,
    of,
)
from .validation import (
    BY_OBJECTIVE,
    check_factors,
    check_group,
    check_without_base,
    checked_backend,
    checked_objectives,
    checked_seed,
    checked_settings,
    listed,
)

logger = logging.getLogger(__name__)


class DualOptimPlus(Optimizer):
    r"""DualOptim+: AdamW for alternating training on several objectives, with a shared state and one per objective.

    Each parameter has one *base* Adam state, updated with the gradients of all objectives, and for each objective a
    *delta* Adam state, updated with the difference between its gradients and the base. With both bias-corrected, and
    lr_o = lr · lr_scales[o], the update of objective o is

        θ ← θ (1 − lr_o λ) − lr_o (m_o + m_B) / (√|v_o + v_B| + ε)

    `dualoptim.optim.rule` has the whole rule. The base and each delta are kept in fp32 whatever the parameter's
    precision, at 8 bytes per parameter each, or in 8 bits, at about 2.03 bytes per parameter each. For fp64 parameters
    they are kept, and the steps computed, in fp64. A parameter's state for all objectives is made when it first has a
    gradient; `estimate_state_memory` tells its size beforehand.

    A step with a gradient that is not finite, or whose square is not, is skipped as a whole: no parameter, state or
    counter changes, and `num_skipped` counts it. Under `torch.distributed` all ranks skip together, so every rank of
    `process_group` must take every step, for the same objective. On a GPU none of this waits for the host: ranks that
    chose different objectives take no step, and raise at the next.

    Args:
        params: parameters or parameter groups, as for any torch optimizer; every hyperparameter may differ by group.
        lr: learning rate, a float or a 0-dim tensor. Default 1e-5, the paper's for Phi-1.5 on TOFU.
        betas: (β1, β2), decay of the deltas. Default (0.9, 0.95), the paper's.
        base_betas: (β_B1, β_B2), decay of the base; default (0.9, 0.95), the paper's. None turns the base off: then
            every objective has an AdamW state of its own.
        eps: ε, added to the root of the second moment. Default 1e-8, Adam's.
        weight_decay: λ, decoupled. Default 0.01, the paper's.
        objectives: the names of the objectives, any number of them.
        lr_scales: a factor on the learning rate for each objective named; 1 for the others. Each step moves by about
            one rate, so if objectives take different numbers of steps, `dualoptim.schedule.equal_weights` gives the
            factors with which all move the parameters alike.
        base_weights: a factor on what a step of each objective named adds to the base; 1 for the others, the published
            rule. If objectives take different numbers of steps, `dualoptim.schedule.equal_weights` gives the factors
            with which all weigh the same in the base: ``{"forget": 3, "retain": 0.6}`` for one step to forget and five
            to retain.
        base_bits: bits in which the base's moments are kept: 32, or 8 with one fp32 scale for 256 elements of a row.
            They stay in 32 bits for parameters of one dimension, in fp64, or sharded along a dimension other than the
            first, of which a warning tells. Parameters of one dimension, unless they are sharded, may have 8 in a group
            with ``flat=True``, which is for matrices that DeepSpeed's ZeRO flattens.
        delta_bits: the same for the deltas' moments.
        max_update: bound on \|m / (√v + ε)\|, the update before the learning rate. Default 1.0: the two terms of v may
            cancel, and without a bound, updates of thousands of learning rates were measured. None is the published
            rule.
        min_8bit_size: parameters of fewer elements stay in 32 bits (elements of the whole parameter, if it is sharded).
            Default 4096, the published implementation's. Embeddings are better kept in 32 bits too, as
            `parameter_groups(model)` does.
        stochastic_rounding: round bf16 parameters up or down at random, so that updates below their precision count
            on average. False: round to the nearest; then at lr 1e-5 a bf16 weight of 0.02 would never move.
        seed: of the stochastic rounding. The same seed gives the same run, whatever other random numbers are drawn.
            Ranks that hold copies of bf16 parameters need the same.
        backend: how the rule is executed, "plain", "compiled" or "gpu" (`dualoptim.optim.backends`). None chooses the
            fastest that runs on the parameters' device.
        process_group: the ranks that step together under `torch.distributed`; None for all.

    Raises:
        ValueError: an argument out of its range, an objective that is not known, a step without an objective, a
            parameter, gradient or state that cannot be stepped, or a state dict that does not fit.

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
        base_weights: Mapping[str, float] | None = None,
        base_bits: int = 32,
        delta_bits: int = 32,
        max_update: float | None = 1.0,
        min_8bit_size: int = 4096,
        stochastic_rounding: bool = True,
        seed: int = 0,
        backend: str | None = None,
        process_group: Any = None,
    ) -> None:
        self._objectives = list(checked_objectives(objectives))  # a list, so that wrappers that copy it share it
        self.backend = checked_backend(backend)
        self.seed = checked_seed(seed)
        self.process_group = process_group
        self._choice: list[str] = []  # none or one; a list for the same reason
        self._skipped: dict[str, Tensor] = {}
        settings = {
            "lr": lr,
            "betas": betas,
            "base_betas": base_betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "lr_scales": {} if lr_scales is None else lr_scales,
            "base_weights": {} if base_weights is None else base_weights,
            "max_update": max_update,
            "base_bits": base_bits,
            "delta_bits": delta_bits,
            "min_8bit_size": min_8bit_size,
            "stochastic_rounding": stochastic_rounding,
            "flat": False,
        }
        super().__init__(params, checked_settings(settings, self.objectives))
        if all(group["base_betas"] is None for group in self.param_groups):
            check_without_base("the optimizer", settings, self.defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its hyperparameters are checked as the constructor's arguments are."""
        self._check_group(param_group)
        settings = checked_settings({**self.defaults, **param_group}, self.objectives)
        if settings["base_betas"] is None:
            check_without_base("a parameter group", param_group, settings)
        # Each group has mappings of its own, so that a change to one does not change all. None is empty, as torch's
        # checkpoints would lose it.
        for key in BY_OBJECTIVE:
            settings[key] = {**dict.fromkeys(self.objectives, 1.0), **settings[key]}
        param_group.update(settings, num_skipped=dict.fromkeys(self.objectives, 0))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "optimizer contains a parameter group with duplicate parameters")
            super().add_param_group(param_group)
        first = sum(len(group["params"]) for group in self.param_groups[:-1])
        seen: set[int] = set()
        for place, param in enumerate(self.param_groups[-1]["params"], first):
            if param.is_complex() or id(param) in seen:
                name = self._name(place)
                self.param_groups.pop()
                if param.is_complex():
                    raise ValueError(
                        f"{name} is complex, which is not supported; store it as a real parameter, and apply "
                        "torch.view_as_complex to it in the forward pass"
                    )
                raise ValueError(f"{name} stands in its parameter group twice; give it once")
            seen.add(id(param))

    def _check_group(self, param_group: dict[str, Any]) -> None:
        """`check_group`; what all groups have in common may stand in one, as wrappers such as ZeRO's write it there."""
        same = {"objectives": self.objectives, "backend": self.backend, "seed": self.seed}
        same["process_group"] = self.process_group
        if isinstance(param_group, dict):
            for key in same.keys() & param_group.keys():
                given = param_group[key]
                if (tuple(given) if isinstance(given, list) else given) == same[key]:
                    del param_group[key]
        check_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_objectives", "backend", "seed", "process_group", "_choice", "_skipped")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for param, own in state["state"].items():
            if isinstance(own, Loaded):
                state["state"][param] = own.state
        if "_skipped" not in state:  # from `load_state_dict`, which passes only states and groups
            groups = state["param_groups"]
            counts = (groups[0].get("num_skipped") if groups else None) or {}
            state["_skipped"] = {
                name: torch.tensor(int(count), dtype=torch.int64, device="cpu") for name, count in counts.items()
            }
        super().__setstate__(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> DualOptimPlus:
        memo[id(self.process_group)] = self.process_group  # not copied: it belongs to the process
        memo[id(self)] = again = type(self).__new__(type(self))
        again.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return again

    def add_objective(self, name: str) -> None:
        """Add an objective; its delta starts at its first step, from the base as it is then.

        Raises:
            ValueError: there is one of this name already, or it is not a name.
        """
        self._objectives[:] = checked_objectives((*self._objectives, name))
        for group in self.param_groups:
            for key in BY_OBJECTIVE:
                group[key] = {**dict.fromkeys(self.objectives, 1.0), **group[key]}

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names of the objectives."""
        return tuple(self._objectives)

    @property
    def num_skipped(self) -> dict[str, int]:
        """How many steps of each objective were skipped because a gradient was not finite. Waits for the GPU."""
        return {name: int(self._skipped[name]) if name in self._skipped else 0 for name in self.objectives}

    @property
    def objective(self) -> str | None:
        """The objective of the next `step()` only. None: not chosen yet."""
        return self._choice[0] if self._choice else None

    @objective.setter
    def objective(self, name: str | None) -> None:
        self._choice[:] = [] if name is None else [self._known(name)]

    def _known(self, name: str) -> str:
        for own in self.objectives:
            if own == name:
                return own
        close = difflib.get_close_matches(str(name), self.objectives, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown objective {name!r}: this optimizer has {listed(self.objectives)}{hint}")

    @overload
    def step(self, closure: None = None, *, objective: str | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, objective: str | None = None) -> float: ...
    def step(self, closure: Callable[[], float] | None = None, *, objective: str | None = None) -> float | None:
        """Update every parameter that has a gradient, as a step of one objective.

        Args:
            closure: re-evaluates the model and returns the loss; it may choose the objective.
            objective: the one whose gradients these are. Without it, the property `objective` decides; an optimizer
                with a single objective needs neither.

        Raises:
            ValueError: no objective chosen since the last step, an unknown one, something that cannot be stepped, or
                ranks that differ in objective or seed; then nothing has changed.
        """
        if isinstance(closure, str):
            raise ValueError(f"step takes a closure first; to choose the objective, call step(objective={closure!r})")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.inference_mode(False), torch.no_grad():
            self._step_of(objective)
        return loss

    @_disable_dynamo  # torch.compile must not trace it
    def _step_of(self, objective: str | None) -> None:
        if objective is None and not self._choice and len(self.objectives) > 1 and self._is_probed(by_rate=False):
            if not self._asks() or all_probed(self._device(), self.process_group):
                self._make_states()
            return
        verdict, self._verdict = self._verdict, None
        if verdict is not None:
            verdict.check()
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)  # a gradient scaler's
        sound = found is None or not bool(found)
        name, ready = None, []
        try:
            if sound or objective is not None or self._choice:  # else it is skipped, whatever its objective
                name = self._whose(objective)
                ready = self._entries(name)
            if sound and scale is not None:
                ready = _unscaled(ready, scale)
            finite = self._all_finite(ready) if sound else False
        except Exception:
            self._agreed(None, None, [])
            raise
        finite = self._agreed(finite, name, ready)
        if name is not None:
            self._step(name, ready, finite)

    _verdict: Verdict | None = None  # of ranks on GPUs on the step before, to be checked at the next

    def _agreed(self, finite: bool | Tensor | None, objective: str | None, ready: list[Entry]) -> bool | Tensor:
        """Whether every rank takes the step, too. None: this one refuses it."""
        if not several(self.process_group) or (ready and not any(each.real for each in ready)):
            return bool(finite) if finite is None else finite
        at_random = [each.param for each in ready if _rounded_at_random(each)]
        ranks = members(self.process_group) if at_random else ()
        seed = self.seed if any(is_copied(param, ranks) for param in at_random) else None
        answer, self._verdict = agreed(finite, self._device(), self.process_group, objective, seed)
        return answer

    def _device(self) -> torch.device:
        """The first parameter's device, whether or not it has a gradient: a rank without gradients takes part, too."""
        return next((local(param).device for param, _ in self._parameters()), torch.device("cpu"))

    # torch.amp.GradScaler then leaves the skipping to step(): else a chosen objective would outlive a skipped step.
    _step_supports_amp_scaling = True

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """As torch's, which wraps `step` in it: a step and its hooks. A failure leaves nothing for the next step."""
        hooked = Optimizer.profile_hook_step(func)

        @functools.wraps(hooked)
        def whole(self: DualOptimPlus, *args: Any, **kwargs: Any) -> Any:
            try:
                # So torch.distributed.checkpoint calls it, and a loop hardly. It is nobody's step: no hook runs, which
                # may choose an objective, and one that was chosen is of the step to come.
                if not args and kwargs == {"closure": None} and self._is_probed():
                    with torch.no_grad():
                        return self._make_states()
                return hooked(self, *args, **kwargs)
            except BaseException:
                self._choice.clear()
                for name in ("grad_scale", "found_inf"):  # a gradient scaler removes its own only after a step
                    self.__dict__.pop(name, None)
                raise

        return whole

    def _skip(self, objective: str) -> None:
        skipped = self._skipped.get(objective, torch.zeros((), dtype=torch.int64, device="cpu")) + 1
        self._skipped[objective] = skipped
        logger.warning("step of %r skipped: a gradient is not finite (%d skipped so far)", objective, skipped)

    def _whose(self, objective: str | None) -> str:
        """The objective of this step; the choice is cleared, so that it serves no other step."""
        chosen = self._choice[0] if self._choice else None
        self._choice.clear()
        if objective is not None:
            return self._known(objective)
        if chosen is None and len(self.objectives) > 1:
            raise ValueError(
                "no objective was chosen for this step: pass step(objective=…) or set .objective before every step, on "
                f"this optimizer and not on a wrapper around it; its objectives are {listed(self.objectives)}"
            )
        return self._known(chosen or self.objectives[0])

    def _is_probed(self, by_rate: bool = True) -> bool:
        """Whether this is a first step on zeros, by which torch.distributed.checkpoint or DeepSpeed makes the state.

        Args:
            by_rate: only if it is at a learning rate of 0 as well, which torch.distributed.checkpoint sets, also for
                gradients without values.
        """
        begun = any(STEP in own for own in self.state.values())  # other entries may be others'
        if begun or (by_rate and any(float(group["lr"]) for group in self.param_groups)):
            return False
        grads = list(self._local_gradients())
        return bool(grads) and not any(grad.any() if has_values(grad) else not by_rate for grad in grads)

    def _make_states(self) -> None:
        for param, group in self._parameters():
            if param.grad is not None:
                self._make_state(param, group)

    def _asks(self) -> bool:
        """Whether other ranks are asked if they are probed as well.

        torch.distributed.checkpoint sets the learning rate to 0, and may be called on one rank alone.
        """
        return several(self.process_group) and any(float(group["lr"]) for group in self.param_groups)

    def _local_gradients(self) -> Iterator[Tensor]:
        for param, _ in self._parameters():
            if param.grad is not None:
                yield local(param.grad)

    def _parameters(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for param in group["params"]:
                yield param, group

    def _name(self, place: int) -> str:
        """A parameter's name for messages."""
        index = place
        for group in self.param_groups:
            if index < len(group["params"]):
                return f"parameter {group['param_names'][index]!r}" if "param_names" in group else f"parameter {place}"
            index -= len(group["params"])
        raise AssertionError(place)

    def _entries(self, objective: str) -> list[Entry]:
        """All that a step reads and writes. What cannot be stepped is refused here, before anything is written."""
        candidates, place = [], 0
        for group in self.param_groups:
            check_factors(group, self.objectives)
            keys = _keys(objective, group)
            for param in group["params"]:
                if param.grad is not None:
                    candidates.append(Candidate(place, param, group, self.state.get(param, {}), keys))
                place += 1
        ready = entries(candidates, self._name)
        if any(each.real for each in ready) and not has_values(torch.empty(0, dtype=torch.float32, device="cpu")):
            raise ValueError("a step within FakeTensorMode needs parameters that were made in it")
        return ready

    def _step(self, objective: str, ready: list[Entry], finite: bool | Tensor) -> None:
        if isinstance(finite, Tensor):  # known on the GPU alone, whose kernels then change nothing if it is false
            skipped = self._skipped.get(objective)
            skipped = torch.zeros((), dtype=torch.int64, device=finite.device) if skipped is None else skipped
            self._skipped[objective] = skipped.to(finite.device).add_(~finite)
        elif not finite:
            self._skip(objective)
            return
        parts: dict[tuple[torch.device, bool], list[Entry]] = {}
        for each in ready:
            parts.setdefault((each.there.device, each.real), []).append(each)
        for (device, real), some in parts.items():
            self._step_on(device, some, objective, finite if isinstance(finite, Tensor) else None, real=real)

    def _all_finite(self, ready: list[Entry]) -> bool | Tensor:
        """Whether every gradient is finite, and its square too; a tensor if the answer is on the GPU."""
        grads: dict[torch.device, list[Tensor]] = {}
        for each in ready:
            if each.real:
                grads.setdefault(each.there.device, []).append(each.grad)
        found = [backends.choose(device.type, self.backend).finite(some) for device, some in grads.items()]
        if found and all(isinstance(answer, Tensor) for answer in found):
            device = self._device()
            return torch.stack([answer.to(device, non_blocking=True) for answer in found]).all()
        return all(map(bool, found))

    def _step_on(
        self, device: torch.device, ready: list[Entry], objective: str, proceed: Tensor | None, *, real: bool
    ) -> None:
        """Update the parameters on one device; with `proceed`, only if it is true, which the device reads."""
        if proceed is not None:
            proceed = proceed.to(device, non_blocking=True)
        states = [self._make_state(each.param, each.group) for each in ready]
        count = of(DELTA_STEP, objective)
        like = counter(ready[0].param)
        for own in states:
            for name in (STEP, count) if real else ():
                value = own[name]
                if type(value) is not type(like) or value.dtype is not like.dtype or value.device != like.device:
                    own[name] = like.clone().copy_(torch.as_tensor(value, device="cpu"))  # moved or cast by others
        steps, delta_steps = [own[STEP] for own in states], [own[count] for own in states]
        if not real:  # meta or fake tensors: there is nothing to compute
            _count([*steps, *delta_steps], proceed)
            return
        t, t_o = torch.stack(steps) + 1, torch.stack(delta_steps) + 1
        items, offsets = [], []
        for each, own in zip(ready, states, strict=True):
            moments = each.moments
            if len(moments) < (2 if each.group["base_betas"] is None else 4):  # made just now
                moments = [local(kept(own, key.moment)) for key in _keys(objective, each.group)]
            base = Moments(*moments[2:]) if moments[2:] else None
            place = place_of(each.param) if _rounded_at_random(each) else WHOLE
            items.append(Item(each.theta, each.grad, Moments(*moments[:2]), base, place.lines))
            offsets.append(place.first if _rounded_at_random(each) else -1)
        quantised = tuple(
            isinstance(item.delta[0], dict) or isinstance(item.base and item.base[0], dict) for item in items
        )
        in_8_bits = on_device(quantised, torch.bool, t.device)
        rows, first = [], 0
        for group in self.param_groups:  # `ready` is in the groups' order
            last = first + sum(each.group is group for each in ready)
            if last > first:
                settings = {key: group[key] for key in ("betas", "base_betas", "eps", "weight_decay", "max_update")}
                settings["lr"] = group["lr"] * group["lr_scales"].get(objective, 1.0)
                settings["base_share"] = group["base_weights"].get(objective, 1.0)
                own_rows = slice(first, last)
                rows.append(coefficients(t[own_rows], t_o[own_rows], in_8_bits[own_rows], **settings))
            first = last
        # Stochastic rounding hashes the step, the parameter and the element's index in the whole parameter.
        seeds = firsts = on_device(tuple(offsets), torch.int64, t.device)
        if max(offsets) >= 0:
            places = on_device(tuple(each.place for each in ready), torch.int64, t.device)
            seeds = (hashed(hashed(hashed(t + self.seed) + places)) + firsts) & 0xFFFFFFFF
            seeds = torch.where(firsts >= 0, seeds, -1)
        backend, decided = backends.choose(device.type, self.backend), () if proceed is None else (proceed,)
        table = torch.cat(rows) if len(rows) > 1 else rows[0]
        if overlapping(ready):  # one after the other, as each may read what the one before wrote
            for i, (each, item) in enumerate(zip(ready, items, strict=True)):
                theta = each.theta if each.theta is each.there else each.theta.copy_(each.there)
                backend.step([item._replace(param=theta)], table[i : i + 1], seeds[i : i + 1], *decided)
                if each.theta is not each.there:
                    each.there.copy_(theta)
        else:
            backend.step(items, table, seeds, *decided)
            for each in ready:
                if each.theta is not each.there:
                    each.there.copy_(each.theta)
        _count([*steps, *delta_steps], proceed)
        # As torch's in-place operations do, so that autograd detects a saved weight that has changed since.
        torch.autograd.graph.increment_version([each.param for each in ready])
        if parts := [each.there for each in ready if each.there is not each.param]:
            torch.autograd.graph.increment_version(parts)

    def _make_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """The parameter's state; entries that are missing for an objective are made."""
        own = self.state[param]
        with_base = group["base_betas"] is not None
        if own.keys() >= _all_keys(self.objectives, with_base):
            return own
        for name in (STEP, *(of(DELTA_STEP, objective) for objective in self.objectives)):
            if name not in own:
                own[name] = counter(param)
        for name in state.moment_keys(self.objectives, with_base=with_base):
            if name not in own and f"{CODES}/{name}" not in own:
                kind, slash, objective = name.partition("/")
                first, second = DELTA if kind in DELTA else BASE
                other = (second if kind == first else first) + slash + objective  # the pair's other; same bits
                bits = 32 if other in own else 8 if f"{CODES}/{other}" in own else bits_of(param, group, name)
                if bits > bits_unless_split(param, group, name) and other not in own:
                    self._warn_of_32_bits()
                state.keep(own, name, state.zeros(param, bits, code_of(name, with_base=with_base)))
        return own

    _warned_of_32_bits = False

    def _warn_of_32_bits(self) -> None:
        if not self._warned_of_32_bits:
            self._warned_of_32_bits = True
            warnings.warn(
                "moments of parameters whose rows are split among ranks, as by Shard(1), are kept in 32 bits in place "
                "of 8; shard along dimension 0 to keep them in 8",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the counts of skipped steps in each group. The groups' mappings are copies."""
        skipped = self.num_skipped
        for group in self.param_groups:
            group["num_skipped"] = dict(skipped)
        hook = self.register_state_dict_post_hook(_with_own_mappings, prepend=True)  # other hooks see what is saved
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave, bit for bit: moments stay in fp32 even if parameters are bf16 or fp16.

        `base_bits`, `delta_bits`, `min_8bit_size`, `flat` and `stochastic_rounding` stay this optimizer's own; moments
        in other bits are converted, with a warning.

        Raises:
            ValueError: states of another optimizer, of parameters of other shapes, or of objectives that this one does
                not have; then nothing has changed.
        """
        with torch.inference_mode(False), torch.no_grad():
            # Registered last, so that it reads what other hooks made of the state dict. It wraps the states in objects
            # that torch does not look into, as torch would cast moments to the parameters' precision.
            hook = self.register_load_state_dict_pre_hook(prepared)
            try:
                super().load_state_dict(state_dict)
            finally:
                hook.remove()

    def __repr__(self) -> str:
        return super().__repr__().replace(" (", f" (\nobjectives: {', '.join(self.objectives)}", 1)


class DualOptim(DualOptimPlus):
    """DualOptim: one AdamW state per objective and no base, the predecessor of `DualOptimPlus`.

    The arguments are those of `DualOptimPlus` without the base's. Defaults: betas (0.9, 0.999) as published, and no
    bound on the update: here its second moment is an average of squares and cannot cancel.

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
        process_group: Any = None,
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
            process_group=process_group,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; it has no base either."""
        self._check_group(param_group)
        if param_group.get("base_betas") is not None:
            raise ValueError("a parameter group sets 'base_betas', but DualOptim has no base; use DualOptimPlus")
        super().add_param_group(param_group)


def multi_objective(optimizer: Any) -> DualOptimPlus | None:
    """The optimizer that knows objectives, itself or within what wraps it (accelerate, DeepSpeed, Lightning); or None.

    The innermost counts: a wrapper may be of a class made of this one, with attributes that were copied.
    """
    found = None
    while optimizer is not None:
        found = optimizer if isinstance(optimizer, DualOptimPlus) else found
        optimizer = getattr(optimizer, "optimizer", None)
    return found


def _with_own_mappings(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Copy the mappings in a state dict's groups, as torch copies a group only."""
    for group in saved["param_groups"]:
        group.update({key: dict(value) for key, value in group.items() if isinstance(value, dict)})


def _count(counters: list[Tensor], proceed: Tensor | None) -> None:
    """Add one to step counters, or nothing where `proceed` is false, which the device reads."""
    if proceed is None:
        torch._foreach_add_(counters, 1)
    else:  # without alpha torch takes a tensor of one element for a number, and waits until the GPU has it
        torch._foreach_add_(counters, proceed.long(), alpha=1)


def _unscaled(ready: Sequence[Entry], scale: Tensor) -> list[Entry]:
    """Entries with their gradients divided by a gradient scaler's factor, and so are the parameters' own gradients.

    A step reads gradients in fp16 from a copy in fp32, as most of what the factor saves would underflow in fp16.
    """
    divided, grads = [], dict[tuple[torch.device, torch.dtype], list[Tensor]]()
    for each in ready:
        own = local(each.param.grad)
        grad = each.grad.float() if each.grad.dtype is torch.float16 else each.grad
        for tensor in [own] if own is grad else [own, grad]:
            grads.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        divided.append(each._replace(grad=grad))
    for (device, _), some in grads.items():
        torch._foreach_div_(some, scale.to(device))
    return divided


def _rounded_at_random(each: Entry) -> bool:
    return each.param.dtype is torch.bfloat16 and bool(each.group["stochastic_rounding"])


def _keys(objective: str, group: Mapping[str, Any]) -> tuple[Keys, ...]:
    """The keys of the moments that a step of an objective reads and writes."""
    return _keys_of(objective, group["base_betas"] is not None)


@functools.cache
def _keys_of(objective: str, with_base: bool) -> tuple[Keys, ...]:
    return keys_of([*(of(name, objective) for name in DELTA), *(BASE if with_base else ())])


@functools.lru_cache(maxsize=64)
def _all_keys(objectives: tuple[str, ...], with_base: bool) -> frozenset[str]:
    """All keys of a parameter's state whose moments are in 32 bits."""
    counts = (of(DELTA_STEP, objective) for objective in objectives)
    return frozenset((STEP, *counts, *state.moment_keys(objectives, with_base=with_base)))
