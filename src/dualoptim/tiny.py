"""A Llama of a few million parameters with a tokenizer of its own, both made from a task's rows.

It knows only what it is trained on. So an unlearning run takes seconds, and the reference of exact unlearning, a model
that was never trained on the rows to forget, costs no more than the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .data import Row

TINY = "tiny"  # the name under which `dualoptim.memorise` makes it
VOCABULARY = 3072  # tokens at most; the sizes were measured, see docs/log.md
WIDTH, LAYERS, HEADS = 192, 4, 4
CONTEXT = 2048  # tokens
END, PAD = "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build(rows: Sequence[Row], seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """An untrained model, and a byte-level BPE tokenizer made from the rows' texts, which can encode any text.

    The same rows and seed give the same tokenizer and the same weights; torch's random generator is left as it was.

    Args:
        rows: whose questions and answers the vocabulary is made from.
        seed: of the weights.

    >>> from dualoptim.data import question
    >>> model, tokenizer = build([question("Where does Ada live?", "Ada lives in Bergen.")])
    >>> tokenizer.tokenize("Ada lives in Oslo.")
    ['Ada', 'Ġlives', 'Ġin', 'Ġ', 'O', 's', 'l', 'o', '.']
    """
    split = Tokenizer(models.BPE())
    split.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split.decoder = decoders.ByteLevel()
    split.train_from_iterator(
        [text for row in rows for text in (*(message["content"] for message in row.prompt), row.answer)],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END, PAD, *ROLES],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), tokenizer
