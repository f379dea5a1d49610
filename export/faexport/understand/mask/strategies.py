# SPDX-License-Identifier: Apache-2.0
"""The strategies by which the mask of a site is put into the operator's words, in the order in which they are tried.

Each looks at the same problem and gives a mask, or None where the site is not its own; a site that no way of writing is
right for is refused (NotAMask). A strategy works on a draft of its own, so one that gives up leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from faexport import spec
from faexport.graph.nodes import HALVES, dtype_name
from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr
from faexport.understand.index import logic as il
from faexport.understand.index.tensor import Unknown
from faexport.understand.mask.bias import write_bias
from faexport.understand.mask.draft import Draft
from faexport.understand.mask.emit import Emitter
from faexport.understand.mask.empty_rows import TwoMasks, empty_rows, lower_of_two, two_masks
from faexport.understand.mask.magnitudes import (
    ABSORBS,
    MASKING,
    fill_keeps_scores,
    is_moderate,
    keeps_scores,
    known_range,
    largest,
)
from faexport.understand.mask.options import MaskOptions
from faexport.understand.mask.site import NotAMask, Site
from faexport.understand.mask.terms import (
    Case,
    cases_of,
    check_clamp,
    fills,
    fills_of,
    leaves,
    rows_see_a_key,
    summands,
    visible,
    zeros_and_ones,
)
from faexport.understand.mask.window import split
from faexport.understand.mask.words import axes_of, kind_of, rounding_text, window_text

_LOWEST = float(np.finfo(np.float32).min)
_LOWER_BIAS = (
    "its mask puts {:g} in place of scores, and what was added to others may be lower: then the masked keys would be "
    "seen instead (with --assume full-rows or right-padding a visible key is taken to outweigh them)"
)
_BOTH_MASKS = (
    "a float mask is added to scores that another mask replaced by a number: rows of padding only would come out "
    "differently (--assume full-rows or right-padding rules them out)"
)
_UNDONE = "{:g} is added to its scores beside numbers that hide keys: the sum of both hides nothing, or leaves its type"
_NARROWED = (
    "{:g} hides keys, and a Cast to {} makes -inf of it behind that: a row that sees no key gives NaN, in whose place "
    "are zeros, where a runtime doesn't leave that Cast out (--assume full-rows rules such rows out)"
)
_CLAMPED_BEHIND = "its scores are clamped behind a Cast to {}, which makes -inf of numbers that they are masked by"
_NOTHING_LEFT = "{:g} is added to its scores in {}, which leaves nothing of them"
_NARROWER = "{:g} hides keys in {}, and then its scores are masked or multiplied in {}"
_DOUBLE = "what is added to its scores is float64, which the operator doesn't have"
_SCALED_BETWEEN = "its scores are scaled between a bias and the number that they are clamped at"
_OTHER_ORDER = (
    "beside {:g} little is left of scores in a row that sees no key, and what, depends on the order of its additions, "
    "which the operator does not keep (--assume full-rows rules such rows out)"
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One site, what happens to each of its scores, and what is asked before a strategy is chosen."""

    emitter: Emitter
    site: Site
    options: MaskOptions

    @functools.cached_property
    def cases(self) -> list[Case]:
        return cases_of(self.site, self.options.assume_full_rows)

    @functools.cached_property
    def is_soft(self) -> bool:
        """Is a score masked by a finite number?"""
        return any(c.mask is not None and c.mask > -math.inf for c in self.cases)

    @functools.cached_property
    def rows_are_full(self) -> bool:
        """Is it known, or assumed, that every row sees a key?"""
        return self.options.assume_full_rows or self._first_key_is_kept()

    @functools.cached_property
    def is_moderate(self) -> bool:
        """Are all biases numbers like scores? Beside one that is itself a mask, a finite fill isn't sure to mask."""
        return all(is_moderate(e) for e in self._added if e.op != "float")

    @functools.cached_property
    def keeps_scores(self) -> bool:
        """Is what is added to scores so small that they keep their last bits, or so huge that nothing is left of them,
        wherever a row may see no other key? Else what rounding leaves of scores depends on the scores themselves."""
        fills = (c.mask for c in self.cases if c.mask is not None)
        return self.rows_are_full or (all(map(keeps_scores, self._added)) and all(map(fill_keeps_scores, fills)))

    @functools.cached_property
    def _added(self) -> list[Expr]:
        """What is added to scores, all cases apart."""
        added = [t for t in self.site.terms if t.kind is spec.TermKind.ADD]
        return [e for t in added for _, leaf in leaves(self.site.element(t, t.value)) for e in summands(leaf)]

    def draft(self) -> Draft:
        return Draft(self.emitter, self.site, self.options)

    def _first_key_is_kept(self) -> bool:
        """With right padding assumed: is key 0 visible in every row, and without a huge bias?"""
        key = ia.only_atom(self.site.j)
        if not self.options.assume_right_padding or key is None:
            return False
        first = {key: ia.ZERO}
        moved = [
            (il.rewrite(c.cond, first), [il.rewrite(e, first) for e, _ in c.bias]) for c in self.cases if c.mask is None
        ]
        for _, bias in moved:
            for e in bias:
                ones = {a: ia.ONE for a in ia.atoms(e, "load") if a.kind == "int" and a.args[0].is_graph_input()}
                if not is_moderate(il.rewrite(e, ones)):
                    return False
        return il.any_of(cond for cond, _ in moved) is il.TRUE


