# SPDX-License-Identifier: Apache-2.0
"""What a chain of mask terms does to each score: the cases, as conditions over (b, h, i, j), and what happens in each.

Called by proof.py. A score is either kept (perhaps with a bias added) or masked: a huge negative number is added to it,
or it is replaced by one. Which of both, and by which number, decides what a row without a visible key gives.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from faexport import spec
from faexport.nodes import operand
from faexport.understand.index import logic as il
from faexport.understand.index.interpreter import Interpreter
from faexport.understand.index.linear import linear_in
from faexport.understand.index.tensor import Tensor, Unknown, broadcast_index
from faexport.understand.mask.magnitudes import ABSORBS, MASKING, is_moderate, largest, magnitude
from faexport.understand.shapes import algebra as ia
from faexport.understand.shapes.algebra import Expr
from faexport.understand.shapes.constants import tensor_of
from faexport.understand.shapes.dims import Dim

_MAX_CASES = 24
_AXES = {"T": "keys", "B": "batch entries", "M": "batch entries", "W": "batch entries", "S": "rows", "H": "heads"}
_TOO_LARGE = (
    "its mask may have more {} than the scores, which would then take its size: both sizes have names of their own"
)


_CLAMPED_BIAS = (
    "its scores are clamped at {:g} after a bias was added that may be lower, and this number does not absorb scores"
)
_CUT_OFF_BIAS = "its scores are cut off above after a bias was added that may be infinite"


class NotAMask(Exception):
    """The terms can't be expressed; the message is the reason of the refusal."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What happens to a score where `cond` holds: `mask` is None (kept), or the number added or (`replaced`) put in its
    place.

    `exact`: all masked scores of this case are the same number whatever the score was. `bias` are the added
    expressions with their factors, also where they vanish beside the mask. `at_once`: all that was added to the score
    was added as one tensor, as the operator does, so that a sum that is not exact is rounded alike."""

    cond: Expr
    mask: float | None = None
    replaced: bool = False
    exact: bool = True
    bias: tuple[tuple[Expr, float], ...] = ()
    at_once: bool = True

    @property
    def number(self) -> float:
        """The mask, of a case that has one."""
        assert self.mask is not None
        return self.mask


class Site:
    """The index variables of one attention site and the elements of its terms at them.

    The scores have the axes B, H, S and T. An axis of a mask that meets one of these has its size, or size 1; which of
    both is often open until the model runs, and then both are provided for (`broadcast_index`)."""

    def __init__(self, ctx: Interpreter, terms: Sequence[spec.MaskTerm], scores: spec.ScoreShape):
        self.ctx, self.scores, self.terms = ctx, scores, terms
        self.tensors: dict[ir.Value, Tensor] = {}
        self.known: dict[Expr, Expr] = {}  # what is assumed of parts of its elements
        self.roots = [v for t in terms for v in (t.value, t.fill) if v is not None]
        for value in self.roots:
            self.tensors[value] = ctx.tensor(value)
        given = (scores.batch, scores.heads, scores.seqlen_q, scores.seqlen_kv)
        names = ("batch", "heads", "rows", "keys")
        sizes = {
            letter: ctx.size(Dim.of(dim) if dim is not None else Dim.unknown(name))
            for letter, dim, name in zip("BHST", given, names, strict=True)
        }
        self.heads = ia.value_of(sizes["H"])
        self.sizes = {letter: (size,) for letter, size in sizes.items()}
        self.facts, self.bounds = self._facts(sizes["T"])
        self.b, self.h, self.i, self.j = (
            ia.var(name, self.sizes[letter]) for name, letter in zip("bhij", "BHST", strict=True)
        )
        self.index = (self.b, self.h, self.i, self.j)
        self.meeting: dict[str, set[Expr]] = {letter: set() for letter in "BHST"}  # sizes that meet the scores' axis
        self._fit()

    def _facts(self, keys: Expr) -> tuple[dict[Expr, Expr], list[Expr]]:
        """(atoms of sizes and what they are at this site, numbers that are not negative). An axis that meets the keys
        has as many elements, or is 1: were it longer, the product with the values would fail. So a size that is 1 only
        where the keys are is their number, and where min(keys, n) is it, there are no more than n keys."""
        found: dict[Expr, Expr] = {}
        bounds: list[Expr] = []
        for size in self._meeting_keys() * 2:  # what is found of one may be a part of another
            known = ia.replace(size, found)
            atom = ia.only_atom(known)
            holds_keys = atom is not None and atom.op == "meet" and keys in atom.args
            if known is not keys and not holds_keys and not ia.is_one_with(known, keys):
                continue  # it may be 1 where there are more keys
            name = ia.only_atom(size)
            if name is not None:
                found[name] = keys
            if atom is not None and atom.op == "min":
                bounds += [ia.sub(other, keys) for other in atom.args if other is not keys]
        return found, bounds

    def simplified(self, e: Expr) -> Expr:
        """An expression with what is known of sizes at this site put in."""
        if not self.facts:
            return e
        known = dict(self.facts)
        for atom in ia.atoms(e, "min") - known.keys():
            least = next((x for x in atom.args for y in atom.args if x is not y and self._is_below(x, y)), None)
            if least is not None:
                known[atom] = least
        return il.rewrite(e, known)

    def _is_below(self, x: Expr, y: Expr) -> bool:
        return any(ia.is_nonnegative(ia.sub(ia.sub(y, x), bound)) for bound in self.bounds)

    def is_broadcast(self, letter: str, size: Expr) -> bool:
        """Is an axis of `size` known to have the size of the scores' axis, or size 1?"""
        size = self.simplified(size)
        return size in self.sizes[letter] or size in self.meeting[letter]

    def _fit(self) -> None:
        """Raises NotAMask where a term may have more rows, heads or batch entries than the scores."""
        for term in self.terms:
            dims = dict(zip(term.axes, term.dims, strict=False))
            for value in (term.value, term.fill):
                shape = self.tensors[value].shape if value is not None else ()
                if len(shape) > len(term.axes):
                    raise NotAMask("its mask has more axes than the scores")
                for letter, size in zip(term.axes[len(term.axes) - len(shape) :], shape, strict=True):
                    dim = dims.get(letter)
                    own = self.ctx.size(dim) if dim is not None else None
                    whole = self.sizes[letter][0] if letter in self.sizes else own
                    fixed = letter == "T" and self.scores.same_keys
                    if not fixed and not self._fits(self.simplified(size), whole):
                        raise NotAMask(_TOO_LARGE.format(_AXES.get(letter, "entries")))
                    if letter in self.meeting:
                        self._note_meeting(letter, size)

    def _note_meeting(self, letter: str, size: Expr) -> None:
        self.meeting[letter].add(self.simplified(size))
        atom = ia.only_atom(size)
        for part in atom.args if atom is not None and atom.op == "meet" else ():
            self._note_meeting(letter, part)

    def _fits(self, size: Expr, whole: Expr | None) -> bool:
        """Is it proven that an axis of `size` has the size of the scores' axis, or size 1?"""
        if size is whole or ia.value_of(size) == 1:
            return True
        atom = ia.only_atom(whole) if whole is not None else None
        if whole is None:
            return False
        if ia.meet(size, whole) is whole or (atom is not None and atom.op == "meet" and size in atom.args):
            return True
        for other in self._meeting_keys():
            name = ia.only_atom(other)
            if name is None:
                continue
            cases = [ia.replace(size, {name: x}) for x in (self.sizes["T"][0], ia.ONE)]
            if all(case in (whole, ia.ONE) for case in cases):
                return True
        return False

    def _meeting_keys(self) -> list[Expr]:
        """Sizes made of one atom that the terms' last axes have: each is that of the keys, or 1."""
        if not self.scores.same_keys:
            return []
        found: dict[Expr, None] = {}
        for term in self.terms:
            for value in (term.value, term.fill):
                shape = self.tensors[value].shape if value is not None else ()
                letters = term.axes[len(term.axes) - len(shape) :]
                found.update((size, None) for letter, size in zip(letters, shape, strict=False) if letter == "T")
        parts = [x for size in found for atom in (ia.only_atom(size),) if atom and atom.op == "meet" for x in atom.args]
        return [size for size in dict.fromkeys([*found, *parts]) if ia.only_atom(size) is not None]

    def supposing(self, known: dict[Expr, Expr]) -> Site:
        """The same site with parts of its elements assumed to be something simpler."""
        site = copy.copy(self)
        site.known = known
        return site

    def element(self, term: spec.MaskTerm, value: ir.Value) -> Expr:
        """The element of a term's value (or fill) that meets score (b, h, i, j)."""
        found = self.simplified(self.tensors[value].at(self.place(term, value)))
        return il.rewrite(found, self.known) if self.known else found

    def place(self, term: spec.MaskTerm, value: ir.Value) -> tuple[Expr, ...]:
        """The index into a term's value (or fill) that score (b, h, i, j) meets."""
        tensor = self.tensors[value]
        letters = term.axes[len(term.axes) - tensor.rank :]
        return tuple(self._axis(letter, term, size) for letter, size in zip(letters, tensor.shape, strict=True))

    def _axis(self, letter: str, term: spec.MaskTerm, size: Expr) -> Expr:
        """The index along an axis of the score tensor, from (b, h, i, j)."""
        if ia.value_of(size) == 1:
            return ia.ZERO
        return broadcast_index(self._whole_axis(letter, term), self.simplified(size))

    def _whole_axis(self, letter: str, term: spec.MaskTerm) -> Expr:
        plain = dict(zip("BHST", self.index, strict=True))
        if letter in plain:
            return plain[letter]
        if letter == "N" and self.heads is not None:
            return ia.add(ia.scale(self.b, self.heads), self.h)
        inner = {"K": "G", "G": "G", "M": "W", "W": "W"}.get(letter)
        if inner is None:
            raise NotAMask(f"its scores have an axis of unknown meaning ({letter})")
        whole = self.h if letter in "KG" else self.b
        dims = dict(zip(term.axes, term.dims, strict=False))
        if dims.get(inner) is None:
            raise NotAMask("the number of heads in a group isn't known")
        per_group = self.ctx.size(dims[inner])
        return ia.floordiv(whole, per_group) if letter in "KM" else ia.modulo(whole, per_group)


