"""Optimizers on noisy quadratics whose optimum is known: two to eight objectives, their angles, and their scales.

    python benchmarks/quadratics.py            adds what is not there yet to evidence/quadratics.jsonl

Objective o is f_o(x) = s_o/2 ‖x − a_o‖²; its gradient has noise of standard deviation s_o. The goal is the mean of
f_o / s_o, weighted by the steps that each has, which no scale moves: its optimum is that mean of the a_o. What is left
above it after the last step, as a share of what there was, is given for each method's best rate of `RATES`: mean and
standard error over `SEEDS` seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from dualoptim import DualOptim, DualOptimPlus  # noqa: E402
from dualoptim.reading import json_lines  # noqa: E402
from variants import Variant  # noqa: E402

RAW = HERE / "evidence" / "quadratics.jsonl"
SIZE, SEEDS, STEPS = 64, 16, 1000
RATES = (5e-3, 1e-2, 2e-2, 5e-2, 1e-1)  # the smallest moves every coordinate by 2.5, twice the way to any a_o
BETAS = (0.9, 0.95)
METHODS: dict[str, dict[str, Any]] = {
    "Joint AdamW": {},
    "Alternating AdamW": {},
    "DualOptim": {},
    "DualOptim+": {},
    "DualOptim+, no bound": {"max_update": None},
    "equal base": {"weights": "equal"},
    "own v": {"second": "own"},
    "mean v": {"second": "mean"},
    "equal base, mean v": {"weights": "equal", "second": "mean"},
    "own m, one v": {"drift": 0.0, "second": "all"},
}
CASES: dict[str, dict[str, Any]] = {
    **{
        f"2 {angle}, scales 1:{scale}, steps 1:{ratio}": {
            "angle": angle,
            "scales": (1.0, 1 / scale),
            "ratio": (1, ratio),
        }
        for angle in ("aligned", "orthogonal", "opposed")
        for scale in (1, 10, 100)
        for ratio in (1, 5)
    },
    **{f"{k} orthogonal, scales alike": {"angle": "orthogonal", "scales": (1.0,) * k} for k in (3, 4, 8)},
    **{
        f"{k} orthogonal, scales {', '.join(f'{s:g}' for s in scales)}": {"angle": "orthogonal", "scales": scales}
        for k, scales in (
            (3, (3.0, 1.0, 0.3)),
            (4, (3.0, 1.0, 1.0, 0.3)),
            (8, (3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 0.3, 0.3)),
        )
    },
}


def goals(angle: str, count: int) -> Tensor:
    """(K, SIZE) the a_o, each of length 8 from the start at 0."""
    made = torch.zeros(count, SIZE)
    for o in range(count):
        if angle == "orthogonal":
            made[o, o::count] = 1.0
        else:
            made[o] = 1.0 if angle == "aligned" or o % 2 == 0 else -0.5  # opposed, but not the same distance away
    return (
        8 * made / made.norm(dim=1, keepdim=True) * (torch.tensor([1.0, 0.5])[:, None] if angle == "opposed" else 1.0)
    )


def left(case: Mapping[str, Any], method: str, lr: float) -> Tensor:
    """(SEEDS,) what is left above the optimum."""
    scales, count = torch.tensor(case["scales"]), len(case["scales"])
    a, cycle = goals(case["angle"], count), [o for o, n in enumerate(case.get("ratio", (1,) * count)) for _ in range(n)]
    names = tuple(f"o{i}" for i in range(count))
    draw = torch.Generator().manual_seed(0)
    x = torch.zeros(SEEDS, SIZE, requires_grad=True)
    common: dict[str, Any] = {"lr": lr, "betas": BETAS, "weight_decay": 0.0}
    settings = METHODS[method]
    if "AdamW" in method:
        optimizer: Any = torch.optim.AdamW([x], **common)
    elif method == "DualOptim":
        optimizer = DualOptim([x], objectives=names, **common)
    elif set(settings) <= {"max_update"}:
        optimizer = DualOptimPlus([x], objectives=names, **common, **settings)
    else:
        optimizer = Variant([x], objectives=names, **common, **settings)

    def gradient(o: int) -> Tensor:
        return scales[o] * (x.detach() - a[o] + torch.randn(SEEDS, SIZE, generator=draw))

    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / STEPS)
        o = cycle[step % len(cycle)]
        if method == "Joint AdamW":  # the cycle's shares in every step
            x.grad = sum(gradient(i) * cycle.count(i) / len(cycle) for i in range(count))
            optimizer.step()
        else:
            x.grad = gradient(o)
            optimizer.step() if "AdamW" in method else optimizer.step(objective=names[o])
    weights = torch.tensor([cycle.count(o) / len(cycle) for o in range(count)])
    best = weights @ a

    def value(point: Tensor) -> Tensor:
        return ((point[..., None, :] - a) ** 2).sum(-1) @ weights / 2

    return (value(x.detach()) - value(best)) / (value(torch.zeros(SIZE)) - value(best))


def main() -> None:
    """Do what is not there yet."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    RAW.parent.mkdir(exist_ok=True)
    done = [line["key"] for line in json_lines(RAW.read_text(encoding="utf-8"))] if RAW.is_file() else []
    for name, case in CASES.items():
        for method in METHODS:
            if [name, method] in done:
                continue
            found = {lr: left(case, method, lr) for lr in RATES}
            best = min(found, key=lambda lr: float(found[lr].nan_to_num(nan=float("inf")).mean()))
            values = found[best]
            line = {"key": [name, method], "lr": best, "left": round(float(values.mean()), 5),
                    "error": round(float(values.std() / SEEDS**0.5), 5)}  # fmt: skip
            with RAW.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
