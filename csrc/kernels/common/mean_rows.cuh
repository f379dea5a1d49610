// SPDX-License-Identifier: Apache-2.0
// The mean of all values, or a given value, in rows that attend no key (EmptyRow::kMean, kValue), written by an attention kernel
// after its output; for problems in which all rows of a sequence see the same keys, or that have few keys. Elsewhere empty_rows/
// does it.
#pragma once

#include "kernels/common/hidden_values.cuh"

namespace fa {

/// For a whole warp, which looks at 32 keys at a time.
template <class T>
__device__ __forceinline__ bool sees_a_key(const RowView<T>& view) {
  const KeyRange keys = view.sequence.mask.key_range(view.row, view.row);
  bool sees = false;
#pragma unroll 1
  for (int64_t key = keys.begin + threadIdx.x % 32; key < keys.end; key += 32) sees |= view.may_see(key);
  return __any_sync(kAllLanes, sees);
}

/// Rows first_row … + num_rows - 1 (at most 64) of a sequence, those that exist, become the mean of its values, or their head's
/// value, if they see no key. For a whole warp; values are added in the order of their keys, so the result is always the same.
template <class T>
__device__ __noinline__ void write_empty_rows(const AttentionParams& p, const SequenceRule& sequences, int sequence_idx, int head,
                                              int first_row, int num_rows) {
  const Sequence sequence = sequence_at(sequences, sequence_idx);
  const int lane = threadIdx.x % 32, begin = max(first_row, 0);
  const int end = min(first_row + num_rows, static_cast<int>(sequence.query_length));
  if (begin >= end) return;
  const RowView<T> view{p, sequence, sequence_idx, head, begin};
  // 1. Which of the rows, a bit each, see no key? Without windows one stands for all.
  const bool rows_alike = p.window_left < 0 && p.window_right < 0;
  uint64_t empty = 0;
#pragma unroll 1
  for (int row = begin; row < (rows_alike ? begin + 1 : end); ++row) {
    const RowView<T> its{p, sequence, sequence_idx, head, row};
    if (!sees_a_key(its)) empty |= rows_alike ? ~uint64_t{0} : uint64_t{1} << (row - begin);
  }
  if (empty == 0) return;
  // 2. The mean, of one row where that is given: each lane has every 32nd column.
  const int columns = static_cast<int>(p.value.shape[3]);
  const bool given = p.empty_row == EmptyRow::kValue;
  const T* values = given ? static_cast<const T*>(p.empty_row_value.data) + head * p.empty_row_value.stride[0]
                          : view.row_of(p.value, view.key_head(), sequence.first_key);
  const int64_t count = given ? 1 : sequence.num_keys;
#pragma unroll 1
  for (int column = lane; column < columns; column += 32) {
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t key = 0; key < count; ++key) sum += to_float(values[key * p.value.stride[2] + column]);
    const float mean = sum / static_cast<float>(count);
    // 3. To these rows.
#pragma unroll 1
    for (int row = begin; row < end; ++row) {
      if ((empty >> (row - begin) & 1) == 0) continue;
      const RowView<T> its{p, sequence, sequence_idx, head, row};
      const OutputRow<T> out(its, p.out);
      out.store(column, mean * out.factor(its));
    }
  }
}

}  // namespace fa
