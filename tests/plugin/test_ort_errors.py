# SPDX-License-Identifier: Apache-2.0
"""Wrong nodes and tensors: each is an error of onnxruntime that names node and input, what it has, what is expected."""

from __future__ import annotations

import numpy as np
import pytest

from tests.plugin import nodes
from tests.plugin.test_ort import normal, operands

MASK = np.ones((5, 7), bool)
CU_SEQLENS = np.array([0, 5], np.int32)


def past(key_rows: int, head_dim: int, value_rows: int, head_dim_v: int) -> dict[str, np.ndarray]:
    return {"past_key": normal(2, 2, key_rows, head_dim), "past_value": normal(2, 2, value_rows, head_dim_v)}


@pytest.mark.parametrize(
    ("inputs", "attributes", "sentence"),
    [
        ({"m": MASK}, {"optional_inputs": "attn_maks"}, "names 'attn_maks'; expected some of attn_mask,"),
        ({"m": MASK}, {"optional_inputs": "attn_mask,attn_mask"}, "optional_inputs names 'attn_mask' twice"),
        ({"m": MASK}, {"optional_inputs": "query"}, "optional_inputs names 'query'"),
        ({"m": MASK}, {}, "the node has 4 inputs; expected 3: query, key, value and what optional_inputs names ('')"),
        ({}, {"optional_inputs": "attn_mask"}, "the node has 3 inputs; expected 4"),
        ({"m": MASK.astype(np.int64)}, {"optional_inputs": "attn_mask"}, "attn_mask is int64; expected bool, float32"),
        ({"m": normal(4).astype(np.float16)}, {"optional_inputs": "sinks"}, "sinks is float16; expected float32"),
        ({"m": MASK.astype(np.float64)}, {"optional_inputs": "attn_bias"}, "attn_bias is of another dtype"),
        ({"m": normal(2, 2, 3, 8)}, {"optional_inputs": "past_key"}, "past_key needs past_value beside it"),
        ({}, {"optional_outputs": "lse"}, "the node has no output lse, but optional_outputs names it"),
        ({}, {"optional_outputs": "lse,present_key"}, "expected the order present_key, present_value, lse"),
        ({}, {"alignment": "bottom"}, "alignment is 'bottom'; expected one of 'onnx', 'top_left', 'bottom_right'"),
        ({}, {"query_layout": "BSDH"}, "query_layout is 'BSDH'; expected one of 'BHSD', 'BSHD', 'BSH'"),
        ({}, {"is_causal": 2}, "is_causal is 2; expected 0 or 1"),
        ({}, {"left_window_size": -2}, "left_window_size is -2; expected -1 or more"),
        ({}, {"softcap": -1.0}, "softcap is -1.000000; expected 0 or more"),
        ({}, {"scale": float("nan")}, "scale is not a finite number"),
        ({}, {"scale": 1}, "the attribute scale is of another type; expected FLOAT"),
        ({}, {"scale": [0.5]}, "the attribute scale is of another type; expected FLOAT"),
        ({}, {"head_dim": [64]}, "the attribute head_dim is of another type; expected INT"),
        ({}, {"packed_columns": [1, 2]}, "packed_columns has 2 numbers; expected 6"),
    ],
)  # fmt: skip
def test_wrong_node_is_refused_at_creation(inputs: dict, attributes: dict, sentence: str) -> None:
    with pytest.raises(Exception, match="(?s)node 'attention': ") as error:
        nodes.session(nodes.make_model(operands(**inputs), attributes))
    assert sentence in str(error.value)


def test_output_that_is_not_named() -> None:
    with pytest.raises(Exception, match="the node has the output lse, but optional_outputs doesn't name it"):
        nodes.session(nodes.make_model(operands(), {}, ["output", "lse"]))


@pytest.mark.parametrize("slots", [["query", "key"], ["query", "", "value"], ["query", "key", "value", "", "m"]])
def test_missing_inputs(slots: list[str]) -> None:
    with pytest.raises(Exception, match="FlashAttention"):
        nodes.session(nodes.make_model(operands(m=MASK), {"optional_inputs": "attn_mask"}, slots=slots))


def test_mixed_types() -> None:
    with pytest.raises(Exception, match="no kernel def matches node inputs for Op: FlashAttention"):
        nodes.session(nodes.make_model(operands(key=normal(2, 2, 7, 8).astype(np.float16)), {}))


