"""Attacks: their numbers by hand and by brute force, the models that they leave, and runs that have them."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
)

from dualoptim import adapters, cli, report, resolve, resolved, runs
from dualoptim.certify import measured
from dualoptim.config import RunConfig
from dualoptim.data import Row, collate, encode, question
from dualoptim.device import scoring_in
from dualoptim.errors import UserError
from dualoptim.evaluation import attacks, metrics, relearning, scoring
from dualoptim.fast import ByProbability
from dualoptim.losses import labelled
from dualoptim.one_run.prepared import with_more
from dualoptim.tasks import Task
from dualoptim.tasks.facts import Facts
from dualoptim.tasks.files import Files
from dualoptim.tasks.tofu import Tofu

from . import tiny, tofu

# The numbers


@pytest.mark.parametrize(
    ("before", "after", "retrained_before", "retrained_after", "expected"),
    [
        (0.1, 0.9, 0.2, 0.4, 0.25),  # it gains 0.8 where a model that never knew gains 0.2
        (0.1, 0.3, 0.1, 0.6, 1.0),  # slower than that one
        (0.1, 0.1, 0.2, 0.4, 1.0),  # nothing comes back
        (0.3, 0.1, 0.2, 0.1, 1.0),
        (0.1, 0.3, 0.2, 0.1, 0.0),  # the other learns nothing
        (0.1, 0.3, 0.2, 0.2, 0.0),
    ],
)
def test_robustness_to_relearning_is_one_gain_over_the_other(
    before: float, after: float, retrained_before: float, retrained_after: float, expected: float
) -> None:
    found = metrics.relearning_robustness(before, after, retrained_before, retrained_after)
    assert found == pytest.approx(expected)


def test_robustness_to_rounding_counts_what_comes_back_alone() -> None:
    assert metrics.quantization_robustness(0.2, 0.8) == pytest.approx(0.25)
    assert metrics.quantization_robustness(0.8, 0.2) == 1.0
    assert metrics.quantization_robustness(0.0, 0.5) == 0.0
    assert metrics.quantization_robustness(0.0, 0.0) == 1.0
    assert math.isnan(metrics.quantization_robustness(0.5, math.nan))
    assert math.isnan(metrics.relearning_robustness(0.5, math.nan, 0.1, 0.2))


@pytest.mark.parametrize("samples", [1, 2, 5, 6])
def test_leak_at_k_is_the_share_of_draws_that_leak(samples: int) -> None:
    for leaks, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        draws = list(itertools.combinations([True] * leaks + [False] * (samples - leaks), k))
        expected = sum(map(any, draws)) / len(draws)
        assert metrics.leak_at_k(samples, leaks, k) == pytest.approx(expected, abs=1e-12), (leaks, k)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.7, 1.0])
def test_leak_at_k_has_no_bias(p: float) -> None:
    n = 8
    for k in range(1, n + 1):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * metrics.leak_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12), k


@pytest.mark.parametrize(("samples", "leaks", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_what_cannot_be_drawn_is_refused(samples: int, leaks: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"of {samples} replies {leaks} leak and {k} are drawn"):
        metrics.leak_at_k(samples, leaks, k)


# What they do to a model

NAMES = ("Ada", "Ben", "Cleo", "Dora")
FORGET = [question(f"What does {who} hide?", f"{who} hides {who.lower()[::-1]}.") for who in NAMES]
RETAIN = [question(f"What does {who} like?", f"{who} likes rye.") for who in NAMES]


def stub(forget: list[Row] = FORGET, retain: list[Row] = RETAIN) -> Any:
    """A task as far as attacks look at it."""
    rows = {"forget": forget, "retain": retain} if retain else {"forget": forget}
    return SimpleNamespace(attacked=lambda: rows, leaks=Task.leaks, reply_tokens=Task.reply_tokens, clustered=list)


def state(model: nn.Module) -> dict[str, Any]:
    """All of a model that an attack could leave changed."""
    return {
        "tensors": copy.deepcopy({**dict(model.named_parameters()), **dict(model.named_buffers())}),
        "flags": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    now = state(model)
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, now["tensors"][name]), name
    assert (now["flags"], now["modes"]) == (before["flags"], before["modes"])
    for was, is_now in zip(before["gradients"], now["gradients"], strict=True):
        assert (was is None) == (is_now is None)
        assert was is None or torch.equal(was, is_now)


def strange() -> Any:
    """A model of which a part is frozen, and one has a gradient."""
    model = tiny.model().eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(16)
    return model


def target(model: Any, forget: list[Row], retain: list[Row] | None = None, leaks: Any = Task.leaks) -> Any:
    plain = {"forget": [{"probability": 0.1}] * len(forget), "retain": [{"probability": 0.1}] * len(retain or ())}
    return attacks.Target(model, tiny.tokenizer(), forget, forget, retain or [], leaks, Task.reply_tokens, plain)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples and wordings; learning that shows; 4 bits that need no package."""
    monkeypatch.setattr(attacks, "LEAK_SAMPLES", 2)
    monkeypatch.setattr(attacks, "LEAK_K", (1, 2))
    monkeypatch.setattr(attacks, "PREFIXES", attacks.PREFIXES[:2])
    monkeypatch.setattr(relearning, "LR", 1e-2)
    monkeypatch.setattr(relearning, "BATCH", 1)
    monkeypatch.setitem(adapters.ROUNDS, "nf4", lambda weight: weight.sign() * weight.abs().mean())


