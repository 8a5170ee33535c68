"""A config → one frozen value that the rest of the package takes: all inputs of a run, and their fingerprints.

    config → `resolve` → Resolved → `unlearn.prepare` → `unlearn.train` → results

Every mistake that can be found without the model's weights is found here, before anything slow starts and anything is
written. `--dry-run` does this and prints the result.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from . import __version__, adapters, tasks, tiny
from . import resolve as names
from .chat import prompt_ids
from .checkpoints import ENDS, MEMORIZED, TASK_FILE, sha256
from .config import RunConfig, typed
from .data import Row, encode, is_included, is_text, longest, texts
from .device import device_and_precision, settled
from .errors import UserError
from .evaluation import general, probes
from .folder import ADAPTER, MODEL
from .hashes import digest, of_tokenizer
from .losses import Loss
from .memorise import Settings, memorised
from .models import (
    ends_of,
    has_tokenizer,
    hash_of,
    load_config,
    load_tokenizer,
    merged,
    positions,
    use_template,
    without_weights,
)
from .rows import alternates
from .rows.forms import text_of
from .schedule import Turn
from .tasks import Task
from .training.fitting import check_checkpointing, check_counted, check_ids, check_reached

VERSIONS = {"dualoptim": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


@dataclass(frozen=True)
class Origin:
    """A model by folder or hub id, with rows that it is to memorize first; `merged` for its adapter merged into it."""

    model: str
    fingerprint: str
    taught: Sequence[Row] | None = None
    teaching: Mapping[str, Any] = field(default_factory=dict)  # arguments of `memorised`
    merged: bool = False

    def place(self) -> str:
        """Its folder or hub id. A model that is to memorize rows is trained now, unless the cache has it."""
        place = self.model if self.taught is None else str(memorised(self.model, self.taught, **self.teaching))
        return merged(place) if self.merged else place


@dataclass(frozen=True)
class Resolved:
    """Everything that a config resolves to.

    Args:
        config: the settings, also where they were left to the device (`dualoptim.device.settled`).
        task: rows and measures; for your own rows, its `prepare` chooses some of them by what the model knows.
        tokenizer: the model's, with the run's chat template.
        losses: objective → loss.
        refusals: replies that say 'I don't know'.
        optimizer: class and arguments.
        start: the model to unlearn from.
        retrained: the model that never saw what is to be forgotten, if there is one.
        adapted: whether an adapter is trained, not the whole model.
        merge: whether the model with that adapter merged into it is made as well.
        needed: bytes of memory by purpose.
        relearning: the same for the attack relearn; empty if it is not asked for.
        files: setting → SHA-256 of the file that it names, if that is a local file.
        fingerprints: hashes of the rows and measures, the file of a task of your own, refusals, questions of probes,
            files of lm_eval's tasks, template, tokenizer, start and retrained model, their end tokens, and the
            packages' versions; where rows are memorized first, the precision of that.
    """

    config: RunConfig
    task: Task
    tokenizer: Any
    losses: Mapping[str, Loss]
    refusals: Sequence[str]
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]]
    start: Origin
    retrained: Origin | None
    adapted: bool
    merge: bool
    needed: Mapping[str, int]
    relearning: Mapping[str, int]
    files: Mapping[str, str]
    fingerprints: Mapping[str, str]

    def turns(self, left: Mapping[str, float] | None = None) -> list[Turn]:
        """The objectives of each step; `left` as in `dualoptim.resolve.turns_of`."""
        return names.turns_of(self.config, self.task, left)

    def again(self, config: RunConfig) -> Resolved:
        """Another run from the same start, with the losses and the optimizer of its own config."""
        losses = names.losses_of(config, self.task)
        optimizer = names.optimizer_of(config, list(self.task.objectives))
        return replace(self, config=config, losses=losses, optimizer=optimizer)

    @property
    def forgets(self) -> bool:
        """Whether an objective is to forget, by its name or by its loss."""
        return "forget" in self.losses or any(loss.role == "forget" for loss in self.losses.values())

    @property
    def needs_second_model(self) -> bool:
        """Whether a frozen copy of the model stays in memory, for losses that need all of its logits."""
        whole = not self.adapted and self.config.train is None  # else the trained part is copied
        return whole and any(loss.reference == "model" for loss in self.losses.values())

    @property
    def saved(self) -> list[str]:
        """The names of the folders of the models that the run saves, in its own folder."""
        if not self.config.save_model:
            return []
        return [*([ADAPTER] if self.adapted else []), *([MODEL] if self.merge or not self.adapted else [])]

    @property
    def identity(self) -> dict[str, str]:
        """The fingerprints without the versions: these must be the same for a run to be resumed."""
        return {name: value for name, value in self.fingerprints.items() if name != "versions"}


def resolve(configs: Sequence[RunConfig], *, training: bool = True, task: Task | None = None) -> list[Resolved]:
    """Resolve configs that share one task and one start.

    Args:
        training: whether models are trained, which needs more memory than scoring, and rows of `max_length` at most.
        task: the configs', where it has been read; None to read it.

    Raises:
        UserError: anything that is wrong with the configs, the rows, the model, memory or disk.
    """
    configs = [settled(config) for config in configs]
    for config in configs:
        names.check_alone(config, training=training)
    first = configs[0]  # rows, files and model are read once for all
    task = tasks.load(first) if task is None else task
    for config in configs:
        names.check_with(config, task)
    tokenizer, model = _described(first, task)
    if {"bits8", "nf4"} & {attack for config in configs for attack in config.attacks}:
        adapters.check_rounding(model)
    adapted = bool(first.lora_rank) or hasattr(model, "peft_config")
    vocabulary = _vocabulary(first, model)
    start, retrained = _origins(first, task, tokenizer)
    _check_retrained(first, task, tokenizer)
    named = [first.model] * (first.model != tiny.TINY) + [first.retrained] * (first.retrained not in (None, "make"))
    refusals, own = names.refusals_of(first), general.files_of(first.lm_eval)
    fingerprints = {
        "task": digest(task.contents()),
        **({TASK_FILE: sha256(Path(first.task))} if first.task and first.task.endswith(".py") else {}),
        "refusals": digest(refusals),
        **({"set_of_probes": digest(probes.read(first))} if first.probes else {}),
        **({"task_of_lm_eval": digest({name: sha256(path) for name, path in own.items()})} if own else {}),
        "template": digest(getattr(tokenizer, "chat_template", None)),
        "tokenizer": of_tokenizer(tokenizer),
        **({MEMORIZED: "bf16" if device_and_precision()[1] else "fp32"} if first.memorise else {}),
        "start_model": start.fingerprint,
        **({"retrained_model": retrained.fingerprint} if retrained else {}),
        ENDS: digest([ends_of(name) for name in named if name]),
        "versions": ", ".join(f"{name} {version}" for name, version in VERSIONS.items()),
    }
    files = {name: sha256(Path(given)) for name, given in first.inputs.items() if given and Path(given).is_file()}
    found, reached = [], set[str]()
    for config in configs:
        losses = names.losses_of(config, task)
        names.check_losses(losses, model)
        as_trained = names.as_trained(config, model)
        merge = adapted and (not config.load_in_4bit if config.merge is None else config.merge)
        if training:
            if config.gradient_checkpointing:
                check_checkpointing(model)
            served = losses if config.alone is None else {config.alone: losses[config.alone]}
            reads = {name: [type(loss).__name__, getattr(loss, "layer", None)] for name, loss in served.items()}
            trains = digest([config.train, bool(config.lora_rank), config.lora_targets, config.dora, merge, reads])
            if trains not in reached:  # it takes a second, and a grid may have many runs
                check_reached(as_trained, served)
                if merge:
                    adapters.check_merge(as_trained, "merge", "give --merge false")
                reached.add(trains)
        needed = names.memory_needed(config, task, losses, as_trained)
        if training:
            width = 2 if config.bf16_weights and not config.load_in_4bit else 4  # 4 bits come back in fp32
            names.check_room(config, needed, width * sum(p.numel() for p in model.parameters()) * merge)
        relearning = names.relearning_needs(config, model, needed.get("reference", 0) if training else 0)
        names.check_relearning(config, relearning)
        optimizer = names.optimizer_of(config, list(task.objectives))
        made = config, task, tokenizer, losses, refusals, optimizer, start, retrained
        found.append(Resolved(*made, adapted, merge, needed, relearning, files, fingerprints))
    trained = [loss for of in found for loss in of.losses.values()] if training else []
    names.check_refusals(first, task, trained)
    check_rows(found[0], positions(model), vocabulary, first.max_length if training else ANY_LENGTH, found * training)
    return found


ANY_LENGTH = 2**31
ROOM_TO_ASK = 40  # tokens for the words that a wording adds to a question, and for a reply


def check_rows(
    resolved: Resolved, room: int, vocabulary: int, max_length: int, trained: Sequence[Resolved] = ()
) -> None:
    """Refuse rows that the model cannot process, also with what may replace their answers.

    Args:
        room: the model's number of positions.
        vocabulary: the size of the model's vocabulary.
        max_length: the most tokens that a row may have.
        trained: the runs of these rows that train, each of whose losses has to count something of every row.
    """
    tokenizer = resolved.tokenizer
    refusal = resolved.refusals[longest(resolved.refusals, tokenizer)]
    for name, rows in resolved.task.objectives.items():
        refused, others = resolved.losses[name].needs_idk, resolved.losses[name].needs_alternates
        losses = {repr(loss): loss for of in trained for loss in [of.losses[name]]}.values()
        for row in rows:
            if others:
                _check_alternates(row, tokenizer, room)
            tokens = encode(row, tokenizer, max_length, room)
            check_ids(row.where, tokens, vocabulary, tokenizer)
            for loss in losses:
                check_counted(row.where, tokens, loss)
            if not (refused or others):
                continue
            replacing = row.fields.get("alternates") if others else None
            if row.fields.get("instead"):
                replacing = [text_of(row.fields, "instead", row.where)]
            for text in replacing or [refusal]:
                encode(row.answered(text), tokenizer, max_length, room)
    for row in tasks.rows_in(getattr(resolved.task, "held_out", ())):  # which are scored
        if not is_included(row):
            encode(row, tokenizer, ANY_LENGTH, room)
    _check_included(resolved, room)


def _check_included(resolved: Resolved, room: int) -> None:
    """Refuse a model with too few positions for the included questions; included passages are then left out."""
    asked = [row for row in tasks.rows_in(vars(resolved.task)) if is_included(row) and not is_text(row.prompt)]
    if not asked or not getattr(resolved.tokenizer, "chat_template", None):  # without one they are not asked
        return
    longest = max(asked, key=lambda row: len(row.question))
    if (tokens := len(prompt_ids(resolved.tokenizer, longest.prompt)) + ROOM_TO_ASK) > room:
        raise UserError(
            f"model {resolved.config.model}: has {room} positions, and to ask the included questions takes up to "
            f"{tokens}, with a few words before them and a reply; take a model with more positions"
        )


def _check_alternates(row: Row, tokenizer: Any, room: int) -> None:
    """Refuse a row for which a model cannot be asked for another answer."""
    if is_text(row.prompt):
        raise UserError(
            f"{row.where}: is plain text, which asks nothing that could be answered otherwise; forget it by NPO, or "
            "give questions and answers"
        )
    if "alternates" in row.fields:
        texts(row.fields, "alternates", row.where)
    elif not row.fields.get("instead") and (tokens := len(prompt_ids(tokenizer, alternates.prompt(row)))) >= room:
        raise UserError(
            f"{row.where}: to be asked for another answer takes {tokens} tokens, and the model has {room} positions; "
            "shorten the row"
        )


def _described(config: RunConfig, task: Task) -> tuple[Any, nn.Module]:
    """The tokenizer, and the model's modules without weights; "tiny", which is built from the rows, has its weights."""
    if config.model != tiny.TINY:
        model, tokenizer = without_weights(config.model), load_tokenizer(config.model, config.chat_template)
        if config.lora_rank and hasattr(model, "peft_config"):  # it is merged, and a new adapter added
            instead = "leave out --lora-rank to train the adapter further, or give its base"
            model = adapters.check_merge(model, f"model {config.model!r}", instead)
        return tokenizer, model
    model, tokenizer = tiny.build(task.known())
    if config.chat_template is not None:
        use_template(tokenizer, config.chat_template)
    return tokenizer, model


