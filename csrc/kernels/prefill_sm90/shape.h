// SPDX-License-Identifier: Apache-2.0
// What decides on the tiles of a problem, on the host: how many keys its rows see, and how evenly tiles fill the GPU. Used by
// prefill_sm90.cpp for the choice of an instance, and by launch.cuh.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fa/attention.h"
#include "semantics/sequence.h"

namespace fa::prefill_sm90 {

inline constexpr int64_t kFewKeys = 320;  // up to so many the fixed costs of a tile decide

/// Keys of a sequence that a row can see, as far as the host knows.
inline int64_t keys_in_window(const AttentionParams& p) {
  const int64_t keys = p.key.shape[2] / (p.cu_seqlens_q.present ? num_sequences(p) : 1);
  return p.window_left < 0 ? keys : std::min(keys, p.window_left + std::max<int64_t>(p.window_right, 0) + 1);
}

/// Keys that a row sees on average.
inline int64_t mean_keys(const AttentionParams& p) {
  const int64_t keys = p.key.shape[2], hidden = p.window_right >= 0 ? std::min(keys, p.query.shape[2]) / 2 : 0;
  return std::min((keys - hidden) / (p.cu_seqlens_q.present ? num_sequences(p) : 1), keys_in_window(p));
}

/// Tiles of `tile_rows` query rows; of packed sequences an upper bound.
inline int64_t num_tiles(const AttentionParams& p, int64_t tile_rows) {
  const int64_t rows = p.query.shape[2], heads = p.query.shape[1];
  if (p.cu_seqlens_q.present) return (rows / tile_rows + num_sequences(p)) * heads;
  return (rows + tile_rows - 1) / tile_rows * heads * num_sequences(p);
}

/// Query rows that fall to the busiest multiprocessor.
inline int64_t busiest_rows(const AttentionParams& p, const DeviceInfo& device, int64_t tile_rows) {
  return (num_tiles(p, tile_rows) + device.num_sms - 1) / device.num_sms * tile_rows;
}

}  // namespace fa::prefill_sm90
