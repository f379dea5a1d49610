# SPDX-License-Identifier: Apache-2.0
"""Sizes of a model's inputs that belong together, whatever the file calls them: a mask that is as long as the past and
the new rows, batch axes that meet in one operator.

What operators require of their operands' shapes says most of it (the shapes are those of understand/shapes). Where a
mask is read by indices, as PyTorch's exporters write it, the model itself is asked: sums are tried until it runs. What
is found is written into the inputs' dims, "past + rows" in place of "total". Nothing is proven by it, and it decides
only on what inputs a model is run. Used by reference.py and bench.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from faexport.feeds import inputs
from faexport.feeds.inputs import Drawing, InputSpec, Sizes
from faexport.graph.nodes import RUNTIME_DOMAIN, all_nodes, attribute, op, operand, producer
from faexport.sizes import algebra
from faexport.sizes.algebra import Expr
from faexport.sizes.dims import Dim, named, plain
from faexport.understand.shapes.analysis import Analysis
from faexport.understand.shapes.known import Shape
from faexport.understand.shapes.rules import BROADCASTING, resolve_axis

NAME_THEM = (
    "export it with names that say which are equal and which are sums (a mask's 'past + sequence'), or give inputs "
    "that do with --inputs file.npz"
)
_MOST_TRIALS = 64
_MOST_FIXED = 16
_MOST_NAMES = 8  # that are tried for being equal to another
_TRIED = Sizes(batch=2, length=6, past=3)  # all different, and so is the sum
_PRODUCTS = ("MatMul", "MatMulInteger")

Runs = Callable[[Mapping[str, np.ndarray]], bool]


def with_channels(specs: Sequence[InputSpec], model: ir.Model) -> list[InputSpec]:
    """The inputs with as many channels as the convolutions that read them have weights for, where a file names these
    too, as optimum's do of images."""
    known: dict[str, int] = {}
    dims = {spec.name: spec.dims for spec in specs}
    for node in model.graph:
        if op(node) != "Conv" or not (value := operand(node, 0)) or not (weight := operand(node, 1)):
            continue
        while (before := producer(value)) is not None and op(before) in ("Cast", "Identity") and before.inputs[0]:
            value = before.inputs[0]
        shape = weight.shape
        if value.is_graph_input() and shape is not None and isinstance(shape[1], int) and value.name in dims:
            known[str(dims[value.name][1])] = shape[1] * attribute(node, "group", 1)
    return [
        dataclasses.replace(spec, dims=tuple(known.get(str(dim), dim) for dim in spec.dims)) if known else spec
        for spec in specs
    ]


def fitting(specs: Sequence[InputSpec], model: ir.Model, runs: Runs) -> list[InputSpec] | None:
    """The inputs with sizes related so that the model runs, on more than one batch entry and with nothing empty; None
    where that was not found. `runs` says whether the model runs on these tensors."""
    tried: list[list[InputSpec]] = []
    for found in itertools.islice(_candidates(from_graph(specs, model), list(specs)), _MOST_TRIALS):
        if found not in tried:
            tried.append(found)
            if _runs_with(found, {}, runs):
                return _with_equal_ones(found, runs)
    return None


def fixed_sizes(model: ir.Model) -> list[int]:
    """Numbers among the sizes that its Reshapes ask for: an exporter may have fixed one there that the inputs leave
    open."""
    analysis, found = Analysis(model), dict[int, None]()
    for node in all_nodes(model):
        sizes = analysis.contents(operand(node, 1)) if op(node) == "Reshape" else None
        found |= dict.fromkeys(size for dim in sizes or () if isinstance(size := plain(dim), int) and size > 1)
    return list(found)[:_MOST_FIXED]


def of_length(specs: Sequence[InputSpec], length: int) -> list[InputSpec]:
    """The inputs with this length in the place of each size that is one."""
    short, long, bound = (inputs.bind(specs, dataclasses.replace(_TRIED, length=n)) for n in (5, 7, length))
    known = {name: size for name, size in bound.items() if short[name] != long[name]}
    return [dataclasses.replace(spec, dims=tuple(known.get(str(dim), dim) for dim in spec.dims)) for spec in specs]


def is_full(specs: Sequence[InputSpec], tensors: Mapping[str, np.ndarray]) -> bool:
    """Is no open size 0, and are there several batch entries where there may be? With a cache that is a step on one
    that holds something."""
    for spec in specs:
        for axis, dim in enumerate(spec.dims if spec.name in tensors else ()):
            is_batch = axis == 0 and len(spec.dims) > 1
            if not isinstance(dim, int) and tensors[spec.name].shape[axis] < (2 if is_batch else 1):
                return False
    return True