def _vocabulary(config: RunConfig, model: Any) -> int:
    described = model.config if config.model == tiny.TINY else load_config(config.model)
    return int(described.get_text_config().vocab_size)


def beside(resolved: Resolved, model: str) -> Resolved:
    """Another model that is scored on the rows of a resolved one, with its own tokenizer, by which they are checked.

    Raises:
        UserError: as `resolve`; there is a retrained model as well, which both are compared with token by token.
    """
    config = resolved.config.replace(model=model, memorise=False, memorise_args={}, retrained=None)
    (other,) = resolve([config], training=False, task=resolved.task)
    if same_tokens(resolved.task, resolved.tokenizer, other.tokenizer):
        return replace(other, tokenizer=resolved.tokenizer)
    if resolved.retrained is not None:
        raise UserError(
            f"{model} does not read the rows as the same tokens as {resolved.config.model}, by its tokenizer or its "
            "chat template, and both would be compared with the retrained model token by token; leave out --base or "
            "--retrained"
        )
    warnings.warn(
        f"{resolved.config.model} and {model} do not read rows as the same tokens, so each is scored with its own "
        "tokenizer; what is counted by the token, such as probabilities and perplexity, does not compare the two",
        stacklevel=2,
    )
    return other


def same_tokens(task: Task, one: Any, other: Any) -> bool:
    """Whether two tokenizers have the same vocabulary and make the same tokens of a task's rows, chat template and all.

    What else they may differ in, such as the token that they pad with, changes nothing.
    """
    if _written_by(one) == _written_by(other):
        return True
    rows = [row for part in task.objectives.values() for row in part]
    return one.get_vocab() == other.get_vocab() and all(
        encode(row, one, ANY_LENGTH) == encode(row, other, ANY_LENGTH) for row in rows
    )


