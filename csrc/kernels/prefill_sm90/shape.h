// SPDX-License-Identifier: Apache-2.0
// The tiles of each instance, and what decides on those of a problem: how many keys its rows see, and how evenly tiles fill the
// GPU. Used by prefill_sm90.cpp for the choice of an instance, and by traits.cuh and launch.cuh.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fa/attention.h"
#include "kernels/common/bias_tiles.h"
#include "kernels/prefill_sm90/instances.h"
#include "semantics/sequence.h"

namespace fa::prefill_sm90 {

inline constexpr int kRowsUnit = 64;  // query rows of a warpgroup, and of the shortest tiles

struct TileShape {
  int warpgroups, tile_n, stages, query_stages, bias_stages;
  bool ping_pong = true;
  int blocks_per_sm = 1;
  int query_steps = 0;

  constexpr int rows() const { return kRowsUnit * warpgroups; }
};

/// The tile table: one row for each head_dim bucket and variant, found by measurement (docs/experiments/prefill.md).
constexpr TileShape tile_shape(int head_dim, Variant variant) {
  if (variant == Variant::kShort) {
    if (head_dim <= 32) return {1, 64, 2, 2, 0, false, 4};
    if (head_dim <= 64) return {1, 64, 3, 2, 0, false, 3};
    if (head_dim <= 96) return {1, 64, 2, 2, 0, false, 2};
    if (head_dim <= 128) return {1, 64, 2, 1, 0, false, 2};
    return {2, 32, 4, 1, 0, false, 1, 8};
  }
  if (variant == Variant::kMiddle) return {2, 64, 4, 2, 0, false, 1, head_dim <= 96 ? head_dim / 16 : 4};
  if (variant == Variant::kBroad) return {2, 128, 2, 2, 0, true, 1, 8};
  if (variant == Variant::kTall) return {4, 64, 6, 2, 0, false};
  if (variant == Variant::kModifiedTall) return {4, 64, 3, 2, 3};
  if (variant == Variant::kModifiedShort)
    return head_dim <= 64 ? TileShape{1, 64, 2, 2, 2, false, 3} : TileShape{1, 64, 2, 1, 2, false, 2};
  if (variant == Variant::kPlain) {
    if (head_dim <= 64) return {3, 128, 4, 2, 0};
    if (head_dim <= 96) return {3, 64, 3, 2, 0};
    if (head_dim <= 128) return {3, 64, 3, 2, 0, true, 1, 2};
    if (head_dim <= 192) return {2, 64, 3, 1, 0, true, 1, 8};
    return {2, 64, 2, 1, 0, true, 1, 2};
  }
  if (head_dim <= 64) return {3, 128, 2, 2, 2};
  if (head_dim <= 128) return {2, 128, 2, 1, 2};
  return {2, 64, 2, 1, 2};
}

/// Can the instance add a query_bias? Short tiles of 80 and 96 columns have no register left for it: the compiler would run their
/// products one after another.
constexpr bool adds_query_bias(int head_dim, Variant variant) {
  return variant != Variant::kShort || head_dim <= 64 || head_dim > 96;
}

/// Do scores need more than a scale > 0, lengths, windows and a mask that is the same for all rows, which a producer reads?
inline bool is_modified(const AttentionParams& p) {
  const bool row_mask = p.mask.present && p.mask.shape[2] > 1 && p.mask.stride[2] != 0;
  return row_mask || p.bias.present || p.alibi_slopes.present || p.softcap != 0.0f || p.softmax_scale <= 0.0f;
}

inline constexpr int64_t kFewKeys = 320;  // up to so many the fixed costs of a tile decide

/// Of keys, or what else there is of all sequences: what one has on average, where they are packed.
inline int64_t per_sequence(int64_t count, const AttentionParams& p) {
  return p.cu_seqlens_q.present ? count / std::max<int64_t>(num_sequences(p), 1) : count;
}

/// Keys of a sequence that a row can see, as far as the host knows.
inline int64_t keys_in_window(const AttentionParams& p) {
  const int64_t keys = per_sequence(p.key.shape[2], p);
  return p.window_left < 0 ? keys : std::min(keys, p.window_left + std::max<int64_t>(p.window_right, 0) + 1);
}

/// Keys that a row sees on average.
inline int64_t mean_keys(const AttentionParams& p) {
  const int64_t keys = p.key.shape[2], hidden = p.window_right >= 0 ? std::min(keys, p.query.shape[2]) / 2 : 0;
  return std::min(per_sequence(keys - hidden, p), keys_in_window(p));
}

/// Tiles of `tile_rows` query rows; of packed sequences an upper bound.
inline int64_t num_tiles(const AttentionParams& p, int64_t tile_rows) {
  const int64_t rows = p.query.shape[2], heads = p.query.shape[1];
  if (p.cu_seqlens_q.present) return (rows / tile_rows + num_spans(p)) * heads;
  return (rows + tile_rows - 1) / tile_rows * heads * num_spans(p);
}

/// Query rows that fall to the busiest multiprocessor.
inline int64_t busiest_rows(const AttentionParams& p, const Device& device, int64_t tile_rows) {
  return (num_tiles(p, tile_rows) + device.num_sms - 1) / device.num_sms * tile_rows;
}

}  // namespace fa::prefill_sm90
