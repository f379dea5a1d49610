// SPDX-License-Identifier: Apache-2.0
// The tiles of each instance of prefill_sm90_f8 (docs/kernels.md). Read on the host and by traits.cuh.
#pragma once

namespace fa::prefill_sm90_f8 {

struct TileShape {
  int warpgroups;  // that multiply, each 64 query rows
  int tile_n;      // keys: at most 128, those of one row of transposed values
  int key_stages, raw_stages, value_stages, query_stages;
  bool takes_turns;  // warpgroups issue their products in turn
  bool overlaps;     // a warpgroup's product with values runs beside its softmax of the next scores
};

constexpr TileShape tile_shape(int head_dim) {
  if (head_dim <= 64) return {2, 128, 3, 2, 3, 2, true, true};
  if (head_dim <= 128) return {2, 128, 3, 2, 3, 2, true, false};
  return {2, 128, 2, 1, 2, 1, false, false};
}

}  // namespace fa::prefill_sm90_f8
