// SPDX-License-Identifier: Apache-2.0
// The pieces of a block's work, one after the other, for the producer's warp, whose lanes all know them: either what the
// schedule's range of the block has of each head, or, where all heads are cut alike, a piece that is the block's own and others
// that it draws as it goes. Which block has a piece changes no bit of the result.
#pragma once

#include "kernels/decode_sm90/schedule.cuh"

namespace fa::decode_sm90 {

/// Where a piece lies: what must be known to start its copies.
struct Piece {
  int key_head, first_row;  // first_row: of the (row, head in group) pairs of the sequence
  int begin, end;           // key tiles
};

__device__ __forceinline__ int row_of(const KernelArgs& args, int pair) {
  return static_cast<int>(args.group_size.quotient(pair));
}

template <class C>
inline constexpr int kMinTilesOfLongShare = kMinBytesOfLongShare / C::kTileBytes;  // of a block: the memory is busy all along

/// Tiles from … to - 1 of the head's, if any row of the piece sees keys.
__device__ __forceinline__ void set_tiles(const KernelArgs& args, const SequenceWork& work, Piece& piece, int from, int to) {
  const bool used = row_of(args, piece.first_row) < work.sequence.query_length && work.begin < work.end;
  piece.begin = used ? work.begin + from : 0;
  piece.end = used ? work.begin + to : 0;
}

/// All about a piece of sequence `idx` but its place among the pieces of the head.
template <class C>
__device__ __forceinline__ Item describe(const KernelArgs& args, const SharedPlan<C::kWarps>& shared, const SequenceWork& work,
                                         int idx, const Piece& piece) {
  const Sequence& s = work.sequence;
  const int all_rows = static_cast<int>(s.num_rows) * args.group_size.divisor;
  Item item;
  item.valid = 1;
  item.sequence = idx;
  item.batch = static_cast<int>(s.batch_idx);
  item.key_head = piece.key_head;
  item.first_row = piece.first_row;
  item.num_rows = min(args.tile_rows, all_rows - item.first_row);
  item.row_base = static_cast<int>(s.first_row);
  item.query_length = static_cast<int>(s.query_length);
  item.begin = piece.begin;
  item.end = piece.end;
  item.key_begin = work.key_begin;
  item.key_end = work.key_end;
  item.band = s.mask.band();
  item.query_offset = s.mask.query_offset;
  item.test_mask = mask_has_holes<C>(args, shared, idx);
  const int last = min(row_of(args, item.first_row + item.num_rows - 1), item.query_length - 1);
  const bool plain = !args.modified && !item.test_mask;
  item.full_begin = (item.band.first(last, item.key_begin) + C::kTileN - 1) / C::kTileN;
  item.full_end = plain ? item.band.end(row_of(args, item.first_row), item.key_end) / C::kTileN : 0;
  return item;
}

/// What the schedule's range of this block has of each head.
template <class C>
struct Range {
  const KernelArgs& args;
  const SharedPlan<C::kWarps>& shared;
  Schedule schedule;
  int unit, end;        // of the range that is left
  int idx, first_unit;  // the sequence, and where it begins
  UnitRange head;       // of the last piece
  SequenceWork work;

  /// Is the block's share long?
  __device__ __forceinline__ bool is_long() const {
    return (args.uniform ? args.share : schedule.per_block) >= kMinTilesOfLongShare<C>;
  }

  __device__ __forceinline__ Range(const KernelArgs& args_, const SharedPlan<C::kWarps>& shared_)
      : args(args_), shared(shared_), schedule(args_.uniform ? args_.schedule : shared_.schedule) {
    const int block = static_cast<int>(blockIdx.x);
    unit = cut_of(schedule, min(block, schedule.blocks));
    end = cut_of(schedule, min(block + 1, schedule.blocks));
    if (unit >= end) return;
    if (args.uniform) {
      work = args.work;
      idx = args.num_spans == 1 ? 0 : unit / work.units;
      first_unit = idx * work.units;
      work.sequence.batch_idx = idx;
    } else {
      idx = shared.first_sequence;
      first_unit = shared.first_unit;
      work = shared.first_work;
    }
  }

  __device__ __forceinline__ void draw() {}

  /// False: there is no more.
  __device__ __forceinline__ bool next(Piece& piece) {
    while (unit < end) {
      while (unit >= first_unit + work.units) go_to_next_sequence();
      const int number = (unit - first_unit) / work.units_of_item, head_begin = first_unit + number * work.units_of_item;
      head = {head_begin, head_begin + work.units_of_item};
      const UnitRange part = part_of_head(head, unit, end, schedule.snap);
      unit = head.to;
      if (part.from >= part.to) continue;
      piece.key_head = work.row_tiles == 1 ? number : number / work.row_tiles;
      piece.first_row = (number - piece.key_head * work.row_tiles) * args.tile_rows;
      set_tiles(args, work, piece, part.from - head.from, part.to - head.from);
      return true;
    }
    return false;
  }