def leaves(e: Expr, cond: Expr = il.TRUE) -> list[tuple[Expr, Expr]]:
    """The values that a nest of choices can take, each with its condition."""
    if e.op != "choose":
        return [(cond, e)]
    c, yes, no = e.args
    both = leaves(yes, il.all_of((cond, c))) + leaves(no, il.all_of((cond, il.negate(c))))
    return [(c, v) for c, v in both if c is not il.FALSE]


def summands(e: Expr) -> list[Expr]:
    """The parts of a sum of floats: a mask and a bias that the exporter added up before they meet the scores."""
    if e.op == "fop" and e.args[0] == "Add":
        return [part for x in e.args[2:] for part in summands(x)]
    if e.op == "fop" and e.args[0] == "Sub" and e.args[3].op == "float":
        return [*summands(e.args[2]), il.floating(-il.number_of(e.args[3]), e.args[1])]
    return [e]


def is_fill(e: Expr, factor: float) -> bool:
    value = il.float_value(e)
    return value is not None and not value * factor > MASKING


def fills(site: Site) -> list[float]:
    """The hugely negative numbers that the terms add to scores, or put in their place."""
    found = []
    for term in site.terms:
        value = term.fill if term.fill is not None else term.value
        if term.kind in (spec.TermKind.ADD, spec.TermKind.WHERE, spec.TermKind.CLAMP):
            parts = (part for _, leaf in leaves(site.element(term, value)) for part in summands(leaf))
            found += [il.number_of(x) * term.factor for x in parts if x.op == "float" and is_fill(x, term.factor)]
    return found


