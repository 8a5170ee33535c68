"""The optimizers. This package needs torch alone.

`rule` holds the mathematics, `state` the precisions in which moments are kept, `backends` how a step is executed,
`optimizer` the torch.optim.Optimizer around them, `groups` a model's parameter groups, `diagnostics` how far the
objectives agree. `validation` checks settings and state dicts, `loading` makes a state dict fit, `memory` checks what a
step reads and writes, `ranks` makes all ranks take or skip a step together, `release` steps during the backward pass.
"""

from .diagnostics import diagnostics
from .groups import estimate_state_memory, parameter_groups
from .optimizer import DualOptim, DualOptimPlus
from .release import releasing

__all__ = ["DualOptim", "DualOptimPlus", "diagnostics", "estimate_state_memory", "parameter_groups", "releasing"]
