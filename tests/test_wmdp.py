"""WMDP as a task: corpora of a folder and of the hub, what of a text is trained on, RMU on some matrices alone."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from dualoptim import cli, runs
from dualoptim.command_line import recipe_files
from dualoptim.data import Draw, ObjectiveRows, Row, encode
from dualoptim.errors import UserError
from dualoptim.evaluation import general
from dualoptim.rows import chunks
from dualoptim.tasks.wmdp import NOT_ASKED, Wmdp

from . import families, tiny

TRAINED = r"layers\.[567]\.mlp\.down_proj"
CORPORA = ("bio-forget-corpus", "cyber-forget-corpus", "wikitext")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of nine layers."""
    folder = tmp_path_factory.mktemp("models") / "nine"
    config = tiny.model().config.to_dict() | {"num_hidden_layers": 9}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with corpora in miniature under data/wmdp/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    families.write(tmp_path / "data")
    return tmp_path


def texts(rows: Any) -> list[str]:
    return [row.answer for row in rows]


# What of a text is trained on


@pytest.mark.parametrize(("size", "end"), [(2, 1), (3, 2), (9, 8), (10, 9), (11, 9), (15, 14), (26, 20), (27, 25)])
def test_a_beginning_goes_as_far_as_its_tokens_or_to_a_word_in_its_second_half(size: int, end: int) -> None:
    text, words = "one three five seven nine", tiny.tokenizer()  # a byte is a token, before them one that begins
    row = Row((), text, "here")
    found = chunks.beginning(row, words, size)
    assert found.answer == text[:end]
    if end == len(text):
        assert found is row
    else:
        assert encode(found, words, 512).labels[-1] != words.eos_token_id  # it is no end
    assert len(encode(found, words, 512).input_ids) <= size


def test_the_first_texts_are_trained_on_and_the_next_ones_held_out(place: Path, model: Path) -> None:
    task = Wmdp("data", documents=3, scored=2, tokens=8, tokenizer=str(model))
    for role, names in (("forget", CORPORA[:2]), ("retain", CORPORA[2:])):
        given = {name: [r["text"] for r in families.files()[f"wmdp/{name}.jsonl"]] for name in names}
        for rows, part in ((task.objectives[role], slice(0, 3)), (task.held_out[role], slice(3, 5))):
            wanted = [text for name in names for text in given[name][part]]
            assert len(rows) == len(wanted)
            assert all(text.startswith(row.answer) for row, text in zip(rows, wanted, strict=True))
            assert all(len(encode(row, tiny.tokenizer(), 512).input_ids) <= 8 for row in rows)


def test_every_corpus_is_a_group_which_batches_tell(place: Path) -> None:
    both, one = Wmdp("data"), Wmdp("data", forget=["cyber-forget-corpus"])
    assert [row.group for row in both.objectives["forget"]] == [0] * 4 + [1] * 4
    assert {row.group for row in [*both.objectives["retain"], *one.objectives["forget"]]} == {0}
    data, alone = (ObjectiveRows(task.objectives, {}, tiny.tokenizer(), 512) for task in (both, one))
    mixed, cyber = (
        data.collate([data[Draw("forget", row, 0)] for row in rows])["forget"] for rows in ((1, 6, 5), (7,))
    )
    assert mixed["groups"].tolist() == [0, 1, 1]
    assert cyber["groups"].tolist() == [1]
    assert "groups" not in alone.collate([alone[Draw("forget", 0, 0)]])["forget"]
    assert "groups" not in data.collate([data[Draw("retain", 0, 0)]])["retain"]


def test_of_few_texts_a_third_is_held_out(place: Path) -> None:
    task = Wmdp("data", scored=40)
    assert (len(task.objectives["forget"]), len(task.held_out["forget"])) == (2 * 4, 2 * 2)
    assert not {*texts(task.objectives["forget"])} & {*texts(task.held_out["forget"])}
    assert len(Wmdp("data", documents=None, scored=1).objectives["retain"]) == 5


def test_a_text_that_is_trained_on_is_not_measured(place: Path, model: Path) -> None:
    given = [
        " = = Early life = = ",
        "rain",
        " = = early life = =",
        "snow",
        "spore 0 of bio-forget-corpus stirs spores.",
    ]
    families.write(place / "data", wikitext=[{"text": text} for text in given])
    task = Wmdp("data", documents=2, scored=3)
    assert texts(task.objectives["retain"]) == given[:2]
    assert texts(task.held_out["retain"]) == given[3:]
    cut = Wmdp("data", documents=2, scored=3, tokens=8, tokenizer=str(model))
    assert texts(cut.held_out["retain"]) == ["snow"], "the beginning of the other one is trained on, to be forgotten"
    families.write(place / "data", wikitext=[{"text": "rain"}] * 4)
    with pytest.raises(UserError, match="task 'wmdp': wikitext: all 1 of its rows to measure by are also trained on"):
        Wmdp("data")


