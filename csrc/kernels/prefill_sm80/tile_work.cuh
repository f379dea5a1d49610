// SPDX-License-Identifier: Apache-2.0
// What one thread block of the sm_80 kernels has to do: which rows of which heads, and which key tiles in which order. A
// block finds its tile of rows from its index, longest work first.
#pragma once

#include "kernels/common/reduce.cuh"
#include "kernels/prefill_sm80/tile_grid.h"

namespace fa {

struct TileWork {
  Sequence sequence;
  int sequence_idx;
  int head;       // query head; key head where query heads share a tile
  int first_row;  // of the tile; counts (row, head in group) pairs where query heads share a tile
  bool exists;
  bool mask_by_element;  // the user's mask hides keys within `keys`
  KeyRange keys;         // that the user's mask can show
};

/// Which sequence holds tile `tile` of all packed sequences' row tiles, and its index there, the longest first. (-1, 0): none.
/// One warp's lanes look at 32 sequences at a time.
template <int kTileQ>
__device__ inline int2 find_packed_tile(const TileGrid& grid, int tile) {
  const int lane = threadIdx.x % 32;
  for (int first = 0, tiles_before = 0; first < grid.num_spans; first += 32) {
    int tiles = 0;
    if (first + lane < grid.num_spans) {
      tiles = static_cast<int>((grid.sequences.at(first + lane).num_rows + kTileQ - 1) / kTileQ);
    }
    int end = tiles_before + tiles;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, end - tiles_before, distance);
      if (lane >= distance) end += other;
    }
    const unsigned holders = __ballot_sync(kAllLanes, end > tile);
    if (holders != 0) {
      const int holder = __ffs(holders) - 1;
      return {first + holder, __shfl_sync(kAllLanes, end, holder) - 1 - tile};
    }
    tiles_before = __shfl_sync(kAllLanes, end, 31);
  }
  return {-1, 0};
}

template <int kTileQ>
__device__ __forceinline__ TileWork find_tile(const AttentionParams& p, const TileGrid& grid) {
  const TilePlace place = grid.order.at(blockIdx.x);
  int b = place.sequence, row_tile = grid.order.num_row_tiles - 1 - place.tile;
  if (p.cu_seqlens_q.present) {
    const int2 found = find_packed_tile<kTileQ>(grid, place.tile);
    b = found.x, row_tile = found.y;
  }
  TileWork work{{}, b, place.head, row_tile * kTileQ, b >= 0, false, {}};
  if (work.exists) work.sequence = grid.sequences.at(b);
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

__device__ __forceinline__ KeyRange intersection(KeyRange a, KeyRange b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

/// Keys that some, and that all, of the rows `first` … `last` of the tile see.
struct SeenKeys {
  KeyRange some, all;
};

template <bool kPackHeads>
__device__ __forceinline__ SeenKeys seen_keys(const TileWork& work, const TileGrid& grid, int first, int last) {
  const int64_t first_row = tile_row<kPackHeads>(work, grid, first).row;
  const int64_t last_row = min(static_cast<int64_t>(tile_row<kPackHeads>(work, grid, last).row), work.sequence.query_length - 1);
  if (first_row > last_row) return {{0, 0}, {0, 0}};
  const MaskRule& mask = work.sequence.mask;
  return {intersection(mask.key_range(first_row, last_row), work.keys),
          intersection(mask.full_range(first_row, last_row), work.keys)};
}

/// The key tiles a block visits, and those of them that need no element test.
struct KeyTiles {
  int begin, end, full_begin, full_end;
};

__device__ __forceinline__ KeyTiles key_tiles(const SeenKeys& keys, int tile_kv, int split, int num_splits) {
  if (keys.some.begin >= keys.some.end) return {0, 0, 0, 0};
  int begin = static_cast<int>(keys.some.begin / tile_kv), end = static_cast<int>((keys.some.end + tile_kv - 1) / tile_kv);
  if (num_splits > 1) {
    const int64_t count = end - begin, first = begin;
    begin = static_cast<int>(first + count * split / num_splits);
    end = static_cast<int>(first + count * (split + 1) / num_splits);
  }
  return {begin, end, static_cast<int>((keys.all.begin + tile_kv - 1) / tile_kv), static_cast<int>(keys.all.end / tile_kv)};
}

}  // namespace fa
