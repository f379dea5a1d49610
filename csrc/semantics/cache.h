// SPDX-License-Identifier: Apache-2.0
// A cache step of one sequence: which rows of the past stay, where its new rows go, and what its queries attend then. One
// CacheRule serves all modes, and problems without a cache, which are SequenceRule's alone. Positions and lengths come from the
// user at run time, so all are clamped. Used by the CPU kernel and by kernels/cache_step.
#pragma once

#include "semantics/sequence.h"

namespace fa {

struct CacheStep {
  Sequence sequence;       // keys, kv_length and query_offset count rows of the cache
  int64_t first_position;  // of the cache's row 0 in the sequence: above 0 only where a window has dropped rows
  int64_t first_past;      // first row of the past that stays
  int64_t num_past;        // rows of the past that stay: they become rows 0 … num_past - 1
  int64_t first_new;       // row that the first new row goes to
  int64_t first_fresh;     // that new row in new_key and new_value
  int64_t num_new;         // new rows in use
};

struct CacheRule {
  SequenceRule sequences;
  CacheMode mode;
  IndexView write_indices;
  int64_t past_rows;  // of the past's tensor
  int64_t num_new;    // of the new rows' tensor
  int64_t rows;       // that a sequence's cache has room for
  bool is_staged;     // kWindow: the step has memory of its own for all rows of the past and all new ones

  FA_HD CacheStep at(int64_t b) const {
    Sequence s = sequences.at(b);
    if (mode == CacheMode::kAppend) {
      if (sequences.cu_seqlens_kv.data == nullptr) return {s, 0, 0, past_rows, past_rows, 0, num_new};
      return {s, 0, 0, 0, s.first_key, s.first_key, s.num_keys};  // without a past, in the places of the new rows
    }
    const int64_t first_fresh = mode == CacheMode::kPaged ? s.first_key : 0;
    if (b >= sequences.num_sequences) return {s, 0, 0, 0, 0, first_fresh, 0};
    constexpr int64_t kMost = SequenceRule::kFarthest;
    const int64_t given = sequences.kv_lengths.data != nullptr ? SequenceRule::clamp(sequences.kv_lengths.at(b), 0, kMost) : -1;
    const int64_t start =
        SequenceRule::clamp(write_indices.data != nullptr ? write_indices.at(b) : given - s.query_length, 0, kMost);
    const int64_t length = given >= 0 ? given : start + s.query_length;
    const int64_t in_use = SequenceRule::clamp(length - start, 0, s.query_length);
    CacheStep step{s, 0, 0, past_rows, start, first_fresh, num_new > 0 ? in_use : 0};
    int64_t seen = SequenceRule::clamp(length, 0, rows);
    if (mode == CacheMode::kWindow) {
      const int64_t before = resident(start), after = resident(start + step.num_new);
      step.first_past = is_staged ? 0 : before + step.num_new - after;
      step.num_past = before - step.first_past;
      step.first_new = step.num_past;
      seen = step.num_past + step.num_new;
      step.first_position = start + step.num_new - seen;
    }
    step.sequence.first_key = 0;
    step.sequence.num_keys = step.sequence.mask.kv_length = seen;
    const int64_t offset = sequences.query_offsets.data != nullptr ? s.mask.query_offset
                           : sequences.align_bottom_right          ? step.first_position + seen - s.query_length
                                                                   : start;
    step.sequence.mask.query_offset = offset - step.first_position;
    return step;
  }

  /// Rows that a windowed cache holds after `length` rows of a sequence have gone in (ONNX Runtime's GroupQueryAttention with
  /// sliding_window_cache): all, or when it is full all but so many that one more than the slack above the window is free.
  FA_HD int64_t resident(int64_t length) const {
    if (length <= rows) return length;
    const int64_t freed = rows - sequences.window_left;  // window_left + 1 keys are the window
    return freed <= 0 ? rows : length - (length - rows + freed - 1) / freed * freed;
  }
};

/// The pages of one sequence. A slot is a row among those of all pages; of a cache without pages, a row.
struct PageTable {
  IndexView pages;    // page of row i: pages.at(i / page_rows)
  int64_t rows;       // that the sequence's pages have
  int64_t page_rows;  // 0: there are no pages, the cache is one piece
  int64_t num_pages;  // of all sequences
  static constexpr int64_t kNowhere = -1;

