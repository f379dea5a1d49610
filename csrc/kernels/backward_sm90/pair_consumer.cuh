// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup of a block of a pair (pair_plan.cuh). For each tile of 64 queries it computes S = Q K^T and dP = dO V^T of
// 32 of the block's keys, and from them P and dS, which go to the shared memory of both blocks. Of the block's half of the
// columns it adds to dV += P^T dO and dK += dS^T Q of 64 of the pair's keys, and computes 64 of dQ = dS K, summed over all 128
// keys.
#pragma once

#include "kernels/backward_sm90/pair_plan.cuh"
#include "kernels/backward_sm90/query_sums.cuh"
#include "kernels/backward_sm90/rows_out.cuh"
#include "kernels/common/cluster.cuh"
#include "kernels/common/exp2.cuh"
#include "kernels/common/tma.cuh"
#include "kernels/common/wgmma.cuh"

namespace fa::backward_sm90 {

template <class C>
struct PairConsumer {
  using T = typename C::T;
  const KernelArgs& args;
  PairPlan<C>& shared;
  int warpgroup;
  int rank;  // of the block in its pair
  RingPosition<C::kStages> near;
  RingPosition<1> far, keys, exchange;
  RingPosition<kTurnSlots> turn;
  int before_head, before_tile;  // of the step before, whose dQ has not been added; head -1: there is none
  float d_key[C::kHalfDim / 2];
  float d_value[C::kHalfDim / 2];
  float s[16];   // S, then P
  float dp[16];  // dP, then dS
  float dq[32];

  /// Issues out = A B^T over all columns, A being a tile of queries and B the warpgroup's keys of `key_tile`.
  __device__ __forceinline__ void issue_scores(float (&out)[16], const HalvesPlan<C>& queries, const uint8_t* key_tile) {
    const uint64_t b = wgmma_descriptor_k_major(shared_address(key_tile) + warpgroup * 32 * 128);
    wgmma_pin(out);
    wgmma_fence();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint64_t a = wgmma_descriptor_k_major(shared_address(half == 0 ? queries.near[near.stage] : queries.far));
      const uint64_t columns = b + (((half ^ rank) * C::kHalfBytes) >> 4);
#pragma unroll
      for (int step = 0; step < C::kHalfDim / 16; ++step) {
        const uint32_t offset = (step / 4 * C::kPanelBytes + step % 4 * 32) >> 4;
        Wgmma<32>::template ss<T>(out, a + offset, columns + offset, half + step > 0);
      }
    }
    wgmma_commit();
  }

