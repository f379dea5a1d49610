# SPDX-License-Identifier: Apache-2.0
"""The ordered list of passes from a model to the rewritten model and its report. The only file that knows the order.

normalize -> analyse -> match (every matcher, in the main graph, in functions and in bodies of If, Loop and Scan) ->
empty rows -> precision -> rewrite, which also removes what nothing needs any more -> Gemms between Reshapes and biases
of projections, for onnxruntime -> projections -> the stand-in function -> sizes that are proven, as numbers -> computed
sizes that stay so -> shapes that are proven -> GELU as onnxruntime knows it -> what stands around, for onnxruntime, and
for its CUDA provider alone, and padding for that.
"""

from __future__ import annotations

import onnx_ir as ir

from faexport.around import cuda_operators, cuda_padding, gemms, joins, known_sizes
from faexport.around.declare import declare_shapes
from faexport.around.gelu import put_half_last
from faexport.around.reshape_targets import keep_computed
from faexport.fallback.functions import add_fallback
from faexport.files.graph_checks import put_in_order
from faexport.graph.edits import Names, drop_drafts, drop_unread_weights, unread_weights
from faexport.graph.nodes import RUNTIME_DOMAIN, graphs_of, outermost_graphs
from faexport.graph.normalize import convert_opset, inline_functions
from faexport.match import Context, find_sites
from faexport.options import Options
from faexport.precision import float8
from faexport.precision.core import FLOAT32_PRECISION, float32_note, in_precision
from faexport.report.cuda_notes import cpu_only_note, gathered_note, is_float32
from faexport.report.data import Report, count_nodes
from faexport.spec import AttentionSpec, Candidate
from faexport.understand.mask.proof import Masks
from faexport.understand.shapes.analysis import Analysis
from faexport.write import dequantize
from faexport.write.empty_rows import with_empty_rows
from faexport.write.projection_biases import move_biases
from faexport.write.projections import pack_projections
from faexport.write.rewrite import add_opset, is_current, is_gone, rewrite_site


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
    masks = Masks(Analysis(model))
    candidates = pending = examine(model, options, masks)
    names = Names(model)
    full_rows: list[ir.Node] = []
    while pending:
        stale = []
        for c in pending:
            if is_gone(c):  # nothing but its shape was read, by another site that is one node by now
                candidates = [other for other in candidates if other is not c]
            elif not _rewritten(c, options, masks, names, full_rows):
                stale.append(c)
        if stale:  # their operands were read inside of a site that is one node by now
            masks = masks.renewed(Analysis(model))
            again = {c.anchor: c for c in examine(model, options, masks)}
            candidates = [again[c.anchor] if any(c is s for s in stale) else c for c in candidates]
        pending = [again[c.anchor] for c in stale]
    dequantize.settle(model, expanded, candidates)
    drop_drafts(model)
    for graph in outermost_graphs(model):  # what two sites share stands in front of the first, which may end last
        put_in_order(graph)
    fused = [c for c in candidates if isinstance(c.outcome, AttentionSpec)]
    if fused and options.joins_rest:
        gemms.write_as_products(model, masks.analysis, names)
    moves = options.joins_rest and not options.float8  # the operator adds no bias to a float8 query
    apart = move_biases(model, fused, masks.analysis, names) if moves else []
    apart += pack_projections(model, fused, masks.analysis, names)
    if fused:
        add_opset(model)
    missing = add_fallback(model, full_rows, masks.analysis) if fused and options.fallback else ""
    if fused:
        masks.analysis.extend(model)
        known_sizes.write(model, masks.analysis, names)
        masks.analysis.extend(model)
        keep_computed(model, masks.analysis, names)
        declare_shapes(model, masks.analysis)
    notes = [f"the file runs with our library only: {missing}"] if missing else []
    if fused and (moved := put_half_last(model, masks.analysis, names)):
        notes.append(moved)
    before_joining = joins.counts(model)
    if fused and options.joins_rest:
        joins.join(model, masks.analysis, names)
    if fused and options.joins_cuda:
        cuda_operators.join(model, masks.analysis, names)
        cuda_padding.join(model, masks.analysis, names)
    joined = dict(sorted((joins.counts(model) - before_joining).items()))
    if joined:
        model.opset_imports.setdefault(RUNTIME_DOMAIN, 1)
        notes.append(joins.note(joined))
    if fused:
        drop_unread_weights(model, unread)
    report = Report.from_candidates(candidates, before, count_nodes(model), [*notes, *apart])
    report.joined = joined
    if not (options.half or options.float8) and any(map(is_float32, candidates)):
        report.notes.append(float32_note(options.float32))
    float8_note = "" if options.float8 or not fused else float8.note(model, masks.analysis)
    report.notes += [note for note in (cpu_only_note(candidates), gathered_note(candidates), float8_note) if note]
    report.defects, report.invalid_nodes = masks.analysis.defects, masks.analysis.invalid_nodes
    return model, report


def _rewritten(candidate: Candidate, options: Options, masks: Masks, names: Names, full_rows: list[ir.Node]) -> bool:
    """Fuses a site, if it is understood; False where what was understood no longer stands in the graph."""
    if not isinstance(candidate.outcome, AttentionSpec):
        return True
    if not is_current(candidate.outcome):
        return False
    given, opset = masks.analysis.dtype(candidate.outcome.query.value), masks.analysis.opset
    candidate.outcome = with_empty_rows(candidate.outcome, given, masks.nodes(candidate.graph), opset)
    if not isinstance(candidate.outcome, AttentionSpec):
        return True
    if options.dtype is not None and not options.float8:
        candidate.outcome = in_precision(candidate.outcome, options.dtype, given, opset)
    node = rewrite_site(candidate, names)
    if options.float32 and given == ir.DataType.FLOAT:
        node.attributes[FLOAT32_PRECISION] = ir.AttrString(FLOAT32_PRECISION, options.float32)
    if candidate.outcome.mask.rows_see_a_key:
        full_rows.append(node)
    return True


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
