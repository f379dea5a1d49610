# SPDX-License-Identifier: Apache-2.0
"""FlashAttention for ONNX Runtime, TensorRT and Python arrays.

    session = faplugin.session("model.fa.onnx")      # onnxruntime's, for models that faexport has rewritten
    output = faplugin.attention(query, key, value, is_causal=True)
    print(faplugin.explain(query, key, value, device="sm_90"))

The operator's tensors and attributes are described in docs/operator.md.
"""

from importlib import metadata

from ._attention import attention, explain
from ._library import library_path, register
from ._session import session

try:
    __version__ = metadata.version("faexport")
except metadata.PackageNotFoundError:  # run from a source tree
    __version__ = "0+unknown"

__all__ = ["__version__", "attention", "explain", "library_path", "register", "session"]
