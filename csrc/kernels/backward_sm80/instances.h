// SPDX-License-Identifier: Apache-2.0
// Declares what the generated sources define, so that the host compiler needs no kernel code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/backward_sm80/config.h"
#include "kernels/backward_sm80/grid.h"

namespace fa::backward_sm80 {

/// num_blocks: pairs of sequence and key head, times splits, and helpers; num_row_tiles: RowTiles of all heads.
template <class T, int kHeadDim, Variant kVariant>
cudaError_t launch_tiles(const AttentionParams& params, const Gradients& gradients, const Grid& grid, unsigned num_blocks,
                         unsigned num_row_tiles, cudaStream_t stream);

/// The sums over tiles of scores (score_sums.cuh), with the tiles of Variant::kModified.
template <class T, int kHeadDim>
cudaError_t launch_sums(const AttentionParams& params, const Gradients& gradients, const Grid& grid, const ScoreSums& sums,
                        unsigned num_blocks, cudaStream_t stream);

}  // namespace fa::backward_sm80
