# SPDX-License-Identifier: Apache-2.0
"""Times decoder layers in onnxruntime on CUDA, as onnxruntime-genai's builder writes them and rewritten by faexport.

Layers of the shape of Llama-3-8B, and attention of the shape of gpt-oss-20B's, in float16 with random weights; past and
present are one buffer, which both models share. Prompts and single steps on caches of several lengths: time to first
token and tokens per second of these layers (embedding and output projection are left out), and the memory that each
session takes beside weights and caches. One run, the two take turns, medians count.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Callable

import attention_ort
import faexport
import faplugin
import gpu_timer
import onnx
import onnxruntime as ort
import results_file
import rich.box
import rich.console
import rich.table
import torch
from attention import document_of
from llm_model import GPT_OSS, LLAMA, Shape, caches, decoder

KINDS = ("faexport", "GroupQueryAttention")
LIMIT = 1e-2  # ||a - b|| / ||b|| of what the layers give, in float16
CAPACITY = 32768
WEIGHT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt of `seqlen` tokens, or a step of one token after which `seqlen` are in the cache, of each of the
    `batch_size` entries."""

    shape: Shape
    batch_size: int
    seqlen: int
    is_prompt: bool = False

    @property
    def name(self) -> str:
        return f"{self.shape.name}: {'prompt' if self.is_prompt else 'step'} b{self.batch_size} s{self.seqlen}"

    @property
    def new_tokens(self) -> int:
        return self.batch_size * (self.seqlen if self.is_prompt else 1)


ROWS = (
    *(Row(LLAMA, b, s, is_prompt=True) for b, s in ((1, 2048), (1, 8192), (8, 2048), (8, 8192))),
    *(Row(LLAMA, b, s) for s in (512, 4096, 32768) for b in (1, 8, 32)),
    Row(GPT_OSS, 1, 8192, is_prompt=True),
    *(Row(GPT_OSS, b, s) for s in (4096, 32768) for b in (1, 8)),
)


def models_of(shape: Shape, layers: int) -> dict[str, bytes]:
    """The builder's model and the one that faexport makes of it."""
    original = decoder(shape, layers, CAPACITY)
    fused, report = faexport.fuse(onnx.ModelProto.FromString(original.SerializeToString()))
    if report.num_fused != layers:
        raise SystemExit(f"{report.num_fused} of {layers} layers fused: {[str(s.refusal) for s in report.sites]}")
    return dict(zip(KINDS, (fused.SerializeToString(), original.SerializeToString()), strict=True))


def draw_weights(shape: Shape, layers: int) -> dict[str, torch.Tensor]:
    sizes = {name: size for layer in range(layers) for name, size in shape.weights(layer).items()}
    drawn = {name: torch.randn(size, device="cuda", dtype=torch.float16) * WEIGHT_STD for name, size in sizes.items()}
    return drawn | {name: torch.ones_like(x) for name, x in drawn.items() if ".norm" in name}


def draw(row: Row, layers: int) -> dict[str, torch.Tensor]:
    """Inputs besides weights."""
    rows = row.seqlen if row.is_prompt else 1
    cache = (row.batch_size, row.shape.kv_heads, row.seqlen, row.shape.head_dim)
    drawn = {name: torch.randn(cache, device="cuda", dtype=torch.float16) for name in caches(layers)}
    states = torch.randn((row.batch_size, rows, row.shape.hidden), device="cuda", dtype=torch.float16)
    mask = torch.ones((row.batch_size, row.seqlen), device="cuda", dtype=torch.int64)
    return {"hidden_states": states, "attention_mask": mask, **drawn}


class Contestant:
    """A session of one of the models, bound to a row's inputs."""

    def __init__(self, model: bytes, inputs: dict[str, torch.Tensor], layers: int):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        faplugin.register(options)
        cuda = {
            "user_compute_stream": str(torch.cuda.current_stream().cuda_stream),
            "arena_extend_strategy": "kSameAsRequested",
        }
        self.session = ort.InferenceSession(model, options, providers=[("CUDAExecutionProvider", cuda)])
        self.inputs = inputs  # the binding holds addresses only
        self.output = torch.full_like(inputs["hidden_states"], float("nan"))
        outputs = {"output": self.output} | {present: inputs[past] for past, present in caches(layers).items()}
        self.binding = attention_ort.bind(self.session, inputs, outputs)
        self.run_options = ort.RunOptions()
        self.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def __call__(self, i: int) -> torch.Tensor:
        self.session.run_with_iobinding(self.binding, self.run_options)
        return self.output


