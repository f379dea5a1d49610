# SPDX-License-Identifier: Apache-2.0
"""Tables of whole models from the results of encoders.py, models.py and bench_models.py. Called by readme.py."""

from __future__ import annotations

import math

FILES = {
    "ours": "faexport",
    "onnxruntime": "onnxruntime's optimizer",
    "onnxscript": "onnxscript",
    "unfused": "unfused",
}
NO_FILES = {"compiled": "torch.compile"}  # of the same model in PyTorch
EXPORTS = ("eager", "sdpa", "dynamo")
NO_TIME = "no time was left"  # what verify_models.py writes of an export


def encoder_tables(data: dict) -> str:
    """Whole encoders, a table a dtype: a cell has the times of the three exports."""
    where = data.get("gpu") or f"CPU, {data['threads']} threads ({data['cpu']})"
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in data["rows"]):
        lines = [
            f"Whole encoders, {dtype}, in onnxruntime {_runtime(data)}, {where}: milliseconds of the files made "
            f"from three exports of {_exporters(data)} ({', '.join(EXPORTS)}; – failed, ! wrong). "
            "The last column: how many times as fast as the fastest of all other files, from the worst of the three:",
            "",
            f"| batch × length | {' | '.join(FILES.values())} | times as fast |",
            "|---" * (len(FILES) + 2) + "|",
        ]
        for row in (row for row in data["rows"] if row["dtype"] == dtype):
            cells = [" / ".join(_cell(row, file, how) for how in EXPORTS) for file in FILES]
            ratio = times_as_fast(row)
            cells.append("–" if ratio is None else f"{ratio:.2f}")
            lines.append(f"| {_title(row)} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def encoder_gains(data: dict) -> dict[str, list[float]]:
    """How many times as fast as the fastest of all other files: a row's ratio, by dtype and place."""
    found: dict[str, list[float]] = {}
    where = data.get("gpu") or f"CPU, {data['threads']} threads"
    for row in data["rows"]:
        if (ratio := times_as_fast(row)) is not None:
            found.setdefault(f"{row['dtype']}, {where}, onnxruntime {_runtime(data)}", []).append(ratio)
    return found


def _runtime(data: dict) -> str:
    return next(data["versions"][name] for name in ("onnxruntime-gpu", "onnxruntime") if name in data["versions"])


def _exporters(data: dict) -> str:
    return " and ".join(data["exported_by"]).replace("pytorch", "PyTorch")


def _is_right(found: dict, row: dict) -> bool:
    """Near the float32 original, which itself is multiplied in TF32 on GPUs."""
    return found["difference"] is not None and found["difference"] < (0.05 if row["dtype"] == "float16" else 0.01)


def _cell(row: dict, file: str, how: str) -> str:
    found = row["contestants"].get(f"{file}, {how}")
    if found is None:
        return "–"
    digits = 3 if found["median_ms"] < 1 else 2 if found["median_ms"] < 100 else 0
    return f"{found['median_ms']:.{digits}f}" + ("" if _is_right(found, row) else " !")


def times_as_fast(row: dict) -> float | None:
    """The fastest other file's time over our slowest; None where one of these is missing or wrong."""
    ours = [row["contestants"].get(f"ours, {how}") for how in EXPORTS]
    others = [
        found["median_ms"]
        for name, found in row["contestants"].items()
        if not name.startswith("ours") and _is_right(found, row)
    ]
    if not others or not all(found and _is_right(found, row) for found in ours):
        return None
    return min(others) / max(found["median_ms"] for found in ours if found)


def fused_by_optimizer(data: dict) -> str:
    """What onnxruntime's optimizer fused of each encoder and export, of those whose files were counted."""
    lines = []
    for encoder in dict.fromkeys(row["encoder"] for row in data["rows"]):
        exports = [data["fused"].get(f"{encoder} {how}", {}) for how in EXPORTS]
        counts = [found.get("float32 onnxruntime", found.get("float16 onnxruntime")) for found in exports]
        cells = [
            "not counted" if count is None else ", ".join(f"{number} {op}" for op, number in count.items()) or "–"
            for count in counts
        ]
        title = next(row["row"] for row in data["rows"] if row["encoder"] == encoder).rsplit(" b", 1)[0]
        if any(count is not None for count in counts):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    if not lines:
        return ""
    header = [f"| | {' | '.join(EXPORTS)} |", "|---" * (len(EXPORTS) + 1) + "|"]
    return "\n".join(["What onnxruntime's optimizer makes of these exports:", "", *header, *lines])


GAINS = ("bert_large", "vit_large_518", "whisper_large", "sam", "sdxl", "gpt3", "mistral", "long_range")


def gains_table(data: dict) -> str:
    """The README's first: some of the models, each at the largest of its sizes that was measured."""
    largest = {row["encoder"]: row for row in data["rows"] if _over(row, ("unfused",)) is not None}
    lines = [
        f"float16, onnxruntime {data['versions']['onnxruntime-gpu']}, {data['gpu']}; milliseconds of a run, and "
        "the MB that it takes beside the weights. The best other tool is onnxruntime's optimizer or onnxscript:",
        "",
        "| model, batch × length | as exported | best other tool | faexport | times as fast as exported | memory |",
        "|---" * 6 + "|",
    ]
    for row in (largest[encoder] for encoder in GAINS if encoder in largest):
        unfused, ours = _best(row, "unfused"), _best(row, "ours")
        tools = [one for one in (_best(row, file) for file in ("onnxruntime", "onnxscript")) if one is not None]
        cells = [
            _title(row),
            _number(unfused, "median_ms", 2),
            _number(min(tools, key=lambda one: one["median_ms"], default=None), "median_ms", 2),
            _number(ours, "median_ms", 2),
            _number({"ratio": _over(row, ("unfused",))}, "ratio", 1),
            f"{_number(unfused, 'memory_mb', 0)} → {_number(ours, 'memory_mb', 0)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _title(row: dict) -> str:
    return f"{row['row'].rsplit(' b', 1)[0]} {row['batch_size']} × {row['length']}"


def models_tables(data: dict) -> str:
    """docs/models.md: each model with the best of its exports for each tool, by type; FlashAttention's claims."""
    rows = [row for row in data["rows"] if _best(row, "ours")]
    lines = [
        f"{data['gpu']}, onnxruntime {data['versions']['onnxruntime-gpu']}, commit {data['commit']}{_later(rows)}, "
        f"{data['date'][:10]}. Milliseconds of a run on the GPU, of each tool's\nfastest export that is right "
        "(`benchmarks/models.py`; – none). Attention's share is that of the operator's kernels in the time\nof "
        "faexport's file. Memory is what runs take beside weights, in MB; the difference\nis that from the float32 "
        "original, relative in the 2-norm.",
        "",
    ]
    by_type = {
        dtype: [row for row in rows if row["dtype"] == dtype] for dtype in dict.fromkeys(r["dtype"] for r in rows)
    }
    for dtype, of_type in by_type.items():
        notes = [_summary(of_type), *_without_original(of_type)]
        lines += [f"**{dtype}**", "", *_models_table(of_type), "", *notes, ""]
    lines += _refused(data["rows"])
    return "\n".join([*lines, *_claims(by_type.get("float16", rows))])


def _models_table(rows: list[dict]) -> list[str]:
    columns = (
        *("model, batch × length", *FILES.values(), *NO_FILES.values(), "over unfused", "over the best other file"),
        *("attention's share", "memory, unfused", "memory, faexport", "difference, unfused", "difference, faexport"),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        both = [_best(row, file) for file in ("unfused", "ours")]
        cells = [
            _title(row),
            *(_number(_best(row, file), "median_ms", 3) for file in (*FILES, *NO_FILES)),
            *(_number({"ratio": _over(row, files)}, "ratio", 2) for files in (("unfused",), OTHERS)),
            _percent((both[1] or {}).get("share_of_operator")),
            *(_number(one, "memory_mb", 0) for one in both),
            *(f"{one['difference']:.0e}" if one else "–" for one in both),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _later(rows: list[dict]) -> str:
    """Which models were measured at another commit."""
    said = dict.fromkeys((row["row"].rsplit(" b", 1)[0], row["commit"]) for row in rows if "commit" in row)
    return "".join(f" ({name} at {commit})" for name, commit in said)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _without_original(rows: list[dict]) -> list[str]:
    """Says of which rows no float32 original had the memory to run."""
    names = [row["row"] for row in rows if row.get("compared_with", "").endswith("ours")]
    said = f"No float32 original has the memory to run: {', '.join(names)}; compared with faexport's float32 file."
    return [said] if names else []


PAPERS_MODELS = ("bert_large", "gpt3", "mistral")
OTHERS = ("unfused", "onnxruntime", "onnxscript")


def _best(row: dict, file: str) -> dict | None:
    """The fastest that is right of a tool's files."""
    found = [row["contestants"].get(f"{file}, {how}") for how in EXPORTS]
    right = [one for one in found if one is not None and _is_right(one, row)]
    return min(right, key=lambda one: one["median_ms"], default=None)


def _number(found: dict | None, key: str, digits: int) -> str:
    number = (found.get(key) or 0) if found else 0
    return f"{number:.{digits}f}" if number > 0 else "–"


def _over(row: dict, files: tuple[str, ...]) -> float | None:
    """The best of these files' time over ours; None where none is right."""
    times = [one["median_ms"] for one in (_best(row, file) for file in files) if one is not None]
    ours = _best(row, "ours")
    return min(times) / ours["median_ms"] if times and ours else None


def _range(numbers: list[float]) -> str:
    mean = math.exp(sum(map(math.log, numbers)) / len(numbers))
    return f"{min(numbers):.2f} to {max(numbers):.2f} times as fast, in geometric mean {mean:.2f}"


def _summary(rows: list[dict]) -> str:
    found = ((row, _over(row, OTHERS)) for row in rows)
    ratios = [(row, ratio) for row, ratio in found if ratio is not None]
    slower = [_why_slower(row) for row, ratio in ratios if ratio < 1]
    said = f"Over the best other file: {_range([ratio for _, ratio in ratios])}; slower: "
    return f"{said}{'; '.join(slower) or 'nowhere'}."


def _why_slower(row: dict) -> str:
    """With what attention could bring at most: it takes a share of the time alone."""
    share = (_best(row, "ours") or {}).get("share_of_operator")
    why = (
        f", where attention takes {share:.0%} of the time (free, it would bring {1 / (1 - share):.2f})" if share else ""
    )
    return f"{row['row']}{why}"


def _refused(rows: list[dict]) -> list[str]:
    """Says which rows have no file of faexport that is right, and why."""
    said = [
        f"{row['row']} ({'; '.join(dict.fromkeys(map(_reason, row['failed'].values()))) or 'its results are wrong'})"
        for row in rows
        if not _best(row, "ours")
    ]
    return [f"Not in the table: {', '.join(said)}."] if said else []


def _reason(failure: str) -> str:
    """What to say of a failure: onnxruntime words a GPU without memory as the place in its allocator."""
    return "no memory was left on the GPU" if "bfc_arena" in failure else failure


def verified_sentence(data: dict) -> str:
    """What verify_models.py wrote of each model and export."""
    found = data["models"]
    passed = [said for said in found.values() if said["status"] == "passed"]
    alike = sum(said["operators_as_timed"] for said in passed)
    late = sum(said["status"] == NO_TIME for said in found.values())
    failed = [f"{name} ({x['status']})" for name, x in found.items() if x["status"] not in ("passed", NO_TIME)]
    others = [f"; not: {', '.join(failed)}"] if failed else []
    others += [f"; of the other {late} none was run, since time was up"] if late else []
    return (
        f"`faexport MODEL --target cuda --verify-on cuda` (`benchmarks/verify_models.py`, {data['gpu']}, commit "
        f"{data['commit']}, {data['date'][:10]}): {len(passed)} of {len(found)} exports pass, in "
        f"{sum(said['settings'] for said in passed)} settings; {alike} have the fused operators of the timed file"
        f"{''.join(others)}."
    )


def _claims(rows: list[dict]) -> list[str]:
    """What FlashAttention's papers say beside what is measured here, against the unfused graph."""
    found = ((row, _over(row, ("unfused",))) for row in rows)
    speeds = [(row, ratio) for row, ratio in found if ratio is not None]
    long = sorted((pair for pair in speeds if pair[0]["encoder"] == "long_range"), key=lambda pair: pair[0]["length"])
    if not speeds:
        return []
    lengths = [(row["length"], ratio) for row, ratio in long]
    return [
        "FlashAttention's claims, against an unfused graph:",
        "",
        "| claim | here |",
        "|---|---|",
        *_papers_models(speeds),
        f"| models 2 to 4 times as fast | {_range([ratio for _, ratio in speeds])} |",
        "| more than 5 times as fast at 4K (long-range encoder) | "
        f"{', '.join(f'{ratio:.2f} at {length}' for length, ratio in lengths)} |",
        "| memory linear in the length, 20 times less at 4K (long-range encoder) | "
        f"{', '.join(_memory(row) for row, _ in long)} |",
    ]


def _papers_models(speeds: list[tuple[dict, float]]) -> list[str]:
    """The models that the papers name, each at its longest that an unfused graph runs at."""
    longest = {row["encoder"]: (row, ratio) for row, ratio in speeds if row["encoder"] in PAPERS_MODELS}
    said = [f"{ratio:.2f} ({row['row']})" for row, ratio in longest.values()]
    return [f"| the papers' models: BERT-large, GPT-3-like, Mistral 7B | {', '.join(said)} |"] if said else []


def _memory(row: dict) -> str:
    theirs, ours = ((_best(row, file) or {}).get("memory_mb") for file in ("unfused", "ours"))
    less = f" ({theirs / ours:.1f} times less)" if theirs and ours else ""
    return f"{ours or 0:.0f} MB at {row['length']}{less}"


def bench_tables(data: dict) -> str:
    """docs/faexport.md's: what `faexport bench` printed of each model, and its picture."""
    where = data.get("gpu") or f"CPU ({data['cpu']})"
    runtime = next(data["versions"][name] for name in ("onnxruntime-gpu", "onnxruntime") if name in data["versions"])
    made = f"commit {data['commit']}, {data['date'][:10]} (`benchmarks/bench_models.py`)"
    lines = [f"{where}, onnxruntime {runtime}, {made}; exports of {_exporters(data)} with random weights:"]
    for model in data["models"]:
        title = f"{model['title']}, {model['dtype']}" + (", entries of several lengths" if model["padded"] else "")
        said = " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in (*model["notes"], model["conclusion"]))
        seen = f"{model['title']}: time and memory of a run, original and fused, against the size of the input"
        lines += [
            "",
            f"{title}. {said}",
            "",
            "| input | original, ms | fused, ms | times as fast | memory of a run, MB: original | fused |",
            "|---" * 6 + "|",
            *map(_bench_row, model["rows"]),
            "",
            f"![{seen}](../benchmarks/results/{model['picture']})",
        ]
    return "\n".join(lines)


def _bench_row(row: dict) -> str:
    both = (row["original"], row["fused"])
    size = "×".join(map(str, next(iter(row["sizes"].values()))))
    times = " | ".join(f"{1e3 * one['seconds']['median']:.3g}" for one in both)
    memory = " | ".join("?" if one["bytes"] is None else f"{one['bytes'] / 1e6:.0f}" for one in both)
    return f"| {size} | {times} | {row['times_as_fast']:.2f}{'' if row['gained'] else ' (even)'} | {memory} |"
