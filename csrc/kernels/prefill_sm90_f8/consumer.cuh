// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup of prefill_sm90_f8: 64 query rows of each tile. In its turn a warpgroup takes the product of its last
// weights with their values and the next scores; while it is at their softmax, the tensor cores work for the others.
#pragma once

#include "kernels/prefill_sm90/scores.cuh"
#include "kernels/prefill_sm90_f8/epilogue.cuh"
#include "kernels/prefill_sm90_f8/products.cuh"
#include "kernels/prefill_sm90_f8/softmax.cuh"
#include "semantics/descale.h"

namespace fa::prefill_sm90_f8 {

/// A part of a key tile, for hide_keys.
template <class C>
struct KeyGroup {
  static constexpr int kTileN = 32;
  static constexpr bool kStagedOnly = C::kStagedOnly, kModified = true, kVotesOnMasks = false;
};

/// Registers and ring positions of one consumer warpgroup.
template <class C>
struct Consumer {
  using Multiply = Products<C>;
  using Sum = float[Multiply::kSum];  // of a product with values, in registers

  const KernelArgs& args;
  SharedPlan<C>& shared;
  int warpgroup;
  RingPosition<C::kQueryStages> q;
  RingPosition<C::kKeyStages> k;
  RingPosition<C::kValueStages> v;
  float o[Multiply::kOut];               // output fragment, times 2^kWeightBits
  float s[Multiply::kScores];            // scores, then weights
  uint32_t weights[Multiply::kWeights];  // as A operand
  RowPair rows;
  RowsView view;
  float scale;   // of scores
  bool natural;  // scores are multiplied by the scale at once: modified ones, or a scale <= 0

  __device__ __forceinline__ void take_turn() {
    if constexpr (C::kTakesTurns) named_barrier_sync(kTurnBarrier + warpgroup, 2 * kWarpgroupThreads);
  }
  __device__ __forceinline__ void pass_turn() {
    if constexpr (C::kTakesTurns) {
      named_barrier_arrive(kTurnBarrier + (warpgroup + 1 == C::kWarpgroups ? 0 : warpgroup + 1), 2 * kWarpgroupThreads);
    }
  }
  __device__ __forceinline__ void skip_turn() {
    take_turn();
    pass_turn();
  }

  template <int kArrivals>
  __device__ __forceinline__ void release(Mbarrier<kArrivals>& barrier) {
    if (threadIdx.x % 32 == 0) barrier.arrive();
  }

  __device__ __forceinline__ int first_row_in_tile() const {
    return warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  }

  __device__ __forceinline__ const uint8_t* queries() const { return shared.query[q.stage] + warpgroup * 64 * 128; }

  /// Gives the buffer of a K tile back that this warpgroup does not need.
  __device__ __forceinline__ void skip_key() {
    shared.key_full[k.stage].wait(k.phase);
    __syncwarp();
    release(shared.key_empty[k.stage]);
    k.advance();
  }

  __device__ __forceinline__ void skip_value() {
    shared.value_full[v.stage].wait(v.phase);
    __syncwarp();
    release(shared.value_empty[v.stage]);
    v.advance();
  }

  __device__ __forceinline__ void start_scores() {
    wgmma_pin(s);
    wgmma_fence();
    Multiply::start_scores(s, queries(), shared.key[k.stage]);
  }

  __device__ __forceinline__ void finish_scores() {
    wgmma_wait<0>();
    wgmma_pin(s);
    release(shared.key_empty[k.stage]);
    k.advance();
  }

  /// Issues part kPart of P V.
  template <int kPart>
  __device__ __forceinline__ void start_part(Sum& sum, float (&ones)[4]) {
    wgmma_pin(sum);
    wgmma_pin(weights);
    wgmma_fence();
    Multiply::template start_sum<kPart>(sum, weights, shared.value[v.stage], ones);
  }

