"""What the optimizers refuse: settings, groups and state dicts that are not valid."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import NAMES
from .state import (
    BASE,
    CODES,
    DELTA,
    DELTA_STEP,
    SCALES,
    STEP,
    bits_of,
    code_of,
    has_values,
    local,
    moment_keys,
    num_blocks,
    precision,
    rows_are_split,
)

BY_OBJECTIVE = ("lr_scales", "base_weights")  # mappings of objective → factor
RULE_SETTINGS = {"lr", "betas", "base_betas", "eps", "weight_decay", *BY_OBJECTIVE, "max_update"}
# How this optimizer keeps its state and writes parameters back; a loaded state dict does not change these.
KEPT_ON_LOAD = ("base_bits", "delta_bits", "min_8bit_size", "flat", "stochastic_rounding")
SETTINGS = RULE_SETTINGS | set(KEPT_ON_LOAD)
SINCE_THEN = {"stochastic_rounding", "flat", "base_weights"}  # missing in state dicts of earlier versions
# What torch and its schedulers add to a group's settings, and this optimizer's own count.
OTHER_GROUP_KEYS = {"params", "param_names", "name", "initial_lr", "num_skipped"}
OTHER_GROUP_KEYS |= {"max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
# What would make a step another one, in other optimizers or as another name of a setting, and what this one takes for
# all groups alike. A wrapper's own keys, such as SAM's rho, are none of these.
NOT_OF_A_GROUP = {
    *("momentum", "dampening", "nesterov", "amsgrad", "maximize", "foreach", "fused", "capturable", "differentiable"),
    *("decoupled_weight_decay", "momentum_decay", "lr_decay", "alpha", "centered", "lambd", "t0", "etas", "step_sizes"),
    *("beta1", "beta2", "correct_bias", "clip_threshold", "decay_rate", "optim_bits", "learning_rate"),
    *("objectives", "backend", "seed", "process_group"),
}


def checked_objectives(objectives: Iterable[str]) -> tuple[str, ...]:
    """The objectives as a tuple of different names."""
    if isinstance(objectives, str) or not isinstance(objectives, Iterable):
        raise ValueError(f"objectives must be a sequence of names, such as ('forget', 'retain'), but is {objectives!r}")
    names = tuple(objectives)
    if not names or not all(isinstance(n, str) and n for n in names) or len(set(names)) != len(names):
        raise ValueError(f"objectives must be one or more different names, but is {names!r}")
    return tuple(map(str.__str__, names))  # members of a string enumeration become plain strings


def checked_seed(seed: Any) -> int:
    """A whole number of 64 bits, as torch takes it."""
    try:
        if isinstance(seed, bool):
            raise TypeError
        number = operator.index(seed)
    except TypeError:
        raise ValueError(f"seed must be a whole number, but is {_shown(seed)}") from None
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must be at least -2**63 and < 2**64, but is {_shown(seed)}")
    return number


def checked_backend(backend: str | None) -> str | None:
    """The name of a backend, or None."""
    if backend is not None and backend not in NAMES:
        raise ValueError(f"backend must be one of {listed(NAMES)} or None, but is {backend!r}")
    return backend


def checked_settings(given: Mapping[str, Any], objectives: tuple[str, ...], *, loaded: bool = False) -> dict[str, Any]:
    """The settings among the given values, as plain numbers, tuples and dicts; invalid ones are refused.

    Args:
        given: all settings; other keys are left out.
        loaded: whether they come from a state dict. Its learning rate and weight decay may be negative, as a schedule
            may have made them so; a negative learning rate gives a warning.

    Raises:
        ValueError: an invalid setting; the message names the argument, the value and the range.
    """

    def number(name: str, value: Any, low: float, *, strictly: bool = False, below: float = math.inf) -> Any:
        if loaded and name in ("lr", "weight_decay"):  # a schedule may have made them negative
            low = -math.inf
        # NumPy's and other libraries' numbers are accepted, but neither True nor "1e-5".
        try:
            if isinstance(value, (bool, str)) or (isinstance(value, Tensor) and value.numel() != 1):
                raise TypeError
            plain = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise ValueError(f"{name} must be a number, but is {_shown(value)}") from None
        if not isinstance(value, Tensor):
            value = int(value) if isinstance(value, numbers.Integral) and abs(plain) < 2**53 else plain
        in_range = low < value < below if strictly else low <= value < below
        if not in_range:
            raise ValueError(f"{name} must be {'>' if strictly else 'at least'} {low:g} and < {below:g}, is {value}")
        return value

    settings = {key: given[key] for key in SETTINGS}
    lr = settings["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, but has shape {tuple(lr.shape)}")
    settings["lr"] = lr = number("lr", lr, 0)
    if loaded and lr < 0:
        warnings.warn(f"the state dict's learning rate is below zero: {float(lr):g}", stacklevel=8)
    for name in ("eps", "weight_decay", "min_8bit_size"):
        settings[name] = number(name, settings[name], 0)
    for name in ("betas", "base_betas"):
        if settings[name] is None and name == "base_betas":
            continue
        try:
            pair = tuple(settings[name])
        except TypeError:
            pair = ()
        if len(pair) != 2 or isinstance(settings[name], str):
            raise ValueError(f"{name} must be two numbers, but is {_shown(settings[name])}")
        settings[name] = tuple(float(number(f"{name}[{i}]", beta, 0, below=1)) for i, beta in enumerate(pair))
    bound = settings["max_update"]
    if bound is not None and not (loaded and isinstance(bound, float) and bound == math.inf):
        settings["max_update"] = number("max_update", bound, 0, strictly=True)
    for name in ("base_bits", "delta_bits"):
        if isinstance(settings[name], Tensor) or settings[name] not in (32, 8):
            raise ValueError(f"{name} must be 32 or 8, but is {_shown(settings[name])}")
        settings[name] = int(settings[name])
    for name in ("flat", "stochastic_rounding"):
        if not isinstance(settings[name], bool):
            raise ValueError(f"{name} must be True or False, but is {_shown(settings[name])}")
    check_factors(settings, objectives)
    for key in BY_OBJECTIVE:
        settings[key] = {str.__str__(name): number(f"{key}[{name!r}]", f, 0) for name, f in settings[key].items()}
    return settings


def check_factors(settings: Mapping[str, Any], objectives: tuple[str, ...]) -> None:
    """Refuse a factor of an objective that there is not."""
    for key in BY_OBJECTIVE:
        if not isinstance(settings[key], Mapping):
            raise ValueError(f"{key} must be a mapping of objective → factor, but is {_shown(settings[key])}")
        for name in settings[key]:
            if name not in objectives:
                raise ValueError(f"{key} names {name!r}, but the objectives are {listed(objectives)}")


def check_group(param_group: Any) -> None:
    """Refuse what is no parameter group, and a key that is meant as a setting and is none.

    Keys of others, such as those of an optimizer around this one, are let through.
    """
    if not isinstance(param_group, dict):
        raise ValueError(
            f"a parameter group must be a mapping, such as {{'params': [weight]}}, but is {type(param_group).__name__}"
        )
    if "params" not in param_group:
        raise ValueError(f"a parameter group must have 'params', but has {listed(param_group) or 'nothing'}")
    for key in param_group.keys() - SETTINGS - OTHER_GROUP_KEYS:
        close = [] if _is_anothers(key) else difflib.get_close_matches(str(key), SETTINGS, n=1)
        if isinstance(key, str) and not close and key not in NOT_OF_A_GROUP:
            continue
        hint = f"did you mean {close[0]!r}?" if close else f"known are {listed(sorted(SETTINGS))}"
        raise ValueError(f"a parameter group sets {key!r}, which this optimizer does not know; {hint}")


def _is_anothers(key: Any) -> bool:
    """Whether a key near a setting's name is no misspelling of it.

    Such as no_weight_decay, which has words of its own beside the setting's, and base_lr, which shares no more with
    base_bits than a word.
    """
    words = set(filter(None, str(key).split("_")))
    if any(set(name.split("_")) < words for name in SETTINGS if "_" in name):
        return True
    return not difflib.get_close_matches(str(key), SETTINGS, n=1, cutoff=0.8)


def check_without_base(who: str, given: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse what is said of a base where there is none.

    Args:
        who: what sets it, for the message.
        given: the settings as they were given.
        settings: the same, checked.
    """
    weighed = any(weight != 1 for weight in settings["base_weights"].values())
    for key, has_effect in (("base_weights", weighed), ("base_bits", settings["base_bits"] != 32)):
        if key in given and has_effect:
            raise ValueError(
                f"{who} sets {key!r}, but it has no base, as base_betas is None; leave it out, or give base_betas"
            )


