# SPDX-License-Identifier: Apache-2.0
"""The door between a matcher and understand_mask (understand/mask): hands over options and what is known of shapes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from faexport.match import Context
from faexport.spec import Mask, MaskTerm, Refusal, ScoreShape
from faexport.understand.mask.proof import MaskOptions, graph_masks, understand_mask
from faexport.understand.shapes.dims import plain


def understand(terms: Sequence[MaskTerm], scores: ScoreShape, context: Context) -> Mask | Refusal:
    """The mask that these terms make, as far as it is proven; no terms are no mask."""

    def shapes(value: ir.Value) -> list[int | str | None] | None:
        found = context.analysis.shape(value)
        return None if found is None else [plain(d) for d in found]

    graph_masks(context.graph, shapes).ctx.opset = context.analysis.opset
    given = context.options
    options = MaskOptions(given.assume_right_padding, assume_full_rows=given.assume_full_rows)
    return understand_mask(terms, scores, options, shapes)
