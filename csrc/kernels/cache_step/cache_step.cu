// SPDX-License-Identifier: Apache-2.0
// The two kernels of a cache step and their launches. One instance for all element types: a step moves bytes, and what its few
// conversions are is decided by branches that all threads take.
#include "kernels/cache_step/finish.h"
#include "kernels/common/launch.h"
#include "kernels/common/launch_early.h"

namespace fa::cache_step {
namespace {

/// Where a launch may come early: waits for the kernels before it, and lets the next one come.
__device__ __forceinline__ void begin_kernel() {
#if __CUDA_ARCH__ >= 900
  wait_for_earlier_kernels();
  let_next_kernel_start();
#endif
}

__global__ void __launch_bounds__(kThreads, 2) store_kernel(const __grid_constant__ Args args) {
  begin_kernel();
  store(args, blockIdx.x);
}

__global__ void __launch_bounds__(kThreads, 2) finish_kernel(const __grid_constant__ Args args) {
  begin_kernel();
  finish(args, blockIdx.x);
}

cudaError_t launch_blocks(void (*kernel)(Args), unsigned blocks, const Args& args, bool early, cudaStream_t stream) {
  if (early) return launch_early(kernel, static_cast<int>(blocks), kThreads, 0, stream, args);
  return launch_kernel(kernel, dim3(blocks), kThreads, 0, stream, args);
}

}  // namespace

cudaError_t launch_store(const Args& args, bool early, cudaStream_t stream) {
  return launch_blocks(store_kernel, args.store_blocks(), args, early, stream);
}

cudaError_t launch_finish(const Args& args, bool early, cudaStream_t stream) {
  return launch_blocks(finish_kernel, args.finish_blocks(), args, early, stream);
}

}  // namespace fa::cache_step
