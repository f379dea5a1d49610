# SPDX-License-Identifier: Apache-2.0
"""Remembers what functions of expressions answered while the outermost of them runs: nested choices ask the same
hundreds of times. Used by logic.py.

The answers are dropped at its end, since expressions hold tensors of a model, which may be edited and fused again.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Running(threading.local):
    known: dict[tuple[Any, ...], Any] | None = None


_running = _Running()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Inside, answers are remembered."""
    if _running.known is not None:
        yield
        return
    _running.known = {}
    try:
        yield
    finally:
        _running.known = None


def remembered(function: _Function) -> _Function:
    """For a function whose answer depends on its arguments alone."""

    @functools.wraps(function)
    def ask(*question: Any) -> Any:
        known = _running.known
        if known is None:
            with kept():
                return ask(*question)
        key = (function, *question)
        if key not in known:
            known[key] = function(*question)
        return known[key]

    return cast(_Function, ask)
