// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup of prefill_sm90_f32: 64 query rows of each tile, key tile after key tile: scores, softmax, output. While
// one warpgroup is at its softmax, the tensor cores work for the others.
#pragma once

#include "kernels/prefill_sm90/query_bias.cuh"
#include "kernels/prefill_sm90/scores.cuh"
#include "kernels/prefill_sm90/softmax.cuh"
#include "kernels/prefill_sm90_f32/epilogue.cuh"
#include "kernels/prefill_sm90_f32/products.cuh"

namespace fa::prefill_sm90_f32 {

/// Scores are raw products, or natural (softmax_step's C).
struct RawScores {
  static constexpr bool kModified = false;
};
struct NaturalScores {
  static constexpr bool kModified = true;
};

/// Registers and ring positions of one consumer warpgroup.
template <class C>
struct Consumer {
  const KernelArgs& args;
  SharedPlan<C>& shared;
  int warpgroup;
  bool modified;  // softcap, bias, ALiBi, or a scale <= 0: scores are natural
  RingPosition<C::kQueryStages> q;
  RingPosition<C::kKeyStages> k;
  RingPosition<C::kValueStages> v;
  float o[C::kHeadDim / 2];  // output fragment
  float s[C::kTileN / 2];    // scores, then weights
  typename Products<C>::HeldQueries held;
  RowPair rows;
  RowsView view;
  int stored = -1;  // query buffer that a copy of the output still reads

  template <int kArrivals>
  __device__ __forceinline__ void release(Mbarrier<kArrivals>& barrier) {
    if (threadIdx.x % 32 == 0) barrier.arrive();
  }

  __device__ __forceinline__ int first_row_in_tile() const {
    return warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  }

  __device__ __forceinline__ uint8_t* queries() const { return shared.query[q.stage] + warpgroup * 64 * 128; }

  __device__ __forceinline__ void skip_block() {
    shared.key_full[k.stage].wait(k.phase);
    __syncwarp();
    release(shared.key_empty[k.stage]);
    k.advance();
    shared.value_full[v.stage].wait(v.phase);
    __syncwarp();
    release(shared.value_empty[v.stage]);
    v.advance();
  }

  /// From raw products to weights. True: the output must be multiplied by rows.factor.
  __device__ __forceinline__ bool take_weights(const Tile& tile, int block) {
    const AttentionParams& p = args.problem;
    const bool masked = block >= view.full_end || block < view.full_begin;
    if (modified) {
      const int first_key = block * C::kTileN + threadIdx.x % 4 * 2;
      prefill_sm90::modify_scores<C>(s, p, p.softmax_scale, tile, nullptr, first_row_in_tile(), first_key);
    }
    if (masked) prefill_sm90::hide_keys<C>(s, p, tile, prefill_sm90::thread_row<C>(tile, warpgroup), block * C::kTileN);
    // `tf32` rounds the weights, so the reference is always the maximum: a row's largest weight is then 1, which TF32 holds.
    constexpr float kThreshold = C::kSplit ? prefill_sm90::kRescaleThreshold : 0.0f;
    if (modified) return prefill_sm90::softmax_step<NaturalScores>(s, rows, kLog2E, kThreshold);
    return prefill_sm90::softmax_step<RawScores>(s, rows, p.softmax_scale * kLog2E, kThreshold);
  }

  /// One key tile.
  __device__ __forceinline__ void run_block(const Tile& tile, int block) {
    shared.key_full[k.stage].wait(k.phase);
    Products<C>::multiply_keys(s, held, queries(), shared.key[k.stage]);
    release(shared.key_empty[k.stage]);
    k.advance();
    const bool rescale = take_weights(tile, block);
    if constexpr (C::kSplit) {
      if (!rescale) rows.factor[0] = rows.factor[1] = 1.0f;
    } else {
      if (rescale) prefill_sm90::rescale_rows(o, rows.factor);
    }
    shared.value_full[v.stage].wait(v.phase);
    Products<C>::multiply_values(o, s, rows.factor, shared.value[v.stage]);
    release(shared.value_empty[v.stage]);
    v.advance();
  }

  /// Once the last tile's output has left the buffer of its queries, gives that back.
  __device__ __forceinline__ void finish_stored() {
    if (stored >= 0 && threadIdx.x % kWarpgroupThreads == 0) {
      tma_store_wait_read<0>();
      shared.query_empty[stored].arrive();
    }
    stored = -1;
  }

  /// Normalises the tile's rows and sees to it that they leave.
  __device__ __forceinline__ void end_tile(const Tile& tile, int slot) {
    const int row = prefill_sm90::thread_row<C>(tile, warpgroup);
    if (!modified) {
      rows.reference[0] *= args.problem.softmax_scale;
      rows.reference[1] *= args.problem.softmax_scale;
    }
    prefill_sm90::finish_rows<C>(args, tile, row, rows, o);
    if (args.spoilt != nullptr) shared.spoilt.mark(has_spoilt_row(o, rows.sum), slot);
    finish_stored();
    store_tile<C>(args, tile, warpgroup, o, queries());
    stored = q.stage;
    if constexpr (C::kQueryStages == 1) finish_stored();
    __syncwarp();
    release(shared.tile_empty[slot]);
  }

  /// After the last tile: once all output is in device memory, mends rows that hold values of hidden keys.
  __device__ __forceinline__ void mend_output() {
    if (threadIdx.x % kWarpgroupThreads == 0) tma_store_wait<0>();
    __syncwarp();
    named_barrier_sync(prefill_sm90::kMendBarrier, 32 * C::kConsumerWarps + 32);
    shared.spoilt.template mend<float>(args, threadIdx.x / 32 * 16, 16);
  }

  __device__ __forceinline__ void run() {
    RingPosition<kTileSlots> slot;
    for (;;) {
      shared.tile_full[slot.stage].wait(slot.phase);
      const Tile& tile = shared.tile[slot.stage];
      if (!tile.valid) break;
      prefill_sm90::wait_for_queries(shared, q, warpgroup);
      prefill_sm90::add_query_bias<C>(queries(), args.problem, tile.head, kWarpgroupBarrier + warpgroup);
      if constexpr (!C::kSplit) {
        Products<C>::round_queries(queries());
        named_barrier_sync(kWarpgroupBarrier + warpgroup, kWarpgroupThreads);
        Products<C>::hold_queries(held, queries());
      }
      view = shared.view[slot.stage][warpgroup];
      rows = RowPair{};
#pragma unroll
      for (float& x : o) x = 0.0f;
      for (int i = view.block_end; i < tile.block_end; ++i) skip_block();
      for (int block = view.block_end - 1; block >= view.block_begin; --block) {
        run_block(tile, block);
        if (C::kQueryStages > 1 && block == view.block_end - 1) finish_stored();  // by now it has left
      }
      for (int i = tile.block_begin; i < view.block_begin; ++i) skip_block();
      end_tile(tile, slot.stage);
      slot.advance();
      q.advance();
    }
    tma_store_wait_read<0>();
    if (args.spoilt != nullptr) mend_output();
  }
};

}  // namespace fa::prefill_sm90_f32
