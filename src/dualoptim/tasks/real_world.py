"""Forget real people, or any topic that a model knows; keep their neighbors and general ability.

A model cannot forget what it does not know. Its replies before unlearning tell which questions it knows, and forgetting
is measured on those as well as on all. Where the rows that a model learned from are not available, its own answers are
used (`dualoptim.build`): it is asked about entities in several wordings.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from ..build import build
from ..data import Row, asset, data_file, parse_row, question, read_records, texts
from ..errors import UserError, unknown
from ..evaluation import metrics, scoring
from ..evaluation.aggregates import SIX, harmonic_mean, overall
from ..evaluation.judges import check
from ..evaluation.numbers import Computed, Metric, Numbers, Record, entailed, judged, lacks, mean, six_metrics
from ..evaluation.refusal import refuses, says_one_of
from ..rows.forms import check_texts, text_of
from ..rows.quoting import Quoting
from ..rows.telling import tells
from . import Task
from .facts import MAX_NEW_TOKENS as FACT_TOKENS

TEMPLATES = ("Who is {}?", "What is {} known for?", "Tell me about {}.", "Describe {} in one or two sentences.")
SETS = {
    "forget": "To forget, all",
    "forget_known": "To forget, known before",
    "retain": "Neighbors, trained on",
    "held_out": "Neighbors, held out",
}
_LABELS = {
    "probability": "probability",
    "rouge_l": "ROUGE-L",
    "truth_ratio": "truth ratio",
    "token_entropy": "token entropy",
    "cosine": "cosine similarity",
    "entailment": "entailment",
}
_UTILITY = (*(f"held_out_{key}" for key in SIX), "facts_accuracy")


def _metrics() -> dict[str, Metric]:
    shown = {
        "forget_known_rouge_l": Metric("ROUGE-L, known and to forget", "lower", ".3f"),
        "forget_known_probability": Metric("probability, known and to forget", "lower", ".3f"),
        "forget_rouge_l": Metric("ROUGE-L, all to forget", "lower", ".3f"),
        "held_out_rouge_l": Metric("ROUGE-L, neighbors held out", "higher", ".3f"),
        "held_out_probability": Metric("probability, neighbors held out", "higher", ".3f"),
        "facts_accuracy": Metric("other facts", "higher", share_of="facts", counted_by="right"),
        "perplexity": Metric("perplexity", "lower", ".1f"),
    }
    for name, title in (("", "all"), ("known_", "known before")):
        group = f"Published aggregates, {title}"
        shown[f"{name}untargeted_forget_efficacy"] = Metric("UFE", "higher", ".3f", group)
        shown[f"{name}efficacy_without_entailment"] = Metric("UFE without entailment", "higher", ".3f", group)
        shown[f"{name}targeted_forget_efficacy"] = Metric("TFE", "higher", ".3f", group)
        shown[f"{name}overall"] = Metric("OVR", "higher", ".3f", group)
    shown["model_utility"] = Metric("MU (neighbors held out, facts)", "higher", ".3f", "Utility")
    shown["utility_without_entailment"] = Metric("MU without entailment", "higher", ".3f", "Utility")
    for name, title in SETS.items():
        forget = name.startswith("forget")
        for key in SIX:
            better = "lower" if forget and key != "token_entropy" else "higher"
            shown.setdefault(f"{name}_{key}", Metric(_LABELS[key], better, ".3f", title))
        if forget:
            shown[f"{name}_idk_entailment"] = Metric("entailment of a refusal", "higher", ".3f", title)
            shown[f"{name}_refused"] = Metric("replies that refuse", "higher", ".0%", title)
    return shown


class RealWorld(Task):
    """See the module.

    Args:
        data_dir: folder with real_world/, JSON lines of ``name``, ``question``, ``answer`` (to train on) and, where
            there is one, ``golden_answer`` (to score against): forget.json and neighbor.json; and, also with
            ``paraphrased_answer`` and a list ``perturbed_answer``, forget_perturbed.json of the same questions, and
            neighbor_perturbed.json of other neighbors, which are held out. Without the folder, rows are built.
        forget: names of entities to forget; None for all in the files.
        keep: names of neighbors to keep; None for all in the files. The last third is held out where rows are built.
        build: ask the model for the answers to train on, in place of those in the files. Always so without `data_dir`.
        samples: answers sampled for each question, beside the greedy one, where rows are built.
        known_only: train only on questions that the model knows; all are asked for that, scored or not, and it must
            know at least one.
        retain_rows: how many neighbors' rows are kept, drawn once; None for all.
        scored_rows: how many rows of each set are scored at most, drawn once.
        embedder: folder or hub id of the sentence embedding model; None for all-MiniLM-L6-v2.
        nli: folder or hub id of a model of natural language inference; without it entailment is not computed.
        seed: for drawing and sampling.
        refusals: the run's own, which replies are compared with; None for the included ones, and what a rule knows.
    """

    name = "real_world"
    of_run = ("refusals",)
    plane = ("forget_known_rouge_l", "held_out_rouge_l")
    followed = "ROUGE-L of the replies"
    metrics: Mapping[str, Metric] = _metrics()

    def __init__(
        self,
        data_dir: str | None = None,
        forget: Sequence[str] | None = None,
        keep: Sequence[str] | None = None,
        build: bool = False,
        samples: int = 2,
        known_only: bool = False,
        retain_rows: int | None = None,
        scored_rows: int = 100,
        embedder: str | None = None,
        nli: str | None = None,
        seed: int = 0,
        refusals: Sequence[str] | None = None,
    ) -> None:
        for name, value, least in (("samples", samples, 0), ("scored_rows", scored_rows, 1)):
            if not isinstance(value, int) or value < least:
                raise UserError(f"task 'real_world': {name} must be a whole number ≥ {least}, but is {value!r}")
        if retain_rows is not None and retain_rows < 1:
            raise UserError(f"task 'real_world': retain_rows must be > 0, or null for all, but is {retain_rows!r}")
        self.built, self.samples, self.known_only, self.seed = build or data_dir is None, samples, known_only, seed
        self.embedder, self.nli = embedder, nli
        if data_dir is None:
            if not forget or not keep:
                raise UserError(
                    "task 'real_world': give --data-dir, or in task_args the names to forget and to keep, such as "
                    '{"forget": ["Agatha Christie"], "keep": ["Arthur Conan Doyle"]}'
                )
            last = max(1, len(keep) // 3)
            if len(keep) < 2:
                raise UserError("task 'real_world': keep needs two names or more, since the last third is held out")
            _check_names([*forget, *keep])
            rows = {"forget": _asks(forget), "retain": _asks(keep[:-last]), "held_out": _asks(keep[-last:])}
            scored = dict(rows)
        else:
            rows = {"forget": _rows(data_dir, "forget.json", forget), "retain": _rows(data_dir, "neighbor.json", keep)}
            scored = {
                "forget": _rows(data_dir, "forget_perturbed.json", forget),
                "retain": rows["retain"],
                "held_out": _rows(data_dir, "neighbor_perturbed.json", None),
            }
        _check_apart(rows["forget"], rows["retain"], scored["held_out"])
        check(embedder, nli)
        draw = random.Random(f"{seed}")
        rows["retain"] = draw.sample(rows["retain"], min(retain_rows or len(rows["retain"]), len(rows["retain"])))
        self.objectives = {name: rows[name] for name in ("forget", "retain")}
        kept = {id(row) for row in rows["retain"]}
        scored["retain"] = [row for row in scored["retain"] if id(row) in kept]
        self.limit = scored_rows
        # With the false answers that tell what is known; rows that are built have none.
        self.compared = scored["forget"] if known_only and data_dir else []
        self.scored = {name: self._drawn(part) if data_dir else part for name, part in scored.items()}
        self.own_refusals = list(refusals or ())
        known = self.own_refusals or [row["text"] for row in asset("refusals.jsonl")]
        self.refusals = [draw.choice(known) for _ in self.scored["forget"]]
        self.facts = [
            question(fact["test"][0], fact["statement"], "facts.jsonl", accepted=[fact["answer"], *fact["aliases"]])
            for fact in asset("facts.jsonl")
        ]
        self.passages = [Row((), row["text"], "passages.jsonl") for row in asset("passages.jsonl")]
        self.screened: list[tuple[Row, bool]] = []  # rows to forget, and whether the model knew their answers

    def cluster(self, row: Row) -> str:
        """The person that the row is about."""
        return str(row.fields.get("name") or super().cluster(row))

    def _drawn(self, rows: Sequence[Row]) -> list[Row]:
        return random.Random(f"{self.seed}").sample(rows, min(self.limit, len(rows)))

    def prepare(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        if self.built:
            self._build(model, tokenizer)
        records = self._scored(model, tokenizer)
        rows = self.scored["forget"]
        asked = [record for record in records if record["set"] == "forget"]
        if self.known_only:
            others = self._not_asked(rows)
            rows, asked = [*rows, *others], asked + self._answered(model, tokenizer, "forget", others)
        self.screened = [(row, knows(record)) for row, record in zip(rows, asked, strict=True)]
        if self.known_only:
            known = [row for row in self.objectives["forget"] if self._is_known(row)]
            if not known:
                raise UserError(
                    "task 'real_world': the model knows none of the questions to forget, so there is nothing to train "
                    "on; leave out known_only, or give entities that it knows"
                )
            self.objectives = {**self.objectives, "forget": known}
        return self._judged(records)

    def _not_asked(self, asked: Sequence[Row]) -> list[Row]:
        """The rows to forget whose answers are still to be compared, those with false answers beside them first."""
        done = set(map(id, asked))
        found = [row for row in self.compared if id(row) not in done]
        names = {_asked(row) for row in (*asked, *found)}
        left = [row for row in self.objectives["forget"] if _asked(row) not in names]
        if self.built:  # the first of several answers to a question, which is the greedy one where that was kept
            left = list({_asked(row): row for row in reversed(left)}.values())
        return found + left

    def _is_known(self, row: Row) -> bool:
        """Whether the model knew a row's answer; where another was compared in its place, such as a `golden_answer`,
        whether it knew that."""
        known = {other.answer: knew for other, knew in self.screened if _asked(other) == _asked(row)}
        return known.get(row.answer, any(known.values()))

    def score(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        return self._judged(self._scored(model, tokenizer))

    def _judged(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        asked = [record for record in records if record["set"] == "forget"]
        for row, record in zip(self.scored["forget"], asked, strict=True):
            record["known"] = self._is_known(row)
        # As published, the premise is the reply on every set.
        return judged(records, self.refusals, self.embedder, self.nli, entailing=SETS)

    def _scored(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        records = []
        for name, rows in self.scored.items():
            asked = self._answered(model, tokenizer, name, rows)
            for record in asked:
                record["refused"] = refuses(record["reply"]) or says_one_of(record["reply"], self.own_refusals)
            records += asked
        asks = [row.prompt for row in self.facts]
        given = scoring.replies(model, tokenizer, asks, max_new_tokens=FACT_TOKENS, progress="Asking, facts")
        for row, reply in zip(self.facts, given, strict=True):
            right = metrics.contains_answer(reply, row.fields["accepted"])
            # The reply has another name here, so that judges skip it.
            records.append(
                {"set": "facts", "question": row.question, "answer": row.answer, "said": reply, "right": right}
            )
        return records + scoring.passage_records(model, tokenizer, self.passages)

    @staticmethod
    def _answered(model: nn.Module, tokenizer: Any, name: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """The model's answers to some rows, compared with paraphrased and false ones where a row has them."""
        others = [
            {
                "paraphrased": [text] if (text := row.fields.get("paraphrased_answer")) else [],
                "perturbed": row.fields.get("perturbed_answer", []),
            }
            for row in rows
        ]
        return scoring.question_records(model, tokenizer, rows, name, others)

    def _build(self, model: nn.Module, tokenizer: Any) -> None:
        """Build the model's own answers for the rows to train on, and without files also for those to score."""
        own = not self.scored["forget"][0].answer
        built = {
            name: build(model, tokenizer, rows, samples=self.samples, seed=self.seed)
            for name, rows in {**self.objectives, **({"held_out": self.scored["held_out"]} if own else {})}.items()
        }
        self.objectives = {name: built[name] for name in self.objectives}
        if own:
            # One answer per question: the first, which is the greedy one where that was kept.
            first = {name: {_asked(row): row for row in reversed(part)} for name, part in built.items()}
            self.scored = {name: self._drawn(list(reversed(part.values()))) for name, part in first.items()}
            self.refusals = self.refusals[: len(self.scored["forget"])]

    @staticmethod
    def numbers(records: Sequence[Record], retrained: Sequence[Record] | None = None) -> Numbers:
        computed = Computed(records)
        sets, put = computed.sets, computed.put
        sets["forget_known"] = [record for record in sets.get("forget", []) if record["known"]]
        for name in SETS:
            six_metrics(name, sets.get(name, []), computed.notes, put)
        facts = sets.get("facts", [])
        put("facts_accuracy", lambda: mean([float(r["right"]) for r in facts]), None if facts else "none were asked")
        computed.put_perplexity()
        without = [key for key in _UTILITY if not key.endswith("entailment")]
        computed.aggregate("model_utility", lambda n: harmonic_mean({key: n[key] for key in _UTILITY}), _UTILITY)
        computed.aggregate("utility_without_entailment", lambda n: harmonic_mean({k: n[k] for k in without}), without)
        for prefix, name in (("", "forget"), ("known_", "forget_known")):
            _forgetting(computed, prefix, name)
        return Numbers({name: computed.numbers[name] for name in RealWorld.metrics}, computed.missing)

    def follow(self, model: nn.Module, tokenizer: Any) -> dict[str, float]:
        known = [row for row in self.scored["forget"] if self._is_known(row)]
        rows = {"forget": known or self.scored["forget"], "retain": self.scored["held_out"]}
        return scoring.followed(model, tokenizer, rows)