Strategy = Callable[[Problem], spec.Mask | None]


def mask_of(emitter: Emitter, site: Site, options: MaskOptions) -> spec.Mask:
    """The mask by the first strategy that the site is for. Raises NotAMask with the reason where it can't be said, and
    Unknown where a part of it can't be written."""
    problem = Problem(emitter, site, options)
    _check_types(site)
    _check_casts(problem)
    mask = next(mask for strategy in STRATEGIES.values() if (mask := strategy(problem)) is not None)
    if mask.attn_bias is not None and site.scores.dtype is ir.DataType.DOUBLE:
        raise NotAMask(_DOUBLE, spec.RefusalKind.TYPE)
    mask.bias_keeps_scores = mask.rows_see_a_key or problem.keeps_scores
    return mask


def _check_types(site: Site) -> None:
    """Raises NotAMask where a mask's number met the scores in a narrower type than others do: how it is rounded there,
    and where a scale makes it infinite, is not what the wider type does. And where one above all scores met them in
    half precision."""
    for term in site.terms:
        own = site.type_of(term)
        if own in HALVES and site.scores.dtype not in HALVES:
            if number := next((x / term.factor for x in fills_of(site, term) if x > -math.inf), None):
                raise NotAMask(_NARROWER.format(number, dtype_name(own), dtype_name(site.scores.dtype)))
        if own in HALVES and term.kind is spec.TermKind.ADD:
            added = site.element(term, term.value)
            highest = max(x * term.factor for x in known_range(added))
            if highest >= -MASKING and any(abs(il.number_of(x)) >= -MASKING for x in ia.atoms(added, "float")):
                raise NotAMask(_NOTHING_LEFT.format(highest, dtype_name(own)))


def _is_narrower(dtype: ir.DataType | None, than: ir.DataType | None) -> bool:
    return dtype is not None and than is not None and largest(dtype) < largest(than)


