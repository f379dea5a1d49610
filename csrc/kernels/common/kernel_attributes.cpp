// SPDX-License-Identifier: Apache-2.0
// See kernel_attributes.h.
#include "kernels/common/kernel_attributes.h"

#include <cuda.h>

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

}  // namespace fa
