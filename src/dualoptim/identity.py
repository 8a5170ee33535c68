"""What a model is: a hash of its weights and settings, and of all that makes its replies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from .hashes import digest, of_tokenizer


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of a model's weights and configuration, and of its adapters' settings, such as their scale."""
    digest = hashlib.sha256(repr(getattr(model, "config", None)).encode())
    if adapters := getattr(model, "peft_config", None):
        digest.update(json.dumps([_settings(adapters), _switches(model)], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def identity(model: torch.nn.Module, tokenizer: Any) -> str:
    """A hash of what makes a model's replies: weights, configuration, end tokens, tokenizer and chat template."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    template = getattr(tokenizer, "chat_template", None)
    return digest([fingerprint(model), ends, of_tokenizer(tokenizer), template])


def _settings(adapters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of adapters, without where they come from and what they are loaded for."""
    left_out = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
    return {
        name: {
            key: sorted(value) if isinstance(value, (set, frozenset)) else value
            for key, value in config.to_dict().items()
            if key not in left_out
        }
        for name, config in adapters.items()
    }


def _switches(model: torch.nn.Module) -> list[tuple[Any, ...]]:
    """By each layer with adapters, their scales as they are now, which are active, and whether they are off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        (name, getattr(module, "scaling", None), module.active_adapters, module.disable_adapters)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
