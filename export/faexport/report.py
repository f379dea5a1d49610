# SPDX-License-Identifier: Apache-2.0
"""What a run found, did and checked: data that pipeline.py and verify.py fill in, and cli.py shows.

`Report.from_candidates` makes it from the candidates of the pipeline. `to_json` is for programs, `rich.print(report)`
for people.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import rich.box
import rich.console
import rich.markup
import rich.table

from .spec import DOMAIN, AttentionSpec, Candidate, Fact, Layout, Operand, Refusal

MOST_SENTENCES = 4  # of a kind in the tables; the JSON has all
SCHEMA_VERSION = 1  # of to_json; raised when a key changes its meaning or goes away

Dim = int | str | None  # size, name of a symbolic dimension, or unknown


class VerificationStatus(enum.StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"


@dataclasses.dataclass(frozen=True)
class OutputDifference:
    """One output of the original against the rewritten model's, on one set of inputs."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    max_abs_diff: float
    tolerance: float  # what max_abs_diff may be; verify.py states the rule
    ok: bool
    num_lost: int = 0  # elements that are NaN in the original and numbers in the rewritten model


@dataclasses.dataclass(frozen=True)
class VerificationRun:
    """Both models on one set of inputs: their sizes, and the differences or the reason why there are none."""

    inputs: Mapping[str, tuple[int, ...]]  # name -> shape
    outputs: tuple[OutputDifference, ...] = ()
    skipped: str = ""
    label: str = ""  # sizes, masks and what else is special, in words

    @property
    def ok(self) -> bool:
        return all(output.ok for output in self.outputs)


@dataclasses.dataclass(frozen=True)
class SiteComparison:
    """One value that the rewritten model computes otherwise, compared by itself: both computed it from the tensors of
    the original. Of all sets of inputs the one where it came out worst."""

    site: str  # name of the fused node, "" where the value only depends on sizes
    value: str
    dtype: str
    by_stand_in: bool  # the operator's function in standard operators was run, not the library
    max_abs_diff: float
    tolerance: float
    num_sets: int  # of inputs that it was compared on
    inputs: str  # label of the worst
    fault: str = ""  # what is wrong with it, as the end of a sentence

    @property
    def ok(self) -> bool:
        return not self.fault

    @property
    def share(self) -> float:
        """Of what is allowed."""
        return self.max_abs_diff / self.tolerance if self.tolerance else self.max_abs_diff

    @property
    def sentence(self) -> str:
        where = f"site '{self.site}' (value '{self.value}')" if self.site else f"value '{self.value}'"
        how = " run by its function in standard operators" if self.by_stand_in else ""
        return f"{where}{how} {self.fault}, compared by itself on {self.inputs}"


