# SPDX-License-Identifier: Apache-2.0
"""Where a rewritten model comes from: versions, options, times, and the files with their sizes and checksums. In the
report, and in short in the model's own metadata. Called by jobs.py."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import onnx_ir as ir

from faexport.options import Options
from faexport.report.data import FileRecord, Provenance, Report
from faexport.version import version

METADATA_KEY = "faexport"  # of the written model's metadata
PACKAGES = ("onnx", "onnx-ir", "numpy")
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # one of them, or none


def begin(options: Options) -> Provenance:
    """What is known before anything is done."""
    return Provenance(_versions(), _words(options))


def records(paths: Iterable[str | os.PathLike[str]]) -> list[FileRecord]:
    """Sizes and checksums of files; each is read once from its beginning to its end."""
    found = []
    for path in dict.fromkeys(os.fspath(path) for path in paths):
        with pathlib.Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            found.append(FileRecord(path, file.tell(), digest))
    return found


def stamp(model: ir.Model, report: Report, options: Options) -> None:
    """Says in the model's metadata what rewrote it, and how."""
    changed = ", ".join(f"{name}={value}" for name, value in _words(options).items() if value != _DEFAULTS[name])
    with_options = f" with {changed}" if changed else ""
    model.metadata_props[METADATA_KEY] = (
        f"faexport {version()} fused {report.num_fused} of {len(report.sites)} attention sites{with_options}"
    )


def _versions() -> dict[str, str]:
    found = {"faexport": version()}
    for package in (*PACKAGES, *RUNTIMES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _words(options: Options) -> dict[str, Any]:
    """The options as plain data."""
    data = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {
        name: value.name.lower() if isinstance(value, ir.DataType) else list(value) if type(value) is tuple else value
        for name, value in data.items()
    }


_DEFAULTS = _words(Options())
