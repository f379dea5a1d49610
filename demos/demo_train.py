# SPDX-License-Identifier: Apache-2.0
"""Trains with the operator and exports what was trained, without rewriting: `make demo-train`.

A small decoder learns the letters of this file in 20 steps, with faplugin.torch's attention and with attention that
PyTorch differentiates; their losses are printed beside each other. The exported file holds faexport::FlashAttention
nodes and runs in onnxruntime. Exits 1 where losses differ by more than 1e-3 or outputs by more than 1e-3.
"""

from __future__ import annotations

import copy
import pathlib
import sys
import warnings

import common
import faplugin
import numpy as np
import onnx
import torch
from faplugin.torch import flash_attn_qkvpacked_func

LETTERS, WIDTH, HEADS, LAYERS, ROWS, BATCH, STEPS = 128, 64, 4, 2, 96, 16, 20
MAX_DIFFERENCE = 1e-3


def eager_attention(qkv: torch.Tensor, causal: bool) -> torch.Tensor:
    """What flash_attn_qkvpacked_func computes, as products and a softmax. [B, S, 3, H, D] -> [B, S, H, D]."""
    query, key, value = (tensor.transpose(1, 2) for tensor in qkv.unbind(2))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")) if causal else scores, -1)
    return (weights @ value).transpose(1, 2)


class Layer(torch.nn.Module):
    """Attention and a feed-forward network, each behind a norm, each with a residual."""

    def __init__(self, attention) -> None:
        super().__init__()
        self.attention = attention
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, rows, _ = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, rows, 3, HEADS, WIDTH // HEADS)
        x = x + self.out(self.attention(qkv, causal=True).reshape(batch, rows, WIDTH))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norms[1](x))))


class Decoder(torch.nn.Module):
    """Letters [B, S] to logits of the next [B, S, LETTERS]."""

    def __init__(self, attention) -> None:
        super().__init__()
        self.letters, self.places = torch.nn.Embedding(LETTERS, WIDTH), torch.nn.Embedding(ROWS, WIDTH)
        self.layers = torch.nn.ModuleList(Layer(attention) for _ in range(LAYERS))
        self.head = torch.nn.Linear(WIDTH, LETTERS)

    def forward(self, letters: torch.Tensor) -> torch.Tensor:
        x = self.letters(letters) + self.places(torch.arange(letters.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def train(model: Decoder, text: torch.Tensor) -> list[float]:
    """The losses of all steps."""
    optimizer, draw, losses = torch.optim.AdamW(model.parameters(), 3e-3), torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        starts = torch.randint(len(text) - ROWS - 1, (BATCH,), generator=draw)
        rows = torch.stack([text[start : start + ROWS + 1] for start in starts])
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def export(model: Decoder, path: pathlib.Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("rows", min=2, max=ROWS)}
        inputs = (torch.zeros(2, 10, dtype=torch.int64),)
        torch.onnx.export(model.eval(), inputs, path, dynamo=True, dynamic_shapes=[sizes], verbose=False)


def main() -> int:
    torch.manual_seed(0)
    text = torch.tensor([min(ord(letter), LETTERS - 1) for letter in pathlib.Path(__file__).read_text("utf-8")])
    ours, eager = Decoder(flash_attn_qkvpacked_func), Decoder(eager_attention)
    eager.load_state_dict(copy.deepcopy(ours.state_dict()))
    losses, expected = train(ours, text), train(eager, text)
    print("step   loss with faplugin.torch   with eager attention")
    for step in sorted({0, 4, 9, 14, STEPS - 1}):
        print(f"{step + 1:4}   {losses[step]:24.5f}   {expected[step]:20.5f}")

    common.OUTPUT.mkdir(exist_ok=True)
    path = common.OUTPUT / "trained.onnx"
    export(ours, path)
    count = sum(node.op_type == "FlashAttention" for node in onnx.load(path).graph.node)
    session, worst = faplugin.session(path), 0.0
    for rows in (ROWS, 33):
        letters = text[None, :rows].repeat(3, 1)
        (output,) = session.run(None, {session.get_inputs()[0].name: letters.numpy()})
        worst = max(worst, float(np.abs(output - ours(letters).detach().numpy()).max()))
    print(f"wrote {path}: {count} faexport::FlashAttention nodes in {LAYERS} layers, none of them by rewriting")
    print(f"onnxruntime's logits differ from PyTorch's by {worst:.1e} at most")
    differs = max(abs(a - b) for a, b in zip(losses, expected, strict=True)) > MAX_DIFFERENCE
    return int(differs or worst > MAX_DIFFERENCE or count != LAYERS)


if __name__ == "__main__":
    sys.exit(main())
