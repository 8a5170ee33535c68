"""Anybody's own rows: forget those, keep everything else, and measure both.

What is trained on is not what is measured. To forget are the rows as given and in a few plain wordings, those alone
that the model knows. To keep are most of the rows of `--retain`, neighbors of what is forgotten, and a general part:
questions that come along, answered by the model itself, so that keeping means staying as it was.

Measured are wordings never trained on, the answer's own probability, sampled replies; rows of `--retain` that were kept
aside and neighbors that the model knew; unrelated facts, perplexity, and harmless requests that it now refuses.
"""

from __future__ import annotations

import dataclasses
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

import torch
from torch import nn

from .. import reword
from ..build import build, own_replies
from ..data import Row, asset, encode, is_text, parse_row, question, read_records, reworded, texts
from ..errors import UserError
from ..evaluation import metrics, scoring
from ..evaluation.numbers import Metric, Numbers, Record, mean
from ..evaluation.refusal import refuses
from ..losses import IGNORED
from . import Task

Goal = Literal["refuse", "erase"]
SCORED_ROWS = 40  # rows of each set that are measured, drawn once
FEW = 6  # rows to keep, of which none is trained on where there are no more
HELD_OUT = 3  # every third row to keep is kept aside
SAMPLES = 4  # replies to each row to forget, at temperature 0.7; the worst counts
NEAREST = 60  # of the known facts that come along, asked as neighbors
FAR = 40  # others of them, trained on as a part of everything else
WRITTEN = 24  # neighbors that the model writes itself, at most
HARMLESS = 60  # of the requests that come along, kept aside to see what is refused
FOLLOWED = 12  # questions of each kind that decide when to stop
REPLY_TOKENS = 24  # of replies that are only looked through for an answer
OWN_TOKENS = 40  # of the model's own replies that are trained on
TOPIC = ("Who is {}?", "What is {} known for?", "Tell me about {}.", "Describe {} in one or two sentences.")
TOPIC_MEASURED = ("What do you know about {}?", "Give me some information on {}.", "Write a sentence about {}.")
# What plain text goes on with in place of the answer.
TEXT_REFUSALS = ("not known to me.", "something that I don't know.", "not something that I can tell.")
# What the verdict calls too much: shares of what was kept before, and rises of refusals and of perplexity.
NEAR_KEPT, FAR_KEPT, REFUSED, WORSE = 0.85, 0.95, 0.05, 0.05
ERASED = 0.2  # of the answer's probability before, from which it counts as gone
KNOWN = 0.5  # share of an answer's news that a reply holds which gives it


