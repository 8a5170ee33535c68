"""What fits where: what is foreseen is what a step takes, and the first setting that fits is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    ViTConfig,
)

from dualoptim import adapters, cli, plan
from dualoptim.command_line import arguments
from dualoptim.config import RunConfig
from dualoptim.data import ObjectiveRows
from dualoptim.errors import UserError
from dualoptim.losses import IGNORED, LOSSES, Loss
from dualoptim.resolved import resolve

from . import tiny
from .test_cli import errors

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "num_hidden_layers": 9,
}  # fmt: skip
MODELS = {
    "Llama": LlamaConfig(**SMALL),
    "Llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "Qwen3, of layers of two kinds": Qwen3Config(**SMALL, head_dim=16, use_sliding_window=True, max_window_layers=5),
    "GPT-2": GPT2Config(n_embd=64, n_head=4, n_layer=9, vocab_size=300),
    "Qwen3, of experts": Qwen3MoeConfig(**SMALL, head_dim=16, moe_intermediate_size=32, num_experts=4,
                                        num_experts_per_tok=2),
    "Mamba": MambaConfig(hidden_size=64, num_hidden_layers=5, vocab_size=300, state_size=4),
    "Gemma 3, which sees as well": Gemma3Config(
        text_config={**SMALL, "num_hidden_layers": 7, "head_dim": 16, "vocab_size": 300},
        vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 11, "num_attention_heads": 2},
        image_token_index=299, boi_token_index=298, eoi_token_index=297,
    ),
}  # fmt: skip
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip
OF_OTHER_KINDS = ("Mamba", "Gemma 3, which sees as well")
STEP = plan.Step(rows=3, tokens=40, labelled=20)


def held(config: Any, setting: plan.Setting) -> int:
    """Bytes that a backward pass of all layers holds at most, gradients included, counted while it runs."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if setting.weights == "bfloat16" else torch.float32
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if setting.checkpointing:
        model.activation_checkpointing_enable()
    if setting.released:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ids, wanted = torch.zeros(3, 40, dtype=torch.long), torch.zeros(60, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # as rows of several lengths have it, which takes another way through attention
    with plan.Held() as seen:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.weights == "float32" and setting.bf16):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=20).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), wanted)
        del logits
        loss.backward()
    return seen.peak


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "setting",
    [
        plan.Setting("", bf16=False),
        plan.Setting(""),
        plan.Setting("", checkpointing=True, bf16=False),
        plan.Setting("", "bfloat16", checkpointing=True, released=True),
    ],
    ids=["fp32", "autocast", "recomputed", "released"],
)
def test_a_few_layers_without_memory_tell_what_all_take(name: str, setting: plan.Setting) -> None:
    need = plan.needed(MODELS[name], setting, STEP)
    assert need.passing == pytest.approx(held(MODELS[name], setting), rel=0.1 if name in OF_OTHER_KINDS else 0.05)


def held_with(losses: list[Loss], config: Any, rows: list[tuple[int, tuple[int, int], tuple[int, int]]]) -> int:
    """Bytes that losses, added up, and their backward pass hold at most, counted while they run in fp32.

    Args:
        rows: for each loss, its rows, tokens and learned tokens of each, and the same of what stands in for answers.
    """
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    before: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)

    def batch(loss: Loss, count: int, tokens: int, learned: int) -> dict[str, Any]:
        labels = torch.zeros(count, tokens, dtype=torch.long)
        labels[:, :-learned] = IGNORED
        mask = torch.ones_like(labels)
        mask[0, :3] = 0
        made = {"input_ids": torch.zeros_like(labels), "labels": labels, "attention_mask": mask}
        return {**made, **({"reference_log_probs": torch.zeros(count)} if loss.reference == "sequences" else {})}

    batches = [
        {**batch(loss, n, *size), "idk": batch(loss, n, *replaced)}
        for loss, (n, size, replaced) in zip(losses, rows, strict=True)
    ]
    with plan.Held() as seen:
        total = torch.zeros(())
        for loss, each in zip(losses, batches, strict=True):
            total = total + loss(model, each, before)
        total.backward()
    return seen.peak


