# SPDX-License-Identifier: Apache-2.0
"""The steps that a change of a graph is made of: new nodes get names and a place, a value takes over from another, what
nothing reads any more is removed. Names and order stay stable: new nodes are called after those that they stand for.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from faexport.graph.nodes import graphs_of, outermost_graphs, subgraphs


class Names:
    """Fresh names that no value or node of the model has."""

    def __init__(self, model: ir.Model):
        self.taken: set[str] = set()
        for graph in outermost_graphs(model):
            self._collect(graph)

    def _collect(self, graph: ir.Graph | ir.Function) -> None:
        self.taken.update(v.name for v in graph.inputs if v.name)
        if isinstance(graph, ir.Graph):
            self.taken.update(graph.initializers)
        for node in graph:
            self.taken.add(node.name or "")
            self.taken.update(v.name for v in node.outputs if v.name)
            for body in subgraphs(node):
                self._collect(body)

    def fresh(self, base: str) -> str:
        name, count = base, 0
        while name in self.taken:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name


def name_node(node: ir.Node, base: str, names: Names, keep: bool = False) -> None:
    """Names that nothing else of the model has; `keep`: those that are there are such names already."""
    if not node.name or not keep:
        node.name = names.fresh(node.name or f"{base}_{node.op_type}")
    for i, value in enumerate(node.outputs):
        if not value.name or not keep:
            value.name = names.fresh(value.name or (f"{node.name}_output" if i == 0 else f"{node.name}_output_{i}"))


def insert_in_front(node: ir.Node, made: Sequence[ir.Node], base: str, names: Names) -> None:
    """Names new nodes and puts them in front of one."""
    assert node.graph is not None
    for new in made:
        name_node(new, base, names)
    node.graph.insert_before(node, made)


def take_over(old: ir.Value, new: ir.Value) -> None:
    """`new` takes the place, name and type of `old`; where that was an output of the graph, the graph's interface
    stays."""
    new.shape, new.type = old.shape, old.type
    new.metadata_props.update(old.metadata_props)
    new.doc_string = old.doc_string
    name = old.name
    if name:
        old.name = f"{name}_replaced"
        new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def remove_dead(roots: list[ir.Node | None]) -> None:
    """Removes nodes without users, starting at these and going on with those that fed them; weights that only they
    read go too."""
    pending = [n for n in roots if n is not None]
    while pending:
        node = pending.pop()
        if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue
        inputs = [v for v in node.inputs if v is not None]
        captured = [v for body in subgraphs(node) for inner in body for v in inner.inputs if v is not None]
        node.graph.remove(node, safe=True)
        for value in dict.fromkeys([*inputs, *captured]):
            maker, owner = value.producer(), value.graph
            if maker is not None:
                pending.append(maker)
            elif value.is_initializer() and not (value.uses() or value.is_graph_input() or value.is_graph_output()):
                assert isinstance(owner, ir.Graph) and value.name is not None
                owner.initializers.pop(value.name)


def unread_weights(model: ir.Model) -> set[ir.Value]:
    """Stored tensors that nothing reads, in all graphs of a model."""
    graphs = (graph for graph, _ in graphs_of(model) if isinstance(graph, ir.Graph))
    stored = (value for graph in graphs for value in graph.initializers.values())
    return {v for v in stored if not (v.uses() or v.is_graph_input() or v.is_graph_output())}


def drop_unread_weights(model: ir.Model, kept: set[ir.Value]) -> None:
    """Removes these, but for some: onnxruntime warns of each."""
    for value in unread_weights(model) - kept:
        assert isinstance(value.graph, ir.Graph) and value.name is not None
        value.graph.initializers.pop(value.name)


def drop_drafts(model: ir.Model) -> None:
    """Forgets new nodes that came into no graph, and removes what only they read."""
    roots = []
    for graph, _ in graphs_of(model):
        own = list(graph.initializers.values()) if isinstance(graph, ir.Graph) else []
        for value in [*own, *(v for node in graph for v in node.outputs)]:
            drafts = [use for use in value.uses() if use.node.graph is None]
            for use in drafts:
                use.node.replace_input_with(use.idx, None)
            if drafts and value.producer() is not None:
                roots.append(value.producer())
    remove_dead(roots)
