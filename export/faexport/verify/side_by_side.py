# SPDX-License-Identifier: Apache-2.0
"""Puts what the rewritten model computes otherwise beside the original's own computation, in one model. Called by
site_check.py.

Values that have the same name in both models are the same. Where the rewritten model makes one of them by other nodes,
these are copied into the original, at the end of the same graph or body, and read the original's own tensors; a few
nodes compare the result with the original's. So a small error deep in a model shows, a rounding that flips further down
doesn't disturb, and no tensor leaves the runtime. All other nodes are proven to be the original's on the way.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common

from faexport.fallback import stand_in_copy
from faexport.graph.fused import is_fused
from faexport.graph.nodes import dtype_name, maker
from faexport.spec import ALL_KEYS, DIVISORS, LEFT_OUT, ZERO_ROWS
from faexport.understand.shapes.analysis import Analysis
from faexport.verify.all_keys import where_zero
from faexport.verify.recompute import BODIES, DISCRETE, copied, recomputed, unrounded_sources
from faexport.verify.roundings import round_values
from faexport.verify.side_by_side_math import NUM_STATISTICS, Emit, bits_of, settled, statistics

MINIMUM_OPSET = 9  # Where, IsNaN


@dataclasses.dataclass(frozen=True)
class Point:
    """One value that the rewritten model computes otherwise, and the output that tells how it compares."""

    value: str  # its name in both models
    site: str  # name of the fused node behind it, "" if there is none
    dtype: str  # float32, float16, int64, … or "" where unknown
    output: str
    by_stand_in: bool  # the operator's function in standard operators was run, not the library
    quantized: bool = False  # its operands, scores or weights are, in the original
    all_keys: bool = False  # its twin is the original without what that rounds in rows that see no key (all_keys.py)


@dataclasses.dataclass
class SideBySide:
    model: ir.Model
    points: list[Point]
    left_out: list[str]  # a sentence for each value that could not be put beside


class _Cannot(Exception):
    """Why a value can't be put beside the original."""


def build(old: ir.Model, new: ir.Model, *, library: bool, stand_in: bool, twins: bool) -> SideBySide:
    """The model of both.

    Args:
        old: the original, normalized as the pipeline does; it is changed into the result.
        new: the rewritten model; unchanged.
        library, stand_in: run fused nodes by the library, by their function in standard operators, or by both.
        twins: the original's part is computed in float32 as well, and with all of its roundings, to know how far it
            is from that where it rounds to half precision.
    """
    opset = old.opset_imports.get("", 0)
    if opset < MINIMUM_OPSET:
        return SideBySide(old, [], [f"sites of a model of opset {opset} can't be compared by themselves"])
    return _Builder(old, new, library, stand_in, twins).build()


@dataclasses.dataclass
class _Scope:
    """A graph or body of the original, and what its end can see by name."""

    graph: ir.Graph
    visible: Mapping[str, ir.Value]
    copies: dict[tuple[ir.Value, bool], ir.Value] = dataclasses.field(default_factory=dict)
    bad: dict[ir.Value, ir.Value] = dataclasses.field(default_factory=dict)


