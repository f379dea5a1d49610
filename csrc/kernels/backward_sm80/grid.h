// SPDX-License-Identifier: Apache-2.0
// How the host deals out a problem to thread blocks of the backward kernels for mma.sync, and what it knows of addresses.
#pragma once

#include "fa/backward.h"
#include "kernels/backward_rows/row_numbers.h"
#include "kernels/common/divisor.h"
#include "semantics/sequence.h"

namespace fa::backward_sm80 {

/// Which tiles of keys a thread block works off: of its pair of sequence and key head every num_splits-th, forwards and backwards
/// in turn, so that a causal mask gives all about the same.
struct KeySplit {
  int split, num_splits;

  /// The i-th of them; rising with i.
  FA_HD int tile(int i) const { return i * num_splits + (i % 2 == 0 ? split : num_splits - 1 - split); }
  /// Is one of them among the tiles begin … end - 1?
  FA_HD bool has_any(int begin, int end) const {
    for (int i = begin / num_splits; i * num_splits < end; ++i)
      if (tile(i) >= begin && tile(i) < end) return true;
    return false;
  }
};

struct Grid {
  SequenceRule sequences;
  Divisor heads, group_size, num_splits;  // key heads; query heads of a key head; thread blocks of a pair
  RowNumbers numbers;
  float* d_query;        // sums of each split: for each tile of rows (RowTiles) tile_q * head_dim floats, in the kernel's order
  int64_t size_of_sums;  // of a split, in floats
  bool query_by_16, key_by_16, value_by_16, d_out_by_16;  // rows are whole 16-byte chunks at 16-byte addresses
  bool d_query_by_16, d_key_by_16, d_value_by_16;
  bool may_spoil;  // a NaN or infinity of a key and a row that don't see each other could reach a sum

  FA_HD bool copies_by_16() const { return query_by_16 && key_by_16 && value_by_16 && d_out_by_16; }
};

/// What the kernel of sums over tiles of scores adds up (score_sums.cuh).
struct ScoreSums {
  bool of_rows;    // D of each row anew, into RowNumbers::delta, in place of d_bias: a sum over keys
  TensorView sum;  // d_bias
  unsigned blocks_of_keys, blocks_of_rows, heads;  // tiles of d_bias that are no sums over others, and its distinct heads
  bool shared[4];                                  // axes that are summed over
};

}  // namespace fa::backward_sm80
