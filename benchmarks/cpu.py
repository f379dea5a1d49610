# SPDX-License-Identifier: Apache-2.0
"""Times the CPU kernel in onnxruntime against its own: MultiHeadAttention and the unfused graph (`make bench`).

float32, B1 H12 D64, two threads, one run: contestants take turns, medians count. Outputs are compared with float64
first. Peak memory is that of a process which runs one contestant once, over the same process before the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import subprocess
import sys
from collections.abc import Callable

import faplugin
import numpy as np
import onnx
import onnxruntime as ort
import results_file
import rich.box
import rich.console
import rich.progress
import rich.table
from onnx import helper, numpy_helper

KINDS = ("faexport", "MultiHeadAttention", "unfused")
SAMPLE = 48  # rows of each head that are compared with float64


@dataclasses.dataclass(frozen=True)
class Shape:
    """One row of the table: [1, heads, seqlen_q, head_dim] queries against seqlen_kv keys."""

    seqlen_q: int
    seqlen_kv: int
    is_causal: bool
    num_heads: int = 12
    head_dim: int = 64

    def __str__(self) -> str:
        lengths = str(self.seqlen_q) if self.seqlen_q == self.seqlen_kv else f"{self.seqlen_q} x {self.seqlen_kv}"
        return lengths + (" causal" if self.is_causal else "")

    @property
    def is_decode(self) -> bool:
        """One query row against a cache, which lies in memory as [B, H, S, D]."""
        return self.seqlen_q == 1

    @property
    def flops(self) -> float:
        return 4.0 * self.num_heads * self.seqlen_q * self.seqlen_kv * self.head_dim / (2 if self.is_causal else 1)


def draw(shape: Shape) -> dict[str, np.ndarray]:
    """Query, key and value as [1, S, H*D]."""
    rng = np.random.default_rng()
    width = shape.num_heads * shape.head_dim
    rows = {"query": shape.seqlen_q, "key": shape.seqlen_kv, "value": shape.seqlen_kv}
    return {name: rng.standard_normal((1, length, width), dtype=np.float32) for name, length in rows.items()}


def to_heads(array: np.ndarray, num_heads: int) -> np.ndarray:
    """[1, S, H*D] to [1, H, S, D]."""
    return np.ascontiguousarray(array.reshape(1, array.shape[1], num_heads, -1).transpose(0, 2, 1, 3))


def takes_heads(kind: str, shape: Shape) -> bool:
    """Are this contestant's tensors [1, H, S, D]?"""
    return kind == "unfused" or (kind == "faexport" and shape.is_decode)


