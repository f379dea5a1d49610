# SPDX-License-Identifier: Apache-2.0
"""A report on a terminal: equal layers are one row, long sentences are footnotes, and 80 columns suffice. Called by
commands/telling.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import rich.box
import rich.console
import rich.markup
import rich.padding
import rich.table

from faexport.report.advice import advice
from faexport.report.data import (
    Float8,
    HalfPrecision,
    Report,
    SiteComparison,
    SiteReport,
    Skip,
    Verification,
    VerificationRun,
    VerificationStatus,
)
from faexport.report.grouping import (
    AROUND,
    FLOAT8,
    QUANTIZED,
    float8_rows,
    group_comparisons,
    group_outputs,
    group_sites,
    kept_sentence,
    percent,
    quantization_rows,
    sizes_text,
)

MOST_SENTENCES = 4  # of a kind; the JSON has all


def view(report: Report) -> Iterator[rich.console.RenderableType]:
    """What is printed, part by part: the sites, the nodes, the verification, and what else there is to say."""
    if report.sites:
        yield from sites_view(report.sites)
    if report.nodes_after and report.nodes_after != report.nodes_before:
        yield nodes_table(report.nodes_before, report.nodes_after)
    if report.verification is not None:
        yield from verification_view(report.verification)
    if report.half_precision is not None:
        yield from half_view(report.half_precision)
    if report.float8 is not None:
        yield from float8_view(report.float8)
    for note in report.notes:
        yield f"[dim]note:[/dim] {rich.markup.escape(note)}"
    for invalid in report.invalid_nodes:
        yield f"[yellow]ONNX does not allow:[/yellow] {rich.markup.escape(invalid)}"
    for defect in report.defects:
        yield f"[red]a defect of ours, please report it:[/red] {rich.markup.escape(defect)}"


def sites_view(sites: Sequence[SiteReport]) -> Iterator[rich.console.RenderableType]:
    """One row for all sites of which the same is known, and below the table what was proven, or why they are left and
    what to do about it."""
    table = _table()
    table.add_column("sites", justify="right")
    table.add_column("name", overflow="fold")
    for heading in ("B", "H", "S", "D"):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("result", no_wrap=True)
    footnotes: dict[str, int] = {}
    actions: dict[str, str] = {}
    for group in group_sites(sites):
        site = group.first
        sentence = group.reason or group.found
        number = footnotes.setdefault(sentence, len(footnotes) + 1)
        sizes = (
            sizes_text(site.batch_size, None),
            sizes_text(site.num_q_heads, site.num_kv_heads),
            sizes_text(site.seqlen_q, site.seqlen_kv),
            sizes_text(site.head_dim, site.head_dim_v),
        )
        result = "[green]fused[/green]" if site.fused else "[yellow]left[/yellow]"
        if site.refusal is not None:
            actions[sentence] = advice(site.refusal).action
            if site.refusal.defect:
                result = "[red]left, a defect of ours[/red]"
        cells = (str(len(group.sites)), group.name, *sizes)
        table.add_row(*map(rich.markup.escape, cells), rf"{result} \[{number}]")
    yield table
    notes, told = rich.table.Table.grid(padding=(0, 1, 0, 0)), set()
    for sentence, number in footnotes.items():
        notes.add_row(rf" \[{number}]", rich.markup.escape(sentence))
        action = actions.get(sentence)
        if action is not None and action not in told:  # once for all reasons of a kind
            told.add(action)
            notes.add_row("", f"[dim]what to do:[/dim] {rich.markup.escape(action)}")
    yield rich.padding.Padding(notes, (0, 0, 1, 0))


def nodes_table(before: Mapping[str, int], after: Mapping[str, int]) -> rich.table.Table:
    """Op types whose number changed, and the totals."""
    table = _table("op type", numbers=("before", "after", "change"))
    for op_type in sorted({*before, *after}):
        old, new = before.get(op_type, 0), after.get(op_type, 0)
        if old != new:
            table.add_row(rich.markup.escape(op_type), str(old), str(new), f"{new - old:+d}")
    old, new = sum(before.values()), sum(after.values())
    table.add_section()
    table.add_row("all", str(old), str(new), f"{new - old:+d}")
    return table


def verification_view(verification: Verification) -> Iterator[rich.console.RenderableType]:
    """The sites by themselves, per output the largest difference over all runs, and what could not be compared."""
    if verification.sites:
        yield "Each site by itself, on what the original feeds it: the largest difference"
        yield comparisons_table(verification.sites)
    if quantized := quantization_rows(verification.sites):
        yield QUANTIZED
        table = _table("fused node", "run by", numbers=("rewritten", "original"))
        for cells in quantized:
            table.add_row(*map(rich.markup.escape, cells))
        yield table
    compared = [run for run in verification.runs if run.outputs]
    if compared:
        sets = f"{len(compared)} set{'s' * (len(compared) != 1)} of inputs"
        yield f"Original against rewritten, in onnxruntime on {sets}: the largest difference"
        yield differences_table(verification.runs)
        yield f"[dim]compared on:[/dim] {rich.markup.escape(_listed(run.label for run in compared if run.label))}"
    for sentence in _not_compared(verification.runs):
        yield f"[dim]not compared:[/dim] {rich.markup.escape(sentence)}"
    for note in verification.notes:
        yield f"[dim]note:[/dim] {rich.markup.escape(note)}"
    colour = "green" if verification.status is VerificationStatus.PASSED else "red"
    reason = f": {rich.markup.escape(verification.reason)}" if verification.reason else ""
    yield f"[{colour}]verification {verification.status}[/]{reason}"


def _not_compared(runs: Sequence[VerificationRun]) -> Iterator[str]:
    """Sentences about sets of inputs. Of those that the original does not run on, such as most without elements, one
    stands for all."""
    refused = list(dict.fromkeys(run.skipped for run in runs if run.skip is Skip.ORIGINAL))
    others = list(dict.fromkeys(run.skipped for run in runs if run.skipped and run.skip is not Skip.ORIGINAL))
    yield from others[:MOST_SENTENCES]
    if more := len(others[MOST_SENTENCES:]):
        yield f"{more} more set{'s' * (more > 1)} of inputs (--json lists all)"
    yield from refused[:1]
    if more := len(refused[1:]):
        yield f"{more} more set{'s' * (more > 1)} of inputs that it does not run on (--json lists all)"


def half_view(half: HalfPrecision) -> Iterator[rich.console.RenderableType]:
    """The model in half precision beside the float32 original, and what stayed in float32."""
    if half.outputs:
        kind = half.dtype.capitalize()
        yield f"{kind} against the float32 original: the largest difference, ours and of the original converted itself"
        table = _table("output", "dtype", numbers=("difference", "original's", "allowed"))
        for row in half.outputs:
            numbers = (f"{x:.3g}" for x in (row.max_abs_diff, row.plain_abs_diff, row.tolerance))
            table.add_row(rich.markup.escape(row.name), row.dtype, *numbers, style=None if row.ok else "red")
        yield table
    yield f"[dim]in float32 still:[/dim] {rich.markup.escape(kept_sentence(half))}"
    for note in half.notes[:MOST_SENTENCES]:
        yield f"[dim]note:[/dim] {rich.markup.escape(note)}"
    colour = "green" if half.status is VerificationStatus.PASSED else "red"
    reason = f": {rich.markup.escape(half.reason)}" if half.reason else ""
    yield f"[{colour}]verification in {half.dtype} {half.status}[/]{reason}"


def float8_view(said: Float8) -> Iterator[rich.console.RenderableType]:
    """What became of each site in float8, and how far the outputs are from the original's."""
    yield f"{FLOAT8}; on {rich.markup.escape(said.inputs)}"
    table = _table("fused node", "factors", "distance")
    for cells in float8_rows(said):
        table.add_row(*map(rich.markup.escape, cells))
    yield table
    if said.outputs:
        yield "Outputs with attention in float8: distance from the original's, and the largest difference"
        table = _table("output", numbers=("distance", "difference"))
        for row in said.outputs:
            table.add_row(rich.markup.escape(row.name), percent(row.error), f"{row.max_abs_diff:.3g}")
        yield table
    colour = "green" if said.status is VerificationStatus.PASSED else "red"
    reason = f": {rich.markup.escape(said.reason)}" if said.reason else ""
    yield f"[{colour}]verification in float8 {said.status}[/]{reason}"


