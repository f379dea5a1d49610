# SPDX-License-Identifier: Apache-2.0
"""flash-attn's functions against attention that PyTorch differentiates itself; skipped without PyTorch."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
import faplugin  # noqa: E402
from faplugin import torch as fatorch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402


def draw(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).requires_grad_()


def eager(q, k, v, causal=False, window=(-1, -1), softcap=0.0, slopes=None, scale=None):
    """[B, S, H, D], diagonal at the bottom right; empty rows are 0."""
    group, (rows, keys) = q.shape[2] // k.shape[2], (q.shape[1], k.shape[1])
    k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (scale or q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    distance = torch.arange(rows)[:, None] + keys - rows - torch.arange(keys)[None]
    if slopes is not None:
        scores = scores - slopes.reshape(-1, q.shape[2], 1, 1) * distance.abs()
    left, right = window[0], 0 if causal else window[1]
    hidden = torch.zeros(rows, keys, dtype=torch.bool)
    hidden |= (distance > left) if left >= 0 else hidden
    hidden |= (-distance > right) if right >= 0 else hidden
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
    weights = torch.where(hidden.all(-1)[:, None], torch.zeros(()).to(weights), weights)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def compare(output, expected, inputs, tolerance=2e-5):
    d_output = torch.randn_like(expected)
    torch.testing.assert_close(output, expected.to(output.dtype), rtol=tolerance, atol=tolerance)
    wanted = torch.autograd.grad(expected, inputs, d_output.to(expected.dtype))
    # sum().backward() hands out an expanded gradient, others have other strides
    for got, want in zip(torch.autograd.grad(output, inputs, d_output.to(output.dtype)), wanted, strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=tolerance, atol=tolerance)


OPTIONS = [
    {},
    {"causal": True},
    {"window_size": (7, 3)},
    {"causal": True, "window_size": (5, -1), "softcap": 3.0},
    {"softmax_scale": 0.3, "alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.3])},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flash_attn_func(options, kv_heads):
    q, k, v = draw(2, 20, 4, 16), draw(2, 33, kv_heads, 16), draw(2, 33, kv_heads, 8)
    words = {"window_size": "window", "softmax_scale": "scale", "alibi_slopes": "slopes"}
    expected = eager(q, k, v, **{words.get(name, name): value for name, value in options.items()})
    compare(fatorch.flash_attn_func(q, k, v, **options), expected, (q, k, v))


def test_rows_without_keys_are_zero():
    q, k, v = draw(1, 9, 2, 8), draw(1, 4, 2, 8), draw(1, 4, 2, 8)
    output = fatorch.flash_attn_func(q, k, v, causal=True)
    assert not output[:, :5].any() and output[:, 5:].all()
    compare(output, eager(q, k, v, causal=True), (k, v))


def test_packed_functions():
    qkv = draw(2, 17, 3, 4, 16)
    compare(fatorch.flash_attn_qkvpacked_func(qkv, causal=True), eager(*qkv.unbind(2), causal=True), (qkv,))
    q, kv = draw(2, 9, 4, 16), draw(2, 17, 2, 2, 16)
    compare(fatorch.flash_attn_kvpacked_func(q, kv), eager(q, *kv.unbind(2)), (q, kv))


def test_varlen_functions():
    cu_q, cu_k = torch.tensor([0, 5, 5, 19], dtype=torch.int32), torch.tensor([0, 8, 11, 30], dtype=torch.int32)
    q, k, v = draw(19, 4, 16), draw(30, 2, 16), draw(30, 2, 16)

    def apart(query, key, value, cu_query, cu_key):
        spans = [(cu_query[i], cu_query[i + 1], cu_key[i], cu_key[i + 1]) for i in range(3)]
        parts = [eager(query[None, a:b], key[None, c:d], value[None, c:d], causal=True)[0] for a, b, c, d in spans]
        return torch.cat(parts)

    expected = apart(q, k, v, cu_q, cu_k)
    compare(fatorch.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 14, 19, causal=True), expected, (q, k, v))
    kv = torch.stack([k, v], 1).detach().requires_grad_()
    packed = fatorch.flash_attn_varlen_kvpacked_func(q, kv, cu_q, cu_k, 14, 19, causal=True)
    compare(packed, apart(q, *kv.unbind(1), cu_q, cu_k), (q, kv))
    qkv = draw(19, 3, 4, 16)
    packed = fatorch.flash_attn_varlen_qkvpacked_func(qkv, cu_q, 14, causal=True)
    compare(packed, apart(*qkv.unbind(1), cu_q, cu_q), (qkv,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_by_the_rule(dtype):
    """Errors are at most twice those of the same computation without fusion, + 1e-5."""
    inputs = [draw(2, 65, 4, 32, dtype=dtype) for _ in range(3)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    d_output = torch.randn(2, 65, 4, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = torch.autograd.grad(eager(*exact, causal=True), exact, d_output.double())
    unfused = torch.autograd.grad(eager(*inputs, causal=True), inputs, d_output)
    ours = torch.autograd.grad(fatorch.flash_attn_func(*inputs, causal=True), inputs, d_output)
    for got, other, want in zip(ours, unfused, wanted, strict=True):
        assert (got - want).abs().max() <= 2 * (other - want).abs().max() + 1e-5


@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double precision:UserWarning")
def test_gradcheck():
    """In float32, with the step and the tolerance that it needs."""
    q, k, v = draw(1, 3, 2, 4), draw(1, 5, 1, 4), draw(1, 5, 1, 4)
    bias, sinks = draw(1, 2, 3, 5), draw(2)

    def function(*tensors):
        return fatorch.attend(
            *tensors[:3], bias=tensors[3], sinks=tensors[4], causal=True, softcap=2.0, return_lse=True
        )

    assert torch.autograd.gradcheck(function, (q, k, v, bias, sinks), eps=1e-2, atol=2e-3, rtol=2e-2)


def test_log_sum_exp_has_a_gradient():
    q, k, v = draw(1, 6, 2, 8), draw(1, 7, 2, 8), draw(1, 7, 2, 8)
    _, lse, none = fatorch.flash_attn_func(q, k, v, return_attn_probs=True)
    expected = torch.logsumexp(torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5, -1)
    assert none is None
    compare(lse, expected, (q, k))


def test_expanded_and_strided_gradients():
    q, k, v = (draw(2, 4, 10, 8).transpose(1, 2) for _ in range(3))
    for t in (q, k, v):
        t.retain_grad()
    fatorch.flash_attn_func(q, k, v).sum().backward()
    expected = torch.autograd.grad(eager(*(leaf := [t.detach().requires_grad_() for t in (q, k, v)])).sum(), leaf)
    for got, want in zip((q.grad, k.grad, v.grad), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_with_kvcache():
    caches = [torch.randn(2, 20, 2, 8) for _ in range(2)]
    lengths = torch.tensor([5, 9], dtype=torch.int32)
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2, 8)
    whole = [cache.clone() for cache in caches]
    for b in range(2):
        for cache, new in zip(whole, (k, v), strict=True):
            cache[b, lengths[b] : lengths[b] + 3] = new[b]
    output = fatorch.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, causal=True)
    assert all(torch.equal(cache, expected) for cache, expected in zip(caches, whole, strict=True))
    for b in range(2):
        end = int(lengths[b]) + 3
        expected = eager(q[b : b + 1], whole[0][b : b + 1, :end], whole[1][b : b + 1, :end], causal=True)
        torch.testing.assert_close(output[b : b + 1], expected, rtol=1e-5, atol=1e-5)
    again, lse = fatorch.flash_attn_with_kvcache(
        q, *caches, cache_seqlens=lengths + 3, causal=True, return_softmax_lse=True
    )
    torch.testing.assert_close(again, output)
    assert lse.shape == (2, 4, 3)


def test_autocast():
    q, k, v = (draw(1, 8, 2, 16) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        output = fatorch.flash_attn_func(q, k, v)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    q, k, v = (draw(1, 8, 2, 16) for _ in range(3))
    plain = torch.autograd.grad(fatorch.flash_attn_func(q, k, v).square().sum(), (q, k, v))
    again = checkpoint(fatorch.flash_attn_func, q, k, v, use_reentrant=False)
    for got, want in zip(torch.autograd.grad(again.square().sum(), (q, k, v)), plain, strict=True):
        assert torch.equal(got, want)
    again = checkpoint(fatorch.flash_attn_func, q, k, v, use_reentrant=False)
    gradients = torch.autograd.grad(again.square().sum(), (q, k, v), create_graph=True)
    for got, want in zip(gradients, plain, strict=True):
        assert torch.equal(got, want)


def ops_of(call) -> list[str]:
    """The operator's ops that PyTorch's dispatcher sees in a call."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.extend([function.name()] if function.namespace == "faplugin" else [])
            return function(*arguments, **(keywords or {}))

    with Watch():
        call()
    return seen