def _forgetting(computed: Computed, prefix: str, name: str) -> None:
    """Refusals and the published aggregates on one set to forget."""
    part = computed.sets.get(name, [])
    none = None if part else f"the set {name} has no records"
    # Records of a private run have no text. Those of before lack the judgment.
    said = [r["refused"] if "refused" in r else refuses(r["reply"]) for r in part]
    computed.put(f"{name}_refused", lambda: mean([float(each) for each in said]), none)
    lacking = lacks(part, "idk_entailment", computed.notes)
    computed.put(f"{name}_idk_entailment", lambda: entailed(part, "idk_"), none, lacking)
    five = [f"{name}_{key}" for key in SIX if key != "token_entropy"]
    two = [f"{name}_token_entropy", f"{name}_idk_entailment"]
    three = ["model_utility", f"{prefix}untargeted_forget_efficacy", f"{prefix}targeted_forget_efficacy"]
    four = [key for key in five if not key.endswith("entailment")]
    for title, parts in ((three[1], five), (f"{prefix}efficacy_without_entailment", four)):
        computed.aggregate(title, partial(_unforgotten, parts), parts)
    computed.aggregate(three[2], lambda n: harmonic_mean({key: n[key] for key in two}), two)
    computed.aggregate(f"{prefix}overall", lambda n: overall(*(n[key] for key in three)), three)