  /// Issues sum += A^T B, A being P or dS of one block's keys and B the near half of a tile of queries.
  __device__ __forceinline__ void issue_key_gradient(float (&sum)[C::kHalfDim / 2], const uint8_t* scores,
                                                     const uint8_t* queries) {
    const uint64_t a = wgmma_descriptor_mn_major(shared_address(scores), C::kPanelBytes);
    const uint64_t b = wgmma_descriptor_mn_major(shared_address(queries), C::kPanelBytes);
    wgmma_pin(sum);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kTileM / 16; ++step)
      Wgmma<C::kHalfDim>::template ss<T, true, true>(sum, a + ((step * 16 * 128) >> 4), b + ((step * 16 * 128) >> 4), 1);
    wgmma_commit();
  }

  /// Issues dQ = dS K of the warpgroup's 64 columns.
  __device__ __forceinline__ void issue_query_gradient() {
    wgmma_pin(dq);
    wgmma_fence();
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block) {
      const uint8_t* const columns = block == rank ? shared.key + rank * C::kHalfBytes : shared.other_key;
      const uint64_t a = wgmma_descriptor_k_major(shared_address(shared.scores[block].gradients));
      const uint64_t b = wgmma_descriptor_mn_major(shared_address(columns) + warpgroup * C::kPanelBytes, C::kPanelBytes);
#pragma unroll
      for (int step = 0; step < C::kBlockN / 16; ++step)
        Wgmma<64>::template ss<T, true>(dq, a + ((step * 32) >> 4), b + ((step * 16 * 128) >> 4), block + step > 0);
    }
    wgmma_commit();
  }

  /// Issues S and dP of the next tile of queries.
  __device__ __forceinline__ void start_scores() {
    shared.query.near_full[near.stage].wait(near.phase);
    shared.query.far_full.wait(far.phase);
    issue_scores(s, shared.query, shared.key);
    shared.d_out.near_full[near.stage].wait(near.phase);
    shared.d_out.far_full.wait(far.phase);
    issue_scores(dp, shared.d_out, shared.value);
    far.advance();
  }

  /// They are there: their far halves can be given back.
  __device__ __forceinline__ void finish_scores() {
    wgmma_wait<0>();
    wgmma_pin(s);
    wgmma_pin(dp);
    release(shared.query.far_empty);
    release(shared.d_out.far_empty);
  }

  /// Weights of keys that rows don't see become 0.
  __device__ __forceinline__ void hide_keys(const Item& item, int first_key, int first_row) {
    const int key = first_key + threadIdx.x % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + first_row_of_thread() + 8 * r;
      const int begin = item.view.band.first(row, 0) - key, end = item.view.band.end(row, item.view.kv_length) - key;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int column = i / 2 * 8 + i % 2;
        if (column < begin || column >= end) s[i / 2 * 4 + 2 * r + i % 2] = 0.0f;
      }
    }
  }

  /// Do all rows of the tile see all keys of the warpgroup?
  __device__ __forceinline__ bool all_visible(const Item& item, int first_key, int first_row) const {
    const KeySpan seen = item.view.band.seen_by_all(first_row, first_row + C::kTileM - 1, {0, item.view.kv_length});
    return seen.begin <= first_key && first_key + 32 <= seen.end;
  }

  /// P = exp(scale * S - lse) and dS = P (dP - delta).
  __device__ __forceinline__ void take_scores(const Item& item, int tile) {
    const float* lse = shared.query.numbers[near.stage] + first_row_of_thread();
    const float* delta = shared.d_out.numbers[near.stage] + first_row_of_thread();
    const int first_key = item.key_tile * C::kTileN + rank * C::kBlockN + warpgroup * 32, first_row = tile * C::kTileM;
#pragma unroll
    for (int i = 0; i < 16; ++i) s[i] = exp2_approx(fmaf(s[i], args.scale_log2, -lse[i / 2 % 2 * 8]));
    if (!all_visible(item, first_key, first_row)) hide_keys(item, first_key, first_row);
#pragma unroll
    for (int i = 0; i < 16; ++i) dp[i] = s[i] * (dp[i] - delta[i / 2 % 2 * 8]);
  }

  /// Writes P or dS of the warpgroup's keys into a tile of the block's.
  __device__ __forceinline__ void store_scores(uint8_t* to, const float (&x)[16]) {
    uint32_t x16[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x16[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      store_matrices(shared_address(to) + swizzled_offset(row, 4 * warpgroup + 2 * i + lane / 16), x16[4 * i], x16[4 * i + 1],
                     x16[4 * i + 2], x16[4 * i + 3]);
  }

  /// Hands P and dS to the consumers of both blocks.
  __device__ __forceinline__ void share_scores() {
    Scores<C>& own = shared.scores[rank];
    shared.scores_empty.wait(exchange.phase ^ 1);
    store_scores(own.weights, s);
    store_scores(own.gradients, dp);
    fence_async_proxy();
    named_barrier_sync(kConsumeBarrier, C::kConsumerThreads);
    if (threadIdx.x != 0) return;
    shared.scores_full.arrive_expect(sizeof(Scores<C>));
    bulk_copy_to_cluster(cluster_address(&own, rank ^ 1), &own, sizeof(Scores<C>),
                         cluster_address(&shared.scores_full.word, rank ^ 1));
  }

  /// The row of dQ ends here: all key tiles have added to it.
  __device__ __forceinline__ void store_query_gradient(const Item& item, int head, int first_row) {
    const TensorView& out = args.d_query;
    const int column = rank * C::kHalfDim + warpgroup * 64;
    T* first = static_cast<T*>(out.data) + item.batch * out.stride[0] + head * out.stride[1] + column;
    store_fragment(dq, args.scale, first, out.stride[2], first_row + first_row_of_thread(), static_cast<int>(out.shape[2]),
                   static_cast<int>(out.shape[3]) - column);
  }

  /// Adds dQ to what other key tiles have added. The first stores it, the last takes the sum to the tensor.
  __device__ __forceinline__ void add_query_gradient(const Item& item, int head, int tile) {
    const Turn place = turn_of(key_tiles<C::kTileM, C::kTileN>(item.view, tile), item.key_tile, item.descending);
    const int64_t part = (static_cast<int64_t>(args.query_tile(item.first_query_tile, head, tile)) * 2 + rank) * 2 + warpgroup;
    float* const sum = args.sums + part * C::kPartElements;
    shared.turn_full[turn.stage].wait(turn.phase);
    if (place.place + 1 < place.count) {
      add_to_sum(dq, sum, place.place == 0);
    } else {
      if (place.place > 0) add_sum<false>(dq, sum);
      store_query_gradient(item, head, tile * C::kTileM);
    }
    __syncwarp();
    release(shared.turn_done[turn.stage]);
    turn.advance();
  }

  /// That of the step before, if there was one.
  __device__ __forceinline__ void add_query_gradient_before(const Item& item) {
    if (before_head >= 0) add_query_gradient(item, before_head, before_tile);
  }

  /// Issues dV += P^T dO and dK += dS^T Q.
  __device__ __forceinline__ void issue_key_gradients() {
    const Scores<C>& scores = shared.scores[warpgroup];
    issue_key_gradient(d_value, scores.weights, shared.d_out.near[near.stage]);
    issue_key_gradient(d_key, scores.gradients, shared.query.near[near.stage]);
  }

  /// One tile of queries of one head, from S and dP on, and of the next tile these two; `last`: of the item. What the step before
  /// has left in dq is added while P and dS are on their way to the other block.
  template <bool kLast>
  __device__ __forceinline__ void take_step(const Item& item, int head, int tile) {
    if constexpr (kLast) release(shared.value_empty);
    // 1. P and dS, to both blocks.
    take_scores(item, tile);
    share_scores();
    // 2. dV and dK of the keys of block `warpgroup`, at once where they are this block's own; dQ, for which all must be there.
    if (warpgroup == rank) {
      issue_key_gradients();
      add_query_gradient_before(item);
    } else {
      add_query_gradient_before(item);
      shared.scores_full.wait(exchange.phase);
      issue_key_gradients();
    }
    before_head = head;
    before_tile = tile;
    shared.scores_full.wait(exchange.phase);
    exchange.advance();
    issue_query_gradient();
    // 3. The next tile's S and dP behind them.
    auto& query_done = shared.query.near_empty[near.stage];
    auto& out_done = shared.d_out.near_empty[near.stage];
    near.advance();
    if constexpr (!kLast) start_scores();
    wgmma_wait<kLast ? 0 : 2>();
    wgmma_pin(dq);
    wgmma_pin(d_key);
    wgmma_pin(d_value);
    release(shared.scores_empty);
    if (threadIdx.x % 32 == 0) shared.scores_empty.arrive_at(rank ^ 1);
    query_done.arrive();
    out_done.arrive();
    if constexpr (kLast) release(shared.key_empty);
    if constexpr (!kLast) finish_scores();
  }

  /// The item's keys are there, and those beyond the length are 0.
  __device__ __forceinline__ void wait_keys(const Item& item) {
    shared.key_full.wait(keys.phase);
    shared.value_full.wait(keys.phase);
    keys.advance();
    const int used = item.view.kv_length - item.key_tile * C::kTileN;
    if (used >= C::kTileN) return;
    clear_rows<C::kBlockN, C::kPanels>(shared.key, used - rank * C::kBlockN, C::kConsumerThreads);
    clear_rows<C::kBlockN, C::kPanels>(shared.value, used - rank * C::kBlockN, C::kConsumerThreads);
    clear_rows<C::kBlockN, C::kHalfPanels>(shared.other_key, used - (rank ^ 1) * C::kBlockN, C::kConsumerThreads);
    fence_async_proxy();
    named_barrier_sync(kConsumeBarrier, C::kConsumerThreads);
  }

  /// All rows that see the item's keys.
  __device__ __forceinline__ void take_steps(const Item& item) {
    Place place(item, args.heads_per_key_head);
    int left = num_places(item, args.heads_per_key_head);
    start_scores();
    finish_scores();
    before_head = -1;
#pragma unroll 1
    while (--left > 0) {
      take_step<false>(item, place.head, place.tile(item));
      place.advance(item);
    }
    take_step<true>(item, place.head, place.tile(item));
    add_query_gradient_before(item);
  }

  __device__ __forceinline__ void store_key_gradient(const Item& item, const TensorView& out, const float (&x)[C::kHalfDim / 2],
                                                     float factor) {
    const int column = rank * C::kHalfDim;
    T* first = static_cast<T*>(out.data) + item.batch * out.stride[0] + item.key_head * out.stride[1] + column;
    store_fragment(x, factor, first, out.stride[2], item.key_tile * C::kTileN + warpgroup * C::kBlockN + first_row_of_thread(),
                   static_cast<int>(out.shape[2]), static_cast<int>(out.shape[3]) - column);
  }

  /// Item after item.
  __device__ __forceinline__ void run() {
    RingPosition<kItemSlots> slot;
    for (;;) {
      shared.item_full[slot.stage].wait(slot.phase);
      const Item& item = shared.item[slot.stage];
      if (!item.valid) return;
#pragma unroll
      for (int i = 0; i < C::kHalfDim / 2; ++i) d_key[i] = d_value[i] = 0.0f;
      if (item.query_tiles.begin < item.query_tiles.end) {
        wait_keys(item);
        take_steps(item);
      }
      store_key_gradient(item, args.d_value, d_value, 1.0f);
      store_key_gradient(item, args.d_key, d_key, args.scale);
      shared.item_empty[slot.stage].arrive();
      slot.advance();
    }
  }
};

}  // namespace fa::backward_sm90
