# SPDX-License-Identifier: Apache-2.0
"""faplugin.attention_backward on NumPy arrays: layouts, packed columns, broadcast biases, memory that is given."""

from __future__ import annotations

import dataclasses

import faplugin
import numpy as np
import pytest

from tests import cases, reference, reference_backward
from tests.dlpack_only import DLPackOnly
from tests.problems import Case


def arguments_of(problem) -> dict:
    attributes = {name: value for name, value in problem.attributes.items() if not name.startswith("optional_")}
    return {**problem.inputs, **attributes}


def run(problem, d_lse=None, **options):
    """Gradients by the names of tests/reference_backward.py, [B, H, S, D], and d_out in that layout."""
    arguments = arguments_of(problem)
    output, lse = faplugin.attention(**arguments, return_lse=True)
    rng = np.random.default_rng(0)
    d_output = rng.standard_normal(output.shape, np.float32).astype(output.dtype)
    d_lse = rng.standard_normal(lse.shape, np.float32)
    bias = reference_backward.bias_name(problem)
    wanted = [name for name in (bias, "sinks") if name in problem.inputs]
    found = faplugin.attention_backward(d_output, output, lse, **arguments, d_lse=d_lse, wanted=wanted, **options)
    attributes = reference.DEFAULTS | problem.attributes
    inputs = problem.inputs | {name: found[name] for name in ("query", "key", "value")}
    operands = reference.operands(dataclasses.replace(problem, inputs=inputs), attributes)
    results = dict(zip(("query", "key", "value"), operands, strict=True))
    results |= {"bias" if name == bias else name: found[name] for name in wanted}
    rank_says = "BSH" if output.ndim == 3 else "BHSD"
    layout = attributes.get("output_layout") or attributes.get("query_layout") or rank_says
    if layout == "BSH":
        d_output = d_output.reshape(*d_output.shape[:2], lse.shape[1], -1)
    d_out = d_output if layout == "BHSD" else d_output.transpose(0, 2, 1, 3)
    return results, d_out, d_lse


# Packed columns are one array: its gradient is one, too.
SAMPLE = [case for case in cases.quick()[::3] if cases.has_gradients(case) and case.layout not in ("QKV", "HQKV")]


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_case(case):
    problem = case.problem()
    results, d_out, d_lse = run(problem)
    reference_backward.check(results, problem, d_out, d_lse)


