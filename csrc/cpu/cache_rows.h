// SPDX-License-Identifier: Apache-2.0
// Rows of keys or values where they lie: of one head, contiguous or in pages, of any float type or quantized. Read as floats row
// by row, and written so; nothing is ever converted as a whole. Used by pack.h, tile_kernel.cpp and store_rows.h; compiled once
// for each instruction set.
#pragma once

#include <cmath>

#include "cpu/convert.h"
#include "semantics/sequence.h"

namespace fa::cpu::FA_ISA {
namespace {  // no copy for the linker to share among instruction sets

/// A matrix in memory: rows of `columns` elements, each row contiguous.
struct Rows {
  const char* data;
  DType dtype;
  int64_t stride_bytes;
  int64_t columns;
  const float* scale = nullptr;           // of quantized rows: an element is its integer times this
  int64_t scale_stride = 0;               // 0: one scale for all columns
  IndexView pages = {nullptr, 0, false};  // of paged rows: the page of row i is pages.at(i / page_rows)
  int64_t page_rows = 0, num_pages = 0, page_bytes = 0;

  /// null for a row of a page that there isn't.
  const void* row(int64_t i) const {
    if (pages.data == nullptr) return data + i * stride_bytes;
    const int64_t page = pages.at(i / page_rows);
    return page < 0 || page >= num_pages ? nullptr : data + page * page_bytes + i % page_rows * stride_bytes;
  }
  /// Rows from row i on, itself included, that lie one stride apart.
  int64_t run(int64_t i, int64_t limit) const {
    const int64_t rest = pages.data == nullptr ? limit : page_rows - i % page_rows;
    return rest < limit ? rest : limit;
  }
  bool is_quantized() const { return scale != nullptr; }
  /// Two 4-bit numbers in a byte.
  bool is_int4() const { return dtype == DType::kUInt8; }
  int64_t row_bytes() const { return is_int4() ? (columns + 1) / 2 : columns * size_of(dtype); }
  /// Can whole vectors of floats be loaded right from the rows? In pages a vector's count of rows must not cross an edge.
  bool vectors() const {
    return dtype == DType::kFloat32 && columns % kLanes == 0 && (pages.data == nullptr || page_rows % kLanes == 0);
  }
};

/// Row i as floats. A row of a page that there isn't is 0.
FA_INLINE void read_row(const Rows& rows, int64_t i, float* target) {
  const void* source = rows.row(i);
  const int64_t n = rows.columns;
  if (source == nullptr) {
    for (int64_t x = 0; x < n; ++x) target[x] = 0;
    return;
  }
  if (!rows.is_quantized()) return to_float(source, rows.dtype, target, n);
  if (rows.is_int4()) {
    const uint8_t* s = static_cast<const uint8_t*>(source);
    for (int64_t x = 0; x + 1 < n; x += 2) {
      target[x] = static_cast<float>((s[x / 2] & 15) - 8);
      target[x + 1] = static_cast<float>((s[x / 2] >> 4) - 8);
    }
    if (n % 2 != 0) target[n - 1] = static_cast<float>((s[n / 2] & 15) - 8);
  } else if (rows.dtype == DType::kInt8) {
    for (int64_t x = 0; x < n; ++x) target[x] = static_cast<const int8_t*>(source)[x];
  } else {
    for (int64_t x = 0; x < n; ++x) target[x] = float8_to_float(static_cast<const uint8_t*>(source)[x]);
  }
  if (rows.scale_stride == 0) {
    for (int64_t x = 0; x < n; ++x) target[x] *= rows.scale[0];
  } else {
    for (int64_t x = 0; x < n; ++x) target[x] *= rows.scale[x * rows.scale_stride];
  }
}

/// x / scale to the nearest integer of low … high, ties to even; 0 for NaN.
FA_INLINE int quantized(float x, float scale, float low, float high) {
  const float q = std::nearbyint(x / scale);
  return q >= low ? static_cast<int>(q <= high ? q : high) : q < low ? static_cast<int>(low) : 0;
}

/// Floats into one row at `target`, of the type and scales of `rows`.
FA_INLINE void write_row(const Rows& rows, const float* source, void* target) {
  const int64_t n = rows.columns;
  if (!rows.is_quantized()) return from_float(source, 1.0f, target, rows.dtype, n);
  uint8_t* t = static_cast<uint8_t*>(target);
  for (int64_t x = 0; x < n; ++x) {
    const float scale = rows.scale[x * rows.scale_stride];
    if (rows.is_int4()) {
      const int nibble = quantized(source[x], scale, -8, 7) + 8;
      t[x / 2] = static_cast<uint8_t>(x % 2 == 0 ? nibble : t[x / 2] | nibble << 4);
    } else if (rows.dtype == DType::kInt8) {
      t[x] = static_cast<uint8_t>(quantized(source[x], scale, -128, 127));
    } else {
      t[x] = float_to_float8(source[x] / scale);
    }
  }
}

/// The rows of one sequence and head of params.key (which = 0) or params.value (1), as attention sees them.
FA_INLINE Rows cache_rows(const StepParams& p, int which, int64_t sequence_idx, int64_t batch_idx, int64_t head, int64_t first) {
  const TensorView& t = which == 0 ? p.key : p.value;
  const TensorView& scale = which == 0 ? p.cache.key_scale : p.cache.value_scale;
  const int64_t size = size_of(t.dtype);
  const bool paged = p.cache.mode == CacheMode::kPaged;
  Rows rows{static_cast<const char*>(t.data) +
                ((paged ? 0 : batch_idx * t.stride[0]) + head * t.stride[1] + first * t.stride[2]) * size,
            t.dtype, t.stride[2] * size, which == 0 ? p.query.shape[3] : p.out.shape[3]};
  if (scale.present) {
    rows.scale = static_cast<const float*>(scale.data) + head * (scale.shape[0] > 1 ? scale.stride[0] : 0);
    rows.scale_stride = scale.shape[1] > 1 ? scale.stride[1] : 0;
  }
  if (paged) {
    const TensorView& table = p.cache.block_table;
    const int64_t offset = sequence_idx * (table.shape[0] > 1 ? table.stride[0] : 0) * size_of(table.dtype);
    rows.pages = {static_cast<const char*>(table.data) + offset, table.shape[1] > 1 ? table.stride[1] : 0,
                  table.dtype == DType::kInt64};
    rows.page_rows = t.shape[2], rows.num_pages = t.shape[0], rows.page_bytes = t.stride[0] * size;
  }
  return rows;
}

}  // namespace
}  // namespace fa::cpu::FA_ISA
