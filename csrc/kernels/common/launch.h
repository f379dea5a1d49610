// SPDX-License-Identifier: Apache-2.0
// Launches on a stream, and what the CUDA runtime says of them as a Status. Used by the host side of every kernel.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "fa/attention.h"

namespace fa {

/// What a call of the CUDA runtime returned. `what`: a sentence's beginning, "The merge could not be launched". A failed call
/// also leaves its error behind for the next cudaGetLastError(), which is the host's: it is taken away.
inline Status cuda_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  return {StatusCode::kCudaError, std::string(what) + ": " + cudaGetErrorString(error) + "."};
}

#if defined(__CUDACC__)
/// Enqueues kernel(arguments…). The result is this launch's own; that of cudaGetLastError() may be from an earlier call of
/// whoever shares the process.
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 blocks, unsigned threads, size_t shared_bytes, cudaStream_t stream,
                          const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
#endif

}  // namespace fa
