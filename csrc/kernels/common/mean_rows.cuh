// SPDX-License-Identifier: Apache-2.0
// The mean of all values, or a given value, in rows that attend no key (EmptyRow::kMean, kValue), written by an attention kernel
// after its output; for problems in which all rows of a sequence see the same keys. Elsewhere empty_rows/ does it.
#pragma once

#include "kernels/common/hidden_values.cuh"

namespace fa {

/// Rows first_row … + num_rows - 1 of a sequence, those that exist, become the mean of its values, or their head's value, if they
/// see no key. For a whole warp; values are added in the order of their keys, so the result is always the same.
template <class T>
__device__ __noinline__ void write_empty_rows(const AttentionParams& p, const SequenceRule& sequences, int sequence_idx, int head,
                                              int first_row, int num_rows) {
  const Sequence sequence = sequences.at(sequence_idx);
  const int lane = threadIdx.x % 32, begin = max(first_row, 0);
  const int end = min(first_row + num_rows, static_cast<int>(sequence.query_length));
  if (begin >= end) return;
  const RowView<T> view{p, sequence, sequence_idx, head, begin};
  // 1. Does one of the rows, and so each, see a key?
  bool sees = false;
  for (int64_t key = lane; key < sequence.num_keys; key += 32) sees |= view.may_see(key);
  if (__any_sync(kAllLanes, sees)) return;
  // 2. The mean, of one row where that is given: each lane has every 32nd column.
  const int columns = static_cast<int>(p.value.shape[3]);
  const bool given = p.empty_row == EmptyRow::kValue;
  const T* values = given ? static_cast<const T*>(p.empty_row_value.data) + head * p.empty_row_value.stride[0]
                          : view.row_of(p.value, view.key_head(), sequence.first_key);
  const int64_t count = given ? 1 : sequence.num_keys;
  for (int column = lane; column < columns; column += 32) {
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t key = 0; key < count; ++key) sum += to_float(values[key * p.value.stride[2] + column]);
    const float mean = sum / static_cast<float>(count);
    // 3. To all the rows.
    for (int row = begin; row < end; ++row) {
      const RowView<T> its{p, sequence, sequence_idx, head, row};
      const OutputRow<T> out(its, p.out);
      out.store(column, mean * out.factor(its));
    }
  }
}

}  // namespace fa
