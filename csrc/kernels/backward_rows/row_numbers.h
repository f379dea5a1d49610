// SPDX-License-Identifier: Apache-2.0
// What the backward pass knows of each query row before it begins: the log-sum-exp that weights are taken against, and
// D = rowsum(dO O) - d_lse. Written by prepare_rows() (backward_rows.h), read by the kernels that compute gradients. Arrays have
// one entry for each row, and every sequence begins at a whole tile of rows, so a kernel reads the entries of a tile without a
// bound.
#pragma once

#include "semantics/sequence.h"

namespace fa {

/// The tiles of query rows of all heads, one head behind the other.
struct RowTiles {
  int tile_rows;
  bool packed;
  int64_t of_sequence;  // tiles of a batch entry, where not packed
  int64_t of_head;      // of all sequences; where packed an upper bound

  /// The first tile of a sequence, whose rows begin at `first_row` of the tensor where sequences are packed.
  FA_HD int64_t first(int64_t head, int64_t sequence_idx, int64_t first_row) const {
    return head * of_head + (packed ? first_row / tile_rows + sequence_idx : sequence_idx * of_sequence);
  }
};

/// A row's weights are exp2(score * log2(e) - reference), or where `rest` is there exp2((score - reference) * log2(e) - rest),
/// score being natural: what a score of -1e38 needs. The reference is +inf for rows that aren't in use or see no key, whose
/// weights become 0; it is NaN for rows whose gradients are NaN for every key that they see: then the row's query and gradient
/// must not be multiplied with keys that it doesn't see.
struct RowNumbers {
  RowTiles tiles;
  float* reference;
  float* rest;   // null: references are in units of log2
  float* delta;  // D; 0 where the reference is +inf or NaN
};

inline RowTiles row_tiles(const AttentionParams& p, int tile_rows) {
  const bool packed = p.cu_seqlens_q.present;
  const int64_t of_sequence = (p.query.shape[2] + tile_rows - 1) / tile_rows;
  const int64_t of_head = packed ? p.query.shape[2] / tile_rows + num_sequences(p) + 1 : of_sequence * num_sequences(p);
  return {tile_rows, packed, of_sequence, of_head};
}

}  // namespace fa
