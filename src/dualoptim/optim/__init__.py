"""The optimizers. This package needs torch alone.

`rule` holds the mathematics, `optimizer` the torch.optim.Optimizer around it, `validation` what it refuses.
"""

#from .optimizer import DualOptim, DualOptimPlus

__all__ = ["DualOptim", "DualOptimPlus"]
