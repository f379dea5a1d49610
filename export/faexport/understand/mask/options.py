# SPDX-License-Identifier: Apache-2.0
"""What a user may assume of masks. Read by strategies.py, draft.py and check.py."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class MaskOptions:
    """`assume_right_padding`: a padding mask given by the user is ones and then zeros in each row, so lengths say it
    all. `assume_full_rows`: each row sees a key, or its output is never used. `check`: run the mask's subgraph on small
    inputs and compare with what was proven."""

    assume_right_padding: bool = False
    check: bool = True
    assume_full_rows: bool = False
