// SPDX-License-Identifier: Apache-2.0
// Attention on Hopper for heads of 257 to 512 columns. A pair of blocks has 128 query rows, 64 each; of each key and value its
// blocks fetch one half each, for both. In a block two consumer warpgroups have one half each of a step's keys and of the
// output's columns (FlashMLA's division); a third warpgroup feeds them. A cluster is one pair; or 2 or 4, one for each part of
// the keys, whose outputs it merges; or 2 or 4 that share keys and columns of each step as warpgroups do. Launched by launch.cuh.
#pragma once

#include "kernels/common/cluster.cuh"
#include "kernels/common/launch_early.h"
#include "kernels/prefill_sm90/tiles.cuh"
#include "kernels/prefill_sm90_wide/consumer.cuh"
#include "kernels/prefill_sm90_wide/finish.cuh"
#include "kernels/prefill_sm90_wide/merge.cuh"
#include "kernels/prefill_sm90_wide/producer.cuh"

namespace fa::prefill_sm90_wide {

/// A warp: all barriers. Each takes its lane some 20 clocks.
template <class C>
__device__ __forceinline__ void init_barriers(SharedMemory<C>& shared) {
  const int lane = threadIdx.x % 32;
  if (lane < 2 * C::kSlots) {
    shared.full[lane / C::kSlots][lane % C::kSlots].init();
    shared.empty[lane / C::kSlots][lane % C::kSlots].init();
  }
  if (lane < C::kPairs) shared.weights_there[lane].init();
  if (lane == 29) shared.query_full.init();
  if (lane == 30) shared.weights_free.init();
  if (lane == 31) shared.numbers_there.init();
  mbarrier_init_fence();
}

/// A warp: what the block has to do, into shared memory.
template <class C>
__device__ __forceinline__ void describe_tile(const KernelArgs& args, SharedMemory<C>& shared, const Place& place) {
  if (args.sort_sequences) prefill_sm90::sort_longest_first(args, shared.longest_first);
  Tile tile = args.common;
  tile.valid = prefill_sm90::decode_tile<C>(args, place.tile, shared.longest_first, tile);
  if (threadIdx.x % 32 != 0) return;
  shared.tile = tile;
  const int first_row = tile.first_row + place.half * kRows;
  shared.view.full_begin = (tile.band.first(first_row + kRows - 1, tile.key_begin) + C::kTileN - 1) / C::kTileN;
  shared.view.full_end = tile.test_mask ? 0 : tile.band.end(first_row, tile.key_end) / C::kTileN;
}

/// A consumer's tile from its sums to device memory. It arrives at the cluster's barrier for the last time as soon as it has
/// nothing to do with other blocks' shared memory any more.
template <class C>
__device__ __forceinline__ void end_tile(Consumer<C>& consumer) {
  const KernelArgs& args = consumer.args;
  add_sums(consumer);
  __syncwarp();
  if constexpr (C::kPairs == 1) {
    if (args.num_splits > 1 && !args.over_grid) {
      publish(consumer);
      cluster_arrive();
      cluster_wait();
      if (args.num_splits == 2) {
        merge<C, 2>(consumer);
      } else {
        merge<C, 4>(consumer);
      }
      __syncwarp();
      cluster_arrive_relaxed();
      return;
    }
  }
  cluster_arrive();  // NOTE: with a release, so that the slots which were given back last reach blocks that still run
  if (args.over_grid) {
    store_partial(consumer);
  } else {
    store_columns<C, C::kColumns>(consumer, consumer.o, (2 * consumer.place.pair + consumer.warpgroup) * C::kColumns);
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1) prefill_sm90_wide_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  SharedMemory<C>& shared = *reinterpret_cast<SharedMemory<C>*>(shared_bytes);
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 32, 0), warpgroup = warp / 4;
  const Place place = find_place<C>(args);
  const int num_panels = max(static_cast<int>(args.problem.query.shape[3] + 63) / 64, kMinPanels);
  if (threadIdx.x == 0) {
    tma_prefetch_map(&args.query);
    tma_prefetch_map(&args.key);
    tma_prefetch_map(&args.value);
    tma_prefetch_map(&args.out);
  }
  if (warp == 9) init_barriers(shared);
  __syncwarp();
  cluster_arrive_relaxed();
  if (warp == 8) {
    // NOTE: tiles that are alike are described by the arguments alone, while earlier kernels still run.
    if (!args.tiles_alike) wait_for_earlier_kernels();
    describe_tile<C>(args, shared, place);
  }
  __syncwarp();
  wait_for_earlier_kernels();
  __syncthreads();
  const Tile& tile = shared.tile;
  const bool is_loader = threadIdx.x == 8 * 32 || threadIdx.x == 9 * 32;
  Loader<C> loader{args, shared, tile, place, warp - 8, static_cast<int>(args.heads_per_kv.quotient(tile.head)), {}};
  if (tile.valid && is_loader) loader.load_first_keys(num_panels);
  if (tile.valid && threadIdx.x == 10 * 32) load_queries(args, shared, tile, place, num_panels);
  __syncwarp();
  cluster_wait();
  if (!tile.valid) return;

  if (warpgroup == 2) {
    release_registers<C::kProducerRegisters>();
    if (is_loader) loader.run(num_panels);
    __syncwarp();
    if (C::kPairs == 1 && args.num_splits > 1 && !args.over_grid) {
      cluster_arrive();
      cluster_wait();
    }
    cluster_arrive_relaxed();
  } else {
    acquire_registers<C::kConsumerRegisters>();
    Consumer<C> consumer{args, shared, tile, place, warpgroup, num_panels};
    consumer.run();
    end_tile(consumer);
    __syncwarp();
  }
  // No block ends while another may write to its shared memory or read it.
  cluster_wait();
}

}  // namespace fa::prefill_sm90_wide
