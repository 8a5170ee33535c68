"""Adapters: every kind that is accepted, the reference under one, 4-bit bases, merging, and all of it by the command
line."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3Config, TrainingArguments

from dualoptim import UnlearnTrainer, adapters, cli, models, report, resolve, resolved
from dualoptim.config import RunConfig
from dualoptim.data import question
from dualoptim.device import scoring_in
from dualoptim.errors import UserError
from dualoptim.evaluation import scoring
from dualoptim.identity import fingerprint
from dualoptim.losses import LOSSES, sequence_log_probs
from dualoptim.losses.base import hidden_states
from dualoptim.memorise import memorised
from dualoptim.one_run import prepared, train
from dualoptim.schedule import by_turns
from dualoptim.trainer import Objective
from dualoptim.training.reference import AtStart

from . import forked, tiny
from .test_trainer import FORGET, RETAIN, weights

peft = pytest.importorskip("peft")
ROOT = str(Path(__file__).parents[1])

QV, CAUSAL = ["q_proj", "v_proj"], {"task_type": "CAUSAL_LM"}
KINDS: dict[str, Callable[[], Any]] = {
    "LORA": lambda: peft.LoraConfig(r=2, target_modules=QV, **CAUSAL),
    "LORA, DoRA": lambda: peft.LoraConfig(r=2, target_modules="all-linear", use_dora=True, **CAUSAL),
    "LORA, rsLoRA": lambda: peft.LoraConfig(r=4, target_modules=QV, use_rslora=True, **CAUSAL),
    "LORA, biases": lambda: peft.LoraConfig(r=2, target_modules=QV, bias="lora_only", **CAUSAL),
    "LORA, a head": lambda: peft.LoraConfig(r=2, target_modules=QV, modules_to_save=["lm_head"], **CAUSAL),
    "VERA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], **CAUSAL),
    "IA3": lambda: peft.IA3Config(target_modules=[*QV, "up_proj"], feedforward_modules=["up_proj"], **CAUSAL),
    "LOHA": lambda: peft.LoHaConfig(r=2, target_modules=QV, **CAUSAL),
    "LOKR": lambda: peft.LoKrConfig(r=2, target_modules=QV, **CAUSAL),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=QV, **CAUSAL),
    "HRA": lambda: peft.HRAConfig(r=2, target_modules=QV, **CAUSAL),
    "FOURIERFT": lambda: peft.FourierFTConfig(n_frequency=8, target_modules=QV, **CAUSAL),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], **CAUSAL),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(
        token_indices=[49, 54], target_modules=["embed_tokens"], **CAUSAL
    ),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **CAUSAL),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's own
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # of a norm that LN_TUNING takes
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def moved(model: nn.Module, seed: int = 1, std: float = 0.1) -> nn.Module:
    """A model whose trained parameters were trained somewhere."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(40, 70, (3, 12))
    labels = ids.clone()
    labels[:, :4] = -100
    mask = torch.ones_like(ids)
    labels[1, 9:], mask[1, 9:] = -100, 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    out = out.float()
    return out[batch["attention_mask"].bool()] if out.shape[1] == batch["input_ids"].shape[1] else out


def test_every_kind_that_is_accepted_is_tried_here() -> None:
    assert {name.split(",")[0] for name in KINDS} == set(adapters.KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_under_an_adapter_losses_reference_and_merged_weights_are_right(
    kind: str, batch: dict[str, Tensor], base: Path, tmp_path: Path
) -> None:
    model = moved(peft.get_peft_model(tiny.model(), KINDS[kind]()))
    own = model(**batch).loss
    torch.testing.assert_close(LOSSES["GD"]()(model, batch), own, rtol=1e-6, atol=1e-6)
    LOSSES["GD"]()(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    reference, start = AtStart(model), logits(model, batch)
    before, _ = sequence_log_probs(model, batch)
    moved(model, 2, std=0.3)
    now = logits(model, batch)
    assert (now - start).abs().max() > 1e-4
    assert torch.equal(logits(reference, batch), start)
    assert torch.equal(sequence_log_probs(reference, batch)[0], before)
    for every in (False, True):
        kl = LOSSES["KL"](every_position=every)
        assert kl(model, batch, reference) > 1e-9
        assert kl(model, batch, copy.deepcopy(reference)) == kl(model, batch, reference)
    states, _ = hidden_states(model, batch, 1)
    assert len(states) == int((batch["labels"][:, 1:] != -100).sum())
    model.peft_config["default"].base_model_name_or_path = str(base)
    adapters.save(model, tmp_path)
    assert torch.equal(logits(adapters.put_on(tiny.model(), str(tmp_path)).eval(), batch), now)
    if kind not in adapters.PROMPTS:
        torch.testing.assert_close(logits(adapters.merged(model), batch), now, rtol=1e-5, atol=1e-5)


def test_a_kind_whose_own_loss_is_another_is_refused(tmp_path: Path) -> None:
    ada = peft.AdaLoraConfig(target_modules=QV, total_step=10, **CAUSAL)
    with pytest.raises(ValueError, match="adapters of kind ADALORA are not supported; take one of LORA"):
        adapted(tmp_path, peft.get_peft_model(tiny.model(), ada))


# In the trainer


def adapted(folder: Path, model: Any, retain: str = "KL", **arguments: Any) -> UnlearnTrainer:
    settings = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return UnlearnTrainer(
        model,
        TrainingArguments(str(folder), learning_rate=1e-2, max_grad_norm=0.0, **{**settings, **arguments}),
        objectives={
            "forget": Objective(FORGET, LOSSES["NPO"]()),
            "retain": Objective(RETAIN, LOSSES[retain](), refusals=["No idea."]),
        },
        turns=by_turns({"forget": 1, "retain": 1}, 4, 6),
        processing_class=tiny.tokenizer(),
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-2}),
    )


