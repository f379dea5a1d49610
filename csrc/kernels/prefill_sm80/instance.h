// SPDX-License-Identifier: Apache-2.0
// The compiled instances of the sm_80 kernel: one for each element type, head_dim bucket and variant that instantiate.cmake
// lists. Used by prefill_sm80.cpp and decode_splitkv.cpp; defined in the generated sources.
#pragma once

#include <cuda_runtime.h>

#include "fa/attention.h"
#include "kernels/prefill_sm80/config.h"

namespace fa::prefill_sm80 {

struct TileGrid;

struct TileInstance {
  DType dtype;
  int head_dim;  // bucket: the largest head_dim and head_dim_v it takes
  Variant variant;
  cudaError_t (*launch)(const AttentionParams& params, const TileGrid& grid, unsigned num_blocks, cudaStream_t stream);

  TileShape tile() const { return tile_shape(dtype == DType::kFloat32 ? 4 : 2, head_dim, variant); }
  int shared_bytes() const { return shared_memory_bytes(dtype == DType::kFloat32 ? 4 : 2, head_dim, tile()); }
};

/// The smallest instance that takes heads of this size; null where none does.
const TileInstance* find_instance(const AttentionParams& params, Variant variant);

/// A kernel's plan function (dispatch.h) for the instances of one variant: sets plan->instance.
bool plan_instance(const AttentionParams& params, Variant variant, Plan* plan, std::string* why_not);

/// The instance that plan_instance chose.
const TileInstance& instance_of(const Plan& plan);

/// Launches it. The grid's splits and partials are the caller's; everything else is filled in here.
Status launch_instance(const Plan& plan, const AttentionParams& params, TileGrid grid, const ExecutionContext& context);

}  // namespace fa::prefill_sm80
