// SPDX-License-Identifier: Apache-2.0
// The warps of backward_sm90 that don't multiply: one lane draws items and keeps the copy engine ahead of the consumers (another
// does so for a bias), two see to it that blocks add to a query tile's gradient one after another, in an order that depends on
// nothing but the problem.
#pragma once

#include "kernels/backward_sm90/shared_plan.cuh"
#include "kernels/common/cluster.cuh"
#include "kernels/common/tma.cuh"

namespace fa::backward_sm90 {

/// Key tile `tile` of a batch entry, or where sequences are packed of all of them: some are no sequence's, and have no keys and
/// no rows.
template <class C>
__device__ __forceinline__ void set_tile(const KernelArgs& args, int batch, int tile, Item& item) {
  if constexpr (C::kPacked) {
    RowTiles keys = args.key_tiles, rows = args.rows.tiles;
    keys.tile_rows = C::kTileN, rows.tile_rows = C::kTileM;  // NOTE: so they are; the compiler is told
    const KeyTilePlace place = key_tile_place(keys, args.sequences, tile);
    const Sequence& sequence = place.sequence;
    const bool is_none = place.tile < 0;
    item.batch = 0;
    item.key_tile = is_none ? 0 : place.tile;
    item.first_query_tile = static_cast<int>(rows.first(0, place.sequence_idx, sequence.first_row));
    item.first_row = static_cast<int>(sequence.first_row);
    item.first_key = static_cast<int>(sequence.first_key);
    item.num_keys = is_none ? 0 : static_cast<int>(sequence.num_keys);
    item.view = view_of(sequence);
    if (is_none) item.view.query_length = item.view.kv_length = 0;
  } else {
    item.batch = batch;
    item.key_tile = tile;
    item.first_query_tile = batch * static_cast<int>(args.rows.tiles.of_sequence);
    item.first_row = item.first_key = 0;
    item.num_keys = static_cast<int>(args.sequences.seqlen_kv);
    item.view = view_of(args.sequences, batch);
  }
}

/// The item of this index. Blocks add to a query tile's gradient in the order in which items are drawn, so that none waits for
/// one that has not been drawn. Where later key tiles are first seen by later rows, they are drawn first, and all begin with
/// their first row, which no earlier key tile has met by then: those that start together meet each query tile one after another.
/// Where later key tiles are also seen by fewer rows, the last items to be drawn come the longest first, for the blocks to end
/// together; these begin with the last row.
template <class C>
__device__ __forceinline__ void decode_item(const KernelArgs& args, unsigned index, Item& item) {
  item.valid = index < static_cast<unsigned>(args.num_items);
  if (!item.valid) return;
  const bool at_the_end = index >= args.order.num_groups_before_last * args.order.tiles_per_group.divisor;
  const bool descending = args.rows_start_later && !(args.rows_shorten && at_the_end);
  const TilePlace place = args.order.at(index);
  item.descending = descending;
  item.backwards = args.rows_shorten && at_the_end;
  item.key_head = place.head;
  set_tile<C>(args, place.sequence, descending ? args.num_key_tiles - 1 - place.tile : place.tile, item);
  item.query_tiles = query_tiles<C::kTileM, C::kTileN>(item.view, item.key_tile);
}

/// Calls f(query head, query tile) for all steps of an item.
template <class F>
__device__ __forceinline__ void for_each_step(const KernelArgs& args, const Item& item, F f) {
  Place place(item, args.heads_per_key_head);
#pragma unroll 1
  for (int left = num_places(item, args.heads_per_key_head); left > 0; --left) {
    f(place.head, place.tile(item));
    place.advance(item);
  }
}

template <int kPanels>
__device__ __forceinline__ void load_panels(uint8_t* buffer, uint32_t panel_bytes, const CUtensorMap* map, uint64_t* barrier,
                                            int row, int head, int batch) {
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel)
    tma_load(buffer + panel * panel_bytes, map, barrier, panel * 64, row, head, batch);
}

/// A tile of Q or dO, and the number that goes with each row.
template <class C>
__device__ __forceinline__ void load_queries(uint8_t* buffer, float* numbers, const CUtensorMap* map, const float* from,
                                             Mbarrier<1>& full, int query_tile, int row, int head, int batch) {
  full.arrive_expect(C::kQueryBytes + C::kRowBytes);
  load_panels<C::kPanels>(buffer, C::kTileM * 128, map, &full.word, row, head, batch);
  bulk_load(numbers, from + static_cast<int64_t>(query_tile) * C::kTileM, C::kRowBytes, &full.word);
}

