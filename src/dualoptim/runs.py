"""What a run leaves behind: a folder with config.resolved.yaml, env.json, results.json and the model.

`results.json`, schema 1::

    {"schema": 1, "task": str, "model": str, "private": bool, "forgets": bool, "followed": str,
     "curves": {name: title}, "scores": {objective: metric},
     "metrics": {name: {"label", "better", "format"}}, "counts": {name: int}, "notes": [str],
     "plane": [name, name] or null, "points": [{…}],
     "runs": [{"method": str, "seed": int, "config": {…}, "files": {setting: hash}, "fingerprints": {name: hash},
               "before": {name: number or null}, "after": {name: number or null}, "not_computed": {name: why},
               "effective_counts": {"before" or "after": {name: number}},
               "merging": {"unmerged" or "merged" or "merged_bf16" or "merged_nf4": {name: number or null}},
               "finite": bool, "skipped_steps": {objective: int}, "collapse": [str],
               "verdict": str, "stopped": str or null,
               "curve": [{"step": int, name: number or null}], "losses": [{"step": int, …}],
               "samples": [{"set", "question", "answer", "before", "after"}],
               "environment": {"python", "platform", "versions", …}, "scored_in": str, "seconds": number,
               "watching_seconds": number, "step_seconds": number, "optimizer_state_bytes": int,
               "peak_memory_bytes": int}]}

"forgets" says whether an objective is to forget. "plane" names the two metrics that runs are compared by, such as of
what is forgotten and of what is kept, and "points" has a point for each method and setting, as `dualoptim.points` makes
them. Runs may have several starts (`dualoptim.starts`), each with numbers `before` of its own; "task" and "model" are
then those of the first. The results of many runs (`dualoptim.grid`) also have "planned" (how many), "plan" (their
"methods" and "seeds", and the settings that "varied", as a goal chose them for each run) and "grid" (setting → values);
those of a search (`dualoptim.tune`) also have "chosen": the "method", "settings" and "score" of the trial in its
recipe.

A run of one of several parts has "part" as well. `before` and `after` hold the task's numbers under the names in
`metrics`, null for those in `not_computed`. records.jsonl holds the samples that they were computed from, with "when"
they were taken: before, after, or from the "retrained" model, and the "cluster" of their row where they have one, the
same for rows whose scores are not independent, such as wordings of one row or TOFU's rows of one author. If the rows to
train on are the model's own words, forget.jsonl and retain.jsonl hold them, for `--forget` and `--retain`, and
alternates.jsonl the other answers that AltPO prefers. `counts` has the number of questions for metrics that are shares;
a run of many has `counts` of its own where those of the runs differ. Where several of these questions are of one
cluster, `effective_counts` has how many independent ones tell as much (`dualoptim.evaluation.shares`); intervals are
made for these. It lacks a share whose questions are all independent. `verdict` is the result in a sentence, empty for
tasks that have none; `stopped` says why a run with a goal or a floor ended and which point remains; `notes` what else a
reader should know. `curve` has the values of what `followed` names, for each of `curves`, null for one of which nothing
could be asked. `scored_in` is the precision
of all scores, "fp32" or "bf16" autocast.

A run with `attacks` has their numbers beside the task's. Their samples are in sets that begin with "attack_", and the
samples that they are compared with in "unattacked" and "unattacked_retain": `probability`, `rouge_l`, whether the
answer was `answered`, what was `said` in place of a `reply`; `probability_before` where weights were changed, the
wording `asked` where it is the worst of several, and how many of the `samples` are `leaks`.

A run that trained an adapter has `merging`, unless merging was turned off: the numbers of the base model with the
adapter on it, with the adapter merged into its weights, which are those of `after`, and with the merged weights rounded
to bf16, and to 4 bits (NF4) if the base was in 4 bits in training. Without it, `after` is of the adapter on its base.

`seconds` is the time of training, without loading, evaluation, checkpoints and the curve, which took
`watching_seconds`; `step_seconds` is the median optimizer step, forward and backward included; `optimizer_state_bytes`
is counted from the state tensors; `peak_memory_bytes` is the process's resident peak so far (on a GPU, the run's peak
of allocated memory).

`files` are the SHA-256 of the files that settings name; `fingerprints` those of a run's inputs: rows and measures, the
file of a task of your own, refusals, questions of probes, template, tokenizer, start model and its end tokens, AltPO's
alternates, and the packages' versions. If `finite` is false, the model's numbers were not after training, and nothing
was measured. `collapse` says how a model fell apart. `environment` is that of the process that ended the run; env.json
is of the latest process that ran something in the folder, whichever run it was. The files of a `private` run hold no
text of rows or replies: hashes in records.jsonl, no samples.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from . import ranks
from .checkpoints import MEMORIZED, TASK_FILE, differing
from .command_line.rerun import options
from .config import READ_BY, RunConfig, without_place
from .errors import UserError
from .evaluation.words import replaced
from .folder import ENVIRONMENT, FOLDERS, SETTINGS, folders_of, written
from .folder import RECORDS as RECORDS
from .folder import RESULTS as RESULTS
from .reading import parse_json, read_text, whole
from .rows.quoting import PRIVATE, Quoting
from .schema import misfit, misfit_of_one

if TYPE_CHECKING:  # these import torch, which a report does not need
    from .data import Row
    from .resolved import Resolved

SCHEMA = 1
PRECISIONS = {"bf16": "trained", "score_bf16": "scored"}  # settings that the machine decides where none is given


def check_begun(out: Path, configs: Sequence[RunConfig], at_work: Callable[[], bool] = lambda: False) -> None:
    """Refuse to resume in a folder that was started with other settings.

    Args:
        at_work: whether others work at the folder's plan right now, to which no run is added then: they would not know
            of it.

    Raises:
        UserError: the first setting that differs.
    """
    path = out / SETTINGS
    if not path.exists():
        return
    try:
        begun = yaml.safe_load(path.read_text(encoding="utf-8"))
        begun = [without_place(one) for one in begun.get("runs", [begun])]
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{path}: is damaged; give another folder, or --overwrite") from None
    mine = [config.settings() for config in configs]
    for other in begun:
        if other not in mine:
            nearest = min(mine, key=lambda one: sum(one[key] != other.get(key) for key in one))
            raise _other_settings(out, other, nearest)
    added = [one for one in mine if one not in begun]
    if added and begun and at_work():
        nearest = min(begun, key=lambda other: sum(added[0][key] != other.get(key) for key in added[0]))
        raise _other_settings(out, nearest, added[0])


def _other_settings(out: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> UserError:
    """The error for a run of a folder and the one to do there that is nearest to it."""
    differ = [key for key in here if key not in there or here[key] != there[key]] or [min(there, default="")]
    given = [there.get(key) for key in differ]
    if {*differ} <= {*PRECISIONS} and any(all(value is each for value in given) for each in (True, False)):
        was, now = ("bf16", "fp32") if there[differ[0]] else ("fp32", "bf16")
        return UserError(
            f"out {out}: holds a run that was {' and '.join(PRECISIONS[key] for key in differ)} in {was}, "
            f"and here it would be in {now}, as the machine decides where it is not given; add "
            f"{' '.join(options({key: there[key] for key in differ}))}, or give another folder"
        )
    key = differ[0]
    return UserError(
        f"out {out}: holds a run with other settings ({key}: {there.get(key)} there, {here.get(key)} here); "
        "give another folder, or --overwrite"
    )


def begun_alone(out: Path) -> dict[str, Any] | None:
    """The settings, without the folder, of the one run that a folder itself is of; None where it is of several.

    What is damaged, `check_begun` has refused.
    """
    path = out / SETTINGS
    begun = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    return None if "runs" in begun else without_place(begun)


def finished(out: Path, resolved: Sequence[Resolved]) -> list[tuple[dict[str, Any], Resolved]]:
    """The entries of a folder's results.json, each with what its config resolved to, for resuming.

    Raises:
        UserError: the folder was started with other settings, other rows or another model.
    """
    check_begun(out, [of.config for of in resolved])
    found = []
    for entry in read_results(out)["runs"] if (out / RESULTS).exists() else []:
        of = next((of for of in resolved if of.config.settings() == without_place(entry["config"])), None)
        if of is None:
            raise UserError(
                f"{out / RESULTS}: holds runs that {SETTINGS} does not; give another folder, or --overwrite"
            )
        check_same(entry, of.identity, out)
        found.append((entry, of))
    return found


def check_same(entry: Mapping[str, Any], identity: Mapping[str, str], out: Path) -> None:
    """Refuse to go on with a run that had other rows, another model or the like.

    Args:
        identity: as `dualoptim.resolved.Resolved` has it.
        out: the folder that was given.

    Raises:
        UserError: the first fingerprint that differs.
    """
    files = entry.get("files", {})  # where runs of earlier versions have the hash of a task's own file
    before = {**({TASK_FILE: files["task"]} if "task" in files else {}), **entry.get("fingerprints", {})}
    if differs := differing(before, identity):
        why = "by the machine" if differs == MEMORIZED else "its contents changed, though its name did not"
        raise UserError(
            f"out {out}: holds a run of another {differs.replace('_', ' ')} ({why}); give another folder, or "
            "--overwrite"
        )


def is_whole(entry: Mapping[str, Any], of: Resolved, *places: Path) -> bool:
    """Whether a run's records, and the models that it saves, which are written after its entry, are there.

    Else it is not finished. A run whose weights are not finite saves no model.

    Args:
        places: the folders that may hold them.
    """
    names = [RECORDS, *(of.saved if entry.get("finite", True) else ())]
    return all(any((place / name).exists() for place in places) for name in names)


def troubles(entries: Sequence[Mapping[str, Any]], grid: Iterable[str] = ()) -> list[str]:
    """What went wrong with runs, in sentences.

    Args:
        entries: the runs.
        grid: the settings that tell runs of one method and seed apart, which the sentences name.
    """
    found = []
    for entry in entries:
        own = entry.get("config", {})
        read = [key for key in grid if key in own and own["optimizer"] in READ_BY.get(key, {own["optimizer"]})]
        settings = [f"{key} {own[key]}" for key in read]
        part = [f"part {entry['part']}"] if "part" in entry else []
        name = ", ".join([entry["method"], f"seed {entry['seed']}", *part, *settings])
        if entry.get("collapse"):
            found.append(f"{name}: the model fell apart: {'; '.join(entry['collapse'])}.")
        if not entry.get("finite", True):
            found.append(f"{name}: the model's numbers are not finite after training, so nothing was measured of it.")
        for objective, count in entry.get("skipped_steps", {}).items():
            if count:
                found.append(f"{name}: {count} steps to {objective} were skipped, as their gradients were not finite.")
    versions = list(dict.fromkeys(entry.get("fingerprints", {}).get("versions", "unknown") for entry in entries))
    if len(versions) > 1:
        found.append(f"Not all was run with the same versions: {'; '.join(versions)}.")
    if len(precisions := {entry.get("scored_in", "an unknown precision") for entry in entries}) > 1:
        found.append(
            f"Not all was scored in the same precision ({', '.join(sorted(precisions))}), so that small differences "
            "may be of it alone."
        )
    return found


def slug(text: str) -> str:
    """A name as part of a file's: "DualOptim+" → "dualoptim-plus"."""
    return "-".join(text.lower().replace("+", " plus").split())


