# SPDX-License-Identifier: Apache-2.0
"""What the search for scores asks about nodes that write a part of a tensor anew: answered by index algebra
(mask/proof.py), which this room doesn't import."""

from __future__ import annotations

from typing import Protocol

import onnx_ir as ir


class Writes(Protocol):
    def writes_everything(self, node: ir.Node) -> bool:
        """Is a ScatterND known to give its updates, whatever stood there before?"""
        ...

    def starts_of_part(self, node: ir.Node) -> tuple[int, ...] | None:
        """Where a ScatterND that writes one box of elements begins, on each of the axes that its indices name."""
        ...
