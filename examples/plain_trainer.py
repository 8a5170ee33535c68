"""DualOptim+ in a plain `transformers.Trainer`: the five lines with `opt` or `Turn`, and rows in step order.

What is to be forgotten is answered by a refusal, so the model's own loss serves both objectives. For losses of their
own, evaluation by a forget/keep score, and checkpoints that are whole, take `UnlearnTrainer` (trainer.py).

python examples/plain_trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from dualoptim import DualOptimPlus

turns = ["forget", "retain", "retain"] * 20  # the objective of each step
per_step = 4  # rows of a step: per_device_train_batch_size, times gradient accumulation, times ranks

# With a real model: AutoModelForCausalLM.from_pretrained(...), and rows that its tokenizer made.
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
)
questions = {"forget": [3, 4, 5], "retain": [6, 7, 8]}
answers = {"forget": [30, 31], "retain": [20, 21]}  # of the forgotten question, "I do not know"
rows = [{"input_ids": questions[name] + answers[name], "labels": [-100] * 3 + answers[name]}
        for name in turns for _ in range(per_step)]  # fmt: skip

opt = DualOptimPlus(model.parameters(), lr=3e-3, objectives=("forget", "retain"))


class Turn(TrainerCallback):
    """Tells the optimizer the objective of each step."""

    def on_step_begin(self, args, state, control, **kwargs):
        opt.objective = turns[state.global_step]


with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=len(turns), per_device_train_batch_size=per_step, logging_steps=20, report_to="none",
        train_sampling_strategy="sequential",  # since transformers 5.2; an IterableDataset keeps its order as well
        save_strategy="no", use_cpu=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, callbacks=[Turn()], optimizers=(opt, None)).train()

print("steps:", {name: int(opt.state[model.lm_head.weight][f"delta_step/{name}"]) for name in opt.objectives})
for name, question in questions.items():
    said = model.generate(torch.tensor([question]), max_new_tokens=2, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    print(f"{name}: answers {said}, as it was taught: {said == answers[name]}")