# The folders of runs that share one: below it, each has its own. A run by itself has none.


def of_method(method: str, seed: int) -> str:
    """The folder name of one of several methods and seeds."""
    return f"{slug(method)}-seed{seed}"


def of_part(number: int) -> str:
    """The folder name of one of several parts, in the folder of its method."""
    return f"part{number}"


def of_grid(method: str, seed: int, config: Mapping[str, Any]) -> str:
    """The folder name of one of many runs that may differ in any setting: method, hash, seed."""
    plan = {key: value for key, value in config.items() if key not in ("out", "seed")}
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:12]
    return f"{slug(method)}-{digest}-seed{seed}"


def of_trial(method: str, number: int, seed: int) -> str:
    """The folder name of one of a search's trials, which are counted from 1 for each method."""
    return f"{slug(method)}-trial{number:03}-seed{seed}"


def own_folders(folder: Path, results: Mapping[str, Any]) -> list[Path]:
    """The own folder of each run of a folder, in the order of its results.

    Args:
        folder: the one that holds the results, which is that of a run by itself.
        results: what its results.json holds.
    """
    found, methods = [], Counter[str]()
    for entry in results["runs"]:
        method, seed = entry["method"], entry["seed"]
        methods[method] += 1
        if "chosen" in results:
            names = [of_trial(method, methods[method], seed)]
        elif "part" in entry:
            names = [f"{of_method(method, seed)}/{of_part(entry['part'])}"]
        else:
            names = [of_method(method, seed), of_grid(method, seed, entry["config"])]
        found.append(next((folder / name for name in names if (folder / name).is_dir()), folder))
    return found


