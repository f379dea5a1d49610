// SPDX-License-Identifier: Apache-2.0
// Makes the tensors' CUDA device current for a call and restores the caller's. Used by the ONNX Runtime and Python adapters,
// which may be called on a thread that works with another device.
#pragma once

#include "fa/attention.h"

#ifdef FA_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace fa::plugin {

class CudaDeviceGuard {
 public:
  CudaDeviceGuard() = default;
  CudaDeviceGuard(const CudaDeviceGuard&) = delete;
  CudaDeviceGuard& operator=(const CudaDeviceGuard&) = delete;

  /// Makes device number `ordinal` current until this object dies.
  Status use(int ordinal) {
#ifdef FA_WITH_CUDA
    int current = 0;
    if (Status status = current_cuda_device(&current); !status.ok() || current == ordinal) return status;
    if (const cudaError_t error = cudaSetDevice(ordinal); error != cudaSuccess) {
      cudaGetLastError();  // the failure is told here and must not be found again by the host
      return {StatusCode::kCudaError, std::string("cudaSetDevice failed: ") + cudaGetErrorString(error) + "."};
    }
    previous_ = current;
    return {};
#else
    return current_cuda_device(&ordinal);  // says that there is no CUDA
#endif
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
