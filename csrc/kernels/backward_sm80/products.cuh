// SPDX-License-Identifier: Apache-2.0
// One warp's matrix products of the backward pass, operands in shared memory as TileLayout puts them, sums in registers. A
// warp owns keys: its tile of scores is transposed, [keys, query rows], so that weights and gradients of scores are, as they
// stand in registers, the left operand of dV += P^T dO and dK += dS^T Q.
#pragma once

#include "kernels/common/convert.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/common/shared_memory.cuh"
#include "kernels/common/swizzle.cuh"

namespace fa::backward_sm80 {

template <class Config>
struct Products {
  using T = typename Config::T;
  using LayoutK = typename Config::LayoutK;
  using LayoutQ = typename Config::LayoutQ;
  using LayoutS = typename Config::LayoutS;
  static constexpr int kKeyBlocks = Config::kKeyBlocks, kRowBlocks = Config::kTileQ / 8, kColumnBlocks = Config::kColumns / 8;
  static constexpr int kDepthSteps = Config::kHeadDim / 16;
  using Scores = float[kKeyBlocks][kRowBlocks][4];  // (key g, row 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
  using Packed = uint32_t[kKeyBlocks][kRowBlocks][2];
  using Sums = float[kKeyBlocks][kColumnBlocks][4];  // dK or dV of the warp's keys

  // Of dQ a warp has 16 * kQueryBlocks rows and 8 * kQueryColumnBlocks columns.
  static constexpr int kQueryWarps = 2, kQueryBlocks = Config::kTileQ / 16 / kQueryWarps;
  static constexpr int kQueryColumnBlocks = Config::kHeadDim / 8 / (Config::kWarps / kQueryWarps);
  using QuerySums = float[kQueryBlocks][kQueryColumnBlocks][4];

  /// Lanes' offsets for ldmatrix. Keys or values as left operand: rows 0-7 and 8-15 of a chunk, then of the next.
  static __device__ __forceinline__ uint32_t left_lane(int first_row) {
    return LayoutK::offset(first_row + threadIdx.x % 16, threadIdx.x % 32 / 16);
  }
  /// Rows of queries, or of gradients of the output, as columns of the right operand.
  static __device__ __forceinline__ uint32_t right_lane() {
    return LayoutQ::offset(threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8, threadIdx.x / 8 % 2);
  }
  /// … as rows of the right operand, transposed on the way; of keys alike.
  template <class Layout>
  static __device__ __forceinline__ uint32_t transposed_lane(int first_chunk) {
    return Layout::offset(threadIdx.x % 16, first_chunk + threadIdx.x % 32 / 16);
  }
  /// Gradients of scores as left operand, transposed on the way.
  static __device__ __forceinline__ uint32_t scores_lane(int first_chunk) {
    return LayoutS::offset(threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8, first_chunk + threadIdx.x / 8 % 2);
  }

  /// scores = A B^T + C, A being the warp's keys or values and B the rows of queries or gradients of the output. C has two
  /// numbers for each block of rows: init(n), those of the lane's rows.
  template <class Init>
  static __device__ __forceinline__ void multiply(Scores& scores, uint32_t left, uint32_t right, const Init& init) {
#pragma unroll
    for (int n = 0; n < kRowBlocks; ++n) {
      const float2 of_rows = init(n);
#pragma unroll
      for (int m = 0; m < kKeyBlocks; ++m) {
        scores[m][n][0] = scores[m][n][2] = of_rows.x;
        scores[m][n][1] = scores[m][n][3] = of_rows.y;
      }
    }
#pragma unroll
    for (int step = 0; step < kDepthSteps; ++step) {
      uint32_t a[kKeyBlocks][4];
#pragma unroll
      for (int m = 0; m < kKeyBlocks; ++m) ldmatrix_x4(a[m], LayoutK::advance(left, 16 * m, 2 * step));
#pragma unroll
      for (int n = 0; n < kRowBlocks; n += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, LayoutQ::advance(right, 8 * n, 2 * step));
#pragma unroll
        for (int m = 0; m < kKeyBlocks; ++m) {
          mma_m16n8k16<T>(scores[m][n], a[m], b[0], b[1]);
          mma_m16n8k16<T>(scores[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  /// sums += left B, B being the rows of queries or gradients of the output; `right`: transposed_lane.
  static __device__ __forceinline__ void accumulate(Sums& sums, const Packed& left, uint32_t right) {
#pragma unroll
    for (int n = 0; n < kRowBlocks; n += 2) {
#pragma unroll
      for (int d = 0; d < kColumnBlocks; d += 2) {
        uint32_t b[4];
        ldmatrix_x4_transposed(b, LayoutQ::advance(right, 8 * n, d));
#pragma unroll
        for (int m = 0; m < kKeyBlocks; ++m) {
          const uint32_t a[4] = {left[m][n][0], left[m][n][1], left[m][n + 1][0], left[m][n + 1][1]};
          mma_m16n8k16<T>(sums[m][d], a, b[0], b[1]);
          mma_m16n8k16<T>(sums[m][d + 1], a, b[2], b[3]);
        }
      }
    }
  }

  /// Gradients of scores to shared memory, for all warps. `place`: of the warp's first key.
  static __device__ __forceinline__ void store_scores(const Packed& d_scores, uint32_t place) {
#pragma unroll
    for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < kRowBlocks; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) store_shared(LayoutS::advance(place, 16 * m + 8 * r, n), d_scores[m][n][r]);
      }
    }
  }
  static __device__ __forceinline__ uint32_t store_lane(int first_key) {
    return LayoutS::offset(first_key + threadIdx.x % 32 / 4, 0) + 4 * (threadIdx.x % 4);
  }

  /// sums += dS K over all keys of the tile.
  static __device__ __forceinline__ void accumulate_keys(QuerySums& sums, uint32_t left, uint32_t right) {
#pragma unroll
    for (int step = 0; step < Config::kTileK / 16; ++step) {
      uint32_t a[kQueryBlocks][4];
#pragma unroll
      for (int m = 0; m < kQueryBlocks; ++m) ldmatrix_x4_transposed(a[m], LayoutS::advance(left, 16 * step, 2 * m));
#pragma unroll
      for (int d = 0; d < kQueryColumnBlocks; d += 2) {
        uint32_t b[4];
        ldmatrix_x4_transposed(b, LayoutK::advance(right, 16 * step, d));
#pragma unroll
        for (int m = 0; m < kQueryBlocks; ++m) {
          mma_m16n8k16<T>(sums[m][d], a[m], b[0], b[1]);
          mma_m16n8k16<T>(sums[m][d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
};

}  // namespace fa::backward_sm80
