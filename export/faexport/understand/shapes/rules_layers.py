# SPDX-License-Identifier: Apache-2.0
"""Shape rules of layers that stand around attention: convolutions, pooling, padding, reductions, quantized and
fused products.

Registered in rules.SHAPE_RULES; imported by analysis.py. Sizes that aren't followed are unknown, the rank is what
counts.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from faexport.graph.nodes import attribute, operand
from faexport.sizes.dims import Dim
from faexport.understand.shapes.einsum import multiplied_order
from faexport.understand.shapes.known import Known, Shape, Shapes
from faexport.understand.shapes.rules import (
    broadcast,
    constant_ints,
    matmul_shape,
    reduced_axes,
    resolve_axis,
    shape_of,
)


@shape_of("Conv")
def _conv(node: ir.Node, a: Known) -> Shapes:
    x, w = a.shape(node.inputs[0]), a.shape(node.inputs[1])
    if x is None or w is None:
        return None
    kernel = [d.const for d in w[2:]]
    count = len(kernel)
    pads = attribute(node, "pads", [0] * 2 * count)
    strides, dilations = attribute(node, "strides", [1] * count), attribute(node, "dilations", [1] * count)
    out = [x[0], w[0]]
    for i, size in enumerate(x[2:]):
        width = kernel[i]
        if size.const is None or width is None or attribute(node, "auto_pad", "NOTSET") != "NOTSET":
            out.append(size if width == strides[i] == 1 and not any(pads) else Dim.unknown("conv"))
        else:
            span = size.const + pads[i] + pads[i + count] - dilations[i] * (width - 1) - 1
            out.append(Dim.of(span // strides[i] + 1))
    return [tuple(out)]


@shape_of(
    *(
        f"Reduce{name}"
        for name in ("Mean", "Sum", "Max", "Min", "L1", "L2", "Prod", "LogSum", "LogSumExp", "SumSquare")
    ),
    "ArgMax",
    "ArgMin",
)
def _reduce(node: ir.Node, a: Known) -> Shapes:
    shape = a.shape(node.inputs[0])
    if shape is None:
        return None
    if node.op_type.startswith("Arg"):
        gone: list[int] | None = [resolve_axis(attribute(node, "axis", 0), len(shape))]
    else:
        gone = reduced_axes(node, a, len(shape))
    if gone is None:
        return None
    keep = attribute(node, "keepdims", 1)
    return [tuple(Dim.of(1) if i in gone else d for i, d in enumerate(shape) if keep or i not in gone)]


@shape_of("com.microsoft::BiasSplitGelu")
def _gated(node: ir.Node, a: Known) -> Shapes:
    shape = a.shape(node.inputs[0])
    if not shape:
        return None
    half = shape[-1].divide(2)
    return [(*shape[:-1], half)] if half is not None else None


@shape_of("MaxPool", "AveragePool", "LpPool")
def _pooled(node: ir.Node, a: Known) -> Shapes:
    shape = a.shape(node.inputs[0])
    if shape is None:
        return None
    kernel, count = attribute(node, "kernel_shape", []), len(shape) - 2
    pads = attribute(node, "pads", [0] * 2 * count)
    strides, dilations = attribute(node, "strides", [1] * count), attribute(node, "dilations", [1] * count)
    out = list(shape[:2])
    for i, size in enumerate(shape[2:]):
        known = len(kernel) == count and size.const is not None and attribute(node, "auto_pad", "NOTSET") == "NOTSET"
        span = size.const + pads[i] + pads[i + count] - dilations[i] * (kernel[i] - 1) - 1 if known else 0
        exact = known and (not attribute(node, "ceil_mode", 0) or span % strides[i] == 0)
        out.append(Dim.of(span // strides[i] + 1) if exact else Dim.unknown(node.op_type))
    return [tuple(out)]


@shape_of("Resize", "Upsample")
def _resized(node: ir.Node, a: Known) -> Shapes:
    shape = a.shape(node.inputs[0])
    if shape is None:
        return None
    unknown = [tuple(Dim.unknown(node.op_type) for _ in shape)]
    if attribute(node, "axes") is not None or attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return unknown
    if (sizes := operand(node, 3)) is not None:
        found = a.contents(sizes)
        return [found] if found is not None and len(found) == len(shape) else unknown
    place = 2 if node.op_type == "Resize" and a.opset >= 11 else 1
    scales = a.constant(operand(node, place))
    given = attribute(node, "scales") if scales is None else scales.reshape(-1).tolist()
    if given is None or len(given) != len(shape):
        return unknown
    return [tuple(_scaled(size, scale, node.op_type) for size, scale in zip(shape, given, strict=True))]


def _scaled(size: Dim, scale: float, op_type: str) -> Dim:
    """As runtimes compute it: a product of float32, cut off."""
    if size.const is not None and 0 <= size.const < 1 << 24:
        return Dim.of(int(np.float32(size.const) * np.float32(scale)))
    return size * int(scale) if scale == int(scale) else Dim.unknown(op_type)


@shape_of("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(node: ir.Node, a: Known) -> Shapes:
    shape = a.shape(node.inputs[0])
    return None if shape is None else [shape[:2] + (Dim.of(1),) * (len(shape) - 2)]


@shape_of("ConvTranspose")
def _conv_transpose(node: ir.Node, a: Known) -> Shapes:
    x, w = a.shape(node.inputs[0]), a.shape(node.inputs[1])
    if x is None or w is None:
        return None
    return [(x[0], w[1] * attribute(node, "group", 1), *(Dim.unknown("conv") for _ in x[2:]))]


@shape_of("Pad")
def _pad(node: ir.Node, a: Known) -> Shapes:
    shape, pads = a.shape(node.inputs[0]), a.contents(operand(node, 1))
    if shape is None:
        return None
    if operand(node, 1) is None:
        pads = tuple(map(Dim.of, attribute(node, "pads", ())))
    axes = constant_ints(node, a, 3, "axes") if operand(node, 3) is not None else list(range(len(shape)))
    if pads is None or axes is None or len(pads) != 2 * len(axes):
        return [tuple(Dim.unknown("pad") for _ in shape)]
    dims = list(shape)
    for i, axis in enumerate(resolve_axis(x, len(shape)) for x in axes):
        dims[axis] = dims[axis] + pads[i] + pads[i + len(axes)]
    return [tuple(dims)]


@shape_of("DepthToSpace", "SpaceToDepth")
def _space(node: ir.Node, a: Known) -> Shapes:
    shape = a.shape(node.inputs[0])
    return None if shape is None else [(shape[0], *(Dim.unknown("space") for _ in shape[1:]))]


@shape_of("TopK")
def _top_k(node: ir.Node, a: Known) -> Shapes:
    shape, count = a.shape(node.inputs[0]), a.contents(operand(node, 1))
    if shape is None:
        return None
    axis = resolve_axis(attribute(node, "axis", -1), len(shape))
    size = count[0] if count else Dim.unknown("top_k")
    return [shape[:axis] + (size,) + shape[axis + 1 :]] * 2


@shape_of("If")
def _if(node: ir.Node, a: Known) -> Shapes:
    """What both branches agree on; a constant condition's branch alone."""
    branches = [attribute(node, "then_branch"), attribute(node, "else_branch")]
    condition = a.constant(node.inputs[0])
    if condition is not None and condition.size == 1:
        branches = [branches[0 if condition.reshape(-1)[0] else 1]]
    outputs = zip(*(branch.outputs for branch in branches), strict=True)
    return [_common([a.shape(value) for value in values]) for values in outputs]


