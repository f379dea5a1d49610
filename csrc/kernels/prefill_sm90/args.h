// SPDX-License-Identifier: Apache-2.0
// What the host hands to the kernel of prefill_sm90: the problem, its tensor maps and how tiles are dealt out.
// Filled by launch.cuh, read on the device.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "fa/attention.h"
#include "kernels/common/tile_order.h"
#include "semantics/sequence.h"

namespace fa::prefill_sm90 {

struct KernelArgs {
  CUtensorMap query;  // [B, H_q, S_q, D], boxes of kTileM rows x 64 columns
  CUtensorMap key;    // [B, H_kv, S_kv, D], boxes of kTileN rows x 64 columns
  CUtensorMap value;  // [B, H_kv, S_kv, D_v], likewise
  CUtensorMap out;    // [B, H_q, S_q, D_v], boxes of 64 rows x 64 columns
  CUtensorMap bias;   // [B or 1, H_q or 1, S_q, S_kv], boxes of kTileM rows x 64 keys; where bias_by_tile
  AttentionParams problem;
  SequenceRule sequences;

  TileOrder order;
  bool bias_by_tile;         // the bias comes through shared memory
  int num_sequences;         // batch entries, or packed sequences
  bool sort_sequences;       // those with most keys first
  bool tiles_end_with_rows;  // the tile that is not full is a sequence's first, not its last
  Divisor heads_per_kv;      // query heads that share a key head
  unsigned* tile_counter;    // 0 before the launch and after it; null: tiles are dealt out in turn
  int num_tiles;             // upper bound of tile indices
};

}  // namespace fa::prefill_sm90