  /// Waits for part kPart, behind which kPending others are on their way, and adds it to the output.
  template <int kPart, int kPending>
  __device__ __forceinline__ void finish_part(Sum& sum, float (&ones)[4]) {
    constexpr bool kLast = kPart + 1 == C::kSums;
    constexpr bool kOnesPending = C::kOnesBehind && kPart + kPending + 1 == C::kSums;
    wgmma_wait<kPending + kOnesPending>();
    wgmma_pin(sum);
    Multiply::template add_sum<kPart>(o, sum, rows.factor);
    if constexpr (kLast && C::kSumsWeights && !C::kOnesApart) add_ones(sum[C::kSumColumns / 2], sum[C::kSumColumns / 2 + 2]);
    if constexpr (kLast && !C::kOnesBehind) finish_values(ones);
  }

  /// One of four threads has the sums of the weights, the others have zeros.
  __device__ __forceinline__ void add_ones(float first, float second) {
    rows.sum[0] += first;
    rows.sum[1] += second;
  }

  /// All of a tile's products with the values have been waited for.
  __device__ __forceinline__ void finish_values(float (&ones)[4]) {
    wgmma_pin(weights);
    if constexpr (C::kOnesApart) {
      wgmma_pin(ones);
      add_ones(ones[0], ones[2]);
    }
    release(shared.value_empty[v.stage]);
    v.advance();
  }

  /// Part kPart is on its way in `sum`; the next one is issued, into `other`, before this one is added.
  template <int kPart>
  __device__ __forceinline__ void stream_parts(Sum& sum, Sum& other, float (&ones)[4]) {
    if constexpr (kPart + 1 < C::kSums) {
      start_part<kPart + 1>(other, ones);
      finish_part<kPart, 1>(sum, ones);
      // NOTE: a branch, which keeps the compiler from adding this part behind the next.
      if constexpr (C::kOnesBehind && kPart + 2 == C::kSums) shared.value_full[v.stage].wait(v.phase);
      stream_parts<kPart + 1>(other, sum, ones);
    } else {
      finish_part<kPart, 0>(sum, ones);
    }
  }

  /// out = factor out + P V. kOnesBehind: `ones` are on their way; finish_values has to follow.
  __device__ __forceinline__ void add_values(float (&ones)[4]) {
    // NOTE: the sums are no parts of `s`, though they stand in its registers: ptxas runs products one after the other if it is
    // told that one of 128 columns shares registers with two of 64 (C7511).
    if constexpr (C::kSumColumns == C::kTileN) {  // a product as wide as that of the scores
      start_part<0>(s, ones);
      finish_part<0, 0>(s, ones);
    } else {
      Sum sum, other;
      start_part<0>(sum, ones);
      stream_parts<0>(sum, other, ones);
    }
  }

  /// In the warpgroup's turn, out = factor out + P V and the next scores.
  __device__ __forceinline__ void multiply() {
    // NOTE: where there are parts, waits for the keys behind them: this branch keeps the compiler from adding the last part after
    // the scores have been issued, for which it would need more registers.
    constexpr bool kKeysFirst = C::kSums == 1;
    shared.value_full[v.stage].wait(v.phase);
    if constexpr (kKeysFirst) shared.key_full[k.stage].wait(k.phase);
    take_turn();
    float ones[4];
    add_values(ones);
    if constexpr (!kKeysFirst) shared.key_full[k.stage].wait(k.phase);
    start_scores();
    if constexpr (C::kTurnEnd == TurnEnd::kScoresIssued) pass_turn();
    if constexpr (C::kTurnEnd == TurnEnd::kLastStep) {
      wgmma_wait<1>();
      pass_turn();
    }
    finish_scores();
    if constexpr (C::kOnesBehind) finish_values(ones);
    if constexpr (C::kTurnEnd == TurnEnd::kScoresThere) pass_turn();
  }

  /// Scores that the rows don't see become -inf, 32 keys at a time: what of all is visible takes more registers than there are.
  __device__ __forceinline__ void hide_keys(const Tile& tile, int block) {
#pragma unroll
    for (int group = 0; group < C::kTileN / 32; ++group) {
      prefill_sm90::hide_keys<KeyGroup<C>>(reinterpret_cast<float (&)[16]>(s[16 * group]), args.problem, tile,
                                           prefill_sm90::thread_row<C>(tile, warpgroup), block * C::kTileN + 32 * group);
    }
  }