template <class C>
__device__ __forceinline__ void load_keys(uint8_t* buffer, const CUtensorMap* map, Mbarrier<1>& full,
                                          Mbarrier<C::kConsumerWarps>& empty, uint32_t phase, const Item& item) {
  empty.wait(phase ^ 1);
  full.arrive_expect(C::kKeyBytes);
  load_panels<C::kPanels>(buffer, C::kTileN * 128, map, &full.word, item.first_key + item.key_tile * C::kTileN, item.key_head,
                          item.batch);
}

/// The item's tiles of V and K.
template <class C>
__device__ __forceinline__ void load_item_keys(const KernelArgs& args, SharedPlan<C>& shared, RingPosition<C::kKeyStages>& keys,
                                               const Item& item) {
  load_keys<C>(shared.value[keys.stage], &args.value, shared.value_full[keys.stage], shared.value_empty[keys.stage], keys.phase,
               item);
  load_keys<C>(shared.key[keys.stage], &args.key, shared.key_full[keys.stage], shared.key_empty[keys.stage], keys.phase, item);
  keys.advance();
}

/// One lane: draws items, publishes them and starts all copies.
template <class C>
__device__ __forceinline__ void load_items(const KernelArgs& args, SharedPlan<C>& shared) {
  RingPosition<kItemSlots> slot;
  RingPosition<C::kStages> q, o;
  RingPosition<C::kKeyStages> keys;
  for (;;) {
    const unsigned index = atomicAdd(args.ticket, 1u);
    shared.item_empty[slot.stage].wait(slot.phase ^ 1);
    Item& item = shared.item[slot.stage];
    decode_item<C>(args, index, item);
    shared.item_full[slot.stage].arrive();
    if (!item.valid) return;
    slot.advance();
    if (item.query_tiles.begin == item.query_tiles.end) continue;
    bool keys_wanted = true;
    const auto load_keys_once = [&] {
      if (keys_wanted) load_item_keys(args, shared, keys, item);
      keys_wanted = false;
    };
    if (C::kKeyStages > 1) load_keys_once();
    for_each_step(args, item, [&](int head, int tile) {
      shared.query_empty[q.stage].wait(q.phase ^ 1);
      load_queries<C>(shared.query[q.stage], shared.lse[q.stage], &args.query, args.rows.reference, shared.query_full[q.stage],
                      args.query_tile(item.first_query_tile, head, tile), item.first_row + tile * C::kTileM, head, item.batch);
      q.advance();
      shared.out_empty[o.stage].wait(o.phase ^ 1);
      load_queries<C>(shared.d_out[o.stage], shared.delta[o.stage], &args.d_out, args.rows.delta, shared.out_full[o.stage],
                      args.query_tile(item.first_query_tile, head, tile), item.first_row + tile * C::kTileM, head, item.batch);
      o.advance();
      load_keys_once();  // NOTE: a single buffer is free only when the item before has ended, those of rows before
    });
  }
}

/// One lane: calls f(item, query head, query tile) for all steps of all items, as they are published.
template <class Plan, class F>
__device__ __forceinline__ void for_each_published_step(const KernelArgs& args, Plan& shared, F f) {
  RingPosition<kItemSlots> slot;
  for (;;) {
    shared.item_full[slot.stage].wait(slot.phase);
    const Item& item = shared.item[slot.stage];
    if (!item.valid) return;
    for_each_step(args, item, [&](int head, int tile) { f(item, head, tile); });
    shared.item_empty[slot.stage].arrive();
    slot.advance();
  }
}

/// One lane: copies the bias of each step's queries and keys, and what is left of the rows' references, to where the gradients of
/// its scores will stand.
template <class C>
__device__ __forceinline__ void load_biases(const KernelArgs& args, SharedPlan<C>& shared) {
  RingPosition<kScoreBuffers> ring;
  const uint64_t policy = l2_policy(args.bias_batches != 0 && args.bias_heads != 0);
  for_each_published_step(args, shared, [&](const Item& item, int head, int tile) {
    Mbarrier<1>& full = shared.bias_full[ring.stage];
    shared.bias_empty[ring.stage].wait(ring.phase ^ 1);
    full.arrive_expect(sizeof(shared.d_scores[0]) + C::kRowBytes);
#pragma unroll
    for (int panel = 0; panel < C::kWarpgroups; ++panel) {
      tma_load(shared.d_scores[ring.stage][panel], &args.bias, &full.word, item.key_tile * C::kTileN + panel * 64,
               tile * C::kTileM, head * args.bias_heads, item.batch * args.bias_batches, policy);
    }
    const int64_t first_row = static_cast<int64_t>(args.query_tile(item.first_query_tile, head, tile)) * C::kTileM;
    bulk_load(shared.rest[ring.stage], args.rows.rest + first_row, C::kRowBytes, &full.word);
    ring.advance();
  });
}

