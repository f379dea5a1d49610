// SPDX-License-Identifier: Apache-2.0
// One warp's matrix products of the backward pass for 16-bit elements, operands in shared memory as TileLayout puts them, sums in
// registers (product_shapes.cuh). float32 in float_products.cuh.
#pragma once

#include "kernels/backward_sm80/product_shapes.cuh"
#include "kernels/common/convert.cuh"

namespace fa::backward_sm80 {

template <class Config>
struct Products : ProductShapes<Config> {
  using Shapes = ProductShapes<Config>;
  using Shapes::kColumnBlocks, Shapes::kKeyBlocks, Shapes::kQueryBlocks, Shapes::kQueryColumnBlocks, Shapes::kRowBlocks;
  using typename Shapes::LayoutK, typename Shapes::LayoutQ, typename Shapes::LayoutS;
  using typename Shapes::QuerySums, typename Shapes::Scores, typename Shapes::Sums;
  using T = typename Config::T;
  using Packed = uint32_t[kKeyBlocks][kRowBlocks][2];
  static constexpr int kDepthSteps = Config::kHeadDim / 16;

  static __device__ __forceinline__ void pack(Packed& packed, const Scores& scores) {
#pragma unroll
    for (int i = 0; i < kKeyBlocks * kRowBlocks * 2; ++i) {
      const int m = i / (2 * kRowBlocks), n = i / 2 % kRowBlocks, r = i % 2;
      packed[m][n][r] = pack2<T>(scores[m][n][2 * r], scores[m][n][2 * r + 1]);
    }
  }

  /// Tiles of keys, of rows and of gradients of scores beginning at these shared addresses.
  static __device__ __forceinline__ Lanes lanes(uint32_t keys, uint32_t rows, uint32_t d_scores) {
    const int lane = threadIdx.x % 32;
    return {Shapes::lane_of_keys(keys), Shapes::lane_of_rows(rows),
            rows + transposed_lane<LayoutQ>(Config::column_group() * kColumnBlocks),
            keys + transposed_lane<LayoutK>(Shapes::query_column() / 8),
            d_scores + LayoutS::offset(Config::first_key() + lane / 4, Config::first_row() / 8) + 4 * (lane % 4),
            // gradients are transposed on the way, as keys are
            d_scores + LayoutS::offset(lane % 8 + lane / 16 * 8, Shapes::query_row() / 8 + lane / 8 % 2),
            d_scores + LayoutS::offset(Config::first_key() + lane % 16, (Config::kRows - Config::first_row()) / 8 + lane / 16)};
  }

  /// scores = A B^T + C, A being the warp's keys or values and B the rows of queries or gradients of the output; from the lane's
  /// places (Lanes) in tiles that lie so many bytes behind. C has two numbers for each block of rows: init(n), those of the
  /// lane's rows.
  template <class Init>
  static __device__ __forceinline__ void multiply(Scores& scores, uint32_t left, int left_tile, uint32_t right, int right_tile,
                                                  const Init& init) {
    Shapes::start(scores, init);
#pragma unroll
    for (int step = 0; step < kDepthSteps; ++step) {
      uint32_t a[kKeyBlocks][4];
#pragma unroll
      for (int m = 0; m < kKeyBlocks; ++m) ldmatrix_x4(a[m], LayoutK::advance(left, 16 * m, 2 * step) + left_tile);
#pragma unroll
      for (int n = 0; n < kRowBlocks; n += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, LayoutQ::advance(right, 8 * n, 2 * step) + right_tile);
#pragma unroll
        for (int m = 0; m < kKeyBlocks; ++m) {
          mma_m16n8k16<T>(scores[m][n], a[m], b[0], b[1]);
          mma_m16n8k16<T>(scores[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  /// sums += left B, B being the rows of queries or gradients of the output, a tile so many bytes behind Lanes::deep_rows.
  static __device__ __forceinline__ void accumulate(Sums& sums, const Packed& left, uint32_t right, int right_tile) {
    accumulate_rows(sums, right, right_tile, [&](int m, int n, uint32_t (&a)[4]) {
      a[0] = left[m][n][0], a[1] = left[m][n][1], a[2] = left[m][n + 1][0], a[3] = left[m][n + 1][1];
    });
  }

  /// The same, left being what the other warp that has the same keys has stored (store_scores()); from Lanes::others_scores.
  static __device__ __forceinline__ void accumulate_others(Sums& sums, uint32_t left, uint32_t right, int right_tile) {
    accumulate_rows(sums, right, right_tile,
                    [&](int m, int n, uint32_t (&a)[4]) { ldmatrix_x4(a, LayoutS::advance(left, 16 * m, n)); });
  }

  /// Weights, or gradients of scores, to shared memory, for other warps; to Lanes::d_scores.
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

  /// sums += dS K over all keys of the tile; from Lanes::left_d_scores and deep_keys.
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

 private:
  /// accumulate(), the left operand of block m of keys and blocks n and n + 1 of rows being what load(m, n, a) puts into `a`.
  template <class Load>
  static __device__ __forceinline__ void accumulate_rows(Sums& sums, uint32_t right, int right_tile, const Load& load) {
#pragma unroll
    for (int n = 0; n < kRowBlocks; n += 2) {
      uint32_t a[kKeyBlocks][4];
#pragma unroll
      for (int m = 0; m < kKeyBlocks; ++m) load(m, n, a[m]);
#pragma unroll
      for (int d = 0; d < kColumnBlocks; d += 2) {
        uint32_t b[4];
        ldmatrix_x4_transposed(b, LayoutQ::advance(right, 8 * n, d) + right_tile);
#pragma unroll
        for (int m = 0; m < kKeyBlocks; ++m) {
          mma_m16n8k16<T>(sums[m][d], a[m], b[0], b[1]);
          mma_m16n8k16<T>(sums[m][d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  /// The lane's offset for ldmatrix in a tile of which rows are depth, transposed on the way.
  template <class Layout>
  static __device__ __forceinline__ uint32_t transposed_lane(int first_chunk) {
    return Layout::offset(threadIdx.x % 16, first_chunk + threadIdx.x % 32 / 16);
  }
};

}  // namespace fa::backward_sm80
