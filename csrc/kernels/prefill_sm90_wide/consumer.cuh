// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup of prefill_sm90_wide. Of each step's keys, 128 for each pair of blocks that shares the step, it computes
// the scores of 64 rows with its own 64, and of the output its own columns: 256, or 128 or 64 where 2 or 4 pairs share the step.
// The weights of all these warpgroups pass through shared memory; so no product is computed twice. S = Q K^T of the next step is
// issued before O += P V of this one, so that softmax runs while the tensor cores work.
#pragma once

#include "kernels/common/cluster.cuh"
#include "kernels/common/convert.cuh"
#include "kernels/common/wgmma.cuh"
#include "kernels/prefill_sm90/epilogue.cuh"
#include "kernels/prefill_sm90/scores.cuh"
#include "kernels/prefill_sm90/softmax.cuh"
#include "kernels/prefill_sm90_wide/config.cuh"
#include "kernels/prefill_sm90_wide/producer.cuh"

namespace fa::prefill_sm90_wide {

template <class C>
struct Consumer {
  using T = typename C::T;
  const KernelArgs& args;
  SharedMemory<C>& shared;
  const Tile& tile;
  Place place;
  int warpgroup;
  int num_panels;                    // of queries and keys
  RingPosition<C::kSlots> next;      // the slot that the next product reads
  int oldest = 0;                    // the oldest slot that has not been given back,
  bool pending = false;              // if there is one
  uint32_t gathers = 0, shares = 0;  // how often numbers and weights have been exchanged
  float o[C::kColumns / 2];          // output fragment
  float s[kKeys / 2];                // scores, then weights
  uint32_t weights[kKeys / 4];
  prefill_sm90::RowPair rows;
  bool rescale;  // o must be multiplied by rows.factor before it takes these weights

  __device__ __forceinline__ int row_in_block() const { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

  /// Tells the producers of both blocks that the oldest slot may be written again.
  __device__ __forceinline__ void give_back() {
    const int lane = threadIdx.x % 32;
    if (lane < 2) shared.empty[warpgroup][oldest].arrive_at(place.first + lane);
    oldest = oldest + 1 == C::kSlots ? 0 : oldest + 1;
  }

  /// After the products of a slot have been issued: those of the slot before have ended.
  /// NOTE: with more of them under way there are fewer slots on their way, which take a microsecond: 1 to 3 were equally fast, 5
  /// was slower.
  __device__ __forceinline__ void move_on() {
    next.advance();
    wgmma_wait<1>();
    if (pending) give_back();
    pending = true;
  }

  __device__ __forceinline__ void finish_products() {
    wgmma_wait<0>();
    if (pending) give_back();
    pending = false;
  }

  /// Issues S = Q K^T.
  __device__ __forceinline__ void issue_scores() {
    uint32_t queries = shared_address(shared.query);
    asm volatile("" : "+r"(queries));  // else the compiler keeps a descriptor of each panel in registers
    wgmma_pin(s);
    wgmma_fence();
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      if (panel >= kMinPanels && panel >= num_panels) break;
      const uint64_t query = wgmma_descriptor_k_major(queries + panel * kPanelBytes);
      const uint64_t key = wgmma_descriptor_k_major(shared_address(shared.ring[warpgroup][next.stage]));
      shared.full[warpgroup][next.stage].wait(next.phase);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) Wgmma<kKeys>::template ss<T>(s, query + 2 * i, key + 2 * i, panel > 0 || i > 0);
      wgmma_commit();
      move_on();
    }
  }

  /// All products have ended, and o is ready for the next weights.
  /// NOTE: the compiler serialises all products where o is touched while any of them is under way.
  __device__ __forceinline__ void finish_output() {
    finish_products();
    wgmma_pin(o);
    if (rescale) prefill_sm90::rescale_rows(o, rows.factor);
  }

  /// Zeros over values behind the last key in use, which their weights, all 0, would not keep out of a sum if they are NaN.
  __device__ __forceinline__ void clear_values(uint8_t* slot, int used) {
    for (int i = max(used, 0) * 8 + threadIdx.x % kWarpgroupThreads; i < C::kSlotKeys * 8; i += kWarpgroupThreads) {
#pragma unroll
      for (int panel = 0; panel < C::kSlotPanels; ++panel) {
        *reinterpret_cast<uint4*>(slot + panel * C::kSlotKeys * 128 + i * 16) = make_uint4(0, 0, 0, 0);
      }
    }
    fence_async_proxy();
    named_barrier_sync(kOneWarpgroup + warpgroup, kWarpgroupThreads);
  }

