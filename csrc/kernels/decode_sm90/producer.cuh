// SPDX-License-Identifier: Apache-2.0
// The producer of decode_sm90: one thread that finds the block's items and keeps the copy engine busy with their keys and values,
// as far ahead as the ring reaches, across items.
#pragma once

#include "kernels/common/launch_early.h"
#include "kernels/common/tma.cuh"
#include "kernels/decode_sm90/pieces.cuh"

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
  if (args.whole_rows) {
    tma_load_panels(stage, &args.key, &full.word, row, key_head, batch);
    tma_load_panels(stage + C::kValueOffset, &args.value, &full.word, row, key_head, batch);
    return;
  }
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel)
    tma_load(stage + panel * C::kPanelBytes, &args.key, &full.word, panel * kPanelColumns, row, key_head, batch);
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    tma_load(stage + C::kValueOffset + panel * C::kPanelBytes, &args.value, &full.word, panel * kPanelColumns, row, key_head,
             batch);
  }
}

/// Pieces: DrawnPieces or Range, the block's pieces one after the other.
template <class C, class Pieces>
__device__ __forceinline__ void produce(const KernelArgs& args, SharedPlan<C::kWarps>& shared, unsigned char* ring,
                                        Pieces pieces) {
  const int key_warps = C::kWarps >> row_bits(args);
  RingPlace place, landed;
  const int share = args.uniform ? args.share : shared.schedule.per_block;
  int to_start = args.stages;  // before one of those under way must have landed
  if (share >= kMinBytesOfLongShare / C::kStageBytes) to_start = min(to_start, (kBytesAtOnce - 1) / C::kStageBytes + 1);
  RingPosition<kItemSlots> slot;
  const auto load_until = [&](const Piece& piece, int tile, int end) {
    const int first_key = static_cast<int>(pieces.work.sequence.first_key);
    const int batch = static_cast<int>(pieces.work.sequence.batch_idx);
#pragma unroll 1
    for (; tile < end; ++tile) {
      const int stage = place.stage(args.stages);
      if (to_start > 0) {
        --to_start;
      } else {
        shared.full[landed.stage(args.stages)].wait(landed.phase(args.stages));
        landed.advance(1, args.stages);
      }
      mbarrier_wait(&shared.empty[stage], place.phase(args.stages) ^ 1);
      load_stage<C>(args, ring + stage * C::kStageBytes, shared.full[stage], first_key + tile * C::kTileN, piece.key_head, batch);
      place.advance(1, args.stages);
    }
  };
  const auto tell = [&](const Piece& piece, int first_warp) {
    shared.item_empty[slot.stage].wait(slot.phase ^ 1);
    Item& item = shared.item[slot.stage];
    item = describe<C>(args, shared, pieces.work, pieces.idx, piece);
    item.first_warp = first_warp;
    pieces.place(item);
  };
  bool is_told = Pieces::kFirstIsTold;
  for (Piece piece; pieces.next(piece); is_told = false) {
    int tile = piece.begin;
    if (!is_told) {
      const int first_warp = place.turn & (key_warps - 1);
      tile = min(piece.end, tile + kTilesBeforeItem);
      load_until(piece, piece.begin, tile);
      tell(piece, first_warp);
    }
    shared.item_full[slot.stage].arrive();
    slot.advance();
    pieces.draw();
    load_until(piece, tile, piece.end);
  }
  shared.item_empty[slot.stage].wait(slot.phase ^ 1);
  shared.item[slot.stage].valid = 0;
  shared.item_full[slot.stage].arrive();
  let_next_kernel_start();
}

}  // namespace fa::decode_sm90
