# SPDX-License-Identifier: Apache-2.0
"""The backward pass on the CPU, below the adapters: all cases against float64, refusals, repeatability."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from tests import cases, reference, reference_backward
from tests.csrc import views
from tests.problems import Case


def _draw(problem, shape: tuple[int, ...], dtype) -> np.ndarray:
    return np.random.default_rng(shape[2]).standard_normal(shape, np.float32).astype(dtype)


def run(fa_csrc, problem, with_d_lse: bool = False, **options):
    """Gradients by the names of tests/reference_backward.py, and d_out and d_lse that were given."""
    fields, _ = views.fields(dataclasses.replace(problem, outputs=["output", "lse"]))
    assert fa_csrc.attention(fields) == (0, "")
    d_out = _draw(problem, fields["out"].shape, fields["out"].dtype)
    given = {"d_out": d_out} | ({"d_lse": _draw(problem, fields["lse"].shape, np.float32)} if with_d_lse else {})
    operands = ("query", "key", "value")
    written = {f"d_{name}": views.poisoned(fields[name].shape, fields[name].dtype) for name in operands}
    bias = reference_backward.bias_name(problem)
    results = {name: written[f"d_{name}"] for name in operands}
    if bias:
        results["bias"] = views.poisoned(problem.inputs[bias].shape, np.float32)
        written["d_bias"] = views._broadcast(results["bias"], (*fields["query"].shape[:3], fields["key"].shape[2]))
    if "sinks" in fields:
        results["sinks"] = written["d_sinks"] = views.poisoned(fields["sinks"].shape, np.float32)
    status = fa_csrc.attention_backward(fields, given | written, **options)
    return status, results, d_out, given.get("d_lse")


CASES = [case for case in cases.quick() if cases.has_gradients(case)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(fa_csrc, case):
    problem = case.problem()
    status, results, d_out, d_lse = run(fa_csrc, problem, case.seqlen_q % 2 == 0, num_threads=2, corrupt=True)
    assert status == (0, "")
    reference_backward.check(results, problem, d_out, d_lse)


LARGE = [
    Case("float32", 1, 2, 2, 1023, 1023, 64, is_causal=True),
    Case("float16", 1, 4, 2, 513, 1300, 128, layout="BSHD", is_causal=True, window_left=300, alignment="bottom_right"),
    Case("bfloat16", 2, 3, 1, 300, 515, 80, 96, layout="BSH", mask="B11K", bias="1HQK"),
    Case(
        "float16", 2, 8, 2, 3, 1500, 128, is_causal=True, alignment="bottom_right", sinks=True, mask="BHQK", empty=True
    ),
    Case("bfloat16", 3, 2, 1, 400, 600, 40, packed=True, is_causal=True, alignment="bottom_right", alibi="BH"),
    Case("float32", 2, 4, 1, 200, 400, 48, softcap=5.0, bias="B1QK", kv_lengths=True, query_lengths=True, sinks=True),
    Case("float32", 2, 2, 2, 200, 300, 16, bias="1", softcap=2.0),
    Case("float32", 2, 2, 2, 200, 300, 16, bias="1HQ1"),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_many_tiles_are_right_and_bitwise_the_same_on_any_number_of_threads(fa_csrc, case):
    problem = case.problem()
    status, results, d_out, d_lse = run(fa_csrc, problem, True, num_threads=3, corrupt=True)
    assert status == (0, "")
    reference_backward.check(results, problem, d_out, d_lse)
    once = {name: array.tobytes() for name, array in results.items()}
    _, again, _, _ = run(fa_csrc, problem, True)
    assert once == {name: array.tobytes() for name, array in again.items()}


SMALL = [
    Case(
        "float32", 1, 4, 2, 3, 5, 4, 3, softcap=0.7, bias="1HQK", sinks=True, is_causal=True, alignment="bottom_right"
    ),
    Case("float32", 2, 2, 1, 4, 5, 3, alibi="H", mask="B11K", window_left=2, scale=0.9),
    Case("float32", 2, 2, 2, 3, 4, 2, packed=True, sinks=True),
    Case("float32", 2, 2, 1, 4, 6, 3, bias="B1QK", kv_lengths=True, query_lengths=True, is_causal=True),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_oracle_agrees_with_differences_of_the_forward_oracle(case):
    problem = case.problem()
    for name, array in problem.inputs.items():
        if array.dtype == np.float32:
            problem.inputs[name] = np.nan_to_num(array, nan=0.5).astype(np.float64)
    problem.outputs = ["output", "lse"]
    names = [
        name
        for name in ("query", "key", "value", "sinks", reference_backward.bias_name(problem))
        if name in problem.inputs
    ]
    shape = reference.attention(problem)["output"].shape
    rng = np.random.default_rng(0)
    d_out, d_lse = rng.standard_normal(shape), rng.standard_normal(shape[:3])
    found = reference_backward.gradients(problem, d_out, d_lse)

    def loss() -> float:
        outputs = reference.attention(problem)
        lse = np.where(np.isfinite(outputs["lse"]), outputs["lse"], 0)
        return float((outputs["output"] * d_out).sum() + (lse * d_lse).sum())

    step = 1e-5
    for name in names:
        array, gradient = problem.inputs[name], found["bias" if name.startswith("attn") else name]
        for place in np.ndindex(array.shape):
            before = array[place]
            array[place] = before + step
            above = loss()
            array[place] = before - step
            below = loss()
            array[place] = before
            assert abs((above - below) / (2 * step) - gradient[place]) < 1e-6, (name, place)


def test_a_row_without_keys_gets_no_gradient_and_gives_none(fa_csrc):
    problem = Case("float32", 2, 2, 1, 20, 30, 16, mask="B1QK", empty=True).problem()
    empty = ~problem.inputs["attn_mask"].any(axis=-1)[:, 0]
    status, results, _, _ = run(fa_csrc, problem)
    assert status == (0, "") and not np.isnan(results["key"]).any()
    assert not results["query"].transpose(0, 2, 1, 3)[empty].any()


def test_a_nan_reaches_only_the_rows_and_keys_that_see_it(fa_csrc):
    problem = Case("float32", 1, 1, 1, 300, 300, 16, is_causal=True).problem()
    problem.inputs["value"][0, 0, 250] = np.nan
    status, results, _, _ = run(fa_csrc, problem)
    assert status == (0, "")
    assert np.isfinite(results["query"][0, 0, :250]).all() and np.isnan(results["query"][0, 0, 250:]).all()


def test_masks_of_the_least_number_leave_weights_normalised(fa_csrc):
    """The log-sum-exp of such a row is so large that exp(score - lse) knows nothing of how many keys there are."""
    for dtype in (np.float32, ml_dtypes.bfloat16):
        problem = Case("float32", 1, 2, 2, 10, 40, 16, sinks=dtype is np.float32).problem()
        problem.inputs["attn_bias"] = np.zeros((1, 1, 10, 40), dtype)
        problem.inputs["attn_bias"][:, :, ::2] = ml_dtypes.finfo(dtype).min
        problem.attributes["optional_inputs"] = ",".join(
            name for name in problem.inputs if name not in ("query", "key", "value")
        )
        status, results, d_out, _ = run(fa_csrc, problem)
        assert status == (0, "")
        reference_backward.check(results, problem, d_out)


REFUSED = [
    ({"empty_row_mean": True}, {}, 2, "there is no backward pass with empty_row 'mean'"),
    ({"query_bias": np.zeros((4, 8), np.float32)}, {}, 2, "there is no backward pass through query_bias"),
    ({"empty_row_value": np.zeros((4, 6), np.float32)}, {}, 2, "there is no backward pass with empty_row_value"),
    (
        dict.fromkeys(("query", "key", "value"), np.ones((2, 2, 7, 8), ml_dtypes.float8_e4m3fn)),
        {},
        2,
        "there is no backward pass in float8",
    ),
    ({"lse": None}, {}, 1, "lse is missing; the backward pass needs what the forward pass has written"),
    ({}, {"d_out": None}, 1, "d_out is missing"),
    (
        {},
        {"d_query": np.zeros((2, 2, 7, 8), np.float32)},
        1,
        "d_query has shape [2, 2, 7, 8], expected [2, 4, 5, 8] (as query)",
    ),
    ({}, {"d_key": np.zeros((2, 2, 7, 8), np.float16)}, 1, "d_key has dtype float16, expected float32 as key"),
    (
        {},
        {"d_value": np.broadcast_to(np.zeros((1, 2, 7, 6), np.float32), (2, 2, 7, 6))},
        1,
        "d_value has stride 0 on axis 0",
    ),
    ({}, {"d_bias": np.zeros((2, 4, 5, 7), np.float32)}, 1, "d_bias is given, but there is no bias"),
    ({}, {"d_sinks": np.zeros(4, np.float32)}, 1, "d_sinks is given, but there are no sinks"),
    ({}, {"d_lse": np.zeros((2, 4, 5), np.float16)}, 1, "d_lse has dtype float16, expected float32"),
]


@pytest.mark.parametrize(
    ("changes", "changed", "code", "sentence"), REFUSED, ids=[sentence for *_, sentence in REFUSED]
)
def test_refused(fa_csrc, changes, changed, code, sentence):
    shapes = {"query": (2, 4, 5, 8), "key": (2, 2, 7, 8), "value": (2, 2, 7, 6), "out": (2, 4, 5, 6), "lse": (2, 4, 5)}
    fields = {name: np.ones(shape, np.float32) for name, shape in shapes.items()} | {"softmax_scale": 1.0} | changes
    gradients = {f"d_{name}": np.ones(shapes[name], np.float32) for name in ("query", "key", "value", "out")} | changed
    fields, gradients = ({k: v for k, v in d.items() if v is not None} for d in (fields, gradients))
    got, text = fa_csrc.attention_backward(fields, gradients)
    assert (got, text[: len(sentence)]) == (code, sentence)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(module_path, isa):
    command = [sys.executable, "-m", "tests.csrc.run_cases", os.fspath(module_path), "backward"]
    done = subprocess.run(command, env={**os.environ, "FA_CPU_ISA": isa}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
