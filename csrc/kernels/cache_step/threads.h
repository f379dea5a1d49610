// SPDX-License-Identifier: Apache-2.0
// A thread's place in its warp and block, and what they do together. Compiled for the host a block is one thread, which does the
// work of all: so the kernels' code runs on a CPU, too.
#pragma once

#include "kernels/cache_step/args.h"

namespace fa::cache_step {

#if defined(__CUDA_ARCH__)
#define FA_PRAGMA(text) _Pragma(#text)
#define FA_UNROLL(count) FA_PRAGMA(unroll count)
inline constexpr int kLanes = 32, kWarpsOfBlock = kWarps, kThreadsOfBlock = kThreads;
FA_HD int lane_idx() { return static_cast<int>(threadIdx.x) % 32; }
FA_HD int warp_idx() { return static_cast<int>(threadIdx.x) / 32; }
FA_HD int thread_idx() { return static_cast<int>(threadIdx.x); }
FA_HD void sync_block() { __syncthreads(); }

FA_HD float warp_sum(float x) {
  FA_UNROLL(5)
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

/// The sum of x of this thread and all before it, and of all threads.
FA_HD int64_t block_scan(int64_t x, int64_t* total) {
  __shared__ int64_t values[kThreads];
  values[threadIdx.x] = x;
  __syncthreads();
  int64_t sum = 0, own = 0;
  for (int i = 0; i < kThreads; ++i) {
    sum += values[i];
    if (i == static_cast<int>(threadIdx.x)) own = sum;
  }
  __syncthreads();
  *total = sum;
  return own;
}
#else
#define FA_UNROLL(count)
inline constexpr int kLanes = 1, kWarpsOfBlock = 1, kThreadsOfBlock = 1;
FA_HD int lane_idx() { return 0; }
FA_HD int warp_idx() { return 0; }
FA_HD int thread_idx() { return 0; }
FA_HD void sync_block() {}
FA_HD float warp_sum(float x) { return x; }
FA_HD int64_t block_scan(int64_t x, int64_t* total) { return *total = x; }
#endif

/// Called from many places, and so not a copy for each.
#if defined(__CUDACC__)
#define FA_SHARED_CODE static __host__ __device__ __noinline__
#else
#define FA_SHARED_CODE static __attribute__((noinline))
#endif
FA_SHARED_CODE CacheStep step_of(const Args& a, int64_t sequence_idx) { return a.rule.at(sequence_idx); }

}  // namespace fa::cache_step