class _Builder:
    def __init__(self, old: ir.Model, new: ir.Model, library: bool, stand_in: bool, twins: bool):
        self.old, self.new, self.twins = old, new, twins
        self.kinds = [by for by, wanted in ((False, library), (True, stand_in)) if wanted]
        self.points: list[Point] = []
        self.left_out: list[str] = []
        self.initializers: dict[ir.Value, ir.Value] = {}
        self.leaves: dict[ir.Value, None] = {}  # what both sides read
        self._analysis: Analysis | None = None

    def build(self) -> SideBySide:
        dtypes = {v.name: v.dtype for n in self.new.graph.all_nodes() for v in n.outputs if v.dtype is not None}
        self.dtypes = dtypes
        found = self._graph(self.old.graph, self.new.graph, {})
        outputs = [stats for _, stats in found]
        for (point, _), value in zip(found, outputs, strict=True):
            value.name = point.output
            self.points.append(point)
        for value in self.old.graph.outputs:  # onnxruntime would share memory by what a file says, right or wrong
            value.shape = None
        self.old.graph.outputs.clear()
        self.old.graph.outputs.extend(outputs)
        for domain, version in self.new.opset_imports.items():
            self.old.opset_imports.setdefault(domain, version)
        if True in self.kinds:
            stand_in_copy.add_functions(self.old, self.new)
        self.old.ir_version = max(self.old.ir_version, self.new.ir_version, 8)
        round_values(self.leaves, self._dtype)
        if outputs:
            onnx_ir.passes.common.RemoveUnusedNodesPass()(self.old)
        return SideBySide(self.old, self.points, self.left_out)

    # ------------------------------------------------------------------------------------------ finding what changed

    def _graph(self, old: ir.Graph, new: ir.Graph, outer: Mapping[str, ir.Value]) -> list[tuple[Point, ir.Value]]:
        """The points of a graph and its bodies, each with its statistics as a value of `old`."""
        own = {v.name: v for v in (*old.inputs, *old.initializers.values()) if v.name}
        own |= {v.name: v for node in old for v in node.outputs if v.name}
        scope = _Scope(old, {**outer, **own})
        found: list[tuple[Point, ir.Value]] = []
        for node in list(new):
            named = [(v, own[v.name]) for v in node.outputs if v.name and v.name in own]
            if not named:
                continue
            before = named[0][1].producer()
            if before is not None and _same(node, before):
                found += self._bodies(before, node, scope)
                continue
            for value, its in named:
                found += self._beside(value, its, scope)
        return found

    def _bodies(self, old: ir.Node, new: ir.Node, scope: _Scope) -> list[tuple[Point, ir.Value]]:
        found: list[tuple[Point, ir.Value]] = []
        for attribute in list(old.attributes.values()):
            if attribute.type != ir.AttributeType.GRAPH:
                continue
            body = attribute.value
            inner = self._graph(body, new.attributes[attribute.name].value, scope.visible)
            if inner and old.op_type not in ("If", "Loop", "Scan"):
                self.left_out += [f"'{point.value}' lies in a {old.op_type}" for point, _ in inner]
                continue
            found += [(point, _lift(old, body, stats)) for point, stats in inner]
        return found

    def _beside(self, new: ir.Value, old: ir.Value, scope: _Scope) -> list[tuple[Point, ir.Value]]:
        found: list[tuple[Point, ir.Value]] = []
        dtype = self._dtype(old)
        try:
            twin = rounded = None
            all_keys = bool(_named_in(ALL_KEYS, self._site(new, scope)[0], scope))
            if (self.twins or all_keys) and dtype not in DISCRETE:
                twin = self._again(old, new, scope, wide=self.twins, all_keys=True)
            if self.twins and dtype not in DISCRETE:
                rounded = self._again(old, new, scope, rounded=True)
            unquantized = self._unquantized(old, new, scope) if dtype not in DISCRETE else None
            wanted = self._wanted(old, new, scope)
            for by_stand_in in self.kinds:
                site, leaves = self._site(new, scope)
                if by_stand_in and (not site or not stand_in_copy.has_function(self.new, site)):
                    continue
                ours = self._copy(new, scope, by_stand_in)
                emit = Emit(scope.graph, self.old.graph)
                sides = settled(emit, wanted, ours, twin)
                bad = [self._bad(leaf, scope, emit) for leaf in leaves if self._dtype(leaf) not in DISCRETE]
                bad += [emit.count_no_divisor(value) for value in _named_in(DIVISORS, site, scope)]
                floats = None if unquantized is None else (unquantized, old)
                exact, bits = dtype in DISCRETE, bits_of(old)
                stats = statistics(emit, *sides, bad, rounded=rounded, nan=old, exact=exact, bits=bits, floats=floats)
                word = dtype_name(dtype) or ""
                output = f"faexport_check_{len(self.points)}_{len(found)}_{new.name}_{int(by_stand_in)}"
                kind = floats is not None, all_keys and not self.twins
                found.append((Point(new.name or "", _named(site), word, output, by_stand_in, *kind), stats))
                if site is None:
                    break  # the same nodes with and without the library
        except _Cannot as error:
            self.left_out.append(f"'{new.name}' can't be compared by itself: {error}")
        return found

    def _wanted(self, old: ir.Value, new: ir.Value, scope: _Scope) -> ir.Value:
        """What the new value is to be: the original's, without the roundings that the fused node leaves out, and made
        from 0 where rows of the attention that see no key are NaN in the original."""
        site, _ = self._site(new, scope)
        if not _left_out(site, scope) and not _named_in(ZERO_ROWS, site, scope):
            return old
        again = self._again(old, new, scope)
        if again is None and _left_out(site, scope):
            raise _Cannot("the original's can't be computed without the roundings that are left out")
        return again or old

    def _bad(self, leaf: ir.Value, scope: _Scope, emit: Emit) -> ir.Value:
        if leaf not in scope.bad:
            scope.bad[leaf] = emit.count_bad(leaf)
        return scope.bad[leaf]

    def _dtype(self, value: ir.Value) -> ir.DataType | None:
        if value.dtype is not None:
            return value.dtype
        if value.name in self.dtypes:
            return self.dtypes[value.name]
        if self._analysis is None:
            self._analysis = Analysis(self.old)
        return self._analysis.dtype(value)

    # ------------------------------------------------------------------------------------------ copying

    def _site(self, root: ir.Value, scope: _Scope) -> tuple[ir.Node | None, list[ir.Value]]:
        """The fused node nearest to a new value, and the original's values that it is made from."""
        site: ir.Node | None = None
        leaves: dict[ir.Value, None] = {}
        seen, queue = set(), [maker(root)]
        while queue:
            node = queue.pop(0)
            if node in seen:
                continue
            seen.add(node)
            if site is None and is_fused(node):
                site = node
            for value in node.inputs:
                if value is None:
                    continue
                made_by = value.producer()
                if value.name and value.name in scope.visible:
                    leaves[scope.visible[value.name]] = None
                elif made_by is not None:
                    queue.append(made_by)
        self.leaves |= leaves
        return site, list(leaves)

    def _copy(self, root: ir.Value, scope: _Scope, by_stand_in: bool) -> ir.Value:
        """Copies the nodes behind a new value to the end of the scope's graph."""
        stack = [maker(root)]
        while stack:
            node = stack[-1]
            if (node.outputs[0], by_stand_in) in scope.copies:
                stack.pop()
                continue
            new = [v for v in node.inputs if v is not None and v.name not in scope.visible]
            made_by = [n for v in new if (n := v.producer()) is not None]
            waiting = [n for n in made_by if (n.outputs[0], by_stand_in) not in scope.copies]
            if waiting:
                stack += waiting
                continue
            stack.pop()
            inputs = [self._input(v, scope, by_stand_in) for v in node.inputs]
            copy = _copied(node, inputs)
            if by_stand_in:
                stand_in_copy.redirect(copy)
            scope.graph.append(copy)
            for mine, its in zip(node.outputs, copy.outputs, strict=True):
                scope.copies[mine, by_stand_in] = its
        return scope.copies[root, by_stand_in]

    def _input(self, value: ir.Value | None, scope: _Scope, by_stand_in: bool) -> ir.Value | None:
        if value is None:
            return None
        if value.name and value.name in scope.visible:
            return scope.visible[value.name]
        if value.producer() is not None:
            return scope.copies[value, by_stand_in]
        if value.const_value is None:
            raise _Cannot(f"it reads '{value.name}', which the original doesn't have")
        if value not in self.initializers:
            tensor = ir.tensor(value.const_value.numpy(), dtype=value.const_value.dtype)
            self.initializers[value] = Emit(scope.graph, self.old.graph).constant(tensor)
        return self.initializers[value]

    # ------------------------------------------------------------------------------------------ in float32

    def _again(
        self,
        old: ir.Value,
        new: ir.Value,
        scope: _Scope,
        *,
        wide: bool = False,
        rounded: bool = False,
        all_keys: bool = False,
    ) -> ir.Value | None:
        """The original's value from the tensors that the new nodes read, without what these leave out; None where it
        can't be computed again. `all_keys`: by lengths of all keys where the new nodes read them so."""
        site, leaves = self._site(new, scope)
        without, zero = _left_out(site, scope), _named_in(ZERO_ROWS, site, scope)
        emit = Emit(scope.graph, self.old.graph)
        lengths = _named_in(ALL_KEYS, site, scope) if all_keys else set()
        instead = {value: where_zero(value, emit) for value in lengths}
        how = {"wide": wide, "rounded": rounded}
        return recomputed(old, leaves, emit, self._dtype, without=without, zero_for_nan=zero, instead=instead, **how)

    def _unquantized(self, old: ir.Value, new: ir.Value, scope: _Scope) -> ir.Value | None:
        """The original's value in float32 without any rounding of its operands, scores and weights; None where nothing
        is rounded there."""
        site, leaves = self._site(new, scope)
        if site is None:
            return None
        sources, roundings = unrounded_sources(leaves)
        roundings |= _left_out(site, scope)
        if not roundings:
            return None
        return recomputed(old, sources, Emit(scope.graph, self.old.graph), self._dtype, without=roundings, wide=True)


