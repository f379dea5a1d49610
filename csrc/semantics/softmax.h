// SPDX-License-Identifier: Apache-2.0
// Online softmax (Milakov & Gimelshein 2018): the running maximum and sum of a row, the merge of two partial results, the sink,
// and what a row without keys gives. Scores here are natural; names of values in units of log2 end in _log2.
#pragma once

#include <cmath>

#include "semantics/mask.h"

namespace fa {

inline constexpr float kLog2E = 1.4426950408889634f;

/// Partial softmax of a row: max = -inf and sum = 0 where it has seen no key.
struct SoftmaxState {
  float max;
  float sum;  // of exp(score - max)
};

/// What exponents are taken against: max, or 0 while every score so far is -inf (so that -inf - max is never NaN).
FA_HD float softmax_reference(float max) { return max == -INFINITY ? 0.0f : max; }

/// exp(from - to) for two maxima, 0 where `from` has seen no key: the factor that brings a partial sum to a new maximum.
FA_HD float rescale_factor(float from, float to) { return from == -INFINITY ? 0.0f : expf(from - to); }

/// The state of two disjoint sets of keys taken together.
FA_HD SoftmaxState merge(SoftmaxState a, SoftmaxState b) {
  const float max = a.max > b.max ? a.max : b.max;
  return {max, a.sum * rescale_factor(a.max, max) + b.sum * rescale_factor(b.max, max)};
}

/// A sink is a key with this logit and no value.
FA_HD SoftmaxState add_sink(SoftmaxState s, float sink) { return merge(s, {sink, sink == -INFINITY ? 0.0f : 1.0f}); }

/// Natural log-sum-exp; -inf for a row without keys.
FA_HD float lse(SoftmaxState s) { return s.sum == 0.0f ? -INFINITY : s.max + logf(s.sum); }

/// 1 / sum; 0 for a row without keys, whose output is then 0.
FA_HD float normalizer(SoftmaxState s) { return s.sum == 0.0f ? 0.0f : 1.0f / s.sum; }

}  // namespace fa
