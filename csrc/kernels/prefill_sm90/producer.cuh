// SPDX-License-Identifier: Apache-2.0
// The warps of prefill_sm90 that don't multiply: they decide on tiles, tell the consumers, and keep the copy engine ahead of
// them.
#pragma once

#include "kernels/common/launch_early.h"
#include "kernels/common/tma.cuh"
#include "kernels/prefill_sm90/epilogue.cuh"
#include "kernels/prefill_sm90/tiles.cuh"

namespace fa::prefill_sm90 {

/// Waits until the buffer is free, then starts the copy of all panels of rows row … row + kRows - 1 of one head. kFirstApart: the
/// first panel has a barrier of its own, first_full.
template <int kPanels, uint32_t kBytes, bool kFirstApart = false, int kReaders>
__device__ __forceinline__ void load_rows(uint8_t* buffer, const CUtensorMap* map, Mbarrier<1>& full, Mbarrier<kReaders>& empty,
                                          uint32_t phase, int row, int head, int batch, Mbarrier<1>* first_full = nullptr) {
  constexpr uint32_t kPanelBytes = kBytes / kPanels;
  empty.wait(phase ^ 1);
  if constexpr (kFirstApart) first_full->arrive_expect(kPanelBytes);
  full.arrive_expect(kFirstApart ? kBytes - kPanelBytes : kBytes);
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    Mbarrier<1>& there = kFirstApart && panel == 0 ? *first_full : full;
    tma_load_shared_by_blocks(buffer + panel * kPanelBytes, map, &there.word, panel * 64, row, head, batch);
  }
}

/// The bias of the tile's rows and the keys of one block, 64 keys a panel.
template <class C, class Ring>
__device__ __forceinline__ void load_bias(const KernelArgs& args, SharedPlan<C>& shared, const Tile& tile, int block,
                                          Ring& ring) {
  const TensorView& bias = args.problem.bias;
  const int head = bias.shape[1] > 1 && bias.stride[1] != 0 ? tile.head : 0,
            batch = bias.shape[0] > 1 && bias.stride[0] != 0 ? tile.batch : 0;
  shared.bias_empty[ring.stage].wait(ring.phase ^ 1);
  shared.bias_full[ring.stage].arrive_expect(C::kBiasBytes);
#pragma unroll
  for (int panel = 0; panel < C::kBiasPanels; ++panel) {
    tma_load(shared.bias + ring.stage * C::kBiasBytes + panel * C::kTileM * 128, &args.bias, &shared.bias_full[ring.stage].word,
             block * C::kTileN + panel * 64, tile.row_base + tile.first_row, head, batch);
  }
  ring.advance();
}

/// Ring positions of the producer.
template <class C>
struct ProducerRings {
  RingPosition<C::kQueryStages> query;
  RingPosition<C::kStages> key, value;
  RingPosition<C::kBiasStages + 1 - (C::kBiasStages > 0)> bias;
};

/// Past the queries and keys with which a tile's copies begin.
template <class Rings>
__device__ __forceinline__ void pass_beginning(const Tile& tile, Rings& rings) {
  rings.query.advance();
  if (tile.block_begin < tile.block_end) rings.key.advance();
}

/// The keys of one block, and its bias.
template <class C, bool kFirstApart = false>
__device__ __forceinline__ void load_key(const KernelArgs& args, SharedPlan<C>& shared, const Tile& tile, int key_head, int block,
                                         ProducerRings<C>& rings, Mbarrier<1>* first_full = nullptr) {
  const int i = rings.key.stage;
  load_rows<C::kPanels, C::kKeyBytes, kFirstApart>(shared.key[i], &args.key, shared.key_full[i], shared.key_empty[i],
                                                   rings.key.phase, tile.key_base + block * C::kTileN, key_head, tile.batch,
                                                   first_full);
  rings.key.advance();
  if constexpr (C::kBiasStages > 0) {
    if (args.bias_by_tile) load_bias(args, shared, tile, block, rings.bias);
  }
}

