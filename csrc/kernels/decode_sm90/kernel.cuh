// SPDX-License-Identifier: Apache-2.0
// The decoding kernel for Hopper: few query rows against many keys, in one launch, at the speed of the memory. One warp keeps a
// deep ring of key and value tiles under way; the others multiply with mma.sync, which is fast enough for up to 64 rows. See
// docs/decoding.md.
#pragma once

#include "kernels/common/dynamic_shared.cuh"
#include "kernels/common/launch_early.h"
#include "kernels/decode_sm90/consumer.cuh"
#include "kernels/decode_sm90/producer.cuh"

namespace fa::decode_sm90 {

/// The whole block: a thread for each stage and each slot.
template <class C>
__device__ __forceinline__ void init_barriers(const KernelArgs& args, SharedPlan<C::kWarps>& shared) {
  const int idx = threadIdx.x % 32;
  if (threadIdx.x / 32 == 0 && idx < args.stages) {
    shared.full[idx].init();
    mbarrier_init(&shared.empty[idx], row_blocks(args));
    mbarrier_init_fence();
  }
  if (threadIdx.x / 32 == 1 && idx < kItemSlots) {
    shared.item_full[idx].init();
    shared.item_empty[idx].init();
    mbarrier_init_fence();
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kTile.blocks_per_sm)
    decode_sm90_kernel(const __grid_constant__ KernelArgs args) {
  unsigned char* bytes = dynamic_shared_memory();
  SharedPlan<C::kWarps>& shared = *reinterpret_cast<SharedPlan<C::kWarps>*>(bytes);
  unsigned char* ring = bytes + plan_bytes<C::kWarps>();
  // 1. What does not depend on earlier kernels.
  init_barriers<C>(args, shared);
  __syncthreads();
  if (threadIdx.x == 32 * C::kWarps) {
    tma_prefetch_map(&args.key);
    tma_prefetch_map(&args.value);
  }
  if (threadIdx.x / 32 == 0 && args.only_lengths) fetch_likely_tiles<C>(args);
  // 2. Which keys are this block's. What the host knows is worked out while earlier kernels end.
  EqualHeads heads{args.cut.tiles, 0, args.work};
  if (!args.uniform) {
    wait_for_earlier_kernels();
    find_equal_heads<C>(args, heads);
  }
  const bool is_told = heads.tiles > 0;
  if (is_told) {
    if (threadIdx.x == 0) tell_first_piece<C>(args, shared, heads);
  } else if (!args.uniform) {
    make_schedule<C>(args, shared);
    __syncthreads();
    heads = {shared.cut_tiles, shared.first_sequence, shared.first_work};
  }
  if (args.uniform) wait_for_earlier_kernels();
  // 3. Both roles end with the item that is not valid.
  if (threadIdx.x / 32 < C::kWarps) {
    Consumer<C>(args, shared, ring).run();
  } else if (heads.tiles == 0) {
    produce<C>(args, shared, ring, Range<C>(args, shared), false);
  } else {
    produce<C>(args, shared, ring, DrawnPieces<C>(args, shared, heads), is_told);
  }
}

}  // namespace fa::decode_sm90
