// SPDX-License-Identifier: Apache-2.0
// The end of an item in decode_sm90: the block's warps, which had different keys, are merged through shared memory; where other
// blocks have keys of the same head, the result goes to the workspace, and the block that comes last merges all of them, always
// in the order of the keys, so that results repeat bit for bit.
#pragma once

#include "kernels/common/cluster.cuh"
#include "kernels/common/convert.cuh"
#include "kernels/common/exp2.cuh"
#include "kernels/common/grid_counter.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/common/warpgroup.cuh"
#include "kernels/decode_sm90/scores.cuh"
#include "kernels/decode_sm90/shared_plan.cuh"
#include "semantics/softmax.h"

namespace fa::decode_sm90 {

inline constexpr int kConsumerBarrier = 1;  // 0 is that of the whole block
inline constexpr int kPartsTogether = 8;    // under way to a lane; twice as many to a warp

/// Of a row, its state and, kChunks times, four neighbouring columns of its output.
template <int kChunks>
struct Partial {
  SoftmaxState state{-INFINITY, 0.0f};
  float4 out[kChunks] = {};

  /// Takes in kCount other sets of keys. The exponentials don't wait for each other, and are those of the function unit: a warp
  /// that merges has nothing else to do, and each instruction counts.
  template <int kCount>
  __device__ __forceinline__ void add(const float2 (&its)[kCount], const float4 (&x)[kCount][kChunks]) {
    float top = state.max;
#pragma unroll
    for (const float2& i : its) top = fmaxf(top, i.x);
    const float reference = softmax_reference(top);
    const float mine = exp2_approx((state.max - reference) * kLog2E);
    state = {top, state.sum * mine};
#pragma unroll
    for (float4& o : out) o = {o.x * mine, o.y * mine, o.z * mine, o.w * mine};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float factor = exp2_approx((its[i].x - reference) * kLog2E);
      state.sum += its[i].y * factor;
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        float4& o = out[j];
        o = {o.x + x[i][j].x * factor, o.y + x[i][j].y * factor, o.z + x[i][j].z * factor, o.w + x[i][j].w * factor};
      }
    }
  }
};

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

/// A thread for each row: the row's state over all warps of the block, and what each warp's output counts for, in the order of
/// the warps' first tiles: so it makes no difference which block has a piece, and what it had before.
template <class C>
__device__ __forceinline__ void weigh_warps(const KernelArgs& args, SharedPlan<C::kWarps>& shared, const Item& item) {
  const int key_warps = C::kWarps >> row_bits(args), row = threadIdx.x;
  if (row >= item.num_rows) return;
  SoftmaxState state[C::kWarps];
  float top = -INFINITY;
#pragma unroll
  for (int i = 0; i < C::kWarps; ++i) {
    state[i] = {-INFINITY, 0.0f};
    if (i >= key_warps) continue;
    const int in_order = (item.first_warp + i) & (key_warps - 1);
    const float2 its = shared.state[row / kRowsPerWarp + (in_order << row_bits(args))][row % kRowsPerWarp];
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

/// All consumers, after weigh_warps: the block's result for each row, to its output or to where the parts of a head are merged.
template <class C>
__device__ __forceinline__ void merge_warps(const KernelArgs& args, const SharedPlan<C::kWarps>& shared, const Item& item,
                                            const float* merged, const PartInShared<C>& part_in_shared) {
  constexpr int kThreadsOfRow = C::kHeadDim / 4, kRowsTogether = 32 * C::kWarps / kThreadsOfRow;
  const int head_dim_v = static_cast<int>(args.problem.value.shape[3]), column = threadIdx.x % kThreadsOfRow * 4;
  if (column >= head_dim_v || threadIdx.x >= kRowsTogether * kThreadsOfRow) return;
  const int key_warps = C::kWarps >> row_bits(args);
#pragma unroll 2
  for (int row = threadIdx.x / kThreadsOfRow; row < item.num_rows; row += kRowsTogether) {
    float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < C::kWarps; ++i) {
      if (i >= key_warps) break;
      const int in_order = (item.first_warp + i) & (key_warps - 1);  // NOTE: merge_rows is 16 where more rows share a tile
      const int place = (in_order << row_bits(args)) * args.merge_rows + row;
      const float4 its = *reinterpret_cast<const float4*>(merged + place * merge_stride(C::kHeadDim) + column);
      const float factor = shared.warp_factor[row * key_warps + i];
      x = {x.x + its.x * factor, x.y + its.y * factor, x.z + its.z * factor, x.w + its.w * factor};
    }
    const float2 state = shared.row_state[row];
    if (item.num_parts == 1) {
      write_row<C>(args, item, row, column, {state.x, state.y}, x);
    } else if (item.in_cluster) {
      *reinterpret_cast<float4*>(part_in_shared.row(row) + column) = x;
      if (column == 0) *reinterpret_cast<float2*>(part_in_shared.row(row) + C::kHeadDim) = state;
    } else {
      const PartsInWorkspace parts{args, item};
      const int place = parts.place(item.part, row);
      *reinterpret_cast<float4*>(parts.row(place) + column) = x;
      if (column == 0) args.partial_state[place] = state;
    }
  }
}

/// A warp: kPieces times 64 columns of one row from all parts of its head, kTogether of them under way to a lane. A half of
/// the lanes has the even parts, the other the odd ones.
template <class C, int kPieces, int kTogether, class Parts>
__device__ __forceinline__ void merge_parts(const KernelArgs& args, const Item& item, int row, int first_piece,
                                            const Parts& parts) {
  const int lane = threadIdx.x % 32, column = first_piece * kMergeColumns + lane % 16 * 4;
  const int head_dim_v = static_cast<int>(args.problem.value.shape[3]);
  Partial<kPieces> x;
#pragma unroll 1
  for (int first = lane / 16; first < item.num_parts; first += 2 * kTogether) {
    float2 state[kTogether];
    float4 out[kTogether][kPieces];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int part = first + 2 * i;
      const auto place = parts.place(part, row);
      state[i] = part < item.num_parts ? parts.state(place) : make_float2(-INFINITY, 0.0f);
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int its = column + j * kMergeColumns;
        out[i][j] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (part < item.num_parts && its < head_dim_v) out[i][j] = parts.out(place, its);
      }
    }
    x.add(state, out);
  }
  __syncwarp();
  const float2 state[1] = {{__shfl_down_sync(kAllLanes, x.state.max, 16), __shfl_down_sync(kAllLanes, x.state.sum, 16)}};
  float4 odd[1][kPieces];
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    odd[0][j] = {__shfl_down_sync(kAllLanes, x.out[j].x, 16), __shfl_down_sync(kAllLanes, x.out[j].y, 16),
                 __shfl_down_sync(kAllLanes, x.out[j].z, 16), __shfl_down_sync(kAllLanes, x.out[j].w, 16)};
  }
  x.add(state, odd);
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int its = column + j * kMergeColumns;
    if (lane < 16 && its < head_dim_v) write_row<C>(args, item, row, its, x.state, x.out[j]);
  }
}