def _unforgotten(parts: Sequence[str], numbers: Mapping[str, float | None]) -> float:
    """1 − the mean of numbers that are low where something is forgotten; all of them must be there."""
    return 1 - sum(float(numbers[key] or 0) for key in parts) / len(parts)


def knows(record: Record) -> bool:
    """Whether a model knew an answer: its reply has half of the answer's new words, and half of the numbers among them,
    and no false answer is likelier.

    New words are those that the question lacks: repeating the question's own shows no knowledge. Where no false answers
    are given, only the reply decides.
    """
    true = record["paraphrased_nlls"][0] if record["paraphrased_nlls"] else record["nll"]
    told = tells(record["question"], record["answer"], record["reply"])
    return told and all(true < nll for nll in record["perturbed_nlls"])


def _asked(row: Row) -> tuple[str, str]:
    """Of whom a row asks, and what: the answer may be the model's own, or one of several."""
    return row.fields["name"], row.question


def _check_names(names: Sequence[str]) -> None:
    """Refuse empty and repeated names."""
    seen: set[str] = set()
    for name in names:
        if not name.strip() or name.casefold() in seen:
            raise UserError(f"task 'real_world': names must differ, and none be empty, but are {list(names)}")
        seen.add(name.casefold())


def _check_apart(forget: Sequence[Row], retain: Sequence[Row], held_out: Sequence[Row]) -> None:
    """Refuse neighbors that are to be forgotten, and held out questions that are trained on."""
    names = {row.fields["name"].casefold() for row in forget}
    trained = {row.question.casefold() for row in retain}
    for row in (*retain, *held_out):
        if row.fields["name"].casefold() in names:
            raise UserError(f"{row.where}: {row.fields['name']!r} is also to be forgotten; remove it from one")
    for row in held_out:
        if row.question.casefold() in trained:
            raise UserError(
                f"{row.where}: this question is also trained on; remove it from one of the neighbors' files"
            )


def _asks(names: Sequence[str]) -> list[Row]:
    """Questions about entities, whose answers are still to be built."""
    where = {name: Quoting(f"templates, {name}") for name in names}
    return [question(form.format(name), "", where[name], name=name) for name in names for form in TEMPLATES]


def _rows(data_dir: str, file: str, names: Sequence[str] | None) -> list[Row]:
    """Rows of a file about the named entities, or all."""
    path = data_file(data_dir, "real_world", file)
    perturbed = file.endswith("_perturbed.json")
    rows = []
    for record, where in read_records(path):
        text_of(record, "name", where)
        if perturbed:
            check_texts(record, ("golden_answer", "paraphrased_answer"), where)
            texts(record, "perturbed_answer", where)
        row = parse_row(record, where)
        golden = row.fields.get("golden_answer")
        rows.append(row.answered(golden) if perturbed and golden else row)
    if names is None:
        return rows
    known = dict.fromkeys(row.fields["name"] for row in rows)
    for name in names:
        if name not in known:
            raise unknown("entity", name, known, str(path))
    return [row for row in rows if row.fields["name"] in names]
