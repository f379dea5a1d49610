# SPDX-License-Identifier: Apache-2.0
"""faplugin.torch on CUDA tensors: both passes against float64, a cache, CUDA graphs."""

from __future__ import annotations

import concurrent.futures

import pytest

torch = pytest.importorskip("torch")
from faplugin import torch as fatorch  # noqa: E402

from tests.gpu import arrays  # noqa: E402
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
    with arrays.captured_by(graph):
        output = fatorch.flash_attn_func(q, q, q, causal=True)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, expected)


def test_a_thread_that_has_not_used_cuda_before() -> None:
    q = draw(1, 64, 2, 64)
    expected = fatorch.flash_attn_func(q, q, q, causal=True)
    torch.cuda.synchronize()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        output = pool.submit(fatorch.flash_attn_func, q, q, q, causal=True).result()
    torch.cuda.synchronize()
    assert torch.equal(output, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_backward(head_dim: int, dtype) -> None:
    """Gradients by FlashAttention's rule."""
    inputs = [draw(2, rows, heads, head_dim, dtype=dtype) for rows, heads in ((300, 4), (400, 2), (401, 2))]
    inputs[2] = inputs[2][:, :400]
    d_output = draw(2, 300, 4, head_dim, dtype=dtype)
    leaves = [t.detach().requires_grad_() for t in inputs]
    found = torch.autograd.grad(fatorch.flash_attn_func(*leaves, causal=True), leaves, d_output)
    wanted = []
    for precision in (torch.float64, dtype):
        on_cpu = [t.cpu().to(precision).requires_grad_() for t in inputs]
        wanted.append(torch.autograd.grad(eager(*on_cpu, causal=True), on_cpu, d_output.cpu().to(precision)))
    for gradient, exact, unfused in zip(found, *wanted, strict=True):
        assert (gradient.cpu() - exact).abs().max() <= 2 * (unfused - exact).abs().max() + 1e-5


def gradients(function, *tensors: torch.Tensor) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    weights = draw(*output.shape, dtype=torch.float64).to(output)  # the same for each dtype and device
    return list(torch.autograd.grad((output * weights).sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_gradient_of_a_packed_tensor(dtype) -> None:
    qkv = draw(2, 200, 3, 4, 64, dtype=dtype)
    found = gradients(lambda x: fatorch.flash_attn_qkvpacked_func(x, causal=True), qkv)[0].unbind(2)

    def reference(*inputs: torch.Tensor) -> list[torch.Tensor]:
        return gradients(lambda q, k, v: eager(q, k, v, causal=True), *inputs)

    on_cpu = [t.cpu() for t in qkv.unbind(2)]
    exact, unfused = reference(*(t.double() for t in on_cpu)), reference(*on_cpu)
    for got, want, rounded in zip(found, exact, unfused, strict=True):
        assert (got.cpu() - want).abs().max() <= 2 * (rounded - want).abs().max() + 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cuda_graph_captures_both_passes(dtype) -> None:
    q = draw(1, 640, 2, 64, dtype=dtype).requires_grad_()

    def step() -> torch.Tensor:
        output = fatorch.flash_attn_func(q, q, q, causal=True)
        return torch.autograd.grad(output, q, output)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with arrays.captured_by(graph):
        gradient = step()
    for _ in range(3):
        gradient.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(gradient, expected)


def test_a_float32_tensor_trains() -> None:
    """Steps of an optimizer on the GPU and, by eager attention, on the CPU: the same losses."""
    weights = draw(3, 64, 64, dtype=torch.float32) / 8
    tokens, target = draw(2, 100, 4, 64, dtype=torch.float32), draw(2, 100, 4, 64, dtype=torch.float32)

    def losses(attention, device: str) -> torch.Tensor:
        projection = weights.detach().to(device).clone().requires_grad_()
        optimizer = torch.optim.SGD([projection], lr=0.5)
        found = []
        for _ in range(10):
            q, k, v = (tokens.to(device) @ part for part in projection)
            loss = (attention(q, k, v, causal=True) - target.to(device)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach().cpu())
        return torch.stack(found)

    ours = losses(fatorch.flash_attn_func, "cuda")
    assert ours[-1] < ours[0]
    torch.testing.assert_close(ours, losses(eager, "cpu"), rtol=1e-5, atol=0)
