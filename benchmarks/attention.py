# SPDX-License-Identifier: Apache-2.0
"""Times attention on one GPU against its peers, all on the same tensors in one run.

Peers are PyTorch's FlashAttention-2, cuDNN and memory-efficient backends, FlashAttention-3 and -4 where they are
installed; inside onnxruntime the unfused graph, Attention, MultiHeadAttention and GroupQueryAttention. Each is compared
with float64 first, and one whose error is beyond its dtype's is not timed. benchmarks/plot.py draws what is written.
"""

from __future__ import annotations

import argparse
import subprocess
from typing import Any

import gpu_timer
import results_file
import rich.box
import rich.console
import rich.progress
import rich.table
import torch
from attention_rows import SUITES, Row, Tensors, draw, expected

# ||out - ref|| / ||ref||; weights in float8 give 0.026, and an output in float8 as much again
LIMIT = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5, "tf32": 2e-3, "float8_e4m3fn": 8e-2}
KERNELS = ("prefill_sm80", "prefill_sm90", "decode_splitkv", "decode_sm90", "backward_sm80", "backward_sm90")  # forced


def precision_of(row: Row, name: str) -> str:
    """What the contestant's products are computed in; float32 contestants say it in their names."""
    return "tf32" if row.dtype == "float32" and name.lower().endswith("tf32") else row.dtype


def is_ours(name: str) -> bool:
    return name.partition(" ")[0] == "ours" or name in KERNELS


