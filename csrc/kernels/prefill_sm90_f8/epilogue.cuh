// SPDX-License-Identifier: Apache-2.0
// The end of a tile in prefill_sm90_f8: 64 finished rows go from registers to device memory, in whichever type the output has.
#pragma once

#include "kernels/common/convert.cuh"
#include "kernels/prefill_sm90/epilogue.cuh"
#include "kernels/prefill_sm90_f8/shared_plan.cuh"

namespace fa::prefill_sm90_f8 {

/// Writes the thread's pairs of neighbouring columns in its two rows, `row` and the one 8 below.
template <class C, class Out>
__device__ __forceinline__ void store_rows(const AttentionParams& p, const Tile& tile, int row, const float (&o)[C::kHeadDim / 2],
                                           float factor) {
  const TensorView& out = p.out;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!prefill_sm90::is_row<C>(row + 8 * r, tile.num_rows)) continue;
    auto* to = static_cast<Out*>(out.data) + tile.batch * out.stride[0] + tile.head * out.stride[1] +
               (tile.row_base + row + 8 * r) * out.stride[2];
#pragma unroll
    for (int j = 0; j < C::kHeadDim / 8; ++j) {
      const int column = 8 * j + threadIdx.x % 4 * 2;  // NOTE: heads have a multiple of 16 columns
      if (column < out.shape[3]) store_pair(to + column, o[4 * j + 2 * r] * factor, o[4 * j + 2 * r + 1] * factor);
    }
  }
}

template <class C>
__device__ __forceinline__ void store_tile(const AttentionParams& p, const Tile& tile, int row, const float (&o)[C::kHeadDim / 2],
                                           float factor) {
  if (p.out.dtype == DType::kBFloat16) {
    store_rows<C, __nv_bfloat16>(p, tile, row, o, factor);
  } else if (p.out.dtype == DType::kFloat16) {
    store_rows<C, __half>(p, tile, row, o, factor);
  } else if (p.out.dtype == DType::kFloat32) {
    store_rows<C, float>(p, tile, row, o, factor);
  } else {
    store_rows<C, Float8>(p, tile, row, o, factor);
  }
}

}  // namespace fa::prefill_sm90_f8
