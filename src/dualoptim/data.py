"""Rows → tokenized, labeled, objective-tagged batches.

A row is a prompt and an answer, read from JSON lines of ``question``/``answer``, of chat ``messages`` or of plain
``text``. It is tokenized in the model's own chat template; only the answer and its end token have labels.
"""

from __future__ import annotations

import functools
import itertools
import random
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import regex
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .chat import TEXT as TEXT
from .chat import Message, spelled, turn_of
from .chat import is_text as is_text
from .errors import UserError
from .evaluation.words import one_way, places
from .losses import IGNORED
from .reading import json_lines
from .reading import read_records as read_records
from .reading import read_table as read_table
from .rows.forms import OWN_KEYS, check_cases, conversation, text_of
from .rows.forms import texts as texts
from .schedule import Turn

ASKING = ("user", TEXT)  # the roles of messages that ask


@dataclass(frozen=True)
class Row:
    """A prompt and its answer.

    A row of plain text has no prompt, or one message of the role "text": the beginning that the answer continues.
    """

    prompt: tuple[Message, ...]
    answer: str
    where: str = ""  # file:line, for messages to the user
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)  # the row's other keys
    only: tuple[str, ...] = ()  # the parts of the answer that have labels; if empty, all of it and its end
    chunk: tuple[int, int] | None = None  # (number, total) of a chunk of a document's plain text
    group: int = 0  # index of its source among its objective's; RMU steers each source in a direction of its own

    @property
    def ends(self) -> bool:
        """Whether the answer ends here; False for a chunk after which its document goes on."""
        return self.chunk is None or self.chunk[0] == self.chunk[1]

    @property
    def asks(self) -> int | None:
        """Which message of the prompt asks: the user's last one, or the beginning of plain text; None without one."""
        return next((i for i in reversed(range(len(self.prompt))) if self.prompt[i]["role"] in ASKING), None)

    @property
    def question(self) -> str:
        """The last thing the user said, or the beginning of plain text; empty without one."""
        return next((m["content"] for m in reversed(self.prompt) if m["role"] in ASKING), "")

    @property
    def pair(self) -> tuple[str, str]:
        """Question and answer: what rows of two files have in common that are the same.

        The question alone is not enough: TOFU asks "What is the full name of the author?" of two authors.
        """
        return self.question, self.answer

    @property
    def whole(self) -> Row:
        """The same row with labels on all of its answer."""
        return replace(self, only=())

    def answered(self, answer: str) -> Row:
        """The same question with another answer."""
        return Row(self.prompt, answer, self.where, self.fields)


def reworded(row: Row, text: str) -> Row:
    """The same row with its last user message, or the beginning of its plain text, in other words.

    A chat without a user message stays as it is.
    """
    if not row.prompt:
        raise ValueError("a row of plain text without a beginning asks nothing")
    prompt = tuple({**m, "content": text} if i == row.asks else m for i, m in enumerate(row.prompt))
    return replace(row, prompt=prompt)


def question(text: str, answer: str, where: str = "", **fields: Any) -> Row:
    """A row of one question and its answer."""
    return Row(({"role": "user", "content": text},), answer, where, fields)


def asset(name: str) -> list[dict[str, Any]]:
    """The JSON lines of a file that comes with the package."""
    text = resources.files("dualoptim").joinpath("assets", name).read_text(encoding="utf-8")
    return json_lines(text)


@functools.cache
def _assets() -> frozenset[str]:
    return frozenset(file.name for file in resources.files("dualoptim").joinpath("assets").iterdir())


def is_included(row: Row) -> bool:
    """Whether a row comes with the package, so that nobody can shorten it."""
    return row.where in _assets()


def read_rows(path: str | Path) -> list[Row]:
    """Read the rows of a file of JSON lines, or of one JSON array."""
    return [parse_row(record, where) for record, where in read_records(path)]


def data_file(data_dir: str | Path, folder: str, name: str) -> Path:
    """A task's file: in `data_dir` itself, in its folder `folder`, or in a folder of that name beside it."""
    base = Path(data_dir)
    if not base.is_dir():
        raise UserError(f"data_dir {data_dir}: there is no such folder; give the one that holds {name}")
    for place in (base, base / folder, base.parent / folder):
        if (place / name).is_file():
            return place / name
    raise UserError(f"data_dir {data_dir}: has no {name}, nor has a folder {folder} in it or beside it; put it there")


