// SPDX-License-Identifier: Apache-2.0
// One warp's matrix products of the backward pass for float32 tensors, by TF32 tensor cores (common/tf32.cuh); the same as
// products.cuh has for 16-bit elements. In one product (Variant::kTf32) all operands have been rounded before: tiles in shared
// memory when they came, weights and gradients of scores by pack().
#pragma once

#include "kernels/backward_sm80/product_shapes.cuh"
#include "kernels/common/tf32.cuh"

namespace fa::backward_sm80 {

template <class Config>
struct FloatProducts : ProductShapes<Config> {
  using Shapes = ProductShapes<Config>;
  using Shapes::kColumnBlocks, Shapes::kKeyBlocks, Shapes::kQueryBlocks, Shapes::kQueryColumnBlocks, Shapes::kRowBlocks;
  using typename Shapes::LayoutK, typename Shapes::LayoutQ, typename Shapes::LayoutS;
  using typename Shapes::QuerySums, typename Shapes::Scores, typename Shapes::Sums;
  using Packed = uint32_t[kKeyBlocks][kRowBlocks][4];
  // Steps of 8 columns or keys, in groups of 32: a block of a tile's rows. What lies between weights and products leaves
  // Variant::kModified no registers for steps of several groups at once, nor do the sums of long heads.
  static constexpr int kStepsOfGroup = kStepsOfShortSum, kDepthGroups = Config::kHeadDim / 32, kKeyGroups = Config::kTileK / 32;
  static constexpr int kUnroll = Config::kModified ? 1 : 8;
  // Most of the products of long rows cancels against D or the log-sum-exp. So the two small ones of three products have sums of
  // their own, and the large ones are added eight columns at a time.
  static constexpr bool kHasSmallSums = has_long_products(Config::kElementBytes, Config::kHeadDim);

  using Tf32s = Tf32Products<Config::kOneProduct ? Tf32::kOneOfRounded : Tf32::kThree>;
  using Left = typename Tf32s::template Operand<4>;
  using Right = typename Tf32s::template Operand<2>;

  static __device__ __forceinline__ void pack(Packed& packed, const Scores& scores) {
#pragma unroll
    for (int i = 0; i < kKeyBlocks * kRowBlocks * 4; ++i) {
      const uint32_t x = __float_as_uint(scores[i / (kRowBlocks * 4)][i / 4 % kRowBlocks][i % 4]);
      packed[i / (kRowBlocks * 4)][i / 4 % kRowBlocks][i % 4] = Config::kOneProduct ? round_tf32_away(x) : x;
    }
  }

  /// Tiles of keys, of rows and of gradients of scores beginning at these shared addresses.
  static __device__ __forceinline__ Lanes lanes(uint32_t keys, uint32_t rows, uint32_t d_scores) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    return {Shapes::lane_of_keys(keys),
            Shapes::lane_of_rows(rows),
            rows + right_lane<LayoutQ>(Config::column_group() * Config::kColumns),
            keys + right_lane<LayoutK>(Shapes::query_column()),
            d_scores + LayoutS::offset(2 * t, Config::first_key() / 4 + g % 2) + 4 * (g / 2),
            d_scores + LayoutS::offset(Shapes::query_row() + lane % 16, lane / 16),
            0};
  }

  /// scores = A B^T + C, A being the warp's keys or values and B the rows of queries or gradients of the output; from the lane's
  /// places (Lanes) in tiles that lie so many bytes behind. C has two numbers for each block of rows: init(n), those of the
  /// lane's rows.
  template <class Init>
  static __device__ __forceinline__ void multiply(Scores& scores, uint32_t left, int left_tile, uint32_t right, int right_tile,
                                                  const Init& init) {
    left += left_tile, right += right_tile;
    Shapes::start(scores, init);
#pragma unroll(kUnroll)
    for (int group = 0; group < kDepthGroups; ++group) {
      const uint32_t a = left + group * (LayoutK::kBytes / kDepthGroups), b = right + group * (LayoutQ::kBytes / kDepthGroups);
      if constexpr (!Tf32s::kThree) {
        add_steps<kStepsOfGroup>(scores, scores, a, b, 0);
      } else {
        constexpr int kSteps = kHasSmallSums ? 1 : kStepsOfGroup;
        Scores small = {};
#pragma unroll
        for (int first = 0; first < kStepsOfGroup; first += kSteps) {
          Scores sum = {};
          add_steps<kSteps>(sum, kHasSmallSums ? small : sum, a, b, first);
          add(scores, sum);
        }
        if constexpr (kHasSmallSums) add(scores, small);
      }
    }
  }