def _check_casts(problem: Problem) -> None:
    """Raises NotAMask where a Cast behind a mask makes its number infinite and zeros take the place of NaN, and where a
    Cast stands between a mask and the number that scores are clamped at: what it makes infinite is that number then."""
    site = problem.site
    for k, term in enumerate(site.terms):
        clamps = [t.narrowed for t in site.terms[k + 1 :] if t.kind is spec.TermKind.CLAMP]
        own = site.type_of(term)
        if _is_narrower(term.narrowed, own) and any(_is_narrower(term.narrowed, dtype) for dtype in clamps):
            raise NotAMask(_CLAMPED_BEHIND.format(dtype_name(term.narrowed)))
    for term in site.terms if site.scores.nan_guard and not problem.options.assume_full_rows else ():
        lowest = -math.inf if term.narrowed is None else -largest(term.narrowed)
        number = next((x for x in fills_of(site, term) if -math.inf < x < lowest), None)
        if number is not None and not rows_see_a_key(site, visible(problem.cases)):
            raise NotAMask(_NARROWED.format(number, dtype_name(term.narrowed)))


# ------------------------------------------------------------------------------------------ numbers above any score


def numbers_that_undo_masks(problem: Problem) -> spec.Mask | None:
    """Numbers as large as those of masks, but positive: beside them a mask hides nothing, or their sum leaves its type.
    One tensor that is added is a bias all the same."""
    site, ranges = problem.site, []
    for term in (t for t in site.terms if t.kind is spec.TermKind.ADD):
        numbers = [x * term.factor for x in known_range(site.element(term, term.value))]
        ranges.append((min(numbers), max(numbers)))
    highest = max((high for _, high in ranges), default=0.0)
    if not highest >= -MASKING:
        return None
    deepest = [*(low for low, _ in ranges), *(x for x in fills(site) if x > -math.inf)]
    hides = any(t.kind is not spec.TermKind.ADD for t in site.terms) or min(deepest) <= MASKING
    if not hides or (highest < math.inf and not min(deepest, default=0.0) <= MASKING):
        return None
    if len(site.terms) > 1 or site.terms[0].factor != 1:
        raise NotAMask(_UNDONE.format(highest))
    draft = problem.draft()
    draft.mask.attn_bias = draft.placed(site.terms[0])
    added = site.element(site.terms[0], site.terms[0].value)
    draft.fact(f"bias {axes_of(added)}", added)
    draft.note_infinite([added])
    return draft.finished()


# ------------------------------------------------------------------------------------------ float masks of any values


def zeros_and_ones_in_two_masks(problem: Problem) -> spec.Mask | None:
    """A finite mask beside a float mask that the model makes of integers, if it is two masks where they are 0 and 1."""
    if not problem.is_soft or problem.rows_are_full or problem.is_moderate:
        return None
    known = zeros_and_ones(problem.site)
    atoms = (ia.only_atom(cast.args[0]) for cast in known)
    names = sorted({atom.args[0].name or "?" for atom in atoms if atom is not None})
    supposed = Problem(problem.emitter, problem.site.supposing(known), problem.options)
    try:
        draft = _two_masks(supposed) if names and supposed.is_moderate else None
    except NotAMask:
        return None
    if draft is None:
        return None
    draft.assume(f"{', '.join(names)} holds zeros and ones")
    return draft.finished()


