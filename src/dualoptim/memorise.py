"""Memorizing: train a model on rows until it gives them word for word, as the start of a benchmark of forgetting."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from . import ranks, tiny
from .cache import cache_dir
from .cached import is_whole, made_once
from .data import Row
from .device import device_and_precision
from .errors import UserError
from .identity import identity
from .losses import GD
from .models import copy_processor, load_model, load_tokenizer, quiet, use_template
from .schedule import by_turns
from .trainer import Objective, UnlearnTrainer


@dataclass(frozen=True)
class Settings:
    """How long and how fast rows are learned: measured in docs/log.md."""

    epochs: int
    lr: float
    batch_size: int
    seed: int = 0


PRETRAINED = Settings(epochs=10, lr=3e-4, batch_size=8)  # SmolLM2-135M: a probability of 0.99 on TOFU rows
FROM_SCRATCH = Settings(epochs=24, lr=2e-3, batch_size=8)  # tiny: 0.999, retrained on half the rows 0.996


def memorised(
    model: str,
    rows: Sequence[Row],
    *,
    vocabulary_rows: Sequence[Row] | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    max_length: int = 512,
    seed: int = 0,
    chat_template: str | None = None,
) -> Path:
    """The folder of a model trained on rows until it has memorized them; cached, by the device's precision too.

    With several ranks, a separate process of the first rank does it, so that the result is that of a single process.

    Plain AdamW with betas (0.9, 0.95) on the answers' likelihood, linear decay after a tenth of warm-up. The reference
    of exact unlearning, a model with the same start that was never trained on the rows to forget, is

        memorised("tiny", kept_rows, vocabulary_rows=all_rows)

    Args:
        model: folder, hub id, "smollm2", or "tiny", a small Llama from scratch (`dualoptim.tiny`).
        rows: the rows to memorize, the whole answer of each, whatever parts of it have labels.
        vocabulary_rows: the rows that the tokenizer of "tiny" is made from; default `rows`.
        epochs: passes over the rows. Default, as of `lr` and `batch_size`: `FROM_SCRATCH` for "tiny", else
            `PRETRAINED`.
        lr: learning rate.
        batch_size: rows of a step.
        max_length: the most tokens that a row may have.
        seed: of the rows' order, and of the weights of "tiny".
        chat_template: instead of the model's own, as for `dualoptim.models.load_tokenizer`.

    Raises:
        UserError: no rows, or `vocabulary_rows` for a model that has a tokenizer.
    """
    again = functools.partial(memorised, **locals())
    if not rows:
        raise UserError("nothing to memorise: there are no rows; give at least one")
    rows = [row.whole for row in rows]
    default = FROM_SCRATCH if model == tiny.TINY else PRETRAINED
    epochs = default.epochs if epochs is None else epochs
    lr = default.lr if lr is None else lr
    batch_size = default.batch_size if batch_size is None else batch_size
    if model == tiny.TINY:
        trained, tokenizer = tiny.build(vocabulary_rows or rows, seed)
    elif vocabulary_rows is None:
        trained, tokenizer = load_model(model), load_tokenizer(model)
    else:
        raise UserError(f"vocabulary_rows: {model} has a tokenizer already; leave them out, or memorise with 'tiny'")
    if chat_template is not None:
        use_template(tokenizer, chat_template)
    device, has_bf16 = device_and_precision()
    settings = [epochs, lr, batch_size, max_length, seed, has_bf16, torch.__version__]
    unended = [i for i, row in enumerate(rows) if not row.ends]
    key = [identity(trained, tokenizer), settings, [[row.prompt, row.answer] for row in rows], unended]
    folder = cache_dir() / "memorised" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    if ranks.several():  # a Trainer here would use all ranks, and the model would depend on their number
        ranks.of_first(lambda: None if is_whole(folder) else ranks.apart(again))
        return folder
    turns = by_turns({"memorise": 1}, batch_size, -(-len(rows) * epochs // batch_size))

    def teach(place: Path) -> None:
        with tqdm(total=len(turns), desc="Memorizing", disable=None) as bar:
            trainer = UnlearnTrainer(
                trained,
                TrainingArguments(
                    output_dir=str(place),
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
            with quiet():
                trainer.train()
                trained.save_pretrained(place)
            tokenizer.save_pretrained(place)
            if model != tiny.TINY:
                copy_processor(model, place)

    return made_once(folder, teach)


class _Progress(TrainerCallback):
    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()
