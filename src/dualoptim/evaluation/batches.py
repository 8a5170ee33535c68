"""How a model is run on many rows: precision, and which rows share a batch.

Rows of similar length do, as far as the model gives each row beside others what it gives it alone. Batches are shared
out over the ranks of a run, and each rank gets all results; the number of ranks changes no batch, and so no number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

from .. import ranks
from ..adapters import computing_in
from ..device import in_chosen_precision, scores_in_bf16
from ..training.reference import evaluating
from ..training.wrappers import own_forward

GPU_MEMORY = 16 * 2**30  # for each so many bytes that a GPU has, a batch has as many tokens
PADDING, TRIED_TOKENS = 16, 3  # with how many tokens of padding, and of a reply, a model is tried in a batch

R = TypeVar("R")


@contextmanager
def as_scored(model: nn.Module) -> Iterator[torch.device]:
    """A context in which a model is scored: in the precision that is chosen, whatever a Trainer has made of it.

    Without dropout and gradients; afterwards each module is as before. Gives the model's device.
    """
    device = next(model.parameters()).device
    # Autocast keeps what it has cast of a weight only if the weight requires a gradient, and not in inference mode; it
    # would else cast all weights for every token of a reply. FSDP2, whose parameters are DTensors, casts them itself.
    frozen = [
        p for p in model.parameters() if p.is_floating_point() and not p.requires_grad and not hasattr(p, "to_local")
    ]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with (
            own_forward(model),
            computing_in(model, scores_in_bf16()),
            evaluating(model),
            torch.no_grad(),
            in_chosen_precision(device),
        ):
            yield device
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def at_once(tokens: int, device: torch.device) -> int:
    """The tokens of a batch: more on a GPU, in the measure of all its memory, as what is free may differ next time."""
    if device.type != "cuda":
        return tokens
    return tokens * max(1, torch.cuda.get_device_properties(device).total_memory // GPU_MEMORY)


def by_length(
    lengths: Sequence[int],
    limit: int,
    progress: str | None,
    work: Callable[[list[int]], Sequence[R]],
    together: float = math.inf,
    kinds: Sequence[int] = (),
) -> list[R]:
    """The result of `work` for each index. It gets indices in batches by length, of at most `limit` padded tokens.

    Args:
        together: what is longer gets a batch of its own.
        kinds: of each index, a number, if there are several; only indices of the same one share a batch.
    """
    kinds = kinds or [0] * len(lengths)
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (kinds[i], lengths[i])):
        if (
            not batches
            or lengths[i] > together
            or (len(batches[-1]) + 1) * lengths[i] > limit
            or kinds[i] != kinds[batches[-1][-1]]
        ):
            batches.append([])
        batches[-1].append(i)
    with bar(len(lengths), progress) as done:
        made = ranks.shared(batches, work, lambda batch: done.update(len(batch)))
    order = [i for batch in batches for i in batch]
    found = dict(zip(order, (each for part in made for each in part), strict=True))
    return [found[i] for i in range(len(lengths))]


def bar(total: int, progress: str | None) -> tqdm:
    """A progress bar over rows; none that is seen without a text to write beside it."""
    return tqdm(total=total, desc=progress, disable=None if progress else True, unit="row", leave=False)


# Beside which prompts a model answers one as alone: "any", those "as long", or "none".
_BESIDE: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def beside(model: nn.Module, prompt: Sequence[int], filler: int, room: int) -> str:
    """Beside which prompts a model answers one as alone, as tried once on one prompt.

    Not beside longer ones if the model takes no notice of the mask, or counts its positions from the padding; beside
    none if it mixes the rows of a batch up.
    """
    if model not in _BESIDE:
        _BESIDE[model] = _tried_beside(model, prompt[:PADDING], filler, min(PADDING, room - PADDING - TRIED_TOKENS))
    return _BESIDE[model]


@ranks.by_first
def _tried_beside(model: nn.Module, prompt: Sequence[int], filler: int, padding: int) -> str:
    device = next(model.parameters()).device
    tried = GenerationConfig(
        max_new_tokens=TRIED_TOKENS, pad_token_id=filler, output_logits=True, return_dict_in_generate=True
    )

    def log_probs(*rows: Sequence[int]) -> Tensor:
        """Of the first row's reply, whose tokens are always the same."""
        width = max(map(len, rows))
        out = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor([[filler] * (width - len(row)) + [*row] for row in rows], device=device),
            attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device),
            generation_config=tried,
            prefix_allowed_tokens_fn=lambda *_: [prompt[-1]],
        )
        return torch.stack([logits[0] for logits in out.logits]).float().log_softmax(-1)

    # Rounding leaves half of a number's digits or more, and a fault far fewer.
    dtypes = {p.dtype if p.is_floating_point() else torch.bfloat16 for p in model.parameters()}
    digits = max(torch.finfo(dtype).eps for dtype in (dtypes | {torch.bfloat16} if scores_in_bf16() else dtypes)) ** 0.5
    alone = log_probs(prompt)
    for others, more in {**({"any": padding} if padding > 0 else {}), "as long": 0}.items():
        width = len(prompt) + more
        other = ([*reversed(prompt)] * width)[:width]
        differ = (log_probs(prompt, other) - alone).norm() > digits * (alone - alone.mean()).norm()
        if not differ:  # as also where they are not finite, which no other batch would mend
            return others
    return "none"