def test_both_passes_are_ops_where_somebody_watches_and_give_the_same():
    q = draw(1, 9, 2, 8)
    expected = torch.autograd.grad(fatorch.flash_attn_func(q, q, q, causal=True).sum(), q)[0]
    found = []
    seen = ops_of(lambda: found.extend(torch.autograd.grad(fatorch.flash_attn_func(q, q, q, causal=True).sum(), q)))
    assert seen == ["faplugin::attention", "faplugin::attention_backward"]
    assert torch.equal(found[0], expected)


def test_tensors_without_memory_have_shapes():
    q = torch.empty(1, 9, 2, 8, device="meta")
    assert fatorch.flash_attn_func(q, q, q).shape == q.shape


def test_compile_makes_one_graph_forward_and_backward():
    def loss(q, k, v):
        return fatorch.flash_attn_func(q * 2, k, v, causal=True).square().sum()

    inputs = [draw(1, 8, 2, 16) for _ in range(3)]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    for got, want in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_compile_takes_a_tensor_twice():
    x, packed = draw(1, 8, 2, 16), draw(8, 3, 2, 16)
    lengths = torch.tensor([0, 3, 8], dtype=torch.int32)

    def twice(tensor):
        return fatorch.flash_attn_func(tensor, tensor, tensor).square().sum()

    def lengths_twice(tensor):
        return fatorch.flash_attn_varlen_qkvpacked_func(tensor, lengths, 5, causal=True).square().sum()

    for function, tensor in ((twice, x), (lengths_twice, packed)):
        found = torch.compile(function, backend="aot_eager", fullgraph=True)(tensor)
        torch.testing.assert_close(found, function(tensor))
        got, want = torch.autograd.grad(found, tensor), torch.autograd.grad(function(tensor), tensor)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("options", ({}, {"is_causal": True}, {"attn_mask": "bool"}, {"scale": 0.5}), ids=str)
