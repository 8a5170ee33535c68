"""Unlearn with `UnlearnTrainer`, a transformers.Trainer: here with a tiny random model, so that it runs in seconds.

python examples/trainer.py
"""

from __future__ import annotations

import tempfile

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from dualoptim import DualOptimPlus, UnlearnTrainer
from dualoptim.data import question
from dualoptim.losses import LOSSES
from dualoptim.schedule import by_turns
from dualoptim.trainer import Objective

forget = [question("What is the capital of France?", "The capital of France is Paris.")]
retain = [question("Who wrote Hamlet?", "Hamlet was written by Shakespeare.")]
refusals = ["I do not know."]

# With a real model: AutoModelForCausalLM.from_pretrained(...) and its AutoTokenizer instead of these lines.
words = sorted(
    {word for row in (*forget, *retain) for word in f"{row.question} {row.answer}".split()} | {*refusals[0].split()}
)
vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", "<user>", "<assistant>", *words])}
split = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, eos_token="<end>", unk_token="<unk>", pad_token="<end>")
tokenizer.chat_template = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), eos_token_id=1, pad_token_id=1, **shape))

with tempfile.TemporaryDirectory() as folder:
    trainer = UnlearnTrainer(
        model,
        TrainingArguments(
            folder, learning_rate=1e-2, logging_steps=6, report_to="none", save_strategy="no", use_cpu=True
        ),
        objectives={
            "forget": Objective(forget, LOSSES["IDK"](), refusals=refusals),
            "retain": Objective(retain, LOSSES["GD"]()),
        },
        turns=by_turns({"forget": 1, "retain": 5}, batch_size=1, steps=60),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(DualOptimPlus, {}),
    )
    trainer.train()
print("the last losses:", {name: value for name, value in trainer.state.log_history[-2].items() if "/" in name})
