# SPDX-License-Identifier: Apache-2.0
"""Finds attention in ONNX models, proves what it computes, and replaces it by one flash attention operator."""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("faexport")
except importlib.metadata.PackageNotFoundError:  # run from a source tree
    __version__ = "0.0.0+source"
