// SPDX-License-Identifier: Apache-2.0
// Makes the tensors' CUDA device current for a call and restores the caller's. Used by the ONNX Runtime and Python adapters,
// which may be called on a thread that works with another device.
#pragma once

#include "fa/attention.h"

#ifdef FA_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace fa::plugin {

/// Makes device number `ordinal` current and tells which one was.
inline Status exchange_cuda_device(int ordinal, int* previous) {
  const Status status = current_cuda_device(previous);  // without CUDA: says so
#ifdef FA_WITH_CUDA
  if (!status.ok() || *previous == ordinal) return status;
  if (const cudaError_t error = cudaSetDevice(ordinal); error != cudaSuccess) {
    cudaGetLastError();  // the failure is told here and must not be found again by the host
    return {StatusCode::kCudaError, std::string("cudaSetDevice failed: ") + cudaGetErrorString(error) + "."};
  }
#else
  static_cast<void>(ordinal);
#endif
  return status;
}

class CudaDeviceGuard {
 public:
  CudaDeviceGuard() = default;
  CudaDeviceGuard(const CudaDeviceGuard&) = delete;
  CudaDeviceGuard& operator=(const CudaDeviceGuard&) = delete;

  /// Makes device number `ordinal` current until this object dies.
  Status use(int ordinal) {
    int current = 0;
    const Status status = exchange_cuda_device(ordinal, &current);
#ifdef FA_WITH_CUDA
    if (status.ok() && current != ordinal) previous_ = current;
#endif
    return status;
  }

#ifdef FA_WITH_CUDA
  ~CudaDeviceGuard() {
    if (previous_ >= 0 && cudaSetDevice(previous_) != cudaSuccess) cudaGetLastError();
  }

 private:
  int previous_ = -1;  // -1: nothing to restore
#endif
};

}  // namespace fa::plugin
