// SPDX-License-Identifier: Apache-2.0
// The warps of prefill_sm90_wide that don't multiply: one thread for each consumer warpgroup keeps its ring of keys and values
// full. Of each slot the two blocks of a pair fetch one half each, for both.
#pragma once

#include "kernels/common/cluster.cuh"
#include "kernels/common/tma.cuh"
#include "kernels/prefill_sm90_wide/config.cuh"

namespace fa::prefill_sm90_wide {

/// A block's share of the work.
struct Place {
  int tile;   // index in the order of tiles
  int split;  // of the tile's keys
  int pair;   // of those that share each step
  int half;   // of the tile's rows
  int first;  // the first of the two blocks of the pair in their cluster

  /// The number in the cluster of the block that has the same rows in another pair.
  __device__ __forceinline__ int rank_in(int other_pair) const { return 2 * other_pair + half; }
};

template <class C>
__device__ __forceinline__ Place find_place(const KernelArgs& args) {
  const int rank = cluster_rank(), pair = static_cast<int>(blockIdx.x) / 2;
  if (C::kPairs > 1) return {pair / C::kPairs, 0, rank / 2, rank % 2, rank & ~1};
  if (args.num_splits == 1) return {pair, 0, 0, rank, 0};
  const int tile = pair / args.num_splits;
  return {tile, pair - tile * args.num_splits, 0, rank % 2, rank & ~1};
}

/// The key steps of a block's split.
struct Steps {
  int begin, end;
};

__device__ __forceinline__ Steps steps_of(const KernelArgs& args, const Tile& tile, const Place& place) {
  const int count = tile.block_end - tile.block_begin;
  if (args.num_splits == 1) return {tile.block_begin, tile.block_end};
  return {tile.block_begin + count * place.split / args.num_splits,
          tile.block_begin + count * (place.split + 1) / args.num_splits};
}

/// The i-th values of a step that a pair reads, by slots: its own keys' first, as the other pairs' weights come later, its
/// neighbour's first.
template <class C>
__device__ __forceinline__ int value_slot(const Place& place, int i) {
  return C::kPairs == 1 ? i : (i + place.pair * (kValueSlots / C::kPairs)) % kValueSlots;
}

/// One thread's copies into the ring of one warpgroup.
template <class C>
struct Loader {
  const KernelArgs& args;
  SharedMemory<C>& shared;
  const Tile& tile;
  Place place;
  int warpgroup, key_head;
  RingPosition<C::kSlots> ring;

  /// Waits until both blocks have given the next slot back, and announces what is to come.
  __device__ __forceinline__ uint8_t* open_slot() {
    shared.empty[warpgroup][ring.stage].wait(ring.phase ^ 1);
    shared.full[warpgroup][ring.stage].arrive_expect(kSlotBytes);
    return shared.ring[warpgroup][ring.stage];
  }

  __device__ __forceinline__ void copy(uint8_t* to, const CUtensorMap* map, int column, int row) {
    tma_load_multicast(to, map, &shared.full[warpgroup][ring.stage].word, column, tile.key_base + row, key_head, tile.batch,
                       static_cast<uint16_t>(3 << place.first));
  }

  /// Where the warpgroup's keys of a step begin.
  __device__ __forceinline__ int first_key(int step) const { return step * C::kTileN + (2 * place.pair + warpgroup) * kKeys; }

  __device__ __forceinline__ void load_keys(int step, int first_panel, int num_panels) {
    const int own = place.half * (kKeys / 2);
    for (int panel = first_panel; panel < num_panels; ++panel) {
      copy(open_slot() + own * 128, &args.key, panel * 64, first_key(step) + own);
      ring.advance();
    }
  }

  /// Of the keys that are read first, as many as there are slots. The block fetches both halves: the other block may not have
  /// begun yet.
  __device__ __forceinline__ void load_first_keys(int num_panels) {
    const Steps steps = steps_of(args, tile, place);
    if (steps.begin == steps.end) return;
    const int row = tile.key_base + first_key(steps.end - 1);
    for (int panel = 0; panel < min(num_panels, C::kSlots); ++panel) {
      Mbarrier<1>& full = shared.full[warpgroup][panel];
      uint8_t* slot = shared.ring[warpgroup][panel];
      full.arrive_expect(kSlotBytes);
      tma_load_shared_by_blocks(slot, &args.key, &full.word, panel * 64, row, key_head, tile.batch);
      tma_load_shared_by_blocks(slot + kSlotBytes / 2, &args.key, &full.word, panel * 64, row + kKeys / 2, key_head, tile.batch);
      ring.advance();
    }
  }

  __device__ __forceinline__ void load_values(int step) {
    const int first_column = (2 * place.pair + warpgroup) * C::kColumns;
    for (int i = 0; i < kValueSlots; ++i) {
      uint8_t* slot = open_slot();
      const int key = step * C::kTileN + value_slot<C>(place, i) * C::kSlotKeys;
      if constexpr (C::kSlotPanels == 1) {
        const int own = place.half * C::kBoxValues;
        copy(slot + own * 128, &args.value, first_column, key + own);
      } else {
#pragma unroll
        for (int j = 0; j < C::kSlotPanels / 2; ++j) {
          const int panel = place.half * (C::kSlotPanels / 2) + j;
          copy(slot + panel * C::kSlotKeys * 128, &args.value, first_column + panel * 64, key);
        }
      }
      ring.advance();
    }
  }

  /// After load_first_keys: the others, from the last step to the first, in the order in which the consumers read.
  __device__ __forceinline__ void run(int num_panels) {
    const Steps steps = steps_of(args, tile, place);
    if (steps.begin == steps.end) return;
    load_keys(steps.end - 1, C::kSlots, num_panels);
    for (int step = steps.end - 1; step >= steps.begin; --step) {
      if (step > steps.begin) load_keys(step - 1, 0, num_panels);
      load_values(step);
    }
  }
};

/// One thread: the block's queries, if it has keys: else nobody waits for them, and they would overwrite the output.
template <class C>
__device__ __forceinline__ void load_queries(const KernelArgs& args, SharedMemory<C>& shared, const Tile& tile,
                                             const Place& place, int num_panels) {
  const Steps steps = steps_of(args, tile, place);
  if (steps.begin == steps.end) return;
  shared.query_full.arrive_expect(num_panels * kPanelBytes);
  for (int panel = 0; panel < num_panels; ++panel) {
    tma_load(shared.query[panel], &args.query, &shared.query_full.word, panel * 64,
             tile.row_base + tile.first_row + place.half * kRows, tile.head, tile.batch);
  }
}

}  // namespace fa::prefill_sm90_wide
