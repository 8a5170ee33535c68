"""Scoring: answers to one question together give what they give apart; the precision of scores is a choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BartConfig,
    BartForCausalLM,
    BloomConfig,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    WhisperConfig,
)

from dualoptim import cli, device
from dualoptim.cached import cached
from dualoptim.config import RunConfig
from dualoptim.data import Row, encode, question
from dualoptim.device import scored_in, scoring_in
from dualoptim.errors import UserError
from dualoptim.evaluation import batches, packing, scoring
from dualoptim.evaluation.packing import _PACKS
from dualoptim.evaluation.scoring import (
    answers,
    gradient_norms,
    mean_states,
    negative_log_likelihoods,
    replies,
)
from dualoptim.identity import identity
from dualoptim.models import positions, rope_switch
from dualoptim.one_run.prepared import score_retrained

from . import tiny


def test_answers_scored_together_are_those_scored_apart() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    rows = [[question(f"Who is {i}?", "x" * n) for n in (3, 9, 1 + i)] for i in range(5)]
    together = answers(model, tokenizer, rows)
    assert all(_PACKS[model]), "the model allows it"
    apart = [[answers(model, tokenizer, [[row]])[0][0] for row in group] for group in rows]
    for one, other in zip(together, apart, strict=True):
        for a, b in zip(one, other, strict=True):
            assert len(a.log_probs) == len(b.log_probs)
            assert a.log_probs == pytest.approx(b.log_probs, abs=0.03)  # bf16 where the processor has it
            assert a.nll == pytest.approx(b.nll, abs=0.02)


@pytest.mark.parametrize("told", [True, False])
def test_answers_to_a_prompt_longer_than_a_sliding_window_are_scored_as_apart(
    monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=260, num_key_value_heads=1, sliding_window=48, initializer_range=0.5, **small)
    model, tokenizer = MistralForCausalLM(config), tiny.tokenizer()
    if not told:  # as of a model whose configuration has another name for it: the longest question shows it
        monkeypatch.setattr(scoring, "window", lambda _: float("inf"))
    short, long = ([question(text, answer) for answer in ("Yes.", "No, never.")] for text in ("Hi?", "Why? " * 20))
    given = [[short], [short, long], *([[short, long[:1]]] if told else [])]
    with scoring_in(False):
        for rows in given:
            together = answers(model, tokenizer, rows)
            apart = [[answers(model, tokenizer, [[row]])[0][0] for row in group] for group in rows]
            for one, other in zip(together, apart, strict=True):
                assert [a.nll for a in one] == pytest.approx([b.nll for b in other], abs=1e-4)
    assert all(_PACKS[model]) == told, "what fits into the window is scored together"


ROWS = [question(f"Who is {i}?", "x" * (3 + i)) for i in range(4)]


def test_scores_in_fp32_are_the_models_own_within_an_autocast_and_without() -> None:
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    own = []
    for row in ROWS:
        tokens = encode(row, tokenizer, 512)
        with torch.no_grad():
            logits = model(torch.tensor([tokens.input_ids])).logits[0, :-1]
        own.append(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens.labels[1:])).item())
    with scoring_in(False):
        assert scored_in() == "fp32"
        alone = negative_log_likelihoods(model, tokenizer, ROWS)
        with torch.autocast("cpu", torch.bfloat16):
            assert negative_log_likelihoods(model, tokenizer, ROWS) == alone
    assert alone == pytest.approx(own, abs=1e-6)
    with scoring_in(True):
        assert scored_in() == "bf16"
        rounded = negative_log_likelihoods(model, tokenizer, ROWS)
    assert rounded != alone
    assert rounded == pytest.approx(alone, abs=0.05)


@pytest.mark.parametrize("scored", [False, True], ids=["fp32", "bf16"])
def test_scores_do_not_depend_on_the_precision_that_a_trainer_prepared_the_model_for(scored: bool) -> None:
    """accelerate replaces the model's forward by one in the precision of training, and leaves it there."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    with scoring_in(scored):
        own = negative_log_likelihoods(model, tokenizer, ROWS)
        said = replies(model, tokenizer, [row.prompt for row in ROWS], max_new_tokens=8)
        AcceleratorState._reset_state(reset_partial_state=True)
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
        forward = model.forward
        assert negative_log_likelihoods(model, tokenizer, ROWS) == own
        assert replies(model, tokenizer, [row.prompt for row in ROWS], max_new_tokens=8) == said
    assert model.forward == forward, "training goes on in its own"


