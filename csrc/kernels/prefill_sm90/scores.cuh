// SPDX-License-Identifier: Apache-2.0
// What lies between Q K^T and softmax in the modified variant of prefill_sm90: scale, softcap, bias, ALiBi and the user's mask on
// the accumulator fragment. A thread holds two neighbouring keys of each group of eight, in two rows.
#pragma once

#include "kernels/common/convert.cuh"
#include "kernels/common/exp2.cuh"
#include "kernels/common/mask_span.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/common/tma.cuh"
#include "kernels/prefill_sm90/args.h"
#include "semantics/score.h"

namespace fa::prefill_sm90 {

/// Of the thread's two rows in its sequence the first; the other is 8 below.
template <class C>
__device__ __forceinline__ int thread_row(const Tile& tile, int warpgroup) {
  const int in_warpgroup = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  // NOTE: added up in this order, or short tiles lack a register for their products.
  if constexpr (C::kFoldedWarpgroups == 1) return tile.first_row + (warpgroup * 64 + in_warpgroup);
  return first_row_of<C::kFoldedWarpgroups>(tile, warpgroup) + in_warpgroup;
}

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
  const uint32_t first = shared_address(staged) + swizzled_offset(row, lane / 16);
#pragma unroll
  for (int j = 0; j < C::kTileN / 16; ++j) {
    uint32_t pairs[4];  // keys 16 j … + 7 of the thread's two rows, and + 8 … + 15
    ldmatrix_x4(pairs, swizzled_step(first, j % 4) + j / 4 * C::kTileM * 128);
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

/// Are the thread's pairs of neighbouring keys aligned float32 pairs, all of them within the bias?
__device__ __forceinline__ bool has_float_pairs(const TensorView& bias, const RowOffsets& offsets, int end_key) {
  const uint64_t all = reinterpret_cast<uint64_t>(bias.data) / 4 | offsets.row[0] | offsets.row[1];
  return bias.dtype == DType::kFloat32 && bias.stride[3] == 1 && all % 2 == 0 && end_key <= bias.shape[3];
}

/// Adds the bias of the thread's keys first_key, first_key + 1, first_key + 8, … from device memory. kPairs: two at a time, where
/// float32 can be read so.
template <bool kPairs, int kCount>
__device__ __forceinline__ void add_bias(float (&s)[kCount], const TensorView& bias, const RowOffsets& offsets, int first_key) {
  if (kPairs && has_float_pairs(bias, offsets, first_key + 2 * kCount)) {
    const float* rows[2] = {static_cast<const float*>(bias.data) + offsets.row[0] + first_key,
                            static_cast<const float*>(bias.data) + offsets.row[1] + first_key};
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const float2 pair = *reinterpret_cast<const float2*>(rows[i / 2 % 2] + i / 4 * 8);
      s[i] += pair.x;
      s[i + 1] += pair.y;
    }
    return;
  }
  const FloatReader reader(bias.dtype);
  const int limit = static_cast<int>(bias.shape[3]) - 1;
  const int64_t stride = limit == 0 ? 0 : reader.bytes(bias.stride[3]);
  const uint8_t* rows[2] = {static_cast<const uint8_t*>(bias.data) + reader.bytes(offsets.row[0]),
                            static_cast<const uint8_t*>(bias.data) + reader.bytes(offsets.row[1])};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int key = min(first_key + i / 4 * 8 + i % 2, limit);
    s[i] += reader.read(rows[i / 2 % 2] + key * stride);
  }
}

/// A 16-bit bias for the scores of one key tile, read by threads. kTileN = 0: there is none.
template <class T, int kTileN>
struct FetchedBias {
  uint32_t pairs[kTileN / 4];  // of two neighbouring keys, in the order of the accumulator
  bool there;

  /// The loads are under way when this returns. `first_key`: the thread's first; keys beyond the bias, which no row sees, repeat
  /// the last one.
  __device__ __forceinline__ void fetch(const TensorView& bias, const RowOffsets& offsets, int first_key) {
    const int limit = static_cast<int>(bias.shape[3]) - 1;
    const int64_t stride = limit == 0 ? 0 : bias.stride[3];
    const auto* data = static_cast<const uint16_t*>(bias.data);
#pragma unroll
    for (int i = 0; i < kTileN / 4; ++i) {
      const uint16_t* row = data + offsets.row[i % 2];
      const int key = first_key + i / 2 * 8;
      pairs[i] = __ldg(row + min(key, limit) * stride) | static_cast<uint32_t>(__ldg(row + min(key + 1, limit) * stride)) << 16;
    }
  }

