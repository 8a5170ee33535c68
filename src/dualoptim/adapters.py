"""Adapters (PEFT): making, loading, checking and merging them, and base models in 4 bits.

An adapter is a folder or hub id with an adapter_config.json, which names the base model that it is put on. Everywhere
else in the package, an adapter is given by its own name, as a model is.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import RunConfig
from .errors import UserError, unknown

CONFIG = "adapter_config.json"
NAME = "default"  # PEFT's own name for a single adapter
# Kinds whose losses `tests/test_adapters.py` compares with the model's own loss. PROMPTS put virtual tokens before the
# input, cannot be merged, and are saved without the parameters that train them, so they cannot be trained further.
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
KINDS = (
    "LORA", "VERA", "IA3", "LOHA", "LOKR", "OFT", "HRA", "FOURIERFT", "LN_TUNING", "TRAINABLE_TOKENS", *PROMPTS,
)  # fmt: skip
# Settings of a new adapter.
OF_NEW = ("lora_alpha", "lora_targets", "lora_dropout", "dora")
ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer except the output layer


# Names


def described(model: str) -> dict[str, Any] | None:
    """What the adapter_config.json of a folder or hub id says; None where there is none."""
    path = Path(model) / CONFIG if Path(model).is_dir() else _on_hub(model) if "/" in model else None
    if path is None or not path.is_file():
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        kind, base, task = said["peft_type"], said["base_model_name_or_path"], said.get("task_type")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        kind, base, task = None, None, None
    if not (isinstance(kind, str) and isinstance(base, str) and base):
        raise UserError(
            f"model {model!r}: its {CONFIG} does not say which kind of adapter it is ('peft_type') and of which model "
            "('base_model_name_or_path'); save it by PEFT's save_pretrained"
        )
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"model {model!r}: is an adapter for {task}, and not for a causal language model; give another")
    check_kind(said, f"model {model!r}")
    if (revision := said.get("revision")) not in (None, "main") and not Path(base).is_dir():
        raise UserError(
            f"model {model!r}: is an adapter of {base} at revision {revision!r}, and a hub id stands for main; "
            f"download that, as by hf download {base} --revision {revision} --local-dir FOLDER, and put FOLDER into "
            f"its {CONFIG}, as base_model_name_or_path"
        )
    return dict(said)


@functools.lru_cache
def _on_hub(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from transformers.utils import find_adapter_config_file

    try:
        here = [isinstance(try_to_load_from_cache(model, name), str) for name in (CONFIG, "config.json")]
        if here == [False, True]:  # a model that was loaded before: nothing to look up, so no network is needed
            return None
        found = find_adapter_config_file(model)
    except (OSError, ValueError):  # not a name of the hub's, or no network: loading it will report that
        return None
    return Path(found) if found else None


def base_of(model: str) -> str | None:
    """The base model of an adapter, which is given by folder or hub id; None if it is no adapter."""
    said = described(model)
    return said["base_model_name_or_path"] if said is not None else None


def folder_of(model: str) -> Path:
    """The folder of an adapter's files; for one on the hub, a folder of the hub's cache with its commit's name."""
    return Path(model) if Path(model).is_dir() else _on_hub(model).parent  # type: ignore[union-attr]


def check_kind(said: Mapping[str, Any], what: str) -> None:
    """Refuse a kind of adapter for which the losses are not tested against the model's own.

    Args:
        said: the adapter's configuration.
    """
    kind = getattr(said["peft_type"], "value", said["peft_type"])
    if kind not in KINDS:
        raise UserError(f"{what}: adapters of kind {kind} are not supported; take one of {', '.join(KINDS)}")
    if said.get("alora_invocation_tokens") is not None:
        raise UserError(
            f"{what}: its adapter (aLoRA) begins at the last of its invocation tokens, so that a position's output "
            "depends on later tokens; take a LoRA without alora_invocation_tokens"
        )


def num_virtual_tokens(model: Any) -> int:
    """The number of positions that the virtual tokens of a model's adapter take before every sequence."""
    config: Any = getattr(model, "active_peft_config", None)
    return int(config.num_virtual_tokens) if getattr(config, "is_prompt_learning", False) else 0


