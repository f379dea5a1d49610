# SPDX-License-Identifier: Apache-2.0
"""What is said of arguments that are not what they should be. Asked only where a call has failed, since each question
costs time."""

from __future__ import annotations

import operator
from typing import Any

import torch

from faplugin._frameworks import told

# What PyTorch and Python raise then, in words that don't name the argument.
FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)


def refuse_operands(named: dict[str, Any]) -> None:
    """Raises TypeError or ValueError where one can't be read: no tensor, one that has its numbers in another way than
    one behind the other, one without axes, or one that is not where the first is."""
    first = next(iter(named.values()))
    for name, x in named.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; expected a torch.Tensor")
        if torch.compiler.is_compiling():
            continue
        if x.is_nested or x.is_quantized or x.layout is not torch.strided:
            kind = "nested" if x.is_nested else "quantized" if x.is_quantized else str(x.layout)
            raise TypeError(f"{name} is a {kind} tensor; expected a strided one of numbers")
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device}; expected {first.device}, where query is")
        if x.dim() == 0:
            raise ValueError(f"{name} has no axes; expected one or more")


def refuse_settings(scale: Any, causal: Any, softcap: Any, window: Any, scale_name: str, window_name: str) -> None:
    """Raises ValueError where one is not what it should be."""
    if scale is not None and not is_number(scale):
        raise ValueError(f"{scale_name} is {told(scale)}; expected a number, or None for 1/√D")
    if scale is not None and scale == 0:
        raise ValueError(f"{scale_name} is 0; expected another number, or None for 1/√D")
    if not is_number(causal) or causal not in (True, False):
        raise ValueError(f"causal is {told(causal)}; expected True or False")
    if not is_number(softcap):
        raise ValueError(f"softcap is {told(softcap)}; expected a number")
    try:
        left, right = map(operator.index, window)
    except FAILURES:
        raise ValueError(
            f"{window_name} is {told(window)}; expected two whole numbers: keys seen before and after the own "
            "position, -1 where there is no bound"
        ) from None


def refuse_flag(name: str, value: Any) -> None:
    """Raises TypeError where a value says neither yes nor no."""
    if not isinstance(value, int):
        raise TypeError(f"{name} is {told(value)}; expected True or False")


def is_number(value: Any) -> bool:
    try:
        float(value)
    except FAILURES:
        return False
    return not isinstance(value, (str, bytes))
