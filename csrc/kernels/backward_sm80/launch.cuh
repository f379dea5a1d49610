// SPDX-License-Identifier: Apache-2.0
// Launches one instance of the backward kernel for mma.sync. Included by the generated instances only (instantiate.cmake).
#pragma once

#include "kernels/backward_sm80/instances.h"
#include "kernels/backward_sm80/kernel.cuh"
#include "kernels/common/kernel_attributes.h"
#include "kernels/common/launch.h"

namespace fa::backward_sm80 {

template <class T, int kHeadDim, Variant kVariant>
cudaError_t launch_tiles(const AttentionParams& params, const Gradients& gradients, const Grid& grid, unsigned num_blocks,
                         unsigned num_row_tiles, cudaStream_t stream) {
  using Config = TileConfig<T, kHeadDim, kVariant>;
  const auto kernel = backward_tile_kernel<Config>;
  cudaError_t error = allow_shared_memory(kernel, Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  error = launch_kernel(kernel, dim3(num_blocks), Config::kThreads, Config::kSharedBytes, stream, params, gradients, grid);
  if (error != cudaSuccess || grid.num_splits.divisor == 1 || num_row_tiles == 0) return error;
  return launch_kernel(add_splits_kernel<Config>, dim3(num_row_tiles), Config::kThreads, 0, stream, params, gradients, grid);
}

}  // namespace fa::backward_sm80
