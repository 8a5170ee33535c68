"""A model and rows → per-sample records.

Scores are computed in the model's own precision or in bf16 autocast, as `device.scoring_in` says (`batches`). Several
answers to one question are scored as one sequence where the model supports it (`packing`). Nothing here is aggregated:
`metrics` makes numbers of the per-sample results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from .. import ranks
from ..chat import Message, end_ids, prompt_ids, reply_of, turn_of
from ..data import Row, Tokens, collate, encode, pad_id
from ..device import seeded
from ..errors import UserError
from ..losses import IGNORED, labelled
from ..losses.base import token_states
from ..models import positions, rope_switch
from . import metrics
from .batches import as_scored, at_once, bar, beside, by_length
from .packing import Answer, pack, packs, score, window

MAX_LENGTH = 2**31  # most tokens of a scored row: only the model's positions limit them
PROMPT_TOKENS = 6144  # prompts of similar length are answered together, up to this many padded tokens
LABELLED_TOKENS = 1536  # rows are scored together up to this many padded tokens: each may cost a vocabulary of logits
MOST_SEED = 2**63 - 1
FOLLOWED_ROWS = 8  # rows of each set that are asked now and then during training
REPLY_TOKENS = 24  # room that every reply has, so that a sentence may tell an answer of a single word


def replies(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    begun: str = "",
    progress: str | None = None,
) -> list[str]:
    """What the model answers to each prompt, up to an end token (`dualoptim.chat.end_ids`) or `max_new_tokens`.

    Args:
        prompts: chat messages, each list ending with the user's.
        temperature: of sampling; 0 for the most probable token each time. torch's CPU generator gives every batch a
            seed of its own, so that batches may run in any order.
        begun: how each answer begins; the model is given it, and the returned text continues it.
        progress: what to write beside the progress bar; no bar without it.
    """
    turns = [turn_of(tokenizer, prompt) for prompt in prompts]
    ids = [prompt_ids(tokenizer, prompt, begun=begun) for prompt in prompts]
    ends, filler, room = end_ids(tokenizer, turns, model), pad_id(tokenizer), positions(model)
    if (longest := max(map(len, ids), default=0)) >= room:
        raise UserError(f"a prompt has {longest} tokens, and the model takes {room} positions; shorten it")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    seeds = torch.randint(MOST_SEED, (len(ids),)).tolist() if temperature else []
    with as_scored(model) as device, _generating(model):

        def ask(batch: list[int]) -> list[str]:
            width = max(len(ids[i]) for i in batch)
            # Padded on the left, so that every row's answer begins where its prompt ends.
            input_ids = torch.tensor([[filler] * (width - len(ids[i])) + ids[i] for i in batch], device=device)
            mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in batch], device=device)
            own = GenerationConfig(
                max_new_tokens=min(max_new_tokens, room - width), eos_token_id=ends, pad_token_id=filler, **sampling
            )
            with seeded(seeds[batch[0]]) if seeds else nullcontext():
                out = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=own)  # type: ignore[operator]
            said = out[:, width:].tolist()
            return [reply_of(tokenizer, tokens, turns[i], ends) for i, tokens in zip(batch, said, strict=True)]

        lengths, switch = [len(row) + max_new_tokens for row in ids], rope_switch(model)
        # Beside longer prompts, a row that passes the switch as it is written would pass it earlier.
        kinds = [0 if n <= switch else -1 if n - max_new_tokens > switch else n for n in lengths]
        if len(ids) > 1 and (others := beside(model, max(ids, key=len), filler, room)) != "any":
            kinds = lengths if others == "as long" else list(range(len(ids)))
        # Where positions cut a reply short, its row is alone: beside others, the longest prompt would cut them all.
        return by_length(lengths, at_once(PROMPT_TOKENS, device), progress, ask, room, kinds)


@contextmanager
def _generating(model: nn.Module) -> Iterator[None]:
    """Ignore the generation settings of the model's files except its end tokens: penalties, beams, caches."""
    theirs = [
        (module, vars(module)["generation_config"]) for module in model.modules() if "generation_config" in vars(module)
    ]
    try:
        for module, _ in theirs:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, config in theirs:
            module.generation_config = config


