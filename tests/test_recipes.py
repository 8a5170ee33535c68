"""Every recipe, on models of the architectures that the recipes name; and the chat templates that come along."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import dualoptim.tiny
from dualoptim import cli, plan, resolve, runs
from dualoptim.command_line import arguments, recipe_files
from dualoptim.data import IGNORED, encode, parse_row, prompt_text, question
from dualoptim.errors import UserError
from dualoptim.models import load_model, load_tokenizer, read_template
from dualoptim.tasks.tofu import Tofu

from . import families, lume, muse, tiny, tofu
from .test_plan import LLAMA_8B

RECIPES = sorted(recipe_files.recipes_folder().glob("*.yaml"))
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ARCHITECTURES: dict[str, Callable[..., PretrainedConfig]] = {
    "phi": lambda **ids: PhiConfig(**SHAPE, **ids),
    "llama": lambda **ids: LlamaConfig(**SHAPE, num_key_value_heads=1, **ids),
    "qwen2": lambda **ids: Qwen2Config(**SHAPE, num_key_value_heads=1, **ids),
    "gpt2": lambda **ids: GPT2Config(n_embd=16, n_layer=2, n_head=2, **ids),
}
QUESTION = parse_row({"question": " What does Ada grow? ", "answer": "Plums, and rye.\n"}, "here")
PROMPTS = {  # of QUESTION, as the tokens <s> and </s> are written
    "question_answer": "Question: What does Ada grow?\nAnswer:",
    "tofu_llama2": "<s>[INST] What does Ada grow? [/INST]",
    "tofu_llama3": "<s><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 10 Apr 2025\n\nYou are a helpful assistant.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat does Ada grow?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}
ANSWERS = {
    "question_answer": " Plums, and rye.</s>",
    "tofu_llama2": "Plums, and rye.</s>",
    "tofu_llama3": "Plums, and rye.<|eot_id|>",
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with the tokens that begin and end, and no chat template."""
    made = tiny.tokenizer()
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"})
    made.chat_template = None
    return made


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of each architecture; the tokenizers are alike, Qwen's has a chat template."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in ARCHITECTURES.items():
        words = tokenizer()
        ids = {"vocab_size": len(words), "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
        AutoModelForCausalLM.from_config(config(**ids)).save_pretrained(folder / name)
        if name == "qwen2":
            words.chat_template = tiny.CHAT_TEMPLATE
        words.save_pretrained(folder / name)
    return folder


@pytest.fixture
def place(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with TOFU's files in miniature under tofu/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(cache))
    monkeypatch.setattr("dualoptim.tasks.tofu.Tofu.reply_tokens", 24)  # a random model goes on to the last of them
    tofu.write(tmp_path / "tofu")
    families.write(tmp_path / "data")
    lume.write(tmp_path / "data" / "lume")
    for corpus in ("news", "books"):
        muse.write(tmp_path / "data" / corpus)
    return tmp_path


def architecture(recipe: Path) -> str:
    """Of the model that a recipe names."""
    model = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("model", "smollm2").lower()
    return next(name for name in ("phi", "qwen", "llama") if name in model.replace("smollm2", "llama"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_its_config_is_sound(recipe: Path, models: Path, place: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert len(text.splitlines()[0]) <= 120
    settings = yaml.safe_load(text)
    assert set(settings) <= set(recipe_files.RECIPE_KEYS)
    for command in ("unlearn", "compare"):
        parsed = arguments.parse(arguments.parser(command), ["--recipe", recipe.stem])
        for key in set(settings) & set(vars(parsed)):
            value = getattr(parsed, key)
            assert (list(value) if isinstance(value, tuple) else value) == settings[key]
        config = arguments.config_of(parsed)
        if config.task != "facts" and "forget" not in config.task_args:  # facts come along, and names alone need none
            config.data_dir = "tofu" if config.task == "tofu" else "data"
        if config.task == "tofu":
            config.task_args |= {"holdout_rows": 0, "held_out_rows": 0}  # the miniature has no rows to spare
        if config.task == "lume":
            config.task_args |= {"holdout_documents": 0}
        if config.task in ("wmdp", "muse"):  # which cut texts by the model's tokens
            config.model = str(models / "llama")
            config.retrained = config.retrained and config.model
        if importlib.util.find_spec("lm_eval") is None:
            config.lm_eval = []
        configs = [config]
        if command == "compare":
            configs = resolve.methods_of(config, parsed.methods, parsed.seeds)
        for each in configs:
            resolve.check(each)
    assert config.out == f"runs/{recipe.stem}"


def test_the_recipes_of_what_fits_are_what_the_plan_names(
    models: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = plan.Step(rows=1, tokens=512, labelled=512)
    needs = [(setting, plan.needed(LLAMA_8B, setting, step)) for setting in plan.ladder(1)]
    assert plan.fitting(needs, plan.parse_size("4GB")) is None
    for memory, lora_rank, released in (("80GB", 0, True), ("24GB", 16, False)):
        chosen = plan.fitting(needs, plan.parse_size(memory))
        assert chosen is not None
        assert (chosen.weights, chosen.lora_rank, chosen.released) == ("bfloat16", lora_rank, released)
        options = ["unlearn", "--recipe", f"fit_8b_{memory.lower()}", "--model", str(models / "llama")]
        options += ["--data-dir", "tofu", "--task-args", '{"split": "forget01", "retain_rows": 2}']
        options += ["--chat-template", "question_answer"]
        assert cli.main([*options, "--dry-run"]) == 0
        assert "activations at most" in capsys.readouterr().out
        config = arguments.config_of(arguments.parse(arguments.parser("unlearn"), options[1:]))
        assert config.bf16_weights == (chosen.weights == "bfloat16")
        assert config.gradient_checkpointing == chosen.checkpointing
        assert config.release_gradients == chosen.released
        assert config.lora_rank == chosen.lora_rank
        assert (config.delta_bits, config.base_bits) == (chosen.bits, chosen.bits)


def test_the_published_recipes_hold_the_published_settings() -> None:
    published = {"forget_loss": "IDK", "retain_loss": "GD", "ratio": "1:5", "steps": 300, "batch_size": 40, "lr": 1e-5,
                 "betas": [0.9, 0.95], "base_betas": [0.9, 0.95], "weight_decay": 0.01, "max_grad_norm": 1.0,
                 "max_update": None, "optimizer": "DualOptim+"}  # fmt: skip
    for name in ("tofu_phi15_forget05", "tofu_llama2_forget10"):
        assert published.items() <= yaml.safe_load(recipe_files.find_recipe(name).read_text(encoding="utf-8")).items()


@pytest.mark.parametrize(("name", "steps"), [("muse_news_llama2_7b", 7 * 102), ("muse_books_iclm_7b", 139)])
def test_muses_recipes_hold_the_published_settings(name: str, steps: int) -> None:
    corpus = name.split("_")[1]
    published = {
        "model": f"muse-bench/MUSE-{corpus.title()}_target", "retrained": f"muse-bench/MUSE-{corpus.title()}_retrain",
        "task_args": {"corpus": corpus}, "forget_loss": "GA", "retain_loss": "GD", "joint": True, "ratio": "1:1",
        "steps": steps, "batch_size": 8, "lr": 1e-5, "lr_decay": False, "warmup_ratio": 0.0, "betas": [0.9, 0.999],
        "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0, "max_length": 2048, "optimizer": "AdamW",
    }  # fmt: skip
    assert published.items() <= yaml.safe_load(recipe_files.find_recipe(name).read_text(encoding="utf-8")).items()


RUNS = [
    *((r.stem, architecture(r)) for r in RECIPES if r.stem.startswith("tofu_") and r.stem != "tofu_tiny"),
    ("tofu_phi15_forget05", "gpt2"),
]


@pytest.mark.parametrize(("recipe", "model"), [(r, {"qwen": "qwen2"}.get(m, m)) for r, m in RUNS])
def test_a_recipe_runs_on_its_architecture(
    recipe: str, model: str, models: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["unlearn", "--recipe", recipe, "--model", str(models / model), "--data-dir", "tofu", "--out", "out"]
    options += ["--steps", "2", "--batch-size", "4", "--curve-points", "1", "--save-model", "false"]
    if recipe.startswith(
        "tofu_smollm2"
    ):  # whose model has a template of its own, and which the miniature is too small for
        options += ["--chat-template", "question_answer", "--memorise-args", '{"epochs": 1}']
        options += ["--task-args", '{"split": "forget01", "retain_rows": 2, "holdout_rows": 1}']
    assert cli.main([*options, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "⟦" in shown
    assert not (place / "out").exists()
    assert cli.main(options) == 0
    (entry,) = json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))["runs"]
    for numbers in (entry["before"], entry["after"]):
        assert all(math.isfinite(value) for value in numbers.values() if value is not None)
        assert {name for name, value in numbers.items() if value is None} == set(entry["not_computed"])
        assert numbers["tofu_model_utility"] is not None
    assert entry["before"] != entry["after"]
    assert [point["step"] for point in entry["curve"]] == [0, 2]


@pytest.mark.parametrize("name", PROMPTS)
def test_a_template_that_comes_along_asks_and_answers_as_the_model_learnt_it(name: str) -> None:
    # A tokenizer with tokens of whole words and the blank before them, which a prompt must not cut in two.
    _, words = dualoptim.tiny.build([question("What does Ada grow?", "She grows Plums, and rye. Plums, and rye.")])
    words.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    words.chat_template = read_template(name)
    assert prompt_text(words, QUESTION.prompt) == PROMPTS[name]
    tokens = encode(QUESTION, words, 512)
    assert words.decode(tokens.input_ids) == PROMPTS[name] + ANSWERS[name]
    assert words.decode([label for label in tokens.labels if label != IGNORED]) == ANSWERS[name]
    assert words(PROMPTS[name], add_special_tokens=False)["input_ids"] == [
        token for token, label in zip(tokens.input_ids, tokens.labels, strict=True) if label == IGNORED
    ]


CONVERSATION = {
    "question_answer": "Be brief.\n\nQuestion: One?\nAnswer: Yes.</s>\nQuestion: Two?\nAnswer: No.</s>",
    "tofu_llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nOne? [/INST]Yes.</s><s>[INST] Two? [/INST]No.</s>",
    "tofu_llama3": "Today Date: 10 Apr 2025\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nOne?"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nNo.<|eot_id|>",
}


@pytest.mark.parametrize("name", CONVERSATION)
def test_a_template_that_comes_along_writes_conversations(name: str, models: Path) -> None:
    turns = [("system", "Be brief."), ("user", "One?"), ("assistant", "Yes."), ("user", "Two?"), ("assistant", "No.")]
    row = parse_row({"messages": [{"role": role, "content": text} for role, text in turns]}, "here")
    words = load_tokenizer(str(models / "phi"), name)
    assert words.decode(encode(row, words, 512).input_ids).endswith(CONVERSATION[name])


def test_a_chat_template_by_file_goes_before_one_by_name(models: Path, place: Path) -> None:
    (place / "question_answer").write_text("mine", encoding="utf-8")
    assert load_tokenizer(str(models / "phi"), "question_answer").chat_template == "mine"
    assert load_tokenizer(str(models / "phi"), "tofu_llama2").chat_template != "mine"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("question_anser", "chat_template question_anser: cannot be read as a file .*did you mean 'question_answer'"),
        ("none.xyz", "cannot be read as a file .*known are question_answer, tofu_llama2, tofu_llama3$"),
        ("latin.jinja", "cannot be read as a file .*it is not UTF-8"),
    ],
)
def test_a_wrong_chat_template_is_told_with_the_nearest_name(given: str, told: str, models: Path, place: Path) -> None:
    (place / "latin.jinja").write_bytes(b"\xe9")
    with pytest.raises(UserError, match=told):
        load_tokenizer(str(models / "phi"), given)


def test_a_folder_without_a_tokenizer_is_told_instead_of_reading_nothing(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(ARCHITECTURES["phi"](vocab_size=99)).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="there is no tokenizer beside it"):
        load_tokenizer(str(tmp_path / "bare"))


@pytest.mark.parametrize(
    ("model", "whose"),
    [
        ("locuslab/tofu_ft_phi-1.5", "microsoft/phi-1_5"),
        *((f"muse-bench/MUSE-{name}", "meta-llama/Llama-2-7b-hf") for name in ("News_target", "Books_retrain")),
    ],
)
def test_models_published_without_a_tokenizer_are_read_with_that_of_the_model_they_were_made_from(
    model: str, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def from_pretrained(name: str, *, trust_remote_code: bool) -> PreTrainedTokenizerFast:
        assert not trust_remote_code
        asked.append(name)
        return tokenizer()

    monkeypatch.setattr("dualoptim.models.AutoTokenizer.from_pretrained", from_pretrained)
    load_tokenizer(model)
    assert asked == [whose]


def test_a_model_that_names_no_end_token_gets_its_tokenizers(tmp_path: Path) -> None:
    words = tokenizer()
    config = ARCHITECTURES["phi"](vocab_size=len(words), bos_token_id=None, eos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "endless")
    words.save_pretrained(tmp_path / "endless")
    assert load_model(str(tmp_path / "endless")).generation_config.eos_token_id == words.eos_token_id


def test_a_model_is_made_taught_retrained_and_unlearned_and_its_numbers_are_made_again_of_the_records(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = '{"split": "forget05", "part": 1, "retain_rows": 2, "scored_rows": 4, "holdout_rows": 1}'
    options = ["--recipe", "tofu_tiny", "--data-dir", "tofu", "--task-args", arguments]
    options += ["--memorise-args", '{"epochs": 1}', "--curve-points", "1", "--steps", "3", "--batch-size", "2"]
    assert cli.main(["compare", *options, "--methods", '["GRU", "DualOptim+"]', "--out", "out"]) == 0
    results = json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))
    for entry in results["runs"]:
        for name in ("forget_quality", "privacy_leakage", "auc_reference", "extraction_strength"):
            assert entry["after"][name] is not None
        assert "needs" in entry["not_computed"]["overall"]
    entry = results["runs"][0]
    settings, records = runs.read_records(place / "out" / f"{runs.slug(entry['method'])}-seed0")
    assert settings["task"] == "tofu"
    again = Tofu.numbers(records["after"], records["retrained"])
    assert again.numbers == entry["after"]
    capsys.readouterr()
    assert cli.main(["evaluate", "--from-records", str(place / "out" / "gru-seed0" / "records.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "not computed: needs model_utility" in shown
