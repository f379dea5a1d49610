# SPDX-License-Identifier: Apache-2.0
"""Writes the README's tables of speed from the committed results; run it after a new measurement.

A test compares the README with what this makes.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- speed: written by benchmarks/readme.py -->\n", "<!-- end of speed -->\n"
OURS = ("ours", "prefill_sm80", "prefill_sm90")
GROUPS = {
    "no mask": lambda row: "s1x" not in row and not any(word in row for word in ("causal", "bias", "lengths", "mask")),
    "causal": lambda row: row.endswith("causal"),
    "causal window of 1024": lambda row: "window" in row,
    "additive bias": lambda row: "bias" in row,
    "padding as lengths": lambda row: row.endswith("lengths"),
    "padding as a bool mask": lambda row: row.endswith(" mask"),
    "decoding, one query row": lambda row: "s1x" in row,
}


def gpu_table(data: dict) -> str:
    """Per kind of problem: our speed relative to the fastest peer on each row; over 1 is faster."""
    rows = [row for row in data["rows"] if not row["in_ort"] and row.get("ours_over_best_peer")]
    peers = {name for row in rows for name in row["contestants"]} - set(OURS)
    lines = [
        f"{data['gpu']}, bfloat16: speed relative to the fastest of "
        f"{', '.join(sorted(peers))} on each row (over 1: ours is faster):",
        "",
        "| | rows | geometric mean | worst | best |",
        "|---|---|---|---|---|",
    ]
    for name, belongs in GROUPS.items():
        ratios = [row["ours_over_best_peer"] for row in rows if belongs(row["row"])]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            lines.append(f"| {name} | {len(ratios)} | {mean:.2f} | {min(ratios):.2f} | {max(ratios):.2f} |")
    return "\n".join(lines)


def cpu_table(data: dict) -> str:
    """Medians and memory beside onnxruntime's own operator and the unfused graph."""
    names = {"faexport": "ours", "MultiHeadAttention": "MultiHeadAttention", "unfused": "unfused"}
    lines = [
        f"CPU, {data['threads']} threads, float32, 12 heads of 64, in onnxruntime {data['versions']['onnxruntime']} "
        f"(median time, memory above the tensors; load average {data['load_average']:.1f} during the run):",
        "",
        f"| queries × keys | {' | '.join(names.values())} |",
        "|---|---|---|---|",
    ]
    for row in data["rows"]:
        cells = [row["contestants"][name] for name in names]
        texts = [f"{cell['median_ms']:.0f} ms, {cell['peak_bytes'] / 1e6:.0f} MB" for cell in cells]
        kind = " causal" if row["is_causal"] else ""
        lines.append(f"| {row['seqlen_q']} × {row['seqlen_kv']}{kind} | {' | '.join(texts)} |")
    return "\n".join(lines)


def section() -> str:
    parts = []
    for name, table in (("attention.json", gpu_table), ("cpu.json", cpu_table)):
        if (RESULTS / name).exists():
            parts.append(table(json.loads((RESULTS / name).read_text("utf-8"))))
    return "\n\n".join(parts) + "\n"


def updated(text: str) -> str:
    """The README with the tables of today's results between the two marks."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + section() + END + rest.split(END)[1]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text("utf-8")), "utf-8")
    sys.exit(0)
