# SPDX-License-Identifier: Apache-2.0
"""ONNX's own Attention, opset 23 to 25: the operator is a superset of it, so inputs and attributes carry over one to
one."""

from __future__ import annotations

import onnx_ir as ir

from faexport.graph.nodes import attribute, dtype_name, given, live_users, name_of, operand
from faexport.match import Context, matcher
from faexport.match.masks import understand
from faexport.sizes.dims import Dim, plain
from faexport.spec import (
    AttentionSpec,
    Candidate,
    Fact,
    Layout,
    Mask,
    MaskTerm,
    Refusal,
    RefusalKind,
    ScoreShape,
    TermKind,
)
from faexport.understand.core.outputs import Output, declared_output
from faexport.understand.core.structure import TYPES
from faexport.understand.layout.declared import Declared, Sizes, read_all, sizes_of
from faexport.understand.layout.heads import Reading
from faexport.understand.shapes.analysis import Analysis

SOURCE = "onnx_attention"


@matcher(SOURCE, ("Attention",), min_opset=23)
def match(node: ir.Node, context: Context) -> list[Candidate]:
    candidate = Candidate(node, context.graph, SOURCE)
    candidate.outcome = _refusal(node, context) or _spec(node, candidate, context)
    return [candidate]


def used_output(node: ir.Node, index: int) -> ir.Value | None:
    """The output, where anything reads it."""
    if index >= len(node.outputs):
        return None
    value = node.outputs[index]
    return value if value.is_graph_output() or live_users(value) else None


def _refusal(node: ir.Node, context: Context) -> Refusal | None:
    name = name_of(node)
    a = context.analysis
    if used_output(node, 3) is not None:
        return Refusal("the model asks for the attention scores too (qk_matmul_output)", name, RefusalKind.SCORES_READ)
    if len(node.inputs) < 3 or None in node.inputs[:3]:
        return Refusal("query, key or value is missing", name)
    if (operand(node, 4) is None) != (operand(node, 5) is None):
        return Refusal("it has a cache of keys or of values alone", name)
    dtypes = {a.dtype(v) for v in node.inputs[:3]}
    if not dtypes <= {*TYPES, None}:
        return Refusal("query, key and value are not float32, float16 or bfloat16", name, RefusalKind.TYPE)
    if len(dtypes - {None}) > 1:
        return Refusal("query, key and value have different types", name)
    if attribute(node, "scale") == 0.0:
        return Refusal("its softmax scale is 0, which stands for the default in the operator", name)
    if any(x.is_ref() for x in node.attributes.values()):
        return Refusal("an attribute is a parameter of the function that the node is in", name)
    ranks = [a.rank(v) for v in node.inputs[:3]]
    if None in ranks and set(ranks) != {None}:
        return Refusal("the shape of query, key or value is not known", name, RefusalKind.UNKNOWN_SIZES)
    if ranks[0] not in (3, 4, None) or len(set(ranks)) != 1:
        return Refusal("query, key and value have different ranks", name)
    return None


def _declared(node: ir.Node, index: int, a: Analysis) -> Declared:
    value = given(node, index)
    heads = attribute(node, "q_num_heads" if index == 0 else "kv_num_heads", 0)
    shape = a.shape(value)
    if heads and (shape is None or len(shape) == 3):
        return Declared(value, Layout.BSH, Dim.of(heads))
    return Declared(value, Layout.BHSD, shape[1] if shape is not None and len(shape) == 4 else None)


def _spec(node: ir.Node, candidate: Candidate, context: Context) -> AttentionSpec | Refusal:
    a = context.analysis
    declared = [_declared(node, i, a) for i in range(3)]
    sizes = [sizes_of(d, a) for d in declared]
    past = [operand(node, i) for i in (4, 5)]
    present = [used_output(node, i) for i in (1, 2)]
    query, key, value = read_all(declared, a)
    if any(past) or any(present):
        key, value = declared[1].as_is(), declared[2].as_is()
        if query.operand.column_start is not None:
            query = declared[0].as_is()
    mask = _mask(node, declared, sizes, past, context)
    if isinstance(mask, Refusal):
        return mask
    output = _output(node, declared, sizes, a)
    _note_sizes(candidate, declared, sizes, key, past[0], a)
    facts = (
        [Fact(f"{plain(sizes[0][1])} query heads on {key.heads} kv heads")]
        if sizes[0] and key.heads != sizes[0][1]
        else []
    )
    return AttentionSpec(
        query.operand,
        key.operand,
        value.operand,
        output.value,
        output.layout,
        attribute(node, "scale", 0.0),
        replaces=node,
        head_dim=candidate.sizes["head_dim"],
        head_dim_v=candidate.sizes["head_dim_v"],
        mask=mask,
        softcap=attribute(node, "softcap", 0.0),
        past_key=past[0],
        past_value=past[1],
        present_key=present[0],
        present_value=present[1],
        facts=tuple(facts),
    )


