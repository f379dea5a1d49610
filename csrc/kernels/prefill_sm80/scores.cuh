// SPDX-License-Identifier: Apache-2.0
// What lies between the products and softmax on one warp's fragments: scale, softcap, bias, ALiBi, then -inf for keys a row must
// not see. A lane owns eight neighbouring keys of each group of 32 (key_in_tile), so it reads their bias in one or two 16-byte
// accesses.
#pragma once

#include "fa/attention.h"
#include "kernels/common/convert.cuh"
#include "kernels/common/exp2.cuh"
#include "kernels/common/swizzle.cuh"
#include "kernels/prefill_sm80/tile_work.cuh"
#include "semantics/score.h"

namespace fa::prefill_sm80 {

inline constexpr int kKeysPerLane = 8;  // of each group of 32

/// Offset of key 0 in row (b, h, i); the index on an axis of size 1 is 0 already.
__device__ __forceinline__ int64_t row_offset(const TensorView& view, int64_t b, int64_t h, int64_t i) {
  return b * view.stride[0] + h * view.stride[1] + i * view.stride[2];
}

/// Eight numbers from `data` on, `stride` elements apart, of which there are `count`; in the place of others -inf. NOTE: a
/// function of its own, like the next: there are sixteen places in a kernel that read rows which aren't aligned.
struct Eight {
  float value[8];
};
template <class T>
__device__ __noinline__ Eight load_eight(const T* data, int64_t stride, int count) {
  Eight eight;
#pragma unroll
  for (int i = 0; i < 8; ++i) eight.value[i] = i < count ? to_float(data[i * stride]) : -INFINITY;
  return eight;
}

/// Bit i: byte i of `count`, `stride` bytes apart, isn't 0. kCount: at most so many.
template <int kCount>
__device__ __noinline__ uint32_t load_bits(const uint8_t* data, int64_t stride, int count) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) bits |= i < count && data[i * stride] != 0 ? 1u << i : 0u;
  return bits;
}

/// Adds the biases of keys key … key + 7; those beyond the bias are -inf.
__device__ __forceinline__ void load_bias(float (&values)[8], const TensorView& bias, int64_t offset, int key, bool by_8) {
  if (by_8 && key + 8 <= bias.shape[3]) {
    if (bias.dtype == DType::kFloat32) {
      const float4* data = reinterpret_cast<const float4*>(static_cast<const float*>(bias.data) + offset + key);
      const float4 low = __ldg(data), high = __ldg(data + 1);
      values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
      values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
      return;
    }
    const uint4 data = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(bias.data) + offset + key));
    const uint32_t pairs[4] = {data.x, data.y, data.z, data.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2(pairs[i], bias.dtype == DType::kFloat16);
      values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
    }
    return;
  }
  const int count = static_cast<int>(bias.shape[3]) - key;
  const int64_t first = offset + key * bias.stride[3];
  Eight eight;
  if (bias.dtype == DType::kFloat32) {
    eight = load_eight(static_cast<const float*>(bias.data) + first, bias.stride[3], count);
  } else if (bias.dtype == DType::kFloat16) {
    eight = load_eight(static_cast<const __half*>(bias.data) + first, bias.stride[3], count);
  } else {
    eight = load_eight(static_cast<const __nv_bfloat16*>(bias.data) + first, bias.stride[3], count);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = eight.value[i];
}

/// Bit i: key + i may be attended.
__device__ __forceinline__ uint32_t load_mask(const TensorView& mask, int64_t offset, int key, bool by_8) {
  const uint8_t* data = static_cast<const uint8_t*>(mask.data) + offset;
  uint32_t bits = 0;
  if (by_8 && key + 8 <= mask.shape[3]) {
    const uint2 bytes = __ldg(reinterpret_cast<const uint2*>(data + key));
#pragma unroll
    for (int i = 0; i < 8; ++i) bits |= (((i < 4 ? bytes.x : bytes.y) >> (8 * (i % 4))) & 0xff) != 0 ? 1u << i : 0u;
    return bits;
  }
  return load_bits<8>(data + key * mask.stride[3], mask.stride[3], static_cast<int>(mask.shape[3]) - key);
}

/// Bits lo … hi - 1 of eight.
__device__ __forceinline__ uint32_t bits_between(int lo, int hi) {
  return (0xffu << min(max(lo, 0), 8)) & ~(0xffu << min(max(hi, 0), 8)) & 0xffu;
}

/// -inf for the keys of the tile at `first_key` that MaskRule hides. `warp_row` is the warp's first row in the tile of rows.
template <bool kPackHeads, int kRowBlocks, int kKeyBlocks>
__device__ __forceinline__ void hide_keys(float (&scores)[kRowBlocks][kKeyBlocks][4], const TileWork& work, const TileGrid& grid,
                                          int warp_row, int first_key) {
  const int g = (threadIdx.x % 32) / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = tile_row<kPackHeads>(work, grid, warp_row + 16 * m + g + 8 * r).row;
      const KeySpan span = work.band.seen_by_some(row, row, work.keys);
      const int begin = span.begin - first_key - kKeysPerLane * t, end = span.end - first_key - kKeysPerLane * t;
      uint32_t seen = 0;
#pragma unroll
      for (int group = 0; group < kKeyBlocks / 4; ++group)
        seen |= bits_between(begin - 32 * group, end - 32 * group) << (8 * group);
#pragma unroll
      for (int i = 0; i < 2 * kKeyBlocks; ++i) {
        if (!(seen >> i & 1)) scores[m][i / 2][2 * r + i % 2] = -INFINITY;
      }
    }
  }
}

/// 16-bit biases of a warp's rows in one key tile, as they come from memory. Fetched before the products, which hide the way.
template <int kRowBlocks, int kKeyBlocks>
struct BiasFragment {
  uint4 eight[kRowBlocks][2][kKeyBlocks / 4];
  bool fetched;
};

