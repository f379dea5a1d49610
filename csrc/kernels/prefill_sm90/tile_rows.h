// SPDX-License-Identifier: Apache-2.0
// Which rows of its sequence a tile has: for each consumer warpgroup 64, one behind the other, or in folded tiles from several
// places. No CUDA, so that tests can try all sequences. Called by tiles.cuh, and by all who want a warpgroup's rows.
#pragma once

#include "semantics/mask.h"

namespace fa::prefill_sm90 {

/// The first of a consumer warpgroup's 64 rows; of a Tile, or a SpoiltTile. kWarpgroups: how many a tile has, or 1 where tiles
/// are never folded. NOTE: fewer of them take fewer registers.
template <int kWarpgroups = 4, class AnyTile>
FA_HD int first_row_of(const AnyTile& tile, int warpgroup) {
  if constexpr (kWarpgroups == 1) return tile.first_row + warpgroup * 64;
  const int second = tile.first_row + (warpgroup & 1) * tile.next_row;
  return kWarpgroups == 2 ? second : second + (warpgroup >> 1) * tile.next_pair;
}

/// Moves the rows of tile number `local_tile`, so far those from local_tile * kTileRows on, to their places in a sequence of
/// `num_rows` rows and `num_tiles` tiles. end_with_rows: the first tile begins before row 0, so that the last one ends less than
/// 64 rows behind the last row; else the tile that is not full is the last.
///
/// folds: a tile gets 64 rows each from several places, early ones, late ones, and of four warpgroups once more both. Under a
/// causal mask all tiles then have about equally much to do, which counts where each block has one tile: they end together, and
/// not when the one with the latest rows does.
template <int kTileRows, class AnyTile>
FA_HD void place_rows(int local_tile, int num_tiles, int num_rows, bool end_with_rows, bool folds, AnyTile& tile) {
  if (end_with_rows) tile.first_row -= (kTileRows - 1 - (num_rows - 1) % kTileRows) / 64 * 64;
  if (folds) {
    tile.first_row -= local_tile * (kTileRows - 64);
    tile.next_row = (2 * (num_tiles - local_tile) - 1) * 64;
    tile.next_pair = 2 * num_tiles * 64;
  }
}

}  // namespace fa::prefill_sm90
