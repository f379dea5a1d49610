# SPDX-License-Identifier: Apache-2.0
"""Views: a tensor described as a rearrangement of another one, through any chain of Reshape, Transpose, Slice, Split,
Expand …

Each axis of a view is a list of atoms, outermost first. An atom runs over part of one axis of the source (with a
stride, counted in elements of that axis) or repeats it (axis None: Expand, Tile, repeat_interleave). Heads, packed QKV
and GQA are read off the atoms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from faexport.sizes.dims import Dim, product

ONE = Dim.of(1)


@dataclasses.dataclass(frozen=True)
class Atom:
    axis: int | None  # axis of the source; None: a repetition
    stride: Dim
    size: Dim


Axis = tuple[Atom, ...]  # empty: size 1


def size_of(axis: Axis) -> Dim:
    return product(a.size for a in axis)


def merged(axis: Iterable[Atom]) -> Axis:
    """The same atoms with neighbours joined that run over one contiguous piece of the source."""
    result: list[Atom] = []
    for atom in axis:
        last = result[-1] if result else None
        if (
            last is not None
            and last.axis == atom.axis
            and (atom.axis is None or last.stride == atom.stride * atom.size)
        ):
            result[-1] = Atom(atom.axis, atom.stride, last.size * atom.size)
        else:
            result.append(atom)
    return tuple(result)


def take(atoms: Sequence[Atom], size: Dim) -> tuple[Axis, Axis] | None:
    """Splits (outer, rest) so that `outer` has exactly `size` elements, cutting an atom where needed."""
    need, outer, rest = size, [], list(atoms)
    while need != 1:
        if not rest:
            return None
        atom = rest.pop(0)
        remaining = need.divide(atom.size)
        if remaining is not None:
            outer.append(atom)
            need = remaining
            continue
        inner = atom.size.divide(need)
        if inner is None:
            return None
        outer.append(Atom(atom.axis, atom.stride * inner, need))
        rest.insert(0, Atom(atom.axis, atom.stride, inner))
        need = ONE
    return tuple(outer), tuple(rest)


def take_inner(atoms: Sequence[Atom], size: Dim) -> tuple[Axis, Axis] | None:
    """Splits (rest, inner) so that `inner` has exactly `size` elements."""
    rest = size_of(tuple(atoms)).divide(size)
    return None if rest is None else take(atoms, rest)


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor as a rearrangement of its source; `offsets[i]` is where it begins on axis i of the source."""

    axes: tuple[Axis, ...]
    offsets: tuple[Dim, ...]

    @staticmethod
    def whole(shape: Sequence[Dim]) -> View:
        axes = tuple(() if d == 1 else (Atom(i, ONE, d),) for i, d in enumerate(shape))
        return View(axes, tuple(Dim.of(0) for _ in shape))

    @property
    def shape(self) -> tuple[Dim, ...]:
        return tuple(map(size_of, self.axes))

    def transpose(self, perm: Sequence[int]) -> View:
        return dataclasses.replace(self, axes=tuple(self.axes[i] for i in perm))

    def reshape(self, shape: Sequence[Dim]) -> View | None:
        rest: Axis = tuple(a for axis in self.axes for a in axis)
        axes: list[Axis] = []
        for size in shape:
            split = take(rest, size)
            if split is None:
                return None
            axes.append(split[0])
            rest = split[1]
        return None if rest else dataclasses.replace(self, axes=tuple(axes))

    def insert(self, position: int) -> View:
        return dataclasses.replace(self, axes=(*self.axes[:position], (), *self.axes[position:]))

    def drop(self, position: int) -> View | None:
        """Without an axis of size 1."""
        if self.axes[position]:
            return None
        return dataclasses.replace(self, axes=self.axes[:position] + self.axes[position + 1 :])

    def expand(self, shape: Sequence[Dim]) -> View | None:
        """Broadcast to `shape` (aligned from the right): new axes and axes of size 1 repeat."""
        missing = len(shape) - len(self.axes)
        if missing < 0:
            return self.expand([*(ONE,) * -missing, *shape])
        axes = []
        for axis, size in zip(((),) * missing + self.axes, shape, strict=True):
            if axis and size != 1 and size_of(axis) != size:
                return None
            axes.append(axis if axis or size == 1 else (Atom(None, ONE, size),))
        return dataclasses.replace(self, axes=tuple(axes))

    def slice(self, position: int, start: Dim, size: Dim) -> View | None:
        """Elements start … start + size - 1 of one axis."""
        axis = merged(self.axes[position])
        if not axis:
            return self if size == 1 and start == 0 else None
        first, inner = axis[0], size_of(axis[1:])
        begin, count = start.divide(inner), size.divide(inner)
        if first.axis is None or begin is None or count is None:
            return None
        offsets = list(self.offsets)
        offsets[first.axis] = offsets[first.axis] + begin * first.stride
        kept = () if count == 1 else (Atom(first.axis, first.stride, count),)
        axes = (*self.axes[:position], (*kept, *axis[1:]), *self.axes[position + 1 :])
        return View(axes, tuple(offsets))

    def repeat(self, position: int, count: Dim, inner: bool) -> View:
        """Each element `count` times in a row (inner), or the whole axis `count` times."""
        copies = () if count == 1 else (Atom(None, ONE, count),)
        axis = self.axes[position]
        axes = (*self.axes[:position], (*axis, *copies) if inner else (*copies, *axis), *self.axes[position + 1 :])
        return dataclasses.replace(self, axes=axes)
