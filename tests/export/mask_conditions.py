# SPDX-License-Identifier: Apache-2.0
"""The conditions of mask_grammar.py's masks, in the spellings of exporters, as nodes of an ONNX graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HEADS, HEAD_DIM, MAX_LENGTH = 2, 8, 32
CAUSAL = (
    "j <= i", "i >= j", "not j > i", "j < i + 1", "i - j >= 0", "trilu", "buffer", "not upper", "float buffer",
    "band buffer", "j <= i + 1", "j <= i - 1",
)  # fmt: skip
WINDOWS = ("j > i - w", "i - j < w", "abs(i - j) <= w", "j <= i + w", "i < j + w")
PADDING = ("unsqueeze", "gather_nd", "flat gather", "not equal 0", "greater half", "int32", "uint8", "rows")
# Masks of which the model only says by what it runs with that they fit the scores: built over rows alone, or from the
# size of another input, so that they are as large as the scores or have size 1; or given by whoever runs the model.
SQUARES = ("causal of rows", "window of rows", "causal of another size", "lengths of rows")
GIVEN = ("one length", "overridable heads", "overridable rows")
OTHERS = ("always", "chunk", "prefix", "input mask", "segments", "lengths", "causal padding")


class Graph:
    """Collects nodes; every method returns the name of a value."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: dict[str, onnx.ValueInfoProto] = {}

    def __call__(self, op_type: str, *inputs: str, **attributes: object) -> str:
        name = f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=f"node_{name}", **attributes))
        return name

    def many(self, op_type: str, count: int, *inputs: str, **attributes: object) -> list[str]:
        """The outputs of a node that has several."""
        name = self(op_type, *inputs, **attributes)
        self.nodes[-1].output[:] = [f"{name}_{k}" for k in range(count)]
        return list(self.nodes[-1].output)

    def const(self, value: object, dtype: type = np.int64) -> str:
        name = f"const_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def input(self, name: str, dtype: int, shape: list[int | str]) -> str:
        self.inputs[name] = helper.make_tensor_value_info(name, dtype, shape)
        return name

    def size(self, value: str, axis: int) -> str:
        return self("Squeeze", self("Shape", value, start=axis, end=axis + 1))

    def arange(self, size: str) -> str:
        return self("Range", self.const(0), size, self.const(1))

    def unsqueeze(self, value: str, *axes: int) -> str:
        return self("Unsqueeze", value, self.const(list(axes)))


