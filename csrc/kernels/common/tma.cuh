// SPDX-License-Identifier: Apache-2.0
// The bulk tensor copy engine (TMA): tiles between device memory and 128-byte-swizzled shared memory. Hopper and later.
// Used by prefill_sm90. Coordinates are (column, row, head, batch), fastest axis first; what lies outside the tensor reads as 0
// and is not written. tensor_map.h makes the maps.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/common/mbarrier.cuh"

namespace fa {

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// Starts the copy of one box into shared memory; its bytes count on the barrier.
__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap* map, uint64_t* barrier, int column, int row, int head,
                                         int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

/// How the L2 cache treats what is copied: is_last: nobody will read it again, so that other lines are better kept; else as
/// usual.
__device__ __forceinline__ uint64_t l2_policy(bool is_last) {
  uint64_t last, usual;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(last));
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(usual));
  return is_last ? last : usual;
}

/// tma_load with a policy of l2_policy.
__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap* map, uint64_t* barrier, int column, int row, int head,
                                         int batch, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, "
      "%6}], [%2], %7;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(policy)
      : "memory");
}

/// The same by a map of panels (encode_panels_map): all columns of the rows, a panel of 64 (16 bits each) behind the other.
__device__ __forceinline__ void tma_load_panels(void* shared, const CUtensorMap* map, uint64_t* barrier, int row, int head,
                                                int batch, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %3, "
      "%5, %6}], [%2], %7;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(0), "r"(row), "r"(head), "r"(batch), "l"(policy)
      : "memory");
}

/// The L2 cache fetches a box.
__device__ __forceinline__ void tma_fetch(const CUtensorMap* map, int column, int row, int head, int batch) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(column), "r"(row),
               "r"(head), "r"(batch)
               : "memory");
}

/// The same by a map of panels.
__device__ __forceinline__ void tma_fetch_panels(const CUtensorMap* map, int row, int head, int batch) {
  asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %1, %3, %4}];" ::"l"(map), "r"(0), "r"(row),
               "r"(head), "r"(batch)
               : "memory");
}

/// The same for what others will soon read: the L2 cache gives up other lines first.
__device__ __forceinline__ void tma_load_shared_by_blocks(void* shared, const CUtensorMap* map, uint64_t* barrier, int column,
                                                          int row, int head, int batch) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, "
      "%6}], [%2], %7;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(policy)
      : "memory");
}

/// The same into this block and others of its cluster (a bit of `blocks` each), at the same place and on the same barrier of
/// each.
__device__ __forceinline__ void tma_load_multicast(void* shared, const CUtensorMap* map, uint64_t* barrier, int column, int row,
                                                   int head, int batch, uint16_t blocks) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch), "h"(blocks), "l"(policy)
      : "memory");
}

/// Starts the copy of `bytes` neighbouring bytes, of which, as of both addresses, 16 is a divisor, into shared memory.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

/// Starts the copy of one box to device memory, in the thread's current bulk group.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, const void* shared, int column, int row, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared_address(shared)), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
}

/// Starts the copy of `bytes` neighbouring bytes from shared to device memory, likewise.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
}

/// The same for float32 elements, which are added to what is there.
__device__ __forceinline__ void bulk_add(float* global, const float* shared, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

/// Orders accesses to device memory by this thread, and what it has seen of others', and those of copy engines around them.
__device__ __forceinline__ void fence_global_proxies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/// Waits until the shared memory of this thread's stores has been read and may be written again, but for the last kPending
/// groups.
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

/// Waits until this thread's stores are in device memory, but for the last kPending groups.
template <int kPending>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Where 16-byte chunk `chunk` of row `row` lies in a panel of 128-byte rows under the 128-byte swizzle (panel 1024-byte
/// aligned).
__device__ __forceinline__ uint32_t swizzled_offset(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

/// swizzled_offset(row, chunk + 2 * step) from that of an even chunk or the odd one behind it: one register serves all steps.
__device__ __forceinline__ uint32_t swizzled_step(uint32_t offset, int step) { return offset ^ step << 5; }

}  // namespace fa
