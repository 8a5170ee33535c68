"""`--dry-run`: shows what a run would do, and stops: config, schedule, a batch of each objective, memory."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from .. import plan, runs
from ..config import RunConfig
from ..data import Draw, ObjectiveRows, Plan
from ..folder import check
from ..losses import IGNORED
from ..resolved import Resolved, resolve

SHOWN_TURNS = 12


def show(configs: Sequence[RunConfig], *, resume: bool, overwrite: bool, inputs: Mapping[str, str | None]) -> None:
    """Print what the runs would do. Nothing is written and no weights are loaded."""
    check(configs[0].out, {**configs[0].inputs, **inputs}, resume=resume, overwrite=overwrite)
    several = resolve(configs)
    stages = several[0].task.stages()
    for i, arguments in enumerate(stages, 1):
        number = arguments[several[0].task.stage]
        print(f"{chr(10) * (i > 1)}━━ part {number}, {i} of {len(stages)}, from what the one before left ━━")
        show_resolved(resolve([each.replace(task_args={**each.task_args, **arguments}) for each in configs]))
    if not stages:
        show_resolved(several)


def _settings(config: RunConfig) -> str:
    """The settings, those that are not the defaults first."""
    settings, defaults = config.as_dict(), RunConfig().as_dict()
    changed = {key: value for key, value in settings.items() if value != defaults[key]}
    rest = {key: value for key, value in settings.items() if key not in changed}
    return "\n".join(yaml.safe_dump(part, sort_keys=False, allow_unicode=True) for part in (changed, rest) if part)


def show_resolved(several: Sequence[Resolved]) -> None:
    """Print what runs of one start, already checked, would do."""
    first = several[0]
    config, task, tokenizer, losses = first.config, first.task, first.tokenizer, first.losses
    print("── settings, changed ones first ──")
    print(_settings(config), end="")
    rows = task.objectives
    own = [name for name, loss in losses.items() if loss.needs_alternates]
    refusals = {name: first.refusals for name, loss in losses.items() if loss.needs_idk and name not in own}
    dataset = ObjectiveRows(rows, refusals, tokenizer, config.max_length)
    if config.memorise:
        print(f"\nfirst {config.model} memorizes {len(task.known())} rows, unless the cache has it")
        if config.retrained == "make":
            print("and another, as the reference, the same without those to forget")
    print("\n── rows ──")
    if task.built:
        print("the answers are the model's own, asked for when the run begins")
    for name in own:
        print(f"{name}: the other answers that {type(losses[name]).__name__} prefers are asked for when the run begins")
    for name, part in rows.items():
        lengths = [len(tokens.input_ids) for tokens in dataset.tokens[name]]
        print(f"{name}: {len(part)} rows of {min(lengths)} to {max(lengths)} tokens")
    for note in task.notes:  # as when the run begins
        print(note)
    for of in several:
        each, turns = of.config, of.turns()
        begins = ", ".join("+".join(f"{n} {name}" for name, n in turn.items()) for turn in turns[:SHOWN_TURNS])
        total = Counter({name: sum(turn.get(name, 0) for turn in turns) for name in rows})
        print(f"\n── schedule: {each.method} ──")
        if each.ratio == "loss":
            print("as if the model had alike much left to learn of all; what it has is measured when the run begins")
        print(f"{begins}{', …' if len(turns) > SHOWN_TURNS else ''}")
        print(f"{len(turns)} steps: " + ", ".join(f"{count} sequences of {name}" for name, count in total.items()))
    print("\n── one batch of each objective; labels (what is trained on) stand in ⟦ ⟧ ──")
    shown: set[str] = set()
    for draws in Plan(first.turns(), dataset, 1, config.seed):
        for name in {draw.objective for draw in draws} - shown:
            shown.add(name)
            for draw in draws:
                if draw.objective == name:
                    _show_row(name, dataset, draw, tokenizer)
        if shown == set(rows):
            break
    print("\n── memory ──")
    for of in several:
        active = plan.of_run(of, dataset)
        needed = {**of.needed, **({"activations at most": active} if active is not None else {})}
        parts = ", ".join(f"{name} {runs.bytes_text(size)}" for name, size in needed.items())
        beside = "" if active is not None else " besides activations"
        print(f"{of.config.method}: {runs.bytes_text(sum(needed.values()))}{beside}: {parts}")
    if first.relearning:
        parts = ", ".join(f"{name} {runs.bytes_text(size)}" for name, size in first.relearning.items())
        print(f"attack relearn: {runs.bytes_text(sum(first.relearning.values()))} besides activations: {parts}")


def _show_row(name: str, dataset: ObjectiveRows, draw: Draw, tokenizer: Any) -> None:
    item = dataset[draw]
    for kind, part in (("", item.tokens), (" (refusal)", item.refused)):
        if part is None:
            continue
        runs_of = itertools.groupby(zip(part.input_ids, part.labels, strict=True), lambda token: token[1] != IGNORED)
        shown = []
        for learned, tokens in runs_of:
            text = repr(tokenizer.decode([token for token, _ in tokens]))
            shown.append(f"⟦{text}⟧" if learned else text)
        print(f"{name}{kind}: {' '.join(shown)}")
