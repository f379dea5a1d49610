// SPDX-License-Identifier: Apache-2.0
// The block's dynamic shared memory.
#pragma once

namespace fa {

/// What the launch gave to the block, at a multiple of 1024 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_bytes[];
  return dynamic_shared_bytes;
}

}  // namespace fa
