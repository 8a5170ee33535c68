"""Whether a model, its reference, its optimizer and its rows fit together; what does not is refused before training."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..data import Tokens, collate
from ..errors import UserError
from ..losses import Loss
from ..losses.base import model_inputs
from ..models import text_config
from ..optim import DualOptimPlus
from .reference import AtStart, evaluating, is_whole, partly_trained

logger = logging.getLogger(__name__)

SAMPLED = 1024  # numbers of each frozen parameter that tell it from another


def check_trained(model: nn.Module, reference: Any) -> None:
    """Refuse a model of which nothing is trained, and a reference that would change with the model."""
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise UserError(
            "model: none of its parameters requires a gradient, so nothing would be trained; load an adapter with "
            "is_trainable=True, or set requires_grad"
        )
    if isinstance(reference, nn.Module) and not isinstance(reference, AtStart):
        shared = next((trained[id(p)] for p in reference.parameters() if id(p) in trained), None)
        if shared is not None:
            raise UserError(
                f"reference: it shares {shared} with the model, so it would change with it; give a copy made before "
                "(copy.deepcopy), or leave it out where only a part of the model is trained"
            )


def check_precision(model: nn.Module, optimizer: Any) -> None:
    """Refuse to train weights in fp16; log that most updates of bf16 weights are lost where they round to the nearest.

    Args:
        optimizer: an optimizer, its class and arguments, or None for a Trainer's own.
    """
    halves = {p.dtype: name for name, p in reversed(list(model.named_parameters())) if p.requires_grad}
    if (name := halves.get(torch.float16)) is not None:
        raise UserError(
            f"model: {name} is in float16, in which small updates are lost and others overflow; load the model with "
            "dtype=torch.float32, and give fp16=True for computing in fp16"
        )
    cls, arguments = optimizer if isinstance(optimizer, tuple) else (type(optimizer), {})
    groups = getattr(optimizer, "param_groups", [arguments])
    ours = isinstance(cls, type) and issubclass(cls, DualOptimPlus)  # what makes an optimizer may be a function
    rounds = not ours or not all(g.get("stochastic_rounding", True) for g in groups)
    if (name := halves.get(torch.bfloat16)) is not None and rounds:
        logger.warning(
            "%s is in bfloat16, and the optimizer rounds to the nearest, so that updates below 1/500 of a weight are "
            "lost; load the model with dtype=torch.float32, or take DualOptimPlus, which rounds stochastically",
            name,
        )


def check_reached(model: nn.Module, losses: Mapping[str, Loss]) -> None:
    """Refuse a loss that no trained parameter changes: it would have no gradient.

    Where a part of the model is frozen, two tokens are run to find out. A model that is spread over ranks is not. One
    without weights is run on tensors without values; if its code needs these, it is not checked.
    """
    trained = next((name for name, p in model.named_parameters() if p.requires_grad), None)
    without_weights = any(p.is_meta for p in model.parameters())
    if trained is None or not partly_trained(model) or not (without_weights or all(map(is_whole, model.parameters()))):
        return
    layers = {name: getattr(loss, "layer", None) for name, loss in losses.items()}
    asked = {"output_hidden_states": True} if set(layers.values()) - {None} else {}
    # On tensors without values, torch multiplies by several experts' weights in bf16 alone.
    run = copy.deepcopy(model).bfloat16() if without_weights else model
    mode = FakeTensorMode(allow_non_fake_inputs=True) if without_weights else nullcontext()
    try:
        with mode, evaluating(run), torch.enable_grad():
            ids = torch.ones(1, 2, dtype=torch.int64, device=next(run.parameters()).device)
            out = run(**model_inputs(run, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}), **asked)
    except Exception:
        if without_weights:
            return
        raise
    for name, layer in layers.items():
        if not (out.logits if layer is None else out.hidden_states[layer + 1]).requires_grad:
            what, other = ("the logits", "") if layer is None else (f"layer {layer}", ", or give a later layer")
            raise UserError(
                f"the loss of {name!r}, {type(losses[name]).__name__}, is computed from {what}, which none of the "
                f"trained parameters changes (the first is {trained}); train some that do{other}"
            )


def check_checkpointing(model: nn.Module) -> None:
    """Refuse to recompute the activations of a model whose class of Transformers cannot."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not getattr(inner, "supports_gradient_checkpointing", False):
        raise UserError(
            f"gradient_checkpointing: {type(inner).__name__} cannot recompute its activations in the backward pass; "
            "leave it out"
        )


