// SPDX-License-Identifier: Apache-2.0
// What one thread block of the backward kernels for mma.sync has to do: which keys of which head, and which tiles of query rows
// see some of them.
#pragma once

#include "kernels/backward_sm80/grid.h"
#include "kernels/common/reduce.cuh"

namespace fa::backward_sm80 {

struct TileWork {
  Sequence sequence;
  RowBand band;
  int sequence_idx;
  int kv_head;
  int num_keys;    // in use
  int first_tile;  // of the sequence's tiles of rows in head 0, among RowTiles
};

__device__ __forceinline__ TileWork work_of(const Grid& grid, int sequence_idx, int kv_head) {
  const Sequence sequence = grid.sequences.at(sequence_idx);
  const int64_t first_tile = grid.numbers.tiles.first(0, sequence_idx, sequence.first_row);
  return {sequence,
          sequence.mask.band(),
          sequence_idx,
          kv_head,
          static_cast<int>(sequence.mask.kv_length),
          static_cast<int>(first_tile)};
}

/// Tiles of tile_q query rows that see some of the keys first_key … end_key - 1: begin … end - 1. A tile is among them if and
/// only if tiles_of_keys() of its rows has a tile of these keys.
__device__ __forceinline__ KeySpan tiles_of_rows(const TileWork& work, int first_key, int end_key, int tile_q) {
  return tiles_that_see(work.band, static_cast<int>(work.sequence.query_length), work.num_keys, first_key, end_key, tile_q);
}

/// Tiles of tile_k keys of which the rows of a tile see some.
__device__ __forceinline__ KeySpan tiles_of_keys(const TileWork& work, int row_tile, int tile_q, int tile_k) {
  const int first = row_tile * tile_q, last = min(first + tile_q, static_cast<int>(work.sequence.query_length)) - 1;
  const KeySpan seen = work.band.seen_by_some(first, last, {0, work.num_keys});
  return first <= last && seen.begin < seen.end ? tiles_touched(seen, tile_k) : KeySpan{0, 0};
}

/// One of a block's tiles of keys, and what tiles of query rows are to it. The first and the last tile of rows that see a tile of
/// keys rise with the keys, and the tiles of keys that some row sees are neighbours. So one comparison tells whether the block
/// has visited a tile of rows before, and one whether it will again.
struct KeyTile {
  int first_key;
  KeySpan rows;        // the block's tiles of rows that see some of the keys
  int visited_begin;   // tiles from here on the block has visited, with keys behind these
  int visited_again;   // tiles before here it visits again, with keys before these
  KeySpan whole_rows;  // tiles of which every row, in use or not, sees every key, as far as lengths and windows go
};

/// The i-th of a split's. Its first is shared with the split's helper, whose part it is where `helps`.
__device__ __forceinline__ KeyTile key_tile_of(const TileWork& work, const KeySplit& keys, int i, const Helpers& helpers,
                                               bool helps, int tile_q, int tile_k) {
  const auto rows_of = [&](int tile) { return tiles_of_rows(work, tile * tile_k, (tile + 1) * tile_k, tile_q); };
  const int first_key = keys.tile(i) * tile_k, end_key = first_key + tile_k;
  const bool is_last_helped = helps && keys.split + 1 == keys.num_splits;
  const KeySpan behind = is_last_helped ? KeySpan{0, 0} : rows_of(helps ? keys.split + 1 : keys.tile(i + 1));
  KeySpan rows = rows_of(keys.tile(i)), whole{};
  if (i == 0) {
    const int helped_end = min(rows.end, rows.begin + helpers.row_tiles);
    rows = helps ? KeySpan{rows.begin, helped_end} : KeySpan{helped_end, rows.end};
  }
  if (end_key <= work.num_keys) whole = tiles_inside({max(0, end_key - work.band.right), first_key - work.band.left + 1}, tile_q);
  return {first_key, rows, behind.begin < behind.end ? behind.begin : INT32_MAX, i == 0 ? 0 : rows_of(keys.tile(i - 1)).end,
          whole};
}

/// Has a split, or as number num_splits the helper, sums of a tile of rows that sees these tiles of keys?
__device__ __forceinline__ bool has_sums(const TileWork& work, const Grid& grid, int split, int row_tile, KeySpan seen,
                                         int tile_q, int tile_k) {
  const int num_splits = grid.num_splits.divisor;
  const auto is_helped = [&](int tile) {
    return row_tile < tiles_of_rows(work, tile * tile_k, (tile + 1) * tile_k, tile_q).begin + grid.helpers.row_tiles;
  };
  if (split == num_splits) {  // tiles of keys further behind are helped with rows further behind
    const int last = min(seen.end, num_splits) - 1;
    return last >= seen.begin && is_helped(last);
  }
  const bool sees_first = seen.begin <= split && split < seen.end;
  return (sees_first && !is_helped(split)) || KeySplit{split, num_splits}.has_any(max(seen.begin, num_splits), seen.end);
}

}  // namespace fa::backward_sm80
