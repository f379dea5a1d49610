// SPDX-License-Identifier: Apache-2.0
// One warp's two matrix products: scores = Q K^T and out += P V, operands in shared memory as TileLayout puts them, scores and
// out in registers. 16-bit elements here; float32 in float_products.cuh.
#pragma once

#include "kernels/common/convert.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/common/swizzle.cuh"
#include "kernels/prefill_sm80/float_products.cuh"

namespace fa::prefill_sm80 {

template <class Config>
struct Products {
  using T = typename Config::T;
  using LayoutQ = typename Config::LayoutQ;
  using LayoutKv = typename Config::LayoutKv;
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr int kRowBlocks = Config::kRowBlocks, kKeyBlocks = Config::kTileKv / 8, kDimBlocks = Config::kColumns / 8;
  static constexpr int kDepthSteps = Config::kHeadDim * sizeof(T) / 32;  // of two chunks each
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
    const int first_chunk = Config::column_group() * (Config::kColumns * sizeof(T) / 16);
    return LayoutKv::offset(key_in_tile((lane / 8) % 2, (lane % 8) / 2, lane % 2), first_chunk + lane / 16);
  }

  static __device__ __forceinline__ void load_query(QueryFragment& a, uint32_t query, int step) {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) ldmatrix_x4(a[m], LayoutQ::advance(query, 16 * m, 2 * step));
  }

  /// One depth step of scores += Q K^T. `a` is the query's fragment of that step.
  static __device__ __forceinline__ void score_step(Scores& scores, const QueryFragment& a, uint32_t key, int step) {
#pragma unroll
    for (int n = 0; n < kKeyBlocks; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, LayoutKv::advance(key, key_in_tile(n, 0, 0), 2 * step));
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        mma_m16n8k16<T>(scores[m][n], a[m], b[0], b[1]);
        mma_m16n8k16<T>(scores[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }

  /// scores = Q K^T. `query` and `key` are this lane's addresses; `held` the query's fragments where they stay in registers.
  template <class Held>
  static __device__ __forceinline__ void scores_of(Scores& scores, const Held& held, uint32_t query, uint32_t key) {
    clear(scores);
    if constexpr (kFloat) {
      FloatProducts<Config>::add_scores(scores, query, key);
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
      FloatProducts<Config>::accumulate(out, p, value);
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
};

}  // namespace fa::prefill_sm80
