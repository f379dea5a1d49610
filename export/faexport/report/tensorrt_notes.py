# SPDX-License-Identifier: Apache-2.0
"""A report's note about fused sites that the TensorRT plugin does not take, in a model that is written for it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from faexport.schema import table_rows
from faexport.spec import AttentionSpec, Candidate

_ROW = re.compile(r"^FA_NOT_IN_TENSORRT\(\w+, (\w+)\)\s*$")


def missing_note(candidates: Iterable[Candidate]) -> str:
    """A sentence that names the fused sites which the plugin refuses, "" where there are none."""
    found = {c.name: why for c in candidates if isinstance(c.outcome, AttentionSpec) and (why := _missing(c.outcome))}
    if not found:
        return ""
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    name, why = next(iter(found.items()))
    return (
        f"TensorRT can't build this model: our plugin for it doesn't have what site '{name}'{more} needs ({why}); "
        "onnxruntime runs it (--target onnxruntime, or cuda)"
    )


def _missing(spec: AttentionSpec) -> str:
    """What a site has that the plugin doesn't offer, "" for nothing."""
    cache = spec.further_attributes.get("cache", "append")
    if cache != "append":
        return f"cache = {cache}"
    return next((name for name in _inputs() if name in spec.further_inputs), "")


@functools.cache
def _inputs() -> list[str]:
    """The names of such inputs: not_in_tensorrt.def, the one table, which the C++ code reads too."""
    return [name for (name,) in table_rows("not_in_tensorrt.def", "FA_NOT_IN_TENSORRT", _ROW)]
