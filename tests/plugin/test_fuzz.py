# SPDX-License-Identifier: Apache-2.0
"""Calls that make no sense: a valid problem of which some arguments are changed at random either runs or is refused in
one sentence, and no call reads or writes outside its arrays (run it under a sanitizer to see that for reads)."""

from __future__ import annotations

import faplugin
import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

SIZES = st.integers(0, 9)
NUMBERS = st.sampled_from([-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 8, 16, 2**31 - 1, 2**31, 2**62, 2**63 - 1])
FLOATS = st.sampled_from([0.0, -1.0, 1e-30, 0.5, 30.0, 3e38, float("inf"), float("nan")])
WORDS = st.sampled_from(["", "BHSD", "BSHD", "BSH", "onnx", "top_left", "bottom_right", "zero", "mean", "SHB", "\0"])
DTYPES = st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.bool_, np.int32, np.int64, np.float64])
INTEGERS = ("q_num_heads", "kv_num_heads", "left_window_size", "right_window_size", "head_dim", "head_dim_v")
STRINGS = ("alignment", "empty_row", "float32_precision", "query_layout", "key_layout", "value_layout", "output_layout")
OPTIONAL = (
    "attn_mask", "attn_bias", "past_key", "past_value", "nonpad_kv_seqlen", "query_lengths", "cu_seqlens_q",
    "cu_seqlens_kv", "query_offset", "alibi_slopes", "sinks",
)  # fmt: skip


@st.composite
def arrays(draw: st.DrawFn, shape: tuple[int, ...], dtype: type | None = None) -> np.ndarray:
    """Of this shape, as a view into a larger array, with gaps, broadcast or backward axes."""
    dtype = np.dtype(dtype or draw(DTYPES))
    steps = tuple(draw(st.sampled_from([1, 1, 1, 2, -1])) for _ in shape)
    steps = (*steps[:-1], 1) if steps and draw(st.booleans()) else steps
    parent = np.zeros(tuple(size * abs(step) for size, step in zip(shape, steps, strict=True)), np.float64)
    random = np.random.default_rng(draw(st.integers(0, 99)))
    parent = random.normal(0, draw(st.sampled_from([1, 5, 1e4])), parent.shape).astype(dtype)
    view = parent[tuple(slice(None, None, step) for step in steps)]
    axis = draw(st.integers(0, max(0, view.ndim - 1)))
    if view.ndim and view.shape[axis] > 1 and draw(st.integers(0, 9)) == 0:
        view = np.broadcast_to(np.take(view, [0], axis), view.shape)
    return view


@st.composite
def any_array(draw: st.DrawFn) -> np.ndarray:
    return draw(arrays(tuple(draw(st.lists(SIZES, max_size=5)))))


@st.composite
def valid(draw: st.DrawFn) -> dict:
    batch, heads_kv, group = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rows, keys, dim, dim_v = draw(SIZES), draw(SIZES), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
    call = {
        "query": draw(arrays((batch, heads_kv * group, rows, dim), dtype)),
        "key": draw(arrays((batch, heads_kv, keys, dim), dtype)),
        "value": draw(arrays((batch, heads_kv, keys, dim_v), dtype)),
        "is_causal": draw(st.booleans()),
        "num_threads": draw(st.integers(1, 2)),
    }
    shapes = {
        "attn_mask": ((batch, 1, rows, keys), np.bool_),
        "attn_bias": ((1, heads_kv * group, 1, keys), np.float32),
        "nonpad_kv_seqlen": ((batch,), np.int64),
        "query_lengths": ((batch,), np.int32),
        "query_offset": ((1,), np.int64),
        "sinks": ((heads_kv * group,), np.float32),
        "alibi_slopes": ((batch, heads_kv * group), np.float32),
    }
    for name in draw(st.sets(st.sampled_from(sorted(shapes)), max_size=3)):
        call[name] = draw(arrays(*shapes[name]))
    if "query_offset" in call and draw(st.booleans()):
        call["query_offset"] = np.array([draw(NUMBERS)])
    return call


@st.composite
def calls(draw: st.DrawFn) -> dict:
    """A valid call with up to three changes."""
    call = draw(valid())
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.integers(0, 5))
        if kind == 0:
            call[draw(st.sampled_from(["query", "key", "value"]))] = draw(any_array())
        elif kind == 1:
            call[draw(st.sampled_from(OPTIONAL))] = draw(any_array())
        elif kind == 2:
            call[draw(st.sampled_from(INTEGERS))] = draw(NUMBERS)
        elif kind == 3:
            call[draw(st.sampled_from(STRINGS))] = draw(WORDS)
        elif kind == 4:
            call[draw(st.sampled_from(["scale", "softcap"]))] = draw(FLOATS)
        else:
            call["packed_columns"] = draw(st.lists(NUMBERS, min_size=5, max_size=6))
            call |= {name: draw(any_array()) for name in ("query", "key", "value")}
            call |= {"q_num_heads": draw(NUMBERS), "kv_num_heads": draw(NUMBERS), "head_dim": draw(NUMBERS)}
    return call


@settings(max_examples=1000, deadline=None)
@given(calls(), st.booleans(), st.booleans())
def test_a_call_runs_or_is_refused_in_one_sentence(call: dict, present: bool, lse: bool) -> None:
    arguments = call | {"return_present": present, "return_lse": lse}
    before = {name: x.tobytes() for name, x in call.items() if isinstance(x, np.ndarray)}
    try:
        results = faplugin.attention(**arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        assert str(error) and "\n" not in str(error)
    else:
        results = results if isinstance(results, tuple) else (results,)
        assert len(results) == 1 + 2 * present + lse
        assert all(isinstance(result, np.ndarray) for result in results)
    assert before == {name: call[name].tobytes() for name in before}, "inputs are only read"