@pytest.mark.parametrize(
    ("inputs", "attributes", "sentence"),
    [
        ({"query": normal(5, 8)}, {}, "query has rank 2; expected 3 or 4"),
        ({"query": normal(2, 5, 32)}, {}, "query has rank 3 and needs the attribute q_num_heads"),
        ({"key": normal(2, 7, 16)}, {}, "key has rank 3 and needs the attribute kv_num_heads"),
        ({"query": normal(2, 5, 30)}, {"q_num_heads": 4}, "expected a last axis that is a multiple of q_num_heads = 4"),
        ({}, {"query_layout": "BSH"}, "query has rank 4; expected 3 in layout BSH"),
        ({}, {"q_num_heads": 3}, "query has shape [2, 4, 5, 8]; expected q_num_heads = 3 heads"),
        ({"query": normal(2, 3, 5, 8)}, {}, "query has 3 heads and key 2, expected a multiple"),
        ({"query": normal(3, 4, 5, 8)}, {}, "key has shape [2, 2, 7, 8], expected [3, 2, 7, 8]"),
        ({"key": normal(2, 2, 7, 9)}, {}, "key has shape [2, 2, 7, 9], expected [2, 2, 7, 8]"),
        ({"value": normal(2, 2, 8, 6)}, {}, "value has shape [2, 2, 8, 6], expected [2, 2, 7, 6]"),
        ({"attn_mask": np.ones((5, 9), bool)}, {}, "broadcasts to [batch 2, heads 4, query rows 5, keys"),
        ({"attn_mask": np.ones((3, 1, 5, 7), bool)}, {}, "attn_mask has shape [3, 1, 5, 7]"),
        ({"attn_bias": normal(5, 1, 5, 7)}, {}, "attn_bias has shape [5, 1, 5, 7]"),
        ({"attn_mask": normal(5, 7), "attn_bias": normal(5, 7)}, {}, "attn_mask is float32 and attn_bias is there too"),
        ({"nonpad_kv_seqlen": np.array([1, 2, 3])}, {}, "nonpad_kv_seqlen has shape [3]; expected [batch 2]"),
        ({"query_offset": np.array([1, 2, 3])}, {}, "query_offset has shape [3]; expected [1] or [batch 2]"),
        ({"alibi_slopes": normal(3)}, {}, "alibi_slopes has shape [3]; expected [heads 4] or [batch 2, heads 4]"),
        ({"sinks": normal(2)}, {}, "sinks has shape [2]; expected [heads 4]"),
        (past(3, 9, 3, 6), {}, "[2, 2, 3, 9]; expected [batch 2, heads 2, any number of rows, head_dim 8]"),
        (past(3, 8, 4, 6), {}, "past_value has shape [2, 2, 4, 6]; expected 3 rows, as past_key has them"),
        ({"cu_seqlens_q": CU_SEQLENS, "cu_seqlens_kv": CU_SEQLENS}, {}, "query has batch 2, expected 1 with packed"),
    ],
)  # fmt: skip
def test_wrong_tensor_is_refused_at_run_time(inputs: dict, attributes: dict, sentence: str) -> None:
    given = operands(**inputs)
    optional = [name for name in inputs if name not in ("query", "key", "value")]
    if optional:
        attributes = {**attributes, "optional_inputs": ",".join(optional)}
    made = nodes.session(nodes.make_model(given, attributes, shapes=dict.fromkeys(given)))
    with pytest.raises(Exception, match="INVALID_ARGUMENT.*Name:'attention'") as error:
        made.run(None, given)
    assert sentence in str(error.value)


def test_packed_columns_beyond_the_tensor() -> None:
    packed = {"query": normal(2, 5, 96), "key": normal(2, 5, 96), "value": normal(2, 5, 96)}
    attributes = {"q_num_heads": 4, "kv_num_heads": 4, "head_dim": 8, "packed_columns": [0, 8, 32, 8, 64, 16]}
    with pytest.raises(
        Exception, match="value has shape .2, 5, 96.; expected at least 120 columns, as packed_columns says"
    ):
        nodes.session(nodes.make_model(packed, attributes)).run(None, packed)


def test_session_goes_on_after_an_error() -> None:
    made = nodes.session(nodes.make_model(operands(), {}, shapes=dict.fromkeys(operands())))
    (expected,) = made.run(None, operands())
    with pytest.raises(Exception, match="key has shape"):
        made.run(None, operands(key=normal(2, 2, 7, 9)))
    assert np.array_equal(made.run(None, operands())[0], expected)
