# SPDX-License-Identifier: Apache-2.0
"""Times a decoder's whole step inside onnxruntime's CUDA provider: rotary embedding, one new row stored, attention.

float16, 32 query heads on 8 key heads of 128. Against GroupQueryAttention, past and present one bound buffer, float16
or quantized with one scale, and in pages against PagedAttention, which is told its longest row and cache. One run,
contestants take turns, medians count. All have to agree with each other first.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import attention_ort
import gpu_timer
import numpy as np
import onnx
import results_file
import rich.box
import rich.console
import rich.table
import torch
from attention import document_of
from decode_cpu import HEAD_DIM, NUM_KV_HEADS, NUM_Q_HEADS, OUTPUTS, make_node
from onnx import helper, numpy_helper

PAGE_ROWS = (16, 256)  # the smallest page that PagedAttention takes, and one that its FlashAttention reads in place
LIMIT = 3e-3  # ||a - b|| / ||b|| of two contestants' outputs
QUANTIZED = {"int8": (torch.int8, 127), "float8": (torch.float8_e4m3fn, 448)}  # dtype and largest number
PEER = {"faexport": "GroupQueryAttention"} | {f"faexport paged {n}": f"PagedAttention {n}" for n in PAGE_ROWS}
Call = Callable[[int], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Step:
    """`batch_size` entries that have `seqlen` rows each after the step, in a cache of as many."""

    batch_size: int
    seqlen: int
    paged: bool = False
    quantized: str = ""  # a key of QUANTIZED

    @property
    def cache_bytes(self) -> int:
        return 2 * (1 if self.quantized else 2) * self.batch_size * NUM_KV_HEADS * self.seqlen * HEAD_DIM


STEPS = (
    *(Step(b, s) for b, s in ((1, 512), (1, 4096), (1, 32768), (8, 4096), (16, 2048), (64, 2048), (8, 32768))),
    *(Step(b, s, paged=True) for b, s in ((1, 4096), (8, 4096), (16, 2048), (64, 2048))),
    *(Step(b, s, quantized=name) for b, s in ((1, 4096), (8, 4096), (16, 2048), (8, 32768)) for name in QUANTIZED),
)


def draw(step: Step) -> dict[str, torch.Tensor]:
    """What all contestants take; the caches BHSD."""
    cache = (step.batch_size, NUM_KV_HEADS, step.seqlen, HEAD_DIM)
    heads = {"query": NUM_Q_HEADS, "key": NUM_KV_HEADS, "value": NUM_KV_HEADS}
    shapes = {name: (step.batch_size, 1, n * HEAD_DIM) for name, n in heads.items()}
    shapes |= {"past_key": cache, "past_value": cache}
    drawn = {name: torch.randn(shape, device="cuda", dtype=torch.float16) for name, shape in shapes.items()}
    half = torch.arange(HEAD_DIM // 2, device="cuda") * 2 / HEAD_DIM
    angles = torch.arange(step.seqlen, device="cuda")[:, None] / 10000.0**half
    lengths = torch.full((step.batch_size,), step.seqlen, device="cuda", dtype=torch.int32)
    if step.quantized:
        dtype, largest = QUANTIZED[step.quantized]
        for name in ("past_key", "past_value"):
            numbers = (drawn[name].float() * (largest / 4)).clamp(-largest, largest)
            drawn[name] = (numbers if dtype.is_floating_point else numbers.round()).to(dtype)
        drawn |= {name: torch.tensor([4 / largest], device="cuda") for name in ("k_scale", "v_scale")}
    return drawn | {
        "cos_cache": angles.cos().half(),
        "sin_cache": angles.sin().half(),
        "nonpad_kv_seqlen": lengths,
        "seqlens_k": lengths - 1,
    }


def in_pages(step: Step, drawn: dict[str, torch.Tensor], page_rows: int) -> dict[str, torch.Tensor]:
    """The same step with its caches in pages, which lie in random order."""
    pages = step.seqlen // page_rows
    order = torch.randperm(step.batch_size * pages, device="cuda")
    found = {name: drawn[name].view(step.batch_size, -1) for name in ("query", "key", "value")}
    for name in ("past_key", "past_value"):
        rows = drawn[name].view(step.batch_size, NUM_KV_HEADS, pages, page_rows, HEAD_DIM).transpose(1, 2)
        found[name] = torch.empty_like(rows.transpose(2, 3).flatten(0, 1).contiguous())
        found[name][order] = rows.transpose(2, 3).flatten(0, 1)
    return found | {
        "cu_seqlens_q": torch.arange(step.batch_size + 1, device="cuda", dtype=torch.int32),
        "past_lengths": drawn["seqlens_k"],
        "block_table": order.view(step.batch_size, pages).int(),
        "cos_cache": drawn["cos_cache"],
        "sin_cache": drawn["sin_cache"],
    }


def quantize(kind: str, node: onnx.NodeProto) -> list[str]:
    """Gives a contestant's node of make_node a quantized cache, and returns its further inputs."""
    scales = ["k_scale", "v_scale"]
    attributes: dict[str, int | str] = {"kv_cache_bit_width": 8}
    if kind == "GroupQueryAttention":
        node.input.extend([""] * 3)  # positions, bias, sinks
        attributes |= {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR"}
    else:
        given = next(attribute for attribute in node.attribute if attribute.name == "optional_inputs")
        given.s += b"," + ",".join(scales).encode()
    node.input.extend(scales)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return scales


def make_model(kind: str, step: Step, tensors: dict[str, torch.Tensor]) -> tuple[bytes, list[str]]:
    """One contestant's model of one node, and the names of its inputs."""
    initializers = []
    if kind.startswith("faexport paged"):
        names = ["query", "key", "value", "past_key", "past_value", "cu_seqlens_q", "past_lengths", "block_table"]
        names += ["cos_cache", "sin_cache"]
        optional = ",".join(names[3:]).replace("past_lengths", "write_indices")
        node = helper.make_node(
            "FlashAttention", names, OUTPUTS, domain="faexport", q_num_heads=NUM_Q_HEADS, kv_num_heads=NUM_KV_HEADS,
            is_causal=1, cache="paged", optional_inputs=optional, optional_outputs=",".join(OUTPUTS[1:]),
        )  # fmt: skip
    elif kind.startswith("PagedAttention"):
        names = ["query", "key", "value", "past_key", "past_value", "cu_seqlens_q", "past_lengths", "block_table"]
        names += ["cos_cache", "sin_cache"]
        bounds = numpy_helper.from_array(np.array([1, step.seqlen], np.int32), "bounds")
        initializers.append(bounds)
        node = helper.make_node(
            "PagedAttention", [*names, *[""] * 6, "bounds"], OUTPUTS, domain="com.microsoft", num_heads=NUM_Q_HEADS,
            kv_num_heads=NUM_KV_HEADS, do_rotary=1,
        )  # fmt: skip
    else:
        node, names = make_node(kind)
        names += quantize(kind, node) if step.quantized else []
        if "total_sequence_length" in names:
            names.remove("total_sequence_length")
            total = np.array([step.seqlen], np.int32)
            initializers.append(numpy_helper.from_array(total, "total_sequence_length"))
    element = {name: attention_ort.ELEMENTS[tensors[name].dtype][0] for name in names}
    inputs = [helper.make_tensor_value_info(name, element[name], tensors[name].shape) for name in names]
    outputs = [helper.make_tensor_value_info(OUTPUTS[0], element["query"], None)]
    outputs += [helper.make_tensor_value_info(name, element["past_key"], None) for name in OUTPUTS[1:]]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("faexport", 1), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "step", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString(), names


def contestant(kind: str, step: Step, sets: list[dict[str, torch.Tensor]]) -> Call:
    """A session, and for each set of tensors a binding in which past and present are one buffer."""
    import onnxruntime as ort

    page_rows = int(kind.rsplit(maxsplit=1)[1]) if step.paged else 0
    made, bound = None, []
    for drawn in sets:
        tensors = dict(drawn)
        if page_rows:
            tensors = in_pages(step, drawn, page_rows)
            if kind.startswith("faexport"):
                tensors |= {name: tensors[name][None] for name in ("query", "key", "value")}
        model, names = make_model(kind, step, tensors)
        made = made or attention_ort.session(model, ours=True)
        tensors["output"] = torch.full_like(tensors["query"], float("nan"))
        outputs = {"output": tensors["output"], "present_key": tensors["past_key"]}
        outputs["present_value"] = tensors["past_value"]
        bound.append((attention_ort.bind(made, {name: tensors[name] for name in names}, outputs), tensors))
    run_options = ort.RunOptions()
    run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def call(i: int) -> torch.Tensor:
        binding, tensors = bound[i]
        made.run_with_iobinding(binding, run_options)
        return tensors["output"].view(step.batch_size, -1)

    return call


def measure(step: Step, rounds: int) -> dict:
    """One row of the results."""
    sets = [draw(step) for _ in range(gpu_timer.num_sets(step.cache_bytes))]
    kinds = [kind for pair in PEER.items() for kind in pair if ("aged" in kind) == step.paged]
    result = {**dataclasses.asdict(step), "refused": {}, "contestants": {}, "over_peer": {}}
    calls, wanted = {}, None
    for kind in kinds:
        try:
            call = contestant(kind, step, sets)
            found = call(0).double()
            torch.cuda.synchronize()
        except Exception as error:  # each runtime refuses in its own way
            result["refused"][kind] = str(error).strip().splitlines()[-1][:200]
            continue
        wanted = found if wanted is None else wanted
        difference = ((found - wanted).norm() / wanted.norm()).item()
        if difference <= LIMIT:
            calls[kind] = call
        else:
            result["refused"][kind] = f"differs from {kinds[0]} by {difference:.2g}"
    times, _ = gpu_timer.in_turn(calls, len(sets), rounds, capture=False)
    for kind, milliseconds in times.items():
        summary = {key: round(x, 5) for key, x in gpu_timer.summary(milliseconds).items()}
        summary["tb_per_s"] = round(step.cache_bytes / summary["median_ms"] / 1e9, 3)
        result["contestants"][kind] = summary
    for ours, peer in PEER.items():
        if ours in times and peer in times:
            ratio = result["contestants"][ours]["median_ms"] / result["contestants"][peer]["median_ms"]
            result["over_peer"][ours] = round(ratio, 3)
    return result


def show(console: rich.console.Console, rows: list[dict]) -> None:
    table = rich.table.Table(title="A decode step inside onnxruntime, float16, H32/8 D128", box=rich.box.SIMPLE_HEAD)
    for name in ("batch", "cache", "contestant", "µs", "TB/s", "of its peer's time"):
        table.add_column(name, justify="left" if name == "contestant" else "right")
    for row in rows:
        size = (str(row["batch_size"]), f"{row['seqlen']} {row['quantized']}".strip())
        for kind, times in row["contestants"].items():
            cells = (kind, f"{times['median_ms'] * 1e3:.1f}", f"{times['tb_per_s']:.2f}")
            table.add_row(*size, *cells, str(row["over_peer"].get(kind, "")))
        for kind, why in row["refused"].items():
            table.add_row(*size, kind, "–", "–", why)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of the contestants (%(default)s)")
    results_file.add_options(parser, name="decode_ort")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device")
    torch.cuda.set_stream(torch.cuda.Stream())  # onnxruntime takes one from outside only where it isn't the default one
    console, document = rich.console.Console(width=120), document_of(options)
    for step in STEPS:
        document["rows"].append(measure(step, options.rounds))
        path = results_file.write(options.name, document, options.record)
        torch.cuda.empty_cache()
    show(console, document["rows"])
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
