"""The head on labeled positions alone: exactly the full logits' selection, for any causal model and wrapper.

Letters: B sequences in a batch, T tokens in a sequence, V vocabulary, N labeled tokens, d width.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

from dualoptim.errors import UserError
from dualoptim.evaluation.scoring import mean_states
from dualoptim.losses import IGNORED, LOSSES, Labelled, labelled, sequence_log_probs
from dualoptim.losses.base import token_states

from . import tiny

V, B, T = 67, 3, 9
SMALL = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MADE: dict[str, Callable[[], Any]] = {
    "Llama, tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "Llama, untied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "GPT-2, tied": lambda: transformers.GPT2Config(
        vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    ),
    "Phi, head with a bias": lambda: transformers.PhiConfig(**{**SMALL, "num_key_value_heads": 2}),
    "Qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "Gemma2, soft cap after the head": lambda: transformers.Gemma2Config(
        **SMALL, head_dim=8, final_logit_softcapping=0.5, attn_implementation="eager"
    ),
}


def make(kind: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(MADE[kind]()).eval()


@pytest.fixture(params=MADE)
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


@pytest.fixture
def llama() -> Any:
    return make("Llama, tied")


@pytest.fixture
def batch() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (B, T), generator=rng)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, 6:] = 0
    labels = torch.where(torch.rand(B, T, generator=rng) < 0.5, ids, IGNORED)
    labels[mask == 0] = IGNORED
    labels[:, 0] = ids[:, 0]  # which nothing predicts
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def selected(model: Any, batch: Any) -> Labelled:
    """What `labelled` promises: the whole batch's logits, and of those the ones that a label follows."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    places = [(b, t) for b in range(B) for t in range(T - 1) if batch["labels"][b, t + 1] != IGNORED]
    return Labelled(
        torch.stack([logits[b, t] for b, t in places]).float(),
        torch.stack([batch["labels"][b, t + 1] for b, t in places]),
        torch.tensor([b for b, _ in places]),
    )


def gradients(model: Any, logits: Tensor) -> dict[str, Tensor]:
    """Of a sum in which every logit has a weight of its own."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (weights * logits).sum().backward()
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


def assert_same(model: Any, batch: Any, run: Any = None, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """`labelled` of `run`, the model or what wraps it, is the selection of the model's full logits; gradients too."""
    out, expected = labelled(run or model, batch), selected(model, batch)
    assert torch.equal(out.targets, expected.targets)
    assert torch.equal(out.rows, expected.rows)
    assert out.logits.dtype == torch.float32
    assert_close(out.logits, expected.logits, rtol=rtol, atol=atol)
    grads, expected_grads = gradients(model, out.logits), gradients(model, expected.logits)
    assert_close(grads, expected_grads, rtol=rtol, atol=10 * atol)


