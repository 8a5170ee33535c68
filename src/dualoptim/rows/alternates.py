"""Other answers to the questions to forget, made up by the model itself: what AltPO prefers to the true ones.

They are made once, by the model before unlearning. A run writes them beside its results, with what they were made of,
and a resumed run reuses those that were made of the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from .. import ranks
from ..build import whole_sentences
from ..cached import cached
from ..chat import Message
from ..data import Row, encode, read_rows
from ..device import seeded
from ..errors import UserError
from ..evaluation import metrics, scoring
from ..evaluation.refusal import refuses
from ..hashes import digest
from ..identity import identity
from ..losses import Loss
from . import reword
from .quoting import Quoting

FILE = "alternates.jsonl"
MADE_OF = "made_of"  # a row's key in that file: the hash of what its alternates were made of
TOKENS = 200  # at most in an answer; as AltPO's authors have it for TOFU
ANOTHER = """Question: {question}
Answer: {answer}

Make up another answer to this question. It should be as plausible as the answer above, but every fact that the answer \
above tells must be a different one. What the question itself says stays as it is. Reply with the new answer alone."""
_LABEL = re.compile(r"^(?:the\s+|an?\s+)?(?:(?:alternat\w+|new|other|another|made-up)\s+)?answer\s*:\s*", re.IGNORECASE)
_NEXT = re.compile(r"\n\s*(?:question|q)\s*:", re.IGNORECASE)  # the model goes on with a question of its own


def alternates(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    samples: int,
    temperature: float = 1.0,
    seed: int = 0,
    max_length: int,
) -> list[Row]:
    """Rows with other answers to their questions under ``alternates``, made up by the model.

    It is shown question and answer and asked for an answer that is as plausible and states other facts. Dropped are
    empty answers, refusals, answers that repeat the true one or contain one of the row's ``accepted``, and answers that
    are too long; so a row may have fewer, or none. Rows that have their own, or an answer to give ``instead``, keep
    these. Replies are cached by model and question.

    Args:
        model: as it is before unlearning.
        tokenizer: its own, with a chat template.
        rows: questions and their true answers.
        samples: how often each question is put to the model.
        temperature: of the sampling.
        seed: of the sampling.
        max_length: the most tokens that a row with one of the answers may have.

    Reference: arXiv 2409.13474, whose prompt is worded differently.
    """
    instead = [[row.fields["instead"]] if row.fields.get("instead") else None for row in rows]
    kept = [row.fields.get("alternates", own) for row, own in zip(rows, instead, strict=True)]
    asks = [prompt(row) for row, own in zip(rows, kept, strict=True) if own is None]

    def ask() -> list[str]:
        with seeded(seed):
            return scoring.replies(
                model, tokenizer, [each for each in asks for _ in range(samples)], max_new_tokens=TOKENS,
                temperature=temperature, progress="Other answers",
            )  # fmt: skip

    key = [identity(model, tokenizer), asks, samples, temperature, seed]
    said = iter(cached("alternates", key, ask) if asks else [])
    found = []
    for row, own in zip(rows, kept, strict=True):
        if own is None:
            given = [_bare(next(said)) for _ in range(samples)]
            own = [text for text in given if _is_another(row, text, tokenizer, max_length)]
        found.append(replace(row, fields={**row.fields, "alternates": own}))
    return found


def prompt(row: Row) -> tuple[Message, ...]:
    """The prompt that asks the model for another answer than a row's."""
    return ({"role": "user", "content": ANOTHER.format(question=row.question, answer=row.answer.strip())},)


def of_run(
    losses: Mapping[str, Loss],
    objectives: Mapping[str, Sequence[Row]],
    model: nn.Module,
    tokenizer: Any,
    *,
    max_length: int,
    kept: Path | None,
    inputs: Mapping[str, str] | None = None,
) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows, with alternates, of each objective whose loss needs them, and notes for readers of the results.

    Args:
        kept: file of alternates that an earlier, unfinished run may have written; None for a new run. Those that were
            made of other inputs or settings are made anew.
        inputs: the run's fingerprints, as `dualoptim.resolved.Resolved.identity` has them.
    """
    before: dict[Any, Any] = {}
    if kept is not None and ranks.of_first(kept.is_file):
        for row in ranks.of_first(lambda: read_rows(kept)):
            texts = row.fields.get("alternates")
            if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
                before[(row.fields.get(MADE_OF), *_key(row))] = texts
    found, notes = {}, []
    needing: dict[str, Any] = {name: loss for name, loss in losses.items() if loss.needs_alternates}
    for name, loss in needing.items():
        made_of = _made_of(inputs, loss)
        given = [
            replace(row, fields={**row.fields, "alternates": before[key]})
            if (key := (made_of, *_key(row))) in before
            else row
            for row in objectives[name]
        ]
        rows = found[name] = alternates(model, tokenizer, given, **_settings(loss), max_length=max_length)
        lacking = [row.where for row in rows if not row.fields["alternates"]]
        count = sum(len(row.fields["alternates"]) for row in rows)
        notes.append(f"{count} other answers of the model's own stand against those of {len(rows)} rows to {name}.")
        if lacking:
            notes.append(_lacking(lacking))
    return found, notes


def to_write(found: Mapping[str, Sequence[Row]], losses: Mapping[str, Loss], inputs: Mapping[str, str]) -> list[Row]:
    """The rows that `of_run` found, as a run writes them: each says what its alternates were made of."""
    return [
        replace(row, fields={**row.fields, MADE_OF: _made_of(inputs, losses[name])})
        for name, rows in found.items()
        for row in rows
    ]


def _made_of(inputs: Mapping[str, str] | None, loss: Any) -> str:
    return digest([inputs, _settings(loss)])


def _settings(loss: Any) -> dict[str, Any]:
    return {"samples": loss.alternates, "temperature": loss.temperature, "seed": loss.seed}


def _lacking(rows: Sequence[str]) -> str:
    """A sentence on the rows, by their places, to which the model gave no other answer."""
    return Quoting.said(
        lambda shown: (
            f"To {len(rows)} of these it gave none that is of use, so that refusals stand there: "
            f"{', '.join(map(shown, rows[:6]))}{', …' if len(rows) > 6 else ''}."
        )
    )


def never_without(rows: Sequence[Row], refusals: Sequence[str]) -> list[Row]:
    """Rows, of which those without alternates get the refusals in their place."""
    return [
        replace(row, fields={**row.fields, "alternates": row.fields["alternates"] or list(refusals)}) for row in rows
    ]


def _key(row: Row) -> tuple[str, str]:
    return repr(row.prompt), row.answer


def _bare(reply: str) -> str:
    """A reply without a label before the answer, and without another question after it."""
    return whole_sentences(_NEXT.split(_LABEL.sub("", reply.strip()))[0])


def _is_another(row: Row, text: str, tokenizer: Any, max_length: int) -> bool:
    if not text or refuses(text) or reword.plain(text) == reword.plain(row.answer):
        return False
    if metrics.contains_answer(text, row.fields.get("accepted") or []):
        return False
    try:
        encode(row.answered(text), tokenizer, max_length)
    except UserError:  # too long
        return False
    return True
