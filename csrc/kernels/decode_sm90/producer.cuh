// SPDX-License-Identifier: Apache-2.0
// The producer of decode_sm90: one warp that finds the block's items and keeps the copy engine busy with their keys and values,
// as far ahead as the ring reaches, across items. Its lanes do the same, but that each looks up other pages.
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
  /// `by` stages behind, at most all.
  __device__ __forceinline__ RingPlace behind(int by, int stages) const {
    return {turn >= by ? turn - by : turn + 2 * stages - by};
  }
};

/// Where the keys of the tiles to come lie. Each lane of the producer knows it of some neighbouring keys: of a tile, or of half a
/// tile where pages have halves, whose copies it then starts. So a warp has 32 or 16 tiles ahead, and nothing is looked up
/// between a stage's becoming free and its copies.
template <class C>
struct KeyPlaces {
  const KernelArgs& args;
  const SequenceWork& work;         // of the sequence
  const uint32_t* table = nullptr;  // its row of the block table
  int first_tile = 0, end_tile = 0;
  int page = 0, row = 0;  // of the lane's keys: page, or batch entry, and row in it
  uint32_t low = 0;       // the entry of the block table for the lane's keys of the tiles from end_tile on …
  uint32_t high = 0;      // … of which, where the table is int64, this is the other half

  __device__ __forceinline__ KeyPlaces(const KernelArgs& args_, const SequenceWork& work_) : args(args_), work(work_) {}

  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
  __device__ __forceinline__ int half_bits() const { return args.pages.halves; }
  /// Of the lane's tile.
  __device__ __forceinline__ int half() const { return lane() & half_bits(); }
  __device__ __forceinline__ bool is_for(int tile) const { return lane() >> half_bits() == tile - first_tile; }
  /// Which tile the lane's keys are of, counted from `tile` on.
  __device__ __forceinline__ int ahead_of(int tile) const { return (lane() >> half_bits()) - (tile - first_tile); }

  /// From `tile` of a sequence on.
  __device__ __forceinline__ void begin(int sequence, int tile) {
    end_tile = tile;
    if (__builtin_expect(args.pages.table == nullptr, 1)) return;
    table = static_cast<const uint32_t*>(args.pages.table) + (sequence * args.pages.sequence_stride << args.pages.wide);
    look_up();
  }

  /// The tiles from end_tile on. Their pages were read when the tiles before them began, so that nothing waits for them here.
  __device__ __forceinline__ void go_on() {
    first_tile = end_tile;
    row = first_row();
    end_tile += 32 >> half_bits();
    if (__builtin_expect(args.pages.table == nullptr, 1)) {
      page = static_cast<int>(work.sequence.batch_idx);
      row += static_cast<int>(work.sequence.first_key);
      return;
    }
    row -= static_cast<int>(args.pages.rows.quotient(row) * args.pages.rows.divisor);
    page = high == 0 && low < static_cast<uint32_t>(args.pages.count) ? static_cast<int>(low) : -1;
    look_up();
  }

 private:
  /// Of the lane's keys of the tiles from end_tile on, in the sequence.
  __device__ __forceinline__ int first_row() const { return end_tile * C::kTileN + lane() * (C::kTileN >> half_bits()); }

  /// Reads their page's entry, by halves: whoever chose between two widths would wait for the first. From the sequence's end on
  /// nobody looks up a page.
  __device__ __forceinline__ void look_up() {
    low = ~0u;
    high = 0;
    if (first_row() >= work.key_end) return;
    const uint32_t* entry = table + (args.pages.rows.quotient(first_row()) * args.pages.page_stride << args.pages.wide);
    low = entry[0];
    if (args.pages.wide) high = entry[1];
  }
};

/// The lanes that have a tile's keys: starts the copies of its stage. What lies in no page is outside of the tensors.
template <class C>
__device__ __forceinline__ void load_stage(const KernelArgs& args, unsigned char* stage, Mbarrier<1>& full,
                                           const KeyPlaces<C>& keys, int key_head, uint64_t policy) {
  if (keys.half() == 0) full.arrive_expect(C::kStageBytes);
  stage += keys.half() * args.layout.half;
  if (__builtin_expect(args.whole_rows, C::kPanels > 1)) {
    tma_load_panels(stage, &args.key, &full.word, keys.row, key_head, keys.page, policy);
    tma_load_panels(stage + C::kValueOffset, &args.value, &full.word, keys.row, key_head, keys.page, policy);
    return;
  }
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    unsigned char* target = stage + panel * C::kPanelBytes;
    const int column = panel * C::kPanelColumns;
    tma_load(target, &args.key, &full.word, column, keys.row, key_head, keys.page, policy);
    tma_load(target + C::kValueOffset, &args.value, &full.word, column, keys.row, key_head, keys.page, policy);
  }
}

/// How many tiles of keys a sequence seems to have before earlier kernels have ended: a decoder's step changes its length by one.
/// Read past L1, where the old length would stay.
template <class C>
__device__ __forceinline__ int likely_tiles(const KernelArgs& args, int sequence) {
  const IndexView& lengths = args.rule.sequences.kv_lengths;
  const IndexView& view = lengths.data != nullptr ? lengths : args.rule.write_indices;
  int64_t keys = args.num_keys;
  if (view.data != nullptr) {
    const int64_t idx = sequence * view.stride;
    keys = view.wide ? __ldcg(static_cast<const long long*>(view.data) + idx) : __ldcg(static_cast<const int*>(view.data) + idx);
    if (lengths.data == nullptr) keys += args.problem.query.shape[2];
  }
  return static_cast<int>(min(max(keys, int64_t{1}), int64_t{args.num_keys}) + C::kTileN - 1) / C::kTileN;
}

