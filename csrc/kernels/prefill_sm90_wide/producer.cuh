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
  int half;   // of the tile's rows
  int pair;   // the first of the two blocks in their cluster
};

__device__ __forceinline__ Place find_place(const KernelArgs& args) {
  const int rank = cluster_rank(), pair = static_cast<int>(blockIdx.x) / 2, tile = pair / args.num_splits;
  return {tile, pair - tile * args.num_splits, rank % 2, rank & ~1};
}

/// The key steps of a block's split.
struct Steps {
  int begin, end;
};

__device__ __forceinline__ Steps steps_of(const KernelArgs& args, const Tile& tile, const Place& place) {
  const int count = tile.block_end - tile.block_begin;
  return {tile.block_begin + count * place.split / args.num_splits,
          tile.block_begin + count * (place.split + 1) / args.num_splits};
}

/// One thread's copies into the ring of one warpgroup.
struct Loader {
  const KernelArgs& args;
  SharedMemory& shared;
  const Tile& tile;
  Place place;
  int warpgroup, key_head;
  RingPosition<kSlots> ring;

  /// Waits until both blocks have given the next slot back, and announces what is to come.
  __device__ __forceinline__ uint8_t* open_slot() {
    shared.empty[warpgroup][ring.stage].wait(ring.phase ^ 1);
    shared.full[warpgroup][ring.stage].arrive_expect(kSlotBytes);
    return shared.ring[warpgroup][ring.stage];
  }

  __device__ __forceinline__ void copy(uint8_t* to, const CUtensorMap* map, int column, int row) {
    tma_load_multicast(to, map, &shared.full[warpgroup][ring.stage].word, column, tile.key_base + row, key_head, tile.batch,
                       static_cast<uint16_t>(3 << place.pair));
  }

  __device__ __forceinline__ void load_keys(int step, int num_panels) {
    const int own = place.half * (kKeys / 2);
    for (int panel = 0; panel < num_panels; ++panel) {
      copy(open_slot() + own * 128, &args.key, panel * 64, step * kStepKeys + warpgroup * kKeys + own);
      ring.advance();
    }
  }

  __device__ __forceinline__ void load_values(int step) {
    for (int i = 0; i < kValueSlots; ++i) {
      uint8_t* slot = open_slot();
#pragma unroll
      for (int j = 0; j < kColumns / 128; ++j) {
        const int panel = place.half * (kColumns / 128) + j;
        copy(slot + panel * kValuePanelBytes, &args.value, warpgroup * kColumns + panel * 64, step * kStepKeys + i * kSlotKeys);
      }
      ring.advance();
    }
  }

  /// From the last step to the first, in the order in which the consumers read.
  __device__ __forceinline__ void run(int num_panels) {
    const Steps steps = steps_of(args, tile, place);
    if (steps.begin == steps.end) return;
    load_keys(steps.end - 1, num_panels);
    for (int step = steps.end - 1; step >= steps.begin; --step) {
      if (step > steps.begin) load_keys(step - 1, num_panels);
      load_values(step);
    }
  }
};

/// One thread: the block's queries, if it has keys: else nobody waits for them, and they would overwrite the output.
__device__ __forceinline__ void load_queries(const KernelArgs& args, SharedMemory& shared, const Tile& tile, const Place& place,
                                             int num_panels) {
  const Steps steps = steps_of(args, tile, place);
  if (steps.begin == steps.end) return;
  shared.query_full.init();
  mbarrier_init_fence();
  shared.query_full.arrive_expect(num_panels * kPanelBytes);
  for (int panel = 0; panel < num_panels; ++panel) {
    tma_load(shared.query[panel], &args.query, &shared.query_full.word, panel * 64,
             tile.row_base + tile.first_row + place.half * kRows, tile.head, tile.batch);
  }
}

}  // namespace fa::prefill_sm90_wide
