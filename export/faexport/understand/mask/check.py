# SPDX-License-Identifier: Apache-2.0
"""Checks a proof by evaluation: runs the nodes of the mask on small random inputs and compares with what was proven.

Called by proof.py once per different mask of a graph. The model's own nodes run in onnx's reference implementation, cut
off at what the index algebra knows nothing of; random values stand in there. Sizes at which nothing runs aren't judged.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from faexport import spec
from faexport.understand.index import algebra as ia
from faexport.understand.index.interpreter import Interpreter
from faexport.understand.index.tensor import kind_of
from faexport.understand.mask.options import MaskOptions
from faexport.understand.mask.softmax import Skip, highest, original, proven
from faexport.understand.mask.terms import MASKING, Site

_PLANS = ((2, 5, 3), (3, 7, 0), (1, 4, 9))  # batch, sequence, past: what symbols are bound to, by their names
_TOLERANCE = {ir.DataType.FLOAT16: 2e-2, ir.DataType.BFLOAT16: 1e-1}  # of a probability; else 5e-3
_MAX_ELEMENTS = 1 << 22


class Checker:
    """Remembers which masks of a graph were checked."""

    def __init__(self, ctx: Interpreter):
        self.ctx = ctx
        self._done: dict[tuple, str] = {}

    def check(
        self, key: tuple, site: Site, terms: Sequence[spec.MaskTerm], mask: spec.Mask, options: MaskOptions
    ) -> str:
        """ "" where all evaluations agree (or none was possible), else what differs; made once for a key."""
        if key not in self._done:
            try:
                self._done[key] = self._check(site, terms, mask, options)
            except Skip:
                self._done[key] = ""
        return self._done[key]

    def _check(self, site: Site, terms: Sequence[spec.MaskTerm], mask: spec.Mask, options: MaskOptions) -> str:
        trial = _Trial(self.ctx, site, terms, mask, options.assume_full_rows)
        random = np.random.default_rng(0)
        for plan in _PLANS:
            difference = trial.try_plan(plan, random, options.assume_right_padding)
            if not difference <= _TOLERANCE.get(site.scores.dtype, 5e-3):
                return f"a probability differs by {difference:.3g}"
        return ""


def _in_order(nodes: set[ir.Node], known: set[ir.Value]) -> list[ir.Node]:
    """Producers first."""
    result: list[ir.Node] = []
    placed: set[ir.Node] = set()
    for first in sorted(nodes, key=lambda n: n.outputs[0].name or ""):
        stack = [first]
        while stack:
            node = stack[-1]
            producers = [v.producer() for v in node.inputs if v is not None and v not in known]
            waiting = [p for p in producers if p in nodes and p not in placed]
            stack += waiting
            if not waiting:
                stack.pop()
                if node not in placed:
                    placed.add(node)
                    result.append(node)
    return result


class _Trial:
    """The subgraph that computes the terms and the values of the proven mask, ready to run."""

    def __init__(self, ctx: Interpreter, site: Site, terms: Sequence[spec.MaskTerm], mask: spec.Mask, full_rows: bool):
        self.full_rows = full_rows  # rows without a visible key aren't judged
        self.ctx, self.site, self.terms, self.mask = ctx, site, terms, mask
        self.outputs = list(dict.fromkeys([*site.roots, *mask.values]))
        self.leaves: dict[ir.Value, bool] = {}  # what is fed: True where only its shape matters
        self.nodes: list[ir.Node] = []
        self._collect()
        self._evaluator = self._build()

    def _collect(self) -> None:
        """The nodes behind the outputs, producers first."""
        made = {v for n in self.mask.new_nodes for v in n.outputs}
        stack, seen, found, shapes_of = list(self.outputs), set(), set(), set()
        while stack:
            value = stack.pop()
            node = value.producer()
            if value in seen or (node is None and value.const_value is not None):
                continue
            seen.add(value)
            if node is None or (value not in made and self.ctx.is_opaque(value)):
                self.leaves[value] = False
                continue
            found.add(node)
            if node.op_type == "Shape":
                shapes_of.add(node.inputs[0])
            else:
                stack += [v for v in node.inputs if v is not None]
        self.leaves.update({v: True for v in shapes_of if v not in seen})
        if any(self.ctx.known(v) is None for v in self.leaves):
            raise Skip
        self.nodes = _in_order(found, set(self.leaves))

    def _build(self) -> ReferenceEvaluator:
        model = onnx.ModelProto(ir_version=10)
        model.opset_import.append(onnx.helper.make_opsetid("", self.ctx.opset))
        model.graph.node.extend(ir.to_proto(n) for n in self.nodes)
        inner = {v for n in self.nodes for v in n.outputs}
        used = {v for n in self.nodes for v in n.inputs if v is not None} | set(self.outputs)
        for value in used - inner - set(self.leaves):
            if value.const_value is None:
                raise Skip
            model.graph.initializer.append(onnx.numpy_helper.from_array(value.const_value.numpy(), value.name))
        for value in self.leaves:
            dtype = self._dtype(value)
            model.graph.input.append(onnx.helper.make_tensor_value_info(value.name, int(dtype), None))
        model.graph.output.extend(onnx.ValueInfoProto(name=v.name) for v in self.outputs)
        return ReferenceEvaluator(model)

    def _dtype(self, value: ir.Value) -> ir.DataType:
        return value.dtype or self.ctx.tensor(value).dtype or ir.DataType.FLOAT

    # ------------------------------------------------------------------------------------------ one evaluation

    def try_plan(self, plan: tuple[int, int, int], random: np.random.Generator, right_padding: bool) -> float:
        """As run; 0 where the model runs at none of the sizes tried."""
        for whole in (False, True):
            try:
                return self.run(self._bind(plan, whole), random, right_padding)
            except Skip:
                continue
        return 0.0

    def run(self, sizes: dict[ia.Expr, int], random: np.random.Generator, right_padding: bool) -> float:
        """The largest difference between the model's probabilities and the proven ones, at these sizes."""
        feeds = {
            v.name: self._draw(v, only_shape, sizes, random, right_padding) for v, only_shape in self.leaves.items()
        }
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                results = self._evaluator.run(None, feeds)
        except Exception as error:  # whatever a reference implementation raises for sizes that don't fit
            raise Skip from error
        arrays = {v: np.asarray(x) for v, x in zip(self.outputs, results, strict=True)}
        shape = tuple(self._number(self.site.sizes[letter][0], sizes) for letter in "BHST")
        if np.prod(shape) > _MAX_ELEMENTS or not np.prod(shape):
            raise Skip
        scores = random.uniform(-3, 3, shape)
        sinks = random.uniform(-3, 3, (1, shape[1], 1, 1)) if self.site.scores.sinks else None
        try:
            want = original(self.site, self.terms, arrays, scores, self.mask, sinks)
        except ValueError as error:  # numpy's: these sizes don't fit each other
            raise Skip from error
        try:
            difference = np.abs(want - proven(self.mask, arrays, scores, sinks))
        except ValueError:
            return math.inf
        if self.full_rows:
            difference = difference[highest(self.site, self.terms, arrays, scores) > MASKING / 2]
        return float(difference.max(initial=0.0))

    def _number(self, size: ia.Expr, sizes: dict[ia.Expr, int]) -> int:
        try:
            return ia.evaluate(size, sizes)
        except (KeyError, ZeroDivisionError):
            raise Skip from None

    def _bind(self, plan: tuple[int, int, int], whole: bool) -> dict[ia.Expr, int]:
        """Numbers for all symbols, such that all ways to write a size of the scores agree. Of the symbols that
        aren't in the scores' sizes nothing is known: with `whole` they are all S_kv (as the length of a mask over
        past and new keys)."""
        shapes = [self.ctx.tensor(v).shape for v in self.leaves]
        symbols = {a: None for s in [*shapes, *self.site.sizes.values()] for size in s for a in ia.atoms(size, "sym")}
        sizes = {a: self._by_name(a.args[0], plan) for a in symbols}
        for _ in range(3):
            for written in self.site.sizes.values():
                numbers = [self._number(w, sizes) for w in written]
                fixed = [n for w, n in zip(written, numbers, strict=True) if ia.only_atom(w) not in symbols]
                for w in written:
                    if ia.only_atom(w) in symbols:
                        sizes[ia.only_atom(w)] = (fixed or numbers)[0]
        if any(len({self._number(w, sizes) for w in written}) > 1 for written in self.site.sizes.values()):
            raise Skip
        if whole:
            inside = {a for written in self.site.sizes.values() for w in written for a in ia.atoms(w, "sym")}
            sizes.update({a: self._number(self.site.sizes["T"][0], sizes) for a in symbols if a not in inside})
        return sizes

    def _by_name(self, name: str, plan: tuple[int, int, int]) -> int:
        batch, sequence, past = plan
        return batch if "batch" in name.lower() else past if "past" in name.lower() else sequence

    def _draw(
        self,
        value: ir.Value,
        only_shape: bool,
        sizes: dict[ia.Expr, int],
        random: np.random.Generator,
        right_padding: bool,
    ) -> np.ndarray:
        shape = tuple(self._number(s, sizes) for s in self.ctx.tensor(value).shape)
        if np.prod(shape) > _MAX_ELEMENTS:
            raise Skip
        dtype = self._dtype(value)
        if only_shape:
            return np.zeros(shape, dtype.numpy())
        if kind_of(dtype) == "float":
            return random.standard_normal(shape).astype(dtype.numpy())
        if len(shape) < 2 and dtype is not ir.DataType.BOOL:
            return random.integers(0, 8, shape).astype(dtype.numpy())
        kept = random.random(shape) < 0.7
        if right_padding and shape:
            kept = np.arange(shape[-1]) < random.integers(1, shape[-1] + 1, (*shape[:-1], 1))
        return kept.astype(dtype.numpy())
