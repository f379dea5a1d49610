// SPDX-License-Identifier: Apache-2.0
// Rows of keys or values where they lie: of one head, contiguous or in pages, of any float type or quantized. Read as floats row
// by row, and written so; nothing is ever converted as a whole. Used by pack.h, tile_kernel.cpp and store_rows.h; compiled once
// for each instruction set.
#pragma once

#include "cpu/convert.h"
#include "semantics/cache.h"
#include "semantics/quantize.h"

namespace fa::cpu::FA_ISA {
namespace {  // no copy for the linker to share among instruction sets

/// A matrix in memory: rows of `columns` elements, each row contiguous.
struct Rows {
  const char* data;
  DType dtype;
  int64_t stride_bytes;
  int64_t columns;
  const float* scale = nullptr;  // of quantized rows: an element is its integer times this
  int64_t scale_stride = 0;      // 0: one scale for all columns
  PageTable table{};
  int64_t page_bytes = 0;  // from page to page

  /// null for no slot.
  const void* at_slot(int64_t slot) const {
    return slot == PageTable::kNowhere ? nullptr : data + table.offset_of(slot, stride_bytes, page_bytes);
  }
  /// null for a row of a page that there isn't.
  const void* row(int64_t i) const { return at_slot(table.slot_of(i)); }
  /// Rows from row i on, itself included, that lie one stride apart.
  int64_t run(int64_t i, int64_t limit) const {
    const int64_t rest = table.is_paged() ? table.page_rows - i % table.page_rows : limit;
    return rest < limit ? rest : limit;
  }
  bool is_quantized() const { return scale != nullptr; }
  /// Two 4-bit numbers in a byte.
  bool is_int4() const { return dtype == DType::kUInt8; }
  int64_t row_bytes() const { return is_int4() ? (columns + 1) / 2 : columns * size_of(dtype); }
  /// Can whole vectors of floats be loaded right from the rows? In pages a vector's count of rows must not cross an edge.
  bool vectors() const {
    return dtype == DType::kFloat32 && columns % kLanes == 0 && (!table.is_paged() || table.page_rows % kLanes == 0);
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
  const uint8_t* s = static_cast<const uint8_t*>(source);
  if (rows.is_int4()) {
    for (int64_t x = 0; x + 1 < n; x += 2) target[x] = from_int4(s[x / 2], 0), target[x + 1] = from_int4(s[x / 2], 1);
    if (n % 2 != 0) target[n - 1] = from_int4(s[n / 2], 0);
  } else if (rows.dtype == DType::kInt8) {
    for (int64_t x = 0; x < n; ++x) target[x] = from_int8(s[x]);
  } else {
    for (int64_t x = 0; x < n; ++x) target[x] = from_float8(s[x]);
  }
  if (rows.scale_stride == 0) {
    for (int64_t x = 0; x < n; ++x) target[x] *= rows.scale[0];
  } else {
    for (int64_t x = 0; x < n; ++x) target[x] *= rows.scale[x * rows.scale_stride];
  }
}

/// Floats into one row at `target`, of the type and scales of `rows`.
FA_INLINE void write_row(const Rows& rows, const float* source, void* target) {
  const int64_t n = rows.columns;
  if (!rows.is_quantized()) return from_float(source, 1.0f, target, rows.dtype, n);
  uint8_t* t = static_cast<uint8_t*>(target);
  const auto scale = [&](int64_t x) { return rows.scale[x * rows.scale_stride]; };
  if (rows.is_int4()) {
    for (int64_t x = 0; x < n; x += 2)
      t[x / 2] = int4_pair(to_int4(source[x], scale(x)), x + 1 < n ? to_int4(source[x + 1], scale(x + 1)) : uint8_t{0});
  } else if (rows.dtype == DType::kInt8) {
    for (int64_t x = 0; x < n; ++x) t[x] = to_int8(source[x], scale(x));
  } else {
    for (int64_t x = 0; x < n; ++x) t[x] = to_float8(source[x], scale(x));
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
  rows.table = page_table(p, sequence_idx);
  rows.page_bytes = t.stride[0] * size;
  return rows;
}

}  // namespace
}  // namespace fa::cpu::FA_ISA
