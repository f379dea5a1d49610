// SPDX-License-Identifier: Apache-2.0
// Programmatic dependent launch: the blocks of a kernel come while the kernel before it in the stream still ends, and wait for it
// on the device. Saves one to two microseconds a launch. Compute capability 9.0 and later; in a kernel launched so, all threads
// that touch device memory, and in each block at least one, must call wait_for_earlier_kernels() before: then a kernel has ended
// only when those before it have, and who waits for it has waited for all. What is read earlier may be old, and is good for a
// guess at what to prefetch (fetch_likely_tiles in decode_sm90) and nothing else.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/kernel_attributes.h"

namespace fa {

/// Of the CUDA that the driver is of: 13020 is 13.2. 0: unknown.
inline int driver_version() {
  static const int version = [] {
    int found = 0;
    return cudaDriverGetVersion(&found) == cudaSuccess ? found : 0;
  }();
  return version;
}

/// kernel<<<blocks, threads, shared_bytes, stream>>>(args), early, `cluster` neighbouring blocks on multiprocessors that reach
/// each other's shared memory. While the stream is captured, only under drivers of CUDA 13 and later: which nodes of a graph may
/// stand before such a kernel depends on the driver.
template <class Args>
cudaError_t launch_early(void (*kernel)(Args), int blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                         const Args& args, int cluster = 1) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const bool always = driver_version() >= 13000;
  cudaError_t error = always ? cudaSuccess : cudaStreamIsCapturing(stream, &capture);
  if (error == cudaSuccess) error = prefer_shared_memory(kernel);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (always || capture == cudaStreamCaptureStatusNone) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& together = attributes[config.numAttrs++];
    together.id = cudaLaunchAttributeClusterDimension;
    together.val.clusterDim.x = cluster;
    together.val.clusterDim.y = together.val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, args);
}

#if defined(__CUDACC__)
/// Until all kernels before this one have ended and what they wrote is visible.
__device__ __forceinline__ void wait_for_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

/// Blocks of the next kernel, if it is launched early too, may come once all blocks of this one have said so or ended; they wait
/// for this kernel's end all the same.
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#endif

}  // namespace fa
