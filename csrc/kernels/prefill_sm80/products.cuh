// SPDX-License-Identifier: Apache-2.0
// One warp's two matrix products: scores = Q K^T and out += P V, operands in shared memory as TileLayout puts them, scores and
// out in registers. 16-bit elements: one mma of depth 16. float32: three TF32 products of depth 8 for each (3xTF32).
#pragma once

#include "kernels/common/convert.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/common/swizzle.cuh"

namespace fa {

template <class Config>
struct Products {
  using T = typename Config::T;
  using LayoutQ = typename Config::LayoutQ;
  using LayoutKv = typename Config::LayoutKv;
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr int kRowBlocks = Config::kRowBlocks, kKeyBlocks = Config::kTileKv / 8, kDimBlocks = Config::kHeadDim / 8;
  static constexpr int kDepthSteps = Config::kHeadDim * sizeof(T) / 32;  // of two chunks each
  // NOTE: tensor cores round sums toward zero. float32 sums are therefore short: each starts from 0 and is added by the FP32
  // unit, else their error would grow with head_dim and the number of keys.
  static constexpr int kStepsPerSum = 4;

  using Scores = float[kRowBlocks][kKeyBlocks][4];
  using Out = float[kRowBlocks][kDimBlocks][4];
  using QueryFragment = uint32_t[kRowBlocks][4];
  /// Exponentials of the scores in the element type, by row of the n-block: pairs of 16 bits, or two float32.
  using Weights = uint32_t[kRowBlocks][kKeyBlocks][kFloat ? 4 : 2];

  /// This lane's offset in the query tile for ldmatrix: rows 0-7 and 8-15 of the first chunk, then of the second.
  static __device__ __forceinline__ uint32_t query_lane(int warp, int lane) {
    return LayoutQ::offset(warp * kRowBlocks * 16 + lane % 16, lane / 16);
  }
  /// In a key tile: n-block 0's first and second chunk, then n-block 1's.
  static __device__ __forceinline__ uint32_t key_lane(int lane) {
    return LayoutKv::offset(key_in_tile(lane / 16, (lane % 8) / 2, lane % 2), (lane / 8) % 2);
  }
  /// In a value tile: n-blocks 0 and 1 of the first chunk, then of the second.
  static __device__ __forceinline__ uint32_t value_lane(int lane) {
    return LayoutKv::offset(key_in_tile((lane / 8) % 2, (lane % 8) / 2, lane % 2), lane / 16);
  }

  static __device__ __forceinline__ void load_query(QueryFragment& a, uint32_t query, int step) {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) ldmatrix_x4(a[m], LayoutQ::advance(query, 16 * m, 2 * step));
  }

  /// One depth step of scores += Q K^T. `a` is the query's fragment of that step.
  static __device__ __forceinline__ void score_step(Scores& scores, const QueryFragment& a, uint32_t key, int step) {
    uint32_t a_high[4], a_low[4];
    if constexpr (kFloat) {
#pragma unroll
      for (int i = 0; i < 4; ++i) split_tf32(a[0][i], a_high[i], a_low[i]);
    }
#pragma unroll
    for (int n = 0; n < kKeyBlocks; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, LayoutKv::advance(key, key_in_tile(n, 0, 0), 2 * step));
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        if constexpr (kFloat) {
          mma_m16n8k8_3xtf32(scores[m][n], a_high, a_low, b[0], b[1]);
          mma_m16n8k8_3xtf32(scores[m][n + 1], a_high, a_low, b[2], b[3]);
        } else {
          mma_m16n8k16<T>(scores[m][n], a[m], b[0], b[1]);
          mma_m16n8k16<T>(scores[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  /// scores = Q K^T. `query` and `key` are this lane's addresses; `held` the query's fragments where they stay in registers.
  template <class Held>
  static __device__ __forceinline__ void scores_of(Scores& scores, const Held& held, uint32_t query, uint32_t key) {
    clear(scores);
    if constexpr (kFloat) {
      sum_scores(scores, query, key);
    } else {
#pragma unroll
      for (int step = 0; step < kDepthSteps; ++step) {
        if constexpr (Config::kQueryInRegisters) {
          score_step(scores, held[step], key, step);
        } else {
          QueryFragment a;
          load_query(a, query, step);
          score_step(scores, a, key, step);
        }
      }
    }
  }

  /// out += P V. 16-bit: the packed accumulators of two n-blocks are the A operand of one depth step.
  static __device__ __forceinline__ void accumulate(Out& out, const Weights& p, uint32_t value) {
    if constexpr (kFloat) {
      accumulate_float(out, p, value);
    } else {
#pragma unroll
      for (int n = 0; n < kKeyBlocks; n += 2) {
#pragma unroll
        for (int d = 0; d < kDimBlocks; d += 2) {
          uint32_t b[4];
          ldmatrix_x4_transposed(b, LayoutKv::advance(value, key_in_tile(n, 0, 0), d));
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) {
            const uint32_t a[4] = {p[m][n][0], p[m][n][1], p[m][n + 1][0], p[m][n + 1][1]};
            mma_m16n8k16<T>(out[m][d], a, b[0], b[1]);
            mma_m16n8k16<T>(out[m][d + 1], a, b[2], b[3]);
          }
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ void clear(Scores& scores) {
#pragma unroll
    for (int i = 0; i < kRowBlocks * kKeyBlocks * 4; ++i) scores[i / (kKeyBlocks * 4)][i / 4 % kKeyBlocks][i % 4] = 0.0f;
  }

  /// scores += Q K^T, float32, in sums of kStepsPerSum depth steps.
  static __device__ __forceinline__ void sum_scores(Scores& scores, uint32_t query, uint32_t key) {
#pragma unroll
    for (int first = 0; first < kDepthSteps; first += kStepsPerSum) {
      Scores sum;
      clear(sum);
#pragma unroll
      for (int step = first; step < first + kStepsPerSum; ++step) {
        QueryFragment a;
        load_query(a, query, step);
        score_step(sum, a, key, step);
      }
#pragma unroll
      for (int i = 0; i < kKeyBlocks * 4; ++i) scores[0][i / 4][i % 4] += sum[0][i / 4][i % 4];
    }
  }

  /// out += P V, float32. Depth place t is column 2t of the accumulator and t + 4 column 2t + 1, so that no lane gives elements
  /// away. Each tile's sum starts from 0.
  static __device__ __forceinline__ void accumulate_float(Out& out, const Weights& p, uint32_t value_base) {
    static_assert(!kFloat || kRowBlocks == 1);
    uint32_t high[kKeyBlocks][4], low[kKeyBlocks][4];
#pragma unroll
    for (int n = 0; n < kKeyBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) split_tf32(p[0][n][(i % 2) * 2 + i / 2], high[n][i], low[n][i]);
    }
    const int g = (threadIdx.x % 32) / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int d = 0; d < kDimBlocks; ++d) {
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
        uint32_t b[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint32_t address = value_base + LayoutKv::offset(key_in_tile(n, t, e), 2 * d + g / 4) + 4 * (g % 4);
          asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(b[e]) : "r"(address));
        }
        mma_m16n8k8_3xtf32(sum, high[n], low[n], b[0], b[1]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) out[0][d][i] += sum[i];
    }
  }
};

}  // namespace fa
