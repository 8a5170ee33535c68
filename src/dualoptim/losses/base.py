"""What the losses share: the model's and the reference's outputs at labeled tokens, and the base class."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError

Batch = Mapping[str, Any]
IGNORED = -100


class Labelled(NamedTuple):
    """The model's output at the positions that predict a labeled token."""

    logits: Tensor  # (N, V) fp32
    targets: Tensor  # (N,) token ids
    rows: Tensor  # (N,) the sequence each belongs to, ascending

    def log_probs(self) -> Tensor:
        """(N,) log-probabilities of the labeled tokens."""
        return -F.cross_entropy(self.logits, self.targets, reduction="none")


def labelled(model: nn.Module, batch: Batch) -> Labelled:
    """Run the model and apply its head only at the positions that predict a labeled token.

    A temporary hook selects the positions before the head. So the result is exact for any causal model of Transformers,
    and whatever a model does to its logits after the head is done to the selected ones. If no head is found, or the
    model is compiled, the head is applied from the first labeled position on if the model allows it (`logits_to_keep`),
    else everywhere.

    Args:
        model: a causal language model, also under DistributedDataParallel or PEFT.
        batch: ``input_ids``, ``labels`` (B, T) and ``attention_mask``, (B, T) or (B, 1, T, T); ``position_ids`` (B, T)
            if need be.

    Raises:
        ValueError: nothing in the batch is labeled.
    """
    labels = batch["labels"]
    rows, at = _predicting(labels)
    head = _head(_given(model))
    kept = {}
    if head is None and _keeps_logits(model):
        kept = {"logits_to_keep": labels.shape[1] - int(at.min())}
    with _head_at(head, labels.shape, rows * labels.shape[1] + at) as chosen:
        logits = model(**model_inputs(model, batch), **kept).logits
    # Counted from the end, as logits may lack the first positions, or begin with those of an adapter's own prompt.
    logits = logits[0] if chosen else logits[rows, at - labels.shape[1]]
    return Labelled(logits.float(), labels[rows, at + 1].long(), rows)


def hidden_states(model: nn.Module, batch: Batch, layer: int) -> tuple[Tensor, Tensor]:
    """A layer's output at the positions that predict a labeled token, (N, d) in fp32, and their rows (N,).

    Args:
        model: as for `labelled`.
        batch: as for `labelled`.
        layer: the layer, counted from 0. The last one's states are taken after the model's final norm.

    Raises:
        ValueError: nothing in the batch is labeled, the model has no such layer, or its states are not of tokens.
    """
    labels = batch["labels"]
    rows, at = _predicting(labels)
    with _head_at(_head(_given(model)), labels.shape, rows[:1]):  # logits are not needed; one position is the fewest
        states = model(**model_inputs(model, batch), output_hidden_states=True).hidden_states
    check_layer(layer, len(states) - 1)  # the first are the embeddings
    return token_states(states[layer + 1], labels.shape)[rows, at].float(), rows


def token_states(states: Tensor, shape: torch.Size) -> Tensor:
    """(B, T, d) states of a batch's tokens, the mean over streams where a layer has several, without added tokens.

    Gemma 3n's layers give (K, B, T, d), those with hyper-connections, as DeepSeek-V4's, (B, T, K, d). The tokens of an
    adapter's own prompt come before the batch's.

    Args:
        states: a layer's output as the model gives it.
        shape: (B, T) of the batch.

    Raises:
        UserError: the states are of another shape.
    """
    rows, width = shape
    fits = [i for i in range(states.dim() - 2) if states.shape[i] == rows and states.shape[i + 1] >= width]
    # Added tokens are many; where both fit, the width that is the batch's own is the tokens'.
    at = min(fits, key=lambda i: states.shape[i + 1] - width, default=None)
    if at is None or states.dim() > 4:
        raise UserError(
            f"the model's layers give states of the shape {tuple(states.shape)} for a batch of {rows} rows of {width} "
            "tokens, of which a layer's state of each token is not known; take a loss that reads no layer"
        )
    if states.dim() == 4:
        states = states.mean(2 - 2 * at)
    return states[:, -width:]


def check_layer(layer: int, count: int) -> None:
    """Refuse a layer that a model of `count` layers does not have."""
    if layer >= count:
        raise ValueError(f"layer {layer}: the model has layers 0 to {count - 1}; choose one of them")


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What the model is called with; without its cache, if it has one."""
    names = ("input_ids", "attention_mask", "position_ids")
    cached = {"use_cache": False} if _takes(model, "use_cache") else {}
    return {**cached, **{name: batch[name] for name in names if name in batch}}


def per_sequence(values: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The sum of each sequence's values and how many it has, both (B,), from values (N,) of the sequences `rows`."""
    zeros = values.new_zeros(count)
    return zeros.index_add(0, rows, values), zeros.index_add(0, rows, torch.ones_like(values))


