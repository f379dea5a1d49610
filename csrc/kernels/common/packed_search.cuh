// SPDX-License-Identifier: Apache-2.0
// Packed sequences: which of them holds a tile of query rows. Their lengths are on the device, so blocks search for it. Called by
// whole warps of the prefill kernels.
#pragma once

#include "kernels/common/reduce.cuh"
#include "semantics/sequence.h"

namespace fa {

struct PackedTile {
  int sequence;   // or rows outside of the sequences (SequenceRule::at); -1: none has the tile
  int tile;       // its number in the sequence …
  int num_tiles;  // … which has so many
};

/// Tile `tile` of kTileRows rows among those of all sequences and of the rows outside of them (num_spans), one after the other.
/// The lanes look at 32 of them at a time.
template <int kTileRows>
__device__ __forceinline__ PackedTile find_packed_tile(const SequenceRule& sequences, int num_spans, int tile) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < num_spans; first += 32) {
    int tiles = 0;
    if (first + lane < num_spans) {
      tiles = static_cast<int>((sequences.at(first + lane).num_rows + kTileRows - 1) / kTileRows);
    }
    int upto = tiles;  // of this lane's sequence and those before it: a prefix sum over lanes
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(kAllLanes, upto, distance);
      if (lane >= distance) upto += below;
    }
    const unsigned owners = __ballot_sync(kAllLanes, tile < upto);
    if (owners != 0) {
      const int owner = __ffs(owners) - 1;
      return {first + owner, tile - __shfl_sync(kAllLanes, upto - tiles, owner), __shfl_sync(kAllLanes, tiles, owner)};
    }
    tile -= __shfl_sync(kAllLanes, upto, 31);
  }
  return {-1, 0, 0};
}

}  // namespace fa
