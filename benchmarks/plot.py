# SPDX-License-Identifier: Apache-2.0
"""Draws benchmarks/results/attention.json: speed against sequence length, full and causal, one picture a head size, and
for the README time and memory of one layer in onnxruntime.

Memory is drawn from its definition, not measured: what one layer needs beside inputs and output, fused and unfused.
Needs matplotlib (pip install '.[bench]').
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import re

import matplotlib.pyplot as plt

RESULTS = pathlib.Path(__file__).with_name("results")
COLOURS = {
    "ours": "#c0392b",
    "prefill_sm80": "#e59866",
    "FA2": "#2e86c1",
    "cuDNN": "#28b463",
    "FA3": "#d68910",
    "FA4": "#7d3c98",
}


def series(rows: list[dict], head_dim: int, is_causal: bool) -> dict[str, list[tuple[int, float]]]:
    """[(sequence length, TFLOP/s)] by contestant, of the suite "plain"."""
    found: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    pattern = re.compile(rf"^b\d+ h\d+ s(\d+) d{head_dim}{' causal' if is_causal else ''}$")
    for row in rows:
        if (match := pattern.match(row["row"])) and not row["in_ort"]:
            for name, one in row["contestants"].items():
                found[name].append((int(match[1]), one["tflops"]))
    return found


def draw_speed(document: dict, head_dim: int, path: pathlib.Path) -> bool:
    """False where the results have no rows of that head size."""
    panels = [series(document["rows"], head_dim, is_causal) for is_causal in (False, True)]
    if not any(panels):
        return False
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, lines, title in zip(axes, panels, ("full", "causal"), strict=True):
        for name, points in lines.items():
            lengths, speeds = zip(*sorted(points), strict=True)
            width = 2.5 if name == "ours" else 1.2
            axis.plot(lengths, speeds, marker="o", markersize=3, label=name, color=COLOURS.get(name), linewidth=width)
        axis.set(title=f"{title}, head_dim {head_dim}", xlabel="sequence length", xscale="log")
        axis.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
        axis.get_xaxis().set_major_formatter("{x:.0f}")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="TFLOP/s (bf16, 16k tokens)", ylim=(0, None))
    axes[1].legend(fontsize=8)
    figure.suptitle(f"{document['gpu']}, commit {document['commit']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    return True


def draw_overview(document: dict, path: pathlib.Path) -> None:
    """Time and memory of one layer in onnxruntime against its length, in float16, without a mask."""
    batch, num_heads, head_dim = 4, 16, 64
    names = {"unfused": "as exported", "Attention": "ONNX Attention", "ours": "faexport"}
    pattern = re.compile(rf"^b{batch} h{num_heads} s(\d+) d{head_dim}$")
    rows = {int(m[1]): row for row in document["rows"] if row["in_ort"] and (m := pattern.match(row["row"]))}
    lengths = sorted(rows)
    figure, (times, memory) = plt.subplots(1, 2, figsize=(10, 3.6))
    for name, label in names.items():
        medians = [rows[length]["contestants"][name]["median_ms"] for length in lengths]
        colour = COLOURS.get(name, "#7f8c8d" if name == "unfused" else "#2e86c1")
        times.plot(lengths, medians, marker="o", markersize=3, label=label, color=colour)
        extra = [0.0] * len(lengths)
        if name == "unfused":  # scores and weights
            extra = [2 * 2 * batch * num_heads * length**2 / 2**20 for length in lengths]
        if name != "Attention":
            memory.plot(lengths, extra, marker="o", markersize=3, label=label, color=colour)
    times.set(title="time of one layer", ylabel="ms", yscale="log")
    memory.set(title="memory beside inputs and output", ylabel="MiB")
    memory.set_yscale("symlog", linthresh=1)
    for axis in (times, memory):
        axis.set(xlabel="sequence length", xscale="log")
        axis.set_xticks(lengths)
        axis.get_xaxis().set_major_formatter("{x:.0f}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    shape = f"batch {batch}, {num_heads} heads of {head_dim}, float16"
    figure.suptitle(f"onnxruntime on {document['gpu']}, {shape}, commit {document['commit']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=pathlib.Path, default=RESULTS / "attention.json")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the pictures")
    options = parser.parse_args()
    if not options.results.exists():
        parser.error(f"{options.results} does not exist; benchmarks/attention.py writes it")
    document = json.loads(options.results.read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    for head_dim in (64, 128, 256):
        path = options.out / f"attention_d{head_dim}.png"
        if draw_speed(document, head_dim, path):
            print(path)
    draw_overview(document, options.out / "overview.png")
    print(options.out / "overview.png")


if __name__ == "__main__":
    main()
