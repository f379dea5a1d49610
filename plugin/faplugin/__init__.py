# SPDX-License-Identifier: Apache-2.0
"""FlashAttention for ONNX Runtime, TensorRT and Python arrays.

    session = faplugin.session("model.fa.onnx")      # onnxruntime's, for models that faexport has rewritten
    output = faplugin.attention(query, key, value, is_causal=True)
    gradients = faplugin.attention_backward(d_output, output, lse, query, key, value, is_causal=True)
    print(faplugin.explain(query, key, value, device="sm_90"))

The operator's tensors and attributes are described in docs/operator.md.
"""

from faplugin._attention import attention, explain
from faplugin._backward import attention_backward
from faplugin._library import library_path, register
from faplugin._session import session

__version__: str

__all__ = ["__version__", "attention", "attention_backward", "explain", "library_path", "register", "session"]


def __getattr__(name: str) -> str:
    """`__version__`, looked up when it is asked for: that is slow."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import metadata

    # Wheels of this module have a name that says what for; an installation from a checkout is called faexport.
    for package in ("faplugin", "faplugin-cu13", "faplugin-cu12", "faexport"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "0+unknown"  # run from a source tree
