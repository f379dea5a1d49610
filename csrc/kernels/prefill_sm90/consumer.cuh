// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup of prefill_sm90: 64 query rows of each tile. S = Q K^T of the next key tile is issued before O += P V of
// the current one, so that softmax runs while the tensor cores work; and warpgroups issue in turn (ping-pong), so that one's
// softmax hides behind the other's products.
#pragma once

#include "kernels/common/convert.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/common/wgmma.cuh"
#include "kernels/prefill_sm90/args.h"
#include "kernels/prefill_sm90/epilogue.cuh"
#include "kernels/prefill_sm90/query_bias.cuh"
#include "kernels/prefill_sm90/scores.cuh"
#include "kernels/prefill_sm90/shared_plan.cuh"
#include "kernels/prefill_sm90/softmax.cuh"

namespace fa::prefill_sm90 {

/// Registers and ring positions of one consumer warpgroup.
template <class C>
struct Consumer {
  const KernelArgs& args;
  SharedPlan<C>& shared;
  int warpgroup;
  RingPosition<C::kQueryStages> q;
  RingPosition<C::kStages> k, v;
  RingPosition<C::kBiasStages + 1 - (C::kBiasStages > 0)> b;
  float o[C::kHeadDim / 2];                                     // output fragment
  float s[C::kTileN / 2];                                       // scores, then weights
  uint32_t weights[C::kTileN / 4];                              // weights as A operand
  uint32_t queries[C::kQuerySteps + (C::kQuerySteps == 0)][4];  // the first columns of Q as A operand
  FetchedBias<typename C::T, C::kFetchBias ? C::kTileN : 0> bias;
  RowPair rows;
  RowsView view;
  int used_keys;    // of the tile; where kSmall
  bool settled;     // all rows of the warp may go without a maximum (is_settled)
  int stored = -1;  // query buffer that a copy still reads; where kSmall

  __device__ __forceinline__ void take_turn() {
    if constexpr (C::kPingPong) named_barrier_sync(kTurnBarrier + warpgroup, 2 * kWarpgroupThreads);
  }
  __device__ __forceinline__ void pass_turn() {
    if constexpr (C::kPingPong) {
      named_barrier_arrive(kTurnBarrier + (warpgroup + 1 == C::kWarpgroups ? 0 : warpgroup + 1), 2 * kWarpgroupThreads);
    }
  }
  /// Tells a producer that this warp is done. All its lanes must be.
  template <int kArrivals>
  __device__ __forceinline__ void release(Mbarrier<kArrivals>& barrier) {
    if (threadIdx.x % 32 == 0) barrier.arrive();
  }

  __device__ __forceinline__ int first_row_in_tile() const {
    return warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  }

  /// The thread's part of Q's columns 16 step … + 15 as A operand.
  __device__ __forceinline__ void load_queries(uint32_t (&fragment)[4], int step) const {
    const int row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 16;
    const uint32_t first = shared_address(shared.query[q.stage]) + swizzled_offset(row, threadIdx.x % 32 / 16);
    ldmatrix_x4(fragment, swizzled_step(first, step % 4) + step / 4 * C::kTileM * 128);
  }

  /// Issues S = Q K^T for the first kKeys keys of the tile.
  template <int kKeys = C::kTileN>
  __device__ __forceinline__ void issue_scores() {
    issue_score_steps<kKeys, 0, C::kHeadDim / 16>();
    wgmma_commit();
  }

