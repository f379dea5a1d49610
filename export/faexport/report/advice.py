# SPDX-License-Identifier: Apache-2.0
"""What to do about a site that is left: the kinds of reasons, what each means, and the advice. The HTML report shows it
beside the reason; docs/not-fused.md lists it, and a test compares the two."""

from __future__ import annotations

import dataclasses

from faexport.spec import Refusal, RefusalKind


@dataclasses.dataclass(frozen=True)
class Advice:
    kind: RefusalKind
    example: str  # a reason of this kind
    meaning: str
    action: str


KINDS = (
    Advice(
        RefusalKind.SCORES_READ,
        "the attention weights are also an output of the model",
        "The model hands out the S × S matrix that a fused operator never makes.",
        "Export without it: output_attentions=False in transformers, need_weights=False in nn.MultiheadAttention.",
    ),
    Advice(
        RefusalKind.QUANTIZED,
        "the scores are quantized inside the block (QuantizeLinear to int8)",
        "The model was quantized between the two matrix products, and the operator doesn't round there.",
        "--assume scores-unquantized computes it without, nearer to the model before it was quantized, where the "
        "reason says so; else fuse first, then quantize.",
    ),
    Advice(
        RefusalKind.RANDOM,
        "Dropout is in training mode",
        "The model draws random numbers when it runs, so that no two runs agree.",
        "Call eval() on the very module that is exported, before each export: PyTorch's older exporter leaves all "
        "modules inside in the mode that this one had.",
    ),
    Advice(
        RefusalKind.RUNTIME_OPERATOR,
        "an operator of onnxruntime is not read",
        "The file went through onnxruntime's optimizer, which wrote an operator of its own.",
        "Fuse the model as it was exported, before onnxruntime's optimizer.",
    ),
    Advice(
        RefusalKind.SOFTCAP,
        "a mask or bias is added before the softcap (Tanh)",
        "The operator adds masks and biases behind the softcap, as the models do that have one.",
        "Check whether the model means this order; if so, the block has to stay as it is.",
    ),
    Advice(
        RefusalKind.FACTOR,
        "the scores are multiplied by a tensor of rows and keys",
        "A factor that differs for each pair of query and key is no part of attention as the operator computes it.",
        "Nothing, where the model means it. A mask written as a factor can be exported as one that is added.",
    ),
    Advice(
        RefusalKind.TYPE,
        "query, key and value are not float32, float16 or bfloat16",
        "The operator has no other types.",
        "Export the model in one of them.",
    ),
    Advice(
        RefusalKind.UNKNOWN_SIZES,
        "the shape of query, key or value is not known",
        "The file does not tell enough of the sizes to prove what the block computes.",
        "Export with fixed head sizes and named dynamic axes; onnx.shape_inference or a newer exporter may tell more.",
    ),
    Advice(
        RefusalKind.MIXED,
        "the weights of different heads or batch entries are mixed after the softmax",
        "Scores or weights go through a layer of their own, over the heads as in talking-heads attention or over "
        "features as in additive attention. A fused operator never has all of them at once.",
        "Nothing, where the model means it: the block has to stay. Where it doesn't, look at the transposes around it.",
    ),
    Advice(
        RefusalKind.NO_ATTENTION,
        "the product after the softmax does not sum over the softmax's axis",
        "A softmax between two matrix products that is not attention: pooling, routing, a distribution over classes.",
        "Nothing: it has to stay. Where it was meant to be attention, look at the axis of the softmax.",
    ),
    Advice(
        RefusalKind.OTHER_NAMES,
        "queries, keys and values may have different numbers of batch entries or heads, and the file states one for "
        "the result",
        "Their sizes have different names in the file, as Dim.DYNAMIC gives them; it is not said that they are equal.",
        "Give the sizes that are equal one name when exporting: the same torch.export.Dim for both in dynamic_shapes, "
        "in place of Dim.DYNAMIC, or the same word in dynamic_axes.",
    ),
    Advice(
        RefusalKind.UNLIKE_SIZES,
        "its mask may have more batch entries than the scores, which would then take its size",
        "The file allows sizes that don't fit one another, in a form in which they can't be brought to one.",
        "Give the sizes that are equal the same name when exporting (dynamic_axes, dynamic_shapes).",
    ),
    Advice(
        RefusalKind.DEFECT,
        "our analysis of it failed",
        "A defect of ours that costs only this site.",
        "Please report it with the model; FAEXPORT_TRACEBACK=1 shows where it happened.",
    ),
    Advice(
        RefusalKind.OTHER,
        "any other reason",
        "The block computes something that the operator does not, or writes it in a way that can't be proven.",
        "Look at the node that the reason names. Where it is plain attention all the same, please report it.",
    ),
)
_OF_KIND = {advice.kind: advice for advice in KINDS}


def advice(refusal: Refusal) -> Advice:
    return _OF_KIND[refusal.kind]
