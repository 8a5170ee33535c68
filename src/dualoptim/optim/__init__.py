"""The optimizers. This package needs torch alone.

`rule` holds the mathematics, `state` the precisions in which moments are kept, `backends` how a step is executed,
`optimizer` the torch.optim.Optimizer around them, `validation` what it refuses.
"""

from .optimizer import DualOptim, DualOptimPlus, estimate_state_memory, parameter_groups

__all__ = ["DualOptim", "DualOptimPlus", "estimate_state_memory", "parameter_groups"]
