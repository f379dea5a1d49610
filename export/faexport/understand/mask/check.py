# SPDX-License-Identifier: Apache-2.0
"""Checks a proof by evaluation: runs the nodes of the mask on small random inputs and compares with what was proven.

Called by proof.py once per different mask of a graph. The model's own nodes run in onnx's reference implementation, cut
off at what the index algebra knows nothing of; random values stand in there. Sizes at which nothing runs aren't judged.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from faexport import spec
from faexport.sizes import algebra as ia
from faexport.understand.index.interpreter import Interpreter
from faexport.understand.index.tensor import kind_of
from faexport.understand.mask.magnitudes import MASKING, coarse
from faexport.understand.mask.options import MaskOptions
from faexport.understand.mask.site import Site
from faexport.understand.mask.softmax import Skip, highest, original, proven
from faexport.understand.shapes.constants import tensor_of
from faexport.understand.shapes.evaluate import evaluate

# Numbers for the symbols of sizes, and whether an axis that is the keys', or 1, is 1.
_PLANS = (
    ((2, 5, 3, 7), False),
    ((3, 1, 4, 6), False),
    ((5, 3, 2, 4), True),
    ((1, 6, 0, 2), False),
    ((2, 3, 7, 4), False),
)
_TOLERANCE = {ir.DataType.FLOAT16: 2e-2, ir.DataType.BFLOAT16: 1e-1}  # of a probability; else 5e-3
_MAX_ELEMENTS = 1 << 22


Plan = tuple[tuple[int, ...], bool]


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
        # What a row that sees no key gives depends on how a runtime adds a huge number in half precision (masks.md).
        floor = MASKING / 2 if options.assume_full_rows else -math.inf
        if site.half is not None and mask.attn_bias is not None:
            floor = -coarse(ir.DataType.BFLOAT16) / 2
        trial = _Trial(self.ctx, site, terms, mask, floor)
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


def _evaluated(evaluator: ReferenceEvaluator, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """The outputs by name; None where a node on the way fails."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            results = evaluator.run(None, feeds)
    except Exception:  # whatever a reference implementation raises for sizes that don't fit
        return None
    return {name: np.asarray(x) for name, x in zip(evaluator.output_names, results, strict=True)}


