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

/// A row of keys and values: its page, or batch entry, and where it is there.
struct PlaceInPages {
  int page, row;
};

/// Where a sequence's row `row` lies; from row `end` on, and in a page that does not exist, outside of the tensors.
__device__ __forceinline__ PlaceInPages place_in_pages(const Pages& pages, int sequence, int row, int end) {
  if (row >= end) return {-1, 0};
  const int idx = static_cast<int>(pages.rows.quotient(row));
  const int64_t at = sequence * pages.sequence_stride + idx * pages.page_stride;
  const int64_t page = pages.wide ? static_cast<const int64_t*>(pages.table)[at] : static_cast<const int32_t*>(pages.table)[at];
  return {page < 0 || page >= pages.count ? -1 : static_cast<int>(page), row - idx * static_cast<int>(pages.rows.divisor)};
}

/// Starts the copies of one stage, whose 16 keys of each half lie at `first` and `second`; all of them at `first`, unless pages
/// have halves.
template <class C>
__device__ __forceinline__ void load_stage(const KernelArgs& args, unsigned char* stage, Mbarrier<1>& full,
                                           const PlaceInPages& first, const PlaceInPages& second, int key_head, uint64_t policy) {
  full.arrive_expect(C::kStageBytes);
  PlaceInPages place = first;
#pragma unroll 1
  for (int halves = args.pages.halves ? 2 : 1;;) {
    if (args.whole_rows) {
      tma_load_panels(stage, &args.key, &full.word, place.row, key_head, place.page, policy);
      tma_load_panels(stage + C::kValueOffset, &args.value, &full.word, place.row, key_head, place.page, policy);
    } else {
#pragma unroll
      for (int panel = 0; panel < C::kPanels; ++panel) {
        unsigned char* target = stage + panel * C::kPanelBytes;
        tma_load(target, &args.key, &full.word, panel * kPanelColumns, place.row, key_head, place.page, policy);
        tma_load(target + C::kValueOffset, &args.value, &full.word, panel * kPanelColumns, place.row, key_head, place.page,
                 policy);
      }
    }
    if (--halves == 0) return;
    stage += args.layout.half;
    place = second;
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
  const uint64_t policy = l2_policy(args.read_once);
  RingPosition<kItemSlots> slot;
  const auto load_until = [&](const Piece& piece, int tile, int end) {
    const int first_key = static_cast<int>(pieces.work.sequence.first_key);
    const int batch = static_cast<int>(pieces.work.sequence.batch_idx);
#pragma unroll 1
    for (; tile < end; ++tile) {
      const int stage = place.stage(args.stages);
      PlaceInPages first{batch, first_key + tile * C::kTileN}, second{};
      if (args.pages.table != nullptr) {  // looked up before the stage is waited for
        const int row = tile * C::kTileN, keys = pieces.work.key_end;
        first = place_in_pages(args.pages, pieces.idx, row, keys);
        if (args.pages.halves) second = place_in_pages(args.pages, pieces.idx, row + C::kTileN / 2, keys);
      }
      if (to_start > 0) {
        --to_start;
      } else {
        shared.full[landed.stage(args.stages)].wait(landed.phase(args.stages));
        landed.advance(1, args.stages);
      }
      mbarrier_wait(&shared.empty[stage], place.phase(args.stages) ^ 1);
      load_stage<C>(args, ring + stage * C::kStageBytes, shared.full[stage], first, second, piece.key_head, policy);
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
  bool is_told = pieces.first_is_told;
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
