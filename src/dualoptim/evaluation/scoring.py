"""A model and rows → per-sample scores. Batched, rows of like length together, in the model's own precision or bf16.

Nothing here aggregates: what is returned per sample is what `metrics` makes numbers of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from ..data import Message, Row, collate, encode, pad_id, prompt_text
from ..losses import IGNORED, sequence_log_probs
from ..models import device_and_precision
from . import metrics

MAX_LENGTH = 2048  # tokens a scored row may have
PROMPT_TOKENS = 6144  # prompts of like length are answered together, up to this many padded tokens
LABELLED_TOKENS = 1536  # rows are scored together up to this many: each costs a vocabulary of logits
FOLLOWED_ROWS = 8  # rows of each set that are asked now and then during training


def replies(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    progress: str | None = None,
) -> list[str]:
    """What the model answers to each prompt, greedily, up to its end token or `max_new_tokens`.

    Args:
        prompts: chat messages, each list ending with the user's.
        progress: what to write beside the progress bar; no bar without it.
    """
    texts = [prompt_text(tokenizer, prompt) for prompt in prompts]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    filler = pad_id(tokenizer)
    given: list[str] = [""] * len(ids)
    with _scoring(model) as device:
        for batch in _by_length([len(row) + max_new_tokens for row in ids], PROMPT_TOKENS, progress):
            width = max(len(ids[i]) for i in batch)
            # Padded on the left, so that every row's answer begins where its prompt ends.
            input_ids = torch.tensor([[filler] * (width - len(ids[i])) + ids[i] for i in batch], device=device)
            mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in batch], device=device)
            out = model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=filler,
            )
            for i, tokens in zip(batch, out[:, width:].tolist(), strict=True):
                given[i] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return given


def negative_log_likelihoods(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], *, progress: str | None = None
) -> list[float]:
    """Mean negative log-likelihood per token, in nats, of each row's answer and its end token given its prompt."""
    tokens = [encode(row, tokenizer, MAX_LENGTH) for row in rows]
    scores = [0.0] * len(rows)
    with _scoring(model) as device:
        for indices in _by_length([len(row.input_ids) for row in tokens], LABELLED_TOKENS, progress):
            batch = collate([tokens[i] for i in indices], pad_id(tokenizer))
            total, length = sequence_log_probs(model, {key: value.to(device) for key, value in batch.items()})
            for i, score in zip(indices, (-total / length).tolist(), strict=True):
                scores[i] = score
    return scores


class QuestionScores(NamedTuple):
    """How well rows are answered: the mean probability of their answers, the mean ROUGE-L recall, and every sample."""

    probability: float
    rouge_l: float
    records: list[dict[str, Any]]


def score_rows(model: nn.Module, tokenizer: Any, rows: Sequence[Row], name: str | None) -> QuestionScores:
    """Score rows by likelihood and by the model's own replies, as long as the longest answer and half as long again.

    Args:
        name: the set's name, which every record and the progress bar carry; no bar without it.
    """
    nlls = negative_log_likelihoods(model, tokenizer, rows, progress=name and f"Scoring answers, {name}")
    longest = max(len(tokenizer(row.answer, add_special_tokens=False)["input_ids"]) for row in rows)
    given = replies(
        model,
        tokenizer,
        [row.prompt for row in rows],
        max_new_tokens=longest * 3 // 2,
        progress=name and f"Asking, {name}",
    )
    records: list[dict[str, Any]] = [
        {
            "set": name,
            "question": row.question,
            "answer": row.answer,
            "reply": reply,
            "nll": nll,
            "probability": metrics.probability(nll),
            "rouge_l": metrics.rouge_l_recall(reply, row.answer),
        }
        for row, nll, reply in zip(rows, nlls, given, strict=True)
    ]
    probability, rouge_l = (fmean(float(record[key]) for record in records) for key in ("probability", "rouge_l"))
    return QuestionScores(probability, rouge_l, records)


def token_counts(tokenizer: Any, rows: Sequence[Row]) -> list[int]:
    """How many tokens each row's answer and its end token have."""
    return [sum(label != IGNORED for label in encode(row, tokenizer, MAX_LENGTH).labels) for row in rows]


@contextmanager
def _scoring(model: nn.Module) -> Iterator[torch.device]:
    device = next(model.parameters()).device
    _, bf16 = device_and_precision()
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            yield device
    finally:
        model.train(training)


def _by_length(lengths: Sequence[int], limit: int, progress: str | None) -> Iterator[list[int]]:
    """Indices in batches, sorted by length, of at most `limit` padded tokens each."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or (len(batches[-1]) + 1) * lengths[i] > limit:
            batches.append([])
        batches[-1].append(i)
    with tqdm(total=len(lengths), desc=progress, disable=None if progress else True, unit="row", leave=False) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
