// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup of prefill_sm90_wide. Of each step's 128 keys it computes the scores of 64 rows with its own 64, and of
// the output its own 256 columns, from the weights of both warpgroups, which pass through shared memory; so no product is
// computed twice. S = Q K^T of the next step is issued before O += P V of this one, so that softmax runs while the tensor cores
// work.
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
  SharedMemory& shared;
  const Tile& tile;
  Place place;
  int warpgroup;
  int num_panels;             // of queries and keys
  RingPosition<kSlots> next;  // the slot that the next product reads
  int oldest = 0;             // the oldest slot that has not been given back,
  bool pending = false;       // if there is one
  float o[kColumns / 2];      // output fragment
  float s[kKeys / 2];         // scores, then weights
  uint32_t weights[kKeys / 4];
  prefill_sm90::RowPair rows;
  bool rescale;  // o must be multiplied by rows.factor before it takes these weights

  __device__ __forceinline__ int row_in_block() const { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

  /// Tells the producers of both blocks that the oldest slot may be written again.
  __device__ __forceinline__ void give_back() {
    const int lane = threadIdx.x % 32;
    if (lane < 2) shared.empty[warpgroup][oldest].arrive_at(place.pair + lane);
    oldest = oldest + 1 == kSlots ? 0 : oldest + 1;
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
    for (int i = max(used, 0) * 8 + threadIdx.x % kWarpgroupThreads; i < kSlotKeys * 8; i += kWarpgroupThreads) {
#pragma unroll
      for (int panel = 0; panel < kColumns / 64; ++panel) {
        *reinterpret_cast<uint4*>(slot + panel * kValuePanelBytes + i * 16) = make_uint4(0, 0, 0, 0);
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
      const uint64_t weight = wgmma_descriptor_k_major(shared_address(shared.weights[i / (kKeys / kSlotKeys)])) +
                              i % (kKeys / kSlotKeys) * (kSlotKeys * 2 / 16);
      uint8_t* slot = shared.ring[warpgroup][next.stage];
      shared.full[warpgroup][next.stage].wait(next.phase);
      const int used = tile.used_keys - step * kStepKeys - i * kSlotKeys;
      if (used < kSlotKeys) clear_values(slot, used);
      wgmma_fence();
      Wgmma<kColumns>::template ss<T, true>(o, weight, wgmma_descriptor_mn_major(shared_address(slot), kValuePanelBytes), 1);
      wgmma_commit();
      move_on();
    }
    wgmma_pin(s);
  }

  /// The maxima of the rows over both warpgroups' keys.
  struct CombineMaxima {
    float (&top)[2][kRows];
    int warpgroup, row;

    __device__ __forceinline__ void operator()(float (&highest)[2]) const {
      if (threadIdx.x % 4 == 0) {
        top[warpgroup][row] = highest[0];
        top[warpgroup][row + 8] = highest[1];
      }
      named_barrier_sync(kMaximaThere, kConsumerThreads);
      highest[0] = fmaxf(highest[0], top[1 - warpgroup][row]);
      highest[1] = fmaxf(highest[1], top[1 - warpgroup][row + 8]);
    }
  };

  /// From the raw products of a step to its weights.
  __device__ __forceinline__ void take_weights(int step) {
    using P = Part<C>;
    const int row = tile.first_row + place.half * kRows + row_in_block(), first_key = step * kStepKeys + warpgroup * kKeys;
    if constexpr (C::kModified) {
      prefill_sm90::modify_scores<P>(s, args.problem, args.problem.softmax_scale, tile, nullptr,
                                     place.half * kRows + row_in_block(), first_key + threadIdx.x % 4 * 2);
    }
    if (step >= shared.view.full_end || step < shared.view.full_begin)
      prefill_sm90::hide_keys<P>(s, args.problem, tile, row, first_key);
    const float unit = C::kModified ? kLog2E : args.problem.softmax_scale * kLog2E;
    rescale = prefill_sm90::softmax_step<P>(s, rows, unit, prefill_sm90::kRescaleThreshold,
                                            CombineMaxima{shared.top[step % 2], warpgroup, row_in_block()});
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weights[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
  }

  /// Puts the weights where both warpgroups' products read them.
  __device__ __forceinline__ void share_weights() {
    const int thread = threadIdx.x % kWarpgroupThreads, row = thread / 32 * 16 + thread % 16;
    const uint32_t first = shared_address(shared.weights[warpgroup]) + swizzled_offset(row, thread % 32 / 16);
    named_barrier_sync(kWeightsFree, kConsumerThreads);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      prefill_sm90::store_matrices(swizzled_step(first, i), weights[4 * i], weights[4 * i + 1], weights[4 * i + 2],
                                   weights[4 * i + 3]);
    }
    fence_async_proxy();
    named_barrier_sync(kWeightsThere, kConsumerThreads);
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
      issue_scores();
      share_weights();
      issue_output(step);
      take_weights(step - 1);
    }
    finish_output();
    share_weights();
    issue_output(steps.begin);
    finish_products();
    wgmma_pin(o);
  }
};

}  // namespace fa::prefill_sm90_wide
