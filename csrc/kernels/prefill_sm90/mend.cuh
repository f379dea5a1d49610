// SPDX-License-Identifier: Apache-2.0
// Tiles with rows that hold values of hidden keys (common/hidden_values.cuh), in prefill_sm90 and prefill_sm90_f32: consumers
// mark such a tile in its slot, the scheduling warp keeps a list of them in the workspace, and after the block's last tile they
// are mended. Likewise tiles with rows that attend no key, where these are to become the mean of the values, or a given value,
// and this kernel writes them (writes_empty_rows in prefill_sm90.cpp). NOTE: in the loop over tiles, mend_row() cost the products
// 20 registers, in line as much as out of line; so did, in the short instances, a list that consumers keep.
#pragma once

#include "kernels/common/hidden_values.cuh"
#include "kernels/common/mean_rows.cuh"
#include "kernels/prefill_sm90/args.h"

namespace fa::prefill_sm90 {

/// What shared memory holds of them.
template <int kSlots>
struct SpoiltTiles {
  int is_spoilt[kSlots];  // the tile in this slot
  int last_spoilt;        // the last tile on the block's list; -1: it is empty

  /// One thread, before all else.
  __device__ __forceinline__ void init() {
    for (int& x : is_spoilt) x = 0;
    last_spoilt = -1;
  }

  /// A consumer warp, before it gives the slot back: `spoilt` in any of its lanes?
  __device__ __forceinline__ void mark(bool spoilt, int slot) {
    if (__any_sync(kAllLanes, spoilt) && threadIdx.x % 32 == 0) is_spoilt[slot] = 1;
  }

  /// The scheduling warp, when all readers have done with the tile in the slot.
  __device__ __forceinline__ void note(const KernelArgs& args, const Tile& tile, int slot) {
    if (threadIdx.x % 32 != 0 || is_spoilt[slot] == 0) return;
    args.spoilt[tile.index] = {last_spoilt, tile.sequence, tile.head, tile.first_row, tile.next_row, tile.next_pair};
    last_spoilt = tile.index;
    is_spoilt[slot] = 0;
  }

  /// A warp, when all tiles are on the list and their output is in device memory: mends rows first_row … + num_rows - 1 of each,
  /// which are rows of one consumer warpgroup.
  template <class T>
  __device__ __forceinline__ void mend(const KernelArgs& args, int first_row, int num_rows) const {
    for (int tile = last_spoilt; tile >= 0;) {
      const SpoiltTile found = args.spoilt[tile];
      const int first = first_row_of(found, first_row / 64) + first_row % 64;
#pragma unroll 1
      for (int row = first; row < first + num_rows; ++row) {
        mend_row<T>(args.problem, args.sequences, found.sequence, found.head, row);
      }
      if (args.problem.empty_row != EmptyRow::kZero) {
        write_empty_rows<T>(args.problem, args.sequences, found.sequence, found.head, first, num_rows);
      }
      tile = found.next;
    }
  }
};

}  // namespace fa::prefill_sm90
