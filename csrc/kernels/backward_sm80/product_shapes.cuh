// SPDX-License-Identifier: Apache-2.0
// What a warp's matrix products of the backward pass have in common for all element types (products.cuh, float_products.cuh):
// which part of each product the warp has, and how a lane holds it. A warp owns keys: its tile of scores is transposed,
// [keys, query rows], so that weights and gradients of scores are, as they stand in registers, the left operand of dV += P^T dO
// and dK += dS^T Q. Lane l: g = l / 4, t = l % 4.
#pragma once

#include "kernels/common/mma.cuh"
#include "kernels/common/shared_memory.cuh"
#include "kernels/common/swizzle.cuh"

namespace fa::backward_sm80 {

/// Where a lane reads and writes its parts of tiles in shared memory, of which each kind begins at a given address. They are
/// worked out once for all: that takes many instructions, which the compiler would rather repeat at each step than keep a
/// register.
struct Lanes {
  uint32_t keys, rows;               // operands of scores
  uint32_t deep_rows, deep_keys;     // right operands of sums over rows, and over keys
  uint32_t d_scores, left_d_scores;  // gradients of scores as they are stored, and as the left operand of sums over keys
  uint32_t others_scores;            // those of the other warp that has the same keys, as the left operand of sums over rows

  /// As they are, but nothing that the compiler could work out again.
  __device__ __forceinline__ Lanes kept() const {
    Lanes lanes = *this;
    asm volatile(""
                 : "+r"(lanes.keys), "+r"(lanes.rows), "+r"(lanes.deep_rows), "+r"(lanes.deep_keys), "+r"(lanes.d_scores),
                   "+r"(lanes.left_d_scores), "+r"(lanes.others_scores));
    return lanes;
  }
};

template <class Config>
struct ProductShapes {
  using LayoutK = typename Config::LayoutK;  // of keys and values
  using LayoutQ = typename Config::LayoutQ;  // of queries and gradients of the output
  using LayoutS = typename Config::LayoutS;  // of gradients of scores
  static constexpr int kKeyBlocks = Config::kKeyBlocks, kRowBlocks = Config::kRows / 8, kColumnBlocks = Config::kColumns / 8;
  using Scores = float[kKeyBlocks][kRowBlocks][4];   // (key g, row 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
  using Sums = float[kKeyBlocks][kColumnBlocks][4];  // dK or dV of the warp's keys

  // Of dQ a warp has 16 * kQueryBlocks rows and 8 * kQueryColumnBlocks columns.
  static constexpr int kQueryWarps = Config::kTileQ >= 32 ? 2 : 1, kQueryBlocks = Config::kTileQ / 16 / kQueryWarps;
  static constexpr int kQueryColumnBlocks = Config::kHeadDim / 8 / (Config::kWarps / kQueryWarps);
  using QuerySums = float[kQueryBlocks][kQueryColumnBlocks][4];
  static __device__ __forceinline__ int query_row() { return threadIdx.x / 32 % kQueryWarps * 16 * kQueryBlocks; }
  static __device__ __forceinline__ int query_column() { return threadIdx.x / 32 / kQueryWarps * 8 * kQueryColumnBlocks; }

  /// Where the lane reads operands by ldmatrix of tiles whose product scores are, at this shared address. The warp's keys: rows
  /// 0-7 and 8-15 of a chunk, then of the next. Queries: a chunk of rows 0-7 and the next, then of rows 8-15.
  static __device__ __forceinline__ uint32_t lane_of_keys(uint32_t tile) {
    return tile + LayoutK::offset(Config::first_key() + threadIdx.x % 16, threadIdx.x % 32 / 16);
  }
  static __device__ __forceinline__ uint32_t lane_of_rows(uint32_t tile) {
    return tile + LayoutQ::offset(Config::first_row() + threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8, threadIdx.x / 8 % 2);
  }

  /// scores = of_rows(n), the numbers of the lane's two rows of each block.
  template <class OfRows>
  static __device__ __forceinline__ void start(Scores& scores, const OfRows& of_rows) {
#pragma unroll
    for (int n = 0; n < kRowBlocks; ++n) {
      const float2 numbers = of_rows(n);
#pragma unroll
      for (int m = 0; m < kKeyBlocks; ++m) {
        scores[m][n][0] = scores[m][n][2] = numbers.x;
        scores[m][n][1] = scores[m][n][3] = numbers.y;
      }
    }
  }
};

}  // namespace fa::backward_sm80
