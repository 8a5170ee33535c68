"""Checkpoints of sharded models, written and read so that one process, DDP and FSDP2 read each other's.

A *full* checkpoint is what one process writes: the model by `save_pretrained`, and ``optimizer.pt``, keyed by the
parameters' indices. A *sharded* one is accelerate's: a folder of `torch.distributed.checkpoint` for the model, or only
its adapter, and one for the optimizer, keyed by the parameters' names. Both are read on any number of ranks.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load

from ..optim.validation import check_same_groups

MODEL, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"  # folders of accelerate's


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint is a sharded one."""
    return (folder / MODEL).is_dir()


def full_model(model: nn.Module) -> dict[str, Tensor]:
    """A sharded model's weights on the CPU of rank 0; with an adapter, only the trainable ones. Every rank calls it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=_has_adapter(model))
    return {name: _plain(tensor) for name, tensor in get_model_state_dict(model, options=options).items()}


def full_optimizer(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """A sharded optimizer's state dict on the CPU of rank 0, as one process would have it; every rank calls it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved: Any = get_optimizer_state_dict(model, optimizer, options=options)
    if not saved:  # this is another rank
        return {}
    groups, state = saved["param_groups"], saved["state"]
    places = {name: place for place, name in enumerate(name for group in groups for name in group["params"])}
    return {
        "state": {places[name]: {key: _plain(value) for key, value in own.items()} for name, own in state.items()},
        "param_groups": [{**group, "params": [places[name] for name in group["params"]]} for group in groups],
    }


def load_model(model: nn.Module, folder: Path, *, first: bool) -> None:
    """Load a checkpoint's model into a model that is sharded in another way; every rank calls it.

    Args:
        model: of one process, of DDP before it is wrapped, or of FSDP2.
        folder: the checkpoint.
        first: whether this is rank 0; only rank 0 reads a full checkpoint.
    """
    if is_sharded(folder):
        if _has_adapter(model):
            from peft import get_peft_model_state_dict, set_peft_model_state_dict

            set_peft_model_state_dict(model, _load(folder / MODEL, "model", get_peft_model_state_dict(model)))
        else:
            set_model_state_dict(model, _load(folder / MODEL, "model", get_model_state_dict(model)))
        return
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=not _has_adapter(model))
    weights: dict[str, Any] = _weights(model, folder) if first else {}
    set_model_state_dict(model, weights, options=options)


def load_optimizer(model: nn.Module, optimizer: Any, folder: Path, *, first: bool) -> None:
    """Load a checkpoint's optimizer into that of a model that is sharded in another way; every rank calls it."""
    if is_sharded(folder):
        absent = _load_shards(model, optimizer, folder)
    else:
        absent = _load_full(model, optimizer, folder, first=first)
    parameters = dict(model.named_parameters())
    for name in absent:  # for which torch made a state of zeros
        optimizer.state.pop(parameters[name], None)


def _load_shards(model: nn.Module, optimizer: Any, folder: Path) -> list[str]:
    """Load a sharded checkpoint's optimizer; the names of parameters without a state, as they never had a gradient."""
    template: Any = get_optimizer_state_dict(model, optimizer)  # has a state for every parameter
    there = FileSystemReader(folder / OPTIMIZER).read_metadata().state_dict_metadata
    states = template["state"]
    absent = [name for name, own in states.items() if not any(f"optimizer.state.{name}.{key}" in there for key in own)]
    for name in absent:
        del states[name]
    saved = _load(folder / OPTIMIZER, "optimizer", template)
    set_optimizer_state_dict(model, optimizer, saved, options=StateDictOptions(strict=False))
    return absent


def _load_full(model: nn.Module, optimizer: Any, folder: Path, *, first: bool) -> list[str]:
    """As `_load_shards`, of a full checkpoint, which rank 0 reads."""
    saved: dict[str, Any] = {}
    outcome: list[Any] = [None, []]  # its failure, or the names
    if first:
        try:
            read = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            saved = _by_name(read, model, optimizer)
            names = [name for group in saved["param_groups"] for name in group["params"]]
            outcome[1] = [name for name in names if name not in saved["state"]]
        except Exception as error:
            outcome[0] = error
    dist.broadcast_object_list(outcome)
    failure, absent = outcome
    if failure is not None:
        raise failure
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_optimizer_state_dict(model, optimizer, saved, options=options)
    return list(absent)


def _load(folder: Path, name: str, into: dict[str, Any]) -> dict[str, Any]:
    """Load a folder of `torch.distributed.checkpoint` into tensors of the same shapes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # one process
        load({name: into}, checkpoint_id=folder)
    return into


def _weights(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """A full checkpoint's weights under the model's own names."""
    if not _has_adapter(model):
        weights = _read(folder, "model*.safetensors")
        tied: dict[int, list[str]] = {}  # of tied parameters, files hold only one name
        for name, parameter in model.named_parameters(remove_duplicate=False):
            tied.setdefault(id(parameter), []).append(name)
        for names in tied.values():
            weights.update({name: weights[there] for there in names if there in weights for name in names})
        return weights
    from peft import get_peft_model_state_dict

    own = model.state_dict()
    names_of = {id(tensor): name for name, tensor in own.items()}
    names_in_file = get_peft_model_state_dict(model, state_dict=own)
    return {names_of[id(names_in_file[name])]: tensor for name, tensor in _read(folder, "adapter_model*").items()}


def _read(folder: Path, files: str) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob(files)) for name, tensor in load_file(path).items()}


def _by_name(saved: dict[str, Any], model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """An optimizer's saved state dict, keyed by the parameters' names in place of their indices."""
    check_same_groups(saved["param_groups"], optimizer.param_groups)
    names_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[Any] = []
    names: dict[Any, str] = {}
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        called = [names_of[id(parameter)] for parameter in own["params"]]
        names.update(zip(group["params"], called, strict=True))
        groups.append({**group, "params": called})
    return {"state": {names[place]: own for place, own in saved["state"].items()}, "param_groups": groups}


def _has_adapter(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def _plain(value: Any) -> Any:
    """A plain copy of a tensor that a collective operation left wrapped, as on CPUs; any other value as it is."""
    return value.clone() if isinstance(value, Tensor) and type(value) is not Tensor else value