  /// The place of the last piece among those of its head.
  __device__ __forceinline__ void place(Item& item) const {
    const HeadParts parts = parts_of_head(schedule, head);
    item.counter = parts.first_block;
    item.part = static_cast<int>(blockIdx.x) - parts.first_block;
    item.num_parts = parts.count;
    item.first_slot = 2 * parts.first_block + 1;
    item.late_slot = 2 * parts.first_block;
    item.slot_step = 2;
    item.in_cluster = 0;
    item.last_of_block = end <= head.to;
  }

 private:
  __device__ __forceinline__ void go_to_next_sequence() {
    first_unit += work.units;
    ++idx;
    if (args.uniform) {
      work.sequence.batch_idx = idx;
    } else {
      work = work_of<C>(args, shared, idx);
    }
  }
};

/// Pieces of a HeadCut: the block's own, and then whichever is the next that no block has.
template <class C>
struct DrawnPieces {
  const KernelArgs& args;
  SharedPlan<C::kWarps>& shared;
  const HeadCut& cut;
  const int tiles;                            // of each head
  int number = static_cast<int>(blockIdx.x);  // of the next piece
  int idx;                                    // the sequence
  int head, part;                             // of the last piece
  SequenceWork work;

  /// heads: of the block's first piece.
  __device__ __forceinline__ DrawnPieces(const KernelArgs& args_, SharedPlan<C::kWarps>& shared_, const EqualHeads& heads)
      : args(args_), shared(shared_), cut(args_.cut), tiles(heads.tiles), idx(heads.sequence), work(heads.work) {}

  __device__ __forceinline__ bool is_long() const {
    if (args.uniform) return args.share >= kMinTilesOfLongShare<C>;
    return tiles * cut.heads >= kMinTilesOfLongShare<C> * static_cast<int>(gridDim.x);
  }

  /// Finds out which piece comes after the last one: in the first lane. Called before that one's copies start, which hide the way
  /// to the counter.
  __device__ __forceinline__ void draw() {
    number = cut.pieces;
    if (cut.pieces > static_cast<int>(gridDim.x) && threadIdx.x % 32 == 0)
      number = static_cast<int>(gridDim.x + atomicInc(args.draws, cut.pieces - 1));  // 0 again after the last block's last
  }

  /// A warp. False: there is no more.
  __device__ __forceinline__ bool next(Piece& piece) {
    number = __shfl_sync(kAllLanes, number, 0);
    return take(piece);
  }

  /// Piece `number`.
  __device__ __forceinline__ bool take(Piece& piece) {
    if (number >= cut.pieces) return false;
    const int its = find(piece);
    if (args.uniform) {
      work.sequence.batch_idx = its;
    } else if (__builtin_expect(its != idx, 0)) {
      work = work_of<C>(args, shared, its);
    }
    idx = its;
    set_tiles(piece);
    return true;
  }

  /// Which rows of which head piece `number` has. Returns their sequence.
  __device__ __forceinline__ int find(Piece& piece) {
    const int parts = static_cast<int>(cut.parts.divisor);
    head = static_cast<int>(cut.parts.quotient(number));
    part = number - head * parts;
    const int its = static_cast<int>(cut.heads_of_span.quotient(head));
    const int item = head - its * static_cast<int>(cut.heads_of_span.divisor);
    piece.key_head = static_cast<int>(cut.row_tiles.quotient(item));
    piece.first_row = (item - piece.key_head * static_cast<int>(cut.row_tiles.divisor)) * args.tile_rows;
    return its;
  }

  /// Its tiles.
  __device__ __forceinline__ void set_tiles(Piece& piece) const {
    const int from = static_cast<int>(cut.parts.quotient(tiles * part));
    decode_sm90::set_tiles(args, work, piece, from, static_cast<int>(cut.parts.quotient(tiles * (part + 1))));
  }

  /// The place of the last piece among those of its head.
  __device__ __forceinline__ void place(Item& item) const {
    const int parts = static_cast<int>(cut.parts.divisor);
    item.counter = parts > 1 ? head : 0;
    item.part = part;
    item.num_parts = parts;
    item.first_slot = item.late_slot = head * parts;
    item.slot_step = 1;
    item.in_cluster = cut.cluster > 0;
    item.last_of_block = true;  // with draws there is nothing to merge
  }
};

/// A thread of the consumers tells them of the block's first piece of a HeadCut, while the producer already starts its copies.
template <class C>
__device__ __forceinline__ void tell_first_piece(const KernelArgs& args, SharedPlan<C::kWarps>& shared, const EqualHeads& heads) {
  DrawnPieces<C> pieces(args, shared, heads);
  if (pieces.number >= args.cut.pieces) return;
  Piece piece;
  pieces.work.sequence.batch_idx = pieces.idx = pieces.find(piece);
  pieces.set_tiles(piece);
  Item& item = shared.item[0];
  item = describe<C>(args, shared, pieces.work, pieces.idx, piece);
  item.first_warp = 0;
  pieces.place(item);
  shared.item_full[0].arrive();
}

}  // namespace fa::decode_sm90
