# SPDX-License-Identifier: Apache-2.0
"""Which fused sites have heads that no CUDA kernel takes: cuda_heads.def, the one table, against the report's sites."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from .report import SiteReport
from .schema import table_rows
from .spec import AttentionSpec, Candidate

_ROW = re.compile(r"^FA_CUDA_HEADS\((\w+), (\d+)\)\s*$")
_NAMES = {"float": "float32"}  # ONNX's name of the type: the table's


@functools.cache
def widest() -> dict[str, int]:
    """Columns of the widest heads by NumPy's name of the type."""
    return {dtype: int(columns) for dtype, columns in table_rows("cuda_heads.def", "FA_CUDA_HEADS", _ROW)}


def cpu_only_note(candidates: Iterable[Candidate]) -> str:
    """A sentence that names the fused sites which run on CPUs only, "" where there are none.

    Sites whose sizes the model does not tell are not judged.
    """
    found = []
    for candidate in candidates:
        if not isinstance(candidate.outcome, AttentionSpec):
            continue
        site = SiteReport.from_candidate(candidate)
        cast = candidate.outcome.query.value.dtype  # another type than the model's, where the core has its own
        name = cast.name.lower() if cast is not None else site.dtype or ""
        name = _NAMES.get(name, name)
        columns = max((d for d in (site.head_dim, site.head_dim_v) if isinstance(d, int)), default=0)
        if name in widest() and columns > widest()[name]:
            found.append(f"'{site.name}' (head_dim {columns} in {name}, at most {widest()[name]})")
    if not found:
        return ""
    return f"no CUDA kernel takes the heads of {', '.join(found)}: our library runs the rewritten model on CPUs only"
