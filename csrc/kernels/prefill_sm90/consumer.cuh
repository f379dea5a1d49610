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
  __device__ __forceinline__ void issue_output(int accumulate) {
    const uint64_t value = wgmma_descriptor_mn_major(shared_address(shared.value[v.stage]), C::kTileN * 128);
#pragma unroll
    for (int step = 0; step < C::kTileN / 16; ++step) {
      Wgmma<C::kHeadDim>::template rs<typename C::T>(o, weights[4 * step], weights[4 * step + 1], weights[4 * step + 2],
                                                     weights[4 * step + 3], value + ((step * 16 * 128) >> 4),
                                                     step > 0 ? 1 : accumulate);
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

  /// All key tiles of one query tile, from the last to the first.
  __device__ __forceinline__ void run_blocks(const Tile& tile) {
    const AttentionParams& p = args.problem;
    const MaskRule rule{tile.kv_length, tile.query_offset, p.window_left, p.window_right};
    const int first_row = tile.first_row + warpgroup * 64, row = tile.first_row + first_row_in_tile();
    const int block_begin = tile.block_begin;
    int begin[2], end[2];  // keys that the thread's rows see
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const KeyRange visible = rule.key_range(row + 8 * r, row + 8 * r);
      begin[r] = max(static_cast<int>(visible.begin), tile.key_begin);
      end[r] = min(static_cast<int>(visible.end), tile.key_end);
    }
    const KeyRange full = rule.full_range(first_row, first_row + 63);
    const int full_begin = (max(static_cast<int>(full.begin), tile.key_begin) + C::kTileN - 1) / C::kTileN;
    const int full_end = min(static_cast<int>(full.end), tile.key_end) / C::kTileN;
    // The copy engine's own zeros stand behind the tensor's last key.
    const int used_keys = tile.key_base + tile.kv_length < args.sequences.seqlen_kv ? tile.kv_length : INT_MAX;
    const float unit = C::kModified ? kLog2E : p.softmax_scale * kLog2E;
    bool settled = false;  // all rows of the warp have a finite reference
    // From raw products to weights, and the key buffer back to the producer. True: the output must be rescaled by rows.factor.
    const auto finish_scores = [&](int block) {
      bool rescale = false;
      const bool masked = block >= full_end || block < full_begin;
      if (!C::kOptimistic || masked || !settled || !optimistic_softmax_step<C>(s, rows, unit)) {
        if constexpr (C::kOptimistic) {
          if (!masked && settled) recompute_scores();
        }
        if constexpr (C::kModified) modify(tile, block);
        if (masked) {
          const int column = block * C::kTileN + threadIdx.x % 4 * 2;
          mask_scores({begin[0] - column, begin[1] - column}, {end[0] - column, end[1] - column});
        }
        rescale = softmax_step<C>(s, rows, unit);
        settled = !__any_sync(kAllLanes, rows.reference[0] == -INFINITY || rows.reference[1] == -INFINITY);
      }
      release(&shared.key_empty[k.stage]);
      k.advance();
      return rescale;
    };

    int block = tile.block_end - 1;
    mbarrier_wait(&shared.key_full[k.stage], k.phase);
    wgmma_pin(s);
    wgmma_fence();
    issue_scores();
    wgmma_wait<0>();
    wgmma_pin(s);
    finish_scores(block);
    pack_weights();

    int accumulate = 0;
    for (--block; block >= block_begin; --block) {
      mbarrier_wait(&shared.key_full[k.stage], k.phase);
      take_turn();
      wgmma_pin(s);
      wgmma_pin(o);
      wgmma_pin(weights);
      wgmma_fence();
      issue_scores();
      wait_value(used_keys - (block + 1) * C::kTileN);
      wgmma_fence();
      issue_output(accumulate);
      pass_turn();
      wgmma_wait<1>();
      wgmma_pin(s);
      const bool rescale = finish_scores(block);
      wgmma_wait<0>();
      wgmma_pin(o);
      wgmma_pin(weights);
      release(&shared.value_empty[v.stage]);
      v.advance();
      pack_weights();
      if (rescale) rescale_rows(o, rows.factor);
      accumulate = 1;
    }
    wait_value(used_keys - block_begin * C::kTileN);
    wgmma_pin(o);
    wgmma_pin(weights);
    wgmma_fence();
    issue_output(accumulate);
    wgmma_wait<0>();
    wgmma_pin(o);
    release(&shared.value_empty[v.stage]);
    v.advance();
  }

  __device__ __forceinline__ void run() {
    RingPosition<kTileSlots> slot;
    int pending = -1;  // query buffer that a store still reads
    if (C::kPingPong && warpgroup == C::kWarpgroups - 1) pass_turn();
    for (;;) {
      mbarrier_wait(&shared.tile_full[slot.stage], slot.phase);
      const Tile& tile = shared.tile[slot.stage];
      if (!tile.valid) break;
      mbarrier_wait(&shared.query_full[q.stage], q.phase);
      rows = RowPair{};
#pragma unroll
      for (float& x : o) x = 0.0f;
      if (tile.block_begin < tile.block_end) run_blocks(tile);
      if (pending >= 0) finish_store(&shared.query_empty[pending]);
      finish_rows<C>(args, tile, tile.first_row + first_row_in_tile(), rows, o);
      store_tile<C>(args, shared.query[q.stage], tile, warpgroup, o);
      __syncwarp();
      release(&shared.tile_empty[slot.stage]);
      slot.advance();
      pending = q.stage;
      if constexpr (C::kQueryStages == 1) {
        finish_store(&shared.query_empty[0]);
        pending = -1;
      }
      q.advance();
    }
    tma_store_wait_read();
  }
};

}  // namespace fa::prefill_sm90
