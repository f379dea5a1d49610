// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup of backward_sm90: 64 keys of each item, whose gradients stay in registers. For each tile of queries it
// computes S^T = K Q^T and dP^T = V dO^T, from them P^T and dS^T, then dV += P^T dO and dK += dS^T Q, and half of dQ = dS K, for
// which both warpgroups' dS meet in shared memory. A warp that issues a product waits for most of the one before, so the
// arithmetic that is to go on beside a product stands between the instructions of that product.
#pragma once

#include <type_traits>

#include "kernels/backward_sm90/query_sums.cuh"
#include "kernels/backward_sm90/rows_out.cuh"
#include "kernels/backward_sm90/shared_plan.cuh"
#include "kernels/common/exp2.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/common/shared_memory.cuh"
#include "kernels/common/tma.cuh"
#include "kernels/common/wgmma.cuh"
#include "semantics/softmax.h"

namespace fa::backward_sm90 {

template <class C>
struct Consumer {
  using T = typename C::T;
  const KernelArgs& args;
  SharedPlan<C>& shared;
  int warpgroup;
  RingPosition<kItemSlots> slot;  // of the item
  RingPosition<C::kStages> q, o;  // tiles of Q and dO
  RingPosition<kTurnSlots> turn;
  RingPosition<1> part;                // of dQ on its way
  RingPosition<1> sum;                 // of dQ, of the other key tiles
  Place place;                         // of the step
  int tile;                            // its queries
  bool visible;                        // all of its rows see all keys of the warpgroup
  RingPosition<C::kKeyStages> keys;    // the item's
  bool begun = false;                  // its first S^T has been computed
  RingPosition<kScoreBuffers> buffer;  // of d_scores
  float d_key[C::kHeadDim / 2];
  float d_value[C::kHeadDim / 2];
  float s[C::kTileM / 2];                          // S^T, then P^T
  float dp[C::kTileM / 2];                         // dP^T
  float dq[C::kPartElements / kWarpgroupThreads];  // the warpgroup's part of dQ
  uint32_t p16[C::kTileM / 4];                     // P^T as A operand
  uint32_t ds16[C::kTileM / 4];                    // dS^T as A operand

  /// Issues out = A B^T, A being the warpgroup's rows of a tile of keys and B a tile of queries. `between(step)` is called behind
  /// each instruction.
  template <class F>
  __device__ __forceinline__ void issue_scores(float (&out)[C::kTileM / 2], const uint8_t* key_tile, const uint8_t* query_tile,
                                               F between) {
    const uint64_t a = wgmma_descriptor_k_major(shared_address(key_tile) + warpgroup * 64 * 128);
    const uint64_t b = wgmma_descriptor_k_major(shared_address(query_tile));
    wgmma_pin(out);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kHeadDim / 16; ++step) {
      const uint32_t in_panel = (step % 4) * 32;
      Wgmma<C::kTileM>::template ss<T>(out, a + (((step / 4) * C::kTileN * 128 + in_panel) >> 4),
                                       b + (((step / 4) * C::kTileM * 128 + in_panel) >> 4), step > 0);
      between(step);
    }
    wgmma_commit();
  }