def parse_row(record: Mapping[str, Any], where: str) -> Row:
    """Make a row from a record in any of the forms (`forms.conversation`); its other keys go to `fields`."""
    found = conversation(record, where)
    if found is None:
        key = next(key for key in record if key.lower() == "text" and record[key] is not None)
        prompt: list[Message] = []
        answer, used = text_of(record, key, where), {key}
        chunk = _chunk(record.get("chunk"))  # as in the files of rows that a run writes
        used |= {"chunk"} if chunk else set()
    else:
        prompt, answer, used = found
        chunk = None
    check_cases(record, {*(key.lower() for key in used), *OWN_KEYS}, where)
    others = {key: value for key, value in record.items() if key not in used and value is not None}
    fields = {key.lower() if key.lower() in OWN_KEYS else key: value for key, value in others.items()}
    return Row(tuple(prompt), answer, where, fields, chunk=chunk)


def as_rows(given: Any, where: str) -> list[Row]:
    """Rows from any iterable, read once: `Row`s as they are, or mappings in any form that a file of rows may have.

    Raises:
        UserError: there are no rows, or one is neither.
    """
    if isinstance(given, (str, bytes, Mapping)) or not (hasattr(given, "__iter__") or hasattr(given, "__len__")):
        raise UserError(f"{where}: rows are a sequence of rows, but these are {type(given).__name__}; give a list")
    if not hasattr(given, "__iter__"):  # by index, as iterating may not end
        given = [given[i] for i in range(len(given))]
    rows = []
    for number, row in enumerate(given, 1):
        at = f"{where}, row {number}"
        if not isinstance(row, (Row, Mapping)):
            raise UserError(f"{at}: a row is a Row or a mapping, but this is {type(row).__name__}")
        if isinstance(row, Row):
            rows.append(row if row.where else replace(row, where=at))
        else:
            rows.append(parse_row(row, at))
    if not rows:
        raise UserError(f"{where}: there are no rows; give at least one")
    return rows


def _chunk(given: Any) -> tuple[int, int] | None:
    """(number, total) of the chunk that a record is; None for any other value under that key."""
    if isinstance(given, list) and len(given) == 2 and all(type(n) is int for n in given) and 0 < given[0] <= given[1]:
        return given[0], given[1]
    return None


def bare(text: str) -> str:
    """A text normalized for comparison: one form of each character, no invisible ones, no punctuation at the end.

    Quotation marks and hyphens are one kind before NFKC, too, which makes a blank and an accent of ´.
    """
    seen = regex.sub(r"\p{Cf}", "", text)
    plain = one_way(unicodedata.normalize("NFKC", one_way(seen))).strip()
    return regex.sub(r"[\p{Terminal_Punctuation}\s]+$", "", plain) or plain


def check_objectives(objectives: Mapping[str, Sequence[Row]]) -> None:
    """Refuse an objective without rows, and a row that two objectives share."""

    def key(row: Row) -> tuple[str, ...]:
        return tuple(bare(text) for text in (*(message["content"] for message in row.prompt), row.answer))

    seen: dict[tuple[str, ...], tuple[str, Row]] = {}
    for name, rows in objectives.items():
        if not rows:
            raise UserError(f"the objective {name!r} has no rows; give it at least one")
        for row in rows:
            objective, other = seen.setdefault(key(row), (name, row))
            if objective != name:
                raise UserError(
                    f"{row.where}: this row of {name!r} also stands in {objective!r} ({other.where}); "
                    "remove it from one"
                )


class Tokens(NamedTuple):
    """A tokenized row: T token ids and as many labels, −100 where nothing is learned."""

    input_ids: list[int]
    labels: list[int]
    ended: int = 0  # how many of the last labeled tokens end the answer and are not part of its text
    group: int = 0  # the row's
    begins: int = 0  # index of the answer's first token that another predicts, labeled or not; 0 where it is not known


def prompt_text(tokenizer: Any, prompt: Sequence[Message]) -> str:
    """The prompt as the chat template writes it, up to the answer; for plain text, the first token and what follows."""
    return turn_of(tokenizer, prompt).prompt


