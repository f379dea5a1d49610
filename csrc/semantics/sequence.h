// SPDX-License-Identifier: Apache-2.0
// Where the rows and keys of one sequence lie, how many are in use, and where its first query stands: lengths, packed sequences
// and alignment resolved to row spans and a MaskRule. Used by the CPU kernel and, passed by value, by the CUDA kernels. Lengths
// come from the user at run time, so all are clamped: no span ever leaves its tensor.
#pragma once

#include "fa/attention.h"
#include "semantics/mask.h"

namespace fa {

/// A strided vector of int32 or int64; data null where absent.
struct IndexView {
  const void* data;
  int64_t stride;
  bool wide;  // int64

  FA_HD int64_t at(int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i * stride] : static_cast<const int32_t*>(data)[i * stride];
  }
};

/// One sequence: rows first_row … first_row + num_rows - 1 of entry batch_idx of query, out and lse; likewise the keys.
struct Sequence {
  int64_t batch_idx;
  int64_t first_row, num_rows;
  int64_t query_length;  // rows in use; those beyond are written 0
  int64_t first_key, num_keys;
  MaskRule mask;  // its kv_length is the keys in use
};

struct SequenceRule {
  int64_t num_sequences;  // batch entries, or packed ones
  IndexView kv_lengths, query_lengths, query_offsets;
  IndexView cu_seqlens_q, cu_seqlens_kv;  // both or none; of a cache step whose new rows nobody asks for, the first may be alone
  int64_t seqlen_q, seqlen_kv;            // of the tensors: all rows, where packed
  int64_t query_offset, window_left, window_right;
  bool align_bottom_right;

  /// Positions farther away than this see no key, or all: no sum of a position, a window and a row overflows.
  static constexpr int64_t kFarthest = int64_t{1} << 61;

  static FA_HD int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

  /// Sequence `b`. Of packed ones two more, without keys and with no row in use: the rows in front of the first sequence (b =
  /// num_sequences) and those behind the last (b = num_sequences + 1), which are written like other rows beyond a length.
  FA_HD Sequence at(int64_t b) const {
    Sequence s{b, 0, seqlen_q, seqlen_q, 0, seqlen_kv, {seqlen_kv, query_offset, window_left, window_right}};
    if (cu_seqlens_q.data != nullptr) {
      s.batch_idx = 0;
      if (b >= num_sequences) {
        const int64_t edge = clamp(cu_seqlens_q.at(b == num_sequences ? 0 : num_sequences), 0, seqlen_q);
        s.first_row = b == num_sequences ? 0 : edge;
        s.num_rows = b == num_sequences ? edge : seqlen_q - edge;
        s.query_length = s.num_keys = s.mask.kv_length = 0;
        return s;
      }
      s.first_row = clamp(cu_seqlens_q.at(b), 0, seqlen_q);
      s.num_rows = s.query_length = clamp(cu_seqlens_q.at(b + 1), s.first_row, seqlen_q) - s.first_row;
    }
    if (cu_seqlens_kv.data != nullptr) {
      s.first_key = clamp(cu_seqlens_kv.at(b), 0, seqlen_kv);
      s.num_keys = s.mask.kv_length = clamp(cu_seqlens_kv.at(b + 1), s.first_key, seqlen_kv) - s.first_key;
    }
    if (kv_lengths.data != nullptr) s.mask.kv_length = clamp(kv_lengths.at(b), 0, s.num_keys);
    if (query_lengths.data != nullptr) s.query_length = clamp(query_lengths.at(b), 0, s.num_rows);
    if (align_bottom_right) s.mask.query_offset += s.mask.kv_length - s.query_length;
    if (query_offsets.data != nullptr) s.mask.query_offset = clamp(query_offsets.at(b), -kFarthest, kFarthest);
    return s;
  }

  /// The packed sequence that row `row` of tensors packed by `starts` is in; any, where it is in none.
  FA_HD int64_t sequence_of(const IndexView& starts, int64_t row) const {
    int64_t first = 0, count = num_sequences;  // the last sequence that begins at or before the row is first … first + count - 1
    while (count > 1) {
      const int64_t half = count / 2;
      const bool later = starts.at(first + half) <= row;
      first += later ? half : 0;
      count = later ? count - half : half;
    }
    return first;
  }
};

FA_HD IndexView index_view(const TensorView& t) {
  return {t.present ? t.data : nullptr, t.shape[0] > 1 ? t.stride[0] : 0, t.dtype == DType::kInt64};
}

/// Sequences of a problem: batch entries, or packed ones.
inline int64_t num_sequences(const AttentionParams& p) {
  return p.cu_seqlens_q.present ? p.cu_seqlens_q.shape[0] - 1 : p.query.shape[0];
}

/// What SequenceRule::at takes: all sequences and, of packed ones, the rows outside of them. Together they are all rows.
inline int64_t num_spans(const AttentionParams& p) { return num_sequences(p) + (p.cu_seqlens_q.present ? 2 : 0); }

inline SequenceRule sequence_rule(const AttentionParams& p) {
  return {num_sequences(p),
          index_view(p.kv_lengths),
          index_view(p.query_lengths),
          index_view(p.query_offsets),
          index_view(p.cu_seqlens_q),
          index_view(p.cu_seqlens_kv),
          p.query.shape[2],
          p.key.shape[2],
          p.query_offset,
          p.window_left,
          p.window_right,
          p.align_bottom_right};
}

/// Can there be a key that is in use and hidden from some row? Keys beyond a length are not in use.
FA_HD bool hides_keys(const AttentionParams& p) {
  return p.window_left >= 0 || p.window_right >= 0 || p.mask.present || p.bias.present;
}

}  // namespace fa
