// SPDX-License-Identifier: Apache-2.0
// What becomes of a row of queries or new keys before it is used: RMS norm, then rotary embedding. Which columns are rotated
// together, by which angle, and the arithmetic. Used by the CPU kernel and by kernels/cache_step.
#pragma once

#include <cmath>

#include "semantics/sequence.h"

namespace fa {

/// What a head's columns are multiplied by, beside their weights.
FA_HD float norm_factor(float mean_of_squares, float epsilon) { return 1.0f / sqrtf(mean_of_squares + epsilon); }

/// The pairs of columns that are rotated: the first 2 * num_pairs columns of a head, by pairs.
struct RotaryColumns {
  int64_t num_pairs;  // 0: none
  bool interleaved;

  FA_HD int64_t first(int64_t pair) const { return interleaved ? 2 * pair : pair; }
  FA_HD int64_t second(int64_t pair) const { return interleaved ? 2 * pair + 1 : pair + num_pairs; }
  /// The pair of a column below 2 * num_pairs.
  FA_HD int64_t pair_of(int64_t column) const {
    return interleaved ? column / 2 : column < num_pairs ? column : column - num_pairs;
  }
};

FA_HD RotaryColumns rotary_columns(const RotaryParams& rotary) {
  return {!rotary.cos.present ? 0 : rotary.by_row ? rotary.cos.shape[2] : rotary.cos.shape[1], rotary.interleaved};
}

/// Are a row's angles those of its position in its sequence?
FA_HD bool rotates_by_position(const RotaryParams& rotary) {
  return rotary.cos.present && !rotary.by_row && !rotary.position_ids.present;
}

FA_HD float rotated_first(float first, float second, float cos, float sin) { return first * cos - second * sin; }
FA_HD float rotated_second(float first, float second, float cos, float sin) { return second * cos + first * sin; }

/// Where the angles of a row begin in `table` (rotary.cos or rotary.sin), in elements. `row`: in its batch entry, of all packed
/// rows where packed. `position`: in its sequence.
FA_HD int64_t angles_of(const RotaryParams& rotary, const TensorView& table, int64_t batch_idx, int64_t row, int64_t position) {
  if (rotary.by_row) return batch_idx * table.stride[0] + row * table.stride[1];
  if (rotary.position_ids.present) {
    const TensorView& ids = rotary.position_ids;
    position = IndexView{ids.data, 1, ids.dtype == DType::kInt64}.at(batch_idx * ids.stride[0] + row * ids.stride[1]);
  }
  return SequenceRule::clamp(position, 0, table.shape[0] - 1) * table.stride[0];
}

}  // namespace fa
