"""What fits where: the memory and communication of an unlearning step, from a model's configuration alone.

    per device = weights + optimizer state + reference + what a backward pass holds at most

Weights, gradients and states are counted on torch's meta device. The losses and their backward pass are traced on fake
tensors, which allocate nothing, for the model cut to two and to four layers. Every tensor that is made is counted, and
what one layer adds is multiplied by the number of layers. `Need` has the parts and their sum.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakSet, finalize

import psutil
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

from . import ranks
from .adapters import added, base_of, linear_layers
from .config import RunConfig
from .data import ObjectiveRows, Row, Tokens, encode
from .device import device_and_precision
from .errors import UserError, unknown
from .losses import GD, IGNORED, LOSSES, Loss
from .models import load_config, positions
from .optim import DualOptim, DualOptimPlus, estimate_state_memory
from .resolve import OPTIMIZERS, check_alone
from .resolved import Resolved
from .rows import alternates
from .tiny import TINY

BYTES = {"float32": 4, "bfloat16": 2}
# NF4: 4 bits, and 8 bits of a scale for 64 weights, whose own scales are fp32 for 256 of them (arXiv 2305.14314).
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
WIDTH = 160  # columns of a table in a file
USUAL_RANK = 16  # of an adapter
# The share of a device's memory that is left to its driver, kernels and the allocator's gaps.
RESERVED = 0.04
UNITS = {
    "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """How a model is trained.

    Args:
        name: shown to people.
        weights: their precision: "float32", computed with in bf16 autocast; "bfloat16", rounded stochastically when
            they are updated; "nf4", frozen in 4 bits under an adapter.
        bits: of the optimizer's moments, 32 or 8.
        checkpointing: activations are recomputed in the backward pass.
        released: each gradient is used and freed while backward runs.
        lora_rank: rank of an adapter on every linear layer but the head, which alone is trained; 0 for the whole model.
        sharded: the model is sharded over the devices, by FSDP2; else each has all of it, and gradients are averaged
            (DDP).
        bf16: whether an fp32 model computes in bf16 autocast.
    """

    name: str
    weights: str = "float32"
    bits: int = 32
    checkpointing: bool = False
    released: bool = False
    lora_rank: int = 0
    sharded: bool = False
    bf16: bool = True


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


@dataclass(frozen=True)
class Step:
    """What a step consists of.

    Args:
        rows: B, sequences in one forward pass of a device.
        tokens: T of each, padding included.
        labelled: tokens of each that are learned; the head is applied only there.
        objectives: how many the optimizer keeps states for.
        optimizer: "DualOptim+", "DualOptim" or "AdamW".
        reference: a frozen copy of the model stays in memory.
        compares: a loss compares with the model before training; with an adapter, a copy of it is then kept.
        accumulated: gradients stay while the next forward pass runs.
        losses: each has steps of its own, of so many rows.
    """

    rows: int = 8
    tokens: int = 512
    labelled: int = 512
    objectives: int = 2
    optimizer: str = "DualOptim+"
    reference: bool = False
    compares: bool = False
    accumulated: bool = False
    losses: Sequence[Loss] = (GD(),)

    @property
    def passes(self) -> list[Pass]:
        """A pass for each loss, in which what stands in for the answers is as long as they are."""
        size = Size(self.tokens, self.labelled)
        return [(Part(loss, self.rows, size, size),) for loss in self.losses]


class Traced(NamedTuple):
    """Bytes that a backward pass holds beside the weights, at its two ends: activations go while gradients come."""

    early: int  # the peak until the last layer's gradients: all activations, logits, weights cast to bf16
    late: int  # the peak once all but the first layer's gradients are there: those, and one layer's activations


@dataclass(frozen=True)
class Need:
    """Bytes of each device.

    Args:
        weights: including what is gathered from other devices' shards.
        gradients: of what is trained; where they are released, only the largest one.
        buckets: copies of the gradients, which DDP averages.
        states: the optimizer's.
        reference: the frozen copy.
        activations: their peak, with temporaries, logits, and weights cast to bf16.
        passing: the peak of a forward and backward pass: activations, gradients, or some of both.
        communication: bytes that a device sends in an optimizer step.
    """

    weights: int
    gradients: int
    buckets: int
    states: int
    reference: int
    activations: int
    passing: int
    communication: int

    @property
    def total(self) -> int:
        """Bytes at the peak of a step."""
        return self.weights + self.states + self.reference + self.buckets + self.passing


def ladder(devices: int, lora_rank: int = USUAL_RANK) -> list[Setting]:
    """Settings, ordered from the one that gives up nothing to the one that needs the least memory."""
    recomputed = "8-bit states, activations recomputed"
    whole = [
        Setting("fp32 weights, 32-bit states"),
        Setting("fp32 weights, 8-bit states", bits=8),
        Setting(f"fp32 weights, {recomputed}", bits=8, checkpointing=True),
        Setting(f"bf16 weights, {recomputed}", "bfloat16", 8, True),
    ]
    lora = Setting(f"LoRA {lora_rank} on bf16 weights", "bfloat16", 32, True, lora_rank=lora_rank)
    qlora = Setting(f"LoRA {lora_rank} on 4-bit weights", "nf4", 32, True, lora_rank=lora_rank)
    if devices == 1:
        released = Setting(f"bf16 weights, {recomputed}, gradients released", "bfloat16", 8, True, True)
        return [*whole, released, lora, qlora]
    found = []
    for each in (*whole, lora):
        found.append(dataclasses.replace(each, name=f"DDP, {each.name}"))
        found.append(dataclasses.replace(each, name=f"FSDP2, {each.name}", sharded=True))
    return [*found, dataclasses.replace(qlora, name=f"DDP, {qlora.name}")]


def needed(config: PretrainedConfig, setting: Setting, step: Step, devices: int = 1) -> Need:
    """The memory that a setting needs on each device.

    Args:
        config: of a causal language model of Transformers.
        devices: how many share the rows of a step, and with `sharded` the model.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    width = BYTES.get(setting.weights, 2)
    parameters = sum(p.numel() for p in model.parameters())
    linear = sum(m.weight.numel() for m in linear_layers(model))
    weights = round(linear * NF4 + (parameters - linear) * 2) if setting.weights == "nf4" else parameters * width
    if setting.lora_rank:  # adapters are kept in fp32
        trained = _adapter_size(model, setting.lora_rank)
        weights += 4 * trained
        gradients, largest = 4 * trained, 0
        states = _moments(step, setting, [torch.empty(trained, dtype=torch.float32, device="meta")], trained)
    else:
        gradients, largest = parameters * width, width * max(p.numel() for p in model.parameters())
        states = _moments(step, setting, model, parameters)
    reference = parameters * width * step.reference if not setting.lora_rank else 4 * trained * step.compares
    # Shards are gathered in the precision that a step computes in, and so need no cast.
    autocast = setting.weights == "float32" and setting.bf16 and not setting.sharded
    compute = torch.bfloat16 if setting.bf16 or setting.weights != "float32" else torch.float32
    dtype = torch.float32 if autocast else compute
    early, late = trace(config, setting, step.passes, dtype, autocast)
    if setting.released:
        gradients = largest
    sent, buckets = 0, 0
    if devices > 1 and setting.sharded:
        inner = BYTES["bfloat16"] if setting.bf16 else BYTES["float32"]
        layers = [sum(p.numel() for p in layer.parameters()) for layer in _layers(model)]
        outside = parameters - sum(layers)  # embeddings and head, which stay gathered from forward to backward
        gathered = inner * (outside + 2 * max(layers, default=0))  # one layer computes, and the next one arrives
        in_flight = 0 if setting.lora_rank else inner * (outside + max(layers, default=0))
        reduced = gradients if setting.lora_rank else inner * parameters
        sent = round((devices - 1) / devices * (2 * inner * parameters + reduced))
        own = -(-gradients // devices)
        early, late = early + in_flight, late + in_flight + own - gradients
        weights, gradients = -(-weights // devices) + gathered, own
        states, reference = -(-states // devices), -(-reference // devices)
    elif devices > 1:
        sent = round(2 * (devices - 1) / devices * gradients)
        buckets = gradients
    # Gradients that stay from one pass to the next are in memory together with all activations.
    passing = early + gradients if step.accumulated else max(early, late)
    return Need(weights, gradients, buckets, states, reference, early, passing, sent)


def _adapter_size(model: Any, rank: int) -> int:
    """Parameters of an adapter as PEFT makes it, on routers and experts, too; without the package, on linear layers."""
    if importlib.util.find_spec("peft") is not None:
        with suppress(UserError):  # some modules cannot have one
            made = added(copy.deepcopy(model), RunConfig(lora_rank=rank), "")
            return sum(p.numel() for p in made.parameters() if p.requires_grad)
    return sum(rank * sum(m.weight.shape) for m in linear_layers(model))


def _moments(step: Step, setting: Setting, model: Any, trained: int) -> int:
    if step.optimizer == "AdamW" and setting.bits == 32:
        return 8 * trained
    names = [f"objective {i}" for i in range(1 if step.optimizer == "AdamW" else step.objectives)]
    if step.optimizer == "DualOptim+":
        return estimate_state_memory(
            model, DualOptimPlus, objectives=names, base_bits=setting.bits, delta_bits=setting.bits
        )
    return estimate_state_memory(model, DualOptim, objectives=names, delta_bits=setting.bits)


def _layers(model: Any) -> nn.ModuleList:
    """The blocks of the model, or of its text part: the longest list of modules."""
    lists = [m for m in (model.get_decoder() or model).modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


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


LAYERS = 2, 4  # of the models that are traced


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
        held, blocks, early = _Held(), _layers(model), 0
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


class _Held(TorchDispatchMode):
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


def parse_size(given: str) -> int:
    """Bytes: "80GB" is 80·10⁹, "80GiB" 80·2³⁰."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", given)
    if not found or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise UserError(f"device_memory {given!r}: is no size; give one such as 80GB or 24GiB")
    return round(float(found[1]) * UNITS[found[2].upper()])


def fitting(needs: Sequence[tuple[Setting, Need]], memory: int) -> Setting | None:
    """The first of some settings that fits, which gives up least."""
    return next((setting for setting, need in needs if need.total <= (1 - RESERVED) * memory), None)


def show(config: RunConfig, devices: int | None, device_memory: str | None) -> None:
    """Print what every setting needs, and the first that fits.

    Args:
        config: only its model, optimizer, losses, batch sizes and `max_length` are read.
        devices: how many train together; None for the GPUs here, or one.
        device_memory: of each, as `parse_size` reads it; None for this machine's.

    Raises:
        UserError: no such model, loss or optimizer, or no size.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    for role in ("forget", "retain"):
        if (name := getattr(config, f"{role}_loss")) not in LOSSES:
            raise unknown(f"{role}_loss", name, [key for key, cls in LOSSES.items() if cls.role == role])
    if config.optimizer not in OPTIMIZERS:
        raise unknown("optimizer", config.optimizer, OPTIMIZERS)
    check_alone(config)
    if (base := base_of(config.model)) is not None:
        raise UserError(f"plan: the model {config.model!r} is an adapter; give the model that it is of, {base!r}")
    if config.model == TINY:
        raise UserError(f"plan: the model {TINY!r} is made of a task's rows; give a folder or hub id")
    if devices is not None and devices < 1:
        raise UserError(f"devices must be >= 1, but is {devices}")
    here, _ = device_and_precision()
    count = devices or (torch.cuda.device_count() if here.type == "cuda" else 1)
    memory = parse_size(device_memory) if device_memory is not None else memory_of(here)
    described = load_config(config.model)
    if config.max_length > (room := positions(described)):
        raise UserError(f"max_length {config.max_length}: the model {config.model!r} takes {room} tokens; give less")
    rows, accumulated = rows_at_once(config, config.batch_size, count)
    step = Step(
        rows,
        config.max_length,
        config.max_length,
        optimizer=config.optimizer,
        reference=any(LOSSES[name].reference == "model" for name in (config.forget_loss, config.retain_loss)),
        compares=any(LOSSES[name].reference != "none" for name in (config.forget_loss, config.retain_loss)),
        accumulated=accumulated,
        losses=[LOSSES[name]() for name in (config.forget_loss, config.retain_loss)],
    )
    settings = [setting for setting in ladder(count) if not (setting.released and accumulated)]
    try:
        needs = [(setting, needed(described, setting, step, count)) for setting in settings]
    except Exception as error:  # a model's code may raise anything on tensors without values
        raise UserError(
            f"plan: a step of the model {config.model!r} cannot be counted from its configuration alone "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); measure one that runs"
        ) from error
    at_once = f"{rows} row{'s' * (rows > 1)} of {config.max_length} tokens at a time"
    title = f"{config.model} on {count} × {size_text(memory)}, {at_once}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("setting", min_width=17)
    for column in ("weights", "gradients", "states", "reference", "activations", "in all", "sent"):
        table.add_column(column, justify="right", no_wrap=True)
    chosen = fitting(needs, memory)
    for setting, need in needs:
        parts = (need.weights, need.gradients + need.buckets, need.states, need.reference, need.activations, need.total)
        texts = [size_text(part) if part else "–" for part in (*parts, need.communication)]
        table.add_row(setting.name, *texts, style="bold" if setting is chosen else None)
    wide = None if sys.stdout.isatty() else WIDTH  # a file may be as wide as needed
    console = Console(markup=False, emoji=False, width=wide)
    console.print(table)
    if chosen is None:
        least = min(needs, key=lambda each: each[1].total)
        console.print(
            f"Nothing fits: {least[0].name} needs least, {size_text(least[1].total)} of each. Give more devices, "
            "fewer rows at a time (--micro-batch-size 1), shorter rows (--max-length) or a smaller model.",
            highlight=False,
        )
    else:
        console.print(f"What fits and gives up least: {chosen.name}.", style="bold", highlight=False)
        console.print(f"How: {how(chosen, config.optimizer, count)}", highlight=False)
    console.print(
        f"· At the peak activations go as gradients come, so that not all is there at once; {RESERVED:.0%} of a device "
        "are left to its driver. Sent is what a device sends in a step. "
        "A reference is there where a loss compares with all that the model said.",
        highlight=False,
    )


def of_run(of: Resolved, dataset: ObjectiveRows) -> int | None:
    """Bytes of activations in a run's step, beside weights and gradients.

    None for a model that is made from its rows, or if the model or a loss needs the values of tensors.

    Args:
        dataset: the run's rows, with refusals; AltPO's answers, which the model has yet to give, are not needed.
    """
    config = of.config
    if config.model == TINY:
        return None
    bf16 = device_and_precision()[1] if config.bf16 is None else config.bf16
    weights = "nf4" if config.load_in_4bit else "bfloat16" if config.bf16_weights else "float32"
    rank = config.lora_rank or (USUAL_RANK if of.adapted else 0)
    setting = Setting("", weights, checkpointing=config.gradient_checkpointing, lora_rank=rank, bf16=bf16)
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    try:
        autocast = bf16 and weights == "float32"
        return trace(load_config(config.model), setting, _passes(of, dataset), dtype, autocast).early
    except Exception:  # a model's code may raise anything on tensors without values
        return None


def _passes(of: Resolved, dataset: ObjectiveRows) -> list[Pass]:
    """The passes of a run's steps, each of the longest rows that it may have."""
    config = of.config
    sizes = {}
    for name, rows in dataset.tokens.items():
        replaced = [*map(_size, dataset.replaced(name))]
        if of.losses[name].needs_alternates:
            replaced = [each for row, own in zip(dataset.rows[name], rows, strict=True)
                        for each in _alternates(row, own, dataset)]  # fmt: skip
        size = _most(map(_size, rows))
        sizes[name] = size, _most(replaced) if replaced else size
    found: dict[Pass, None] = {}
    for turn in of.turns():
        total = sum(turn.values())
        at_once, _ = rows_at_once(config, total, ranks.size())
        one = tuple(Part(of.losses[name], -(-n * at_once // total), *sizes[name]) for name, n in turn.items() if n)
        # Where gradients are combined, each objective has a backward pass of its own.
        apart = config.combine is not None or config.sam_rho is not None
        found |= dict.fromkeys([(part,) for part in one] if apart else [one])
    return list(found)


def _size(row: Tokens) -> Size:
    return Size(len(row.input_ids), sum(label != IGNORED for label in row.labels))


def _most(sizes: Iterable[Size]) -> Size:
    return Size(*map(max, zip(*sizes, strict=True)))


def _alternates(row: Row, own: Tokens, dataset: ObjectiveRows) -> list[Size]:
    """What may stand in for a row's answer: what it gives itself, or whatever a model will be asked for."""
    given = [row.fields["instead"]] if row.fields.get("instead") else row.fields.get("alternates")
    if given:
        return [_size(encode(row.answered(text), dataset.tokenizer, *dataset.fits)) for text in given]
    tokens, labelled = _size(own)
    most = alternates.TOKENS + own.ended
    return [Size(min(tokens - labelled + most, dataset.fits[0]), most)]


def rows_at_once(config: RunConfig, batch: int, devices: int) -> tuple[int, bool]:
    """How many of a step's rows a device takes in one pass, and whether it takes several passes.

    Args:
        batch: rows of the step, of all devices.
    """
    share = -(-batch // devices)
    rows = min(config.micro_batch_size or share, share)
    return rows, rows < share


def how(setting: Setting, optimizer: str, devices: int) -> str:
    """Options of `dualoptim unlearn` that make a setting, and how several devices are started."""
    options = [] if optimizer == RunConfig().optimizer else [f"--optimizer {optimizer}"]
    if setting.lora_rank:
        options.append(f"--lora-rank {setting.lora_rank}")
    if setting.weights == "nf4":
        options.append("--load-in-4bit true")
    if setting.weights != "float32":
        options.append("--bf16-weights true")
    if setting.bits == 8:
        options.append("--base-bits 8 --delta-bits 8" if optimizer == "DualOptim+" else "--delta-bits 8")
    if setting.checkpointing:
        options.append("--gradient-checkpointing true")
    if setting.released:
        options.append("--release-gradients true --max-grad-norm 0")
    said = " ".join(options) or "the defaults"
    if setting.sharded:
        return f"{said}; FSDP2 by UnlearnTrainer in a script of your own, see docs/engines.md"
    return said if devices == 1 else f"{said}; by torchrun with a process for each device"


def memory_of(device: torch.device) -> int:
    """Bytes that a device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def size_text(size: float) -> str:
    """Bytes as cards are sold: "80 GB", "1.5 GB", "540 MB"."""
    if size < 1e9:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e9:.0f} GB" if size >= 100e9 else f"{size / 1e9:.1f} GB".replace(".0 GB", " GB")
