# SPDX-License-Identifier: Apache-2.0
"""Model files without their weights: a graph of some kilobytes, which says of each weight how it is made again.

The weights of a PyTorch module are drawn by NumPy, seeded by their names (fill). So whatever a tool stores of them (as
they are, transposed, in float16, several side by side, also head by head) is recognized, and left out of the file
(Known.strip); another machine, without PyTorch, draws them again (Weights.restored). Files made on one machine are so
timed on another.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import threading
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import numpy_helper

if TYPE_CHECKING:
    import onnxruntime
    import torch

SMALLEST = 1e-6  # magnitude; converters to float16 treat smaller ones each in its own way
SMALL = 1024  # elements; smaller tensors stay in the file
LARGEST_KEPT = 1 << 23  # elements of a tensor that nobody knows, e.g. a table of positions
FLOATS = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}
FUSED_DOMAINS = ("com.microsoft", "faexport")
KEY = "weights"  # of a tensor's external data: a list of [name, transposed], which stand side by side
HEADS = "heads"  # likewise: into how many groups of columns each is cut; groups take turns
MOST_HEADS = 64


def fill(module: torch.nn.Module) -> dict[str, dict]:
    """Draws each large weight again, with the mean and the deviation that it has. Returns how, by name."""
    import torch

    recipes = {}
    with torch.no_grad():
        for name, tensor in _tensors(module):
            array = tensor.numpy()
            recipes[name] = {"shape": list(array.shape), "mean": float(array.mean()), "deviation": float(array.std())}
            tensor.copy_(torch.from_numpy(_drawn(name, recipes[name])))
    return recipes


@functools.cache
def fused_operators(path: pathlib.Path) -> dict[str, int]:
    """How many nodes of each operator that is not of ONNX a file has."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return dict(sorted(collections.Counter(node.op_type for node in nodes if node.domain in FUSED_DOMAINS).items()))


@functools.cache
def holds_scores(path: pathlib.Path) -> bool:
    """Does a file have attention whose scores are a tensor, which a Softmax reads?"""
    return any(node.op_type == "Softmax" for node in onnx.load(path, load_external_data=False).graph.node)


def exporters(paths: Iterable[pathlib.Path]) -> list[str]:
    """What wrote these files, e.g. "pytorch 2.13.0"; they needn't have been made where they are timed."""
    models = (onnx.load(path, load_external_data=False) for path in paths)
    return sorted({f"{model.producer_name} {model.producer_version.partition('+')[0]}" for model in models})


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, tensor) for name, tensor in module.named_parameters() if tensor.numel() >= SMALL)


def _drawn(name: str, recipe: dict) -> np.ndarray:
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(recipe["shape"], np.float32)
    numbers = numbers * np.float32(recipe["deviation"]) + np.float32(recipe["mean"])
    numbers[np.abs(numbers) < SMALLEST] = 0
    return numbers


class Known:
    """The weights of a filled module, to recognize them in files."""

    def __init__(self, module: torch.nn.Module, recipes: dict[str, dict]):
        self.recipes = recipes
        self._found: dict[bytes, tuple[str, bool]] = {}
        for name, tensor in _tensors(module):
            array = tensor.detach().numpy()
            for dtype, turned in itertools.product(FLOATS.values(), (False, True)):
                key = _digest((array.T if turned else array).astype(dtype))
                self._found.setdefault(key, (name, turned))

    def write(self, path: pathlib.Path) -> None:
        path.write_text(json.dumps(self.recipes))

    def strip(self, source: pathlib.Path, target: pathlib.Path) -> None:
        """Writes a model file without its weights. Raises ValueError where a large tensor is not known."""
        model = onnx.load(source)
        for tensor in model.graph.initializer:
            if np.prod(tensor.dims) < SMALL:
                continue
            found = self._parts(numpy_helper.to_array(tensor)) if tensor.data_type in FLOATS else None
            if found is not None:
                _leave_out(tensor, *found)
            elif np.prod(tensor.dims) > LARGEST_KEPT:
                raise ValueError(f"{source.name}: where {tensor.name} {list(tensor.dims)} comes from is not known")
        onnx.save(model, target)

    def _parts(self, array: np.ndarray) -> tuple[list[tuple[str, bool]], int] | None:
        """One weight, or several of equal width: whole, or cut into as many groups of columns as the number says."""
        for count in (1, 3, 2):
            for heads in range(1, MOST_HEADS + 1 if count > 1 and array.ndim == 2 else 2):
                if array.shape[-1] % (count * heads) == 0:
                    found = [self._found.get(_digest(part)) for part in _apart(array, count, heads)]
                    if None not in found:
                        return found, heads
        return None


