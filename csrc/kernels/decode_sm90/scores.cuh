// SPDX-License-Identifier: Apache-2.0
// What lies between Q K^T and softmax in decode_sm90, on one warp's scores of a key tile: scale, softcap, bias, ALiBi, and -inf
// for keys that a row must not see. A lane holds two neighbouring keys of each eight, in two rows.
#pragma once

#include "kernels/common/convert.cuh"
#include "kernels/common/exp2.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/common/scales.h"
#include "kernels/decode_sm90/args.h"
#include "kernels/decode_sm90/traits.cuh"
#include "semantics/score.h"

namespace fa::decode_sm90 {

/// Warps that share a tile, 16 of its rows each: 1 << row_bits(args). Shifts, since a division takes a hundred clocks.
__device__ __forceinline__ int row_bits(const KernelArgs& args) { return args.tile_rows / 32; }
static_assert(kRowsPerWarp == 16 && kMostTileRows == 64, "row_bits knows 16, 32 and 64 rows.");
__device__ __forceinline__ int row_blocks(const KernelArgs& args) { return 1 << row_bits(args); }

/// One of a lane's two rows.
struct LaneRow {
  int row, head;  // in the sequence; query head
  bool in_use;    // else it is written as 0
  bool exists;
};

__device__ __forceinline__ LaneRow lane_row(const KernelArgs& args, const Item& item, int row_in_tile) {
  const int packed = item.first_row + row_in_tile, group = args.group_size.divisor;
  const int row = args.group_size.quotient(packed);
  const bool exists = row_in_tile < item.num_rows;
  return {row, item.key_head * group + packed - row * group, exists && row < item.query_length, exists};
}

/// Of a quantized cache (are_by_four): the scales of four columns.
__device__ __forceinline__ float4 four_scales(const Scales& scales, int column) {
  if (scales.stride == 0) return {scales.data[0], scales.data[0], scales.data[0], scales.data[0]};
  return *reinterpret_cast<const float4*>(scales.data + column);
}

/// Row (b, h, i) of mask or bias: the offset of its key 0.
__device__ __forceinline__ int64_t row_offset(const TensorView& view, const Item& item, const LaneRow& row) {
  return item.batch * view.stride[0] + row.head * view.stride[1] + row.row * view.stride[2];
}

/// Key of element i of a lane's scores, in its tile.
__device__ __forceinline__ int key_of(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

/// Bias and ALiBi, which are rare, and the bias of few keys small beside them: element by element, whatever strides it has.
template <class C>
__device__ __forceinline__ void modify_scores(float (&scores)[1][C::kKeyBlocks][4], const AttentionParams& p, const Item& item,
                                              const LaneRow (&rows)[2], int first_key) {
  if (p.softcap != 0.0f) {
    const ScoreRule rule{1.0f, p.softcap};
#pragma unroll
    for (int i = 0; i < 4 * C::kKeyBlocks; ++i) scores[0][i / 4][i % 4] = rule.capped(scores[0][i / 4][i % 4], TanhByExp2{});
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!rows[r].in_use) continue;
    if (p.bias.present) {
      const int64_t offset = row_offset(p.bias, item, rows[r]);
#pragma unroll
      for (int i = 0; i < 2 * C::kKeyBlocks; ++i) {
        const int key = first_key + key_of(i / 2 * 4 + i % 2);
        float& score = scores[0][i / 2][2 * r + i % 2];
        score = key < item.key_end ? score + load_float(p.bias.data, p.bias.dtype, offset + key * p.bias.stride[3]) : -INFINITY;
      }
    }
    if (p.alibi_slopes.present) {
      const int64_t idx = item.sequence * p.alibi_slopes.stride[0] + rows[r].head * p.alibi_slopes.stride[1];
      const float slope = static_cast<const float*>(p.alibi_slopes.data)[idx];
#pragma unroll
      for (int i = 0; i < 2 * C::kKeyBlocks; ++i) {
        const int key = first_key + key_of(i / 2 * 4 + i % 2);
        scores[0][i / 2][2 * r + i % 2] += alibi_bias(slope, rows[r].row + item.query_offset, key);
      }
    }
  }
}

/// Which of a lane's own keys are seen, a bit each in the order of key_of.
struct SeenKeys {
  uint32_t by_row[2];  // by each of the lane's rows
  uint32_t by_any;     // by any of the warp's rows …
  uint32_t by_some;    // … and of these those that another row in use does not see
};

/// Hides what lengths, windows and the mask hide.
template <class C>
__device__ __forceinline__ SeenKeys hide_keys(float (&scores)[1][C::kKeyBlocks][4], const AttentionParams& p, const Item& item,
                                              const LaneRow (&rows)[2], int first_key) {
  SeenKeys seen{};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int begin = item.band.first(rows[r].row, item.key_begin) - first_key;
    const int end = rows[r].in_use ? item.band.end(rows[r].row, item.key_end) - first_key : 0;
    const bool test = item.test_mask && rows[r].in_use;
    const auto* mask = static_cast<const uint8_t*>(p.mask.data) + (test ? row_offset(p.mask, item, rows[r]) : 0);
#pragma unroll
    for (int i = 0; i < 2 * C::kKeyBlocks; ++i) {
      const int key = key_of(i / 2 * 4 + i % 2);
      bool visible = key >= begin && key < end;
      if (test && visible) visible = mask[(first_key + key) * p.mask.stride[3]] != 0;
      float& score = scores[0][i / 2][2 * r + i % 2];
      if (!visible) score = -INFINITY;
      if (score != -INFINITY) seen.by_row[r] |= 1u << i;
    }
  }
  seen.by_any = seen.by_row[0] | seen.by_row[1];
  uint32_t by_all = (rows[0].in_use ? seen.by_row[0] : ~0u) & (rows[1].in_use ? seen.by_row[1] : ~0u);
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) {
    seen.by_any |= __shfl_xor_sync(kAllLanes, seen.by_any, distance);
    by_all &= __shfl_xor_sync(kAllLanes, by_all, distance);
  }
  seen.by_some = seen.by_any & ~by_all;
  return seen;
}

}  // namespace fa::decode_sm90
