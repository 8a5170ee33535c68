"""A finished run → one signed, machine-readable record of what was measured; and the verification of such a record.

The record is an in-toto statement about the files of the model after unlearning, in a signed envelope (`signing`).
docs/certificate.md has its fields one by one. It holds numbers, hashes and counts, and no text of a row or a reply.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__, runs
from ..errors import UserError
from ..folder import ADAPTER, CARD, check_new
from . import evidence, measured, shown, signing
from .evidence import Run

SCHEMA = 1
STATEMENT, PREDICATE = "https://in-toto.io/Statement/v1", "urn:dualoptim:measured:1"
RECORD = "record.json"
SAYS = (
    "This record states what was measured, by the means and on the samples that it names. It does not state that "
    "anything is gone from the model: what was not measured is listed, and other means may find more."
)
OK, DIFFERS, NOT_THERE = "ok", "differs", "not there"


class Check(NamedTuple):
    """What was checked, the outcome ("ok", "differs" or "not there"), and details."""

    item: str
    state: str
    detail: str = ""


# Making a record


def certify(
    folder: str | Path,
    key: str | Path,
    *,
    out: str | Path | None = None,
    number: int | None = None,
    method: str | None = None,
    seed: int | None = None,
    before: str | None = None,
    passphrase_file: str | Path | None = None,
) -> tuple[dict[str, Any], Path]:
    """Write the signed record of one run; returns what it says, and its file.

    Args:
        folder: of a finished run, or of several.
        key: the user's Ed25519 private key, as `signing.load_private_key` takes it.
        out: the record's file; by default `RECORD` in the run's own folder.
        number: which of several runs, counted from 1 as the results have them.
        method: which of several, by its method.
        seed: which of several, by its seed.
        before: the model that the run started from, if its settings do not lead to it.
        passphrase_file: see `signing.load_private_key`.

    Raises:
        UserError: no such run, several to choose from, a key that does not sign, a file that would be overwritten or
            cannot be written, or numbers that do not follow from the run's samples.
    """
    signer = signing.load_private_key(key, passphrase_file)
    run = evidence.choose(evidence.find(folder), number, method, seed)
    path = Path(out) if out is not None else run.own / RECORD
    if path.exists():
        raise UserError(f"out {path}: is there already, and a signed record is not overwritten; give another --out")
    check_new("out", path, "another --out")
    public = signer.public_key()
    said = {
        "schema": SCHEMA,
        "made": _time(datetime.datetime.now(datetime.timezone.utc)),
        "dualoptim": __version__,
        "signer": {
            "algorithm": signing.ALGORITHM,
            "public_key": base64.b64encode(signing.public_bytes(public)).decode(),
            "fingerprint": signing.fingerprint(public),
        },
        **_described(run, before),
    }
    files = said["model_after"].get("files", {})
    subject = [{"name": f"model/{name}", "digest": {"sha256": file["sha256"]}} for name, file in files.items()]
    statement = {
        "_type": STATEMENT,
        # A statement needs a subject: without a model, it is the run's results.
        "subject": subject or [{"name": "results", "digest": {"sha256": said["run"]["results_sha256"]}}],
        "predicateType": PREDICATE,
        "predicate": said,
    }
    try:
        runs.write_json(path, signing.sealed(signing.canonical(_finite(statement)), signer))
    except OSError as error:
        raise UserError(f"out {path}: cannot be written ({error.strerror}); give another --out") from None
    return said, path


def _described(run: Run, before: str | None) -> dict[str, Any]:
    """Everything that a record says about a run; what is missing or doubtful is in its remarks."""
    results, entry = run.results, run.entry
    config = entry["config"]
    private = any(part.get("private") for part in (results, entry, config))
    remarks: list[str] = []
    recipe = _finite(shown.recipe(config, private))
    wrote = (*evidence.LEFT, *filter(run.is_its_own, evidence.ALONE))
    files = {name: evidence.hashed(run.file(name)) for name in wrote if run.file(name).is_file()}
    files |= {f"{ADAPTER}/{name}": evidence.hashed(path) for name, path in evidence.adapter_beside(run).items()}
    environment = evidence.environment(run, remarks)
    data = evidence.data(run, private, remarks)
    model_before, model_after = evidence.model_before(run, before, remarks), evidence.model_after(run, remarks)
    numbers, samples = measured.numbers(run, remarks)
    for number in numbers.values():
        number["why"] = number["why"] and shown.sentence(number["why"], config, private)
    attacks, not_run = measured.attacks(numbers)
    if entry.get("stopped"):
        remarks.append(shown.sentence(entry["stopped"], config, private))
    remarks += shown.notes(evidence.notes(run), config, private)
    fingerprints = {key: value for key, value in entry.get("fingerprints", {}).items() if re.fullmatch(r"\w+", key)}
    return {
        "run": {
            "task": shown.setting("task", results["task"], private),
            "method": entry["method"],
            "seed": entry["seed"],
            **({"part": entry["part"]} if "part" in entry else {}),
            "private": private,
            "recipe": recipe,
            "recipe_sha256": hashlib.sha256(signing.canonical(recipe)).hexdigest(),
            "results_sha256": evidence.entry_hash(entry),
            "about_sha256": evidence.about_hashes(run),
            "results_modified": _time(
                datetime.datetime.fromtimestamp((run.folder / runs.RESULTS).stat().st_mtime, datetime.timezone.utc)
            ),
            "fingerprints": fingerprints,
        },
        "model_before": model_before,
        "model_after": model_after,
        "data": data,
        "files": files,
        "environment": environment,
        "measured": numbers,
        "samples": samples,
        "intervals": {"level": measured.LEVEL, **measured.METHODS},
        "attacks": attacks,
        "not_measured": {
            "numbers": {name: said["why"] for name, said in numbers.items() if said["why"]},
            "attacks": not_run,
        },
        "remarks": remarks,
        "statement": SAYS,
    }


def _time(when: datetime.datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def _finite(value: Any) -> Any:
    """The value, with numbers that are not finite as text, since JSON does not have them."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# Checking a record


