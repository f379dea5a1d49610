# SPDX-License-Identifier: Apache-2.0
"""Attention written out: a product of queries and keys, scale, masks, Softmax, a product with the values, in any
spelling.

Anchored at the softmax (a node, or exp / sum). A softmax without both products is no attention and no site.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import data_users, dtype_name, name_of, op
from faexport.graph.surgery import Builder
from faexport.match import Context, matcher, roundings
from faexport.match.core_facts import assumed_of, facts_of
from faexport.match.masks import understand
from faexport.match.roundings import Roundings
from faexport.sizes.dims import Dim, plain, product
from faexport.spec import (
    AttentionSpec,
    Candidate,
    Mask,
    MaskTerm,
    Refusal,
    RefusalKind,
    ScoreShape,
    TermKind,
)
from faexport.understand.core.hiding import with_hidden
from faexport.understand.core.number_types import in_one_type, type_of_masks
from faexport.understand.core.rows_of_heads import heads_apart
from faexport.understand.core.score_chain import Scores, letters, read_scores, view_of_scores
from faexport.understand.core.score_path import BY_WEIGHTS, MAX_PATH, Blocked, Path, find_scores
from faexport.understand.core.sinks import sinks_of
from faexport.understand.core.softmax import Softmax, softmax_of
from faexport.understand.core.structure import Structure, new_producers, structure_of
from faexport.understand.core.value_chain import Values, feeds_product, find_values
from faexport.understand.core.widening import Widen, widened
from faexport.understand.layout.products import PRODUCT_OPS
from faexport.understand.layout.shape_uses import as_it_is, rebuild
from faexport.understand.layout.views import View, merged
from faexport.understand.shapes.analysis import Analysis

SOURCE = "softmax_core"


@matcher(SOURCE, ("Softmax", "Div", "Mul", "Exp"))
def match(node: ir.Node, context: Context) -> list[Candidate]:
    a = context.analysis
    softmax = softmax_of(node, a)
    if softmax is None:
        return []
    path = find_scores(softmax, a, context.masks)
    if isinstance(path, Path) and path.product.labels.index("row") == softmax_axis_in_product(path, softmax, a):
        path.product = path.product.swapped()
    if isinstance(path, Path) and a.is_static(path.product.right.value):
        path = Blocked(path.product.node, BY_WEIGHTS)
    if softmax.flaw:
        found = [
            Candidate(node, context.graph, SOURCE, outcome=Refusal(softmax.flaw, name_of(node), softmax.flaw_kind))
        ]
    elif isinstance(path, Blocked):
        why = roundings.why_unread(path.why, path.consent_may_help, context)
        refusal = Refusal(why, name_of(path.node or node), path.kind)
        found = [Candidate(node, context.graph, SOURCE, outcome=refusal)]
    else:
        found = _understand(path, softmax, context)
    refused = any(isinstance(c.outcome, Refusal) for c in found)
    return [] if refused and not feeds_product(softmax, a, of_product=isinstance(path, Path)) else found


def softmax_axis_in_product(path: Path, softmax: Softmax, a: Analysis) -> int | None:
    """Which axis of the score product the softmax normalises over."""
    view = view_of_scores(path, a)
    if view is None or not -len(view.axes) <= softmax.axis < len(view.axes):
        return None
    atoms = merged(view.axes[softmax.axis])
    return atoms[0].axis if len(atoms) == 1 else None


def _understand(path: Path, softmax: Softmax, context: Context) -> list[Candidate]:
    """A candidate for each product with values that reads the softmax."""
    found = _read_in_all_ways(path, softmax, context)
    if not _all_understood(found) and (apart := heads_apart(path, context.analysis)):
        return _read_in_all_ways(apart, softmax, context)
    return found


def _all_understood(found: list[Candidate]) -> bool:
    return all(isinstance(candidate.outcome, AttentionSpec) for candidate in found)


def _read_in_all_ways(path: Path, softmax: Softmax, context: Context) -> list[Candidate]:
    a, shown = context.analysis, None
    has_factor = any(s.kind == "factor" for s in path.steps)
    for widen in Widen:
        if widen is not Widen.NOTHING and not widened(path.product, path.steps, widen, a)[1]:
            continue
        shown = None if widen is Widen.NOT_KEYS else shown  # sizes are no obstacle then
        for gates in (True, False) if has_factor else (True,):
            found = _read(path, softmax, context, gates, widen)
            if _all_understood(found):
                return found
            a.forget()  # what a refused reading took for granted of sizes was not proven
            shown = shown or found
    assert shown is not None
    return shown


def _read(path: Path, softmax: Softmax, context: Context, gates: bool, widen: Widen) -> list[Candidate]:
    """With `gates`, scores times 0 or 1 are masked, else they are scores times a factor. With `widen` they may take the
    size of a mask."""
    a = context.analysis
    candidate = Candidate(softmax.node, context.graph, SOURCE)
    scores = read_scores(path, softmax, a, gates, widen)
    if isinstance(scores, Scores):
        scores = with_hidden(scores, softmax, context.options.assume_zeros_and_ones, a)
    if isinstance(scores, Refusal):
        candidate.outcome = scores
        return [candidate]
    _note_sizes(candidate, scores, a)
    values = _values(scores, softmax, context)
    if isinstance(values, Refusal):
        candidate.outcome = values
        return [candidate]
    if widen is Widen.ALL and any(op(one.product.node) != "Einsum" for one in values):
        candidate.outcome = Refusal("more keys than there are would not fit the values", name_of(softmax.node))
        return [candidate]
    found = []
    for one in values:
        anchor = softmax.node if len(values) == 1 else one.product.node
        own = Candidate(anchor, context.graph, SOURCE, sizes=dict(candidate.sizes))
        own.outcome = _with_guard(scores, one, softmax, own, context)
        found.append(own)
    return _all_or_none(found)


def _all_or_none(candidates: list[Candidate]) -> list[Candidate]:
    """Where one product keeps the probabilities, they are computed anyway, and fusing another would compute them
    twice."""
    left = next((c for c in candidates if isinstance(c.outcome, Refusal)), None)
    if left is not None:
        for candidate in candidates:
            if isinstance(candidate.outcome, AttentionSpec):
                why = f"the attention weights are also read by {left.name}, which is left as it is"
                candidate.outcome = Refusal(why, left.name)
    return candidates


def _values(scores: Scores, softmax: Softmax, context: Context) -> list[Values] | Refusal:
    a = context.analysis
    if merged(scores.view.axes[softmax.axis]) != _column(scores, a):
        return Refusal("the softmax does not run over the keys", name_of(softmax.node), RefusalKind.NO_ATTENTION)
    if scores.sink is None:
        a.learn(softmax.probabilities, scores.view.shape)
    values = find_values(scores, softmax, letters(scores.product), a)
    if isinstance(values, Refusal):
        return values
    return _private(scores, values, softmax, context) or values


def _with_guard(
    scores: Scores, values: Values, softmax: Softmax, candidate: Candidate, context: Context
) -> AttentionSpec | Refusal:
    if values.guard is not None:
        found = _with_values(scores, values.past_guard(), softmax, candidate, context)
        if isinstance(found, AttentionSpec):
            return found
    found = _with_values(scores, values, softmax, candidate, context)
    apart = values.rows_apart(context.analysis) if isinstance(found, Refusal) else None
    instead = found if apart is None else _with_values(scores, apart, softmax, candidate, context)
    return instead if isinstance(instead, AttentionSpec) else found


def _with_values(
    scores: Scores, values: Values, softmax: Softmax, candidate: Candidate, context: Context
) -> AttentionSpec | Refusal:
    terms, masks = roundings.unrounded(scores.terms, context)
    rounded = Roundings(roundings.between(scores.nodes, context.analysis), masks, values.roundings)
    if why := rounded.refusal(context):
        return why
    scores = dataclasses.replace(scores, terms=terms)
    scores = dataclasses.replace(scores, terms=in_one_type(scores, context.analysis))
    structure = structure_of(scores, values, context.analysis)
    if isinstance(structure, Refusal):
        return structure
    return _spec(scores, values, structure, softmax, rounded, candidate, context)


def _column(scores: Scores, a: Analysis) -> tuple:
    return View.whole(a.simplified(scores.shape)).axes[scores.product.labels.index("column")]


def _note_sizes(candidate: Candidate, scores: Scores, a: Analysis) -> None:
    """What the report can say of a site, refused or not."""
    shape = a.simplified(scores.shape)
    sizes = dict(zip(letters(scores.product), map(plain, shape), strict=True))
    names = {"B": "batch_size", "H": "num_q_heads", "S": "seqlen_q", "T": "seqlen_kv"}
    candidate.sizes.update({name: sizes[letter] for letter, name in names.items() if letter in sizes})
    candidate.sizes["dtype"] = dtype_name(a.dtype(scores.product.node.outputs[0]))


def _note_heads(candidate: Candidate, structure: Structure, scores: ScoreShape, a: Analysis) -> None:
    """What the report can say of a site once its heads are known, refused or not."""
    query = structure.query.operand
    candidate.sizes.update(
        batch_size=plain(scores.batch),
        num_q_heads=plain(structure.heads),
        num_kv_heads=plain(structure.key.heads),
        seqlen_q=plain(scores.seqlen_q),
        seqlen_kv=plain(scores.seqlen_kv),
        head_dim=query.head_dim,
        head_dim_v=structure.value.operand.head_dim,
        dtype=dtype_name(a.dtype(query.value)),
    )


def _private(scores: Scores, values: list[Values], softmax: Softmax, context: Context) -> Refusal | None:
    """The scores may be read by nothing else but further attention: they would be computed a second time, and outputs
    of the model may not go away."""
    inside = {*scores.nodes, *softmax.inner, *(node for one in values for node in one.nodes)}
    for node in (*scores.nodes, *softmax.inner):
        what = "the attention scores are" if node in scores.nodes else f"what the softmax's {op(node)} gives is"
        for value in node.outputs:
            if value.is_graph_output():
                return Refusal(f"{what} also an output of the model", name_of(node), RefusalKind.SCORES_READ)
            for user in data_users(value):
                twice = sum(given is value for given in user.inputs) > 1  # what is added to scores is the scores
                if user in inside and not twice or value is softmax.probabilities:
                    continue
                other = node in scores.nodes and _is_for_another_site(user, scores.product.node, softmax, context)
                if twice or not other:
                    return Refusal(f"{what} used twice: also by {op(user)}", name_of(user), RefusalKind.SCORES_READ)
    return None


def _is_for_another_site(node: ir.Node, scores: ir.Node, own: Softmax, context: Context) -> bool:
    """Is `node`, which reads what this product gives, on the way to another softmax of it that weighs values, and to
    nothing else, such as a mask for its own?

    Exporters merge equal products, and attention in both directions has one product for its two softmaxes.
    """
    a, found, pending, seen = context.analysis, False, [node], {node}
    while pending and len(seen) < MAX_PATH:
        node = pending.pop()
        softmax = softmax_of(node, a)
        if softmax is not None:
            path = find_scores(softmax, a, context.masks)
            if not isinstance(path, Path) or path.product.node is not scores:
                return False
            if softmax.flaw or softmax.node is own.node or not feeds_product(softmax, a, of_product=True):
                return False
            found = True
            continue
        users = [user for value in node.outputs for user in data_users(value)]
        if op(node) in PRODUCT_OPS or not users or any(value.is_graph_output() for value in node.outputs):
            return False
        pending += [user for user in users if user not in seen]
        seen.update(users)
    return found and not pending


def _score_shape(
    scores: Scores, values: Values, structure: Structure, softmax: Softmax, context: Context
) -> ScoreShape:
    a = context.analysis
    batch = None
    for size in values.lead_sizes:
        batch = size if batch is None else batch * size
    shape = a.simplified(scores.shape)
    rows, columns = (shape[scores.product.labels.index(x)] for x in ("row", "column"))
    return ScoreShape(
        structure.query.operand,
        structure.key.operand,
        softmax.node,
        context.graph,
        batch.divide(structure.heads) if batch is not None else None,
        structure.heads,
        rows,
        columns,
        dtype=type_of_masks(scores, a),
        sinks=scores.sink is not None or softmax.logit is not None,
        nan_guard=values.nan_guard,
        same_keys=_rows_of_values(values, a) == columns,
        one_key_spreads=op(values.product.node) == "Einsum",
    )


def _rows_of_values(values: Values, a: Analysis) -> Dim | None:
    shape = a.shape(values.product.right.value)
    return None if shape is None else shape[values.product.right.labels.index("sum")]


def _spec(
    scores: Scores,
    values: Values,
    structure: Structure,
    softmax: Softmax,
    rounded: Roundings,
    candidate: Candidate,
    context: Context,
) -> AttentionSpec | Refusal:
    a = context.analysis
    query, key, value = structure.query, structure.key, structure.value
    score_shape = _score_shape(scores, values, structure, softmax, context)
    mask = _mask(scores, values, structure, score_shape, context)
    if isinstance(mask, Refusal):
        return mask
    scale = scores.scale * query.scale * key.scale
    if not _is_stored(scale):
        return Refusal(f"its scale, {scale:g}, is no number of float32 other than 0", name_of(softmax.node))
    shape_uses = _shape_uses(scores, values, structure, a)
    if isinstance(shape_uses, Refusal):
        return shape_uses
    _note_heads(candidate, structure, score_shape, a)
    found = sinks_of(scores, softmax.logit, structure.heads, a)
    if isinstance(found, Refusal) and scores.sink is not None:
        column, found = roundings.sinks_in_front(scores, structure.heads, found, context)
        rounded = dataclasses.replace(rounded, sinks=column)
    if isinstance(found, Refusal):
        return found
    sinks, sink_nodes, _ = found or (None, (), None)
    return AttentionSpec(
        query.operand,
        key.operand,
        value.operand,
        structure.output.value,
        structure.output.layout,
        scale,
        replaces=values.product.node,
        head_dim=query.operand.head_dim,
        head_dim_v=value.operand.head_dim,
        new_nodes=(*query.new_nodes, *key.new_nodes, *value.new_nodes, *sink_nodes, *_of_mask(mask)),
        output_nodes=structure.output.nodes,
        output_entry=structure.output.entry,
        shape_uses=shape_uses,
        mask=mask,
        softcap=scores.softcap,
        sinks=sinks,
        left_out=rounded.outputs,
        divisors=() if softmax.divisor is None else (softmax.divisor.name or "",),
        facts=(
            *facts_of(structure, scores, values, sinks is not None, a),
            *assumed_of(softmax, a),
            *rounded.facts(),
        ),
    )


def _mask(
    scores: Scores, values: Values, structure: Structure, score_shape: ScoreShape, context: Context
) -> Mask | Refusal:
    """What is added to the scores. A lone bias of five axes that isn't understood as it is may be one of four axes."""
    a = context.analysis
    terms = _widened([*scores.terms, *values.terms], scores, values, a)
    if not isinstance(terms, Refusal):
        terms = _by_heads(terms, values.lead_sizes, structure.heads)
    if isinstance(terms, Refusal):
        return terms
    mask = understand(terms, score_shape, context) if terms else Mask()
    merged = _with_four_axes(terms, structure.heads, a) if isinstance(mask, Refusal) else None
    if merged is not None:
        as_bias = understand([merged], score_shape, context)
        mask = as_bias if isinstance(as_bias, Mask) else mask
    return mask


