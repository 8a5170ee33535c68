"""The memory that `dualoptim plan` foresees, beside the peak of a process that takes the steps.

    python benchmarks/memory.py

Each setting is a process of its own, or two ranks, that makes a Llama and an `UnlearnTrainer` and takes four steps of
it. On the CPU the Llama is small, and the peak is the largest resident set since it was made, less the one before
(Linux). On a GPU, where there is one, it has 540 M parameters, and the peak is that of the memory allocated. What was
measured is kept in runs/memory_cpu.json or memory_cuda.json, and not measured again. Writes benchmarks/memory.md, or on
a GPU memory_gpu.md.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainingArguments

from dualoptim import DualOptimPlus, UnlearnTrainer, plan
from dualoptim.data import Row
from dualoptim.losses import LOSSES
from dualoptim.schedule import by_turns
from dualoptim.trainer import Objective

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEPT = Path(f"runs/memory_{DEVICE}.json")
ROWS, TOKENS, LABELLED = 8, 384, 96
SETTINGS: dict[str, tuple[plan.Setting, int]] = {
    "fp32, 32-bit states": (plan.Setting("", bf16=False), 1),
    "fp32, 8-bit states": (plan.Setting("", bits=8, bf16=False), 1),
    "bf16 autocast, 8-bit states": (plan.Setting("", bits=8), 1),
    "activations recomputed, 8-bit states": (plan.Setting("", bits=8, checkpointing=True, bf16=False), 1),
    "bf16 weights, 8-bit states": (plan.Setting("", "bfloat16", 8, True), 1),
    "bf16 weights, 8-bit states, gradients released": (plan.Setting("", "bfloat16", 8, True, True), 1),
    "LoRA 16 on bf16 weights": (plan.Setting("", "bfloat16", 32, True, lora_rank=16), 1),
    "DDP, fp32, 8-bit states": (plan.Setting("", bits=8, bf16=False), 2),
}
if DEVICE == "cuda":
    del SETTINGS["DDP, fp32, 8-bit states"]  # each of its ranks wants a GPU


def config() -> LlamaConfig:
    """68 M parameters, or 540 M on a GPU, most of them in layers."""
    wide, layers, words = (1536, 16, 32_000) if DEVICE == "cuda" else (768, 8, 8000)
    return LlamaConfig(
        hidden_size=wide, intermediate_size=3 * wide, num_hidden_layers=layers, num_attention_heads=12,
        num_key_value_heads=4, vocab_size=words, tie_word_embeddings=False, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def row(tokenizer: PreTrainedTokenizerFast, i: int) -> Row:
    """A row of TOKENS tokens, every other one of fewer, LABELLED of them learned: a token is a letter."""
    nothing = [{"role": "user", "content": ""}]
    around = len(tokenizer.apply_chat_template(nothing, add_generation_prompt=True)["input_ids"])
    answer = chr(97 + i) * (LABELLED - 1)  # and what ends it
    asked = "?" * (TOKENS - around - LABELLED - 16 * (i % 2))
    return Row(({"role": "user", "content": asked},), answer, f"row {i}")


def resident(what: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS now, or VmHWM at most."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) * 1024


def train(described: LlamaConfig, setting: plan.Setting) -> None:
    """Four steps of a new model."""
    tokenizer = tiny.tokenizer()
    torch.set_default_dtype(torch.bfloat16 if setting.weights == "bfloat16" else torch.float32)
    model: Any = LlamaForCausalLM(described)
    torch.set_default_dtype(torch.float32)
    if setting.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    if setting.lora_rank:
        from peft import LoraConfig, get_peft_model

        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=setting.lora_rank, target_modules="all-linear"))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rows = [row(tokenizer, i) for i in range(ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = UnlearnTrainer(
            model,
            TrainingArguments(
                folder, max_grad_norm=0.0 if setting.released else 1.0,
                bf16=setting.weights == "float32" and setting.bf16, use_cpu=DEVICE == "cpu", report_to="none",
                save_strategy="no", disable_tqdm=True, per_device_train_batch_size=ROWS // ranks,
            ),
            objectives={"forget": Objective(rows, LOSSES["GA"]()), "retain": Objective(rows, LOSSES["GD"]())},
            turns=by_turns({"forget": 1, "retain": 1}, ROWS, 4),
            processing_class=tokenizer,
            diagnostics_every=0,
            release_gradients=setting.released,
            optimizer_cls_and_kwargs=(DualOptimPlus, {"base_bits": setting.bits, "delta_bits": setting.bits}),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def measured(setting: plan.Setting) -> int:
    """Bytes that the steps took at most, in this process, beside what comes with the first of everything."""
    train(
        LlamaConfig(**{**config().to_dict(), "hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 2}),
        setting,
    )
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(config(), setting)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = resident("VmRSS")
    train(config(), setting)
    return resident("VmHWM") - before


def foreseen(setting: plan.Setting, devices: int) -> plan.Need:
    """What the plan says of the same step."""
    return plan.needed(config(), setting, plan.Step(ROWS // devices, TOKENS, LABELLED), devices)


def run(name: str) -> list[int]:
    """Peaks of the ranks of a setting, in processes of their own."""
    _, devices = SETTINGS[name]
    own = [sys.executable] if devices == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                 f"--nproc-per-node={devices}"]  # fmt: skip
    threads = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    # Else what is freed may stay with the process, and what is asked for next may lie elsewhere.
    threads |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    out = subprocess.run([*own, __file__, "--one", name], env={**os.environ, **threads}, capture_output=True, text=True)
    found = [int(line.split()[1]) for line in out.stdout.splitlines() if line.startswith("PEAK")]
    if len(found) != devices:
        raise SystemExit(f"{name}: {out.stderr[-2000:]}")
    return found


def main() -> None:
    """Measure every setting and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", choices=SETTINGS)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    given = parser.parse_args()
    if given.one:
        print("PEAK", measured(SETTINGS[given.one][0]), flush=True)
        return
    peaks: dict[str, int] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    KEPT.parent.mkdir(exist_ok=True)
    missing = [name for name in given.settings if name not in peaks]
    with ThreadPoolExecutor(len(SETTINGS) if DEVICE == "cuda" else 1) as at_once:  # there each counts its own memory
        for name, ranks in zip(missing, at_once.map(run, missing), strict=True):
            peaks[name] = max(ranks)
            KEPT.write_text(json.dumps(peaks, indent=1))
    lines = []
    for name in [name for name in SETTINGS if name in peaks]:
        need, peak = foreseen(*SETTINGS[name]), peaks[name]
        parts = [need.weights, need.gradients + need.buckets, need.states, need.activations, need.total, peak]
        mib = " | ".join(f"{value / 2**20:.0f}" for value in parts)
        lines.append(f"| {name} | {SETTINGS[name][1]} | {mib} | {100 * (need.total / peak - 1):+.1f} % |")
        print(lines[-1], flush=True)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine()
    worst = max(abs(float(line.split("|")[-2].split()[0])) for line in lines)
    page = f"""# What a step was foreseen to need, and what it took

{datetime.date.today()}, torch {torch.__version__}, {device}. Made by

    python benchmarks/memory.py

A Llama of {sum(p.numel() for p in LlamaForCausalLM(config()).parameters()) / 1e6:.0f} M parameters, DualOptim+ with two
objectives, {ROWS} rows of {TOKENS} tokens in a step, {LABELLED} of them learned. MiB of each process; the last column
is what was foreseen over what was measured.

| setting | processes | weights | gradients | states | activations | foreseen | measured | off by |
|---|--:|--:|--:|--:|--:|--:|--:|--:|
{chr(10).join(lines)}

Target: within 10 %: {"met" if worst <= 10 else "missed"}, {worst:.1f} % at most.
"""
    name = "memory_gpu.md" if DEVICE == "cuda" else "memory.md"
    Path(__file__).with_name(name).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
