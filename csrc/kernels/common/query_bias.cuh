// SPDX-License-Identifier: Apache-2.0
// Adds query_bias to a tile of queries in shared memory, between the copy that brings it and the first product that reads it. A
// sum is rounded to the element type, as in a graph that adds the bias in front of attention.
#pragma once

#include "fa/attention.h"
#include "kernels/common/convert.cuh"
#include "kernels/common/shared_memory.cuh"

namespace fa {

/// The bias of one query head: [D].
template <class T>
__device__ __forceinline__ const T* query_bias_of(const AttentionParams& p, int64_t head) {
  return static_cast<const T*>(p.query_bias.data) + head * p.query_bias.stride[0];
}

template <class T>
__device__ __forceinline__ T add_rounded(T a, T b) {
  return from_float<T>(to_float(a) + to_float(b));
}

/// The part of a head's bias that belongs to a 16-byte chunk of its rows.
template <class T>
struct BiasChunk {
  static constexpr int kCount = 16 / sizeof(T);
  T elements[kCount];

  /// Columns from `column` on; those from head_dim on are 0.
  __device__ __forceinline__ BiasChunk(const T* bias, int column, int head_dim) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) elements[i] = column + i < head_dim ? bias[column + i] : T(0.0f);
  }

  /// Adds it to the chunk at a shared address.
  __device__ __forceinline__ void add_to(uint32_t address) const {
    union {
      float4 chunk;
      T sums[kCount];
    };
    chunk = load_shared4(address);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = add_rounded(sums[i], elements[i]);
    store_shared(address, chunk);
  }
};

}  // namespace fa