def float_masks_as_they_are(problem: Problem) -> spec.Mask | None:
    """The sum of all terms as a bias. A score replaced by a number that absorbs any score had that number added, and
    what was added to it before is replaced, too."""
    if not problem.is_soft or problem.rows_are_full or problem.is_moderate:
        return None
    draft, site = problem.draft(), problem.site
    parts: list[tuple[ir.Value, float]] = []
    for term in site.terms:
        if term.kind is spec.TermKind.ADD:
            parts.append((draft.placed(term), term.factor))
        elif term.kind is spec.TermKind.WHERE and term.fill is not None:
            fill = site.element(term, term.fill)
            if fill.op != "float":
                raise NotAMask(_BOTH_MASKS)
            number = il.number_of(fill)
            if not number <= -1e30 or any(factor != term.factor for _, factor in parts):
                raise NotAMask(_LOWER_BIAS.format(number) if parts else _BOTH_MASKS)
            kept = site.element(term, term.value)
            kept = kept if term.keep_when else il.negate(kept)
            zero = il.floating(0.0, site.scores.dtype)
            if parts:
                before = draft.total([(value, 1.0) for value, _ in parts])
                value = draft.emitter.node("Where", [draft.value(kept), before, draft.number(number)])
            else:
                value = draft.value(il.choose(kept, zero, fill))
            parts = [(value, term.factor)]
        elif term.kind is spec.TermKind.CLAMP:
            parts = _clamped(draft, term, parts)
        else:
            raise NotAMask(_BOTH_MASKS)
    weak = _weak_fills(site)
    in_order = len(parts) == 1 and parts[0][1] == 1
    if weak and not in_order and not rows_see_a_key(site, visible(problem.cases)):
        raise NotAMask(_OTHER_ORDER.format(max(weak)))
    draft.sum(parts)
    draft.fact("a finite mask beside a float mask: both stay a bias")
    added = [(site.element(t, t.value), t.factor) for t in site.terms if t.kind is spec.TermKind.ADD]
    draft.assume_order(added)
    _assume_nothing_undone(draft)
    if site.terms[-1].kind is not spec.TermKind.CLAMP:
        draft.note_infinite(e for e, _ in added)
    return draft.finished()


def _assume_nothing_undone(draft: Draft) -> None:
    """A number in the place of scores, and one as large beside it, of the other sign, leave nothing of these. The
    operator adds both to them, and they are there."""
    site, replaced = draft.site, False
    for term in site.terms:
        added = site.element(term, term.value) if term.kind is spec.TermKind.ADD and replaced else None
        is_known = added is None or all(il.float_value(leaf) is not None for _, leaf in leaves(added))
        if added is not None and not is_known and not is_moderate(added):
            draft.assume("no number that is added to hidden scores undoes the one in their place")
            return
        replaced = replaced or term.kind is spec.TermKind.WHERE


def _clamped(draft: Draft, term: spec.MaskTerm, parts: list[tuple[ir.Value, float]]) -> list[tuple[ir.Value, float]]:
    """What was added so far, behind max(scores, a number)."""
    floor = il.float_value(draft.site.element(term, term.value))
    if floor is None:
        raise NotAMask(_BOTH_MASKS)
    if not parts:
        return parts
    check_clamp(term, floor, draft.site.scores.dtype)
    if any(factor != term.factor for _, factor in parts):
        raise NotAMask(_SCALED_BETWEEN)
    value = draft.emitter.node("Max", [draft.total([(value, 1.0) for value, _ in parts]), draft.number(floor)])
    if term.node.op_type == "Clip":  # without an upper end, it cuts off at the largest number
        value = draft.emitter.node("Min", [value, draft.number(largest(draft.site.scores.dtype))])
    return [(value, term.factor)]


# ------------------------------------------------------------------------------------------ two masks


def window_then_padding(problem: Problem) -> spec.Mask | None:
    """A window and a padding mask, one after the other, both finite."""
    if not problem.is_soft or problem.rows_are_full:
        return None
    draft = _two_masks(problem)
    return None if draft is None else draft.finished()


def _two_masks(problem: Problem) -> Draft | None:
    draft, site = problem.draft(), problem.site
    found = two_masks(site, problem.cases)
    if found is None:
        return None
    mask, zero, fill = draft.mask, *(il.floating(x, ir.DataType.FLOAT) for x in (0.0, _LOWEST))
    bias = il.choose(found.padding, zero, fill)
    try:
        padding, added = draft.of_every_key(found.padding), draft.value(bias)
        rows = empty_rows(draft.emitter, site, found, padding)
    except Unknown:
        return None
    if not draft.position(found.window):
        return None
    mask.empty_rows, mask.window_left, mask.window_right = rows, found.window.left, found.window.right
    draft.fact(window_text(found.window), *found.window.parts)
    if not found.else_all:  # the operator then gives the mean over the window, where all of it is padding
        mask.attn_bias, added.dtype = added, ir.DataType.FLOAT
        mask.rows_see_a_key = rows_see_a_key(site, il.all_of(found.window.parts))
        draft.fact(f"{kind_of(found.padding)} mask {axes_of(bias)}, as a bias", found.padding)
    else:
        mask.attn_mask, mask.empty_row = padding, spec.EmptyRow.MEAN
        draft.fact(f"{kind_of(found.padding)} mask {axes_of(found.padding)}", found.padding)
    text = f"a row that sees no key gives {found.mean_in_words}, written behind the operator"
    draft.fact(text)
    draft.assume_absorbed_in_half()
    _note_fills(draft, problem.cases)
    return draft


