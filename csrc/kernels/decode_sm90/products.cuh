// SPDX-License-Identifier: Apache-2.0
// One warp's two matrix products of decode_sm90: 16 rows of queries, which stay in registers, with the keys and values of a stage
// as the copy engine lays them down (panels of 64 columns, 128-byte swizzle).
#pragma once

#include "kernels/common/convert.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/common/tma.cuh"
#include "kernels/decode_sm90/scores.cuh"
#include "kernels/decode_sm90/traits.cuh"

namespace fa::decode_sm90 {

template <class C>
struct Products {
  using T = typename C::T;
  using Scores = float[1][C::kKeyBlocks][4];
  using Weights = uint32_t[1][C::kKeyBlocks][2];
  using Out = float[1][C::kDimBlocks][4];
  static constexpr int kSteps = C::kHeadDim / 16;   // of the sum over columns
  static constexpr int kPairs = C::kKeyBlocks / 2;  // of key blocks, which one ldmatrix brings
  static constexpr int kTogether = 4;               // of these in flight, since each takes as long as several products
  using Queries = uint32_t[kSteps][4];

  /// The lane's elements of the warp's queries; 0 for rows and columns that do not exist. `row`: the lane's two rows, null for
  /// none.
  static __device__ __forceinline__ void load_queries(Queries& queries, const T* const (&row)[2], int head_dim) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 16 * step + i / 2 * 8 + 2 * t;
        const bool exists = row[i % 2] != nullptr && column < head_dim;
        queries[step][i] = exists ? *reinterpret_cast<const uint32_t*>(row[i % 2] + column) : 0;
      }
    }
  }

  /// Where the lane's part of the first ldmatrix lies, in the keys' panels and in those of the values.
  static __device__ __forceinline__ uint32_t key_lane() {
    const int lane = threadIdx.x % 32;
    return swizzled_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  }
  static __device__ __forceinline__ uint32_t value_lane() {
    const int lane = threadIdx.x % 32;
    return swizzled_offset(lane / 8 % 2 * 8 + lane % 8, lane / 16);
  }

  /// scores = Q K^T. `keys`: the stage's shared address + key_lane().
  static __device__ __forceinline__ void multiply_keys(Scores& scores, const Queries& queries, uint32_t keys,
                                                       const TileLayout& layout) {
#pragma unroll
    for (int i = 0; i < C::kKeyBlocks * 4; ++i) scores[0][i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int first = 0; first < kSteps * kPairs; first += kTogether) {
      uint32_t b[kTogether][4];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int step = (first + i) / kPairs, pair = (first + i) % kPairs;
        ldmatrix_x4(b[i], swizzled_step(keys, step % 4) + step / 4 * layout.panel + pair * layout.half);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int step = (first + i) / kPairs, pair = (first + i) % kPairs;
        mma_m16n8k16<T>(scores[0][2 * pair], queries[step], b[i][0], b[i][1]);
        mma_m16n8k16<T>(scores[0][2 * pair + 1], queries[step], b[i][2], b[i][3]);
      }
    }
  }

  /// out += P V. `values`: the address of the stage's values + value_lane().
  static __device__ __forceinline__ void multiply_values(Out& out, const Weights& weights, uint32_t values,
                                                         const TileLayout& layout) {
    for_values(values, layout, [&](int k, int d, const uint32_t (&b)[4]) { multiply(out, weights, k, d, b); });
  }

  /// The same where some rows don't see some keys. A weight of 0 keeps a value out of a sum only if that is finite: values that
  /// no row sees are taken as 0; if one that some rows see and others don't is not finite, each row is multiplied alone.
  static __device__ __forceinline__ void multiply_seen_values(Out& out, const Weights& weights, uint32_t values,
                                                              const TileLayout& layout, const SeenKeys& seen) {
    if (__any_sync(kAllLanes, seen.by_some != 0)) {
      bool found = false;
      for_values(values, layout, [&](int k, int, const uint32_t (&b)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) found |= has_nonfinite(b[i] & halves(seen.by_some, k, i));
      });
      if (__builtin_expect(__any_sync(kAllLanes, found), 0)) {
        Out copy;  // NOTE: only this copy need have an address
        copy_out(copy, out);
        multiply_by_row(copy, weights, values, layout, seen.by_row[0], seen.by_row[1]);
        copy_out(out, copy);
        return;
      }
    }
    for_values(values, layout, [&](int k, int d, uint32_t (&b)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] &= halves(seen.by_any, k, i);
      multiply(out, weights, k, d, b);
    });
  }

 private:
  /// Calls use(k, d, b) for each 16 keys (k) and 16 columns (d, in blocks of 8): b are the operands of two instructions.
  template <class Use>
  static __device__ __forceinline__ void for_values(uint32_t values, const TileLayout& layout, Use use) {
#pragma unroll
    for (int k = 0; k < C::kTileN / 16; ++k) {
#pragma unroll
      for (int panel = 0; panel < C::kPanels; ++panel) {
        uint32_t b[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          ldmatrix_x4_transposed(b[i], swizzled_step(values, i) + panel * layout.panel + k * layout.half);
#pragma unroll
        for (int i = 0; i < 4; ++i) use(k, 8 * panel + 2 * i, b[i]);
      }
    }
  }

  static __device__ __forceinline__ void multiply(Out& out, const Weights& weights, int k, int d, const uint32_t (&b)[4]) {
    const uint32_t a[4] = {weights[0][2 * k][0], weights[0][2 * k][1], weights[0][2 * k + 1][0], weights[0][2 * k + 1][1]};
    mma_m16n8k16<T>(out[0][d], a, b[0], b[1]);
    mma_m16n8k16<T>(out[0][d + 1], a, b[2], b[3]);
  }

  static __device__ __forceinline__ void copy_out(Out& to, const Out& from) {
#pragma unroll
    for (int i = 0; i < C::kDimBlocks * 4; ++i) to[0][i / 4][i % 4] = from[0][i / 4][i % 4];
  }

  /// One row after the other, with the values of the keys that it sees.
  static __device__ __noinline__ void multiply_by_row(Out& out, const Weights& weights, uint32_t values, TileLayout layout,
                                                      uint32_t seen_by_first, uint32_t seen_by_second) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int row = 0; row < kRowsPerWarp; ++row) {
      const int r = row / 8, owner = row % 8 * 4 + lane % 4;
      const uint32_t seen = __shfl_sync(kAllLanes, r == 0 ? seen_by_first : seen_by_second, owner);
      Out own = {};
      for_values(values, layout, [&](int k, int d, uint32_t (&b)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) b[i] &= halves(seen, k, i);
        multiply(own, weights, k, d, b);
      });
      if (lane / 4 != row % 8) continue;
#pragma unroll
      for (int d = 0; d < C::kDimBlocks; ++d) {
        out[0][d][0] += r == 0 ? own[0][d][0] : 0.0f;
        out[0][d][1] += r == 0 ? own[0][d][1] : 0.0f;
        out[0][d][2] += r == 1 ? own[0][d][2] : 0.0f;
        out[0][d][3] += r == 1 ? own[0][d][3] : 0.0f;
      }
    }
  }

  /// Is one of the two elements infinite or NaN?
  static __device__ __forceinline__ bool has_nonfinite(uint32_t pair) {
    constexpr uint32_t kExponent = __is_same(T, __half) ? 0x7c00 : 0x7f80;
    return (pair & kExponent) == kExponent || (pair >> 16 & kExponent) == kExponent;
  }

  /// Of operand i of the 16 keys k: all ones in each half whose key has a bit in `seen`.
  static __device__ __forceinline__ uint32_t halves(uint32_t seen, int k, int i) {
    const uint32_t bits = seen >> (4 * k + i % 2 * 2);
    return (bits & 1) * 0xffffu | (bits >> 1 & 1) * 0xffff0000u;
  }
};

}  // namespace fa::decode_sm90
