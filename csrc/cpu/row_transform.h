// SPDX-License-Identifier: Apache-2.0
// What becomes of a row of queries or new keys before it is used: RMS norm, then rotary embedding. Used by tile_kernel.cpp and
// store_rows.h; compiled once for each instruction set.
#pragma once

#include <cmath>

#include "cpu/convert.h"
#include "semantics/cache.h"

namespace fa::cpu::FA_ISA {
namespace {  // no copy for the linker to share among instruction sets

/// The transformation of the rows of one sequence. `memory` holds transform_floats(D) floats.
class RowTransform {
 public:
  RowTransform(const StepParams& p, const CacheStep& step, const TensorView& norm_weight, float epsilon, float* memory)
      : rotary_(p.rotary),
        batch_idx_(step.sequence.batch_idx),
        columns_(p.query.shape[3]),
        half_(p.rotary.cos.present ? p.rotary.cos.shape[p.rotary.by_row ? 2 : 1] : 0),
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
    if (half_ == 0) return;
    load_angles(row, position);
    const int64_t step = rotary_.interleaved ? 2 : 1, partner = rotary_.interleaved ? 1 : half_;
    for (int64_t i = 0; i < half_; ++i) {
      const float a = x[i * step], b = x[i * step + partner];
      x[i * step] = a * cos_[i] - b * sin_[i];
      x[i * step + partner] = b * cos_[i] + a * sin_[i];
    }
  }

 private:
  void normalise(float* x) const {
    double squares = 0;
    for (int64_t i = 0; i < columns_; ++i) squares += static_cast<double>(x[i]) * x[i];
    const float factor = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(columns_) + epsilon_));
    for (int64_t i = 0; i < columns_; ++i) x[i] *= factor * weight_[i];
  }

  void load_angles(int64_t row, int64_t position) const {
    if (rotary_.position_ids.present) {
      const TensorView& ids = rotary_.position_ids;
      const int64_t at = batch_idx_ * ids.stride[0] + row * ids.stride[1];
      position =
          ids.dtype == DType::kInt64 ? static_cast<const int64_t*>(ids.data)[at] : static_cast<const int32_t*>(ids.data)[at];
    }
    load_angle(rotary_.cos, row, position, cos_);
    load_angle(rotary_.sin, row, position, sin_);
  }

  void load_angle(const TensorView& t, int64_t row, int64_t position, float* target) const {
    const int64_t last = t.shape[0] - 1;
    const int64_t at = rotary_.by_row ? batch_idx_ * t.stride[0] + row * t.stride[1]
                                      : (position < 0      ? 0
                                         : position > last ? last
                                                           : position) *
                                            t.stride[0];
    to_float(static_cast<const char*>(t.data) + at * element_bytes(t.dtype), t.dtype, target, half_);
  }

  const RotaryParams& rotary_;
  const int64_t batch_idx_, columns_, half_;
  const float epsilon_;
  float* const weight_;
  float* const cos_;
  float* const sin_;
};

}  // namespace
}  // namespace fa::cpu::FA_ISA
