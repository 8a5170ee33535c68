"""DualOptim+ in open-unlearning (`locuslab/open-unlearning`), for its trainers as they are: `docs/open_unlearning.md`.

Its trainers compute one loss, gamma · forget + alpha · retain, of a batch ``{"forget": …, "retain": …}``.
`by_objective` makes a subclass of any of them whose steps serve one objective each. A forget step takes the class's own
`compute_loss` with its `compute_retain_loss` off; a retain step takes alpha times that method only. So no step computes
what it does not use, and every part of the loss is the class's own. This module needs only the optimizer of this
package, and works with open-unlearning's version of transformers.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import UserError, unknown
from .optim import DualOptimPlus, parameter_groups
from .schedule import parse_ratio
from .training.optimizer_trial import tried

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object  # in the subclass that `by_objective` makes, the trainer comes next

logger = logging.getLogger(__name__)

FORGET, RETAIN = OBJECTIVES = ("forget", "retain")
PREFIX = "DualOptimPlus"
CANNOT = "so that DualOptim+ cannot serve its objectives by turns"
KEYS = ("input_ids", "attention_mask", "labels")  # the keys of a batch that its trainers give a model
# The optimizer's arguments that the trainer sets: those of its TrainingArguments, and the objectives.
NOT_HERE = {"params", "objectives", "lr", "weight_decay", "process_group"}


@dataclass(frozen=True)
class Settings:
    """The settings under ``trainer.method_args.dualoptim``.

    Args:
        cycle: the objectives of the steps in a cycle, from ``ratio``: forget steps : retain steps, such as "1:5".
        retain_loss: "NLL" gives a class without a retain loss the model's own loss on the rows to retain.
        optimizer: arguments of `DualOptimPlus`.
    """

    cycle: tuple[str, ...]
    retain_loss: str | None
    optimizer: dict[str, Any]

    def objective(self, step: int) -> str:
        """The objective of an optimizer step, which depends only on the number of steps before it."""
        return self.cycle[step % len(self.cycle)]


def read_settings(given: Mapping[str, Any] | None) -> Settings:
    """Check the settings and fill in defaults.

    Raises:
        UserError: a key that is not known, or a value out of its range.

    >>> read_settings({"ratio": "1:2", "base_bits": 8})
    Settings(cycle=('forget', 'retain', 'retain'), retain_loss=None, optimizer={'base_bits': 8})
    """
    where = "trainer.method_args.dualoptim"
    if given is not None and not isinstance(given, Mapping):
        raise UserError(f"{where} is a mapping of settings, such as {{ratio: '1:5'}}, but is {given!r}")
    optimizer = {str(key): _plain(value) for key, value in (given or {}).items()}
    ratio, retain_loss = optimizer.pop("ratio", "1:1"), optimizer.pop("retain_loss", None)
    known = [name for name in inspect.signature(DualOptimPlus).parameters if name not in NOT_HERE]
    for name in optimizer:
        if name in NOT_HERE:
            mend = f"trainer.args.{'learning_rate' if name == 'lr' else name}" if name in ("lr", "weight_decay") else ""
            raise UserError(f"{where}: {name} is the trainer's to give{'; set ' + mend if mend else ''}")
        if name not in known:
            raise unknown("setting", name, ["ratio", "retain_loss", *known], where)
    if retain_loss not in (None, "NLL"):
        raise UserError(f"{where}: retain_loss is NLL or null, but is {retain_loss!r}")
    try:
        shares = parse_ratio(ratio, OBJECTIVES)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    tried(DualOptimPlus, {"objectives": OBJECTIVES, **optimizer}, where)
    return Settings(tuple(name for name in OBJECTIVES for _ in range(shares[name])), retain_loss, optimizer)


def _plain(value: Any) -> Any:
    """A value without OmegaConf's containers, which state dicts should not hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_plain(part) for part in value)
    return value


