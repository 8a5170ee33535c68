"""Model cards and uploads: what a card says, what it must not say, and that an upload comes last and loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml

from dualoptim import cli, publish
from dualoptim.command_line import arguments
from dualoptim.config import GOALS_OWN, RunConfig
from dualoptim.errors import UserError
from dualoptim.publish import Push
from dualoptim.report import card

from . import tiny

METRICS = {
    "forget_answered": {"label": "answered | as given", "better": "lower", "format": ".0%", "group": ""},
    "perplexity": {"label": "perplexity", "better": "lower", "format": ".1f", "group": "To keep"},
    "cosine": {"label": "cosine", "better": "lower", "format": ".3f", "group": ""},
}


def results(**config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    entry = {
        "method": "DualOptim+", "seed": 3, "verdict": "Forgotten.", "stopped": None,
        "config": RunConfig(forget="secret/ada.jsonl", out="secret", lr=2e-4).replace(**config).as_dict(),
        "before": {"forget_answered": 1.0, "perplexity": 20.0, "cosine": None},
        "after": {"forget_answered": 0.25, "perplexity": 21.04, "cosine": None},
        "not_computed": {"cosine": "no embedder was given"},
        "fingerprints": {"versions": "dualoptim 1, torch 2"},
    }  # fmt: skip
    made = {
        "task": "files", "private": bool(config.get("private")), "metrics": METRICS,
        "counts": {"forget_answered": 20}, "notes": ["2 rows of secret/ada.jsonl were left out."], "runs": [entry],
    }  # fmt: skip
    return made, entry


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_has_numbers_with_intervals_what_was_not_computed_the_recipe_and_the_hubs_metadata() -> None:
    made, entry = results(model="smollm2")
    text = card.of(made, entry, "model")
    assert front_matter(text) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["unlearning", "machine-unlearning", "dualoptim"],
        "license": "unknown",
    }
    # Wilson's interval of 5 of 20: center (0.25 + z²/40) / (1 + z²/20), half width 1.96 · 0.1030 of it.
    assert "| answered \\| as given ↓ | 100% (84–100) | 25% (11–47) | 20 |" in text
    assert "| perplexity ↓, to keep | 20.0 | 21.0 |  |" in text
    assert "- cosine: no embedder was given" in text
    assert "what was measured" in text
    assert "anything was deleted" in text
    assert "- 2 rows of ada.jsonl were left out." in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    chosen = {key: entry["config"][key] for key in GOALS_OWN}
    assert recipe == {"model": "smollm2", "forget": "ada.jsonl", **chosen}
    assert recipe["lr"] == 2e-4
    assert "secret/" not in text


@pytest.mark.parametrize(
    "settings",
    [
        {},  # all as the defaults have them, where the goal chooses others
        {"goal": "erase", "until": 0.1, "keep_at_least": None, "pause": True, "curve_points": 2, "lr": 1e-5},
        {"fast": True, "save_model": True, "curve_points": 3},
        {"forget": None, "retain": None, "task": "tofu", "until": 0.2, "curve_points": 7, "save_every": 5},
    ],
    ids=["defaults", "erase", "fast", "task"],
)
def test_the_recipe_of_a_card_gives_the_settings_of_the_run_whatever_a_goal_would_choose(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "model")
    for name, who in (("my", "Ada"), ("keep", "Ben")):
        row = {"question": f"What does {who} sell?", "answer": f"{who} sells tea."}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row), encoding="utf-8")
    made, entry = results(**{"model": "model", "forget": "my.jsonl", "retain": "keep.jsonl", **settings})
    text = card.of(made, entry, "model")
    (tmp_path / "recipe.yaml").write_text(text.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    parsed = arguments.parse(arguments.parser("unlearn"), ["--recipe", "recipe.yaml"])
    places = dict.fromkeys(card.PLACES)
    assert {**arguments.config_of(parsed).as_dict(), **places} == {**entry["config"], **places}


def test_a_private_card_names_no_file_and_an_adapters_has_its_own_numbers() -> None:
    made, entry = results(private=True, lora_rank=4, model="someone/some-model")
    entry["merging"] = {"unmerged": {**entry["after"], "forget_answered": 0.3}, "merged": entry["after"]}
    text = card.of(made, entry, "adapter")
    assert "ada" not in text.replace("adapter", "")
    assert "secret" not in text
    assert "| 30% (15–52) |" in text
    said = front_matter(text)
    assert (said["library_name"], said["base_model_relation"]) == ("peft", "adapter")
    assert said["base_model"] == "someone/some-model"
    merged = card.of(made, entry, "model")
    assert "merged into it" in merged
    assert "| 25% (11–47) |" in merged


def test_a_card_of_what_forgot_nothing_does_not_speak_of_unlearning() -> None:
    made, entry = results()
    text = card.of({**made, "forgets": False}, entry, "model")
    assert front_matter(text)["tags"] == ["dualoptim"]
    assert "trained with DualOptim+\n" in text
    assert "unlearned" not in text
    assert "deleted" not in text


@pytest.mark.parametrize("private", [False, True])
def test_a_card_has_no_folder_and_no_subject_of_the_questions_that_were_asked(private: bool) -> None:
    folder = "/home/jane/clients"
    made, entry = results(
        private=private, probes=["rwku"], probe_subjects=["Jane Roe"], probes_dir=f"{folder}/probes",
        lm_eval=[f"{folder}/patient.yaml"], task_args={"deeper": {"paths": [[f"{folder}/x"]], "who": ["Jane Roe"]}},
    )  # fmt: skip
    entry["verdict"] = "Jane Roe is forgotten."
    entry["not_computed"]["cosine"] = f"{folder}/probes has no question on Jane Roe"
    made["notes"] = ["Jane Roe is not known."]
    text = card.of(made, entry, "model")
    assert "jane" not in text.lower()
    assert ("patient.yaml" in text) != private


def test_an_adapter_of_a_model_that_only_the_cache_has_says_so_and_is_not_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    Hub(monkeypatch)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    said = {"peft_type": "LORA", "base_model_name_or_path": "someone/some-model"}
    (adapter / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    of_cache = tmp_path / "of_cache"
    of_cache.mkdir()
    said["base_model_name_or_path"] = str(tmp_path / "cache/memorised/0123")
    (of_cache / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    settings: list[dict[str, Any]] = [
        {"model": "someone/some-model", "lora_rank": 2, "memorise": True},
        {"model": str(adapter), "lora_rank": 2},
        {"model": str(of_cache)},
    ]
    for config in settings:
        assert card.NEEDS_CACHE in card.of(*results(**config), "adapter")
        assert card.NEEDS_CACHE not in card.of(*results(**config), "model")
        publish.check(Push("me/it"), RunConfig(**config))
        for push, more in ((Push("me/it", adapter=True), {}), (Push("me/it"), {"merge": False})):
            with pytest.raises(UserError, match="in the cache of this machine alone"):
                publish.check(push, RunConfig(**config, **more))
    for config in ({"model": "someone/some-model", "lora_rank": 2}, {"model": str(adapter)}):
        assert card.NEEDS_CACHE not in card.of(*results(**config), "adapter")
        publish.check(Push("me/it", adapter=True), RunConfig(**config))


def test_a_start_models_own_card_says_its_license_and_a_folder_is_no_base_of_the_hubs(tmp_path: Path) -> None:
    place = tmp_path / "start"
    place.mkdir()
    assert card.license_of(str(place)) == "unknown"
    (place / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Start\n", encoding="utf-8")
    said = front_matter(card.of(*results(model=str(place)), "model"))
    assert said["license"] == "apache-2.0"
    assert "base_model" not in said
    (place / "README.md").write_text("---\nlicense: [a\n---\n", encoding="utf-8")
    assert card.license_of(str(place)) == "unknown"


class Hub:
    """The hub's side of an upload."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, public: bool = False, error: Exception | None = None
    ) -> None:
        self.made: list[Any] = []
        self.files: dict[str, bytes] = {}
        self.public, self.error = public, error
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
        monkeypatch.setattr(huggingface_hub, "create_repo", self.create)
        monkeypatch.setattr(huggingface_hub, "upload_folder", self.upload)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)

    def create(self, repo: str, *, private: bool, exist_ok: bool) -> str:
        self.made.append((repo, private, exist_ok))
        return f"https://hub/{repo}"

    def model_info(self, repo: str) -> Any:
        return SimpleNamespace(private=not self.public)

    def upload(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.error is not None:
            raise self.error
        self.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}


