"""A model and rows → per-sample records, computed in batches of rows of similar length.

Scores are computed in the model's own precision or in bf16 autocast, as `device.scoring_in` says. Batches are shared
out over the ranks of a run, and each rank gets all results; the number of ranks changes no batch, and so no number.
Nothing here is aggregated: `metrics` makes numbers of the per-sample results.

Several answers to one question are scored as one sequence: the prompt once, then every answer as a branch that attends
only to the prompt and itself, by a mask (B, 1, T, T) and positions that continue the prompt's. This gives the same
scores as separate sequences, for about half the tokens on TOFU. Before it is used, the longest question and that with
the most answers are scored both ways to see whether the model supports it. The mask takes the place of the model's own,
also of a sliding window's, so it is used only where all questions are no longer than the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from statistics import fmean
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

from .. import ranks
from ..adapters import computing_in, num_virtual_tokens
from ..chat import Message, end_ids, prompt_ids, reply_of, turn_of
from ..data import Row, Tokens, collate, encode, pad_id
from ..device import in_chosen_precision, scores_in_bf16, seeded
from ..errors import UserError
from ..losses import IGNORED, Batch, Labelled, labelled
from ..losses.base import token_states
from ..models import positions, rope_switch, text_config
from ..reference import evaluating
from ..wrappers import own_forward
from . import metrics

MAX_LENGTH = 2**31  # most tokens of a scored row: only the model's positions limit them
PROMPT_TOKENS = 6144  # prompts of similar length are answered together, up to this many padded tokens
LABELLED_TOKENS = 1536  # rows are scored together up to this many padded tokens: each may cost a vocabulary of logits
GPU_MEMORY = 16 * 2**30  # for each so many bytes that a GPU has, a batch has as many tokens
MOST_SEED = 2**63 - 1
FOLLOWED_ROWS = 8  # rows of each set that are asked now and then during training
PADDING, TRIED_TOKENS = 16, 3  # with how many tokens of padding, and of a reply, a model is tried in a batch
REPLY_TOKENS = 24  # room that every reply has, so that a sentence may tell an answer of a single word

R = TypeVar("R")


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
        if len(ids) > 1 and (beside := _beside(model, max(ids, key=len), filler, room)) != "any":
            kinds = lengths if beside == "as long" else list(range(len(ids)))
        # Where positions cut a reply short, its row is alone: beside others, the longest prompt would cut them all.
        return _by_length(lengths, _at_once(PROMPT_TOKENS, device), progress, ask, room, kinds)


# Beside which prompts a model answers one as alone: "any", those "as long", or "none".
_BESIDE: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _beside(model: nn.Module, prompt: Sequence[int], filler: int, room: int) -> str:
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
    for beside, more in {**({"any": padding} if padding > 0 else {}), "as long": 0}.items():
        width = len(prompt) + more
        other = ([*reversed(prompt)] * width)[:width]
        differ = (log_probs(prompt, other) - alone).norm() > digits * (alone - alone.mean()).norm()
        if not differ:  # as also where they are not finite, which no other batch would mend
            return beside
    return "none"


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
        together = bool(several) and max(sizes) <= _window(model)
        together = together and all(len({len(t.input_ids) > switch for t in group}) == 1 for group in tokens)
        longest, widest = (max(several, key=by.__getitem__, default=0) for by in (sizes, list(map(len, tokens))))
        together = together and all(_packs(model, tokens[i]) for i in dict.fromkeys((longest, widest)))
        # Each unit is one sequence; if scored apart, a question's answers are consecutive units.
        units = [
            (i, unit) for i, group in enumerate(tokens) for unit in ([group] if together else [[t] for t in group])
        ]
        packed = [pack(unit) for _, unit in units]
        scored = _by_length(
            [len(p.input_ids) for p in packed],
            _at_once(LABELLED_TOKENS, device),
            progress,
            lambda batch: _score(model, [packed[u] for u in batch], device),
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
    with as_scored(model) as device, torch.enable_grad(), _bar(len(rows), progress) as bar:

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

        return ranks.shared(rows, norm, lambda _: bar.update())


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


def _score(model: nn.Module, packed: Sequence[Packed], device: torch.device) -> list[list[Answer]]:
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


def _window(model: nn.Module) -> float:
    """How many tokens each layer of a model sees at least: those of a sliding window or chunk; else no limit."""
    sizes = [getattr(text_config(model), name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=math.inf)


def _packs(model: nn.Module, group: Sequence[Tokens]) -> bool:
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
        apart = [_score(model, [pack([row])], device)[0][0].log_probs for row in group]
        try:
            together = [answer.log_probs for answer in _score(model, [pack(group)], device)[0]]
        except (TypeError, RuntimeError, ValueError, IndexError):  # whatever a model raises on such a mask
            return False
    # Token by token: what only an answer's first ones get wrong is next to nothing in the mean of a long one.
    return list(map(len, together)) == list(map(len, apart)) and all(
        abs(a - b) < 1e-3
        for ones, others in zip(together, apart, strict=True)
        for a, b in zip(ones, others, strict=True)
    )


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
        found = _by_length(lengths, PROMPT_TOKENS, None, mean, kinds=[n > switch for n in lengths])
    return torch.stack(found) if found else torch.empty(0)


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


def _at_once(tokens: int, device: torch.device) -> int:
    """The tokens of a batch: more on a GPU, in the measure of all its memory, as what is free may differ next time."""
    if device.type != "cuda":
        return tokens
    return tokens * max(1, torch.cuda.get_device_properties(device).total_memory // GPU_MEMORY)


def _by_length(
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
    with _bar(len(lengths), progress) as bar:
        made = ranks.shared(batches, work, lambda batch: bar.update(len(batch)))
    order = [i for batch in batches for i in batch]
    found = dict(zip(order, (each for part in made for each in part), strict=True))
    return [found[i] for i in range(len(lengths))]


def _bar(total: int, progress: str | None) -> tqdm:
    return tqdm(total=total, desc=progress, disable=None if progress else True, unit="row", leave=False)
