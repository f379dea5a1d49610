// SPDX-License-Identifier: Apache-2.0
// The register-blocked product and the packing of its right operand: panels of kPanel columns, each stored row after row, so that
// a step of the sum reads two vectors and broadcasts one number for each of up to kRows rows.
// Used by tile_kernel.cpp for both Q K^T and P V; compiled once for each instruction set.
#pragma once

#include "cpu/convert.h"

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

/// A matrix in memory: rows of `columns` contiguous elements.
struct Rows {
  const char* data;
  DType dtype;
  int64_t stride_bytes;
  int64_t columns;

  const void* row(int64_t i) const { return data + i * stride_bytes; }
};

FA_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/// Columns of the panel which begins at column c of `padded` (a multiple of kLanes).
FA_INLINE int64_t panel_width(int64_t c, int64_t padded) { return padded - c >= kPanel ? kPanel : padded - c; }

/// Rows [first, first + n) transposed: panel c holds [columns][rows c … c + width - 1]; rows from n to the next vector are 0.
/// staging: kLanes * round_up(columns, kLanes) floats.
static void pack_transposed(const Rows& source, int64_t first, int64_t n, float* packed, float* staging) {
  const int64_t d = source.columns, d_padded = round_up(d, kLanes), n_padded = round_up(n, kLanes);
  const bool in_place = source.dtype == DType::kFloat32;
  for (int64_t j = 0; j < n_padded; j += kLanes) {
    const int64_t c = j / kPanel * kPanel, width = panel_width(c, n_padded);
    float* panel = packed + c * d + (j - c);
    const bool staged = !in_place || n - j < kLanes || d_padded != d;
    if (staged) {
      for (int64_t r = 0; r < kLanes; ++r) {
        const int64_t filled = j + r < n ? d : 0;
        to_float(source.row(first + j + r), source.dtype, staging + r * d_padded, filled);
        for (int64_t x = filled; x < d_padded; ++x) staging[r * d_padded + x] = 0;
      }
    }
    for (int64_t x = 0; x < d; x += kLanes) {
      Vec block[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        block[r] = load(staged ? staging + r * d_padded + x : static_cast<const float*>(source.row(first + j + r)) + x);
      }
      transpose(block);
      const int64_t used = d - x < kLanes ? d - x : kLanes;
      for (int64_t r = 0; r < used; ++r) store(panel + (x + r) * width, block[r]);
    }
  }
}

/// Rows [first, first + n) as they are: panel c holds [rows][columns c … c + width - 1]; rows up to n_padded and columns are
/// filled with 0. staging: round_up(columns, kLanes) floats.
static void pack_rows(const Rows& source, int64_t first, int64_t n, int64_t n_padded, float* packed, float* staging) {
  const int64_t d = source.columns, d_padded = round_up(d, kLanes);
  for (int64_t j = 0; j < n_padded; ++j) {
    const int64_t filled = j < n ? d : 0;
    const float* row = staging;
    if (source.dtype == DType::kFloat32 && filled == d_padded) {
      row = static_cast<const float*>(source.row(first + j));
    } else {
      to_float(source.row(first + j), source.dtype, staging, filled);
      for (int64_t x = filled; x < d_padded; ++x) staging[x] = 0;
    }
    for (int64_t c = 0; c < d_padded; c += kPanel) {
      const int64_t width = panel_width(c, d_padded);
      float* target = packed + c * n_padded + j * width;
      for (int64_t x = 0; x < width; x += kLanes) store(target + x, load(row + c + x));
    }
  }
}

}  // namespace fa::cpu::FA_ISA
