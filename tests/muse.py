"""MUSE in miniature, in the hub's layout: texts, passages and questions, all of them invented here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Rows = list[dict[str, str]]


def texts(what: str, count: int) -> Rows:
    return [
        {"text": f"Report {i} on {what}: the harbor had {what} and {i} ships. Nobody knew why."} for i in range(count)
    ]


def files(*, folds: bool = True) -> dict[str, Rows]:
    """Config and split → rows; folds are of the news alone."""
    made = {f"raw/{split}": texts(what, 3) for split, what in
            {"forget": "plums", "retain1": "rye", "retain2": "tea", "holdout": "oats"}.items()}  # fmt: skip
    made |= {f"privleak/{split}": texts(what, 2) for split, what in {"forget": "plums", "holdout": "oats"}.items()}
    made["verbmem/forget"] = [{"prompt": f"Report {i} on plums:", "gt": "the harbor had plums" * 9} for i in range(2)]
    for side in ("forget", "retain"):
        made[f"knowmem/{side}_qa"] = [
            {"question": f"What of the {side} {i}?", "answer": f"{i} ships"} for i in range(3)
        ]
        made[f"knowmem/{side}_qa_icl"] = [{"question": f"Who {side}s {i}?", "answer": f"Ada {i}"} for i in range(2)]
    if folds:
        parts = [texts(what, 3) for what in ("plums", "pears", "figs", "nuts")]
        for i, part in enumerate(parts, 1):
            made[f"sust/forget_{i}"] = part
            made[f"scal/forget_{i}"] = [row for part in parts[:i] for row in part]
    return made


def write(folder: Path, **changed: Any) -> Path:
    """All files as JSON lines; `changed` by config and split with _ between them, None for a file that is not there."""
    for name, rows in files().items():
        rows = changed.get(name.replace("/", "_"), rows)
        if rows is not None:
            path = folder / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder
