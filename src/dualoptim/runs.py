"""What a run leaves behind: a folder with config.resolved.yaml, env.json, results.json and the model.

`results.json`, schema 1::

    {"schema": 1, "task": str, "model": str, "followed": str, "curves": {name: title}, "scores": {objective: metric},
     "metrics": {name: {"label", "better", "format"}}, "counts": {name: int}, "notes": [str],
     "runs": [{"method": str, "seed": int, "config": {…},
               "before": {name: number or null}, "after": {name: number or null}, "not_computed": {name: why},
               "verdict": str, "stopped": str or null,
               "curve": [{"step": int, name: number}], "losses": [{"step": int, …}],
               "samples": [{"set", "question", "answer", "before", "after"}],
               "scored_in": str, "seconds": number, "step_seconds": number, "optimizer_state_bytes": int,
               "peak_memory_bytes": int}]}

A run of one part of a task after the other has "part" as well. `before` and `after` hold the task's numbers under the
names in `metrics`, null for those in `not_computed`; records.jsonl holds the samples that they were made of, with
"when" they were taken: before, after, or of the "retrained" model; where the rows to train on are the model's own
words, forget.jsonl and retain.jsonl hold them, for `--forget` and `--retain`; `counts` says on how many questions those
that are shares were measured; `verdict` is what it came to in a sentence, empty for tasks that have none, `stopped` why
a run with a goal or a floor ended and which point remains, `notes` what else a reader should know; `curve` follows what
`followed` says, for each of `curves`; `scored_in` is the precision of all scores, "fp32" or "bf16" autocast;
`seconds` is the training, without loading, evaluation and curve; `step_seconds` the median optimizer step, forward and
backward included; `optimizer_state_bytes` is counted from the state tensors;
`peak_memory_bytes` is the process's resident peak so far (on a GPU, the run's peak of allocated memory).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .config import RunConfig
from .errors import UserError

if TYPE_CHECKING:  # which imports torch, and a report does without
    from .data import Row

SCHEMA = 1
RESULTS = "results.json"
RECORDS = "records.jsonl"


def check_folder(out: str | Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that holds something that a run would destroy unasked; changes nothing.

    Raises:
        UserError: it is a file, holds a run while neither `resume` nor `overwrite` says what to do with it, or holds
            other things.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out {folder}: is a file; give a folder")
    if _holds_a_run(folder):
        if not (resume or overwrite):
            raise UserError(f"out {folder}: already holds a run; give another folder, --resume or --overwrite")
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"out {folder}: is not empty and holds no run; give an empty or a new folder")


def _holds_a_run(folder: Path) -> bool:
    return (folder / "config.resolved.yaml").exists()


def open_folder(out: str | Path, *, overwrite: bool) -> Path:
    """Make the output folder, emptied of an earlier run under `overwrite`."""
    folder = Path(out)
    if overwrite and _holds_a_run(folder):
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out {folder}: cannot be made ({error.strerror}); give another folder") from None
    return folder


def finished(out: str | Path, configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """The entries of a folder's results.json, to go on from.

    Raises:
        UserError: the folder was begun with settings that are not among these, which going on would overwrite.
    """
    path = Path(out) / "config.resolved.yaml"
    if not path.exists():
        return []
    begun = yaml.safe_load(path.read_text(encoding="utf-8"))
    wanted = [config.as_dict() for config in configs]
    for other in begun.get("runs", [begun]):
        if other not in wanted:
            nearest = min(wanted, key=lambda mine: sum(mine[key] != other.get(key) for key in mine))
            key = next(key for key in nearest if nearest[key] != other.get(key))
            raise UserError(
                f"out {out}: holds a run with other settings ({key}: {other.get(key)} there, {nearest[key]} here); "
                "give another folder, or --overwrite"
            )
    return read_results(out)["runs"] if (Path(out) / RESULTS).exists() else []


def slug(text: str) -> str:
    """A name as part of a file's: "DualOptim+" → "dualoptim-plus"."""
    return "-".join(text.lower().replace("+", " plus").split())