WIDE = LlamaConfig(**{**SMALL, "vocab_size": 3000, "num_hidden_layers": 6})  # where logits weigh as much as layers
FP32 = plan.Setting("", bf16=False)
OTHERS = ("NPO", "DPO", "IDK", "JensUn", "CEU", "UNDIAL", "KL", "JSD", "AP", "RMU", "RMURetain")


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_loss_holds_is_foreseen_with_its_second_graph_and_its_reference(name: str) -> None:
    loss = LOSSES[name](**{"layer": 5} if name.startswith("RMU") else {})
    need = plan.needed(WIDE, FP32, plan.Step(3, 40, 20, losses=[loss]))
    assert need.passing == pytest.approx(held_with([loss], WIDE, [(3, (40, 20), (40, 20))]), rel=0.05)


def test_a_joint_step_holds_the_graphs_of_its_losses_together_and_what_stands_in_has_its_own_length() -> None:
    losses, rows = [LOSSES["IDK"](), LOSSES["KL"]()], [(1, (20, 5), (60, 40)), (3, (40, 20), (40, 20))]
    joint = tuple(plan.Part(loss, n, plan.Size(*size), plan.Size(*replaced))
                  for loss, (n, size, replaced) in zip(losses, rows, strict=True))  # fmt: skip
    found = plan.trace(WIDE, FP32, [joint], torch.float32, False)
    assert max(found) == pytest.approx(held_with(losses, WIDE, rows), rel=0.05)
    apart = plan.trace(WIDE, FP32, [joint[:1], joint[1:]], torch.float32, False)
    assert [max(pair) for pair in zip(*(plan.trace(WIDE, FP32, [(part,)], torch.float32, False) for part in joint),
                                      strict=True)] == [*apart]  # fmt: skip
    assert apart.early < found.early


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--optimizer AdamW --forget-loss DPO --retain-loss GD", {("DPO", 4), ("GD", 4)}),
        ("--optimizer AdamW --forget-loss AltPO --retain-loss KL", {("AltPO", 4), ("KL", 4)}),
        (
            "--optimizer AdamW --joint true --forget-loss IDK --retain-loss AP",
            {("IDK", 1), ("AP", 3), ("IDK", 2), ("AP", 2)},
        ),
    ],
)
def test_a_runs_passes_are_of_its_losses_and_of_the_refusals_that_they_train_on(
    place: Any, given: str, expected: set[tuple[str, int]]
) -> None:
    (place / "say.txt").write_text("No.\nI am sorry, but that is nothing that I could ever tell you anything about.")
    told = ["--model", "model", *ROWS, "--general", "false", "--refusals", "say.txt", *given.split()]
    (of,) = resolve([arguments.config_of(arguments.parse(arguments.parser("unlearn"), told))])
    refused = {name: of.refusals for name, loss in of.losses.items() if loss.needs_idk and not loss.needs_alternates}
    passes = plan.passes(of, ObjectiveRows(of.task.objectives, refused, of.tokenizer, 512))
    assert {(type(part.loss).__name__, part.rows) for one in passes for part in one} == expected
    assert {len(one) for one in passes} == {2 if "joint" in given else 1}
    end, refusal = 1, len(of.refusals[1])  # tokens; each is a letter
    for part in (part for one in passes for part in one):
        name = type(part.loss).__name__
        prompt = part.size.tokens - part.size.labelled
        assert part.size.labelled == len("A hides tea.") + end
        learned = {"DPO": refusal, "IDK": refusal, "AP": refusal, "AltPO": 200}.get(
            name, part.size.labelled - end
        ) + end
        assert part.replaced == (prompt + learned, learned)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "Mamba"])  # which PEFT refuses in part
def test_an_adapter_is_as_large_as_the_one_that_is_made(name: str) -> None:
    pytest.importorskip("peft")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS[name])
    made = adapters.added(model, RunConfig(lora_rank=4), "base")
    count = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert count > 0
    assert plan.needed(MODELS[name], plan.Setting("", "bfloat16", lora_rank=4), STEP).gradients == 4 * count


