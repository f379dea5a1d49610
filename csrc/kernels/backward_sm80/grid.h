// SPDX-License-Identifier: Apache-2.0
// How the host deals out a problem to thread blocks of the backward kernels for mma.sync, and what it knows of addresses.
#pragma once

#include "fa/backward.h"
#include "kernels/backward_rows/row_numbers.h"
#include "kernels/common/divisor.h"
#include "semantics/sequence.h"

namespace fa::backward_sm80 {

/// Which tiles of keys a thread block works off: of its pair of sequence and key head every num_splits-th, forwards and backwards
/// in turn, so that a causal mask gives all about the same. The last comes first.
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

/// Tiles of tile_q rows that see some of the keys first_key … end_key - 1: begin … end - 1.
FA_HD KeySpan tiles_that_see(const RowBand& band, int num_rows, int num_keys, int first_key, int end_key, int tile_q) {
  const int last_end = end_key < num_keys ? end_key : num_keys;
  const int begin = first_key - band.right + 1 > 0 ? first_key - band.right + 1 : 0;
  const int end = num_rows < last_end - band.left ? num_rows : last_end - band.left;
  return begin < end && first_key < last_end ? tiles_touched({begin, end}, tile_q) : KeySpan{0, 0};
}

/// Multiprocessors that would have no split of their own. A helper serves some pairs of sequence and key head: of each split's
/// first tile of keys it has the first row_tiles tiles of the rows that see it, and the split has the others. Gradients of these
/// keys are the sum of both parts, which who comes second forms: the sum of two is the same in either order.
struct Helpers {
  int row_tiles;
  int first_block, pairs_of_one;  // blocks before are those of the splits
  float* parts;        // for each split what it has of dK and dV, then what its helper has; each 2 * tile_k * head_dim floats
  unsigned* arrivals;  // for each split how many of the parts are there

  FA_HD bool exist() const { return row_tiles > 0; }
};

struct Grid {
  SequenceRule sequences;
  Divisor heads, group_size, num_splits;  // key heads; query heads of a key head; thread blocks of a pair
  RowNumbers numbers;
  Helpers helpers;
  float* d_query;        // sums of each split: for each tile of rows (RowTiles) tile_q * head_dim floats, in the kernel's order;
                         // behind them those of the pairs' helpers
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