/// What the first product of a tile needs: by load_keys() the last keys, and queries. In a folded tile the queries of the
/// warpgroup with the latest rows come first, for it sees most keys and begins.
template <class C, class Plan, class Ring, class LoadKeys>
__device__ __forceinline__ void load_first(const KernelArgs& args, Plan& shared, const Tile& tile, Ring& ring,
                                           LoadKeys load_keys) {
  constexpr int kRows = query_box_rows<C>(), kBoxes = C::kTileM / kRows;
  uint8_t* const buffer = shared.query[ring.stage];
  const bool has_keys = tile.block_begin < tile.block_end, folded = kBoxes > 1 && args.folds;
  if (has_keys && !folded) load_keys();
  shared.query_empty[ring.stage].wait(ring.phase ^ 1);
#pragma unroll
  for (int i = 0; i < kBoxes; ++i) {
    const int box = folded ? kBoxes - 1 - i : i;
    Mbarrier<1>& full = shared.query_full[ring.stage][box];
    full.arrive_expect(C::kQueryBytes / kBoxes);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      tma_load(buffer + (panel * C::kTileM + box * kRows) * 128, &args.query, &full.word, panel * kPanelColumns<typename C::T>,
               tile.row_base + first_row_of<C::kFoldedWarpgroups>(tile, box), tile.head, tile.batch);
    }
    if (i == 0 && has_keys && folded) load_keys();
  }
  ring.advance();
}

/// One lane: the first copies of a tile, which its first product needs.
template <class C>
__device__ __forceinline__ void load_beginning(const KernelArgs& args, SharedPlan<C>& shared, const Tile& tile, int key_head,
                                               ProducerRings<C>& rings) {
  Mbarrier<1>& first_key = shared.first_key_full[C::kFirstKeyApart ? rings.query.stage : 0];
  load_first<C>(args, shared, tile, rings.query,
                [&] { load_key<C, C::kFirstKeyApart>(args, shared, tile, key_head, tile.block_end - 1, rings, &first_key); });
  if (C::kFirstKeyApart && tile.block_begin == tile.block_end) first_key.arrive();
}

/// One lane: the copies of one tile, in the order in which the consumers want them. begun: load_beginning() has been called.
template <class C>
__device__ __forceinline__ void load_tile(const KernelArgs& args, SharedPlan<C>& shared, const Tile& tile, int slot,
                                          ProducerRings<C>& rings, bool begun) {
  const int key_head = args.heads_per_kv.quotient(tile.head);
  // 1. The last keys and the queries.
  if (begun) {
    pass_beginning(tile, rings);
    if (C::kBiasStages > 0 && args.bias_by_tile && tile.block_begin < tile.block_end) rings.bias.advance();
  } else {
    load_beginning(args, shared, tile, key_head, rings);
  }
  // 2. Keys one tile ahead of values, as the consumers multiply. At block `announced` the scheduling warp may draw the next tile.
  const int announced = max(min(tile.block_end - 1, tile.block_begin + 2 * C::kStages), tile.block_begin);
  if (!C::kSmall && tile.block_begin == tile.block_end) shared.tile_wanted.arrive();
#pragma unroll 1
  for (int block = tile.block_end - 1; block >= tile.block_begin; --block) {
    if (!C::kSmall && block == announced) shared.tile_wanted.arrive();
    if (block > tile.block_begin) load_key<C>(args, shared, tile, key_head, block - 1, rings);
    const int i = rings.value.stage;
    const bool to_be_cleared = !C::kSmall && block == tile.block_end - 1 && used_in_last(tile, C::kTileN) < C::kTileN;
    load_rows<C::kPanels, C::kKeyBytes>(
        shared.value[i], &args.value, to_be_cleared ? shared.last_value_full[slot] : shared.value_full[i], shared.value_empty[i],
        rings.value.phase, tile.key_base + block * C::kTileN, key_head, tile.batch);
    rings.value.advance();
  }
}

