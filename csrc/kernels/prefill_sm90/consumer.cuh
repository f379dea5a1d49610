// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup of prefill_sm90: 64 query rows of each tile. S = Q K^T of the next key tile is issued before O += P V of
// the current one, so that softmax runs while the tensor cores work; and warpgroups issue in turn (ping-pong), so that one's
// softmax hides behind the other's products.
#pragma once

#include <climits>

#include "kernels/common/convert.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/common/wgmma.cuh"
#include "kernels/prefill_sm90/args.h"
#include "kernels/prefill_sm90/config.cuh"
#include "kernels/prefill_sm90/epilogue.cuh"
#include "kernels/prefill_sm90/scores.cuh"
#include "kernels/prefill_sm90/softmax.cuh"

namespace fa::prefill_sm90 {

inline constexpr int kTurnBarrier = 1;  // named barriers 1 … 3: the warpgroup's turn to issue products

/// What the warpgroup's rows see of a query tile.
struct RowsView {
  int begin[2], end[2];        // keys of the thread's two rows, by MaskRule and the span of mask and bias
  int full_begin, full_end;    // key tiles that all 64 rows see entirely
  int block_begin, block_end;  // key tiles that any of the 64 rows sees …
  int num_left, num_right;     // … and the tile's others, on both sides: their buffers are given back unread
  int used_keys;               // keys whose values may be read; the copy engine's own zeros stand behind the tensor's last key
};

/// Registers and ring positions of one consumer warpgroup.
template <class C>
struct Consumer {
  const KernelArgs& args;
  SharedMemory<C>& shared;
  int warpgroup;
  RingPosition<C::kQueryStages> q;
  RingPosition<C::kStages> k, v;
  RingPosition<C::kBiasStages + 1 - (C::kBiasStages > 0)> b;
  float o[C::kHeadDim / 2];         // output fragment
  float s[C::kTileN / 2];           // scores, then weights
  uint32_t weights[C::kTileN / 4];  // weights as A operand
  RowPair rows;
  RowsView view;
  bool settled;     // all rows of the warp have a finite reference
  int stored = -1;  // query buffer that a store still reads

  __device__ __forceinline__ void take_turn() {
    if constexpr (C::kPingPong) named_barrier_sync(kTurnBarrier + warpgroup, 2 * kWarpgroupThreads);
  }
  __device__ __forceinline__ void pass_turn() {
    if constexpr (C::kPingPong) {
      named_barrier_arrive(kTurnBarrier + (warpgroup + 1 == C::kWarpgroups ? 0 : warpgroup + 1), 2 * kWarpgroupThreads);
    }
  }
  __device__ __forceinline__ void release(uint64_t* barrier) {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
  }

  __device__ __forceinline__ int first_row_in_tile() const {
    return warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  }

  /// Issues S = Q K^T.
  __device__ __forceinline__ void issue_scores() {
    const uint64_t query = wgmma_descriptor_k_major(shared_address(shared.query[q.stage]) + warpgroup * 64 * 128);
    const uint64_t key = wgmma_descriptor_k_major(shared_address(shared.key[k.stage]));
#pragma unroll
    for (int step = 0; step < C::kHeadDim / 16; ++step) {
      const uint32_t in_panel = (step % 4) * 32;
      Wgmma<C::kTileN>::template ss<typename C::T>(s, query + (((step / 4) * C::kTileM * 128 + in_panel) >> 4),
                                                   key + (((step / 4) * C::kTileN * 128 + in_panel) >> 4), step > 0);
    }
    wgmma_commit();
  }

  /// Issues O += P V.
  __device__ __forceinline__ void issue_output() {
    const uint64_t value = wgmma_descriptor_mn_major(shared_address(shared.value[v.stage]), C::kTileN * 128);
#pragma unroll
    for (int step = 0; step < C::kTileN / 16; ++step) {
      Wgmma<C::kHeadDim>::template rs<typename C::T>(o, weights[4 * step], weights[4 * step + 1], weights[4 * step + 2],
                                                     weights[4 * step + 3], value + ((step * 16 * 128) >> 4), 1);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < C::kTileN / 4; ++i) weights[i] = pack2<typename C::T>(s[2 * i], s[2 * i + 1]);
  }

  /// Scores outside [begin, end) of their row (relative to this thread's first column of the key tile) become -inf.
  __device__ __forceinline__ void mask_scores(const int (&begin)[2], const int (&end)[2]) {
#pragma unroll
    for (int i = 0; i < C::kTileN / 2; ++i) {
      const int column = (i / 4) * 8 + (i & 1), r = (i >> 1) & 1;
      if (column < begin[r] || column >= end[r]) s[i] = -INFINITY;
    }
  }

