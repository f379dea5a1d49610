// SPDX-License-Identifier: Apache-2.0
// The first launch of a cache step, block by block: queries, new rows, the rows of the past that are kept elsewhere, windows that
// move in place, masks of windows, lengths. No two blocks write the same bytes and none reads what another one writes.
#pragma once

#include "kernels/cache_step/rows.h"

namespace fa::cache_step {

FA_HD const TensorView& fresh_of(const Args& a, int which) { return which == 0 ? a.p.cache.new_key : a.p.cache.new_value; }
FA_HD const TensorView& past_of(const Args& a, int which) { return which == 0 ? a.p.cache.past_key : a.p.cache.past_value; }
FA_HD const TensorView& cache_of(const Args& a, int which) { return which == 0 ? a.p.key : a.p.value; }
FA_HD const TensorView& scale_of(const Args& a, int which) { return which == 0 ? a.p.cache.key_scale : a.p.cache.value_scale; }
FA_HD int64_t columns_of(const Args& a, int which) { return which == 0 ? a.p.query.shape[3] : a.p.out.shape[3]; }

/// Row `slot` of a head's cache.
FA_HD char* cache_row(const Args& a, int which, const PageTable& table, int64_t batch_idx, int64_t head, int64_t slot) {
  const TensorView& cache = cache_of(a, which);
  const int64_t first = (table.is_paged() ? 0 : batch_idx * cache.stride[0]) + head * cache.stride[1];
  return bytes_at(cache, first + table.offset_of(slot, cache.stride[2], cache.stride[0]), a.cache_bytes[which]);
}

/// New row i of a sequence, by a warp.
FA_HD void store_new_row(const Args& a, const CacheStep& step, int64_t sequence_idx, int which, int64_t head, int64_t i) {
  const PageTable table = page_table(a.p, sequence_idx);
  const int64_t slot = slot_of_new_row(a.p, step, table, i), b = step.sequence.batch_idx, row = step.first_fresh + i;
  if (slot == PageTable::kNowhere) return;
  const TensorView &fresh = fresh_of(a, which), &cache = cache_of(a, which);
  const char* source = bytes_at(fresh, b * fresh.stride[0] + head * fresh.stride[1] + row * fresh.stride[2], a.element_bytes);
  char* target = cache_row(a, which, table, b, head, slot);
  const Scales scales = scales_of(scale_of(a, which), head);
  const bool is_transformed = which == 0 && (a.p.norm.key_weight.present || a.p.rotary.cos.present);
  if (!is_transformed && scales.data == nullptr) {  // as it is
    const int unit = a.units[which].fresh;
    const int64_t units = columns_of(a, which) * a.element_bytes / unit;
    for (int64_t idx = lane_idx(); idx < units; idx += kLanes) move_unit_of(unit, source, target, idx);
    return;
  }
  const int64_t position = position_of_new_row(a.rule, step, i);
  const FreshRow from = is_transformed ? transformed_row(a.p, a.p.norm.key_weight, a.p.norm.key_epsilon, source, fresh.dtype,
                                                         columns_of(a, which), b, row, position)
                                       : plain_row(source, fresh.dtype, columns_of(a, which));
  write_row(from, scales, cache.dtype, target);
}

/// Queries as attention reads them: a warp a row. Rows that aren't in use become 0: attention computes them beside others, of
/// which they may decide whether a maximum is moved, and so how these are rounded.
FA_HD void store_queries(const Args& a, unsigned block) {
  const auto heads = static_cast<unsigned>(a.p.query.shape[1]), rows = static_cast<unsigned>(a.p.query.shape[2]);
  const auto count = static_cast<unsigned>(a.p.query.shape[0]) * heads * rows;
  const IndexView& starts = a.rule.sequences.cu_seqlens_q;
  for (int warp = warp_idx(); warp < kWarps; warp += kWarpsOfBlock) {
    const unsigned idx = block * kWarps + warp, head = idx % heads, row = idx / heads % rows;
    if (idx >= count) return;
    const CacheStep step = step_of(a, starts.data != nullptr ? a.rule.sequences.sequence_of(starts, row) : idx / heads / rows);
    const int64_t i = int64_t{row} - step.sequence.first_row, b = step.sequence.batch_idx;
    const TensorView& query = a.p.query;
    char* target = bytes_at(a.query, b * a.query.stride[0] + head * a.query.stride[1] + row * a.query.stride[2], a.element_bytes);
    if (i < 0 || i >= step.sequence.query_length) {
      const int64_t units = query.shape[3] * a.element_bytes / 2;
      for (int64_t x = lane_idx(); x < units; x += kLanes) move_unit<uint16_t>(nullptr, target, x);
      continue;
    }
    const char* source = bytes_at(query, b * query.stride[0] + head * query.stride[1] + row * query.stride[2], a.element_bytes);
    const FreshRow fresh = transformed_row(a.p, a.p.norm.query_weight, a.p.norm.query_epsilon, source, query.dtype,
                                           query.shape[3], b, row, position_of_query(step, i));
    write_row(fresh, {nullptr, 0}, query.dtype, target);
  }
}

/// New rows into the cache: a warp a row.
FA_HD void store_new_rows(const Args& a, unsigned block) {
  const TensorView& fresh = a.p.cache.new_key;
  const auto heads = static_cast<unsigned>(fresh.shape[1]), rows = static_cast<unsigned>(fresh.shape[2]);
  const unsigned sides = a.p.cache.new_value.present ? 2 : 1;
  const IndexView& starts = a.rule.sequences.cu_seqlens_kv;
  for (int warp = warp_idx(); warp < kWarps; warp += kWarpsOfBlock) {
    const unsigned idx = block * kWarps + warp, head = idx % heads, row = idx / heads / sides % rows;
    const unsigned b = idx / heads / sides / rows;
    if (b >= fresh.shape[0]) return;
    const int64_t sequence_idx = starts.data != nullptr ? a.rule.sequences.sequence_of(starts, row) : b;
    const CacheStep step = step_of(a, sequence_idx);
    const int64_t i = int64_t{row} - step.first_fresh;
    if (i >= 0 && i < step.num_new) store_new_row(a, step, sequence_idx, static_cast<int>(idx / heads % sides), head, i);
  }
}

/// A chunk of one head's cache: key or value.
struct Chunk {
  int which;
  int64_t sequence_idx, head, first;  // first row