def zeros_and_ones(site: Site) -> dict[Expr, Expr]:
    """The integers of graph inputs that float masks are made of, as choices between 0 and 1."""
    found = {}
    for term in site.terms:
        if term.kind is spec.TermKind.ADD:
            for cast in ia.atoms(site.element(term, term.value), "cast"):
                number, dtype = cast.args
                atom = ia.only_atom(number) if number.kind == "int" else None
                if atom is not None and atom.op == "load" and atom.args[0].is_graph_input():
                    found[cast] = il.choose(il.eq0(number), il.floating(0.0, dtype), il.floating(1.0, dtype))
    return found


def cases_of(site: Site) -> list[Case]:
    """All cases of the chain; their conditions exclude each other and cover everything."""
    cases, terms = [Case(il.TRUE)], site.terms
    for term in terms:
        if term.kind in (spec.TermKind.ZERO, spec.TermKind.EMPTY_ROW):
            continue
        apply = {"add": _add, "where": _where, "bool": _where, "clamp": _clamp, "gate": _gate}[term.kind.value]
        cases = [new for case in cases for new in apply(site, term, case)]
        cases = _merged([c for c in cases if c.cond is not il.FALSE])
        if len(cases) > _MAX_CASES:
            raise NotAMask("its mask has too many cases")
    if any(c.mask is not None and c.mask > MASKING for c in cases):
        raise NotAMask("some of its scores are replaced by a number that is no mask")
    return _emptied(site, terms, _zeroed(site, terms, cases))


