// SPDX-License-Identifier: Apache-2.0
// The gradient of a bias on Hopper. A thread block has tiles of 128 rows x 128 keys of it. For each, it visits all batch entries
// and heads that share the tile, always in the same order: S = Q K^T and dP = dO V^T, and what is added up in registers is
// P (dP - D), P = exp(scale * S + bias - lse). A persistent grid; one lane keeps the copy engine ahead. Launched by
// launch_bias.cuh, behind the kernel that has prepared log-sum-exps and D.
#pragma once

#include <type_traits>

#include "kernels/backward_sm90/bias_plan.cuh"
#include "kernels/backward_sm90/query_sums.cuh"
#include "kernels/common/convert.cuh"
#include "kernels/common/dynamic_shared.cuh"
#include "kernels/common/exp2.cuh"
#include "kernels/common/launch_early.h"
#include "kernels/common/mma.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/common/tma.cuh"
#include "kernels/common/wgmma.cuh"
#include "semantics/softmax.h"

namespace fa::backward_sm90 {

/// The lane that lists visits and starts copies.
template <class C>
struct BiasGradientProducer {
  const BiasGradientArgs& args;
  BiasGradientPlan<C>& shared;
  RingPosition<kVisitSlots> slot;
  RingPosition<C::kPairs> pair;
  RingPosition<C::kBiasStages> bias;
  int viewed = -1;  // the batch entry that `view` is of
  View view = {};

  __device__ __forceinline__ void publish(const Visit& visit) {
    shared.visit_empty[slot.stage].wait(slot.phase ^ 1);
    shared.visit[slot.stage] = visit;
    shared.visit_full[slot.stage].arrive();
    slot.advance();
  }

  /// A tile of Q or dO and one of K or V.
  __device__ __forceinline__ void load_pair(const CUtensorMap* of_rows, const CUtensorMap* of_keys, const Visit& visit,
                                            int key_head) {
    auto& to = shared.pair[pair.stage];
    Mbarrier<1>& full = shared.pair_full[pair.stage];
    shared.pair_empty[pair.stage].wait(pair.phase ^ 1);
    full.arrive_expect(sizeof(to));
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      const uint32_t at = panel * C::kPanelBytes;
      tma_load(to.of_rows + at, of_rows, &full.word, panel * 64, visit.first_row, visit.head, visit.batch);
      tma_load(to.of_keys + at, of_keys, &full.word, panel * 64, visit.first_key, key_head, visit.batch);
    }
    pair.advance();
  }

  __device__ __forceinline__ void load_bias(const Visit& visit) {
    Mbarrier<1>& full = shared.bias_full[bias.stage];
    shared.bias_empty[bias.stage].wait(bias.phase ^ 1);
    full.arrive_expect(sizeof(shared.bias[0]));
    const uint64_t policy = l2_policy(true);
#pragma unroll
    for (int panel = 0; panel < C::kBiasPanels; ++panel) {
      tma_load(shared.bias[bias.stage] + panel * C::kPanelBytes, &args.bias, &full.word, visit.first_key + panel * 64,
               visit.first_row, visit.head * args.bias_heads, visit.batch * args.bias_batches, policy);
    }
    bias.advance();
  }

  __device__ __forceinline__ void load_visit(const Visit& visit) {
    publish(visit);
    if (!visit.has_products) return;
    const int key_head = static_cast<int>(args.heads_per_key_head.quotient(visit.head));
    load_pair(&args.query, &args.key, visit, key_head);
    if (visit.begins) load_bias(visit);
    load_pair(&args.d_out, &args.value, visit, key_head);
  }

  /// What of the tile of scores a batch entry's rows see.
  __device__ __forceinline__ void look_at(Visit& visit) {
    if (viewed < 0 || (args.entries_differ && viewed != visit.batch)) {
      view = view_of(args.sequences, visit.batch);
      viewed = visit.batch;
    }
    const int last_row = min(visit.first_row + C::kTile, view.query_length) - 1, end_key = visit.first_key + C::kTile;
    const KeySpan keys{0, view.kv_length};
    const KeySpan some = view.band.seen_by_some(visit.first_row, last_row, keys);
    const KeySpan all = view.band.seen_by_all(visit.first_row, last_row, keys);
    visit.has_products = max(some.begin, visit.first_key) < min(some.end, end_key);
    visit.hides = all.begin > visit.first_key || all.end < end_key;
    visit.kv_length = view.kv_length;
    visit.band = view.band;
  }

