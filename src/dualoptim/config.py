"""What can be set about a run: one flat dataclass, filled from defaults < recipe < command line.

This file imports nothing heavy, so that the command line can print help at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import UserError, unknown

# The headings of `--help`, in its order; a field names its own, and is under "advanced" where it names none.
FORGET_AND_KEEP, MODEL, LOSSES, OPTIMIZER, SCHEDULE, EVALUATION, SAVING, ADVANCED = GROUPS = (
    "what to forget and keep", "model", "losses", "optimizer", "schedule", "evaluation", "saving", "advanced",
)  # fmt: skip

# How a signed record and a model's card show a setting that may hold text (`dualoptim.certify.shown` has the rules): as
# it is; a path by its last part; the name of a data set, or a path; the name of a model, or a path; a name of this or
# another package, or a path; a list of texts by their number; a mapping by its values.
AS_IS, PATH, DATA, START, NAMED, COUNTED, NESTED = SHOWN = (
    "as it is", "path", "data", "model", "named", "counted", "nested",
)  # fmt: skip


def option(default: Any, help: str, group: str = ADVANCED, choices: Sequence[Any] = (), shown: str = "") -> Any:
    """A dataclass field with a default, a line of help, its heading in the help, and its values if they are few.

    Args:
        shown: one of `SHOWN`; numbers, flags and settings with choices need none, and are shown as they are.
    """
    metadata = {"help": help, "group": group, "choices": tuple(choices), "shown": shown or (AS_IS if choices else "")}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# Arguments by name, of any type; with str first, jsonargparse takes a text as it stands and makes no number of "007".
Arguments = dict[str, str | int | float | bool | dict | list | None]


@dataclass
class RunConfig:
    """One unlearning run: a model, what to forget and keep, the losses, the optimizer, the schedule, the output.

    Defaults are the published settings for Phi-1.5 on TOFU (arXiv 2605.21539), except for the batch size and the number
    of steps, which are for a laptop.
    """

    forget: str | None = option(
        None,
        "file of rows to forget, as JSON lines, JSON, CSV or parquet, or a data set of the hub: question and answer, "
        "messages, text, or a topic's name",
        FORGET_AND_KEEP,
        shown=DATA,
    )
    retain: str | None = option(
        None, "file of rows to keep, of the same kinds; without it, included general rows", FORGET_AND_KEEP, shown=DATA
    )
    goal: str = option(
        "refuse",
        "for your own rows: refuse, so that the model says that it does not know, or erase, so that the answer itself "
        "becomes improbable; chooses losses, optimizer, learning rate, ratio and length where they are not given",
        FORGET_AND_KEEP,
        ("refuse", "erase"),
    )
    general: bool = option(
        True,
        "for your own rows: also keep the model's own replies to general questions and to neighbors; false keeps the "
        "rows of --retain alone, and what no row mentions may be lost",
        FORGET_AND_KEEP,
    )
    chunk: int | None = option(
        None,
        "cut plain text of your own rows into chunks of this many tokens; without it, too long a text is an error",
        FORGET_AND_KEEP,
    )
    chunk_stride: int | None = option(
        None,
        "tokens from the start of one chunk to the start of the next, fewer than --chunk for an overlap; without it, "
        "no overlap",
        FORGET_AND_KEEP,
    )
    refusals: str | None = option(
        None,
        "file of replies that say 'I don't know', JSON lines with 'text' or plain lines",
        FORGET_AND_KEEP,
        shown=PATH,
    )
    task: str | None = option(
        None,
        "a task by name (see `dualoptim ls`) or a Python file, instead of --forget and --retain",
        FORGET_AND_KEEP,
        shown=NAMED,
    )
    task_args: Arguments = option(
        {}, "arguments of the task, such as '{split: forget01}'", FORGET_AND_KEEP, shown=NESTED
    )
    data_dir: str | None = option(
        None, "folder that holds the task's data; without it they come from the hub", FORGET_AND_KEEP, shown=PATH
    )

    model: str = option(
        "smollm2",
        "folder or hub id of a causal language model, or of an adapter (PEFT), which is then trained further; "
        "'smollm2' is the included SmolLM2-135M-Instruct",
        MODEL,
        shown=START,
    )
    chat_template: str | None = option(
        None,
        "Jinja file, or question_answer, tofu_llama2 or tofu_llama3, instead of the model's own template",
        MODEL,
        shown=NAMED,
    )
    train: str | None = option(
        None,
        "regular expression: only parameters whose names it matches are trained; without it, all are",
        MODEL,
        shown=AS_IS,
    )
    lora_rank: int = option(
        0,
        "train a new low-rank adapter of this rank (dualoptim[lora]); 0: the whole model, or the adapter that it is",
        MODEL,
    )
    lora_alpha: float | None = option(
        None, "α of that adapter, which is scaled by α / rank; without it, twice the rank", MODEL
    )
    lora_targets: list[str] | str = option(
        "all-linear",
        "modules that get one, by names or a regular expression; all-linear is every linear layer but the output",
        MODEL,
        shown=AS_IS,
    )
    lora_dropout: float = option(0.0, "dropout on the adapter's input in training", MODEL)
    dora: bool = option(False, "train a magnitude beside that adapter (DoRA)", MODEL)
    load_in_4bit: bool = option(
        False,
        "load the model, or the adapter's base, in 4 bits (NF4; dualoptim[qlora]); what is trained is an adapter",
        MODEL,
    )
    memorise: bool = option(
        False, "first train the model until it has memorized the task's rows; cached (--memorize, too)", MODEL
    )
    memorise_args: Arguments = option({}, "how it is trained to: epochs, lr, batch_size, seed", MODEL, shown=AS_IS)

    forget_loss: str = option("IDK", "loss on the rows to forget", LOSSES, shown=AS_IS)
    forget_loss_args: Arguments = option({}, "its arguments, such as '{beta: 0.1}'", LOSSES, shown=AS_IS)
    retain_loss: str = option("GD", "loss on the rows to keep", LOSSES, shown=AS_IS)
    retain_loss_args: Arguments = option({}, "its arguments", LOSSES, shown=AS_IS)
    weights: dict[str, float] = option(
        {}, "coefficients of the objectives' losses, 1 where left out: '{retain: 2}'", LOSSES, shown=AS_IS
    )

    optimizer: str = option(
        "DualOptim+", "see `dualoptim ls` for when to use which", OPTIMIZER, ("DualOptim+", "DualOptim", "AdamW")
    )
    lr: float = option(1e-5, "learning rate", OPTIMIZER)
    lr_scales: dict[str, float] | Literal["equal"] = option(
        {},
        "factor on the learning rate by objective, such as '{forget: 1.5}'; 'equal': the larger the fewer steps an "
        "objective has, so that all move alike whatever the ratio; 1 where left out (DualOptim+, DualOptim)",
        OPTIMIZER,
        shown=AS_IS,
    )
    joint: bool = option(
        False, "joint training, both objectives in every step, instead of alternating (AdamW only)", OPTIMIZER
    )
    base_bits: int = option(32, "bits of the base's moments (DualOptim+)", OPTIMIZER, (8, 32))
    delta_bits: int = option(32, "bits of the deltas' moments, or of AdamW's own", OPTIMIZER, (8, 32))
    betas: tuple[float, float] | None = option(None, "β1, β2; without it, the optimizer's defaults", OPTIMIZER)
    base_betas: tuple[float, float] = option((0.9, 0.95), "β1, β2 of the base (DualOptim+)", OPTIMIZER)
    base_weights: dict[str, float] | Literal["equal"] = option(
        {},
        "how much a step of each objective feeds the base, such as '{forget: 3, retain: 0.6}'; 'equal': so that all "
        "weigh alike whatever the ratio; 1 where left out (DualOptim+)",
        OPTIMIZER,
        shown=AS_IS,
    )
    eps: float = option(1e-8, "ε added to the root of the second moment", OPTIMIZER)
    weight_decay: float = option(0.01, "decoupled weight decay; none on norms and biases", OPTIMIZER)
    max_update: float | None = option(
        1.0, "bound on each update before the learning rate (DualOptim+); null for the published rule", OPTIMIZER
    )
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0 for no clipping", OPTIMIZER)

    ratio: str = option(
        "1:5",
        "forget steps to retain steps (joint: rows of every batch), or of a task's objectives in their order; or "
        "'size' or 'loss': in proportion to their rows, or to the model's loss on them",
        SCHEDULE,
        shown=AS_IS,
    )
    steps: int = option(120, "optimizer steps", SCHEDULE)
    batch_size: int = option(8, "sequences per optimizer step", SCHEDULE)
    micro_batch_size: int | None = option(None, "sequences per forward pass; without it, the whole batch", SCHEDULE)
    warmup_ratio: float = option(
        0.1, "share of the steps over which the learning rate rises; it falls linearly after", SCHEDULE
    )
    lr_decay: bool = option(True, "let the learning rate fall after that; false: it stays", SCHEDULE)
    until: float | None = option(
        None,
        "stop once two checks in a row find no more than this left of what is to be forgotten, or with --goal refuse "
        "not refused, 0 to 1; without it, by the goal",
        SCHEDULE,
    )
    keep_at_least: float | None = option(
        None,
        "share of what is kept that must remain, 0 to 1: the best point above it is what is written, and a run that "
        "stays below it ends early",
        SCHEDULE,
    )
    pause: bool = option(
        False, "skip the forget steps while no more than --until is left at a check; retain steps go on", SCHEDULE
    )
    seed: int = option(0, "seed of the row order and of the refusals' choice", SCHEDULE)

    curve_points: int = option(4, "how often the forget/keep curve is measured during training", EVALUATION)
    retrained: str | None = option(
        None,
        "folder or hub id of a model that never saw the rows to forget, to compare with, or 'make', with --memorise",
        EVALUATION,
        shown=START,
    )
    lm_eval: list[str] = option(
        [], "tasks of lm-evaluation-harness to measure general ability by (dualoptim[lm-eval])", EVALUATION, shown=NAMED
    )
    lm_eval_limit: int | None = option(None, "samples of each of them, the first ones; without it, all", EVALUATION)
    attacks: list[str] = option(
        [],
        "whether the forgotten comes back: relearn, bits8, nf4 (dualoptim[qlora]), leak, paraphrase, prefix, such as "
        "'[relearn, leak]'",
        EVALUATION,
        shown=AS_IS,
    )
    relearn_lr: float | None = option(
        None,
        "learning rate of the attack relearn; without it the published 2e-5, which hardly moves a small model",
        EVALUATION,
    )
    probes: list[str] = option(
        [],
        "questions of other benchmarks to ask before and after: rwku, blur, or one of their sets by name",
        EVALUATION,
        shown=AS_IS,
    )
    probes_dir: str | None = option(
        None, "folder that holds those questions; without it they come from the hub", EVALUATION, shown=PATH
    )
    probe_subjects: list[str] = option([], "RWKU's subjects to ask about; without it, all", EVALUATION, shown=COUNTED)
    probe_limit: int | None = option(None, "questions of each set, the first ones; without it, all", EVALUATION)
    fast: bool = option(
        False,
        "score by the probability of answers alone, of the rows to forget, to keep, and known but held out: no "
        "replies, and no model is written",
        EVALUATION,
    )
    score_bf16: bool | None = option(
        None,
        "bf16 autocast where models are scored; without it, where the device has bf16 arithmetic; false: fp32",
        EVALUATION,
    )

    out: str = option("runs/unlearn", "folder for the results", SAVING, shown=PATH)
    save_model: bool = option(
        True, "write the unlearned model to OUT/model, an adapter by itself to OUT/adapter", SAVING
    )
    merge: bool | None = option(
        None,
        "score the model with the adapter merged into it, and rounded, and write it to OUT/model; without it, unless "
        "the base is in 4 bits",
        SAVING,
    )
    save_every: int = option(0, "steps between checkpoints to resume from; 0 for none", SAVING)
    private: bool = option(
        False,
        "write no text of rows or replies: results, records and report hold numbers and hashes only",
        SAVING,
    )
    log_every: int = option(10, "steps between log entries", SAVING)
    report_to: str = option(
        "none", "where the trainer logs to, as transformers names it: tensorboard, wandb, …", SAVING, shown=AS_IS
    )

    combine: str | None = option(
        None, "how a joint step makes one gradient of several; without it, a sum", ADVANCED, ("PCGrad", "GRU", "UPGrad")
    )
    alone: str | None = option(
        None, "train on this one of the task's objectives only, for the steps that it has in the mix", shown=AS_IS
    )
    retain_bound: float | None = option(
        None, "hold the retain loss below this by a multiplier that begins at its weight (PDU)"
    )
    multiplier_lr: float = option(1.0, "how fast that multiplier moves")
    multiplier_start: float | None = option(
        None, "where that multiplier begins, in place of the loss's weight; 100 in PDU's runs on TOFU"
    )
    multiplier_warmup: float = option(
        0.0, "share of the steps over which it stays where it begins; 0.5 in PDU's runs on TOFU"
    )
    sam_rho: float | None = option(
        None,
        "take the gradients to forget at weights moved by this along them (SAM); 0.01 in NPO+SAM's runs on MUSE",
    )
    max_length: int = option(512, "tokens a row may have; a longer one is an error, since its answer would be cut off")
    bf16: bool | None = option(None, "bf16 autocast in training; without it, where the device has bf16 arithmetic")
    bf16_weights: bool = option(
        False,
        "load the weights in bf16, for half the memory; those that are trained are rounded stochastically when they "
        "are stepped (DualOptim+, DualOptim)",
    )
    release_gradients: bool = option(
        False, "step and free each gradient while backward runs; with --max-grad-norm 0, in one pass a step"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")

    @property
    def inputs(self) -> dict[str, str | None]:
        """What is read: setting → the file or folder that it names, or may name; an adapter's base is read, too.

        What is known by a name is left out, though a file or folder may have the same.
        """
        from .adapters import base_of
        from .evaluation.general import files_of
        from .models import SMOLLM2
        from .tiny import TINY

        models: dict[str, str] = {}
        if self.model not in (SMOLLM2, TINY):
            models["model"] = self.model
        if self.retrained not in (None, SMOLLM2, "make"):
            models["retrained"] = self.retrained
        return {
            **models,
            "chat_template": self.chat_template if os.path.isfile(self.chat_template or "") else None,
            "task": self.task if (self.task or "").endswith(".py") else None,
            **{name: getattr(self, name) for name in ("data_dir", "probes_dir", "forget", "retain", "refusals")},
            **{f"{name} (the adapter's base)": base_of(model) for name, model in models.items()},
            **{f"lm_eval (task {i})": task for i, task in enumerate(self.lm_eval, 1) if files_of([task])},
            **{
                f"task_args ({name})": value
                for name, value in self.task_args.items()
                if isinstance(value, str) and os.sep in value  # others are names and words
            },
        }

    @property
    def method(self) -> str:
        """The name under which results are shown."""
        bits = " 8-bit" if 8 in (self.base_bits if self.optimizer == "DualOptim+" else 32, self.delta_bits) else ""
        bits = (" SAM" if self.sam_rho is not None else "") + bits
        if self.optimizer != "AdamW":
            return self.optimizer + bits
        if self.alone is not None:
            return f"{self.alone[0].upper()}{self.alone[1:]} alone{bits}"
        if self.retain_bound is not None:
            return "PDU" + bits
        return (self.combine or ("Joint AdamW" if self.joint else "Alternating AdamW")) + bits

    def replace(self, **changes: Any) -> RunConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, for YAML and JSON."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def settings(self) -> dict[str, Any]:
        """The fields that make a run the one that it is: all but the folder of its results, which may be moved."""
        return without_place(self.as_dict())


_OF_PART = re.compile(r"part\d+")  # its folder, beside those of the other parts


def without_place(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's fields without its folder; a part's start model, which the part before it left, is named from there.

    >>> without_place({"model": "runs/a/part1/model", "seed": 0, "out": "runs/a/part2"})
    {'model': '../part1/model', 'seed': 0}
    """
    found = {key: value for key, value in values.items() if key != "out"}
    model, out = Path(str(values.get("model"))), Path(str(values.get("out")))
    if _OF_PART.fullmatch(out.name) and _OF_PART.fullmatch(model.parent.name) and model.parents[1] == out.parent:
        found["model"] = f"../{model.parent.name}/{model.name}"
    return found


