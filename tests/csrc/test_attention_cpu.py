# SPDX-License-Identifier: Apache-2.0
"""attention_forward on the CPU, below the adapters: all cases, invariances, memory, instruction sets."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from tests import cases, tolerances
from tests.csrc import views
from tests.problems import Case

CASES = cases.quick()


def run(fa_csrc, problem, **options) -> dict[str, np.ndarray]:
    fields, outputs = views.fields(problem)
    assert fa_csrc.attention(fields, **options) == (0, "")
    return views.to_layout(problem, outputs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(fa_csrc, case):
    problem = case.problem()
    tolerances.check(run(fa_csrc, problem, num_threads=2, corrupt=True), problem)


LARGE = [
    Case("float32", 1, 2, 2, 1023, 1023, 64, is_causal=True),
    Case("float16", 1, 4, 2, 513, 1300, 128, layout="BSHD", is_causal=True, window_left=300, alignment="bottom_right"),
    Case("bfloat16", 2, 3, 1, 700, 515, 80, 96, layout="BSH", mask="B11K", bias="1HQK"),
    Case("float32", 1, 4, 1, 1, 9001, 64, kv_lengths=True),
    Case(
        "float16", 2, 8, 2, 3, 4500, 128, is_causal=True, alignment="bottom_right", sinks=True, mask="BHQK", empty=True
    ),
    Case("bfloat16", 3, 2, 1, 400, 600, 40, packed=True, is_causal=True, alignment="bottom_right", alibi="BH"),
    Case("float32", 1, 1, 1, 33, 300, 640, 511),
    Case("float32", 1, 2, 1, 4, 5000, 32, mask="B1QK", empty=True, empty_row="mean"),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_many_tiles_tasks_and_splits(fa_csrc, case):
    problem = case.problem()
    tolerances.check(run(fa_csrc, problem, num_threads=3, corrupt=True), problem)


def bits(outputs: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: np.ascontiguousarray(array).tobytes() for name, array in outputs.items()}


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_results_are_bitwise_the_same_on_any_number_of_threads(fa_csrc, case):
    problem = case.problem()
    once = bits(run(fa_csrc, problem))
    assert once == bits(run(fa_csrc, problem))
    assert once == bits(run(fa_csrc, problem, num_threads=4))


@pytest.mark.parametrize("case", [c for c in LARGE if c.batch_size > 1 and not c.packed], ids=str)
def test_the_batch_may_be_permuted(fa_csrc, case):
    problem = case.problem()
    expected = run(fa_csrc, problem)
    permuted = {
        name: array[::-1] if array.shape[0] == case.batch_size else array for name, array in problem.inputs.items()
    }
    outputs = run(fa_csrc, dataclasses.replace(problem, inputs=permuted))
    assert bits({name: array[::-1] for name, array in outputs.items()}) == bits(expected)


def test_keys_may_be_split_and_merged_by_lse(fa_csrc):
    """softmax over all keys is the mean of both halves' results, weighted by exp(lse)."""
    case = Case("float32", 2, 4, 2, 70, 600, 64)
    problem = case.problem()
    whole = run(fa_csrc, problem)
    halves = []
    for part in (slice(None, 350), slice(350, None)):
        inputs = problem.inputs | {
            name: np.ascontiguousarray(problem.inputs[name][:, :, part]) for name in ("key", "value")
        }
        halves.append(run(fa_csrc, dataclasses.replace(problem, inputs=inputs)))
    lse = np.logaddexp(halves[0]["lse"].astype(np.float64), halves[1]["lse"])
    output = sum(half["output"] * np.exp(half["lse"] - lse)[..., None] for half in halves)
    np.testing.assert_allclose(whole["lse"], lse, rtol=0, atol=2e-6)
    np.testing.assert_allclose(whole["output"], output, rtol=0, atol=2e-6)