def _written_by(tokenizer: Any) -> list[Any]:
    return [of_tokenizer(tokenizer), getattr(tokenizer, "chat_template", None)]


def _check_retrained(config: RunConfig, task: Task, tokenizer: Any) -> None:
    """Refuse a retrained model that does not read the rows as the model does: tokens of the two are compared.

    One without a tokenizer or a chat template of its own is given the model's.
    """
    if config.retrained in (None, "make") or not has_tokenizer(config.retrained):
        return
    own = load_tokenizer(config.retrained, config.chat_template)
    if not getattr(own, "chat_template", None):
        own.chat_template = getattr(tokenizer, "chat_template", None)
    if not same_tokens(task, tokenizer, own):
        raise UserError(
            f"retrained {config.retrained}: does not read the rows as the same tokens as the model {config.model}, by "
            "its tokenizer or its chat template, and the two are compared token by token; give one that was made from "
            "the same model, or, where only the template differs, --chat-template FILE"
        )


def _origins(config: RunConfig, task: Task, tokenizer: Any) -> tuple[Origin, Origin | None]:
    own = "tiny" if config.model == tiny.TINY else hash_of(config.model)
    given = config.retrained if config.retrained != "make" else None
    retrained = Origin(given, hash_of(given)) if given else None
    first = bool(config.lora_rank) and adapters.base_of(config.model) is not None
    if not config.memorise:
        return Origin(config.model, own, merged=first), retrained
    teaching = {
        **typed("memorise_args", Settings, config.memorise_args),
        "max_length": config.max_length,
        "chat_template": config.chat_template,
        "vocabulary_rows": task.known() if config.model == tiny.TINY else None,
    }

    def taught(rows: Sequence[Row]) -> Origin:
        made_of = [own, of_tokenizer(tokenizer), tokenizer.chat_template, teaching, rows]
        return Origin(config.model, digest(made_of), rows, teaching, first)

    if config.retrained == "make":
        assert task.retained is not None  # `names.check` has seen to it
        retrained = taught(task.retained)
    return taught(task.known()), retrained
