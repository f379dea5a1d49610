// SPDX-License-Identifier: Apache-2.0
// The end of an item in decode_sm90, where several blocks have keys of the same head: each writes its part of the result, to the
// workspace or in a cluster to shared memory, and the parts are merged, always in the order of the keys, so that results repeat
// bit for bit.
#pragma once

#include "kernels/common/exp2.cuh"
#include "kernels/common/grid_counter.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/common/warpgroup.cuh"
#include "kernels/decode_sm90/merge_warps.cuh"

namespace fa::decode_sm90 {

inline constexpr int kPartsTogether = 8;  // under way to a lane

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

  /// The sum over all lanes that have the same columns, each kLanes apart: in the first kLanes lanes.
  template <int kLanes>
  __device__ __forceinline__ void add_groups() {
    float top = state.max;
#pragma unroll
    for (int offset = 16; offset >= kLanes; offset /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, offset));
    const float factor = exp2_approx((state.max - softmax_reference(top)) * kLog2E);
    state = {top, state.sum * factor};
#pragma unroll
    for (float4& o : out) o = {o.x * factor, o.y * factor, o.z * factor, o.w * factor};
#pragma unroll
    for (int offset = 16; offset >= kLanes; offset /= 2) {
      state.sum += __shfl_down_sync(kAllLanes, state.sum, offset);
#pragma unroll
      for (float4& o : out) {
        o = {o.x + __shfl_down_sync(kAllLanes, o.x, offset), o.y + __shfl_down_sync(kAllLanes, o.y, offset),
             o.z + __shfl_down_sync(kAllLanes, o.z, offset), o.w + __shfl_down_sync(kAllLanes, o.w, offset)};
      }
    }
  }
};

/// A warp: kPieces times 4 kLanes columns of one row from all parts of its head, kTogether of them under way to a lane. Each
/// kLanes lanes have every 32 / kLanes-th part. Calls may_write() once, in all lanes.
template <class C, int kPieces, int kTogether, int kLanes, class Parts, class MayWrite>
__device__ __forceinline__ void merge_parts(const KernelArgs& args, const Item& item, int row, int first_piece,
                                            const Parts& parts, const MayWrite& may_write) {
  constexpr int kColumns = 4 * kLanes, kGroups = 32 / kLanes;
  const int lane = threadIdx.x % 32, column = first_piece * kColumns + lane % kLanes * 4;
  const int head_dim_v = static_cast<int>(args.problem.value.shape[3]);
  Partial<kPieces> x;
#pragma unroll 1
  for (int first = lane / kLanes; first < item.num_parts; first += kGroups * kTogether) {
    float2 state[kTogether];
    float4 out[kTogether][kPieces];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int part = first + kGroups * i;
      const auto place = parts.place(part, row);
      state[i] = part < item.num_parts ? parts.state(place) : make_float2(-INFINITY, 0.0f);
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int its = column + j * kColumns;
        out[i][j] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (part < item.num_parts && its < head_dim_v) out[i][j] = parts.out(place, its);
      }
    }
    x.add(state, out);
  }
  __syncwarp();
  x.template add_groups<kLanes>();
  if (!may_write()) return;
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int its = column + j * kColumns;
    if (lane < kLanes && its < head_dim_v) write_row<C>(args, item, row, its, x.state, x.out[j]);
  }
}

/// All consumers of a block: the whole merge of a head.
template <class C>
__device__ __forceinline__ void merge_alone(const KernelArgs& args, const Item& item) {
  constexpr int kColumns = 4 * kMergeLanes, kPieces = C::kHeadDim < 2 * kColumns ? 1 : 2;
  constexpr int kTurns = (C::kHeadDim + kPieces * kColumns - 1) / (kPieces * kColumns);  // of a row
  for (int i = threadIdx.x / 32; i < item.num_rows * kTurns; i += C::kWarps) {
    merge_parts<C, kPieces, kPartsTogether, kMergeLanes>(args, item, i / kTurns, i % kTurns * kPieces,
                                                         PartsInWorkspace{args, item}, [] { return true; });
  }
}

/// A warp: which of up to 32 marks nobody sets, though it is given time to. They are set now.
__device__ __forceinline__ unsigned take_what_is_left(unsigned* marks, int count) {
  const int lane = threadIdx.x % 32;
  const int64_t start = clock64();
  bool is_left;
  do {
    is_left = lane < count && *static_cast<volatile unsigned*>(marks + lane) == 0;
  } while (__any_sync(kAllLanes, is_left && clock64() - start < kPatienceOfLast));  // NOTE: all lanes decide alike
  return __ballot_sync(kAllLanes, is_left && atomicExch(marks + lane, 1u) == 0);
}

