"""Teach a model rows by heart: what a benchmark of forgetting starts from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from .data import Row
from .losses import GD
from .models import cache_dir, device_and_precision, fingerprint, load_model, load_tokenizer, quiet
from .schedule import by_turns
from .trainer import Objective, UnlearnTrainer


def memorised(
    model: str,
    rows: Sequence[Row],
    *,
    epochs: int = 10,
    lr: float = 3e-4,
    batch_size: int = 8,
    max_length: int = 512,
    seed: int = 0,
    chat_template: str | None = None,
) -> Path:
    """The folder of a model trained on rows until it has them by heart; from the cache where it has been done before.

    Plain AdamW with betas (0.9, 0.95) on the answers' likelihood, linear decay after a tenth of warm-up.

    Args:
        model: folder, hub id or "smollm2".
        rows: what it is to memorise.
        epochs: passes over the rows. 10, and `lr` 3e-4, bring SmolLM2-135M to a probability of 0.99 on TOFU rows.
        lr: learning rate.
        batch_size: rows of a step.
        max_length: the most tokens that a row may have.
        seed: of the rows' order.
        chat_template: file with a chat template to use instead of the model's.
    """
    trained, tokenizer = load_model(model), load_tokenizer(model, chat_template)
    settings = [epochs, lr, batch_size, max_length, seed, tokenizer.chat_template, torch.__version__]
    key = [fingerprint(trained), settings, [[row.prompt, row.answer] for row in rows]]
    folder = cache_dir() / "memorised" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    turns = by_turns({"memorise": 1}, batch_size, -(-len(rows) * epochs // batch_size))
    device, has_bf16 = device_and_precision()
    with (
        tempfile.TemporaryDirectory(dir=folder.parent) as partial,
        tqdm(total=len(turns), desc="Memorising", disable=None) as bar,
    ):
        trainer = UnlearnTrainer(
            trained,
            TrainingArguments(
                output_dir=partial,
                learning_rate=lr,
                lr_scheduler_type="linear",
                warmup_steps=len(turns) // 10,
                bf16=has_bf16,
                use_cpu=device.type == "cpu",
                seed=seed,
                report_to="none",
                save_strategy="no",
                logging_steps=10,
                disable_tqdm=True,
            ),
            objectives={"memorise": Objective(rows, GD())},
            turns=turns,
            processing_class=tokenizer,
            max_length=max_length,
            optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": lr, "betas": (0.9, 0.95), "fused": True}),
            callbacks=[_Progress(bar)],
        )
        trainer.remove_callback(PrinterCallback)
        done = Path(partial) / "model"
        with quiet():
            trainer.train()
            trained.save_pretrained(done)
        tokenizer.save_pretrained(done)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(done, folder)
    return folder


class _Progress(TrainerCallback):
    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()
