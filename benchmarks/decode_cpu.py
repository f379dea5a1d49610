# SPDX-License-Identifier: Apache-2.0
"""Times a decode step on the CPU against onnxruntime's GroupQueryAttention (`make bench`): rotary embedding, one new
row written in place, attention over the cache.

32 query heads, 8 key heads, head_dim 128, float32; past and present are one bound buffer, as onnxruntime-genai binds
them. One run, contestants take turns, medians count. Outputs are compared with each other first. GB/s is what the
step has to read of the cache, over its time.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable

import faplugin
import numpy as np
import onnx
import onnxruntime as ort
import results_file
import rich.box
import rich.console
import rich.table
from onnx import helper

KINDS = ("faexport", "GroupQueryAttention")
NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
OUTPUTS = ("output", "present_key", "present_value")


@dataclasses.dataclass(frozen=True)
class Shape:
    """`batch_size` entries that have `seqlen` rows each after the step, in a cache of as many."""

    batch_size: int
    seqlen: int

    @property
    def cache_bytes(self) -> int:
        return 2 * 4 * self.batch_size * NUM_KV_HEADS * self.seqlen * HEAD_DIM


def draw(shape: Shape) -> dict[str, np.ndarray]:
    """The inputs that both contestants take, caches among them."""
    rng = np.random.default_rng(0)
    rows = {"query": NUM_Q_HEADS, "key": NUM_KV_HEADS, "value": NUM_KV_HEADS}
    angles = np.arange(shape.seqlen)[:, None] / 10000.0 ** (np.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
    arrays = {
        name: rng.standard_normal((shape.batch_size, 1, heads * HEAD_DIM), dtype=np.float32)
        for name, heads in rows.items()
    }
    for name in ("past_key", "past_value"):
        size = (shape.batch_size, NUM_KV_HEADS, shape.seqlen, HEAD_DIM)
        arrays[name] = rng.standard_normal(size, dtype=np.float32)
    arrays["cos_cache"] = np.cos(angles).astype(np.float32)
    arrays["sin_cache"] = np.sin(angles).astype(np.float32)
    return arrays


def make_node(kind: str) -> tuple[onnx.NodeProto, list[str]]:
    """One contestant's node, and its inputs."""
    names = ["query", "key", "value", "past_key", "past_value"]
    if kind == "GroupQueryAttention":
        names += ["seqlens_k", "total_sequence_length", "cos_cache", "sin_cache"]
        attributes = {"num_heads": NUM_Q_HEADS, "kv_num_heads": NUM_KV_HEADS, "do_rotary": 1}
        return helper.make_node(kind, names, OUTPUTS, domain="com.microsoft", **attributes), names
    names += ["nonpad_kv_seqlen", "cos_cache", "sin_cache"]
    attributes = {"q_num_heads": NUM_Q_HEADS, "kv_num_heads": NUM_KV_HEADS, "is_causal": 1, "cache": "write"}
    attributes |= {"optional_inputs": ",".join(names[3:]), "optional_outputs": ",".join(OUTPUTS[1:])}
    return helper.make_node("FlashAttention", names, OUTPUTS, domain="faexport", **attributes), names


def make_call(kind: str, shape: Shape, threads: int) -> Callable[[], np.ndarray]:
    """A session of one contestant with its own cache, bound as past and present; the call returns the output."""
    node, names = make_node(kind)
    arrays = draw(shape)
    arrays["nonpad_kv_seqlen"] = np.full(shape.batch_size, shape.seqlen, np.int32)
    arrays["seqlens_k"] = arrays["nonpad_kv_seqlen"] - 1
    arrays["total_sequence_length"] = np.array([shape.seqlen], np.int32)
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(arrays[name].dtype), arrays[name].shape)
        for name in names
    ]
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in OUTPUTS]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("faexport", 1), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], kind, inputs, outputs), opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    faplugin.register(options)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_output("output")
    for name in names:
        bound = ort.OrtValue.ortvalue_from_numpy(arrays[name])
        binding.bind_ortvalue_input(name, bound)
        if name.startswith("past"):
            binding.bind_ortvalue_output(name.replace("past", "present"), bound)

    def call() -> np.ndarray:
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()

    return call


def measure(shape: Shape, options: argparse.Namespace) -> dict:
    """Both contestants on one shape."""
    calls = {kind: make_call(kind, shape, options.threads) for kind in KINDS}
    own, other = (call() for call in calls.values())
    difference = float(np.linalg.norm(own - other) / np.linalg.norm(other))
    if not difference < 1e-5:
        raise SystemExit(f"{shape}: the outputs differ by {difference:.2g}")
    seconds = results_file.time_in_turn(calls, options.rounds)
    rows = {kind: results_file.milliseconds(times) for kind, times in seconds.items()}
    return dataclasses.asdict(shape) | {"difference": difference, "rounds": options.rounds, "contestants": rows}


def show(console: rich.console.Console, measured: list[dict]) -> None:
    table = rich.table.Table(title="A decode step on the CPU, float32, H32/8 D128", box=rich.box.SIMPLE_HEAD)
    for name in ("batch", "cache", "contestant", "median ms", "min ms", "GB/s", "ours takes"):
        table.add_column(name, justify="left" if name == "contestant" else "right")
    for row in measured:
        shape = Shape(row["batch_size"], row["seqlen"])
        ours = row["contestants"]["faexport"]["median_ms"]
        for i, (kind, times) in enumerate(row["contestants"].items()):
            table.add_row(
                str(shape.batch_size) if i == 0 else "",
                str(shape.seqlen) if i == 0 else "",
                kind,
                f"{times['median_ms']:.2f}",
                f"{times['min_ms']:.2f}",
                f"{shape.cache_bytes / times['median_ms'] / 1e6:.1f}",
                "" if kind == "faexport" else f"{ours / times['median_ms']:.2f} of it",
                end_section=i == 1,
            )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads of onnxruntime (2)")
    parser.add_argument("--rounds", type=int, default=30, help="turns of the contestants (30)")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results, not to build/benchmarks")
    options = parser.parse_args()
    measured = [measure(shape, options) for shape in (Shape(1, 512), Shape(1, 8192), Shape(4, 2048))]
    document = results_file.environment("onnxruntime", "numpy", "faexport") | {
        "threads": options.threads,
        "library": pathlib.Path(faplugin.library_path()).name,
        "rows": measured,
    }
    console = rich.console.Console(width=None if sys.stdout.isatty() else 110)
    show(console, measured)
    path = results_file.write("decode_cpu", document, options.record)
    console.print(f"written: {path.relative_to(results_file.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
