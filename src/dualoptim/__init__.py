"""dualoptim: make a language model forget something and keep the rest.

The optimizer needs torch alone::

    from dualoptim import DualOptimPlus

    opt = DualOptimPlus(model.parameters(), lr=1e-5, objectives=("forget", "retain"))

    forget_loss.backward()
    opt.step(objective="forget")
    opt.zero_grad()

    retain_loss.backward()
    opt.step(objective="retain")
    opt.zero_grad()

The framework around it, from losses to reports, needs the extra: ``pip install "dualoptim[unlearn]"``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .optim import DualOptim, DualOptimPlus
    from .trainer import UnlearnTrainer

__all__ = ["DualOptim", "DualOptimPlus", "UnlearnTrainer"]
__version__ = "0.1.0"

_HOME = {"DualOptim": ".optim", "DualOptimPlus": ".optim", "UnlearnTrainer": ".trainer"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `import dualoptim` costs nothing, and needs no transformers."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOME[name], __name__), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__name__):
            raise
        package = (error.name or "").partition(".")[0]
        needs = f"{name} needs the package {package}; pip install 'dualoptim[unlearn]'"
        raise ModuleNotFoundError(needs, name=error.name) from None


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