def comparisons_table(sites: Sequence[SiteComparison]) -> rich.table.Table:
    """One row for equal fused nodes and way of running them: the worst of their values."""
    table = _table("fused node", "run by", "dtype", numbers=("sets", "difference", "allowed"))
    for name, row in group_comparisons(sites):
        cells = (
            rich.markup.escape(name or AROUND), "stand-in" if row.by_stand_in else "library", row.dtype or "?",
            str(row.num_sets), f"{row.max_abs_diff:.3g}", f"{row.tolerance:.3g}",
        )  # fmt: skip
        table.add_row(*cells, style=None if row.ok else "red")
    return table


def differences_table(runs: Sequence[VerificationRun]) -> rich.table.Table:
    """One row for each output, those of equal layers are one: the largest difference between the models over all runs,
    and what was allowed there."""
    table = _table("output", "dtype", numbers=("difference", "allowed"))
    for name, output in group_outputs(runs):
        cells = (rich.markup.escape(name), output.dtype, f"{output.max_abs_diff:.3g}", f"{output.tolerance:.3g}")
        table.add_row(*cells, style=None if output.ok else "red")
    return table


def _listed(found: Iterable[str]) -> str:
    """The first few of those that differ, and how many more there are."""
    labels = list(dict.fromkeys(found))
    more = f"; and {len(labels) - MOST_SENTENCES} more" if len(labels) > MOST_SENTENCES else ""
    return "; ".join(labels[:MOST_SENTENCES]) + more


def _table(*words: str, numbers: Sequence[str] = ()) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in words:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table
