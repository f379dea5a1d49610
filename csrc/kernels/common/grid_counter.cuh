// SPDX-License-Identifier: Apache-2.0
// Counters in device memory by which blocks of one grid tell each other that their results are there. Each function is for one
// thread; a barrier before it makes the whole block's writes count as its own, and one after it lets the block read those of
// others (by __ldcg, past L1).
#pragma once

#include <cstdint>

namespace fa {

/// Counts the caller. True for the last of `parts`, whose counter is 0 again: the results of all are there.
__device__ __forceinline__ bool count_to(unsigned* counter, int parts) {
  const unsigned last = static_cast<unsigned>(parts) - 1;
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(last) : "memory");
  return before == last;
}

/// For who has been counted and was not last: waits up to `patience` clocks until the last one has been. False: it was in vain.
__device__ __forceinline__ bool wait_for_zero(const unsigned* counter, int64_t patience) {
  const int64_t start = clock64();
  unsigned count;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  } while (count != 0 && clock64() - start < patience);
  return count == 0;
}

}  // namespace fa
