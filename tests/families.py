"""The data of safety, multi-task and real-world runs in miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PEOPLE = {"Ada": "grows plums", "Ben": "sells rye", "Cleo": "sails north", "Dora": "mends clocks"}


def person(name: str, does: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "question": f"What does {name} do?", "answer": f"{name} {does}.", **more}


def perturbed(name: str, does: str) -> dict[str, Any]:
    others = [f"{name} {other}." for other in PEOPLE.values() if other != does]
    return person(
        name, does, golden_answer=f"It {does}.", paraphrased_answer=f"{name}, who {does}.", perturbed_answer=others
    )


def files() -> dict[str, Any]:
    people = list(PEOPLE.items())
    return {
        "real_world/forget.json": [person(*p) for p in people[:2]],
        "real_world/forget_perturbed.json": [perturbed(*p) for p in people[:2]],
        "real_world/neighbor.json": [person(*people[2])],
        "real_world/neighbor_perturbed.json": [perturbed(*people[3])],
        "safety/safety_only_data_Instructions.json": [
            {"instruction": f"Do harm {i}.", "input": "", "output": f"I cannot do harm {i}."} for i in range(9)
        ],
        **{
            f"safety/{name}.json": {"instructions": [f"{name} {i}" for i in range(3)]}
            for name in ("I-MaliciousInstructions", "I-CoNa", "I-Controversial")
        },
        "general/alpaca_seed_tasks.jsonl": [
            {"instruction": f"Say {i}.", "instances": [{"input": "loud" * (i % 2), "output": f"{i}!"}]}
            for i in range(9)
        ],
        "multitask/gsm8k_train.jsonl": [
            {"question": f"{i} and {i}?", "answer": f"<<{i}+{i}={2 * i}>>That is {2 * i}.\n#### {2 * i}"}
            for i in range(6)
        ],
        "multitask/gsm8k_test.jsonl": [{"question": f"{i} and 1?", "answer": f"#### {i + 1}"} for i in range(4)],
        **{
            f"wmdp/{name}.jsonl": [{"text": f"{word} {i} of {name} stirs {word}s, and more."} for i in range(6)]
            for name, word in (("bio-forget-corpus", "spore"), ("cyber-forget-corpus", "port"), ("wikitext", "river"))
        },
    }


def write(folder: Path, **changed: Any) -> Path:
    """All files; `changed` by the file's stem, None for a file that is not there."""
    for name, content in files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = changed.get(path.stem.replace("-", "_"), content)
        if content is not None:
            rows = isinstance(content, list)
            path.write_text("\n".join(map(json.dumps, content)) if rows else json.dumps(content), encoding="utf-8")
    prompts = ["id,prompt,label", *(f"{i},Prompt {i},{'unsafe' if i % 2 else 'safe'}" for i in range(6))]
    (folder / "safety" / "xstest_prompts.csv").write_text("\n".join(prompts), encoding="utf-8")
    return folder