  /// Waits for the values of a key tile of which `used` keys are in use. The others may be anything, NaN too, and become 0.
  __device__ __forceinline__ void wait_value(int used) {
    mbarrier_wait(&shared.value_full[v.stage], v.phase);
    if (used >= C::kTileN) return;
    uint8_t* values = shared.value[v.stage];
    for (int i = max(used, 0) * 8 + threadIdx.x % kWarpgroupThreads; i < C::kTileN * 8; i += kWarpgroupThreads) {
#pragma unroll
      for (int panel = 0; panel < C::kPanels; ++panel) {
        *reinterpret_cast<uint4*>(values + panel * C::kTileN * 128 + i * 16) = make_uint4(0, 0, 0, 0);
      }
    }
    fence_async_proxy();
    named_barrier_sync(kWarpgroupBarrier + warpgroup, kWarpgroupThreads);
  }

  /// S = Q K^T once more, by each warp for its own rows. Rare: where the scores were spent on a reference that proved too small.
  __device__ __forceinline__ void recompute_scores() {
    const int lane = threadIdx.x % 32, row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + lane % 16;
    const uint32_t query = shared_address(shared.query[q.stage]), key = shared_address(shared.key[k.stage]);
#pragma unroll
    for (int j = 0; j < C::kTileN / 16; ++j) {
      float low[4] = {}, high[4] = {};  // keys 16 j … + 7 and + 8 … + 15
      const int key_row = 16 * j + lane % 8 + lane / 16 * 8;
#pragma unroll 1
      for (int step = 0; step < C::kHeadDim / 16; ++step) {
        const int panel = step / 4, chunk = step % 4 * 2;
        uint32_t a[4], b_pair[4];
        ldmatrix_x4(a, query + panel * C::kTileM * 128 + swizzled_offset(row, chunk + lane / 16));
        ldmatrix_x4(b_pair, key + panel * C::kTileN * 128 + swizzled_offset(key_row, chunk + lane / 8 % 2));
        mma_m16n8k16<typename C::T>(low, a, b_pair[0], b_pair[1]);
        mma_m16n8k16<typename C::T>(high, a, b_pair[2], b_pair[3]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[8 * j + i] = low[i];
        s[8 * j + 4 + i] = high[i];
      }
    }
  }

  /// From raw products to scores.
  __device__ __forceinline__ void modify(const Tile& tile, int block) {
    const bool staged = C::kBiasStages > 0 && args.bias_by_tile;
    if (staged) mbarrier_wait(&shared.bias_full[b.stage], b.phase);
    modify_scores<C>(s, args.problem, tile, staged ? shared.bias + b.stage * C::kBiasBytes : nullptr, first_row_in_tile(),
                     block * C::kTileN + threadIdx.x % 4 * 2);
    if (staged) {
      __syncwarp();
      release(&shared.bias_empty[b.stage]);
      b.advance();
    }
  }

  __device__ __forceinline__ RowsView view_rows(const Tile& tile) const {
    const AttentionParams& p = args.problem;
    const MaskRule rule{tile.kv_length, tile.query_offset, p.window_left, p.window_right};
    const int first_row = tile.first_row + warpgroup * 64, last_row = min(first_row + 63, tile.query_length - 1);
    const int row = tile.first_row + first_row_in_tile();
    RowsView rows_view;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const KeyRange visible = rule.key_range(row + 8 * r, row + 8 * r);
      rows_view.begin[r] = max(static_cast<int>(visible.begin), tile.key_begin);
      rows_view.end[r] = min(static_cast<int>(visible.end), tile.key_end);
    }
    const KeyRange full = rule.full_range(first_row, first_row + 63), any = rule.key_range(first_row, last_row);
    rows_view.full_begin = (max(static_cast<int>(full.begin), tile.key_begin) + C::kTileN - 1) / C::kTileN;
    rows_view.full_end = min(static_cast<int>(full.end), tile.key_end) / C::kTileN;
    const int begin = max(static_cast<int>(any.begin), tile.key_begin), end = min(static_cast<int>(any.end), tile.key_end);
    const bool none = first_row > last_row || begin >= end;
    rows_view.block_begin = none ? tile.block_begin : begin / C::kTileN;
    rows_view.block_end = none ? tile.block_begin : (end + C::kTileN - 1) / C::kTileN;
    rows_view.num_left = rows_view.block_begin - tile.block_begin;
    rows_view.num_right = tile.block_end - rows_view.block_end;
    rows_view.used_keys = tile.key_base + tile.kv_length < args.sequences.seqlen_kv ? tile.kv_length : INT_MAX;
    return rows_view;
  }

  /// Gives the buffer of a K tile back that this warpgroup does not need.
  __device__ __forceinline__ void skip_key() {
    mbarrier_wait(&shared.key_full[k.stage], k.phase);
    if (C::kBiasStages > 0 && args.bias_by_tile) mbarrier_wait(&shared.bias_full[b.stage], b.phase);
    __syncwarp();
    release(&shared.key_empty[k.stage]);
    k.advance();
    if (C::kBiasStages > 0 && args.bias_by_tile) {
      release(&shared.bias_empty[b.stage]);
      b.advance();
    }
  }

