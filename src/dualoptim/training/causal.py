"""Whether a model is causal: whether its output at a position depends on the tokens up to it alone."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UserError
from ..losses.base import model_inputs
from .reference import evaluating, is_whole


def check_causal(model: Any, what: str = "model") -> None:
    """Refuse a model whose output at a position depends on the tokens after it, or that has an encoder.

    It would be trained and scored on tokens that it sees. Two short inputs that differ in the last token are run. A
    model that is spread over ranks, or has no weights yet, is not.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{what}: {type(model).__name__} has an encoder and a decoder; take a causal language model")
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if table is None or not all(map(is_whole, model.parameters())) or getattr(table, "num_embeddings", 0) < 4:
        return
    ids = torch.tensor([[1, 2, 3, 1], [1, 2, 3, 2]], device=table.weight.device)
    with torch.no_grad(), evaluating(model):
        given = model_inputs(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        logits = model(**given).logits[:, -4:-1]
    furthest, size = (logits[0] - logits[1]).abs().max(), logits.abs().max()
    if furthest > (1e-4 if logits.dtype == torch.float32 else 1e-2) * size:
        raise UserError(
            f"{what}: {type(model).__name__} sees the tokens after a position, so that it would be trained on what it "
            "sees; take a causal language model, or for one of BERT's kind set is_decoder in its configuration"
        )
