// SPDX-License-Identifier: Apache-2.0
// query_bias for the kernels whose queries the copy engine brings (prefill_sm90, prefill_sm90_f32): a consumer warpgroup adds it
// to its 64 rows once for each tile, before its first product.
#pragma once

#include "kernels/common/query_bias.cuh"
#include "kernels/common/tma.cuh"
#include "kernels/common/warpgroup.cuh"

namespace fa::prefill_sm90 {

/// `queries`: the warpgroup's first row in the first of kPanels panels of 128-byte rows, under the 128-byte swizzle. `bias`: its
/// head's [head_dim]. For all threads of the warpgroup; on return its rows are there for all of them and for the tensor cores.
/// NOTE: a function of its own, since inlined it takes registers from the products, which then run one after another.
template <class T, int kPanels, int kPanelBytes>
__device__ __noinline__ void add_query_bias(uint32_t queries, const T* bias, int head_dim, int barrier) {
  const int chunk = threadIdx.x % 8, first_row = threadIdx.x % kWarpgroupThreads / 8;
#pragma unroll 1
  for (int panel = 0; panel < kPanels; ++panel) {
    const BiasChunk<T> part(bias, (panel * 128 + chunk * 16) / static_cast<int>(sizeof(T)), head_dim);
    const uint32_t first = queries + panel * kPanelBytes;
#pragma unroll
    for (int row = 0; row < 64; row += kWarpgroupThreads / 8) part.add_to(first + swizzled_offset(first_row + row, chunk));
  }
  fence_async_proxy();
  named_barrier_sync(barrier, kWarpgroupThreads);
}

/// … of the tile's head, where there is a bias.
template <class C>
__device__ __forceinline__ void add_query_bias(const uint8_t* queries, const AttentionParams& p, int head, int barrier) {
  if (!p.query_bias.present) return;
  add_query_bias<typename C::T, C::kPanels, C::kTileM * 128>(shared_address(queries), query_bias_of<typename C::T>(p, head),
                                                             static_cast<int>(p.query.shape[3]), barrier);
}

}  // namespace fa::prefill_sm90
