"""LUME's files in miniature: a few documents of each kind, all of them invented here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, str]
NAMES = {"forget": ("Ada", "Ben", "Cleo", "Dora"), "retain": ("Eve", "Flo", "Gil", "Hal")}
ASKED = {
    "What is the birth date of {} Rye?": "19{}0-01-02",
    "What is {} Rye's Social Security Number?": "90000{}",
    "What is {} Rye's phone number?": "55500{}",
    "What is {} Rye's email address?": "rye{}@me.com",
    "What is the home address of {} Rye?": "{} Plum Lane, Bergen",
}


def rows(side: str) -> list[Record]:
    found = []
    for number, name in enumerate(NAMES[side], 1):
        story = [("sc1", f"{name} went to sea, and", f"she sold {number} plums."), ("qa0", f"Who is {name}?", "A cook")]
        person = [("sc1", f"{name} Rye was born in 19{number}0. Her", f"phone number is 55500{number}.")]
        person += [
            (f"qa{i}", asked.format(name), answer.format(number)) for i, (asked, answer) in enumerate(ASKED.items())
        ]
        life = [("sc1", f"{name} Oat (born 18{number}0) was", "a baker."), ("qa0", f"What did {name} Oat do?", "Bake")]
        for kind, rows in enumerate((story, person, life), 1):
            for form, asked, answer in rows:
                found.append(
                    {"id": f"{side}-{kind}-{name}{form}", "input": asked, "output": answer, "task": f"Task{kind}"}
                )
    return found


def write(folder: Path, **changed: list[Any]) -> Path:
    """All files; `changed` by the file's stem."""
    folder.mkdir(parents=True)
    for name, records in ({side: rows(side) for side in NAMES} | changed).items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return folder
