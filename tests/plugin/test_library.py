# SPDX-License-Identifier: Apache-2.0
"""The compiled library as a file, and attributes.def as the one table that everything is made from."""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import pathlib
import re
import subprocess

import faplugin
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
# The published contract: a change here is a new version of the operator.
ATTRIBUTES = {
    "q_num_heads": ("INT", 0),
    "kv_num_heads": ("INT", 0),
    "scale": ("FLOAT", 0.0),
    "is_causal": ("INT", 0),
    "left_window_size": ("INT", -1),
    "right_window_size": ("INT", -1),
    "softcap": ("FLOAT", 0.0),
    "alignment": ("STRING", "onnx"),
    "empty_row": ("STRING", "zero"),
    "float32_precision": ("STRING", ""),
    "output_dtype": ("STRING", ""),
    "query_layout": ("STRING", ""),
    "key_layout": ("STRING", ""),
    "value_layout": ("STRING", ""),
    "output_layout": ("STRING", ""),
    "packed_columns": ("INTS", []),
    "head_dim": ("INT", 0),
    "head_dim_v": ("INT", 0),
    "cache": ("STRING", "append"),
    "cache_layout": ("STRING", ""),
    "kv_cache_bit_width": ("INT", 8),
    "rotary_interleaved": ("INT", 0),
    "rotary_dim": ("INT", 0),
    "q_norm_epsilon": ("FLOAT", 1e-6),
    "k_norm_epsilon": ("FLOAT", 1e-6),
    "optional_inputs": ("STRING", ""),
    "optional_outputs": ("STRING", ""),
}


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from faplugin import _native

    declared = (ROOT / "plugin/python/api.h").read_bytes()
    assert hashlib.sha256(declared).hexdigest()[:16] == _native.INTERFACE, "declare what api.h says now, and its digits"
    monkeypatch.setattr(_native, "INTERFACE", "another")
    _native.library.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"libfa_python\.so was compiled from another version of faplugin"):
            _native.library()
    finally:
        _native.library.cache_clear()


def dynamic_symbols(library: str) -> list[tuple[str, str]]:
    """(kind, name) of the dynamic symbols, as nm prints them: T defined, U undefined, …"""
    listing = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    return [tuple(line.split()[-2:]) for line in listing.splitlines()]


def test_exports_one_symbol(library: str) -> None:
    assert [name for kind, name in dynamic_symbols(library) if kind.isupper() and kind not in "UW"] == [
        "RegisterCustomOps"
    ]


def test_asks_for_no_runtime_and_no_driver(library: str) -> None:
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
    assert needed and not [
        name for name in needed if re.match(r"libonnxruntime|libcuda|libcudart|libnvinfer|libtorch", name)
    ]
    undefined = [name for kind, name in dynamic_symbols(library) if kind == "U"]
    assert not [name for name in undefined if re.match(r"Ort|cuda|cu[A-Z]", name)]


def test_loads_with_all_symbols_bound(library: str) -> None:
    assert ctypes.CDLL(library, mode=ctypes.RTLD_LOCAL | 2).RegisterCustomOps  # 2 is RTLD_NOW


def test_too_old_a_runtime_gets_a_sentence(library: str, tmp_path: pathlib.Path) -> None:
    """A runtime without API 18 is played by an OrtApiBase that has no other API than 1's CreateStatus."""
    made = {}
    create_status_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    get_api_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    get_version_type = ctypes.CFUNCTYPE(ctypes.c_void_p)
    create_status = create_status_type(lambda code, message: made.setdefault("status", (code, bytes(message))) and 1)
    api = (ctypes.c_void_p * 400)(ctypes.cast(create_status, ctypes.c_void_p))
    get_api = get_api_type(lambda version: ctypes.addressof(api) if version == 1 else None)
    version = ctypes.create_string_buffer(b"1.16.3")
    get_version = get_version_type(lambda: ctypes.addressof(version))
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(get_version, ctypes.c_void_p))
    register = ctypes.CDLL(library).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, base) == 1
    assert made["status"] == (9, b"faexport needs ONNX Runtime 1.18 or later; this is 1.16.3")  # 9: not implemented


def test_attributes_are_pinned() -> None:
    from faexport import schema

    assert {row.name: (row.type.name, row.default) for row in schema.attributes()} == ATTRIBUTES


def test_python_takes_exactly_the_attributes() -> None:
    defaults = {name: p.default for name, p in inspect.signature(faplugin.attention).parameters.items()}
    for name, (_, default) in ATTRIBUTES.items():
        if name in ("optional_inputs", "optional_outputs"):  # from the arguments that are given
            assert name not in defaults
        else:
            assert defaults[name] == (tuple(default) if isinstance(default, list) else default), name


def test_python_takes_exactly_the_inputs() -> None:
    from faexport import schema

    names = list(inspect.signature(faplugin.attention).parameters)
    first, last = names.index("value") + 1, names.index("q_num_heads")
    table = [row.name for row in schema.inputs()]
    assert names[: schema.NUM_REQUIRED] == table[: schema.NUM_REQUIRED]
    inputs = [name for name in table[schema.NUM_REQUIRED :] if name != "unused"]  # of nodes only
    assert names[first:last] == inputs
    tensor = np.zeros((1, 1, 1, 1), np.float32)
    for name in inputs:  # the binding knows each by this name
        with pytest.raises((ValueError, TypeError), match=name):
            faplugin.attention(tensor, tensor, tensor, **{name: np.zeros((1,) * 5, np.complex64)})


def test_the_operator_includes_no_runtime() -> None:
    """csrc/ knows neither ONNX Runtime nor TensorRT, PyTorch or Python."""
    foreign = re.compile(r'#include [<"](onnxruntime|Nv|torch|ATen|c10|Python|pybind11|bind\.h|output_shape\.h)')
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [str(path) for path in files if foreign.search(path.read_text("utf-8"))]
