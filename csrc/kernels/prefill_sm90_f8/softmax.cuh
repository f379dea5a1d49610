// SPDX-License-Identifier: Apache-2.0
// Online softmax of prefill_sm90_f8, whose weights become float8: the largest of a row is 2^8 or little more, so that small ones
// keep their bits (e4m3 is normal from 2^-6 to 448). Used by consumer.cuh. Row sums stay per thread until the tile's end.
#pragma once

#include "kernels/prefill_sm90/softmax.cuh"

namespace fa::prefill_sm90_f8 {

inline constexpr float kWeightBits = 8.0f;           // log2 of the weight of a score that equals the row's reference
inline constexpr float kRescaleThreshold = 0.75f;    // log2 units: a weight is at most 2^8.75 = 431, and no float8 above 448
inline constexpr float kWeightUnit = 1.0f / 256.0f;  // 2^-kWeightBits

/// Brings the rows' references to the maxima of these scores, where for any row of the warp that lies too far ahead. True: what
/// has been summed up so far must be multiplied by rows.factor, which is 1 elsewhere. `unit`: of scores, in log2.
template <int kCount>
__device__ __forceinline__ bool raise_references(const float (&s)[kCount], prefill_sm90::RowPair& rows, float unit) {
  float highest[2] = {rows.reference[0], rows.reference[1]};
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    highest[0] = fmaxf(highest[0], fmaxf(s[i], s[i + 1]));
    highest[1] = fmaxf(highest[1], fmaxf(s[i + 2], s[i + 3]));
  }
  // NOTE: a row's maximum is far ahead if that of one of its four threads is: mostly none is, and nothing has to be exchanged.
  const bool far =
      (highest[0] - rows.reference[0]) * unit > kRescaleThreshold || (highest[1] - rows.reference[1]) * unit > kRescaleThreshold;
  const bool rescale = __any_sync(kAllLanes, far);
  rows.factor[0] = rows.factor[1] = 1.0f;
  if (rescale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float top = quad_max(highest[r]);
      if (top != -INFINITY) rows.factor[r] = exp2_approx((rows.reference[r] - top) * unit);
      rows.reference[r] = top;
      rows.sum[r] *= rows.factor[r];
    }
  }
  return rescale;
}

/// Scores become weights times 2^kWeightBits. kNatural: scores are natural, and `unit` is log2(e).
template <bool kNatural, int kCount>
__device__ __forceinline__ void take_weights(float (&s)[kCount], prefill_sm90::RowPair& rows, float unit) {
  const float reference[2] = {softmax_reference(rows.reference[0]), softmax_reference(rows.reference[1])};
  const float offset[2] = {kWeightBits - reference[0] * unit, kWeightBits - reference[1] * unit};
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int r = (i >> 1) & 1;
    // NOTE: natural scores are subtracted first: exactly 0 for equal ones, however large (rows of -3.4e38).
    s[i] = exp2_approx(kNatural ? fmaf(s[i] - reference[r], unit, kWeightBits) : fmaf(s[i], unit, offset[r]));
    sums[i & 3] += s[i];
  }
  rows.sum[0] += sums[0] + sums[1];
  rows.sum[1] += sums[2] + sums[3];
}

}  // namespace fa::prefill_sm90_f8
