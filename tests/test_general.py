"""General ability by lm-evaluation-harness: through a stand-in, and through itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dualoptim import cli, runs
from dualoptim.config import RunConfig
from dualoptim.device import scoring_in
from dualoptim.errors import UserError
from dualoptim.evaluation import general
from dualoptim.evaluation.numbers import Numbers
from dualoptim.resolved import resolve

from . import tiny

FOUND = {
    "results": {
        "arc_easy": {"alias": "arc_easy", "acc,none": 0.25, "acc_stderr,none": "N/A", "acc_norm,none": 0.5},
        "gsm8k": {"alias": "gsm8k", "exact_match,flexible-extract": 0.125},
        "wikitext": {"alias": "wikitext", "word_perplexity,none": 31.5},
    },
    "higher_is_better": {
        "arc_easy": {"acc": True},
        "gsm8k": {"exact_match": True},
        "wikitext": {"word_perplexity": False},
    },
    "n-samples": {
        "arc_easy": {"original": 40, "effective": 4},
        "gsm8k": {"effective": 8},
        "wikitext": {"effective": 2},
    },
}
NAMES = ["arc_easy", "gsm8k", "wikitext"]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the harness that gives FOUND; how it was called."""
    called: list[dict[str, Any]] = []

    def simple_evaluate(model: Any, **arguments: Any) -> dict[str, Any]:
        net = model["pretrained"]
        seen = {"modes": {m.training for m in net.modules()}, "dtype": str(net(torch.tensor([[5, 6]])).logits.dtype)}
        called.append({"model": model, "seen": seen, **arguments})
        if arguments["limit"] == 7:
            raise ConnectionError("no route\nat all")
        return FOUND

    manager = SimpleNamespace(TaskManager=lambda include_path: SimpleNamespace(all_tasks=NAMES))
    modules = {
        "lm_eval": SimpleNamespace(simple_evaluate=simple_evaluate),
        "lm_eval.tasks": manager,
        "lm_eval.models": SimpleNamespace(),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=lambda **arguments: arguments),
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(vars(content))
        monkeypatch.setitem(sys.modules, name, module)
    return called


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    tiny.save(tmp_path / "model")
    for name, verb in (("forget", "hide"), ("retain", "like")):
        rows = [{"question": f"What does {who} {verb}?", "answer": f"{who} {verb}s tea."} for who in "ABCD"]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


