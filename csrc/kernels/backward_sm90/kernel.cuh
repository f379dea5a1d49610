// SPDX-License-Identifier: Apache-2.0
// The backward pass on Hopper: producer warps (TMA), two consumer warpgroups (wgmma), a persistent grid. Launched by launch.cuh
// with kThreads threads and one block a multiprocessor.
#pragma once

#include "kernels/backward_sm90/consumer.cuh"
#include "kernels/backward_sm90/pair_consumer.cuh"
#include "kernels/backward_sm90/pair_producer.cuh"
#include "kernels/backward_sm90/producer.cuh"
#include "kernels/common/dynamic_shared.cuh"
#include "kernels/common/launch_early.h"

namespace fa::backward_sm90 {

__device__ __forceinline__ void prefetch_maps(const KernelArgs& args) {
  tma_prefetch_map(&args.query);
  tma_prefetch_map(&args.d_out);
  tma_prefetch_map(&args.key);
  tma_prefetch_map(&args.value);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) backward_sm90_kernel(const __grid_constant__ KernelArgs args) {
  SharedPlan<C>& shared = *reinterpret_cast<SharedPlan<C>*>(dynamic_shared_memory());
  if (threadIdx.x == 0) {
    prefetch_maps(args);
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

/// The same by pairs of blocks, clusters of two.
template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) backward_sm90_pair_kernel(const __grid_constant__ KernelArgs args) {
  PairPlan<C>& shared = *reinterpret_cast<PairPlan<C>*>(dynamic_shared_memory());
  if (threadIdx.x == 0) {
    prefetch_maps(args);
    shared.init();
  }
  cluster_arrive();  // the barriers are there, in the other block, too
  cluster_wait();
  wait_for_earlier_kernels();
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == C::kWarpgroups) {
    release_registers<C::kProducerRegisters>();
    produce_for_pair(args, shared);
  } else {
    acquire_registers<C::kConsumerRegisters>();
    PairConsumer<C> consumer{args, shared, warpgroup, cluster_rank()};
    consumer.run();
  }
  cluster_arrive();  // shared memory must outlive what the other block does with it
  cluster_wait();
}

}  // namespace fa::backward_sm90