@contextmanager
def seen_by(head: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """The shapes that reach a head."""
    shapes: list[tuple[int, ...]] = []
    handle = head.register_forward_hook(lambda module, args, out: shapes.append(tuple(args[0].shape)))
    yield shapes
    handle.remove()


def num_labelled(batch: Any) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def test_logits_and_gradients_are_the_full_ones(model: Any, batch: Any) -> None:
    assert_same(model, batch)


def test_the_head_sees_the_labelled_positions_alone(model: Any, batch: Any) -> None:
    with seen_by(model.get_output_embeddings()) as shapes:
        labelled(model, batch)
    assert shapes == [(1, num_labelled(batch), 16)]


def test_hidden_states_cost_one_position_of_logits(model: Any, batch: Any) -> None:
    with seen_by(model.get_output_embeddings()) as shapes:
        LOSSES["RMU"](layer=0)(model, batch)
    assert shapes == [(1, 1, 16)]


def test_the_hook_is_gone_afterwards_and_after_an_error(model: Any, batch: Any) -> None:
    head, before = model.get_output_embeddings(), selected(model, batch).logits
    labelled(model, batch)
    assert not head._forward_pre_hooks
    assert torch.equal(selected(model, batch).logits, before)
    with pytest.raises(IndexError):
        labelled(model, {**batch, "input_ids": batch["input_ids"] + V})
    assert not head._forward_pre_hooks


def test_autocast(model: Any, batch: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model, batch, rtol=2e-2, atol=2e-2)


def test_inference_mode(model: Any, batch: Any) -> None:
    with torch.inference_mode():
        assert_close(labelled(model, batch).logits, selected(model, batch).logits, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing(model: Any, batch: Any) -> None:
    expected = gradients(model, selected(model, batch).logits)
    model.train()  # checkpointing rests in evaluation; none of these has dropout but GPT-2
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # Its name since transformers 5, and the one before.
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    assert_close(gradients(model, labelled(model, batch).logits), expected, rtol=1e-5, atol=1e-5)
    states = LOSSES["RMU"](layer=0)(model, batch)
    model.eval()
    assert_close(states, LOSSES["RMU"](layer=0)(model, batch))


def on_rank(rank: int, meeting: str, batch: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    llama = make("Llama, tied")
    wrapped = nn.parallel.DistributedDataParallel(llama)
    with seen_by(llama.lm_head) as shapes:
        labelled(wrapped, batch)
    assert shapes == [(1, num_labelled(batch), 16)]
    assert_same(llama, batch, wrapped)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort or hang a process that takes itself down in order


def test_under_distributed_data_parallel(batch: Any, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(on_rank, (str(tmp_path / "meeting"), batch), nprocs=2)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_under_peft(settings: dict[str, list[str]], batch: Any) -> None:
    peft = pytest.importorskip("peft")
    inner = make("Llama, untied")
    wrapped = peft.get_peft_model(inner, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
    with seen_by(inner.get_output_embeddings()) as shapes:
        labelled(wrapped.eval(), batch)
    assert shapes == [(1, num_labelled(batch), 16)]
    assert_same(wrapped, batch)


def test_a_compiled_model_gets_no_hook(llama: Any, batch: Any) -> None:
    """It is not told of hooks, so that none may be in its graph; the logits are selected afterward."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(copy.deepcopy(llama), backend=backend, dynamic=True)
    batch["labels"][:, 1] = batch["input_ids"][:, 1]
    for shift in range(3):
        part = {**batch, "labels": batch["labels"].roll(shift, 0)}
        assert_close(labelled(compiled, part).logits, selected(llama, part).logits, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1
    assert not any("hook" in node.name for node in graphs[0].graph.nodes)


class Headless(nn.Module):
    """A model whose head is no module that could be found."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.asked: list[int] = []

    def forward(self, logits_to_keep: int = 0, **inputs: Any) -> Any:
        self.asked.append(logits_to_keep)
        return self.inner(logits_to_keep=logits_to_keep, **inputs)


def test_without_a_head_the_logits_from_the_first_label_on_are_asked_for(llama: Any, batch: Any) -> None:
    batch["labels"][:, :4] = IGNORED
    batch["labels"][0, 4] = batch["input_ids"][0, 4]
    wrapped = Headless(llama)
    assert_same(llama, batch, wrapped)
    assert wrapped.asked == [T - 3]


def test_a_head_that_is_given_other_things_is_left_alone(llama: Any, batch: Any) -> None:
    """A model that flattens before its head gets what it gave, and its logits are selected afterward."""

    class Flattening(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    other = copy.deepcopy(llama)
    head = other.lm_head
    other.lm_head = Flattening(head)
    other.get_output_embeddings = lambda: head
    assert_close(labelled(other, batch).logits, selected(llama, batch).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("additive", [False, True])
def test_packed_sequences_see_themselves_alone(additive: bool, llama: Any, batch: Any) -> None:
    """Two sequences in one, with positions of their own and a mask (B, 1, T, T), are as each by itself."""
    parts = [{key: value[i : i + 1] for key, value in batch.items()} for i in (0, 2)]
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    mask = torch.block_diag(causal, causal).bool()[None, None]
    packed = {
        **{key: torch.cat([part[key] for part in parts], 1) for key in ("input_ids", "labels")},
        "attention_mask": torch.where(mask, 0.0, torch.finfo(torch.float32).min) if additive else mask,
        "position_ids": torch.arange(T).repeat(2)[None],
    }
    packed["labels"][0, T] = IGNORED  # the second's first token, which the first's last would predict
    expected = torch.cat([labelled(llama, part).logits for part in parts])
    assert_close(labelled(llama, packed).logits, expected, rtol=1e-5, atol=1e-6)
    total, _ = sequence_log_probs(llama, packed)
    assert_close(total, sum(sequence_log_probs(llama, part)[0] for part in parts))


def test_states_of_several_streams_are_averaged_and_those_of_added_tokens_left_out() -> None:
    states = torch.randn(B, T, 16)
    streams = torch.stack([states - 1, states, states + 1, states])
    for given in (states, streams, streams.movedim(0, 2)):
        assert_close(token_states(given, torch.Size([B, T])), states)
        assert_close(token_states(given, torch.Size([B, T - 2])), states[:, 2:])
    square = torch.randn(4, 4, T, 16)  # as many streams as rows
    assert_close(token_states(square, torch.Size([4, T])), square.mean(0))
    assert_close(token_states(square.movedim(0, 2), torch.Size([4, T])), square.mean(0))
    for other in (states.flatten(0, 1), states[:, :-1], streams[None]):
        with pytest.raises(UserError, match="take a loss that reads no layer"):
            token_states(other, torch.Size([B, T]))


def test_losses_that_read_a_layer_and_mean_states_take_models_with_several_streams(batch: Any) -> None:
    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        **{**SMALL, "vocab_size": 260, "num_hidden_layers": 4},
        head_dim=8,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=260,
        hidden_size_per_layer_input=4,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    model = transformers.Gemma3nForCausalLM(config).eval()
    for layer in (0, 3):
        loss = LOSSES["RMU"](layer=layer)
        loss.check(model)
        loss(model, batch).backward()
        assert LOSSES["RMURetain"](layer=layer)(model, batch, model).item() == 0
    texts = ["a", "a longer text"]
    together, apart = (
        torch.cat([mean_states(model, tiny.tokenizer(), each) for each in given])
        for given in ([texts], [[t] for t in texts])
    )
    assert together.shape == (2, 16)
    assert_close(together, apart, rtol=0.02, atol=0.02)  # bf16 where the processor has it
