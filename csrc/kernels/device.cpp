// SPDX-License-Identifier: Apache-2.0
// query_cuda_device(): what the dispatch table must know of the current CUDA device. Links cudart statically and loads without a
// driver.
#include <cuda_runtime.h>

#include "fa/attention.h"

namespace fa {

Status query_cuda_device(DeviceInfo* device) {
  int idx = 0, major = 0, minor = 0, num_sms = 0, shared_bytes = 0;
  cudaError_t error = cudaGetDevice(&idx);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, idx);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, idx);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, idx);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, idx);
  if (error != cudaSuccess) {
    cudaGetLastError();  // a missing driver must not fail the next call
    return {StatusCode::kUnsupported, std::string("There is no usable CUDA device: ") + cudaGetErrorString(error) + "."};
  }
  *device = {DeviceType::kCuda, 10 * major + minor, num_sms, shared_bytes};
  return {};
}

}  // namespace fa
