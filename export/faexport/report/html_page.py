# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML file that needs no network: for a browser, a phone, print, a screen reader. The
commands write it for --html.

Plain elements, styles of its own, no script; a policy in the file forbids the browser any request.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from faexport.report.advice import advice
from faexport.report.blocks import Block
from faexport.report.data import Float8, HalfPrecision, Report, Verification
from faexport.report.drawing import svg
from faexport.report.grouping import (
    AROUND,
    FLOAT8,
    QUANTIZED,
    Group,
    float8_rows,
    group_comparisons,
    group_outputs,
    group_sites,
    kept_sentence,
    percent,
    quantization_rows,
    sizes_text,
)

MOST_BOXES = 80  # of a drawing: a larger one is no picture any more
STYLE = """
:root{color-scheme:light dark;--ink:#1c1f23;--soft:#50575e;--paper:#fff;--panel:#f4f6f8;--line:#c9d0d6;--good:#0b6b2e;
--bad:#a3200d;--own:#0b57d0;--own-ink:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#b3bac1;--paper:#16191c;--panel:#22262a;--line:#4a5158;
--good:#7ddb9a;--bad:#ff9d8a;--own:#a8c7fa;--own-ink:#062e6f}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:70rem;padding:1rem;font:1rem/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--paper)}
h1{font-size:1.5rem;overflow-wrap:anywhere}h2{font-size:1.2rem;margin-top:2rem}h3{font-size:1rem;overflow-wrap:anywhere}
code,svg text{font-family:ui-monospace,monospace}code{overflow-wrap:anywhere}
section.site{border:1px solid var(--line);border-radius:.5rem;padding:0 1rem 1rem;margin:1rem 0;break-inside:avoid-page}
.good{color:var(--good)}.bad{color:var(--bad)}.soft{color:var(--soft)}
.scroll{overflow-x:auto;background:var(--panel);border-radius:.5rem;padding:.5rem}
table{border-collapse:collapse}th,td{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}thead th{border-bottom:1px solid var(--line)}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(8rem,1fr));gap:.5rem;margin:.5rem 0}
dt{color:var(--soft);font-size:.85rem}dd{margin:0}
.pair{display:flex;flex-wrap:wrap;gap:1rem}.pair>figure{margin:.5rem 0;min-width:0;max-width:100%}
svg{display:block}.pair path{fill:none;stroke:var(--soft)}.pair rect{fill:var(--paper);stroke:var(--line)}
.pair text{font-size:12px;text-anchor:middle;fill:var(--ink)}.pair .value rect{fill:none;stroke:none}
.pair .value text{fill:var(--soft)}.pair .own rect{fill:var(--own);stroke:none}.pair .own text{fill:var(--own-ink)}
@media print{body{max-width:none;font-size:10pt}.scroll{overflow:visible}svg{max-width:100%;height:auto}
details>*{display:block}}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Report, blocks: Mapping[str, tuple[Block, Block]] | None = None, measured: str = "") -> str:
    """The whole file. `blocks`: of sites, by the name of a node, their block before and after (blocks.find_blocks);
    `measured`: the section of bench()."""
    title = f"faexport: {report.model or 'a model'}"
    parts = [
        _summary(report),
        measured,
        _sites(report, blocks or {}),
        _verification(report.verification) if report.verification else "",
        _half(report.half_precision) if report.half_precision else "",
        _float8(report.float8) if report.float8 else "",
        _nodes(report),
        _notes([*report.notes, *_failures(report)]),
        _provenance(report),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{_text(title)}</h1></header>\n<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def bench(picture: str, lines: Iterable[str]) -> str:
    """The section with what `faexport bench` measured: its picture (SVG), and what there is to say."""
    said = "".join(f"<p>{_text(line)}.</p>\n" for line in lines)
    frame = '<div class="scroll" tabindex="0" role="region" aria-label="Time and memory against size">'
    return f"<h2>Time and memory</h2>\n{said}{frame}{picture}</div>\n"


def _summary(report: Report) -> str:
    total = len(report.sites)
    lines = [f"<strong>{report.num_fused} of {total} attention site{'s' * (total != 1)} fused.</strong>"]
    if report.error:
        lines.append(f'<strong class="bad">{_text(report.error)}</strong>')
    elif report.output:
        lines.append(f"Written to <code>{_text(report.output)}</code>.")
    else:
        lines.append("No model was written.")
    if report.verification is not None:
        good = "good" if report.verification.status == "passed" else "bad"
        lines.append(f'<span class="{good}">Verification {_text(report.verification.status)}.</span>')
    if report.nodes_after:
        lines.append(f"{sum(report.nodes_before.values())} nodes before, {sum(report.nodes_after.values())} after.")
    return f"<p>{' '.join(lines)}</p>\n"


def _sites(report: Report, blocks: Mapping[str, tuple[Block, Block]]) -> str:
    if not report.sites:
        return "<h2>Sites</h2>\n<p>The model has no attention.</p>\n"
    return "<h2>Sites</h2>\n" + "".join(_group(group, blocks) for group in group_sites(report.sites))


def _failures(report: Report) -> list[str]:
    invalid = [f"ONNX does not allow: {text}" for text in report.invalid_nodes]
    return [*invalid, *(f"A defect of ours, please report it: {text}" for text in report.defects)]


def _group(group: Group, blocks: Mapping[str, tuple[Block, Block]]) -> str:
    site, num = group.first, len(group.sites)
    result = '<span class="good">fused</span>' if site.fused else '<span class="bad">left as it is</span>'
    many = f"{num} equal layers, " if num > 1 else ""
    content = [f"<h3>{_text(group.name)}: {many}{result}</h3>\n", _sizes(group)]
    if site.refusal is None:
        content += [_facts(group), _drawings(group, blocks)]
    else:
        kind = advice(site.refusal)
        content.append(
            f"<p><strong>Why:</strong> {_text(group.reason)}.</p>\n<p>{_text(kind.meaning)}</p>\n"
            f"<p><strong>What to do:</strong> {_text(kind.action)}</p>\n"
        )
    if num > 1:
        names = ", ".join(f"<code>{_text(one.name)}</code>" for one in group.sites)
        content.append(f"<details><summary>All {num} sites</summary><p>{names}</p></details>\n")
    return f'<section class="site">{"".join(content)}</section>\n'


def _sizes(group: Group) -> str:
    site = group.first
    rows = {
        "found as": group.form,
        "batch": sizes_text(site.batch_size, None),
        "heads": sizes_text(site.num_q_heads, site.num_kv_heads),
        "queries / keys": sizes_text(site.seqlen_q, site.seqlen_kv),
        "head size": sizes_text(site.head_dim, site.head_dim_v),
        "type": site.dtype or "?",
    }
    return f"<dl>{''.join(f'<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>' for k, v in rows.items())}</dl>\n"


def _facts(group: Group) -> str:
    """What was proven of the first site of the group, and from which nodes."""
    nodes: dict[str, list[str]] = {}
    for fact in group.first.facts:
        nodes.setdefault(str(fact), []).extend(fact.nodes)
    if not nodes:
        return "<p>Plain attention: no mask, no bias.</p>\n"
    items = []
    for text, names in nodes.items():
        listed = ", ".join(f"<code>{_text(name)}</code>" for name in dict.fromkeys(names))
        proof = f"<details><summary>proven from</summary><p>{listed}</p></details>" if listed else ""
        items.append(f"<li>{_text(text)}{proof}</li>")
    return f"<p>Proven:</p>\n<ul>{''.join(items)}</ul>\n"


def _drawings(group: Group, blocks: Mapping[str, tuple[Block, Block]]) -> str:
    """One block of the group before and after, where it is known and small enough."""
    found = next(((site.name, blocks[site.name]) for site in group.sites if site.name in blocks), None)
    if found is None:
        return ""
    name, pair = found
    figures = []
    for when, block in zip(("before", "after"), pair, strict=True):
        caption = f"{when}: {block.num_nodes} node{'s' * (block.num_nodes != 1)}, constants left out"
        if len(block.boxes) > MOST_BOXES:
            figures.append(f"<figure><figcaption>{caption}; too many to draw</figcaption></figure>")
            continue
        label = f"The block of {name} {when}: {_in_words(block)}"
        figures.append(
            f'<figure><figcaption>{caption}</figcaption><div class="scroll" tabindex="0" role="region" '
            f'aria-label="{_text(f"Drawing of {name} {when}")}">{svg(block, label)}</div></figure>'
        )
    return f'<div class="pair">{"".join(figures)}</div>\n'


def _in_words(block: Block) -> str:
    """The operators of a block and how often each is there, for those who don't see the drawing."""
    counts: dict[str, int] = {}
    for box in block.boxes:
        if box.op_type:
            counts[box.op_type] = counts.get(box.op_type, 0) + 1
    return ", ".join(f"{number} {op_type}" for op_type, number in sorted(counts.items()))