@dataclasses.dataclass(frozen=True)
class Verification:
    status: VerificationStatus
    reason: str = ""  # why it failed or was not run
    runs: tuple[VerificationRun, ...] = ()
    sites: tuple[SiteComparison, ...] = ()
    notes: tuple[str, ...] = ()  # sentences about what was compared

    @property
    def worst(self) -> OutputDifference | None:
        """The output that comes nearest to its tolerance, or exceeds it most."""
        outputs = [output for run in self.runs for output in run.outputs]
        return max(outputs, key=_badness, default=None)


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One attention site. Sizes are as far as the model tells them."""

    name: str
    source: str
    batch_size: Dim = None
    num_q_heads: Dim = None
    num_kv_heads: Dim = None
    seqlen_q: Dim = None
    seqlen_kv: Dim = None
    head_dim: Dim = None
    head_dim_v: Dim = None
    dtype: str | None = None
    facts: tuple[Fact, ...] = ()
    refusal: Refusal | None = None

    @property
    def fused(self) -> bool:
        return self.refusal is None

    @classmethod
    def from_candidate(cls, candidate: Candidate) -> SiteReport:
        """Reads the sizes off a candidate. Call it after shape inference; the outcome must be there."""
        outcome = candidate.outcome
        known = {name: size for name, size in candidate.sizes.items() if size is not None}
        if isinstance(outcome, AttentionSpec):
            facts = (*outcome.facts, *outcome.mask.facts)
            return cls(candidate.name, candidate.source, **(_spec_sizes(outcome) | known), facts=facts)
        refusal = outcome or Refusal("it was found but never examined: please report this", candidate.name)
        return cls(candidate.name, candidate.source, **(_score_sizes(candidate.anchor) | known), refusal=refusal)


@dataclasses.dataclass
class Report:
    """Everything that is known after a run. `nodes_*` count nodes by op type, subgraphs and functions included."""

    sites: list[SiteReport] = dataclasses.field(default_factory=list)
    nodes_before: dict[str, int] = dataclasses.field(default_factory=dict)
    nodes_after: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)  # sentences about the model as a whole
    defects: list[str] = dataclasses.field(default_factory=list)  # failures of our analysis, of single nodes
    model: str | None = None  # path read
    output: str | None = None  # path written
    verification: Verification | None = None  # None: not asked for
    error: str | None = None  # the sentence that the command ended with, where it failed

    @classmethod
    def from_candidates(
        cls,
        candidates: Iterable[Candidate],
        nodes_before: Mapping[str, int],
        nodes_after: Mapping[str, int],
        notes: Sequence[str] = (),
    ) -> Report:
        """`nodes_*` from count_nodes, before the first and after the last pass."""
        sites = [SiteReport.from_candidate(candidate) for candidate in candidates]
        return cls(sites, dict(nodes_before), dict(nodes_after), list(notes))

    @property
    def num_fused(self) -> int:
        return sum(site.fused for site in self.sites)

    @property
    def num_refused(self) -> int:
        return len(self.sites) - self.num_fused

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings; docs/faexport.md describes the keys."""
        data = dataclasses.asdict(self)
        for site, site_data in zip(self.sites, data["sites"], strict=True):
            site_data["fused"] = site.fused
        if self.verification is not None:
            for row, row_data in zip(self.verification.sites, data["verification"]["sites"], strict=True):
                row_data["ok"] = row.ok
        return {"schema_version": SCHEMA_VERSION, "num_fused": self.num_fused, "num_refused": self.num_refused, **data}

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON. Infinite or undefined differences become strings, since JSON has no such numbers."""
        return json.dumps(_json_numbers(self.to_dict()), indent=indent, allow_nan=False)

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> rich.console.RenderResult:
        if self.sites:
            yield sites_table(self.sites)
        if self.nodes_after and self.nodes_after != self.nodes_before:
            yield nodes_table(self.nodes_before, self.nodes_after)
        if self.verification is not None:
            yield from verification_view(self.verification)
        for note in self.notes:
            yield f"[dim]note:[/dim] {rich.markup.escape(note)}"
        for defect in self.defects:
            yield f"[red]a defect of ours, please report it:[/red] {rich.markup.escape(defect)}"


def count_nodes(model: ir.Model) -> dict[str, int]:
    """Nodes by op type ("domain::type" outside ONNX's own domain), subgraphs and functions included, but not those
    of the functions that stand in for the operator."""
    counter: collections.Counter[str] = collections.Counter()
    for graph in (model.graph, *(f for f in model.functions.values() if f.domain != DOMAIN)):
        for node in ir.traversal.RecursiveGraphIterator(graph):
            counter[f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type] += 1
    return dict(sorted(counter.items()))


def sites_table(sites: Sequence[SiteReport]) -> rich.table.Table:
    """One row a site: sizes, what was proven, fused or the reason why not."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("site", overflow="fold")
    table.add_column("found as")
    for heading in ("B", "H", "S", "D"):
        table.add_column(heading, justify="right")
    table.add_column("proven", overflow="fold")
    table.add_column("result", overflow="fold")
    for site in sites:
        sizes = (
            _show(site.batch_size),
            _pair(site.num_q_heads, site.num_kv_heads),
            _pair(site.seqlen_q, site.seqlen_kv),
        )
        proven = ", ".join(dict.fromkeys(fact.text for fact in site.facts))
        defect = site.refusal is not None and site.refusal.defect
        left = "[red]left, a defect of ours:[/red]" if defect else "[yellow]left:[/yellow]"
        result = "[green]fused[/green]" if site.fused else f"{left} {_why(site)}"
        cells = (site.name, site.source, *sizes, _pair(site.head_dim, site.head_dim_v), proven or "-")
        table.add_row(*map(rich.markup.escape, cells), result)
    return table


def nodes_table(before: Mapping[str, int], after: Mapping[str, int]) -> rich.table.Table:
    """Op types whose number changed, and the totals."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("op type")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
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
        yield "Each site by itself, on what the original feeds it"
        yield comparisons_table(verification.sites)
    compared = [run for run in verification.runs if run.outputs]
    if compared:
        yield f"Original against rewritten, in onnxruntime on {len(compared)} set{'s' * (len(compared) != 1)} of inputs"
        yield differences_table(verification.runs)
        yield f"[dim]compared on:[/dim] {rich.markup.escape(_listed([run.label for run in compared if run.label]))}"
    skipped = list(dict.fromkeys(run.skipped for run in verification.runs if run.skipped))
    for sentence in skipped[:MOST_SENTENCES]:
        yield f"[dim]not compared:[/dim] {rich.markup.escape(sentence)}"
    if len(skipped) > MOST_SENTENCES:
        yield f"[dim]not compared:[/dim] {len(skipped) - MOST_SENTENCES} more sets of inputs (--json lists them)"
    for note in verification.notes:
        yield f"[dim]note:[/dim] {rich.markup.escape(note)}"
    colour = {
        VerificationStatus.PASSED: "green",
        VerificationStatus.FAILED: "red",
        VerificationStatus.NOT_RUN: "red",
    }
    reason = f": {rich.markup.escape(verification.reason)}" if verification.reason else ""
    yield f"[{colour[verification.status]}]verification {verification.status}[/]{reason}"


def comparisons_table(sites: Sequence[SiteComparison]) -> rich.table.Table:
    """One row a fused node and way of running it: the worst of its values."""
    worst: dict[tuple[str, bool], SiteComparison] = {}
    for row in sites:
        key = (row.site, row.by_stand_in)
        worst[key] = max(worst.get(key, row), row, key=lambda row: (not row.ok, row.share))
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("fused node", "run by", "dtype"):
        table.add_column(heading, overflow="fold")
    for heading in ("sets", "largest difference", "allowed"):
        table.add_column(heading, justify="right")
    for row in worst.values():
        cells = (
            rich.markup.escape(row.site or "(sizes)"), "stand-in" if row.by_stand_in else "library", row.dtype or "?",
            str(row.num_sets), f"{row.max_abs_diff:.3g}", f"{row.tolerance:.3g}",
        )  # fmt: skip
        table.add_row(*cells, style=None if row.ok else "red")
    return table


def _listed(labels: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = f"; and {len(labels) - MOST_SENTENCES} more" if len(labels) > MOST_SENTENCES else ""
    return "; ".join(labels[:MOST_SENTENCES]) + more


def differences_table(runs: Sequence[VerificationRun]) -> rich.table.Table:
    """One row an output: the largest difference between the models over all runs, and what was allowed there."""
    worst: dict[str, OutputDifference] = {}
    for output in (output for run in runs for output in run.outputs):
        worst[output.name] = max(worst.get(output.name, output), output, key=_badness)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("output", "dtype"):
        table.add_column(heading, overflow="fold")
    for heading in ("largest difference", "allowed"):
        table.add_column(heading, justify="right")
    for output in worst.values():
        style = None if output.ok else "red"
        cells = (rich.markup.escape(output.name), output.dtype, f"{output.max_abs_diff:.3g}", f"{output.tolerance:.3g}")
        table.add_row(*cells, style=style)
    return table


def _badness(output: OutputDifference) -> tuple[bool, float]:
    """Orders outputs by how near they come to their tolerance, those that exceed it last."""
    return not output.ok, output.max_abs_diff / output.tolerance if output.tolerance else output.max_abs_diff


def _dim(value: ir.Value | None, axis: int) -> Dim:
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else size.value


def _heads(operand: Operand) -> Dim:
    if operand.heads is not None or operand.layout is Layout.BSH:
        return operand.heads
    return _dim(operand.value, operand.layout.index("H"))


def _head_dim(operand: Operand) -> Dim:
    if operand.head_dim is not None:
        return operand.head_dim
    last = _dim(operand.value, -1)
    if operand.layout is not Layout.BSH:
        return last
    return last // operand.heads if isinstance(last, int) and operand.heads and operand.column_start is None else None


def _spec_sizes(spec: AttentionSpec) -> dict[str, Any]:
    query, key, value = spec.query, spec.key, spec.value
    return {
        "batch_size": _dim(query.value, 0),
        "num_q_heads": _heads(query),
        "num_kv_heads": _heads(key),
        "seqlen_q": _dim(query.value, query.layout.index("S")),
        "seqlen_kv": _dim(key.value, key.layout.index("S")),
        "head_dim": _head_dim(query),
        "head_dim_v": _head_dim(value),
        "dtype": query.value.dtype.name.lower() if query.value.dtype else None,
    }


def _score_sizes(anchor: ir.Node) -> dict[str, Any]:
    """Of a site that was refused: the scores tell [B, H, S_q, S_kv] where the anchor is their Softmax."""
    scores = anchor.inputs[0] if anchor.inputs else None
    dtype = scores.dtype.name.lower() if scores is not None and scores.dtype else None
    if anchor.op_type != "Softmax" or scores is None or scores.shape is None or len(scores.shape) != 4:
        return {"dtype": dtype}
    batch_size, heads, seqlen_q, seqlen_kv = (_dim(scores, axis) for axis in range(4))
    return {
        "batch_size": batch_size,
        "num_q_heads": heads,
        "seqlen_q": seqlen_q,
        "seqlen_kv": seqlen_kv,
        "dtype": dtype,
    }


def _show(dim: Dim) -> str:
    return "?" if dim is None else str(dim)


def _why(site: SiteReport) -> str:
    """The reason; with the node only where that is not the site's own."""
    assert site.refusal is not None
    return rich.markup.escape(site.refusal.reason if site.refusal.node == site.name else str(site.refusal))


def _pair(first: Dim, second: Dim) -> str:
    """Both where they differ, e.g. query and key/value heads as "8/2"."""
    return _show(first) if second is None or first == second else f"{_show(first)}/{_show(second)}"


def _json_numbers(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _json_numbers(item) for key, item in data.items()}
    if isinstance(data, (list, tuple)):
        return [_json_numbers(item) for item in data]
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    return data
