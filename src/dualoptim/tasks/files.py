"""Your own rows: forget those, keep everything else, and measure both.

To forget: the rows that the model knows, as given and in a few plain wordings. To keep: most of the rows of `--retain`,
neighbors of what is forgotten, and a general part of included questions. The model itself answers these, so that
keeping means staying as it was.

Measured: wordings never trained on, the rows as given, sampled replies, the answer's own probability; rows of
`--retain` that were kept aside and neighbors that the model knew; unrelated facts, perplexity, and harmless requests
that it now refuses. Except for the rows as given, nothing that is trained on asks for what is measured.
"""

from __future__ import annotations

import dataclasses
import math
import random
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

from torch import nn

from ..build import build, own_replies, whole_sentences
from ..cached import cached
from ..data import Row, asset, check_objectives, encode, is_text, question, reworded
from ..device import seeded
from ..errors import UserError
from ..evaluation import metrics, scoring
from ..evaluation import verdict as verdicts
from ..evaluation.numbers import NO_PASSAGES, Metric, Numbers, Record, mean, perplexity, told
from ..evaluation.refusal import evades, says_one_of
from ..evaluation.verdict import FAR_KEPT, NEAR_KEPT, Kept
from ..identity import identity
from ..losses import IGNORED
from ..models import load_tokenizer, positions, room
from ..rows import chunks, neighborhood, reword
from ..rows.giving import Answers, Parts, Questions
from ..rows.own_rows import (
    asking,
    check_apart,
    check_topics,
    checked,
    checking,
    declines,
    gives,
    misspelled,
    read_to_forget,
    read_to_keep,
    same,
    to_train,
    unread,
)
from ..rows.quoting import Quoting
from . import Task

SCORED_ROWS = 40  # rows of each set that are measured, drawn once
FEW = 6  # if there are at most so many rows to keep, none is trained on
HELD_OUT = 3  # every third row to keep is kept aside
SAMPLES = 4  # replies to each row to forget, at temperature 0.7; the worst counts
NEAREST = 45  # included facts that the model knows and that count as neighbors; the others are far
WRITTEN = 24  # neighbors that the model writes itself, at most
PROBE = 40  # included facts that are asked first: a model that knows none of them knows hardly any
REQUESTS = 60  # general requests that are trained on, beside facts, which most rows to forget are
HARMLESS = 60  # included requests that are kept aside, to see what is refused
GENERAL = 1 / 3  # of the rows to keep, beside those of --retain
OWN_ROWS = 120  # rows to keep whose questions the model is asked, to train on its own answers to them
FOLLOWED = 20  # questions of each kind that decide when to stop
OWN_TOKENS = 40  # of the model's own replies that are trained on
NOT_FAST = "the model's tokenizer is not a fast one and does not tell which tokens are of the words that tell an answer"
TOPIC = ("Who is {}?", "What is {} known for?", "Tell me about {}.", "Describe {} in one or two sentences.")
TOPIC_MEASURED = ("What do you know about {}?", "Give me some information on {}.", "Write a sentence about {}.")


