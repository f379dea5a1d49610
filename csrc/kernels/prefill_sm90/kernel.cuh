// SPDX-License-Identifier: Apache-2.0
// Attention on Hopper: producer warps (TMA), one to four consumer warpgroups (wgmma), a persistent grid. After FlashAttention-3
// (Shah et al. 2024). Launched by launch.cuh with kThreads threads and at most kBlocksPerSm blocks a multiprocessor.
#pragma once

#include "kernels/common/launch_early.h"
#include "kernels/prefill_sm90/consumer.cuh"
#include "kernels/prefill_sm90/producer.cuh"

namespace fa::prefill_sm90 {

/// The barriers of a ring whose buffers `num_producers` threads fill and `num_consumers` give back.
template <int kStages>
__device__ __forceinline__ void init_ring(uint64_t (&full)[kStages], uint64_t (&empty)[kStages], int num_producers,
                                          int num_consumers) {
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    mbarrier_init(&full[i], num_producers);
    mbarrier_init(&empty[i], num_consumers);
  }
}

/// For one lane of each of the first four warps, which share the work: each barrier takes its lane some 20 clocks.
template <class C>
__device__ __forceinline__ void init_barriers(SharedMemory<C>& shared, int warp) {
  constexpr int kConsumerWarps = 4 * C::kWarpgroups;
  if (warp == 0) {
    init_ring(shared.query_full, shared.query_empty, 1, C::kOwnOutput ? kConsumerWarps : 1);
    if constexpr (C::kStoreWarp) {
      for (auto& stage : shared.out_full) {
        for (uint64_t& barrier : stage) mbarrier_init(&barrier, 4);
      }
    }
  } else if (warp == 1) {
    init_ring(shared.key_full, shared.key_empty, 1, kConsumerWarps);
  } else if (warp == 2) {
    init_ring(shared.value_full, shared.value_empty, 1, kConsumerWarps);
  } else {
    init_ring(shared.tile_full, shared.tile_empty, C::kWarpgroups, kConsumerWarps + (C::kSmall ? 0 : C::kStoreWarp ? 3 : 2));
    for (uint64_t& barrier : shared.last_value_full) mbarrier_init(&barrier, 1);
    mbarrier_init(&shared.tile_wanted, 1);
    if constexpr (C::kBiasStages > 0) init_ring(shared.bias_full, shared.bias_empty, 1, kConsumerWarps);
  }
  mbarrier_init_fence();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm) prefill_sm90_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  SharedMemory<C>& shared = *reinterpret_cast<SharedMemory<C>*>(shared_bytes);
  if (threadIdx.x == 0) {
    tma_prefetch_map(&args.query);
    tma_prefetch_map(&args.key);
    tma_prefetch_map(&args.value);
    tma_prefetch_map(&args.out);
  }
  if (threadIdx.x < 128 && threadIdx.x % 32 == 0) init_barriers(shared, threadIdx.x / 32);
  __syncwarp();
  wait_for_earlier_kernels();

  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == C::kWarpgroups) {
    if constexpr (!C::kSmall) release_registers<C::kProducerRegisters>();
    produce<C>(args, shared);
  } else {
    if constexpr (!C::kSmall) acquire_registers<C::kConsumerRegisters>();
    wait_for_barriers<C>();
    Consumer<C> consumer{args, shared, warpgroup};
    consumer.run();
  }
}

}  // namespace fa::prefill_sm90