def encode(row: Row, tokenizer: Any, max_length: int, positions: int | None = None) -> Tokens:
    """Tokenize a row in the model's chat template, with labels only on the answer and on what ends its turn.

    A chunk after which its document goes on has no end.

    Args:
        max_length: the most tokens that it may have.
        positions: the most that the model takes; None for any number.

    Raises:
        UserError: no chat template, or one that cannot write the row; too many tokens, which would cut the answer off;
            no end token.
    """
    turn = turn_of(tokenizer, row.prompt, row.where)
    answer = row.answer.strip() if turn.strips else row.answer
    begun, told_apart = turn.prompt + turn.lead, turn.cuts_of(answer)
    text = begun + answer + (turn.closing if row.ends else "")
    cuts = [*turn.cuts, *(len(begun) + cut for cut in told_apart)]
    ids, spans = spelled(tokenizer, text, cuts, opens=turn.opens)
    asked = spelled(tokenizer, turn.prompt, turn.cuts, opens=turn.opens).ids
    if ids[: len(asked)] != asked:  # a token spans prompt and answer; the prompt alone is tokenized without it
        shift = len(turn.prompt)
        rest = spelled(tokenizer, text[shift:], [len(turn.lead) + cut for cut in told_apart], goes_on=True)
        ids = asked + rest.ids
        spans = rest.spans and [(0, 0)] * len(asked) + [(start + shift, end + shift) for start, end in rest.spans]
    most = max_length if positions is None else min(max_length, positions)
    if len(ids) > most:
        what, mend = (
            ("max_length", "raise max_length or shorten the row")
            if most == max_length
            else ("the model's positions, of which there are", "shorten the row")
        )
        if is_included(row):
            mend = "raise max_length" if most == max_length else "take a model with more of them"
        elif is_text(row.prompt):
            mend += ", or give --chunk, which cuts plain text into chunks"
        raise UserError(
            f"{row.where}: the row has {len(ids)} tokens and {what} {most} would cut its answer off; {mend}"
        )
    learned = [i >= len(asked) for i in range(len(ids))]
    if row.only:
        if spans is None:
            raise UserError(
                f"{row.where}: the tokenizer, which is not a fast one, does not tell which characters its tokens "
                "are of, so the words that tell the answer have no labels; give a model with a fast tokenizer"
            )
        told = [(a + len(begun), b + len(begun)) for part in row.only for a, b in places(answer, part)]
        if not told:
            raise UserError(f"{row.where}: none of {', '.join(map(repr, row.only))} stands in the answer")
        learned = [
            i >= len(asked) and any(start < b and end > a for a, b in told) for i, (start, end) in enumerate(spans)
        ]
    labels = [token if here else IGNORED for token, here in zip(ids, learned, strict=True)]
    ended = 0 if row.only else _ended(tokenizer, spans, text, len(begun + answer))
    return Tokens(ids, labels, ended, row.group, max(1, len(asked)))


def longest(texts: Sequence[str], tokenizer: Any) -> int:
    """The index of the text with most tokens."""
    counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return counts.index(max(counts))


def _ended(tokenizer: Any, spans: Sequence[tuple[int, int]] | None, text: str, end: int) -> int:
    """The number of tokens after an answer that ends at character `end`; some include the blanks before them."""
    if spans is None:
        return len(tokenizer(text[end:], add_special_tokens=False)["input_ids"])
    return sum(after > end and not text[start:end].strip() for start, after in spans)


def collate(rows: Sequence[Tokens], pad_id: int) -> dict[str, Tensor]:
    """Pad to the longest row, on the right: ``input_ids``, ``labels`` and ``attention_mask``, each (B, T).

    Also ``groups``, (B,), if any row's group is not 0, and ``answer_starts``, (B,), the index of each answer's first
    token, if one has no label there.
    """
    width = max(len(row.input_ids) for row in rows)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (width - len(values))

    batch = {
        "input_ids": torch.tensor([padded(row.input_ids, pad_id) for row in rows]),
        "labels": torch.tensor([padded(row.labels, IGNORED) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row.input_ids), 0) for row in rows]),
    }
    if any(row.group for row in rows):
        batch["groups"] = torch.tensor([row.group for row in rows])
    if any(row.begins and row.labels[row.begins : row.begins + 1] == [IGNORED] for row in rows):
        batch["answer_starts"] = torch.tensor([row.begins for row in rows])
    return batch


def pad_id(tokenizer: Any) -> int:
    """The id to pad with: 0, which is in every embedding. Padding is masked by its position, not by its id."""
    return 0


class Draw(NamedTuple):
    """One place in a batch: an objective's row, and the refusal drawn for it where its loss needs one.

    With `counts` False it fills a batch that has no row of the objective: it goes through the model with weight 0.
    """

    objective: str
    row: int
    refusal: int
    counts: bool = True


