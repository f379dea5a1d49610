# SPDX-License-Identifier: Apache-2.0
"""The code that the documentation shows."""

from __future__ import annotations

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in this language, e.g. "sh"."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
