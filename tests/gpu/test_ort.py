# SPDX-License-Identifier: Apache-2.0
"""The operator in onnxruntime's CUDA provider: cases, device tensors, CUDA graphs, threads, memory."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import onnxruntime as ort
import pytest

from tests import cases, tolerances
from tests.plugin import nodes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("CUDAExecutionProvider" not in ort.get_available_providers(), reason="onnxruntime without CUDA"),
]
CUDA = ("CUDAExecutionProvider",)


@pytest.mark.parametrize("case", cases.quick() + cases.randomized(300, seed=2), ids=str)
def test_case(case: cases.Case) -> None:
    problem = case.problem()
    tolerances.check(nodes.run(problem, CUDA), problem)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(np.float16)


def bound(session: ort.InferenceSession, inputs: dict[str, np.ndarray]) -> tuple[ort.IOBinding, dict, ort.OrtValue]:
    """An IOBinding with all tensors on the device: (binding, inputs, output)."""
    values = {name: ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0) for name, array in inputs.items()}
    shape = [*inputs["query"].shape[:3], inputs["value"].shape[3]]
    output = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float16, "cuda", 0)
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output("output", output)
    return binding, values, output


# one prefill with a mask and lengths on the device, one decoding step that needs a workspace
GRAPH_CASES = {"prefill": (300, 300), "decode": (1, 4096)}


@pytest.mark.parametrize("rows_and_keys", GRAPH_CASES.values(), ids=list(GRAPH_CASES))
def test_cuda_graph_replays_with_changed_data(rows_and_keys: tuple[int, int]) -> None:
    rows, keys = rows_and_keys

    def inputs(seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {
            "query": normal(seed, 2, 4, rows, 64),
            "key": normal(seed + 1, 2, 2, keys, 64),
            "value": normal(seed + 2, 2, 2, keys, 64),
            "attn_mask": rng.random((2, 1, 1, keys)) < 0.8,
            "nonpad_kv_seqlen": rng.integers(1, keys + 1, 2),
        }

    model = nodes.make_model(inputs(0), {"optional_inputs": "attn_mask,nonpad_kv_seqlen"})
    captured = nodes.session(model, [("CUDAExecutionProvider", {"enable_cuda_graph": "1"})])
    plain = nodes.session(model, CUDA)
    binding, values, output = bound(captured, inputs(0))
    for seed in range(5):  # the first runs warm up and capture, the others replay
        given = inputs(10 * seed)
        for name, value in values.items():
            value.update_inplace(given[name])
        captured.run_with_iobinding(binding)
        assert np.array_equal(output.numpy(), plain.run(None, given)[0]), f"run {seed}"


@pytest.mark.parametrize("rows_and_keys", GRAPH_CASES.values(), ids=list(GRAPH_CASES))
def test_four_threads_on_one_session(rows_and_keys: tuple[int, int]) -> None:
    rows, keys = rows_and_keys
    feeds = [
        {
            "query": normal(i, 2, 4, rows, 64),
            "key": normal(i + 1, 2, 2, keys, 64),
            "value": normal(i + 2, 2, 2, keys, 64),
        }
        for i in range(4)
    ]
    session = nodes.session(nodes.make_model(feeds[0], {"is_causal": 1, "alignment": "bottom_right"}), CUDA)
    expected = [session.run(None, feed)[0] for feed in feeds]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: session.run(None, feeds[i % 4])[0], range(200)))
    assert all(np.array_equal(result, expected[i % 4]) for i, result in enumerate(results))


def test_memory_does_not_grow_with_the_scores() -> None:
    """B1 H16 S32768 d64: less than 64 MB over the tensors themselves."""
    torch = pytest.importorskip("torch")
    inputs = {name: normal(i, 1, 16, 32768, 64) for i, name in enumerate(("query", "key", "value"))}
    small = {name: array[:, :, :128] for name, array in inputs.items()}
    session = nodes.session(nodes.make_model(inputs, {}, shapes={name: [1, 16, "S", 64] for name in inputs}), CUDA)
    session.run_with_iobinding(bound(session, small)[0])  # loads kernels and makes the arena
    binding, *_ = bound(session, inputs)
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    session.run_with_iobinding(binding)
    torch.cuda.synchronize()
    assert before - torch.cuda.mem_get_info()[0] < 64e6