def solve(asked: Mapping[str, Sequence[int]], specs: Sequence[InputSpec]) -> dict[str, int]:
    """The symbols' values that follow from the shapes of some inputs; some may stay open."""
    pairs = [pair for spec in specs for pair in zip(spec.dims, asked.get(spec.name, ()), strict=False)]
    known: dict[str, int] = {}
    for _ in pairs:
        for dim, size in pairs:
            if isinstance(dim, int):
                continue
            open_ones = [str(symbol) for symbol in dim.free_symbols() if str(symbol) not in known]
            if len(open_ones) != 1:
                continue
            (name,) = open_ones
            at_0, at_1 = (dim.evaluate({**known, name: number}) for number in (0, 1))
            if not isinstance(at_0, int) or not isinstance(at_1, int) or at_1 == at_0:
                continue
            number, rest = divmod(size - at_0, at_1 - at_0)
            if rest == 0 and number >= 0:
                known[name] = number
    return known


# ---------------------------------------------------------------------------------------------- what the graph says


def from_graph(specs: Sequence[InputSpec], model: ir.Model) -> list[InputSpec]:
    """The inputs, with each size that operators require to be another one, or a sum, written as that. Two sizes that
    meet in a broadcast are taken to be equal, though one of them might be 1."""
    names = inputs.symbols(specs)
    if len(names) < 2:
        return list(specs)
    analysis = Analysis(model)
    known = _own_names(specs, model, analysis)  # then also what is found
    order = {_atom(name): place for place, name in enumerate(names)}
    for x, y in _equal_sizes(model, analysis):
        difference = (x - y).substitute(known).expr
        found = _solved(difference, order)
        if found is not None:
            atom, size = found
            known = {other: algebra.replace(expr, {atom: size}) for other, expr in known.items()} | {atom: size}
    return _written(specs, known)


def _own_names(specs: Sequence[InputSpec], model: ir.Model, analysis: Analysis) -> dict[Expr, Expr]:
    """The names that inputs.py made up, for the sizes without a name; and for names whose sizes the analysis already
    knows to be others', those."""
    own = {spec.name: spec for spec in specs}
    named_sizes = {_atom(name) for name in inputs.symbols(specs)}
    known: dict[Expr, Expr] = {}
    for value in model.graph.inputs:
        spec = own.get(value.name or "")
        for size, dim in zip(analysis.shape(value) or (), spec.dims if spec is not None else (), strict=False):
            atom = algebra.only_atom(size.expr)
            if atom is None or isinstance(dim, int) or size == named(str(dim)):
                continue
            if atom not in named_sizes and atom not in known:
                known[atom] = algebra.sym(str(dim))
            elif (name := algebra.only_atom(named(str(dim)).expr)) is not None and name not in known:
                known[name] = known.get(atom, size.expr)
    return known


def _equal_sizes(model: ir.Model, analysis: Analysis) -> Iterator[tuple[Dim, Dim]]:
    """Sizes that are equal wherever the model runs, or, where they are broadcast, mostly."""
    for node in all_nodes(model):
        shapes = [analysis.shape(value) for value in node.inputs]
        if op(node) == "Expand":
            yield from _met([shapes[0], analysis.contents(operand(node, 1))])
        elif op(node) in BROADCASTING:
            yield from _met(shapes)
        elif op(node) in _PRODUCTS and all(shape is not None and len(shape) > 1 for shape in shapes[:2]):
            x, y = (shape or () for shape in shapes[:2])
            yield x[-1], y[-2]
            yield from _met([x[:-2], y[:-2]])
        elif op(node) == "Concat":
            yield from sizes_beside(shapes, attribute(node, "axis", 0))
        elif (node.domain, node.op_type) == (RUNTIME_DOMAIN, "MultiHeadAttention"):
            yield from _heads_of_cache(node, shapes)


def _heads_of_cache(node: ir.Node, shapes: Sequence[Shape | None]) -> Iterator[tuple[Dim, Dim]]:
    """The columns of a head of the past keys and values are those of the new ones."""
    for new, past in ((1, 6), (2, 7)):
        rows, cache = (shapes[k] if k < len(shapes) else None for k in (new, past))
        heads = Dim.of(attribute(node, "num_heads", 1) if rows is not None and len(rows) == 3 else 1)
        columns = rows[-1].divide(heads) if rows else None
        if columns is not None and cache is not None and len(cache) == 4:
            yield cache[3], columns