def sequence_log_probs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(log π(y|x), |y|) of each sequence of the batch, both (B,)."""
    out = labelled(model, batch)
    return per_sequence(out.log_probs(), out.rows, len(batch["labels"]))


def learnt(labels: Tensor) -> Tensor:
    """Which positions of (B, T − 1) predict a labeled token: position t predicts token t + 1."""
    return labels[:, 1:] != IGNORED


def _given(model: nn.Module | None) -> nn.Module:
    """The model; a loss of a user's own that does not declare its reference gets None for it."""
    if model is None:
        raise UserError(
            "there is no model to run: a loss that compares with the reference declares so in its class, by "
            "reference = 'model' (or 'sequences'), and the reference is given"
        )
    return model


def _predicting(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence and position, each (N,), of every position that predicts a labeled token."""
    rows, at = learnt(labels).nonzero(as_tuple=True)
    if len(rows) == 0:
        raise ValueError("no token of the batch carries a label, so there is nothing to learn or score in it")
    return rows, at


@contextmanager
def _head_at(head: nn.Module | None, shape: torch.Size, positions: Tensor) -> Iterator[list[bool]]:
    """Give the head only `positions` of the flattened (B, T), as (1, N, d). Yields a list, empty unless that worked."""
    chosen: list[bool] = []

    def choose(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].shape[:-1] != shape:
            return None
        chosen.append(True)
        return args[0].flatten(0, 1).index_select(0, positions)[None], *args[1:]

    if head is None:
        yield chosen
        return
    handle = head.register_forward_pre_hook(choose)
    try:
        yield chosen
    finally:
        handle.remove()


def _head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits of hidden states; None if there is none, or if a hook on it is not safe."""
    inner = _inner(model)
    # torch.compile does not notice new hooks: a graph has those that were there when it was compiled.
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in (model, inner)):
        return None
    found = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    return found if isinstance(found, nn.Module) else None


def _takes(model: nn.Module, name: str) -> bool:
    """Whether a model's forward pass has an argument, by its name or among any."""
    parameters = inspect.signature(_inner(model).forward).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def _keeps_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(_inner(model).forward).parameters


def _inner(model: nn.Module) -> Any:
    inner: Any = getattr(model, "module", model)  # under DistributedDataParallel
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # under PEFT


_LIMITS: dict[str, Callable[[Any], bool]] = {
    "> 0": lambda value: 0 < value < math.inf,
    ">= 0": lambda value: 0 <= value < math.inf,
    "a whole number >= 0": lambda value: isinstance(value, int) and value >= 0,
    "a whole number > 0": lambda value: isinstance(value, int) and value > 0,
}


class Loss(ABC):
    """What every loss declares about itself, besides its formula."""

    role: ClassVar[Literal["forget", "retain"]]
    # What it needs of the reference: nothing, log π_ref(y|x) of each sequence, which may be cached, or the model.
    reference: ClassVar[Literal["none", "sequences", "model"]] = "none"
    needs_idk: ClassVar[bool] = False
    needs_alternates: ClassVar[bool] = False  # ``batch["idk"]`` holds the row's own ``alternates``
    mean_over: ClassVar[Literal["tokens", "sequences"]] = "sequences"  # what the batch's mean is taken over
    limits: ClassVar[Mapping[str, str]] = {}  # argument → what it must be, one of _LIMITS

    def __post_init__(self) -> None:
        """Check the arguments that have limits."""
        for name, limit in self.limits.items():
            if not _LIMITS[limit](value := getattr(self, name)):
                raise ValueError(f"{type(self).__name__}: {name} must be {limit}, but is {value!r}")

    def check(self, model: nn.Module) -> None:
        """Raise a ValueError if the loss cannot be computed for this model of Transformers."""
        if (layer := getattr(self, "layer", None)) is not None:
            check_layer(layer, _inner(model).config.get_text_config().num_hidden_layers)

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        """The loss of a batch: a scalar, the mean over its `size` items."""

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with a reference in any way."""
        return self.reference != "none"

    def size(self, batch: Batch) -> int:
        """How many items the loss averages over in this batch: the batch's weight among those of one step."""
        if self.mean_over == "sequences":
            return len(batch["labels"])
        return int(learnt(batch["labels"]).sum())

    def _reference(self, reference: nn.Module | None) -> nn.Module:
        if reference is None:
            cached = ", or its log-probabilities as batch['reference_log_probs']" * (self.reference == "sequences")
            raise ValueError(
                f"{type(self).__name__} needs a reference model and got None; pass the model as it was{cached}"
            )
        return reference

    def _reference_log_probs(self, batch: Batch, reference: nn.Module | None) -> Tensor:
        """log π_ref(y|x) of each sequence, (B,), from the batch if it has them, else from the reference model."""
        if "reference_log_probs" not in batch:
            with torch.no_grad():
                return sequence_log_probs(self._reference(reference), batch)[0]
        cached: Tensor = batch["reference_log_probs"]
        if cached.shape != (len(batch["labels"]),):
            raise ValueError(
                f"{type(self).__name__}: reference_log_probs must hold one number for each of the batch's "
                f"{len(batch['labels'])} sequences, but has the shape {tuple(cached.shape)}"
            )
        return cached

    def _idk(self, batch: Batch) -> Batch:
        if "idk" not in batch:
            raise ValueError(
                f"{type(self).__name__} needs refusals to the same questions in batch['idk'], and the batch has none"
            )
        return batch["idk"]
