"""Answers to one question as one sequence, and their scores: one forward pass in place of several.

The prompt comes once, then every answer as a branch that attends only to the prompt and itself, by a mask (B, 1, T, T)
and positions that continue the prompt's. This gives the same scores as separate sequences, for about half the tokens on
TOFU. Before it is used, the longest question and that with the most answers are scored both ways to see whether the
model supports it. The mask takes the place of the model's own, also of a sliding window's, so it is used only where all
questions are no longer than the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import ranks
from ..adapters import num_virtual_tokens
from ..data import Tokens, collate
from ..losses import IGNORED, Batch, Labelled, labelled
from ..models import text_config


class Answer(NamedTuple):
    """The model's scores of an answer's tokens, including those that end it."""

    log_probs: list[float]  # log π(y_t | x, y_<t), in nats
    top1: list[int]  # 1 where y_t is the model's first choice
    z: list[float]  # (log π(y_t) − mean) / standard deviation, both under π over the vocabulary
    ended: int = 0  # how many of the last tokens end the answer and are not its text

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per token."""
        return -fmean(self.log_probs)


class Packed(NamedTuple):
    """Answers to one question as one sequence of T tokens: the prompt, then a branch for each answer."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    branches: list[int]  # 0 for the prompt, 1, 2, … for the answers
    labelled: list[int]  # how many labels each branch has


def pack(rows: Sequence[Tokens]) -> Packed:
    """Put rows that begin with the same prompt into one sequence.

    Each branch begins with a copy of the prompt's last token, which predicts the branch's own first token.
    """
    first = min(next(t for t, label in enumerate(row.labels) if label != IGNORED) for row in rows)
    same = next((t for t in range(first) if len({row.input_ids[t] for row in rows}) > 1), first)
    cut = max(same - 1, 0)
    packed = Packed(rows[0].input_ids[:cut], [IGNORED] * cut, list(range(cut)), [0] * cut, [])
    for branch, row in enumerate(rows, 1):
        packed.input_ids.extend(row.input_ids[cut:])
        packed.labels.extend([IGNORED, *row.labels[cut + 1 :]])
        packed.position_ids.extend(range(cut, len(row.input_ids)))
        packed.branches.extend([branch] * (len(row.input_ids) - cut))
        packed.labelled.append(sum(label != IGNORED for label in row.labels[cut + 1 :]))
    return packed


def _batch(packed: Sequence[Packed], filler: int) -> dict[str, Tensor]:
    """Packed sequences as a batch; with a mask (B, 1, T, T) if one holds several answers."""
    batch = collate([Tokens(p.input_ids, p.labels) for p in packed], filler)
    if all(len(p.labelled) == 1 for p in packed):
        return batch
    width = batch["input_ids"].shape[1]
    position_ids = torch.tensor([p.position_ids + [0] * (width - len(p.position_ids)) for p in packed])
    branches = torch.tensor([p.branches + [-1] * (width - len(p.branches)) for p in packed])
    theirs, mine = branches[:, None, :], branches[:, :, None]
    seen = ((theirs == 0) | (theirs == mine)).tril()
    return {**batch, "position_ids": position_ids, "attention_mask": seen[:, None]}


def score(model: nn.Module, packed: Sequence[Packed], device: torch.device) -> list[list[Answer]]:
    """The answers of each packed sequence, scored in one forward pass."""
    batch: Batch = {key: value.to(device) for key, value in _batch(packed, packed[0].input_ids[0]).items()}
    columns = [values.tolist() for values in _token_scores(labelled(model, batch))]
    found: list[list[Answer]] = []
    at = 0
    for p in packed:
        found.append([])
        for count in p.labelled:
            log_probs, top1, z = (column[at : at + count] for column in columns)
            found[-1].append(Answer(log_probs, top1, z))
            at += count
    return found


def _token_scores(out: Labelled) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) log-probabilities of the labels, whether each is the first choice, and its z-score."""
    log_probs, top1, z = [], [], []
    # So few at a time that all intermediate results stay in the processor's cache: 13 times as fast as 128 at a time.
    for logits, targets in zip(torch.split(out.logits, 8), torch.split(out.targets, 8), strict=True):
        every = logits.log_softmax(-1)
        label = every.gather(1, targets[:, None])[:, 0]
        weighted = every.exp().mul_(every)
        mean, square = weighted.sum(-1), torch.linalg.vecdot(weighted, every)
        spread = (square - mean.square()).clamp(min=1e-6).sqrt()
        log_probs.append(label)
        top1.append((logits.argmax(-1) == targets).int())
        z.append((label - mean) / spread)
    return torch.cat(log_probs), torch.cat(top1), torch.cat(z)


# The most tokens, and answers, of the questions for which a model gave the same scores; zeros if it once gave others.
_PACKS: WeakKeyDictionary[nn.Module, tuple[int, int]] = WeakKeyDictionary()


def window(model: nn.Module) -> float:
    """How many tokens each layer of a model sees at least: those of a sliding window or chunk; else no limit."""
    sizes = [getattr(text_config(model), name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=math.inf)


def packs(model: nn.Module, group: Sequence[Tokens]) -> bool:
    """Whether a model gives answers the same scores together as apart, in its own precision.

    It is tried on a question, and again on one that is longer, or has more answers, than all that were tried before.

    It does not if its attention takes no such mask, or if a token's place does not come from its position id alone, as
    in recurrent layers and convolutions.
    """
    size, (length, count) = (len(pack(group).input_ids), len(group)), _PACKS.get(model, (-1, -1))
    if length and (size[0] > length or size[1] > count):
        most = max(size[0], length), max(size[1], count)
        _PACKS[model] = most if _agrees(model, group) else (0, 0)
    return _PACKS[model][0] > 0


@ranks.by_first
def _agrees(model: nn.Module, group: Sequence[Tokens]) -> bool:
    device = next(model.parameters()).device
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention != "sdpa" or num_virtual_tokens(model):
        return False
    with torch.autocast(device.type, enabled=False):
        apart = [score(model, [pack([row])], device)[0][0].log_probs for row in group]
        try:
            together = [answer.log_probs for answer in score(model, [pack(group)], device)[0]]
        except (TypeError, RuntimeError, ValueError, IndexError):  # whatever a model raises on such a mask
            return False
    # Token by token: what only an answer's first ones get wrong is next to nothing in the mean of a long one.
    return list(map(len, together)) == list(map(len, apart)) and all(
        abs(a - b) < 1e-3
        for ones, others in zip(together, apart, strict=True)
        for a, b in zip(ones, others, strict=True)
    )
