// SPDX-License-Identifier: Apache-2.0
// Grid, shared memory and workspace of a launch of decode_sm90, from shapes and the device alone. Used by decode_sm90.cpp to plan
// and by launch.cuh.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fa/attention.h"
#include "kernels/decode_sm90/config.h"
#include "semantics/sequence.h"

namespace fa::decode_sm90 {

/// Do keys and values lie in pages, which the kernel reads where they are?
inline bool in_pages(const StepParams& p) { return p.cache.mode == CacheMode::kPaged && p.cache.block_table.present; }

/// Keys of a sequence at most.
inline int64_t num_keys(const StepParams& p) {
  return in_pages(p) ? p.cache.block_table.shape[1] * p.key.shape[2] : p.key.shape[2];
}

/// Query rows of a sequence, on average where they are packed.
inline int64_t mean_rows(const AttentionParams& p) {
  const int64_t sequences = num_sequences(p);
  return p.cu_seqlens_q.present ? (p.query.shape[2] + sequences - 1) / std::max<int64_t>(1, sequences) : p.query.shape[2];
}

inline int64_t group_size(const AttentionParams& p) { return p.query.shape[1] / p.key.shape[1]; }

/// (row, head) pairs that share a read of the keys: 16, 32 or 64.
inline int tile_rows(const AttentionParams& p) {
  int rows = kRowsPerWarp;
  while (rows < kMostTileRows && rows < mean_rows(p) * group_size(p)) rows *= 2;
  return rows;
}

/// The most of them that a tile has.
inline int most_rows(const AttentionParams& p) {
  return static_cast<int>(std::min<int64_t>(tile_rows(p), p.query.shape[2] * group_size(p)));
}

/// Key tiles of all heads, each span taken to see all keys: an upper bound.
inline int64_t most_units(const StepParams& p, const TileShape& tile) {
  const int64_t keys = num_keys(p) / tile.tile_n + 2, rows = p.query.shape[2] * group_size(p);
  const int64_t tiles = rows / tile_rows(p) + 1, spans = num_spans(p);
  return p.key.shape[1] * (p.cu_seqlens_q.present ? (tiles + spans) * keys : tiles * spans * keys);
}

inline int num_blocks(const StepParams& p, const Device& device, const TileShape& tile) {
  return static_cast<int>(std::min<int64_t>(most_units(p, tile), int64_t{device.num_sms} * tile.blocks_per_sm));
}

/// Rows of one warp that a block's merge keeps.
inline int merge_rows(const AttentionParams& p) { return std::min(most_rows(p), kRowsPerWarp); }

/// As many stages as shared memory holds beside `other_bytes`, at most `most`, a multiple of the warps: so a warp comes back to
/// its own stages only. Where it came to another's, it might find the copies of the round before still under way, which finish in
/// any order, and take the parity of the round before that one for its own.
constexpr int num_stages(const TileShape& tile, int most, int stage_bytes, int other_bytes) {
  const int stages = std::min((tile.shared_bytes() - other_bytes) / stage_bytes, most);
  return stages / tile.warps * tile.warps;
}

/// The bucket: the largest head_dim and head_dim_v of an instance.
inline int64_t bucket_size(const AttentionParams& p) { return std::max(p.query.shape[3], p.value.shape[3]); }

/// Words of a slot: state and output of `rows` rows, and a mark for each warp.
inline int64_t slot_words(int rows, int64_t head_dim_v) { return rows * (head_dim_v + 2) + kMostWarps; }

}  // namespace fa::decode_sm90
