// SPDX-License-Identifier: Apache-2.0
// The warps of prefill_sm90_f8 that don't multiply: one decides on tiles, a lane of another keeps the copy engine busy, two
// transpose values.
#pragma once

#include "kernels/prefill_sm90/producer.cuh"
#include "kernels/prefill_sm90_f8/convert.cuh"

namespace fa::prefill_sm90_f8 {

/// Ring positions of the producer.
template <class C>
struct ProducerRings {
  RingPosition<C::kQueryStages> query;
  RingPosition<C::kKeyStages> key;
  RingPosition<C::kRawStages> value;
};

/// Waits until the buffer is free, then starts the copy of all panels of kBytes / kPanels bytes, from `row` on.
template <int kPanels, uint32_t kBytes, int kReaders>
__device__ __forceinline__ void load_rows(uint8_t* buffer, const CUtensorMap* map, Mbarrier<1>& full, Mbarrier<kReaders>& empty,
                                          uint32_t phase, int row, int head, int batch) {
  empty.wait(phase ^ 1);
  full.arrive_expect(kBytes);
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    uint8_t* to = buffer + panel * (kBytes / kPanels);
    tma_load_shared_by_blocks(to, map, &full.word, panel * 128, row, head, batch);
  }
}

/// The keys of one block.
template <class C>
__device__ __forceinline__ void load_key(const KernelArgs& args, SharedPlan<C>& shared, const Tile& tile, int key_head, int block,
                                         ProducerRings<C>& rings) {
  const int i = rings.key.stage;
  load_rows<C::kPanels, C::kTileBytes>(shared.key[i], &args.key, shared.key_full[i], shared.key_empty[i], rings.key.phase,
                                       tile.key_base + block * C::kTileN, key_head, tile.batch);
  rings.key.advance();
}

/// One lane: the first copies of a tile, which its first product needs.
template <class C>
__device__ __forceinline__ void load_beginning(const KernelArgs& args, SharedPlan<C>& shared, const Tile& tile, int key_head,
                                               ProducerRings<C>& rings) {
  prefill_sm90::load_first<C>(args, shared, tile, rings.query,
                              [&] { load_key(args, shared, tile, key_head, tile.block_end - 1, rings); });
}

/// One lane: the copies of one tile, in the order in which the others want them. begun: load_beginning() has been
/// called.
template <class C>
__device__ __forceinline__ void load_tile(const KernelArgs& args, SharedPlan<C>& shared, const Tile& tile,
                                          ProducerRings<C>& rings, bool begun) {
  const int key_head = args.heads_per_kv.quotient(tile.head);
  if (begun) {
    prefill_sm90::pass_beginning(tile, rings);
  } else {
    load_beginning(args, shared, tile, key_head, rings);
  }
  const int announced = max(min(tile.block_end - 1, tile.block_begin + 2 * C::kKeyStages), tile.block_begin);
  if (tile.block_begin == tile.block_end) shared.tile_wanted.arrive();
#pragma unroll 1
  for (int block = tile.block_end - 1; block >= tile.block_begin; --block) {
    if (block == announced) shared.tile_wanted.arrive();
    const int i = rings.value.stage;
    load_rows<C::kPanels, C::kTileBytes>(shared.raw[i], &args.value, shared.raw_full[i], shared.raw_empty[i], rings.value.phase,
                                         tile.key_base + block * C::kTileN, key_head, tile.batch);
    rings.value.advance();
    if (block > tile.block_begin) load_key(args, shared, tile, key_head, block - 1, rings);
  }
}

template <class C>
__device__ __forceinline__ void produce(const KernelArgs& args, SharedPlan<C>& shared) {
  const int warp = threadIdx.x / 32 % 4;
  if (warp == 0) {
    prefill_sm90::schedule<C>(args, shared, [&](const Tile& tile) {
      ProducerRings<C> rings;
      load_beginning(args, shared, tile, args.heads_per_kv.quotient(tile.head), rings);
    });
  } else {
    prefill_sm90::wait_to_produce();
    if (warp == 1 && threadIdx.x % 32 == 0) {
      ProducerRings<C> rings;
      prefill_sm90::load_tiles(shared, [&](const Tile& tile, int, bool begun) { load_tile(args, shared, tile, rings, begun); });
    }
    if (warp >= 2) convert_tiles<C>(shared, warp - 2);
  }
}

}  // namespace fa::prefill_sm90_f8
