// SPDX-License-Identifier: Apache-2.0
// The factors of float8 tensors: an element stands for itself times its head's factor. Those of query and key join the scale of
// the scores, and the value's joins what normalises the output, so that no element is multiplied on its own.
// Used by the CPU kernel and the CUDA kernels.
#pragma once

#include <cstdint>

#include "fa/attention.h"
#include "semantics/mask.h"

namespace fa {

/// One of the factors [B, H]: 1 where there are none.
FA_HD float head_factor(const TensorView& factors, int64_t sequence_idx, int64_t head) {
  if (!factors.present) return 1.0f;
  const int64_t sequence_stride = factors.shape[0] > 1 ? factors.stride[0] : 0;
  const int64_t head_stride = factors.shape[1] > 1 ? factors.stride[1] : 0;
  return static_cast<const float*>(factors.data)[sequence_idx * sequence_stride + head * head_stride];
}

/// What a product of a query and a key is multiplied by.
FA_HD float descaled_softmax_scale(const AttentionParams& p, int64_t sequence_idx, int64_t head, int64_t kv_head) {
  return p.softmax_scale * head_factor(p.query_descale, sequence_idx, head) * head_factor(p.key_descale, sequence_idx, kv_head);
}

/// What a mean of values is multiplied by before it is stored.
FA_HD float output_factor(const AttentionParams& p, int64_t sequence_idx, int64_t head, int64_t kv_head) {
  return head_factor(p.value_descale, sequence_idx, kv_head) / head_factor(p.output_scale, sequence_idx, head);
}

}  // namespace fa
