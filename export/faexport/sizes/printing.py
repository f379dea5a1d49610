# SPDX-License-Identifier: Apache-2.0
"""Index expressions as text, for facts in the report and for debugging."""

from __future__ import annotations

from faexport.sizes.algebra import Expr

_LIMIT = 400  # characters
_FORMS = {"ge0": "{} >= 0", "eq0": "{} == 0", "not": "not({})", "choose": "({1} if {0} else {2})"}


def to_text(expr: Expr) -> str:
    text = _text(expr)
    return text if len(text) <= _LIMIT else text[:_LIMIT] + "…"


def _text(e: Expr) -> str:
    if e.op == "poly":
        return _poly(e)
    if e.op in ("sym", "var"):
        return e.args[0]
    if e.op in ("true", "false"):
        return e.op
    if e.op == "float":
        return f"{e.args[0]:g}" if e.args[0] != "nan" else "nan"
    if e.op == "load":
        return f"{e.args[0].name}[{', '.join(map(_text, e.args[1]))}]"
    if e.op in ("and", "or"):
        return "(" + f" {e.op} ".join(map(_text, e.args)) + ")"
    if e.op in _FORMS:
        return _FORMS[e.op].format(*map(_text, e.args))
    if e.op == "fcmp":
        return f"({_text(e.args[1])} {e.args[0]} {_text(e.args[2])})"
    name = e.args[0] if e.op == "fop" else e.op
    return f"{name}({', '.join(_text(a) for a in e.args if isinstance(a, Expr))})"


def _poly(e: Expr) -> str:
    if not e.args:
        return "0"
    parts = [("*".join(sorted(map(_text, m))), c) for m, c in e.args]
    text = ""
    for body, c in sorted(parts, key=lambda part: (part[1] < 0, not part[0], part[0])):  # numbers behind names
        number = "" if body and abs(c) == 1 else str(abs(c)) + ("*" if body else "")
        sign = "-" if c < 0 else ("+" if text else "")
        text += f" {sign} {number}{body}" if text else f"{sign}{number}{body}"
    return text


Expr.__repr__ = to_text  # type: ignore[method-assign,assignment]  # algebra.py can't import this module