/// All consumers of all blocks that share a head, or of those that are still there. A piece is 4 kLanes columns of a row. Each
/// warp of each block has pieces of its own, and sets its mark while their parts are on the way to it; the block that was the
/// last to write its part also takes what others have left.
template <class C, int kLanes>
__device__ __forceinline__ void merge_together(const KernelArgs& args, const Item& item, unsigned* marks, bool is_last) {
  constexpr int kPiecesOfRow = C::kHeadDim / (4 * kLanes);
  const int warps = item.num_parts * C::kWarps, own = item.part * C::kWarps + threadIdx.x / 32;
  const PartsInWorkspace parts{args, item};
  unsigned taken = 0, left = 0;  // are its own pieces? Of 32 warps, those that have left theirs
  if (threadIdx.x % 32 == 0) taken = atomicExch(marks + own, 1u);
  int warp = own, first = threadIdx.x / 32 * 32 - 32 * C::kWarps;
  for (;;) {
#pragma unroll 1
    for (int piece = warp; piece < item.num_rows * kPiecesOfRow; piece += warps) {
      merge_parts<C, 1, kPartsTogether, kLanes>(args, item, piece / kPiecesOfRow, piece % kPiecesOfRow, parts,
                                                [&] { return __shfl_sync(kAllLanes, taken, 0) == 0; });
    }
    if (!is_last) return;
    while (left == 0) {
      first += 32 * C::kWarps;
      if (first >= warps) return;
      left = take_what_is_left(marks + first, warps - first);
    }
    warp = first + __ffs(left) - 1;
    left &= left - 1;
    taken = 0;
  }
}

/// All consumers, after the block's part has been written: tells so, and merges the head if this block is the last of its blocks.
/// A large merge is shared: blocks with nothing else to do wait some time for the others and then take their pieces of it. The
/// more parts there are, the fewer columns a piece has, so that there are pieces for all warps.
template <class C>
__device__ __forceinline__ void finish_head(const KernelArgs& args, SharedPlan<C::kWarps>& shared, const Item& item) {
  constexpr int kThreads = 32 * C::kWarps;
  const int64_t bytes = args.problem.value.shape[3] * item.num_rows * item.num_parts * int64_t{sizeof(float)};
  const bool together = bytes >= kSharedMerge;
  unsigned* const marks = args.marks + item.first_slot * kMostWarps;
  // Before this part is told of, so before anybody sets a mark.
  if (together && threadIdx.x % 32 == 0) marks[item.part * C::kWarps + threadIdx.x / 32] = 0;
  named_barrier_sync(kConsumerBarrier, kThreads);
  if (threadIdx.x == 0) {
    unsigned* const parts_done = args.counters + item.counter;
    shared.is_last = count_to(parts_done, item.num_parts);
    shared.merges = shared.is_last || (together && item.last_of_block && wait_for_zero(parts_done, kPatience));
  }
  named_barrier_sync(kConsumerBarrier, kThreads);
  if (!shared.merges) return;
  if (!together) {
    merge_alone<C>(args, item);
  } else if (item.num_parts <= 16) {
    merge_together<C, 16>(args, item, marks, shared.is_last);
  } else if (item.num_parts <= 32) {
    merge_together<C, 8>(args, item, marks, shared.is_last);
  } else {
    merge_together<C, 4>(args, item, marks, shared.is_last);
  }
}

/// All consumers of all blocks of a cluster, after each block's part has been written.
template <class C>
__device__ __forceinline__ void merge_in_cluster(const KernelArgs& args, const Item& item, const PartInShared<C>& own) {
  cluster_arrive();
  cluster_wait();
  constexpr int kPiecesOfRow = C::kHeadDim / (4 * kMergeLanes);
  const int warps = C::kWarps * item.num_parts;
  for (int i = static_cast<int>(threadIdx.x / 32) * item.num_parts + item.part; i < item.num_rows * kPiecesOfRow; i += warps) {
    merge_parts<C, 1, kMostClusterBlocks / 2, kMergeLanes>(args, item, i / kPiecesOfRow, i % kPiecesOfRow, PartsInCluster<C>{own},
                                                           [] { return true; });
  }
  cluster_arrive_relaxed();  // no block ends while another reads its shared memory
  cluster_wait();
}

}  // namespace fa::decode_sm90
