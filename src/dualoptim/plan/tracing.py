"""What a backward pass holds beside the weights, counted on fake tensors, which allocate nothing.

A step's own losses are traced for the model cut to two and to four layers. Every tensor that is made is counted, and
what one layer adds is multiplied by the number of layers.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakSet, finalize

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from ..adapters import linear_layers
from ..losses import IGNORED, Loss
from .setting import Setting

LAYERS = 2, 4  # of the models that are traced


class Size(NamedTuple):
    """Of the rows of a batch: T tokens of each, padding included, of which so many are learned."""

    tokens: int
    labelled: int


class Part(NamedTuple):
    """What a loss gets in a pass: rows, and refusals or other answers in their place, where it needs those."""

    loss: Loss
    rows: int
    size: Size
    replaced: Size


Pass = tuple[Part, ...]  # the losses that are added up before their backward pass


class Traced(NamedTuple):
    """Bytes that a backward pass holds beside the weights, at its two ends: activations go while gradients come."""

    early: int  # the peak until the last layer's gradients: all activations, logits, weights cast to bf16
    late: int  # the peak once all but the first layer's gradients are there: those, and one layer's activations


def trace(
    config: PretrainedConfig, setting: Setting, passes: Sequence[Pass], dtype: torch.dtype, autocast: bool
) -> Traced:
    """The bytes that a forward and backward pass holds, the most of several.

    Args:
        dtype: of the weights.
        autocast: compute in bf16.
    """
    count = int(config.get_text_config().num_hidden_layers)
    few, more = (min(each, count) for each in LAYERS)
    found = []
    for one in passes:
        first, second = (_traced(config, setting, one, layers, dtype, autocast) for layers in (few, more))
        beyond = (count - few) / (more - few or 1)
        found.append([round(a + beyond * (b - a)) for a, b in zip(first, second, strict=True)])
    return Traced(*map(max, zip(*found, strict=True)))


_TRACED: dict[tuple[Any, ...], Traced] = {}


def _traced(
    config: PretrainedConfig, setting: Setting, one: Pass, layers: int, dtype: torch.dtype, autocast: bool
) -> Traced:
    """`trace` for so many layers; settings that differ only in the optimizer or the devices are traced once."""
    same = (
        *(type(config), config.to_json_string(use_diff=False), config._attn_implementation, layers, dtype, autocast),
        *(setting.checkpointing, setting.released, setting.lora_rank, repr(one)),
    )
    if same not in _TRACED:
        _TRACED[same] = _pass(config, setting, one, layers, dtype, autocast)
    return _TRACED[same]


def _pass(
    config: PretrainedConfig, setting: Setting, one: Pass, layers: int, dtype: torch.dtype, autocast: bool
) -> Traced:
    with FakeTensorMode() as fake, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _model(config, setting, layers, dtype).train()
        if setting.checkpointing:
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        reference = None
        if any(part.loss.reference == "model" for part in one):
            reference = _model(config, setting, layers, dtype).eval().requires_grad_(False)
        held, blocks, early = Held(), layers_of(model), 0
        last = {id(p) for p in blocks[-1].parameters()} if len(blocks) else set()
        later = {id(p) for block in list(blocks)[1:] for p in block.parameters()}

        def came(p: torch.Tensor) -> None:
            nonlocal early
            if setting.released:
                p.grad = None
            if id(p) in last and not early:
                early = held.peak
            if id(p) in later:
                held.peak = held.now

        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(came)
        known = _Known(fake)
        batches = [_batch(part, known) for part in one]
        with held, known:
            total = torch.zeros(())
            for part, batch in zip(one, batches, strict=True):
                loss = part.loss
                if getattr(loss, "layer", None) is not None:  # of more layers than there are; the last one takes most
                    loss = dataclasses.replace(loss, layer=layers - 1)  # type: ignore[type-var]
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    total = total + loss(model, batch, reference)
            total.backward()  # type: ignore[no-untyped-call]
    return Traced(early or held.peak, held.peak)


def _model(config: PretrainedConfig, setting: Setting, layers: int, dtype: torch.dtype) -> Any:
    """The model cut to so many layers, with an adapter where one is trained."""
    with no_init_weights():  # initialization may read values, which fake tensors do not have
        model: Any = AutoModelForCausalLM.from_config(_cut(config, layers), dtype=dtype)
    model.tie_weights()
    if setting.lora_rank:
        model.requires_grad_(False)
        model.enable_input_require_grads()
        for linear in linear_layers(model):
            _Adapter(linear, setting.lora_rank)
    return model


class _Adapter(nn.Module):
    """What PEFT adds to a linear layer: fp32 matrices, and so an fp32 input. PEFT's own is not for fake tensors."""

    def __init__(self, linear: Any, rank: int) -> None:
        super().__init__()
        ends = linear.weight.shape if isinstance(linear, Conv1D) else linear.weight.shape[::-1]
        self.down, self.up = nn.Linear(ends[0], rank, bias=False), nn.Linear(rank, ends[1], bias=False)
        linear.register_forward_hook(self.added)
        linear.adapter = self

    def added(self, linear: nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        return out + self.up(self.down(inputs[0].to(self.down.weight.dtype))).to(out.dtype)


def layers_of(model: Any) -> nn.ModuleList:
    """The blocks of the model, or of its text part: the longest list of modules."""
    lists = [m for m in (model.get_decoder() or model).modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def _batch(part: Part, known: _Known) -> dict[str, Any]:
    """A batch of a part's rows, whose last tokens are learned, with what stands in for their answers."""

    def of(size: Size) -> dict[str, Any]:
        batch: dict[str, Any] = {"input_ids": torch.zeros(part.rows, size.tokens, dtype=torch.int64)}
        with no_dispatch():
            labels = torch.full((part.rows, size.tokens), IGNORED)
            labels[:, size.tokens - size.labelled :] = 0
            groups = torch.zeros(part.rows, dtype=torch.int64)
        batch |= {"labels": known.made(labels), "groups": known.made(groups)}
        if part.loss.reference == "sequences":  # computed before training begins
            batch["reference_log_probs"] = torch.zeros(part.rows)
        return batch

    return {**of(part.size), **({"idk": of(part.replaced)} if part.loss.needs_idk else {})}


class _Known(TorchDispatchMode):
    """Computes what follows from labels alone with their values, since shapes depend on how many tokens are learned."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = fake
        self.values: Any = WeakTensorKeyDictionary()

    def made(self, value: Any) -> Any:
        """A fake tensor in place of one with a value; anything else as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        made = self.fake.from_tensor(value)
        self.values[made] = value
        return made

    def value(self, given: Any) -> Any:
        """The value of a tensor, where it is known; anything else as it is."""
        return self.values.get(given, given) if isinstance(given, torch.Tensor) else given

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if given and all(t in self.values for t in given):
            real_args, real_kwargs = tree_map(self.value, (args, kwargs or {}))
            with no_dispatch():
                out = func(*real_args, **real_kwargs)
            return tree_map(self.made, out)
        if func is torch.ops.aten.index.Tensor:  # by places, as a mask of them selects an unknown number
            args = args[0], [each for index in args[1] for each in self._places(index)]
        return func(*args, **(kwargs or {}))

    def _places(self, index: Any) -> list[Any]:
        if index is None or index.dtype != torch.bool or index not in self.values:
            return [index]
        with no_dispatch():
            places = self.values[index].nonzero(as_tuple=True)
        return [self.made(each) for each in places]


class Held(TorchDispatchMode):
    """Counts the bytes of tensors made within it: those held now, and the peak since it was last reset."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: WeakSet[torch.UntypedStorage] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            # On fake tensors, torch supports this operation only in bf16.
            out = _grouped(*args)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.known and not any(storage is each for each in given):
                    self.known.add(storage)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    finalize(storage, self._gone, storage.nbytes())
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


def _grouped(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, *_: Any) -> torch.Tensor:
    """An empty result of a grouped product: of each expert's rows with its weights, or for the weights' gradients."""
    experts = [len(offsets)] if b.ndim == 2 else []
    return a.new_empty((*experts, a.shape[-2], b.shape[-1]))


def _cut(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The configuration of the same model with fewer layers."""
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    if vars(text).get("layer_types"):  # other configurations derive it from the number
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers
    return cut
