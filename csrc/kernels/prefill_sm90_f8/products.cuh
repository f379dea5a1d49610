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
  static constexpr int kScores = C::kTileN / 2, kSum = C::kSumColumns / 2, kOut = C::kHeadDim / 2;  // registers of a thread
  static constexpr int kWeights = C::kTileN / 8;

  /// Issues scores = Q K^T. `query`: the warpgroup's first row.
  static __device__ __forceinline__ void start_scores(float (&scores)[kScores], const uint8_t* query, const uint8_t* key) {
    const uint64_t a = wgmma_descriptor_k_major(shared_address(query)), b = wgmma_descriptor_k_major(shared_address(key));
#pragma unroll
    for (int step = 0; step < C::kHeadDim / 32; ++step) {
      WgmmaF8<C::kTileN>::ss(scores, a + step_offset(step, C::kTileM), b + step_offset(step, C::kTileN), step > 0);
    }
    wgmma_commit();
  }

  /// Issues sum = P V, of columns kSumColumns part ….
  static __device__ __forceinline__ void start_sum(float (&sum)[kSum], const uint32_t (&weights)[kWeights], const uint8_t* value,
                                                   int part) {
    const uint64_t b = wgmma_descriptor_k_major(shared_address(value)) + ((part * C::kSumColumns * 128) >> 4);
#pragma unroll
    for (int step = 0; step < C::kTileN / 32; ++step) {
      const uint32_t* w = weights + 4 * step;
      WgmmaF8<C::kSumColumns>::rs(sum, w[0], w[1], w[2], w[3], b + step_offset(step, C::kHeadDim), step > 0);
    }
    wgmma_commit();
  }

  /// out += factor * sum
  static __device__ __forceinline__ void add_sum(float (&out)[kOut], const float (&sum)[kSum], const float (&factor)[2],
                                                 int part) {
#pragma unroll
    for (int i = 0; i < kSum; ++i) out[part * kSum + i] = fmaf(sum[i], factor[(i >> 1) & 1], out[part * kSum + i]);
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
