// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies from global to shared memory (cp.async), sm_80 and later.
#pragma once

#include <cstdint>

namespace fa {

/// Copies 16 bytes past L1, or writes 16 zero bytes where `valid` is false (then nothing is read). Both addresses 16-byte
/// aligned.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

/// Waits until at most kPending of this thread's newest groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace fa
