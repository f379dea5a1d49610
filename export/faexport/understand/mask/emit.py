# SPDX-License-Identifier: Apache-2.0
"""Graph values for index expressions: an existing value where one is exactly that, else new nodes in the cheapest
shape.

A value for an expression of (b, h, i, j) has rank 4 and size 1 on the axes that the expression doesn't depend on, so a
padding mask is [B, 1, 1, S_kv]. Values are remembered by expression: sites of one graph share them. Called by proof.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr
from faexport.understand.index import logic as il
from faexport.understand.index.interpreter import Interpreter
from faexport.understand.index.tensor import Tensor, Unknown, broadcast_index
from faexport.understand.mask.nodes import Nodes
from faexport.understand.mask.site import Site

_AXES = "bhij"
_MAX_SEARCH = 600  # values of a mask subgraph that are compared with an expression


class Emitter:
    """Makes values for the sites of one graph whose scores have the same sizes."""

    def __init__(self, ctx: Interpreter, graph: ir.Graph | ir.Function, nodes: Nodes):
        self.ctx, self.graph = ctx, graph
        self.made = nodes
        self.node, self.constant, self.nodes = nodes.node, nodes.constant, nodes.nodes
        self._cache: dict[tuple, ir.Value] = {}

    # ------------------------------------------------------------------------------------------ existing values

    def find(self, site: Site, expr: Expr) -> ir.Value | None:
        """A value in the site's mask whose elements are `expr`, of rank 4; the one with the fewest axes."""
        wanted = ia.variables(expr)
        best: tuple[int, ir.Value, tuple[int, ...], tuple[int, ...]] | None = None
        for value in self._below(site.roots):
            tensor = self.ctx.known(value)
            if tensor is None or tensor.rank < len(wanted) or tensor.kind != expr.kind:
                continue
            ones = [k for k, size in enumerate(tensor.shape) if ia.value_of(size) == 1]
            left_out = tuple(ones[: max(0, tensor.rank - 4)])
            rank = tensor.rank - len(left_out)
            axes = self._placed(site, tensor, expr, left_out) if rank <= 4 else None
            if axes is not None and (best is None or rank < best[0]):
                best = (rank, value, axes, left_out)
        if best is None:
            return None
        _, found, axes, left_out = best
        found = self.node("Squeeze", [found, self.constant(np.asarray(left_out, np.int64))]) if left_out else found
        return self._unsqueezed(found, axes)

    def source(self, site: Site, expr: Expr) -> ir.Node | None:
        """The first node (nearest to the inputs) whose elements are `expr`, whatever its shape."""
        found = None
        for value in self._below(site.roots):
            tensor = self.ctx.known(value)
            if tensor is not None and value.producer() is not None and tensor.rank <= 4 and tensor.kind == expr.kind:
                if site.simplified(tensor.at_right(site.index)) is expr:
                    found = value.producer()
        return found

    def _placed(self, site: Site, tensor: Tensor, expr: Expr, left_out: tuple[int, ...] = ()) -> tuple[int, ...] | None:
        """Which of (b, h, i, j) the axes of `tensor` are, in order, if its elements are then `expr`. Axes of size 1 may
        be left out."""
        needed = [k for k, name in enumerate(_AXES) if name in ia.variables(expr)]
        sizes = [size for k, size in enumerate(tensor.shape) if k not in left_out]
        for axes in itertools.combinations(range(4), len(sizes)):
            if not set(needed) <= set(axes):
                continue
            places = (self._index_at(site, size, k, k in needed) for size, k in zip(sizes, axes, strict=True))
            index = [place for place in places if place is not None]
            if len(index) < len(sizes):
                continue
            for k in left_out:
                index.insert(k, ia.ZERO)
            if site.simplified(tensor.at(tuple(index))) is expr:
                return axes
        return None

    @staticmethod
    def _index_at(site: Site, size: Expr, axis: int, needed: bool) -> Expr | None:
        """Where an axis of a tensor is read that is to be the site's axis; None where it can't be."""
        if ia.value_of(size) == 1:
            return ia.ZERO
        if not needed or not site.is_broadcast("BHST"[axis], size):
            return None
        return broadcast_index(site.index[axis], site.simplified(size))

    def _below(self, roots: Sequence[ir.Value]) -> Iterator[ir.Value]:
        """The values that the roots are computed from, roots first, up to the first that nothing is known of."""
        seen: dict[ir.Value, None] = dict.fromkeys(roots)
        queue = list(seen)
        for value in queue:
            yield value
            node = value.producer()
            if node is None or self.ctx.is_opaque(value) or len(seen) > _MAX_SEARCH:
                continue
            for v in node.inputs:
                if v is not None and v not in seen:
                    seen[v] = None
                    queue.append(v)

    def _unsqueezed(self, value: ir.Value, axes: tuple[int, ...]) -> ir.Value:
        missing = [k for k in range(4) if k not in axes]
        return self.node("Unsqueeze", [value, self.constant(np.asarray(missing, np.int64))]) if missing else value

    def with_axes(self, site: Site, value: ir.Value) -> ir.Value:
        """The value itself, or with an axis where it has none: the operator's masks have one at least."""
        return value if site.tensors[value].rank else self.node("Reshape", [value, self.constant([1])])

    # ------------------------------------------------------------------------------------------ new values

    def emit(self, site: Site, expr: Expr) -> ir.Value:
        """New nodes that compute `expr`, rank 4; parts that can't be written are taken from the graph. Raises
        Unknown."""
        key = ("expr", expr, site.index)
        if key not in self._cache:
            try:
                self._cache[key] = self._emit(site, expr)
            except Unknown:
                self._cache[key] = self._borrow(site, expr)
        return self._cache[key]

    def _borrow(self, site: Site, expr: Expr) -> ir.Value:
        found = self.find(site, expr)
        if found is not None:
            is_other = expr.kind == "int" and self.ctx.analysis.dtype(found) is not ir.DataType.INT64
            return self.node("Cast", [found], {"to": int(ir.DataType.INT64)}) if is_other else found
        opposite = self.find(site, il.negate(expr)) if expr.kind == "bool" else None
        if opposite is None:
            raise Unknown
        return self.node("Not", [opposite])

    def _emit(self, site: Site, e: Expr) -> ir.Value:
        if e.op == "poly":
            return self._emit_poly(site, e)
        if e.op in ("true", "false", "float"):
            return self._emit_constant(e)
        if e.op == "load":
            return self._emit_load(site, e)
        if e.op == "var":
            line = self.arange(self.size(site.sizes["BHST"[_AXES.index(e.args[0])]]))
            return self._unsqueezed(line, (_AXES.index(e.args[0]),))
        if e.op == "sym":
            return self.node("Reshape", [self.size((ia.of_atom(e),)), self.constant(np.ones(4, np.int64))])
        if e.op == "not":
            return self._emit_not(site, e.args[0])
        if e.op in ("and", "or"):
            return self._fold(
                {"and": "And", "or": "Or"}[e.op], [self.emit(site, a) for a in self._cheapest_first(e.args)]
            )
        if e.op in ("ge0", "eq0"):
            zero = self.constant(np.zeros((1, 1, 1, 1), np.int64))
            return self.node("GreaterOrEqual" if e.op == "ge0" else "Equal", [self.emit(site, e.args[0]), zero])
        if e.op == "choose":
            return self.node("Where", [self.emit(site, a) for a in e.args])
        if e.op in ("min", "max", "abs", "floordiv"):
            name = {"min": "Min", "max": "Max", "abs": "Abs", "floordiv": "Div"}[e.op]
            if e.op == "floordiv" and not ia.is_nonnegative(e.args[0]):
                raise Unknown
            values = [self.emit(site, a) for a in e.args]
            if e.op == "floordiv" and ia.value_of(e.args[1]) is None and ia.is_nonnegative(e.args[1]):
                # A size may be 0. The tensor that is indexed has no elements then, yet the index is computed.
                values[1] = self.made.extreme("Max", [values[1], self.constant(np.ones((1, 1, 1, 1), np.int64))])
            return self.made.extreme(name, values) if name in ("Min", "Max") else self.node(name, values)
        if e.op == "cast":
            return self.node("Cast", [self.emit(site, e.args[0])], {"to": int(e.args[1])})
        if e.op == "fop":
            return self.node(e.args[0], [self.emit(site, a) for a in e.args[2:]])
        raise Unknown

    @staticmethod
    def _cheapest_first(parts: Sequence[Expr]) -> list[Expr]:
        return sorted(parts, key=lambda p: (len(ia.variables(p)), p.serial))

    def _fold(self, op_type: str, values: Sequence[ir.Value]) -> ir.Value:
        result = values[0]
        for v in values[1:]:
            result = self.node(op_type, [result, v])
        return result

    def _emit_constant(self, e: Expr) -> ir.Value:
        if e.op == "float":
            array = np.full((1, 1, 1, 1), float(e.args[0])).astype(e.args[1].numpy())
        else:
            array = np.full((1, 1, 1, 1), e is il.TRUE)
        return self.constant(array)

    def _emit_not(self, site: Site, inner: Expr) -> ir.Value:
        atom = ia.only_atom(inner.args[0]) if inner.op == "eq0" else None
        if atom is not None and atom.op == "load":
            return self._emit_load(site, atom, cast=ir.DataType.BOOL)
        return self.node("Not", [self.emit(site, inner)])

    def _emit_poly(self, site: Site, e: Expr) -> ir.Value:
        known = ia.value_of(e)
        if known is not None:
            return self.constant(np.full((1, 1, 1, 1), known, np.int64))
        terms = []
        for m, c in e.args:
            factors = [self.emit(site, a) for a in m]
            if c != 1 or not m:
                factors.append(self.constant(np.full((1, 1, 1, 1), c, np.int64)))
            terms.append(self._fold("Mul", factors))
        return self._fold("Add", terms)

    def _emit_load(self, site: Site, e: Expr, cast: ir.DataType | None = None) -> ir.Value:
        """value[index]: axes that are plain variables stay, a constant index or one of a single variable becomes a
        Gather."""
        value, index = e.args
        shape = self.ctx.tensor(value).shape
        if e.kind == "int" and cast is None:
            cast = ir.DataType.INT64
        result = self.node("Cast", [value], {"to": int(cast)}) if cast is not None and value.dtype != cast else value
        axes: list[str] = []
        for k, x in enumerate(index):
            rank = len(axes) + len(shape) - k
            try:
                result, new = self._place_axis(site, result, len(axes), rank, shape[k], x)
            except Unknown:
                return self._flat_gather(site, e, cast)
            if set(new) & set(axes):
                return self._flat_gather(site, e, cast)
            axes += new
        order = sorted(axes, key=_AXES.index)
        if order != axes:
            result = self.node("Transpose", [result], {"perm": [axes.index(name) for name in order]})
        return self._unsqueezed(result, tuple(_AXES.index(name) for name in order))

    def _flat_gather(self, site: Site, e: Expr, cast: ir.DataType | None) -> ir.Value:
        """value[index] for indices that mix the site's variables, as positions in the flattened tensor."""
        value, index = e.args
        place = ia.ZERO
        for x, size in zip(index, self.ctx.tensor(value).shape, strict=True):
            place = ia.add(ia.mul(place, size), x)
        flat, line = self.node("Reshape", [value, self.constant([-1])]), self.emit(site, place)
        dtype, sizes = self.ctx.analysis.dtype(value), self.ctx.tensor(value).shape
        if dtype is not None:
            flat.dtype = dtype
        if not all(
            ia.is_nonnegative(x) and ia.is_positive(ia.sub(site.simplified(s), x))
            for x, s in zip(index, sizes, strict=True)
        ):
            flat, line = self._with_outside(flat, 0, 1, line)
        result = self.node("Gather", [flat, line])
        return self.node("Cast", [result], {"to": int(cast)}) if cast is not None and value.dtype != cast else result

    def _place_axis(
        self, site: Site, value: ir.Value, at: int, rank: int, size: Expr, x: Expr
    ) -> tuple[ir.Value, list[str]]:
        """Reads axis `at` of `value`, of `rank` axes, at index `x`; the variables that the axis turns into."""
        known = ia.value_of(x)
        if known is not None and ia.value_of(size) == 1:
            return self.node("Squeeze", [value, self.constant([at])]), []
        if known is not None:
            return self.node("Gather", [value, self.constant(np.asarray(known, np.int64))], {"axis": at}), []
        names = ia.variables(x)
        if site.heads is not None and x is ia.add(ia.scale(site.b, site.heads), site.h):
            return self._split_heads(value, at, site.heads), ["b", "h"]
        if len(names) != 1:
            raise Unknown
        name = next(iter(names))
        axis = _AXES.index(name)
        if x is not broadcast_index(site.index[axis], site.simplified(size)) or not self._is_size(site, size, axis, x):
            line = self.node("Reshape", [self.emit(site, x), self.constant([-1])])
            if not (ia.is_nonnegative(x) and ia.is_positive(ia.sub(site.simplified(size), x))):
                value, line = self._with_outside(value, at, rank, line)
            value = self.node("Gather", [value, line], {"axis": at})
        return value, [name]

    def _with_outside(self, value: ir.Value, at: int, rank: int, line: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The value with one more element on an axis, and the indices with that in the place of those that lie outside.
        A choice around what is read there takes something else, as where a mask was padded; yet it has to be read."""
        if self.ctx.opset < (13 if (value.dtype or ir.DataType.BOOL) is ir.DataType.BOOL else 11):  # of Pad
            raise Unknown
        size = self.node("Shape", [value], {"start": at, "end": at + 1})
        pads = [0] * (2 * rank)
        pads[rank + at] = 1
        value = self.node("Pad", [value, self.constant(pads)])
        for outside in (("Less", [line, self.constant([0])]), ("Less", [size, line])):
            line = self.node("Where", [self.node(*outside), size, line])
        return value, line

    @staticmethod
    def _is_size(site: Site, size: Expr, axis: int, x: Expr) -> bool:
        """May an axis of this size, read at `x`, stay as it is? It has the site's size; or the index tells that it may
        be 1, and it is known to be that or the site's size (an axis that was padded afterwards may be shorter)."""
        if site.simplified(size) in site.sizes["BHST"[axis]]:
            return True
        return x is not site.index[axis] and site.is_broadcast("BHST"[axis], size)

    def _split_heads(self, value: ir.Value, at: int, heads: int) -> ir.Value:
        """[… B * H …] as [… B, H …]. NOTE: without -1, which can't be told where a tensor has no elements."""
        sizes = self.node("Shape", [value])
        before = [self.node("Slice", [sizes, self.constant([0]), self.constant([at])])] if at else []
        own = self.node("Slice", [sizes, self.constant([at]), self.constant([at + 1])])
        batch = self.node("Div", [own, self.constant([heads])])
        after = self.node("Slice", [sizes, self.constant([at + 1]), self.constant([8])])
        shape = self.node("Concat", [*before, batch, self.constant([heads]), after], {"axis": 0})
        # A size of 0 copies the one at the same place where there is no `allowzero`; so the new axis has to be there.
        wide = self.node("Unsqueeze", [value, self.constant([at + 1])])
        return self.node("Reshape", [wide, shape])

    # ------------------------------------------------------------------------------------------ sizes

    def arange(self, size: ir.Value) -> ir.Value:
        """0, 1 … up to an int64 [1]."""
        scalar = self.node("Squeeze", [size, self.constant([0])])
        return self.node(
            "Range", [self.constant(np.asarray(0, np.int64)), scalar, self.constant(np.asarray(1, np.int64))]
        )

    def size(self, written: Sequence[Expr]) -> ir.Value:
        """An int64 [1] with a size, given the ways in which it can be written."""
        for expr in written:
            try:
                return self.scalar(expr)
            except Unknown:
                continue
        raise Unknown

    def scalar(self, expr: Expr) -> ir.Value:
        """An int64 [1] with a number made of sizes."""
        known = ia.value_of(expr)
        if known is not None:
            return self.constant([known])
        terms = []
        for m, c in expr.args:
            factors = [self._size(a) for a in m] + ([self.constant([c])] if c != 1 or not m else [])
            terms.append(self._fold("Mul", factors))
        return self._fold("Add", terms)

    def _size(self, atom: Expr) -> ir.Value:
        if atom.op == "floordiv":
            return self._rounded_down(*atom.args)
        if atom.op == "meet":  # of sizes that meet, those are the same that aren't 1
            first, *others = (self.scalar(x) for x in atom.args)
            for other in others:
                is_one = self.node("Equal", [first, self.constant([1])])
                first = self.node("Where", [is_one, other, first])
            return first
        for value in self.graph.inputs if atom.op == "sym" else ():
            for k, s in enumerate(self.ctx.shape(value) or ()):
                if ia.only_atom(s) is atom:
                    return self.node("Shape", [value], {"start": k, "end": k + 1})
        raise Unknown

    def _rounded_down(self, above: Expr, below: Expr) -> ir.Value:
        """A quotient of sizes. Div rounds towards 0, and Mod has the sign of the divisor."""
        dividend, divisor = self.scalar(above), self.scalar(below)
        if ia.value_of(below) is None:  # a size may be 0: nothing has elements then, yet this is computed
            divisor = self.made.extreme("Max", [divisor, self.constant([1])])
        if not ia.is_nonnegative(above):
            if self.ctx.opset < 10:  # without Mod
                raise Unknown
            dividend = self.node("Sub", [dividend, self.node("Mod", [dividend, divisor])])
        return self.node("Div", [dividend, divisor])