def read(path: str | Path) -> dict[str, Any]:
    """What a record says; its signature is not checked.

    Raises:
        UserError: no record, or one of a schema that this version does not read.
    """
    return _said(signing.opened(path).payload, path)


def _said(payload: bytes, path: str | Path) -> dict[str, Any]:
    statement = signing.parsed(payload, f"{path}, what is signed")
    said = statement.get("predicate") if isinstance(statement, dict) else None
    if not isinstance(said, dict) or (statement.get("_type"), statement.get("predicateType")) != (STATEMENT, PREDICATE):
        raise UserError(f"{path}: what is signed is no record of dualoptim certify; give one that is")
    if said.get("schema") != SCHEMA:
        raise UserError(f"{path}: is a record of schema {said.get('schema')}, and this version reads schema {SCHEMA}")
    return said


def verify(
    path: str | Path,
    *,
    public_key: str | Path | None = None,
    run: str | Path | None = None,
    model: str | Path | None = None,
    before: str | None = None,
    forget: str | Path | None = None,
    retain: str | Path | None = None,
) -> list[Check]:
    """Check a record: first its signature, and if that is good every file that is given or found.

    Args:
        path: the record.
        public_key: the key of whoever should have signed it.
        run: the run's folder; by default the one that holds the record.
        model: folder of the model after unlearning; by default the one that the run left.
        before: the model before, by folder or hub id; by default the one that the run's settings name.
        forget: file of the rows to forget; by default the one that the run's settings name.
        retain: likewise, to keep.

    Raises:
        UserError: no record, or one that this version cannot read; or a given file or folder that is missing.
    """
    envelope = signing.opened(path)
    checks, good = _signature(envelope, path, public_key)
    if not good:
        return checks
    said = _said(envelope.payload, path)  # exactly the bytes whose signature is good
    try:
        found, of_run = _check_run(said, Path(path).resolve().parent if run is None else Path(run), run is not None)
        config = found.entry["config"] if found else {}
        return [
            *checks,
            *of_run,
            *_check_after(said["model_after"], Path(model) if model else None, found and evidence.left(found)),
            *_check_before(said["model_before"], before, config, [Path(path), *([found.folder] if found else [])]),
            *_check_data(said, {"forget": forget, "retain": retain}, config),
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is signed, but is not as docs/certificate.md has it ({error!r})") from None


def _signature(envelope: signing.Envelope, path: str | Path, public_key: str | Path | None) -> tuple[list[Check], bool]:
    given = signing.load_public_key(public_key) if public_key is not None else None
    changed = Check("signature", DIFFERS, "is not that of this text by the key it names: the record was changed")
    try:
        signer = signing.parsed(envelope.payload, str(path))["predicate"]["signer"]
        algorithm, der = signer["algorithm"], signing.decoded(signer["public_key"], str(path))
    except (KeyError, TypeError, UserError):
        return [changed], False
    if algorithm != signing.ALGORITHM:
        raise UserError(f"{path}: is signed by {algorithm!r}, and this version checks {signing.ALGORITHM}")
    own = signing.key_of(der)
    if own is None or not signing.is_signed_by(envelope, own) or signer.get("fingerprint") != signing.fingerprint(own):
        return [changed], False
    mark = signing.fingerprint(own)
    by = f"{signing.ALGORITHM}, by the key {mark}"
    if given is None:
        return [Check("signature", OK, f"{by}, which this check does not tie to anybody")], True
    other = signing.fingerprint(given)
    key = Check("key", OK, f"is that of {public_key}")
    if other != mark:
        key = Check("key", DIFFERS, f"signed by {mark}, and that of {public_key} is {other}")
    return [Check("signature", OK, by), key], True


def _check_run(said: Mapping[str, Any], folder: Path, was_given: bool) -> tuple[Run | None, list[Check]]:
    """The run that a record is about, if its folder holds it, and the checks of the run's files."""
    about = said["run"]
    others: list[Run] = []
    problem = ""
    try:
        others = evidence.find(folder)
    except UserError as error:
        if not (folder / runs.RESULTS).is_file():
            if was_given:
                raise
        else:
            problem = str(error)
    found = next((run for run in others if evidence.entry_hash(run.entry) == about["results_sha256"]), None)
    same = [run for run in others if all(run.entry[key] == about[key] for key in ("method", "seed"))]
    alike = next((run for run in same if run.entry.get("part") in (None, about.get("part"))), None)
    name = f"{about['method']}, seed {about['seed']}" + (f", part {about['part']}" if "part" in about else "")
    item = f"run: {runs.RESULTS}"
    if found:
        check = Check(item, OK, name)
    elif alike or problem:
        check = Check(item, DIFFERS, problem or f"{alike and alike.folder} has other results of {name}")
    else:
        check = Check(item, DIFFERS if was_given else NOT_THERE, f"{folder} holds no run of {name}")
    run = found or alike
    place = run or Run(folder, folder, {}, {})
    shared = "is now of several runs, and was of this one alone"
    checks, about_now = [check], evidence.about_hashes(run) if run else {}
    for said_of, digest in about.get("about_sha256", {}).items() if run else ():
        if said_of not in about_now:
            checks.append(Check(f"{item}, {said_of}", NOT_THERE, shared))
        elif about_now[said_of] != digest:
            checks.append(Check(f"{item}, {said_of}", DIFFERS, "is not that of the record"))
    beside = {}
    for file, was in said["files"].items():
        if file.startswith(f"{ADAPTER}/"):
            beside[file.removeprefix(f"{ADAPTER}/")] = was
        elif file in evidence.ALONE and run is not None and not run.is_its_own(file):
            checks.append(Check(f"run: {file}", NOT_THERE, shared))
        else:
            checks.append(_compared(f"run: {file}", was, place.file(file)))
    adapter = place.own / ADAPTER
    # A record that has no "task" here is of a version that did not list the adapter.
    if beside or (run is not None and evidence.left(run) != adapter and "task" in about.get("about_sha256", {})):
        checks += _exactly(f"run: {ADAPTER}/", beside, adapter, evidence.of_model(adapter))
    return run, checks


def _compared(item: str, was: Mapping[str, Any], path: Path | None, lacking: str = NOT_THERE) -> Check:
    if "sha256" not in was:
        return Check(item, lacking, f"the record has no hash of it: {was['not_there']}")
    if path is None or not path.is_file():
        return Check(item, lacking, f"there is no {path}" if path else "was not given, and is not where it was")
    now = evidence.hashed(path)["sha256"]
    return Check(item, OK) if now == was["sha256"] else Check(item, DIFFERS, f"{path} has the SHA-256 {now}")


def _exactly(what: str, was: Mapping[str, Any], folder: Path, found: Mapping[str, Path]) -> list[Check]:
    """The files that a record names, one by one, and no others, which might be loaded in their place.

    Args:
        what: begins the name of each check.
        folder: the one that should hold them.
        found: the files that it holds, except those that may come and go: name → path.
    """
    if not folder.is_dir():
        return [_compared(what + name, file, folder / name) for name, file in was.items()]
    checks = [_compared(what + name, file, folder / name, DIFFERS) for name, file in was.items()]
    return checks + [Check(what + name, DIFFERS, "is not in the record") for name in found if name not in was]


def _check_after(was: Mapping[str, Any], given: Path | None, found: Path | None) -> list[Check]:
    what, folder = "model after", given or found
    if given is not None and not given.is_dir():
        raise UserError(f"model {given}: there is no such folder; give the one that holds the model's files")
    if "files" not in was:
        return [Check(what, DIFFERS if given else NOT_THERE, f"the record has no hashes of it: {was['not_there']}")]
    if folder is None or not folder.is_dir():
        return [Check(what, NOT_THERE, "was not given, and is not in the run's folder")]
    return _exactly(f"{what}: ", was["files"], folder, evidence.of_model(folder))


def _check_before(
    was: Mapping[str, Any], given: str | None, config: Mapping[str, Any], ours: Sequence[Path]
) -> list[Check]:
    what = "model before"
    if "files" not in was:
        return [Check(what, DIFFERS if given else NOT_THERE, f"the record has no hashes of it: {was['not_there']}")]
    name = given or (None if config.get("memorise") else config.get("model"))
    place = evidence.model_place(name)[0] if name else None
    if given and place is None:
        raise UserError(f"before {given}: no such folder, nor is it in the hub's cache; give the model's folder")
    if place is None:
        return [Check(what, NOT_THERE, "was not given, and is not where the run's settings say")]
    files = {name: file for name, file in was["files"].items() if name != CARD}  # which earlier records have
    return _exactly(f"{what}: ", files, place, evidence.of_start(place, ours))


def _check_data(
    said: Mapping[str, Any], given: Mapping[str, str | Path | None], config: Mapping[str, Any]
) -> list[Check]:
    was = said["data"]
    places = {role: path for role, _, path in evidence.inputs(config, said["run"]["private"])}
    for role, value in given.items():
        if value is not None and not Path(value).is_file():
            what = "is no file" if Path(value).exists() else "there is no such file"
            raise UserError(f"{role} {value}: {what}; give the one that the run read")
        if value is not None:
            places[role] = Path(value)
    checks = [
        _compared(f"{role}: {item['name']}", item, places.get(role), DIFFERS if given.get(role) else NOT_THERE)
        for role, item in was.items()
    ]
    others = [role for role, value in given.items() if value is not None and role not in was]
    return checks + [Check(role, DIFFERS, "the run read no such file") for role in others]
