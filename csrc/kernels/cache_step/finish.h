// SPDX-License-Identifier: Apache-2.0
// The second launch of a cache step, where there is one, block by block: rows in pages or quantized ones as float rows in one
// piece, and what a windowed cache keeps of a step of several rows.
#pragma once

#include "kernels/cache_step/store.h"

namespace fa::cache_step {

/// The rows of a sequence that attention reads: those that any query sees, and before them what may share a key tile with those.
FA_HD KeyRange rows_to_gather(const Args& a, const CacheStep& step) {
  const MaskRule& mask = step.sequence.mask;
  if (a.p.empty_row == EmptyRow::kMean) return {0, mask.kv_length};
  const KeyRange seen = mask.key_range(0, step.sequence.query_length - 1);
  return {seen.begin > kMostTileKeys ? seen.begin - kMostTileKeys : 0, mask.kv_length};
}

/// Columns 8 * group … of a row whose every eight columns are aligned.
FA_HD void write_8(char* row, DType dtype, int64_t group, const float (&numbers)[8]) {
  if (dtype == DType::kFloat32) {
    auto* target = reinterpret_cast<float4*>(row) + 2 * group;
    target[0] = float4{numbers[0], numbers[1], numbers[2], numbers[3]};
    target[1] = float4{numbers[4], numbers[5], numbers[6], numbers[7]};
    return;
  }
  uint32_t words[4];
  FA_UNROLL(4)
  for (int i = 0; i < 4; ++i) {
    const float first = numbers[2 * i], second = numbers[2 * i + 1];
    const __half2 halves = __floats2half2_rn(first, second);
    const __nv_bfloat162 bfloats = __floats2bfloat162_rn(first, second);
    memcpy(&words[i], dtype == DType::kFloat16 ? static_cast<const void*>(&halves) : &bfloats, 4);
  }
  reinterpret_cast<uint4*>(row)[group] = uint4{words[0], words[1], words[2], words[3]};
}

/// Eight columns of a quantized row. They are 8 aligned bytes, or 4 of two int4 each; eight floats or halves are aligned, too.
FA_HD void dequantize_8(const char* source, DType cache_dtype, const Scales& scales, DType dtype, char* target, int64_t group) {
  uint8_t bytes[8] = {};
  const bool is_int4 = cache_dtype == DType::kUInt8;
  if (source != nullptr && is_int4) {
    memcpy(bytes, __builtin_assume_aligned(source + group * 4, 4), 4);
  } else if (source != nullptr) {
    memcpy(bytes, __builtin_assume_aligned(source + group * 8, 8), 8);
  }
  float numbers[8];
  FA_UNROLL(8)
  for (int x = 0; x < 8; ++x) {
    const float number = source == nullptr ? 0.0f : stored_number(bytes[is_int4 ? x / 2 : x], cache_dtype, x);
    numbers[x] = number * scales.at(group * 8 + x);
  }
  write_8(target, dtype, group, numbers);
}

FA_HD void gather(const Args& a, const Chunk& chunk) {
  const TensorView& to = a.gathered[chunk.which];
  if (!to.present) return;
  const CacheStep step = step_of(a, chunk.sequence_idx);
  const KeyRange range = rows_to_gather(a, step);
  if (chunk.first >= range.end || chunk.first + kChunkRows <= range.begin) return;
  const int64_t rest = range.end - chunk.first, b = step.sequence.batch_idx;
  const PageTable table = page_table(a.p, chunk.sequence_idx);
  const Scales scales = scales_of(scale_of(a, chunk.which), chunk.head);
  const bool is_quantized = scales.data != nullptr;
  const Units& units = a.units[chunk.which];
  const int64_t columns = columns_of(a, chunk.which);
  const int pieces =
      static_cast<int>(is_quantized ? (units.gather_by_8 ? columns / 8 : columns) : columns * a.element_bytes / units.gathered);
  const int count = static_cast<int>(rest < kChunkRows ? rest : kChunkRows) * pieces;
  const int64_t first_target = table.is_paged() ? a.cu_seqlens_kv[chunk.sequence_idx] : 0;
  char* rows = bytes_at(to, b * to.stride[0] + chunk.head * to.stride[1] + first_target * to.stride[2], a.element_bytes);
  const DType cache_dtype = cache_of(a, chunk.which).dtype, dtype = a.p.query.dtype;
  FA_UNROLL(2)
  for (int idx = thread_idx(); idx < count; idx += kThreadsOfBlock) {
    const int64_t row = chunk.first + idx / pieces, slot = table.slot_of(row);
    const int piece = idx % pieces;
    const char* source = slot == PageTable::kNowhere ? nullptr : cache_row(a, chunk.which, table, b, chunk.head, slot);
    char* target = rows + row * to.stride[2] * a.element_bytes;
    if (!is_quantized) {
      move_unit_of(units.gathered, source, target, piece);
    } else if (units.gather_by_8) {
      dequantize_8(source, cache_dtype, scales, dtype, target, piece);
    } else {
      const uint8_t byte = source == nullptr ? 0 : static_cast<uint8_t>(source[cache_dtype == DType::kUInt8 ? piece / 2 : piece]);
      write_float(target, dtype, piece, source == nullptr ? 0.0f : stored_number(byte, cache_dtype, piece) * scales.at(piece));
    }
  }
}

/// What a windowed cache holds after a step of several rows: the last rows of the step's own memory, and zeros.
FA_HD void keep_window(const Args& a, const Chunk& chunk) {
  const TensorView& stage = cache_of(a, chunk.which);
  const TensorView& present = chunk.which == 0 ? a.p.cache.present_key : a.p.cache.present_value;
  const CacheStep step = step_of(a, chunk.sequence_idx);
  const int64_t seen = step.sequence.mask.kv_length, kept = a.rule.resident(step.first_position + seen);
  const int64_t b = step.sequence.batch_idx, bytes = a.cache_bytes[chunk.which];
  if (present.present)
    copy_rows(rows_of(present, b, chunk.head, 0, bytes), chunk.first, present.shape[2],
              rows_of(stage, b, chunk.head, seen - kept, bytes), kept, {0, 0}, present.shape[3] * bytes,
              a.units[chunk.which].present);
}

/// Block `block` of the second launch.
FA_HD void finish(const Args& a, unsigned block) {
  if (block < a.gather_blocks) return gather(a, Chunk(a, block));
  keep_window(a, Chunk(a, block - a.gather_blocks));
}

}  // namespace fa::cache_step
