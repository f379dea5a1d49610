# SPDX-License-Identifier: Apache-2.0
"""How decode_sm90 cuts the key tiles of all heads into one range a block (kernels/decode_sm90/ranges.h): every small
case, and random ones of many lengths."""

from __future__ import annotations

import itertools
from types import ModuleType

import numpy as np
import pytest


def check(fa_csrc: ModuleType, tiles: list[int], blocks: int) -> int:
    """Every tile is computed once, and the parts of a head know of each other. Returns how many heads have several."""
    heads: dict[int, list[tuple[int, ...]]] = {}
    for head, *piece in fa_csrc.pieces_of_heads(tiles, blocks):
        heads.setdefault(head, []).append(tuple(piece))
    case, slots, counters, shared = f"{tiles} on {blocks}", [], [], 0
    for head, count in enumerate(tiles):
        pieces = heads.get(head, [])
        assert pieces, f"{case}: nobody computes head {head}"
        ends = [0, *(to for _, to, *_ in pieces)]
        assert [from_ for from_, *_ in pieces] == ends[:-1] and ends[-1] == count, f"{case}: {pieces} of head {head}"
        assert {number for *_, number in pieces} == {len(pieces)}, f"{case}: {pieces} of head {head}"
        if len(pieces) == 1:
            continue
        shared += 1
        first = pieces[0][3]
        assert [block for _, _, block, *_ in pieces] == list(range(first, first + len(pieces))), case
        assert {piece[3] for piece in pieces} == {first}, case
        counters.append(first)
        # Of its block's two slots, a head's first part has the second, and the others have the first.
        slots += [2 * first + 1, *(2 * (first + i) for i in range(1, len(pieces)))]
    assert len(set(slots)) == len(slots) and len(set(counters)) == len(counters), case
    return shared


def test_equal_heads(fa_csrc):
    shared = 0
    for tiles, heads, blocks in itertools.product(range(1, 25), range(1, 17), range(1, 17)):
        shared += check(fa_csrc, [tiles] * heads, blocks)
    assert shared > 10_000


@pytest.mark.parametrize("most", [4, 12, 60])
def test_heads_of_any_lengths(fa_csrc, most):
    rng = np.random.default_rng(most)
    shared = 0
    for _ in range(4000):
        tiles = rng.integers(1, most + 1, rng.integers(1, 20)).tolist()
        shared += check(fa_csrc, tiles, int(rng.integers(1, 24)))
    assert shared > 1000


def test_a_short_head_that_is_cut_in_its_middle_has_one_piece(fa_csrc):
    """The cut at 8 is as near to the beginning of the second head as to its end."""
    assert fa_csrc.pieces_of_heads([6, 4, 6], 2) == [(0, 0, 6, 0, 0, 1), (1, 0, 4, 0, 1, 1), (2, 0, 6, 1, 1, 1)]
