// SPDX-License-Identifier: Apache-2.0
// From a dot product to the number that softmax sees, in the one order there is: scale, softcap, bias, ALiBi.
// Used by the CPU kernel and the CUDA kernels; masking to -inf comes after, by MaskRule and the user's mask.
#pragma once

#include <cmath>
#include <cstdint>

#include "semantics/mask.h"

namespace fa {

struct ScoreRule {
  float softmax_scale;
  float softcap;      // 0 = none
  float per_softcap;  // 1 / softcap, divided once: GPU compilers did it for each score

  FA_HD ScoreRule(float softmax_scale, float softcap)
      : softmax_scale(softmax_scale), softcap(softcap), per_softcap(softcap == 0.0f ? 0.0f : 1.0f / softcap) {}

  /// scale, then softcap. `tanh` is the caller's way to compute it.
  template <class Tanh>
  FA_HD float capped(float dot, Tanh tanh) const {
    const float s = dot * softmax_scale;
    return softcap == 0.0f ? s : softcap * tanh(s * per_softcap);
  }
  FA_HD float capped(float dot) const {
    return capped(dot, [](float x) { return tanhf(x); });
  }
};

/// -slope * |p - j|, the distance taken in integers first: exact up to 2^24 keys.
FA_HD float alibi_bias(float slope, int64_t position, int64_t key) {
  const int64_t distance = position > key ? position - key : key - position;
  return -slope * static_cast<float>(distance);
}

}  // namespace fa
