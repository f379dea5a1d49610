// SPDX-License-Identifier: Apache-2.0
// The outputs of pairs that share a tile's keys, merged through distributed shared memory at the end. Where there are more than
// a few steps: an exchange of weights at each step (consumer.cuh) takes longer.
#pragma once

#include "kernels/prefill_sm90_wide/finish.cuh"

namespace fa::prefill_sm90_wide {

/// Leaves the block's output, and what it stands for, where the other blocks that share its keys read it.
template <class C>
__device__ __forceinline__ void publish(const Consumer<C>& consumer) {
  SharedMemory<C>& shared = consumer.shared;
  float4* own = reinterpret_cast<float4*>(shared.ring[consumer.warpgroup][0]) + threadIdx.x % kWarpgroupThreads;
#pragma unroll
  for (int i = 0; i < C::kColumns / 8; ++i) {
    own[i * kWarpgroupThreads] =
        make_float4(consumer.o[4 * i], consumer.o[4 * i + 1], consumer.o[4 * i + 2], consumer.o[4 * i + 3]);
  }
  if (consumer.warpgroup == 0 && threadIdx.x % 4 == 0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      shared.state[consumer.row_in_block() + 8 * r] = make_float2(consumer.rows.reference[r], consumer.rows.sum[r]);
    }
  }
}

/// Merges the shares of kSplits blocks, in their order, each block a part of the columns, and writes it.
template <class C, int kSplits>
__device__ __forceinline__ void merge(Consumer<C>& consumer) {
  constexpr int kCount = C::kColumns / kSplits, kChunks = kCount / 8;  // a thread has four elements of eight columns
  SharedMemory<C>& shared = consumer.shared;
  const float unit = C::kModified ? kLog2E : consumer.args.problem.softmax_scale * kLog2E;
  float factor[kSplits][2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float reference[kSplits], sum[kSplits], highest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kSplits; ++i) {
      const int rank = 2 * i + consumer.place.half;
      const float2 state = load_cluster_float2(cluster_address(&shared.state[consumer.row_in_block() + 8 * r], rank));
      reference[i] = state.x;
      sum[i] = state.y;
      highest = fmaxf(highest, reference[i]);
    }
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kSplits; ++i) {
      factor[i][r] = reference[i] == -INFINITY ? 0.0f : exp2_approx((reference[i] - highest) * unit);
      total += factor[i][r] * sum[i];
    }
    consumer.rows.reference[r] = highest;
    consumer.rows.sum[r] = threadIdx.x % 4 == 0 ? total : 0.0f;
  }
  float o[kCount / 2] = {};
  const int first_chunk = consumer.place.split * kChunks;
  const float4* chunks = reinterpret_cast<const float4*>(shared.ring[consumer.warpgroup][0]) + first_chunk * kWarpgroupThreads +
                         threadIdx.x % kWarpgroupThreads;
#pragma unroll
  for (int i = 0; i < kSplits; ++i) {
    const uint32_t theirs = cluster_address(chunks, 2 * i + consumer.place.half);
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const float4 x = load_cluster_float4(theirs + j * kWarpgroupThreads * sizeof(float4));
      o[4 * j] = fmaf(factor[i][0], x.x, o[4 * j]);
      o[4 * j + 1] = fmaf(factor[i][0], x.y, o[4 * j + 1]);
      o[4 * j + 2] = fmaf(factor[i][1], x.z, o[4 * j + 2]);
      o[4 * j + 3] = fmaf(factor[i][1], x.w, o[4 * j + 3]);
    }
  }
  store_columns<C, kCount>(consumer, o, consumer.warpgroup * C::kColumns + consumer.place.split * kCount);
}

}  // namespace fa::prefill_sm90_wide
