// SPDX-License-Identifier: Apache-2.0
// The warps of a block of a pair that don't multiply. As in producer.cuh, but that the first block draws items for both.
#pragma once

#include "kernels/backward_sm90/pair_plan.cuh"
#include "kernels/backward_sm90/producer.cuh"

namespace fa::backward_sm90 {

/// The next item's index, which the first block draws and sends to the second.
template <class C>
__device__ __forceinline__ unsigned draw_index(const KernelArgs& args, PairPlan<C>& shared, RingPosition<kItemSlots> slot) {
  if (cluster_rank() == 0) {
    const unsigned index = atomicAdd(args.ticket, 1u);
    shared.index_empty[slot.stage].wait(slot.phase ^ 1);
    store_cluster_async(cluster_address(&shared.index[slot.stage], 1), index,
                        cluster_address(&shared.index_full[slot.stage].word, 1));
    return index;
  }
  shared.index_full[slot.stage].arrive_expect(sizeof(unsigned));
  shared.index_full[slot.stage].wait(slot.phase);
  const unsigned index = *static_cast<volatile unsigned*>(&shared.index[slot.stage]);
  shared.index_empty[slot.stage].arrive_at(0);
  return index;
}

/// A tile of Q or dO by its halves, and the number that goes with each row.
template <class C>
__device__ __forceinline__ void load_halves(HalvesPlan<C>& plan, RingPosition<C::kStages> near, RingPosition<1> far,
                                            const CUtensorMap* map, const float* numbers, int rank, int row, int head,
                                            int batch) {
  Mbarrier<1>& full = plan.near_full[near.stage];
  plan.near_empty[near.stage].wait(near.phase ^ 1);
  full.arrive_expect(C::kHalfBytes + C::kRowBytes);
#pragma unroll
  for (int panel = 0; panel < C::kHalfPanels; ++panel)
    tma_load(plan.near[near.stage] + panel * C::kPanelBytes, map, &full.word, rank * C::kHalfDim + panel * 64, row, head, batch);
  bulk_load(plan.numbers[near.stage], numbers, C::kRowBytes, &full.word);
  plan.far_empty.wait(far.phase ^ 1);
  plan.far_full.arrive_expect(C::kHalfBytes);
#pragma unroll
  for (int panel = 0; panel < C::kHalfPanels; ++panel)
    tma_load(plan.far + panel * C::kPanelBytes, map, &plan.far_full.word, (rank ^ 1) * C::kHalfDim + panel * 64, row, head,
             batch);
}

/// The block's keys with all columns, and the other block's with the half of them that this one needs.
template <class C>
__device__ __forceinline__ void load_pair_keys(const KernelArgs& args, PairPlan<C>& shared, uint32_t phase, int rank,
                                               const Item& item) {
  const int first_key = item.key_tile * C::kTileN + rank * C::kBlockN;
  const int other_key = item.key_tile * C::kTileN + (rank ^ 1) * C::kBlockN;
  shared.value_empty.wait(phase ^ 1);
  shared.value_full.arrive_expect(C::kKeyBytes);
  load_panels<C::kPanels>(shared.value, C::kPanelBytes, &args.value, &shared.value_full.word, first_key, item.key_head,
                          item.batch);
  shared.key_empty.wait(phase ^ 1);
  shared.key_full.arrive_expect(C::kKeyBytes + C::kHalfBytes);
  load_panels<C::kPanels>(shared.key, C::kPanelBytes, &args.key, &shared.key_full.word, first_key, item.key_head, item.batch);
#pragma unroll
  for (int panel = 0; panel < C::kHalfPanels; ++panel)
    tma_load(shared.other_key + panel * C::kPanelBytes, &args.key, &shared.key_full.word, rank * C::kHalfDim + panel * 64,
             other_key, item.key_head, item.batch);
}

/// One lane: draws items, publishes them and starts all copies.
template <class C>
__device__ __forceinline__ void load_pair_items(const KernelArgs& args, PairPlan<C>& shared) {
  const int rank = cluster_rank();
  RingPosition<kItemSlots> slot;
  RingPosition<C::kStages> near;
  RingPosition<1> far, keys;
  for (;;) {
    const unsigned index = draw_index(args, shared, slot);
    shared.item_empty[slot.stage].wait(slot.phase ^ 1);
    Item& item = shared.item[slot.stage];
    decode_item<C>(args, index, item);
    shared.item_full[slot.stage].arrive();
    if (!item.valid) return;
    slot.advance();
    if (item.query_tiles.begin == item.query_tiles.end) continue;
    bool keys_wanted = true;
    for_each_step(args, item, [&](int head, int tile) {
      const int64_t numbers = static_cast<int64_t>(args.query_tile(item.first_query_tile, head, tile)) * C::kTileM;
      load_halves<C>(shared.query, near, far, &args.query, args.rows.reference + numbers, rank, tile * C::kTileM, head,
                     item.batch);
      load_halves<C>(shared.d_out, near, far, &args.d_out, args.rows.delta + numbers, rank, tile * C::kTileM, head, item.batch);
      near.advance();
      far.advance();
      if (!keys_wanted) return;  // NOTE: their buffers are free only when the item before has ended, those of rows before
      keys_wanted = false;
      load_pair_keys(args, shared, keys.phase, rank, item);
    });
    keys.advance();
  }
}

template <class C>
__device__ __forceinline__ void produce_for_pair(const KernelArgs& args, PairPlan<C>& shared) {
  const int warp = threadIdx.x / 32 % 4;
  if (threadIdx.x % 32 == 0) {
    if (warp == 0) load_pair_items(args, shared);
    if (warp == 1) poll_turns(args, shared);
    if (warp == 2) signal_turns(args, shared);
  }
  __syncwarp();
}

}  // namespace fa::backward_sm90
