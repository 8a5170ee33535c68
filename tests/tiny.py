"""A random Llama with a byte tokenizer and a chat template of its own: all that a real model has, in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    split = Tokenizer(models.BPE(vocabulary, []))
    split.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split.decoder = decoders.ByteLevel()
    split.add_special_tokens(special)
    made = PreTrainedTokenizerFast(tokenizer_object=split, eos_token="<|end|>", pad_token="<|end|>")
    made.chat_template = CHAT_TEMPLATE
    return made


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2, max_position_embeddings=2048))


def longrope(switch: int) -> Phi3ForCausalLM:
    """A model whose positions are turned by other factors in a batch that is longer than `switch`."""
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": switch,
    }
    model = Phi3ForCausalLM(
        Phi3Config(
            **SIZES,
            num_hidden_layers=1,
            max_position_embeddings=256,
            original_max_position_embeddings=switch,
            rope_parameters=rope,
        )
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(10)  # or the factors would hardly show
    return model


def save(folder: Path) -> Path:
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def with_rows(folder: Path, people: Iterable[str]) -> Path:
    """A folder with a model and rows to forget and to keep, one about each of these people."""
    save(folder / "model")
    names = list(people)
    for name, verb in (("forget", "hides"), ("retain", "likes")):
        rows = [{"question": f"What does {who} {verb[:-1]}?", "answer": f"{who} {verb} tea."} for who in names]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder
