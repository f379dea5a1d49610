# SPDX-License-Identifier: Apache-2.0
"""The door between a matcher and the proof of its mask (understand/mask): hands over the options."""

from __future__ import annotations

from collections.abc import Sequence

from faexport.match import Context
from faexport.spec import Mask, MaskTerm, Refusal, ScoreShape
from faexport.understand.mask.options import MaskOptions


def understand(terms: Sequence[MaskTerm], scores: ScoreShape, context: Context) -> Mask | Refusal:
    """The mask that these terms make, as far as it is proven; no terms are no mask."""
    given = context.options
    options = MaskOptions(given.assume_right_padding, assume_full_rows=given.assume_full_rows)
    return context.masks.understand(terms, scores, options)
