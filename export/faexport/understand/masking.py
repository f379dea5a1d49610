# SPDX-License-Identifier: Apache-2.0
"""The door between a matcher and understand_mask (mask.py): hands over options and what is known of shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from faexport.spec import Mask, MaskTerm, Refusal, ScoreShape
from faexport.understand.dims import plain
from faexport.understand.mask import MaskOptions, graph_masks, understand_mask

if TYPE_CHECKING:
    from faexport.match import Context


def understand(terms: Sequence[MaskTerm], scores: ScoreShape, context: Context) -> Mask | Refusal:
    """The mask that these terms make, as far as it is proven; no terms are no mask."""

    def shapes(value: ir.Value) -> list[int | str | None] | None:
        found = context.analysis.shape(value)
        return None if found is None else [plain(d) for d in found]

    graph_masks(context.graph, shapes).ctx.opset = context.analysis.opset
    given = context.options
    options = MaskOptions(given.assume_right_padding, assume_full_rows=given.assume_full_rows)
    return understand_mask(terms, scores, options, shapes)
