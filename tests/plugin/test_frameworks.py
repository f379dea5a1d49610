# SPDX-License-Identifier: Apache-2.0
"""What is asked of an array's framework: memory on the stream of the call, or nothing where results are given."""

from __future__ import annotations

import contextlib
import sys
import types

import faplugin
import numpy as np
import pytest
from faplugin import _frameworks

SHAPE = (2, 3, 5, 8)


class Foreign:
    """An array of a framework that nobody knows: it hands out its memory and does no more."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __dlpack__(self, **_: object) -> object:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def test_results_with_out_need_no_framework() -> None:
    """The joined cache needs a workspace, since no present is wanted."""
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(SHAPE, np.float32) for name in ("query", "key", "value", "past_key", "past_value")
    }
    expected = faplugin.attention(**arrays, is_causal=True)
    out = np.full(SHAPE, np.nan, np.float32)
    foreign = {name: Foreign(array) for name, array in arrays.items()}
    faplugin.attention(**foreign, is_causal=True, out={"output": Foreign(out)})
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("stream", [0, 1234])
def test_cupy_allocates_on_the_stream_and_device(monkeypatch: pytest.MonkeyPatch, stream: int) -> None:
    entered: list = []

    @contextlib.contextmanager
    def enter(kind: str, number: int):
        entered.append((kind, number))
        yield
        entered.remove((kind, number))

    made = []
    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(Device=lambda i: enter("device", i), ExternalStream=lambda s: enter("stream", s))
    cupy.empty = lambda shape, dtype: made.append((shape, dtype, tuple(entered)))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    array = type("ndarray", (), {"__module__": "cupy", "device": types.SimpleNamespace(id=1)})()
    assert _frameworks.allocates(array)
    _frameworks.empty(array, (3,), "int32", "cuda", stream)
    assert made == [((3,), "int32", (("device", 1), ("stream", stream)))]
