// SPDX-License-Identifier: Apache-2.0
// The backward pass on Hopper: producer warps (TMA), two consumer warpgroups (wgmma), a persistent grid. Launched by launch.cuh
// with kThreads threads and one block a multiprocessor.
#pragma once

#include "kernels/backward_sm90/consumer.cuh"
#include "kernels/backward_sm90/producer.cuh"
#include "kernels/common/dynamic_shared.cuh"
#include "kernels/common/launch_early.h"

namespace fa::backward_sm90 {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) backward_sm90_kernel(const __grid_constant__ KernelArgs args) {
  SharedPlan<C>& shared = *reinterpret_cast<SharedPlan<C>*>(dynamic_shared_memory());
  if (threadIdx.x == 0) {
    tma_prefetch_map(&args.query);
    tma_prefetch_map(&args.d_out);
    tma_prefetch_map(&args.key);
    tma_prefetch_map(&args.value);
    shared.init();
  }
  __syncthreads();
  wait_for_earlier_kernels();
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == C::kWarpgroups) {
    release_registers<C::kProducerRegisters>();
    produce(args, shared);
  } else {
    acquire_registers<C::kConsumerRegisters>();
    Consumer<C> consumer{args, shared, warpgroup};
    consumer.run();
  }
}

}  // namespace fa::backward_sm90
