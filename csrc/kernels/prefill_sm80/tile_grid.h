// SPDX-License-Identifier: Apache-2.0
// How the host deals out a problem to thread blocks of the sm_80 kernel, and what it knows of addresses. Filled by
// launch_instance().
#pragma once

#include <vector_types.h>

#include "kernels/common/tile_order.h"
#include "semantics/sequence.h"

namespace fa::prefill_sm80 {

struct TileGrid {
  SequenceRule sequences;
  int num_spans;       // of packed sequences and the rows outside of them
  TileOrder order;     // of pairs of batch entry and head (key head where query heads share a tile)
  Divisor group_size;  // query heads of a key head
  bool query_by_16, key_by_16, value_by_16, out_by_16;  // rows are whole 16-byte chunks at 16-byte addresses
  bool mask_by_8, bias_by_8;                            // eight keys lie in 8 or 16 aligned bytes
  bool may_spoil_rows;                                  // see common/hidden_values.cuh

  int num_splits = 1;               // of the keys
  float* partial_out = nullptr;     // [num_splits, B, H_q, S_q, D_v], null: write params.out
  float2* partial_state = nullptr;  // [num_splits, B, H_q, S_q]: maximum and sum (SoftmaxState)
};

}  // namespace fa::prefill_sm80
