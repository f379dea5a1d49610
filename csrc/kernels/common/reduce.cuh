// SPDX-License-Identifier: Apache-2.0
// Reductions over lanes. A quad is the four lanes that share the rows of an mma accumulator.
#pragma once

namespace fa {

inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

}  // namespace fa
