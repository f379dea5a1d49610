// SPDX-License-Identifier: Apache-2.0
// Online softmax on one warp's score fragments. Raw scores (kNatural = false) are products still to be multiplied by the scale,
// which one FFMA folds into the exponent; natural scores have all arithmetic behind them, and exponents are (score - reference) ·
// log2(e), which is exactly 0 for equal scores however large: rows of -3.4e38 give the uniform mean as they do in float
// arithmetic.
#pragma once

#include "kernels/common/convert.cuh"
#include "kernels/common/exp2.cuh"
#include "kernels/common/reduce.cuh"
#include "semantics/softmax.h"

namespace fa::prefill_sm80 {

/// NOTE: `reference` may lag behind the maximum by up to 2^8 in the exponential; then neither out nor sum need rescaling. p <=
/// 256 is exact enough in every element type, since only ratios count.
inline constexpr float kLagLog2 = 8.0f;

template <int kRowBlocks>
struct RowState {
  float reference[kRowBlocks][2];  // what exponents are taken against; -inf before the first key
  float sum[kRowBlocks][2];        // this lane's part

  __device__ __forceinline__ RowState() {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) reference[m][0] = reference[m][1] = -INFINITY, sum[m][0] = sum[m][1] = 0.0f;
  }
};

/// Moves each row's reference to its new maximum and rescales out and sum, where it lags too far. `to_log2` brings a score to
/// log2.
template <int kRowBlocks, int kKeyBlocks, int kDimBlocks>
__device__ __forceinline__ void move_reference(const float (&scores)[kRowBlocks][kKeyBlocks][4],
                                               float (&out)[kRowBlocks][kDimBlocks][4], RowState<kRowBlocks>& state,
                                               float to_log2) {
  float top[kRowBlocks][2];
  bool moves = false;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = fmaxf(scores[m][0][2 * r], scores[m][0][2 * r + 1]);
#pragma unroll
      for (int n = 1; n < kKeyBlocks; ++n) highest = fmaxf(highest, fmaxf(scores[m][n][2 * r], scores[m][n][2 * r + 1]));
      top[m][r] = quad_max(highest);
      moves |= (top[m][r] - state.reference[m][r]) * to_log2 > kLagLog2;
    }
  }
  if (!__any_sync(kAllLanes, moves)) return;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float reference = fmaxf(state.reference[m][r], top[m][r]);
      const float factor = exp2_approx((state.reference[m][r] - softmax_reference(reference)) * to_log2);
      state.reference[m][r] = reference;
      state.sum[m][r] *= factor;
#pragma unroll
      for (int d = 0; d < kDimBlocks; ++d) out[m][d][2 * r] *= factor, out[m][d][2 * r + 1] *= factor;
    }
  }
}

/// weights = exponentials of the scores in the element type, and their sums into the state.
template <class T, bool kNatural, int kRowBlocks, int kKeyBlocks, int kWords>
__device__ __forceinline__ void exponentials(const float (&scores)[kRowBlocks][kKeyBlocks][4],
                                             uint32_t (&weights)[kRowBlocks][kKeyBlocks][kWords], RowState<kRowBlocks>& state,
                                             float to_log2) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float reference = softmax_reference(state.reference[m][r]);
      const float scaled_reference = reference * to_log2;
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
        float weight[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float score = scores[m][n][2 * r + e];
          weight[e] = exp2_approx(kNatural ? (score - reference) * to_log2 : fmaf(score, to_log2, -scaled_reference));
          state.sum[m][r] += weight[e];
          if constexpr (sizeof(T) == 4) weights[m][n][2 * r + e] = __float_as_uint(weight[e]);
        }
        if constexpr (sizeof(T) == 2) weights[m][n][r] = pack2<T>(weight[0], weight[1]);
      }
    }
  }
}

}  // namespace fa::prefill_sm80