def test_keys_may_be_permuted_where_no_position_counts(fa_csrc):
    problem = Case("float32", 1, 2, 2, 40, 300, 64, bias="1HQK", mask="B11K").problem()
    order = np.random.default_rng(0).permutation(300)
    axes = {"key": 2, "value": 2, "attn_bias": 3, "attn_mask": 3}
    inputs = {name: np.take(a, order, axes[name]) if name in axes else a for name, a in problem.inputs.items()}
    outputs, expected = run(fa_csrc, dataclasses.replace(problem, inputs=inputs)), run(fa_csrc, problem)
    np.testing.assert_allclose(outputs["output"], expected["output"], rtol=0, atol=2e-6)


def test_keys_beyond_a_length_change_no_bit(fa_csrc):
    case = Case("float16", 2, 4, 2, 100, 600, 64, kv_lengths=True, is_causal=True)
    problem = case.problem()
    expected = bits(run(fa_csrc, problem))
    for name in ("key", "value"):  # NaN until now
        problem.inputs[name] = np.nan_to_num(problem.inputs[name], nan=7.0)
    assert bits(run(fa_csrc, problem)) == expected


def test_rows_of_no_packed_sequence_are_cleared(fa_csrc):
    rng = np.random.default_rng(0)
    fields = {name: rng.standard_normal((1, 2, 20, 8), dtype=np.float32) for name in ("query", "key", "value")}
    fields |= {"out": views.poisoned((1, 2, 20, 8), np.float32), "lse": views.poisoned((1, 2, 20), np.float32)}
    fields |= {"cu_seqlens_q": np.array([2, 9, 15], np.int32), "cu_seqlens_kv": np.array([0, 9, 20], np.int32)}
    assert fa_csrc.attention(fields | {"softmax_scale": 1.0}) == (0, "")
    unused = [0, 1, 15, 16, 17, 18, 19]
    assert not fields["out"][:, :, unused].any() and np.isneginf(fields["lse"][:, :, unused]).all()
    assert fields["out"][:, :, 2:15].any(axis=-1).all() and np.isfinite(fields["lse"][:, :, 2:15]).all()


def test_wild_lengths_and_offsets_stay_in_their_tensors(fa_csrc):
    """The sanitizer sees any step outside; here the results must be finite."""
    rng = np.random.default_rng(0)
    for low, high in ((-(2**63), 2**63 - 1), (-(2**31), 2**31 - 1), (-50, 50)):
        for _ in range(50):
            fields = {name: rng.standard_normal((3, 2, 17, 8), dtype=np.float32) for name in ("query", "key", "value")}
            fields |= {
                "out": views.poisoned((3, 2, 17, 8), np.float32),
                "softmax_scale": 1.0,
                "window_left": 5,
                "window_right": 3,
            }
            for name in ("kv_lengths", "query_lengths", "query_offsets"):
                fields[name] = rng.integers(low, high, 3)
            assert fa_csrc.attention(fields) == (0, "")
            assert np.isfinite(fields["out"]).all()


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(module_path, isa):
    """FA_CPU_ISA is read once a process, so each has its own. Both run every seventh case and all large ones."""
    command = [sys.executable, "-m", "tests.csrc.run_cases", os.fspath(module_path)]
    environment = {**os.environ, "FA_CPU_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_memory_is_linear_in_the_sequence(module_path):
    """131,072 tokens with a window: 96 MB of tensors, and far less than 100 MB beside them."""
    script = f"""
import importlib.util, resource, numpy as np
spec = importlib.util.spec_from_file_location("fa_csrc", {os.fspath(module_path)!r})
fa_csrc = importlib.util.module_from_spec(spec); spec.loader.exec_module(fa_csrc)
shape = (1, 1, 131072, 64)
fields = {{name: np.full(shape, 0.25, np.float32) for name in ("query", "key", "value", "out")}}
fields |= {{"softmax_scale": 0.125, "window_left": 200, "window_right": 0}}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert fa_csrc.attention(fields, num_threads=2) == (0, "")
assert abs(fields["out"] - 0.25).max() < 1e-6
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