  /// Of these products those of columns 16 kBegin … 16 kEnd - 1.
  template <int kKeys, int kBegin, int kEnd>
  __device__ __forceinline__ void issue_score_steps() {
    float (&scores)[kKeys / 2] = reinterpret_cast<float (&)[kKeys / 2]>(s);
    const uint64_t query = wgmma_descriptor_k_major(shared_address(shared.query[q.stage]) + warpgroup * 64 * 128);
    const uint64_t key = wgmma_descriptor_k_major(shared_address(shared.key[k.stage]));
#pragma unroll
    for (int step = kBegin; step < kEnd; ++step) {
      const uint32_t in_panel = (step % 4) * 32;
      const uint64_t keys = key + (((step / 4) * C::kTileN * 128 + in_panel) >> 4);
      if (step < C::kQuerySteps) {
        const uint32_t (&a)[4] = queries[step < C::kQuerySteps ? step : 0];
        Wgmma<kKeys>::template rs<typename C::T, false>(scores, a[0], a[1], a[2], a[3], keys, step > 0);
      } else {
        Wgmma<kKeys>::template ss<typename C::T>(scores, query + (((step / 4) * C::kTileM * 128 + in_panel) >> 4), keys,
                                                 step > 0);
      }
    }
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

  /// Waits for the values of key tile `block`, and where no producer does it (clear_values), clears those behind the last key.
  __device__ __forceinline__ void wait_value(int block) {
    shared.value_full[v.stage].wait(v.phase);
    if constexpr (C::kSmall) {
      const int used = used_keys - block * C::kTileN;
      if (used >= C::kTileN) return;
      clear_rows<C>(shared.value[v.stage], used, threadIdx.x % kWarpgroupThreads, kWarpgroupThreads);
      named_barrier_sync(kWarpgroupBarrier + warpgroup, kWarpgroupThreads);
    }
  }

  /// S = Q K^T once more, by each warp for its own rows. Rare: where the scores were spent on a reference that proved too small.
  __device__ __forceinline__ void recompute_scores() {
    const int lane = threadIdx.x % 32;
    const uint32_t key = shared_address(shared.key[k.stage]);
#pragma unroll
    for (int j = 0; j < C::kTileN / 16; ++j) {
      float low[4] = {}, high[4] = {};  // keys 16 j … + 7 and + 8 … + 15
      const int key_row = 16 * j + lane % 8 + lane / 16 * 8;
#pragma unroll 1
      for (int step = 0; step < C::kHeadDim / 16; ++step) {
        const int panel = step / 4, chunk = step % 4 * 2;
        uint32_t a[4], b_pair[4];
        load_queries(a, step);
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

  __device__ __forceinline__ bool bias_is_staged() const { return C::kBiasStages > 0 && args.bias_by_tile; }
  __device__ __forceinline__ const uint8_t* staged_bias() const {
    return bias_is_staged() ? shared.bias + b.stage * C::kBiasBytes : nullptr;
  }

  /// Starts to read the bias of key tile `block`, where the copy engine can't bring it.
  __device__ __forceinline__ void fetch_bias(const Tile& tile, int block) {
    if constexpr (C::kFetchBias) {
      bias.there = args.problem.bias.present && !args.bias_by_tile && args.problem.bias.dtype == args.problem.query.dtype;
      if (bias.there) {
        const RowOffsets offsets = row_offsets(args.problem.bias, tile, thread_row<C>(tile, warpgroup));
        bias.fetch(args.problem.bias, offsets, block * C::kTileN + threadIdx.x % 4 * 2);
      }
    }
  }

  /// Gives the buffer of a K tile back that this warpgroup does not need.
  __device__ __forceinline__ void skip_key() {
    shared.key_full[k.stage].wait(k.phase);
    if (bias_is_staged()) shared.bias_full[b.stage].wait(b.phase);
    __syncwarp();
    release(shared.key_empty[k.stage]);
    k.advance();
    if (bias_is_staged()) {
      release(shared.bias_empty[b.stage]);
      b.advance();
    }
  }

  __device__ __forceinline__ void skip_value() {
    shared.value_full[v.stage].wait(v.phase);
    __syncwarp();
    release(shared.value_empty[v.stage]);
    v.advance();
  }

  __device__ __forceinline__ void skip_turn() {
    take_turn();
    pass_turn();
  }

  /// Scores of a key tile that every row sees become weights, against the references as they stand. False: the scores are lost.
  __device__ __forceinline__ bool try_weights(const Tile& tile, int block) {
    if constexpr (!C::kModified) {
      return optimistic_softmax_step<C>(s, rows, args.problem.softmax_scale * kLog2E);
    } else {
      const AttentionParams& p = args.problem;
      if (bias_is_staged() && p.softcap == 0.0f && !p.alibi_slopes.present) {
        start_exponents<C>(s, staged_bias(), first_row_in_tile() & ~15, p.softmax_scale, rows.reference);
        return optimistic_weights(s, rows);
      }
      modify_scores<C>(s, p, p.softmax_scale, tile, staged_bias(), first_row_in_tile(), block * C::kTileN + threadIdx.x % 4 * 2,
                       bias);
      return optimistic_softmax_step<C>(s, rows, kLog2E);
    }
  }

  /// The general way from raw products to weights; kFirst: of the first key tile that the rows see. True: the output must be
  /// rescaled by rows.factor.
  template <bool kFirst>
  __device__ __forceinline__ bool take_weights(const Tile& tile, int block, bool masked) {
    const int column = block * C::kTileN + threadIdx.x % 4 * 2;
    if constexpr (C::kModified)
      modify_scores<C>(s, args.problem, args.problem.softmax_scale, tile, staged_bias(), first_row_in_tile(), column, bias);
    if (kFirst && !C::kSmall && masked && tile.keys_in_last > 0) {  // NOTE: one register too many for small blocks
      hide_from<C::kTileN>(s, tile.keys_in_last);
    } else if (masked) {
      hide_keys<C>(s, args.problem, tile, thread_row<C>(tile, warpgroup), block * C::kTileN);
    }
    const bool rescale = softmax_step<C>(s, rows, C::kModified ? kLog2E : args.problem.softmax_scale * kLog2E);
    settled = __all_sync(kAllLanes, is_settled<C>(rows));
    return rescale;
  }

  /// From raw products to weights, and the key buffer back to the producer. True: the output must be rescaled by rows.factor.
  template <bool kFirst = false>
  __device__ __forceinline__ bool finish_scores(const Tile& tile, int block) {
    const bool masked = block >= view.full_end || block < view.full_begin, hopeful = settled && !masked;
    if (bias_is_staged()) shared.bias_full[b.stage].wait(b.phase);
    bool rescale = false;
    if (!hopeful || !try_weights(tile, block)) {
      if (hopeful) recompute_scores();
      rescale = take_weights<kFirst>(tile, block, masked);
    }
    if (bias_is_staged()) {
      __syncwarp();
      release(shared.bias_empty[b.stage]);
      b.advance();
    }
    release(shared.key_empty[k.stage]);
    k.advance();
    return rescale;
  }

  /// Scores and weights of a last key tile with very few keys.
  __device__ __forceinline__ void take_few(const Tile& tile) {
    wgmma_pin(s);
    wgmma_fence();
    issue_scores<kFewInLast>();
    wgmma_wait<0>();
    wgmma_pin(s);
    float (&few)[kFewInLast / 2] = reinterpret_cast<float (&)[kFewInLast / 2]>(s);
    hide_from<kFewInLast>(few, tile.keys_in_last);
    softmax_step<C>(few, rows, args.problem.softmax_scale * kLog2E);
    settled = __all_sync(kAllLanes, is_settled<C>(rows));
#pragma unroll
    for (int i = kFewInLast / 2; i < C::kTileN / 2; ++i) s[i] = 0.0f;
    release(shared.key_empty[k.stage]);
    k.advance();
  }

  /// Waits for the values of key tile `block` and issues O += P V.
  __device__ __forceinline__ void start_output(int block) {
    wait_value(block);
    wgmma_pin(o);
    wgmma_pin(weights);
    wgmma_fence();
    issue_output();
  }

  __device__ __forceinline__ void finish_output() {
    wgmma_wait<0>();
    wgmma_pin(o);
    wgmma_pin(weights);
    release(shared.value_empty[v.stage]);
    v.advance();
  }

  /// In small blocks, waits until the copy engine has read the last tile's output from the buffer in which that tile's queries
  /// stood, and gives the buffer back to the producer.
  __device__ __forceinline__ void finish_stored() {
    if (C::kSmall && stored >= 0 && threadIdx.x == 0) {
      tma_store_wait_read<0>();
      shared.query_empty[stored].arrive();
    }
    stored = -1;
  }

  /// Issues S = Q K^T of the next key tile.
  __device__ __forceinline__ void start_scores() {
    wgmma_pin(s);
    wgmma_fence();
    issue_scores();
  }

  /// Issues S = Q K^T of the last key tile that the rows see, once its keys are there; of the tile that comes first, the first
  /// panel once that is there.
  __device__ __forceinline__ void start_first_scores(const Tile& tile) {
    if constexpr (C::kFirstKeyApart) {
      if (view.block_end == tile.block_end) {
        shared.first_key_full[q.stage].wait(q.phase);
      } else {
        shared.key_full[k.stage].wait(k.phase);
      }
      wgmma_pin(s);
      wgmma_fence();
      issue_score_steps<C::kTileN, 0, 4>();
      shared.key_full[k.stage].wait(k.phase);
      wgmma_fence();
      issue_score_steps<C::kTileN, 4, C::kHeadDim / 16>();
      wgmma_commit();
    } else {
      start_scores();
    }
  }

  /// Weights of the last key tile that the rows see; there is no product to hide softmax behind yet.
  __device__ __forceinline__ void take_first_weights(const Tile& tile) {
    if constexpr (!C::kFirstKeyApart) shared.key_full[k.stage].wait(k.phase);
    if (C::kFewApart && tile.keys_in_last > 0 && tile.keys_in_last <= kFewInLast) {
      take_few(tile);
    } else {
      start_first_scores(tile);
      wgmma_wait<0>();
      wgmma_pin(s);
      finish_scores<true>(tile, view.block_end - 1);
    }
    pack_weights();
  }

  /// The key tiles that the warpgroup's rows see, from the last to the first.
  __device__ __forceinline__ void run_blocks(const Tile& tile) {
    take_first_weights(tile);
    finish_stored();  // the copy has had the time of a key tile; now the queries after the next may come
    for (int block = view.block_end - 2; block >= view.block_begin; --block) {
      // 1. In this warpgroup's turn, issue S = Q K^T of this key tile and O += P V of the one before.
      shared.key_full[k.stage].wait(k.phase);
      take_turn();
      start_scores();
      start_output(block + 1);
      pass_turn();
      fetch_bias(tile, block);
      // 2. When S is there, take the weights, while O += P V runs and other warpgroups' products do.
      wgmma_wait<1>();
      wgmma_pin(s);
      const bool rescale = finish_scores(tile, block);
      // 3. When O is there, give the values back, and convert the weights into registers that O += P V no longer reads.
      finish_output();
      pack_weights();
      // 4. Where a maximum has risen far, bring O to it.
      if (rescale) rescale_rows(o, rows.factor);
    }
    release_queries();
    start_output(view.block_begin);
    finish_output();
  }

  /// The tile's queries are no longer needed, not even for scores to be computed once more.
  __device__ __forceinline__ void release_queries() {
    if constexpr (C::kOwnOutput) {
      __syncwarp();
      release(shared.query_empty[q.stage]);
    }
  }

  /// After the last tile: once all output is in device memory, mends rows that hold values of hidden keys. In small blocks the
  /// producer warp does (produce).
  __device__ __forceinline__ void mend_output() {
    if (!C::kStoreWarp && threadIdx.x % kWarpgroupThreads == 0) tma_store_wait<0>();
    __syncwarp();
    if constexpr (C::kSmall) {
      named_barrier_arrive(kMendBarrier, kWarpgroupThreads + 32);
    } else {
      named_barrier_sync(kMendBarrier, 32 * C::kConsumerWarps + 32);
      if (C::kStoreWarp && shared.spoilt.last_spoilt >= 0) shared.all_stored.wait(0);
      shared.spoilt.template mend<typename C::T>(args, threadIdx.x / 32 * 16, 16);
    }
  }

  /// Does one of the thread's two rows attend no key, and is it to become something else than 0?
  __device__ __forceinline__ bool awaits_filling(const Tile& tile, int row) const {
    return args.problem.empty_row != EmptyRow::kZero && ((rows.sum[0] == 0.0f && is_row<C>(row, tile.query_length)) ||
                                                         (rows.sum[1] == 0.0f && is_row<C>(row + 8, tile.query_length)));
  }

  /// Normalises the tile's rows and sees to it that they leave.
  __device__ __forceinline__ void end_tile(const Tile& tile, int slot) {
    const int row = thread_row<C>(tile, warpgroup);
    finish_rows<C>(args, tile, row, rows, o);
    if (args.spoilt != nullptr) shared.spoilt.mark(has_spoilt_row(o, rows.sum) || awaits_filling(tile, row), slot);
    if constexpr (C::kOwnOutput) {
      store_by_panels<C>(args, tile, warpgroup, o, shared.out[warpgroup]);
    } else {
      finish_stored();
      uint8_t* queries = shared.query[q.stage] + warpgroup * 64 * 128;
      stage_tile<C>(args, tile, warpgroup, o, queries);
      if constexpr (C::kSmall) {
        named_barrier_sync(kWarpgroupBarrier, kWarpgroupThreads);
        if (threadIdx.x == 0) {
          copy_out<C>(args, tile, 0, queries);
          tma_store_commit();
        }
        stored = q.stage;
      }
    }
    __syncwarp();
    if constexpr (C::kStoreWarp) release(shared.out_full[q.stage][warpgroup]);
    release(shared.tile_empty[slot]);
    if constexpr (C::kQueryStages == 1) finish_stored();
  }

  /// Nothing is known of the tile's rows yet.
  __device__ __forceinline__ void start_tile(const Tile& tile, int slot) {
#pragma unroll
    for (int step = 0; step < C::kQuerySteps; ++step) load_queries(queries[step], step);
    view = shared.view[slot][warpgroup];
    if constexpr (C::kSmall) used_keys = tile.used_keys;
    rows = RowPair{};
    settled = false;
#pragma unroll
    for (float& x : o) x = 0.0f;
  }

  /// Tile after tile. A warpgroup also takes and passes its turn for each key tile that its rows don't see, and it passes the
  /// turn before it waits for that tile's keys: the others can't go on, and give their buffers back, without it.
  __device__ __forceinline__ void run() {
    RingPosition<kTileSlots> slot;
    if (C::kPingPong && warpgroup == C::kWarpgroups - 1) pass_turn();
    for (;;) {
      // 1. The next tile and its queries.
      shared.tile_full[slot.stage].wait(slot.phase);
      const Tile& tile = shared.tile[slot.stage];
      if (!tile.valid) break;
      if constexpr (C::kFetchBias) {
        const RowsView& next = shared.view[slot.stage][warpgroup];
        // Of rows that see no key there is nothing to read: it could lie in front of the first key.
        if (next.block_begin < next.block_end) fetch_bias(tile, next.block_end - 1);
      }
      wait_for_queries(shared, q, warpgroup);
      if constexpr (C::kAddsQueryBias)
        add_query_bias<C>(shared.query[q.stage] + warpgroup * 64 * 128, args.problem, tile.head, kWarpgroupBarrier + warpgroup);
      start_tile(tile, slot.stage);
      // 2. Key tiles that only rows of other warpgroups see, behind those that these rows see.
      const bool has_blocks = view.block_begin < view.block_end;
      const int num_right = tile.block_end - view.block_end;
      for (int i = 0; i < num_right; ++i) {
        skip_key();
        if (has_blocks || i + 1 < num_right) skip_turn();
        skip_value();
      }
      // 3. Those that these rows see.
      if (has_blocks) run_blocks(tile);
      if (!has_blocks) release_queries();
      // 4. Those of other warpgroups again, before them.
      for (int i = tile.block_begin; i < view.block_begin; ++i) {
        skip_turn();
        skip_key();
        skip_value();
      }
      // 5. The output.
      end_tile(tile, slot.stage);
      slot.advance();
      q.advance();
    }
    // 6. Shared memory must outlive the copies out of it.
    if constexpr (!C::kStoreWarp) tma_store_wait_read<0>();
    // 7. Rows into which values of hidden keys have come.
    if (args.spoilt != nullptr) mend_output();
  }
};

}  // namespace fa::prefill_sm90
