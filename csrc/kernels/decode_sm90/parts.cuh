// SPDX-License-Identifier: Apache-2.0
// Where the results of the blocks that share a head lie, its parts, and how a row of the output is written at last. The end of an
// item in decode_sm90 (merge_warps.cuh, merge.cuh).
#pragma once

#include "kernels/common/cluster.cuh"
#include "kernels/common/convert.cuh"
#include "kernels/decode_sm90/scores.cuh"
#include "semantics/softmax.h"

namespace fa::decode_sm90 {

/// The part of a block of a cluster, in its shared memory: rows with their states behind them.
template <class C>
struct PartInShared {
  static constexpr int kStride = C::kHeadDim + 4;
  float* data;  // [kMostTileRows, kStride]; NOTE: launch.cuh asserts that the ring has room for it

  __device__ __forceinline__ float* row(int row) const { return data + row * kStride; }
};

/// A head's parts in the workspace.
struct PartsInWorkspace {
  const KernelArgs& args;
  const Item& item;

  /// Where row `row` of part `part` lies: far below 2^31 floats, as nothing but the blocks have parts.
  __device__ __forceinline__ int place(int part, int row) const {
    const int slot = part == 0 ? item.first_slot : item.late_slot + item.slot_step * part;
    return slot * args.partial_rows + row;
  }
  __device__ __forceinline__ float* row(int place) const {
    return args.partial_out + place * static_cast<int>(args.problem.value.shape[3]);
  }
  __device__ __forceinline__ float2 state(int place) const { return __ldcg(args.partial_state + place); }
  __device__ __forceinline__ float4 out(int place, int column) const {
    return __ldcg(reinterpret_cast<const float4*>(row(place) + column));
  }
};

/// A head's parts in the shared memory of the blocks of a cluster.
template <class C>
struct PartsInCluster {
  PartInShared<C> own;

  __device__ __forceinline__ uint32_t place(int part, int row) const { return cluster_address(own.row(row), part); }
  __device__ __forceinline__ float2 state(uint32_t place) const { return load_cluster_float2(place + 4 * C::kHeadDim); }
  __device__ __forceinline__ float4 out(uint32_t place, int column) const { return load_cluster_float4(place + 4 * column); }
};

/// Sink, normalization, output and log-sum-exp of one row. A row that attends no key becomes 0.
template <class C>
__device__ __forceinline__ void write_row(const KernelArgs& args, const Item& item, int row_in_tile, int column,
                                          const SoftmaxState& state, const float4& x) {
  using T = typename C::T;
  const AttentionParams& p = args.problem;
  const LaneRow row = lane_row(args, item, row_in_tile);
  SoftmaxState all = state;
  if (p.sinks.present) all = add_sink(all, static_cast<const float*>(p.sinks.data)[row.head * p.sinks.stride[0]]);
  const bool has_keys = row.in_use && state.sum != 0.0f;
  const float factor = has_keys ? rescale_factor(state.max, all.max) * normalizer(all) : 0.0f;
  const int64_t row_in_tensor = item.row_base + row.row;
  float values[4] = {x.x, x.y, x.z, x.w};
  if constexpr (C::kIsQuantized) {
    const float4 scale = four_scales(scales_of(args.value_scale, item.key_head), column);
    values[0] *= scale.x, values[1] *= scale.y, values[2] *= scale.z, values[3] *= scale.w;
  }
  uint32_t pairs[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    pairs[i] = has_keys ? pack2<T>(values[2 * i] * factor, values[2 * i + 1] * factor) : 0;  // NOTE: NaN * 0 would be NaN
  T* out = static_cast<T*>(p.out.data) + item.batch * p.out.stride[0] + row.head * p.out.stride[1] +
           row_in_tensor * p.out.stride[2] + column;
  if (args.out_by_4) {
    *reinterpret_cast<uint2*>(out) = make_uint2(pairs[0], pairs[1]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = reinterpret_cast<const T*>(pairs)[i];
  }
  if (column == 0 && p.lse.present) {
    float* row_lse = static_cast<float*>(p.lse.data) + item.batch * p.lse.stride[0] + row.head * p.lse.stride[1];
    row_lse[row_in_tensor * p.lse.stride[2]] = row.in_use ? lse(all) : -INFINITY;
  }
}

}  // namespace fa::decode_sm90
