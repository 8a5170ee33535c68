"""The evidence of a finished run on this machine: which run, the files that it read and wrote, and their hashes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import report, runs
from ..errors import UserError, unknown
from ..folder import ADAPTER, CARD, ENTRY, ENVIRONMENT, MODEL, PAGE, SETTINGS, saved
from ..reading import HUB, read_records
from ..schema import NAMES
from .shown import WITHHELD, setting

# A run's files beside its results and its model.
LEFT = (runs.RECORDS, ENTRY, "forget.jsonl", "retain.jsonl", "alternates.jsonl")
ALONE = (PAGE, SETTINGS, ENVIRONMENT)  # those that change when other runs come into the folder
# What results.json says of several runs together, which changes when others come; after a search, its notes do, too.
OF_SEVERAL = ("points", "planned", "plan", "grid", "chosen")
INPUTS = ("forget", "retain", "refusals", "chat_template", "task")  # settings that name files to read


class Run(NamedTuple):
    """One run: the folder of its results, its own folder, the results, and its entry in them."""

    folder: Path
    own: Path
    results: dict[str, Any]
    entry: dict[str, Any]

    @property
    def label(self) -> str:
        """Its name among the runs of its folder."""
        return report.label(self.entry, self.results)

    def file(self, name: str) -> Path:
        """A file that the run wrote, in its own folder or in the one that it shares with others."""
        return self.own / name if (self.own / name).is_file() else self.folder / name

    @property
    def is_alone(self) -> bool:
        """Whether its folder is of no other run."""
        return len(self.results["runs"]) == 1 and self.results.get("planned", 1) == 1

    def is_its_own(self, name: str) -> bool:
        """Whether a file of ALONE is of this run alone, or would be if it were there."""
        return self.is_alone or (self.own != self.folder and (self.own / name).is_file())

    def is_older_than(self, paths: Sequence[Path]) -> bool:
        """Whether one of some files was modified after the run's results were written."""
        written = (self.folder / runs.RESULTS).stat().st_mtime
        return any(path.stat().st_mtime > written + 1 for path in paths)


def find(path: str | Path) -> list[Run]:
    """The runs of a folder; for the own folder of one of several runs, only that one.

    Raises:
        UserError: no run there, or results that cannot be read.
    """
    folder = Path(path).resolve()
    folder = folder.parent if folder.name == runs.RESULTS else folder
    place = next((f for f in (folder, *folder.parents[:2]) if (f / runs.RESULTS).is_file()), None)
    if place is None:
        raise UserError(f"{path}: holds no {runs.RESULTS}; give the folder of a finished run")
    results = runs.read_results(place)
    try:
        pairs = zip(results["runs"], runs.own_folders(place, results), strict=True)
        found = [Run(place, own, results, entry) for entry, own in pairs]
    except (KeyError, TypeError) as error:
        raise UserError(f"{place / runs.RESULTS}: is damaged, an entry lacks {error}; take it from a backup") from None
    if place != folder:
        found = [run for run in found if run.own == folder]
    if not found:
        raise UserError(f"{path}: is the folder of no finished run; give one that holds {runs.RESULTS}")
    return found


def choose(found: Sequence[Run], number: int | None = None, method: str | None = None, seed: int | None = None) -> Run:
    """One of several runs: by its number from 1, by its method, by its seed, or by all of them.

    Raises:
        UserError: none is left, or several are.
    """
    numbered = dict(enumerate(found, 1))
    if number is not None and number not in numbered:
        raise UserError(f"run {number}: the folder holds {_listed(numbered)}; give one of these numbers")
    methods = list(dict.fromkeys(run.entry["method"] for run in found))
    if method is not None and method not in methods:
        raise unknown("method", method, methods)
    left = {
        i: run
        for i, run in numbered.items()
        if number in (None, i) and method in (None, run.entry["method"]) and seed in (None, run.entry["seed"])
    }
    if not left:
        raise UserError(f"no run is of all that was asked for; the folder holds {_listed(numbered)}")
    if len(left) > 1:
        raise UserError(f"there are {len(left)} runs to choose from, {_listed(left)}; give --run N")
    return next(iter(left.values()))


def _listed(numbered: Mapping[int, Run]) -> str:
    return ", ".join(f"{i} ({run.label})" for i, run in numbered.items())