def _merged(cases: list[Case]) -> list[Case]:
    """Cases with the same effect become one."""
    groups: dict[tuple, list[Case]] = {}
    for case in cases:
        groups.setdefault((case.mask, case.replaced, case.exact, case.bias, case.at_once), []).append(case)
    return [dataclasses.replace(g[0], cond=il.any_of(c.cond for c in g)) for g in groups.values()]


def _sum(mask: float, value: float, term: spec.MaskTerm, dtype: ir.DataType) -> float:
    """A mask after one more addition; it overflows (or not) before the scale that follows."""
    return il.number_of(il.floating(mask / term.factor + value, dtype)) * term.factor


def _add(site: Site, term: spec.MaskTerm, case: Case) -> list[Case]:
    dtype = site.tensors[term.value].dtype or site.scores.dtype  # an Add's operands are of one type
    absorbs = ABSORBS.get(dtype, -1e30)
    result = []
    added = site.element(term, term.value)
    values = [(cond, summands(leaf)) for cond, leaf in leaves(added)]
    if not any(is_fill(part, term.factor) for _, parts in values for part in parts):
        values = [(il.TRUE, [added])]  # a bias that happens to be made of choices
    for cond, parts in values:
        new = dataclasses.replace(case, cond=il.all_of((case.cond, cond)))
        parts = [part for part in parts if il.float_value(part) != 0]
        for part in parts:
            new = _add_one(term, part, new, absorbs, dtype)
        alike = case.at_once and (not parts or (case.mask is None and not case.bias and _rounds_alike(term, parts)))
        result.append(dataclasses.replace(new, at_once=alike))
    return result


def _rounds_alike(term: spec.MaskTerm, parts: list[Expr]) -> bool:
    """Does a sum of a score and these parts round as it does where the operator adds them, in the order of a Case, to a
    score that was already multiplied by the term's factor?"""
    numbers = sum(il.float_value(part) is not None for part in parts)
    return abs(math.frexp(term.factor)[0]) == 0.5 and (len(parts) <= 2 or numbers == len(parts))