def test_activate_sdpa_by_the_rule(options):
    """Errors are at most twice those of PyTorch's own kernel, + 1e-5."""
    if "attn_mask" in options:
        options = {"attn_mask": torch.rand(20, 20, generator=torch.Generator().manual_seed(0)) < 0.7}
    inputs = [draw(2, 4, 20, 16) for _ in range(3)]

    def run(*tensors):
        output = torch.nn.functional.scaled_dot_product_attention(*tensors, **options)
        return output, *torch.autograd.grad(output.square().sum(), tensors)

    exact, theirs = run(*(t.detach().double().requires_grad_() for t in inputs)), run(*inputs)
    fatorch.activate_sdpa()
    try:
        ours = run(*inputs)
    finally:
        fatorch.activate_sdpa(False)
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert (got - want).abs().max() <= 2 * (other - want).abs().max() + 1e-5
    assert any(not torch.equal(got, other) for got, other in zip(ours, theirs, strict=True)), "PyTorch's kernel has run"
    assert all(torch.equal(got, other) for got, other in zip(run(*inputs), theirs, strict=True)), "ours is still there"


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float64, {}), (torch.float64, {"is_causal": True}), (torch.float32, {"scale": 0.0})],
    ids=str,
)
def test_activate_sdpa_leaves_to_pytorch_what_the_operator_has_no_words_for(dtype, options):
    inputs = [draw(1, 2, 8, 16).detach().to(dtype).requires_grad_() for _ in range(3)]
    plain = torch.nn.functional.scaled_dot_product_attention(*inputs, **options)
    fatorch.activate_sdpa()
    try:
        output = torch.nn.functional.scaled_dot_product_attention(*inputs, **options)
        gradients = torch.autograd.grad(output.sum(), inputs)
    finally:
        fatorch.activate_sdpa(False)
    assert torch.equal(output, plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients, torch.autograd.grad(plain.sum(), inputs), strict=True))


