// SPDX-License-Identifier: Apache-2.0
// What the host hands to the kernel for the gradient of a bias (bias_gradient.cuh). Filled by launch_bias.cuh.
#pragma once

#include "kernels/backward_sm90/args.h"
#include "kernels/common/divisor.h"

namespace fa::backward_sm90 {

struct BiasGradientArgs {
  CUtensorMap query;  // [B, H_q, S_q, D], boxes of kTile rows x 64 columns, as of the next three
  CUtensorMap key;    // [B, H_kv, S_kv, D]
  CUtensorMap d_out;  // [B, H_q, S_q, D_v]
  CUtensorMap value;  // [B, H_kv, S_kv, D_v]
  CUtensorMap bias;   // [B or 1, H_q or 1, S_q, S_kv], boxes of kTile rows x 64 keys

  TensorView d_bias;
  SequenceRule sequences;
  RowNumbers rows;
  Divisor row_tiles, key_tiles, heads;  // of d_bias, which may have one head for all
  int num_tiles;
  int visited_batches, visited_heads;  // that share a tile of d_bias
  int bias_batches, bias_heads;        // as in KernelArgs
  bool entries_differ;                 // in what their rows see: there are key lengths, or positions of each entry
  Divisor heads_per_key_head;
  float scale;
};

}  // namespace fa::backward_sm90