def handed_over(case: str) -> Any:
    """A model with an adapter that was trained already."""
    lora = peft.LoraConfig(r=2, target_modules=QV, lora_dropout=0.5, **CAUSAL)
    if case == "modules_to_save":
        lora.modules_to_save = ["lm_head"]
    model = peft.get_peft_model(tiny.model(), lora)
    if case == "two adapters":
        model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["up_proj"], **CAUSAL))
        model.base_model.set_adapter(["default", "second"])
    if case == "prefix":
        model = peft.get_peft_model(tiny.model(), KINDS["PREFIX_TUNING"]())
    return moved(model)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("case", ["LoRA", "two adapters", "modules_to_save", "prefix"])
def test_the_reference_is_the_model_as_it_was_handed_over(
    tmp_path: Path, case: str, bf16: bool, batch: dict[str, Tensor]
) -> None:
    model = handed_over(case)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        start = logits(model, batch)
        expected, _ = sequence_log_probs(model, batch)
    run = adapted(tmp_path, model, bf16=bf16)
    run.train()
    assert run.rows.reference_log_probs
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        torch.testing.assert_close(logits(run.reference, batch), start, rtol=0, atol=1e-6)
        torch.testing.assert_close(sequence_log_probs(run.reference, batch)[0], expected, rtol=0, atol=1e-5)
        assert (logits(model.eval(), batch) - start).abs().max() > 1e-3


def test_a_loss_compares_with_the_start_and_its_gradient_is_that_beside_a_frozen_copy(
    tmp_path: Path, batch: dict[str, Tensor]
) -> None:
    """Also in autocast, which keeps what it has cast of a weight, be it the start's or the present one."""
    model = handed_over("modules_to_save")
    beside, own = copy.deepcopy(model).requires_grad_(False), AtStart(model)
    moved(model, 3)
    for bf16 in (False, True):
        gradients = []
        for reference in (beside, own):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                LOSSES["KL"]()(model, batch, reference).backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        assert max(float(g.abs().max()) for g in gradients[0]) > 1e-4


def test_where_part_of_a_model_is_trained_the_copy_is_of_that_part(tmp_path: Path, batch: dict[str, Tensor]) -> None:
    model = tiny.model()
    resolve.train_only(r"layers\.1\.mlp", model)
    run = adapted(tmp_path, model)
    assert isinstance(run.reference, AtStart)
    assert all("layers.1.mlp" in name for name in run.reference.copies)
    before = logits(model.eval(), batch)
    run.train()
    assert torch.equal(logits(run.reference, batch), before)
    with pytest.raises(ValueError, match="needs reference="):
        adapted(tmp_path, tiny.model())


def test_an_adapter_by_its_name_is_a_model_to_the_trainer(tmp_path: Path, base: Path, batch: dict[str, Tensor]) -> None:
    model = peft.get_peft_model(tiny.model(), KINDS["LORA"]())
    model.peft_config["default"].base_model_name_or_path = str(base)
    adapters.save(moved(model), tmp_path / "adapter")
    run = adapted(tmp_path / "run", str(tmp_path / "adapter"))
    assert torch.equal(logits(run.model.eval(), batch), logits(model, batch))
    assert run.reference.copies.keys() == {n for n, p in model.named_parameters() if p.requires_grad}


