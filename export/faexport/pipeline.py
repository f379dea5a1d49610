# SPDX-License-Identifier: Apache-2.0
"""The ordered list of passes from a model to the rewritten model and its report. The only file that knows the order.

normalize -> analyse -> match (every matcher, in the main graph, in functions and in bodies of If, Loop and Scan) ->
empty rows -> precision -> rewrite, which also removes what nothing needs any more -> Gemms between Reshapes and biases
of projections, for onnxruntime -> projections -> the stand-in function -> sizes that are proven, as numbers -> moved
rows -> computed sizes that stay so -> shapes that are proven -> GELU as onnxruntime knows it -> what stands around, for
onnxruntime, and for its CUDA provider alone, with padding and vectors -> Reshapes one behind the other -> moves in
front of DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from faexport.around import (
    cuda_broadcasts,
    cuda_operators,
    cuda_padding,
    cuda_patches,
    cuda_wide_heads,
    gemms,
    joins,
    known_sizes,
    moved_projections,
    quantized_moves,
    reshapes,
    row_gathers,
)
from faexport.around.declare import declare_shapes
from faexport.around.gelu import put_half_last
from faexport.around.reshape_targets import keep_computed
from faexport.fallback.functions import add_fallback
from faexport.files.graph_checks import put_in_order
from faexport.graph.edits import Names, drop_drafts, drop_unread_weights, unread_weights
from faexport.graph.nodes import RUNTIME_DOMAIN, graphs_of, name_of, outermost_graphs
from faexport.graph.normalize import convert_opset, inline_functions
from faexport.match import Context, find_sites
from faexport.options import Options
from faexport.precision import float8
from faexport.precision.core import FLOAT32_PRECISION, float32_note, in_precision
from faexport.report.cuda_notes import cpu_only_note, gathered_note, is_float32
from faexport.report.data import Report, count_nodes
from faexport.report.tensorrt_notes import missing_note
from faexport.spec import AttentionSpec, Candidate, Refusal, RefusalKind
from faexport.understand.mask.proof import Masks
from faexport.understand.shapes.analysis import Analysis
from faexport.write import dequantize
from faexport.write.empty_rows import with_empty_rows
from faexport.write.projection_biases import move_biases
from faexport.write.projections import pack_projections
from faexport.write.rewrite import add_opset, is_current, is_gone, rewrite_site

_NOT_IN_GRAPH = "what it would read is not in the graph; please report this model"


def run(model: ir.Model, options: Options = Options()) -> tuple[ir.Model, Report]:
    """Fuses all attention of `model` in place; the report tells every site, fused or refused.

    Raises ValueError with a sentence where the model can't be converted to the asked opset.
    """
    before = count_nodes(model)
    if options.opset is not None:
        model = convert_opset(model, options.opset)
    model = inline_functions(model)
    unread = unread_weights(model)
    expanded = dequantize.expand(model) if options.assume_scores_unquantized else []
    passes = _Passes(model, options)
    passes.fuse_sites()
    dequantize.settle(model, expanded, passes.candidates)
    drop_drafts(model)
    for graph in outermost_graphs(model):  # what two sites share stands in front of the first, which may end last
        put_in_order(graph)
    if passes.fused:
        passes.change_projections()
        passes.define_operator()
        passes.write_sizes()
        passes.join_rest()
        drop_unread_weights(model, unread)
    return model, passes.report(before)


class _Passes:
    """A normalized model on its way to the report: what is known of it, and the passes that change it."""

    def __init__(self, model: ir.Model, options: Options):
        self.model, self.options = model, options
        self.masks = Masks(Analysis(model))
        self.candidates = examine(model, options, self.masks)
        self.names = Names(model)
        self.full_rows: list[ir.Node] = []  # fused nodes each of whose rows sees a key
        self.joined: dict[str, int] = {}
        self.notes: list[str] = []  # of the whole model
        self.apart: list[str] = []  # of projections, each of some sites

    @property
    def fused(self) -> list[Candidate]:
        return [c for c in self.candidates if isinstance(c.outcome, AttentionSpec)]

    def fuse_sites(self) -> None:
        """Rewrites every site that is understood, until none is left whose operands stood inside of another site."""
        pending = self.candidates
        while pending:
            stale = []
            for c in pending:
                if is_gone(c):  # nothing but its shape was read, by another site that is one node by now
                    self.candidates = [other for other in self.candidates if other is not c]
                elif not self._rewritten(c):
                    stale.append(c)
            if len(stale) == len(pending):  # the graph is as it was: they would be understood in the same way
                for c in stale:
                    c.outcome = Refusal(_NOT_IN_GRAPH, name_of(c.anchor), RefusalKind.DEFECT)
                break
            pending = self._examined_again(stale) if stale else []

    def _rewritten(self, candidate: Candidate) -> bool:
        """Fuses a site, if it is understood; False where what was understood no longer stands in the graph."""
        if not isinstance(candidate.outcome, AttentionSpec):
            return True
        if not is_current(candidate.outcome):
            return False
        options, analysis = self.options, self.masks.analysis
        given, opset = analysis.dtype(candidate.outcome.query.value), analysis.opset
        candidate.outcome = with_empty_rows(candidate.outcome, given, self.masks.nodes(candidate.graph), opset)
        if not isinstance(candidate.outcome, AttentionSpec):
            return True
        if options.dtype is not None and not options.float8:
            candidate.outcome = in_precision(candidate.outcome, options.dtype, given, opset)
        node = rewrite_site(candidate, self.names)
        if options.float32 and given == ir.DataType.FLOAT:
            node.attributes[FLOAT32_PRECISION] = ir.AttrString(FLOAT32_PRECISION, options.float32)
        if candidate.outcome.mask.rows_see_a_key:
            self.full_rows.append(node)
        return True

    def _examined_again(self, stale: list[Candidate]) -> list[Candidate]:
        """These sites, whose operands were read inside of a site that is one node by now, as they are understood in the
        graph of now."""
        self.masks = self.masks.renewed(Analysis(self.model))
        found = examine(self.model, self.options, self.masks)
        again = {c.anchor: c for c in found}
        # The last of several products of one softmax has that as its anchor by now, and replaces what it did.
        again |= {c.outcome.replaces: c for c in found if isinstance(c.outcome, AttentionSpec) and c.outcome.replaces}
        new = {id(c): again.get(c.anchor, c) for c in stale}
        self.candidates = [new.get(id(c), c) for c in self.candidates]
        return list(new.values())

    def change_projections(self) -> None:
        """Of products that make queries, keys and values: their biases go into the operator, and several become one."""
        if self.options.joins_rest:
            gemms.write_as_products(self.model, self.masks.analysis, self.names)
            if not self.options.float8:  # the operator adds no bias to a float8 query
                self.apart += move_biases(self.model, self.fused, self.masks.analysis, self.names)
        self.apart += pack_projections(self.model, self.fused, self.masks.analysis, self.names)
        if self.options.joins_cuda:
            cuda_wide_heads.join(self.model, self.masks.analysis, self.names)

    def define_operator(self) -> None:
        """Declares the operator's domain, and adds the operator as a function where that is asked for."""
        add_opset(self.model)
        if self.options.fallback and (missing := add_fallback(self.model, self.full_rows, self.masks.analysis)):
            self.notes.append(f"the file runs with our library only: {missing}")

    def write_sizes(self) -> None:
        """Sizes that are proven become numbers, those that are computed stay so, and shapes are written down."""
        self.masks.analysis.extend(self.model)
        known_sizes.write(self.model, self.masks.analysis, self.names)
        self._move_rows()
        self.masks.analysis.extend(self.model)
        keep_computed(self.model, self.masks.analysis, self.names)
        declare_shapes(self.model, self.masks.analysis)

    def _move_rows(self) -> None:
        """What cuts an image into rows and moves them, and the products in front of that."""
        if self.options.joins_cuda:
            cuda_patches.join(self.model, self.masks.analysis, self.names)
            row_gathers.write(self.model, self.masks.analysis, self.names)
        if self.options.joins_rest:
            moved_projections.write(self.model, self.masks.analysis, self.names)

    def join_rest(self) -> None:
        """What stands around attention, for onnxruntime, and for its CUDA provider alone."""
        if moved := put_half_last(self.model, self.masks.analysis, self.names):
            self.notes.append(moved)
        before = joins.counts(self.model)
        if self.options.joins_rest:
            joins.join(self.model, self.masks.analysis, self.names)
            for graph in outermost_graphs(self.model):  # a sum that is joined may be read in front of its normalization
                put_in_order(graph)
        if self.options.joins_cuda:
            cuda_operators.join(self.model, self.masks.analysis, self.names)
            cuda_padding.join(self.model, self.masks.analysis, self.names)
            cuda_broadcasts.join(self.model, self.masks.analysis, self.names)
        if self.options.joins_rest:
            reshapes.join(self.model, self.masks.analysis, self.names)
        if self.options.target != "tensorrt":
            quantized_moves.put_in_front(self.model, self.masks.analysis, self.names)
        self.joined = dict(sorted((joins.counts(self.model) - before).items()))
        if self.joined:
            self.model.opset_imports.setdefault(RUNTIME_DOMAIN, 1)
            self.notes.append(joins.note(self.joined))

    def report(self, before: Mapping[str, int]) -> Report:
        """`before`: the nodes of the model as it was given."""
        options, candidates, analysis = self.options, self.candidates, self.masks.analysis
        found = Report.from_candidates(candidates, before, count_nodes(self.model), [*self.notes, *self.apart])
        found.joined = self.joined
        if not (options.half or options.float8) and any(map(is_float32, candidates)):
            found.notes.append(float32_note(options.float32))
        float8_note = float8.note(self.model, analysis) if self.fused and not options.float8 else ""
        on_tensorrt = missing_note(candidates) if options.target == "tensorrt" else ""
        notes = (cpu_only_note(candidates), gathered_note(candidates), float8_note, on_tensorrt)
        found.notes += [note for note in notes if note]
        found.defects, found.invalid_nodes = analysis.defects, analysis.invalid_nodes
        return found


def examine(
    model: ir.Model,
    options: Options = Options(),
    masks: Masks | None = None,
) -> list[Candidate]:
    """All sites with what was understood of them; nothing is changed."""
    masks = masks or Masks(Analysis(model))
    return [
        candidate
        for graph, root in graphs_of(model)
        for candidate in find_sites(Context(graph, root, masks.analysis, masks, options))
    ]
