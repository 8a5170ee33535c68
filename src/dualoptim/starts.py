"""What runs start from: the same model, measured in the same way on the same rows. Only such runs can be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# Settings that runs which are prepared once may differ in.
OF_TRAINING = {
    "forget_loss", "forget_loss_args", "retain_loss", "retain_loss_args", "weights", "optimizer", "joint", "combine",
    "alone", "retain_bound", "multiplier_lr", "multiplier_start", "multiplier_warmup", "sam_rho", "lr_decay", "ratio",
    "steps", "batch_size", "micro_batch_size", "lr", "lr_scales", "betas", "base_bits", "delta_bits", "base_betas",
    "base_weights", "eps", "weight_decay", "max_update", "warmup_ratio", "max_grad_norm", "seed", "bf16",
    "gradient_checkpointing", "log_every", "curve_points",
}  # fmt: skip
# Further settings that leave the numbers before training as they are, or only add some.
SAME_BEFORE = {
    "train", "lora_rank", "lora_alpha", "lora_targets", "lora_dropout", "dora", "until", "keep_at_least", "pause",
    "lm_eval", "attacks", "out", "save_model", "merge", "save_every", "private", "report_to", "release_gradients",
}  # fmt: skip


def settings(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that decide what it starts from; any that is not known to leave it as it is."""
    left_out = OF_TRAINING | SAME_BEFORE
    return {key: value for key, value in entry.get("config", {}).items() if key not in left_out}


def key(entry: Mapping[str, Any]) -> str:
    """A text that is equal for the entries of runs of one start."""
    return json.dumps([entry.get("part"), settings(entry)], sort_keys=True)


def groups(entries: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Runs by their start, in the order of the first of each."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        found.setdefault(key(entry), []).append(entry)
    return list(found.values())