def _verification(verification: Verification) -> str:
    good = "good" if verification.status == "passed" else "bad"
    reason = f": {_text(verification.reason)}" if verification.reason else "."
    parts = [f'<h2>Verification</h2>\n<p class="{good}">{_text(verification.status.capitalize())}{reason}</p>\n']
    if verification.sites:
        rows = [
            (name or AROUND, "stand-in" if row.by_stand_in else "library", row.dtype, row.num_sets,
             f"{row.max_abs_diff:.3g}", f"{row.tolerance:.3g}")
            for name, row in group_comparisons(verification.sites)
        ]  # fmt: skip
        heads = ("fused node", "run by", "type", "sets of inputs", "largest difference", "allowed")
        parts.append(
            _table("Each site by itself, on what the original feeds it; of equal ones the worst", heads, rows, 3)
        )
    if quantized := quantization_rows(verification.sites):
        parts.append(_table(QUANTIZED, ("fused node", "run by", "rewritten", "original"), quantized, 2))
    compared = [run for run in verification.runs if run.outputs]
    if compared:
        outputs = [
            (name, output.dtype, f"{output.max_abs_diff:.3g}", f"{output.tolerance:.3g}")
            for name, output in group_outputs(verification.runs)
        ]
        caption = f"Original against rewritten model in onnxruntime, on {len(compared)} sets of inputs"
        parts.append(_table(caption, ("output", "type", "largest difference", "allowed"), outputs, 2))
        labels = "".join(f"<li>{_text(run.label)}</li>" for run in compared)
        parts.append(f"<details><summary>The {len(compared)} sets of inputs</summary><ul>{labels}</ul></details>\n")
    skipped = list(dict.fromkeys(run.skipped for run in verification.runs if run.skipped))
    if skipped:
        items = "".join(f"<li>{_text(text)}</li>" for text in skipped)
        parts.append(
            f"<details><summary>Not compared: {len(skipped)} kinds of inputs</summary><ul>{items}</ul></details>\n"
        )
    return "".join([*parts, _list(verification.notes)])


