# SPDX-License-Identifier: Apache-2.0
"""Writes the documentation's tables from the committed results; run it after a new measurement.

The README's tables of speed, and docs/faexport.md's table of the zoo. A test compares the pages with what this makes.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- speed: written by benchmarks/readme.py -->\n", "<!-- end of speed -->\n"
ZOO_BEGIN, ZOO_END = "<!-- zoo: written by benchmarks/readme.py -->\n", "<!-- end of zoo -->\n"
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


def ort_table(data: dict) -> str:
    """Times inside onnxruntime's CUDA provider; "–" where an operator can't take the mask, or is wrong."""
    names = ("ours", "MultiHeadAttention", "Attention", "unfused")
    lines = [
        f"Inside onnxruntime {data['versions']['onnxruntime-gpu']}'s CUDA provider, {data['gpu']}, float16, "
        "4 × 16 heads, 2048 × 2048, milliseconds:",
        "",
        f"| | {' | '.join(names)} |",
        "|---|---|---|---|---|",
    ]
    kinds = {
        "": "no mask",
        "causal": "causal",
        "lengths": "padding as lengths",
        "mask": "padding as a bool mask",
        "bias_1HSS": "bias [1, H, S, S]",
    }
    for row in data["rows"]:
        shape, _, kind = row["row"].partition(" s2048 ")
        head_dim, _, kind = kind.partition(" ")
        if not row["in_ort"] or shape != "b4 h16" or kind not in kinds:
            continue
        found = [row["contestants"].get(name) for name in names]
        cells = [f"{one['median_ms']:.2f}" if one else "–" for one in found]
        lines.append(f"| {kinds[kind]}, {head_dim.replace('d', 'head_dim ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bert_table(data: dict) -> str:
    """A whole model by its three files."""
    lines = [
        f"BERT-base (12 layers, float16, padding mask) in onnxruntime {data['versions']['onnxruntime-gpu']}, "
        f"{data['gpu']}, milliseconds:",
        "",
        "| batch × length | faexport | onnxruntime's optimizer | unfused |",
        "|---|---|---|---|",
    ]
    for row in data["rows"]:
        times = {name: one["median_ms"] for name, one in row["contestants"].items()}
        cells = " | ".join(f"{times[name]:.2f}" for name in ("ours", "onnxruntime", "unfused"))
        batch_size, seqlen = (word[1:] for word in row["row"].split()[1:])
        lines.append(f"| {batch_size} × {seqlen} | {cells} |")
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
    tables = (
        ("bert.json", bert_table),
        ("attention.json", ort_table),
        ("attention.json", gpu_table),
        ("cpu.json", cpu_table),
    )
    for name, table in tables:
        if (RESULTS / name).exists():
            parts.append(table(json.loads((RESULTS / name).read_text("utf-8"))))
    return "\n\n".join(parts) + "\n"


def zoo_section() -> str:
    """Blocks fused by slice, by us and by the peers, in brackets those in models that then ran and agreed."""
    data = json.loads((RESULTS / "zoo.json").read_text("utf-8"))
    versions, total = data["versions"], data["summary"]
    lines = [
        f"{total['models']} models, {total['blocks']} attention blocks; {data['date'][:10]}, commit {data['commit']}, "
        f"onnxruntime {versions['onnxruntime']}, onnxscript {versions['onnxscript']}. Blocks fused, in brackets those "
        f"in models that then ran and agreed with the original ({total['not_run']} originals do not run at all):",
        "",
        "| slice | models | blocks | faexport | onnxruntime's optimizer | onnxscript's ort_fusions |",
        "|---|---|---|---|---|---|",
    ]
    for name, counts in data["slices"].items():
        tools = [counts, *(counts["peers"][peer] for peer in ("onnxruntime", "onnxscript"))]
        cells = [f"{tool['fused']} ({tool['fused_and_right']})" for tool in tools]
        lines.append(f"| {name} | {counts['models']} | {counts['blocks']} | {' | '.join(cells)} |")
    wrong = [f"{name} {counts['wrong']}" for name, counts in total["peers"].items()]
    lines += ["", f"Models with other results than the original: faexport {total['wrong']}, {', '.join(wrong)}."]
    return "\n".join(lines) + "\n"


def replaced(text: str, begin: str, end: str, section: str) -> str:
    """The page with another section between its two marks."""
    head, rest = text.split(begin)
    return head + begin + section + end + rest.split(end)[1]


def updated(text: str) -> str:
    """The README with the tables of today's results."""
    return replaced(text, BEGIN, END, section())


def updated_zoo(text: str) -> str:
    """docs/faexport.md, likewise."""
    return replaced(text, ZOO_BEGIN, ZOO_END, zoo_section())


if __name__ == "__main__":
    for name, update in (("README.md", updated), ("docs/faexport.md", updated_zoo)):
        page = ROOT / name
        page.write_text(update(page.read_text("utf-8")), "utf-8")
    sys.exit(0)
