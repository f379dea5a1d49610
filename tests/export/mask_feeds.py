# SPDX-License-Identifier: Apache-2.0
"""Random inputs for the graphs of mask_grammar.py."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto


def feeds(model: onnx.ModelProto, seed: int, large: bool = False, odd: bool = False) -> dict[str, np.ndarray]:
    """Random inputs at random sizes; with `odd` also at those at which sizes are mixed up or forgotten, 1, 3, 6 and 0,
    where some graphs don't run. `large`: scores of about 1000. An initializer that is an input may be given, or left as
    it is."""
    random = np.random.default_rng(seed)
    names = {i.name for i in model.graph.input}
    usual = not odd or bool(random.integers(2))
    sizes = {
        "batch": int(random.integers(1, 4) if usual else random.choice([1, 3, 0], p=[0.45, 0.45, 0.1])),
        "sequence": int(random.integers(1, 10) if usual else random.choice([1, 3, 6, 0], p=[0.4, 0.25, 0.25, 0.1])),
        "past_sequence": int(random.integers(0, 5) if usual else random.choice([1, 3, 6, 0])),
    }
    if not any(d.dim_param == "sequence" for i in model.graph.input for d in i.type.tensor_type.shape.dim):
        sizes["sequence"] = 1
    sizes["total"] = sizes["sequence"] + (sizes["past_sequence"] if "past_k" in names else 0)
    sizes["tokens"] = sizes["total"]
    if odd:
        sizes["tokens"] = int(random.choice([sizes["total"], sizes["sequence"], 1], p=[0.5, 0.1, 0.4]))
    sizes["entries"] = int(random.choice([sizes["batch"], 1, 3 if odd and sizes["batch"] == 1 else sizes["batch"]]))
    initializers = {i.name for i in model.graph.initializer}
    result = {}
    for info in model.graph.input:
        if info.name in initializers and random.random() < 0.3:
            continue
        shape = [sizes[d.dim_param] if d.dim_param else d.dim_value for d in info.type.tensor_type.shape.dim]
        drawn = _draw(info.name, shape, sizes, random)
        if info.name == "attention_mask" and not _is_number(model, info.name):
            drawn = np.where(random.random(shape) < 0.1, random.choice([2**32, 256], shape), drawn)
        if large and info.name in ("q", "k", "qkv", "past_k"):
            drawn = drawn * np.float32(16)
        half = info.type.tensor_type.elem_type == TensorProto.FLOAT16
        result[info.name] = drawn.astype(np.float16) if half else drawn
    return result


def _is_number(model: onnx.ModelProto, name: str) -> bool:
    """Is a mask of integers counted, or made a float mask of? Then it holds zeros and ones."""
    users = [node for node in model.graph.node if name in node.input]
    return any(n.op_type == "CumSum" or (n.op_type == "Cast" and n.attribute[0].i in (1, 10)) for n in users)


def _draw(name: str, shape: list[int], sizes: dict[str, int], random: np.random.Generator) -> np.ndarray:
    if name == "attention_mask":
        return (random.random(shape) < 0.7).astype(np.int64)
    if name.startswith("given_mask"):
        return random.random(shape) < 0.5
    if name == "ids":
        return random.integers(0, 9, shape)
    if name == "padding":
        return random.choice([0.0, 1.0, 0.3, 1.5, 1e-9, -0.5], shape, p=[0.4, 0.4, 0.05, 0.05, 0.05, 0.05]).astype(
            np.float32
        )
    if name == "mask":
        return random.random(shape) < 0.7
    if name == "segments":
        return np.sort(random.integers(0, 3, shape), axis=-1)
    if name in ("lengths", "length"):
        return random.integers(0, sizes["total"] + 2, shape)
    if name == "temperature":
        return np.asarray(0.4, np.float32)
    return random.standard_normal(shape).astype(np.float32)