def check_model(model: nn.Module) -> None:
    """Refuse a model that has an adapter of an unsupported kind, or one that PEFT's own classes do not hold."""
    configs = getattr(model, "peft_config", None) or {}
    if configs and not hasattr(model, "get_base_model"):  # transformers' add_adapter; a Trainer cannot resume it
        raise UserError("model: its adapter was added by add_adapter; use peft.get_peft_model(model, config) instead")
    for config in configs.values():
        check_kind(config.to_dict(), "model")


# Settings


def check_settings(config: RunConfig, *, training: bool) -> None:
    """Refuse settings of adapters that do not fit together, or that do not work on this machine.

    Args:
        training: whether an adapter is to be trained, or the model only scored.
    """
    start = described(config.model)
    if (config.lora_rank or start) and importlib.util.find_spec("peft") is None:
        what = "lora_rank: training an adapter" if config.lora_rank else f"model {config.model!r}: an adapter"
        raise UserError(f"{what} needs the package peft; install dualoptim[lora], as by pip install 'dualoptim[lora]'")
    if config.load_in_4bit:
        check_4bit("load_in_4bit")
    if not training:
        return
    defaults = RunConfig()
    for key in OF_NEW:
        if not config.lora_rank and getattr(config, key) != getattr(defaults, key):
            raise UserError(f"{key} says how a new adapter is made; add --lora-rank, or leave it out")
    if config.lora_alpha is not None and config.lora_alpha <= 0:
        raise UserError(f"lora_alpha must be a number > 0, but is {config.lora_alpha:g}")
    if not 0 <= config.lora_dropout < 1:
        raise UserError(f"lora_dropout must be from 0 to below 1, a share, but is {config.lora_dropout:g}")
    if config.load_in_4bit and not (config.lora_rank or start):
        raise UserError(
            "load_in_4bit: weights of 4 bits have no gradient, so an adapter on them is what is trained; add "
            "--lora-rank, or leave it out"
        )
    if config.merge and not (config.lora_rank or start):
        raise UserError("merge: there is no adapter to merge; add --lora-rank, or leave it out")
    if config.train is not None and (config.lora_rank or start):
        of = "with lora_rank" if config.lora_rank else "of a model that is an adapter"
        raise UserError(f"train: {of} the adapter alone is trained; leave one of them out")
    if start and start["peft_type"] in PROMPTS:
        raise UserError(
            f"model {config.model!r}: is an adapter of kind {start['peft_type']}, which is saved without what trains "
            "it, and cannot be trained further; take its base model, or an adapter of another kind"
        )
    targets_of(config)


def check_4bit(what: str) -> None:
    """Refuse what needs weights in 4 bits if the package for them is missing, or does not support the device."""
    from .device import device_and_precision

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{what}: weights of 4 bits need the package bitsandbytes; install dualoptim[qlora], as by "
            "pip install 'dualoptim[qlora]'"
        )
    device, _ = device_and_precision()
    try:
        _through_4bit(torch.ones(64, 64, dtype=torch.float32, device=device))
    except Exception as error:  # its libraries may raise anything on a device that they do not know
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{what}: bitsandbytes cannot work on {device} ({reason}); leave it out") from None


def targets_of(config: RunConfig) -> str | list[str]:
    """The modules that get an adapter, as PEFT's `target_modules`: names, or one regular expression."""
    given = config.lora_targets
    if isinstance(given, str) and given != ALL_LINEAR and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", given):
        given = re.split(r"\s*,\s*", given)  # as an expression, it would match no module
    if not given or (isinstance(given, list) and not all(each.strip() for each in given)):
        raise UserError(f"lora_targets: names no module; give names, a regular expression, or {ALL_LINEAR!r}")
    if isinstance(given, str):
        try:
            re.compile(given)
        except re.error as error:
            raise UserError(f"lora_targets {given!r}: is no regular expression ({error})") from None
    return given


# Making and loading


