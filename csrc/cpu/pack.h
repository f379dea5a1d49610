// SPDX-License-Identifier: Apache-2.0
// Keys and values of a tile into the panels that multiply_panel reads, converted to float32 once; and the scores of very few
// rows, for which packing would cost more than it saves. Rows to come are prefetched: their strides are too long for the hardware
// to guess. Used by tile_kernel.cpp; compiled once for each instruction set.
#pragma once

#include "cpu/cache_rows.h"

namespace fa::cpu::FA_ISA {

FA_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/// Columns of the panel which begins at column c of `padded` (a multiple of kLanes).
FA_INLINE int64_t panel_width(int64_t c, int64_t padded) { return padded - c >= kPanel ? kPanel : padded - c; }

FA_INLINE void prefetch_row(const Rows& source, int64_t i) {
  const char* row = static_cast<const char*>(source.row(i));
  if (row == nullptr) return;
  for (int64_t x = 0; x < source.row_bytes(); x += 64) __builtin_prefetch(row + x);
}

/// kLanes rows of floats, `stride` apart.
struct RowBlock {
  const float* data;
  int64_t stride;
};

/// Rows first … first + kLanes - 1 as floats, in place or in staging (kLanes * round_up(columns, kLanes) floats); of those only n
/// are read, the others and the columns up to a whole vector are 0.
FA_INLINE RowBlock row_block(const Rows& source, int64_t first, int64_t n, float* staging) {
  if (source.vectors() && n >= kLanes && source.row(first) != nullptr) {
    return {static_cast<const float*>(source.row(first)), source.stride_bytes / 4};
  }
  const int64_t d_padded = round_up(source.columns, kLanes);
  for (int64_t r = 0; r < kLanes; ++r) {
    const int64_t filled = r < n ? source.columns : 0;
    if (filled > 0) read_row(source, first + r, staging + r * d_padded);
    for (int64_t x = filled; x < d_padded; ++x) staging[r * d_padded + x] = 0;
  }
  return {staging, d_padded};
}

/// Rows [first, first + n) transposed: panel c holds [columns][rows c … c + width - 1]; rows from n to the next vector are 0.
static void pack_transposed(const Rows& source, int64_t first, int64_t n, float* packed, float* staging) {
  const int64_t d = source.columns, n_padded = round_up(n, kLanes);
  for (int64_t j = 0; j < n_padded; j += kLanes) {
    for (int64_t r = j + kLanes; r < j + 2 * kLanes && r < n; ++r) prefetch_row(source, first + r);
    const int64_t c = j / kPanel * kPanel, width = panel_width(c, n_padded);
    const RowBlock rows = row_block(source, first + j, n - j, staging);
    for (int64_t x = 0; x < d; x += kLanes) {
      Vec block[kLanes];
      const float* row = rows.data + x;
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r, row += rows.stride) block[r] = load(row);
      transpose(block);
      float* target = packed + c * d + (j - c) + x * width;
      const int64_t used = d - x < kLanes ? d - x : kLanes;
      for (int64_t r = 0; r < used; ++r) store(target + r * width, block[r]);
    }
  }
}

/// Rows [first, first + n) as they are: panel c holds [rows][columns c … c + width - 1]; rows up to n_padded and columns are
/// filled with 0. staging: round_up(columns, kLanes) floats.
[[maybe_unused]] static void pack_rows(const Rows& source, int64_t first, int64_t n, int64_t n_padded, float* packed,
                                       float* staging) {
  constexpr int64_t kAhead = 8;
  const int64_t d = source.columns, d_padded = round_up(d, kLanes);
  for (int64_t j = 0; j < n_padded; ++j) {
    if (j + kAhead < n) prefetch_row(source, first + j + kAhead);
    const float* row = staging;
    if (j < n && source.vectors() && source.row(first + j) != nullptr) {
      row = static_cast<const float*>(source.row(first + j));
    } else {
      const int64_t filled = j < n ? d : 0;
      if (filled > 0) read_row(source, first + j, staging);
      for (int64_t x = filled; x < d_padded; ++x) staging[x] = 0;
    }
    for (int64_t c = 0; c < d_padded; c += kPanel) {
      const int64_t width = panel_width(c, d_padded);
      float* target = packed + c * n_padded + j * width;
      for (int64_t x = 0; x < width; x += kLanes) store(target + x, load(row + c + x));
    }
  }
}

/// scores[m * stride + c] = query row m (of num_rows, round_up(D) floats each, 0 beyond D) times key first + c, for c < n
/// and up to a whole vector. Reads each key once.
[[maybe_unused]] static void score_few_rows(const float* query, int64_t num_rows, const Rows& keys, int64_t first, int64_t n,
                                            float* scores, int64_t stride, float* staging) {
  const int64_t d_padded = round_up(keys.columns, kLanes);
  for (int64_t j = 0; j < n; j += kLanes) {
    for (int64_t r = j + kLanes; r < j + 2 * kLanes && r < n; ++r) prefetch_row(keys, first + r);
    const RowBlock rows = row_block(keys, first + j, n - j, staging);
    for (int64_t m = 0; m < num_rows; ++m) {
      Vec products[kLanes] = {};
      for (int64_t x = 0; x < d_padded; x += kLanes) {
        const Vec q = load(query + m * d_padded + x);
        const float* row = rows.data + x;
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r, row += rows.stride) products[r] += q * load(row);
      }
      transpose(products);
      Vec sum = products[0];
      for (int r = 1; r < kLanes; ++r) sum += products[r];
      store(scores + m * stride + j, sum);
    }
  }
}

}  // namespace fa::cpu::FA_ISA
