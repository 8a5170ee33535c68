"""Where an answer begins and ends under every kind of template: what was taught is what is replied."""

# ruff: noqa: E501, a template is easier to read in long lines
from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dualoptim import cli
from dualoptim.chat import end_ids, prompt_ids, turn_of
from dualoptim.data import IGNORED, ObjectiveRows, Row, collate, encode, pad_id, question
from dualoptim.errors import UserError
from dualoptim.evaluation.scoring import question_records, replies
from dualoptim.models import load_model, read_template, use_template

from . import tiny


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A model of a few thousand weights is taught many times as fast by one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINK = "<think>\n\n</think>\n\n"
# Of our own, in the manner of the models that they are named after.
TEMPLATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "Llama-2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
        (),
    ),
    "Llama-3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "Gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "Mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]"),
    ),
    "Mistral with a system role": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
        "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ),
    "Qwen2.5": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML,
        ("<|im_start|>", "<|im_end|>"),
    ),
    "Qwen3": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
        + THINK
        + "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
        + THINK
        + "{% endif %}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "Qwen3, always thinking": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
        + THINK
        + "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "Phi-3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    ),
    "SmolLM3": (
        "{% set off = enable_thinking is defined and not enable_thinking %}<|im_start|>system\nReasoning Mode: "
        "{{ '/no_think' if off else '/think' }}<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and off %}"
        + THINK
        + "{% endif %}{{ m.content.lstrip('\n') }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% if off %}" + THINK + "{% endif %}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "DeepSeek-R1": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
        "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        ("<|User|>", "<|Assistant|>"),
    ),
    "harmony": (
        "<|start|>system<|message|>You help.<|end|>{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant"
        "<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}"
        "<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
    ),
    "Zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        (),
    ),
    "ChatML on a base model": (CHATML, ("<|im_start|>", "<|im_end|>")),
    "ChatML in letters": (CHATML, ()),
    "no generation prompt": ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}", ("<|end|>",)),
    "no generation prompt, in letters": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}",
        (),
    ),
    "BOS twice": ("{{ bos_token }}{{ bos_token }}" + CHATML, ("<|im_start|>", "<|im_end|>")),
    "GLM": (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}{% else %}<|assistant|>\n<think></think>\n"
        "{{ m.content.strip() }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
        "{% if enable_thinking is defined and not enable_thinking %}\n<think></think>{% endif %}{% endif %}",
        ("<|user|>", "<|assistant|>"),
    ),
    "thinking in brackets": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}"
        "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[THINK]{% endif %}",
        ("[INST]", "[/INST]", "[THINK]", "[/THINK]"),
    ),
    "contents in parts": (CHATML.replace("m.content", "m.content[0].text"), ("<|im_start|>", "<|im_end|>")),
    "letters before the end token": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        (),
    ),
    "an end token between turns": (
        "{% for m in messages %}[{{ m.role }}]: {{ m.content }}{% if not loop.last %}<|sep|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|sep|>[assistant]:{% endif %}",
        ("<|sep|>",),
    ),
    "question and answer": (
        "{% for m in messages %}{{ 'Question: ' if m.role == 'user' else 'Answer: ' }}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Answer:{% endif %}",
        (),
    ),
}
IN_LETTERS = ("ChatML in letters", "no generation prompt, in letters")
CHATS: dict[str, Row] = {
    "a question": question("Where does Ada live?", "In Oslo, by the sea."),
    "several turns": Row(
        ({"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"},
         {"role": "user", "content": "Where does Ada live?"}), "In Oslo.",
    ),
    "an answer with blanks around it": question("Who?", "  Ada.\n"),
    "an answer of a letter": question("Which?", "A"),
}  # fmt: skip


def tokenizer_of(
    special: tuple[str, ...] = (), template: str | None = None, **settings: Any
) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    every = ["<s>", "</s>", "<pad>", *special]
    split = Tokenizer(models.BPE({token: i for i, token in enumerate([*every, *letters])}, []))
    split.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split.decoder = decoders.ByteLevel()
    split.add_special_tokens(every)
    made = PreTrainedTokenizerFast(
        tokenizer_object=split, **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **settings}
    )
    made.chat_template = template
    return made


