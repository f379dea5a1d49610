# SPDX-License-Identifier: Apache-2.0
"""What a shape rule may ask. `Analysis` answers; rules need not know how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from faexport.sizes.dims import Dim

Shape = tuple[Dim, ...]
Shapes = Sequence[Shape | None] | None  # of a node's outputs
Contents = Shape | list[Shape] | None  # the elements of a node's first output, or a list of those of each


class Known(Protocol):
    """What is known of the values in front of a node. Each answer is None where nothing is known."""

    opset: int

    def shape(self, value: ir.Value | None) -> Shape | None: ...

    def rank(self, value: ir.Value | None) -> int | None: ...

    def dtype(self, value: ir.Value | None) -> ir.DataType | None: ...

    def contents(self, value: ir.Value | None) -> tuple[Dim, ...] | None: ...

    def constant(self, value: ir.Value | None) -> np.ndarray | None: ...

    def scalar(self, value: ir.Value | None) -> float | None: ...
