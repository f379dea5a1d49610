# SPDX-License-Identifier: Apache-2.0
"""Files as a model cache, such as huggingface_hub's, has them."""

from __future__ import annotations

import pathlib


def link(folder: pathlib.Path, blobs: pathlib.Path) -> None:
    """Moves the files of a folder to another one, where they have other names, and leaves links."""
    blobs.mkdir()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number, file in enumerate(files):
        blob = blobs / f"{number:040x}"
        file.rename(blob)
        file.symlink_to(blob)
