# SPDX-License-Identifier: Apache-2.0
"""Writes the fused node of each understood site into the graph and removes what died by it. Called by pipeline.py.

Attributes and inputs are those of docs/operator.md. Names and order stay stable: nodes are called after the node they
replace.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import onnx_ir as ir

from faexport.graph.edits import Names, name_node, remove_dead, take_over
from faexport.graph.nodes import name_of, op
from faexport.spec import (
    ALL_KEYS,
    DIVISORS,
    DOMAIN,
    LEFT_OUT,
    OP_TYPE,
    VERSION,
    Alignment,
    AttentionSpec,
    Candidate,
    EmptyRow,
    Layout,
    Operand,
)


def fused_node(spec: AttentionSpec) -> ir.Node:
    """The node for a spec, not yet in a graph; its first output stands for spec.output."""
    optional = {
        "attn_mask": spec.mask.attn_mask,
        "attn_bias": spec.mask.attn_bias,
        "past_key": spec.past_key,
        "past_value": spec.past_value,
        "nonpad_kv_seqlen": spec.mask.kv_lengths,
        "query_offset": spec.mask.query_offset,
        "alibi_slopes": spec.mask.alibi_slopes,
        "sinks": spec.sinks,
        **spec.further_inputs,
    }
    given = {name: value for name, value in optional.items() if value is not None}
    wanted = {"present_key": spec.present_key, "present_value": spec.present_value, "lse": spec.lse}
    extra = [name for name, value in wanted.items() if value is not None]
    inputs = [spec.query.value, spec.key.value, spec.value.value, *given.values()]
    attributes = _attributes(spec)
    if given:
        attributes["optional_inputs"] = ",".join(given)
    if extra:
        attributes["optional_outputs"] = ",".join(extra)
    return ir.node(OP_TYPE, inputs, attributes, domain=DOMAIN, num_outputs=1 + len(extra))


def _attributes(spec: AttentionSpec) -> dict:
    attributes: dict = {"scale": float(spec.softmax_scale)}
    if spec.query.layout == Layout.BSH:
        attributes["q_num_heads"] = spec.query.heads
    if Layout.BSH in (spec.key.layout, spec.value.layout):
        attributes["kv_num_heads"] = spec.key.heads or spec.value.heads
    mask = spec.mask
    if mask.window_right == 0:
        attributes["is_causal"] = 1
    elif mask.window_right > 0:
        attributes["right_window_size"] = mask.window_right
    if mask.window_left >= 0:
        attributes["left_window_size"] = mask.window_left
    if spec.softcap:
        attributes["softcap"] = float(spec.softcap)
    if mask.alignment != Alignment.ONNX:
        attributes["alignment"] = str(mask.alignment)
    if mask.empty_row != EmptyRow.ZERO:
        attributes["empty_row"] = str(mask.empty_row)
    attributes |= _layouts(spec) | dict(spec.further_attributes)
    if spec.query.column_start is not None:
        operands = (spec.query, spec.key, spec.value)
        attributes["packed_columns"] = [n for o in operands for n in (o.column_start, o.column_stride)]
        attributes["head_dim"] = spec.query.head_dim
        attributes["head_dim_v"] = spec.value.head_dim
    return attributes


def _layouts(spec: AttentionSpec) -> dict:
    """Layouts that differ from what the operator takes by default, or that no shape in the model tells."""

    def default(operand: Operand) -> bool:
        return operand.layout in (Layout.BHSD, Layout.BSH) and operand.value.shape is not None

    named = {"query_layout": spec.query, "key_layout": spec.key, "value_layout": spec.value}
    attributes = {name: str(operand.layout) for name, operand in named.items() if not default(operand)}
    if spec.output_layout != spec.query.layout:
        attributes["output_layout"] = str(spec.output_layout)
    return attributes


def is_gone(candidate: Candidate) -> bool:
    """Does what the site is to replace no longer stand in the graph?"""
    spec = candidate.outcome
    return isinstance(spec, AttentionSpec) and (spec.replaces or candidate.anchor).graph is None


def is_current(spec: AttentionSpec) -> bool:
    """Are the operands still computed? Not where the site that computed them was rewritten since."""
    new = {*spec.new_nodes, *spec.mask.new_nodes}
    operands = [spec.query.value, spec.key.value, spec.value.value, spec.past_key, spec.past_value, spec.sinks]
    operands += [*spec.mask.values, *spec.further_inputs.values()]
    operands += [v for node in new for v in node.inputs]
    producers = [v.producer() for v in operands if v is not None]
    return all(node is None or node.graph is not None or node in new for node in producers)


def rewrite_site(candidate: Candidate, names: Names) -> ir.Node:
    """Inserts the fused node of a candidate whose outcome is a spec, and removes the nodes that nothing needs any
    more."""
    spec = candidate.outcome
    assert isinstance(spec, AttentionSpec)
    node = fused_node(spec)
    if spec.left_out:
        node.metadata_props[LEFT_OUT] = json.dumps(spec.left_out)
    if spec.divisors:
        node.metadata_props[DIVISORS] = json.dumps(spec.divisors)
    if spec.mask.all_keys is not None:
        node.metadata_props[ALL_KEYS] = json.dumps([spec.mask.all_keys.name])
    anchor = spec.replaces or candidate.anchor
    node.name = names.fresh(f"{name_of(anchor)}_{OP_TYPE}")
    # Operands and mask may share some, which stand where they are needed first.
    new = [*dict.fromkeys(n for n in (*spec.new_nodes, *spec.mask.new_nodes) if n.graph is None), node]
    result = node.outputs[0]
    old = [spec.output, spec.present_key, spec.present_value, spec.lse]
    outputs = list(node.outputs)
    if spec.output_nodes:
        result.name = names.fresh(f"{node.name}_output")
        assert spec.output_entry is not None  # they begin with it
        spec.output_entry.replace_all_uses_with(result)
        new += spec.output_nodes
        outputs[0] = spec.output_nodes[-1].outputs[0]
    for extra in new:
        name_node(extra, node.name, names, keep=extra is node)
    owner = anchor.graph
    assert owner is not None
    owner.insert_before(anchor, new)
    replaced = [v for v in old if v is not None]
    for value, fresh in (*zip(replaced, outputs, strict=True), *spec.other_outputs):
        take_over(value, fresh)
    replaced += [named for present in node.outputs[1:] if (named := _own_output(present)) is not None]
    for shape, instead in spec.shape_uses:
        _replace_shape(shape, instead, node.name, names)
    for gone, alike in spec.same_shapes:
        for use in list(gone.uses()):
            if op(use.node) == "Shape":
                use.node.replace_input_with(use.idx, alike)
        replaced.append(gone)
    remove_dead([v.producer() for v in replaced])
    if spec.present_key is not None or spec.present_value is not None:
        owner.sort()  # what reads a present that was a Concat's may stand in front of the node that makes it now
    candidate.fused_node = node
    return node


def _own_output(present: ir.Value) -> ir.Value | None:
    """Makes a present itself an output of the graph where a copy of it is one, so that it may be the past's buffer.
    Returns the copy."""
    copies = (use.node.outputs[0] for use in present.uses() if op(use.node) == "Identity")
    copy = next((value for value in copies if value.is_graph_output()), None)
    if copy is not None and not present.is_graph_output():
        take_over(copy, present)
        return copy
    return None


def _replace_shape(shape: ir.Node, instead: Sequence[ir.Node], base: str, names: Names) -> None:
    """Puts the nodes that compute a shape where the Shape node was; a core's scores may be read by several."""
    if shape.graph is None:
        return
    for extra in instead:
        name_node(extra, f"{base}_shape", names)
    shape.graph.insert_before(shape, list(instead))
    take_over(shape.outputs[0], instead[-1].outputs[0])
    remove_dead([shape])


def add_opset(model: ir.Model) -> None:
    """Declares the operator's domain wherever a fused node stands."""
    model.opset_imports[DOMAIN] = VERSION
    for function in model.functions.values():
        if any(node.domain == DOMAIN for node in function.all_nodes()):
            function.opset_imports[DOMAIN] = VERSION
