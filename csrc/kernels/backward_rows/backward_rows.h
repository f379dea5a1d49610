// SPDX-License-Identifier: Apache-2.0
// What all CUDA kernels of the backward pass have in common: the numbers of the query rows, gradients that are 0 because of where
// they lie, and those of sinks. A kernel's plan function counts its workspace with a Workspace and row_numbers(), and its launch
// function takes the same arrays from the context's memory, calls prepare_rows() first, and d_sinks_of_rows() at any time after.
#pragma once

#include "fa/backward.h"
#include "kernels/backward_rows/row_numbers.h"

namespace fa {

/// Cuts a workspace into arrays. With null memory it only counts.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* const array = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return array;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

/// Is the gradient of a bias a sum over this axis?
inline bool is_summed(const TensorView& d_bias, int axis) { return d_bias.shape[axis] > 1 && d_bias.stride[axis] == 0; }

/// No more than these are too few for the rounding of an output to be the mean of many.
constexpr int64_t kFewKeys = 32;

/// Are D wanted without the rounding of the output? In sums over the keys of a row, the gradients of sinks and of a bias that all
/// keys share, what is exact cancels almost all; and where no row sees more than a few keys, that rounding isn't the mean of
/// many. In sums over rows it is one error among others of many elements, of which the products' own are the larger,
/// but in float32.
inline bool needs_exact_deltas(const AttentionParams& params, const Gradients& gradients) {
  const bool has_window = params.window_left >= 0 && params.window_right >= 0;
  const bool sees_few = params.key.shape[2] <= kFewKeys ||
                        (has_window && params.window_left < kFewKeys && params.window_left + params.window_right < kFewKeys);
  const bool has_long_sums =
      gradients.d_bias.present && (is_summed(gradients.d_bias, 3) || params.query.dtype == DType::kFloat32);
  return has_long_sums || gradients.d_sinks.present || sees_few;
}

/// Arrays for a kernel with tiles of so many rows. `natural`: with `rest`.
RowNumbers row_numbers(const AttentionParams& params, int tile_rows, bool natural, Workspace* workspace);

/// Fills the numbers; writes 0 into the gradients of query rows that aren't in use, of tiles of rows that see no key by lengths
/// and windows, and, where there is a mask, of all rows; into those of keys outside of packed sequences; and into `counters`. The
/// gradients of all other keys, in use or not, are the kernel's. One launch, two with packed sequences.
Status prepare_rows(const AttentionParams& params, const Gradients& gradients, const RowNumbers& numbers, unsigned* counters,
                    int64_t num_counters, const ExecutionContext& context);

/// Writes gradients.d_sinks.
Status d_sinks_of_rows(const AttentionParams& params, const Gradients& gradients, const RowNumbers& numbers,
                       const ExecutionContext& context);

}  // namespace fa
