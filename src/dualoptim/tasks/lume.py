"""LUME, SemEval-2025 task 4: forget invented stories, made-up people's data and real biographies (arXiv 2502.15097).

Three kinds of documents, each to forget and to keep, are asked for in two ways: a beginning that the model continues
(ROUGE-L), and questions (exact match). The task aggregate is the harmonic mean of these twelve numbers, where those on
what is to be forgotten are taken as 1 minus the number. The score is the mean of the aggregate, of a membership score
and of MMLU. Prompts are plain text without a chat template and replies are greedy, as in the authors' evaluation.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..chat import TEXT
from ..data import Row, asset, data_file
from ..errors import UserError, unknown
from ..evaluation import aggregates, general, metrics, scoring
from ..evaluation.numbers import Computed, Metric, Numbers, Record, mean
from ..reading import hub_records, read_records
from ..rows.forms import text_of
from . import Task

HUB = "llmunlearningsemeval2025organization/semeval25-unlearning-dataset-public"
SPLITS = ("train", "validation")  # on the hub
REPLY_TOKENS = 256  # the authors' max_new_tokens
SIDES = {"forget": "to forget", "retain": "to keep"}
KINDS = {"Task1": "creative", "Task2": "pii", "Task3": "biography"}  # as the files call them
TITLES = {"creative": "Invented stories", "pii": "Made-up people's data", "biography": "Real biographies"}
# What the questions about made-up people ask for → the words by which that is recognized.
FIELDS = {"birth_date": "birth", "ssn": "social security", "phone": "phone", "email": "email", "address": "address"}
FIELD_NAMES = {name: name.replace("_", " ") for name in FIELDS} | {"ssn": "social security number"}
ID = re.compile(r"(?P<document>.+)(?P<form>sc|qa)\d+")
TWELVE = tuple(f"{side}_{kind}_{key}" for side in SIDES for kind in TITLES for key in ("rouge_l", "exact_match"))
SCORE_PARTS = ("task_aggregate", "membership_score", "mmlu")


def _metrics() -> dict[str, Metric]:
    shown = {
        "lume_score": Metric("score (LUME)", "higher", ".3f"),
        "task_aggregate": Metric("task aggregate", "higher", ".3f"),
        "membership_score": Metric("membership score", "higher", ".3f"),
        "mmlu": Metric("MMLU", "higher", ".3f"),
        "auc_loss": Metric("AUC, loss", "chance", ".3f"),
        "perplexity": Metric("perplexity", "lower", ".1f"),
    }
    better = {"forget": "lower", "retain": "higher"}
    for side, words in SIDES.items():
        shown[f"{side}_rouge_l"] = Metric(f"ROUGE-L, {words}", better[side], ".3f")
        shown[f"{side}_exact_match"] = Metric(f"exact match, {words}", better[side])
    for kind, title in TITLES.items():
        for side, words in SIDES.items():
            shown[f"{side}_{kind}_rouge_l"] = Metric(f"ROUGE-L, {words}", better[side], ".3f", title)
            shown[f"{side}_{kind}_exact_match"] = Metric(f"exact match, {words}", better[side], ".0%", title)
    for name, title in FIELD_NAMES.items():
        for side, words in SIDES.items():
            label = f"{title}, {words}"
            shown[f"{side}_pii_{name}"] = Metric(label, better[side], ".0%", "Exact match by what is asked for")
    return shown


class Document(NamedTuple):
    """What is asked about one story or person: a beginning to continue, questions, or both."""

    kind: str
    completions: list[Row]
    questions: list[Row]

    @property
    def rows(self) -> list[Row]:
        """All rows of the document; they are trained on."""
        return [*self.completions, *self.questions]


class Lume(Task):
    """See the module.

    Args:
        data_dir: folder with forget.jsonl and retain.jsonl, JSON lines of ``id`` (it ends in sc1 for a beginning that
            is continued, in qa0, qa1, … for questions), ``input``, ``output`` and ``task`` (Task1, Task2, Task3); and
            optionally member.jsonl and nonmember.jsonl, rows of a ``document`` that the model was, or was not, trained
            on. All of them are in the folder itself, or in a folder lume/. Default the hub, where access must be
            requested.
        split: of the hub's rows, train or validation.
        forget_documents: how many documents of each kind are forgotten, drawn once; None for all.
        retain_documents: how many of each kind are kept, drawn once; None for all.
        scored_documents: how many of each kind and side are scored at most; None for all.
        holdout_documents: how many other documents of each kind among those to forget serve as unseen ones for the
            membership attack; only for a model that memorized nothing but this task's rows.
        reply_tokens: how many a reply may have at least; 256 as published.
        seed: for drawing.
    """

    name = "lume"
    followed = "ROUGE-L of the replies"
    plane = ("forget_rouge_l", "retain_rouge_l")
    metrics: Mapping[str, Metric] = _metrics()

    def __init__(
        self,
        data_dir: str | None = None,
        split: str = "train",
        forget_documents: int | None = None,
        retain_documents: int | None = None,
        scored_documents: int | None = None,
        holdout_documents: int = 0,
        reply_tokens: int = REPLY_TOKENS,
        seed: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise unknown("LUME split", split, SPLITS)
        counts = {"forget_documents": forget_documents, "retain_documents": retain_documents}
        for name, count in {**counts, "scored_documents": scored_documents}.items():
            if count is not None and count < 1:
                raise UserError(f"task 'lume': {name} must be > 0, or null for all, but is {count!r}")
        for name, value, least in (("holdout_documents", holdout_documents, 0), ("reply_tokens", reply_tokens, 1)):
            if value < least:
                raise UserError(f"task 'lume': {name} must be a whole number ≥ {least}, but is {value!r}")
        drawn: dict[str, list[Document]] = {}
        unseen: list[Document] = []
        for side in SIDES:
            found = _documents(_read(data_dir, split, side))
            drawn[side] = []
            for kind in TITLES:
                own = [document for document in found if document.kind == kind]
                own = random.Random(f"{seed}/{kind}").sample(own, len(own))
                count = counts[f"{side}_documents"] or len(own)
                drawn[side] += own[:count]
                unseen += own[count:][:holdout_documents] if side == "forget" else []
                if side == "forget" and holdout_documents > len(own[count:]):
                    raise UserError(
                        f"task 'lume': holdout_documents {holdout_documents} that are not forgotten, but of {kind} "
                        f"there are {len(own[count:])}; lower holdout_documents or forget_documents"
                    )
        self.reply_tokens = reply_tokens
        self.objectives = {side: [row for each in part for row in each.rows] for side, part in drawn.items()}
        self.scored = {
            side: [each for kind in TITLES for each in [d for d in part if d.kind == kind][:scored_documents]]
            for side, part in drawn.items()
        }
        self.members, self.non_members = (_attacked(data_dir, f"{name}.jsonl") for name in ("member", "nonmember"))
        if bool(self.members) != bool(self.non_members):
            raise UserError(
                f"data_dir {data_dir}: has one of member.jsonl and nonmember.jsonl; put the other there, too"
            )
        if self.members and holdout_documents:
            raise UserError("task 'lume': holdout_documents stand for nonmember.jsonl, which is there; leave them out")
        if not self.members:  # then the members are what is forgotten, whose likelihoods are measured anyway
            self.non_members = [row for document in unseen for row in document.completions]
        self.passages = [Row((), row["text"], "passages.jsonl") for row in asset("passages.jsonl")]

    def cluster(self, row: Row) -> str:
        """The story or the person that the row is about."""
        return str(row.fields.get("document") or super().cluster(row))

    def prepare(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        return self.score(model, tokenizer)

    def score(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        records = []
        for side, documents in self.scored.items():
            for form in ("completions", "questions"):
                rows = [row for document in documents for row in getattr(document, form)]
                scored = scoring.question_records(
                    model, tokenizer, rows, f"{side}, {form}", reply_tokens=self.reply_tokens
                )
                for record, row in zip(scored, rows, strict=True):
                    record["set"] = f"{side}_{row.fields['set']}"
                    record["exact_match"] = metrics.exact_match(record["reply"], record["answer"])
                records += scored
        for name, rows in (("members", self.members), ("non_members", self.non_members)):
            records += scoring.text_records(model, tokenizer, rows, name) if rows else []
        return records + scoring.passage_records(model, tokenizer, self.passages)

    @staticmethod
    def numbers(records: Sequence[Record], retrained: Sequence[Record] | None = None) -> Numbers:
        computed = Computed(records)
        put = computed.put
        for side in SIDES:
            every: dict[str, list[Record]] = {"rouge_l": [], "exact_match": []}
            for kind in TITLES:
                asks = [f"{side}_pii_{name}" for name in FIELDS] if kind == "pii" else [f"{side}_{kind}_question"]
                for key, names in (("rouge_l", [f"{side}_{kind}_completion"]), ("exact_match", asks)):
                    part = [record for name in names for record in computed.sets.get(name, [])]
                    put(f"{side}_{kind}_{key}", partial(_mean_of, part, key), _none_of(part, side, kind, key))
                    every[key] += part
            for key, part in every.items():
                put(f"{side}_{key}", partial(_mean_of, part, key), _none_of(part, side, "all kinds", key))
            for name in FIELDS:
                part = computed.sets.get(f"{side}_pii_{name}", [])
                put(
                    f"{side}_pii_{name}", partial(_mean_of, part, "exact_match"), None if part else "no row asks for it"
                )
        _membership(computed)
        mmlu = [r["value"] for r in records if r["set"] == general.SET and (r["task"], r["metric"]) == ("mmlu", "acc")]
        put("mmlu", lambda: mmlu[0], None if mmlu else "MMLU was not asked for (lm_eval: [mmlu])")
        computed.put_perplexity()
        computed.aggregate("task_aggregate", task_aggregate, TWELVE)
        computed.aggregate("lume_score", lambda n: mean([n[part] or 0.0 for part in SCORE_PARTS]), SCORE_PARTS)
        return Numbers({name: computed.numbers[name] for name in Lume.metrics}, computed.missing)

    def follow(self, model: nn.Module, tokenizer: Any) -> dict[str, float]:
        # Evenly spaced, so that all kinds are among the few that are asked.
        step = {side: -(-len(part) // scoring.FOLLOWED_ROWS) for side, part in self.scored.items()}
        rows = {side: [each.rows[0] for each in part[:: step[side]]] for side, part in self.scored.items()}
        return scoring.followed(model, tokenizer, rows)


def task_aggregate(numbers: Mapping[str, float | None]) -> float | None:
    """Harmonic mean of the twelve: ROUGE-L and exact match of each kind, as 1 minus that on what is to be forgotten.

    Args:
        numbers: at least those named in `TWELVE`, 0 to 1; None for what was not computed.
    """
    parts = {name: numbers[name] for name in TWELVE}
    return aggregates.harmonic_mean(
        {name: 1 - x if name.startswith("forget") and x is not None else x for name, x in parts.items()}
    )


def _membership(computed: Computed) -> None:
    """The AUC of the attack by loss, and the score that is computed from it."""
    sets = computed.sets
    forgotten = [r for kind in TITLES for r in sets.get(f"forget_{kind}_completion", [])]
    members, others = sets.get("members", forgotten), sets.get("non_members", [])
    unseen = "no rows that the model never saw were given (nonmember.jsonl, or task_args.holdout_documents)"

    def auc() -> float:
        return metrics.auc(*([metrics.membership_loss(r["nll"]) for r in part] for part in (members, others)))

    computed.put("auc_loss", auc, None if others else unseen)
    computed.aggregate("membership_score", lambda n: metrics.membership_score(n["auc_loss"] or 0.0), ["auc_loss"])


def _mean_of(records: Sequence[Record], key: str) -> float | None:
    return mean([record[key] for record in records])


def _none_of(records: Sequence[Record], side: str, kind: str, key: str) -> str | None:
    asked = "beginning to continue" if key == "rouge_l" else "question"
    return None if records else f"no {asked} of {kind} {SIDES[side]} was scored"


def _read(data_dir: str | None, split: str, side: str) -> list[tuple[dict[str, Any], str]]:
    """The rows of one side, as they are."""
    if data_dir is None:
        return hub_records(HUB, f"{side}_{split}")
    return read_records(data_file(data_dir, "lume", f"{side}.jsonl"))


def _documents(records: Sequence[tuple[Mapping[str, Any], str]]) -> list[Document]:
    """Rows grouped by the document that they are about."""
    found: dict[str, Document] = {}
    for record, where in records:
        given, asked, answer, task = (text_of(record, key, where) for key in ("id", "input", "output", "task"))
        told = ID.fullmatch(given)
        if told is None:
            raise UserError(f"{where}: an id ends in sc and a number, or in qa and a number, but this is {given!r}")
        if task not in KINDS:
            raise unknown("task", task, KINDS, where)
        kind = KINDS[task]
        document = found.setdefault(told["document"], Document(kind, [], []))
        completes = told["form"] == "sc"
        what = "completion" if completes else _field(asked, where) if kind == "pii" else "question"
        # The files' outputs lack the blank before the continuation.
        row = Row(
            ({"role": TEXT, "content": asked},),
            f" {answer}",
            where,
            {"set": f"{kind}_{what}", "document": told["document"]},
        )
        (document.completions if completes else document.questions).append(row)
    return list(found.values())


def _field(asked: str, where: str) -> str:
    """What a question about a made-up person asks for."""
    for name, words in FIELDS.items():
        if words in asked.lower():
            return name
    raise UserError(
        f"{where}: asks for none of {', '.join(FIELD_NAMES.values())}, as questions of Task2 do, but {asked!r}"
    )


def _attacked(data_dir: str | None, name: str) -> list[Row]:
    """The documents of the membership attack; none where there is no such file."""
    if data_dir is None:
        records = hub_records(HUB, "train", data_files=f"mia_data/{name}")
    else:
        base = Path(data_dir)
        places = (base / name, base / "mia_data" / name, base / "lume" / name)
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            return []
        records = read_records(file)
    # Marked as a chunk that another follows, since the attack is on the text without an end token.
    return [Row((), text_of(record, "document", where), where, chunk=(1, 2)) for record, where in records]