def _is_stored(scale: float) -> bool:
    """Can the operator's attribute hold it? It is float32, and 0 is the operator's word for 1 / sqrt(head_dim)."""
    with np.errstate(over="ignore"):
        return 0 < abs(float(np.float32(scale))) < math.inf


def _widened(terms: list[MaskTerm], scores: Scores, values: Values, a: Analysis) -> list[MaskTerm] | Refusal:
    """The terms for scores with as many batch entries and heads as the values, which may have more than the queries and
    keys have. A mask that has as many as these is broadcast then, as they are."""
    names = dict(zip(scores.product.labels, letters(scores.product), strict=True))
    shape = dict(zip(names, a.simplified(scores.shape), strict=True))
    if len(values.lead_sizes) != len(scores.product.leads):
        return terms
    whole = zip(scores.product.leads, values.lead_sizes, strict=True)
    wider = {names[label]: size for label, size in whole if shape[label] != size}
    ones = {names[label] for label, size in shape.items() if size == 1}
    for term in terms:
        if not set(wider) <= set(term.axes) or (len(ones) > 1 and ones & set(wider)):  # which of the ones is which?
            why = "the values may have more heads or batch entries than the masked scores"
            return Refusal(why, name_of(term.node), RefusalKind.UNLIKE_SIZES)
    return [
        dataclasses.replace(t, dims=tuple(wider.get(x, d) for x, d in zip(t.axes, t.dims, strict=True))) for t in terms
    ]


