"""A search for settings: what is tried, what is chosen and on which rows, and that one that was killed goes on."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("optuna")

from dualoptim import cli, goals, resolve, runs, tune
from dualoptim.config import RunConfig
from dualoptim.errors import UserError
from dualoptim.folder import ENTRY

from . import tiny, tofu

METHODS = ["DualOptim+", "Alternating AdamW"]
TASK = {"split": "forget01", "retain_rows": 2, "held_out_rows": 2}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    tofu.write(tmp_path / "tofu")
    tiny.save(tmp_path / "model")
    return tmp_path


GIVEN: dict[str, Any] = {
    "task": "tofu", "data_dir": "tofu", "task_args": TASK, "model": "model", "steps": 2, "batch_size": 2,
    "lr": 1e-2, "forget_loss": "NPO", "out": "out",
}  # fmt: skip
SPACE: dict[str, Any] = {"lr": [1e-3, 1e-1], "ratio": ["1:1", "1:5"], "forget_loss": ["NPO"], "methods": METHODS}


def search(*options: str, space: dict[str, Any] = SPACE, trials: int = 2) -> int:
    given = [f"--{key.replace('_', '-')}={v if isinstance(v, str) else json.dumps(v)}" for key, v in GIVEN.items()]
    return cli.main(["tune", *given, f"--space={json.dumps(space)}", f"--trials={trials}", *options])


def trials() -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in Path("out").glob(f"*/{ENTRY}")}


def test_a_search_leaves_a_front_and_a_recipe_that_runs_and_goes_on_where_it_was_killed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert search() == 0
    results, first = runs.read_results("out"), trials()
    assert sorted(first) == sorted(
        f"{m}-trial00{i}-seed0" for m in ("dualoptim-plus", "alternating-adamw") for i in (1, 2)
    )
    configs = {name: entry["run"]["config"] for name, entry in first.items()}
    for name, config in configs.items():  # the recipe forgets part 1
        assert config["task_args"]["part"] == 2
        assert 1e-3 <= config["lr"] <= 1e-1
        assert (config["lr"] == 1e-2) == ("trial001" in name)
    assert any(point["front"] for point in results["points"])
    scores = {}
    for name, entry in first.items():
        was, now = entry["run"]["before"], entry["run"]["after"]
        gone = max(0, 1 - now["forget_probability"] / was["forget_probability"])
        kept = min(1, now["held_out_probability"] / was["held_out_probability"])
        scores[name] = statistics.harmonic_mean([gone, kept])
    best = max(scores.values())
    assert results["chosen"]["score"] == pytest.approx(best)
    chosen = results["chosen"]
    (name,) = (n for n, c in configs.items() if c["lr"] == chosen["settings"]["lr"] and scores[n] == best)
    assert first[name]["run"]["method"] == chosen["method"]
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert "on other rows than the recipe" in page
    assert "2 of each method" in page
    assert ">chosen<" in page
    text = Path("out/recipe.yaml").read_text(encoding="utf-8")
    assert text.startswith("# Chosen: ")
    recipe = yaml.safe_load(text)
    assert recipe["task_args"] == TASK  # its own rows
    assert not {"fast", "save_model", "out"} & set(recipe)
    capsys.readouterr()
    assert cli.main(["unlearn", "--recipe", "out/recipe.yaml", "--out", "run", "--dry-run"]) == 0
    assert f"lr: {recipe['lr']}" in capsys.readouterr().out

    # Killed while the last trial ran, and before anything was written of all of them.
    (Path("out/alternating-adamw-trial002-seed0") / ENTRY).unlink()
    for name in ("results.json", "report.html", "recipe.yaml"):
        Path("out", name).unlink()
    assert search("--resume") == 0
    assert {name: entry["run"]["after"] for name, entry in trials().items()} == {
        name: entry["run"]["after"] for name, entry in first.items()
    }
    assert Path("out/recipe.yaml").read_text(encoding="utf-8") == text
    assert search("--resume", trials=1) == 0  # fewer than there are
    assert (runs.read_results("out")["planned"], len(trials())) == (4, 4)
    assert "All 4 runs are finished." in Path("out/report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert search("--resume", space={**SPACE, "lr": [1e-3, 1e-2]}) == 2
    assert "another space" in capsys.readouterr().err
    assert search() == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_trial_is_certified_by_its_own_records_by_its_number_and_by_its_folder(tmp_path: Path) -> None:
    cryptography = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    from cryptography.hazmat.primitives import serialization

    from dualoptim.certify.certificate import OK, certify, verify

    key = tmp_path / "key.pem"
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key.write_bytes(cryptography.Ed25519PrivateKey.generate().private_bytes(*form))
    key.chmod(0o600)
    assert search() == 0
    for number, name in enumerate((f"dualoptim-plus-trial00{i}-seed0" for i in (1, 2)), 1):
        said, path = certify("out", key, number=number)
        assert path == Path("out", name, "record.json").resolve()
        assert {"records.jsonl", ENTRY} <= set(said["files"])
        assert not any("records.jsonl is not there" in remark for remark in said["remarks"])
        assert said["run"]["recipe"]["lr"] == trials()[name]["run"]["config"]["lr"]
        again, _ = certify(Path("out", name), key, out=tmp_path / f"{number}.json")
        assert again["run"]["results_sha256"] == said["run"]["results_sha256"]
        config, _ = runs.read_records(Path("out", name))
        assert config["lr"] == said["run"]["recipe"]["lr"]
        of_run = [check for check in verify(path) if check.item.startswith("run: ")]
        assert {check.state for check in of_run} == {OK}
    assert search("--resume", trials=3) == 0  # which may choose another
    assert not [check for check in verify(path) if check.state == "differs"]


def test_a_search_on_rows_that_changed_is_refused_before_a_trial_and_can_go_on_with_the_old_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    space = {**SPACE, "methods": METHODS[:1]}
    assert search(space=space, trials=1) == 0
    capsys.readouterr()
    before = {path: path.read_text(encoding="utf-8") for path in Path("tofu").iterdir()}
    for path, text in before.items():
        path.write_text(text.replace("tea.", "rye."), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr("dualoptim.unlearn.prepare", never)
        assert search("--resume", space=space) == 2
    assert "holds a run of another task (its contents changed" in capsys.readouterr().err
    for path, text in before.items():
        path.write_text(text, encoding="utf-8")
    assert search("--resume", space=space) == 0
    assert len(trials()) == 2


def test_a_folder_is_begun_or_emptied_once_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise UserError("model: could not be loaded")

    space = {**SPACE, "methods": METHODS[:1]}
    with monkeypatch.context() as patch:
        patch.setattr("dualoptim.unlearn.prepare", broken)
        assert search(space=space, trials=1) == 2
    assert not list(Path("out").glob("*.*"))
    assert search(space=space, trials=1) == 0
    said = Path("out", "env.json")
    said.write_text(said.read_text(encoding="utf-8").replace('"threads"', '"threads of then"'), encoding="utf-8")
    assert search("--resume", space=space, trials=1) == 0
    assert "threads of then" in said.read_text(encoding="utf-8")  # it tells of the processes that ran something
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr("dualoptim.unlearn.prepare", broken)
        assert search("--overwrite", space={**space, "lr": [1e-3, 1e-2]}, trials=1) == 2
    assert "could not be loaded" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
    assert search("--overwrite", space={**space, "lr": [1e-3, 1e-2]}, trials=1) == 0
    assert runs.read_results("out")["grid"]["lr"] == [1e-3, 1e-2]
    assert len(trials()) == 1


@pytest.mark.parametrize("method", ["Joint AdamW", "DualOptim", "DualOptim+", "PDU"])
def test_a_recipe_has_nothing_that_its_method_does_not_read(method: str) -> None:
    config = RunConfig(
        task="tofu", task_args=TASK, data_dir="tofu", multiplier_start=100.0, multiplier_warmup=0.5, lr_scales="equal",
        max_update=2.0, base_weights={"forget": 3.0},
    )  # fmt: skip
    (chosen,) = resolve.methods_of(config, [method], [0])
    recipe = yaml.safe_load(tune.recipe(config, chosen, {"lr": 1e-4}, ["Chosen."]))
    made = RunConfig(**recipe)
    resolve.check_read([made])
    resolve.check(made)
    assert made.method == method
    assert made.multiplier_start == (100.0 if method == "PDU" else None)
    assert ("lr_scales" in recipe, "max_update" in recipe) == (method.startswith("Dual"), method == "DualOptim+")


def test_ones_own_rows_are_searched_for_their_goals_loss_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for name, verb in (("forget", "hides"), ("retain", "likes")):
        rows = [{"question": f"What does {who} {verb[:-1]}?", "answer": f"{who} {verb} tea."} for who in "ABCDEFGHIJ"]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    own = ["tune", "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--general", "false", "--model", "model",
           "--steps", "2", "--batch-size", "2", "--out", "own", "--trials", "1", "--space", "{methods: [DualOptim+]}",
           "--private", "true"]  # fmt: skip
    assert cli.main(own) == 0
    results = runs.read_results("own")
    assert results["plane"] == ["forget_probability", "held_out_probability"]
    assert set(results["grid"]) == {"lr", "ratio"}
    assert any("the very rows" in note for note in results["notes"])  # without general, the model is asked nothing
    recipe = yaml.safe_load(Path("own/recipe.yaml").read_text(encoding="utf-8"))
    assert (recipe["forget_loss"], recipe["until"], recipe["pause"]) == ("IDK", None, False)
    assert "es tea" not in "".join(path.read_text(encoding="utf-8") for path in Path("own").glob("*.*"))


def test_what_a_goal_chooses_follows_from_the_settings_of_each_trial() -> None:
    for name in ("forget", "retain"):
        rows = [{"question": f"What does {who} {name}?", "answer": f"{who} {name}s tea."} for who in "ABCDEFGHIJ"]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = {"forget": "forget.jsonl", "retain": "retain.jsonl", "model": "model", "goal": "erase", "out": "own"}
    space = {"ratio": ["1:1", "1:5"], "batch_size": [2, 8], "max_update": [1.0, None], "methods": METHODS}
    for until in ({}, {"until": 0.1}):
        search = tune.planned({**given, **until}, space)
        for method, first in search.trials_of.items():
            for ratio, batch_size in (("1:1", 8), ("1:5", 2), ("1:1", 2)):
                searched = {"ratio": ratio, "batch_size": batch_size, "lr": 1e-3}
                trial = search.with_settings(first, searched)
                alone = goals.chosen({**given, **searched})
                assert (trial.steps, trial.lr, trial.method) == (alone.steps, 1e-3, method)
                assert trial.curve_points == (alone.curve_points if until else 0)
                assert (trial.until, trial.keep_at_least, trial.pause) == (until.get("until"), None, False)
                recipe = tune.recipe(search.with_settings(search.config, searched), trial, searched, [])
                assert (
                    yaml.safe_load(recipe).items() >= {"steps": alone.steps, "curve_points": alone.curve_points}.items()
                )
        assert first.steps == goals.chosen({**given, "ratio": "1:1", "batch_size": 8}).steps
    fixed = tune.planned({**given, "steps": 7}, {**space, "steps": [7, 240]})
    (first, _) = fixed.trials_of.values()
    assert [fixed.with_settings(first, {"steps": n, "ratio": "1:5"}).steps for n in (7, 240)] == [7, 240]
    recipe = tune.recipe(fixed.with_settings(fixed.config, {"steps": 240}), first, {"steps": 240}, [])
    assert yaml.safe_load(recipe)["curve_points"] == 60


def test_a_dry_run_shows_space_and_trials_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert search("--dry-run", "--minutes", "2") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "lr from 0.001 to 0.1; ratio 1:1, 1:5; forget_loss NPO; methods DualOptim+, Alternating AdamW" in shown
    assert "at most 2 trials of each method and 2 minutes" in shown
    assert not Path("out").exists()


def test_a_dry_run_of_a_search_checks_every_value_of_the_space(capsys: pytest.CaptureFixture[str]) -> None:
    assert search("--dry-run", space={**SPACE, "forget_loss": ["NPO", "AltPO"]}) == 2
    assert "AltPO asks the model for answers of its own first" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("space", "how", "words"),
    [
        ({"lrr": [1e-3, 1e-2]}, {}, "did you mean 'lr'"),
        ({"lr": [1e-3]}, {}, "lowest, highest"),
        ({"lr": [1e-2, 1e-3]}, {}, "lowest, highest"),
        ({"lr": [0, 1e-3]}, {}, "lowest, highest"),
        ({"ratio": []}, {}, "must have a list of values"),
        ({"model": ["a", "b"]}, {}, "makes another start"),
        ({"methods": ["AdamX"]}, {}, "unknown method"),
        ({"methods": ["Alone"]}, {}, "no trade to tune"),
        ({}, {"trials": 0}, "trials must be > 0"),
        ({}, {"minutes": -1}, "minutes must be > 0"),
        ({}, {"tune_on": {"part": 11}}, "parts 1 to 10"),
    ],
)
def test_a_search_that_cannot_be_is_told(space: dict[str, Any], how: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        tune.planned(GIVEN, space, **how)


def test_what_a_trial_does_not_measure_is_left_to_the_recipe_and_checked_before() -> None:
    asked = {"attacks": ["leak", "relearn"], "relearn_lr": 1e-3}
    search = tune.planned({**GIVEN, **asked}, SPACE)
    for trial in search.trials_of.values():
        assert (trial.attacks, trial.relearn_lr, trial.fast) == ([], None, True)
    (trial, *_) = search.trials_of.values()
    recipe = yaml.safe_load(tune.recipe(search.config, trial, {"lr": 1e-2}, []))
    assert recipe.items() >= asked.items()
    tune.checked(search, resume=False, overwrite=False, inputs=None)  # where fast runs refuse attacks
    for wrong, words in (
        ({"attacks": ["leek"]}, "did you mean 'leak'"),
        ({"relearn_lr": 1e-3}, "relearn is not asked for"),
        ({"probes": ["rwkuu"]}, "did you mean 'rwku'"),
        ({"probe_limit": 3}, "there are no questions to ask"),
    ):
        with pytest.raises(UserError, match=words):
            tune.planned({**GIVEN, **wrong}, SPACE)


def test_without_optuna_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"install dualoptim\[tune\]"):
        tune.planned(GIVEN, {})


def test_what_is_searched_by_default_lies_around_the_configs_own() -> None:
    found = tune.planned(GIVEN, {})
    assert found.space == {"lr": [1e-3, 1e-1], "ratio": ["1:5", "1:1"], "forget_loss": ["NPO", "IDK"]}
    assert list(found.trials_of) == ["Joint AdamW", "Alternating AdamW", "DualOptim", "DualOptim+"]
    assert found.trials == tune.TRIALS
    assert all(config.lr == 1e-2 and config.fast for config in found.trials_of.values())
    outside = tune.planned(GIVEN, {"lr": [1e-4, 1e-3], "max_update": [None, 1.0]})
    assert outside.trials_of["DualOptim+"].lr == pytest.approx(10**-3.5, rel=1e-2)
    assert "max_update" in outside.of("DualOptim+")
    assert "max_update" not in outside.of("DualOptim")  # which does not read it


def test_proposals_follow_from_the_history_alone_and_near_what_was_good() -> None:
    """Of a trade that is best at lr 1e-3 with NPO, later trials are nearer to it than the first ones by chance."""
    space = {"lr": [1e-5, 1e-1], "forget_loss": ["NPO", "IDK"]}
    history: list[tuple[dict[str, Any], tuple[float, float]]] = []
    for _ in range(25):
        settings = tune.proposed(space, history, seed=3)
        assert settings == tune.proposed(space, history, seed=3)
        assert 1e-5 <= settings["lr"] <= 1e-1
        off = abs(math.log10(settings["lr"]) + 3) / 2 + (settings["forget_loss"] == "IDK")
        history.append((settings, (min(1.0, off / 2), max(0.0, 1 - off / 2))))
    off = [found[0] for _, found in history]
    assert statistics.fmean(off[-10:]) < 0.6 * statistics.fmean(off[: tune.FIRST])
    assert len({settings["lr"] for settings, _ in history}) > 20


def test_every_method_is_compared_by_as_many_trials_and_minutes_end_whole_rounds(tmp_path: Path) -> None:
    config = RunConfig(out=str(tmp_path))
    methods = dict.fromkeys(("A", "B"), config)
    found = tune._Trials(tune.Search(config, methods, {}, 2, 1.0, ""), tmp_path, None)  # type: ignore[arg-type]
    assert list(found.missing()) == [(1, "A"), (1, "B"), (2, "A"), (2, "B")]
    for name, seconds in (("a-trial001-seed0", 20.0), ("a-trial002-seed0", 10.0), ("b-trial001-seed0", 5.0)):
        found.done[name], found.seconds[name] = None, seconds  # type: ignore[assignment]
    assert list(found.missing()) == [(2, "B")]
    assert found.planned() == 4
    for most, planned in ((1, 3), (3, 6), (None, None)):
        found.search = found.search._replace(trials=most)
        assert found.planned() == planned
    found.search = found.search._replace(trials=2)
    assert found.round_takes() == 25.0
    assert found.compared() == ["a-trial001-seed0", "b-trial001-seed0"]
    assert [tune._is_over(found.search, seconds, 25.0) for seconds in (34.0, 36.0)] == [False, True]
    assert not tune._is_over(found.search, 100.0, 0.0)  # before the first round


def test_scores_are_harmonic_means_of_what_is_forgotten_and_kept() -> None:
    assert tune.score(0.1, 0.4, (0.5, 0.8)) == pytest.approx(statistics.harmonic_mean([0.8, 0.5]))
    assert tune.score(0.0, 0.9, (0.5, 0.8)) == 1.0  # kept more than all
    assert tune.score(0.6, 0.8, (0.5, 0.8)) == 0.0  # learned what was to be forgotten
    assert tune.score(None, 0.8, (0.5, 0.8)) == tune.score(0.1, None, (0.5, 0.8)) == 0.0
