# SPDX-License-Identifier: Apache-2.0
"""What is said of masks in the report. Called by strategies.py, draft.py, bias.py and match/."""

from __future__ import annotations

import onnx_ir as ir

from faexport.sizes import algebra as ia
from faexport.sizes.algebra import Expr
from faexport.sizes.printing import to_text
from faexport.understand.mask.magnitudes import step_beside
from faexport.understand.mask.window import Window


def rounding_text(fill: float, dtype: ir.DataType) -> str:
    """What a fill that doesn't absorb scores leaves of them in a row where it is added to all."""
    return f"in a row that sees no key scores are rounded to steps of {step_beside(fill, dtype):.2g} beside {fill:g}"


def window_text(window: Window) -> str:
    place = "" if ia.value_of(window.offset) == 0 else f" from position {to_text(window.offset)}"
    if window.right == 0:
        return ("causal" if window.left < 0 else f"causal, sliding window of {window.left + 1}") + place
    sides = [f"{n} {word}" for n, word in ((window.left, "before"), (window.right, "after")) if n >= 0]
    return "window: " + ", ".join(sides) + place


def kind_of(cond: Expr) -> str:
    return {frozenset("bj"): "padding", frozenset("j"): "key"}.get(ia.variables(cond), "bool")


def axes_of(expr: Expr) -> str:
    """E.g. "[B, 1, 1, S_kv]": the axes that an element depends on."""
    names, sizes = ia.variables(expr), ("B", "H", "S_q", "S_kv")
    return f"[{', '.join(size if v in names else '1' for v, size in zip('bhij', sizes, strict=True))}]"