  /// Visits are loaded one late, since only then it is known which is a tile's last.
  __device__ __forceinline__ void load_tile(unsigned tile) {
    const unsigned rest = args.key_tiles.quotient(tile), key_tile = tile - rest * args.key_tiles.divisor;
    const unsigned pair_index = args.row_tiles.quotient(rest), row_tile = rest - pair_index * args.row_tiles.divisor;
    const unsigned first_batch = args.heads.quotient(pair_index), first_head = pair_index - first_batch * args.heads.divisor;
    Visit next{};
    next.valid = 1;
    next.batch = static_cast<int>(first_batch);
    next.head = static_cast<int>(first_head);
    next.first_row = static_cast<int>(row_tile) * C::kTile;
    next.first_key = static_cast<int>(key_tile) * C::kTile;
    Visit waiting = next;  // without products: what is left where no row of any entry sees a key
    waiting.begins = true;
#pragma unroll 1
    for (int b = 0; b < args.visited_batches; ++b) {
      next.batch = static_cast<int>(first_batch) + b;
      look_at(next);
      if (!next.has_products) continue;
#pragma unroll 1
      for (int h = 0; h < args.visited_heads; ++h) {
        next.head = static_cast<int>(first_head) + h;
        next.begins = !waiting.has_products;
        if (waiting.has_products) load_visit(waiting);
        waiting = next;
      }
    }
    waiting.ends = true;
    load_visit(waiting);
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (int tile = blockIdx.x; tile < args.num_tiles; tile += gridDim.x) load_tile(tile);
    publish(Visit{});
  }
};

/// A warpgroup: 64 rows of each tile.
template <class C>
struct BiasGradientConsumer {
  using T = typename C::T;
  const BiasGradientArgs& args;
  BiasGradientPlan<C>& shared;
  int warpgroup;
  RingPosition<kVisitSlots> slot;
  RingPosition<C::kPairs> pair;
  RingPosition<C::kBiasStages> bias;
  float sum[C::kTile / 2];  // of the gradient, in the accumulator's order
  float s[C::kTile / 2];    // S, then P
  float dp[C::kTile / 2];   // dP

  /// Of the thread's two rows.
  struct Numbers {
    float reference[2], rest[2], delta[2];
  };

  __device__ __forceinline__ int first_row(const Visit& visit) const {
    return visit.first_row + warpgroup * 64 + first_row_of_thread();
  }

  /// Rows that there aren't have a reference of +inf, and so weights of 0.
  __device__ __forceinline__ Numbers load_numbers(const Visit& visit) const {
    Numbers numbers;
    const int64_t first = args.rows.tiles.first(visit.head, visit.batch, 0) * args.rows.tiles.tile_rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row(visit) + 8 * r;
      const bool exists = row < args.d_bias.shape[2];
      numbers.reference[r] = exists ? __ldg(args.rows.reference + first + row) : INFINITY;
      numbers.rest[r] = exists ? __ldg(args.rows.rest + first + row) : 0.0f;
      numbers.delta[r] = exists ? __ldg(args.rows.delta + first + row) : 0.0f;
    }
    return numbers;
  }

  /// Issues out = A B^T of the pair's tiles, A being the warpgroup's rows.
  __device__ __forceinline__ void issue_product(float (&out)[C::kTile / 2]) {
    shared.pair_full[pair.stage].wait(pair.phase);
    const auto& from = shared.pair[pair.stage];
    const uint64_t a = wgmma_descriptor_k_major(shared_address(from.of_rows) + warpgroup * 64 * 128);
    const uint64_t b = wgmma_descriptor_k_major(shared_address(from.of_keys));
    wgmma_pin(out);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kHeadDim / 16; ++step) {
      const uint32_t at = (step / 4 * C::kPanelBytes + step % 4 * 32) >> 4;
      Wgmma<C::kTile>::template ss<T>(out, a + at, b + at, step > 0);
    }
    wgmma_commit();
    pair.advance();
  }

  /// S becomes P.
  __device__ __forceinline__ void take_weights(const Numbers& numbers) {
    const int lane = threadIdx.x % 32, row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + lane % 16;
    const uint32_t from = shared_address(shared.bias[bias.stage]) + swizzled_offset(row, lane / 16);
#pragma unroll
    for (int j = 0; j < C::kTile / 16; ++j) {
      uint32_t pairs[4];  // keys 16 j … + 7 of the thread's two rows, and + 8 … + 15
      ldmatrix_x4(pairs, swizzled_step(from, j % 4) + j / 4 * C::kPanelBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 of_keys = unpack2(pairs[i], std::is_same_v<T, __half>);
        const float reference = numbers.reference[i % 2], rest = numbers.rest[i % 2];
        float &x = s[8 * j + 2 * i], &y = s[8 * j + 2 * i + 1];
        x = exp2_approx(fmaf(fmaf(x, args.scale, of_keys.x) - reference, kLog2E, -rest));
        y = exp2_approx(fmaf(fmaf(y, args.scale, of_keys.y) - reference, kLog2E, -rest));
      }
    }
  }

  /// Adds P (dP - D); nothing for keys that a row doesn't see, whose products may be anything.
  __device__ __forceinline__ void add(const Visit& visit, const Numbers& numbers) {
    if (!visit.hides) {
#pragma unroll
      for (int i = 0; i < C::kTile / 2; ++i) sum[i] = fmaf(s[i], dp[i] - numbers.delta[i / 2 % 2], sum[i]);
      return;
    }
    const int key = visit.first_key + threadIdx.x % 4 * 2;
    int begin[2], end[2];  // of the keys that the rows see, counted from the thread's first
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      begin[r] = visit.band.first(first_row(visit) + 8 * r, 0) - key;
      end[r] = visit.band.end(first_row(visit) + 8 * r, visit.kv_length) - key;
    }
