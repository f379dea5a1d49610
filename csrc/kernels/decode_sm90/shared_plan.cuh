// SPDX-License-Identifier: Apache-2.0
// The shared memory of a block of decode_sm90: this, then the ring of key and value tiles, then a place where its warps merge.
#pragma once

#include "kernels/common/mbarrier.cuh"
#include "kernels/decode_sm90/args.h"

namespace fa::decode_sm90 {

/// Keys that the mask of a batch entry leaves.
struct MaskSpan {
  int begin, end, count;
};

template <int kWarps_>
struct SharedPlan {
  Mbarrier<1> full[kMaxStages];
  uint64_t empty[kMaxStages];  // an arrival for each 16 rows of a tile, a number of the launch
  Mbarrier<1> item_full[kItemSlots];
  Mbarrier<kWarps_> item_empty[kItemSlots];
  Item item[kItemSlots];
  float2 state[kWarps_][kRowsPerWarp];        // of the block's warps, at the end of an item
  float warp_factor[kWarps_ * kRowsPerWarp];  // of each row, by which its warps' outputs are multiplied
  float2 row_state[kMostTileRows];            // of the block
  bool merges;                                // this block merges parts of the head, and …
  bool is_last;                               // … was the last of its blocks to write its own
  int warp_units[kWarps_ + 1];
  int cut_tiles;                   // not uniform: of each head, where all have equally many and are cut alike; else 0, and …
  int first_tiles;                 // those of the first sequence's
  Schedule schedule;               // … this
  int first_sequence, first_unit;  // the sequence in which this block's range begins, and the unit in which that begins
  SequenceWork first_work;         // of that sequence
  MaskSpan mask_span[kMaxScannedMasks];
};

/// Bytes in front of the ring, whose panels the copy engine wants at multiples of 1024.
template <int kWarps>
constexpr int plan_bytes() {
  return (static_cast<int>(sizeof(SharedPlan<kWarps>)) + 1023) / 1024 * 1024;
}

}  // namespace fa::decode_sm90
