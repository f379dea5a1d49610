// SPDX-License-Identifier: Apache-2.0
// The producer of decode_sm90: one thread that finds the block's items and keeps the copy engine busy with their keys and values,
// as far ahead as the ring reaches, across items.
#pragma once

#include "kernels/common/launch_early.h"
#include "kernels/common/tma.cuh"
#include "kernels/decode_sm90/schedule.cuh"

namespace fa::decode_sm90 {

/// A position in the ring, whose number of stages is known at launch. One number, since a consumer has no register to spare.
struct RingPlace {
  int turn = 0;  // of two rounds: the second one's phase is 1

  __device__ __forceinline__ int stage(int stages) const { return turn < stages ? turn : turn - stages; }
  __device__ __forceinline__ uint32_t phase(int stages) const { return turn >= stages; }
  __device__ __forceinline__ void advance(int by, int stages) {
    turn += by;
    if (turn >= 2 * stages) turn -= 2 * stages;
  }
};

/// Starts the copies of one stage: `row` is the tile's first key in the tensors.
template <class C>
__device__ __forceinline__ void load_stage(const KernelArgs& args, unsigned char* stage, Mbarrier<1>& full, int row, int key_head,
                                           int batch) {
  full.arrive_expect(C::kStageBytes);
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel)
    tma_load(stage + panel * C::kPanelBytes, &args.key, &full.word, panel * kPanelColumns, row, key_head, batch);
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    tma_load(stage + C::kValueOffset + panel * C::kPanelBytes, &args.value, &full.word, panel * kPanelColumns, row, key_head,
             batch);
  }
}

template <class C>
__device__ __forceinline__ void produce(const KernelArgs& args, SharedPlan<C::kWarps>& shared, unsigned char* ring) {
  Walk<C> walk(args, shared);
  RingPlace place;
  RingPosition<kItemSlots> slot;
  const auto load_until = [&](const Piece& piece, int tile, int end) {
    const int first_key = static_cast<int>(walk.work.sequence.first_key), batch = static_cast<int>(walk.work.sequence.batch_idx);
#pragma unroll 1
    for (; tile < end; ++tile) {
      const int stage = place.stage(args.stages);
      mbarrier_wait(&shared.empty[stage], place.phase(args.stages) ^ 1);
      load_stage<C>(args, ring + stage * C::kStageBytes, shared.full[stage], first_key + tile * C::kTileN, piece.key_head, batch);
      place.advance(1, args.stages);
    }
  };
  for (Piece piece; walk.next(piece);) {
    const int early = min(piece.end, piece.begin + kTilesBeforeItem);
    load_until(piece, piece.begin, early);
    shared.item_empty[slot.stage].wait(slot.phase ^ 1);
    shared.item[slot.stage] = walk.describe(piece);
    shared.item_full[slot.stage].arrive();
    slot.advance();
    load_until(piece, early, piece.end);
  }
  shared.item_empty[slot.stage].wait(slot.phase ^ 1);
  shared.item[slot.stage].valid = 0;
  shared.item_full[slot.stage].arrive();
  let_next_kernel_start();
}

}  // namespace fa::decode_sm90
