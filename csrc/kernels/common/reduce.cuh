// SPDX-License-Identifier: Apache-2.0
// Reductions over lanes. A quad is the four lanes that share the rows of an mma accumulator.
#pragma once

namespace fa {

inline constexpr unsigned kAllLanes = 0xffffffffu;

/// The larger of two; NaN if one is, which fmaxf would leave out.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float quad_max_or_nan(float x) {
  x = max_or_nan(x, __shfl_xor_sync(kAllLanes, x, 1));
  return max_or_nan(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

}  // namespace fa