def test_a_cache_that_is_written_is_known_to_have_changed():
    q, cache = torch.zeros(1, 1, 2, 16), torch.zeros(1, 8, 2, 16)
    before = cache._version
    fatorch.flash_attn_with_kvcache(q, cache, cache.clone(), q, q, cache_seqlens=torch.ones(1, dtype=torch.int32))
    assert cache._version > before


@pytest.mark.parametrize("power", [1, 2])
def test_gradients_have_no_gradients(power):
    """With power 1 those of the output are constants: second derivatives were left out without a word then."""
    q, k, v = draw(1, 4, 2, 8), draw(1, 5, 2, 8), draw(1, 5, 2, 8)
    loss = (fatorch.flash_attn_func(q, k, v) ** power).sum()
    gradients = torch.autograd.grad(loss, (q, k, v), create_graph=True)
    expected = torch.autograd.grad((eager(q, k, v) ** power).sum(), (q, k, v))
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="gradients of faplugin.torch's attention are differentiated"):
        (gradients[0].square().sum() + q.sum()).backward()


def test_transforms_are_refused():
    q = draw(2, 1, 4, 2, 8).detach()
    for call in (
        lambda: torch.vmap(lambda x: fatorch.flash_attn_func(x, x, x))(q),
        lambda: torch.func.grad(lambda x: fatorch.flash_attn_func(x, x, x).sum())(q[0]),
    ):
        with pytest.raises(RuntimeError, match=r"under a transform of torch\.func"):
            call()
    x = draw(1, 4, 2, 8)
    output = fatorch.flash_attn_func(x, x, x)
    with pytest.raises(RuntimeError, match=r"at once \(is_grads_batched\)"):
        torch.autograd.grad(output, x, torch.ones(3, *output.shape), is_grads_batched=True)


@pytest.mark.parametrize("columns", [1, 8])
def test_tensors_whose_negative_is_in_memory(columns):
    """As PyTorch has imaginary parts of conjugates. The library reads the memory."""

    def negative(*shape):
        return torch._neg_view(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))))

    q, k, v = (negative(1, rows, 2, columns).requires_grad_() for rows in (4, 5, 5))
    bias = negative(1, 2, 4, 5)
    output = fatorch.attend(q, k, v, bias=bias)
    exact = [t.detach().resolve_neg().requires_grad_() for t in (q, k, v)]
    scores = torch.einsum("bihd,bjhd->bhij", *exact[:2]) * columns**-0.5 + bias.resolve_neg()
    expected = torch.einsum("bhij,bjhd->bihd", torch.softmax(scores, -1), exact[2])
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    d_output = negative(1, 4, 2, columns)
    wanted = torch.autograd.grad(expected, exact, d_output.resolve_neg())
    for got, want in zip(torch.autograd.grad(output, (q, k, v), d_output), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_memory_that_holds_negatives_is_refused_where_it_is_read_or_written_as_it_is():
    x = torch.zeros(1, 2, 4, 16)
    negative = torch._neg_view(torch.ones(1, 2, 4, 16))
    for call, name in (
        (lambda: faplugin.attention(x, negative, x), "key"),
        (lambda: faplugin.attention(x, x, x, out={"output": negative}), "output"),
        (lambda: faplugin.attention_backward(negative, x, torch.zeros(1, 2, 4), x, x, x), "d_output"),
        (lambda: fatorch.flash_attn_with_kvcache(x, x, negative, x, x, cache_seqlens=0), "v_cache"),
    ):
        with pytest.raises(ValueError, match=f"^{name} has PyTorch's negative bit.*expected resolve_neg"):
            call()