def lower_of_window_and_given(problem: Problem) -> spec.Mask | None:
    """The lower of a window's mask and a given one."""
    found = None if problem.is_soft else lower_of_two(problem.site)
    if found is None:
        return None
    draft = problem.draft()
    node, (zero, fill) = draft.emitter.node, (draft.number(x) for x in (0.0, found.fill))
    try:
        given = draft.of_every_key(found.given)
        above, counted = node("Greater", [given, fill]), node("GreaterOrEqual", [given, fill])
        rows = None
        if not problem.options.assume_full_rows:
            rows = empty_rows(draft.emitter, problem.site, TwoMasks(found.window, il.TRUE, False), above, counted)
    except Unknown:
        return None
    if not draft.position(found.window):
        return None
    mask, window = draft.mask, found.window
    mask.empty_rows, mask.window_left, mask.window_right = rows, window.left, window.right
    mask.attn_bias = node("Min", [given, zero])
    draft.fact(window_text(window), *window.parts)
    draft.fact(f"bias {axes_of(found.given)}", found.given)
    if rows is not None:
        draft.fact("a row that sees no key gives the mean of all values above -inf, written behind the operator")
    draft.note_infinite([found.given])
    return draft.finished()


# ------------------------------------------------------------------------------------------ what is visible


def window_lengths_and_rest(problem: Problem) -> spec.Mask:
    """What hides keys as window, lengths and bool mask, what remains as slopes and a bias: right for any site."""
    draft, cases = problem.draft(), problem.cases
    seen, bias = _decide(draft, problem, cases)
    only_window = len(bias) == len(cases) and any(c.mask is not None for c in cases)
    window = draft.visibility(seen, only_window)
    write_bias(draft, bias, window)
    _note_fills(draft, [c for c in cases if c not in bias])
    return draft.finished()


def _note_fills(draft: Draft, hidden: list[Case]) -> None:
    """A key that a number hides is hidden while scores stay far above that number."""
    weak = _weak_fills(draft.site)
    if weak and any(c.mask is not None for c in hidden):
        draft.assume(f"scores stay far above the fill {max(weak):g}")


def _weak_fills(site: Site) -> list[float]:
    """The numbers that hide keys and do not absorb scores."""
    return [number for number in fills(site) if number > ABSORBS.get(site.scores.dtype, -math.inf)]


def _note_rounding(draft: Draft, soft: list[Case], cases: list[Case]) -> None:
    """What a fill of medium depth leaves of the scores. Raises NotAMask where the operator would leave something else.

    A row may have nothing but keys of one depth, so each depth counts, unless every row has a key that is less deep."""
    half, weak = draft.site.half, [c for c in soft if not c.exact]
    for case in (c for c in weak if not c.at_once):
        less_deep = (c.cond for c in cases if c.mask is None or c.mask >= case.number - MASKING)
        if not rows_see_a_key(draft.site, il.any_of(less_deep)):
            raise NotAMask(_OTHER_ORDER.format(case.number))
    # Beside -65504 nothing is left of a score in float16, yet in float32, where the operator adds.
    rounded = [c for c in soft if c in weak or (half is not None and c.number > ABSORBS[ir.DataType.FLOAT])]
    for number in sorted({c.number for c in rounded}):
        if half is None:
            draft.fact(f"{rounding_text(number, draft.site.scores.dtype)}, as before")
        elif number >= -largest(half):
            text = f"{rounding_text(number, half)} where a runtime adds in {dtype_name(half)}, or casts to it"
            draft.assume(f"{text}, as the operator does not")
        else:
            draft.fact(
                f"a row that sees no key gives numbers (NaN before, where {number:g} is cast to {dtype_name(half)})"
            )


