// SPDX-License-Identifier: Apache-2.0
// What the host hands to the kernels of backward_sm90: the problem, its tensor maps, and which tiles of queries and keys meet.
// Filled by launch.cuh, read on the device.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "fa/attention.h"
#include "kernels/backward_rows/row_numbers.h"
#include "kernels/common/tile_order.h"
#include "semantics/sequence.h"

namespace fa::backward_sm90 {

/// What decides in a sequence which rows see which keys, in 32-bit positions.
struct alignas(16) View {
  int32_t query_length, kv_length;
  RowBand band;
};

FA_HD View view_of(const Sequence& s) {
  return {static_cast<int32_t>(s.query_length), static_cast<int32_t>(s.mask.kv_length), s.mask.band()};
}

FA_HD View view_of(SequenceRule rule, int64_t sequence) {
  rule.cu_seqlens_q.data = rule.query_lengths.data = nullptr;  // NOTE: plan() has refused both; the compiler is told
  return view_of(rule.at(sequence));
}

/// Tiles begin … end - 1.
struct TileSpan {
  int32_t begin, end;
};

/// The tiles of kTileM query rows that see any key of key tile `tile`.
template <int kTileM, int kTileN>
FA_HD TileSpan query_tiles(const View& view, int32_t tile) {
  const int32_t first_key = tile * kTileN,
                last_key = (first_key + kTileN < view.kv_length ? first_key + kTileN : view.kv_length) - 1;
  if (first_key > last_key) return {0, 0};
  const int32_t low = first_key - view.band.right + 1, high = last_key - view.band.left;
  const int32_t first = low > 0 ? low : 0, last = high < view.query_length - 1 ? high : view.query_length - 1;
  if (first > last) return {0, 0};
  return {first / kTileM, last / kTileM + 1};
}

/// The tiles of kTileN keys of which any row of query tile `tile` sees any: those whose query_tiles() has `tile`.
template <int kTileM, int kTileN>
FA_HD TileSpan key_tiles(const View& view, int32_t tile) {
  const int32_t first_row = tile * kTileM;
  const int32_t last_row = (first_row + kTileM < view.query_length ? first_row + kTileM : view.query_length) - 1;
  if (first_row > last_row) return {0, 0};
  const KeySpan keys = view.band.seen_by_some(first_row, last_row, {0, view.kv_length});
  if (keys.begin >= keys.end) return {0, 0};
  return {keys.begin / kTileN, (keys.end - 1) / kTileN + 1};
}

/// The place of one key tile among those that add to a query tile's gradient, and how many there are.
struct Turn {
  int32_t place, count;
};

/// `descending`: the last key tile adds first.
FA_HD Turn turn_of(TileSpan key_tiles, int32_t key_tile, bool descending) {
  return {descending ? key_tiles.end - 1 - key_tile : key_tile - key_tiles.begin, key_tiles.end - key_tiles.begin};
}

struct KernelArgs {
  CUtensorMap query;  // [B, H_q, S_q, D], boxes of kTileM rows x 64 columns
  CUtensorMap d_out;  // [B, H_q, S_q, D_v], likewise
  CUtensorMap key;    // [B, H_kv, S_kv, D], boxes of kTileN rows x 64 columns
  CUtensorMap value;  // [B, H_kv, S_kv, D_v], likewise
  CUtensorMap bias;   // [B or 1, H_q or 1, S_q, S_kv], boxes of kTileM rows x 64 keys; where the instance adds one
  TensorView d_query, d_key, d_value;

  SequenceRule sequences;
  RowNumbers rows;
  unsigned* turns;   // for each query tile, the key tiles that have added to its d_query; 0 at first
  unsigned* ticket;  // items that blocks have drawn; 0 at first

  float* sums;  // d_query where several key tiles add to it: kTileM x bucket for each query tile, in the order of registers

  RowTiles key_tiles;
  int query_tiles_of_head;  // of all batch entries, as RowTiles counts them
  int num_key_tiles;        // of a batch entry; of all sequences where packed
  int heads_per_key_head;
  int num_items;                 // key tiles of all batch entries and key heads
  TileOrder order;               // in which items are drawn
  bool rows_start_later;         // the first row that sees a key tile is later for later key tiles
  bool rows_shorten;             // likewise, and all are seen by the last rows: later key tiles are seen by fewer
  int bias_batches, bias_heads;  // 1 where batch entries or heads have a bias of their own, 0 where they share one
  float scale, scale_log2;

  /// The number of a query tile among those of all heads and sequences, given the sequence's first in head 0.
  FA_HD int query_tile(int first_tile, int head, int tile) const { return head * query_tiles_of_head + first_tile + tile; }

  /// The sum of that half of a query tile's gradient which is a warpgroup's part.
  template <int kPartElements>
  FA_HD float* sum_of_part(int query_tile, int warpgroup) const {
    return sums + (static_cast<int64_t>(query_tile) * 2 + warpgroup) * kPartElements;
  }
};

}  // namespace fa::backward_sm90
