// SPDX-License-Identifier: Apache-2.0
// Single rows: of queries and new keys as they are read (norm, rotary embedding), of a cache as they are stored (quantized) and
// read back. What they mean is in semantics/; here a warp shares the columns of one row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "kernels/cache_step/threads.h"
#include "kernels/common/scales.h"
#include "semantics/quantize.h"
#include "semantics/transform.h"

namespace fa::cache_step {

FA_HD float read_float(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  if (dtype == DType::kFloat16) return __half2float(static_cast<const __half*>(data)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
}

FA_HD void write_float(void* data, DType dtype, int64_t i, float x) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[i] = x;
  } else if (dtype == DType::kFloat16) {
    static_cast<__half*>(data)[i] = __float2half_rn(x);
  } else {
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
  }
}

FA_HD char* bytes_at(const TensorView& t, int64_t elements, int64_t element_bytes) {
  return static_cast<char*>(t.data) + elements * element_bytes;
}

/// A row of queries, new keys or new values, normalised and rotated as it is read.
struct FreshRow {
  const void* data;
  DType dtype;
  int64_t columns;
  const TensorView* weight;  // of the norm; null: none
  float factor;
  RotaryColumns rotated;  // no pairs: none
  const RotaryParams* rotary;
  int64_t cos_first, sin_first;

  FA_HD float normalised(int64_t x) const {
    const float own = read_float(data, dtype, x);
    return weight != nullptr ? own * (factor * read_float(weight->data, weight->dtype, x)) : own;
  }

  FA_HD float at(int64_t x) const {
    const float own = normalised(x);
    if (x >= 2 * rotated.num_pairs) return own;
    const int64_t pair = rotated.pair_of(x), first = rotated.first(pair), second = rotated.second(pair);
    const float cos = read_float(rotary->cos.data, rotary->cos.dtype, cos_first + pair);
    const float sin = read_float(rotary->sin.data, rotary->sin.dtype, sin_first + pair);
    return x == first ? rotated_first(own, normalised(second), cos, sin) : rotated_second(normalised(first), own, cos, sin);
  }
};

FA_HD FreshRow plain_row(const void* data, DType dtype, int64_t columns) {
  return {data, dtype, columns, nullptr, 1.0f, {0, false}, nullptr, 0, 0};
}

/// For a whole warp. `row` and `position` as angles_of takes them.
FA_HD FreshRow transformed_row(const StepParams& p, const TensorView& weight, float epsilon, const void* data, DType dtype,
                               int64_t columns, int64_t batch_idx, int64_t row, int64_t position) {
  FreshRow fresh = plain_row(data, dtype, columns);
  if (weight.present) {
    float squares = 0;
    for (int64_t x = lane_idx(); x < columns; x += kLanes) {
      const float element = read_float(data, dtype, x);
      squares += element * element;
    }
    fresh.weight = &weight;
    fresh.factor = norm_factor(warp_sum(squares) / static_cast<float>(columns), epsilon);
  }
  fresh.rotated = rotary_columns(p.rotary);
  if (fresh.rotated.num_pairs == 0) return fresh;
  fresh.rotary = &p.rotary;
  fresh.cos_first = angles_of(p.rotary, p.rotary.cos, batch_idx, row, position);
  fresh.sin_first = angles_of(p.rotary, p.rotary.sin, batch_idx, row, position);
  return fresh;
}

/// For a whole warp: the row as the cache has it, two columns at a time.
FA_HD void write_row(const FreshRow& row, const Scales& scales, DType cache_dtype, char* target) {
  auto* stored = reinterpret_cast<uint8_t*>(target);
  for (int64_t x = 2 * lane_idx(); x < row.columns; x += 2 * kLanes) {
    uint8_t nibbles[2] = {0, 0};
    FA_UNROLL(1)
    for (int64_t column = x; column < x + 2 && column < row.columns; ++column) {
      const float number = row.at(column);
      if (scales.data == nullptr) {
        write_float(target, cache_dtype, column, number);
      } else if (cache_dtype == DType::kUInt8) {
        (column == x ? nibbles[0] : nibbles[1]) = to_int4(number, scales.at(column));
      } else {
        stored[column] = cache_dtype == DType::kInt8 ? to_int8(number, scales.at(column)) : to_float8(number, scales.at(column));
      }
    }
    if (scales.data != nullptr && cache_dtype == DType::kUInt8) stored[x / 2] = int4_pair(nibbles[0], nibbles[1]);
  }
}

/// Column x of a stored row, from the byte that it is in.
FA_HD float stored_number(uint8_t byte, DType cache_dtype, int64_t x) {
  return cache_dtype == DType::kUInt8 ? from_int4(byte, x) : cache_dtype == DType::kInt8 ? from_int8(byte) : from_float8(byte);
}

/// Unit `idx` of a row; a null source is a row of zeros.
template <class Unit>
FA_HD void move_unit(const char* source, char* target, int64_t idx) {
  reinterpret_cast<Unit*>(target)[idx] = source != nullptr ? reinterpret_cast<const Unit*>(source)[idx] : Unit{};
}

FA_HD void move_unit_of(int bytes, const char* source, char* target, int64_t idx) {
  if (bytes == 16) {
    move_unit<uint4>(source, target, idx);
  } else if (bytes == 4) {
    move_unit<uint32_t>(source, target, idx);
  } else if (bytes == 2) {
    move_unit<uint16_t>(source, target, idx);
  } else {
    move_unit<uint8_t>(source, target, idx);
  }
}

}  // namespace fa::cache_step