class Item(NamedTuple):
    """What a `Draw` selects: tokens, those of the refusal, and log π_ref of both where it is known."""

    objective: str
    tokens: Tokens
    refused: Tokens | None
    log_prob: float | None
    refused_log_prob: float | None
    counts: bool = True


class ObjectiveRows(Dataset):
    """The rows of every objective, tokenized once; items are indexed by `Draw`.

    Where a loss needs a replacement for a row's answer, it is a refusal, or one of the row's own ``alternates``.

    `reference_log_probs` holds log π_ref(y|x) of a row under (objective, row), of a refusal under (objective, row,
    refusal); the values that it holds go into the batches.
    """

    def __init__(
        self,
        rows: Mapping[str, Sequence[Row]],
        refusals: Mapping[str, Sequence[str]],
        tokenizer: Any,
        max_length: int,
        own: Iterable[str] = (),
        positions: int | None = None,
    ) -> None:
        """`refusals` holds, for each objective whose loss needs them, the replies that may replace an answer.

        `own` are the objectives whose loss needs each row's ``alternates`` instead; `positions` as for `encode`.
        """
        self.rows, self.refusals, self.tokenizer = rows, refusals, tokenizer
        self.fits = max_length, positions
        self.alternates = {name: [row.fields["alternates"] for row in rows[name]] for name in own}
        for name in (*refusals, *self.alternates):
            for row in rows[name]:
                if not row.prompt:
                    raise UserError(
                        f"{row.where}: plain text asks nothing that a refusal could answer; forget it by NPO, GA or "
                        "another loss of the text alone"
                    )
        self.tokens = {name: [encode(row, tokenizer, *self.fits) for row in part] for name, part in rows.items()}
        self.reference_log_probs: dict[tuple, float] = {}
        self._refused: dict[tuple, Tokens] = {}
        common = {name: longest(texts, tokenizer) for name, texts in refusals.items() if texts}
        for name in (*refusals, *self.alternates):  # the longest, so that no step comes to one that is too long
            for i, row in enumerate(rows[name]):
                if row.fields.get("instead") is not None:
                    text_of(row.fields, "instead", row.where)
                if name in self.alternates:
                    self._refusal(name, i, longest(self.alternates[name][i], tokenizer))
                elif name in common:
                    self._refusal(name, i, common[name])

    def __getitem__(self, draw: Draw) -> Item:
        return Item(
            draw.objective,
            self.tokens[draw.objective][draw.row],
            self._refusal(*draw[:3]) if self.stand_ins(draw.objective, draw.row) else None,
            self.reference_log_probs.get(draw[:2]),
            self.reference_log_probs.get(draw[:3]),
            draw.counts,
        )

    def stand_ins(self, objective: str, row: int) -> Sequence[str]:
        """The texts that may replace a row's answer; empty where the objective's loss needs none."""
        return self.alternates[objective][row] if objective in self.alternates else self.refusals.get(objective, ())

    def _refusal(self, objective: str, index: int, refusal: int) -> Tokens:
        key = objective, index, refusal
        if key not in self._refused:
            row = self.rows[objective][index]
            instead = row.fields.get("instead") or self.stand_ins(objective, index)[refusal]
            self._refused[key] = encode(row.answered(instead), self.tokenizer, *self.fits)
        return self._refused[key]

    def replaced(self, objective: str) -> list[Tokens]:
        """An objective's rows with what may replace their answers, the longest of each, where its loss needs that."""
        return [tokens for (name, *_), tokens in self._refused.items() if name == objective]

    def drawn(self, draws: Iterable[Draw]) -> dict[tuple, Tokens]:
        """The rows and refusals that draws ask for, each once, under the keys of `reference_log_probs`."""
        found: dict[tuple, Tokens] = {}
        for draw in draws:
            found[draw[:2]] = self.tokens[draw.objective][draw.row]
            if self.stand_ins(draw.objective, draw.row):
                found[draw[:3]] = self._refusal(*draw[:3])
        return found

    def collate(self, items: Sequence[Item]) -> dict[str, dict[str, Any]]:
        """A batch for each objective among the items: objective → batch, with ``idk`` where there are refusals.

        A batch of a row that does not count has ``idle``.
        """
        batches: dict[str, dict[str, Any]] = {}
        for name in dict.fromkeys(item.objective for item in items):
            part = [item for item in items if item.objective == name]
            batches[name] = self._batch([item.tokens for item in part], [item.log_prob for item in part])
            refused = [item.refused for item in part if item.refused is not None]
            if refused:
                batches[name]["idk"] = self._batch(refused, [item.refused_log_prob for item in part])
            if not part[0].counts:
                batches[name]["idle"] = torch.tensor(True)
        return batches

    def _batch(self, tokens: Sequence[Tokens], log_probs: Sequence[float | None]) -> dict[str, Tensor]:
        batch = collate(tokens, pad_id(self.tokenizer))
        known = [value for value in log_probs if value is not None]
        if len(known) < len(tokens):
            return batch
        return {**batch, "reference_log_probs": torch.tensor(known, dtype=torch.float32)}