class Conditions:
    """Writes the parts of a recipe's mask. Whoever derives from it has made `i` and `j`, and the sizes, before."""

    r: Any  # the Recipe
    g: Graph
    query: str  # [B, H, S, D]
    i: str  # positions of the rows, [1, 1, S, 1]
    j: str  # and of the keys, [1, 1, 1, T]
    length: str  # rows
    past: str  # keys in front of the rows
    total: str  # keys

    def part(self, name: str) -> str:
        if name in CAUSAL:
            return self._causal(name)
        if name in SQUARES:
            return self._square(name)
        if name in GIVEN:
            return self._given(name)
        return self._window(name) if name in WINDOWS else self._padding(name) if name in PADDING else self._other(name)

    def _causal(self, name: str) -> str:
        g, i, j = self.g, self.i, self.j
        if name in ("trilu", "buffer", "not upper", "float buffer", "band buffer"):
            return self._triangle(name)
        return {
            "j <= i": lambda: g("LessOrEqual", j, i),
            "i >= j": lambda: g("GreaterOrEqual", i, j),
            "not j > i": lambda: g("Not", g("Greater", j, i)),
            "j < i + 1": lambda: g("Less", j, g("Add", i, g.const(1))),
            "i - j >= 0": lambda: g("GreaterOrEqual", g("Sub", i, j), g.const(0)),
            "j <= i + 1": lambda: g("LessOrEqual", j, g("Add", i, g.const(1))),
            "j <= i - 1": lambda: g("LessOrEqual", j, g("Sub", i, g.const(1))),
        }[name]()

    def _triangle(self, name: str) -> str:
        g = self.g
        past, total = (g.unsqueeze(x, 0) for x in (self.past, self.total))
        if name.endswith("buffer"):
            dtype = np.float32 if name == "float buffer" else np.bool_
            triangle = np.tril(np.ones((1, 1, MAX_LENGTH, MAX_LENGTH)))
            band = np.tril(triangle, -self.r.window - 1) if name == "band buffer" else 0  # as GPT-Neo's local layers
            whole = g.const(triangle - band, dtype)
            rows = g("Slice", whole, past, total, g.const([2]))
            square = g("Slice", rows, g.const([0]), total, g.const([3]))
            return square if dtype is np.bool_ else g("Equal", square, g.const(1.0, np.float32))
        shape = g("Concat", g.unsqueeze(self.length, 0), total, axis=0)
        ones = g("Expand", g.const(1.0, np.float32), shape)
        if name == "trilu":
            return g("Equal", g("Trilu", ones, self.past, upper=0), g.const(1.0, np.float32))
        above = g("Trilu", ones, g("Add", self.past, g.const(1)), upper=1)
        return g("Not", g("Cast", above, to=TensorProto.BOOL))

    def _window(self, name: str) -> str:
        g, i, j, w = self.g, self.i, self.j, self.g.const(self.r.window)
        return {
            "j > i - w": lambda: g("Greater", j, g("Sub", i, w)),
            "i - j < w": lambda: g("Less", g("Sub", i, j), w),
            "abs(i - j) <= w": lambda: g("LessOrEqual", g("Abs", g("Sub", i, j)), w),
            "j <= i + w": lambda: g("LessOrEqual", j, g("Add", i, w)),
            "i < j + w": lambda: g("Less", i, g("Add", j, w)),
        }[name]()

    def attention_mask(self) -> str:
        length = "tokens" if self.r.own_sizes else "total" if self.r.cache else "sequence"
        return self.g.input("attention_mask", TensorProto.INT64, ["batch", length])

    def _square(self, name: str) -> str:
        """A condition on rows and as many keys."""
        g = self.g
        count = self.length
        if name == "causal of another size":
            count = g.size(g.input("ids", TensorProto.INT64, ["batch", "tokens"]), 1)
        line = g.arange(count)
        i, j = g.unsqueeze(line, 1), g.unsqueeze(line, 0)
        if name == "window of rows":
            return g("LessOrEqual", g("Abs", g("Sub", i, j)), g.const(self.r.window))
        if name == "lengths of rows":
            lengths = g.input("lengths", TensorProto.INT64, ["batch"])
            return g("Less", g.unsqueeze(line, 0, 1, 2), g.unsqueeze(lengths, 1, 2, 3))
        return g("LessOrEqual", j, i)

    def _given(self, name: str) -> str:
        g = self.g
        if name == "one length":
            size = "entries" if self.r.own_sizes else 1
            return g("Less", self.j, g.unsqueeze(g.input("length", TensorProto.INT64, [size]), 1, 2, 3))
        shape = (1, HEADS, 1, 1) if name == "overridable heads" else (1, 1, 1, 1)
        value = "given_mask_" + name.split()[-1]
        g.initializers.append(numpy_helper.from_array(np.ones(shape, np.bool_), value))
        return g.input(value, TensorProto.BOOL, list(shape))

    def _padding(self, name: str) -> str:
        """From attention_mask [batch, total], int64."""
        g, mask = self.g, self.attention_mask()
        if name in ("int32", "uint8"):  # 2 ** 32 and 256 become 0
            narrow = TensorProto.INT32 if name == "int32" else TensorProto.UINT8
            return g.unsqueeze(g("Cast", g("Cast", mask, to=narrow), to=TensorProto.BOOL), 1, 2)
        flags = g("Cast", mask, to=TensorProto.BOOL)
        batch = g.arange(g.size(self.query, 0))
        if name == "gather_nd":
            rows, columns = g.unsqueeze(batch, 1, 2, 3), self.j
            shape = g("Shape", g("Max", rows, columns))
            pairs = [g.unsqueeze(g("Expand", x, shape), -1) for x in (rows, columns)]
            return g("GatherND", flags, g("Concat", *pairs, axis=-1))
        if name == "flat gather":
            places = g("Add", self.j, g("Mul", g.unsqueeze(batch, 1, 2, 3), g.size(mask, 1)))
            found = g("Gather", g("Reshape", flags, g.const([-1])), places)
            return g("Reshape", g("Reshape", found, g.const([-1])), g("Shape", places))
        if name == "not equal 0":
            return g("Not", g("Equal", g.unsqueeze(mask, 1, 2), g.const(0)))
        if name == "greater half":
            return g("Greater", g.unsqueeze(g("Cast", mask, to=TensorProto.FLOAT), 1, 2), g.const(0.5, np.float32))
        if name == "rows" and not self.r.cache:
            return g.unsqueeze(flags, 1, 3)
        return g.unsqueeze(flags, 1, 2)

    def _other(self, name: str) -> str:
        g, i, j = self.g, self.i, self.j
        if name == "always":
            return g("GreaterOrEqual", i, g.const(0))
        if name == "chunk":
            four = g.const(4)
            return g("Equal", g("Div", i, four), g("Div", j, four))
        if name == "causal padding":
            return g("And", g("LessOrEqual", j, i), self._padding("unsqueeze"))
        if name == "prefix":
            return g("Or", g("LessOrEqual", j, i), g("Less", j, g.const(3)))
        if name == "segments":
            ids = g.input("segments", TensorProto.INT64, ["batch", "total"])
            tail = g("Gather", ids, g("Squeeze", i, g.const([0, 1, 3])), axis=1)
            return g("Equal", g.unsqueeze(tail, 1, 3), g.unsqueeze(ids, 1, 2))
        if name == "lengths":
            return g("Less", j, g.unsqueeze(g.input("lengths", TensorProto.INT64, ["batch"]), 1, 2, 3))
        return g.input("mask", TensorProto.BOOL, ["batch", 1, "sequence", "total"])