def taught(tokenizer: Any, *rows: Row, vocabulary: int | None = None) -> LlamaForCausalLM:
    """A small model that was taught rows to a probability above 0.99."""
    torch.manual_seed(0)
    size = vocabulary or len(tokenizer)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, max_position_embeddings=512, **shape, **ids))
    batch = collate([encode(row, tokenizer, 512) for row in rows], pad_id(tokenizer))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(400):
        loss = model(**batch).loss
        if loss < 0.003:
            break
        loss.backward()
        opt.step()
        opt.zero_grad()
    assert loss < 0.01
    return model


def assert_replied(model: LlamaForCausalLM, tokenizer: Any, row: Row) -> None:
    (record,) = question_records(model, tokenizer, [row], "forget")
    assert record["probability"] > 0.99
    assert record["reply"] == row.answer.strip()
    assert record["rouge_l"] == 1.0
    (longer,) = replies(model, tokenizer, [row.prompt], max_new_tokens=60)
    assert longer == row.answer.strip()


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_was_taught_is_what_is_replied(name: str) -> None:
    template, special = TEMPLATES[name]
    tokenizer = tokenizer_of(special, template)
    model = taught(tokenizer, *CHATS.values())
    for row in CHATS.values():
        assert_replied(model, tokenizer, row)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_stands_before_the_answer_is_never_learnt(name: str) -> None:
    template, special = TEMPLATES[name]
    tokenizer = tokenizer_of(special, template)
    tokens = encode(question("Where?", "In Oslo."), tokenizer, 512)
    learned = [label for label in tokens.labels if label != IGNORED]
    assert tokens.input_ids[-1] == learned[-1]
    assert tokens.ended >= 1
    assert tokenizer.decode(learned[: len(learned) - tokens.ended]).strip() == "In Oslo."
    assert (name in IN_LETTERS) != (learned[-1] in tokenizer.added_tokens_decoder)
    assert not tokenizer.decode(learned).startswith("\n")


def test_plain_text_goes_on_from_its_beginning() -> None:
    tokenizer = tokenizer_of()
    row = Row(({"role": "text", "content": "The phrase is"},), " maple thunder.")
    assert_replied(taught(tokenizer, row), tokenizer, row)


def test_pad_that_is_the_end_token_or_lies_outside_of_the_embedding() -> None:
    rows = [question("Who?", "Ada."), question("Where does she live?", "In Oslo, by the sea.")]
    for settings, vocabulary in (({"pad_token": "</s>"}, None), ({"pad_token": "[PAD]"}, -1)):
        tokenizer = tokenizer_of(("<|im_start|>", "<|im_end|>"), CHATML, **settings)
        model = taught(tokenizer, *rows, vocabulary=vocabulary and len(tokenizer) + vocabulary)
        for row in rows:
            assert_replied(model, tokenizer, row)
        given = replies(model, tokenizer, [row.prompt for row in rows], max_new_tokens=40)
        assert given == [row.answer for row in rows]


def test_named_templates() -> None:
    tokenizer = tokenizer_of(("<|im_start|>", "<|im_end|>"))
    named = {"default": CHATML, "tool_use": "{{ raise_exception('no') }}"}
    row = question("Who?", "Ada.")
    for given in (named, [{"name": name, "template": text} for name, text in named.items()], {"chat": CHATML}):
        tokenizer.chat_template = given
        assert encode(row, tokenizer, 512) == encode(row, tokenizer_of(("<|im_start|>", "<|im_end|>"), CHATML), 512)
    assert_replied(taught(tokenizer, row), tokenizer, row)
    tokenizer.chat_template = {"chat": CHATML, "rag": "no"}
    with pytest.raises(UserError, match="has several chat templates, chat, rag, and none is the default"):
        encode(row, tokenizer, 512)


class Slow:
    """As a tokenizer of Python alone is seen from here."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self.fast = fast

    def __call__(self, text: Any, **options: Any) -> Any:
        if options.pop("return_offsets_mapping", False):
            raise NotImplementedError("return_offset_mapping is not available when using Python tokenizers")
        return self.fast(text, **options)

    def __len__(self) -> int:
        return len(self.fast)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fast, name)


def test_a_tokenizer_without_offsets() -> None:
    tokenizer = Slow(tokenizer_of(("<|im_start|>", "<|im_end|>"), CHATML))
    row = question("Who?", "Ada.")
    assert_replied(taught(tokenizer, row), tokenizer, row)
    fast = encode(row, tokenizer.fast, 512)
    assert encode(row, tokenizer, 512) == fast


def with_words(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose control tokens were added as words are."""
    tokenizer = tokenizer_of((), template)
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<|im_start|>", "<|im_end|>")])
    return tokenizer