def _output(node: ir.Node, declared: list[Declared], sizes: list[Sizes | None], a: Analysis) -> Output:
    value, layout = node.outputs[0], declared[0].layout
    query, keys, values = sizes
    if query is None or keys is None or values is None:
        return Output(value, layout)
    whole = (*query[:3], values[3])
    return declared_output(value, layout, whole, a.dtype(node.inputs[0]), a)


def _note_sizes(
    candidate: Candidate,
    declared: list[Declared],
    sizes: list[Sizes | None],
    key: Reading,
    past: ir.Value | None,
    a: Analysis,
) -> None:
    query, keys, values = sizes
    total = keys[2] if keys else None
    past_shape = a.shape(past) if past is not None else None
    if total is not None and past is not None:
        total = total + past_shape[2] if past_shape is not None and len(past_shape) == 4 else None
    candidate.sizes.update(
        batch_size=plain(query[0]) if query else None,
        num_q_heads=plain(declared[0].heads),
        num_kv_heads=plain(key.heads),
        seqlen_q=plain(query[2]) if query else None,
        seqlen_kv=plain(total),
        head_dim=plain(query[3]) if query else None,
        head_dim_v=plain(values[3]) if values else None,
        dtype=dtype_name(a.dtype(declared[0].value)),
    )


def _mask(
    node: ir.Node,
    declared: list[Declared],
    sizes: list[Sizes | None],
    past: list[ir.Value | None],
    context: Context,
) -> Mask | Refusal:
    a = context.analysis
    lengths, given = operand(node, 6), operand(node, 3)
    causal = bool(attribute(node, "is_causal", 0))
    left, right = (attribute(node, n, -1) for n in ("left_window_size", "right_window_size"))
    right = 0 if causal else right
    facts = _stated(node, causal, left, right)
    if given is None:
        return Mask(left, right, kv_lengths=lengths, facts=facts)
    plain_window = left < 0 and right < 0 and lengths is None and past[0] is None
    dtype = a.dtype(node.inputs[0])
    scores = _score_sizes(sizes)
    if plain_window and dtype is not None and scores is not None and _covers_all_keys(given, scores[3], a):
        term = _term(node, given, scores, a)
        shape = ScoreShape(
            declared[0].as_is().operand,
            declared[1].as_is().operand,
            node,
            context.graph,
            *scores,
            dtype,
            nan_guard=True,
        )
        found = understand([term], shape, context)
        if isinstance(found, Mask):
            return found
    is_bool = a.dtype(given) == ir.DataType.BOOL
    if a.dtype(given) is None:
        return Refusal("the type of attn_mask is not known", name_of(node), RefusalKind.UNKNOWN_SIZES)
    return Mask(
        left,
        right,
        attn_mask=given if is_bool else None,
        attn_bias=None if is_bool else given,
        kv_lengths=lengths,
        facts=facts,
    )


def _stated(node: ir.Node, causal: bool, left: int, right: int) -> tuple[Fact, ...]:
    names = (name_of(node),)
    facts = [Fact("causal", names)] if causal else []
    if left >= 0 or (right >= 0 and not causal):
        facts.append(Fact(f"window ({left}, {right})", names))
    return tuple(facts)


def _score_sizes(sizes: list[Sizes | None]) -> Sizes | None:
    """[B, H, S, T]"""
    query, keys, values = sizes
    return None if query is None or keys is None or values is None else (*query[:3], keys[2])


def _covers_all_keys(mask: ir.Value, num_keys: Dim, a: Analysis) -> bool:
    """ONNX lets a mask be shorter than the keys; then the rest is masked, which only the operator itself can say."""
    shape = a.shape(mask)
    return shape is not None and shape != () and a.dtype(mask) is not None and shape[-1] in (1, num_keys)


def _term(node: ir.Node, mask: ir.Value, scores: Sizes, a: Analysis) -> MaskTerm:
    kind = TermKind.BOOL if a.dtype(mask) == ir.DataType.BOOL else TermKind.ADD
    return MaskTerm(kind, mask, node, "BHST", scores)
