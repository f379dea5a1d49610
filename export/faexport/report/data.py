# SPDX-License-Identifier: Apache-2.0
"""What a run found, did and checked: data that pipeline.py and model_check.py fill in.

`Report.from_candidates` makes it of the candidates of the pipeline; `to_json` is for programs, terminal_view.py and
html_page.py show it to people.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from faexport.graph.nodes import dtype_name, own_graphs
from faexport.spec import AttentionSpec, Candidate, Fact, Layout, Operand, Refusal, RefusalKind

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
    tolerance: float  # what max_abs_diff may be; model_check.py states the rule
    ok: bool
    num_lost: int = 0  # elements that are NaN in the original and numbers in the rewritten model

    @property
    def badness(self) -> tuple[bool, float]:
        """Orders outputs by how near they come to their tolerance, those that exceed it last."""
        return not self.ok, self.max_abs_diff / self.tolerance if self.tolerance else self.max_abs_diff


class Skip(enum.StrEnum):
    """Why there are no differences on a set of inputs."""

    ORIGINAL = "original"  # it does not run on them
    ALONE = "alone"  # the original runs on them, and nothing was compared with it
    OPEN = "open"  # the rewritten model does not run on them, and need not
    BROKEN = "broken"  # the rewritten model does not run on them
    NOISE = "noise"  # an output of the original is mostly noise


@dataclasses.dataclass(frozen=True)
class VerificationRun:
    """Both models on one set of inputs: their sizes, and the differences or the reason why there are none."""

    inputs: Mapping[str, tuple[int, ...]]  # name -> shape
    outputs: tuple[OutputDifference, ...] = ()
    skipped: str = ""
    label: str = ""  # sizes, masks and what else is special, in words
    skip: Skip | None = None  # of which kind the reason is
    any_numbers: bool = False  # masks hold other numbers than 0 and 1

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
    # Distances from the same without any quantization of queries, keys, scores, weights and values, of the root
    # mean square of that; None where nothing is quantized there. Of the set where ours is largest.
    quantization_error: float | None = None  # ours
    original_quantization_error: float | None = None
    any_numbers: bool = False  # the masks of the worst hold other numbers than 0 and 1

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
    runs: tuple[VerificationRun, ...] = dataclasses.field(default=(), repr=False)
    sites: tuple[SiteComparison, ...] = dataclasses.field(default=(), repr=False)
    notes: tuple[str, ...] = ()  # sentences about what was compared
    of_output: bool = False  # the reason speaks of an output of the model: it differs, or can't be compared
    any_numbers: bool = False  # the reason speaks of inputs whose masks hold other numbers than 0 and 1
    # The note that onnxruntime's own optimizations fail on the rewritten model, though not on the original; or "".
    lost_optimizations: str = ""

    @property
    def worst(self) -> OutputDifference | None:
        """The output that comes nearest to its tolerance, or exceeds it most."""
        outputs = [output for run in self.runs for output in run.outputs]
        return max(outputs, key=lambda output: output.badness, default=None)


@dataclasses.dataclass(frozen=True)
class HalfOutput:
    """One output of the model in half precision against the float32 original, on the inputs where it came out worst."""

    name: str
    dtype: str  # of the original's output
    max_abs_diff: float
    plain_abs_diff: float  # what the original differs by once it is converted itself
    tolerance: float  # what max_abs_diff may be; half_check.py states the rule
    ok: bool
    inputs: str  # label

    @property
    def badness(self) -> tuple[bool, float]:
        return not self.ok, self.max_abs_diff / self.tolerance if self.tolerance else self.max_abs_diff


@dataclasses.dataclass(frozen=True)
class HalfPrecision:
    """The whole model in half precision: what stayed in float32, and how it compares with the float32 original."""

    keep_io_types: bool  # inputs and outputs of the model are float32
    kept: Mapping[str, str]  # names of nodes in float32, and why, as the end of a sentence
    status: VerificationStatus = VerificationStatus.NOT_RUN
    reason: str = ""  # why it failed or was not run
    outputs: tuple[HalfOutput, ...] = ()
    notes: tuple[str, ...] = ()
    dtype: str = "float16"  # or "bfloat16"


@dataclasses.dataclass(frozen=True)
class Float8Site:
    """A fused node that was to be computed in float8."""

    name: str
    left: str = ""  # why it keeps the model's precision, as the end of a sentence
    own_factors: bool = False  # the model had float8 numbers already; none of its factors were measured
    # Distance of its output from the same node's in the model's precision, relative to the root mean square of that, on
    # the inputs that the factors were measured on; None where it wasn't measured.
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class Float8Output:
    """An output of the model, on the inputs that the factors were measured on (of several the worst)."""

    name: str
    error: float  # distance from the original's, relative to its root mean square
    max_abs_diff: float


@dataclasses.dataclass(frozen=True)
class Float8:
    """Attention in float8: what became of each fused node, and how the model compares with the original."""

    sites: tuple[Float8Site, ...] = ()
    outputs: tuple[Float8Output, ...] = ()
    inputs: str = ""  # label of the inputs that were measured on
    status: VerificationStatus = VerificationStatus.NOT_RUN
    reason: str = ""  # why it failed or was not run


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
        refusal = outcome or Refusal(
            "it was found but never examined: please report this", candidate.name, RefusalKind.DEFECT
        )
        return cls(candidate.name, candidate.source, **(_score_sizes(candidate.anchor) | known), refusal=refusal)


@dataclasses.dataclass(frozen=True)
class FileRecord:
    path: str
    bytes: int
    sha256: str


@dataclasses.dataclass
class Provenance:
    """Where a rewritten model comes from. Files: the model first, then its weights."""

    versions: dict[str, str]  # of packages
    options: dict[str, Any]
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # by step: read, fuse, write, verify
    files_read: list[FileRecord] = dataclasses.field(default_factory=list)
    files_written: list[FileRecord] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Notes how long the body took."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = round(time.perf_counter() - start, 3)


@dataclasses.dataclass
class Report:
    """Everything that is known after a run. `nodes_*` count nodes by op type, subgraphs and functions included.

    repr() is one line, str() has a line for each site that is left and for each note, to_json() has everything.
    """

    sites: list[SiteReport] = dataclasses.field(default_factory=list)
    nodes_before: dict[str, int] = dataclasses.field(default_factory=dict)
    nodes_after: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)  # sentences about the model as a whole
    joined: dict[str, int] = dataclasses.field(default_factory=dict)  # operators of onnxruntime made around attention
    defects: list[str] = dataclasses.field(default_factory=list)  # failures of our analysis, of single nodes
    invalid_nodes: list[str] = dataclasses.field(default_factory=list)  # that ONNX's rules don't allow
    model: str | None = None  # path read
    output: str | None = None  # path written
    verification: Verification | None = None  # None: not asked for
    half_precision: HalfPrecision | None = None  # of --fp16 or --bf16
    float8: Float8 | None = None  # of --dtype fp8
    error: str | None = None  # the sentence that the command ended with, where it failed
    provenance: Provenance | None = None  # of a model that was, or would be, written

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

    def __repr__(self) -> str:
        return f"<faexport.Report of {self._summary()}>"

    def __str__(self) -> str:
        left = [f"left as it is: '{site.name}': {site.refusal}" for site in self.sites if not site.fused]
        notes = [f"note: {note}" for note in self.notes]
        errors = [f"error: {self.error}"] if self.error else []
        return "\n".join([self._summary(), *left, *notes, *errors])

    def _summary(self) -> str:
        """What came of which model, in one line."""
        checked = [f"verification {self.verification.status}"] if self.verification is not None else []
        written = [f"wrote {self.output}"] if self.output else []
        parts = [f"{self.num_fused} of {len(self.sites)} attention sites fused", *checked, *written]
        return f"{self.model or 'a model in memory'}: {'; '.join(parts)}"

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
        """The report as JSON, by json_text()."""
        return json_text(self.to_dict(), indent)


def json_text(data: Any, indent: int | None = 2) -> str:
    """JSON. Infinite or undefined differences become strings, since JSON has no such numbers."""
    return json.dumps(_json_numbers(data), indent=indent, allow_nan=False)


def count_nodes(model: ir.Model) -> dict[str, int]:
    """Nodes by op type ("domain::type" outside ONNX's own domain), subgraphs and functions included, but not those
    of the functions that stand in for the operator."""
    counter: collections.Counter[str] = collections.Counter()
    for graph in own_graphs(model):
        for node in graph.all_nodes():
            counter[f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type] += 1
    return dict(sorted(counter.items()))


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
        "dtype": dtype_name(query.value.dtype),
    }


def _score_sizes(anchor: ir.Node) -> dict[str, Any]:
    """Of a site that was refused: the scores tell [B, H, S_q, S_kv] where the anchor is their Softmax."""
    scores = anchor.inputs[0] if anchor.inputs else None
    dtype = dtype_name(scores.dtype) if scores is not None else None
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


def _json_numbers(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _json_numbers(item) for key, item in data.items()}
    if isinstance(data, (list, tuple)):
        return [_json_numbers(item) for item in data]
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    return data