  /// s = scale * s + bias
  __device__ __forceinline__ void add(float (&s)[kTileN / 2], float scale) const {
#pragma unroll
    for (int i = 0; i < kTileN / 4; ++i) {
      const float2 bias = unpack2(pairs[i], __is_same(T, __half));
      s[2 * i] = fmaf(s[2 * i], scale, bias.x);
      s[2 * i + 1] = fmaf(s[2 * i + 1], scale, bias.y);
    }
  }
};

template <class T>
struct FetchedBias<T, 0> {
  static constexpr bool there = false;
  template <int kCount>
  __device__ __forceinline__ void add(float (&)[kCount], float) const {}
};

/// Which keys of a tile a row sees, a bit each.
template <int kTileN>
struct KeyBits {
  static_assert(kTileN % 32 == 0);
  static constexpr int kWords = kTileN / 32;
  uint32_t word[kWords];

  __device__ __forceinline__ void operator&=(const KeyBits& other) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] &= other.word[i];
  }
};

/// As many ones as `count` says, 0 … 32, from the lowest bit on; below and above as at 0 and 32.
__device__ __forceinline__ uint32_t ones(int count) {
  uint32_t bits;
  asm("bmsk.clamp.b32 %0, 0, %1;" : "=r"(bits) : "r"(max(count, 0)));
  return bits;
}

/// Keys begin … end - 1 of a tile, counted from its first key.
template <int kTileN>
__device__ __forceinline__ KeyBits<kTileN> key_span(int begin, int end) {
  KeyBits<kTileN> span;
#pragma unroll
  for (int i = 0; i < span.kWords; ++i) span.word[i] = ones(end - 32 * i) & ~ones(begin - 32 * i);
  return span;
}

/// Are the rows of a mask 16-byte aligned throughout?
__device__ __forceinline__ bool mask_is_aligned(const TensorView& mask) {
  const uint64_t all = reinterpret_cast<uint64_t>(mask.data) | mask.stride[0] | mask.stride[1] | mask.stride[2];
  return mask.stride[3] == 1 && all % 16 == 0;
}

/// What the user's mask leaves of a tile's keys, in a row whose key 0 is at `offset`. The four lanes that share the row read 16
/// bytes each and exchange the bits, or where those are not aligned or not all there, each only what it needs itself.
template <int kTileN>
__device__ __forceinline__ KeyBits<kTileN> mask_bits(const TensorView& mask, int64_t offset, int first_key) {
  const auto* data = static_cast<const uint8_t*>(mask.data) + offset;
  const int lane = threadIdx.x % 4, num_keys = static_cast<int>(mask.shape[3]);
  KeyBits<kTileN> seen = {};
  if (mask_is_aligned(mask) && first_key + kTileN <= num_keys) {
#pragma unroll
    for (int i = 0; i < seen.kWords; ++i) {
      if (i % 2 != lane / 2) continue;  // lanes 0 and 1 read the even words, 2 and 3 the odd ones
      const uint32_t bits = bits_of_bytes(*reinterpret_cast<const uint4*>(data + first_key + 32 * i + lane % 2 * 16));
      seen.word[i] = bits << lane % 2 * 16;
    }
#pragma unroll
    for (uint32_t& word : seen.word) {
      word |= __shfl_xor_sync(kAllLanes, word, 1);
      word |= __shfl_xor_sync(kAllLanes, word, 2);
    }
  } else {
    const int64_t stride = num_keys == 1 ? 0 : mask.stride[3];
#pragma unroll
    for (int i = 0; i < seen.kWords; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int bit = j / 2 * 8 + lane * 2 + j % 2, key = min(first_key + 32 * i + bit, num_keys - 1);
        seen.word[i] |= (data[key * stride] != 0 ? 1u : 0u) << bit;
      }
    }
  }
  return seen;
}