# The settings that define a method; what a method leaves out has these values, whatever the recipe says.
PLAIN: dict[str, Any] = {
    "joint": False, "combine": None, "alone": None, "retain_bound": None, "sam_rho": None, "base_bits": 32,
    "delta_bits": 32,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "Joint AdamW": {"optimizer": "AdamW", "joint": True},
    "Alternating AdamW": {"optimizer": "AdamW", "joint": False},
    "DualOptim": {"optimizer": "DualOptim", "joint": False},
    "DualOptim+": {"optimizer": "DualOptim+", "joint": False},
    "Joint AdamW 8-bit": {"optimizer": "AdamW", "joint": True, "delta_bits": 8},
    "Alternating AdamW 8-bit": {"optimizer": "AdamW", "joint": False, "delta_bits": 8},
    "DualOptim 8-bit": {"optimizer": "DualOptim", "joint": False, "delta_bits": 8},
    "DualOptim+ 8-bit": {"optimizer": "DualOptim+", "joint": False, "base_bits": 8, "delta_bits": 8},
    "PCGrad": {"optimizer": "AdamW", "joint": True, "combine": "PCGrad"},
    "GRU": {"optimizer": "AdamW", "joint": True, "combine": "GRU"},
    "UPGrad": {"optimizer": "AdamW", "joint": True, "combine": "UPGrad"},
    # The bound and the step of the multiplier are the authors' for TOFU. Where it begins and how long it stays there is
    # the recipe's: 100 for half the run is right for the forget loss of theirs, LogitMargin, and too much for others.
    "PDU": {"optimizer": "AdamW", "joint": True, "retain_bound": 0.3, "multiplier_lr": 5.0},
    "Joint AdamW SAM": {"optimizer": "AdamW", "joint": True, "sam_rho": 0.01},
    "DualOptim+ SAM": {"optimizer": "DualOptim+", "joint": False, "sam_rho": 0.01},
}
# The settings of a multiplier, as methods without one have them.
NO_MULTIPLIER: dict[str, Any] = {"multiplier_lr": 1.0, "multiplier_start": None, "multiplier_warmup": 0.0}
OF_METHODS = {*PLAIN, *NO_MULTIPLIER, "optimizer", "seed"}  # the settings that `compare` chooses by method and seed
# Settings that only some optimizers read.
READ_BY = {
    **{key: {"DualOptim+"} for key in ("base_betas", "base_weights", "max_update")},
    "lr_scales": {"DualOptim+", "DualOptim"},
}
# The settings that a goal chooses for your own rows.
GOALS_OWN = ("forget_loss", "retain_loss", "optimizer", "lr", "betas", "eps", "ratio", "batch_size", "steps", "until",
             "pause", "keep_at_least", "curve_points")  # fmt: skip