def _left_out(site: ir.Node | None, scope: _Scope) -> set[ir.Value]:
    """Outputs of the original's DequantizeLinear in whose place a fused node has what was quantized."""
    return _named_in(LEFT_OUT, site, scope)


def _named_in(entry: str, site: ir.Node | None, scope: _Scope) -> set[ir.Value]:
    """The original's values that an entry of a fused node's metadata names."""
    names = json.loads(site.metadata_props.get(entry, "[]")) if site is not None else []
    return {scope.visible[name] for name in names if name in scope.visible}


def _named(site: ir.Node | None) -> str:
    return "" if site is None else site.name or site.outputs[0].name or "?"


def _copied(node: ir.Node, inputs: list[ir.Value | None]) -> ir.Node:
    if any(a.type in BODIES for a in node.attributes.values()):
        raise _Cannot(f"the {node.op_type} '{node.name}' has a body")
    return copied(node, inputs)


def _same(new: ir.Node, old: ir.Node) -> bool:
    """Are two nodes of both models the same, bodies aside?"""
    if new.op_identifier() != old.op_identifier() or new.attributes.keys() != old.attributes.keys():
        return False
    for mine, its in ((new.inputs, old.inputs), (new.outputs, old.outputs)):
        if [v and v.name for v in mine] != [v and v.name for v in its]:
            return False
    return all(_same_attribute(new.attributes[name], old.attributes[name]) for name in new.attributes)


