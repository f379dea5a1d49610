// SPDX-License-Identifier: Apache-2.0
// Attributes of kernels, and what a device can do with them. The CUDA runtime keeps attributes, so they are set before a kernel's
// first launch, not before each; answers are kept here.
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

/// How many clusters of `blocks` blocks the current device holds at a time; 0 where it can't say. The CUDA runtime is asked once
/// for each kernel, size of cluster and device; threads and shared memory of a block must be the same at every call. Thread-safe.
int most_clusters(const void* kernel, int blocks, int threads, size_t shared_bytes);

template <class... Parameters>
int most_clusters(void (*kernel)(Parameters...), int blocks, int threads, size_t shared_bytes) {
  return most_clusters(reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes);
}

}  // namespace fa
