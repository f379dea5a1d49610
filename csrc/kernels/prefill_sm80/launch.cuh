// SPDX-License-Identifier: Apache-2.0
// Launches one instance of the sm_80 kernel. Included by the generated instances only (instantiate.cmake).
#pragma once

#include "kernels/common/kernel_attributes.h"
#include "kernels/common/launch.h"
#include "kernels/prefill_sm80/instances.h"
#include "kernels/prefill_sm80/kernel.cuh"

namespace fa::prefill_sm80 {

template <class T, int kHeadDim, Variant kVariant>
cudaError_t launch_tiles(const AttentionParams& params, const TileGrid& grid, unsigned num_blocks, cudaStream_t stream) {
  using Config = TileConfig<T, kHeadDim, kVariant>;
  const auto kernel = attention_tile_kernel<Config>;
  const cudaError_t error = allow_shared_memory(kernel, Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, dim3(num_blocks, grid.num_splits), Config::kThreads, Config::kSharedBytes, stream, params, grid);
}

}  // namespace fa::prefill_sm80
