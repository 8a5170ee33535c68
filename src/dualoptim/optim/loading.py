"""Make a state dict fit an optimizer: moments are converted to its precision, or copied if they have it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import state
from .state import BASE, CODES, DELTA, DELTA_STEP, STEP, Stored, bits_of, code_of, counter, has_values, kept
from .validation import BY_OBJECTIVE, KEPT_ON_LOAD, check_loadable


@dataclass(frozen=True)
class Loaded:
    """A parameter's state, wrapped so that torch's `load_state_dict` does not look into it."""

    state: dict[str, Any]


def prepared(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict that fits an optimizer, with copies of the states in the optimizer's precision."""
    groups, settings = optimizer.param_groups, []
    loadable = check_loadable(state_dict, groups, optimizer.objectives)
    states, converted = dict(state_dict["state"]), 0
    for own, saved, checked in zip(groups, state_dict["param_groups"], loadable, strict=True):
        for key in BY_OBJECTIVE:
            checked[key] = {**own[key], **checked[key]}
        settings.append({**saved, **checked, **{key: own[key] for key in KEPT_ON_LOAD}})
        for param, index in zip(own["params"], saved["params"], strict=True):
            if states.get(index):
                states[index], changed = _loaded(state_dict["state"][index], param, own)
                converted += changed
            else:  # torch's tools make an entry for a parameter that has never had a gradient
                states.pop(index, None)
    if converted:
        warnings.warn(
            f"the state dict holds moments in other precisions: {converted} were converted to this optimizer's "
            "base_bits and delta_bits",
            stacklevel=4,
        )
    return {**state_dict, "state": states, "param_groups": settings}


def _loaded(saved: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]) -> tuple[Loaded, int]:
    """A copy of a parameter's saved state in this optimizer's precision, and how many moments were converted."""
    own: dict[str, Any] = {}
    changed, with_base = 0, group["base_betas"] is not None
    for key, value in saved.items():
        kind = str(key).partition("/")[0]
        if kind == CODES:
            key = key.partition("/")[2]
            kind = key.partition("/")[0]
        if kind in (*DELTA, *BASE):
            bits, stored = bits_of(param, group, key), kept(saved, key)
            changed += state.stored_bits(stored) != bits
            if isinstance(stored, dict):
                codes, scales = stored["codes"], stored["scales"]
                moved: Stored = {"codes": _copied(codes, param), "scales": _copied(scales, param, torch.float32)}
            else:
                moved = _copied(stored, param, state.precision(param))
            state.keep(own, key, state.converted(moved, param, bits, code_of(key, with_base=with_base)))
        elif kind in (STEP, DELTA_STEP):
            valued = not isinstance(value, Tensor) or has_values(value)
            own[key] = counter(param).fill_(int(value)) if valued else value.to(torch.int64, copy=True).reshape(())
        elif kind != state.SCALES:  # an entry that is not this optimizer's
            own[key] = _copied(value, param) if isinstance(value, Tensor) else copy.deepcopy(value)
    return Loaded(own), changed


def _copied(tensor: Tensor, param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy on the parameter's device, in row-major order."""
    moved = tensor.detach().to(param.device, dtype or tensor.dtype, copy=True)
    return moved.clone(memory_format=torch.contiguous_format)
