// SPDX-License-Identifier: Apache-2.0
// Attributes of kernels. The CUDA runtime keeps them, so they are set before a kernel's first launch, not before each.
#pragma once

#include <cuda_runtime_api.h>

namespace fa {

/// cudaFuncSetAttribute, once for each kernel, attribute and context. The value must be the same at every call. Thread-safe.
cudaError_t set_attribute_once(const void* kernel, cudaFuncAttribute attribute, int value);

/// How much dynamic shared memory a block of the kernel may have.
template <class... Parameters>
cudaError_t allow_shared_memory(void (*kernel)(Parameters...), size_t bytes) {
  return set_attribute_once(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                            static_cast<int>(bytes));
}

/// The multiprocessors' memory is divided so that shared memory has most of it: for every kernel alike, because blocks of two
/// kernels can't be on one multiprocessor where they want it divided differently.
template <class... Parameters>
cudaError_t prefer_shared_memory(void (*kernel)(Parameters...)) {
  return set_attribute_once(reinterpret_cast<const void*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout,
                            cudaSharedmemCarveoutMaxShared);
}

}  // namespace fa