/// A warp: decides on tile after tile, tells the others, and calls wait(tile) before the next. The first decision passes while
/// other warps make the barriers and, where it needs none of their memory, earlier kernels end. In large blocks a lane then calls
/// begin(tile), before the others are told: that takes 1000 clocks, with which the block's first product would begin later.
/// kAlike: args.tiles_alike is known.
template <class C, bool kAlike, class Plan, class Begin, class Wait>
__device__ __forceinline__ void schedule_tiles(const KernelArgs& args, Plan& shared, Begin begin, Wait wait) {
  RingPosition<kTileSlots> slot;
  const bool first_lane = threadIdx.x % 32 == 0;
  // 1. Once: what all tiles have in common.
  if (!C::kSmall && !kAlike && !args.tiles_alike) wait_for_earlier_kernels();
  if (__builtin_expect(!kAlike && args.sort_sequences, 0)) sort_longest_first(args, shared.longest_first);
  Tile tile = args.common;
  bool first = true;
  for (int index = blockIdx.x;;) {
    // 2. The tile of this index, and what each consumer warpgroup sees of it.
    if (index >= args.num_tiles) {
      tile.valid = 0;
    } else if (!decode_tile<C, kAlike>(args, index, shared.longest_first, tile)) {
      index = next_index(args, index);
      continue;
    }
    const RowsView view = view_rows<C>(tile, threadIdx.x % 32);
    __syncwarp();
    // 3. When its slot is free, publish it.
    if (first) {
      wait_to_schedule();
      if constexpr (!C::kSmall) {
        wait_for_earlier_kernels();
        if (first_lane && tile.valid) begin(tile);
      }
    }
    first = false;
    shared.tile_empty[slot.stage].wait(slot.phase ^ 1);
    __syncwarp();  // or the slot might be given back once more before a lane has come to the barrier, and it would wait for ever
    if (args.spoilt != nullptr) shared.spoilt.note(args, shared.tile[slot.stage], slot.stage);
    if (first_lane) shared.tile[slot.stage] = tile;
    if (threadIdx.x % 32 < C::kWarpgroups) {
      shared.view[slot.stage][threadIdx.x % 32] = view;
      shared.tile_full[slot.stage].arrive();
    }
    if (!tile.valid) break;
    slot.advance();
    // 4. When it is time for the next tile, draw its index.
    wait(tile);
    index = next_index(args, index);
  }
  // 5. When all tiles are done, tell those who mend.
  if (args.spoilt == nullptr) return;
  for (int i = 1; i < kTileSlots; ++i) {
    slot.advance();
    shared.tile_empty[slot.stage].wait(slot.phase ^ 1);
    shared.spoilt.note(args, shared.tile[slot.stage], slot.stage);
  }
  __syncwarp();
  if constexpr (C::kSmall) {
    named_barrier_sync(kMendBarrier, kWarpgroupThreads + 32);
    shared.spoilt.template mend<typename C::T>(args, 0, C::kTileM);
  } else {
    named_barrier_arrive(kMendBarrier, 32 * C::kConsumerWarps + 32);
  }
}

/// schedule_tiles() of a large block. Tiles that are alike have code of their own, without what they don't need: a block's first
/// instructions are read from far, each jump takes its time, and all other warps wait for them. The next tile is drawn when the
/// loading lane asks for it.
template <class C, class Plan, class Begin>
__device__ __forceinline__ void schedule(const KernelArgs& args, Plan& shared, Begin begin) {
  RingPosition<1> wanted;
  const auto wait = [&](const Tile&) {
    shared.tile_wanted.wait(wanted.phase);
    wanted.advance();
  };
  if constexpr (C::kAlikeApart) {
    if (args.tiles_alike) return schedule_tiles<C, true>(args, shared, begin, wait);
  }
  schedule_tiles<C, false>(args, shared, begin, wait);
}

/// One lane: calls load(tile, slot, whether it is the first) for all tiles, as they are published. The next kernel's blocks may
/// come from the start on, since a block of this size leaves them no room beside it: they find a multiprocessor when one ends,
/// and prepare themselves while others still run.
template <class Plan, class Load>
__device__ __forceinline__ void load_tiles(Plan& shared, Load load) {
  let_next_kernel_start();
  RingPosition<kTileSlots> slot;
  for (bool first = true;; first = false) {
    shared.tile_full[slot.stage].wait(slot.phase);
    const Tile tile = shared.tile[slot.stage];
    shared.tile_empty[slot.stage].arrive();
    if (!tile.valid) break;
    load(tile, slot.stage, first);
    slot.advance();
  }
}