  __device__ __forceinline__ void skip_value() {
    mbarrier_wait(&shared.value_full[v.stage], v.phase);
    __syncwarp();
    release(&shared.value_empty[v.stage]);
    v.advance();
  }

  __device__ __forceinline__ void skip_turn() {
    take_turn();
    pass_turn();
  }

  /// From raw products to weights, and the key buffer back to the producer. True: the output must be rescaled by rows.factor.
  __device__ __forceinline__ bool finish_scores(const Tile& tile, int block) {
    const float unit = C::kModified ? kLog2E : args.problem.softmax_scale * kLog2E;
    const bool masked = block >= view.full_end || block < view.full_begin;
    bool rescale = false;
    if (!C::kOptimistic || masked || !settled || !optimistic_softmax_step<C>(s, rows, unit)) {
      if constexpr (C::kOptimistic) {
        if (!masked && settled) recompute_scores();
      }
      if constexpr (C::kModified) modify(tile, block);
      if (masked) {
        const int column = block * C::kTileN + threadIdx.x % 4 * 2;
        mask_scores({view.begin[0] - column, view.begin[1] - column}, {view.end[0] - column, view.end[1] - column});
      }
      rescale = softmax_step<C>(s, rows, unit);
      settled = !__any_sync(kAllLanes, rows.reference[0] == -INFINITY || rows.reference[1] == -INFINITY);
    }
    release(&shared.key_empty[k.stage]);
    k.advance();
    return rescale;
  }

  /// Waits for the values of key tile `block` and issues O += P V.
  __device__ __forceinline__ void start_output(int block) {
    wait_value(view.used_keys - block * C::kTileN);
    wgmma_pin(o);
    wgmma_pin(weights);
    wgmma_fence();
    issue_output();
  }

  __device__ __forceinline__ void finish_output() {
    wgmma_wait<0>();
    wgmma_pin(o);
    wgmma_pin(weights);
    release(&shared.value_empty[v.stage]);
    v.advance();
  }

  /// Returns a query buffer whose output has left.
  __device__ __forceinline__ void finish_stored() {
    if (stored >= 0) finish_store(&shared.query_empty[stored]);
    stored = -1;
  }

  /// The key tiles that the warpgroup's rows see, from the last to the first.
  __device__ __forceinline__ void run_blocks(const Tile& tile) {
    mbarrier_wait(&shared.key_full[k.stage], k.phase);
    wgmma_pin(s);
    wgmma_fence();
    issue_scores();
    wgmma_wait<0>();
    wgmma_pin(s);
    finish_scores(tile, view.block_end - 1);
    pack_weights();
    finish_stored();  // by now the last tile's output has left: the queries after the next may come
    for (int block = view.block_end - 2; block >= view.block_begin; --block) {
      mbarrier_wait(&shared.key_full[k.stage], k.phase);
      take_turn();
      wgmma_pin(s);
      wgmma_fence();
      issue_scores();
      start_output(block + 1);
      pass_turn();
      wgmma_wait<1>();
      wgmma_pin(s);
      const bool rescale = finish_scores(tile, block);
      finish_output();
      pack_weights();
      if (rescale) rescale_rows(o, rows.factor);
    }
    start_output(view.block_begin);
    finish_output();
  }

  __device__ __forceinline__ void end_tile(const Tile& tile, uint64_t* tile_empty) {
    finish_rows<C>(args, tile, tile.first_row + first_row_in_tile(), rows, o);
    finish_stored();
    store_tile<C>(args, shared.query[q.stage], tile, warpgroup, o);
    __syncwarp();
    release(tile_empty);
    stored = q.stage;
    if constexpr (C::kQueryStages == 1) finish_stored();
  }

  /// Tile after tile. Turns are passed on before each wait for the keys of a tile that this warpgroup skips: the other warpgroups
  /// need them to give their buffers back.
  __device__ __forceinline__ void run() {
    RingPosition<kTileSlots> slot;
    if (C::kPingPong && warpgroup == C::kWarpgroups - 1) pass_turn();
    for (;;) {
      mbarrier_wait(&shared.tile_full[slot.stage], slot.phase);
      const Tile& tile = shared.tile[slot.stage];
      if (!tile.valid) break;
      mbarrier_wait(&shared.query_full[q.stage], q.phase);
      view = view_rows(tile);
      rows = RowPair{};
      settled = false;
#pragma unroll
      for (float& x : o) x = 0.0f;
      const bool has_blocks = view.block_begin < view.block_end;
      for (int i = 0; i < view.num_right; ++i) {
        skip_key();
        if (has_blocks || i + 1 < view.num_right) skip_turn();
        skip_value();
      }
      if (has_blocks) run_blocks(tile);
      for (int i = 0; i < view.num_left; ++i) {
        skip_turn();
        skip_key();
        skip_value();
      }
      end_tile(tile, &shared.tile_empty[slot.stage]);
      slot.advance();
      q.advance();
    }
    tma_store_wait_read();
  }
};

}  // namespace fa::prefill_sm90
