// SPDX-License-Identifier: Apache-2.0
// Declares what the generated sources define, so that the host compiler needs no kernel code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/prefill_sm80/instance.h"

namespace fa::prefill_sm80 {

template <class T, int kHeadDim, Variant kVariant>
cudaError_t launch_tiles(const AttentionParams& params, const TileGrid& grid, unsigned num_blocks, cudaStream_t stream);

}  // namespace fa::prefill_sm80
