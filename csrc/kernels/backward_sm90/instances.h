// SPDX-License-Identifier: Apache-2.0
// Declares what the generated sources define, so that the host compiler needs no kernel code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fa/backward.h"
#include "kernels/backward_rows/row_numbers.h"

namespace fa::backward_sm90 {

inline constexpr int kSharedLimit = 227 * 1024;  // bytes of shared memory that an instance may take

enum class Variant : uint8_t {
  kPlain,
  kTall,    // tiles of more query rows, whose share of a step's waiting is smaller; between 64 and 128 columns
  kBias,    // adds a bias, which the copy engine brings
  kPacked,  // packed sequences
};

/// Query rows and keys of a tile.
constexpr int tile_rows(int head_dim, Variant variant) {
  if (head_dim <= 64) return 128;
  return variant == Variant::kTall ? 80 : 64;
}

inline constexpr int kTileKeys = 128;

/// Thread blocks that have an item together.
constexpr int blocks_of_item(int head_dim) { return head_dim <= 128 ? 1 : 2; }

template <typename T, int kHeadDim, Variant kVariant>
Status launch_instance(const BackwardPlan& plan, const AttentionParams& params, const Gradients& gradients,
                       const ExecutionContext& context);

/// The gradient of the bias (bias_gradient.cuh), behind prepare_rows().
template <typename T, int kHeadDim>
Status launch_bias_gradient(const BackwardPlan& plan, const AttentionParams& params, const Gradients& gradients,
                            const RowNumbers& rows, const ExecutionContext& context);

}  // namespace fa::backward_sm90