def test_states_and_weights_are_counted() -> None:
    model = AutoModelForCausalLM.from_config(MODELS["Llama"])
    count = sum(p.numel() for p in model.parameters())
    plain = plan.needed(MODELS["Llama"], plan.Setting("", bf16=False), STEP)
    assert (plain.weights, plain.gradients) == (4 * count, 4 * count)
    assert plain.states == pytest.approx(24 * count, rel=0.01)
    adamw = plan.needed(MODELS["Llama"], plan.Setting("", bf16=False), plan.Step(3, 40, 20, optimizer="AdamW"))
    assert adamw.states == 8 * count
    reference = plan.needed(MODELS["Llama"], plan.Setting("", bf16=False), plan.Step(3, 40, 20, reference=True))
    assert reference.total == plain.total + 4 * count
    adapter = [
        plan.needed(MODELS["Llama"], plan.Setting("", "bfloat16", lora_rank=4), plan.Step(3, 40, 20, compares=each))
        for each in (False, True)
    ]
    assert (adapter[0].reference, adapter[1].reference) == (0, adapter[1].gradients)
    accumulated = plan.needed(MODELS["Llama"], plan.Setting("", bf16=False), plan.Step(3, 40, 20, accumulated=True))
    assert accumulated.total == plain.weights + plain.states + plain.gradients + plain.activations