FAST = {"save_model": False, "curve_points": 0}  # what `fast` chooses where they are not given
# When to use which; `dualoptim ls` prints it.
USES: dict[str, str] = {
    "Joint AdamW": "when a baseline is wanted: one state, both objectives in every step",
    "Alternating AdamW": "the first to try, and when memory is short: one state, one objective a step",
    "DualOptim": "when the objectives share nothing: a state for each",
    "DualOptim+": "when keeping counts most: a shared base, a delta for each; try --lr-scales equal unless it is 1:1",
    "PCGrad": "when joint gradients conflict: each loses its component against the others (dualoptim[torchjd])",
    "GRU": "when forgetting must not harm the rows to keep: the forget gradient alone, less what harms them",
    "UPGrad": "when no objective may lose, to first order (dualoptim[torchjd])",
    "PDU": "when the retain loss must stay below a bound, held by a multiplier",
    "Joint AdamW SAM": "when what is forgotten must not come back by a little training: flat where it was forgotten",
    "DualOptim+ SAM": "when that is wanted with a base that the objectives share, and a delta for each",
    "Alone": "when the cost of mixing is wanted: AdamW on each of a task's objectives by itself",
}
MAIN = ["Joint AdamW", "Alternating AdamW", "DualOptim", "DualOptim+"]
ALONE = "Alone"  # a method for each of a task's objectives: AdamW on it alone


