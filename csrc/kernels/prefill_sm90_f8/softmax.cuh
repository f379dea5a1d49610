// SPDX-License-Identifier: Apache-2.0
// Online softmax of prefill_sm90_f8, whose weights become float8: the largest of a row is 2^8, so that small ones keep their bits
// (e4m3 is normal from 2^-6 to 448). Used by consumer.cuh. Row sums stay per thread until the tile's end.
#pragma once

#include "kernels/prefill_sm90/softmax.cuh"

namespace fa::prefill_sm90_f8 {

inline constexpr float kWeightBits = 8.0f;           // log2 of the weight of a score that equals the row's reference
inline constexpr float kWeightUnit = 1.0f / 256.0f;  // 2^-kWeightBits

/// Brings the rows' references to the maxima of these scores and of those before. What has been summed up so far must be
/// multiplied by rows.factor. `unit`: of scores, in log2.
template <int kCount>
__device__ __forceinline__ void raise_references(const float (&s)[kCount], prefill_sm90::RowPair& rows, float unit) {
  float highest[2] = {rows.reference[0], rows.reference[1]};
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    highest[0] = fmaxf(highest[0], fmaxf(s[i], s[i + 1]));
    highest[1] = fmaxf(highest[1], fmaxf(s[i + 2], s[i + 3]));
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float top = quad_max(highest[r]);
    rows.factor[r] = top == -INFINITY ? 1.0f : exp2_approx((rows.reference[r] - top) * unit);
    rows.reference[r] = top;
    rows.sum[r] *= rows.factor[r];
  }
}

/// Scores become weights times 2^kWeightBits. kNatural: scores are natural, and `unit` is log2(e). kAddUp: and join the rows'
/// sums.
template <bool kNatural, bool kAddUp, int kCount>
__device__ __forceinline__ void take_weights(float (&s)[kCount], prefill_sm90::RowPair& rows, float unit) {
  const float reference[2] = {softmax_reference(rows.reference[0]), softmax_reference(rows.reference[1])};
  const float offset[2] = {kWeightBits - reference[0] * unit, kWeightBits - reference[1] * unit};
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int r = (i >> 1) & 1;
    // NOTE: natural scores are subtracted first: exactly 0 for equal ones, however large (rows of -3.4e38).
    s[i] = exp2_approx(kNatural ? fmaf(s[i] - reference[r], unit, kWeightBits) : fmaf(s[i], unit, offset[r]));
    if constexpr (kAddUp) sums[i & 3] += s[i];
  }
  if constexpr (!kAddUp) return;
  rows.sum[0] += sums[0] + sums[1];
  rows.sum[1] += sums[2] + sums[3];
}

}  // namespace fa::prefill_sm90_f8