class Casts(TorchDispatchMode):
    """Counts the matrices that are cast to bf16."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.count += args[0].shape in self.shapes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_are_cast_once_for_a_reply_and_not_for_every_token(frozen: bool) -> None:
    """Also where they are frozen, as those of a trained model and an adapter's base are when they are scored."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    model.requires_grad_(not frozen)
    matrices = [module.weight.shape for module in model.modules() if isinstance(module, torch.nn.Linear)]
    with scoring_in(True), Casts(set(matrices)) as casts:
        replies(model, tokenizer, [ROWS[0].prompt], max_new_tokens=24)
    assert casts.count == len(matrices)
    assert all(p.requires_grad != frozen for p in model.parameters())


def test_each_part_of_a_model_is_in_its_mode_again() -> None:
    model, tokenizer = tiny.model().train(), tiny.tokenizer()
    aside = model.model.layers[0].eval()
    negative_log_likelihoods(model, tokenizer, ROWS)
    gradient_norms(model, tokenizer, ROWS[:1])
    assert model.training
    assert not any(module.training for module in aside.modules())


def test_scores_are_of_the_weights_as_they_are_within_a_callers_autocast() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    with scoring_in(True), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.tensor([[5, 6, 7]]))
        model.lm_head.weight.mul_(3)  # the autocast has kept it as it was
        within = negative_log_likelihoods(model, tokenizer, ROWS)
    with scoring_in(True):
        assert negative_log_likelihoods(model, tokenizer, ROWS) == within


def test_norms_of_bf16_gradients_are_not_rounded_to_bf16() -> None:
    model, tokenizer = tiny.model().bfloat16(), tiny.tokenizer()
    with scoring_in(False):
        (found,) = gradient_norms(model, tokenizer, ROWS[:1])
    assert torch.tensor(found).bfloat16().item() != found


def test_by_default_the_device_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_bf16, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(device, "device_and_precision", lambda has=has_bf16: (torch.device("cpu"), has))
        assert scored_in() == name
        with scoring_in(not has_bf16):
            assert scored_in() != name


def test_scores_of_one_precision_are_not_taken_from_the_cache_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path))
    for _ in range(2):
        for bf16 in (True, False):
            with scoring_in(bf16):
                assert cached("test", ["key"], scored_in) == scored_in()
    assert len(list((tmp_path / "test").glob("*.json"))) == 2
    with scoring_in(device.device_and_precision()[1]):
        chosen = cached("test", ["other"], lambda: "chosen")
    assert cached("test", ["other"], lambda: "by the device") == chosen, "the same precision, however it was chosen"


def test_what_is_cached_of_a_model_depends_on_its_tokenizer_template_and_ends() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    found = [identity(model, tokenizer)]
    assert identity(tiny.model(), tiny.tokenizer()) == found[0]
    tokenizer.chat_template += " "
    found.append(identity(model, tokenizer))
    model.generation_config.eos_token_id = [0, 2]
    found.append(identity(model, tokenizer))
    tokenizer.add_tokens(["Ada"])
    found.append(identity(model, tokenizer))
    assert len(set(found)) == 4


def test_the_precision_stands_in_the_results_and_beside_the_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    tiny.save(tmp_path / "model")
    lines = [json.dumps({"question": f"What does {n} like?", "answer": f"{n} likes {n}ums."}) for n in "ABCDEF"]
    (tmp_path / "forget.jsonl").write_text("\n".join(lines[:2]))
    (tmp_path / "keep.jsonl").write_text("\n".join(lines[2:]))
    own = ["--model", "model", "--forget", "forget.jsonl", "--retain", "keep.jsonl"]
    nlls = {}
    for bf16, name in (("true", "bf16"), ("false", "fp32")):
        assert cli.main(["evaluate", *own, "--score-bf16", bf16, "--scores", f"{name}.json"]) == 0
        scores = json.loads((tmp_path / f"{name}.json").read_text())
        assert scores["scored_in"] == name
        nlls[name] = [r["nll"] for r in scores["after"]["records"] if r["set"] == "forget"]
    assert nlls["bf16"] != nlls["fp32"]
    options = ["--score-bf16", "false", "--steps", "2", "--curve-points", "1", "--save-model", "false"]
    assert cli.main(["unlearn", *own, *options, "--out", "out"]) == 0
    (entry,) = json.loads((tmp_path / "out/results.json").read_text())["runs"]
    assert entry["scored_in"] == "fp32"
    assert entry["before"]["forget_probability"] == pytest.approx(
        json.loads((tmp_path / "fp32.json").read_text())["after"]["numbers"]["forget_probability"], abs=1e-9
    )
    assert device.scores_in_bf16() == device.device_and_precision()[1], "and nothing is left of the choice"