template <bool kPackHeads, int kRowBlocks, int kKeyBlocks>
__device__ __forceinline__ void fetch_bias(BiasFragment<kRowBlocks, kKeyBlocks>& fragment, const AttentionParams& p,
                                           const TileWork& work, const TileGrid& grid, int warp_row, int first_key) {
  const TensorView& bias = p.bias;
  fragment.fetched = grid.bias_by_8 && bias.dtype != DType::kFloat32 && first_key + 8 * kKeyBlocks <= bias.shape[3];
  if (!fragment.fetched) return;
  const int g = (threadIdx.x % 32) / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const TileRow row = tile_row<kPackHeads>(work, grid, warp_row + 16 * m + g + 8 * r);
      const int64_t offset = row.in_use ? row_offset(bias, work.sequence.batch_idx, row.head, row.row) : 0;
      const uint16_t* data = static_cast<const uint16_t*>(bias.data) + offset + first_key + kKeysPerLane * t;
#pragma unroll
      for (int group = 0; group < kKeyBlocks / 4; ++group) {
        fragment.eight[m][r][group] = __ldg(reinterpret_cast<const uint4*>(data + 32 * group));
      }
    }
  }
}

template <int kRowBlocks, int kKeyBlocks>
__device__ __forceinline__ void add_bias(float (&scores)[kRowBlocks][kKeyBlocks][4],
                                         const BiasFragment<kRowBlocks, kKeyBlocks>& fragment, bool is_half) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int group = 0; group < kKeyBlocks / 4; ++group) {
        const uint4 eight = fragment.eight[m][r][group];
        const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 pair = unpack2(pairs[i], is_half);
          scores[m][4 * group + i][2 * r] += pair.x;
          scores[m][4 * group + i][2 * r + 1] += pair.y;
        }
      }
    }
  }
}

template <int kRowBlocks, int kKeyBlocks>
__device__ __forceinline__ void scale_scores(float (&scores)[kRowBlocks][kKeyBlocks][4], const ScoreRule& rule) {
#pragma unroll
  for (int i = 0; i < kRowBlocks * kKeyBlocks * 4; ++i) {
    float& score = scores[i / (kKeyBlocks * 4)][i / 4 % kKeyBlocks][i % 4];
    score = rule.capped(score, TanhByExp2{});
  }
}

/// Row by row: the bias where it wasn't fetched, ALiBi, the user's mask.
template <bool kPackHeads, int kRowBlocks, int kKeyBlocks>
__device__ __forceinline__ void modify_rows(float (&scores)[kRowBlocks][kKeyBlocks][4], bool has_bias, const AttentionParams& p,
                                            const TileWork& work, const TileGrid& grid, int warp_row, int first_key) {
  const int g = (threadIdx.x % 32) / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const TileRow row = tile_row<kPackHeads>(work, grid, warp_row + 16 * m + g + 8 * r);
      if (!row.in_use) continue;
      const int64_t b = work.sequence.batch_idx, position = row.row + work.sequence.mask.query_offset;
      const int64_t bias_offset = has_bias ? row_offset(p.bias, b, row.head, row.row) : 0;
      const int64_t mask_offset = work.mask_by_element ? row_offset(p.mask, b, row.head, row.row) : 0;
      float slope = 0.0f;
      if (p.alibi_slopes.present) {
        const int64_t idx = work.sequence_idx * p.alibi_slopes.stride[0] + row.head * p.alibi_slopes.stride[1];
        slope = static_cast<const float*>(p.alibi_slopes.data)[idx];
      }
#pragma unroll
      for (int group = 0; group < kKeyBlocks / 4; ++group) {
        const int key = first_key + 32 * group + kKeysPerLane * t;
        float added[kKeysPerLane] = {};
        if (has_bias) load_bias(added, p.bias, bias_offset, key, grid.bias_by_8);
        const float distance = static_cast<float>(position - key);  // from the first of the eight keys
        const uint32_t seen = work.mask_by_element ? load_mask(p.mask, mask_offset, key, grid.mask_by_8) : 0xffu;
#pragma unroll
        for (int i = 0; i < kKeysPerLane; ++i) {
          float& score = scores[m][4 * group + i / 2][2 * r + i % 2];
          score += added[i];
          if (p.alibi_slopes.present) score = fmaf(-slope, fabsf(distance - static_cast<float>(i)), score);
          if (!(seen >> i & 1)) score = -INFINITY;
        }
      }
    }
  }
}

/// From products to natural scores: scale, softcap, bias, ALiBi, the user's mask.
template <bool kPackHeads, int kRowBlocks, int kKeyBlocks>
__device__ __forceinline__ void modify_scores(float (&scores)[kRowBlocks][kKeyBlocks][4],
                                              const BiasFragment<kRowBlocks, kKeyBlocks>& bias, const AttentionParams& p,
                                              const TileWork& work, const TileGrid& grid, int warp_row, int first_key) {
  // NOTE: one branch for all elements; decided for each of them, softcap would cost more than everything else.
  if (p.softcap == 0.0f) {
    scale_scores(scores, ScoreRule{p.softmax_scale, 0.0f});
  } else {
    scale_scores(scores, ScoreRule{p.softmax_scale, p.softcap});
  }
  if (bias.fetched) add_bias(scores, bias, p.bias.dtype == DType::kFloat16);
  const bool has_bias = p.bias.present && !bias.fetched;
  if (has_bias || p.alibi_slopes.present || work.mask_by_element) {
    modify_rows<kPackHeads>(scores, has_bias, p, work, grid, warp_row, first_key);
  }
}

}  // namespace fa::prefill_sm80