def answers(
    model: nn.Module, tokenizer: Any, questions: Sequence[Sequence[Row]], *, progress: str | None = None
) -> list[list[Answer]]:
    """Score answers; those to one question are scored together if the model supports it.

    Args:
        questions: for each question, rows of the same prompt with different answers.
        progress: what to write beside the progress bar; no bar without it.
    """
    room, switch = positions(model), rope_switch(model)
    tokens = [[encode(row, tokenizer, MAX_LENGTH, room) for row in rows] for rows in questions]
    found: list[list[Answer]] = [[] for _ in questions]
    sizes = [len(pack(group).input_ids) for group in tokens]  # a single answer may share a batch, and so a mask
    several = [i for i, group in enumerate(tokens) if len(group) > 1]
    with as_scored(model) as device:
        together = bool(several) and max(sizes) <= window(model)
        together = together and all(len({len(t.input_ids) > switch for t in group}) == 1 for group in tokens)
        longest, widest = (max(several, key=by.__getitem__, default=0) for by in (sizes, list(map(len, tokens))))
        together = together and all(packs(model, tokens[i]) for i in dict.fromkeys((longest, widest)))
        # Each unit is one sequence; if scored apart, a question's answers are consecutive units.
        units = [
            (i, unit) for i, group in enumerate(tokens) for unit in ([group] if together else [[t] for t in group])
        ]
        packed = [pack(unit) for _, unit in units]
        scored = by_length(
            [len(p.input_ids) for p in packed],
            at_once(LABELLED_TOKENS, device),
            progress,
            lambda batch: score(model, [packed[u] for u in batch], device),
            kinds=[max(p.position_ids) >= switch for p in packed],
        )
        for (i, _), part in zip(units, scored, strict=True):
            found[i] += part
    return [
        [answer._replace(ended=row.ended) for answer, row in zip(part, rows, strict=True)]
        for part, rows in zip(found, tokens, strict=True)
    ]


def negative_log_likelihoods(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], *, progress: str | None = None
) -> list[float]:
    """Mean negative log-likelihood per token, in nats, of each row's answer and its end token given its prompt."""
    return [answer.nll for (answer,) in answers(model, tokenizer, [[row] for row in rows], progress=progress)]


def is_finite(model: nn.Module, tokenizer: Any, rows: Sequence[Row]) -> bool:
    """Whether a model's weights are finite numbers, and what it computes of them for some rows."""
    weights = all(bool(p.isfinite().all()) for p in model.parameters())
    return weights and all(map(math.isfinite, negative_log_likelihoods(model, tokenizer, rows)))


def gradient_norms(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], *, progress: str | None = None
) -> list[float]:
    """The gradient norm of each row's answer: (1/P) Σ_p ‖∂nll/∂θ_p‖₂ over the P parameter tensors.

    nll is the mean negative log-likelihood per token of the answer's text, without what ends it. The parameters are
    those that are trained (`requires_grad`), or all if none is. Takes a backward pass for each row, and memory for the
    gradients, which are then freed; gradients that are there already stay as they are.

    Args:
        progress: what to write beside the progress bar; no bar without it.
    """
    every = [p for p in model.parameters() if p.is_floating_point()]  # quantized weights have no gradient
    parameters = [p for p in every if p.requires_grad] or every
    room = positions(model)
    with as_scored(model) as device, torch.enable_grad(), bar(len(rows), progress) as rows_done:

        def norm(row: Row) -> float:
            tokens = encode(row, tokenizer, MAX_LENGTH, room)
            at = [i for i, label in enumerate(tokens.labels) if label != IGNORED]
            text = set(at[: len(at) - tokens.ended] or at)
            labels = [label if i in text else IGNORED for i, label in enumerate(tokens.labels)]
            batch = collate([Tokens(tokens.input_ids, labels)], pad_id(tokenizer))
            torch.clear_autocast_cache()  # it may hold weights cast without gradients, or for the row before
            out = labelled(model, {key: value.to(device) for key, value in batch.items()})
            loss = nn.functional.cross_entropy(out.logits.float(), out.targets)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients if g is not None]
            return torch.stack(norms).mean().item()

        return ranks.shared(rows, norm, lambda _: rows_done.update())


def question_records(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    name: str | None,
    others: Sequence[Mapping[str, Sequence[str]]] | None = None,
    *,
    ask: bool = True,
    reply_tokens: int = REPLY_TOKENS,
) -> list[dict[str, Any]]:
    """Score rows by likelihood and by the model's own replies.

    A record has ``set``, ``question``, ``answer`` and its ``zlib_bytes``, the answer's ``nll`` (mean per token),
    ``probability`` and, token by token, ``log_probs``, ``top1`` and ``z``, of which the last ``ended`` end the answer;
    for each kind of other answers, a list of their mean negative log-likelihoods under ``{kind}_nlls``; and the model's
    ``reply`` with its ``rouge_l``, ``rouge_1`` and ``token_entropy``.

    Args:
        name: the set's name, for every record and the progress bar; no bar without it.
        others: for each row, kind → other answers to the same question.
        ask: whether the model is asked for replies, which takes about half of the time.
        reply_tokens: as in `reply_limit`.
    """
    if not rows:
        return []
    others = others or [{}] * len(rows)
    questions = [
        [row, *(row.answered(text) for texts in other.values() for text in texts)]
        for row, other in zip(rows, others, strict=True)
    ]
    records: list[dict[str, Any]] = []
    scored = answers(model, tokenizer, questions, progress=name and f"Scoring answers, {name}")
    for row, other, (own, *rest) in zip(rows, others, scored, strict=True):
        false = iter(rest)
        records.append(
            {
                "set": name,
                "question": row.question,
                "answer": row.answer,
                "zlib_bytes": metrics.zlib_bytes(row.answer),
                "nll": own.nll,
                "probability": metrics.probability(own.nll),
                "log_probs": [round(value, 5) for value in own.log_probs],
                "top1": own.top1,
                "z": [round(value, 4) for value in own.z],
                "ended": own.ended,
                **{f"{kind}_nlls": [next(false).nll for _ in texts] for kind, texts in other.items()},
            }
        )
    if ask:
        for record, reply in zip(records, asked(model, tokenizer, rows, name, reply_tokens), strict=True):
            record["reply"] = reply
            record["rouge_l"] = metrics.rouge_l_recall(reply, record["answer"])
            record["rouge_1"] = metrics.rouge_1_recall(reply, record["answer"])
            record["token_entropy"] = metrics.token_entropy(tokenizer(reply, add_special_tokens=False)["input_ids"])
    return records


