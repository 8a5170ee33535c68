"""Time and memory of an unlearning step of SmolLM2-135M, beside the same step taken the published way.

    python benchmarks/unlearn_step.py --data-dir FOLDER      (or without it, from the hub)
    python benchmarks/unlearn_step.py --data-dir FOLDER --profile     where our step's time goes; writes nothing

The published way (arXiv 2605.21539's code, and those it came from): every row padded to 500 tokens, logits at every
position, a second model in memory that is run at every step. Both take NPO to forget and GD to keep in one step, from
the same rows of TOFU forget01, in the same order, with the same optimizer. Each way has processes of its own,
interleaved; writes benchmarks/unlearn_step.md.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from dualoptim import UnlearnTrainer, runs
from dualoptim.data import ObjectiveRows, Plan, Tokens, collate, pad_id
from dualoptim.device import device_and_precision
from dualoptim.losses import IGNORED, LOSSES
from dualoptim.models import load_model, load_tokenizer
from dualoptim.schedule import Turn, jointly
from dualoptim.tasks.tofu import Tofu
from dualoptim.trainer import Objective

PADDED, BETA = 500, 0.1
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
PUBLISHED, OURS = "the published way", "dualoptim"


def objectives(data_dir: str | None) -> dict[str, Objective]:
    """What both ways train on."""
    task = Tofu(data_dir=data_dir, split="forget01", part=1, retain_rows=160)
    losses = {"forget": LOSSES["NPO"](beta=BETA), "retain": LOSSES["GD"]()}
    return {name: Objective(task.objectives[name], loss) for name, loss in losses.items()}


def turns(steps: int, rows: int) -> list[Turn]:
    """Joint steps of `rows` rows of each objective."""
    return jointly({"forget": 1, "retain": 1}, 2 * rows, steps)


class Watch(TrainerCallback):
    """The time of every step, and every objective's loss in it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[dict[str, float]] = []
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append({name: logs[f"loss/{name}"] for name in ("forget", "retain")})


def ours(data_dir: str | None, steps: int, rows: int, bf16: bool) -> dict[str, Any]:
    """As the package does it."""
    model, tokenizer, watch = load_model("smollm2"), load_tokenizer("smollm2"), Watch()
    given = objectives(data_dir)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, learning_rate=ADAMW["lr"], lr_scheduler_type="constant", bf16=bf16,
                                      use_cpu=True, max_grad_norm=1.0, logging_steps=1, report_to="none",
                                      save_strategy="no", disable_tqdm=True)  # fmt: skip
        began = time.perf_counter()
        trainer = UnlearnTrainer(
            model,
            arguments,
            objectives=given,
            turns=turns(steps, rows),
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=(torch.optim.AdamW, ADAMW),
            callbacks=[watch],
        )
        once = time.perf_counter() - began
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {"seconds": watch.seconds, "losses": watch.losses, "once": once, "rows": len(given["forget"].rows)}


def padded(rows: list[Tokens], filler: int) -> dict[str, Tensor]:
    """A batch whose rows all have PADDED tokens."""
    batch = collate(rows, filler)
    short = PADDED - batch["input_ids"].shape[1]
    fillers = {"input_ids": filler, "labels": IGNORED, "attention_mask": 0}
    return {name: F.pad(batch[name], (0, short), value=value) for name, value in fillers.items()}