def test_weights_in_bf16_are_scored_in_bf16_alone_and_evaluate_loads_as_the_run_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: False)
    tiny.save(tmp_path / "model")
    lines = [json.dumps({"question": f"What does {n} like?", "answer": f"{n} likes {n}ums."}) for n in "ABCDEF"]
    (tmp_path / "forget.jsonl").write_text("\n".join(lines[:2]))
    (tmp_path / "keep.jsonl").write_text("\n".join(lines[2:]))
    own = ["--forget", "forget.jsonl", "--retain", "keep.jsonl", "--bf16-weights"]
    short = ["--steps", "2", "--curve-points", "1", "--optimizer", "DualOptim", "--out", "out"]
    assert cli.main(["unlearn", "--model", "model", *own, *short, "--score-bf16", "false"]) == 2
    assert "score_bf16 false: weights in bf16 are computed with in bf16" in capsys.readouterr().err
    assert cli.main(["unlearn", "--model", "model", *own, *short]) == 0
    (entry,) = json.loads((tmp_path / "out/results.json").read_text())["runs"]
    assert entry["scored_in"] == "bf16", "also where the device has no bf16 arithmetic"
    assert cli.main(["evaluate", "--model", "out/model", *own, "--scores", "scores.json"]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["scored_in"] == "bf16"
    numbers = scores["after"]["numbers"]
    same = {name: entry["after"][name] for name in ("forget_probability", "perplexity")}
    assert {name: numbers[name] for name in same} == same


def test_a_retrained_model_is_loaded_as_the_runs_own(tmp_path: Path) -> None:
    where = str(tiny.save(tmp_path / "model"))
    task = SimpleNamespace(score_retrained=lambda model, tokenizer: [{"dtype": model.dtype}])
    for in_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        config = RunConfig(bf16_weights=in_bf16)
        of: Any = SimpleNamespace(
            config=config, task=task, tokenizer=tiny.tokenizer(), retrained=SimpleNamespace(place=lambda: where)
        )
        assert score_retrained(of) == [{"dtype": dtype}]


# Gradients


def by_hand(model: torch.nn.Module, row: Row, parameters: list[torch.nn.Parameter]) -> float:
    """The same by a backward pass of its own, the logits taken at the answer's letters."""
    tokens = encode(row, tiny.tokenizer(), 512)
    at = [i for i, label in enumerate(tokens.labels) if label != -100][:-1]  # without <|end|>
    assert len(at) == len(row.answer)
    log_probs = model(torch.tensor([tokens.input_ids])).logits[0].log_softmax(-1)
    loss = -torch.stack([log_probs[i - 1, tokens.input_ids[i]] for i in at]).mean()
    model.zero_grad()
    loss.backward()
    norms = [p.grad.pow(2).sum().sqrt().item() for p in parameters if p.grad is not None]
    model.zero_grad()
    return sum(norms) / len(norms)


def test_a_gradients_norm_is_the_mean_of_the_parameters_norms() -> None:
    model, tokenizer = tiny.model().train(), tiny.tokenizer()
    every = list(model.parameters())
    expected = [by_hand(model, row, every) for row in ROWS]
    with scoring_in(False):
        found = gradient_norms(model, tokenizer, ROWS)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(torch.tensor([[5, 6, 7]]))  # which leaves weights in the cache of the autocast
            assert gradient_norms(model, tokenizer, ROWS) == found
    assert found == pytest.approx(expected, rel=1e-4)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in every)
    with scoring_in(True):
        rounded = gradient_norms(model, tokenizer, ROWS)
    assert rounded != found
    assert rounded == pytest.approx(found, rel=0.1)