class Files(Task):
    """See the module.

    Args:
        forget: file of rows to forget; a row may also have ``accepted``, texts of which a reply that holds one gives
            the answer, ``questions``, wordings to measure by, never trained on, and ``instead``, what to answer in
            place of a refusal; or it has a ``topic`` alone, a name, about which the model's own answers are forgotten.
        retain: file of rows to keep; None for none.
        goal: "refuse": it says that it does not know, or what stands in ``instead``. "erase": what tells the answer
            becomes improbable.
        general: also keep neighbors and the general part; without it, the rows of `retain` alone, all of them trained
            on that are not kept aside.
    """

    name = "files"
    followed = "share still answered (erase: probability of the answer, of what it was), and of facts still answered"
    metrics: Mapping[str, Metric] = {
        "reworded_answered": Metric("answered, reworded", "lower", share_of="reworded"),
        "forget_answered": Metric("answered, as given", "lower", share_of="forget"),
        "forget_sampled": Metric("answered, worst of 4 samples", "lower", share_of="forget"),
        "forget_probability": Metric("p(answer)", "lower", ".3f"),
        "nearby_answered": Metric("kept nearby", "higher", share_of="nearby"),
        "facts_answered": Metric("unrelated facts", "higher", share_of="facts"),
        "harmless_refused": Metric("harmless refused", "lower", share_of="harmless"),
        "perplexity": Metric("perplexity", "lower", ".1f"),
        "unknown_probability": Metric("p(answer) about things that do not exist", "chance", ".3f", "To forget"),
        "extraction_strength": Metric("extraction strength", "lower", ".3f", "To forget"),
        "forget_refused": Metric("refused, as given", "higher", ".0%", "To forget"),
        "reworded_refused": Metric("refused, reworded", "higher", ".0%", "To forget"),
        "whole_probability": Metric("probability of the whole answer", "lower", ".3f", "To forget"),
        "forget_rouge_l": Metric("ROUGE-L", "lower", ".3f", "To forget"),
        "retain_answered": Metric("answered, held out of --retain", "higher", ".0%", "To keep"),
        "retain_probability": Metric("probability, held out of --retain", "higher", ".3f", "To keep"),
        "retain_rouge_l": Metric("ROUGE-L, held out of --retain", "higher", ".3f", "To keep"),
        "neighbors_answered": Metric("answered, neighbors", "higher", ".0%", "To keep"),
        "nearby_refused": Metric("refused, nearby", "lower", ".0%", "To keep"),
        "facts_refused": Metric("refused, unrelated facts", "lower", ".0%", "To keep"),
    }

    def __init__(self, forget: str, retain: str | None = None, goal: Goal = "refuse", general: bool = True) -> None:
        self.goal, self.general = goal, general
        self.topics: list[str] = []
        self.given = _rows_to_forget(forget, self.topics)
        self.kept = [_checked(parse_row(r, where)) for r, where in read_records(retain)] if retain is not None else []
        if not general and not self.kept:
            raise UserError("general false keeps the rows of --retain alone; give --retain FILE, or leave it out")
        _check_apart(self.given, self.kept)
        self.notes: list[str] = []
        if not general:
            self.notes.append(
                "Trained to keep the rows of --retain alone: what no row mentions may be lost, and so may the habit of "
                "answering at all."
            )
        draw = random.Random(0)
        order = draw.sample(range(len(self.kept)), len(self.kept))
        held = [i for place, i in enumerate(order) if len(self.kept) <= FEW or place % HELD_OUT == 0]
        if not general:
            held = held if len(self.kept) > FEW else held[::2]
        self.held_out = [_asking(self.kept[i]) for i in sorted(held)][:SCORED_ROWS]
        self.trained = [row for i, row in enumerate(self.kept) if i not in held]
        requests = [r["question"] for r in asset("requests.jsonl")]
        draw.shuffle(requests)
        self.harmless = [question(text, "", "requests.jsonl") for text in requests[:HARMLESS]]
        self.requests = [question(r["question"], "", "general.jsonl") for r in asset("general.jsonl")]
        self.requests += [question(text, "", "requests.jsonl") for text in requests[HARMLESS:]]
        # Unrelated is what no row mentions, and no other fact of a topic that a row does.
        facts = [
            question(f["train"][0], f["statement"], "facts.jsonl", accepted=[f["answer"], *f["aliases"]],
                     topic=f["topic"], test=f["test"][0])
            for f in asset("facts.jsonl")
        ]  # fmt: skip
        bank = [
            question(f["question"], f["answer"], "known_facts.jsonl", accepted=[f["answer"], *f["aliases"]])
            for f in asset("known_facts.jsonl")
        ]
        touched = {row.fields["topic"] for row in facts if self._touches(row)}
        self.facts = [row for row in facts if row.fields["topic"] not in touched]
        self.bank = [row for row in bank if not self._touches(row)]
        self.passages = [Row((), row["text"], "passages.jsonl") for row in asset("passages.jsonl")]
        self.reworded: list[Row] = []
        self.checked: dict[str, list[Row]] = {}
        self.neighbors: list[Row] = []
        self.level = 1.0  # of the answer's probability before, which `follow` is relative to
        self.objectives = {"forget": self._to_train(self.given), "retain": self.trained or self.kept or self.requests}
        if not self.given:  # topics alone: rows are built of what the model says
            self.objectives["forget"] = [question(form.format(name), name) for name in self.topics for form in TOPIC]
        self.built = general or bool(self.topics)

    def _touches(self, row: Row) -> bool:
        """Whether a row that comes along asks for what is to be forgotten, or tells it."""
        said = f"{row.question} {row.answer}"
        if any(metrics.contains_answer(said, [name]) for name in self.topics):
            return True
        return any(
            reword.alike(row.question, other.question)
            or metrics.contains_answer(row.answer, other.only)
            or _gives(other, row.answer)
            for other in self.given
        )

    def _to_train(self, rows: Sequence[Row]) -> list[Row]:
        """The wordings to train on; under "erase" with labels on what tells the answer alone."""
        made: list[Row] = []
        for row in rows:
            asking = _asking(row)
            if is_text(asking.prompt):
                found = reword.wordings(asking, reword.TEXT_TRAINED)
                if self.goal == "refuse" and not row.fields.get("instead"):
                    instead = [f" {TEXT_REFUSALS[(len(made) + i) % len(TEXT_REFUSALS)]}" for i in range(len(found))]
                    found = [
                        dataclasses.replace(r, fields={**r.fields, "instead": text})
                        for r, text in zip(found, instead, strict=True)
                    ]
            else:
                found = reword.wordings(asking, tuple(dict.fromkeys(reword.TRAINED)))
            made += [r if self.goal == "erase" else dataclasses.replace(r, only=()) for r in found]
        return made

    # What the model knows

    def prepare(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        if self.topics:
            self._build_topics(model, tokenizer)
        self._screen(model, tokenizer)
        self._find_neighbors(model, tokenizer)
        known = [row for row in self.given if row.fields["known"]]
        near = self.neighbors[0::3]  # the others are measured, or decide when to stop
        self.checked = {
            "forget": [row for one in known for row in _checking(one)],
            "retain": [*self.neighbors[1::3][:FOLLOWED], *self.far[:FOLLOWED]],
        }
        few = random.Random(1)
        self.checked["forget"] = few.sample(self.checked["forget"], min(FOLLOWED, len(self.checked["forget"])))
        self.neighbors = self.neighbors[2::3]
        retain = list(self.trained)
        if self.general:
            asks = [*near, *self.far[FOLLOWED:], *self.requests]
            own = own_replies(model, tokenizer, asks, max_new_tokens=OWN_TOKENS)
            # In the same wordings as what is forgotten, so that no wording means a refusal.
            wordings = [w for w in dict.fromkeys(reword.TRAINED) if "{indirect}" not in w]
            retain += [reworded(r, few.choice(wordings).format(r.question)) if few.random() < 0.5 else r for r in own]
        self.objectives = {"forget": self._to_train(known), "retain": retain or self.trained}
        records = self.score(model, tokenizer)
        stated = [r["probability"] for r in records if r["set"] == "forget" and r["known"]]
        self.level = fmean(stated) if stated else 1.0
        return records

    def _build_topics(self, model: nn.Module, tokenizer: Any) -> None:
        """Rows of what the model itself says about the topics."""
        asks = [question(form.format(name), "", name, name=name) for name in self.topics for form in TOPIC]
        for row in build(model, tokenizer, asks, samples=1):
            told = [form.format(row.fields["name"]) for form in TOPIC_MEASURED]
            self.given.append(_checked(dataclasses.replace(row, fields={"questions": told})))
        self.topics = []

    def _screen(self, model: nn.Module, tokenizer: Any) -> None:
        """Which rows the model knows, and by which wordings that are never trained on."""
        rows = random.Random(0).sample(self.given, min(SCORED_ROWS, len(self.given)))
        others = [row for row in self.given if not any(row is drawn for drawn in rows)]
        candidates: list[tuple[Row, Row, bool]] = []  # the row, its wording, whether it is the user's own
        asking = [_asking(row) for row in rows]
        chats = [row for row in asking if not is_text(row.prompt) and not row.fields.get("questions")]
        written = iter(
            reword.written(model, tokenizer, chats, reword.IN_OTHER_WORDS, samples=4, progress="Rewording")
            if chats
            else []
        )
        for row in asking:
            if own := row.fields.get("questions"):
                candidates += [(row, reworded(row, text), True) for text in own]
                continue
            templates = reword.TEXT_MEASURED if is_text(row.prompt) else reword.MEASURED
            candidates += [(row, made, False) for made in reword.wordings(row, templates)]
            if not is_text(row.prompt):
                same = [text for text in next(written) if reword.alike(text, row.question)]
                candidates += [(row, reworded(row, text), False) for text in same]
        asked = [*asking, *(made for _, made, _ in candidates)]
        told = [
            _gives(r, reply) for r, reply in zip(asked, self._asked(model, tokenizer, asked, "Asking"), strict=True)
        ]
        first, second = told[: len(asking)], told[len(asking) :]
        knows = {id(row) for row, right in zip(asking, first, strict=True) if right}
        knows |= {id(row) for (row, _, _), right in zip(candidates, second, strict=True) if right}
        if not knows:
            warnings.warn(
                "the model gives the answer of none of the rows to forget, as given or reworded: there may be nothing "
                "to forget; all of them are trained on",
                stacklevel=2,
            )
            self.notes.append("The model gave the answer of none of the rows to forget before: nothing to forget.")
            knows = {id(row) for row in asking}
        elif unknown := [row.where for row in asking if id(row) not in knows]:
            self.notes.append(
                f"{len(unknown)} of {len(asking)} rows are not known to the model and were left out: "
                f"{', '.join(unknown[:6])}{', …' if len(unknown) > 6 else ''}."
            )
        self.reworded = [
            made
            for (row, made, own), right in zip(candidates, second, strict=True)
            if id(row) in knows and (own or right)
        ]
        if not self.reworded:
            self.reworded = [made for row, made, _ in candidates if id(row) in knows]
        self.given = [
            dataclasses.replace(row, fields={**row.fields, "known": id(other) in knows})
            for row, other in zip(rows, asking, strict=True)
        ] + [dataclasses.replace(row, fields={**row.fields, "known": True}) for row in others]
        self.scored = self.given[: len(rows)]

    def _find_neighbors(self, model: nn.Module, tokenizer: Any) -> None:
        """Questions near what is to be forgotten that the model answers: facts that come along, and its own."""
        asked = [question(_plain(row), row.answer) for row in self.given]
        near = _nearest(model, tokenizer, asked, self.bank)
        own: list[Row] = []
        chats = [row for row in self.given if not is_text(_asking(row).prompt)]
        if self.general and chats:
            few = random.Random(0).sample(chats, min(8, len(chats)))
            samples = max(2, 2 * WRITTEN // len(few))
            written = reword.written(
                model, tokenizer, few, reword.OF_THE_SAME_KIND, samples=samples, progress="Neighbors"
            )
            asks: list[Row] = []
            for row, found in zip(few, written, strict=True):
                for text in found:
                    other = question(text, "", "the model's own")
                    shared = reword.content_words(text) & reword.content_words(row.question)
                    if shared and not self._touches(other) and not any(reword.alike(text, r.question) for r in asks):
                        asks.append(other)
            told = own_replies(model, tokenizer, asks, max_new_tokens=OWN_TOKENS, sure=True)
            own = [row for row in told if not any(_gives(other, row.answer) for other in self.given)][:WRITTEN]
        rest = [row for row in self.bank if not any(row is other for other in near)]
        far = random.Random(0).sample(rest, min(2 * FAR, len(rest)))
        template = reword.TRAINED[-2]
        both = [*near, *far]
        plain = self._asked(model, tokenizer, both, "Asking the neighborhood")
        again = self._asked(
            model, tokenizer, [reworded(r, template.format(r.question)) for r in both], "Asking the neighborhood"
        )
        # What a model answers by a hair's breadth it answers otherwise after any training: it must answer twice.
        known = [_gives(r, a) and _gives(r, b) for r, a, b in zip(both, plain, again, strict=True)]
        near = [row for row, right in zip(near, known, strict=False) if right]
        self.far = [row for row, right in zip(far, known[len(both) - len(far) :], strict=True) if right][:FAR]
        mixed = [row for pair in zip(near, own, strict=False) for row in pair]
        self.neighbors = [*mixed, *near[len(own) :], *own[len(near) :]]
        facts = self._asked(model, tokenizer, self.facts, "Which facts does the model know?")
        self.facts = [
            reworded(row, row.fields["test"])
            for row, reply in zip(self.facts, facts, strict=True)
            if _gives(row, reply)
        ]
        held = self._asked(model, tokenizer, self.held_out, None)
        self.held_out = [
            dataclasses.replace(row, fields={**row.fields, "known": _gives(row, reply)})
            for row, reply in zip(self.held_out, held, strict=True)
        ]

    @staticmethod
    def _asked(model: nn.Module, tokenizer: Any, rows: Sequence[Row], progress: str | None) -> list[str]:
        """Replies long enough to hold the answer, from the cache where the same model was asked the same."""
        if not rows:
            return []
        longest = max(len(ids) for ids in tokenizer([r.answer for r in rows], add_special_tokens=False)["input_ids"])
        return scoring.replies(
            model, tokenizer, [r.prompt for r in rows], max_new_tokens=max(REPLY_TOKENS, longest), progress=progress
        )

    # What is measured

    def score(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        asking = [_asking(row) for row in self.scored]
        whole = [dataclasses.replace(row, only=()) for row in asking]
        records = scoring.question_records(model, tokenizer, whole, "forget")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sampled = scoring.replies(
                model, tokenizer, [row.prompt for row in asking for _ in range(SAMPLES)],
                max_new_tokens=REPLY_TOKENS, temperature=0.7, progress="Sampling",
            )  # fmt: skip
        for i, (row, record) in enumerate(zip(asking, records, strict=True)):
            replies = sampled[i * SAMPLES : (i + 1) * SAMPLES]
            record |= {
                "known": row.fields["known"],
                "gives": _gives(row, record["reply"]),
                "refused": refuses(record["reply"]),
                "sampled": replies,
                "gives_sampled": any(_gives(row, reply) for reply in replies),
                "whole_probability": record["probability"],
                "probability": _told(row, record, tokenizer),
            }
        records += self._records(model, tokenizer, self.reworded, "reworded")
        nothing = [made for row in asking if row.fields["known"] and (made := reword.about_nothing(row)) is not None]
        records += scoring.question_records(model, tokenizer, nothing, "unknown", ask=False)
        held = scoring.question_records(
            model, tokenizer, [dataclasses.replace(row, only=()) for row in self.held_out], "retain"
        )
        for row, record in zip(self.held_out, held, strict=True):
            told, known = _gives(row, record["reply"]), row.fields["known"]
            records.append({**record, "gives": told, "known": known, "refused": refuses(record["reply"])})
        records += self._records(model, tokenizer, self.neighbors, "neighbors")
        records += self._records(model, tokenizer, self.facts, "facts")
        given = scoring.replies(
            model,
            tokenizer,
            [r.prompt for r in self.harmless],
            max_new_tokens=REPLY_TOKENS,
            progress="Asking, harmless",
        )
        records += [
            {"set": "harmless", "question": row.question, "answer": "", "reply": reply, "refused": refuses(reply)}
            for row, reply in zip(self.harmless, given, strict=True)
        ]
        return records + scoring.text_records(model, tokenizer, self.passages, "passages")

    def _records(self, model: nn.Module, tokenizer: Any, rows: Sequence[Row], name: str) -> list[dict[str, Any]]:
        given = self._asked(model, tokenizer, rows, f"Asking, {name}")
        return [
            {"set": name, "question": row.question, "answer": row.answer, "reply": reply, "gives": _gives(row, reply),
             "refused": refuses(reply)}
            for row, reply in zip(rows, given, strict=True)
        ]  # fmt: skip

    @staticmethod
    def numbers(records: Sequence[Record], retrained: Sequence[Record] | None = None) -> Numbers:
        sets: dict[str, list[Record]] = {}
        for record in records:
            sets.setdefault(record["set"], []).append(record)
        forget = [r for r in sets.get("forget", []) if r["known"]]
        retain = sets.get("retain", [])
        nearby = [*(r for r in retain if r["known"]), *sets.get("neighbors", [])]
        passages = sets.get("passages", [])

        def share(part: Sequence[Record], key: str) -> float | None:
            return mean([float(r[key]) for r in part])

        numbers = {
            "reworded_answered": share(sets.get("reworded", []), "gives"),
            "forget_answered": share(forget, "gives"),
            "forget_sampled": share(forget, "gives_sampled"),
            "forget_probability": share(forget, "probability"),
            "nearby_answered": share(nearby, "gives"),
            "facts_answered": share(sets.get("facts", []), "gives"),
            "harmless_refused": share(sets.get("harmless", []), "refused"),
            "perplexity": metrics.perplexity([r["nll"] for r in passages], [r["tokens"] for r in passages]),
            "unknown_probability": share(sets.get("unknown", []), "probability"),
            "extraction_strength": mean([metrics.extraction_strength(r["top1"]) for r in forget]),
            "forget_refused": share(forget, "refused"),
            "reworded_refused": share(sets.get("reworded", []), "refused"),
            "whole_probability": share(forget, "whole_probability"),
            "forget_rouge_l": share(forget, "rouge_l"),
            "retain_answered": share([r for r in retain if r["known"]], "gives"),
            "retain_probability": share(retain, "probability"),
            "retain_rouge_l": share(retain, "rouge_l"),
            "neighbors_answered": share(sets.get("neighbors", []), "gives"),
            "nearby_refused": share(nearby, "refused"),
            "facts_refused": share(sets.get("facts", []), "refused"),
        }
        why = {
            "unknown_probability": "no question has a name or a longer word that an invented one could replace",
            "retain_answered": "the model knew none of the rows held out, or there are none",
            "retain_probability": "no row was held out of --retain",
            "retain_rouge_l": "no row was held out of --retain",
        }
        nothing = "the model knew nothing of the kind before"
        return Numbers(numbers, {name: why.get(name, nothing) for name, value in numbers.items() if value is None})

    @classmethod
    def counts(cls, records: Sequence[Record]) -> dict[str, int]:
        known = [r for r in records if r.get("known", True)]
        counts = super().counts(known)
        return counts | {"nearby_answered": sum(r["set"] in ("retain", "neighbors") for r in known)}

    @classmethod
    def verdict(cls, before: Sequence[Record], after: Sequence[Record]) -> str:
        was, now, counts = cls.numbers(before).numbers, cls.numbers(after).numbers, cls.counts(after)

        def n(values: Mapping[str, float | None], key: str) -> float:
            value = values[key]
            return math.nan if value is None else value

        told = round(n(now, "reworded_answered") * counts["reworded_answered"])
        said = [f"Forgotten on {counts['reworded_answered'] - told} of {counts['reworded_answered']} rewordings"]
        if counts["forget_sampled"] and (found := round(n(now, "forget_sampled") * counts["forget_sampled"])):
            said[0] += f", but sampled replies still give {found} of {counts['forget_sampled']} answers"
        p, old, level = n(now, "forget_probability"), n(was, "forget_probability"), n(was, "unknown_probability")
        without = "" if math.isnan(level) else f", {level:.2f} without the knowledge"
        there = p > max(old * ERASED, 0.0 if math.isnan(level) else level)
        said.append(f"the answer itself is {'still there' if there else 'gone'} (p {p:.2f}, was {old:.2f}{without})")
        lost = [
            f"{what} fell from {n(was, key):.0%} to {n(now, key):.0%}"
            for key, what, least in (
                ("nearby_answered", "what is near", NEAR_KEPT),
                ("facts_answered", "unrelated facts", FAR_KEPT),
            )
            if n(now, key) < least * n(was, key)
        ]
        if n(now, "harmless_refused") > n(was, "harmless_refused") + REFUSED:
            lost.append(f"{n(now, 'harmless_refused'):.0%} of harmless requests are refused")
        if n(now, "perplexity") > n(was, "perplexity") * (1 + WORSE):
            lost.append(f"perplexity rose from {n(was, 'perplexity'):.1f} to {n(now, 'perplexity'):.1f}")
        kept = f"{n(now, 'nearby_answered'):.0%} of what is near, {n(now, 'facts_answered'):.0%} of unrelated facts"
        said.append(f"{', '.join(lost)}: too much was lost" if lost else f"the rest is kept ({kept})")
        return "; ".join(said) + "."

    def follow(self, model: nn.Module, tokenizer: Any) -> dict[str, float]:
        forget, retain = self.checked["forget"], self.checked["retain"]
        shares = {"forget": 0.0, "retain": 1.0}
        if forget and self.goal == "refuse":
            given = self._asked(model, tokenizer, forget, None)
            shares["forget"] = fmean(_gives(row, reply) for row, reply in zip(forget, given, strict=True))
        elif forget:
            records = scoring.question_records(model, tokenizer, forget, None, ask=False)
            stated = [record["probability"] for record in records]
            shares["forget"] = min(1.0, fmean(stated) / max(self.level, 1e-9))
        if retain:
            given = self._asked(model, tokenizer, retain, None)
            shares["retain"] = fmean(_gives(row, reply) for row, reply in zip(retain, given, strict=True))
        return shares


def _rows_to_forget(path: str, topics: list[str]) -> list[Row]:
    """The rows of a file to forget; names that stand alone go to `topics`."""
    rows = []
    for record, where in read_records(path):
        if "topic" in record and not {"question", "messages", "text"} & set(record):
            name = record["topic"]
            if not isinstance(name, str) or not name.strip():
                raise UserError(f"{where}: 'topic' must be a name, but is {name!r}")
            topics.append(name.strip())
        else:
            rows.append(_checked(parse_row(record, where)))
    return rows


def _checked(row: Row) -> Row:
    """A row whose own keys are of the right kind, with what tells its answer in `only`."""
    for key in ("accepted", "questions"):
        if row.fields.get(key) is not None:
            texts(row.fields, key, row.where)
    instead = row.fields.get("instead")
    if instead is not None and (not isinstance(instead, str) or not instead.strip()):
        raise UserError(f"{row.where}: 'instead' must be the text to answer in its place, but is {instead!r}")
    accepted = row.fields.get("accepted") or []
    inside = tuple(text for text in accepted if text.casefold() in row.answer.casefold())
    if accepted and not inside:
        raise UserError(f"{row.where}: none of 'accepted' stands in the answer; give what a reply must hold to tell it")
    return dataclasses.replace(row, only=inside or _news(row))


def _news(row: Row) -> tuple[str, ...]:
    """The words of an answer that its question has not, in their order; of plain text, none."""
    asked = {word.casefold() for message in row.prompt for word in message["content"].split()}
    words = dict.fromkeys(word for word in reword.words(row.answer) if word.casefold() not in asked)
    return tuple(word for word in words if reword.content_words(word)) if row.prompt else ()


def _asking(row: Row) -> Row:
    """A row that asks something: plain text becomes a beginning that its answer continues."""
    return row if row.prompt else reword.beginning(row, row.only)


def _checking(row: Row) -> list[Row]:
    """The wordings of a row that decide when to stop."""
    asking = _asking(row)
    return reword.wordings(asking, reword.TEXT_CHECKED if is_text(asking.prompt) else reword.CHECKED)


def _plain(row: Row) -> str:
    """A row's question, or the plain text before what it tells."""
    return _asking(row).question


def _gives(row: Row, reply: str) -> bool:
    """Whether a reply gives a row's answer: it holds one of ``accepted``, or else half of the answer's news."""
    if accepted := row.fields.get("accepted"):
        return metrics.contains_answer(reply, accepted)
    asked = reword.content_words(row.question)
    answer = reword.content_words(row.answer)
    news = answer - asked or answer
    return bool(news) and len(news & reword.content_words(reply)) >= KNOWN * len(news)


def _told(row: Row, record: Record, tokenizer: Any) -> float:
    """The geometric mean probability of the tokens that tell the answer."""
    whole = encode(dataclasses.replace(row, only=()), tokenizer, scoring.MAX_LENGTH)
    telling = encode(row, tokenizer, scoring.MAX_LENGTH)
    tells = [b != IGNORED for a, b in zip(whole.labels, telling.labels, strict=True) if a != IGNORED]
    telling_log_probs = [value for value, is_so in zip(record["log_probs"], tells, strict=True) if is_so]
    return math.exp(fmean(telling_log_probs))


def _check_apart(forget: Sequence[Row], retain: Sequence[Row]) -> None:
    """Refuse a row to keep that asks for what is to be forgotten; warn of one that has the same answer."""
    same: list[str] = []
    for kept in retain:
        for row in forget:
            if not row.prompt or not kept.prompt or not _gives(row, kept.answer):
                continue
            if reword.alike(kept.question, row.question):
                raise UserError(
                    f"{kept.where}: asks in other words for what {row.where} is to forget; remove it from one of them"
                )
            same.append(f"{kept.where} ({row.where})")
    if same:
        warnings.warn(
            f"rows to keep with the answer of one to forget: {', '.join(same[:5])}{', …' if len(same) > 5 else ''}; "
            "where they ask for the same in other words, remove them from one of the files",
            stacklevel=2,
        )


def _nearest(model: nn.Module, tokenizer: Any, rows: Sequence[Row], bank: Sequence[Row]) -> list[Row]:
    """The questions of a bank that a model represents most like those of some rows, the nearest first."""
    states = scoring.mean_states(model, tokenizer, [row.question for row in (*bank, *rows)])
    states = torch.nn.functional.normalize(states - states[: len(bank)].mean(0), dim=1)
    nearness = (states[: len(bank)] @ states[len(bank) :].T).amax(1)
    return [bank[i] for i in nearness.argsort(descending=True, stable=True)[:NEAREST].tolist()]