/// Four warps: the whole merge of a head.
template <class C>
__device__ __forceinline__ void merge_alone(const KernelArgs& args, const Item& item) {
  constexpr int kPieces = C::kMergePieces < 2 ? 1 : 2, kTurns = (C::kMergePieces + kPieces - 1) / kPieces;  // of a row
  for (int i = threadIdx.x / 32; i < item.num_rows * kTurns; i += C::kWarps)
    merge_parts<C, kPieces, kPartsTogether>(args, item, i / kTurns, i % kTurns * kPieces, PartsInWorkspace{args, item});
}

/// The same together with other blocks: each warp takes piece after piece, as long as there are any.
template <class C>
__device__ __forceinline__ void merge_together(const KernelArgs& args, const Item& item, MergeCounter& counter) {
  for (;;) {
    int piece = 0;
    if (threadIdx.x % 32 == 0) piece = static_cast<int>(atomicAdd(&counter.claims, 1u));
    piece = __shfl_sync(kAllLanes, piece, 0);
    if (piece >= item.num_rows * C::kMergePieces) return;
    const PartsInWorkspace parts{args, item};
    merge_parts<C, 1, kPartsTogether>(args, item, piece / C::kMergePieces, piece % C::kMergePieces, parts);
  }
}

/// All consumers, after the block's part has been written: tells so, and merges the head if this block is the last of its blocks.
/// A large merge is shared: blocks with nothing else to do wait some time for the others and then take pieces of it.
template <class C>
__device__ __forceinline__ void finish_head(const KernelArgs& args, SharedPlan<C::kWarps>& shared, const Item& item) {
  constexpr int kThreads = 32 * C::kWarps;
  MergeCounter& counter = args.counters[item.counter];
  const int64_t bytes = args.problem.value.shape[3] * item.num_rows * item.num_parts * int64_t{sizeof(float)};
  const bool together = bytes >= kSharedMerge;
  if (together && item.part == 0 && threadIdx.x == 0) counter.claims = 0;  // before this part is told of, so before any claim
  named_barrier_sync(kConsumerBarrier, kThreads);
  if (threadIdx.x == 0) {
    bool merges = count_to(&counter.parts_done, item.num_parts);
    if (!merges && together && item.last_of_block) merges = wait_for_zero(&counter.parts_done, kPatience);
    shared.merges = merges;
  }
  named_barrier_sync(kConsumerBarrier, kThreads);
  if (!shared.merges) return;
  if (together) {
    merge_together<C>(args, item, counter);
  } else {
    merge_alone<C>(args, item);
  }
}

/// All consumers of all blocks of a cluster, after each block's part has been written.
template <class C>
__device__ __forceinline__ void merge_in_cluster(const KernelArgs& args, const Item& item, const PartInShared<C>& own) {
  cluster_arrive();
  cluster_wait();
  const int warps = C::kWarps * item.num_parts, pieces = item.num_rows * C::kMergePieces;
  for (int i = static_cast<int>(threadIdx.x / 32) * item.num_parts + item.part; i < pieces; i += warps)
    merge_parts<C, 1, kMostClusterBlocks / 2>(args, item, i / C::kMergePieces, i % C::kMergePieces, PartsInCluster<C>{own});
  cluster_arrive_relaxed();  // no block ends while another reads its shared memory
  cluster_wait();
}

}  // namespace fa::decode_sm90
