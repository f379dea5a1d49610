// SPDX-License-Identifier: Apache-2.0
// Attention on Hopper: producer warps (TMA), one to four consumer warpgroups (wgmma), a persistent grid. After FlashAttention-3
// (Shah et al. 2024). Launched by launch.cuh with kThreads threads and at most kBlocksPerSm blocks a multiprocessor.
#pragma once

#include "kernels/prefill_sm90/consumer.cuh"
#include "kernels/prefill_sm90/producer.cuh"

namespace fa::prefill_sm90 {

template <class C>
__device__ __forceinline__ void init_barriers(SharedMemory<C>& shared) {
  constexpr int kConsumerWarps = 4 * C::kWarpgroups;
  for (int i = 0; i < C::kQueryStages; ++i) {
    mbarrier_init(&shared.query_full[i], 1);
    mbarrier_init(&shared.query_empty[i], C::kOwnOutput ? kConsumerWarps : C::kWarpgroups);
  }
  for (int i = 0; i < C::kStages; ++i) {
    mbarrier_init(&shared.key_full[i], 1);
    mbarrier_init(&shared.key_empty[i], kConsumerWarps);
    mbarrier_init(&shared.value_full[i], 1);
    mbarrier_init(&shared.value_empty[i], kConsumerWarps);
  }
  for (int i = 0; i < C::kBiasStages; ++i) {
    mbarrier_init(&shared.bias_full[i], 1);
    mbarrier_init(&shared.bias_empty[i], kConsumerWarps);
  }
  for (int i = 0; i < kTileSlots; ++i) {
    mbarrier_init(&shared.tile_full[i], 1);
    mbarrier_init(&shared.tile_empty[i], kConsumerWarps + !C::kSmall);
  }
  mbarrier_init(&shared.tile_wanted, 1);
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
    init_barriers(shared);
  }
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == C::kWarpgroups) {
    if constexpr (!C::kSmall) release_registers<C::kProducerRegisters>();
    produce<C>(args, shared);
  } else {
    if constexpr (!C::kSmall) acquire_registers<C::kConsumerRegisters>();
    announce_barriers<C>();
    Consumer<C> consumer{args, shared, warpgroup};
    consumer.run();
  }
}

}  // namespace fa::prefill_sm90
