// SPDX-License-Identifier: Apache-2.0
// What a kernel with specialised warpgroups needs: hand registers from one role to the other, and synchronise some of the warps
// of a block by named barriers. Hopper's sm_90a. Used by prefill_sm90.
#pragma once

#include <cstdint>

namespace fa {

inline constexpr int kWarpgroupThreads = 128;

/// Gives up registers down to kCount per thread; executed by the whole warpgroup.
template <uint32_t kCount>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

/// Waits for kCount registers per thread; executed by the whole warpgroup.
template <uint32_t kCount>
__device__ __forceinline__ void acquire_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

/// Waits until num_threads threads, the callers among them, have reached barrier id (1 to 15; 0 is __syncthreads).
__device__ __forceinline__ void named_barrier_sync(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

/// Likewise; true where `condition` is for any of them.
__device__ __forceinline__ bool named_barrier_or(int id, int num_threads, bool condition) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred own, all;\n"
      "setp.ne.s32 own, %1, 0;\n"
      "bar.red.or.pred all, %2, %3, own;\n"
      "selp.s32 %0, 1, 0, all;\n"
      "}"
      : "=r"(any)
      : "r"(static_cast<int>(condition)), "r"(id), "r"(num_threads)
      : "memory");
  return any != 0;
}

/// Counts the caller at barrier id without waiting.
__device__ __forceinline__ void named_barrier_arrive(int id, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

/// Orders this thread's shared-memory writes before what the tensor cores and the copy engine read next.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace fa
