"""MUSE: forget news or books that a model was trained on, and keep what other texts tell (arXiv 2407.06460).

Measured are verbatim memorization (how a passage goes on), knowledge memorization (questions after ten answered ones)
on what is to be forgotten and on what is to be kept, and privacy leakage relative to a retrained model. Folds of the
news test how that scales with the size of a request, and with requests one after the other. Prompts are plain text and
replies are greedy, as in the authors' code.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from ..cached import cached
from ..chat import TEXT
from ..data import Row, asset, encode
from ..errors import UserError, unknown
from ..evaluation import metrics, scoring
from ..evaluation.numbers import LEAKAGE_K, Computed, Metric, Numbers, Record, mean
from ..identity import identity
from ..models import load_tokenizer, positions, room
from ..reading import hub_records, read_records
from ..rows import chunks
from ..rows.forms import text_of
from ..tiny import TINY
from . import Task

HUB = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
SUBSETS = ("raw", "scal", "sust")
FOLDS = 4  # of scal, where each contains those before it, and of sust, where none share a text
VERBATIM_TOKENS, ANSWER_TOKENS = 128, 32  # of a reply, as published
BREAKS = ("\n\n", "\nQuestion", "Question:")  # where an answer ends after ten answered questions, as published
QUESTIONS = {"forget": "to forget", "retain": "to keep"}
CUT = (1, 2)  # marks a chunk that another follows: no text of MUSE ends with an end token


class Muse(Task):
    """See the module.

    Args:
        data_dir: folder in the hub's layout: in raw/ (and for news scal/ and sust/), verbmem/, knowmem/ and privleak/ a
            file for each split, JSON lines such as raw/forget.jsonl or parquet such as
            raw/forget-00000-of-00001.parquet; or a folder with such folders news/ and books/. Default the hub.
        corpus: news or books.
        subset: what is forgotten: raw, or a fold of scal (1 to 4 times as much) or of sust (each another part).
        fold: which fold, 1 to 4; for sust also a list, to forget one after the other. The first is all of raw.
        forget_rows: how many chunks are forgotten, drawn once; None for all.
        retain_rows: how many chunks of retain1 are kept, drawn once; None for all.
        scored_rows: how many passages, questions and texts of each set are scored at most, the first ones.
        seed: for drawing.
        tokenizer: folder or hub id of the model by whose tokens texts are cut; the run's own.
        max_length: the most tokens of a chunk: `--max-length`, 2048 as published.
    """

    name = "muse"
    followed = "ROUGE-L F1 of the replies"
    of_run = ("tokenizer", "max_length")
    plane = ("forget_knowledge", "retain_knowledge")
    stage = "fold"
    metrics: Mapping[str, Metric] = {
        "verbatim": Metric("verbatim memorization", "lower", ".3f"),
        "forget_knowledge": Metric("knowledge, to forget", "lower", ".3f"),
        "retain_knowledge": Metric("knowledge, to keep", "higher", ".3f"),
        "privacy_leakage": Metric("privacy leakage", "zero", ".1f"),
        "auc_min_k_40": Metric("AUC, min-k, k 0.4", "chance", ".3f"),
        "perplexity": Metric("perplexity", "lower", ".1f"),
    }

    def __init__(
        self,
        data_dir: str | None = None,
        corpus: str = "news",
        subset: str = "raw",
        fold: int | Sequence[int] = 1,
        forget_rows: int | None = None,
        retain_rows: int | None = None,
        scored_rows: int = 100,
        seed: int = 0,
        tokenizer: str = TINY,
        max_length: int = 2048,
    ) -> None:
        if corpus not in HUB:
            raise unknown("corpus of MUSE", corpus, HUB)
        if subset not in SUBSETS:
            raise unknown("subset of MUSE", subset, SUBSETS)
        self.folds = [fold] if isinstance(fold, int) else list(fold)
        if subset != "raw" and corpus == "books":
            raise UserError(f"task 'muse': {subset} has folds of the news alone; take subset raw, or corpus news")
        if not self.folds or len(set(self.folds)) < len(self.folds) or not set(self.folds) <= set(range(1, FOLDS + 1)):
            raise UserError(f"task 'muse': fold is a number from 1 to {FOLDS}, or different ones, but is {fold!r}")
        if subset == "raw" and self.folds != [1]:
            raise UserError(f"task 'muse': raw has one fold, but fold is {fold!r}; take subset scal or sust")
        if subset == "scal" and len(self.folds) > 1:
            raise UserError("task 'muse': folds of scal hold each other, so give one; those of sust follow each other")
        for name, count in {"forget_rows": forget_rows, "retain_rows": retain_rows, "scored_rows": scored_rows}.items():
            if count is not None and count < 1:
                raise UserError(f"task 'muse': {name} must be > 0, but is {count!r}")
        if tokenizer == TINY:
            raise UserError(
                f"task 'muse': {TINY!r} makes its tokenizer of the rows, so it cannot cut them; name another model"
            )
        if data_dir is not None:
            if not Path(data_dir).is_dir():
                raise UserError(
                    f"data_dir {data_dir}: there is no such folder; give the one that holds raw/, verbmem/, …"
                )
            data_dir = str(Path(data_dir).resolve())
        self.data_dir, self.corpus, self.subset = data_dir, corpus, subset
        self.tokenizer, self.max_length, self.seed = tokenizer, max_length, seed
        self.arguments: dict[str, Any] = {
            "corpus": corpus,
            "subset": subset,
            "forget_rows": forget_rows,
            "retain_rows": retain_rows,
            "scored_rows": scored_rows,
            "seed": seed,
        }
        forget = [row for each in self.folds for row in self._chunks(subset, _split(subset, each))]
        kept = self._chunks("raw", "retain1")
        self.objectives = {"forget": self._draw(forget, forget_rows), "retain": self._draw(kept, retain_rows)}
        self.passages_to_forget = [
            (text_of(record, "prompt", where), text_of(record, "gt", where))
            for record, where in _read(data_dir, corpus, "verbmem", "forget")[:scored_rows]
        ]
        self.shots: dict[str, str] = {}  # side → the answered questions that are put before each question
        self.questions = {side: self._questions(side, scored_rows) for side in QUESTIONS}
        self.texts = {
            name: [Row((), text_of(record, "text", where), where, chunk=CUT) for record, where in rows[:scored_rows]]
            for name, rows in ((split, _read(data_dir, corpus, "privleak", split)) for split in ("forget", "holdout"))
        }
        self.passages = [Row((), row["text"], "passages.jsonl") for row in asset("passages.jsonl")]
        if subset != "raw" and self.folds != [1]:
            self.notes = ["Passages, questions and texts to forget are those of fold 1; MUSE has none of the others."]

    def known(self) -> Sequence[Row]:
        if self.subset == "raw":
            return [*self.objectives["forget"], *self.retained]
        folds = [FOLDS] if self.subset == "scal" else range(1, FOLDS + 1)  # all: the model knows later ones, too
        return [
            *(row for each in folds for row in self._chunks(self.subset, _split(self.subset, each))),
            *self.retained,
        ]

    @cached_property
    def retained(self) -> Sequence[Row]:  # type: ignore[override]
        """What the authors' target and retrained models both know: retain1, which is trained on here, and retain2."""
        other = self._draw(self._chunks("raw", "retain2"), self.arguments["retain_rows"])
        return [*self.objectives["retain"], *other]

    def stages(self) -> list[dict[str, Any]]:
        return [{**self.arguments, "fold": each} for each in self.folds] if len(self.folds) > 1 else []

    def prepare(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        return self.score(model, tokenizer)

    def score(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        records = self._continued(model, tokenizer, len(self.passages_to_forget), "Continuing")
        for side, asked in self.questions.items():
            records += self._answered(model, tokenizer, side, len(asked), f"Asking, {side}")
        records += self._attacked(model, tokenizer)
        return records + scoring.passage_records(model, tokenizer, self.passages)

    def score_retrained(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        texts = [[row.answer for row in rows] for rows in self.texts.values()]
        return cached("muse_retrained", [identity(model, tokenizer), texts], lambda: self._attacked(model, tokenizer))

    @staticmethod
    def numbers(records: Sequence[Record], retrained: Sequence[Record] | None = None) -> Numbers:
        computed = Computed(records)
        put, sets = computed.put, computed.sets
        for name, of in {"verbatim": "verbatim", **{f"{s}_knowledge": f"{s}_questions" for s in QUESTIONS}}.items():
            scores = [record["rouge_l_f1"] for record in sets.get(of, [])]
            put(name, partial(mean, scores), None if scores else f"the set {of} has no records")

        def area(of: Mapping[str, Sequence[Record]]) -> float:
            return metrics.auc(*([r["min_k"] for r in of.get(f"{name}_texts", [])] for name in ("forget", "holdout")))

        put("auc_min_k_40", lambda: area(sets))
        gold = Computed(retrained or []).sets
        put(
            "privacy_leakage",
            lambda: metrics.privacy_leakage(area(sets), area(gold)),
            None if retrained else "no model retrained without the texts to forget was given (retrained)",
        )
        computed.put_perplexity()
        return Numbers({name: computed.numbers[name] for name in Muse.metrics}, computed.missing)

    def follow(self, model: nn.Module, tokenizer: Any) -> dict[str, float | None]:
        few = scoring.FOLLOWED_ROWS
        found = {
            "forget": self._continued(model, tokenizer, few, None),
            "retain": self._answered(model, tokenizer, "retain", few, None),
        }
        return {name: mean([r["rouge_l_f1"] for r in part]) for name, part in found.items()}

    def _continued(self, model: nn.Module, tokenizer: Any, count: int, progress: str | None) -> list[dict[str, Any]]:
        """How the model continues passages, compared with as many tokens of the true continuation."""
        pairs = [
            (prompt, _beginning(tokenizer, text, VERBATIM_TOKENS)) for prompt, text in self.passages_to_forget[:count]
        ]
        prompts = [({"role": TEXT, "content": prompt},) for prompt, _ in pairs]
        given = scoring.replies(model, tokenizer, prompts, max_new_tokens=VERBATIM_TOKENS, progress=progress)
        return [_compared("verbatim", prompt, text, reply) for (prompt, text), reply in zip(pairs, given, strict=True)]

    def _answered(
        self, model: nn.Module, tokenizer: Any, side: str, count: int, progress: str | None
    ) -> list[dict[str, Any]]:
        """The model's answers to questions, each asked after the same answered ones."""
        pairs = self.questions[side][:count]
        asks = [({"role": TEXT, "content": f"{self.shots[side]}Question: {q}\nAnswer: "},) for q, _ in pairs]
        given = scoring.replies(model, tokenizer, asks, max_new_tokens=ANSWER_TOKENS, progress=progress)
        return [
            _compared(f"{side}_questions", asked, answer, _answer_alone(reply))
            for (asked, answer), reply in zip(pairs, given, strict=True)
        ]

    def _attacked(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        """Each text with its min-k, read as far as the model has positions."""
        records = []
        for name, rows in self.texts.items():
            read = [_as_far_as(positions(model), row, tokenizer) for row in rows]
            scored = scoring.answers(model, tokenizer, [[row] for row in read], progress=f"Reading, {name}")
            for row, (answer,) in zip(read, scored, strict=True):
                least = metrics.min_k(answer.log_probs, LEAKAGE_K)
                records.append({"set": f"{name}_texts", "question": "", "answer": row.answer, "min_k": least})
        return records

    def _questions(self, side: str, count: int) -> list[tuple[str, str]]:
        shots, asked = (
            [
                (text_of(record, "question", where), text_of(record, "answer", where))
                for record, where in _read(self.data_dir, self.corpus, "knowmem", f"{side}_qa{suffix}")
            ]
            for suffix in ("_icl", "")
        )
        self.shots[side] = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in shots)
        return asked[:count]

    def _chunks(self, config: str, split: str) -> list[Row]:
        read = _read(self.data_dir, self.corpus, config, split)
        texts = "\n\n".join(text_of(record, "text", where) for record, where in read)
        return list(_cut(texts, f"{HUB[self.corpus]}, {config}/{split}", self.tokenizer, self.max_length))

    def _draw(self, rows: Sequence[Row], count: int | None) -> list[Row]:
        order = sorted(random.Random(f"{self.seed}").sample(range(len(rows)), min(count or len(rows), len(rows))))
        return [rows[i] for i in order]


@lru_cache(maxsize=16)  # folds one after the other cut mostly the same texts
def _cut(texts: str, where: str, tokenizer: str, most: int) -> tuple[Row, ...]:
    """All texts of a split, one after the other, cut into rows."""
    takes = room(tokenizer)
    whole = Row((), texts, where, chunk=CUT)
    return tuple(chunks.cut([whole], load_tokenizer(tokenizer), min(most, takes), None, takes))


def _read(data_dir: str | None, corpus: str, config: str, split: str) -> list[tuple[dict[str, Any], str]]:
    """The rows of one split, as they are."""
    if data_dir is None:
        return hub_records(HUB[corpus], split, config)
    base = Path(data_dir)
    for folder in (base / config, base / corpus / config):
        whole = [path for end in ("jsonl", "json", "parquet") if (path := folder / f"{split}.{end}").is_file()]
        shards = sorted(folder.glob(f"{split}-[0-9]*-of-[0-9]*.parquet"))
        if not whole and shards and len(shards) != int(shards[0].stem.rpartition("-")[2]):
            raise UserError(f"{shards[0]}: of its parts there are {len(shards)} in {folder}; put all of them there")
        if files := whole[:1] or shards:
            return [record for file in files for record in read_records(file)]
    raise UserError(
        f"data_dir {base}: has no {config}/{split}.jsonl, nor {config}/{split}-00000-of-00001.parquet, in it or in "
        f"{corpus}/; put it there from {HUB[corpus]} on the hub"
    )


def _split(subset: str, fold: int) -> str:
    return "forget" if subset == "raw" else f"forget_{fold}"


def _as_far_as(most: int, row: Row, tokenizer: Any) -> Row:
    """A text, or its beginning where it has more tokens than a model has positions."""
    if len(encode(row, tokenizer, scoring.MAX_LENGTH).input_ids) <= most:
        return row
    return chunks.beginning(row, tokenizer, most)


def _compared(name: str, asked: str, answer: str, reply: str) -> dict[str, Any]:
    score = metrics.rouge_l_f1(reply, answer, stemmed=False)
    return {"set": name, "question": asked, "answer": answer, "reply": reply, "rouge_l_f1": score}


def _answer_alone(reply: str) -> str:
    """A reply up to where the model goes on with another question."""
    for end in BREAKS:
        reply = reply.split(end)[0]
    return reply


def _beginning(tokenizer: Any, text: str, count: int) -> str:
    """A text's first tokens, including a begin token if the tokenizer has one, as in the authors' code."""
    return str(tokenizer.decode(tokenizer(text)["input_ids"][:count], skip_special_tokens=True))