def relative_error(row: Row, tensors: Tensors, out: torch.Tensor) -> float:
    rows = torch.linspace(0, row.seqlen - 1, min(row.seqlen, 96), device="cuda").long().unique()
    heads = max(1, min(row.num_heads, 2**24 // (row.batch_size * row.kv_len * row.head_dim)))
    want = expected(row, tensors, rows, heads)
    return ((out[:, rows, :heads].double() - want).norm() / want.norm()).item()


def error_of(row: Row, tensors: Tensors, found: Any) -> float:
    """Of what a contestant has returned: the output, or the gradients."""
    if row.backward:
        import attention_backward

        return attention_backward.relative_error(row, tensors, found)
    return relative_error(row, tensors, found)


def calls_of(row: Row, sets: list[Tensors], wanted: set[str]) -> tuple[dict[str, gpu_timer.Call], dict[str, str]]:
    """Contestants by name, and why others are not there."""
    if row.in_ort:
        import attention_ort

        found = attention_ort.contestants(row, sets, wanted)
        refused = {name: x for name, x in found.items() if isinstance(x, str)}
        return {name: x for name, x in found.items() if name not in refused}, refused
    if row.backward:
        import attention_backward as contestants
    elif row.dtype == "float8_e4m3fn":
        import attention_float8 as contestants
    else:
        import attention_torch as contestants

    found = contestants.contestants(row, sets[0], wanted)
    return {name: (lambda i, call=call: call(sets[i])) for name, call in found.items()}, {}


def drop_wrong(row: Row, sets: list[Tensors], calls: dict, refused: dict) -> dict[str, float]:
    """Runs each once, removes those that can't run the row or are wrong; returns the errors."""
    errors = {}
    for name in list(calls):
        try:
            errors[name] = error_of(row, sets[0], calls[name](0))
            torch.cuda.synchronize()
        except Exception as error:  # each peer refuses in its own way
            refused[name] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            del calls[name]
            continue
        if not errors[name] <= LIMIT[precision_of(row, name)]:
            refused[name] = f"wrong: relative error {errors[name]:.2g}"
            del calls[name]
    return errors


def measure(row: Row, options: argparse.Namespace) -> dict:
    """One row of the results."""
    first = draw(row)
    num_bytes = sum(t.nbytes for t in vars(first).values() if isinstance(t, torch.Tensor))
    sets = [first] + [draw(row) for _ in range(gpu_timer.num_sets(num_bytes) - 1)]
    calls, refused = calls_of(row, sets, set(options.contestants))
    errors = drop_wrong(row, sets, calls, refused)
    result = {"row": row.name, "dtype": row.dtype, "in_ort": row.in_ort, "refused": refused, "contestants": {}}
    if first.lengths is not None:
        result["visible_share"] = round(
            sum(t.lengths.sum().item() for t in sets) / (row.batch_size * row.kv_len * len(sets)), 4
        )
    if not calls:
        return result
    times, result["replayed"] = gpu_timer.in_turn(calls, len(sets), options.rounds, capture=not row.in_ort)
    for name, milliseconds in times.items():
        one = {key: round(x, 5) for key, x in gpu_timer.summary(milliseconds).items()}
        one["error"] = float(f"{errors[name]:.3g}")
        one["tflops"] = round(row.flops / one["median_ms"] / 1e9, 1)
        if row.seqlen <= 8:
            one["tb_per_s"] = round(row.kv_bytes * result.get("visible_share", 1) / one["median_ms"] / 1e9, 3)
        result["contestants"][name] = one
    add_ratios(row, result)
    return result


def add_ratios(row: Row, result: dict) -> None:
    """The best peer's time over ours, for each of ours; float32's precisions are held against peers that are at least
    as exact. "ours_over_best_peer" is that of the operator's default."""
    times = {name: one["median_ms"] for name, one in result["contestants"].items()}
    for name in times:
        if not name.startswith("ours"):
            continue
        exact_enough = (row.dtype, precision_of(row, name))
        peers = [t for peer, t in times.items() if not is_ours(peer) and precision_of(row, peer) in exact_enough]
        if peers:
            ratio = round(min(peers) / times[name], 3)
            result.setdefault("over_best_peer", {})[name] = ratio
            result.setdefault("ours_over_best_peer", ratio)


def print_results(console: rich.console.Console, results: list[dict]) -> None:
    names = list(dict.fromkeys(name for result in results for name in result["contestants"]))
    title = "TFLOP/s (higher is better); decoding in TB/s of keys and values"
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD)
    for heading in ("row", *names, "ours / best peer"):
        table.add_column(heading, justify="left" if heading == "row" else "right", no_wrap=True)
    for result in results:
        cells = [
            str(result["contestants"].get(n, {}).get("tb_per_s", result["contestants"].get(n, {}).get("tflops", "–")))
            for n in names
        ]
        table.add_row(result["row"], *cells, str(result.get("ours_over_best_peer", "–")))
    console.print(table)


def compare_with_maskless(results: list[dict]) -> None:
    """Where a row with lengths has its maskless twin here: its time over the twin's time times the visible share."""
    ours = {
        result["row"]: result["contestants"]["ours"]["median_ms"]
        for result in results
        if "ours" in result["contestants"]
    }
    for result in results:
        name = result["row"]
        maskless = name.removesuffix(" lengths")
        if name.endswith(" lengths") and {name, maskless} <= ours.keys() and "visible_share" in result:
            result["over_maskless_share"] = round(ours[name] / (ours[maskless] * result["visible_share"]), 3)


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("suites", nargs="*", default=["plain"], help=f"any of: {', '.join(SUITES)}, memory, all")
    parser.add_argument(
        "--contestants", nargs="*", default=[], help="names in the table, e.g. ours prefill_sm80 FA2; all if none"
    )
    parser.add_argument("--match", default="", help="only rows whose name contains this, e.g. 'd64 causal'")
    parser.add_argument("--rounds", type=int, default=15, help="times each contestant's turn comes")
    results_file.add_options(parser, name="attention")
    options = parser.parse_args()
    if unknown := set(options.suites) - {*SUITES, "memory", "all"}:
        parser.error(f"unknown suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}, memory and all")
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device")
    return options


def document_of(options: argparse.Namespace) -> dict:
    """What the numbers were measured with."""
    environment = results_file.environment(
        *(
            "torch",
            "triton",
            "onnxruntime-gpu",
            "fa3-fwd",
            "flash-attn-4",
            "nvidia-cudnn-cu13",
            "nvidia-cudnn-frontend",
        ),
        commit=options.commit,
    )
    gpu = {"gpu": torch.cuda.get_device_name(), "driver": driver(), "cudnn": torch.backends.cudnn.version()}
    return {**gpu, **environment, "rounds": options.rounds, "rows": []}


def main() -> None:
    options = parse()
    suites = [*SUITES, "memory"] if "all" in options.suites else options.suites
    rows = [row for suite in suites if suite != "memory" for row in SUITES[suite] if options.match in row.name]
    console = rich.console.Console(width=200)
    document = document_of(options)
    torch.cuda.set_stream(
        torch.cuda.Stream()
    )  # onnxruntime takes a stream from outside only where it isn't the default one
    if "memory" in suites:
        import attention_ort

        document["memory"] = attention_ort.memory_of_long_sequence()
        console.print(document["memory"])
    for row in rich.progress.track(rows, "measuring", console=console, disable=not console.is_terminal):
        document["rows"].append(measure(row, options))
        compare_with_maskless([result for result in document["rows"] if result["in_ort"] == row.in_ort])
        path = results_file.write(
            options.name, document, options.record
        )  # row by row: an interrupted run keeps what it has
        if not console.is_terminal:
            console.print(row.name, document["rows"][-1].get("ours_over_best_peer", document["rows"][-1]["refused"]))
        torch.cuda.empty_cache()
    print_results(console, document["rows"])
    console.print(f"written: {path}" if rows else "no row matches")


if __name__ == "__main__":
    main()