  /// sums += left B, B being the rows of queries or gradients of the output, a tile so many bytes behind Lanes::deep_rows. Depth
  /// place t is column 2t of the scores' accumulator and t + 4 column 2t + 1, so that no lane gives elements away.
  static __device__ __forceinline__ void accumulate(Sums& sums, const Packed& left, uint32_t right, int right_tile) {
    right += right_tile;
    constexpr int kSteps = kRowBlocks < kStepsOfGroup ? kRowBlocks : kStepsOfGroup;
#pragma unroll
    for (int first = 0; first < kRowBlocks; first += kSteps) {
      Left weights[kKeyBlocks][kSteps];
#pragma unroll
      for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
        for (int n = 0; n < kSteps; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) weights[m][n].set(i, left[m][first + n][i % 2 * 2 + i / 2]);
        }
      }
      add_products<LayoutQ>(sums, weights, right + first * (8 * LayoutQ::kBlockBytes));
    }
  }

  /// Gradients of scores to shared memory, for all warps; to Lanes::d_scores.
  static __device__ __forceinline__ void store_scores(const Packed& d_scores, uint32_t place) {
#pragma unroll
    for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < kRowBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) store_shared(LayoutS::advance(place, 8 * n + i % 2, 4 * m + i / 2 * 2), d_scores[m][n][i]);
      }
    }
  }

  /// sums += dS K over all keys of the tile; from Lanes::left_d_scores and deep_keys. Depth places t and t + 4 are keys 2t and
  /// 2t + 1 of eight.
  static __device__ __forceinline__ void accumulate_keys(QuerySums& sums, uint32_t left, uint32_t right) {
#pragma unroll(kUnroll)
    for (int group = 0; group < kKeyGroups; ++group) {
      Left gradients[kQueryBlocks][kStepsOfGroup];
#pragma unroll
      for (int m = 0; m < kQueryBlocks; ++m) {
#pragma unroll
        for (int step = 0; step < kStepsOfGroup; ++step)
          load_left(gradients[m][step], LayoutS::advance(left, 16 * m, 2 * step) + group * (LayoutS::kBytes / kKeyGroups));
      }
      add_products<LayoutK>(sums, gradients, right + group * (32 * LayoutK::kBlockBytes));
    }
  }

 private:
  static __device__ __forceinline__ void load_left(Left& left, uint32_t address) {
    uint32_t a[4];
    ldmatrix_x4(a, address);
#pragma unroll
    for (int i = 0; i < 4; ++i) left.set(i, a[i]);
  }

  /// The lane's offset in a tile of which rows are depth: row 2t, column g of those from `first_column` on.
  template <class Layout>
  static __device__ __forceinline__ uint32_t right_lane(int first_column) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    return Layout::offset(lane % 4 * 2, first_column / 4 + g / 4) + 4 * (g % 4);
  }

  static __device__ __forceinline__ void add(Scores& scores, const Scores& others) {
#pragma unroll
    for (int i = 0; i < kKeyBlocks * kRowBlocks * 4; ++i)
      scores[i / (kRowBlocks * 4)][i / 4 % kRowBlocks][i % 4] += others[i / (kRowBlocks * 4)][i / 4 % kRowBlocks][i % 4];
  }

  /// scores += A B^T over kSteps steps of a group of columns, from `first` on; the small ones of three products are added to
  /// `small`.
  template <int kSteps>
  static __device__ __forceinline__ void add_steps(Scores& scores, Scores& small, uint32_t left, uint32_t right, int first) {
#pragma unroll
    for (int step = first; step < first + kSteps; ++step) {
      Left a[kKeyBlocks];
#pragma unroll
      for (int m = 0; m < kKeyBlocks; ++m) load_left(a[m], LayoutK::advance(left, 16 * m, 2 * step));
#pragma unroll
      for (int n = 0; n < kRowBlocks; n += 2) {
        uint32_t loaded[4];
        ldmatrix_x4(loaded, LayoutQ::advance(right, 8 * n, 2 * step));
        Right b[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) b[i / 2].set(i % 2, loaded[i]);
#pragma unroll
        for (int m = 0; m < kKeyBlocks; ++m) {
          Tf32s::multiply_apart(scores[m][n], small[m][n], a[m], b[0]);
          Tf32s::multiply_apart(scores[m][n + 1], small[m][n + 1], a[m], b[1]);
        }
      }
    }
  }

  /// sums += left B over kSteps steps of 8 rows of B.
  template <class Layout, int kBlocks, int kBlocksOfColumns, int kSteps>
  static __device__ __forceinline__ void add_products(float (&sums)[kBlocks][kBlocksOfColumns][4],
                                                      const Left (&left)[kBlocks][kSteps], uint32_t right) {
#pragma unroll
    for (int d = 0; d < kBlocksOfColumns; d += 2) {
      float sum[2][kBlocks][4] = {};
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
        Right b[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) b[i / 2].set(i % 2, load_shared(Layout::advance(right, 8 * n + i % 2, 2 * (d + i / 2))));
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          Tf32s::multiply(Tf32s::kThree ? sum[0][m] : sums[m][d], left[m][n], b[0]);
          Tf32s::multiply(Tf32s::kThree ? sum[1][m] : sums[m][d + 1], left[m][n], b[1]);
        }
      }
      if constexpr (Tf32s::kThree) {
#pragma unroll
        for (int i = 0; i < 2 * kBlocks * 4; ++i)
          sums[i / 4 % kBlocks][d + i / (4 * kBlocks)][i % 4] += sum[i / (4 * kBlocks)][i / 4 % kBlocks][i % 4];
      }
    }
  }
};

}  // namespace fa::backward_sm80
