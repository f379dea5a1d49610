# SPDX-License-Identifier: Apache-2.0
"""QuantizeLinear with the DequantizeLinear behind it: a tensor rounded to a few bits, and what of that the operator
leaves out. Called by score_chain.py, value_chain.py, match/roundings.py and float8.py.
"""

from __future__ import annotations

import dataclasses
import operator

import ml_dtypes
import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import live_users, name_of, op, operand, producer
from faexport.understand.layout.products import QUANTIZED
from faexport.understand.shapes.analysis import Analysis

# What quantizes, and what undoes it: the TRT_ ones, which ModelOpt's exports of PyTorch have, know no zero point.
INVERSE = {
    "QuantizeLinear": "DequantizeLinear",
    "com.microsoft::QuantizeLinear": "com.microsoft::DequantizeLinear",
    "trt::TRT_FP8QuantizeLinear": "trt::TRT_FP8DequantizeLinear",
    "DynamicQuantizeLinear": "DequantizeLinear",
}
CONSENT = "--assume scores-unquantized"
QUANTIZING, DEQUANTIZING = tuple(INVERSE), tuple(dict.fromkeys(INVERSE.values()))
_HOW = {"axis": 1, "block_size": 0}  # attributes that both must have alike, with what they are where they are absent
_FLOAT8 = (
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.FLOAT8E5M2FNUZ,
)


@dataclasses.dataclass(frozen=True)
class Rounding:
    """One pair: what comes out is what went in, but for rounding and saturation."""

    quantize: ir.Node
    dequantize: ir.Node
    dtype: ir.DataType  # of the quantized numbers
    is_float8: bool = False  # and the scale is a constant that can be one (some tools write 0 and infinity)
    holds_weights: bool = False  # float8 numbers from 0 to 1, with nothing lost but their last bits

    @property
    def names(self) -> tuple[str, str]:
        return name_of(self.quantize), name_of(self.dequantize)


def rounding_at(node: ir.Node | None, a: Analysis) -> Rounding | None:
    """The pair that the node begins or ends, if nothing else reads the quantized numbers."""
    if node is not None and op(node) in QUANTIZING:
        users = live_users(node.outputs[0])
        return _pair(node, users[0], a) if len(users) == 1 else None
    before = producer(operand(node, 0)) if node is not None and op(node) in DEQUANTIZING else None
    return _pair(before, node, a) if before is not None and node is not None else None


def _pair(quantize: ir.Node, dequantize: ir.Node, a: Analysis) -> Rounding | None:
    if INVERSE.get(op(quantize)) != op(dequantize) or dequantize.inputs[0] is not quantize.outputs[0]:
        return None
    whole, back = a.dtype(quantize.inputs[0]), a.dtype(dequantize.outputs[0])
    if whole is None or whole != back or any(x.is_graph_output() for x in quantize.outputs):
        return None
    if op(quantize) == "DynamicQuantizeLinear":
        by_itself = [operand(dequantize, i) for i in (1, 2)] == list(quantize.outputs[1:])
        return Rounding(quantize, dequantize, ir.DataType.UINT8) if by_itself else None
    scale, zero = (operand(quantize, i) for i in (1, 2))
    alike = _alike(scale, operand(dequantize, 1), a) and _alike(zero, operand(dequantize, 2), a, missing=0)
    how = ([_number(node, name, default) for name, default in _HOW.items()] for node in (quantize, dequantize))
    if not alike or (a.rank(scale) != 0 and operator.ne(*how)):  # one number is that of all elements
        return None
    dtype, factor = _dtype(quantize, zero, a), a.constant(scale)
    is_scale = factor is not None and bool((np.isfinite(factor) & (factor > 0)).all())
    if dtype is None or factor is None or dtype not in _FLOAT8 or not is_scale:
        return None if dtype is None else Rounding(quantize, dequantize, dtype)
    return Rounding(quantize, dequantize, dtype, True, _reaches_from_0_to_1(dtype, factor))


def why_quantized_product(product: ir.Node) -> tuple[str, bool]:
    """Why a product of quantized numbers is none of queries and keys, and whether consent may help. onnxruntime's
    quantizer writes some of these operators, which are read with consent, its optimizer others, which are not."""
    is_optimized = product.op_type in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
    what_helps = ": fuse the model before onnxruntime's optimizer" if is_optimized else ""
    return f"queries and keys are multiplied as quantized numbers ({op(product)}){what_helps}", not is_optimized


def why_quantized(node: ir.Node) -> tuple[str, bool]:
    """Why scores are followed no further from a QuantizeLinear or DequantizeLinear without the other of the pair, and
    whether consent may help."""
    before = producer(operand(node, 0)) if op(node) in DEQUANTIZING else None
    if before is not None and (op(before) in QUANTIZED or before.op_type.startswith("QLinear")):
        return f"the scores are quantized inside the block ({op(before)})", True
    return f"the scores are quantized inside the block ({op(node)})", False


def _reaches_from_0_to_1(dtype: ir.DataType, scale: np.ndarray) -> bool:
    """Are numbers up to 1 cut off by no more than they are rounded by, and their smallest steps those of float8 itself
    at most? A scale that is too small cuts large weights off, and one that is too large loses all small ones."""
    limits = ml_dtypes.finfo(dtype.numpy())
    reached = scale.astype(np.float64) * float(limits.max)
    return bool((reached >= 1 - float(limits.eps) / 2).all() and (scale <= 1).all())


def _dtype(quantize: ir.Node, zero: ir.Value | None, a: Analysis) -> ir.DataType | None:
    if quantize.domain == "trt":
        return ir.DataType.FLOAT8E4M3FN
    said = _number(quantize, "output_dtype", 0)
    if said:
        return ir.DataType(said)
    return a.dtype(zero) if zero is not None else ir.DataType.UINT8


def _number(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.value


def _alike(one: ir.Value | None, other: ir.Value | None, a: Analysis, missing: float | None = None) -> bool:
    """Are both the same tensor, or equal constants? One that is missing counts as `missing`."""
    if one is other:
        return True
    x, y = (missing if value is None else a.constant(value) for value in (one, other))
    if x is None or y is None:
        return False
    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)
    same = first.shape == second.shape or 1 in (first.size, second.size)
    return same and bool((first == second).all())
