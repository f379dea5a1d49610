// SPDX-License-Identifier: Apache-2.0
// The warps of prefill_sm90_f32 that don't multiply: one decides on tiles, a lane of another keeps the copy engine busy, two
// convert.
#pragma once

#include "kernels/common/tma.cuh"
#include "kernels/prefill_sm90/producer.cuh"
#include "kernels/prefill_sm90_f32/convert.cuh"

namespace fa::prefill_sm90_f32 {

/// Ring positions of the producer.
template <class C>
struct ProducerRings {
  RingPosition<C::kQueryStages> query;
  RingPosition<C::kKeyStages> key;
  RingPosition<C::kValueStages> value;
};

/// The keys of one block.
template <class C>
__device__ __forceinline__ void load_key(const KernelArgs& args, SharedPlan<C>& shared, const Tile& tile, int key_head, int block,
                                         ProducerRings<C>& rings) {
  const int i = rings.key.stage;
  shared.key_empty[i].wait(rings.key.phase ^ 1);
  shared.key_raw[i].arrive_expect(C::kTileBytes);
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    tma_load_shared_by_blocks(shared.key[i] + panel * C::kParts * C::kTileN * 128, &args.key, &shared.key_raw[i].word, panel * 32,
                              tile.key_base + block * C::kTileN, key_head, tile.batch);
  }
  rings.key.advance();
}

/// One lane: the first copies of a tile, which its first product needs.
template <class C>
__device__ __forceinline__ void load_beginning(const KernelArgs& args, SharedPlan<C>& shared, const Tile& tile, int key_head,
                                               ProducerRings<C>& rings) {
  prefill_sm90::load_first<C>(args, shared, tile, rings.query,
                              [&] { load_key(args, shared, tile, key_head, tile.block_end - 1, rings); });
}

/// One lane: the copies of one tile, in the order in which the consumers want them. begun: load_beginning() has been
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
  const auto load_value = [&](int block) {
    const int i = rings.value.stage;
    shared.value_empty[i].wait(rings.value.phase ^ 1);
    shared.value_raw[i].arrive_expect(C::kTileBytes);
#pragma unroll
    for (int box = 0; box < C::kTileN / 32 * C::kPanels; ++box) {
      tma_load_shared_by_blocks(shared.value[i] + box * C::kBlockBytes, &args.value, &shared.value_raw[i].word,
                                box % C::kPanels * 32, tile.key_base + block * C::kTileN + box / C::kPanels * 32, key_head,
                                tile.batch);
    }
    rings.value.advance();
  };
  const int announced = max(min(tile.block_end - 1, tile.block_begin + 2 * C::kKeyStages), tile.block_begin);
  if (tile.block_begin == tile.block_end) shared.tile_wanted.arrive();
#pragma unroll 1
  for (int block = tile.block_end - 1; block >= tile.block_begin; --block) {
    if (block == announced) shared.tile_wanted.arrive();
    load_value(block);
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

}  // namespace fa::prefill_sm90_f32
