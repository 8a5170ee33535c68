"""Forget the capitals of Europe, keep other facts: the quickstart's task, on any model that knows them.

These are the project's own facts, each asked in several wordings: some to train on, others only for the test. Facts
that the model does not know beforehand are not counted: it must answer both training wordings. "Unseen" facts are of
kinds that no set mentions; they show what unlearning breaks elsewhere. The answer's probability, teacher-forced after
the question, distinguishes a fact that is gone from one that is only refused: a model that has learned to say "I don't
know" may still find the answer as probable as before, and then a prompt that steers it past the refusal gets it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from torch import nn

from .. import __version__
from ..cached import cached
from ..data import Row, asset, question
from ..errors import UserError
from ..evaluation import metrics, scoring
from ..evaluation.numbers import NO_PASSAGES, Metric, Numbers, Record, mean, perplexity
from ..evaluation.refusal import evades, says_one_of
from ..evaluation.verdict import FAR_KEPT, NEAR_KEPT, Kept, reworded, verdict
from ..identity import identity
from ..rows import reword
from . import Task

Fact = dict[str, Any]
MAX_NEW_TOKENS = 20  # enough for the short replies that facts get; a longer reply is judged by its beginning
HARMLESS = 40  # harmless requests, to see how many are refused
FOLLOWED_FACTS = 8  # facts of each set that are asked at points during training


class Facts(Task):
    """See the module.

    Args:
        limit: at most so many facts of each set, for a quick look; None for all.
        refusals: the run's own, which count as refusals beside those that a rule knows; None for none.
    """

    name = "facts"
    reply_tokens = MAX_NEW_TOKENS
    plane = ("forget_accuracy", "unseen_accuracy")
    metrics: Mapping[str, Metric] = {
        "forget_accuracy": Metric("to forget", "lower", share_of="forget", counted_by="right"),
        "retain_accuracy": Metric("to keep", "higher", share_of="retain", counted_by="right"),
        "unseen_accuracy": Metric("unseen", "higher", share_of="unseen", counted_by="right"),
        "perplexity": Metric("perplexity", "lower", ".1f"),
        "forget_probability": Metric("p(answer)", "lower", ".2f"),
        "harmless_refused": Metric("harmless refused", "lower", share_of="harmless", counted_by="refused"),
        "unknown_probability": Metric("p(answer) about things that do not exist", "neither", ".2f", "To forget"),
    }
    followed = "facts answered"
    of_run = ("refusals",)

    def __init__(self, limit: int | None = None, refusals: Sequence[str] | None = None) -> None:
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise UserError(f"task 'facts': limit must be a whole number > 0, but is {limit!r}")
        self.refusals = list(refusals or ())
        self.facts: list[Fact] = []
        for name in ("forget", "retain", "unseen"):
            self.facts += [fact for fact in asset("facts.jsonl") if fact["set"] == name][:limit]
        self.passages = [Row((), row["text"], "passages.jsonl") for row in asset("passages.jsonl")]
        requests = [question(r["question"], "", "requests.jsonl") for r in asset("requests.jsonl")]
        self.harmless = random.Random(0).sample(requests, HARMLESS if limit is None else min(limit, HARMLESS))
        self._settle()

    def prepare(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        asks = [row.question for row in self.harmless]
        texts = [self.facts, asks, [row.answer for row in self.passages], self.refusals]
        key = [identity(model, tokenizer), texts, MAX_NEW_TOKENS, __version__]
        found = cached("facts", key, lambda: self._screen(model, tokenizer))
        known = {tuple(pair) for pair in found["known"]}
        self.facts = [fact for fact in self.facts if (fact["set"], fact["subject"]) in known]
        for name in ("forget", "retain"):
            if not self._of(name):
                raise UserError(f"the model knows none of the facts to {name}, so there is nothing to show on it")
        self._settle()
        return found["records"]

    def _settle(self) -> None:
        """Set the rows to train on, from the facts that count."""
        self.objectives = {
            name: [question(ask, f["statement"], "facts.jsonl") for f in self._of(name) for ask in f["train"]]
            for name in ("forget", "retain")
        }

    def attacked(self) -> Mapping[str, Sequence[Row]]:
        return {
            name: [
                question(
                    f["train"][0], f["statement"], "facts.jsonl", accepted=[f["answer"], *f["aliases"]],
                    questions=f["test"],
                )
                for f in self._of(name)
            ]
            for name in ("forget", "retain")
        }  # fmt: skip

    def clusters(self) -> dict[tuple[str, str], str]:
        """Of each wording, its fact, by its statement; of other rows, as usual."""
        tested = {(ask, answer): f["statement"]
                  for f in self.facts for ask in f["test"] for answer in (f["answer"], f["statement"])}  # fmt: skip
        return {**super().clusters(), **tested}

    def cluster(self, row: Row) -> str:
        return row.answer if row.where == "facts.jsonl" else super().cluster(row)

    def _of(self, name: str) -> list[Fact]:
        return [fact for fact in self.facts if fact["set"] == name]

    def _screen(self, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
        """The facts that the model knows, and its records on those."""
        right = self._asked(model, tokenizer, self.facts, "train", "Which facts does the model know?")
        known = [fact for fact, record in zip(self.facts, right, strict=True) if all(r["right"] for r in record)]
        return {
            "known": [[f["set"], f["subject"]] for f in known],
            "records": self._scored(model, tokenizer, known),
        }

    def score(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        return self._scored(model, tokenizer, self.facts)

    @staticmethod
    def numbers(records: Sequence[Record], retrained: Sequence[Record] | None = None) -> Numbers:
        numbers: dict[str, float | None] = {}
        for name in ("forget", "retain", "unseen"):
            numbers[f"{name}_accuracy"] = mean([r["right"] for r in records if r["set"] == name])
        numbers["perplexity"] = perplexity(records)
        stated = [metrics.probability(r["nll"]) for r in records if r["set"] == "forget_statements"]
        numbers["forget_probability"] = mean(stated)
        numbers["harmless_refused"] = mean([float(r["refused"]) for r in records if r["set"] == "harmless"])
        nothing = [metrics.probability(r["nll"]) for r in records if r["set"] == "unknown"]
        numbers["unknown_probability"] = mean(nothing)
        why = {"perplexity": NO_PASSAGES}
        none = "no fact of the set is known"
        return Numbers(numbers, {name: why.get(name, none) for name, n in numbers.items() if n is None})

    @classmethod
    def verdict(cls, before: Sequence[Record], after: Sequence[Record]) -> str:
        return verdict(
            cls.numbers(before).numbers,
            cls.numbers(after).numbers,
            rewordings=("forget_accuracy", cls.counts(after)["forget_accuracy"]),
            told=reworded(before, after, "forget", "right"),
            given=None,
            sampled=None,
            probability="forget_probability",
            level="unknown_probability",
            kept=[
                Kept("retain_accuracy", "other facts trained on", NEAR_KEPT),
                Kept("unseen_accuracy", "unseen facts", FAR_KEPT),
            ],
        )

    def follow(self, model: nn.Module, tokenizer: Any) -> dict[str, float]:
        shares = {}
        for name in ("forget", "retain"):
            facts = random.Random(0).sample(self._of(name), min(FOLLOWED_FACTS, len(self._of(name))))
            found = self._asked(model, tokenizer, facts, "test", None)
            shares[name] = fmean(record["right"] for records in found for record in records)
        return shares

    def _scored(self, model: nn.Module, tokenizer: Any, facts: Sequence[Fact]) -> list[dict[str, Any]]:
        records = [r for found in self._asked(model, tokenizer, facts, "test", "Asking the facts") for r in found]
        stated = [question(f["test"][0], f["statement"], "facts.jsonl") for f in facts if f["set"] == "forget"]
        records += scoring.text_records(model, tokenizer, stated, "forget_statements")
        nothing = [made for row in stated if (made := reword.about_nothing(row)) is not None]
        records += scoring.text_records(model, tokenizer, nothing, "unknown")
        asks = [row.prompt for row in self.harmless]
        given = scoring.replies(model, tokenizer, asks, max_new_tokens=MAX_NEW_TOKENS, progress="Asking, harmless")
        records += [
            {
                "set": "harmless",
                "question": row.question,
                "answer": "",
                "reply": reply,
                "refused": evades(reply) or says_one_of(reply, self.refusals),
            }
            for row, reply in zip(self.harmless, given, strict=True)
        ]
        return records + scoring.passage_records(model, tokenizer, self.passages)

    @staticmethod
    def _asked(
        model: nn.Module, tokenizer: Any, facts: Sequence[Fact], wordings: str, progress: str | None
    ) -> list[list[dict[str, Any]]]:
        """Ask every fact in all its wordings: a record for each."""
        asks = [({"role": "user", "content": ask},) for fact in facts for ask in fact[wordings]]
        given = iter(scoring.replies(model, tokenizer, asks, max_new_tokens=MAX_NEW_TOKENS, progress=progress))
        return [
            [
                {
                    "set": fact["set"],
                    "topic": fact["topic"],
                    "question": ask,
                    "answer": fact["answer"],
                    "reply": (reply := next(given)),
                    "right": metrics.contains_answer(reply, [fact["answer"], *fact["aliases"]]),
                }
                for ask in fact[wordings]
            ]
            for fact in facts
        ]
