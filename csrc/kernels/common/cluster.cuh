// SPDX-License-Identifier: Apache-2.0
// Thread block clusters: blocks on neighbouring multiprocessors that reach each other's shared memory. Hopper and later.
#pragma once

#include <cstdint>

#include "kernels/common/mbarrier.cuh"

namespace fa {

/// The number of this block in its cluster.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

/// Counts the caller at the cluster's barrier, which all threads of the cluster must reach, by whole warps. What they wrote
/// before is visible after cluster_wait().
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }

/// The same where others need see nothing that the caller wrote.
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

/// Where block `rank` of the cluster has what this block has at `pointer`, a place in shared memory.
__device__ __forceinline__ uint32_t cluster_address(const void* pointer, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
  return address;
}

/// Writes to another block's shared memory; the bytes count on the barrier, which is in the same block. Both are
/// cluster_addresses.
__device__ __forceinline__ void store_cluster_async(uint32_t address, uint32_t x, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address), "r"(x), "r"(barrier)
               : "memory");
}

/// Starts the copy of `bytes` neighbouring bytes of this block's shared memory, of which, as of both addresses, 16 is a divisor,
/// to another block's. They count on the barrier, which is in that block; `address` and `barrier` are cluster_addresses.
__device__ __forceinline__ void bulk_copy_to_cluster(uint32_t address, const void* shared, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address),
               "r"(shared_address(shared)), "r"(bytes), "r"(barrier)
               : "memory");
}

/// Reads another block's shared memory, at a cluster_address.
__device__ __forceinline__ float4 load_cluster_float4(uint32_t address) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

__device__ __forceinline__ float2 load_cluster_float2(uint32_t address) {
  float2 x;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}

}  // namespace fa