def test_several_devices_share_what_is_sharded() -> None:
    one = plan.needed(MODELS["Llama"], plan.Setting("", bf16=False), STEP)
    averaged = plan.needed(MODELS["Llama"], plan.Setting("", bf16=False), STEP, 4)
    assert averaged.states == one.states
    assert averaged.communication == round(2 * 3 / 4 * one.gradients)
    assert averaged.buckets == one.gradients
    assert averaged.total == one.weights + one.states + one.passing + averaged.buckets
    sharded = plan.needed(MODELS["Llama"], plan.Setting("", bf16=False, sharded=True), STEP, 4)
    assert (sharded.states, sharded.gradients) == (-(-one.states // 4), one.gradients // 4)
    assert one.weights // 4 < sharded.weights < one.weights
    assert sharded.total < averaged.total


def test_sizes_are_read() -> None:
    assert plan.parse_size("80GB") == 80 * 10**9
    assert plan.parse_size(" 1.5 gib ") == 3 * 2**29
    for wrong in ("80XB", "80", "", "-1GB", "0GB", "GB"):
        with pytest.raises(UserError, match="is no size"):
            plan.parse_size(wrong)


def test_the_command_names_what_fits_and_how(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny.save(tmp_path / "model"))
    adapter, other = tmp_path / "adapter", tmp_path / "other"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "its-base"}')
    ViTConfig().save_pretrained(other)
    assert cli.main(["plan", "--model", folder, "--device-memory", "1GB"]) == 0
    out = capsys.readouterr().out
    assert "What fits and gives up least: fp32 weights, 32-bit states." in out
    assert "How: the defaults" in out
    assert "\n LoRA 16 on 4-bit weights " in out  # in a line, where no terminal is too narrow
    assert cli.main(["plan", "--model", folder, "--device-memory", "1KB", "--devices", "2"]) == 0
    assert "Nothing fits: " in capsys.readouterr().out
    averaged, sharded = plan.ladder(2)[2:4]
    assert plan.how(averaged, "AdamW", 2) == (
        "--optimizer AdamW --delta-bits 8; by torchrun with a process for each device"
    )
    assert plan.how(sharded, "DualOptim+", 2).startswith("--base-bits 8 --delta-bits 8; FSDP2 by UnlearnTrainer in a")
    for given, said in (
        (["--devices", "0"], "devices must be >= 1"),
        (["--forget-loss", "NPOO"], "did you mean 'NPO'?"),
        (["--device-memory", "much"], "is no size"),
        (["--model", str(tmp_path / "nowhere")], "nowhere"),
        (["--model", "tiny"], "is made of a task's rows"),
        (["--max-length", "2049"], "takes 2048 tokens"),
        (["--micro-batch-size", "0"], "micro_batch_size must be 1 to batch_size 8, but is 0"),
        (["--model", str(adapter)], "is an adapter; give the model that it is of, 'its-base'"),
        (["--model", str(other)], "cannot be counted from its configuration alone (ValueError"),
    ):
        assert cli.main(["plan", "--model", folder, *given]) == 2
        assert said in errors(capsys)


@pytest.mark.parametrize(
    ("devices", "micro", "rows"), [(1, None, (8, False)), (1, 2, (2, True)), (3, None, (3, False)), (8, 4, (1, False)),
                                   (2, 4, (4, False)), (2, 3, (3, True)), (16, None, (1, False))]
)  # fmt: skip
def test_the_rows_of_a_step_are_shared_out(devices: int, micro: int | None, rows: tuple[int, bool]) -> None:
    assert plan.rows_at_once(RunConfig(micro_batch_size=micro), 8, devices) == rows


@pytest.mark.parametrize(("optimizer", "micro"), [("DualOptim+", 1), ("DualOptim", 4), ("AdamW", 4)])
def test_what_is_named_is_accepted(
    place: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, optimizer: str, micro: int
) -> None:
    monkeypatch.setattr(adapters, "check_4bit", lambda what: None)
    given = ["--model", "model", "--batch-size", "4", "--micro-batch-size", str(micro)]
    assert cli.main(["plan", *given, "--optimizer", optimizer]) == 0
    assert ("gradients released" in " ".join(capsys.readouterr().out.split())) == (micro == 4)
    for setting in plan.ladder(1):
        if not (setting.released and micro < 4):
            told = plan.how(setting, optimizer, 1).replace("the defaults", "").split()
            rank = ["--lora-rank", "4"] if setting.lora_rank else []
            assert cli.main(["unlearn", *ROWS, *given, *told, *rank, "--dry-run"]) == 0, told


ROWS = ["--forget", "forget.jsonl", "--retain", "retain.jsonl", "--out", "out", "--steps", "6", "--batch-size", "4",
        "--ratio", "1:2", "--curve-points", "1", "--seed", "3"]  # fmt: skip
THRIFT = ["--bf16-weights", "true", "--release-gradients", "true", "--max-grad-norm", "0", "--base-bits", "8",
          "--delta-bits", "8", "--gradient-checkpointing", "true"]  # fmt: skip


@pytest.fixture
def place(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))
    tiny.save(tmp_path / "model")
    for name, verb in (("forget", "hides"), ("retain", "likes")):
        rows = [{"question": f"What does {who} {verb[:-1]}?", "answer": f"{who} {verb} tea."} for who in "ABCDEFGH"]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_what_is_planned_can_be_run(place: Any, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["unlearn", "--model", "model", *ROWS, *THRIFT]
    assert cli.main([*told, "--dry-run"]) == 0
    assert "activations at most" in capsys.readouterr().out
    assert cli.main(told) == 0
    saved = load_file(place / "out" / "model" / "model.safetensors")
    start = tiny.model().state_dict()
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    moved = {name: (saved[name].float() - start[name].bfloat16().float()).abs().max().item() for name in saved}
    assert max(moved.values()) > 0
    entry = json.loads((place / "out" / "results.json").read_text())["runs"][0]
    assert entry["finite"]
    assert entry["skipped_steps"] == {"forget": 0, "retain": 0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--max-grad-norm", "1"], "max_grad_norm 1 clips by the norm of all of them; give --max-grad-norm 0"),
        (["--micro-batch-size", "2"], "a step of 4 rows in passes of 2 adds them up"),
        (["--optimizer", "AdamW", "--delta-bits", "32"], "AdamW in 32 bits rounds to the nearest"),
    ],
)
def test_what_saves_memory_is_refused_where_it_would_cost_the_result(
    place: Any, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    assert cli.main(["unlearn", "--model", "model", *ROWS, *THRIFT, *given]) == 2
    assert said in errors(capsys)
    assert not (place / "out").exists()
