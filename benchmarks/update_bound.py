"""What DualOptim+'s second moment does on real runs, and what a bound or another rule changes.

    python benchmarks/update_bound.py --data-dir FOLDER [--losses IDK NPO ME] [--rules published bounded …] [--seed 0]

SmolLM2-135M that has memorized TOFU forget01 task 1 and 160 kept rows unlearns, alternating 1:5, once for each forget
loss (against GD) and each rule below. Every run adds a line to runs/update_bound.jsonl: what is still answered, and,
per objective, the share of coordinates whose second-moment sum is negative, the share whose update would exceed 1, and
the largest update, before any bound. Some four minutes a run on two CPU cores; what is in the file is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dualoptim.command_line.recipe_files import recipes_folder
from dualoptim.data import ObjectiveRows, Plan, Row, asset
from dualoptim.device import device_and_precision
from dualoptim.evaluation.scoring import negative_log_likelihoods, question_records, token_counts
from dualoptim.losses import LOSSES
from dualoptim.memorise import memorised
from dualoptim.models import load_model, load_tokenizer
from dualoptim.reading import json_lines
from dualoptim.schedule import by_turns
from dualoptim.tasks.tofu import Tofu

OUT = Path("runs/update_bound.jsonl")
RULES = {
    "published": "DualOptim+ as published",
    "bounded": "|update| at most 1",
    "floor": "the signed sum of second moments raised to m² where it is below (and |update| at most 1 with it)",
    "equal base": "bounded, and the base weighs objectives equally however often each steps",
    "shared first": "first moments shared alone, of gradients divided by their objective's own root of v; bounded",
    "alternating": "AdamW with one state for both",
}
STEPS, BATCH, WARMUP, RATIO = 60, 4, 6, {"forget": 1, "retain": 5}
BETA1, BETA2, EPS, DECAY = 0.9, 0.95, 1e-8, 0.01
SLICE = 2**19  # what stays in the cache through the passes


class Candidate:
    """The candidate rules, in plain torch, with what they do counted."""

    def __init__(self, parameters: list[nn.Parameter], rule: str) -> None:
        self.parameters, self.rule = parameters, rule
        self.moments: dict[str, list[Tensor]] = {}
        self.turns = dict.fromkeys(RATIO, 0)
        self.kept = [1.0, 1.0]  # Π (1 − weight) of the base's averages, whose bias corrections are 1 − these
        self.seen: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in RATIO}

    def moment(self, name: str) -> list[Tensor]:
        """A moment's tensors, flat, zero at first."""
        if name not in self.moments:
            self.moments[name] = [torch.zeros_like(p).view(-1) for p in self.parameters]
        return self.moments[name]

    @torch.no_grad()
    def step(self, objective: str, lr: float) -> None:
        """One step of an objective."""
        if self.rule == "alternating":
            objective_state, names = "all", ["m", "v"]
        elif self.rule == "shared first":
            objective_state, names = objective, ["m", "v", "base m"]
        else:
            objective_state, names = objective, ["m", "v", "base m", "base v"]
        self.turns[objective] += 1
        t = sum(self.turns.values()) if objective_state == "all" else self.turns[objective]
        # A step of an objective that has a share s of the steps counts 1 / (2 s) times as much.
        scale = sum(self.turns.values()) / (2 * self.turns[objective]) if self.rule == "equal base" else 1.0
        weights = min(scale * (1 - BETA1), 0.5), min(scale * (1 - BETA2), 0.5)
        c1, c2 = torch.tensor(1 - BETA1**t), torch.tensor(1 - BETA2**t)
        b1, b2 = (1 - kept if kept < 1 else 1.0 for kept in self.kept)
        negative = above = coordinates = 0
        largest = 0.0
        for i, parameter in enumerate(self.parameters):
            assert parameter.grad is not None
            moments = [self.moment(n if n.startswith("base") else f"{objective_state} {n}")[i] for n in names]
            flat = [parameter.view(-1), parameter.grad.view(-1), *moments]
            for theta, g, m, v, *base in zip(*(tensor.split(SLICE) for tensor in flat), strict=True):
                if self.rule == "alternating":
                    m.lerp_(g, 1 - BETA1)
                    v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
                    update, second = m / c1, v / c2
                elif self.rule == "shared first":
                    v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
                    g = g / (v / c2).sqrt_().add_(EPS)
                    update = base[0] / b1
                    m.lerp_(g - update, 1 - BETA1)
                    update.addcdiv_(m, c1)
                    second = torch.ones_like(update)
                    base[0].lerp_(g, weights[0])
                else:
                    update, second = base[0] / b1, base[1] / b2
                    m.lerp_(g - update, 1 - BETA1)
                    v.mul_(BETA2).add_((g * g).sub_(second), alpha=1 - BETA2)
                    update.addcdiv_(m, c1)
                    second.addcdiv_(v, c2)
                    base[0].lerp_(g, weights[0])
                    base[1].mul_(1 - weights[1]).addcmul_(g, g, value=weights[1])
                negative += int((second < 0).sum())
                if self.rule == "floor":
                    second = torch.maximum(second, update * update)
                update.div_(second.abs_().sqrt_().add_(EPS))
                size = update.abs()
                largest = max(largest, float(size.max()))
                above += int((size > 1).sum())
                coordinates += len(size)
                if self.rule in ("bounded", "equal base", "shared first"):
                    update.clamp_(-1, 1)
                theta.mul_(1 - lr * DECAY * (parameter.ndim > 1)).sub_(update, alpha=lr)
        self.kept = [kept * (1 - weight) for kept, weight in zip(self.kept, weights, strict=True)]
        counted = {"negative": negative / coordinates, "above 1": above / coordinates, "largest": largest}
        for name, value in counted.items():
            self.seen[objective][name].append(value)


