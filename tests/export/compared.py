# SPDX-License-Identifier: Apache-2.0
"""Small models, fused and compared with what they were made of, in onnxruntime and in this process."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence

import faexport
import numpy as np
import onnx
import onnxruntime
from faexport.pipeline import Options
from faexport.runtimes import operator_library, ort_session

OPTIONS = Options(fallback=False)


def built() -> str | None:
    """The path of libfa_ort.so, if it was built."""
    return str(operator_library.path()) if ort_session.has_library() else None


def session(model: onnx.ModelProto, library: str | None = None) -> onnxruntime.InferenceSession:
    """`library`: libfa_ort.so, for a model with the operator."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray], library: str | None = None) -> list[np.ndarray]:
    """The outputs; `library` as for session()."""
    return session(model, library).run(None, inputs)


def fuse_one(given: onnx.ModelProto, **options: object) -> onnx.ModelProto:
    """The model with its one site fused."""
    made, report = faexport.fuse(given, options=Options(**options))
    assert [site.fused for site in report.sites] == [True]
    return made


def node_of(model: onnx.ModelProto) -> onnx.NodeProto:
    """The operator's only node."""
    (node,) = [n for n in model.graph.node if n.op_type == "FlashAttention"]
    return node


def nodes_by_kind(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """Those of the main graph; an empty list for what isn't there."""
    nodes = collections.defaultdict(list)
    for node in model.graph.node:
        nodes[node.op_type].append(node)
    return nodes


def normal(seed: int, **shapes: Sequence[int]) -> dict[str, np.ndarray]:
    """Inputs of these shapes, float32."""
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def agree(
    given: onnx.ModelProto,
    made: onnx.ModelProto,
    library: str,
    feeds: Iterable[Mapping[str, np.ndarray]],
    atol: float = 1e-5,
) -> None:
    """On each of these inputs both models give tensors of the same shapes and, but for `atol`, numbers."""
    for inputs in feeds:
        for want, have in zip(run(given, inputs), run(made, inputs, library), strict=True):
            assert have.shape == want.shape
            np.testing.assert_allclose(have, want, atol=atol)
