// SPDX-License-Identifier: Apache-2.0
// The keys that a bool mask leaves in a head whose rows it treats alike (padding as [B, 1, 1, S_kv]): read once for a tile of
// rows. Keys outside the span of the true ones are never visited, and where these are all neighbours the span says everything.
// Used by the prefill kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "fa/attention.h"
#include "kernels/common/reduce.cuh"

namespace fa {

/// Does the mask treat all rows of a head alike?
__host__ __device__ __forceinline__ bool is_alike_for_rows(const TensorView& mask) {
  return mask.shape[2] == 1 || mask.stride[2] == 0;
}

/// True keys among those looked at so far: the first, one past the last, how many. first > end: there is none.
struct TrueKeys {
  int first, end, count;

  static __device__ __forceinline__ TrueKeys none(int num_keys) { return {num_keys, 0, 0}; }

  /// Four mask bytes, the lowest for `key`.
  __device__ __forceinline__ void add4(uint32_t bytes, int key) {
    const uint32_t set = __vcmpne4(bytes, 0);
    if (set == 0) return;
    first = min(first, key + (__ffs(set) - 1) / 8);
    end = max(end, key + 4 - __clz(set) / 8);
    count += __popc(set) / 8;
  }

  /// Those of all lanes.
  __device__ __forceinline__ TrueKeys over_warp() const {
    return {__reduce_min_sync(kAllLanes, first), __reduce_max_sync(kAllLanes, end), __reduce_add_sync(kAllLanes, count)};
  }

  __device__ __forceinline__ TrueKeys operator+(const TrueKeys& other) const {
    return {min(first, other.first), max(end, other.end), count + other.count};
  }

  __device__ __forceinline__ int begin() const { return min(first, end); }
  /// Are some keys between the first and the last hidden?
  __device__ __forceinline__ bool has_holes() const { return count < end - first; }
};

/// The part of thread `thread` of kThreads in keys 0 … num_keys - 1 of mask row `data`: 16 bytes at a time where they are
/// aligned.
template <int kThreads>
__device__ __forceinline__ TrueKeys scan_mask_row(const uint8_t* data, int64_t stride, int num_keys, int thread) {
  TrueKeys keys = TrueKeys::none(num_keys);
  const bool wide = stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  const int num_wide = wide ? num_keys / 16 * 16 : 0;
#pragma unroll 4
  for (int key = thread * 16; key < num_wide; key += kThreads * 16) {
    const uint4 bytes = *reinterpret_cast<const uint4*>(data + key);
    keys.add4(bytes.x, key);
    keys.add4(bytes.y, key + 4);
    keys.add4(bytes.z, key + 8);
    keys.add4(bytes.w, key + 12);
  }
  for (int key = num_wide + thread; key < num_keys; key += kThreads) keys.add4(data[key * stride], key);
  return keys;
}

}  // namespace fa
