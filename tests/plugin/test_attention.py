# SPDX-License-Identifier: Apache-2.0
"""faplugin.attention and explain: arrays of several frameworks, strides, memory given by the caller, errors."""

from __future__ import annotations

import re

import faplugin
import ml_dtypes
import numpy as np
import pytest

from tests import cases, tolerances
from tests.dlpack_only import DLPackOnly
from tests.problems import Problem


def run(problem: Problem, **options) -> dict[str, np.ndarray]:
    """A problem of tests/cases.py through faplugin.attention."""
    attributes = {name: x for name, x in problem.attributes.items() if not name.startswith("optional_")}
    wanted = {"return_present": "present_key" in problem.outputs, "return_lse": "lse" in problem.outputs}
    results = faplugin.attention(**problem.inputs, **attributes, **wanted, **options)
    return dict(zip(problem.outputs, results if isinstance(results, tuple) else (results,), strict=True))


@pytest.mark.parametrize("case", [*cases.quick()[::3], *cases.empty()], ids=str)
def test_case(case: cases.Case) -> None:
    problem = case.problem()
    tolerances.check(run(problem), problem)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


QUERY, KEY, VALUE = normal(2, 4, 9, 16), normal(2, 2, 33, 16), normal(2, 2, 33, 24)


def test_threads_make_no_difference() -> None:
    one, many = (faplugin.attention(QUERY, KEY, VALUE, num_threads=count) for count in (1, 7))
    assert np.array_equal(one, many)


def test_strided_views_are_read_in_place() -> None:
    expected = faplugin.attention(QUERY, KEY, VALUE)
    padded = np.full((2, 9, 4, 40), np.nan, np.float32)  # [B, S, H, D], padding of NaN on every side
    padded[..., 7:23] = QUERY.transpose(0, 2, 1, 3)
    wide = np.full((2, 2, 66, 16), np.nan, np.float32)
    wide[:, :, ::2] = KEY
    assert np.array_equal(faplugin.attention(padded[..., 7:23].transpose(0, 2, 1, 3), wide[:, :, ::2], VALUE), expected)
    layouts = {"query_layout": "BSHD", "output_layout": "BHSD"}
    assert np.array_equal(faplugin.attention(padded[..., 7:23], KEY, VALUE, **layouts), expected)


def test_read_only_arrays() -> None:
    query = QUERY.copy()
    query.flags.writeable = False
    assert np.array_equal(faplugin.attention(query, KEY, VALUE), faplugin.attention(QUERY, KEY, VALUE))


