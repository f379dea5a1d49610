# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/training.py trains: stacks of layers in the shapes of known models, the ways to compute attention,
and sequences that can be learnt.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from attention_peers import BACKENDS
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

LETTERS = 4096  # of the sequences
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # [B, S, H, D] each, to [B, S, H, D]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model: sizes of its layers, and of a step's batch. `window`: keys seen before the own position, -1: all."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    rows: int
    batch_size: int
    is_causal: bool = False
    window: int = -1

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


# Of Mistral-7B's layers, eager attention has memory at 8,192 tokens, for two; at 16,384 it has none.
SHAPES = (
    Shape("BERT-large, 512", 24, 1024, 4096, 16, 16, 512, 16),
    *(Shape(f"long-range arena, {rows}", 2, 128, 512, 4, 4, rows, 65536 // rows) for rows in (1024, 2048, 4096)),
    Shape("GPT-3-1.3B, 2048", 24, 2048, 8192, 16, 16, 2048, 4, is_causal=True),
    Shape("GPT-3-1.3B, 8192", 24, 2048, 8192, 16, 16, 8192, 1, is_causal=True),
    Shape("Mistral-7B, 8192, window 4096", 2, 4096, 14336, 32, 8, 8192, 1, is_causal=True, window=4095),
    Shape("Mistral-7B, 16384, window 4096", 4, 4096, 14336, 32, 8, 16384, 1, is_causal=True, window=4095),
)
QUICK = {"BERT-large, 512": 4, "GPT-3-1.3B, 2048": 4, "Mistral-7B, 16384, window 4096": 2}  # and their layers


def visible(shape: Shape) -> torch.Tensor | None:
    """bool [S, S], or None where all is."""
    if not shape.is_causal:
        return None
    places = torch.arange(shape.rows, device="cuda")
    distance = places[:, None] - places[None]
    return (distance >= 0) & (distance <= shape.window) if shape.window >= 0 else distance >= 0


def eager(shape: Shape) -> Attention:
    """Products, a mask and a softmax, as models compute them without a fused kernel."""
    seen = visible(shape)

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        repeated = shape.heads // shape.kv_heads
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        key, value = (t.repeat_interleave(repeated, 1) if repeated > 1 else t for t in (key, value))
        scores = query @ key.transpose(-1, -2) * shape.head_dim**-0.5
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        return (torch.softmax(scores, -1) @ value).transpose(1, 2)

    return call


def sdpa(shape: Shape, backend: SDPBackend) -> Attention:
    """PyTorch's backend; a window, for which it has no argument, is a mask."""
    mask = visible(shape) if shape.window >= 0 else None
    options = {"attn_mask": mask, "is_causal": shape.is_causal and mask is None}
    options["enable_gqa"] = shape.heads != shape.kv_heads

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        if backend == SDPBackend.EFFICIENT_ATTENTION and options["enable_gqa"]:  # it takes no groups
            key, value = (t.repeat_interleave(shape.heads // shape.kv_heads, 1) for t in (key, value))
            given = options | {"enable_gqa": False}
        else:
            given = options
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(query, key, value, **given).transpose(1, 2)

    return call


def flash(shape: Shape, function: Callable) -> Attention:
    """flash_attn_func, ours or FlashAttention-4's."""
    window = {"window_size": (shape.window, 0)} if shape.window >= 0 else {}

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        found = function(query, key, value, causal=shape.is_causal, **window)
        return found[0] if isinstance(found, tuple) else found

    return call


def contestants(shape: Shape) -> dict[str, Attention]:
    """By name. Whether each can train the shape shows when it does."""
    import faplugin.torch

    found = {"ours": flash(shape, faplugin.torch.flash_attn_func), "eager": eager(shape)}
    found |= {name: sdpa(shape, backend) for name, backend in BACKENDS.items()}
    with contextlib.suppress(ImportError):
        import flash_attn.cute

        found["FA4"] = flash(shape, flash_attn.cute.flash_attn_func)
    return found


class Layer(torch.nn.Module):
    """Attention and a feed-forward network, each behind a norm, each with a residual."""

    def __init__(self, shape: Shape, attention: Attention) -> None:
        super().__init__()
        self.shape, self.attention = shape, attention
        kv_width = shape.kv_heads * shape.head_dim
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(shape.width) for _ in range(2))
        self.qkv = torch.nn.Linear(shape.width, shape.width + 2 * kv_width)
        self.out = torch.nn.Linear(shape.width, shape.width)
        self.up, self.down = torch.nn.Linear(shape.width, shape.inner), torch.nn.Linear(shape.inner, shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = self.shape
        projected = self.qkv(self.norms[0](x)).unflatten(-1, (-1, shape.head_dim))
        parts = projected.split([shape.heads, shape.kv_heads, shape.kv_heads], 2)
        x = x + self.out(self.attention(*parts).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class Model(torch.nn.Module):
    """Letters [B, S] to logits [B, S, LETTERS]."""

    def __init__(self, shape: Shape, attention: Attention) -> None:
        super().__init__()
        self.letters = torch.nn.Embedding(LETTERS, shape.width)
        self.places = torch.nn.Embedding(shape.rows, shape.width)
        self.layers = torch.nn.ModuleList(Layer(shape, attention) for _ in range(shape.layers))
        self.norm, self.head = torch.nn.LayerNorm(shape.width), torch.nn.Linear(shape.width, LETTERS)

    def forward(self, letters: torch.Tensor) -> torch.Tensor:
        x = self.letters(letters) + self.places.weight
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def batch(shape: Shape, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes in and what is to come out, both [B, S], the same for the same step.

    A letter follows from the one before it in three of four places, else it is drawn: a causal model can learn the next
    letter. Others are to tell the letters themselves, an eighth of which they don't see.
    """
    draw = torch.Generator(device="cuda").manual_seed(step)
    size = (shape.batch_size, shape.rows + 1)
    letters = torch.randint(LETTERS // 8, size, generator=draw, device="cuda")
    follows = torch.rand(size, generator=draw, device="cuda") < 0.75
    for _ in range(3):  # chains of up to three
        following = (letters.roll(1, 1) * 5 + 1) % (LETTERS // 8)
        letters = torch.where(follows, following, letters)
    if shape.is_causal:
        return letters[:, :-1], letters[:, 1:]
    letters = letters[:, 1:]
    hidden = torch.rand(letters.shape, generator=draw, device="cuda") < 0.125
    return torch.where(hidden, LETTERS - 1, letters), letters