def make_model(kind: str, shape: Shape) -> onnx.ModelProto:
    """A graph of one contestant. The unfused one gets [1, H, S, D]: its transposes cost nothing."""
    names, initializers = ["query", "key", "value"], []
    heads, dim = shape.num_heads, shape.head_dim
    if kind == "faexport":
        attributes = {"is_causal": int(shape.is_causal)}
        attributes |= {} if shape.is_decode else {"q_num_heads": heads, "kv_num_heads": heads}
        nodes = [helper.make_node("FlashAttention", names, ["output"], domain="faexport", **attributes)]
    elif kind == "MultiHeadAttention":
        attributes = {"num_heads": heads, "unidirectional": int(shape.is_causal)}
        nodes = [helper.make_node("MultiHeadAttention", names, ["output"], domain="com.microsoft", **attributes)]
    else:
        scores, initializers = "scaled", [numpy_helper.from_array(np.float32(dim**-0.5).reshape(()), "scale")]
        nodes = [
            helper.make_node("Transpose", ["key"], ["key_t"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["query", "key_t"], ["scores"]),
            helper.make_node("Mul", ["scores", "scale"], ["scaled"]),
        ]
        if shape.is_causal:
            mask = np.triu(np.full((shape.seqlen_q, shape.seqlen_kv), np.finfo(np.float32).min), 1)
            initializers.append(numpy_helper.from_array(mask.astype(np.float32), "mask"))
            nodes.append(helper.make_node("Add", ["scaled", "mask"], ["masked"]))
            scores = "masked"
        nodes.append(helper.make_node("Softmax", [scores], ["weights"], axis=-1))
        nodes.append(helper.make_node("MatMul", ["weights", "value"], ["output"]))
    rank = 4 if takes_heads(kind, shape) else 3
    inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * rank) for name in names]
    outputs = [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, [None] * rank)]
    graph = helper.make_graph(nodes, kind, inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("faexport", 1), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def make_call(kind: str, shape: Shape, inputs: dict[str, np.ndarray], threads: int) -> Callable[[], np.ndarray]:
    """A session of one contestant; the call returns its output."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if kind == "faexport":
        faplugin.register(options)
    model = make_model(kind, shape).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    if takes_heads(kind, shape):
        inputs = {name: to_heads(array, shape.num_heads) for name, array in inputs.items()}
    return lambda: session.run(None, inputs)[0]


def relative_error(output: np.ndarray, shape: Shape, inputs: dict[str, np.ndarray]) -> float:
    """||out - ref|| / ||ref|| over a sample of rows, ref in float64."""
    output = output if output.ndim == 4 else to_heads(output, shape.num_heads)
    query, key, value = (to_heads(array, shape.num_heads)[0].astype(np.float64) for array in inputs.values())
    rows = np.unique(np.linspace(0, shape.seqlen_q - 1, SAMPLE).astype(int))
    scores = query[:, rows] @ key.transpose(0, 2, 1) * shape.head_dim**-0.5
    if shape.is_causal:
        scores[:, np.arange(shape.seqlen_kv)[None, :] > rows[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = weights / weights.sum(axis=-1, keepdims=True) @ value
    return float(np.linalg.norm(output[0][:, rows] - expected) / np.linalg.norm(expected))


def peak_bytes(kind: str, shape: Shape, threads: int) -> int:
    """Memory that one run takes beside the session and its inputs, in a process of its own."""
    description = [kind, shape.seqlen_q, shape.seqlen_kv, int(shape.is_causal), shape.num_heads, threads]
    command = [sys.executable, __file__, "--peak-memory-of", *map(str, description)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the highest so far) of this process."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def print_peak(kind: str, seqlen_q: str, seqlen_kv: str, is_causal: str, num_heads: str, threads: str) -> None:
    """The other end of peak_bytes()."""
    shape = Shape(int(seqlen_q), int(seqlen_kv), is_causal == "1", int(num_heads))
    call = make_call(kind, shape, draw(shape), int(threads))
    before = resident_bytes("VmRSS")
    # NOTE: ru_maxrss would still hold the peak of the parent process, and that of making the session.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    call()
    print(resident_bytes("VmHWM") - before)


def measure(shape: Shape, options: argparse.Namespace) -> dict:
    """All contestants on one shape: errors, times, peaks."""
    inputs = draw(shape)
    kinds = [kind for kind in KINDS if not (kind == "unfused" and shape.seqlen_q > 8192)]
    if shape.seqlen_q > 8192:
        kinds = ["faexport"]
    calls = {kind: make_call(kind, shape, inputs, options.threads) for kind in kinds}
    errors = {kind: relative_error(call(), shape, inputs) for kind, call in calls.items()}
    rounds = max(1, min(options.rounds, int(options.rounds * 2.5e10 / shape.flops)))
    seconds = results_file.time_in_turn(calls, rounds, warmups=min(2, rounds))
    rows = {
        kind: results_file.milliseconds(seconds[kind])
        | {"relative_error": errors[kind], "peak_bytes": peak_bytes(kind, shape, options.threads)}
        for kind in kinds
    }
    return dataclasses.asdict(shape) | {"rounds": rounds, "contestants": rows}


def show(console: rich.console.Console, measured: list[dict]) -> None:
    table = rich.table.Table(title="Attention on the CPU, float32, D64", box=rich.box.SIMPLE_HEAD)
    table.add_column("S")
    for name in ("contestant", "median ms", "min ms", "GFLOP/s", "ours is", "peak MB", "error"):
        table.add_column(name, justify="left" if name == "contestant" else "right")
    for row in measured:
        shape = Shape(**{field.name: row[field.name] for field in dataclasses.fields(Shape)})
        ours = row["contestants"]["faexport"]["median_ms"]
        for i, (kind, result) in enumerate(row["contestants"].items()):
            table.add_row(
                f"{shape}, H{shape.num_heads}" if i == 0 else "",
                kind,
                f"{result['median_ms']:.2f}",
                f"{result['min_ms']:.2f}",
                f"{shape.flops / result['median_ms'] / 1e6:.0f}",
                "" if kind == "faexport" else f"{result['median_ms'] / ours:.2f}x",
                f"{result['peak_bytes'] / 1e6:.1f}",
                f"{result['relative_error']:.1e}",
                end_section=i + 1 == len(row["contestants"]),
            )
    console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="sequence lengths (1024 4096)")
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads of onnxruntime (2)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of the contestants; long shapes get fewer (15)")
    parser.add_argument("--long", action="store_true", help="also 131,072 tokens on one head, ours alone (a minute)")
    parser.add_argument("--json", action="store_true", help="print the JSON and no table")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results, not to build/benchmarks")
    parser.add_argument("--peak-memory-of", nargs=6, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.peak_memory_of:
        print_peak(*options.peak_memory_of)
        return 0
    shapes = [Shape(length, length, causal) for length in options.lengths for causal in (False, True)]
    shapes.append(Shape(1, 8192, False))
    if options.long:
        shapes.append(Shape(131072, 131072, False, num_heads=1))
    console = rich.console.Console(stderr=options.json, width=None if sys.stdout.isatty() else 110)
    progress = rich.progress.Progress(console=rich.console.Console(stderr=True), transient=True)
    measured = []
    with progress:
        for shape in progress.track(shapes, description="measuring"):
            measured.append(measure(shape, options))
    environment = results_file.environment("onnxruntime", "numpy", "faexport")
    document = environment | {
        "threads": options.threads,
        "library": pathlib.Path(faplugin.library_path()).name,
        "rows": measured,
    }
    if options.json:
        print(results_file.json.dumps(document, indent=2))
    else:
        show(console, measured)
    path = results_file.write("cpu", document, options.record)
    console.print(f"written: {path.relative_to(results_file.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