class _Trial:
    """The subgraph that computes the terms and the values of the proven mask, ready to run."""

    def __init__(self, ctx: Interpreter, site: Site, terms: Sequence[spec.MaskTerm], mask: spec.Mask, floor: float):
        self.floor = floor  # a row whose highest score is no higher isn't judged
        self.ctx, self.site, self.terms, self.mask = ctx, site, terms, mask
        self.outputs = list(dict.fromkeys([*site.roots, *mask.values]))
        self.leaves: dict[ir.Value, bool] = {}  # what is fed: True where only its shape matters
        self.nodes: list[ir.Node] = []
        self._collect()
        self._evaluator = self._build(self.nodes, self.outputs)

    def _collect(self) -> None:
        """The nodes behind the outputs, producers first."""
        made = {v for n in self.mask.new_nodes for v in n.outputs}
        stack, seen, found = list(self.outputs), set(), set()
        shapes_of: set[ir.Value] = set()
        while stack:
            value = stack.pop()
            node = value.producer()
            if value in seen or (node is None and tensor_of(value) is not None):
                continue
            seen.add(value)
            if node is None or (value not in made and self.ctx.is_opaque(value)):
                self.leaves[value] = False
                continue
            found.add(node)
            if node.op_type == "Shape":
                shapes_of.update(v for v in node.inputs if v is not None)
            else:
                stack += [v for v in node.inputs if v is not None]
        self.leaves.update({v: True for v in shapes_of if v not in seen})
        if any(self.ctx.known(v) is None for v in self.leaves):
            raise Skip
        self.nodes = _in_order(found, set(self.leaves))

    @functools.cached_property
    def _original(self) -> ReferenceEvaluator:
        """The model's own nodes alone."""
        return self._build([n for n in self.nodes if n not in set(self.mask.new_nodes)], self.site.roots)

    def _build(self, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> ReferenceEvaluator:
        model = onnx.ModelProto(ir_version=10)
        model.opset_import.append(onnx.helper.make_opsetid("", self.ctx.opset))
        model.graph.node.extend(ir.serde.serialize_node(n) for n in nodes)
        inner = {v for n in nodes for v in n.outputs}
        used = {v for n in nodes for v in n.inputs if v is not None} | set(outputs)
        for value in used - inner - set(self.leaves):
            tensor = tensor_of(value)
            if tensor is None:
                raise Skip
            model.graph.initializer.append(onnx.numpy_helper.from_array(tensor.numpy(), value.name))
        for value in self.leaves:
            dtype = self._dtype(value)
            model.graph.input.append(onnx.helper.make_tensor_value_info(value.name or "", int(dtype), None))
        model.graph.output.extend(onnx.ValueInfoProto(name=v.name) for v in dict.fromkeys(outputs))
        return ReferenceEvaluator(model)

    def _dtype(self, value: ir.Value) -> ir.DataType:
        return value.dtype or self.ctx.tensor(value).dtype or ir.DataType.FLOAT

    # ------------------------------------------------------------------------------------------ one evaluation

    def try_plan(self, plan: Plan, random: np.random.Generator, right_padding: bool) -> float:
        """As run; 0 where the model doesn't run at these sizes."""
        try:
            return self.run(self._bind(plan), random, right_padding)
        except Skip:
            return 0.0

    def run(self, sizes: dict[ia.Expr, int], random: np.random.Generator, right_padding: bool) -> float:
        """The largest difference between the model's probabilities and the proven ones, at these sizes."""
        feeds = {
            v.name or "": self._draw(v, only_shape, sizes, random, right_padding)
            for v, only_shape in self.leaves.items()
        }
        arrays = _evaluated(self._evaluator, feeds)
        is_broken = arrays is None  # either the model's own nodes don't run, or those of the proven mask
        arrays = _evaluated(self._original, feeds) if arrays is None else arrays
        if arrays is None:
            raise Skip
        values = {v: arrays[v.name or ""] for v in (self.site.roots if is_broken else self.outputs)}
        shape = tuple(self._number(self.site.sizes[letter][0], sizes) for letter in "BHST")
        if np.prod(shape) > _MAX_ELEMENTS or min(shape) < 1:
            raise Skip
        scores = random.uniform(-3, 3, shape)
        sinks = random.uniform(-3, 3, (1, shape[1], 1, 1)) if self.site.scores.sinks else None
        try:
            want = original(self.site, self.terms, values, scores, self.mask, sinks)
        except ValueError as error:  # numpy's: these sizes don't fit each other
            raise Skip from error
        if is_broken:
            if want.shape != shape:
                raise Skip
            return math.inf
        try:
            difference = np.abs(want - proven(self.mask, values, scores, sinks))
        except ValueError:
            return math.inf
        if self.floor > -math.inf:
            difference = difference[highest(self.site, self.terms, values, scores) > self.floor]
        return float(difference.max(initial=0.0))

    def _number(self, size: ia.Expr, sizes: dict[ia.Expr, int]) -> int:
        try:
            return evaluate(size, sizes)
        except (KeyError, ZeroDivisionError):
            raise Skip from None

    def _bind(self, plan: Plan) -> dict[ia.Expr, int]:
        """Numbers for all symbols. Where two sizes meet and one is a symbol of its own, it is the other one, or 1."""
        numbers, is_one = plan
        shapes = [self.ctx.tensor(v).shape for v in self.leaves]
        own = {a: None for (size,) in self.site.sizes.values() for a in self._symbols(size)}
        others = {a: None for shape in shapes for size in shape for a in self._symbols(size)}
        sizes = {a: numbers[k % len(numbers)] for k, a in enumerate({**own, **others})}
        for size, other in self._meetings(shapes):
            symbol = ia.only_atom(size)
            if symbol in sizes and symbol not in own:
                sizes[symbol] = 1 if is_one else self._number(other, sizes)
        return sizes

    @staticmethod
    def _symbols(size: ia.Expr) -> list[ia.Expr]:
        return sorted(ia.atoms(size, "sym"), key=lambda atom: atom.serial)

    def _meetings(self, shapes: Sequence[tuple[ia.Expr, ...]]) -> Iterator[tuple[ia.Expr, ia.Expr]]:
        for letter, (whole,) in self.site.sizes.items():
            yield from ((size, whole) for size in sorted(self.site.meeting[letter], key=lambda e: e.serial))
        everything = [s for shape in shapes for s in shape] + [s for (s,) in self.site.sizes.values()]
        everything += [s for sizes in self.site.meeting.values() for s in sizes]
        for atom in sorted({a for s in everything for a in ia.atoms(s, "meet")}, key=lambda e: e.serial):
            yield from itertools.permutations(atom.args, 2)

    def _draw(
        self,
        value: ir.Value,
        only_shape: bool,
        sizes: dict[ia.Expr, int],
        random: np.random.Generator,
        right_padding: bool,
    ) -> np.ndarray:
        shape = tuple(self._number(s, sizes) for s in self.ctx.tensor(value).shape)
        if np.prod(shape) > _MAX_ELEMENTS or min(shape, default=0) < 0:
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
            kept = np.arange(shape[-1]) < random.integers(1, max(shape[-1], 1) + 1, (*shape[:-1], 1))
        return kept.astype(dtype.numpy())
