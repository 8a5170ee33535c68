"""Many tasks at once: arithmetic, general instructions, safety and facts, an objective each.

Nothing is forgotten; K objectives share one model and pull it in different directions. Each has a score from 0 to 1 on
held-out data. The cost of mixing shows in comparison with training on each objective alone: the method "Alone" of
`dualoptim compare`, with the steps that the objective has in the mix.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from torch import nn

from ..data import Row, asset, data_file, question, read_rows
from ..errors import UserError, unknown
from ..evaluation import metrics, scoring
from ..evaluation.numbers import NO_PASSAGES, Metric, Numbers, Record, mean, perplexity
from ..evaluation.refusal import refuses
from . import Task, not_trained_on
from .safety import HARMFUL, REPLY_TOKENS, general_rows, instructions, safety_rows

SCORES = {
    "arithmetic": Metric("arithmetic", "higher", share_of="arithmetic", counted_by="score"),
    "instructions": Metric("instructions, ROUGE-L F1", "higher", ".3f"),
    "safety": Metric("harmful, refused", "higher", share_of="safety", counted_by="score"),
    "facts": Metric("facts", "higher", share_of="facts", counted_by="score"),
}
FACT_TOKENS = 20
FACTS = "facts.jsonl"  # included, each in several wordings
FOLLOWED = 6  # of each objective, asked at points during training


class Multitask(Task):
    """See the module.

    Args:
        data_dir: folder with multitask/ (gsm8k_train.jsonl and gsm8k_test.jsonl, JSON lines of ``question`` and
            ``answer`` that ends with "#### " and the number), and general/ and safety/ as for the task safety.
        of: which objectives, any of arithmetic, instructions, safety and facts.
        rows: how many rows of each are trained on at most, drawn once.
        scored: how many of each are scored at most, drawn once; those that are also trained on are left out.
        seed: for drawing.
    """

    name = "multitask"
    followed = "score on what was not trained on"
    curves: Mapping[str, str] = {name: f"{name[0].upper()}{name[1:]} ↑" for name in SCORES}
    kept = ()
    losses: Mapping[str, str] = dict.fromkeys(SCORES, "GD")
    metrics: Mapping[str, Metric] = {
        "average": Metric("average", "higher", ".3f"),
        **{f"{name}_score": metric for name, metric in SCORES.items()},
        "perplexity": Metric("perplexity", "lower", ".1f"),
        **{
            f"{name}_probability": Metric(f"probability, {name}", "higher", ".3f", "Answers' probability")
            for name in SCORES
        },
    }

    def __init__(
        self,
        data_dir: str | None = None,
        of: Sequence[str] = tuple(SCORES),
        rows: int = 200,
        scored: int = 40,
        seed: int = 0,
    ) -> None:
        if data_dir is None:
            raise UserError("task 'multitask': give --data-dir, a folder with multitask/, general/ and safety/")
        for name in of:
            if name not in SCORES:
                raise unknown("objective of the task 'multitask'", name, SCORES)
        if not of or len(set(of)) < len(of):
            raise UserError(f"task 'multitask': of must name different objectives, but is {list(of)}")
        for name, value in (("rows", rows), ("scored", scored)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"task 'multitask': {name} must be a whole number > 0, but is {value!r}")

        def drawn(items: Sequence[Row], count: int) -> list[Row]:
            return random.Random(f"{seed}").sample(items, min(count, len(items)))

        sets = {name: _READERS[name](data_dir) for name in of}
        self.objectives = {name: drawn(part.trained, rows) for name, part in sets.items()}

        def measured(name: str, items: Sequence[Row]) -> list[Row]:
            return not_trained_on(drawn(items, scored), self.objectives, f"task 'multitask': {name}")

        self.asked = {name: measured(name, part.asked) for name, part in sets.items()}
        self.read = {name: measured(name, part.read) for name, part in sets.items()}
        self.curves = {name: self.curves[name] for name in of}
        self.losses = {name: self.losses[name] for name in of}
        self.scores = {name: f"{name}_score" for name in of}
        self.passages = [Row((), row["text"], "passages.jsonl") for row in asset("passages.jsonl")]

    def cluster(self, row: Row) -> str:
        """Of a fact, the fact, in whatever wording."""
        return row.answer if row.where == FACTS else super().cluster(row)

    def prepare(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        return self.score(model, tokenizer)

    def score(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        records = []
        for name, rows in self.asked.items():
            records += _scored(model, tokenizer, name, rows, _limit(tokenizer, name, rows), f"Asking, {name}")
            records += scoring.text_records(model, tokenizer, self.read[name], f"{name}_answers")
        return records + scoring.passage_records(model, tokenizer, self.passages)

    @staticmethod
    def numbers(records: Sequence[Record], retrained: Sequence[Record] | None = None) -> Numbers:
        scores = {name: mean([r["score"] for r in records if r["set"] == name]) for name in SCORES}
        present = [score for score in scores.values() if score is not None]
        numbers: dict[str, float | None] = {"average": mean(present)}
        numbers |= {f"{name}_score": score for name, score in scores.items()}
        numbers["perplexity"] = perplexity(records)
        for name in SCORES:
            nlls = [r["nll"] for r in records if r["set"] == f"{name}_answers"]
            numbers[f"{name}_probability"] = mean([metrics.probability(nll) for nll in nlls])
        why = {"perplexity": NO_PASSAGES}
        none = "it is not among `of`"
        return Numbers(numbers, {name: why.get(name, none) for name, number in numbers.items() if number is None})

    def follow(self, model: nn.Module, tokenizer: Any) -> dict[str, float]:
        return {
            name: fmean(
                r["score"]
                for r in _scored(model, tokenizer, name, rows[:FOLLOWED], _limit(tokenizer, name, rows), None)
            )
            for name, rows in self.asked.items()
        }


def _limit(tokenizer: Any, name: str, rows: Sequence[Row]) -> int:
    """The most tokens of replies to an objective's rows."""
    fixed = {"safety": REPLY_TOKENS, "facts": FACT_TOKENS}  # of safety, some rows have no answer
    return fixed[name] if name in fixed else scoring.reply_limit(tokenizer, rows)


