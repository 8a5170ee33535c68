"""TOFU: forget fictitious authors that a model has memorized (arXiv 2401.06121).

Rows come from the hub (locuslab/TOFU) or from a folder of TOFU's files. Each split of 1, 5 or 10 % of the authors has
ten parts (nine for 10 %), the tasks of closer-look-LLM-unlearning (arXiv 2410.08109); what none of them forgets is
kept. Several parts are forgotten one after the other, each starting from the model that the one before it left.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from ..cached import cached
from ..data import Row, asset, parse_row, read_records, reworded, texts
from ..errors import UserError, unknown
from ..evaluation import numbers
from ..evaluation.judges import check
from ..evaluation.numbers import Metric, Numbers, Record
from ..evaluation.scoring import followed, gradient_norms, passage_records, question_records
from ..identity import identity
from ..reading import hub_records
from ..rows.forms import check_texts
from . import Task

HUB = "locuslab/TOFU"
# Where each part begins among TOFU's 4,000 rows; `task_id` in a folder's files counts them in this order.
PARTS = {
    "forget01": [3600 + 40 * k for k in range(10)],
    "forget05": [3600, 3800, 3200, 3400, 2800, 3000, 2000, 2200, 2400, 2600],
    "forget10": [3600, 3200, 2800, 2000, 2400, 400, 800, 1200, 1600],
}
QUESTIONS = 20  # about each author
OF_OTHERS = ("real_authors", "world_facts")  # sets with no author of TOFU
PLACE = re.compile(r"(.*?)(?::|, item |, row )(\d+)", re.DOTALL)  # of a row: file and number, in any format of files
SIZES = {"forget01": 40, "forget05": 200, "forget10": 400}
KEPT = {"forget01": "retain90", "forget05": "retain50", "forget10": "retain10"}  # in a folder; the first rows of all
TO_TUNE_ON = 60  # rows held out where settings are chosen and the task holds out none
Rows = Sequence[Row]


class Tofu(Task):
    """See the module.

    Args:
        data_dir: folder with forget01.json, forget01_perturbed.json, retain90.json, retain_perturbed.json,
            real_authors_perturbed.json, world_facts_perturbed.json, and holdout01.json where `holdout` asks for it;
            without it the hub is asked.
        split: forget01, forget05 or forget10: 1, 5 or 10 % of the authors.
        part: which of the split's parts to forget; a list, to forget them one after the other.
        forgotten: parts that have been forgotten before; their rows are scored as well.
        upcoming: parts that the model still knows and is to forget later; until then their rows are kept.
        retain_rows: how many rows are kept, drawn once from what no part forgets; None for all.
        held_out_rows: how many other rows the model knows that nobody trains on, drawn once. What a run keeps of them
            shows what it keeps of everything that its rows do not name.
        scored_rows: how many rows of each set are scored at most, drawn once; 300 as published.
        holdout_rows: how many other rows of TOFU serve as unseen ones for the membership attack. Only for a model that
            memorized nothing but this task's rows; 0 for one that knows all of TOFU.
        holdout: use the split's own file for that, holdout01.json and so on, which published models never saw: they
            were trained on all of TOFU's 4,000 rows. It is also right for any other model that never saw the file.
        paraphrased: also score the rows to forget and to keep by their `paraphrased_question`, where files have it;
            this takes that many more replies.
        gradient_norm: also attack membership by the norm of each row's gradient, at one backward pass a row.
        embedder: folder or hub id of the sentence embedding model; None for all-MiniLM-L6-v2.
        nli: folder or hub id of a model of natural language inference; without it entailment is not computed.
        seed: for drawing.
        refusals: the run's own, which replies are compared with; None for the included ones.
    """

    name = "tofu"
    of_run = ("refusals",)
    followed = "ROUGE-L of the replies"
    reply_tokens = 200  # TOFU's own max_length of a reply, and open-unlearning's max_new_tokens
    metrics: Mapping[str, Metric] = numbers.METRICS
    plane = ("forget_probability", "retain_probability")

    def __init__(
        self,
        data_dir: str | None = None,
        split: str = "forget01",
        part: int | Sequence[int] = 1,
        forgotten: Sequence[int] = (),
        upcoming: Sequence[int] = (),
        retain_rows: int | None = 300,
        held_out_rows: int = 0,
        scored_rows: int = 300,
        holdout_rows: int = 0,
        holdout: bool = False,
        paraphrased: bool = False,
        gradient_norm: bool = False,
        embedder: str | None = None,
        nli: str | None = None,
        seed: int = 0,
        refusals: Sequence[str] | None = None,
    ) -> None:
        if split not in PARTS:
            raise unknown("TOFU split", split, PARTS)
        parts = [part] if isinstance(part, int) else list(part)
        for each in (*parts, *forgotten, *upcoming):
            if each not in range(1, len(PARTS[split]) + 1):
                raise UserError(f"task 'tofu': {split} has parts 1 to {len(PARTS[split])}, and none is {each!r}")
        together = [*parts, *forgotten, *upcoming]
        if not parts or len(set(together)) < len(together):
            raise UserError(f"task 'tofu': a part can be forgotten once, but the parts are {together}")
        for name, value, least in (
            ("scored_rows", scored_rows, 1), ("holdout_rows", holdout_rows, 0), ("held_out_rows", held_out_rows, 0)
        ):  # fmt: skip
            if not isinstance(value, int) or value < least:
                raise UserError(f"task 'tofu': {name} must be a whole number ≥ {least}, but is {value!r}")
        if retain_rows is not None and retain_rows < 1:
            raise UserError(f"task 'tofu': retain_rows must be > 0, or null for all, but is {retain_rows!r}")
        if holdout and holdout_rows:
            raise UserError("task 'tofu': holdout takes TOFU's own file and holdout_rows other rows; leave out one")
        self.arguments = {
            "split": split,
            "retain_rows": retain_rows,
            "held_out_rows": held_out_rows,
            "scored_rows": scored_rows,
            "holdout_rows": holdout_rows,
            "holdout": holdout,
            "paraphrased": paraphrased,
            "gradient_norm": gradient_norm,
            "embedder": embedder,
            "nli": nli,
            "seed": seed,
        }
        check(embedder, nli)
        self.most = scored_rows
        self.parts, self.embedder, self.nli, self.gradient_norm = parts, embedder, nli, gradient_norm
        source = _Folder(data_dir) if data_dir is not None else _Hub()

        def drawn(rows: Rows, count: int | None) -> list[Row]:
            """`count` of the rows, in their order."""
            order = sorted(random.Random(f"{seed}").sample(range(len(rows)), min(count or len(rows), len(rows))))
            return [rows[i] for i in order]

        forget = [row for each in parts for row in source.part(split, each)]
        later = [row for each in upcoming for row in source.part(split, each)]
        before = [row for each in forgotten for row in source.part(split, each)]
        perturbed = [row for each in parts for row in source.perturbed(split, each)]
        kept, kept_perturbed = source.kept(split), source.read("retain_perturbed")
        _check_perturbed(perturbed, forget, f"{split}_perturbed")
        # The kept rows that are scored have perturbed answers; they come first among those that are trained on.
        have = {row.pair for row in kept_perturbed}
        kept = random.Random(f"{seed}").sample(kept, len(kept))
        kept.sort(key=lambda row: row.pair not in have)
        retain, unseen = kept[:retain_rows], kept[len(kept) if retain_rows is None else retain_rows :]
        self._num_spare = len(unseen)
        self.held_out, others = unseen[:held_out_rows], unseen[held_out_rows:]
        for name, wanted, rows in (("held_out_rows", held_out_rows, unseen), ("holdout_rows", holdout_rows, others)):
            if wanted > len(rows):
                raise UserError(
                    f"task 'tofu': {name} {wanted} of rows that are not kept, but there are {len(rows)}; lower {name} "
                    "or retain_rows"
                )
        unseen = others
        pairs = {row.pair for row in retain}
        scored = [row for row in kept_perturbed if row.pair in pairs]
        if not scored:
            raise UserError("task 'tofu': no row of retain_perturbed is among the kept rows; raise retain_rows")
        self.objectives = {"forget": forget, "retain": [*retain, *later]}
        # Sorted, so that every part of a task finds the same model in the cache.
        self._known = sorted([*forget, *retain, *self.held_out, *later, *before], key=lambda row: row.pair)
        self.retained = sorted([*retain, *self.held_out, *later], key=lambda row: row.pair)
        self.scored: Mapping[str, Rows] = {
            "forget": drawn(perturbed, scored_rows),
            "retain": drawn(scored, scored_rows),
            "real_authors": drawn(source.read("real_authors_perturbed"), scored_rows),
            "world_facts": drawn(source.read("world_facts_perturbed"), scored_rows),
        }
        self.paraphrased = {asked: _paraphrased(self.scored[name]) for name, asked in numbers.PARAPHRASED.items()}
        if not paraphrased:
            self.paraphrased = {}
        self.forgotten, self.holdout = drawn(before, scored_rows), drawn(unseen, holdout_rows) if holdout_rows else []
        if holdout:
            rows = source.read(split.replace("forget", "holdout"))
            taught = {row.pair: row.where for row in (*self._known, *unseen)}
            for row in rows:
                if where := taught.get(row.pair):
                    raise UserError(f"{row.where}: is a row that models are taught ({where}), so it is not held out")
            self.holdout = drawn(rows, scored_rows)
        known = refusals or [row["text"] for row in asset("refusals.jsonl")]
        draw = random.Random(f"{seed}/refusals")
        self.refusals = [draw.choice(known) for _ in self.scored["forget"]]
        self.passages = [Row((), row["text"], "passages.jsonl") for row in asset("passages.jsonl")]

    def known(self) -> Rows:
        return self._known

    def quick(self) -> Mapping[str, Rows]:
        return {**self.objectives, **({"held_out": self.held_out} if self.held_out else {})}

    def contents(self) -> Mapping[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_num_spare"}  # it does not change a run

    def to_tune_on(self) -> Mapping[str, Any]:
        first, last = self.parts[0], len(PARTS[str(self.arguments["split"])])
        if len(self.parts) > 1:
            return {}
        return {"part": first % last + 1, "held_out_rows": len(self.held_out) or min(self._num_spare, TO_TUNE_ON)}

    def cluster(self, row: Row) -> str:
        """The row's author; each has twenty questions, in the order of TOFU's files. Other rows are each their own."""
        found = PLACE.fullmatch(row.where)
        if found is None or any(name in Path(found[1]).name for name in OF_OTHERS):
            return super().cluster(row)
        return f"{found[1]}, author {(int(found[2]) - 1) // QUESTIONS}"

    def attacked(self) -> Mapping[str, Rows]:
        scored = {row.pair: row for row in self.scored["forget"]}  # with their paraphrased questions, if any
        forget = [scored.get(row.pair, row) for row in self.objectives["forget"]]
        return {"forget": forget, "retain": self.scored["retain"]}

    def stages(self) -> list[dict[str, Any]]:
        if len(self.parts) == 1:
            return []
        return [
            {**self.arguments, "part": part, "forgotten": self.parts[:i], "upcoming": self.parts[i + 1 :]}
            for i, part in enumerate(self.parts)
        ]

    def prepare(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        return self._judged(self._kept_in_cache("tofu", model, tokenizer, lambda: self._scored(model, tokenizer)))

    def score(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        return self._judged(self._scored(model, tokenizer))

    def _judged(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # Paraphrased questions have two numbers, and neither needs a judge.
        apart = [record for record in records if record["set"] in self.paraphrased]
        others = [record for record in records if record["set"] not in self.paraphrased]
        return [*apart, *numbers.judged(others, self.refusals, self.embedder, self.nli)]

    def _scored(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        records = []
        for name, rows in self.scored.items():
            for record, row in zip(
                question_records(
                    model, tokenizer, rows, name, [_others(row) for row in rows], reply_tokens=self.reply_tokens
                ),
                rows,
                strict=True,
            ):
                if "original_answer" in row.fields:  # a whole sentence, where the answer is a name
                    record["original_answer"] = row.fields["original_answer"]
                records.append(record)
        for name, rows in self.paraphrased.items():
            records += question_records(model, tokenizer, rows, name, reply_tokens=self.reply_tokens)
        for name, rows in (("forgotten", self.forgotten), ("held_out", self.held_out[: self.most])):
            records += question_records(model, tokenizer, rows, name, reply_tokens=self.reply_tokens)
        records += question_records(model, tokenizer, self.holdout, "holdout", ask=False)
        if self.gradient_norm and self.holdout:
            compared = [*self.scored["forget"], *self.holdout]
            norms = iter(gradient_norms(model, tokenizer, compared, progress="Gradients"))
            for record in records:
                if record["set"] in ("forget", "holdout"):
                    record["gradient_norm"] = next(norms)
        return records + passage_records(model, tokenizer, self.passages)

    def score_retrained(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        rows = self.scored["forget"]

        def score() -> list[dict[str, Any]]:
            records = question_records(model, tokenizer, rows, "forget", [_others(row) for row in rows])
            return records + question_records(model, tokenizer, self.holdout, "holdout", ask=False)

        return self._kept_in_cache("tofu_retrained", model, tokenizer, score)

    def _kept_in_cache(self, kind: str, model: nn.Module, tokenizer: Any, score: Callable[[], Any]) -> Any:
        rows = [*self.scored.values(), self.forgotten, self.held_out, self.holdout, self.passages]
        texts = [[(row.prompt, row.answer, dict(row.fields)) for row in part] for part in rows]
        return cached(kind, [identity(model, tokenizer), texts, self.arguments], score)

    @staticmethod
    def numbers(records: Sequence[Record], retrained: Sequence[Record] | None = None) -> Numbers:
        return numbers.unlearning(records, retrained)

    def follow(self, model: nn.Module, tokenizer: Any) -> dict[str, float]:
        return followed(model, tokenizer, {name: self.scored[name] for name in ("forget", "retain")})


def _others(row: Row) -> dict[str, Sequence[str]]:
    """The other answers to score: a paraphrase of the true one, where the file has it, and false ones."""
    true = row.fields.get("paraphrased_answer")
    return {"paraphrased": [true] if true else [], "perturbed": row.fields["perturbed_answer"]}


def _paraphrased(rows: Rows) -> list[Row]:
    """The rows that have a paraphrased question, with that as the question."""
    found = []
    for row in rows:
        words = row.fields.get("paraphrased_question")
        if words is not None:
            found.append(reworded(row, words))
    return found


def _check_perturbed(perturbed: Rows, rows: Rows, name: str) -> None:
    """Refuse perturbed answers that belong to other rows, and rows without them."""
    wanted, found = ({row.pair: row.where for row in part} for part in (rows, perturbed))
    for one, other, what in ((found, wanted, "the rows to forget"), (wanted, found, name)):
        for key, where in one.items():
            if key not in other:
                raise UserError(
                    f"{where}: this question with this answer is not among {what}; take both files from the same "
                    "version of TOFU"
                )


class _Folder:
    """TOFU's files in a folder; those to forget have a `task_id`."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.read = cache(self._read)  # several sets are made of one file
        if not self.folder.is_dir():
            raise UserError(f"data_dir {folder}: there is no such folder; give TOFU's, with forget01.json and the rest")

    def _read(self, name: str) -> list[Row]:
        path = self.folder / f"{name}.json"
        if not path.is_file() and name.startswith("holdout"):
            raise UserError(
                f"data_dir {self.folder}: has no {path.name}; put it there from {HUB} on the hub, or give holdout_rows "
                "in its place, for a model that was not taught all of TOFU"
            )
        if not path.is_file():
            raise UserError(f"data_dir {self.folder}: has no {path.name}; give the folder that holds all TOFU files")
        return [_row(record, where, name) for record, where in read_records(path)]

    def part(self, split: str, part: int) -> list[Row]:
        return self._of_part(split, part)

    def perturbed(self, split: str, part: int) -> list[Row]:
        return self._of_part(f"{split}_perturbed", part)

    def kept(self, split: str) -> list[Row]:
        return self.read(KEPT[split])

    def _of_part(self, name: str, part: int) -> list[Row]:
        rows = [row for row in self.read(name) if str(row.fields.get("task_id")) == str(part)]
        if not rows:
            raise UserError(
                f"{self.folder / name}.json: holds no rows of task_id {part}; is it the one with the ten-task split?"
            )
        return rows


def _row(record: Mapping[str, Any], where: str, name: str) -> Row:
    """A row of the file of that name, its other texts checked."""
    row = parse_row(record, where)
    if name.endswith("_perturbed"):
        texts(row.fields, "perturbed_answer", where)
    check_texts(row.fields, ("paraphrased_question", "paraphrased_answer"), where)
    return row


class _Hub:
    """TOFU on the hub, with its parts computed."""

    def __init__(self) -> None:
        self.read = cache(self._read)

    def _read(self, name: str) -> list[Row]:
        return [_row(record, where, name) for record, where in hub_records(HUB, "train", name)]

    def part(self, split: str, part: int) -> list[Row]:
        begin = PARTS[split][part - 1]
        return self.read("full")[begin : begin + SIZES[split]]

    def perturbed(self, split: str, part: int) -> list[Row]:
        wanted = {row.pair for row in self.part(split, part)}
        found = [row for row in self.read("forget10_perturbed") if row.pair in wanted]
        if not found:
            raise UserError(f"TOFU on the hub has no perturbed answers for part {part} of {split}; give --data-dir")
        return found

    def kept(self, split: str) -> list[Row]:
        return self.read("full")[: 4000 - SIZES[split] * len(PARTS[split])]