def _add_one(term: spec.MaskTerm, part: Expr, case: Case, absorbs: float, dtype: ir.DataType) -> Case:
    """The case after one expression without choices was added."""
    value = il.float_value(part)
    if value is None or (value != 0 and value * term.factor > MASKING):  # a bias; beside a huge number it vanishes
        exact = case.mask is None or (case.exact and case.mask <= absorbs)
        return dataclasses.replace(case, exact=exact, bias=(*case.bias, (part, term.factor)))
    if math.isnan(value):
        raise NotAMask("a NaN is added to its scores")
    if value == 0:
        return case
    if case.mask is None:
        return Case(case.cond, value * term.factor, False, value <= absorbs, case.bias)
    exact = case.exact or value <= min(absorbs, -1e30)
    return dataclasses.replace(case, mask=_sum(case.mask, value, term, dtype), exact=exact)


def _where(site: Site, term: spec.MaskTerm, case: Case) -> list[Case]:
    kept = site.element(term, term.value)
    if kept.kind != "bool":
        kept = (
            il.negate(il.eq0(kept))
            if kept.kind == "int"
            else il.float_compare("ne", kept, il.floating(0.0, ir.DataType.FLOAT))
        )
    kept = kept if term.keep_when else il.negate(kept)
    result = [dataclasses.replace(case, cond=il.all_of((case.cond, kept)))]
    gone = il.all_of((case.cond, il.negate(kept)))
    if term.kind is spec.TermKind.BOOL:
        return [*result, Case(gone, -math.inf, True)]
    if gone is il.FALSE:
        return result
    assert term.fill is not None  # of TermKind.WHERE
    for cond, leaf in leaves(site.element(term, term.fill)):
        value = il.float_value(leaf)
        if value is None or not value * term.factor <= MASKING:
            what = "other values" if value is None else f"{value * term.factor:g}, which is no mask"
            raise NotAMask(f"some of its scores are replaced by {what}")
        result.append(Case(il.all_of((gone, cond)), value * term.factor, True))
    return result


def _clamp(site: Site, term: spec.MaskTerm, case: Case) -> list[Case]:
    floor = il.float_value(site.element(term, term.value))
    if floor is None or floor * term.factor > MASKING:
        raise NotAMask("its scores are clamped at a number that real scores can reach")
    floor *= term.factor
    if case.mask is not None:
        return [case if case.mask > floor else dataclasses.replace(case, mask=floor, replaced=True, exact=True)]
    if sum(magnitude(e) * abs(factor) for e, factor in case.bias) < -floor / 2:
        return [case]
    check_clamp(term, floor, site.scores.dtype)
    dtype = site.scores.dtype
    bias = il.float_op("Max", dtype, sum_of(case.bias, dtype), il.floating(floor, dtype))
    if term.node.op_type == "Clip":  # without an upper end, it cuts off at the largest number
        bias = il.float_op("Min", dtype, bias, il.floating(largest(dtype) * term.factor, dtype))
    return [dataclasses.replace(case, bias=((bias, 1.0),))]


def check_clamp(term: spec.MaskTerm, floor: float, dtype: ir.DataType) -> None:
    """max(score + bias, floor) is score + max(bias, floor) where the floor absorbs scores; else raises NotAMask."""
    if dtype not in (ir.DataType.FLOAT, ir.DataType.BFLOAT16) or not floor <= ABSORBS[dtype]:
        raise NotAMask(_CLAMPED_BIAS.format(floor))
    if term.node.op_type == "Clip" and operand(term.node, 2) is not None:
        raise NotAMask(_CUT_OFF_BIAS)


def sum_of(bias: Iterable[tuple[Expr, float]], dtype: ir.DataType) -> Expr:
    """What the expressions of a Case add to its scores."""
    total = il.floating(0.0, dtype)
    for e, factor in bias:
        scaled = il.float_op("Mul", dtype, e, il.floating(factor, dtype)) if factor != 1 else e
        total = il.float_op("Add", dtype, total, scaled)
    return total


def _gate(site: Site, term: spec.MaskTerm, case: Case) -> list[Case]:
    """A weight of 1 keeps a score, a weight of 0 replaces it by 0 (and a huge negative number has to follow)."""
    result = []
    for cond, leaf in leaves(_as_float(site.element(term, term.value))):
        cond, weight = il.all_of((case.cond, cond)), il.float_value(leaf)
        if weight == 0:
            result.append(Case(cond, 0.0, True))
        elif weight == 1:
            result.append(dataclasses.replace(case, cond=cond))
        else:
            raise NotAMask("its scores are multiplied by values that aren't just 0 and 1")
    return result


