"""A decoder of torch alone, of SmolLM2-135M's dimensions by default, and a batch of random tokens for it.

It stands in for a model of Transformers where that is not installed: grouped queries, gated feed-forward layers, rotary
positions, a tied head.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """Attention and feed-forward, each after a norm and added to what came in."""

    def __init__(self, width: int, inner: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.before_attention, self.before_feed = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, kv_heads * self.size, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.before_attention(x)
        query, key, value = (
            part(h).unflatten(-1, (count, self.size)).transpose(1, 2)
            for part, count in ((self.query, self.heads), (self.key, self.kv_heads), (self.value, self.kv_heads))
        )
        query, key = (part * cos + _rotated(part) * sin for part in (query, key))
        query, key = query.type_as(value), key.type_as(value)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        h = self.before_feed(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _rotated(part: Tensor) -> Tensor:
    one, two = part.chunk(2, -1)
    return torch.cat((-two, one), -1)


class Decoder(nn.Module):
    """Called as a causal model of Transformers is."""

    def __init__(
        self, width: int = 576, inner: int = 1536, layers: int = 30, heads: int = 9, kv_heads: int = 3,
        vocabulary: int = 49_152,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embedding, self.norm = nn.Embedding(vocabulary, width), nn.RMSNorm(width)
        self.layers = nn.ModuleList(Layer(width, inner, heads, kv_heads) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.embedding.weight
        self.size = width // heads

    def get_output_embeddings(self) -> nn.Module:
        """The head, so that a loss applies it where labels stand alone."""
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        powers = torch.arange(0, self.size, 2, device=input_ids.device) / self.size
        angles = torch.outer(positions, 10_000.0**-powers).repeat(1, 2)
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return SimpleNamespace(logits=self.head(self.norm(x)))


def batch(rows: int, tokens: int, labelled: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    """Random tokens, the last ones of each row with labels."""
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : tokens - labelled] = -100
    found = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    return {name: value.to(device) for name, value in found.items()}
