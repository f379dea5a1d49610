// SPDX-License-Identifier: Apache-2.0
// What the backward pass knows of each query row before it begins: the log-sum-exp that weights are taken against, and
// D = rowsum(dO O) - d_lse. Written by prepare_rows() (backward_rows.h), read by the kernels that compute gradients. Arrays have
// one entry for each row, and every sequence begins at a whole tile of rows, so a kernel reads the entries of a tile without a
// bound.
#pragma once

#include "semantics/sequence.h"

namespace fa {

/// The tiles of query rows, or of keys, of all heads, one head behind the other.
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
/// tiles are of. look(first, later) is called for each sequence that is compared: its first tile, and whether that is `tile` or
/// before.
template <class Look>
FA_HD uint32_t sequence_of_tile(const RowTiles& tiles, const SequenceRule& sequences, uint32_t tile,
                                int64_t Sequence::* first_row, const Look& look) {
  if (!tiles.packed) return tile / static_cast<uint32_t>(tiles.of_sequence);
  uint32_t b = 0, count = static_cast<uint32_t>(sequences.num_sequences);
  while (count > 1) {  // the last sequence whose first tile is this one or before it
    const uint32_t half = count / 2;
    const int64_t first = tiles.first(0, b + half, sequences.at(b + half).*first_row);
    const bool later = first <= tile;
    look(first, later);
    b += later ? half : 0;
    count = later ? count - half : half;
  }
  return b;
}

/// Which tile of keys of which packed sequence one of a head's tiles is.
struct KeyTilePlace {
  uint32_t sequence_idx;
  Sequence sequence;
  int32_t tile;  // of the sequence; -1: it has no keys of any sequence
};

/// Of a sequence all tiles are found or none, since blocks that have some of them may wait for the others. Where cu_seqlens_kv
/// falls, sequences overlap, and tiles of several would have the same number. So a sequence counts only if the search takes the
/// same way for all of its tiles.
FA_HD KeyTilePlace key_tile_place(const RowTiles& tiles, const SequenceRule& sequences, uint32_t tile) {
  uint32_t begin = 0, end = static_cast<uint32_t>(tiles.of_head);  // of the tiles for which the search takes this way
  const uint32_t b = sequence_of_tile(tiles, sequences, tile, &Sequence::first_key, [&](int64_t first, bool later) {
    const auto edge = static_cast<uint32_t>(first);
    if (later && edge > begin) begin = edge;
    if (!later && edge < end) end = edge;
  });
  const Sequence sequence = sequences.at(b);
  const auto first = static_cast<uint32_t>(tiles.first(0, b, sequence.first_key));
  const uint32_t behind = first + static_cast<uint32_t>((sequence.num_keys + tiles.tile_rows - 1) / tiles.tile_rows);
  const bool is_its = first <= tile && tile < behind && begin <= first && behind <= end;
  return {b, sequence, is_its ? static_cast<int32_t>(tile - first) : -1};
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
  const uint32_t b = sequence_of_tile(tiles, sequences, tile, &Sequence::first_row, [](int64_t, bool) {});
  RowPlace place{head, static_cast<int>(b), sequences.at(b), 0};
  place.row = entry - tiles.first(0, b, place.sequence.first_row) * tiles.tile_rows;
  return place;
}

}  // namespace fa