def _float8(said: Float8) -> str:
    """What became of each site in float8, and how far the outputs are from the original's."""
    good = "good" if said.status == "passed" else "bad"
    reason = f": {_text(said.reason)}" if said.reason else "."
    sites = _table(f"{FLOAT8}; on {said.inputs}", ("fused node", "factors", "distance"), float8_rows(said), 1)
    rows = [(row.name, percent(row.error), f"{row.max_abs_diff:.3g}") for row in said.outputs]
    heads = ("output", "distance from the original's", "largest difference")
    outputs = _table("The model's outputs with attention in float8", heads, rows, 2) if rows else ""
    return f'<h2>In float8</h2>\n<p class="{good}">{_text(said.status.capitalize())}{reason}</p>\n{sites}{outputs}'


def _half(half: HalfPrecision) -> str:
    """The model in half precision beside the float32 original."""
    good = "good" if half.status == "passed" else "bad"
    reason = f": {_text(half.reason)}" if half.reason else "."
    rows = [
        (row.name, row.dtype, f"{row.max_abs_diff:.3g}", f"{row.plain_abs_diff:.3g}", f"{row.tolerance:.3g}")
        for row in half.outputs
    ]
    heads = ("output", "type", "largest difference", "the original's, converted itself", "allowed")
    table = _table(f"{half.dtype.capitalize()} against the float32 original", heads, rows, 2) if rows else ""
    return (
        f'<h2>In {half.dtype}</h2>\n<p class="{good}">{_text(half.status.capitalize())}{reason}</p>\n{table}'
        f"<p>In float32 still: {_text(kept_sentence(half))}.</p>\n{_list(half.notes)}"
    )


def _nodes(report: Report) -> str:
    before, after = report.nodes_before, report.nodes_after
    rows = [
        (op_type, before.get(op_type, 0), after.get(op_type, 0), f"{after.get(op_type, 0) - before.get(op_type, 0):+d}")
        for op_type in sorted({*before, *after})
        if before.get(op_type, 0) != after.get(op_type, 0)
    ]
    if not after or not rows:
        return ""
    return "<h2>Nodes</h2>\n" + _table(
        "Operators whose number changed", ("operator", "before", "after", "change"), rows, 1
    )


def _notes(notes: Sequence[str]) -> str:
    return f"<h2>Notes</h2>\n{_list(notes)}" if notes else ""


def _list(sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>\n" if items else ""


def _provenance(report: Report) -> str:
    origin = report.provenance
    if origin is None:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    seconds = ", ".join(f"{step} {taken:.1f} s" for step, taken in origin.seconds.items())
    options = ", ".join(f"{name}={value}" for name, value in origin.options.items())
    rows = [
        (what, record.path, f"{record.bytes:,}", record.sha256)
        for what, records in (("read", origin.files_read), ("written", origin.files_written))
        for record in records
    ]
    return (
        f"<h2>Where it comes from</h2>\n<p>{_text(versions)}</p>\n<p>Options: <code>{_text(options)}</code></p>\n"
        f"<p>Times: {_text(seconds)}</p>\n" + _table("Files", ("", "path", "bytes", "SHA-256"), rows, 4)
    )


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[object]], first_number: int) -> str:
    """Columns from `first_number` on hold numbers."""

    def cell(tag: str, index: int, value: object) -> str:
        kind = ' class="number"' if index >= first_number else ""
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{kind}{scope}>{_text(value)}</{tag}>"

    head = "".join(cell("th" if text else "td", index, text) for index, text in enumerate(heads))
    body = "".join(f"<tr>{''.join(cell('td', i, value) for i, value in enumerate(row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}"><table><caption>{_text(caption)}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))