def asked(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    name: str | None,
    reply_tokens: int = REPLY_TOKENS,
    temperature: float = 0.0,
) -> list[str]:
    """What the model answers to rows' questions.

    Args:
        reply_tokens: as in `reply_limit`.
        temperature: as in `replies`.
    """
    if not rows:
        return []
    return replies(
        model,
        tokenizer,
        [row.prompt for row in rows],
        max_new_tokens=reply_limit(tokenizer, rows, reply_tokens),
        temperature=temperature,
        progress=name and f"Asking, {name}",
    )


def reply_limit(tokenizer: Any, rows: Sequence[Row], reply_tokens: int = REPLY_TOKENS) -> int:
    """The most tokens of replies to rows' questions: room for one and a half times the longest true answer.

    Args:
        reply_tokens: the least that is returned, such as a benchmark's own limit.
    """
    longest = max(len(ids) for ids in tokenizer([row.answer for row in rows], add_special_tokens=False)["input_ids"])
    # With tokens that lead to an answer, and its control tokens.
    whole = max(token_counts(tokenizer, [row.whole for row in rows]))
    return max(longest * 3 // 2, whole, reply_tokens)


def followed(
    model: nn.Module,
    tokenizer: Any,
    rows: Mapping[str, Sequence[Row]],
    measure: Callable[[str, str], float] = metrics.rouge_l_recall,
) -> dict[str, float]:
    """The mean `measure` of the replies to the first few rows of each set: a cheap check during training."""
    shares = {}
    for name, part in rows.items():
        few = part[:FOLLOWED_ROWS]
        given = asked(model, tokenizer, few, None)
        shares[name] = fmean(measure(text, row.answer) for text, row in zip(given, few, strict=True))
    return shares


def text_records(model: nn.Module, tokenizer: Any, rows: Sequence[Row], name: str) -> list[dict[str, Any]]:
    """Score rows by likelihood alone: ``set``, ``question``, ``answer``, ``nll`` and over how many ``tokens`` it is."""
    nlls = negative_log_likelihoods(model, tokenizer, rows, progress=f"Reading, {name}")
    return [
        {"set": name, "question": row.question, "answer": row.answer, "nll": nll, "tokens": tokens}
        for row, nll, tokens in zip(rows, nlls, token_counts(tokenizer, rows), strict=True)
    ]


def passage_records(model: nn.Module, tokenizer: Any, passages: Sequence[Row]) -> list[dict[str, Any]]:
    """As `text_records`, of the included passages; none where the model has too few positions for one of them.

    On the others alone, perplexity would be that of other texts.
    """
    return text_records(model, tokenizer, passages, "passages") if reads(model, tokenizer, passages) else []


def reads(model: nn.Module, tokenizer: Any, rows: Sequence[Row]) -> bool:
    """Whether a model has positions enough for each of some rows."""
    room = positions(model)
    return all(len(encode(row, tokenizer, MAX_LENGTH).input_ids) <= room for row in rows)


def token_counts(tokenizer: Any, rows: Sequence[Row]) -> list[int]:
    """How many tokens each row's answer and its end token have."""
    return [sum(label != IGNORED for label in encode(row, tokenizer, MAX_LENGTH).labels) for row in rows]


def mean_states(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """(N, d) vectors of texts: the hidden states of the model's middle layer, averaged over each text's tokens."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] or [pad_id(tokenizer)] for text in texts]
    with as_scored(model) as device:

        def mean(batch: list[int]) -> list[Tensor]:
            rows = collate([Tokens(ids[i], ids[i]) for i in batch], pad_id(tokenizer))
            mask = rows["attention_mask"].to(device)
            out = model(input_ids=rows["input_ids"].to(device), attention_mask=mask, output_hidden_states=True)
            states = token_states(out.hidden_states[len(out.hidden_states) // 2], mask.shape).float() * mask[..., None]
            return [vector.clone() for vector in (states.sum(1) / mask.sum(1, keepdim=True)).cpu()]

        lengths, switch = [len(row) for row in ids], rope_switch(model)
        found = by_length(lengths, PROMPT_TOKENS, None, mean, kinds=[n > switch for n in lengths])
    return torch.stack(found) if found else torch.empty(0)
