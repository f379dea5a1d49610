# SPDX-License-Identifier: Apache-2.0
"""What is asked of an array's framework: memory on the stream of the call, or nothing where results are given."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import types

import faplugin
import numpy as np
import pytest
from faplugin import _frameworks, _native

from tests.dlpack_only import DLPackOnly

SHAPE = (2, 3, 5, 8)


def test_results_with_out_need_no_framework() -> None:
    """The joined cache needs a workspace, since no present is wanted."""
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(SHAPE, np.float32) for name in ("query", "key", "value", "past_key", "past_value")
    }
    expected = faplugin.attention(**arrays, is_causal=True)
    out = np.full(SHAPE, np.nan, np.float32)
    foreign = {name: DLPackOnly(array) for name, array in arrays.items()}
    faplugin.attention(**foreign, is_causal=True, out={"output": DLPackOnly(out)})
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


def test_an_exchange_api_is_used_where_no_function_that_is_called_is_missing() -> None:
    """Its version (1.0), the older one, and five functions, of which a call needs the first and the last two."""
    known = _native.library().fa_python_exchange_known
    complete = [1, None, *range(1, 6)]
    assert known((ctypes.c_void_p * 7)(*complete))
    for needed in (2, 5, 6):
        assert not known((ctypes.c_void_p * 7)(*(None if i == needed else x for i, x in enumerate(complete))))
    assert not known((ctypes.c_void_p * 7)(2, *complete[1:]))
