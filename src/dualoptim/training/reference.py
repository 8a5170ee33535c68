"""The model before training as the reference, at the cost of one copy of the trainable parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import base_of
from ..errors import UserError


class AtStart(nn.Module):
    """A model as it is now, as the reference while a part of it is trained; keeps a copy of that part.

    In every call, the copies replace the trained parameters, and dropout is off. So it gives the original model,
    whatever its adapters are, one or several, new or trained, and also if other parameters are trained as well.

    Args:
        model: only a part of it is trained; it may be sharded later, by `fully_shard`.
        optimizer: what it holds is kept, too, as it may be trained later; None for the parameters that require a
            gradient alone.

    Raises:
        UserError: in a call, a parameter is trained by now that was not.
    """

    module: Any

    def __init__(self, model: nn.Module, optimizer: Any = None) -> None:
        super().__init__()
        held = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
        self.__dict__["module"] = model  # not registered, or it would be saved and moved twice
        self.copies = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad or id(p) in held
        }
        self._shards: dict[str, Tensor] = {}  # this rank's shards of the copies

    @torch.no_grad()
    def forward(self, **inputs: Any) -> Any:
        self._reshard()
        now = dict(self.module.named_parameters())
        if (
            new := next((name for name, p in now.items() if p.requires_grad and name not in self.copies), None)
        ) is not None:
            raise UserError(
                f"reference: {new} was frozen when training was set up and is trained now, so its start was not kept; "
                "unfreeze it before, let the optimizer that is given hold it, or give reference=…, a frozen copy"
            )
        places = {name: p for name, p in now.items() if name in self.copies}
        if any(hasattr(p, "ds_id") for p in places.values()):  # DeepSpeed partitions these itself
            raise ValueError("under ZeRO-3 no copy can stand in for what is trained; give reference=…, a frozen model")
        sharded = {name: p for name, p in places.items() if hasattr(p, "device_mesh")}
        whole = {name: self._on(name, p.device) for name, p in places.items() if name not in sharded}
        with evaluating(self.module), self._put_back(sharded):
            return torch.func.functional_call(self.module, whole, (), inputs)

    def _on(self, name: str, device: torch.device) -> Tensor:
        self.copies[name] = self.copies[name].to(device)
        return self.copies[name]

    @contextmanager
    def _put_back(self, sharded: Mapping[str, Any]) -> Iterator[None]:
        """A context in which shards hold their values at the start: gathering would undo any other replacement."""
        if not sharded:
            yield
            return
        from torch.distributed.tensor import distribute_tensor

        for name, p in sharded.items():
            if name not in self._shards:
                copied = distribute_tensor(self._on(name, p.device), p.device_mesh, p.placements)
                self._shards[name] = copied.to_local()
        now = {name: p.to_local().clone() for name, p in sharded.items()}
        try:
            for name, p in sharded.items():
                p.to_local().copy_(self._shards[name])
            yield
        finally:
            for name, p in sharded.items():
                p.to_local().copy_(now[name])
            self._reshard()

    def _reshard(self) -> None:
        """Free what was gathered from shards, or it would be used in place of what they hold later."""
        for module in self.module.modules():
            if callable(reshard := getattr(module, "reshard", None)):
                reshard()


def is_whole(p: Tensor) -> bool:
    """Whether this process has all values of a parameter: it is not spread over ranks, nor without weights."""
    return not (p.is_meta or hasattr(p, "ds_id") or hasattr(p, "device_mesh"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode; afterwards each module is in its mode before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def at_start(model: nn.Module, wanted: set[str], optimizer: Any = None) -> AtStart | None:
    """The model at the start, if losses need it and only a part of it is trained; else None.

    An adapter is small, so it is kept wherever a loss compares with the reference in any way.

    Args:
        model: the model.
        wanted: what losses need of a reference.
        optimizer: one that is given, as for `AtStart`.
    """
    compares = "model" in wanted or ("sequences" in wanted and hasattr(model, "peft_config"))
    return AtStart(model, optimizer) if compares and partly_trained(model) else None


def partly_trained(model: nn.Module | str) -> bool:
    """Whether only a part of a model is trained; for a model given by name, whether it is an adapter."""
    if isinstance(model, str):
        return base_of(model) is not None
    return any(not p.requires_grad for p in model.parameters())