def check_same_groups(saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a state dict's groups whose numbers of parameters are not an optimizer's, so that none gets another's."""
    sizes = [[len(group["params"]) for group in some] for some in (saved, groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the state dict has parameter groups of {listed(sizes[0])} parameters, and this optimizer of "
            f"{listed(sizes[1])}; make the same groups"
        )


def check_loadable(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    objectives: tuple[str, ...],
) -> list[dict[str, Any]]:
    """The settings of a state dict's groups; a state dict of another optimizer, objectives or shapes is refused."""
    saved_groups, indices = _checked_parts(state_dict)
    check_same_groups(saved_groups, groups)
    given = {index: state_dict["state"].get(index) for index in indices}
    if any(not isinstance(own, (Mapping, type(None))) for own in given.values()):
        raise ValueError("the state dict's 'state' must hold a mapping for each parameter")
    states = {index: own for index, own in given.items() if own}
    if any(isinstance(own.get(DELTA_STEP), Mapping) for own in states.values()):
        raise ValueError(
            "the state dict was saved by an earlier version, whose states were nested; load it with that version, or "
            "begin with a new state"
        )
    found = {objective for own in states.values() for objective in _objectives(own)}
    for group in saved_groups:  # before the first step, the settings name them all
        factors = [group.get(key) for key in BY_OBJECTIVE]
        found.update(name for each in factors if isinstance(each, Mapping) for name in each)
    if unknown := sorted(found - set(objectives), key=str):
        raise ValueError(
            f"the state dict holds {listed(unknown)}, which this optimizer does not have "
            f"({listed(objectives)}); name them in objectives=…"
        )
    settings = []
    for own, group in zip(groups, saved_groups, strict=True):
        if missing := sorted((SETTINGS - SINCE_THEN) - set(group)):
            raise ValueError(f"the state dict is another optimizer's: its groups have no {listed(missing)}")
        if (own["base_betas"] is None) != (group["base_betas"] is None):
            raise ValueError(
                "the state dict is of an optimizer "
                + ("without a base" if group["base_betas"] is None else "with a base")
                + ", and this one is not; make it with the same base_betas"
            )
        settings.append(checked_settings({**own, **group}, objectives, loaded=True))
        for place, (param, index) in enumerate(zip(own["params"], group["params"], strict=True)):
            if index in states:
                name = f"parameter {own['param_names'][place] if 'param_names' in own else index!r}"
                _check_state(states[index], param, settings[-1], own, name)
    return settings


def _checked_parts(state_dict: Mapping[str, Any]) -> tuple[Sequence[Mapping[str, Any]], list[Any]]:
    """A state dict's groups, and the indices of their parameters; refused if it is not built as torch's are."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if not isinstance(groups, (list, tuple)) or not isinstance(state_dict.get("state"), Mapping):
        raise ValueError("a state dict must hold a mapping 'state' and a list 'param_groups', as state_dict() gives")
    for group in groups:
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError("each of the state dict's 'param_groups' must be a mapping with a list 'params'")
        if not all(isinstance(key, str) for key in group):
            raise ValueError("the keys of the state dict's 'param_groups' must be names")
        names = group.get("param_names")
        if names is not None and (not isinstance(names, (list, tuple)) or len(names) != len(group["params"])):
            raise ValueError("the state dict's 'param_names' must be as many names as there are 'params'")
        counts = group.get("num_skipped")
        if counts is not None and not (isinstance(counts, Mapping) and all(map(_is_count, counts.values()))):
            raise ValueError(
                f"the state dict's 'num_skipped' must be a count for each objective, but is {_shown(counts)}"
            )
    indices = [index for group in groups for index in group["params"]]
    if not all(isinstance(index, (int, str)) for index in indices) or len(set(indices)) < len(indices):
        raise ValueError("the state dict's 'params' must be different numbers or names")
    return groups, indices


def _is_count(value: Any, *, without_values: bool = False) -> bool:
    """Whether a value is a whole number ≥ 0 (and < 2^53), as a number or a tensor of one element, or has no values."""
    if isinstance(value, Tensor) and not has_values(value):
        return without_values and value.numel() == 1
    try:
        return not isinstance(value, (str, bytes)) and 0 <= float(value) < 2**53 and float(value).is_integer()
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def _shown(value: Any) -> str:
    """A value, short enough for a sentence."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _objectives(own: Mapping[str, Any]) -> list[str]:
    """The objectives that have entries in a parameter's saved state."""
    found: dict[str, None] = {}
    for key in own:
        kind, _, rest = str(key).partition("/")
        if kind in (CODES, SCALES):
            kind, _, rest = rest.partition("/")
        if kind in (DELTA_STEP, *DELTA) and rest:
            found[rest] = None
    return list(found)


def _check_state(
    own: Mapping[str, Any], param: Tensor, group: Mapping[str, Any], ours: Mapping[str, Any], name: str
) -> None:
    """Refuse a saved state that is incomplete, of another shape than the parameter, or not as its group's settings.

    Args:
        group: the settings that it was saved with.
        ours: those of the optimizer that loads it.
    """
    stepped, with_base = tuple(_objectives(own)), group["base_betas"] is not None
    for key in (STEP, *(f"{DELTA_STEP}/{objective}" for objective in stepped)):
        count = own.get(key)
        if not _is_count(count, without_values=not has_values(local(param))):
            found = "no" if count is None else "no count as"
            raise ValueError(f"the state dict has {found} {key!r} for {name}; was it saved whole?")
    moments = list(moment_keys(stepped, with_base=with_base))
    for key in map(str, own):
        kind, _, rest = key.partition("/")
        if kind in (STEP, DELTA_STEP, *DELTA, *BASE, CODES, SCALES) and not (
            key == STEP or kind == DELTA_STEP or key in moments or (kind in (CODES, SCALES) and rest in moments)
        ):
            raise ValueError(f"the state dict has {key!r} for {name}, which this optimizer keeps nothing under")
    for key in moments:
        codes, scales = f"{CODES}/{key}", f"{SCALES}/{key}"
        in_8_bits = codes in own or scales in own
        said = group["base_bits" if key in BASE else "delta_bits"]
        # torch.distributed fills the states that an optimizer has, by their names: in other bits they stay zero.
        unfilled = hasattr(own.get(key), "placements") and bits_of(param, group, key) == 8 and _stayed_zero(own, key)
        if (in_8_bits and (key in own or said == 32)) or unfilled:
            if said == 32 or bits_of(param, ours, key) != 8:
                found = f"is not in the {said} bits that its group says; it was loaded into states of other bits"
                hint = "so make the optimizer with those that it was saved with"
                if said == 8 and rows_are_split(param):
                    hint = "as this optimizer keeps rows that are split among ranks in 32; shard along dimension 0"
            else:
                found = "was kept in 32 bits, not in the 8 that its group says, as its rows were split among ranks"
                hint = "so give its parameter group base_bits=32, delta_bits=32"
            raise ValueError(f"the state dict's {key!r} of {name} {found}, {hint}")
        for part in (codes, scales) if in_8_bits else (key,):
            _check_part(own, part, param, code_of(key, with_base=with_base).dtype, name)


def _stayed_zero(own: Mapping[str, Any], key: str) -> bool:
    """Whether a moment is zero on this rank although a step has updated it."""
    kind, slash, objective = key.partition("/")
    count, moment = own[DELTA_STEP + slash + objective if kind in DELTA else STEP], local(own[key])
    return has_values(moment) and moment.numel() > 0 and int(count) > 0 and not moment.any()


def _check_part(own: Mapping[str, Any], key: str, param: Tensor, code: torch.dtype, name: str) -> None:
    """Refuse a moment, or its codes or scales, that does not fit its parameter."""
    if key not in own:
        raise ValueError(f"the state dict has no {key!r} for {name}; was it saved whole?")
    tensor, whole = own[key], not key.startswith(f"{SCALES}/")
    valued = isinstance(tensor, Tensor) and has_values(local(tensor))
    needed = has_values(local(param))
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or (needed and not valued):
        raise ValueError(f"the state dict's {key!r} of {name} is no tensor with values; was it saved whole?")
    shape = param.shape if whole else torch.Size(num_blocks(param))
    found = tuple(tensor.shape)
    if found != shape and whole:
        raise ValueError(
            f"the state dict's {key!r} of {name} have shape {found}, and the parameter {tuple(shape)}; "
            "is it the same model?"
        )
    if found != shape:
        raise ValueError(
            f"the state dict's {key!r} of {name} have shape {found} in place of {tuple(shape)}; were they saved by an "
            "earlier version?"
        )
    if getattr(tensor, "placements", None) != getattr(param, "placements", None):
        raise ValueError(
            f"the state dict's {key!r} of {name} is not distributed as the parameter is; load it by "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, in the bits that it was saved in"
        )
    fits = tensor.dtype == code if key.startswith(f"{CODES}/") else tensor.is_floating_point()
    if not fits:
        raise ValueError(f"the state dict's {key!r} of {name} has precision {tensor.dtype}, which does not fit")
    if not valued:
        return
    # In the precision that it will have: what 64 bits hold may be infinite in 32.
    kept = precision(param) if whole else torch.float32
    if tensor.is_floating_point() and not local(tensor).to(kept).isfinite().all():
        raise ValueError(f"the state dict's {key!r} of {name} holds numbers that are not finite; load an earlier one")
    # Averages of squares and scales have no sign.
    if tensor.is_floating_point() and (not whole or code is torch.uint8) and (local(tensor) < 0).any():
        raise ValueError(f"the state dict's {key!r} of {name} holds numbers below zero; load an earlier one")


def listed(names: Iterable[Any]) -> str:
    """Names for a message, quoted."""
    return ", ".join(repr(name) for name in names)
