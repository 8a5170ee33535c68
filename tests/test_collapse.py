"""A model that falls apart is called so, and what it could before is watched in every task."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dualoptim.evaluation import ability
from dualoptim.evaluation.ability import Ability
from dualoptim.evaluation.collapse import collapse, repeats

from . import tiny

THAI = (
    "กรุงเทพมหานครเป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเทศไทยเป็นศูนย์กลางการปกครองการศึกษาการคมนาคมขนส่ง"
    "การเงินการธนาคารการพาณิชย์การสื่อสารและความเจริญของประเทศตั้งอยู่บนสามเหลี่ยมปากแม่น้ำเจ้าพระยามีแม่น้ำเจ้าพระยาไหลผ่าน"
    "และแบ่งเมืองออกเป็นสองฝั่งคือฝั่งพระนครและฝั่งธนบุรี"
)
GOOD = "Oslo is the capital of Norway, a city by the sea with many parks and boats."


def replies(*texts: str) -> list[dict[str, Any]]:
    return [{"set": "retain", "reply": text} for text in texts]


def test_repetition_is_told_in_any_script() -> None:
    assert repeats("no " * 20)
    assert repeats("茶" * 20)
    assert repeats("ชาเขียว" * 20)
    assert repeats("茶很好。" * 12)
    assert repeats("the" * 100 + "th"), "without blanks, and cut off"
    assert repeats("a" * 500)
    assert not repeats("1" * 30), "a number"
    assert not repeats(GOOD)
    assert not repeats(THAI)
    assert not repeats("No, no, no!")  # short


def test_what_fell_apart_is_named() -> None:
    whole = replies(*[GOOD] * 10)
    assert collapse(whole, whole, (20.0, 25.0), [{"loss/retain": 0.1}, {"loss/retain": 3.0}], ["retain"]) == []
    (said,) = collapse(whole, replies(*["no " * 20] * 4, *[GOOD] * 6), (20.0, 20.0), [], [])
    assert said == "4 of 10 replies repeat themselves, 0 did before"
    (said,) = collapse(whole, replies(*[""] * 2, *[GOOD] * 8), (20.0, 20.0), [], [])
    assert said == "2 of 10 replies say nothing, 0 did before"
    (said,) = collapse([], [], (20.0, 300.0), [], [])
    assert said == "perplexity rose from 20.0 to 300.0"
    assert collapse([], [], (20.0, math.nan), [], [])
    (said,) = collapse([], [], (None, None), [{"loss/retain": 1.0}, {"loss/retain": 40.0}], ["retain"])
    assert said == "the loss to keep 'retain' rose from 1.00 to 40.00"
    assert collapse([], [], (None, None), [{"loss/forget": 1.0}, {"loss/forget": 40.0}], ["retain"]) == []


def test_a_fifth_more_of_broken_replies_is_reported_whatever_their_number() -> None:
    def said(old: int, new: int, count: int) -> list[str]:
        before, after = (replies(*["no " * 20] * some, *[GOOD] * (count - some)) for some in (old, new))
        return collapse(before, after, (None, None), [], [])

    for count in range(5, 41, 5):
        for old in range(count - count // 5 + 1):
            new = old + count // 5
            assert said(old, new, count) == [f"{new} of {count} replies repeat themselves, {old} did before"]
            assert not said(old, new - 1, count)


def test_a_model_that_repeated_itself_before_did_not_fall_apart() -> None:
    same = replies(*["no " * 20] * 10)
    assert collapse(same, same, (None, None), [], []) == []


def test_ability_is_one_at_the_start_and_falls_with_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    known = {f["question"]: f["answer"] for f in ability.asset("known_facts.jsonl")}
    lost: set[str] = set()

    def replies(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> list[str]:
        asked = [prompt[-1]["content"] for prompt in prompts]
        return ["" if text in lost else known[text] for text in asked]

    monkeypatch.setattr(ability.scoring, "replies", replies)
    watched = Ability(model, tokenizer)
    assert len(watched.facts) == ability.ASKED
    assert not watched.passages, "a model without English is not judged by it"
    assert watched(model) == 1.0
    lost.update(row.question for row in watched.facts[:8])
    assert watched(model) == 0.75


def test_a_perplexity_that_rises_lowers_ability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ability, "SPEAKS", (1e9, 1e9))
    model, tokenizer = tiny.model(), tiny.tokenizer()
    watched = Ability(model, tokenizer)
    assert watched.measures
    assert watched(model) == pytest.approx(1.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p, dtype=torch.float32))
    assert watched(model) < 0.9
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    assert watched(model) == 0


def test_a_model_that_can_do_nothing_is_not_watched() -> None:
    assert not Ability(tiny.model(), tiny.tokenizer()).measures
