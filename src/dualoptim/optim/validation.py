"""What the optimizers refuse: settings, groups and state dicts that no step could mean."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .backends import NAMES

RULE_SETTINGS = {"lr", "betas", "base_betas", "eps", "weight_decay", "lr_scales", "max_update"}
# How this optimizer keeps its state and writes parameters back, whatever the state dict it loads was kept in.
KEPT_ON_LOAD = ("base_bits", "delta_bits", "min_8bit_size", "stochastic_rounding")
SETTINGS = RULE_SETTINGS | set(KEPT_ON_LOAD)
OTHER_GROUP_KEYS = {"params", "param_names", "name", "initial_lr"}  # what torch and its schedulers put beside settings


def checked_objectives(objectives: Iterable[str]) -> tuple[str, ...]:
    """The objectives as a tuple of different names."""
    if isinstance(objectives, str) or not isinstance(objectives, Iterable):
        raise ValueError(f"objectives must be a sequence of names, such as ('forget', 'retain'), but is {objectives!r}")
    names = tuple(objectives)
    if not names or len(set(names)) != len(names) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"objectives must be one or more different names, but is {names!r}")
    return names


def checked_backend(backend: str | None) -> str | None:
    """The name of a backend, or None."""
    if backend is not None and backend not in NAMES:
        raise ValueError(f"backend must be one of {listed(NAMES)} or None, but is {backend!r}")
    return backend


def check_hyperparameters(group: Mapping[str, Any], objectives: tuple[str, ...]) -> None:
    """Refuse what no step could mean, naming the argument, the value and the range."""

    def number(name: str, value: Any, low: float, *, strictly: bool = False, below: float = math.inf) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            raise ValueError(f"{name} must be a number, but is {value!r}")
        in_range = low < value < below if strictly else low <= value < below
        if not in_range:
            raise ValueError(f"{name} must be {'>' if strictly else 'at least'} {low:g} and < {below:g}, is {value}")

    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, but has shape {tuple(group['lr'].shape)}")
    number("lr", group["lr"], 0)
    number("eps", group["eps"], 0)
    number("weight_decay", group["weight_decay"], 0)
    for name in ("betas", "base_betas"):
        if group[name] is None and name == "base_betas":
            continue
        if not isinstance(group[name], (tuple, list)) or len(group[name]) != 2:
            raise ValueError(f"{name} must be two numbers, but is {group[name]!r}")
        for i, beta in enumerate(group[name]):
            number(f"{name}[{i}]", beta, 0, below=1)
    if group["max_update"] is not None:
        number("max_update", group["max_update"], 0, strictly=True)
    for name in ("base_bits", "delta_bits"):
        if group.get(name, 32) not in (32, 8):
            raise ValueError(f"{name} must be 32 or 8, but is {group[name]!r}")
    number("min_8bit_size", group.get("min_8bit_size", 0), 0)
    if not isinstance(group.get("stochastic_rounding", True), bool):
        raise ValueError(f"stochastic_rounding must be True or False, but is {group['stochastic_rounding']!r}")
    if not isinstance(group["lr_scales"], Mapping):
        raise ValueError(f"lr_scales must be a mapping of objective → factor, but is {group['lr_scales']!r}")
    for name, scale in group["lr_scales"].items():
        if name not in objectives:
            raise ValueError(f"lr_scales names {name!r}, but the objectives are {listed(objectives)}")
        number(f"lr_scales[{name!r}]", scale, 0)


def check_group_keys(param_group: Mapping[str, Any]) -> None:
    """Refuse a key that is no setting, with the nearest one that is."""
    for key in set(param_group) - SETTINGS - OTHER_GROUP_KEYS:
        close = difflib.get_close_matches(key, SETTINGS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {listed(sorted(SETTINGS))}"
        raise ValueError(f"a parameter group sets {key!r}, which this optimizer does not know; {hint}")


def check_loadable(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    objectives: tuple[str, ...],
) -> None:
    """Refuse a state dict of another optimizer, of other objectives, or of parameters of other shapes."""
    found = {name for state in state_dict["state"].values() for name in state.get("delta_step", {})}
    if unknown := sorted(found - set(objectives)):
        raise ValueError(
            f"the state dict holds {listed(unknown)}, which this optimizer does not have "
            f"({listed(objectives)}); name them in objectives=…"
        )
    if len(groups) != len(state_dict["param_groups"]):
        return  # torch says so itself
    for own, group in zip(groups, state_dict["param_groups"], strict=True):
        if missing := sorted(RULE_SETTINGS - set(group)):
            raise ValueError(f"the state dict is another optimizer's: its groups have no {listed(missing)}")
        if (own["base_betas"] is None) != (group["base_betas"] is None):
            raise ValueError(
                "the state dict is of an optimizer "
                + ("without a base" if group["base_betas"] is None else "with a base")
                + ", and this one is not; make it with the same base_betas"
            )
        check_hyperparameters(group, objectives)
        for param, index in zip(own["params"], group["params"], strict=False):
            for name, moment in state_dict["state"].get(index, {}).get("delta_exp_avg", {}).items():
                shape = (moment["codes"] if isinstance(moment, dict) else moment).shape
                if shape != param.shape:
                    raise ValueError(
                        f"the state dict's moments of parameter {index} for {name!r} have shape "
                        f"{tuple(shape)}, and the parameter {tuple(param.shape)}; is it the same model?"
                    )


def listed(names: Iterable[str]) -> str:
    """Names for a message, quoted."""
    return ", ".join(repr(name) for name in names)