#pragma unroll
    for (int i = 0; i < C::kTile / 2; ++i) {
      const int column = i / 4 * 8 + i % 2, r = i / 2 % 2;
      if (column >= begin[r] && column < end[r]) sum[i] = fmaf(s[i], dp[i] - numbers.delta[r], sum[i]);
    }
  }

  __device__ __forceinline__ void store(const Visit& visit) const {
    const TensorView& out = args.d_bias;
    const int key = visit.first_key + threadIdx.x % 4 * 2;
    const int left = static_cast<int>(out.shape[3]) - key;  // keys from the thread's first on
    float* first = static_cast<float*>(out.data) + visit.batch * out.stride[0] + visit.head * out.stride[1] + key;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row(visit) + 8 * r;
      if (row >= out.shape[2]) continue;
      float* const to = first + row * out.stride[2];
#pragma unroll
      for (int j = 0; j < C::kTile / 8; ++j) {
        const float2 pair = make_float2(sum[4 * j + 2 * r], sum[4 * j + 2 * r + 1]);
        if (8 * j + 1 < left) __stcs(reinterpret_cast<float2*>(to + 8 * j), pair);
        if (8 * j + 1 == left) to[8 * j] = pair.x;
      }
    }
  }

  __device__ __forceinline__ void take_products(const Visit& visit) {
    const Numbers numbers = load_numbers(visit);
    auto& scores_read = shared.pair_empty[pair.stage];
    issue_product(s);
    auto& gradients_read = shared.pair_empty[pair.stage];
    issue_product(dp);
    if (visit.begins) shared.bias_full[bias.stage].wait(bias.phase);
    wgmma_wait<1>();
    wgmma_pin(s);
    release(scores_read);
    take_weights(numbers);
    wgmma_wait<0>();
    wgmma_pin(dp);
    release(gradients_read);
    add(visit, numbers);
  }

  __device__ __forceinline__ void run() {
    for (;;) {
      shared.visit_full[slot.stage].wait(slot.phase);
      const Visit& visit = shared.visit[slot.stage];
      if (!visit.valid) return;
      if (visit.begins) {
#pragma unroll
        for (float& x : sum) x = 0.0f;
      }
      if (visit.has_products) take_products(visit);
      if (visit.ends) {
        if (visit.has_products) {
          shared.bias_empty[bias.stage].arrive();
          bias.advance();
        }
        store(visit);
      }
      shared.visit_empty[slot.stage].arrive();
      slot.advance();
    }
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) bias_gradient_kernel(const __grid_constant__ BiasGradientArgs args) {
  BiasGradientPlan<C>& shared = *reinterpret_cast<BiasGradientPlan<C>*>(dynamic_shared_memory());
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  wait_for_earlier_kernels();
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == C::kWarpgroups) {
    release_registers<C::kProducerRegisters>();
    if (threadIdx.x == C::kConsumerThreads) BiasGradientProducer<C>{args, shared}.run();
  } else {
    acquire_registers<C::kConsumerRegisters>();
    BiasGradientConsumer<C> consumer{args, shared, warpgroup};
    consumer.run();
  }
}

}  // namespace fa::backward_sm90