def test_results_go_where_the_caller_says() -> None:
    expected, lse = faplugin.attention(QUERY, KEY, VALUE, return_lse=True)
    memory = np.full_like(expected, np.nan)
    output, _ = faplugin.attention(QUERY, KEY, VALUE, return_lse=True, out={"output": memory})
    assert output is memory and np.array_equal(memory, expected)
    shape = str(list(memory.shape))
    for wrong, sentence in (
        (memory[..., :-1], f"output is float32 {[*memory.shape[:-1], memory.shape[-1] - 1]}; expected float32 {shape}"),
        (memory.astype(np.float16), f"output is float16 {shape}; expected float32 {shape}, row-major"),
        (memory.swapaxes(0, 1).copy().swapaxes(0, 1), f"output is float32 {shape} and not row-major; expected float32"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
            faplugin.attention(QUERY, KEY, VALUE, out={"output": wrong})
    with pytest.raises(TypeError, match="out is a ndarray; expected a dict of arrays by name"):
        faplugin.attention(QUERY, KEY, VALUE, out=memory)
    with pytest.raises(ValueError, match=r"out has \['outptu'\]; this call returns \['output'\]"):
        faplugin.attention(QUERY, KEY, VALUE, out={"outptu": memory})
    memory.flags.writeable = False
    with pytest.raises(ValueError, match="output is read-only"):
        faplugin.attention(QUERY, KEY, VALUE, out={"output": memory})


def test_results_share_no_memory_with_inputs() -> None:
    memory = normal(3, 4, 9, 16)
    with pytest.raises(ValueError, match="output shares memory with query; give it memory of its own"):
        faplugin.attention(memory[:2], KEY, KEY, out={"output": memory[1:]})
    faplugin.attention(memory[:1], KEY[:1], KEY[:1], out={"output": memory[1:2]})


def test_results_share_no_memory_with_one_another() -> None:
    memory = np.zeros(2 * 4 * 9 * 24, np.float32)
    out = {"output": memory.reshape(2, 4, 9, 24), "lse": memory[:72].reshape(2, 4, 9)}
    with pytest.raises(ValueError, match="lse shares memory with output; give it memory of its own"):
        faplugin.attention(QUERY, KEY, VALUE, return_lse=True, out=out)
    same = np.zeros((2, 2, 33, 16), np.float32)
    with pytest.raises(ValueError, match="present_value shares memory with present_key"):
        faplugin.attention(QUERY, KEY, KEY, return_present=True, out={"present_key": same, "present_value": same})


def test_a_value_that_nobody_sees_has_no_part_in_rows_of_any_width() -> None:
    """A row into which it has come is computed anew, its query in a place of its own."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 1, rows, 3000), dtype=np.float32) for rows in (3, 5, 5))
    mask = np.array([True, True, False, True, True])
    expected = faplugin.attention(query, key, value, attn_mask=mask)
    value[0, 0, 2] = np.nan
    np.testing.assert_allclose(faplugin.attention(query, key, value, attn_mask=mask), expected, atol=1e-5)


def test_a_bool_of_numpy_is_one_of_python() -> None:
    expected = faplugin.attention(QUERY, KEY, VALUE, is_causal=True)
    assert np.array_equal(faplugin.attention(QUERY, KEY, VALUE, is_causal=np.True_), expected)


def test_distances_without_end_are_open_windows() -> None:
    expected = faplugin.attention(QUERY, KEY, VALUE)
    assert np.array_equal(faplugin.attention(QUERY, KEY, VALUE, left_window_size=2**63 - 1), expected)
    assert np.array_equal(faplugin.attention(QUERY, KEY, VALUE, right_window_size=2**63 - 1), expected)


def test_any_array_with_dlpack() -> None:
    output = faplugin.attention(DLPackOnly(QUERY), DLPackOnly(KEY), DLPackOnly(VALUE))
    assert np.array_equal(output, faplugin.attention(QUERY, KEY, VALUE))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pytorch(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    query, key, value = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in (QUERY, KEY, VALUE))
    query.requires_grad_()
    output = faplugin.attention(query, key, value, is_causal=True)
    assert isinstance(output, torch.Tensor) and output.dtype == query.dtype and output.shape == (2, 4, 9, 24)
    expected = faplugin.attention(*(x.detach().float().numpy() for x in (query, key, value)), is_causal=True)
    assert np.allclose(
        output.float().numpy(), expected, atol={"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    )


FLOAT8 = {name: x.astype(ml_dtypes.float8_e4m3fn) for name, x in (("query", QUERY), ("key", KEY), ("value", VALUE))}


def test_float8_descales_are_factors_of_their_tensors() -> None:
    rng = np.random.default_rng(0)
    factors = {"query_descale": (2, 4), "key_descale": (2,), "value_descale": (2, 2), "output_scale": ()}
    factors = {name: np.asarray(rng.uniform(0.5, 2, shape), np.float32) for name, shape in factors.items()}
    scale = factors.pop("output_scale")
    output = faplugin.attention(**FLOAT8, **factors, output_dtype="float32")
    query, key, value = (
        FLOAT8[name].astype(np.float32) * np.reshape(factors[f"{name}_descale"], shape)
        for name, shape in (("query", (2, 4, 1, 1)), ("key", (1, 2, 1, 1)), ("value", (2, 2, 1, 1)))
    )
    np.testing.assert_allclose(output, faplugin.attention(query, key, value), rtol=0, atol=2e-6)
    small = faplugin.attention(**FLOAT8, **factors, output_dtype="float8_e4m3fn", output_scale=scale / 64)
    assert small.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_allclose(small.astype(np.float32) * scale / 64, output, rtol=2**-4, atol=1e-3)


def test_a_float8_output_saturates() -> None:
    large = faplugin.attention(**FLOAT8, output_dtype="float8_e4m3fn", output_scale=np.array([1e-12], np.float32))
    assert set(np.unique(np.abs(large.astype(np.float32)))) == {448.0}


def test_a_float8_query_gives_bfloat16() -> None:
    assert faplugin.attention(**FLOAT8).dtype == ml_dtypes.bfloat16


class Silent:
    """An array that keeps its memory for itself."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self) -> object:
        raise BufferError("no")


class Sized:
    """It has a length, but no elements."""

    def __len__(self) -> int:
        return 6


class Mistaken(Silent):
    def __dlpack__(self) -> object:
        return 5


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (
            {"key": KEY.astype(np.float64)},
            TypeError,
            "key is float64, which .* convert it: numbers to float32",
        ),
        ({"key": KEY.astype(np.float16)}, ValueError, "key is float16; expected float32, as query"),
        (
            {"query": QUERY.astype(np.int32)},
            ValueError,
            "query is int32; expected float32, .*float16 or float8",
        ),
        ({"key": KEY[:, :1, :, :8]}, ValueError, r"key has shape \[2, 1, 33, 8\]"),
        ({"value": "abc"}, TypeError, "value is a str; expected an array with __dlpack__"),
        ({"attn_mask": np.ones((9, 34), bool)}, ValueError, r"attn_mask has shape \[9, 34\]; expected something that"),
        ({"query": QUERY[None]}, ValueError, "query has rank 5; expected 4 at most"),
        ({"query": QUERY.astype(">f4")}, TypeError, "query has another byte order than this machine"),
        (
            {"query": QUERY[..., ::2], "key": KEY[..., :8]},
            ValueError,
            "query has stride 2 on its last axis",
        ),
        (
            {"output_dtype": "float16"},
            ValueError,
            "output_dtype is 'float16' and query float32; expected the query's dtype",
        ),
        ({"output_dtype": "int8"}, ValueError, "output_dtype is 'int8'; expected one of 'float32'"),
        ({"key_descale": np.ones(2, np.float32)}, ValueError, "key_descale is given, but query is float32"),
        (
            FLOAT8 | {"key_descale": np.ones(3, np.float32)},
            ValueError,
            r"key_descale has shape \[3\]; expected \[\], \[1\]",
        ),
        (FLOAT8 | {"value": VALUE}, ValueError, "value is float32; expected float8_e4m3fn, as query"),
        ({"alignment": "left"}, ValueError, "alignment is 'left'; expected one of"),
        ({"scale": "1"}, TypeError, "scale is '1'; expected a number"),
        ({"scale": 1e-50}, ValueError, "scale is 1e-50; expected 0, or a number that is another in float32"),
        ({"packed_columns": 5}, TypeError, "packed_columns is 5; expected a list of integers"),
        ({"query": np.zeros((2, 4, 9, 16), [("x", "f4")])}, TypeError, "query is void32, which the operator does not"),
        ({"num_threads": -1}, ValueError, "num_threads is -1; expected 0"),
        ({"q_num_heads": 2**40}, ValueError, "q_num_heads is 1099511627776; expected 2147483647 at most"),
        ({"kernel": "cpu\0"}, TypeError, r"kernel is 'cpu\\x00'; expected a string"),
        ({"alignment": "\ud800"}, ValueError, "alignment is .*; expected one of 'onnx'"),
        ({"scale": 10**400}, TypeError, "scale is 1000.*; expected a number"),
        ({"return_lse": np.ones(2)}, TypeError, "return_lse is a ndarray; expected True or False"),
        ({"scale": QUERY}, TypeError, "scale is a ndarray; expected a number"),
        ({"scale": np.asarray("x")}, TypeError, "scale is a ndarray; expected a number"),
        ({"softcap": [QUERY]}, TypeError, "softcap is a list; expected a number"),
        ({"left_window_size": np.float32(1.5)}, TypeError, r"left_window_size is .*1.5\)?; expected an integer"),
        ({"packed_columns": np.asarray(3)}, TypeError, "packed_columns is a ndarray; expected a list of integers"),
        ({"packed_columns": Sized()}, TypeError, "packed_columns is .*; expected a list of integers"),
        ({"key": (3, "float32")}, TypeError, "key is a tuple; expected an array with __dlpack__"),
        (
            {"key": ((2, 2, 33, 16), "float32")},
            ValueError,
            "key is a specification without memory; it can be explained",
        ),
        ({"key": Silent()}, TypeError, "key doesn't hand out its memory by DLPack: BufferError: no"),
        ({"key": Mistaken()}, TypeError, "key has a __dlpack__ that gives no capsule of DLPack's"),
        ({"out": {1: QUERY, "a": QUERY}}, ValueError, r"out has \[1, 'a'\]; this call returns \['output'\]"),
        ({"kernel": "fast"}, RuntimeError, "there is no kernel 'fast'; there are cpu"),
    ],
)
def test_errors(arguments: dict, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        faplugin.attention(**{"query": QUERY, "key": KEY, "value": VALUE, **arguments})


def test_specifications_can_be_explained_but_not_computed() -> None:
    spec = ((1, 8, 128, 64), "bfloat16")
    assert faplugin.explain(spec, spec, spec).startswith("cpu: ")
    with pytest.raises(ValueError, match="query has 8 heads and key 3"):
        faplugin.explain(spec, ((1, 3, 128, 64), "bfloat16"), spec)
    with pytest.raises(ValueError, match="query is a specification without memory"):
        faplugin.attention(spec, spec, spec, out={"output": np.zeros(1)})
    vast = ((2**40, 2**40, 1, 1), "float32")
    with pytest.raises(ValueError, match="expected a tensor that fits a memory"):
        faplugin.explain(vast, vast, vast)
    with pytest.raises(ValueError, match="device is 'sm_70'; expected cpu, cuda, sm_80"):
        faplugin.explain(spec, spec, spec, device="sm_70")
