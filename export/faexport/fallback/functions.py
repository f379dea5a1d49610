# SPDX-License-Identifier: Apache-2.0
"""Carries the operator in the file as functions written in standard operators: then it runs, unfused, without our
library.

Called by pipeline.py after the sites are written. A runtime that has the library (or the plugin) takes that and never
looks at the functions. onnxruntime up to 1.24 knows one function of a name, so nodes are made to share one where that
costs the kernels nothing; where they can't, each form is an overload, and an older onnxruntime without the library
refuses the file (LAST_OVERLOAD).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from faexport.fallback.body import Form, function, numbers_of
from faexport.fallback.ops import READS_ATTRIBUTES
from faexport.fallback.rows import WRITES_OPSET, Rotary
from faexport.graph.fused import is_fused, layouts_of, optional_inputs, optional_outputs, set_optional_inputs
from faexport.graph.nodes import all_nodes, operand
from faexport.graph.surgery import FIRST_OPSET, Missing
from faexport.spec import DOMAIN, NUM_REQUIRED, OP_TYPE, Layout
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.rules_operator import output_dtype

MINIMUM_OPSET = 7
MINIMUM_IR_VERSION = 8  # the first with functions
OVERLOADS_IR_VERSION = 10
FLOAT8_OPSET = 19  # the first whose Cast takes float8
UNUSED = "unused"
LAST_OVERLOAD = "needs_faexport_library_or_newer_onnxruntime"

# What changes nothing in the place of an input that a node lacks. The kernels don't look at it: its name is `unused`.
NEUTRAL = {
    "attn_mask": np.ones((1, 1, 1, 1), np.bool_),
    "float_mask": np.zeros((1, 1, 1, 1), np.float32),
    "attn_bias": np.zeros((1, 1, 1, 1), np.float32),
    "alibi_slopes": np.zeros(1, np.float32),
    "sinks": np.full(1, -np.inf, np.float32),
    "query_bias": np.zeros((1, 1), np.float32),
    "empty_row_value": np.zeros((1, 1), np.float32),
    **{name: np.ones(1, np.float32) for name in ("query_descale", "key_descale", "value_descale", "output_scale")},
}
PLACED = (
    "past_key", "past_value", "nonpad_kv_seqlen", "query_offset", "cos_cache", "sin_cache", "position_ids",
    "q_norm_weight", "k_norm_weight", "write_indices",
)  # fmt: skip
SUPPORTED = {*NEUTRAL, *PLACED}


@dataclasses.dataclass
class _Call:
    """A fused node: its form, the type of its output, and the roles of its inputs after value. Words that don't matter
    for it are ""."""

    node: ir.Node
    form: Form
    dtype: ir.DataType


def add_fallback(model: ir.Model, full_rows: Collection[ir.Node] = (), analysis: Analysis | None = None) -> str:
    """Adds the functions. Returns "" or why there are none: then the model needs the library.

    Args:
        model: changed in place; functions of an earlier run are replaced.
        full_rows: fused nodes of which is proven that every row sees a key.
        analysis: what is known of the model's values; made here if not given.
    """
    remove_fallback(model)
    nodes = list(filter(is_fused, all_nodes(model)))
    opset = model.opset_imports.get("", 0)
    if not nodes:
        return ""
    if opset < MINIMUM_OPSET:
        return f"the model's opset is {opset}; the stand-in needs {MINIMUM_OPSET}"
    analysis = analysis or Analysis(model)
    calls = []
    for node in nodes:
        call = _read(node, analysis, opset, node in full_rows)
        if isinstance(call, str):
            return f"{call} ({node.name})"
        calls.append(call)
    groups = _grouped(calls)
    overloads = [f"form_{k}" for k in range(len(groups))] if len(groups) > 1 else [""]
    for group, overload in zip(groups, overloads, strict=True):
        form = _united(group)
        for call in group:
            _align(call, form)
            call.node.overload = overload
        try:
            made = function(form, opset, group[0].dtype, overload)
        except Missing as what:
            remove_fallback(model)
            return f"the stand-in {what}"
        model.functions[made.identifier()] = made
    model.ir_version = max(model.ir_version, MINIMUM_IR_VERSION)
    if len(groups) > 1:
        _refuse_older(model, opset)
    return ""


def remove_fallback(model: ir.Model) -> None:
    """Undoes add_fallback."""
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    for node in all_nodes(model):
        if is_fused(node):
            node.overload = ""
            names = optional_inputs(node)
            if UNUSED in names:
                kept = [(name, v) for name, v in zip(names, node.inputs[NUM_REQUIRED:], strict=True) if name != UNUSED]
                set_optional_inputs(node, kept)


# ---------------------------------------------------------------------------------------------- reading a node


def _read(node: ir.Node, analysis: Analysis, opset: int, full_rows: bool) -> _Call | str:
    """The form of one node, or why nothing can stand in for it."""
    roles = _roles(node, analysis)
    if isinstance(roles, str):
        return roles
    if why := _unsupported(node, roles, analysis, opset):
        return why
    rotary = _rotary(node, roles, analysis)
    if isinstance(rotary, str):
        return rotary
    dtype = analysis.dtype(node.inputs[0])
    assert dtype is not None
    left, right = (node.attributes.get_int(f"{side}_window_size", -1) for side in ("left", "right"))
    windows = left >= 0 or right >= 0 or node.attributes.get_int("is_causal", 0) == 1
    writes = node.attributes.get_string("cache", "append") == "write"
    alignment = node.attributes.get_string("alignment", "onnx")
    if alignment == "onnx" and "nonpad_kv_seqlen" not in roles and not writes:
        alignment = "top_left"  # the same, then
    form = Form(
        layouts=layouts_of(node),
        inputs=tuple(roles),
        outputs=tuple(optional_outputs(node)),
        alignment=alignment if windows or "alibi_slopes" in roles else "",
        empty_row=""
        if "empty_row_value" not in roles and (full_rows or rows_see_a_key(roles, windows, left, alignment))
        else node.attributes.get_string("empty_row", "zero"),
        packed="packed_columns" in node.attributes,
        windows=windows,
        softcap=node.attributes.get_float("softcap", 0.0) != 0,
        float8=dtype is ir.DataType.FLOAT8E4M3FN,
        rotary=rotary,
        writes=writes,
        cache_layout=Layout(node.attributes.get_string("cache_layout", "BHSD")),
        numbers=numbers_of(node) if opset < READS_ATTRIBUTES else (),
        heads=_heads(node, analysis) if opset < FIRST_OPSET["Range"] else None,
    )
    return _Call(node, form, output_dtype(dtype, node.attributes.get_string("output_dtype", "")))


def _roles(node: ir.Node, analysis: Analysis) -> list[str] | str:
    """The words of the optional inputs, a mask that is added being a float_mask; or why nothing can stand in."""
    roles = []
    for name, value in zip(optional_inputs(node), node.inputs[NUM_REQUIRED:], strict=True):
        dtype = analysis.dtype(value)
        if name == "attn_mask" and dtype is None:
            return "the type of its mask isn't known"
        roles.append("float_mask" if name == "attn_mask" and dtype is not ir.DataType.BOOL else name)
    if not set(roles) <= SUPPORTED:
        return f"nothing stands in for the input {sorted(set(roles) - SUPPORTED)[0]}"
    return roles


def _unsupported(node: ir.Node, roles: Sequence[str], analysis: Analysis, opset: int) -> str:
    """Why nothing can stand in for a node with such a cache, or of such a type; "" where something can."""
    cache = node.attributes.get_string("cache", "append")
    if cache not in ("append", "write") or (cache == "write" and opset < WRITES_OPSET):
        return f"nothing stands in for cache = {cache}"
    dtype = analysis.dtype(node.inputs[0])
    if dtype is None:
        return "the type of its query isn't known"
    float8 = dtype is ir.DataType.FLOAT8E4M3FN
    if float8 and opset < FLOAT8_OPSET:
        return f"the model's opset is {opset}; the stand-in for float8 needs {FLOAT8_OPSET}"
    if float8 and ("past_key" in roles or set(optional_outputs(node)) - {"lse"}):
        return "nothing stands in for a past or present of float8"
    if "past_key" in roles and analysis.dtype(node.inputs[NUM_REQUIRED + roles.index("past_key")]) not in (dtype, None):
        return "nothing stands in for a quantized cache"
    return ""


def _rotary(node: ir.Node, roles: Sequence[str], analysis: Analysis) -> Rotary | None | str:
    """What is the same for all rows of a rotary embedding, or why nothing can stand in for it."""
    if "cos_cache" not in roles:
        return None
    table = analysis.shape(operand(node, NUM_REQUIRED + roles.index("cos_cache")))
    if table is None or (len(table) == 2 and "position_ids" not in roles):
        return "nothing stands in for a rotary embedding without position_ids"
    pairs = node.attributes.get_int("rotary_dim", 0) // 2 or table[-1].const
    if pairs is None:
        return "the number of columns that its rotary embedding turns isn't known"
    return Rotary(pairs, node.attributes.get_int("rotary_interleaved", 0) == 1, by_row=len(table) == 3)


def _heads(node: ir.Node, analysis: Analysis) -> tuple[int, int] | None:
    """The numbers of query and key heads, where they are known."""
    layouts = layouts_of(node)

    def count(position: int, name: str) -> int | None:
        shape, layout = analysis.shape(operand(node, position)), layouts[position]
        axis = None if shape is None or layout is Layout.BSH else shape[layout.index("H")].const
        return node.attributes.get_int(name, 0) or axis

    query, key = count(0, "q_num_heads"), count(1, "kv_num_heads")
    return None if query is None or key is None else (query, key)


def rows_see_a_key(roles: Collection[str], windows: bool, left: int, alignment: str) -> bool:
    """Does the word empty_row not matter? Without masks every row sees a key, in causal attention at least the first,
    unless its rows are aligned with the last keys and there may be more rows than keys."""
    hides = {"attn_mask", "float_mask", "attn_bias", "nonpad_kv_seqlen", "query_offset"} & set(roles)
    return not hides and (not windows or (left < 0 and alignment != "bottom_right"))


# ---------------------------------------------------------------------------------------------- making nodes alike


def _key(call: _Call, *, words: bool) -> tuple:
    form = call.form
    fixed = tuple(sorted(set(form.inputs) - set(NEUTRAL)))
    shapes = (form.layouts, fixed, form.outputs, form.packed, form.heads, form.cache_layout)
    numbers = (form.float8, call.dtype, form.numbers, form.rotary, form.writes)
    return (*shapes, *numbers, *((form.alignment, form.empty_row) if words else ()))


def _grouped(calls: list[_Call]) -> list[list[_Call]]:
    """Calls that one function can serve: those with decided words first, the others join where they fit."""
    groups: list[list[_Call]] = []
    for call in sorted(calls, key=lambda c: (c.form.alignment == "") + (c.form.empty_row == "")):
        home = next((g for g in groups if _key(g[0], words=False) == _key(call, words=False) and _agree(g, call)), None)
        if home is None:
            groups.append([call])
        else:
            home.append(call)
    return groups


def _agree(group: list[_Call], call: _Call) -> bool:
    for word in ("alignment", "empty_row"):
        decided = {getattr(c.form, word) for c in (*group, call)} - {""}
        if len(decided) > 1:
            return False
    return True


def _united(group: list[_Call]) -> Form:
    """The form that serves all calls of a group: the inputs that any of them has, in the order of NEUTRAL."""
    roles = {role for call in group for role in call.form.inputs}
    order = [
        *(r for r in PLACED if r in roles),
        *(r for r in NEUTRAL if r in roles),
    ]
    return dataclasses.replace(
        group[0].form,
        inputs=tuple(order),
        alignment=next((c.form.alignment for c in group if c.form.alignment), "top_left"),
        empty_row=next((c.form.empty_row for c in group if c.form.empty_row), ""),
        windows=any(c.form.windows for c in group),
        softcap=any(c.form.softcap for c in group),
    )


def _align(call: _Call, form: Form) -> None:
    """Puts a node's inputs into the places of `form`; a neutral constant stands where it has none."""
    node, given = call.node, dict(zip(call.form.inputs, call.node.inputs[NUM_REQUIRED:], strict=True))
    if tuple(given) == form.inputs:
        return
    placed: list[tuple[str, ir.Value | None]] = []
    for role in form.inputs:
        if role in given:
            placed.append(("attn_mask" if role == "float_mask" else role, given[role]))
        else:
            placed.append((UNUSED, _neutral(node, role)))
    set_optional_inputs(node, placed)


def _neutral(node: ir.Node, role: str) -> ir.Value:
    """A constant in front of the node."""
    name = f"{node.name}_no_{role}"
    tensor = ir.tensor(NEUTRAL[role], name=name)
    constant = ir.node("Constant", [], {"value": tensor}, name=name, outputs=[ir.Value(name=name)])
    assert node.graph is not None
    node.graph.insert_before(node, constant)
    return constant.outputs[0]


def _refuse_older(model: ir.Model, opset: int) -> None:
    """An onnxruntime that takes the last function for all overloads finds one that it can't load, instead of a wrong
    one."""
    model.ir_version = max(model.ir_version, OVERLOADS_IR_VERSION)
    inputs = [ir.Value(name=name) for name in ("query", "key", "value")]
    failing = ir.node(LAST_OVERLOAD, inputs, domain=f"{DOMAIN}.fallback", outputs=[ir.Value(name="output")])
    imports = {"": opset, f"{DOMAIN}.fallback": 1}
    graph = ir.Graph(inputs, failing.outputs, nodes=[failing], opset_imports=imports, name=OP_TYPE)
    made = ir.Function(DOMAIN, OP_TYPE, LAST_OVERLOAD, graph=graph, attributes=[])
    model.functions[made.identifier()] = made
