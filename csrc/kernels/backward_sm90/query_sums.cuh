// SPDX-License-Identifier: Apache-2.0
// What the consumers of backward_sm90 have in common, one block or two to an item: the sums of d_query in device memory, to which
// items add in turn, and small steps in shared memory.
#pragma once

#include <cstdint>

#include "kernels/backward_sm90/args.h"
#include "kernels/common/mbarrier.cuh"
#include "kernels/common/warpgroup.cuh"

namespace fa::backward_sm90 {

/// The first row of a 64-row accumulator of which the thread has elements; the other is 8 further.
__device__ __forceinline__ int first_row_of_thread() { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

/// Arrives for a warp: for what only tensor cores and lane 0 have read, or lanes that a __syncwarp() has joined. Who reads shared
/// memory itself arrives itself.
template <int kArrivals>
__device__ __forceinline__ void release(Mbarrier<kArrivals>& barrier) {
  if (threadIdx.x % 32 == 0) barrier.arrive();
}

/// Adds what others have added to a warpgroup's part. `sum` is in device memory, or where the copy engine has brought it.
template <bool kInShared, int kCount>
__device__ __forceinline__ void add_sum(float (&dq)[kCount], const float* sum) {
  const float4* const from = reinterpret_cast<const float4*>(sum) + threadIdx.x % kWarpgroupThreads;
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    const float4 x = kInShared ? from[i * kWarpgroupThreads] : __ldcg(from + i * kWarpgroupThreads);
    dq[4 * i] += x.x;
    dq[4 * i + 1] += x.y;
    dq[4 * i + 2] += x.z;
    dq[4 * i + 3] += x.w;
  }
}

/// Adds a warpgroup's part to `sum`; `first`: stores it there.
template <int kCount>
__device__ __forceinline__ void add_to_sum(const float (&dq)[kCount], float* sum, bool first) {
  sum += threadIdx.x % kWarpgroupThreads * 4;
  if (first) {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i)
      __stcg(reinterpret_cast<float4*>(sum + i * 4 * kWarpgroupThreads),
             make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]));
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i)
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sum + i * 4 * kWarpgroupThreads),
                 "f"(dq[4 * i]), "f"(dq[4 * i + 1]), "f"(dq[4 * i + 2]), "f"(dq[4 * i + 3])
                 : "memory");
}

/// Four 8x8 matrices of 16-bit elements from the accumulator layout to shared memory; lane l gives row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

/// Likewise, each transposed.
__device__ __forceinline__ void store_transposed(uint32_t shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

/// Writes zeros over rows used … kRows - 1 of a tile of keys, or of queries, by threads 0 … num_threads - 1, for the tensor cores
/// to read.
template <int kRows, int kPanels>
__device__ __forceinline__ void clear_rows(uint8_t* keys, int used, int num_threads) {
#pragma unroll 1
  for (int i = max(used, 0) * 8 + threadIdx.x; i < kRows * 8; i += num_threads) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      *reinterpret_cast<uint4*>(keys + panel * kRows * 128 + i * 16) = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace fa::backward_sm90