def test_texts_are_cut_to_the_published_lengths(place: Path, model: Path) -> None:
    long = [{"text": f"{i} " + "word " * 400} for i in range(2)]
    families.write(
        place / "data", bio_forget_corpus=long, cyber_forget_corpus=[{"text": f"x{r['text']}"} for r in long]
    )
    bio, cyber = Wmdp("data", tokenizer=str(model)).objectives["forget"]
    lengths = [len(encode(row, tiny.tokenizer(), 1024).input_ids) for row in (bio, cyber)]
    assert 512 - len(" word") < lengths[0] <= 512
    assert 768 - len(" word") < lengths[1] <= 768


def test_corpora_are_rows_or_lines_or_files_and_blank_or_short_ones_are_left_out(place: Path) -> None:
    folder = place / "data" / "wmdp"
    (folder / "mine.txt").write_text("one line\n\n\ntwo lines\nx\n", encoding="utf-8")
    (folder / "books").mkdir()
    for name, encoding in (("b", "utf-8"), ("a", "utf-8-sig")):
        (folder / "books" / f"{name}.txt").write_text(f"{name} of\nseveral lines", encoding=encoding)
    families.write(place / "data", wikitext=[{"text": ""}, {"text": " = River = \n"}, {"text": "wide"}, {"text": "x"}])
    task = Wmdp("data/wmdp", forget=["mine", "books"], scored=1, least=2)
    assert texts(task.objectives["forget"]) == ["one line", "a of\nseveral lines"]
    assert texts(task.held_out["forget"]) == ["two lines", "b of\nseveral lines"]
    assert texts(task.objectives["retain"]) == [" = River = \n"]


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The package datasets with texts in every corpus but the gated one; what was asked of it."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None = None, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        if name == "cais/wmdp-bio-forget-corpus":
            raise RuntimeError(f"Dataset '{name}' is a gated dataset on the Hub. Visit its page to ask for access.\n…")
        return [{"text": f"{config} {i}"} for i in range(4)]

    package = ModuleType("datasets")
    package.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    return asked


def test_without_a_folder_the_hub_is_asked_by_its_names(hub: list[tuple[Any, ...]]) -> None:
    task = Wmdp(forget=["cyber-forget-corpus"], retain=["wikitext", "bio-retain-corpus"], documents=1, scored=1)
    assert hub == [
        ("cais/wmdp-corpora", "cyber-forget-corpus", "train"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("cais/wmdp-corpora", "bio-retain-corpus", "train"),
    ]
    assert texts(task.objectives["forget"]) == ["cyber-forget-corpus 0"]
    assert task.held_out["forget"][0].where == "cais/wmdp-corpora, cyber-forget-corpus:train, row 2"


def test_a_corpus_that_is_not_for_all_says_how_to_get_it(
    hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as told:
        Wmdp()
    assert str(told.value) == (
        "cais/wmdp-bio-forget-corpus:train: could not be loaded from the hub: Dataset 'cais/wmdp-bio-forget-corpus' "
        "is a gated dataset on the Hub. Visit its page to ask for access; accept its terms on the hub and log in (hf "
        "auth login), or give --data-dir, a folder with bio-forget-corpus.jsonl"
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"train: to read it from the hub, pip install 'dualoptim\[hub\]', or give --d"):
        Wmdp()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no folder": ({"data_dir": "gone"}, "data_dir gone: there is no such folder"),
    "no file": ({"retain": ["cyber-retain-corpus"]}, "data_dir data: has no cyber-retain-corpus.jsonl"),
    "no such corpus": ({"data_dir": None, "forget": ["bio-forget"]}, "did you mean 'bio-forget-corpus'"),
    "the same": ({"retain": ["bio-forget-corpus"]}, "give corpora to forget and others to retain"),
    "no name": ({"forget": ["."]}, "give corpora to forget and others to retain"),
    "nothing": ({"forget": []}, "give corpora to forget and others to retain"),
    "too long": ({"least": 60}, "bio-forget-corpus has 0 texts of 60 letters or more, and needs two"),
    "no documents": ({"documents": 0}, "documents must be a whole number > 0"),
    "one token": ({"tokens": 1}, "tokens must be a whole number > 1"),
}


@pytest.mark.parametrize(("arguments", "told"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_told(arguments: dict[str, Any], told: str, place: Path, hub: Any) -> None:
    with pytest.raises(UserError, match=told):
        Wmdp(**{"data_dir": "data", **arguments})


def test_a_row_without_text_is_told_with_its_place(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "x"}, {"words": "y"}, {"text": "z"}]
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *names, split: rows)
    with pytest.raises(UserError, match="cyber-forget-corpus:train, row 2: needs its words under 'text'"):
        Wmdp(forget=["cyber-forget-corpus"])


def test_a_folder_in_a_folder_of_texts_is_told(place: Path) -> None:
    (place / "data" / "wmdp" / "books" / "a.txt").mkdir(parents=True)
    with pytest.raises(UserError, match=r"books/a\.txt: is a folder"):
        Wmdp("data", forget=["books"])


# Numbers


def test_multiple_choice_is_shown_as_the_tasks_own_and_texts_by_their_tokens() -> None:
    records: list[dict[str, Any]] = [
        {"set": "forget", "nll": 2.0, "tokens": 1}, {"set": "forget", "nll": 4.0, "tokens": 3},
        {"set": "retain", "nll": 1.0, "tokens": 5}, {"set": "passages", "nll": 0.5, "tokens": 2},
        {"set": "lm_eval", "task": "wmdp_bio", "metric": "acc", "value": 0.25, "higher_is_better": True, "samples": 4},
        {"set": "lm_eval", "task": "mmlu", "metric": "acc", "value": None, "higher_is_better": True, "samples": 4},
    ]  # fmt: skip
    found, shown = general.scored(Wmdp, records, None)
    assert found.numbers["wmdp_bio_acc"] == 0.25
    assert (shown["wmdp_bio_acc"].better, shown["wmdp_bio_acc"].label) == ("lower", "WMDP-Bio")
    assert found.numbers["forget_perplexity"] == pytest.approx(math.exp((2 * 1 + 4 * 3) / 4))
    assert found.numbers["retain_perplexity"] == pytest.approx(math.e)
    assert found.numbers["wmdp_cyber_acc"] is None
    assert found.missing == {
        "wmdp_cyber_acc": NOT_ASKED, "wmdp_chem_acc": NOT_ASKED, "mmlu_acc": "lm-eval gives no finite number",
    }  # fmt: skip
    assert set(shown) == set(found.numbers)


# RMU on some matrices alone


RMU = [
    "--forget-loss", "RMU", "--forget-loss-args", "{layer: 7, coefficient: 6.5}", "--retain-loss", "RMURetain",
    "--weights", "{retain: 1200}", "--train", TRAINED,
]  # fmt: skip
SHORT = ["--task", "wmdp", "--data-dir", "data", "--task-args", "{scored: 1}", "--steps", "2", "--batch-size", "2"]
SHORT += ["--ratio", "1:1", "--curve-points", "0", "--lr", "1e-3"]


def changed(model: Path, folder: Path) -> set[str]:
    before, after = (load_file(path / "model.safetensors") for path in (model, folder / "model"))
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


DOWN = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (5, 6, 7)}


