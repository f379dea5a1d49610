// SPDX-License-Identifier: Apache-2.0
// One warp's two matrix products for float32 tensors, by TF32 tensor cores: one product (kOneProduct) or three (common/tf32.cuh).
// Operands are in shared memory as TileLayout puts them. Used by products.cuh.
#pragma once

#include "kernels/common/shared_memory.cuh"
#include "kernels/common/swizzle.cuh"
#include "kernels/common/tf32.cuh"

namespace fa {

template <class Config>
struct FloatProducts {
  using LayoutQ = typename Config::LayoutQ;
  using LayoutKv = typename Config::LayoutKv;
  static constexpr bool kOneProduct = Config::kOneProduct;
  static constexpr int kRowBlocks = Config::kRowBlocks, kKeyBlocks = Config::kTileKv / 8, kDimBlocks = Config::kHeadDim / 8;
  static constexpr int kStepsPerSum = kOneProduct ? kDimBlocks : kStepsOfShortSum;

  using Scores = float[kRowBlocks][kKeyBlocks][4];
  using Out = float[kRowBlocks][kDimBlocks][4];
  using Weights = uint32_t[kRowBlocks][kKeyBlocks][4];

  using Tf32s = Tf32Products<kOneProduct ? Tf32::kOne : Tf32::kThree>;
  template <int kCount>
  using Operand = typename Tf32s::template Operand<kCount>;

  /// scores += Q K^T. `query` and `key` are this lane's addresses for ldmatrix.
  static __device__ __forceinline__ void add_scores(Scores& scores, uint32_t query, uint32_t key) {
#pragma unroll
    for (int first = 0; first < kDimBlocks; first += kStepsPerSum) {
      if constexpr (kOneProduct) {
        sum_scores(scores, query, key, first);
      } else {
        Scores sum = {};
        sum_scores(sum, query, key, first);
#pragma unroll
        for (int i = 0; i < kRowBlocks * kKeyBlocks * 4; ++i)
          scores[i / (kKeyBlocks * 4)][i / 4 % kKeyBlocks][i % 4] += sum[i / (kKeyBlocks * 4)][i / 4 % kKeyBlocks][i % 4];
      }
    }
  }

  /// out += P V. Depth place t is column 2t of the accumulator and t + 4 column 2t + 1, so that no lane gives elements away.
  /// `value`: the tile's address.
  static __device__ __forceinline__ void accumulate(Out& out, const Weights& p, uint32_t value) {
    Operand<4> weights[kRowBlocks][kKeyBlocks];
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[m][n].set(i, p[m][n][i % 2 * 2 + i / 2]);
      }
    }
#pragma unroll
    for (int d = 0; d < kDimBlocks; ++d) {
      float sum[kRowBlocks][4] = {};
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
        Operand<2> values;
#pragma unroll
        for (int e = 0; e < 2; ++e) values.set(e, load_value(value, n, e, d));
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) Tf32s::multiply(kOneProduct ? out[m][d] : sum[m], weights[m][n], values);
      }
      if constexpr (!kOneProduct) {
#pragma unroll
        for (int i = 0; i < kRowBlocks * 4; ++i) out[i / 4][d][i % 4] += sum[i / 4][i % 4];
      }
    }
  }

 private:
  /// sum += Q K^T over kStepsPerSum steps of 8 columns.
  static __device__ __forceinline__ void sum_scores(Scores& sum, uint32_t query, uint32_t key, int first) {
#pragma unroll
    for (int step = first; step < first + kStepsPerSum; ++step) {
      Operand<4> queries[kRowBlocks];
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        uint32_t a[4];
        ldmatrix_x4(a, LayoutQ::advance(query, 16 * m, 2 * step));
#pragma unroll
        for (int i = 0; i < 4; ++i) queries[m].set(i, a[i]);
      }
#pragma unroll
      for (int n = 0; n < kKeyBlocks; n += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, LayoutKv::advance(key, key_in_tile(n, 0, 0), 2 * step));
        Operand<2> keys[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) keys[i / 2].set(i % 2, b[i]);
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          Tf32s::multiply(sum[m][n], queries[m], keys[0]);
          Tf32s::multiply(sum[m][n + 1], queries[m], keys[1]);
        }
      }
    }
  }

  /// Key 2t + e of n-block n, column g of 8 d … + 7.
  static __device__ __forceinline__ uint32_t load_value(uint32_t value, int n, int e, int d) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    return load_shared(value + LayoutKv::offset(key_in_tile(n, t, e), 2 * d + g / 4) + 4 * (g % 4));
  }
};

}  // namespace fa
