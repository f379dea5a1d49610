# SPDX-License-Identifier: Apache-2.0
"""Writes the documentation's tables from the committed results; run it after a new measurement.

SECTIONS lists the pages and what is written into each, between two marks. A test compares the pages with what this
makes.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Callable

from model_pages import (
    bench_tables,
    encoder_gains,
    encoder_tables,
    fused_by_optimizer,
    gains_table,
    models_tables,
    verified_sentence,
)
from training_table import training_tables

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS = ("ours", "prefill_sm80", "prefill_sm90", "decode_splitkv", "decode_sm90")
GROUPS = {
    "no mask": lambda row: not any(word in row for word in ("s1x", "d512", "causal", "bias", "lengths", "mask")),
    "causal": lambda row: row.endswith("causal") and "/" not in row,
    "one causal prompt of 256 to 1,024 tokens": lambda row: row.endswith("causal") and "/" in row,
    "causal window of 1024": lambda row: "window" in row,
    "additive bias": lambda row: "bias" in row,
    "padding as lengths": lambda row: row.endswith("lengths"),
    "padding as a bool mask": lambda row: row.endswith(" mask"),
    "head_dim 512": lambda row: "d512" in row,
}
DECODING = "decoding, few query rows"


def gpu_table(data: dict) -> str:
    """Per kind of problem: our speed relative to the fastest peer on each row; over 1 is faster."""
    rows = [
        row
        for row in data["rows"]
        if not row["in_ort"] and row["dtype"] != "float32" and row.get("ours_over_best_peer")
    ]
    peers = {name for row in rows for name in row["contestants"]} - set(OURS)
    lines = [
        f"{data['gpu']}, bfloat16: speed relative to the fastest of "
        f"{', '.join(sorted(peers))} on each row (over 1: ours is faster):",
        "",
        "| | rows | geometric mean | worst | best |",
        "|---|---|---|---|---|",
    ]
    for name, belongs in GROUPS.items():
        lines += _group(name, [row["ours_over_best_peer"] for row in rows if belongs(row["row"])])
    lines += _group(DECODING, [row["ours_over_best_peer"] for row in decode_rows() if "ours_over_best_peer" in row])
    return "\n".join(lines)


def _group(name: str, ratios: list[float]) -> list[str]:
    if not ratios:
        return []
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return [f"| {name} | {len(ratios)} | {mean:.2f} | {min(ratios):.2f} | {max(ratios):.2f} |"]


def decode_rows() -> list[dict]:
    return json.loads((RESULTS / "decode.json").read_text("utf-8"))["rows"]


def decode_section() -> str:
    """docs/decoding.md's table: microseconds of each row, ours and the fastest peer's; the cache's bytes a second."""
    data = json.loads((RESULTS / "decode.json").read_text("utf-8"))
    lines = [
        f"{data['gpu']}, driver {data['driver']}, commit {data['commit']}, {data['date'][:10]}; bfloat16, from a CUDA "
        "graph with rotating inputs\n(`benchmarks/attention.py decode --name decode`):",
        "",
        "| row | ours, µs | TB/s | fastest peer, µs | ratio | decode_splitkv, µs |",
        "|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        times = {name: 1e3 * one["median_ms"] for name, one in row["contestants"].items()}
        peers = {name: time for name, time in times.items() if name not in OURS}
        best = min(peers, key=lambda name: peers[name], default="")
        peer = f"{best} {peers[best]:.1f}" if best else "–"
        split = f"{times['decode_splitkv']:.1f}" if "decode_splitkv" in times else "–"
        ours, ratio = row["contestants"]["ours"], row.get("ours_over_best_peer")
        rate = f"{ours['tb_per_s']:.2f}" if "tb_per_s" in ours else "–"
        speed = f"{times['ours']:.1f} | {rate}"
        lines.append(f"| {row['row']} | {speed} | {peer} | {ratio or '–'} | {split} |")
    return "\n".join(lines) + "\n"


def _speed_table(rows: list[dict], brackets: list[str]) -> list[str]:
    """TFLOP/s of ours by kind and length, those of the contestants `brackets` behind it."""
    by_kind: dict[str, dict[int, str]] = {}
    for row in rows:
        _, _, length, head_dim, *words = row["row"].split()
        speeds = {name: one["tflops"] for name, one in row["contestants"].items()}
        cell = f"{speeds['ours']:.0f} ({', '.join(f'{speeds[name]:.0f}' for name in brackets)})"
        kind = f"{head_dim} {'causal' if 'causal' in words else 'full'}"
        by_kind.setdefault(kind, {})[int(length.removeprefix("s"))] = cell
    lengths = sorted(next(iter(by_kind.values())))
    return [
        f"| | {' | '.join(f'S {length}' for length in lengths)} |",
        f"|---|{'---|' * len(lengths)}",
        *(f"| {kind} | {' | '.join(cells[n] for n in lengths)} |" for kind, cells in by_kind.items()),
        "",
    ]


def _ratios(rows: list[dict]) -> str:
    ratios = [row["ours_over_best_peer"] for row in rows]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def prefill_section() -> str:
    """docs/kernels.md's table of prefill_sm90: TFLOP/s by head size and length, the peers' in brackets."""
    data = json.loads((RESULTS / "attention.json").read_text("utf-8"))
    names = ["cuDNN", "FA3", "FA4"]
    wanted = re.compile(r"b\d+ h\d+ s(512|1024|2048|4096|8192|16384) d(64|128|256)( causal)?")
    rows = [row for row in data["rows"] if wanted.fullmatch(row["row"]) and row["dtype"] == "bfloat16"]
    head = (
        f"{data['gpu']}, driver {data['driver']}, commit {data['commit']}, {data['date'][:10]}; bfloat16, TFLOP/s, 16k "
        f"tokens (`benchmarks/attention.py`), in\nbrackets {', '.join(names)}; relative to the fastest peer "
        f"{_ratios(rows)}:"
    )
    return "\n".join([head, "", *_speed_table(rows, names)])


def float8_section() -> str:
    """docs/float8.md's table of float8: TFLOP/s by head size and length, the peers' in brackets."""
    data = json.loads((RESULTS / "fp8.json").read_text("utf-8"))
    names = [name for name in data["rows"][0]["contestants"] if name != "ours"]
    head = (
        f"{data['gpu']}, driver {data['driver']}, commit {data['commit']}, {data['date'][:10]}; TFLOP/s, 16k "
        f"tokens (`benchmarks/attention.py fp8 --name fp8`), in\nbrackets {', '.join(names)}; relative to the "
        f"fastest float8 peer {_ratios(data['rows'])}:"
    )
    return "\n".join([head, "", *_speed_table(data["rows"], names)])


def accuracy_section() -> str:
    """docs/float8.md's table of float8's errors."""
    data = json.loads((RESULTS / "fp8_accuracy.json").read_text("utf-8"))
    names = list(data["rows"][0]["contestants"])
    lines = [
        f"{data['gpu']}, commit {data['commit']}, {data['date'][:10]} (`benchmarks/attention_accuracy.py`), "
        f"d{data['head_dim']}; errors to float64 of the float8\ntensors in percent of the root mean square of the "
        "output (in brackets to the tensors before they were rounded with a factor for each head):",
        "",
        f"| data | S | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for row in data["rows"]:
        errors = [row["contestants"][name] for name in names]
        cells = [f"{x['error_percent']:.2f} ({x['error_before_rounding_percent']:.2f})" for x in errors]
        lines.append(f"| {row['data']} | {row['seqlen']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def backward_section() -> str:
    """docs/backward.md's tables: TFLOP/s of the backward pass, and of both passes, the peers' in brackets."""
    data = json.loads((RESULTS / "backward.json").read_text("utf-8"))
    names = ["cuDNN", "FA2", "FA4"]
    in_float32 = [row for row in data["rows"] if row["dtype"] == "float32"]
    plain = [row for row in data["rows"] if not any(word in row["row"] for word in ("window", "bias", "float32"))]
    parts = [
        f"{data['gpu']}, driver {data['driver']}, PyTorch {data['versions']['torch']}, commit {data['commit']}, "
        f"{data['date'][:10]}; bfloat16, 16k tokens, TFLOP/s\n(`benchmarks/attention.py backward --name backward`; the "
        f"backward pass counts as 2.5 times the forward's work), in brackets {', '.join(names)}."
    ]
    for title, both in (("The backward pass", False), ("Forward and backward", True)):
        rows = [row for row in plain if ("forward and" in row["row"]) == both]
        groups = {d: [row for row in rows if f" {d} " in row["row"]] for d in ("d64", "d128", "d256")}
        ratios = ", ".join(f"{d} {_ratios(group)}" for d, group in groups.items())
        parts += ["", f"{title}; relative to the fastest peer: {ratios}.", "", *_speed_table(rows, names)[:-1]]
    return "\n".join([*parts, *_float32_backward(in_float32), ""])


def _float32_backward(rows: list[dict]) -> list[str]:
    """The backward pass of float32: TFLOP/s of ours and of the peers, in each precision."""
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row["contestants"]))
    lines = ["", "float32, TFLOP/s by the precision of the products:", "", f"| | {' | '.join(names)} |"]
    lines.append(f"|---|{'---|' * len(names)}")
    for row in rows:
        cells = [f"{row['contestants'][name]['tflops']:.1f}" if name in row["contestants"] else "–" for name in names]
        lines.append(f"| {row['row'].replace(' float32 backward', '')} | {' | '.join(cells)} |")
    return lines


def _measured_with(data: dict) -> str:
    return (
        f"{data['gpu']}, driver {data['driver']}, onnxruntime {data['versions']['onnxruntime-gpu']}, commit "
        f"{data['commit']}, {data['date'][:10]}"
    )


def step_section() -> str:
    """docs/decoding.md's table of whole steps in onnxruntime: microseconds, and our time over the peer's."""
    data = json.loads((RESULTS / "decode_ort.json").read_text("utf-8"))
    lines = [
        f"{_measured_with(data)}; float16, 32/8 heads of 128, a whole step inside onnxruntime\n"
        "(`benchmarks/decode_ort.py`; pages have as many rows as the peer's name says):",
        "",
        "| batch | keys | ours, µs | peer, µs | ours over peer |",
        "|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        found = row["contestants"]
        for ours, ratio in row["over_peer"].items():
            peer = ours.replace("faexport paged", "PagedAttention").replace("faexport", "GroupQueryAttention")
            times = f"{1e3 * found[ours]['median_ms']:.1f} | {peer} {1e3 * found[peer]['median_ms']:.1f}"
            keys = f"{row['seqlen']} {row.get('quantized', '')}".strip()
            lines.append(f"| {row['batch_size']} | {keys} | {times} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def llm_section() -> str:
    """docs/llm.md's table of decoder layers: milliseconds, tokens a second, memory beside weights and caches."""
    data = json.loads((RESULTS / "llm.json").read_text("utf-8"))
    layers = {row["layers"] for row in data["rows"]}
    lines = [
        f"{_measured_with(data)}; float16, {', '.join(map(str, sorted(layers)))} layers without embedding and output "
        "projection\n(`benchmarks/llm.py`). A prompt's time is that to its first token; tokens a second are those of "
        "these layers alone:",
        "",
        "| | GroupQueryAttention, ms | rewritten, ms | speed-up | rewritten, tokens/s | memory, MiB (before) |",
        "|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        ours, theirs = (row["contestants"][name] for name in ("faexport", "GroupQueryAttention"))
        memory = f"{ours['memory_MiB']:.0f} ({theirs['memory_MiB']:.0f})"
        times = f"{theirs['median_ms']:.2f} | {ours['median_ms']:.2f} | {row['speedup']:.2f}"
        lines.append(f"| {row['row']} | {times} | {ours['tokens_per_s']:,.0f} | {memory} |")
    return "\n".join(lines) + "\n"


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
        if not row["in_ort"] or row["dtype"] == "float32" or shape != "b4 h16" or kind not in kinds:
            continue
        found = [row["contestants"].get(name) for name in names]
        cells = [f"{one['median_ms']:.2f}" if one else "–" for one in found]
        lines.append(f"| {kinds[kind]}, {head_dim.replace('d', 'head_dim ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def float32_table(data: dict) -> str:
    """Times of float32 inside onnxruntime's CUDA provider."""
    rows = [row for row in data["rows"] if row["in_ort"] and row["dtype"] == "float32"]
    if not rows:
        return ""
    names = (
        *("ours tf32", "unfused TF32", "MultiHeadAttention TF32", "Attention TF32"),
        *("ours tf32x3", "unfused float32", "MultiHeadAttention float32", "Attention float32"),
    )
    lines = [
        f"The same in float32, with products in TF32 (onnxruntime's default, relative error about "
        f"{_largest_error(rows, 'ours tf32'):.0e}) and in float32 (ours: three products in TF32, "
        f"{_largest_error(rows, 'ours tf32x3'):.0e}), milliseconds:",
        "",
        f"| | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for row in rows:
        found = [row["contestants"].get(name) for name in names]
        cells = [f"{one['median_ms']:.3f}" if one else "–" for one in found]
        lines.append(f"| {row['row'].removesuffix(' float32')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _largest_error(rows: list[dict], name: str) -> float:
    return max((row["contestants"][name]["error"] for row in rows if name in row["contestants"]), default=math.nan)


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


def _tables(*tables: tuple[str, Callable[[dict], str]]) -> str:
    """Those whose results are there, from one file each."""
    there = ((RESULTS / name, table) for name, table in tables if (RESULTS / name).exists())
    made = (table(json.loads(path.read_text("utf-8"))) for path, table in there)
    return ("\n\n".join(filter(None, made)) or "Not recorded yet.") + "\n"


def gains_section() -> str:
    """The README's first table."""
    return _tables(("models.json", gains_table))


def encoder_summary() -> str:
    """The README's of whole encoders: how many times as fast as the fastest of all other files."""
    lines = [
        "Whole encoders (BERT, MiniLM, ViT, CLIP, Whisper, T5), each exported by PyTorch in three ways: speed of our "
        "slowest file relative to the fastest\nof all others, by onnxruntime's optimizer, by onnxscript, and as "
        "exported ([each row](docs/numbers.md#whole-encoders)):",
        "",
        "| | rows | geometric mean | worst | best |",
        "|---|---|---|---|---|",
    ]
    for name in ("encoders.json", "encoders_cpu.json"):
        for title, ratios in encoder_gains(json.loads((RESULTS / name).read_text("utf-8"))).items():
            lines += _group(title, ratios)
    return "\n".join(lines) + "\n"


def speed_section() -> str:
    """The README's: whole encoders, and attention beside its peers."""
    return f"{encoder_summary()}\n" + _tables(("attention.json", gpu_table), ("cpu.json", cpu_table))


def encoders_section() -> str:
    """docs/numbers.md's tables of whole encoders."""
    return _tables(
        ("encoders.json", encoder_tables), ("encoders_cpu.json", encoder_tables), ("encoders.json", fused_by_optimizer)
    )


def numbers_section() -> str:
    """docs/numbers.md's tables of one node in onnxruntime."""
    return _tables(("attention.json", ort_table), ("attention.json", float32_table))


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


def suite_sentence() -> str:
    """The README's sentence on ONNX's node tests."""
    data = json.loads((RESULTS / "onnx_suite.json").read_text("utf-8"))
    return (
        f"**ONNX's own node tests** of `Attention` (onnx {data['versions']['onnx']}, `make onnx-suite`): "
        f"{data['right']} fused and right, {data['refused']} refused because the test asks for\nthe scores too "
        f"(`qk_matmul_output`), {data['wrong']} wrong. onnxruntime {data['versions']['onnxruntime']} by itself passes "
        f"{data['onnxruntime_alone']} of these {data['tests']}.\n"
    )


def exports_section() -> str:
    """The README's numbers of what is fused."""
    data = json.loads((RESULTS / "zoo.json").read_text("utf-8"))
    total, share = data["summary"], data["summary"]["fused"] / data["summary"]["blocks"]
    peers = {name: counts["fused"] for name, counts in total["peers"].items()}
    return suite_sentence() + (
        f"\n**Real exports** (`make zoo ZOO=folder`): small models of transformers' architectures and PyTorch modules, "
        "exported by both of PyTorch's\nexporters and by transformers' own, eager and SDPA, opset 14 to 24, with and "
        "without a KV cache, some in float16, decoys among them.\n"
        f"Of {total['blocks']:,} attention blocks {total['fused']:,} are fused ({100 * share:.1f} %), {total['wrong']} "
        f"wrong; {total['not_run']} of the {total['models']} models do not run in\nonnxruntime before any change and "
        "could not be compared. Every export is run at other batch sizes and lengths than it was made with.\n"
        f"onnxscript's `ort_fusions` fuses {peers['onnxscript']} of these blocks, onnxruntime's transformers optimizer "
        f"{peers['onnxruntime']}; by kind of export:\n[docs/faexport.md](docs/faexport.md#how-much-is-fused).\n"
    )


def faexport_bench_section() -> str:
    """docs/faexport.md's tables of `faexport bench`."""
    return _tables(("bench.json", bench_tables))


def models_section() -> str:
    """docs/models.md's tables, and what was verified on CUDA."""
    return _tables(("models.json", models_tables), ("models_verified.json", verified_sentence))


def training_section() -> str:
    """docs/torch.md's tables."""
    return _tables(("training.json", training_tables))


# What stands between a page's marks, by the marks' name.
SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"gains": gains_section, "exports": exports_section, "speed": speed_section},
    "docs/backward.md": {"backward": backward_section},
    "docs/faexport.md": {"bench": faexport_bench_section, "zoo": zoo_section},
    "docs/kernels.md": {"prefill": prefill_section},
    "docs/decoding.md": {"steps": step_section, "decode": decode_section},
    "docs/float8.md": {"float8 accuracy": accuracy_section, "float8": float8_section},
    "docs/llm.md": {"llm": llm_section},
    "docs/models.md": {"models": models_section},
    "docs/numbers.md": {"encoders": encoders_section, "speed": numbers_section},
    "docs/torch.md": {"training": training_section},
}


def updated(name: str, text: str) -> str:
    """A page with the numbers of today's results."""
    for title, section in SECTIONS[name].items():
        begin, end = f"<!-- {title}: written by benchmarks/readme.py -->\n", f"<!-- end of {title} -->\n"
        head, rest = text.split(begin)
        text = head + begin + section() + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    for name in SECTIONS:
        page = ROOT / name
        page.write_text(updated(name, page.read_text("utf-8")), "utf-8")
