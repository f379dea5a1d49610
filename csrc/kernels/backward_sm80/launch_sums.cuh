// SPDX-License-Identifier: Apache-2.0
// Launches one instance of the sums over tiles of scores. Included by the generated instances only (instantiate.cmake).
#pragma once

#include "kernels/backward_sm80/instances.h"
#include "kernels/backward_sm80/score_sums.cuh"
#include "kernels/common/kernel_attributes.h"
#include "kernels/common/launch.h"

namespace fa::backward_sm80 {

template <class T, int kHeadDim>
cudaError_t launch_sums(const AttentionParams& params, const Gradients& gradients, const Grid& grid, const ScoreSums& sums,
                        unsigned num_blocks, cudaStream_t stream) {
  using Config = TileConfig<T, kHeadDim, Variant::kModified>;
  const auto kernel = score_sums_kernel<Config>;
  const cudaError_t error = allow_shared_memory(kernel, Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, dim3(num_blocks), Config::kThreads, Config::kSharedBytes, stream, params, gradients, grid, sums);
}

}  // namespace fa::backward_sm80