/// A warp, before earlier kernels have ended and where only the device knows the lengths: the tiles that the block's first piece
/// seems to begin with, to L2; only one, if sequences seem to be of different lengths and the pieces others. Where a tile proves
/// wrong, what finds places in memory is at hand all the same.
template <class C>
__device__ __forceinline__ void fetch_likely_tiles(const KernelArgs& args) {
  const HeadCut& cut = args.cut;
  const int parts = static_cast<int>(cut.parts.divisor), head = static_cast<int>(cut.parts.quotient(blockIdx.x));
  const int part = static_cast<int>(blockIdx.x) - head * parts, lane = static_cast<int>(threadIdx.x % 32);
  const int batch = min(static_cast<int>(cut.heads_of_span.quotient(head)), args.num_spans - 1);
  const int item = head - batch * static_cast<int>(cut.heads_of_span.divisor);
  const int key_head = static_cast<int>(cut.row_tiles.quotient(item)), tiles = likely_tiles<C>(args, batch);
  const bool are_alike = __all_sync(kAllLanes, likely_tiles<C>(args, min(lane, args.num_spans - 1)) == tiles);
  const int begin = static_cast<int>(cut.parts.quotient(tiles * part)),
            end = static_cast<int>(cut.parts.quotient(tiles * (part + 1)));
  if (begin + lane >= end || lane >= (are_alike ? kBytesAhead / C::kTileBytes : 1)) return;
  const int row = (begin + lane) * C::kTileN;
  if (args.whole_rows) {
    tma_fetch_panels(&args.key, row, key_head, batch);
    tma_fetch_panels(&args.value, row, key_head, batch);
  } else {
    tma_fetch(&args.key, 0, row, key_head, batch);
    tma_fetch(&args.value, 0, row, key_head, batch);
  }
}

/// A warp. Pieces: DrawnPieces or Range, the block's pieces one after the other. is_told: tell_first_piece tells of the first.
template <class C, class Pieces>
__device__ __forceinline__ void produce(const KernelArgs& args, SharedPlan<C::kWarps>& shared, unsigned char* ring, Pieces pieces,
                                        bool is_told) {
  const int key_warps = C::kWarps >> row_bits(args);
  RingPlace place, landed;
  int to_start = args.stages;  // before one of those under way must have landed
  const bool is_long = pieces.is_long();
  if (is_long) to_start = min(to_start, args.stages_at_once);
  const int at_once = to_start;
  const uint64_t policy = l2_policy(args.read_once);
  RingPosition<kItemSlots> slot;
  const bool leads = threadIdx.x % 32 == 0;
  KeyPlaces<C> keys(args, pieces.work);
  const auto start = [&](int stage, const Piece& piece) {
    load_stage<C>(args, ring + stage * C::kStageBytes, shared.full[stage], keys, piece.key_head, policy);
  };
  const auto load_until = [&](const Piece& piece, int tile, int end) {
#pragma unroll 1
    for (int count = 1; tile < end; tile += count) {
      if (tile == keys.end_tile) keys.go_on();
      if constexpr (C::kMostTogether == 1) {
        const int stage = place.stage(args.stages);
        if (to_start > 0) {
          --to_start;
        } else {
          shared.full[landed.stage(args.stages)].wait(landed.phase(args.stages));
          landed.advance(1, args.stages);
        }
        mbarrier_wait(&shared.empty[stage], place.phase(args.stages) ^ 1);
        if (keys.is_for(tile)) start(stage, piece);
      } else {
        const bool most = is_long || (to_start == at_once && end - tile <= C::kMostTogether);
        count = min(most ? C::kMostTogether : C::kAlwaysTogether, min(end, keys.end_tile) - tile);
        const int own = keys.ahead_of(tile);
        if (own >= 0 && own < count) {
          RingPlace its = place;
          its.advance(own, args.stages);
          // NOTE: the stage that is waited for is none that another lane of the same batch fills: stages_at_once sees to it.
          if (own >= to_start) {
            const RingPlace first = its.behind(at_once, args.stages);
            shared.full[first.stage(args.stages)].wait(first.phase(args.stages));
          }
          mbarrier_wait(&shared.empty[its.stage(args.stages)], its.phase(args.stages) ^ 1);
          start(its.stage(args.stages), piece);
        }
        to_start = max(to_start - count, 0);
      }
      __syncwarp();  // or a lane might come to a barrier so late that it takes a later phase for the one that it waits for
      place.advance(count, args.stages);
    }
  };
  const auto tell = [&](const Piece& piece, int first_warp) {
    shared.item_empty[slot.stage].wait(slot.phase ^ 1);
    if (leads) {
      Item& item = shared.item[slot.stage];
      item = describe<C>(args, shared, pieces.work, pieces.idx, piece);
      item.first_warp = first_warp;
      pieces.place(item);
    }
    __syncwarp();
  };
  for (Piece piece; pieces.next(piece); is_told = false) {
    int tile = piece.begin;
    keys.begin(pieces.idx, tile);
    if (!is_told) {
      const int first_warp = place.turn & (key_warps - 1);
      tile = min(piece.end, tile + kTilesBeforeItem);
      load_until(piece, piece.begin, tile);
      tell(piece, first_warp);
      if (leads) shared.item_full[slot.stage].arrive();
    }
    slot.advance();
    pieces.draw();
    load_until(piece, tile, piece.end);
  }
  shared.item_empty[slot.stage].wait(slot.phase ^ 1);
  if (leads) {
    shared.item[slot.stage].valid = 0;
    shared.item_full[slot.stage].arrive();
  }
  let_next_kernel_start();
}

}  // namespace fa::decode_sm90
