# SPDX-License-Identifier: Apache-2.0
"""faplugin.torch on CUDA tensors: the forward pass against float64, a cache, a CUDA graph, and the backward pass."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from faplugin import torch as fatorch  # noqa: E402

from tests.pytorch.test_functions import eager  # noqa: E402

pytestmark = pytest.mark.gpu


def draw(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).cuda()


def check(output: torch.Tensor, q, k, v) -> None:
    """Causal attention by FlashAttention's rule: at most twice the unfused error in the same dtype, + 1e-5."""
    on_cpu = [t.cpu() for t in (q, k, v)]
    exact, unfused = eager(*(t.double() for t in on_cpu), causal=True), eager(*on_cpu, causal=True)
    assert (output.cpu() - exact).abs().max() <= 2 * (unfused - exact).abs().max() + 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_forward(dtype) -> None:
    q, k, v = draw(2, 300, 4, 64, dtype=dtype), draw(2, 400, 2, 64, dtype=dtype), draw(2, 400, 2, 64, dtype=dtype)
    check(fatorch.flash_attn_func(q, k, v, causal=True), q, k, v)
    qkv = draw(2, 100, 3, 4, 64, dtype=dtype)
    check(fatorch.flash_attn_qkvpacked_func(qkv, causal=True), *qkv.unbind(2))


def test_a_cache_is_written_in_place() -> None:
    caches = [draw(2, 64, 2, 64), draw(2, 65, 2, 64)[:, :64].contiguous()]
    q, k, v = draw(2, 1, 4, 64), draw(2, 1, 2, 64), draw(2, 1, 2, 64)
    lengths = torch.tensor([5, 40], dtype=torch.int32, device="cuda")
    output = fatorch.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, causal=True)
    for b, length in enumerate((5, 40)):
        assert torch.equal(caches[0][b, length], k[b, 0]) and torch.equal(caches[1][b, length], v[b, 0])
        check(output[b : b + 1], q[b : b + 1], *(cache[b : b + 1, : length + 1] for cache in caches))


def test_a_cuda_graph_captures_it() -> None:
    q = draw(1, 64, 2, 64)
    expected = fatorch.flash_attn_func(q, q, q, causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = fatorch.flash_attn_func(q, q, q, causal=True)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, expected)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_backward(head_dim: int) -> None:
    """Gradients by FlashAttention's rule."""
    inputs = [draw(2, rows, heads, head_dim) for rows, heads in ((300, 4), (400, 2), (401, 2))]
    inputs[2] = inputs[2][:, :400]
    d_output = draw(2, 300, 4, head_dim)
    leaves = [t.detach().requires_grad_() for t in inputs]
    found = torch.autograd.grad(fatorch.flash_attn_func(*leaves, causal=True), leaves, d_output)
    wanted = []
    for dtype in (torch.float64, torch.bfloat16):
        on_cpu = [t.cpu().to(dtype).requires_grad_() for t in inputs]
        wanted.append(torch.autograd.grad(eager(*on_cpu, causal=True), on_cpu, d_output.cpu().to(dtype)))
    for gradient, exact, unfused in zip(found, *wanted, strict=True):
        assert (gradient.cpu() - exact).abs().max() <= 2 * (unfused - exact).abs().max() + 1e-5