def _digest(array: np.ndarray) -> bytes:
    shape = [size for size in array.shape if size > 1]
    return hashlib.blake2b(f"{array.dtype}{shape}".encode() + array.tobytes(), digest_size=16).digest()


def _apart(array: np.ndarray, count: int, heads: int) -> list[np.ndarray]:
    """The parts of which _together made the array."""
    whole = array.reshape(*array.shape[:-1], heads, count, -1)
    return [whole[..., part, :].reshape(*array.shape[:-1], -1) for part in range(count)]


def _together(parts: list[np.ndarray], heads: int) -> np.ndarray:
    """Side by side: the first group of columns of each, then the second of each, and so on."""
    rows = parts[0].shape[:-1]
    return np.stack([part.reshape(*rows, heads, -1) for part in parts], axis=-2).reshape(*rows, -1)


def _leave_out(tensor: onnx.TensorProto, parts: list[tuple[str, bool]], heads: int) -> None:
    for field in ("raw_data", "float_data", "int32_data"):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=KEY)
    tensor.external_data.add(key=KEY, value=json.dumps(parts))
    tensor.external_data.add(key=HEADS, value=str(heads))


def num_weights(path: pathlib.Path) -> int:
    """How many numbers a file of recipes draws."""
    return sum(math.prod(recipe["shape"]) for recipe in json.loads(path.read_text()).values())


class _Once:
    """Arrays by key, each made by the first that asks; others wait for it meanwhile."""

    def __init__(self) -> None:
        self._made: dict[Hashable, np.ndarray] = {}
        self._locks: dict[Hashable, threading.Lock] = collections.defaultdict(threading.Lock)
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        with self._lock:
            lock = self._locks[key]
        with lock:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]


class Weights:
    """The weights that a file of recipes tells how to draw; each is drawn once, and each form of it made once."""

    def __init__(self, path: pathlib.Path):
        self._recipes = json.loads(path.read_text())
        self._drawn, self._formed = _Once(), _Once()

    def draw(self, threads: int) -> None:
        """All of them, several at a time; else each when it is needed."""
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(self._weight, self._recipes))

    def fill(self, module: torch.nn.Module) -> None:
        """Gives a module, made as for the files, their weights."""
        import torch

        with torch.no_grad():
            for name, tensor in _tensors(module):
                tensor.copy_(torch.from_numpy(self._weight(name)))

    def _weight(self, name: str) -> np.ndarray:
        return self._drawn.get(name, lambda: _drawn(name, self._recipes[name]))

    def _form(self, tensor: onnx.TensorProto) -> np.ndarray | None:
        """What a tensor stood for; None where it is in the file."""
        said = {entry.key: entry.value for entry in tensor.external_data}
        if KEY not in said:
            return None
        heads, dtype = int(said.get(HEADS, "1")), FLOATS[tensor.data_type]

        def make() -> np.ndarray:
            parts = [self._weight(name).T if turned else self._weight(name) for name, turned in json.loads(said[KEY])]
            return np.ascontiguousarray(parts[0] if len(parts) == 1 else _together(parts, heads), dtype)

        return self._formed.get((said[KEY], heads, tensor.data_type), make).reshape(tensor.dims)

    def session(self, path: os.PathLike[str], options: onnxruntime.SessionOptions, providers: list):
        """A session of a skeleton's model, whose weights are not copied before onnxruntime does so."""
        import onnxruntime

        model = onnx.load(path, load_external_data=False)
        formed = ((tensor.name, self._form(tensor)) for tensor in model.graph.initializer)
        arrays = {name: array for name, array in formed if array is not None}
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
        options.add_external_initializers(list(arrays), values)
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)

    def restored(self, path: os.PathLike[str]) -> bytes:
        """The whole model of a skeleton, as bytes."""
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            array = self._form(tensor)
            if array is not None:
                tensor.ClearField("external_data")
                tensor.data_location = onnx.TensorProto.DEFAULT
                tensor.raw_data = array.tobytes()
        return model.SerializeToString()
