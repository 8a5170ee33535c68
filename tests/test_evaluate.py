"""Models that are scored beside one another: a base, a retrained model, and which tokens they read rows as."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dualoptim import cli, runs, unlearn
from dualoptim.data import Row, encode, question
from dualoptim.errors import UserError
from dualoptim.evaluation.ability import Ability
from dualoptim.one_run import prepared
from dualoptim.tasks.files import Files

from . import tiny, tofu


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and rows to forget and to keep, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    return tiny.with_rows(tmp_path, "ABCD")


def written(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The error, after the progress bars of what a test saves."""
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("dualoptim: error: ")
    return line


def save_with_other_numbers(folder: Path) -> None:
    """The tests' model with its tokens numbered otherwise, and some more of them: as text, it says the same."""
    model, numbers = tiny.model(), torch.randperm(260, generator=torch.Generator().manual_seed(0))
    table = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    table["model"]["vocab"] = {token: int(numbers[i]) for token, i in table["model"]["vocab"].items()}
    for token in table["added_tokens"]:
        token["id"] = int(numbers[token["id"]])
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(table)), eos_token="<|end|>", pad_token="<|end|>"
    )
    other.chat_template = tiny.CHAT_TEMPLATE
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            weight[numbers] = weight.clone()
    model.generation_config.eos_token_id = model.config.eos_token_id = int(numbers[0])
    model.save_pretrained(folder)
    other.save_pretrained(folder)


def numbers(scores: dict[str, Any]) -> dict[str, float]:
    return {name: number for name, number in scores["numbers"].items() if number is not None}


def replies(scores: dict[str, Any]) -> list[str]:
    """All but those that are drawn by the tokens' numbers."""
    return [record["reply"] for record in scores["records"] if "reply" in record and record["set"] != "sampled"]


def test_a_base_is_scored_with_its_own_tokenizer(place: Path) -> None:
    save_with_other_numbers(place / "other")
    command = ["evaluate", "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--scores"]
    assert cli.main([*command, "alone.json", "--model", "model"]) == 0
    with pytest.warns(UserWarning, match="model and other do not read rows as the same tokens, so each is scored"):
        assert cli.main([*command, "both.json", "--model", "model", "--base", "other"]) == 0
    alone, both = (json.loads((place / name).read_text()) for name in ("alone.json", "both.json"))
    for when in ("before", "after"):
        assert numbers(both[when]) == pytest.approx(numbers(alone["after"]), rel=1e-5)
        same = [a == b for a, b in zip(replies(both[when]), replies(alone["after"]), strict=True)]
        assert sum(same) > 0.6 * len(same)  # rounding tells near ties apart
    # With fewer tokens than the model's tokenizer has, of which the rows hold one.
    bigger = tiny.tokenizer()
    bigger.add_tokens(["tea"])
    model = tiny.model()
    model.resize_token_embeddings(len(bigger))
    model.save_pretrained("bigger")
    bigger.save_pretrained("bigger")
    with pytest.warns(UserWarning, match="bigger and model do not read rows as the same tokens"):
        assert cli.main([*command, "third.json", "--model", "bigger", "--base", "model"]) == 0
    third = json.loads((place / "third.json").read_text())
    assert numbers(third["before"]) == pytest.approx(numbers(alone["after"]), rel=1e-5)


