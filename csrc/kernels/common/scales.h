// SPDX-License-Identifier: Apache-2.0
// The scales of a quantized cache, which are float32 [H_kv, D] with any axis shared. Used by cache_step, which stores and reads
// back such rows, and by decode_sm90, which reads them in place.
#pragma once

#include "fa/attention.h"
#include "semantics/mask.h"

namespace fa {

/// Those of one head.
struct Scales {
  const float* data;  // null: the cache is not quantized
  int64_t stride;

  FA_HD float at(int64_t column) const { return data[column * stride]; }
};

/// Are the scales of every four columns of a head one number, or an aligned 16 bytes?
inline bool are_by_four(const TensorView& t) {
  const bool is_shared = t.shape[1] == 1 || t.stride[1] == 0;
  return is_shared || (t.stride[1] == 1 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0 &&
                       (t.shape[0] == 1 || t.stride[0] % 4 == 0) && t.shape[1] % 4 == 0);
}

FA_HD Scales scales_of(const TensorView& t, int64_t head) {
  if (!t.present) return {nullptr, 0};
  return {static_cast<const float*>(t.data) + head * (t.shape[0] > 1 ? t.stride[0] : 0), t.shape[1] > 1 ? t.stride[1] : 0};
}

}  // namespace fa
