# SPDX-License-Identifier: Apache-2.0
"""How far two tensors may be apart. Called by model_check.py, reference.py, engine_run.py and the checks of half
precision and float8.

The rule: the largest difference of a floating-point output may be `RELATIVE_TOLERANCE[dtype]` times the largest
magnitude of the original's output, dtype being the least precise floating-point type in the model. Infinities must be
the same, and where the original has a number the other must have one. Other outputs must be equal.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import outermost_graphs
from faexport.report.data import OutputDifference

# In half precision four roundings: unit roundoff is 2^-11 and 2^-8.
RELATIVE_TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 2e-3, "bfloat16": 1.6e-2}
# Where only attention is in half precision, as asked (--dtype).
CORE_TOLERANCE = {"float16": 2e-2, "bfloat16": 5e-2}


def compare(name: str, want: np.ndarray, got: np.ndarray, allowed: float) -> OutputDifference:
    """The largest difference of one output, which may be `allowed` times its magnitude."""
    want, got = np.asarray(want), np.asarray(got)
    shape, kind = tuple(want.shape), str(want.dtype)
    if want.shape != got.shape or want.dtype != got.dtype:
        return OutputDifference(name, kind, shape, float("inf"), 0.0, False)
    if kind not in RELATIVE_TOLERANCE:
        difference = float(np.count_nonzero(want != got))
        return OutputDifference(name, kind, shape, difference, 0.0, difference == 0)
    tolerance, difference = allowed * magnitude(want), distance(want, got)
    return OutputDifference(name, kind, shape, difference, tolerance, difference <= tolerance)


def distance(want: np.ndarray, got: np.ndarray) -> float:
    """The largest absolute difference where `want` is a number; inf where `got` is none or another infinity."""
    a, b = want.astype(np.float64), got.astype(np.float64)
    compared = ~np.isnan(a) & ~(a == b)  # equal infinities are equal
    with np.errstate(invalid="ignore"):
        differences = np.abs(a - b)[compared]
    return float(np.where(np.isnan(differences), np.inf, differences).max(initial=0.0))


def num_lost(want: np.ndarray, got: np.ndarray) -> int:
    """How many elements are NaN in `want` and a number in `got`."""
    if want.shape != got.shape or str(want.dtype) not in RELATIVE_TOLERANCE:
        return 0
    return int(np.count_nonzero(np.isnan(want.astype(np.float64)) & ~np.isnan(got.astype(np.float64))))


def magnitude(array: np.ndarray) -> float:
    finite = np.abs(np.asarray(array, np.float64))
    return float(finite[np.isfinite(finite)].max(initial=0.0))


def least_precise(*models: ir.Model) -> str:
    """The coarsest floating-point type of any value, initializer or Cast."""
    found = {"float32"}
    for model in models:
        for graph in outermost_graphs(model):
            found |= {value.dtype.name.lower() for value in graph.inputs if value.dtype}
            if isinstance(graph, ir.Graph):
                found |= {value.dtype.name.lower() for value in graph.initializers.values() if value.dtype}
            for node in graph.all_nodes():
                found |= {value.dtype.name.lower() for value in node.outputs if value.dtype}
                if node.op_type == "Cast":
                    found.add(ir.DataType(node.attributes.get_int("to", 1)).name.lower())
    return max(found & set(RELATIVE_TOLERANCE), key=RELATIVE_TOLERANCE.__getitem__)
