# SPDX-License-Identifier: Apache-2.0
"""The one exception for what a user can have done wrong. Raised by everything that reads or writes a file."""

from __future__ import annotations


class ModelError(ValueError):
    """Bad input or a failed write. The text is one line: where, what, and what to do about it."""