/// What a mask that is the same for all rows leaves of a tile's keys, in any row. For a whole warp, whose lanes read neighbours.
template <int kTileN>
__device__ __forceinline__ KeyBits<kTileN> common_mask_bits(const TensorView& mask, const Tile& tile, int first_key) {
  const auto* data = static_cast<const uint8_t*>(mask.data) + tile.batch * mask.stride[0] + tile.head * mask.stride[1];
  KeyBits<kTileN> seen;
#pragma unroll
  for (int i = 0; i < seen.kWords; ++i) {
    const int key = first_key + 32 * i + threadIdx.x % 32;
    seen.word[i] = __ballot_sync(kAllLanes, key < mask.shape[3] && data[key * mask.stride[3]] != 0);
  }
  return seen;
}

/// Scores that the thread's rows, `row` and the one 8 below, don't see become -inf. `first_key`: of the key tile. One bit a key,
/// since a test of a bit is one instruction.
template <class C>
__device__ __forceinline__ void hide_keys(float (&s)[C::kTileN / 2], const AttentionParams& p, const Tile& tile, int row,
                                          int first_key) {
  KeyBits<C::kTileN> visible[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    visible[r] = key_span<C::kTileN>(tile.band.first(row + 8 * r, tile.key_begin) - first_key,
                                     tile.band.end(row + 8 * r, tile.key_end) - first_key);
  }
  if (!C::kStagedOnly && tile.test_mask) {
    if constexpr (!C::kVotesOnMasks) {
      const RowOffsets offsets = row_offsets(p.mask, tile, row);
      const KeyBits<C::kTileN> first = mask_bits<C::kTileN>(p.mask, offsets.row[0], first_key);
      visible[0] &= first;
      visible[1] &=
          C::kModified ? mask_bits<C::kTileN>(p.mask, offsets.row[1], first_key) : first;  // NOTE: elsewhere rows are alike
    } else {
      const KeyBits<C::kTileN> common = common_mask_bits<C::kTileN>(p.mask, tile, first_key);
      visible[0] &= common;
      visible[1] &= common;
    }
  }
#pragma unroll
  for (int i = 0; i < C::kTileN / 2; ++i) {  // of every eight keys the thread has two neighbours
    const uint32_t own = visible[i / 2 % 2].word[i / 16] >> threadIdx.x % 4 * 2;
    if ((own >> (i / 4 % 4 * 8 + i % 2) & 1) == 0) s[i] = -INFINITY;
  }
}

/// As hide_keys, where all rows see the first `num_keys` of a tile's kKeys keys.
template <int kKeys>
__device__ __forceinline__ void hide_from(float (&s)[kKeys / 2], int num_keys) {
  const int end = num_keys - threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) {
    if (i / 4 * 8 + i % 2 >= end) s[i] = -INFINITY;
  }
}

/// scale → softcap → bias → ALiBi for row `row` of the sequence and the thread's keys from first_key
/// on. `staged`: the bias tile in shared memory, and `row_in_tile` the row there; null: none there.
/// `fetched`: the bias where threads have read it.
template <class C, class Fetched = FetchedBias<typename C::T, 0>>
__device__ __forceinline__ void modify_scores(float (&s)[C::kTileN / 2], const AttentionParams& p, float scale, const Tile& tile,
                                              const uint8_t* staged, int row_in_tile, int first_key,
                                              const Fetched& fetched = {}) {
  const int row = tile.first_row + row_in_tile;
  if (p.softcap != 0.0f) {
    const ScoreRule rule{scale, p.softcap};
#pragma unroll
    for (float& x : s) x = rule.capped(x, TanhByExp2{});
    scale = 1.0f;
  }
  if (staged != nullptr) {
    for_staged_bias<C>(staged, row_in_tile & ~15, [&](int i, float bias) { s[i] = fmaf(s[i], scale, bias); });
  } else if (fetched.there) {
    fetched.add(s, scale);
  } else {
#pragma unroll
    for (float& x : s) x *= scale;
    if (!C::kStagedOnly && p.bias.present) {
      add_bias<sizeof(typename C::T) == 4>(s, p.bias, row_offsets(p.bias, tile, row), first_key);
    }
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
