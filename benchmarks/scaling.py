"""What unlearns models of 1 to 405 billion parameters: for each device, the setting that fits and gives up least.

    python benchmarks/scaling.py

From the models' dimensions alone, by `dualoptim.plan`; nothing is loaded. Writes docs/scaling.md's table.
"""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig

from dualoptim import plan

# As their configurations on the hub have them: width, feed-forward, layers, heads, key-value heads, vocabulary, tied.
SIZES = {
    "1B (Llama 3.2)": (2048, 8192, 16, 32, 8, 128256, True),
    "3B (Llama 3.2)": (3072, 8192, 28, 24, 8, 128256, True),
    "8B (Llama 3.1)": (4096, 14336, 32, 32, 8, 128256, False),
    "70B (Llama 3.1)": (8192, 28672, 80, 64, 8, 128256, False),
    "405B (Llama 3.1)": (16384, 53248, 126, 128, 8, 128256, False),
}
DEVICES = {
    "1 × 24 GB": (1, "24GB"),
    "1 × 80 GB": (1, "80GB"),
    "8 × 80 GB": (8, "80GB"),
    "4 nodes of 8 × 80 GB": (32, "80GB"),
}
STEP = plan.Step(rows=1, tokens=512, labelled=512)
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- made by benchmarks/scaling.py -->\n", "<!-- end -->\n"


def config(size: tuple[int, int, int, int, int, int, bool]) -> LlamaConfig:
    """A Llama of these dimensions."""
    width, inner, layers, heads, kv_heads, vocabulary, tied = size
    return LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied, head_dim=width // heads,
    )  # fmt: skip


def cell(described: LlamaConfig, devices: int, memory: str) -> str:
    """The first setting that fits, and what it needs of each device."""
    least = None
    for setting in plan.ladder(devices):
        need = plan.needed(described, setting, STEP, devices)
        if plan.fitting([(setting, need)], plan.parse_size(memory)):
            return f"{setting.name}: {plan.size_text(need.total)}"
        least = min(need.total, least or need.total)
    return f"nothing; the least is {plan.size_text(least or 0)}"


def main() -> None:
    """Write the table into the page."""
    lines = [f"| model | {' | '.join(DEVICES)} |", f"|---|{'---|' * len(DEVICES)}"]
    for name, size in SIZES.items():
        lines.append(f"| {name} | {' | '.join(cell(config(size), *where) for where in DEVICES.values())} |")
        print(lines[-1], flush=True)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    table = "\n".join(lines)
    PAGE.write_text(f"{before}{BEGIN}{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
