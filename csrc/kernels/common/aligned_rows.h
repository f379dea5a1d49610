// SPDX-License-Identifier: Apache-2.0
// What a kernel may take for granted of the addresses of a tensor's rows. Asked by the host.
#pragma once

#include <cstdint>

#include "fa/attention.h"

namespace fa {

/// Are all rows at multiples of `bytes`? Strides of axes of size 1 have no meaning.
inline bool rows_aligned_to(const TensorView& view, int64_t bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % bytes == 0;
  for (int axis = 0; axis < 3; ++axis)
    aligned = aligned && (view.shape[axis] == 1 || view.stride[axis] * size_of(view.dtype) % bytes == 0);
  return aligned;
}

/// Rows of query, key, value, out and their gradients: whole chunks of `bytes`, aligned.
inline bool is_by(const TensorView& view, int64_t bytes) {
  return rows_aligned_to(view, bytes) && view.shape[3] * size_of(view.dtype) % bytes == 0;
}

}  // namespace fa
