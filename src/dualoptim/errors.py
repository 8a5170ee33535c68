"""The errors for a user's mistakes."""

from __future__ import annotations

import difflib
import os
import sys
import unicodedata
from collections.abc import Iterable


def one_line(text: object) -> str:
    """A text without characters that break the line or move the cursor, as text from files may have."""
    signs = str(text)
    if signs.isprintable():
        return signs
    return "".join(
        sign if sign.isprintable() or unicodedata.category(sign) == "Zs" else repr(sign)[1:-1] for sign in signs
    )


LONGEST = 1000  # characters of a sentence, which may quote a value of any length


class UserError(ValueError):
    """A mistake of the user's, reported in one sentence: what was found, where, and how to mend it.

    The command line prints it without a traceback and exits with `status`; any other exception is a defect of ours.
    """

    status = 2

    def __init__(self, message: object) -> None:
        said = one_line(message)
        super().__init__(said if len(said) <= LONGEST else f"{said[: LONGEST // 2]} … {said[-LONGEST // 2 :]}")


class NotFiniteError(UserError):
    """A run whose model is not finite after training: its weights, or what it computes of them."""

    status = 3


def check_encoding(name: str) -> None:
    """Refuse a UTF-8 name that the locale's encoding cannot write, or read as other signs than its own."""
    encoding = sys.getfilesystemencoding()
    if encoding == "utf-8":
        return
    try:
        name = os.fsencode(name).decode()
    except UnicodeEncodeError:  # from a recipe, which is read as UTF-8 in any locale
        pass
    except UnicodeDecodeError:
        return
    raise UserError(
        f"{name[:80]}: is UTF-8, but the locale has Python write names in {encoding}; set LC_ALL=C.UTF-8, and unset "
        "PYTHONUTF8"
    )


# Our settings, and what other trainers call them.
MEANT = {
    "batch_size": ("per_device_train_batch_size", "train_batch_size", "global_batch_size"),
    "betas": ("adam_beta1", "adam_beta2"),
    "bf16_weights": ("dtype", "torch_dtype"),
    "eps": ("adam_epsilon", "epsilon"),
    "forget": ("forget_data", "forget_file", "forget_set", "dataset"),
    "forget_loss": ("loss", "loss_type"),
    "forget_loss_args": ("beta",),
    "load_in_4bit": ("qlora", "quantize"),
    "log_every": ("logging_steps", "log_steps"),
    "lora_rank": ("lora", "lora_r", "rank"),
    "lora_targets": ("target_modules", "lora_target_modules"),
    "lr": ("learning_rate",),
    "lr_decay": ("scheduler", "lr_scheduler", "lr_scheduler_type"),
    "max_grad_norm": ("clip_grad_norm", "grad_clip", "gradient_clipping"),
    "max_length": ("max_seq_length", "max_seq_len", "seq_len", "model_max_length", "context_length", "block_size"),
    "micro_batch_size": ("gradient_accumulation_steps", "accumulation_steps"),
    "model": ("model_name_or_path", "model_name", "model_path", "model_id"),
    "optimizer": ("optim",),
    "out": ("output", "output_dir", "outdir", "save_dir"),
    "overwrite": ("force", "overwrite_output_dir"),
    "report_to": ("wandb", "tensorboard"),
    "resume": ("resume_from_checkpoint",),
    "retain": ("retain_data", "retain_file", "retain_set"),
    "save_every": ("save_steps",),
    "seed": ("random_seed",),
    "steps": ("max_steps", "num_steps", "num_train_steps", "epochs", "num_epochs", "num_train_epochs"),
    "warmup_ratio": ("warmup", "warmup_steps"),
    "weight_decay": ("wd",),
}  # fmt: skip


def unknown(kind: str, name: object, known: Iterable[str], where: str = "", listed: str = "") -> UserError:
    """The error for a name that is not among the known ones, with the nearest of those as a hint.

    Args:
        listed: what lists the known names, where they are too many for a sentence.
    """
    names = list(map(str, known))
    near = {_plain(each): each for each in reversed(names)}
    near = {other: near[ours] for ours, others in MEANT.items() if ours in near for other in others} | near
    # A lower cutoff finds names of other meanings; but one wrong letter of three leaves two thirds.
    cutoff = 0.6 if len(_plain(name)) == 3 else 0.7
    close = difflib.get_close_matches(_plain(name), near, n=1, cutoff=cutoff)
    hint = listed or (f"known are {', '.join(names)}" if names else "there are none")
    if close:
        hint = f"did you mean {near[close[0]]!r}?"
    return UserError(f"{where + ': ' if where else ''}unknown {kind} {name!r}; {hint}")


def _plain(name: object) -> str:
    """A name as it is compared: --Batch-Size is batch_size."""
    return str(name).lstrip("-").replace("-", "_").casefold()