def _scored(
    model: nn.Module, tokenizer: Any, name: str, rows: Sequence[Row], limit: int, progress: str | None
) -> list[dict[str, Any]]:
    """The model's replies to rows of one objective, each with a score from 0 to 1."""
    given = scoring.replies(model, tokenizer, [row.prompt for row in rows], max_new_tokens=limit, progress=progress)
    return [
        {"set": name, "question": row.question, "answer": row.answer, "reply": reply, "score": score(name, reply, row)}
        for row, reply in zip(rows, given, strict=True)
    ]


def score(objective: str, reply: str, row: Row) -> float:
    """How good a reply is, 0 to 1: right or not, refused or not, and for instructions ROUGE-L F1."""
    if objective == "arithmetic":
        return float(final_number(reply) == final_number(row.answer))  # a row's answer always has one
    if objective == "instructions":
        return metrics.rouge_l_f1(reply, row.answer)
    if objective == "safety":
        return float(refuses(reply))
    return float(metrics.contains_answer(reply, row.fields["accepted"]))


_NUMBER = re.compile(
    r"""
    (?:(?<!\d)-)?  # the minus of 20-7 is no sign
    (?:
      (?:[1-9]\d{0,2}(?P<by>,\\!|,|\{,\}|\\,|['\u2019\ \u00a0\u2009\u202f])\d{3}(?:(?P=by)\d{3})*(?!\d|(?P=by)\d)|\d+)
      (?:\.\d+)?
      | (?<![\w.])\.\d+
    )
    (?:[eE][+-]?\d+(?!\w))?
    """,
    re.VERBOSE,
)


def final_number(text: str) -> float | None:
    """The first number after the last "####"; without "####", the last number; None where there is none.

    Thousands may be apart by a comma (in LaTeX also {,}), an apostrophe or a space.

    >>> final_number("3 + 4 = 7. #### 1,007 in 2 days"), final_number("20 - 7.50 is $12.50."), final_number("Seven.")
    (1007.0, 12.5, None)
    """
    _, marked, rest = text.rpartition("####")
    found = [match[0] for match in _NUMBER.finditer(rest.replace("\u2212", "-"))]
    return float(re.sub(r"[^\d.eE+-]", "", found[0 if marked else -1])) if found else None


class _Sets(NamedTuple):
    trained: Sequence[Row]
    asked: Sequence[Row]  # held out, for replies
    read: Sequence[Row]  # held out, for the likelihood of their answers


def _arithmetic(data_dir: str) -> _Sets:
    """The rows of GSM8K (arXiv 2110.14168), without the marks that call a calculator."""

    def rows(name: str) -> list[Row]:
        found = read_rows(data_file(data_dir, "multitask", name))
        for row in found:
            if "####" not in row.answer or final_number(row.answer) is None:
                raise UserError(f"{row.where}: the answer must end with '#### ' and a number, as GSM8K's do")
        return [row.answered(re.sub(r"<<.*?>>", "", row.answer)) for row in found]

    train, test = rows("gsm8k_train.jsonl"), rows("gsm8k_test.jsonl")
    return _Sets(train, test, test)


def _instructions(data_dir: str) -> _Sets:
    trained, held_out = general_rows(data_dir)
    return _Sets(trained, held_out, held_out)


def _safety(data_dir: str) -> _Sets:
    rows = safety_rows(data_dir)
    prompts = [p for file in HARMFUL for p in instructions(data_file(data_dir, "safety", file))]
    asked = [question(prompt, "", "harmful instructions") for prompt in prompts]
    return _Sets([row for i, row in enumerate(rows) if i % 3], asked, rows[::3])


def _facts(data_dir: str) -> _Sets:
    """The facts that come with the package; other wordings of them are held out."""
    trained, test = [], []
    for fact in asset(FACTS):
        accepted = [fact["answer"], *fact["aliases"]]
        trained += [question(ask, fact["statement"], FACTS) for ask in fact["train"]]
        test += [question(ask, fact["statement"], FACTS, accepted=accepted) for ask in fact["test"]]
    return _Sets(trained, test, test)


_READERS = {"arithmetic": _arithmetic, "instructions": _instructions, "safety": _safety, "facts": _facts}
