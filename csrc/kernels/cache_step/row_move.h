// SPDX-License-Identifier: Apache-2.0
// Where the rows of one tensor of a step are, and where they go. Used by the kernels that move rows and do nothing else.
#pragma once

#include "fa/attention.h"

namespace fa::cache_step {

/// Strides in elements.
struct RowMove {
  const void* from;
  void* to;
  int64_t from_batch, from_head, from_row;
  int64_t to_batch, to_head, to_row;
};

/// From a tensor [B, H, S, D] to another one, whose rows from `first_row` on these become.
inline RowMove row_move(const TensorView& from, const TensorView& to, int64_t first_row = 0) {
  return {from.data,      static_cast<char*>(to.data) + first_row * to.stride[2] * size_of(to.dtype),
          from.stride[0], from.stride[1],
          from.stride[2], to.stride[0],
          to.stride[1],   to.stride[2]};
}

}  // namespace fa::cache_step