class ByObjective(Base):
    """The class that `by_objective` puts before a trainer of open-unlearning: one objective a step, by DualOptim+.

    Args:
        dualoptim: `Settings`, as a mapping.
        *args: the trainer's own.
        **kwargs: the trainer's own.
    """

    def __init__(self, *args: Any, dualoptim: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.settings = read_settings(dualoptim)
        self._serving: str | None = None
        self._checked = False
        super().__init__(*args, **kwargs)
        if self.optimizer is not None:
            raise UserError("the optimizer is DualOptim+, which is made here; leave `optimizers` out")
        name = type(self).__name__.removeprefix(PREFIX)
        self._has_retain_loss = hasattr(self, "compute_retain_loss")
        if self._has_retain_loss:
            if not hasattr(self, "alpha"):
                raise UserError(f"{name} has no alpha, the weight of what is to be kept, {CANNOT}")
            if self.settings.retain_loss:
                raise UserError(
                    f"{name} has a loss to retain of its own; leave trainer.method_args.dualoptim.retain_loss at null, "
                    "and choose by trainer.method_args.retain_loss_type"
                )
            raises = hasattr(self, "final_loss_value") and getattr(self, "primal_dual", True)  # PDU: 0 for a while only
            if not self._weight and not raises:
                raise UserError(
                    f"{name} has nothing to retain, so that there is one objective alone: its alpha is 0; set "
                    "trainer.method_args.alpha above 0, or train without +dualoptim=plus"
                )
        elif self.settings.retain_loss is None:
            raise UserError(
                f"{name} has nothing to retain, so that there is one objective alone; "
                "set trainer.method_args.dualoptim.retain_loss=NLL, or choose a trainer that has, such as GradDiff"
            )
        optim = getattr(self.args.optim, "value", self.args.optim)
        if not str(optim).startswith("adamw_torch"):
            logger.warning("trainer.args.optim=%s is not used: DualOptim+ takes the steps", optim)

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """DualOptim+; the Trainer asks for it once the class has chosen what is trained."""
        groups = parameter_groups(self.model if model is None else model, args.weight_decay)
        for group in groups:  # DeepSpeed flattens them
            group["flat"] = group["name"] == "matrices" and self.is_deepspeed_enabled
        return DualOptimPlus, {
            "params": groups,
            "lr": args.learning_rate,
            "objectives": OBJECTIVES,
            **self.settings.optimizer,
        }

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's; a hook tells the optimizer the objective at each step, however the optimizer is wrapped."""
        new = self.optimizer is None
        made = super().create_optimizer(*args, **kwargs)
        if new:
            self.optimizer.register_step_pre_hook(self._tell)
        return made

    def _tell(self, optimizer: Any, *_: Any) -> None:
        if self._serving is not None:  # None before the first loss: loading a checkpoint may take an empty step
            optimizer.objective = self._serving

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The weighted loss of the current objective, which follows from the number of optimizer steps taken."""
        self._serving = self.settings.objective(self.state.global_step)
        if self._serving == FORGET:
            return self._forget(model, inputs, return_outputs, kwargs)
        loss = self._retain(model, inputs)
        return (loss, {}) if return_outputs else loss

    def _forget(self, model: nn.Module, inputs: Any, return_outputs: bool, kwargs: dict[str, Any]) -> Any:
        """The class's own loss without its retain part."""
        name = type(self).__name__.removeprefix(PREFIX)
        if not self._has_retain_loss:
            try:
                return super().compute_loss(
                    model, {key: part for key, part in inputs.items() if key != RETAIN}, return_outputs, **kwargs
                )
            except KeyError as error:
                if error.args != (RETAIN,):
                    raise
                raise UserError(f"{name} reads what is to be kept without compute_retain_loss, {CANNOT}") from None
        off = torch.zeros((), dtype=torch.float32, device=self.args.device, requires_grad=True)
        with self._replaced(compute_retain_loss=lambda *_, **__: off, can_update=False):
            made = super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss = made[0] if return_outputs else made
        if not self._checked and getattr(self, "gamma", None) == 0 and not loss.any():
            raise UserError(
                f"{name} has nothing to forget, so that there is one objective alone: its gamma is 0; set "
                "trainer.method_args.gamma above 0, or train without +dualoptim=plus"
            )
        if not self._checked and loss.requires_grad:
            # The class's weight on its retain part is the derivative of its loss with respect to that part.
            (weight,) = torch.autograd.grad(loss.mean(), off, retain_graph=True, allow_unused=True)
            if weight is None:
                raise UserError(f"{name} computes what is to be kept without compute_retain_loss, {CANNOT}")
            if not math.isclose(float(weight), self._weight, rel_tol=1e-3):
                raise UserError(f"{name} weighs what is to be kept by {float(weight):g}, not by its alpha, {CANNOT}")
            self._checked = True
        return made

    def _retain(self, model: nn.Module, inputs: Any) -> Tensor:
        """The class's own retain part, with the class's own weight."""
        if RETAIN not in inputs:
            raise UserError("batches have no rows to retain; set data.retain, whose steps are a part of the turns")
        rows = {key: inputs[RETAIN][key] for key in KEYS}
        if not self._has_retain_loss:
            return model(**rows).loss
        loss = self.compute_retain_loss(model=model, retain_inputs=rows)
        if hasattr(self, "final_loss_value"):  # PDU, which weighs by a multiplier and raises it here
            return self.final_loss_value([torch.zeros_like(loss), loss])
        return self._weight * loss

    @property
    def _weight(self) -> float:
        return float(self.preferences[1] if hasattr(self, "final_loss_value") else self.alpha)

    @contextlib.contextmanager
    def _replaced(self, **attributes: Any) -> Iterator[None]:
        """A context in which attributes of the class, where it has them, have other values."""
        before = {name: vars(self)[name] for name in attributes if name in vars(self)}
        there = [name for name in attributes if hasattr(self, name)]
        for name in there:
            setattr(self, name, attributes[name])
        try:
            yield
        finally:
            for name in there:
                delattr(self, name)
            for name, value in before.items():
                setattr(self, name, value)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the class's, without the loss of the objective that was not served (PDU logs both)."""
        names = getattr(self, "loss_names", None) or ()
        if self._serving is not None and names and set(names) <= set(logs):
            logs = {key: value for key, value in logs.items() if key != names[self._serving == FORGET]}
        super().log(logs, *args, **kwargs)


def by_objective(trainer: type) -> type:
    """A subclass of a trainer of open-unlearning whose steps serve one objective each, by DualOptim+.

    Raises:
        UserError: the class has no loss of its own, or takes its backward passes itself.
    """
    if issubclass(trainer, ByObjective):
        return trainer
    own = {name for cls in trainer.__mro__ if not cls.__module__.startswith("transformers.") for name in vars(cls)}
    if "compute_loss" not in own:
        raise UserError(f"{trainer.__name__} has no loss to forget; choose one that unlearns, such as NPO")
    if "training_step" in own:
        raise UserError(f"{trainer.__name__} has a training_step of its own, {CANNOT}")
    return type(PREFIX + trainer.__name__, (ByObjective, trainer), {"__doc__": trainer.__doc__})


def register(handler: str, registry: MutableMapping[str, Any] | None = None) -> type:
    """Replace a trainer in open-unlearning's registry by its `by_objective` subclass, and return that.

    Args:
        handler: the trainer's name.
        registry: name → class; None for ``TRAINER_REGISTRY`` of open-unlearning's package `trainer`.
    """
    if registry is None:
        registry = importlib.import_module("trainer").TRAINER_REGISTRY
    if handler not in registry:
        raise unknown("trainer", handler, registry, "trainer.handler")
    registry[handler] = by_objective(registry[handler])
    return registry[handler]


class Callback:
    """Hydra's callback that calls `register` before a job: named in ``dualoptim/plus.yaml``."""

    def on_job_start(self, config: Any, **_: Any) -> None:
        """Check the settings and register the trainer that the config names, before a model is loaded."""
        try:
            read_settings(config.trainer.method_args.dualoptim)
            served = register(config.trainer.handler)
        except UserError as error:
            raise SystemExit(f"error: {error}") from None  # Hydra makes a warning of any other exception
        logger.info("%s serves forget and retain by turns", served.__name__)

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Ignore all other events; with Hydra's own base class, this file could not be imported without Hydra."""
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda **_: None
