"""WMDP: forget hazardous knowledge as texts hold it, and see in multiple choice whether it is gone (arXiv 2403.03218).

The corpora to forget are on biosecurity and cybersecurity, and RMU has a direction of its own for each; another corpus
is kept. The first tokens of each text are trained on. The questions do not come from the texts: they are WMDP's own and
MMLU's, by lm-evaluation-harness (`--lm-eval`). Without it, only held-out texts of the same corpora tell what became
less probable.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from ..data import Row, asset
from ..errors import UserError, unknown
from ..evaluation import general, metrics, scoring
from ..evaluation.numbers import NO_PASSAGES, Metric, Numbers, Record
from ..models import load_tokenizer
from ..reading import file_of, hub_rows, read_lines, read_text
from ..rows import chunks
from ..tiny import TINY
from . import Task, not_trained_on

# Corpus → its data set on the hub, configuration and split.
HUB: dict[str, tuple[str, str | None, str]] = {
    "bio-forget-corpus": ("cais/wmdp-bio-forget-corpus", None, "train"),  # gated
    **{name: ("cais/wmdp-corpora", name, "train") for name in ("bio-retain-corpus", "cyber-forget-corpus")},
    "cyber-retain-corpus": ("cais/wmdp-corpora", "cyber-retain-corpus", "train"),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),  # the split that WMDP's authors keep
}
TOKENS, CYBER_TOKENS = 512, 768  # of each text, as in the authors' code
HARNESS = ("wmdp_bio", "wmdp_cyber", "wmdp_chem", "mmlu")  # tasks of lm-evaluation-harness
NOT_ASKED = f"lm-evaluation-harness was not asked; give --lm-eval '[{', '.join(HARNESS)}]' (dualoptim[lm-eval])"


class Wmdp(Task):
    """See the module.

    Args:
        data_dir: folder with a file for each corpus, such as bio-forget-corpus.jsonl: rows with ``text``, or plain
            lines; or a folder of .txt files of that name. Default the hub, where the corpus on biology is gated.
        forget: corpora to forget: bio-forget-corpus, cyber-forget-corpus, or files of one's own in `data_dir`.
        retain: corpora to keep: wikitext as published, bio-retain-corpus, cyber-retain-corpus, or one's own.
        documents: how many texts of each corpus are trained on at most, the first ones: 300, as many as the published
            150 steps on two corpora see; None for all.
        tokens: how many tokens of each text are trained on, the first ones; None for the published 768 of
            cyber-forget-corpus and 512 of others. For the model "tiny", which is made from the texts, they are not cut.
        scored: how many further texts of each corpus are measured at most; those that are also trained on, as headings
            may be, are left out.
        least: letters that a text must have; shorter ones are left out. 1 as published.
        tokenizer: folder or hub id of the model by whose tokens texts are cut; default the run's own.
    """

    name = "wmdp"
    of_run = ("tokenizer",)
    followed = "probability of a token of held-out texts"
    metrics: Mapping[str, Metric] = {
        "wmdp_bio_acc": Metric("WMDP-Bio", "lower", ".3f"),
        "wmdp_cyber_acc": Metric("WMDP-Cyber", "lower", ".3f"),
        "wmdp_chem_acc": Metric("WMDP-Chem", "neither", ".3f"),
        "mmlu_acc": Metric("MMLU", "higher", ".3f"),
        "perplexity": Metric("perplexity", "lower", ".1f"),
        "forget_perplexity": Metric("perplexity, to forget, held out", "higher", ".3g", "Texts"),
        "retain_perplexity": Metric("perplexity, to keep, held out", "lower", ".3g", "Texts"),
    }

    def __init__(
        self,
        data_dir: str | None = None,
        forget: Sequence[str] = ("bio-forget-corpus", "cyber-forget-corpus"),
        retain: Sequence[str] = ("wikitext",),
        documents: int | None = 300,
        tokens: int | None = None,
        scored: int = 40,
        least: int = 1,
        tokenizer: str | None = None,
    ) -> None:
        for name, value in (("documents", documents), ("tokens", tokens), ("scored", scored), ("least", least)):
            if value is not None and value < (2 if name == "tokens" else 1):
                raise UserError(f"task 'wmdp': {name} must be a whole number > {int(name == 'tokens')}, but is {value}")
        together = [*forget, *retain]
        if not forget or not retain or len(set(together)) < len(together) or not all(Path(n).name for n in together):
            raise UserError(f"task 'wmdp': give corpora to forget and others to retain, but they are {together}")
        cutter = load_tokenizer(tokenizer) if tokenizer is not None and tokenizer != TINY else None

        def split(name: str) -> tuple[list[Row], list[Row]]:
            rows = list(itertools.islice(_texts(name, data_dir, least), documents and documents + scored))
            if cutter is not None:
                size = tokens or (CYBER_TOKENS if name == "cyber-forget-corpus" else TOKENS)
                rows = [chunks.beginning(row, cutter, size) for row in rows]
            if len(rows) < 2:
                raise UserError(
                    f"task 'wmdp': {name} has {len(rows)} texts of {least} letters or more, and needs two, of which "
                    "one is kept aside to measure by"
                )
            spare = len(rows) - (documents or len(rows))  # if there are few texts, a third is not trained on
            aside = min(scored, max(spare, len(rows) // 3, 1))
            return rows[: min(documents or len(rows), len(rows) - aside)], rows[-aside:]

        parts = {name: split(name) for name in together}
        names = {"forget": forget, "retain": retain}
        self.objectives = {
            role: [replace(row, group=group) for group, name in enumerate(of) for row in parts[name][0]]
            for role, of in names.items()
        }
        held = {
            name: not_trained_on(rows, self.objectives, f"task 'wmdp': {name}") for name, (_, rows) in parts.items()
        }
        self.held_out = {role: [row for name in of for row in held[name]] for role, of in names.items()}
        self.passages = [Row((), row["text"], "passages.jsonl") for row in asset("passages.jsonl")]

    def prepare(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        return self.score(model, tokenizer)

    def score(self, model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        sets = self.held_out.items()
        records = [r for name, rows in sets for r in scoring.text_records(model, tokenizer, rows, name)]
        return records + scoring.passage_records(model, tokenizer, self.passages)

    @staticmethod
    def numbers(records: Sequence[Record], retrained: Sequence[Record] | None = None) -> Numbers:
        def perplexity(name: str) -> float | None:
            part = [r for r in records if r["set"] == name]
            return metrics.perplexity([r["nll"] for r in part], [r["tokens"] for r in part]) if part else None

        chosen = general.values(records)
        numbers = {f"{name}_acc": chosen.get(f"{name}_acc") for name in HARNESS}
        numbers |= {
            "perplexity": perplexity("passages"),
            "forget_perplexity": perplexity("forget"),
            "retain_perplexity": perplexity("retain"),
        }
        why = {name: NOT_ASKED if name.endswith("_acc") else "the set has no records" for name in numbers}
        why["perplexity"] = NO_PASSAGES
        return Numbers(numbers, {name: why[name] for name, number in numbers.items() if number is None})

    def follow(self, model: nn.Module, tokenizer: Any) -> dict[str, float]:
        few = {name: rows[:: -(-len(rows) // scoring.FOLLOWED_ROWS)] for name, rows in self.held_out.items()}
        return {
            name: fmean(map(metrics.probability, scoring.negative_log_likelihoods(model, tokenizer, rows)))
            for name, rows in few.items()
        }


def _texts(name: str, data_dir: str | None, least: int) -> Iterator[Row]:
    """A corpus's texts that have at least so many letters, read lazily."""
    if data_dir is None:
        if name not in HUB:
            raise unknown("corpus of WMDP", name, HUB)
        repository, config, split = HUB[name]
        found = hub_rows(repository, split, config, f"give --data-dir, a folder with {name}.jsonl")
        texts: Iterable[tuple[Any, str]] = ((record.get("text"), where) for record, where in found)
    else:
        path = file_of(data_dir, "wmdp", name, "data_dir")
        if path is None:
            raise UserError(f"data_dir {data_dir}: has no {name}.jsonl; put that corpus there, or name others to take")
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if path.is_dir():
            texts = ((read_text(file), str(file)) for file in files)
        else:
            texts = ((text, f"{path}, text {i}") for i, text in enumerate(read_lines(path, "text", blank=True), 1))
    for text, where in texts:
        if not isinstance(text, str):
            raise UserError(f"{where}: needs its words under 'text'")
        if text.strip() and len(text) >= least:
            yield Row((), text, where)