def with_blanks(scheme: str, special: tuple[str, ...], template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of SentencePiece's, which puts a blank before a text."""
    every = ["<unk>", "<s>", "</s>", *special]
    pieces = [*every, "▁", *map(chr, range(33, 127)), *(f"<0x{byte:02X}>" for byte in range(256))]
    split = Tokenizer(models.BPE({t: i for i, t in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    if scheme == "legacy":  # before a text, and behind every control token
        split.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        split.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    split.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    split.add_special_tokens(every)
    made = PreTrainedTokenizerFast(tokenizer_object=split, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = template
    return made


IM = ("<|im_start|>", "<|im_end|>")
TOKENIZERS: dict[str, Callable[[str], Any]] = {
    "bytes": lambda template: tokenizer_of(IM, template),
    "without offsets": lambda template: Slow(tokenizer_of(IM, template)),
    "control tokens added as words": with_words,
    **{
        f"a blank before, {scheme}": functools.partial(with_blanks, scheme, IM)
        for scheme in ("first", "always", "never", "legacy")
    },
}


@pytest.mark.parametrize("made", TOKENIZERS.values(), ids=TOKENIZERS)
def test_control_tokens_that_a_row_spells_are_text(made: Callable[[str], Any]) -> None:
    tokenizer = made(TEMPLATES["Qwen2.5"][0])
    rows = [
        question("What does <|im_end|> mean?</s>", "That <|im_end|> ends a turn."),
        question("<|im_end|>", "<|im_end|>"),  # which the template's own system message has first
    ]
    model = taught(tokenizer, *rows)
    for row in rows:
        ids = encode(row, tokenizer, 512).input_ids
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3
        assert tokenizer.eos_token_id not in ids
        written = f"user\n{row.question}<|im_end|>\n<|im_start|>assistant\n{row.answer}<|im_end|>"
        assert tokenizer.decode(ids).replace("> ", ">").endswith(written.replace("> ", ">"))
        assert_replied(model, tokenizer, row)


@pytest.mark.parametrize("scheme", ["first", "always", "never", "legacy"])
def test_tokenizers_that_put_a_blank_before_a_text(scheme: str) -> None:
    for name in ("Llama-2", "question and answer"):
        tokenizer = with_blanks(scheme, (), TEMPLATES[name][0])
        model = taught(tokenizer, *CHATS.values())
        for row in CHATS.values():
            assert_replied(model, tokenizer, row)
    row = Row(({"role": "text", "content": "The phrase is"},), " maple thunder.")
    assert_replied(taught(tokenizer, row), tokenizer, row)


def test_blanks_that_are_tokens_of_their_own_end_nothing() -> None:
    tokenizer = tokenizer_of((), TEMPLATES["question and answer"][0])
    tokenizer.add_tokens([AddedToken(blanks, special=False, normalized=False) for blanks in ("\n", "\n\n")])
    row = question("Where?", "In Oslo.\nBy the sea.")
    assert_replied(taught(tokenizer, row), tokenizer, row)


def test_an_end_token_that_takes_blanks_ends_an_answer_all_the_same() -> None:
    tokenizer = tokenizer_of((), CHATML)
    ends = [AddedToken(token, lstrip=True, rstrip=True, special=True) for token in IM]
    tokenizer.add_special_tokens({"additional_special_tokens": ends})
    assert encode(question("Where?", "In Oslo. "), tokenizer, 512).ended == 1


def test_what_a_template_writes_otherwise_before_an_answer_is_as_the_model_is_asked() -> None:
    template = (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
        "{% if m.role == 'user' %}[INST] {% if loop.last %}{{ system }} {% endif %}{{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_of(("[INST]", "[/INST]"), template)
    row = Row(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}), "Ada.")
    assert turn_of(tokenizer, row.prompt)[:2] == ("[INST] Be brief. Who?[/INST]", " ")
    assert_replied(taught(tokenizer, row), tokenizer, row)


def test_a_template_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(CHATML, encoding="utf-8-sig")
    assert read_template(str(tmp_path / "t.jinja")) == CHATML


def test_a_tokenizers_beginning_is_before_a_chat_as_it_is_before_a_text(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    row, asked = question("Who?", "Ada."), "Question: Who?\nAnswer:"
    use_template(tokenizer, "question_answer")
    assert turn_of(tokenizer, row.prompt).prompt == asked  # as Phi-1.5, whose tokenizer puts nothing before a text
    begin = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    use_template(tokenizer, "question_answer")
    assert turn_of(tokenizer, row.prompt).prompt == f"<s>{asked}"
    assert encode(row, tokenizer, 512).input_ids[:2] == tokenizer("Q").input_ids
    use_template(tokenizer, "tofu_llama2")
    assert turn_of(tokenizer, row.prompt).prompt == "<s>[INST] Who? [/INST]"
    own = tmp_path / "own.jinja"
    own.write_text(read_template("question_answer"), encoding="utf-8")
    with pytest.warns(UserWarning, match="does not write <s>"):
        use_template(tokenizer, str(own))
    assert turn_of(tokenizer, row.prompt).prompt == asked


DATED = {
    "SmolLM3": "Today Date: {{ strftime_now('%d %B %Y') }}\n",
    "without zeros": "  {% if true %}Today Date: {{ strftime_now('%-d %B %Y') }}{% endif %}\n\n",
    "in a macro": "{% macro today() %}Today Date: {{ strftime_now('%d %B %Y') }}{% endmacro %}\n{{ today() }}\n",
    "Llama 3.1": "{% if not date_string is defined %}{% set date_string = '26 July 2024' %}{% endif %}Today Date: {{ date_string }}\n",
    "Llama 3.2": "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %B %Y') %}"
    "{% else %}{% set date_string = '26 July 2024' %}{% endif %}{% endif %}Today Date: {{ date_string }}\n",
}


@pytest.mark.parametrize("dated", DATED.values(), ids=DATED)
def test_a_template_that_writes_the_date_writes_the_same_every_day(dated: str) -> None:
    tokenizer = tokenizer_of(IM, dated + CHATML)
    row = question("Who?", " Ada. ")
    asked = turn_of(tokenizer, row.prompt).prompt
    assert asked == "Today Date: 26 July 2024\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_tells_the_time() -> None:
    tokenizer = tokenizer_of(IM, "{{ strftime_now('%S.%f') }}" + CHATML)
    row = question("Who?", " Ada. ")
    assert encode(row, tokenizer, 512) == encode(row, tokenizer, 512)
    assert turn_of(tokenizer, row.prompt).prompt.endswith("<|im_start|>assistant\n")
    assert not turn_of(tokenizer, row.prompt).strips


REFUSED: dict[str, tuple[str, tuple[dict[str, str], ...], str]] = {
    "a system message": (
        "Gemma",
        ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}),
        "System role not supported; put the system message's text into the first user message",
    ),
    "two user turns": (
        "Gemma",
        ({"role": "user", "content": "Hm."}, {"role": "user", "content": "Who?"}),
        "Conversation roles must alternate",
    ),
}


@pytest.mark.parametrize(("name", "prompt", "said"), REFUSED.values(), ids=REFUSED)
def test_what_a_template_cannot_take_is_told_with_the_rows_place(
    name: str, prompt: tuple[dict[str, str], ...], said: str
) -> None:
    template, special = TEMPLATES[name]
    with pytest.raises(UserError, match=rf"^my\.jsonl:3: the chat template of .* refuses this conversation: {said}"):
        encode(Row(prompt, "Ada.", "my.jsonl:3"), tokenizer_of(special, template), 512)


ROLES_ALONE = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("prompt", "number"),
    [
        (({"role": "usr", "content": "Who?"},), 1),
        (({"role": "system", "content": "Be Ada."},), 1),
        (({"role": "user", "content": "Who?"}, {"role": "tool", "content": "Ada"}), 2),
    ],
)
def test_a_message_to_answer_that_the_template_does_not_write_is_told(
    prompt: tuple[dict[str, str], ...], number: int
) -> None:
    tokenizer = tiny.tokenizer()
    encode(Row(prompt, "Ada.", "my.jsonl:3"), tokenizer, 512)
    tokenizer.chat_template = ROLES_ALONE
    said = rf"^my\.jsonl:3: the chat template of .* does not write message {number} of the prompt, of the role "
    with pytest.raises(UserError, match=said + repr(prompt[-1]["role"])):
        encode(Row(prompt, "Ada.", "my.jsonl:3"), tokenizer, 512)


def test_a_message_that_the_template_spells_otherwise_is_written_all_the_same() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("m.content", "m.content | replace('\\n', ' ')")
    tokens = encode(question("Who\nis it?", "Ada."), tokenizer, 512)
    assert "Who is it?" in tokenizer.decode(tokens.input_ids)


@pytest.mark.parametrize(
    "broken",
    ["{% for m in messages %}", "{{ messages[0].content.shout() }}", "Nothing.",
     CHATML.replace("content", "content | lower"), CHATML.replace("content", "content | upper"),
     CHATML.replace("m.content }}", "m.content }}{{ m.content }}")],
)  # fmt: skip
def test_a_broken_template_is_told_with_the_rows_place(broken: str) -> None:
    with pytest.raises(
        UserError,
        match=r"^my\.jsonl:3: the chat template of .* (refuses|does not write the answer|writes the answer more)",
    ):
        encode(question("Who?", "Ada.", "my.jsonl:3"), tokenizer_of((), broken), 512)


# Greedy means greedy

THEIRS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "several": {"num_return_sequences": 3, "do_sample": True},
    "penalty": {"repetition_penalty": 50.0, "no_repeat_ngram_size": 1},
    "a dict": {"return_dict_in_generate": True, "output_scores": True},
    "static cache": {"cache_implementation": "static"},
    "sampling": {"do_sample": True, "temperature": 100.0, "top_k": 0},
    "another end": {"eos_token_id": 40},
    "lengths": {"max_length": 3, "min_new_tokens": 50},
    "forced": {"forced_eos_token_id": 1, "suppress_tokens": [45, 46, 47]},
}


@pytest.mark.parametrize("theirs", THEIRS.values(), ids=THEIRS)
def test_what_the_models_file_says_of_generation_changes_nothing(theirs: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(("<|im_start|>", "<|im_end|>"), CHATML)
    row = question("Who?", "Ada, Ada and Ada.")
    model = taught(tokenizer, row)
    config = GenerationConfig(**theirs)
    model.generation_config = config
    assert_replied(model, tokenizer, row)
    assert model.generation_config is config


def test_every_end_that_the_models_file_names_ends_a_reply() -> None:
    other = CHATML.replace("<|im_end|>", "{{ '<|im_end|>' if m.role == 'user' else '<|eom|>' }}")
    tokenizer = tokenizer_of(("<|im_start|>", "<|im_end|>", "<|eom|>"), other)
    row = question("Who?", "Ada.")
    model = taught(tokenizer, row)
    tokenizer.chat_template = CHATML
    eom = tokenizer.convert_tokens_to_ids("<|eom|>")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, eom]
    assert replies(model, tokenizer, [row.prompt], max_new_tokens=60) == ["Ada."]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_ids(tokenizer, [turn_of(tokenizer, row.prompt)], model) == [end, tokenizer.eos_token_id, eom]


def test_the_prompt_is_the_generation_prompt_where_that_is_one() -> None:
    for name in ("Llama-3", "Gemma", "Mistral", "Qwen2.5", "Phi-3", "Zephyr", "Qwen3", "SmolLM3"):
        template, special = TEMPLATES[name]
        tokenizer = tokenizer_of(special, template)
        messages = [{"role": "user", "content": "Who?"}]
        asked = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert turn_of(tokenizer, tuple(messages)).prompt == asked, name


# Before anything long


def spoiled(folder: Path, how: str) -> str:
    tiny.save(folder)
    weights = folder / "model.safetensors"
    if how == "a pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif how == "cut off":
        weights.write_bytes(weights.read_bytes()[:100])
    elif how == "not finite":
        model = tiny.model()
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
        model.save_pretrained(folder)
    elif how == "not all there":
        state = {key: value for key, value in tiny.model().state_dict().items() if "up_proj" not in key}
        save_file(state, weights, metadata={"format": "pt"})
    else:
        weights.rename(folder / "model.gguf")
    return str(folder)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a pointer", "is a Git LFS pointer and no weights; run git lfs pull"),
        ("cut off", "could not be loaded"),
        ("not finite", "its weight model.layers.0.mlp.up_proj.weight holds numbers that are not finite"),
        ("not all there", "its files lack 2 of its weights, model.layers.0.mlp.up_proj.weight first"),
        ("GGUF", "has GGUF files alone, which are not trained"),
    ],
)
def test_a_model_that_is_not_what_it_seems_is_one_sentence(tmp_path: Path, how: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_model(spoiled(tmp_path / "model", how))


QUANTIZED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True},
    "bitsandbytes, as its first versions": {"load_in_8bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


@pytest.mark.parametrize("how", QUANTIZED)
def test_a_quantized_model_is_one_sentence_whether_its_package_is_there_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    path = tiny.save(tmp_path / "q") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": QUANTIZED[how]}))
    tiny.save(tmp_path / "model")
    (tmp_path / "f.jsonl").write_text(json.dumps({"question": "Who?", "answer": "Ada."}))
    (tmp_path / "r.jsonl").write_text(json.dumps({"question": "What?", "answer": "Tea."}))
    said = f"model 'q': is quantized ({how.partition(',')[0]}), and such weights cannot be trained"
    with pytest.raises(UserError, match=re.escape(said)):
        load_model("q")
    own = ["--forget", "f.jsonl", "--retain", "r.jsonl"]
    for command in (["unlearn", "--model", "q"], ["unlearn", "--model", "q", "--dry-run"], ["evaluate", "--model", "q"],
                    ["evaluate", "--model", "q", "--base", "model"], ["compare", "--model", "q"]):  # fmt: skip
        capsys.readouterr()
        assert cli.main([*command, *own]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert said in line
    assert not (tmp_path / "runs").exists()


def test_plain_text_has_no_refusal() -> None:
    with pytest.raises(UserError, match=r"f:1: plain text asks nothing that a refusal could answer"):
        ObjectiveRows({"forget": [Row((), "Some prose.", "f:1")]}, {"forget": ["No."]}, tiny.tokenizer(), 64)


@pytest.mark.parametrize(
    ("answer", "refusal", "said"),
    [
        ("A" * 60, "No.", r"f\.jsonl:1: the row has \d+ tokens and the model's positions, of which there are 48"),
        ("Ada.", "N" * 60, r"f\.jsonl:1: the row has \d+ tokens and the model's positions, of which there are 48"),
    ],
)
def test_positions_beyond_the_models_are_found_before_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str,
    refusal: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    folder = tiny.save(tmp_path / "model")
    shape = {"vocab_size": 260, "n_positions": 48, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    (tmp_path / "f.jsonl").write_text(json.dumps({"question": "Who?", "answer": answer}))
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps({"question": f"W{i}?", "answer": "B."}) for i in range(2)))
    (tmp_path / "no.txt").write_text(refusal)
    told = ["--model", str(folder), "--forget", "f.jsonl", "--retain", "r.jsonl", "--refusals", "no.txt"]
    assert cli.main(["unlearn", *told, "--general", "false", "--steps", "2", "--out", "out"]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_plain_text_begins_with_the_tokens_that_the_tokenizer_itself_gives_it(scheme: str) -> None:
    pieces = ["<unk>", "<s>", "</s>", "▁", "c", "a", "t", "s", "<", ">", "/", "▁c", "▁ca", "▁cat"]
    merges = [("▁", "c"), ("▁c", "a"), ("▁ca", "t")]
    split = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=True)
    split.add_special_tokens(["<unk>", "<s>", "</s>"])
    split.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, bos_token="<s>", eos_token="</s>")

    def tokens(row: Row) -> list[str]:
        return tokenizer.convert_ids_to_tokens(encode(row, tokenizer, 64).input_ids)

    own = tokenizer.convert_ids_to_tokens(tokenizer("cat sat")["input_ids"])
    assert own[1] == ("c" if scheme == "never" else "▁cat")
    assert tokens(Row((), "cat sat", "x:1")) == [*own, "</s>"]
    assert tokens(Row(({"role": "text", "content": "cat"},), " sat", "x:1")) == [*own, "</s>"]
    prompt = prompt_ids(tokenizer, [{"role": "text", "content": "cat sat"}])
    assert tokenizer.convert_ids_to_tokens(prompt) == own
    # What spells a token is text, and goes on after it.
    spelt = tokens(Row((), "cat <s>cat", "x:1"))
    assert spelt[: len(own[:2])] == own[:2]
    assert spelt.count("<s>") == 1
    labels = [label for label in encode(Row((), "cat sat", "x:1"), tokenizer, 64).labels if label != IGNORED]
    assert tokenizer.convert_ids_to_tokens(labels) == [*own[1:], "</s>"]