/// A warp: writes zeros over values behind the last key in use, which their weights, all 0, would not keep out of a sum if they
/// are NaN. Only then are these values given to the consumers.
template <class C>
__device__ __forceinline__ void clear_values(SharedPlan<C>& shared) {
  RingPosition<kTileSlots> slot;
  int stage = 0;
  uint32_t phases = 0;  // of last_value_full, a bit each
  for (;;) {
    shared.tile_full[slot.stage].wait(slot.phase);
    const Tile& tile = shared.tile[slot.stage];
    if (!tile.valid) return;
    const int blocks = tile.block_end - tile.block_begin, used = used_in_last(tile, C::kTileN);
    if (blocks > 0 && used < C::kTileN) {
      shared.last_value_full[slot.stage].wait(phases >> slot.stage & 1);
      phases ^= 1u << slot.stage;
      clear_rows<C>(shared.value[stage], used, threadIdx.x % 32, 32);
      __syncwarp();
      if (threadIdx.x % 32 == 0) shared.value_full[stage].arrive();
    }
    stage = (stage + blocks) % C::kStages;
    __syncwarp();
    if (threadIdx.x % 32 == 0) shared.tile_empty[slot.stage].arrive();
    slot.advance();
  }
}

/// One lane: the copies of finished tiles to device memory, after which the buffer of their queries is free.
template <class C>
__device__ __forceinline__ void store_tiles(const KernelArgs& args, SharedPlan<C>& shared) {
  RingPosition<kTileSlots> slot;
  RingPosition<C::kQueryStages> q;
  for (;;) {
    shared.tile_full[slot.stage].wait(slot.phase);
    const Tile tile = shared.tile[slot.stage];
    shared.tile_empty[slot.stage].arrive();
    if (!tile.valid) break;
#pragma unroll
    for (int warpgroup = 0; warpgroup < C::kWarpgroups; ++warpgroup) {
      shared.out_full[q.stage][warpgroup].wait(q.phase);
      copy_out<C>(args, tile, warpgroup, shared.query[q.stage] + warpgroup * 64 * 128);
    }
    tma_store_commit();  // NOTE: once for all: each takes its time
    tma_store_wait_read<0>();
    shared.query_empty[q.stage].arrive();
    q.advance();
    slot.advance();
  }
  if (args.spoilt != nullptr) {
    tma_store_wait<0>();
    shared.all_stored.arrive();
  }
}

/// The warps that don't multiply. One decides on tiles, which takes as long as the consumers take for one or two key tiles, and
/// starts the block's first copies; a lane of another keeps the copy engine busy; a third clears values, and a lane of the fourth
/// copies output. The first draws the next tile only when nearly all copies of the current one have been started: a block that
/// drew earlier would hold a tile that an idle block could already be working on. A small block has one warp that decides and
/// loads; while it decides, the other blocks of its multiprocessor keep the tensor cores busy.
template <class C>
__device__ __forceinline__ void produce(const KernelArgs& args, SharedPlan<C>& shared) {
  const int warp = threadIdx.x / 32 % 4;
  const bool first_lane = threadIdx.x % 32 == 0;
  if constexpr (C::kSmall) {
    ProducerRings<C> rings;
    const auto load = [&](const Tile& tile) {
      if (first_lane) load_tile<C>(args, shared, tile, 0, rings, false);
      __syncwarp();
    };
    schedule_tiles<C, false>(args, shared, [](const Tile&) {}, load);
  } else if (warp == 0) {
    schedule<C>(args, shared, [&](const Tile& tile) {
      ProducerRings<C> rings;
      load_beginning(args, shared, tile, args.heads_per_kv.quotient(tile.head), rings);
    });
  } else {
    wait_to_produce();
    if (warp == 1 && first_lane) {
      ProducerRings<C> rings;
      load_tiles(shared, [&](const Tile& tile, int slot, bool begun) { load_tile(args, shared, tile, slot, rings, begun); });
    }
    if (warp == 2) clear_values<C>(shared);
    if (C::kStoreWarp && warp == 3 && first_lane) store_tiles<C>(args, shared);
  }
}

}  // namespace fa::prefill_sm90
