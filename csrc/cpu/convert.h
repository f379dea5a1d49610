// SPDX-License-Identifier: Apache-2.0
// Rows of float32, float16, bfloat16 and float8 to float and back (round to nearest, ties to even).
// Used by tile_kernel.cpp; compiled once for each instruction set.
#pragma once

#include "cpu/simd.h"
#include "fa/attention.h"
#include "semantics/quantize.h"

namespace fa::cpu::FA_ISA {

FA_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

FA_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

FA_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = static_cast<uint32_t>(h & 0x7fffu) << 13;
  // NOTE: the exponent is rebased by a multiplication, which also makes subnormal halves normal.
  const float magnitude = float_of(rest) * 0x1p112f;
  return float_of(sign | (rest >= (0x7c00u << 13) ? rest | 0x7f800000u : bits_of(magnitude)));
}

FA_INLINE uint16_t float_to_half(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (a < 0x38800000u)
    return static_cast<uint16_t>(sign | (bits_of(float_of(a) + 0.5f) - 0x3f000000u));  // subnormal: 0.5 aligns it
  return static_cast<uint16_t>(sign | ((a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13));
}

FA_INLINE uint16_t float_to_bfloat(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

/// n contiguous elements to floats.
FA_INLINE void to_float(const void* source, DType dtype, float* target, int64_t n) {
  int64_t i = 0;
  if (dtype == DType::kFloat32) {
    std::memcpy(target, source, n * sizeof(float));
  } else if (dtype == DType::kBFloat16) {
    const uint16_t* s = static_cast<const uint16_t*>(source);
    for (; i < n; ++i) target[i] = float_of(static_cast<uint32_t>(s[i]) << 16);
  } else if (dtype == DType::kFloat8E4M3) {
    const uint8_t* s = static_cast<const uint8_t*>(source);
    for (; i < n; ++i) target[i] = from_float8(s[i]);
  } else {
    const uint16_t* s = static_cast<const uint16_t*>(source);
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) {
      _mm512_storeu_ps(target + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(s + i))));
    }
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(target + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i))));
    }
#endif
    for (; i < n; ++i) target[i] = half_to_float(s[i]);
  }
}

/// factor * source, rounded to n contiguous elements.
FA_INLINE void from_float(const float* source, float factor, void* target, DType dtype, int64_t n) {
  if (dtype == DType::kFloat32) {
    float* t = static_cast<float*>(target);
    for (int64_t i = 0; i < n; ++i) t[i] = source[i] * factor;
  } else if (dtype == DType::kFloat16) {
    uint16_t* t = static_cast<uint16_t*>(target);
    for (int64_t i = 0; i < n; ++i) t[i] = float_to_half(source[i] * factor);
  } else if (dtype == DType::kFloat8E4M3) {
    uint8_t* t = static_cast<uint8_t*>(target);
    for (int64_t i = 0; i < n; ++i) t[i] = to_float8(source[i] * factor, 1.0f);
  } else {
    uint16_t* t = static_cast<uint16_t*>(target);
    for (int64_t i = 0; i < n; ++i) t[i] = float_to_bfloat(source[i] * factor);
  }
}

/// x as an element of float32, float16 or bfloat16 holds it.
FA_INLINE float rounded(float x, DType dtype) {
  if (dtype == DType::kFloat16) return half_to_float(float_to_half(x));
  return dtype == DType::kBFloat16 ? float_of(static_cast<uint32_t>(float_to_bfloat(x)) << 16) : x;
}

/// One element of a float tensor.
FA_INLINE float element(const void* source, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(source)[i];
  const uint16_t u = static_cast<const uint16_t*>(source)[i];
  return dtype == DType::kFloat16 ? half_to_float(u) : float_of(static_cast<uint32_t>(u) << 16);
}

}  // namespace fa::cpu::FA_ISA
