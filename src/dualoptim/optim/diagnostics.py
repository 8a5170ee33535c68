"""How far the objectives agree, read from an optimizer's state: conflict, cancellation, update sizes.

The update rule does not measure this. The numbers are computed from evenly spaced blocks of each tensor, about two
thousand coordinates, so that they cost little compared with a step: shares and cosines are estimates, and norms are
scaled up to the whole tensor. Reading them waits for the GPU. With distributed tensors each rank reads its own part,
and all ranks get the numbers of the whole.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import state
from .optimizer import multi_objective
from .parts import place_of
from .rule import FLOOR
from .state import BASE, CODES, DELTA, DELTA_STEP, STEP, Stored, code_of, kept, local, of

Key = tuple[str, int]  # of a rank's part: the parameter's name, and the index of its first element in the whole
Entry = tuple[Key, Tensor, dict[str, Any], Mapping[str, Any]]  # a part, its parameter, that one's state and group
Sums = dict[tuple[str, ...], float]  # key: the quantity summed and its objectives
BLOCKS, WIDTH = 8, 256  # blocks read from each tensor, and coordinates in each


@torch.no_grad()
def diagnostics(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]] | None = None
) -> dict[str, dict[str, float]]:
    r"""Measures of each layer, layer → measure → value, and under ``"all"`` the same over all layers.

    Let u_o be the update of objective o from the current state, before the bound and the learning rate; in 8 bits, with
    the rule's floor under its second moment. The measures are

    - ``cosine/a/b``: cos(u_a, u_b), both clamped to [−1, 1], over the parameters that both have stepped: 1 where two
      objectives agree, −1 where they are opposed; none for objectives without such a parameter;
    - ``cancelling/o``: share of coordinates where v_o + v_B is negative, so that the update's size means little;
    - ``update/o``: root mean square of u_o after the step's bound; ``largest/o``: the largest \|u_o\|, without it;
    - ``delta_norm/o`` and ``base_norm``: Euclidean norms of the first moments, bias-corrected.

    Args:
        optimizer: a `DualOptimPlus` that has stepped, also if it is wrapped, as by accelerate; objectives that have not
            stepped yet are left out. If its parameters are distributed tensors, every rank of its `process_group` must
            call this function.
        named_parameters: the model's, which name the layers; without it, each parameter is a layer named by its index.

    Raises:
        ValueError: the optimizer has no objectives.

    Example:
        >>> from dualoptim import DualOptimPlus
        >>> weight = torch.nn.Parameter(torch.ones(4))
        >>> opt = DualOptimPlus([weight], objectives=("forget", "retain"))
        >>> for objective, sign in (("forget", 1.0), ("retain", -1.0)):
        ...     weight.grad = torch.full((4,), sign)
        ...     opt.step(objective=objective)
        >>> round(diagnostics(opt, [("head.weight", weight)])["head"]["cosine/forget/retain"], 6)
        -1.0
    """
    if (several := multi_objective(optimizer)) is None:
        raise ValueError(
            f"diagnostics: {type(optimizer).__name__} has no objectives; give a DualOptimPlus or DualOptim"
        )
    optimizer = several
    names = {id(param): name for name, param in named_parameters or ()}
    layer_of = _layers(names.values())
    layers: dict[str, list[Entry]] = {}
    index = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            own = optimizer.state.get(param)
            if own:
                layer = layer_of[names[id(param)]] if id(param) in names else f"parameter {index}"
                key = (names.get(id(param), str(index)), place_of(param).first)
                layers.setdefault(layer, []).append((key, param, own, group))
            index += 1
    distributed = any(hasattr(param, "to_local") for entries in layers.values() for _, param, _, _ in entries)
    # A part of which several ranks have copies is added up once: each of them adds its share.
    keys = [key for entries in layers.values() for key, param, _, _ in entries if local(param).numel()]
    copies = Counter(itertools.chain(*_gathered(keys, optimizer.process_group)) if distributed else keys)
    sums = {layer: _sums(entries, optimizer.objectives, copies) for layer, entries in layers.items()}
    if distributed:
        parts = _gathered(sums, optimizer.process_group)
        sums = {layer: _added(part.get(layer, {}) for part in parts) for layer in sums}
    sums["all"] = _added(sums.values())
    return {layer: _measures(part) for layer, part in sums.items() if part}


def _added(parts: Iterable[Sums]) -> Sums:
    """The sums of several layers, or of one layer's parts on several ranks, added up."""
    total: Sums = {}
    for part in parts:
        for key, value in part.items():
            total[key] = max(total.get(key, 0.0), value) if key[0] == "largest" else total.get(key, 0.0) + value
    return total


