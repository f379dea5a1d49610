// SPDX-License-Identifier: Apache-2.0
// Attention on Hopper: producer warps (TMA), one to four consumer warpgroups (wgmma), a persistent grid. After FlashAttention-3
// (Shah et al. 2024). Launched by launch.cuh with kThreads threads and at most kBlocksPerSm blocks a multiprocessor.
#pragma once

#include "kernels/common/launch_early.h"
#include "kernels/prefill_sm90/consumer.cuh"
#include "kernels/prefill_sm90/producer.cuh"

namespace fa::prefill_sm90 {

/// Prepares what does not depend on earlier kernels. Their end is waited for as late as can be, since much is done until then: by
/// each role when the barriers are there (announce_barriers, wait_to_produce), and by the scheduling warp when it has decided on
/// the first tile (schedule_tiles). NOTE: then short tiles would lack registers for their products, so small blocks wait here.
template <class C, class Plan>
__device__ __forceinline__ void prepare(const KernelArgs& args, Plan& shared) {
  if (threadIdx.x == 0) {
    tma_prefetch_map(&args.query);
    tma_prefetch_map(&args.key);
    tma_prefetch_map(&args.value);
    tma_prefetch_map(&args.out);
  }
  if (threadIdx.x < 128 && threadIdx.x % 32 == 0) init_barriers(shared, threadIdx.x / 32);
  __syncwarp();
  if constexpr (C::kSmall) wait_for_earlier_kernels();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm) prefill_sm90_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  SharedPlan<C>& shared = *reinterpret_cast<SharedPlan<C>*>(shared_bytes);
  prepare<C>(args, shared);

  // The last warpgroup, or in small blocks the last warp, produces; the others consume. Each role ends when it meets a tile
  // that is not valid.
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == C::kWarpgroups) {
    if constexpr (!C::kSmall) release_registers<C::kProducerRegisters>();
    produce<C>(args, shared);
  } else {
    if constexpr (!C::kSmall) acquire_registers<C::kConsumerRegisters>();
    announce_barriers<C>(warpgroup);
    Consumer<C> consumer{args, shared, C::kOnlyWarpgroup ? 0 : warpgroup};
    consumer.run();
  }
}

}  // namespace fa::prefill_sm90