def bytes_text(size: float) -> str:
    """Bytes for people: "1.5 GiB", "540 MiB"."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


SAMPLES = 4  # answers of each set shown before and after


def samples(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few replies of each set before and after, evenly spaced, so that none is hand-picked.

    An attack that failed has no set after.
    """
    shown = []
    if not after:  # the model could not be asked
        after = [{**record, "reply": ""} for record in before if "reply" in record]
    for name in dict.fromkeys(record["set"] for record in after if "reply" in record):
        of_set = ([record for record in records if record["set"] == name] for records in (before, after))
        pairs = list(zip(*of_set, strict=True))
        for b, a in pairs[:: max(1, len(pairs) // SAMPLES)][:SAMPLES]:
            kept = {key: b[key] for key in ("set", "question", "answer")}
            shown.append({**kept, "before": b["reply"], "after": a["reply"]})
    return shown


def write_records(
    path: Path,
    before: Sequence[dict[str, Any]],
    after: Sequence[dict[str, Any]],
    retrained: Sequence[dict[str, Any]] | None,
    *,
    private: bool,
) -> None:
    """Every sample's scores before and after, and a retrained model's, as JSON lines; if private, without any text."""
    lines = [
        json.dumps(_finite({"when": when, **(hashed(record) if private else record)}), ensure_ascii=False)
        for when, records in (("before", before), ("after", after), ("retrained", retrained or ()))
        for record in records
    ]
    written(path, "\n".join(lines) + "\n")


# Keys of a record whose texts are names, labels or reasons of this package or of a benchmark, and not of a row. Numbers
# are made by them.
NAMES = ("set", "source", "task", "metric", "entailment", "idk_entailment", "missing")


def hashed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with hashes in place of texts; a task computes the same numbers from it."""

    def plain(key: str, value: Any) -> Any:
        if key in NAMES:
            return value
        if isinstance(value, str):
            return hashlib.sha256(value.encode()).hexdigest()
        if isinstance(value, (list, tuple)):
            return [plain("", each) for each in value]
        if isinstance(value, Mapping):
            return {name: plain("", each) for name, each in value.items()}
        return value

    return {key: plain(key, value) for key, value in record.items()}


def texts_of(task: Any) -> list[str]:
    """The texts of its rows that a task's sentences may quote, without rows that the package includes; longest first.

    Of a task of this package, whose sentences know what they quote (`dualoptim.rows.quoting`), they are the long
    ones, in case a sentence does not: a number or a word of theirs that is also an answer stays.
    """
    from .data import Row
    from .fast import ByProbability

    kind = type(task.task if isinstance(task, ByProbability) else task)
    shortest = LONG if kind.__module__.startswith(f"{__package__}.") else 1
    ours = {path.name for path in resources.files("dualoptim").joinpath("assets").iterdir()}
    found: set[str] = set()

    def gather(value: Any) -> None:
        if isinstance(value, Row):
            if value.where not in ours:
                gather([[message["content"] for message in value.prompt], value.answer, value.fields, value.only])
        elif isinstance(value, str):
            found.add(value.strip())
        elif isinstance(value, Mapping):
            gather(list(value.values()))
        elif isinstance(value, (list, tuple, set)):
            for each in value:
                gather(each)

    theirs = ("notes", "refusals", "arguments")  # these are not rows
    gather([each for name, each in task.contents().items() if name not in theirs and not isinstance(each, str)])
    return sorted((text for text in found if len(text) >= shortest), key=len, reverse=True)


LONG = 12  # signs of a text that no sentence of this package has by accident
# What results have a task's sentences under, which may quote a row. All else is numbers and this package's own words:
# names of metrics, why a run ended, and settings as they stand in config.resolved.yaml.
SENTENCES = ("notes", "verdict", "not_computed", "tuned_on")


def without(secrets: Sequence[str] | None, results: dict[str, Any]) -> dict[str, Any]:
    """Results without samples, and without texts of rows in their sentences.

    It is done once, before they are written: what is read again no longer tells its quotes from other words.

    Args:
        secrets: `texts_of` a private run's task; None for a run that is not private, whose results stay as they are.
        results: of results.json, or of one run in a plan.
    """
    if secrets is None:
        return results

    def plain(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: [] if key == "samples" else redacted(secrets, each) if key in SENTENCES else each
            for key, each in values.items()
        }

    said = plain(results)
    if "runs" in said:
        said["runs"] = [plain(entry) for entry in said["runs"]]
    if "run" in said:
        said["run"] = plain(said["run"])
    return said


def redacted(secrets: Sequence[str] | None, value: Any) -> Any:
    """Sentences, in lists and mappings, with [private] in place of what they quote.

    Args:
        secrets: looked for, as whole words, in sentences that do not know what they quote; None where all may be told.

    >>> redacted(["art", "3"], ["art is at the start", Quoting.said(lambda shown: f"3 of {shown(Quoting('Bo'))}")])
    ['[private] is at the start', '3 of [private]']
    """
    if secrets is None:
        return value
    if isinstance(value, Quoting):
        return value.private
    if isinstance(value, str):
        for secret in secrets:
            value = replaced(value, secret, PRIVATE)
        return value
    if isinstance(value, Mapping):
        return {key: redacted(secrets, each) for key, each in value.items()}
    return [redacted(secrets, each) for each in value] if isinstance(value, (list, tuple)) else value


def write_rows(folder: Path, objectives: Mapping[str, Sequence[Row]]) -> None:
    """Each objective's rows as JSON lines in a file of its name, in the forms that `--forget` and `--retain` take."""
    from .data import is_text

    def line(row: Row) -> dict[str, Any]:
        fields = {key: value for key, value in row.fields.items() if value is not None}
        if is_text(row.prompt):
            chunk = {"chunk": list(row.chunk)} if row.chunk else {}
            return {"text": row.question + row.answer, **chunk, **fields}
        if [message["role"] for message in row.prompt] == ["user"]:
            return {"question": row.question, "answer": row.answer, **fields}
        return {"messages": [*row.prompt, {"role": "assistant", "content": row.answer}], **fields}

    for name, rows in objectives.items():
        lines = [line(row) for row in rows]
        written(folder / f"{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_records(path: str | Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The settings of a run, its task at least, and its records: when they were taken → records.

    Args:
        path: the run's own folder, its records.jsonl with the results beside it or one folder above, or a file of
            `dualoptim evaluate --scores`.
    """
    from .data import read_records as read_json_lines  # imports torch, which a report does not need

    path = Path(path)
    if path.is_dir():
        path = _records_in(path)
    if path.exists() and whole(path).startswith((b"{\n", b"{\r\n")):  # records.jsonl has an object a line
        scores = parse_json(read_text(path), str(path))
        try:
            found = {w: scores[w]["records"] for w in ("before", "after", "retrained") if scores.get(w)}
            return {"task": scores["task"]}, found
        except (KeyError, TypeError):
            raise UserError(f"{path}: is not a file of `dualoptim evaluate --scores`") from None
    records: dict[str, list[dict[str, Any]]] = {}
    for record, where in read_json_lines(path):
        if record.get("when") not in ("before", "after", "retrained") or not isinstance(record.get("set"), str):
            raise UserError(f"{where}: is not a record of a run, which has 'when' and 'set'")
        records.setdefault(record.pop("when"), []).append(record)
    if "after" not in records:
        raise UserError(f"{path}: has no records of a model after unlearning")
    beside = next((f for f in (path.parent, path.parent.parent) if (f / RESULTS).is_file()), path.parent)
    results = read_results(beside)
    pairs = zip(results["runs"], own_folders(beside, results), strict=True)
    entry = next((entry for entry, own in pairs if own == path.parent), results["runs"][0])
    return entry["config"], records


def _records_in(folder: Path) -> Path:
    """The file of records of a run's own folder."""
    if (path := folder / RECORDS).exists():
        return path
    own = [str(folder / name) for name in sorted(folders_of(folder)) if (folder / name / RECORDS).is_file()]
    if not own:
        raise UserError(f"{path}: there is no such file; give the folder of a finished run")
    shown = ", ".join([*own[:6], *(["…"] if len(own) > 6 else [])])
    raise UserError(f"{folder}: is the folder of several runs; give the own folder of one, of {shown}")


def write_settings(
    folder: Path, configs: Sequence[RunConfig], rows: Iterable[str], folders: Iterable[str] = ()
) -> None:
    """Write env.json, what a run may depend on, and config.resolved.yaml, the settings; for several runs their folders.

    Args:
        rows: objectives whose rows are written as well.
        folders: those that are made in it for some of the runs, added to those that were.
    """
    resolved = [config.as_dict() for config in configs]
    if made := {*folders_of(folder), *folders}:
        write_json(folder / FOLDERS, sorted(made))
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    own_rows = [f"{name}.jsonl" for name in rows]
    write_json(folder / ENVIRONMENT, {"command": command, **environment(), "rows": own_rows})
    write_yaml(folder / SETTINGS, resolved[0] if len(resolved) == 1 else {"runs": resolved})


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write values as YAML, in their order."""
    written(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def write_json(path: Path, values: Any) -> None:
    """Write values as strict JSON, completely or not at all; null for what is not finite."""
    written(path, json.dumps(_finite(values), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def read_results(path: str | Path) -> dict[str, Any]:
    """Read a results.json, or the one of a run's folder.

    Raises:
        UserError: there is none, or it is not of the schema above.
    """
    path = Path(path)
    path = path / RESULTS if path.is_dir() else path
    results = read_json(path)
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise UserError(f"{path}: is not a results file of schema {SCHEMA}; make it again with this version")
    if found := misfit(results):
        raise UserError(f"{path}: is damaged ({found}); make it again")
    return results


def read_entry(path: Path, identity: Mapping[str, str]) -> dict[str, Any]:
    """Read the run.json of a run of many.

    Args:
        path: OUT/name/run.json.
        identity: as `dualoptim.resolved.Resolved` has it.

    Raises:
        UserError: it is damaged, or of a run with other rows, another model or the like.
    """
    try:
        said = read_json(path)
        found = misfit_of_one(said)
    except UserError as error:
        found = str(error).removeprefix(f"{path}: ")
    if found:
        raise UserError(f"{path}: is damaged ({found}); remove the folder {path.parent} and go on with --resume")
    check_same(said["run"], identity, path.parent.parent)
    return dict(said)


def read_json(path: Path) -> Any:
    """Read a JSON file of a run; a file that is missing, or is not JSON, raises `UserError`."""
    try:
        return parse_json(path.read_text(encoding="utf-8"), str(path))
    except OSError:
        raise UserError(f"{path}: there is no such file; give the folder of a finished run") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}), and so no file of a run's") from None


def environment() -> dict[str, Any]:
    """What a result may depend on beside its settings: versions, processor, memory, devices."""
    import torch

    versions: dict[str, str | None] = {}
    for name in ("dualoptim", "torch", "transformers", "accelerate", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_bytes": total_memory(),
        "ranks": ranks.size(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def total_memory() -> int:
    """Bytes of memory of this machine."""
    import psutil

    return psutil.virtual_memory().total
