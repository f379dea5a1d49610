# SPDX-License-Identifier: Apache-2.0
"""What flash-attn's functions refuse, and how they name it; skipped without PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from faplugin import torch as fatorch  # noqa: E402

from tests.pytorch.test_functions import draw  # noqa: E402


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"window_size": 3}, "window_size is 3; expected two whole numbers"),
        ({"window_size": (3, 2, 1)}, r"window_size is \(3, 2, 1\); expected two whole numbers"),
        ({"window_size": (None, None)}, r"window_size is \(None, None\); expected two whole numbers"),
        ({"window_size": ("a", "b")}, r"window_size is \('a', 'b'\); expected two whole numbers"),
        ({"causal": "x"}, "causal is 'x'; expected True or False"),
        ({"causal": None}, "causal is None; expected True or False"),
        ({"softcap": "x"}, "softcap is 'x'; expected a number"),
        ({"softmax_scale": "x"}, "softmax_scale is 'x'; expected a number, or None"),
        ({"softmax_scale": torch.ones(2)}, "softmax_scale is a Tensor; expected a number, or None"),
        ({"causal": np.ones(2)}, "causal is a ndarray; expected True or False"),
        ({"window_size": (torch.ones(2), 0)}, "window_size is .*; expected two whole numbers"),
    ],
    ids=str,
)
def test_arguments_of_a_wrong_kind_are_named(arguments, sentence):
    q = torch.zeros(1, 2, 2, 4)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        fatorch.flash_attn_func(q, q, q, **arguments)
    if "softcap" not in arguments:
        with pytest.raises(ValueError, match=f"^{sentence}"):
            fatorch.flash_attn_with_kvcache(q, q, q, **arguments)


def test_arguments_that_count_as_truth_values_are_taken():
    q = draw(1, 3, 2, 4)
    assert torch.equal(fatorch.flash_attn_func(q, q, q, causal=1), fatorch.flash_attn_func(q, q, q, causal=True))
    assert torch.equal(
        fatorch.flash_attn_func(q, q, q, window_size=[1, 0]), fatorch.flash_attn_func(q, q, q, window_size=(1, 0))
    )


def test_refusals():
    q = torch.zeros(1, 2, 2, 4)
    with pytest.raises(ValueError, match=r"dropout_p is 0\.1; expected 0"):
        fatorch.flash_attn_func(q, q, q, dropout_p=0.1)
    with pytest.raises(ValueError, match="cache_leftpad is given; expected None"):
        fatorch.flash_attn_with_kvcache(q, q, q, cache_leftpad=q)
    with pytest.raises(ValueError, match="k is given without cache_seqlens"):
        fatorch.flash_attn_with_kvcache(q, q, q, q, q)
    with pytest.raises(ValueError, match="query has 3 axes; expected 4"):
        fatorch.flash_attn_func(q[0], q[0], q[0])
    with pytest.raises(ValueError, match="head_dim 0"):
        fatorch.flash_attn_func(q[..., :0], q[..., :0], q[..., :0])
    with pytest.raises(ValueError, match=r"the packed tensor has shape \[1, 2, 2, 4\]; expected \[B, S, 3, H, D\]"):
        fatorch.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match=r"key has shape \[1, 2, 2, 3\]"):
        fatorch.flash_attn_func(q, q[..., :3].contiguous(), q)


def test_refusals_of_a_step_name_its_own_arguments():
    q, cache = torch.zeros(1, 1, 2, 8), torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"k_cache has shape \[1, 4, 2, 7\]"):
        fatorch.flash_attn_with_kvcache(q, cache[..., :7], cache, q, q, cache_seqlens=1)
    for lengths in (4, torch.tensor([4], dtype=torch.int32)):
        with pytest.raises(
            ValueError, match="cache_seqlens is up to 4; expected at most 3: k_cache has 4 rows and k has 1"
        ):
            fatorch.flash_attn_with_kvcache(q, cache, cache.clone(), q, q, cache_seqlens=lengths)


def test_what_no_array_can_be_is_refused():
    q = draw(1, 4, 2, 8)
    array = q.detach().numpy()
    for arguments, name in (((q, q, array), "value"), ((q, array, q), "key"), ((array, q, q), "query")):
        with pytest.raises(TypeError, match=f"^{name} is a ndarray; expected a torch.Tensor"):
            fatorch.flash_attn_func(*arguments)
    with pytest.raises(TypeError, match="^value is a NoneType; expected a torch.Tensor"):
        fatorch.flash_attn_func(q, q, None)
    with pytest.raises(TypeError, match="^alibi_slopes is a ndarray; expected a torch.Tensor"):
        fatorch.flash_attn_func(q, q, q, alibi_slopes=np.ones(2, np.float32))
    with pytest.raises(TypeError, match="query is complex64, which the operator does not read"):
        fatorch.flash_attn_func(*[q.detach().to(torch.complex64)] * 3)
    with pytest.raises(ValueError, match="key has shape"):
        fatorch.flash_attn_func(q, q[..., :4], q)


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (torch.zeros(1, 4, 2, 8).to_sparse(), "is a torch.sparse_coo tensor; expected a strided one"),
        (torch.zeros(1, 4, 2, 8).to_mkldnn(), "is a torch._mkldnn tensor; expected a strided one"),
        (torch.nested.nested_tensor([torch.zeros(2, 2, 8)]), "is a nested tensor; expected a strided one"),
        (torch.zeros(1, 4, 2, 8, device="meta"), "is on meta; expected cpu, where query is"),
        (torch.tensor(0.0), "has (no|0) axes; expected"),
    ],
    ids=["sparse", "mkldnn", "nested", "meta", "a number"],
)
def test_a_tensor_that_cannot_be_read_is_named(tensor, sentence):
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises((TypeError, ValueError), match=f"^value {sentence}"):
        fatorch.flash_attn_func(q, q, tensor)
    with pytest.raises((TypeError, ValueError), match=f"^(value|v_cache) {sentence}"):
        fatorch.flash_attn_with_kvcache(q, q, tensor)
    with pytest.raises((TypeError, ValueError), match=f"^value {sentence}"):
        fatorch.attend(q, q, tensor)


def test_arguments_of_attend_are_named():
    q = torch.zeros(1, 4, 2, 8)
    for arguments, sentence in (
        ({"packed": 4}, "packed is 4; expected 0, 2 or 3"),
        ({"scale": "x"}, "scale is 'x'; expected a number, or None"),
        ({"scale": 0}, "scale is 0; expected another number, or None"),
        ({"softcap": None}, "softcap is None; expected a number"),
        ({"window": 3}, "window is 3; expected two whole numbers"),
        ({"alignment": 1}, "alignment is 1; expected a string"),
        ({"sinks": 1.0}, "sinks is a float; expected a torch.Tensor"),
        ({"return_lse": q}, "return_lse is a Tensor; expected True or False"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{sentence}"):
            fatorch.attend(q, q, q, **arguments)
    with pytest.raises(TypeError, match="^query is a list; expected a torch.Tensor"):
        fatorch.attend([1], q, q)


def test_what_has_another_meaning_in_flash_attn_is_refused():
    q, cache = torch.zeros(1, 2, 2, 16), torch.zeros(1, 8, 2, 16)
    angles = torch.zeros(8, 8)
    lengths = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="for several queries without causal or a window"):
        fatorch.flash_attn_with_kvcache(q, cache, cache.clone(), q, q, angles, angles, cache_seqlens=lengths)
    with pytest.raises(ValueError, match="scale is 0"):
        fatorch.flash_attn_func(q, q, q, softmax_scale=0.0)


def test_varlen_functions_name_what_is_wrong():
    q, cu = torch.zeros(5, 2, 8), torch.tensor([0, 5], dtype=torch.int32)
    for given, name in (((None, cu), "cu_seqlens_q"), ((cu, None), "cu_seqlens_k"), ((None, None), "cu_seqlens_q")):
        with pytest.raises(TypeError, match=f"^{name} is None; expected int32"):
            fatorch.flash_attn_varlen_func(q, q, q, *given, 5, 5)
    with pytest.raises(ValueError, match=r"^k has shape \[1, 5, 2, 8\]; expected \[total rows, heads, head_dim\]"):
        fatorch.flash_attn_varlen_func(q, q[None], q, cu, cu, 5, 5)
    with pytest.raises(TypeError, match="^v is a ndarray; expected a torch.Tensor"):
        fatorch.flash_attn_varlen_func(q, q, q.numpy(), cu, cu, 5, 5)


def test_float8_is_refused():
    q = torch.zeros(1, 2, 2, 16).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="^query is float8_e4m3fn; expected float32, float16 or bfloat16"):
        fatorch.flash_attn_func(q, q, q)


def test_what_a_cache_does_not_hold_is_refused():
    q, cache = torch.zeros(2, 1, 2, 16), torch.zeros(2, 8, 2, 16)

    def step(caches=None, lengths=(1, 2), **arguments):
        caches = caches or (cache, cache.clone())
        lengths = torch.tensor(lengths, dtype=torch.int32) if isinstance(lengths, tuple) else lengths
        return fatorch.flash_attn_with_kvcache(q, *caches, q, q, cache_seqlens=lengths, **arguments)

    for lengths, least in (((-2, 1), -2), (-1, -1)):
        with pytest.raises(ValueError, match=f"^cache_seqlens is {least} for a sequence; expected 0 or more"):
            step(lengths=lengths)
    for lengths in (2.5, "3"):
        with pytest.raises(TypeError, match=f"^cache_seqlens is {lengths!r}; expected a whole number, or a tensor"):
            step(lengths=lengths)
    short = torch.zeros(5, 8)
    with pytest.raises(ValueError, match="^rotary_cos has 5 positions; expected at least the 8 rows of k_cache"):
        step(rotary_cos=short, rotary_sin=short)
    strided = torch.zeros(2, 2, 8, 16).transpose(1, 2)
    with pytest.raises(ValueError, match="^k_cache is float32 .* and not row-major"):
        step((strided, cache))
    with pytest.raises(ValueError, match="^cache_seqlens is float32; expected int32 or int64"):
        fatorch.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=torch.ones(2))