def added(model: Any, config: RunConfig, base: str) -> Any:
    """A model with a new low-rank adapter; only the adapter is trained. The same seed makes the same adapter.

    Args:
        model: of Transformers; changed in place. One on torch's meta device costs no memory.
        config: rank, α (by default twice the rank, as QLoRA found best), targets, dropout, DoRA, seed.
        base: the model's folder or hub id, which the adapter's file is to name.

    Raises:
        UserError: targets that the model does not have, or that cannot have an adapter.
    """
    from peft import LoraConfig

    targets = targets_of(config)
    _check_targets(targets, model)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        target_modules=targets,
        lora_dropout=config.lora_dropout,
        use_dora=config.dora,
        exclude_modules=_outside_text(model) if targets == ALL_LINEAR else None,
    )
    try:
        return _wrapped(model, lora, base, config.seed)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"lora_targets {config.lora_targets!r}: {reason}; choose other modules") from None


def _outside_text(model: Any) -> str | None:
    """An expression of the modules beside the text decoder, such as a vision tower's, if any of them is linear.

    Rows of text do not reach them, so an adapter there would never be trained.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    inside = next((name for name, module in model.named_modules() if module is decoder), "")
    if not any(m is not head and not n.startswith(f"{inside}.") for n, m in model.named_modules() if _is_linear(m)):
        return None
    return f"(?!{re.escape(inside)}\\.).*"


def _check_targets(targets: str | list[str], model: nn.Module) -> None:
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        if targets != ALL_LINEAR and not any(re.fullmatch(targets, name) for name in names):
            example = next((n for n, m in model.named_modules() if isinstance(m, nn.Linear)), names[-1])
            raise UserError(
                f"lora_targets {targets!r}: matches the whole name of none of the model's modules, such as {example}"
            )
        return
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            weighted = [n for n, m in model.named_modules() if n and getattr(m, "weight", None) is not None]
            raise unknown("module of lora_targets", target, dict.fromkeys(n.rpartition(".")[2] for n in weighted))


def put_on(model: Any, adapter: str, *, weights: bool = True) -> Any:
    """A model with an adapter on it, which is given by folder or hub id; only the adapter is trained.

    Args:
        model: of Transformers, the adapter's base; changed in place.
        weights: whether to load the adapter's weights; without them, only its modules and shapes are added.

    Raises:
        UserError: the adapter's weights do not fit the model.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(adapter)
    base, kind = config.base_model_name_or_path, config.peft_type.value
    config.task_type, config.inference_mode = "CAUSAL_LM", kind in PROMPTS
    if not weights and hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # PiSSA's and others' are computed from the base's weights
    wrapped = _wrapped(model, config, base)
    if not weights:
        return wrapped
    found = wrapped.load_adapter(adapter, NAME, torch_device="cpu")
    beyond = [key for key in found.unexpected_keys if key != "prompt_embeddings"]  # PEFT puts these in place itself
    for which, keys in (("lacks", found.missing_keys), ("has beyond it", beyond)):
        if keys:
            raise UserError(
                f"model {adapter!r}: its weights are not those of an adapter of {base}: it {which} {len(keys)} of "
                f"them, {min(keys)} first; give the base model that it was trained on in its {CONFIG}"
            )
    return wrapped


def moved(model: Any, base: Any) -> Any:
    """A model's adapter put on another base of the same shapes, which is changed in place."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.deepcopy(model.peft_config[NAME])
    with _as_ours():
        state = get_peft_model_state_dict(model)
        wrapped = _wrapped(base, config, config.base_model_name_or_path)
        set_peft_model_state_dict(wrapped, state)
    return wrapped


def going_on() -> dict[str, Any]:
    """Settings with which the adapter of the previous run is trained further, and no new one is added."""
    defaults = RunConfig()
    return {"lora_rank": 0, **{key: getattr(defaults, key) for key in OF_NEW}}


def _wrapped(model: Any, config: Any, base: str, seed: int = 0) -> Any:
    from peft import get_peft_model

    with _as_ours(), torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
    # Absolute, so that the adapter's base is found from any working folder.
    wrapped.peft_config[NAME].base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    return wrapped


_SET_RIGHT = (  # PEFT's warnings about what is not wrong, or what it corrects itself
    "fan_in_fan_out", "The PEFT config's", "tie_word_embeddings", "Input and output embeddings are no longer tied",
    "find a config file", "Unable to fetch remote file", "save_embedding_layers", "is_gradient_checkpointing",
    "_pattern keys did not match", "`lora_bias=True` was passed",
)  # fmt: skip


@contextmanager
def _as_ours() -> Iterator[None]:
    with warnings.catch_warnings():
        for words in _SET_RIGHT:
            warnings.filterwarnings("ignore", message=f"(?s).*{words}")
        yield


def save(model: Any, folder: Path) -> None:
    """Write an adapter by itself, as PEFT does; the same adapter gives the same files."""
    with _as_ours():
        model.save_pretrained(folder)
    for file in folder.rglob(CONFIG):  # it has sets of names, in an order that varies by process
        said = json.loads(file.read_text(encoding="utf-8"))
        for key in ("target_modules", "modules_to_save", "exclude_modules"):
            if isinstance(said.get(key), list):
                said[key] = sorted(said[key])
        file.write_text(json.dumps(said, indent=2, sort_keys=True), encoding="utf-8")


# Four bits


def without_packing(model: Any) -> Any:
    """A model in 4 bits, of which bitsandbytes does not repack the weights, as it would for scoring on some CPUs.

    Repacking rounds their scales again, permanently, and fails for layers whose width is not a multiple of 32.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


