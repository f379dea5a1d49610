// SPDX-License-Identifier: Apache-2.0
// Queries and new keys through norm and rotary embedding, by a kernel that does nothing else: what a prompt needs, or attention
// without a cache. It moves each row at the speed of memory, where the kernel for all steps takes a row's columns one by one.
// Used by cache_step.cpp.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cache_step/cache_step.h"
#include "kernels/cache_step/row_move.h"
#include "kernels/common/divisor.h"
#include "semantics/cache.h"

namespace fa::cache_step {

/// Rows of one tensor, and what becomes of them.
struct RowsSide : RowMove {
  TensorView weight;  // of the norm; absent: none
  float epsilon;
  unsigned groups;          // of eight columns, in a row
  unsigned rotated_groups;  // of them; 0: none
};

struct RowsArgs {
  CacheRule rule;
  RotaryParams rotary;
  RowsSide sides[3];       // queries, keys, values
  unsigned first_head[3];  // among the heads of all three; those of absent tensors are none
  Divisor heads, rows;     // heads of all three; rows of a batch entry, or of all packed sequences
  unsigned count;          // rows of all three
  unsigned log2_lanes;     // that share a row
  bool has_norm;
  DType dtype;
};

/// The arguments for all rows of a step that appends them, or has no cache; false: this kernel can't take them.
bool make_rows_args(const StepParams& params, const Step& step, RowsArgs* args);

cudaError_t launch_rows(const RowsArgs& args, bool early, cudaStream_t stream);

}  // namespace fa::cache_step
