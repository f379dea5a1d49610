// SPDX-License-Identifier: Apache-2.0
// The warps of backward_sm90 that don't multiply: one lane draws items and keeps the copy engine ahead of the consumers, two see
// to it that blocks add to a query tile's gradient one after another, in an order that depends on nothing but the problem.
#pragma once

#include "kernels/backward_sm90/shared_plan.cuh"
#include "kernels/common/tma.cuh"

namespace fa::backward_sm90 {

template <class C>
__device__ __forceinline__ Item decode_item(const KernelArgs& args, unsigned index) {
  Item item{};
  if (index >= static_cast<unsigned>(args.num_items)) return item;
  const unsigned pair = args.key_tiles.quotient(index), place = index - pair * args.num_key_tiles;
  item.valid = 1;
  item.batch = args.key_heads.quotient(pair);
  item.key_head = pair - item.batch * args.num_key_heads;
  item.key_tile = args.descending ? args.num_key_tiles - 1 - place : place;
  item.view = view_of(args.sequences, item.batch);
  item.query_tiles = query_tiles<C::kTileM, C::kTileN>(item.view, item.key_tile);
  return item;
}

/// Calls f(query head, query tile) for all steps of an item.
template <class F>
__device__ __forceinline__ void for_each_step(const KernelArgs& args, const Item& item, F f) {
  const int first_head = item.key_head * args.heads_per_key_head;
#pragma unroll 1
  for (int head = first_head; head < first_head + args.heads_per_key_head; ++head) {
#pragma unroll 1
    for (int tile = item.query_tiles.begin; tile < item.query_tiles.end; ++tile) f(head, tile);
  }
}

template <int kPanels>
__device__ __forceinline__ void load_panels(uint8_t* buffer, uint32_t panel_bytes, const CUtensorMap* map, uint64_t* barrier,
                                            int row, int head, int batch) {
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel)
    tma_load(buffer + panel * panel_bytes, map, barrier, panel * 64, row, head, batch);
}

template <class C>
__device__ __forceinline__ void load_keys(uint8_t* buffer, const CUtensorMap* map, Mbarrier<1>& full,
                                          Mbarrier<C::kConsumerWarps>& empty, uint32_t phase, const Item& item) {
  empty.wait(phase ^ 1);
  full.arrive_expect(C::kKeyBytes);
  load_panels<C::kPanels>(buffer, C::kTileN * 128, map, &full.word, item.key_tile * C::kTileN, item.key_head, item.batch);
}

/// One lane: draws items, publishes them and starts all copies.
template <class C>
__device__ __forceinline__ void load_items(const KernelArgs& args, SharedPlan<C>& shared) {
  RingPosition<kItemSlots> slot;
  RingPosition<C::kStages> stage;
  RingPosition<1> keys;
  for (;;) {
    const unsigned index = atomicAdd(args.ticket, 1u);
    shared.item_empty[slot.stage].wait(slot.phase ^ 1);
    shared.item[slot.stage] = decode_item<C>(args, index);
    shared.item_full[slot.stage].arrive();
    const Item& item = shared.item[slot.stage];
    if (!item.valid) return;
    slot.advance();
    if (item.query_tiles.begin == item.query_tiles.end) continue;
    bool keys_wanted = true;
    for_each_step(args, item, [&](int head, int tile) {
      const int i = stage.stage;
      const int64_t first_row = static_cast<int64_t>(args.query_tile(item.batch, head, tile)) * C::kTileM;
      shared.query_empty[i].wait(stage.phase ^ 1);
      shared.query_full[i].arrive_expect(C::kQueryBytes + C::kRowBytes);
      load_panels<C::kPanels>(shared.query[i], C::kTileM * 128, &args.query, &shared.query_full[i].word, tile * C::kTileM, head,
                              item.batch);
      bulk_load(shared.lse[i], args.rows.reference + first_row, C::kRowBytes, &shared.query_full[i].word);
      shared.out_empty[i].wait(stage.phase ^ 1);
      shared.out_full[i].arrive_expect(C::kQueryBytes + C::kRowBytes);
      load_panels<C::kPanels>(shared.d_out[i], C::kTileM * 128, &args.d_out, &shared.out_full[i].word, tile * C::kTileM, head,
                              item.batch);
      bulk_load(shared.delta[i], args.rows.delta + first_row, C::kRowBytes, &shared.out_full[i].word);
      stage.advance();
      if (!keys_wanted) return;  // NOTE: their buffers are free only when the item before has ended, those of rows before
      keys_wanted = false;
      load_keys<C>(shared.value, &args.value, shared.value_full, shared.value_empty, keys.phase, item);
      load_keys<C>(shared.key, &args.key, shared.key_full, shared.key_empty, keys.phase, item);
    });
    keys.advance();
  }
}

/// One lane: calls f(number of the query tile, this item's turn) for all steps of all items, as they are published.
template <class C, class F>
__device__ __forceinline__ void for_each_turn(const KernelArgs& args, SharedPlan<C>& shared, F f) {
  RingPosition<kItemSlots> slot;
  for (;;) {
    shared.item_full[slot.stage].wait(slot.phase);
    const Item& item = shared.item[slot.stage];
    if (!item.valid) return;
    for_each_step(args, item, [&](int head, int tile) {
      f(args.query_tile(item.batch, head, tile),
        turn_of(key_tiles<C::kTileM, C::kTileN>(item.view, tile), item.key_tile, args.descending));
    });
    shared.item_empty[slot.stage].arrive();
    slot.advance();
  }
}

/// One lane: waits until the key tiles before this one have added to a query tile's gradient.
template <class C>
__device__ __forceinline__ void poll_turns(const KernelArgs& args, SharedPlan<C>& shared) {
  RingPosition<kTurnSlots> slot;
  for_each_turn(args, shared, [&](int query_tile, Turn turn) {
    shared.turn_empty[slot.stage].wait(slot.phase ^ 1);
    if (turn.place > 0) {
      unsigned passed;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(passed) : "l"(args.turns + query_tile) : "memory");
      } while (passed < static_cast<unsigned>(turn.place));
    }
    shared.turn_full[slot.stage].arrive();
    slot.advance();
  });
}

/// One lane: tells the next key tile's block that this block has added to a query tile's gradient.
template <class C>
__device__ __forceinline__ void signal_turns(const KernelArgs& args, SharedPlan<C>& shared) {
  RingPosition<kTurnSlots> slot;
  for_each_turn(args, shared, [&](int query_tile, Turn turn) {
    shared.turn_done[slot.stage].wait(slot.phase);
    if (turn.place + 1 < turn.count)
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(args.turns + query_tile) : "memory");
    shared.turn_empty[slot.stage].arrive();
    slot.advance();
  });
}

template <class C>
__device__ __forceinline__ void produce(const KernelArgs& args, SharedPlan<C>& shared) {
  const int warp = threadIdx.x / 32 % 4;
  if (threadIdx.x % 32 != 0) return;
  if (warp == 0) load_items(args, shared);
  if (warp == 1) poll_turns(args, shared);
  if (warp == 2) signal_turns(args, shared);
}

}  // namespace fa::backward_sm90
