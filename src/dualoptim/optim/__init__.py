"""The optimizers. This package needs torch alone.

`rule` holds the mathematics, `state` the precisions in which moments are kept, `backends` how a step is executed,
`optimizer` the torch.optim.Optimizer around them, `groups` a model's parameters for it, `diagnostics` what the
objectives do to each other. `validation` is what is refused of settings and state dicts, `loading` how a state dict is
made to fit, `memory` what a step may read and write, `ranks` what ranks agree on, `release` steps taken while backward
runs.
"""

from .diagnostics import diagnostics
from .groups import estimate_state_memory, parameter_groups
from .optimizer import DualOptim, DualOptimPlus
from .release import releasing

__all__ = ["DualOptim", "DualOptimPlus", "diagnostics", "estimate_state_memory", "parameter_groups", "releasing"]
