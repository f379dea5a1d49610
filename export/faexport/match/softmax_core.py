# SPDX-License-Identifier: Apache-2.0
"""Attention written out: a product of queries and keys, scale, masks, Softmax, a product with the values, in any
spelling.

Anchored at the softmax (a node, or exp / sum). A softmax without both products is no attention and no site.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from faexport.match import Context, matcher
from faexport.match.masks import understand
from faexport.nodes import data_users, name_of, op
from faexport.spec import AttentionSpec, Candidate, Fact, Mask, MaskTerm, Refusal, ScoreShape
from faexport.understand.core.score_chain import Blocked, Scores, find_scores, letters, read_scores
from faexport.understand.core.sinks import sinks_of
from faexport.understand.core.softmax import Softmax, softmax_of
from faexport.understand.core.structure import Structure, new_producers, structure_of
from faexport.understand.core.value_chain import Values, feeds_product, find_values
from faexport.understand.layout.shape_uses import rebuild
from faexport.understand.layout.views import View, merged
from faexport.understand.shapes.dims import Dim, plain

SOURCE = "softmax_core"


@matcher(SOURCE, ("Softmax", "Div", "Mul", "Exp"))
def match(node: ir.Node, context: Context) -> Candidate | None:
    a = context.analysis
    softmax = softmax_of(node, a)
    if softmax is None:
        return None
    candidate = Candidate(node, context.graph, SOURCE)
    path = find_scores(softmax, a)
    if isinstance(path, Blocked):
        if not feeds_product(softmax.probabilities, a):
            return None
        candidate.outcome = Refusal(path.why, name_of(path.node or node))
        return candidate
    if path.product.labels.index("row") == softmax_axis_in_product(path, softmax, a):
        path.product = path.product.swapped()
    candidate.outcome = _understand(path, softmax, candidate, context)
    return candidate


def softmax_axis_in_product(path, softmax: Softmax, a) -> int | None:
    """Which axis of the score product the softmax normalises over."""
    scores = read_scores(path, softmax, a)
    if isinstance(scores, Refusal) or softmax.axis >= len(scores.view.axes):
        return None
    atoms = merged(scores.view.axes[softmax.axis])
    return atoms[0].axis if len(atoms) == 1 else None


def _understand(path, softmax: Softmax, candidate: Candidate, context: Context) -> AttentionSpec | Refusal:
    a = context.analysis
    scores = read_scores(path, softmax, a)
    if isinstance(scores, Refusal):
        return scores
    _note_sizes(candidate, scores, a)
    if merged(scores.view.axes[softmax.axis]) != _column(scores, a):
        return Refusal("the softmax does not run over the keys", name_of(softmax.node))
    if scores.sink is None:
        a.learn(softmax.probabilities, scores.view.shape)
    values = find_values(scores, softmax.probabilities, letters(path.product), a)
    if isinstance(values, Refusal):
        return values
    refusal = _private(scores, values, softmax)
    if refusal is not None:
        return refusal
    if values.guard is not None:
        found = _with_values(scores, values.past_guard(), softmax, candidate, context)
        if isinstance(found, AttentionSpec):
            return found
    return _with_values(scores, values, softmax, candidate, context)


def _with_values(scores: Scores, values: Values, softmax, candidate, context: Context) -> AttentionSpec | Refusal:
    structure = structure_of(scores, values, context.analysis)
    if isinstance(structure, Refusal):
        return structure
    return _spec(scores, values, structure, softmax, candidate, context)


def _column(scores: Scores, a) -> tuple:
    shape = a.shape(scores.product.node.outputs[0])
    return View.whole(shape).axes[scores.product.labels.index("column")]


def _note_sizes(candidate: Candidate, scores: Scores, a) -> None:
    """What the report can say of a site, refused or not."""
    shape = a.shape(scores.product.node.outputs[0])
    sizes = dict(zip(letters(scores.product), map(plain, shape), strict=True))
    names = {"B": "batch_size", "H": "num_q_heads", "S": "seqlen_q", "T": "seqlen_kv"}
    candidate.sizes.update({name: sizes[letter] for letter, name in names.items() if letter in sizes})
    candidate.sizes["dtype"] = _dtype_name(a.dtype(scores.product.node.outputs[0]))


def _dtype_name(dtype: ir.DataType | None) -> str | None:
    return None if dtype is None else dtype.name.lower()


def _private(scores: Scores, values: Values, softmax: Softmax) -> Refusal | None:
    """The scores may be read by nothing else: they would be computed a second time, and outputs of the model may not
    go away."""
    inside = {*scores.nodes, *values.nodes, *softmax.inner}
    for node in (*scores.nodes, *softmax.inner):
        for value in node.outputs:
            if value.is_graph_output():
                return Refusal("the attention scores are also an output of the model", name_of(node))
            for user in data_users(value):
                if user not in inside and value is not softmax.probabilities:
                    return Refusal(f"the attention scores are used twice: also by {op(user)}", name_of(user))
    return None


def _score_shape(
    scores: Scores, values: Values, structure: Structure, softmax: Softmax, context: Context
) -> ScoreShape:
    a = context.analysis
    batch = None
    for size in values.lead_sizes:
        batch = size if batch is None else batch * size
    shape = a.shape(scores.product.node.outputs[0])
    rows, columns = (shape[scores.product.labels.index(x)] for x in ("row", "column"))
    return ScoreShape(
        structure.query.operand,
        structure.key.operand,
        softmax.node,
        context.graph,
        plain(batch.divide(structure.heads) if batch is not None else None),
        structure.heads.const,
        plain(rows),
        plain(columns),
        dtype=a.dtype(scores.product.node.outputs[0]) or ir.DataType.FLOAT,
        sinks=scores.sink is not None,
        nan_guard=values.nan_guard,
    )


def _spec(
    scores, values, structure: Structure, softmax, candidate: Candidate, context: Context
) -> AttentionSpec | Refusal:
    a = context.analysis
    query, key, value = structure.query, structure.key, structure.value
    score_shape = _score_shape(scores, values, structure, softmax, context)
    terms = _by_heads([*scores.terms, *values.terms], values.lead_sizes, structure.heads)
    if isinstance(terms, Refusal):
        return terms
    mask = understand(terms, score_shape, context) if terms else Mask()
    if isinstance(mask, Refusal):
        return mask
    output = structure.output
    shape_uses = _shape_uses(scores, values, structure, a)
    if isinstance(shape_uses, Refusal):
        return shape_uses
    candidate.sizes.update(
        batch_size=score_shape.batch,
        num_q_heads=plain(structure.heads),
        num_kv_heads=plain(key.heads),
        seqlen_q=score_shape.seqlen_q,
        seqlen_kv=score_shape.seqlen_kv,
        head_dim=query.operand.head_dim,
        head_dim_v=value.operand.head_dim,
        dtype=_dtype_name(a.dtype(query.operand.value)),
    )
    sinks, sink_nodes = None, ()
    if scores.sink is not None:
        found = sinks_of(scores, structure.heads, a)
        if isinstance(found, Refusal):
            return found
        sinks, sink_nodes = found
    return AttentionSpec(
        query.operand,
        key.operand,
        value.operand,
        output.value,
        output.layout,
        scores.scale * query.scale * key.scale,
        replaces=values.product.node,
        head_dim=query.operand.head_dim,
        head_dim_v=value.operand.head_dim,
        new_nodes=(
            *new_producers(query.source),
            *query.new_nodes,
            *key.new_nodes,
            *value.new_nodes,
            *sink_nodes,
            *_of_mask(mask),
        ),
        output_nodes=output.nodes,
        output_entry=output.entry,
        shape_uses=shape_uses,
        mask=mask,
        softcap=scores.softcap,
        sinks=sinks,
        facts=_facts(structure, scores),
    )


def _of_mask(mask: Mask) -> tuple[ir.Node, ...]:
    """New nodes that a mask is made from, beside its own."""
    values = [v for v in (mask.attn_mask, mask.attn_bias) if v is not None]
    values += [v for node in mask.new_nodes for v in node.inputs if v is not None]
    needed = dict.fromkeys(node for value in values for node in new_producers(value))
    return tuple(node for node in needed if node not in mask.new_nodes)


def _by_heads(terms: list[MaskTerm], lead_sizes: list[Dim], heads: Dim) -> list[MaskTerm] | Refusal:
    """The terms with axes named for this number of heads: of three leading axes the last two are heads (K, G), or the
    last alone is, and the first two are the batch (M, W)."""
    if len(lead_sizes) != 3 or heads == lead_sizes[1] * lead_sizes[2]:
        return terms
    mixed = next((term for term in terms if "H" in term.axes or "N" in term.axes), None)
    if mixed is not None:
        return Refusal("its mask mixes batch and heads", name_of(mixed.node))
    names = str.maketrans("BKG", "MWH")
    return [dataclasses.replace(term, axes=term.axes.translate(names)) for term in terms]


def _shape_uses(
    scores: Scores, values: Values, structure: Structure, a
) -> tuple[tuple[ir.Node, list[ir.Node]], ...] | Refusal:
    """What takes the place of Shape nodes that read what goes away."""
    early = (structure.query.source, structure.key.source)
    late = (*early, structure.value.source)
    found = []
    for uses, sources in ((scores.shape_uses, early), (values.shape_uses, early), (structure.output.shape_uses, late)):
        for use in uses:
            nodes = rebuild(use, sources, a)
            if isinstance(nodes, Refusal):
                return nodes
            found.append((use.node, nodes))
    return tuple(found)


def _facts(structure: Structure, scores: Scores) -> tuple[Fact, ...]:
    facts = []
    query, key = structure.query, structure.key
    if key.heads != structure.heads:
        facts.append(Fact(f"{structure.heads} query heads on {key.heads} kv heads"))
    if query.operand.column_start is not None:
        facts.append(Fact("packed QKV read in place"))
    if scores.softcap:
        facts.append(Fact(f"softcap {scores.softcap:g}"))
    if scores.sink is not None:
        facts.append(Fact("attention sinks"))
    return tuple(facts)
