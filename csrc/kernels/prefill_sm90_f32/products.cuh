// SPDX-License-Identifier: Apache-2.0
// The two matrix products of a consumer warpgroup of prefill_sm90_f32, 64 query rows with one key tile: scores = Q K^T and
// out = factor * out + P V. One TF32 product for each, or where kSplit three, the small ones apart or first: tensor cores round
// sums toward zero, which costs a sum least while it is small; and sums are short, added up by the FP32 unit.
#pragma once

#include "kernels/common/mma.cuh"
#include "kernels/common/tma.cuh"
#include "kernels/common/wgmma_tf32.cuh"
#include "kernels/prefill_sm90_f32/shared_plan.cuh"

namespace fa::prefill_sm90_f32 {

template <class C>
struct Products {
  static constexpr int kScores = C::kTileN / 2, kOut = C::kHeadDim / 2;  // registers of a thread
  static constexpr int kStepsPerSum = 16;                                // of 8 columns of Q and K; where kSplit

  /// Columns of Q that a thread holds while a tile lasts: shared memory is read once for them, and not once for each key tile.
  struct HeldQueries {
    float a[C::kHeldSteps > 0 ? C::kHeldSteps : 1][4];
  };

  /// `query`: the warpgroup's first row, rounded.
  static __device__ __forceinline__ void hold_queries(HeldQueries& held, const uint8_t* query) {
    const uint32_t first = first_operand(query);
#pragma unroll
    for (int step = 0; step < C::kHeldSteps; ++step) {
      uint32_t raw[4];
      ldmatrix_x4(raw, swizzled_step(first, step % 4) + step / 4 * C::kTileM * 128);
#pragma unroll
      for (int i = 0; i < 4; ++i) held.a[step][i] = __uint_as_float(raw[i]);
    }
  }

  /// scores = Q K^T; on return they are there. `query`: the warpgroup's first row.
  static __device__ __forceinline__ void multiply_keys(float (&scores)[kScores], HeldQueries& held, const uint8_t* query,
                                                       const uint8_t* key) {
    if constexpr (C::kSplit) {
      constexpr int kSteps = C::kHeadDim / 8, kFirst = kSteps < kStepsPerSum ? kSteps : kStepsPerSum;
      sum_scores<kFirst, 0>(scores, query, key);
      if constexpr (kSteps > kFirst) sum_scores<kFirst, kFirst>(scores, query, key);
      static_assert(kSteps <= 2 * kFirst);
    } else {
      const uint64_t a = wgmma_descriptor_k_major(shared_address(query)), b = wgmma_descriptor_k_major(shared_address(key));
      wgmma_pin(scores);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < C::kHeadDim / 8; ++step) {
        const uint64_t keys = b + step_offset(step, C::kTileN);
        if (step < C::kHeldSteps) {
          const float (&h)[4] = held.a[step < C::kHeldSteps ? step : 0];
          WgmmaTf32<C::kTileN>::rs(scores, h[0], h[1], h[2], h[3], keys, step > 0);
        } else {
          WgmmaTf32<C::kTileN>::ss(scores, a + step_offset(step, C::kTileM), keys, step > 0);
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_pin(scores);
#pragma unroll
      for (int step = 0; step < C::kHeldSteps; ++step) wgmma_pin(held.a[step]);
    }
  }

  /// out = factor * out + P V; on return it is there. The weights are lost. Without kSplit factors are left to the caller.
  static __device__ __forceinline__ void multiply_values(float (&out)[kOut], float (&weights)[kScores], const float (&factor)[2],
                                                         const uint8_t* value) {
    const uint64_t high = wgmma_descriptor_k_major(shared_address(value));
    if constexpr (C::kSplit) {
      float rest[kScores];
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const float rounded = round_tf32(weights[i]);
        rest[i] = weights[i] - rounded;
        weights[i] = rounded;
      }
      const uint64_t low = high + (C::kTileBytes >> 4);
#pragma unroll
      for (int column = 0; column < C::kHeadDim; column += C::kOutColumns) {
        const uint64_t rows = (column * 128) >> 4;
        float sum[C::kOutColumns / 2] = {};
        wgmma_pin(weights);
        wgmma_pin(rest);
        wgmma_fence();
        add_values<C::kOutColumns>(sum, rest, high + rows, false);
        add_values<C::kOutColumns>(sum, weights, low + rows, true);
        add_values<C::kOutColumns>(sum, weights, high + rows, true);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(sum);
        wgmma_pin(weights);
        wgmma_pin(rest);
#pragma unroll
        for (int i = 0; i < C::kOutColumns / 2; ++i) {
          out[column / 2 + i] = fmaf(out[column / 2 + i], factor[i / 2 % 2], sum[i]);
        }
      }
    } else {
#pragma unroll
      for (float& weight : weights) weight = round_tf32(weight);
      wgmma_pin(out);
      wgmma_pin(weights);
      wgmma_fence();
      add_values<C::kHeadDim>(out, weights, high, true);
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_pin(out);
      wgmma_pin(weights);
    }
  }