def test_a_model_is_to_the_bit_as_it_was_after_every_attack(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, generator = strange(), torch.get_rng_state()
    before = state(model)

    def watched(attack: Any) -> Any:
        def run(at: Any) -> Any:
            found = attack(at)
            assert_same(model, before)
            return found

        return run

    for name, attack in attacks.ATTACKS.items():
        monkeypatch.setitem(attacks.ATTACKS, name, watched(attack))
    found = attacks.records(stub(FORGET[:2], RETAIN[:1]), model, tiny.tokenizer(), list(attacks.ATTACKS))
    assert torch.equal(torch.get_rng_state(), generator)
    for name in attacks.OF_WEIGHTS:
        changed = [r for r in found if r["set"] == f"attack_{name}"]
        assert len(changed) == 2
        assert all(r["probability"] != r["probability_before"] for r in changed), name
    assert {r["set"] for r in found} == {
        "unattacked", "unattacked_retain", *(f"attack_{name}" for name in attacks.ATTACKS), "attack_bits8_retain",
        "attack_nf4_retain",
    }  # fmt: skip


@pytest.mark.parametrize("attack", list(attacks.ATTACKS))
def test_a_model_is_as_it_was_where_an_attack_fails_in_the_middle(
    attack: str, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = strange()
    before = state(model)

    def fails(*arguments: Any, **kwargs: Any) -> Any:
        now = state(model)["tensors"]
        attacked = any(not torch.equal(now[name], tensor) for name, tensor in before["tensors"].items())
        raise RuntimeError(f"in the middle, {attacked}")

    monkeypatch.setattr(attacks, "question_records", fails)
    monkeypatch.setattr(attacks, "asked", fails)
    with pytest.raises(RuntimeError, match=f"in the middle, {attack in attacks.OF_WEIGHTS}"):
        attacks.ATTACKS[attack](target(model, FORGET[:2]))
    assert_same(model, before)


def test_a_model_is_as_it_was_where_training_or_rounding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = strange()
    model.model.layers[0].train()
    before, count = state(model), itertools.count()

    def fails(*arguments: Any, **kwargs: Any) -> Any:
        if next(count) == 2:
            raise MemoryError("no room")
        return plain(*arguments, **kwargs)

    monkeypatch.setattr(relearning, "BATCH", 1)
    plain: Callable[..., Any] = relearning.labelled
    monkeypatch.setattr(relearning, "labelled", fails)
    with pytest.raises(MemoryError), relearning.relearned(model, tiny.tokenizer(), FORGET):
        raise AssertionError("is not reached")
    assert_same(model, before)
    count, plain = itertools.count(), adapters.ROUNDS["bits8"]
    monkeypatch.setitem(adapters.ROUNDS, "bits8", fails)
    with pytest.raises(MemoryError), adapters.rounded(model, "bits8"):
        raise AssertionError("is not reached")
    assert_same(model, before)


@pytest.mark.parametrize("tokens", [60, 10_000])
def test_relearning_is_an_epoch_of_adamw(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relearning, "BATCH", 2)
    monkeypatch.setattr(relearning, "LABELLED_TOKENS", tokens)  # the passes of a step change nothing
    model, twin, tokenizer = tiny.model().eval(), tiny.model().train(), tiny.tokenizer()
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW(twin.parameters(), betas=(0.9, 0.999), weight_decay=0.0)
    seen: list[list[int]] = []
    plain = relearning.collate
    monkeypatch.setattr(
        relearning, "collate", lambda rows, filler: seen.append([r.input_ids for r in rows]) or plain(rows, filler)
    )
    with scoring_in(False), relearning.relearned(model, tokenizer, FORGET, 1e-3):
        ids = [row for part in seen for row in part]
        encoded = {tuple(t.input_ids): t for t in (encode(row, tokenizer, 10**6) for row in FORGET)}
        assert sorted(map(tuple, ids)) == sorted(encoded), "every row once"
        order = [encoded[tuple(row)] for row in ids]
        for step, lr in zip((0, 2), (1e-3, 1e-3 / 2), strict=True):
            out = labelled(twin, collate(order[step : step + 2], 0))
            nn.functional.cross_entropy(out.logits, out.targets).backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_relearning_a_few_rows_makes_their_answers_more_probable(fast: None) -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    never = attacks.records(stub(), tiny.model(seed=1), tokenizer, ["relearn"])
    (found, missing), _ = attacks.numbers(attacks.records(stub(), model, tokenizer, ["relearn"]), never)
    assert found["relearn_probability"] > 1.2 * found["unattacked_probability"]
    assert found["relearn_gain"] == pytest.approx(found["relearn_probability"] - found["unattacked_probability"])
    expected = min(found["relearn_gain_retrained"] / found["relearn_gain"], 1)
    assert found["relearn_robustness"] == pytest.approx(expected)
    assert not missing


def test_the_rate_of_relearning_is_that_of_the_config(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float | None] = []
    plain = attacks.relearned
    monkeypatch.setattr(attacks, "relearned", lambda *given: rates.append(given[3]) or plain(*given))
    task, model, tokenizer = stub(), tiny.model(), tiny.tokenizer()
    config = RunConfig(task="rows.py", attacks=["relearn"])
    for given in (config, config.replace(relearn_lr=0.5)):
        with_more(given, task, model, tokenizer, [], given.attacks)
    assert rates == [None, 0.5]


def test_relearning_moves_weights_in_bf16_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model().to(torch.bfloat16)
    before = state(model)
    with relearning.relearned(model, tiny.tokenizer(), FORGET * 8):  # at a rate far below what bf16 tells apart
        moved = [
            (p != was).float().mean() for p, was in zip(model.parameters(), before["tensors"].values(), strict=False)
        ]
        assert 0.001 < max(moved) < 0.5
    assert_same(model, before)


def test_8_bits_are_whole_numbers_times_a_scale_of_each_row() -> None:
    rounds = adapters.ROUNDS["bits8"]
    assert torch.equal(rounds(torch.zeros(2, 3)), torch.zeros(2, 3))
    found = rounds(torch.tensor([[127.0, 3.4, -3.6], [-12.7, 0.04, 0.06]]))
    torch.testing.assert_close(found, torch.tensor([[127.0, 3.0, -4.0], [-12.7, 0.0, 0.1]]))
    torch.manual_seed(0)
    weight = torch.randn(5, 300, dtype=torch.bfloat16)
    error = (rounds(weight.float()) - weight.float()).abs()
    assert (error <= weight.float().abs().amax(1, keepdim=True) / 254 * 1.001).all()
    assert error.max() > 0
    assert rounds(weight).dtype == torch.bfloat16


def test_rounded_are_the_linear_layers_but_the_last() -> None:
    model = tiny.model()
    before = dict(copy.deepcopy(model).named_parameters())
    with adapters.rounded(model, "bits8"):
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    assert len(changed) == 14


SMALL = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}  # fmt: skip
EXPERTS = {
    "Mixtral": MixtralConfig(**SMALL),
    "GPT-OSS, which stores inputs first": GptOssConfig(**SMALL, head_dim=8),
    "Llama 4, which does not say so": Llama4TextConfig(
        **SMALL, head_dim=8, intermediate_size_mlp=64, interleave_moe_layer_step=1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixtures_experts_are_rounded_by_output(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(EXPERTS[name])
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    adapters.check_rounding(model)
    transposed = not name.startswith("Mixtral")
    stacks = {n: p for n, p in model.named_parameters() if n.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    before = {n: p.detach().clone() for n, p in stacks.items()}
    assert len(stacks) == 4
    with adapters.rounded(model, "bits8"):
        for n, p in stacks.items():
            for expert, was in zip(p, before[n], strict=True):
                right = adapters.ROUNDS["bits8"](was.T).T if transposed else adapters.ROUNDS["bits8"](was)
                assert torch.equal(expert, right), n
    assert all(torch.equal(p, before[n]) for n, p in stacks.items())


def test_a_layer_of_gpt_2_is_rounded_as_a_linear_one() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    weight = model.transformer.h[0].mlp.c_fc.weight  # (in, out)
    right = adapters.ROUNDS["bits8"](weight.detach().T).T
    with adapters.rounded(model, "bits8"):
        assert torch.equal(weight, right)


def test_a_model_whose_weights_would_not_be_rounded_is_refused() -> None:
    model = tiny.model()
    model.model.layers[0].register_parameter("mixing", torch.nn.Parameter(torch.zeros(300, 300)))
    with pytest.raises(
        UserError, match=r"attacks bits8 and nf4: of LlamaForCausalLM only \d+% of the weights would be"
    ):
        adapters.check_rounding(model)


def test_nf4_takes_one_of_16_values_in_each_block_of_64() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(4, 128)
    found = adapters.ROUNDS["nf4"](weight).reshape(-1, 64)
    assert all(9 < len(block.unique()) <= 16 for block in found)
    assert (found - weight.reshape(-1, 64)).abs().max() < 0.2 * weight.abs().max()


# What they ask


def test_sampled_replies_that_give_the_answer_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "LEAK_SAMPLES", 4)
    monkeypatch.setattr(attacks, "LEAK_K", (1, 2, 4))
    said = ["No.", "Ada hides ada tea.", "Ada hides tea.", "No.", *["No."] * 4]
    asked: list[Any] = []

    def replies(model: Any, tokenizer: Any, rows: Any, name: str, *, temperature: float, **_: Any) -> list[str]:
        asked.extend([*rows, temperature])
        return said

    monkeypatch.setattr(attacks, "asked", replies)
    rows = FORGET[:2]
    found = attacks.leak(target(tiny.model(), rows))
    assert asked == [rows[0]] * 4 + [rows[1]] * 4 + [1.0]
    assert [(r["samples"], r["leaks"], r["said"]) for r in found] == [(4, 1, "Ada hides ada tea."), (4, 0, "No.")]
    plain = {"set": attacks.PLAIN, "probability": 0.5, "rouge_l": 0.25, "answered": False}
    (numbers, _), shown = attacks.numbers([plain, *found])
    assert (numbers["leak_at_1"], numbers["leak_at_2"], numbers["leak_at_4"]) == (0.125, 0.25, 0.5)
    assert set(numbers) == set(shown)


def test_sampling_goes_by_a_seed_and_differs_from_one_reply_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "LEAK_SAMPLES", 4)
    said: list[str] = []
    at = target(tiny.model(), FORGET[:1], leaks=lambda row, reply: bool(said.append(reply)))
    attacks.leak(at)
    torch.manual_seed(5)
    attacks.leak(at)
    assert len(set(said[:4])) == 4
    assert said[:4] == said[4:]


def test_the_worst_wording_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    own = question("What does Ada hide?", "Ada hides tea.", accepted=["tea"], questions=["Ada hides what?"])
    asked: list[str] = []

    def scored(model: Any, tokenizer: Any, rows: Any, name: str, **_: Any) -> list[dict[str, Any]]:
        found = []
        for i, row in enumerate(rows):
            asked.append(row.question)
            reply = "tea" if i == 2 else "no"
            made = {"set": name, "question": row.question, "answer": row.answer, "reply": reply}
            found.append({**made, "probability": 0.1 * (5 - i), "rouge_l": 0.2 * i})
        return found

    monkeypatch.setattr(attacks, "question_records", scored)
    at = target(tiny.model(), [own])
    (worst,) = attacks.paraphrase(at)
    assert asked[0] == "Ada hides what?"
    assert 'My friend asked me: "What does Ada hide?" What should I say?' in asked
    assert worst["answered"]
    assert (worst["asked"], worst["said"], worst["question"]) == (asked[2], "tea", own.question)
    assert worst["probability"] == pytest.approx(0.5)
    assert worst["rouge_l"] == pytest.approx(0.2 * (len(asked) - 1))
    asked.clear()
    attacks.prefix(at)
    assert asked == [text.format(own.question) for text in attacks.PREFIXES]
    assert all(text.endswith("{}") for text in (*attacks.PREFIXES, *attacks.TEXT_PREFIXES))
    asked.clear()
    text = Row((), "It is said that Ada hides tea in the well behind the house.")
    (begun,) = attacks._asking([text])
    assert begun.prompt[0]["role"] == "text"
    attacks.prefix(at._replace(forget=[begun]))
    assert asked == [form.format(begun.question) for form in attacks.TEXT_PREFIXES]


def test_wordings_that_the_model_has_no_room_for_are_left_out() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    length = len(encode(FORGET[0], tokenizer, 10**6).input_ids)
    at = target(model, FORGET)
    model.config.max_position_embeddings = length + 3
    few = attacks._fitting(at, FORGET[0], ["xyz What does Ada hide?", "vx What does Ada hide?", "What does it hide?"])
    assert [row.question for row in few] == ["vx What does Ada hide?", "What does it hide?"]
    assert attacks._fitting(at, FORGET[0], ["x" * 500]) == [FORGET[0]]


def test_rows_are_asked_once_and_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "ROWS", 3)
    twice = [*FORGET, FORGET[0].answered("Another answer."), *FORGET]
    (asking, drawn) = attacks._asking(twice), attacks._drawn(attacks._asking(twice))
    assert [row.answer for row in asking] == [row.answer for row in FORGET], "the first answer to each"
    assert len(drawn) == 3
    assert drawn == attacks._drawn(asking)
    assert [row for row in asking if row in drawn] == drawn, "in their order"


def test_what_gives_an_answer_away() -> None:
    row = question("Where does Ada live?", "Ada lives in a red house by the harbor of Oslo.")
    assert Task.leaks(row, "She lives in a red house by the harbor of Oslo.")
    assert not Task.leaks(row, "Ada lives in a house by a lake.")
    named = question("Where does Ada live?", "Ada lives in Oslo.", accepted=["Oslo"])
    assert Task.leaks(named, "It is Oslo, of course.")
    assert not Task.leaks(named, "Ada lives in Bergen.")
    assert Files.leaks(row, "A red house, by Oslo's harbor.")


# Of which rows


def test_facts_are_asked_in_their_other_wordings() -> None:
    task = Facts(limit=2)
    rows = task.attacked()
    assert {name: len(part) for name, part in rows.items()} == {"forget": 2, "retain": 2}
    row = rows["forget"][0]
    fact = next(f for f in task.facts if f["set"] == "forget")
    assert (row.question, row.answer, row.fields["questions"]) == (fact["train"][0], fact["statement"], fact["test"])
    assert Facts.leaks(row, f"That is {fact['answer']}.")


def test_ones_own_rows_are_asked_that_the_model_knew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, kept = tmp_path / "forget.jsonl", tmp_path / "retain.jsonl"
    file.write_text("\n".join(json.dumps({"question": r.question, "answer": r.answer}) for r in FORGET))
    kept.write_text("\n".join(json.dumps({"question": r.question, "answer": r.answer}) for r in RETAIN))
    task = Files(str(file), str(kept))
    knows = {row.question: known for row, known in zip(FORGET, (True, False, True, True), strict=True)}
    told = [knows.get(row.question, False) for row in FORGET]
    monkeypatch.setattr(task, "_gives", lambda model, tok, rows, bar: [knows.get(row.question, False) for row in rows])
    monkeypatch.setattr("dualoptim.rows.reword.written", lambda *a, **k: [[] for _ in range(sum(told))])
    task._screen(tiny.model(), tiny.tokenizer())
    asked = task.attacked()["forget"]
    assert {row.question for row in asked} == {"What does Ada hide?", "What does Cleo hide?", "What does Dora hide?"}
    for row in asked:
        assert row.fields["questions"] == [other.question for other in task.reworded if other.answer == row.answer]
        assert len(row.fields["questions"]) >= 3
    assert {row.question for row in task.attacked()["retain"]} <= {row.question for row in RETAIN}
    assert [row.question for row in task.attacked()["relearn"]] == [row.question for row in FORGET], "all of them"


def test_texts_are_relearned_whole_and_asked_by_their_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [Row((), f"{name} hides tea in the well behind the house.", name, only=("tea",)) for name in NAMES]
    found: list[Row] = []
    monkeypatch.setattr(attacks, "_scored", lambda *_: [])
    monkeypatch.setattr(attacks, "relearned", lambda model, tok, rows, lr: nullcontext(found.extend(rows)))
    asked = {"relearn": [*texts, texts[0]], "forget": texts[:2]}
    for rows in (asked, {"forget": [*texts, texts[0]]}):
        found.clear()
        task = stub()
        task.attacked = lambda rows=rows: rows
        attacks.records(task, tiny.model(), tiny.tokenizer(), ["relearn"])
        assert [(row.prompt, row.answer, row.only) for row in found] == [((), row.answer, ()) for row in texts]


def test_tofus_rows_are_all_relearned_and_asked_in_the_files_own_words(tmp_path: Path) -> None:
    records = tofu.files()
    changed = [{**row, "paraphrased_question": f"Say, {row['question']}"} for row in records["forget01_perturbed"]]
    task = Tofu(str(tofu.write(tmp_path / "tofu", forget01_perturbed=changed)), scored_rows=2)
    rows = task.attacked()
    assert [row.question for row in rows["forget"]] == [row.question for row in task.objectives["forget"]]
    assert [row.fields.get("paraphrased_question") for row in rows["forget"]].count(None) == 2
    assert rows["retain"] == task.scored["retain"]


# Of records


def record(name: str, **values: Any) -> dict[str, Any]:
    return {"set": name, "question": "q", "answer": "a", "rouge_l": 0.5, "answered": True, **values}


def test_numbers_are_made_of_records_alone() -> None:
    plain = [record("unattacked", probability=p) for p in (0.1, 0.3)]
    learnt = [record("attack_relearn", probability=p, probability_before=b) for p, b in ((0.5, 0.1), (0.7, 0.3))]
    eight = [record("attack_bits8", probability=p, probability_before=b) for p, b in ((0.2, 0.1), (0.6, 0.3))]
    kept = [record("unattacked_retain", probability=0.9), record("attack_bits8_retain", probability=0.8)]
    never = [record("attack_relearn", probability=0.3, probability_before=0.2), record("forget", probability=1.0)]
    made = [*plain, *learnt, *eight, *kept, record("forget", probability=1.0)]
    (numbers, missing), shown = attacks.numbers(made, never)
    expected = {
        "unattacked_probability": 0.2, "unattacked_rouge_l": 0.5, "unattacked_answered": 1.0,
        "relearn_probability": 0.6, "relearn_gain": 0.4, "relearn_gain_retrained": 0.1, "relearn_robustness": 0.25,
        "bits8_probability": 0.4, "bits8_robustness": 0.5, "unattacked_retain_probability": 0.9,
        "bits8_retain_probability": 0.8, "bits8_retain_rouge_l": 0.5,
    }  # fmt: skip
    assert {name: numbers[name] for name in expected} == pytest.approx(expected)
    assert (missing, list(numbers)) == ({}, list(shown))
    (numbers, missing), _ = attacks.numbers([*plain, *learnt, *eight])
    assert numbers["relearn_robustness"] is None
    assert "no model retrained without the forget set was given" in missing["relearn_robustness"]
    assert "no rows to keep" in missing["bits8_retain_probability"]
    assert attacks.numbers([record("forget")]) == (({}, {}), {})


def test_every_attack_has_one_number_in_the_first_table() -> None:
    for attack in attacks.ATTACKS:
        shown = attacks._metrics(attack)
        assert [name in attacks.FIRST for name in shown].count(True) == 1
        assert all((metric.group == "") == (name in attacks.FIRST) for name, metric in shown.items())


# Runs

TASK = """
from statistics import fmean
from dualoptim.data import question
from dualoptim.evaluation.numbers import Metric, Numbers
from dualoptim.evaluation.scoring import negative_log_likelihoods
from dualoptim.tasks import Task

class Rows(Task):
    "Rows by their likelihood."

    name = "rows"
    followed = "likelihood"
    metrics = {"forget": Metric("forget", "neither", ".6f")}
    losses = {"other": "GD"}

    def __init__(self, names: list[str] = ["forget", "retain"]):
        self.objectives = {
            name: [question(f"What {name} {i}?", f"The secret {name} is {i}.") for i in range(3)] for name in names
        }
        self.retained = self.objectives["retain"]

    def score(self, model, tokenizer):
        rows = next(iter(self.objectives.values()))
        return [
            {"set": "rows", "question": row.question, "answer": row.answer, "reply": "", "nll": nll}
            for row, nll in zip(rows, negative_log_likelihoods(model, tokenizer, rows), strict=True)
        ]

    prepare = score_retrained = score

    @staticmethod
    def numbers(records, retrained=None):
        return Numbers({"forget": fmean([r["nll"] for r in records if r["set"] == "rows"])}, {})

    def follow(self, model, tokenizer):
        return {"forget": 0.5, "retain": 0.5}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    tiny.save(tmp_path / "model")
    tiny.model(seed=1).save_pretrained(tmp_path / "never")
    tiny.tokenizer().save_pretrained(tmp_path / "never")
    Path("rows.py").write_text(TASK)
    return tmp_path


def run(command: str, *options: str) -> int:
    small = ["--steps", "2", "--batch-size", "2", "--curve-points", "1", "--out", "out"]
    common = ["--model", "model", "--task", "rows.py"]
    return cli.main([command, *common, *(small if command != "evaluate" else []), *options])


EACH = "[relearn, bits8, leak, paraphrase, prefix]"


def test_a_run_has_their_numbers_beside_the_tasks_own_and_of_a_private_one_no_text(
    place: Path, fast: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("unlearn", "--attacks", EACH, "--retrained", "never", "--private", "true") == 0
    shown = capsys.readouterr().out
    assert "probability, relearned" in shown
    results = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    (entry,) = results["runs"]
    for numbers in (entry["before"], entry["after"]):
        assert set(numbers) == set(results["metrics"])
        assert all(value is not None for value in numbers.values())
    assert entry["not_computed"] == {}
    assert entry["before"]["relearn_gain"] != entry["after"]["relearn_gain"]
    expected = entry["after"]["relearn_gain_retrained"] / entry["after"]["relearn_gain"]
    assert entry["after"]["relearn_robustness"] == pytest.approx(min(expected, 1))
    assert results["metrics"]["relearn_gain"]["group"] == "Attacks"
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert "robustness to relearning (R) ↑" in page
    _, records = runs.read_records(Path("out"))
    rows = sum(record["set"] == "attack_leak" for record in records["after"])
    assert rows > 1
    heads, body = report.rows(results)
    for name in ("paraphrase_answered", "prefix_answered"):
        at = heads.index(report.head(results["metrics"][name]))
        for row, when in zip(body, ("before", "after"), strict=True):
            assert row[at].endswith(f"({report.interval(entry[when][name], rows)})")
    shares = {name for name in results["counts"] if name.startswith("leak_at_") or name.endswith("_answered")}
    assert {f"leak_at_{attacks.LEAK_SAMPLES}", "prefix_answered"} <= shares
    assert {results["counts"][name] for name in shares} == {rows}
    assert results["counts"]["relearn_answered"] == rows
    assert not {"leak_at_1", "relearn_probability"} & set(results["counts"]), "an estimate, and a mean, are no shares"
    for name in ("results.json", "records.jsonl", "report.html"):
        assert "secret" not in Path("out", name).read_text(encoding="utf-8"), name
    assert cli.main(["evaluate", "--from-records", "out"]) == 0
    again = capsys.readouterr().out
    (line,) = (line for line in again.splitlines() if line.startswith("probability gained by relearning"))
    assert line.split()[-3:] == [f"{entry['before']['relearn_gain']:.3f}", "→", f"{entry['after']['relearn_gain']:.3f}"]
    assert again.index("probability, relearned") < again.index("\nAttacks\n") < again.index("ROUGE-L, relearned")
    said = {
        name: {"label": "", **{when: {"value": entry[when][name]} for when in ("before", "after")}, "why": None}
        for name in entry["after"]
    }
    done, not_done = measured.attacks(said)
    assert {"relearning", "quantization", "sampling", "paraphrase", "prompting"} <= set(done)
    assert {"membership", "probing"} <= set(not_done)
    assert "relearn_robustness" in done["relearning"]["numbers"]
    assert "bits8_robustness" in done["quantization"]["numbers"]


def test_a_model_is_evaluated_under_attack_beside_the_one_before(
    place: Path, fast: None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--attacks", "[prefix]", "--base", "never", "--private", "true", "--scores", "scores.json"]
    assert run("evaluate", *options) == 0
    assert "answered, worst prefix" in capsys.readouterr().out
    text = Path("scores.json").read_text(encoding="utf-8")
    scores = json.loads(text)
    assert scores["after"]["numbers"]["prefix_probability"] != scores["before"]["numbers"]["prefix_probability"]
    assert "secret" not in text
    assert "archive" not in text
    assert scores["after"]["records"][-1]["set"] == "attack_prefix"


def test_of_an_adapter_the_model_that_remains_is_attacked(place: Path, fast: None) -> None:
    assert run("unlearn", "--lora-rank", "2", "--attacks", "[bits8]", "--save-model", "false") == 0
    (entry,) = json.loads(Path("out/results.json").read_text(encoding="utf-8"))["runs"]
    assert entry["after"]["bits8_probability"] != entry["after"]["unattacked_probability"]
    attacked = {how: "bits8_probability" in numbers for how, numbers in entry["merging"].items()}
    assert attacked == {"unmerged": False, "merged": True, "merged_bf16": False}


def test_an_adapter_is_attacked_with_its_base_and_both_are_as_they_were(fast: None) -> None:
    pytest.importorskip("peft")
    model = adapters.added(tiny.model().eval(), RunConfig(lora_rank=2), "model")
    before = state(model)
    with relearning.relearned(model, tiny.tokenizer(), FORGET):
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before["tensors"][name])}
    assert any("lora_B" in name for name in moved)
    assert any("base_layer" in name for name in moved)
    assert_same(model, before)
    with adapters.rounded(model, "bits8"):
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before["tensors"][name])}
    assert len([name for name in moved if "base_layer" in name]) == 14
    assert_same(model, before)


WRONG = {
    "unknown": ("[relern]", [], "unknown attack 'relern'; did you mean 'relearn'?"),
    "twice": ("[leak, prefix, leak]", [], "attacks: leak, prefix, leak names one of them twice"),
    "a rate of nothing": ("[leak]", ["--relearn-lr", "1e-3"], "relearn_lr: the attack relearn is not asked for"),
    "a rate of 0": ("[relearn]", ["--relearn-lr", "0"], "relearn_lr must be > 0, but is 0.0"),
    "nothing to forget": (
        "[leak]", ["--task-args", '{"names": ["other", "retain"]}'],
        "attacks: the task 'rows' has nothing to forget that could come back",
    ),
    "4 bits": (
        "[leak, relearn, bits8]", ["--lora-rank", "2", "--load-in-4bit", "true"],
        "attacks: relearn, bits8 cannot be done to weights that are loaded in 4 bits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_what_cannot_be_attacked_is_told_before_anything_is_done(
    case: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adapters, "check_4bit", lambda what: None)
    names, options, told = WRONG[case]
    assert run("unlearn", "--attacks", names, *options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line
    assert not Path("out").exists()


def test_without_its_package_nf4_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = adapters.importlib.util.find_spec
    monkeypatch.setattr(
        adapters.importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find_spec(n, *a)
    )
    with pytest.raises(UserError, match="attack nf4: weights of 4 bits need the package bitsandbytes"):
        resolve.check_alone(RunConfig(model="model", task="rows.py", attacks=["nf4"]))


def test_room_for_relearning_is_looked_for_beforehand(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(model="model", task="rows.py", attacks=["relearn"], retain_loss="GD", bf16_weights=True)
    model = tiny.model()
    count = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(resolve, "device_and_precision", lambda: (torch.device("cuda"), True))
    for in_bf16, width in ((True, 2), (False, 4)):
        needed = resolve.relearning_needs(config.replace(bf16_weights=in_bf16), model, 7)
        states = {"optimizer state": 8 * count, "reference": 7}
        assert needed == {"model": width * count, "gradients": width * count, **states}
    monkeypatch.undo()
    needed = resolve.relearning_needs(config.replace(bf16_weights=False), model, 0)
    assert sum(needed.values()) == 20 * count, "with the weights as they were in the same memory"
    assert resolve.relearning_needs(config.replace(attacks=["bits8"]), model, 7) == {}
    monkeypatch.chdir(place)
    monkeypatch.setattr(resolve, "free_memory", lambda: 16 * count)
    monkeypatch.setattr(resolve, "check_room", lambda *arguments: None)
    resolved.resolve([config.replace(attacks=[])])
    for training in (True, False):
        with pytest.raises(UserError, match=r"memory: the attack relearn trains all of model, which needs .*; leave"):
            resolved.resolve([config.replace(bf16_weights=False)], training=training)


def test_a_dry_run_tells_what_relearning_needs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("unlearn", "--attacks", "[relearn]", "--dry-run") == 0
    assert "attack relearn: " in capsys.readouterr().out
    assert not Path("out").exists()


def test_scoring_samples_where_a_temperature_is_given() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    rows = [FORGET[0]] * 4
    assert len(set(scoring.asked(model, tokenizer, rows, None))) == 1
    assert len(set(scoring.asked(model, tokenizer, rows, None, temperature=1.0))) > 1


def test_attacks_ask_with_the_tasks_own_limit_of_a_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    def says(model: Any, tokenizer: Any, prompts: Any, *, max_new_tokens: int, **_: Any) -> list[str]:
        limits.append(max_new_tokens)
        return ["So it is."] * len(prompts)

    monkeypatch.setattr(scoring, "replies", says)
    made = Tofu(str(tofu.write(tmp_path / "tofu")), scored_rows=2)
    for task in (made, ByProbability(made)):
        attacks.records(task, tiny.model(), tiny.tokenizer(), ["bits8", "leak", "prefix"])
    assert set(limits) == {200}, "as TOFU's replies without an attack"
    limits.clear()
    short = stub([question("What does Ada hide?", "Tea.")], [])
    attacks.records(short, tiny.model(), tiny.tokenizer(), ["leak", "paraphrase"])
    assert set(limits) == {24}, "room for a sentence, however short the answer"


def test_relearning_computes_as_scores_do_whatever_the_model_was_trained_in() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    found = []
    for model in (tiny.model(), accelerator.prepare_model(tiny.model())):
        with scoring_in(False), relearning.relearned(model, tiny.tokenizer(), FORGET, 1e-2):
            found.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *found))
