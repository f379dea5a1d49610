// SPDX-License-Identifier: Apache-2.0
// Online softmax on a warpgroup's accumulator fragment: each thread holds two rows, four neighbouring threads share them.
// Used by consumer.cuh. Row sums stay per thread until the tile's end.
#pragma once

#include "kernels/common/exp2.cuh"
#include "kernels/common/reduce.cuh"
#include "semantics/softmax.h"

namespace fa::prefill_sm90 {

inline constexpr float kRescaleThreshold = 8.0f;  // log2 units: unnormalised weights stay below 2^8 where rescaling is put off

/// The thread's two rows.
struct RowPair {
  float reference[2] = {-INFINITY, -INFINITY};  // of exponents: the maximum, or at most a threshold less
  float sum[2] = {0.0f, 0.0f};                  // this thread's part
  float factor[2];                              // what the output gathered so far must be multiplied with
};

/// What softmax_step does with the maxima of rows whose keys no other warp has.
struct NothingToCombine {
  __device__ __forceinline__ void operator()(float (&)[2]) const {}
};

/// Scores become weights relative to the rows' reference; score times `unit` is in log2 units. Returns whether the output must be
/// rescaled by rows.factor, which is put off while maxima grow by less than `threshold` (log2 units). `combine` is given the
/// maxima of the two rows, and may raise them to those of other warps.
template <class C, int kCount, class Combine = NothingToCombine>
__device__ __forceinline__ bool softmax_step(float (&s)[kCount], RowPair& rows, float unit, float threshold = kRescaleThreshold,
                                             Combine combine = {}) {
  float highest[2] = {rows.reference[0], rows.reference[1]};
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    highest[0] = fmaxf(highest[0], fmaxf(s[i], s[i + 1]));
    highest[1] = fmaxf(highest[1], fmaxf(s[i + 2], s[i + 3]));
  }
  highest[0] = quad_max(highest[0]);
  highest[1] = quad_max(highest[1]);
  combine(highest);
  const bool far = (highest[0] - rows.reference[0]) * unit > threshold || (highest[1] - rows.reference[1]) * unit > threshold;
  const bool rescale = __any_sync(kAllLanes, far);
  if (rescale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows.factor[r] = highest[r] == -INFINITY ? 1.0f : exp2_approx((rows.reference[r] - highest[r]) * unit);
      rows.reference[r] = highest[r];
      rows.sum[r] *= rows.factor[r];
    }
  }
  const float reference[2] = {softmax_reference(rows.reference[0]), softmax_reference(rows.reference[1])};
  const float scaled_reference[2] = {reference[0] * unit, reference[1] * unit};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int r = (i >> 1) & 1;
    // NOTE: natural scores are subtracted first: exactly 0 for equal ones, however large (rows of -3.4e38).
    s[i] = exp2_approx(C::kModified ? (s[i] - reference[r]) * unit : fmaf(s[i], unit, -scaled_reference[r]));
  }
  float sums[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
  for (int i = 4; i < kCount; ++i) sums[i & 3] += s[i];
  rows.sum[0] += sums[0] + sums[1];
  rows.sum[1] += sums[2] + sums[3];
  return rescale;
}

inline constexpr float kOptimisticLimit = 16384.0f;     // of a thread's sum over one key tile; the weights must also fit float16
inline constexpr float kOptimisticReference = 4096.0f;  // of natural scores: beyond it the product with log2(e) rounds too much

/// Exponents (log2 units) become weights. False, with the exponents lost and the rows untouched, where the reference proves too
/// small for any row of the warp.
template <int kCount>
__device__ __forceinline__ bool optimistic_weights(float (&s)[kCount], RowPair& rows) {
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    s[i] = exp2_approx(s[i]);
    sums[i & 3] += s[i];
  }
  const float sum[2] = {sums[0] + sums[1], sums[2] + sums[3]};
  if (__any_sync(kAllLanes, !(sum[0] < kOptimisticLimit && sum[1] < kOptimisticLimit))) return false;
  rows.sum[0] += sum[0];
  rows.sum[1] += sum[1];
  return true;
}

/// softmax_step without a look for the maximum: the reference stays. See optimistic_weights.
template <class C, int kCount>
__device__ __forceinline__ bool optimistic_softmax_step(float (&s)[kCount], RowPair& rows, float unit) {
  const float scaled_reference[2] = {rows.reference[0] * unit, rows.reference[1] * unit};
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = fmaf(s[i], unit, -scaled_reference[(i >> 1) & 1]);
  return optimistic_weights(s, rows);
}

/// May this thread's rows go without a maximum?
template <class C>
__device__ __forceinline__ bool is_settled(const RowPair& rows) {
  if constexpr (C::kModified) return fmaxf(fabsf(rows.reference[0]), fabsf(rows.reference[1])) < kOptimisticReference;
  return rows.reference[0] != -INFINITY && rows.reference[1] != -INFINITY;
}

template <int kCount>
__device__ __forceinline__ void rescale_rows(float (&o)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] *= factor[(i >> 1) & 1];
}

}  // namespace fa::prefill_sm90
