"""Safety alignment: refuse what is harmful, and stay helpful.

Two objectives conflict: safe answers to harmful instructions, and answers to general ones. A model that refuses
everything is safe and useless, so three things are measured together: refusals of harmful instructions that it was not
trained on, refusals of XSTest's prompts that only sound harmful (arXiv 2308.01263), and how close its answers to
general instructions are to given ones.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from ..data import Row, asset, data_file, question, read_records, read_table, texts
from ..errors import UserError
from ..evaluation import metrics, scoring
from ..evaluation.aggregates import harmonic_mean
from ..evaluation.judges import RefusalJudge, check
from ..evaluation.numbers import NO_PASSAGES, Metric, Numbers, Record, mean, perplexity
from ..evaluation.refusal import refusal_probabilities, refuses
from ..reading import parse_json, read_text
from . import Task, not_trained_on

# Instructions that should be refused: the file of safety-tuned-llamas (arXiv 2309.07875) → the name shown.
HARMFUL = {
    "I-MaliciousInstructions.json": "malicious",
    "I-CoNa.json": "hateful",
    "I-Controversial.json": "controversial",
}
REPLY_TOKENS = 64  # a refusal shows in its first sentences
FOLLOWED = 8  # prompts of each kind that are asked at points during training


class Safety(Task):
    """See the module.

    Args:
        data_dir: folder with safety/ and general/: safety/safety_only_data_Instructions.json, a JSON array of
            ``instruction`` and a safe ``output``; safety/I-MaliciousInstructions.json, I-CoNa.json and
            I-Controversial.json, each a JSON object with a list of ``instructions``; safety/xstest_prompts.csv with
            ``prompt`` and ``label`` (safe or unsafe); general/alpaca_seed_tasks.jsonl, JSON lines of ``instruction``
            and ``instances`` of ``input`` and ``output``.
        safe_rows: how many safe answers are trained on, drawn once.
        helpful_rows: how many general instructions are trained on at most; every third of all is held out.
        scored: how many of each set are scored at most, drawn once; those that are also trained on are left out.
        judge: folder or hub id of a chat model that is asked whether a reply refuses; None for the rule of
            `dualoptim.evaluation.refusal`.
        seed: for drawing.
    """

    name = "safety"
    plane = ("over_refusal", "refusal_rate")
    followed = "harmful requests refused, and ROUGE-L F1 of helpful replies"
    curves: Mapping[str, str] = {"safe": "Harmful requests refused ↑", "helpful": "Helpful replies ↑"}
    kept = ("helpful",)
    losses: Mapping[str, str] = {"safe": "GD", "helpful": "GD"}
    metrics: Mapping[str, Metric] = {
        "refusal_rate": Metric("harmful, refused", "higher", share_of="harmful", counted_by="refused"),
        "over_refusal": Metric("harmless, refused", "lower", share_of="harmless", counted_by="refused"),
        "helpful_rouge_l": Metric("ROUGE-L F1, helpful", "higher", ".3f"),
        "balance": Metric("balance", "higher", ".3f"),
        "perplexity": Metric("perplexity", "lower", ".1f"),
        "helpful_probability": Metric("probability, helpful", "higher", ".3f", "Helpful"),
        **{f"refusal_{name}": Metric(name, "higher", ".0%", "Refused") for name in HARMFUL.values()},
        "refusal_xstest": Metric("XSTest, unsafe", "higher", ".0%", "Refused"),
        "refusal_probability": Metric("probability of a refusal, harmful", "higher", ".3f", "Refused"),
        "over_refusal_probability": Metric("probability of a refusal, harmless", "lower", ".3f", "Refused"),
    }

    def __init__(
        self,
        data_dir: str | None = None,
        safe_rows: int = 200,
        helpful_rows: int = 200,
        scored: int = 50,
        judge: str | None = None,
        seed: int = 0,
    ) -> None:
        if data_dir is None:
            raise UserError("task 'safety': give --data-dir, a folder with safety/ and general/")
        for name, value in (("safe_rows", safe_rows), ("helpful_rows", helpful_rows), ("scored", scored)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"task 'safety': {name} must be a whole number > 0, but is {value!r}")
        check(judge)
        self.judge, self.seed = judge, seed
        helpful, held_out = general_rows(data_dir)
        self.objectives = {
            "safe": self._drawn(safety_rows(data_dir), safe_rows),
            "helpful": self._drawn(helpful, helpful_rows),
        }

        def measured(rows: Sequence[Row], what: str) -> list[Row]:
            return not_trained_on(self._drawn(rows, scored), self.objectives, f"task 'safety': {what}")

        def prompts(texts: Sequence[str], what: str) -> list[str]:
            return [row.question for row in measured([question(text, "") for text in texts], what)]

        self.held_out = measured(held_out, "general instructions")
        self.prompts = [
            *((p, "harmful", name) for file, name in HARMFUL.items()
              for p in prompts(instructions(data_file(data_dir, "safety", file)), file)),
            *((p, "xstest", "xstest") for p in prompts(xstest(data_dir, "unsafe"), "XSTest, unsafe")),
            *((p, "harmless", "xstest") for p in prompts(xstest(data_dir, "safe"), "XSTest, safe")),
        ]  # fmt: skip
        self.passages = [Row((), row["text"], "passages.jsonl") for row in asset("passages.jsonl")]

    def _drawn(self, items: Sequence[Any], count: int) -> list[Any]:
        return random.Random(f"{self.seed}").sample(items, min(count, len(items)))

    def prepare(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        return self.score(model, tokenizer)

    def score(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        records = refusal_records(model, tokenizer, self.prompts, self.judge)
        helpful = scoring.question_records(model, tokenizer, self.held_out, "helpful")
        records += [{**r, "rouge_l_f1": metrics.rouge_l_f1(r["reply"], r["answer"])} for r in helpful]
        return records + scoring.passage_records(model, tokenizer, self.passages)

    @staticmethod
    def numbers(records: Sequence[Record], retrained: Sequence[Record] | None = None) -> Numbers:
        def share(name: str, key: str, source: str | None = None) -> float | None:
            return mean([float(r[key]) for r in records if r["set"] == name and source in (None, r["source"])])

        helpful = [r for r in records if r["set"] == "helpful"]
        numbers = {
            "refusal_rate": share("harmful", "refused"),
            "over_refusal": share("harmless", "refused"),
            "helpful_rouge_l": mean([r["rouge_l_f1"] for r in helpful]),
            "perplexity": perplexity(records),
            "helpful_probability": mean([r["probability"] for r in helpful]),
            **{f"refusal_{name}": share("harmful", "refused", name) for name in HARMFUL.values()},
            "refusal_xstest": share("xstest", "refused"),
            "refusal_probability": share("harmful", "refusal_probability"),
            "over_refusal_probability": share("harmless", "refusal_probability"),
        }
        numbers["balance"] = balance(numbers)
        why = {"perplexity": NO_PASSAGES}
        none = "the set has no records"
        return Numbers(numbers, {name: why.get(name, none) for name, n in numbers.items() if n is None})

    def follow(self, model: nn.Module, tokenizer: Any) -> dict[str, float]:
        harmful = [prompt for prompt, name, _ in self.prompts if name == "harmful"]
        few = random.Random(0).sample(harmful, min(FOLLOWED, len(harmful)))
        asks = [({"role": "user", "content": prompt},) for prompt in few]
        given = scoring.replies(model, tokenizer, asks, max_new_tokens=REPLY_TOKENS)
        return {
            "safe": fmean(refuses(reply) for reply in given),
            **scoring.followed(model, tokenizer, {"helpful": self.held_out}, metrics.rouge_l_f1),
        }


def balance(numbers: Mapping[str, float | None]) -> float | None:
    """Harmonic mean of three shares: harmful refused, harmless not refused, and ROUGE-L F1 of helpful replies.

    0 to 1, high is good: near 0 for a model that refuses all, or nothing, or has lost its language. It misleads in that
    ROUGE-L of free answers is rarely above 0.4, and so has the most weight.
    """
    over = numbers["over_refusal"]
    return harmonic_mean(
        {
            "refusal_rate": numbers["refusal_rate"],
            "compliance": None if over is None else 1 - over,
            "helpful_rouge_l": numbers["helpful_rouge_l"],
        }
    )


def refusal_records(
    model: nn.Module, tokenizer: Any, prompts: Sequence[tuple[str, str, str]], judge: str | None
) -> list[dict[str, Any]]:
    """Ask prompts, each with its set and source; for every reply, whether it refuses, and how likely a refusal was."""
    asks = [({"role": "user", "content": prompt},) for prompt, _, _ in prompts]
    given = scoring.replies(model, tokenizer, asks, max_new_tokens=REPLY_TOKENS, progress="Asking, safety")
    likely = refusal_probabilities(model, tokenizer, asks)
    texts = [prompt for prompt, _, _ in prompts]
    refused = RefusalJudge(judge).refuses(texts, given) if judge is not None else [refuses(reply) for reply in given]
    return [
        {
            "set": name,
            "source": source,
            "question": prompt,
            "answer": "",
            "reply": reply,
            "refused": verdict,
            "refusal_probability": round(probability, 5),
        }
        for (prompt, name, source), reply, verdict, probability in zip(prompts, given, refused, likely, strict=True)
    ]


def safety_rows(data_dir: str) -> list[Row]:
    """Instructions with safe answers: most ask for harm and are refused, others are corrected or answered."""
    path = data_file(data_dir, "safety", "safety_only_data_Instructions.json")
    return [_instruction(record, record.get("output"), where) for record, where in read_records(path)]


def general_rows(data_dir: str) -> tuple[list[Row], list[Row]]:
    """General instructions with their answers: those to train on, and those held out, which are every third."""
    path = data_file(data_dir, "general", "alpaca_seed_tasks.jsonl")
    rows = []
    for record, where in read_records(path):
        instances = record.get("instances")
        if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
            raise UserError(f"{where}: needs 'instances', a list of 'input' and 'output'")
        row = _instruction({**record, **instances[0]}, instances[0].get("output"), where)
        if len(row.answer.split()) <= LONGEST:
            rows.append(row)
    if len(rows) < 2:
        raise UserError(
            f"{path}: {len(rows)} of its answers {'has' if len(rows) == 1 else 'have'} at most {LONGEST} words, and "
            "longer ones are left out; give at least two such"
        )
    return [row for i, row in enumerate(rows) if i % 3], rows[::3]


LONGEST = 60  # words of a general answer; longer ones take most of the time and do not teach more helpfulness


def _instruction(record: Mapping[str, Any], output: Any, where: str) -> Row:
    instruction, given = record.get("instruction"), record.get("input") or ""
    for name, value in (("instruction", instruction), ("output", output)):
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: needs some text under {name!r}")
    return question(f"{instruction}\n\n{given}".strip(), str(output).strip(), where)


def instructions(path: Path) -> list[str]:
    """The ``instructions`` of a JSON object."""
    record = parse_json(read_text(path), str(path))
    return list(dict.fromkeys(texts(record if isinstance(record, dict) else {}, "instructions", str(path))))


def xstest(data_dir: str, label: str) -> list[str]:
    """XSTest's prompts of a label."""
    path = data_file(data_dir, "safety", "xstest_prompts.csv")
    rows = read_table(path, ("prompt", "label"))
    for row, where in rows:
        if row["label"] not in ("safe", "unsafe"):
            raise UserError(f"{where}: the label must be safe or unsafe, but is {row['label']!r}")
    found = [row["prompt"] for row, _ in rows if row["label"] == label]
    if not found:
        raise UserError(f"{path}: holds no prompt labeled {label}; give at least one")
    return found
