# SPDX-License-Identifier: Apache-2.0
"""An array of a framework that nobody knows."""

from __future__ import annotations

from typing import Any


class DLPackOnly:
    """Hands out the memory of an array, or of a CUDA tensor, and does no more."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__(**options)