  FA_HD Chunk(const Args& a, unsigned block)
      : which(static_cast<int>(block / a.chunks % 2)),
        sequence_idx(block / a.chunks / 2 / static_cast<unsigned>(a.p.key.shape[1])),
        head(block / a.chunks / 2 % static_cast<unsigned>(a.p.key.shape[1])),
        first(int64_t{block % a.chunks} * kChunkRows) {}
};

/// Rows of one head as bytes.
struct RowBytes {
  char* first;
  int64_t stride;
};

FA_HD RowBytes rows_of(const TensorView& t, int64_t batch_idx, int64_t head, int64_t row, int64_t element_bytes) {
  return {bytes_at(t, batch_idx * t.stride[0] + head * t.stride[1] + row * t.stride[2], element_bytes),
          t.stride[2] * element_bytes};
}

/// Rows first … first + kChunkRows - 1 of `to`, as far as there are `rows`, from those of `from`, of which there are `num_from`;
/// the others become 0. Rows of `left_out` stay as they are.
FA_HD void copy_rows(const RowBytes& to, int64_t first, int64_t rows, const RowBytes& from, int64_t num_from, KeyRange left_out,
                     int64_t row_bytes, int unit) {
  const int64_t rest = rows - first;
  const int units = static_cast<int>(row_bytes / unit), count = static_cast<int>(rest < kChunkRows ? rest : kChunkRows) * units;
  FA_UNROLL(4)
  for (int idx = thread_idx(); idx < count; idx += kThreadsOfBlock) {
    const int64_t row = first + idx / units;
    if (row >= left_out.begin && row < left_out.end) continue;
    move_unit_of(unit, row < num_from ? from.first + row * from.stride : nullptr, to.first + row * to.stride, idx % units);
  }
}

/// Rows of the past into a cache that is other memory; those that nothing is written to become 0.
FA_HD void keep_past(const Args& a, const Chunk& chunk) {
  const TensorView &past = past_of(a, chunk.which), &cache = cache_of(a, chunk.which);
  const CacheStep step = step_of(a, chunk.sequence_idx);
  const int64_t b = step.sequence.batch_idx, bytes = a.cache_bytes[chunk.which];
  if (past.present)
    copy_rows(rows_of(cache, b, chunk.head, 0, bytes), chunk.first, cache.shape[2],
              rows_of(past, b, chunk.head, step.first_past, bytes), step.num_past,
              {step.first_new, step.first_new + step.num_new}, cache.shape[3] * bytes, a.units[chunk.which].past);
}

/// `count` units of rows, from `distance` bytes behind the place that they go to. All that a round writes it has read before.
template <class Unit>
FA_HD void move_down(const RowBytes& rows, int64_t distance, int units, int64_t count) {
  constexpr int kHeld = 8;
  for (int64_t base = 0; base < count; base += kHeld * kThreadsOfBlock) {
    Unit held[kHeld];
    FA_UNROLL(8)
    for (int i = 0; i < kHeld; ++i) {
      const int64_t idx = base + i * kThreadsOfBlock + thread_idx();
      if (idx < count) held[i] = reinterpret_cast<const Unit*>(rows.first + distance + idx / units * rows.stride)[idx % units];
    }
    sync_block();
    FA_UNROLL(8)
    for (int i = 0; i < kHeld; ++i) {
      const int64_t idx = base + i * kThreadsOfBlock + thread_idx();
      if (idx < count) reinterpret_cast<Unit*>(rows.first + idx / units * rows.stride)[idx % units] = held[i];
    }
    sync_block();
  }
}

/// A window that is changed in place: its rows move towards row 0, then the new one is written. One block a head.
FA_HD void slide_window(const Args& a, unsigned block) {
  const auto heads = static_cast<unsigned>(a.p.key.shape[1]);
  const int64_t sequence_idx = block / 2 / heads, head = block / 2 % heads;
  const int which = static_cast<int>(block % 2), unit = a.units[which].past;
  const TensorView& cache = cache_of(a, which);
  const CacheStep step = step_of(a, sequence_idx);
  const int64_t bytes = a.cache_bytes[which];
  const int units = static_cast<int>(cache.shape[3] * bytes / unit);
  const RowBytes rows = rows_of(cache, step.sequence.batch_idx, head, 0, bytes);
  const int64_t distance = step.first_past * rows.stride;
  if (distance > 0) {
    const int64_t count = step.num_past * units;
    if (unit == 16) {
      move_down<uint4>(rows, distance, units, count);
    } else if (unit == 4) {
      move_down<uint32_t>(rows, distance, units, count);
    } else if (unit == 2) {
      move_down<uint16_t>(rows, distance, units, count);
    } else {
      move_down<uint8_t>(rows, distance, units, count);
    }
  }
  for (int64_t i = warp_idx(); i < step.num_new; i += kWarpsOfBlock) store_new_row(a, step, sequence_idx, which, head, i);
}

/// Mask or bias of a windowed cache by row of the cache: a warp a row. What they do not reach is hidden, as is what is not used.
FA_HD void shift_mask(const Args& a, const TensorView& from, const TensorView& to, int64_t row_idx) {
  const int64_t rows = to.stride[2] != 0 ? to.shape[2] : 1, heads = to.stride[1] != 0 ? to.shape[1] : 1;
  const int64_t i = row_idx % rows, head = row_idx / rows % heads, b = row_idx / rows / heads;
  if (b >= to.shape[0]) return;
  const CacheStep step = step_of(a, b);
  const int64_t source = b * from.stride[0] + head * from.stride[1] + i * from.stride[2];
  const int64_t target = b * to.stride[0] + head * to.stride[1] + i * to.stride[2];
  for (int64_t x = lane_idx(); x < to.shape[3]; x += kLanes) {
    const int64_t column = step.first_position + x;
    const bool exists = x < step.sequence.mask.kv_length && column < from.shape[3];
    if (from.dtype == DType::kBool) {
      static_cast<uint8_t*>(to.data)[target + x] =
          exists ? static_cast<const uint8_t*>(from.data)[source + column * from.stride[3]] : 0;
    } else {
      write_float(to.data, to.dtype, target + x,
                  exists ? read_float(from.data, from.dtype, source + column * from.stride[3]) : -INFINITY);
    }
  }
}

FA_HD void shift_masks(const Args& a, int64_t block) {
  for (int warp = warp_idx(); warp < kWarps; warp += kWarpsOfBlock) {
    if (a.mask.present) shift_mask(a, a.p.mask, a.mask, block * kWarps + warp);
    if (a.bias.present) shift_mask(a, a.p.bias, a.bias, block * kWarps + warp);
  }
}

/// Lengths and positions for the attention kernels: one block for all sequences.
FA_HD void store_lengths(const Args& a) {
  const int64_t count = a.rule.sequences.num_sequences;
  int64_t first_key = 0;
  if (a.cu_seqlens_kv != nullptr && thread_idx() == 0) a.cu_seqlens_kv[0] = 0;
  for (int64_t first = 0; first < count; first += kThreadsOfBlock) {
    const int64_t b = first + thread_idx();
    const MaskRule mask = b < count ? step_of(a, b).sequence.mask : MaskRule{0, 0, 0, 0};
    if (a.kv_lengths != nullptr && b < count) a.kv_lengths[b] = mask.kv_length;
    if (b < count) a.query_offsets[b] = mask.query_offset;
    if (a.cu_seqlens_kv == nullptr) continue;
    int64_t total = 0;
    const int64_t end = first_key + block_scan(mask.kv_length, &total);
    if (b < count) a.cu_seqlens_kv[b + 1] = static_cast<int32_t>(end);
    first_key += total;
  }
}

/// Block `block` of the first launch.
FA_HD void store(const Args& a, unsigned block) {
  if (block < a.query_blocks) return store_queries(a, block);
  block -= a.query_blocks;
  if (block < a.new_blocks) return store_new_rows(a, block);
  block -= a.new_blocks;
  if (block < a.past_blocks) return keep_past(a, Chunk(a, block));
  block -= a.past_blocks;
  if (block < a.window_blocks) return slide_window(a, block);
  block -= a.window_blocks;
  if (block < a.mask_blocks) return shift_masks(a, block);
  store_lengths(a);
}

}  // namespace fa::cache_step
