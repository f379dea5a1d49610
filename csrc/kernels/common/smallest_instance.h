// SPDX-License-Identifier: Apache-2.0
// Which compiled instance of a kernel takes a problem's heads: instances are made for a few head sizes, and each takes smaller
// heads too. Used by the planning of the kernels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "fa/attention.h"

namespace fa {

/// The instance with the smallest head_dim that is enough for the problem's head_dim and head_dim_v, among those of which
/// suits(instance) is true; null where the heads are too wide for any.
template <class Instance, size_t kCount, class Suits>
const Instance* smallest_instance(const Instance (&instances)[kCount], const AttentionParams& p, Suits suits) {
  const int64_t head_dim = std::max(p.query.shape[3], p.value.shape[3]);
  const Instance* best = nullptr;
  for (const Instance& instance : instances) {
    if (instance.head_dim < head_dim || !suits(instance)) continue;
    if (best == nullptr || instance.head_dim < best->head_dim) best = &instance;
  }
  return best;
}

}  // namespace fa
