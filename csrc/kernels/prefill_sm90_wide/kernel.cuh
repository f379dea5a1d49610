// SPDX-License-Identifier: Apache-2.0
// Attention on Hopper for heads of 257 to 512 columns. A pair of blocks has 128 query rows, 64 each; of each key and value its
// blocks fetch one half each, for both. A cluster is one pair, or one for each part of the keys, whose outputs it merges. In a
// block two consumer warpgroups have 256 columns of the output each (FlashMLA's division); a third warpgroup feeds them. Launched
// by launch.cuh.
#pragma once

#include "kernels/common/cluster.cuh"
#include "kernels/common/launch_early.h"
#include "kernels/prefill_sm90/tiles.cuh"
#include "kernels/prefill_sm90_wide/consumer.cuh"
#include "kernels/prefill_sm90_wide/merge.cuh"
#include "kernels/prefill_sm90_wide/producer.cuh"

namespace fa::prefill_sm90_wide {

/// A warp: the barriers of both rings. Each takes its lane some 20 clocks.
__device__ __forceinline__ void init_rings(SharedMemory& shared) {
  const int lane = threadIdx.x % 32;
  if (lane < 2 * kSlots) {
    shared.full[lane / kSlots][lane % kSlots].init();
    shared.empty[lane / kSlots][lane % kSlots].init();
  }
  mbarrier_init_fence();
}

/// A warp: what the block has to do, into shared memory, and the copies of its queries, which need no other block.
template <class C>
__device__ __forceinline__ void begin_tile(const KernelArgs& args, SharedMemory& shared, const Place& place, int num_panels) {
  if (args.sort_sequences) prefill_sm90::sort_longest_first(args, shared.longest_first);
  Tile tile = args.common;
  tile.valid = prefill_sm90::decode_tile<C>(args, place.tile, shared.longest_first, tile);
  if (threadIdx.x % 32 != 0) return;
  shared.tile = tile;
  const int first_row = tile.first_row + place.half * kRows;
  shared.view.full_begin = (tile.band.first(first_row + kRows - 1, tile.key_begin) + kStepKeys - 1) / kStepKeys;
  shared.view.full_end = tile.test_mask ? 0 : tile.band.end(first_row, tile.key_end) / kStepKeys;
  if (tile.valid) load_queries(args, shared, tile, place, num_panels);
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1) prefill_sm90_wide_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  SharedMemory& shared = *reinterpret_cast<SharedMemory*>(shared_bytes);
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 32, 0), warpgroup = warp / 4;
  const Place place = find_place(args);
  const int num_panels = max(static_cast<int>(args.problem.query.shape[3] + 63) / 64, kMinPanels);
  if (threadIdx.x == 0) {
    tma_prefetch_map(&args.query);
    tma_prefetch_map(&args.key);
    tma_prefetch_map(&args.value);
    tma_prefetch_map(&args.out);
  }
  wait_for_earlier_kernels();
  if (warp == 8) {
    begin_tile<C>(args, shared, place, num_panels);
  } else if (warp == 9) {
    init_rings(shared);
  }
  __syncwarp();
  cluster_arrive();
  cluster_wait();
  const Tile& tile = shared.tile;
  if (!tile.valid) return;

  if (warpgroup == 2) {
    release_registers<kProducerRegisters>();
    if (warp < 10 && threadIdx.x % 32 == 0) {
      Loader{args, shared, tile, place, warp - 8, static_cast<int>(args.heads_per_kv.quotient(tile.head)), {}}.run(num_panels);
    }
    __syncwarp();
    if (args.num_splits > 1 && !args.over_grid) {
      cluster_arrive();
      cluster_wait();
    }
  } else {
    acquire_registers<kConsumerRegisters>();
    Consumer<C> consumer{args, shared, tile, place, warpgroup, num_panels};
    consumer.run();
    add_sums(consumer);
    if (args.num_splits == 1) {
      store_columns<C, kColumns>(consumer, consumer.o, warpgroup * kColumns);
    } else if (args.over_grid) {
      store_partial(consumer);
    } else {
      publish(consumer);
      cluster_arrive();
      cluster_wait();
      if (args.num_splits == 2) {
        merge<C, 2>(consumer);
      } else {
        merge<C, 4>(consumer);
      }
    }
    __syncwarp();
  }
  // No block ends while another may write to its shared memory or read it.
  cluster_arrive();
  cluster_wait();
}

}  // namespace fa::prefill_sm90_wide