  /// Issues O += P V. When it returns, S has been computed.
  __device__ __forceinline__ void issue_output(int step) {
    wgmma_pin(o);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kValueSlots; ++i) {
      const int first_key = value_slot<C>(place, i) * C::kSlotKeys;
      uint8_t* slot = shared.ring[warpgroup][next.stage];
      shared.full[warpgroup][next.stage].wait(next.phase);
      const int used = tile.used_keys - step * C::kTileN - first_key;
      if (used < C::kSlotKeys) clear_values(slot, used);
      // NOTE: the first slots are those of the own pair's keys.
      if (i > 0 && i % (kValueSlots / C::kPairs) == 0) shared.weights_there[first_key / kStepKeys].wait(shares % 2 ^ 1);
      const uint64_t weight =
          wgmma_descriptor_k_major(shared_address(shared.weights[first_key / kKeys])) + first_key % kKeys / 16 * (16 * 2 / 16);
      const uint64_t value = wgmma_descriptor_mn_major(shared_address(slot), C::kSlotKeys * 128);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < C::kSlotKeys / 16; ++j) {
        Wgmma<C::kColumns>::template ss<T, true>(o, weight + j * (16 * 2 / 16), value + j * (16 * 128 / 16), 1);
      }
      wgmma_commit();
      move_on();
    }
    wgmma_pin(s);
  }

  /// Into `gathered`: a number of each of the thread's two rows, the same in four neighbouring threads, from all warpgroups that
  /// have these rows.
  /// NOTE: numbers may be written while others of the last exchange are still read only because weights are exchanged between.
  __device__ __forceinline__ void gather(const float (&own)[2]) {
    const int row = row_in_block(), lane = threadIdx.x % 4;
    float* first = &shared.gathered[2 * place.pair + warpgroup][row];
    if constexpr (C::kPairs == 1) {
      if (lane == 0) first[0] = own[0], first[8] = own[1];
      named_barrier_sync(kNumbersThere, kConsumerThreads);
    } else {
      if (threadIdx.x == 0) shared.numbers_there.arrive_expect(sizeof(shared.gathered));
      if (lane < C::kPairs) {
        const int rank = place.rank_in(lane);
        const uint32_t theirs = cluster_address(first, rank), barrier = cluster_address(&shared.numbers_there.word, rank);
        store_cluster_async(theirs, __float_as_uint(own[0]), barrier);
        store_cluster_async(theirs + 8 * sizeof(float), __float_as_uint(own[1]), barrier);
      }
      shared.numbers_there.wait(gathers++ % 2);
    }
  }

  /// The maxima of the rows over all keys of the step.
  struct CombineMaxima {
    Consumer& consumer;

    __device__ __forceinline__ void operator()(float (&highest)[2]) const {
      consumer.gather(highest);
#pragma unroll
      for (int i = 0; i < 2 * C::kPairs; ++i) {
        const float* theirs = &consumer.shared.gathered[i][consumer.row_in_block()];
        highest[0] = fmaxf(highest[0], theirs[0]);
        highest[1] = fmaxf(highest[1], theirs[8]);
      }
    }
  };

  /// From the raw products of a step to its weights.
  __device__ __forceinline__ void take_weights(int step) {
    using P = Part<C>;
    const int row = tile.first_row + place.half * kRows + row_in_block();
    const int first_key = step * C::kTileN + (2 * place.pair + warpgroup) * kKeys;
    if constexpr (C::kModified) {
      prefill_sm90::modify_scores<P>(s, args.problem, args.problem.softmax_scale, tile, nullptr,
                                     place.half * kRows + row_in_block(), first_key + threadIdx.x % 4 * 2);
    }
    if (step >= shared.view.full_end || step < shared.view.full_begin)
      prefill_sm90::hide_keys<P>(s, args.problem, tile, row, first_key);
    const float unit = C::kModified ? kLog2E : args.problem.softmax_scale * kLog2E;
    rescale = prefill_sm90::softmax_step<P>(s, rows, unit, prefill_sm90::kRescaleThreshold, CombineMaxima{*this});
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weights[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
  }

  /// The warp's products with the last step's weights have ended: it tells all pairs.
  __device__ __forceinline__ void free_weights() {
    const int lane = threadIdx.x % 32;
    if (C::kPairs > 1 && lane < C::kPairs) shared.weights_free.arrive_at(place.rank_in(lane));
  }

  /// Puts the weights where the products of both warpgroups, and those of the other pairs, read them.
  __device__ __forceinline__ void share_weights() {
    const int thread = threadIdx.x % kWarpgroupThreads, row = thread / 32 * 16 + thread % 16;
    uint8_t* own = shared.weights[2 * place.pair + warpgroup];
    const uint32_t first = shared_address(own) + swizzled_offset(row, thread % 32 / 16);
    if constexpr (C::kPairs == 1) {
      named_barrier_sync(kWeightsFree, kConsumerThreads);
    } else if (shares > 0) {
      shared.weights_free.wait(shares % 2 ^ 1);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      prefill_sm90::store_matrices(swizzled_step(first, i), weights[4 * i], weights[4 * i + 1], weights[4 * i + 2],
                                   weights[4 * i + 3]);
    }
    fence_async_proxy();
    named_barrier_sync(kWeightsThere, kConsumerThreads);
    if (C::kPairs > 1 && thread > 0 && thread < C::kPairs) {
      const int other = (place.pair + C::kPairs - thread) % C::kPairs, rank = place.rank_in(other);
      if (warpgroup == 0) shared.weights_there[other].arrive_expect(2 * kPanelBytes);
      bulk_copy_to_cluster(cluster_address(own, rank), own, kPanelBytes,
                           cluster_address(&shared.weights_there[place.pair].word, rank));
    }
    ++shares;
  }

  /// The block's share of the keys, from the last step to the first.
  __device__ __forceinline__ void run() {
#pragma unroll
    for (float& x : o) x = 0.0f;
    const Steps steps = steps_of(args, tile, place);
    if (steps.begin == steps.end) return;
    shared.query_full.wait(0);
    issue_scores();
    finish_products();
    wgmma_pin(s);
    take_weights(steps.end - 1);
    for (int step = steps.end - 1; step > steps.begin; --step) {
      finish_output();
      if constexpr (C::kPairs == 1) {
        issue_scores();
        share_weights();
      } else {
        // NOTE: the other pairs wait for these weights, so they go first; the next scores are computed meanwhile.
        if (shares > 0) free_weights();
        share_weights();
        issue_scores();
      }
      issue_output(step);
      take_weights(step - 1);
    }
    finish_output();
    if (shares > 0) free_weights();
    share_weights();
    issue_output(steps.begin);
    finish_products();
    wgmma_pin(o);
  }
};

}  // namespace fa::prefill_sm90_wide
