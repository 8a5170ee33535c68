"""What others put around a model: it is trained and saved under its own parameters' names, or refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UserError

COMPILED = "_orig_mod"  # where `torch.compile(module)` keeps the module
PREPARED = "_original_forward"  # where accelerate keeps a module's own forward beside one that computes in autocast


def compiled_in_place(model: nn.Module) -> nn.Module:
    """A model without the modules that `torch.compile` puts around it or its parts, and compiled as it was.

    Those modules change the names of the parameters, under which `from_pretrained` and PEFT would not find them. The
    modules within are compiled by the same backend, with the same arguments, as `nn.Module.compile` does it.
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and COMPILED in child._modules:
                parent._modules[name] = _within(child)
    return _within(model) if COMPILED in model._modules else model


def _within(wrapper: Any) -> nn.Module:
    inner: Any = wrapper._modules[COMPILED]
    inner._compiled_call_impl = wrapper.dynamo_ctx(inner._call_impl)
    return inner


def bare(model: nn.Module) -> nn.Module:
    """A model that is compiled in place, if at all; any other wrapper is refused."""
    model = compiled_in_place(model)
    inner = getattr(model, "module", None)
    if isinstance(inner, nn.Module) and set(inner.parameters()) >= set(model.parameters()):
        raise UserError(
            f"model: is wrapped in {type(model).__name__}, under which its parameters are saved by other names; hand "
            "over the model itself"
        )
    return model


def unprepare(model: nn.Module) -> None:
    """Undo what accelerate makes of a model for training in autocast, which it leaves there for good.

    A second trainer would else go on in the precision of the first, as accelerate prepares no model twice.
    """
    for module in _prepared(model):
        module.forward = module._original_forward
        del module._original_forward
        module._is_accelerate_prepared = False


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """A context in which a model computes in the precision of the caller, also where accelerate has prepared it."""
    forwards = [(module, module.forward) for module in _prepared(model)]
    try:
        for module, _ in forwards:
            module.forward = module._original_forward
        yield
    finally:
        for module, forward in forwards:
            module.forward = forward


def _prepared(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if PREPARED in vars(module)]


def check_saved(model: Any, folder: Path) -> None:
    """Refuse to go on where the files that one process saved a model in lack a parameter that is trained.

    Only names and shapes are read. An adapter's names in files are those in the model without the adapter's own name.
    Some models are saved by other names than their own; then the values under such names are counted.
    """
    adapters = getattr(model, "peft_config", None) or {}
    written = dict(_written(folder, "adapter_model" if adapters else "model", adapters))
    if any(config.is_prompt_learning for config in adapters.values()) and written:
        return  # PEFT saves the virtual tokens, and not the parameters that it makes them of
    if adapters:
        aside = {*adapters, "modules_to_save", "weight"}
        written = {_without(name, aside): count for name, count in written.items()}
    else:
        aside = {COMPILED}  # a name in a file that has it is not found again
    names: dict[Any, list[str]] = {}  # of a parameter: several where it is tied, of which one is saved
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(_without(name, aside))
    lacking = {
        given[0]: p.numel() for p, given in names.items() if p.requires_grad and not any(n in written for n in given)
    }
    own = {name for given in names.values() for name in given}
    renamed = [
        count for name, count in written.items() if not adapters and name not in own and COMPILED not in name.split(".")
    ]
    if sum(lacking.values()) > sum(renamed):
        mend = "name it in the adapter's modules_to_save, or freeze it" if adapters else "hand over the model itself"
        raise UserError(f"{folder}: what was saved lacks {next(iter(lacking))}, which is trained; {mend}")


def _without(name: str, parts: set[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in parts)


def _written(folder: Path, stem: str, adapters: Iterable[str]) -> Iterator[tuple[str, int]]:
    """The names in a folder's safetensors files, by their headers, each with its number of values."""
    places = [folder, *(folder / name for name in adapters)]  # PEFT has a folder for each but its own "default"
    for path in (path for place in places for path in place.glob(f"{stem}*.safetensors")):
        with path.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, math.prod(entry["shape"])
