// SPDX-License-Identifier: Apache-2.0
// One vector of floats, as wide as this compilation's instruction set has it, on the compiler's vector extension; and its exp and
// tanh. Used by the sources that cpu.cmake compiles once for each instruction set, each in its own namespace FA_ISA.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define FA_INLINE static inline __attribute__((always_inline))

namespace fa::cpu::FA_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
inline constexpr int kRows = 14;  // rows of a register block: 14 x 2 accumulators of the 32 registers
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
inline constexpr int kRows = 6;  // 6 x 2 of 16
#elif defined(__aarch64__)
inline constexpr int kLanes = 4;
inline constexpr int kRows = 14;
#else
inline constexpr int kLanes = 4;
inline constexpr int kRows = 6;
#endif
inline constexpr int kPanel = 2 * kLanes;  // columns of a register block

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecInt __attribute__((vector_size(4 * kLanes)));
typedef float VecUnaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

FA_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
FA_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }
FA_INLINE Vec splat(float x) { return x - Vec{}; }
FA_INLINE VecInt splat_int(int32_t x) { return x - VecInt{}; }
FA_INLINE Vec select(VecInt mask, Vec yes, Vec no) { return (Vec)((mask & (VecInt)yes) | (~mask & (VecInt)no)); }

FA_INLINE Vec vmax(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}

FA_INLINE float horizontal_max(Vec v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

/// Pairwise, the same order on every call.
FA_INLINE float horizontal_sum(Vec v) {
  float part[kLanes];
  store(part, v);
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) part[i] += part[i + n];
  }
  return part[0];
}

/// e^x for x <= 0 within 1 ulp or so; 0 below -87.3 (where the result would be subnormal) and for -inf.
/// x = n ln 2 + r, |r| <= ln 2 / 2, ln 2 in two parts (Cody & Waite); e^r by its series up to r^7 (remainder < 6e-9, relative).
FA_INLINE Vec exp_nonpositive(Vec x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Vec low = splat(-87.33654f);
  const Vec clamped = vmax(x, low);
  const Vec shifted = clamped * 1.4426950408889634f + kShift;
  const Vec n = shifted - kShift;
  const Vec r = (clamped - n * 0.693145751953125f) - n * 1.428606765330187e-6f;
  Vec y = r * (1.0f / 5040) + (1.0f / 720);
  y = y * r + (1.0f / 120);
  y = y * r + (1.0f / 24);
  y = y * r + (1.0f / 6);
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const VecInt exponent = (VecInt)shifted << 23;  // the integer's low bits become the exponent; the shift's own bits fall out
  return (Vec)(((VecInt)y + exponent) & (x > low));
}

/// tanh, relative error about 2 ulp: its odd minimax polynomial (Cephes tanhf) up to 0.625, beyond it 1 - 2 / (e^2x + 1).
FA_INLINE Vec tanh(Vec x) {
  const Vec negative = (Vec)((VecInt)x & splat_int(INT32_MIN));
  const Vec a = (Vec)((VecInt)x & splat_int(INT32_MAX));
  const Vec z = x * x;
  Vec small = z * -5.70498872745e-3f + 2.06390887954e-2f;
  small = small * z - 5.37397155531e-2f;
  small = small * z + 1.33314422036e-1f;
  small = small * z - 3.33332819422e-1f;
  small = small * z * a + a;
  const Vec decay = exp_nonpositive(a * -2.0f);
  const Vec large = (1.0f - decay) / (1.0f + decay);
  return (Vec)((VecInt)select(a < 0.625f, small, large) | (VecInt)negative);
}

#if defined(__clang__)
#define FA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FA_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecInt{__VA_ARGS__})
#endif

/// a and b element by element in turn: the first half of that, and the second.
FA_INLINE void interleave(Vec a, Vec b, Vec* low, Vec* high) {
#if defined(__AVX512F__)
  *low = FA_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  *high = FA_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  *low = FA_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  *high = FA_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  *low = FA_SHUFFLE(a, b, 0, 4, 1, 5);
  *high = FA_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

/// Transposes kLanes rows in place: log2(kLanes) rounds of perfect shuffles of rows i and i + kLanes / 2.
FA_INLINE void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) interleave(rows[i], rows[i + kLanes / 2], &next[2 * i], &next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

}  // namespace fa::cpu::FA_ISA