/// One lane: calls f(number of the query tile, this item's turn) for all steps of all items, as they are published.
template <class Plan, class F>
__device__ __forceinline__ void for_each_turn(const KernelArgs& args, Plan& shared, F f) {
  using C = typename Plan::Config;
  for_each_published_step(args, shared, [&](const Item& item, int head, int tile) {
    f(args.query_tile(item.first_query_tile, head, tile),
      turn_of(key_tiles<C::kTileM, C::kTileN>(item.view, tile), item.key_tile, item.descending));
  });
}

/// A query tile's counter of turns; each block of a pair has its own.
template <class C>
__device__ __forceinline__ unsigned* counter_of(const KernelArgs& args, int query_tile) {
  return args.turns + query_tile * C::kBlocks + (C::kBlocks > 1 ? cluster_rank() : 0);
}

/// One lane: waits until the key tiles before this one have added to a query tile's gradient.
template <class Plan>
__device__ __forceinline__ void poll_turns(const KernelArgs& args, Plan& shared) {
  using C = typename Plan::Config;
  RingPosition<kTurnSlots> slot;
  for_each_turn(args, shared, [&](int query_tile, Turn turn) {
    shared.turn_empty[slot.stage].wait(slot.phase ^ 1);
    if (turn.place > 0) {
      unsigned passed;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(passed) : "l"(counter_of<C>(args, query_tile)) : "memory");
      } while (passed < static_cast<unsigned>(turn.place));
      if constexpr (C::kStaged) fence_global_proxies();
    }
    shared.turn_full[slot.stage].arrive();
    slot.advance();
  });
}

/// Tells the next key tile's block that this block has added to a query tile's gradient.
template <class C>
__device__ __forceinline__ void pass_turn(const KernelArgs& args, int query_tile, Turn turn) {
  if (turn.place + 1 == turn.count) return;
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter_of<C>(args, query_tile)) : "memory");
}

/// One lane, where consumers add: passes the turn on when they have.
template <class Plan>
__device__ __forceinline__ void signal_turns(const KernelArgs& args, Plan& shared) {
  RingPosition<kTurnSlots> slot;
  for_each_turn(args, shared, [&](int query_tile, Turn turn) {
    shared.turn_done[slot.stage].wait(slot.phase);
    pass_turn<typename Plan::Config>(args, query_tile, turn);
    shared.turn_empty[slot.stage].arrive();
    slot.advance();
  });
}

/// One lane: has the copy engine add each query tile's gradient to what others have added, in its turn, and passes the turn on.
/// The first stores it. In the last turn it is the sum that comes to the consumers, who take it to the tensor; where the first is
/// also the last there is none.
template <class C>
__device__ __forceinline__ void add_parts(const KernelArgs& args, SharedPlan<C>& shared) {
  constexpr uint32_t kBytes = C::kPartElements * sizeof(float);
  RingPosition<kTurnSlots> slot;
  RingPosition<1> part;
  for_each_turn(args, shared, [&](int query_tile, Turn turn) {
    const bool last = turn.place + 1 == turn.count;
    shared.turn_full[slot.stage].wait(slot.phase);
    if (turn.count > 1) {
      if (last) {
#pragma unroll
        for (int w = 0; w < C::kWarpgroups; ++w) {
          shared.sum_full[w].arrive_expect(kBytes);
          bulk_load(shared.dq[w], args.template sum_of_part<C::kPartElements>(query_tile, w), kBytes, &shared.sum_full[w].word);
        }
      }
#pragma unroll
      for (int w = 0; w < C::kWarpgroups; ++w) {
        shared.dq_full[w].wait(part.phase);
        float* const sum = args.template sum_of_part<C::kPartElements>(query_tile, w);
        if (turn.place == 0) {
          bulk_store(sum, shared.dq[w], kBytes);
        } else if (!last) {
          bulk_add(sum, shared.dq[w], kBytes);
        }
        tma_store_commit();
      }
      tma_store_wait_read<1>();
      shared.dq_empty[0].arrive();
      tma_store_wait_read<0>();
      shared.dq_empty[1].arrive();
      part.advance();
      tma_store_wait<0>();
      fence_global_proxies();
      pass_turn<C>(args, query_tile, turn);
    }
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
  if constexpr (C::kStaged) {
    if (warp == 2) add_parts(args, shared);
  } else {
    if (warp == 2) signal_turns(args, shared);
    if (warp == 3) load_biases(args, shared);
  }
}

}  // namespace fa::backward_sm90
