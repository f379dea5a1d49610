// SPDX-License-Identifier: Apache-2.0
// The end of a tile in prefill_sm90_f32: 64 finished rows leave through the memory of their queries, by the copy engine, or row
// by row where a box would touch rows of another sequence.
#pragma once

#include "kernels/common/shared_memory.cuh"
#include "kernels/common/tma.cuh"
#include "kernels/prefill_sm90/epilogue.cuh"
#include "kernels/prefill_sm90_f32/shared_plan.cuh"

namespace fa::prefill_sm90_f32 {

/// Columns 32 panel … + 31 of the thread's two rows to shared memory.
template <class C>
__device__ __forceinline__ void stage_columns(const float (&o)[C::kHeadDim / 2], int panel, uint8_t* staged) {
  const int t = threadIdx.x % 4, staged_row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t first = shared_address(staged) + swizzled_offset(staged_row + 8 * r, t / 2) + t % 2 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = 4 * (4 * panel + i) + 2 * r;
      store_shared(swizzled_step(first, i), o[j], o[j + 1]);
    }
  }
}

/// The warpgroup's 64 rows from registers to where their queries stood, and the start of their copy to device memory.
template <class C>
__device__ __forceinline__ void store_tile(const KernelArgs& args, const Tile& tile, int warpgroup,
                                           const float (&o)[C::kHeadDim / 2], uint8_t* queries) {
  const int first_row = prefill_sm90::first_row_of<C::kFoldedWarpgroups>(tile, warpgroup);
  const bool fits = box_fits(args, tile, first_row);
  named_barrier_sync(kWarpgroupBarrier + warpgroup, kWarpgroupThreads);  // all warps have read their queries
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    uint8_t* staged = queries + panel * C::kTileM * 128;
    stage_columns<C>(o, panel, staged);
    if (!fits) {
      __syncwarp();
      prefill_sm90::store_rows<C>(args, staged, tile, first_row, panel);
    }
  }
  fence_async_proxy();
  named_barrier_sync(kWarpgroupBarrier + warpgroup, kWarpgroupThreads);
  if (threadIdx.x % kWarpgroupThreads == 0) {
    prefill_sm90::copy_out<C>(args, tile, warpgroup, queries);
    tma_store_commit();
  }
}

}  // namespace fa::prefill_sm90_f32
