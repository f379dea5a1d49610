// SPDX-License-Identifier: Apache-2.0
// Blocks of 32 x 32 elements of 4 bytes in shared memory (32 rows of 128 bytes under the 128-byte swizzle, as the copy engine
// writes them), read and written by one warp. Used where wgmma wants an operand along its other axis: V, whose rows are keys.
#pragma once

#include <cstdint>

#include "kernels/common/shared_memory.cuh"
#include "kernels/common/tma.cuh"

namespace fa {

/// A warp's block in registers: each lane has two groups of 4 x 4 elements, a group's rows two apart.
struct Block32 {
  float4 part[2][4];

  /// Of the lane's first group: its columns are 4 column_group() … + 3 of the block; its rows, 0, 2, 4, 6 or 1, 3, 5, 7 of the
  /// eight from 8 (row_group() / 2) on, become columns 4 row_group() … + 3 of the transposed one. So a product's thread that
  /// holds two neighbouring columns of its result finds them where it expects them (wgmma_tf32.cuh). The second group's rows are
  /// 16 further. NOTE: dealt out so that eight neighbouring lanes meet eight different banks, whether they read rows or write
  /// columns.
  static __device__ __forceinline__ int column_group() { return threadIdx.x % 8; }
  static __device__ __forceinline__ int row_group() {
    const int lane = threadIdx.x % 8, turn = threadIdx.x % 32 / 8;
    return ((lane >> 2 ^ turn >> 1) & 1) << 1 | ((lane >> 1 ^ turn) & 1);
  }

  __device__ __forceinline__ void load(uint32_t block) {
    const int g = row_group();
    const uint32_t first = block + swizzled_offset(g / 2 * 8 + g % 2, column_group());
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) part[i][j] = load_shared4(swizzled_step(first, j) + (16 * i + 2 * j) * 128);
    }
  }

  /// Rows used … 31 become 0.
  __device__ __forceinline__ void clear_from(int used) {
    const int g = row_group(), first = g / 2 * 8 + g % 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (first + 16 * i + 2 * j >= used) part[i][j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
    }
  }

  /// Calls use(address, values) for each 16 bytes of the transposed block that are this lane's to write.
  template <class Use>
  __device__ __forceinline__ void transposed(uint32_t block, Use use) const {
    const uint32_t first = block + swizzled_offset(4 * column_group(), row_group());
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4(&p)[4] = part[i];
      const uint32_t row = first ^ i << 6;  // rows 16 further are chunks 4 further
      use(row, make_float4(p[0].x, p[1].x, p[2].x, p[3].x));
      use((row ^ 1 << 4) + 128, make_float4(p[0].y, p[1].y, p[2].y, p[3].y));
      use((row ^ 2 << 4) + 256, make_float4(p[0].z, p[1].z, p[2].z, p[3].z));
      use((row ^ 3 << 4) + 384, make_float4(p[0].w, p[1].w, p[2].w, p[3].w));
    }
  }
};

}  // namespace fa