def test_checkpointing_changes_no_gradient_of_an_adapter(batch: dict[str, Tensor]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny.model()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        config = RunConfig(lora_rank=2, lora_targets="q_proj,up_proj", seed=3)
        model = moved(adapters.added(model, config, "base")).train()
        if checkpointing:
            model.enable_input_require_grads()
        LOSSES["GD"]()(model, batch).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 8
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_an_adapter_is_put_on_the_text_decoder_alone() -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sees = Gemma3Config(
        text_config={**small, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        image_token_index=299, boi_token_index=298, eoi_token_index=297,
    )  # fmt: skip
    made = adapters.added(AutoModelForCausalLM.from_config(sees), RunConfig(lora_rank=2), "base")
    trained = [name for name, p in made.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2
    assert all(".language_model." in name for name in trained)
    plain = adapters.added(tiny.model(), RunConfig(lora_rank=2), "base")
    assert plain.peft_config["default"].exclude_modules is None


def test_a_seed_makes_an_adapter_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    inner = tiny.model()
    torch.manual_seed(5)
    first, again, other = (
        adapters.added(copy.deepcopy(inner), RunConfig(lora_rank=2, seed=seed), "base") for seed in (0, 0, 1)
    )
    assert torch.equal(torch.rand(1), expected)
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


SHARDED = """
import copy, os, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from dualoptim.losses import LOSSES
from dualoptim.training.reference import AtStart
from tests.test_adapters import handed_over

dist.init_process_group("gloo")
whole, sharded = handed_over("modules_to_save"), handed_over("modules_to_save")
references = copy.deepcopy(whole).requires_grad_(False), AtStart(sharded)
for part in (*sharded.base_model.model.model.layers, sharded):
    fully_shard(part)
ids = torch.arange(40, 60).view(2, 10)
batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
losses = []
for model, reference in zip((whole, sharded), references):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):  # the second loss asks the reference while the first one's graph is there
        loss = LOSSES["NPO"]()(model, batch, reference) + 3 * LOSSES["KL"]()(model, batch, reference)
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        losses.append(float(loss))
pairs = [(a.detach(), b.full_tensor().detach()) for a, b in zip(whole.parameters(), sharded.parameters())]
if dist.get_rank() == 0:
    torch.save((losses, max(float((a - b).abs().max()) for a, b in pairs)), sys.argv[1])
dist.barrier()
os._exit(0)  # gloo's threads now and then abort a process that takes itself down in order
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed training")
def test_the_reference_of_a_sharded_model_is_its_start(tmp_path: Path) -> None:
    (tmp_path / "sharded.py").write_text(SHARDED)
    forked.run(tmp_path / "sharded.py", str(tmp_path / "losses.pt"))
    losses, apart = torch.load(tmp_path / "losses.pt")
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    assert losses[0] > losses[2] + 1
    assert apart < 1e-6


def test_an_adapters_checkpoint_goes_on_to_the_bit(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2}
    whole = adapted(tmp_path / "whole", handed_over("LoRA"), **saves)
    whole.train()
    again = adapted(tmp_path / "again", handed_over("LoRA"))
    again.train(str(tmp_path / "whole" / "checkpoint-4"))
    assert torch.equal(weights(again), weights(whole))
    assert not (tmp_path / "whole" / "checkpoint-4" / "model.safetensors").exists(), "the adapter alone is saved"


# Merging


OF_HEAD: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding alone": {"target_modules": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [49, 54]},
    "neither": {"target_modules": ["q_proj"]},
}


def tied() -> Any:
    config = tiny.model().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return type(tiny.model())(config)


@pytest.mark.parametrize("of", OF_HEAD.values(), ids=OF_HEAD)
@pytest.mark.parametrize("shared", [True, False])
def test_merged_weights_are_right_where_head_and_embedding_are_one(
    tmp_path: Path, of: dict[str, Any], shared: bool, batch: dict[str, Tensor]
) -> None:
    model = moved(peft.get_peft_model(tied() if shared else tiny.model(), peft.LoraConfig(r=2, **of, **CAUSAL)))
    before = logits(model, batch)
    whole = adapters.merged(model)
    torch.testing.assert_close(logits(whole, batch), before, rtol=1e-5, atol=1e-5)
    whole.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, batch), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of", OF_HEAD.values(), ids=OF_HEAD)
@pytest.mark.parametrize("shared", [True, False])
def test_under_an_adapter_neither_head_nor_embedding_is_rounded(of: dict[str, Any], shared: bool) -> None:
    bare = tied() if shared else tiny.model()
    plain = adapters.bytes_in_4bit(bare)
    model = moved(peft.get_peft_model(bare, peft.LoraConfig(r=2, **of, **CAUSAL)))
    adapters.check_rounding(model)
    was = {name: p.detach().clone() for name, p in model.named_parameters()}
    with adapters.rounded(model, "bits8"):
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, was[name])}
    assert changed == {name for name in was if "_proj" in name}
    assert adapters.bytes_in_4bit(model) == plain, "bitsandbytes leaves both as they are, too"


def test_rounding_changes_a_model_only_meanwhile(batch: dict[str, Tensor]) -> None:
    model = tiny.model().eval()
    before, state = logits(model, batch), copy.deepcopy(model.state_dict())
    with adapters.rounded(model, "bf16"):
        meanwhile = logits(model, batch)
        assert all(torch.equal(p.bfloat16().float(), p) for p in model.parameters())
    assert 1e-6 < (meanwhile - before).abs().max() < 0.05
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


# In 4 bits


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes")


def test_an_adapter_trains_on_4_bits_and_is_merged_into_what_they_stand_for(
    bitsandbytes: Any, base: Path, tmp_path: Path, batch: dict[str, Tensor]
) -> None:
    with scoring_in(False):
        inner = models.load_model(str(base), in_4bit=True)
        codes = {name: p.clone() for name, p in inner.named_parameters() if p.dtype == torch.uint8}
        assert len(codes) == 14, "every linear layer but the head"
        model = adapters.added(inner, RunConfig(lora_rank=2), str(base))
        run = adapted(tmp_path, model)
        start = logits(model.eval(), batch)
        run.train()
        assert torch.equal(logits(run.reference, batch), start)
        now = logits(model.eval(), batch)
        assert (now - start).abs().max() > 1e-3
        assert all(torch.equal(codes[name.replace(".base_layer", "").removeprefix("base_model.model.")], p)
                   for name, p in model.named_parameters() if p.dtype == torch.uint8)  # fmt: skip
        whole = adapters.merged(adapters.moved(model, models.load_model(str(base), in_4bit=True).dequantize()))
        torch.testing.assert_close(logits(whole, batch), now, rtol=1e-5, atol=1e-5)
        meta = adapters.added(models.without_weights(str(base)), RunConfig(lora_rank=2), str(base))
        held = sum(p.numel() * p.element_size() for p in inner.parameters() if not p.requires_grad)
        assert held <= adapters.bytes_in_4bit(meta) <= 1.1 * held


# By the command line

TASK = """
from statistics import fmean
from dualoptim.data import question
from dualoptim.evaluation.numbers import Metric, Numbers
from dualoptim.evaluation.scoring import negative_log_likelihoods
from dualoptim.tasks import Task

class Rows(Task):
    "Rows by their likelihood."

    name = "rows"
    followed = "likelihood"
    metrics = {name: Metric(name, "neither", ".6f") for name in ("forget", "retain")}

    def __init__(self, parts: bool = False, part: int = 1):
        self.parts = parts
        self.objectives = {
            "forget": [question(f"What is {i}?", "It is " + "x" * (1 + i % 5) + ".") for i in range(8)],
            "retain": [question(f"Who is {i}?", "That is " + "y" * (1 + i % 7) + ".") for i in range(8)],
        }

    def score(self, model, tokenizer):
        return [
            {"set": name, "question": row.question, "answer": row.answer, "reply": "", "nll": nll}
            for name, rows in self.objectives.items()
            for row, nll in zip(rows, negative_log_likelihoods(model, tokenizer, rows), strict=True)
        ]

    prepare = score

    def stages(self):
        return [{"parts": False, "part": part} for part in (1, 2)] if self.parts else []

    @staticmethod
    def numbers(records, retrained=None):
        return Numbers(
            {name: fmean([r["nll"] for r in records if r["set"] == name]) for name in ("forget", "retain")}, {}
        )

    def follow(self, model, tokenizer):
        numbers = self.numbers(self.score(model, tokenizer)).numbers
        return {name: min(1.0, value / 10) for name, value in numbers.items()}
"""
Run = Callable[..., int]


@pytest.fixture
def place(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    shutil.copytree(base, "base")
    Path("rows.py").write_text(TASK)
    return tmp_path


SMALL = ["--steps", "4", "--batch-size", "4", "--ratio", "1:1", "--curve-points", "2", "--lr", "1e-2",
         "--forget-loss", "NPO", "--retain-loss", "KL", "--bf16", "false"]  # fmt: skip


def run(command: str, *arguments: str, model: str = "base") -> int:
    common = ["--model", model, "--task", "rows.py", "--score-bf16", "false"]
    return cli.main([command, *common, *(SMALL if command != "evaluate" else []), *arguments])


def entries(out: str) -> list[dict[str, Any]]:
    return json.loads((Path(out) / "results.json").read_text(encoding="utf-8"))["runs"]


def same(a: dict[str, float], b: dict[str, float], within: float = 1e-5) -> bool:
    return all(abs(a[name] - b[name]) < within for name in a)


def test_an_adapter_is_saved_by_itself_and_merged_and_both_are_scored(place: Path) -> None:
    assert run("unlearn", "--lora-rank", "2", "--lora-alpha", "6", "--lora-targets", "q_proj,up_proj", "--dora",
               "--lora-dropout", "0.1", "--out", "out") == 0  # fmt: skip
    (entry,) = entries("out")
    assert set(entry["merging"]) == {"unmerged", "merged", "merged_bf16"}
    assert same(entry["merging"]["unmerged"], entry["merging"]["merged"])
    assert entry["merging"]["merged"] == entry["after"]
    assert not same(entry["merging"]["merged_bf16"], entry["after"], 1e-7)
    page = (place / "out" / "report.html").read_text(encoding="utf-8")
    assert "merged, rounded to bf16" in page
    assert f"{entry['merging']['merged_bf16']['forget']:.6f}" in page
    said = json.loads((place / "out/adapter/adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["lora_dropout"], said["use_dora"]) == (2, 6, 0.1, True)
    assert set(said["target_modules"]) == {"q_proj", "up_proj"}
    assert said["base_model_name_or_path"] == str(place / "base")
    by_itself = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "out/adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained("out/model").eval()
    ids = torch.arange(40, 60)[None]
    torch.testing.assert_close(by_itself(ids).logits, merged(ids).logits, rtol=1e-5, atol=1e-5)
    for model in ("out/adapter", "out/model"):
        assert run("evaluate", "--scores", f"{Path(model).name}.json", model=model) == 0
        scored = json.loads(Path(f"{Path(model).name}.json").read_text())["after"]["numbers"]
        assert same(scored, entry["after"])


def test_every_model_that_is_made_of_one_with_a_processor_has_it(place: Path) -> None:
    for name in ("processor_config.json", "preprocessor_config.json"):
        Path("base", name).write_text(json.dumps({"of": name}))
    assert run("unlearn", "--lora-rank", "2", "--out", "out") == 0
    taught = memorised("base", [question("Who is it?", "It is Ann.")], epochs=1)
    made = ["out/adapter", "out/model", models.merged("out/adapter"), taught]
    for name in ("processor_config.json", "preprocessor_config.json"):
        assert [json.loads(Path(folder, name).read_text()) for folder in made] == [{"of": name}] * 4
    assert not any(Path(folder, "video_preprocessor_config.json").exists() for folder in made)


def test_an_adapter_is_trained_further_from_where_it_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("unlearn", "--lora-rank", "2", "--merge", "false", "--out", "first") == 0
    assert not (place / "first/model").exists()
    (first,) = entries("first")
    assert "merging" not in first
    assert run("unlearn", "--out", "second", model="first/adapter") == 0
    (second,) = entries("second")
    assert same(second["before"], first["after"])
    assert not same(second["after"], second["before"], 1e-3)
    said = json.loads((place / "second/adapter/adapter_config.json").read_text())
    assert (said["r"], said["base_model_name_or_path"]) == (2, str(place / "base"))
    # A new adapter begins with the given one merged; its base is that, and is kept.
    assert run("unlearn", "--lora-rank", "3", "--out", "third", model="first/adapter") == 0
    (third,) = entries("third")
    assert same(third["before"], first["after"])
    said = json.loads((place / "third/adapter/adapter_config.json").read_text())
    assert said["r"] == 3
    assert Path(said["base_model_name_or_path"]).parent == place / "cache" / "merged"
    assert run("evaluate", "--scores", "third.json", model="third/adapter") == 0
    assert same(json.loads(Path("third.json").read_text())["after"]["numbers"], third["after"])
    # What the run is made of is the adapter and its base.
    hashes = [models.hash_of("first/adapter")]
    for changed in ("first/adapter/adapter_model.safetensors", "base/model.safetensors"):
        content = bytearray(Path(changed).read_bytes())
        content[-1] ^= 1
        Path(changed).write_bytes(bytes(content))
        hashes.append(models.hash_of("first/adapter"))
    assert len(set(hashes)) == 3
    capsys.readouterr()
    assert run("unlearn", "--out", "second", "--resume", model="first/adapter") == 2
    assert "holds a run of another start model" in capsys.readouterr().err


def test_an_adapters_run_stops_at_its_best_and_goes_on_after_a_kill(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["--lora-rank", "2", "--save-every", "2", "--keep-at-least", "0.1", "--private", "true"]
    assert run("unlearn", "--out", "straight", *settings) == 0
    whole = UnlearnTrainer.compute_loss

    def breaking(self: UnlearnTrainer, *arguments: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise RuntimeError("the power is gone")
        return whole(self, *arguments, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(UnlearnTrainer, "compute_loss", breaking)
        with pytest.raises(RuntimeError, match="the power is gone"):
            run("unlearn", "--out", "stopped", *settings)
    assert (place / "stopped/checkpoints/checkpoint-2/adapter_model.safetensors").is_file()
    assert run("unlearn", "--out", "stopped", *settings, "--resume") == 0
    assert entries("stopped")[0]["after"] == entries("straight")[0]["after"]
    for file in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "model/model.safetensors"):
        one, other = (Path(out, file).read_bytes() for out in ("straight", "stopped"))
        assert one == other
    shutil.rmtree("stopped/adapter")
    assert run("unlearn", "--out", "stopped", *settings, "--resume") == 0
    assert (place / "stopped/adapter").is_dir(), "a run whose adapter is gone is not finished"


def test_one_adapter_serves_part_after_part_unless_it_is_merged(place: Path) -> None:
    settings = ["--lora-rank", "2", "--dora", "--merge", "false", "--task-args", "{parts: true}", "--out", "out"]
    assert run("unlearn", *settings) == 0
    first, second = entries("out")
    assert (first["config"]["lora_rank"], second["config"]["lora_rank"]) == (2, 0)
    assert Path(second["config"]["model"]).parts[-2:] == ("part1", "adapter")
    assert same(second["before"], first["after"])
    folders = [place / "out/dualoptim-plus-seed0" / part / "adapter" for part in ("part1", "part2")]
    assert len({(folder / "adapter_config.json").read_text() for folder in folders}) == 1
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert one.keys() == other.keys()
    assert 0 < max(float((one[name] - other[name]).abs().max()) for name in one) < 0.1


def test_methods_are_compared_from_one_adapter(place: Path) -> None:
    assert run("unlearn", "--lora-rank", "2", "--merge", "false", "--out", "first") == 0
    methods = ["--methods", "[DualOptim+, Alternating AdamW]", "--merge", "false"]
    assert run("compare", *methods, "--out", "both", model="first/adapter") == 0
    assert same(entries("both")[0]["before"], entries("both")[1]["before"], 1e-9)
    for folder in ("dualoptim-plus-seed0", "alternating-adamw-seed0"):
        assert (place / "both" / folder / "adapter/adapter_model.safetensors").is_file()
        assert not (place / "both" / folder / "model").exists()


def test_4_bits_by_the_command_line(bitsandbytes: Any, place: Path) -> None:
    assert run("unlearn", "--lora-rank", "2", "--load-in-4bit", "--merge", "--out", "out") == 0
    (entry,) = entries("out")
    assert set(entry["merging"]) == {"unmerged", "merged", "merged_bf16", "merged_nf4"}
    assert same(entry["merging"]["unmerged"], entry["merging"]["merged"])
    assert not same(entry["merging"]["merged"], entry["merging"]["merged_nf4"], 1e-4)
    assert run("evaluate", "--load-in-4bit", "--scores", "a.json", model="out/adapter") == 0
    assert run("evaluate", "--scores", "m.json", model="out/model") == 0
    for name in ("a", "m"):
        assert same(json.loads(Path(f"{name}.json").read_text())["after"]["numbers"], entry["after"])


class Layer(nn.Module):
    """Has a dtype to compute in of its own, as a layer in 4 bits."""

    compute_dtype = torch.float32


def test_layers_in_4_bits_compute_in_the_precision_of_what_is_done(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, torch.dtype]] = []
    load, loss, score = train.load_model, UnlearnTrainer.compute_loss, scoring.score

    def loaded(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        model.add_module("in_4_bits", Layer())
        return model

    def saw(what: str, model: Any) -> None:
        seen.extend((what, module.compute_dtype) for module in model.modules() if isinstance(module, Layer))

    def trained(self: UnlearnTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        saw("training", model)
        return loss(self, model, *args, **kwargs)

    def scored(model: Any, *args: Any, **kwargs: Any) -> Any:
        saw("scoring", model)
        return score(model, *args, **kwargs)

    monkeypatch.setattr(train, "load_model", loaded)
    monkeypatch.setattr(prepared, "load_model", loaded)
    monkeypatch.setattr(UnlearnTrainer, "compute_loss", trained)
    monkeypatch.setattr(scoring, "score", scored)
    own = ["--bf16", "true", "--merge", "false", "--save-model", "false", "--out", "out"]  # scores are in fp32
    assert run("unlearn", "--lora-rank", "2", *own) == 0
    training, scored_so = ("training", torch.bfloat16), ("scoring", torch.float32)
    assert set(seen) == {training, scored_so}, "also where the curve is measured, between two steps"
    assert (seen[0], seen[-1]) == (scored_so, scored_so)
    assert seen.count(training) == 4


BARE = ["--lora-rank", "2"]
REFUSED = {
    "rank": (["--lora-rank", "-1"], "lora_rank must be at least 0, but is -1"),
    "alpha": ([*BARE, "--lora-alpha", "0"], "lora_alpha must be a number > 0, but is 0"),
    "no alpha": ([*BARE, "--lora-alpha", ".nan"], "lora_alpha must have finite numbers, but has nan"),
    "dropout": ([*BARE, "--lora-dropout", "1"], "lora_dropout must be from 0 to below 1"),
    "name": ([*BARE, "--lora-targets", "q_prj"], "unknown module of lora_targets 'q_prj'; did you mean 'q_proj'?"),
    "one of names": ([*BARE, "--lora-targets", "[q_proj, v_prj]"], "'v_prj'; did you mean 'v_proj'?"),
    "expression": ([*BARE, "--lora-targets", r"layers\.0\..*proj"], "matches the whole name of none of the model's"),
    "no expression": ([*BARE, "--lora-targets", "(q"], "is no regular expression"),
    "nothing": ([*BARE, "--lora-targets", "[]"], "lora_targets: names no module"),
    "norm": ([*BARE, "--lora-targets", "input_layernorm"], "lora_targets 'input_layernorm': Target module"),
    "train": ([*BARE, "--train", "mlp"], "train: with lora_rank the adapter alone is trained"),
    "alpha alone": (["--lora-alpha", "4"], "lora_alpha says how a new adapter is made; add --lora-rank"),
    "dora alone": (["--dora"], "dora says how a new adapter is made; add --lora-rank"),
    "merge alone": (["--merge"], "merge: there is no adapter to merge; add --lora-rank"),
    "far too much": (["--lora-rank", "999"], "lora_rank 999: the model's matrices have ranks up to 16; give less"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_told_before_anything_is_done(
    case: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, said = REFUSED[case]
    assert run("unlearn", "--out", "out", *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not (place / "out").exists()


def test_adapters_that_do_not_fit_are_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--lora-rank", "2", "--lora-targets", "q_proj", "--merge", "false"]
    assert run("unlearn", *settings, "--out", "first") == 0
    config = place / "first/adapter/adapter_config.json"
    said = json.loads(config.read_text())
    bigger = tiny.model().config
    bigger.num_hidden_layers = 3
    type(tiny.model())(bigger).save_pretrained(place / "bigger")
    tiny.tokenizer().save_pretrained(place / "bigger")
    cases: list[tuple[dict[str, Any], list[str], str]] = [
        ({"base_model_name_or_path": "./gone"}, [], "is an adapter of './gone'"),
        ({"base_model_name_or_path": None}, [], "does not say which kind of adapter it is"),
        ({"base_model_name_or_path": "first/adapter"}, [], "is an adapter of another adapter"),
        ({"base_model_name_or_path": "bigger"}, [], "weights are not those of an adapter of bigger: it lacks 2 "),
        ({"peft_type": "ADALORA"}, [], "adapters of kind ADALORA are not supported"),
        ({"task_type": "SEQ_CLS"}, [], "is an adapter for SEQ_CLS"),
        ({}, ["--train", "mlp"], "train: of a model that is an adapter the adapter alone is trained"),
        ({}, ["--dora"], "dora says how a new adapter is made"),
    ]
    capsys.readouterr()
    for change, arguments, expected in cases:
        config.write_text(json.dumps({**said, **change}))
        assert run("unlearn", "--out", "out", *arguments, model="first/adapter") == 2, change
        assert expected in capsys.readouterr().err, change
        assert not (place / "out").exists()
    prompt = peft.get_peft_model(models.load_model("base"), KINDS["PROMPT_TUNING"]())
    prompt.save_pretrained("prompt")
    assert run("unlearn", "--out", "out", model="prompt") == 2
    assert "is an adapter of kind PROMPT_TUNING, which is saved without what trains it" in capsys.readouterr().err
    assert run("evaluate", model="prompt") == 0, "but it is scored"


def test_an_adapter_of_a_bases_revision_is_refused_until_that_is_in_a_folder(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.model(seed=7)
    base.save_pretrained(place / "at_v1")
    tiny.tokenizer().save_pretrained(place / "at_v1")
    made = moved(peft.get_peft_model(base, KINDS["LORA"](), revision="v1"))
    ids = torch.arange(40, 60)[None]
    for name in ("org/base", "at_v1"):
        made.peft_config["default"].base_model_name_or_path = name
        adapters.save(made, place / "start")
        assert json.loads((place / "start/adapter_config.json").read_text())["revision"] == "v1"
        if name == "org/base":
            with pytest.raises(UserError, match=r"of org/base at revision 'v1', .* put FOLDER into its"):
                models.load_model("start")
            for command in ("unlearn", "evaluate"):
                assert run(command, model="start") == 2
                assert "hf download org/base --revision v1 --local-dir FOLDER" in capsys.readouterr().err
    torch.testing.assert_close(models.load_model("start").eval()(ids).logits, made(ids).logits)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:.*LoRA tensor.*have invalid shape")
@pytest.mark.parametrize(
    ("of", "why"),
    [
        ({"lora_bias": True}, "the base layer has no bias"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layers.1.self_attn.q_proj are another layer's, too"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_told_before_it_is_trained(
    of: dict[str, Any], why: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = peft.get_peft_model(models.load_model("base"), peft.LoraConfig(r=2, target_modules=QV, **of, **CAUSAL))
    moved(made).save_pretrained("start")
    for arguments, how in (([], "give --merge false"), (["--lora-rank", "2"], "leave out --lora-rank")):
        assert run("unlearn", *arguments, "--dry-run", "--out", "out", model="start") == 2
        said = capsys.readouterr().err
        assert why in said
        assert how in said
    assert run("unlearn", "--merge", "false", "--out", "out", model="start") == 0
    ids = torch.arange(40, 60)[None]
    assert (models.load_model("out/adapter")(ids).logits - models.load_model("start")(ids).logits).abs().max() > 1e-3


def test_an_adapter_that_makes_a_model_look_ahead_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = peft.LoraConfig(r=2, target_modules=QV, alora_invocation_tokens=[2], **CAUSAL)
    made = peft.get_peft_model(models.load_model("base"), lora)
    made.save_pretrained("start")
    assert run("unlearn", "--dry-run", model="start") == 2
    assert "take a LoRA without alora_invocation_tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="take a LoRA without alora_invocation_tokens"):
        adapters.check_model(made)


def test_a_start_that_is_computed_from_the_bases_weights_is_an_adapter_as_others(place: Path) -> None:
    pissa = peft.LoraConfig(r=2, target_modules=QV, init_lora_weights="pissa", **CAUSAL)
    made = moved(peft.get_peft_model(models.load_model("base"), pissa))
    made.save_pretrained("start")
    ids = torch.arange(40, 60)[None]
    torch.testing.assert_close(models.load_model("start").eval()(ids).logits, made(ids).logits, rtol=1e-5, atol=1e-5)
    for arguments in ([], ["--lora-rank", "2"]):
        assert run("unlearn", *arguments, "--dry-run", model="start") == 0


@pytest.mark.parametrize("fails", ["merging", "scoring", "rounding", "the adapter's file"])
def test_what_fails_after_training_leaves_the_numbers(
    fails: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["--lora-rank", "2", "--attacks", "bits8", "--out", "out"]
    merge = adapters.merged

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    def failing(model: Any) -> Any:
        whole = merge(model)
        if not next(whole.parameters()).is_meta:
            if fails == "merging":
                fail()
            monkeypatch.setattr(whole, "forward", fail)
        return whole

    how = {"the adapter's file": ("save", fail), "rounding": ("rounded", fail)}
    monkeypatch.setattr(adapters, *how.get(fails, ("merged", failing)))
    assert run("unlearn", *settings) == 2
    said = capsys.readouterr().err
    assert "(out of memory); the numbers" in said
    (entry,) = entries("out")
    assert entry["after"]["forget"] > 0
    assert "merging" not in entry
    assert entry["after"]["bits8_probability"] is None
    assert entry["not_computed"]["bits8_probability"] == "the adapter could not be merged, or not written"
    assert (place / "out/report.html").exists()
    assert (place / "out/records.jsonl").exists()
    assert not list((place / "out").glob("*.partial"))


@pytest.mark.parametrize("kind", ["LORA", "LORA, a head", "LN_TUNING", "TRAINABLE_TOKENS"])
def test_where_an_adapter_trains_weights_in_bf16_what_rounds_to_the_nearest_is_refused(kind: str, place: Path) -> None:
    adapters.save(peft.get_peft_model(models.load_model("base"), KINDS[kind]()), place / "start")
    loaded = models.load_model("start", dtype=torch.bfloat16)
    in_bf16 = any(p.dtype == torch.bfloat16 for p in loaded.parameters() if p.requires_grad)
    assert in_bf16 == (kind in ("LORA, a head", "LN_TUNING"))
    config = RunConfig(model="start", bf16_weights=True)
    for optimizer, settings in (("AdamW", {}), ("DualOptim+", {"sam_rho": 0.1}), ("DualOptim+", {})):
        refused = in_bf16 and (optimizer == "AdamW" or settings)
        with pytest.raises(UserError, match="lost") if refused else nullcontext():
            resolve.check_alone(config.replace(optimizer=optimizer, **settings))


def test_packages_that_are_missing_are_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    missing: set[str] = {"peft"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in missing else find_spec(name, *a))
    config = RunConfig(model=str(base), lora_rank=2)
    with pytest.raises(UserError, match=r"needs the package peft; .* pip install 'dualoptim\[lora\]'"):
        adapters.check_settings(config, training=True)
    missing.clear()
    missing.add("bitsandbytes")
    with pytest.raises(UserError, match=r"need the package bitsandbytes; .* pip install 'dualoptim\[qlora\]'"):
        adapters.check_settings(config.replace(load_in_4bit=True), training=True)


def test_4_bits_without_an_adapter_or_a_device_for_them_are_refused(
    bitsandbytes: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(model=str(base), load_in_4bit=True)
    with pytest.raises(UserError, match="an adapter on them is what is trained; add --lora-rank"):
        adapters.check_settings(config, training=True)
    adapters.check_settings(config, training=False)  # which scores a model as it would be deployed

    def no_kernel(*arguments: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", no_kernel)
    with pytest.raises(UserError, match=r"bitsandbytes cannot work on cpu \(no kernel\); leave it out"):
        adapters.check_settings(config.replace(lora_rank=2), training=True)


@pytest.mark.parametrize("optimizer", ["DualOptim+", "AdamW"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_memory_that_is_told_is_that_of_the_adapter(place: Path, optimizer: str, dora: bool) -> None:
    config = RunConfig(
        model="base", task="rows.py", optimizer=optimizer, retain_loss="KL", lora_rank=3, dora=dora, keep_at_least=0.5
    )
    (found,) = resolved.resolve([config])
    model = adapters.added(models.load_model("base"), config, "base")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.needed["model"] == 4 * (sum(p.numel() for p in model.parameters()) - trained)
    assert {found.needed[name] for name in ("adapter", "gradients", "reference", "best point")} == {4 * trained}
    moments = {"DualOptim+": 6, "AdamW": 2}[optimizer]
    assert found.needed["optimizer state"] == pytest.approx(moments * 4 * trained, rel=0.05)
    assert not found.needs_second_model


def test_the_weights_that_scoring_casts_are_counted_where_training_needs_no_more(place: Path) -> None:
    config = RunConfig(model="base", task="rows.py", retain_loss="KL", lora_rank=3, score_bf16=True)
    (found,) = resolved.resolve([config])
    model = adapters.added(models.load_model("base"), config, "base")
    matrices = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)}
    assert found.needed["weights cast in scoring"] == 2 * sum(matrices.values()) - found.needed["gradients"]
    for other in (
        config.replace(score_bf16=False),
        config.replace(score_bf16=None, bf16_weights=True),
        config.replace(lora_rank=0),
    ):
        assert "weights cast in scoring" not in resolved.resolve([other])[0].needed


def test_a_share_that_merging_or_rounding_changes_is_said() -> None:
    metrics = {"kept": {"label": "kept", "better": "higher", "format": ".0%"},
               "left": {"label": "left", "better": "lower", "format": ".0%"}}  # fmt: skip
    merging = {"unmerged": {"kept": 0.9, "left": 0.05}, "merged": {"kept": 0.9, "left": 0.06},
               "merged_bf16": {"kept": 0.88, "left": 0.4}}  # fmt: skip
    results = {"metrics": metrics, "counts": {"kept": 100, "left": 100},
               "runs": [{"method": "DualOptim+", "seed": 0, "merging": merging}]}  # fmt: skip
    assert report.brought_back(results) == ["DualOptim+: merged, rounded to bf16, left is 40%, not 5%."]
    ((name, table),) = report.merging(results)
    assert name == "DualOptim+"
    assert table[2] == ["left ↓", "5%", "6%", "40%"]


def test_a_fingerprint_tells_adapters_of_other_scale_or_switched_off_apart() -> None:
    def adapted(alpha: int) -> Any:
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny.model(), lora).eval()

    model = adapted(4)
    one = fingerprint(model)
    assert fingerprint(adapted(4)) == one
    assert fingerprint(adapted(64)) != one
    with model.disable_adapter():
        assert fingerprint(model) != one
    model.peft_config["default"].base_model_name_or_path = "elsewhere"
    assert fingerprint(model) == one