class Files(Task):
    """See the module.

    Args:
        forget: file of rows to forget. A row may also have ``accepted``, texts of which a reply must contain one to
            give the answer, ``questions``, wordings to measure by, never trained on, and ``instead``, what to answer in
            place of a refusal. Or it has only a ``topic``, a name, about which the model's own answers are forgotten.
        retain: file of rows to keep; None for none.
        goal: "refuse": the model says that it does not know, or what ``instead`` says. "erase": the words that tell
            the answer become improbable.
        general: also keep neighbors and the general part; without it, only the rows of `retain`, all of which are
            trained on except those kept aside.
        chunk: plain text of more tokens than that is cut into chunks (`dualoptim.rows.chunks`); None for never.
        chunk_stride: tokens from one chunk's beginning to the next; None for no overlap.
        tokenizer: folder or hub id of the model by whose tokens text is cut.
        refusals: the run's own, which count as refusals beside those that a rule knows; None for none.
    """

    name = "files"
    plane = ("forget_probability", "nearby_answered")
    watches_ability = True
    of_run = ("refusals",)
    metrics: Mapping[str, Metric] = {
        "reworded_answered": Metric("answered, reworded", "lower", share_of="reworded", counted_by="gives"),
        "forget_answered": Metric("answered, as given", "lower", share_of="forget", counted_by="gives"),
        "sampled_answered": Metric("answered, worst of 4 samples", "lower", share_of="sampled", counted_by="gives"),
        "forget_probability": Metric("p(answer)", "lower", ".3f"),
        "nearby_answered": Metric("neighbors answered", "higher", share_of="nearby", counted_by="gives"),
        "facts_answered": Metric("unrelated facts", "higher", share_of="facts", counted_by="gives"),
        "harmless_refused": Metric("harmless refused", "lower", share_of="harmless", counted_by="refused"),
        "perplexity": Metric("perplexity", "lower", ".1f"),
        "unknown_probability": Metric("p(answer) about things that do not exist", "neither", ".3f", "To forget"),
        "extraction_strength": Metric("extraction strength", "lower", ".3f", "To forget"),
        "forget_refused": Metric("refused, as given", "higher", ".0%", "To forget"),
        "reworded_refused": Metric("refused, reworded", "higher", ".0%", "To forget"),
        "whole_probability": Metric("probability of the whole answer", "lower", ".3f", "To forget"),
        "forget_rouge_l": Metric("ROUGE-L", "lower", ".3f", "To forget"),
        "retain_answered": Metric("answered, held out of --retain", "higher", ".0%", "To keep"),
        "retain_probability": Metric("probability, held out of --retain", "higher", ".3f", "To keep"),
        "retain_rouge_l": Metric("ROUGE-L, held out of --retain", "higher", ".3f", "To keep"),
        "neighbors_answered": Metric("answered, neighbors", "higher", ".0%", "To keep"),
        "nearby_refused": Metric("refused, neighbors", "lower", ".0%", "To keep"),
        "facts_refused": Metric("refused, unrelated facts", "lower", ".0%", "To keep"),
    }

    def __init__(
        self,
        forget: str,
        retain: str | None = None,
        goal: Literal["refuse", "erase"] = "refuse",
        general: bool = True,
        chunk: int | None = None,
        chunk_stride: int | None = None,
        tokenizer: str | None = None,
        refusals: Sequence[str] | None = None,
    ) -> None:
        self.goal, self.general, self.refusals = goal, general, list(refusals or ())
        self.given, self.topics = read_to_forget(forget)
        kept = read_to_keep(retain) if retain is not None else []
        whole = self.given, kept
        if chunk is not None:
            if tokenizer is None:
                raise UserError("task 'files': chunk needs the tokenizer of a model; give one by folder or hub id")
            how = load_tokenizer(tokenizer), chunk, chunk_stride, room(tokenizer)
            self.given, kept = chunks.cut(self.given, *how), chunks.cut(kept, *how)
        check_objectives(
            {
                "forget": self.given or [question(name, name, forget) for name in self.topics],
                **({"retain": kept} if kept else {}),
            }
        )
        about = {name: [form.format(name) for form in (*TOPIC, *TOPIC_MEASURED)] for name in self.topics}
        said = [*check_apart(*whole), check_topics(about, kept), misspelled(self.given), unread([*self.given, *kept])]
        if retain is None:
            warnings.warn(
                "no --retain FILE: what is kept are included general questions, and neighbors that the model "
                "knows; rows of your own near what is to be forgotten would keep more of its neighborhood",
                stacklevel=2,
            )
        self.notes: list[str] = [sentence for sentence in said if sentence]
        if chunk is not None and not any(row.chunk for row in (*self.given, *kept)):
            self.notes.append(f"No plain text was longer than --chunk {chunk}, so none was cut.")
        if not general:
            if len(kept) < 2:
                raise UserError("general false keeps the rows of --retain alone; give --retain FILE with two or more")
            self.notes.append(
                "Trained to keep the rows of --retain alone: what no row mentions may be lost, and so may the habit of "
                "answering at all."
            )
        self.overlap = chunk_stride is not None and chunk_stride != chunk
        self.held_out, self.trained = _kept_aside(kept, self.overlap)
        if general and len(kept) <= FEW:  # too few to train on and to measure by
            self.held_out, self.trained = [asking(row) for row in kept], []
        self.notes += _none_aside(self.held_out, kept)
        draw = random.Random(0)
        requests = [question(r["question"], "", "requests.jsonl") for r in asset("requests.jsonl")]
        draw.shuffle(requests)
        self.harmless, self.requests = requests[:HARMLESS], requests[HARMLESS:]
        ready = [question(r["question"], r["answer"], "general.jsonl") for r in asset("general.jsonl")]
        self.requests += ready
        # Those that touch the rows to forget are left out once the model has been asked.
        self.facts = [
            question(f["train"][0], f["statement"], "facts.jsonl", accepted=[f["answer"], *f["aliases"]],
                     topic=f["topic"], test=f["test"][0])
            for f in asset("facts.jsonl")
        ]  # fmt: skip
        self.bank = [
            question(f["question"], f["answer"], "known_facts.jsonl", accepted=[f["answer"], *f["aliases"]])
            for f in asset("known_facts.jsonl")
        ]
        self.passages = [Row((), row["text"], "passages.jsonl") for row in asset("passages.jsonl")]
        self.built = general or bool(self.topics)
        # Chosen by what the model knows, in `prepare`.
        self.reworded: list[Row] = []
        self.near: list[Row] = []
        self.checked: dict[str, list[Row]] = {}
        self.level = 1.0  # the answers' probability before, which `follow` is relative to
        self._before: str | None = None  # the identity of the model before unlearning, while that is asked
        asks = [question(form.format(name), name, forget) for name in self.topics for form in TOPIC]
        self.objectives = {
            "forget": to_train(self.given, goal) + asks,
            "retain": self.trained or [row.whole for row in kept] or ready,
        }

    # To refuse is more than not to answer, so that what it leaves is no share of what was known.

    @property
    def left(self) -> str:  # type: ignore[override]
        """As the goal counts it."""
        return "not refused" if self.goal == "refuse" else Task.left

    @property
    def followed(self) -> str:  # type: ignore[override]
        """As the goal counts it."""
        return f"{self.left.partition(' of ')[0]}, or kept, of the checking questions"

    @property
    def curves(self) -> Mapping[str, str]:  # type: ignore[override]
        """As the goal counts them."""
        return {**Task.curves, **({"forget": "Not refused ↓"} if self.goal == "refuse" else {})}

    @property
    def tuned_on(self) -> str:  # type: ignore[override]
        """The questions that decide when to stop, where these are neither trained on nor measured."""
        forget, retain = self.checked.get("forget"), self.checked.get("retain")
        if not (forget and retain):
            return ""
        checks = [*forget, *retain]
        if len(self._untrained(checks, self.scored, self.held_out)) < len(checks):
            return ""
        return (
            "Settings were chosen by wordings of the rows to forget, and by questions near and far from them, that are "
            "neither trained on nor measured by `dualoptim unlearn`; what the rows say is the same in any wording."
        )

    def known(self) -> list[Row]:
        """The rows of both files as they are given, those held out as well; without --retain, what is kept instead."""
        if not self.given:
            raise UserError(
                f"memorise teaches the rows to forget, and the topic {self.topics[0]} has none; give rows of questions "
                "and answers, or leave it out"
            )
        kept = self.objectives["retain"]
        return [*self.given, *kept, *(row for row in self.held_out if row.whole not in kept)]

    def quick(self) -> Mapping[str, Sequence[Row]]:
        held_out = [row.whole for row in self.held_out]
        return {
            "forget": self.checked.get("forget") or self.objectives["forget"],
            "retain": self.objectives["retain"],
            # The passages are always there.
            "held_out": self._untrained(self.checked.get("retain", ())) or held_out or self.passages,
        }

    def _untrained(self, rows: Sequence[Row], *others: Sequence[Row]) -> list[Row]:
        """Those of some rows whose prompts nobody trains on, and that are not among others either."""
        taken = {reword.prompt_words(row.prompt) for each in (*self.objectives.values(), *others) for row in each}
        return [row for row in rows if reword.prompt_words(row.prompt) not in taken]

    def _touches(self, row: Row) -> bool:
        """Whether a row asks for, or tells, what is to be forgotten."""
        alike, names, parts, answers = self._sought
        return (
            any(True for _ in names.standing_in(f"{row.question} {row.answer}"))
            or any(True for _ in alike.alike(row))
            or any(True for _ in parts.standing_in(row.answer))
            or any(True for _ in answers.given_in(row.answer))
        )

    @cached_property
    def _sought(self) -> tuple[Questions, Parts, Parts, Answers]:
        """What is to be forgotten, to be looked up: questions, names of topics, what tells the answers, answers."""
        telling = list(dict.fromkeys(part for row in self.given for part in row.only))
        return Questions(self.given), Parts(self.topics), Parts(telling), Answers(self.given)

    # What the model knows

    def prepare(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        self._before = identity(model, tokenizer)
        if not getattr(tokenizer, "chat_template", None):
            self.bank, self.facts, self.harmless, self.requests = [], [], [], []
            if not self.trained:  # nothing else is left to train on
                kept = self.held_out
                self.held_out, self.trained = _kept_aside(kept, self.overlap)
                self.notes += _none_aside(self.held_out, kept)
            self.notes.append(
                "The model has no chat template, so no questions were asked of it and none are trained on to keep; "
                "give --chat-template for that."
            )
        if self.topics:
            self._build_topics(model, tokenizer)
        known = self._screen(model, tokenizer)
        near, far = self._find_neighbors(model, tokenizer)
        draw = random.Random(1)
        check = [row for one in known for row in checking(one)]
        # A third of the neighbors is trained on, one decides when to stop, one is measured.
        self.near = near[2::3]
        self.checked = {
            "forget": draw.sample(check, min(FOLLOWED, len(check))),
            "retain": [*near[1::3][:FOLLOWED], *far[:FOLLOWED]],
        }
        retain = list(self.trained)
        if self.general:
            measured = [*self.held_out, *self.near, *self.facts, *self.reworded, *self.harmless]
            measured += self.checked["retain"]
            some = random.Random(0).sample(self.requests, min(REQUESTS, len(self.requests)))
            requests = own_replies(model, tokenizer, some, max_new_tokens=OWN_TOKENS)
            # In the same wordings as the rows to forget, so that no wording by itself means a refusal.
            forms = [form for form in dict.fromkeys(reword.TRAINED) if "{indirect}" not in form]
            # The model's own answers to the questions of --retain, beside the answers in the file.
            asks = [row for row in self.trained if not is_text(asking(row).prompt)]
            own = self._known(model, tokenizer, random.Random(0).sample(asks, min(OWN_ROWS, len(asks))))
            others = [
                reworded(row, draw.choice(["{}", draw.choice(forms)]).format(row.question))
                for row in (*own, *near[0::3], *far[FOLLOWED:], *requests)
                if not any(same(row, other) for other in measured)
            ]
            # Beside many rows of --retain, steps would hardly meet the others.
            retain += others * max(1, round(GENERAL / (1 - GENERAL) * len(self.trained) / max(1, len(others))))
        self.objectives = {"forget": to_train(known, self.goal), "retain": retain or self.objectives["retain"]}
        if not self.checked["retain"]:
            self.checked["retain"] = self._kept_rows(model, tokenizer)
        records = self.score(model, tokenizer)
        self._before = None
        if self.goal == "erase":
            self.level = self._stated(model, tokenizer)
        return records

    def _build_topics(self, model: nn.Module, tokenizer: Any) -> None:
        """Add rows of what the model itself says about the topics; words in more than one answer tell the topic."""
        asks = [question(form.format(name), "", Quoting(name), name=name) for name in self.topics for form in TOPIC]
        built = build(model, tokenizer, asks, samples=1)
        for name in self.topics:
            said = [row for row in built if row.fields["name"] == name]
            named = set(reword.whole_words(name.casefold()))
            counts = Counter(
                word
                for row in said
                for word in set(reword.whole_words(row.answer.casefold()))
                if reword.content_words(word)
            )
            core = [word for word, count in counts.items() if count > 1 and word not in named]
            told: list[str] | None = [form.format(name) for form in TOPIC_MEASURED]
            first = {row.question: row for row in reversed(said)}  # the greedy answer to each
            for row in first.values():
                accepted = [word for word in core if metrics.contains_answer(row.answer, [word])] or None
                self.given.append(checked(dataclasses.replace(row, fields={"accepted": accepted, "questions": told})))
                told = None  # only the first row has these wordings; for the others, some are made
        vars(self).pop("_sought", None)  # there are more rows now

    def _screen(self, model: nn.Module, tokenizer: Any) -> list[Row]:
        """The rows to forget that the model knows; also chooses the wordings that they are measured by."""
        rows = random.Random(0).sample(self.given, min(SCORED_ROWS, len(self.given)))
        asked = [asking(row) for row in rows]
        as_given = self._gives(model, tokenizer, asked, "Asking")
        wordings = self._wordings(model, tokenizer, asked, as_given)
        flat = [made for found in wordings for made in found]
        told = iter(self._gives(model, tokenizer, flat, "Asking, reworded"))
        in_words = [[next(told) for _ in found] for found in wordings]
        knows = [first or any(others) for first, others in zip(as_given, in_words, strict=True)]
        if not any(knows):
            self.notes.append(
                "The model gives the answer of none of the rows to forget, as given or reworded: there may be nothing "
                "to forget. All of them are trained on."
            )
            knows = [True] * len(rows)
        # Chunks stay: hardly any model recites one, and what a document tells may be known in other words.
        left_out = [row for row, known in zip(rows, knows, strict=True) if not known and not row.chunk]
        if unknown := [row.where for row in left_out]:
            self.notes.append(
                Quoting.said(
                    lambda shown: (
                        f"{len(unknown)} of {len(rows)} rows are not known to the model and were left out: "
                        f"{', '.join(map(shown, unknown[:6]))}{', …' if len(unknown) > 6 else ''}."
                    )
                )
            )
        if len(rows) < len(self.given):
            self.notes.append(
                f"{len(rows)} of the {len(self.given)} rows to forget, drawn at random, are asked and measured; the "
                "others are trained on whether the model knows them or not."
            )
        # Wordings that are not the user's count only if they ask for the same: the model gives the same answer.
        self.reworded = [
            made
            for row, known, found, right in zip(asked, knows, wordings, in_words, strict=True)
            for made, is_right in zip(found, right, strict=True)
            if known and (is_right or row.fields.get("questions") or not any(right))
        ]
        self.scored = [
            dataclasses.replace(row, fields={**row.fields, "known": known})
            for row, known in zip(asked, knows, strict=True)
        ]
        return [row for row in self.given if not any(row is other for other in left_out)]

    def _wordings(
        self, model: nn.Module, tokenizer: Any, rows: Sequence[Row], answered: Sequence[bool]
    ) -> list[list[Row]]:
        """For each row the wordings to measure by: the user's own, or plain ones and the model's."""
        asked = [
            row
            for row, right in zip(rows, answered, strict=True)
            if right and row.question and not is_text(row.prompt) and not row.fields.get("questions")
        ]
        texts = reword.written(model, tokenizer, asked, reword.IN_OTHER_WORDS, samples=4, progress="Rewording")
        written = {id(row): found for row, found in zip(asked, texts, strict=True)}
        trained = {reword.prompt_words(row.prompt) for row in to_train(self.given, self.goal)}
        found = []
        for row in rows:
            if own := row.fields.get("questions"):
                found.append([reworded(row, text) for text in own])
            elif is_text(row.prompt):
                found.append(reword.wordings(row, reword.TEXT_MEASURED))
            else:
                made = [reworded(row, text) for text in written.get(id(row), []) if reword.alike(text, row.question)]
                made += reword.wordings(row, reword.MEASURED)
                found.append([other for other in made if reword.prompt_words(other.prompt) not in trained])
        return found

    def _find_neighbors(self, model: nn.Module, tokenizer: Any) -> tuple[list[Row], list[Row]]:
        """Questions that the model answers, near what is to be forgotten and far from it, with its own answers.

        Also removes from the facts, the requests and the rows held out what the rows to keep ask for.
        """
        # All included questions are asked, whatever is to be forgotten, so that the cache serves all runs of a model.
        known = self._known(model, tokenizer, self.bank)
        taught = [row for row in self.trained if row.question]
        known = [
            row
            for row in known
            if not self._touches(row) and not any(same(row, other) for other in (*self.held_out, *taught))
        ]
        near: list[Row] = []
        own: list[Row] = []
        if known:
            asks = [asked.question or asked.answer for asked in map(asking, self.given)]
            near = neighborhood.nearest(model, tokenizer, asks, known, NEAREST)
            chats = [row for row in self.given if row.question and not is_text(row.prompt)]
            if self.general and chats:
                written = neighborhood.written(
                    model, tokenizer, chats, WRITTEN, max_new_tokens=self.reply_tokens, touches=self._touches
                )
                own = [
                    row
                    for row in self._known(model, tokenizer, written)
                    if not any(same(row, other) for other in (*known, *self.held_out, *self.trained))
                ]
        far = [row for row in known if not any(row is other for other in near)]
        random.Random(0).shuffle(far)
        mixed = [row for pair in zip(near, own, strict=False) for row in pair]
        touched = {row.fields["topic"] for row in self.facts if self._touches(row)}
        facts = self._known(model, tokenizer, self.facts)
        self.facts = [
            reworded(row, row.fields["test"])
            for row in facts
            if row.fields["topic"] not in touched and not any(same(row, other) for other in taught)
        ]
        self.harmless = [row for row in self.harmless if not any(same(row, other) for other in taught)]
        held = self._gives(model, tokenizer, self.held_out, None)
        self.held_out = [
            dataclasses.replace(row, fields={**row.fields, "known": right})
            for row, right in zip(self.held_out, held, strict=True)
        ]
        return [*mixed, *near[len(own) :], *own[len(near) :]], far

    def _kept_rows(self, model: nn.Module, tokenizer: Any) -> list[Row]:
        """Rows of --retain that the model answers, to decide when to stop where it knows no included fact: those held
        out, or else those trained on."""
        what = "held-out rows of --retain, which are measured, too"
        found = [row for row in self.held_out if row.fields["known"] and not self._touches(row)]
        if not found:
            what = "rows of --retain, which are trained on, too"
            few = random.Random(0).sample(self.trained, min(PROBE, len(self.trained)))
            asks = [asking(row) for row in few if not self._touches(row)]
            right = self._gives(model, tokenizer, asks, "What does the model know?")
            found = [row for row, is_right in zip(asks, right, strict=True) if is_right]
        found = random.Random(0).sample(found, min(FOLLOWED, len(found)))
        if found:
            self.notes.append(
                "No included fact that the model knows is left to check by, so what is kept is checked during training "
                f"on {len(found)} {what}."
            )
        return found

    def _known(self, model: nn.Module, tokenizer: Any, rows: Sequence[Row]) -> list[Row]:
        """The rows that the model answers, with its own reply as the answer.

        It must answer twice: an answer that it only just gives may change with any training.
        """
        rows = random.Random(0).sample(list(rows), len(rows))
        replies = self._asked(model, tokenizer, rows[:PROBE], "What does the model know?")
        if not any(gives(row, reply) for row, reply in zip(rows, replies, strict=False)):
            return []  # a model that knows none of these is not asked the others
        replies += self._asked(model, tokenizer, rows[PROBE:], "What does the model know?")
        once = [(row, reply) for row, reply in zip(rows, replies, strict=True) if gives(row, reply)]
        again = [reworded(row, f"Please answer this question: {row.question}") for row, _ in once]
        twice = self._gives(model, tokenizer, again, "What does the model know?")
        return [row.answered(whole_sentences(reply)) for (row, reply), right in zip(once, twice, strict=True) if right]

    def _asked(self, model: nn.Module, tokenizer: Any, rows: Sequence[Row], progress: str | None) -> list[str]:
        """Replies long enough for the answers and what stands `instead`; the model's before unlearning are cached."""
        if not rows:
            return []
        others = [row.answered(text) for row in rows if (text := row.fields.get("instead"))]
        prompts, limit = [row.prompt for row in rows], scoring.reply_limit(tokenizer, [*rows, *others])

        def ask() -> list[str]:
            return scoring.replies(model, tokenizer, prompts, max_new_tokens=limit, progress=progress)

        if self._before is None:
            return ask()
        return cached("asked", [self._before, prompts, limit], ask)

    def _gives(self, model: nn.Module, tokenizer: Any, rows: Sequence[Row], progress: str | None) -> list[bool]:
        """Whether the model gives each row's answer."""
        replies = self._asked(model, tokenizer, rows, progress)
        return [gives(row, reply) for row, reply in zip(rows, replies, strict=True)]

    # What is measured

    def score(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        whole = [row.whole for row in self.scored]
        is_fast = bool(getattr(tokenizer, "is_fast", False))  # others do not tell which tokens are of which words
        records = scoring.question_records(model, tokenizer, whole, "forget")
        for row, record in zip(self.scored, records, strict=True):
            record["whole_probability"] = record["probability"]
            record["probability"] = _told(row, record, tokenizer) if is_fast else None
        held = [row.whole for row in self.held_out]
        records += scoring.question_records(model, tokenizer, held, "retain")
        for row, record in zip([*self.scored, *self.held_out], records, strict=True):
            record |= {"known": row.fields["known"], **self._judged(row, record["reply"])}
        with seeded(0):
            each = [row for row in self.scored for _ in range(SAMPLES)]
            sampled = scoring.asked(model, tokenizer, each, "sampled", temperature=0.7)
        for i, row in enumerate(self.scored):
            replies = sampled[i * SAMPLES : (i + 1) * SAMPLES]
            worst = next((reply for reply in replies if gives(row, reply)), replies[0])
            records.append(self._record(row, "sampled", worst) | {"known": row.fields["known"]})
        known = [row for row in self.scored if row.fields["known"] and is_fast]
        nothing = [made for row in known if (made := reword.about_nothing(row))]
        most = positions(model)  # invented names may have more tokens
        nothing = [row for row in nothing if len(encode(row, tokenizer, scoring.MAX_LENGTH).input_ids) <= most]
        records += scoring.question_records(model, tokenizer, nothing, "unknown", ask=False)
        for name, rows in (
            ("reworded", self.reworded),
            ("neighbors", self.near),
            ("facts", self.facts),
            ("harmless", self.harmless),
        ):
            given = self._asked(model, tokenizer, rows, f"Asking, {name}")
            records += [self._record(row, name, reply) for row, reply in zip(rows, given, strict=True)]
        return records + scoring.passage_records(model, tokenizer, self.passages)

    def attacked(self) -> Mapping[str, Sequence[Row]]:
        forget = []
        for row in (row for row in self.scored if row.fields["known"]):
            words = [o.question for o in self.reworded if (o.where, o.answer) == (row.where, row.answer)]
            forget.append(dataclasses.replace(row, fields={**row.fields, "questions": words}))
        return {"relearn": self.given, "forget": forget, "retain": [*self.held_out, *self.near]}

    def _judged(self, row: Row, reply: str) -> dict[str, bool]:
        """Whether a reply gives the answer, and whether it refuses, also in words that were trained on for that."""
        trained = (each.fields.get("instead") for each in self.objectives["forget"])
        own = [*self.refusals, *dict.fromkeys(text for text in trained if text)]
        told = gives(row, reply)
        return {"gives": told, "refused": evades(reply) or (not told and says_one_of(reply, own))}

    def _record(self, row: Row, name: str, reply: str) -> dict[str, Any]:
        return {"set": name, "question": row.question, "answer": row.answer, "reply": reply, **self._judged(row, reply)}

    leaks = staticmethod(gives)

    @staticmethod
    def numbers(records: Sequence[Record], retrained: Sequence[Record] | None = None) -> Numbers:
        sets: dict[str, list[Record]] = {}
        for record in records:
            sets.setdefault(record["set"], []).append(record)
        forget = [r for r in sets.get("forget", []) if r["known"]]
        retain = sets.get("retain", [])
        nearby = [*(r for r in retain if r["known"]), *sets.get("neighbors", [])]
        untold = any(r["probability"] is None for r in forget)

        def share(part: Sequence[Record], key: str) -> float | None:
            return mean([float(r[key]) for r in part])

        numbers = {
            "reworded_answered": share(sets.get("reworded", []), "gives"),
            "forget_answered": share(forget, "gives"),
            "sampled_answered": share([r for r in sets.get("sampled", []) if r["known"]], "gives"),
            "forget_probability": None if untold else share(forget, "probability"),
            "nearby_answered": share(nearby, "gives"),
            "facts_answered": share(sets.get("facts", []), "gives"),
            "harmless_refused": share(sets.get("harmless", []), "refused"),
            "perplexity": perplexity(records),
            "unknown_probability": share(sets.get("unknown", []), "probability"),
            "extraction_strength": mean([metrics.extraction_strength(told(r, "top1")) for r in forget]),
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
            "perplexity": NO_PASSAGES,
            "unknown_probability": "no question has a name or a longer word that an invented one could replace",
            "retain_answered": "the model knew none of the rows held out, or there are none",
            "retain_probability": "no row was held out of --retain",
            "retain_rouge_l": "no row was held out of --retain",
        }
        if untold:
            why |= dict.fromkeys(("forget_probability", "unknown_probability"), NOT_FAST)
        nothing = "the model knew nothing of the kind before"
        return Numbers(numbers, {name: why.get(name, nothing) for name, value in numbers.items() if value is None})

    @classmethod
    def shares(cls, records: Sequence[Record]) -> dict[str, list[Record]]:
        known = [r for r in records if r.get("known", True)]
        return super().shares(known) | {"nearby_answered": [r for r in known if r["set"] in ("retain", "neighbors")]}

    @classmethod
    def verdict(cls, before: Sequence[Record], after: Sequence[Record]) -> str:
        counts = cls.counts(after)
        return verdicts.verdict(
            cls.numbers(before).numbers,
            cls.numbers(after).numbers,
            rewordings=("reworded_answered", counts["reworded_answered"]),
            told=verdicts.reworded(before, after, "reworded", "gives"),
            given=("forget_answered", counts["forget_answered"]),
            sampled=("sampled_answered", counts["sampled_answered"]),
            probability="forget_probability",
            level="unknown_probability",
            kept=[
                Kept("nearby_answered", "neighbors", NEAR_KEPT),
                Kept("facts_answered", "unrelated facts", FAR_KEPT),
            ],
        )

    def follow(self, model: nn.Module, tokenizer: Any) -> Mapping[str, float | None]:
        forget, retain = self.checked["forget"], self.checked["retain"]
        if self.goal == "refuse":
            asked = zip(forget, self._asked(model, tokenizer, forget, None), strict=True)
            left = fmean(not declines(row, reply, self.refusals) for row, reply in asked)
        else:
            left = min(1.0, self._stated(model, tokenizer) / max(self.level, 1e-9))
        return {"forget": left, "retain": mean(self._gives(model, tokenizer, retain, None))}

    def _stated(self, model: nn.Module, tokenizer: Any) -> float:
        """The mean probability of the answers to the questions that decide when to stop."""
        records = scoring.question_records(model, tokenizer, self.checked["forget"], None, ask=False)
        return fmean(record["probability"] for record in records)


def _kept_aside(rows: Sequence[Row], overlap: bool = False) -> tuple[list[Row], list[Row]]:
    """A third of some rows to measure by, no more than are measured, and the others, with whole answers, to train on.

    Rows that ask in similar words stay on one side, and so do all chunks of a document if they overlap: they are drawn
    in groups, as far as these fit.
    """
    document = [row.where.rpartition(", chunk ")[0] if overlap and row.chunk else "" for row in rows]

    wanted = min(-(-len(rows) // HELD_OUT), SCORED_ROWS)
    documents: dict[str, list[int]] = {}
    for i, name in enumerate(document):
        if name:
            documents.setdefault(name, []).append(i)
    asked = [asking(row) for row in rows]
    alike = Questions(asked)
    aside: set[int] = set()
    seen: set[int] = set()
    for first in random.Random(0).sample(range(len(rows)), len(rows)):
        if len(aside) == wanted or first in seen:
            continue
        group, ends = {first}, [first]
        alike.remove(first)
        while ends:
            at = ends.pop()
            found = {*alike.alike(asked[at]), *documents.pop(document[at], ())} - group
            for i in found:  # no other group has a row of this one, so that none needs to be found twice
                alike.remove(i)
            group |= found
            ends += found
        seen |= group
        if len(aside | group) <= wanted:
            aside |= group
    if len(aside) == len(rows):  # a single row
        aside.clear()
    return [asked[i] for i in sorted(aside)], [row.whole for i, row in enumerate(rows) if i not in aside]


def _none_aside(held_out: Sequence[Row], kept: Sequence[Row]) -> list[str]:
    """A sentence where no rows to keep could be kept aside, though there are several."""
    if held_out or len(kept) < 2:
        return []
    return [
        "All rows of --retain are trained on and none is measured: too many of them ask in similar words, or are "
        "chunks that overlap; add rows that ask for something else."
    ]


def _told(row: Row, record: Record, tokenizer: Any) -> float:
    """The geometric mean probability of the tokens that tell the answer."""
    whole = encode(row.whole, tokenizer, scoring.MAX_LENGTH)
    telling = encode(row, tokenizer, scoring.MAX_LENGTH)
    tells = [b != IGNORED for a, b in zip(whole.labels, telling.labels, strict=True) if a != IGNORED]
    telling_log_probs = [value for value, is_so in zip(record["log_probs"], tells, strict=True) if is_so]
    return math.exp(fmean(telling_log_probs))
