// SPDX-License-Identifier: Apache-2.0
// What lies between Q K^T and softmax in the modified variant of prefill_sm90: scale, softcap, bias, ALiBi and the user's mask on
// the accumulator fragment. A thread holds two neighbouring keys of each group of eight, in two rows.
#pragma once

#include "kernels/common/convert.cuh"
#include "kernels/common/exp2.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/common/tma.cuh"
#include "kernels/prefill_sm90/args.h"
#include "kernels/prefill_sm90/config.cuh"
#include "semantics/score.h"

namespace fa::prefill_sm90 {

/// Offsets of key 0 of mask or bias in the thread's two rows. Rows out of use read the last one in use.
struct RowOffsets {
  int64_t row[2];
};

__device__ __forceinline__ RowOffsets row_offsets(const TensorView& view, const Tile& tile, int row) {
  RowOffsets offsets;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t i = max(min(row + 8 * r, tile.query_length - 1), 0) + tile.row_base;
    offsets.row[r] = tile.batch * view.stride[0] + tile.head * view.stride[1] + i * view.stride[2];
  }
  return offsets;
}

__device__ __forceinline__ float alibi_slope(const AttentionParams& p, const Tile& tile) {
  return static_cast<const float*>(
      p.alibi_slopes.data)[tile.sequence * p.alibi_slopes.stride[0] + tile.head * p.alibi_slopes.stride[1]];
}

/// Calls use(i, bias) for the elements i of this thread that the bias tile from the copy engine has. `warp_row`: the first of the
/// warp's 16 rows in the tile.
template <class C, class Use>
__device__ __forceinline__ void for_staged_bias(const uint8_t* staged, int warp_row, Use use) {
  constexpr bool kHalf = __is_same(typename C::T, __half);
  const int lane = threadIdx.x % 32, row = warp_row + lane % 16;
#pragma unroll
  for (int j = 0; j < C::kTileN / 16; ++j) {
    uint32_t pairs[4];  // keys 16 j … + 7 of the thread's two rows, and + 8 … + 15
    const uint32_t offset = swizzled_offset(row, 2 * j % 8 + lane / 16);
    ldmatrix_x4(pairs, shared_address(staged) + j / 4 * C::kTileM * 128 + offset);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 bias = unpack2(pairs[i], kHalf);
      use(8 * j + 2 * i, bias.x);
      use(8 * j + 2 * i + 1, bias.y);
    }
  }
}

/// From raw products to exponents: (scale * s + bias - reference) * log2(e).
template <class C>
__device__ __forceinline__ void start_exponents(float (&s)[C::kTileN / 2], const uint8_t* staged, int warp_row, float scale,
                                                const float (&reference)[2]) {
  const float unit = scale * kLog2E, offset[2] = {-reference[0] * kLog2E, -reference[1] * kLog2E};
  for_staged_bias<C>(staged, warp_row,
                     [&](int i, float bias) { s[i] = fmaf(s[i], unit, fmaf(bias, kLog2E, offset[(i >> 1) & 1])); });
}

/// Adds the bias of the thread's keys first_key, first_key + 1, first_key + 8, … from device memory.
template <int kCount>
__device__ __forceinline__ void add_bias(float (&s)[kCount], const TensorView& bias, const RowOffsets& offsets, int first_key) {
  const int limit = static_cast<int>(bias.shape[3]) - 1;
  const int64_t stride = limit == 0 ? 0 : bias.stride[3];
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = min(first_key + 8 * j + i % 2, limit);
      s[4 * j + i] += load_float(bias.data, bias.dtype, offsets.row[i / 2] + key * stride);
    }
  }
}

template <int kCount>
__device__ __forceinline__ void apply_mask(float (&s)[kCount], const TensorView& mask, const RowOffsets& offsets, int first_key) {
  const int limit = static_cast<int>(mask.shape[3]) - 1;
  const int64_t stride = limit == 0 ? 0 : mask.stride[3];
  const auto* data = static_cast<const uint8_t*>(mask.data);
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = min(first_key + 8 * j + i % 2, limit);
      if (data[offsets.row[i / 2] + key * stride] == 0) s[4 * j + i] = -INFINITY;
    }
  }
}

/// scale → softcap → bias → ALiBi for row `row` of the sequence and the thread's keys from first_key
/// on. `staged`: the bias tile in shared memory, and `row_in_tile` the row there; null: none there.
template <class C>
__device__ __forceinline__ void modify_scores(float (&s)[C::kTileN / 2], const AttentionParams& p, const Tile& tile,
                                              const uint8_t* staged, int row_in_tile, int first_key) {
  const int row = tile.first_row + row_in_tile;
  float scale = p.softmax_scale;
  if (p.softcap != 0.0f) {
    const ScoreRule rule{p.softmax_scale, p.softcap};
#pragma unroll
    for (float& x : s) x = rule.capped(x, TanhByExp2{});
    scale = 1.0f;
  }
  if (staged != nullptr) {
    for_staged_bias<C>(staged, row_in_tile & ~15, [&](int i, float bias) { s[i] = fmaf(s[i], scale, bias); });
  } else {
#pragma unroll
    for (float& x : s) x *= scale;
    if (p.bias.present) add_bias(s, p.bias, row_offsets(p.bias, tile, row), first_key);
  }
  if (p.alibi_slopes.present) {
    const float slope = alibi_slope(p, tile);
    const float distance =
        static_cast<float>(row + tile.query_offset - first_key);  // from the thread's first key to its first row
#pragma unroll
    for (int i = 0; i < C::kTileN / 2; ++i)
      s[i] = fmaf(-slope, fabsf(distance + ((i >> 1 & 1) * 8 - (i / 4) * 8 - (i & 1))), s[i]);
  }
}

}  // namespace fa::prefill_sm90