def to_give(values: Mapping[str, Any], always: Collection[str] = ()) -> dict[str, Any]:
    """Of a run's settings, those that a command or a recipe has to give, so that the run is the same.

    They differ from the defaults, or a goal or `fast` would choose them otherwise.

    Args:
        values: the settings.
        always: further settings that are given, whatever their values.

    >>> to_give({"lr": 1e-5, "steps": 60, "seed": 0}), to_give({"forget": "rows.jsonl", "lr": 1e-5, "seed": 0})
    ({'steps': 60}, {'forget': 'rows.jsonl', 'lr': 1e-05})
    """
    chosen = {*(GOALS_OWN if values.get("forget") else ()), *(FAST if values.get("fast") else ()), *always}
    defaults = RunConfig().as_dict()
    return {key: value for key, value in values.items() if key in chosen or value != defaults.get(key)}


def kinds(hint: Any) -> tuple[Any, ...]:
    """The types that a value may have: those of a union, or the only one."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def text_for_number(value: Any, hint: Any) -> str | None:
    """What is wrong with a value that holds a text where a number is asked for, or None.

    `jsonargparse` would read that text as YAML 1.1, and "1:30" as 90.
    """
    of = kinds(hint)
    if isinstance(value, str) and {*of} <= {int, float, bool, type(None)}:
        names = ["null" if each is type(None) else each.__name__ for each in of]
        return f"must be {'one of ' if len(of) > 1 else 'of type '}{', '.join(names)}, but is {value!r}"
    inner = next((typing.get_args(each)[-1] for each in of if typing.get_origin(each) in (list, tuple, dict)), None)
    if inner is None or not isinstance(value, (list, tuple, dict)):
        return None
    each_of = value.values() if isinstance(value, dict) else value
    return next((said for each in each_of if (said := text_for_number(each, inner))), None)


def typed(what: str, cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A class's arguments, each converted to the type that its constructor declares, as `jsonargparse` reads it.

    Raises:
        UserError: an argument that the class does not have, or of another type.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    parameters = inspect.signature(cls).parameters
    found = dict(arguments)
    for name, value in arguments.items():
        if name not in parameters:
            raise unknown(f"argument of {what}", name, parameters)
        if name not in hints:  # a user's own class need not declare types
            continue
        parser = ArgumentParser(exit_on_error=False, parser_mode="json")  # as YAML "#" is None
        parser.add_argument(f"--{name}", type=hints[name])
        # The parser takes None for not given.
        lacking = value is None and type(None) not in typing.get_args(hints[name])
        try:
            if lacking or text_for_number(value, hints[name]):
                raise ArgumentError(None, "")
            found[name] = parser.parse_object({name: value})[name]
        except (ArgumentError, TypeError):
            annotation = parameters[name].annotation
            wanted = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
            raise UserError(f"{what}: {name} must be {wanted}, but is {value!r}") from None
    return found
