// SPDX-License-Identifier: Apache-2.0
// See kernel_attributes.h.
#include "kernels/common/kernel_attributes.h"

#include <cuda.h>

#include <map>
#include <mutex>
#include <set>
#include <tuple>

#include "kernels/common/driver.h"

namespace fa {
namespace {

/// Of this thread's context: a number that no other context of the process ever has, though it may get the address of one that is
/// gone. 0: there is no context yet, or an old driver doesn't tell.
unsigned long long context_number() {
  static const auto get_current = find_in_driver<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent");
  static const auto get_id = find_in_driver<decltype(&cuCtxGetId)>("cuCtxGetId");
  CUcontext context = nullptr;
  unsigned long long number = 0;
  if (get_current == nullptr || get_id == nullptr || get_current(&context) != CUDA_SUCCESS || context == nullptr) return 0;
  return get_id(context, &number) == CUDA_SUCCESS ? number : 0;
}

int ask_most_clusters(const void* kernel, int blocks, int threads, size_t shared_bytes) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeClusterDimension;
  together.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &together;
  config.numAttrs = 1;
  int most = 0;
  if (cudaOccupancyMaxActiveClusters(&most, kernel, &config) == cudaSuccess) return most;
  cudaGetLastError();  // an unanswered question must not fail the next call
  return 0;
}

}  // namespace

cudaError_t set_attribute_once(const void* kernel, cudaFuncAttribute attribute, int value) {
  static std::mutex mutex;
  static auto& done = *new std::set<std::tuple<unsigned long long, const void*, cudaFuncAttribute>>;
  const unsigned long long context = context_number();
  const std::lock_guard<std::mutex> lock(mutex);
  if (context != 0 && done.count({context, kernel, attribute}) > 0) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, attribute, value);
  if (context != 0 && error == cudaSuccess) done.insert({context, kernel, attribute});
  return error;
}

int most_clusters(const void* kernel, int blocks, int threads, size_t shared_bytes) {
  static std::mutex mutex;
  static auto& known = *new std::map<std::tuple<int, const void*, int>, int>;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [place, is_new] = known.try_emplace({device, kernel, blocks}, 0);
  if (is_new) place->second = ask_most_clusters(kernel, blocks, threads, shared_bytes);
  return place->second;
}

}  // namespace fa
