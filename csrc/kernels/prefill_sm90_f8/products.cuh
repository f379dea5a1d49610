// SPDX-License-Identifier: Apache-2.0
// The two matrix products of a consumer warpgroup of prefill_sm90_f8, 64 query rows with one key tile: scores = Q K^T, and
// out += P V by way of a sum of one tile's keys (wgmma_f8.cuh says why).
#pragma once

#include "kernels/common/tma.cuh"
#include "kernels/common/wgmma_f8.cuh"
#include "kernels/prefill_sm90_f8/shared_plan.cuh"

namespace fa::prefill_sm90_f8 {

template <class C>
struct Products {
  static constexpr int kScores = C::kTileN / 2, kOut = C::kHeadDim / 2;  // registers of a thread
  static constexpr int kWeights = C::kTileN / 8;

  /// Issues scores = Q K^T, the last step as a group of its own where turns end there. `query`: the warpgroup's first row.
  static __device__ __forceinline__ void start_scores(float (&scores)[kScores], const uint8_t* query, const uint8_t* key) {
    const uint64_t a = wgmma_descriptor_k_major(shared_address(query)), b = wgmma_descriptor_k_major(shared_address(key));
#pragma unroll
    for (int step = 0; step < C::kHeadDim / 32; ++step) {
      WgmmaF8<C::kTileN>::ss(scores, a + step_offset(step, C::kTileM), b + step_offset(step, C::kTileN), step > 0);
      if (C::kTurnEnd == TurnEnd::kLastStep && step + 2 == C::kHeadDim / 32) wgmma_commit();
    }
    wgmma_commit();
  }

  /// Registers for the sum of one part, kSumColumns columns, and those of the ones unless they are apart.
  static constexpr int kSum = (C::kSumColumns + (C::kOnesApart ? 0 : C::kOnesRows)) / 2;

  /// Issues sum = P V, of part kPart.
  template <int kPart>
  static __device__ __forceinline__ void start_sum(float (&sum)[kSum], const uint32_t (&weights)[kWeights], const uint8_t* value,
                                                   float (&ones)[4]) {
    const uint64_t b = wgmma_descriptor_k_major(shared_address(value)) + ((kPart * C::kSumColumns * 128) >> 4);
#pragma unroll
    for (int step = 0; step < C::kTileN / 32; ++step) {
      const uint32_t* w = weights + 4 * step;
      WgmmaF8<2 * kSum>::rs(sum, w[0], w[1], w[2], w[3], b + ((step * 32) >> 4), step > 0);
    }
    if constexpr (C::kOnesApart && kPart + 1 == C::kSums) {
      if (C::kOnesBehind) wgmma_commit();
      const uint64_t c = wgmma_descriptor_k_major(shared_address(value)) + ((C::kHeadDim * 128) >> 4);
#pragma unroll
      for (int step = 0; step < C::kTileN / 32; ++step) {
        const uint32_t* w = weights + 4 * step;
        WgmmaF8<8>::rs(ones, w[0], w[1], w[2], w[3], c + ((step * 32) >> 4), step > 0);
      }
    }
    wgmma_commit();
  }

  /// out = factor * out + sum
  template <int kPart>
  static __device__ __forceinline__ void add_sum(float (&out)[kOut], const float (&sum)[kSum], const float (&factor)[2]) {
    constexpr int kFirst = kPart * C::kSumColumns / 2;
#pragma unroll
    for (int i = 0; i < C::kSumColumns / 2; ++i) out[kFirst + i] = fmaf(out[kFirst + i], factor[(i >> 1) & 1], sum[i]);
    // NOTE: else the compiler adds behind the product of the ones, for which it needs more registers.
    if constexpr (C::kOnesBehind) {
#pragma unroll
      for (int i = 0; i < C::kSumColumns / 2; ++i) asm volatile("" : "+f"(out[kFirst + i])::"memory");
    }
  }

  /// Weights as A operand: of each 32 keys the thread has pairs of four groups of eight, of which two make four neighbours
  /// (convert.cuh).
  static __device__ __forceinline__ void pack_weights(uint32_t (&weights)[kWeights], const float (&s)[kScores]) {
#pragma unroll
    for (int i = 0; i < kWeights; i += 2) {  // 16 keys
      const float* w = s + 4 * i;
      weights[i] = pack4_float8(w[0], w[1], w[4], w[5]);
      weights[i + 1] = pack4_float8(w[2], w[3], w[6], w[7]);
    }
  }

 private:
  /// Of a descriptor: columns 32 step … of panels of 128 columns and `rows` rows.
  static __device__ __forceinline__ constexpr uint64_t step_offset(int step, int rows) {
    return (step / 4 * rows * 128 + step % 4 * 32) >> 4;
  }
};

}  // namespace fa::prefill_sm90_f8
