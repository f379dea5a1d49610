// SPDX-License-Identifier: Apache-2.0
// What the backward pass knows of each query row before it begins: the log-sum-exp that weights are taken against, and
// D = rowsum(dO O) - d_lse. Written by prepare_rows() (backward_rows.h), read by the kernels that compute gradients. Arrays have
// one entry for each row, and every sequence begins at a whole tile of rows, so a kernel reads the entries of a tile without a
// bound.
#pragma once

#include "semantics/sequence.h"

namespace fa {

/// The tiles of query rows of all heads, one head behind the other; or of keys.
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

/// Tiles of the query's rows, or of the keys.
inline RowTiles row_tiles(const AttentionParams& p, const TensorView& tensor, int tile_rows) {
  const bool packed = p.cu_seqlens_q.present;
  const int64_t of_sequence = (tensor.shape[2] + tile_rows - 1) / tile_rows;
  const int64_t of_head = packed ? tensor.shape[2] / tile_rows + num_sequences(p) + 1 : of_sequence * num_sequences(p);
  return {tile_rows, packed, of_sequence, of_head};
}

/// The sequence that a tile of a head belongs to, if to any. `first_row`: what Sequence calls the first of the rows that the
/// tiles are of.
FA_HD uint32_t sequence_of_tile(const RowTiles& tiles, const SequenceRule& sequences, uint32_t tile,
                                int64_t Sequence::* first_row) {
  if (!tiles.packed) return tile / static_cast<uint32_t>(tiles.of_sequence);
  uint32_t b = 0, count = static_cast<uint32_t>(sequences.num_sequences);
  while (count > 1) {  // the last sequence whose first tile is this one or before it
    const uint32_t half = count / 2;
    const bool later = tiles.first(0, b + half, sequences.at(b + half).*first_row) <= tile;
    b += later ? half : 0;
    count = later ? count - half : half;
  }
  return b;
}

/// Where an entry of the arrays stands: a row of a sequence, or, below 0 and from num_rows of it on, none.
struct RowPlace {
  int head, sequence_idx;
  Sequence sequence;
  int64_t row;
};

/// `entry`: of the head's entries, fewer than 2^31.
FA_HD RowPlace row_place(const RowTiles& tiles, const SequenceRule& sequences, int head, uint32_t entry) {
  const uint32_t tile = entry / static_cast<uint32_t>(tiles.tile_rows);
  const uint32_t b = sequence_of_tile(tiles, sequences, tile, &Sequence::first_row);
  RowPlace place{head, static_cast<int>(b), sequences.at(b), 0};
  place.row = entry - tiles.first(0, b, place.sequence.first_row) * tiles.tile_rows;
  return place;
}

}  // namespace fa