def bytes_text(size: float) -> str:
    """Bytes for people: "1.5 GiB", "540 MiB"."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


SAMPLES = 4  # answers of each set shown before and after


def samples(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few replies of each set before and after, taken at equal distances, so that nobody picks them."""
    shown = []
    for name in dict.fromkeys(record["set"] for record in before if "reply" in record):
        pairs = [(b, a) for b, a in zip(before, after, strict=True) if b["set"] == name]
        for b, a in pairs[:: max(1, len(pairs) // SAMPLES)][:SAMPLES]:
            kept = {key: b[key] for key in ("set", "question", "answer")}
            shown.append({**kept, "before": b["reply"], "after": a["reply"]})
    return shown


def write_records(
    path: Path,
    before: Sequence[dict[str, Any]],
    after: Sequence[dict[str, Any]],
    retrained: Sequence[dict[str, Any]] | None,
) -> None:
    """Every sample's scores before and after, and a retrained model's, as JSON lines."""
    lines = [
        json.dumps({"when": when, **record}, ensure_ascii=False)
        for when, records in (("before", before), ("after", after), ("retrained", retrained or ()))
        for record in records
    ]
    _write(path, "\n".join(lines) + "\n")


def write_rows(folder: Path, objectives: Mapping[str, Sequence[Row]]) -> None:
    """Each objective's rows as JSON lines in a file of its name, in the forms that `--forget` and `--retain` take."""
    from .data import is_text

    def line(row: Row) -> dict[str, Any]:
        fields = {key: value for key, value in row.fields.items() if value is not None}
        if is_text(row.prompt):
            chunk = {"chunk": list(row.chunk)} if row.chunk else {}
            return {"text": row.question + row.answer, **chunk, **fields}
        if len(row.prompt) == 1:
            return {"question": row.question, "answer": row.answer, **fields}
        return {"messages": [*row.prompt, {"role": "assistant", "content": row.answer}], **fields}

    for name, rows in objectives.items():
        lines = [line(row) for row in rows]
        _write(folder / f"{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_records(path: str | Path) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """The task of a run, and its records: when they were taken → records.

    Args:
        path: the run's own folder, its records.jsonl with the results beside it or one folder above, or a file of
            `dualoptim evaluate --scores`.
    """
    from .data import read_records as read_json_lines  # with torch, which a report does without

    path = Path(path)
    path = path / RECORDS if path.is_dir() else path
    if path.is_file() and path.read_text(encoding="utf-8").startswith("{\n"):  # a record's line is a whole object
        scores = _read_json(path)
        try:
            return scores["task"], {w: scores[w]["records"] for w in ("before", "after", "retrained") if scores.get(w)}
        except (KeyError, TypeError):
            raise UserError(f"{path}: is not a file of `dualoptim evaluate --scores`") from None
    records: dict[str, list[dict[str, Any]]] = {}
    for record, where in read_json_lines(path):
        if not {"when", "set"} <= set(record):
            raise UserError(f"{where}: is not a record of a run, which has 'when' and 'set'")
        records.setdefault(record.pop("when"), []).append(record)
    if "after" not in records:
        raise UserError(f"{path}: has no records of a model after unlearning")
    beside = next((f for f in (path.parent, path.parent.parent) if (f / RESULTS).is_file()), path.parent)
    return read_results(beside)["runs"][0]["config"]["task"] or "files", records


def write_settings(folder: Path, configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """Write what is run, config.resolved.yaml, and what it may depend on, env.json; the configs as plain values."""
    resolved = [config.as_dict() for config in configs]
    write_yaml(folder / "config.resolved.yaml", resolved[0] if len(resolved) == 1 else {"runs": resolved})
    write_json(folder / "env.json", environment())
    return resolved


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write values as YAML, in their order."""
    _write(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON, whole or not at all."""
    _write(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_results(path: str | Path) -> dict[str, Any]:
    """Read a results.json, or the one of a run's folder."""
    path = Path(path)
    path = path / RESULTS if path.is_dir() else path
    results = _read_json(path)
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise UserError(f"{path}: is not a results file of schema {SCHEMA}; make it again with this version")
    return results


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path}: there is no such file; give the folder of a finished run") from None
    except ValueError as error:
        raise UserError(f"{path}: is not a results file ({error})") from None


def environment() -> dict[str, Any]:
    """What a result may depend on: versions, processor, memory, devices, the command."""
    import torch

    versions: dict[str, str | None] = {}
    for name in ("dualoptim", "torch", "transformers", "accelerate", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_bytes": total_memory(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def total_memory() -> int:
    """Bytes of memory of this machine."""
    import psutil

    return psutil.virtual_memory().total