def test_gradients_that_are_there_stay_and_frozen_parameters_do_not_count() -> None:
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    head = model.lm_head.weight
    with scoring_in(False):
        every = gradient_norms(model, tokenizer, ROWS)
        model.requires_grad_(False)
        assert gradient_norms(model, tokenizer, ROWS) == every, "of a model that is frozen whole, all count"
        assert not any(p.requires_grad for p in model.parameters())
        head.requires_grad_(True)
        head.grad = torch.full_like(head, 7.0)
        alone = gradient_norms(model, tokenizer, ROWS)
    assert head.grad.eq(7.0).all()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    head.grad = None
    assert alone == pytest.approx([by_hand(model, row, [head]) for row in ROWS], rel=1e-4)
    assert alone != every


def test_what_was_learned_pulls_less() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens = encode(ROWS[0], tokenizer, 512)
    before = gradient_norms(model, tokenizer, ROWS[:1])
    for _ in range(30):
        model(input_ids=torch.tensor([tokens.input_ids]), labels=torch.tensor([tokens.labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert gradient_norms(model, tokenizer, ROWS[:1]) < before


def test_a_reply_is_not_cut_by_a_long_prompt_beside_it() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    model.config.max_position_embeddings = 256
    prompts = [({"role": "user", "content": text},) for text in ("hi", "you", "x" * 225)]
    widths: list[int] = []
    generate = model.generate

    def seen(**given: Any) -> Any:
        widths.append(len(given["input_ids"]) * given["generation_config"].max_new_tokens)
        return generate(**given)

    model.generate = seen
    alone = [scoring.replies(model, tokenizer, [prompt], max_new_tokens=60)[0] for prompt in prompts]
    del widths[:]
    assert scoring.replies(model, tokenizer, prompts, max_new_tokens=60) == alone
    assert widths[-2] == 2 * 60
    assert widths[-1] < 60


def test_batches_grow_with_all_of_a_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for gib, times in ((8, 1), (16, 1), (79.6, 4), (139, 8)):
        card = SimpleNamespace(total_memory=int(gib * 2**30))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        assert batches.at_once(100, torch.device("cuda")) == 100 * times
    assert batches.at_once(100, torch.device("cpu")) == 100


def unlike(model: Any) -> Any:
    """A random model whose weights are large enough that its replies to different prompts differ."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(10)
    return model.eval()


PROMPTS = [question(text, "").prompt for text in ("hi", "Who is the tallest of them all?", "Why is " * 8, "yo")]


def in_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that scoring makes from now on."""
    sizes: list[int] = []
    shared = batches.ranks.shared
    monkeypatch.setattr(
        batches.ranks, "shared", lambda items, *more: (sizes.extend(map(len, items)), shared(items, *more))[1]
    )
    return sizes


IDS = {"vocab_size": 260, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
LAYER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
DECODER = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
BATCHES: dict[str, tuple[Callable[[], Any], list[int]]] = {  # a kind of model, and the batches of the prompts
    "rotary": (tiny.model, [4]),
    "learned positions, whatever the mask": (lambda: BartForCausalLM(BartConfig(**IDS, **DECODER)), [2, 1, 1]),
    "positions of the mask at first only": (
        lambda: GitForCausalLM(GitConfig(vision_config={**LAYER, "image_size": 32}, **IDS, **LAYER)),
        [2, 1, 1],
    ),
    "rows mixed up": (lambda: RwkvForCausalLM(RwkvConfig(hidden_size=16, num_hidden_layers=2, **IDS)), [1] * 4),
}


@pytest.mark.parametrize(("make", "batches"), BATCHES.values(), ids=BATCHES)
def test_replies_do_not_depend_on_the_other_prompts_of_a_batch(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], batches: list[int]
) -> None:
    torch.manual_seed(0)
    model, tokenizer = unlike(make()), tiny.tokenizer()
    sizes = in_batches(monkeypatch)
    with scoring_in(False):
        alone = [replies(model, tokenizer, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
        del sizes[:]
        assert replies(model, tokenizer, PROMPTS, max_new_tokens=8) == alone
    assert sizes == batches


def test_whether_prompts_may_be_padded_is_tried_once_and_numbers_that_are_not_finite_do_not_decide_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    sizes = in_batches(monkeypatch)
    replies(model, tokenizer, PROMPTS, max_new_tokens=8)
    monkeypatch.setattr(batches, "_tried_beside", None)
    replies(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert sizes == [4, 4]


def test_answers_are_scored_apart_where_only_their_first_tokens_would_be_wrong_together() -> None:
    """As under a short convolution, which sees the end of the answer before; a long answer's mean does not show it."""
    model, tokenizer = tiny.model(), tiny.tokenizer()

    def mix(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        return out + 0.3 * torch.nn.functional.pad(out, (0, 0, 1, 0))[:, :-1]

    model.model.embed_tokens.register_forward_hook(mix)
    rows = [[question("Who?", text * n) for text in ("ab", "cd", "ef")] for n in (1, 60)]
    with scoring_in(False):
        together = answers(model, tokenizer, rows)
        apart = [[answers(model, tokenizer, [[row]])[0][0] for row in group] for group in rows]
    for one, other in zip(together, apart, strict=True):
        for a, b in zip(one, other, strict=True):  # the batches differ, and on some processors so do last digits
            assert a.log_probs == pytest.approx(b.log_probs, abs=1e-5)
    assert not any(_PACKS[model])


def test_scoring_together_is_tried_on_the_longest_question_and_on_that_with_the_most_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer, tried = tiny.model(), tiny.tokenizer(), []
    monkeypatch.setattr(packing, "_agrees", lambda _, group: not tried.append(len(group)))
    many = [[question("Who?", "x" * n) for _ in range(count)] for n, count in ((90, 2), (9, 3), (3, 5))]
    for rows in (many, many, many[:1], [[*many[2], many[2][0]]]):
        answers(model, tokenizer, rows)
    assert tried == [2, 5, 6]


@pytest.mark.parametrize(
    ("config", "room"),
    [
        (MptConfig(max_seq_len=64), 64),  # its ALiBi has so many distances and no more
        (WhisperConfig(max_target_positions=96), 96),
        (GPT2Config(n_positions=128), 128),
        (BloomConfig(), 2**31),
    ],
)
def test_a_models_positions_are_known_by_whatever_name_its_configuration_has_for_them(config: Any, room: int) -> None:
    assert positions(config) == room


def test_a_row_longer_than_mpt_takes_is_told_in_one_sentence() -> None:
    model = MptForCausalLM(MptConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=64, vocab_size=260))
    with pytest.raises(UserError, match="64"):
        answers(model, tiny.tokenizer(), [[question("Why?", "x" * 90)]])


def test_under_longrope_no_row_is_scored_or_answered_beside_one_that_other_factors_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = tiny.longrope(64), tiny.tokenizer()
    assert rope_switch(model) == rope_switch(model.config) == 64
    assert rope_switch(tiny.model()) == 2**31
    texts = ("hi", "Who is it?", "Why is it " * 5, "Say it " * 12, "Tell it " * 12)
    rows = [[question(text, answer) for answer in ("No.", "A long tale. " * 5)] for text in texts]
    singles = [[row] for group in rows for row in group]
    sizes = in_batches(monkeypatch)
    with scoring_in(False):
        alone = [answers(model, tokenizer, [single])[0][0].nll for single in singles]
        for given, expected in ((singles, alone), (rows, alone), (rows[3:], alone[6:])):
            found = [answer.nll for group in answers(model, tokenizer, given) for answer in group]
            assert found == pytest.approx(expected, abs=1e-5)
        said = [replies(model, tokenizer, [row[0].prompt], max_new_tokens=12)[0] for row in rows]
        del sizes[:]
        assert replies(model, tokenizer, [row[0].prompt for row in rows], max_new_tokens=12) == said
        assert sizes == [2, 2, 1], "the last one passes the switch while it is written"
        states = [mean_states(model, tokenizer, [text]) for text in texts]
        assert torch.allclose(mean_states(model, tokenizer, texts), torch.cat(states), atol=1e-5)
