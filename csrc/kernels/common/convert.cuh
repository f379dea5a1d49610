// SPDX-License-Identifier: Apache-2.0
// Between float32 and the tensors' element types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "fa/attention.h"

namespace fa {

using Float8 = __nv_fp8_e4m3;

/// Numbers beyond the largest float8, 448, become it.
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (__is_same(T, __half)) return __float2half_rn(x);
  if constexpr (__is_same(T, __nv_bfloat16)) return __float2bfloat16_rn(x);
  if constexpr (__is_same(T, float)) return x;
  if constexpr (__is_same(T, Float8)) return Float8(x);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(Float8 x) { return static_cast<float>(x); }

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

/// Four float8 in one register, the first in the lowest byte.
__device__ __forceinline__ uint32_t pack4_float8(float a, float b, float c, float d) {
  uint32_t packed;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n"
      "}"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

/// Two neighbouring elements, at an even one of an aligned row.
__device__ __forceinline__ void store_pair(float* to, float x, float y) { *reinterpret_cast<float2*>(to) = make_float2(x, y); }
__device__ __forceinline__ void store_pair(Float8* to, float x, float y) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(pair) : "f"(x), "f"(y));
  *reinterpret_cast<uint16_t*>(to) = pair;
}
template <class T>
__device__ __forceinline__ void store_pair(T* to, float x, float y) {
  *reinterpret_cast<uint32_t*>(to) = pack2<T>(x, y);
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

/// load_float() for places that are unrolled far: what depends on the type alone is computed once.
struct FloatReader {
  bool is_float, is_half;

  __device__ __forceinline__ explicit FloatReader(DType dtype)
      : is_float(dtype == DType::kFloat32), is_half(dtype == DType::kFloat16) {}
  __device__ __forceinline__ int64_t bytes(int64_t count) const { return count << (is_float ? 2 : 1); }
  __device__ __forceinline__ float read(const void* at) const {
    if (is_float) return *static_cast<const float*>(at);
    return unpack2(*static_cast<const uint16_t*>(at), is_half).x;
  }
};

}  // namespace fa