def scores(model: nn.Module, tokenizer: object, task: Tofu) -> dict[str, float]:
    """What is forgotten and what is kept."""
    numbers = {}
    for name, rows in task.objectives.items():
        nlls = negative_log_likelihoods(model, tokenizer, rows[:40])
        numbers[f"{name} probability"] = sum(map(math.exp, (-nll for nll in nlls))) / len(nlls)
        numbers[f"{name} ROUGE-L"] = fmean(r["rouge_l"] for r in question_records(model, tokenizer, rows[:20], None))
    passages = [Row((), row["text"], "passages.jsonl") for row in asset("passages.jsonl")]
    nlls, counts = negative_log_likelihoods(model, tokenizer, passages), token_counts(tokenizer, passages)
    numbers["perplexity"] = math.exp(sum(a * b for a, b in zip(nlls, counts, strict=True)) / sum(counts))
    return numbers


def run(folder: Path, task: Tofu, loss_name: str, rule: str, lr: float, seed: int) -> dict[str, object]:
    """One run: what became of the model, and what the rule did."""
    torch.manual_seed(seed)
    device, bf16 = device_and_precision()
    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder)).to(device).train()
    losses = {"forget": LOSSES[loss_name](), "retain": LOSSES["GD"]()}
    reference = load_model(str(folder)).to(device).eval() if losses["forget"].needs_reference else None
    refusals = {"forget": [row["text"] for row in asset("refusals.jsonl")]} if losses["forget"].needs_idk else {}
    rows = ObjectiveRows(task.objectives, refusals, tokenizer, 512)
    turns = by_turns(RATIO, BATCH, STEPS)
    candidate = Candidate(list(model.parameters()), rule)
    loader = DataLoader(rows, batch_sampler=Plan(turns, rows, 1, seed), collate_fn=rows.collate)
    for step, batches in enumerate(tqdm(loader, desc=f"{loss_name}, {rule}, lr {lr:g}")):
        ((objective, batch),) = batches.items()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = losses[objective](model, batch, reference)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        candidate.step(objective, lr * min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP)))
        model.zero_grad()
    seen = {
        name: {"negative": sum(s["negative"]) / len(s["negative"]), "above 1": sum(s["above 1"]) / len(s["above 1"]),
               "largest": max(s["largest"])} for name, s in candidate.seen.items()
    }  # fmt: skip
    del candidate
    return {"scores": scores(model, tokenizer, task), "seen": seen}


def main() -> None:
    """Run what is asked for and is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder of TOFU's files with the ten-task split")
    parser.add_argument("--losses", nargs="+", default=["IDK", "NPO", "ME"])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = yaml_args()
    task = Tofu(data_dir=arguments.data_dir, **settings)
    folder = memorised("smollm2", [*task.objectives["forget"], *task.objectives["retain"]])
    OUT.parent.mkdir(exist_ok=True)
    done = json_lines(OUT.read_text(encoding="utf-8")) if OUT.is_file() else []
    for loss in arguments.losses:
        for rule in arguments.rules:
            setting = {"loss": loss, "rule": rule, "lr": arguments.lr, "seed": arguments.seed}
            if not any(setting.items() <= entry.items() for entry in done):
                line = json.dumps({**setting, **run(folder, task, loss_name=loss, rule=rule,
                                                    lr=arguments.lr, seed=arguments.seed)})  # fmt: skip
                with OUT.open("a") as file:
                    file.write(line + "\n")
                print(line, flush=True)


def yaml_args() -> dict[str, object]:
    """The task of recipes/tofu_smollm2.yaml."""
    import yaml

    return yaml.safe_load((recipes_folder() / "tofu_smollm2.yaml").read_text(encoding="utf-8"))["task_args"]


if __name__ == "__main__":
    main()