def _with_four_axes(terms: list[MaskTerm], heads: Dim, a: Analysis) -> MaskTerm | None:
    """A lone bias as large as the scores, [M, W, H, S, T] or [B, K, G, S, T], as one of [B, H, S, T]."""
    if len(terms) != 1 or terms[0].kind is not TermKind.ADD or terms[0].axes not in ("MWHST", "BKGST"):
        return None
    term = terms[0]
    with a.without_learnt():  # the proof of the mask asks again whether the scores keep their sizes beside it
        sizes = a.shape(term.value)
    if sizes is None or len(sizes) != 5 or heads.const is None:
        return None
    dims = [None if d is None else Dim.of(d) for d in term.dims]
    groups = ((0, 1), (2,)) if term.axes == "MWHST" else ((0,), (1, 2))
    full = [all(sizes[i] == dims[i] for i in group) for group in groups]
    none = [all(sizes[i] == 1 for i in group) for group in groups]
    if not all(x or y for x, y in zip(full, none, strict=True)):
        return None
    build = Builder(a.opset)
    value = build.to_four_axes(term.value, [d.const for d in sizes], heads.const if full[1] else 1)
    for count, node in enumerate(build.nodes):
        node.outputs[0].name = f"{term.node.outputs[0].name}_faexport_{count}"
    batch = product(sizes[i] for i in groups[0])
    a.define(value, (batch, heads if full[1] else Dim.of(1), *sizes[3:]))
    size = product(d for i, d in enumerate(dims) if i in groups[0] and d is not None)
    return dataclasses.replace(term, value=value, axes="BHST", dims=(size, heads, *term.dims[3:]))


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
    scores: Scores, values: Values, structure: Structure, a: Analysis
) -> tuple[tuple[ir.Node, list[ir.Node]], ...] | Refusal:
    """What takes the place of Shape nodes that read what goes away."""
    early = (structure.query.source, structure.key.source)
    late = (*early, structure.value.source)
    shape = a.simplified(scores.shape)
    leads = [shape[scores.product.labels.index(label)] for label in scores.product.leads]
    found = []
    for uses, sources in ((scores.shape_uses, early), (values.shape_uses, early), (structure.output.shape_uses, late)):
        for use in uses:
            if uses is not structure.output.shape_uses and leads != list(values.lead_sizes):
                use = as_it_is(use, a)  # masks may have as many batch entries and heads as the values (_widened)
            nodes = rebuild(use, sources, a)
            if isinstance(nodes, Refusal):
                return nodes
            found.append((use.node, nodes))
    return tuple(found)
