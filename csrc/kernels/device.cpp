// SPDX-License-Identifier: Apache-2.0
// query_cuda_device(): what a plan must know of a CUDA device. Links cudart statically and loads without a driver.
#include <cuda_runtime.h>

#include <mutex>
#include <vector>

#include "fa/attention.h"

namespace fa {
namespace {

Status unusable(cudaError_t error) {
  cudaGetLastError();  // a missing driver must not fail the next call
  return {StatusCode::kUnsupported, std::string("There is no usable CUDA device: ") + cudaGetErrorString(error) + "."};
}

cudaError_t ask_driver(int ordinal, Device* device) {
  int major = 0, minor = 0, num_sms = 0, shared_bytes = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, ordinal);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
  if (error == cudaSuccess) *device = {DeviceType::kCuda, 10 * major + minor, num_sms, shared_bytes};
  return error;
}

}  // namespace

Status query_cuda_device(int ordinal, Device* device) {
  static std::mutex mutex;
  static std::vector<Device>& known = *new std::vector<Device>;  // by number; of type kCpu where not asked for yet
  const std::lock_guard<std::mutex> lock(mutex);
  const auto idx = static_cast<size_t>(ordinal);
  if (ordinal < 0 || idx >= known.size() || known[idx].type != DeviceType::kCuda) {
    if (const cudaError_t error = ask_driver(ordinal, device); error != cudaSuccess) return unusable(error);
    if (idx >= known.size()) known.resize(idx + 1);
    known[idx] = *device;
  }
  *device = known[idx];
  return {};
}

Status current_cuda_device(int* ordinal) {
  const cudaError_t error = cudaGetDevice(ordinal);
  return error == cudaSuccess ? Status{} : unusable(error);
}

}  // namespace fa
