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
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif
// A register block: kRows x kVecs accumulators, kVecs vectors of the right operand and one broadcast number.
inline constexpr int kRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kVecs = 4;  // 29 of 32 registers
#else
inline constexpr int kVecs = 2;  // 15 of 16
#endif
inline constexpr int kPanel = kVecs * kLanes;  // columns of a register block

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

template <int... kIndex>
struct Indices {};
template <int kCount, int... kIndex>
struct FirstIndices : FirstIndices<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex>
struct FirstIndices<0, kIndex...> {
  using type = Indices<kIndex...>;
};
using LaneIndices = FirstIndices<kLanes>::type;

#if defined(__clang__)
#define FA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FA_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecInt{__VA_ARGS__})
#endif

template <int kBy, int... kIndex>
FA_INLINE Vec rotate(Vec v, Indices<kIndex...>) {
  return FA_SHUFFLE(v, v, ((kIndex + kBy) % kLanes)...);
}

/// The first (kHalf = 0) or second half of a and b taken in turn.
template <int kHalf, int... kIndex>
FA_INLINE Vec interleave(Vec a, Vec b, Indices<kIndex...>) {
  return FA_SHUFFLE(a, b, (kHalf * kLanes / 2 + kIndex / 2 + kIndex % 2 * kLanes)...);
}

template <int kBy = kLanes / 2>
FA_INLINE float horizontal_max(Vec v) {
  if constexpr (kBy == 0) {
    return v[0];
  } else {
    return horizontal_max<kBy / 2>(vmax(v, rotate<kBy>(v, LaneIndices{})));
  }
}

template <int kBy = kLanes / 2>
FA_INLINE float horizontal_sum(Vec v) {
  if constexpr (kBy == 0) {
    return v[0];
  } else {
    return horizontal_sum<kBy / 2>(v + rotate<kBy>(v, LaneIndices{}));
  }
}

/// e^x for x <= 0 within about 1 ulp; 0 below -87.3 (where the result would be subnormal) and for -inf; NaN for NaN.
/// x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts (Cody & Waite); e^r = 1 + r + r^2 p(r), p minimax (3e-9, relative).
FA_INLINE Vec exp_nonpositive(Vec x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which lies in the low bits then
  const Vec low = splat(-87.33654f);
  const Vec clamped = vmax(x, low);
  const Vec shifted = clamped * 1.4426950408889634f + kShift;
  const Vec n = shifted - kShift;
  const Vec r = (clamped - n * 0.693145751953125f) - n * 1.428606765330187e-6f;
  Vec y = r * 0.001381459878757596f + 0.008368716575205326f;
  y = y * r + 0.04166838899254799f;
  y = y * r + 0.1666652113199234f;
  y = y * r + 0.4999999403953552f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const VecInt exponent = (VecInt)shifted << 23;                  // n becomes the exponent; the shift's own bits fall out
  return (Vec)((((VecInt)y + exponent) & (x > low)) | (x != x));  // all bits set are a NaN
}

/// tanh within about 2 ulp: an odd minimax polynomial (4e-9, relative) up to 0.625, beyond it (1 - e^-2x) / (1 + e^-2x).
FA_INLINE Vec tanh(Vec x) {
  const Vec negative = (Vec)((VecInt)x & splat_int(INT32_MIN));
  const Vec a = (Vec)((VecInt)x & splat_int(INT32_MAX));
  const Vec z = x * x;
  Vec small = z * -0.005704986862838268f + 0.02063908614218235f;
  small = small * z - 0.05373971536755562f;
  small = small * z + 0.13331441581249237f;
  small = small * z - 0.3333328068256378f;
  small = small * z * a + a;
  const Vec decay = exp_nonpositive(a * -2.0f);
  const Vec large = (1.0f - decay) / (1.0f + decay);
  return (Vec)((VecInt)select(a < 0.625f, small, large) | (VecInt)negative);
}

/// Transposes kLanes rows in place: log2(kLanes) rounds of perfect shuffles of rows i and i + kLanes / 2.
FA_INLINE void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + kLanes / 2], LaneIndices{});
      next[2 * i + 1] = interleave<1>(rows[i], rows[i + kLanes / 2], LaneIndices{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

}  // namespace fa::cpu::FA_ISA