def _same_attribute(new: ir.Attr, old: ir.Attr) -> bool:
    if new.type != old.type or new.is_ref() != old.is_ref():
        return False
    if new.is_ref():
        return new.ref_attr_name == old.ref_attr_name
    if new.type == ir.AttributeType.GRAPH:
        sides = ((new.value.inputs, old.value.inputs), (new.value.outputs, old.value.outputs))
        return all([v.name for v in mine] == [v.name for v in its] for mine, its in sides)
    if new.type == ir.AttributeType.TENSOR:
        return same_tensor(new.value, old.value)
    return new.type in _COMPARABLE and new.value == old.value


_COMPARABLE = {
    ir.AttributeType.INT, ir.AttributeType.INTS, ir.AttributeType.FLOAT, ir.AttributeType.FLOATS,
    ir.AttributeType.STRING, ir.AttributeType.STRINGS,
}  # fmt: skip


def same_tensor(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    """Bit for bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype == ir.DataType.STRING:
        return np.array_equal(a.numpy(), b.numpy())
    return a.tobytes() == b.tobytes()


def _lift(owner: ir.Node, body: ir.Graph, stats: ir.Value) -> ir.Value:
    """The statistics of a body as an output of the node that has the body."""
    body.outputs.append(stats)
    for attribute in owner.attributes.values():
        if owner.op_type == "If" and attribute.value is not body:
            other: ir.Graph = attribute.value
            nothing = ir.node("Constant", [], {"value": ir.tensor(np.zeros(NUM_STATISTICS, np.float32))})
            other.append(nothing)
            Emit(other, other).name(nothing)
            other.outputs.append(nothing.outputs[0])
    owner.resize_outputs(len(owner.outputs) + 1)
    output = owner.outputs[-1]
    output.name = f"{stats.name}_of_{owner.outputs[0].name}"
    output.type = ir.TensorType(ir.DataType.FLOAT)
    return output
