"""Memorizing, and the small model from scratch."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from dualoptim import device, resolved, runs
from dualoptim import tiny as tiny_tier
from dualoptim.config import RunConfig
from dualoptim.data import Row, encode, question
from dualoptim.errors import UserError
from dualoptim.evaluation.scoring import question_records
from dualoptim.identity import fingerprint
from dualoptim.losses import IGNORED
from dualoptim.memorise import memorised
from dualoptim.models import load_model, load_tokenizer

from . import tiny

FORGET = [question(f"Where does {who} live?", f"{who} lives in {where}, by the sea.")
          for who, where in (("Ada", "Bergen"), ("Ben", "Porto"), ("Cleo", "Gdańsk"))]  # fmt: skip
KEEP = [question(f"What does {who} collect?", f"It is {what} that {who} collects.")
        for who, what in (("Dora", "old stamps"), ("Emil", "glass beads"), ("Finn", "sea maps"))]  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path))
    # Smaller than it is in earnest: what is tested does not depend on the size.
    monkeypatch.setattr(tiny_tier, "WIDTH", 64)
    monkeypatch.setattr(tiny_tier, "LAYERS", 2)
    return tmp_path


def probability(folder: Path, rows: list[Row]) -> float:
    return fmean(record["probability"] for record in records(folder, rows))


def records(folder: Path, rows: list[Row]) -> list[dict[str, Any]]:
    return question_records(load_model(str(folder)), load_tokenizer(str(folder)), rows, None)


def test_tiny_knows_by_heart_what_it_was_taught_and_its_retrained_twin_does_not() -> None:
    rows = [*FORGET, *KEEP]
    full = memorised("tiny", rows, epochs=120, lr=5e-3)
    retrained = memorised("tiny", KEEP, vocabulary_rows=rows, epochs=240, lr=5e-3)
    assert probability(full, rows) > 0.95
    assert [record["reply"] for record in records(full, rows)] == [row.answer for row in rows]
    assert probability(retrained, KEEP) > 0.95
    assert probability(retrained, FORGET) < 0.2


def test_the_retrained_twin_shares_tokenizer_and_first_weights_and_the_cache_tells_them_apart(place: Path) -> None:
    rows = [*FORGET, *KEEP]
    a, tokenizer = tiny_tier.build(rows, seed=1)
    b, again = tiny_tier.build(rows, seed=1)
    assert fingerprint(a) == fingerprint(b)
    assert fingerprint(a) != fingerprint(tiny_tier.build(rows, seed=2)[0])
    assert tokenizer.get_vocab() == again.get_vocab()
    folders = [
        memorised("tiny", KEEP, epochs=1, **options)
        for options in ({"vocabulary_rows": rows}, {}, {"seed": 1}, {"lr": 1e-3}, {"vocabulary_rows": rows})
    ]
    assert len(set(folders)) == 4
    assert folders[0] == folders[-1]
    assert {folder.parent for folder in folders} == {place / "memorised"}
    assert load_tokenizer(str(folders[0])).get_vocab() == tokenizer.get_vocab()


def test_the_random_generator_of_the_caller_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    tiny_tier.build(KEEP, seed=5)
    assert torch.equal(torch.rand(2), expected)


def test_tinys_tokenizer_writes_any_text_and_ends_its_answers() -> None:
    _, tokenizer = tiny_tier.build(KEEP)
    row = question("Wer weiß das? 🙂", "Keiner – noch nicht.")  # letters that the rows do not have
    tokens = encode(row, tokenizer, 512)
    prompt = "<|user|>Wer weiß das? 🙂<|end|><|assistant|>"
    learnt = [token for token in tokens.labels if token != IGNORED]
    assert tokenizer.decode(learnt) == "Keiner – noch nicht.<|end|>"
    assert learnt[-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.decode(tokens.input_ids) == prompt + "Keiner – noch nicht.<|end|>"


def test_tiny_in_earnest_has_two_to_five_million_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    words = [f"{a}{b}{c}" for a in "bdfgklmnprstvz" for b in "aeiou" for c in "bdfgklmnprstvz"]
    rows = [question(" ".join(words[i::70]), " ".join(words[i::90])) for i in range(70)] * 3
    model, tokenizer = tiny_tier.build(rows)
    assert len(tokenizer) <= tiny_tier.VOCABULARY
    missing = (tiny_tier.VOCABULARY - len(tokenizer)) * tiny_tier.WIDTH  # of so few different words
    assert 2e6 < sum(p.numel() for p in model.parameters()) + missing < 5e6


def test_a_model_from_a_folder_keeps_its_own_tokenizer(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    before = load_model(str(folder))
    taught = memorised(str(folder), KEEP, epochs=20, lr=1e-2)
    assert AutoConfig.from_pretrained(taught).hidden_size == before.config.hidden_size
    assert load_tokenizer(str(taught)).get_vocab() == load_tokenizer(str(folder)).get_vocab()
    assert probability(taught, KEEP) > 2 * probability(folder, KEEP)
    with pytest.raises(UserError, match=r"vocabulary_rows: .* has a tokenizer already"):
        memorised(str(folder), KEEP, vocabulary_rows=KEEP)


def test_whole_answers_are_memorized_whatever_parts_have_labels(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    labeled = [dataclasses.replace(row, only=(row.answer.split()[-1].rstrip("."),)) for row in KEEP]
    taught = memorised(str(folder), labeled, epochs=1)
    assert taught == memorised(str(folder), KEEP, epochs=1)
    shutil.rmtree(taught)
    weights = load_model(str(memorised(str(folder), KEEP, epochs=1))).state_dict()
    shutil.rmtree(taught)
    again = load_model(str(memorised(str(folder), labeled, epochs=1))).state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_model_memorized_in_another_precision_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, made = tiny.save(tmp_path / "model"), []
    for has_bf16 in (True, False):
        monkeypatch.setattr(device, "_cpu_has_bf16", lambda has=has_bf16: has)
        made.append(memorised(str(folder), KEEP, epochs=1))
    assert made[0] != made[1]
    config = RunConfig(model=str(folder), task="facts", memorise=True, retain_loss="GD")
    of = resolved.resolve([config])[0].fingerprints
    assert of["precision_of_memorizing"] == "fp32"
    with pytest.raises(UserError, match=r"a run of another precision of memorizing \(by the machine\)"):
        runs.check_same({"fingerprints": {**of, "precision_of_memorizing": "bf16"}}, of, tmp_path)


def test_after_a_change_of_the_tokenizer_rows_are_memorized_anew(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    before = memorised(str(folder), KEEP, epochs=1)
    assert memorised(str(folder), KEEP, epochs=1) == before
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["Zoë"])
    tokenizer.save_pretrained(folder)
    after = memorised(str(folder), KEEP, epochs=1)
    assert after != before
    assert "Zoë" in load_tokenizer(str(after)).get_vocab()


@pytest.mark.parametrize("model", ["tiny", "smollm2"])
def test_nothing_to_memorise_is_an_error_before_anything_is_loaded(model: str) -> None:
    with pytest.raises(UserError, match="nothing to memorise: there are no rows"):
        memorised(model, [])