  /// Issues the part of sum += A B of rows 16 step … 16 step + 15, A being P^T or dS^T and `b` the descriptor of a tile of
  /// queries.
  __device__ __forceinline__ void issue_key_gradient_of(int step, float (&sum)[C::kHeadDim / 2], uint32_t (&a)[C::kTileM / 4],
                                                        uint64_t b) {
    Wgmma<C::kHeadDim>::template rs<T>(sum, a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3],
                                       b + ((step * 16 * 128) >> 4), 1);
  }

  /// Issues sum += A B, A being P^T or dS^T and B a tile of queries. `between(step)` is called behind each instruction.
  template <class F>
  __device__ __forceinline__ void issue_key_gradient(float (&sum)[C::kHeadDim / 2], uint32_t (&a)[C::kTileM / 4],
                                                     const uint8_t* query_tile, F between) {
    const uint64_t b = wgmma_descriptor_mn_major(shared_address(query_tile), C::kTileM * 128);
    wgmma_pin(sum);
    wgmma_pin(a);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kTileM / 16; ++step) {
      issue_key_gradient_of(step, sum, a, b);
      between(step);
    }
    wgmma_commit();
  }

  /// Issues the warpgroup's part of dQ^T = K^T dS^T: 64 columns of all rows.
  __device__ __forceinline__ void issue_transposed_query_gradient() {
    const uint64_t a =
        wgmma_descriptor_mn_major(shared_address(shared.key[keys.stage]) + warpgroup * C::kTileN * 128, C::kTileN * 128);
    const uint64_t b = wgmma_descriptor_k_major(shared_address(shared.d_scores[buffer.stage][0]));
    wgmma_pin(dq);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kTileN / 16; ++step) {
      Wgmma<C::kTileM>::template ss<T, false, true>(dq, a + ((step * 16 * 128) >> 4),
                                                    b + (((step / 4) * C::kTileM * 128 + (step % 4) * 32) >> 4), step > 0);
    }
    wgmma_commit();
  }

  /// Issues the warpgroup's part of dQ = dS K: 64 columns of all rows, or 64 rows of all columns.
  __device__ __forceinline__ void issue_query_gradient() {
    if constexpr (C::kTransposed)
      return issue_transposed_query_gradient();
    else {
      constexpr bool kByColumns = C::kPanels == 2;
      const uint64_t a =
          wgmma_descriptor_k_major(shared_address(shared.d_scores[buffer.stage][0]) + (kByColumns ? 0 : warpgroup * 64 * 128));
      const uint64_t b = wgmma_descriptor_mn_major(
          shared_address(shared.key[keys.stage]) + (kByColumns ? warpgroup * C::kTileN * 128 : 0), C::kTileN * 128);
      wgmma_pin(dq);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < C::kTileN / 16; ++step) {
        Wgmma<64>::template ss<T, true>(dq, a + (((step / 4) * C::kTileM * 128 + (step % 4) * 32) >> 4),
                                        b + ((step * 16 * 128) >> 4), step > 0);
      }
      wgmma_commit();
    }
  }

  /// P^T = exp(scale * S^T - lse) of rows 8 begin … 8 end - 1.
  __device__ __forceinline__ void take_weights(int begin, int end) {
    const float* lse = shared.lse[q.stage] + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = begin; j < end; ++j) {
      const float2 row = *reinterpret_cast<const float2*>(lse + 8 * j);
      s[4 * j] = exp2_approx(fmaf(s[4 * j], args.scale_log2, -row.x));
      s[4 * j + 1] = exp2_approx(fmaf(s[4 * j + 1], args.scale_log2, -row.y));
      s[4 * j + 2] = exp2_approx(fmaf(s[4 * j + 2], args.scale_log2, -row.x));
      s[4 * j + 3] = exp2_approx(fmaf(s[4 * j + 3], args.scale_log2, -row.y));
    }
  }

  /// Where the lane's row of 16 bytes lies of the first four 8 x 8 elements of the warp's keys and the tile's queries, in the
  /// order in which the accumulator has them: keys 0 … 7 and 8 … 15 of queries 0 … 7, then of queries 8 … 15.
  __device__ __forceinline__ uint32_t scores_of_lane() const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    return shared_address(shared.d_scores[buffer.stage][warpgroup]) +
           swizzled_offset(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
  }

  /// P^T = exp(scale * S^T + bias - lse). The bias stands where the warp will store dS^T, so that no other warp is waited for.
  __device__ __forceinline__ void take_biased_weights() {
    shared.bias_full[buffer.stage].wait(buffer.phase);
    const float *lse = shared.lse[q.stage] + threadIdx.x % 4 * 2, *rest = shared.rest[buffer.stage] + threadIdx.x % 4 * 2;
    const uint32_t from = scores_of_lane();
#pragma unroll
    for (int step = 0; step < C::kTileM / 16; ++step) {
      uint32_t pairs[4];
      ldmatrix_x4_transposed(pairs, from + step * 16 * 128);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 bias = unpack2(pairs[i], std::is_same_v<T, __half>);
        const float2 row = *reinterpret_cast<const float2*>(lse + (2 * step + i / 2) * 8);
        const float2 more = *reinterpret_cast<const float2*>(rest + (2 * step + i / 2) * 8);
        float &x = s[8 * step + 2 * i], &y = s[8 * step + 2 * i + 1];
        x = exp2_approx(fmaf(fmaf(x, args.scale, bias.x) - row.x, kLog2E, -more.x));
        y = exp2_approx(fmaf(fmaf(y, args.scale, bias.y) - row.y, kLog2E, -more.y));
      }
    }
  }

  __device__ __forceinline__ static bool has_rows(const Item& item) { return item.query_tiles.begin < item.query_tiles.end; }

  __device__ __forceinline__ int first_key(const Item& item) const { return item.key_tile * C::kTileN + warpgroup * 64; }

  /// Where the step is, of which `place` is known.
  __device__ __forceinline__ void find_step(const Item& item) {
    tile = place.tile(item);
    const int first_row = tile * C::kTileM;
    const KeySpan seen = item.view.band.seen_by_all(first_row, first_row + C::kTileM - 1, {0, item.view.kv_length});
    visible = seen.begin <= first_key(item) && first_key(item) + 64 <= seen.end;
  }

  /// Weights of keys that rows don't see become 0.
  __device__ __forceinline__ void hide_keys(const Item& item) {
    const int row = tile * C::kTileM + threadIdx.x % 4 * 2;
    int low[2], high[2];  // of the rows, in this thread's count, that see its two keys
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = first_key(item) + first_row_of_thread() + 8 * r;
      low[r] = key < item.view.kv_length ? key - item.view.band.right + 1 - row : C::kTileM;
      high[r] = key - item.view.band.left - row;
    }