def _gathered(value: Any, group: Any) -> list[Any]:
    """What each rank has."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _layers(names: Iterable[str]) -> dict[str, str]:
    """Each parameter's layer, such as "layers.3": its first part with a number, else its name without the last part.

    What stands before is left out unless layers of two parts of a model would then have one name.
    """
    whole, short = {}, {}
    for name in names:
        numbered = re.match(r"(.*?\.)?(\w+\.\d+)(?=\.|$)", name)
        whole[name] = numbered[0] if numbered else name.rpartition(".")[0] or name
        short[name] = numbered[2] if numbered else whole[name].removeprefix("model.")
    meant: dict[str, set[str]] = {}
    for name, layer in short.items():
        meant.setdefault(layer, set()).add(whole[name])
    return {name: layer if len(meant[layer]) == 1 else whole[name] for name, layer in short.items()}


def _sums(entries: list[Entry], objectives: tuple[str, ...], copies: Mapping[Key, int]) -> Sums:
    """The sums over a layer's coordinates that the measures are computed from."""
    parts: dict[tuple[str, ...], list[Tensor]] = {}

    def add(*key: str, value: Tensor) -> None:
        parts.setdefault(key, []).append(value.double())

    for part, param, own, group in entries:
        with_base = group["base_betas"] is not None
        # No elements on this rank, or a state that was made without a step, as torch.distributed.checkpoint makes it.
        if not local(param).numel() or not int(own.get(STEP, 0)):
            continue
        scale = local(param).numel() / min(local(param).numel(), _sampled(local(param))) / copies[part]

        def read(
            key: str, beta: float, steps: Tensor, own: Mapping[str, Any] = own, with_base: bool = with_base
        ) -> Tensor:
            return _sample(local(kept(own, key)), key, with_base) / (1 - beta ** int(steps))

        nothing = torch.zeros((), dtype=torch.float32, device=local(param).device)
        base = [nothing, nothing]
        if with_base:
            base = [read(name, beta, own[STEP]) for name, beta in zip(BASE, group["base_betas"], strict=True)]
            add("base", value=scale * base[0].square().sum())
        updates = {}
        for objective in (name for name in objectives if int(own.get(of(DELTA_STEP, name), 0))):
            mean, square = (
                read(of(name, objective), beta, own[of(DELTA_STEP, objective)])
                for name, beta in zip(DELTA, group["betas"], strict=True)
            )
            add("delta", objective, value=scale * mean.square().sum())
            square = square + base[1]
            size = square.abs()
            if any(f"{CODES}/{key}" in own for key in (of(DELTA[1], objective), BASE[1])):
                size = torch.maximum(size, base[1] * FLOOR)
            update = (mean + base[0]) / (size.sqrt() + group["eps"])
            bounded = update if group["max_update"] is None else update.clamp(-group["max_update"], group["max_update"])
            updates[objective] = update
            add("count", objective, value=torch.full_like(nothing, scale * len(update), dtype=torch.float64))
            add("negative", objective, value=scale * (square < 0).sum())
            add("bounded", objective, value=scale * bounded.square().sum())
            add("largest", objective, value=update.abs().max())
        for a, b in itertools.combinations(updates, 2):
            one, other = updates[a].clamp(-1, 1), updates[b].clamp(-1, 1)
            add("product", a, b, value=scale * (one * other).sum())
            add("square", a, b, value=scale * one.square().sum())
            add("square", b, a, value=scale * other.square().sum())
    return {
        key: float(torch.stack(values).max() if key[0] == "largest" else torch.stack(values).sum())
        for key, values in parts.items()
    }


def _measures(sums: Sums) -> dict[str, float]:
    measures = {"base_norm": math.sqrt(sums["base",])} if ("base",) in sums else {}
    objectives = [key[1] for key in sums if key[0] == "count"]
    for name in objectives:
        measures[f"cancelling/{name}"] = sums["negative", name] / sums["count", name]
        measures[f"update/{name}"] = math.sqrt(sums["bounded", name] / sums["count", name])
        measures[f"largest/{name}"] = sums["largest", name]
        measures[f"delta_norm/{name}"] = math.sqrt(sums["delta", name])
    for a, b in (key[1:] for key in sums if key[0] == "product"):
        norm = math.sqrt(sums["square", a, b] * sums["square", b, a])
        measures[f"cosine/{a}/{b}"] = sums["product", a, b] / norm if norm else 0.0
    return measures


def _sampled(tensor: Tensor) -> int:
    """How many coordinates are read from a tensor."""
    return min(tensor.numel(), BLOCKS * WIDTH)


def _sample(stored: Stored, name: str, with_base: bool) -> Tensor:
    """The values of a moment at the coordinates that are read."""
    values = stored["codes"] if isinstance(stored, dict) else stored
    length, flat = state.rows_of(values)[1], values.detach().reshape(-1)
    places = torch.arange(min(len(flat), BLOCKS * WIDTH), dtype=torch.int64, device=values.device)
    if len(flat) > len(places):
        places = places // WIDTH * (len(flat) // BLOCKS) + places % WIDTH
    if not isinstance(stored, dict):
        return flat[places]
    per_row = stored["scales"].shape[1]
    scales = stored["scales"].reshape(-1)[places // length * per_row + places % length // state.BLOCK]
    return state.decode(flat[places].float(), scales, code_of(name, with_base=with_base))
