// SPDX-License-Identifier: Apache-2.0
// A mask that is the same for all rows of a head (padding as a bool [B, 1, 1, S_kv]) is read once before the first tile: keys
// outside its true ones are never visited, and where these are neighbours the mask is a range and costs nothing more. Called by
// whole thread blocks.
#pragma once

#include "kernels/common/reduce.cuh"
#include "kernels/prefill_sm80/tile_work.cuh"

namespace fa {

/// Fills work.keys and work.mask_by_element. `shared`: 12 bytes for each warp, free again on return.
template <int kThreads>
__device__ __forceinline__ void find_mask_span(const AttentionParams& p, TileWork& work, unsigned char* shared) {
  const TensorView& mask = p.mask;
  const Sequence& s = work.sequence;
  if (!mask.present) return;
  work.keys.end = min(s.mask.kv_length, mask.shape[3]);
  work.mask_by_element = true;
  if (mask.shape[2] != 1 && mask.stride[2] != 0) return;
  const uint8_t* data = static_cast<const uint8_t*>(mask.data) + s.batch_idx * mask.stride[0] + work.head * mask.stride[1];
  const int num_keys = static_cast<int>(work.keys.end);
  int first = num_keys, end = 0, count = 0;
#pragma unroll 8
  for (int key = threadIdx.x; key < num_keys; key += kThreads) {
    if (data[key * mask.stride[3]] != 0) first = min(first, key), end = key + 1, ++count;
  }
  int* partial = reinterpret_cast<int*>(shared);
  const int3 warp =
      make_int3(__reduce_min_sync(kAllLanes, first), __reduce_max_sync(kAllLanes, end), __reduce_add_sync(kAllLanes, count));
  if (threadIdx.x % 32 == 0) {
    partial[threadIdx.x / 32 * 3] = warp.x, partial[threadIdx.x / 32 * 3 + 1] = warp.y,
                               partial[threadIdx.x / 32 * 3 + 2] = warp.z;
  }
  __syncthreads();
  first = num_keys, end = 0, count = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i)
    first = min(first, partial[3 * i]), end = max(end, partial[3 * i + 1]), count += partial[3 * i + 2];
  __syncthreads();
  work.keys = {min(first, end), end};
  work.mask_by_element = count != end - first && count > 0;
}

}  // namespace fa
