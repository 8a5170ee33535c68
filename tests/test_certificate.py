"""Signed records: what they hold, that every change is found, and the mistakes that users make with keys and files."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

from dualoptim import cli, runs, schema
from dualoptim.certify import certificate, evidence, measured, shown, signing
from dualoptim.certify.certificate import DIFFERS, NOT_THERE, OK, Check, certify, verify
from dualoptim.config import SHOWN, RunConfig
from dualoptim.errors import UserError
from dualoptim.evaluation import metrics, probes
from dualoptim.evaluation.numbers import METRICS, Drawn, unlearning
from dualoptim.tasks.facts import Facts
from dualoptim.tasks.muse import Muse

from . import tiny

DOCS = Path(__file__).parents[1] / "docs" / "certificate.md"
NOBODY = serialization.NoEncryption()
FROM_HUB = "The task's rows come with the package or from the hub, and have no hashes here."
SECRET = "Zorbulax"  # in every text of rows and replies, and in names of files


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "RESAMPLES", 40)
    monkeypatch.delenv(signing.PASSPHRASE, raising=False)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_key(tmp_path_factory.mktemp("keys") / "key.pem")


def save_key(
    path: Path,
    key: Any = None,
    kind: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
    encryption: Any = NOBODY,
) -> Path:
    """A private key's file, and the public one's beside it, named .pub."""
    key = key or Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, encryption))
    path.chmod(0o600)
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, public))
    return path


def samples(right: float) -> list[dict[str, Any]]:
    """Records of the task facts, of which a share of the questions is answered."""
    made: list[dict[str, Any]] = []
    for name, share in (("forget", right), ("retain", 0.8), ("unseen", 0.7)):
        made += [
            {"set": name, "topic": SECRET, "question": f"{SECRET} {i}?", "answer": SECRET, "reply": f"{SECRET}!",
             "right": i < share * 10}
            for i in range(10)
        ]  # fmt: skip
    text = {"question": f"{SECRET}?", "answer": SECRET}
    made += [{"set": "forget_statements", **text, "nll": 0.1 * i + 1 - right} for i in range(5)]
    made.append({"set": "unknown", **text, "nll": 2.0})
    made += [{"set": "harmless", **text, "reply": SECRET, "refused": i == 0} for i in range(6)]
    return made + [{"set": "passages", **text, "nll": 3.0 + i / 10, "tokens": 20} for i in range(4)]


def write_run(own: Path, method: str = "DualOptim+", seed: int = 0, **config: Any) -> dict[str, Any]:
    """A run's own folder with a tiny model, and its entry for results.json."""
    (own / "model").mkdir(parents=True)
    (own / "model/config.json").write_text("{}")
    (own / "model/model.safetensors").write_bytes(f"{method} {seed}".encode())
    before, after = samples(1.0), samples(0.1)
    lines = [{"when": when, **r} for when, part in (("before", before), ("after", after)) for r in part]
    (own / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = own.parent / "start"
    start.mkdir(exist_ok=True)
    (start / "config.json").write_text("{}")
    (start / "model.safetensors").write_bytes(b"before")
    return {
        "method": method,
        "seed": seed,
        "config": RunConfig(model=str(start), task="facts", seed=seed, out=str(own)).replace(**config).as_dict(),
        "before": Facts.numbers(before).numbers,
        "after": Facts.numbers(after).numbers,
        "not_computed": {},
        "stopped": None,
        "curve": [],
        "seconds": 1.0,
        "optimizer_state_bytes": 8,
        "peak_memory_bytes": 8,
        "samples": [{"set": "forget", "question": SECRET, "answer": SECRET, "before": SECRET, "after": SECRET}],
    }


def write_results(folder: Path, *entries: dict[str, Any], **more: Any) -> None:
    results = {
        "schema": 1,
        "task": "facts",
        "model": "start",
        "followed": "facts answered",
        "metrics": {name: metric._asdict() for name, metric in Facts.metrics.items()},
        "counts": Facts.counts(samples(1.0)),
        "notes": [],
        "runs": entries,
    }
    (folder / "env.json").write_text(json.dumps({"command": f"forget {SECRET}", "versions": {"torch": "2"}}))
    (folder / "results.json").write_text(json.dumps(results | more))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of one finished run, with files of rows beside it."""
    for name in ("forget", "retain"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": f"{SECRET}?", "answer": SECRET}) + "\n")
    folder = tmp_path / "run"
    config = {name: str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")}
    write_results(folder, write_run(folder, **config))
    return folder


def rewrite(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change results.json in place."""
    results = json.loads((run / "results.json").read_text())
    change(results)
    (run / "results.json").write_text(json.dumps(results))


def bad(checks: list[Check]) -> list[str]:
    return [check.item for check in checks if check.state == DIFFERS]


# What a record holds


def test_a_record_holds_hashes_numbers_and_intervals_and_every_file_is_checked(run: Path, key: Path) -> None:
    said, path = certify(run, key)
    assert path == run / "record.json"
    assert certificate.read(path) == json.loads(json.dumps(said))
    digest = hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest()
    assert said["model_after"]["files"]["model.safetensors"]["sha256"] == digest
    statement = json.loads(base64.b64decode(json.loads(path.read_text())["payload"]))
    assert {"name": "model/model.safetensors", "digest": {"sha256": digest}} in statement["subject"]
    assert said["data"]["forget"]["rows"] == 1
    accuracy = said["measured"]["forget_accuracy"]
    assert (accuracy["n"], accuracy["before"]["value"], accuracy["after"]["value"]) == (10, 1.0, 0.1)
    assert accuracy["interval_by"] == "wilson"
    assert accuracy["after"]["interval"] == pytest.approx([0.0179, 0.4042], abs=1e-4)
    perplexity = said["measured"]["perplexity"]
    low, high = perplexity["after"]["interval"]
    assert low < perplexity["after"]["value"] < high
    assert (perplexity["n"], perplexity["interval_by"]) == (None, "bootstrap")
    assert said["measured"]["unknown_probability"]["after"]["interval"] is None, "one sample has no spread"
    assert said["samples"]["after"]["forget"] == 10
    assert said["attacks"]["rewording"]["numbers"] == {"forget_accuracy": {"before": 1.0, "after": 0.1}}
    assert {"relearning", "quantization", "paraphrase", "membership"} <= set(said["not_measured"]["attacks"])
    assert "measured" in said["statement"]
    assert "delete" not in path.read_text() + json.dumps(said).lower()
    assert said["remarks"] == []

    checks = verify(path)
    assert {check.state for check in checks} == {OK}
    assert [check.item for check in checks] == [
        "signature", "run: results.json", "run: env.json", "run: records.jsonl", "model after: config.json",
        "model after: model.safetensors", "model before: config.json", "model before: model.safetensors",
        "forget: forget.jsonl", "retain: retain.jsonl",
    ]  # fmt: skip
    assert checks[0].detail.endswith("which this check does not tie to anybody")


def cluster(run: Path, part: Callable[[str], str | None]) -> list[dict[str, Any]]:
    """Put clusters into the run's records."""
    path = run / "records.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records = [{**r, "cluster": name} if (name := part(r["question"])) is not None else r for r in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def test_shares_and_means_are_over_clusters_of_samples(run: Path, key: Path) -> None:
    records = cluster(run, lambda asked: str(int(found[0]) // 2) if (found := re.findall(r"\d+", asked)) else None)
    with pytest.raises(UserError, match=r"effective_counts, forget_accuracy before is None, and .*records.jsonl makes"):
        certify(run, key)
    told = {when: Facts.effective_counts([r for r in records if r["when"] == when]) for when in ("before", "after")}
    assert told["before"]["forget_accuracy"] == 5
    rewrite(run, lambda results: results["runs"][0].update(effective_counts=told))
    said, path = certify(run, key)
    made = said["measured"]["forget_accuracy"]
    assert (made["n"], made["before"]["n_effective"]) == (10, 5)
    assert made["before"]["interval"] == pytest.approx([5 / (5 + 3.8415), 1], abs=1e-4)
    assert "`n_effective`" in DOCS.read_text(encoding="utf-8")
    assert {check.state for check in verify(path)} == {OK}


def test_a_mean_is_resampled_by_clusters() -> None:
    made = [{"set": "passages", "question": "", "nll": float(i // 5), "tokens": 1} for i in range(10)]

    def spread(size: int | None = None) -> list[float] | None:
        clusters = [{"cluster": f"{i // size}"} if size else {} for i in range(10)]
        drawn = [Drawn({**record, **cluster}) for record, cluster in zip(made, clusters, strict=True)]
        return measured._bootstrapped(Facts, drawn, None, ["perplexity"], progress="").get("perplexity")

    alone = spread()
    assert alone
    assert 1.0 < alone[0] < alone[1] < math.e
    assert spread(1) == alone
    assert spread(5) == pytest.approx([1.0, math.e])  # of two clusters, both may be the same
    assert spread(10) is None


def test_every_field_is_documented(run: Path, key: Path) -> None:
    said, path = certify(run, key)
    documented = set(re.findall(r"`(\w+)`", DOCS.read_text(encoding="utf-8")))
    keys = {*json.loads(path.read_text()), *said, *said["run"], *said["signer"], *said["intervals"]}
    keys |= {
        *said["measured"]["perplexity"],
        *said["not_measured"],
        *said["model_before"],
        *said["attacks"]["rewording"],
    }
    assert keys <= documented


def test_what_is_missing_is_stated(run: Path, key: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "model")
    (run / "env.json").unlink()
    (run / "records.jsonl").unlink()
    (tmp_path / "forget.jsonl").unlink()
    shutil.rmtree(tmp_path / "start")
    rewrite(run, lambda results: results["runs"][0]["config"].update(save_model=False))
    said, path = certify(run, key)
    remarks = " ".join(said["remarks"])
    for sentence in ("tied to no model: the run did not save it", "env.json is not there", "records.jsonl is not there",
                     "forget: has no hash, since the file is not there", "The model before has no hashes"):  # fmt: skip
        assert sentence in remarks
    assert said["measured"]["perplexity"]["after"]["interval"] is None
    assert said["measured"]["forget_accuracy"]["after"]["interval"], "a share needs its count alone"
    checks = verify(path)
    assert bad(checks) == []
    assert {c.item for c in checks if c.state == NOT_THERE} == {"model after", "model before", "forget: forget.jsonl"}
    (tmp_path / "other").mkdir()
    assert bad(verify(path, model=tmp_path / "other")) == ["model after"], "what is given and cannot be checked"


def test_an_adapter_that_a_run_left_is_hashed_and_its_base_is_spoken_of(run: Path, key: Path, tmp_path: Path) -> None:
    (run / "model").rename(run / "adapter")
    for folder in (run / "adapter", tmp_path / "start"):
        (folder / "config.json").rename(folder / "adapter_config.json")
    said, path = certify(run, key)
    assert set(said["model_after"]["files"]) == {"adapter_config.json", "model.safetensors"}
    remarks = " ".join(said["remarks"])
    assert "The model after is an adapter; what it does depends on its base model, too." in remarks
    assert "The model before is an adapter; its base model is part of the fingerprint start_model" in remarks
    assert bad(verify(path)) == []
    (run / "adapter/model.safetensors").write_bytes(b"other")
    assert bad(verify(path)) == ["model after: model.safetensors"]


def test_a_number_that_is_none_or_not_finite_is_not_measured(run: Path, key: Path) -> None:
    def change(results: dict[str, Any]) -> None:
        entry = results["runs"][0]
        entry["after"].update(unknown_probability=None, perplexity=math.inf)
        entry["not_computed"]["unknown_probability"] = "no name to replace"

    rewrite(run, change)
    (run / "records.jsonl").unlink()  # which say otherwise
    said, path = certify(run, key)
    assert said["not_measured"]["numbers"] == {
        "unknown_probability": "no name to replace",
        "perplexity": "no finite number came out (after)",
    }
    assert verify(path)[0].state == OK


def test_numbers_that_do_not_follow_from_the_samples_are_not_signed(run: Path, key: Path) -> None:
    rewrite(run, lambda results: results["runs"][0]["after"].update(forget_accuracy=0.0))
    with pytest.raises(UserError, match=r"forget_accuracy after is 0\.0, and .* makes it 0\.1; one was changed"):
        certify(run, key)
    assert not (run / "record.json").exists()


@pytest.mark.parametrize("of", ["results", "entry"])
def test_a_number_of_samples_that_is_not_that_of_the_records_is_not_signed(run: Path, key: Path, of: str) -> None:
    def change(results: dict[str, Any]) -> None:
        (results if of == "results" else results["runs"][0])["counts"] = {**results["counts"], "forget_accuracy": 10000}

    rewrite(run, change)
    with pytest.raises(UserError, match=r"counts, forget_accuracy is 10000, and .* makes it 10; one was changed"):
        certify(run, key)
    rewrite(run, lambda results: results["counts"].pop("forget_accuracy"))
    rewrite(run, lambda results: results["runs"][0].pop("counts", None))
    with pytest.raises(UserError, match=r"counts, forget_accuracy is None, and .* makes it 10; one was changed"):
        certify(run, key)


def test_samples_of_which_no_numbers_can_be_made_are_remarked_on(run: Path, key: Path) -> None:
    rewrite(run, lambda results: results["runs"][0]["config"].update(task="gone.py"))
    said, _ = certify(run, key)
    assert "Numbers were not made again of records.jsonl (UserError), and means have no intervals." in said["remarks"]
    assert said["run"]["recipe"]["task"] == "gone.py"


def test_files_modified_after_the_run_are_remarked_on_and_fingerprints_win(
    run: Path, key: Path, tmp_path: Path
) -> None:
    later = time.time() + 60
    os.utime(tmp_path / "forget.jsonl", (later, later))
    os.utime(run / "model/config.json", (later, later))
    said, path = certify(run, key)
    assert [remark.partition(":")[0] for remark in said["remarks"]] == ["forget", "The model after"]
    path.unlink()
    was = hashlib.sha256((tmp_path / "retain.jsonl").read_bytes()).hexdigest()
    rewrite(run, lambda results: results["runs"][0].update(files={"retain": was, "forget": "0" * 64}))
    (tmp_path / "retain.jsonl").unlink()
    said, path = certify(run, key)
    assert said["run"]["fingerprints"] == {}
    assert said["data"]["forget"] == {"name": "forget.jsonl", "sha256": "0" * 64}
    assert said["data"]["retain"] == {"name": "retain.jsonl", "sha256": was}
    assert bad(verify(path)) == ["forget: forget.jsonl"]


def test_a_model_that_took_long_to_save_is_held_against_its_hashes_and_not_against_times(run: Path, key: Path) -> None:
    later = time.time() + 60
    os.utime(run / "model/config.json", (later, later))
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (run / "model").iterdir()}
    (run / "saved.json").write_text(json.dumps({"model": hashes}))
    said, path = certify(run, key)
    assert said["remarks"] == []
    path.unlink()
    (run / "model/config.json").write_text('{"other": 1}')
    said, _ = certify(run, key)
    assert said["remarks"] == ["The model after: some of its files are not those that the run saved."]


def test_a_private_run_gives_away_no_text_and_no_name(run: Path, key: Path, tmp_path: Path) -> None:
    secret = tmp_path / f"{SECRET}.jsonl"
    (tmp_path / "forget.jsonl").rename(secret)
    (tmp_path / SECRET).mkdir()
    (tmp_path / SECRET / f"{SECRET}.json").write_text("[]")

    def change(results: dict[str, Any]) -> None:
        results.update(private=True, notes=[f"{SECRET}:1 is not known"])
        results["runs"][0]["config"].update(
            forget=str(secret), data_dir=str(tmp_path / SECRET), task_args={"forget": [SECRET, "b"], "who": SECRET}
        )

    rewrite(run, change)
    said, path = certify(run, key)
    assert SECRET not in base64.b64decode(json.loads(path.read_text())["payload"]).decode()
    assert said["run"]["private"] is True
    assert said["run"]["recipe"]["task_args"] == {"forget": "withheld: 2 texts", "who": "withheld"}
    assert said["data"]["forget"]["name"] == "withheld"
    assert {check.state for check in verify(path)} == {OK}
    secret.write_text("{}")
    assert bad(verify(path)) == ["forget: withheld"]


def test_names_to_forget_and_paths_are_in_no_record(run: Path, key: Path, tmp_path: Path) -> None:
    rewrite(
        run,
        lambda results: (
            results["runs"][0]["config"].update(task_args={"forget": [SECRET]}),
            results.update(notes=[f"{tmp_path}/forget.jsonl:1 is not known"]),
        ),
    )
    said, path = certify(run, key)
    text = base64.b64decode(json.loads(path.read_text())["payload"]).decode()
    assert SECRET not in text
    assert str(tmp_path) not in text
    assert said["remarks"] == ["forget.jsonl:1 is not known"]


def test_short_names_are_left_out_of_sentences_as_whole_words() -> None:
    config = {"task_args": {"forget": ["李白", "Bo", "Bono"], "who": "Al"}, "out": "a", "data_dir": "Bo/李"}
    said = "Nothing was said of Bono, 李白的诗 and Bo, Bob, Al, a and 李."
    forget = "Nothing was said of withheld, withheld的诗 and withheld, Bob, {}, a and 李."
    assert shown.sentence(said, config, private=False) == forget.format("Al")
    assert shown.sentence(said, config, private=True) == forget.format("withheld")
    assert shown.sentence("In 李: none", {"data_dir": "李"}, private=True) == "In withheld: none"


def test_every_setting_that_may_hold_text_says_how_others_are_shown_it() -> None:
    hints = typing.get_type_hints(RunConfig)
    for field in dataclasses.fields(RunConfig):
        of_numbers = not any(word in str(hints[field.name]) for word in ("str", "Any", "list", "dict", "Literal"))
        assert field.metadata["shown"] in SHOWN or (of_numbers and not field.metadata["shown"]), field.name
    assert shown.recipe({"of_another_version": SECRET, "number": 3}, private=False) == {
        "of_another_version": "withheld",
        "number": 3,
    }


@pytest.mark.parametrize("private", [False, True])
def test_no_setting_shows_a_folder_or_a_name_in_a_record(run: Path, key: Path, tmp_path: Path, private: bool) -> None:
    folder = f"/home/{SECRET}/clients"
    names = {"subjects": [SECRET], "deeper": [{"a": [SECRET, "b"]}], "path": f"{folder}/x.txt", "rate": [1, 2]}
    settings = {
        "task_args": {"split": "train", "nested": names, "hub": "org/judge", "windows": f"C:\\{SECRET}\\x.txt"},
        "probes": ["rwku"],
        "probe_subjects": [SECRET, f"{SECRET} Jr."],
        "probes_dir": f"{folder}/probes",
        "lm_eval": ["mmlu", f"{folder}/patient.yaml"],
        "refusals": f"{folder}/no.txt",
        "data_dir": f"{folder}/rows",
        "chat_template": f"{folder}/mine.jinja",
        "retrained": f"{folder}/retrained",
    }

    def change(results: dict[str, Any]) -> None:
        results.update(private=private, notes=[f"{folder}/rows/1.jsonl: no row of {SECRET} is known."])
        results["runs"][0]["config"].update(settings)
        results["runs"][0].update(stopped=f"{SECRET} was forgotten at step 2.")
        results["runs"][0]["not_computed"]["unknown_probability"] = f"{folder}/probes: has no {SECRET} Jr."
        results["runs"][0]["after"]["unknown_probability"] = None

    rewrite(run, change)
    (run / "records.jsonl").unlink()
    said, path = certify(run, key)
    assert SECRET not in base64.b64decode(json.loads(path.read_text())["payload"]).decode()
    recipe = said["run"]["recipe"]
    assert recipe["probe_subjects"] == "withheld: 2 texts"
    assert (recipe["probes"], recipe["forget_loss"], recipe["retrained"]) == (["rwku"], "IDK", "retrained")
    if private:
        assert recipe["task_args"] == dict.fromkeys(settings["task_args"], "withheld")
        assert recipe["lm_eval"] == ["mmlu", "withheld"]
        assert {recipe[key] for key in ("probes_dir", "refusals", "data_dir", "chat_template", "out")} == {"withheld"}
        return
    assert recipe["lm_eval"] == ["mmlu", "patient.yaml"]
    assert [recipe[key] for key in ("probes_dir", "refusals", "chat_template")] == ["probes", "no.txt", "mine.jinja"]
    assert recipe["task_args"] == {
        "split": "train",
        "nested": {
            "subjects": "withheld: 1 texts",
            "deeper": [{"a": "withheld: 2 texts"}],
            "path": "x.txt",
            "rate": [1, 2],
        },
        "hub": "org/judge",
        "windows": "x.txt",
    }
    assert "withheld was forgotten at step 2." in said["remarks"]
    assert said["not_measured"]["numbers"]["unknown_probability"] == "probes: has no withheld"


def test_a_model_from_the_hub_has_its_commit(run: Path, key: Path, tmp_path: Path, monkeypatch: Any) -> None:
    snapshot = tmp_path / "snapshots" / "abc123"
    shutil.copytree(tmp_path / "start", snapshot)
    found = {"org/model": str(snapshot / "config.json")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: found.get(name))
    rewrite(run, lambda results: results["runs"][0]["config"].update(model="org/model"))
    said, path = certify(run, key)
    assert (said["model_before"]["name"], said["model_before"]["commit"]) == ("org/model", "abc123")
    assert bad(verify(path)) == []
    (snapshot / "model.safetensors").write_bytes(b"other")
    assert bad(verify(path)) == ["model before: model.safetensors"]
    found.clear()
    assert Check("model before", NOT_THERE, "was not given, and is not where the run's settings say") in verify(path)


def test_a_model_taught_before_is_given(run: Path, key: Path, tmp_path: Path) -> None:
    rewrite(run, lambda results: results["runs"][0]["config"].update(memorise=True))
    said, path = certify(run, key)
    assert said["model_before"]["not_there"].endswith("give the taught one by --before")
    path.unlink()
    said, path = certify(run, key, before=str(tmp_path / "start"))
    assert set(said["model_before"]["files"]) == {"config.json", "model.safetensors"}
    assert bad(verify(path, before=str(tmp_path / "start"))) == []
    for call in (lambda: certify(run, key, out="x", before="./gone"), lambda: verify(path, before="./gone")):
        with pytest.raises(UserError, match=r"before \./gone: no such folder, nor is it in the hub's cache"):
            call()


# Several runs


@pytest.fixture
def several(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    entries = [
        {**write_run(folder / f"{slug}-seed{seed}", method, seed), "environment": {"threads": seed}}
        for method, slug in (("DualOptim", "dualoptim"), ("DualOptim+", "dualoptim-plus"))
        for seed in (0, 1)
    ]
    write_results(folder, *entries)
    return folder


def test_one_of_several_runs_is_chosen_by_number_method_seed_or_folder(several: Path, key: Path) -> None:
    with pytest.raises(UserError, match=r"there are 4 runs to choose from, 1 \(DualOptim, seed 0\), .*; give --run N"):
        certify(several, key)
    with pytest.raises(UserError, match=r"2 runs to choose from, 3 \(DualOptim\+, seed 0\), 4 "):
        certify(several, key, method="DualOptim+")
    with pytest.raises(UserError, match=r"unknown method 'DualOptm\+'; did you mean 'DualOptim\+'\?"):
        certify(several, key, method="DualOptm+")
    with pytest.raises(UserError, match="run 5: the folder holds 1"):
        certify(several, key, number=5)
    with pytest.raises(UserError, match="no run is of all that was asked for"):
        certify(several, key, number=1, seed=1)
    own = several / "dualoptim-plus-seed1"
    for i, chosen in enumerate((
        lambda out: certify(several, key, out=out, number=4),
        lambda out: certify(several / "results.json", key, out=out, method="DualOptim+", seed=1),
        lambda out: certify(own, key, out=out),
    )):  # fmt: skip
        said, path = chosen(own / f"{i}.json")
        assert (said["run"]["method"], said["run"]["seed"]) == ("DualOptim+", 1)
        digest = hashlib.sha256((own / "model/model.safetensors").read_bytes()).hexdigest()
        assert said["model_after"]["files"]["model.safetensors"]["sha256"] == digest
        assert {check.state for check in verify(path)} == {OK}
    said, path = certify(several, key, number=4)
    assert path == own / "record.json"


def test_a_record_outlives_runs_that_come_beside_and_finds_its_run_elsewhere(
    several: Path, key: Path, tmp_path: Path
) -> None:
    _, path = certify(several, key, number=1, out=tmp_path / "record.json")
    assert {check.item for check in verify(path) if check.state == NOT_THERE} >= {"run: results.json", "model after"}
    rewrite(several, lambda results: results["runs"].insert(0, write_run(several / "x-seed0", "X")))
    assert {check.state for check in verify(path, run=several)} == {OK}
    rewrite(several, lambda results: results["runs"].pop(1))
    assert bad(verify(path, run=several)) == ["run: results.json"]
    with pytest.raises(UserError, match=r"gone: holds no results\.json; give the folder of a finished run"):
        verify(path, run=tmp_path / "gone")


def test_a_record_signs_the_environment_of_its_run_and_outlives_runs_that_come_into_its_folder(
    run: Path, key: Path
) -> None:
    said, path = certify(run, key)
    assert said["environment"] == {"versions": {"torch": "2"}}, "as results of an earlier version have it"
    path.unlink()
    own = {"versions": {"torch": "2"}, "threads": 1}
    rewrite(run, lambda results: results["runs"][0].update(environment=own))
    said, path = certify(run, key)
    assert said["environment"] == own
    assert "env.json" in said["files"]
    other = write_run(run / "x-seed0", "X")
    rewrite(run, lambda results: results["runs"].append(other))
    (run / "env.json").write_text(json.dumps({"threads": 2}))
    checks = verify(path)
    assert bad(checks) == []
    assert "run: env.json" in {check.item for check in checks if check.state == NOT_THERE}
    said, _ = certify(run, key, number=1, out=run / "again.json")
    assert said["environment"] == own
    assert "env.json" not in said["files"]
    said, _ = certify(run, key, number=2)
    assert said["environment"] is None
    assert (
        "The environment is not known: the run's entry has none, and its env.json is of several runs."
        in (said["remarks"])
    )


def test_the_remarks_of_a_record_are_on_its_run_and_on_no_other(several: Path, key: Path) -> None:
    def change(results: dict[str, Any]) -> None:
        results["runs"][0].update(collapse=["it says nothing"], scored_in="fp32")
        results["runs"][1].update(skipped_steps={"forget": 2}, scored_in="bf16")
        results["notes"] = ["One row was left out.", *runs.troubles(results["runs"])]

    rewrite(several, change)
    own = "DualOptim, seed 0: the model fell apart: it says nothing."
    other = "DualOptim, seed 1: 2 steps to forget were skipped, as their gradients were not finite."
    for number, troubles in ((1, [own]), (2, [other]), (3, [])):
        said, path = certify(several, key, number=number)
        assert said["remarks"] == [FROM_HUB, "One row was left out.", *troubles]
        assert {check.state for check in verify(path)} == {OK}


def test_a_run_of_a_grid_has_the_notes_of_its_own_task_and_a_change_of_names_changes_no_record(
    several: Path, key: Path
) -> None:
    results = json.loads((several / "results.json").read_text())
    results["runs"][0]["collapse"] = ["it says nothing"]
    about = {"counts": {}, "plane": None, **{name: results[name] for name in ("task", "model", "followed", "metrics")}}
    for i, entry in enumerate(results["runs"]):
        own = Path(entry["config"]["out"]) / "run.json"
        own.write_text(json.dumps({**about, "notes": [f"Row {i} was left out."], "run": entry}))
    results.update(grid={"lr": [1e-5]}, planned=4, points=[], plane=None)
    noted = [f"Row {i} was left out." for i in range(4)]
    seen = []
    for grid in (["lr"], []):  # those of an earlier version named no settings
        results["notes"] = [*noted, *runs.troubles(results["runs"], grid)]
        (several / "results.json").write_text(json.dumps(results))
        said, path = certify(several, key, number=2)
        assert said["remarks"] == [FROM_HUB, "Row 1 was left out."]
        seen.append(said["run"]["about_sha256"])
        path.unlink()
    assert seen[0] == seen[1]


def test_parts_that_come_after_each_other_are_told_apart(tmp_path: Path, key: Path) -> None:
    folder = tmp_path / "parts"
    parts = []
    for i in (1, 2):
        own = folder / "dualoptim-plus-seed0" / f"part{i}"
        parts.append({**write_run(own), "part": i, "seconds": float(i)})
        write_results(own, {key: value for key, value in parts[-1].items() if key != "part"})
    write_results(folder, *parts)
    with pytest.raises(UserError, match=r"1 \(DualOptim\+, part 1\), 2 \(DualOptim\+, part 2\)"):
        certify(folder, key, method="DualOptim+")
    said, path = certify(folder, key, number=2)
    assert path.parent.name == "part2"
    assert said["environment"] == {"versions": {"torch": "2"}}, "that of its own folder"
    assert said["run"]["part"] == 2
    for place in (path.parent, folder):
        assert {check.state for check in verify(path, run=place)} == {OK}
    as_it_was = (path.parent / "results.json").read_text()
    rewrite(path.parent, lambda results: results.update(followed="nothing"))
    assert bad(verify(path)) == ["run: results.json, followed"]
    (path.parent / "results.json").write_text(as_it_was)
    rewrite(path.parent, lambda results: results["runs"][0].update(seconds=0))
    assert bad(verify(path)) == ["run: results.json"]


# Changes


def test_a_byte_that_is_changed_is_found_wherever_it_is(run: Path, key: Path) -> None:
    _, path = certify(run, key)
    data = path.read_bytes()
    for i in range(0, len(data), 5):  # every kind of place, in a fifth of the time that all of them take
        changed = bytearray(data)
        changed[i] ^= 1 << i % 7
        path.write_bytes(changed)
        try:
            checks = verify(path)
        except UserError:
            continue
        assert bad(checks) == ["signature"], (i, data[max(0, i - 20) : i + 20])
        assert len(checks) == 1, "what was not signed is not looked at"


def test_what_says_the_same_in_other_bytes_is_told_from_what_does_not(run: Path, key: Path) -> None:
    _, path = certify(run, key)
    envelope = json.loads(path.read_text())
    path.write_text(json.dumps(envelope, indent=8, sort_keys=True))
    assert {check.state for check in verify(path)} == {OK}, "spaces and order outside what is signed"
    signature = envelope["signatures"][0]
    last = signature["sig"].rstrip("=")[-1]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    same = signature["sig"].replace(f"{last}==", f"{alphabet[alphabet.index(last) ^ 1]}==")
    assert base64.b64decode(same) == base64.b64decode(signature["sig"])
    path.write_text(json.dumps({**envelope, "signatures": [{**signature, "sig": same}]}))
    with pytest.raises(UserError, match="is damaged: what should be base64 is not"):
        verify(path)
    path.write_text(json.dumps(envelope)[:-1] + ', "payload": ""}')
    with pytest.raises(UserError, match="a key stands twice"):
        verify(path)


def test_a_payload_signed_again_by_somebody_else_is_not_that_of_the_key_given(
    run: Path, key: Path, tmp_path: Path
) -> None:
    other = save_key(tmp_path / "other.pem")
    _, path = certify(run, other)
    assert bad(verify(path, public_key=other.with_suffix(".pub"))) == []
    checks = verify(path, public_key=key.with_suffix(".pub"))
    assert bad(checks) == ["key"]
    envelope = json.loads(path.read_text())
    again = signing.sealed(base64.b64decode(envelope["payload"]), signing.load_private_key(key))
    path.write_text(json.dumps(again))
    assert bad(verify(path)) == ["signature"], "the payload names another key"


@pytest.mark.parametrize(
    ("place", "item"),
    [
        ("run/model/model.safetensors", "model after: model.safetensors"),
        ("start/model.safetensors", "model before: model.safetensors"),
        ("run/env.json", "run: env.json"),
        ("run/records.jsonl", "run: records.jsonl"),
        ("run/results.json", "run: results.json"),
        ("forget.jsonl", "forget: forget.jsonl"),
        ("run/model/pytorch_model.bin", "model after: pytorch_model.bin"),
        ("start/pytorch_model.bin", "model before: pytorch_model.bin"),
        ("run/adapter/adapter_model.safetensors", "run: adapter/adapter_model.safetensors"),
    ],
)
def test_a_file_that_is_changed_or_comes_to_a_model_is_found(
    run: Path, key: Path, tmp_path: Path, place: str, item: str
) -> None:
    _, path = certify(run, key)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    with (tmp_path / place).open("a") as file:
        file.write(" x")
    assert bad(verify(path)) == [item]


def test_a_card_may_be_edited_or_removed_in_the_folder_of_each_model(run: Path, key: Path, tmp_path: Path) -> None:
    (run / "adapter").mkdir()
    (run / "adapter/adapter_model.safetensors").write_text("as it was")
    cards = [folder / "README.md" for folder in (run / "model", run / "adapter", tmp_path / "start")]
    for card in cards:
        card.write_text("# As it was")
    said, path = certify(run, key)
    assert "README.md" not in said["model_before"]["files"]
    for card in cards:
        card.write_text("# With a license")
        assert {check.state for check in verify(path)} == {OK}
        card.unlink()
        assert {check.state for check in verify(path)} == {OK}


def test_a_record_that_has_the_hash_of_a_card_lets_it_be_edited_too(
    run: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "start/README.md").write_text("# As it was")
    with monkeypatch.context() as earlier:
        earlier.setattr(evidence, "CARD", "")
        said, path = certify(run, key)
    assert "README.md" in said["model_before"]["files"]
    (tmp_path / "start/README.md").write_text("# With a license")
    assert {check.state for check in verify(path)} == {OK}


def test_the_files_of_linked_folders_are_signed_and_found_as_others_are(run: Path, key: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "more").mkdir(parents=True)
    for name in ("default.jinja", "more/x.jinja"):
        (elsewhere / name).write_text("other words")
    for place in (run / "model", tmp_path / "start"):
        (place / "known").symlink_to(elsewhere)
    said, path = certify(run, key)
    of_link = {"known/default.jinja", "known/more/x.jinja"}
    for model in ("model_after", "model_before"):
        assert set(said[model]["files"]) == {"config.json", "model.safetensors", *of_link}
    assert {check.state for check in verify(path)} == {OK}
    for place, what in ((run / "model", "model after"), (tmp_path / "start", "model before")):
        added = place / "additional_chat_templates"
        added.symlink_to(elsewhere)
        assert bad(verify(path)) == [f"{what}: {added.name}/{name}" for name in ("default.jinja", "more/x.jinja")]
        added.unlink()
        for around in (place, place.parent):
            added.symlink_to(around)
            with pytest.raises(UserError, match=f"{added}: links to a folder that it lies in; remove the link"):
                verify(path)
            added.unlink()
    (elsewhere / "default.jinja").write_text("evil words")
    assert bad(verify(path)) == ["model after: known/default.jinja", "model before: known/default.jinja"]


def test_results_that_say_something_else_are_found_and_a_model_must_be_whole(run: Path, key: Path) -> None:
    _, path = certify(run, key)
    rewrite(run, lambda results: results["runs"][0]["after"].update(forget_accuracy=0.0))
    (run / "model/config.json").unlink()
    assert bad(verify(path)) == ["run: results.json", "model after: config.json"]
    rewrite(run, lambda results: results["runs"][0].pop("method"))
    assert "run: results.json" in bad(verify(path))


def test_labels_notes_page_settings_and_the_adapter_beside_the_model_are_signed_too(run: Path, key: Path) -> None:
    (run / "adapter").mkdir()
    places = ("adapter/adapter_model.safetensors", "config.resolved.yaml", "report.html")
    for place in places:
        (run / place).write_text("as it was")
    _, path = certify(run, key)
    assert bad(verify(path)) == []
    as_it_was = (run / "results.json").read_text()
    rewrite(run, lambda results: results.update(notes=["An auditor found that all is gone."], counts={}, points=[]))
    rewrite(run, lambda results: results["metrics"]["forget_accuracy"].update(better="higher"))
    assert bad(verify(path)) == [f"run: results.json, {name}" for name in ("counts", "metrics", "notes", "points")]
    (run / "results.json").write_text(as_it_was)
    for place in places:
        (run / place).write_text("all gone")
    (run / "adapter/adapter_model.bin").write_text("added")
    assert sorted(bad(verify(path))) == [f"run: {place}" for place in ("adapter/adapter_model.bin", *places)]


def test_whatever_results_say_of_a_run_that_is_alone_is_signed_and_so_is_what_they_do_not_say(
    run: Path, key: Path
) -> None:
    _, path = certify(run, key)
    as_it_was = (run / "results.json").read_text()
    changes: dict[str, Any] = {
        "task": "tofu", "model": "another", "private": True, "followed": "nothing", "curves": {"forget": "To keep"},
        "scores": {"forget": "perplexity"}, "plane": ["forget_accuracy", "perplexity"], "grid": {"lr": [1, 2]},
        "chosen": {"method": "DualOptim+", "settings": {}},
    }  # fmt: skip
    for name, value in changes.items():
        rewrite(run, lambda results, name=name, value=value: results.update({name: value}))  # type: ignore[misc]
        assert bad(verify(path)) == [f"run: results.json, {name}"]
        (run / "results.json").write_text(as_it_was)
    assert bad(verify(path)) == []


def test_a_record_of_fewer_hashes_is_checked_by_those_that_it_has(
    run: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "adapter").mkdir()
    (run / "adapter/adapter_model.safetensors").write_text("not signed")
    with monkeypatch.context() as earlier:
        earlier.setattr(evidence, "adapter_beside", lambda run: {})
        now = evidence.about_hashes
        few = ("metrics", "counts", "notes", "points")
        earlier.setattr(evidence, "about_hashes", lambda run: {name: now(run)[name] for name in few})
        _, path = certify(run, key)
    assert {check.state for check in verify(path)} == {OK}
    rewrite(run, lambda results: results.update(followed="nothing"))
    assert {check.state for check in verify(path)} == {OK}
    rewrite(run, lambda results: results.update(counts={}))
    assert bad(verify(path)) == ["run: results.json, counts"]


def test_a_run_in_the_folder_of_the_model_that_it_started_from_is_no_part_of_that_model(
    tmp_path: Path, key: Path
) -> None:
    folder = tmp_path / "start" / "unlearned"
    entry = write_run(folder)
    (folder.parent / "start").rename(tmp_path / "moved")
    for file in (tmp_path / "moved").iterdir():
        file.rename(tmp_path / "start" / file.name)
    entry["config"]["model"] = str(tmp_path / "start")
    write_results(folder, entry)
    said, path = certify(folder, key)
    assert set(said["model_before"]["files"]) == {"config.json", "model.safetensors"}
    assert {check.state for check in verify(path)} == {OK}


def test_files_that_are_given_are_checked_wherever_they_lie(run: Path, key: Path, tmp_path: Path) -> None:
    _, path = certify(run, key)
    away = tmp_path / "away"
    away.mkdir()
    moved = shutil.copy(path, away)
    shutil.copytree(run / "model", away / "model")
    forget = shutil.move(tmp_path / "forget.jsonl", away / "mine.jsonl")
    shutil.move(run, tmp_path / "hidden")
    given = {"model": away / "model", "before": str(tmp_path / "start"), "forget": forget}
    checks = verify(moved, **given)
    assert [c.item for c in checks if c.state == NOT_THERE] == [
        "run: results.json", "run: env.json", "run: records.jsonl", "retain: retain.jsonl",
    ]  # fmt: skip
    assert bad(checks) == []
    Path(forget).write_text("{}")
    assert bad(verify(moved, **given)) == ["forget: forget.jsonl"]
    for name, what in (("forget", "file"), ("retain", "file"), ("model", "folder")):
        with pytest.raises(UserError, match=f"{name} gone: there is no such {what}"):
            verify(moved, **{name: "gone"})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "damaged, cut off or no record"),
        ("\x00\xff", "damaged, cut off or no record"),
        ("[" * 100_000, "damaged, cut off or no record"),
        ("{}", "is no record of dualoptim certify"),
        ('{"payloadType": "text/plain", "payload": "", "signatures": []}', "payloadType is 'text/plain'"),
        ('{"payloadType": "application/vnd.in-toto+json", "payload": "", "signatures": []}', "has 0 signatures"),
        ('{"payloadType": "application/vnd.in-toto+json", "payload": 1, "signatures": [{"keyid": "", "sig": ""}]}',
         "what should be base64 is not"),
        ('{"payloadType": "application/vnd.in-toto+json", "payload": "", "signatures": [{}]}', "keyid and sig"),
    ],
)  # fmt: skip
def test_what_is_no_record_is_refused_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "record.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=re.escape(sentence)):
        verify(tmp_path / "record.json")


def test_a_record_of_another_schema_algorithm_or_kind_is_refused(run: Path, key: Path) -> None:
    _, path = certify(run, key)
    good = json.loads(base64.b64decode(json.loads(path.read_text())["payload"]))

    def refused(match: str, **changes: Any) -> None:
        statement = {**good, **changes}
        path.write_text(json.dumps(signing.sealed(signing.canonical(statement), signing.load_private_key(key))))
        with pytest.raises(UserError, match=match):
            verify(path)

    said = good["predicate"]
    refused("is a record of schema 2, and this version reads schema 1", predicate={**said, "schema": 2})
    refused("is no record of dualoptim certify", predicateType="urn:other")
    refused("is not as docs/certificate.md has it", predicate={**said, "run": {}})
    signer = {**said["signer"], "algorithm": "RSA"}
    refused("is signed by 'RSA', and this version checks Ed25519", predicate={**said, "signer": signer})


def test_a_record_is_not_overwritten(run: Path, key: Path) -> None:
    _, path = certify(run, key)
    was = path.read_bytes()
    with pytest.raises(UserError, match="is there already, and a signed record is not overwritten; give another --out"):
        certify(run, key)
    assert path.read_bytes() == was


def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    run: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "_described", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(UserError, match=r"^out .*record.json: cannot be written \(.+\); give another --out$"):
        certify(run, key, out=run / "results.json" / "record.json")


def test_the_folder_of_a_record_is_made(run: Path, key: Path) -> None:
    _, path = certify(run, key, out=run / "records" / "record.json")
    assert path.is_file()


# Keys


def test_keys_of_openssh_sign_too_and_public_ones_check(run: Path, tmp_path: Path) -> None:
    private = Ed25519PrivateKey.generate()
    key = save_key(tmp_path / "id", private, serialization.PrivateFormat.OpenSSH)
    public = tmp_path / "id_ed25519.pub"
    line = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    public.write_bytes(line + b" somebody\n")
    _, path = certify(run, key)
    for form in (public, key.with_suffix(".pub")):
        assert verify(path, public_key=form)[1] == Check("key", OK, f"is that of {form}")


def test_an_encrypted_key_is_opened_without_asking(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = save_key(tmp_path / "key.pem", encryption=serialization.BestAvailableEncryption(b"open sesame"))
    with pytest.raises(UserError, match=r"is encrypted and \$DUALOPTIM_PASSPHRASE is not set; set .* or give --pass"):
        certify(run, key)
    (tmp_path / "wrong").write_text("open barley\n")
    with pytest.raises(UserError, match="the passphrase does not open it"):
        certify(run, key, passphrase_file=tmp_path / "wrong")
    (tmp_path / "wrong").write_text("\n")
    with pytest.raises(UserError, match="wrong is empty; set"):
        certify(run, key, passphrase_file=tmp_path / "wrong")
    with pytest.raises(UserError, match="passphrase_file gone: cannot be read"):
        certify(run, key, passphrase_file="gone")
    (tmp_path / "right").write_text("open sesame\n")
    certify(run, key, passphrase_file=tmp_path / "right", out=tmp_path / "a.json")
    monkeypatch.setenv(signing.PASSPHRASE, "open sesame")
    certify(run, key, out=tmp_path / "b.json")
    plain = save_key(tmp_path / "plain.pem")
    certify(run, plain, out=tmp_path / "c.json")  # which needs none, whatever the environment has for another


def test_an_encrypted_key_of_openssh_needs_bcrypt(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("ssh-keygen"):
        pytest.skip("ssh-keygen is not installed")
    key = tmp_path / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "open sesame", "-f", str(key)], check=True)
    monkeypatch.setenv(signing.PASSPHRASE, "open sesame")
    try:
        import bcrypt  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"needs the package bcrypt; install dualoptim\[certify\]"):
            certify(run, key)
    else:
        _, path = certify(run, key)
        assert verify(path, public_key=f"{key}.pub")[1].state == OK


def test_keys_that_do_not_sign_are_refused_in_a_sentence(run: Path, key: Path, tmp_path: Path) -> None:
    rsa = save_key(tmp_path / "rsa.pem", generate_private_key(65537, 2048))
    (tmp_path / "empty").write_text("")
    (tmp_path / "broken").write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    (tmp_path / "long").write_bytes(b"x" * 2**17)
    for name in ("empty", "broken", "long"):
        (tmp_path / name).chmod(0o600)
    for path, sentence in (
        (rsa, "is of the kind RSA, and records are signed with Ed25519"),
        (tmp_path / "gone.pem", "cannot be read (No such file or directory); make one with openssl genpkey"),
        (tmp_path, "cannot be read (Is a directory)"),
        (tmp_path / "empty", "holds no private key in PEM or OpenSSH's format"),
        (tmp_path / "broken", "cannot be read ("),
        (tmp_path / "long", "is longer than any key"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            certify(run, path)
    key.chmod(0o644)
    with pytest.warns(UserWarning, match="other users of this machine may read it; chmod 600"):
        _, record = certify(run, key)
    key.chmod(0o600)
    for path, sentence in (
        (key, "holds a private key; give the public one, made by openssl pkey -in"),
        (rsa.with_suffix(".pub"), "is of the kind RSA"),
        (tmp_path / "empty", "is no public key in PEM or OpenSSH's format"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            verify(record, public_key=path)


def test_without_the_package_there_is_a_sentence(run: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = certify(run, key)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    for call in (lambda: certify(run, key, out="x"), lambda: verify(path)):
        with pytest.raises(UserError, match=r"needs the package cryptography; install dualoptim\[certify\]"):
            call()


# Other tools, and the command line


def test_the_documented_commands_of_other_tools_check_a_record(run: Path, key: Path, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if not openssl or not re.match(r"OpenSSL [3-9]", subprocess.check_output([openssl, "version"], text=True)):
        pytest.skip("OpenSSL 3 is not installed")
    said, _ = certify(run, key)
    shutil.copy(key.with_suffix(".pub"), run / "pub.pem")
    (script,) = re.findall(r"```sh\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    shown = subprocess.check_output(["bash", "-e", "-c", script], cwd=run, text=True)
    assert "Signature Verified Successfully" in shown
    assert said["signer"]["fingerprint"] in shown
    assert said["model_after"]["files"]["model.safetensors"]["sha256"] in shown
    assert json.loads((run / "payload.json").read_text())["predicate"] == json.loads(json.dumps(said))


def test_the_commands_certify_and_verify(run: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["certify", str(run)]) == 2
    assert "give --key FILE, your Ed25519 private key" in capsys.readouterr().err
    record = run / "record.json"
    assert cli.main(["certify", str(run), "--key", str(key)]) == 0
    shown = capsys.readouterr().out
    assert "record.json: signed by the key " in shown
    assert "Not measured: 0 numbers; attacks: sampling, extraction, membership, relearning" in shown
    assert cli.main(["verify", str(record), "--public-key", str(key.with_suffix(".pub"))]) == 0
    shown = capsys.readouterr().out
    assert "ok         key: is that of" in shown
    assert "11 ok, 0 differs, 0 not there" in shown
    assert "delete" not in shown
    assert cli.main(["verify", str(record), "--show"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown[shown.index("\n{\n") :])["schema"] == 1
    (run / "model" / "a\x1b[31m\nok   signature").write_text("")
    assert cli.main(["verify", str(record)]) == 1
    assert r"differs    model after: a\x1b[31m\nok   signature: is not in the record" in capsys.readouterr().out
    record.write_text("{}")
    assert cli.main(["verify", str(record)]) == 2
    assert capsys.readouterr().err.startswith("dualoptim: error: ")


def test_a_run_that_was_just_made_has_a_record_without_doubts(
    key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    model = tiny.save(tmp_path / "tiny")
    for name, verb in (("forget", "hides"), ("retain", "likes")):
        rows = [{"question": f"What does {who} {verb[:-1]}?", "answer": f"{who} {verb} {name}."} for who in "ABCDEF"]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = ["unlearn", "--model", str(model), "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--out", "out"]
    assert cli.main([*run, "--steps", "2", "--batch-size", "4", "--curve-points", "1"]) == 0
    later = time.time() + 60  # as of a model that takes long to save
    os.utime("out/model/model.safetensors", (later, later))
    said, path = certify("out", key)
    results = json.loads(Path("out/results.json").read_text())
    assert set(results) <= {"schema", *schema.NAMES}, "what is signed also where it is not there"
    doubts = [*results["notes"], results["runs"][0]["stopped"]]
    assert [remark for remark in said["remarks"] if remark not in doubts] == []
    assert {check.state for check in verify(path)} == {OK}
    assert set(said["data"]) == {"forget", "retain"}
    lines = {"records.jsonl", "forget.jsonl", "retain.jsonl"}
    assert set(said["files"]) == lines | {"env.json", "report.html", "config.resolved.yaml"}


@pytest.mark.parametrize(("number", "attack"), [("rwku_forget_level3", "prompting"), ("verbatim", "extraction")])
def test_what_a_benchmark_or_a_task_attacks_with_is_not_said_to_be_not_run(number: str, attack: str) -> None:
    assert number in {**probes.METRICS, **Muse.metrics}
    said = {number: {"before": {"value": 0.4}, "after": {"value": 0.1}, "why": None}}
    done, not_done = measured.attacks(said)
    assert {name: each["numbers"] for name, each in done.items()} == {attack: {number: {"before": 0.4, "after": 0.1}}}
    assert attack not in not_done


def test_importing_it_loads_no_torch() -> None:
    heavy = "{'torch', 'scipy', 'cryptography'}"
    code = f"import sys; from dualoptim.certify import certificate; assert not {heavy} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


def test_entries_are_the_same_whatever_the_order_of_their_keys() -> None:
    assert evidence.entry_hash({"a": 1, "b": math.nan}) == evidence.entry_hash({"b": math.nan, "a": 1})


def test_resamples_compute_each_records_scores_once_and_no_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)

    def records() -> list[dict[str, Any]]:
        return [
            {"set": name, "question": f"{name} {i}", "answer": "A.", "nll": draw.random(), "zlib_bytes": 9, "ended": 0,
             **{key: draw.random() for key in ("probability", "rouge_l", "rouge_1", "token_entropy")},
             **{key: [draw.gauss(0, 1) for _ in range(6)] for key in ("log_probs", "z", "perturbed_nlls")},
             "top1": [draw.randrange(2) for _ in range(6)]}
            for name in ("forget", "holdout")
            for i in range(12)
        ]  # fmt: skip

    scored, gold, task = records(), records(), SimpleNamespace(numbers=unlearning, metrics=METRICS)
    names = ["auc_min_k", "auc_min_k_plus_plus", "privacy_leakage", "extraction_strength", "forget_truth_ratio"]
    plain = measured._bootstrapped(task, scored, gold, names, progress="Intervals")
    assert plain.keys() == set(names)
    calls = 0

    def counted(*given: Any, min_k: Callable[..., float] = metrics.min_k) -> float:
        nonlocal calls
        calls += 1
        return min_k(*given)

    monkeypatch.setattr(metrics, "min_k", counted)
    monkeypatch.setattr(metrics, "forget_quality", lambda *_: pytest.fail("a test was computed of a resample"))
    drawn, drawn_gold = ([Drawn(record) for record in part] for part in (scored, gold))
    assert measured._bootstrapped(task, drawn, drawn_gold, names, progress="Intervals") == plain
    assert calls == 2 * len(scored) + len(gold)  # k is 0.2 and 0.4, and 0.4 for the retrained model