def test_a_private_run_leaves_cards_without_texts_is_certified_and_uploaded_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    tiny.save(tmp_path / "start")
    for name, verb in (("forget", "hides"), ("retain", "likes")):
        rows = [{"question": f"What does {who} {verb[:-1]}?", "answer": f"{who} {verb} tea."} for who in "ABCD"]
        (tmp_path / f"zorbulax-{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    arguments = ["unlearn", "--model", "start", "--forget", "zorbulax-forget.jsonl", "--retain",
                 "zorbulax-retain.jsonl", "--general", "false", "--private", "true", "--lora-rank", "2", "--steps", "2",
                 "--batch-size", "2", "--until", "null", "--keep-at-least", "null", "--curve-points", "1",
                 "--out", "out"]  # fmt: skip
    hub = Hub(monkeypatch, error=ConnectionError("no route"))
    assert cli.main([*arguments, "--push-to-hub", "me/quiet"]) == 2
    said = capsys.readouterr().err
    assert "the upload failed (ConnectionError: no route); all of it is in out" in said
    assert Path("out/report.html").is_file()
    for kind in ("model", "adapter"):
        text = Path("out", kind, "README.md").read_text(encoding="utf-8")
        assert "es tea" not in text
        assert "zorbulax" not in text
        assert "forget: withheld" in text
        assert "not computed" in text.lower()

    written = {
        path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.parent.name in ("model", "adapter")
    }
    hub = Hub(monkeypatch)
    assert cli.main([*arguments, "--resume", "--push-to-hub", "me/quiet"]) == 0
    assert "Uploaded: https://hub/me/quiet" in capsys.readouterr().out
    assert hub.made == [("me/quiet", True, True)]
    assert set(hub.files) == {path.name for path in Path("out/model").iterdir()} >= {"README.md", "model.safetensors"}
    assert {path: path.stat().st_mtime_ns for path in written} == written  # nothing was made again

    hub = Hub(monkeypatch, public=True)
    with pytest.raises(UserError, match="a public repository has that name"):
        publish.push(Push("me/loud"), "out")
    assert not hub.files
    hub = Hub(monkeypatch, public=True)
    publish.push(Push("me/loud", public=True, adapter=True), "out")
    assert hub.made == [("me/loud", False, True)]
    assert "adapter_model.safetensors" in hub.files

    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    Path("key.pem").write_bytes(pem)
    Path("key.pem").chmod(0o600)
    assert cli.main(["certify", "out", "--key", "key.pem"]) == 0
    assert cli.main(["verify", "out/record.json"]) == 0
    Path("out/model/README.md").write_text("# With a license of its own\n", encoding="utf-8")
    assert cli.main(["verify", "out/record.json"]) == 0
    Path("out/model/more.bin").write_bytes(b"\0")
    assert cli.main(["verify", "out/record.json"]) == 1


@pytest.mark.parametrize(
    ("push", "config", "words"),
    [
        (Push("a/b/c"), {}, "no name of a repository"),
        (Push("me/it"), {"save_model": False}, "saves no model"),
        (Push("me/it", public=True), {"private": True}, "the run is private"),
        (Push("me/it"), {"private": True, "model": "tiny"}, "holds words of its rows"),
    ],
)
def test_what_cannot_be_uploaded_is_told_before_the_run(
    push: Push, config: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub(monkeypatch)
    publish.check(Push("me/it", public=True), RunConfig())
    with pytest.raises(UserError, match=words):
        publish.check(push, RunConfig(**config))


def test_nobody_who_is_logged_in_is_told_and_so_are_options_without_a_repository(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        publish.check(Push("me/it"), RunConfig())
    assert cli.main(["unlearn", "--task", "facts", "--push-public", "true"]) == 2
    assert "add --push-to-hub REPO" in capsys.readouterr().err
