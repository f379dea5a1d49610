// SPDX-License-Identifier: Apache-2.0
// Attention of float32 tensors on Hopper by TF32 products: the tiles, roles and order of prefill_sm90, and two warps more that
// turn keys and values into operands. Launched by launch.cuh with kThreads threads and at most one block a multiprocessor.
#pragma once

#include "kernels/prefill_sm90/kernel.cuh"
#include "kernels/prefill_sm90_f32/consumer.cuh"
#include "kernels/prefill_sm90_f32/producer.cuh"

namespace fa::prefill_sm90_f32 {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) prefill_sm90_f32_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  SharedPlan<C>& shared = *reinterpret_cast<SharedPlan<C>*>(shared_bytes);
  prefill_sm90::prepare<C>(args, shared);

  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == C::kWarpgroups) {
    if constexpr (C::kMovesRegisters) release_registers<C::kProducerRegisters>();
    produce<C>(args, shared);
  } else {
    if constexpr (C::kMovesRegisters) acquire_registers<C::kConsumerRegisters>();
    prefill_sm90::announce_barriers<C>(warpgroup);
    const AttentionParams& p = args.problem;
    const bool modified = p.bias.present || p.alibi_slopes.present || p.softcap != 0.0f || p.softmax_scale <= 0.0f;
    Consumer<C> consumer{args, shared, warpgroup, modified};
    consumer.run();
  }
}

}  // namespace fa::prefill_sm90_f32