def hashed(path: Path) -> dict[str, Any]:
    """A file's SHA-256 and its size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def entry_hash(entry: Mapping[str, Any]) -> str:
    """The SHA-256 of the content of a run's entry in results.json: entries of other runs may be added to the file.

    The entry's "part" is left out, since the part's own folder does not have it.
    """
    entry = {key: value for key, value in entry.items() if key != "part"}
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def about_hashes(run: Run) -> dict[str, str]:
    """The SHA-256 of each thing that the results say beside a run's entry; for one of several, of what stays the same.

    A part's results are those in its own folder. Notes on what went wrong follow from the entries, and are left out.
    """
    results, is_alone = run.results, run.is_alone
    if of_part := _of_part(run):
        results, is_alone = of_part, True
    elif "part" in run.entry:
        return {}
    # Also what is not there, so that nothing can be added.
    said = {name: results.get(name) for name in sorted({*NAMES, *results} - {"runs"})}
    said["notes"] = _without_troubles(results)
    changes = () if is_alone else (*OF_SEVERAL, *(["notes"] if "chosen" in results else []))
    return {name: entry_hash({name: value}) for name, value in said.items() if name not in changes}


def notes(run: Run) -> list[str]:
    """What the results note on a run, or on all runs of its folder, and none of what they note on another run."""
    if (run.own / ENTRY).is_file() and "chosen" not in run.results:  # other runs of a grid may have other tasks
        noted = runs.read_entry(run.own / ENTRY, {})["notes"]
    else:
        noted = _without_troubles(_of_part(run) or run.results)
    return [*noted, *runs.troubles([run.entry])]


def _of_part(run: Run) -> dict[str, Any] | None:
    """The results in a part's own folder; None for other runs."""
    return runs.read_results(run.own) if run.folder != run.own and (run.own / runs.RESULTS).is_file() else None


def _without_troubles(results: Mapping[str, Any]) -> list[str]:
    """The notes, without those that follow from the entries; results made before name no settings in these."""
    troubles = {*runs.troubles(results["runs"]), *runs.troubles(results["runs"], results.get("grid", ()))}
    return [note for note in results.get("notes", []) if note not in troubles]


def environment(run: Run, remarks: list[str]) -> dict[str, Any] | None:
    """What the run ran in, without the command, which may name what is to be forgotten; None where it is not known.

    The env.json of several runs is of the latest process, which need not have run this one.
    """
    if isinstance(said := run.entry.get("environment"), dict):
        return said
    path = run.file(ENVIRONMENT)
    if not run.is_its_own(ENVIRONMENT) or not path.is_file():
        why = "is not there" if run.is_its_own(ENVIRONMENT) else "is of several runs"
        remarks.append(f"The environment is not known: the run's entry has none, and its {ENVIRONMENT} {why}.")
        return None
    said = runs.read_json(path)
    return {key: value for key, value in said.items() if key != "command"} if isinstance(said, dict) else None


def files(folder: Path) -> dict[str, Path]:
    """The files of a folder and its subfolders, except hidden ones: name → path. Links are followed, as in loading.

    Raises:
        UserError: a link leads to a folder that it lies in, so that there is no end of files.
    """
    found = _inside(folder, frozenset(folder.resolve().parents)) if folder.is_dir() else ()
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def _inside(folder: Path, outer: frozenset[Path]) -> Iterator[Path]:
    place = folder.resolve()
    if place in outer:
        raise UserError(f"{folder}: links to a folder that it lies in; remove the link")
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _inside(path, outer | {place})
        elif path.is_file():
            yield path


def of_model(folder: Path) -> dict[str, Path]:
    """The files of a model, except its card, which a publisher may edit: name → path."""
    return {name: path for name, path in files(folder).items() if name != CARD}


def of_start(folder: Path, ours: Sequence[Path]) -> dict[str, Path]:
    """The files of a model that a run started from, as `of_model`, without what the run wrote below it: name → path.

    Args:
        ours: the run's folder, and other files that are not the model's.
    """
    place = folder.resolve()
    below = [path.resolve() for path in ours if place in path.resolve().parents]
    return {
        name: path
        for name, path in of_model(folder).items()
        if not any(other in (place / name, *(place / name).parents) for other in below)
    }


def inputs(config: Mapping[str, Any], private: bool) -> Iterator[tuple[str, str, Path]]:
    """The files that a run's settings name: role, the setting's value, path. For a private run, roles name no file."""
    for role in INPUTS:
        value = config.get(role)
        if not isinstance(value, str) or (role == "task" and not value.endswith(".py")):
            continue
        path = Path(value)
        if role == "chat_template" and not path.is_file() and re.fullmatch(r"\w+", value):
            continue  # the name of a template included in the package
        yield role, value, path
    if isinstance(config.get("data_dir"), str) and Path(config["data_dir"]).is_dir():
        for i, (name, path) in enumerate(files(Path(config["data_dir"])).items(), 1):
            yield f"data_dir/{i if private else name}", name, path


