# SPDX-License-Identifier: Apache-2.0
"""Memory beside the tensors inside onnxruntime: CUDA graphs of many nodes; several sessions, threads and streams."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from tests.plugin import nodes

torch = pytest.importorskip("torch")
CUDA = "CUDAExecutionProvider"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="onnxruntime has no CUDA provider"),
]
NUM_NODES, NUM_REPLAYS = 24, 100
HALF = TensorProto.FLOAT16
# The inputs of each kind of node; the output has the query's shape, so that nodes of a kind can be chained.
KINDS = {
    # few rows against many keys, which are split: partial results in the workspace
    "decode": {"query": (2, 32, 1, 128), "key": (2, 8, "keys", 128), "value": (2, 8, "keys", 128)},
    # more tiles than blocks, of unequal length: a tile counter
    "prefill": {"query": (2, 16, 1200, 64), "key": (2, 16, 1200, 64), "value": (2, 16, 1200, 64)},
    # past and fresh keys and values joined in the workspace, since no present is wanted
    "joined": {"query": (2, 8, 1, 64), "key": (2, 8, 1, 64), "value": (2, 8, 1, 64),
               "past_key": (2, 8, 1000, 64), "past_value": (2, 8, 1000, 64)},
}  # fmt: skip
ATTRIBUTES = {"decode": {}, "prefill": {"is_causal": 1}, "joined": {"optional_inputs": "past_key,past_value"}}
KEYS = 8192


def make_model(kinds: tuple[str, ...]) -> onnx.ModelProto:
    """NUM_NODES nodes, kinds in turn, each kind a chain: the outputs are the chains' ends."""
    made, ends = [], {}
    for i in range(NUM_NODES):
        kind = kinds[i % len(kinds)]
        begin = ends.get(kind, f"{kind}_query")
        ends[kind] = f"{kind}_{i}"
        inputs = [begin, *(f"{kind}_{name}" for name in list(KINDS[kind])[1:])]
        made.append(helper.make_node("FlashAttention", inputs, [ends[kind]], domain="faexport", **ATTRIBUTES[kind]))
    graph = helper.make_graph(
        made,
        "chains",
        [
            helper.make_tensor_value_info(f"{kind}_{name}", HALF, shape)
            for kind in kinds
            for name, shape in KINDS[kind].items()
        ],
        [helper.make_tensor_value_info(ends[kind], HALF, KINDS[kind]["query"]) for kind in kinds],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("faexport", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=nodes.IR_VERSION)


def session(kinds: tuple[str, ...], **provider_options: str) -> ort.InferenceSession:
    made = nodes.session(make_model(kinds), [(CUDA, provider_options)])
    assert made.get_providers()[0] == CUDA, "the CUDA provider could not be loaded"
    return made


class Bound:
    """Inputs and outputs of a session in memory of their own on the GPU, whose addresses a CUDA graph may record."""

    def __init__(self, made: ort.InferenceSession, keys: int = KEYS):
        self.binding, self.values, self.outputs = made.io_binding(), {}, []
        for value in made.get_inputs():
            shape = [keys if size == "keys" else size for size in value.shape]
            self.values[value.name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float16), "cuda", 0)
            self.binding.bind_ortvalue_input(value.name, self.values[value.name])
        for value in made.get_outputs():
            nan = np.full(value.shape, np.nan, np.float16)
            self.outputs.append(ort.OrtValue.ortvalue_from_numpy(nan, "cuda", 0))
            self.binding.bind_ortvalue_output(value.name, self.outputs[-1])

    def write(self, feeds: dict[str, np.ndarray]) -> None:
        for name, array in feeds.items():
            self.values[name].update_inplace(array)

    def run(self, made: ort.InferenceSession, graph_id: int | None = None) -> list[np.ndarray]:
        options = ort.RunOptions()
        if graph_id is not None:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        made.run_with_iobinding(self.binding, options)
        return [output.numpy() for output in self.outputs]


def draw(bound: Bound, seed: int, least: int = 0) -> dict[str, np.ndarray]:
    """New values for the inputs of at most `least` elements (0: of all)."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(value.shape(), np.float32).astype(np.float16)
        for name, value in bound.values.items()
        if least == 0 or np.prod(value.shape()) <= least
    }


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.isfinite(x).all() and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kinds", [("decode",), ("prefill",), ("decode", "prefill", "joined")], ids="-".join)
def test_a_graph_of_24_nodes_is_captured_and_replayed_with_new_data(kinds: tuple[str, ...]) -> None:
    plain, graph = session(kinds), session(kinds, enable_cuda_graph="1")
    expected, captured = Bound(plain), Bound(graph)
    for replay in range(NUM_REPLAYS):  # the first run captures
        feeds = draw(captured, replay, 0 if replay % 25 == 0 else 1 << 17)
        for bound in (expected, captured):
            bound.write(feeds)
        assert same(captured.run(graph), expected.run(plain)), f"replay {replay}"


def test_a_second_capture_uses_what_the_first_one_kept() -> None:
    """Two graphs of one session, of other sizes, replayed in turns; no memory is taken for the second."""
    plain, graph = session(("decode",)), session(("decode",), enable_cuda_graph="1")
    pairs = [(Bound(plain, keys), Bound(graph, keys)) for keys in (KEYS, KEYS // 2)]
    for replay in range(10):
        for graph_id, (expected, captured) in enumerate(pairs, start=1):
            feeds = draw(captured, replay)
            expected.write(feeds)
            captured.write(feeds)
            assert same(captured.run(graph, graph_id), expected.run(plain)), f"graph {graph_id}, replay {replay}"


def test_two_sessions_and_four_streams_side_by_side() -> None:
    """Each session is run by two threads, for which onnxruntime takes a stream each; a graph runs beside them."""
    kinds = ("decode", "prefill", "joined")
    sessions, graph = [session(kinds), session(kinds)], session(("decode",), enable_cuda_graph="1")
    work = [(made, Bound(made)) for made in sessions for _ in range(2)] + [(graph, Bound(graph))]
    expected = []
    for seed, (made, bound) in enumerate(work):
        bound.write(draw(bound, seed))
        expected.append(bound.run(made))

    def repeat(i: int) -> bool:
        made, bound = work[i]
        return all(same(bound.run(made), expected[i]) for _ in range(40))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(repeat, i) for i in range(4)]
        assert repeat(4), "the graph, replayed by the thread that captured it"
        assert all(future.result() for future in running)


def test_sessions_on_one_stream_of_the_callers() -> None:
    """Two sessions share a stream, and so a workspace; one of them ends before the other."""
    stream = torch.cuda.Stream()
    options = {"user_compute_stream": str(stream.cuda_stream)}
    sessions = [session(("decode", "joined"), **options) for _ in range(2)]
    work = [(made, Bound(made)) for made in sessions]
    for seed, (_, bound) in enumerate(work):
        bound.write(draw(bound, seed))
    expected = [bound.run(made) for made, bound in work]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for _ in range(30):
            results = list(pool.map(lambda item: item[1].run(item[0]), work))
            assert all(map(same, results, expected))
    del sessions, work[0]
    assert all(same(work[0][1].run(work[0][0]), expected[1]) for _ in range(10))
