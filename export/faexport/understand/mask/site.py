# SPDX-License-Identifier: Apache-2.0
"""The place of a chain of mask terms: their elements over (b, h, i, j), and which sizes meet the axes of the scores.
Every other file of this folder that reads elements of terms does so through a Site."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import onnx_ir as ir

from faexport import spec
from faexport.graph.nodes import HALVES
from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr
from faexport.sizes.dims import Dim
from faexport.understand.index import logic as il
from faexport.understand.index.interpreter import Interpreter
from faexport.understand.index.tensor import Tensor, broadcast_index

_AXES = {"T": "keys", "B": "batch entries", "M": "batch entries", "W": "batch entries", "S": "rows", "H": "heads"}
_TOO_LARGE = (
    "its mask may have more {} than the scores, which would then take its size: both sizes have names of their own"
)


class NotAMask(Exception):
    """The terms can't be expressed; the message is the reason of the refusal."""

    def __init__(self, reason: str, kind: spec.RefusalKind = spec.RefusalKind.OTHER):
        super().__init__(reason)
        self.kind = kind


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
        whole = ia.only_atom(keys)
        parts = {*whole.args} if whole is not None and whole.op == "meet" else {keys}
        for size in self._meeting_keys() * 2:  # what is found of one may be a part of another
            known = ia.replace(size, found)
            atom = ia.only_atom(known)
            holds_keys = atom is not None and atom.op == "meet" and parts <= {*atom.args}
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
                plain = self.ctx.analysis.known_shape(value) if value is not None else ()
                letters = term.axes[len(term.axes) - len(shape) :]
                for letter, size, given in zip(letters, shape, plain, strict=True):
                    dim = dims.get(letter)
                    own = self.ctx.size(dim) if dim is not None else None
                    whole = self.sizes[letter][0] if letter in self.sizes else own
                    fixed = letter == "T" and self._has_keys(size)
                    fixed = fixed or (dim is not None and self.ctx.analysis.leaves(given, dim))
                    if not fixed and not self._fits(self.simplified(size), whole):
                        raise NotAMask(_TOO_LARGE.format(_AXES.get(letter, "entries")), spec.RefusalKind.UNLIKE_SIZES)
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
        if whole is None:
            return False
        atom = ia.only_atom(whole)
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

    def _has_keys(self, size: Expr) -> bool:
        """Does an axis of `size` that meets the keys have as many elements, or 1, wherever the model runs? Where it had
        more than one key has, the product with the values would fail, but for an Einsum."""
        if not self.scores.same_keys or not self.scores.one_key_spreads:
            return self.scores.same_keys
        keys, number = self.sizes["T"][0], ia.value_of(self.sizes["T"][0])
        if size is keys or ia.value_of(size) == 1 or number not in (None, 1):
            return True
        return ia.is_one_with(keys, size)

    def _meeting_keys(self) -> list[Expr]:
        """Sizes made of one atom that the terms' last axes have: each is that of the keys, or 1."""
        found: dict[Expr, None] = {}
        for term in self.terms:
            for value in (term.value, term.fill):
                shape = self.tensors[value].shape if value is not None else ()
                letters = term.axes[len(term.axes) - len(shape) :]
                keys = (size for letter, size in zip(letters, shape, strict=False) if letter == "T")
                found.update((size, None) for size in keys if self._has_keys(size))
        parts = [x for size in found for atom in (ia.only_atom(size),) if atom and atom.op == "meet" for x in atom.args]
        return [size for size in dict.fromkeys([*found, *parts]) if ia.only_atom(size) is not None]

    def type_of(self, term: spec.MaskTerm) -> ir.DataType | None:
        """The type in which a term met the scores, which may be narrower than that of its values here; None where none
        did, or nothing is known."""
        return self.ctx.analysis.dtype(term.node.outputs[0]) if term.kind.meets_scores else None

    @property
    def half(self) -> ir.DataType | None:
        """The half-precision type that masked scores have in front of their softmax, if they have one: there they are
        rounded as the operator, which adds in float32, does not."""
        types = [self.scores.dtype, *(t for term in self.terms for t in (self.type_of(term), term.narrowed))]
        return next((dtype for dtype in types if dtype in HALVES), None)

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
            raise NotAMask("the number of heads in a group isn't known", spec.RefusalKind.UNKNOWN_SIZES)
        per_group = self.ctx.size(dims[inner])
        return ia.floordiv(whole, per_group) if letter in "KM" else ia.modulo(whole, per_group)