BITS_4 = 4.127  # bits per weight: 4, and the scales of blocks of 64, in 8 bits with scales of their own


def in_4bit() -> Any:
    """The configuration to load a base model in 4 bits, as in QLoRA: NF4, with its scales quantized as well."""
    from transformers import BitsAndBytesConfig

    from .device import scores_in_bf16

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if scores_in_bf16() else torch.float32,
    )


def compute_in(model: Any, bf16: bool) -> None:
    """Let layers in 4 bits compute in bf16 or in fp32: they have a dtype of their own, whatever autocast says."""
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.bfloat16 if bf16 else torch.float32


@contextmanager
def computing_in(model: Any, bf16: bool) -> Iterator[None]:
    """A context in which layers in 4 bits compute so (`compute_in`); afterwards they do as before."""
    was = [(module, module.compute_dtype) for module in model.modules() if hasattr(module, "compute_dtype")]
    compute_in(model, bf16)
    try:
        yield
    finally:
        for module, dtype in was:
            module.compute_dtype = dtype


def bytes_in_4bit(model: Any, width: int = 4) -> int:
    """Bytes of a model's weights when it is loaded in 4 bits, without an adapter's.

    Args:
        width: bytes of each of its other parameters.
    """
    adapted = hasattr(model, "peft_config")
    base = sum(p.numel() for p in model.parameters() if not (adapted and p.requires_grad))
    few = sum(m.weight.numel() for m in linear_layers(model) if not (adapted and m.weight.requires_grad))
    return round(few * BITS_4 / 8) + width * (base - few)


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def linear_layers(model: Any) -> list[Any]:
    """The layers that adapters are put on and that 4 bits are used for: all linear ones except the output layer.

    With an adapter on it, the output layer is several modules: its own and the adapter's.
    """
    head = model.get_output_embeddings()
    of_head = set(head.modules()) if head is not None else set()
    return [m for m in model.modules() if _is_linear(m) and m not in of_head]


def matrices(model: Any) -> list[tuple[nn.Parameter, bool]]:
    """The matrices that are rounded for deployment: those of the linear layers, and of a mixture's experts.

    Each comes with whether it is stored transposed, (…, in, out) in place of (…, out, in). Transformers holds all
    experts of a layer in one parameter (experts, out, in); of classes that do not say which way round it is, the width
    of the first matrix tells.
    """
    from transformers.pytorch_utils import Conv1D

    found: list[tuple[nn.Parameter, bool]] = [(m.weight, isinstance(m, Conv1D)) for m in linear_layers(model)]
    width = model.config.get_text_config().hidden_size
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.ndim == 3 and p.is_floating_point()]
        if own and "expert" in f"{name} {type(module).__name__}".lower():
            said = getattr(module, "is_transposed", own[0].shape[1] == width != own[0].shape[2])
            found += [(p, bool(said)) for p in own]
    return found