#pragma unroll
    for (int i = 0; i < C::kTileM / 2; ++i) {
      const int column = i / 4 * 8 + i % 2, r = i / 2 % 2;
      if (column < low[r] || column > high[r]) s[i] = 0.0f;
    }
  }

  /// P^T of rows 16 begin … 16 end - 1 as A operand, here and no earlier: registers are few.
  __device__ __forceinline__ void pack_weights(int begin, int end) {
#pragma unroll
    for (int i = 4 * begin; i < 4 * end; ++i) {
      p16[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
      asm volatile("" : "+r"(p16[i])::"memory");
    }
  }

  /// dS^T = P^T (dP^T - delta) of rows 16 step … 16 step + 15, to registers and to shared memory.
  __device__ __forceinline__ void take_score_gradients(int step) {
    const float* delta = shared.delta[o.stage] + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 2 * step; j < 2 * step + 2; ++j) {
      const float2 row = *reinterpret_cast<const float2*>(delta + 8 * j);
      ds16[2 * j] = pack2<T>(s[4 * j] * (dp[4 * j] - row.x), s[4 * j + 1] * (dp[4 * j + 1] - row.y));
      ds16[2 * j + 1] = pack2<T>(s[4 * j + 2] * (dp[4 * j + 2] - row.x), s[4 * j + 3] * (dp[4 * j + 3] - row.y));
    }
    store_transposed(scores_of_lane() + step * 16 * 128, ds16[4 * step], ds16[4 * step + 1], ds16[4 * step + 2],
                     ds16[4 * step + 3]);
  }

  /// Tells the other warpgroup that this thread's dS is in shared memory.
  __device__ __forceinline__ void publish_score_gradients() {
    fence_async_proxy();
    named_barrier_arrive(score_barrier(buffer.stage, 1 - warpgroup), C::kConsumerThreads);
  }

  /// Until both warpgroups' dS is there.
  __device__ __forceinline__ void wait_score_gradients() {
    named_barrier_sync(score_barrier(buffer.stage, warpgroup), C::kConsumerThreads);
  }

  /// dV += P^T dO is issued, and dS^T taken beside it: all of it beside the first half of the instructions, so that the other
  /// warpgroup's is there when the last has been issued.
  __device__ __forceinline__ void issue_value_gradient_and_take_score_gradients() {
    constexpr int kSteps = C::kTileM / 16;
    if constexpr (C::kTransposed) {
      pack_weights(0, kSteps);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) take_score_gradients(step);
      issue_key_gradient(d_value, p16, shared.d_out[o.stage], [&](int step) {
        if (step == 0) publish_score_gradients();
      });
    } else {
      const uint64_t b = wgmma_descriptor_mn_major(shared_address(shared.d_out[o.stage]), C::kTileM * 128);
      wgmma_pin(d_value);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        pack_weights(step, step + 1);
        wgmma_fence();
        issue_key_gradient_of(step, d_value, p16, b);
        if (step < kSteps / 2) {
          take_score_gradients(2 * step);
          take_score_gradients(2 * step + 1);
        }
        if (step == kSteps / 2 - 1) publish_score_gradients();
      }
      wgmma_commit();
    }
  }

  /// The row of dQ ends here: all key tiles have added to it.
  __device__ __forceinline__ void store_query_gradient(const Item& item) {
    store_query_rows<C>(dq, args, item, place.head, tile * C::kTileM, warpgroup);
  }

  /// Issues dK += dS^T Q, and between its instructions leaves dQ in shared memory, for the lane that adds it.
  __device__ __forceinline__ void issue_key_gradient_and_hand_over() {
    const uint32_t to = shared_address(shared.dq[warpgroup]) + threadIdx.x % kWarpgroupThreads * sizeof(float4);
    issue_key_gradient(d_key, ds16, shared.query[q.stage], [&](int step) {
      constexpr int kEach = C::kPartElements / kWarpgroupThreads / 4 / (C::kTileM / 16);
#pragma unroll
      for (int i = step * kEach; i < (step + 1) * kEach; ++i)
        store_shared(to + i * kWarpgroupThreads * static_cast<uint32_t>(sizeof(float4)),
                     make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]));
    });
    part.advance();
  }

  /// What has been left there can be read.
  __device__ __forceinline__ void publish_query_gradient() {
    fence_async_proxy();
    shared.dq_full[warpgroup].arrive();
  }

  /// The last of several key tiles: takes the sum of the others, which comes to shared memory, and its own dQ to the tensor.
  /// Where it is the only one, its dQ alone.
  __device__ __forceinline__ void finish_sum(const Item& item, Turn now) {
    if (now.count > 1) {
      shared.dq_empty[warpgroup].wait(part.phase ^ 1);  // so that no phase ends that nobody has waited for
      shared.sum_full[warpgroup].wait(sum.phase);
      sum.advance();
      add_sum<true>(dq, shared.dq[warpgroup]);
      shared.dq_full[warpgroup].arrive();
      part.advance();
    }
    store_query_gradient(item);
  }

  /// Adds the tile's dQ to what other key tiles have added. The first stores it, the last takes the sum to the tensor.
  __device__ __forceinline__ void add_query_gradient(const Item& item, Turn now) {
    float* const sum =
        args.template sum_of_part<C::kPartElements>(args.query_tile(item.first_query_tile, place.head, tile), warpgroup);
    shared.turn_full[turn.stage].wait(turn.phase);
    const bool last = now.place + 1 == now.count;
    if (!last) {
      add_to_sum(dq, sum, now.place == 0);
    } else {
      if (now.place > 0) add_sum<false>(dq, sum);
      store_query_gradient(item);
    }
    __syncwarp();
    release(shared.turn_done[turn.stage]);
    turn.advance();
  }

  /// dQ and dV are there, though not what has been issued in kPending steps behind them.
  template <bool kLast, int kPending>
  __device__ __forceinline__ void finish_query_gradient() {
    wgmma_wait<kPending>();
    wgmma_pin(dq);
    wgmma_pin(p16);
    wgmma_pin(d_value);
    shared.out_empty[o.stage].arrive();
    if constexpr (C::kHasBias) shared.bias_empty[buffer.stage].arrive();
    if constexpr (kLast) release(shared.key_empty[keys.stage]);
  }

  /// `its_tile`: of the queries.
  __device__ __forceinline__ void start_scores(const Item& item, int its_tile) {
    shared.query_full[q.stage].wait(q.phase);
    clear_others(shared.query[q.stage], item, its_tile);
    issue_next_scores();
  }

  /// In a tile of Q or dO, rows that are the next sequence's become 0: a weight of 0 times NaN would be NaN.
  __device__ __forceinline__ void clear_others(uint8_t* rows, const Item& item, int its_tile) {
    if constexpr (C::kPacked) {
      const int used = item.view.query_length - its_tile * C::kTileM;
      if (used >= C::kTileM) return;
      clear_rows<C::kTileM, C::kPanels>(rows, used, C::kConsumerThreads);
      fence_async_proxy();
      named_barrier_sync(kConsumeBarrier, C::kConsumerThreads);
    }
  }

  /// The tile of queries behind the step's.
  __device__ __forceinline__ int next_tile(const Item& item) const {
    if (!C::kPacked) return 0;  // only packed sequences need it
    Place next = place;
    next.advance(item);
    return next.tile(item);
  }

  __device__ __forceinline__ void issue_next_scores() {
    issue_scores(s, shared.key[keys.stage], shared.query[q.stage], [](int) {});
  }

  /// One tile of queries of one head; kLast: of the item, whose gradients of keys are then stored, else the next is begun.
  template <bool kLast>
  __device__ __forceinline__ void take_step(const Item& item) {
    // 1. P^T, and dP^T beside it.
    shared.out_full[o.stage].wait(o.phase);
    clear_others(shared.d_out[o.stage], item, tile);
    issue_scores(dp, shared.value[keys.stage], shared.d_out[o.stage], [&](int step) {
      constexpr int kGroups = C::kTileM / 8, kSteps = C::kHeadDim / 16;
      if constexpr (!C::kHasBias) take_weights(step * kGroups / kSteps, (step + 1) * kGroups / kSteps);
    });
    if constexpr (C::kHasBias) {
      take_biased_weights();
      __syncwarp();  // all lanes have the bias that stands where dS will
    }
    if (!visible) hide_keys(item);
    // 2. dS^T, and dV += P^T dO beside it.
    wgmma_wait<0>();
    wgmma_pin(dp);
    if (kLast) release(shared.value_empty[keys.stage]);
    issue_value_gradient_and_take_score_gradients();
    // 3. dQ = dS K.
    wait_score_gradients();
    issue_query_gradient();
    // 4. dK += dS^T Q, and dQ goes where its sum is.
    const Turn now = turn_of(key_tiles<C::kTileM, C::kTileN>(item.view, tile), item.key_tile, item.descending);
    const bool handed_over = C::kStaged && now.place + 1 < now.count;
    if (handed_over) {
      shared.dq_empty[warpgroup].wait(part.phase ^ 1);
      finish_query_gradient<kLast, 0>();
      issue_key_gradient_and_hand_over();
    } else {
      issue_key_gradient(d_key, ds16, shared.query[q.stage], [](int) {});
      finish_query_gradient<kLast, 1>();
      if constexpr (C::kStaged) {
        finish_sum(item, now);
      } else {
        add_query_gradient(item, now);
      }
    }
    auto& query_done = shared.query_empty[q.stage];
    q.advance();
    o.advance();
    buffer.advance();
    // 5. The next tile's S^T behind dK, whose end gives back its queries.
    if constexpr (kLast) {
      if (handed_over) publish_query_gradient();
      store_key_gradient(item, args.d_value, d_value, 1.0f);
      keys.advance();
      begin_next();
      wgmma_wait<(C::kKeyStages > 1)>();
    } else {
      start_scores(item, next_tile(item));
      if (handed_over) publish_query_gradient();
      place.advance(item);
      find_step(item);
      wgmma_wait<0>();
      wgmma_pin(s);
    }
    wgmma_pin(ds16);
    wgmma_pin(d_key);
    query_done.arrive();
    if constexpr (kLast) {
      store_key_gradient(item, args.d_key, d_key, args.scale);
      wgmma_wait<0>();
      wgmma_pin(s);
    }
  }

  /// Where the next item's keys have buffers of their own: its first S^T, beside which this one's gradients are stored.
  __device__ __forceinline__ void begin_next() {
    begun = false;
    if constexpr (C::kKeyStages > 1) {
      RingPosition<kItemSlots> next = slot;
      next.advance();
      shared.item_full[next.stage].wait(next.phase);
      const Item& item = shared.item[next.stage];
      begun = item.valid && has_rows(item);
      if (begun) {
        prepare(item);
        shared.query_full[q.stage].wait(q.phase);
        clear_others(shared.query[q.stage], item, tile);
      }
      issue_next_scores();  // NOTE: under a condition it would be serialised; where there is no next item nobody reads the result
    }
  }

  /// The item's keys are there, and those beyond the length are 0.
  __device__ __forceinline__ void wait_keys(const Item& item) {
    shared.key_full[keys.stage].wait(keys.phase);
    shared.value_full[keys.stage].wait(keys.phase);
    const int used = item.view.kv_length - item.key_tile * C::kTileN;
    if (used >= C::kTileN) return;
    clear_rows<C::kTileN, C::kPanels>(shared.key[keys.stage], used, C::kConsumerThreads);
    clear_rows<C::kTileN, C::kPanels>(shared.value[keys.stage], used, C::kConsumerThreads);
    fence_async_proxy();
    named_barrier_sync(kConsumeBarrier, C::kConsumerThreads);
  }

  /// What the item's first step needs but for queries.
  __device__ __forceinline__ void prepare(const Item& item) {
    wait_keys(item);
    place = Place(item, args.heads_per_key_head);
    find_step(item);
  }

  /// All rows that see the item's keys.
  __device__ __forceinline__ void take_steps(const Item& item) {
    if (!begun) {
      prepare(item);
      start_scores(item, tile);
      wgmma_wait<0>();
      wgmma_pin(s);
    }
#pragma unroll 1
    for (int left = num_places(item, args.heads_per_key_head); left > 1; --left) take_step<false>(item);
    take_step<true>(item);
  }

  __device__ __forceinline__ void store_key_gradient(const Item& item, const TensorView& out, const float (&x)[C::kHeadDim / 2],
                                                     float factor) {
    store_key_rows<C>(x, factor, out, item, first_key(item));
  }

  /// Item after item.
  __device__ __forceinline__ void run() {
    for (;;) {
      shared.item_full[slot.stage].wait(slot.phase);
      const Item& item = shared.item[slot.stage];
      if (!item.valid) return;
#pragma unroll
      for (int i = 0; i < C::kHeadDim / 2; ++i) d_key[i] = d_value[i] = 0.0f;
      if (has_rows(item)) {
        take_steps(item);
      } else {
        store_key_gradient(item, args.d_value, d_value, 1.0f);
        store_key_gradient(item, args.d_key, d_key, args.scale);
      }
      shared.item_empty[slot.stage].arrive();
      slot.advance();
    }
  }
};

}  // namespace fa::backward_sm90
