# SPDX-License-Identifier: Apache-2.0
"""What the API refuses and with which sentence, what explain() says, append_kv, and what csrc/ may not contain."""

from __future__ import annotations

import re
import subprocess

import ml_dtypes
import numpy as np
import pytest

from tests.csrc.conftest import ROOT


def normal(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def fields(**changes) -> dict:
    """A valid problem; a change of None takes a field away."""
    valid = {
        "query": normal(2, 4, 5, 8),
        "key": normal(2, 2, 7, 8),
        "value": normal(2, 2, 7, 6),
        "out": normal(2, 4, 5, 6),
        "softmax_scale": 1.0,
    } | changes
    return {name: value for name, value in valid.items() if value is not None}


CU = np.array([0, 2, 5], np.int32)
PACKED = {
    name: normal(1, *shape)
    for name, shape in {"query": (4, 5, 8), "key": (2, 5, 8), "value": (2, 5, 6), "out": (4, 5, 6)}.items()
}
FLOAT8 = {
    name: normal(*shape, dtype=ml_dtypes.float8_e4m3fn)
    for name, shape in {"query": (2, 4, 5, 8), "key": (2, 2, 7, 8), "value": (2, 2, 7, 6)}.items()
}
REFUSED = [
    ({"query": None}, "query is missing"),
    (
        {"query": normal(2, 4, 5, 8).astype(np.int32)},
        "query has dtype int32, expected float32, float16, bfloat16 or float8_e4m3fn",
    ),
    ({"key": normal(2, 2, 7, 8, dtype=np.float16)}, "key has dtype float16, expected float32 as query"),
    ({"out": normal(2, 4, 5, 6, dtype=ml_dtypes.bfloat16)}, "out has dtype bfloat16, expected float32 as query"),
    (
        {"key": normal(2, 3, 7, 8), "value": normal(2, 3, 7, 6)},
        "query has 4 heads and key 3, expected a multiple of key's",
    ),
    ({"key": normal(2, 2, 7, 9)}, "key has shape [2, 2, 7, 9], expected [2, 2, 7, 8] (batch, kv heads, keys"),
    ({"value": normal(2, 2, 6, 6)}, "value has shape [2, 2, 6, 6], expected [2, 2, 7, 6] (batch, heads and rows"),
    ({"out": normal(2, 4, 5, 8)}, "out has shape [2, 4, 5, 8], expected [2, 4, 5, 6] (batch, heads and rows"),
    ({"key": normal(2, 2, 8, 7).swapaxes(2, 3)}, "key has stride 7 on its last axis, expected 1 (contiguous)"),
    ({"query": normal(2, 4, 5, 0), "key": normal(2, 2, 7, 0)}, "query has head_dim 0, expected at least 1"),
    (
        {"query": np.broadcast_to(normal(1, 4, 1, 8), (2**26, 4, 2**26, 8))},
        "query has shape [67108864, 4, 67108864, 8], more than fits a memory",
    ),
    ({"out": np.broadcast_to(normal(1, 4, 5, 6), (2, 4, 5, 6))}, "out has stride 0 on axis 0, but it is written"),
    ({"lse": normal(2, 4, 5, dtype=np.float16)}, "lse has dtype float16, expected float32"),
    ({"lse": normal(2, 4, 6)}, "lse has shape [2, 4, 6], expected [2, 4, 5] (batch, heads and rows of query)"),
    ({"mask": normal(2, 4, 5, 7)}, "mask has dtype float32, expected bool"),
    ({"mask": np.ones((2, 4, 5, 8), bool)}, "mask has 8 keys on its last axis, expected at most the 7 of key"),
    (
        {"mask": np.ones((2, 1, 5, 7), bool)},
        "mask has shape [2, 1, 5, 7], expected [2, 4, 5, 7] (batch, heads and rows of query",
    ),
    ({"bias": np.ones((2, 4, 5, 7), bool)}, "bias has dtype bool, expected float32, float16 or bfloat16"),
    ({"kv_lengths": np.ones(3, np.int64)}, "kv_lengths has shape [3], expected [2] (batch)"),
    ({"kv_lengths": normal(2)}, "kv_lengths has dtype float32, expected int32 or int64"),
    ({"query_offsets": np.ones(1, np.int64)}, "query_offsets has shape [1], expected [2] (batch)"),
    ({"alibi_slopes": normal(2, 3)}, "alibi_slopes has shape [2, 3], expected [2, 4] (batch, query heads)"),
    ({"sinks": normal(3)}, "sinks has shape [3], expected [4] (query heads)"),
    ({"query_bias": normal(4, 7)}, "query_bias has shape [4, 7], expected [4, 8] (query heads, head_dim)"),
    ({"query_bias": normal(4, 8, dtype=np.float16)}, "query_bias has dtype float16, expected float32 as query"),
    (
        FLOAT8 | {"query_bias": normal(4, 8)},
        "query_bias is given, but query is float8_e4m3fn; expected float32, float16 or bfloat16",
    ),
    (
        {"empty_row_value": normal(4, 8)},
        "empty_row_value has shape [4, 8], expected [4, 6] (query heads, head_dim_v)",
    ),
    ({"query_descale": normal(2, 4)}, "query_descale is given, but query is float32; expected float8_e4m3fn"),
    (
        FLOAT8 | {"out": normal(2, 4, 5, 6).astype(np.int8)},
        "out has dtype int8, expected float32, float16, bfloat16 or",
    ),
    (FLOAT8 | {"value": normal(2, 2, 7, 6)}, "value has dtype float32, expected float8_e4m3fn as query"),
    (FLOAT8 | {"key_descale": normal(2, 4)}, "key_descale has shape [2, 4], expected [2, 2] (batch, heads)"),
    (FLOAT8 | {"value_descale": np.ones((2, 2), np.int32)}, "value_descale has dtype int32, expected float32"),
    (FLOAT8 | {"output_scale": normal(2, 4)}, "output_scale is given, but out is float32; expected float8_e4m3fn"),
    ({"cu_seqlens_q": CU}, "cu_seqlens_kv is missing; both or none"),
    ({"cu_seqlens_q": CU, "cu_seqlens_kv": CU}, "query has batch 2, expected 1 with packed sequences"),
    (
        PACKED | {"cu_seqlens_q": CU, "cu_seqlens_kv": CU.astype(np.int64)},
        "cu_seqlens_kv has dtype int64, expected int32",
    ),
    (
        PACKED | {"cu_seqlens_q": CU, "cu_seqlens_kv": CU[:2]},
        "cu_seqlens_kv has shape [2], expected [3] (as cu_seqlens_q)",
    ),
    (
        PACKED | {"cu_seqlens_q": CU, "cu_seqlens_kv": CU, "mask": np.ones((1, 4, 5, 5), bool)},
        "mask does not go together with packed",
    ),
    ({"softmax_scale": float("nan")}, "softmax_scale is nan, expected a finite number"),
    ({"softcap": -1.0}, "softcap is -1.000000, expected 0 (none) or more"),
    ({"window_left": -2}, "window_left is -2, expected -1 (open) or more"),
    ({"window_right": 2**61}, "a window is above 2^60, expected -1 for an open one"),
    ({"query_offset": -(2**61)}, "query_offset is -2305843009213693952, expected at most 2^60 either way"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_refused(fa_csrc, changes, sentence):
    problem = fields(**changes)
    before = problem["out"].copy()
    for call in (fa_csrc.validate, fa_csrc.attention):
        code, text = call(problem)
        assert (code, text[: len(sentence)]) == (1, sentence)
    assert np.array_equal(problem["out"].view(np.uint8), before.view(np.uint8)), "nothing is written"
    assert fa_csrc.explain(problem) == f"no kernel: {text}"


def test_valid(fa_csrc):
    assert fa_csrc.validate(fields()) == (0, "")
    assert fa_csrc.attention(fields(), kernel="cpu") == (0, "")


def test_explain(fa_csrc):
    assert fa_csrc.explain(fields()).startswith("cpu: chosen\ncpu: runs this problem")
    assert fa_csrc.explain(fields(), 90).startswith("no kernel\ncpu: runs on the CPU only")


@pytest.mark.parametrize("sizes", [(0, 0, 8, 6), (0, 2, 8, 6), (4, 2, 8, 0), (4, 2, 0, 0)])
def test_nothing_to_compute(fa_csrc, sizes):
    heads, heads_kv, head_dim, head_dim_v = sizes
    problem = fields(
        query=normal(2, heads, 5, head_dim),
        key=normal(2, heads_kv, 7, head_dim),
        value=normal(2, heads_kv, 7, head_dim_v),
        out=normal(2, heads, 5, head_dim_v),
    )
    assert fa_csrc.attention(problem) == (0, "")


def test_unknown_kernel(fa_csrc):
    assert fa_csrc.attention(fields(), kernel="prefill_sm20") == (2, "there is no kernel 'prefill_sm20'; there are cpu")


def test_a_launch_that_needs_more_than_was_reserved_is_refused(fa_csrc):
    problem = fields()
    before = problem["out"].copy()
    assert fa_csrc.attention_in(problem, 100, 99) == (
        1,
        "cpu needs a workspace of 100 bytes, but the context has 99",
    )
    assert np.array_equal(problem["out"], before), "nothing is written"
    assert fa_csrc.attention_in(problem, 100, 100) == (0, "")


def test_a_launch_without_a_plan_is_refused(fa_csrc):
    assert fa_csrc.launch_without_plan(fields()) == (1, "there is no plan: plan() was not called or has failed")


@pytest.mark.parametrize(("field", "name"), [("query", "query"), ("out", "output"), ("kv_lengths", "kv_lengths")])
def test_a_tensor_without_memory_is_refused(fa_csrc, field, name):
    problem = fields(kv_lengths=np.array([3, 7]))
    assert fa_csrc.attention_without_data(problem, field) == (1, f"{name} has elements but no data")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("threads", [0, 3])
def test_append_kv(fa_csrc, dtype, threads):
    past, fresh = normal(2, 3, 4, 5, dtype=dtype), normal(2, 6, 3, 5, dtype=dtype).swapaxes(1, 2)
    present = np.full((2, 3, 12, 5), np.nan, np.float32).astype(dtype)
    assert fa_csrc.append_kv(past, fresh, present[:, :, :10], threads) == (0, "")
    assert np.array_equal(present[:, :, :10], np.concatenate([past, fresh], axis=2))
    assert np.isnan(present[:, :, 10:].astype(np.float32)).all(), "nothing beyond is touched"


def test_append_kv_refuses(fa_csrc):
    code, text = fa_csrc.append_kv(normal(2, 3, 4, 5), normal(2, 3, 6, 5), normal(2, 3, 9, 5))
    assert code == 1 and text.startswith(
        "present has shape [2, 3, 9, 5], past [2, 3, 4, 5] and fresh [2, 3, 6, 5]; expected"
    )
    code, text = fa_csrc.append_kv(normal(2, 3, 4, 5), normal(2, 3, 6, 5, dtype=np.float16), normal(2, 3, 10, 5))
    assert (code, text) == (1, "past, fresh and present have different dtypes, expected the same")


FOREIGN = re.compile(r'#\s*include\s*[<"](onnxruntime|NvInfer|torch|ATen|c10|Python\.h|pybind11|numpy)')


def test_the_core_includes_no_framework():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh", ".def"}]
    assert len(sources) > 10
    found = [path for path in sources if FOREIGN.search(path.read_text())]
    assert not found


def test_semantics_include_only_the_standard_library_and_each_other():
    for path in (ROOT / "csrc" / "semantics").glob("*.h"):
        included = re.findall(r'#\s*include\s*"([^"]+)"', path.read_text())
        assert all(name.startswith("semantics/") or name == "fa/attention.h" for name in included), path


def test_no_instruction_set_leaks_out_of_its_sources(module_path):
    """A weak symbol from the AVX-512 source could be linked into the code for every processor."""
    objects = [path for path in module_path.parent.rglob("cpu_*_*.o") if "baseline" not in path.name]
    symbols = subprocess.run(["nm", "--defined-only", *objects], capture_output=True, text=True, check=True).stdout
    leaked = [line for line in symbols.splitlines() if re.search(r" [WVu] ", line)]
    assert not leaked
