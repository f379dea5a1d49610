# SPDX-License-Identifier: Apache-2.0
"""The stand-in functions of a rewritten model: under another name, so that they run although the library is loaded
(called by side_by_side.py), or in the place of the nodes, for a runtime without the operator (called by build.py)."""

from __future__ import annotations

import pathlib

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from faexport.errors import ModelError
from faexport.graph.nodes import all_nodes
from faexport.spec import DOMAIN, OP_TYPE

STAND_IN_DOMAIN = f"{DOMAIN}.stand_in"


def has_function(model: ir.Model, node: ir.Node) -> bool:
    """Does the model carry a function for this fused node?"""
    return node.op_identifier() in model.functions


def redirect(node: ir.Node) -> None:
    """Makes a fused node call the function; other nodes stay."""
    if node.domain == DOMAIN:
        node.op_type, node.domain, node.overload = _name(node.op_type, node.overload), STAND_IN_DOMAIN, ""


def add_functions(target: ir.Model, source: ir.Model) -> None:
    """Copies the functions of `source` into `target`; `source` is unchanged."""
    for (domain, name, overload), function in source.functions.items():
        if domain != DOMAIN:
            continue
        made = ir.serde.deserialize_function(ir.serde.serialize_function(function))
        made.domain, made.name, made.overload = STAND_IN_DOMAIN, _name(name, overload), ""
        target.functions[made.identifier()] = made
        target.opset_imports[STAND_IN_DOMAIN] = 1


def inline(model: ir.Model, path: pathlib.Path) -> None:
    """Puts the bodies of functions in the place of the nodes that call them, those of the operator among them.

    Raises ModelError where a node of the operator has no function; `path` is what the error calls the model.
    """
    nodes = [node for node in all_nodes(model) if node.domain == DOMAIN]
    if missing := sum(not has_function(model, node) for node in nodes):
        raise ModelError(
            f"{path}: has no stand-in of standard operators for {missing} of its {len(nodes)} {OP_TYPE} nodes; "
            "use the model that it was made from"
        )
    InlinePass()(model)
    model.opset_imports.pop(DOMAIN, None)


def _name(op_type: str, overload: str) -> str:
    return f"{op_type}_{overload}" if overload else op_type