  /// From raw products to weights, and rows.factor for the output so far.
  __device__ __forceinline__ void take_weights(const Tile& tile, int block) {
    if constexpr (C::kPlain) {
      if (natural) {
#pragma unroll
        for (float& x : s) x *= scale;
      }
    } else {
      const int first_key = block * C::kTileN + threadIdx.x % 4 * 2;
      prefill_sm90::modify_scores<C>(s, args.problem, scale, tile, nullptr, first_row_in_tile(), first_key);
    }
    if (block >= view.full_end || block < view.full_begin) hide_keys(tile, block);
    const float unit = natural ? kLog2E : scale * kLog2E;
    raise_references(s, rows, unit);
    prefill_sm90_f8::take_weights<!C::kPlain, !C::kSumsWeights>(s, rows, unit);
    Multiply::pack_weights(weights, s);
  }

  /// The key tiles that the warpgroup's rows see, from the last to the first.
  __device__ __forceinline__ void run_blocks(const Tile& tile) {
    shared.key_full[k.stage].wait(k.phase);
    start_scores();
    finish_scores();
    for (int block = view.block_end - 1;; --block) {
      take_weights(tile, block);
      if (block == view.block_begin) break;
      multiply();
    }
    shared.value_full[v.stage].wait(v.phase);
    float ones[4];
    add_values(ones);
    if constexpr (C::kOnesBehind) {
      wgmma_wait<0>();
      finish_values(ones);
    }
  }

  /// Normalises the tile's rows and writes them.
  __device__ __forceinline__ void end_tile(const Tile& tile, int slot) {
    const int row = prefill_sm90::thread_row<C>(tile, warpgroup);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!natural) rows.reference[r] *= scale;
      rows.sum[r] *= kWeightUnit;
    }
    prefill_sm90::finish_rows<C>(args, tile, row, rows, o);
    if (args.spoilt != nullptr) shared.spoilt.mark(has_spoilt_row(o, rows.sum), slot);
    const int key_head = args.heads_per_kv.quotient(tile.head);
    store_tile<C>(args.problem, tile, row, o, kWeightUnit * output_factor(args.problem, tile.sequence, tile.head, key_head));
    __syncwarp();
    release(shared.tile_empty[slot]);
  }

  /// After the last tile: once all output is written, mends rows that hold values of hidden keys.
  __device__ __forceinline__ void mend_output() {
    __syncwarp();
    named_barrier_sync(prefill_sm90::kMendBarrier, 32 * C::kConsumerWarps + 32);
    shared.spoilt.template mend<Float8>(args, threadIdx.x / 32 * 16, 16);
  }

  /// Tile after tile. Turns are taken and passed as in prefill_sm90: for each key tile but the first, seen or not.
  __device__ __forceinline__ void run() {
    RingPosition<kTileSlots> slot;
    if (C::kTakesTurns && warpgroup == C::kWarpgroups - 1) pass_turn();
    for (;;) {
      shared.tile_full[slot.stage].wait(slot.phase);
      const Tile& tile = shared.tile[slot.stage];
      if (!tile.valid) break;
      scale = descaled_softmax_scale(args.problem, tile.sequence, tile.head, args.heads_per_kv.quotient(tile.head));
      natural = !C::kPlain || !(scale > 0.0f);
      prefill_sm90::wait_for_queries(shared, q, warpgroup);
      view = shared.view[slot.stage][warpgroup];
      rows = RowPair{};
#pragma unroll
      for (float& x : o) x = 0.0f;
      const bool has_blocks = view.block_begin < view.block_end;
      const int num_right = tile.block_end - view.block_end;
      for (int i = 0; i < num_right; ++i) {
        skip_key();
        if (has_blocks || i + 1 < num_right) skip_turn();
        skip_value();
      }
      if (has_blocks) run_blocks(tile);
      __syncwarp();
      release(shared.query_empty[q.stage]);
      for (int i = tile.block_begin; i < view.block_begin; ++i) {
        skip_turn();
        skip_key();
        skip_value();
      }
      end_tile(tile, slot.stage);
      slot.advance();
      q.advance();
    }
    if (args.spoilt != nullptr) mend_output();
  }
};

}  // namespace fa::prefill_sm90_f8
