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

/// A bit for each of four bytes that is not 0.
__device__ __forceinline__ uint32_t bits_of_bytes(uint32_t bytes) {
  return ((__vcmpne4(bytes, 0) & 0x01010101u) * 0x01020408u) >> 24;
}
/// … for each of 16 bytes.
__device__ __forceinline__ uint32_t bits_of_bytes(const uint4& bytes) {
  return bits_of_bytes(bytes.x) | bits_of_bytes(bytes.y) << 4 | bits_of_bytes(bytes.z) << 8 | bits_of_bytes(bytes.w) << 12;
}

/// True keys among those looked at so far: the first, one past the last, how many. first > end: there is none.
struct TrueKeys {
  int first, end, count;

  static __device__ __forceinline__ TrueKeys none(int num_keys) { return {num_keys, 0, 0}; }

  /// Bit i: key + i.
  __device__ __forceinline__ void add(uint32_t bits, int key) {
    if (bits == 0) return;
    first = min(first, key + __ffs(bits) - 1);
    end = max(end, key + 32 - __clz(bits));
    count += __popc(bits);
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
/// aligned, else 4.
template <int kThreads>
__device__ __forceinline__ TrueKeys scan_mask_row(const uint8_t* data, int64_t stride, int num_keys, int thread) {
  TrueKeys keys = TrueKeys::none(num_keys);
  const bool wide = stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  const int num_wide = wide ? num_keys / 16 * 16 : 0;
#pragma unroll 1
  for (int key = thread * 16; key < num_wide; key += kThreads * 16) {
    keys.add(bits_of_bytes(*reinterpret_cast<const uint4*>(data + key)), key);
  }
#pragma unroll 1
  for (int key = num_wide + thread * 4; key < num_keys; key += kThreads * 4) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= (key + i < num_keys && data[(key + i) * stride] != 0 ? 1u : 0u) << i;
    keys.add(bits, key);
  }
  return keys;
}

}  // namespace fa