def data(run: Run, private: bool, remarks: list[str]) -> dict[str, Any]:
    """The files that a run read, by their role; what is missing or doubtful is added to the remarks."""
    config, taken = run.entry["config"], run.entry.get("files", {})
    said: dict[str, Any] = {}
    for role, value, path in inputs(config, private):
        of_folder = role.startswith("data_dir/")
        item: dict[str, Any] = {"name": WITHHELD if private else value if of_folder else setting(role, value, False)}
        was = taken.get(role) or taken.get(value)
        if path.is_file():
            now = hashed(path)
            if was is None and run.is_older_than([path]):
                remarks.append(
                    f"{role}: the file was modified after the run; its hash is that of the file as it is now."
                )
            if was is not None and was != now["sha256"]:
                remarks.append(f"{role}: the file is no longer the one that the run read; the hash is the run's own.")
                item["sha256"] = was
            else:
                item |= now
                if role in ("forget", "retain") and (rows := _rows(path)) is not None:
                    item["rows"] = rows
        elif was is not None:
            remarks.append(f"{role}: the file is no longer there; the hash is the run's own.")
            item["sha256"] = was
        else:
            on_hub = HUB.fullmatch(value) and not path.suffix
            item["not_there"] = "it comes from the hub" if on_hub else "the file is not there"
            remarks.append(f"{role}: has no hash, since {item['not_there']}.")
        said[role] = item
    if any(role.startswith("data_dir/") for role in said):
        remarks.append("data_dir: all files of the folder are listed, whether the task read them or not.")
    elif config.get("data_dir") is not None:
        remarks.append("data_dir: the folder is not there or empty, so what was read of it has no hashes.")
    elif config.get("forget") is None:
        remarks.append("The task's rows come with the package or from the hub, and have no hashes here.")
    return said


def _rows(path: Path) -> int | None:
    try:
        return len(read_records(path))
    except UserError:  # a file that cannot be read as rows still has a hash
        return None


def model_place(model: str) -> tuple[Path | None, str | None]:
    """A model's folder on this machine, if it has one, and its commit on the hub, if it is from there."""
    if model == "smollm2":
        from ..models import source

        model = source(model)
    if Path(model).is_dir():
        return Path(model), None
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(model, "config.json")
    except ValueError:  # not a name of the hub's
        return None, None
    return (Path(config).parent, Path(config).parent.name) if isinstance(config, str) else (None, None)


def model_before(run: Run, given: str | None, remarks: list[str]) -> dict[str, Any]:
    """The model that a run started from: its name, and its files where they can be found.

    Args:
        given: its folder or hub id, if the run's settings do not lead to it.
        remarks: what is missing or doubtful is added to these.
    """
    config = run.entry["config"]
    name = given or config["model"]
    said: dict[str, Any] = {"name": setting("model", name, False)}
    taught = config.get("memorise") and given is None
    place, commit = (None, None) if taught else model_place(name)
    if given and place is None:
        raise UserError(f"before {given}: no such folder, nor is it in the hub's cache; give the model's folder")
    if commit:
        said["commit"] = commit
    if place is not None:
        found = of_start(place, [run.folder])
        said["files"] = {file: hashed(path) for file, path in found.items()}
        if "adapter_config.json" in found:
            remarks.append(
                "The model before is an adapter; its base model is part of the fingerprint start_model, and has no "
                "hashes here."
            )
        if run.is_older_than(list(found.values())):
            remarks.append("The model before: some of its files were modified after the run.")
        return said
    said["not_there"] = (
        "it was first taught the task's rows; give the taught one by --before"
        if taught
        else "there is no such folder, and nothing of that name in the hub's cache"
    )
    remarks.append(f"The model before has no hashes: {said['not_there']}.")
    return said


def left(run: Run) -> Path:
    """The folder of the model that a run saved: the whole model, else the adapter by itself."""
    return next((run.own / name for name in (MODEL, ADAPTER) if (run.own / name).is_dir()), run.own / MODEL)


def adapter_beside(run: Run) -> dict[str, Path]:
    """The files of the adapter by itself of a run that also saved the model with it merged in: name → path."""
    beside = run.own / ADAPTER
    return of_model(beside) if left(run) != beside and beside.is_dir() else {}


def model_after(run: Run, remarks: list[str]) -> dict[str, Any]:
    """The files of the model that a run saved."""
    folder = left(run)
    if folder.is_dir():
        found = of_model(folder)
        if folder.name == ADAPTER:
            remarks.append("The model after is an adapter; what it does depends on its base model, too.")
        now, was = {name: hashed(path) for name, path in found.items()}, saved(run.own).get(folder.name)
        if was is not None and was != {name: file["sha256"] for name, file in now.items()}:
            remarks.append("The model after: some of its files are not those that the run saved.")
        if was is None and run.is_older_than(list(found.values())):
            remarks.append("The model after: some of its files were modified after the results were written.")
        return {"files": now}
    was_saved = run.entry["config"].get("save_model", True)
    why = "its folder is not there" if was_saved else "the run did not save it (save_model false)"
    remarks.append(f"The model after has no hashes, so the record is tied to no model: {why}.")
    return {"not_there": why}
