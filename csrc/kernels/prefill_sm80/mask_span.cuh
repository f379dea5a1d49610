// SPDX-License-Identifier: Apache-2.0
// Which keys the user's mask leaves to a tile (common/mask_span.cuh). Called by whole thread blocks.
#pragma once

#include "kernels/common/mask_span.cuh"
#include "kernels/prefill_sm80/tile_work.cuh"

namespace fa::prefill_sm80 {

/// Fills work.keys and work.mask_by_element. `shared`: a TrueKeys for each warp, free again on return.
template <int kThreads>
__device__ __forceinline__ void find_mask_span(const AttentionParams& p, TileWork& work, unsigned char* shared) {
  const TensorView& mask = p.mask;
  if (!mask.present) return;
  work.keys.end = min(work.keys.end, static_cast<int>(mask.shape[3]));
  work.mask_by_element = true;
  if (!is_alike_for_rows(mask)) return;
  const uint8_t* row =
      static_cast<const uint8_t*>(mask.data) + work.sequence.batch_idx * mask.stride[0] + work.head * mask.stride[1];
  auto* of_warp = reinterpret_cast<TrueKeys*>(shared);
  const TrueKeys own = scan_mask_row<kThreads>(row, mask.stride[3], work.keys.end, threadIdx.x).over_warp();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = own;
  __syncthreads();
  TrueKeys keys = of_warp[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) keys = keys + of_warp[i];
  __syncthreads();
  work.keys = {keys.begin(), keys.end};
  work.mask_by_element = keys.has_holes();
}

}  // namespace fa::prefill_sm80
