# SPDX-License-Identifier: Apache-2.0
"""The host's time of a call in onnxruntime's CUDA provider: what a node costs before its kernels are enqueued.

Chains of 1 and of 65 small nodes are run without waiting for the GPU; the difference, divided by 64, is the time of a
node, onnxruntime's own part included. FAPLUGIN_LIBRARY_DIR chooses the build.
"""

from __future__ import annotations

import argparse
import statistics
import time

import faplugin
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

CUDA = "CUDAExecutionProvider"
NODES = 64
# rows, keys, heads, key heads, attributes: each output has its query's shape, so that nodes can be chained
PROBLEMS = {
    "16 rows, 8 heads of 64": (16, 16, 8, 8, {}),
    "200 rows, causal, a bool mask, 8 heads of 64": (200, 200, 8, 8, {"is_causal": 1, "optional_inputs": "attn_mask"}),
    "1 row, 4096 keys, 32 heads on 8 of 64, split keys": (1, 4096, 32, 8, {}),
}


def chain(num_nodes: int, problem: tuple) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model in which each node's query is the output of the one before it, and its inputs."""
    rows, keys, heads, key_heads, attributes = problem
    rng = np.random.default_rng(0)
    shapes = {"query": (1, heads, rows, 64), "key": (1, key_heads, keys, 64), "value": (1, key_heads, keys, 64)}
    feeds = {name: rng.standard_normal(shape, np.float32).astype(np.float16) for name, shape in shapes.items()}
    if "optional_inputs" in attributes:
        feeds["attn_mask"] = np.ones((1, 1, 1, keys), bool)
    names = ["query", *(f"x{i}" for i in range(1, num_nodes)), "output"]
    nodes = [
        helper.make_node("FlashAttention", [before, *list(feeds)[1:]], [after], domain="faexport", **attributes)
        for before, after in zip(names, names[1:], strict=False)
    ]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT16, shapes["query"])
    graph = helper.make_graph(nodes, "chain", inputs, [output])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("faexport", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9), feeds


def median_seconds(num_nodes: int, problem: tuple, num_runs: int) -> float:
    """The host's time of one run of the chain."""
    model, feeds = chain(num_nodes, problem)
    options = ort.SessionOptions()
    faplugin.register(options)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=[CUDA])
    if session.get_providers()[0] != CUDA:
        raise SystemExit("onnxruntime's CUDA provider could not be loaded")
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
    output = np.zeros((1, problem[2], problem[0], 64), np.float16)
    binding.bind_ortvalue_output("output", ort.OrtValue.ortvalue_from_numpy(output, "cuda", 0))
    no_wait = ort.RunOptions()
    no_wait.add_run_config_entry("disable_synchronize_execution_providers", "1")
    times = []
    for i in range(num_runs + 10):
        start = time.perf_counter()
        session.run_with_iobinding(binding, no_wait)
        end = time.perf_counter()
        binding.synchronize_outputs()  # so that the queue never fills
        if i >= 10:
            times.append(end - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=300)
    args = parser.parse_args()
    for name, problem in PROBLEMS.items():
        one, many = (median_seconds(count, problem, args.runs) for count in (1, NODES + 1))
        print(f"{(many - one) / NODES * 1e6:6.2f} µs a node: {name}", flush=True)


if __name__ == "__main__":
    main()
