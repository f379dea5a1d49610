// SPDX-License-Identifier: Apache-2.0
// Functions of the CUDA driver, found at run time, so that nothing links against libcuda and the library loads where there is no
// GPU.
#pragma once

#include <cuda_runtime_api.h>

namespace fa {

/// The driver's function of this name, as CUDA 12.0 declares it; null where the driver has none.
template <class Function>
Function find_in_driver(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(function) : nullptr;
}

}  // namespace fa
