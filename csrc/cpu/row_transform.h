// SPDX-License-Identifier: Apache-2.0
// What becomes of a row of queries or new keys before it is used: RMS norm, then rotary embedding. Used by tile_kernel.cpp and
// store_rows.h; compiled once for each instruction set.
#pragma once

#include "cpu/convert.h"
#include "semantics/cache.h"
#include "semantics/transform.h"

namespace fa::cpu::FA_ISA {
namespace {  // no copy for the linker to share among instruction sets

/// The transformation of the rows of one sequence. `memory` holds transform_floats(D) floats.
class RowTransform {
 public:
  RowTransform(const StepParams& p, const CacheStep& step, const TensorView& norm_weight, float epsilon, float* memory)
      : rotary_(p.rotary),
        batch_idx_(step.sequence.batch_idx),
        columns_(p.query.shape[3]),
        rotated_(rotary_columns(p.rotary)),
        epsilon_(epsilon),
        weight_(norm_weight.present ? memory : nullptr),
        cos_(memory + columns_),
        sin_(cos_ + columns_) {
    if (weight_ != nullptr) to_float(norm_weight.data, norm_weight.dtype, weight_, columns_);
  }

  static int64_t transform_floats(int64_t columns) { return 3 * columns; }

  /// Row `row` of the batch entry (of all packed rows), at `position` in its sequence.
  void apply(float* x, int64_t row, int64_t position) const {
    if (weight_ != nullptr) normalise(x);
    if (rotated_.num_pairs == 0) return;
    load_angles(row, position);
    for (int64_t i = 0; i < rotated_.num_pairs; ++i) {
      const int64_t first = rotated_.first(i), second = rotated_.second(i);
      const float a = x[first], b = x[second];
      x[first] = rotated_first(a, b, cos_[i], sin_[i]);
      x[second] = rotated_second(a, b, cos_[i], sin_[i]);
    }
  }

 private:
  void normalise(float* x) const {
    double squares = 0;
    for (int64_t i = 0; i < columns_; ++i) squares += static_cast<double>(x[i]) * x[i];
    const float factor = norm_factor(static_cast<float>(squares / static_cast<double>(columns_)), epsilon_);
    for (int64_t i = 0; i < columns_; ++i) x[i] *= factor * weight_[i];
  }

  void load_angles(int64_t row, int64_t position) const {
    load_angle(rotary_.cos, row, position, cos_);
    load_angle(rotary_.sin, row, position, sin_);
  }

  void load_angle(const TensorView& t, int64_t row, int64_t position, float* target) const {
    const int64_t at = angles_of(rotary_, t, batch_idx_, row, position);
    to_float(static_cast<const char*>(t.data) + at * size_of(t.dtype), t.dtype, target, rotated_.num_pairs);
  }

  const RotaryParams& rotary_;
  const int64_t batch_idx_, columns_;
  const RotaryColumns rotated_;
  const float epsilon_;
  float* const weight_;
  float* const cos_;
  float* const sin_;
};

}  // namespace
}  // namespace fa::cpu::FA_ISA
