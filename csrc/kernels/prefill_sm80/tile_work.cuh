// SPDX-License-Identifier: Apache-2.0
// What one thread block of the sm_80 kernels has to do: which rows of which heads, and which key tiles in which order. A
// block finds its tile of rows from its index, longest work first.
#pragma once

#include "kernels/common/packed_search.cuh"
#include "kernels/prefill_sm80/tile_grid.h"

namespace fa::prefill_sm80 {

/// The key tiles a block visits, and those of them that need no element test.
struct KeyTiles {
  int begin, end, full_begin, full_end;
};

struct TileWork {
  Sequence sequence;
  RowBand band;  // the windows of its mask
  int sequence_idx;
  int head;       // query head; key head where query heads share a tile
  int first_row;  // of the tile; counts (row, head in group) pairs where query heads share a tile
  bool exists;
  bool mask_by_element;  // the user's mask hides keys within `keys`
  KeySpan keys;          // that the length and the user's mask leave
  KeyTiles tiles;
};

template <int kTileQ>
__device__ __forceinline__ TileWork find_tile(const AttentionParams& p, const TileGrid& grid) {
  const TilePlace place = grid.order.at(blockIdx.x);
  int b = place.sequence, row_tile = grid.order.num_row_tiles - 1 - place.tile;
  if (p.cu_seqlens_q.present) {
    const PackedTile found = find_packed_tile<kTileQ>(grid.sequences, grid.num_spans, place.tile);
    b = found.sequence, row_tile = found.num_tiles - 1 - found.tile;  // the longest first
  }
  TileWork work{{}, {}, b, place.head, row_tile * kTileQ, b >= 0, false, {}, {}};
  if (work.exists) {
    work.sequence = grid.sequences.at(b);
    work.band = work.sequence.mask.band();
  }
  return work;
}

/// One row of the tile: its query row, its head, and whether it exists and is in use.
struct TileRow {
  int row, head;
  bool exists, in_use;
};

template <bool kPackHeads>
__device__ __forceinline__ TileRow tile_row(const TileWork& work, const TileGrid& grid, int row) {
  TileRow result{work.first_row + row, work.head, false, false};
  if constexpr (kPackHeads) {
    result.row = grid.group_size.quotient(work.first_row + row);
    result.head = work.head * grid.group_size.divisor + work.first_row + row - result.row * grid.group_size.divisor;
  }
  result.exists = result.row < work.sequence.num_rows;
  result.in_use = result.row < work.sequence.query_length;
  return result;
}

/// Keys that some, and that all, of the rows `first` … `last` of the tile see.
struct SeenKeys {
  KeySpan some, all;
};

template <bool kPackHeads>
__device__ __forceinline__ SeenKeys seen_keys(const TileWork& work, const TileGrid& grid, int first, int last) {
  const int first_row = tile_row<kPackHeads>(work, grid, first).row;
  const int last_row = min(tile_row<kPackHeads>(work, grid, last).row, static_cast<int>(work.sequence.query_length) - 1);
  if (first_row > last_row) return {{0, 0}, {0, 0}};
  return {work.band.seen_by_some(first_row, last_row, work.keys), work.band.seen_by_all(first_row, last_row, work.keys)};
}

__device__ __forceinline__ KeyTiles key_tiles(const SeenKeys& keys, int tile_kv, int split, int num_splits) {
  if (keys.some.begin >= keys.some.end) return {0, 0, 0, 0};
  KeySpan tiles = tiles_touched(keys.some, tile_kv);
  const KeySpan full = tiles_inside(keys.all, tile_kv);
  if (num_splits > 1) {
    const int64_t count = tiles.end - tiles.begin, first = tiles.begin;
    tiles.begin = static_cast<int>(first + count * split / num_splits);
    tiles.end = static_cast<int>(first + count * (split + 1) / num_splits);
  }
  return {tiles.begin, tiles.end, full.begin, full.end};
}

}  // namespace fa::prefill_sm80
