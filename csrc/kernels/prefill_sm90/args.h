// SPDX-License-Identifier: Apache-2.0
// What the host hands to the kernel of prefill_sm90: the problem, its tensor maps and how tiles are dealt out.
// Filled by launch.cuh, read on the device.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "fa/attention.h"
#include "kernels/common/tile_order.h"
#include "kernels/prefill_sm90/tile_rows.h"
#include "semantics/sequence.h"

namespace fa::prefill_sm90 {

inline constexpr int kAllKeys = 1 << 30;  // more than any tensor has

/// One tile of work, as the warp that schedules decides: everything about it that is not a constant of the launch.
struct alignas(16) Tile {
  int valid = 0;                  // 0: no more tiles
  int sequence;                   // batch entry or packed sequence
  int head;                       // query head
  int first_row;                  // in its sequence; warpgroups whose rows are below 0 have none
  int next_row = 64;              // from the first warpgroup's rows to the second's, from the third's to the fourth's
  int next_pair = 128;            // from the first warpgroup's rows to the third's; folded tiles have others (place_rows)
  int block_begin, block_end;     // key tiles to visit
  int batch, row_base, key_base;  // where the sequence stands in the tensors
  int num_rows, num_keys;         // rows and keys of the sequence …
  int query_length, kv_length;    // … and those in use
  int used_keys;                  // keys whose values may be read; the copy engine's own zeros stand behind the tensor's last key
  int key_begin, key_end;         // keys that mask and bias leave
  int test_mask;                  // the bool mask hides some keys of these tiles
  int keys_in_last;               // of the last key tile, where all rows see the same of it, its first ones; else 0
  RowBand band;                   // what windows leave of them
  int index;                      // its number in the order of tiles
  int64_t query_offset;
};
static_assert(sizeof(Tile) % 16 == 0);

/// Of the keys of its last key tile, those whose values may be read; the rest may be anything, NaN too.
FA_HD int used_in_last(const Tile& tile, int tile_n) { return tile.used_keys - (tile.block_end - 1) * tile_n; }

/// A finished tile with rows that may hold values of hidden keys (mend.cuh).
struct SpoiltTile {
  int next;  // the next such tile of the same block; -1: there is none
  int sequence, head, first_row, next_row, next_pair;
};

/// What the 64 rows of a consumer warpgroup see of their tile.
struct alignas(16) RowsView {
  int full_begin, full_end;    // key tiles that all rows see entirely
  int block_begin, block_end;  // key tiles that any of the rows sees
};

/// Sequence `idx` in a tile of its rows.
FA_HD void describe_sequence(const SequenceRule& rule, int idx, Tile* tile) {
  const Sequence s = rule.at(idx);
  tile->sequence = idx;
  tile->batch = static_cast<int>(s.batch_idx);
  tile->row_base = static_cast<int>(s.first_row);
  tile->key_base = static_cast<int>(s.first_key);
  tile->num_rows = static_cast<int>(s.num_rows);
  tile->num_keys = static_cast<int>(s.num_keys);
  tile->query_length = static_cast<int>(s.query_length);
  tile->kv_length = static_cast<int>(s.mask.kv_length);
  tile->used_keys = tile->key_base + tile->kv_length < rule.seqlen_kv ? tile->kv_length : kAllKeys;
  tile->query_offset = s.mask.query_offset;
  tile->band = s.mask.band();
  tile->key_begin = 0;
  tile->key_end = tile->kv_length;
  tile->test_mask = 0;
}

struct KernelArgs {
  CUtensorMap query;  // [B, H_q, S_q, D], boxes of query_box_rows() rows x 64 columns
  CUtensorMap key;    // [B, H_kv, S_kv, D], boxes of kTileN rows x 64 columns
  CUtensorMap value;  // [B, H_kv, S_kv, D_v], likewise
  CUtensorMap out;    // [B, H_q, S_q, D_v], boxes of 64 rows x 64 columns
  CUtensorMap bias;   // [B or 1, H_q or 1, S_q, S_kv], boxes of kTileM rows x 64 keys; where bias_by_tile
  AttentionParams problem;
  SequenceRule sequences;
  SpoiltTile* spoilt;  // [num_tiles]; null: no row can be spoilt (common/spoilt_rows.h)

  // The scheduling warp reads the fields from here on for a block's first tile, so they stand next to each other: arguments are
  // constant memory, and each cache line of it costs a warp 100 clocks the first time.
  TileOrder order;
  Tile common;               // what all tiles have in common, if
  bool tiles_alike;          // there are no lengths, offsets, packed sequences, mask or bias
  bool bias_by_tile;         // the bias comes through shared memory
  int num_spans;             // batch entries, or packed sequences and the rows outside of them
  bool sort_sequences;       // those with most keys first
  bool folds;                // tiles are folded: the early rows of a sequence with its late ones (place_rows)
  bool tiles_end_with_rows;  // the tile that is not full is a sequence's first, not its last
  Divisor heads_per_kv;      // query heads that share a key head
  unsigned* tile_counter;    // 0 before the launch and after it; null: tiles are dealt out in turn
  int num_tiles;             // upper bound of tile indices
};

/// Rows that the copy engine brings at once: all of a tile, unless tiles may be folded.
template <class C>
constexpr int query_box_rows() {
  return C::kFoldedWarpgroups == 1 ? C::kTileM : 64;
}

/// May the copy engine write the 64 rows from first_row on? Else rows of another sequence stand behind them, or they are none.
FA_HD bool box_fits(const KernelArgs& args, const Tile& tile, int first_row) {
  return first_row >= 0 && (first_row + 64 <= tile.num_rows || !args.problem.cu_seqlens_q.present);
}

}  // namespace fa::prefill_sm90