  /// The warpgroup's 64 rows of Q become TF32 in place, for the tensor cores to read. A barrier of the warpgroup must follow.
  static __device__ __forceinline__ void round_queries(uint8_t* query) {
    const int thread = threadIdx.x % kWarpgroupThreads;
#pragma unroll 4
    for (int i = 0; i < C::kPanels * 4; ++i) {
      auto* x = reinterpret_cast<float4*>(query + i / 4 * C::kTileM * 128 + i % 4 * 2048 + thread * 16);
      *x = make_float4(round_tf32(x->x), round_tf32(x->y), round_tf32(x->z), round_tf32(x->w));
    }
    fence_async_proxy();
  }

 private:
  /// Of a descriptor: columns 8 step … of panels of 32 columns and `rows` rows.
  static __device__ __forceinline__ constexpr uint64_t step_offset(int step, int rows) {
    return (step / 4 * rows * 128 + step % 4 * 32) >> 4;
  }

  /// Where this thread's ldmatrix finds the first 8 columns of the warpgroup's rows as an operand.
  static __device__ __forceinline__ uint32_t first_operand(const uint8_t* query) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    return shared_address(query) + swizzled_offset(row, lane / 16);
  }

  /// sum += weights * values, kColumns columns.
  template <int kColumns>
  static __device__ __forceinline__ void add_values(float (&sum)[kColumns / 2], const float (&weights)[kScores], uint64_t values,
                                                    bool accumulate) {
#pragma unroll
    for (int step = 0; step < C::kTileN / 8; ++step) {
      const float* w = weights + 4 * step;  // two neighbouring keys in two rows
      WgmmaTf32<kColumns>::rs(sum, w[0], w[2], w[1], w[3], values + step_offset(step, C::kHeadDim), accumulate || step > 0);
    }
  }

  /// scores (+)= Q K^T over kSteps steps of 8 columns from kBegin on. K's high and low rows stand one behind the other, so that
  /// one product serves both.
  template <int kSteps, int kBegin>
  static __device__ __forceinline__ void sum_scores(float (&scores)[kScores], const uint8_t* query, const uint8_t* key) {
    const uint32_t first = first_operand(query);
    const uint64_t b = wgmma_descriptor_k_major(shared_address(key));
    float both[2 * kScores] = {}, cross[kScores] = {};  // high Q with high and low K; low Q with high K
    float high[2][4], low[2][4];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int step = kBegin + i;
      if (i >= 2) wgmma_wait<1>();  // the operands of the step before last are free
      uint32_t raw[4];
      ldmatrix_x4(raw, swizzled_step(first, step % 4) + step / 4 * C::kTileM * 128);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        high[i % 2][j] = round_tf32(__uint_as_float(raw[j]));
        low[i % 2][j] = __uint_as_float(raw[j]) - high[i % 2][j];
      }
      wgmma_pin(high[i % 2]);
      wgmma_pin(low[i % 2]);
      wgmma_fence();
      const uint64_t keys = b + step_offset(step, 2 * C::kTileN);
      const float (&h)[4] = high[i % 2], (&l)[4] = low[i % 2];
      WgmmaTf32<C::kTileN>::rs(cross, l[0], l[1], l[2], l[3], keys, i > 0);
      WgmmaTf32<2 * C::kTileN>::rs(both, h[0], h[1], h[2], h[3], keys, i > 0);
      wgmma_commit();
    }
    wgmma_wait<0>();
    wgmma_pin(both);
    wgmma_pin(cross);
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const float sum = both[i] + (both[kScores + i] + cross[i]);
      scores[i] = kBegin == 0 ? sum : scores[i] + sum;
    }
  }
};

}  // namespace fa::prefill_sm90_f32
