// SPDX-License-Identifier: Apache-2.0
// The register-blocked product. Its right operand comes in panels of up to kPanel columns, stored row after row (pack.h), so that
// a step of the sum reads kVecs vectors and broadcasts one number for each of kRows rows. Used by tile_kernel.cpp for both Q K^T
// and P V; compiled once for each instruction set.
#pragma once

#include "cpu/simd.h"

namespace fa::cpu::FA_ISA {

/// c[m][:] = (alpha ? alpha[m] * c[m][:] : 0) + sum over k of a[m * kRowStep + k * kSumStep] * b[k * ldb + :], kRowsOf x kVecs
/// vectors.
template <int kRowsOf, int kVecs, int kRowStep, int kSumStep>
static __attribute__((noinline)) void multiply_block(const float* a, const float* b, int64_t ldb, int64_t sum, float* c,
                                                     int64_t ldc, const float* alpha) {
  Vec acc[kRowsOf][kVecs] = {};
  for (int64_t k = 0; k < sum; ++k) {
    Vec right[kVecs];
#pragma GCC unroll 4
    for (int n = 0; n < kVecs; ++n) right[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRowsOf; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < kVecs; ++n) acc[m][n] += a[m * kRowStep] * right[n];
    }
    a += kSumStep;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRowsOf; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVecs; ++n) {
      float* target = c + m * ldc + n * kLanes;
      store(target, alpha == nullptr ? acc[m][n] : acc[m][n] + alpha[m] * load(target));
    }
  }
}

/// multiply_block for a panel `width` columns wide.
template <int kRowsOf, int kRowStep, int kSumStep>
FA_INLINE void multiply_panel(int64_t width, const float* a, const float* b, int64_t ldb, int64_t sum, float* c, int64_t ldc,
                              const float* alpha) {
  switch (width / kLanes) {
    case 1:
      return multiply_block<kRowsOf, 1, kRowStep, kSumStep>(a, b, ldb, sum, c, ldc, alpha);
    case 2:
      return multiply_block<kRowsOf, 2, kRowStep, kSumStep>(a, b, ldb, sum, c, ldc, alpha);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 3:
      return multiply_block<kRowsOf, 3, kRowStep, kSumStep>(a, b, ldb, sum, c, ldc, alpha);
    default:
      return multiply_block<kRowsOf, 4, kRowStep, kSumStep>(a, b, ldb, sum, c, ldc, alpha);
#endif
  }
}

}  // namespace fa::cpu::FA_ISA
