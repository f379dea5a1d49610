# SPDX-License-Identifier: Apache-2.0
"""Which rows the tiles of prefill_sm90 have (kernels/prefill_sm90/tile_rows.h), of sequences of all lengths up to 1100
rows."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest


def first_rows(fa_csrc: ModuleType, num_rows: int, warpgroups: int, end_with_rows: bool, folds: bool):
    """For each tile the first row of each warpgroup, on which all who ask agree."""
    tiles = fa_csrc.rows_of_tiles(num_rows, warpgroups, end_with_rows, folds)
    assert all(own == others for tile in tiles for own, others in tile)
    return [[own for own, _ in tile] for tile in tiles]


@pytest.mark.parametrize("folds", [False, True], ids=["neighbours", "folded"])
@pytest.mark.parametrize("end_with_rows", [False, True])
@pytest.mark.parametrize("warpgroups", [1, 2, 3, 4])
def test_each_row_has_one_warpgroup(fa_csrc, warpgroups, end_with_rows, folds):
    for num_rows in range(1, 1101):
        tiles = first_rows(fa_csrc, num_rows, warpgroups, end_with_rows, folds)
        rows = sorted(itertools.chain.from_iterable(tiles))
        begin = rows[0]
        assert rows == list(range(begin, begin + 64 * len(rows), 64)), f"{num_rows} rows: {tiles}"
        # Groups without a row are fewer than a tile has: before row 0, or where tiles don't end with the last, behind.
        assert begin % 64 == 0 and begin + 64 * len(rows) >= num_rows, f"{num_rows} rows: {tiles}"
        if end_with_rows:
            assert -64 * warpgroups < begin <= 0 and rows[-1] < num_rows, f"{num_rows} rows: {tiles}"
        else:
            assert begin == 0 and rows[-1] - num_rows < 64 * (warpgroups - 1), f"{num_rows} rows: {tiles}"
        # A tile's first warpgroup has its first rows, and the last one its last.
        assert all(tile == sorted(tile) for tile in tiles), f"{num_rows} rows: {tiles}"


@pytest.mark.parametrize("warpgroups", [2, 3, 4])
def test_folded_tiles_have_about_equally_much_to_do(fa_csrc, warpgroups):
    """Under a causal mask a row's work rises with its number. Tiles of an even number of warpgroups all have the same,
    those of three differ by the third's rows."""
    for num_rows in range(1, 1101):
        tiles = first_rows(fa_csrc, num_rows, warpgroups, True, True)
        work = [sum(tile) for tile in tiles]
        most = 0 if warpgroups % 2 == 0 else 64 * (len(tiles) - 1)
        assert max(work) - min(work) == most, f"{num_rows} rows: {tiles}"
