// SPDX-License-Identifier: Apache-2.0
// One warp's two matrix products for float32 tensors, by TF32 tensor cores: one product of operands rounded to nearest
// (kOneProduct), or three of operands split in two (3xTF32: high·high + high·low + low·high; low·low is below float32's
// rounding). Operands are in shared memory as TileLayout puts them. Used by products.cuh.
#pragma once

#include "kernels/common/mma.cuh"
#include "kernels/common/swizzle.cuh"

namespace fa {

template <class Config>
struct FloatProducts {
  using LayoutQ = typename Config::LayoutQ;
  using LayoutKv = typename Config::LayoutKv;
  static constexpr bool kOneProduct = Config::kOneProduct;
  static constexpr int kRowBlocks = Config::kRowBlocks, kKeyBlocks = Config::kTileKv / 8, kDimBlocks = Config::kHeadDim / 8;
  // NOTE: tensor cores round sums toward zero. Exact sums are therefore short: each starts from 0 and is added by the FP32 unit,
  // else their error would grow with head_dim and the number of keys.
  static constexpr int kStepsPerSum = kOneProduct ? kDimBlocks : 4;

  using Scores = float[kRowBlocks][kKeyBlocks][4];
  using Out = float[kRowBlocks][kDimBlocks][4];
  using Weights = uint32_t[kRowBlocks][kKeyBlocks][4];

  /// kCount registers of an operand. low is unused where kOneProduct.
  template <int kCount>
  struct Operand {
    uint32_t high[kCount], low[kOneProduct ? 1 : kCount];

    __device__ __forceinline__ void set(int i, uint32_t x) {
      if constexpr (kOneProduct) {
        high[i] = round_tf32_away(x);
      } else {
        split_tf32(x, high[i], low[i]);
      }
    }
  };

  /// c += a b, the small products first.
  static __device__ __forceinline__ void multiply(float (&c)[4], const Operand<4>& a, const Operand<2>& b) {
    if constexpr (!kOneProduct) {
      mma_m16n8k8_tf32(c, a.low, b.high[0], b.high[1]);
      mma_m16n8k8_tf32(c, a.high, b.low[0], b.low[1]);
    }
    mma_m16n8k8_tf32(c, a.high, b.high[0], b.high[1]);
  }

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
        for (int m = 0; m < kRowBlocks; ++m) multiply(kOneProduct ? out[m][d] : sum[m], weights[m][n], values);
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
          multiply(sum[m][n], queries[m], keys[0]);
          multiply(sum[m][n + 1], queries[m], keys[1]);
        }
      }
    }
  }

  /// Key 2t + e of n-block n, column g of 8 d … + 7.
  static __device__ __forceinline__ uint32_t load_value(uint32_t value, int n, int e, int d) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    uint32_t x;
    asm volatile("ld.shared.b32 %0, [%1];\n"
                 : "=r"(x)
                 : "r"(value + LayoutKv::offset(key_in_tile(n, t, e), 2 * d + g / 4) + 4 * (g % 4)));
    return x;
  }
};

}  // namespace fa