def log_likelihoods(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log π(y|x) (B,) and the mean negative log-likelihood of a token, from logits at every position."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), batch["labels"][:, 1:], reduction="none")
    return -nll.sum(1), nll.sum() / (batch["labels"][:, 1:] != IGNORED).sum()


def published(data_dir: str | None, steps: int, rows: int, bf16: bool) -> dict[str, Any]:
    """The published way, written anew: padding, a second model, and the reference at every step."""
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    dataset = ObjectiveRows({name: o.rows for name, o in objectives(data_dir).items()}, {}, tokenizer, PADDED)
    seconds: list[float] = []
    losses: list[dict[str, float]] = []
    for draws in Plan(turns(steps, rows), dataset, 1, 42):
        began = time.perf_counter()
        batch = {
            name: padded([dataset.tokens[name][d.row] for d in draws if d.objective == name], pad_id(tokenizer))
            for name in ("forget", "retain")
        }
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                before, _ = log_likelihoods(reference, batch["forget"])
            now, _ = log_likelihoods(model, batch["forget"])
            forget = -2 / BETA * F.logsigmoid(-BETA * (now - before)).mean()
            _, retain = log_likelihoods(model, batch["retain"])
        (forget + retain).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        losses.append({"forget": forget.item(), "retain": retain.item()})
    return {"seconds": seconds, "losses": losses}


WAYS = {PUBLISHED: published, OURS: ours}


def alone(way: str, options: argparse.Namespace, steps: int, *, bf16: bool) -> dict[str, Any]:
    """What one way gives in a process of its own, and that process's peak of resident memory in bytes."""
    print(f"measuring {way}, {steps} steps in {'bf16' if bf16 else 'fp32'} …", file=sys.stderr)
    with tempfile.NamedTemporaryFile("r", suffix=".json") as found:
        command = [sys.executable, __file__, "--way", way, "--into", found.name, "--steps", str(steps)]
        command += ["--rows", str(options.rows)] + ([] if bf16 else ["--fp32"])
        subprocess.run(command + (["--data-dir", options.data_dir] if options.data_dir else []), check=True)
        return json.load(found)


def profile(options: argparse.Namespace, bf16: bool) -> None:
    """Print where the time of our steps goes, by operator, the first step left out."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        schedule=torch.profiler.schedule(skip_first=1, wait=0, warmup=1, active=options.steps, repeat=1),
    ) as watched:
        stepped = Watch.on_step_end

        def on_step_end(self: Watch, *arguments: Any, **kwargs: Any) -> None:
            stepped(self, *arguments, **kwargs)
            watched.step()

        Watch.on_step_end = on_step_end  # type: ignore[method-assign]
        ours(options.data_dir, options.steps + 2, options.rows, bf16)
    print(watched.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))


def main() -> None:
    """Measure both ways, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", help="folder of TOFU's files; without it, the hub")
    parser.add_argument("--rows", type=int, default=4, help="rows of each objective in a step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a round; one more comes before them")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="print where our step's time goes, and stop")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # what a process of its own is told
    parser.add_argument("--into", help=argparse.SUPPRESS)
    parser.add_argument("--fp32", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    bf16 = device_and_precision()[1] and not options.fp32
    if options.profile:
        profile(options, bf16)
        return
    if options.way:
        found = WAYS[options.way](options.data_dir, options.steps, options.rows, bf16)
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        Path(options.into).write_text(json.dumps(found), encoding="utf-8")
        return

    rounds = [{way: alone(way, options, options.steps + 1, bf16=bf16) for way in WAYS} for _ in range(options.rounds)]
    exact = {way: alone(way, options, 3, bf16=False) for way in WAYS}
    text = page(options, rounds, exact, bf16)
    print(text)
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


def page(options: argparse.Namespace, rounds: list[dict[str, Any]], exact: dict[str, Any], bf16: bool) -> str:
    """The results as Markdown."""
    seconds = {way: [t for each in rounds for t in each[way]["seconds"][1:]] for way in WAYS}
    peaks = {way: statistics.median(each[way]["peak"] for each in rounds) for way in WAYS}
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    faster = medians[PUBLISHED] / medians[OURS]
    once, known = statistics.median(each[OURS]["once"] for each in rounds), rounds[0][OURS]["rows"]
    lines = [
        "| | median step | fastest | slowest | peak memory |",
        "|---|--:|--:|--:|--:|",
        *(
            f"| {way} | {medians[way]:.2f} s | {min(seconds[way]):.2f} s | {max(seconds[way]):.2f} s "
            f"| {runs.bytes_text(int(peaks[way]))} |"
            for way in WAYS
        ),
        f"| ratio | {faster:.1f} | {min(seconds[PUBLISHED]) / min(seconds[OURS]):.1f} "
        f"| {max(seconds[PUBLISHED]) / max(seconds[OURS]):.1f} | {peaks[PUBLISHED] / peaks[OURS]:.2f} |",
    ]
    pairs = list(zip(exact[PUBLISHED]["losses"], exact[OURS]["losses"], strict=True))
    apart = max(abs(a[name] - b[name]) for a, b in pairs for name in a)
    losses = [
        "| step | forget (NPO), published / ours | retain (GD), published / ours |",
        "|--:|--:|--:|",
        *(
            f"| {i} | " + " | ".join(f"{a[name]:.4f} / {b[name]:.4f}" for name in a) + " |"
            for i, (a, b) in enumerate(pairs, 1)
        ),
    ]
    environment = runs.environment()
    versions = ", ".join(f"{name} {environment['versions'][name]}" for name in ("torch", "transformers"))
    command = "python benchmarks/unlearn_step.py" + " --data-dir FOLDER" * bool(options.data_dir)
    command += "".join(
        f" --{name} {value}"
        for name, default in (("rows", 4), ("steps", 4), ("rounds", 2))
        if (value := getattr(options, name)) != default
    )
    return "\n".join(
        [
            "# One unlearning step on SmolLM2-135M",
            "",
            f"{datetime.date.today().isoformat()}, {environment['processor']}, {environment['threads']} threads, "
            f"{versions}. Made by",
            "",
            f"    {command}",
            "",
            f"NPO on {options.rows} rows of TOFU forget01 and GD on {options.rows} kept rows, joint, AdamW (torch's "
            f"fused one), gradients clipped, {'bf16 autocast' if bf16 else 'fp32'}; {options.rounds} processes of "
            f"{options.steps + 1} steps each, interleaved, the first step of each not counted. Peak memory is the "
            "process's largest resident set, with Python, torch, weights, gradients and AdamW's states in it.",
            "",
            *lines,
            "",
            f"`dualoptim` asks the reference once, before the first step: {once:.1f} s with everything else that makes "
            f"the trainer, for {known} rows to forget at most (those that the run draws).",
            "",
            f"Loss values of three steps in fp32, which differ by at most {apart:.1e}:",
            "",
            *losses,
            "",
            f"Targets: at least 8 times as fast: {faster:.1f} ({'met' if faster >= 8 else 'missed'}); at most half the "
            f"peak memory: {peaks[OURS] / peaks[PUBLISHED]:.2f} "
            f"({'met' if peaks[OURS] <= peaks[PUBLISHED] / 2 else 'missed'}).",
            "",
        ]
    )


if __name__ == "__main__":
    main()