def free_bytes() -> int:
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def measure(row: Row, models: dict[str, bytes], weights: dict[str, torch.Tensor], options: argparse.Namespace) -> dict:
    """One row of the results."""
    result: dict = {"row": row.name, "batch_size": row.batch_size, "seqlen": row.seqlen, "is_prompt": row.is_prompt}
    result |= {"shape": row.shape.name, "layers": options.layers, "contestants": {}, "refused": {}}
    inputs = draw(row, options.layers) | weights
    calls: dict[str, Callable] = {}
    memory, outputs = {}, {}
    for kind in KINDS:
        before = free_bytes()
        try:
            calls[kind] = Contestant(models[kind], inputs, options.layers)
            calls[kind](0)
            memory[kind] = before - free_bytes() - calls[kind].output.nbytes
            outputs[kind] = calls[kind].output.float().cpu() if row.new_tokens <= 1 << 14 else None
        except Exception as error:  # each in its own way
            result["refused"][kind] = str(error).strip().splitlines()[-1][:200]
            calls.pop(kind, None)
    ours, theirs = (outputs.get(kind) for kind in KINDS)
    if ours is not None and theirs is not None:
        result["difference"] = difference = float(f"{((ours - theirs).norm() / theirs.norm()).item():.3g}")
        if not difference <= LIMIT:
            raise SystemExit(f"{row.name}: the outputs differ by {difference:.2g}")
    times, _ = gpu_timer.in_turn(calls, 1, options.rounds, capture=False)
    for kind, milliseconds in times.items():
        one = {key: round(x, 4) for key, x in gpu_timer.summary(milliseconds).items()}
        one["tokens_per_s"] = round(1e3 * row.new_tokens / one["median_ms"], 1)
        one["memory_MiB"] = round(memory[kind] / 2**20, 1)
        result["contestants"][kind] = one
    if len(times) == 2:
        result["speedup"] = round(
            result["contestants"][KINDS[1]]["median_ms"] / result["contestants"][KINDS[0]]["median_ms"], 3
        )
    return result


def show(console: rich.console.Console, rows: list[dict]) -> None:
    table = rich.table.Table(title="Decoder layers in onnxruntime, float16", box=rich.box.SIMPLE_HEAD)
    for name in ("row", "layers", *(f"{kind} {unit}" for unit in ("ms", "MiB") for kind in KINDS), "speed-up"):
        table.add_column(name, justify="left" if name == "row" else "right")
    for row in rows:
        found = [row["contestants"].get(kind) for kind in KINDS]
        cells = [f"{one[key]:.2f}" if one else "–" for key in ("median_ms", "memory_MiB") for one in found]
        table.add_row(row["row"], str(row["layers"]), *cells, str(row.get("speedup", row["refused"])))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4, help="of each model")
    parser.add_argument("--match", default="", help="only rows whose name contains this, e.g. 'step b1 '")
    parser.add_argument("--rounds", type=int, default=9, help="turns of the two")
    results_file.add_options(parser, name="llm")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device")
    torch.cuda.set_stream(torch.cuda.Stream())  # onnxruntime takes one from outside only where it isn't the default one
    console, document = rich.console.Console(width=160), document_of(options)
    path = None
    for shape in (LLAMA, GPT_OSS):
        rows = [row for row in ROWS if row.shape is shape and options.match in row.name]
        if not rows:
            continue
        models, weights = models_of(shape, options.layers), draw_weights(shape, options.layers)
        measure(Row(shape, 1, 64), models, weights, options)  # loads what stays loaded
        for row in rows:
            document["rows"].append(measure(row, models, weights, options))
            path = results_file.write(options.name, document, options.record)
        del weights
    show(console, document["rows"])
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
