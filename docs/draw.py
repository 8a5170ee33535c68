"""Draws docs/pictures/update_rule.svg: base and deltas of the real optimizer where objectives agree and conflict.

    python docs/draw.py

One coordinate, two objectives that alternate; its gradients are the objective's sign, with noise.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

from dualoptim import DualOptimPlus

matplotlib.use("svg")
import matplotlib.pyplot as plt

OUT = Path(__file__).with_name("pictures") / "update_rule.svg"
STEPS, NOISE = 120, 0.3
CASES = {"The objectives agree": (1.0, 1.0), "The objectives conflict": (1.0, -1.0)}


def moments(forget: float, retain: float) -> dict[str, list[float]]:
    """First moments after each step, of the base and of both deltas, for gradients with these means."""
    noise = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(1))
    opt = DualOptimPlus([weight], lr=1e-3, weight_decay=0.0, objectives=("forget", "retain"))
    found: dict[str, list[float]] = {"base": [], "delta of forget": [], "delta of retain": []}
    for step in range(STEPS):
        objective, mean = (("forget", forget), ("retain", retain))[step % 2]
        weight.grad = mean + NOISE * torch.randn(1, generator=noise)
        opt.step(objective=objective)
        state = opt.state[weight]
        for name, key in zip(found, ("base_exp_avg", "delta_exp_avg/forget", "delta_exp_avg/retain"), strict=True):
            found[name].append(float(state[key]))
    return found


def main() -> None:
    """Write the picture."""
    style = {"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "dualoptim"}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, len(CASES), figsize=(9, 3.2), sharey=True, layout="constrained")
        for axis, (title, means) in zip(axes, CASES.items(), strict=True):
            colors = ("#333333", "#CC3377", "#0072B2")
            for (name, values), color in zip(moments(*means).items(), colors, strict=True):
                axis.plot(range(1, STEPS + 1), values, label=name, color=color, linewidth=1.6)
            axis.axhline(0, color="#999999", linewidth=0.6)
            axis.set_title(title, loc="left", fontweight="bold")
            axis.set_xlabel("step")
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("first moment")
        axes[0].legend(frameon=False, loc="lower right")
        figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