def check_router(model: nn.Module) -> None:
    """Log that the loss which balances a mixture's experts, where the configuration asks for it, is not trained on."""
    text = text_config(model)
    if getattr(text, "output_router_logits", False) and getattr(text, "router_aux_loss_coef", None) != 0:
        logger.warning(
            "%s asks for the loss that balances its experts (output_router_logits), which is not added here: only the "
            "losses of the objectives are trained on",
            type(text).__name__,
        )


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of most of a model's weights: an adapter on weights in bf16 is in fp32, and 4 bits are no numbers."""
    counts = Counter[torch.dtype]()
    for p in model.parameters():
        if p.is_floating_point():
            counts[p.dtype] += p.numel()
    return counts.most_common(1)[0][0]


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Refuse an optimizer that holds none of the parameters that are trained; log those that it lacks."""
    held = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
    trained = {name: id(p) for name, p in model.named_parameters() if p.requires_grad}
    lacking = [name for name, key in trained.items() if key not in held]
    if len(lacking) == len(trained):
        raise UserError(
            "optimizers: the optimizer holds none of the model's trained parameters; make it of the model as it is "
            "handed over, after an adapter is added or the model is moved"
        )
    if lacking:
        logger.warning("the optimizer lacks %d trained parameters, which stay: %s first", len(lacking), lacking[0])


def check_vocabulary(model: nn.Module, reference: Any) -> None:
    """Refuse a reference with another number of outputs than the model, where a loss compares all of them."""
    sizes = [_outputs(each) for each in (model, reference)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise UserError(
            f"reference: its vocabulary has {sizes[1]} tokens and the model's {sizes[0]}; give a copy of the model as "
            "it is trained, with the same embeddings"
        )


def _outputs(model: Any) -> int | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(head, "out_features", None)


def check_ids(where: str, tokens: Tokens, vocabulary: int | None, tokenizer: Any) -> None:
    """Refuse a row with a token that a model of so many does not have; None for any number."""
    if vocabulary is not None and (most := max(tokens.input_ids)) >= vocabulary:
        raise UserError(
            f"{where}: holds the token {tokenizer.convert_ids_to_tokens(most)!r}, number {most}, and the model has "
            f"{vocabulary}; resize its embedding, or take its own tokenizer"
        )


def check_counted(where: str, tokens: Tokens, loss: Loss) -> None:
    """Refuse a row of which a loss counts nothing: it would not be learned, and a step of such rows has no mean."""
    if not loss.needs_idk and not loss.size(collate([tokens], 0)):
        raise UserError(
            f"{where}: the loss {loss} counts none of this answer's labeled tokens, so the row would not be trained "
            "on; change the loss's arguments, take another loss, or leave the row out"
        )


def check_sides(name: str, rows: Sequence[Tokens], switch: int) -> None:
    """Warn where LongRoPE would turn an objective's rows by other factors, depending on what is beside them."""
    if len({len(row.input_ids) > switch for row in rows}) > 1:
        logger.warning(
            "%s: some rows have more than %d tokens, and in a batch with them LongRoPE turns the others, too, by its "
            "long factors; shorten the longer rows",
            name,
            switch,
        )


def vocabulary_of(model: Any) -> int | None:
    """The number of tokens that a model has an embedding of; None where it does not say."""
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return getattr(table, "num_embeddings", None)


def frozen(model: nn.Module) -> str | None:
    """A hash of what is not trained of a model, of so many numbers of each parameter; None where all is trained.

    None also where it is spread over ranks. With other frozen weights a checkpoint's adapter is another model.
    """
    digest, some = hashlib.sha256(), False
    for name, p in model.named_parameters():
        if not is_whole(p):
            return None
        if not p.requires_grad:
            some = True
            values = p.detach().flatten()
            picked = values[:: max(1, values.numel() // SAMPLED)].cpu()
            numbers = picked.double() if picked.is_floating_point() else picked.long()
            digest.update(f"{name} {tuple(p.shape)}".encode() + numbers.numpy().tobytes())
    return digest.hexdigest() if some else None


def settings_of(optimizer: Any, given: tuple[Any, Mapping[str, Any]] | None) -> list[Any]:
    """The class and settings of an optimizer that is given, made or to be made."""
    if given is not None:
        return [getattr(given[0], "__name__", str(given[0])), dict(given[1])]
    groups = getattr(optimizer, "param_groups", [])
    return [type(optimizer).__name__, [{k: v for k, v in group.items() if k != "params"} for group in groups]]
