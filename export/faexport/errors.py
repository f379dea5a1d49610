# SPDX-License-Identifier: Apache-2.0
"""The exceptions that callers are meant to catch. ModelError is raised by everything that reads or writes a file."""

from __future__ import annotations

from typing import Any


class ModelError(ValueError):
    """Bad input or a failed write. The text is one line: where, what, and what to do about it."""


class InvalidNodeError(Exception):
    """A node that ONNX's rules do not allow. The text says what of it; it is caught where models are analysed."""


def first_cause(error: BaseException) -> BaseException:
    """What went wrong first: libraries wrap an error in others that only say where it was."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


class NotVerifiedError(Exception):
    """The rewritten model differs from the original, or could not be compared with it, and was not written. The text is
    one line; `report` is what faexport.optimize() found, a faexport.Report."""

    report: Any = None