def _as_float(e: Expr) -> Expr:
    return e if e.kind == "float" else il.cast_float(e, ir.DataType.FLOAT)


def _zeroed(site: Site, terms: Sequence[spec.MaskTerm], cases: list[Case]) -> list[Case]:
    """Probabilities set to 0 after the softmax: harmless where they are masked anyway, and then such a row gives 0."""
    for term in terms:
        if term.kind is not spec.TermKind.ZERO:
            continue
        kept = site.element(term, term.value)
        kept = kept if term.keep_when else il.negate(kept)
        result = []
        for case in cases:
            if case.mask is None and il.all_of((case.cond, il.negate(kept))) is not il.FALSE:
                raise NotAMask("probabilities are set to 0 after its softmax, where they aren't masked before it")
            gone = case.mask is not None and il.all_of((case.cond, kept)) is il.FALSE
            result.append(dataclasses.replace(case, mask=-math.inf, bias=()) if gone else case)
        cases = _merged(result)
    return cases


def _emptied(site: Site, terms: Sequence[spec.MaskTerm], cases: list[Case]) -> list[Case]:
    """Rows that see no key in another mask, set to 0 behind the product: harmless where that mask has no such rows, or
    where it is the very mask of the scores."""
    for term in terms:
        if term.kind is not spec.TermKind.EMPTY_ROW:
            continue
        kept = site.element(term, term.value)
        kept = il.rewrite(kept, {test: il.TRUE for test in ia.atoms(kept, "fcmp") if _holds_for_weights(test)})
        if rows_see_a_key(site, kept):
            continue
        soft = any(c.mask is not None and c.mask > -math.inf for c in cases)
        huge = any(not is_moderate(e) for c in cases if c.mask is None for e, _ in c.bias)
        if kept is not visible(cases) or (soft and huge):
            raise NotAMask("its output is set to 0 in other rows than those that see no key")
        cases = _merged([c if c.mask is None else dataclasses.replace(c, mask=-math.inf, bias=()) for c in cases])
    return cases


def _holds_for_weights(test: Expr) -> bool:
    """Is it `number < an element of a table of weights` (a Gather, as for relative positions), true of all weights?"""
    name, bound, element = test.args
    gather = element.args[0].producer() if name == "lt" and bound.op == "float" and element.op == "load" else None
    if gather is None or gather.op_type != "Gather" or gather.domain not in ("", "ai.onnx"):
        return False
    table = gather.inputs[0]
    constant = tensor_of(table)
    return constant is not None and bool((constant.numpy() > il.number_of(bound)).all())


def visible(cases: Iterable[Case]) -> Expr:
    return il.any_of(c.cond for c in cases if c.mask is None)


def rows_see_a_key(site: Site, seen: Expr) -> bool:
    """Is it proven that in every row some key is visible? A few keys are tried: the first, the last, the row's own."""
    if seen is il.TRUE:
        return True
    atom = ia.only_atom(site.j)
    if atom is None:
        return False
    last = [ia.sub(size, ia.ONE) for size in site.sizes["T"]]
    candidates = [ia.ZERO, *last, site.i]
    for part in seen.args if seen.op == "and" else (seen,):
        linear = linear_in(part.args[0], "j") if part.op == "ge0" else None
        if linear is not None and abs(linear[0]) == 1:
            candidates.append(ia.scale(linear[1], -linear[0]))
    for key in candidates:
        inside = ia.is_nonnegative(key) and any(ia.is_nonnegative(ia.sub(size, key)) for size in last)
        if inside and il.rewrite(seen, {atom: key}) is il.TRUE:
            return True
    return False


__all__ = ["Case", "NotAMask", "Site", "Unknown", "cases_of", "leaves", "rows_see_a_key", "summands", "visible"]