  FA_HD bool is_paged() const { return page_rows > 0; }
  FA_HD int64_t known(int64_t slot) const { return slot >= 0 && slot < num_pages * page_rows ? slot : kNowhere; }
  /// The slot of the sequence's row i; kNowhere in a page that there isn't.
  FA_HD int64_t slot_of(int64_t i) const {
    if (!is_paged()) return i;
    const int64_t page = pages.at(i / page_rows);
    return page < 0 || page >= num_pages ? kNowhere : page * page_rows + i % page_rows;
  }
  /// Where a slot's row begins, given the strides of rows and pages.
  FA_HD int64_t offset_of(int64_t slot, int64_t row_stride, int64_t page_stride) const {
    return is_paged() ? slot / page_rows * page_stride + slot % page_rows * row_stride : slot * row_stride;
  }
};

FA_HD PageTable page_table(const StepParams& p, int64_t sequence_idx) {
  if (p.cache.mode != CacheMode::kPaged) return {{nullptr, 0, false}, p.key.shape[2], 0, 0};
  const TensorView& t = p.cache.block_table;
  const bool wide = t.dtype == DType::kInt64;
  const int64_t first = sequence_idx * (t.shape[0] > 1 ? t.stride[0] : 0);
  return {{static_cast<const char*>(t.data) + first * (wide ? 8 : 4), t.shape[1] > 1 ? t.stride[1] : 0, wide},
          t.shape[1] * p.key.shape[2],
          p.key.shape[2],
          p.key.shape[0]};
}

/// The slot that new row i of a step goes to; kNowhere: it is not stored.
FA_HD int64_t slot_of_new_row(const StepParams& p, const CacheStep& step, const PageTable& table, int64_t i) {
  const int64_t row = step.first_new + i;
  const TensorView& slots = p.cache.slot_mapping;
  if (table.is_paged() && slots.present) return table.known(index_view(slots).at(step.first_fresh + i));
  return row < table.rows ? table.slot_of(row) : PageTable::kNowhere;
}

/// Position of new row i in its sequence: what a key is rotated by.
FA_HD int64_t position_of_new_row(const CacheRule& rule, const CacheStep& step, int64_t i) {
  return rule.sequences.cu_seqlens_kv.data != nullptr && rule.mode == CacheMode::kAppend
             ? i
             : step.first_position + step.first_new + i;
}

/// Likewise of query row i of a sequence.
FA_HD int64_t position_of_query(const CacheStep& step, int64_t i) {
  return step.first_position + step.sequence.mask.query_offset + i;
}

/// A step of several rows in a windowed cache may drop rows that it has still to read: they stay in memory of the step's own.
inline bool is_staged(const CacheParams& c) { return c.mode == CacheMode::kWindow && c.new_key.shape[2] > 1; }

inline CacheRule cache_rule(const StepParams& p) {
  const CacheParams& c = p.cache;
  CacheRule rule{sequence_rule(p),
                 c.mode,
                 index_view(c.write_indices),
                 c.past_key.present ? c.past_key.shape[2] : 0,
                 c.new_key.present ? c.new_key.shape[2] : 0,
                 c.mode == CacheMode::kWindow ? c.past_key.shape[2] : p.key.shape[2],
                 is_staged(c)};
  if (c.mode == CacheMode::kPaged) {
    rule.rows = c.block_table.shape[1] * p.key.shape[2];
    // The new rows of a sequence are as many as its query rows, in the same places.
    rule.sequences.cu_seqlens_kv = rule.sequences.cu_seqlens_q;
    rule.sequences.seqlen_kv = p.query.shape[2];
  }
  return rule;
}

}  // namespace fa