def _common(shapes: list[Shape | None]) -> Shape | None:
    known = [s for s in shapes if s is not None]
    if len(known) < len(shapes) or len(set(map(len, known))) != 1:
        return None
    return tuple(sizes[0] if len(set(sizes)) == 1 else Dim.unknown("if") for sizes in zip(*known, strict=True))


@shape_of("com.microsoft::SkipLayerNormalization", "com.microsoft::SkipSimplifiedLayerNormalization")
def _skip_normalization(node: ir.Node, a: Known) -> Shapes:
    shape = a.shape(node.inputs[0])
    return [shape, None, None, shape]  # the fourth is the sum that was normalized


@shape_of("com.microsoft::EmbedLayerNormalization")
def _embedding(node: ir.Node, a: Known) -> Shapes:
    ids, table = a.shape(node.inputs[0]), a.shape(node.inputs[2])
    return None if ids is None or table is None else [(*ids, table[-1]), ids[:1], (*ids, table[-1])]


@shape_of("com.microsoft::FusedMatMul", "com.microsoft::TransposeMatMul")
def _fused_matmul(node: ir.Node, a: Known) -> Shapes:
    x, y = a.shape(node.inputs[0]), a.shape(node.inputs[1])
    if x is None or y is None or min(len(x), len(y)) < 2:
        return None
    ordered = (tuple(d[i] for i in multiplied_order(node, side, len(d))) for side, d in (("A", x), ("B", y)))
    return [matmul_shape(*ordered)]


@shape_of("com.microsoft::QLinearAdd", "com.microsoft::QLinearMul")
def _qlinear_elementwise(node: ir.Node, a: Known) -> Shapes:
    return [broadcast([a.shape(node.inputs[0]), a.shape(node.inputs[3])])]


@shape_of("com.microsoft::QLinearSoftmax")
def _qlinear_softmax(node: ir.Node, a: Known) -> Shapes:
    return [a.shape(node.inputs[0])]


@shape_of("QLinearMatMul", "com.microsoft::QLinearMatMul")
def _qlinear_matmul(node: ir.Node, a: Known) -> Shapes:
    return [matmul_shape(a.shape(node.inputs[0]), a.shape(node.inputs[3]))]


@shape_of("com.microsoft::MatMulNBits", "com.microsoft::MatMulBnb4")
def _matmul_nbits(node: ir.Node, a: Known) -> Shapes:
    x, columns = a.shape(node.inputs[0]), attribute(node, "N")
    return None if x is None or columns is None else [(*x[:-1], Dim.of(columns))]


@shape_of("DynamicQuantizeLinear")
def _dynamic_quantize(node: ir.Node, a: Known) -> Shapes:
    return [a.shape(node.inputs[0]), (), ()]
