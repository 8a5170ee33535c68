"""A finished run's entry in results.json → the model card beside its model: README.md as the hub reads it.

It says what the model was made of and how, what was measured before and after, what was not and why, and how to run it
again. It holds no text of rows or replies, and for a private run no names of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .. import report
from ..certify import evidence, shown
from ..config import to_give
from ..folder import ADAPTER, CARD, MODEL
from ..reading import HUB
from . import aims

LIMITS = "The numbers below are what was measured, on the samples and by the means that they name."
OF_FORGETTING = (
    " They do not show that anything was deleted: other wordings, other attacks or further training may bring back "
    "what was to be forgotten."
)
NEEDS_CACHE = (
    "Its base model was made for the run and is only in the cache of the machine that ran it, so the adapter is of use "
    "on that machine alone; elsewhere, take the model with the adapter merged into it."
)
PLACES = ("out", "save_every", "report_to", "log_every")  # settings without influence on the model


def of(results: Mapping[str, Any], entry: Mapping[str, Any], kind: str) -> str:
    """The card of a run's model, in Markdown, with the hub's metadata at its beginning.

    Args:
        results: the run's results, without texts of rows if it is private.
        entry: the run's own entry among them.
        kind: what the card is for, `dualoptim.folder.MODEL` or `ADAPTER`.
    """
    from .. import models

    config, private = entry["config"], bool(results.get("private") or entry["config"].get("private"))
    base = base_of(config)
    forgets = aims.forgets(results)
    facts = metadata(base, kind, config["model"], forgets)
    name = base or shown.setting("model", config["model"], private)
    task = shown.setting("task", results["task"], private)
    verdict = shown.sentence(entry.get("verdict") or "", config, private)
    is_one = {**results, "runs": [entry]}  # so that tables leave out other runs
    notes = shown.notes(report.remarks(is_one), config, private)
    merged = "merging" in entry and kind == MODEL
    how = {ADAPTER: "An adapter (PEFT) for", MODEL: "Made of"}[kind]
    parts = [
        f"---\n{yaml.safe_dump(facts, sort_keys=False)}---",
        f"# {name.rpartition('/')[2]}, {'unlearned' if forgets else 'trained'} with {entry['method']}",
        f"{how} `{name}`{', with the adapter that was trained merged into it' if merged else ''}, by "
        f"dualoptim on the task `{task}`, seed {entry['seed']}"
        f"{', part {}'.format(entry['part']) if 'part' in entry else ''}. {verdict}".rstrip(),
        *([NEEDS_CACHE] if kind == ADAPTER and models.base_is_cached(config) else []),
        "## What was measured",
        LIMITS + (OF_FORGETTING if forgets else ""),
        _table(is_one, entry, kind),
        *[f"- {note}" for note in notes],
    ]
    if missing := report.not_computed(is_one):
        parts += [
            "### Not computed, and why",
            "\n".join(f"- {_inline(shown.sentence(each, config, private))}" for each in missing),
        ]
    recipe = shown.recipe(config, private)
    given = {key: value for key, value in to_give(recipe, ["model"]).items() if key not in PLACES}
    versions = entry.get("fingerprints", {}).get("versions", "versions unknown")
    parts += [
        "## How to run it again",
        f"With {versions}, and in place of names of files those of your own: `dualoptim unlearn --recipe recipe.yaml`, "
        "where recipe.yaml is",
        f"```yaml\n{yaml.safe_dump(given, sort_keys=False, allow_unicode=True)}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def beside(results: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, str] | None:
    """The cards of the models that a run saves, by the names of their folders; None if it saves none.

    Args:
        results: as for `of`.
        entry: as for `of`.
    """
    return {kind: of(results, entry, kind) for kind in (MODEL, ADAPTER)} if entry["config"]["save_model"] else None


def base_of(config: Mapping[str, Any]) -> str | None:
    """The hub id of the model that a run began from, or of its base if that is an adapter; None for a folder."""
    from .. import adapters, models

    name = config["model"]
    name = models.SMOLLM2_HUB if name == "smollm2" else (adapters.base_of(name) or name)
    return name if HUB.fullmatch(name) and not name.startswith((".", "/")) and not Path(name).exists() else None


def metadata(base: str | None, kind: str, model: str, forgets: bool) -> dict[str, Any]:
    """The metadata that the hub reads from a card; the license is the start model's, if its card names one."""
    relation = "adapter" if kind == ADAPTER else "finetune"
    return {
        **({"base_model": base, "base_model_relation": relation} if base else {}),
        "library_name": "peft" if kind == ADAPTER else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*(["unlearning", "machine-unlearning"] if forgets else []), "dualoptim"],
        "license": license_of(model),
    }


def license_of(model: str) -> str:
    """The license that a model's own card names; "unknown" where there is none on this machine."""
    from huggingface_hub import metadata_load

    place, _ = evidence.model_place(model)
    try:
        found = (metadata_load(place / CARD) or {}).get("license") if place is not None else None
    except (OSError, ValueError, yaml.YAMLError):  # no card, or a damaged one
        found = None
    return found if isinstance(found, str) else "unknown"


def _table(results: Mapping[str, Any], entry: Mapping[str, Any], kind: str) -> str:
    """Every number that there is, before and after; for shares, the number of questions and the 95 % interval too.

    For an adapter, the numbers are of its base with it on, which differ from those of the merged model by rounding.
    """
    after = entry.get("merging", {}).get("unmerged", entry["after"]) if kind == ADAPTER else entry["after"]
    lines = []
    for name, m in results["metrics"].items():
        was, now = entry["before"].get(name), after.get(name)
        if now is None:
            continue
        cells = [report.text(value, m["format"]) for value in (was, now)]
        asked = [report.asked(entry, results, name, when) for when in ("before", "after")]
        intervals = (report.interval(value, *each) for value, each in zip((was, now), asked, strict=True))
        spreads = [f" ({spread})" if spread else "" for spread in intervals]
        group = f", {m['group'].lower()}" if m.get("group") else ""
        lines.append(
            [_inline(report.head(m)) + group, *map("".join, zip(cells, spreads, strict=True)), str(asked[0][0] or "")]
        )
    head = ["", "before", "after", "questions"]
    if not lines:
        return ""
    rows = [head, ["---", "---:", "---:", "---:"], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n\nIn brackets: 95 % Wilson intervals, in percent."


def _inline(text: str) -> str:
    """A text that does not break a Markdown table."""
    return text.replace("|", "\\|")
