# SPDX-License-Identifier: Apache-2.0
"""The version of the installed package. A function, as it is slow to find."""

from __future__ import annotations


def version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("faexport")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "0.0.0+source"
