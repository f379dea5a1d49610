# SPDX-License-Identifier: Apache-2.0
"""The operator in libfa_python.so, called through ctypes: the declarations of plugin/python/api.h, and one call of it.

Plain C instead of a Python extension, so that one compiled file serves every version of Python.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from faplugin._frameworks import address, told
from faplugin._library import find_library

# Devices of the DLPack specification.
CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
LEGACY_DEFAULT_STREAM = 1


class _Array(ctypes.Structure):
    """FaArray."""

    _fields_ = [
        ("object", ctypes.c_void_p),
        ("api", ctypes.c_void_p),
        ("dlpack", ctypes.c_void_p),
        ("numpy", ctypes.c_void_p),
        ("dtype", ctypes.c_char_p),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 4),
    ]


class _Attribute(ctypes.Structure):
    """FaAttribute."""

    _fields_ = [
        ("index", ctypes.c_int32),
        ("integer", ctypes.c_int64),
        ("number", ctypes.c_double),
        ("text", ctypes.c_char_p),
        ("integers", ctypes.POINTER(ctypes.c_int64)),
        ("length", ctypes.c_size_t),
    ]


class _Output(ctypes.Structure):
    """FaOutput."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_char_p),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 4),
    ]


# Of api.h as it is declared here, as fa_python_interface() gives it.
INTERFACE = "5e960cd6a2f730f4"
_P, _SIZE, _I32, _TEXT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32, ctypes.c_char_p
# Result and arguments. Pointers to what is declared above are plain addresses, which ctypes passes fastest.
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "fa_python_interface": (_TEXT, []),
    "fa_python_error": (_TEXT, []),
    "fa_python_input": (_TEXT, [_I32]),
    "fa_python_attribute": (_TEXT, [_I32, _P]),
    "fa_python_set_device": (_I32, [_I32, _P]),
    "fa_python_node_new": (_I32, [_P, _SIZE, _P]),
    "fa_python_node_delete": (None, [_P]),
    "fa_python_call_new": (_I32, [_P, _P, _SIZE, _SIZE, _P, _P, _P, _P]),
    "fa_python_call_delete": (None, [_P]),
    "fa_python_call_prepare": (_I32, [_P, _P, _SIZE, _TEXT, _P]),
    "fa_python_call_prepare_backward": (_I32, [_P, _P, _P, _TEXT]),
    "fa_python_call_run": (_I32, [_P, _P, _SIZE, ctypes.c_int64]),
    "fa_python_call_explain": (_I32, [_P, _TEXT, _P]),
    "fa_python_exchange_known": (_I32, [_P]),
    "fa_python_exchange_begin": (ctypes.c_int64, [_P]),
    "fa_python_exchange_run": (_I32, [_P, ctypes.c_int64]),
}
# With the interpreter's lock: they read Python objects.
_LOCKED = (
    "fa_python_call_new",
    "fa_python_call_prepare",
    "fa_python_call_prepare_backward",
    "fa_python_exchange_begin",
)
# The arrays of a backward pass, in the order of FaGradient.
GRADIENTS = ("output", "lse", "d_output", "d_lse", "d_query", "d_key", "d_value", "d_bias", "d_sinks")
_ERRORS = {1: ValueError, 2: TypeError, 3: RuntimeError, 4: MemoryError}  # FaError

capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
capsule_pointer.restype = ctypes.c_void_p
capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


@functools.cache
def library() -> Any:
    """libfa_python.so, with its functions declared. Raises ImportError."""
    try:
        path = str(find_library("libfa_python.so"))
        loaded, locked = ctypes.CDLL(path), ctypes.PyDLL(path)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(locked if name in _LOCKED else loaded, name)
            function.restype, function.argtypes = result, arguments
            setattr(loaded, name, function)
        if loaded.fa_python_interface() != INTERFACE.encode():
            raise AttributeError("fa_python_interface is not the package's")
    except OSError as error:
        raise ImportError(f"faplugin's compiled part can't be loaded: {error}") from error
    except AttributeError as error:
        raise ImportError(
            f"{path} was compiled from another version of faplugin than this package ({error}); install it again"
        ) from error
    return loaded


@functools.cache
def inputs() -> dict[str, int]:
    """The operator's inputs by name, in the order of inputs.def, with their row there."""
    return {name.decode(): row for row, name in enumerate(iter(_rows(library().fa_python_input), None))}


@functools.cache
def _attributes() -> dict[str, tuple[int, str]]:
    """Of each attribute the row in attributes.def and the type."""
    kind = ctypes.c_char_p()
    rows: dict[str, tuple[int, str]] = {}
    for name in iter(_rows(lambda row: library().fa_python_attribute(row, ctypes.byref(kind))), None):
        assert kind.value is not None
        rows[name.decode()] = (len(rows), kind.value.decode())
    return rows


def _rows(function: Callable[[int], Any]) -> Callable[[], Any]:
    """The results for 0, 1, 2 …, one a call."""
    numbers = iter(range(1 << 31))
    return lambda: function(next(numbers))


