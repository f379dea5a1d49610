# SPDX-License-Identifier: Apache-2.0
"""Constant tensors as functions of their indices: uniform values, arithmetic sequences, triangles and bands.

A buffer such as `tril(ones(1024, 1024))` is recognised by testing all its values, never by its name. Used by the
interpreter.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from faexport.sizes import algebra as ia
from faexport.understand.index import logic as il
from faexport.understand.index.tensor import Element, Index, Tensor, kind_of, opaque

_MAX_ELEMENTS = 1 << 26
_LARGEST = 1 << 62  # up to here the numbers of a sequence are computed without overflow


def constant_tensor(value: ir.Value, constant: ir.TensorProtocol) -> Tensor | None:
    """The abstract tensor of a constant; elements at constant indices are numbers, others follow a recognised rule
    or are loads."""
    dtype = constant.dtype
    shape = tuple(ia.const(d) for d in constant.shape.numpy())
    if dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return None
    if kind_of(dtype) == "float" and not il.is_float(dtype) or constant.size > _MAX_ELEMENTS:
        return opaque(value, shape, dtype)
    rule: list[Element | None] = []

    def element(index: Index) -> ia.Expr:
        at = [k for x in index if (k := ia.value_of(x)) is not None]
        if len(at) == len(index):
            array = constant.numpy()
            if all(-n <= k < n for k, n in zip(at, array.shape, strict=True)):
                return il.scalar(array[tuple(at)], dtype)
        if not rule:
            rule.append(_recognise(constant.numpy(), dtype) if constant.size else None)
        return rule[0](index) if rule[0] is not None else il.load(value, index, kind_of(dtype))

    return Tensor(shape, dtype, element, value=value)


def _recognise(array: np.ndarray, dtype: ir.DataType) -> Element | None:
    """What gives an element by its index, for an array that follows a rule."""
    first = array.flat[0]
    if (array == first).all() or (first != first and np.isnan(array.astype(np.float64)).all()):
        uniform = il.scalar(first, dtype)
        return lambda index: uniform
    if kind_of(dtype) == "int":
        found = _arithmetic(array)
        if found is not None:
            return found
    return _two_valued(array, dtype)


def _arithmetic(array: np.ndarray) -> Element | None:
    """first + sum of step[k] * index[k], e.g. a buffer of positions."""
    first = int(array.flat[0])
    origin = [0] * array.ndim
    steps = []
    for axis, n in enumerate(array.shape):
        at = list(origin)
        at[axis] = min(1, n - 1)
        steps.append(int(array[tuple(at)]) - first)
    if abs(first) + sum(abs(s) * n for s, n in zip(steps, array.shape, strict=True)) > _LARGEST:
        return None
    grids = np.ogrid[tuple(slice(0, n) for n in array.shape)]
    if not (array == sum((s * g for s, g in zip(steps, grids, strict=True)), np.int64(first))).all():
        return None
    return lambda index: ia.add(ia.const(first), *(ia.scale(x, s) for x, s in zip(index, steps, strict=True)))


def _two_valued(array: np.ndarray, dtype: ir.DataType) -> Element | None:
    """Two values on the two sides of a diagonal, or inside and outside a band, of the last two axes that vary."""
    axes = [k for k, n in enumerate(array.shape) if n > 1 and not (array == array.take([0], axis=k)).all()]
    if len(axes) == 1:
        return _step(array, axes[0], dtype)
    if len(axes) != 2 or any(array.shape[k] < 2 for k in axes):
        return None
    flat = array[tuple(slice(None) if k in axes else 0 for k in range(array.ndim))]
    outside, inside = flat[0, -1], flat.diagonal()[0]
    offsets = np.arange(flat.shape[1])[None, :] - np.arange(flat.shape[0])[:, None]
    for core in (flat == inside, flat != outside):
        if not core.any() or core.all():
            continue
        low, high = int(offsets[core].min()), int(offsets[core].max())
        rest = flat[~core]
        if (
            not ((offsets >= low) & (offsets <= high) == core).all()
            or not (flat[core] == flat[core][0]).all()
            or not (rest == rest[0]).all()
        ):
            continue
        return _band(
            axes,
            low,
            high,
            (1 - flat.shape[0], flat.shape[1] - 1),
            il.scalar(flat[core][0], dtype),
            il.scalar(rest[0], dtype),
        )
    return None


def _band(axes: list[int], low: int, high: int, extent: tuple[int, int], inside: ia.Expr, outside: ia.Expr) -> Element:
    def element(index: Index) -> ia.Expr:
        offset = ia.sub(index[axes[1]], index[axes[0]])
        bounds = []
        if low > extent[0]:
            bounds.append(il.ge0(ia.sub(offset, ia.const(low))))
        if high < extent[1]:
            bounds.append(il.ge0(ia.sub(ia.const(high), offset)))
        return il.choose(il.all_of(bounds), inside, outside)

    return element


def _step(array: np.ndarray, axis: int, dtype: ir.DataType) -> Element | None:
    """One value up to an index, another from there on."""
    line = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])[0]
    change = np.flatnonzero(line[1:] != line[:-1])
    if len(change) != 1:
        return None
    last = int(change[0])
    before, after = il.scalar(line[0], dtype), il.scalar(line[-1], dtype)
    return lambda index: il.choose(il.ge0(ia.sub(ia.const(last), index[axis])), before, after)
