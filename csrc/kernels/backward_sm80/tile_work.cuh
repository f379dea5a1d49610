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
  int num_keys;  // in use
};

__device__ __forceinline__ TileWork work_of(const Grid& grid, int sequence_idx, int kv_head) {
  const Sequence sequence = grid.sequences.at(sequence_idx);
  return {sequence, sequence.mask.band(), sequence_idx, kv_head, static_cast<int>(sequence.mask.kv_length)};
}

/// Tiles of tile_q query rows that see some of the keys first_key … end_key - 1: begin … end - 1. A tile is among them if and
/// only if tiles_of_keys() of its rows has a tile of these keys.
__device__ __forceinline__ KeySpan tiles_of_rows(const TileWork& work, int first_key, int end_key, int tile_q) {
  end_key = min(end_key, work.num_keys);
  const int first = max(0, first_key - work.band.right + 1);
  const int end = min(static_cast<int>(work.sequence.query_length), end_key - work.band.left);
  return first < end && first_key < end_key ? tiles_touched({first, end}, tile_q) : KeySpan{0, 0};
}

/// Tiles of tile_k keys of which the rows of a tile see some.
__device__ __forceinline__ KeySpan tiles_of_keys(const TileWork& work, int row_tile, int tile_q, int tile_k) {
  const int first = row_tile * tile_q, last = min(first + tile_q, static_cast<int>(work.sequence.query_length)) - 1;
  const KeySpan seen = work.band.seen_by_some(first, last, {0, work.num_keys});
  return first <= last && seen.begin < seen.end ? tiles_touched(seen, tile_k) : KeySpan{0, 0};
}

/// Do all rows of the tile, in use or not, see all of the keys, as far as lengths and windows go?
__device__ __forceinline__ bool sees_all(const TileWork& work, int row_tile, int tile_q, int first_key, int tile_k) {
  const int first = row_tile * tile_q;
  const KeySpan seen = work.band.seen_by_all(first, first + tile_q - 1, {0, work.num_keys});
  return first_key >= seen.begin && first_key + tile_k <= seen.end;
}

}  // namespace fa::backward_sm80