def test_a_base_of_the_same_tokens_is_scored_without_a_warning(place: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = "<|user|>"  # which no row is read by
    tiny.model(1).save_pretrained("other")
    tokenizer.save_pretrained("other")
    command = ["evaluate", "--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    assert cli.main([*command, "--base", "other"]) == 0


def shortened(folder: Path, positions: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))


def test_a_base_for_whose_tokenizer_the_rows_are_too_long_is_refused_before_it_is_loaded(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unlearn, "load_model", None)
    shortened(tiny.save(place / "short"), 24)
    command = ["evaluate", "--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    assert cli.main([*command, "--base", "short"]) == 2
    assert "forget.jsonl:1: the row has" in told(capsys)


def test_a_retrained_model_of_other_tokens_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tofu.write(place / "tofu")
    save_with_other_numbers(place / "other")
    arguments = {"data_dir": "tofu", "split": "forget01", "scored_rows": 1}
    command = ["evaluate", "--model", "model", "--task", "tofu", "--task-args", json.dumps(arguments)]
    with monkeypatch.context() as patched:
        patched.setattr(prepared, "load_model", None)
        assert cli.main([*command, "--retrained", "other"]) == 2
        assert "retrained other: does not read the rows as the same tokens as the model model" in told(capsys)
        # Nor is a base of other tokens compared with a retrained model.
        assert cli.main([*command, "--retrained", "model", "--base", "other"]) == 2
        assert "other does not read the rows as the same tokens as model" in told(capsys)
        template = place / "other" / "chat_template.jinja"
        tiny.save(place / "other")
        template.write_text(template.read_text().replace("<|user|>", "<|system|>").replace("{{ m.role }}", "user"))
        assert cli.main([*command, "--retrained", "other"]) == 2
        assert "where only the template differs, --chat-template FILE" in told(capsys)
    assert cli.main([*command, "--retrained", "other", "--chat-template", "model/chat_template.jinja"]) == 0
    # Without a template, or a tokenizer, of its own it is given the model's.
    template.unlink()
    assert cli.main([*command, "--retrained", "other"]) == 0
    for path in (place / "other").glob("tokenizer*"):
        path.unlink()
    assert cli.main([*command, "--retrained", "other"]) == 0


# Models with few positions


@pytest.mark.parametrize("goal", ["refuse", "erase"])
def test_perplexity_is_not_computed_where_the_included_passages_do_not_fit(goal: str, place: Path) -> None:
    shortened(place / "model", 200)
    command = ["unlearn", "--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--goal", goal]
    assert cli.main([*command, "--steps", "2", "--curve-points", "1", "--out", "out"]) == 0
    (entry,) = runs.read_results("out")["runs"]
    for when in ("before", "after"):
        assert entry[when]["perplexity"] is None
        assert entry[when]["whole_probability"] > 0
    why = "the included passages were not read: the model has too few positions for the longest"
    assert entry["not_computed"]["perplexity"] == why


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--task", "facts"],
            r"facts\.jsonl: the row has \d+ tokens .* 96 would cut its answer off; take a model with",
        ),
        (
            ["--forget", "forget.jsonl", "--retain", "retain.jsonl"],
            r"model model: has 96 positions, and to ask the included questions takes up to 1\d\d, .*; take a model",
        ),
    ],
)
def test_a_model_with_too_few_positions_for_what_is_included_is_refused_before_it_is_loaded(
    options: list[str],
    said: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shortened(place / "model", 96)
    monkeypatch.setattr(prepared, "load_model", None)
    assert cli.main(["unlearn", "--model", "model", *options, "--out", "out"]) == 2
    assert re.search(said, told(capsys))
    assert not (place / "out").exists()


def test_rows_held_out_that_do_not_fit_are_refused_before_the_model_is_loaded(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shortened(place / "model", 200)
    rows = [{"text": f"{who} likes tea."} for who in "ABCDEFGH"]
    held_out = Files("forget.jsonl", written(Path("texts.jsonl"), rows)).held_out[0].where
    rows[int(held_out.rpartition(":")[2]) - 1]["text"] *= 20
    written(Path("texts.jsonl"), rows)
    monkeypatch.setattr(prepared, "load_model", None)
    command = ["unlearn", "--model", "model", "--forget", "forget.jsonl", "--retain", "texts.jsonl", "--out", "out"]
    assert cli.main(command) == 2
    assert f"{held_out}: the row has" in (error := told(capsys))
    assert "give --chunk" in error


def test_nobody_is_asked_to_shorten_what_comes_with_the_package() -> None:
    passage = Row((), "Long. " * 20, "passages.jsonl")
    with pytest.raises(
        UserError, match=r"passages.jsonl: the row has \d+ tokens .* off; take a model with more of them$"
    ):
        encode(passage, tiny.tokenizer(), 512, 64)
    with pytest.raises(UserError, match=r"general.jsonl: the row has \d+ tokens .* off; raise max_length$"):
        encode(question("Long? " * 20, "", "general.jsonl"), tiny.tokenizer(), 64)


def test_ability_is_not_measured_by_what_a_model_has_no_positions_for() -> None:
    model = tiny.model()
    model.config.max_position_embeddings = 40
    assert not Ability(model, tiny.tokenizer()).measures