def _met(shapes: Sequence[Shape | None]) -> Iterator[tuple[Dim, Dim]]:
    known = [shape[::-1] for shape in shapes if shape is not None]
    for sizes in itertools.zip_longest(*known, fillvalue=Dim.of(1)):
        first, *others = [size for size in dict.fromkeys(sizes) if size != 1] or [Dim.of(1)]
        yield from ((first, other) for other in others)


def sizes_beside(shapes: Sequence[Shape | None], axis: int) -> Iterator[tuple[Dim, Dim]]:
    """Sizes that inputs of a Concat of these shapes must have in common, in pairs."""
    known = [shape for shape in shapes if shape is not None]
    for shape in known[1:]:
        joined = resolve_axis(axis, len(shape))
        pairs = enumerate(zip(known[0], shape, strict=False))
        yield from (pair for place, pair in pairs if place != joined and pair[0] != pair[1])


def _solved(difference: Expr, order: Mapping[Expr, int]) -> tuple[Expr, Expr] | None:
    """A name, and the sum of others that it is where the difference is 0: the last name in order that is one."""
    terms = dict(difference.args)
    if any(len(monomial) > 1 or (monomial and monomial[0] not in order) for monomial in terms):
        return None
    found: list[tuple[Expr, Expr]] = []
    for monomial, factor in terms.items():
        if monomial and abs(factor) == 1:
            rest = algebra.scale(algebra.sub(difference, algebra.scale(algebra.of_atom(monomial[0]), factor)), -factor)
            if rest.args and all(number > 0 for _, number in rest.args):
                found.append((monomial[0], rest))
    return max(found, key=lambda pair: order[pair[0]], default=None)


def _written(specs: Sequence[InputSpec], known: Mapping[Expr, Expr]) -> list[InputSpec]:
    def written(dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        size = Dim.of(dim) if isinstance(dim, int) else named(str(dim)).substitute(known)
        return ir.SymbolicDim(str(size)) if size.const is None else size.const

    return [dataclasses.replace(spec, dims=tuple(map(written, spec.dims))) for spec in specs]


# ---------------------------------------------------------------------------------------------- what is tried


def _candidates(graph: list[InputSpec], plain: list[InputSpec]) -> Iterator[list[InputSpec]]:
    """What the graph says, what the file says, and both with one sum more, or with two."""
    yield graph
    yield plain
    for specs in (graph, plain):
        sums = list(_sums(specs))
        yield from (_written(specs, {atom: size}) for atom, size in sums)
        for one, other in itertools.combinations(sums, 2):
            apart = one[0] is not other[0] and not any(
                a in algebra.atoms(size, "sym") for a, size in ((one[0], other[1]), (other[0], one[1]))
            )
            if apart:
                yield _written(specs, dict((one, other)))


def _runs_with(specs: Sequence[InputSpec], given: Mapping[str, int], runs: Runs) -> bool:
    try:
        tensors = inputs.draw(specs, inputs.bind(specs, _TRIED, given), Drawing(), np.random.default_rng(0))
    except inputs.UnsupportedInput:
        return False
    return runs(tensors)


def _with_equal_ones(specs: list[InputSpec], runs: Runs) -> list[InputSpec]:
    """With sizes written as one that the model runs with where both grow, and not where one does."""
    sizes = inputs.bind(specs, _TRIED)
    for name in inputs.symbols(specs)[:_MOST_NAMES]:
        names = inputs.symbols(specs)
        grown = {name: sizes[name] + 1}
        if name not in names or _runs_with(specs, grown, runs):
            continue
        for other in (x for x in names if x != name and sizes[x] == sizes[name]):
            equal = _written(specs, {_atom(other): algebra.sym(name)})
            if _runs_with(equal, grown, runs):
                specs = equal
                break
    return specs


def _atom(name: str) -> Expr:
    atom = algebra.only_atom(algebra.sym(name))
    assert atom is not None
    return atom


def _sums(specs: Sequence[InputSpec]) -> Iterator[tuple[Expr, Expr]]:
    """Names, and what each might be: the rows of a cache with those of another input, or the batch."""
    batches = dict.fromkeys(str(spec.dims[0]) for spec in specs if len(spec.dims) > 1)
    names = [name for name in inputs.symbols(specs) if name not in batches]
    pasts = [name for name in inputs.past_symbols(specs) if name not in batches]
    others = [name for name in names if name not in pasts]
    added = itertools.product(pasts, others) if pasts else itertools.combinations(others, 2)
    for past, rows in list(added):
        for name in reversed(others):
            if name not in (past, rows):
                yield _atom(name), algebra.add(algebra.sym(past), algebra.sym(rows))
    for name in others:
        yield from ((_atom(name), algebra.sym(batch)) for batch in batches if batch in inputs.symbols(specs))
