// SPDX-License-Identifier: Apache-2.0
// Between float32 and the tensors' element types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "fa/attention.h"

namespace fa {

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (__is_same(T, __half)) return __float2half_rn(x);
  if constexpr (__is_same(T, __nv_bfloat16)) return __float2bfloat16_rn(x);
  if constexpr (__is_same(T, float)) return x;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

/// Two 16-bit elements in one register, `first` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float first, float second) {
  if constexpr (__is_same(T, __half)) {
    const __half2 pair = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

/// The two elements of a register whose type is known at run time only.
__device__ __forceinline__ float2 unpack2(uint32_t pair, bool is_half) {
  if (is_half) return __half22float2(reinterpret_cast<const __half2&>(pair));
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

/// Element `index` of an array of float32, float16 or bfloat16.
__device__ __forceinline__ float load_float(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  if (dtype == DType::kFloat16) return to_float(static_cast<const __half*>(data)[index]);
  return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
}

}  // namespace fa