class Plan:
    """Every batch of a run, fixed beforehand: a batch sampler of the turns' micro-batches.

    Each objective's rows come in passes: shuffled, then sorted by length within windows of eight batches, so that
    batches hold rows of similar length. Every row comes once in a pass; a window may span two passes. A plan depends
    only on its arguments, so a resumed run can skip to where it stopped.

    Args:
        turns: what each optimizer step serves (`dualoptim.schedule`).
        dataset: the rows.
        micro_batches: how many batches an optimizer step is split into (gradient accumulation, times ranks).
        seed: for the shuffling and the choice of refusals.
        ranks: how many there are. With several, each takes every `ranks`-th batch, and all batches of a step hold the
            same objectives, since ranks must run the same forward and backward passes. Where an objective has fewer
            rows than the step has batches, some repeat a row of another batch, which does not count.

    Raises:
        ValueError: a step has too few rows to be split into so many batches.
    """

    batch_size = None  # batches differ in size
    drop_last = False

    def __init__(
        self, turns: Sequence[Turn], dataset: ObjectiveRows, micro_batches: int, seed: int, ranks: int = 1
    ) -> None:
        streams = {
            name: _Batches([len(t.input_ids) for t in tokens], random.Random(f"{seed}/{name}"))
            for name, tokens in dataset.tokens.items()
        }
        refusal = random.Random(f"{seed}/refusals")
        self.batches: list[list[Draw]] = []
        for turn in turns:
            total = sum(turn.values())
            if total < micro_batches and ranks == 1:
                raise ValueError(
                    f"a step of {total} sequences cannot be split into {micro_batches} batches; raise batch_size or "
                    "lower the gradient accumulation"
                )
            draws: list[tuple[float, Draw]] = []  # each with its place in the step, so that objectives mix evenly
            for name, count in turn.items():
                for i, row in enumerate(streams[name].take(count)):
                    replies = len(dataset.stand_ins(name, row)) or 1
                    draws.append(((i + 0.5) / count, Draw(name, row, refusal.randrange(replies))))
            if ranks == 1:
                ordered = [draw for _, draw in sorted(draws, key=lambda placed: placed[0])]
                cuts = [total * i // micro_batches for i in range(micro_batches + 1)]
                self.batches += [ordered[a:b] for a, b in itertools.pairwise(cuts)]
            else:
                self.batches += [
                    _filled([draw for place, draw in draws if int(place * micro_batches) == i], turn, draws)
                    for i in range(micro_batches)
                ]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        return iter(self.batches)


def _filled(batch: list[Draw], turn: Turn, draws: Sequence[tuple[float, Draw]]) -> list[Draw]:
    """A batch with draws of each objective, in one order on all ranks; where it had none, one that does not count."""
    found: list[Draw] = []
    for name in turn:
        own = [draw for draw in batch if draw.objective == name]
        found += own or [next(draw for _, draw in draws if draw.objective == name)._replace(counts=False)]
    return found


class _Batches:
    """An endless stream of row indices, in batches of rows of similar length."""

    def __init__(self, lengths: Sequence[int], rng: random.Random) -> None:
        self.lengths, self.rng = lengths, rng
        self.pool: list[int] = []
        self.ready: list[int] = []  # one batch after the other; joint steps take unequal numbers of them

    def take(self, count: int) -> list[int]:
        while len(self.ready) < count:
            while len(self.pool) < count:
                self.pool += self.rng.sample(range(len(self.lengths)), len(self.lengths))
            window = min(len(self.pool) // count, 8) * count
            rows, self.pool = self.pool[:window], self.pool[window:]
            # Ties are broken at random, or rows of one length would always share a batch with the same rows.
            rows.sort(key=lambda row: (self.lengths[row], self.rng.random()))
            batches = [rows[i : i + count] for i in range(0, window, count)]
            self.rng.shuffle(batches)
            self.ready += itertools.chain.from_iterable(reversed(batches))
        taken, self.ready = self.ready[:count], self.ready[count:]
        return taken