def test_rmu_changes_the_chosen_matrices_and_nothing_else_by_any_method(place: Path, model: Path) -> None:
    methods = ["Joint AdamW", "DualOptim+", "GRU"]  # both in a step, by turns, and one gradient made of two
    options = ["compare", "--model", str(model), *SHORT, *RMU, "--methods", json.dumps(methods)]
    assert cli.main([*options, "--out", "out"]) == 0
    results = json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))
    assert [entry["method"] for entry in results["runs"]] == methods
    for entry in results["runs"]:
        assert changed(model, place / "out" / f"{runs.slug(entry['method'])}-seed0") == DOWN
        assert entry["not_computed"] == {
            f"{name}_acc": NOT_ASKED for name in ("wmdp_bio", "wmdp_cyber", "wmdp_chem", "mmlu")
        }
        assert entry["after"]["forget_perplexity"] != entry["before"]["forget_perplexity"]
        assert all(0 < point[name] < 1 for point in entry["curve"] for name in ("forget", "retain"))


def test_so_does_another_loss_with_a_rate_that_stays(place: Path, model: Path) -> None:
    options = ["unlearn", "--model", str(model), *SHORT, "--forget-loss", "NPO", "--train", TRAINED, "--log-every", "1"]
    assert cli.main([*options, "--steps", "3", "--lr-decay", "false", "--warmup-ratio", "0", "--out", "out"]) == 0
    assert changed(model, place / "out") == DOWN
    (entry,) = json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))["runs"]
    assert [logged["learning_rate"] for logged in entry["losses"]] == [1e-3] * 3


def test_texts_that_tiny_is_made_of_are_not_cut(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["unlearn", "--model", "tiny", "--memorise", "--memorise-args", "{epochs: 1}", *SHORT]
    options += ["--forget-loss", "RMU", "--forget-loss-args", "{layer: 1}"]
    assert cli.main([*options, "--dry-run"]) == 0
    assert "s, and more.<|end|>'⟧" in capsys.readouterr().out
    families.write(place / "data", wikitext=[{"text": f"{i} " + "word " * 600} for i in range(3)])
    assert cli.main([*options, "--dry-run"]) == 2
    assert "text 1: the row has 6" in capsys.readouterr().err


def test_a_models_numbers_are_given_with_what_they_lack(
    place: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "--model", str(model), "--task", "wmdp", "--data-dir", "data"]) == 0
    shown = capsys.readouterr().out
    assert f"not computed: {NOT_ASKED}" in shown
    assert "perplexity, to forget, held out" in shown


def test_the_recipe_has_the_published_settings() -> None:
    recipe = yaml.safe_load(recipe_files.find_recipe("wmdp_zephyr_7b").read_text(encoding="utf-8"))
    published = {
        "model": "HuggingFaceH4/zephyr-7b-beta", "train": TRAINED, "steps": 150, "batch_size": 8, "ratio": "1:1",
        "forget_loss_args": {"layer": 7, "coefficient": 6.5}, "weights": {"retain": 1200}, "lr": 5e-5,
        "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.0, "lr_decay": False, "warmup_ratio": 0.0,
    }  # fmt: skip
    assert published.items() <= recipe.items()
