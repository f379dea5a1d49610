// SPDX-License-Identifier: Apache-2.0
// The end of an item in decode_sm90, within a block: its warps, which had different keys, are merged through shared memory. One
// warp on each scheduler is slow at instructions that wait for each other, so several rows are under way to a thread.
#pragma once

#include "kernels/common/exp2.cuh"
#include "kernels/common/warpgroup.cuh"
#include "kernels/decode_sm90/parts.cuh"
#include "kernels/decode_sm90/shared_plan.cuh"

namespace fa::decode_sm90 {

inline constexpr int kConsumerBarrier = 1;  // 0 is that of the whole block

/// row_bits(args). kAll: it is 0, no two warps have the same keys, and the compiler is to know it.
template <class C, bool kAll>
__device__ __forceinline__ int bits_of_rows(const KernelArgs& args) {
  return kAll ? 0 : row_bits(args);
}

/// A thread for each row: the row's state over all warps of the block, and what each warp's output counts for, in the order of
/// the warps' first tiles: so it makes no difference which block has a piece, and what it had before.
template <class C, bool kAll>
__device__ __forceinline__ void weigh_warps(const KernelArgs& args, SharedPlan<C::kWarps>& shared, const Item& item) {
  const int bits = bits_of_rows<C, kAll>(args), key_warps = C::kWarps >> bits, row = threadIdx.x;
  if (row >= item.num_rows) return;
  SoftmaxState state[C::kWarps];
  float top = -INFINITY;
#pragma unroll
  for (int i = 0; i < C::kWarps; ++i) {
    state[i] = {-INFINITY, 0.0f};
    if (i >= key_warps) continue;
    const int in_order = (item.first_warp + i) & (key_warps - 1);
    const float2 its = shared.state[row / kRowsPerWarp + (in_order << bits)][row % kRowsPerWarp];
    state[i] = {its.x, its.y};
    top = fmaxf(top, its.x);
  }
  const float reference = softmax_reference(top);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < C::kWarps; ++i) {
    if (i >= key_warps) continue;
    const float factor = exp2_approx((state[i].max - reference) * kLog2E);
    sum += state[i].sum * factor;
    shared.warp_factor[row * key_warps + i] = factor;
  }
  shared.row_state[row] = {top, sum};
}

/// Four columns of kCount rows of the block, kStep apart: calls store(row, sum of its warps' outputs).
template <class C, bool kAll, int kCount, int kStep, class Store>
__device__ __forceinline__ void merge_some_rows(const KernelArgs& args, const SharedPlan<C::kWarps>& shared, const Item& item,
                                                const float* merged, int first_row, int column, const Store& store) {
  const int bits = bits_of_rows<C, kAll>(args), key_warps = C::kWarps >> bits;
  float4 x[kCount] = {};
#pragma unroll
  for (int i = 0; i < C::kWarps; ++i) {
    if (i >= key_warps) break;
    const int in_order = (item.first_warp + i) & (key_warps - 1);  // NOTE: merge_rows is 16 where more rows share a tile
    const float* rows = merged + ((in_order << bits) * args.merge_rows + first_row) * merge_stride(C::kHeadDim) + column;
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      const float4 its = *reinterpret_cast<const float4*>(rows + r * kStep * merge_stride(C::kHeadDim));
      const float factor = shared.warp_factor[(first_row + r * kStep) * key_warps + i];
      x[r] = {x[r].x + its.x * factor, x[r].y + its.y * factor, x[r].z + its.z * factor, x[r].w + its.w * factor};
    }
  }
#pragma unroll
  for (int r = 0; r < kCount; ++r) store(first_row + r * kStep, x[r]);
}

/// Likewise all rows of the thread, kMost at a time.
template <class C, bool kAll, int kMost, class Store>
__device__ __forceinline__ void merge_rows(const KernelArgs& args, const SharedPlan<C::kWarps>& shared, const Item& item,
                                           const float* merged, int column, const Store& store) {
  constexpr int kThreadsOfRow = C::kHeadDim / 4, kStep = 32 * C::kWarps / kThreadsOfRow, kAtOnce = kStep <= 4 ? kMost : 1;
  int row = threadIdx.x / kThreadsOfRow;
  if constexpr (kAtOnce > 1) {
#pragma unroll 1
    for (; row + (kAtOnce - 1) * kStep < item.num_rows; row += kAtOnce * kStep)
      merge_some_rows<C, kAll, kAtOnce, kStep>(args, shared, item, merged, row, column, store);
  }
#pragma unroll 1
  for (; row < item.num_rows; row += kStep) merge_some_rows<C, kAll, 1, kStep>(args, shared, item, merged, row, column, store);
}

/// All consumers, after weigh_warps: the block's result for each row, to its output or to where the parts of a head are merged.
template <class C, bool kAll>
__device__ __forceinline__ void store_merged(const KernelArgs& args, const SharedPlan<C::kWarps>& shared, const Item& item,
                                             const float* merged, const PartInShared<C>& part_in_shared) {
  constexpr int kThreadsOfRow = C::kHeadDim / 4, kRowsTogether = 32 * C::kWarps / kThreadsOfRow, kMost = kAll ? 4 : 1;
  const int head_dim_v = static_cast<int>(args.problem.value.shape[3]), column = threadIdx.x % kThreadsOfRow * 4;
  if (column >= head_dim_v || threadIdx.x >= kRowsTogether * kThreadsOfRow) return;
  if (item.num_parts == 1) {
    merge_rows<C, kAll, 1>(args, shared, item, merged, column, [&](int row, const float4& x) {
      const float2 state = shared.row_state[row];
      write_row<C>(args, item, row, column, {state.x, state.y}, x);
    });
  } else if (item.in_cluster) {
    merge_rows<C, kAll, kMost>(args, shared, item, merged, column, [&](int row, const float4& x) {
      *reinterpret_cast<float4*>(part_in_shared.row(row) + column) = x;
      if (column == 0) *reinterpret_cast<float2*>(part_in_shared.row(row) + C::kHeadDim) = shared.row_state[row];
    });
  } else {
    const PartsInWorkspace parts{args, item};
    const int place = parts.place(item.part, 0);
    float* const out = parts.row(place) + column;
    merge_rows<C, kAll, kMost>(args, shared, item, merged, column, [&](int row, const float4& x) {
      *reinterpret_cast<float4*>(out + row * head_dim_v) = x;
      if (column == 0) args.partial_state[place + row] = shared.row_state[row];
    });
  }
}

/// All consumers, once all warps' rows are in shared memory (`merged`: [kWarps, merge_rows, merge_stride]).
template <class C, bool kAll>
__device__ __forceinline__ void merge_warps(const KernelArgs& args, SharedPlan<C::kWarps>& shared, const Item& item,
                                            const float* merged, const PartInShared<C>& part_in_shared) {
  weigh_warps<C, kAll>(args, shared, item);
  named_barrier_sync(kConsumerBarrier, 32 * C::kWarps);
  store_merged<C, kAll>(args, shared, item, merged, part_in_shared);
}

}  // namespace fa::decode_sm90
