# SPDX-License-Identifier: Apache-2.0
"""What a chain of mask terms does to each score: the cases, as conditions over (b, h, i, j), and what happens in each.

Called by proof.py. A score is either kept (perhaps with a bias added) or masked: a huge negative number is added to it,
or it is replaced by one. Which of both, and by which number, decides what a row without a visible key gives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from faexport import spec
from faexport.graph.nodes import operand
from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr
from faexport.understand.index import logic as il
from faexport.understand.index.linear import linear_in
from faexport.understand.mask.magnitudes import ABSORBS, MASKING, is_moderate, largest, magnitude
from faexport.understand.mask.site import NotAMask, Site
from faexport.understand.shapes.constants import tensor_of

_MAX_CASES = 24
_NARROW = 16.0  # a bias within this makes no exponential 0 (docs/masks.md)

_CLAMPED_BIAS = (
    "its scores are clamped at {:g} after a bias was added that may be lower, and this number does not absorb scores"
)
_CUT_OFF_BIAS = "its scores are cut off above after a bias was added that may be infinite"
_LOWERED_BIAS = (
    "its mask takes the lower of a score and {:g}, after what may be lower was added: then the masked keys would be "
    "seen instead"
)
_ZEROED_BESIDE = (
    "probabilities are set to 0 after its softmax where a finite number hides scores, and what was added to others may "
    "be lower: such a row gives 0 (--assume full-rows rules it out)"
)
_HIDDEN_BESIDE = (
    "exponentials are set to 0 after {} was added to the scores: in a row whose hidden scores are much higher, the "
    "exponentials that stay may be 0 as well"
)


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
    return [number for term in site.terms for number in fills_of(site, term)]


def fills_of(site: Site, term: spec.MaskTerm) -> list[float]:
    """Those of one term."""
    value = term.fill if term.fill is not None else term.value
    if term.kind not in (spec.TermKind.ADD, spec.TermKind.WHERE, spec.TermKind.CLAMP, spec.TermKind.MIN):
        return []
    parts = [part for _, leaf in leaves(site.element(term, value)) for part in summands(leaf)]
    return [il.number_of(x) * term.factor for x in parts if x.op == "float" and is_fill(x, term.factor)]


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


def cases_of(site: Site, rows_are_full: bool = False) -> list[Case]:
    """All cases of the chain; their conditions exclude each other and cover everything. `rows_are_full`: of each row a
    key is assumed to be seen that no bias hides, either."""
    cases, terms = [Case(il.TRUE)], site.terms
    for term in terms:
        if term.kind in (spec.TermKind.ZERO, spec.TermKind.EMPTY_ROW):
            continue
        if term.kind is spec.TermKind.HIDDEN:
            cases = _hidden(site, term, cases)
            continue
        cases = [new for case in cases for new in _APPLY[term.kind](site, term, case)]
        cases = _merged([c for c in cases if c.cond is not il.FALSE])
        if len(cases) > _MAX_CASES:
            raise NotAMask("its mask has too many cases")
    if any(c.mask is not None and c.mask > MASKING for c in cases):
        raise NotAMask("some of its scores are replaced by a number that is no mask")
    return _emptied(site, terms, _zeroed(site, terms, cases, rows_are_full))


def _merged(cases: list[Case]) -> list[Case]:
    """Cases with the same effect become one."""
    groups: dict[tuple, list[Case]] = {}
    for case in cases:
        groups.setdefault((case.mask, case.replaced, case.exact, case.bias, case.at_once), []).append(case)
    return [dataclasses.replace(g[0], cond=il.any_of(c.cond for c in g)) for g in groups.values()]


def _sum(mask: float, value: float, term: spec.MaskTerm, dtype: ir.DataType) -> float:
    """A mask after one more addition; it overflows (or not) before the scale that follows, and by that again."""
    return _scaled(il.number_of(il.floating(mask / term.factor + value, dtype)), term, dtype)


def _scaled(number: float, term: spec.MaskTerm, dtype: ir.DataType) -> float:
    """What becomes of a number of a term by the scale that follows."""
    return il.number_of(il.floating(number * term.factor, dtype))


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
        return Case(case.cond, _scaled(value, term, dtype), False, value <= absorbs, case.bias)
    exact = case.exact or value <= min(absorbs, -1e30)
    return dataclasses.replace(case, mask=_sum(case.mask, value, term, dtype), exact=exact)


def _kept(site: Site, term: spec.MaskTerm) -> Expr:
    """Where a term keeps a score."""
    kept = site.element(term, term.value)
    if kept.kind != "bool":
        kept = (
            il.negate(il.eq0(kept))
            if kept.kind == "int"
            else il.float_compare("ne", kept, il.floating(0.0, ir.DataType.FLOAT))
        )
    return kept if term.keep_when else il.negate(kept)


def _hidden(site: Site, term: spec.MaskTerm, cases: list[Case]) -> list[Case]:
    """The cases after a mask has set exponentials to 0. These were taken against the row's maximum, which may be a
    hidden score's: the others are right only where nothing that was added to the scores makes them 0 as well. Where a
    row has a score that no mask met, the exponentials that an earlier mask hides are 0 anyway."""
    kept, seen = _kept(site, term), rows_see_a_key(site, visible(cases))
    result = [Case(il.negate(kept), -math.inf, True)]
    for case in cases:
        new = dataclasses.replace(case, cond=il.all_of((case.cond, kept)))
        if case.mask is None and sum(magnitude(e) * abs(factor) for e, factor in case.bias) > _NARROW:
            raise NotAMask(_HIDDEN_BESIDE.format("a bias"))
        if case.mask is not None and not (seen or case.mask == -math.inf):
            raise NotAMask(_HIDDEN_BESIDE.format(f"{case.mask:g}"))
        result.append(new if case.mask is None else Case(new.cond, -math.inf, True))
    return _merged([case for case in result if case.cond is not il.FALSE])


def _where(site: Site, term: spec.MaskTerm, case: Case) -> list[Case]:
    kept = _kept(site, term)
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
        result.append(Case(il.all_of((gone, cond)), _scaled(value, term, site.scores.dtype), True))
    return result


def _clamp(site: Site, term: spec.MaskTerm, case: Case) -> list[Case]:
    floor = il.float_value(site.element(term, term.value))
    if floor is None or floor * term.factor > MASKING:
        raise NotAMask("its scores are clamped at a number that real scores can reach")
    floor = _scaled(floor, term, site.scores.dtype)
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


def _lower(site: Site, term: spec.MaskTerm, case: Case) -> list[Case]:
    """min(score, number): the largest number of the type keeps a score, a hugely negative one takes its place."""
    dtype, result = site.tensors[term.value].dtype or site.scores.dtype, []
    for cond, leaf in leaves(site.element(term, term.value)):
        new = dataclasses.replace(case, cond=il.all_of((case.cond, cond)))
        if new.cond is il.FALSE:
            continue
        number = il.float_value(leaf)
        if number is not None and number >= largest(dtype):
            if number < math.inf and any(magnitude(e) == math.inf for e, _ in case.bias):
                raise NotAMask(_CUT_OFF_BIAS)
        elif number is not None and number * term.factor <= MASKING:
            new = _lowered(new, _scaled(number, term, dtype))
        else:
            which = "numbers that are not known" if number is None else f"{number:g}"
            raise NotAMask(f"its scores are cut off above at {which}, which scores can reach")
        result.append(new)
    return result


def _lowered(case: Case, number: float) -> Case:
    """The case where each of its scores is at most this hugely negative number."""
    if case.mask is None:
        if number > -math.inf and not sum(magnitude(e) * abs(factor) for e, factor in case.bias) < -number / 2:
            raise NotAMask(_LOWERED_BIAS.format(number))
        return Case(case.cond, number, True)
    if case.exact:
        return Case(case.cond, min(case.number, number), True)
    if number <= 2 * case.number:  # lower than that beside any score
        return Case(case.cond, number, True)
    if case.number > 2 * number:
        raise NotAMask(_LOWERED_BIAS.format(number))
    return case


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


_APPLY = {
    spec.TermKind.ADD: _add,
    spec.TermKind.WHERE: _where,
    spec.TermKind.BOOL: _where,
    spec.TermKind.CLAMP: _clamp,
    spec.TermKind.MIN: _lower,
    spec.TermKind.GATE: _gate,
}


def _as_float(e: Expr) -> Expr:
    return e if e.kind == "float" else il.cast_float(e, ir.DataType.FLOAT)


def _zeroed(site: Site, terms: Sequence[spec.MaskTerm], cases: list[Case], rows_are_full: bool) -> list[Case]:
    """Probabilities set to 0 after the softmax: harmless where they are masked anyway, and then such a row gives 0. Not
    beside a bias that may hide the others: they are 0 then, too, as the masked keys have all the weight."""
    for term in terms:
        if term.kind is not spec.TermKind.ZERO:
            continue
        kept = site.element(term, term.value)
        kept = kept if term.keep_when else il.negate(kept)
        result = []
        soft = [c for c in cases if c.mask is not None and c.mask > -math.inf]
        some = [c for c in soft if il.all_of((c.cond, il.negate(kept))) is not il.FALSE]
        if some and not rows_are_full and _has_huge_bias(cases):
            raise NotAMask(_ZEROED_BESIDE)
        for case in cases:
            if case.mask is None and il.all_of((case.cond, il.negate(kept))) is not il.FALSE:
                raise NotAMask("probabilities are set to 0 after its softmax, where they aren't masked before it")
            if some and any(il.all_of((c.cond, kept)) is not il.FALSE for c in soft):
                if not rows_see_a_key(site, visible(cases)):
                    raise NotAMask("probabilities are set to 0 in some of the rows, or keys, that are masked before it")
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
        if kept is not visible(cases) or (soft and _has_huge_bias(cases)):
            raise NotAMask("its output is set to 0 in other rows than those that see no key")
        cases = _merged([c if c.mask is None else dataclasses.replace(c, mask=-math.inf, bias=()) for c in cases])
    return cases


def _has_huge_bias(cases: Iterable[Case]) -> bool:
    """May a number be added to visible scores that hides them beside a mask?"""
    return any(not is_moderate(e) for c in cases if c.mask is None for e, _ in c.bias)


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
