# SPDX-License-Identifier: Apache-2.0
"""Recognises ALiBi: a bias that is slope[h] times the key's position, up to a number that is the same for a whole row.

Softmax doesn't see such a number (unless there is a sink), and the operator's -slope * |p - j| differs from slope * j
by -slope * p wherever j <= p. So causal attention has ALiBi slopes if its bias grows by slope[h] from key to key;
without a causal window only -slope * |p - j|. Press, Smith, Lewis 2022, "Train Short, Test Long".
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr
from faexport.understand.index import logic as il
from faexport.understand.index.linear import linear_in
from faexport.understand.mask.site import Site
from faexport.understand.mask.window import Window
from faexport.understand.shapes.constants import tensor_of

_EXACT = {ir.DataType.FLOAT: 1 << 24, ir.DataType.DOUBLE: 1 << 53}  # whole numbers up to here convert without rounding
_RTOL = 1e-6


def slopes_of(site: Site, bias: tuple[tuple[Expr, float], ...], window: Window) -> np.ndarray | None:
    """float32 [H]: the slopes, if the (one) bias expression with its factor is ALiBi at the window's positions; else
    None."""
    if len(bias) != 1 or site.heads is None or site.scores.sinks:
        return None
    expr, factor = bias[0]
    slopes = []
    for head in range(site.heads):
        name = ia.only_atom(site.h)
        e = il.rewrite(expr, {name: ia.const(head)}) if name is not None else expr
        slope = _slope(e, site, window)
        if slope is None:
            return None
        slopes.append(slope * factor)
    found = np.asarray(slopes, np.float32)
    return found if np.isfinite(found).all() and found.any() else None


def in_words(slopes: np.ndarray) -> str:
    return "ALiBi, slopes " + ", ".join(f"{s:g}" for s in slopes[:8]) + ("…" if len(slopes) > 8 else "")


def _slope(e: Expr, site: Site, window: Window) -> float | None:
    """The factor of j in one head's bias."""
    if e.op == "load":
        return _slope_of_table(e, window)
    factor = 1.0
    while e.op == "fop" and e.args[0] in ("Mul", "Div", "Neg"):
        name, *operands = e.args[0], *e.args[2:]
        values = [il.float_value(x) for x in operands]
        if name == "Neg":
            factor, e = -factor, operands[0]
        elif values[-1] is not None and (name == "Mul" or values[-1] != 0):
            factor, e = (factor * values[-1] if name == "Mul" else factor / values[-1]), operands[0]
        elif name == "Mul" and values[0] is not None:
            factor, e = factor * values[0], operands[1]
        else:
            return None
    if e.op == "cast" and e.args[0].kind == "float" and e.args[1] in _EXACT:
        return None if (inner := _slope(e.args[0], site, window)) is None else inner * factor
    if e.op != "cast" or e.args[0].kind != "int" or e.args[1] not in _EXACT:
        return None
    steps = _steps(e.args[0], site, window)
    return None if steps is None else steps * factor


def _steps(position: Expr, site: Site, window: Window) -> int | None:
    """c where `position` is c * j + (a number of the row), or -c * |j - p| + (a number of the row) with p the row's
    position."""
    linear = linear_in(position, "j")
    if linear is not None:
        return linear[0] if window.right == 0 else None
    for m, c in position.args:
        if len(m) == 1 and m[0].op == "abs":
            rest = ia.sub(position, ia.scale(ia.of_atom(m[0]), c))
            distance = ia.sub(ia.add(site.i, window.offset), site.j)
            same = m[0].args[0] is distance or ia.neg(m[0].args[0]) is distance
            return -c if same and "j" not in ia.variables(rest) else None
    return None


def _slope_of_table(e: Expr, window: Window) -> float | None:
    """A constant table, e.g. [H, 1, max_len], read at a place that moves with j: its values must grow by equal
    steps."""
    value, index = e.args
    constant = tensor_of(value)
    if constant is None or window.right != 0 or constant.dtype not in _EXACT:
        return None
    moving = [k for k, x in enumerate(index) if "j" in ia.variables(x)]
    if len(moving) != 1 or any(ia.value_of(x) is None for k, x in enumerate(index) if k not in moving):
        return None
    linear = linear_in(index[moving[0]], "j")
    if linear is None or linear[0] != 1:
        return None
    table = constant.numpy()
    line = table[tuple(slice(None) if k in moving else ia.value_of(x) for k, x in enumerate(index))].astype(np.float64)
    if len(line) < 2:
        return None
    slope = (line[-1] - line[0]) / (len(line) - 1)
    straight = np.abs(line - (line[0] + slope * np.arange(len(line)))).max() <= _RTOL * max(np.abs(line).max(), 1e-30)
    return slope if straight and math.isfinite(slope) else None