def check_rounding(model: Any) -> None:
    """Refuse to round a model most of whose weights would stay as they are.

    Raises:
        UserError: `matrices` holds less than 90 % of the weights that are neither vectors nor embeddings.
    """
    rounds = {id(p) for p, _ in matrices(model)}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        tables |= {id(p) for p in layer.parameters()} if layer is not None else set()
    others = [p for p in model.parameters() if p.ndim > 1 and id(p) not in tables]
    share = sum(p.numel() for p in others if id(p) in rounds) / max(1, sum(p.numel() for p in others))
    if share < 0.9:
        raise UserError(
            f"attacks bits8 and nf4: of {type(model).__name__} only {share:.0%} of the weights would be rounded, and "
            "the others are in layers of its own; leave them out"
        )


def _through_4bit(weight: Tensor) -> Tensor:
    """A weight after quantization to 4 bits and back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True))


# Merging


def merged(model: Any) -> Any:
    """The base model with its adapter merged into its weights; the adapter is gone, and all weights are frozen.

    An output head that shares its weights with the embedding gets its own, if the adapter changes one of the two.

    Raises:
        UserError: the adapter changes weights that another layer has, too, as with LoRA's `layer_replication`.
    """
    inner = model.get_base_model()
    head, embedding = (_plain(layer) for layer in (inner.get_output_embeddings(), inner.get_input_embeddings()))
    shared = head is not None and embedding is not None and head.weight is embedding.weight
    if shared and (head is not inner.get_output_embeddings() or embedding is not inner.get_input_embeddings()):
        head.weight = nn.Parameter(head.weight.detach().clone())
    owners = Counter(p for module in inner.modules() for p in module.parameters(recurse=False))
    for name, module in inner.named_modules():
        if hasattr(module, "base_layer") and any(owners[p] > 1 for p in _plain(module).parameters(recurse=False)):
            raise UserError(f"the weights of {name} are another layer's, too, which would be changed with it")
    with _as_ours():
        whole = model.merge_and_unload()
    head, embedding = whole.get_output_embeddings(), whole.get_input_embeddings()
    if shared and head.weight is not embedding.weight:
        whole.config.tie_word_embeddings = whole.config.get_text_config().tie_word_embeddings = False
    return whole.requires_grad_(False)


def check_merge(model: Any, what: str, instead: str) -> Any:
    """Refuse an adapter that cannot be merged, before it is trained for hours: a copy is merged, and returned.

    Args:
        model: with the adapter on it, on torch's meta device, so that merging costs nothing.
        instead: what to do otherwise.
    """
    try:
        return merged(copy.deepcopy(model))
    except Exception as error:  # PEFT has no class of its own for them
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{what}: the adapter cannot be merged into its base ({reason}); {instead}") from None


def _plain(layer: Any) -> Any:
    """The layer that an adapter wraps."""
    while layer is not None:
        inner = getattr(layer, "base_layer", None) or getattr(layer, "original_module", None)
        if inner is None:
            break
        layer = inner
    return layer


# Rounding


def _to_bf16(weight: Tensor) -> Tensor:
    return weight.bfloat16().to(weight.dtype)


def _through_8bit(weight: Tensor) -> Tensor:
    """A weight after rounding to 8 bits and back: integers from −127 to 127, times a scale by each row's largest."""
    rows = weight.float()
    scale = (rows.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return ((rows / scale).round() * scale).to(weight.dtype)


ROUNDS: dict[str, Callable[[Tensor], Tensor]] = {"bf16": _to_bf16, "bits8": _through_8bit, "nf4": _through_4bit}


@contextmanager
def rounded(model: Any, how: str) -> Iterator[None]:
    """A context in which a model's weights are rounded, as for deployment; afterwards they are restored to the bit.

    Args:
        model: of Transformers, perhaps with an adapter on it, whose own layers are rounded as well.
        how: "bf16" for all weights; or for its `matrices` "bits8", by the largest of each row, that is, of each
            output, or "nf4", in blocks of 64.
    """
    weights = matrices(model) if how in ("bits8", "nf4") else [(p, False) for p in model.parameters()]
    kept = [(weight, turned, weight.detach().to("cpu", copy=True)) for weight, turned in weights]
    with torch.no_grad():
        try:
            for weight, turned, _ in kept:
                made = ROUNDS[how](weight.data.mT if turned else weight.data)
                weight.copy_(made.mT if turned else made)
            yield
        finally:
            for weight, _, was in kept:
                weight.copy_(was)
