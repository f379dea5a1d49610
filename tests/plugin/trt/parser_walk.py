# SPDX-License-Identifier: Apache-2.0
"""Walks a rewritten model as TensorRT's ONNX parser does, and asks a real registry of TensorRT for each node's plugin.

Run as a child process (one TensorRT library a process): parser_walk.py MODULE MODEL prints one JSON object a node.
The parser's rules: the plugin's name is the op type; version and namespace come from attributes, by default "1" and "";
only attributes that the creator lists are passed, INT as kINT32, FLOAT as kFLOAT32, STRING as kCHAR with its NUL; an
empty input name is a null tensor; non-empty outputs must be as many as the plugin has.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx

OP_TYPE = "FlashAttention"
IDENTITY = {"plugin_version", "plugin_namespace"}  # attributes which the parser reads itself
KINDS = {
    onnx.AttributeProto.INT: ("INT32", lambda a: np.array([a.i], np.int64)),
    onnx.AttributeProto.INTS: ("INT32", lambda a: np.array(a.ints, np.int64)),
    onnx.AttributeProto.FLOAT: ("FLOAT32", lambda a: np.array([a.f], np.float32)),
    onnx.AttributeProto.STRING: ("CHAR", lambda a: np.frombuffer(a.s + b"\0", np.int8)),
}


@dataclasses.dataclass
class PluginNode:
    """What the parser makes of one node. `fields`: name, TensorRT's field type, values."""

    name: str
    num_outputs: int
    has_empty_input: bool
    fields: list[tuple[str, str, np.ndarray]]
    not_passed: list[str]  # attributes that get lost: not listed, of a type without a field, or too large


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def walk(model: onnx.ModelProto, listed: set[str]) -> Iterator[PluginNode]:
    """The nodes that become FlashAttention plugins; `listed` are the creator's field names."""
    for graph in graphs(model.graph):
        for node in graph.node:
            if node.op_type == OP_TYPE:
                yield _translate(node, listed)


def _translate(node: onnx.NodeProto, listed: set[str]) -> PluginNode:
    fields, lost = [], []
    for attribute in node.attribute:
        if attribute.name in IDENTITY:
            continue
        if attribute.name not in listed or attribute.type not in KINDS:
            lost.append(attribute.name)
            continue
        kind, read = KINDS[attribute.type]
        values = read(attribute)
        if kind == "INT32":
            if (values != values.astype(np.int32)).any():
                lost.append(attribute.name)
            values = values.astype(np.int32)
        fields.append((attribute.name, kind, values))
    num_outputs = sum(bool(name) for name in node.output)
    return PluginNode(node.name, num_outputs, "" in node.input, fields, lost)


def create(trt: Any, creator: Any, node: PluginNode) -> Any:
    """The plugin object, or None where the creator refuses the fields."""
    types = trt.PluginFieldType
    fields = [trt.PluginField(name, values, getattr(types, kind)) for name, kind, values in node.fields]
    return creator.create_plugin(node.name, trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)


def main() -> None:
    import faplugin.trt

    trt = importlib.import_module(sys.argv[1])
    faplugin.trt.register(trt)
    creator = trt.get_plugin_registry().get_creator(OP_TYPE, "1", "")
    listed = {field.name for field in creator.field_names}
    for node in walk(onnx.load(sys.argv[2], load_external_data=False), listed):
        plugin = create(trt, creator, node)
        build = plugin and plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
        row = {
            "node": node.name,
            "created": plugin is not None,
            "plugin_outputs": build.num_outputs if build else None,
            "node_outputs": node.num_outputs,
            "has_empty_input": node.has_empty_input,
            "not_passed": node.not_passed,
            "id": build.timing_cache_id if build else None,
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
