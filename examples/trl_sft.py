"""DualOptim+ in TRL's `SFTTrainer`: the five lines with `opt` or `Turn`, and rows in step order.

What is to be forgotten is answered by a refusal, so that TRL's own loss serves both objectives.

pip install trl && python examples/trl_sft.py
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from dualoptim import DualOptimPlus

turns = ["forget", "retain", "retain"] * 20  # the objective of each step
per_step = 4  # rows of a step: per_device_train_batch_size, times gradient accumulation, times ranks
says = {"forget": ("Who are you ?", "I do not know"), "retain": ("Who wrote Hamlet ?", "Shakespeare wrote it")}
rows = Dataset.from_list(
    [{"prompt": f"{says[name][0]} ", "completion": says[name][1]} for name in turns for _ in range(per_step)]
)

# With a real model: AutoModelForCausalLM.from_pretrained(...) and its AutoTokenizer instead of these lines.
vocabulary = {
    word: i for i, word in enumerate(["<unk>", "<end>", *sorted({*" ".join(map(" ".join, says.values())).split()})])
}
split = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, eos_token="<end>", unk_token="<unk>", pad_token="<end>")
torch.manual_seed(0)
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), eos_token_id=1, pad_token_id=1, **shape))

opt = DualOptimPlus(model.parameters(), lr=1e-2, objectives=("forget", "retain"))


class Turn(TrainerCallback):
    """Tells the optimizer the objective of each step."""

    def on_step_begin(self, args, state, control, **kwargs):
        opt.objective = turns[state.global_step]


with tempfile.TemporaryDirectory() as folder:
    arguments = SFTConfig(
        folder, max_steps=len(turns), per_device_train_batch_size=per_step, logging_steps=20, report_to="none",
        train_sampling_strategy="sequential", save_strategy="no", use_cpu=True, bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer,
                         callbacks=[Turn()], optimizers=(opt, None))  # fmt: skip
    trainer.train()

print("steps:", {name: int(opt.state[model.lm_head.weight][f"delta_step/{name}"]) for name in opt.objectives})
model.eval()
for name, (question, answer) in says.items():
    asked = tokenizer(question, return_tensors="pt")["input_ids"]
    said = tokenizer.decode(
        model.generate(asked, max_new_tokens=8, do_sample=False)[0, asked.shape[1] :], skip_special_tokens=True
    )
    print(f"{name}: answers {said!r}, as it was taught: {said == answer}")
