# SPDX-License-Identifier: Apache-2.0
"""Which heads are too wide for every CUDA kernel: cuda_heads.def, the one table, which the C++ code reads too."""

from __future__ import annotations

import functools
import re

from faexport.schema import table_rows

_ROW = re.compile(r"^FA_CUDA_HEADS\((\w+), (\d+)\)\s*$")


@functools.cache
def widest() -> dict[str, int]:
    """Columns of the widest heads by NumPy's name of the type."""
    return {dtype: int(columns) for dtype, columns in table_rows("cuda_heads.def", "FA_CUDA_HEADS", _ROW)}