class Node:
    """The operator with its attributes, checked; many calls may share it.

    Args:
        attributes: by name. Raises TypeError for one that attributes.def lacks, or of another type.
    """

    def __init__(self, attributes: Mapping[str, Any]) -> None:
        self.pointer = ctypes.c_void_p()
        self._delete = library().fa_python_node_delete  # may be needed when this module is gone
        given = [_attribute(name, value) for name, value in attributes.items()]
        check(library().fa_python_node_new((_Attribute * len(given))(*given), len(given), ctypes.byref(self.pointer)))
        self.address: int | None = self.pointer.value

    def __del__(self) -> None:
        if self.pointer:
            self._delete(self.pointer)


@functools.lru_cache(maxsize=256, typed=True)
def _known_node(*attributes: Any) -> Node:
    """Names and values in turn."""
    return Node(dict(zip(attributes[::2], attributes[1::2], strict=True)))


def _node(attributes: Mapping[str, Any]) -> Node:
    try:
        return _known_node(*itertools.chain.from_iterable(attributes.items()))
    except TypeError:  # a value that can't be looked up, as a list, or one that is wrong
        return Node(attributes)


class Call:
    """One call of the operator, bound to its inputs.

    Args:
        attributes: as of Node.
        arrays: names and arrays in the order of the node's slots: NumPy arrays (bfloat16 of ml_dtypes too), anything
            with `__dlpack__`, or pairs (shape, dtype name) where only a plan is made.
        stream: a CUDA stream on which the data is to be ready.
        is_current: is it the one on which the arrays' framework works now? Then nothing has to wait for the data.

    Attributes:
        outputs: name, shape and dtype name of each output, in the node's order.
        device: where the query is, "cpu" or "cuda".
    """

    def __init__(
        self, attributes: Mapping[str, Any], arrays: Sequence[tuple[str, Any]], stream: int, is_current: bool
    ) -> None:
        self._pointer = ctypes.c_void_p()
        self._delete = library().fa_python_call_delete  # as Node's: a traceback may keep a call until the end
        self._stream, self._is_current = _integer("stream", stream), is_current
        self._owners: list[Any] = []  # they keep the memory of inputs and outputs
        self._node = node = _node(attributes)
        bound, outputs = self._arrays(arrays), (_Output * 4)()
        count, is_cuda = ctypes.c_size_t(), ctypes.c_int32()
        check(
            library().fa_python_call_new(
                node.pointer,
                bound,
                len(arrays),
                self._stream,
                ctypes.byref(self._pointer),
                outputs,
                ctypes.byref(count),
                ctypes.byref(is_cuda),
            )
        )
        self.device = "cuda" if is_cuda.value else "cpu"
        self.outputs: list[tuple[str, tuple[int, ...], str]] = [
            (output.name.decode(), tuple(output.shape[: output.rank]), output.dtype.decode())
            for output in outputs[: count.value]
        ]

    def __del__(self) -> None:
        if self._pointer:
            self._delete(self._pointer)

    def prepare(self, outputs: Sequence[Any], kernel: str) -> int:
        """Binds the outputs' memory and chooses the kernel: the bytes of workspace that run() needs."""
        arrays = self._arrays([(name, array) for (name, _, _), array in zip(self.outputs, outputs, strict=True)])
        num_bytes = ctypes.c_size_t()
        check(
            library().fa_python_call_prepare(
                self._pointer, arrays, len(outputs), _text("kernel", kernel), ctypes.byref(num_bytes)
            )
        )
        return num_bytes.value

    def prepare_backward(self, arrays: Mapping[str, Any], kernel: str) -> int:
        """In place of prepare(): binds the forward's results and the gradients, by the names of GRADIENTS.

        Returns the bytes of workspace that run() then needs.
        """
        bound = (_Array * len(GRADIENTS))()
        for filled, name in zip(bound, GRADIENTS, strict=True):
            if arrays.get(name) is not None:
                self._fill(filled, name, arrays[name])
        num_bytes = ctypes.c_size_t()
        check(
            library().fa_python_call_prepare_backward(
                self._pointer, bound, ctypes.byref(num_bytes), _text("kernel", kernel)
            )
        )
        return num_bytes.value

    def run(self, workspace: Any, num_bytes: int, num_threads: int) -> None:
        """After prepare() or prepare_backward(). `workspace`: an array whose framework tells its address; without one
        the library allocates, in stream order."""
        memory = None if workspace is None else address(workspace)
        check(library().fa_python_call_run(self._pointer, memory, num_bytes, _integer("num_threads", num_threads)))

    def explain(self, device: str) -> str:
        text = ctypes.c_char_p()
        check(library().fa_python_call_explain(self._pointer, _text("device", device), ctypes.byref(text)))
        assert text.value is not None
        return text.value.decode()

    def _arrays(self, given: Sequence[tuple[str, Any]]) -> ctypes.Array[_Array]:
        arrays = (_Array * len(given))()
        for filled, (name, array) in zip(arrays, given, strict=True):
            self._fill(filled, name, array)
        return arrays

    def _fill(self, filled: _Array, name: str, array: Any) -> None:
        kind: Any = type(array)
        if isinstance(array, np.ndarray):
            capsule = array.__array_struct__  # it keeps the array
            filled.numpy, filled.dtype = capsule_pointer(capsule, None), _dtype_name(array.dtype)
        elif isinstance(array, tuple) and len(array) == 2 and isinstance(array[0], Sequence):
            sizes = [_integer(f"a size of {name}", size) for size in array[0]]
            filled.dtype = _text(f"the dtype of {name}", array[1])
            filled.rank, filled.shape = len(sizes), tuple(sizes[:4])
            return
        elif self._is_current and (api := exchange_api(kind)):
            filled.object, filled.api, capsule = id(array), api, array
        elif hasattr(array, "__dlpack__"):
            capsule = _dlpack(name, array, self._stream)
            filled.dlpack = _tensor_in(name, capsule)
        else:
            raise TypeError(
                f"{name} is a {type(array).__name__}; expected an array with __dlpack__ (NumPy, PyTorch, CuPy …)"
            )
        self._owners.append(capsule)


