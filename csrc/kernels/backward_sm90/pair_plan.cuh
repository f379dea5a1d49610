// SPDX-License-Identifier: Apache-2.0
// The shared memory of a block of a pair, which has an item together with the other block of its cluster: heads of 129 to 256
// columns, whose gradients of 128 keys need the registers of two multiprocessors.
//
// Of the item's 128 keys a block has 64 with all their columns, for S and dP, and of the other block's keys its own half of the
// columns, for dQ. Of Q and dO the block's own half ("near") is needed until the gradients of keys have been added to, the other
// ("far") only for S and dP. P and dS of its keys a block writes here and copies to the other block, where they are needed, too.
//
// Roles and barriers are those of shared_plan.cuh where "consume" adds, but for the bias, and:
//
//   barrier        who arrives, and so ends a phase     who waits           what the phase's end says
//   index_full     the first block's store              load, second block  the item's index is there
//   index_empty    load, second block                   load, first block   it has been read
//   near_full      the copy engine                      consume             the near half of a tile is there, and its numbers
//   near_empty     consume                              load                its buffer may be filled again
//   far_full       the copy engine                      consume             the far half is there
//   far_empty      consume                              load                its buffer may be filled again
//   scores_full    the other block's copy               consume             P and dS of the other block's keys are there
//   scores_empty   consume, of both blocks              consume             P and dS have been read in both blocks
#pragma once

#include "kernels/backward_sm90/shared_plan.cuh"

namespace fa::backward_sm90 {

/// Tiles of Q or of dO on their way.
template <class C>
struct HalvesPlan {
  alignas(1024) uint8_t near[C::kStages][C::kHalfBytes];
  alignas(1024) uint8_t far[C::kHalfBytes];
  alignas(128) float numbers[C::kStages][C::kTileM];  // of Q the log-sum-exps, of dO the deltas
  Mbarrier<1> near_full[C::kStages];
  Mbarrier<C::kConsumerThreads> near_empty[C::kStages];
  Mbarrier<1> far_full;
  Mbarrier<C::kConsumerWarps> far_empty;

  __device__ __forceinline__ void init() {
    init_ring(near_full, near_empty);
    far_full.init();
    far_empty.init();
  }
};

/// P and dS of a block's 64 keys: rows of queries, 128 bytes under the 128-byte swizzle. One behind the other, for one copy.
template <class C>
struct Scores {
  alignas(1024) uint8_t weights[C::kPanelBytes];
  uint8_t gradients[C::kPanelBytes];
};

template <class C>
struct PairPlan {
  using Config = C;

  alignas(1024) uint8_t key[C::kKeyBytes];
  alignas(1024) uint8_t value[C::kKeyBytes];
  alignas(1024) uint8_t other_key[C::kHalfBytes];
  Scores<C> scores[C::kBlocks];  // of each block's keys
  HalvesPlan<C> query, d_out;

  Mbarrier<1> item_full[kItemSlots];
  Mbarrier<C::kConsumerThreads + 2> item_empty[kItemSlots];
  Mbarrier<1> key_full, value_full;
  Mbarrier<C::kConsumerWarps> key_empty, value_empty;
  Mbarrier<1> turn_full[kTurnSlots], turn_empty[kTurnSlots];
  Mbarrier<C::kConsumerWarps> turn_done[kTurnSlots];
  Mbarrier<1> index_full[kItemSlots], index_empty[kItemSlots];
  Mbarrier<1> scores_full;
  Mbarrier<C::kBlocks * C::kConsumerWarps> scores_empty;

  Item item[kItemSlots];
  unsigned index[kItemSlots];  // of items, in the second block

  /// For one thread; a barrier of the cluster must follow.
  __device__ __forceinline__ void init() {
    init_ring(item_full, item_empty);
    key_full.init();
    value_full.init();
    key_empty.init();
    value_empty.init();
    init_ring(turn_full, turn_empty);
    for (auto& barrier : turn_done) barrier.init();
    init_ring(index_full, index_empty);
    scores_full.init();
    scores_empty.init();
    query.init();
    d_out.init();
    mbarrier_init_fence();
  }
};

}  // namespace fa::backward_sm90
