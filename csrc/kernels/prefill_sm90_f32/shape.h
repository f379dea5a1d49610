// SPDX-License-Identifier: Apache-2.0
// The tiles of each instance of prefill_sm90_f32, found by measurement (docs/experiments/prefill.md). Read on the host and by
// traits.cuh.
#pragma once

#include "fa/attention.h"

namespace fa::prefill_sm90_f32 {

struct TileShape {
  int warpgroups;  // that multiply, each 64 query rows
  int tile_n;      // keys, a multiple of 32
  int key_stages, value_stages, query_stages;
  int out_columns;  // of the output that one sum over a tile's keys takes; kTf32x3 only
  int held_panels;  // of 32 columns of Q that stay in registers; kTf32 only
};

constexpr TileShape tile_shape(int head_dim, Float32Precision precision) {
  if (precision == Float32Precision::kTf32) {
    if (head_dim <= 64) return {4, 64, 3, 3, 2, 0, 0};
    if (head_dim <= 128) return {2, 64, 3, 2, 1, 0, 4};
    return {2, 32, 1, 2, 1, 0, 0};
  }
  if (head_dim <= 64) return {3, 64, 2, 2, 1, 64, 0};
  if (head_dim <= 128) return {2, 32, 3, 2, 1, 128, 0};
  return {1, 32, 1, 1, 1, 64, 0};
}

}  // namespace fa::prefill_sm90_f32