@functools.cache
def exchange_api(kind: Any) -> int | None:
    """The address of DLPack's C exchange API of a type of arrays, not of types derived from it; None: it has none."""
    capsule = vars(kind).get("__dlpack_c_exchange_api__")
    api = None if capsule is None else capsule_pointer(capsule, b"dlpack_exchange_api")
    return api if api and library().fa_python_exchange_known(api) else None


@functools.lru_cache(maxsize=64)
def _dtype_name(dtype: np.dtype) -> bytes:
    return dtype.name.encode()


def _dlpack(name: str, array: Any, stream: int) -> Any:
    """The array as a DLPack capsule, its data ready on the stream. Raises TypeError where the array doesn't hand out
    its memory, as one that is read-only."""
    try:
        kind, ordinal = array.__dlpack_device__()
        if kind in (CPU, CUDA_HOST):
            return array.__dlpack__()
    except Exception as error:
        raise TypeError(f"{name} doesn't hand out its memory by DLPack: {type(error).__name__}: {error}") from error
    if kind not in (CUDA, CUDA_MANAGED):
        raise TypeError(f"{name} is neither in the CPU's nor in a CUDA device's memory (DLPack device {kind})")
    previous = _set_device(ordinal)  # PyTorch exports tensors of the current device only
    try:
        return array.__dlpack__(stream=stream or LEGACY_DEFAULT_STREAM)
    finally:
        if previous != ordinal:
            _set_device(previous)


def _tensor_in(name: str, capsule: Any) -> int | None:
    """The address of DLPack's tensor. The capsule keeps its name: its own destructor gives the tensor back."""
    try:
        return capsule_pointer(capsule, b"dltensor")
    except ValueError:
        raise TypeError(f"{name} has a __dlpack__ that gives no capsule of DLPack's") from None


def _set_device(ordinal: int) -> int:
    previous = ctypes.c_int32()
    check(library().fa_python_set_device(ordinal, ctypes.byref(previous)))
    return previous.value


def _attribute(name: str, value: Any) -> _Attribute:
    if name not in _attributes():
        raise TypeError(f"FlashAttention has no attribute '{name}'")
    row, kind = _attributes()[name]
    attribute = _Attribute(row)
    if kind == "INT":
        attribute.integer = _integer(name, value)
    elif kind == "INTS":
        try:
            integers = list(value) if len(value) else []  # without a length it may have no end
        except TypeError:
            raise TypeError(f"{name} is {told(value)}; expected a list of integers") from None
        attribute.integers = (ctypes.c_int64 * len(integers))(*(_integer(name, x) for x in integers))
        attribute.length = len(integers)
    elif kind == "STRING":
        attribute.text = text = _text(name, value)
        attribute.length = len(text)
    else:
        try:
            attribute.number = value
        except (TypeError, ValueError, OverflowError):
            raise TypeError(f"{name} is {told(value)}; expected a number") from None
        if attribute.number and not ctypes.c_float(attribute.number).value:  # 0 stands for something else
            raise ValueError(f"{name} is {told(value)}; expected 0, or a number that is another in float32, too")
    return attribute


def _integer(name: str, value: Any) -> int:
    """An int64: ctypes would cut off what is larger."""
    try:
        integer = int(value) if isinstance(value, np.bool_) else operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {told(value)}; expected an integer") from None
    if not -(2**63) <= integer < 2**63:
        raise TypeError(f"{name} is {told(value)}; expected an integer of 64 bits")
    return integer


def _text(name: str, value: Any) -> bytes:
    if not isinstance(value, str) or "\0" in value:  # which would be its end
        raise TypeError(f"{name} is {told(value)}; expected a string")
    return value.encode(errors="backslashreplace")


def check(error: int) -> None:
    if error:
        raise _ERRORS[error](library().fa_python_error().decode())
