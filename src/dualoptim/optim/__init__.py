"""The optimizers. This package needs torch alone.

`rule` holds the mathematics, `state` the precisions in which moments are kept, `backends` how a step is executed,
`optimizer` the torch.optim.Optimizer around them, `diagnostics` what the objectives do to each other, `validation` what
is refused.
"""

from .diagnostics import diagnostics
from .optimizer import DualOptim, DualOptimPlus, estimate_state_memory, parameter_groups

__all__ = ["DualOptim", "DualOptimPlus", "diagnostics", "estimate_state_memory", "parameter_groups"]