ROWS = ["--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]


def test_every_metric_of_every_task_is_a_record_with_its_direction(harness: list[dict[str, Any]]) -> None:
    found = general.records(tiny.model(), tiny.tokenizer(), NAMES, 4)
    assert [(r["task"], r["metric"], r["value"], r["samples"]) for r in found] == [
        ("arc_easy", "acc", 0.25, 4),
        ("arc_easy", "acc_norm", 0.5, 4),
        ("gsm8k", "exact_match, flexible-extract", 0.125, 8),
        ("wikitext", "word_perplexity", 31.5, 2),
    ]
    assert [r["higher_is_better"] for r in found] == [True, True, True, False]
    assert general.values([runs.hashed(r) for r in found]) == general.values(found)  # as a private run leaves them
    assert (harness[0]["tasks"], harness[0]["limit"]) == (NAMES, 4)
    assert general.records(tiny.model(), tiny.tokenizer(), [], None) == []


@pytest.mark.parametrize(("bf16", "dtype"), [(False, "torch.float32"), (True, "torch.bfloat16")])
def test_ability_is_measured_in_the_precision_of_scores_whatever_the_model_was_trained_in(
    harness: list[dict[str, Any]], bf16: bool, dtype: str
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(tiny.model().train())
    with scoring_in(bf16):
        general.records(model, tiny.tokenizer(), NAMES, 4)
    (call,) = harness
    assert call["seen"] == {"modes": {False}, "dtype": dtype}
    assert call["model"]["mixed_precision_dtype"] == (torch.bfloat16 if bf16 else None), "its own autocast is the inner"
    assert model.training


def test_a_file_of_ones_own_task_that_changed_is_another_run(harness: list[dict[str, Any]], place: Path) -> None:
    rows = {"model": "model", "forget": "forget.jsonl", "retain": "retain.jsonl", "general": False, "steps": 1}
    found = []
    for few in (1, 2):
        (place / "mine.yaml").write_text(f"task: gsm8k\nnum_fewshot: {few}\n")
        (of,) = resolve([RunConfig(**rows, lm_eval=["mine.yaml", "arc_easy"])])
        found.append(of.identity)
    assert [name for name in found[0] if found[0][name] != found[1][name]] == ["task_of_lm_eval"]


def test_a_run_has_them_before_and_after_beside_the_tasks_own_numbers_and_from_its_records_again(
    harness: list[dict[str, Any]], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*ROWS, "--lm-eval", '["arc_easy", "wikitext"]', "--lm-eval-limit", "4", "--steps", "1"]
    assert cli.main(["unlearn", *options, "--batch-size", "2", "--curve-points", "1", "--out", "out"]) == 0
    results = json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))
    (entry,) = results["runs"]
    for numbers in (entry["before"], entry["after"]):
        assert set(numbers) == set(results["metrics"])
        assert numbers["arc_easy_acc_norm"] == 0.5
        assert numbers["forget_probability"] is not None
    assert results["metrics"]["wikitext_word_perplexity"]["better"] == "lower"
    assert "General ability (lm-eval)" in (place / "out" / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert cli.main(["evaluate", "--from-records", "out"]) == 0
    assert "arc_easy, acc_norm" in capsys.readouterr().out
    assert len(harness) == 2
    assert cli.main(["evaluate", *ROWS, "--lm-eval", '["gsm8k"]']) == 0
    assert "gsm8k, exact_match, flexible-extract" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--lm-eval", '["arc_eazy"]'], "unknown lm_eval task 'arc_eazy'; did you mean 'arc_easy'?"),
        (["--lm-eval", '["mine.yaml"]'], "lm_eval mine.yaml: there is no such file"),
        (["--lm-eval", '["arc_easy"]', "--lm-eval-limit", "7"], "lm_eval arc_easy: no route; check the connection"),
    ],
)
def test_what_cannot_be_measured_is_told(
    options: list[str], told: str, harness: list[dict[str, Any]], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["unlearn", *ROWS, *options, "--out", "out"]) == 2
    assert told in capsys.readouterr().err
    assert not (place / "out").exists()


def test_without_the_harness_that_is_told_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"needs the package lm-eval; install dualoptim\[lm-eval\]"):
        general.check(["arc_easy"])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra lm-eval is not installed")
@pytest.mark.filterwarnings("ignore")  # the harness's own and its data library's
def test_the_harness_itself_on_a_task_of_ones_own(place: Path) -> None:
    rows = [{"ask": f"{a} plus {b} is", "right": str(a + b)} for a in range(3) for b in range(3)]
    (place / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "sums.yaml").write_text(
        f"task: own_sums\ndataset_path: json\ndataset_kwargs: {{data_files: {place / 'sums.jsonl'}}}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: '{{ask}}'\ndoc_to_target: '{{right}}'\n"
        "doc_to_choice: ['0', '1', '2', '3', '4']\nmetric_list: [{metric: acc, higher_is_better: true}]\n"
    )
    found = general.records(tiny.model(), tiny.tokenizer(), [str(place / "sums.yaml")], 5)
    (record,) = found
    assert (record["task"], record["metric"], record["samples"]) == ("own_sums", "acc", 5)
    assert record["value"] * 5 == pytest.approx(round(record["value"] * 5))


def test_a_number_that_is_not_finite_is_none_with_its_reason() -> None:
    numbers = Numbers({"p": float("nan"), "q": 1.0, "r": None}, {"r": "its own"})
    task: Any = SimpleNamespace(metrics={}, numbers=lambda *_: numbers)
    (found, missing), _ = general.scored(task, [], None)
    assert found == {"p": None, "q": 1.0, "r": None}
    assert missing == {"p": "what the model computes is not finite for all of its rows", "r": "its own"}
