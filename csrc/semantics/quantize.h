// SPDX-License-Identifier: Apache-2.0
// Numbers of quantized caches: an element is stored as its quotient by a scale, an integer of 8 or 4 bits or a float8 (e4m3), to
// the nearest, ties to even. Used by the CPU kernel and by kernels/cache_step.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "semantics/mask.h"

namespace fa {

/// x / scale to the nearest integer of low … high, ties to even; 0 for NaN.
FA_HD int quantized(float x, float scale, float low, float high) {
  const float q = nearbyintf(x / scale);
  return q >= low ? static_cast<int>(q <= high ? q : high) : q < low ? static_cast<int>(low) : 0;
}

FA_HD uint8_t to_int8(float x, float scale) { return static_cast<uint8_t>(quantized(x, scale, -128, 127)); }
FA_HD float from_int8(uint8_t stored) { return static_cast<float>(static_cast<int8_t>(stored)); }

/// Two 4-bit numbers share a byte, each plus 8: column 2 i in the low half of byte i, column 2 i + 1 in the high half.
FA_HD uint8_t to_int4(float x, float scale) { return static_cast<uint8_t>(quantized(x, scale, -8, 7) + 8); }
FA_HD float from_int4(uint8_t byte, int64_t column) { return static_cast<float>((column % 2 == 0 ? byte & 15 : byte >> 4) - 8); }
FA_HD uint8_t int4_pair(uint8_t even, uint8_t odd) { return static_cast<uint8_t>(even | odd << 4); }

namespace float8 {

FA_HD uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

FA_HD float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

}  // namespace float8

/// e4m3: 4 bits of exponent, bias 7; no infinity, NaN is 0x7f.
FA_HD float from_float8(uint8_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x80u) << 24, rest = static_cast<uint32_t>(h & 0x7fu) << 20;
  const float magnitude = float8::float_of(rest) * 0x1p120f;
  return float8::float_of(sign | ((h & 0x7fu) == 0x7fu ? 0x7fc00000u : float8::bits_of(magnitude)));
}

/// Numbers beyond 448 become 448.
FA_HD uint8_t to_float8(float x, float scale) {
  const uint32_t u = float8::bits_of(x / scale), sign = (u >> 24) & 0x80u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  if (a >= 0x43e00000u) return static_cast<uint8_t>(sign | 0x7eu);
  if (a < 0x3c800000u)  // subnormal: 2^14 aligns it
    return static_cast<uint8_t>(sign | (float8::bits_of(float8::float_of(a) + 0x1p14f) - float8::bits_of(0x1p14f)));
  return static_cast<uint8_t>(sign | ((a + 0x7ffffu + ((a >> 20) & 1u) - 0x3c000000u) >> 20));
}

}  // namespace fa
