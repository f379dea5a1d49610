// SPDX-License-Identifier: Apache-2.0
// Attention of float8 tensors on Hopper: the tiles, roles and order of prefill_sm90, and two warps more that transpose values.
// Launched by launch.cuh with kThreads threads and at most one block a multiprocessor.
#pragma once

#include "kernels/prefill_sm90/kernel.cuh"
#include "kernels/prefill_sm90_f8/consumer.cuh"
#include "kernels/prefill_sm90_f8/producer.cuh"

namespace fa::prefill_sm90_f8 {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) prefill_sm90_f8_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  SharedPlan<C>& shared = *reinterpret_cast<SharedPlan<C>*>(shared_bytes);
  prefill_sm90::prepare<C>(args, shared);

  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == C::kWarpgroups) {
    release_registers<C::kProducerRegisters>();
    produce<C>(args, shared);
  } else {
    acquire_registers<C::kConsumerRegisters>();
    prefill_sm90::announce_barriers<C>(warpgroup);
    Consumer<C> consumer{args, shared, warpgroup};
    consumer.run();
  }
}

}  // namespace fa::prefill_sm90_f8