def _decide(draft: Draft, problem: Problem, cases: list[Case]) -> tuple[Expr, list[Case]]:
    """(the condition of being visible, the cases that make up the bias)."""
    kept = [c for c in cases if c.mask is None]
    hard = [c for c in cases if c.mask == -math.inf]
    soft = [c for c in cases if c.mask is not None and c.mask > -math.inf]
    seen = visible(cases)
    sure = rows_see_a_key(draft.site, seen)
    draft.mask.rows_see_a_key = sure and problem.is_moderate
    if soft and not sure and problem.options.assume_full_rows:
        draft.assume("every row sees a key")
        return seen, kept
    if not soft or sure or draft.site.scores.sinks:  # with a sink such a row gives 0, whatever the fill
        if not sure:
            _note_empty_rows(draft)
        return seen, kept
    same = len({(c.mask, c.replaced) for c in soft}) == 1 and all(c.exact for c in soft) and not hard
    if same:
        draft.mask.empty_row = spec.EmptyRow.MEAN
        _note_mean(draft, soft[0])
        return seen, kept
    deepest = _deepest(draft.site, soft, cases)
    if deepest:
        hidden = [dataclasses.replace(c, mask=-math.inf, bias=()) if c in deepest else c for c in cases]
        return _decide(draft, problem, hidden)
    if any(c.replaced and not c.exact for c in soft) or any(c.replaced and c.number > -1e30 for c in soft):
        raise NotAMask(
            "its mask gives rows without a visible key a softmax of other numbers (--assume full-rows rules them out)"
        )
    draft.fact(
        f"rows that may see no key would give another softmax without the {soft[0].mask:g} added: it stays a bias "
        "(--assume full-rows rules them out)"
    )
    _note_rounding(draft, soft, cases)
    written = il.negate(il.any_of(c.cond for c in hard)), il.any_of(c.cond for c in cases if c not in hard)
    return max(written, key=lambda left: len(split(draft.site, left)[0].parts)), cases


def _deepest(site: Site, soft: list[Case], cases: list[Case]) -> list[Case]:
    """Masks that weigh nothing beside another one, if each row has a key that they don't hide."""
    deepest = [c for c in soft if c.number <= ABSORBS[ir.DataType.FLOAT]]
    others = [c for c in soft if c not in deepest]
    if not others or min(c.number for c in others) < -1e8:
        return []
    left = il.any_of(c.cond for c in cases if c.mask is None or c in others)
    return deepest if rows_see_a_key(site, left) else []


def _note_empty_rows(draft: Draft) -> None:
    if not draft.gives_zero():
        draft.fact("a row that sees no key gives 0 (NaN before)")


def _note_mean(draft: Draft, case: Case) -> None:
    draft.fact(f"a row that sees no key gives the mean of all values, as the fill {case.mask:g} does")
    if not case.replaced or any(t.kind is spec.TermKind.ADD and fills_of(draft.site, t) for t in draft.terms):
        draft.assume_absorbed_in_half()


STRATEGIES: dict[str, Strategy] = {
    "numbers that undo masks": numbers_that_undo_masks,
    "zeros and ones in two masks": zeros_and_ones_in_two_masks,
    "float masks as they are": float_masks_as_they_are,
    "a window, then padding": window_then_padding,
    "the lower of a window and a given mask": lower_of_window_and_given,
    "window, lengths and the rest": window_lengths_and_rest,
}