@pytest.mark.parametrize("layout", ["QKV", "HQKV"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_packed_columns_are_packed(layout, dtype):
    problem = Case(dtype, 2, 2, 2, 33, 33, 16, 8, layout=layout, is_causal=True).problem()
    packed = problem.inputs["query"]
    gradient = np.full(packed.shape, np.nan, np.float32).astype(packed.dtype)
    results, d_out, d_lse = run(problem, out=dict.fromkeys(("query", "key", "value"), gradient))
    reference_backward.check(results, problem, d_out, d_lse)
    assert np.isfinite(gradient.astype(np.float32)).all()


def test_gradients_are_written_to_views_of_one_array():
    rng = np.random.default_rng(0)
    packed = rng.standard_normal((2, 10, 3, 4, 8), np.float32)
    query, key, value = (packed[:, :, i] for i in range(3))
    layouts = {f"{name}_layout": "BSHD" for name in ("query", "key", "value")}
    output, lse = faplugin.attention(query, key, value, return_lse=True, **layouts)
    d_output, gradient = rng.standard_normal(output.shape, np.float32), np.full_like(packed, np.nan)
    out = {name: gradient[:, :, i] for i, name in enumerate(("query", "key", "value"))}
    faplugin.attention_backward(d_output, output, lse, query, key, value, out=out, **layouts)
    apart = faplugin.attention_backward(
        d_output, output, lse, *(np.ascontiguousarray(x) for x in (query, key, value)), **layouts
    )
    assert all(np.array_equal(out[name], apart[name]) for name in out)


def test_views_of_one_array_that_overlap_are_no_memory_for_gradients():
    """Shifted against each other, by a row or a head, and each row shifted against the next."""
    query, key, value, d_output = (np.ones((2, 4, 5, 8), np.float32) for _ in range(4))
    output, lse = faplugin.attention(query, key, value, return_lse=True)
    rows, heads = np.empty((2, 4, 6, 8), np.float32), np.empty((2, 5, 5, 8), np.float32)
    for views in ([rows[:, :, :5], rows[:, :, 1:]], [heads[:, :4], heads[:, 1:]]):
        with pytest.raises(ValueError, match="d_value shares memory with d_key; give it memory of its own"):
            faplugin.attention_backward(
                d_output, output, lse, query, key, value, out=dict(zip(("key", "value"), views, strict=True))
            )
    folded = np.lib.stride_tricks.as_strided(heads, (2, 4, 5, 8), (*heads.strides[:2], 16, 4))
    with pytest.raises(ValueError, match="d_key has strides .* so that its elements share memory, but it is written"):
        faplugin.attention_backward(d_output, output, lse, query, key, value, out={"key": folded})


SHAPE = (1, 2, 5, 4)
ONES = np.ones(SHAPE, np.float32)
REFUSED = [
    ({"empty_row": "mean"}, RuntimeError, "no backward pass with empty_row 'mean'"),
    ({"past_key": ONES, "past_value": ONES}, RuntimeError, "no backward pass through a cache"),
    ({"wanted": ["sinks"]}, ValueError, "the gradient of sinks is wanted, but the call has no sinks"),
    ({"wanted": ["lse"]}, ValueError, "there is no gradient of lse; expected one of query, key, value"),
    (
        {"out": {"key": np.ones((1, 2, 6, 4), np.float32)}},
        ValueError,
        r"d_key has shape \[1, 2, 6, 4\]; expected that of",
    ),
    ({"out": {"key": ONES}}, ValueError, "d_key shares memory with query"),
    ({"out": [ONES]}, TypeError, "out is a list; expected a dict of arrays by name"),
    ({"out": {"query": None}}, TypeError, "d_query is missing"),
    ({"out": {3: ONES}}, ValueError, "there is no gradient of 3; expected one of query, key, value"),
    ({"wanted": "sinks"}, TypeError, "wanted is 'sinks'; expected a list of names"),
    ({"wanted": np.asarray("sinks")}, TypeError, "wanted is a ndarray; expected a list of names"),
    ({"wanted": 5}, TypeError, "wanted is 5; expected a list of names"),
    ({"wanted": [ONES]}, ValueError, "there is no gradient of a ndarray; expected one of query"),
    ({"d_lse": ((1, 2, 5), "float32")}, ValueError, "d_lse is a specification without memory"),
    (
        {"d_lse": np.ones((1, 2, 4), np.float32)},
        ValueError,
        r"d_lse is float32 \[1, 2, 4\]; expected float32 \[1, 2, 5\], row-major",
    ),
]


@pytest.mark.parametrize(("changes", "error", "sentence"), REFUSED, ids=[sentence for *_, sentence in REFUSED])
def test_refused(changes, error, sentence):
    lse = np.ones(SHAPE[:3], np.float32)
    with pytest.raises(error, match=sentence):
        faplugin.attention_backward(ONES, ONES, lse, ONES, ONES, ONES, **changes)


def test_arrays_of_any_framework_have_gradients():
    """Whose shapes only DLPack tells."""
    query, key, value, d_output = (np.full(SHAPE, x, np.float32) for x in (1, 2, 3, 4))
    output, lse = faplugin.attention(query, key, value, return_lse=True)
    expected = faplugin.attention_backward(d_output, output, lse, query, key, value)
    found = faplugin.attention_backward(*map(DLPackOnly, (d_output, output, lse, query, key, value)))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_gradients_have_memory_that_nothing_else_reads_or_writes():
    query, key, value, d_output = (np.ones(SHAPE, np.float32) for _ in range(4))
    output, lse = faplugin.attention(query, key, value, return_lse=True)
    same = np.empty_like(query)
    for out, sentence in (
        ({"key": d_output}, "d_key shares memory with d_output"),
        ({"value": output}, "d_value shares memory with output"),
        ({"query": same, "key": same}, "d_key shares memory with d_query"),
    ):
        with pytest.raises(ValueError, match=sentence):
            faplugin.attention_backward(d_output, output, lse, query, key, value, out=out)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 5, 1)], ids=str)
def test_the_gradient_of_a_bias_that_no_key_reads_is_0(shape):
    query, empty, bias = np.ones(SHAPE, np.float32), np.ones((1, 2, 0, 4), np.float32), np.ones(shape, np.float32)
    output, lse = faplugin.attention(query, empty, empty, attn_bias=bias, return_lse=True)
    out = {"attn_bias": np.full(shape, np.nan, np.float32)}
    faplugin.attention_backward(output, output, lse, query, empty, empty, attn_bias=bias, out=out)
    assert not out["attn_bias"].any()


@pytest.mark.parametrize("shape", [(1, 1, 0, 5), (2, 2, 0, 1), (1, 2, 0, 0)])
def test_nothing_is_written_to_a_gradient_without_elements(shape):
    """NumPy gives such an array strides of 0, as a broadcast one has. Behind this one lies memory of others."""
    memory = np.ones(8, np.float32)
    gradient = np.lib.stride_tricks.as_strided(memory[4:], shape, (0, 0, 0, 0))
    query, key = np.ones((2, 2, 0, 4), np.float32), np.ones((2, 2, 5 * (shape[3] > 0), 4), np.float32)
    bias = {"attn_bias": np.zeros(shape, np.float32)}
    output, lse = faplugin.attention(query, key, key, return_lse=True, **bias)
    faplugin.attention_backward(output, output, lse, query, key, key, **bias, out={"attn_bias": gradient})
    assert memory.all()


def test_the_gradient_of_a_mask_is_that_of_a_float_mask_alone():
    mask, bias = np.ones((1, 1, 5, 5), np.bool_), np.zeros((1, 1, 5, 5), np.float32)
    lse = np.ones(SHAPE[:3], np.float32)
    with pytest.raises(ValueError, match="beside an attn_bias"):
        faplugin.attention_backward(
            ONES, ONES, lse, ONES, ONES, ONES, attn_mask=mask, attn_bias=bias, wanted=["attn_mask"]
        )
    with pytest.raises(ValueError, match="of a bool attn_mask"):
        faplugin.attention_backward(ONES, ONES, lse, ONES, ONES, ONES, attn_mask=mask, wanted=["attn_mask"])
